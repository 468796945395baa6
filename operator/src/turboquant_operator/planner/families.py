"""How each model family lays out its attention: the part of a config.json that its author left unsaid.

A config may omit what equals the class default of `transformers`, and which layers have a sliding window
follows a rule of the family. Both stand here as data, one row per `model_type`. The engine test
``operator/tests/planner/test_vllm_capacity.py`` builds vLLM's own model classes and compares every row.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Family:
    """What `transformers` and vLLM 0.32.0 assume about one `model_type`."""

    defaults: Mapping[str, int] | None = None
    """Values of config fields that may be absent."""
    window_every: int | None = None
    """Every n-th layer is full attention and the others have the window (`sliding_window_pattern`, where
    present, says n); None: a window, where the config has one, is that of all layers."""
    window_switch: str | None = None
    """Boolean config field (default false) without which the window is ignored."""
    window_extra: int = 0
    """Tokens by which vLLM's window is longer than the config's, which leaves out the query itself."""
    key_bias: bool | str = False
    """Whether keys have a bias: always, never, or as the named boolean config field says."""
    key_bias_default: bool = False
    """What an absent `key_bias` field means."""
    head_dim_from_hidden: bool = False
    """head_dim is hidden_size / num_attention_heads, whatever the config says."""


_QWEN2 = Family(
    {"num_key_value_heads": 32, "max_position_embeddings": 32768, "sliding_window": 4096},
    window_switch="use_sliding_window",
    key_bias=True,
)
_QWEN3 = Family(
    {
        "num_key_value_heads": 32,
        "head_dim": 128,
        "max_position_embeddings": 32768,
        "sliding_window": 4096,
    },
    window_switch="use_sliding_window",
    key_bias="attention_bias",
)
_GEMMA3 = Family(
    {
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
    },
    window_every=6,
    key_bias="attention_bias",
)
_LLAMA_LIKE = Family(key_bias="attention_bias")

FAMILIES: Mapping[str, Family] = {
    "cohere": _LLAMA_LIKE,
    "cohere2": Family(
        {"sliding_window": 4096},
        window_every=4,
        window_extra=1,
        key_bias="attention_bias",
        head_dim_from_hidden=True,
    ),
    "gemma": Family(
        {
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "head_dim": 256,
            "max_position_embeddings": 8192,
        },
        key_bias="attention_bias",
    ),
    "gemma2": Family(
        {
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "max_position_embeddings": 8192,
            "sliding_window": 4096,
        },
        window_every=2,
        key_bias="attention_bias",
    ),
    "gemma3_text": _GEMMA3,
    "glm": Family({"num_key_value_heads": 2, "head_dim": 128}, key_bias="attention_bias"),
    "glm4": Family({"num_key_value_heads": 2, "head_dim": 128}, key_bias="attention_bias"),
    "gpt_oss": Family(
        {"num_key_value_heads": 8, "head_dim": 64, "sliding_window": 128},
        window_every=2,
        key_bias=True,
    ),
    "granite": _LLAMA_LIKE,
    "llama": _LLAMA_LIKE,
    "mistral": Family({"num_key_value_heads": 8, "sliding_window": 4096}),
    "mixtral": Family({"num_key_value_heads": 8}),
    "olmo": _LLAMA_LIKE,
    "olmo2": _LLAMA_LIKE,
    "phi": Family(key_bias=True),
    "phi3": Family(),
    "qwen2": _QWEN2,
    "qwen2_5_vl": _QWEN2,
    "qwen2_5_vl_text": _QWEN2,
    "qwen2_moe": Family(
        {"num_key_value_heads": 16, "max_position_embeddings": 32768, "sliding_window": 4096},
        window_switch="use_sliding_window",
        key_bias="qkv_bias",
        key_bias_default=True,
    ),
    "qwen3": _QWEN3,
    "qwen3_moe": Family(
        {"num_key_value_heads": 4, "max_position_embeddings": 32768, "sliding_window": 4096},
        window_switch="use_sliding_window",
        key_bias="attention_bias",
    ),
    "smollm3": Family(
        {"num_key_value_heads": 4}, window_switch="use_sliding_window", key_bias="attention_bias"
    ),
    "stablelm": Family(key_bias="use_qkv_bias"),
    "starcoder2": Family({"num_key_value_heads": 2}, key_bias="use_bias", key_bias_default=True),
}
"""Decoder models whose every layer is attention over per-head keys and values of one head_dim."""


def unsupported_attention(config: Mapping[str, Any]) -> str | None:
    """Why the cache of this (text) config is none that this release can plan or compress, if so.

    What is looked for are fields, not names: a new model with latent attention is recognised too.
    """
    listed = config.get("layer_types")
    kinds = {str(kind) for kind in listed} if isinstance(listed, list) else set()
    if config.get("kv_lora_rank"):
        return (
            "it has multi-head latent attention (kv_lora_rank), whose cache holds no per-head keys and values"
        )
    if config.get("is_encoder_decoder"):
        return "it is an encoder-decoder model (is_encoder_decoder)"
    if config.get("num_kv_shared_layers"):
        return "some of its layers share the cache of others (num_kv_shared_layers)"
    if config.get("use_cla") or config.get("cla_share_factor"):
        return "its layers share caches with each other (cross-layer attention)"
    recurrent = kinds - {"full_attention", "sliding_attention", "chunked_attention"}
    if recurrent:
        return f"some of its layers are no attention over a KV cache ({', '.join(sorted(recurrent))})"
    for field in _RECURRENT_FIELDS:
        if config.get(field):
            return f"it has Mamba or linear-attention layers ({field})"
    if str(config.get("model_type", "")) in _RECURRENT_TYPES:
        return f"{config['model_type']} has no attention layers with a KV cache in every block"
    if "chunked_attention" in kinds or config.get("attention_chunk_size"):
        return "it has chunked local attention (attention_chunk_size)"
    if config.get("global_head_dim") or config.get("v_head_dim"):
        return "its layers or values have head dimensions of their own (global_head_dim, v_head_dim)"
    if isinstance(config.get("num_key_value_heads"), list) or config.get("block_configs"):
        return "its layers differ in their number of KV heads"
    if config.get("cross_attention_layers"):
        return "it has cross-attention layers (cross_attention_layers)"
    if config.get("use_bidirectional_attention"):
        return "its attention is bidirectional (use_bidirectional_attention): it generates no text"
    return None


_RECURRENT_FIELDS = (
    "attn_layer_indices",
    "attn_layer_period",
    "full_attention_interval",
    "hybrid_override_pattern",
    "layers_block_type",
    "linear_attn_config",
    "linear_num_key_heads",
    "mamba_d_state",
    "mamba_expand",
    "ssm_cfg",
    "ssm_state_size",
    "time_mix_extra_dim",
)
_RECURRENT_TYPES = {"mamba", "mamba2", "falcon_mamba", "rwkv", "recurrent_gemma", "xlstm"}
