"""Which keys are expanded together, and which queries attend to them: plain numbers, made once a step.

Expanded keys and values of a whole context do not fit in memory, so they are made a context tile at a time,
in a scratch of fixed size. A tile holds a segment of the context of each of some neighbouring sequences; a
query whose context is cut into several segments has their results merged by log-sum-exp. The last segment
holds as much as fits, so that most chunks of a prompt need a single one and no merge.

A sliding window that fits in the scratch beside its queries makes one segment. A larger one is cut like a
context without a window:

    keys      |-- first ------|-- in between --|-- last, causal --|
    queries                                         |-------------|

The first segment holds all keys that the first query sees and the last one does not, and one more at least.
So every query sees a key of each of its segments: FlashAttention-2 returns a log-sum-exp of +inf for one that
sees none. All queries see all keys of the segments in between.

Segments begin with the page that holds the first key they need. The engine frees the blocks before it, and
their entries in the block table then name a block that may hold anything.

Lengths are known on the host when a step is scheduled, so nothing here runs on the GPU.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from turboquant_kernels.formats import BLOCK_TOKENS, PAGE_TOKENS

ITEM_TOKENS = 64
"""Tokens that one program of the expansion takes at most, a work item. Items end at multiples of it, so that
the tokens of an item share their key anchor."""

assert ITEM_TOKENS % PAGE_TOKENS == 0
assert BLOCK_TOKENS % ITEM_TOKENS == 0

LEAST_CAPACITY = 4 * PAGE_TOKENS
"""Tokens of the smallest scratch: half of it holds a page of queries beside what rounding to pages adds."""


@dataclass(frozen=True)
class Segment:
    """Some queries of one sequence and some keys of it, attended to at once."""

    sequence: int
    first_row: int
    """Row of the first query in the batch."""
    queries: int
    first_key: int
    """Position of the first key, a multiple of `PAGE_TOKENS`."""
    end_key: int
    causal: bool
    """Whether the last key is the last query's own: each query then sees the keys up to its own. Else all
    keys precede all queries."""
    left: int | None
    """`attention.Attend`'s, of the window. None: there is none, or all queries see all keys."""

    @property
    def keys(self) -> int:
        return self.end_key - self.first_key


@dataclass(frozen=True, eq=False)
class Tile:
    """A context tile: segments whose keys are expanded together, their queries neighbouring rows."""

    rows: slice
    """The queries' rows in the batch."""
    causal: bool
    """`Segment.causal`, of all segments."""
    left: int | None
    """`Segment.left`, of all segments."""
    merged: bool
    """Whether other tiles hold keys of the same queries."""
    keys: int
    """Expanded tokens: rows of the scratch."""
    max_queries: int
    """Queries of the segment that has most."""
    max_keys: int
    num_items: int
    num_segments: int
    indices: torch.Tensor
    """int32: items, query starts and key starts one after the other, so that one copy moves them. Each begins
    at a multiple of 16 bytes: Triton compiles a kernel anew for a pointer that does not."""

    @cached_property
    def items(self) -> torch.Tensor:
        """int32 [items, 4]: sequence, first page, first row of the scratch, tokens (1 to `ITEM_TOKENS`)."""
        return self.indices[: 4 * self.num_items].view(-1, 4)

    @cached_property
    def query_starts(self) -> torch.Tensor:
        """int32 [segments + 1]: where each segment's queries begin, counted from the tile's first row."""
        return self.indices[4 * self.num_items :][: self.num_segments + 1]

    @cached_property
    def key_starts(self) -> torch.Tensor:
        """int32 [segments + 1]: where each segment's keys begin in the scratch."""
        return self.indices[4 * self.num_items + _aligned(self.num_segments + 1) :][: self.num_segments + 1]

    def to(self, device: torch.device) -> "Tile":
        """The same tile on a device, by one copy that the host does not wait for.

        For a GPU from pinned memory: a copy from pageable memory would wait for all work before it.
        """
        pin = device.type == "cuda" and self.indices.device.type == "cpu"
        indices = self.indices.pin_memory() if pin else self.indices
        return replace(self, indices=indices.to(device, non_blocking=True))


def plan_tiles(
    query_start_loc: Sequence[int], seq_lens: Sequence[int], *, capacity: int, window: int | None = None
) -> list[Tile]:
    """The tiles of a batch on the CPU, in the order in which they are to be computed.

    query_start_loc: where each sequence's queries begin, and the end; seq_lens: tokens of each sequence, the
    queries included. capacity: tokens that the scratch holds. window: keys that a query sees, its own
    included; None: all up to its own. Raises ValueError where capacity is below `LEAST_CAPACITY`.
    """
    if capacity < LEAST_CAPACITY:
        raise ValueError(f"a scratch of {capacity} tokens is smaller than {LEAST_CAPACITY}")
    groups: list[list[Segment]] = []
    for segment in _segments(query_start_loc, seq_lens, capacity, window):
        if groups and _fits(groups[-1], segment, capacity):
            groups[-1].append(segment)
        else:
            groups.append([segment])
    merged_rows = {s.first_row for group in groups for s in group if not s.causal}
    return [_tile(group, any(s.first_row in merged_rows for s in group)) for group in groups]


