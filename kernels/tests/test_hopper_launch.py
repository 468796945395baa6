"""Launches of the Hopper kernel for every format: their programs fit a multiprocessor."""

from dataclasses import replace

import pytest
from hopper_memory import shared_bytes

from turboquant_kernels.decode.hopper import HEAD_DIMS, launch_of
from turboquant_kernels.formats import COMPRESSED_FORMATS, Encoding

PROGRAM_BYTES, MULTIPROCESSOR_BYTES, RESERVED_BYTES = 227 << 10, 228 << 10, 1 << 10
"""Shared memory of compute capability 9.0 (CUDA C++ Programming Guide, technical specifications); the last
is what the system takes of each program's."""
REGISTERS, REGISTERS_OF_THREAD = 65536, 255

UNIFORM = [fmt for fmt in COMPRESSED_FORMATS if fmt.encoding is Encoding.MSE]


@pytest.mark.parametrize("rows", [4, 8])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_the_programs_of_every_format_fit_a_multiprocessor(head_dim, rows):
    for fmt in UNIFORM:
        for anchor in (False, True):
            launch = launch_of(fmt, head_dim, rows)
            size = shared_bytes(replace(fmt, anchor=anchor), head_dim, launch)
            assert size <= PROGRAM_BYTES, (fmt.name, launch)
            assert launch.programs_per_sm * (size + RESERVED_BYTES) <= MULTIPROCESSOR_BYTES, (
                fmt.name,
                launch,
            )
            threads = 32 * launch.num_warps * launch.programs_per_sm
            assert threads * (launch.max_registers or REGISTERS_OF_THREAD) <= REGISTERS + 512, launch
