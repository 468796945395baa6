"""The engine settings that decide how many tokens a cache holds: vLLM's defaults and `engine.args`.

vLLM 0.32.0 sizes the blocks that a sliding-window layer keeps by `--max-num-batched-tokens`
(v1/kv_cache_interface.py, `SlidingWindowSpec.max_admission_blocks_per_request`), whose default depends on the
device (engine/arg_utils.py, `get_batch_defaults`), and by how many steps may be under way at once
(config/vllm.py, `max_concurrent_batches`). The OpenAI server's defaults are meant here.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from turboquant_kernels.formats import RAW_BLOCK_DEVICES
from turboquant_operator.planner.accelerators import Accelerator
from turboquant_operator.planner.outcome import NoPlan, refused

CPU_BLOCK_TOKENS = 128
"""Tokens in a block on CPU (platforms/cpu.py)."""
GPU_BLOCK_TOKENS = 16
"""Tokens in a block elsewhere (config/cache.py, DEFAULT_BLOCK_SIZE)."""

_LARGE_GPU_BYTES = 70 * 2**30
"""From this memory on vLLM batches 8,192 tokens and 1,024 sequences, except on an A100."""
_LARGEST_GPU_BYTES = 160 * 2**30
"""From this memory on it batches 16,384 tokens and 1,024 sequences."""

_DTYPES = {
    "auto": None,
    "half": "float16",
    "float16": "float16",
    "bfloat16": "bfloat16",
    "float": "float32",
    "float32": "float32",
}
_FLAGS = (
    "async-scheduling",
    "block-size",
    "dtype",
    "enable-lora",
    "enforce-eager",
    "language-model-only",
    "limit-mm-per-prompt",
    "max-num-batched-tokens",
    "max-num-seqs",
    "no-async-scheduling",
    "performance-mode",
    "spec-method",
    "spec-model",
    "speculative-config",
)
_MODEL_FLAGS = {"enable-lora", "spec-method", "spec-model", "speculative-config"}
_SHORT_FLAGS = {"-sc": "--speculative-config"}
_SUFFIXES = {"k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclass(frozen=True)
class EngineSettings:
    """How one engine process batches and blocks."""

    block_tokens: int
    """Tokens in a block of a full-attention layer."""
    batched_tokens: int
    """Most tokens of one step."""
    sequences: int
    """Most sequences of one step."""
    dtype: str | None = None
    """`--dtype` where the user gave one."""
    compiled: bool = True
    """`torch.compile` and CUDA graphs, which `--enforce-eager` turns off."""
    images: bool = True
    """A multi-modal model is asked to take images."""
    extra_models: bool = False
    """A draft model or LoRA adapters are loaded too; their memory is not in the plan."""
    overlaps_steps: bool = False
    """The next step is scheduled while one runs (`--async-scheduling`): the default, except on CPU, which has
    no such thing (platforms/cpu.py)."""
    least_plain_tokens: int = 32
    """Tokens in the smallest block of a cache in the model's own dtype: 32 on CPU, 16 elsewhere (cpu_attn.py
    and flash_attn.py, `get_supported_kernel_block_sizes`)."""

    raw_block: bool = False
    """Compressed caches keep the newest tokens of a sequence in the model's own dtype."""

    def in_flight_tokens(self, pipeline: int) -> int:
        """Most tokens of all steps that are under way at once in `pipeline` stages."""
        return (pipeline + self.overlaps_steps) * self.batched_tokens


def engine_settings(
    args: Sequence[str], accelerator: Accelerator | None, context_length: int
) -> EngineSettings | NoPlan:
    """Settings from `spec.engine.args`, with vLLM's defaults; `accelerator` is None on cpu.

    A flag whose value cannot be read is refused here, before a pod fails on it.
    """
    given = _flags(args)
    numbers: dict[str, int] = {}
    for flag in ("block-size", "max-num-batched-tokens", "max-num-seqs"):
        if flag in given:
            number = _human_readable(given[flag])
            if number is None:
                return refused(
                    "InvalidEngineArgument",
                    f"engine.args: --{flag} {given[flag]!r} is not a number of tokens.",
                )
            numbers[flag] = number
    dtype = given.get("dtype", "auto")
    if dtype not in _DTYPES:
        return refused(
            "InvalidEngineArgument", f"engine.args: --dtype {dtype!r} is not one of {', '.join(_DTYPES)}."
        )
    tokens, sequences = _batch_defaults(accelerator)
    if given.get("performance-mode") == "throughput":
        tokens, sequences = 2 * tokens, 2 * sequences
    sequences = numbers.get("max-num-seqs", sequences)
    # The default of a step, but not a value that the user set, shrinks to what all sequences can hold.
    tokens = numbers.get("max-num-batched-tokens", min(tokens, sequences * context_length))
    return EngineSettings(
        block_tokens=numbers.get("block-size", GPU_BLOCK_TOKENS if accelerator else CPU_BLOCK_TOKENS),
        batched_tokens=tokens,
        sequences=min(sequences, tokens) if "max-num-seqs" not in numbers else sequences,
        dtype=_DTYPES[dtype],
        compiled="enforce-eager" not in given,
        images=_takes_images(given),
        extra_models=any(flag.partition(".")[0] in _MODEL_FLAGS for flag in given),
        overlaps_steps=accelerator is not None and "no-async-scheduling" not in given,
        least_plain_tokens=16 if accelerator else 32,
        raw_block=("cuda" if accelerator else "cpu") in RAW_BLOCK_DEVICES,
    )


def _batch_defaults(accelerator: Accelerator | None) -> tuple[int, int]:
    if accelerator is None:
        return 2048, 128
    if accelerator.total_bytes >= _LARGEST_GPU_BYTES:
        return 16384, 1024
    if accelerator.total_bytes >= _LARGE_GPU_BYTES and "a100" not in accelerator.name:
        return 8192, 1024
    return 2048, 256


def _flags(args: Sequence[str]) -> dict[str, str]:
    """Flags with their values, as argparse reads them: `--a=b` and `--a`, `b`, hyphens or underscores, any
    beginning of a name for the name. An ambiguous beginning stops the engine, not the planner.
    """
    found: dict[str, str] = {}
    for word, following in pairwise([*args, ""]):
        flag, equals, value = word.partition("=")
        flag = _SHORT_FLAGS.get(flag, flag)
        if flag.startswith("--"):
            name, dot, key = flag[2:].replace("_", "-").partition(".")
            name = next((known for known in _FLAGS if known.startswith(name)), name)
            follows = "" if following.startswith("--") else following
            found[name + dot + key] = value if equals else follows
    return found


def _takes_images(given: Mapping[str, str]) -> bool:
    limit = given.get("limit-mm-per-prompt", "")
    none = given.get("limit-mm-per-prompt.image") == "0" or re.search(r"\bimage\b\W*[:=]\s*0\b", limit)
    return not none and "language-model-only" not in given


def _human_readable(text: str) -> int | None:
    """vLLM's `human_readable_int`: 2048, 2k (2,000), 2K (2,048), 25.6k."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kKmMgGtT])?", text.strip())
    if not match or ("." in match[1] and not match[2]):
        return None
    return int(float(match[1]) * _SUFFIXES[match[2]]) if match[2] else int(match[1])
