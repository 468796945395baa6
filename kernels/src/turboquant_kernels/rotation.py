"""The random rotation that makes every coordinate of a vector look alike.

    y = H diag(s) x / sqrt(D)

H is a Hadamard matrix (entries +-1, rows orthogonal) of the whole head dimension and s are random signs
(paper: arXiv 2504.19874, section 3, with a randomized Hadamard transform in the rotation's place). Both
parts are needed. Without the signs a key with a constant offset keeps it in one coordinate: 0.37 relative
error at 4 bits against 0.009. Blocks of smaller matrices where D is no power of two spread outlier channels
over their own block only: .0565 (D = 80) against .0088 with one full matrix.

All layers and heads share the signs of a seed: each vector has its own scale, and keys meet only queries of
their own head, so nothing would be gained by different ones.

Here the rotation is a dense D x D matrix, since one matrix product is the fastest form on a CPU. A kernel
may use log2(D) butterflies: `hadamard` is a Kronecker product whose right factor is Sylvester's.
"""

import random
from functools import cache

import torch

_PALEY_PRIMES = {80: 19, 96: 11, 192: 11}
"""Head dimensions that are no power of two: D = (q + 1) * 2**m with the Paley matrix of order q + 1."""


def hadamard(order: int) -> torch.Tensor:
    """A Hadamard matrix, float64 [order, order], entries +-1, H @ H.T = order * I.

    Powers of two: Sylvester's. 80 = H20 x H4, 96 = H12 x H8, 192 = H12 x H16: Kronecker products of a Paley
    matrix and Sylvester's. Raises ValueError for other orders.
    """
    left = torch.ones(1, 1, dtype=torch.float64)
    if order in _PALEY_PRIMES:
        left = _paley(_PALEY_PRIMES[order])
    right_order = order // len(left)
    if right_order & (right_order - 1) or not right_order:
        raise ValueError(f"no Hadamard matrix of order {order} is defined here")
    return torch.kron(left, _sylvester(right_order))


@cache
def rotation_matrix(head_dim: int, seed: int) -> torch.Tensor:
    """R = H diag(s) / sqrt(D), float32 [D, D], orthogonal: y = R x and x = R.T y.

    The signs come from `random.Random(seed)`, whose stream Python keeps stable: torch's differs between
    versions and devices, and a cache offloaded by one release must be readable by the next.
    """
    generator = random.Random(seed)
    signs = torch.tensor([generator.choice((-1.0, 1.0)) for _ in range(head_dim)], dtype=torch.float64)
    return (hadamard(head_dim) * signs / head_dim**0.5).float()


@cache
def projection_matrix(head_dim: int, seed: int) -> torch.Tensor:
    """S, float32 [D, D], independent standard normal entries: the projection of QJL.

    For a row g of S, E sign(<g, r>) g = sqrt(2 / pi) r / |r|, which makes the estimator unbiased. It needs
    rows that are rotation-invariant; those of a signed Hadamard matrix are not (paper: definition 1).
    """
    generator = random.Random(f"projection {seed}")
    entries = [generator.gauss(0.0, 1.0) for _ in range(head_dim * head_dim)]
    return torch.tensor(entries, dtype=torch.float32).view(head_dim, head_dim)


def _sylvester(order: int) -> torch.Tensor:
    """H_1 = [1], H_2n = [[H_n, H_n], [H_n, -H_n]]: entry (i, j) is the parity of the bits of i & j."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < order:
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), matrix)
    return matrix


def _paley(q: int) -> torch.Tensor:
    """Paley's first construction, order q + 1, for a prime q = 3 mod 4.

    Q[i, j] = chi(i - j), with chi the quadratic character mod q, is skew, and I + [[0, 1], [-1, Q]] is a
    Hadamard matrix.
    """
    squares = {x * x % q for x in range(1, q)}
    chi = torch.tensor([0.0] + [1.0 if x in squares else -1.0 for x in range(1, q)], dtype=torch.float64)
    index = torch.arange(q)
    skew = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    skew[0, 1:], skew[1:, 0] = 1, -1
    skew[1:, 1:] = chi[(index[:, None] - index[None, :]) % q]
    return torch.eye(q + 1, dtype=torch.float64) + skew
