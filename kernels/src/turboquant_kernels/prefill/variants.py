"""Variants of the prefill kernels to compile ahead of time (`turboquant_kernels.aot`)."""

from collections.abc import Iterator

import triton

from turboquant_kernels.aot import AotVariant
from turboquant_kernels.formats import (
    BLOCK_TOKENS,
    COMPRESSED_FORMATS,
    HEAD_DIMS,
    PAGE_TOKENS,
    Encoding,
    KVFormat,
)
from turboquant_kernels.prefill.attention import merge_kernel
from turboquant_kernels.prefill.expand import expand_constexprs, expand_kernel, num_warps


def variants() -> Iterator[AotVariant]:
    """Every format and head dimension to bf16."""
    yield from expand_variants()
    yield from merge_variants()


def expand_variants() -> Iterator[AotVariant]:
    """Every format and head dimension to bf16 keys and values of 8 heads."""
    signature = {
        "items": "*i32",
        "cache": "*u8",
        "block_table": "*i32",
        "key_levels": "*i8",
        "value_levels": "*i8",
        "keys": "*bf16",
        "values": "*bf16",
        "key_factor": "fp32",
        "value_factor": "fp32",
        "block_stride": "i32",
        "anchor_stride": "i32",
        "table_stride": "i32",
    }
    for fmt in (*COMPRESSED_FORMATS, KVFormat(5, 3, anchor=True)):
        optional = {
            "projection": "*fp16" if fmt.encoding is Encoding.PROD else None,
            "anchors": "*bf16" if fmt.anchor else None,
            "hadamard": "*bf16" if fmt.anchor else None,
        }
        block_size = BLOCK_TOKENS if fmt.anchor else PAGE_TOKENS
        for head_dim in HEAD_DIMS:
            yield AotVariant(
                name=f"prefill-expand-{fmt.name.removeprefix('tq-')}-d{head_dim}{'-anchor' * fmt.anchor}",
                kernel=expand_kernel,
                signature=signature | {name: kind for name, kind in optional.items() if kind},
                constexprs=expand_constexprs(fmt, head_dim, 8, block_size)
                | {name: None for name, kind in optional.items() if not kind},
                num_warps=num_warps(head_dim),
                divisible=("block_stride",),
            )


def merge_variants() -> Iterator[AotVariant]:
    """bf16 of 32 query heads: in the middle of a context and at its end, with sinks."""
    signature = {
        "partial": "*bf16",
        "lse": "*fp32",
        "earlier": "*fp32",
        "earlier_lse": "*fp32",
        "partial_stride": "i32",
        "lse_stride": "i32",
    }
    ends = {"sinks": "*fp32", "output": "*bf16"}
    for head_dim in HEAD_DIMS:
        for last in (False, True):
            yield AotVariant(
                name=f"prefill-merge-d{head_dim}{'-last' * last}",
                kernel=merge_kernel,
                signature=signature | (ends if last else {}),
                constexprs={
                    "Q_HEADS": 32,
                    "HEAD_DIM": head_dim,
                    "WIDTH": triton.next_power_of_2(head_dim),
                    **({} if last else dict.fromkeys(ends)),
                },
                num_warps=1,
            )
