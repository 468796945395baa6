"""Kernel variants as data, and what each becomes on a GPU that is not at hand.

A package's `variants()` lists specializations of its kernels. Triton's own ptxas turns one into a
cubin for any target without a GPU, and the cuobjdump and nvdisasm beside it say how many registers it
takes, what it spills and how many instructions it has. The tests hold these to a recorded bound, and a
release that would not compile for some GPU fails on a laptop.
"""

import os
import re
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel
from triton.runtime.jit import JITFunction

from turboquant_kernels.programmatic_launch import LEAST_CAPABILITY

SHARED_BYTES = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
"""The compute capabilities that are compiled for, times ten, and the most shared memory that a program may
have there (CUDA C++ Programming Guide, technical specifications). They are A100; L4 and L40S; H100 and H200;
B200; RTX 50 and RTX PRO 6000."""

CAPABILITIES = tuple(SHARED_BYTES)

VARIANT_MODULES = (
    "turboquant_kernels.store.variants",
    "turboquant_kernels.queries.variants",
    "turboquant_kernels.decode.variants",
    "turboquant_kernels.prefill.variants",
)
"""One of each package with kernels; each has `variants() -> Iterable[AotVariant]`."""

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class AotVariant:
    """One specialization of a kernel, as its launcher would compile it on first use."""

    name: str
    """Unique among all modules: kernel and what it is specialized to, as decode-hopper-k4v4-d128-g4."""
    kernel: JITFunction
    """The @triton.jit or @gluon.jit function."""
    signature: Mapping[str, str]
    """Triton type of each run-time parameter: "*u8", "*bf16", "*i32", "i32", "i64", "fp32"."""
    constexprs: Mapping[str, Any] = field(default_factory=dict)
    """Value of each other parameter; None and 1 too where the launcher passes them and Triton specializes.
    Not of `PDL`, which follows from the target: see `programmatic_launch`."""
    num_warps: int = 4
    num_stages: int = 3
    options: Mapping[str, Any] = field(default_factory=dict)
    """Further compiler options, such as maxnreg."""
    divisible: tuple[str, ...] = ()
    """Integers that are multiples of 16 at run time, so that Triton specializes them. Pointers always are."""
    capabilities: tuple[int, ...] = CAPABILITIES
    """Targets on which the variant ships."""


@dataclass(frozen=True)
class Compiled:
    """What a variant is on one target."""

    variant: str
    capability: int
    registers: int
    """Registers of a thread."""
    spill_bytes: int
    """Stack of a thread: what did not fit its registers, and arrays indexed at run time."""
    shared_bytes: int
    """Shared memory of a program."""
    instructions: int
    """SASS instructions of the kernel, NOPs that pad its end left out."""
    seconds: float
    """Time of the compiler; near zero where Triton's cache had the cubin."""


def shipped() -> Iterator[AotVariant]:
    """The variants of every package. Raises ValueError where two have one name."""
    seen = set()
    for module in VARIANT_MODULES:
        for variant in import_module(module).variants():
            if variant.name in seen:
                raise ValueError(f"{module}: a second variant named {variant.name}")
            seen.add(variant.name)
            yield variant


def compile_variant(variant: AotVariant, capability: int) -> Compiled:
    """Compiles for sm_<capability>, without a GPU.

    Raises what `build` raises, and ValueError where the GPU has too little shared memory.
    """
    begin = time.perf_counter()
    kernel = build(variant, capability)
    seconds = time.perf_counter() - begin
    shared = kernel.metadata.shared
    if shared > SHARED_BYTES[capability]:
        raise ValueError(
            f"{variant.name}: {shared} bytes of shared memory, more than {SHARED_BYTES[capability]}"
        )
    registers, stack, instructions = _inspect(kernel.asm["cubin"])
    return Compiled(variant.name, capability, registers, stack, shared, instructions, seconds)


def build(variant: AotVariant, capability: int) -> CompiledKernel:
    """Triton's result for sm_<capability>, with its PTX and cubin in `asm`.

    Raises what Triton raises, and ValueError where signature and constexprs together do not name every
    parameter once.
    """
    names = variant.kernel.arg_names
    constexprs, options = dict(variant.constexprs), dict(variant.options)
    named = [*variant.signature, *constexprs]
    if "PDL" in names:
        named.append("PDL")
        constexprs["PDL"] = options["launch_pdl"] = capability >= LEAST_CAPABILITY
    named.sort()
    if named != sorted(names):
        wrong = sorted(set(named) ^ set(names)) or "a parameter named twice"
        raise ValueError(f"{variant.name}: signature and constexprs disagree with {variant.kernel}: {wrong}")
    aligned = [n for n, kind in variant.signature.items() if kind.startswith("*") or n in variant.divisible]
    source = _source_type(variant.kernel)(
        fn=variant.kernel,
        signature={name: variant.signature.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in constexprs.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages} | options
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def _source_type(kernel: JITFunction) -> type[ASTSource]:
    if not kernel.is_gluon():
        return ASTSource
    # Here, so that a Triton without Gluon still compiles the other kernels.
    from triton.experimental.gluon._runtime import GluonASTSource

    return GluonASTSource


def _inspect(cubin: bytes) -> tuple[int, int, int]:
    """Registers and stack bytes of a thread, and SASS instructions, of a cubin with one kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _output("cuobjdump", "-res-usage", file.name)
        sass = _output("nvdisasm", "-c", file.name)
    # "Function name: REG:128 STACK:0 SHARED:0 LOCAL:0 ..."; a spill shows as STACK, LOCAL is the older name.
    match = re.search(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", usage)
    if match is None:
        raise RuntimeError(f"cuobjdump printed no resource usage: {usage}")
    registers, stack, local = map(int, match.groups())
    instructions = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?(\w+)", sass, re.MULTILINE)
    return registers, stack + local, sum(opcode != "NOP" for opcode in instructions)


def _output(tool: str, *arguments: str | os.PathLike[str]) -> str:
    return subprocess.run([_TOOLS / tool, *arguments], capture_output=True, text=True, check=True).stdout
