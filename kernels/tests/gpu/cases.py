"""Cases for the GPU kernels: what they are specialized to, and random inputs for that.

A kernel is compiled anew for what it is specialized to, which takes a second where a case takes a hundredth.
So that is a list of at most 65 variants; each is compiled once, and everything else is drawn for each case.

What unused bytes hold is the worst there is: NaN scales in pages, block tables that point anywhere.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch

from turboquant_kernels.bench.caches import DecodeStep, empty_cache, random_step
from turboquant_kernels.codec import Codec
from turboquant_kernels.decode import hopper
from turboquant_kernels.formats import (
    COMPRESSED_FORMATS,
    HEAD_DIMS,
    KEY_BITS,
    PAGE_TOKENS,
    VALUE_BITS,
    Encoding,
    KVFormat,
)
from turboquant_kernels.packing import KEY_SCALE, pages_of
from turboquant_kernels.store import kernel as store_kernel
from turboquant_kernels.store.reference import store

T = TypeVar("T")

UNIFORM = [fmt for fmt in COMPRESSED_FORMATS if fmt.encoding is Encoding.MSE]

KV_HEADS = (2, 8, 1, 4, 3)
GROUPS = (4, 8, 1, 2, 7, 16, 3, 5, 6, 12)
BLOCK_SIZES = (16, 32, 128, 64)
QUERY_LENS = (1, 1, 2, 1, 1, 4, 1)
BATCHES = ((1, 96), (3, 16), (5, 200), (2, 33), (12, 1), (4, 512), (7, 64))
"""Sequences of a step: of most cases, and of some."""
WINDOWS = ((1,), (16, 112, 1024), (3, 100, 1000))
"""Triton specializes to 1 and to multiples of 16."""
TABLE_WIDTHS = (8192, 7813)
"""Entries of a sequence in the block table, a million tokens in blocks of 128. As windows: a multiple of 16
or not."""
DTYPES = (torch.bfloat16, torch.float32, torch.float16)

BUDGET = 60_000
"""Tokens times KV heads of a case at most; a tenth of it for most."""
_NEEDLE_SCORES = (12, 22)
_HEAVY_CAP = 20.0
HEAVY_TOKENS = 131_072
"""Tokens of each sequence of a `heavy` case, in blocks that all sequences share."""
FAR_BYTES = 9 << 30
"""A cache in which offsets of 4-byte words take 64 bits."""


@dataclass(frozen=True)
class DecodeVariant:
    """What decode kernels, and those around them, are specialized to."""

    path: str | None
    """None: what the engine would run on this GPU."""
    fmt: KVFormat
    head_dim: int
    kv_heads: int
    group: int
    query_len: int = 1
    block_size: int = 16
    batches: tuple[int, int] = (8, 64)
    windows: tuple[int, ...] = ()
    soft_cap: bool = False
    sinks: bool = False
    table_width: int = TABLE_WIDTHS[0]
    far: bool = False
    """Whether blocks are scattered over `FAR_BYTES`, and a sequence may have a million tokens."""
    heavy: bool = False
    """Whether an early token of a long sequence has half of the mass, and all others the rest: `HEAVY`."""

    def __str__(self) -> str:
        options = [name for name in ("soft_cap", "sinks", "far", "heavy") if getattr(self, name)]
        options += [f"window {'/'.join(map(str, self.windows))}"] * bool(self.windows)
        shape = (
            f"D {self.head_dim}, {self.kv_heads} KV heads of {self.group}, {self.query_len} queries, "
            f"blocks of {self.block_size}, {self.batches[0]} or {self.batches[1]} sequences"
        )
        return ", ".join([f"decode {self.path or 'default'} {_name(self.fmt)}", shape, *options])


@dataclass(frozen=True)
class StoreVariant:
    """What the store is specialized to."""

    fmt: KVFormat
    head_dim: int
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"store {_name(self.fmt)}, D {self.head_dim}, {self.dtype}"


@dataclass(frozen=True)
class PrefillVariant:
    """What the kernels of prefill are specialized to."""

    fmt: KVFormat
    head_dim: int
    kv_heads: int
    group: int
    dtype: torch.dtype
    block_size: int
    window: int | None
    sinks: bool
    capacity: int
    """Tokens of the scratch; where it is small, contexts take several tiles."""

    def __str__(self) -> str:
        options = [f"window {self.window}"] * bool(self.window) + ["sinks"] * self.sinks
        shape = f"D {self.head_dim}, {self.kv_heads} KV heads of {self.group}, {self.dtype}"
        tiles = f"blocks of {self.block_size}, tiles of {self.capacity}"
        return ", ".join([f"prefill {_name(self.fmt)}", shape, tiles, *options])


Variant = DecodeVariant | StoreVariant | PrefillVariant


def _name(fmt: KVFormat) -> str:
    return fmt.name + "-anchor" * fmt.anchor


def all_variants() -> list[Variant]:
    return [*decode_variants(), *store_variants(), *prefill_variants()]


ANCHORED = (
    DecodeVariant(None, KVFormat(4, 4, anchor=True), 128, 8, 4, block_size=128),
    DecodeVariant(None, KVFormat(5, 3, anchor=True), 64, 2, 2, block_size=256, windows=WINDOWS[2]),
    DecodeVariant(None, KVFormat(8, 4, anchor=True), 256, 1, 4, block_size=128, soft_cap=True),
    DecodeVariant(None, KVFormat(3, 3, anchor=True), 128, 3, 2, 4, 256, windows=WINDOWS[1], sinks=True),
    DecodeVariant(None, KVFormat(4, 2, anchor=True), 256, 2, 8, 2, block_size=128, batches=BATCHES[2]),
    DecodeVariant(None, KVFormat(6, 4, anchor=True), 64, 4, 7, block_size=128, soft_cap=True),
    DecodeVariant(None, KVFormat(4, 8, anchor=True), 192, 1, 4, block_size=256, far=True),
    DecodeVariant(None, KVFormat(2, 3, anchor=True), 128, 1, 16, block_size=128, windows=WINDOWS[0]),
)
"""Formats with anchors on the default path: 4 and 8 rows of each head_dim, blocks of one and two anchors."""


ISSUE_OF_THE_TAIL = DecodeVariant(None, KVFormat(4, 4), 128, 2, 4, batches=(264, 8), heavy=True)
"""264 sequences and 2 KV heads: a program for each on the 132 multiprocessors of an H200. With 8 sequences
each has 33 splits."""

HEAVY = (
    ISSUE_OF_THE_TAIL,
    DecodeVariant(None, KVFormat(3, 3), 128, 1, 4, batches=(512, 64), windows=(100_000,), heavy=True),
    DecodeVariant(None, KVFormat(8, 4), 128, 2, 8, batches=(198, 12), sinks=True, heavy=True),
    DecodeVariant(None, KVFormat(5, 3), 64, 1, 1, 4, batches=(396, 33), soft_cap=True, heavy=True),
    DecodeVariant("portable", KVFormat(4, 4), 128, 1, 4, batches=(512, 8), heavy=True),
)
"""Long sequences of which one program reads all, or much: what it has summed must not grow coarse with the
largest weight that it has met. All sequences share their blocks, since they would take 4 GB else."""


def decode_variants() -> list[DecodeVariant]:
    """38 on the default path: as the first benchmark has them, every uniform format, `ANCHORED`, of `HEAVY`.
    11 on the portable one: each width of keys, two with anchors, two of prod, of `HEAVY`. Every head_dim,
    group and option in its turn."""
    anchored = [KVFormat(4, 4, anchor=True), KVFormat(5, 3, anchor=True)]
    prod = [fmt for fmt in COMPRESSED_FORMATS if fmt.encoding is Encoding.PROD]
    variants = [DecodeVariant(None, fmt, 128, 8, 4) for fmt in (KVFormat(4, 4), KVFormat(3, 3))]
    variants += ANCHORED
    for i, fmt in enumerate(UNIFORM):
        # One further for each width of keys, so that a head_dim meets values of every width.
        head_dim = _turn(hopper.HEAD_DIMS, i + i // len(VALUE_BITS))
        variant = _decode_variant(None, fmt, head_dim, i)
        if fmt == KVFormat(4, 4):  # at 128 it is above; at 256 few rows have a launch of their own
            variant = replace(variant, head_dim=256, group=2, query_len=1)
        variants.append(variant)
    portable = (*_diagonal(UNIFORM), *anchored, *prod[1:7:5])
    for i, fmt in enumerate(portable):
        variants.append(_decode_variant("portable", fmt, _turn(HEAD_DIMS, i), i + 3))
    return [*variants, *HEAVY]


def _decode_variant(path: str | None, fmt: KVFormat, head_dim: int, i: int) -> DecodeVariant:
    """The i-th variant of a path: what is not given takes its turn."""
    far = i % 11 == 5
    return DecodeVariant(
        path,
        fmt,
        head_dim,
        kv_heads=1 if far else _turn(KV_HEADS, i),
        group=_turn(GROUPS, i),
        query_len=_turn(QUERY_LENS, i),
        block_size=128 if fmt.anchor or far else _turn(BLOCK_SIZES, i // 3),
        batches=_turn(BATCHES, i),
        windows=_turn(WINDOWS, i // 5) if i % 5 == 1 else (),
        soft_cap=i % 7 == 2,
        sinks=i % 4 == 3,
        table_width=_turn(TABLE_WIDTHS, i // 2),
        far=far,
    )


def store_variants() -> list[StoreVariant]:
    """Each width of keys and of values, each head_dim, prod, and two with anchors: 9."""
    formats = [KVFormat(bits, _turn(VALUE_BITS, i)) for i, bits in enumerate(KEY_BITS)]
    formats.append(KVFormat(3, 4, Encoding.PROD))
    formats += [KVFormat(4, 4, anchor=True), KVFormat(8, 3, anchor=True)]
    return [StoreVariant(fmt, _turn(HEAD_DIMS, i), _turn(DTYPES, i)) for i, fmt in enumerate(formats)]


def prefill_variants() -> list[PrefillVariant]:
    """Each width of keys and of values, each head_dim, prod, anchors: 7."""
    formats = [KVFormat(bits, _turn(VALUE_BITS, i + 1), anchor=bits == 5) for i, bits in enumerate(KEY_BITS)]
    formats.append(KVFormat(4, 2, Encoding.PROD))
    return [
        PrefillVariant(
            fmt,
            _turn(HEAD_DIMS, i),
            kv_heads=_turn(KV_HEADS, i),
            group=_turn(GROUPS, i),
            dtype=_turn(DTYPES, i),
            block_size=128 if fmt.anchor else _turn(BLOCK_SIZES, i),
            window=100 if i % 4 == 2 else None,
            sinks=i % 3 == 1,
            capacity=(256, 1024, 32768)[i % 3],
        )
        for i, fmt in enumerate(formats)
    ]


def _turn(values: Sequence[T], i: int) -> T:
    return values[i % len(values)]


def _diagonal(formats: Sequence[KVFormat]) -> list[KVFormat]:
    """One format of each width of keys, and of values each in its turn."""
    return [
        fmt for i, fmt in enumerate(formats) if i % len(VALUE_BITS) == i // len(VALUE_BITS) % len(VALUE_BITS)
    ]


def decode_step(
    variant: DecodeVariant,
    draw: random.Random,
    device: torch.device,
    *,
    budget: int = BUDGET,
    num_seqs: int | None = None,
) -> DecodeStep:
    """A case of a variant: `budget` bounds the tokens times KV heads."""
    if num_seqs is None:
        num_seqs = variant.batches[draw.random() < 0.15]
    if variant.heavy:
        return heavy_step(variant, draw, device, tokens=HEAVY_TOKENS * budget // BUDGET, num_seqs=num_seqs)
    if draw.random() < 0.85:
        budget //= 10
    elif variant.far and budget == BUDGET and draw.random() < 0.3:
        budget = 1_000_000
    lengths = _lengths(draw, budget // variant.kv_heads, num_seqs, variant.query_len)
    step = random_step(
        Codec(variant.fmt, variant.head_dim),
        lengths,
        variant.group * variant.kv_heads,
        variant.kv_heads,
        device,
        block_size=variant.block_size,
        query_len=variant.query_len,
        seed=draw.getrandbits(32),
    )
    _poison(step, lengths)
    if variant.far and device.type == "cuda":  # Triton's interpreter copies what it is given
        step = _scattered(step)
    step = replace(step, block_table=_widened(step, lengths, variant.table_width, draw))
    kind = draw.random()
    if kind < 0.3 and not variant.sinks:
        _plant_needle(step, lengths, draw)
    elif kind > 0.9:
        _lengthen_key(step, lengths, draw)
    sinks = torch.randn(step.query.shape[1], device=device) * 3 if variant.sinks else None
    return replace(
        step,
        window=draw.choice(variant.windows) if variant.windows else None,
        soft_cap=draw.choice((2.0, 20.0)) if variant.soft_cap else None,
        sinks=sinks,
    )


def heavy_step(
    variant: DecodeVariant,
    draw: random.Random,
    device: torch.device,
    *,
    tokens: int,
    num_seqs: int,
    place: int | None = None,
) -> DecodeStep:
    """`num_seqs` sequences of the same `tokens` tokens.

    Of the tokens that all queries see the one at `place` has about half of the mass; by default any of the
    first 64. Values have a common part, so that what is lost of the others does not average out.
    """
    codec, kv_heads, head_dim = Codec(variant.fmt, variant.head_dim), variant.kv_heads, variant.head_dim
    step = random_step(
        codec,
        [tokens],
        variant.group * kv_heads,
        kv_heads,
        device,
        block_size=variant.block_size,
        seed=draw.getrandbits(32),
    )
    window = draw.choice(variant.windows) if variant.windows else None
    first = 0 if window is None else max(0, tokens - window)
    heavy = first + (draw.randrange(min(64, tokens - first)) if place is None else place)
    # Scores of the others are standard normal, and e**.5 is the mean of their exponentials.
    mass = math.log(tokens) + 0.5
    score = mass if not variant.soft_cap else _HEAVY_CAP * math.atanh(mass / _HEAVY_CAP)
    direction = torch.randn(head_dim, device=device)
    key = torch.randn(tokens, kv_heads, head_dim, device=device)
    value = torch.randn(tokens, kv_heads, head_dim, device=device) + torch.randn(head_dim, device=device)
    key[heavy] = direction * (score / step.scale / direction.square().sum())
    value[heavy] = torch.randn(kv_heads, head_dim, device=device)
    position = torch.arange(tokens, device=device)
    block = step.block_table[0, position // variant.block_size].long()
    slots = block * variant.block_size + position % variant.block_size
    (store_kernel.store if device.type == "cuda" else store)(codec, key, value, step.kv_cache, slots)
    _poison(step, [tokens])
    table = _widened(step, [tokens], variant.table_width, draw).expand(num_seqs, -1).contiguous()
    noise = torch.randn(num_seqs * variant.query_len, step.query.shape[1], head_dim, device=device)
    return replace(
        step,
        query=(direction + 0.2 * noise).bfloat16(),
        block_table=table,
        seq_lens=torch.full((num_seqs,), tokens, dtype=torch.int32, device=device),
        query_len=variant.query_len,
        window=window,
        soft_cap=_HEAVY_CAP if variant.soft_cap else None,
        sinks=mass - 2 + torch.randn(step.query.shape[1], device=device) if variant.sinks else None,
    )


def prefill_step(
    variant: PrefillVariant, draw: random.Random, device: torch.device, *, budget: int = BUDGET
) -> tuple[DecodeStep, list[int]]:
    """A case of a variant: its queries are ragged, so many of each sequence as the list says."""
    num_seqs = draw.choice((1, 2, 3, 6))
    lengths = _lengths(draw, budget // 10 // variant.kv_heads, num_seqs, query_len=1)
    query_lens = [min(length, draw.choice((0, 1, 5, 64, 130, 300))) for length in lengths]
    if not any(query_lens):
        query_lens[lengths.index(max(lengths))] = 1
    q_heads = variant.group * variant.kv_heads
    step = random_step(
        Codec(variant.fmt, variant.head_dim),
        lengths,
        q_heads,
        variant.kv_heads,
        device,
        block_size=variant.block_size,
        seed=draw.getrandbits(32),
    )
    _poison(step, lengths)
    step = replace(
        step,
        query=torch.randn(sum(query_lens), q_heads, variant.head_dim, device=device).to(variant.dtype),
        block_table=_widened(step, lengths, TABLE_WIDTHS[0], draw),
        window=variant.window,
        sinks=torch.randn(q_heads, device=device) if variant.sinks else None,
    )
    return step, query_lens


def _lengths(draw: random.Random, tokens: int, num_seqs: int, query_len: int) -> list[int]:
    """About `tokens` in all at most: sequences of any length, or one that is far longer; some are empty."""
    most = max(tokens // num_seqs, 1)
    lengths = [round(math.exp(draw.uniform(0, math.log(most)))) for _ in range(num_seqs)]
    if draw.random() < 0.2:
        lengths[draw.randrange(num_seqs)] = draw.randint(tokens // 2, tokens)
    lengths = [0 if draw.random() < 0.08 else max(length, query_len) for length in lengths]
    return lengths if any(lengths) else [query_len, *lengths[1:]]


def _poison(step: DecodeStep, lengths: Sequence[int]) -> None:
    """NaN scales in unused slots."""
    block_size = step.kv_cache.shape[1]
    scales = step.codec.layout.scales.of(pages_of(step.kv_cache, step.codec.layout))
    filled = torch.full((len(step.kv_cache),), block_size)
    table = step.block_table.cpu()
    for sequence, length in enumerate(lengths):
        if length % block_size:
            filled[table[sequence, length // block_size]] = length % block_size
    pages = torch.arange(scales.shape[1])[:, None] * PAGE_TOKENS
    unused = pages + torch.arange(PAGE_TOKENS) >= filled[:, None, None]
    scales.masked_fill_(unused[:, :, None, :, None].to(scales.device), 0xFF)


def _scattered(step: DecodeStep) -> DecodeStep:
    """The same blocks at random indices of a cache of `FAR_BYTES`."""
    cache = step.kv_cache
    _, block_size, kv_heads, _ = cache.shape
    far = empty_cache(step.codec, FAR_BYTES // cache.stride(0), block_size, kv_heads, cache.device)
    indices = torch.randint(len(far) // len(cache), (len(cache),), device=cache.device)
    indices += torch.arange(len(cache), device=cache.device) * (len(far) // len(cache))
    memory_of(far)[indices] = memory_of(cache)
    table = indices.int()[step.block_table.long()]
    return replace(step, kv_cache=far, block_table=table)


def _widened(step: DecodeStep, lengths: Sequence[int], width: int, draw: random.Random) -> torch.Tensor:
    """The block table as an engine has it, of a fixed width; anything stands in its unused entries."""
    table = step.block_table
    used = torch.tensor([-(-length // step.kv_cache.shape[1]) for length in lengths])
    anything = torch.tensor(draw.choices((-1, 0, 2**31 - 1, -(2**31)), k=len(lengths)), dtype=torch.int32)
    wide = anything[:, None].expand(-1, width).contiguous().to(table.device)
    unused = torch.arange(table.shape[1]) >= used[:, None]
    wide[:, : table.shape[1]] = torch.where(unused.to(table.device), wide[:, : table.shape[1]], table)
    return wide


def memory_of(kv_cache: torch.Tensor) -> torch.Tensor:
    """All bytes of a cache from `empty_cache`, anchors included: uint8 [num_blocks, bytes]."""
    stride = kv_cache.stride(0)
    return kv_cache.as_strided((len(kv_cache), stride), (stride, 1))


def _plant_needle(step: DecodeStep, lengths: Sequence[int], draw: random.Random) -> None:
    """Stores a token whose key points along one head's query: a score far from all others."""
    sequence, block, offset = _random_token(step, lengths, draw)
    _, block_size, kv_heads, _ = step.kv_cache.shape
    query = step.query[sequence * step.query_len, 0].cpu().double()
    key, value = torch.randn(2, 1, kv_heads, step.codec.head_dim)
    key[0, 0] = query * (draw.uniform(*_NEEDLE_SCORES) / step.scale / query.square().sum())
    block = memory_of(step.kv_cache)[block]
    stored = empty_cache(step.codec, 1, block_size, kv_heads, torch.device("cpu"))
    memory_of(stored)[0] = block.cpu()
    store(step.codec, key, value, stored, torch.tensor([offset]))
    block.copy_(memory_of(stored)[0])


