"""What vLLM's configuration says of an engine, in this project's terms. Nothing here changes vLLM."""

import vllm.envs
from vllm.config import VllmConfig
from vllm.platforms import current_platform

from turboquant_kernels.formats import KVFormat
from turboquant_kernels.plans import KVPlan
from turboquant_runtime.configuration import EngineFacts, requested_plan


def plan_of(vllm_config: VllmConfig) -> KVPlan | None:
    """The KV plan of an engine; None where none of our formats is chosen.

    It describes the target model, also where the configuration is that of its draft model.
    """
    additional = vllm_config.additional_config
    speculative = vllm_config.speculative_config
    target = speculative.target_model_config if speculative else None
    return requested_plan(
        vllm_config.cache_config.cache_dtype,
        additional if isinstance(additional, dict) else {},
        (target or vllm_config.model_config).get_total_num_hidden_layers(),
    )


def layer_format(vllm_config: VllmConfig, layer_name: str) -> KVFormat:
    """The format of one attention layer of an engine that has a KV plan.

    The number in the layer's name (`model.layers.3.self_attn.attn`) is its place in the plan. The layers of a
    draft model, which come after the target's or have a name of their own, take the format of
    `--kv-cache-dtype`.
    """
    from vllm.model_executor.models.utils import extract_layer_index

    plan, index = plan_of(vllm_config), extract_layer_index(layer_name)
    assert plan is not None, "only layers with a compressed format are asked for"
    if index >= len(plan.layers) or layer_name.startswith("draft_model."):
        return KVFormat.parse(vllm_config.cache_config.cache_dtype)
    return plan.layers[index]


def facts_of(vllm_config: VllmConfig) -> EngineFacts:
    """What decides whether the engine can be served from compressed pages."""
    model, multimodal = vllm_config.model_config, vllm_config.model_config.multimodal_config
    parallel, speculative = vllm_config.parallel_config, vllm_config.speculative_config
    draft = speculative.draft_model_config if speculative else None
    return EngineFacts(
        device="rocm" if current_platform.is_rocm() else current_platform.device_type,
        compute_capability=_compute_capability(),
        dtype=str(model.dtype).removeprefix("torch."),
        num_layers=model.get_total_num_hidden_layers(),
        head_dim=model.get_head_size(),
        draft_head_dim=draft.get_head_size() if draft else None,
        block_size=vllm_config.cache_config.block_size,
        mla=model.use_mla,
        encoder_decoder=model.is_encoder_decoder,
        hybrid=model.is_hybrid,
        chunked_local_attention=getattr(model.hf_text_config, "attention_chunk_size", None) is not None,
        bidirectional_images=model.is_mm_prefix_lm
        and multimodal is not None
        and multimodal.get_limit_per_prompt("image") > 0,
        context_parallel=parallel.decode_context_parallel_size * parallel.prefill_context_parallel_size > 1,
        dual_batch=parallel.use_ubatching,
        kv_connector=_kv_connector(vllm_config),
    )


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
