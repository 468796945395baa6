"""The rotation: orthogonal, its own definition, and it hides outlier channels and constant offsets."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from turboquant_kernels.codec import Codec
from turboquant_kernels.formats import HEAD_DIMS, KVFormat
from turboquant_kernels.rotation import (
    device_projection,
    hadamard,
    hadamard_factors,
    projection_matrix,
    rotate,
    rotation_matrix,
    rotation_signs,
    signed_hadamard,
)


@pytest.mark.parametrize("order", [1, 2, *HEAD_DIMS])
def test_a_hadamard_matrix_has_orthogonal_rows_of_signs(order):
    matrix = hadamard(order)
    assert torch.equal(matrix.abs(), torch.ones(order, order, dtype=torch.float64))
    assert torch.equal(matrix @ matrix.T, order * torch.eye(order, dtype=torch.float64))


@pytest.mark.parametrize("order", [0, 3, 12, 100])
def test_orders_without_a_definition_are_refused(order):
    with pytest.raises(ValueError, match=f"order {order}"):
        hadamard(order)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_the_transposed_rotation_is_its_inverse(head_dim):
    matrix = rotation_matrix(head_dim, seed=3)
    assert torch.allclose(matrix @ matrix.T, torch.eye(head_dim), atol=1e-6)
    x = torch.randn(50, head_dim)
    codec = Codec(KVFormat(4, 4), head_dim, seed=3)
    assert torch.allclose(codec.unrotate(codec.rotate(x)), x, atol=1e-5)
    assert torch.allclose(codec.rotate(x), x @ matrix.T, atol=1e-5)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_a_signed_hadamard_matrix_is_the_rotation_but_for_its_factor(head_dim):
    matrix = signed_hadamard(head_dim, 3, torch.bfloat16, torch.device("cpu"))
    assert torch.equal(matrix.abs(), torch.ones(head_dim, head_dim, dtype=torch.bfloat16))
    expected = rotation_matrix(head_dim, seed=3)
    assert torch.allclose(matrix.float() / head_dim**0.5, expected, atol=1e-7)


def test_the_projection_is_rounded_to_a_dtype_and_copied_once():
    arguments = 64, 3, torch.float16, torch.device("cpu")
    assert torch.equal(device_projection(*arguments), projection_matrix(64, seed=3).half())
    assert device_projection(*arguments) is device_projection(*arguments)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_butterflies_compute_the_matrix(head_dim):
    x = torch.randn(200, head_dim)
    assert torch.allclose(rotate(x, seed=3), x @ rotation_matrix(head_dim, seed=3).T, atol=1e-5)


def plain_rotate(x, seed):
    """One vector, one rounding at a time, in the order that `rotate` promises to kernels."""
    head_dim = len(x)
    paley, inner = hadamard_factors(head_dim)
    y = list((x * rotation_signs(head_dim, seed)).unbind())
    distance = 1
    while distance < inner:
        for i in range(head_dim):
            if not i % inner & distance:
                y[i], y[i + distance] = y[i] + y[i + distance], y[i] - y[i + distance]
        distance *= 2
    result = []
    for outer in range(len(paley)):
        for i in range(inner):
            total = paley[outer, 0].float() * y[i]
            for j in range(1, len(paley)):
                total = total + paley[outer, j].float() * y[j * inner + i]
            result.append(total)
    return torch.stack(result) * torch.tensor(head_dim**-0.5)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_butterflies_add_in_the_documented_order(head_dim):
    x = torch.randn(head_dim)
    assert torch.equal(rotate(x, seed=5), plain_rotate(x, seed=5))


@given(
    count=st.integers(1, 80),
    row=st.integers(0, 79),
    head_dim=st.sampled_from(HEAD_DIMS),
    seed=st.integers(0, 2**32),
)
def test_a_vector_rotates_to_the_same_bits_in_every_batch(count, row, head_dim, seed):
    torch.manual_seed(seed)
    x = torch.randn(count, head_dim)
    row %= count
    assert torch.equal(rotate(x, seed=0)[row], rotate(x[row], seed=0))


def test_signs_follow_from_the_seed_on_any_version():
    """Written out, because pages stored by one release must be readable by the next."""
    signs = (rotation_signs(64, seed=0) > 0).int().tolist()
    assert "".join(map(str, signs)) == SIGNS_OF_SEED_0
    assert not torch.equal(rotation_signs(64, seed=0), rotation_signs(64, seed=1))


SIGNS_OF_SEED_0 = "1101111110010010100110111011100010110100000100110110101101101000"


def test_the_projection_follows_from_the_seed_on_any_version():
    assert projection_matrix(64, seed=0)[0, :2].tolist() == pytest.approx(PROJECTION_OF_SEED_0, abs=1e-6)


PROJECTION_OF_SEED_0 = [0.93969148, -1.43223906]


def relative_error(codec, x):
    decoded = codec.decode_keys(codec.encode_keys(x))
    return float(((decoded - x).square().sum(-1) / x.square().sum(-1)).mean())


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_sixteen_outlier_channels_cost_nothing(head_dim):
    """Blocks of smaller Hadamard matrices would have .0565 at 80 and .0226 at 96."""
    x = torch.randn(4000, head_dim, generator=torch.Generator().manual_seed(0))
    x[:, :16] *= 5
    assert relative_error(Codec(KVFormat(4, 4), head_dim), x) < 0.0095


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_a_constant_offset_costs_nothing(head_dim):
    """Without the signs the offset stays in one coordinate: 0.37."""
    x = 3 + torch.randn(4000, head_dim, generator=torch.Generator().manual_seed(0))
    assert relative_error(Codec(KVFormat(4, 4), head_dim), x) < 0.01
