"""Prefill through context tiles against attention over the decompressed cache."""

import pytest
import torch
from plain_attention import torch_attend
from test_paged_attention import Batch

from turboquant_kernels.formats import KVFormat
from turboquant_kernels.prefill import attention
from turboquant_kernels.prefill.attention import prefill_attention
from turboquant_kernels.prefill.expand import expand
from turboquant_kernels.prefill.tiles import plan_tiles

TOLERANCE = 1e-5


def on(device, cache):
    """A cache with what lies between its blocks: anchors."""
    blocks, stride = len(cache), cache.stride(0)
    return cache.as_strided((blocks, stride), (stride, 1)).to(device).as_strided(cache.shape, cache.stride())


def prefill(batch, device, capacity, *, window=None, **options):
    starts = torch.tensor([0, *batch.query_lens]).cumsum(0).tolist()
    tiles = plan_tiles(starts, batch.seq_lens, capacity=capacity, window=window)
    if options.get("sinks") is not None:
        options["sinks"] = options["sinks"].to(device)
    out = prefill_attention(
        batch.codec,
        torch.cat(batch.queries).to(device),
        on(device, batch.cache),
        batch.block_table.to(device),
        [tile.to(torch.device(device)) for tile in tiles],
        torch_attend,
        scale=batch.head_dim**-0.5,
        **options,
    )
    return out.cpu().double()


def check(batch, device, capacity, **options):
    expected = batch.oracle(**options)
    found = prefill(batch, device, capacity, **options)
    assert (found - expected).norm() <= TOLERANCE * expected.norm()


@pytest.mark.parametrize(
    ("name", "head_dim"),
    [
        ("tq-k2v2", 64),
        ("tq-k3v3", 96),
        ("tq-k4v4", 128),
        ("tq-k5v3", 80),
        ("tq-k6v8", 192),
        ("tq-k8v4", 256),
    ],
)
def test_formats_and_head_dims(name, head_dim, device):
    check(Batch([20, 5], [70, 37], KVFormat.parse(name), head_dim), device, capacity=512)


@pytest.mark.parametrize("name", ["tq-k3v4-prod", "tq-k4v2-prod"])
def test_residuals_of_prod_in_half_precision(name, device):
    batch = Batch([20], [70], KVFormat.parse(name), 80)
    expected = batch.oracle()
    assert (prefill(batch, device, 512) - expected).norm() <= 1e-3 * expected.norm()


@pytest.mark.parametrize("options", [{}, {"soft_cap": 2.0}, {"sinks": torch.tensor([0.5, -2.0, 3.0, 8.0])}])
def test_contexts_of_several_tiles(options, device):
    check(Batch([30, 3, 50], [300, 10, 130]), device, capacity=128, **options)


def test_sinks_of_a_context_of_one_tile(device):
    check(Batch([30], [50]), device, capacity=512, sinks=torch.tensor([0.5, -2.0, 3.0, 8.0]))


@pytest.mark.parametrize("window", [1, 20, 48, 100, 128, 129, 160, 300])
def test_windows_of_any_size(window, device):
    """Smaller than the scratch, as large, larger, and larger than the sequences."""
    check(Batch([60, 1, 9], [150, 290, 30]), device, capacity=128, window=window)


@pytest.mark.parametrize("window", [30, 70, 110, 200])
def test_chunks_larger_than_the_window_and_the_scratch(window, device):
    check(Batch([180, 3], [260, 40]), device, capacity=96, window=window)


def test_sinks_and_a_soft_cap_beside_a_window_in_segments(device):
    options = {"sinks": torch.tensor([0.5, -2.0, 3.0, 8.0]), "soft_cap": 2.0}
    check(Batch([30, 3], [300, 130]), device, capacity=96, window=150, **options)


def poison_freed_blocks(batch, window):
    """What the engine leaves of blocks wholly before the window of a sequence's first new token: their
    entries name one block for all, here of NaN."""
    null = next(block for block in range(len(batch.cache)) if block not in batch.block_table)
    batch.cache[null].fill_(0xFF)
    if batch.fmt.anchor:
        batch.anchors[null] = float("nan")
    freed = 0
    for i, (queries, length) in enumerate(zip(batch.query_lens, batch.seq_lens, strict=True)):
        blocks = max(0, length - queries - window + 1) // batch.block_size
        batch.block_table[i, :blocks] = null
        freed += blocks
    return freed


@pytest.mark.parametrize("window", [1, 33, 47, 80, 150])
@pytest.mark.parametrize("block_size", [16, 32, 64, 128])
def test_blocks_before_the_window_are_not_read(block_size, window, device):
    fmt = KVFormat(4, 3, anchor=block_size == 128)
    batch = Batch([9, 2, 1], [290, 171, 32], fmt, q_heads=2, kv_heads=1, block_size=block_size)
    expected = batch.oracle(window=window)
    assert poison_freed_blocks(batch, window)
    found = prefill(batch, device, 128, window=window)
    assert (found - expected).norm() <= TOLERANCE * expected.norm()


@pytest.mark.parametrize("options", [{}, {"window": 40}, {"window": 150}])
def test_slots_behind_a_sequence_may_hold_anything(options, device):
    """NaN scales or small ones: a block is not cleared before it is used again."""
    lengths = [20, 3], [203, 37]
    found = [prefill(Batch(*lengths, filler=byte), device, 128, **options) for byte in (0xFF, 0x01)]
    assert torch.equal(*found)


def test_chunks_longer_than_a_tile(device):
    check(Batch([150], [200]), device, capacity=128)


def test_sequences_without_queries_and_padding_rows(device):
    batch = Batch([4, 0, 3], [20, 0, 3])
    batch.queries.append(torch.ones(2, 4, 64))
    assert torch.equal(prefill(batch, device, 512)[-2:], torch.zeros(2, 4, 64, dtype=torch.float64))
    assert (prefill(batch, device, 512)[:-2] - batch.oracle()).norm() <= TOLERANCE * batch.oracle().norm()


def test_expansion_writes_the_rows_of_its_items_alone(device):
    batch = Batch([1, 1], [100, 30], block_size=32)
    keys = torch.full((140, 2, 64), float("nan"), device=device)
    values = keys.clone()
    items = torch.tensor([[0, 1, 3, 64], [1, 0, 80, 30]], dtype=torch.int32, device=device)
    expand(batch.codec, batch.cache.to(device), batch.block_table.to(device), items, keys, values)
    written = torch.zeros(140, dtype=torch.bool)
    written[3:67] = written[80:110] = True
    assert torch.equal(~keys.isnan().cpu(), written[:, None, None].expand(140, 2, 64))
    assert torch.equal(~values.isnan().cpu(), written[:, None, None].expand(140, 2, 64))
    codec = batch.codec
    expected = codec.rotate(codec.decode_keys(codec.encode_keys(batch.keys[0][16:80]))) / 8
    torch.testing.assert_close(keys[3:67].cpu(), expected, rtol=1e-5, atol=1e-6)
    expected = codec.rotate(codec.decode_values(codec.encode_values(batch.values[1]))) / 8
    torch.testing.assert_close(values[80:110].cpu(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("block_size", "capacity"), [(128, 512), (256, 128)])
def test_anchors_are_added_to_the_keys_of_their_128_tokens(block_size, capacity, device):
    batch = Batch([20, 9], [300, 60], KVFormat(4, 3, anchor=True), 80, block_size=block_size)
    check(batch, device, capacity)


def test_the_scratch_holds_a_chunk_over_32k_of_context():
    assert attention.scratch_tokens(8, 128, torch.bfloat16) == 32768
