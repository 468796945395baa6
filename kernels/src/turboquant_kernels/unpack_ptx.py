"""PTX that makes levels of codes by look-ups: a register of four bytes of codes to registers of four levels.

Each code of a byte gives a register of its own, by byte permutation used as a look-up in a table of eight
bytes. Nothing is shuffled: results are put beside each other as they come (`unpack.coordinate` says in which
order). The Hopper kernel has PTX of its own, for its operands: `decode.hopper.fragments`.
"""

from collections.abc import Sequence

import torch

from turboquant_kernels.codebook import codebook

_SIGNS = "0xba98"
"""prmt selector: the top bit of each byte, eight times."""
_EVEN, _ODD = "0x6420", "0x7531"
"""prmt selectors: even or odd bytes of two registers."""
_EVEN_HALVES, _ODD_HALVES = "0x6240", "0x7351"
"""prmt selectors: bytes 0, 2 or 1, 3 of the first register as low bytes, of the second as high bytes."""


def levels_ptx(bits: int, head_dim: int, *, bf16: bool) -> str:
    """PTX for `unpack.load_keys` and `load_values`, an empty string where they take the plain way.

    Inputs are registers of four bytes of codes, outputs registers of four int8 or pairs of bf16. 5 and 6 bits
    (keys) need whole groups of 32 coordinates.
    """
    if bits == 8:
        return _eight_bits() if bf16 else ""
    if bits in (5, 6):
        return "" if bf16 or head_dim % 32 else _planes_of_words(bits, head_dim)
    magnitudes = codebook(bits, head_dim).magnitudes.tolist()
    if bits == 4:
        return _four_bits_bf16(magnitudes) if bf16 else _four_bits(magnitudes)
    return _small(bits, codebook(bits, head_dim).grid.tolist(), bf16=bf16)


def _table(entries: Sequence[int]) -> tuple[str, str]:
    """Up to eight bytes as the two table operands of prmt."""
    words = torch.tensor([*entries, *[0] * (8 - len(entries))]).to(torch.uint8).view(torch.int32).tolist()
    return f"0x{words[0] & 0xFFFFFFFF:08x}", f"0x{words[1] & 0xFFFFFFFF:08x}"


def _tables_bf16(grid: Sequence[int]) -> tuple[tuple[str, str], tuple[str, str]]:
    """Tables of the low and of the high bytes of bf16(c + 1/2)."""
    halves = (torch.tensor(grid) + 0.5).bfloat16().view(torch.uint8).tolist()
    return _table(halves[0::2]), _table(halves[1::2])


def _block(registers: str, *lines: str) -> str:
    return "\n".join(["{", f".reg .b32 {registers};", *lines, "}"])


def _four_bits(magnitudes: Sequence[int]) -> str:
    """$2 -> $0, $1: int8 of the low and the high nibbles. Three bits of magnitude below the sign."""
    low, high = _table(magnitudes)
    return _block(
        "t, x, y, m",
        "and.b32 t, $2, 0x77777777;",
        f"prmt.b32 x, {low}, {high}, t;",
        "shr.u32 t, t, 16;",
        f"prmt.b32 y, {low}, {high}, t;",
        f"prmt.b32 m, $2, $2, {_SIGNS};",
        f"prmt.b32 t, x, y, {_ODD};",
        "xor.b32 $1, t, m;",
        "shl.b32 t, $2, 4;",
        f"prmt.b32 m, t, t, {_SIGNS};",
        f"prmt.b32 t, x, y, {_EVEN};",
        "xor.b32 $0, t, m;",
    )


def _four_bits_bf16(magnitudes: Sequence[int]) -> str:
    """$4 -> $0, $1 and $2, $3: bf16 of the low and the high nibbles."""
    (low0, low1), (high0, high1) = _tables_bf16(magnitudes)
    return _block(
        "t, u, s, lx, ly, hx, hy, l, h",
        "and.b32 t, $4, 0x77777777;",
        "shr.u32 u, t, 16;",
        f"prmt.b32 lx, {low0}, {low1}, t;",
        f"prmt.b32 ly, {low0}, {low1}, u;",
        f"prmt.b32 hx, {high0}, {high1}, t;",
        f"prmt.b32 hy, {high0}, {high1}, u;",
        f"prmt.b32 l, lx, ly, {_ODD};",
        f"prmt.b32 h, hx, hy, {_ODD};",
        "and.b32 s, $4, 0x80808080;",
        "xor.b32 h, h, s;",
        "prmt.b32 $2, l, h, 0x5140;",
        "prmt.b32 $3, l, h, 0x7362;",
        f"prmt.b32 l, lx, ly, {_EVEN};",
        f"prmt.b32 h, hx, hy, {_EVEN};",
        "shl.b32 s, $4, 4;",
        "and.b32 s, s, 0x80808080;",
        "xor.b32 h, h, s;",
        "prmt.b32 $0, l, h, 0x5140;",
        "prmt.b32 $1, l, h, 0x7362;",
    )


