"""The cases that `make test-gpu` draws: what they cover, and that they are as bad as they claim."""

import math
import random

import pytest
import torch
from cases import GROUPS, UNIFORM, decode_step, decode_variants, store_variants

from turboquant_kernels.bench import oracle
from turboquant_kernels.formats import HEAD_DIMS, KEY_BITS, VALUE_BITS, Encoding
from turboquant_kernels.packing import KEY_SCALE, pages_of

CPU = torch.device("cpu")


def test_at_most_60_variants_cover_every_uniform_format_head_dim_group_and_option():
    decode, store = decode_variants(), store_variants()
    assert len(decode) + len(store) <= 60
    default = {variant.fmt for variant in decode if variant.path is None}
    assert default >= set(UNIFORM)
    assert {variant.fmt.encoding for variant in decode if variant.path == "portable"} == {
        Encoding.MSE,
        Encoding.PROD,
    }
    for path in (None, "portable"):
        own = [variant for variant in decode if variant.path == path]
        assert {variant.head_dim for variant in own} == set(HEAD_DIMS)
        assert {variant.fmt.key_bits for variant in own} == set(KEY_BITS)
        assert {variant.fmt.value_bits for variant in own} == set(VALUE_BITS)
        for option in ("window", "soft_cap", "sinks"):
            assert {getattr(variant, option) for variant in own} == {True, False}
    assert {variant.group for variant in decode} == set(GROUPS)
    for head_dim in HEAD_DIMS:
        assert {variant.query_len for variant in decode if variant.head_dim == head_dim} > {1}
    assert {fmt.key_bits for fmt, _ in store} == set(KEY_BITS)
    assert {fmt.value_bits for fmt, _ in store} == set(VALUE_BITS)
    assert {head_dim for _, head_dim in store} == set(HEAD_DIMS)


@pytest.fixture(scope="module")
def steps():
    draw = random.Random(0)
    plain = [variant for variant in decode_variants() if not (variant.fmt.anchor or variant.sinks)]
    return [decode_step(plain[i % 4], draw, CPU, budget=1500) for i in range(60)]


def test_lengths_are_ragged_and_some_are_empty(steps):
    lengths = torch.cat([step.seq_lens for step in steps])
    assert {0, 1} <= set(lengths.tolist())
    assert lengths.max() > 100
    assert max(len(step.seq_lens) for step in steps) > 64


def test_slots_past_the_end_hold_nan_and_the_tables_entries_anything(steps):
    for step in steps:
        scales = step.codec.layout.scales.of(pages_of(step.kv_cache, step.codec.layout)).view(torch.float16)
        block_size = step.kv_cache.shape[1]
        for sequence, length in enumerate(step.seq_lens.tolist()):
            used = -(-length // block_size)
            own = scales[step.block_table[sequence, :used].long(), ..., KEY_SCALE]
            in_order = own.transpose(2, 3).flatten(0, 2)
            assert in_order[:length].isfinite().all()
            assert in_order[length:].isnan().all()
            past = step.block_table[sequence, used:]
            assert past.unique().numel() <= 1


def test_some_steps_have_a_needle(steps):
    def largest_weight(step):
        sequence = int(step.seq_lens.argmax())
        blocks = step.block_table[sequence, : -(-int(step.seq_lens[sequence]) // step.kv_cache.shape[1])]
        key, _ = oracle.decompress(
            step.codec, pages_of(step.kv_cache, step.codec.layout)[blocks.long()].flatten(0, 1)
        )
        query = step.query[sequence * step.query_len].double() @ oracle.rotation(step.codec, CPU).T
        scores = query[0] @ key[0, : int(step.seq_lens[sequence])].T * step.scale
        return float(scores.abs().max())

    largest = [largest_weight(step) for step in steps if int(step.seq_lens.max()) > 20]
    assert any(weight > 11.9 for weight in largest)
    assert sum(weight < 11.9 for weight in largest) > len(largest) / 2
    assert all(math.isfinite(weight) for weight in largest)
