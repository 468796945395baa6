"""Compiles kernel variants without a GPU, and prints what each takes.

    python kernels/tests/aot/resources.py            the named variants for sm_90, as JSON
    python kernels/tests/aot/resources.py --record   and holds them to that from now on: bounds.json
    python kernels/tests/aot/resources.py --all      every listed variant, for each of its targets

`make test` runs the first form in a process of its own, since the tests around it run Triton's interpreter,
and `make test-aot` the last, which exits with 1 if a variant does not compile. The named variants are those
in bounds.json; `--name` adds one while recording, and one that no longer ships is dropped.

Triton's cache on disk keeps what is compiled, so a run that was stopped goes on where it was.
"""

import argparse
import dataclasses
import json
import multiprocessing
import os
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from turboquant_kernels.aot import AotVariant, Compiled, compile_variant, shipped

BOUNDS = Path(__file__).parent / "bounds.json"
CAPABILITY = 90

_variants: list[AotVariant] = []
"""Of this process and of those forked from it: kernels cannot be sent to another."""


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--record", action="store_true")
    parser.add_argument("--name", action="append", default=[], help="with --record: one more named variant")
    parser.add_argument("--only", default="", help="with --all: a regular expression that names begin with")
    parser.add_argument("-j", "--jobs", type=int, default=os.cpu_count(), help="processes")
    arguments = parser.parse_args()
    _variants.extend(shipped())
    if arguments.all:
        return _compile_all(re.compile(arguments.only), arguments.jobs)
    named = {*json.loads(BOUNDS.read_text()), *arguments.name}
    jobs = [(i, CAPABILITY) for i, variant in enumerate(_variants) if variant.name in named]
    compiled = {}
    for variant, result in _compile(jobs, arguments.jobs):
        if isinstance(result, str):
            sys.exit(f"{variant.name}: {result}")
        compiled[variant.name] = dataclasses.asdict(result)
    if arguments.record:
        kept = ("registers", "spill_bytes", "instructions")
        bounds = {name: {field: compiled[name][field] for field in kept} for name in sorted(compiled)}
        lines = (f" {json.dumps(name)}: {json.dumps(bound)}" for name, bound in bounds.items())
        BOUNDS.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    print(json.dumps(compiled))
    return 0


def _compile_all(only: re.Pattern[str], processes: int) -> int:
    chosen = [(i, variant) for i, variant in enumerate(_variants) if only.match(variant.name)]
    jobs = [(i, capability) for i, variant in chosen for capability in variant.capabilities]
    begin, failures, spills = time.monotonic(), [], []
    for done, (variant, result) in enumerate(_compile(jobs, processes), start=1):
        left = (time.monotonic() - begin) / done * (len(jobs) - done)
        progress = f"[{done}/{len(jobs)}, {left / 60:.0f} min left]"
        if isinstance(result, str):
            failures.append(f"{variant.name}: {result}")
            print(progress, failures[-1], flush=True)
            continue
        if result.spill_bytes:
            spills.append(result)
        print(
            f"{progress} {variant.name} sm_{result.capability}: {result.registers} registers, "
            f"{result.spill_bytes} bytes spilled, {result.shared_bytes} shared, "
            f"{result.instructions} instructions, {result.seconds:.1f} s",
            flush=True,
        )
    print(f"{len(spills)} spill, those that spill most:")
    for result in sorted(spills, key=lambda result: -result.spill_bytes)[:20]:
        print(f"  {result.variant} sm_{result.capability}: {result.spill_bytes} bytes")
    print(f"{len(jobs) - len(failures)} of {len(jobs)} compiled", *failures, sep="\n  ")
    return 1 if failures else 0


def _compile(jobs: list[tuple[int, int]], processes: int) -> Iterator[tuple[AotVariant, Compiled | str]]:
    with multiprocessing.get_context("fork").Pool(processes) as pool:
        for (index, _), result in zip(jobs, pool.imap(_compile_one, jobs), strict=True):
            yield _variants[index], result


def _compile_one(job: tuple[int, int]) -> Compiled | str:
    index, capability = job
    try:
        return compile_variant(_variants[index], capability)
    except Exception as error:  # of a compiler; one variant's failure must not hide the others
        reason = str(error).splitlines() or [""]
        return f"sm_{capability}: {type(error).__name__}: {reason[0]}"


if __name__ == "__main__":
    sys.exit(main())
