"""Engines for the tests: real vLLM engines inside the test process, each started once a module.

vLLM's settings are read when it is first imported, so they are set here, before any test module is. Engines
run in this process (no engine-core process, no worker process): a start costs seconds, and tests can look at
the real cache tensors and logits. What only a server shows is tested on one (`test_engine_server.py`).
"""

import gc
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch

os.environ.update(
    {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "TORCHDYNAMO_DISABLE": "1",
        # Threads that meet after every small operation wait for each other's turn where a machine does other
        # work beside the tests. With one, the process's CPU time is the engine's.
        "OMP_NUM_THREADS": "1",
    }
)
torch.set_num_threads(1)  # PyTorch read the number as it was imported
sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))

if not torch.cuda.is_available():
    # Kernels run in Triton's interpreter, which their decorators decide at import. Child processes find
    # Triton as it is.
    os.environ["TRITON_INTERPRET"] = "1"
    import triton

    triton.knobs.runtime.interpret = True
    del os.environ["TRITON_INTERPRET"]


class Engine:
    """One vLLM engine, with the few handles on its inside that the tests need."""

    def __init__(self, model: Path, kv_cache_dtype: str, **arguments: Any) -> None:
        from vllm import LLM
        from vllm.v1.worker import workspace

        self.llm = LLM(
            **{
                "model": str(model),
                "kv_cache_dtype": kv_cache_dtype,
                "enforce_eager": True,
                "distributed_executor_backend": "uni",
                "disable_log_stats": False,
                "max_num_seqs": 16,
                "seed": 0,
            }
            | arguments
        )
        self.config = self.llm.llm_engine.vllm_config
        core = self.llm.llm_engine.engine_core.engine_core
        self.scheduler, self.executor = core.scheduler, core.model_executor
        # Experts write there. vLLM frees it as the next engine starts, but captured graphs go on writing.
        self.workspace = workspace._manager

    @property
    def runner(self) -> Any:
        """The model runner of an engine with one worker, which is in this process."""
        return self.executor.driver_worker.worker.model_runner

    @property
    def capacity_tokens(self) -> int:
        return self.config.cache_config.kv_cache_size_tokens

    @property
    def kv_tensors(self) -> dict[str, Any]:
        """The cache tensor of each attention layer, by the layer's name."""
        layers = self.config.compilation_config.static_forward_context
        return {name: layers[name].kv_cache for name in self.layer_names}

    @property
    def layer_names(self) -> list[str]:
        return [name for group in self.runner.kv_cache_config.kv_cache_groups for name in group.layer_names]

    def generate(
        self, prompts: list[list[int]], max_tokens: int, lora_request: Any = None, **sampling: Any
    ) -> list[Any]:
        """Greedy completions of token-id prompts, all submitted at once: vLLM's RequestOutput each."""
        from vllm import SamplingParams

        parameters = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, **sampling)
        return self.llm.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts],
            parameters,
            use_tqdm=False,
            lora_request=lora_request,
        )

    def generate_and_cancel(
        self, prompts: list[list[int]], max_tokens: int, cancelled: int, after_steps: int, **sampling: Any
    ) -> list[Any]:
        """As `generate`, but cancels one prompt after some of the engine's steps; the others' outputs."""
        from vllm import SamplingParams

        parameters = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, **sampling)
        engine, finished, steps = self.llm.llm_engine, {}, 0
        for index, prompt in enumerate(prompts):
            engine.add_request(str(index), {"prompt_token_ids": prompt}, parameters)
        while engine.has_unfinished_requests():
            finished |= {output.request_id: output for output in engine.step() if output.finished}
            steps += 1
            if steps == after_steps:
                assert str(cancelled) not in finished
                engine.abort_request([str(cancelled)])
        return [finished[str(index)] for index in range(len(prompts)) if index != cancelled]

    def forget(self) -> None:
        """Empties the prefix cache: the next request is fresh."""
        assert self.llm.reset_prefix_cache()

    def prompt_logits(self, tokens: list[int]) -> Any:
        """Logits after each of the tokens, float32 [len(tokens), vocab], from one fresh request."""
        import torch

        compute, seen = self.runner.model.compute_logits, []

        def record(hidden_states: Any, *args: Any) -> Any:
            logits = compute(hidden_states, *args)
            seen.append(logits.float())
            return logits

        self.forget()
        self.runner.model.compute_logits = record
        try:
            self.generate([tokens], max_tokens=1, prompt_logprobs=0)
        finally:
            del self.runner.model.compute_logits
        # After each chunk vLLM computes one row to sample from, the last of which follows the last token, and
        # then the rows of the chunk's other tokens.
        rows = [logits for logits in seen if len(logits) > 1]
        rows.append([logits for logits in seen if len(logits) == 1][-1])
        seen.clear()
        logits = torch.cat(rows)
        assert len(logits) == len(tokens)
        return logits


