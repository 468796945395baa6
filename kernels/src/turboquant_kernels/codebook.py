"""Scalar codebooks: the levels to which a rotated coordinate is rounded.

A vector of norm sqrt(D) turned by a random rotation has coordinates with the marginal density

    f(t) = c * (1 - t**2 / D) ** ((D - 3) / 2),   |t| <= sqrt(D)

(a Beta distribution, standard normal as D grows; paper: arXiv 2504.19874, lemma 1). `codebook` returns the
Lloyd-Max quantizer of that density whose levels lie on the grid

    level = step * (c + 1/2),   c an int8

The half makes the grid symmetric: the complement ~c of a byte is the negated level. So integer tensor cores
read c as it is, the half enters once by the sum of the other operand, and signs cost one XOR. The grid costs
0.2% of the error at 4 bits, 0.8% at 5 and 4.4% at 6; at 8 bits all 256 grid points are levels.

A code is a magnitude and a sign: code = magnitude | sign << (bits - 1), the magnitude being the rank of the
level's size among the positive levels and sign 1 negative. So a kernel looks up positive levels only, half a
table (at 4 bits the 8 bytes of one PRMT instruction), and complements what has the sign. At 8 bits there is
nothing to look up: the code is the int8 c itself, a negative magnitude's complement.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray

MAX_BITS = 8
_HALF_GRID = 128
"""Grid points of each sign: c = 0..127 are the positive ones."""


@dataclass(frozen=True)
class Codebook:
    """The levels of one bit width for one head_dim, and what they cost."""

    bits: int
    step: float
    """Distance of neighbouring grid points, in standard deviations of the coordinate."""
    grid: torch.Tensor
    """int8 [2**bits], by code: the c of level = step * (c + 1/2)."""
    levels: torch.Tensor
    """float32 [2**bits], by code."""
    boundaries: torch.Tensor
    """float32 [2**(bits - 1) - 1], ascending: midpoints between neighbouring positive levels."""
    distortion: float
    """E (t - level(t))**2 for a coordinate of unit variance: the paper's D_mse of a unit vector."""

    @property
    def magnitudes(self) -> torch.Tensor:
        """int8 [2**(bits - 1)], ascending: the c of the positive levels; ~c is that of the negated one."""
        return self.grid[: len(self.grid) // 2]

    def quantize(self, coordinates: torch.Tensor) -> torch.Tensor:
        """Codes of the nearest levels: float32 [...] of unit variance -> uint8 [...].

        The magnitude is the number of boundaries below |t|, the sign is t < 0: what lies on a boundary goes
        to the smaller level, and -t to the negated level of t, bit for bit.
        """
        magnitude = torch.bucketize(coordinates.abs(), self.boundaries, out_int32=True).to(torch.uint8)
        return torch.where(coordinates < 0, magnitude ^ _sign_mask(self.bits), magnitude)


def _sign_mask(bits: int) -> int:
    """The bits of a code in which a level and its negation differ."""
    return 0xFF if bits == MAX_BITS else 1 << (bits - 1)


@cache
def codebook(bits: int, head_dim: int) -> Codebook:
    """The codebook of `bits` (1..8) for vectors of `head_dim` (even) coordinates; ValueError for other bits.

    Its outermost level is c = 127, so that the grid is as fine as it can be. Where that level lies is
    searched to 0.01; the others are the best there are for it.
    """
    if not 1 <= bits <= MAX_BITS:
        raise ValueError(f"a codebook has 1 to {MAX_BITS} bits, not {bits}")

    def best(outermost: Iterable[float]) -> _Choice:
        choices = (_best_levels(float(level), bits, head_dim) for level in outermost)
        return min(choices, key=lambda choice: choice.distortion)

    coarse = best(np.arange(0.6, 5.0, 0.2))
    choice = best(coarse.outermost + np.arange(-0.19, 0.195, 0.01))
    step = choice.outermost / (_HALF_GRID - 0.5)
    positive = choice.positive
    negative = ~positive[::-1] if bits == MAX_BITS else ~positive
    grid = np.concatenate([positive, negative])
    levels = step * (positive + 0.5)
    return Codebook(
        bits=bits,
        step=step,
        grid=torch.from_numpy(grid.astype(np.int8)),
        levels=torch.from_numpy(step * (grid + 0.5)).float(),
        boundaries=torch.from_numpy((levels[1:] + levels[:-1]) / 2).float(),
        distortion=choice.distortion,
    )


@dataclass(frozen=True)
class _Choice:
    """Positive levels on a grid whose last point, c = 127, lies at `outermost`."""

    outermost: float
    positive: NDArray[np.int64]
    """c of each positive level, ascending, the last one 127."""
    distortion: float


def _best_levels(outermost: float, bits: int, head_dim: int) -> _Choice:
    """The 2**(bits - 1) of the 128 positive grid points with the least distortion, by dynamic programming.

    The best chain of levels 0..m that ends in grid point j extends the best chain of levels 0..m - 1 that
    ends in some i < j; between the two every coordinate goes to the nearer one. Level m lies in m..m + slack,
    so that the levels before and after it find room.
    """
    count = 1 << (bits - 1)
    slack = _HALF_GRID - count
    # In units of half a step, levels are the odd numbers up to 255 and midpoints between levels whole
    # numbers. Point 256 is the end of the density.
    odd = np.arange(1, 2 * _HALF_GRID, 2)
    points = outermost / odd[-1] * np.arange(2 * _HALF_GRID)
    mass, mean, square = _partial_moments(np.append(points, np.sqrt(head_dim)), head_dim)
    level = points[odd]

    def error(begin, end, level):
        """Integral of (t - level)**2 f(t) from point `begin` to point `end`."""
        return (
            (square[end] - square[begin])
            - 2 * level * (mean[end] - mean[begin])
            + level**2 * (mass[end] - mass[begin])
        )

    low, high = odd[:, None], odd[None, :]
    middle = (low + high) // 2
    between = error(low, middle, level[:, None]) + error(middle, high, level[None, :])
    between[low >= high] = np.inf

    total = error(0, odd, level)[: slack + 1]
    came_from = []
    for m in range(1, count):
        chains = total[:, None] + between[m - 1 : m + slack, m : m + slack + 1]
        came_from.append(chains.argmin(axis=0))
        total = chains.min(axis=0)
    shift = [slack]
    for choices in reversed(came_from):
        shift.append(choices[shift[-1]])
    half = total[slack] + error(odd[-1], -1, level[-1])
    return _Choice(outermost, np.arange(count) + shift[::-1], 2 * float(half))


def _partial_moments(t: NDArray[np.float64], head_dim: int) -> tuple[NDArray[np.float64], ...]:
    """Integrals of f(u), u f(u) and u**2 f(u) from 0 to t, for t in 0..sqrt(D): exact up to rounding.

    With u = sqrt(D) sin(a) they are integrals of powers of the cosine, and for even n

        C(n) = integral of cos**n from 0 to a = (cos**(n - 1) * sin + (n - 1) * C(n - 2)) / n,   C(0) = a

    has positive terms only, so nothing cancels.
    """
    sine = np.minimum(t / np.sqrt(head_dim), 1.0)
    cosine = np.sqrt(1 - sine**2)
    integral, whole = np.arcsin(sine), np.pi / 2
    below, power = integral, cosine * sine
    for n in range(2, head_dim + 1, 2):
        below, integral = integral, (power + (n - 1) * integral) / n
        power = power * cosine**2
        if n < head_dim:
            whole *= (n - 1) / n
    # `below` is C(D - 2), the mass; sin**2 cos**(D - 2) integrates to C(D - 2) - C(D).
    density = 1 / (2 * whole)
    return (
        density * below,
        density * np.sqrt(head_dim) * (1 - cosine ** (head_dim - 1)) / (head_dim - 1),
        density * head_dim * (below - integral),
    )
