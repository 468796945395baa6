"""What a person sees of the measurements: tables, and a picture of bars under their roofs. No torch."""

from collections.abc import Iterable, Sequence
from dataclasses import fields
from pathlib import Path

from rich.box import SIMPLE
from rich.table import Table

from turboquant_kernels.bench.rows import COMPETITORS, Row, Run, Shape
from turboquant_kernels.formats import KVFormat

BASELINE = "fa3_bf16"
"""Bars are speeds over this competitor's."""

_HEADERS = ("x FA3\nbf16", "x FA3\nfp8", "x vLLM\ntq", "x vLLM\nint4")
"""Of `COMPETITORS`' columns."""

_COLORS = {"fa3_bf16": "#8a8f98", "fa3_fp8": "#5b6270", "vllm_turboquant": "#c9a13b", "vllm_int4": "#dcc684"}
_OWN_COLOR = "#2f6fb0"


def tables(rows: Iterable[Row]) -> list[Table]:
    """One for each GPU and shape: a format's times, and its speed over others by do_bench."""
    result: dict[tuple[str, Shape], Table] = {}
    for row in rows:
        if (row.gpu, row.shape) not in result:
            title = f"{row.shape} ({row.gpu})"
            result[row.gpu, row.shape] = table = Table(title=title, title_justify="left", box=SIMPLE)
            table.add_column("format", no_wrap=True)
            for header in ("ms", "graph\nms", *_HEADERS, "of\ncopy", "error"):
                table.add_column(header, justify="right", no_wrap=True)
        speedups = (row.speedup(name) for name in COMPETITORS)
        result[row.gpu, row.shape].add_row(
            row.format,
            f"{row.ms:.4f}",
            f"{row.graph_ms:.4f}",
            *("-" if speedup is None else f"{speedup:.2f}" for speedup in speedups),
            f"{row.copy_bandwidth_fraction:.0%}",
            f"{row.relative_error:.1e}",
        )
    return list(result.values())


def lines(run: Run) -> list[str]:
    """The rest of a run in sentences."""
    told = [f"{run.gpu}: copy bandwidth {run.copy_bandwidth / 1e12:.2f} TB/s"]
    if run.ragged:
        told.append(f"ragged batch: {run.ragged['rate_fraction']:.0%} of the equal lengths' bytes per second")
    if run.step:
        told.append(
            f"whole step: {run.step['step_graph_ms']:.4f} ms, {run.step['overhead']:+.0%} over decode alone"
        )
    if run.anchor:
        in_graph = f"{run.anchor['anchor_graph_ms']:.4f} ms in a graph, {run.anchor['overhead']:+.1%}"
        by_ms = f"; by ms {run.anchor['ms_overhead']:+.1%}" if "ms_overhead" in run.anchor else ""
        told.append(f"with key anchors: {in_graph}{by_ms}")
    for entry in run.portable:
        shape = Shape(*(entry[field.name] for field in fields(Shape)))
        told.append(
            f"portable path, {shape}: {entry['ms']:.4f} ms, {_times(entry['fa3_bf16_speedup'])} as fast "
            f"as FA3 bf16, {_times(entry['vllm_turboquant_speedup'])} as vLLM tq"
        )
    for entry in run.head_dims:
        theirs = entry["fa3_bf16_ms"]
        told.append(
            f"head_dim {entry['head_dim']}, {entry['path']} path: {entry['ms']:.4f} ms, "
            f"{_times(theirs and theirs / entry['ms'])} as fast as FA3 bf16"
        )
    for entry in run.prefill:
        told.append(
            f"prefill of {entry['chunk']:,} over {entry['context']:,}: {entry['ms']:.3f} ms, "
            f"{entry['speed_fraction']:.0%} of FlashAttention-3's speed"
        )
    if run.compile_seconds:
        seconds = run.compile_seconds.values()
        told.append(
            f"compiled {len(seconds)} kernel variants in {sum(seconds):.0f} s, {max(seconds):.1f} s at most"
        )
    told.extend(f"not measured: {what}: {reason}" for what, reason in run.unmeasured.items())
    return told


def _times(speedup: float | None) -> str:
    return "? times" if speedup is None else f"{speedup:.2f} times"


def draw(rows: Sequence[Row], runs: Iterable[Run], path: Path) -> None:
    """An svg with a panel for each GPU and shape. A bar is the speed of a competitor or format over the
    baseline's, by graph times; the line above it is the speed of its bytes at the card's copy bandwidth.

    Rows without a baseline are left out; ValueError if that leaves none.
    """
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "kernels"  # the same rows give the same bytes
    from matplotlib import pyplot

    bandwidth = {run.gpu: run.copy_bandwidth for run in runs}
    panels = [
        (gpu, shape, [row for row in rows if (row.gpu, row.shape) == (gpu, shape)])
        for gpu, shape in dict.fromkeys(
            (row.gpu, row.shape) for row in rows if row.fa3_bf16_graph_ms is not None and row.gpu in bandwidth
        )
    ]
    if not panels:
        raise ValueError(
            f"no row has a time of {COMPETITORS[BASELINE].label}, which the picture compares with"
        )
    columns = min(3, len(panels))
    lines_of_panels = -(-len(panels) // columns)
    figure, axes = pyplot.subplots(
        lines_of_panels, columns, figsize=(5.2 * columns, 3.4 * lines_of_panels), squeeze=False
    )
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, (gpu, shape, own) in zip(axes.flat, panels, strict=False):
        bars = _bars(shape, own, bandwidth[gpu])
        for place, (_, speed, roof, color) in enumerate(bars):
            axis.bar(place, speed, color=color, width=0.72)
            axis.plot([place - 0.4, place + 0.4], [roof, roof], color="black", linewidth=1.6)
            axis.annotate(f"{speed:.2f}", (place, speed), ha="center", va="bottom", fontsize=8)
        axis.set_xticks(range(len(bars)), [label for label, *_ in bars], rotation=35, ha="right", fontsize=8)
        axis.set_title(f"{gpu}\n{shape}", fontsize=9)
        axis.set_ylabel("speed / FA3 bf16", fontsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def _bars(shape: Shape, rows: Sequence[Row], bandwidth: float) -> list[tuple[str, float, float, str]]:
    """Label, speed, speed at copy bandwidth and color of each bar of a panel."""
    baseline_ms = getattr(rows[0], f"{BASELINE}_graph_ms")
    tokens = shape.batch * shape.context * shape.kv_heads

    def roof(token_bytes: float) -> float:
        return baseline_ms * 1e-3 * bandwidth / (tokens * token_bytes)

    bars = []
    for name, competitor in COMPETITORS.items():
        milliseconds = getattr(rows[0], f"{name}_graph_ms")
        if milliseconds is not None:
            speed = baseline_ms / milliseconds
            bars.append(
                (competitor.label, speed, roof(competitor.token_bytes(shape.head_dim)), _COLORS[name])
            )
    for row in rows:
        token_bytes = KVFormat.parse(row.format).slot_bytes(shape.head_dim)
        bars.append((row.format, baseline_ms / row.graph_ms, roof(token_bytes), _OWN_COLOR))
    return bars
