"""What kernels of both languages need for logits in base 2 and their running maximum."""

import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
"""From natural logarithms to those in base 2."""

NOTHING = tl.constexpr(-1e30)
"""Reference of a row that has seen no token; finite, so that no difference of two is NaN."""

SOMETHING = tl.constexpr(-1e29)
"""Larger than `NOTHING`, and smaller than the reference of any row that has seen a token."""
