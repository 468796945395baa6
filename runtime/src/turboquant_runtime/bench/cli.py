"""`tq bench engine`: the command around `runner`, `results` and `report`."""

import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from turboquant_runtime.bench import report
from turboquant_runtime.bench.cases import GROUPS, EngineRun, plan
from turboquant_runtime.bench.results import Row, merge, read_rows, write_rows
from turboquant_runtime.bench.runner import Unmeasured, measure


def _group(name: str) -> str:
    if name not in GROUPS:
        raise typer.BadParameter(f"{name!r} is not one of {', '.join(GROUPS)}")
    return name


def engine(
    groups: Annotated[
        list[str] | None,
        typer.Option(
            "--group",
            help="What to measure; may be repeated, and shares engines then. "
            + "; ".join(f"{name}: {group.title}" for name, group in GROUPS.items()),
            parser=_group,
        ),
    ] = None,
    caches: Annotated[
        list[str] | None,
        typer.Option("--cache", help="Only engines with this --kv-cache-dtype; may be repeated."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for engine.json and engine.svg.")] = Path(
        "docs/benchmarks"
    ),
    log: Annotated[Path | None, typer.Option(help="Keep the engines' own output in this file.")] = None,
    draw_only: Annotated[
        bool, typer.Option("--draw-only", help="Measure nothing: show and draw what the folder holds.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the rows as JSON.")] = False,
) -> None:
    """Measure engines of several KV caches one after the other on this machine: capacity, speed, starts.

    Models have random weights. Rows of other groups, GPUs and engines in the folder stay.
    """
    path = out / "engine.json"
    failures: list[Unmeasured] = []
    if not draw_only:
        if not groups:
            raise typer.BadParameter(f"name one of {', '.join(GROUPS)}", param_hint="--group")
        runs = plan(groups, caches or ())
        if not runs:
            raise typer.BadParameter("no engine of these groups has such a cache", param_hint="--cache")
        failures = _measure(runs, path, log)
    rows = read_rows(path)
    if as_json:
        typer.echo(json.dumps([asdict(row) for row in rows], indent=1))
    else:
        console = Console()
        console.print(*report.tables(rows))
        for note in report.notes(rows):
            console.print(note, highlight=False)
    try:
        report.draw(rows, out / "engine.svg")
    except (ImportError, ValueError) as error:
        typer.echo(f"tq bench engine: no picture: {error}", err=True)
    for failure in failures:
        typer.echo(f"tq bench engine: {failure.run.label} not measured: {failure.reason}", err=True)
    if failures:
        raise typer.Exit(1)


def _measure(runs: Sequence[EngineRun], path: Path, log: Path | None) -> list[Unmeasured]:
    """Runs engines, and writes every row into the file when it comes; the engines that failed."""
    date = datetime.now(UTC).strftime("%Y-%m-%d %H:%M")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    failures = []
    if log is not None:
        log.parent.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory() as folder,
        Progress(*columns, console=Console(stderr=True), transient=True) as progress,
    ):
        bar = progress.add_task("", total=sum(len(case.names) for run in runs for case in run.cases))
        for run in runs:
            for message in measure(run, date, log or Path(folder) / "log"):
                if isinstance(message, Row):
                    write_rows(path, merge(read_rows(path), [message]))
                    progress.advance(bar)
                elif isinstance(message, Unmeasured):
                    failures.append(message)
                else:
                    progress.update(bar, description=f"{run.label}: {message}")
    return failures
