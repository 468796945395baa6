"""Bytes of a page: bit planes of codes, the order of bits in them, and where each region lies.

A code of b bits is cut into planes of 8, 4, 2 or 1 bits (`PLANES`, low bits in the first), so that every
plane fills whole bytes and no byte is shared by two tokens. In the first plane, of w bits, coordinate i takes
bits (i * w) % 8 and up of byte i * w // 8.

The planes above it have one bit for each coordinate, in an order of their own (`high_bit_order`). Integer
tensor cores want four neighbouring coordinates in each 32-bit register. A kernel gets them from a word of the
first plane by shifts, masks and byte look-ups; were the high bits in natural order too, it would have to
shuffle single bits to bring each to its code. Here one shift and one mask serve a whole word:

    3 bits   Two words of the first plane, P coordinates each, share a group of 2P high bits. Nibble k of the
             group stands over nibble k of both words: its low two bits belong to the first word, its high two
             to the second. Coordinate x * P + 2k + s (x, s in 0..1) is bit 4k + 2x + s. A key's word has 4
             bytes, P = 16 (head_dim 80: 2 bytes, P = 8), a value's one byte, P = 4: the four bytes of its
             register are four tokens (below).
    5, 6     A register takes a 16-bit half word of the first plane, four coordinates. In a group of G = 32
             coordinates (16 at the end of head_dim 80) coordinate 4r + b (b in 0..3) is bit (G / 4) * b + r:
             one shift by r brings the bits of register r to the same place of each of its four bytes.

A page holds `PAGE_TOKENS` tokens of one KV head. Its regions follow one another:

    key code planes | value code planes | [prod: key residual signs] | scales

Each holds a row of bytes for each token, one row after the other, but those of values: attention sums values
over tokens, so a register of a tensor core takes one coordinate of four tokens. A value plane is therefore
[4 quads][bytes of a row][4 tokens], where byte b of quad t belongs to token 8 * (b & 1) + 2 * t + (b >> 1):
the tokens whose weights the products of keys leave in one thread.

The scales of a token are fp16: key scale, value scale and, for prod, the norm of the key's residual; they are
adjacent, so that one load brings them. Residual signs are a plane in natural order. Every offset follows from
`KVFormat`; the sum is 16 times `KVFormat.slot_bytes`.

A block of the engine's cache holds the pages of its KV heads and, if the format has them, after all pages one
bf16 vector for each KV head and `BLOCK_TOKENS` tokens, the anchor that was subtracted from their keys:

    [block_size / 16][kv_heads][page_bytes] | [block_size / 128][kv_heads][head_dim] bf16
"""

from dataclasses import dataclass
from functools import cache, reduce

import torch

from turboquant_kernels.formats import BLOCK_TOKENS, PAGE_TOKENS, Encoding, KVFormat

PAGE_LAYOUT_VERSION = 1
"""To be raised whenever a block of the cache would hold other bytes for the same keys and values: by another
order of bytes, other levels, another rotation. Whoever keeps pages beyond the process that wrote them has it
in their identity, beside the format, the head dimension and the seed of the rotation."""

PLANES = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 1, 1), 8: (8,)}
"""Widths of the bit planes of a code, low bits first."""

KEY_SCALE, VALUE_SCALE, KEY_RESIDUAL_NORM = range(3)
"""Indices in a token's row of scales."""


@dataclass(frozen=True)
class CodeOrder:
    """Where each bit of the codes of one vector stands."""

    bits: int
    head_dim: int
    read_bytes: int
    """3 bits: bytes of the first plane that a kernel reads at once, P / 4 in the order of high bits."""

    @property
    def widths(self) -> tuple[int, ...]:
        """Bits of each plane."""
        return PLANES[self.bits]

    def pack(self, codes: torch.Tensor) -> list[torch.Tensor]:
        """The planes of codes: uint8 [..., D] -> one uint8 [..., D * w / 8] for each width w."""
        width, *high = self.widths
        planes, shift = [_pack_plane(codes & ((1 << width) - 1), width)], width
        for _ in high:
            planes.append(_pack_plane((codes >> shift & 1)[..., high_bit_order(self)], 1))
            shift += 1
        return planes

    def unpack(self, planes: list[torch.Tensor]) -> torch.Tensor:
        """The inverse of `pack`: uint8 [..., D]."""
        return take_rows(group_codes(self.bits), self.group_index(planes))

    def group_index(self, planes: list[torch.Tensor]) -> torch.Tensor:
        """All bits of each group as one number: int32 [..., D / group_size].

        A group are the coordinates of one byte of the first plane, the low byte of the number. Above it
        stand the high bits, of coordinate t of the group at 8 + 4 * (t // 2) + t % 2 (3 bits), at 8 + t (5
        and 6 bits) and 12 + t (the sign of 6 bits).
        """
        first, *high = planes
        if not high:
            return first.int()
        if self.bits == 3:
            return _over_pairs(first, high[0], self.read_bytes)
        nibbles = [_transpose_bits(plane) for plane in high]
        return _over_pairs(first, nibbles[0] if len(high) == 1 else nibbles[0] | nibbles[1] << 4, 1)


