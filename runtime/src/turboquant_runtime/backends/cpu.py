"""Attention on vLLM's CPU platform, served from compressed pages through the torch reference.

vLLM calls a layer twice a step: `do_kv_cache_update` encodes the new tokens into their pages, then
`forward` attends over the pages, those of the step's own tokens included (every query reads every key and
value as the cache stores them). One call covers all sequences of the batch, prefill chunks and decodes
mixed. The pages are all that is kept between steps.
"""

from dataclasses import dataclass, field
from functools import cache
from typing import Any, ClassVar

import torch
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionImpl,
    AttentionMetadata,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
    MultipleOf,
)

from turboquant_kernels.codec import Codec
from turboquant_kernels.decode.reference import paged_attention
from turboquant_kernels.decode.tiles import Tiles, tile_batch
from turboquant_kernels.formats import HEAD_DIMS, PAGE_TOKENS, KVFormat
from turboquant_kernels.store.reference import store
from turboquant_runtime.adapters.vllm_0_25 import layer_format, plan_of
from turboquant_runtime.configuration import CACHE_DTYPES, RefusedConfiguration


class CompressedCPUBackend(AttentionBackend):
    """What vLLM asks of a backend before any layer runs: sizes, shapes, classes."""

    forward_includes_kv_cache_update: bool = False
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float32, torch.bfloat16, torch.float16]
    supported_kv_cache_dtypes: ClassVar[list[str]] = sorted(CACHE_DTYPES)

    @staticmethod
    def get_name() -> str:
        """A member of vLLM's closed enum of backends; `CUSTOM` is the one kept free for others."""
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type["CompressedCPUImpl"]:
        return CompressedCPUImpl

    @staticmethod
    def get_builder_cls() -> type["CompressedCPUMetadataBuilder"]:
        return CompressedCPUMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes() -> list[int | MultipleOf]:
        return [MultipleOf(PAGE_TOKENS)]

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        return list(HEAD_DIMS)

    @classmethod
    def supports_sink(cls) -> bool:
        return True

    @staticmethod
    def get_kv_cache_shape(
        num_blocks: int, block_size: int, num_kv_heads: int, head_size: int, cache_dtype_str: str = "auto"
    ) -> tuple[int, ...]:
        """[num_blocks, block_size, num_kv_heads, slot_bytes]: the spec's head_size is half a slot's bytes."""
        return num_blocks, block_size, num_kv_heads, 2 * head_size

    @staticmethod
    def get_kv_cache_stride_order(include_num_layers_dimension: bool = False) -> tuple[int, ...]:
        """Blocks outermost: the store and the attention read a block's stride from the tensor.

        So vLLM may pad the pages of layers with fewer bits up to the largest page where layers share a block
        pool (sliding-window models with a KV plan of mixed sizes).
        """
        return (1, 0, 2, 3, 4) if include_num_layers_dimension else (0, 1, 2, 3)


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
        if common_attn_metadata.causal is not True:
            raise NotImplementedError("attention over compressed pages is causal")
        return CompressedCPUMetadata(
            num_actual_tokens=common_attn_metadata.num_actual_tokens,
            query_start_loc=common_attn_metadata.query_start_loc,
            seq_lens=common_attn_metadata.seq_lens,
            block_table=common_attn_metadata.block_table_tensor,
        )


@cache
def _codec(fmt: KVFormat, head_dim: int, seed: int) -> Codec:
    """One codec for all layers of a format: its tables do not depend on the layer."""
    return Codec(fmt, head_dim, seed)


class CompressedCPUImpl(AttentionImpl):
    """One attention layer. Its format follows from the layer's name, which vLLM hands in with each call."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: torch.Tensor | None = None,
    ) -> None:
        """Raises RefusedConfiguration for attention that compressed pages do not serve; no weights yet."""
        if attn_type != AttentionType.DECODER:
            raise RefusedConfiguration(
                f"{kv_cache_dtype}: {attn_type} attention has no compressed form: "
                "start with --kv-cache-dtype auto"
            )
        if alibi_slopes is not None:
            raise RefusedConfiguration(
                f"{kv_cache_dtype}: ALiBi is not supported: start with --kv-cache-dtype auto"
            )
        self.num_heads = num_heads
        self.head_size = head_size
        self.num_kv_heads = num_kv_heads or num_heads
        self.scale = float(scale)
        self.sliding_window = sliding_window
        self.kv_cache_dtype = kv_cache_dtype
        self.logits_soft_cap = logits_soft_cap
        self.kv_sharing_target_layer_name = kv_sharing_target_layer_name
        self.sinks = sinks
        plan = plan_of(get_current_vllm_config())
        assert plan is not None, "vLLM routes only layers with a compressed format here"
        self._plan = plan

    def do_kv_cache_update(
        self,
        layer: Any,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """Encodes new tokens into their pages.

        key, value [num_tokens, kv_heads, head_dim]; kv_cache uint8 [num_blocks, block_size, kv_heads,
        slot_bytes]; slot_mapping int64 [num_tokens], -1 for padding.
        """
        store(self._layer_codec(layer), key, value, kv_cache, slot_mapping)

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
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError("quantized attention output is not supported on compressed pages")
        if attn_metadata is None:
            return output.zero_()
        tokens = attn_metadata.num_actual_tokens
        paged_attention(
            self._layer_codec(layer),
            query[:tokens],
            kv_cache,
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

    def _layer_codec(self, layer: Any) -> Codec:
        """The codec of the layer that writes these pages: with cross-layer sharing not this one."""
        name = self.kv_sharing_target_layer_name or layer.layer_name
        return _codec(layer_format(self._plan, name), self.head_size, self._plan.seed)
