"""The random rotation that makes every coordinate of a vector look alike.

    y = H diag(s) x / sqrt(D)

H is a Hadamard matrix (entries +-1, rows orthogonal) of the whole head dimension and s are random signs
(paper: arXiv 2504.19874, section 3, with a randomized Hadamard transform instead of its rotation). Both
parts are needed. Without the signs a key with a constant offset keeps it in one coordinate: 0.37 relative
error at 4 bits against 0.009. Blocks of smaller matrices where D is no power of two spread outlier channels
over their own block only: .0565 (D = 80) against .0088 with one full matrix.

All layers and heads share the signs of a seed: each vector has its own scale, and keys meet only queries of
their own head, so nothing would be gained by different ones.

There are two forms of it. `rotate` is a fixed sequence of float32 additions, butterflies, which every
implementation can follow to the bit: what is stored passes through it, so that a token's codes depend neither
on the tokens stored with it nor on the device. `rotation_matrix` is the same as a dense matrix, whose product
rounds as the library likes; it is the fastest form for a few queries and outputs on a CPU. Kernels for a GPU
take `signed_hadamard`, the same but for the factor, and `device_projection`.
"""

import random
from functools import cache

import torch

_PALEY_PRIMES = {80: 19, 96: 11, 192: 11}
"""Head dimensions that are no power of two: D = (q + 1) * 2**m with the Paley matrix of order q + 1."""


@cache
def hadamard_factors(order: int) -> tuple[torch.Tensor, int]:
    """The factors of a Hadamard matrix of `order`: P, float64 [outer, outer], and the order of Sylvester's.

    Powers of two: P = [1]. 80 = H20 x H4, 96 = H12 x H8, 192 = H12 x H16: P is a Paley matrix. Raises
    ValueError for other orders.
    """
    paley = torch.ones(1, 1, dtype=torch.float64)
    if order in _PALEY_PRIMES:
        paley = _paley(_PALEY_PRIMES[order])
    inner = order // len(paley)
    if inner & (inner - 1) or not inner:
        raise ValueError(f"no Hadamard matrix of order {order} is defined here")
    return paley, inner


def hadamard(order: int) -> torch.Tensor:
    """The Kronecker product of `hadamard_factors`: float64 [order, order] of +-1, H @ H.T = order * I."""
    paley, inner = hadamard_factors(order)
    return torch.kron(paley, _sylvester(inner))


@cache
def rotation_signs(head_dim: int, seed: int) -> torch.Tensor:
    """s, float32 [D], entries +-1.

    From `random.Random(seed)`, whose stream Python keeps stable: torch's differs between versions and
    devices, and a cache offloaded by one release must be readable by the next.
    """
    generator = random.Random(seed)
    return torch.tensor([generator.choice((-1.0, 1.0)) for _ in range(head_dim)], dtype=torch.float32)


def rotate(vectors: torch.Tensor, seed: int) -> torch.Tensor:
    """y = H diag(s) x / sqrt(D) in an order of its own: float32 [..., D] -> float32 [..., D].

    First x * s. Then Sylvester's factor: (a, b) -> (a + b, a - b) for neighbours at distance 1, 2, 4 and so
    on. Then Paley's, over runs of the length of Sylvester's: the sum of its signed terms, in ascending order.
    Last the product with 1 / sqrt(D), rounded to float32. All operations are elementwise and of one rounding
    each.
    """
    head_dim = vectors.shape[-1]
    paley, inner = hadamard_factors(head_dim)
    outer = len(paley)
    x = (vectors * rotation_signs(head_dim, seed)).unflatten(-1, (outer, inner))
    for _ in range(inner.bit_length() - 1):
        # Sums go to the first half and differences to the second, so that the next stage's pairs are
        # neighbours too: each stage rotates the bits of the index by one, and all stages restore them.
        even, odd = x[..., 0::2], x[..., 1::2]
        x = torch.cat((even + odd, even - odd), dim=-1)
    if outer > 1:
        signs = paley.float().unsqueeze(-1)
        total = signs[:, 0] * x[..., :1, :]
        for j in range(1, outer):
            total += signs[:, j] * x[..., j : j + 1, :]
        x = total
    return x.flatten(-2) * head_dim**-0.5


@cache
def rotation_matrix(head_dim: int, seed: int) -> torch.Tensor:
    """R = H diag(s) / sqrt(D), float32 [D, D], orthogonal: y = R x and x = R.T y."""
    return (hadamard(head_dim) * rotation_signs(head_dim, seed) / head_dim**0.5).float()


@cache
def signed_hadamard(head_dim: int, seed: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """M = H diag(s) = sqrt(D) R on a device, [D, D] of +-1, which every dtype holds exactly.

    A product with it rounds in its sums alone.
    """
    return (hadamard(head_dim) * rotation_signs(head_dim, seed)).to(device, dtype)


@cache
def projection_matrix(head_dim: int, seed: int) -> torch.Tensor:
    """S, float32 [D, D], independent standard normal entries: the projection of QJL.

    For a row g of S, E sign(<g, r>) g = sqrt(2 / pi) r / |r|, which makes the estimator unbiased. It needs
    rows that are rotation-invariant; those of a signed Hadamard matrix are not (paper: definition 1).
    """
    generator = random.Random(f"projection {seed}")
    entries = [generator.gauss(0.0, 1.0) for _ in range(head_dim * head_dim)]
    return torch.tensor(entries, dtype=torch.float32).view(head_dim, head_dim)


@cache
def device_projection(head_dim: int, seed: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """`projection_matrix` on a device, [D, D], rounded to a dtype."""
    return projection_matrix(head_dim, seed).to(device, dtype)


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
