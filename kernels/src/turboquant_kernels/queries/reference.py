"""Rotated queries as integers, and the un-rotation of what attention makes of them.

Keys are stored rotated, so queries are rotated too: <R q, R k> = <q, k>. Values are stored rotated as well,
and the output is rotated back once for each query head. Between the two, decode multiplies integers: the
level of a key's code is step * (c + 1/2) with c an int8, and a query is cut into two int8 halves.
"""

import math
from dataclasses import dataclass

import torch

from turboquant_kernels.codebook import codebook
from turboquant_kernels.codec import Codec

MAX_QUERY = 32512
"""Largest |q| of an integer query, 127 * 256: its high half is an int8 however the low one rounds it."""


@dataclass(frozen=True)
class QuantizedQueries:
    """Rotated queries as 16-bit integers q = 256 * high + low.

    The logit of a token, in units of log 2 as `exp2` wants it, follows from the int8 c of its key's codes:

        scale * (sum_i q_i * c_i + half_sum) * (the token's key scale)
    """

    codes: torch.Tensor
    """int8 [tokens, q_heads, 2, D]: the high halves, then the low ones, -128..127."""
    scale: torch.Tensor
    """float32 [tokens, q_heads]: step of q times the softmax scale, log2(e) and the step of the key codebook.
    NaN for a query with a NaN or an infinity, whose output must not look sound."""
    half_sum: torch.Tensor
    """float32 [tokens, q_heads]: sum_i q_i / 2, the part of the levels' halves."""
    unrotated: torch.Tensor
    """Any float [tokens, q_heads, D], any strides of tokens and heads: the queries as they came, for key
    anchors and raw keys, which are not rotated."""
    unrotated_scale: float
    """The softmax scale times log2(e)."""


def rotate_queries(codec: Codec, query: torch.Tensor, scale: float) -> QuantizedQueries:
    """Rotates and quantizes queries: any float [tokens, q_heads, D]; scale multiplies <q, k>.

    The step of q is its largest rotated coordinate over `MAX_QUERY`: an error of 2**-16 of that coordinate.
    """
    rotated = codec.rotate(query)
    largest = rotated.abs().amax(-1, keepdim=True)
    finite = largest < torch.inf
    step = torch.where(finite, largest / MAX_QUERY, torch.nan)
    q = torch.where(step > 0, rotated / step, 0.0).round().int()
    high = q + 128 >> 8
    key_step = codebook(codec.fmt.key_code_bits, codec.head_dim).step
    return QuantizedQueries(
        codes=torch.stack((high, q - 256 * high), dim=-2).to(torch.int8),
        scale=step.squeeze(-1) * (scale * math.log2(math.e) * key_step),
        half_sum=0.5 * q.sum(-1).float(),
        unrotated=query,
        unrotated_scale=scale * math.log2(math.e),
    )


def unrotate(codec: Codec, rotated: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Turns rotated attention output, float32 [tokens, q_heads, D], back into `out`, any float dtype."""
    return out.copy_(codec.unrotate(rotated))
