"""The rule of the raw block: what a query sees follows from positions alone, however the tokens came."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from turboquant_kernels.codec import Codec
from turboquant_kernels.decode.reference import paged_attention
from turboquant_kernels.formats import BLOCK_TOKENS, COMPRESSED_FORMATS, HEAD_DIMS, KVFormat
from turboquant_kernels.packing import anchors_of
from turboquant_kernels.raw_block import OwnTokens, RawBlocks, Step
from turboquant_kernels.store.reference import block_mean, store_step

K5V3 = KVFormat(5, 3, anchor=True)
TOLERANCE = 2e-5


class Engine:
    """Sequences in one cache, which get their tokens in steps. What nobody wrote is NaN or `filler`."""

    def __init__(
        self,
        lengths,
        fmt=K5V3,
        *,
        head_dim=64,
        kv_heads=2,
        q_heads=4,
        dtype=torch.float32,
        seed=0,
        filler=0xFF,
    ):
        draw = torch.Generator().manual_seed(seed)
        self.codec, self.kv_heads = Codec(fmt, head_dim), kv_heads
        # Keys with a part that all share, as a bias makes it.
        self.keys, self.values, self.queries = (
            [torch.randn(n, heads, head_dim, generator=draw).to(dtype) + shift for n in lengths]
            for heads, shift in ((kv_heads, 3), (kv_heads, 0), (q_heads, 0))
        )
        self.raw = RawBlocks(fmt.raw_blocks(head_dim, dtype.itemsize), dtype)
        blocks = [-(-n // BLOCK_TOKENS) + self.raw.blocks for n in lengths]
        total = sum(blocks) + 1
        memory = torch.full((total, kv_heads * BLOCK_TOKENS * fmt.token_bytes(head_dim)), filler).to(
            torch.uint8
        )
        slot_bytes = fmt.slot_bytes(head_dim)
        self.cache = memory[:, : BLOCK_TOKENS * kv_heads * slot_bytes].unflatten(
            1, (BLOCK_TOKENS, kv_heads, slot_bytes)
        )
        self.table = torch.full((len(blocks), max(blocks)), 2**31 - 1, dtype=torch.int32)
        order = (torch.randperm(total - 1, generator=draw) + 1).int().split(blocks)
        for row, numbers in zip(self.table, order, strict=True):
            row[: len(numbers)] = numbers

    def batch(self, parts, poison=None):
        """The step {sequence: (first position, end)}, its keys, values and queries.

        poison: of each sequence how many of its last tokens are drafts that will be rejected.
        """
        starts = torch.tensor([0, *(end - first for first, end in parts.values())]).cumsum(0).int()
        rows = [(i, p) for i, (first, end) in parts.items() for p in range(first, end)]
        key, value, query = (
            torch.stack([tensors[i][p] for i, p in rows])
            for tensors in (self.keys, self.values, self.queries)
        )
        for sequence, count in (poison or {}).items():
            end = int(starts[list(parts).index(sequence) + 1])
            key[end - count : end], value[end - count : end] = 99.0, -99.0
        block, offset = zip(*(divmod(p, BLOCK_TOKENS) for _, p in rows), strict=True)
        slots = torch.stack(
            [self.table[i, b] * BLOCK_TOKENS + o for (i, _), b, o in zip(rows, block, offset, strict=True)]
        )
        lengths = torch.tensor([end for _, end in parts.values()], dtype=torch.int32)
        return Step(starts, lengths, self.table[list(parts)], slots), key, value, query

    def step(self, parts, *, options=None, poison=None):
        """One step of a `batch`: the output of each sequence's tokens."""
        step, key, value, query = self.batch(parts, poison)
        own = OwnTokens.of(step, self.raw, self.cache, key, value)
        store_step(self.codec, own, self.cache, self.raw)
        out = paged_attention(
            self.codec,
            query.float(),
            self.cache,
            step.block_table,
            step.query_start_loc,
            step.seq_lens,
            scale=self.codec.head_dim**-0.5,
            own=own,
            **(options or {}),
        )
        return dict(zip(parts, out.split(step.query_lens.tolist()), strict=True))

    def expected(self, i, window=None, soft_cap=None, sinks=None):
        """float64 [length, q_heads, D], from the definition."""
        codec, length = self.codec, len(self.keys[i])
        group = self.queries[i].shape[1] // self.kv_heads
        stored = length // BLOCK_TOKENS * BLOCK_TOKENS
        blocks = self.keys[i][:stored].float().unflatten(0, (-1, BLOCK_TOKENS))
        mean = block_mean(blocks)[:, None].float() * codec.fmt.anchor
        keys = (codec.decode_keys(codec.encode_keys(blocks - mean)) + mean).flatten(0, 1)
        values = codec.decode_values(codec.encode_values(self.values[i][:stored]))

        def see(raw, decoded, position):
            own = position // BLOCK_TOKENS * BLOCK_TOKENS
            seen = torch.cat((decoded[:own].double(), raw[own : position + 1].double()))
            return seen[0 if window is None else max(0, position + 1 - window) :].repeat_interleave(
                group, dim=1
            )

        out = []
        for position, query in enumerate(self.queries[i].double()):
            score = (
                torch.einsum("hd,khd->hk", query, see(self.keys[i], keys, position)) * codec.head_dim**-0.5
            )
            if soft_cap:
                score = soft_cap * torch.tanh(score / soft_cap)
            if sinks is not None:
                score = torch.cat((score, sinks.double()[:, None]), dim=1)
            weight = score.softmax(-1)[:, : -1 if sinks is not None else None]
            out.append(torch.einsum("hk,khd->hd", weight, see(self.values[i], values, position)))
        return torch.stack(out)


