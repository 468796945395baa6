"""`tq bench kernels` where there is no GPU."""

import json
from importlib.metadata import EntryPoint

import pytest
import torch
from test_bench_rows import fixture_row, fixture_run
from typer.testing import CliRunner

from turboquant_kernels import cli
from turboquant_kernels.bench.rows import write

BENCH = [EntryPoint("bench", "turboquant_kernels.bench.cli:app", cli.COMMAND_GROUP)]


def tq_bench(*arguments):
    arguments = ("bench", "kernels", *map(str, arguments))
    return CliRunner().invoke(cli.app(arguments, BENCH), arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_line_says_so(tmp_path):
    result = tq_bench("--out", tmp_path)
    assert result.exit_code == 1
    assert result.output.splitlines() == [
        "tq bench kernels: no CUDA GPU is at hand (`--draw-only` needs none)"
    ]
    assert not any(tmp_path.iterdir())


def test_what_the_folder_holds_is_shown_and_drawn(tmp_path):
    write(tmp_path / "kernels.json", [fixture_row()])
    write(tmp_path / "kernels-run.json", [fixture_run()])
    result = tq_bench("--draw-only", "--out", tmp_path, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)[0]["format"] == "tq-k4v4"
    assert (tmp_path / "kernels.svg").stat().st_size > 1000


def test_a_picture_that_cannot_be_drawn_leaves_the_table(tmp_path):
    write(tmp_path / "kernels.json", [fixture_row(fa3_bf16_graph_ms=None)])
    write(tmp_path / "kernels-run.json", [fixture_run()])
    result = tq_bench("--draw-only", "--out", tmp_path)
    assert result.exit_code == 0
    assert "no picture: no row has a time of FlashAttention-3" in result.output
    assert "tq-k4v4" in result.output


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (("--format", "tq-k4v5"), "did you mean"),
        (("--format", "fp8"), "the engine's own cache"),
        (("--shape", "8,32768,32"), "is not batch,context,q_heads,kv_heads,head_dim"),
    ],
)
def test_wrong_options_are_refused(option, message):
    result = tq_bench(*option)
    assert result.exit_code == 2
    assert message in " ".join(result.output.replace("│", " ").split())
    assert "Traceback" not in result.output
