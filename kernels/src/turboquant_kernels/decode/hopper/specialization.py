"""What the Hopper kernel is specialized to, as one constant."""

from typing import NamedTuple


class Specialization(NamedTuple):
    """Constants of a compiled kernel: of the cache, of the batch's shape, of the launch, and what follows.

    Every function of the kernel has it as `SPEC`. What follows from other fields is a field too: Triton's
    cache of compiled kernels knows a kernel by its constants' values. These are such as JSON has, since hooks
    that watch compilation write them down (`triton.runtime.jit.serialize_specialization_data`).
    """

    D: int
    """Coordinates of a vector."""
    KEY_BITS: int
    VALUE_BITS: int
    PAGES_OF_BLOCK: int
    """Pages of a block of the cache."""
    OFFSET_BITS: int
    """Of an offset in the cache, in words: 32 or 64."""
    ANCHOR: bool
    """Whether keys have anchors."""
    KV_HEADS: int
    GROUP: int
    """Query heads of a KV head."""
    ROW_GROUPS: int
    """Programs that share the rows of a KV head."""
    WINDOW: bool
    SOFT_CAP: bool
    FUSED: bool
    """Whether the last program of a sequence merges its splits."""

    R: int
    """Rows of a program: 4 or 8."""
    W: int
    """Warps of a program."""
    P: int
    """Pages of a warp's tile."""
    VALUE_BLOCK: int
    """Coordinates of values that are unpacked at once."""
    SHARED_QUERIES: bool
    """Whether queries stand in shared memory."""
    EVICT_FIRST: bool
    """Whether the L2 cache drops pages before what will be read again."""

    KEY_BLOCKS: tuple[int, ...]
    """Coordinates of keys that are contracted at once: `blocks_of` D."""
    VALUE_BLOCKS: tuple[int, ...]
    PIECES: int
    """Operands that a block of values is: each has the coordinates of one half (`values`)."""
    KEY_ASM: tuple[tuple[str, str], ...]
    """For each block, its fragment's text and constraints (`fragments`)."""
    VALUE_ASM: tuple[str, str]
    KEY_REGISTERS: int
    """Registers of the keys' table of levels."""
    VALUE_REGISTERS: int
    VALUES_AT: int
    """Words of a page before its values, which follow the keys."""
    SCALES_AT: int
    """Words of a page before its scales."""
    PAGE_WORDS: int
    """Words of a page of one KV head."""
    RING_ROWS: int
    """Rows of shared memory, of 256 R bytes, that the ring takes (`ring`)."""
    QUERY_ROWS: int
    """Rows of shared memory that queries take."""


def blocks_of(head_dim: int, largest: int) -> tuple[int, ...]:
    """Pieces of a vector that are read at once: `largest` coordinates, the last one maybe fewer.

    Of 80 and 96 the last one is rounded up to a power of two, at least 32: what stands in place of
    coordinates that a vector does not have meets zeros of a query, or is not stored.
    """
    return tuple(
        min(largest, max(32, 1 << (head_dim - first - 1).bit_length()))
        for first in range(0, head_dim, largest)
    )
