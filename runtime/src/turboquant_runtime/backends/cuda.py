"""Attention on vLLM's CUDA platform, served from compressed pages by this project's kernels.

vLLM calls a layer twice a step: `do_kv_cache_update` encodes the new tokens into their pages, then `forward`
attends over the pages, those of the step's own tokens included. A step is split once (`batch`):

    sequences with one or a few query tokens -> DecodePlan.run: lengths are read on the device, so that
                                                vLLM can capture it in a CUDA graph
    chunks of prompts                        -> prefill_attention: pages are expanded a tile at a time
                                                and given to vLLM's FlashAttention

Nothing waits for the device. `decode_plans` says who owns the buffers of decodes and who fills their
schedule.
"""

from typing import Any, ClassVar

import torch
from vllm.config import VllmConfig
from vllm.platforms.interface import DeviceCapability
from vllm.v1.attention.backend import (
    AttentionCGSupport,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)

from turboquant_kernels.codec import Codec
from turboquant_kernels.decode.plan import DecodePlan, DecodeShape
from turboquant_kernels.prefill.attention import Attend, prefill_attention
from turboquant_kernels.store.kernel import store
from turboquant_runtime.adapters.engine_config import is_draft_layer
from turboquant_runtime.backends.base import (
    CompressedBackend,
    CompressedImpl,
    blocks_of,
    refuse_quantized_output,
)
from turboquant_runtime.backends.decode_plans import decode_plans_of
from turboquant_runtime.backends.flash import flash_attention
from turboquant_runtime.backends.step import (
    CompressedCUDAMetadata,
    Decodes,
    Prefills,
    decode_limit,
    step_of,
)
from turboquant_runtime.backends.warm_up import is_first_of_its_shape, warm_up, warm_up_decodes

_WIDE_CACHE_BYTES = 8 << 30
"""Of a layer's cache: from here on the decode kernel takes 64-bit offsets."""


class CompressedCUDABackend(CompressedBackend):
    """The classes that vLLM makes for a GPU."""

    forward_includes_kv_cache_update: bool = False
    keeps_raw_block: ClassVar[bool] = False
    # What FlashAttention, the prefill's attention, computes in.
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.bfloat16, torch.float16]

    @classmethod
    def supports_compute_capability(cls, capability: DeviceCapability) -> bool:
        return capability >= DeviceCapability(8, 0)

    @classmethod
    def get_impl_cls(cls) -> type["CompressedCUDAImpl"]:
        cls.refuse_derived()
        return CompressedCUDAImpl

    @staticmethod
    def get_builder_cls() -> type["CompressedCUDAMetadataBuilder"]:
        return CompressedCUDAMetadataBuilder


class CompressedCUDAMetadataBuilder(AttentionMetadataBuilder[CompressedCUDAMetadata]):
    """Splits vLLM's batch; everything else is made by the layers, once they know their cache."""

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_BATCH

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._init_reorder_batch_threshold(1, supports_spec_as_decode=True)
        self._limit = decode_limit(vllm_config)
        self._warm_up_for_large_caches()

    def _warm_up_for_large_caches(self) -> None:
        """Compiles what only large caches take, whose size is known by now; vLLM makes builders before it
        serves."""
        blocks = self.vllm_config.cache_config.num_gpu_blocks or 0
        if blocks * self.kv_cache_spec.page_size_bytes < _WIDE_CACHE_BYTES:
            return
        context: dict[str, Any] = self.vllm_config.compilation_config.static_forward_context
        layers = [context[name] for name in self.layer_names]
        dtype = self.vllm_config.model_config.dtype
        for layer in layers:
            if is_first_of_its_shape(layer, layers):
                warm_up_decodes(layer.impl, layer, self.vllm_config, dtype, self.device, wide_offsets=True)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> CompressedCUDAMetadata:
        return step_of(common_attn_metadata, self._limit, self.device)


