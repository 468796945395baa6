"""Attention on vLLM's CPU platform, served from compressed pages through the torch reference.

vLLM calls a layer once a step: `forward` stores the new tokens, raw or encoded with the block that they
complete, and attends (`turboquant_kernels.raw_block`: what a query sees of its own block and of earlier
ones). One call covers all sequences of the batch, prefill chunks and decodes mixed. The pages are all that is
kept between steps.
"""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import torch
from vllm.config import VllmConfig
from vllm.v1.attention.backend import (
    AttentionMetadata,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)

from turboquant_kernels.codec import Codec
from turboquant_kernels.decode.reference import paged_attention
from turboquant_kernels.decode.tiles import Tiles, tile_batch
from turboquant_kernels.raw_block import OwnTokens, RawBlocks, Step
from turboquant_kernels.store.reference import store_step
from turboquant_runtime.adapters.engine_config import raw_blocks
from turboquant_runtime.backends.base import (
    CompressedBackend,
    CompressedImpl,
    blocks_of,
    refuse_other_than_causal,
    refuse_quantized_output,
)


class CompressedCPUBackend(CompressedBackend):
    """The classes that vLLM makes for the CPU."""

    keeps_raw_block: ClassVar[bool] = True
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
    step: Step
    """Its sequences, in one group of blocks."""
    _tiles: dict[int | None, list[Tiles]] = field(default_factory=dict)

    def tiles(self, window: int | None) -> list[Tiles]:
        """How the attention cuts this batch; the layers with the same sliding window share it."""
        if window not in self._tiles:
            step = self.step
            self._tiles[window] = tile_batch(step.query_start_loc, step.seq_lens, window, raw_block=True)
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
            step=Step(
                query_start_loc=common_attn_metadata.query_start_loc,
                seq_lens=common_attn_metadata.seq_lens,
                block_table=common_attn_metadata.block_table_tensor,
                slot_mapping=common_attn_metadata.slot_mapping,
            ),
        )


class CompressedCPUImpl(CompressedImpl):
    """One attention layer, served by the torch reference."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._last_step: OwnTokens | None = None
        self._shared: bool | None = None

    @cached_property
    def _raw(self) -> RawBlocks:
        return RawBlocks(raw_blocks(self._config), self._config.model_config.dtype)

    @cached_property
    def _layers(self) -> dict[str, Any]:
        return self._config.compilation_config.static_forward_context  # type: ignore[no-any-return]

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
        """Stores key and value, attends, and fills `output`.

        query, output [num_tokens, heads, head_dim]; key, value [num_tokens, kv_heads, head_dim]; rows beyond
        the batch's tokens are padding. Without metadata vLLM measures memory before there is a cache: the
        output is zero.
        """
        refuse_quantized_output(output_scale, output_block_scale)
        if attn_metadata is None:
            return output.zero_()
        tokens, step = attn_metadata.num_actual_tokens, attn_metadata.step
        codec = self.layer_codec(layer)
        blocks = blocks_of(kv_cache, codec)
        paged_attention(
            codec,
            query[:tokens],
            blocks,
            step.block_table,
            step.query_start_loc,
            step.seq_lens,
            scale=self.scale,
            window=self.sliding_window,
            soft_cap=self.logits_soft_cap,
            sinks=self.sinks,
            out=output[:tokens],
            tiles=attn_metadata.tiles(self.sliding_window),
            own=self._store(layer, codec, step, blocks, key, value),
        )
        return output

    def _store(
        self,
        layer: Any,
        codec: Codec,
        step: Step,
        blocks: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
    ) -> OwnTokens:
        """Stores the step's tokens; what its queries read of their own blocks.

        A layer that shares the cache of an earlier one stores nothing and reads what that layer has read.
        """
        if owner := self.kv_sharing_target_layer_name:
            own = self._layers[owner].impl._last_step
            assert own is not None, "the layer that owns the cache comes first"
            return own  # type: ignore[no-any-return]
        own = OwnTokens.of(step, self._raw, blocks, key, value)
        store_step(codec, own, blocks, self._raw)
        if self._is_shared(layer.layer_name):
            self._last_step = own
        return own

    def _is_shared(self, layer_name: str) -> bool:
        if self._shared is None:
            targets = {getattr(x, "kv_sharing_target_layer_name", None) for x in self._layers.values()}
            self._shared = layer_name in targets
        return self._shared
