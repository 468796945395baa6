"""Expands compressed pages to keys and values as an attention kernel for plain caches reads them.

One program takes one work item, up to `tiles.ITEM_TOKENS` tokens of a sequence, for one KV head:

    key[token, d]   = ((c_key + 1/2) * key step * key scale + rotated anchor[d]) / sqrt(D)
    value[token, d] = (c_value + 1/2) * value step * value scale / sqrt(D)

with c from `turboquant_kernels.unpack`. Both stay rotated. The factor 1 / sqrt(D) is that of the rotation
R = M / sqrt(D): with it here, queries and outputs are rotated by M, whose entries are +-1 and exact in every
dtype (`rotation.signed_hadamard`).
"""

import math
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl

from turboquant_kernels.codebook import codebook
from turboquant_kernels.codec import Codec
from turboquant_kernels.formats import Encoding, KVFormat
from turboquant_kernels.packing import anchors_of, pages_of
from turboquant_kernels.prefill.tiles import ITEM_TOKENS
from turboquant_kernels.rotation import device_projection, signed_hadamard
from turboquant_kernels.unpack import (
    level_table,
    load_bits,
    load_keys,
    load_values,
    natural,
    page_constants,
    token_of,
)


def num_warps(head_dim: int) -> int:
    """Warps of a program."""
    return 4 if head_dim <= 128 else 8


def expand(
    codec: Codec,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    items: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
) -> None:
    """Fills rows of keys and values, any float [rows, kv_heads, D], still rotated and over sqrt(D).

    kv_cache: uint8 [num_blocks, block_size, kv_heads, slot_bytes]; block_table: int32 [num_seqs, max_blocks];
    items: int32 [n, 4], `tiles.Tile.items`. Of the table the kernel reads the entries of the items' tokens
    alone. Raises ValueError where the cache's shape is not that of the codec's format.
    """
    _, block_size, kv_heads, _ = kv_cache.shape
    fmt, head_dim, seed, device = codec.fmt, codec.head_dim, codec.seed, kv_cache.device
    pages_of(kv_cache, codec.layout)
    anchors = anchors_of(kv_cache, fmt, head_dim) if fmt.anchor else None
    expand_kernel[len(items), kv_heads](
        items,
        kv_cache,
        anchors,
        block_table,
        level_table(fmt.key_code_bits, head_dim, device),
        level_table(fmt.value_bits, head_dim, device),
        device_projection(head_dim, seed, torch.float16, device) if fmt.encoding is Encoding.PROD else None,
        signed_hadamard(head_dim, seed, torch.bfloat16, device) if fmt.anchor else None,
        keys,
        values,
        codebook(fmt.key_code_bits, head_dim).step / math.sqrt(head_dim),
        codebook(fmt.value_bits, head_dim).step / math.sqrt(head_dim),
        kv_cache.stride(0),
        anchors.stride(0) if anchors is not None else 0,
        block_table.stride(0),
        **expand_constexprs(fmt, head_dim, kv_heads, block_size),
        num_warps=num_warps(head_dim),
    )


@cache
def expand_constexprs(fmt: KVFormat, head_dim: int, kv_heads: int, block_size: int) -> dict[str, Any]:
    """What `expand_kernel` is specialized to."""
    return page_constants(fmt, head_dim, kv_heads, block_size) | {
        "RESIDUAL": math.sqrt(math.pi / 2) / head_dim**1.5,
        "TOKENS": ITEM_TOKENS,
        "TERMS": 32,
    }


@triton.jit
def expand_kernel(
    items,  # int32 [n, 4]
    cache,  # uint8, blocks `block_stride` bytes apart
    anchors,  # bf16, of each block [BLOCK_PAGES / 8, kv_heads, D]; None: none
    block_table,  # int32 [num_seqs, table_stride]
    key_levels,  # int8: `unpack.level_table`
    value_levels,  # int8: `unpack.level_table`
    projection,  # PROD: float16 [D, D], S
    hadamard,  # bf16 [D, D], M; None without anchors
    keys,  # float [rows, kv_heads, D]
    values,  # float [rows, kv_heads, D]
    key_factor,  # of c + 1/2 times the scale
    value_factor,
    block_stride,
    anchor_stride,
    table_stride,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,  # HEAD_DIM padded to a power of two
    KV_HEADS: tl.constexpr,
    BLOCK_PAGES: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
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
    RESIDUAL: tl.constexpr,  # PROD: factor of S.T signs times the norm
    TOKENS: tl.constexpr,
    TERMS: tl.constexpr,  # of the sums with S and M, at a time
):
    item = items + 4 * tl.program_id(0)
    kv_head = tl.program_id(1)
    table = block_table + tl.load(item).to(tl.int64) * table_stride
    first_page = tl.load(item + 1)
    row = tl.load(item + 2)
    count = tl.load(item + 3)

    # Tokens of a page stand in the order of their values' bytes. An item of fewer pages reads its last again.
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
    in_item = slot // PAGE_TOKENS * PAGE_TOKENS + token
    stored = in_item < count
    scales = (page + SCALES_OFFSET).to(tl.pointer_type(tl.float16), bitcast=True) + token * SCALES
    key_scale = tl.load(scales, mask=stored, other=0.0).to(tl.float32) * key_factor
    value_scale = tl.load(scales + 1, mask=stored, other=0.0).to(tl.float32) * value_factor

    column = tl.arange(0, WIDTH)
    index = (
        (row + in_item).to(tl.int64)[:, None] * (KV_HEADS * HEAD_DIM) + kv_head * HEAD_DIM + column[None, :]
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
        norm = tl.load(scales + 2, mask=stored, other=0.0).to(tl.float32) * RESIDUAL
        # Sum over j of sign j times row j of S, some rows at a time to bound shared memory.
        residual = tl.zeros([TOKENS, WIDTH], tl.float32)
        for start in range(0, WIDTH, TERMS):
            j = start + tl.arange(0, TERMS)
            signs = load_bits(
                (page + SIGNS_OFFSET + token * (HEAD_DIM // 8))[:, None],
                j[None, :],
                (j < HEAD_DIM)[None, :],
                1,
                1,
            )
            inside = (j < HEAD_DIM)[:, None] & (column < HEAD_DIM)[None, :]
            matrix = tl.load(projection + j[:, None] * HEAD_DIM + column[None, :], mask=inside, other=0.0)
            residual += tl.dot((1 - 2 * signs).to(tl.float16), matrix)
        key += residual * norm[:, None]
    if anchors is not None:
        block = tl.load(table + first_page // BLOCK_PAGES).to(tl.int64)
        in_block = first_page % BLOCK_PAGES * PAGE_TOKENS // BLOCK_TOKENS
        anchor = anchors + block * anchor_stride + (in_block * KV_HEADS + kv_head) * HEAD_DIM
        # Sum over j of coordinate j times column j of M.
        rotated = tl.zeros([WIDTH], tl.float32)
        for start in range(0, WIDTH, TERMS):
            j = start + tl.arange(0, TERMS)
            coord = tl.load(anchor + j, mask=j < HEAD_DIM, other=0.0).to(tl.float32)
            inside = (j < HEAD_DIM)[:, None] & (column < HEAD_DIM)[None, :]
            matrix = tl.load(hadamard + column[None, :] * HEAD_DIM + j[:, None], mask=inside, other=0.0)
            rotated += tl.sum(matrix.to(tl.float32) * coord[:, None], axis=0)
        key += rotated[None, :] / HEAD_DIM
    tl.store(keys + index, key.to(keys.dtype.element_ty), mask=written)

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
    tl.store(values + index, value.to(values.dtype.element_ty), mask=written)
