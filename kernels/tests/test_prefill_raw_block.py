"""Prefill with the raw block, in pieces, against the readable attention."""

from contextlib import contextmanager

import pytest
import torch
from plain_attention import torch_attend, torch_attend_in_float32
from test_prefill import TOLERANCE, on
from test_raw_block import Engine, cut

from turboquant_kernels.decode.reference import paged_attention
from turboquant_kernels.formats import BLOCK_TOKENS, KVFormat
from turboquant_kernels.prefill.begun import begun_blocks
from turboquant_kernels.prefill.blocks import prefill_attention
from turboquant_kernels.prefill.pieces import plan_pieces
from turboquant_kernels.raw_block import OwnTokens
from turboquant_kernels.store.reference import store_step

SINKS = torch.tensor([0.5, 8.0])


@contextmanager
def memory_of_nan():
    """New tensors hold NaN until they are written."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def step(
    engine, parts, device, *, capacity=1024, window=None, page_tokens=BLOCK_TOKENS, padding=0, **options
):
    """Output of a step's tokens and what it is to be, float64 both."""
    batch, key, value, query = engine.batch(parts)
    plan = plan_pieces(
        batch.query_start_loc.tolist(),
        batch.seq_lens.tolist(),
        capacity=capacity,
        window=window,
        page_tokens=page_tokens,
        device=torch.device(device),
    )
    table = batch.block_table.to(device)
    # The new tokens as slices of one projection's output, as models have them.
    both = torch.cat((key, value), dim=1).to(device).split(engine.kv_heads, dim=1)
    own_key, own_value = begun_blocks(plan, engine.raw, on(device, engine.cache), table, *both)
    own = OwnTokens.of(batch, engine.raw, engine.cache, key, value)
    store_step(engine.codec, own, engine.cache, engine.raw)
    scale = engine.codec.head_dim**-0.5
    with memory_of_nan():
        out = prefill_attention(
            engine.codec,
            torch.cat((query, query[:padding])).to(device),
            own_key,
            own_value,
            on(device, engine.cache),
            table,
            plan,
            torch_attend if query.dtype == torch.float32 else torch_attend_in_float32,
            scale=scale,
            **{name: on_device(option, device) for name, option in options.items()},
        )
    expected = paged_attention(
        engine.codec,
        query.double(),
        engine.cache,
        batch.block_table,
        batch.query_start_loc,
        batch.seq_lens,
        scale=scale,
        window=window,
        own=own,
        **options,
    )
    return out.cpu().double(), expected


def on_device(option, device):
    return option.to(device) if isinstance(option, torch.Tensor) else option


def relative_error(found, expected):
    return float((found - expected).norm() / expected.norm())


def check(engine, rounds, device, tolerance=TOLERANCE, **options):
    """Several steps, one after the other."""
    for parts in rounds:
        assert relative_error(*step(engine, parts, device, **options)) < tolerance


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
    engine = Engine([140, 139], KVFormat.parse(name), head_dim=head_dim)
    engine.step({0: (0, 125), 1: (0, 128)})
    check(engine, [{0: (125, 140), 1: (128, 139)}], device)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype, device):
    """Rounded are the turned queries, keys and values, and the results."""
    engine = Engine([270], KVFormat(4, 4, anchor=True), dtype=dtype)
    engine.step({0: (0, 140)})
    check(engine, [{0: (140, 270)}], device, 2.0**-6 if dtype == torch.bfloat16 else 2.0**-9)


@pytest.mark.parametrize(
    "ends", [[300], [128, 256], [100, 200], [127, 129, 130, 255, 257], [5, 290]], ids=str
)
def test_chunks_begin_and_end_anywhere(ends, device):
    check(Engine([300], q_heads=1, kv_heads=1), [{0: part} for part in cut(300, ends)], device)


OPTIONS = [{}, {"soft_cap": 2.0}, {"sinks": SINKS}, {"sinks": SINKS, "soft_cap": 2.0, "window": 200}]


@pytest.mark.parametrize("capacity", [128, 1024], ids=["cut", "whole"])
@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "soft-cap", "sinks", "all"])
def test_sequences_together(options, capacity, device):
    engine = Engine([400, 40, 150], q_heads=2, kv_heads=1)
    engine.step({0: (0, 300), 1: (0, 30)})
    check(engine, [{0: (300, 400), 2: (0, 135), 1: (30, 40)}], device, capacity=capacity, **options)


