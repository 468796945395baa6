"""Decode attention in plain Triton: every format and head dimension on every GPU, with key anchors.

    schedule -> items: splits of sequences -> [this kernel] sums over an item's tokens -> merge -> output

One program reads an item for one KV head, tile by tile, and unpacks each tile once for all its rows, the
query heads of that KV head times the query tokens of the sequence. Tokens are the M dimension of keys'
products and coordinates that of values', so rows need no padding beyond 4:

    products[token, row]  = sum_d c_key[token, d] * q[row, d]                       int8, exact int32 sums
    sums[d, row]         += sum_token level_value[d, token] * weight[token, row]    bf16, float32 sums

The query is a 16-bit integer in two int8 halves, the weight the sum of two bf16 numbers, each pair in
neighbouring columns of one product. Levels are exact in bf16 (`turboquant_kernels.unpack`); scales multiply
logits and weights, never tiles. Logits are in base 2.

All buffers follow from shapes, lengths are read on the device, and every sum has a fixed order: results
repeat bit by bit and the launch can be captured in a CUDA graph.
"""

import triton
import triton.language as tl

from turboquant_kernels.decode.logits import NOTHING, soft_capped
from turboquant_kernels.unpack import coordinate, load_bits, load_keys, load_values, token_of


@triton.jit
def _products(left, right):
    """Integer [T, D] @ [D, 2 * R], columns in pairs of high and low halves -> float32 [T, R]."""
    product = tl.dot(left, right, out_dtype=tl.int32)
    high, low = tl.split(tl.reshape(product, (left.shape[0], right.shape[1] // 2, 2)))
    return (high * 256 + low).to(tl.float32)


@triton.jit
def _page_offset(index, table, block_stride, BLOCK_PAGES: tl.constexpr, STRIDE: tl.constexpr):
    """Byte offset of a sequence's pages in the cache, int64; pages of a block lie STRIDE apart."""
    block = tl.load(table + index // BLOCK_PAGES).to(tl.int64)
    return block * block_stride + index % BLOCK_PAGES * STRIDE


@triton.jit
def attend_items_kernel(
    items,  # int32 [max_items, 4]: `schedule.Schedule.items`
    query_codes,  # int8 [tokens, q_heads, 2, D]
    query_scale,  # float32 [tokens, q_heads]
    query_half_sum,  # float32 [tokens, q_heads]
    projected_codes,  # PROD: int8 [tokens, q_heads, 2, D]
    projected_scale,  # PROD: float32 [tokens, q_heads]
    anchor_queries,  # float [tokens, q_heads, D], not rotated; None: no anchors
    anchor_scale,  # what their products count in a logit
    anchors,  # bf16, of each block [BLOCK_PAGES / 8, kv_heads, D]
    cache,  # uint8, blocks `block_stride` bytes apart
    block_table,  # int32 [num_seqs, table_stride]
    seq_lens,  # int32 [num_seqs]
    key_levels,  # int8: `unpack.level_table`
    value_levels,  # int8: `unpack.level_table`
    partial,  # float32 [max_items, kv_heads, row_groups, ROWS, D], in steps of the codebook
    stats,  # float32 [max_items, kv_heads, row_groups, ROWS, 2]: maximum, sum of weights
    block_stride,
    anchor_stride,
    query_token_stride,
    query_head_stride,
    table_stride,
    query_len,
    window,  # positions that a query sees, its own included; 0: all
    soft_cap,  # of logits in base 2; None: none
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,  # HEAD_DIM padded to a power of two
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,  # query heads of a KV head
    BLOCK_PAGES: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    RAW_BLOCK: tl.constexpr,  # whether queries see the stored tokens before their own block alone
    PAGE_BYTES: tl.constexpr,
    KEY_BITS: tl.constexpr,
    VALUE_BITS: tl.constexpr,
    VALUE_OFFSET: tl.constexpr,
    SIGNS_OFFSET: tl.constexpr,  # PROD, else 0
    SCALES_OFFSET: tl.constexpr,
    SCALES: tl.constexpr,
    KEY_READ: tl.constexpr,  # `packing.CodeOrder.read_bytes`
    KEY_PTX: tl.constexpr,
    VALUE_PTX: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    WEIGHT: tl.constexpr,  # type of weights and value levels: bf16, in the interpreter float32
):
    item = tl.program_id(0)
    kv_head = tl.program_id(1)
    row_group = tl.program_id(2)
    seq = tl.load(items + 4 * item)
    begin = tl.load(items + 4 * item + 1) * PAGE_TOKENS
    end = tl.load(items + 4 * item + 2) * PAGE_TOKENS
    if begin >= end:
        return
    seq_len = tl.load(seq_lens + seq)
    # Row r is query token r // GROUP and head r % GROUP; each stands twice among the columns of the products.
    row = row_group * ROWS + tl.arange(0, ROWS)
    used = row < query_len * GROUP
    query_row = (seq * query_len + row // GROUP) * (KV_HEADS * GROUP) + kv_head * GROUP + row % GROUP
    position = seq_len - query_len + row // GROUP
    if RAW_BLOCK:
        last_seen = position // BLOCK_TOKENS * BLOCK_TOKENS - 1
        num_stored = (seq_len - 1) // BLOCK_TOKENS * BLOCK_TOKENS
    else:
        last_seen = position
        num_stored = seq_len

    column = tl.arange(0, WIDTH)
    column_row = row_group * ROWS + tl.arange(0, 2 * ROWS) // 2
    half = tl.arange(0, 2 * ROWS) % 2
    token = seq * query_len + column_row // GROUP
    head = kv_head * GROUP + column_row % GROUP
    column_offset = ((token * (KV_HEADS * GROUP) + head) * 2 + half).to(tl.int64) * HEAD_DIM
    column_used = column_row < query_len * GROUP
    key_coordinate = coordinate(column, KEY_BITS, KEY_PTX, KEY_READ, WIDTH)
    operand_mask = (key_coordinate < HEAD_DIM)[:, None] & column_used[None, :]
    query = tl.load(
        query_codes + column_offset[None, :] + key_coordinate[:, None], mask=operand_mask, other=0
    )
    scale = tl.load(query_scale + query_row, mask=used, other=0.0)
    half_sum = tl.load(query_half_sum + query_row, mask=used, other=0.0)
    if SIGNS_OFFSET > 0:
        natural = tl.arange(0, WIDTH)
        projected_mask = (natural < HEAD_DIM)[:, None] & column_used[None, :]
        projected = tl.load(
            projected_codes + column_offset[None, :] + natural[:, None], mask=projected_mask, other=0
        )
        norm_scale = tl.load(projected_scale + query_row, mask=used, other=0.0)

    maximum = tl.full([ROWS], NOTHING, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    result = tl.zeros([WIDTH, ROWS], tl.float32)
    last_page = (num_stored - 1) // PAGE_TOKENS
    table = block_table + seq.to(tl.int64) * table_stride
    head_pages = cache + kv_head * PAGE_BYTES
    # Tokens of a page stand in the order of their values' bytes.
    slot = tl.arange(0, TILE)
    token = token_of(slot % PAGE_TOKENS)
    quad = tl.arange(0, TILE // 4)
    if anchors is not None:
        anchor_query_at = (seq * query_len + row // GROUP).to(tl.int64) * query_token_stride
        anchor_query_at += (kv_head * GROUP + row % GROUP) * query_head_stride
        anchor_logit = tl.zeros([ROWS], tl.float32)
    for start in range(begin, end, TILE):
        first_page = start // PAGE_TOKENS
        # Pages beyond the end read the last one; their tokens are masked below.
        page_index = tl.minimum(first_page + slot // PAGE_TOKENS, last_page)
        page = head_pages + _page_offset(page_index, table, block_stride, BLOCK_PAGES, KV_HEADS * PAGE_BYTES)
        quad_index = tl.minimum(first_page + quad // (PAGE_TOKENS // 4), last_page)
        quad_page = head_pages + _page_offset(
            quad_index, table, block_stride, BLOCK_PAGES, KV_HEADS * PAGE_BYTES
        )
        key_position = start + slot // PAGE_TOKENS * PAGE_TOKENS + token
        stored = key_position < num_stored
        scales = (page + SCALES_OFFSET).to(tl.pointer_type(tl.float16), bitcast=True) + token * SCALES
        key_scale = tl.load(scales, mask=stored, other=0.0).to(tl.float32)
        value_scale = tl.load(scales + 1, mask=stored, other=0.0).to(tl.float32)

        keys = load_keys(
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
        logit = (_products(keys, query) + half_sum[None, :]) * (scale[None, :] * key_scale[:, None])
        if SIGNS_OFFSET > 0:
            norm = tl.load(scales + 2, mask=stored, other=0.0).to(tl.float32)
            signs = load_bits(
                (page + SIGNS_OFFSET + token * (HEAD_DIM // 8))[:, None],
                tl.arange(0, WIDTH)[None, :],
                tl.arange(0, WIDTH)[None, :] < HEAD_DIM,
                1,
                1,
            )
            residual = _products((1 - 2 * signs).to(tl.int8), projected)
            logit += residual * (norm_scale[None, :] * norm[:, None])
        if anchors is not None:
            # Items begin where tiles of a sequence do, so that a tile has one anchor.
            if (start == begin) | (start % BLOCK_TOKENS == 0):
                block = tl.load(table + first_page // BLOCK_PAGES).to(tl.int64)
                in_block = first_page % BLOCK_PAGES * PAGE_TOKENS // BLOCK_TOKENS
                vector = anchors + block * anchor_stride + (in_block * KV_HEADS + kv_head) * HEAD_DIM
                anchor_logit = tl.zeros([ROWS], tl.float32)
                # Some coordinates at a time: whole queries would take registers from all tiles.
                for coord in range(0, WIDTH, 16):
                    d = coord + tl.arange(0, 16)
                    anchor = tl.load(vector + d, mask=d < HEAD_DIM, other=0.0).to(tl.float32)
                    anchor_query = tl.load(
                        anchor_queries + anchor_query_at[None, :] + d[:, None],
                        mask=(d < HEAD_DIM)[:, None] & used[None, :],
                        other=0.0,
                    ).to(tl.float32)
                    anchor_logit += tl.sum(anchor_query * anchor[:, None], axis=0)
                anchor_logit *= anchor_scale
            logit += anchor_logit[None, :]
        if soft_cap is not None:
            logit = soft_capped(logit, soft_cap)
        seen = key_position[:, None] <= last_seen[None, :]
        if window > 0:
            seen &= key_position[:, None] > position[None, :] - window
        logit = tl.where(seen, logit, float("-inf"))

        new_maximum = tl.maximum(maximum, tl.max(logit, axis=0))
        decay = tl.exp2(maximum - new_maximum)
        weight = tl.exp2(logit - new_maximum[None, :])
        total = total * decay + tl.sum(weight, axis=0)
        maximum = new_maximum
        weight = weight * value_scale[:, None]
        high = weight.to(WEIGHT)
        low = (weight - high.to(tl.float32)).to(WEIGHT)
        weights = tl.reshape(tl.join(high, low), (TILE, 2 * ROWS))

        values = load_values(
            page + VALUE_OFFSET,
            quad_page + VALUE_OFFSET,
            value_levels,
            VALUE_BITS,
            HEAD_DIM,
            WIDTH,
            VALUE_PTX,
            PAGE_TOKENS,
            WEIGHT,
        )
        both = tl.dot(values, weights, out_dtype=tl.float32)
        of_high, of_low = tl.split(tl.reshape(both, (WIDTH, ROWS, 2)))
        result = result * decay[None, :] + (of_high + of_low)

    index = ((item.to(tl.int64) * KV_HEADS + kv_head) * tl.num_programs(2) + row_group) * ROWS + tl.arange(
        0, ROWS
    )
    tl.store(stats + 2 * index, maximum)
    tl.store(stats + 2 * index + 1, total)
    value_coordinate = coordinate(column, VALUE_BITS, VALUE_PTX, 1, WIDTH)
    tl.store(
        partial + index[None, :] * HEAD_DIM + value_coordinate[:, None],
        result,
        mask=(value_coordinate < HEAD_DIM)[:, None],
    )
