"""What an engine's memory would hold without a format of ours, laid out by vLLM 0.25's own functions."""

import copy
from dataclasses import replace
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.platforms import current_platform

from turboquant_kernels.formats import HEAD_DIMS
from turboquant_runtime.adapters.engine_config import layer_format
from turboquant_runtime.capacity import CacheCapacity


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
        plain = {
            name: _uncompressed(spec, name, vllm_config, baseline_config)
            for name, spec in worker_specs.items()
        }
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
    # A fixed number of blocks would be a fixed number of tokens, whatever a token takes.
    cache_config.num_gpu_blocks_override = None
    if vllm_config.model_config.is_hybrid:
        if not cache_config.user_specified_block_size:
            cache_config.block_size = cache_config.DEFAULT_BLOCK_SIZE
        cache_config.mamba_page_size_padded = None
        from turboquant_runtime.backends.base import CompressedBackend

        # FlashAttention takes blocks of the same sizes.
        type(current_platform)._align_hybrid_block_size(config, CompressedBackend)
    return config


def _uncompressed(spec: Any, layer_name: str, vllm_config: VllmConfig, baseline_config: VllmConfig) -> Any:
    """The spec that a layer would have in the model's own dtype.

    In a hybrid that has other blocks, which are as large as a state, and a state is padded to those.
    """
    from vllm.v1.kv_cache_interface import MambaSpec

    cache_config, hybrid = baseline_config.cache_config, vllm_config.model_config.is_hybrid
    if isinstance(spec, MambaSpec):
        own_blocks = spec.block_size != vllm_config.cache_config.block_size
        return replace(
            spec,
            block_size=spec.block_size if own_blocks else cache_config.block_size,
            page_size_padded=cache_config.mamba_page_size_padded,
        )
    block_size = cache_config.block_size if hybrid else spec.block_size
    if spec.dtype != torch.uint8:
        return replace(spec, block_size=block_size)
    fmt = layer_format(vllm_config, layer_name)
    head_dim = next(dim for dim in HEAD_DIMS if fmt.slot_bytes(dim) == 2 * spec.head_size)
    return replace(
        spec,
        block_size=block_size,
        head_size=head_dim,
        head_size_v=head_dim,
        dtype=vllm_config.model_config.dtype,
    )
