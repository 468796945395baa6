"""What `tq bench kernels` measures and what it writes: shapes, rows and the run beside them. No torch.

`measure` fills these, `report` reads them. kernels.json holds one `Row` a shape, format and GPU, in the order
of `SHAPES`; kernels-run.json holds one `Run` a GPU.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from turboquant_kernels.formats import BF16, FP8, KVFormat


@dataclass(frozen=True)
class Shape:
    """One decode step: `batch` sequences of `context` tokens, one query token each."""

    batch: int
    context: int
    q_heads: int
    kv_heads: int
    head_dim: int

    def __str__(self) -> str:
        return f"{self.batch} x {self.context:,}, {self.q_heads}/{self.kv_heads} heads of {self.head_dim}"

    def cache_bytes(self, fmt: KVFormat) -> int:
        """Bytes that a decode step has to read."""
        return self.batch * self.context * self.kv_heads * fmt.slot_bytes(self.head_dim)


SHAPES = (
    Shape(8, 32768, 32, 8, 128),
    Shape(1, 32768, 32, 8, 128),
    Shape(64, 2048, 32, 8, 128),
    Shape(1, 131072, 32, 8, 128),
    Shape(8, 32768, 64, 8, 128),
    Shape(8, 32768, 16, 2, 256),
)
"""A full batch at 32k, one long prompt, many short ones, one very long one; then 8 query heads a KV head, and
head_dim 256."""

FORMATS = ("tq-k4v4", "tq-k3v3", "tq-k8v4", "tq-k5v3")

HEAD_DIMS = (64, 80, 96, 192)
"""Those that no shape has."""

PREFILL = ((8192, 24576), (2048, 30720), (512, 32256))
"""Tokens of a chunk over tokens of compressed context, at the heads of the first shape."""


@dataclass(frozen=True)
class Competitor:
    """A kernel that the project is measured beside."""

    label: str
    token_bytes: Callable[[int], int]
    """Bytes of a token and KV head in its cache, by head_dim."""


COMPETITORS = {
    "fa3_bf16": Competitor("FlashAttention-3, bf16", BF16.slot_bytes),
    "fa3_fp8": Competitor("FlashAttention-3, fp8", FP8.slot_bytes),
    "vllm_turboquant": Competitor("vLLM turboquant_4bit_nc", lambda head_dim: head_dim + 6),
    "vllm_int4": Competitor("vLLM int4_per_token_head", lambda head_dim: head_dim + 8),
}
"""By the fields of `Row` without `_ms` and `_graph_ms`."""


@dataclass(frozen=True)
class Row:
    """One shape and format on one GPU. Times are milliseconds of one layer; None was not measured."""

    gpu: str
    batch: int
    context: int
    q_heads: int
    kv_heads: int
    head_dim: int
    format: str
    ms: float
    """Median of do_bench, as all `_ms`: one call at a time, with a flushed L2 cache."""
    graph_ms: float
    """Calls back to back in a CUDA graph over rotating caches, as all `_graph_ms`."""
    fa3_bf16_ms: float | None
    fa3_bf16_graph_ms: float | None
    fa3_fp8_ms: float | None
    fa3_fp8_graph_ms: float | None
    vllm_turboquant_ms: float | None
    vllm_turboquant_graph_ms: float | None
    vllm_int4_ms: float | None
    vllm_int4_graph_ms: float | None
    copy_bandwidth_fraction: float
    """Bytes of the cache by `graph_ms`, over the card's measured copy bandwidth."""
    relative_error: float
    """Largest |out - exact| / |exact| of a query head, exact being float64 over the decompressed cache."""

    @property
    def shape(self) -> Shape:
        return Shape(self.batch, self.context, self.q_heads, self.kv_heads, self.head_dim)

    def speedup(self, competitor: str, clock: str = "ms") -> float | None:
        """How many times as fast as a competitor, by `ms` or `graph_ms`; None where one was not measured."""
        other = getattr(self, f"{competitor}_{clock}")
        return None if other is None else other / getattr(self, clock)


@dataclass(frozen=True)
class Run:
    """What one run measured beside its rows. Times are milliseconds."""

    gpu: str
    date: str
    versions: Mapping[str, str]
    copy_bandwidth: float
    """Bytes read and written per second by a device-to-device copy."""
    unmeasured: Mapping[str, str]
    """What could not be measured, a competitor or a part of this run -> why."""
    ragged: Mapping[str, float] = field(default_factory=dict)
    """A batch of random lengths: tokens, graph_ms, and `rate_fraction`, its bytes per second over those of
    the first shape."""
    step: Mapping[str, float] = field(default_factory=dict)
    """First shape and format: `decode_graph_ms` alone; `step_graph_ms` with query rotation, store of one
    token a sequence and un-rotation; `overhead`, their quotient minus one."""
    anchor: Mapping[str, float] = field(default_factory=dict)
    """First shape and format, in blocks of 128 tokens: `plain_ms`, `plain_graph_ms`; `anchor_ms`,
    `anchor_graph_ms`, with a key anchor a block; `ms_overhead` and, of graphs, `overhead`: their quotients
    minus one. Runs before 2026-11-30 have those of graphs alone."""
    portable: tuple[Mapping[str, Any], ...] = ()
    """First format on the portable path, one a shape: the fields of `Shape`, ms, graph_ms, relative_error;
    `fa3_bf16_speedup` and `vllm_turboquant_speedup`, by ms, None where the competitor was not measured."""
    head_dims: tuple[Mapping[str, Any], ...] = ()
    """First shape and format at each of `HEAD_DIMS`: head_dim, path, ms; fa3_bf16_ms, None where
    FlashAttention-3 has no such head_dim."""
    prefill: tuple[Mapping[str, float], ...] = ()
    """One a pair of `PREFILL`: chunk, context, ms, fa3_bf16_ms; `speed_fraction`, the speed over FA3's."""
    compile_seconds: Mapping[str, float] = field(default_factory=dict)
    """First-call compile time of each variant; those that Triton's cache on disk held are not in it."""


def read_rows(path: Path) -> list[Row]:
    """The rows of a kernels.json; none where there is no such file."""
    return [Row(**row) for row in json.loads(path.read_text())] if path.exists() else []


def read_runs(path: Path) -> list[Run]:
    """The runs of a kernels-run.json; none where there is no such file."""
    return [Run(**run) for run in json.loads(path.read_text())] if path.exists() else []


def write(path: Path, entries: Iterable[Row] | Iterable[Run]) -> None:
    """Writes rows or runs, numbers with four significant digits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([_rounded(asdict(entry)) for entry in entries], indent=1) + "\n")


def merge(old: Iterable[Row], new: Iterable[Row]) -> list[Row]:
    """The new rows, and the old ones of other GPUs, shapes and formats, in a fixed order."""
    rows = {(row.gpu, row.shape, row.format): row for row in (*old, *new)}
    places = {shape: place for place, shape in enumerate(SHAPES)}
    formats = {name: place for place, name in enumerate(FORMATS)}

    def place(row: Row) -> tuple[Any, ...]:
        return (
            row.gpu,
            places.get(row.shape, len(places)),
            formats.get(row.format, len(formats)),
            row.format,
        )

    return sorted(rows.values(), key=place)


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {name: _rounded(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(entry) for entry in value]
    return value
