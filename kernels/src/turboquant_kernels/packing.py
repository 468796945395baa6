"""Bytes of a page: bit planes of codes, and where each region lies.

A code of b bits is cut into planes of 4, 2, 1 or 8 bits (3 = 2 + 1, 5 = 4 + 1, 6 = 4 + 2; low bits in the
first plane), so that every plane fills whole bytes and no byte is shared by two tokens. Within a plane
coordinate i takes bits (i * w) % 8 and up of byte i * w // 8.

A page holds `PAGE_TOKENS` tokens of one KV head. Its regions follow one another, each one token after the
other:

    key code planes | value code planes | [prod: key residual signs] | key scales | value scales
    | [prod: key residual norms]

Every offset follows from `KVFormat`; the sum is `KVFormat.page_bytes`.
"""

from dataclasses import dataclass
from functools import cache, reduce

import torch

from turboquant_kernels.formats import PAGE_TOKENS, SCALE_BYTES, Encoding, KVFormat

PLANES = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 8: (8,)}
"""Widths of the bit planes of a code, low bits first."""


def pack(codes: torch.Tensor, bits: int) -> list[torch.Tensor]:
    """The bit planes of codes: uint8 [..., D] -> one uint8 [..., D * w / 8] for each plane width w."""
    planes, shift = [], 0
    for width in PLANES[bits]:
        plane = ((codes >> shift) & ((1 << width) - 1)).unflatten(-1, (-1, 8 // width))
        parts = [plane[..., position] << (position * width) for position in range(8 // width)]
        planes.append(reduce(torch.bitwise_or, parts))
        shift += width
    return planes


def unpack(planes: list[torch.Tensor], bits: int) -> torch.Tensor:
    """The inverse of `pack`: uint8 [..., D]."""
    return take_rows(group_codes(bits), group_index(planes, bits))


def group_size(bits: int) -> int:
    """Coordinates that share a byte of the first plane: a group, the unit that is read at once."""
    return 8 // PLANES[bits][0]


def group_index(planes: list[torch.Tensor], bits: int) -> torch.Tensor:
    """All bits of each group as one number: int32 [..., D / group_size].

    The low byte is the byte of the first plane, above it stand the group's bits of the second.
    """
    first, *second = planes
    index = first.int()
    return index | take_rows(_second_plane_parts(bits), second[0]) if second else index


@cache
def group_codes(bits: int) -> torch.Tensor:
    """The codes of a group, by its `group_index`: uint8 [2**(bits * group_size), group_size]."""
    size = group_size(bits)
    index = torch.arange(1 << (bits * size), dtype=torch.int32)[:, None]
    position = torch.arange(size, dtype=torch.int32)
    codes, index_shift, code_shift = torch.zeros_like(index), 0, 0
    for width in PLANES[bits]:
        codes = codes | ((index >> (index_shift + position * width)) & ((1 << width) - 1)) << code_shift
        index_shift, code_shift = index_shift + size * width, code_shift + width
    return codes.to(torch.uint8)


@cache
def _second_plane_parts(bits: int) -> torch.Tensor:
    """What a byte of the second plane adds to the indices of its groups: int32 [256, groups]."""
    part_bits = group_size(bits) * PLANES[bits][1]
    byte = torch.arange(256, dtype=torch.int32)[:, None]
    return ((byte >> torch.arange(0, 8, part_bits, dtype=torch.int32)) & ((1 << part_bits) - 1)) << 8


def take_rows(table: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Rows of a table one after another: table [n, w], index int [..., m] -> table's dtype [..., m * w].

    A row of up to 16 bytes is copied as one element, which is about four times as fast as PyTorch's row
    gather; this is where a CPU spends its time in reading compressed pages.
    """
    row_type = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}
    row_bytes = table.shape[1] * table.element_size()
    rows = table.view(row_type[row_bytes]).squeeze(-1).index_select(0, index.flatten().int())
    return rows.view(table.dtype).view(*index.shape[:-1], index.shape[-1] * table.shape[1])


@dataclass(frozen=True)
class Region:
    """A part of a page that holds the same number of bytes for each token."""

    offset: int
    token_bytes: int

    def of(self, pages: torch.Tensor) -> torch.Tensor:
        """A view of this region: uint8 [..., page_bytes] -> [..., PAGE_TOKENS, token_bytes]."""
        end = self.offset + PAGE_TOKENS * self.token_bytes
        return pages[..., self.offset : end].unflatten(-1, (PAGE_TOKENS, self.token_bytes))


@dataclass(frozen=True)
class PageLayout:
    """The regions of a page of one KV head, in the order of their bytes."""

    key_planes: tuple[Region, ...]
    value_planes: tuple[Region, ...]
    key_residual_signs: Region | None
    key_scale: Region
    value_scale: Region
    key_residual_norm: Region | None
    page_bytes: int


@cache
def page_layout(fmt: KVFormat, head_dim: int) -> PageLayout:
    """The layout of `fmt` at `head_dim`, whose regions fill a page of `fmt.page_bytes(head_dim)` bytes."""
    end = 0

    def region(token_bytes: int) -> Region:
        nonlocal end
        start, end = end, end + PAGE_TOKENS * token_bytes
        return Region(start, token_bytes)

    prod = fmt.encoding is Encoding.PROD
    layout = PageLayout(
        key_planes=tuple(region(head_dim * width // 8) for width in PLANES[fmt.key_code_bits]),
        value_planes=tuple(region(head_dim * width // 8) for width in PLANES[fmt.value_bits]),
        key_residual_signs=region(head_dim // 8) if prod else None,
        key_scale=region(SCALE_BYTES),
        value_scale=region(SCALE_BYTES),
        key_residual_norm=region(SCALE_BYTES) if prod else None,
        page_bytes=fmt.page_bytes(head_dim),
    )
    assert end == layout.page_bytes, "regions fill the page"
    return layout


def pages_of(kv_cache: torch.Tensor, layout: PageLayout) -> torch.Tensor:
    """The engine's cache as pages: a view, uint8 [num_blocks, block_size / 16, kv_heads, page_bytes].

    kv_cache is uint8 [num_blocks, block_size, kv_heads, slot_bytes]. Blocks may lie apart (a page size padded
    for other layers, a multiple of 8 bytes); within a block the bytes must be contiguous. Raises ValueError
    where they are not, or where block_size or slot_bytes do not fit the format.
    """
    _, block_size, kv_heads, slot_bytes = kv_cache.shape
    if block_size % PAGE_TOKENS:
        raise ValueError(f"block_size {block_size} is not a multiple of {PAGE_TOKENS}, the tokens of a page")
    if slot_bytes * PAGE_TOKENS != layout.page_bytes:
        raise ValueError(
            f"a cache slot of {slot_bytes} bytes is not {layout.page_bytes // PAGE_TOKENS}, the format's"
        )
    if not kv_cache[0].is_contiguous():
        raise ValueError("the bytes of a cache block are not contiguous")
    return kv_cache.flatten(1).unflatten(1, (block_size // PAGE_TOKENS, kv_heads, layout.page_bytes))
