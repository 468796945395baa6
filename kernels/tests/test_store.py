"""The store: every format reads back what it wrote, and nothing else in the cache changes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_packing import plain_pack, slot_rows

from turboquant_kernels.codec import Codec
from turboquant_kernels.formats import COMPRESSED_FORMATS, HEAD_DIMS, Encoding, KVFormat
from turboquant_kernels.packing import anchors_of
from turboquant_kernels.store.reference import store


def random_cache(codec, blocks=3, block_size=32, kv_heads=2):
    shape = (blocks, block_size, kv_heads, codec.fmt.slot_bytes(codec.head_dim))
    return torch.randint(0, 256, shape, dtype=torch.uint8)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("fmt", COMPRESSED_FORMATS, ids=lambda fmt: fmt.name)
def test_pages_hold_what_was_encoded(fmt, head_dim):
    codec = Codec(fmt, head_dim)
    cache = random_cache(codec)
    key, value = torch.randn(2, 5, 2, head_dim)
    slots = torch.tensor([40, 0, 95, 33, 15])
    store(codec, key, value, cache, slots)

    keys, values = codec.encode_keys(key), codec.encode_values(value)
    for token, slot in enumerate(slots.tolist()):
        expected = [
            *plain_pack(keys.codes[token, 1].tolist(), fmt.key_code_bits, keys=True),
            *plain_pack(values.codes[token, 1].tolist(), fmt.value_bits, keys=False),
        ]
        scales = [keys.scale[token, 1], values.scale[token, 1]]
        if fmt.encoding is Encoding.PROD:
            expected += plain_pack(keys.residual_signs[token, 1].tolist(), 1, keys=True)
            scales.append(keys.residual_norm[token, 1])
        expected.append(torch.stack(scales).view(torch.uint8).tolist())
        assert slot_rows(fmt, head_dim, cache, slot, head=1) == expected


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
            rows = slot_rows(fmt, head_dim, before, slot, head)
            assert slot_rows(fmt, head_dim, cache, slot, head) == rows
    assert (cache != before).sum() <= len(slots) * 2 * fmt.slot_bytes(head_dim)


@given(
    fmt=st.sampled_from(COMPRESSED_FORMATS),
    head_dim=st.sampled_from(HEAD_DIMS),
    count=st.integers(1, 80),
    cut=st.integers(0, 80),
    seed=st.integers(0, 2**32),
)
def test_a_token_has_the_same_bytes_whatever_is_stored_with_it(fmt, head_dim, count, cut, seed):
    """Prefix caching and chunked prefill rely on it: no sum may round as the batch's shape suggests."""
    torch.manual_seed(seed)
    codec = Codec(fmt, head_dim)
    key, value = torch.randn(2, count, 2, head_dim)
    slots = torch.randperm(96)[:count]
    together = random_cache(codec)
    apart = together.clone()
    store(codec, key, value, together, slots)
    cut %= count
    for part in (slice(0, cut), slice(cut, cut + 1), slice(cut + 1, count)):
        store(codec, key[part], value[part], apart, slots[part])
    assert torch.equal(together, apart)


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


@pytest.mark.parametrize("encoding", [Encoding.MSE, Encoding.PROD])
@pytest.mark.parametrize("head_dim", [80, 128])
def test_with_anchors_the_differences_to_them_are_stored(encoding, head_dim):
    anchored, plain = KVFormat(4, 3, encoding, anchor=True), KVFormat(4, 3, encoding)
    pages = 256 * 2 * plain.slot_bytes(head_dim)
    memory = torch.zeros(3, 2 * anchored.page_bytes(head_dim, tokens=256) + 64, dtype=torch.uint8)
    cache = memory[:, :pages].unflatten(1, (256, 2, plain.slot_bytes(head_dim)))
    anchors = anchors_of(cache, anchored, head_dim)
    anchors.copy_(3 * torch.randn(anchors.shape))
    around = memory[:, pages:].clone()

    key, value = torch.randn(2, 5, 2, head_dim)
    slots = torch.tensor([0, 127, 128, 300, 767])
    store(Codec(anchored, head_dim), key, value, cache, slots)
    expected = torch.zeros(cache.shape, dtype=torch.uint8)
    own = torch.stack([anchors[0, 0], anchors[0, 0], anchors[0, 1], anchors[1, 0], anchors[2, 1]]).float()
    store(Codec(plain, head_dim), key - own, value, expected, slots)
    assert torch.equal(cache, expected)
    assert torch.equal(memory[:, pages:], around)
