"""Decode attention from queries to output: a plan for each shape of a batch, made once and run in every
layer.

    query -> queries.rotate_queries -> [schedule -> hopper or portable -> merge] -> queries.unrotate -> output
    with a raw block:                  [schedule -> hopper or portable] -> finish -> output

    plan = DecodePlan(DecodeShape.of(codec, kv_cache, block_table, q_heads=32, query_len=1), device)
    plan.schedule(seq_lens)                                               once a step
    plan.run(query, kv_cache, block_table, seq_lens, scale=scale)         in every layer of this shape

The plan holds what follows from shapes: which kernel reads the cache, how it is launched, and the buffers.
Lengths are read on the device, so both calls can be captured in a CUDA graph, and a replay reads the lengths
of its own step.
"""

import math
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import triton

from turboquant_kernels.codec import Codec
from turboquant_kernels.decode import finish, hopper, portable
from turboquant_kernels.decode.merge import merge
from turboquant_kernels.decode.schedule import Schedule, fill
from turboquant_kernels.formats import BLOCK_TOKENS, PAGE_TOKENS
from turboquant_kernels.packing import anchors_of, pages_of
from turboquant_kernels.queries.kernel import rotate_queries, unrotate
from turboquant_kernels.queries.reference import QuantizedQueries
from turboquant_kernels.raw_block import RawBlocks

Path = Literal["hopper", "portable"]

_SHORT_TILES = 5
"""Tiles of a program up to which launches with smaller ones were faster, on an H200."""
_FUSED_SPLITS = 2
"""Splits of a sequence, on average, up to which its last program merges them: where most sequences have one
split, a launch that merges costs more than it saves."""


