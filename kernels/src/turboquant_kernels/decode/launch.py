"""Decode attention from queries to output: which kernel reads a cache, on which buffers.

    query -> queries.rotate_queries -> [schedule -> hopper or portable -> merge] -> queries.unrotate -> output

The part in brackets is `attend`. Buffers follow from shapes alone and lengths are read on the device, so a
call can be captured in a CUDA graph. A workspace serves all layers of one shape in turn; its schedule is
made once for those that share lengths and window.
"""

from dataclasses import dataclass
from typing import Literal

import torch

from turboquant_kernels.codec import Codec
from turboquant_kernels.decode import hopper, portable
from turboquant_kernels.decode.merge import merge
from turboquant_kernels.decode.schedule import Schedule, fill
from turboquant_kernels.formats import ANCHOR_TOKENS, PAGE_TOKENS
from turboquant_kernels.packing import anchors_of, pages_of
from turboquant_kernels.queries.kernel import rotate_queries, unrotate
from turboquant_kernels.queries.reference import QuantizedQueries

Path = Literal["hopper", "portable"]

_SHORT_TILES = 5
"""Tiles of a program up to which launches with smaller ones were faster, on an H200."""
_FUSED_SPLITS = 2
"""Splits of a sequence, on average, up to which its last program merges them: where most sequences have one
split, a launch that merges costs more than it saves."""


def path_of(codec: Codec, kv_cache: torch.Tensor) -> Path:
    """The faster kernel of those that read this cache on its device."""
    if kv_cache.is_cuda:
        major, minor = torch.cuda.get_device_capability(kv_cache.device)
        if hopper.supports(codec.fmt, codec.head_dim, 10 * major + minor, kv_cache.stride(0)):
            return "hopper"
    return "portable"


