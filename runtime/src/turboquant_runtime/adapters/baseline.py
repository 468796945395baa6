"""What an engine's memory would hold without a format of ours, laid out by vLLM's own functions."""

import copy
from dataclasses import replace
from typing import Any

from vllm.config import VllmConfig
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionBackend, MultipleOf
from vllm.v1.kv_cache_interface import AttentionSpec, MambaSpec

from turboquant_runtime.adapters.raw_block_specs import without_extra_blocks
from turboquant_runtime.capacity import CacheCapacity

_BLOCK_SIZES = {"cuda": 16, "cpu": 128}
"""Tokens of a block where nobody names a number: what vLLM's own backends of each device prefer."""


class _PlainBackend(AttentionBackend):
    """What sizes a hybrid's blocks in the model's own dtype, with FlashAttention's block sizes."""

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        return [MultipleOf(16)]


def measure_capacity(
    vllm_config: VllmConfig, specs: list[dict[str, Any]], memory: list[int]
) -> CacheCapacity:
    """The capacity that an uncompressed cache would have in this engine's memory.

    `specs` are the layers' cache specs of each worker, `memory` its bytes. The baseline is laid out by
    vLLM's own functions, so that it is exact with sliding windows and layers of mixed sizes too; the
    smallest of the workers counts, as it does in vLLM.
    """
    from vllm.v1.core import kv_cache_utils

    baseline_config = uncompressed_config(vllm_config)
    tokens = []
    for worker_specs, worker_memory in zip(specs, memory, strict=True):
        plain = uncompressed_specs(worker_specs, baseline_config)
        groups = kv_cache_utils.get_kv_cache_groups(baseline_config, plain)
        layout = kv_cache_utils.get_kv_cache_config_from_groups(baseline_config, groups, worker_memory)
        tokens.append(kv_cache_utils.get_kv_cache_capacity(baseline_config, layout)[0])
    bytes_per_token = max(
        sum(spec.page_size_bytes / spec.block_size for spec in worker.values()) for worker in specs
    )
    return CacheCapacity(baseline_tokens=min(tokens), bytes_per_token=bytes_per_token)


def uncompressed_config(vllm_config: VllmConfig) -> VllmConfig:
    """The engine's configuration as it would be without a format of ours, as far as it lays out a cache."""
    config = copy.copy(vllm_config)
    config.additional_config = {}
    config.cache_config = cache_config = copy.copy(vllm_config.cache_config)
    cache_config.cache_dtype = "auto"
    cache_config.kv_cache_dtype_skip_layers = []
    # A fixed number of blocks would be a fixed number of tokens, whatever a token takes.
    cache_config.num_gpu_blocks_override = None
    if not cache_config.user_specified_block_size:
        cache_config.block_size = _BLOCK_SIZES[current_platform.device_type]
    if vllm_config.model_config.is_hybrid:
        cache_config.mamba_page_size_padded = None
        current_platform._align_hybrid_block_size(config, _PlainBackend)
    return config


def uncompressed_specs(specs: dict[str, Any], baseline_config: VllmConfig) -> dict[str, Any]:
    """The specs that a worker's layers would have in the model's own dtype, by layer.

    In a hybrid these have other blocks, which are as large as a state, and a state is padded to those.
    """
    cache_config = baseline_config.cache_config
    blocks = {spec.block_size for spec in specs.values() if isinstance(spec, AttentionSpec)}
    plain = dict(specs)
    for name, spec in specs.items():
        if isinstance(spec, MambaSpec):
            plain[name] = replace(
                spec,
                block_size=cache_config.block_size if spec.block_size in blocks else spec.block_size,
                page_size_padded=cache_config.mamba_page_size_padded,
            )
        elif isinstance(spec, AttentionSpec):
            plain[name] = replace(
                without_extra_blocks(spec),
                block_size=cache_config.block_size,
                state_content_bytes=None,
                page_size_padded=None,
                dtype=baseline_config.model_config.dtype,
            )
    return plain
