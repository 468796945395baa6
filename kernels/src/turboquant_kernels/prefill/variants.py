"""Variants of the prefill kernels to compile ahead of time (`turboquant_kernels.aot`)."""

from collections.abc import Iterator

import torch
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
from turboquant_kernels.prefill.begun import NUM_WARPS as BEGUN_WARPS
from turboquant_kernels.prefill.begun import begun_constexprs, begun_kernel
from turboquant_kernels.prefill.expand import expand_constexprs, expand_kernel, num_warps
from turboquant_kernels.prefill.merge import merge_kernel as unrotate_merge_kernel
from turboquant_kernels.queries.kernel import NUM_WARPS as UNROTATE_WARPS
from turboquant_kernels.queries.kernel import constants_of
from turboquant_kernels.raw_block import RawBlocks


def variants() -> Iterator[AotVariant]:
    """Every format and head dimension to bf16."""
    yield from expand_variants()
    yield from merge_variants()
    yield from unrotate_merge_variants()
    yield from begun_variants()


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


def unrotate_merge_variants() -> Iterator[AotVariant]:
    """bf16: rows that are neighbours or not, and results of several tiles, which are added up in float32."""
    strides = ["partial_stride", "output_stride"]
    for head_dim in HEAD_DIMS:
        for name, rows, output in (("", None, "*bf16"), ("-rows", "*i32", "*bf16"), ("-cut", None, "*fp32")):
            yield AotVariant(
                name=f"prefill-unrotate-merge-d{head_dim}{name}",
                kernel=unrotate_merge_kernel,
                signature={
                    "partial": "*bf16",
                    "lse": "*fp32",
                    **({"rows": rows} if rows else {}),
                    "signs": "*fp32",
                    "output": output,
                    "output_lse": "*fp32",
                    **dict.fromkeys(
                        ["first_row", "tokens", "lse_stride", "output_lse_stride", *strides], "i32"
                    ),
                },
                constexprs=constants_of(head_dim, inverse=True) | ({} if rows else {"rows": None}),
                num_warps=UNROTATE_WARPS,
                divisible=tuple(strides),
            )


def begun_variants() -> Iterator[AotVariant]:
    """bf16 of 8 heads beside a cache of 3 bits."""
    strides = [f"{what}_{of}_stride" for what in ("key", "value") for of in ("token", "head")]
    for head_dim in HEAD_DIMS:
        raw = RawBlocks(KVFormat(3, 3).raw_blocks(head_dim, torch.bfloat16.itemsize), torch.bfloat16)
        yield AotVariant(
            name=f"prefill-begun-d{head_dim}",
            kernel=begun_kernel,
            signature={
                **dict.fromkeys(["pieces", "query_starts", "key_starts", "block_table"], "*i32"),
                **dict.fromkeys(["before", "key", "value", "own_key", "own_value"], "*bf16"),
                **dict.fromkeys(["block_stride", "table_stride", *strides], "i32"),
            },
            constexprs=begun_constexprs(raw, 8, head_dim),
            num_warps=BEGUN_WARPS,
            divisible=("block_stride", *strides),
        )
