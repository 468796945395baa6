"""The float64 oracle against the readable reference, and the error it reports."""

import math

import pytest
import torch

from turboquant_kernels.bench import oracle
from turboquant_kernels.bench.caches import random_step
from turboquant_kernels.codec import Codec
from turboquant_kernels.decode.reference import paged_attention
from turboquant_kernels.formats import COMPRESSED_FORMATS, HEAD_DIMS, Encoding, KVFormat
from turboquant_kernels.packing import pages_of

CPU = torch.device("cpu")
K4V4 = KVFormat(4, 4)
LENGTHS = [50, 200, 1]
FLOAT32 = 2e-6
"""Relative error that the reference's float32 arithmetic may leave."""


def step_of(fmt=K4V4, head_dim=64, **options):
    return random_step(Codec(fmt, head_dim), LENGTHS, q_heads=4, kv_heads=2, device=CPU, **options)


def exact(step, query=None, **options):
    options = {"query_len": 1, **options}
    query = step.query if query is None else query
    rotated = oracle.attention(
        step.codec, query, step.kv_cache, step.block_table, step.seq_lens, scale=step.scale, **options
    )
    return oracle.unrotated(step.codec, rotated)


def reference(step, query=None, query_len=1, **options):
    query = (step.query if query is None else query).float()
    starts = query_len * torch.arange(len(LENGTHS) + 1)
    return paged_attention(
        step.codec, query, step.kv_cache, step.block_table, starts, step.seq_lens, scale=step.scale, **options
    )


@pytest.mark.parametrize("fmt", COMPRESSED_FORMATS, ids=lambda fmt: fmt.name)
def test_pages_are_read_as_the_codec_reads_them(fmt):
    step = step_of(fmt)
    pages = pages_of(step.kv_cache, step.codec.layout).flatten(0, 1)
    key, value = oracle.decompress(step.codec, pages)
    expected = step.codec.read_rotated_keys(pages), step.codec.read_rotated_values(pages)
    for vectors, same in zip((key, value), expected, strict=True):
        assert oracle.relative_error(same.transpose(0, 1).flatten(1, 2), vectors) < FLOAT32


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("fmt", [KVFormat(3, 3), KVFormat(6, 2), KVFormat(3, 4, Encoding.PROD)], ids=str)
def test_attention_is_the_references(fmt, head_dim):
    step = step_of(fmt, head_dim, block_size=32)
    assert oracle.relative_error(reference(step), exact(step)) < FLOAT32


@pytest.mark.parametrize(
    "options",
    [{"window": 17}, {"soft_cap": 2.0}, {"sinks": torch.tensor([0.0, 3.0, -2.0, 8.0])}],
    ids=lambda options: next(iter(options)),
)
def test_options_are_the_references(options):
    step = step_of()
    assert oracle.relative_error(reference(step, **options), exact(step, **options)) < FLOAT32


def test_key_anchors_are_the_references():
    step = step_of(KVFormat(4, 4, anchor=True), block_size=256)
    assert oracle.relative_error(reference(step), exact(step)) < FLOAT32


def test_several_query_tokens_see_up_to_themselves():
    """The last sequence has one token and three queries, two of which see nothing."""
    step = step_of()
    query = torch.randn(9, 4, 64)
    result, expected = reference(step, query, query_len=3), exact(step, query, query_len=3)
    assert oracle.relative_error(result, expected) < FLOAT32
    assert not expected[6:8].any()
    assert expected[8].any()


def test_some_sequences_are_those_rows():
    step = step_of()
    assert torch.equal(exact(step, sequences=[2, 0]), exact(step)[[2, 0]])


def test_the_error_is_the_worst_rows():
    expected = torch.tensor([[3.0, 4.0], [0.0, 1.0]], dtype=torch.float64)
    assert oracle.relative_error(expected.float(), expected) == 0
    assert oracle.relative_error(expected + torch.tensor([[0.0, 0.5], [0.0, 0.01]]), expected) == 0.1


def test_what_is_not_finite_or_should_be_zero_is_an_infinite_error():
    expected = torch.tensor([[1.0, 1.0], [0.0, 0.0]], dtype=torch.float64)
    assert oracle.relative_error(torch.tensor([[1.0, math.nan], [0.0, 0.0]]), expected) == math.inf
    assert oracle.relative_error(torch.tensor([[1.0, 1.0], [0.0, 1e-9]]), expected) == math.inf
    assert oracle.relative_error(expected, expected) == 0


def test_random_steps_have_scores_of_about_one_and_distinct_blocks():
    step = random_step(Codec(KVFormat(4, 4), 64), [500, 500], q_heads=4, kv_heads=2, device=CPU)
    used = step.block_table.flatten()
    assert len(used.unique()) == len(used) == len(step.kv_cache)
    pages = pages_of(step.kv_cache, step.codec.layout)[step.block_table[0].long()].flatten(0, 1)
    key, _ = oracle.decompress(step.codec, pages)
    query = step.query[0].double() @ oracle.rotation(step.codec, CPU).T
    scores = query[:2] @ key[0].T * step.scale
    assert 0.5 < scores.std() < 3