def _small(bits: int, grid: Sequence[int], *, bf16: bool) -> str:
    """2 bits: one input, four outputs, coordinates 0..3 of a byte. 3 bits: two inputs of the first plane and
    one of signs, eight outputs (word x, nibble k, coordinate s). The table has all levels, by code."""
    words = 2 if bits == 3 else 1
    width = 2 if bf16 else 1
    outputs = 4 * words * width
    tables = _tables_bf16(grid) if bf16 else (_table(grid),)
    lines = []
    for x in range(words):
        for s in range(2):
            lines.append(f"shr.u32 a, ${outputs + x}, {2 * s};")
            lines.append("and.b32 a, a, 0x33333333;")
            if bits == 3:
                shift = 2 - 2 * x - s
                direction = "shl.b32" if shift >= 0 else "shr.u32"
                lines.append(f"{direction} b, ${outputs + 2}, {abs(shift)};")
                lines += ["and.b32 b, b, 0x44444444;", "or.b32 a, a, b;"]
            lines.append("shr.u32 b, a, 16;")
            for name, (first, second) in zip("lh", tables, strict=False):
                lines.append(f"prmt.b32 {name}x, {first}, {second}, a;")
                lines.append(f"prmt.b32 {name}y, {first}, {second}, b;")
            for k in range(2):
                output = width * (4 * x + 2 * k + s)
                if bf16:
                    selector = (_EVEN_HALVES, _ODD_HALVES)[k]
                    lines.append(f"prmt.b32 ${output}, lx, hx, {selector};")
                    lines.append(f"prmt.b32 ${output + 1}, ly, hy, {selector};")
                else:
                    lines.append(f"prmt.b32 ${output}, lx, ly, {(_EVEN, _ODD)[k]};")
    return _block("a, b, lx, ly, hx, hy", *lines)


def _planes_of_words(bits: int, head_dim: int) -> str:
    """5 bits: $8..$11 nibbles of 32 coordinates, $12 signs -> $0..$7, four coordinates from 4 * rho on each.
    6 bits: $12 is the fifth bit of the magnitudes, $13 the signs.

    prmt repeats the top bit of a table's byte, here zero, where a selector's nibble is 8 or more; so of two
    look-ups, the second by the selector with those bits flipped, the one that does not apply gives zeros.
    """
    magnitudes = codebook(bits, head_dim).magnitudes.tolist()
    tables = [_table(magnitudes[at : at + 8]) for at in range(0, len(magnitudes), 8)]
    signs = f"${7 + bits}"
    lines = []
    for word in range(4):
        for half in range(2):
            rho = 2 * word + half
            lines.append(f"shr.u32 a, ${8 + word}, {16 * half};")
            lines.append("xor.b32 b, a, 0x88888888;")
            for name, pair in zip(("x", "y"), (tables[0:2], tables[2:4]), strict=True):
                if pair:
                    lines.append(f"prmt.b32 {name}, {pair[0][0]}, {pair[0][1]}, a;")
                    lines.append(f"prmt.b32 c, {pair[1][0]}, {pair[1][1]}, b;")
                    lines.append(f"or.b32 {name}, {name}, c;")
            if bits == 6:
                lines.append(f"shl.b32 c, $12, {7 - rho};")
                lines.append(f"prmt.b32 c, c, c, {_SIGNS};")
                lines.append("lop3.b32 x, c, y, x, 0xca;")
            lines.append(f"shl.b32 c, {signs}, {7 - rho};")
            lines.append(f"prmt.b32 c, c, c, {_SIGNS};")
            lines.append(f"xor.b32 ${rho}, x, c;")
    return _block("a, b, c, x, y", *lines)


def _eight_bits() -> str:
    """$2 -> $0, $1: int8 c to bf16 c + 1/2. 0x43.. with 7 bits of magnitude in the mantissa is 128 + c."""
    lines = [f"prmt.b32 m, $2, $2, {_SIGNS};", "xor.b32 m, m, $2;"]
    for output, (magnitude, sign) in enumerate((("0x4140", "0x1404"), ("0x4342", "0x3424"))):
        lines += [
            f"prmt.b32 x, m, 0x43434343, {magnitude};",
            "fma.rn.bf16x2 x, x, one, offset;",
            f"prmt.b32 s, $2, 0, {sign};",
            "and.b32 s, s, 0x80008000;",
            f"xor.b32 ${output}, x, s;",
        ]
    return _block("m, x, s, one, offset", "mov.b32 one, 0x3f803f80;", "mov.b32 offset, 0xc2ffc2ff;", *lines)
