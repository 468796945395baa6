"""This project's kernels, called as the engine calls them. Each function returns the call that is timed."""

import torch

from turboquant_kernels.bench.caches import DecodeStep
from turboquant_kernels.bench.clocks import Call
from turboquant_kernels.decode.plan import DecodePlan, DecodeShape, Path
from turboquant_kernels.prefill.attention import Attend, plan, prefill_attention
from turboquant_kernels.queries.kernel import rotate_queries
from turboquant_kernels.store.kernel import store


def decode(step: DecodeStep, path: Path | None = None) -> Call:
    """Attention and the merging of its splits: float32 [rows, q_heads, D], rotated.

    Queries are quantized and the schedule is made before the call, buffers are its own.
    """
    queries = rotate_queries(step.codec, step.query, step.scale)
    plan = plan_of(step, path)
    plan.schedule(step.seq_lens)
    # What stands in the buffers of an earlier step must not matter.
    plan.partial.fill_(torch.nan)
    plan.stats.fill_(torch.nan)
    out = torch.full(step.query.shape, torch.nan, dtype=torch.float32, device=step.query.device)
    return lambda: plan.attend(
        queries,
        step.kv_cache,
        step.block_table,
        step.seq_lens,
        soft_cap=step.soft_cap,
        sinks=step.sinks,
        out=out,
    )


def output(step: DecodeStep, path: Path | None = None) -> Call:
    """Everything between queries and their output, the schedule included: bf16 [rows, q_heads, D]."""
    plan, out = plan_of(step, path), torch.full_like(step.query, torch.nan)

    def call() -> torch.Tensor:
        plan.schedule(step.seq_lens)
        return _run(plan, step, out)

    return call


def whole_step(step: DecodeStep) -> Call:
    """What a layer does in a decode step: the store of each sequence's newest token, then attention.

    The plan and its schedule, which layers share, are made before the call.
    """
    block_size, kv_heads = step.kv_cache.shape[1:3]
    last = step.seq_lens.long() - 1
    block = step.block_table.gather(1, (last // block_size)[:, None]).squeeze(1).long()
    slots = block * block_size + last % block_size
    size = (len(slots), kv_heads, step.codec.head_dim)
    key, value = (torch.randn(size, dtype=torch.bfloat16, device=slots.device) for _ in range(2))
    plan, out = plan_of(step), torch.full_like(step.query, torch.nan)
    plan.schedule(step.seq_lens)

    def call() -> torch.Tensor:
        store(step.codec, key, value, step.kv_cache, slots)
        return _run(plan, step, out)

    return call


def prefill(step: DecodeStep, chunk: int, attend_tiles: Attend) -> Call:
    """Attention of the last `chunk` tokens of one sequence to all of it: bf16 [chunk, q_heads, D].

    The plan of tiles, which layers share, is made before the call.
    """
    device, (_, q_heads, head_dim) = step.query.device, step.query.shape
    query = torch.randn(chunk, q_heads, head_dim, dtype=torch.bfloat16, device=device)
    tiles = plan(
        [0, chunk],
        step.seq_lens.tolist(),
        kv_heads=step.kv_cache.shape[2],
        head_dim=head_dim,
        dtype=query.dtype,
        device=device,
    )
    return lambda: prefill_attention(
        step.codec, query, step.kv_cache, step.block_table, tiles, attend_tiles, scale=step.scale
    )


def plan_of(step: DecodeStep, path: Path | None = None) -> DecodePlan:
    """The plan of a step, without a schedule."""
    shape = DecodeShape.of(
        step.codec,
        step.kv_cache,
        step.block_table,
        q_heads=step.query.shape[1],
        query_len=step.query_len,
        window=step.window,
    )
    return DecodePlan(shape, step.kv_cache.device, path=path)


def _run(plan: DecodePlan, step: DecodeStep, out: torch.Tensor) -> torch.Tensor:
    return plan.run(
        step.query,
        step.kv_cache,
        step.block_table,
        step.seq_lens,
        scale=step.scale,
        soft_cap=step.soft_cap,
        sinks=step.sinks,
        out=out,
    )
