"""The plan of context tiles: every key that a query sees, once, and none that the engine may have freed."""

from collections import Counter

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from plain_attention import seen_keys

from turboquant_kernels.formats import PAGE_TOKENS
from turboquant_kernels.prefill.attention import flash_attend
from turboquant_kernels.prefill.tiles import ITEM_TOKENS, LEAST_CAPACITY, plan_tiles

SCRATCHES = st.integers(LEAST_CAPACITY, 300)
WINDOWS = st.none() | st.integers(1, 500)
BATCHES = st.lists(st.tuples(st.integers(0, 200), st.integers(0, 300)), min_size=1, max_size=3)
"""Sequences by their new tokens and the tokens before these."""

FEWER_KEYS = {"capacity": 128, "window": 139, "batch": [(40, 100)]}
"""Two segments, the first of which has fewer keys than queries."""


def lengths(batch):
    """`plan_tiles`'s query_start_loc and seq_lens."""
    starts = torch.tensor([0, *(queries for queries, _ in batch)]).cumsum(0).tolist()
    return starts, [queries + prefix for queries, prefix in batch]


def segments(tile):
    """Of each segment: its rows of the batch, its sequence and the positions of its keys."""
    scratch = {}
    for sequence, page, row, tokens in tile.items.tolist():
        for i in range(tokens):
            scratch[row + i] = sequence, page * PAGE_TOKENS + i
    assert sorted(scratch) == list(range(tile.keys)), "rows of the scratch are filled once"
    queries, keys = (x.unfold(0, 2, 1).tolist() for x in (tile.query_starts, tile.key_starts))
    for (q0, q1), (k0, k1) in zip(queries, keys, strict=True):
        (sequence,) = {scratch[row][0] for row in range(k0, k1)}
        positions = [scratch[row][1] for row in range(k0, k1)]
        assert positions == list(range(positions[0], positions[0] + k1 - k0)), "keys stand in order"
        yield range(tile.rows.start + q0, tile.rows.start + q1), sequence, positions
    assert tile.rows.start + q1 == tile.rows.stop
    assert k1 == tile.keys


def expected_pairs(batch, window):
    """(row, key position) of what each query sees, by the definition."""
    starts, seq_lens = lengths(batch)
    for (queries, _), start, length in zip(batch, starts, seq_lens, strict=False):
        for i in range(queries):
            position = length - queries + i
            first = 0 if window is None else max(0, position - window + 1)
            yield from ((start + i, key) for key in range(first, position + 1))


@settings(max_examples=100)
@given(capacity=SCRATCHES, window=WINDOWS, batch=BATCHES)
@example(**FEWER_KEYS)
def test_a_query_sees_each_key_of_its_window_once(capacity, window, batch):
    starts, seq_lens = lengths(batch)
    pairs = []
    for tile in plan_tiles(starts, seq_lens, capacity=capacity, window=window):
        assert tile.keys <= capacity
        for rows, _, positions in segments(tile):
            seen = seen_keys(len(rows), len(positions), tile.causal, tile.left)
            assert seen.any(-1).all(), "a query sees no key of a segment"
            pairs += [(rows[i], positions[j]) for i, j in seen.nonzero().tolist()]
    assert sorted(pairs) == list(expected_pairs(batch, window))


@settings(max_examples=100)
@given(capacity=SCRATCHES, window=WINDOWS, batch=BATCHES)
def test_no_page_before_the_window_of_the_first_new_token_is_read(capacity, window, batch):
    """The engine has freed the blocks there. Where a block begins a page does."""
    starts, seq_lens = lengths(batch)
    for tile in plan_tiles(starts, seq_lens, capacity=capacity, window=window):
        for sequence, page, _, tokens in tile.items.tolist():
            first_seen = 0 if window is None else max(0, batch[sequence][1] - window + 1)
            assert page >= first_seen // PAGE_TOKENS
            assert page * PAGE_TOKENS + tokens <= seq_lens[sequence]


@settings(max_examples=50)
@given(capacity=SCRATCHES, window=WINDOWS, batch=BATCHES)
def test_a_work_item_has_one_key_anchor(capacity, window, batch):
    for tile in plan_tiles(*lengths(batch), capacity=capacity, window=window):
        for _, page, _, tokens in tile.items.tolist():
            first = page * PAGE_TOKENS
            assert tokens > 0
            assert first // ITEM_TOKENS == (first + tokens - 1) // ITEM_TOKENS


