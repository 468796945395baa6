"""What our attention backends have in common, whatever device reads the pages.

vLLM asks a backend class for sizes before it makes a cache; each layer has a class of its own format
(`adapters.specs`). It makes one `CompressedImpl` a layer, which knows the layer's format and refuses
attention that compressed pages do not serve. `cpu` and `cuda` add how pages are written and read.
"""

from dataclasses import replace
from functools import cache
from typing import Any, ClassVar, Self

import torch
from vllm.config import get_current_vllm_config
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionImpl,
    AttentionType,
    CommonAttentionMetadata,
    MultipleOf,
)
from vllm.v1.kv_cache_interface import AttentionSpec
from vllm.v1.kv_cache_layout import KVCacheLayout

from turboquant_kernels.codec import Codec
from turboquant_kernels.formats import BLOCK_TOKENS, HEAD_DIMS, PAGE_TOKENS, KVFormat
from turboquant_runtime.adapters.engine_config import layer_format, plan_of
from turboquant_runtime.configuration import CACHE_DTYPES, RefusedConfiguration


class CompressedBackend(AttentionBackend):
    """Sizes and layout of compressed pages."""

    supported_kv_cache_dtypes: ClassVar[list[str]] = sorted(CACHE_DTYPES)
    keeps_raw_block: ClassVar[bool]
    """Whether the tokens of a query's own block are read raw; where not, all are read as stored."""
    fmt: ClassVar[KVFormat | None] = None
    """The format of the layers that have this class; None in the class that vLLM makes layers with."""

    @classmethod
    def of_format(cls, fmt: KVFormat) -> type[Self]:
        """The class of a format's layers."""
        return _of_format(cls, fmt)

    @staticmethod
    def get_name() -> str:
        """A member of vLLM's closed enum of backends; `CUSTOM` is the one kept free for others."""
        return "CUSTOM"

    @classmethod
    def refuse_derived(cls) -> None:
        """Raises RefusedConfiguration for a backend that another kind of attention made from this one.

        Layers with prefix-LM attention, static sinks or chunks do so before they ask for their
        implementation, which is where this is called: no weights yet.
        """
        if not cls.__module__.startswith("turboquant_runtime."):
            raise RefusedConfiguration(
                f"{cls.__name__}: attention of this kind has no compressed form: "
                "start with --kv-cache-dtype auto"
            )

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        """The spec of a layer with this class's format: the bytes of a token and KV head.

        While a draft model is loaded vLLM asks its layers with windows whether they have a spec at all,
        before layers have their formats.
        """
        if cls.fmt is None:
            return spec
        return replace(spec, state_content_bytes=cls.fmt.token_bytes(spec.head_size))

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """A block's bytes are one piece, in an order of their own; other backends want tokens or heads
        first."""
        return KVCacheLayout.LBNHC, KVCacheLayout.LBHNC

    @classmethod
    def get_supported_kernel_block_sizes(cls, kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        """vLLM cuts larger blocks into such ones."""
        return [BLOCK_TOKENS] if cls.keeps_raw_block else [MultipleOf(PAGE_TOKENS)]

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        return list(HEAD_DIMS)

    @classmethod
    def supports_sink(cls) -> bool:
        return True

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return True

    @classmethod
    def supports_mm_prefix(cls) -> bool:
        """Of models whose image tokens see each other in both directions, text: images are refused early."""
        return True

    @classmethod
    def supports_device_cpu_query_lens_mismatch(cls) -> bool:
        """A step is split by the query lengths that the host knows."""
        return False


@cache
def _of_format(backend: type[CompressedBackend], fmt: KVFormat) -> type[Any]:
    return type(backend.__name__, (backend,), {"fmt": fmt, "__module__": backend.__module__})


def blocks_of(kv_cache: torch.Tensor, codec: Codec) -> torch.Tensor:
    """A layer's cache as the kernels take it: uint8 [num_blocks, block_size, kv_heads, slot_bytes].

    kv_cache: as vLLM hands it over, uint8 [num_blocks, kv_heads, block_size, token_bytes] in whatever order
    in memory; a block's bytes are contiguous, key anchors at their end. Pages of layers with fewer bits may
    be padded to those of others. While vLLM measures memory there is no cache, and a tensor without elements
    in its place.
    """
    if not kv_cache.numel():
        return kv_cache
    num_blocks, kv_heads, block_size, _ = kv_cache.shape
    slot_bytes = codec.fmt.slot_bytes(codec.head_dim)
    shape = (num_blocks, block_size, kv_heads, slot_bytes)
    return kv_cache.as_strided(shape, (kv_cache.stride(0), kv_heads * slot_bytes, slot_bytes, 1))


@cache
def _codec(fmt: KVFormat, head_dim: int, seed: int) -> Codec:
    """One codec for all layers of a format: its tables do not depend on the layer."""
    return Codec(fmt, head_dim, seed)


class CompressedImpl(AttentionImpl):
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
        """Raises RefusedConfiguration for attention that compressed pages do not serve; no weights yet.

        A window that no sequence is longer than is none.
        """
        config = get_current_vllm_config()
        if sliding_window is not None and sliding_window >= config.model_config.max_model_len:
            sliding_window = None
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
        self._config = config
        self._codecs: dict[str, Codec] = {}

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
