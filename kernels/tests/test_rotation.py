"""The rotation: orthogonal, its own definition, and it hides outlier channels and constant offsets."""

import pytest
import torch

from turboquant_kernels.codec import Codec
from turboquant_kernels.formats import HEAD_DIMS, KVFormat
from turboquant_kernels.rotation import hadamard, projection_matrix, rotation_matrix


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


def test_a_sylvester_rotation_is_signs_then_butterflies():
    """What kernels compute: log2(D) stages of sums and differences on signed input."""
    x = torch.randn(64, dtype=torch.float64)
    matrix = rotation_matrix(64, seed=5)
    y = x * matrix[0].sign()
    for stage in range(6):
        a, b = y.view(-1, 2, 1 << stage).unbind(1)
        y = torch.stack((a + b, a - b), 1).flatten()
    assert torch.allclose(matrix.double() @ x, y / 8, atol=1e-6)


def test_signs_follow_from_the_seed_on_any_version():
    """Written out, because pages stored by one release must be readable by the next."""
    signs = (rotation_matrix(64, seed=0)[0] > 0).int().tolist()
    assert "".join(map(str, signs)) == SIGNS_OF_SEED_0
    assert not torch.equal(rotation_matrix(64, seed=0), rotation_matrix(64, seed=1))


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
