"""Which sequences of a step take the decode kernel and which the prefill road: numbers of the host alone.

vLLM puts sequences with few query tokens in front (`reorder_batch_threshold`). They are decoded together, by
a kernel that takes equally many query tokens of each sequence and reads lengths on the device: after
speculation the host only knows bounds of them. What follows are prompts in chunks, whose lengths it knows.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Division:
    """A step's sequences, the decoded ones first."""

    decodes: int
    """Sequences to decode."""
    decode_tokens: int
    """Their query tokens, the first rows of the batch."""
    query_len: int
    """Query tokens of each decoded sequence; the most of any where they differ."""
    places: np.ndarray | None
    """int64 [decode_tokens], where sequences have different numbers of query tokens: the row of each token
    in a batch of `query_len` rows a sequence, whose last rows are the sequence's tokens. None: rows stand so
    already."""
    query_starts: list[int]
    """Where the queries of the other sequences begin, counted from their first, and the end."""

    @property
    def prefills(self) -> int:
        return len(self.query_starts) - 1


def divide(query_starts: Sequence[int] | np.ndarray, limit: int) -> Division:
    """Divides a batch: the leading sequences of at most `limit` query tokens are decoded.

    query_starts: where each sequence's query tokens begin, and the end. Sequences without any, with which
    vLLM pads a batch to the size of a captured graph, are left out.
    """
    starts = np.asarray(query_starts, dtype=np.int64)
    lens = np.diff(starts)
    lens = lens[: np.flatnonzero(lens)[-1] + 1] if lens.any() else lens[:0]
    longer = np.flatnonzero(lens > limit)
    decodes = int(longer[0]) if len(longer) else len(lens)
    decode_lens, decode_tokens = lens[:decodes], int(starts[decodes])
    query_len = int(decode_lens.max()) if decodes else 0
    places = None
    if (decode_lens != query_len).any():
        ends = (np.arange(decodes) + 1) * query_len
        places = np.repeat(ends - starts[1 : decodes + 1], decode_lens) + np.arange(decode_tokens)
    prefill_starts = starts[decodes : len(lens) + 1] - decode_tokens
    return Division(decodes, decode_tokens, query_len, places, prefill_starts.tolist())
