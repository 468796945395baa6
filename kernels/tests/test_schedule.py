"""The device-side table of work items, compared with what it promises."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from turboquant_kernels.decode.schedule import Schedule, fill, max_items


def spans(lens, slots, device, query_len=1, window=None, tile_pages=8, **options):
    """Per sequence the (first, end) pages of its items, and the table."""
    schedule = Schedule.empty(len(lens), slots, device)
    seq_lens = torch.tensor(lens, dtype=torch.int32, device=device)
    fill(schedule, seq_lens, query_len, window, tile_pages, **options)
    items, splits = schedule.items.tolist(), schedule.splits.tolist()
    found = []
    for sequence, (first, count) in enumerate(splits):
        mine = items[first : first + count]
        assert all(item[0] == sequence for item in mine)
        found.append([(item[1], item[2]) for item in mine])
    used = sum(count for _, count in splits)
    assert all(first >= end for _, first, end, _ in items[used:])
    return found


@settings(max_examples=15)
@given(lens=st.lists(st.integers(0, 5000), min_size=1, max_size=9), slots=st.integers(1, 12))
def test_items_cover_each_sequence_once_in_order(device, lens, slots):
    for length, parts in zip(lens, spans(lens, slots, device), strict=True):
        pages = math.ceil(length / 16)
        ends = [0, *(end for _, end in parts)]
        assert [first for first, _ in parts] == ends[:-1]
        assert ends[-1] == pages
        assert all(first < end for first, end in parts)


@settings(max_examples=15)
@given(lens=st.lists(st.integers(1, 5000), min_size=1, max_size=9), slots=st.integers(1, 12))
def test_no_split_could_be_shorter(device, lens, slots):
    """The longest split has as few tiles as any deal with so many items can have."""
    parts = spans(lens, slots, device)
    longest = max(math.ceil((end - first) / 8) for split in parts for first, end in split)
    tiles = [math.ceil(length / 128) for length in lens]
    if longest > 1:
        assert sum(math.ceil(count / (longest - 1)) for count in tiles) > max_items(len(lens), slots)


@pytest.mark.parametrize("query_len", [1, 3])
def test_a_window_leaves_out_the_pages_before_it(device, query_len):
    """The first query token of length 1000 - query_len + 1 sees the last 100 positions up to its own."""
    (parts,) = spans([1000], 4, device, query_len=query_len, window=100, tile_pages=1)
    assert parts[0][0] == (1000 - query_len + 1 - 100) // 16
    assert parts[-1][1] == 63


@pytest.mark.parametrize("tile_pages", [2, 16])
def test_splits_begin_where_the_tokens_of_a_key_anchor_do(device, tile_pages):
    """Those of the first page that the window sees, 18, and those where a split of few pages would end."""
    (parts,) = spans([780], 5, device, window=485, tile_pages=tile_pages, first_multiple=8)
    assert parts[0][0] == 16
    assert all(first % 8 == 0 for first, _ in parts)
    assert parts[-1][1] == 49
    assert len(parts) == {2: 5, 16: 3}[tile_pages]


def test_a_sequence_without_tokens_has_no_item(device):
    assert spans([0, 40, 0], 4, device) == [[], [(0, 3)], []]


@pytest.mark.parametrize("query_len", [1, 2])
def test_with_a_raw_block_sequences_end_where_the_last_query_token_finds_its_block(query_len, device):
    lens = [0, 1, 128, 129, 256, 257, 300]
    parts = spans(lens, 16, device, query_len=query_len, raw_block=True)
    assert [split[-1][1] if split else 0 for split in parts] == [0, 0, 0, 8, 8, 16, 16]


@pytest.mark.parametrize(("window", "first"), [(20, None), (45, None), (46, 15), (200, 6)])
def test_a_window_that_begins_in_the_raw_block_leaves_no_item(window, first, device):
    """The query stands at 300, its block begins at 256: page 16."""
    (parts,) = spans([301], 4, device, window=window, raw_block=True)
    assert (parts[0][0] if parts else None) == first
    assert (parts[-1][1] if parts else 16) == 16
