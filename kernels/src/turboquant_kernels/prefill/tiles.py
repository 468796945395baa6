"""Which keys are decompressed together, and which queries attend to them: plain numbers, made once a step.

Decompressed keys and values of a context do not fit in memory, so they are made a tile at a time in a scratch
of fixed size. A tile holds one piece of the context of each of some neighbouring sequences; the results of a
query's pieces are merged by log-sum-exp. The last piece before a query's position holds as much as fits, so
that most chunks need a single one and no merge.

Lengths are known on the host when a step is scheduled, so nothing here runs on the GPU.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from turboquant_kernels.formats import ANCHOR_TOKENS, PAGE_TOKENS

RUN_TOKENS = 64
"""Tokens that one program of the expansion decompresses. Pieces begin at a multiple, so that the tokens of a
run share their key anchor."""


assert RUN_TOKENS % PAGE_TOKENS == 0
assert ANCHOR_TOKENS % RUN_TOKENS == 0


@dataclass(frozen=True)
class Piece:
    """Some queries of one sequence and the keys that they attend to at once."""

    sequence: int
    first_row: int
    """Row of the first query in the batch."""
    queries: int
    first_key: int
    """Position of the first key, a multiple of `RUN_TOKENS`."""
    end_key: int
    causal: bool
    """Whether the last key is the last query's own: each query then sees the keys up to its own. Else all
    keys precede all queries."""

    @property
    def keys(self) -> int:
        return self.end_key - self.first_key


@dataclass(frozen=True)
class Tile:
    """Pieces whose keys are decompressed together; their queries are neighbouring rows of the batch."""

    rows: slice
    causal: bool
    keys: int
    """Decompressed tokens."""
    max_queries: int
    max_keys: int
    query_starts: torch.Tensor
    """int32 [pieces + 1]: where each piece's queries begin, from the tile's first row on."""
    key_starts: torch.Tensor
    """int32 [pieces + 1]: where each piece's keys begin in the scratch."""
    runs: torch.Tensor
    """int32 [n, 4]: sequence, first page, first row in the scratch and tokens (1 to `RUN_TOKENS`)."""
    merged: bool = field(compare=False)
    """Whether other tiles hold keys of the same queries."""

    def to(self, device: torch.device) -> "Tile":
        """The same tile with its tensors on a device, without waiting for the copy."""
        moved = [t.to(device, non_blocking=True) for t in (self.query_starts, self.key_starts, self.runs)]
        return Tile(
            self.rows, self.causal, self.keys, self.max_queries, self.max_keys, *moved, merged=self.merged
        )


def plan_tiles(
    query_start_loc: Sequence[int], seq_lens: Sequence[int], *, capacity: int, window: int | None = None
) -> list[Tile]:
    """The tiles of a batch, in the order in which they are to be computed.

    query_start_loc: where each sequence's queries begin, and the end; seq_lens: tokens of each sequence, the
    queries included. capacity: tokens that the scratch holds. With a window a query's keys stand in a single
    piece. Raises ValueError where capacity does not hold a window and a run of queries.
    """
    if capacity < (window or 0) + 2 * RUN_TOKENS:
        raise ValueError(f"a scratch of {capacity} tokens does not hold a window of {window} and its queries")
    groups: list[list[Piece]] = []
    for piece in _pieces(query_start_loc, seq_lens, capacity, window):
        last = groups[-1] if groups else None
        if last is not None and _fits(last, piece, capacity):
            last.append(piece)
        else:
            groups.append([piece])
    several = {p.first_row for group in groups for p in group if not p.causal}
    return [_tile(group, any(p.first_row in several for p in group)) for group in groups]


def _pieces(
    query_start_loc: Sequence[int], seq_lens: Sequence[int], capacity: int, window: int | None
) -> Iterator[Piece]:
    """Pieces of each sequence, a query's pieces in ascending order of keys, the causal one last."""
    for sequence, seq_len in enumerate(seq_lens):
        row, end_row = query_start_loc[sequence], query_start_loc[sequence + 1]
        position = seq_len - (end_row - row)
        # A causal piece holds its queries' own keys, after the window and what rounding adds.
        most = capacity - RUN_TOKENS - (window or 0)
        while row < end_row:
            queries = min(end_row - row, most)
            end_key = position + queries
            seen_from = 0 if window is None else _down(max(0, position - window + 1))
            first_key = max(seen_from, -_down(capacity - end_key))
            for begin in range(seen_from, first_key, _down(capacity)):
                end = min(begin + _down(capacity), first_key)
                yield Piece(sequence, row, queries, begin, end, causal=False)
            yield Piece(sequence, row, queries, first_key, end_key, causal=True)
            row, position = row + queries, position + queries


def _down(position: int) -> int:
    """To a multiple of a run; -_down(-x) rounds up."""
    return position // RUN_TOKENS * RUN_TOKENS


def _fits(group: list[Piece], piece: Piece, capacity: int) -> bool:
    last = group[-1]
    return (
        piece.causal == last.causal
        and piece.first_row == last.first_row + last.queries
        and sum(p.keys for p in group) + piece.keys <= capacity
    )


def _tile(pieces: list[Piece], merged: bool) -> Tile:
    runs, row = [], 0
    for piece in pieces:
        for begin in range(piece.first_key, piece.end_key, RUN_TOKENS):
            tokens = min(RUN_TOKENS, piece.end_key - begin)
            runs.append((piece.sequence, begin // PAGE_TOKENS, row, tokens))
            row += tokens
    return Tile(
        rows=slice(pieces[0].first_row, pieces[-1].first_row + pieces[-1].queries),
        causal=pieces[0].causal,
        keys=row,
        max_queries=max(p.queries for p in pieces),
        max_keys=max(p.keys for p in pieces),
        query_starts=_starts([p.queries for p in pieces]),
        key_starts=_starts([p.keys for p in pieces]),
        runs=torch.tensor(runs, dtype=torch.int32),
        merged=merged,
    )


def _starts(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()
