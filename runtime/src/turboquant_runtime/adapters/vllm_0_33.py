"""Every touch of vLLM 0.33's internals: written against the source of its wheel, never run.

vLLM 0.33 needs a torch that this project's kernels have not been tried with, so no engine of it has been
started; `tests/test_vllm_0_33.py` holds the names and arguments used here to those of the wheel. It has
hooks for half of what 0.25 is patched for: formats are registered, and a backend says how many bytes a
token takes (`vllm_0_33_backends`). What is left, and how it differs from `vllm_0_25`:

| process | touched | difference |
|---|---|---|
| every | `register_kv_cache_dtype` | an official hook in place of a closed Literal |
| front end | `Platform.check_and_update_config` | refuses hybrids too |
| worker | `Platform.get_attn_backend_cls` | other backends |
| worker | `Attention.get_kv_cache_spec` | bytes have a field of their own |
| worker | `extend_all_queries_by_N` | none |
| engine core, front end | page identity, the ready message | layout functions have moved |

Layers in the model's own dtype need no patch: the backend's hook sizes what they share a pool with.
"""

import logging
import sys
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from vllm.config import VllmConfig

from turboquant_kernels.formats import COMPRESSED_FORMATS
from turboquant_runtime.adapters import vllm_0_25
from turboquant_runtime.adapters.baseline import uncompressed_config
from turboquant_runtime.capacity import CacheCapacity
from turboquant_runtime.configuration import CACHE_DTYPES, RefusedConfiguration

logger = logging.getLogger("vllm.turboquant")

BACKENDS = {
    "cpu": "turboquant_runtime.adapters.vllm_0_33_backends.CompressedCPUBackend",
    "cuda": "turboquant_runtime.adapters.vllm_0_33_backends.CompressedCUDABackend",
}
"""Our attention backend for each platform's device type."""


@cache
def install() -> None:
    """Extends and patches the vLLM of this process; further calls do nothing."""
    logger.warning("turboquant-runtime has never been run on vLLM 0.33: prefer vLLM 0.25.1")
    register_cache_dtypes()
    vllm_0_25.refuse_early(accept)
    vllm_0_25.route_attention(BACKENDS, _give_layers_their_own_size)
    if "vllm.v1.engine.core" in sys.modules:
        report_capacity()


def accept(vllm_config: VllmConfig) -> None:
    """Called in the front end for what `check_servable` lets pass.

    Raises RefusedConfiguration for a hybrid: how its uncompressed cache would be laid out has not been
    compared with an engine of this version.
    """
    if vllm_config.model_config.is_hybrid:
        raise RefusedConfiguration(
            "hybrid models are served from compressed caches on vLLM 0.25.1 only so far: use that version, "
            "or start with --kv-cache-dtype auto"
        )
    report_capacity()


def register_cache_dtypes() -> None:
    """Makes our format names values of `--kv-cache-dtype`, by vLLM's own hook."""
    from vllm.config.cache import register_kv_cache_dtype
    from vllm.v1.kv_cache_interface import KVQuantMode

    class Pages:
        """Pages of bytes, which no kernel of vLLM reads."""

        def torch_dtype(self) -> torch.dtype:
            return torch.uint8

        def quant_mode(self) -> KVQuantMode:
            # The same number as `OCTAVE_K3V4`, which only ROCm's backends ask for.
            return KVQuantMode.CUSTOM

    for fmt in COMPRESSED_FORMATS:
        register_kv_cache_dtype(fmt.name)(type("Pages", (Pages,), {"name": fmt.name}))


@cache
def _give_layers_their_own_size() -> None:
    """Makes a compressed layer's cache spec count the bytes of this layer's format.

    Patched, when the first compressed layer is made: `Attention.get_kv_cache_spec`. The backend's
    `customize_spec` is not told which layer it sizes, and leaves a spec alone that has its bytes.
    """
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.layers.attention.attention import Attention

    original = Attention.get_kv_cache_spec

    def get_kv_cache_spec(self: Any, vllm_config: VllmConfig) -> Any:
        if self.kv_cache_dtype not in CACHE_DTYPES:
            return original(self, vllm_config)
        slot_bytes = vllm_0_25.slot_bytes_of(self, vllm_config)
        with set_current_vllm_config(vllm_config):  # a window's blocks are sized by `customize_spec`
            spec = original(self, vllm_config)
        return spec and replace(spec, state_content_bytes=slot_bytes)

    Attention.get_kv_cache_spec = get_kv_cache_spec


@cache
def report_capacity() -> None:
    """Sends the capacity of the uncompressed cache as this version of vLLM would lay it out."""
    vllm_0_25.send_capacity(measure_capacity)


def measure_capacity(
    vllm_config: VllmConfig, specs: list[dict[str, Any]], memory: list[int]
) -> CacheCapacity:
    """As `baseline.measure_capacity`, with the functions and spec fields of this version; no hybrids."""
    from vllm.v1.core import kv_cache_planning, kv_cache_utils

    baseline = uncompressed_config(vllm_config)
    tokens = []
    for worker_specs, worker_memory in zip(specs, memory, strict=True):
        plain = {name: _uncompressed(spec, vllm_config) for name, spec in worker_specs.items()}
        groups = kv_cache_planning.get_kv_cache_groups(baseline, plain)
        layout = kv_cache_planning.get_kv_cache_config_from_groups(baseline, groups, worker_memory)
        tokens.append(kv_cache_utils.get_kv_cache_capacity(baseline, layout)[0])
    bytes_per_token = max(
        sum(spec.page_size_bytes / spec.block_size for spec in worker.values()) for worker in specs
    )
    return CacheCapacity(baseline_tokens=min(tokens), bytes_per_token=bytes_per_token)


def _uncompressed(spec: Any, vllm_config: VllmConfig) -> Any:
    """The spec that a layer would have in the model's own dtype."""
    from vllm.v1.kv_cache_interface import KVQuantMode

    if spec.dtype != torch.uint8:
        return spec
    dtype = vllm_config.model_config.dtype
    return replace(spec, state_content_bytes=None, kv_quant_mode=KVQuantMode.NONE, dtype=dtype)