@pytest.mark.parametrize("window", [1, 2, 50, 127, 128, 129, 200, 257, 400])
def test_windows_of_any_size(window, device):
    """Shorter than a block, longer than the scratch, and than the sequences."""
    engine = Engine([430, 260, 90], q_heads=2, kv_heads=1)
    engine.step({0: (0, 290), 1: (0, 135), 2: (0, 60)})
    check(engine, [{0: (290, 430), 1: (135, 260), 2: (60, 90)}], device, capacity=256, window=window)


@pytest.mark.parametrize("window", [100, 300])
def test_pages_larger_than_a_block(window, device):
    """They overlap, and reach beyond what is expanded."""
    engine = Engine([400, 140], q_heads=2, kv_heads=1)
    engine.step({0: (0, 270), 1: (0, 130)})
    check(engine, [{0: (270, 400), 1: (130, 140)}], device, capacity=512, window=window, page_tokens=384)


def test_what_lies_in_a_page_behind_the_keys_is_finite(device):
    """An attention kernel multiplies it with zero."""
    engine = Engine([300])
    engine.step({0: (0, 290)})
    batch, key, value, query = engine.batch({0: (290, 300)})
    plan = plan_pieces([0, 10], [300], capacity=1024, page_tokens=640, device=torch.device(device))
    table = batch.block_table.to(device)
    own = begun_blocks(plan, engine.raw, on(device, engine.cache), table, key.to(device), value.to(device))

    def attend(query, key, value, *, block_table=None, **options):
        if block_table is not None:
            assert value[block_table.long()].isfinite().all()
        return torch_attend(query, key, value, block_table=block_table, **options)

    with memory_of_nan():
        prefill_attention(
            engine.codec, query.to(device), *own, on(device, engine.cache), table, plan, attend, scale=0.125
        )


def test_sequences_without_queries_and_padding_rows(device):
    engine = Engine([140, 3, 20])
    found, expected = step(engine, {0: (0, 140), 1: (2, 2), 2: (0, 20)}, device, padding=2)
    assert relative_error(found[:-2], expected) < TOLERANCE
    assert not found[-2:].any()


def test_the_output_is_written_where_it_is_asked_for(device):
    engine = Engine([140])
    out = torch.full((2, 140, 4, 64), torch.nan, device=device)
    found, _ = step(engine, {0: (0, 140)}, device, out=out[1])
    assert torch.equal(out[1].cpu().double(), found)
    assert out[0].isnan().all()


@pytest.mark.parametrize("window", [1, 100, 150])
def test_blocks_before_the_window_are_not_read(window, device):
    """Those wholly before the window of a step's first token, which the engine has given to others."""
    engine = Engine([430], q_heads=2, kv_heads=1)
    engine.step({0: (0, 300)})
    freed = (300 - window + 1) // BLOCK_TOKENS
    assert freed
    engine.table[0, :freed] = 2**31 - 1
    found, expected = step(engine, {0: (300, 430)}, device, window=window, capacity=256)
    assert relative_error(found, expected) < TOLERANCE


def test_raw_keys_of_begun_blocks_are_the_models_own(device):
    """To the bit, though the cache around them holds other things."""
    for dtype, fmt, head_dim in [
        (torch.bfloat16, KVFormat(3, 3, anchor=True), 80),
        (torch.float32, KVFormat(2, 2), 64),
        (torch.float16, KVFormat(8, 8), 128),
    ]:
        engine = Engine([300, 70, 20], fmt, head_dim=head_dim, dtype=dtype)
        engine.step({0: (0, 250), 1: (0, 70), 2: (0, 9)})
        engine.step({0: (250, 253)})
        batch, key, value, _ = engine.batch({2: (9, 20), 0: (253, 300)})
        plan = plan_pieces([0, 11, 58], [20, 300], capacity=1024, device=torch.device(device))
        own = begun_blocks(
            plan,
            engine.raw,
            on(device, engine.cache),
            batch.block_table.to(device),
            key.to(device),
            value.to(device),
        )
        for found, tensors in zip(own, (engine.keys, engine.values), strict=True):
            assert torch.equal(found.cpu(), torch.cat((tensors[2][:20], tensors[0][128:300])))
