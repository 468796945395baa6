"""What our attention backends have in common, whatever device reads the pages.

vLLM asks the backend class for sizes and shapes before any layer exists, then makes one `CompressedImpl` a
layer, which knows the layer's format and refuses attention that compressed pages do not serve. `cpu` and
`cuda` add how pages are written and read.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, ClassVar

import torch
from vllm.config import get_current_vllm_config
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionImpl,
    AttentionType,
    CommonAttentionMetadata,
    MultipleOf,
)

from turboquant_kernels.codec import Codec
from turboquant_kernels.formats import HEAD_DIMS, PAGE_TOKENS, KVFormat
from turboquant_runtime.adapters.engine_config import layer_format, plan_of
from turboquant_runtime.configuration import CACHE_DTYPES, RefusedConfiguration


class CompressedBackend(AttentionBackend):
    """Sizes and shapes of compressed pages."""

    forward_includes_kv_cache_update: bool = False
    supported_kv_cache_dtypes: ClassVar[list[str]] = sorted(CACHE_DTYPES)

    @staticmethod
    def get_name() -> str:
        """A member of vLLM's closed enum of backends; `CUSTOM` is the one kept free for others."""
        return "CUSTOM"

    @staticmethod
    def get_supported_kernel_block_sizes() -> list[int | MultipleOf]:
        return [MultipleOf(PAGE_TOKENS)]

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        return list(HEAD_DIMS)

    @classmethod
    def supports_sink(cls) -> bool:
        return True

    @classmethod
    def supports_mm_prefix(cls) -> bool:
        """Of models whose image tokens see each other in both directions, text: images are refused early."""
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


@cache
def _codec(fmt: KVFormat, head_dim: int, seed: int) -> Codec:
    """One codec for all layers of a format: its tables do not depend on the layer."""
    return Codec(fmt, head_dim, seed)


class CompressedImpl(AttentionImpl):
    """One attention layer. Its format follows from the layer's name, which vLLM hands in with each call."""

    _store: ClassVar[Callable[[Codec, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], None]]
    """How the device writes pages: `store.reference.store`, or the kernel with the same arguments."""

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
        self._config = get_current_vllm_config()
        self._codecs: dict[str, Codec] = {}

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
        self._store(self.layer_codec(layer), key, value, kv_cache, slot_mapping)

    def layer_codec(self, layer: Any) -> Codec:
        """The codec of the layer that writes these pages: with cross-layer sharing not this one."""
        name = self.kv_sharing_target_layer_name or layer.layer_name
        if name not in self._codecs:
            plan = plan_of(self._config)
            assert plan is not None, "vLLM routes only layers with a compressed format here"
            self._codecs[name] = _codec(layer_format(self._config, name), self.head_size, plan.seed)
        return self._codecs[name]


def refuse_other_than_causal(batch: CommonAttentionMetadata) -> None:
    """Raises NotImplementedError for a batch whose tokens see later ones."""
    if batch.causal is not True:
        raise NotImplementedError("attention over compressed pages is causal")


def refuse_quantized_output(
    output_scale: torch.Tensor | None, output_block_scale: torch.Tensor | None
) -> None:
    """Raises NotImplementedError for the scales of an output that vLLM's fusion passes want quantized."""
    if output_scale is not None or output_block_scale is not None:
        raise NotImplementedError("quantized attention output is not supported on compressed pages")
