"""What kernels need for logits in base 2 and their running maximum."""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
"""From natural logarithms to those in base 2."""

NOTHING = tl.constexpr(-1e30)
"""Reference of a row that has seen no token; finite, so that no difference of two is NaN."""

SOMETHING = tl.constexpr(-1e29)
"""Larger than `NOTHING`, and smaller than the reference of any row that has seen a token."""


@triton.jit
def soft_capped(logit, cap):
    """cap * tanh(logit / cap), all in base 2."""
    # exp2 overflows to infinity, where the fraction is 0 and tanh 1.
    return cap * (1 - 2 / (tl.exp2(logit * (2 * LOG2_E / cap)) + 1))
