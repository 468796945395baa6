"""Bytes of a page, against a packer written in plain Python from the description in `packing`'s docstring."""

import pytest
import torch
from plain_packing import WIDTHS, bit_places, plain_pack, plain_unpack, regions, row_places

from turboquant_kernels.formats import COMPRESSED_FORMATS, HEAD_DIMS, PAGE_TOKENS, Encoding, KVFormat
from turboquant_kernels.packing import (
    PLANES,
    Region,
    anchors_of,
    group_codes,
    key_order,
    page_layout,
    pages_of,
    row_of,
    sign_order,
    take_rows,
    value_order,
)

KEYS = [KVFormat(bits, 4) for bits in (2, 3, 4, 5, 6, 8)]
VALUES = [KVFormat(4, bits) for bits in (2, 3, 4, 8)]
ORDERS = [
    *(pytest.param(key_order, fmt, True, id=f"key-{fmt.key_bits}") for fmt in KEYS),
    *(pytest.param(value_order, fmt, False, id=f"value-{fmt.value_bits}") for fmt in VALUES),
]


def random_codes(*shape, bits):
    return torch.randint(0, 1 << bits, shape, dtype=torch.uint8)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize(("order_of", "fmt", "keys"), ORDERS)
def test_planes_are_those_of_the_plain_packer(order_of, fmt, keys, head_dim):
    order = order_of(fmt, head_dim)
    codes = random_codes(3, head_dim, bits=order.bits)
    planes = order.pack(codes)
    for row in range(3):
        packed = [plane[row].tolist() for plane in planes]
        assert packed == plain_pack(codes[row].tolist(), order.bits, keys)
        assert plain_unpack(packed, order.bits, keys) == codes[row].tolist()


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize(("order_of", "fmt", "keys"), ORDERS)
def test_unpack_inverts_pack(order_of, fmt, keys, head_dim):
    order = order_of(fmt, head_dim)
    codes = random_codes(2, 5, head_dim, bits=order.bits)
    assert torch.equal(order.unpack(order.pack(codes)), codes)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize(("order_of", "fmt", "keys"), ORDERS)
def test_every_bit_has_a_place_of_its_own_and_every_place_a_bit(order_of, fmt, keys, head_dim):
    bits = order_of(fmt, head_dim).bits
    places = [place for i in range(head_dim) for place in bit_places(i, bits, head_dim, keys)]
    everywhere = [(p, at) for p, width in enumerate(WIDTHS[bits]) for at in range(head_dim * width)]
    assert sorted(places) == everywhere


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_residual_signs_are_in_natural_order(head_dim):
    signs = random_codes(head_dim, bits=1)
    assert [sign_order(head_dim).pack(signs)[0].tolist()] == plain_pack(signs.tolist(), 1, keys=True)


