"""The Hopper decode kernel on the CPU: compiled as Triton would for a launch, then run by this machine."""

import struct
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import numpy as np
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

from ptx_machine.memory import Memory
from ptx_machine.program import Program
from turboquant_kernels.decode.hopper.kernel import decode_kernel

_TARGET = GPUTarget("cuda", 90, 32)


def compile_kernel(
    signature: dict[str, str], constexprs: dict[Any, Any], attrs: dict[Any, Any], options: dict[str, int]
) -> tuple[str, int]:
    """PTX and bytes of shared memory. Not in a process in which Triton interprets kernels."""
    from triton.experimental.gluon._runtime import GluonASTSource

    source = GluonASTSource(decode_kernel, signature, constexprs, attrs)
    kernel = triton.compile(source, target=_TARGET, options=options)
    return kernel.asm["ptx"], kernel.metadata.shared


class MachineKernel:
    """Stands in for `decode_kernel`: the same launch, of CPU tensors."""

    def __init__(self) -> None:
        self.backwards = False
        """Whether programs run in the reverse of their order."""
        self._compiler = ProcessPoolExecutor(1, mp_context=get_context("spawn"))
        self._backend = make_backend(_TARGET)
        self._bind = create_function_from_signature(
            decode_kernel.signature, decode_kernel.params, self._backend
        )
        self._programs = {}

    @property
    def kernels(self) -> int:
        """Kernels that were compiled."""
        return len(self._programs)

    def close(self) -> None:
        self._compiler.shutdown()

    def __getitem__(self, grid: tuple[int, int]) -> Any:
        return lambda *arguments, **named: self._launch(grid, arguments, named)

    def _launch(self, grid: tuple[int, int], arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        bound, specialization, options = self._bind(*arguments, **named)
        _, signature, constexprs, attrs = decode_kernel._pack_args(
            self._backend, dict(options), bound, specialization, options
        )
        key = repr((signature, constexprs, attrs, options))
        if key not in self._programs:
            ptx, shared = self._compiler.submit(
                compile_kernel, signature, constexprs, attrs, options
            ).result()
            self._programs[key] = Program(ptx), shared
        program, shared = self._programs[key]
        values = [bound[name] for name, kind in signature.items() if kind != "constexpr"]
        memory = Memory([_bytes_of(x) for x in values if isinstance(x, torch.Tensor)])
        addresses = iter(range(len(memory.buffers)))
        words = [memory.address(next(addresses)) if isinstance(x, torch.Tensor) else _bits(x) for x in values]
        # Triton appends pointers to scratch memory, of which this kernel has none.
        program.run(grid, memory, [*words, 0, 0], shared, backwards=self.backwards)


def _bytes_of(tensor: torch.Tensor) -> np.ndarray:
    """From where a tensor begins to the end of its storage."""
    storage = tensor.untyped_storage()
    begin = tensor.storage_offset() * tensor.itemsize
    return torch.empty(0, dtype=torch.uint8).set_(storage, begin, (len(storage) - begin,)).numpy()


def _bits(value: int | float) -> int:
    return struct.unpack("I", struct.pack("f", value))[0] if isinstance(value, float) else value
