"""The PTX that unpacks codes, run by a few lines of Python: no GPU, every format that has it."""

import re

import pytest
import torch

from turboquant_kernels.codebook import codebook
from turboquant_kernels.codec import Codec
from turboquant_kernels.formats import HEAD_DIMS, KVFormat
from turboquant_kernels.unpack_ptx import levels_ptx

MASK = (1 << 32) - 1


def permute(a: int, b: int, selector: int) -> int:
    """prmt.b32: four of the eight bytes of a and b, or a sign repeated, as nibbles of the selector say."""
    table = (a | b << 32).to_bytes(8, "little")
    chosen = 0
    for i in range(4):
        nibble = selector >> 4 * i & 15
        byte = table[nibble & 7]
        chosen |= (byte if nibble < 8 else 255 * (byte >> 7)) << 8 * i
    return chosen


def fma_bf16x2(a: int, b: int, c: int) -> int:
    def halves(word):
        return (
            torch.tensor([word & 0xFFFF, word >> 16], dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
        )

    low, high = (halves(a).double() * halves(b).double() + halves(c).double()).bfloat16().view(torch.int16)
    return int(low) & 0xFFFF | (int(high) & 0xFFFF) << 16


OPERATIONS = {
    "mov.b32": lambda a: a,
    "and.b32": lambda a, b: a & b,
    "or.b32": lambda a, b: a | b,
    "xor.b32": lambda a, b: a ^ b,
    "shl.b32": lambda a, b: a << b & MASK,
    "shr.u32": lambda a, b: a >> b,
    "prmt.b32": permute,
    "lop3.b32": lambda a, b, c, table: sum(
        ((table >> ((a >> i & 1) << 2 | (b >> i & 1) << 1 | c >> i & 1)) & 1) << i for i in range(32)
    ),
    "fma.rn.bf16x2": fma_bf16x2,
}


def execute(ptx: str, outputs: int, inputs: list[int]) -> list[int]:
    registers = {f"${outputs + i}": value for i, value in enumerate(inputs)}
    for name, operands in re.findall(r"^(\w[\w.]*) (.*);$", ptx, re.MULTILINE):
        target, *sources = operands.split(", ")
        values = [registers[s] if s in registers else int(s, 0) for s in sources]
        registers[target] = OPERATIONS[name](*values)
    return [registers[f"${i}"] for i in range(outputs)]


def words(row: torch.Tensor) -> list[int]:
    return row.contiguous().view(torch.int32).to(torch.int64).bitwise_and(MASK).tolist()


def as_int8(register: int) -> list[int]:
    return torch.tensor([register]).to(torch.int32).view(torch.int8).tolist()


def as_bf16(registers: list[int]) -> list[float]:
    return torch.tensor(registers).to(torch.int32).view(torch.bfloat16).tolist()


def planes(codes: torch.Tensor, order) -> list[torch.Tensor]:
    return [plane.flatten() for plane in order.pack(codes)]


@pytest.mark.parametrize("head_dim", [d for d in HEAD_DIMS if d % 32 == 0])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6])
def test_key_ptx_gives_the_grid_points_of_the_codes(bits, head_dim):
    order = Codec(KVFormat(bits, 4), head_dim).key_order
    codes = torch.randint(0, 1 << bits, (head_dim,), dtype=torch.uint8)
    first, *high = planes(codes, order)
    expected = codebook(bits, head_dim).grid[codes.int()].tolist()
    ptx = levels_ptx(bits, head_dim, bf16=False)
    found = {}
    if bits in (2, 4):
        size = 8 // bits
        for j, word in enumerate(words(first)):
            for r, register in enumerate(execute(ptx, size, [word])):
                for b, c in enumerate(as_int8(register)):
                    found[(4 * j + b) * size + r] = c
    else:
        high_words = [words(plane) for plane in high]
        per_group = len(first) // 4 // len(high_words[0])
        for g in range(head_dim // 32):
            inputs = words(first)[g * per_group : (g + 1) * per_group] + [plane[g] for plane in high_words]
            for r, register in enumerate(execute(ptx, 8, inputs)):
                for b, c in enumerate(as_int8(register)):
                    at = 16 * (r // 4) + 4 * b + r % 4 if bits == 3 else 4 * r + b
                    found[32 * g + at] = c
    assert [found[i] for i in range(head_dim)] == expected


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_value_ptx_gives_the_levels_of_the_codes_exactly(bits, head_dim):
    order = Codec(KVFormat(4, bits), head_dim).value_order
    codes = torch.randint(0, 1 << bits, (head_dim,), dtype=torch.uint8)
    first, *high = planes(codes, order)
    expected = (codebook(bits, head_dim).grid[codes.int()].float() + 0.5).tolist()
    ptx = levels_ptx(bits, head_dim, bf16=True)
    outputs = 8 if bits == 3 else 8 // bits
    if bits == 3:
        spare = -len(high[0]) % 4
        inputs = [torch.nn.functional.pad(x, (0, spare)) for x in (first[0::2], first[1::2], high[0])]
    else:
        inputs = [first]
    found = {}
    for j, registers in enumerate(zip(*(words(x) for x in inputs), strict=True)):
        results = execute(ptx, 2 * outputs, list(registers))
        for r in range(outputs):
            for b, level in enumerate(as_bf16(results[2 * r : 2 * r + 2])):
                found[(4 * j + b) * outputs + r] = level
    assert [found[i] for i in range(head_dim)] == expected
