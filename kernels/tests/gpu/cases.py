"""Cases for the GPU kernels: what they are specialized to, and random inputs for that.

What unused bytes hold is the worst there is: NaN scales in pages, block tables that point anywhere.
"""

import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from turboquant_kernels.bench import oracle
from turboquant_kernels.bench.caches import DecodeStep, random_step
from turboquant_kernels.codec import Codec
from turboquant_kernels.formats import (
    COMPRESSED_FORMATS,
    HEAD_DIMS,
    PAGE_TOKENS,
    VALUE_BITS,
    Encoding,
    KVFormat,
)
from turboquant_kernels.packing import KEY_SCALE, pages_of

UNIFORM = [fmt for fmt in COMPRESSED_FORMATS if fmt.encoding is Encoding.MSE]

KV_HEADS = (2, 8, 1, 4, 3)
GROUPS = (4, 8, 1, 2, 7, 16, 3, 5, 6, 12)
BLOCK_SIZES = (16, 32, 128, 64)
QUERY_LENS = (1, 1, 2, 1, 1, 4, 1)


@dataclass(frozen=True)
class Variant:
    """What decode kernels are specialized to; everything else is drawn for each case."""

    path: str | None
    """None: what the engine would run on this GPU."""
    fmt: KVFormat
    head_dim: int
    kv_heads: int
    group: int
    query_len: int
    block_size: int
    window: bool
    soft_cap: bool
    sinks: bool

    def __str__(self) -> str:
        options = [name for name in ("window", "soft_cap", "sinks") if getattr(self, name)]
        name = self.fmt.name + ("-anchor" if self.fmt.anchor else "")
        shape = (
            f"D {self.head_dim}, {self.kv_heads} KV heads of {self.group}, "
            f"{self.query_len} queries, blocks of {self.block_size}"
        )
        return ", ".join([f"{self.path or 'default'} {name}", shape, *options])


def decode_variants() -> list[Variant]:
    """28 on the default path, all uniform formats, two with anchors, two as the first benchmark has them, and
    14 on the portable one, two of them of prod; every head_dim, group and option in its turn."""
    prod = [fmt for fmt in COMPRESSED_FORMATS if fmt.encoding is Encoding.PROD]
    anchored = [KVFormat(4, 4, anchor=True), KVFormat(5, 3, anchor=True)]
    chosen = [(None, fmt) for fmt in (*UNIFORM, *anchored)]
    chosen += [("portable", fmt) for fmt in (*_checkered(UNIFORM), *prod[1:7:5])]
    turns = zip(*map(itertools.cycle, (HEAD_DIMS, KV_HEADS, GROUPS, QUERY_LENS, BLOCK_SIZES)), strict=True)
    variants = [
        Variant(None, fmt, 128, 8, 4, 1, 16, window=False, soft_cap=False, sinks=False)
        for fmt in (KVFormat(4, 4), KVFormat(3, 3))
    ]
    for i, ((path, fmt), turn) in enumerate(zip(chosen, turns, strict=False)):
        options = (i % 5 == 1, i % 7 == 2, i % 4 == 3)
        variant = Variant(path, fmt, *turn, *options)
        variants.append(replace(variant, block_size=128) if fmt.anchor else variant)
    return variants


def store_variants() -> list[tuple[KVFormat, int]]:
    """Half of all formats and two with anchors, every head_dim in its turn: 18."""
    anchored = (KVFormat(4, 4, anchor=True), KVFormat(8, 3, anchor=True))
    return list(zip((*_checkered(COMPRESSED_FORMATS), *anchored), itertools.cycle(HEAD_DIMS), strict=False))


