"""The end of decode attention where queries read their own block raw: one launch from the splits' partial
results to the output.

    out = (2**(m - M) unrotate(a) + 2**(m' - M) a') / (2**(m - M) l + 2**(m' - M) l'),   M = max(m, m')

with m the largest logit (base 2), l the sum of weights and a the sum of rotated values of the stored tokens,
merged from splits as `merge` says, and m', l', a' those of the raw tokens, for which this kernel multiplies
keys and values itself (`turboquant_kernels.raw_block`). Un-rotation is linear, so it comes after the merge,
once a row. Weights of raw tokens are relative to their own largest and enter the product with values as the
sum of two numbers of the values' dtype.

A program has some rows of one sequence and KV head: query heads of that head times query tokens. All of them
share its raw tokens, so it takes all, up to `MAX_ROWS`, where the batch has enough sequences to keep the GPU
busy. Of a few long sequences a row has many splits to merge; there a program takes fewer rows, down to one,
and reads raw tokens that others read too, at most 64 KiB at D = 128, from the L2 cache.
"""

import math
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from turboquant_kernels.codec import Codec
from turboquant_kernels.decode.logits import LOG2_E, NOTHING, SOMETHING, soft_capped
from turboquant_kernels.formats import BLOCK_TOKENS
from turboquant_kernels.programmatic_launch import uses_pdl
from turboquant_kernels.queries.reference import QuantizedQueries
from turboquant_kernels.raw_block import RawBlocks
from turboquant_kernels.rotation_kernel import device_signs, factors, hadamard_product, load_signs

MAX_ROWS = 16
"""Rows of a program, as tensor cores multiply at least."""

NUM_WARPS = 4

NUM_STAGES = 5
"""Two tiles of raw tokens on their way: the compiler counts three stages for what the loads wait for, the
block table (Triton 3.7, as compiled)."""

STRIDE_BYTES = 16
"""Of which the distance of blocks is a multiple, so that 16 bytes can be loaded at once."""

_TILE_ELEMENTS = 32 * 128
"""Coordinates of raw keys at a time. Tokens of a tile divide a block, so that it is of one."""
_MERGED_ELEMENTS = 4096, 2048
"""Partial results at a time where a program has one or two rows, whose splits are many, and where it has
more: four programs fit a multiprocessor's registers then (D = 128, as compiled)."""


def rows_of(rows: int, heads: int, multiprocessors: int) -> int:
    """Rows of a program, a power of two: all `rows` of a KV head, or so few that every multiprocessor has a
    program. heads: sequences times KV heads."""
    held = min(triton.next_power_of_2(rows), MAX_ROWS)
    while held > 1 and heads * triton.cdiv(rows, held) < multiprocessors:
        held //= 2
    return held


