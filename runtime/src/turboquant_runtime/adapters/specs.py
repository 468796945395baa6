"""What a layer's pages take: a backend that knows its format on each layer, and pages that layers can share.

vLLM asks a layer's backend class how many bytes a token takes (`customize_spec`), and tells it neither the
layer nor the configuration. So once the model is loaded each layer gets a class of its own format, before
its cache spec is asked for.

Layers that keep the model's own dtype need nothing more where all layers have full attention: vLLM gives
each of them pages of its own size. Beside sliding windows or states all layers share pages of one size in
bytes. Then compressed blocks are made just large enough for the smallest block of a plain layer, and plain
layers get as many tokens a block as fit.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from vllm.config import VllmConfig, get_layers_from_vllm_config
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import AttentionBackend, MultipleOf
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheSpec, UniformTypeKVCacheSpecs
from vllm.v1.worker.utils import customize_attention_spec

from turboquant_kernels.formats import BLOCK_TOKENS, blocks_of_one_size
from turboquant_runtime.adapters.engine_config import layer_format, raw_blocks
from turboquant_runtime.adapters.raw_block_specs import as_full_attention, with_extra_blocks
from turboquant_runtime.backends.base import CompressedBackend
from turboquant_runtime.configuration import CACHE_DTYPES, RefusedConfiguration

logger = init_logger("vllm.turboquant")


def put_formats_on_layers(vllm_config: VllmConfig) -> None:
    """Gives each compressed layer the backend class of its format.

    Raises RefusedConfiguration for layers whose cache compressed pages do not serve.
    """
    for name, layer in _layers(vllm_config).items():
        if getattr(layer, "kv_cache_dtype", None) not in CACHE_DTYPES:
            continue
        if type(layer) is not Attention:
            raise RefusedConfiguration(
                f"{name}: {type(layer).__name__} cannot be compressed: start with --kv-cache-dtype auto"
            )
        if layer.head_size_v != layer.head_size:
            raise RefusedConfiguration(
                f"{name}: values of another head size ({layer.head_size_v}) than keys ({layer.head_size}) "
                "cannot be compressed yet: start with --kv-cache-dtype auto"
            )
        owner = layer.kv_sharing_target_layer_name or name
        layer.attn_backend = layer.attn_backend.of_format(layer_format(vllm_config, owner))


def give_sequences_raw_blocks(vllm_config: VllmConfig) -> None:
    """Gives sequences the blocks that hold their raw block, where the backend keeps one.

    Layers in the model's own dtype that share block tables with compressed ones have them too: vLLM takes a
    group's numbers from any of its layers.
    """
    layers = _layers(vllm_config)
    if not any(getattr(layer.get_attn_backend(), "keeps_raw_block", False) for layer in layers.values()):
        return
    blocks, element_bytes = raw_blocks(vllm_config), vllm_config.model_config.dtype.itemsize
    for name, layer in layers.items():
        fmt = _format(layer.get_attn_backend())
        if fmt is not None and fmt.raw_blocks(layer.head_size, element_bytes) > blocks:
            raise RefusedConfiguration(
                f"{name}: heads of {layer.head_size} elements are not those of the model's configuration: "
                "start with --kv-cache-dtype auto"
            )
    raw_tokens = blocks * BLOCK_TOKENS
    specs = dict(_specs(vllm_config, layers))
    kinds = {type(spec) for spec in specs.values()}
    one_kind = vllm_config.scheduler_config.disable_hybrid_kv_cache_manager and len(kinds) > 1
    one_table = one_kind or UniformTypeKVCacheSpecs.is_uniform_type(specs)
    for name, spec in specs.items():
        if isinstance(spec, AttentionSpec) and (one_table or _format(layers[name].attn_backend)):
            layers[name].attn_backend = _with_raw_blocks(layers[name].attn_backend, raw_tokens, one_kind)


def largest_backend(vllm_config: VllmConfig) -> type[CompressedBackend] | None:
    """Of the engine's compressed layers the backend whose tokens take most bytes; None without such
    layers."""
    found = {
        layer.attn_backend.fmt.token_bytes(layer.head_size): layer.attn_backend
        for layer in _layers(vllm_config).values()
        if isinstance(layer, Attention) and _format(layer.attn_backend) is not None
    }
    return found[max(found)] if found else None


def fit_plain_layers(vllm_config: VllmConfig) -> None:
    """Makes pages of one size out of compressed layers and those in the model's own dtype, where they need
    it."""
    layers = _layers(vllm_config)
    specs = dict(_specs(vllm_config, layers))
    plain = {
        name: spec
        for name, spec in specs.items()
        if isinstance(spec, AttentionSpec) and _format(layers[name].get_attn_backend()) is None
    }
    compressed = {
        name: spec for name, spec in specs.items() if isinstance(spec, AttentionSpec) and name not in plain
    }
    if not plain or not compressed or UniformTypeKVCacheSpecs.is_uniform_type(specs):
        return
    if vllm_config.scheduler_config.disable_hybrid_kv_cache_manager:
        return  # vLLM gives every layer the blocks of full attention
    cache_config = vllm_config.cache_config
    smallest = {name: _smallest_block(layers[name].get_attn_backend()) for name in plain}
    token_bytes, plain_bytes = (max(map(_token_bytes, kind.values())) for kind in (compressed, plain))
    unit = max(_smallest_block(layers[name].get_attn_backend()) for name in compressed)
    block_size, _ = blocks_of_one_size(
        cache_config.block_size, unit, token_bytes, max(smallest.values()), plain_bytes
    )
    page_bytes = block_size * token_bytes
    if block_size > cache_config.block_size:
        logger.info(
            "Blocks have %d tokens, to hold a block of the layers in the model's own dtype.", block_size
        )
        cache_config.block_size = block_size
        if cache_config.mamba_page_size_padded is not None:
            cache_config.mamba_page_size_padded = page_bytes
        if cache_config.mamba_cache_mode == "align":
            cache_config.mamba_block_size = block_size
    for name, spec in plain.items():
        most = page_bytes // _token_bytes(spec)
        tokens = most // smallest[name] * smallest[name]
        if cache_config.enable_prefix_caching:
            tokens = _divisor(block_size, most, smallest[name])
        layers[name].attn_backend = _with_pages(layers[name].get_attn_backend(), tokens, page_bytes)


def _layers(vllm_config: VllmConfig) -> dict[str, Any]:
    """Layers of this worker that may have a cache, in the order in which they were made."""
    return get_layers_from_vllm_config(vllm_config, AttentionLayerBase)  # type: ignore[type-abstract]


def _specs(vllm_config: VllmConfig, layers: dict[str, Any]) -> Iterator[tuple[str, KVCacheSpec]]:
    """The cache specs as vLLM's runners ask for them."""
    for name, layer in layers.items():
        if getattr(layer, "kv_sharing_target_layer_name", None):
            continue
        spec = layer.get_kv_cache_spec(vllm_config)
        if isinstance(spec, AttentionSpec):
            spec = customize_attention_spec(layer.get_attn_backend(), spec)
        if spec:
            yield name, spec


