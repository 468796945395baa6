"""Plans of decode attention: what shares a plan, its memory or its kernels."""

from dataclasses import replace

import pytest
import torch
from test_paged_attention import Batch

from turboquant_kernels.codec import Codec
from turboquant_kernels.decode import plan as decode_plan
from turboquant_kernels.decode.plan import DecodePlan, DecodeShape, PartialResults
from turboquant_kernels.formats import KVFormat
from turboquant_kernels.raw_block import RawBlocks

CPU = torch.device("cpu")
RAW = RawBlocks(3, torch.bfloat16)
SHAPE = DecodeShape(Codec(KVFormat(4, 4), 128), 32, 8, 16, 20480, 8, 1, 2048)


@pytest.fixture(autouse=True)
def _multiprocessors_of_an_h200(monkeypatch, request):
    if "device" not in request.fixturenames:
        monkeypatch.setattr(decode_plan, "_multiprocessors", lambda _: 132)


def test_layers_of_one_shape_are_equal_whosever_codec_they_have():
    same = replace(SHAPE, codec=Codec(KVFormat(4, 4), 128))
    assert same == SHAPE
    assert hash(same) == hash(SHAPE)
    for codec in (Codec(KVFormat(4, 3), 128), Codec(KVFormat(4, 4), 64), Codec(KVFormat(4, 4), 128, seed=1)):
        assert replace(SHAPE, codec=codec) != SHAPE
    for other in ({"num_seqs": 9}, {"window": 4096}, {"block_stride": 40960}, {"query_len": 2}):
        assert replace(SHAPE, **other) != SHAPE


def test_a_shape_is_read_off_the_tensors():
    batch = Batch([2, 2], [40, 70], q_heads=6, kv_heads=2, block_size=32)
    shape = DecodeShape.of(batch.codec, batch.cache, batch.block_table, q_heads=6, query_len=2, window=9)
    assert (shape.kv_heads, shape.block_size, shape.num_seqs, shape.max_blocks) == (2, 32, 2, 4)
    assert shape.block_stride == batch.cache.stride(0)
    assert shape.rows == 6
    with pytest.raises(ValueError, match="cache slot"):
        DecodeShape.of(batch.codec, batch.cache[..., :-1], batch.block_table, q_heads=6, query_len=2)


def test_memory_of_partial_results_is_shared_and_what_was_given_stays():
    memory = PartialResults(CPU)
    large = DecodePlan(replace(SHAPE, num_seqs=70), CPU, path="hopper", partial_results=memory)
    small = DecodePlan(SHAPE, CPU, path="hopper", partial_results=memory)
    assert small.partial.data_ptr() == large.partial.data_ptr()
    assert small.stats.data_ptr() == large.stats.data_ptr()
    assert small.counters is None
    larger = DecodePlan(replace(SHAPE, num_seqs=300), CPU, path="hopper", partial_results=memory)
    assert larger.partial.data_ptr() != large.partial.data_ptr()
    assert large.counters.numel() == 70 * 8
    assert not larger.counters.any()
    alone = DecodePlan(SHAPE, CPU, path="hopper")
    assert alone.partial.data_ptr() != small.partial.data_ptr()


def test_kernels_differ_where_something_new_is_compiled():
    def kernels(path="hopper", **changes):
        return DecodePlan(replace(SHAPE, **changes), CPU, path=path).kernels

    hash(kernels())
    assert kernels() == kernels(num_seqs=7) == kernels(max_blocks=4096)
    assert kernels(window=4096) == kernels(window=8192)
    assert kernels(block_size=128, raw=RAW) == kernels(block_size=128, raw=RAW, num_seqs=7)
    others = [
        kernels(),
        kernels("portable"),
        kernels(num_seqs=9),  # the schedule's kernel has room for 16 then
        kernels(num_seqs=1),
        kernels(num_seqs=64),  # merged by the kernel itself
        kernels(max_blocks=2047),  # no multiple of 16
        kernels(query_len=2),
        kernels(q_heads=64),
        kernels(window=4096),
        kernels(window=4095),
        kernels(block_size=128),
        kernels(block_size=128, raw=RAW),
        kernels(block_size=128, raw=replace(RAW, blocks=4)),
        kernels(block_size=128, raw=RAW, num_seqs=12),  # two rows of four a program of `finish`
        kernels(codec=Codec(KVFormat(3, 3), 128)),
        kernels(codec=Codec(KVFormat(3, 3), 128), max_blocks=16),  # few tokens: other tiles
    ]
    assert len(set(others)) == len(others)


def test_tensors_of_another_shape_are_refused(device):
    batch = Batch([1, 1], [20, 40])
    table = batch.block_table.to(device)
    cache, lens = batch.cache.to(device), torch.tensor(batch.seq_lens, dtype=torch.int32, device=device)
    shape = DecodeShape.of(batch.codec, cache, table, q_heads=4, query_len=1)
    plan = DecodePlan(shape, cache.device, path="portable")
    plan.schedule(lens)
    query = torch.cat(batch.queries).to(device)
    plan.run(query, cache, table, lens, scale=0.1)
    with pytest.raises(ValueError, match="not of the plan's shape"):
        plan.run(query[:1], cache, table[:1], lens[:1], scale=0.1)


def test_a_plan_runs_again_with_other_lengths(device):
    batch = Batch([1, 1], [200, 40])
    table, cache = batch.block_table.to(device), batch.cache.to(device)
    query, scale = torch.cat(batch.queries).to(device), batch.head_dim**-0.5
    shape = DecodeShape.of(batch.codec, cache, table, q_heads=4, query_len=1)
    plan = DecodePlan(shape, cache.device, path="portable")
    for lengths in ([200, 40], [0, 17], [130, 1]):
        lens = torch.tensor(lengths, dtype=torch.int32, device=device)
        plan.schedule(lens)
        found = plan.run(query, cache, table, lens, scale=scale)
        expected = decode_plan.paged_decode(
            batch.codec, query, cache, table, lens, query_len=1, scale=scale, path="portable"
        )
        assert torch.equal(found, expected)