def test_one_shift_and_mask_bring_three_bit_high_bits_over_a_word_of_codes():
    """What the order is for: high bits of a whole word, in the nibbles of the codes they belong to."""
    order = key_order(KVFormat(3, 4), 64)
    codes = random_codes(64, bits=3)
    low, high = (plane.view(torch.int32).tolist() for plane in order.pack(codes))
    for word in range(4):
        over = high[word // 2] >> 2 * (word % 2) & 0x33333333
        for k in range(8):
            pair = codes[16 * word + 2 * k :][:2].tolist()
            assert over >> 4 * k & 3 == (pair[0] >> 2) | (pair[1] >> 2) << 1
            assert low[word] >> 4 * k & 15 == (pair[0] & 3) | (pair[1] & 3) << 2


@pytest.mark.parametrize("bits", [5, 6])
def test_one_shift_brings_the_signs_of_four_codes_to_one_place_of_four_bytes(bits):
    codes = random_codes(64, bits=bits)
    signs = key_order(KVFormat(bits, 4), 64).pack(codes)[-1].view(torch.int32).tolist()
    for register in range(16):
        over = signs[register // 8] >> register % 8 & 0x01010101
        four = codes[4 * register :][:4].tolist()
        assert over == sum((code >> bits - 1) << 8 * b for b, code in enumerate(four))


@pytest.mark.parametrize("bits", sorted(PLANES))
def test_a_group_index_tells_all_codes_of_a_group_apart(bits):
    distinct = group_codes(bits).unique(dim=0)
    assert len(distinct) == (1 << bits) ** (8 // WIDTHS[bits][0])


def test_take_rows_gathers_rows_of_any_width():
    for width in (1, 2, 4):
        table = torch.randn(9, width)
        index = torch.tensor([[8, 0, 3], [1, 1, 2]], dtype=torch.uint8)
        assert torch.equal(take_rows(table, index), table[index.long()].flatten(-2))


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("fmt", COMPRESSED_FORMATS, ids=lambda fmt: fmt.name)
def test_regions_follow_one_another_in_the_documented_order_and_fill_the_page(fmt, head_dim):
    layout = page_layout(fmt, head_dim)
    in_order = [
        *layout.key_planes,
        *layout.value_planes,
        *([layout.key_residual_signs] if fmt.encoding is Encoding.PROD else []),
        layout.scales,
    ]
    offset = 0
    for region, (width, quads) in zip(in_order, regions(fmt, head_dim), strict=True):
        assert (region.offset, region.token_bytes, region.quads) == (offset, width, quads)
        offset += 16 * width
    assert offset == layout.page_bytes == fmt.page_bytes(head_dim)


@pytest.mark.parametrize("quads", [False, True])
@pytest.mark.parametrize("width", [6, 10, 64])
def test_each_token_has_its_own_bytes_of_a_region(quads, width):
    region = Region(32, width, quads)
    pages = torch.randint(0, 256, (3, 32 + 16 * width + 5), dtype=torch.uint8)
    rows = region.of(pages)
    for token in range(PAGE_TOKENS):
        places = torch.tensor(row_places(token, width, quads))
        assert torch.equal(rows[:, token], pages[:, 32 + places])
    everywhere = [at for token in range(PAGE_TOKENS) for at in row_places(token, width, quads)]
    assert sorted(everywhere) == list(range(16 * width))


@pytest.mark.parametrize("quads", [False, True])
def test_what_is_written_to_a_row_is_read_from_it(quads):
    region = Region(0, 10, quads)
    pages = torch.zeros(3, 16 * 10, dtype=torch.uint8)
    tokens = torch.tensor([15, 0, 9, 6])
    written = torch.randint(1, 256, (3, 4, 10), dtype=torch.uint8)
    region.rows(pages)[:, *row_of(tokens)] = written
    assert torch.equal(region.of(pages)[:, tokens], written)
    assert (pages != 0).sum() == written.numel()


def test_pages_of_a_block_follow_the_bytes_of_the_block():
    layout = page_layout(KVFormat(4, 4), 64)
    cache = torch.randint(0, 256, (3, 32, 2, 68), dtype=torch.uint8)
    pages = pages_of(cache, layout)
    assert pages.shape == (3, 2, 2, 16 * 68)
    assert pages.data_ptr() == cache.data_ptr()
    assert torch.equal(pages[1].flatten(), cache[1].flatten())


def test_blocks_may_lie_apart():
    cache = torch.zeros(3, 5000, dtype=torch.uint8)[:, : 32 * 2 * 68].unflatten(1, (32, 2, 68))
    assert pages_of(cache, page_layout(KVFormat(4, 4), 64)).shape == (3, 2, 2, 1088)


@pytest.mark.parametrize(
    ("cache", "message"),
    [
        (torch.zeros(1, 24, 1, 68, dtype=torch.uint8), "block_size 24 is not a multiple of 16"),
        (torch.zeros(1, 16, 1, 70, dtype=torch.uint8), "slot of 70 bytes is not 68"),
        (torch.zeros(1, 2, 16, 68, dtype=torch.uint8).transpose(1, 2), "not contiguous"),
    ],
)
def test_a_cache_of_another_shape_is_refused(cache, message):
    with pytest.raises(ValueError, match=message):
        pages_of(cache, page_layout(KVFormat(4, 4), 64))


ANCHORED = KVFormat(4, 4, anchor=True)


@pytest.mark.parametrize("padding", [0, 64])
def test_anchors_follow_the_pages_of_their_block(padding):
    pages, anchors = 256 * 2 * 68, 2 * 2 * 64 * 2
    memory = torch.randint(0, 256, (3, pages + anchors + padding), dtype=torch.uint8)
    cache = memory[:, :pages].unflatten(1, (256, 2, 68))
    view = anchors_of(cache, ANCHORED, 64)
    assert (view.shape, view.dtype) == ((3, 2, 2, 64), torch.bfloat16)
    assert torch.equal(view.view(torch.uint8).flatten(1), memory[:, pages : pages + anchors])
    assert memory.shape[1] - padding == 2 * ANCHORED.page_bytes(64, tokens=256)
    view.zero_()
    assert not memory[:, pages : pages + anchors].any()


@pytest.mark.parametrize(
    ("cache", "message"),
    [
        (torch.zeros(2, 128, 2, 68, dtype=torch.uint8), "blocks lie 17408 bytes apart and take 17664"),
        (torch.zeros(2, 64, 2, 68, dtype=torch.uint8), "64 tokens are not a multiple of 128"),
    ],
)
def test_a_cache_without_room_for_anchors_is_refused(cache, message):
    with pytest.raises(ValueError, match=message):
        anchors_of(cache, ANCHORED, 64)


@pytest.mark.parametrize(
    ("bits", "keys", "i", "planes"),
    [
        # Coordinate 3 of a 3-bit value, code 0b101: low bits 01 in plane 0; k = 1, s = 1, x = 0: bit 5.
        (3, False, 3, [{0: 0b01_00_00_00}, {0: 0b0010_0000}]),
        # Coordinate 21 of a 3-bit key: x = 1, k = 2, s = 1: bit 11.
        (3, True, 21, [{5: 0b00_00_01_00}, {1: 0b0000_1000}]),
        # Coordinate 6 of a 5-bit key, code 0b10101: r = 1, b = 2: bit 8 * 2 + 1.
        (5, True, 6, [{3: 0b0000_0101}, {2: 0b0000_0010}]),
    ],
)
def test_the_plain_packer_places_a_known_code(bits, keys, i, planes):
    codes = [0] * 64
    codes[i] = {3: 0b101, 5: 0b10101}[bits]
    packed = plain_pack(codes, bits, keys)
    assert [{at: byte for at, byte in enumerate(plane) if byte} for plane in packed] == planes
