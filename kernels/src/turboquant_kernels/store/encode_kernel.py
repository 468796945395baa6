"""What the kernels that store have in common: vectors in registers become codes and scales in pages.

    tile = load_vectors(...)            keys, less their anchor if they have one, or values
    encoded = encode(tile, signs, ...)  rotated, normalized, quantized
    write_keys(page, row, used, encoded, ...)

The same bytes as `store.reference` up to float32 rounding. Between load and store everything is in registers.
"""

from functools import cache
from itertools import accumulate
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from turboquant_kernels.codebook import MAX_BITS, codebook
from turboquant_kernels.codec import MAX_SCALE
from turboquant_kernels.formats import PAGE_TOKENS, SCALE_BYTES, KVFormat
from turboquant_kernels.packing import (
    KEY_RESIDUAL_NORM,
    KEY_SCALE,
    VALUE_SCALE,
    CodeOrder,
    Region,
    key_order,
    page_layout,
    value_order,
)
from turboquant_kernels.rotation_kernel import (
    factors,
    hadamard_product,
    load_signs,
    take_out_exponent,
    tile_rows,
)
from turboquant_kernels.store.pack_kernel import store_codes, store_projected_signs

NUM_WARPS = 4

# What the kernels' functions take from other modules.
_MAX_BITS = tl.constexpr(MAX_BITS)
_MAX_SCALE = tl.constexpr(MAX_SCALE)
_TINY = tl.constexpr(torch.finfo(torch.float32).tiny)
_PAGE_TOKENS = tl.constexpr(PAGE_TOKENS)
_KEY_SCALE = tl.constexpr(KEY_SCALE)
_VALUE_SCALE = tl.constexpr(VALUE_SCALE)
_KEY_RESIDUAL_NORM = tl.constexpr(KEY_RESIDUAL_NORM)


class Codes(NamedTuple):
    """How codes are made and where they go, as a kernel parameter."""

    bits: int
    half_step: float
    """Half the distance of the codebook's grid points: coordinates in half steps have whole boundaries."""
    levels: tuple[int, ...]
    """Positive levels in half steps, 2 c + 1, ascending."""
    planes: tuple[tuple[int, int, int], ...]
    """(offset in the page, width, first bit of the code) of each bit plane."""
    read_bytes: int
    """`CodeOrder.read_bytes`: the order of the high bits."""
    quads: bool
    """`Region.quads`: the bytes of four tokens alternate."""


class Specialization(NamedTuple):
    """Constants of the kernels that store a format. Every function of theirs has it as `SPEC`."""

    D: int
    """Coordinates of a vector."""
    INNER: int
    """`rotation_kernel.Factors.inner`."""
    NEGATIVE: tuple[int, ...]
    ROWS: int
    """Tokens of a tile: what a program holds in registers at a time."""
    KEY: Codes
    VALUE: Codes
    PROD: bool
    RESIDUAL_SIGNS: int
    """Their offset in the page; of `PROD` alone."""
    SCALES: int
    """Their offset in the page."""
    SCALES_PER_TOKEN: int
    SLOT_BYTES: int
    ANCHOR: bool


@cache
def specialization(fmt: KVFormat, head_dim: int) -> Specialization:
    """What the kernels are specialized to for a format."""
    layout = page_layout(fmt, head_dim)
    hadamard = factors(head_dim)
    signs = layout.key_residual_signs
    return Specialization(
        D=head_dim,
        INNER=hadamard.inner,
        NEGATIVE=hadamard.negative,
        ROWS=tile_rows(head_dim, NUM_WARPS),
        KEY=_codes(layout.key_planes, key_order(fmt, head_dim)),
        VALUE=_codes(layout.value_planes, value_order(fmt, head_dim)),
        PROD=signs is not None,
        RESIDUAL_SIGNS=signs.offset if signs else 0,
        SCALES=layout.scales.offset,
        SCALES_PER_TOKEN=fmt.scale_bytes // SCALE_BYTES,
        SLOT_BYTES=fmt.slot_bytes(head_dim),
        ANCHOR=fmt.anchor,
    )


def _codes(regions: tuple[Region, ...], order: CodeOrder) -> Codes:
    """The `Codes` of keys or of values, whose planes are these regions of a page."""
    book = codebook(order.bits, order.head_dim)
    offsets = [region.offset for region in regions]
    first_bits = accumulate(order.widths[:-1], initial=0)
    return Codes(
        bits=order.bits,
        half_step=book.step / 2,
        levels=tuple(2 * c + 1 for c in book.magnitudes.tolist()),
        planes=tuple(zip(offsets, order.widths, first_bits, strict=True)),
        read_bytes=order.read_bytes,
        quads=regions[0].quads,
    )


