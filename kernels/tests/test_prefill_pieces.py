"""The plan of pieces: every query sees each stored key of its window once, and its own block's raw keys."""

from collections import Counter

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from plain_attention import seen_keys
from test_prefill_tiles import flash_2, flash_3, lengths

from turboquant_kernels.formats import BLOCK_TOKENS, PAGE_TOKENS
from turboquant_kernels.prefill.attention import flash_attend, flash_page_tokens
from turboquant_kernels.prefill.blocks import plan
from turboquant_kernels.prefill.pieces import MOST_PADDING, plan_pieces
from turboquant_kernels.prefill.tiles import ITEM_TOKENS

SCRATCHES = st.integers(BLOCK_TOKENS, 8 * BLOCK_TOKENS)
WINDOWS = st.none() | st.integers(1, 1000) | st.sampled_from([1, 2, 127, 128, 129, 130, 256])
BATCHES = st.lists(st.tuples(st.integers(0, 300), st.integers(0, 600)), min_size=1, max_size=3)
"""Sequences by their new tokens and the tokens before these."""
PAGES = st.sampled_from([BLOCK_TOKENS, 3 * BLOCK_TOKENS])

CUT_WINDOW = {"capacity": 128, "window": 400, "batch": [(300, 500)], "page_tokens": BLOCK_TOKENS}
MANY_ENDS = {"capacity": 1024, "window": 200, "batch": [(9, 130), (40, 300), (130, 250)], "page_tokens": 384}


def positions_in_scratch(tile):
    """Of each row of the scratch its sequence and position."""
    scratch = {}
    for sequence, page, row, tokens in tile.items.tolist():
        assert tokens == ITEM_TOKENS
        for i in range(tokens):
            assert row + i not in scratch, "a row of the scratch is filled twice"
            scratch[row + i] = sequence, page * PAGE_TOKENS + i
    assert sorted(scratch) == list(range(tile.keys))
    return scratch


