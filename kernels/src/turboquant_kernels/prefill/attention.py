"""Attention of chunks of new tokens to their compressed context, by an attention kernel for plain caches.

    for each context tile of the plan:  expand its keys and values -> attend -> merge by log-sum-exp
    queries are rotated once before, the output is rotated back once after

Every query reads every key and value as the cache stores it, those of its own chunk too
(`decode.reference.paged_attention` is the same in readable form).

The attention kernel is passed in: vLLM's FlashAttention on a GPU, PyTorch in tests.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import triton
import triton.language as tl

from turboquant_kernels.codec import Codec
from turboquant_kernels.formats import BLOCK_TOKENS
from turboquant_kernels.prefill.expand import expand
from turboquant_kernels.prefill.tiles import Tile, plan_tiles
from turboquant_kernels.rotation import signed_hadamard

SCRATCH_BYTES = 128 << 20
"""Expanded keys and values, whatever the context: 32,768 tokens of 8 KV heads of 128 in bf16."""


_BUSY_VECTORS = 132 * 128
"""Queries times heads that fill the 132 multiprocessors of an H200 with FlashAttention-3's tiles of 128.

It decides whether to split keys by the longest segment, as if there were no other, and has a float32 output
for each split: 512 MiB for 8,192 queries of 32 heads of 128 in pieces of a block (hopper/heuristics.h).
"""


class Attend(Protocol):
    """Attention over plain keys and values of segments of a ragged batch."""

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        query_starts: torch.Tensor,
        key_starts: torch.Tensor | None = None,
        key_lens: torch.Tensor | None = None,
        block_table: torch.Tensor | None = None,
        max_queries: int,
        max_keys: int,
        scale: float,
        causal: bool,
        left: int | None,
        soft_cap: float | None,
        out: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """query [n, q_heads, D], key and value [m, kv_heads, D]; starts int32 [segments + 1].

        Or key and value are pages [pages, page_tokens, kv_heads, D], which may overlap in memory, and a
        segment's keys the first of those that `block_table` names: key_lens int32 [segments], block_table
        int32 [segments, most pages], in place of key_starts.

        Queries and keys of a segment are aligned at their ends: of n queries and m keys query i stands at
        key i + m - n, which is negative for the first queries where n > m. It sees all keys of the segment;
        with `causal` none after the key where it stands, with `left` none more than `left` keys before
        that. Each query sees at least one key.

        Returns the output [n, q_heads, D], in `out` where it is given, and the natural log-sum-exp of the
        scores, float32 [q_heads, n].
        """


def flash_attend(varlen: Callable[..., Any], version: int | None) -> Attend:
    """A FlashAttention of vLLM's signature (`flash_attn_varlen_func`), of a version, as `Attend`."""

    def attend(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        query_starts: torch.Tensor,
        key_starts: torch.Tensor | None = None,
        key_lens: torch.Tensor | None = None,
        block_table: torch.Tensor | None = None,
        max_queries: int,
        max_keys: int,
        scale: float,
        causal: bool,
        left: int | None,
        soft_cap: float | None,
        out: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        window_size = [-1, -1]
        if left is not None:
            # The last key lies fewer keys after a query than there are queries. FlashAttention-2 lowers a
            # bound on the right, and sets an open one, to max_seqlen_k (csrc/flash_attn/flash_api.cpp).
            window_size = [left, 0 if causal else max_queries]
            max_keys = max(max_keys, max_queries)
        is_busy = query.shape[:2].numel() >= _BUSY_VECTORS
        return varlen(
            q=query,
            k=key,
            v=value,
            cu_seqlens_q=query_starts,
            max_seqlen_q=max_queries,
            cu_seqlens_k=key_starts,
            seqused_k=key_lens,
            block_table=block_table,
            max_seqlen_k=max_keys,
            softmax_scale=scale,
            causal=causal,
            window_size=window_size,
            softcap=soft_cap or 0.0,
            return_softmax_lse=True,
            out=out,
            num_splits=1 if version == 3 and block_table is not None and is_busy else 0,
            fa_version=version,
        )

    return attend


def flash_page_tokens(head_dim: int, version: int | None) -> int:
    """Tokens of a page for `pieces.plan_pieces` that suits a FlashAttention.

    FlashAttention-3 copies pages by TMA, as it does keys without pages, where their size is a multiple of
    its tile of keys (hopper/flash_api.cpp, `get_pagedkv_tma`, and hopper/tile_size.h); elsewhere thread by
    thread, mostly through smaller tiles.
    """
    tile = {64: 192, 80: 144, 96: 144, 128: 160, 192: 96, 256: 80}.get(head_dim)
    return math.lcm(BLOCK_TOKENS, tile) if version == 3 and tile else BLOCK_TOKENS


def scratch_tokens(kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
    """Tokens whose keys and values fit in `SCRATCH_BYTES`."""
    return SCRATCH_BYTES // (2 * kv_heads * head_dim * dtype.itemsize)


def plan(
    query_start_loc: Sequence[int],
    seq_lens: Sequence[int],
    *,
    kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device,
    window: int | None = None,
) -> list[Tile]:
    """The tiles of a step for `prefill_attention`, to be shared by the layers of equal shape and window.

    The arguments are those of `tiles.plan_tiles`, and kv_heads, head_dim and dtype of the scratch.
    """
    capacity = scratch_tokens(kv_heads, head_dim, dtype)
    tiles = plan_tiles(query_start_loc, seq_lens, capacity=capacity, window=window)
    return [tile.to(device) for tile in tiles]


def prefill_attention(
    codec: Codec,
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    tiles: list[Tile],
    attend: Attend,
    *,
    scale: float,
    soft_cap: float | None = None,
    sinks: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention of a ragged batch of queries to their sequences in the compressed cache.

    query: float [num_tokens, q_heads, D] in a dtype of `attend`; kv_cache: uint8 [num_blocks, block_size,
    kv_heads, slot_bytes]; block_table: int32 [num_seqs, max_blocks], whose entries before a window may be
    anything; tiles: the `plan` of the batch, on the query's device, which knows the layer's window. The other
    arguments and the result are those of `decode.reference.paged_attention`; rows that no tile has are
    padding and become zero.

    Beside the scratch it holds queries and outputs a few times over, as any layer does.
    """
    _, _, kv_heads, _ = kv_cache.shape
    hadamard = signed_hadamard(codec.head_dim, codec.seed, query.dtype, query.device)
    rotated = query @ hadamard.T
    output = torch.zeros_like(rotated)
    scratch = query.new_empty(2, max((tile.keys for tile in tiles), default=0), kv_heads, codec.head_dim)
    earlier: torch.Tensor | None = None
    for tile in tiles:
        key, value = scratch[:, : tile.keys]
        expand(codec, kv_cache, block_table, tile.items, key, value)
        partial, lse = attend(
            rotated[tile.rows],
            key,
            value,
            query_starts=tile.query_starts,
            key_starts=tile.key_starts,
            max_queries=tile.max_queries,
            max_keys=tile.max_keys,
            scale=scale,
            causal=tile.causal,
            left=tile.left,
            soft_cap=soft_cap,
        )
        if tile.merged and earlier is None:
            earlier = torch.zeros(query.shape, dtype=torch.float32, device=query.device)
            earlier_lse = torch.full(query.shape[:2], -torch.inf, device=query.device)
        if len(tiles) == 1 and sinks is None and len(partial) == len(query):
            output = partial
            break
        # A query's causal tile is its last.
        _merge(
            partial,
            lse,
            (earlier[tile.rows], earlier_lse[tile.rows]) if tile.merged and earlier is not None else None,
            sinks,
            output[tile.rows] if tile.causal else None,
        )
    return torch.matmul(output, hadamard, out=out)


def _merge(
    partial: torch.Tensor,
    lse: torch.Tensor,
    earlier: tuple[torch.Tensor, torch.Tensor] | None,
    sinks: torch.Tensor | None,
    output: torch.Tensor | None,
) -> None:
    """Merges a tile's results with those of earlier tiles: into `output`, or into `earlier` where it is None.

    partial: float [n, q_heads, D] and lse: float32 [q_heads, n], of the tile; earlier: the same of all tiles
    before it, float32 [n, q_heads, D] and [n, q_heads]; output: float [n, q_heads, D], once no more tiles
    follow. A sink is one more token without a value: it only makes the output smaller.
    """
    if earlier is None and sinks is None:
        assert output is not None
        output.copy_(partial)
        return
    tokens, q_heads, head_dim = partial.shape
    merge_kernel[tokens, q_heads](
        partial,
        lse,
        *(earlier if earlier is not None else (None, None)),
        sinks,
        output,
        partial.stride(0),
        lse.stride(0),
        Q_HEADS=q_heads,
        HEAD_DIM=head_dim,
        WIDTH=triton.next_power_of_2(head_dim),
        num_warps=1,
    )


@triton.jit(do_not_specialize=["lse_stride"])  # the number of queries, which is another in each step
def merge_kernel(
    partial,  # float [n, q_heads, D], the last two contiguous
    lse,  # float32 [q_heads, n]
    earlier,  # float32 [n, q_heads, D]; None: no other tiles
    earlier_lse,  # float32 [n, q_heads]
    sinks,  # float [q_heads]; None: none
    output,  # float [n, q_heads, D]; None: more tiles follow
    partial_stride,
    lse_stride,
    Q_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Grid: (tokens, query heads). See `_merge`."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    d = tl.arange(0, WIDTH)
    inside = d < HEAD_DIM
    result = tl.load(partial + token * partial_stride + head * HEAD_DIM + d, mask=inside, other=0.0).to(
        tl.float32
    )
    log = tl.load(lse + head * lse_stride + token)
    index = (token * Q_HEADS + head) * HEAD_DIM + d
    if earlier is not None:
        before = tl.load(earlier + index, mask=inside, other=0.0)
        log_before = tl.load(earlier_lse + token * Q_HEADS + head)
        larger = tl.maximum(log, log_before)
        # Where no token was seen the logarithm is -inf.
        share = tl.where(log == float("-inf"), 0.0, tl.exp(log - larger))
        share_before = tl.where(log_before == float("-inf"), 0.0, tl.exp(log_before - larger))
        total = share + share_before
        result = tl.where(total > 0, (result * share + before * share_before) / total, 0.0)
        log = larger + tl.log(total)
    if output is None:
        tl.store(earlier + index, result, mask=inside)
        tl.store(earlier_lse + token * Q_HEADS + head, log)
    else:
        if sinks is not None:
            result = result / (1.0 + tl.exp(tl.load(sinks + head).to(tl.float32) - log))
        tl.store(output + index, result.to(output.dtype.element_ty), mask=inside)
