"""The store as one Triton launch: rotate, quantize, pack and write the keys and values of new tokens.

The same bytes as `store.reference` up to float32 rounding, with everything between load and store in
registers. A program takes a tile of consecutive tokens of one KV head, their keys or their values:
consecutive tokens mostly stand next to each other in a page, where their short rows fill whole sectors.
"""

from functools import cache
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from turboquant_kernels.codebook import MAX_BITS, codebook
from turboquant_kernels.codec import MAX_SCALE, Codec
from turboquant_kernels.formats import (
    BLOCK_TOKENS,
    PAGE_TOKENS,
    SCALE_BYTES,
    Encoding,
    KVFormat,
)
from turboquant_kernels.packing import (
    KEY_RESIDUAL_NORM,
    KEY_SCALE,
    VALUE_SCALE,
    CodeOrder,
    Region,
    anchors_of,
    key_order,
    page_layout,
    pages_of,
    value_order,
)
from turboquant_kernels.programmatic_launch import uses_pdl
from turboquant_kernels.rotation import device_projection
from turboquant_kernels.rotation_kernel import (
    device_signs,
    factors,
    hadamard_product,
    load_signs,
    load_vectors,
    take_out_exponent,
    tile_rows,
)
from turboquant_kernels.store.pack_kernel import store_codes, store_projected_signs

NUM_WARPS = 4

# What the kernel's functions take from other modules.
_MAX_BITS = tl.constexpr(MAX_BITS)
_MAX_SCALE = tl.constexpr(MAX_SCALE)
_TINY = tl.constexpr(torch.finfo(torch.float32).tiny)
_PAGE_TOKENS = tl.constexpr(PAGE_TOKENS)
_BLOCK_TOKENS = tl.constexpr(BLOCK_TOKENS)
_KEY_SCALE = tl.constexpr(KEY_SCALE)
_VALUE_SCALE = tl.constexpr(VALUE_SCALE)
_KEY_RESIDUAL_NORM = tl.constexpr(KEY_RESIDUAL_NORM)


