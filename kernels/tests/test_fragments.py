"""The Hopper kernel's assembly, run here instruction by instruction: Gluon has no interpreter.

Words come from `packing`, so a register is compared with the int8 of the very coordinates that it should
hold.
"""

import re

import pytest
import torch
from ptx_machine.assembly import MASK, execute, signed_bytes, words_of

from turboquant_kernels.codebook import codebook
from turboquant_kernels.decode.hopper.fragments import (
    WORD_SHIFT,
    fragment,
    key_coordinate,
    level_table,
    table_registers,
)
from turboquant_kernels.packing import PLANES, CodeOrder


def run(text: str, outputs: int, inputs: list[int]) -> list[int]:
    """The output registers of a fragment whose inputs stand in every fourth operand."""
    values = execute(text, {f"${outputs + 4 * i}": word & MASK for i, word in enumerate(inputs)})
    return [values[f"${i}"] for i in range(outputs)]


def from_registers(bits: int, head_dim: int) -> list[int]:
    table = level_table(bits, head_dim)
    return [*(table[i] for i in table_registers(bits)), WORD_SHIFT]


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6])
def test_keys_of_a_word_group_become_the_int8_of_their_levels(bits):
    codes = torch.randint(1 << bits, (32,), dtype=torch.uint8)
    planes = CodeOrder(bits, 32, read_bytes=4).pack(codes)
    words = words_of(planes[0])
    piece = fragment(bits, len(words), level_table(bits, 128))
    inputs = words + [words_of(plane)[0] for plane in planes[1:]] + from_registers(bits, 128)
    registers = run(piece.text, 8, inputs)
    grid = codebook(bits, 128).grid
    for i, register in enumerate(registers):
        expected = [int(grid[int(codes[key_coordinate(bits, i, byte)])]) for byte in range(4)]
        assert signed_bytes(register) == expected


@pytest.mark.parametrize("bits", [3, 5, 6])
def test_a_lane_with_half_a_word_of_high_bits_shifts_it_into_place(bits):
    """head_dim 64: lane 1 of two that share a word reads the second 16 of 32 coordinates."""
    codes = torch.randint(1 << bits, (32,), dtype=torch.uint8)
    planes = CodeOrder(bits, 32, read_bytes=4).pack(codes)
    words = words_of(planes[0])
    shift = 2 if bits == 3 else 4
    high = [words_of(plane)[0] >> shift for plane in planes[1:]]
    piece = fragment(bits, len(words) // 2, level_table(bits, 64))
    registers = run(piece.text, 4, words[len(words) // 2 :] + high + from_registers(bits, 64))
    grid = codebook(bits, 64).grid
    for i, register in enumerate(registers):
        expected = [int(grid[int(codes[16 + key_coordinate(bits, i, byte)])]) for byte in range(4)]
        assert signed_bytes(register) == expected


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_values_of_four_tokens_come_out_two_tokens_a_register(bits):
    width = PLANES[bits][0]
    words = 2 if bits == 3 else 1
    coordinates = words * 8 // width
    codes = torch.randint(1 << bits, (4, coordinates), dtype=torch.uint8)
    # Bytes of four tokens interleaved: [bytes of a row, 4 tokens].
    planes = [plane.T.contiguous() for plane in CodeOrder(bits, coordinates, read_bytes=1).pack(codes)]
    inputs = [word for plane in planes for word in words_of(plane.flatten())]
    piece = fragment(bits, words, level_table(bits, 128))
    outputs = words * 8 // width
    registers = run(piece.text, outputs, inputs + from_registers(bits, 128))
    grid = codebook(bits, 128).grid
    for i, register in enumerate(registers):
        if bits == 4:
            word, half, odd, low, high = 0, i, 0, 0, 1
        else:
            word, half, odd, low, high = i // 4, i // 2 % 2, i % 2, 0, 2
        at = word * (8 // width) + odd
        expected = [
            int(grid[int(codes[2 * half + token, at + nibble])])
            for token in range(2)
            for nibble in (low, high)
        ]
        assert signed_bytes(register) == expected


def test_eight_bit_codes_need_no_assembly():
    assert fragment(8, 4, level_table(8, 128)).text == ""


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6])
def test_constraints_name_every_operand(bits):
    piece = fragment(bits, 2, level_table(bits, 128))
    operands = piece.constraints.split(",")
    used = {int(number) for number in re.findall(r"\$(\d+)", piece.text)}
    assert max(used) < len(operands)
    assert operands.count("=&r") == 2 * 8 // PLANES[bits][0]
