"""PTX that turns packed codes into operands of integer tensor cores, in registers.

`mma.m16n8k32` of int8 wants four neighbouring elements of one row's contraction index in each 32-bit
register. Rows and contraction index may be permuted at will, if the other operand or the result is permuted
alike; so the words of a page (`turboquant_kernels.packing`) are read as they are, and codes come out in the
order that is cheapest:

- Keys: tokens are rows, coordinates are contracted. A word holds codes of one token. Queries are read in the
  order of `key_coordinate`.
- Values: coordinates are rows, tokens are contracted. Each byte of a word belongs to one of four tokens and
  holds codes of two or more coordinates: at 4 bits a register comes out as (token a: low nibble, high
  nibble; token b: low, high). Multiplied with weights that have zeros in between, it gives the coordinates
  of the low nibbles, and with the zeros the other way those of the high ones: tensor cores have time for
  twice the products, while every permutation of bytes would cost the pipe that is the busiest.

Codes become the int8 c of their level `step * (c + 1/2)` by `prmt`, which looks four bytes up in a table of
eight at once; tables of 16 and 32 magnitudes take two and four look-ups. Signs are `prmt`'s sign replication
and an XOR, since ~c is the negated level. The functions here run while a kernel is prepared.
"""

from dataclasses import dataclass

from turboquant_kernels.codebook import codebook
from turboquant_kernels.packing import PLANES


