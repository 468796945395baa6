"""Codes of a page to levels, in Triton: what portable decode and the expansion of prefill have in common.

Keys come as a tile of tokens by coordinates, the int8 c of each level `step * (c + 1/2)`
(`turboquant_kernels.codebook`). Values come as a tile of coordinates by tokens, c + 1/2, in bf16, which holds
every level exactly. There are two ways to the same tiles:

- PTX (`levels_ptx`): a register of four bytes of codes becomes registers of four levels, one for each code of
  a byte, by byte permutation used as a look-up in a table of eight bytes. Nothing is shuffled: results are
  put beside each other as they come, so coordinates stand in an order of their own (`coordinate`). Decode
  reads queries and writes results in that order; `natural` undoes it.
- Plain Triton, where that PTX does not reach: a table in memory, one byte load for each code and plane. This
  is what Triton's interpreter runs.

The four bytes of a register are neighbouring bytes of one token's key, or the same byte of four tokens'
values (`packing`): a value tile is ready to be summed over tokens. Its tokens stand in the order of their
bytes; `token_of` says which one, and who multiplies the two tiles reads keys in the same order.
"""

from collections.abc import Sequence
from functools import cache

import torch
import triton
import triton.language as tl

from turboquant_kernels.codebook import codebook

_SIGNS = "0xba98"
"""prmt selector: the top bit of each byte, eight times."""
_EVEN, _ODD = "0x6420", "0x7531"
"""prmt selectors: even or odd bytes of two registers."""
_EVEN_HALVES, _ODD_HALVES = "0x6240", "0x7351"
"""prmt selectors: bytes 0, 2 or 1, 3 of the first register as low bytes, of the second as high bytes."""


@cache
def level_table(bits: int, head_dim: int, device: torch.device) -> torch.Tensor:
    """The int8 c of each code, int8 [2**bits], on a device."""
    return codebook(bits, head_dim).grid.to(device)