@dataclass(frozen=True)
class DecodeShape:
    """Everything that determines the buffers and kernels of a decode; layers of equal shape share a plan.

    Codecs are compared by format, head dimension and seed.
    """

    codec: Codec = field(compare=False)
    q_heads: int
    kv_heads: int
    block_size: int
    """Tokens of a block."""
    block_stride: int
    """Bytes from one block of the cache to the next."""
    num_seqs: int
    query_len: int
    """Query tokens of each sequence."""
    max_blocks: int
    """Entries of a row of the block table."""
    window: int | None = None
    """Tokens that a query sees, its own included; None: all up to its own."""
    raw: RawBlocks | None = None
    """Where the tokens of each query's own block lie, which it reads in place of what is stored of that
    block; None: every token is read as stored."""
    _codec: tuple[object, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        codec = self.codec
        object.__setattr__(self, "_codec", (codec.fmt, codec.head_dim, codec.seed))
        if self.raw is not None:
            self._check(self.raw)

    def _check(self, raw: RawBlocks) -> None:
        if self.block_size != BLOCK_TOKENS or self.block_stride % finish.STRIDE_BYTES:
            raise ValueError(
                f"blocks of {self.block_size} tokens, {self.block_stride} bytes apart; with a raw block they "
                f"are {BLOCK_TOKENS} and a multiple of {finish.STRIDE_BYTES}"
            )
        if raw.dtype not in (torch.bfloat16, torch.float16):
            raise ValueError(f"raw tokens are bf16 or fp16, not {raw.dtype}")
        if self.query_len > raw.tokens_per_block:
            raise ValueError(
                f"{self.query_len} query tokens a sequence, more than the {raw.tokens_per_block} that can be "
                "stored before the block ahead of them is lost"
            )

    @classmethod
    def of(
        cls,
        codec: Codec,
        kv_cache: torch.Tensor,
        block_table: torch.Tensor,
        *,
        q_heads: int,
        query_len: int,
        window: int | None = None,
        raw: RawBlocks | None = None,
    ) -> "DecodeShape":
        """The shape of a decode over these tensors, which `paged_decode` describes; their contents do not
        count.

        Raises ValueError where the cache's shape is not that of the codec's format, or its blocks have no
        room for key anchors. With `raw` also where blocks have not `BLOCK_TOKENS` tokens or lie no multiple
        of 16 bytes apart, raw tokens are neither bf16 nor fp16, or a sequence has more query tokens than
        `RawBlocks.tokens_per_block`.
        """
        pages_of(kv_cache, codec.layout)
        if codec.fmt.anchor:
            anchors_of(kv_cache, codec.fmt, codec.head_dim)
        _, block_size, kv_heads, _ = kv_cache.shape
        num_seqs, max_blocks = block_table.shape
        stride = kv_cache.stride(0)
        return cls(codec, q_heads, kv_heads, block_size, stride, num_seqs, query_len, max_blocks, window, raw)

    @property
    def rows(self) -> int:
        """Rows that share a KV head: its query heads times the query tokens of a sequence."""
        return self.q_heads // self.kv_heads * self.query_len


class PartialResults:
    """Memory of the splits' partial results, shared by the plans of layers that run one after the other."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._memory: dict[tuple[torch.dtype, str], torch.Tensor] = {}

    def view(self, dtype: torch.dtype, use: str, shape: tuple[int, ...]) -> torch.Tensor:
        """Memory for a use, in a shape. It holds zeros when it is new, later whatever its users leave there.

        Where more is asked for than ever before the memory is allocated anew. Older views keep what they
        have, so a captured graph stays valid; to reserve it once, ask for the largest first.
        """
        size = math.prod(shape)
        memory = self._memory.get((dtype, use))
        if memory is None or memory.numel() < size:
            memory = self._memory[dtype, use] = torch.zeros(size, dtype=dtype, device=self.device)
        return memory[:size].view(shape)


def path_of(shape: DecodeShape, device: torch.device) -> Path:
    """The faster kernel of those that read a cache of this shape on a device."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        codec = shape.codec
        if hopper.supports(codec.fmt, codec.head_dim, 10 * major + minor, shape.block_stride):
            return "hopper"
    return "portable"


class DecodePlan:
    """One shape's kernel, launch, schedule and buffers."""

    shape: DecodeShape
    path: Path
    launch: hopper.Launch | portable.Launch
    splits: Schedule
    """Which program reads which part of which sequence, as the last `schedule` made it."""
    partial: torch.Tensor
    """float32 [items, kv_heads, row_groups, rows, D]: sums of values of the splits."""
    stats: torch.Tensor
    """float32 [items, kv_heads, row_groups, rows, 2]: for each split the power of two that its sums are
    relative to, and the sum of weights."""
    counters: torch.Tensor | None
    """int32 [num_seqs, kv_heads, row_groups], zero between launches: splits that are done, where the kernel
    merges them itself. None where `merge` or `finish` does."""
    finish_rows: int | None
    """Rows of a program of `finish`; None without a raw block."""

    def __init__(
        self,
        shape: DecodeShape,
        device: torch.device,
        *,
        path: Path | None = None,
        partial_results: PartialResults | None = None,
    ) -> None:
        """`path` overrides the choice of kernel. Without `partial_results` the plan has memory of its own."""
        self.shape = shape
        self.path = path or path_of(shape, device)
        self.launch = _launch_of(shape, self.path, device)
        groups = self.launch.row_groups(shape.rows)
        slots = max(1, _multiprocessors(device) * self.launch.programs_per_sm // (shape.kv_heads * groups))
        self.splits = Schedule.empty(shape.num_seqs, slots, device)
        items = len(self.splits.items)
        memory = partial_results or PartialResults(device)
        size = (items, shape.kv_heads, groups, self.launch.rows)
        self.partial = memory.view(torch.float32, "partial", (*size, shape.codec.head_dim))
        self.stats = memory.view(torch.float32, "stats", (*size, 2))
        self.counters = None
        if self.path == "hopper" and shape.raw is None and items <= _FUSED_SPLITS * shape.num_seqs:
            self.counters = memory.view(torch.int32, "counters", (shape.num_seqs, shape.kv_heads, groups))
        self.finish_rows = None
        if shape.raw is not None:
            heads = shape.num_seqs * shape.kv_heads
            self.finish_rows = finish.rows_of(shape.rows, heads, _multiprocessors(device))

    @property
    def kernels(self) -> Hashable:
        """Identifies the compiled kernels of `schedule` and `run`: plans with equal values share them, if
        soft cap, sinks, dtypes and the width of offsets are equal too."""
        shape = self.shape
        splits = triton.cdiv(len(self.splits.items), shape.num_seqs)
        return (
            shape._codec,
            (shape.q_heads, shape.kv_heads, shape.block_size, shape.query_len),
            # Integers of which Triton knows no more than this.
            _specialized(shape.block_stride),
            _specialized(shape.max_blocks),
            shape.window and _specialized(shape.window),
            self.path,
            self.launch,
            self.counters is None,
            shape.raw,
            # The schedule's kernel has a size for the number of sequences, the merge's for their splits.
            triton.next_power_of_2(shape.num_seqs),
            self.finish_rows or triton.next_power_of_2(splits),
        )

    def schedule(self, seq_lens: torch.Tensor) -> None:
        """Deals the sequences out to programs, on the device and without waiting for it: int32 [num_seqs],
        query tokens included.

        For all layers that run this plan until lengths change.
        """
        shape = self.shape
        tile_pages = self.launch.tile_tokens // PAGE_TOKENS
        # Pages that share a key anchor go to one program.
        together = BLOCK_TOKENS // PAGE_TOKENS if shape.codec.fmt.anchor else 1
        fill(
            self.splits,
            seq_lens,
            shape.query_len,
            shape.window,
            tile_pages,
            together,
            raw_block=shape.raw is not None,
        )

    def run(
        self,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        block_table: torch.Tensor,
        seq_lens: torch.Tensor,
        *,
        scale: float,
        soft_cap: float | None = None,
        sinks: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
        wide_offsets: bool | None = None,
    ) -> torch.Tensor:
        """Attention of a batch of the plan's shape, by the last schedule.

        Tensors, options, result and errors are those of `paged_decode`. `wide_offsets`: whether the cache is
        addressed with 64-bit offsets, which one of more than 8 GiB needs; by default its size decides.
        Results are equal: the option is for compiling both kernels on a small cache.
        """
        shape, codec = self.shape, self.shape.codec
        queries = rotate_queries(codec, query, scale)
        if out is None:
            out = torch.empty_like(query)
        tensors = (kv_cache, block_table, seq_lens)
        if shape.raw is None:
            rotated = self.attend(
                queries, *tensors, soft_cap=soft_cap, sinks=sinks, wide_offsets=wide_offsets
            )
            return unrotate(codec, rotated, out)
        if query.dtype != shape.raw.dtype:
            raise ValueError(f"queries are {query.dtype}, raw tokens {shape.raw.dtype}")
        self._attend_items(queries, *tensors, soft_cap=soft_cap, wide_offsets=wide_offsets)
        finish.finish(
            codec,
            queries,
            kv_cache,
            shape.raw,
            block_table,
            seq_lens,
            self.partial,
            self.stats,
            self.splits.splits,
            out,
            unit=self._value_unit,
            rows=self.finish_rows,
            window=shape.window,
            soft_cap=soft_cap,
            sinks=sinks,
        )
        return out

    def attend(
        self,
        queries: QuantizedQueries,
        kv_cache: torch.Tensor,
        block_table: torch.Tensor,
        seq_lens: torch.Tensor,
        *,
        soft_cap: float | None = None,
        sinks: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
        wide_offsets: bool | None = None,
    ) -> torch.Tensor:
        """Attention of rotated queries to stored tokens, still rotated: float32 [num_seqs * query_len,
        q_heads, D], or `out`. For plans without a raw block.

        Raises ValueError where the tensors have not the plan's shape.
        """
        if out is None:
            out = queries.scale.new_empty(*queries.scale.shape, self.shape.codec.head_dim)
        self._attend_items(
            queries,
            kv_cache,
            block_table,
            seq_lens,
            soft_cap=soft_cap,
            wide_offsets=wide_offsets,
            merged_into=out,
            sinks=sinks,
        )
        if self.counters is None:
            merge(out, self.partial, self.stats, self.splits.splits, sinks, self._value_unit)
        return out

    @property
    def _value_unit(self) -> float:
        return (hopper if self.path == "hopper" else portable).value_unit(self.shape.codec)

    def _attend_items(
        self,
        queries: QuantizedQueries,
        kv_cache: torch.Tensor,
        block_table: torch.Tensor,
        seq_lens: torch.Tensor,
        *,
        soft_cap: float | None,
        wide_offsets: bool | None,
        merged_into: torch.Tensor | None = None,
        sinks: torch.Tensor | None = None,
    ) -> None:
        """Fills the splits' partial results or, where there are counters, merges them into `merged_into`."""
        shape, codec = self.shape, self.shape.codec
        if (
            block_table.shape != (shape.num_seqs, shape.max_blocks)
            or kv_cache.stride(0) != shape.block_stride
        ):
            raise ValueError(
                f"not of the plan's shape, {shape}: a block table of {list(block_table.shape)}, blocks "
                f"{kv_cache.stride(0)} bytes apart"
            )
        arguments = (
            codec,
            self.launch,
            queries,
            kv_cache,
            block_table,
            seq_lens,
            self.splits.items,
            self.partial,
            self.stats,
        )
        options: dict[str, Any] = {
            "query_len": shape.query_len,
            "window": shape.window,
            "soft_cap": soft_cap,
            "raw_block": shape.raw is not None,
        }
        if self.path == "portable":  # its offsets are 64-bit ones always
            portable.attend_items(*arguments, **options)
        else:
            # Here, so that Gluon, which is experimental, is imported only where it serves.
            from turboquant_kernels.decode.hopper.attend import Merged, attend_items

            merged = None
            if self.counters is not None:
                merged = Merged(merged_into, self.splits.splits, self.counters, sinks)
            attend_items(*arguments, **options, merged=merged, wide_offsets=wide_offsets)


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
    raw: RawBlocks | None = None,
    path: Path | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """`decode.reference.paged_attention` for a batch of equally many query tokens a sequence, planned for
    this one call.

    query: bf16, fp16 or fp32 [num_seqs * query_len, q_heads, D], those of a sequence one after the other.
    kv_cache: uint8 [num_blocks, block_size, kv_heads, slot_bytes]. block_table: int32 [num_seqs,
    max_blocks]. seq_lens: int32 [num_seqs], query tokens included; 0 for a padded row, whose output is
    zero. sinks: float [q_heads]. raw: each query reads its own block raw, as `decode.reference.
    paged_attention` does with `own`: the step's tokens are stored already, completed blocks as well as raw
    tokens, and `query` has the dtype of these.

    Returns [num_seqs * query_len, q_heads, D] in the query's dtype, or fills and returns `out`. Raises
    ValueError where the cache's shape is not that of the codec's format, or the coordinates of a query or an
    output are not adjacent in memory; with `raw` also as `DecodeShape.of` does.
    """
    shape = DecodeShape.of(
        codec, kv_cache, block_table, q_heads=query.shape[1], query_len=query_len, window=window, raw=raw
    )
    plan = DecodePlan(shape, kv_cache.device, path=path)
    plan.schedule(seq_lens)
    return plan.run(
        query, kv_cache, block_table, seq_lens, scale=scale, soft_cap=soft_cap, sinks=sinks, out=out
    )


def _launch_of(shape: DecodeShape, path: Path, device: torch.device) -> hopper.Launch | portable.Launch:
    codec, rows = shape.codec, shape.rows
    if path == "portable":
        return portable.launch_of(codec.fmt, codec.head_dim, rows)
    launch = hopper.launch_of(codec.fmt, codec.head_dim, rows)
    read = shape.max_blocks * shape.block_size
    if shape.window is not None:
        read = min(read, shape.window + shape.query_len)
    tokens = shape.num_seqs * shape.kv_heads * launch.row_groups(rows) * read
    if tokens <= _multiprocessors(device) * launch.programs_per_sm * _SHORT_TILES * launch.tile_tokens:
        launch = hopper.launch_of(codec.fmt, codec.head_dim, rows, short=True)
    return launch


def _specialized(n: int) -> tuple[bool, bool]:
    """What Triton compiles a kernel for, of an integer argument: whether it is 1 or a multiple of 16."""
    return n == 1, n % 16 == 0


def _multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a GPU; of the interpreter one."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
