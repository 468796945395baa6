"""The store kernel writes what the reference writes: in Triton's interpreter, on a GPU where there is one."""

import dataclasses

import pytest
import torch
from store_agreement import assert_same_as_reference

from turboquant_kernels.codec import Codec
from turboquant_kernels.formats import KVFormat
from turboquant_kernels.packing import anchors_of
from turboquant_kernels.store.kernel import store

# Every width of key and value codes at every kind of head_dim: powers of two, both Paley factors, rows of 10
# bytes (80). The GPU tests take them all.
VARIANTS = [
    ("tq-k4v4", 64),
    ("tq-k3v3", 64),
    ("tq-k3v3", 80),
    ("tq-k6v8", 80),
    ("tq-k4v2-prod", 80),
    ("tq-k5v4", 96),
    ("tq-k3v2-prod", 96),
    ("tq-k2v2", 128),
    ("tq-k3v3", 128),
    ("tq-k4v3-prod", 128),
    ("tq-k5v8", 128),
    ("tq-k6v2", 128),
    ("tq-k8v4", 192),
    ("tq-k5v3", 256),
]


def random_inputs(fmt, head_dim, dtype=torch.bfloat16, tokens=9, kv_heads=2, blocks=3, block_size=32):
    """Keys and values, and a cache full of arbitrary bytes."""
    shape = tokens, kv_heads, head_dim
    key, value = 3 * torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    cache_shape = blocks, block_size, kv_heads, fmt.slot_bytes(head_dim)
    return key, value, torch.randint(256, cache_shape, dtype=torch.uint8)


def check(codec, key, value, cache, slot_mapping, device):
    """Stores with the kernel and compares with the reference."""
    after = cache.to(device)
    after = after.clone() if after is cache else after
    store(codec, key.to(device), value.to(device), after, slot_mapping.to(device))
    assert_same_as_reference(codec, key.cpu(), value.cpu(), slot_mapping, cache, after.cpu())


@pytest.mark.parametrize(("fmt", "head_dim"), VARIANTS)
def test_bytes_are_those_of_the_reference(fmt, head_dim, device):
    codec = Codec(KVFormat.parse(fmt), head_dim)
    key, value, cache = random_inputs(codec.fmt, head_dim)
    # Runs across a page's end, a block's end, backwards, and padding.
    slots = torch.tensor([14, 15, 16, 17, 95, 94, -1, 63, 64])
    check(codec, key, value, cache, slots, device)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_keys_and_values_may_be_views_of_other_types(dtype, device):
    """As they come from a fused projection: queries, keys and values of a token side by side."""
    codec = Codec(KVFormat.parse("tq-k4v3"), 64)
    _, _, cache = random_inputs(codec.fmt, 64)
    fused = torch.randn(5, 8, 64).to(dtype).to(device)
    check(codec, fused[:, 4:6], fused[:, 6:8], cache, torch.arange(5, dtype=torch.int32), device)


@pytest.mark.parametrize("fmt", ["tq-k4v4", "tq-k3v3-prod"])
def test_vectors_at_the_ends_of_the_number_range(fmt, device):
    codec = Codec(KVFormat.parse(fmt), 80)
    # The interpreter misreads denormal bf16.
    key, value, cache = random_inputs(codec.fmt, 80, torch.float32 if device == "cpu" else torch.bfloat16)
    for vectors in (key, value):
        vectors[0] = 0
        vectors[1, 0, 7] = torch.nan
        vectors[1, 1, 9] = -torch.inf
        vectors[2] *= 1e38  # their squares overflow float32, their scale fp16
        vectors[3] *= 1e-38  # some coordinates denormal
        vectors[4] = 1e-39  # denormal throughout
        vectors[5] *= 1e-6  # the scale is denormal in fp16
        vectors[6, :, 1:] = 0
    check(codec, key, value, cache, torch.arange(9), device)


def padded_cache(cache, stride, device):
    """The bytes of `cache` with blocks `stride` bytes apart, zeros between them."""
    memory = torch.zeros(len(cache) * stride, dtype=torch.uint8, device=device)
    padded = memory.as_strided(cache.shape, (stride, *cache.stride()[1:]))
    padded.copy_(cache)
    return padded, memory