def levels_ptx(bits: int, head_dim: int, *, bf16: bool) -> str:
    """PTX for `load_levels`, an empty string where it has none: then it takes the plain way.

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


@triton.jit
def _beside(a, b):
    """[T, N], [T, N] -> [T, 2 * N]."""
    return tl.reshape(tl.permute(tl.join(a, b), (0, 2, 1)), (a.shape[0], 2 * a.shape[1]))


@triton.jit
def _above(a, b):
    """[N, T], [N, T] -> [2 * N, T]."""
    return tl.reshape(tl.permute(tl.join(a, b), (2, 0, 1)), (2 * a.shape[0], a.shape[1]))


@triton.jit
def _coordinates_first(quads):
    """[T / 4, N, 4] -> [N, T]."""
    return tl.reshape(tl.permute(quads, (1, 0, 2)), (quads.shape[1], 4 * quads.shape[0]))


@triton.jit
def token_of(slot):
    """The token, within a page, whose values stand at a place in their byte order: both 0..15."""
    return slot % 2 * 8 + slot // 4 * 2 + slot % 4 // 2


@triton.jit
def coordinate(place, BITS: tl.constexpr, PTX: tl.constexpr, READ: tl.constexpr, WIDTH: tl.constexpr):
    """The coordinate at a place of a tile's coordinate dimension; head_dim or more for padding.

    READ: `packing.CodeOrder.read_bytes`. WIDTH: length of the dimension, a power of two.
    """
    if PTX == "" or BITS == 8:
        found = place
    elif BITS == 4:
        found = place % (WIDTH // 2) * 2 + place // (WIDTH // 2)
    elif BITS == 2:
        found = place % (WIDTH // 4) * 4 + place // (WIDTH // 4)
    else:
        byte, output = place % (WIDTH // 8), place // (WIDTH // 8)
        if BITS == 3:
            found = byte // READ * (8 * READ) + byte % READ * 4 + output // 4 * (4 * READ) + output % 4
        else:
            found = byte // 4 * 32 + output * 4 + byte % 4
    return found


@triton.jit
def natural(tile, BITS: tl.constexpr, PTX: tl.constexpr, READ: tl.constexpr):
    """A tile [T, WIDTH] with its columns in the order of coordinates."""
    T: tl.constexpr = tile.shape[0]
    WIDTH: tl.constexpr = tile.shape[1]
    if PTX == "" or BITS == 8:
        ordered = tile
    elif BITS == 3:
        parts = tl.reshape(tile, (T, 2, 4, WIDTH // (8 * READ), READ))
        ordered = tl.reshape(tl.permute(parts, (0, 3, 1, 4, 2)), (T, WIDTH))
    elif BITS == 5 or BITS == 6:
        parts = tl.reshape(tile, (T, 8, WIDTH // 32, 4))
        ordered = tl.reshape(tl.permute(parts, (0, 2, 1, 3)), (T, WIDTH))
    else:
        parts = tl.reshape(tile, (T, 8 // BITS, WIDTH * BITS // 8))
        ordered = tl.reshape(tl.permute(parts, (0, 2, 1)), (T, WIDTH))
    return ordered


@triton.jit
def _bit_position(coord, BITS: tl.constexpr, HEAD_DIM: tl.constexpr, READ: tl.constexpr):
    """Where in a row of one of the 1-bit planes of 3, 5 or 6 bits a coordinate stands."""
    if BITS == 3:
        within = coord % (8 * READ)
        position = coord - within + within % (4 * READ) // 2 * 4 + within // (4 * READ) * 2 + within % 2
    else:
        group = coord // 32 * 32
        stride = tl.where(group + 32 <= HEAD_DIM, 8, 4)
        position = group + coord % 4 * stride + (coord - group) // 4
    return position


@triton.jit
def load_bits(plane, position, seen, BITS: tl.constexpr, STRIDE: tl.constexpr):
    """Fields of BITS bits: pointers to rows with bytes STRIDE apart, positions of fields, a mask -> int32.

    The three are broadcast to each other: [T, 1], [1, N], [1, N] give [T, N].
    """
    bit = position * BITS
    byte = tl.load(plane + bit // 8 * STRIDE, mask=seen, other=0).to(tl.int32)
    return (byte >> (bit % 8)) & ((1 << BITS) - 1)


@triton.jit
def _load_codes(
    page,
    row,
    coord,
    BITS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    READ: tl.constexpr,
    STRIDE: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
):
    """Codes of coordinates, int32: the plain way. `row` counts rows, or bytes where rows interleave."""
    FIRST: tl.constexpr = 4 if BITS == 5 or BITS == 6 else (2 if BITS == 3 else BITS)
    seen = coord < HEAD_DIM
    whole, part = row // STRIDE * STRIDE, row % STRIDE
    codes = load_bits(page + whole * (HEAD_DIM * FIRST // 8) + part, coord, seen, FIRST, STRIDE)
    if BITS > FIRST:
        position = _bit_position(coord, BITS, HEAD_DIM, READ)
        for bit in tl.static_range(FIRST, BITS):
            plane = page + PAGE_TOKENS * HEAD_DIM * bit // 8 + whole * (HEAD_DIM // 8) + part
            codes |= load_bits(plane, position, seen, 1, STRIDE) << bit
    return codes


@triton.jit
def load_keys(
    page,
    token,
    table,
    BITS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    READ: tl.constexpr,
    PTX: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
):
    """int8 [T, WIDTH]: c of the keys' levels, padding with any of them.

    page: pointers [T, 1] to the first byte of the tokens' pages. token: int [T, 1], their places in them.
    table: pointer to `level_table`.
    """
    if BITS == 8:
        byte = tl.arange(0, WIDTH)[None, :]
        codes = tl.load(page + token * HEAD_DIM + byte, mask=byte < HEAD_DIM, other=0)
        keys = codes.to(tl.int8, bitcast=True)
    elif PTX == "":
        coord = tl.arange(0, WIDTH)[None, :]
        keys = tl.load(table + _load_codes(page, token, coord, BITS, HEAD_DIM, READ, 1, PAGE_TOKENS))
    elif BITS == 2 or BITS == 4:
        ROW: tl.constexpr = HEAD_DIM * BITS // 8
        byte = tl.arange(0, WIDTH * BITS // 8)[None, :]
        codes = tl.load(page + token * ROW + byte, mask=byte < ROW, other=0)
        if BITS == 4:
            a, b = tl.inline_asm_elementwise(
                PTX, "=&r,=&r,r", (codes,), dtype=(tl.int8,) * 2, is_pure=True, pack=4
            )
            keys = _beside(a, b)
        else:
            a, b, c, d = tl.inline_asm_elementwise(
                PTX, "=&r," * 4 + "r", (codes,), dtype=(tl.int8,) * 4, is_pure=True, pack=4
            )
            keys = _beside(_beside(a, b), _beside(c, d))
    else:
        # Each thread takes a word of every plane, in one layout. Had it a whole row, Triton would take the
        # tile for a transposed one and move it byte by byte. (In a function of its own the hints get lost.)
        byte = tl.arange(0, WIDTH // 8)[None, :]
        SIGN_ROW: tl.constexpr = HEAD_DIM // 8
        FIRST_ROW: tl.constexpr = HEAD_DIM // 4 if BITS == 3 else HEAD_DIM // 2
        seen = byte < SIGN_ROW
        plane = page + PAGE_TOKENS * FIRST_ROW + tl.max_contiguous(token * SIGN_ROW + byte, [1, 4])
        p0 = tl.load(plane, mask=seen, other=0)
        if BITS == 3:
            word = tl.max_contiguous(byte // READ * (2 * READ) + byte % READ, [1, READ])
            word = page + token * FIRST_ROW + tl.multiple_of(word, [1, READ])
            w0 = tl.load(word, mask=seen, other=0)
            w1 = tl.load(word + READ, mask=seen, other=0)
            a, b, c, d, e, f, g, h = tl.inline_asm_elementwise(
                PTX,
                "=&r," * 8 + "r,r,r",
                (w0, w1, p0),
                dtype=(tl.int8,) * 8,
                is_pure=True,
                pack=4,
            )
        else:
            # Not byte by byte: the assembly relies on a register holding the four bytes of a word.
            word = tl.max_contiguous(byte // 4 * 16 + byte % 4, [1, 4])
            word = page + token * FIRST_ROW + tl.multiple_of(word, [1, 4])
            w0 = tl.load(word, mask=seen, other=0)
            w1 = tl.load(word + 4, mask=seen, other=0)
            w2 = tl.load(word + 8, mask=seen, other=0)
            w3 = tl.load(word + 12, mask=seen, other=0)
            if BITS == 5:
                a, b, c, d, e, f, g, h = tl.inline_asm_elementwise(
                    PTX,
                    "=&r," * 8 + "r,r,r,r,r",
                    (w0, w1, w2, w3, p0),
                    dtype=(tl.int8,) * 8,
                    is_pure=True,
                    pack=4,
                )
            else:
                p1 = tl.load(plane + PAGE_TOKENS * SIGN_ROW, mask=seen, other=0)
                a, b, c, d, e, f, g, h = tl.inline_asm_elementwise(
                    PTX,
                    "=&r," * 8 + "r,r,r,r,r,r",
                    (w0, w1, w2, w3, p0, p1),
                    dtype=(tl.int8,) * 8,
                    is_pure=True,
                    pack=4,
                )
        keys = _beside(_beside(_beside(a, b), _beside(c, d)), _beside(_beside(e, f), _beside(g, h)))
    return keys


@triton.jit
def load_values(
    page,
    quad_page,
    table,
    BITS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    PTX: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    OUT: tl.constexpr,
):
    """OUT [WIDTH, T]: the values' levels in steps, c + 1/2, padding with any of them.

    T tokens of whole pages in the order of `token_of`. page: pointers [T] to the first byte of the values in
    the tokens' pages; quad_page: [T / 4], of every fourth one. table: as `load_keys` takes it.
    """
    QUADS: tl.constexpr = quad_page.shape[0]
    if PTX == "":
        coord = tl.arange(0, WIDTH)[:, None]
        slot = (tl.arange(0, 4 * QUADS) % PAGE_TOKENS)[None, :]
        codes = _load_codes(page[None, :], slot, coord, BITS, HEAD_DIM, 1, 4, PAGE_TOKENS)
        values = (tl.load(table + codes).to(tl.float32) + 0.5).to(OUT)
    else:
        quad = (tl.arange(0, QUADS) % (PAGE_TOKENS // 4))[:, None]
        FIRST: tl.constexpr = 2 if BITS == 3 else BITS
        ROW: tl.constexpr = 4 * HEAD_DIM * FIRST // 8
        COLUMNS: tl.constexpr = WIDTH * FIRST // 8
        byte = tl.arange(0, 4 * COLUMNS)[None, :]
        first = tl.load(quad_page[:, None] + quad * ROW + byte, mask=byte < ROW, other=0)
        if BITS == 8:
            codes = tl.reshape(first, (QUADS, COLUMNS, 4))
            a = tl.inline_asm_elementwise(PTX, "=&r,=&r,r", (codes,), dtype=tl.bfloat16, is_pure=True, pack=4)
            values = _coordinates_first(a)
        elif BITS == 4:
            codes = tl.reshape(first, (QUADS, COLUMNS, 4))
            a, b = tl.inline_asm_elementwise(
                PTX,
                "=&r," * 4 + "r",
                (codes,),
                dtype=(tl.bfloat16,) * 2,
                is_pure=True,
                pack=4,
            )
            values = _above(_coordinates_first(a), _coordinates_first(b))
        elif BITS == 2:
            codes = tl.reshape(first, (QUADS, COLUMNS, 4))
            a, b, c, d = tl.inline_asm_elementwise(
                PTX,
                "=&r," * 8 + "r",
                (codes,),
                dtype=(tl.bfloat16,) * 4,
                is_pure=True,
                pack=4,
            )
            low = _above(_coordinates_first(a), _coordinates_first(b))
            values = _above(low, _above(_coordinates_first(c), _coordinates_first(d)))
        else:
            SIGN_ROW: tl.constexpr = 4 * HEAD_DIM // 8
            sign = tl.arange(0, WIDTH // 2)[None, :]
            plane = quad_page[:, None] + PAGE_TOKENS * HEAD_DIM // 4
            signs = tl.load(plane + quad * SIGN_ROW + sign, mask=sign < SIGN_ROW, other=0)
            pairs = tl.permute(tl.reshape(first, (QUADS, COLUMNS // 2, 2, 4)), (0, 1, 3, 2))
            w0, w1 = tl.split(pairs)
            a, b, c, d, e, f, g, h = tl.inline_asm_elementwise(
                PTX,
                "=&r," * 16 + "r,r,r",
                (w0, w1, tl.reshape(signs, (QUADS, WIDTH // 8, 4))),
                dtype=(tl.bfloat16,) * 8,
                is_pure=True,
                pack=4,
            )
            low = _above(_coordinates_first(a), _coordinates_first(b))
            low = _above(low, _above(_coordinates_first(c), _coordinates_first(d)))
            high = _above(_coordinates_first(e), _coordinates_first(f))
            values = _above(low, _above(high, _above(_coordinates_first(g), _coordinates_first(h))))
    return values
