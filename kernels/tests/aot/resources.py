"""Compiles kernel variants without a GPU, and prints what each takes.

    python kernels/tests/aot/resources.py            the named variants for sm_90, as JSON
    python kernels/tests/aot/resources.py --record   and holds them to that from now on: bounds.json
    python kernels/tests/aot/resources.py --all      every variant that ships, for each of its targets

`make test` runs the first form in a process of its own, since the tests around it run Triton's interpreter,
and `make test-aot` the last, which exits with 1 if a variant does not compile. The named variants are those
in bounds.json; `--name` adds one while recording, and one that no longer ships is dropped.
"""

import argparse
import dataclasses
import json
import multiprocessing
import sys
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
    arguments = parser.parse_args()
    _variants.extend(shipped())
    if arguments.all:
        return _compile_all()
    named = {*json.loads(BOUNDS.read_text()), *arguments.name}
    jobs = [(i, CAPABILITY) for i, variant in enumerate(_variants) if variant.name in named]
    compiled = {}
    for variant, result in _compile(jobs):
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


def _compile_all() -> int:
    jobs = [(i, capability) for i, variant in enumerate(_variants) for capability in variant.capabilities]
    failures = 0
    for done, (variant, result) in enumerate(_compile(jobs), start=1):
        if isinstance(result, str):
            failures += 1
            print(f"[{done}/{len(jobs)}] {variant.name}: {result}")
        else:
            print(
                f"[{done}/{len(jobs)}] {variant.name} sm_{result.capability}: {result.registers} registers, "
                f"{result.spill_bytes} bytes spilled, {result.shared_bytes} shared, "
                f"{result.instructions} instructions, {result.seconds:.1f} s",
                flush=True,
            )
    print(f"{len(jobs) - failures} of {len(jobs)} compiled")
    return 1 if failures else 0


def _compile(jobs: list[tuple[int, int]]) -> Iterator[tuple[AotVariant, Compiled | str]]:
    with multiprocessing.get_context("fork").Pool() as pool:
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
