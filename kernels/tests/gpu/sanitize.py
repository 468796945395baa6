"""A small sweep of the kernels under NVIDIA's compute-sanitizer: no access out of bounds, no race.

    python3 kernels/tests/gpu/sanitize.py

A few variants on short sequences, since a kernel under the sanitizer is slower by one or two orders. Where
the tool is absent or the machine does not let it in, it says so.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO

TOOLS = ("memcheck", "racecheck")
CASES, BUDGET, SECONDS = 10, 600, 100
"""Cases of a tool, tokens times KV heads of a case at most, and seconds that are waited for a tool."""

FUZZ = Path(__file__).parent / "fuzz.py"


@dataclass
class Sweep:
    """A tool at work in a process of its own."""

    process: subprocess.Popen[bytes] | None
    """None: there is no such tool here."""
    report: IO[bytes]

    @classmethod
    def start(cls, tool: str) -> "Sweep":
        report = tempfile.TemporaryFile()  # noqa: SIM115, since it outlives this call
        program = shutil.which("compute-sanitizer", path=f"{os.environ['PATH']}:/usr/local/cuda/bin")
        if program is None:
            return cls(None, report)
        fuzz = (sys.executable, FUZZ, "--seed", "0", "--cases", str(CASES), "--budget", str(BUDGET))
        options = ("--tool", tool, "--report-api-errors", "no", "--error-exitcode", "99")
        return cls(subprocess.Popen([program, *options, *fuzz], stdout=report, stderr=report), report)

    def verdict(self) -> str:
        """`clean`, or `skipped: ` and why. AssertionError with the report where the tool finds something."""
        if self.process is None:
            return "skipped: no compute-sanitizer"
        try:
            code = self.process.wait(SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return f"skipped: not done after {SECONDS} s"
        self.report.seek(0)
        report = self.report.read().decode(errors="replace")
        if "Device not supported" in report:
            return "skipped: the machine does not let the sanitizer at the device"
        assert code == 0, report[-4000:]
        return "clean"


if __name__ == "__main__":
    for tool in TOOLS:
        print(tool, Sweep.start(tool).verdict(), flush=True)