def finish(
    codec: Codec,
    queries: QuantizedQueries,
    kv_cache: torch.Tensor,
    raw: RawBlocks,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    partial: torch.Tensor,
    stats: torch.Tensor,
    splits: torch.Tensor,
    out: torch.Tensor,
    *,
    unit: float,
    rows: int,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> None:
    """Fills out, bf16, fp16 or fp32 [num_seqs * query_len, q_heads, D].

    queries: only `unrotated`, of `raw.dtype`, and its scale are read. kv_cache, block_table, seq_lens,
    window, soft_cap, sinks: as `plan.paged_decode` takes them. partial, stats, splits, unit: as `merge.merge`
    takes them. rows: `rows_of`. Sequences without tokens become zero.

    Raises ValueError where the coordinates of a query or an output are not adjacent in memory.
    """
    query = queries.unrotated
    if query.stride(-1) != 1 or out.stride(-1) != 1:
        raise ValueError("the coordinates of a query or an output vector are not adjacent in memory")
    tokens, q_heads, head_dim = out.shape
    num_seqs, kv_heads = len(seq_lens), partial.shape[1]
    query_len, group = tokens // num_seqs, q_heads // kv_heads
    memory = raw.view(kv_cache, head_dim)
    pdl = uses_pdl(out.device)
    finish_kernel[num_seqs, kv_heads, triton.cdiv(query_len * group, rows)](
        out,
        partial,
        stats,
        splits,
        query,
        memory,
        block_table,
        seq_lens,
        sinks,
        device_signs(head_dim, codec.seed, out.device),
        unit / math.sqrt(head_dim),
        queries.unrotated_scale,
        window or 0,
        soft_cap * math.log2(math.e) if soft_cap else None,
        query.stride(0),
        query.stride(1),
        out.stride(0),
        out.stride(1),
        kv_cache.stride(0) // STRIDE_BYTES,
        block_table.stride(0),
        **constants_of(raw, head_dim, kv_heads, group, query_len, rows, partial.shape[2] * partial.shape[3]),
        PDL=pdl,
        num_warps=NUM_WARPS,
        num_stages=NUM_STAGES,
        launch_pdl=pdl,
    )


@cache
def constants_of(
    raw: RawBlocks, head_dim: int, kv_heads: int, group: int, query_len: int, rows: int, partial_rows: int
) -> dict[str, Any]:
    """What the kernel is specialized to. partial_rows: rows of a KV head among partial results."""
    width = triton.next_power_of_2(head_dim)
    operand = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[raw.dtype]
    return {
        "QUERY_LEN": query_len,
        "KV_HEADS": kv_heads,
        "GROUP": group,
        "PARTIAL_ROWS": partial_rows,
        "HEAD_DIM": head_dim,
        "WIDTH": width,
        "INNER": factors(head_dim).inner,
        "NEGATIVE": factors(head_dim).negative_transposed,
        "BLOCK_TOKENS": BLOCK_TOKENS,
        "RAW_BLOCKS": raw.blocks,
        "TOKENS_PER_BLOCK": raw.tokens_per_block,
        "STRIDE": STRIDE_BYTES // raw.dtype.itemsize,
        "ROWS": rows,
        "TILE": min(32, _TILE_ELEMENTS // width),
        "SPLITS": max(1, _MERGED_ELEMENTS[rows > 2] // (rows * width)),
        # The interpreter's matrix product of bf16 is wrong.
        "OPERAND": tl.float32 if triton.knobs.runtime.interpret else operand,
    }


@triton.jit(do_not_specialize=["window", "block_stride"])
def finish_kernel(
    out,
    partial,
    stats,
    splits,  # int32 [num_seqs, 2]: `schedule.Schedule.splits`
    query,  # bf16 or fp16 [num_seqs * QUERY_LEN, q_heads, D], not rotated
    raw,  # bf16 or fp16 [num_blocks, KV_HEADS, 2, TOKENS_PER_BLOCK, D]: `RawBlocks.view`
    block_table,  # int32 [num_seqs, table_stride]
    seq_lens,  # int32 [num_seqs]
    sinks,  # float [q_heads]; None: none
    signs,  # float32 [D]: `rotation_kernel.device_signs`
    unit,  # what sums of stored values count in, times D ** -0.5
    scale,  # what products of queries and raw keys count in a logit
    window,  # positions that a query sees, its own included; 0: all
    soft_cap,  # of logits in base 2; None: none
    query_token_stride,
    query_head_stride,
    out_token_stride,
    out_head_stride,
    block_stride,  # in units of STRIDE
    table_stride,
    QUERY_LEN: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,  # query heads of a KV head
    PARTIAL_ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,  # HEAD_DIM padded to a power of two
    INNER: tl.constexpr,
    NEGATIVE: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    RAW_BLOCKS: tl.constexpr,
    TOKENS_PER_BLOCK: tl.constexpr,
    STRIDE: tl.constexpr,  # elements of `STRIDE_BYTES`
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    SPLITS: tl.constexpr,
    OPERAND: tl.constexpr,  # type of what is multiplied: that of raw tokens, in the interpreter float32
    PDL: tl.constexpr,
):
    """Grid: (sequences, KV heads, groups of ROWS rows). Row r is query token r // GROUP, head r % GROUP."""
    sequence = tl.program_id(0)
    kv_head = tl.program_id(1)
    first_row = tl.program_id(2) * ROWS
    row = first_row + tl.arange(0, ROWS)
    used = row < QUERY_LEN * GROUP
    token = (sequence * QUERY_LEN + row // GROUP).to(tl.int64)
    head = kv_head * GROUP + row % GROUP
    d = tl.arange(0, WIDTH)
    mask = used[:, None] & (d < HEAD_DIM)[None, :]

    # Raw tokens, which the kernel ahead does not write: it may still run.
    before = tl.load(seq_lens + sequence) - QUERY_LEN
    position = before + row // GROUP
    first_position = before + first_row // GROUP
    last_position = before + (tl.minimum(first_row + ROWS, QUERY_LEN * GROUP) - 1) // GROUP
    first_seen = tl.maximum(first_position, 0) // BLOCK_TOKENS * BLOCK_TOKENS
    if window > 0:
        first_seen = tl.maximum(first_seen, first_position - window + 1)
    query_at = query + token * query_token_stride + head * query_head_stride
    q = tl.load(query_at[:, None] + d[None, :], mask=mask, other=0.0).to(OPERAND)
    table = block_table + sequence.to(tl.int64) * table_stride
    raw_keys = raw + kv_head * (2 * TOKENS_PER_BLOCK * HEAD_DIM)
    raw_maximum = tl.full([ROWS], NOTHING, tl.float32)
    raw_total = tl.zeros([ROWS], tl.float32)
    raw_result = tl.zeros([ROWS, WIDTH], tl.float32)
    for start in range(first_seen // TILE * TILE, last_position + 1, TILE):
        key_position = start + tl.arange(0, TILE)
        there = (key_position >= first_seen) & (key_position <= last_position)
        block = start // BLOCK_TOKENS
        index = key_position % BLOCK_TOKENS
        part = index // TOKENS_PER_BLOCK
        entry = block + tl.where(part > 0, part, RAW_BLOCKS)
        number = tl.load(table + entry, mask=there, other=0).to(tl.int64)
        key_at = raw_keys + number * block_stride * STRIDE + index % TOKENS_PER_BLOCK * HEAD_DIM
        # Of values too: what no row sees may be NaN.
        tile_mask = there[:, None] & (d < HEAD_DIM)[None, :]
        key = tl.load(key_at[:, None] + d[None, :], mask=tile_mask, other=0.0).to(OPERAND)
        value_at = key_at + TOKENS_PER_BLOCK * HEAD_DIM
        value = tl.load(value_at[:, None] + d[None, :], mask=tile_mask, other=0.0).to(OPERAND)

        logit = tl.dot(q, tl.trans(key), out_dtype=tl.float32) * scale
        if soft_cap is not None:
            logit = soft_capped(logit, soft_cap)
        seen = (key_position[None, :] <= position[:, None]) & (position // BLOCK_TOKENS == block)[:, None]
        if window > 0:
            seen &= key_position[None, :] > position[:, None] - window
        logit = tl.where(seen, logit, float("-inf"))
        new_maximum = tl.maximum(raw_maximum, tl.max(logit, axis=1))
        decay = tl.exp2(raw_maximum - new_maximum)
        weight = tl.exp2(logit - new_maximum[:, None])
        raw_total = raw_total * decay + tl.sum(weight, axis=1)
        raw_maximum = new_maximum
        high = weight.to(OPERAND)
        low = (weight - high.to(tl.float32)).to(OPERAND)
        raw_result = tl.dot(high, value, raw_result * decay[:, None], out_dtype=tl.float32)
        raw_result = tl.dot(low, value, raw_result, out_dtype=tl.float32)

    # The kernel ahead, which attends, does not write these either.
    first = tl.load(splits + 2 * sequence)
    count = tl.load(splits + 2 * sequence + 1)
    if sinks is None:
        maximum = tl.full([ROWS], NOTHING, tl.float32)
        total = tl.zeros([ROWS], tl.float32)
    else:
        maximum = tl.load(sinks + head, mask=used, other=0.0).to(tl.float32) * LOG2_E
        total = tl.full([ROWS], 1.0, tl.float32)
    if PDL:
        gdc_wait()
    maximum, total, result = _merge_splits(
        partial, stats, first, count, kv_head * PARTIAL_ROWS + row, used, maximum, total,
        KV_HEADS * PARTIAL_ROWS, HEAD_DIM, WIDTH, SPLITS,
    )  # fmt: skip
    product = hadamard_product(tl.reshape(result, [ROWS, WIDTH // INNER, INNER]), HEAD_DIM, INNER, NEGATIVE)
    signs_tile = tl.reshape(load_signs(signs, ROWS, HEAD_DIM, INNER), product.shape)

    highest = tl.maximum(maximum, raw_maximum)
    share = tl.where(maximum > SOMETHING, tl.exp2(maximum - highest), 0.0)
    raw_share = tl.where(raw_maximum > SOMETHING, tl.exp2(raw_maximum - highest), 0.0)
    total = total * share + raw_total * raw_share
    sums = product * signs_tile * (share * unit)[:, None] + raw_result * raw_share[:, None]
    result = sums / tl.where(total == 0, 1.0, total)[:, None]  # of nothing seen the sums are zero
    out_at = out + token * out_token_stride + head * out_head_stride
    tl.store(out_at[:, None] + d[None, :], result.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _merge_splits(
    partial, stats, first, count, row, used, maximum, total,
    ITEM_ROWS: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Adds the `count` splits of some rows, items `first` and up, to a largest logit and a sum of weights.

    row: int [R] among the ITEM_ROWS of an item; used: bool [R]; maximum, total: float32 [R]. Returns the
    latter with the splits added, and the sum of values, float32 [R, WIDTH], still rotated. SPLITS at a time.
    """
    d = tl.arange(0, WIDTH)
    s = tl.arange(0, SPLITS)
    result = tl.zeros([row.shape[0], WIDTH], tl.float32)
    for start in range(0, count, SPLITS):
        mask = used[:, None] & (start + s < count)[None, :]
        at = row[:, None] + (first + start + s).to(tl.int64)[None, :] * ITEM_ROWS
        m = tl.load(stats + 2 * at, mask=mask, other=NOTHING)
        part = tl.load(stats + 2 * at + 1, mask=mask, other=0.0)
        a_at = partial + at[:, :, None] * D + d[None, None, :]
        a = tl.load(a_at, mask=mask[:, :, None] & (d < D)[None, None, :], other=0.0)
        new_maximum = tl.maximum(maximum, tl.max(m, axis=1))
        decay = tl.exp2(maximum - new_maximum)
        share = tl.where(m > SOMETHING, tl.exp2(m - new_maximum[:, None]), 0.0)
        total = total * decay + tl.sum(share * part, axis=1)
        result = result * decay[:, None] + tl.sum(share[:, :, None] * a, axis=1)
        maximum = new_maximum
    return maximum, total, result
