"""Decode attention for Hopper, in Gluon: an item's compressed pages to its partial result.

Each warp owns whole tokens and keeps everything in registers. A tile of 32 or 64 tokens goes

    packed words -> int8 operands -> logits -> weights -> int8 operands -> attended

without shared memory or barriers; the warps of a program are merged once, at its end. What makes it fast
(measured in docs/benchmarks.md):

- Tokens are the M dimension of `mma.m16n8k32`, and rows (query heads of a KV head, times query tokens) the N
  dimension, two columns each: the int8 halves of a 16-bit query. Four rows need no padding.
- Pages are read as they are stored, up to 16 bytes a lane, one tile ahead; `fragments` says how codes
  become operands in about 8 instructions for 8 codes, of which as few as can be take the pipe of look-ups
  and logic, the busiest.
- Integer sums are exact, so weights are 15-bit fixed-point numbers in two int8 halves.

Logits are in base 2. A value's scale multiplies its token's weight, so its logarithm is added to the logit
that the running maximum is taken of, and the weights are relative to that. Levels are step * (c + 1/2): the
halves enter by the sum of the query's coordinates and the sum of the weights. The logits of key anchors are
made for many tiles at once (`anchors`).
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from turboquant_kernels.decode.hopper.anchors import (
    allocate_logits,
    load_logits,
    prefetch_anchors,
    store_logits,
    tiles_of_run,
)
from turboquant_kernels.decode.hopper.merge import merge_splits, store_zeros
from turboquant_kernels.decode.hopper.operands import (
    blocks_of,
    bytes_of_words,
    key_operand,
    load_queries,
    load_shared_queries,
    load_table,
    share_queries,
)
from turboquant_kernels.decode.hopper.pages import (
    find_blocks,
    load_scales,
    load_tile_keys,
    offset_of,
    pages_of_tile,
    prefetch,
)
from turboquant_kernels.decode.hopper.values import (
    MAGIC,
    add_sums,
    load_values,
    no_attended,
    store_attended,
    sum_values,
    value_operand,
    weight_operand,
)
from turboquant_kernels.decode.logits import LOG2_E, NOTHING

WEIGHT_ONE = gl.constexpr(32512.0)
"""Fixed-point weight of the largest token: 127 * 256, so that both halves are int8."""

# Two tokens' fixed-point weights of one row -> their high and low bytes as two 16-bit elements, transposed
# across the warp so that lanes hold tokens where they held rows. The low byte is made signed.
_WEIGHTS = gl.constexpr(
    "{ .reg .b32 y; prmt.b32 y, $1, $2, 0x4051; xor.b32 y, y, 0x80800000;"
    " movmatrix.sync.aligned.m8n8.trans.b16 $0, y; }"
)
_LOG2 = gl.constexpr("lg2.approx.ftz.f32 $0, $1;")


@gluon.jit
def _products(
    keys,
    registers,
    q,
    W: gl.constexpr,
    P: gl.constexpr,
    R: gl.constexpr,
    D: gl.constexpr,
    BITS: gl.constexpr,
    ASM: gl.constexpr,
    SHARED_QUERIES: gl.constexpr,
    mma: gl.constexpr,
):
    """Integer products of a tile's keys and the queries, halves put together: float32 [W, 16 P tokens, R]."""
    BLOCKS: gl.constexpr = blocks_of(D, 128)
    A: gl.constexpr = gl.DotOperandLayout(0, mma, 4)
    B: gl.constexpr = gl.DotOperandLayout(1, mma, 4)
    products = gl.full([W, P * 16, 2 * R], 0, gl.int32, mma)
    for i in gl.static_range(len(BLOCKS)):
        k8 = key_operand(keys[i], registers, W, P, BITS, BLOCKS[i], i, ASM, A)
        q8 = load_shared_queries(q[i], W, 2 * R, BLOCKS[i], B) if SHARED_QUERIES else q[i]
        products = mma_v2(k8, q8, products)
    high, low = gl.split(gl.reshape(products, [W, P * 16, R, 2]))
    return (high * 256 + low).to(gl.float32)


@gluon.jit
def _log2_of_scale(scale):
    """Base-2 logarithm of fp16 scales in float32. 2**-40 is added, which is nothing to any scale but zero."""
    return gl.inline_asm_elementwise(
        _LOG2, "=f,f", [scale + 2.0**-40], dtype=gl.float32, is_pure=True, pack=1
    )


