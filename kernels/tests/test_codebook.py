"""Codebooks against the paper's numbers and against an independent Lloyd-Max iteration."""

import math

import numpy as np
import pytest
import torch

from turboquant_kernels.codebook import codebook
from turboquant_kernels.formats import HEAD_DIMS


@pytest.mark.parametrize(
    ("bits", "digits", "paper"), [(1, 2, 0.36), (2, 3, 0.117), (3, 2, 0.03), (4, 3, 0.009)]
)
def test_distortion_rounds_to_the_papers_number_in_high_dimension(bits, digits, paper):
    assert round(codebook(bits, 1024).distortion, digits) == paper


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("bits", range(1, 6))
def test_distortion_lies_between_the_papers_bounds(bits, head_dim):
    distortion = codebook(bits, head_dim).distortion
    assert 4.0**-bits <= distortion <= math.sqrt(3) * math.pi / 2 * 4.0**-bits


def density(head_dim, points=20_001):
    """Midpoints and probabilities of the coordinate's marginal, by brute force."""
    edge = math.sqrt(head_dim)
    t = (np.arange(points) + 0.5) / points * 2 * edge - edge
    weight = (1 - t**2 / head_dim) ** ((head_dim - 3) / 2)
    return t, weight / weight.sum()


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 8])
def test_distortion_is_that_of_the_levels(bits, head_dim):
    book = codebook(bits, head_dim)
    t, weight = density(head_dim)
    levels = np.sort(book.levels.double().numpy())
    nearest = levels[np.searchsorted((levels[1:] + levels[:-1]) / 2, t)]
    assert book.distortion == pytest.approx(((t - nearest) ** 2 * weight).sum(), rel=1e-4)


@pytest.mark.parametrize(
    ("bits", "cost"), [(1, 1e-5), (2, 1e-4), (3, 5e-4), (4, 0.003), (5, 0.01), (6, 0.05)]
)
def test_the_int8_grid_costs_little_against_free_levels(bits, cost):
    t, weight = density(128)
    # Panter and Dite's levels, a quantizer for many bits, are a start from which few iterations are enough.
    companded = np.cumsum(weight ** (1 / 3))
    levels = np.interp((np.arange(1 << bits) + 0.5) / (1 << bits), companded / companded[-1], t)
    for _ in range(500):
        region = np.searchsorted((levels[1:] + levels[:-1]) / 2, t)
        levels = np.bincount(region, weight * t) / np.bincount(region, weight)
    free = ((t - levels[region]) ** 2 * weight).sum()
    assert free * (1 - 2e-4) <= codebook(bits, 128).distortion <= free * (1 + cost)


@pytest.mark.parametrize("bits", range(1, 9))
def test_levels_are_half_integer_multiples_of_one_step(bits):
    book = codebook(bits, 128)
    assert book.grid.dtype == torch.int8
    assert torch.equal(book.levels, (book.step * (book.grid.double() + 0.5)).float())
    assert len(book.grid.unique()) == 1 << bits


@pytest.mark.parametrize("bits", range(1, 8))
def test_a_code_is_a_magnitude_and_a_sign(bits):
    book = codebook(bits, 128)
    positive, negative = book.levels.chunk(2)
    assert (positive > 0).all()
    assert torch.equal(positive, positive.sort().values)
    assert torch.equal(negative, -positive)
    assert torch.equal(book.grid.chunk(2)[1], ~book.magnitudes)


def test_an_eight_bit_code_is_the_int8_itself():
    book = codebook(8, 64)
    assert torch.equal(book.grid, torch.arange(256, dtype=torch.uint8).view(torch.int8))
    assert book.magnitudes.tolist() == list(range(128))


@pytest.mark.parametrize("bits", range(1, 9))
def test_quantize_picks_the_nearest_level(bits):
    book = codebook(bits, 128)
    t = torch.linspace(-5, 5, 4001)
    distance = (t[:, None] - book.levels).abs()
    chosen = distance.gather(1, book.quantize(t).long()[:, None])[:, 0]
    assert torch.allclose(chosen, distance.min(1).values, atol=1e-6)


@pytest.mark.parametrize("bits", range(1, 9))
def test_quantize_is_symmetric_and_rounds_ties_to_the_smaller_level(bits):
    book = codebook(bits, 128)
    ties = book.boundaries
    assert len(ties) == (1 << (bits - 1)) - 1
    for t in (ties, torch.linspace(1e-3, 5, 999)):
        assert torch.equal(book.levels[book.quantize(-t).int()], -book.levels[book.quantize(t).int()])
    half = 1 << (bits - 1)
    assert book.quantize(ties).tolist() == list(range(half - 1))
    assert book.quantize(ties.nextafter(torch.tensor(9.0))).tolist() == list(range(1, half))


@pytest.mark.parametrize("bits", range(1, 9))
def test_both_zeros_have_the_smallest_positive_level(bits):
    assert codebook(bits, 128).quantize(torch.tensor([0.0, -0.0])).tolist() == [0, 0]


def test_quantize_ends_at_the_outermost_levels():
    book = codebook(3, 128)
    extremes = book.levels[book.quantize(torch.tensor([-1e30, 1e30])).int()]
    assert extremes.tolist() == [book.levels.min(), book.levels.max()]


@pytest.mark.parametrize("bits", [0, 9, -1])
def test_other_bit_widths_are_refused(bits):
    with pytest.raises(ValueError, match=f"1 to 8 bits, not {bits}"):
        codebook(bits, 128)
