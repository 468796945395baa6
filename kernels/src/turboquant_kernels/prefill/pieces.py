"""The pieces of a step's chunks, whose queries read their own block raw: plain numbers, made once a step.

A piece is the new tokens of one sequence in one block. All of them see the same stored tokens, those before
the block, or of these a window; so a piece is to an attention kernel a sequence of its own, with its own end.

    block          0        1        2        3            a chunk of 3 pieces, p, q and r
    keys      |........|........|........|....
    p sees    |-------->|pp                                stored up to its block, raw in it
    q sees    |----------------->|qqqqqqqq
    r sees    |-------------------------->|rrrr

Stored keys are expanded once for all pieces, a tile at a time, in a scratch of fixed size. A tile holds whole
blocks of the context of some sequences, a segment of each. Its pieces read it by a block table, since what
they read overlaps. Where the context does not fit, a piece has segments in several tiles, whose results are
merged by log-sum-exp in any order. A piece that sees nothing of a segment is not among its readers, nor are
such queries of it: FlashAttention-2 returns a log-sum-exp of +inf for a query without keys.

With a sliding window consecutive pieces share a segment while their keys fit in the scratch. If those of a
single piece do not, its keys are cut into segments. An attention kernel takes one bound on the left for a
call and aligns the queries and keys of each of its sequences at their ends. So pieces that end before their
block are padded up to its end with queries whose results nobody reads: then one bound serves all, and a call
holds pieces of any sequences.

Lengths are known on the host when a step is scheduled, so nothing here runs on the GPU.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from turboquant_kernels.formats import BLOCK_TOKENS, PAGE_TOKENS
from turboquant_kernels.prefill.tiles import ITEM_TOKENS

MOST_PADDING = 4096
"""Rows of padding in a tile: half of what a chunk of 8,192 tokens brings itself. Without a bound many short
chunks would be padded to many times their memory."""

_BLOCK_ITEMS = BLOCK_TOKENS // ITEM_TOKENS


class Piece(NamedTuple):
    """New tokens of one sequence in one block."""

    sequence: int
    block: int
    first_row: int
    """Row of the first one in the batch."""
    position: int
    """Position of the first one in the sequence."""
    end: int


class Reader(NamedTuple):
    """The queries of a piece that see keys of a segment."""

    first_row: int
    queries: int
    padding: int
    """Queries to add behind them."""
    first_block: int
    """The first block of keys to read, of the sequence."""
    end_block: int


class Segment(NamedTuple):
    """Blocks of one sequence that are expanded together, and who reads them."""

    sequence: int
    first_block: int
    end_block: int
    readers: list[Reader]
    left: int | None
    """`attention.Attend`'s, of the window. None: all queries see all keys that they read."""

    @property
    def blocks(self) -> int:
        return self.end_block - self.first_block


@dataclass(frozen=True, eq=False)
class Tile:
    """Segments whose keys are expanded together and attended to in one call."""

    rows: slice | torch.Tensor
    """The queries' rows in the batch. Where they are not neighbours, or padded, int32 [queries], -1 for
    padding."""
    queries: int
    """Rows, padding included."""
    keys: int
    """Expanded tokens: rows of the scratch, whole blocks."""
    left: int | None
    """`Segment.left`, of all segments."""
    max_queries: int
    """Queries of the reader that has most."""
    max_keys: int
    items: torch.Tensor
    """int32 [items, 4], as `expand.expand` takes them."""
    query_starts: torch.Tensor
    """int32 [readers + 1]: where each reader's queries begin among the tile's rows."""
    key_lens: torch.Tensor
    """int32 [readers]."""
    block_table: torch.Tensor
    """int32 [readers, pages]: a reader's pages of the scratch, `PiecePlan.page_tokens` each, by the block of
    the scratch in which they begin. Entries past its keys name some page or none."""


@dataclass(frozen=True, eq=False)
class PiecePlan:
    """The chunks of a step: of their own blocks, which are read raw, and of the tiles of what is stored."""

    rows: int
    """New tokens, all sequences together."""
    own_keys: int
    """Raw keys of all pieces, in the order of the pieces: each piece's block up to its last token."""
    own_left: int | None
    """`attention.Attend`'s for these, of a window shorter than a block."""
    max_queries: int
    """Tokens of the piece that has most."""
    max_own_keys: int
    is_begun: bool
    """Whether a chunk begins inside a block, so that earlier steps brought some of the raw keys."""
    pieces: torch.Tensor
    """int32 [pieces, 2]: sequence and block. Pieces are in the order of their rows, and have all rows."""
    query_starts: torch.Tensor
    """int32 [pieces + 1]: where each piece's rows begin."""
    key_starts: torch.Tensor
    """int32 [pieces + 1]: where its raw keys begin."""
    page_tokens: int
    """Tokens of a page of the scratch, a multiple of `BLOCK_TOKENS`. A page begins with every block, so
    larger ones overlap."""
    tiles: list[Tile]
    is_cut: bool
    """Whether a query has keys in several tiles."""


