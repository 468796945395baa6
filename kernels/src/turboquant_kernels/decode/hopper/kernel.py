"""Decode attention for Hopper, in Gluon: an item's compressed pages to its partial result.

Each warp owns whole tokens. A tile of 16 to 64 tokens goes

    pages -> ring in shared memory -> int8 operands -> logits -> weights -> int8 operands -> attended

without barriers between warps; those of a program are merged once, at its end (`epilogue`). What makes it
fast (measured in docs/benchmarks.md):

- Tokens are the M dimension of `mma.m16n8k32`, and rows (query heads of a KV head, times query tokens) the N
  dimension, two columns each: the int8 halves of a 16-bit query. Four rows need no padding.
- Pages are copied as they are stored, a tile ahead, without registers (`ring`); `fragments` says how codes
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
    load_logits,
    prefetch_anchors,
    store_logits,
    tiles_of_run,
)
from turboquant_kernels.decode.hopper.epilogue import merge_warps, share_rows, share_sums
from turboquant_kernels.decode.hopper.merge import merge_splits, store_alone, store_zeros
from turboquant_kernels.decode.hopper.operands import (
    blocks_of,
    key_operand,
    load_operands,
    load_shared_queries,
    load_table,
)
from turboquant_kernels.decode.hopper.pages import find_blocks, offset_of, pages_of_tile
from turboquant_kernels.decode.hopper.ring import (
    STAGES,
    fill,
    load_keys,
    load_scales,
    load_values,
    make_ring,
    ring_rows,
    wait,
)
from turboquant_kernels.decode.hopper.values import (
    WEIGHT_ONE,
    add_sums,
    no_attended,
    sum_values,
    value_operand,
    weights_of,
)
from turboquant_kernels.decode.logits import LOG2_E, NOTHING

_LOG2 = gl.constexpr("lg2.approx.ftz.f32 $0, $1;")


@gluon.jit
def _products(
    tile,
    registers,
    q,
    W: gl.constexpr,
    P: gl.constexpr,
    R: gl.constexpr,
    D: gl.constexpr,
    BITS: gl.constexpr,
    ASM: gl.constexpr,
    SHARED_QUERIES: gl.constexpr,
    QUERIES_AT: gl.constexpr,
    PAGE_WORDS: gl.constexpr,
    mma: gl.constexpr,
):
    """Integer products of a tile's keys and the queries, halves put together: float32 [W, 16 P tokens, R]."""
    BLOCKS: gl.constexpr = blocks_of(D, 128)
    A: gl.constexpr = gl.DotOperandLayout(0, mma, 4)
    B: gl.constexpr = gl.DotOperandLayout(1, mma, 4)
    products = gl.full([W, P * 16, 2 * R], 0, gl.int32, mma)
    packed = ()
    for i in gl.static_range(len(BLOCKS)):
        packed = packed + (load_keys(tile, W, P, BITS, D, BLOCKS[i], i * 128, PAGE_WORDS),)
    for i in gl.static_range(len(BLOCKS)):
        k8 = key_operand(packed[i], registers, W, P, BITS, BLOCKS[i], i, ASM, A)
        if SHARED_QUERIES:
            q8 = load_shared_queries(QUERIES_AT + i * 256 * R, W, 2 * R, BLOCKS[i], B)
        else:
            q8 = q[i]
        products = mma_v2(k8, q8, products)
    high, low = gl.split(gl.reshape(products, [W, P * 16, R, 2]))
    return (high * 256 + low).to(gl.float32)


@gluon.jit
def _load_rows(
    query_scale,
    query_half_sum,
    first_token,
    first_row,
    total_rows,
    first_head,
    q_heads: gl.constexpr,
    before,
    G: gl.constexpr,
    W: gl.constexpr,
    R: gl.constexpr,
    ROW: gl.constexpr,
):
    """What is known of each row, [W, R]: its query's scale, its half sum times that, and the last position
    that it sees: row i of n query tokens sees up to `before` + i, where `before` is the length less n."""
    row = first_row + gl.arange(0, R, gl.SliceLayout(0, ROW))
    used = row < total_rows
    query_token = row // G
    q_index = (first_token + query_token) * q_heads + first_head + row % G
    no_warp = (gl.arange(0, W, gl.SliceLayout(1, ROW)) * 0)[:, None]
    there = used[None, :] & (no_warp == 0)
    scale = gl.load(query_scale + q_index[None, :] + no_warp, mask=there, other=0.0)
    half_sum = gl.load(query_half_sum + q_index[None, :] + no_warp, mask=there, other=0.0) * scale
    last = (before + query_token)[None, :] + no_warp
    return scale, half_sum, last


