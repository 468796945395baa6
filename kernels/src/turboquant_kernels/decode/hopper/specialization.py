"""What the Hopper kernel is specialized to, as one constant."""

from functools import cache
from typing import NamedTuple

from turboquant_kernels.decode.hopper.fragments import fragment, level_table
from turboquant_kernels.decode.hopper.launch import STAGES, Launch
from turboquant_kernels.decode.hopper.level_tables import table_words
from turboquant_kernels.formats import PAGE_TOKENS, KVFormat
from turboquant_kernels.packing import PLANES


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
    RAW_BLOCK: bool
    """Whether queries see the stored tokens before their own block alone."""
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
    PARTS: int
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
    """Blocks of a vector that are read at once: `largest` coordinates, the last one maybe fewer.

    Of 80 and 96 the last one is rounded up to a power of two, at least 32: what stands in place of
    coordinates that a vector does not have meets zeros of a query, or is not stored.
    """
    return tuple(
        min(largest, max(32, 1 << (head_dim - first - 1).bit_length()))
        for first in range(0, head_dim, largest)
    )


def ring_rows(warps: int, pages: int, page_words: int, row_bytes: int) -> int:
    """Rows of shared memory that the ring of tiles takes (`ring`)."""
    return -(-(warps * STAGES * (pages * page_words * 4 + 8)) // row_bytes)


@cache
def specialization_of(
    fmt: KVFormat,
    head_dim: int,
    launch: Launch,
    kv_heads: int,
    group: int,
    query_len: int,
    block_size: int,
    offset_bits: int,
    window: bool,
    soft_cap: bool,
    fused: bool,
    raw_block: bool = False,
) -> Specialization:
    """What a launch of the kernel is specialized to.

    query_len, kv_heads, group (query heads of a KV head), block_size (tokens): of the batch and its cache.
    offset_bits: 32 or 64. window, soft_cap: whether there is one. fused: whether the kernel merges splits.
    raw_block: as `portable.attend_items` takes it.
    """

    def text(bits: int, words: int) -> tuple[str, str]:
        made = fragment(bits, words, level_table(bits, head_dim))
        return made.text, made.constraints

    key_blocks = blocks_of(head_dim, 128)
    value_block = _value_block(fmt, head_dim, launch)
    values_at = PAGE_TOKENS * head_dim * fmt.key_bits // 32
    page_words = PAGE_TOKENS * fmt.slot_bytes(head_dim) // 4
    return Specialization(
        D=head_dim,
        KEY_BITS=fmt.key_bits,
        VALUE_BITS=fmt.value_bits,
        PAGES_OF_BLOCK=block_size // PAGE_TOKENS,
        OFFSET_BITS=offset_bits,
        ANCHOR=fmt.anchor,
        KV_HEADS=kv_heads,
        GROUP=group,
        ROW_GROUPS=launch.row_groups(group * query_len),
        WINDOW=window,
        SOFT_CAP=soft_cap,
        RAW_BLOCK=raw_block,
        FUSED=fused,
        R=launch.rows,
        W=launch.num_warps,
        P=launch.pages,
        VALUE_BLOCK=value_block,
        SHARED_QUERIES=launch.shared_queries,
        EVICT_FIRST=launch.evict_first,
        KEY_BLOCKS=key_blocks,
        VALUE_BLOCKS=blocks_of(head_dim, value_block),
        PARTS=1 if fmt.value_bits == 8 else 2,
        # Each block of keys has its own number of words in a lane. Values of 3 bits take words in pairs.
        KEY_ASM=tuple(text(fmt.key_bits, block * PLANES[fmt.key_bits][0] // 128) for block in key_blocks),
        VALUE_ASM=text(fmt.value_bits, 2 if fmt.value_bits == 3 else 1),
        KEY_REGISTERS=len(table_words(fmt.key_bits, head_dim)),
        VALUE_REGISTERS=len(table_words(fmt.value_bits, head_dim)),
        VALUES_AT=values_at,
        SCALES_AT=page_words - PAGE_TOKENS * fmt.scale_bytes // 4,
        PAGE_WORDS=page_words,
        RING_ROWS=ring_rows(launch.num_warps, launch.pages, page_words, 256 * launch.rows),
        QUERY_ROWS=len(key_blocks) if launch.shared_queries else 0,
    )


def _value_block(fmt: KVFormat, head_dim: int, launch: Launch) -> int:
    """Coordinates of values that are unpacked at once: fewer where a last block, rounded up, would reach
    beyond the page's end. Behind the last values, four tokens in each byte column, there are scales."""
    beyond = sum(blocks_of(head_dim, launch.value_block)) - head_dim
    fits = 4 * beyond * PLANES[fmt.value_bits][-1] // 8 <= PAGE_TOKENS * fmt.scale_bytes
    return launch.value_block if fits else 64
