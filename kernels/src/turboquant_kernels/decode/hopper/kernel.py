"""Decode attention for Hopper, in Gluon: an item's compressed pages to its partial result.

Each warp owns whole tokens. A tile of 16 to 64 tokens goes

    pages -> ring in shared memory -> int8 operands -> logits -> weights -> int8 operands -> sums

without barriers between warps (`tile`); those of a program are merged once, at its end (`epilogue`). What
makes it fast (measured in docs/benchmarks.md):

- Tokens are the M dimension of `mma.m16n8k32`, and rows (query heads of a KV head, times query tokens) the N
  dimension, two columns each: the int8 halves of a 16-bit query. Four rows need no padding.
- Pages are copied as they are stored, a tile ahead, without registers (`ring`); `fragments` says how codes
  become operands in about 8 instructions for 8 codes, of which as few as can be take the pipe of look-ups
  and logic, the busiest.
- Integer sums are exact, so weights are 15-bit fixed-point numbers in two int8 halves (`values`).
- The logits of key anchors are made for many tiles at once (`anchors`).
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.extra.cuda import gdc_launch_dependents

from turboquant_kernels.decode.hopper.anchors import Anchors, load_anchors, store_logits, tiles_of_chunk
from turboquant_kernels.decode.hopper.epilogue import merge_warps, share_rows, share_sums
from turboquant_kernels.decode.hopper.merge import merge_splits, store_alone, store_split, store_zeros
from turboquant_kernels.decode.hopper.operands import load_table
from turboquant_kernels.decode.hopper.pages import Pages, find_tile, pointers_of
from turboquant_kernels.decode.hopper.queries import Rows, load_queries
from turboquant_kernels.decode.hopper.ring import STAGES, fill, make_ring, tile_at, wait
from turboquant_kernels.decode.hopper.tile import (
    Limits,
    Tables,
    attend_tile,
    block_start,
    empty_state,
    no_logits,
)
from turboquant_kernels.decode.hopper.values import WEIGHT_ONE


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
    output,
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
    SPEC: gl.constexpr,
):
    """Partial results of one item, R rows of one KV head; with FUSED the last of a sequence merges them.

    partial, stats: as `plan.DecodePlan` has them. queries, query_scale, query_half_sum: those of
    `QuantizedQueries`. kv_cache: int32 words, blocks `block_stride` words apart. block_table: int32
    [num_seqs, `block_table_stride`]. seq_lens: int32 [num_seqs]. items, splits: as `schedule.Schedule`
    has them. tables: int32 [words, 32], the words of the fragments' tables for keys, then values.
    output, counters, sinks: as `attend.Merged` has them, None without FUSED. window: positions that
    a query sees, with WINDOW. soft_cap: times log2(e), with SOFT_CAP. unit: what sums of values count in.
    anchor_queries: float [tokens, q_heads, D], not rotated, anchor_scale: what their products count in a
    logit, with ANCHOR; else None, as their strides. Items then begin at multiples of `ANCHOR_PAGES`.
    SPEC: a `Specialization`.
    """
    item = gl.program_id(0)
    sequence = gl.load(items + 4 * item)
    first_page = gl.load(items + 4 * item + 1)
    end_page = gl.load(items + 4 * item + 2)
    head = gl.program_id(1) // SPEC.ROW_GROUPS
    first_row = gl.program_id(1) % SPEC.ROW_GROUPS * SPEC.R
    total_rows = query_len * SPEC.GROUP
    if SPEC.FUSED:
        # A sequence without tokens has no item: its zeros come from the item of its number.
        if gl.load(splits + 2 * item + 1, mask=item < num_seqs, other=1) == 0:
            store_zeros(output, Rows(first_row, total_rows, item * query_len, head * SPEC.GROUP), SPEC)
    if first_page >= end_page:
        return
    seq_len = gl.load(seq_lens + sequence)
    if SPEC.FUSED:
        count = gl.load(splits + 2 * sequence + 1)
    rows = Rows(first_row, total_rows, sequence * query_len, head * SPEC.GROUP)
    table_row = block_table + sequence * block_table_stride
    pages = Pages(kv_cache + head * SPEC.PAGE_WORDS, block_stride, table_row, first_page, end_page)
    anchor_words = kv_cache + SPEC.PAGES_OF_BLOCK * SPEC.KV_HEADS * SPEC.PAGE_WORDS + head * (SPEC.D // 2)
    anchors = Anchors(anchor_words, anchor_queries, query_token_stride, query_head_stride, anchor_scale)

    # The first pages are asked for before all else that can wait.
    tiles = gl.cdiv(end_page - first_page, SPEC.W * SPEC.P)
    LOGIT_ROW: gl.constexpr = SPEC.RING_ROWS + SPEC.QUERY_ROWS
    memory = gl.allocate_shared_memory(
        gl.int32, [LOGIT_ROW + SPEC.ANCHOR, 64 * SPEC.R], gl.SwizzledSharedLayout(1, 1, 1, order=[0])
    )
    found = ()
    for stage in gl.static_range(STAGES):
        found = found + (find_tile(pages, stage, SPEC),)
    if SPEC.ANCHOR:
        vectors = load_anchors(anchors, pages, 0, tiles > 0, SPEC)
    ring = make_ring(SPEC)
    for stage in gl.static_range(STAGES):
        fill(ring, stage, pointers_of(pages, found[stage], SPEC), tiles > stage, SPEC)

    ROW: gl.constexpr = gl.SliceLayout(1, no_logits(SPEC).type.layout)
    before = seq_len - query_len
    own = load_queries(queries, query_scale, query_half_sum, rows, before, memory, ROW, SPEC)
    key_table = load_table(tables, SPEC.KEY_REGISTERS, SPEC)
    levels = Tables(key_table, load_table(tables + 32 * SPEC.KEY_REGISTERS, SPEC.VALUE_REGISTERS, SPEC))
    if SPEC.RAW_BLOCK:
        limits = Limits(block_start(before), window, soft_cap)
    else:
        limits = Limits(before + 1, window, soft_cap)
    state = empty_state(SPEC)
    if SPEC.ANCHOR:
        # A loop within a loop: a branch in the loop over tiles costs it registers.
        logits = memory.index(LOGIT_ROW)
        CHUNK: gl.constexpr = tiles_of_chunk(SPEC.P)
        gl.static_assert(CHUNK % (2 * STAGES) == 0)
        for first in range(0, tiles, CHUNK):
            store_logits(logits, vectors, anchors, rows, SPEC)
            end = gl.minimum(first + CHUNK, tiles)
            state = _attend_tiles(state, first, end, tiles, pages, ring, logits, own, levels, limits, SPEC)
            vectors = load_anchors(anchors, pages, end, end < tiles, SPEC)
            # All warps have done with the logits.
            gl.barrier()
    else:
        state = _attend_tiles(state, 0, tiles, tiles, pages, ring, memory, own, levels, limits, SPEC)
    memory._keep_alive()
    if not SPEC.FUSED:
        gdc_launch_dependents()  # `decode.merge` comes while this ends
    # What follows uses the ring's memory, from which other warps may still read.
    gl.barrier()

    total = gl.convert_layout(gl.sum(state.total, axis=1), ROW)
    half_weight = gl.convert_layout(gl.sum(state.scaled, axis=1), ROW) * (0.5 * WEIGHT_ONE)  # of c + 1/2
    references = share_rows(state.reference, SPEC)
    totals = share_rows(total, SPEC)
    blocks = ()
    for i in gl.static_range(len(SPEC.VALUE_BLOCKS)):
        blocks = blocks + (share_sums(state.sums, half_weight, i, SPEC),)
    for i in gl.static_range(len(SPEC.VALUE_BLOCKS)):
        x, reference, weights = merge_warps(blocks[i], references, totals, i, SPEC)
        d = (
            i * SPEC.VALUE_BLOCK
            + gl.arange(0, SPEC.VALUE_BLOCKS[i], gl.SliceLayout(0, x.type.layout))[None, :]
        )
        if SPEC.FUSED:
            if count == 1:
                store_alone(output, sinks, unit, rows, d, x, reference, weights, SPEC)
            else:
                store_split(partial, stats, d, x, reference, weights, i == 0, SPEC)
        else:
            store_split(partial, stats, d, x, reference, weights, i == 0, SPEC)
    if SPEC.FUSED:
        if count == 1:
            return
        gl.barrier()
        counter = counters + sequence * (SPEC.KV_HEADS * SPEC.ROW_GROUPS) + gl.program_id(1)
        arrived = gl.atomic_add(counter, 1, sem="acq_rel", scope="gpu")
        if arrived == count - 1:
            gl.barrier()
            first = gl.load(splits + 2 * sequence)
            merge_splits(output, partial, stats, sinks, unit, rows, first, count, SPEC)
            gl.store(counter, 0)


@gluon.jit
def _attend_tiles(
    state, first, end, tiles, pages, ring, anchor_logits, queries, tables, limits, SPEC: gl.constexpr
):
    """A `SoftmaxState` and tiles `first` to `end` of the item's; `first` is a multiple of 2 * STAGES."""
    stage = 0
    parity = 0
    for tile in range(first, end):
        # The blocks of the tile that will take this one's place are looked up while it is computed.
        found = find_tile(pages, tile + STAGES, SPEC)
        wait(ring, stage, parity)
        position = pages.first * 16 + tile * (SPEC.W * SPEC.P * 16)
        ready = tile_at(ring, stage, SPEC)
        state = attend_tile(
            state, ready, position, anchor_logits, tile - first, queries, tables, limits, SPEC
        )
        fill(ring, stage, pointers_of(pages, found, SPEC), tile + STAGES < tiles, SPEC)
        stage += 1
        if stage == STAGES:
            stage = 0
            parity = 1 - parity
    return state