@gluon.jit
def _attend(
    tile,
    registers,
    weights,
    attended,
    decay,
    W: gl.constexpr,
    P: gl.constexpr,
    R: gl.constexpr,
    D: gl.constexpr,
    BITS: gl.constexpr,
    ASM: gl.constexpr,
    LARGEST: gl.constexpr,
    AT: gl.constexpr,
    PAGE_WORDS: gl.constexpr,
    mma: gl.constexpr,
):
    """attended * decay + the tile's values, which begin at word AT of a page, times their weights: one
    float32 [W, coordinates, R] for each block of at most LARGEST coordinates and piece of it."""
    BLOCKS: gl.constexpr = blocks_of(D, LARGEST)
    PIECES: gl.constexpr = len(weights)
    A: gl.constexpr = gl.DotOperandLayout(0, mma, 4)
    result = ()
    for i in gl.static_range(len(BLOCKS)):
        packed = load_values(tile, W, P, BITS, D, BLOCKS[i], i * LARGEST, AT, PAGE_WORDS)
        v = value_operand(packed, registers, W, P, BITS, BLOCKS[i], ASM, A)
        if R == 4:
            # The products of both pieces first is faster where their sums take few registers.
            sums = ()
            for piece in gl.static_range(PIECES):
                sums = sums + (sum_values(attended[PIECES * i + piece], v, weights[piece], mma),)
            for piece in gl.static_range(PIECES):
                result = result + (add_sums(attended[PIECES * i + piece], decay, sums[piece]),)
        else:
            for piece in gl.static_range(PIECES):
                x = attended[PIECES * i + piece]
                result = result + (add_sums(x, decay, sum_values(x, v, weights[piece], mma)),)
    return result