def _engines_stay(fixture_name: str, config: pytest.Config) -> Literal["session", "module"]:
    """On a GPU for the session, where starts take longest; elsewhere all of them would not fit in memory."""
    return "session" if torch.cuda.is_available() else "module"


@pytest.fixture(scope=_engines_stay)
def start_engine() -> Iterator[Callable[..., Engine]]:
    """Starts an engine, or gives the one that was started with the same arguments and model runner.

    The next start takes from an earlier engine that it offloads its cache, and for steps outside of captured
    graphs its experts' workspace.
    """
    engines: dict[str, Engine] = {}

    def start(model: Path, kv_cache_dtype: str, **arguments: Any) -> Engine:
        from vllm import envs
        from vllm.compilation.monitor import set_cudagraph_capturing_enabled
        from vllm.distributed.kv_transfer import ensure_kv_transfer_shutdown
        from vllm.distributed.parallel_state import destroy_model_parallel

        runner = os.environ.get("VLLM_USE_V2_MODEL_RUNNER")
        key = repr((str(model), kv_cache_dtype, runner, sorted(arguments.items())))
        if key not in engines:
            # Earlier engines leave what they read of the environment, where they offload to, and that no more
            # graphs are captured.
            envs.disable_envs_cache()
            ensure_kv_transfer_shutdown()
            set_cudagraph_capturing_enabled(True)
            if arguments.get("distributed_executor_backend") != "mp":
                # Otherwise vLLM keeps the groups of the process's first engine, which have none of experts.
                destroy_model_parallel()
            engines[key] = Engine(model, kv_cache_dtype, **arguments)
        return engines[key]

    yield start
    engines.clear()
    gc.collect()


@pytest.fixture(scope="session")
def gemma() -> Path:
    """Gemma-3-270m: pretrained, head_dim 256, five sliding-window layers to one with full attention."""
    from models.fetch import MODELS, fetch

    return fetch(MODELS["gemma-3-270m"])


@pytest.fixture(scope="session")
def dummy_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Makes a model folder of a shape in `models.dummy`, by its name; equal calls share one.

    Without weights, or with the random ones of the given seed.
    """
    from models import dummy

    folders: dict[str, Path] = {}

    def make(shape: str, weights: int | None = None, **overrides: Any) -> Path:
        key = repr((shape, weights, sorted(overrides.items())))
        if key not in folders:
            folder = tmp_path_factory.mktemp(shape.lower())
            folders[key] = dummy.write_model(folder, getattr(dummy, shape), **overrides)
            if weights is not None:
                dummy.write_weights(folder, weights)
        return folders[key]

    return make


@pytest.fixture
def facts() -> SimpleNamespace:
    """A model that can be served, as keyword arguments of `EngineFacts`."""
    return SimpleNamespace(
        device="cpu",
        compute_capability=None,
        dtype="bfloat16",
        num_layers=4,
        head_dim=128,
        draft_head_dim=None,
        block_size=128,
        draft_tokens=0,
        mla=False,
        encoder_decoder=False,
        hybrid=False,
        chunked_local_attention=False,
        reference_window=False,
        bidirectional_modalities=(),
        context_parallel=False,
        dual_batch=False,
        adaptive_verification=False,
        fast_prefill=False,
        kv_connector=None,
    )
