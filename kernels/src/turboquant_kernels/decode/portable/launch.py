"""Launches of the portable kernel: how it is launched, what it is specialized to, and its extra operands."""

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl

from turboquant_kernels.codebook import codebook
from turboquant_kernels.codec import Codec
from turboquant_kernels.decode.portable.kernel import attend_items_kernel
from turboquant_kernels.formats import (
    Encoding,
    KVFormat,
)
from turboquant_kernels.packing import anchors_of, pages_of
from turboquant_kernels.queries.reference import MAX_QUERY, QuantizedQueries
from turboquant_kernels.rotation import device_projection
from turboquant_kernels.unpack import level_table, page_constants

MAX_ROWS = 16
"""Rows of a program; more (many query tokens) are divided among programs, which each read the tokens."""


@dataclass(frozen=True)
class Launch:
    """How the kernel is launched for one format, head dimension and number of rows."""

    rows: int
    """Query heads times query tokens that a program holds, a power of two."""
    tile_tokens: int
    """Tokens that a program reads at a time."""
    num_warps: int
    num_stages: int
    programs_per_sm: int
    """Programs that fit on a multiprocessor, for the number of splits."""
    max_registers: int
    """Registers of a thread at most, so that they do fit."""

    def row_groups(self, rows: int) -> int:
        """Programs that share the rows of one KV head."""
        return triton.cdiv(rows, self.rows)


def launch_of(fmt: KVFormat, head_dim: int, rows: int) -> Launch:
    """The launch for `rows` rows (query heads of a KV head times query tokens).

    One warp for 128 coordinates: it waits for no other, and 16 of them hide the latency of memory (H200, 8 x
    32,768 tokens, D = 128, 4 query heads a KV head). Programs are what the registers hold. Formats that take
    more steps to unpack have more registers: with 128 they spill 100 to 700 bytes (Triton 3.7, compiled and
    not timed).
    """
    held = min(max(triton.next_power_of_2(rows), 4), MAX_ROWS)
    num_warps = 1 if head_dim <= 128 else 2
    warps_per_sm, max_registers = {4: (16, 128), 8: (12, 168), 16: (8, 255)}[held]
    if held == 4 and (fmt.encoding is Encoding.PROD or (head_dim == 80 and fmt.key_bits in (5, 6))):
        warps_per_sm, max_registers = 12, 168
    return Launch(
        rows=held,
        tile_tokens=32,
        num_warps=num_warps,
        num_stages=2,
        programs_per_sm=warps_per_sm // num_warps,
        max_registers=max_registers,
    )


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
    raw_block: bool = False,
) -> None:
    """Fills the partial results of the items of a schedule.

    queries: [num_seqs * query_len, q_heads, ...]. kv_cache, block_table, seq_lens: as
    `decode.reference.paged_attention` takes them, the last two int32. items: `Schedule.items`, in units of
    whole tiles of `launch`; with key anchors the first page of a sequence is one where an anchor begins.
    partial: float32 [items, kv_heads, row_groups, rows, D], sums of values in `value_unit` relative to
    2**maximum; stats: float32 [items, kv_heads, row_groups, rows, 2], the largest logit (base 2) and the sum
    of weights. Entries of items without work stay as they are. raw_block: a query sees the stored tokens
    before its own block, in place of all up to its own (`turboquant_kernels.raw_block`).

    Raises ValueError where the cache's shape is not that of the codec's format.
    """
    _, block_size, kv_heads, _ = kv_cache.shape
    fmt, head_dim, device = codec.fmt, codec.head_dim, kv_cache.device
    pages_of(kv_cache, codec.layout)
    group = queries.codes.shape[1] // kv_heads
    projected = _project(codec, queries) if fmt.encoding is Encoding.PROD else (None, None)
    anchors = anchors_of(kv_cache, fmt, head_dim) if fmt.anchor else None
    grid = (len(items), kv_heads, launch.row_groups(group * query_len))
    attend_items_kernel[grid](
        items,
        queries.codes,
        queries.scale,
        queries.half_sum,
        *projected,
        queries.unrotated if fmt.anchor else None,
        queries.unrotated_scale if fmt.anchor else None,
        anchors,
        kv_cache,
        block_table,
        seq_lens,
        level_table(fmt.key_code_bits, head_dim, device),
        level_table(fmt.value_bits, head_dim, device),
        partial,
        stats,
        kv_cache.stride(0),
        anchors.stride(0) if anchors is not None else 0,
        *(queries.unrotated.stride()[:2] if fmt.anchor else (None, None)),
        block_table.stride(0),
        query_len,
        window or 0,
        soft_cap * math.log2(math.e) if soft_cap else None,
        **constants_of(fmt, head_dim, launch, kv_heads, group, block_size, raw_block),
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
        maxnreg=launch.max_registers,
    )


def value_unit(codec: Codec) -> float:
    """What the sums of this kernel count in: a step of the value codebook."""
    return codebook(codec.fmt.value_bits, codec.head_dim).step


@cache
def constants_of(
    fmt: KVFormat,
    head_dim: int,
    launch: Launch,
    kv_heads: int,
    group: int,
    block_size: int,
    raw_block: bool = False,
) -> dict[str, Any]:
    """What the kernel is specialized to."""
    return page_constants(fmt, head_dim, kv_heads, block_size) | {
        "GROUP": group,
        "ROWS": launch.rows,
        "TILE": launch.tile_tokens,
        "RAW_BLOCK": raw_block,
        # The interpreter's matrix product of bf16 is wrong.
        "WEIGHT": tl.float32 if triton.knobs.runtime.interpret else tl.bfloat16,
    }


def _whole(codec: Codec, queries: QuantizedQueries) -> torch.Tensor:
    """The rotated queries, in units of a logit in base 2 to a key: float32 [tokens, q_heads, D]."""
    high, low = queries.codes.float().unbind(-2)
    key_step = codebook(codec.fmt.key_code_bits, codec.head_dim).step
    return (256 * high + low) * (queries.scale / key_step)[..., None]


def _project(codec: Codec, queries: QuantizedQueries) -> tuple[torch.Tensor, torch.Tensor]:
    """PROD: S q, as int8 halves [tokens, q_heads, 2, D] and their unit, float32 [tokens, q_heads].

    A key's residual is norm * sqrt(pi / 2) / D * S.T signs (paper, algorithm 2), so its part of the logit is
    the sum of the signs times S q, times norm and that unit.
    """
    projection = device_projection(codec.head_dim, codec.seed, torch.float32, queries.codes.device)
    projected = _whole(codec, queries) @ projection.T
    unit = (projected.abs().amax(-1) / MAX_QUERY).clamp_min(torch.finfo(torch.float32).tiny)
    rounded = (projected / unit[..., None]).round()
    high = ((rounded + 128) / 256).floor()
    codes = torch.stack((high, rounded - 256 * high), dim=-2).to(torch.int8)
    return codes, unit * (math.sqrt(math.pi / 2) / codec.head_dim)
