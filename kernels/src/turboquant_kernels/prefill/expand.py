"""Decompresses runs of pages into keys and values as an attention kernel for plain caches reads them.

One program takes one run of a sequence's tokens for one KV head:

    key[token, d]   = ((c_key + 1/2) * key step * key scale + rotated anchor[d]) / sqrt(D)
    value[token, d] = (c_value + 1/2) * value step * value scale / sqrt(D)

with c from `turboquant_kernels.unpack`. Both stay rotated. The factor 1 / sqrt(D) is that of the rotation
R = M / sqrt(D): with it here, queries and results are turned by M, whose entries are +-1 and exact in every
dtype (`turn_matrix`).
"""

import math
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl

from turboquant_kernels.aot import AotVariant
from turboquant_kernels.codebook import codebook
from turboquant_kernels.codec import Codec
from turboquant_kernels.formats import (
    ANCHOR_TOKENS,
    COMPRESSED_FORMATS,
    HEAD_DIMS,
    PAGE_TOKENS,
    Encoding,
    KVFormat,
)
from turboquant_kernels.packing import anchors_of, pages_of
from turboquant_kernels.prefill.tiles import RUN_TOKENS
from turboquant_kernels.rotation import projection_matrix, rotation_matrix
from turboquant_kernels.unpack import (
    level_table,
    load_bits,
    load_keys,
    load_values,
    natural,
    page_constants,
    token_of,
)


def _num_warps(head_dim: int) -> int:
    return 4 if head_dim <= 128 else 8


@cache
def turn_matrix(head_dim: int, seed: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """M = R * sqrt(D), [D, D] of +-1: y = M x is exact but for the rounding of sums."""
    return (rotation_matrix(head_dim, seed) * math.sqrt(head_dim)).round().to(device, dtype)


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
    runs: int32 [n, 4], `tiles.Tile.runs`. Raises ValueError where the cache's shape is not that of the
    codec's format.
    """
    _, block_size, kv_heads, _ = kv_cache.shape
    fmt, head_dim, seed, device = codec.fmt, codec.head_dim, codec.seed, kv_cache.device
    pages_of(kv_cache, codec.layout)
    anchors = anchors_of(kv_cache, fmt, head_dim) if fmt.anchor else None
    _expand[len(runs), kv_heads](
        runs,
        kv_cache,
        anchors,
        block_table,
        level_table(fmt.key_code_bits, head_dim, device),
        level_table(fmt.value_bits, head_dim, device),
        _projection(head_dim, seed, device) if fmt.encoding is Encoding.PROD else None,
        turn_matrix(head_dim, seed, torch.bfloat16, device) if fmt.anchor else None,
        keys,
        values,
        codebook(fmt.key_code_bits, head_dim).step / math.sqrt(head_dim),
        codebook(fmt.value_bits, head_dim).step / math.sqrt(head_dim),
        kv_cache.stride(0),
        anchors.stride(0) if anchors is not None else 0,
        block_table.stride(0),
        **_constants(fmt, head_dim, kv_heads, block_size),
        num_warps=_num_warps(head_dim),
    )


@cache
def _projection(head_dim: int, seed: int, device: torch.device) -> torch.Tensor:
    """PROD: S as float16 [D, D], which is what its product with the signs is made of."""
    return projection_matrix(head_dim, seed).half().to(device)


@cache
def _constants(fmt: KVFormat, head_dim: int, kv_heads: int, block_size: int) -> dict[str, Any]:
    """What the kernel is specialized to."""
    return page_constants(fmt, head_dim, kv_heads, block_size) | {
        "RESIDUAL": math.sqrt(math.pi / 2) / head_dim**1.5,
        "TOKENS": RUN_TOKENS,
        "TERMS": 32,
    }


def variants() -> Iterator[AotVariant]:
    """Every format and head dimension to bf16."""
    signature = {
        "runs": "*i32",
        "cache": "*u8",
        "block_table": "*i32",
        "key_levels": "*i8",
        "value_levels": "*i8",
        "keys": "*bf16",
        "values": "*bf16",
        "key_factor": "fp32",
        "value_factor": "fp32",
        "block_stride": "i32",
        "anchor_stride": "i32",
        "table_stride": "i32",
    }
    for fmt in (*COMPRESSED_FORMATS, KVFormat(5, 3, anchor=True)):
        optional = {
            "projection": "*fp16" if fmt.encoding is Encoding.PROD else None,
            "anchors": "*bf16" if fmt.anchor else None,
            "turn": "*bf16" if fmt.anchor else None,
        }
        block_size = ANCHOR_TOKENS if fmt.anchor else PAGE_TOKENS
        for head_dim in HEAD_DIMS:
            yield AotVariant(
                name=f"prefill-expand-{fmt.name.removeprefix('tq-')}-d{head_dim}{'-anchor' * fmt.anchor}",
                kernel=_expand,
                signature=signature | {name: kind for name, kind in optional.items() if kind},
                constexprs=_constants(fmt, head_dim, 8, block_size)
                | {name: None for name, kind in optional.items() if not kind},
                num_warps=_num_warps(head_dim),
                divisible=("block_stride",),
            )


@triton.jit
def _expand(
    runs,  # int32 [n, 4]
    cache,  # uint8, blocks `block_stride` bytes apart
    anchors,  # bf16, of each block [BLOCK_PAGES / 8, kv_heads, D]; None: none
    block_table,  # int32 [num_seqs, table_stride]
    key_levels,  # int8: `unpack.level_table`
    value_levels,  # int8: `unpack.level_table`
    projection,  # PROD: float16 [D, D], S
    turn,  # bf16 [D, D], M; None without anchors
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
    ANCHOR_TOKENS: tl.constexpr,
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
        in_block = first_page % BLOCK_PAGES * PAGE_TOKENS // ANCHOR_TOKENS
        anchor = anchors + block * anchor_stride + (in_block * KV_HEADS + kv_head) * HEAD_DIM
        # Sum over j of coordinate j times column j of M.
        turned = tl.zeros([WIDTH], tl.float32)
        for start in range(0, WIDTH, TERMS):
            j = start + tl.arange(0, TERMS)
            coord = tl.load(anchor + j, mask=j < HEAD_DIM, other=0.0).to(tl.float32)
            inside = (j < HEAD_DIM)[:, None] & (column < HEAD_DIM)[None, :]
            matrix = tl.load(turn + column[None, :] * HEAD_DIM + j[:, None], mask=inside, other=0.0)
            turned += tl.sum(matrix.to(tl.float32) * coord[:, None], axis=0)
        key += turned[None, :] / HEAD_DIM
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
