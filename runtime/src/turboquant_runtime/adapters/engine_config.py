"""What vLLM's configuration says of an engine, in this project's terms. Nothing here changes vLLM."""

from typing import Any

import vllm.envs
from vllm.config import VllmConfig
from vllm.platforms import current_platform

from turboquant_kernels.allocation import pages_have_one_size
from turboquant_kernels.formats import KVFormat, base_format, find_tier
from turboquant_kernels.plans import KVPlan
from turboquant_runtime.configuration import CACHE_DTYPES, EngineFacts, attention_layers, requested_plan


def plan_of(vllm_config: VllmConfig) -> KVPlan | None:
    """The KV plan of an engine; None where none of our formats is chosen.

    It describes the target model, also where the configuration is that of its draft model; a draft model may
    have a cache of another kind, and then has no plan.
    """
    additional = vllm_config.additional_config
    cache_dtype, speculative = vllm_config.cache_config.cache_dtype, vllm_config.speculative_config
    # vLLM gives the draft's cache its dtype while the configuration still names the target model.
    if cache_dtype not in CACHE_DTYPES and speculative and speculative.kv_cache_dtype == cache_dtype:
        return None
    return requested_plan(
        cache_dtype,
        additional if isinstance(additional, dict) else {},
        len(attention_layer_indices(vllm_config)),
        current_platform.device_type,
    )


def layer_format(vllm_config: VllmConfig, layer_name: str) -> KVFormat:
    """The format of one attention layer of an engine that has a KV plan.

    The number in the layer's name (`model.layers.3.self_attn.attn`) is its place in the model; the plan has
    an entry for each layer with attention. The layers of a draft model take the format of
    `--kv-cache-dtype`.
    """
    plan = plan_of(vllm_config)
    assert plan is not None, "only layers with a compressed format are asked for"
    by_index = dict(zip(attention_layer_indices(vllm_config), plan.layers, strict=True))
    if is_draft_layer(vllm_config, layer_name) or (index := _layer_index(layer_name)) not in by_index:
        return base_format(vllm_config.cache_config.cache_dtype, current_platform.device_type)
    return by_index[index]


def raw_blocks(vllm_config: VllmConfig) -> int:
    """Blocks of `BLOCK_TOKENS` that each sequence has beyond those of its tokens, for its raw block.

    As many as one takes of the engine's smallest pages, since all layers of a group have one block table.
    """
    plan, speculative = plan_of(vllm_config), vllm_config.speculative_config
    assert plan is not None, "only engines with compressed layers have raw blocks"
    device, cache_dtype = current_platform.device_type, vllm_config.cache_config.cache_dtype
    formats = {fmt for fmt in plan.layers if fmt.compressed}
    target = _target_model(vllm_config)
    tier = find_tier(cache_dtype)
    if tier and not pages_have_one_size(target.hf_text_config.to_dict()):
        formats.add(tier.on(device).lowest)  # whatever is dealt, so that the planner knows
    draft = speculative.draft_model_config if speculative else None
    if draft is not None:
        formats.add(base_format(cache_dtype, device))
    models = [target, *([draft] if draft else [])]
    return max(
        fmt.raw_blocks(model.get_head_size(), model.dtype.itemsize) for model in models for fmt in formats
    )


def is_draft_layer(vllm_config: VllmConfig, layer_name: str) -> bool:
    """Whether a layer is of a draft model: these come after the target's or have a name of their own."""
    target_layers = _target_model(vllm_config).get_total_num_hidden_layers()
    return layer_name.startswith("draft_model.") or _layer_index(layer_name) >= target_layers


def plain_layer_indices(vllm_config: VllmConfig, plan: KVPlan) -> list[int]:
    """Layers of the model that the plan keeps in the model's own dtype."""
    layers = attention_layer_indices(vllm_config)
    return [layer for layer, fmt in zip(layers, plan.layers, strict=True) if not fmt.compressed]


def facts_of(vllm_config: VllmConfig) -> EngineFacts:
    """What decides whether the engine can be served from compressed pages."""
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    speculative = vllm_config.speculative_config
    draft = speculative.draft_model_config if speculative else None
    return EngineFacts(
        device="rocm" if current_platform.is_rocm() else current_platform.device_type,
        compute_capability=_compute_capability(),
        dtype=str(model.dtype).removeprefix("torch."),
        num_layers=len(attention_layer_indices(vllm_config)),
        head_dim=model.get_head_size(),
        draft_head_dim=draft.get_head_size() if draft else None,
        block_size=vllm_config.cache_config.block_size,
        draft_tokens=(speculative.num_speculative_tokens or 0) if speculative else 0,
        mla=model.use_mla,
        encoder_decoder=model.is_encoder_decoder,
        hybrid=model.is_hybrid,
        chunked_local_attention=getattr(model.hf_text_config, "attention_chunk_size", None) is not None,
        reference_window=model.rswa_window is not None,
        bidirectional_modalities=_bidirectional_modalities(model),
        context_parallel=parallel.decode_context_parallel_size * parallel.prefill_context_parallel_size > 1,
        dual_batch=parallel.use_ubatching,
        adaptive_verification=bool(speculative and speculative.enable_adaptive_verification),
        fast_prefill=vllm_config.cache_config.kv_sharing_fast_prefill,
        kv_connector=_kv_connector(vllm_config),
    )


def _target_model(vllm_config: VllmConfig) -> Any:
    speculative = vllm_config.speculative_config
    return (speculative.target_model_config if speculative else None) or vllm_config.model_config


def attention_layer_indices(vllm_config: VllmConfig) -> tuple[int, ...]:
    """Indices of the target model's layers that have attention."""
    model = _target_model(vllm_config)
    layer_types = None
    if model.is_hybrid:
        text = model.hf_text_config
        # The names that `ModelConfig.get_num_layers_by_block_type` reads.
        layer_types = getattr(text, "layers_block_type", None) or getattr(text, "layer_types", None)
    return attention_layers(model.get_total_num_hidden_layers(), layer_types)


def _layer_index(layer_name: str) -> int:
    from vllm.model_executor.models.utils import extract_layer_index

    return extract_layer_index(layer_name)


def _bidirectional_modalities(model: Any) -> tuple[str, ...]:
    """Modalities that are served and whose tokens see each other in both directions, as vLLM's runners have
    it: all but audio, in a model of that kind. It is none of that kind where all its modalities are limited
    to 0."""
    multimodal = model.multimodal_config
    if not model.is_mm_prefix_lm or multimodal is None:
        return ()
    modalities = ("image", "video", "vision_chunk")
    return tuple(name for name in modalities if multimodal.get_limit_per_prompt(name) > 0)


def _kv_connector(vllm_config: VllmConfig) -> str | None:
    """The connector that is asked for by name, or that vLLM will make of `--kv-offloading-size`."""
    if vllm_config.kv_transfer_config is not None and vllm_config.kv_transfer_config.kv_connector:
        return vllm_config.kv_transfer_config.kv_connector
    if vllm_config.cache_config.kv_offloading_size is None:
        return None
    if vllm_config.cache_config.kv_offloading_backend != "native":
        return vllm_config.cache_config.kv_offloading_backend
    return "SimpleCPUOffloadConnector" if vllm.envs.VLLM_USE_SIMPLE_KV_OFFLOAD else "OffloadingConnector"


def _compute_capability() -> tuple[int, int] | None:
    """Of a GPU; None on other devices."""
    capability = current_platform.get_device_capability() if current_platform.is_cuda() else None
    return (capability.major, capability.minor) if capability else None
