"""The readable attention over the compressed paged cache: decode, prefill and mixed batches.

    o_i = sum_j softmax_j(cap(scale * q_i . k_j)) v_j

over the tokens j that query i sees, keys and values as the cache stores them, those of the query's own chunk
included. Rotations preserve inner products, so queries are rotated once instead of every key back, and the
output is un-rotated once.

The CPU engine serves from it; GPU kernels are tested against it. Queries are cut into tiles and the context
of a tile is visited in pieces, with the running maximum and sum of an online softmax (FlashAttention,
arXiv 2205.14135). Where a tile's pieces begin and end depends on its own sequence alone, so neighbours in
the batch do not change a result.
"""

from dataclasses import dataclass

import torch

from turboquant_kernels.codec import Codec
from turboquant_kernels.formats import PAGE_TOKENS
from turboquant_kernels.packing import pages_of

TILE_QUERIES = (1, 16, 128)
"""Query tokens in a tile: the smallest that holds a sequence's query tokens, or several of the largest."""

FIRST_PIECE, LAST_PIECE = 64, 1024
"""Context tokens in the first piece, and the bound to which later pieces double."""

WORKSPACE_BYTES = 64 << 20
"""Decompressed keys, values and scores held at a time."""


def paged_attention(
    codec: Codec,
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention of a ragged batch of queries to their sequences in the compressed cache.

    query: any float [num_tokens, q_heads, D], q_heads a multiple of kv_heads; rows from query_start_loc[-1]
    on are padding. kv_cache: uint8 [num_blocks, block_size, kv_heads, slot_bytes]. block_table: int
    [num_seqs, max_blocks]. query_start_loc: int [num_seqs + 1]: where each sequence's queries begin.
    seq_lens: int [num_seqs], query tokens included, which are stored already.

    Query i of a sequence's n queries stands at position seq_len - n + i and sees the positions up to its
    own, of these the last `window` where one is given. `scale` multiplies the scores, `soft_cap` c bounds
    them to c * tanh(score / c) (None or 0: off), `sinks` (float [q_heads]) are scores of one more token
    without a value.

    Returns [num_tokens, q_heads, D] in the query's dtype, or fills and returns `out`. Padding rows are zero.
    Arithmetic is float32.
    """
    num_tokens, q_heads, head_dim = query.shape
    pages = pages_of(kv_cache, codec.layout)
    rotated = codec.rotate(query) * scale
    attended = torch.zeros_like(rotated)
    for tiles in _tiles(query_start_loc.long(), seq_lens.long(), window):
        tile_bytes = _tile_bytes(tiles.width, q_heads, pages.shape[2], head_dim)
        for group in tiles.groups(max(1, WORKSPACE_BYTES // tile_bytes)):
            rows = group.rows()
            tile_output = _attend(codec, rotated[rows], group, pages, block_table, window, soft_cap, sinks)
            used = torch.arange(group.width) < group.count[:, None]
            attended[rows[used]] = tile_output[used]
    result = codec.unrotate(attended)
    if out is None:
        return result.to(query.dtype)
    return out.copy_(result)


@dataclass(frozen=True)
class _Tiles:
    """Tiles of `width` neighbouring query tokens of one sequence; int64 [n] each, longest context first."""

    width: int
    sequence: torch.Tensor
    first_row: torch.Tensor
    """Row of the first query of the tile."""
    count: torch.Tensor
    """Queries in the tile, 1 to width."""
    position: torch.Tensor
    """Position of the first query in its sequence."""
    start: torch.Tensor
    """First context token to read: the first that some query sees, rounded down to a page."""

    def end(self) -> torch.Tensor:
        """One past the last context token to read."""
        return self.position + self.count

    def rows(self) -> torch.Tensor:
        """Query rows, int64 [n, width]; beyond `count` the tile's last row again."""
        return self.first_row[:, None] + torch.minimum(torch.arange(self.width), self.count[:, None] - 1)

    def select(self, chosen) -> "_Tiles":
        """Some of the tiles: an index tensor, mask or slice."""
        fields = (self.sequence, self.first_row, self.count, self.position, self.start)
        return _Tiles(self.width, *(field[chosen] for field in fields))

    def groups(self, size: int) -> list["_Tiles"]:
        """The tiles in groups of at most `size`."""
        return [self.select(slice(i, i + size)) for i in range(0, len(self.sequence), size)]


def _tiles(query_start_loc: torch.Tensor, seq_lens: torch.Tensor, window: int | None) -> list[_Tiles]:
    """The tiles of a batch, those of each width apart."""
    query_lens = query_start_loc.diff()
    tiles = []
    smaller = 0
    for width in TILE_QUERIES:
        last = width == TILE_QUERIES[-1]
        mine = (query_lens > smaller) if last else (query_lens > smaller) & (query_lens <= width)
        smaller = width
        sequence = mine.nonzero().squeeze(-1)
        if not len(sequence):
            continue
        per_sequence = (query_lens[sequence] + width - 1) // width
        first_tile = per_sequence.cumsum(0) - per_sequence
        index = torch.arange(int(per_sequence.sum())) - first_tile.repeat_interleave(per_sequence)
        sequence = sequence.repeat_interleave(per_sequence)
        skipped = index * width
        position = seq_lens[sequence] - query_lens[sequence] + skipped
        start = torch.zeros_like(position)
        if window is not None:
            start = (position - window + 1).clamp_min(0) // PAGE_TOKENS * PAGE_TOKENS
        unsorted = _Tiles(
            width=width,
            sequence=sequence,
            first_row=query_start_loc[sequence] + skipped,
            count=(query_lens[sequence] - skipped).clamp_max(width),
            position=position,
            start=start,
        )
        longest_first = (unsorted.end() - start).argsort(descending=True, stable=True)
        tiles.append(unsorted.select(longest_first))
    return tiles


def _attend(
    codec: Codec,
    query: torch.Tensor,
    tiles: _Tiles,
    pages: torch.Tensor,
    block_table: torch.Tensor,
    window: int | None,
    soft_cap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Output of some tiles, still rotated: query float32 [n, width, q_heads, D] -> the same shape."""
    n, width, q_heads, head_dim = query.shape
    pages_per_block, kv_heads = pages.shape[1:3]
    group = q_heads // kv_heads
    # Query heads that share a KV head stand beside each other: [n, kv_heads, group * width, D].
    query = query.view(n, width, kv_heads, group, head_dim).permute(0, 2, 3, 1, 4).flatten(2, 3)
    if sinks is None:
        maximum = torch.full((n, kv_heads, group * width, 1), torch.finfo(torch.float32).min)
        total = torch.zeros_like(maximum)
    else:
        maximum = sinks.float().view(1, kv_heads, group, 1).repeat(n, 1, 1, width).view(n, kv_heads, -1, 1)
        total = torch.ones_like(maximum)
    output = torch.zeros_like(query)

    lengths = tiles.end() - tiles.start
    query_position = tiles.position[:, None] + torch.arange(width)
    offset, size, longest = 0, FIRST_PIECE, int(lengths[0])
    while offset < longest:
        active = slice(0, int((lengths > offset).sum()))
        first = tiles.start[active] + offset
        page = first[:, None] // PAGE_TOKENS + torch.arange(size // PAGE_TOKENS)
        entry = (page // pages_per_block).clamp_max(block_table.shape[1] - 1)
        block = block_table[tiles.sequence[active, None], entry].long()
        # Bytes of a page past the end of a sequence are read and masked; its table entry may be anything.
        block = block.clamp(0, pages.shape[0] - 1)
        piece = pages[block, page % pages_per_block].transpose(1, 2)

        keys = codec.read_rotated_keys(piece).flatten(2, 3)
        scores = query[active] @ keys.mT
        if soft_cap:
            scores = soft_cap * torch.tanh(scores / soft_cap)
        position = (first[:, None] + torch.arange(size))[:, None]
        seen = position <= query_position[active, :, None]
        if window is not None:
            seen &= position > query_position[active, :, None] - window
        scores.unflatten(2, (group, width)).masked_fill_(~seen[:, None, None], float("-inf"))

        new_maximum = torch.maximum(maximum[active], scores.amax(-1, keepdim=True))
        weights = torch.exp(scores - new_maximum)
        decay = torch.exp(maximum[active] - new_maximum)
        maximum[active] = new_maximum
        total[active] = total[active] * decay + weights.sum(-1, keepdim=True)
        values = codec.read_rotated_values(piece).flatten(2, 3)
        output[active] = output[active] * decay + weights @ values
        offset, size = offset + size, min(2 * size, LAST_PIECE)
    # A query that sees nothing (an empty sequence) gets zero.
    output = output / total.clamp_min(torch.finfo(torch.float32).tiny)
    return output.view(n, kv_heads, group, width, head_dim).permute(0, 3, 1, 2, 4).flatten(2, 3)


def _tile_bytes(width: int, q_heads: int, kv_heads: int, head_dim: int) -> int:
    """Workspace of one tile: float32 keys, values, and scores twice."""
    return 4 * LAST_PIECE * (2 * kv_heads * head_dim + 2 * q_heads * width)
