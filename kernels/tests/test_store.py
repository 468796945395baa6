"""The store: every format reads back what it wrote, and nothing else in the cache changes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from turboquant_kernels.codec import Codec
from turboquant_kernels.formats import COMPRESSED_FORMATS, HEAD_DIMS, PAGE_TOKENS, Encoding, KVFormat
from turboquant_kernels.packing import PLANES
from turboquant_kernels.store.reference import store


def random_cache(codec, blocks=3, block_size=32, kv_heads=2):
    shape = (blocks, block_size, kv_heads, codec.fmt.slot_bytes(codec.head_dim))
    return torch.randint(0, 256, shape, dtype=torch.uint8)


def slot_bytes_of(codec, cache, slot, head):
    """The bytes of one token, gathered in plain Python from the description in `packing`'s docstring."""
    fmt, head_dim = codec.fmt, codec.head_dim
    _, block_size, kv_heads, slot_bytes = cache.shape
    widths = [head_dim * width // 8 for width in PLANES[fmt.key_code_bits] + PLANES[fmt.value_bits]]
    widths += [head_dim // 8, 2, 2, 2] if fmt.encoding is Encoding.PROD else [2, 2]
    block, offset = divmod(slot, block_size)
    page, token = divmod(offset, PAGE_TOKENS)
    begin = ((block * block_size // PAGE_TOKENS + page) * kv_heads + head) * PAGE_TOKENS * slot_bytes
    parts, flat = [], cache.flatten()
    for width in widths:
        parts.append(flat[begin + token * width : begin + (token + 1) * width])
        begin += PAGE_TOKENS * width
    return parts


def plain_code(planes, bits, i):
    """Code of coordinate i from a token's planes, bit by bit."""
    code, shift = 0, 0
    for plane, width in zip(planes, PLANES[bits], strict=True):
        for b in range(width):
            code |= (int(plane[(i * width + b) // 8]) >> (i * width + b) % 8 & 1) << (shift + b)
        shift += width
    return code


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("fmt", COMPRESSED_FORMATS, ids=lambda fmt: fmt.name)
def test_pages_hold_what_was_encoded(fmt, head_dim):
    codec = Codec(fmt, head_dim)
    cache = random_cache(codec)
    key, value = torch.randn(2, 5, 2, head_dim)
    slots = torch.tensor([40, 0, 95, 33, 15])
    store(codec, key, value, cache, slots)

    keys, values = codec.encode_keys(key), codec.encode_values(value)
    planes = len(PLANES[fmt.key_code_bits]), len(PLANES[fmt.value_bits])
    for token, slot in enumerate(slots.tolist()):
        parts = slot_bytes_of(codec, cache, slot, head=1)
        key_planes, value_planes, rest = (
            parts[: planes[0]],
            parts[planes[0] : sum(planes)],
            parts[sum(planes) :],
        )
        for i in (0, 1, 2, 3, head_dim // 2 + 1, head_dim - 1):
            assert plain_code(key_planes, fmt.key_code_bits, i) == keys.codes[token, 1, i]
            assert plain_code(value_planes, fmt.value_bits, i) == values.codes[token, 1, i]
        if fmt.encoding is Encoding.PROD:
            signs, *rest = rest
            assert plain_code([signs], 1, head_dim - 2) == keys.residual_signs[token, 1, head_dim - 2]
            assert rest[2].view(torch.float16) == keys.residual_norm[token, 1]
        assert rest[0].view(torch.float16) == keys.scale[token, 1]
        assert rest[1].view(torch.float16) == values.scale[token, 1]


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("fmt", COMPRESSED_FORMATS, ids=lambda fmt: fmt.name)
def test_pages_read_back_as_the_decoded_vectors(fmt, head_dim):
    codec = Codec(fmt, head_dim)
    cache = random_cache(codec, blocks=1, block_size=16)
    key, value = torch.randn(2, 16, 2, head_dim)
    store(codec, key, value, cache, torch.arange(16))
    pages = cache.view(2, -1)
    read_key = codec.unrotate(codec.read_rotated_keys(pages)).transpose(0, 1)
    read_value = codec.unrotate(codec.read_rotated_values(pages)).transpose(0, 1)
    assert torch.allclose(read_key, codec.decode_keys(codec.encode_keys(key)), atol=1e-5)
    assert torch.allclose(read_value, codec.decode_values(codec.encode_values(value)), atol=1e-5)


@settings(max_examples=40)
@given(
    fmt=st.sampled_from(COMPRESSED_FORMATS),
    head_dim=st.sampled_from(HEAD_DIMS),
    block_size=st.sampled_from([16, 32, 48, 128]),
    data=st.data(),
)
def test_bytes_of_other_slots_stay(fmt, head_dim, block_size, data):
    codec = Codec(fmt, head_dim)
    cache = random_cache(codec, block_size=block_size)
    before = cache.clone()
    any_slot = st.integers(0, 3 * block_size - 1)
    slots = data.draw(st.lists(any_slot, unique=True, max_size=6))
    key, value = torch.randn(2, len(slots), 2, head_dim)
    store(codec, key, value, cache, torch.tensor(slots, dtype=torch.int64))
    neighbours = {slot + d for slot in slots for d in (-1, 1)} & set(range(3 * block_size))
    for slot in (neighbours | set(data.draw(st.lists(any_slot, max_size=4)))) - set(slots):
        for head in (0, 1):
            old, new = slot_bytes_of(codec, before, slot, head), slot_bytes_of(codec, cache, slot, head)
            assert torch.equal(torch.cat(old), torch.cat(new))
    assert (cache != before).sum() <= len(slots) * 2 * fmt.slot_bytes(head_dim)


@pytest.mark.parametrize("fmt", [KVFormat(5, 3), KVFormat(3, 4, Encoding.PROD)], ids=lambda fmt: fmt.name)
def test_one_token_at_a_time_gives_the_bytes_of_all_at_once(fmt):
    codec = Codec(fmt, 128)
    key, value = torch.randn(2, 40, 2, 128)
    slots = torch.randperm(96)[:40]
    together = random_cache(codec)
    singly = together.clone()
    store(codec, key, value, together, slots)
    for i in range(40):
        store(codec, key[i : i + 1], value[i : i + 1], singly, slots[i : i + 1])
    assert torch.equal(together, singly)


def test_slot_minus_one_is_padding():
    codec = Codec(KVFormat(4, 4), 64)
    cache = random_cache(codec)
    expected = cache.clone()
    key, value = torch.randn(2, 4, 2, 64)
    store(codec, key[[1, 3]], value[[1, 3]], expected, torch.tensor([7, 20]))
    store(codec, key, value, cache, torch.tensor([-1, 7, -1, 20]))
    assert torch.equal(cache, expected)


def test_only_padding_writes_nothing():
    codec = Codec(KVFormat(4, 4), 64)
    cache = random_cache(codec)
    before = cache.clone()
    store(codec, *torch.randn(2, 2, 2, 64), cache, torch.tensor([-1, -1]))
    store(codec, *torch.randn(2, 0, 2, 64), cache, torch.empty(0, dtype=torch.int64))
    assert torch.equal(cache, before)


def test_tokens_beyond_the_slot_mapping_are_ignored():
    codec = Codec(KVFormat(4, 4), 64)
    cache = random_cache(codec)
    expected = cache.clone()
    key, value = torch.randn(2, 4, 2, 64)
    store(codec, key[:2], value[:2], expected, torch.tensor([7, 20]))
    store(codec, key, value, cache, torch.tensor([7, 20]))
    assert torch.equal(cache, expected)


def test_blocks_that_lie_apart_are_written_in_place():
    codec = Codec(KVFormat(4, 4), 64)
    memory = torch.zeros(3, 32 * 2 * 68 + 64, dtype=torch.uint8)
    cache = memory[:, : 32 * 2 * 68].unflatten(1, (32, 2, 68))
    dense = torch.zeros(3, 32, 2, 68, dtype=torch.uint8)
    key, value = torch.randn(2, 3, 2, 64)
    slots = torch.tensor([5, 40, 80])
    store(codec, key, value, cache, slots)
    store(codec, key, value, dense, slots)
    assert torch.equal(cache, dense)
    assert not memory[:, 32 * 2 * 68 :].any()