def level_table(bits: int, head_dim: int) -> tuple[int, ...]:
    """The int8 c of the levels, four in a 32-bit word: what `prmt` looks up.

    2 and 3 bits: by code. 4 to 6 bits: by magnitude, eight a pair of words. 8 bits: the code is c, no table.
    """
    if bits == 8:
        return ()
    grid = codebook(bits, head_dim).grid.tolist()
    entries = grid if bits <= 3 else grid[: len(grid) // 2]
    entries = entries + [0] * (-len(entries) % 8)
    words = [
        sum((c & 255) << 8 * i for i, c in enumerate(entries[at : at + 4]))
        for at in range(0, len(entries), 4)
    ]
    return tuple(word - (1 << 32) if word >> 31 else word for word in words)


def table_registers(bits: int) -> tuple[int, ...]:
    """Which words of the table stand in registers: the first of each pair. The second is an immediate."""
    return {2: (0,), 3: (0,), 4: (0,), 5: (0, 2), 6: (0, 2, 4, 6), 8: ()}[bits]


def key_coordinate(bits: int, register: int, byte: int) -> int:
    """Coordinate, within a lane's, that stands in a byte of a register of the key operand."""
    if bits in (2, 3):
        word, half, odd = register // 4, register // 2 % 2, register % 2
        return 16 * word + 8 * half + 2 * byte + odd
    return 4 * register + byte


@dataclass(frozen=True)
class Fragment:
    """Inline assembly from 32-bit tensors to int8 ones.

    Triton hands four elements to the assembly at once (`pack=4`): of each input, broadcast to four
    elements, four equal registers; of each output one register that holds four.
    """

    text: str
    constraints: str


class _Ptx:
    """Lines of PTX over 32-bit registers; each operation returns the register that holds its result."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.registers = 0

    def op(self, name: str, *operands: str | int) -> str:
        result = f"r{self.registers}"
        self.registers += 1
        self.lines.append(f"{name} {result}, {', '.join(map(str, operands))};")
        return result

    def shift(self, a: str, left: int) -> str:
        """a << left, to the right where left is negative."""
        if left == 0:
            return a
        return self.op("shl.b32", a, left) if left > 0 else self.op("shr.u32", a, -left)

    def upper_half(self, a: str, word_shift: str) -> str:
        """a >> 16 as a sum of products, on the pipe of multiplications."""
        return self.op("dp2a.lo.u32.u32", a, word_shift, 0)

    def mask(self, a: str, mask: int) -> str:
        return self.op("and.b32", a, f"0x{mask:08x}")

    def permute(self, a: str, b: str | int, selector: str) -> str:
        return self.op("prmt.b32", a, b, selector)

    def logic(self, a: str, b: str, c: str, table: int) -> str:
        """A bitwise function of three operands, by its truth table at a = 0xF0, b = 0xCC, c = 0xAA."""
        return self.op("lop3.b32", a, b, c, f"0x{table:02x}")

    def look_up(self, tables: list[tuple[str, int]], selector: str, choice: list[str]) -> str:
        """Table bytes by the selector nibbles in the low half of a word; masks choose among tables."""
        found = [self.permute(low, high, selector) for low, high in tables]
        for mask in choice:
            found = [self.logic(mask, found[i + 1], found[i], _SELECT) for i in range(0, len(found), 2)]
        return found[0]


WORD_SHIFT = 0x100
"""The factor that `upper_half` takes from a register: of an immediate ptxas would make a shift."""

_SELECT = (0xF0 & 0xCC) | (~0xF0 & 0xAA & 0xFF)
"""a ? b : c, bit by bit."""
_OR_MASKED = 0xF0 | (0xCC & 0xAA)
"""a | (b & c)."""


def fragment(bits: int, words: int, table: tuple[int, ...]) -> Fragment:
    """`words` words of the first plane to their operand registers.

    Inputs: the words, then a word for each further plane, then the table's words in registers and
    `WORD_SHIFT`. 8 bits: nothing to do, an empty text. Output register 8 / width * i ... hold word i. Keys:
    four coordinates of a token, see `key_coordinate`. Values of 2 to 4 bits: register 2 i + h at 4 bits, 4
    i + 2 h + odd at 2 and 3 bits, holds bytes 2 h and 2 h + 1 of the word, and of each the code in its low
    and in its high nibble (2 bits: with the bit of each nibble's `odd` code).
    """
    if bits == 8:
        return Fragment("", "")
    width, *further = PLANES[bits]
    outputs = words * 8 // width
    in_registers = table_registers(bits)
    count = words + len(further) + len(in_registers) + 1
    operands = [f"${outputs + 4 * i}" for i in range(count)]
    codes, planes = operands[:words], operands[words : words + len(further)]
    tables = [(operands[words + len(further) + i], table[at + 1]) for i, at in enumerate(in_registers)]
    word_shift = operands[-1]
    ptx = _Ptx()
    result: list[str] = []
    for index, word in enumerate(codes):
        if width == 2:
            selectors = []
            for odd in range(2):
                selector = ptx.mask(ptx.shift(word, -2 * odd), 0x33333333)
                if planes:
                    sign = ptx.shift(planes[0], 2 - (2 * index + odd))
                    selector = ptx.logic(selector, sign, "0x44444444", _OR_MASKED)
                selectors.append(selector)
            result += [ptx.look_up(tables, s, []) for s in selectors]
            result += [ptx.look_up(tables, ptx.upper_half(s, word_shift), []) for s in selectors]
        else:
            selector, shifted = ptx.mask(word, 0x77777777), ptx.shift(word, 4)
            for half in range(2):
                # Bit 3 of each of the half's four nibbles, replicated to a byte.
                masks = [ptx.permute(word, shifted, "0xbfae" if half else "0x9d8c")]
                for plane in planes:
                    bit = ptx.shift(plane, 7 - (2 * index + half))
                    masks.append(ptx.permute(bit, bit, "0xba98"))
                *choice, sign = masks
                nibbles = ptx.upper_half(selector, word_shift) if half else selector
                found = ptx.look_up(tables, nibbles, choice)
                result.append(ptx.op("xor.b32", found, sign))
    moves = [f"mov.b32 ${i}, {register};" for i, register in enumerate(result)]
    text = "\n".join(["{", f".reg .b32 r<{ptx.registers}>;", *ptx.lines, *moves, "}"])
    return Fragment(text, ",".join(["=&r"] * outputs + ["r"] * (4 * count)))
