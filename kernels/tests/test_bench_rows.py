"""Rows, their file, the table and the picture, on made-up times."""

import dataclasses
import io
import json
from xml.etree import ElementTree

import pytest
from rich.console import Console

from turboquant_kernels.bench import report
from turboquant_kernels.bench.rows import (
    COMPETITORS,
    FORMATS,
    SHAPES,
    Row,
    Run,
    Shape,
    merge,
    read_rows,
    read_runs,
    write,
)
from turboquant_kernels.formats import KVFormat

FIELDS = [
    *("gpu", "batch", "context", "q_heads", "kv_heads", "head_dim", "format", "ms", "graph_ms"),
    *("fa3_bf16_ms", "fa3_bf16_graph_ms", "fa3_fp8_ms", "fa3_fp8_graph_ms"),
    *("vllm_turboquant_ms", "vllm_turboquant_graph_ms", "vllm_int4_ms", "vllm_int4_graph_ms"),
    *("copy_bandwidth_fraction", "relative_error"),
]


def fixture_row(shape=SHAPES[0], fmt="tq-k4v4", gpu="fixture GPU", **changes):
    """Made-up times, which no GPU took."""
    row = Row(
        gpu=gpu,
        **dataclasses.asdict(shape),
        format=fmt,
        ms=0.1,
        graph_ms=0.08,
        fa3_bf16_ms=0.3,
        fa3_bf16_graph_ms=0.28,
        fa3_fp8_ms=0.2,
        fa3_fp8_graph_ms=0.16,
        vllm_turboquant_ms=1.5,
        vllm_turboquant_graph_ms=1.4,
        vllm_int4_ms=None,
        vllm_int4_graph_ms=None,
        copy_bandwidth_fraction=0.85,
        relative_error=2e-4,
    )
    return dataclasses.replace(row, **changes)


def fixture_run(gpu="fixture GPU", **changes):
    run = Run(gpu, "2026-01-01", {"torch": "0"}, 4e12, {"vllm_int4": "ModuleNotFoundError: no vllm"})
    return dataclasses.replace(run, **changes)


def test_a_row_is_written_with_the_fields_the_benchmark_promises(tmp_path):
    write(tmp_path / "kernels.json", [fixture_row()])
    (written,) = json.loads((tmp_path / "kernels.json").read_text())
    assert list(written) == FIELDS
    assert written["vllm_int4_ms"] is None
    assert written["batch"] == 8


def test_rows_and_runs_are_read_back(tmp_path):
    row = fixture_row(ms=0.123456789)
    write(tmp_path / "kernels.json", [row])
    assert read_rows(tmp_path / "kernels.json") == [dataclasses.replace(row, ms=0.1235)]
    run = fixture_run(step={"overhead": 0.1}, prefill=({"chunk": 8192},))
    write(tmp_path / "kernels-run.json", [run])
    (read,) = read_runs(tmp_path / "kernels-run.json")
    assert (read.step, list(read.prefill)) == (run.step, list(run.prefill))
    assert read_rows(tmp_path / "absent.json") == []


def test_speedups_are_the_competitors_time_over_ours():
    row = fixture_row()
    assert row.speedup("fa3_bf16") == pytest.approx(3.0)
    assert row.speedup("fa3_bf16", "graph_ms") == pytest.approx(3.5)
    assert row.speedup("vllm_int4") is None


def test_new_rows_replace_those_of_the_same_gpu_shape_and_format_alone():
    old = [fixture_row(gpu=gpu, fmt=fmt) for gpu in ("A", "B") for fmt in ("tq-k3v3", "tq-k4v4")]
    new = [fixture_row(gpu="A", fmt="tq-k4v4", ms=0.05)]
    merged = merge(old, new)
    assert [(row.gpu, row.format) for row in merged] == [
        (gpu, fmt) for gpu in ("A", "B") for fmt in ("tq-k4v4", "tq-k3v3")
    ]
    assert [row.ms for row in merged] == [0.05, 0.1, 0.1, 0.1]


def test_rows_stand_in_the_order_of_the_shapes():
    odd = Shape(3, 16, 4, 2, 64)
    merged = merge([], [fixture_row(odd), fixture_row(SHAPES[1]), fixture_row(SHAPES[0])])
    assert [row.shape for row in merged] == [SHAPES[0], SHAPES[1], odd]


