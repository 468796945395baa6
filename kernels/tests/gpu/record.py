"""Everything that is asked of the kernels on a GPU, and the record of it: result.json.

    python3 kernels/tests/gpu/record.py

As fuzz.py it needs no test tools; `make test-gpu` makes the same record. Sweeps under the sanitizer run
beside the random cases.
"""

import argparse
import datetime
import json
import os
import random
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # as pytest has it: what other tests share

import checks
import fuzz
import sanitize
import sources
from cases import BUDGET

RESULT = Path(__file__).parent / "result.json"


def record(*, seed: int, cases: int = fuzz.CASES, seconds: float = sanitize.SECONDS) -> dict[str, Any]:
    """What was found on this machine's GPU, for these sources. `seconds` bounds a sweep of the sanitizer."""
    begin = time.monotonic()
    sweeps = {
        tool: [sanitize.Sweep.start(tool, share, seconds) for share in sanitize.SHARES]
        for tool in sanitize.TOOLS
    }
    device = torch.device("cuda")
    processes = max(2, (os.cpu_count() or 1) - 2 * len(sweeps))
    tell = partial(print, flush=True)
    tell(f"seed {seed}")
    reports = fuzz.run(seed=seed, cases=cases, device=device, graphs=True, processes=processes, tell=tell)
    fuzzed = time.monotonic() - begin
    slowest = max(reports, key=lambda report: report.compile_seconds)
    failures = [failure for report in reports for failure in report.failures]
    captured = sum(report.captured for report in reports)
    found: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name(),
        "date": datetime.date.today().isoformat(),
        "sources": sources.digest(),
        "fuzz": {
            "seed": seed,
            "cases": sum(report.cases for report in reports),
            "variants": sum(report.cases > 0 for report in reports),
            "budget": BUDGET,
            "failures": [failure for failure in failures if not failure.startswith("graph")],
            "largest_error": float(f"{max(report.worst_error for report in reports):.2e}"),
            "seconds": round(fuzzed),
        },
        "graphs": {
            "captured": captured,
            "passed": captured - sum(failure.startswith("graph") for failure in failures),
        },
        "compiled": {
            "kernels": sum(report.kernels for report in reports),
            "late": sum(report.late for report in reports),
            "seconds": round(sum(report.compile_seconds for report in reports), 1),
            "slowest": {slowest.name: round(slowest.compile_seconds, 1)},
        },
    }
    try:
        found["tail"] = {"error": float(f"{checks.check_tail(device):.2e}")}
    except AssertionError as error:
        found["tail"] = {"failure": str(error)}
    left = max(1.0, seconds + 30 - fuzzed)
    for tool, started in sweeps.items():
        found[tool] = {sweep.share: sweep.verdict(left) for sweep in started}
    return found


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 31))
    parser.add_argument("--cases", type=int, default=fuzz.CASES)
    parser.add_argument("--seconds", type=float, default=sanitize.SECONDS, help="of a sanitizer's sweep")
    parser.add_argument("--result", type=Path, default=RESULT)
    arguments = parser.parse_args()
    found = record(seed=arguments.seed, cases=arguments.cases, seconds=arguments.seconds)
    arguments.result.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))
    return 1 if problems(found) else 0


def problems(found: dict[str, Any]) -> list[str]:
    """What is wrong in a record."""
    wrong = list(found["fuzz"]["failures"])
    if found["graphs"]["passed"] < found["graphs"]["captured"]:
        wrong.append(f"graphs: {found['graphs']}")
    if "failure" in found.get("tail", {}):
        wrong.append(f"tail: {found['tail']['failure']}")
    for tool in sanitize.TOOLS:
        verdicts = found[tool].items()
        wrong += [f"{tool} {share}: {verdict}" for share, verdict in verdicts if verdict.startswith("failed")]
    return wrong


if __name__ == "__main__":
    sys.exit(main())