def readers(tile, rows, page_tokens):
    """Of each reader: the rows of its queries, -1 for padding, its sequence and the positions of its keys."""
    scratch = positions_in_scratch(tile)
    row_of_query = torch.arange(rows)[tile.rows] if isinstance(tile.rows, slice) else tile.rows
    assert len(row_of_query) == tile.queries == int(tile.query_starts[-1])
    for (q0, q1), length, table in zip(
        tile.query_starts.unfold(0, 2, 1).tolist(),
        tile.key_lens.tolist(),
        tile.block_table.tolist(),
        strict=True,
    ):
        assert 0 < q1 - q0 <= tile.max_queries
        assert 0 < length <= tile.max_keys
        keys = [scratch[table[i // page_tokens] * BLOCK_TOKENS + i % page_tokens] for i in range(length)]
        (sequence,) = {sequence for sequence, _ in keys}
        positions = [position for _, position in keys]
        assert positions == list(range(positions[0], positions[0] + length)), "keys stand in order"
        yield row_of_query[q0:q1].tolist(), sequence, positions


def stored_and_seen(batch, window):
    """Which stored tokens each query sees, by the definition: int [rows, positions] of zeros and ones."""
    _, seq_lens = lengths(batch)
    position = torch.cat(
        [torch.arange(length - new, length) for (new, _), length in zip(batch, seq_lens, strict=True)]
    )
    key = torch.arange(max(seq_lens))
    seen = key < position[:, None] // BLOCK_TOKENS * BLOCK_TOKENS
    return (seen if window is None else seen & (key > position[:, None] - window)).int()


@settings(max_examples=40)
@given(capacity=SCRATCHES, window=WINDOWS, batch=BATCHES, page_tokens=PAGES)
@example(**CUT_WINDOW)
@example(**MANY_ENDS)
def test_a_query_sees_each_stored_key_of_its_window_once(capacity, window, batch, page_tokens):
    starts, seq_lens = lengths(batch)
    pieces = plan_pieces(starts, seq_lens, capacity=capacity, window=window, page_tokens=page_tokens)
    # How often each query sees each position.
    seen_times = torch.zeros(starts[-1], max(seq_lens), dtype=torch.int)
    tiles_of: Counter[int] = Counter()
    for tile in pieces.tiles:
        assert tile.keys <= capacity
        for rows, sequence, positions in readers(tile, starts[-1], page_tokens):
            seen = seen_keys(len(rows), len(positions), False, tile.left)
            assert seen.any(-1).all(), "a query sees no key of a segment"
            queries = [row for row in rows if row >= 0]
            assert rows == queries + [-1] * (len(rows) - len(queries))
            assert all(starts[sequence] <= row < starts[sequence + 1] for row in queries)
            tiles_of.update(queries)
            seen_times[queries, positions[0] : positions[-1] + 1] += seen[: len(queries)].int()
    assert torch.equal(seen_times, stored_and_seen(batch, window))
    assert pieces.is_cut == any(count > 1 for count in tiles_of.values())


@settings(max_examples=60)
@given(window=WINDOWS, batch=BATCHES)
def test_pieces_have_the_raw_keys_of_their_blocks(window, batch):
    starts, seq_lens = lengths(batch)
    pieces = plan_pieces(starts, seq_lens, capacity=1024, window=window)
    row = own = 0
    for (sequence, block), first_row, end_row, first_key, end_key in zip(
        pieces.pieces.tolist(),
        pieces.query_starts.tolist(),
        pieces.query_starts[1:].tolist(),
        pieces.key_starts.tolist(),
        pieces.key_starts[1:].tolist(),
        strict=False,
    ):
        assert (first_row, first_key) == (row, own)
        row, own = end_row, end_key
        end = seq_lens[sequence] - (starts[sequence + 1] - end_row)
        assert 0 < end_row - first_row <= pieces.max_queries
        assert (end - 1) // BLOCK_TOKENS == block
        assert end - block * BLOCK_TOKENS == end_key - first_key <= pieces.max_own_keys
        assert end_row - first_row <= end_key - first_key
    assert (row, own) == (pieces.rows, pieces.own_keys) == (starts[-1], own)
    assert pieces.is_begun == any(new and before % BLOCK_TOKENS for new, before in batch)


@settings(max_examples=60)
@given(capacity=SCRATCHES, window=WINDOWS, batch=BATCHES)
def test_no_block_before_the_window_of_the_first_new_token_is_read(capacity, window, batch):
    """The engine has freed those."""
    for tile in plan_pieces(*lengths(batch), capacity=capacity, window=window).tiles:
        for sequence, page, _, _ in tile.items.tolist():
            new, before = batch[sequence]
            first_seen = 0 if window is None else max(0, before - window + 1)
            assert page * PAGE_TOKENS >= first_seen // BLOCK_TOKENS * BLOCK_TOKENS
            assert page * PAGE_TOKENS < (before + new) // BLOCK_TOKENS * BLOCK_TOKENS


@pytest.mark.parametrize("bounds", [flash_2, flash_3])
@settings(max_examples=40)
@given(capacity=SCRATCHES, window=WINDOWS, batch=BATCHES)
@example(capacity=128, window=400, batch=[(300, 500)])
def test_flash_attention_sees_the_same_keys(bounds, capacity, window, batch):
    """By its sources: a bound that is open or too large is set by the longest segment it is told of."""
    pieces = plan_pieces(*lengths(batch), capacity=capacity, window=window)

    def check(starts, lens, max_queries, max_keys, causal, left):
        def varlen(*, window_size, causal, max_seqlen_q, max_seqlen_k, **_):
            low, high = bounds(window_size, causal, max_seqlen_q, max_seqlen_k)
            for n, m in zip(starts.diff().tolist(), lens.tolist(), strict=True):
                position, key = m - n + torch.arange(n)[:, None], torch.arange(m)
                seen = torch.ones(n, m, dtype=torch.bool)
                if low is not None:
                    seen = (key >= position - low) & (key <= position + high)
                assert torch.equal(seen, seen_keys(n, m, causal, left))

        flash_attend(varlen, 2)(
            *[torch.empty(0)] * 3,
            query_starts=starts,
            max_queries=max_queries,
            max_keys=max_keys,
            scale=1.0,
            causal=causal,
            left=left,
            soft_cap=None,
        )

    for tile in pieces.tiles:
        check(tile.query_starts, tile.key_lens, tile.max_queries, tile.max_keys, False, tile.left)
    if pieces.rows:
        own = pieces.query_starts, pieces.key_starts.diff(), pieces.max_queries, pieces.max_own_keys
        check(*own, True, pieces.own_left)


def test_a_long_chunk_is_one_call():
    pieces = plan(
        [0, 8192], [32768], kv_heads=8, head_dim=128, dtype=torch.bfloat16, device=torch.device("cpu")
    )
    (tile,) = pieces.tiles
    assert (tile.rows, tile.left, tile.keys) == (slice(0, 8192), None, 32768 - BLOCK_TOKENS)
    assert (len(pieces.pieces), pieces.is_begun, pieces.is_cut) == (64, False, False)


def test_short_prompts_with_a_window_are_two_calls():
    """However they end: those that the window holds wholly, and the others."""
    batch = [(130 + 3 * i, 0) for i in range(30)] + [(5 + i, 1030 + i) for i in range(30)]
    tiles = plan_pieces(*lengths(batch), capacity=32768, window=256).tiles
    assert [tile.left for tile in tiles] == [None, 127]
    assert [len(tile.key_lens) for tile in tiles] == [30, 30]


def test_padding_is_bounded():
    batch = [(3, 640)] * 200
    tiles = plan_pieces(*lengths(batch), capacity=1 << 20, window=300).tiles
    assert all(int((tile.rows < 0).sum()) <= MOST_PADDING for tile in tiles)
    assert sum(int((tile.rows >= 0).sum()) for tile in tiles) == 600


def test_a_window_that_fits_beside_a_piece_is_never_cut():
    pieces = plan_pieces([0, 8192], [100_000], capacity=32768, window=32768 - 2 * BLOCK_TOKENS)
    assert not pieces.is_cut
    assert {tile.left for tile in pieces.tiles} == {32768 - 3 * BLOCK_TOKENS - 1}


def test_a_scratch_of_less_than_a_block_is_refused():
    with pytest.raises(ValueError, match="scratch of 127 tokens"):
        plan_pieces([0, 1], [200], capacity=127)


def test_indices_begin_where_a_pointer_is_aligned():
    """Else Triton would compile a kernel once more for a pointer that is not."""
    for sequences in range(1, 9):
        pieces = plan_pieces(range(0, 3 * sequences + 1, 3), [260] * sequences, capacity=2048, window=140)
        (tile,) = pieces.tiles
        views = [pieces.pieces, pieces.query_starts, pieces.key_starts, tile.rows, tile.items]
        for view in (*views, tile.query_starts, tile.key_lens, tile.block_table):
            assert view.dtype == torch.int32
            assert view.storage_offset() * view.element_size() % 16 == 0


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 192, 256])
def test_pages_are_whole_blocks(head_dim):
    assert flash_page_tokens(head_dim, 2) == BLOCK_TOKENS
    assert flash_page_tokens(head_dim, 3) % BLOCK_TOKENS == 0


def test_flash_attention_splits_keys_where_queries_are_few():
    """It counts the queries of the longest segment alone, and holds an output for each split."""
    asked = []

    def varlen(*, num_splits, **_):
        asked.append(num_splits)
        return None, None

    for version, queries, block_table in [(3, 8192, True), (3, 10, True), (2, 8192, True), (3, 8192, None)]:
        flash_attend(varlen, version)(
            torch.empty(queries, 32, 1),
            *[torch.empty(0)] * 2,
            query_starts=None,
            block_table=block_table,
            max_queries=128,
            max_keys=1024,
            scale=1.0,
            causal=False,
            left=None,
            soft_cap=None,
        )
    assert asked == [1, 0, 0, 0]