@triton.jit
def page_of(block, offset, head, kv_heads, SPEC: tl.constexpr):
    """Pointers to the pages of tokens, by those to their blocks and the tokens' offsets in them, and the
    tokens' rows in the pages, int32."""
    page = (offset // _PAGE_TOKENS).to(tl.int32) * kv_heads + head
    return block + page * (_PAGE_TOKENS * SPEC.SLOT_BYTES), (offset % _PAGE_TOKENS).to(tl.int32)


@triton.jit
def encode(tile, signs, SPEC: tl.constexpr, CODES: tl.constexpr):
    """Vectors, float32 as `load_vectors` has them, encoded as keys or values (CODES): a tuple of

    coordinates in half steps, [ROWS, n]; ranks and levels, [ROWS, n]; the RMS of the vectors as two factors,
    [ROWS].
    """
    signs_tile = load_signs(signs, tile.shape[0], SPEC.D, SPEC.INNER)
    tile, factor, _ = take_out_exponent(tile)
    rotated = hadamard_product(tile * signs_tile, SPEC.D, SPEC.INNER, SPEC.NEGATIVE)
    t, rms = _normalize(rotated, SPEC.D, CODES)
    rank, level = _quantize(t, CODES)
    return t, rank, level, rms, factor


@triton.jit
def write_keys(page, row, used, encoded, projection, SPEC: tl.constexpr):
    """Writes encoded keys into their pages. page, row: `page_of`; used: bool [ROWS]; projection: float32
    [D, D] for prod, else None."""
    t, rank, level, rms, factor = encoded
    store_codes(page, row, used, t, rank, SPEC.D, SPEC.KEY)
    scales = (page + SPEC.SCALES).to(tl.pointer_type(tl.float16)) + row * SPEC.SCALES_PER_TOKEN
    if SPEC.PROD:
        scale, residual = _least_squares(t, level, rms * factor, SPEC.D)
        norm = tl.sqrt(tl.sum(residual * residual, axis=1)) * SPEC.KEY.half_step * (rms * factor)
        tl.store(scales + _KEY_SCALE, scale, mask=used)
        tl.store(scales + _KEY_RESIDUAL_NORM, _half(norm), mask=used)
        store_projected_signs(page + SPEC.RESIDUAL_SIGNS, row, used, residual, projection, SPEC.D)
    else:
        scale = _half(_unbiased_scale(t, level, rms, SPEC.D, SPEC.KEY) * factor)
        tl.store(scales + _KEY_SCALE, scale, mask=used)


@triton.jit
def write_values(page, row, used, encoded, SPEC: tl.constexpr):
    """Writes encoded values into their pages, as `write_keys`."""
    t, rank, level, rms, factor = encoded
    store_codes(page, row, used, t, rank, SPEC.D, SPEC.VALUE)
    scales = (page + SPEC.SCALES).to(tl.pointer_type(tl.float16)) + row * SPEC.SCALES_PER_TOKEN
    scale = _half(_unbiased_scale(t, level, rms, SPEC.D, SPEC.VALUE) * factor)
    tl.store(scales + _VALUE_SCALE, scale, mask=used)


@triton.jit
def _normalize(rotated, HEAD_DIM: tl.constexpr, CODES: tl.constexpr):
    """H x -> coordinates of RMS 1, in half steps of the codebook's grid, and the RMS of H x / sqrt(D)."""
    norm = tl.sqrt(tl.sum(rotated * rotated, axis=1))
    # A vector is zero or, since its largest coordinate was made at least 2, far longer than 1.
    factor = (HEAD_DIM**0.5 / CODES.half_step) / tl.maximum(norm, 1.0)
    return rotated * factor[:, None], norm * (1 / HEAD_DIM)


@triton.jit
def _quantize(t, CODES: tl.constexpr):
    """The rank of the level nearest to |t| among the positive ones, int32, and the level, float32.

    Both t and levels in half steps, where levels are odd numbers and the boundaries between them whole ones.
    """
    size = tl.abs(t)
    if CODES.bits == _MAX_BITS:
        # Each grid point is a level.
        rank = tl.minimum(tl.maximum(tl.ceil(size * 0.5) - 1, 0), 127).to(tl.int32)
        return rank, (2 * rank + 1).to(tl.float32)
    # The last boundary below decides: it selects both, the level times 256 plus its rank.
    both = tl.full(t.shape, CODES.levels[0] << 8, tl.int32)
    for i in tl.static_range(1, len(CODES.levels)):
        boundary = (CODES.levels[i - 1] + CODES.levels[i]) // 2
        both = tl.where(size > boundary, (CODES.levels[i] << 8) + i, both)
    return both & 0xFF, (both >> 8).to(tl.float32)


@triton.jit
def _unbiased_scale(t, level, rms, HEAD_DIM: tl.constexpr, CODES: tl.constexpr):
    """rms / mean(unit * level): <y, scale * levels> = |y|**2."""
    overlap = tl.sum(tl.abs(t) * level, axis=1) * (CODES.half_step * CODES.half_step / HEAD_DIM)
    return rms / tl.maximum(overlap, _TINY)


@triton.jit
def _least_squares(t, level, rms, HEAD_DIM: tl.constexpr):
    """The scale, fp16 [ROWS], that leaves the smallest residual, and the residual in half steps."""
    # Padding has no level.
    level = tl.where(tl.arange(0, t.shape[1])[None, :] < HEAD_DIM, level, 0.0)
    scale = _half(rms * tl.sum(tl.abs(t) * level, axis=1) / tl.sum(level * level, axis=1))
    used = tl.where(t < 0, -level, level) * (scale.to(tl.float32) / tl.maximum(rms, _TINY))[:, None]
    return scale, t - used


@triton.jit
def _half(scale):
    return tl.minimum(scale, _MAX_SCALE).to(tl.float16)
