"""Merges attention over stored tokens, whose results are rotated, into that over raw ones.

    o' <- (exp(l) R.T y + exp(l') o') / (exp(l) + exp(l'))        l' <- log(exp(l) + exp(l'))

with the result y over stored tokens and its log-sum-exp l, and o', l' of what has been merged before.
Everything is float32 between load and store, so that a result is rounded once, when it is written.
"""

import torch
import triton
import triton.language as tl

from turboquant_kernels.codec import Codec
from turboquant_kernels.queries.kernel import NUM_WARPS, constants_of
from turboquant_kernels.rotation_kernel import device_signs, hadamard_product, load_signs, load_vectors


def merge(
    codec: Codec,
    partial: torch.Tensor,
    lse: torch.Tensor,
    rows: slice | torch.Tensor,
    output: torch.Tensor,
    output_lse: torch.Tensor,
) -> None:
    """Merges into output, float [tokens, q_heads, D], and output_lse, float32 [q_heads, tokens], in place.

    partial: float [n, q_heads, D], rotated and over sqrt(D), and lse: float32 [q_heads, n]; rows: those of
    the output, as `pieces.Tile` has them. Heads and coordinates are contiguous.
    """
    tokens, q_heads, head_dim = partial.shape
    constexprs = constants_of(head_dim, inverse=True)
    merge_kernel[triton.cdiv(tokens, constexprs["ROWS"]), q_heads](
        partial,
        lse,
        None if isinstance(rows, slice) else rows,
        device_signs(head_dim, codec.seed, partial.device),
        output,
        output_lse,
        rows.start if isinstance(rows, slice) else 0,
        tokens,
        partial.stride(0),
        lse.stride(0),
        output.stride(0),
        output_lse.stride(0),
        **constexprs,
        num_warps=NUM_WARPS,
    )


@triton.jit(do_not_specialize=["first_row", "tokens", "lse_stride", "output_lse_stride"])
def merge_kernel(
    partial,  # float, tokens `partial_stride` elements apart, of each [q_heads, HEAD_DIM]
    lse,  # float32 [q_heads, tokens]
    rows,  # int32 [tokens], -1 for a token to leave out; None: from first_row on
    signs,  # float32 [HEAD_DIM]
    output,  # float, as `partial`
    output_lse,  # float32 [q_heads, all tokens]
    first_row,
    tokens,
    partial_stride,
    lse_stride,
    output_stride,
    output_lse_stride,
    HEAD_DIM: tl.constexpr,
    INNER: tl.constexpr,
    NEGATIVE: tl.constexpr,  # of the transposed matrix
    ROWS: tl.constexpr,
):
    """Grid: (tiles of ROWS tokens, query heads)."""
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    head = tl.program_id(1).to(tl.int64)
    valid = token < tokens
    if rows is None:
        row = (first_row + token).to(tl.int64)
    else:
        row = tl.load(rows + token, mask=valid, other=-1).to(tl.int64)
        valid = row >= 0
    vectors = partial + token.to(tl.int64) * partial_stride + head * HEAD_DIM
    product = hadamard_product(load_vectors(vectors, valid, HEAD_DIM, INNER), HEAD_DIM, INNER, NEGATIVE)
    result = product * tl.reshape(load_signs(signs, ROWS, HEAD_DIM, INNER), product.shape)

    log = tl.load(lse + head * lse_stride + token, mask=valid, other=0.0)
    log_before = tl.load(output_lse + head * output_lse_stride + row, mask=valid, other=0.0)
    larger = tl.maximum(log, log_before)
    weight, weight_before = tl.exp(log - larger), tl.exp(log_before - larger)
    total = weight + weight_before
    tl.store(output_lse + head * output_lse_stride + row, larger + tl.log(total), mask=valid)
    coordinate = tl.arange(0, product.shape[1])[None, :]
    target = (output + row * output_stride + head * HEAD_DIM)[:, None] + coordinate
    mask = valid[:, None] & (coordinate < HEAD_DIM)
    before = tl.load(target, mask=mask, other=0.0).to(tl.float32)
    merged = (result * weight[:, None] + before * weight_before[:, None]) / total[:, None]
    tl.store(target, merged.to(output.dtype.element_ty), mask=mask)
