"""Our attention backends as vLLM 0.33 asks for them; `vllm_0_33` says what has been tried: nothing.

vLLM 0.33 hands a layer's pages over as [num_blocks, kv_heads, block_size, bytes] whatever their order in
memory. In the one layout that is asked for here the tokens of a block come before its heads, so that turning
the two axes gives the contiguous pages of `backends`.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from vllm.config import get_current_vllm_config
from vllm.v1.attention.backend import MultipleOf
from vllm.v1.kv_cache_layout import KVCacheLayout

from turboquant_kernels.formats import PAGE_TOKENS
from turboquant_runtime.adapters.engine_config import plan_of
from turboquant_runtime.backends import cpu, cuda


class _Backend:
    """What both backends answer beside what they answered vLLM 0.25."""

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> Sequence[int | MultipleOf]:
        return [MultipleOf(PAGE_TOKENS)]

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        return (KVCacheLayout.LBNHC,)

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return True

    @classmethod
    def customize_spec(cls, spec: Any) -> Any:
        """The bytes of a token and KV head: those that the layer has been given, or the plan's largest.

        The latter is asked for before layers exist, to size a hybrid's blocks, and must not be too small.
        """
        plan = plan_of(get_current_vllm_config())
        if spec.dtype != torch.uint8 or spec.state_content_bytes is not None or plan is None:
            return spec
        slots = [layer.slot_bytes(spec.head_size) for layer in plan.layers if layer.compressed]
        return replace(spec, state_content_bytes=max(slots))


def _pages(kv_cache: torch.Tensor) -> torch.Tensor:
    """[num_blocks, kv_heads, block_size, bytes] as [num_blocks, block_size, kv_heads, bytes].

    While vLLM measures memory there is no cache, and a tensor without elements in its place.
    """
    return kv_cache.transpose(1, 2) if kv_cache.numel() else kv_cache


class _Impl:
    """Turns a layer's pages before they are written and read."""

    def do_kv_cache_update(
        self,
        layer: Any,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        super().do_kv_cache_update(layer, key, value, _pages(kv_cache), slot_mapping)  # type: ignore[misc]

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        return super().forward(layer, query, key, value, _pages(kv_cache), *args, **kwargs)  # type: ignore[misc]


class CompressedCPUImpl(_Impl, cpu.CompressedCPUImpl):
    """One attention layer on the CPU."""


class CompressedCPUBackend(_Backend, cpu.CompressedCPUBackend):
    """The classes that vLLM makes on the CPU."""

    @staticmethod
    def get_impl_cls() -> type[CompressedCPUImpl]:
        return CompressedCPUImpl


class CompressedCUDAImpl(_Impl, cuda.CompressedCUDAImpl):
    """One attention layer on a GPU."""


class CompressedCUDABackend(_Backend, cuda.CompressedCUDABackend):
    """The classes that vLLM makes on a GPU."""

    @staticmethod
    def get_impl_cls() -> type[CompressedCUDAImpl]:
        return CompressedCUDAImpl