def cut(length, ends):
    """Parts of a sequence that end at the given positions."""
    ends = sorted({min(end, length) for end in ends} | {length})
    return list(zip([0, *ends], ends, strict=False))


def relative_error(got, expected):
    return float((got.double() - expected).norm() / expected.norm())


OPTIONS = [{}, {"window": 100}, {"window": 200, "soft_cap": 2.0}, {"sinks": torch.linspace(-1, 3, 4)}]


@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "window", "soft-cap", "sinks"])
@pytest.mark.parametrize(
    "ends", [[300], [128, 256], [100, 200], [127, 129, 130, 255, 257], [5, 290], range(1, 300, 3)], ids=str
)
def test_what_a_query_sees_does_not_depend_on_chunks(ends, options):
    engine = Engine([300])
    out = [engine.step({0: part}, options=options)[0] for part in cut(300, ends)]
    assert relative_error(torch.cat(out), engine.expected(0, **options)) < TOLERANCE


@settings(deadline=None, max_examples=25)
@given(
    st.sampled_from(COMPRESSED_FORMATS),
    st.sampled_from(HEAD_DIMS),
    st.booleans(),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.lists(st.integers(1, 420), min_size=1, max_size=4),
    st.randoms(use_true_random=False),
)
def test_batches_of_sequences_in_all_formats(fmt, head_dim, anchor, dtype, lengths, random):
    engine = Engine(
        lengths, replace(fmt, anchor=anchor), head_dim=head_dim, dtype=dtype, seed=random.randrange(99)
    )
    rest = {
        i: cut(n, random.sample(range(1, n + 1), min(n, random.randrange(5)))) for i, n in enumerate(lengths)
    }
    outputs = {i: [] for i in rest}
    while any(rest.values()):
        chosen = [i for i in rest if rest[i] and random.random() < 0.7]
        if chosen:
            for i, out in engine.step({i: rest[i].pop(0) for i in chosen}).items():
                outputs[i].append(out)
    for i, out in outputs.items():
        assert relative_error(torch.cat(out), engine.expected(i)) < TOLERANCE


