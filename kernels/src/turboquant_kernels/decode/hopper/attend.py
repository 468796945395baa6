"""The launch of the Hopper kernel, from tensors to its arguments."""

import math
from dataclasses import dataclass
from typing import Any

import torch

from turboquant_kernels.codec import Codec
from turboquant_kernels.decode.hopper.kernel import decode_kernel
from turboquant_kernels.decode.hopper.launch import Launch, value_unit
from turboquant_kernels.decode.hopper.level_tables import device_tables
from turboquant_kernels.decode.hopper.specialization import specialization_of
from turboquant_kernels.queries.reference import QuantizedQueries


@dataclass(frozen=True)
class Merged:
    """Where the kernel merges splits itself, and what it needs for it."""

    output: torch.Tensor
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
    raw_block: bool = False,
    merged: Merged | None = None,
    wide_offsets: bool | None = None,
) -> None:
    """Fills the partial results of the items of a schedule; arguments are those of `portable.attend_items`.

    Sums of values come in units of `value_unit`. With `merged` splits are merged in the same launch.
    `wide_offsets`: whether offsets in the cache have 64 bits; by default where 32 do not reach its end.
    """
    _, block_size, kv_heads, _ = kv_cache.shape
    group = queries.codes.shape[1] // kv_heads
    words = kv_cache.view(torch.int32)
    specialization = specialization_of(
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
        raw_block,
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
        device_tables(codec.fmt, codec.head_dim, kv_cache.device),
        merged and merged.output,
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


def _needs_wide_offsets(words: torch.Tensor) -> bool:
    """64-bit offsets cost instructions; 32-bit ones of 4-byte words reach 8 GiB."""
    return words.shape[0] * words.stride(0) >= 1 << 31
