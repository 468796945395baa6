"""The end of `store.encode_kernel`: codes in registers become bytes of pages, in the order of `packing`.

Functions of a tile take `page`, pointers [ROWS] to the pages of its tokens, `row`, int32 [ROWS], the tokens'
index in them (0..15), and `used`, bool [ROWS], false for padding, which is not written.
"""

import triton
import triton.language as tl

from turboquant_kernels.codebook import MAX_BITS

_MAX_BITS = tl.constexpr(MAX_BITS)


@triton.jit
def store_codes(page, row, used, t, magnitude, HEAD_DIM: tl.constexpr, CODES: tl.constexpr):
    """Packs codes into their planes and writes the tokens' rows. CODES: `encode_kernel.Codes`."""
    if CODES.bits == _MAX_BITS:
        code = tl.where(t < 0, ~magnitude, magnitude) & 0xFF
    else:
        code = tl.where(t < 0, magnitude | (1 << (CODES.bits - 1)), magnitude)
    coordinate = tl.arange(0, t.shape[1])
    for i in tl.static_range(len(CODES.planes)):
        part = (code >> CODES.planes[i][2]) & ((1 << CODES.planes[i][1]) - 1)
        if i == 0:
            shift = coordinate * CODES.planes[i][1] % 32
        else:
            shift = _high_bit_shift(coordinate, HEAD_DIM, CODES)
        words = _words(part, shift, CODES.planes[i][1])
        if CODES.quads:
            _store_quads(page + CODES.planes[i][0], row, used, words, HEAD_DIM * CODES.planes[i][1] // 8)
        else:
            _store_words(page + CODES.planes[i][0], row, used, words, HEAD_DIM * CODES.planes[i][1] // 8)


@triton.jit
def _high_bit_shift(coordinate, HEAD_DIM: tl.constexpr, CODES: tl.constexpr):
    """Which bit is a coordinate's in its 32-bit word of a high plane: `packing.high_bit_order`."""
    c = coordinate % 32
    if CODES.bits == 3:
        P: tl.constexpr = 4 * CODES.read_bytes
        return c // (2 * P) * (2 * P) + 4 * (c % P // 2) + 2 * (c // P % 2) + c % 2
    # The last 16 coordinates of head_dim 80 are a group of their own.
    spread = tl.where(coordinate < HEAD_DIM // 32 * 32, 8, 4)
    return spread * (c % 4) + c // 4


@triton.jit
def _words(part, shift, WIDTH: tl.constexpr):
    """Numbers of WIDTH bits [ROWS, n], each shifted to its bits, as words: int32 [ROWS, n * WIDTH / 32]."""
    shifted = part << shift[None, :]
    return tl.sum(tl.reshape(shifted, [part.shape[0], part.shape[1] * WIDTH // 32, 32 // WIDTH]), axis=2)


@triton.jit
def _store_words(plane, row, used, words, ROW_BYTES: tl.constexpr):
    """Writes words [ROWS, n] of the tokens' rows of a plane."""
    COUNT: tl.constexpr = words.shape[1]
    used = used[:, None]
    if ROW_BYTES % 4 == 0:
        word = tl.arange(0, COUNT)[None, :]
        target = plane.to(tl.pointer_type(tl.int32))[:, None] + row[:, None] * (ROW_BYTES // 4) + word
        tl.store(target, words, mask=used & (word < ROW_BYTES // 4))
    else:
        # 1-bit planes at head_dim 80 have rows of 10 bytes.
        halves = tl.reshape(tl.join(words, words >> 16), [words.shape[0], 2 * COUNT]).to(tl.int16)
        half = tl.arange(0, 2 * COUNT)[None, :]
        target = plane.to(tl.pointer_type(tl.int16))[:, None] + row[:, None] * (ROW_BYTES // 2) + half
        tl.store(target, halves, mask=used & (half < ROW_BYTES // 2))


@triton.jit
def _store_quads(plane, row, used, words, ROW_BYTES: tl.constexpr):
    """Writes words [ROWS, n] of the tokens' rows of a value plane, whose bytes alternate with those of three
    other tokens: byte j of token 8 * (b % 2) + 2 * quad + b // 2 is byte b of word j of the quad."""
    COUNT: tl.constexpr = words.shape[1]
    bytes = words[:, :, None] >> (8 * tl.arange(0, 4))[None, None, :]
    bytes = tl.reshape(bytes, [words.shape[0], 4 * COUNT]).to(tl.int8)
    quad, byte = row % 8 // 2, row // 8 + 2 * (row % 2)
    j = tl.arange(0, 4 * COUNT)[None, :]
    target = plane[:, None] + ((quad * ROW_BYTES)[:, None] + j) * 4 + byte[:, None]
    tl.store(target, bytes, mask=used[:, None] & (j < ROW_BYTES))


@triton.jit
def store_projected_signs(plane, row, used, residual, projection, HEAD_DIM: tl.constexpr):
    """Signs of the projected residual, a byte of them at a time; prod is not made to be fast."""
    k = tl.arange(0, residual.shape[1])[None, :]
    for byte in tl.range(HEAD_DIM // 8, num_stages=1):
        signs = tl.zeros_like(row)
        # Four at a time: eight products a vector, of 32 vectors at head_dim 80, would not fit the registers.
        for first in tl.static_range(0, 8, 4):
            i = first + tl.arange(0, 4)
            rows = tl.load(projection + (8 * byte + i[:, None]) * HEAD_DIM + k, mask=k < HEAD_DIM, other=0.0)
            projected = tl.sum(residual[:, None, :] * rows[None, :, :], axis=2)
            signs += tl.sum((projected < 0).to(tl.int32) << i[None, :], axis=1)
        tl.store(plane + row * (HEAD_DIM // 8) + byte, signs.to(tl.uint8), mask=used)