def test_a_shapes_bytes_are_its_formats():
    """132 bytes a token and KV head: 8 x 32,768 x 8 of them."""
    assert SHAPES[0].cache_bytes(KVFormat.parse("tq-k4v4")) == 8 * 32768 * 8 * 132


def test_a_table_shows_a_missing_competitor_as_a_dash_and_fits_80_columns():
    (table,) = report.tables([fixture_row()])
    console = Console(width=80, file=io.StringIO())
    console.print(table)
    text = console.file.getvalue()
    assert "8 x 32,768, 32/8 heads of 128 (fixture GPU)" in text
    line = next(line for line in text.splitlines() if "tq-k4v4" in line)
    assert line.split() == ["tq-k4v4", "0.1000", "0.0800", "3.00", "2.00", "15.00", "-", "85%", "2.0e-04"]


def test_each_gpu_and_shape_has_a_table():
    rows = [fixture_row(shape, fmt) for shape in SHAPES[:2] for fmt in FORMATS]
    assert [table.row_count for table in report.tables(rows)] == [len(FORMATS)] * 2


def test_the_sentences_tell_every_part_of_a_run():
    run = fixture_run(
        ragged={"tokens": 1000, "graph_ms": 0.1, "rate_fraction": 0.93},
        step={"decode_graph_ms": 0.08, "step_graph_ms": 0.088, "overhead": 0.1},
        anchor={"anchor_graph_ms": 0.0816, "overhead": 0.02, "ms_overhead": 0.013},
        portable=(
            dataclasses.asdict(SHAPES[1])
            | {"ms": 0.2, "graph_ms": 0.18, "relative_error": 1e-4}
            | {"fa3_bf16_speedup": 1.5, "vllm_turboquant_speedup": None},
        ),
        head_dims=({"head_dim": 80, "path": "portable", "ms": 0.1, "fa3_bf16_ms": 0.2},),
        prefill=({"chunk": 8192, "context": 24576, "ms": 5.8, "fa3_bf16_ms": 5.7, "speed_fraction": 0.983},),
        compile_seconds={"a": 1.5, "b": 2.0},
    )
    text = "\n".join(report.lines(run))
    for part in (
        "4.00 TB/s",
        "93%",
        "+10% over decode alone",
        "0.0816 ms in a graph, +2.0%; by ms +1.3%",
        f"{SHAPES[1]}: 0.2000 ms, 1.50 times as fast as FA3 bf16, ? times as vLLM tq",
        "head_dim 80, portable path: 0.1000 ms, 2.00 times as fast",
        "98% of FlashAttention-3's speed",
    ):
        assert part in text
    assert "compiled 2 kernel variants in 4 s, 2.0 s at most" in text
    assert "not measured: vllm_int4: ModuleNotFoundError: no vllm" in text


def test_the_picture_has_a_bar_for_each_competitor_and_format(tmp_path):
    rows = [fixture_row(shape, fmt) for shape in SHAPES[:2] for fmt in FORMATS]
    path = tmp_path / "kernels.svg"
    report.draw(rows, [fixture_run()], path)
    ElementTree.parse(path)
    text = path.read_text()
    measured = [competitor.label for name, competitor in COMPETITORS.items() if name != "vllm_int4"]
    for label in (*measured, *FORMATS, "8 x 32,768"):
        assert f"<!-- {label}" in text
    assert f"<!-- {COMPETITORS['vllm_int4'].label}" not in text


def test_bars_are_speeds_and_their_roofs_the_copy_bandwidths():
    """FA3 takes .28 ms for 1.07 GB, which 4 TB/s copy in .268 ms; k4v4 takes .08 ms for 277 MB, .0692 ms."""
    bars = {label: numbers for label, *numbers in report._bars(SHAPES[0], [fixture_row()], 4e12)}
    assert bars["FlashAttention-3, bf16"][:2] == pytest.approx([1.0, 0.28 / 0.2684], rel=1e-3)
    assert bars["tq-k4v4"][:2] == pytest.approx([3.5, 0.28 / 0.0692], rel=1e-3)


def test_without_the_baseline_there_is_no_picture(tmp_path):
    rows = [fixture_row(fa3_bf16_graph_ms=None)]
    with pytest.raises(ValueError, match="FlashAttention-3"):
        report.draw(rows, [fixture_run()], tmp_path / "kernels.svg")
