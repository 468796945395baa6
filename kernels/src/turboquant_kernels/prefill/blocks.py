"""Attention of chunks of new tokens, which read their own block raw (`turboquant_kernels.raw_block`).

    raw keys and values of each piece's own block -> attend, causally                  -> output, log-sum-exp
    for each tile of the plan:  expand stored keys and values -> attend by pieces -> un-rotate and merge

Raw keys meet queries as they are, stored ones meet rotated queries. `begun_blocks` brings the raw keys
together, before the step stores anything; what is attended to is stored by then, the blocks that the chunk
itself has completed too. `decode.reference.paged_attention` is the same in readable form.
"""

from collections.abc import Sequence

import torch

from turboquant_kernels.codec import Codec
from turboquant_kernels.formats import BLOCK_TOKENS
from turboquant_kernels.prefill.attention import Attend, scratch_tokens
from turboquant_kernels.prefill.expand import expand
from turboquant_kernels.prefill.merge import merge
from turboquant_kernels.prefill.pieces import PiecePlan, plan_pieces
from turboquant_kernels.rotation import signed_hadamard


def plan(
    query_start_loc: Sequence[int],
    seq_lens: Sequence[int],
    *,
    kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device,
    page_tokens: int = BLOCK_TOKENS,
    window: int | None = None,
) -> PiecePlan:
    """The plan of a step for `prefill_attention`, to be shared by the layers of equal shape and window.

    The arguments are those of `pieces.plan_pieces`, and kv_heads, head_dim and dtype of the scratch.
    `attention.flash_page_tokens` knows page_tokens.
    """
    capacity = scratch_tokens(kv_heads, head_dim, dtype)
    return plan_pieces(
        query_start_loc, seq_lens, capacity=capacity, window=window, page_tokens=page_tokens, device=device
    )


def prefill_attention(
    codec: Codec,
    query: torch.Tensor,
    own_key: torch.Tensor,
    own_value: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    plan: PiecePlan,
    attend: Attend,
    *,
    scale: float,
    soft_cap: float | None = None,
    sinks: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention of a ragged batch of queries to their own blocks, raw, and to the stored ones before.

    query: float [num_tokens, q_heads, D] in a dtype of `attend`; own_key, own_value: [plan.own_keys,
    kv_heads, D] of that dtype, from `begun.begun_blocks`; kv_cache: uint8 [num_blocks, BLOCK_TOKENS,
    kv_heads, slot_bytes]; block_table: int32 [num_seqs, max_blocks], whose entries before a window may be
    anything; plan: that of the batch, on the query's device, which knows the layer's window. The other
    arguments are those of `decode.reference.paged_attention`.

    Returns [num_tokens, q_heads, D], or fills and returns `out`, whose heads are contiguous. Rows past those
    of the plan are padding and become zero.
    """
    kv_heads, head_dim = kv_cache.shape[2], codec.head_dim
    out = torch.empty_like(query, memory_format=torch.contiguous_format) if out is None else out
    out[plan.rows :].zero_()
    if not plan.rows:
        return out
    # Results of many tiles are added up in float32.
    merged, lse = attend(
        query[: plan.rows],
        own_key,
        own_value,
        query_starts=plan.query_starts,
        key_starts=plan.key_starts,
        max_queries=plan.max_queries,
        max_keys=plan.max_own_keys,
        scale=scale,
        causal=True,
        left=plan.own_left,
        soft_cap=soft_cap,
        out=out[: plan.rows],
    )
    if plan.is_cut:
        merged = merged.float()
    if sinks is not None:
        # One more token without a value, with which the weights of all others become smaller.
        with_sink = torch.logaddexp(lse, sinks.float()[:, None])
        merged.mul_((lse - with_sink).exp_().T[..., None])
        lse = with_sink

    hadamard = signed_hadamard(head_dim, codec.seed, query.dtype, query.device)
    most_keys = max((tile.keys for tile in plan.tiles), default=0)
    key, value = query.new_empty(2, most_keys + plan.page_tokens - BLOCK_TOKENS, kv_heads, head_dim)
    for tile in plan.tiles:
        expand(codec, kv_cache, block_table, tile.items, key, value)
        if plan.page_tokens > BLOCK_TOKENS:
            # A page reaches beyond the keys, and a weight of zero times what memory holds there may be NaN.
            value[tile.keys : tile.keys + plan.page_tokens].zero_()
        partial, partial_lse = attend(
            query[tile.rows] @ hadamard.T,
            _pages(key, plan.page_tokens),
            _pages(value, plan.page_tokens),
            query_starts=tile.query_starts,
            key_lens=tile.key_lens,
            block_table=tile.block_table,
            max_queries=tile.max_queries,
            max_keys=tile.max_keys,
            scale=scale,
            causal=False,
            left=tile.left,
            soft_cap=soft_cap,
        )
        merge(codec, partial, partial_lse, tile.rows, merged, lse)
    if plan.is_cut:
        out[: plan.rows].copy_(merged)
    return out


def _pages(scratch: torch.Tensor, page_tokens: int) -> torch.Tensor:
    """[rows, kv_heads, D] as pages that begin with every block: [blocks, page_tokens, kv_heads, D]."""
    return scratch.unfold(0, page_tokens, BLOCK_TOKENS).permute(0, 3, 1, 2)
