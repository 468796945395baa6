"""Variants of the store kernel to compile ahead of time (`turboquant_kernels.aot`)."""

import dataclasses
from collections.abc import Iterator

from turboquant_kernels.aot import AotVariant
from turboquant_kernels.formats import COMPRESSED_FORMATS, HEAD_DIMS, Encoding
from turboquant_kernels.store.encode_kernel import NUM_WARPS, specialization
from turboquant_kernels.store.kernel import store_kernel


def variants() -> Iterator[AotVariant]:
    """Every format and head dimension, bf16 keys and values."""
    pointers = {"key": "*bf16", "value": "*bf16", "cache": "*u8", "slots": "*i64", "signs": "*fp32"}
    strides = ["block_stride"] + [
        f"{what}_{of}_stride" for what in ("key", "value") for of in ("token", "head")
    ]
    integers = dict.fromkeys(["num_tokens", "kv_heads", "block_size", *strides], "i32")
    # Anchors concern the keys alone: one width of values is enough.
    anchored = [dataclasses.replace(fmt, anchor=True) for fmt in COMPRESSED_FORMATS if fmt.value_bits == 4]
    for fmt in (*COMPRESSED_FORMATS, *anchored):
        for head_dim in HEAD_DIMS:
            prod = fmt.encoding is Encoding.PROD
            yield AotVariant(
                name=f"store-{fmt.name.removeprefix('tq-')}{'-anchor' if fmt.anchor else ''}-d{head_dim}",
                kernel=store_kernel,
                signature={**pointers, **({"projection": "*fp32"} if prod else {}), **integers},
                constexprs={"SPEC": specialization(fmt, head_dim)} | ({} if prod else {"projection": None}),
                num_warps=NUM_WARPS,
                divisible=("block_size", *strides),
            )
