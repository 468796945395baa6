"""How a ragged batch is cut into equal parts that can be computed together.

A tile is a few neighbouring query tokens of one sequence and block; its context is read in chunks of one
size. Both sizes follow from the tile's own sequence, never from its neighbours in the batch, so that a result
does not depend on them: rounding differs with the shape of a matrix product.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from turboquant_kernels.formats import BLOCK_TOKENS, PAGE_TOKENS

TILE_QUERIES = (1, 16, 128)
"""Query tokens of a tile: the smallest that holds all of a sequence's, or the largest, repeated."""

CHUNK_TOKENS = (64, 128, 192, 256, 384, 512, 768, 1024)
"""Context tokens of a chunk: the smallest that holds a tile's context, or the largest, repeated."""


@dataclass(frozen=True)
class Tiles:
    """Tiles of one shape; tensors are int64 [n], the longest context first."""

    width: int
    """Query tokens in a tile, padding included."""
    chunk: int
    """Context tokens in a chunk, padding included."""
    sequence: torch.Tensor
    first_row: torch.Tensor
    """Row of the tile's first query in the batch."""
    count: torch.Tensor
    """Queries in the tile, 1 to width."""
    position: torch.Tensor
    """Position of the tile's first query in its sequence."""
    start: torch.Tensor
    """First stored token to read: the first that any of its queries sees, rounded down to a page."""
    end: torch.Tensor
    """First token behind those."""

    def __len__(self) -> int:
        return len(self.sequence)

    def context(self) -> torch.Tensor:
        """Stored tokens to read, int64 [n]."""
        return (self.end - self.start).clamp_min(0)

    def rows(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Query rows, int64 [n, width], and whether each is one: beyond `count` stands the last row again."""
        within = torch.arange(self.width)
        last = self.count[:, None] - 1
        return self.first_row[:, None] + torch.minimum(within, last), within <= last

    def split(self, size: int) -> Iterator["Tiles"]:
        """The tiles in groups of at most `size`."""
        for begin in range(0, len(self), size):
            yield self.take(slice(begin, begin + size))

    def take(self, chosen: slice | torch.Tensor) -> "Tiles":
        """Some of the tiles, by a slice, a mask or indices."""
        fields = (self.sequence, self.first_row, self.count, self.position, self.start, self.end)
        return Tiles(self.width, self.chunk, *(field[chosen] for field in fields))


def tile_batch(
    query_start_loc: torch.Tensor, seq_lens: torch.Tensor, window: int | None, *, raw_block: bool = False
) -> list[Tiles]:
    """The tiles of a batch: int [num_seqs + 1], int [num_seqs] and window as `paged_attention` takes them.

    raw_block: the stored tokens are those before each query's block (`turboquant_kernels.raw_block`), in
    place of all up to the query. Layers that share sequences and window can share tiles. Sequences without
    queries have none.
    """
    query_start_loc, seq_lens = query_start_loc.long(), seq_lens.long()
    query_lens = query_start_loc.diff()
    width = _smallest_that_holds(query_lens, TILE_QUERIES)
    start = seq_lens - query_lens
    # Of positions that are multiples of the width, which divides a block.
    aligned = start // width * width
    tiles_of = (seq_lens - aligned + width - 1) // width * (query_lens > 0)
    sequence = torch.arange(len(seq_lens)).repeat_interleave(tiles_of)
    first_tile = tiles_of.cumsum(0) - tiles_of
    width = width[sequence]
    begin = aligned[sequence] + (torch.arange(len(sequence)) - first_tile[sequence]) * width
    position = torch.maximum(begin, start[sequence])
    count = torch.minimum(begin + width, seq_lens[sequence]) - position
    first_seen = torch.zeros_like(position) if window is None else (position - window + 1).clamp_min(0)
    tiles = Tiles(
        width=TILE_QUERIES[-1],
        chunk=CHUNK_TOKENS[-1],
        sequence=sequence,
        first_row=query_start_loc[sequence] + position - start[sequence],
        count=count,
        position=position,
        start=first_seen // PAGE_TOKENS * PAGE_TOKENS,
        end=position // BLOCK_TOKENS * BLOCK_TOKENS if raw_block else position + count,
    )
    context = tiles.context()
    shapes = torch.stack((width, _smallest_that_holds(context, CHUNK_TOKENS)), dim=1)
    longest_first = context.argsort(descending=True, stable=True)
    tiles, shapes = tiles.take(longest_first), shapes[longest_first]
    return [
        replace(tiles.take((shapes == torch.tensor(shape)).all(1)), width=shape[0], chunk=shape[1])
        for shape in shapes.unique(dim=0).tolist()
    ]


def _smallest_that_holds(counts: torch.Tensor, sizes: tuple[int, ...]) -> torch.Tensor:
    """The smallest of ascending `sizes` that is no less than each count, or the largest: int64 [n]."""
    choices = torch.tensor(sizes)
    return choices[torch.bucketize(counts, choices).clamp_max(len(sizes) - 1)]
