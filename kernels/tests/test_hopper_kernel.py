"""The Hopper decode kernel without a GPU: its PTX, run by `ptx_machine`, against attention in float64.

Schedule, kernel and merge as an engine calls them, over caches whose unused bytes are NaN scales. What else
the kernel must not do, such as to read a page before it has come, the machine finds.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from ptx_machine.hopper import MachineKernel
from test_paged_attention import Batch

from turboquant_kernels.decode import hopper
from turboquant_kernels.decode import plan as decode_plan
from turboquant_kernels.decode.hopper import attend as hopper_attend
from turboquant_kernels.decode.hopper import launch as hopper_launch
from turboquant_kernels.decode.plan import DecodePlan, DecodeShape
from turboquant_kernels.formats import KVFormat
from turboquant_kernels.queries.reference import rotate_queries

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(),
    reason="schedule and merge run in Triton's interpreter, of which a GPU takes the place",
)

TOLERANCE = 5e-4
"""Relative error of the float32 result, as for the GPU."""


@dataclass(frozen=True)
class Case:
    """Sequences and what the kernel is specialized to."""

    lengths: tuple[int, ...]
    fmt: str = "tq-k4v4"
    head_dim: int = 128
    group: int = 4
    kv_heads: int = 1
    query_len: int = 1
    block_size: int = 16
    anchor: bool = False
    fused: bool = True
    """Whether the kernel merges splits itself, and not a kernel of its own."""
    short: bool = False
    """Whether the launch for few tokens is taken, whatever their number."""
    splits: int = 1
    """Items of each KV head that a schedule has room for, if they are not fewer than sequences."""
    dtype: torch.dtype = torch.float32
    heavy: dict[int, float] | None = None
    """As `Batch` has it."""
    options: dict[str, Any] = field(default_factory=dict)

    def batch(self) -> Batch:
        query_lens = [self.query_len if length else 0 for length in self.lengths]
        fmt = replace(KVFormat.parse(self.fmt), anchor=self.anchor)
        batch = Batch(
            query_lens,
            list(self.lengths),
            fmt,
            self.head_dim,
            q_heads=self.group * self.kv_heads,
            kv_heads=self.kv_heads,
            block_size=self.block_size,
            heavy=self.heavy,
        )
        batch.queries = [query.to(self.dtype).float() for query in batch.queries]
        return batch


SINKS = torch.tensor([0.5, -2.0, 3.0, 6.0])
ALONE = {"lengths": (1500,)}
"""One split, in whose ring stages are filled several times at any tile."""
CASES = {
    "splits": Case((700, 1, 64, 300), kv_heads=2, splits=9),
    "splits and sinks": Case((700,), splits=3, options={"sinks": SINKS}),
    "many splits": Case((1100,), fused=False, splits=17, options={"sinks": SINKS}),
    "k3v3, splits": Case((1500, 0, 90), "tq-k3v3", kv_heads=2, fused=False, splits=4),
    "k3v3, splits, few tokens": Case((700,), "tq-k3v3", short=True, fused=False, splits=3),
    "12 rows, splits": Case((700, 40), group=6, query_len=2, kv_heads=2, fused=False, splits=3),
    "8 rows, splits, few tokens": Case((700,), group=8, short=True, fused=False, splits=3),
    "anchors, splits": Case((1500, 20), anchor=True, block_size=128, kv_heads=2, fused=False, splits=5),
    "one split": Case(**ALONE, kv_heads=2),
    "one split and sinks": Case(**ALONE, options={"sinks": SINKS}),
    "empty sequences": Case((0, 90, 0), splits=3),
    "window": Case((700, 40), splits=3, options={"window": 300}),
    "window of one": Case((200,), options={"window": 1}),
    "soft cap": Case((300,), options={"soft_cap": 3.0}),
    "query tokens, window, soft cap": Case(
        (733, 3), group=2, query_len=3, splits=3, options={"window": 400, "soft_cap": 5.0}
    ),
    "one query head": Case((200,), group=1),
    "8 rows": Case((700, 30), group=8, splits=3),
    "12 rows": Case((300,), group=6, query_len=2),
    "blocks of 128": Case((700, 129), block_size=128, kv_heads=2, splits=3),
    "k2v2": Case(**ALONE, fmt="tq-k2v2"),
    "k3v3": Case(**ALONE, fmt="tq-k3v3"),
    "k3v3, few tokens": Case((700,), "tq-k3v3", short=True, splits=3),
    "k5v3": Case(**ALONE, fmt="tq-k5v3"),
    "k8v8": Case(**ALONE, fmt="tq-k8v8"),
    "k6v8": Case(**ALONE, fmt="tq-k6v8"),
    "k8v4, 8 rows": Case((700,), "tq-k8v4", group=8),
    "k3v3, 8 rows": Case((700,), "tq-k3v3", group=8),
    "D 64": Case(**ALONE, head_dim=64, kv_heads=2),
    "D 64, k5v3, 8 rows": Case((700,), "tq-k5v3", 64, group=8, splits=2),
    "D 80": Case(**ALONE, head_dim=80, kv_heads=2),
    "D 80, 8 rows": Case((300,), head_dim=80, group=8),
    "D 96, k5v3": Case(**ALONE, fmt="tq-k5v3", head_dim=96),
    "D 192, k4v4, 8 rows": Case((700,), head_dim=192, group=8),
    "D 192, k3v3": Case((700,), "tq-k3v3", 192),
    "D 256, 4 rows": Case(**ALONE, head_dim=256, group=2),
    "D 256, 8 rows": Case((700,), head_dim=256, group=8, splits=2),
    "D 256, k5v3": Case((700,), "tq-k5v3", 256),
    "D 256, k5v3, few tokens": Case((700,), "tq-k5v3", 256, group=2, short=True),
    "anchors": Case((700, 20), anchor=True, block_size=128, kv_heads=2, splits=3),
    "anchors, k3v3, 8 rows": Case((700,), "tq-k3v3", anchor=True, block_size=256, group=8),
    "anchors, D 96": Case((400,), head_dim=96, anchor=True, block_size=128),
    "anchors, D 256": Case((400,), head_dim=256, group=2, anchor=True, block_size=128),
    "anchors, D 192": Case((400,), head_dim=192, anchor=True, block_size=128),
    "anchors, window": Case(
        (700,), anchor=True, block_size=128, query_len=2, group=2, splits=2, options={"window": 250}
    ),
    "anchors of several runs": Case((8700,), anchor=True, block_size=128),
    "anchors of several runs, k3v3, bf16 queries": Case(
        (8700,), "tq-k3v3", anchor=True, block_size=256, dtype=torch.bfloat16
    ),
}
# The others' weights are 2**-17 of the heavy token's: less than half a unit of a 15-bit weight.
TAIL = Case((1500,), heavy={3: 12.0})
CASES |= {
    "a tail behind a heavy token": TAIL,
    "a tail and sinks": replace(TAIL, options={"sinks": SINKS}),
    "a tail in a window": replace(TAIL, lengths=(1700,), heavy={210: 12.0}, options={"window": 1500}),
    "a tail and a soft cap": replace(TAIL, heavy={3: 14.0}, options={"soft_cap": 20.0}),
    "a tail in splits": replace(TAIL, splits=3),
    "a tail in splits that another kernel merges": replace(
        TAIL, splits=3, fused=False, options={"sinks": SINKS}
    ),
    "a tail, k3v3": replace(TAIL, fmt="tq-k3v3"),
    "a tail, k6v8": replace(TAIL, fmt="tq-k6v8"),
    "a tail, query tokens": replace(TAIL, group=2, query_len=3),
    "a tail, D 256": replace(TAIL, head_dim=256, group=8),
    "a tail that is nothing": replace(TAIL, heavy={3: 90.0}),
    "a tail between heavy tokens": replace(TAIL, heavy={3: 90.0, 1470: 90.0}),
    "a heavy token at the end": replace(TAIL, heavy={1499: 12.0}),
    "a heavier token at the end": replace(TAIL, heavy={3: 12.0, 1400: 90.0}),
}


@pytest.fixture(scope="module")
def compiled():
    kernel = MachineKernel()
    yield kernel
    kernel.close()


@pytest.fixture
def machine(compiled, monkeypatch):
    monkeypatch.setattr(hopper_attend, "decode_kernel", compiled)
    monkeypatch.setattr(compiled, "backwards", False)
    return compiled


@pytest.fixture
def decode(machine, monkeypatch):
    def decode(case: Case, batch: Batch, wide_offsets: bool | None = None) -> tuple[torch.Tensor, DecodePlan]:
        """float32 [num_seqs * query_len, q_heads, D], un-rotated, and the plan it was made by."""
        launch_of = hopper_launch.launch_of

        def launch_for_splits(fmt, head_dim, rows, short=False):
            launch = launch_of(fmt, head_dim, rows, case.short)
            return replace(launch, programs_per_sm=case.splits * case.kv_heads * launch.row_groups(rows))

        monkeypatch.setattr(hopper, "launch_of", launch_for_splits)
        monkeypatch.setattr(decode_plan, "_FUSED_SPLITS", 16 if case.fused else 0)
        codec, q_heads = batch.codec, case.group * case.kv_heads
        lengths = torch.tensor(case.lengths, dtype=torch.int32)
        shape = DecodeShape.of(
            codec,
            batch.cache,
            batch.block_table,
            q_heads=q_heads,
            query_len=case.query_len,
            window=case.options.get("window"),
        )
        plan = DecodePlan(shape, torch.device("cpu"), path="hopper")
        plan.schedule(lengths)
        plan.partial.fill_(torch.nan)
        plan.stats.fill_(torch.nan)
        empty = torch.ones(case.query_len, q_heads, case.head_dim)
        query = torch.cat([query if len(query) else empty for query in batch.queries]).to(case.dtype)
        rotated = plan.attend(
            rotate_queries(codec, query, case.head_dim**-0.5),
            batch.cache,
            batch.block_table,
            lengths,
            soft_cap=case.options.get("soft_cap"),
            sinks=case.options.get("sinks"),
            out=torch.full(query.shape, torch.nan),
            wide_offsets=wide_offsets,
        )
        return codec.unrotate(rotated), plan

    return decode


def assert_close(case: Case, batch: Batch, result: torch.Tensor) -> None:
    used = torch.tensor(case.lengths).repeat_interleave(case.query_len) > 0
    assert (result[~used] == 0).all()
    exact = batch.oracle(**case.options)
    error = (result[used].double() - exact).norm(dim=-1) / exact.norm(dim=-1)
    assert float(error.max()) <= TOLERANCE


@pytest.mark.parametrize("name", CASES)
def test_attention(name, decode):
    case = CASES[name]
    batch = case.batch()
    result, plan = decode(case, batch)
    assert_close(case, batch, result)
    assert (plan.counters is None) == (not case.fused)
    assert plan.counters is None or not plan.counters.any()
    assert plan.splits.splits[:, 1].max() >= min(case.splits, 2)


def test_the_order_of_programs_changes_no_bit(decode, machine):
    """Another one finishes last and merges."""
    case = CASES["splits"]
    batch = case.batch()
    first, _ = decode(case, batch)
    machine.backwards = True
    assert torch.equal(first, decode(case, batch)[0])


def test_offsets_of_64_bits_are_another_kernel_with_the_same_result(decode, machine):
    case = CASES["anchors"]
    batch = case.batch()
    narrow, _ = decode(case, batch)
    before = machine.kernels
    assert torch.equal(decode(case, batch, wide_offsets=True)[0], narrow)
    assert machine.kernels == before + 1
    decode(case, batch, wide_offsets=False)
    assert machine.kernels == before + 1