@pytest.mark.parametrize("rejected", [1, 7])
@pytest.mark.parametrize("drafts", [1, 3, 7])
@pytest.mark.parametrize("length", [120, 127, 128, 251])
def test_rejected_drafts_leave_no_trace(length, drafts, rejected):
    """Steps of one token and some drafts, of which the last ones are rejected each time."""
    engine = Engine([300])
    out = [engine.step({0: (0, length)})[0]]
    position = length
    while position < 300:
        end = min(300, position + 1 + drafts)
        wrong = min(rejected, end - position - 1)
        out.append(engine.step({0: (position, end)}, poison={0: wrong})[0][: end - wrong - position])
        position = end - wrong
    assert relative_error(torch.cat(out), engine.expected(0)) < TOLERANCE


def test_first_block_is_raw():
    engine = Engine([BLOCK_TOKENS], KVFormat(2, 2))
    out = engine.step({0: (0, BLOCK_TOKENS)})[0]
    key, value = (
        x.transpose(0, 1).double().repeat_interleave(2, dim=0) for x in (engine.keys[0], engine.values[0])
    )
    plain = torch.nn.functional.scaled_dot_product_attention(
        engine.queries[0].transpose(0, 1).double(), key, value, is_causal=True
    )
    assert relative_error(out, plain.transpose(0, 1)) < TOLERANCE


def test_a_block_is_stored_as_the_same_bytes_however_it_came():
    def stored(ends):
        engine = Engine([300])
        for part in cut(300, ends):
            engine.step({0: part})
        blocks = engine.table[0, :2].long()
        return engine.cache[blocks], anchors_of(engine.cache, K5V3, 64)[blocks]

    whole = stored([300])
    for ends in ([128, 256], [1, 2, 130, 250], range(1, 300)):
        assert all(map(torch.equal, stored(ends), whole))


def test_a_row_without_a_slot_is_not_stored():
    engine = Engine([200])
    before = engine.cache.clone()
    step = Step(torch.tensor([0, 3]), torch.tensor([129]), engine.table, torch.tensor([-1, -1, -1]))
    key = torch.zeros(3, 2, 64)
    own = OwnTokens.of(step, engine.raw, engine.cache, key, key)
    store_step(engine.codec, own, engine.cache, engine.raw)
    assert torch.equal(engine.cache, before)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_no_fault_of_one_sequence_reaches_another(order):
    """NaN in one sequence's tokens, and in all memory that nobody wrote."""
    engine = Engine([300, 200])
    engine.keys[0][:], engine.values[0][:] = torch.nan, torch.nan
    steps = {0: (0, 150), 1: (0, 140)}, {0: (150, 300), 1: (140, 200)}
    out = [engine.step({i: parts[i] for i in order}) for parts in steps]
    got = torch.cat([part[1] for part in out])
    assert relative_error(got, engine.expected(1)) < TOLERANCE
    assert out[0][0].isnan().all()


@pytest.mark.parametrize("fmt", COMPRESSED_FORMATS, ids=lambda fmt: fmt.name)
@pytest.mark.parametrize("element_bytes", [2, 4])
def test_neighbouring_raw_blocks_share_no_bytes(fmt, element_bytes):
    for head_dim in HEAD_DIMS:
        raw = RawBlocks(
            fmt.raw_blocks(head_dim, element_bytes), torch.float32 if element_bytes == 4 else torch.bfloat16
        )
        assert raw.tokens_per_block * 2 * head_dim * element_bytes <= BLOCK_TOKENS * fmt.token_bytes(head_dim)
        position = torch.arange(BLOCK_TOKENS, 2 * BLOCK_TOKENS + raw.tokens_per_block)
        entry, index = raw.place(position)
        assert len(set(zip(entry.tolist(), index.tolist(), strict=True))) == len(position)
        # Behind the block that is filled, within the blocks that a sequence has.
        assert ((entry > position // BLOCK_TOKENS) & (entry <= position // BLOCK_TOKENS + raw.blocks)).all()


def test_block_mean_is_finite():
    key = torch.randn(BLOCK_TOKENS, 1, 64)
    assert torch.allclose(block_mean(key).float(), key.mean(0), atol=1e-2)
    key[3, 0, 5], key[4, 0, 6] = torch.nan, torch.inf
    assert block_mean(key)[0, 5:7].tolist() == [0, 0]
    assert block_mean(torch.full((BLOCK_TOKENS, 1, 64), 3e38)).isfinite().all()
