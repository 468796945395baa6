"""Attention on vLLM's CUDA platform, served from compressed pages by this project's kernels.

vLLM calls a layer twice a step: `do_kv_cache_update` encodes the new tokens into their pages, then `forward`
attends over the pages, those of the step's own tokens included. A step is divided once (`division`):

    sequences with one or a few query tokens -> decode.launch.paged_decode: lengths are read on the device,
                                                so that vLLM can capture it in a CUDA graph
    chunks of prompts                        -> prefill.attention: pages are expanded a tile at a time and
                                                given to vLLM's FlashAttention

What a step needs beside that (the decode's schedule, the prefill's tiles) the first layer makes and the
others share. Nothing waits for the device.
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
from turboquant_kernels.decode.launch import paged_decode
from turboquant_kernels.prefill.attention import Attend, prefill_attention
from turboquant_kernels.store.kernel import store
from turboquant_runtime.backends.base import CompressedBackend, CompressedImpl, refuse_quantized_output
from turboquant_runtime.backends.flash import flash_attention
from turboquant_runtime.backends.rehearsal import rehearse
from turboquant_runtime.backends.step import (
    CompressedCUDAMetadata,
    Decodes,
    Prefills,
    decode_limit,
    step_of,
)


class CompressedCUDABackend(CompressedBackend):
    """The classes that vLLM makes for a GPU."""

    # What FlashAttention, the prefill's attention, computes in.
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.bfloat16, torch.float16]

    @classmethod
    def supports_compute_capability(cls, capability: DeviceCapability) -> bool:
        return capability >= DeviceCapability(8, 0)

    @staticmethod
    def get_impl_cls() -> type["CompressedCUDAImpl"]:
        return CompressedCUDAImpl

    @staticmethod
    def get_builder_cls() -> type["CompressedCUDAMetadataBuilder"]:
        return CompressedCUDAMetadataBuilder


class CompressedCUDAMetadataBuilder(AttentionMetadataBuilder[CompressedCUDAMetadata]):
    """Divides vLLM's batch; everything else is made by the layers, once they know their cache."""

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_BATCH

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._init_reorder_batch_threshold(1, supports_spec_as_decode=True)
        self._limit = decode_limit(vllm_config)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> CompressedCUDAMetadata:
        return step_of(common_attn_metadata, self._limit, self.device)


class CompressedCUDAImpl(CompressedImpl):
    """One attention layer, served by the kernels."""

    _store = staticmethod(store)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._attend: Attend = flash_attention(self.head_size)

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
                rehearse(self, layer, self._config, query, key, value)
            return output.zero_()
        codec, decode_tokens = self.layer_codec(layer), 0
        if decodes := attn_metadata.decodes:
            decode_tokens = decodes.tokens
            self.decode(codec, query[:decode_tokens], kv_cache, decodes, output[:decode_tokens])
        if prefills := attn_metadata.prefills:
            rows = slice(decode_tokens, decode_tokens + prefills.query_starts[-1])
            self.prefill(codec, query[rows], kv_cache, prefills, output[rows])
        return output

    def decode(
        self,
        codec: Codec,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        decodes: Decodes,
        out: torch.Tensor,
    ) -> None:
        """Attention of the decoded sequences: query and out [decodes.tokens, heads, head_dim]."""
        places, even_query, even_out = decodes.places, query, out
        if places is not None:
            rows = len(decodes.seq_lens) * decodes.query_len
            even_query = query.new_zeros(rows, *query.shape[1:]).index_copy_(0, places, query)
            even_out = torch.empty_like(even_query)
        paged_decode(
            codec,
            even_query,
            kv_cache,
            decodes.block_table,
            decodes.seq_lens,
            query_len=decodes.query_len,
            scale=self.scale,
            window=self.sliding_window,
            soft_cap=self.logits_soft_cap,
            sinks=self.sinks,
            workspace=decodes.workspace(codec, kv_cache, self.num_heads, self.sliding_window),
            out=even_out,
        )
        if places is not None:
            torch.index_select(even_out, 0, places, out=out)

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
            window=self.sliding_window,
            soft_cap=self.logits_soft_cap,
            sinks=self.sinks,
            out=out,
        )
