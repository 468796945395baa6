"""A small sweep of the kernels under NVIDIA's compute-sanitizer: no access out of bounds, no race.

    python3 kernels/tests/gpu/sanitize.py

A few variants on short sequences, since a kernel under the sanitizer is slower by one or two orders. Where
the tool is absent or the machine does not let it in, it says so.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

TOOLS = ("memcheck", "racecheck")
CASES, BUDGET, SECONDS = 10, 600, 150
"""Cases of a tool, tokens times KV heads of a case at most, and seconds for a tool."""

FUZZ = Path(__file__).parent / "fuzz.py"


def sanitize(tool: str) -> str:
    """ "clean", or "skipped: " and why. AssertionError with the tool's report where it finds something."""
    program = shutil.which("compute-sanitizer", path=f"{os.environ['PATH']}:/usr/local/cuda/bin")
    if program is None:
        return "skipped: no compute-sanitizer"
    fuzz = [sys.executable, FUZZ, "--seed", "0", "--cases", str(CASES), "--budget", str(BUDGET)]
    command = [
        program,
        "--tool",
        tool,
        "--report-api-errors",
        "no",
        "--error-exitcode",
        "99",
        *map(str, fuzz),
    ]
    try:
        run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return f"skipped: not done after {SECONDS} s"
    report = run.stdout + run.stderr
    if "Device not supported" in report:
        return "skipped: the machine does not let the sanitizer at the device"
    assert run.returncode == 0, report[-4000:]
    return "clean"


if __name__ == "__main__":
    for tool in TOOLS:
        print(tool, sanitize(tool), flush=True)
