"""Decode with a raw block, from queries to output, against the readable attention: both kernels of stored
tokens and the one that finishes.

An engine is fed in steps, so the cache holds encoded blocks and raw tokens. Before the kernels run all memory
that no query may see becomes NaN.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from test_hopper_kernel import compiled, machine  # noqa: F401 (fixtures)
from test_portable_decode import on
from test_raw_block import Engine, relative_error

from turboquant_kernels.decode import finish
from turboquant_kernels.decode import plan as decode_plan
from turboquant_kernels.decode.plan import DecodePlan, DecodeShape, paged_decode
from turboquant_kernels.formats import BLOCK_TOKENS, KVFormat
from turboquant_kernels.raw_block import RawBlocks

TOLERANCE = 5e-4
SINKS = torch.tensor([0.5, -2.0, 3.0, 8.0])

needs_machine = pytest.mark.skipif(
    torch.cuda.is_available(),
    reason="schedule and finish run in Triton's interpreter, of which a GPU takes the place",
)


@dataclass(frozen=True)
class Case:
    """Sequences in the step that their last `query_len` tokens bring."""

    lengths: tuple[int, ...]
    fmt: str = "tq-k4v4"
    head_dim: int = 64
    group: int = 2
    kv_heads: int = 1
    query_len: int = 1
    anchor: bool = False
    dtype: torch.dtype = torch.bfloat16
    multiprocessors: int = 1
    """More of them have more splits, and fewer rows a program that finishes."""
    options: dict[str, Any] = field(default_factory=dict)

    def engine(self) -> Engine:
        return Engine(
            self.lengths,
            replace(KVFormat.parse(self.fmt), anchor=self.anchor),
            head_dim=self.head_dim,
            kv_heads=self.kv_heads,
            q_heads=self.group * self.kv_heads,
            dtype=self.dtype,
        )

    def shape(self, engine: Engine, cache: torch.Tensor) -> DecodeShape:
        return DecodeShape.of(
            engine.codec,
            cache,
            engine.table,
            q_heads=self.group * self.kv_heads,
            query_len=self.query_len,
            window=self.options.get("window"),
            raw=engine.raw,
        )


AROUND = (1, 127, 128, 129, 256, 257)
"""Lengths around the ends of blocks."""
CASES = {
    "around the ends of blocks": Case(AROUND),
    "two query tokens": Case((2, 128, 129, 130, 257), query_len=2),
    "four query tokens": Case((4, 128, 129, 131, 258), query_len=4, kv_heads=2),
    "empty sequences": Case((0, 130, 0, 20)),
    "only empty and short ones": Case((0, 3, 128)),
    "splits": Case((700, 300), kv_heads=2, multiprocessors=4),
    "more splits than are merged at once": Case((1100,), group=4),
    "key anchors": Case((300, 129), anchor=True, query_len=2, multiprocessors=2),
    "window within a block": Case((150, 130, 257), query_len=2, options={"window": 20}),
    "window of a block": Case((128, 256, 300), options={"window": BLOCK_TOKENS}),
    "window of several blocks": Case((150, 390, 515), query_len=2, options={"window": 200}),
    "window and anchors": Case((390,), anchor=True, options={"window": 200}),
    "window of one": Case((128, 129, 200), options={"window": 1}),
    "soft cap": Case((200,), options={"soft_cap": 2.0}),
    "sinks": Case((300, 90), group=4, options={"sinks": SINKS}),
    "sinks, window, soft cap, query tokens": Case(
        (258, 100), group=4, query_len=4, options={"sinks": SINKS, "window": 150, "soft_cap": 5.0}
    ),
    "one query head": Case((200,), group=1, kv_heads=2),
    "eight query heads": Case((200,), group=8),
    "rows that no power of two is": Case((258,), group=3, query_len=3, kv_heads=2),
    "more rows than a program has": Case((259,), group=8, query_len=4),
    "rows of several programs": Case((258, 40), group=3, query_len=4, multiprocessors=6),
    "fp16": Case((200,), dtype=torch.float16),
    "k2v2, small blocks": Case((258,), "tq-k2v2", query_len=3),
    "k8v8, large blocks": Case((258,), "tq-k8v8", query_len=3),
    "k5v3": Case((200,), "tq-k5v3", anchor=True),
    "D 80": Case((200,), head_dim=80),
    "D 96": Case((258,), head_dim=96, query_len=2),
    "D 128": Case((200,), head_dim=128, group=4),
    "D 192": Case((200,), head_dim=192),
    "D 256": Case((258,), head_dim=256, query_len=2),
}
HOPPER = {
    "around the ends of blocks": Case((128, 129, 257)),
    **{
        name: CASES[name]
        for name in (
            "four query tokens",
            "empty sequences",
            "splits",
            "key anchors",
            "window within a block",
            "window of several blocks",
            "sinks, window, soft cap, query tokens",
            "rows of several programs",
            "k8v8, large blocks",
            "D 80",
            "D 256",
        )
    },
}
PROD = {
    "k3v4": Case((300,), "tq-k3v4-prod", query_len=2, options={"window": 250}),
    "k4v2, anchors": Case((258,), "tq-k4v2-prod", 80, anchor=True, query_len=2),
}


def poison(engine: Engine, lengths: torch.Tensor, query_len: int, window: int | None) -> None:
    """Makes NaN of all memory but stored blocks and the raw tokens that a query sees."""
    whole = engine.cache.as_strided((len(engine.cache), engine.cache.stride(0)), (engine.cache.stride(0), 1))
    before = whole.clone()
    raw = engine.raw.view(engine.cache, engine.codec.head_dim)
    tokens = raw.clone()
    whole.fill_(0xFF)
    for table, length in zip(engine.table.long(), lengths.tolist(), strict=True):
        stored = table[: max(0, length - 1) // BLOCK_TOKENS]
        whole[stored] = before[stored]
        for position in range(max(0, length - query_len), length):
            begin = position // BLOCK_TOKENS * BLOCK_TOKENS
            seen = torch.arange(begin if window is None else max(begin, position + 1 - window), position + 1)
            entry, index = engine.raw.place(seen)
            raw[table[entry], :, :, index] = tokens[table[entry], :, :, index]


def feed(case: Case) -> tuple[Engine, torch.Tensor, torch.Tensor, torch.Tensor]:
    """An engine after the case's step: with its lengths, queries, and the readable attention's output."""
    engine, n = case.engine(), case.query_len
    chunks = {i: (0, length - n) for i, length in enumerate(case.lengths) if length > n}
    if chunks:
        engine.step(chunks)
    outputs = engine.step(
        {i: (length - n, length) for i, length in enumerate(case.lengths) if length}, options=case.options
    )
    nothing = torch.zeros(n, case.group * case.kv_heads, case.head_dim)
    expected = torch.cat([outputs.get(i, nothing) for i in range(len(case.lengths))])
    query = torch.cat([query[-n:] if len(query) else nothing.to(case.dtype) + 1 for query in engine.queries])
    lengths = torch.tensor(case.lengths, dtype=torch.int32)
    engine.table[lengths == 0] = 2**31 - 1
    poison(engine, lengths, n, case.options.get("window"))
    return engine, lengths, query, expected


def check(case: Case, path: str, device: str, monkeypatch: Any) -> DecodePlan:
    engine, lengths, query, expected = feed(case)
    cache = on(device, engine.cache)
    monkeypatch.setattr(decode_plan, "_multiprocessors", lambda _: case.multiprocessors)
    plan = DecodePlan(case.shape(engine, cache), cache.device, path=path)
    plan.schedule(lengths.to(device))
    for memory in (plan.partial, plan.stats):
        memory.fill_(torch.nan)
    options = {name: x.to(device) if name == "sinks" else x for name, x in case.options.items()}
    options.pop("window", None)  # of the shape
    out = plan.run(
        query.to(device),
        cache,
        engine.table.to(device),
        lengths.to(device),
        scale=case.head_dim**-0.5,
        out=torch.full(query.shape, torch.nan, device=device),
        **options,
    ).cpu()
    empty = (lengths == 0).repeat_interleave(case.query_len)
    assert (out[empty] == 0).all()
    error = (out - expected)[~empty].norm(dim=-1) / expected[~empty].norm(dim=-1)
    assert float(error.max()) <= TOLERANCE
    return plan


@pytest.mark.parametrize("name", CASES)
def test_portable(name, device, monkeypatch):
    check(CASES[name], "portable", device, monkeypatch)


@pytest.mark.parametrize("name", PROD)
def test_portable_with_prod_formats(name, device, monkeypatch):
    check(PROD[name], "portable", device, monkeypatch)


@needs_machine
@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize("name", HOPPER)
def test_hopper(name, monkeypatch):
    plan = check(HOPPER[name], "hopper", "cpu", monkeypatch)
    assert plan.counters is None


def decoded(case: Case, engine: Engine, query: torch.Tensor, device: str) -> torch.Tensor:
    return paged_decode(
        engine.codec,
        query.to(device),
        on(device, engine.cache),
        engine.table.to(device),
        torch.tensor(case.lengths, dtype=torch.int32, device=device),
        query_len=case.query_len,
        scale=case.head_dim**-0.5,
        raw=engine.raw,
        path="portable",
    ).cpu()


def test_the_output_has_the_dtype_of_queries(device):
    case = Case((130,))
    engine, _, query, expected = feed(case)
    out = decoded(case, engine, query, device)
    assert out.dtype == torch.bfloat16
    assert relative_error(out, expected.double()) < 2**-8


def test_queries_of_another_dtype_than_raw_tokens_are_refused(device):
    case = Case((130,))
    engine, _, query, _ = feed(case)
    with pytest.raises(ValueError, match=r"queries are .*float16"):
        decoded(case, engine, query.half(), device)


def test_a_query_that_is_not_finite_has_no_sound_output(device):
    """Of its own rows; those of other query tokens and sequences stay as they are."""
    case = Case((130, 20), query_len=2)
    engine, _, query, _ = feed(case)
    sound = decoded(case, engine, query, device)
    query[1, 0, 3] = torch.inf
    out = decoded(case, engine, query, device)
    assert out[1, 0].isnan().all()
    out[1, 0] = sound[1, 0]
    assert torch.equal(out, sound)


def test_rejected_drafts_leave_no_trace(device):
    """The block that they completed is encoded again, with the tokens that took their places."""
    case = Case((130,), query_len=2)
    engine = case.engine()
    engine.step({0: (0, 126)})
    engine.step({0: (126, 128)}, poison={0: 1})
    engine.step({0: (127, 129)}, poison={0: 1})
    expected = engine.step({0: (128, 130)})[0]
    out = decoded(case, engine, engine.queries[0][-2:], device)
    assert relative_error(out, expected.double()) < 2**-8


@pytest.mark.parametrize(
    ("rows", "heads", "multiprocessors", "taken"),
    [
        (4, 512, 132, 4),
        (4, 8, 132, 1),
        (4, 72, 132, 2),
        (12, 512, 132, 16),
        (64, 512, 132, 16),
        (1, 8, 132, 1),
    ],
)
def test_a_program_takes_all_rows_where_there_are_programs_enough(rows, heads, multiprocessors, taken):
    assert finish.rows_of(rows, heads, multiprocessors) == taken


def test_shapes_that_have_no_raw_block_are_refused():
    engine = Case((130,)).engine()

    def shape(raw, cache=engine.cache, query_len=1):
        return DecodeShape.of(engine.codec, cache, engine.table, q_heads=2, query_len=query_len, raw=raw)

    assert shape(engine.raw) != shape(None)
    with pytest.raises(ValueError, match="blocks of 64 tokens"):
        shape(engine.raw, engine.cache.view(-1, 64, *engine.cache.shape[2:]))
    with pytest.raises(ValueError, match="bf16 or fp16"):
        shape(RawBlocks(4, torch.float32))
    with pytest.raises(ValueError, match="33 query tokens a sequence, more than the 32"):
        shape(RawBlocks(4, torch.bfloat16), query_len=33)
