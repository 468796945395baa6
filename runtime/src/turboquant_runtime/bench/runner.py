"""Runs engines one after the other, each in a process group of its own, and hands on what they report."""

import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from turboquant_runtime.bench import engine
from turboquant_runtime.bench.cases import EngineRun, Start
from turboquant_runtime.bench.results import Row, warm_start
from turboquant_runtime.root_cause import RootCause

ENGINE_SECONDS = 600.0
"""An engine that has not measured its cases by then is ended."""


@dataclass(frozen=True)
class Unmeasured:
    """An engine that failed, with its reason in one line."""

    run: EngineRun
    reason: str


def measure(run: EngineRun, date: str, log: Path) -> Iterator[str | Row | Unmeasured]:
    """What is done next, rows as they come, and last an `Unmeasured` if the engine did not get through.

    `start` cases start the engine once more for each of their repeats, when its other cases are through.
    """
    starts = [case for case in run.cases if isinstance(case, Start)]
    others = tuple(case for case in run.cases if case not in starts)
    for message in _run(replace(run, cases=others), date, log):
        yield message
        if isinstance(message, Unmeasured):
            return
    for case in starts:
        rows = []
        for _ in range(case.repeats):
            for message in _run(replace(run, cases=(case,)), date, log):
                if isinstance(message, Row):
                    rows.append(message)
                else:
                    yield message
        if len(rows) == case.repeats:
            yield warm_start(rows)


def _run(run: EngineRun, date: str, log: Path) -> Iterator[str | Row | Unmeasured]:
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    offset = log.stat().st_size if log.exists() else 0
    process = context.Process(target=engine.serve, args=(run, date, sender, log))
    process.start()
    sender.close()
    deadline = time.monotonic() + ENGINE_SECONDS
    try:
        while True:
            if not receiver.poll(max(0.0, deadline - time.monotonic())):
                yield Unmeasured(run, failure_cause(log, offset) or f"not done after {ENGINE_SECONDS:.0f} s")
                return
            try:
                message = receiver.recv()
            except EOFError:
                message = engine.Failed("its process ended")
            if message is None:
                return
            if isinstance(message, engine.Failed):
                yield Unmeasured(run, failure_cause(log, offset) or message.error)
                return
            yield message
    finally:
        end_process_group(process)


def end_process_group(process: multiprocessing.process.BaseProcess) -> None:
    """Ends the engine's process and all that it started; its GPU memory is free when this returns."""
    assert process.pid is not None
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:  # it failed before it had a group of its own, or is gone with all of it
        process.kill()
    process.join()


def failure_cause(log: Path, offset: int) -> str:
    """The exception at the root of a failure, in one line; empty where the log has none."""
    cause = RootCause()
    with log.open("rb") as file:
        file.seek(offset)
        for line in file.read().decode(errors="replace").splitlines():
            cause.feed(line, 0.0)
    return " ".join(cause.message(0.0).split())
