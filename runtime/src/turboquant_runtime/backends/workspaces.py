"""Decode's buffers: one set of memory for all layers and batch sizes, and a schedule for each of them.

Layers run one after the other, so all share the memory of partial results. It is reserved for the largest
batch while vLLM measures memory (`rehearsal`), before captured graphs hold its address. A schedule is small
and lives on: a graph captured for a batch size writes and reads its own.
"""

from dataclasses import replace
from math import prod

import torch

from turboquant_kernels.codec import Codec
from turboquant_kernels.decode.launch import Workspace

_SHARED: dict[tuple[torch.device, torch.dtype, str], torch.Tensor] = {}
"""By device, element type and use: memory that is zero (`counters`) or anything (`partial`, `stats`)."""

_WORKSPACES: dict[tuple[object, ...], Workspace] = {}


def workspace_of(
    codec: Codec,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    query_len: int,
    q_heads: int,
    window: int | None,
) -> Workspace:
    """The workspace of all layers of this shape and window, for block tables of this shape."""
    key = (
        codec,
        kv_cache.device,
        kv_cache.shape[1:],
        kv_cache.stride(0),
        block_table.shape,
        query_len,
        q_heads,
        window,
    )
    if key not in _WORKSPACES:
        own = Workspace.allocate(codec, kv_cache, block_table, query_len, q_heads, window=window)
        _WORKSPACES[key] = replace(
            own,
            partial=_shared("partial", own.partial),
            stats=_shared("stats", own.stats),
            counters=None if own.counters is None else _shared("counters", own.counters),
        )
    return _WORKSPACES[key]


def _shared(use: str, like: torch.Tensor) -> torch.Tensor:
    """Shared memory in the shape of a tensor. Where more is asked than before, older shares keep theirs."""
    key, size = (like.device, like.dtype, use), prod(like.shape)
    if key not in _SHARED or _SHARED[key].numel() < size:
        _SHARED[key] = torch.zeros(size, dtype=like.dtype, device=like.device)
    return _SHARED[key][:size].view(like.shape)
