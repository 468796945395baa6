"""`queries.reference` in Triton: one launch before decode attention and one after it.

A program takes a tile of tokens of one query head and keeps everything between load and store in registers.
"""

import math
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from turboquant_kernels.codebook import codebook
from turboquant_kernels.codec import Codec
from turboquant_kernels.programmatic_launch import uses_pdl
from turboquant_kernels.queries.reference import MAX_QUERY, QuantizedQueries
from turboquant_kernels.rotation_kernel import (
    device_signs,
    factors,
    hadamard_product,
    load_signs,
    load_vectors,
    take_out_exponent,
    tile_rows,
)

NUM_WARPS = 4
_MAX_QUERY = tl.constexpr(MAX_QUERY)
_ROUND = tl.constexpr(1.5 * 2**23)
"""A float32 of magnitude below 2**22 plus this number is rounded to a whole one, half to even."""


def rotate_queries(codec: Codec, query: torch.Tensor, scale: float) -> QuantizedQueries:
    """Rotates and quantizes queries as `queries.reference.rotate_queries` does, to within one unit.

    query: bf16, fp16 or fp32 [tokens, q_heads, D], any strides of tokens and heads; ValueError where the
    coordinates of a query are not adjacent. One launch, without synchronisation.
    """
    if query.stride(-1) != 1:
        raise ValueError("the coordinates of a query are not adjacent in memory")
    tokens, q_heads, head_dim = query.shape
    out = QuantizedQueries(
        codes=query.new_empty((tokens, q_heads, 2, head_dim), dtype=torch.int8),
        scale=query.new_empty((tokens, q_heads), dtype=torch.float32),
        half_sum=query.new_empty((tokens, q_heads), dtype=torch.float32),
        unrotated=query,
        unrotated_scale=scale * math.log2(math.e),
    )
    if not tokens:
        return out
    constexprs = constants_of(head_dim)
    pdl = uses_pdl(query.device)
    key_step = codebook(codec.fmt.key_code_bits, head_dim).step
    rotate_kernel[triton.cdiv(tokens, constexprs["ROWS"]), q_heads](
        query,
        device_signs(head_dim, codec.seed, query.device),
        out.codes,
        out.scale,
        out.half_sum,
        out.unrotated_scale * key_step / math.sqrt(head_dim),
        tokens,
        q_heads,
        query.stride(0),
        query.stride(1),
        **constexprs,
        PDL=pdl,
        num_warps=NUM_WARPS,
        launch_pdl=pdl,
    )
    return out


