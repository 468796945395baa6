"""Codes of a page to levels, in Triton: what portable decode and the expansion of prefill have in common.

Keys come as a tile of tokens by coordinates, the int8 c of each level `step * (c + 1/2)`
(`turboquant_kernels.codebook`). Values come as a tile of coordinates by tokens, c + 1/2, in bf16, which holds
every level exactly. There are two ways to the same tiles:

- PTX (`unpack_ptx`): a register of four bytes of codes becomes registers of four levels, one for each code of
  a byte. Results are put beside each other as they come, so coordinates stand in an order of their own
  (`coordinate`). Decode reads queries and writes results in that order; `natural` undoes it.
- Plain Triton, where that PTX does not reach: a table in memory, one byte load for each code and plane. This
  is what Triton's interpreter runs.

The four bytes of a register are neighbouring bytes of one token's key, or the same byte of four tokens'
values (`packing`): a value tile is ready to be summed over tokens. Its tokens stand in the order of their
bytes; `token_of` says which one, and who multiplies the two tiles reads keys in the same order.
"""

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl

from turboquant_kernels.codebook import codebook
from turboquant_kernels.formats import BLOCK_TOKENS, PAGE_TOKENS, SCALE_BYTES, KVFormat
from turboquant_kernels.packing import key_order, page_layout
from turboquant_kernels.unpack_ptx import levels_ptx


@cache
def level_table(bits: int, head_dim: int, device: torch.device) -> torch.Tensor:
    """The int8 c of each code, int8 [2**bits], on a device."""
    return codebook(bits, head_dim).grid.to(device)


def page_constants(fmt: KVFormat, head_dim: int, kv_heads: int, block_size: int) -> dict[str, Any]:
    """What kernels that read pages are specialized to: the layout of a page, and how codes are unpacked."""
    layout = page_layout(fmt, head_dim)
    interpreted = triton.knobs.runtime.interpret
    return {
        "HEAD_DIM": head_dim,
        "WIDTH": triton.next_power_of_2(head_dim),
        "KV_HEADS": kv_heads,
        "BLOCK_PAGES": block_size // PAGE_TOKENS,
        "PAGE_TOKENS": PAGE_TOKENS,
        "BLOCK_TOKENS": BLOCK_TOKENS,
        "PAGE_BYTES": layout.page_bytes,
        "KEY_BITS": fmt.key_code_bits,
        "VALUE_BITS": fmt.value_bits,
        "VALUE_OFFSET": layout.value_planes[0].offset,
        "SIGNS_OFFSET": layout.key_residual_signs.offset if layout.key_residual_signs else 0,
        "SCALES_OFFSET": layout.scales.offset,
        "SCALES": layout.scales.token_bytes // SCALE_BYTES,
        "KEY_READ": key_order(fmt, head_dim).read_bytes,
        "KEY_PTX": "" if interpreted else levels_ptx(fmt.key_code_bits, head_dim, bf16=False),
        "VALUE_PTX": "" if interpreted else levels_ptx(fmt.value_bits, head_dim, bf16=True),
    }


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
    """The token, within a page, whose values have an index in their byte order: both 0..15."""
    return slot % 2 * 8 + slot // 4 * 2 + slot % 4 // 2


@triton.jit
def coordinate(index, BITS: tl.constexpr, PTX: tl.constexpr, READ: tl.constexpr, WIDTH: tl.constexpr):
    """The coordinate at an index of a tile's coordinate dimension; head_dim or more for padding.

    READ: `packing.CodeOrder.read_bytes`. WIDTH: length of the dimension, a power of two.
    """
    if PTX == "" or BITS == 8:
        found = index
    elif BITS == 4:
        found = index % (WIDTH // 2) * 2 + index // (WIDTH // 2)
    elif BITS == 2:
        found = index % (WIDTH // 4) * 4 + index // (WIDTH // 4)
    else:
        byte, output = index % (WIDTH // 8), index // (WIDTH // 8)
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

    page: pointers [T, 1] to the first byte of the tokens' pages. token: int [T, 1], their index in them.
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