@settings(max_examples=50)
@given(capacity=SCRATCHES, window=WINDOWS, batch=BATCHES)
def test_the_causal_tile_of_a_query_is_its_last_and_several_are_merged(capacity, window, batch):
    starts, seq_lens = lengths(batch)
    tiles = plan_tiles(starts, seq_lens, capacity=capacity, window=window)
    count = Counter(row for tile in tiles for row in range(starts[-1])[tile.rows])
    finished = set()
    for tile in tiles:
        rows = range(starts[-1])[tile.rows]
        assert finished.isdisjoint(rows)
        finished.update(rows if tile.causal else ())
        assert tile.merged == any(count[row] > 1 for row in rows)
        assert tile.max_queries == int(tile.query_starts.diff().max())
        assert tile.max_keys == int(tile.key_starts.diff().max())
    assert finished == set(range(starts[-1]))


def flash_2(window_size, causal, max_queries, max_keys):
    """What `mha_varlen_fwd` and `set_params_fprop` of FlashAttention-2 make of a window: (left, right)."""
    left, right = window_size[0], 0 if causal else window_size[1]
    left, right = (-1 if side >= max_keys else side for side in (left, right))
    if left < 0 and right < 0:
        return None, None
    return max_keys if left < 0 else left, max_keys if right < 0 else right


def flash_3(window_size, causal, max_queries, max_keys):
    """The same of FlashAttention-3."""
    left, right = window_size
    left = -1 if left >= max_keys - 1 else left
    right = 0 if causal else -1 if right >= max_queries - 1 else right
    if left < 0 and right < 0:
        return None, None
    return max_keys - 1 if left < 0 else left, max_queries - 1 if right < 0 else right


@pytest.mark.parametrize("bounds", [flash_2, flash_3])
@settings(max_examples=50)
@given(capacity=SCRATCHES, window=WINDOWS, batch=BATCHES)
@example(**FEWER_KEYS)
def test_flash_attention_sees_the_same_keys(bounds, capacity, window, batch):
    """By its sources: a bound that is open or too large is set by the longest segment it is told of."""
    starts, seq_lens = lengths(batch)
    for tile in plan_tiles(starts, seq_lens, capacity=capacity, window=window):

        def varlen(*, window_size, causal, max_seqlen_q, max_seqlen_k, tile=tile, **_):
            left, right = bounds(window_size, causal, max_seqlen_q, max_seqlen_k)
            for rows, _, positions in segments(tile):
                n, m = len(rows), len(positions)
                position, key = m - n + torch.arange(n)[:, None], torch.arange(m)
                seen = torch.ones(n, m, dtype=torch.bool)
                if left is not None:
                    seen = (key >= position - left) & (key <= position + right)
                assert torch.equal(seen, seen_keys(n, m, tile.causal, tile.left))
            return None, None

        flash_attend(varlen, 2)(
            *[torch.empty(0)] * 3,
            query_starts=tile.query_starts,
            key_starts=tile.key_starts,
            max_queries=tile.max_queries,
            max_keys=tile.max_keys,
            scale=1.0,
            causal=tile.causal,
            left=tile.left,
            soft_cap=None,
        )


def test_one_tile_where_everything_fits():
    (tile,) = plan_tiles([0, 8192], [32768], capacity=32768)
    assert (tile.causal, tile.merged, tile.keys) == (True, False, 32768)


def test_short_sequences_share_the_tile_of_a_long_one_with_a_window():
    (tile,) = plan_tiles([0, 100, 130], [5000, 30], capacity=2048, window=1024)
    assert (tile.left, tile.num_segments) == (1023, 2)


def test_a_window_twice_the_scratch_is_expanded_once_for_half_a_scratch_of_queries():
    tiles = plan_tiles([0, 8192], [100_000], capacity=32768, window=65536)
    assert [tile.causal for tile in tiles] == [False, False, True]
    assert sum(tile.keys for tile in tiles) < 65536 + 8192 + PAGE_TOKENS


def test_a_scratch_of_a_few_tokens_is_refused():
    with pytest.raises(ValueError, match="scratch of 63 tokens"):
        plan_tiles([0, 1], [200], capacity=63)


def test_indices_begin_where_a_pointer_is_aligned():
    """Else Triton would compile the expansion once more for a pointer that is not."""
    for sequences in range(1, 9):
        (tile,) = plan_tiles(range(sequences + 1), [1] * sequences, capacity=512)
        assert tile.query_starts.tolist() == tile.key_starts.tolist() == list(range(sequences + 1))
        for view in (tile.items, tile.query_starts, tile.key_starts):
            assert view.storage_offset() * view.element_size() % 16 == 0
            assert view.untyped_storage().data_ptr() == tile.indices.untyped_storage().data_ptr()


def test_a_moved_tile_is_the_same():
    (tile,) = plan_tiles([0, 20, 23], [70, 37], capacity=512, window=50)
    moved = tile.to(torch.device("cpu"))
    assert torch.equal(moved.indices, tile.indices)
    assert (moved.rows, moved.left, moved.keys) == (tile.rows, tile.left, tile.keys)
