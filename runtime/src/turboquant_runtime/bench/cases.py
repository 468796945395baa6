"""What `tq bench engine` measures: cases, the groups that a command runs, the engines they need. Pure data.

`cli` chooses groups, `plan` turns them into one engine start per model, settings and cache, `runner` starts
each in a process of its own, where `workloads` measures its cases.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MODELS = Path(__file__).with_name("models")
"""A folder a model with its `config.json`. Weights are random (`load_format="dummy"`): speed and capacity
depend on shapes alone."""

BASELINES = ("auto", "fp8")
"""The caches that ratios are taken to; `auto` is the model's own dtype, bf16 in all shapes here."""

CACHES = (*BASELINES, "tq-k4v4", "tq-k3v3")
VLLM_COMPRESSED = ("int4_per_token_head", "turboquant_4bit_nc")
"""Compressed caches that vLLM 0.32 has of its own on NVIDIA GPUs; its `ultraquant_4bit` is for others
alone."""


@dataclass(frozen=True)
class Prefill:
    """Time to the first token of prompts that come one by one."""

    tokens: int
    repeats: int = 3

    @property
    def names(self) -> tuple[str, ...]:
        return (f"prefill {self.tokens}",)


@dataclass(frozen=True)
class Decode:
    """Steps in which each of n running sequences gets one token, for each n of `sequences` in turn.

    The sequences of a smaller n go on in the next one, so that no context is computed twice; they are longer
    than `context` by the tokens that they got meanwhile, one for each step of others' prefill.
    """

    sequences: tuple[int, ...]
    context: int
    steps: int = 32
    """Engine steps in one repeat."""
    repeats: int = 3

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(f"{count}x{self.context}" for count in self.sequences)


@dataclass(frozen=True)
class Batch:
    """Prompts that come all at once, to the last token of the last: output tokens per second."""

    prompts: int
    prompt_tokens: int
    output_tokens: int
    repeats: int = 3

    @property
    def names(self) -> tuple[str, ...]:
        return (f"{self.prompts}x{self.prompt_tokens}+{self.output_tokens}",)


@dataclass(frozen=True)
class Sessions:
    """Users who come back: each turn's prompt is all that was said before and some new tokens.

    Sessions take turns in a fixed order, `at_once` of them in the engine. A prompt that the cache has lost is
    computed again. The first turn, which no cache can know, is not measured.
    """

    sessions: int
    first_prompt_tokens: int
    turns: int
    """Turns that are measured, one repeat each."""
    user_tokens: int
    output_tokens: int
    at_once: int

    @property
    def names(self) -> tuple[str, ...]:
        return (f"sessions {self.sessions}x{self.last_tokens}",)

    @property
    def last_tokens(self) -> int:
        """Length of a session at its end."""
        return (
            self.first_prompt_tokens
            + self.output_tokens
            + self.turns * (self.user_tokens + self.output_tokens)
        )


@dataclass(frozen=True)
class Start:
    """Seconds from before vLLM's import until an engine takes requests, on a machine that has started one.

    The runner starts the engine once more for each repeat: what the first start compiled lies on disk then.
    """

    repeats: int = 2

    @property
    def names(self) -> tuple[str, ...]:
        return ("start",)


Case = Prefill | Decode | Batch | Sessions | Start

_PLAIN: dict[str, Any] = {
    "gpu_memory_utilization": 0.9,
    "max_model_len": 40_000,
    "max_num_batched_tokens": 8192,
    "max_num_seqs": 32,
    "enable_prefix_caching": False,
    "compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"},
}

SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "plain": _PLAIN,
    "vllm-defaults": {"gpu_memory_utilization": 0.9, "max_model_len": 40_000},
    # A tenth of what an H200 leaves for the cache of the Llama shape: 89,856 tokens in bf16.
    "small-cache": _PLAIN | {"enable_prefix_caching": True, "kv_cache_memory_bytes": 11_780_000_000},
    "two-gpus": _PLAIN | {"quantization": "fp8", "tensor_parallel_size": 2},
    # One of vLLM's own backends takes a minute to capture a graph.
    "few-graphs": _PLAIN
    | {
        "compilation_config": {
            "mode": 0,
            "cudagraph_mode": "FULL_DECODE_ONLY",
            "cudagraph_capture_sizes": [1, 4],
        }
    },
    "smoke": {
        "kv_cache_memory_bytes": 16 << 20,
        "max_model_len": 512,
        "max_num_batched_tokens": 128,
        "max_num_seqs": 4,
        "enable_prefix_caching": True,
        "enforce_eager": True,
    },
}
"""Arguments of vLLM's `LLM`, by the name that rows carry."""


