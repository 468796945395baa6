"""How a step's batch splits into decodes and prefills."""

import pytest

from turboquant_runtime.backends.batch import decode_query_lens, split_batch


@pytest.mark.parametrize(
    ("lens", "limit", "decodes", "query_len", "prefill_starts"),
    [
        ([1, 1, 1], 1, 3, 1, [0]),
        ([1, 1, 5, 3], 1, 2, 1, [0, 5, 8]),
        ([7, 2], 1, 0, 0, [0, 7, 9]),
        ([4, 4, 4], 5, 3, 4, [0]),
        # With which vLLM pads a batch to the size of a captured graph.
        ([4, 4, 0, 0], 5, 2, 4, [0]),
        ([1, 1, 9, 0], 1, 2, 1, [0, 9]),
        ([0, 0], 1, 0, 0, [0]),
    ],
)
def test_leading_short_sequences_are_decoded(lens, limit, decodes, query_len, prefill_starts) -> None:
    batch = split_batch([sum(lens[:i]) for i in range(len(lens) + 1)], limit)
    assert (batch.decodes, batch.query_len) == (decodes, query_len)
    assert batch.query_starts == prefill_starts
    assert batch.decode_tokens == sum(lens[:decodes])
    assert batch.padded_rows is None


def test_a_short_sequence_behind_a_long_one_stays_where_it_is() -> None:
    """Rows of decodes and of prefills are neighbours, so that no queries are gathered."""
    assert split_batch([0, 1, 9, 10], 1).query_starts == [0, 8, 9]


def test_decodes_of_different_lengths_end_where_their_rows_end() -> None:
    batch = split_batch([0, 3, 4, 6], 5)
    assert (batch.decodes, batch.query_len) == (3, 4)
    assert batch.padded_rows.tolist() == [1, 2, 3, 7, 10, 11]


@pytest.mark.parametrize(
    ("limit", "lens"),
    [(1, [1]), (2, [1, 2]), (5, [1, 2, 4, 5]), (7, [1, 2, 4, 6, 7]), (12, [1, 2, 4, 8, 11, 12])],
)
def test_decodes_have_few_lengths_and_those_of_graphs_among_them(limit: int, lens: list[int]) -> None:
    """A graph is captured for all drafts of a verification, limit - 1 tokens, and for one."""
    assert decode_query_lens(limit) == lens


@pytest.mark.parametrize("limit", range(1, 12))
def test_any_number_of_drafts_takes_a_length_that_is_compiled_ahead(limit: int) -> None:
    for longest in range(1, limit + 1):
        batch = split_batch([0, longest, longest + 1], limit)
        assert batch.query_len in decode_query_lens(limit)
        assert batch.query_len >= longest
