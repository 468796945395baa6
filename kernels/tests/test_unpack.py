"""The PTX that unpacks codes, run by a few lines of Python: no GPU, every format that has it."""

import pytest
import torch
from ptx_machine.assembly import execute, signed_bytes, words_of

from turboquant_kernels.codebook import codebook
from turboquant_kernels.codec import Codec
from turboquant_kernels.formats import HEAD_DIMS, KVFormat
from turboquant_kernels.unpack_ptx import levels_ptx


def run(ptx: str, outputs: int, inputs: list[int]) -> list[int]:
    """The output registers of PTX whose inputs stand in the operands after them."""
    values = execute(ptx, {f"${outputs + i}": word for i, word in enumerate(inputs)})
    return [values[f"${i}"] for i in range(outputs)]


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
        for j, word in enumerate(words_of(first)):
            for r, register in enumerate(run(ptx, size, [word])):
                for b, c in enumerate(signed_bytes(register)):
                    found[(4 * j + b) * size + r] = c
    else:
        high_words = [words_of(plane) for plane in high]
        per_group = len(first) // 4 // len(high_words[0])
        for g in range(head_dim // 32):
            inputs = words_of(first)[g * per_group : (g + 1) * per_group] + [plane[g] for plane in high_words]
            for r, register in enumerate(run(ptx, 8, inputs)):
                for b, c in enumerate(signed_bytes(register)):
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
    for j, registers in enumerate(zip(*(words_of(x) for x in inputs), strict=True)):
        results = run(ptx, 2 * outputs, list(registers))
        for r in range(outputs):
            for b, level in enumerate(as_bf16(results[2 * r : 2 * r + 2])):
                found[(4 * j + b) * outputs + r] = level
    assert [found[i] for i in range(head_dim)] == expected
