"""`store.reference.store_step` in Triton: new tokens are kept raw, and blocks that they complete are encoded.

Sequences that are decoded have few new tokens, whose number only the device knows: one launch keeps them all,
and encodes the block whose last token is among them. Chunks of prompts are cut into items on the host
(`store.chunks`): an item is encoded where it completes its block, and kept raw where it does not.

A program takes a share of the tokens of a block and one KV head, their keys or their values. The tokens of a
block that it encodes are those of the batch and, before them, what earlier steps kept raw. No program reads
what another of the same launch writes: a block is encoded into its own place in the cache, its raw tokens lie
in blocks behind that, and the new ones among them, which are kept, are read from the batch.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from turboquant_kernels.codec import Codec
from turboquant_kernels.formats import BLOCK_TOKENS, Encoding
from turboquant_kernels.packing import anchors_of, pages_of
from turboquant_kernels.programmatic_launch import uses_pdl
from turboquant_kernels.raw_block import RawBlocks
from turboquant_kernels.rotation import device_projection
from turboquant_kernels.rotation_kernel import device_signs, load_vectors
from turboquant_kernels.store.chunks import BlockItems
from turboquant_kernels.store.encode_kernel import (
    NUM_WARPS,
    encode,
    page_of,
    specialization,
    write_keys,
    write_values,
)

MOST_SHARES = 4
"""Programs that share the tokens of a block, of which each has a tile at least: at head_dim 80 a tile has 32
tokens."""

PROGRAMS = 1024
"""Of a launch, up to which blocks are shared: some programs for each multiprocessor of a large GPU. Most of
them have nothing to do in most steps of a decode, and more of them would take longer to come and go."""

_BLOCK_TOKENS = tl.constexpr(BLOCK_TOKENS)
_KEEP_ELEMENTS = tl.constexpr(8 * 32 * NUM_WARPS)


def store_decodes(
    codec: Codec,
    key: torch.Tensor,
    value: torch.Tensor,
    kv_cache: torch.Tensor,
    raw: RawBlocks,
    *,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start_loc: torch.Tensor,
    slot_mapping: torch.Tensor,
    max_query_len: int,
) -> None:
    """Stores the new tokens of sequences that have few of them, as `store.reference.store_step`: keeps all of
    them raw, and encodes the blocks that they complete.

    key, value: `raw.dtype` [rows, kv_heads, D], any strides of rows and heads. kv_cache: uint8 [num_blocks,
    BLOCK_TOKENS, kv_heads, slot_bytes], followed in each block by its key anchors where the format has them.
    block_table: int32 [num_seqs, max_blocks], the blocks of raw tokens included. seq_lens: int32 [num_seqs],
    new tokens included; a sequence of length 0 is padding. query_start_loc: int32 [num_seqs + 1], where each
    sequence's rows begin. slot_mapping: int32 or int64 [rows], -1 for a row that is not stored; a block whose
    last token is such a row is not encoded. max_query_len: the most rows that a sequence has.

    One launch whose grid follows from shapes, without synchronisation: it can be captured in a CUDA graph,
    once a first call has compiled it and copied the format's constants to the device. Raises ValueError where
    max_query_len is more than `raw.tokens_per_block`, and as `store_prefills`.
    """
    if max_query_len > raw.tokens_per_block:
        raise ValueError(
            f"{max_query_len} new tokens of a sequence, more than the {raw.tokens_per_block} of a raw block: "
            "they are no decode"
        )
    _launch(
        len(seq_lens),
        codec,
        key,
        value,
        kv_cache,
        raw,
        block_table,
        query_start_loc=query_start_loc,
        seq_lens=seq_lens,
        slots=slot_mapping,
    )


def store_prefills(
    codec: Codec,
    key: torch.Tensor,
    value: torch.Tensor,
    kv_cache: torch.Tensor,
    raw: RawBlocks,
    *,
    block_table: torch.Tensor,
    items: BlockItems,
) -> None:
    """Stores chunks of prompts, as `store.reference.store_step`, but for raw tokens of complete blocks, which
    no later step reads: encodes the blocks that they complete, and keeps the tokens of open blocks raw.

    items: `chunks.plan_blocks` of the batch, on the cache's device; each of its rows is stored. The rest as
    for `store_decodes`. Two launches at most, one where no chunk completes a block that an earlier step
    began. Raises ValueError where coordinates are not adjacent, keys or values are not of `raw.dtype`, or the
    cache does not fit the format or the raw tokens.
    """
    # Whole blocks may be encoded over raw tokens of the begun ones.
    for part in (items.indices[: items.begun], items.indices[items.begun :]):
        _launch(len(part), codec, key, value, kv_cache, raw, block_table, items=part)


def _launch(
    count: int,
    codec: Codec,
    key: torch.Tensor,
    value: torch.Tensor,
    kv_cache: torch.Tensor,
    raw: RawBlocks,
    block_table: torch.Tensor,
    **tokens: torch.Tensor,
) -> None:
    """count: of sequences or items, which `tokens` describe, the kernel's parameters of these names."""
    _refuse_what_does_not_fit(codec, key, value, kv_cache, raw)
    if not count:
        return
    kv_heads, prod, pdl = kv_cache.shape[2], codec.fmt.encoding is Encoding.PROD, uses_pdl(key.device)
    fitting = PROGRAMS // (2 * count * kv_heads)
    shares = min(MOST_SHARES, 1 << max(0, fitting.bit_length() - 1))
    store_blocks_kernel[count, kv_heads, 2 * shares](
        key,
        value,
        kv_cache,
        block_table,
        *(tokens.get(name) for name in ("items", "query_start_loc", "seq_lens", "slots")),
        device_signs(codec.head_dim, codec.seed, key.device),
        device_projection(codec.head_dim, codec.seed, torch.float32, key.device) if prod else None,
        kv_heads,
        kv_cache.stride(0),
        block_table.stride(0),
        key.stride(0),
        key.stride(1),
        value.stride(0),
        value.stride(1),
        SPEC=specialization(codec.fmt, codec.head_dim),
        RAW=raw_places(raw, codec.head_dim),
        PDL=pdl,
        num_warps=NUM_WARPS,
        launch_pdl=pdl,
    )


