"""New tokens are kept raw and complete blocks encoded as by the readable `store_step`: in Triton's
interpreter, on a GPU where there is one."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from store_agreement import assert_same_as_step, memory_of

from turboquant_kernels.codec import Codec
from turboquant_kernels.formats import BLOCK_TOKENS, COMPRESSED_FORMATS, KVFormat
from turboquant_kernels.packing import anchors_of
from turboquant_kernels.raw_block import RawBlocks, Step
from turboquant_kernels.store import block_kernel
from turboquant_kernels.store.block_kernel import store_decodes, store_prefills
from turboquant_kernels.store.chunks import plan_blocks

K5V3 = KVFormat(5, 3, anchor=True)


class Sequences:
    """Sequences of one cache, whose bytes are all those of some vectors before anything is stored: so are the
    raw tokens of blocks that no step began."""

    def __init__(
        self, lengths, fmt=K5V3, head_dim=64, *, dtype=torch.bfloat16, kv_heads=1, raw_blocks=None, device
    ):
        self.codec, self.device = Codec(fmt, head_dim), torch.device(device)
        self.raw = RawBlocks(raw_blocks or fmt.raw_blocks(head_dim, dtype.itemsize), dtype)
        # Keys with a part that all share, of which the anchor is to take most.
        bias = torch.arange(head_dim) % 7
        self.keys = [(torch.randn(n, kv_heads, head_dim) + bias).to(dtype) for n in lengths]
        self.values = [torch.randn(n, kv_heads, head_dim).to(dtype) for n in lengths]
        blocks = [-(-n // BLOCK_TOKENS) + self.raw.blocks for n in lengths]
        total = sum(blocks) + 1
        slot_bytes = fmt.slot_bytes(head_dim)
        # Something else stands between the blocks.
        stride = kv_heads * BLOCK_TOKENS * fmt.token_bytes(head_dim) + 48
        memory = torch.randn(total, stride // 2).to(dtype).view(torch.uint8)
        pages = memory[:, : BLOCK_TOKENS * kv_heads * slot_bytes]
        self.cache = pages.unflatten(1, (BLOCK_TOKENS, kv_heads, slot_bytes))
        self.table = torch.zeros(len(lengths), max(blocks), dtype=torch.int32)
        for row, numbers in zip(self.table, (torch.randperm(total - 1) + 1).int().split(blocks), strict=True):
            row[: len(numbers)] = numbers

    def step(self, parts, *, unstored=(), padding=0):
        """The step that brings positions `first` to `end` of each sequence, parts: [(first, end), ...].

        unstored: rows without a slot. padding: such rows behind the last sequence.
        """
        starts = torch.tensor([0, *(end - first for first, end in parts)]).cumsum(0).int()
        positions = [(i, p) for i, (first, end) in enumerate(parts) for p in range(first, end)]
        slots = [
            int(self.table[i, p // BLOCK_TOKENS]) * BLOCK_TOKENS + p % BLOCK_TOKENS for i, p in positions
        ]
        slots = torch.tensor(slots + [-1] * padding)
        slots[[row for row, (_, p) in enumerate(positions) if p < 0] + list(unstored)] = -1
        lengths = torch.tensor([end for _, end in parts], dtype=torch.int32)
        return Step(starts, lengths, self.table, slots)

    def rows(self, step, wrong=()):
        """Keys and values of the step's rows, views of one tensor as a fused projection makes them.

        wrong: rows with other vectors, as of drafts that will be rejected.
        """
        kv_heads, head_dim = self.keys[0].shape[1:]
        rows = len(step.slot_mapping)
        fused = torch.randn(rows, 3 * kv_heads, head_dim).to(self.raw.dtype).to(self.device)
        key, value = fused[:, kv_heads : 2 * kv_heads], fused[:, 2 * kv_heads :]
        bounds = zip(step.query_start_loc.tolist(), step.seq_lens.tolist(), strict=False)
        for i, (row, end) in enumerate(bounds):
            count = int(step.query_lens[i])
            for j in set(range(row, row + count)) - set(wrong):
                if (position := end - count + j - row) >= 0:
                    key[j], value[j] = self.keys[i][position], self.values[i][position]
        return key, value

    def decode(self, parts, *, wrong=(), **options):
        """Stores new tokens as those of decodes, and compares with the reference."""
        step = self.step(parts, **options)
        self._store(
            store_decodes,
            step,
            wrong,
            seq_lens=step.seq_lens.to(self.device),
            query_start_loc=step.query_start_loc.to(self.device),
            slot_mapping=step.slot_mapping.to(self.device),
            max_query_len=int(step.query_lens.max()),
        )

    def prefill(self, parts, *, compare=True):
        """Stores them as chunks of prompts."""
        step = self.step(parts)
        items = plan_blocks(step.query_start_loc.tolist(), step.seq_lens.tolist()).to(self.device)
        self._store(store_prefills, step, (), compare, items=items)

    def _store(self, store, step, wrong, compare=True, **tokens):
        key, value = self.rows(step, wrong)
        memory = memory_of(self.cache).clone().to(self.device)
        after = memory.as_strided(self.cache.shape, self.cache.stride())
        store(self.codec, key, value, after, self.raw, block_table=self.table.to(self.device), **tokens)
        after = memory.cpu().as_strided(after.shape, after.stride())
        if compare:
            assert_same_as_step(self.codec, step, key.cpu(), value.cpu(), self.raw, self.cache, after)
        self.cache = after

    def stored(self, sequence, block):
        """The bytes of an encoded block, and its anchor."""
        number = self.table[sequence, block]
        return self.cache[number], anchors_of(self.cache, self.codec.fmt, self.codec.head_dim)[number]


@pytest.fixture
def large_tiles(monkeypatch, device):
    """A tile is a whole block, which the interpreter computes as fast as a few tokens."""
    if device == "cpu":
        small = block_kernel.specialization
        monkeypatch.setattr(
            block_kernel, "specialization", lambda *of: small(*of)._replace(ROWS=BLOCK_TOKENS)
        )
        monkeypatch.setattr(block_kernel, "MOST_SHARES", 1)


@pytest.mark.usefixtures("large_tiles")
@pytest.mark.parametrize("fmt", COMPRESSED_FORMATS, ids=lambda fmt: fmt.name)
def test_a_block_is_encoded_with_its_last_token(fmt, device):
    Sequences([128], dataclasses.replace(fmt, anchor=True), device=device).decode([(127, 128)])


@pytest.mark.parametrize(
    ("fmt", "head_dim", "dtype"),
    [
        (KVFormat(5, 3, anchor=True), 80, torch.float16),
        (KVFormat(6, 8), 96, torch.bfloat16),
        (KVFormat(8, 4, anchor=True), 128, torch.bfloat16),
        (KVFormat(4, 2, anchor=True), 192, torch.bfloat16),
        (KVFormat(3, 2, anchor=True), 256, torch.float16),
    ],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_head_dims(fmt, head_dim, dtype, monkeypatch, device):
    """A chunk that completes a block and opens the next."""
    monkeypatch.setattr(block_kernel, "MOST_SHARES", 1)  # for the interpreter's sake
    Sequences([132], fmt, head_dim, dtype=dtype, device=device).prefill([(60, 132)])


@pytest.mark.usefixtures("large_tiles")
@pytest.mark.parametrize("anchor", [True, False])
def test_decodes_around_the_end_of_a_block(anchor, device):
    sequences = Sequences([127, 128, 129, 1, 256], KVFormat(4, 4, anchor=anchor), kv_heads=2, device=device)
    sequences.decode([(126, 127), (127, 128), (128, 129), (0, 1), (255, 256)])


@pytest.mark.usefixtures("large_tiles")
def test_blocks_that_rejected_drafts_completed_are_encoded_again(device):
    sequences = Sequences([133, 132, 132, 140], kv_heads=2, device=device)
    sequences.prefill([(0, 125), (0, 123), (0, 122), (0, 126)])
    # The first, the second by the last of its drafts, not the third; those of the fourth are accepted.
    sequences.decode([(125, 130), (123, 128), (122, 127), (126, 131)], wrong=[1, 2, 3, 4, 6, 7, 8, 9])
    sequences.decode([(126, 131), (124, 129), (127, 132), (131, 136)], wrong=[9])
    never_drafted = Sequences([133, 132, 132, 140], kv_heads=2, device=device)
    never_drafted.keys, never_drafted.values = sequences.keys, sequences.values
    never_drafted.prefill([(0, 128)] * 4)
    for i in range(4):
        assert all(map(torch.equal, sequences.stored(i, 0), never_drafted.stored(i, 0)))


@pytest.mark.usefixtures("large_tiles")
def test_padding_is_not_stored(device):
    """Sequences of length 0, with a row and without, and rows behind the last sequence."""
    sequences = Sequences([128, 1, 1, 130], device=device)
    sequences.decode([(127, 128), (0, 0), (-1, 0), (127, 130)], padding=3)


@pytest.mark.usefixtures("large_tiles")
@pytest.mark.parametrize("unstored", [[0], [2], [3], [0, 1, 2, 3]], ids=str)
def test_rows_without_a_slot_are_not_stored(unstored, device):
    """Row 2 is the block's last."""
    Sequences([129], device=device).decode([(125, 129)], unstored=unstored)


