"""The planner against vLLM itself: every known model, several formats, lengths and settings, to the token."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from turboquant_kernels.formats import BF16, KVFormat, base_format, find_tier
from turboquant_operator.planner import read_facts
from turboquant_operator.planner.engine import engine_settings
from turboquant_operator.planner.options import Choice, Option

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1200)]

HERE = Path(__file__).parent
REFUSED = {
    "deepseek-v2-lite",
    "gemma-3n-e2b",
    "jamba-1.5-mini",
    "llama-4-scout",
    "mamba-2.8b",
    "qwen3-next-80b-a3b",
    "t5-base",
}
"""Configs that the planner refuses."""

NOT_BUILT = {"mistral-small-3.1-24b"}
"""vLLM inspects this wrapper with its image processor, whose files a bare config.json lacks."""

# vLLM sets up its expert-parallel group, once per process, only if the first model has experts.
NAMES = sorted(
    {path.stem for path in (HERE / "configs").glob("*.json")} - REFUSED - NOT_BUILT,
    key=lambda n: (n != "mixtral-8x7b", n),
)

CASES: dict[str, dict[str, Any]] = {
    "own dtype and length": {"cache_dtype": "auto", "memory": 2**39},
    "k4v4 in odd bytes": {"cache_dtype": "tq-k4v4", "memory": 2**33 + 12_345, "max_model_len": 2000},
    "small steps": {
        "cache_dtype": "tq-k5v3",
        "memory": 2**33,
        "max_model_len": 2048,
        "args": {"max_num_batched_tokens": 512, "max_num_seqs": 8},
    },
    "block of 256": {
        "cache_dtype": "tq-k8v4",
        "memory": 2**34,
        "max_model_len": 1024,
        "args": {"block_size": 256},
    },
    "two plain layers": {
        "cache_dtype": "tq-k4v4",
        "memory": 2**34,
        "max_model_len": 2048,
        "skip_layers": [0, 5],
    },
    "fp8 beside plain layers": {
        "cache_dtype": "fp8",
        "memory": 2**34,
        "max_model_len": 2048,
        "skip_layers": [0, 5],
    },
    "formats that take turns": {
        "cache_dtype": "tq-k4v4",
        "memory": 2**34,
        "max_model_len": 2048,
        "mix": ["tq-k8v4", "tq-k4v4", "bf16", "tq-k6v2"],
    },
    "a tier": {"cache_dtype": "tq-balanced", "memory": 2**34, "max_model_len": 2048},
    "a tier beside plain layers": {
        "cache_dtype": "tq-max-capacity",
        "memory": 2**34,
        "max_model_len": 2048,
        "skip_layers": [1, 2],
    },
    "unbiased keys": {"cache_dtype": "tq-k3v4-prod", "memory": 2**33, "max_model_len": 512},
}


@pytest.fixture(scope="module")
def engine() -> dict[str, list[dict[str, Any]]]:
    """vLLM's answers to all cases for all models, from one process."""
    configs = {name: HERE / "configs" / f"{name}.json" for name in NAMES}
    layers = {name: read_facts(json.loads(path.read_text())).layers for name, path in configs.items()}
    run = subprocess.run(
        [sys.executable, HERE / "vllm_capacity.py", *configs.values()],
        input=json.dumps({"cases": list(CASES.values()), "layers": layers}),
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    answers: dict[str, list[dict[str, Any]]] = json.loads(run.stdout)
    return answers


def predicted(name: str, case: dict[str, Any], config) -> Option:
    facts = read_facts(config(name))
    context = case.get("max_model_len") or facts.context_length
    flags = [f"--{flag.replace('_', '-')}={value}" for flag, value in case.get("args", {}).items()]
    fmt = BF16 if case["cache_dtype"] == "auto" else base_format(case["cache_dtype"], "cpu")
    choice = Choice.uniform(fmt, facts, case.get("skip_layers", ()))
    if tier := find_tier(case["cache_dtype"]):
        choice = Choice.of_tier(tier.on("cpu"), facts, case.get("skip_layers", ()))
    if mix := [KVFormat.parse(name) for name in case.get("mix", ())]:
        choice = Choice(fmt.name, tuple(mix[layer % len(mix)] for layer in range(facts.layers)))
    return Option(choice, facts, engine_settings(flags, None, context), context, 1, 1, case["memory"])


@pytest.mark.parametrize("name", NAMES)
def test_facts_are_the_engines(engine, config, name):
    answer, facts = engine[name][0], read_facts(config(name))
    assert "failed" not in answer, answer
    assert answer["context_length"] == facts.context_length
    assert answer["dtype"] == facts.dtype
    assert answer["key_value_heads"] == facts.key_value_heads
    assert answer["windows"] == list(facts.windows)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", NAMES)
def test_tokens_are_the_engines(engine, config, name, case):
    answer, found = engine[name][list(CASES).index(case)], predicted(name, CASES[case], config)
    assert "tokens" in answer, answer
    assert (found.settings.batched_tokens, found.tokens) == (answer["batched_tokens"], answer["tokens"])
