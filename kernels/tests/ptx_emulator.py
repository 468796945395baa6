"""The instructions that unpacking is made of, run by Python as the PTX manual has them: no GPU."""

import re

import torch

MASK = 0xFFFFFFFF


def execute(text: str, registers: dict[str, int]) -> dict[str, int]:
    """All registers after a block of PTX that starts with `registers`; each holds 32 bits."""
    values = dict(registers)
    for name, operands in re.findall(r"([a-z0-9.]+) ([^;]+);", text):
        if name == ".reg":
            continue
        target, *sources = operands.split(", ")
        values[target] = _OPERATIONS[name](*(values[s] if s in values else int(s, 0) & MASK for s in sources))
    return values


def words_of(row: torch.Tensor) -> list[int]:
    """Bytes as the registers that a load makes of them."""
    return [word & MASK for word in row.contiguous().view(torch.int32).tolist()]


def signed_bytes(register: int) -> list[int]:
    return [(register >> 8 * i & 255) - 2 * (register >> 8 * i & 128) for i in range(4)]


def _permute(a: int, b: int, selector: int) -> int:
    """prmt.b32: four bytes of b:a by nibbles of the selector; bit 3 replicates the byte's sign."""
    pool = [(b << 32 | a) >> 8 * i & 255 for i in range(8)]
    result = 0
    for i in range(4):
        nibble = selector >> 4 * i & 15
        byte = pool[nibble & 7]
        if nibble & 8:
            byte = 255 if byte & 128 else 0
        result |= byte << 8 * i
    return result


def _logic(a: int, b: int, c: int, table: int) -> int:
    """lop3.b32: the bit of the truth table that three bits select."""
    bits = (table >> ((a >> i & 1) << 2 | (b >> i & 1) << 1 | (c >> i & 1)) & 1 for i in range(32))
    return sum(bit << i for i, bit in enumerate(bits))


def _fma_bf16x2(a: int, b: int, c: int) -> int:
    def halves(word: int) -> torch.Tensor:
        numbers = torch.tensor([word & 0xFFFF, word >> 16], dtype=torch.int32)
        return numbers.to(torch.int16).view(torch.bfloat16).double()

    low, high = (halves(a) * halves(b) + halves(c)).bfloat16().view(torch.int16).tolist()
    return low & 0xFFFF | (high & 0xFFFF) << 16


_OPERATIONS = {
    "mov.b32": lambda a: a,
    "and.b32": lambda a, b: a & b,
    "or.b32": lambda a, b: a | b,
    "xor.b32": lambda a, b: a ^ b,
    "shl.b32": lambda a, b: a << b & MASK,
    "shr.u32": lambda a, b: a >> b,
    "prmt.b32": _permute,
    "lop3.b32": _logic,
    "fma.rn.bf16x2": _fma_bf16x2,
    "dp2a.lo.u32.u32": lambda a, b, c: ((a & 0xFFFF) * (b & 255) + (a >> 16) * (b >> 8 & 255) + c) & MASK,
}
