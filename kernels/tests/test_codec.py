"""Encode and decode: error, scale rule, the unbiased estimator, and vectors that are not ordinary."""

import math

import pytest
import torch

from turboquant_kernels.codebook import codebook
from turboquant_kernels.codec import MAX_SCALE, Codec, row_mean
from turboquant_kernels.formats import BF16, COMPRESSED_FORMATS, HEAD_DIMS, KEY_BITS, Encoding, KVFormat
from turboquant_kernels.rotation import rotate

MSE = [fmt for fmt in COMPRESSED_FORMATS if fmt.encoding is Encoding.MSE]
PROD = [fmt for fmt in COMPRESSED_FORMATS if fmt.encoding is Encoding.PROD]
BOTH = [KVFormat(4, 4), KVFormat(4, 4, Encoding.PROD)]


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def decoded_keys(codec, key):
    return codec.decode_keys(codec.encode_keys(key))


def relative_error(decoded, x):
    return float(((decoded - x).square().sum(-1) / x.square().sum(-1)).mean())


def expected_error(bits, head_dim):
    """An unbiased scale spends D / (1 - D) where the best one would spend D; that it is fitted to each vector
    takes about two of the vector's degrees of freedom. At 8 bits most of the error is in rare coordinates
    beyond the last level, so few samples estimate it badly."""
    distortion = codebook(bits, head_dim).distortion
    return pytest.approx(distortion / (1 - distortion) * (1 - 2 / head_dim), rel=0.15 if bits == 8 else 0.03)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("bits", KEY_BITS)
def test_relative_error_is_the_codebooks_distortion(bits, head_dim):
    codec = Codec(KVFormat(bits, 4), head_dim)
    key = normal(2000, head_dim)
    assert relative_error(decoded_keys(codec, key), key) == expected_error(bits, head_dim)


@pytest.mark.parametrize("fmt", COMPRESSED_FORMATS, ids=lambda fmt: fmt.name)
def test_values_have_the_error_of_their_own_bits(fmt):
    codec = Codec(fmt, 128)
    value = normal(1000, 128)
    error = relative_error(codec.decode_values(codec.encode_values(value)), value)
    assert error == expected_error(fmt.value_bits, 128)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_means_add_in_the_documented_order(head_dim):
    """To the bit, since a GPU's store kernel must come to the same scale."""
    x = normal(20, head_dim)
    terms = list(x.unbind(-1))
    while len(terms) % 2 == 0:
        terms = [a + b for a, b in zip(terms[::2], terms[1::2], strict=True)]
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    assert torch.equal(row_mean(x).squeeze(-1), total * torch.tensor(1 / head_dim))


@pytest.mark.parametrize("head_dim", [96, 128])
def test_stored_codes_come_from_the_elementwise_rotation(head_dim):
    """To the bit: among this many boundaries a matrix product's rounding moves some of the codes."""
    x = normal(4000, head_dim)
    y = rotate(x / x.abs().amax(-1, keepdim=True), seed=0)
    expected = codebook(8, head_dim).quantize(y / row_mean(y * y).sqrt())
    assert torch.equal(Codec(KVFormat(8, 8), head_dim, seed=0).encode_keys(x).codes, expected)


@pytest.mark.parametrize("fmt", MSE, ids=lambda fmt: fmt.name)
def test_the_scale_is_unbiased(fmt):
    """<x, decoded x> = |x|**2 for each vector, up to the rounding of the scale to fp16."""
    codec = Codec(fmt, 128)
    x = normal(500, 128) * 3
    ratio = (decoded_keys(codec, x) * x).sum(-1) / x.square().sum(-1)
    assert (ratio - 1).abs().max() < 2**-11 + 1e-5


def test_an_unbiased_scale_wins_where_many_values_are_averaged():
    """The reason for the rule: attention averages tokens, which removes noise and keeps a shrinkage."""
    codec = Codec(KVFormat(2, 2), 128)
    value = normal(64, 100, 128) * 0.5 + normal(64, 1, 128, seed=1)
    encoded = codec.encode_values(value)
    mean = value.mean(1)
    unbiased = codec.decode_values(encoded)
    levels = codebook(2, 128).levels[encoded.codes.int()]
    least_squares = (
        unbiased
        * ((codec.rotate(value) * levels).sum(-1) / levels.square().sum(-1) / encoded.scale.float())[
            ..., None
        ]
    )
    assert relative_error(unbiased.mean(1), mean) < 0.75 * relative_error(least_squares.mean(1), mean)


@pytest.mark.parametrize("fmt", BOTH, ids=lambda fmt: fmt.name)
def test_scaling_a_vector_scales_its_decoding(fmt):
    codec = Codec(fmt, 64)
    x = normal(100, 64)
    assert torch.allclose(decoded_keys(codec, x * 256), decoded_keys(codec, x) * 256, rtol=2e-3, atol=0.05)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_any_float_dtype_is_encoded_as_float32(dtype):
    codec = Codec(KVFormat(4, 4), 64)
    x = normal(10, 64).to(dtype)
    encoded, expected = codec.encode_keys(x), codec.encode_keys(x.float())
    assert torch.equal(encoded.codes, expected.codes)
    assert torch.equal(encoded.scale, expected.scale)
    assert (encoded.codes.dtype, encoded.scale.dtype) == (torch.uint8, torch.float16)


