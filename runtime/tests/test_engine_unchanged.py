"""With the plugin installed and none of its formats chosen, vLLM does what it does without it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.engine

ARGUMENTS = {
    "load_format": "dummy",
    "kv_cache_memory_bytes": 8 << 20,
    "max_model_len": 512,
    "max_num_batched_tokens": 128,
}
PROMPTS = [[3 + i * 5 % 97 for i in range(n)] for n in (1, 40, 200)]

WITHOUT_THE_PLUGIN = """
import json, sys
sys.path.insert(0, sys.argv[1])
import test_engine_unchanged as test
from conftest import Engine
answers = [test.behaviour(Engine(model, "auto", **test.ARGUMENTS)) for model in sys.argv[2:]]
assert not [name for name in sys.modules if name.startswith("turboquant_runtime")]
print(json.dumps(answers))
"""


def behaviour(engine) -> dict:
    """Capacity, and tokens with their log probabilities."""
    outputs = [o.outputs[0] for o in engine.generate(PROMPTS, max_tokens=8, logprobs=1)]
    return {
        "capacity": engine.capacity_tokens,
        "tokens": [list(output.token_ids) for output in outputs],
        "logprobs": [output.cumulative_logprob for output in outputs],
    }


def test_tokens_and_capacity_are_those_of_vllm_alone(start_engine, dummy_model) -> None:
    models = [dummy_model("LLAMA"), dummy_model("GEMMA3")]
    with_plugin = [behaviour(start_engine(model, "auto", **ARGUMENTS)) for model in models]
    assert "turboquant_runtime.plugin" in sys.modules
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_THE_PLUGIN, str(Path(__file__).parent), *map(str, models)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"VLLM_PLUGINS": ""},
        timeout=600,
        check=True,
    )
    alone = json.loads(done.stdout.splitlines()[-1])
    for one, other in zip(with_plugin, alone, strict=True):
        # Sums of a process are rounded as its memory lies.
        assert one.pop("logprobs") == pytest.approx(other.pop("logprobs"), rel=1e-5)
        assert one == other
