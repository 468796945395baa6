"""The portable decode kernel, item by item, against attention over the decompressed cache."""

from dataclasses import replace

import pytest
import torch
from test_paged_attention import Batch

from turboquant_kernels.codebook import codebook
from turboquant_kernels.decode.plan import paged_decode
from turboquant_kernels.decode.portable import attend_items, launch_of
from turboquant_kernels.decode.variants import variants
from turboquant_kernels.formats import COMPRESSED_FORMATS, HEAD_DIMS, PAGE_TOKENS, KVFormat
from turboquant_kernels.queries.reference import rotate_queries

TOLERANCE = 5e-4


def split(seq_lens, tile_tokens, count, device):
    """Items that cut each sequence into up to `count` runs of tiles, and one without work."""
    tile, items = tile_tokens // PAGE_TOKENS, []
    for i, length in enumerate(seq_lens):
        pages = -(-length // PAGE_TOKENS)
        run = -(-pages // tile // count) * tile
        items += [[i, begin, min(begin + run, pages), 0] for begin in range(0, pages, run)] if pages else []
    return torch.tensor([*items, [0, 7, 7, 0]], dtype=torch.int32, device=device)


def on(device, cache):
    """A cache with what lies between its blocks: anchors."""
    blocks, stride = len(cache), cache.stride(0)
    return cache.as_strided((blocks, stride), (stride, 1)).to(device).as_strided(cache.shape, cache.stride())


def attend(batch, device, *, splits=2, window=None, soft_cap=None, sinks=None):
    """float32 [tokens, q_heads, D], un-rotated: the items' results put together in float64."""
    codec, query_len = batch.codec, batch.query_lens[0]
    group = batch.q_heads // batch.kv_heads
    launch = launch_of(batch.fmt, batch.head_dim, group * query_len)
    items = split(batch.seq_lens, launch.tile_tokens, splits, device)
    shape = (len(items), batch.kv_heads, launch.row_groups(group * query_len), launch.rows)
    queries = rotate_queries(codec, torch.cat(batch.queries), batch.head_dim**-0.5)
    tensors = {name: x.to(device) for name, x in vars(queries).items() if isinstance(x, torch.Tensor)}
    partial = torch.full((*shape, batch.head_dim), float("nan"), device=device)
    stats = torch.full((*shape, 2), float("nan"), device=device)
    attend_items(
        codec,
        launch,
        replace(queries, **tensors),
        on(device, batch.cache),
        batch.block_table.to(device),
        torch.tensor(batch.seq_lens, dtype=torch.int32, device=device),
        items,
        partial,
        stats,
        query_len=query_len,
        window=window,
        soft_cap=soft_cap,
    )
    partial, stats = partial.flatten(2, 3).double().cpu(), stats.flatten(2, 3).double().cpu()
    step = codebook(codec.fmt.value_bits, batch.head_dim).step
    out = torch.zeros(len(batch.seq_lens), query_len, batch.q_heads, batch.head_dim, dtype=torch.float64)
    for i in range(len(batch.seq_lens)):
        mine = [n for n, (seq, begin, end, _) in enumerate(items.tolist()) if seq == i and begin < end]
        for q in range(query_len):
            for head in range(batch.q_heads):
                at = (mine, head // group, q * group + head % group)
                total = (stats[at][:, 1] * 2 ** stats[at][:, 0]).sum()
                if sinks is not None:
                    total += sinks[head].double().exp()
                weighted = (partial[at] * 2 ** stats[at][:, :1]).sum(0)
                out[i, q, head] = weighted * step / total if total > 0 else 0.0
    return codec.unrotate(out.flatten(0, 1))


def check(batch, device, **options):
    expected = batch.oracle(**{k: v for k, v in options.items() if k != "splits"})
    found = attend(batch, device, **options)
    assert (found - expected).norm() <= TOLERANCE * expected.norm()
    assert (found - expected).abs().max() <= 2 * TOLERANCE * expected.abs().max()


@pytest.mark.parametrize(
    ("name", "head_dim"),
    [
        ("tq-k2v2", 64),
        ("tq-k3v3", 96),
        ("tq-k4v4", 128),
        ("tq-k5v3", 80),
        ("tq-k5v2", 192),
        ("tq-k6v8", 64),
        ("tq-k3v8", 80),
        ("tq-k8v4", 256),
        ("tq-k3v4-prod", 80),
        ("tq-k4v2-prod", 64),
    ],
)
def test_formats_and_head_dims(name, head_dim, device):
    check(Batch([1, 1], [37, 70], KVFormat.parse(name), head_dim), device)


@pytest.mark.parametrize(("q_heads", "kv_heads"), [(2, 2), (3, 1), (16, 1)])
def test_ratios_of_query_heads_to_kv_heads(q_heads, kv_heads, device):
    check(Batch([1], [50], q_heads=q_heads, kv_heads=kv_heads), device)


def test_query_tokens_see_the_positions_up_to_their_own(device):
    check(Batch([3, 3, 3], [3, 68, 40], q_heads=6, kv_heads=1), device)


def test_rows_that_no_program_holds_alone(device):
    check(Batch([3], [70], q_heads=8, kv_heads=1), device)


@pytest.mark.parametrize("block_size", [16, 48, 128])
def test_blocks_of_several_pages(block_size, device):
    check(Batch([1, 1], [150, 20], block_size=block_size), device)


def test_empty_sequences_have_no_work(device):
    check(Batch([1, 1, 1], [0, 40, 0]), device)


@pytest.mark.parametrize(("block_size", "window"), [(128, None), (256, 100)])
def test_anchors_are_added_to_the_keys_of_their_128_tokens(block_size, window, device):
    batch = Batch([2, 2], [300, 20], KVFormat(4, 3, anchor=True), block_size=block_size)
    check(batch, device, window=window, soft_cap=9.0, splits=3)


@pytest.mark.parametrize("options", [{"window": 20}, {"soft_cap": 2.0}, {"window": 1}])
def test_score_options(options, device):
    check(Batch([2, 2], [90, 13]), device, **options)


def test_sinks(device):
    check(Batch([1], [33]), device, sinks=torch.tensor([0.5, -2.0, 3.0, 8.0]))


def test_results_repeat_bit_by_bit_and_ignore_unused_bytes(device):
    first = attend(Batch([1], [200], filler=0xFF), device, splits=3)
    assert torch.equal(first, attend(Batch([1], [200], filler=0x7C), device, splits=3))


def test_one_token_far_above_the_rest(device):
    batch = Batch([1], [300])
    batch.queries[0] = 12 * batch.keys[0][123].repeat_interleave(2, dim=0)[None]
    check(batch, device)


@pytest.mark.parametrize("options", [{}, {"window": 290}, {"soft_cap": 20.0}])
def test_many_light_tokens_behind_a_heavy_one(options, device):
    check(Batch([1], [300], heavy={11: 12.0}), device, splits=1, **options)


def test_logits_of_several_hundred(device):
    batch = Batch([1], [100])
    batch.queries[0] *= 100
    check(batch, device)


@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize(("anchor", "block_size"), [(False, 16), (True, 128)])
def test_decode_from_queries_to_output(window, anchor, block_size, device):
    """Scheduled, merged, un-rotated: what an engine calls, several query tokens and an empty row included."""
    fmt = KVFormat(4, 4, anchor=anchor)
    batch = Batch([2, 0, 2], [200, 0, 33], fmt, q_heads=6, kv_heads=2, block_size=block_size)
    sinks = torch.tensor([0.5, -2.0, 3.0, 8.0, 0.0, 1.0])
    padded = torch.cat([batch.queries[0], torch.ones(2, 6, 64), batch.queries[2]]).to(device)
    out = paged_decode(
        batch.codec,
        padded,
        on(device, batch.cache),
        batch.block_table.to(device),
        torch.tensor(batch.seq_lens, dtype=torch.int32, device=device),
        query_len=2,
        scale=batch.head_dim**-0.5,
        window=window,
        sinks=sinks.to(device),
        path="portable",
    ).cpu()
    expected = batch.oracle(window=window, sinks=sinks)
    assert torch.equal(out[2:4], torch.zeros(2, 6, 64))
    found = torch.cat([out[:2], out[4:]])
    assert (found - expected).norm() <= TOLERANCE * expected.norm()


def test_a_cache_of_another_format_is_refused(device):
    batch = Batch([1], [20])
    batch.cache = batch.cache[..., :-1]
    with pytest.raises(ValueError, match="cache slot"):
        attend(batch, device)


def test_variants_have_names_of_their_own_and_every_format():
    names = [variant.name for variant in variants()]
    assert len(set(names)) == len(names)
    for fmt in COMPRESSED_FORMATS:
        for head_dim in HEAD_DIMS:
            assert f"decode-portable-{fmt.name.removeprefix('tq-')}-d{head_dim}-g4-q1" in names
