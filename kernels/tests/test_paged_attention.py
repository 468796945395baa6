"""Attention over compressed pages against float64 attention over the decompressed vectors."""

from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from turboquant_kernels.codec import Codec
from turboquant_kernels.decode import reference
from turboquant_kernels.decode.reference import paged_attention
from turboquant_kernels.decode.tiles import CHUNK_TOKENS, TILE_QUERIES, tile_batch
from turboquant_kernels.formats import COMPRESSED_FORMATS, HEAD_DIMS, Encoding, KVFormat
from turboquant_kernels.packing import anchors_of
from turboquant_kernels.rotation import projection_matrix, rotation_matrix
from turboquant_kernels.store.reference import store

K4V4 = KVFormat(4, 4)

TOLERANCE = 1e-5
"""Relative error that float32 arithmetic may leave (GPU kernels: 5e-4)."""


@dataclass
class Batch:
    """Sequences in a paged cache whose blocks lie in random order; unused bytes are `filler`."""

    query_lens: list[int]
    seq_lens: list[int]
    fmt: KVFormat = K4V4
    head_dim: int = 64
    q_heads: int = 4
    kv_heads: int = 2
    block_size: int = 16
    filler: int = 0xFF  # an fp16 scale of these bytes is NaN
    seed: int = 0
    heavy: dict[int, float] | None = None
    """Positions of tokens and the scores that every query has with them. All other tokens' scores are near 0
    then, and values have a common part, so that what many light tokens add up to does not average out."""
    keys: list[torch.Tensor] = field(init=False)
    values: list[torch.Tensor] = field(init=False)

    def __post_init__(self):
        generator = torch.Generator().manual_seed(self.seed)

        def normal(tokens, heads):
            return torch.randn(tokens, heads, self.head_dim, generator=generator)

        self.codec = Codec(self.fmt, self.head_dim)
        self.keys = [normal(n, self.kv_heads) for n in self.seq_lens]
        self.values = [normal(n, self.kv_heads) for n in self.seq_lens]
        self.queries = [2 * normal(n, self.q_heads) for n in self.query_lens]
        if self.heavy is not None:
            self._make_heavy(normal(1, self.kv_heads))
        blocks = [-(-n // self.block_size) for n in self.seq_lens]
        total = sum(blocks) + 2
        order = torch.randperm(total, generator=generator).split([*blocks, 2])
        slot_bytes = self.fmt.slot_bytes(self.head_dim)
        block_bytes = self.kv_heads * self.fmt.page_bytes(self.head_dim, self.block_size)
        memory = torch.full((total, block_bytes), self.filler, dtype=torch.uint8)
        self.cache = memory[:, : self.block_size * self.kv_heads * slot_bytes].unflatten(
            1, (self.block_size, self.kv_heads, slot_bytes)
        )
        if self.fmt.anchor:
            self.anchors = anchors_of(self.cache, self.fmt, self.head_dim)
            self.anchors.copy_(4 * torch.randn(self.anchors.shape, generator=generator))
        # What stands in a block table beyond a sequence's blocks is anything.
        self.block_table = torch.full((len(blocks), max(blocks, default=0) + 1), 2**31 - 1, dtype=torch.int32)
        for i, n in enumerate(self.seq_lens):
            self.block_table[i, : blocks[i]] = order[i]
            position = torch.arange(n)
            slots = (
                self.block_table[i, position // self.block_size] * self.block_size
                + position % self.block_size
            )
            store(self.codec, self.keys[i], self.values[i], self.cache, slots)

    def _make_heavy(self, common):
        for keys, values, queries in zip(self.keys, self.values, self.queries, strict=True):
            keys *= 0.1
            values += common
            # The shortest keys with these scores.
            rows = queries.unflatten(1, (self.kv_heads, -1)).transpose(0, 1).flatten(1, 2)
            key = torch.linalg.pinv(rows).sum(-1) * self.head_dim**0.5
            for position, score in self.heavy.items():
                keys[position] = key * score
                values[position] -= common[0]

    def attend(self, **options):
        starts = torch.tensor([0, *self.query_lens]).cumsum(0).int()
        return paged_attention(
            self.codec,
            torch.cat(self.queries),
            self.cache,
            self.block_table,
            starts,
            torch.tensor(self.seq_lens, dtype=torch.int32),
            scale=self.head_dim**-0.5,
            **options,
        )

    def alone(self, i, **options):
        return paged_attention(
            self.codec,
            self.queries[i],
            self.cache,
            self.block_table[i : i + 1],
            torch.tensor([0, self.query_lens[i]]),
            torch.tensor([self.seq_lens[i]]),
            scale=self.head_dim**-0.5,
            **options,
        )

    def oracle(self, window=None, soft_cap=None, sinks=None):
        """float64 [num_tokens, q_heads, D], one sequence after the other, from the definition."""
        return torch.cat([self._oracle(i, window, soft_cap, sinks) for i in range(len(self.seq_lens))])

    def _oracle(self, i, window, soft_cap, sinks):
        group = self.q_heads // self.kv_heads
        codec = self.codec
        key = self._stored_keys(i).double().repeat_interleave(group, dim=1)
        value = (
            codec.decode_values(codec.encode_values(self.values[i])).double().repeat_interleave(group, dim=1)
        )
        score = torch.einsum("qhd,khd->hqk", self.queries[i].double(), key) * self.head_dim**-0.5
        if soft_cap:
            score = soft_cap * torch.tanh(score / soft_cap)
        key_position = torch.arange(self.seq_lens[i])
        query_position = self.seq_lens[i] - self.query_lens[i] + torch.arange(self.query_lens[i])[:, None]
        seen = key_position <= query_position
        if window is not None:
            seen &= key_position > query_position - window
        score = score.masked_fill(~seen, float("-inf"))
        if sinks is not None:
            sink = sinks.double()[:, None, None].expand(-1, self.query_lens[i], 1)
            score = torch.cat((score, sink), dim=-1)
            value = torch.cat((value, torch.zeros_like(value[:1])))
        return torch.einsum("hqk,khd->qhd", score.softmax(-1), value)

    def _stored_keys(self, i):
        """What the cache holds of a sequence's keys, its anchors included: float32 [seq_len, kv_heads, D]."""
        anchors = torch.zeros_like(self.keys[i])
        if self.fmt.anchor:
            position = torch.arange(self.seq_lens[i])
            block = self.block_table[i, position // self.block_size]
            anchors = self.anchors[block, position % self.block_size // 128].float()
        return self.codec.decode_keys(self.codec.encode_keys(self.keys[i] - anchors)) + anchors


def assert_matches(result, expected):
    assert result.shape == expected.shape
    error = (result - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)
    assert (error < TOLERANCE).all()


MIXED = {"query_lens": [1, 7, 1, 200, 40], "seq_lens": [50, 7, 1300, 260, 41]}
"""Decode steps, a fresh prompt, a chunk after a prefix, a prompt whose first token is cached."""


@pytest.mark.parametrize("fmt", COMPRESSED_FORMATS, ids=lambda fmt: fmt.name)
def test_every_format_in_a_mixed_batch(fmt):
    batch = Batch(**MIXED, fmt=fmt)
    assert_matches(batch.attend(), batch.oracle())


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("fmt", [KVFormat(5, 3), KVFormat(3, 4, Encoding.PROD)], ids=lambda fmt: fmt.name)
def test_every_head_dim(fmt, head_dim):
    batch = Batch([1, 20], [70, 20], fmt=fmt, head_dim=head_dim)
    assert_matches(batch.attend(), batch.oracle())


@pytest.mark.parametrize(("q_heads", "kv_heads"), [(1, 1), (3, 3), (8, 1), (14, 2), (16, 1), (6, 2)])
def test_grouped_query_heads(q_heads, kv_heads):
    batch = Batch([1, 20], [70, 20], q_heads=q_heads, kv_heads=kv_heads)
    assert_matches(batch.attend(), batch.oracle())


@pytest.mark.parametrize("block_size", [16, 32, 48, 128])
def test_block_sizes(block_size):
    batch = Batch(**MIXED, block_size=block_size)
    assert_matches(batch.attend(), batch.oracle())


@pytest.mark.parametrize("window", [1, 2, 15, 16, 17, 100, 1000, 10_000])
def test_a_sliding_window_counts_the_query_itself(window):
    batch = Batch(**MIXED)
    assert_matches(batch.attend(window=window), batch.oracle(window=window))


def test_a_window_of_one_sees_its_own_value_alone():
    batch = Batch([3], [90])
    own = batch.codec.decode_values(batch.codec.encode_values(batch.values[0][-3:])).repeat_interleave(
        2, dim=1
    )
    assert torch.allclose(batch.attend(window=1), own, atol=1e-5)


def test_logit_soft_cap():
    batch = Batch(**MIXED)
    assert_matches(batch.attend(soft_cap=1.5), batch.oracle(soft_cap=1.5))
    assert torch.equal(batch.attend(soft_cap=0), batch.attend())


def test_attention_sinks_take_weight_and_give_no_value():
    batch = Batch(**MIXED)
    sinks = torch.tensor([0.0, 3.0, -2.0, 8.0])
    assert_matches(batch.attend(sinks=sinks), batch.oracle(sinks=sinks))


def test_window_cap_and_sinks_together():
    batch = Batch(**MIXED, fmt=KVFormat(8, 8), q_heads=6)
    options = {"window": 30, "soft_cap": 5.0, "sinks": torch.linspace(-1, 4, 6)}
    assert_matches(batch.attend(**options), batch.oracle(**options))


@pytest.mark.parametrize("window", [None, 1, 100, 200])
@pytest.mark.parametrize("block_size", [128, 256])
@pytest.mark.parametrize("encoding", [Encoding.MSE, Encoding.PROD])
def test_anchors_are_added_to_the_keys_of_their_128_tokens(encoding, block_size, window):
    batch = Batch(**MIXED, fmt=KVFormat(4, 3, encoding, anchor=True), block_size=block_size)
    options = {"window": window, "soft_cap": 20.0}
    assert_matches(batch.attend(**options), batch.oracle(**options))


def test_an_anchor_takes_the_common_part_out_of_the_error():
    """What anchors are for: keys with a large constant part, as some models' biases give them."""
    constant = 30 * torch.randn(64, generator=torch.Generator().manual_seed(1)).bfloat16().float()

    def error(anchor):
        batch = Batch([1], [128], fmt=KVFormat(4, 8, anchor=anchor), block_size=128, kv_heads=1)
        batch.keys[0] += constant
        if anchor:
            batch.anchors[:] = constant
        slots = batch.block_table[0, 0] * 128 + torch.arange(128)
        store(batch.codec, batch.keys[0], batch.values[0], batch.cache, slots)
        exact = torch.einsum("qhd,kgd->hqk", batch.queries[0].double(), batch.keys[0].double()) / 8
        expected = torch.einsum("hqk,kgd->qhd", exact.softmax(-1), batch.values[0].double())
        return float((batch.attend() - expected).norm() / expected.norm())

    assert error(anchor=True) < 0.3 < 1 < error(anchor=False)


@settings(max_examples=40)
@given(data=st.data(), window=st.none() | st.integers(1, 300), block_size=st.sampled_from([16, 32, 64]))
def test_any_ragged_batch(data, window, block_size):
    seq_lens = data.draw(st.lists(st.integers(1, 400), min_size=1, max_size=5))
    query_lens = [data.draw(st.integers(0, n)) for n in seq_lens]
    batch = Batch(query_lens, seq_lens, block_size=block_size, head_dim=64, q_heads=2, kv_heads=1)
    assert_matches(batch.attend(window=window), batch.oracle(window=window))


@pytest.mark.parametrize("length", [*CHUNK_TOKENS, 2048, *(n + 1 for n in CHUNK_TOKENS), 2049])
def test_contexts_that_end_at_a_chunk_and_one_after(length):
    batch = Batch([1], [length], fmt=KVFormat(3, 3), q_heads=1, kv_heads=1)
    assert_matches(batch.attend(), batch.oracle())


@pytest.mark.parametrize("count", [n + d for n in TILE_QUERIES for d in (-1, 0, 1) if n + d > 0])
def test_query_lengths_around_a_tile(count):
    batch = Batch([count], [count + 5], q_heads=2, kv_heads=1)
    assert_matches(batch.attend(), batch.oracle())


@pytest.mark.parametrize("position", [320, 1500, 2999])
def test_one_token_far_above_the_rest_is_found(position):
    """In the first, a middle and the last chunk: what was summed before it must be rescaled."""
    batch = Batch([1], [3000])
    key, value = 4 * batch.queries[0][0, ::2], batch.values[0][position]
    slot = batch.block_table[0, position // 16] * 16 + position % 16
    store(batch.codec, key[None], value[None], batch.cache, slot[None])
    batch.keys[0][position] = key
    assert_matches(batch.attend(), batch.oracle())


@pytest.mark.parametrize("filler", [0x00, 0x7C, 0xFF], ids=["zeros", "large", "NaN"])
def test_bytes_that_were_never_written_change_nothing(filler):
    """0xFFFF is an fp16 NaN, 0x7C7C another; both stand in every unused slot of the pages that are read."""
    batch = Batch(**MIXED, filler=filler)
    clean = Batch(**MIXED, filler=0x01)
    assert torch.equal(batch.attend(), clean.attend())
    assert torch.equal(batch.attend(window=20), clean.attend(window=20))


def test_unused_prod_norms_change_nothing():
    fmt = KVFormat(3, 3, Encoding.PROD)
    batch = Batch([1, 5], [20, 37], fmt=fmt)
    assert torch.equal(batch.attend(), Batch([1, 5], [20, 37], fmt=fmt, filler=0x01).attend())


def test_a_repeat_gives_the_same_bits():
    batch = Batch(**MIXED)
    assert torch.equal(batch.attend(), batch.attend())


@pytest.mark.parametrize("options", [{}, {"window": 64}, {"soft_cap": 3.0}])
def test_a_sequence_alone_gives_the_bits_it_gives_in_a_batch(options):
    batch = Batch([1, 7, 1, 200, 1, 40], [50, 7, 2300, 260, 50, 41], head_dim=128, q_heads=8)
    together = batch.attend(**options).split(batch.query_lens)
    for i, rows in enumerate(together):
        assert torch.equal(batch.alone(i, **options), rows)


def test_the_bound_of_scratch_memory_changes_no_bit(monkeypatch):
    batch = Batch(**MIXED)
    expected = batch.attend()
    monkeypatch.setattr(reference, "SCRATCH_BYTES", 1)
    assert torch.equal(batch.attend(), expected)


def test_shared_tiles_give_the_same_bits():
    batch = Batch(**MIXED)
    starts = torch.tensor([0, *batch.query_lens]).cumsum(0)
    tiles = tile_batch(starts, torch.tensor(batch.seq_lens), window=20)
    assert torch.equal(batch.attend(window=20, tiles=tiles), batch.attend(window=20))


def test_tiles_cover_every_query_once():
    starts = torch.tensor([0, 1, 1, 301, 317])
    tiles = tile_batch(starts, torch.tensor([9, 30, 700, 16]), window=None)
    rows = torch.cat([rows[used] for rows, used in (group.rows() for group in tiles)])
    assert sorted(rows.tolist()) == list(range(317))


def test_the_shape_of_a_tile_is_its_own_sequences():
    """So that rounding, which differs with the shape of a product, does not depend on neighbours."""
    lengths = [(1, 50), (7, 7), (1, 2300), (200, 260), (16, 400)]

    def shapes(batch):
        starts = torch.tensor([0, *(queries for queries, _ in batch)]).cumsum(0)
        tiles = tile_batch(starts, torch.tensor([tokens for _, tokens in batch]), window=None)
        return sorted((group.width, group.chunk) for group in tiles for _ in range(len(group)))

    assert shapes(lengths) == sorted(shape for one in lengths for shape in shapes([one]))


def test_a_window_skips_the_context_before_it():
    """Work is bounded by the window, not by the sequence."""
    tiles = tile_batch(torch.tensor([0, 1, 129]), torch.tensor([100_000, 100_000]), window=512)
    assert all(int(group.context().max()) <= 512 + 128 + 16 for group in tiles)


def test_the_engines_default_dtype_changes_nothing():
    """vLLM sets torch's default dtype to the model's while it builds the layers."""
    batch = Batch(**MIXED, fmt=KVFormat(4, 3, Encoding.PROD))
    expected = batch.attend()
    rotation_matrix.cache_clear()
    projection_matrix.cache_clear()
    torch.set_default_dtype(torch.bfloat16)
    try:
        batch.codec = Codec(batch.fmt, batch.head_dim)
        assert torch.equal(batch.attend(), expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_padding_rows_are_zero():
    batch = Batch([1, 3], [20, 30])
    batch.queries.append(torch.full((5, 4, 64), float("nan")))
    result = paged_attention(
        batch.codec,
        torch.cat(batch.queries),
        batch.cache,
        batch.block_table,
        torch.tensor([0, 1, 4]),
        torch.tensor([20, 30]),
        scale=0.125,
    )
    assert_matches(result[:4], batch.oracle())
    assert not result[4:].any()


def test_sequences_without_queries_or_tokens():
    batch = Batch([1, 0, 2], [20, 30, 40])
    assert_matches(batch.attend(), batch.oracle())
    empty = paged_attention(
        batch.codec,
        torch.randn(2, 4, 64),
        batch.cache,
        batch.block_table,
        torch.tensor([0, 1, 2, 2]),
        torch.tensor([0, 20, 0]),
        scale=0.125,
    )
    assert not empty[0].any()
    assert empty[1].any()


def test_the_result_has_the_querys_dtype_or_fills_out():
    batch = Batch([1, 20], [20, 30])
    exact = batch.attend()
    batch.queries = [query.bfloat16() for query in batch.queries]
    rounded = batch.attend()
    assert rounded.dtype == torch.bfloat16
    out = torch.empty(21, 4, 64)
    assert batch.attend(out=out) is out
    assert torch.equal(out.bfloat16(), rounded)
    assert torch.allclose(out, exact, atol=0.05)
