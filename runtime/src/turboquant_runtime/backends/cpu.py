"""Attention on vLLM's CPU platform, served from compressed pages through the torch reference.

vLLM calls a layer twice a step: `do_kv_cache_update` encodes the new tokens into their pages, then
`forward` attends over the pages, those of the step's own tokens included (every query reads every key and
value as the cache stores them). One call covers all sequences of the batch, prefill chunks and decodes
mixed. The pages are all that is kept between steps.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from vllm.config import VllmConfig
from vllm.v1.attention.backend import (
    AttentionMetadata,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)

from turboquant_kernels.decode.reference import paged_attention
from turboquant_kernels.decode.tiles import Tiles, tile_batch
from turboquant_kernels.store.reference import store
from turboquant_runtime.backends.base import (
    CompressedBackend,
    CompressedImpl,
    blocks_of,
    refuse_other_than_causal,
    refuse_quantized_output,
)


class CompressedCPUBackend(CompressedBackend):
    """The classes that vLLM makes for the CPU."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float32, torch.bfloat16, torch.float16]

    @classmethod
    def get_impl_cls(cls) -> type["CompressedCPUImpl"]:
        cls.refuse_derived()
        return CompressedCPUImpl

    @staticmethod
    def get_builder_cls() -> type["CompressedCPUMetadataBuilder"]:
        return CompressedCPUMetadataBuilder


@dataclass
class CompressedCPUMetadata(AttentionMetadata):
    """One step's batch, the same for every layer of a cache group."""

    num_actual_tokens: int
    """Rows of the batch that are tokens; the rest is padding."""
    query_start_loc: torch.Tensor
    """int32 [num_seqs + 1]: where each sequence's new tokens begin."""
    seq_lens: torch.Tensor
    """int32 [num_seqs]: each sequence's length, its new tokens included."""
    block_table: torch.Tensor
    """int32 [num_seqs, max_blocks]: the blocks that hold each sequence, in order."""
    _tiles: dict[int | None, list[Tiles]] = field(default_factory=dict)

    def tiles(self, window: int | None) -> list[Tiles]:
        """How the attention cuts this batch; the layers with the same sliding window share it."""
        if window not in self._tiles:
            self._tiles[window] = tile_batch(self.query_start_loc, self.seq_lens, window)
        return self._tiles[window]


class CompressedCPUMetadataBuilder(AttentionMetadataBuilder[CompressedCPUMetadata]):
    """Hands vLLM's batch description on; the reference needs nothing precomputed."""

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> CompressedCPUMetadata:
        refuse_other_than_causal(common_attn_metadata)
        return CompressedCPUMetadata(
            num_actual_tokens=common_attn_metadata.num_actual_tokens,
            query_start_loc=common_attn_metadata.query_start_loc,
            seq_lens=common_attn_metadata.seq_lens,
            block_table=common_attn_metadata.block_table_tensor,
        )


class CompressedCPUImpl(CompressedImpl):
    """One attention layer, served by the torch reference."""

    _store = staticmethod(store)

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: CompressedCPUMetadata | None,
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
            return output.zero_()
        tokens = attn_metadata.num_actual_tokens
        paged_attention(
            self.layer_codec(layer),
            query[:tokens],
            blocks_of(kv_cache),
            attn_metadata.block_table,
            attn_metadata.query_start_loc,
            attn_metadata.seq_lens,
            scale=self.scale,
            window=self.sliding_window,
            soft_cap=self.logits_soft_cap,
            sinks=self.sinks,
            out=output[:tokens],
            tiles=attn_metadata.tiles(self.sliding_window),
        )
        return output
