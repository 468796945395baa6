"""A layer's first steps, run while vLLM measures memory, so that no kernel is compiled for a request.

vLLM runs the model once on the largest batch, without a cache and without metadata, and gives the cache
what that run left over. So that run has to hold what serving will: the prefill's scratch beside its rotated
queries and sums, the decode's partial results. A prefill and decodes on a cache of one block do so, and
compile the kernels.
"""

from collections.abc import Iterable
from typing import Any

import torch
import triton
from vllm.config import VllmConfig

from turboquant_kernels.decode.plan import DecodePlan, DecodeShape
from turboquant_kernels.prefill.attention import scratch_tokens
from turboquant_kernels.store.kernel import store
from turboquant_runtime.backends.batch import decode_query_lens
from turboquant_runtime.backends.step import Prefills, decode_limit


def warm_up(
    impl: Any, layer: Any, config: VllmConfig, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> None:
    """Stores, prefills and decodes as the layer will; query, key and value are those of the largest batch.

    Does nothing for layers that are not the first of their shape.
    """
    if not is_first_of_its_shape(layer, config.compilation_config.static_forward_context.values()):
        return
    codec, tokens, device = impl.layer_codec(layer), len(query), query.device
    kv_cache = _one_block(impl, layer, config, device)
    block_size = kv_cache.shape[1]
    # Slots of -1 are not written.
    store(codec, key, value, kv_cache, torch.full((tokens,), -1, device=device))

    # A context that fills the scratch and is merged with what precedes it, as far as the model reads.
    room = scratch_tokens(impl.num_kv_heads, codec.head_dim, query.dtype)
    length = max(tokens, min(config.model_config.max_model_len, room + tokens))
    out = torch.empty_like(query)
    prefills = Prefills([0, tokens], [length], _block_table(1, length, block_size, device))
    impl.prefill(codec, query, kv_cache, prefills, out)
    warm_up_decodes(impl, layer, config, query.dtype, device)


def warm_up_decodes(
    impl: Any,
    layer: Any,
    config: VllmConfig,
    dtype: torch.dtype,
    device: torch.device,
    *,
    wide_offsets: bool | None = None,
) -> None:
    """Decodes every number of query tokens and sequences that takes a kernel of its own; the largest first:
    it reserves the memory that the others share. `wide_offsets` as `DecodePlan.run` takes it."""
    codec, kv_cache = impl.layer_codec(layer), _one_block(impl, layer, config, device)
    most = config.scheduler_config.max_num_seqs
    table = _block_table(most, config.model_config.max_model_len, kv_cache.shape[1], device)
    for query_len in reversed(decode_query_lens(decode_limit(config))):
        for plan in plans_to_compile(impl, codec, kv_cache, table, query_len):
            num_seqs = plan.shape.num_seqs
            lens = torch.full((num_seqs,), query_len, dtype=torch.int32, device=device)
            query = torch.zeros(
                num_seqs * query_len, impl.num_heads, codec.head_dim, dtype=dtype, device=device
            )
            plan.schedule(lens)
            plan.run(
                query,
                kv_cache,
                table[:num_seqs],
                lens,
                scale=impl.scale,
                soft_cap=impl.logits_soft_cap,
                sinks=impl.sinks,
                wide_offsets=wide_offsets,
            )


def plans_to_compile(
    impl: Any, codec: Any, kv_cache: torch.Tensor, block_table: torch.Tensor, query_len: int
) -> list[DecodePlan]:
    """Plans for numbers of sequences, up to those of the block table and these first, that between them
    launch every kernel which any number launches."""
    plans: dict[Any, DecodePlan] = {}
    for num_seqs in range(len(block_table), 0, -1):
        shape = DecodeShape.of(
            codec,
            kv_cache,
            block_table[:num_seqs],
            q_heads=impl.num_heads,
            query_len=query_len,
            window=impl.sliding_window,
        )
        plan = impl.decode_plans.new_plan(shape, kv_cache.device)
        plans.setdefault(plan.kernels, plan)
    return list(plans.values())


def _one_block(impl: Any, layer: Any, config: VllmConfig, device: torch.device) -> torch.Tensor:
    """A cache of one block in the shape of the layer's."""
    block_size = layer.get_kv_cache_spec(config).block_size
    slot_bytes = impl.layer_codec(layer).fmt.slot_bytes(impl.head_size)
    return torch.zeros(1, block_size, impl.num_kv_heads, slot_bytes, dtype=torch.uint8, device=device)


def is_first_of_its_shape(layer: Any, layers: Iterable[Any]) -> bool:
    """Whether this layer is the first of `layers` that takes its kernels and memory."""
    impl = layer.impl
    for other in layers:
        if type(getattr(other, "impl", None)) is type(impl) and _kind(other.impl, other) == _kind(
            impl, layer
        ):
            return other is layer
    return True


def _kind(impl: Any, layer: Any) -> tuple[Any, ...]:
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
