"""Scalar codebooks: the levels to which a rotated coordinate is rounded.

A vector of norm sqrt(D) turned by a random rotation has coordinates with the marginal density

    f(t) = c * (1 - t**2 / D) ** ((D - 3) / 2),   |t| <= sqrt(D)

(a Beta distribution, standard normal as D grows; paper: arXiv 2504.19874, lemma 1). `codebook` returns the
Lloyd-Max quantizer of that density whose levels lie on the grid

    level = step * (c + 1/2),   c an int8

The half makes the grid symmetric: the complement ~c of a byte is the negated level. So an integer tensor
core reads c as it is, adds the half by the sum of the other operand, and signs cost one XOR
(`turboquant_kernels.decode`). The grid costs at most 0.1% of the error up to 4 bits.

A code is the rank of its level minus 2**(bits - 1), in two's complement of `bits` bits: the top bit is the
sign, ~code the negated level, and at 8 bits the code is the int8 itself.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray

MAX_BITS = 8
_GRID = 128
"""Positive grid points: c = 0..127."""

_Array = NDArray[np.float64]


@dataclass(frozen=True)
class Codebook:
    """The levels of one bit width for one head_dim, and what they cost."""

    bits: int
    step: float
    """Distance of neighbouring grid points, in units of the coordinate's standard deviation."""
    grid: torch.Tensor
    """int8 [2**bits], by code: the c of level = step * (c + 1/2)."""
    levels: torch.Tensor
    """float32 [2**bits], by code."""
    boundaries: torch.Tensor
    """float32 [2**bits - 1], ascending: midpoints between neighbouring levels."""
    distortion: float
    """E (t - level(t))**2 for a coordinate of unit variance: the paper's D_mse of a unit vector."""

    def quantize(self, coordinates: torch.Tensor) -> torch.Tensor:
        """Codes of the nearest levels: float32 [...] of unit variance -> uint8 [...]."""
        rank = torch.bucketize(coordinates, self.boundaries, out_int32=True)
        return rank.to(torch.uint8) ^ (1 << (self.bits - 1))


@cache
def codebook(bits: int, head_dim: int) -> Codebook:
    """The Lloyd-Max codebook of `bits` (1..8) for vectors of `head_dim` coordinates.

    The positive levels minimize the exact distortion over all choices of 2**(bits - 1) grid points
    (dynamic programming) and over the step. Raises ValueError for other bits.
    """
    if not 1 <= bits <= MAX_BITS:
        raise ValueError(f"a codebook has 1 to {MAX_BITS} bits, not {bits}")
    coarse = np.arange(0.6, 6.0, 0.1)
    outermost = coarse[np.argmin(_best_choices(coarse, bits, head_dim)[0])]
    fine = outermost + np.linspace(-0.1, 0.1, 41)
    distortions, choices = _best_choices(fine, bits, head_dim)
    best = int(np.argmin(distortions))
    step = fine[best] / (_GRID - 0.5)
    positive = choices[best]
    by_rank = np.concatenate([~positive[::-1], positive]).astype(np.int8)
    levels = step * (by_rank + 0.5)
    by_code = np.roll(by_rank, -(1 << (bits - 1)))
    return Codebook(
        bits=bits,
        step=float(step),
        grid=torch.from_numpy(by_code),
        levels=torch.from_numpy(step * (by_code + 0.5)).float(),
        boundaries=torch.from_numpy((levels[1:] + levels[:-1]) / 2).float(),
        distortion=float(distortions[best]),
    )


def _best_choices(outermost: _Array, bits: int, head_dim: int) -> tuple[_Array, NDArray[np.int64]]:
    """The best 2**(bits - 1) of the 128 positive grid points, for each candidate of the outermost level.

    outermost [n], the level of c = 127. Returns distortions [n] and the chosen c, int64 [n, 2**(bits - 1)].

    cost[i, j] is the error of the coordinates between levels i and j when nothing between them is chosen;
    the best chain of levels that ends in j extends the best one, shorter by one, that ends in some i.
    """
    count = 1 << (bits - 1)
    half_step = (outermost / (2 * _GRID - 1))[:, None]
    # Levels are odd multiples of half a step; midpoints between levels are multiples of it.
    mass, mean, square = _partial_moments(half_step * np.arange(2 * _GRID), head_dim)
    level = half_step * np.arange(1, 2 * _GRID, 2)
    odd = np.arange(1, 2 * _GRID, 2)
    middle = (odd[:, None] + odd[None, :]) // 2

    def error(moment_slice, levels):
        m0, m1, m2 = moment_slice
        return m2 - 2 * levels * m1 + levels**2 * m0

    at = [m[:, odd] for m in (mass, mean, square)]
    mid = [m[:, middle] for m in (mass, mean, square)]
    below = error([q - a[:, :, None] for q, a in zip(mid, at)], level[:, :, None])
    above = error([a[:, None, :] - q for q, a in zip(mid, at)], level[:, None, :])
    cost = np.where(np.arange(_GRID)[:, None] < np.arange(_GRID)[None, :], below + above, np.inf)

    total = error(at, level)
    parents = []
    for _ in range(count - 1):
        extended = total[:, :, None] + cost
        parent = extended.argmin(axis=1)
        total = np.take_along_axis(extended, parent[:, None, :], axis=1)[:, 0]
        parents.append(parent)
    chosen = np.full((len(outermost), count), _GRID - 1)
    for position, parent in zip(range(count - 2, -1, -1), reversed(parents)):
        chosen[:, position] = np.take_along_axis(parent, chosen[:, position + 1 : position + 2], axis=1)[:, 0]
    whole = _partial_moments(np.full((1, 1), np.sqrt(head_dim)), head_dim)
    tail = error([w - a[:, -1:] for w, a in zip(whole, at)], level[:, -1:])
    return 2 * (total[:, -1] + tail[:, 0]), chosen


def _partial_moments(t: _Array, head_dim: int) -> tuple[_Array, _Array, _Array]:
    """Integrals of f(u), u f(u) and u**2 f(u) over 0..t, for t in 0..sqrt(D): exact up to rounding.

    With u = sqrt(D) sin(a) they become integrals of powers of the cosine, for which, D being even,

        C(n) = integral of cos**n = cos**(n-1) sin / n + (n-1)/n C(n-2),   C(0) = a

    has only positive terms.
    """
    sine = np.minimum(t / np.sqrt(head_dim), 1.0)
    angle, cosine = np.arcsin(sine), np.sqrt(1 - sine**2)
    integral, whole = angle, np.pi / 2
    power = sine * cosine
    for n in range(2, head_dim - 1, 2):
        integral = power / n + (n - 1) / n * integral
        whole *= (n - 1) / n
        power = power * cosine**2
    mass = integral / (2 * whole)
    n = head_dim
    next_integral = power / n + (n - 1) / n * integral
    mean = np.sqrt(head_dim) * (1 - cosine ** (n - 1)) / (n - 1) / (2 * whole)
    square = head_dim * (integral - next_integral) / (2 * whole)
    return mass, mean, square
