"""The measurements of `tq bench kernels`: a list of tasks that fill rows and a run.

`subject` calls this project's kernels, `competitors` the others, `clocks` times both. A competitor that
cannot run here is None in its rows, and the run says why.
"""

import datetime
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib import metadata
from typing import Any

import torch

from turboquant_kernels.bench import clocks, competitors, oracle, subject
from turboquant_kernels.bench.caches import DecodeStep, equal_step, random_step
from turboquant_kernels.bench.rows import (
    COMPETITORS,
    FORMATS,
    HEAD_DIMS,
    PREFILL,
    SHAPES,
    Row,
    Run,
    Shape,
)
from turboquant_kernels.codec import Codec
from turboquant_kernels.formats import BLOCK_TOKENS, KVFormat

RAGGED_LENGTHS = (1024, 65536)
"""The ragged batch draws its lengths from this range, as many as the first shape has sequences."""

CHECKED_SEQUENCES = 2
"""Sequences of a row whose output is compared with float64 attention."""


@dataclass(frozen=True)
class Task:
    """A measurement of a second or a few."""

    label: str
    run: Callable[[], None]


class Benchmark:
    """Run the `tasks` in order, then read `rows` and `run`."""

    def __init__(
        self, device: torch.device, shapes: Sequence[Shape] = SHAPES, formats: Sequence[str] = FORMATS
    ) -> None:
        self.device = device
        self.shapes = shapes
        self.formats = formats
        self.gpu = torch.cuda.get_device_name(device)
        self.rows: list[Row] = []
        self._copy_bandwidth = 0.0
        self._competitors: dict[str, float | None] = {}
        self._unmeasured: dict[str, str] = {}
        self._extra: dict[str, Any] = {"portable": [], "head_dims": [], "prefill": []}
        self._compiling = clocks.CompileTimes()

    def tasks(self) -> list[Task]:
        """Everything: of each shape the competitors, then the formats; last what only the first shape has."""
        tasks = [Task("copy bandwidth", self._copy)]
        for shape in self.shapes:
            for name, competitor in COMPETITORS.items():
                tasks.append(Task(f"{shape}: {competitor.label}", partial(self._compete, shape, name)))
            for name in self.formats:
                tasks.append(Task(f"{shape}: {name}", partial(self._measure, shape, name)))
            codec = self._codec(shape, self.formats[0])
            tasks.append(Task(f"{shape}: portable, {self.formats[0]}", partial(self._portable, shape, codec)))
        first, codec = self.shapes[0], self._codec(self.shapes[0], self.formats[0])
        for label, part in (
            ("ragged", self._ragged),
            ("step", self._step),
            ("anchor", self._anchor),
        ):
            tasks.append(Task(f"{label}, {self.formats[0]}", partial(part, first, codec)))
        for head_dim in HEAD_DIMS:
            shape = replace(first, head_dim=head_dim)
            part = partial(self._head_dim, shape, self._codec(shape, self.formats[0]))
            tasks.append(Task(f"head_dim {head_dim}, {self.formats[0]}", part))
        for chunk, context in PREFILL:
            part = partial(self._prefill, chunk, context)
            label = f"prefill of {chunk:,} over {context:,}"
            tasks.append(Task(label, partial(part, first, codec)))
        return [Task(task.label, partial(self._guarded, task)) for task in tasks]

    @property
    def run(self) -> Run:
        return Run(
            gpu=self.gpu,
            date=datetime.date.today().isoformat(),
            versions={name: _version(name) for name in ("torch", "triton", "vllm")},
            copy_bandwidth=self._copy_bandwidth,
            unmeasured=self._unmeasured,
            compile_seconds=self._compiling.seconds,
            **self._extra,
        )

    def _guarded(self, task: Task) -> None:
        with self._unless_it_fails(task.label), self._compiling:
            task.run()
        torch.cuda.empty_cache()

    @contextmanager
    def _unless_it_fails(self, label: str) -> Iterator[None]:
        """One measurement that fails, as where another project is absent, leaves the others."""
        try:
            yield
        except Exception as error:  # of a compiler, a kernel or a library
            self._unmeasured[label] = _reason(error)

    def _copy(self) -> None:
        self._copy_bandwidth = clocks.copy_bandwidth(self.device)

    def _compete(self, shape: Shape, name: str) -> None:
        fields = (f"{name}_ms", f"{name}_graph_ms")
        cache_bytes = shape.batch * shape.context * shape.kv_heads
        cache_bytes *= COMPETITORS[name].token_bytes(shape.head_dim)
        times: list[float | None] = [None, None]
        with self._unless_it_fails(f"{name}, {shape}"):
            count = clocks.cache_count(cache_bytes)
            calls = [competitors.PREPARE[name](shape, self.device) for _ in range(count)]
            times = [clocks.do_bench_ms(calls[0]), clocks.rotating_ms(calls)]
        self._competitors |= dict(zip(fields, times, strict=True))

    def _measure(self, shape: Shape, name: str) -> None:
        codec = self._codec(shape, name)
        cache_bytes = shape.cache_bytes(codec.fmt)
        steps = [
            equal_step(codec, shape, self.device, seed=seed)
            for seed in range(clocks.cache_count(cache_bytes))
        ]
        calls = [subject.decode(step) for step in steps]
        graph_ms = clocks.rotating_ms(calls)
        self.rows.append(
            Row(
                gpu=self.gpu,
                batch=shape.batch,
                context=shape.context,
                q_heads=shape.q_heads,
                kv_heads=shape.kv_heads,
                head_dim=shape.head_dim,
                format=name,
                ms=clocks.do_bench_ms(calls[0]),
                graph_ms=graph_ms,
                copy_bandwidth_fraction=cache_bytes / (graph_ms * 1e-3) / self._copy_bandwidth,
                relative_error=error_of(steps[0], calls[0]()),
                **self._competitors,
            )
        )

    def _ragged(self, shape: Shape, codec: Codec) -> None:
        """Bytes per second of a ragged batch, beside those of as many equal sequences."""
        draw = random.Random(0)
        lengths = [draw.randint(*RAGGED_LENGTHS) for _ in range(shape.batch)]
        steps = [
            random_step(codec, lengths, shape.q_heads, shape.kv_heads, self.device, seed=seed)
            for seed in range(2)
        ]
        graph_ms = clocks.rotating_ms([subject.decode(step) for step in steps])
        equal_ms = self._row(shape, codec).graph_ms
        rate = sum(lengths) / graph_ms / (shape.batch * shape.context / equal_ms)
        self._extra["ragged"] = {"tokens": sum(lengths), "graph_ms": graph_ms, "rate_fraction": rate}

    def _step(self, shape: Shape, codec: Codec) -> None:
        """A layer's whole step, beside the attention kernel alone."""
        steps = [equal_step(codec, shape, self.device, seed=seed) for seed in range(2)]
        alone = clocks.rotating_ms([subject.decode(step) for step in steps])
        whole = clocks.rotating_ms([subject.whole_step(step) for step in steps])
        self._extra["step"] = {
            "decode_graph_ms": alone,
            "step_graph_ms": whole,
            "overhead": whole / alone - 1,
        }

    def _anchor(self, shape: Shape, codec: Codec) -> None:
        """What one stored anchor for each KV head and 128 tokens costs."""
        anchored = Codec(replace(codec.fmt, anchor=True), codec.head_dim)
        found: dict[str, float] = {}
        for name, one in (("plain", codec), ("anchor", anchored)):
            calls = [
                subject.decode(equal_step(one, shape, self.device, block_size=BLOCK_TOKENS, seed=seed))
                for seed in range(2)
            ]
            found[f"{name}_ms"] = clocks.do_bench_ms(calls[0])
            found[f"{name}_graph_ms"] = clocks.rotating_ms(calls)
        found["ms_overhead"] = found["anchor_ms"] / found["plain_ms"] - 1
        found["overhead"] = found["anchor_graph_ms"] / found["plain_graph_ms"] - 1
        self._extra["anchor"] = found

    def _portable(self, shape: Shape, codec: Codec) -> None:
        """The portable path, beside what the competitors of this shape took just before."""
        steps = [equal_step(codec, shape, self.device, seed=seed) for seed in range(2)]
        calls = [subject.decode(step, path="portable") for step in steps]
        ms = clocks.do_bench_ms(calls[0])
        others = {name: self._competitors[f"{name}_ms"] for name in ("fa3_bf16", "vllm_turboquant")}
        self._extra["portable"].append(
            asdict(shape)
            | {
                "ms": ms,
                "graph_ms": clocks.rotating_ms(calls),
                "relative_error": error_of(steps[0], calls[0]()),
            }
            | {f"{name}_speedup": other and other / ms for name, other in others.items()}
        )

    def _head_dim(self, shape: Shape, codec: Codec) -> None:
        step = equal_step(codec, shape, self.device)
        theirs: float | None = None
        with self._unless_it_fails(f"fa3_bf16, head_dim {shape.head_dim}"):
            theirs = clocks.do_bench_ms(competitors.PREPARE["fa3_bf16"](shape, self.device))
        self._extra["head_dims"].append(
            {
                "head_dim": shape.head_dim,
                "path": subject.plan_of(step).path,
                "ms": clocks.do_bench_ms(subject.decode(step)),
                "fa3_bf16_ms": theirs,
            }
        )

    def _prefill(self, chunk: int, context: int, shape: Shape, codec: Codec) -> None:
        """A chunk over compressed context, beside FlashAttention-3 in one call on the same in bf16."""
        step = random_step(codec, [context + chunk], shape.q_heads, shape.kv_heads, self.device)
        ours = clocks.do_bench_ms(subject.prefill(step, chunk, competitors.flash_attention()))
        theirs = clocks.do_bench_ms(competitors.prefill(shape, chunk, context, self.device))
        self._extra["prefill"].append(
            {
                "chunk": chunk,
                "context": context,
                "ms": ours,
                "fa3_bf16_ms": theirs,
                "speed_fraction": theirs / ours,
            }
        )

    def _codec(self, shape: Shape, name: str) -> Codec:
        return Codec(KVFormat.parse(name), shape.head_dim)

    def _row(self, shape: Shape, codec: Codec) -> Row:
        return next(row for row in self.rows if (row.shape, row.format) == (shape, codec.fmt.name))


def error_of(step: DecodeStep, result: torch.Tensor) -> float:
    """Relative error of some sequences' results, fp32 [num_seqs, q_heads, D] before un-rotation."""
    count = len(step.seq_lens)
    chosen = sorted(
        {round(i * (count - 1) / max(1, CHECKED_SEQUENCES - 1)) for i in range(CHECKED_SEQUENCES)}
    )
    exact = oracle.attention(
        step.codec,
        step.query,
        step.kv_cache,
        step.block_table,
        step.seq_lens,
        query_len=1,
        scale=step.scale,
        sequences=chosen,
    )
    return oracle.relative_error(result[chosen], exact)


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "not installed"


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
