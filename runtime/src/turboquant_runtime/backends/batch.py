"""Which sequences of a step are decoded and which are prefilled: numbers of the host alone.

vLLM puts sequences with few query tokens in front (`reorder_batch_threshold`). They are decoded together, by
a kernel that takes equally many query tokens of each sequence and reads lengths on the device: after
speculation the host only knows bounds of them. What follows are prompts in chunks, whose lengths it knows.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class BatchSplit:
    """A step's sequences, the decoded ones first."""

    decodes: int
    """Sequences to decode."""
    decode_tokens: int
    """Their query tokens, the first rows of the batch."""
    query_len: int
    """Query tokens that the decode kernel takes of each sequence."""
    padded_rows: np.ndarray | None
    """int64 [decode_tokens], where a sequence has fewer query tokens than that: the row of each token in a
    batch of `query_len` rows a sequence, whose last rows are the sequence's tokens. None where no row
    moves."""
    query_starts: list[int]
    """Where the queries of the other sequences begin, counted from their first, and the end."""

    @property
    def prefills(self) -> int:
        return len(self.query_starts) - 1


def decode_query_lens(limit: int) -> list[int]:
    """Query tokens of a sequence that decodes are run with, in ascending order; the last is `limit`.

    A kernel is compiled for each of them before requests come. Other numbers, as n-gram speculation has
    them, are padded to the next: powers of two, the verification of all drafts, and one token more.
    """
    return sorted({1 << i for i in range(limit.bit_length())} | {max(1, limit - 1), limit})


def split_batch(query_starts: Sequence[int] | np.ndarray, limit: int) -> BatchSplit:
    """Splits a batch: the leading sequences of at most `limit` query tokens are decoded.

    query_starts: where each sequence's query tokens begin, and the end. Sequences without any, with which
    vLLM pads a batch to the size of a captured graph, are left out.
    """
    starts = np.asarray(query_starts, dtype=np.int64)
    lens = np.diff(starts)
    lens = lens[: np.flatnonzero(lens)[-1] + 1] if lens.any() else lens[:0]
    longer = np.flatnonzero(lens > limit)
    decodes = int(longer[0]) if len(longer) else len(lens)
    decode_lens, decode_tokens = lens[:decodes], int(starts[decodes])
    longest = int(decode_lens.max()) if decodes else 0
    query_len = next(n for n in decode_query_lens(limit) if n >= longest) if decodes else 0
    padded_rows = None
    if (decode_lens != query_len).any():
        ends = (np.arange(decodes) + 1) * query_len
        padded_rows = np.repeat(ends - starts[1 : decodes + 1], decode_lens) + np.arange(decode_tokens)
    prefill_starts = starts[decodes : len(lens) + 1] - decode_tokens
    return BatchSplit(decodes, decode_tokens, query_len, padded_rows, prefill_starts.tolist())