def _format(backend: type[AttentionBackend]) -> Any:
    return backend.fmt if issubclass(backend, CompressedBackend) else None


def _token_bytes(spec: AttentionSpec) -> int:
    return spec.unpadded_page_size_bytes // spec.block_size


def _smallest_block(backend: type[AttentionBackend]) -> int:
    """Tokens of the smallest block that a backend reads."""
    sizes = backend.get_supported_kernel_block_sizes()
    return min(size.base if isinstance(size, MultipleOf) else size for size in sizes)


def _divisor(block_size: int, most: int, least: int) -> int:
    """The largest divisor of `block_size` that is a multiple of `least` and at most `most`, or `least`:
    prefixes are shared at multiples of all layers' blocks."""
    fitting = [tokens for tokens in range(least, most + 1, least) if block_size % tokens == 0]
    return max(fitting, default=least)


def _with_raw_blocks(
    backend: type[AttentionBackend], raw_tokens: int, one_kind: bool
) -> type[AttentionBackend]:
    """A backend whose sequences have additional blocks; with `one_kind` windows keep all of their blocks."""

    def customize_spec(cls: type[AttentionBackend], spec: AttentionSpec) -> AttentionSpec:
        own = backend.customize_spec(spec)
        return with_extra_blocks(as_full_attention(own) if one_kind else own, raw_tokens)

    return type(backend.__name__, (backend,), {"customize_spec": classmethod(customize_spec)})


def _with_pages(backend: type[AttentionBackend], block_size: int, page_bytes: int) -> type[AttentionBackend]:
    """A backend whose layers have blocks of so many tokens, padded to so many bytes."""

    def customize_spec(cls: type[AttentionBackend], spec: AttentionSpec) -> AttentionSpec:
        return replace(backend.customize_spec(spec), block_size=block_size, page_size_padded=page_bytes)

    return type(backend.__name__, (backend,), {"customize_spec": classmethod(customize_spec)})
