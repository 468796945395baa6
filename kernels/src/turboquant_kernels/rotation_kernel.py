"""The random rotation of `rotation`, in registers: what the kernels that rotate have in common.

    y = H diag(s) x / sqrt(D),   H = Paley (order 1, 12 or 20) x Sylvester (order D / Paley's)

`store.encode_kernel` rotates keys and values before it quantizes them, `queries.kernel` rotates queries and
the attention output back. Vectors lie in tiles [ROWS, ORDER_PADDED, INNER]: coordinate outer * INNER + inner
of ROWS vectors, the outer index padded to a power of two with zeros. A thread has 8 neighbouring coordinates
of a vector or, where a Paley matrix mixes the outer index, all coordinates of one inner index; what
butterflies need beyond that comes by warp shuffles. `load_vectors` and `tile_rows` see to it.
"""

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from turboquant_kernels.rotation import hadamard_factors, rotation_signs


class Factors(NamedTuple):
    """The factors of H for a head_dim, as kernel parameters."""

    inner: int
    """Order of Sylvester's, a power of two."""
    negative: tuple[int, ...]
    """Paley's: bit i of entry j is set where it is -1 in row i, column j."""
    negative_transposed: tuple[int, ...]
    """The same of Paley's transposed, for the inverse rotation."""


@cache
def factors(head_dim: int) -> Factors:
    """The factors of `rotation.hadamard(head_dim)`. Raises ValueError where there is no such matrix."""
    paley, inner = hadamard_factors(head_dim)
    return Factors(inner, _negative_bits(paley), _negative_bits(paley.T))


@cache
def device_signs(head_dim: int, seed: int, device: torch.device) -> torch.Tensor:
    """`rotation.rotation_signs` on a device, float32 [D]."""
    return rotation_signs(head_dim, seed).to(device)


def tile_rows(head_dim: int, num_warps: int) -> int:
    """Vectors of a tile: as many as give a thread 8 coordinates, one 16-byte load of bf16, or one inner index
    with all coordinates where there is a Paley factor."""
    inner = factors(head_dim).inner
    return num_warps * 32 * (8 if inner == head_dim else 1) // inner


def _negative_bits(matrix: torch.Tensor) -> tuple[int, ...]:
    weights = 1 << torch.arange(len(matrix))
    return tuple((weights[:, None] * (matrix < 0)).sum(0).tolist())


@triton.jit
def load_vectors(vectors, valid, HEAD_DIM: tl.constexpr, INNER: tl.constexpr):
    """Vectors as a tile, float32 [ROWS, ORDER_PADDED, INNER]; zero where not valid and in the padding.

    vectors: pointers [ROWS] to first coordinates. valid: bool [ROWS].
    """
    ORDER_PADDED: tl.constexpr = triton.next_power_of_2(HEAD_DIM // INNER)
    if ORDER_PADDED > 1:
        # Lanes should take rows and the inner index, and each thread all of the outer index, which in lanes
        # would cost up to 20 shuffles a coordinate. The compiler fills lanes from the last dimension on, so
        # the outer index is loaded as the first. The hint hides that loads of several coordinates are
        # aligned, so that a thread has one inner index.
        coordinate = tl.arange(0, ORDER_PADDED)[:, None, None] * INNER + tl.arange(0, INNER)[None, None, :]
        coordinate = tl.multiple_of(coordinate, [1, 1, 1])
        mask = valid[None, :, None] & (coordinate < HEAD_DIM)
        tile = tl.permute(tl.load(vectors[None, :, None] + coordinate, mask=mask, other=0.0), (1, 0, 2))
    else:
        coordinate = tl.arange(0, INNER)[None, None, :]
        tile = tl.load(vectors[:, None, None] + coordinate, mask=valid[:, None, None], other=0.0)
    return tile.to(tl.float32)


@triton.jit
def load_signs(signs, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, INNER: tl.constexpr):
    """`device_signs` as a tile, float32 [ROWS, ORDER_PADDED, INNER]: each thread loads what it needs, as it
    does for vectors, and nothing has to pass through shared memory."""
    return load_vectors(signs + tl.zeros([ROWS], tl.int32), tl.full([ROWS], True, tl.int1), HEAD_DIM, INNER)


@triton.jit
def take_out_exponent(tile):
    """Vectors scaled by powers of two so that their largest coordinates lie in [2, 4): sums of squares of
    bf16 numbers can overflow float32.

    Returns the scaled tile, the factor that undoes it, float32 [ROWS], and whether a vector is finite, bool
    [ROWS]. Vectors that are zero, below float32's normal range or not finite become zero, factor and all.
    """
    bits = tile.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    # As integers magnitudes are ordered like floats, with NaN above infinity; a maximum of floats drops NaN.
    exponent = tl.max(tl.max(bits, axis=2), axis=1) >> 23
    usable = (exponent > 0) & (exponent < 255)
    down = tl.where(usable, (255 - exponent) << 23, 0).to(tl.float32, bitcast=True)
    up = tl.where(usable, (exponent - 1) << 23, 0).to(tl.float32, bitcast=True)
    return tl.where(usable[:, None, None], tile, 0.0) * down[:, None, None], up, exponent < 255


@triton.jit
def hadamard_product(tile, HEAD_DIM: tl.constexpr, INNER: tl.constexpr, NEGATIVE: tl.constexpr):
    """H times each vector of a tile, float32 [ROWS, n] with n the head_dim padded with zeros: the same
    additions in the same order as `rotation.rotate` makes."""
    ROWS: tl.constexpr = tile.shape[0]
    ORDER_PADDED: tl.constexpr = tile.shape[1]
    for level in tl.static_range(INNER.bit_length() - 1):
        pairs = tl.reshape(tile, [ROWS * ORDER_PADDED * INNER >> (level + 1), 2, 1 << level])
        tile = _butterfly(pairs)
    if HEAD_DIM > INNER:
        tile = tl.reshape(tile, [ROWS, ORDER_PADDED, INNER])
        tile = _paley_product(tile, HEAD_DIM // INNER, NEGATIVE)
    return tl.reshape(tile, [ROWS, ORDER_PADDED * INNER])


@triton.jit
def _butterfly(pairs):
    """(a, b) -> (a + b, a - b) along axis 1 of [n, 2, h]."""
    # The sum of a pair's bits less one's own are the other's. The compiler sees through it: what remains is a
    # warp shuffle, or nothing where one thread has both.
    bits = pairs.to(tl.int32, bitcast=True)
    other = (tl.sum(bits, axis=1, keep_dims=True) - bits).to(tl.float32, bitcast=True)
    return other + pairs * (1.0 - 2.0 * tl.arange(0, 2).to(tl.float32)[None, :, None])


@triton.jit
def _paley_product(tile, ORDER: tl.constexpr, NEGATIVE: tl.constexpr):
    """Paley's matrix times axis 1 of a tile, one column after the other."""
    outer = tl.arange(0, tile.shape[1])[None, :, None]
    bits = tile.to(tl.int32, bitcast=True)
    product = tl.zeros_like(tile)
    for j in tl.static_range(ORDER):
        # A sum with one term: the tile's outer index j, for every other one.
        column = tl.sum(tl.where(outer == j, bits, 0), axis=1, keep_dims=True).to(tl.float32, bitcast=True)
        product += column * (1.0 - 2.0 * ((NEGATIVE[j] >> outer) & 1).to(tl.float32))
    return tl.where(outer < ORDER, product, 0.0)