@pytest.mark.parametrize("fmt", COMPRESSED_FORMATS, ids=lambda fmt: fmt.name)
@pytest.mark.parametrize(
    "vector",
    [
        torch.zeros(64),
        torch.full((64,), 1e-45),
        torch.full((64,), 1e-30),
        torch.full((64,), float("nan")),
        torch.cat((torch.ones(63), torch.tensor([float("nan")]))),
        torch.cat((torch.ones(63), torch.tensor([float("inf")]))),
        torch.full((64,), float("-inf")),
    ],
    ids=["zero", "denormal", "tiny", "NaN", "one NaN", "one Inf", "-Inf"],
)
def test_a_vector_without_finite_normal_size_decodes_to_zero(fmt, vector):
    codec = Codec(fmt, 64)
    for encoded, decoded in (
        ((e := codec.encode_keys(vector)), codec.decode_keys(e)),
        ((e := codec.encode_values(vector)), codec.decode_values(e)),
    ):
        assert encoded.scale.isfinite()
        assert torch.equal(decoded, torch.zeros(64))


@pytest.mark.parametrize("fmt", BOTH, ids=lambda fmt: fmt.name)
def test_a_bad_vector_does_not_change_its_neighbours(fmt):
    codec = Codec(fmt, 64)
    x = normal(3, 64)
    expected = decoded_keys(codec, x)
    x[1, 5] = float("nan")
    decoded = decoded_keys(codec, x)
    assert torch.equal(decoded[[0, 2]], expected[[0, 2]])


@pytest.mark.parametrize("fmt", BOTH, ids=lambda fmt: fmt.name)
@pytest.mark.parametrize("size", [1e6, 1e20, 3e38])
def test_a_vector_beyond_fp16_keeps_its_direction_and_saturates(fmt, size):
    codec = Codec(fmt, 64)
    x = normal(20, 64)
    x = x / x.abs().amax(-1, keepdim=True) * size
    encoded = codec.encode_keys(x)
    assert (encoded.scale == MAX_SCALE).all()
    decoded = codec.decode_values(codec.encode_values(x))
    assert decoded.isfinite().all()
    assert codec.decode_keys(encoded).isfinite().all()
    assert torch.cosine_similarity(decoded.double(), x.double(), dim=-1).min() > 0.98


def test_a_vector_just_inside_fp16_is_not_saturated():
    codec = Codec(KVFormat(4, 4), 64)
    x = torch.nn.functional.normalize(normal(20, 64), dim=-1) * 60_000 * 8
    assert relative_error(decoded_keys(codec, x), x) < 0.013


@pytest.mark.parametrize("head_dim", [64, 80, 128])
@pytest.mark.parametrize("bits", [3, 4])
def test_prod_is_unbiased_over_rotations(bits, head_dim):
    """Theorem 2, for a query that points along the key, where an estimator that shrinks would show most."""
    fmt = KVFormat(bits, 4, Encoding.PROD)
    key = normal(50, head_dim)
    estimates = torch.stack(
        [(decoded_keys(Codec(fmt, head_dim, seed), key) * key).sum(-1) for seed in range(60)]
    ) / key.square().sum(-1)
    error = estimates.flatten() - 1
    assert error.mean().abs() < 4 * error.std() / math.sqrt(len(error))


def test_prod_corrects_what_its_first_stage_shrinks():
    """The first stage alone, a least-squares scale on 2 bits, is 11.6% low."""
    codec = Codec(KVFormat(3, 4, Encoding.PROD), 128)
    key = normal(4000, 128)
    encoded = codec.encode_keys(key)
    levels = codebook(2, 128).levels[encoded.codes.int()] * encoded.scale.float()[:, None]
    first = ((codec.rotate(key) * levels).sum(-1) / key.square().sum(-1)).mean()
    both = ((codec.decode_keys(encoded) * key).sum(-1) / key.square().sum(-1)).mean()
    assert float(first) == pytest.approx(1 - 0.116, abs=0.002)
    assert float(both) == pytest.approx(1, abs=0.003)


@pytest.mark.parametrize(("bits", "error"), [(3, 0.18), (4, 0.0525)])
def test_prod_inner_product_error_is_the_papers(bits, error):
    """Theorem 2's D_prod times D: 0.18, and 0.047 where the paper rounds a distortion of 0.034 to 0.03."""
    codec = Codec(KVFormat(bits, 4, Encoding.PROD), 128)
    key = torch.nn.functional.normalize(normal(8000, 128), dim=-1)
    query = torch.nn.functional.normalize(normal(8000, 128, seed=1), dim=-1)
    measured = ((decoded_keys(codec, key) - key) * query).sum(-1).square().mean() * 128
    assert float(measured) == pytest.approx(error, rel=0.08)


def test_prod_keeps_the_residuals_norm():
    codec = Codec(KVFormat(4, 4, Encoding.PROD), 128)
    key = normal(50, 128)
    encoded = codec.encode_keys(key)
    levels = codebook(3, 128).levels[encoded.codes.int()] * encoded.scale.float()[:, None]
    residual = codec.rotate(key) - levels
    assert torch.allclose(encoded.residual_norm.float(), residual.norm(dim=-1), rtol=1e-3)


def test_a_plain_format_has_no_codec():
    with pytest.raises(ValueError, match="bf16 is the engine's own cache: there is nothing to encode"):
        Codec(BF16, 128)


def test_a_head_dim_without_a_layout_is_refused():
    with pytest.raises(ValueError, match="head_dim 72 is not one of"):
        Codec(KVFormat(4, 4), 72)


def test_another_seed_gives_other_codes():
    x = normal(10, 64)
    codes = [Codec(KVFormat(4, 4), 64, seed).encode_keys(x).codes for seed in (0, 1)]
    assert not torch.equal(*codes)
