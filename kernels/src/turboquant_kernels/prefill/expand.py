"""Decompresses runs of pages into keys and values as an attention kernel for plain caches reads them.

One program takes one run of a sequence's tokens for one KV head:

    key[token, d]   = (c_key + 1/2) * key step * key scale / sqrt(D)      c: `turboquant_kernels.unpack`
    value[token, d] = (c_value + 1/2) * value step * value scale / sqrt(D)

Both stay rotated. The factor 1 / sqrt(D) is that of the rotation R = M / sqrt(D): with it here, queries and
results are turned by M, whose entries are +-1 and exact in every dtype (`attention`).
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl

from turboquant_kernels.codebook import codebook
from turboquant_kernels.codec import Codec
from turboquant_kernels.formats import PAGE_TOKENS
from turboquant_kernels.packing import pages_of
from turboquant_kernels.prefill.tiles import RUN_TOKENS
from turboquant_kernels.rotation import projection_matrix
from turboquant_kernels.unpack import (
    level_table,
    levels_ptx,
    load_bits,
    load_keys,
    load_values,
    natural,
    token_of,
)

_NUM_WARPS = 4


def expand(
    codec: Codec,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    runs: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
) -> None:
    """Fills rows of keys and values, any float [rows, kv_heads, D], over sqrt(D) and still rotated.

    kv_cache: uint8 [num_blocks, block_size, kv_heads, slot_bytes]; block_table: int32 [num_seqs, max_blocks];
    runs: int32 [n, 4], `tiles.Tile.runs`. Raises ValueError for a cache of another format and for anchors.
    """
    if codec.fmt.anchor:
        raise ValueError("prefill does not read key anchors yet")
    _, block_size, kv_heads, _ = kv_cache.shape
    pages_of(kv_cache, codec.layout)  # raises for a cache of another format
    fmt, head_dim, device = codec.fmt, codec.head_dim, kv_cache.device
    prod = codec.layout.key_residual_signs is not None
    _expand[len(runs), kv_heads](
        runs,
        kv_cache,
        block_table,
        level_table(fmt.key_code_bits, head_dim, device),
        level_table(fmt.value_bits, head_dim, device),
        projection_matrix(head_dim, codec.seed).half().to(device) if prod else None,
        keys,
        values,
        codebook(fmt.key_code_bits, head_dim).step / math.sqrt(head_dim),
        codebook(fmt.value_bits, head_dim).step / math.sqrt(head_dim),
        math.sqrt(math.pi / 2) / head_dim / math.sqrt(head_dim),
        kv_cache.stride(0),
        block_table.stride(0),
        **_constants(codec, kv_heads, block_size),
        num_warps=_NUM_WARPS,
    )


def _constants(codec: Codec, kv_heads: int, block_size: int) -> dict[str, Any]:
    """What the kernel is specialized to."""
    fmt, layout, head_dim = codec.fmt, codec.layout, codec.head_dim
    interpreted = triton.knobs.runtime.interpret
    return {
        "HEAD_DIM": head_dim,
        "WIDTH": triton.next_power_of_2(head_dim),
        "KV_HEADS": kv_heads,
        "BLOCK_PAGES": block_size // PAGE_TOKENS,
        "PAGE_TOKENS": PAGE_TOKENS,
        "PAGE_BYTES": layout.page_bytes,
        "KEY_BITS": fmt.key_code_bits,
        "VALUE_BITS": fmt.value_bits,
        "VALUE_OFFSET": layout.value_planes[0].offset,
        "SIGNS_OFFSET": layout.key_residual_signs.offset if layout.key_residual_signs else 0,
        "SCALES_OFFSET": layout.scales.offset,
        "SCALES": layout.scales.token_bytes // 2,
        "KEY_READ": codec.key_order.read_bytes,
        "KEY_PTX": "" if interpreted else levels_ptx(fmt.key_code_bits, head_dim, bf16=False),
        "VALUE_PTX": "" if interpreted else levels_ptx(fmt.value_bits, head_dim, bf16=True),
        "TOKENS": RUN_TOKENS,
    }


@triton.jit
def _expand(
    runs,  # int32 [n, 4]
    cache,  # uint8, blocks of `block_stride` bytes
    block_table,  # int32 [num_seqs, table_stride]
    key_levels,  # int8: `unpack.level_table`
    value_levels,  # int8: `unpack.level_table`
    projection,  # PROD: float16 [D, D], S
    keys,  # float [rows, kv_heads, D]
    values,  # float [rows, kv_heads, D]
    key_factor,  # of c + 1/2 times the scale
    value_factor,
    residual_factor,  # PROD: of S.T signs times the norm
    block_stride,
    table_stride,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,  # HEAD_DIM padded to a power of two
    KV_HEADS: tl.constexpr,
    BLOCK_PAGES: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    PAGE_BYTES: tl.constexpr,
    KEY_BITS: tl.constexpr,
    VALUE_BITS: tl.constexpr,
    VALUE_OFFSET: tl.constexpr,
    SIGNS_OFFSET: tl.constexpr,  # PROD, else 0
    SCALES_OFFSET: tl.constexpr,
    SCALES: tl.constexpr,
    KEY_READ: tl.constexpr,
    KEY_PTX: tl.constexpr,
    VALUE_PTX: tl.constexpr,
    TOKENS: tl.constexpr,
):
    run = runs + 4 * tl.program_id(0)
    kv_head = tl.program_id(1)
    table = block_table + tl.load(run).to(tl.int64) * table_stride
    first_page = tl.load(run + 1)
    row = tl.load(run + 2)
    count = tl.load(run + 3)

    # Tokens of a page stand in the order of their values' bytes. Pages beyond the run read its last one.
    last_page = first_page + (count - 1) // PAGE_TOKENS
    slot = tl.arange(0, TOKENS)
    token = token_of(slot % PAGE_TOKENS)
    page_index = tl.minimum(first_page + slot // PAGE_TOKENS, last_page)
    block = tl.load(table + page_index // BLOCK_PAGES).to(tl.int64)
    page = cache + block * block_stride + (page_index % BLOCK_PAGES * KV_HEADS + kv_head) * PAGE_BYTES
    quad = tl.arange(0, TOKENS // 4)
    quad_index = tl.minimum(first_page + quad // (PAGE_TOKENS // 4), last_page)
    quad_block = tl.load(table + quad_index // BLOCK_PAGES).to(tl.int64)
    quad_page = (
        cache + quad_block * block_stride + (quad_index % BLOCK_PAGES * KV_HEADS + kv_head) * PAGE_BYTES
    )
    in_run = slot // PAGE_TOKENS * PAGE_TOKENS + token
    stored = in_run < count
    scales = (page + SCALES_OFFSET).to(tl.pointer_type(tl.float16), bitcast=True) + token * SCALES
    key_scale = tl.load(scales, mask=stored, other=0.0).to(tl.float32) * key_factor
    value_scale = tl.load(scales + 1, mask=stored, other=0.0).to(tl.float32) * value_factor

    column = tl.arange(0, WIDTH)
    place = (
        (row + in_run).to(tl.int64)[:, None] * (KV_HEADS * HEAD_DIM) + kv_head * HEAD_DIM + column[None, :]
    )
    written = stored[:, None] & (column < HEAD_DIM)[None, :]

    key = load_keys(
        page[:, None],
        token[:, None],
        key_levels,
        KEY_BITS,
        HEAD_DIM,
        WIDTH,
        KEY_READ,
        KEY_PTX,
        PAGE_TOKENS,
    )
    key = (natural(key, KEY_BITS, KEY_PTX, KEY_READ).to(tl.float32) + 0.5) * key_scale[:, None]
    if SIGNS_OFFSET > 0:
        norm = tl.load(scales + 2, mask=stored, other=0.0).to(tl.float32) * residual_factor
        signs = load_bits(
            (page + SIGNS_OFFSET + token * (HEAD_DIM // 8))[:, None],
            column[None, :],
            (column < HEAD_DIM)[None, :],
            1,
            1,
        )
        # Sum over j of sign j times row j of S.
        entry = column[:, None] * HEAD_DIM + column[None, :]
        inside = (column < HEAD_DIM)[:, None] & (column < HEAD_DIM)[None, :]
        matrix = tl.load(projection + entry, mask=inside, other=0.0)
        key += tl.dot((1 - 2 * signs).to(tl.float16), matrix) * norm[:, None]
    tl.store(keys + place, key.to(keys.dtype.element_ty), mask=written)

    value = load_values(
        page + VALUE_OFFSET,
        quad_page + VALUE_OFFSET,
        value_levels,
        VALUE_BITS,
        HEAD_DIM,
        WIDTH,
        VALUE_PTX,
        PAGE_TOKENS,
        tl.float32,
    )
    value = natural(tl.trans(value), VALUE_BITS, VALUE_PTX, 1).to(tl.float32) * value_scale[:, None]
    tl.store(values + place, value.to(values.dtype.element_ty), mask=written)