def store(
    codec: Codec,
    key: torch.Tensor,
    value: torch.Tensor,
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:
    """Writes the keys and values of new tokens into their slots of `kv_cache`, as `store.reference.store`.

    key, value: bf16, fp16 or fp32 [num_tokens, kv_heads, D], any strides of tokens and heads. kv_cache: uint8
    [num_blocks, block_size, kv_heads, slot_bytes], see `packing.pages_of`. slot_mapping: int32 or int64 [n].
    With anchors each key is stored less the anchor that the cache holds for its head and 128-token block.

    One launch whose grid follows from shapes, without synchronisation: it can be captured in a CUDA graph,
    once a first call has compiled it and copied the format's constants to the device. Raises ValueError where
    coordinates are not adjacent, slots do not fit 32 bits or the cache does not fit the format.
    """
    if key.stride(-1) != 1 or value.stride(-1) != 1:
        raise ValueError("the coordinates of a key or value are not adjacent in memory")
    pages_of(kv_cache, codec.layout)  # raises where the cache does not fit the format
    if codec.fmt.anchor:
        anchors_of(kv_cache, codec.fmt, codec.head_dim)
    num_blocks, block_size, kv_heads, _ = kv_cache.shape
    if num_blocks * block_size >= 1 << 31:
        raise ValueError(f"slots of {num_blocks} blocks of {block_size} tokens do not fit 32 bits")
    num_tokens = slot_mapping.shape[0]
    if not num_tokens:
        return
    constexprs = store_constexprs(codec.fmt, codec.head_dim)
    prod = codec.fmt.encoding is Encoding.PROD
    pdl = uses_pdl(key.device)
    grid = (triton.cdiv(num_tokens, constexprs["ROWS"]), kv_heads, 2)
    store_kernel[grid](
        key,
        value,
        kv_cache,
        slot_mapping,
        device_signs(codec.head_dim, codec.seed, key.device),
        device_projection(codec.head_dim, codec.seed, torch.float32, key.device) if prod else None,
        num_tokens,
        kv_heads,
        block_size,
        kv_cache.stride(0),
        key.stride(0),
        key.stride(1),
        value.stride(0),
        value.stride(1),
        **constexprs,
        PDL=pdl,
        num_warps=NUM_WARPS,
        launch_pdl=pdl,
    )


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


@cache
def store_constexprs(fmt: KVFormat, head_dim: int) -> dict[str, Any]:
    """What `store_kernel` is specialized to for a format; `PDL` follows from the GPU."""
    layout = page_layout(fmt, head_dim)
    hadamard = factors(head_dim)
    signs = layout.key_residual_signs
    return {
        "HEAD_DIM": head_dim,
        "INNER": hadamard.inner,
        "NEGATIVE": hadamard.negative,
        "ROWS": tile_rows(head_dim, NUM_WARPS),
        "KEY_CODES": _codes(layout.key_planes, key_order(fmt, head_dim)),
        "VALUE_CODES": _codes(layout.value_planes, value_order(fmt, head_dim)),
        "RESIDUAL_SIGNS": signs.offset if signs else None,
        "SCALES": layout.scales.offset,
        "SCALES_PER_TOKEN": fmt.scale_bytes // SCALE_BYTES,
        "SLOT_BYTES": fmt.slot_bytes(head_dim),
        "ANCHOR": fmt.anchor,
    }


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


@triton.jit(do_not_specialize=["num_tokens", "kv_heads"])
def store_kernel(
    key,
    value,
    cache,  # uint8 [blocks, block_size / 16, kv_heads, page bytes], each block followed by its anchors
    slots,
    signs,
    projection,  # float32 [D, D] for prod, else None
    num_tokens,
    kv_heads,
    block_size,
    block_stride,
    key_token_stride,
    key_head_stride,
    value_token_stride,
    value_head_stride,
    HEAD_DIM: tl.constexpr,
    INNER: tl.constexpr,
    NEGATIVE: tl.constexpr,
    ROWS: tl.constexpr,
    KEY_CODES: tl.constexpr,  # Codes
    VALUE_CODES: tl.constexpr,
    RESIDUAL_SIGNS: tl.constexpr,  # offset in the page for prod, else None
    SCALES: tl.constexpr,  # offset in the page
    SCALES_PER_TOKEN: tl.constexpr,
    SLOT_BYTES: tl.constexpr,
    ANCHOR: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid: (tiles of ROWS tokens, KV heads, keys and values)."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    head = tl.program_id(1)
    valid = token < num_tokens
    slot = tl.load(slots + token, mask=valid, other=-1).to(tl.int32)
    if tl.program_id(2) == 0:
        vectors = key + token.to(tl.int64) * key_token_stride + head.to(tl.int64) * key_head_stride
        tile = load_vectors(vectors, valid, HEAD_DIM, INNER)
        if ANCHOR:
            block, offset = _block(cache, slot, block_size, block_stride)
            anchors = (block + block_size * kv_heads * SLOT_BYTES).to(tl.pointer_type(tl.bfloat16))
            anchors += ((offset // _BLOCK_TOKENS).to(tl.int32) * kv_heads + head) * HEAD_DIM
            tile -= load_vectors(anchors, slot >= 0, HEAD_DIM, INNER)
        t, rms, factor = _rotate(tile, signs, HEAD_DIM, INNER, NEGATIVE, KEY_CODES)
        rank, level = _quantize(t, KEY_CODES)
        # Only now: until here nothing waits for the slots. Rows of padding are computed too, and not written.
        block, offset = _block(cache, slot, block_size, block_stride)
        page, row = _page(block, offset, head, kv_heads, SLOT_BYTES)
        store_codes(page, row, slot >= 0, t, rank, HEAD_DIM, KEY_CODES)
        scales = (page + SCALES).to(tl.pointer_type(tl.float16)) + row * SCALES_PER_TOKEN
        if RESIDUAL_SIGNS is None:
            scale = _half(_unbiased_scale(t, level, rms, HEAD_DIM, KEY_CODES) * factor)
            tl.store(scales + _KEY_SCALE, scale, mask=slot >= 0)
        else:
            scale, residual = _least_squares(t, level, rms * factor, HEAD_DIM)
            norm = tl.sqrt(tl.sum(residual * residual, axis=1)) * KEY_CODES.half_step * (rms * factor)
            tl.store(scales + _KEY_SCALE, scale, mask=slot >= 0)
            tl.store(scales + _KEY_RESIDUAL_NORM, _half(norm), mask=slot >= 0)
            store_projected_signs(page + RESIDUAL_SIGNS, row, slot >= 0, residual, projection, HEAD_DIM)
    else:
        vectors = value + token.to(tl.int64) * value_token_stride + head.to(tl.int64) * value_head_stride
        tile = load_vectors(vectors, valid, HEAD_DIM, INNER)
        t, rms, factor = _rotate(tile, signs, HEAD_DIM, INNER, NEGATIVE, VALUE_CODES)
        rank, level = _quantize(t, VALUE_CODES)
        block, offset = _block(cache, slot, block_size, block_stride)
        page, row = _page(block, offset, head, kv_heads, SLOT_BYTES)
        store_codes(page, row, slot >= 0, t, rank, HEAD_DIM, VALUE_CODES)
        scales = (page + SCALES).to(tl.pointer_type(tl.float16)) + row * SCALES_PER_TOKEN
        scale = _half(_unbiased_scale(t, level, rms, HEAD_DIM, VALUE_CODES) * factor)
        tl.store(scales + _VALUE_SCALE, scale, mask=slot >= 0)


@triton.jit
def _block(cache, slot, block_size, block_stride):
    """Pointers to the blocks of slots and the tokens' offsets in them, uint32; meaningless for slot -1."""
    # Unsigned and 32 bits wide: a division of 64 bits would cost as much as the rotation.
    slot = slot.to(tl.uint32, bitcast=True)
    size = block_size.to(tl.uint32)
    index = slot // size
    return cache + index.to(tl.int64) * block_stride, slot - index * size


@triton.jit
def _page(block, offset, head, kv_heads, SLOT_BYTES: tl.constexpr):
    """Pointers to the pages of tokens and their rows in them, int32."""
    page = (offset // _PAGE_TOKENS).to(tl.int32) * kv_heads + head
    return block + page * (_PAGE_TOKENS * SLOT_BYTES), (offset % _PAGE_TOKENS).to(tl.int32)


@triton.jit
def _rotate(
    tile, signs, HEAD_DIM: tl.constexpr, INNER: tl.constexpr, NEGATIVE: tl.constexpr, CODES: tl.constexpr
):
    """Vectors -> coordinates in half steps, [ROWS, n], and the RMS of the vectors as two factors, [ROWS]."""
    signs_tile = load_signs(signs, tile.shape[0], HEAD_DIM, INNER)
    tile, factor, _ = take_out_exponent(tile)
    rotated = hadamard_product(tile * signs_tile, HEAD_DIM, INNER, NEGATIVE)
    t, rms = _normalize(rotated, HEAD_DIM, CODES)
    return t, rms, factor


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