@gluon.jit(do_not_specialize=["num_seqs"])
def decode_kernel(
    partial,
    stats,
    queries,
    query_scale,
    query_half_sum,
    kv_cache,
    block_table,
    seq_lens,
    items,
    tables,
    attended_out,
    splits,
    counters,
    sinks,
    num_seqs,
    unit,
    block_stride,
    block_table_stride,
    query_len,
    window,
    soft_cap,
    anchor_queries,
    anchor_scale,
    query_token_stride,
    query_head_stride,
    KV_HEADS: gl.constexpr,
    GROUP: gl.constexpr,
    ROW_GROUPS: gl.constexpr,
    R: gl.constexpr,
    D: gl.constexpr,
    KEY_BITS: gl.constexpr,
    VALUE_BITS: gl.constexpr,
    KEY_ASM: gl.constexpr,
    VALUE_ASM: gl.constexpr,
    KEY_REGISTERS: gl.constexpr,
    VALUE_REGISTERS: gl.constexpr,
    PAGES_OF_BLOCK: gl.constexpr,
    OFFSET: gl.constexpr,
    W: gl.constexpr,
    P: gl.constexpr,
    VALUE_BLOCK: gl.constexpr,
    SHARED_QUERIES: gl.constexpr,
    EARLY: gl.constexpr,
    PREFETCH: gl.constexpr,
    WINDOW: gl.constexpr,
    SOFT_CAP: gl.constexpr,
    ANCHOR: gl.constexpr,
    FUSED: gl.constexpr,
):
    """Partial results of one item, R rows of one KV head; with FUSED the last of a sequence merges them.

    partial, stats: as `launch.Workspace` has them. queries, query_scale, query_half_sum: those of
    `QuantizedQueries`. kv_cache: int32 words, blocks `block_stride` words apart. block_table: int32
    [num_seqs, `block_table_stride`]. seq_lens: int32 [num_seqs]. items, splits: as `schedule.Schedule`
    has them. tables: int32 [words, 32], the words of the fragments' tables for keys, then values.
    attended_out, counters, sinks: as `launch.Merged` has them, None without FUSED. window: positions that
    a query sees, with WINDOW. soft_cap: times log2(e), with SOFT_CAP. unit: what sums of values count in.
    anchor_queries: float [tokens, q_heads, D], not rotated, anchor_scale: what their products count in a
    logit, with ANCHOR; else None, as their strides. Items then begin at multiples of `ANCHOR_PAGES`.
    """
    T: gl.constexpr = P * 16
    N: gl.constexpr = 2 * R
    KEY_BLOCKS: gl.constexpr = blocks_of(D, 128)
    VALUE_BLOCKS: gl.constexpr = blocks_of(D, VALUE_BLOCK)
    CODE_WORDS: gl.constexpr = D * (KEY_BITS + VALUE_BITS) // 2
    PAGE_WORDS: gl.constexpr = CODE_WORDS + 16
    ALL_HEADS: gl.constexpr = KV_HEADS * PAGE_WORDS
    PROGRAMS: gl.constexpr = KV_HEADS * ROW_GROUPS
    mma: gl.constexpr = gl.NVMMADistributedLayout(
        version=[2, 0], warps_per_cta=[W, 1, 1], instr_shape=[1, 16, 8]
    )
    A: gl.constexpr = gl.DotOperandLayout(0, mma, 4)
    B: gl.constexpr = gl.DotOperandLayout(1, mma, 4)
    item = gl.program_id(0)
    sequence = gl.load(items + 4 * item)
    first_page = gl.load(items + 4 * item + 1)
    end_page = gl.load(items + 4 * item + 2)
    head = gl.program_id(1) // ROW_GROUPS
    group = gl.program_id(1) % ROW_GROUPS
    if FUSED:
        # A sequence without tokens has no item: its zeros come from the item of its number.
        if gl.load(splits + 2 * item + 1, mask=item < num_seqs, other=1) == 0:
            store_zeros(
                attended_out,
                query_len * GROUP,
                group * R,
                head * GROUP,
                item * query_len,
                W,
                R,
                D,
                GROUP,
                KV_HEADS * GROUP,
            )
    if first_page >= end_page:
        return
    seq_len = gl.load(seq_lens + sequence)

    # Rows: query head g of token i is row i * G + g, where G query heads share the KV head.
    G: gl.constexpr = GROUP
    total_rows = query_len * G

    # Queries: int8 [tokens, q_heads, 2, D]; column 2 r of the operand is the high half of row r.
    column = gl.arange(0, N, gl.SliceLayout(0, gl.SliceLayout(1, B)))[None, None, :]
    row = group * R + column // 2
    token = sequence * query_len + row // G
    query_head = head * G + row % G
    q_row = ((token * (KV_HEADS * G) + query_head) * 2 + column % 2) * D
    # Zeros that give a tensor its dimension of warps, each of which holds a copy.
    no_warp = gl.arange(0, W, gl.SliceLayout(1, gl.SliceLayout(2, B)))[:, None, None] * 0
    q = ()
    used = (row < total_rows) & (no_warp == 0)
    for i in gl.static_range(len(KEY_BLOCKS)):
        part = load_queries(queries + i * 128, q_row + no_warp, used, KEY_BITS, KEY_BLOCKS[i], B)
        if SHARED_QUERIES:
            q = q + (share_queries(part, W, N, KEY_BLOCKS[i]),)
        else:
            q = q + (part,)

    key_registers = load_table(tables, KEY_REGISTERS, W, P)
    value_registers = load_table(tables + 32 * KEY_REGISTERS, VALUE_REGISTERS, W, P)

    table_row = block_table + sequence * block_table_stride
    keys_at = kv_cache + head * PAGE_WORDS
    values_at = keys_at + D * KEY_BITS // 2
    scales_at = (keys_at + CODE_WORDS).to(gl.pointer_type(gl.float16), bitcast=True)

    products = gl.full([W, T, N], 0, gl.int32, mma)
    high, _ = gl.split(gl.reshape(products, [W, T, R, 2]))
    S: gl.constexpr = high.type.layout  # [W, T, R]
    ROW: gl.constexpr = gl.SliceLayout(1, S)  # [W, R]
    row = group * R + gl.arange(0, R, gl.SliceLayout(0, ROW))
    used = row < total_rows
    query_token = row // G
    q_index = (sequence * query_len + query_token) * (KV_HEADS * G) + head * G + row % G
    no_warp2 = (gl.arange(0, W, gl.SliceLayout(1, ROW)) * 0)[:, None]
    scale = gl.load(
        query_scale + q_index[None, :] + no_warp2, mask=(used[None, :] & (no_warp2 == 0)), other=0.0
    )
    half_sum = (
        gl.load(
            query_half_sum + q_index[None, :] + no_warp2, mask=(used[None, :] & (no_warp2 == 0)), other=0.0
        )
        * scale
    )
    # Row i of n query tokens sees positions up to seq_len - n + i.
    last = (seq_len - query_len + query_token)[None, :] + no_warp2
    seen_by_all = seq_len - query_len + 1

    maximum = gl.full([W, R], NOTHING, gl.float32, ROW)
    warp_token = gl.arange(0, T, gl.SliceLayout(0, gl.SliceLayout(2, S)))[None, :, None]
    warp_token += gl.arange(0, W, gl.SliceLayout(1, gl.SliceLayout(2, S)))[:, None, None] * T

    PIECES: gl.constexpr = 1 if VALUE_BITS == 8 else 2
    attended = ()
    for i in gl.static_range(len(VALUE_BLOCKS)):
        for _ in gl.static_range(PIECES):
            attended = attended + (no_attended(W, VALUE_BLOCKS[i] // PIECES, R, mma),)

    lane_zero = gl.sum(gl.reshape(gl.full([W, T, R], 0.0, gl.float32, S), [W, 2 * P, 8, R]), axis=1)
    total = lane_zero  # of each lane's own tokens; summed over lanes at the end
    weight_sum = lane_zero

    # With anchors tiles are read in runs, before each of which its anchors' logits are made.
    tiles = gl.cdiv(end_page - first_page, W * P)
    RUN: gl.constexpr = tiles_of_run(P)
    if ANCHOR:
        anchors = kv_cache + PAGES_OF_BLOCK * ALL_HEADS + head * (D // 2)
        anchor_logits = allocate_logits(W, P, R)
    for run in range(gl.cdiv(tiles, RUN) if ANCHOR else 1):
        run_page = first_page + run * (RUN * W * P) if ANCHOR else first_page
        if ANCHOR:
            prefetch_anchors(
                anchors,
                table_row,
                block_stride,
                run_page,
                end_page,
                W,
                D,
                KV_HEADS,
                PAGES_OF_BLOCK,
                OFFSET,
            )
        # Of the tile after the next the blocks are looked up while this one is computed, and with PREFETCH
        # its pages start on their way to the L2 cache.
        page = pages_of_tile(run_page, end_page, W, P)
        block = find_blocks(table_row, page, PAGES_OF_BLOCK, OFFSET)
        offset = offset_of(block, page, block_stride, PAGES_OF_BLOCK, ALL_HEADS)
        keys = load_tile_keys(keys_at, offset, W, P, KEY_BITS, D)
        values = ()
        if EARLY:
            for i in gl.static_range(len(VALUE_BLOCKS)):
                first = i * VALUE_BLOCK
                values = values + (
                    load_values(values_at, offset, W, P, VALUE_BITS, D, VALUE_BLOCKS[i], first),
                )
        scales = load_scales(scales_at, offset, W, P)
        page = pages_of_tile(run_page + W * P, end_page, W, P)
        block = find_blocks(table_row, page, PAGES_OF_BLOCK, OFFSET)
        next_offset = offset
        if PREFETCH:
            next_offset = offset_of(block, page, block_stride, PAGES_OF_BLOCK, ALL_HEADS)
            prefetch(keys_at, next_offset, PAGE_WORDS)
            page = pages_of_tile(run_page + 2 * (W * P), end_page, W, P)
            block = find_blocks(table_row, page, PAGES_OF_BLOCK, OFFSET)
        if ANCHOR:
            store_logits(
                anchor_logits,
                anchors,
                table_row,
                block_stride,
                run_page,
                end_page,
                anchor_queries + head * G * query_head_stride,
                anchor_scale,
                sequence * query_len,
                query_token_stride,
                query_head_stride,
                group * R,
                total_rows,
                W,
                R,
                D,
                KV_HEADS,
                G,
                PAGES_OF_BLOCK,
                OFFSET,
                mma,
            )

        for tile in range(gl.minimum(tiles - run * RUN, RUN) if ANCHOR else tiles):
            found = offset_of(block, page, block_stride, PAGES_OF_BLOCK, ALL_HEADS)
            if PREFETCH:
                prefetch(keys_at, found, PAGE_WORDS)
                coming = next_offset
                next_offset = found
            else:
                coming = found
            s = _products(keys, key_registers, q, W, P, R, D, KEY_BITS, KEY_ASM, SHARED_QUERIES, mma)
            if EARLY:
                keys = load_tile_keys(keys_at, coming, W, P, KEY_BITS, D)
            else:
                late = ()
                for i in gl.static_range(len(VALUE_BLOCKS)):
                    first = i * VALUE_BLOCK
                    late = late + (
                        load_values(values_at, offset, W, P, VALUE_BITS, D, VALUE_BLOCKS[i], first),
                    )
            key_scale, value_scale = gl.split(scales)  # [W, P, 2, 8]
            scales = load_scales(scales_at, coming, W, P)
            key_scale = gl.convert_layout(
                gl.reshape(key_scale, [W, T]).to(gl.float32), gl.SliceLayout(2, S), assert_trivial=True
            )[:, :, None]
            value_scale = gl.convert_layout(
                gl.reshape(value_scale, [W, T]).to(gl.float32), gl.SliceLayout(2, S), assert_trivial=True
            )[:, :, None]
            s = (s * scale[:, None, :] + half_sum[:, None, :]) * key_scale
            if ANCHOR:
                s += load_logits(anchor_logits, tile, W, P, R, ROW)[:, None, :]
            if SOFT_CAP:
                # cap * tanh(s / cap), of which logits and cap are in base 2.
                s = soft_cap - 2.0 * soft_cap / (gl.exp2(s * (2.0 * LOG2_E / soft_cap)) + 1.0)
            weighted = s + _log2_of_scale(value_scale)
            tile_first = run_page * 16 + tile * (W * T)
            # Most tiles are seen whole. Slots behind the end hold anything, NaN too.
            if WINDOW or tile_first + W * T > seen_by_all:
                position = tile_first + warp_token
                seen = position <= last[:, None, :]
                if WINDOW:
                    seen = seen & (position > last[:, None, :] - window)
                s = gl.where(seen, s, NOTHING)
                weighted = gl.where(seen, weighted, NOTHING)
            new_maximum = gl.maximum(maximum, gl.max(weighted, axis=1))
            decay = gl.exp2(maximum - new_maximum)
            maximum = new_maximum
            p = gl.exp2(weighted - new_maximum[:, None, :])
            lane_decay = gl.convert_layout(decay, gl.SliceLayout(1, total.type.layout), assert_trivial=True)[
                :, None, :
            ]
            total = total * lane_decay + gl.sum(
                gl.reshape(gl.exp2(s - new_maximum[:, None, :]), [W, 2 * P, 8, R]), axis=1
            )
            weight_sum = weight_sum * lane_decay + gl.sum(gl.reshape(p, [W, 2 * P, 8, R]), axis=1)
            fixed = p * WEIGHT_ONE + (MAGIC + 128.0)

            p0, p1 = gl.split(
                gl.permute(gl.reshape(fixed.to(gl.int32, bitcast=True), [W, P, 2, 8, R]), [0, 1, 3, 4, 2])
            )
            if R == 8:
                p0 = gl.permute(gl.reshape(p0, [W, P, 8, 2, 4]), [0, 1, 3, 2, 4])
                p1 = gl.permute(gl.reshape(p1, [W, P, 8, 2, 4]), [0, 1, 3, 2, 4])
            moved = gl.inline_asm_elementwise(
                _WEIGHTS, "=r,r,r", [p0, p1], dtype=gl.int32, is_pure=True, pack=1
            )
            moved = bytes_of_words(gl.reshape(moved, [W, P * R // 4, 32, 1]), W, P * R // 4, 1)
            weights = weight_operand(moved, W, P, R, B, PIECES == 2)

            new_attended = ()
            next_values = ()
            for i in gl.static_range(len(VALUE_BLOCKS)):
                packed = values[i] if EARLY else late[i]
                v = value_operand(packed, value_registers, W, P, VALUE_BITS, VALUE_BLOCKS[i], VALUE_ASM, A)
                if R == 4:
                    # The products of both pieces first is faster where their sums take few registers.
                    sums = ()
                    for piece in gl.static_range(PIECES):
                        sums = sums + (sum_values(attended[PIECES * i + piece], v, weights[piece], mma),)
                    for piece in gl.static_range(PIECES):
                        new_attended = new_attended + (
                            add_sums(attended[PIECES * i + piece], decay, sums[piece]),
                        )
                else:
                    for piece in gl.static_range(PIECES):
                        x = attended[PIECES * i + piece]
                        new_attended = new_attended + (
                            add_sums(x, decay, sum_values(x, v, weights[piece], mma)),
                        )
                if EARLY:
                    first = i * VALUE_BLOCK
                    next_values = next_values + (
                        load_values(values_at, coming, W, P, VALUE_BITS, D, VALUE_BLOCKS[i], first),
                    )
            attended = new_attended
            if EARLY:
                values = next_values
            else:
                keys = load_tile_keys(keys_at, coming, W, P, KEY_BITS, D)
            offset = coming
            page = pages_of_tile(run_page + (tile + 2 + PREFETCH) * (W * P), end_page, W, P)
            block = find_blocks(table_row, page, PAGES_OF_BLOCK, OFFSET)

    total = gl.convert_layout(gl.sum(total, axis=1), ROW)
    half_weight = gl.convert_layout(gl.sum(weight_sum, axis=1), ROW) * (0.5 * WEIGHT_ONE)  # of c + 1/2
    highest = gl.max(maximum, axis=0)  # [R]
    share = gl.exp2(maximum - highest[None, :])
    sums = gl.sum(total * share, axis=0)
    out_row = (item * KV_HEADS + head) * ROW_GROUPS + group
    for i in gl.static_range(len(VALUE_BLOCKS)):
        for piece in gl.static_range(PIECES):
            store_attended(
                partial + out_row * R * D + i * VALUE_BLOCK,
                attended[PIECES * i + piece],
                half_weight,
                share,
                piece,
                W,
                R,
                D,
                VALUE_BITS,
                VALUE_BLOCKS[i],
            )
    r = gl.arange(0, R, highest.type.layout)
    gl.store(stats + (out_row * R + r) * 2, highest)
    gl.store(stats + (out_row * R + r) * 2 + 1, sums)
    if FUSED:
        gl.thread_barrier()
        counter = counters + sequence * PROGRAMS + gl.program_id(1)
        count = gl.load(splits + 2 * sequence + 1)
        arrived = 0
        if count > 1:
            arrived = gl.atomic_add(counter, 1, sem="acq_rel", scope="gpu")
        if arrived == count - 1:
            gl.thread_barrier()
            merge_splits(
                attended_out,
                partial,
                stats,
                sinks,
                unit,
                gl.load(splits + 2 * sequence),
                count,
                gl.program_id(1),
                total_rows,
                group * R,
                head * G,
                sequence * query_len,
                W,
                R,
                D,
                PROGRAMS,
                G,
                KV_HEADS * G,
            )
            gl.store(counter, 0)
