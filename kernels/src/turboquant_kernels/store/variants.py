"""Variants of the store kernels to compile ahead of time (`turboquant_kernels.aot`)."""

import dataclasses
from collections.abc import Iterator

import torch

from turboquant_kernels.aot import AotVariant
from turboquant_kernels.formats import COMPRESSED_FORMATS, HEAD_DIMS, TIERS, Encoding, KVFormat
from turboquant_kernels.raw_block import RawBlocks
from turboquant_kernels.store.block_kernel import raw_places, store_blocks_kernel
from turboquant_kernels.store.encode_kernel import NUM_WARPS, specialization
from turboquant_kernels.store.kernel import store_kernel

_STRIDES = ("block_stride", *(f"{what}_{of}_stride" for what in ("key", "value") for of in ("token", "head")))
_POINTERS = {"key": "*bf16", "value": "*bf16", "cache": "*u8", "signs": "*fp32"}


def variants() -> Iterator[AotVariant]:
    """bf16 keys and values."""
    yield from token_variants()
    yield from block_variants()


def token_variants() -> Iterator[AotVariant]:
    """Every format and head dimension."""
    integers = dict.fromkeys(["num_tokens", "kv_heads", "block_size", *_STRIDES], "i32")
    # Anchors concern the keys alone: one width of values is enough.
    anchored = [dataclasses.replace(fmt, anchor=True) for fmt in COMPRESSED_FORMATS if fmt.value_bits == 4]
    for fmt in (*COMPRESSED_FORMATS, *anchored):
        for head_dim in HEAD_DIMS:
            pointers, constexprs = _of_format(fmt, head_dim)
            yield AotVariant(
                name=f"store-{_name(fmt, head_dim)}",
                kernel=store_kernel,
                signature={**pointers, "slots": "*i64", **integers},
                constexprs=constexprs,
                num_warps=NUM_WARPS,
                divisible=("block_size", *_STRIDES),
            )


def block_variants() -> Iterator[AotVariant]:
    """Decodes in the formats of tiers, without anchors and in prod; chunks of prompts, of which little is
    their own, in one format."""
    integers = dict.fromkeys(["kv_heads", "table_stride", *_STRIDES], "i32")
    decodes = {"query_start_loc": "*i32", "seq_lens": "*i32", "slots": "*i64"}
    chunks = {"items": "*i32"}
    balanced = TIERS["balanced"].format
    formats = (*(tier.format for tier in TIERS.values()), KVFormat(4, 4), KVFormat(4, 4, Encoding.PROD))
    for name, own, others, of in (
        ("decodes", decodes, chunks, formats),
        ("chunks", chunks, decodes, (balanced,)),
    ):
        for fmt in of:
            for head_dim in HEAD_DIMS:
                pointers, constexprs = _of_format(fmt, head_dim)
                yield AotVariant(
                    name=f"store-{name}-{_name(fmt, head_dim)}",
                    kernel=store_blocks_kernel,
                    signature={**pointers, "block_table": "*i32", **own, **integers},
                    constexprs=constexprs
                    | dict.fromkeys(others)
                    | {"RAW": raw_places(RawBlocks(fmt.raw_blocks(head_dim, 2), torch.bfloat16), head_dim)},
                    num_warps=NUM_WARPS,
                    divisible=_STRIDES,
                )


def _of_format(fmt: KVFormat, head_dim: int) -> tuple[dict[str, str], dict[str, object]]:
    """Pointers and constexprs of both kernels."""
    constexprs = {"SPEC": specialization(fmt, head_dim)}
    if fmt.encoding is Encoding.PROD:
        return {**_POINTERS, "projection": "*fp32"}, constexprs
    return _POINTERS, {**constexprs, "projection": None}


def _name(fmt: KVFormat, head_dim: int) -> str:
    return f"{fmt.name.removeprefix('tq-')}{'-anchor' * fmt.anchor}-d{head_dim}"