def _lengthen_key(step: DecodeStep, lengths: Sequence[int], draw: random.Random) -> None:
    """Makes one token's keys 3 to 17 times as long, in whatever direction they are."""
    _, block, offset = _random_token(step, lengths, draw)
    _key_scales(step)[block, offset // PAGE_TOKENS, :, offset % PAGE_TOKENS] *= draw.uniform(3, 17)


def key_length(step: DecodeStep) -> float:
    """How many times as long the longest key is as keys of `random_step` and needles are at most; 1 if it is
    not longer."""
    blocks = -(-step.seq_lens // step.kv_cache.shape[1])
    used = torch.arange(step.block_table.shape[1], device=blocks.device) < blocks[:, None]
    scales = _key_scales(step)[step.block_table[used].long()]
    # A needle is as long as its score; codes of two bits have .88 of a key's length, and scales the rest.
    needle = _NEEDLE_SCORES[1] / 0.88 * step.codec.head_dim**-0.5
    return max(1.0, float(scales.nan_to_num(0.0).max()) / max(1.3, needle))


def _key_scales(step: DecodeStep) -> torch.Tensor:
    """fp16 [blocks, pages, kv_heads, PAGE_TOKENS], a view of the cache."""
    scales = step.codec.layout.scales.of(pages_of(step.kv_cache, step.codec.layout))
    return scales.view(torch.float16)[..., KEY_SCALE]


def _random_token(step: DecodeStep, lengths: Sequence[int], draw: random.Random) -> tuple[int, int, int]:
    """Sequence, block and place in the block of any token."""
    sequence = draw.choice([i for i, length in enumerate(lengths) if length])
    entry, offset = divmod(draw.randrange(lengths[sequence]), step.kv_cache.shape[1])
    return sequence, int(step.block_table[sequence, entry]), offset
