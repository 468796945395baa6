"""Decode steps over compressed caches of random contents: what is timed.

Any byte is a valid code, so codes are random bytes; only scales must be plausible. Blocks lie in random
order, as they come to lie in an engine that has run for a while.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from turboquant_kernels.bench.rows import Shape
from turboquant_kernels.codec import Codec
from turboquant_kernels.packing import VALUE_SCALE, anchors_of, pages_of


@dataclass(frozen=True)
class DecodeStep:
    """Queries and cache of one attention layer, as `decode.plan` takes them. Tensors are on one device."""

    codec: Codec
    query: torch.Tensor
    """bf16 [num_seqs * query_len, q_heads, D]."""
    kv_cache: torch.Tensor
    """uint8 [num_blocks, block_size, kv_heads, slot_bytes]."""
    block_table: torch.Tensor
    """int32 [num_seqs, max_blocks]; entries past a sequence's blocks are 0."""
    seq_lens: torch.Tensor
    """int32 [num_seqs]."""
    scale: float
    query_len: int = 1
    window: int | None = None
    soft_cap: float | None = None
    sinks: torch.Tensor | None = None

    @property
    def options(self) -> dict[str, Any]:
        """The keyword arguments that say which tokens a query sees, and how: alike for kernels and oracle."""
        return {
            "query_len": self.query_len,
            "window": self.window,
            "soft_cap": self.soft_cap,
            "sinks": self.sinks,
        }


def random_step(
    codec: Codec,
    lengths: Sequence[int],
    q_heads: int,
    kv_heads: int,
    device: torch.device,
    *,
    block_size: int = 16,
    query_len: int = 1,
    seed: int = 0,
) -> DecodeStep:
    """A step over sequences of `lengths` tokens.

    Scores have a standard deviation of about one: queries and anchors are standard normal, key scales uniform
    in 0.7..1.3; value scales are uniform in 0.5..2.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def uniform(shape: tuple[int, ...], low: float, high: float) -> torch.Tensor:
        return torch.rand(shape, generator=generator, device=device) * (high - low) + low

    blocks = [-(-length // block_size) for length in lengths]
    num_blocks = sum(blocks)
    kv_cache = empty_cache(codec, num_blocks, block_size, kv_heads, device)
    kv_cache.random_(256, generator=generator)
    if codec.fmt.anchor:
        anchors_of(kv_cache, codec.fmt, codec.head_dim).normal_(generator=generator)
    scales = codec.layout.scales.of(pages_of(kv_cache, codec.layout))
    for begin in range(0, num_blocks, 4096):
        part = scales[begin : begin + 4096]
        random = uniform((*part.shape[:-1], part.shape[-1] // 2), 0.7, 1.3)
        random[..., VALUE_SCALE] = uniform(random.shape[:-1], 0.5, 2.0)
        part.copy_(random.half().view(torch.uint8))
    order = torch.randperm(num_blocks, generator=generator, device=device, dtype=torch.int32)
    block_table = pad_sequence(order.split(blocks), batch_first=True)
    rows = len(lengths) * query_len
    query = torch.randn(rows, q_heads, codec.head_dim, generator=generator, device=device)
    return DecodeStep(
        codec,
        query.bfloat16(),
        kv_cache,
        block_table,
        torch.tensor(lengths, dtype=torch.int32, device=device),
        codec.head_dim**-0.5,
        query_len,
    )


def equal_step(
    codec: Codec, shape: Shape, device: torch.device, *, block_size: int = 16, seed: int = 0
) -> DecodeStep:
    """A step of a benchmark shape."""
    lengths = [shape.context] * shape.batch
    return random_step(
        codec, lengths, shape.q_heads, shape.kv_heads, device, block_size=block_size, seed=seed
    )


def empty_cache(
    codec: Codec, num_blocks: int, block_size: int, kv_heads: int, device: torch.device
) -> torch.Tensor:
    """Uninitialised blocks, uint8 [num_blocks, block_size, kv_heads, slot_bytes], with room for anchors."""
    block_bytes = kv_heads * codec.fmt.page_bytes(codec.head_dim, block_size)
    memory = torch.empty(num_blocks, block_bytes, dtype=torch.uint8, device=device)
    slot_bytes = codec.fmt.slot_bytes(codec.head_dim)
    # By hand, since a view of a single block forgets how far the next would lie.
    return memory.as_strided(
        (num_blocks, block_size, kv_heads, slot_bytes), (block_bytes, kv_heads * slot_bytes, slot_bytes, 1)
    )
