"""Integer queries and the un-rotation: the reference, and the kernels against it."""

import math

import pytest
import torch

from turboquant_kernels.codebook import codebook
from turboquant_kernels.codec import Codec
from turboquant_kernels.formats import HEAD_DIMS, KVFormat
from turboquant_kernels.queries import kernel, reference

FMT = KVFormat.parse("tq-k4v4")


def integers(quantized):
    """q of each coordinate: int32 [tokens, q_heads, D]."""
    high, low = quantized.codes.cpu().int().unbind(-2)
    return 256 * high + low


@pytest.mark.parametrize("key_bits", [2, 4, 8])
def test_logits_follow_from_the_integers(key_bits):
    """The documented formula against float64 products with the decoded keys."""
    codec = Codec(KVFormat(key_bits, 4), 128)
    query, key = torch.randn(5, 2, 128), torch.randn(7, 128)
    quantized = reference.rotate_queries(codec, query, scale=0.125)
    encoded = codec.encode_keys(key)
    c = codebook(key_bits, 128).grid[encoded.codes.long()].double()
    products = integers(quantized).double() @ c.T + quantized.half_sum[..., None].double()
    logits = quantized.scale[..., None].double() * products * encoded.scale.double()
    expected = 0.125 * query.double() @ codec.decode_keys(encoded).double().T * math.log2(math.e)
    assert (logits - expected).abs().max() < 3e-4


def test_halves_of_the_largest_integers_are_int8():
    """A query along a rotated axis has all of its length in one coordinate, of either sign."""
    codec = Codec(FMT, 64)
    query = codec.unrotate(torch.eye(64)[:2] * torch.tensor([[1.0], [-1.0]])).unsqueeze(1)
    q = integers(reference.rotate_queries(codec, query, scale=1.0))
    assert q[0, 0].max() == reference.MAX_QUERY
    assert q[1, 0].min() == -reference.MAX_QUERY


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_kernel_quantizes_as_the_reference(head_dim, dtype, device):
    """Integers differ by one at most, where rounding decides."""
    codec = Codec(FMT, head_dim)
    fused = (5 * torch.randn(5, 4, head_dim)).to(dtype)
    fused[1] = 0
    fused[2] *= 1e30
    query = fused[:, 1:3]  # a view, as from a fused projection
    expected = reference.rotate_queries(codec, query, scale=0.1)
    got = kernel.rotate_queries(codec, fused.to(device)[:, 1:3], scale=0.1)
    difference = (integers(got) - integers(expected)).abs()
    assert difference.max() <= 1
    assert difference.float().mean() < 0.01
    torch.testing.assert_close(got.scale.cpu(), expected.scale, rtol=1e-5, atol=0)
    assert torch.equal(got.half_sum.cpu(), 0.5 * integers(got).sum(-1).float())


@pytest.mark.parametrize("fault", [torch.nan, torch.inf])
@pytest.mark.parametrize("rotate", [reference.rotate_queries, kernel.rotate_queries])
def test_faulty_queries_have_no_sound_logits(fault, rotate, device):
    query = torch.randn(2, 1, 64)
    query[0, 0, 3] = fault
    quantized = rotate(Codec(FMT, 64), query if rotate is reference.rotate_queries else query.to(device), 1.0)
    assert quantized.scale[0].isnan().all()
    assert quantized.scale[1].isfinite().all()


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_kernel_turns_outputs_back(head_dim, dtype, device):
    codec = Codec(FMT, head_dim)
    attended = torch.randn(5, 2, head_dim)
    expected = reference.unrotate(codec, attended, torch.empty(5, 2, head_dim))
    out = torch.full((5, 4, head_dim), torch.nan, dtype=dtype, device=device)
    got = kernel.unrotate(codec, attended.to(device), out[:, 1:3])
    torch.testing.assert_close(
        got.cpu(), expected.to(dtype), rtol=2e-3 if dtype is torch.float16 else 0, atol=5e-6
    )
    assert out[:, [0, 3]].isnan().all()


def test_no_tokens(device):
    codec, nothing = Codec(FMT, 64), torch.empty(0, 2, 64, device=device)
    assert kernel.rotate_queries(codec, nothing, scale=1.0).codes.shape == (0, 2, 2, 64)
    assert kernel.unrotate(codec, nothing, nothing).shape == (0, 2, 64)


def test_coordinates_must_be_adjacent(device):
    codec, strided = Codec(FMT, 64), torch.zeros(2, 2, 128, device=device)[..., ::2]
    with pytest.raises(ValueError, match="not adjacent"):
        kernel.rotate_queries(codec, strided, scale=1.0)
    with pytest.raises(ValueError, match="not adjacent"):
        kernel.unrotate(codec, strided, strided)