def key_order(fmt: KVFormat, head_dim: int) -> CodeOrder:
    """The order of the bits of a key's codes."""
    return CodeOrder(fmt.key_code_bits, head_dim, read_bytes=2 if head_dim % 32 else 4)


def value_order(fmt: KVFormat, head_dim: int) -> CodeOrder:
    """The order of the bits of a value's codes."""
    return CodeOrder(fmt.value_bits, head_dim, read_bytes=1)


def sign_order(head_dim: int) -> CodeOrder:
    """The order of the signs of a key's residual: natural."""
    return CodeOrder(1, head_dim, read_bytes=1)


@cache
def high_bit_order(order: CodeOrder) -> torch.Tensor:
    """The coordinate whose bit stands at each bit of the planes above the first: int64 [D]."""
    coordinates = torch.arange(order.head_dim)
    if order.bits == 3:
        x_k_s = coordinates.view(-1, 2, 2 * order.read_bytes, 2)
        return x_k_s.transpose(1, 2).flatten()
    return torch.cat([group.view(-1, 4).T.flatten() for group in coordinates.split(32)])


def group_size(bits: int) -> int:
    """Coordinates that share a byte of the first plane: a group, the unit that is read at once."""
    return 8 // PLANES[bits][0]


@cache
def group_codes(bits: int) -> torch.Tensor:
    """The codes of a group, by its `CodeOrder.group_index`: uint8 [n, group_size]."""
    width, *high = PLANES[bits]
    t = torch.arange(group_size(bits), dtype=torch.int32)
    index = torch.arange(0x3400 if high else 256, dtype=torch.int32)[:, None]
    codes = index >> t * width & (1 << width) - 1
    for plane in range(len(high)):
        shift = 8 + 4 * plane + 4 * (t // 2) + t % 2
        codes |= (index >> shift & 1) << width + plane
    return codes.to(torch.uint8)


def take_rows(table: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Rows of a table one after another: table [n, w], index int [..., m] -> table's dtype [..., m * w].

    A row of up to 16 bytes is copied as one element, which is about four times as fast as PyTorch's row
    gather; this is where a CPU spends its time in reading compressed pages.
    """
    row_type = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}
    row_bytes = table.shape[1] * table.element_size()
    rows = table.view(row_type[row_bytes]).squeeze(-1).index_select(0, index.flatten().int())
    return rows.view(table.dtype).view(*index.shape[:-1], index.shape[-1] * table.shape[1])


def _pack_plane(codes: torch.Tensor, width: int) -> torch.Tensor:
    """Numbers of `width` bits in natural order: uint8 [..., D] -> uint8 [..., D * width / 8]."""
    parts = codes.unflatten(-1, (-1, 8 // width)).unbind(-1)
    return reduce(torch.bitwise_or, (part << position * width for position, part in enumerate(parts)))


def _over_pairs(first: torch.Tensor, high: torch.Tensor, word_bytes: int) -> torch.Tensor:
    """Each byte of `high` over two bytes of `first`: uint8 [..., 2n] and [..., n] -> int32 [..., 2n].

    Both planes are cut into words. Word i of `high` belongs to words 2 i and 2 i + 1 of `first`. Over a byte
    of the first of these stand bits 0, 1, 4 and 5 of its byte of `high`, over one of the second bits 2, 3, 6
    and 7, shifted to the same positions. Whole words are shifted at once, each byte in 16 bits of its own.
    """
    word = {1: torch.int16, 2: torch.int32, 4: torch.int64}[word_bytes]
    mask = int.from_bytes(b"\x00\x33" * word_bytes, "little")
    index = first.short()
    words = index.view(word).unflatten(-1, (-1, 2))
    high_words = (high.short() << 8).view(word)
    words[..., 0].bitwise_or_(high_words & mask)
    words[..., 1].bitwise_or_(high_words >> 2 & mask)
    return index.int()


def _transpose_bits(plane: torch.Tensor) -> torch.Tensor:
    """A high plane of 5 or 6 bits with the bits of coordinates 4r..4r + 3 as a nibble in byte r.

    uint8 [..., D / 8] -> uint8 [..., D / 4].
    """
    whole = plane.shape[-1] // 4 * 4
    nibbles = _transpose_groups(plane[..., :whole], 32)
    if whole == plane.shape[-1]:
        return nibbles
    return torch.cat((nibbles, _transpose_groups(plane[..., whole:], 16)), dim=-1)


def _transpose_groups(plane: torch.Tensor, group: int) -> torch.Tensor:
    """`_transpose_bits` of groups of one size: each byte of a group adds its bits to all of its nibbles."""
    table = _transposed_bits(group)
    byte = plane.unflatten(-1, (-1, len(table) // 256)).int() + 256 * torch.arange(len(table) // 256)
    rows = take_rows(table, byte).unflatten(-1, (-1, group // 4)).view(_WORD[group // 4]).squeeze(-1)
    return reduce(torch.bitwise_or, rows.unbind(-1)).view(torch.uint8)


_WORD = {4: torch.int32, 8: torch.int64}


@cache
def _transposed_bits(group: int) -> torch.Tensor:
    """What a byte adds to the nibbles of its group: uint8 [bytes of the group * 256, group / 4]."""
    byte = torch.arange(256)
    table = torch.zeros(group // 8, 256, group // 4, dtype=torch.uint8)
    for bit, coordinate in enumerate(torch.arange(group).view(-1, 4).T.flatten().tolist()):
        table[bit // 8, :, coordinate // 4] |= ((byte >> bit % 8 & 1) << coordinate % 4).to(torch.uint8)
    return table.flatten(0, 1)


@dataclass(frozen=True)
class Region:
    """A part of a page that holds a row of the same number of bytes for each token."""

    offset: int
    token_bytes: int
    quads: bool = False
    """Whether the rows of four tokens are interleaved byte by byte, instead of one row after the other."""

    def of(self, pages: torch.Tensor) -> torch.Tensor:
        """The rows of this region: uint8 [..., page_bytes] -> [..., PAGE_TOKENS, token_bytes], to be read."""
        return self.rows(pages).flatten(-4, -2)

    def rows(self, pages: torch.Tensor) -> torch.Tensor:
        """A view of the rows, to be written at `row_of(token)`: [..., 2, 4, 2, token_bytes]."""
        region = pages[..., self.offset : self.offset + PAGE_TOKENS * self.token_bytes]
        if self.quads:
            return region.unflatten(-1, (4, self.token_bytes, 2, 2)).movedim((-1, -2), (-4, -2))
        return region.unflatten(-1, (2, 4, 2, self.token_bytes))


def row_of(token: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Index of a token's row in `Region.rows`: (b & 1, t, b >> 1) of 8 * (b & 1) + 2 * t + (b >> 1)."""
    return token // 8, token // 2 % 4, token % 2


@dataclass(frozen=True)
class PageLayout:
    """The regions of a page of one KV head, in the order of their bytes."""

    key_planes: tuple[Region, ...]
    value_planes: tuple[Region, ...]
    key_residual_signs: Region | None
    scales: Region
    """fp16 for each token, in the order of `KEY_SCALE`, `VALUE_SCALE` and, for prod, `KEY_RESIDUAL_NORM`."""
    page_bytes: int


@cache
def page_layout(fmt: KVFormat, head_dim: int) -> PageLayout:
    """The layout of `fmt` at `head_dim`, whose regions fill a page; anchors stand outside of pages."""
    end = 0

    def region(token_bytes: int, *, quads: bool = False) -> Region:
        nonlocal end
        start, end = end, end + PAGE_TOKENS * token_bytes
        return Region(start, token_bytes, quads)

    layout = PageLayout(
        key_planes=tuple(region(head_dim * width // 8) for width in PLANES[fmt.key_code_bits]),
        value_planes=tuple(region(head_dim * width // 8, quads=True) for width in PLANES[fmt.value_bits]),
        key_residual_signs=region(head_dim // 8) if fmt.encoding is Encoding.PROD else None,
        scales=region(fmt.scale_bytes),
        page_bytes=PAGE_TOKENS * fmt.slot_bytes(head_dim),
    )
    assert end == layout.page_bytes, "regions fill the page"
    return layout


def pages_of(kv_cache: torch.Tensor, layout: PageLayout) -> torch.Tensor:
    """The engine's cache as pages: a view, uint8 [num_blocks, block_size / 16, kv_heads, page_bytes].

    kv_cache is uint8 [num_blocks, block_size, kv_heads, slot_bytes]. Blocks may lie apart, by a multiple of 8
    bytes (anchors stand between them, or a page size is padded for other layers); within a block the bytes
    must be contiguous. Raises ValueError where they are not, or where block_size or slot_bytes do not fit the
    format.
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


def anchors_of(kv_cache: torch.Tensor, fmt: KVFormat, head_dim: int) -> torch.Tensor:
    """The key anchors: a view, bf16 [num_blocks, block_size / 128, kv_heads, D], of what follows the pages.

    kv_cache is the view of the pages, as for `pages_of`; its blocks lie at least kv_heads times
    `fmt.page_bytes(head_dim, block_size)` bytes apart. Raises ValueError where they do not, or where
    block_size is no multiple of `BLOCK_TOKENS`.
    """
    num_blocks, block_size, kv_heads, slot_bytes = kv_cache.shape
    block_bytes = kv_heads * fmt.page_bytes(head_dim, block_size)
    if kv_cache.stride(0) < block_bytes:
        raise ValueError(
            f"blocks lie {kv_cache.stride(0)} bytes apart and take {block_bytes} with their key anchors"
        )
    # No operation on `kv_cache` reaches beyond its own shape, so the view is made by hand.
    anchor_bytes = fmt.anchor_bytes(head_dim, BLOCK_TOKENS)
    anchors = kv_cache.as_strided(
        (num_blocks, block_size // BLOCK_TOKENS, kv_heads, anchor_bytes),
        (kv_cache.stride(0), kv_heads * anchor_bytes, anchor_bytes, 1),
        kv_cache.storage_offset() + block_size * kv_heads * slot_bytes,
    )
    return anchors.view(torch.bfloat16)
