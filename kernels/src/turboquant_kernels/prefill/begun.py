"""Raw keys and values of the blocks in which chunks lie, gathered before a step stores anything."""

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl

from turboquant_kernels.prefill.pieces import PiecePlan
from turboquant_kernels.raw_block import RawBlocks

TOKENS = 32
"""Tokens of a program."""
NUM_WARPS = 4


def begun_blocks(
    plan: PiecePlan,
    raw: RawBlocks,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Raw keys and values of a plan's pieces, as `blocks.prefill_attention` takes them.

    To be called before the step stores anything: the store may write where earlier tokens lie.

    key, value: [rows, kv_heads, D] of `raw.dtype`, the new tokens, any strides of tokens and heads; kv_cache:
    uint8 [num_blocks, BLOCK_TOKENS, kv_heads, slot_bytes]; block_table: int32 [num_seqs, max_blocks], the
    blocks of raw tokens included. Returns [plan.own_keys, kv_heads, D] each. Where no chunk begins inside a
    block these are the new tokens themselves, and nothing is copied; else one launch brings them together
    with what earlier steps kept. Raises ValueError where coordinates are not adjacent.
    """
    if not plan.is_begun:
        return key[: plan.rows], value[: plan.rows]
    if key.stride(-1) != 1 or value.stride(-1) != 1:
        raise ValueError("the coordinates of a key or value are not adjacent in memory")
    _, kv_heads, head_dim = key.shape
    before = raw.view(kv_cache, head_dim)
    own_key, own_value = key.new_empty(2, plan.own_keys, kv_heads, head_dim)
    grid = (len(plan.pieces), triton.cdiv(plan.max_own_keys, TOKENS), kv_heads)
    begun_kernel[grid](
        plan.pieces,
        plan.query_starts,
        plan.key_starts,
        before,
        block_table,
        key,
        value,
        own_key,
        own_value,
        before.stride(0),
        block_table.stride(0),
        key.stride(0),
        key.stride(1),
        value.stride(0),
        value.stride(1),
        **begun_constexprs(raw, kv_heads, head_dim),
        num_warps=NUM_WARPS,
    )
    return own_key, own_value


@cache
def begun_constexprs(raw: RawBlocks, kv_heads: int, head_dim: int) -> dict[str, Any]:
    """What `begun_kernel` is specialized to."""
    return {
        "RAW_BLOCKS": raw.blocks,
        "RAW_TOKENS": raw.tokens_per_block,
        "KV_HEADS": kv_heads,
        "HEAD_DIM": head_dim,
        "WIDTH": triton.next_power_of_2(head_dim),
        "TOKENS": TOKENS,
    }


@triton.jit
def begun_kernel(
    pieces,  # int32 [pieces, 2]: sequence and block
    query_starts,  # int32 [pieces + 1]
    key_starts,  # int32 [pieces + 1]
    before,  # float, blocks `block_stride` elements apart, of each [KV_HEADS, 2, RAW_TOKENS, HEAD_DIM]
    block_table,  # int32 [num_seqs, table_stride]
    key,
    value,
    own_key,  # float [own keys, KV_HEADS, HEAD_DIM]
    own_value,
    block_stride,
    table_stride,
    key_token_stride,
    key_head_stride,
    value_token_stride,
    value_head_stride,
    RAW_BLOCKS: tl.constexpr,
    RAW_TOKENS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """Grid: (pieces, tiles of TOKENS tokens of a block, KV heads). Where tokens lie: `RawBlocks.place`."""
    piece = tl.program_id(0)
    index = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)  # in the block
    kv_head = tl.program_id(2)
    first_row = tl.load(query_starts + piece)
    rows = tl.load(query_starts + piece + 1) - first_row
    first_key = tl.load(key_starts + piece)
    keys = tl.load(key_starts + piece + 1) - first_key
    is_new = (index >= keys - rows) & (index < keys)
    is_before = index < keys - rows

    sequence = tl.load(pieces + 2 * piece).to(tl.int64)
    part = index // RAW_TOKENS
    entry = tl.load(pieces + 2 * piece + 1) + tl.where(part > 0, part, RAW_BLOCKS)
    block = tl.load(block_table + sequence * table_stride + entry, mask=is_before, other=0).to(tl.int64)
    column = tl.arange(0, WIDTH)[None, :]
    inside = column < HEAD_DIM
    is_before, is_new, written = (
        is_before[:, None] & inside,
        is_new[:, None] & inside,
        (index < keys)[:, None] & inside,
    )

    head = before + block * block_stride + kv_head * (2 * RAW_TOKENS * HEAD_DIM)
    old = (head + index % RAW_TOKENS * HEAD_DIM)[:, None] + column
    row = (first_row + index - (keys - rows)).to(tl.int64)
    target = ((first_key + index).to(tl.int64) * KV_HEADS + kv_head)[:, None] * HEAD_DIM + column

    new = (key + row * key_token_stride + kv_head * key_head_stride)[:, None] + column
    vector = tl.where(is_new, tl.load(new, mask=is_new), tl.load(old, mask=is_before))
    tl.store(own_key + target, vector, mask=written)
    new = (value + row * value_token_stride + kv_head * value_head_stride)[:, None] + column
    vector = tl.where(is_new, tl.load(new, mask=is_new), tl.load(old + RAW_TOKENS * HEAD_DIM, mask=is_before))
    tl.store(own_value + target, vector, mask=written)