def _segments(
    query_start_loc: Sequence[int], seq_lens: Sequence[int], capacity: int, window: int | None
) -> Iterator[Segment]:
    """Segments of each sequence, a query's segments in ascending order of keys, the causal one last."""
    for sequence, seq_len in enumerate(seq_lens):
        row, end_row = query_start_loc[sequence], query_start_loc[sequence + 1]
        while row < end_row:
            position = seq_len - (end_row - row)
            queries = _queries_at_once(position, end_row - row, capacity, window)
            yield from _segments_of(sequence, row, queries, position, capacity, window)
            row += queries


def _queries_at_once(position: int, queries: int, capacity: int, window: int | None) -> int:
    """How many of a sequence's next queries, which begin at a position, are to attend together."""
    # The causal segment holds the queries' own keys and begins with a page.
    queries = min(queries, capacity - PAGE_TOKENS)
    if window is None or position + queries <= window:
        return queries
    # As many as fit in one segment beside the window, or half a scratch of them if that is more. If the keys
    # of half a scratch do not fit, the window is larger than the queries by more than a page: then all
    # queries see a key that begins a page, and there the causal segment can begin.
    return min(queries, max(capacity - window, capacity // 2) - PAGE_TOKENS)


def _segments_of(
    sequence: int, row: int, queries: int, position: int, capacity: int, window: int | None
) -> Iterator[Segment]:
    """The segments of some queries, which begin at a row of the batch and a position of the sequence."""
    end_key = position + queries
    first_key = 0 if window is None else _page_start(max(0, position - window + 1))
    seen_by_all = 0 if window is None else max(0, end_key - window)  # from this key on
    causal_key = first_key
    if end_key - first_key > capacity:
        causal_key = _next_page_start(max(end_key - capacity, seen_by_all + 1))
    while first_key < causal_key:
        end = min(first_key + _page_start(capacity), causal_key)
        left = None
        if window is not None and first_key < seen_by_all:
            # Counted from the segment's last key, where `Attend` takes the last query to stand.
            left = window - 1 - (end_key - end)
        yield Segment(sequence, row, queries, first_key, end, causal=False, left=left)
        first_key = end
    left = None if window is None else window - 1
    yield Segment(sequence, row, queries, first_key, end_key, causal=True, left=left)


def _page_start(position: int) -> int:
    """The first position of a page."""
    return position // PAGE_TOKENS * PAGE_TOKENS


def _next_page_start(position: int) -> int:
    """The first position of a page that is not before this one."""
    return -_page_start(-position)


def _fits(group: list[Segment], segment: Segment, capacity: int) -> bool:
    last = group[-1]
    return (
        (segment.causal, segment.left) == (last.causal, last.left)
        and segment.first_row == last.first_row + last.queries
        and sum(s.keys for s in group) + segment.keys <= capacity
    )


def _tile(segments: list[Segment], merged: bool) -> Tile:
    items = list(_items(segments))
    size = _aligned(len(segments) + 1)
    indices = torch.zeros(4 * len(items) + 2 * size, dtype=torch.int32)
    tile = Tile(
        rows=slice(segments[0].first_row, segments[-1].first_row + segments[-1].queries),
        causal=segments[0].causal,
        left=segments[0].left,
        merged=merged,
        keys=sum(s.keys for s in segments),
        max_queries=max(s.queries for s in segments),
        max_keys=max(s.keys for s in segments),
        num_items=len(items),
        num_segments=len(segments),
        indices=indices,
    )
    tile.items.copy_(torch.tensor(items))
    tile.query_starts[1:] = torch.tensor([s.queries for s in segments]).cumsum(0)
    tile.key_starts[1:] = torch.tensor([s.keys for s in segments]).cumsum(0)
    return tile


def _items(segments: list[Segment]) -> Iterator[tuple[int, int, int, int]]:
    """Rows of `Tile.items`."""
    row = 0
    for segment in segments:
        begin = segment.first_key
        while begin < segment.end_key:
            end = min((begin // ITEM_TOKENS + 1) * ITEM_TOKENS, segment.end_key)
            yield segment.sequence, begin // PAGE_TOKENS, row, end - begin
            row += end - begin
            begin = end


def _aligned(count: int) -> int:
    """Int32s that fill whole 16 bytes."""
    return -(-count // 4) * 4
