"""A tier's key bits, dealt to the model's layers before the engine starts.

`--kv-cache-dtype tq-balanced` is all that a user says. Where vLLM's configuration is made, once for all
processes of an engine, the bits are dealt from the weights' files, and the plan joins `additional_config` as
if the user had given it: workers and engine core, every rank and every replica have the same.
"""

from pathlib import Path
from typing import Any

from vllm import envs
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.platforms import current_platform

from turboquant_kernels.allocation import AllocationError, allocate
from turboquant_kernels.checkpoint import CheckpointError
from turboquant_kernels.formats import DEALT_LOAD_FORMATS, KEY_BITS, Tier, find_tier
from turboquant_kernels.plans import PLAN_KEY, KVPlan
from turboquant_kernels.tensors import Tensors
from turboquant_runtime.adapters.engine_config import attention_layer_indices

logger = init_logger("vllm.turboquant")


def deal_tier(vllm_config: VllmConfig) -> None:
    """Puts the plan of the tier that `--kv-cache-dtype` names into the configuration, unless it has one.

    Where bits cannot be dealt every layer gets the tier's mean, and a warning says why.
    """
    tier = find_tier(vllm_config.cache_config.cache_dtype)
    additional = vllm_config.additional_config
    if tier is None or not isinstance(additional, dict) or PLAN_KEY in additional:
        return
    tier = tier.on(current_platform.device_type)
    try:
        plan = _plan(vllm_config, tier)
        bits = " ".join(str(layer.key_bits) for layer in plan.layers)
        logger.info("%s: key bits by layer %s", tier.cache_dtype, bits)
    except (AllocationError, CheckpointError, OSError) as error:
        logger.warning(
            "%s: %s in every layer: %s. Models whose keys have a bias lose much by that.",
            tier.cache_dtype,
            tier.format.name,
            error,
        )
        plan = KVPlan.uniform(tier.format, len(attention_layer_indices(vllm_config)))
    # A new one: the dict may be the user's, who starts another model with it.
    vllm_config.additional_config = {**additional, PLAN_KEY: plan.to_dict()}


def _plan(vllm_config: VllmConfig, tier: Tier) -> KVPlan:
    indices = attention_layer_indices(vllm_config)
    if tier.key_bits == max(KEY_BITS):  # every layer has the most there are, whatever the weights
        return KVPlan.uniform(tier.format, len(indices))
    model, load = vllm_config.model_config, vllm_config.load_config
    if model.is_hybrid:
        raise AllocationError("linear-attention or Mamba layers make all share pages of one size")
    if load.load_format not in DEALT_LOAD_FORMATS or envs.VLLM_USE_MODELSCOPE:
        raise AllocationError(
            f"--load-format {load.load_format} reads no safetensors files of a hub or folder"
        )
    skip = [int(name) for name in vllm_config.cache_config.kv_cache_dtype_skip_layers if name.isdigit()]
    config = model.hf_text_config.to_dict() | {
        "head_dim": model.get_head_size(),
        "quantization_config": getattr(model.hf_config, "quantization_config", None),
    }
    plan = allocate(tier, Tensors.of_folder(_folder(model, load)), config, skip)
    if len(plan.layers) != len(indices):
        raise AllocationError(f"the files have {len(plan.layers)} attention layers, the model {len(indices)}")
    return plan


def _folder(model: Any, load: Any) -> Path:
    """The model's files, which are downloaded here, ahead of vLLM's loader, where the hub has them."""
    if Path(model.model).is_dir():
        return Path(model.model)
    from vllm.model_executor.model_loader.weight_utils import download_weights_from_hf

    return Path(
        download_weights_from_hf(
            model.model,
            load.download_dir,
            ["*.safetensors"],
            model.revision,
            ignore_patterns=load.ignore_patterns,
        )
    )