def unrotate(codec: Codec, rotated: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Turns rotated attention output back, as `queries.reference.unrotate`.

    rotated: float32 [tokens, q_heads, D]; out: bf16, fp16 or fp32 of that shape, written and returned. Any
    strides of tokens and heads; ValueError where the coordinates of a vector are not adjacent.
    """
    if rotated.stride(-1) != 1 or out.stride(-1) != 1:
        raise ValueError("the coordinates of an output vector are not adjacent in memory")
    tokens, q_heads, head_dim = out.shape
    if not tokens:
        return out
    constexprs = constants_of(head_dim, inverse=True)
    pdl = uses_pdl(out.device)
    unrotate_kernel[triton.cdiv(tokens, constexprs["ROWS"]), q_heads](
        rotated,
        device_signs(head_dim, codec.seed, out.device),
        out,
        tokens,
        rotated.stride(0),
        rotated.stride(1),
        out.stride(0),
        out.stride(1),
        **constexprs,
        PDL=pdl,
        num_warps=NUM_WARPS,
        launch_pdl=pdl,
    )
    return out


@cache
def constants_of(head_dim: int, inverse: bool = False) -> dict[str, Any]:
    """The kernels' constexprs for a head_dim: what is compiled ahead is what runs."""
    hadamard_factors = factors(head_dim)
    return {
        "HEAD_DIM": head_dim,
        "INNER": hadamard_factors.inner,
        "NEGATIVE": hadamard_factors.negative_transposed if inverse else hadamard_factors.negative,
        "ROWS": tile_rows(head_dim, NUM_WARPS),
    }


@triton.jit(do_not_specialize=["num_tokens", "q_heads"])
def rotate_kernel(
    query,
    signs,
    codes,  # int8 [num_tokens, q_heads, 2, D]
    scale,  # float32 [num_tokens, q_heads], as half_sum
    half_sum,
    scale_factor,
    num_tokens,
    q_heads,
    query_token_stride,
    query_head_stride,
    HEAD_DIM: tl.constexpr,
    INNER: tl.constexpr,
    NEGATIVE: tl.constexpr,
    ROWS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid: (tiles of ROWS tokens, query heads)."""
    if PDL:
        gdc_wait()  # and no `gdc_launch_dependents`: decode attention, which comes next, is launched after it
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    head = tl.program_id(1)
    valid = token < num_tokens
    vectors = query + token.to(tl.int64) * query_token_stride + head.to(tl.int64) * query_head_stride
    tile = load_vectors(vectors, valid, HEAD_DIM, INNER)
    signs_tile = load_signs(signs, ROWS, HEAD_DIM, INNER)
    tile, factor, finite = take_out_exponent(tile)
    rotated = hadamard_product(tile * signs_tile, HEAD_DIM, INNER, NEGATIVE)

    largest = tl.max(tl.abs(rotated), axis=1)
    # A query is zero or, since its largest coordinate was made at least 2, has a rotated one of at least 2.
    exact = rotated * (1.0 / tl.maximum(largest, 1.0) * _MAX_QUERY)[:, None]
    q = ((exact + _ROUND) - _ROUND).to(tl.int32)
    high = (q + 128) >> 8
    low = q - (high << 8)

    row = token.to(tl.int64) * q_heads + head
    coordinate = tl.arange(0, rotated.shape[1])[None, :]
    target = codes + row[:, None] * (2 * HEAD_DIM) + coordinate
    mask = valid[:, None] & (coordinate < HEAD_DIM)
    tl.store(target, high.to(tl.int8), mask=mask)
    tl.store(target + HEAD_DIM, low.to(tl.int8), mask=mask)
    step = largest * (scale_factor / _MAX_QUERY) * factor
    tl.store(scale + row, tl.where(finite, step, float("nan")), mask=valid)
    tl.store(half_sum + row, tl.sum(q, axis=1).to(tl.float32) * 0.5, mask=valid)


@triton.jit(do_not_specialize=["num_tokens"])
def unrotate_kernel(
    rotated,
    signs,
    out,
    num_tokens,
    rotated_token_stride,
    rotated_head_stride,
    out_token_stride,
    out_head_stride,
    HEAD_DIM: tl.constexpr,
    INNER: tl.constexpr,
    NEGATIVE: tl.constexpr,  # of the transposed matrix
    ROWS: tl.constexpr,
    PDL: tl.constexpr,
):
    """x = diag(s) H.T y / sqrt(D). Grid: (tiles of ROWS tokens, query heads)."""
    if PDL:
        gdc_wait()
    token = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    valid = token < num_tokens
    vectors = rotated + token * rotated_token_stride + head * rotated_head_stride
    tile = load_vectors(vectors, valid, HEAD_DIM, INNER)
    signs_tile = load_signs(signs, ROWS, HEAD_DIM, INNER)
    product = hadamard_product(tile, HEAD_DIM, INNER, NEGATIVE)
    unrotated = product * tl.reshape(signs_tile, product.shape) * (HEAD_DIM**-0.5)
    coordinate = tl.arange(0, product.shape[1])[None, :]
    target = (out + token * out_token_stride + head * out_head_stride)[:, None] + coordinate
    tl.store(target, unrotated.to(out.dtype.element_ty), mask=valid[:, None] & (coordinate < HEAD_DIM))