@gluon.jit
def _log2_of_scale(scale):
    """Base-2 logarithm of fp16 scales in float32. 2**-40 is added, which is nothing to any scale but zero."""
    return gl.inline_asm_elementwise(
        _LOG2, "=f,f", [scale + 2.0**-40], dtype=gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def _store_split(partial, stats, x, highest, sums, row, d, FIRST: gl.constexpr, D: gl.constexpr):
    """Stores a split's sums x, float32 [R, N], of coordinates d, [1, N]; with the FIRST of them its stats."""
    gl.store(partial + row[:, None] * D + d, x, mask=(d < D) & (row >= 0)[:, None])
    if FIRST:
        gl.store(stats + row * 2, highest)
        gl.store(stats + row * 2 + 1, sums)


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
    EVICT_FIRST: gl.constexpr,
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
    if FUSED:
        count = gl.load(splits + 2 * sequence + 1)

    # Rows: query head g of token i is row i * G + g, where G query heads share the KV head.
    G: gl.constexpr = GROUP
    total_rows = query_len * G

    # Pages first: what follows runs while they are on their way.
    tiles = gl.cdiv(end_page - first_page, W * P)
    table_row = block_table + sequence * block_table_stride
    pages_at = kv_cache + head * PAGE_WORDS
    RING_ROWS: gl.constexpr = ring_rows(W, P, PAGE_WORDS, 256 * R)
    QUERY_ROWS: gl.constexpr = len(KEY_BLOCKS) if SHARED_QUERIES else 0
    memory = gl.allocate_shared_memory(
        gl.int32, [RING_ROWS + QUERY_ROWS + ANCHOR, 64 * R], gl.SwizzledSharedLayout(1, 1, 1, order=[0])
    )
    blocks = ()
    for stage in gl.static_range(STAGES):
        page = pages_of_tile(first_page + stage * (W * P), end_page, W, P)
        blocks = blocks + (find_blocks(table_row, page, PAGES_OF_BLOCK, OFFSET),)
    if ANCHOR:
        # Ahead of the pages, which take longer to come than the logits to be made.
        anchors = kv_cache + PAGES_OF_BLOCK * ALL_HEADS + head * (D // 2)
        prefetch_anchors(
            anchors,
            table_row,
            block_stride,
            first_page,
            end_page,
            W,
            D,
            KV_HEADS,
            PAGES_OF_BLOCK,
            OFFSET,
        )
    ring, arrivals = make_ring(W, P, PAGE_WORDS)
    for stage in gl.static_range(STAGES):
        page = pages_of_tile(first_page + stage * (W * P), end_page, W, P)
        offset = offset_of(blocks[stage], page, block_stride, PAGES_OF_BLOCK, ALL_HEADS)
        to = ring + stage * (P * PAGE_WORDS * 4)
        fill(to, arrivals + stage * 8, pages_at + offset, tiles > stage, W, P, PAGE_WORDS, EVICT_FIRST)

    q = load_operands(
        queries,
        memory,
        RING_ROWS,
        sequence * query_len,
        group * R,
        total_rows,
        head * G,
        KV_HEADS * G,
        G,
        W,
        R,
        D,
        KEY_BITS,
        SHARED_QUERIES,
        B,
    )
    key_registers = load_table(tables, KEY_REGISTERS, W, P)
    value_registers = load_table(tables + 32 * KEY_REGISTERS, VALUE_REGISTERS, W, P)

    products = gl.full([W, T, N], 0, gl.int32, mma)
    high, _ = gl.split(gl.reshape(products, [W, T, R, 2]))
    S: gl.constexpr = high.type.layout  # [W, T, R]
    ROW: gl.constexpr = gl.SliceLayout(1, S)  # [W, R]
    scale, half_sum, last = _load_rows(
        query_scale,
        query_half_sum,
        sequence * query_len,
        group * R,
        total_rows,
        head * G,
        KV_HEADS * G,
        seq_len - query_len,
        G,
        W,
        R,
        ROW,
    )
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

    stage = 0
    parity = 0
    RUN: gl.constexpr = tiles_of_run(P)
    for tile in range(tiles):
        if ANCHOR:
            if tile % RUN == 0:
                if tile > 0:
                    # All warps have done with the logits of the run before.
                    gl.thread_barrier()
                store_logits(
                    memory.index(RING_ROWS + QUERY_ROWS),
                    anchors,
                    table_row,
                    block_stride,
                    first_page + tile * (W * P),
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
        # The blocks of the tile that will take this one's place are looked up while it is computed.
        page = pages_of_tile(first_page + (tile + STAGES) * (W * P), end_page, W, P)
        block = find_blocks(table_row, page, PAGES_OF_BLOCK, OFFSET)
        ready = ring + stage * (P * PAGE_WORDS * 4)
        arrival = arrivals + stage * 8
        wait(arrival, parity)
        s = _products(
            ready,
            key_registers,
            q,
            W,
            P,
            R,
            D,
            KEY_BITS,
            KEY_ASM,
            SHARED_QUERIES,
            RING_ROWS * 256 * R,
            PAGE_WORDS,
            mma,
        )
        key_scale, value_scale = load_scales(ready, W, P, CODE_WORDS, PAGE_WORDS)
        key_scale = gl.convert_layout(
            gl.reshape(key_scale, [W, T]), gl.SliceLayout(2, S), assert_trivial=True
        )[:, :, None]
        value_scale = gl.convert_layout(
            gl.reshape(value_scale, [W, T]), gl.SliceLayout(2, S), assert_trivial=True
        )[:, :, None]
        s = (s * scale[:, None, :] + half_sum[:, None, :]) * key_scale
        if ANCHOR:
            s += load_logits(memory.index(RING_ROWS + QUERY_ROWS), tile % RUN, W, P, R, ROW)[:, None, :]
        if SOFT_CAP:
            # cap * tanh(s / cap), of which logits and cap are in base 2.
            s = soft_cap - 2.0 * soft_cap / (gl.exp2(s * (2.0 * LOG2_E / soft_cap)) + 1.0)
        weighted = s + _log2_of_scale(value_scale)
        tile_first = first_page * 16 + tile * (W * T)
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
        weights = weights_of(p, W, P, R, B, PIECES == 2)
        attended = _attend(
            ready,
            value_registers,
            weights,
            attended,
            decay,
            W,
            P,
            R,
            D,
            VALUE_BITS,
            VALUE_ASM,
            VALUE_BLOCK,
            D * KEY_BITS // 2,
            PAGE_WORDS,
            mma,
        )
        offset = offset_of(block, page, block_stride, PAGES_OF_BLOCK, ALL_HEADS)
        fill(ready, arrival, pages_at + offset, tile + STAGES < tiles, W, P, PAGE_WORDS, EVICT_FIRST)
        stage += 1
        if stage == STAGES:
            stage = 0
            parity = 1 - parity

    memory._keep_alive()
    # What follows uses the ring's memory, from which other warps may still read.
    gl.thread_barrier()

    total = gl.convert_layout(gl.sum(total, axis=1), ROW)
    half_weight = gl.convert_layout(gl.sum(weight_sum, axis=1), ROW) * (0.5 * WEIGHT_ONE)  # of c + 1/2
    maxima = share_rows(maximum, W, R)
    totals = share_rows(total, W, R)
    blocks = ()
    for i in gl.static_range(len(VALUE_BLOCKS)):
        pieces = ()
        for piece in gl.static_range(PIECES):
            pieces = pieces + (attended[PIECES * i + piece],)
        blocks = blocks + (share_sums(pieces, half_weight, W, R, VALUE_BITS, VALUE_BLOCKS[i]),)
    out_row = (item * KV_HEADS + head) * ROW_GROUPS + group
    for i in gl.static_range(len(VALUE_BLOCKS)):
        x, highest, sums = merge_warps(blocks[i], maxima, totals, W, R, VALUE_BLOCKS[i])
        r = gl.arange(0, R, highest.type.layout)
        d = i * VALUE_BLOCK + gl.arange(0, VALUE_BLOCKS[i], gl.SliceLayout(0, x.type.layout))[None, :]
        if FUSED:
            if count == 1:
                store_alone(
                    attended_out,
                    d,
                    x,
                    highest,
                    sums,
                    sinks,
                    unit,
                    group * R + r,
                    total_rows,
                    head * G,
                    sequence * query_len,
                    D,
                    G,
                    KV_HEADS * G,
                )
            else:
                _store_split(partial, stats, x, highest, sums, out_row * R + r, d, i == 0, D)
        else:
            _store_split(partial, stats, x, highest, sums, out_row * R + r, d, i == 0, D)
    if FUSED:
        if count == 1:
            return
        gl.thread_barrier()
        counter = counters + sequence * PROGRAMS + gl.program_id(1)
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
