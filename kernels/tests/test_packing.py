"""Bytes of a page, against a packer written in plain Python from the description in `packing`'s docstring."""

import pytest
import torch

from turboquant_kernels.formats import COMPRESSED_FORMATS, HEAD_DIMS, PAGE_TOKENS, Encoding, KVFormat
from turboquant_kernels.packing import PLANES, group_index, pack, page_layout, pages_of, take_rows, unpack

BITS = sorted(PLANES)


def plain_planes(codes, bits):
    """The bit planes of one vector, bit by bit: list of ints -> list of lists of bytes."""
    planes, shift = [], 0
    for width in {1: [1], 2: [2], 3: [2, 1], 4: [4], 5: [4, 1], 6: [4, 2], 8: [8]}[bits]:
        plane = [0] * (len(codes) * width // 8)
        for i, code in enumerate(codes):
            for b in range(width):
                if code >> (shift + b) & 1:
                    plane[(i * width + b) // 8] |= 1 << (i * width + b) % 8
        planes.append(plane)
        shift += width
    return planes


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("bits", BITS)
def test_planes_are_those_of_the_plain_packer(bits, head_dim):
    codes = torch.randint(0, 1 << bits, (3, head_dim), dtype=torch.uint8)
    planes = pack(codes, bits)
    for row in range(3):
        assert [plane[row].tolist() for plane in planes] == plain_planes(codes[row].tolist(), bits)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("bits", BITS)
def test_unpack_inverts_pack(bits, head_dim):
    codes = torch.randint(0, 1 << bits, (2, 5, head_dim), dtype=torch.uint8)
    assert torch.equal(unpack(pack(codes, bits), bits), codes)


@pytest.mark.parametrize("bits", BITS)
def test_planes_take_exactly_the_bits_of_the_codes(bits):
    codes = torch.zeros(7, 64, dtype=torch.uint8)
    assert sum(plane.shape[-1] for plane in pack(codes, bits)) * 8 == 64 * bits


@pytest.mark.parametrize("bits", BITS)
def test_a_group_index_holds_all_bits_of_its_coordinates(bits):
    codes = torch.randint(0, 1 << bits, (4000, 64), dtype=torch.uint8)
    size = 8 // PLANES[bits][0]
    index = group_index(pack(codes, bits), bits)
    groups = codes.unflatten(-1, (-1, size)).int() * (1 << bits) ** torch.arange(size)
    assert len(torch.stack((index, groups.sum(-1))).flatten(1).unique(dim=1)[0]) == (1 << bits) ** size


def test_take_rows_gathers_rows_of_any_width():
    for width in (1, 2, 4):
        table = torch.randn(9, width)
        index = torch.tensor([[8, 0, 3], [1, 1, 2]], dtype=torch.uint8)
        assert torch.equal(take_rows(table, index), table[index.long()].flatten(-2))


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("fmt", COMPRESSED_FORMATS, ids=lambda fmt: fmt.name)
def test_regions_follow_one_another_in_the_documented_order(fmt, head_dim):
    layout = page_layout(fmt, head_dim)
    regions = [
        *layout.key_planes,
        *layout.value_planes,
        *([layout.key_residual_signs] if fmt.encoding is Encoding.PROD else []),
        layout.key_scale,
        layout.value_scale,
        *([layout.key_residual_norm] if fmt.encoding is Encoding.PROD else []),
    ]
    widths = [head_dim * width // 8 for width in PLANES[fmt.key_code_bits] + PLANES[fmt.value_bits]]
    widths += [head_dim // 8, 2, 2, 2] if fmt.encoding is Encoding.PROD else [2, 2]
    offset = 0
    for region, width in zip(regions, widths, strict=True):
        assert (region.offset, region.token_bytes) == (offset, width)
        offset += 16 * width
    assert offset == layout.page_bytes == fmt.page_bytes(head_dim)


def test_a_region_is_one_token_after_another():
    layout = page_layout(KVFormat(4, 4), 64)
    page = torch.arange(layout.page_bytes).to(torch.uint8)
    scales = layout.key_scale.of(page)
    assert scales.shape == (PAGE_TOKENS, 2)
    assert torch.equal(scales.flatten(), page[16 * 64 : 16 * 64 + 32])


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


def test_the_plain_packer_places_a_known_code():
    """Coordinate 3 of a 3-bit vector holds 0b101: its low bits 01 in plane 0, its high bit 1 in plane 1."""
    codes = [0, 0, 0, 0b101, 0, 0, 0, 0]
    assert plain_planes(codes, 3) == [[0b01_00_00_00, 0], [0b0000_1000]]
