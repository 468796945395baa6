"""`tq plan`: what it prints, its exit codes, and what it does not import."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from turboquant_operator.api.status import Plan
from turboquant_operator.cli import plan

CONFIGS = Path(__file__).parent / "planner" / "configs"
LLAMA = str(CONFIGS / "llama-3.1-8b.json")
WEIGHTS = ["--weights-bytes", "16060522240"]


def tq_plan(*arguments: str) -> Result:
    app = typer.Typer()
    app.command()(plan)
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, list(arguments))


def test_json_is_the_object_of_status_plan():
    result = tq_plan(LLAMA, "--accelerator", "nvidia-h100-80gb", "--concurrent", "12", *WEIGHTS, "--json")
    assert result.exit_code == 0
    found = Plan.model_validate_json(result.stdout)
    assert (found.format, found.tensor_parallel_size, found.kv_bytes_per_token) == ("tq-balanced", 1, 33_792)
    assert set(json.loads(result.stdout)) >= {"keyBits", "predictedTokens", "weightBytesPerGPU", "hash"}


def test_the_table_shows_alternatives_and_reasons():
    result = tq_plan(
        LLAMA, "--accelerator", "cpu", "--memory", "4Gi", "--context", "8192", "--format", "tq-k4v4"
    )
    assert result.exit_code == 0
    assert "119,506" in result.stdout
    assert "32,768" in result.stdout
    assert "kvCache.format asks for tq-k4v4." in result.stdout


def test_what_does_not_fit_exits_with_1_and_the_way_out():
    result = tq_plan(LLAMA, "--accelerator", "cpu", "--memory", "1Gi")
    assert result.exit_code == 1
    assert "PlanFits=False (InsufficientMemory)" in result.stdout
    assert "raise kvCache.memory" in result.stdout


def test_what_does_not_fit_is_a_condition_in_json():
    result = tq_plan(LLAMA, "--accelerator", "cpu", "--memory", "1Gi", "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["reason"] == "InsufficientMemory"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["nowhere/config.json", "--accelerator", "cpu", "--memory", "1Gi"], "nowhere/config.json"),
        (["./nowhere", "--accelerator", "cpu", "--memory", "1Gi"], "nowhere is not a folder"),
        ([LLAMA, "--accelerator", "nvidia-h100"], "nvidia-h100-80gb"),
        ([LLAMA, "--accelerator", "cpu"], "--memory is needed"),
        ([LLAMA, "--accelerator", "cpu", "--memory", "1Gb"], "'1Gb' is not a quantity"),
        ([LLAMA, "--accelerator", "cpu", "--memory", "1Gi", "--format", "tq-k4v5"], "did you mean"),
        ([LLAMA, "--accelerator", "cpu", "--memory", "1Gi", "--format", "tq-k2.5v2.5"], "not supported yet"),
        ([LLAMA, "--accelerator", "cpu", "--memory", "1Gi", "--quality", "best"], "near-lossless"),
        ([LLAMA, "--accelerator", "nvidia-h100-80gb", "--tensor", "many"], "--tensor"),
        ([LLAMA, "--accelerator", "nvidia-h100-80gb", "--tensor", "0"], "--tensor"),
        ([LLAMA, "--accelerator", "cpu", "--memory", "1Gi", "--concurrent", "0"], "concurrent"),
    ],
)
def test_bad_input_exits_with_2_and_names_it(arguments, told, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    result = tq_plan(*arguments)
    assert result.exit_code == 2, result.output
    assert told in result.output


def test_engine_arguments_are_planned_with():
    gemma = [
        str(CONFIGS / "gemma-3-270m.json"),
        "--accelerator",
        "cpu",
        "--memory",
        "1Gi",
        "--context",
        "2048",
    ]
    small = tq_plan(*gemma, "--format", "bf16", "--engine-arg=--max-num-batched-tokens=512", "--json")
    assert json.loads(small.stdout)["predictedTokens"] == 91_656


def test_a_local_plan_imports_no_engine_no_cluster_and_no_hub_client():
    script = (
        "import sys; from turboquant_operator.cli import plan\n"
        f"plan({LLAMA!r}, 'cpu', context=8192, memory='4Gi', as_json=True)\n"
        "heavy = {'torch', 'vllm', 'kubernetes', 'kopf', 'huggingface_hub', 'matplotlib'}\n"
        "sys.exit(', '.join(heavy & sys.modules.keys()) or 0)"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize(("name", "start"), [("capacity.png", b"\x89PNG"), ("capacity.svg", b"<?xml")])
def test_the_picture_is_drawn(tmp_path, name, start):
    path = tmp_path / name
    cpu = ["--accelerator", "cpu", "--memory", "4Gi", "--context", "8192"]
    assert tq_plan(LLAMA, *cpu, "--picture", str(path)).exit_code == 0
    assert path.read_bytes().startswith(start)


@pytest.mark.parametrize("name", ["capacity.xyz", "nowhere/capacity.png"])
def test_a_picture_that_cannot_be_written_is_bad_input(tmp_path, name):
    cpu = ["--accelerator", "cpu", "--memory", "4Gi", "--context", "8192"]
    result = tq_plan(LLAMA, *cpu, "--picture", str(tmp_path / name))
    assert result.exit_code == 2
    assert name in result.output