def plan_pieces(
    query_start_loc: Sequence[int],
    seq_lens: Sequence[int],
    *,
    capacity: int,
    window: int | None = None,
    page_tokens: int = BLOCK_TOKENS,
    device: torch.device | None = None,
) -> PiecePlan:
    """The plan of a batch, its tensors on a device (None: the CPU).

    query_start_loc: where each sequence's queries begin, and the end; seq_lens: tokens of each sequence, the
    queries included. capacity: tokens that the scratch holds. window: keys that a query sees, its own
    included; None: all up to its own. Raises ValueError where capacity is below a block.
    """
    capacity_blocks = capacity // BLOCK_TOKENS
    if not capacity_blocks:
        raise ValueError(f"a scratch of {capacity} tokens is smaller than a block of {BLOCK_TOKENS}")
    device = device or torch.device("cpu")
    pieces: list[Piece] = []
    segments: list[Segment] = []
    is_cut = False
    for sequence, seq_len in enumerate(seq_lens):
        chunk = list(_pieces(sequence, *query_start_loc[sequence : sequence + 2], seq_len))
        pieces += chunk
        for group in _groups(chunk, capacity_blocks, window):
            cut = list(_segments(group, capacity_blocks, window))
            is_cut |= len(cut) > 1
            segments += cut
    # Columns: sequence, block, first row, position, end.
    table = np.array(pieces, np.int64).reshape(-1, 5)
    counts = table[:, 4] - table[:, 3]
    own_keys = table[:, 4] - table[:, 1] * BLOCK_TOKENS
    query_starts, key_starts = _starts(counts), _starts(own_keys)
    on_device = _to(device, table[:, :2], query_starts, key_starts)
    return PiecePlan(
        rows=int(query_starts[-1]),
        own_keys=int(key_starts[-1]),
        own_left=window - 1 if window is not None and window < BLOCK_TOKENS else None,
        max_queries=int(counts.max(initial=0)),
        max_own_keys=int(own_keys.max(initial=0)),
        is_begun=bool(key_starts[-1] > query_starts[-1]),
        pieces=on_device[0],
        query_starts=on_device[1],
        key_starts=on_device[2],
        page_tokens=page_tokens,
        tiles=[_tile(tile, page_tokens, device) for tile in _filled(segments, capacity_blocks)],
        is_cut=is_cut,
    )


def _pieces(sequence: int, row: int, end_row: int, seq_len: int) -> Iterator[Piece]:
    """The pieces of a sequence, whose last tokens are the rows from `row` to `end_row`."""
    offset = end_row - seq_len
    position = row - offset
    while position < seq_len:
        block = position // BLOCK_TOKENS
        end = min((block + 1) * BLOCK_TOKENS, seq_len)
        yield Piece(sequence, block, position + offset, position, end)
        position = end


def _groups(pieces: list[Piece], capacity: int, window: int | None) -> Iterator[list[Piece]]:
    """Runs of a sequence's pieces that share segments. capacity: blocks that the scratch holds."""
    group: list[Piece] = []
    for piece in pieces:
        if group and window is not None and piece.block - _first_block(group[0], window) > capacity:
            yield group
            group = []
        group.append(piece)
    if group:
        yield group


def _first_block(piece: Piece, window: int | None) -> int:
    """The block of the first key that the piece sees."""
    return 0 if window is None else max(0, piece.position - window + 1) // BLOCK_TOKENS


def _segments(group: list[Piece], capacity: int, window: int | None) -> Iterator[Segment]:
    """The segments of a group. With a window, a group of several pieces has one at most."""
    first, end = _first_block(group[0], window), group[-1].block
    for begin in range(first, end, capacity):
        segment = _segment(group, begin, min(begin + capacity, end), window)
        if segment.readers:
            yield segment