class RawPlaces(NamedTuple):
    """`RawBlocks` as a kernel parameter."""

    BLOCKS: int
    TOKENS: int
    """Of a block."""
    VECTOR_BYTES: int


def raw_places(raw: RawBlocks, head_dim: int) -> RawPlaces:
    return RawPlaces(raw.blocks, raw.tokens_per_block, head_dim * raw.dtype.itemsize)


def _refuse_what_does_not_fit(
    codec: Codec, key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor, raw: RawBlocks
) -> None:
    if key.stride(-1) != 1 or value.stride(-1) != 1:
        raise ValueError("the coordinates of a key or value are not adjacent in memory")
    if {key.dtype, value.dtype} != {raw.dtype}:
        raise ValueError(f"keys of {key.dtype} and values of {value.dtype}; raw tokens are {raw.dtype}")
    _, block_size, kv_heads, _ = kv_cache.shape
    if block_size != BLOCK_TOKENS:
        raise ValueError(f"a cache of blocks of {block_size} tokens, not {BLOCK_TOKENS}")
    pages_of(kv_cache, codec.layout)
    if codec.fmt.anchor:
        anchors_of(kv_cache, codec.fmt, codec.head_dim)
    raw_bytes = 2 * kv_heads * raw.tokens_per_block * codec.head_dim * raw.dtype.itemsize
    if raw_bytes > kv_cache.stride(0):
        raise ValueError(
            f"{raw.tokens_per_block} raw tokens take {raw_bytes} bytes of a block of {kv_cache.stride(0)}"
        )


