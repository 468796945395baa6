"""Variants of the query kernels to compile ahead of time (`turboquant_kernels.aot`)."""

from collections.abc import Iterator

from turboquant_kernels.aot import AotVariant
from turboquant_kernels.formats import HEAD_DIMS
from turboquant_kernels.queries.kernel import NUM_WARPS, constants_of, rotate_kernel, unrotate_kernel


def variants() -> Iterator[AotVariant]:
    """Every specialization that ships: all head dimensions, bf16 queries and outputs."""
    for head_dim in HEAD_DIMS:
        strides = ["query_token_stride", "query_head_stride"]
        yield AotVariant(
            name=f"rotate-queries-d{head_dim}",
            kernel=rotate_kernel,
            signature={
                "query": "*bf16",
                "signs": "*fp32",
                "codes": "*i8",
                "scale": "*fp32",
                "half_sum": "*fp32",
                "scale_factor": "fp32",
                **dict.fromkeys(["num_tokens", "q_heads", *strides], "i32"),
            },
            constexprs=constants_of(head_dim),
            num_warps=NUM_WARPS,
            divisible=tuple(strides),
        )
        strides = [f"{what}_{of}_stride" for what in ("rotated", "out") for of in ("token", "head")]
        yield AotVariant(
            name=f"unrotate-d{head_dim}",
            kernel=unrotate_kernel,
            signature={
                "rotated": "*fp32",
                "signs": "*fp32",
                "out": "*bf16",
                **dict.fromkeys(["num_tokens", *strides], "i32"),
            },
            constexprs=constants_of(head_dim, inverse=True),
            num_warps=NUM_WARPS,
            divisible=tuple(strides),
        )
