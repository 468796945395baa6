"""Attention of chunks of new tokens to their compressed context, by an attention kernel for plain caches.

    for each tile of the plan:  expand its keys and values -> attend -> merge by log-sum-exp
    queries are turned once before, results once after

Every query reads every key and value as the cache stores it, those of its own chunk too
(`decode.reference.paged_attention` is the same in readable form).

The attention kernel is passed in: vLLM's FlashAttention on a GPU, PyTorch in tests.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
import triton
import triton.language as tl

from turboquant_kernels.aot import AotVariant
from turboquant_kernels.codec import Codec
from turboquant_kernels.formats import HEAD_DIMS
from turboquant_kernels.prefill.expand import expand, turn_matrix
from turboquant_kernels.prefill.tiles import Tile, plan_tiles

SCRATCH_BYTES = 128 << 20
"""Decompressed keys and values, whatever the context: 32,768 tokens of 8 KV heads of 128 in bf16."""


class Attend(Protocol):
    """Attention over plain keys and values, ragged, without a cache."""

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        query_starts: torch.Tensor,
        key_starts: torch.Tensor,
        max_queries: int,
        max_keys: int,
        scale: float,
        causal: bool,
        window: int | None,
        soft_cap: float | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """query [n, q_heads, D], key and value [m, kv_heads, D]; starts int32 [pieces + 1].

        With `causal` the last query of a piece stands at its last key; a query sees, of the keys up to its
        own, the last `window`. Returns the output [n, q_heads, D] and the natural log-sum-exp of the scores,
        float32 [q_heads, n].
        """


def flash_attend(varlen: Callable[..., Any], version: int | None) -> Attend:
    """A FlashAttention of vLLM's signature (`flash_attn_varlen_func`), of a version, as `Attend`."""

    def attend(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        query_starts: torch.Tensor,
        key_starts: torch.Tensor,
        max_queries: int,
        max_keys: int,
        scale: float,
        causal: bool,
        window: int | None,
        soft_cap: float | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        output, log_sum = varlen(
            q=query,
            k=key,
            v=value,
            cu_seqlens_q=query_starts,
            max_seqlen_q=max_queries,
            cu_seqlens_k=key_starts,
            max_seqlen_k=max_keys,
            softmax_scale=scale,
            causal=causal,
            window_size=[-1, -1] if window is None else [window - 1, 0],
            softcap=soft_cap or 0.0,
            return_softmax_lse=True,
            fa_version=version,
        )
        return output, log_sum

    return attend


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
    """The tiles of a step for `prefill_attention`, to be shared by the layers of equal shape and window."""
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
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention of a ragged batch of queries to their sequences in the compressed cache.

    query: float [num_tokens, q_heads, D] in a dtype of `attend`; kv_cache: uint8 [num_blocks, block_size,
    kv_heads, slot_bytes]; block_table: int32 [num_seqs, max_blocks]; tiles: the `plan` of the batch, for the
    same window. The other arguments and the result are those of `decode.reference.paged_attention`; rows that
    no tile has are padding and become zero.

    Beside the scratch it holds queries and results a few times over, as any layer does.
    """
    _, _, kv_heads, _ = kv_cache.shape
    turn = turn_matrix(codec.head_dim, codec.seed, query.dtype, query.device)
    turned = query @ turn.T
    attended = torch.zeros_like(turned)
    scratch = query.new_empty(2, max((tile.keys for tile in tiles), default=0), kv_heads, codec.head_dim)
    sums: torch.Tensor | None = None
    for tile in tiles:
        key, value = scratch[:, : tile.keys]
        expand(codec, kv_cache, block_table, tile.runs, key, value)
        part, log_sum = attend(
            turned[tile.rows],
            key,
            value,
            query_starts=tile.query_starts,
            key_starts=tile.key_starts,
            max_queries=tile.max_queries,
            max_keys=tile.max_keys,
            scale=scale,
            causal=tile.causal,
            window=window,
            soft_cap=soft_cap,
        )
        if tile.merged and sums is None:
            sums = torch.zeros(query.shape, dtype=torch.float32, device=query.device)
            log_sums = torch.full(query.shape[:2], -torch.inf, device=query.device)
        if len(tiles) == 1 and sinks is None and len(part) == len(query):
            attended = part
            break
        # A query's causal tile is its last.
        _finish_tile(
            part,
            log_sum,
            (sums[tile.rows], log_sums[tile.rows]) if tile.merged and sums is not None else None,
            sinks,
            attended[tile.rows] if tile.causal else None,
        )
    return torch.matmul(attended, turn, out=out)


def _finish_tile(
    part: torch.Tensor,
    log_sum: torch.Tensor,
    before: tuple[torch.Tensor, torch.Tensor] | None,
    sinks: torch.Tensor | None,
    attended: torch.Tensor | None,
) -> None:
    """Merges a tile's results into `before` and, where no more follow, writes them to `attended`.

    part: float [n, q_heads, D]; log_sum: float32 [q_heads, n]; before: float32 [n, q_heads, D] and
    [n, q_heads], the results of earlier tiles. A sink is one more token without a value: it only makes the
    results smaller.
    """
    if before is None and sinks is None:
        assert attended is not None
        attended.copy_(part)
        return
    tokens, q_heads, head_dim = part.shape
    _merge_tile[tokens, q_heads](
        part,
        log_sum,
        *(before if before is not None else (None, None)),
        sinks,
        attended,
        part.stride(0),
        log_sum.stride(0),
        Q_HEADS=q_heads,
        HEAD_DIM=head_dim,
        WIDTH=triton.next_power_of_2(head_dim),
        num_warps=1,
    )


def variants() -> Iterator[AotVariant]:
    """bf16 of 32 heads: in the middle of a context and at its end, with sinks."""
    for head_dim in HEAD_DIMS:
        for last in (False, True):
            signature = {
                "part": "*bf16",
                "log_sum": "*fp32",
                "sums": "*fp32",
                "log_sums": "*fp32",
                "part_stride": "i32",
                "log_sum_stride": "i32",
            }
            ends = {"sinks": "*fp32", "attended": "*bf16"}
            absent = {} if last else {"sinks": None, "attended": None}
            yield AotVariant(
                name=f"prefill-merge-d{head_dim}{'-last' * last}",
                kernel=_merge_tile,
                signature=signature | (ends if last else {}),
                constexprs={
                    "Q_HEADS": 32,
                    "HEAD_DIM": head_dim,
                    "WIDTH": triton.next_power_of_2(head_dim),
                    **absent,
                },
                num_warps=1,
            )


@triton.jit(do_not_specialize=["log_sum_stride"])  # the number of queries, which is another in each step
def _merge_tile(
    part,  # float [n, q_heads, D], the last two contiguous
    log_sum,  # float32 [q_heads, n]
    sums,  # float32 [n, q_heads, D]; None: no other tiles
    log_sums,  # float32 [n, q_heads]
    sinks,  # float [q_heads]; None: none
    attended,  # float [n, q_heads, D]; None: more tiles follow
    part_stride,
    log_sum_stride,
    Q_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    d = tl.arange(0, WIDTH)
    inside = d < HEAD_DIM
    result = tl.load(part + token * part_stride + head * HEAD_DIM + d, mask=inside, other=0.0).to(tl.float32)
    log = tl.load(log_sum + head * log_sum_stride + token)
    place = (token * Q_HEADS + head) * HEAD_DIM + d
    if sums is not None:
        before = tl.load(sums + place, mask=inside, other=0.0)
        log_before = tl.load(log_sums + token * Q_HEADS + head)
        larger = tl.maximum(log, log_before)
        # Where no token was seen the logarithm is -inf.
        share = tl.where(log == float("-inf"), 0.0, tl.exp(log - larger))
        share_before = tl.where(log_before == float("-inf"), 0.0, tl.exp(log_before - larger))
        total = share + share_before
        result = tl.where(total > 0, (result * share + before * share_before) / total, 0.0)
        log = larger + tl.log(total)
    if attended is None:
        tl.store(sums + place, result, mask=inside)
        tl.store(log_sums + token * Q_HEADS + head, log)
    else:
        if sinks is not None:
            result = result / (1.0 + tl.exp(tl.load(sinks + head).to(tl.float32) - log))
        tl.store(attended + place, result.to(attended.dtype.element_ty), mask=inside)
