"""Prefill through decompressed tiles against attention over the decompressed cache."""

import pytest
import torch
from plain_attention import torch_attend
from test_paged_attention import Batch

from turboquant_kernels.formats import PAGE_TOKENS, KVFormat
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
    tiles = [t.to(device) for t in plan_tiles(starts, batch.seq_lens, capacity=capacity, window=window)]
    if options.get("sinks") is not None:
        options["sinks"] = options["sinks"].to(device)
    out = prefill_attention(
        batch.codec,
        torch.cat(batch.queries).to(device),
        on(device, batch.cache),
        batch.block_table.to(device),
        tiles,
        torch_attend,
        scale=batch.head_dim**-0.5,
        window=window,
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


@pytest.mark.parametrize("window", [1, 20, 48])
def test_windows(window, device):
    check(Batch([60, 1], [150, 90]), device, capacity=192, window=window)


def test_chunks_longer_than_a_tile(device):
    check(Batch([150], [200]), device, capacity=128)


def test_sequences_without_queries_and_padding_rows(device):
    batch = Batch([4, 0, 3], [20, 0, 3])
    batch.queries.append(torch.ones(2, 4, 64))
    assert torch.equal(prefill(batch, device, 512)[-2:], torch.zeros(2, 4, 64, dtype=torch.float64))
    assert (prefill(batch, device, 512)[:-2] - batch.oracle()).norm() <= TOLERANCE * batch.oracle().norm()


def test_expansion_writes_the_rows_of_its_runs_alone(device):
    batch = Batch([1, 1], [100, 30], block_size=32)
    keys = torch.full((140, 2, 64), float("nan"), device=device)
    values = keys.clone()
    runs = torch.tensor([[0, 1, 3, 64], [1, 0, 80, 30]], dtype=torch.int32, device=device)
    expand(batch.codec, batch.cache.to(device), batch.block_table.to(device), runs, keys, values)
    written = torch.zeros(140, dtype=torch.bool)
    written[3:67] = written[80:110] = True
    assert torch.equal(~keys.isnan().cpu(), written[:, None, None].expand(140, 2, 64))
    assert torch.equal(~values.isnan().cpu(), written[:, None, None].expand(140, 2, 64))
    codec = batch.codec
    expected = codec.rotate(codec.decode_keys(codec.encode_keys(batch.keys[0][16:80]))) / 8
    torch.testing.assert_close(keys[3:67].cpu(), expected, rtol=1e-5, atol=1e-6)
    expected = codec.rotate(codec.decode_values(codec.encode_values(batch.values[1]))) / 8
    torch.testing.assert_close(values[80:110].cpu(), expected, rtol=1e-5, atol=1e-6)


def test_tiles_hold_every_key_that_a_query_sees_once():
    starts, seq_lens, capacity = [0, 40, 41, 41, 200], [400, 65, 0, 159], 128
    seen = {}
    for tile in plan_tiles(starts, seq_lens, capacity=capacity):
        assert tile.keys <= capacity
        assert int(tile.key_starts[-1]) == tile.keys == int(tile.runs[:, 3].sum())
        assert int(tile.query_starts[-1]) == tile.rows.stop - tile.rows.start
        for sequence, page, row, tokens in tile.runs.tolist():
            piece = int((tile.key_starts[1:] <= row).sum())
            first, end = (tile.rows.start + int(tile.query_starts[piece + i]) for i in (0, 1))
            for query_row in range(first, end):
                position = seq_lens[sequence] - (starts[sequence + 1] - query_row)
                keys = range(page * PAGE_TOKENS, page * PAGE_TOKENS + tokens)
                seen.setdefault(query_row, []).extend(k for k in keys if not tile.causal or k <= position)
    for sequence in range(4):
        for query_row in range(starts[sequence], starts[sequence + 1]):
            position = seq_lens[sequence] - (starts[sequence + 1] - query_row)
            assert sorted(seen[query_row]) == list(range(position + 1))


def test_one_tile_where_everything_fits():
    (tile,) = plan_tiles([0, 8192], [32768], capacity=32768)
    assert (tile.causal, tile.merged, tile.keys) == (True, False, 32768)


def test_a_scratch_that_cannot_hold_a_window_is_refused():
    with pytest.raises(ValueError, match="window of 100"):
        plan_tiles([0, 1], [200], capacity=128, window=100)


@pytest.mark.parametrize(("block_size", "capacity"), [(128, 512), (256, 128)])
def test_anchors_are_added_to_the_keys_of_their_128_tokens(block_size, capacity, device):
    batch = Batch([20, 9], [300, 60], KVFormat(4, 3, anchor=True), 80, block_size=block_size)
    check(batch, device, capacity)


def test_the_scratch_holds_a_chunk_over_32k_of_context():
    assert attention.scratch_tokens(8, 128, torch.bfloat16) == 32768
