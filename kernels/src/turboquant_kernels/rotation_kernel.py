"""The random rotation of `rotation`, in registers: what the kernels that rotate have in common.

    y = H diag(s) x / sqrt(D),   H = Paley (order 1, 12 or 20) x Sylvester (order D / Paley's)

`store.kernel` rotates keys and values before it quantizes them, `queries.kernel` rotates queries and
the attention output back. Until Paley's matrix has mixed them, ROWS vectors lie in a tuple with one tile
[ROWS, INNER] for each outer index: coordinate outer * INNER + inner. So a thread has all outer indices of
what it has of a tile, whatever layout the compiler chooses: were they an axis of one tile it could spread
them over lanes, at up to 20 shuffles a coordinate. A thread's part of a tile is one coordinate, or 8
neighbouring ones where there is no Paley factor; what butterflies need beyond that comes by warp shuffles.
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
    """Vectors as tiles, float32 [ROWS, INNER] for each outer index; zero where not valid.

    vectors: pointers [ROWS] to first coordinates. valid: bool [ROWS].
    """
    tiles = ()
    for outer in tl.static_range(HEAD_DIM // INNER):
        coordinate = outer * INNER + tl.arange(0, INNER)[None, :]
        tile = tl.load(vectors[:, None] + coordinate, mask=valid[:, None], other=0.0)
        tiles += (tile.to(tl.float32),)
    return tiles


@triton.jit
def load_signs(signs, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, INNER: tl.constexpr):
    """`device_signs` as tiles, float32 [ROWS, INNER]: each thread loads what it needs, as it does for
    vectors, and nothing has to pass through shared memory."""
    return load_vectors(signs + tl.zeros([ROWS], tl.int32), tl.full([ROWS], True, tl.int1), HEAD_DIM, INNER)


@triton.jit
def subtract(a, b):
    """The differences of two vectors' tiles."""
    tiles = ()
    for outer in tl.static_range(len(a)):
        tiles += (a[outer] - b[outer],)
    return tiles


@triton.jit
def multiply(a, b):
    """The products of two vectors' tiles, coordinate by coordinate."""
    tiles = ()
    for outer in tl.static_range(len(a)):
        tiles += (a[outer] * b[outer],)
    return tiles


@triton.jit
def take_out_exponent(tiles):
    """Vectors scaled by powers of two so that their largest coordinates lie in [2, 4): sums of squares of
    bf16 numbers can overflow float32.

    Returns the scaled tiles, the factor that undoes it, float32 [ROWS], and whether a vector is finite, bool
    [ROWS]. Vectors that are zero, below float32's normal range or not finite become zero, factor and all.
    """
    # As integers magnitudes are ordered like floats, with NaN above infinity; a maximum of floats drops NaN.
    largest = tiles[0].to(tl.int32, bitcast=True) & 0x7FFFFFFF
    for outer in tl.static_range(1, len(tiles)):
        largest = tl.maximum(largest, tiles[outer].to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    exponent = tl.max(largest, axis=1) >> 23
    usable = (exponent > 0) & (exponent < 255)
    down = tl.where(usable, (255 - exponent) << 23, 0).to(tl.float32, bitcast=True)
    up = tl.where(usable, (exponent - 1) << 23, 0).to(tl.float32, bitcast=True)
    scaled = ()
    for outer in tl.static_range(len(tiles)):
        scaled += (tl.where(usable[:, None], tiles[outer], 0.0) * down[:, None],)
    return scaled, up, exponent < 255


@triton.jit
def hadamard_product(tiles, HEAD_DIM: tl.constexpr, INNER: tl.constexpr, NEGATIVE: tl.constexpr):
    """H times each vector, float32 [ROWS, n] with n the head_dim padded with zeros: the same additions in
    the same order as `rotation.rotate` makes."""
    mixed = ()
    for outer in tl.static_range(len(tiles)):
        mixed += (_sylvester_product(tiles[outer], INNER),)
    if HEAD_DIM > INNER:
        mixed = _paley_product(mixed, NEGATIVE)
    return whole_vectors(mixed, HEAD_DIM, INNER)


@triton.jit
def whole_vectors(tiles, HEAD_DIM: tl.constexpr, INNER: tl.constexpr):
    """Tiles [ROWS, INNER] side by side, [ROWS, n] with n the head_dim padded with zeros."""
    ROWS: tl.constexpr = tiles[0].shape[0]
    ORDER_PADDED: tl.constexpr = triton.next_power_of_2(HEAD_DIM // INNER)
    for _ in tl.static_range(HEAD_DIM // INNER, ORDER_PADDED):
        tiles += (tl.zeros_like(tiles[0]),)
    # Each level joins one bit of the outer index, the highest first, as the last axis.
    for level in tl.static_range(ORDER_PADDED.bit_length() - 1):
        joined = ()
        for outer in tl.static_range(ORDER_PADDED >> (level + 1)):
            joined += (tl.join(tiles[outer], tiles[outer + (ORDER_PADDED >> (level + 1))]),)
        tiles = joined
    whole = tl.reshape(tiles[0], [ROWS, INNER, ORDER_PADDED])
    return tl.reshape(tl.permute(whole, (0, 2, 1)), [ROWS, ORDER_PADDED * INNER])


@triton.jit
def _sylvester_product(tile, INNER: tl.constexpr):
    """Sylvester's matrix times axis 1 of a tile [ROWS, INNER]."""
    ROWS: tl.constexpr = tile.shape[0]
    for level in tl.static_range(INNER.bit_length() - 1):
        tile = _butterfly(tl.reshape(tile, [ROWS * INNER >> (level + 1), 2, 1 << level]))
    return tl.reshape(tile, [ROWS, INNER])


@triton.jit
def _butterfly(pairs):
    """(a, b) -> (a + b, a - b) along axis 1 of [n, 2, h]."""
    # The sum of a pair's bits less one's own are the other's. The compiler sees through it: what remains is a
    # warp shuffle, or nothing where one thread has both.
    bits = pairs.to(tl.int32, bitcast=True)
    other = (tl.sum(bits, axis=1, keep_dims=True) - bits).to(tl.float32, bitcast=True)
    return other + pairs * (1.0 - 2.0 * tl.arange(0, 2).to(tl.float32)[None, :, None])


@triton.jit
def _paley_product(tiles, NEGATIVE: tl.constexpr):
    """Paley's matrix times the outer index, one column after the other."""
    products = ()
    for i in tl.static_range(len(tiles)):
        product = tl.zeros_like(tiles[0])
        for j in tl.static_range(len(tiles)):
            if (NEGATIVE[j] >> i) & 1:
                product -= tiles[j]
            else:
                product += tiles[j]
        products += (product,)
    return products