def test_blocks_may_lie_apart(device):
    """A cache whose pages are padded, as where other formats share the pool; beyond 4 GiB on a GPU."""
    codec = Codec(KVFormat.parse("tq-k4v2"), 64)
    key, value, cache = random_inputs(codec.fmt, 64)
    padded, memory = padded_cache(cache, cache[0].numel() + 40 if device == "cpu" else 3 << 30, device)
    slots = torch.tensor([0, 40, 64, 65])
    store(codec, key.to(device), value.to(device), padded, slots.to(device))
    assert_same_as_reference(codec, key, value, slots, cache, padded.cpu().contiguous())
    assert not memory[cache[0].numel() : padded.stride(0)].any()


@pytest.mark.parametrize("fmt", ["tq-k4v4", "tq-k3v2-prod"])
def test_keys_are_stored_less_their_anchors(fmt, device):
    """Each block of 128 tokens and each head has its own, behind the pages of the block."""
    fmt = dataclasses.replace(KVFormat.parse(fmt), anchor=True)
    codec = Codec(fmt, 64)
    key, value, cache = random_inputs(fmt, 64, blocks=2, block_size=256)
    stride = 2 * fmt.page_bytes(64, 256)
    before, memory = padded_cache(cache, stride, "cpu")
    anchors_of(before, fmt, 64).copy_(10 * torch.randn(2, 2, 2, 64))
    after_memory = memory.to(device)
    after = after_memory.as_strided(before.shape, before.stride())
    slots = torch.tensor([0, 127, 128, 255, 256, 300, 383, 384, -1])
    store(codec, key.to(device), value.to(device), after, slots.to(device))
    assert_same_as_reference(codec, key, value, slots, before, after.cpu())
    between = slice(before[0].numel(), stride)
    assert torch.equal(after_memory.cpu()[between], memory[between])


def test_a_token_has_the_same_bytes_whatever_is_stored_with_it(device):
    """Alone, as in decode, and as the last of a chunk: to the bit."""
    codec = Codec(KVFormat.parse("tq-k5v3"), 64)
    key, value, cache = (tensor.to(device) for tensor in random_inputs(codec.fmt, 64, tokens=17))
    alone = cache.clone()
    store(codec, key, value, cache, torch.arange(17, device=device))
    for token in (0, 3, 16):
        one = slice(token, token + 1)
        store(codec, key[one], value[one], alone, torch.tensor([token], device=device))
    rest = [token for token in range(17) if token not in (0, 3, 16)]
    store(codec, key[rest], value[rest], alone, torch.tensor(rest, device=device))
    assert torch.equal(cache, alone)


def test_nothing_to_store(device):
    codec = Codec(KVFormat.parse("tq-k4v4"), 64)
    key, value, cache = (tensor.to(device) for tensor in random_inputs(codec.fmt, 64))
    before = cache.clone()
    store(codec, key, value, cache, torch.full((9,), -1, device=device))
    store(codec, key, value, cache, torch.empty(0, dtype=torch.int64, device=device))
    assert torch.equal(cache, before)


def test_coordinates_must_be_adjacent(device):
    codec = Codec(KVFormat.parse("tq-k4v4"), 64)
    key, value, cache = (tensor.to(device) for tensor in random_inputs(codec.fmt, 64))
    strided = key.repeat_interleave(2, -1)[..., ::2]
    with pytest.raises(ValueError, match="not adjacent"):
        store(codec, strided, value, cache, torch.arange(9, device=device))
    with pytest.raises(ValueError, match="not adjacent"):
        store(codec, key, strided, cache, torch.arange(9, device=device))


def test_a_cache_must_hold_the_anchors(device):
    fmt = KVFormat(4, 4, anchor=True)
    key, value, cache = (tensor.to(device) for tensor in random_inputs(fmt, 64, block_size=128))
    with pytest.raises(ValueError, match="with their key anchors"):
        store(Codec(fmt, 64), key, value, cache, torch.arange(9, device=device))
