"""A small sweep of the kernels under NVIDIA's compute-sanitizer: no access out of bounds, no race.

    python3 kernels/tests/gpu/sanitize.py

A few variants on short sequences, results unread, since a kernel under the sanitizer is slower by one or two
orders, PyTorch's too. Each tool sweeps the default decode path in one process and everything else in another.
Where the tool is absent or the machine does not let it in, or a sweep takes too long, the verdict says so.
"""

import argparse
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # as pytest has it: what other tests share

from cases import (
    DecodeVariant,
    PrefillVariant,
    StoreVariant,
    Variant,
    all_variants,
    decode_step,
    prefill_step,
)
from checks import check_store, prefill

from turboquant_kernels.bench import subject

TOOLS = ("memcheck", "racecheck")
SHARES = ("default", "others")
BUDGET, SECONDS = 1000, 60
"""Tokens times KV heads of a case at most; seconds after which a sweep begins no further variant."""
_GRACE = 30
"""Seconds that a sweep may take longer, for its last variant and its report."""
_RAN = "ran variant"


def swept(share: str) -> list[Variant]:
    """Every fifth variant of the default path; every third of the others. Of long sequences none."""
    variants = [v for v in all_variants() if not (isinstance(v, DecodeVariant) and v.heavy)]
    default = [v for v in variants if isinstance(v, DecodeVariant) and v.path is None]
    return default[::5] if share == "default" else [v for v in variants if v not in default][::3]


def sweep(share: str, seconds: float) -> None:
    """Runs a share's kernels in this process, and prints a line for each variant."""
    begin, device = time.monotonic(), torch.device("cuda")
    for variant in swept(share):
        if time.monotonic() - begin > seconds:
            break
        draw = random.Random(0)
        if isinstance(variant, StoreVariant):
            check_store(variant, draw, device)
        elif isinstance(variant, PrefillVariant):
            prefill(variant, *prefill_step(variant, draw, device, budget=BUDGET))
        else:
            step = decode_step(variant, draw, device, budget=BUDGET, num_seqs=variant.batches[0])
            subject.output(step, path=variant.path)()
        torch.cuda.synchronize()
        print(_RAN, variant, f"{time.monotonic() - begin:.1f} s", flush=True)


@dataclass
class Sweep:
    """A tool at work on a share in a process of its own."""

    share: str
    process: subprocess.Popen[bytes] | None
    """None: there is no such tool here."""
    report: IO[bytes]

    @classmethod
    def start(cls, tool: str, share: str, seconds: float = SECONDS) -> "Sweep":
        report = tempfile.TemporaryFile()  # noqa: SIM115, since it outlives this call
        program = shutil.which("compute-sanitizer", path=f"{os.environ['PATH']}:/usr/local/cuda/bin")
        if program is None:
            return cls(share, None, report)
        options = ("--tool", tool, "--report-api-errors", "no", "--error-exitcode", "99")
        own = (sys.executable, __file__, "--share", share, "--seconds", str(seconds))
        # An allocation each for every tensor, so that what lies beyond one is out of bounds.
        environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        process = subprocess.Popen([program, *options, *own], stdout=report, stderr=report, env=environment)
        return cls(share, process, report)

    def verdict(self, patience: float = SECONDS + _GRACE) -> str:
        """`clean: ` and how much was swept, `skipped: ` and why, or `failed: ` and the end of the report."""
        if self.process is None:
            return "skipped: no compute-sanitizer"
        try:
            code: int | None = self.process.wait(patience)
        except subprocess.TimeoutExpired:
            self.process.kill()
            code = None
        self.report.seek(0)
        report = self.report.read().decode(errors="replace")
        ran = f"{len(re.findall(rf'^{_RAN}', report, re.MULTILINE))} of {len(swept(self.share))} variants"
        if "Device not supported" in report:
            return "skipped: the machine does not let the sanitizer at the device"
        if code is None:
            return f"skipped: stopped without a report, after {ran}"
        if code or not re.search(r"SUMMARY: 0 (errors|hazards)", report):
            return f"failed: {report[-2000:]}"
        return f"clean: {ran}"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--share", choices=SHARES, help="sweep this in this process, as the tools do")
    parser.add_argument("--seconds", type=float, default=SECONDS)
    arguments = parser.parse_args()
    if arguments.share:
        sweep(arguments.share, arguments.seconds)
        return
    sweeps = [(tool, Sweep.start(tool, share, arguments.seconds)) for tool in TOOLS for share in SHARES]
    for tool, started in sweeps:
        print(tool, started.share, started.verdict(arguments.seconds + _GRACE), flush=True)


if __name__ == "__main__":
    main()