@pytest.mark.usefixtures("large_tiles")
def test_chunks_of_several_sequences(device):
    sequences = Sequences([300, 300, 256, 90, 5, 40], device=device)
    sequences.prefill([(0, 300), (100, 300), (128, 256), (60, 90), (0, 5), (40, 40)])


@pytest.mark.usefixtures("large_tiles")
def test_raw_blocks_are_those_of_the_smallest_format(device):
    """5 blocks of 26 tokens, the last of 24."""
    sequences = Sequences([200], KVFormat(8, 4, anchor=True), raw_blocks=5, kv_heads=2, device=device)
    sequences.prefill([(0, 100)])
    sequences.decode([(100, 126)])
    sequences.decode([(126, 129)])
    sequences.prefill([(129, 200)])


@pytest.mark.usefixtures("large_tiles")
def test_a_block_has_the_same_bytes_however_it_came(device):
    whole, cut = Sequences([300], device=device), Sequences([300], device=device)
    cut.keys, cut.values = whole.keys, whole.values
    whole.prefill([(0, 300)])
    cut.prefill([(0, 90)])
    cut.prefill([(90, 126)])
    for position in (126, 127, 128, 129):
        cut.decode([(position, position + 1)])
    cut.prefill([(130, 250)])
    cut.prefill([(250, 256)], compare=False)  # a short chunk, whose tokens the reference keeps raw too
    for block in (0, 1):
        assert all(map(torch.equal, cut.stored(0, block), whole.stored(0, block)))