@dataclass(frozen=True)
class Workspace:
    """Buffers of decode attention for one shape: kernel, batch, heads."""

    path: Path
    launch: hopper.Launch | portable.Launch
    query_len: int
    first_multiple: int
    """What the first page of a split is a multiple of: the pages that share a key anchor, else 1."""
    schedule: Schedule
    partial: torch.Tensor
    """float32 [items, kv_heads, row_groups, rows, D]: sums of values of the splits."""
    stats: torch.Tensor
    """float32 [items, kv_heads, row_groups, rows, 2]: largest logit and sum of weights of each."""
    counters: torch.Tensor | None
    """int32 [num_seqs, kv_heads, row_groups], zeros: splits that are done, where the kernel merges them
    itself. None where `merge` does."""

    @classmethod
    def allocate(
        cls,
        codec: Codec,
        kv_cache: torch.Tensor,
        block_table: torch.Tensor,
        query_len: int,
        q_heads: int,
        *,
        window: int | None = None,
        path: Path | None = None,
    ) -> "Workspace":
        """For the sequences of a block table, of `query_len` query tokens, however long they come to be.

        Shapes alone count, those of `paged_decode`. `path` overrides the choice of kernel.

        Raises ValueError where the cache's shape is not that of the codec's format, or its blocks have no
        room for key anchors.
        """
        pages_of(kv_cache, codec.layout)
        if codec.fmt.anchor:
            anchors_of(kv_cache, codec.fmt, codec.head_dim)
        num_seqs, kv_heads = len(block_table), kv_cache.shape[2]
        rows = q_heads // kv_heads * query_len
        path = path or path_of(codec, kv_cache)
        launch: hopper.Launch | portable.Launch
        if path == "hopper":
            launch = hopper.launch_of(codec.fmt, codec.head_dim, rows)
            programs = _multiprocessors(kv_cache.device) * launch.programs_per_sm
            read = block_table.shape[1] * kv_cache.shape[1]
            if window is not None:
                read = min(read, window + query_len)
            tokens = num_seqs * kv_heads * launch.row_groups(rows) * read
            if tokens <= programs * _SHORT_TILES * launch.tile_tokens:
                launch = hopper.launch_of(codec.fmt, codec.head_dim, rows, short=True)
        else:
            launch = portable.launch_of(codec.head_dim, rows)
        groups = launch.row_groups(rows)
        slots = max(1, _multiprocessors(kv_cache.device) * launch.programs_per_sm // (kv_heads * groups))
        schedule = Schedule.empty(num_seqs, slots, kv_cache.device)
        shape = (len(schedule.items), kv_heads, groups, launch.rows)
        return cls(
            path,
            launch,
            query_len,
            ANCHOR_TOKENS // PAGE_TOKENS if codec.fmt.anchor else 1,
            schedule,
            torch.empty(*shape, codec.head_dim, dtype=torch.float32, device=kv_cache.device),
            torch.empty(*shape, 2, dtype=torch.float32, device=kv_cache.device),
            torch.zeros(num_seqs, kv_heads, groups, dtype=torch.int32, device=kv_cache.device)
            if path == "hopper" and len(schedule.items) <= _FUSED_SPLITS * num_seqs
            else None,
        )

    def deal_out(self, seq_lens: torch.Tensor, window: int | None) -> None:
        """Makes the schedule of a step: int32 [num_seqs], query tokens included."""
        tile_pages = self.launch.tile_tokens // PAGE_TOKENS
        fill(self.schedule, seq_lens, self.query_len, window, tile_pages, self.first_multiple)


def attend(
    codec: Codec,
    queries: QuantizedQueries,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    query_len: int,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: torch.Tensor | None = None,
    path: Path | None = None,
    workspace: Workspace | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of rotated queries, still rotated: float32 [num_seqs * query_len, q_heads, D].

    Arguments are those of `paged_decode`. A given workspace must have its schedule: see `Workspace.deal_out`.
    """
    tokens, q_heads, _, head_dim = queries.codes.shape
    if out is None:
        out = queries.scale.new_empty(tokens, q_heads, head_dim)
    if workspace is None:
        workspace = Workspace.allocate(
            codec, kv_cache, block_table, query_len, q_heads, window=window, path=path
        )
        workspace.deal_out(seq_lens, window)
    schedule, partial, stats = workspace.schedule, workspace.partial, workspace.stats
    arguments = (
        codec,
        workspace.launch,
        queries,
        kv_cache,
        block_table,
        seq_lens,
        schedule.items,
        partial,
        stats,
    )
    options = {"query_len": query_len, "window": window, "soft_cap": soft_cap}
    if workspace.counters is not None:
        merged = hopper.Merged(out, schedule.splits, workspace.counters, sinks)
        hopper.attend_items(*arguments, **options, merged=merged)
    else:
        kernel = hopper if workspace.path == "hopper" else portable
        kernel.attend_items(*arguments, **options)
        merge(out, partial, stats, schedule.splits, sinks, kernel.value_unit(codec))
    return out


def paged_decode(
    codec: Codec,
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    query_len: int,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: torch.Tensor | None = None,
    path: Path | None = None,
    workspace: Workspace | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """`decode.reference.paged_attention` for a batch of equally many query tokens a sequence.

    query: bf16, fp16 or fp32 [num_seqs * query_len, q_heads, D], those of a sequence one after the other.
    kv_cache: uint8 [num_blocks, block_size, kv_heads, slot_bytes]. block_table: int32 [num_seqs,
    max_blocks]. seq_lens: int32 [num_seqs], query tokens included; 0 for a padded row, whose output is
    zero. sinks: float [q_heads].

    Returns [num_seqs * query_len, q_heads, D] in the query's dtype, or fills and returns `out`.
    """
    queries = rotate_queries(codec, query, scale)
    attended = attend(
        codec,
        queries,
        kv_cache,
        block_table,
        seq_lens,
        query_len=query_len,
        window=window,
        soft_cap=soft_cap,
        sinks=sinks,
        path=path,
        workspace=workspace,
    )
    return unrotate(codec, attended, torch.empty_like(query) if out is None else out)


def _multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a GPU; of the interpreter one."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