class CompressedCUDAImpl(CompressedImpl):
    """One attention layer, served by the kernels."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._attend: Attend = flash_attention(self.head_size)
        self.decode_plans = decode_plans_of(self._config)
        self._decode_plans: dict[tuple[int, ...], tuple[DecodePlan, bool]] = {}

    def do_kv_cache_update(
        self,
        layer: Any,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """Encodes new tokens into their pages.

        key, value [num_tokens, kv_heads, head_dim]; kv_cache uint8 [num_blocks, kv_heads, block_size,
        slot_bytes]; slot_mapping int64 [num_tokens], -1 for padding.
        """
        codec = self.layer_codec(layer)
        store(codec, key, value, blocks_of(kv_cache, codec), slot_mapping)

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: CompressedCUDAMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attends over the pages, in which key and value are already, and fills `output`.

        query, output [num_tokens, heads, head_dim]; rows beyond the batch's tokens are padding. Without
        metadata vLLM measures memory before there is a cache: the output is zero.
        """
        refuse_quantized_output(output_scale, output_block_scale)
        if attn_metadata is None:
            if not kv_cache.numel():
                warm_up(self, layer, self._config, query, key, value)
            return output.zero_()
        codec = self.layer_codec(layer)
        blocks, decode_tokens = blocks_of(kv_cache, codec), 0
        if decodes := attn_metadata.decodes:
            decode_tokens = decodes.tokens
            self.decode(layer, query[:decode_tokens], blocks, decodes, output[:decode_tokens])
        if prefills := attn_metadata.prefills:
            rows = slice(decode_tokens, decode_tokens + prefills.query_starts[-1])
            self.prefill(codec, query[rows], blocks, prefills, output[rows])
        return output

    def decode(
        self,
        layer: Any,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        decodes: Decodes,
        out: torch.Tensor,
    ) -> None:
        """Attention of the decoded sequences: query and out [decodes.tokens, heads, head_dim].

        kv_cache: uint8 [num_blocks, block_size, kv_heads, slot_bytes].
        """
        rows, padded_query, padded_out = decodes.padded_rows, query, out
        if rows is not None:
            size = len(decodes.seq_lens) * decodes.query_len
            padded_query = query.new_zeros(size, *query.shape[1:]).index_copy_(0, rows, query)
            padded_out = torch.empty_like(padded_query)
        plan, schedules = self._decode_plan(layer, kv_cache, decodes)
        if schedules:
            plan.schedule(decodes.seq_lens)
        plan.run(
            padded_query,
            kv_cache,
            decodes.block_table,
            decodes.seq_lens,
            scale=self.scale,
            soft_cap=self.logits_soft_cap,
            sinks=self.sinks,
            out=padded_out,
        )
        if rows is not None:
            torch.index_select(padded_out, 0, rows, out=out)

    def _decode_plan(self, layer: Any, kv_cache: torch.Tensor, decodes: Decodes) -> tuple[DecodePlan, bool]:
        """The plan of a step's decodes, and whether this layer fills its schedule."""
        table = decodes.block_table
        key = (*table.shape, decodes.query_len, kv_cache.stride(0))
        if key not in self._decode_plans:
            shape = DecodeShape.of(
                self.layer_codec(layer),
                kv_cache,
                table,
                q_heads=self.num_heads,
                query_len=decodes.query_len,
                window=self.sliding_window,
            )
            draft = is_draft_layer(self._config, layer.layer_name)
            self._decode_plans[key] = (
                self.decode_plans.plan(shape, kv_cache.device),
                self.decode_plans.schedules(layer.layer_name, shape, draft),
            )
        return self._decode_plans[key]

    def prefill(
        self,
        codec: Codec,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        prefills: Prefills,
        out: torch.Tensor,
    ) -> None:
        """Attention of chunks of prompts: query and out [rows, heads, head_dim]."""
        prefill_attention(
            codec,
            query,
            kv_cache,
            prefills.block_table,
            prefills.tiles(self.num_kv_heads, self.head_size, query.dtype, self.sliding_window),
            self._attend,
            scale=self.scale,
            soft_cap=self.logits_soft_cap,
            sinks=self.sinks,
            out=out,
        )