def test_programs_may_share_a_block(monkeypatch, device):
    """To the same bytes, in tiles of the size that a GPU takes."""
    stored = []
    for shares in (1, 4):
        torch.manual_seed(0)
        sequences = Sequences([128], device=device)
        monkeypatch.setattr(block_kernel, "MOST_SHARES", shares)
        sequences.decode([(125, 128)])
        stored.append(sequences.stored(0, 0))
    assert all(map(torch.equal, *stored))


def test_the_mean_of_keys_adds_neighbours_first(device):
    """Coordinate k has its opposite 2**k tokens on; what was added to either before is lost."""
    sequences = Sequences([128], device=device)
    for k in range(7):
        sequences.keys[0][0, 0, k], sequences.keys[0][1 << k, 0, k] = 1e30, -1e30
    sequences.prefill([(0, 40)])
    sequences.prefill([(40, 128)])


@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")  # interpreter
@pytest.mark.usefixtures("large_tiles")
def test_anchors_are_finite(device):
    """Where a key is not, or their sum overflows."""
    sequences = Sequences([128], device=device)
    key = sequences.keys[0][:, 0]
    key[5, 0], key[6, 1], key[7, 2], key[8, 2] = torch.nan, torch.inf, torch.inf, -torch.inf
    key[:, 3] = 3e38
    sequences.prefill([(0, 128)])
    assert (sequences.stored(0, 0)[1][0, 0, :4] == 0).all()


def test_nothing_to_store(device):
    sequences = Sequences([1], device=device)
    sequences.decode([(0, 0)])
    sequences.prefill([(0, 0)])


def test_more_tokens_than_a_raw_block_takes_are_no_decode(device):
    with pytest.raises(ValueError, match="40 new tokens of a sequence"):
        Sequences([40], KVFormat(4, 4), device=device).decode([(0, 40)])


def test_what_does_not_fit_the_cache_is_refused(device):
    sequences = Sequences([128], device=device)
    items = plan_blocks([0, 128], [128]).to(sequences.device)
    table, cache = sequences.table.to(device), sequences.cache.to(device)

    def refused(match, key=sequences.keys[0], cache=cache, raw=sequences.raw):
        with pytest.raises(ValueError, match=match):
            store_prefills(
                sequences.codec,
                key.to(device),
                sequences.values[0].to(device),
                cache,
                raw,
                block_table=table,
                items=items,
            )

    refused("not adjacent", key=sequences.keys[0].repeat_interleave(2, -1)[..., ::2])
    refused(r"keys of torch\.float16", key=sequences.keys[0].half())
    refused("128 raw tokens take", raw=RawBlocks(1, torch.bfloat16))
    refused("anchors", cache=cache.contiguous())
    refused("blocks of 64 tokens", cache=cache[:, :64])


@given(st.lists(st.tuples(st.integers(0, 500), st.integers(0, 300)), max_size=5))
def test_items_are_the_new_tokens_of_each_block(lengths):
    starts = torch.tensor([0, *(count for _, count in lengths)]).cumsum(0).tolist()
    planned = plan_blocks(starts, [before + count for before, count in lengths])
    found = [
        (sequence, position + i, row + i)
        for sequence, position, row, count in planned.indices.tolist()
        for i in range(count)
    ]
    expected = [
        (sequence, before + i, starts[sequence] + i)
        for sequence, (before, count) in enumerate(lengths)
        for i in range(count)
    ]
    assert sorted(found) == expected
    for index, (_, position, _, count) in enumerate(planned.indices.tolist()):
        first, last = position % BLOCK_TOKENS, position % BLOCK_TOKENS + count - 1
        assert 0 <= first <= last < BLOCK_TOKENS
        assert (index < planned.begun) == (first > 0 and last == BLOCK_TOKENS - 1)
