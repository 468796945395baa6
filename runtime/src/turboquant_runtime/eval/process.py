"""One measurement in a process group of its own: what it says as it comes, and how it ended. No vLLM.

Each engine starts clean so, its memory is free when it ends, and one that fails ends nothing else.
"""

import multiprocessing
import os
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from turboquant_runtime.bench.runner import end_process_group, failure_cause

SILENT_SECONDS = 1800.0
"""A process that has said nothing for so long is ended."""

REASON_CHARACTERS = 400


@dataclass(frozen=True)
class Failed:
    """The last message of a process that did not get through, with the reason in one line."""

    reason: str


@dataclass(frozen=True)
class Done:
    """The last message of a process that got through."""

    result: Any


Say = Callable[[str], None]
"""Tells what is done next."""

Work = Callable[[Any, Say], Any]


def run(work: Work, argument: Any, log: Path) -> Iterator[str | Done | Failed]:
    """Calls `work(argument, say)` in a new process, whose own output goes to the end of `log`.

    Yields what it says, and last what it returns, or why it did not.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    log.touch()
    offset = log.stat().st_size
    process = context.Process(target=_main, args=(work, argument, sender, log))
    process.start()
    sender.close()
    try:
        while True:
            if not receiver.poll(SILENT_SECONDS):
                yield Failed(
                    failure_cause(log, offset) or f"nothing was heard of it for {SILENT_SECONDS:.0f} s"
                )
                return
            try:
                message = receiver.recv()
            except EOFError:
                message = Failed(failure_cause(log, offset) or "its process ended")
            yield message
            if not isinstance(message, str):
                return
    finally:
        end_process_group(process)


def _main(work: Work, argument: Any, connection: Connection, log: Path) -> None:
    os.setsid()  # `run` ends this process with all that it starts
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        connection.send(Done(work(argument, connection.send)))
    except Exception as error:
        traceback.print_exc()
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        connection.send(Failed(reason[:REASON_CHARACTERS]))
