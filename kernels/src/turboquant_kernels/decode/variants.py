"""Variants of the decode kernels to compile ahead of time (`turboquant_kernels.aot`)."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import triton

from turboquant_kernels.aot import AotVariant
from turboquant_kernels.decode import finish, hopper, portable
from turboquant_kernels.decode.hopper.kernel import decode_kernel
from turboquant_kernels.decode.hopper.specialization import specialization_of
from turboquant_kernels.decode.merge import merge_kernel, num_warps
from turboquant_kernels.decode.portable.kernel import attend_items_kernel
from turboquant_kernels.decode.portable.launch import constants_of
from turboquant_kernels.decode.schedule import SEARCH_STEPS, fill_kernel
from turboquant_kernels.formats import (
    BLOCK_TOKENS,
    COMPRESSED_FORMATS,
    HEAD_DIMS,
    PAGE_TOKENS,
    TIERS,
    Encoding,
    KVFormat,
)
from turboquant_kernels.raw_block import RawBlocks


def variants() -> Iterator[AotVariant]:
    """The two attention kernels, the schedule, the merge and, with a raw block, what takes its place."""
    yield from _portable_variants()
    yield from _hopper_variants()
    yield from _schedule_variants()
    yield from _merge_variants()
    yield from _finish_variants()


def _portable_variants() -> Iterator[AotVariant]:
    """Every format and head dimension for 4 rows; more rows, and what calls may ask for, for some of them."""
    for fmt in COMPRESSED_FORMATS:
        for head_dim in HEAD_DIMS:
            yield _portable_variant(fmt, head_dim, group=4)
    for tier in TIERS.values():
        fmt = tier.on("cuda").format
        for group in (8, 16):
            for head_dim in (128, 256):
                yield _portable_variant(fmt, head_dim, group)
        yield _portable_variant(fmt, 128, group=4, query_len=4)
        yield _portable_variant(fmt, 128, group=4, soft_cap=True)
        yield _portable_variant(replace(fmt, anchor=True), 128, group=4, block_size=BLOCK_TOKENS)
        yield _portable_variant(tier.format, 128, group=4, block_size=BLOCK_TOKENS, raw_block=True)


def _portable_variant(
    fmt: KVFormat,
    head_dim: int,
    group: int,
    *,
    query_len: int = 1,
    soft_cap: bool = False,
    block_size: int = PAGE_TOKENS,
    raw_block: bool = False,
) -> AotVariant:
    launch = portable.launch_of(fmt, head_dim, group * query_len)
    signature = {
        "items": "*i32",
        "query_codes": "*i8",
        "query_scale": "*fp32",
        "query_half_sum": "*fp32",
        "cache": "*u8",
        "block_table": "*i32",
        "seq_lens": "*i32",
        "key_levels": "*i8",
        "value_levels": "*i8",
        "partial": "*fp32",
        "stats": "*fp32",
        "block_stride": "i32",
        "anchor_stride": "i32",
        "table_stride": "i32",
        "window": "i32",
    }
    optional = {
        "projected_codes": "*i8" if fmt.encoding is Encoding.PROD else None,
        "projected_scale": "*fp32" if fmt.encoding is Encoding.PROD else None,
        "anchor_queries": "*bf16" if fmt.anchor else None,
        "anchor_scale": "fp32" if fmt.anchor else None,
        "anchors": "*bf16" if fmt.anchor else None,
        "query_token_stride": "i32" if fmt.anchor else None,
        "query_head_stride": "i32" if fmt.anchor else None,
        "query_len": "i32" if query_len > 1 else None,
        "soft_cap": "fp32" if soft_cap else None,
    }
    constexprs = constants_of(fmt, head_dim, launch, 8, group, block_size, raw_block)
    absent: dict[str, Any] = {name: None for name, kind in optional.items() if kind is None}
    if query_len == 1:
        absent["query_len"] = 1
    options = "-anchor" * fmt.anchor + "-cap" * soft_cap + "-raw" * raw_block
    return AotVariant(
        name=f"decode-portable-{fmt.name.removeprefix('tq-')}-d{head_dim}-g{group}-q{query_len}{options}",
        kernel=attend_items_kernel,
        signature=signature | {name: kind for name, kind in optional.items() if kind is not None},
        constexprs=constexprs | absent,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
        options={"maxnreg": launch.max_registers},
        divisible=("block_stride",),
    )


def _hopper_variants() -> Iterator[AotVariant]:
    """Variants with 4 and 8 rows, and one of each option.

    The formats of the benchmarks at every head dimension, three more at 128; where a format has another
    launch for few tokens, that one too. With key anchors: the formats of the benchmarks at 128, one of them
    at every head dimension.
    """
    names = ("tq-k4v4", "tq-k3v3", "tq-k8v4", "tq-k5v3", "tq-k4v2", "tq-k6v8", "tq-k2v2")
    for head_dim in hopper.HEAD_DIMS:
        at_128 = head_dim == 128
        for rows in (4, 8):
            for name in names if at_128 else names[:4]:
                fmt = KVFormat.parse(name)
                if hopper.supports(fmt, head_dim, 90, block_stride=16):
                    yield _hopper_variant(fmt, head_dim, rows)
                    short, long = (hopper.launch_of(fmt, head_dim, rows, short) for short in (True, False))
                    if short != long:
                        yield _hopper_variant(fmt, head_dim, rows, "short")
            for name in names[:4] if at_128 else names[:1]:
                yield _hopper_variant(replace(KVFormat.parse(name), anchor=True), head_dim, rows)
    for option in ("split", "window", "cap", "sinks"):
        yield _hopper_variant(KVFormat.parse(names[0]), 128, 4, option)
    for tier in TIERS.values():
        for rows in (4, 8):
            yield _hopper_variant(tier.format, 128, rows, "raw")
        yield _hopper_variant(tier.format, 128, 4, "raw-window")


def _hopper_variant(fmt: KVFormat, head_dim: int, rows: int, option: str = "") -> AotVariant:
    """`option`: "split" for results that another kernel merges, "raw" for such where queries read their own
    block raw, "short", "window", "cap", "sinks" or "raw-window"."""
    split = option in ("split", "raw", "raw-window")
    launch = hopper.launch_of(fmt, head_dim, rows, short=option == "short")
    signature = {
        "partial": "*fp32",
        "stats": "*fp32",
        "queries": "*i8",
        "query_scale": "*fp32",
        "query_half_sum": "*fp32",
        "kv_cache": "*i32",
        "block_table": "*i32",
        "seq_lens": "*i32",
        "items": "*i32",
        "tables": "*i32",
        "output": "*fp32",
        "splits": "*i32",
        "counters": "*i32",
        "num_seqs": "i32",
        "unit": "fp32",
        "block_stride": "i32",
        "block_table_stride": "i32",
        "query_len": "i32",
        "window": "i32",
        "soft_cap": "fp32",
    }
    strides = ["query_token_stride", "query_head_stride"]
    anchored = {"anchor_queries": "*bf16", "anchor_scale": "fp32", **dict.fromkeys(strides, "i32")}
    block_size = BLOCK_TOKENS if fmt.anchor else PAGE_TOKENS
    specialization = specialization_of(
        fmt,
        head_dim,
        launch,
        kv_heads=8,
        group=rows,
        query_len=1,
        block_size=block_size,
        offset_bits=32,
        window=option in ("window", "raw-window"),
        soft_cap=option == "cap",
        fused=not split,
        raw_block=option.startswith("raw"),
    )
    absent = [] if fmt.anchor else [*anchored]
    if split:
        absent += ["output", "splits", "counters"]
    if option != "sinks":
        absent.append("sinks")
    present = signature | anchored | {"sinks": "*bf16"}
    name = f"{fmt.name.removeprefix('tq-')}{'-anchor' * fmt.anchor}-d{head_dim}-r{rows}"
    return AotVariant(
        name=f"decode-hopper-{name}{option and '-'}{option}",
        kernel=decode_kernel,
        signature={argument: kind for argument, kind in present.items() if argument not in absent},
        constexprs=dict.fromkeys(absent) | {"SPEC": specialization},
        num_warps=launch.num_warps,
        options={"maxnreg": launch.max_registers} if launch.max_registers else {},
        divisible=("block_stride", "block_table_stride", *(strides if fmt.anchor else ())),
        capabilities=(90,),
    )


def _schedule_variants() -> Iterator[AotVariant]:
    """Few and many sequences."""
    for num_seqs in (8, 512):
        yield AotVariant(
            name=f"decode-schedule-n{num_seqs}",
            kernel=fill_kernel,
            signature={
                "items": "*i32",
                "splits": "*i32",
                "seq_lens": "*i32",
                "num_seqs": "i32",
                "num_items": "i32",
                "query_len": "i32",
                "window": "i32",
            },
            constexprs={
                "PAGE": PAGE_TOKENS,
                "TILE": 8,
                "FIRST_MULTIPLE": 1,
                "RAW_BLOCK": 0,
                "STEPS": SEARCH_STEPS,
                "BLOCK": num_seqs,
            },
        )


def _merge_variants() -> Iterator[AotVariant]:
    """Every head dimension, for few and for many splits."""
    pointers = {"output": "*fp32", "partial": "*fp32", "stats": "*fp32", "splits": "*i32"}
    for head_dim in HEAD_DIMS:
        for splits in (8, 64):
            yield AotVariant(
                name=f"decode-merge-d{head_dim}-s{splits}",
                kernel=merge_kernel,
                signature=pointers | {"unit": "fp32"},
                constexprs={
                    "sinks": None,
                    "QUERY_LEN": 1,
                    "KV_HEADS": 8,
                    "GROUP": 4,
                    "ROW_GROUPS": 1,
                    "ROWS": 4,
                    "D": head_dim,
                    "WIDTH": triton.next_power_of_2(head_dim),
                    "SPLITS": splits,
                },
                num_warps=num_warps(splits),
            )


def _finish_variants() -> Iterator[AotVariant]:
    """Every head dimension, for few sequences and many, of which a program has 1 and 4 rows; more rows and
    what calls may ask for at 128."""
    for head_dim in HEAD_DIMS:
        for rows in (1, 4):
            yield _finish_variant(head_dim, rows)
    for rows in (2, 8, 16):
        yield _finish_variant(128, rows)
    yield _finish_variant(128, 4, "cap")
    yield _finish_variant(128, 4, "sinks")
    yield _finish_variant(128, 4, "fp16")


def _finish_variant(head_dim: int, rows: int, option: str = "") -> AotVariant:
    """`option`: "cap", "sinks" or "fp16", else bf16."""
    kind = "*fp16" if option == "fp16" else "*bf16"
    raw = RawBlocks(3, torch.float16 if option == "fp16" else torch.bfloat16)
    strides = [f"{what}_{of}_stride" for what in ("query", "out") for of in ("token", "head")]
    signature = {
        "out": kind,
        "partial": "*fp32",
        "stats": "*fp32",
        "splits": "*i32",
        "query": kind,
        "raw": kind,
        "block_table": "*i32",
        "seq_lens": "*i32",
        "signs": "*fp32",
        "unit": "fp32",
        "scale": "fp32",
        "window": "i32",
        **dict.fromkeys([*strides, "block_stride", "table_stride"], "i32"),
    }
    optional = {"sinks": "*bf16", "soft_cap": "fp32"}
    asked = {"sinks": "sinks", "cap": "soft_cap"}.get(option)
    group = max(rows, 4)
    return AotVariant(
        name=f"decode-finish-d{head_dim}-r{rows}{option and '-'}{option}",
        kernel=finish.finish_kernel,
        signature=signature | {name: kind for name, kind in optional.items() if name == asked},
        constexprs=finish.constants_of(raw, head_dim, 8, group, 1, rows, group)
        | {name: None for name in optional if name != asked},
        num_warps=finish.NUM_WARPS,
        num_stages=finish.NUM_STAGES,
        divisible=tuple(strides),
    )
