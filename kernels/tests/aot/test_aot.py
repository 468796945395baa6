"""Kernel variants compiled for a GPU that is not at hand, and what they take of it.

`python kernels/tests/aot/resources.py --record` records anew, on purpose: more registers are fewer warps, and
a spill in the loop over tokens costs a kernel half its speed.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from ptx_machine.hopper_memory import shared_bytes

from turboquant_kernels.decode import hopper
from turboquant_kernels.decode.variants import variants
from turboquant_kernels.formats import KVFormat

RESOURCES = Path(__file__).parent / "resources.py"
BOUNDS = json.loads((RESOURCES.parent / "bounds.json").read_text())


@pytest.fixture(scope="session")
def compiled():
    """By name, what each named variant takes: one process for all, since this one may interpret kernels."""
    run = subprocess.run([sys.executable, RESOURCES], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.mark.parametrize("name", BOUNDS)
def test_a_named_variant_stays_within_its_bounds(name, compiled):
    assert name in compiled, "no variant of this name ships any more"
    taken = {resource: compiled[name][resource] for resource in ("registers", "spill_bytes")}
    assert all(taken[resource] <= BOUNDS[name][resource] for resource in taken), (taken, BOUNDS[name])


@pytest.mark.parametrize("name", [name for name in BOUNDS if name.startswith("decode-hopper-")])
def test_the_ring_of_pages_begins_the_shared_memory(name, compiled):
    """Its addresses count from there, which the compiler does not know: nothing else lives beside it."""
    own = next(variant for variant in variants() if variant.name == name).constexprs["SPEC"]
    fmt = KVFormat(own.KEY_BITS, own.VALUE_BITS, anchor=own.ANCHOR)
    launch = hopper.launch_of(fmt, own.D, own.R, short=name.endswith("-short"))
    assert compiled[name]["shared_bytes"] == shared_bytes(fmt, own.D, launch)