def _checkered(formats: Sequence[KVFormat]) -> list[KVFormat]:
    """Every other format, such that each width of keys and of values is among them."""
    return [fmt for i, fmt in enumerate(formats) if (i + i // len(VALUE_BITS)) % 2]


def decode_step(variant: Variant, draw: random.Random, device: torch.device, budget: int) -> DecodeStep:
    """A case of a variant: `budget` bounds the tokens times KV heads."""
    kv_heads = variant.kv_heads
    lengths = _lengths(draw, budget // kv_heads, variant.query_len)
    codec = Codec(variant.fmt, variant.head_dim)
    step = random_step(
        codec,
        lengths,
        variant.group * kv_heads,
        kv_heads,
        device,
        block_size=variant.block_size,
        query_len=variant.query_len,
        seed=draw.getrandbits(32),
    )
    _poison(step, lengths, draw)
    if draw.random() < 0.3 and not variant.sinks:  # beside a sink a low score leaves nothing to compare
        _plant_needle(step, lengths, draw)
    sinks = torch.randn(step.query.shape[1], device=device) * 3 if variant.sinks else None
    return replace(
        step,
        window=draw.choice((1, 3, 16, 100, 1000)) if variant.window else None,
        soft_cap=draw.choice((2.0, 20.0)) if variant.soft_cap else None,
        sinks=sinks,
    )


def _lengths(draw: random.Random, tokens: int, query_len: int) -> list[int]:
    """At most `tokens` in all: one long sequence, many short ones or a few of any length; some are empty."""
    kind = draw.random()
    if kind < 0.04:
        lengths = [draw.randint(tokens // 2, tokens)]
    elif kind < 0.1:
        count = draw.randint(65, 512)
        lengths = [draw.randint(1, max(1, tokens // count)) for _ in range(count)]
    else:
        count = draw.randint(1, 12)
        lengths = [round(math.exp(draw.uniform(0, math.log(tokens / count)))) for _ in range(count)]
    lengths = [0 if draw.random() < 0.08 else max(length, query_len) for length in lengths]
    return lengths if any(lengths) else [query_len, *lengths[1:]]


def _poison(step: DecodeStep, lengths: list[int], draw: random.Random) -> None:
    """NaN scales in unused slots; anything in unused entries of the block table."""
    block_size = step.kv_cache.shape[1]
    pages = pages_of(step.kv_cache, step.codec.layout)
    scales = step.codec.layout.scales.of(pages)
    used = torch.tensor([-(-length // block_size) for length in lengths])
    unused = torch.arange(step.block_table.shape[1]) >= used[:, None]
    anything = torch.tensor(draw.choices((-1, 0, 2**31 - 1, -(2**31)), k=len(lengths)), dtype=torch.int32)
    table = step.block_table.cpu()
    step.block_table.copy_(torch.where(unused, anything[:, None], table))
    for sequence, length in enumerate(lengths):
        if length % block_size:
            last = int(table[sequence, used[sequence] - 1])
            page, token = divmod(length % block_size, PAGE_TOKENS)
            scales[last, page, :, token:] = 0xFF
            scales[last, page + 1 :] = 0xFF


def _plant_needle(step: DecodeStep, lengths: list[int], draw: random.Random) -> None:
    """Makes one token's score 12 to 22 in size for one query head, far from all others, by its key scale.

    Of a random page of one KV head it is the token with the largest score.
    """
    sequence = draw.choice([i for i, length in enumerate(lengths) if length])
    block_entry, offset = divmod(draw.randrange(lengths[sequence]), step.kv_cache.shape[1])
    page = offset // PAGE_TOKENS
    pages = pages_of(step.kv_cache, step.codec.layout)[step.block_table[sequence, block_entry], page]
    key, _ = oracle.decompress(step.codec, pages[None])
    query = step.query[sequence * step.query_len].double() @ oracle.rotation(step.codec, step.query.device).T
    scores = (key[0] @ query[0] * step.scale).nan_to_num(0.0)
    token = int(scores.abs().argmax())
    scales = step.codec.layout.scales.of(pages).view(torch.float16)[0, token]
    factor = draw.uniform(12, 22) / max(float(scores[token].abs()), 1e-3)
    scales[KEY_SCALE] = min(float(scales[KEY_SCALE]) * factor, 1e4)
