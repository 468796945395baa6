"""Launches of the Hopper kernel: which caches it reads, how it is launched, what it is specialized to."""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from typing import Any

import torch
import triton

from turboquant_kernels.aot import AotVariant
from turboquant_kernels.codebook import codebook
from turboquant_kernels.codec import Codec
from turboquant_kernels.decode.hopper.fragments import WORD_SHIFT, fragment, level_table, table_registers
from turboquant_kernels.decode.hopper.kernel import decode_kernel
from turboquant_kernels.decode.hopper.ring import ring_rows
from turboquant_kernels.decode.hopper.specialization import Specialization, blocks_of
from turboquant_kernels.decode.hopper.values import WEIGHT_ONE
from turboquant_kernels.formats import ANCHOR_TOKENS, PAGE_TOKENS, Encoding, KVFormat
from turboquant_kernels.packing import PLANES
from turboquant_kernels.queries.reference import QuantizedQueries

HEAD_DIMS = (64, 80, 96, 128, 192, 256)
"""Head dimensions of this kernel."""


@dataclass(frozen=True)
class Launch:
    """How the kernel is launched for one format, head dimension and number of rows."""

    rows: int
    """Query heads times query tokens that a program holds: 4 or 8."""
    pages: int
    """Pages of a warp's tile."""
    programs_per_sm: int
    """Programs that fit on a multiprocessor, for the number of splits."""
    value_block: int
    """Coordinates of values that are unpacked at once, 64 or 128: fewer take fewer registers."""
    shared_queries: bool
    """Whether queries stand in shared memory, where their registers are wanted for other things."""
    evict_first: bool
    """Whether the L2 cache drops pages before what will be read again."""
    max_registers: int | None
    """Registers of a thread at most."""
    num_warps: int = 4

    @property
    def tile_tokens(self) -> int:
        """Tokens that a program reads at a time."""
        return self.num_warps * self.pages * PAGE_TOKENS

    def row_groups(self, rows: int) -> int:
        """Programs that share the rows of one KV head."""
        return triton.cdiv(rows, self.rows)


def supports(fmt: KVFormat, head_dim: int, capability: int, block_stride: int) -> bool:
    """Whether this kernel reads a cache of this format, with blocks `block_stride` bytes apart."""
    known = fmt.encoding is Encoding.MSE and head_dim in HEAD_DIMS
    if head_dim == 80 and (PLANES[fmt.key_bits][-1] == 1 or fmt.value_bits == 3):
        return False  # rows of ten bytes in an order of their own, and slots that are no whole words
    return known and capability == 90 and block_stride % 16 == 0


def launch_of(fmt: KVFormat, head_dim: int, rows: int, short: bool = False) -> Launch:
    """The tuned launch for `rows` rows (query heads of a KV head times query tokens); `short` where a program
    has few tokens to read."""
    held = 4 if rows <= 4 else 8
    head_dim = 128 if head_dim in (80, 96) else head_dim
    asked = {
        "head_dim": head_dim,
        "rows": held,
        "key_bits": fmt.key_bits,
        "value_bits": fmt.value_bits,
        "short": short,
    }
    for rule in _rules():
        if all(asked[name] in values for name, values in rule["where"].items()):
            return Launch(rows=held, **rule["launch"])
    raise AssertionError("the last rule has no conditions")


@cache
def _rules() -> list[dict[str, Any]]:
    """Launches as tuned on the GPUs that the file names; the first rule whose conditions hold is taken."""
    return json.loads(files("turboquant_kernels").joinpath("tuning/hopper_decode.json").read_text())["rules"]


@dataclass(frozen=True)
class Merged:
    """Where the kernel merges splits itself, and what it needs for it."""

    attended: torch.Tensor
    """float32 [num_seqs * query_len, q_heads, D]: the result."""
    splits: torch.Tensor
    """`schedule.Schedule.splits`."""
    counters: torch.Tensor
    """int32 [num_seqs, kv_heads, row_groups], zero before and after a launch: splits that are done."""
    sinks: torch.Tensor | None


