"""Inline assembly by itself: 32-bit registers before and after it, as Python's integers."""

import torch

from ptx_machine.memory import Memory
from ptx_machine.program import Program

MASK = 0xFFFFFFFF


def execute(text: str, registers: dict[str, int]) -> dict[str, int]:
    """All operands, `$0` and so on, after a block of PTX that starts with `registers`."""
    after = Program(text).run_cta(Memory([]), registers, shared_bytes=0)
    return {name: int(lanes[0]) for name, lanes in after.items() if name.startswith("$")}


def words_of(row: torch.Tensor) -> list[int]:
    """Bytes as the registers that a load makes of them."""
    return [word & MASK for word in row.contiguous().view(torch.int32).tolist()]


def signed_bytes(register: int) -> list[int]:
    return [(register >> 8 * i & 255) - 2 * (register >> 8 * i & 128) for i in range(4)]
