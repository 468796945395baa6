"""The cases that `make test-gpu` draws: what they cover, and that they are as bad as they claim."""

import math
import random
from dataclasses import replace

import pytest
import torch
from cases import (
    DTYPES,
    GROUPS,
    HEAVY,
    UNIFORM,
    WINDOWS,
    all_variants,
    decode_step,
    decode_variants,
    heavy_step,
    key_length,
    prefill_step,
    prefill_variants,
    store_variants,
)
from checks import asked_of, check_decode, check_prefill, check_store
from sanitize import SHARES, swept

from turboquant_kernels.bench import oracle
from turboquant_kernels.decode import hopper
from turboquant_kernels.formats import HEAD_DIMS, KEY_BITS, VALUE_BITS, Encoding
from turboquant_kernels.packing import KEY_SCALE, pages_of

CPU = torch.device("cpu")


def test_at_most_65_variants_each_with_a_name_of_its_own():
    names = [str(variant) for variant in all_variants()]
    assert len(names) == len(set(names)) <= 65


@pytest.mark.parametrize("path", [None, "portable"])
def test_decode_variants_cover_every_width_head_dim_and_option_on_both_paths(path):
    own = [variant for variant in decode_variants() if variant.path == path]
    assert {variant.head_dim for variant in own} >= set(HEAD_DIMS if path else hopper.HEAD_DIMS)
    assert {variant.fmt.key_bits for variant in own} == set(KEY_BITS)
    assert {variant.fmt.value_bits for variant in own} == set(VALUE_BITS)
    for option in ("soft_cap", "sinks", "far", "heavy"):
        assert {getattr(variant, option) for variant in own} == {True, False}
    assert {variant.windows for variant in own} >= {(), WINDOWS[1], WINDOWS[2]}
    assert {variant.fmt.anchor for variant in own} == {True, False}
    assert {variant.query_len for variant in own} == {1, 2, 4}
    assert {variant.block_size for variant in own} - {256} == {16, 32, 64, 128}
    assert (256 in {variant.block_size for variant in own}) == (path is None)
    assert len({variant.table_width for variant in own}) == 2
    assert max(max(variant.batches) for variant in own) == 512


def test_decode_variants_cover_every_uniform_format_prod_and_every_group():
    variants = decode_variants()
    assert {variant.fmt for variant in variants if variant.path is None} >= set(UNIFORM)
    assert {variant.fmt.encoding for variant in variants if variant.path} == {Encoding.MSE, Encoding.PROD}
    assert {variant.group for variant in variants} == set(GROUPS)


@pytest.mark.parametrize("variants", [store_variants(), prefill_variants()])
def test_store_and_prefill_variants_cover_every_width_head_dim_and_dtype(variants):
    assert {variant.fmt.key_bits for variant in variants} == set(KEY_BITS)
    assert {variant.fmt.value_bits for variant in variants} == set(VALUE_BITS)
    assert {variant.head_dim for variant in variants} == set(HEAD_DIMS)
    assert {variant.dtype for variant in variants} == set(DTYPES)
    assert {variant.fmt.encoding for variant in variants} == {Encoding.MSE, Encoding.PROD}
    assert {variant.fmt.anchor for variant in variants} == {True, False}


def test_sweeps_of_the_sanitizer_have_kernels_of_every_kind():
    kinds = {(type(variant), getattr(variant, "path", None)) for share in SHARES for variant in swept(share)}
    assert kinds == {(type(variant), getattr(variant, "path", None)) for variant in all_variants()}


@pytest.fixture(scope="module")
def steps():
    draw = random.Random(0)
    plain = [v for v in decode_variants() if not (v.fmt.anchor or v.sinks or v.heavy)]
    plain = [v for v in plain if max(v.batches) < 256]
    return [decode_step(plain[i % 4], draw, CPU, budget=3000) for i in range(60)]


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
            assert past.unique().numel() == 1


def test_some_steps_have_a_needle(steps):
    def largest_score(step, sequence, length):
        """Of the first query and head."""
        blocks = step.block_table[sequence, : -(-length // step.kv_cache.shape[1])].long()
        pages = pages_of(step.kv_cache, step.codec.layout)[blocks].flatten(0, 1)
        key, _ = oracle.decompress(step.codec, pages)
        query = step.query[sequence * step.query_len].double() @ oracle.rotation(step.codec, CPU).T
        return float((query[0] @ key[0, :length].T * step.scale).abs().max())

    largest = [
        max(largest_score(step, i, length) for i, length in enumerate(step.seq_lens.tolist()) if length)
        for step in steps
        if len(step.seq_lens) < 20
    ]
    assert any(score > 11.9 for score in largest)
    assert sum(score < 11.9 for score in largest) > len(largest) / 2
    assert all(math.isfinite(score) for score in largest)


def test_some_steps_have_a_long_key_which_is_told(steps):
    lengths = [key_length(step) for step in steps]
    assert max(lengths) > 3
    assert lengths.count(1.0) > len(lengths) / 2


def test_half_of_the_mass_of_long_sequences_is_early_and_the_rest_adds_up():
    for variant in HEAVY:
        step = heavy_step(variant, random.Random(0), CPU, tokens=4096, num_seqs=2)
        blocks = step.block_table[0, : -(-4096 // variant.block_size)].long()
        key, value = oracle.decompress(
            step.codec, pages_of(step.kv_cache, step.codec.layout)[blocks].flatten(0, 1)
        )
        score = step.query[0, 0].double() @ oracle.rotation(step.codec, CPU).T @ key[0].T * step.scale
        if step.soft_cap:
            score = step.soft_cap * torch.tanh(score / step.soft_cap)
        weight = score.softmax(-1)
        assert weight[:64].max() == weight.max()
        assert 0.2 < weight.max() < 0.8
        others = weight.clone()
        others[weight.argmax()] = 0
        part = others @ value[0]
        assert part.norm() > 0.2 * (weight @ value[0]).norm()


def test_the_oracle_is_asked_of_some_sequences_where_all_would_take_too_long():
    variant = replace(HEAVY[0], batches=(8, 8))
    step = heavy_step(variant, random.Random(0), CPU, tokens=256, num_seqs=8)
    assert asked_of(step) == list(range(8))
    longer = replace(step, seq_lens=step.seq_lens + 250_000)
    assert asked_of(longer) == [0]
    assert asked_of(replace(step, seq_lens=step.seq_lens + 130_000)) == [0]


def test_chunks_of_prefill_are_ragged_and_some_contexts_take_several_tiles():
    draw, several = random.Random(0), 0
    for variant in prefill_variants() * 4:
        step, query_lens = prefill_step(variant, draw, CPU, budget=30_000)
        lengths = step.seq_lens.tolist()
        assert sum(query_lens) == len(step.query) > 0
        assert all(queries <= length for queries, length in zip(query_lens, lengths, strict=True))
        several += sum(lengths) > variant.capacity
    assert several > 3


def test_the_checks_fit_the_kernels_as_they_are_called_now(device):
    """One small case of each kind, in Triton's interpreter where there is no GPU."""
    draw, device = random.Random(0), torch.device(device)
    heavy = HEAVY[-1]
    assert heavy.path == "portable"
    check_decode(heavy, heavy_step(heavy, draw, device, tokens=120, num_seqs=1))
    check_prefill(prefill_variants()[3], draw, device, budget=3000)
    check_store(store_variants()[0], draw, device)