@triton.jit(do_not_specialize=["kv_heads", "table_stride"])
def store_blocks_kernel(
    key,
    value,
    cache,  # uint8, blocks `block_stride` bytes apart
    block_table,  # int32 [num_seqs, max_blocks]
    items,  # int32 [n, 4], `BlockItems.indices`; None: sequences that are decoded, by the three that follow
    query_start_loc,
    seq_lens,
    slots,
    signs,
    projection,  # float32 [D, D] for prod, else None
    kv_heads,
    block_stride,
    table_stride,
    key_token_stride,
    key_head_stride,
    value_token_stride,
    value_head_stride,
    SPEC: tl.constexpr,
    RAW: tl.constexpr,  # RawPlaces
    PDL: tl.constexpr,
):
    """Grid: (items or sequences, KV heads, keys and values of each share of a block's tokens)."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    if items is None:
        sequence = tl.program_id(0)
        row = tl.load(query_start_loc + sequence)
        count = tl.load(query_start_loc + sequence + 1) - row
        position = tl.load(seq_lens + sequence) - count
        count = tl.where(position >= 0, count, 0)
    else:
        item = items + 4 * tl.program_id(0)
        sequence = tl.load(item)
        position = tl.load(item + 1)
        row = tl.load(item + 2)
        count = tl.load(item + 3)
    begin = position % _BLOCK_TOKENS
    complete = begin + count >= _BLOCK_TOKENS
    if items is None:
        complete = tl.load(slots + row + _BLOCK_TOKENS - 1 - begin, mask=complete, other=-1) >= 0

    head = tl.program_id(1)
    is_key = tl.program_id(2) % 2 == 0
    table = block_table + sequence.to(tl.int64) * table_stride
    # Of row 0, and of the first raw token of a block.
    key += head.to(tl.int64) * key_head_stride
    value += head.to(tl.int64) * value_head_stride
    vectors = tl.where(is_key, key, value)
    stride = tl.where(is_key, key_token_stride, value_token_stride)
    raw = cache + (2 * head + tl.program_id(2) % 2) * (RAW.TOKENS * RAW.VECTOR_BYTES)

    # The new tokens of a decode may be drafts: where some are rejected, the block is encoded again.
    if (items is None) | (complete == 0):
        _keep(vectors, stride, raw, table, block_stride, slots, position, row, count, SPEC, RAW)
    if complete:
        _encode_block(
            vectors, stride, raw, cache, table, block_stride, signs, projection, position, row, head,
            kv_heads, SPEC, RAW,
        )  # fmt: skip


@triton.jit
def _raw_places(raw, table, block_stride, position, wanted, RAW: tl.constexpr):
    """`RawBlocks.place`: pointers to bytes; anything where not wanted."""
    index = position % _BLOCK_TOKENS
    part = index // RAW.TOKENS
    entry = position // _BLOCK_TOKENS + tl.where(part > 0, part, RAW.BLOCKS)
    block = tl.load(table + entry, mask=wanted, other=0).to(tl.int64)
    return raw + block * block_stride + index % RAW.TOKENS * RAW.VECTOR_BYTES


@triton.jit
def _keep(
    vectors, stride, raw, table, block_stride, slots, position, row, count, SPEC: tl.constexpr,
    RAW: tl.constexpr,
):  # fmt: skip
    """Copies this program's share of `count` rows to their raw places."""
    WIDTH: tl.constexpr = triton.next_power_of_2(SPEC.D)
    ROWS: tl.constexpr = _KEEP_ELEMENTS // WIDTH
    coordinate = tl.arange(0, WIDTH)[None, :]
    step = tl.num_programs(2) // 2 * ROWS
    for first in tl.range(tl.program_id(2) // 2 * ROWS, count, step, num_stages=1):
        i = first + tl.arange(0, ROWS)
        kept = i < count
        if slots is not None:
            kept &= tl.load(slots + row + i, mask=kept, other=-1) >= 0
        place = _raw_places(raw, table, block_stride, position + i, kept, RAW)
        mask = kept[:, None] & (coordinate < SPEC.D)
        tile = tl.load(vectors + (row + i).to(tl.int64)[:, None] * stride + coordinate, mask=mask)
        tl.store(place.to(vectors.dtype)[:, None] + coordinate, tile, mask=mask)


@triton.jit
def _encode_block(
    vectors, stride, raw, cache, table, block_stride, signs, projection, position, row, head, kv_heads,
    SPEC: tl.constexpr, RAW: tl.constexpr,
):  # fmt: skip
    """Encodes this program's share of the tokens of a block, of which those from `position` on are rows of
    the batch from `row` on."""
    share = tl.program_id(2) // 2
    shares = tl.num_programs(2) // 2
    first_token = position // _BLOCK_TOKENS * _BLOCK_TOKENS
    source = vectors, stride, raw, table, block_stride, position, row
    block = cache + tl.load(table + position // _BLOCK_TOKENS).to(tl.int64) * block_stride
    begin = share * (_BLOCK_TOKENS // shares)
    end = begin + _BLOCK_TOKENS // shares
    if tl.program_id(2) % 2 == 0:
        if SPEC.ANCHOR:
            anchor = _block_mean(source, first_token, SPEC, RAW)
            if share == 0:
                _write_anchor(block, anchor, head, kv_heads, SPEC)
        for first in tl.range(begin, end, SPEC.ROWS, num_stages=1):
            token = first + tl.arange(0, SPEC.ROWS)
            tile = _load(source, first_token + token, SPEC, RAW)
            if SPEC.ANCHOR:
                tile -= anchor
            encoded = encode(tile, signs, SPEC, SPEC.KEY)
            page, page_row = page_of(block, token, head, kv_heads, SPEC)
            write_keys(page, page_row, token >= 0, encoded, projection, SPEC)
    else:
        for first in tl.range(begin, end, SPEC.ROWS, num_stages=1):
            token = first + tl.arange(0, SPEC.ROWS)
            tile = _load(source, first_token + token, SPEC, RAW)
            encoded = encode(tile, signs, SPEC, SPEC.VALUE)
            page, page_row = page_of(block, token, head, kv_heads, SPEC)
            write_values(page, page_row, token >= 0, encoded, SPEC)


@triton.jit
def _load(source, position, SPEC: tl.constexpr, RAW: tl.constexpr):
    """Vectors at positions [ROWS], new or raw in the cache, as `load_vectors` has them."""
    vectors, stride, raw, table, block_stride, first_new, row = source
    is_new = position >= first_new
    new = vectors + (row + position - first_new).to(tl.int64) * stride
    kept = _raw_places(raw, table, block_stride, position, is_new == 0, RAW)
    return load_vectors(tl.where(is_new, new, kept.to(vectors.dtype)), position >= 0, SPEC.D, SPEC.INNER)


@triton.jit
def _block_mean(source, first_token, SPEC: tl.constexpr, RAW: tl.constexpr):
    """`store.reference.block_mean`, as float32 [1, ORDER_PADDED, INNER]."""
    TILES: tl.constexpr = _BLOCK_TOKENS // SPEC.ROWS
    total = _sum_tiles(source, first_token, 0, TILES, SPEC, RAW)
    for level in tl.static_range(SPEC.ROWS.bit_length() - 1):
        total = tl.reshape(total, [SPEC.ROWS >> (level + 1), 2, total.shape[1], total.shape[2]])
        total = tl.sum(total, axis=1)
    mean = total * (1 / _BLOCK_TOKENS)
    # To the nearest bf16, half to even, by hand: Triton's interpreter truncates.
    bits = mean.to(tl.int32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16 << 16
    return tl.where(tl.abs(mean) < float("inf"), rounded.to(tl.float32, bitcast=True), 0.0)


@triton.jit
def _sum_tiles(
    source, first_token, FIRST: tl.constexpr, COUNT: tl.constexpr, SPEC: tl.constexpr,
    RAW: tl.constexpr,
):  # fmt: skip
    """The sum of tiles FIRST .. FIRST + COUNT, neighbours first. Tile i has in its row r the block's token
    i + r * tiles: so neighbours meet in registers, and the rows of one tile remain to be added."""
    TILES: tl.constexpr = _BLOCK_TOKENS // SPEC.ROWS
    if COUNT == 1:
        position = first_token + FIRST + TILES * tl.arange(0, SPEC.ROWS)
        total = _load(source, position, SPEC, RAW)
    else:
        HALF: tl.constexpr = COUNT // 2
        total = _sum_tiles(source, first_token, FIRST, HALF, SPEC, RAW)
        total += _sum_tiles(source, first_token, FIRST + HALF, HALF, SPEC, RAW)
    return total


@triton.jit
def _write_anchor(block, anchor, head, kv_heads, SPEC: tl.constexpr):
    """anchor: float32 [1, ORDER_PADDED, INNER], of bf16 numbers, which are the upper halves of their bits."""
    outer = tl.arange(0, anchor.shape[1])[None, :, None]
    coordinate = outer * SPEC.INNER + tl.arange(0, SPEC.INNER)[None, None, :]
    anchors = (block + _BLOCK_TOKENS * kv_heads * SPEC.SLOT_BYTES).to(tl.pointer_type(tl.int16))
    upper = (anchor.to(tl.int32, bitcast=True) >> 16).to(tl.int16)
    tl.store(anchors + head * SPEC.D + coordinate, upper, mask=coordinate < SPEC.D)
