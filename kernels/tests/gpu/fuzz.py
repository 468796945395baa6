"""Random shapes, lengths and inputs for the GPU kernels, against float64 attention and the readable store.

    python3 kernels/tests/gpu/fuzz.py                      2,000 cases
    python3 kernels/tests/gpu/fuzz.py --seed 7 --case 31   one of them again

It needs torch, Triton and this distribution's source on PYTHONPATH, no test tools; `make test-gpu` runs it
with the rest. A process takes one variant after the other: compiles its kernels, which is most of the time,
then runs its cases. Case i of a seed is one of variant i modulo their number, and needs no other case.

Without a GPU, TRITON_INTERPRET=1 with `--device cpu --path portable --budget 200 --processes 1` runs cases in
Triton's interpreter, which checks this file.
"""

import argparse
import contextlib
import math
import multiprocessing
import os
import random
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton

sys.path.insert(0, str(Path(__file__).parents[1]))  # as pytest has it: what other tests share

from cases import BUDGET, DecodeVariant, Variant, all_variants, decode_step
from checks import check, check_decode, check_graph

CASES = 2000
"""Of a whole run."""

_WARM_BUDGET = 200
_MOST_PROCESSES = 20
"""Each takes a gigabyte of the GPU's memory, and 20 GB where a cache is large (`cases.FAR_BYTES`)."""


@dataclass
class Report:
    """What a run found of one variant."""

    name: str
    kernels: int = 0
    """Compiled before the first case, and not found in Triton's cache on disk."""
    compile_seconds: float = 0.0
    late: int = 0
    """Specializations that a case was the first to ask for; a list of variants that is right has few."""
    cases: int = 0
    seconds: float = 0.0
    """Of the cases."""
    worst_error: float = 0.0
    captured: int = 0
    """Graphs that were captured."""
    failures: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        compiled = f"{self.kernels} kernels compiled in {self.compile_seconds:.1f} s"
        cases = f"{self.cases} cases in {self.seconds:.1f} s, {len(self.failures)} failures"
        return f"{self.name}: {compiled}, {self.late} late; {cases}"


def run(
    *,
    seed: int,
    cases: int = CASES,
    only: int | None = None,
    device: torch.device,
    path: str | None = None,
    budget: int = BUDGET,
    graphs: bool = False,
    processes: int | None = None,
    seconds: float = math.inf,
    tell: Callable[[str], None] = print,
) -> list[Report]:
    """`cases` cases of a seed, or `only` one of them, by variant; a report of each variant.

    With `path`, variants of decode on other paths are left out. With `graphs`, each variant of decode is
    captured once as well. No case begins after `seconds`.
    """
    variants = all_variants()
    numbers = range(cases) if only is None else [only]
    tasks = [
        partial(
            _run_variant,
            index,
            seed=seed,
            numbers=[number for number in numbers if number % len(variants) == index],
            device=device,
            budget=budget,
            graphs=graphs,
            deadline=time.time() + seconds,
        )
        for index, variant in enumerate(variants)
        if path is None or not isinstance(variant, DecodeVariant) or variant.path == path
        if only is None or only % len(variants) == index
    ]
    reports = []
    for report in _results(tasks, min(processes or os.cpu_count() or 1, _MOST_PROCESSES, len(tasks))):
        reports.append(report)
        tell(f"[{len(reports)}/{len(tasks)}] {report}")
        for failure in report.failures:
            tell(f"  {failure}")
    return reports


def _results(tasks: list[partial[Report]], processes: int) -> Iterable[Report]:
    if processes == 1:
        yield from (task() for task in tasks)
        return
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        index_of = {pool.submit(task): task.args[0] for task in tasks}
        for future in as_completed(index_of):
            try:
                yield future.result()
            except BrokenProcessPool:  # and with it the pool: every variant that is left comes here
                name = str(all_variants()[index_of[future]])
                yield Report(name, failures=[f"{name}: a process died"])


def _run_variant(
    index: int,
    *,
    seed: int,
    numbers: Iterable[int],
    device: torch.device,
    budget: int,
    graphs: bool,
    deadline: float,
) -> Report:
    torch.set_num_threads(1)
    variant = all_variants()[index]
    report = Report(str(variant))
    compiler = _Compilations()
    with contextlib.suppress(Exception):  # failures are for the cases to find
        _warm(variant, device)
    report.kernels, report.compile_seconds = compiler.compiled, compiler.seconds
    asked_before, begin = compiler.asked, time.monotonic()
    for number in numbers:
        if time.time() > deadline:
            break
        draw = random.Random(f"{seed} {number}")
        torch.manual_seed(draw.getrandbits(32))
        with _failures(report, f"seed {seed} case {number}"):
            report.worst_error = max(report.worst_error, check(variant, draw, device, budget))
        report.cases += 1
    report.late, report.seconds = compiler.asked - asked_before, time.monotonic() - begin
    if graphs and isinstance(variant, DecodeVariant):
        report.captured = 1
        with _failures(report, "graph"):
            check_graph(variant, random.Random(0), device)
    if device.type == "cuda" and not report.failures:  # a process that lost the device cannot
        torch.cuda.empty_cache()
    return report


def _warm(variant: Variant, device: torch.device) -> None:
    """Compiles what the cases of a variant need."""
    draw = random.Random(0)
    if isinstance(variant, DecodeVariant):
        for num_seqs in variant.batches:
            step = decode_step(variant, draw, device, budget=_WARM_BUDGET, num_seqs=num_seqs)
            check_decode(variant, step)
    else:
        for _ in range(8):  # prefill merges tiles in one case and not in the next
            check(variant, draw, device)


@contextlib.contextmanager
def _failures(report: Report, case: str) -> Iterator[None]:
    """Writes down what fails; a kernel that does not compile is a finding like a wrong result."""
    try:
        yield
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0]
        report.failures.append(f"{case}: {report.name}: {type(error).__name__}: {reason}")


class _Compilations:
    """Counts what Triton compiles in this process from now on."""

    def __init__(self) -> None:
        self.asked = 0
        """Specializations, whether or not they were in the cache on disk."""
        self.compiled = 0
        self.seconds = 0.0
        triton.knobs.compilation.listener = self

    def __call__(self, *, times: Any, cache_hit: bool, **_: Any) -> None:
        self.asked += 1
        if not cache_hit:
            self.compiled += 1
            self.seconds += times.total / 1e6


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 31))
    parser.add_argument("--cases", type=int, default=CASES)
    parser.add_argument("--case", type=int, help="only this one")
    parser.add_argument("--path", help="of decode, only variants of this path")
    parser.add_argument("--device", type=torch.device, default="cuda")
    parser.add_argument("--budget", type=int, default=BUDGET)
    parser.add_argument("--graphs", action="store_true", help="capture a graph of each decode variant too")
    parser.add_argument("--processes", type=int)
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no case after these")
    arguments = parser.parse_args()
    print(f"seed {arguments.seed}", flush=True)
    reports = run(
        seed=arguments.seed,
        cases=arguments.cases,
        only=arguments.case,
        device=arguments.device,
        path=arguments.path,
        budget=arguments.budget,
        graphs=arguments.graphs,
        processes=arguments.processes,
        seconds=arguments.seconds,
        tell=partial(print, flush=True),
    )
    failures = sum(len(report.failures) for report in reports)
    print(
        f"{sum(report.cases for report in reports)} cases of {len(reports)} variants: {failures} failures, "
        f"largest error of decode {max(report.worst_error for report in reports):.1e}"
    )
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
