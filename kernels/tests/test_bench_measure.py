"""The run of `tq bench kernels`, with made-up clocks and the readable reference in the kernels' place."""

import pytest
import torch

from turboquant_kernels.bench import measure
from turboquant_kernels.bench.rows import COMPETITORS, Shape
from turboquant_kernels.decode.reference import paged_attention
from turboquant_kernels.formats import KVFormat

SHAPES = (Shape(4, 50, 4, 2, 64), Shape(1, 100, 8, 2, 128))
FORMATS = ("tq-k4v4", "tq-k3v3")


@pytest.fixture
def fixture_clocks(monkeypatch):
    """Times that no GPU took: do_bench 2 ms, a graph 1 ms a call, copies at 1 MB/s."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "fixture GPU")
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(measure.clocks, "copy_bandwidth", lambda device: 1e6)
    monkeypatch.setattr(measure.clocks, "do_bench_ms", lambda call: (call(), 2.0)[1])
    monkeypatch.setattr(measure.clocks, "rotating_ms", lambda calls: ([call() for call in calls], 1.0)[1])
    monkeypatch.setattr(measure, "RAGGED_LENGTHS", (10, 60))
    monkeypatch.setattr(measure, "PREFILL", ((32, 64),))
    monkeypatch.setattr(measure, "HEAD_DIMS", (80,))


@pytest.fixture
def benchmark(fixture_clocks, monkeypatch):
    def reference(step, path=None):
        starts = torch.arange(len(step.seq_lens) + 1)
        return lambda: step.codec.rotate(
            paged_attention(
                *(step.codec, step.query.float(), step.kv_cache, step.block_table, starts, step.seq_lens),
                scale=step.scale,
            )
        )

    def absent(shape, device):
        raise ImportError("no CUDA extension here\nand more")

    nothing = lambda *_: lambda: None  # noqa: E731
    monkeypatch.setattr(measure.subject, "decode", reference)
    monkeypatch.setattr(measure.subject, "whole_step", nothing)
    monkeypatch.setattr(measure.subject, "prefill", nothing)
    monkeypatch.setattr(measure.competitors, "prefill", nothing)
    monkeypatch.setattr(measure.competitors, "flash_attention", lambda: None)
    prepare = dict.fromkeys(COMPETITORS, nothing) | {"vllm_int4": absent}
    monkeypatch.setattr(measure.competitors, "PREPARE", prepare)
    benchmark = measure.Benchmark(torch.device("cpu"), SHAPES, FORMATS)
    for task in benchmark.tasks():
        task.run()
    return benchmark


def test_there_is_a_row_for_each_shape_and_format(benchmark):
    assert [(row.shape, row.format) for row in benchmark.rows] == [(s, f) for s in SHAPES for f in FORMATS]
    assert {(row.ms, row.graph_ms, row.fa3_bf16_ms, row.fa3_bf16_graph_ms) for row in benchmark.rows} == {
        (2.0, 1.0, 2.0, 1.0)
    }


def test_an_absent_competitor_is_none_and_the_run_says_why(benchmark):
    assert {(row.vllm_int4_ms, row.vllm_int4_graph_ms) for row in benchmark.rows} == {(None, None)}
    assert benchmark.run.unmeasured == {
        f"vllm_int4, {shape}": "ImportError: no CUDA extension here" for shape in SHAPES
    }


def test_the_bandwidth_is_the_formats_bytes_in_a_graphs_time(benchmark):
    """4 x 50 tokens of 2 heads of 68 bytes in 1 ms, over 1 MB/s."""
    assert KVFormat.parse("tq-k4v4").slot_bytes(64) == 68
    assert benchmark.rows[0].copy_bandwidth_fraction == pytest.approx(4 * 50 * 2 * 68 / 1e-3 / 1e6)


def test_errors_are_measured_against_float64(benchmark):
    assert all(0 < row.relative_error < 1e-5 for row in benchmark.rows)


def test_a_wrong_result_is_a_large_error(benchmark):
    codec = benchmark._codec(SHAPES[0], "tq-k4v4")
    step = measure.equal_step(codec, SHAPES[0], torch.device("cpu"))
    exact = measure.subject.decode(step)()
    assert measure.error_of(step, exact) < 1e-5
    assert measure.error_of(step, exact.roll(1, dims=-1)) > 0.1


def test_the_run_holds_the_other_parts(benchmark):
    run = benchmark.run
    assert run.copy_bandwidth == 1e6
    assert run.step == {"decode_graph_ms": 1.0, "step_graph_ms": 1.0, "overhead": 0.0}
    assert run.anchor["overhead"] == run.anchor["ms_overhead"] == 0.0
    assert run.ragged["rate_fraction"] == pytest.approx(run.ragged["tokens"] / (4 * 50))
    assert [Shape(*list(entry.values())[:5]) for entry in run.portable] == list(SHAPES)
    assert all(entry["relative_error"] < 1e-5 for entry in run.portable)
    assert {entry["vllm_turboquant_speedup"] for entry in run.portable} == {1.0}
    assert run.head_dims == [{"head_dim": 80, "path": "portable", "ms": 2.0, "fa3_bf16_ms": 2.0}]
    assert [entry["speed_fraction"] for entry in run.prefill] == [1.0]
    assert run.versions["torch"] == torch.__version__.split("+")[0]


def test_a_part_that_fails_leaves_the_others(benchmark, monkeypatch):
    def fails(*_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(measure.subject, "prefill", fails)
    monkeypatch.setattr(measure.subject, "whole_step", fails)
    again = measure.Benchmark(torch.device("cpu"), SHAPES, FORMATS)
    for task in again.tasks():
        task.run()
    run, reason = again.run, "RuntimeError: out of memory"
    assert (len(again.rows), run.prefill, run.step) == (4, [], {})
    assert run.anchor == benchmark.run.anchor
    assert {run.unmeasured[part] for part in ("step, tq-k4v4", "prefill of 32 over 64")} == {reason}
