"""Asks vLLM itself, without starting an engine, what the planner predicts. Run as a script by a test.

    python vllm_capacity.py CONFIG_JSON... < question.json > answers.json

Builds vLLM's own model class of every config on the meta device, takes each attention layer's cache spec,
and lets vLLM lay the cache out. Prints one JSON object: per config name and per case the capacity in tokens,
and what vLLM made of the config. The question is {"cases": [...], "layers": {config name: attention layers}};
a case {"cache_dtype", "max_model_len", "args", "skip_layers", "memory", "mix"}. Layers take turns in a mix.
"""

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", VLLM_LOGGING_LEVEL="ERROR", VLLM_CPU_OMP_THREADS_BIND="nobind")

import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import ensure_model_parallel_initialized, init_distributed_environment
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.model_loader.utils import get_model_architecture
from vllm.platforms import current_platform
from vllm.usage.usage_lib import UsageContext
from vllm.utils.torch_utils import set_default_torch_dtype
from vllm.v1.attention.backends.utils import get_supported_kv_cache_layouts, resolve_kv_cache_layout
from vllm.v1.core.kv_cache_utils import get_kv_cache_capacity, get_kv_cache_configs
from vllm.v1.worker.utils import customize_attention_spec

from turboquant_kernels.formats import KVFormat
from turboquant_kernels.plans import PLAN_KEY, KVPlan


def engine_config(folder: Path, case: dict[str, Any], layers: int) -> VllmConfig:
    """The engine's configuration for one case, as the OpenAI server would make it."""
    additional: dict[str, Any] = {}
    if mix := case.get("mix"):
        plan = KVPlan(tuple(KVFormat.parse(mix[layer % len(mix)]) for layer in range(layers)))
        additional = {PLAN_KEY: plan.to_dict()}
    args = EngineArgs(
        model=str(folder),
        skip_tokenizer_init=True,
        load_format="dummy",
        enforce_eager=True,
        kv_cache_dtype=case["cache_dtype"],
        max_model_len=case.get("max_model_len"),
        kv_cache_dtype_skip_layers=[str(layer) for layer in case.get("skip_layers", [])],
        limit_mm_per_prompt={"image": 0},
        additional_config=additional,
        **case.get("args", {}),
    )
    return args.create_engine_config(usage_context=UsageContext.OPENAI_API_SERVER)


def cache_specs(config: VllmConfig) -> dict[str, Any]:
    """The cache spec of every attention layer; the config is told the layout that their backends share."""
    with set_current_vllm_config(config):
        if not torch.distributed.is_initialized():
            with tempfile.NamedTemporaryFile(delete=False) as store:
                init_distributed_environment(1, 0, f"file://{store.name}", 0, "gloo")
            ensure_model_parallel_initialized(1, 1)
        model_class, _ = get_model_architecture(config.model_config)
        with torch.device("meta"), set_default_torch_dtype(config.model_config.dtype):
            model_class(vllm_config=config, prefix="")
        current_platform.update_block_size_for_backend(config)  # as a worker does once the model is loaded
        layers = {
            name: layer
            for name, layer in config.compilation_config.static_forward_context.items()
            if hasattr(layer, "get_kv_cache_spec")
        }
        backends = {name: layer.get_attn_backend() for name, layer in layers.items()}
        specs = {
            name: customize_attention_spec(backends[name], layer.get_kv_cache_spec(config))
            for name, layer in layers.items()
        }
        supported = get_supported_kv_cache_layouts(dict.fromkeys(backends.values()))
        resolve_kv_cache_layout(config, [[layout.name for layout in supported]], specs.values())
    return specs


def answer(folder: Path, case: dict[str, Any], layers: int) -> dict[str, Any]:
    """What vLLM makes of one model and one case."""
    config = engine_config(folder, case, layers)
    specs = cache_specs(config)
    found = {
        "context_length": config.model_config.max_model_len,
        "dtype": str(config.model_config.dtype).removeprefix("torch."),
        "windows": [getattr(spec, "sliding_window", None) for spec in specs.values()],
        "key_value_heads": next(iter(specs.values())).num_kv_heads,
        "batched_tokens": config.scheduler_config.max_num_batched_tokens,
    }
    try:
        (layout,) = get_kv_cache_configs(config, [specs], [case["memory"]])
    except (ValueError, NotImplementedError) as error:
        return {**found, "refused": str(error)}
    return {**found, "tokens": get_kv_cache_capacity(config, layout)[0]}


def main() -> None:
    """Answers all cases of all configs; a model that vLLM cannot build is reported, not skipped."""
    question = json.load(sys.stdin)
    # Models print as they please; only the answers go to the caller.
    output = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    answers: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for path in map(Path, sys.argv[1:]):
            folder = Path(scratch) / path.stem
            folder.mkdir()
            document = json.loads(path.read_text())
            # The weights' quantization says nothing about the cache, and not every kind has kernels on a CPU.
            document.pop("quantization_config", None)
            (folder / "config.json").write_text(json.dumps(document))
            answers[path.stem] = []
            for case in question["cases"]:
                try:
                    answers[path.stem].append(answer(folder, case, question["layers"][path.stem]))
                except Exception as error:
                    answers[path.stem].append({"failed": f"{type(error).__name__}: {error}"})
    json.dump(answers, output)
    output.close()


if __name__ == "__main__":
    main()
