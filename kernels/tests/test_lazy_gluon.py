"""Gluon is experimental: it is imported where the Hopper kernel runs and nowhere else."""

import subprocess
import sys

IMPORTS = """
import sys
import turboquant_kernels.decode.plan, turboquant_kernels.decode.portable, turboquant_kernels.decode.hopper
import turboquant_kernels.prefill.attention, turboquant_kernels.store.kernel, turboquant_kernels.bench.subject
print(*(name for name in sys.modules if name.startswith("triton.experimental.gluon")))
"""

DECODE = """
import sys
import torch
from turboquant_kernels.bench import subject
from turboquant_kernels.bench.caches import random_step
from turboquant_kernels.codec import Codec
from turboquant_kernels.formats import KVFormat
from turboquant_kernels.decode.plan import DecodePlan

step = random_step(Codec(KVFormat(4, 4), 64), [40], 2, 1, torch.device("cpu"))
subject.output(step, path="portable")()
assert subject.plan_of(step).path == "portable"
assert subject.plan_of(step, "hopper").launch.rows == 4
print(*(name for name in sys.modules if name.startswith("turboquant_kernels.decode.hopper.")))
"""


def run(script, **environment):
    return subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment
    ).stdout


def test_imports_do_not_import_it():
    assert run(IMPORTS).split() == []


def test_the_portable_kernel_runs_without_the_modules_that_need_it():
    own = {name.rpartition(".")[2] for name in run(DECODE, TRITON_INTERPRET="1").split()}
    assert own == {"launch"}