def _segment(group: list[Piece], first_block: int, end_block: int, window: int | None) -> Segment:
    sequence = group[0].sequence
    if window is None:
        readers = [
            Reader(row, end - position, 0, first_block, min(end_block, block))
            for _, block, row, position, end in group
            if block > first_block
        ]
        return Segment(sequence, first_block, end_block, readers, None)
    readers, left = [], None
    for piece in group:
        end_key = min(end_block, piece.block) * BLOCK_TOKENS
        # Behind the last position in the block from where the last key is seen.
        end_query = min((piece.block + 1) * BLOCK_TOKENS, end_key + window - 1)
        end = min(piece.end, end_query)
        first = max(first_block, _first_block(piece, window))
        if end <= piece.position or first * BLOCK_TOKENS >= end_key:
            continue
        readers.append(
            Reader(piece.first_row, end - piece.position, end_query - end, first, end_key // BLOCK_TOKENS)
        )
        if end - window > first * BLOCK_TOKENS:
            left = end_key - end_query + window - 1
    if left is None:
        readers = [reader._replace(padding=0) for reader in readers]
    return Segment(sequence, first_block, end_block, readers, left)


def _filled(segments: list[Segment], capacity: int) -> Iterator[list[Segment]]:
    """The segments of each tile: those of one bound on the left, as many as fit."""
    for bound in dict.fromkeys(segment.left for segment in segments):
        tile: list[Segment] = []
        blocks = padding = 0
        for segment in segments:
            if segment.left != bound:
                continue
            added = sum(reader.padding for reader in segment.readers)
            if tile and (blocks + segment.blocks > capacity or padding + added > MOST_PADDING):
                yield tile
                tile, blocks, padding = [], 0, 0
            tile.append(segment)
            blocks += segment.blocks
            padding += added
        yield tile


def _tile(segments: list[Segment], page_tokens: int, device: torch.device) -> Tile:
    blocks = np.array([segment.blocks for segment in segments])
    starts = _starts(blocks)
    # Of each block of the scratch.
    sequence = np.repeat([segment.sequence for segment in segments], blocks)
    place = np.arange(starts[-1])
    block = np.repeat([segment.first_block for segment in segments] - starts[:-1], blocks) + place
    half = np.arange(_BLOCK_ITEMS)
    items = np.empty((len(place), _BLOCK_ITEMS, 4), np.int32)
    items[..., 0] = sequence[:, None]
    items[..., 1] = (block[:, None] * BLOCK_TOKENS + half * ITEM_TOKENS) // PAGE_TOKENS
    items[..., 2] = place[:, None] * BLOCK_TOKENS + half * ITEM_TOKENS
    items[..., 3] = ITEM_TOKENS

    # Columns: first row, queries, padding, first block, end block.
    readers = np.array([reader for segment in segments for reader in segment.readers])
    in_scratch = np.repeat(
        starts[:-1] - [segment.first_block for segment in segments],
        [len(segment.readers) for segment in segments],
    )
    key_lens = (readers[:, 4] - readers[:, 3]) * BLOCK_TOKENS
    pages = np.arange(-(-int(key_lens.max()) // page_tokens)) * (page_tokens // BLOCK_TOKENS)
    block_table = (readers[:, 3] + in_scratch)[:, None] + pages
    queries = readers[:, 1] + readers[:, 2]
    query_starts = _starts(queries)
    rows, first_row = _rows(readers, queries, query_starts), int(readers[0, 0])
    is_slice = np.array_equal(rows, np.arange(first_row, first_row + len(rows)))
    on_device = _to(
        device, items.reshape(-1, 4), query_starts, key_lens, block_table, *([] if is_slice else [rows])
    )
    return Tile(
        rows=slice(first_row, first_row + len(rows)) if is_slice else on_device[4],
        queries=len(rows),
        keys=int(starts[-1]) * BLOCK_TOKENS,
        left=segments[0].left,
        max_queries=int(queries.max()),
        max_keys=int(key_lens.max()),
        items=on_device[0],
        query_starts=on_device[1],
        key_lens=on_device[2],
        block_table=on_device[3],
    )


def _rows(readers: np.ndarray, queries: np.ndarray, query_starts: np.ndarray) -> np.ndarray:
    """Of each query of a tile its row in the batch, -1 for padding."""
    index = np.arange(query_starts[-1]) - np.repeat(query_starts[:-1], queries)
    return np.where(index < np.repeat(readers[:, 1], queries), np.repeat(readers[:, 0], queries) + index, -1)


def _starts(counts: Sequence[int] | np.ndarray) -> np.ndarray:
    """Where each of some runs begins, and the end."""
    return np.concatenate(([0], np.cumsum(counts, dtype=np.int64)))


def _to(device: torch.device, *arrays: np.ndarray) -> list[torch.Tensor]:
    """The arrays as int32 on a device, by one copy that the host does not wait for.

    For a GPU from pinned memory: a copy from pageable memory would wait for all work before it. Each begins
    at a multiple of 16 bytes: Triton compiles a kernel anew for a pointer that does not.
    """
    sizes = [array.size for array in arrays]
    starts = _starts([-(-size // 4) * 4 for size in sizes])
    packed = torch.zeros(int(starts[-1]), dtype=torch.int32, pin_memory=device.type == "cuda")
    on_host = packed.numpy()
    for array, start, size in zip(arrays, starts, sizes, strict=False):
        on_host[start : start + size] = array.ravel()
    packed = packed.to(device, non_blocking=True)
    return [packed[s : s + n].view(a.shape) for a, s, n in zip(arrays, starts.tolist(), sizes, strict=False)]