def attend_items(
    codec: Codec,
    launch: Launch,
    queries: QuantizedQueries,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    items: torch.Tensor,
    partial: torch.Tensor,
    stats: torch.Tensor,
    *,
    query_len: int,
    window: int | None = None,
    soft_cap: float | None = None,
    merged: Merged | None = None,
    wide_offsets: bool | None = None,
) -> None:
    """Fills the partial results of the items of a schedule; arguments are those of `portable.attend_items`.

    Attended values come in units of `value_unit`. With `merged` splits are merged in the same launch.
    `wide_offsets`: whether offsets in the cache have 64 bits; by default where 32 do not reach its end.
    """
    _, block_size, kv_heads, _ = kv_cache.shape
    group = queries.codes.shape[1] // kv_heads
    words = kv_cache.view(torch.int32)
    specialization = _specialization(
        codec.fmt,
        codec.head_dim,
        launch,
        kv_heads,
        group,
        query_len,
        block_size,
        64 if (_needs_wide_offsets(words) if wide_offsets is None else wide_offsets) else 32,
        window is not None,
        bool(soft_cap),
        merged is not None,
    )
    anchored: tuple[Any, ...] = (None,) * 4
    if codec.fmt.anchor:
        anchored = (queries.unrotated, queries.unrotated_scale, *queries.unrotated.stride()[:2])
    decode_kernel[len(items), kv_heads * launch.row_groups(group * query_len)](
        partial,
        stats,
        queries.codes,
        queries.scale,
        queries.half_sum,
        words,
        block_table,
        seq_lens,
        items,
        _device_tables(codec.fmt, codec.head_dim, kv_cache.device),
        merged and merged.attended,
        merged and merged.splits,
        merged and merged.counters,
        merged and merged.sinks,
        len(seq_lens),
        value_unit(codec),
        words.stride(0),
        block_table.stride(0),
        query_len,
        window or 0,
        (soft_cap or 1.0) * math.log2(math.e),
        *anchored,
        SPEC=specialization,
        num_warps=launch.num_warps,
        **({"maxnreg": launch.max_registers} if launch.max_registers else {}),
    )


def value_unit(codec: Codec) -> float:
    """What the sums of this kernel count in: a step of the value codebook times the unit of a weight."""
    return codebook(codec.fmt.value_bits, codec.head_dim).step / WEIGHT_ONE.value


def variants() -> Iterator[AotVariant]:
    """Formats of the benchmarks at every head dimension, a few others at 128, one and more rows, and with a
    launch for few tokens of their own; with key anchors those of the benchmarks at 128, and one at every
    head dimension; one with each option."""
    names = ("tq-k4v4", "tq-k3v3", "tq-k8v4", "tq-k5v3", "tq-k4v2", "tq-k6v8", "tq-k2v2")
    for head_dim in HEAD_DIMS:
        at_128 = head_dim == 128
        for rows in (4, 8):
            for name in names if at_128 else names[:4]:
                fmt = KVFormat.parse(name)
                if supports(fmt, head_dim, 90, block_stride=16):
                    yield _variant(fmt, head_dim, rows)
                    if launch_of(fmt, head_dim, rows, short=True) != launch_of(fmt, head_dim, rows):
                        yield _variant(fmt, head_dim, rows, "short")
            for name in names[:4] if at_128 else names[:1]:
                yield _variant(replace(KVFormat.parse(name), anchor=True), head_dim, rows)
    for option in ("split", "window", "cap", "sinks"):
        yield _variant(KVFormat.parse(names[0]), 128, 4, option)


def _variant(fmt: KVFormat, head_dim: int, rows: int, option: str = "") -> AotVariant:
    """`option`: "split" for results that another kernel merges, "short", "window", "cap" or "sinks"."""
    launch = launch_of(fmt, head_dim, rows, short=option == "short")
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
        "attended_out": "*fp32",
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
    block_size = ANCHOR_TOKENS if fmt.anchor else PAGE_TOKENS
    specialization = _specialization(
        fmt,
        head_dim,
        launch,
        kv_heads=8,
        group=rows,
        query_len=1,
        block_size=block_size,
        offset_bits=32,
        window=option == "window",
        soft_cap=option == "cap",
        fused=option != "split",
    )
    absent = [] if fmt.anchor else [*anchored]
    if option == "split":
        absent += ["attended_out", "splits", "counters"]
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


