"""`tq bench engine`: its options, the processes of its engines, and what is left when one fails."""

import json
import os
import time
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

import pytest
from test_bench_engine_rows import fixture_row
from typer.testing import CliRunner

from turboquant_kernels import cli
from turboquant_runtime.bench import engine, runner
from turboquant_runtime.bench.cases import EngineRun, Prefill, Start
from turboquant_runtime.bench.results import Row, write_rows

BENCH = [EntryPoint("bench", "turboquant_kernels.bench.cli:app", cli.COMMAND_GROUP)]
RUN = EngineRun("llama-3.1-8b", "plain", "tq-k4v4", (Prefill(10),))


def tq_bench(*arguments):
    arguments = ("bench", "engine", *map(str, arguments))
    return CliRunner().invoke(cli.app(arguments, BENCH), arguments)


def plain_text(result) -> str:
    return " ".join(result.output.replace("│", " ").split())


def test_the_command_is_one_of_tq_bench() -> None:
    assert "engine" in {entry.name for entry in entry_points(group="turboquant.bench")}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "name one of prefill, decode"),
        (("--group", "decoed"), "'decoed' is not one of prefill, decode"),
        (("--group", "decode", "--cache", "tq-k9v9"), "no engine of these groups has such a cache"),
    ],
)
def test_wrong_options_are_refused(tmp_path, options, message) -> None:
    result = tq_bench(*options, "--out", tmp_path)
    assert result.exit_code == 2
    assert message in plain_text(result)
    assert not any(tmp_path.iterdir())


def test_what_the_folder_holds_is_shown_and_drawn(tmp_path) -> None:
    write_rows(tmp_path / "engine.json", [fixture_row()])
    result = tq_bench("--draw-only", "--out", tmp_path, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)[0]["kv_cache_dtype"] == "tq-k4v4"
    assert (tmp_path / "engine.svg").stat().st_size > 1000


def test_an_empty_folder_has_no_picture(tmp_path) -> None:
    result = tq_bench("--draw-only", "--out", tmp_path)
    assert result.exit_code == 0
    assert "no picture: no row has a rate" in plain_text(result)


def test_rows_are_kept_when_a_later_engine_fails(tmp_path, monkeypatch) -> None:
    def measure(run, date, log):
        yield "start"
        if run.cache == "auto":
            yield fixture_row("auto", case="64x512+128", date=date)
        else:
            yield runner.Unmeasured(run, "ValueError: no")

    monkeypatch.setattr("turboquant_runtime.bench.cli.measure", measure)
    result = tq_bench("--group", "short", "--cache", "auto", "--cache", "fp8", "--out", tmp_path)
    assert result.exit_code == 1
    assert "llama-3.1-8b fp8 not measured: ValueError: no" in plain_text(result)
    (row,) = json.loads((tmp_path / "engine.json").read_text())
    assert row["kv_cache_dtype"] == "auto"


def _starts(run, date, connection, log) -> None:
    """As `engine.serve`, without an engine: every start takes a second less."""
    starts = int(log.read_text()) if log.exists() else 9
    log.write_text(str(starts - 1))
    connection.send("start")
    for case in run.cases:
        connection.send(Row("gpu", run.model, run.settings, run.cache, case.names[0], 1, float(starts)))
    connection.send(None)


def _fails(run, date, connection, log) -> None:
    os.setsid()
    log.write_text("Traceback (most recent call last):\n  File x\nValueError: too big\n")
    connection.send(engine.Failed("RuntimeError: see above"))


def _vanishes(run, date, connection, log) -> None:
    os.setsid()
    log.touch()
    os._exit(3)


def _hangs(run, date, connection, log) -> None:
    os.setsid()
    log.with_name("pid").write_text(str(os.getpid()))
    log.touch()
    time.sleep(600)


def messages(monkeypatch, serve, run: EngineRun, log: Path) -> list:
    monkeypatch.setattr(engine, "serve", serve)
    return list(runner.measure(run, "2026-01-01", log))


def test_warm_starts_follow_the_other_cases_and_are_one_row(tmp_path, monkeypatch) -> None:
    run = EngineRun("m", "plain", "auto", (Start(repeats=2), Prefill(10)))
    rows = [m for m in messages(monkeypatch, _starts, run, tmp_path / "log") if isinstance(m, Row)]
    assert [(row.case, row.start_seconds, row.repeats) for row in rows] == [
        ("prefill 10", 9.0, 0),
        ("start", 7.5, 2),
    ]


def test_a_failed_engine_is_told_with_the_exception_at_its_root(tmp_path, monkeypatch) -> None:
    assert messages(monkeypatch, _fails, RUN, tmp_path / "log") == [
        runner.Unmeasured(RUN, "ValueError: too big")
    ]


def test_an_engine_whose_process_vanishes_is_told(tmp_path, monkeypatch) -> None:
    assert messages(monkeypatch, _vanishes, RUN, tmp_path / "log") == [
        runner.Unmeasured(RUN, "its process ended")
    ]


def test_an_engine_that_hangs_is_ended(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(runner, "ENGINE_SECONDS", 8.0)
    (failure,) = messages(monkeypatch, _hangs, RUN, tmp_path / "log")
    assert failure.reason == "not done after 8 s"
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)
