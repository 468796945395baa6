"""What a user sees who asks for a cache that cannot be served: one line, a non-zero exit, no engine.

Each case is the real server's command line. To import vLLM once, one process imports it and forks a server
for each case. The models have no weights: a server that went on to load them would end with another message.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.engine

LAYER = {"key_bits": 4, "value_bits": 4}
DEEPSEEK = {
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
    "kv_lora_rank": 64,
    "q_lora_rank": None,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32,
    "v_head_dim": 64,
}


def plan(*layers: dict) -> list[str]:
    return ["--additional-config", json.dumps({"turboquant": {"version": 1, "layers": layers}})]


CASES = {
    "unknown format": ({}, ["--kv-cache-dtype", "tq-k4v5"], "unknown KV format 'tq-k4v5': did you mean"),
    "fractional bits": ({}, ["--kv-cache-dtype", "tq-k2.5v2.5"], "fractional bits are not supported yet"),
    "plan of another model": (
        {},
        ["--kv-cache-dtype", "tq-k4v4", *plan(LAYER, LAYER)],
        "2 layers, but the model has 4 attention layers: make the plan for this model",
    ),
    "plan without a format": ({}, plan(*[LAYER] * 4), "add --kv-cache-dtype tq-balanced"),
    "head size": ({"head_dim": 72}, ["--kv-cache-dtype", "tq-k4v4"], "head_dim 72 is not one of"),
    "block size": ({}, ["--kv-cache-dtype", "tq-k4v4", "--block-size", "64"], "not a multiple of 128"),
    "latent attention": (DEEPSEEK, ["--kv-cache-dtype", "tq-k4v4"], "multi-head latent attention (MLA)"),
    "offloading": (
        {},
        ["--kv-cache-dtype", "tq-k4v4", "--kv-offloading-size", "1"],
        "the KV connector OffloadingConnector is not supported on cpu: leave it out",
    ),
}
"""Case: (entries of the model's config, arguments, part of the line)."""

SERVERS = """
import json, os, runpy, sys
import vllm.entrypoints.openai.api_server
sys.modules.pop("vllm.entrypoints.openai.api_server")
codes = []
for output, arguments in json.load(sys.stdin):
    if os.fork() == 0:
        file = os.open(output, os.O_WRONLY | os.O_CREAT)
        os.dup2(file, 1)
        os.dup2(file, 2)
        sys.argv = ["api_server.py", *arguments]
        runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__", alter_sys=True)
        os._exit(0)
    codes.append(os.waitstatus_to_exitcode(os.wait()[1]))
print(json.dumps(codes))
"""


@pytest.fixture(scope="module")
def refusals(dummy_model, tmp_path_factory) -> dict[str, tuple[int, str]]:
    """Exit code and output of each case."""
    folder = tmp_path_factory.mktemp("refusals")
    runs = {
        case: (folder / str(index), ["--model", str(dummy_model("LLAMA", **config)), *arguments])
        for index, (case, (config, arguments, _)) in enumerate(CASES.items())
    }
    environment = {k: v for k, v in os.environ.items() if k != "VLLM_ENABLE_V1_MULTIPROCESSING"}
    done = subprocess.run(
        [sys.executable, "-c", SERVERS],
        input=json.dumps([(str(output), arguments) for output, arguments in runs.values()]),
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
        timeout=900,
        check=True,
    )
    codes = json.loads(done.stdout.splitlines()[-1])
    return {
        case: (code, Path(output).read_text())
        for (case, (output, _)), code in zip(runs.items(), codes, strict=True)
    }


@pytest.mark.parametrize("case", CASES)
def test_a_cache_that_cannot_be_served_is_refused_in_one_line(refusals, case: str) -> None:
    code, output = refusals[case]
    last_line = output.strip().splitlines()[-1]
    assert CASES[case][2] in last_line, output
    assert code != 0
    assert "Traceback" not in output
    assert "Starting to load model" not in output
