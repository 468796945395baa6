"""`tq bench`: the command around `measure` and `report`.

Other distributions add benchmarks through the entry-point group `turboquant.bench`.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from turboquant_kernels.bench import report
from turboquant_kernels.bench.rows import FORMATS, SHAPES, Row, Run, Shape, merge, read_rows, read_runs, write
from turboquant_kernels.cli import add_commands
from turboquant_kernels.formats import KVFormat

BENCH_GROUP = "turboquant.bench"

app = typer.Typer(help="Measure this project beside others.", no_args_is_help=True)
add_commands(app, entry_points(group=BENCH_GROUP))


@app.callback()
def _bench() -> None:
    """Measure this project beside others."""


def _shape(text: str) -> Shape:
    try:
        return Shape(*map(int, text.split(",")))
    except (TypeError, ValueError):
        raise typer.BadParameter(f"{text!r} is not batch,context,q_heads,kv_heads,head_dim") from None


def _format(name: str) -> str:
    try:
        fmt = KVFormat.parse(name)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    if not fmt.compressed:
        raise typer.BadParameter(f"{name} is the engine's own cache: the table has it beside every format")
    return name


@app.command()
def kernels(
    formats: Annotated[
        list[str] | None,
        typer.Option("--format", help="A KV format; may be repeated.", parser=_format),
    ] = None,
    shapes: Annotated[
        list[Shape] | None,
        typer.Option(
            "--shape", help="batch,context,q_heads,kv_heads,head_dim; may be repeated.", parser=_shape
        ),
    ] = None,
    out: Annotated[
        Path, typer.Option(help="Folder for kernels.json, kernels-run.json and kernels.svg.")
    ] = Path("docs/benchmarks"),
    draw_only: Annotated[
        bool, typer.Option("--draw-only", help="Measure nothing: show and draw what the folder holds.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the rows as JSON.")] = False,
) -> None:
    """Time decode and prefill beside FlashAttention-3 and vLLM's compressed caches, on this machine's GPU.

    Rows of other GPUs, shapes and formats in the folder stay.
    """
    rows_path, runs_path = out / "kernels.json", out / "kernels-run.json"
    rows, runs = read_rows(rows_path), read_runs(runs_path)
    if not draw_only:
        new_rows, run = _measure(shapes or SHAPES, formats or FORMATS)
        rows = merge(rows, new_rows)
        runs = [*(old for old in runs if old.gpu != run.gpu), run]
        write(rows_path, rows)
        write(runs_path, runs)
    if as_json:
        typer.echo(json.dumps([asdict(row) for row in rows], indent=1))
    else:
        console = Console()
        console.print(*report.tables(rows))
        for run in runs:
            for line in report.lines(run):
                console.print(line, highlight=False)
    try:
        report.draw(rows, runs, out / "kernels.svg")
    except (ImportError, ValueError) as error:
        typer.echo(f"tq bench kernels: no picture: {error}", err=True)


def _measure(shapes: Sequence[Shape], formats: Sequence[str]) -> tuple[list[Row], Run]:
    try:
        import torch

        if not torch.cuda.is_available():
            raise ImportError("no CUDA GPU is at hand (`--draw-only` needs none)")
        from turboquant_kernels.bench.measure import Benchmark
    except ImportError as error:
        typer.echo(f"tq bench kernels: {error}", err=True)
        raise typer.Exit(1) from error
    benchmark = Benchmark(torch.device("cuda"), shapes, formats)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        tasks = benchmark.tasks()
        bar = progress.add_task("", total=len(tasks))
        for task in tasks:
            progress.update(bar, description=task.label)
            task.run()
            progress.advance(bar)
    return benchmark.rows, benchmark.run
