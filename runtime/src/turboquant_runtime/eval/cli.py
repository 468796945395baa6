"""`tq eval`: the command around `workload`, `engine`, `far`, `results` and `report`."""

import json
import signal
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from turboquant_runtime.eval import engine, far, report, results, workload
from turboquant_runtime.eval.metrics import far_positions
from turboquant_runtime.eval.process import Done, Failed, Work, run
from turboquant_runtime.eval.results import EngineRun, Measured

FLOOR_CHUNK_TOKENS = 64
DEFAULT_CACHES = ("tq-balanced",)


def evaluate(
    model: Annotated[str, typer.Argument(help="Folder of a Hugging Face checkpoint, or a hub name.")],
    caches: Annotated[
        list[str] | None,
        typer.Option(
            "--cache",
            help="A --kv-cache-dtype to measure beside bf16 and fp8; may be repeated. "
            f"Default: {', '.join(DEFAULT_CACHES)}.",
            show_default=False,
        ),
    ] = None,
    texts: Annotated[
        list[Path] | None,
        typer.Option(
            "--text",
            help="A UTF-8 text file to compare on, in place of the three that come along (prose, technical "
            f"English, code); may be repeated. At least {workload.MIN_TEXT_TOKENS} tokens.",
            exists=True,
            dir_okay=False,
            show_default=False,
        ),
    ] = None,
    tokens: Annotated[
        int,
        typer.Option(
            min=workload.MIN_TEXT_TOKENS, help="Tokens of each text, and of the context that codes lie in."
        ),
    ] = 1536,
    as_json: Annotated[bool, typer.Option("--json", help="Print the rows as JSON.")] = False,
    plot: Annotated[
        Path | None, typer.Option(help="Draw KL by position into this .svg.", dir_okay=False)
    ] = None,
    log: Annotated[Path | None, typer.Option(help="Keep the engines' own output in this file.")] = None,
) -> None:
    """Measure what a compressed KV cache costs in quality on a model, through the engine's real cache.

    Engines run one after the other on this machine, each on one device: bf16 (the reference), bf16 in other
    chunks (what rounding alone gives), fp8, and each --cache. KL: next-token KL(bf16 || cache), nats, over
    positions with at least 128 tokens stored before them; far: over the tenth of them that need distant
    tokens most. Codes: sentences planted in a long context and asked for. Greedy: tokens that agree before
    the first difference, of 32.

    Needs disk in the folder for temporary files (TMPDIR): 4 bytes x tokens of all texts x vocabulary, which
    is 4.4 GB for the three texts of 1,536 tokens and a vocabulary of 262,144.

    Exit code 1: the reference or a --cache could not be measured.
    """
    if plot is not None and plot.suffix != ".svg":
        raise typer.BadParameter(f"{str(plot)!r} does not end in .svg", param_hint="--plot")
    date = datetime.now(UTC).strftime("%Y-%m-%d %H:%M")
    work = _workload(model, texts or (), tokens)
    named = list(dict.fromkeys(caches or DEFAULT_CACHES))
    runs = [
        EngineRun(model, "auto", is_reference=True),
        EngineRun(model, "auto", FLOOR_CHUNK_TOKENS),
        *(EngineRun(model, cache) for cache in dict.fromkeys(("fp8", *named)) if cache != "auto"),
    ]
    found = _measure(runs, work, log)
    reference = found.measured.get(runs[0])
    if reference is None:
        typer.echo(f"tq eval: the bf16 reference was not measured: {found.failures[runs[0]]}", err=True)
        raise typer.Exit(1)
    positions = None if found.dependence is None else far_positions(found.dependence)
    rows = [
        results.row(each, found.measured[each], work, reference, positions)
        if each in found.measured
        else results.unmeasured(each, found.failures[each])
        for each in runs
    ]
    if as_json:
        document = {
            "model": model,
            "versions": reference.versions,
            "device": reference.device,
            "date": date,
            "texts": [
                {"name": text.name, "tokens": len(text.tokens), "scored": len(text.scored)}
                for text in work.texts
            ],
            "far_reason": found.far_reason,
            "rows": [results.rounded(asdict(row)) for row in rows],
        }
        typer.echo(json.dumps(document, indent=1))
    else:
        Console().print(report.table(model, rows))
    for note in report.notes(rows, found.far_reason):
        typer.echo(f"tq eval: {note}", err=True)
    if plot is not None:
        kl = {each.label: found.measured[each].kl for each in runs[1:] if each in found.measured}
        try:
            report.draw(model, rows, kl, plot)
        except (ImportError, OSError, ValueError) as error:
            typer.echo(f"tq eval: no picture: {error}", err=True)
    if any(each.cache in named for each in found.failures):
        raise typer.Exit(1)


def _workload(model: str, texts: Sequence[Path], tokens: int) -> workload.Workload:
    """The workload in tokens of the model; BadParameter for a text or model that gives none."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
    except Exception as error:  # transformers raises what the tokenizer's library does
        reason = " ".join(str(error).split())[:300]
        raise typer.BadParameter(
            f"{model!r} has no tokenizer that transformers reads ({reason}); name a checkpoint's folder or a "
            "hub name",
            param_hint="MODEL",
        ) from error
    try:
        return workload.make(
            workload.read_texts(texts), lambda text: tokenizer(text, verbose=False).input_ids, tokens
        )
    except (OSError, ValueError) as error:
        raise typer.BadParameter(str(error), param_hint="--text") from error


@dataclass
class _Found:
    """What came of the engines and of the search for far positions."""

    measured: dict[EngineRun, Measured] = field(default_factory=dict)
    failures: dict[EngineRun, str] = field(default_factory=dict)
    dependence: Any = None
    far_reason: str | None = None


def _measure(runs: Sequence[EngineRun], work: workload.Workload, log: Path | None) -> _Found:
    """Runs everything, one process after the other; nothing more once the first of `runs` has failed."""
    found = _Found()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    # A command that is told to end takes its engine and gigabytes of temporary files with it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    if log is not None:
        log.parent.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(prefix="tq-eval-") as name,
        Progress(*columns, console=Console(stderr=True), transient=True) as progress,
    ):
        folder = Path(name)
        log = log or folder / "log"
        steps = {each: 3 + len(work.texts) for each in runs}
        far_steps = 1 + len(work.texts)
        bar = progress.add_task("", total=sum(steps.values()) + far_steps)
        for each in runs:
            end = _follow(
                progress, bar, each.label, steps[each], engine.measure, engine.Task(each, work, folder), log
            )
            if isinstance(end, Failed):
                found.failures[each] = end.reason
                if each is runs[0]:
                    return found
            else:
                found.measured[each] = end.result
        task = far.Task(runs[0].model, work.texts)
        end = _follow(progress, bar, "far positions", far_steps, far.measure, task, log)
        if isinstance(end, Failed):
            found.far_reason = end.reason
        else:
            found.dependence = end.result
    return found


def _follow(
    progress: Progress, bar: TaskID, label: str, steps: int, work: Work, task: Any, log: Path
) -> Done | Failed:
    """Runs one process and moves the bar by its steps, however many of them it gets to."""
    begin = progress.tasks[0].completed
    for index, message in enumerate(run(work, task, log)):
        if not isinstance(message, str):
            progress.update(bar, completed=begin + steps)
            return message
        progress.update(bar, description=f"{label}: {message}", completed=begin + index)
    raise AssertionError("a process ends with Done or Failed")