@cache
def _specialization(
    fmt: KVFormat,
    head_dim: int,
    launch: Launch,
    kv_heads: int,
    group: int,
    query_len: int,
    block_size: int,
    offset_bits: int,
    window: bool,
    soft_cap: bool,
    fused: bool,
) -> Specialization:
    """The compiled kernel that a launch takes."""

    def text(bits: int, words: int) -> tuple[str, str]:
        piece = fragment(bits, words, level_table(bits, head_dim))
        return piece.text, piece.constraints

    key_blocks = blocks_of(head_dim, 128)
    value_block = _value_block(fmt, head_dim, launch)
    values_at = PAGE_TOKENS * head_dim * fmt.key_bits // 32
    page_words = PAGE_TOKENS * fmt.slot_bytes(head_dim) // 4
    return Specialization(
        D=head_dim,
        KEY_BITS=fmt.key_bits,
        VALUE_BITS=fmt.value_bits,
        PAGES_OF_BLOCK=block_size // PAGE_TOKENS,
        OFFSET_BITS=offset_bits,
        ANCHOR=fmt.anchor,
        KV_HEADS=kv_heads,
        GROUP=group,
        ROW_GROUPS=launch.row_groups(group * query_len),
        WINDOW=window,
        SOFT_CAP=soft_cap,
        FUSED=fused,
        R=launch.rows,
        W=launch.num_warps,
        P=launch.pages,
        VALUE_BLOCK=value_block,
        SHARED_QUERIES=launch.shared_queries,
        EVICT_FIRST=launch.evict_first,
        KEY_BLOCKS=key_blocks,
        VALUE_BLOCKS=blocks_of(head_dim, value_block),
        PIECES=1 if fmt.value_bits == 8 else 2,
        # Each block of keys has its own number of words in a lane. Values of 3 bits take words in pairs.
        KEY_ASM=tuple(text(fmt.key_bits, block * PLANES[fmt.key_bits][0] // 128) for block in key_blocks),
        VALUE_ASM=text(fmt.value_bits, 2 if fmt.value_bits == 3 else 1),
        KEY_REGISTERS=len(_table_words(fmt.key_bits, head_dim)),
        VALUE_REGISTERS=len(_table_words(fmt.value_bits, head_dim)),
        VALUES_AT=values_at,
        SCALES_AT=page_words - PAGE_TOKENS * fmt.scale_bytes // 4,
        PAGE_WORDS=page_words,
        RING_ROWS=ring_rows(launch.num_warps, launch.pages, page_words, 256 * launch.rows).value,
        QUERY_ROWS=len(key_blocks) if launch.shared_queries else 0,
    )


def _value_block(fmt: KVFormat, head_dim: int, launch: Launch) -> int:
    """Coordinates of values that are unpacked at once: fewer where a last block, rounded up, would reach
    beyond the page's end. Behind the last values, four tokens in each byte column, there are scales."""
    beyond = sum(blocks_of(head_dim, launch.value_block)) - head_dim
    fits = 4 * beyond * PLANES[fmt.value_bits][-1] // 8 <= PAGE_TOKENS * fmt.scale_bytes
    return launch.value_block if fits else 64


def _table_words(bits: int, head_dim: int) -> list[int]:
    """The words that a fragment takes from registers: those of its table, then `WORD_SHIFT`."""
    table = level_table(bits, head_dim)
    return [*(table[i] for i in table_registers(bits)), WORD_SHIFT]


@cache
def _device_tables(fmt: KVFormat, head_dim: int, device: torch.device) -> torch.Tensor:
    """int32 [words, 32]: the words for keys and for values, a copy for each lane."""
    words = _table_words(fmt.key_bits, head_dim) + _table_words(fmt.value_bits, head_dim)
    return torch.tensor(words, dtype=torch.int32)[:, None].repeat(1, 32).to(device)


def _needs_wide_offsets(words: torch.Tensor) -> bool:
    """64-bit offsets cost instructions; 32-bit ones of 4-byte words reach 8 GiB."""
    return words.shape[0] * words.stride(0) >= 1 << 31