@dataclass(frozen=True)
class Group:
    """Rows that one command measures, baselines among them, on one machine in under ten minutes."""

    title: str
    model: str
    cases: tuple[Case, ...]
    caches: tuple[str, ...] = CACHES
    settings: str = "plain"


GROUPS: Mapping[str, Group] = {
    "prefill": Group("time to the first token of 32,000", "llama-3.1-8b", (Prefill(32_000),)),
    "decode": Group("capacity, and decode at 32,000 tokens", "llama-3.1-8b", (Decode((1, 8, 32), 32_000),)),
    "short": Group("many short requests", "llama-3.1-8b", (Batch(64, 512, 128),), (*BASELINES, "tq-k4v4")),
    "start": Group("warm engine starts", "llama-3.1-8b", (Start(),), ("auto", "tq-k4v4")),
    "sessions": Group(
        "multi-turn sessions, three times what a small bf16 cache holds",
        "llama-3.1-8b",
        (Sessions(16, 15_400, turns=3, user_tokens=400, output_tokens=100, at_once=4),),
        (*BASELINES, "tq-k4v4"),
        settings="small-cache",
    ),
    "vllm-compressed": Group(
        "vLLM's own compressed caches",
        "llama-3.1-8b",
        (Prefill(32_000, repeats=2), Decode((1, 4), 32_000)),
        ("auto", "tq-k4v4", *VLLM_COMPRESSED),
        settings="few-graphs",
    ),
    "vllm-defaults": Group(
        "vLLM's default flags",
        "llama-3.1-8b",
        (Prefill(32_000), Decode((8,), 32_000)),
        (*BASELINES, "tq-k4v4"),
        settings="vllm-defaults",
    ),
    "moe": Group("a mixture of experts", "qwen3-30b-a3b", (Decode((1, 8), 32_000),)),
    "sliding-window": Group("five layers of six with a window", "gemma-3-12b", (Decode((1, 8), 32_000),)),
    "tensor-parallel": Group(
        "a large model in fp8 over two GPUs",
        "llama-3.1-70b",
        (Prefill(32_000), Decode((1, 8), 32_000), Batch(64, 512, 128)),
        (*BASELINES, "tq-k5v3"),
        settings="two-gpus",
    ),
    "smoke": Group(
        "a toy model, on the CPU too; its numbers mean nothing",
        "smoke",
        (
            Prefill(96, repeats=2),
            Decode((1, 2), 96, steps=3, repeats=2),
            Batch(3, 16, 4, repeats=2),
            Sessions(3, 200, turns=2, user_tokens=8, output_tokens=4, at_once=2),
        ),
        ("auto", "tq-k4v4"),
        settings="smoke",
    ),
}


@dataclass(frozen=True)
class EngineRun:
    """One engine and what is measured on it, in order."""

    model: str
    settings: str
    cache: str
    """Value of `--kv-cache-dtype`."""
    cases: tuple[Case, ...]

    @property
    def label(self) -> str:
        return f"{self.model} {self.cache}" + ("" if self.settings == "plain" else f" ({self.settings})")

    @property
    def arguments(self) -> dict[str, Any]:
        """Arguments of vLLM's `LLM`."""
        return {
            "model": str(MODELS / self.model),
            "load_format": "dummy",
            "skip_tokenizer_init": True,
            "kv_cache_dtype": self.cache,
            **SETTINGS[self.settings],
        }


def plan(groups: Iterable[str], caches: Sequence[str] = ()) -> list[EngineRun]:
    """The engines that groups need, each once: groups that share an engine are measured on one start.

    `caches` leaves other engines out. Engines of one model and settings follow one another. Raises KeyError
    for a group that does not exist.
    """
    engines: dict[tuple[str, str], dict[str, list[Case]]] = {}
    for group in (GROUPS[name] for name in groups):
        by_cache = engines.setdefault((group.model, group.settings), {})
        for cache in group.caches:
            if not caches or cache in caches:
                known = by_cache.setdefault(cache, [])
                known.extend(case for case in group.cases if case not in known)
    return [
        EngineRun(model, settings, cache, tuple(cases))
        for (model, settings), by_cache in engines.items()
        for cache, cases in by_cache.items()
    ]
