"""The first steps of a layer, played through while vLLM measures memory.

vLLM runs the model once on the largest batch, without a cache and without metadata, and gives the cache what
that run left over. So that run has to hold what serving will: the prefill's scratch beside its turned queries
and sums, the decode's partial results. Playing both roads on a cache of one block does so, and compiles the
kernels before a request waits for them.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import triton
from vllm.config import VllmConfig

from turboquant_kernels.decode.launch import Workspace
from turboquant_kernels.prefill.attention import scratch_tokens
from turboquant_kernels.store.kernel import store
from turboquant_runtime.backends.step import Decodes, Prefills, decode_limit


def rehearse(
    impl: Any, layer: Any, config: VllmConfig, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> None:
    """Stores, prefills and decodes as the layer will; query, key and value are those of the largest batch.

    Layers of equal shape need the same, so that only the first of them does it.
    """
    if layer is not _first_of_its_shape(impl, layer, config):
        return
    codec, tokens, device = impl.layer_codec(layer), len(query), query.device
    block_size = layer.get_kv_cache_spec(config).block_size
    slot_bytes = codec.fmt.slot_bytes(codec.head_dim)
    kv_cache = torch.zeros(1, block_size, impl.num_kv_heads, slot_bytes, dtype=torch.uint8, device=device)
    # Slots of -1 are not written.
    store(codec, key, value, kv_cache, torch.full((tokens,), -1, device=device))

    # A context that fills the scratch and is merged with what precedes it, as far as the model reads.
    room = scratch_tokens(impl.num_kv_heads, codec.head_dim, query.dtype)
    length = max(tokens, min(config.model_config.max_model_len, room + tokens))
    out = torch.empty_like(query)
    prefills = Prefills([0, tokens], [length], _block_table(1, length, block_size, device))
    impl.prefill(codec, query, kv_cache, prefills, out)

    most = config.scheduler_config.max_num_seqs
    table = _block_table(most, config.model_config.max_model_len, block_size, device)
    limit = decode_limit(config)
    # The largest first: it reserves the memory that the others share.
    for query_len in sorted({1, max(1, limit - 1), limit}, reverse=True):
        allocate = partial(
            Workspace.allocate,
            codec,
            kv_cache,
            query_len=query_len,
            q_heads=impl.num_heads,
            window=impl.sliding_window,
        )
        for num_seqs in batch_sizes_to_compile(table, allocate):
            decodes = Decodes(
                query_len,
                num_seqs * query_len,
                None,
                torch.full((num_seqs,), query_len, dtype=torch.int32, device=device),
                table[:num_seqs],
            )
            batch = query.new_zeros(num_seqs * query_len, *query.shape[1:])
            impl.decode(codec, batch, kv_cache, decodes, torch.empty_like(batch))


def batch_sizes_to_compile(
    block_table: torch.Tensor, allocate: Callable[[torch.Tensor], Workspace]
) -> list[int]:
    """Numbers of sequences, up to those of the block table and these first, that between them take every
    kernel of decode attention which any number takes. `allocate` makes the workspace of a block table."""
    sizes: dict[tuple[object, ...], int] = {}
    for num_seqs in range(len(block_table), 0, -1):
        own = allocate(block_table[:num_seqs])
        # The schedule's kernel has a size for the number of sequences, the merge's for their splits.
        splits = triton.cdiv(len(own.schedule.items), num_seqs)
        rounded = [triton.next_power_of_2(n) for n in (num_seqs, splits)]
        sizes.setdefault((own.launch, own.counters is None, *rounded), num_seqs)
    return list(sizes.values())


def _first_of_its_shape(impl: Any, layer: Any, config: VllmConfig) -> Any:
    """The first layer, in the order in which they were made, that is served as this one is."""
    for other in config.compilation_config.static_forward_context.values():
        if type(getattr(other, "impl", None)) is type(impl) and _shape(other.impl, other) == _shape(
            impl, layer
        ):
            return other
    return layer


def _shape(impl: Any, layer: Any) -> tuple[Any, ...]:
    return (
        impl.layer_codec(layer),
        impl.num_heads,
        impl.num_kv_heads,
        impl.sliding_window,
        impl.logits_soft_cap,
        impl.sinks is not None,
    )


def _block_table(num_seqs: int, length: int, block_size: int, device: torch.device) -> torch.Tensor:
    """Sequences that read the one block again and again, in rows as wide as vLLM's: of whole 128 tokens."""
    aligned = max(1, 128 // block_size)
    width = triton.cdiv(triton.cdiv(length, block_size), aligned) * aligned
    return torch.zeros(num_seqs, width, dtype=torch.int32, device=device)
