"""How a step's batch divides between decode and prefill."""

import pytest

from turboquant_runtime.backends.division import divide


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
    division = divide([sum(lens[:i]) for i in range(len(lens) + 1)], limit)
    assert (division.decodes, division.query_len) == (decodes, query_len)
    assert division.query_starts == prefill_starts
    assert division.decode_tokens == sum(lens[:decodes])
    assert division.places is None


def test_a_short_sequence_behind_a_long_one_stays_where_it_is() -> None:
    """Rows of a road are neighbours, so that no queries are gathered."""
    assert divide([0, 1, 9, 10], 1).query_starts == [0, 8, 9]


def test_decodes_of_different_lengths_end_where_their_rows_end() -> None:
    division = divide([0, 3, 4, 6], 5)
    assert (division.decodes, division.query_len) == (3, 3)
    assert division.places.tolist() == [0, 1, 2, 5, 7, 8]
