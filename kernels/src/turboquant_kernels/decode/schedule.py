"""Which part of which sequence a program of the decode kernel reads: a table made on the GPU, once a step.

The grid of a captured launch is fixed while lengths are not. So the number of items is fixed by shapes, and
this kernel deals them out: every sequence is cut into equal splits, as few as keep all programs busy at once.
Layers that share lengths and window share the table.
"""

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from turboquant_kernels.formats import BLOCK_TOKENS, PAGE_TOKENS

SEARCH_STEPS = 21
"""Halvings of the length of a split: from a million tokens to one page."""


@dataclass(frozen=True)
class Schedule:
    """The device's table; int32 tensors."""

    items: torch.Tensor
    """[max_items, 4]: sequence, first page, end page, unused; first = end for an item without work."""
    splits: torch.Tensor
    """[num_seqs, 2]: first item of the sequence and number of items."""

    @classmethod
    def empty(cls, num_seqs: int, slots: int, device: torch.device) -> "Schedule":
        """Room for `num_seqs` sequences on `slots` programs that run at once for each KV head."""
        items = torch.zeros(max_items(num_seqs, slots), 4, dtype=torch.int32, device=device)
        return cls(items, torch.zeros(num_seqs, 2, dtype=torch.int32, device=device))


def max_items(num_seqs: int, slots: int) -> int:
    """Items that a table must hold: whole waves of `slots`, of which each sequence has at least one."""
    return slots * triton.cdiv(num_seqs, slots)


def fill(
    schedule: Schedule,
    seq_lens: torch.Tensor,
    query_len: int,
    window: int | None,
    tile_pages: int,
    first_multiple: int = 1,
    *,
    raw_block: bool = False,
) -> None:
    """Deals the sequences out, in place, without a host synchronisation.

    seq_lens: int32 [num_seqs], query tokens included. A split is a multiple of `tile_pages` pages, what a
    program reads at a time, and begins at a multiple of `first_multiple`: the first page of a sequence, which
    a window may put anywhere, is rounded down to one. raw_block: a sequence ends where the block of its last
    query token begins (`turboquant_kernels.raw_block`); if nothing is before that, it has no items.
    """
    num_seqs = len(seq_lens)
    fill_kernel[(num_seqs,)](
        schedule.items,
        schedule.splits,
        seq_lens,
        num_seqs,
        len(schedule.items),
        query_len,
        window or 0,
        PAGE=PAGE_TOKENS,
        TILE=math.lcm(tile_pages, first_multiple),
        FIRST_MULTIPLE=first_multiple,
        RAW_BLOCK=BLOCK_TOKENS if raw_block else 0,
        STEPS=SEARCH_STEPS,
        BLOCK=triton.next_power_of_2(num_seqs),
        num_warps=4,
    )


@triton.jit
def _pages(
    seq_len, query_len, window, PAGE: tl.constexpr, FIRST_MULTIPLE: tl.constexpr, RAW_BLOCK: tl.constexpr
):  # fmt: skip
    """First and end page that a sequence's queries read."""
    first = tl.where(window > 0, tl.maximum(seq_len - query_len - window + 1, 0) // PAGE, 0)
    first = first // FIRST_MULTIPLE * FIRST_MULTIPLE
    if RAW_BLOCK > 0:
        end = tl.maximum(seq_len - 1, 0) // RAW_BLOCK * (RAW_BLOCK // PAGE)
        end = tl.maximum(end, first)  # which a window may put into the raw block
    else:
        end = tl.cdiv(seq_len, PAGE)
    return first, end


@triton.jit(do_not_specialize=["num_seqs", "num_items", "query_len", "window"])
def fill_kernel(
    items, splits, seq_lens, num_seqs, num_items, query_len, window,
    PAGE: tl.constexpr, TILE: tl.constexpr, FIRST_MULTIPLE: tl.constexpr, RAW_BLOCK: tl.constexpr,
    STEPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    mine = tl.program_id(0)
    index = tl.arange(0, BLOCK)
    lens = tl.load(seq_lens + index, mask=index < num_seqs, other=0)
    first, end = _pages(lens, query_len, window, PAGE, FIRST_MULTIPLE, RAW_BLOCK)
    tiles = tl.cdiv(end - first, TILE)

    # The least number of tiles a split may have such that all splits find an item.
    low = 1
    high = tl.max(tiles, axis=0) + 1
    for _ in range(STEPS):
        middle = (low + high) // 2
        fits = tl.sum(tl.cdiv(tiles, middle), axis=0) <= num_items
        high = tl.where(fits, middle, high)
        low = tl.where(fits, low, tl.minimum(middle + 1, high))
    counts = tl.cdiv(tiles, tl.maximum(high, 1))
    before = tl.sum(tl.where(index < mine, counts, 0), axis=0)
    count = tl.sum(tl.where(index == mine, counts, 0), axis=0)
    tl.store(splits + 2 * mine, before)
    tl.store(splits + 2 * mine + 1, count)

    my_first = tl.sum(tl.where(index == mine, first, 0), axis=0)
    my_end = tl.sum(tl.where(index == mine, end, 0), axis=0)
    my_tiles = tl.sum(tl.where(index == mine, tiles, 0), axis=0)
    for i in range(count):
        # Tiles are dealt out evenly: no split has two more than another.
        begin = my_first + my_tiles * i // count * TILE
        stop = tl.minimum(my_first + my_tiles * (i + 1) // count * TILE, my_end)
        item = items + 4 * (before + i)
        tl.store(item, mine)
        tl.store(item + 1, begin)
        tl.store(item + 2, stop)
    if mine == num_seqs - 1:
        for i in range(before + count, num_items):
            tl.store(items + 4 * i + 1, 0)
            tl.store(items + 4 * i + 2, 0)
