"""What an inspection pod hands back: everything the planner asks of a config, in 4,096 bytes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from turboquant_kernels.checkpoint import Checkpoint, CheckpointError
from turboquant_runtime.inspect import MESSAGE_BYTES, main, report, shorten

CONFIGS = sorted((Path(__file__).parents[2] / "operator" / "tests" / "planner" / "configs").glob("*.json"))
LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": 2}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA))
    (folder / "pytorch_model.bin").write_bytes(bytes(100))
    return folder


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_planner_reads_the_same_facts_from_a_report(path):
    """The report is the config, shortened: what the operator makes of the two must be equal."""
    from turboquant_operator.planner import read_facts

    config = json.loads(path.read_text())
    config |= {"id2label": {str(i): f"LABEL_{i}" for i in range(500)}, "auto_map": {"AutoModel": "x" * 300}}
    document = json.loads(report(Checkpoint(config, {"BF16": 10**9})))
    assert read_facts(document["config"], document["weights"]) == read_facts(config, {"BF16": 10**9})


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_known_configs_fit_into_a_termination_message(path):
    assert len(report(Checkpoint(json.loads(path.read_text())))) < MESSAGE_BYTES


def test_long_fields_become_true_so_that_they_are_still_seen():
    short = shorten({"block_configs": [{"attention": {"n_heads": i}} for i in range(80)], "hidden_size": 64})
    assert short == {"block_configs": True, "hidden_size": 64}


def test_nested_parts_are_shortened_field_by_field():
    config = {
        "text_config": {"rope_scaling": {"type": "longrope", "long_factor": [1.0] * 96}, "head_dim": 96},
        "quantization_config": {"quant_method": "fp8", "ignored_layers": ["model.layers"] * 99},
    }
    assert shorten(config) == {
        "text_config": {"rope_scaling": {"type": "longrope", "long_factor": True}, "head_dim": 96},
        "quantization_config": {"quant_method": "fp8", "ignored_layers": True},
    }


def test_facts_that_do_not_fit_are_an_error_that_names_the_way_out():
    config = {"layer_types": ["sliding_attention"] * 300}
    with pytest.raises(CheckpointError, match=r"4096: set\s+spec\.model\.architecture"):
        report(Checkpoint(config))


def test_the_report_is_printed_and_written_to_the_termination_log(model, tmp_path, capsys):
    log = tmp_path / "termination-log"
    log.touch()
    assert main([str(model), "--termination-log", str(log)]) == 0
    assert log.read_text() == capsys.readouterr().out.strip()
    assert json.loads(log.read_text()) == {"config": LLAMA, "weights": {"": 100}, "revision": ""}


def test_a_missing_model_is_a_sentence_in_the_termination_log(tmp_path, capsys):
    log = tmp_path / "termination-log"
    log.touch()
    assert main([str(tmp_path / "nowhere"), "--termination-log", str(log)]) == 1
    assert log.read_text() == capsys.readouterr().out.strip()
    assert "nowhere is not a folder" in log.read_text()


def test_no_termination_log_is_made_where_there_is_none(model, tmp_path):
    log = tmp_path / "termination-log"
    assert main([str(model), "--termination-log", str(log)]) == 0
    assert not log.exists()


def test_the_pods_command_runs_without_torch_or_engine(model):
    script = (
        "import runpy, sys; sys.argv[1:] = [sys.argv[1]]\n"
        "try: runpy.run_module('turboquant_runtime.inspect', run_name='__main__')\n"
        "except SystemExit as end: assert not end.code\n"
        "sys.exit(', '.join({'torch', 'vllm', 'transformers'} & sys.modules.keys()) or 0)"
    )
    run = subprocess.run([sys.executable, "-c", script, model], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout)["config"] == LLAMA
