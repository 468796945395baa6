"""Writes small model folders: a config and a tokenizer of a few words, and weights where answers matter.

An engine started on a folder without weights, with `load_format="dummy"`, has random ones next to zero, which
is all that tests of capacity, scheduling and metrics need, and starts in seconds. `write_weights` makes a
model whose attention looks somewhere and whose answers differ.
"""

import json
from pathlib import Path
from typing import Any

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "dtype": "bfloat16",
    "vocab_size": 128,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
"""Llama's shape, small: attention over all tokens in every layer, two query heads to a KV head."""

QWEN2 = LLAMA | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
"""Qwen2's shape, small: a bias on keys, which `write_weights` makes large in one layer."""

PHI3 = LLAMA | {
    "architectures": ["Phi3ForCausalLM"],
    "model_type": "phi3",
    "hidden_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "original_max_position_embeddings": 8192,
    "pad_token_id": 0,
    "sliding_window": 262144,
}
"""Phi-3's shape, small: a window in every layer that is longer than any sequence."""

GEMMA3 = {
    "architectures": ["Gemma3ForCausalLM"],
    "model_type": "gemma3_text",
    "dtype": "bfloat16",
    "vocab_size": 128,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 128,
    "max_position_embeddings": 8192,
    "sliding_window": 64,
    "layer_types": [*["sliding_attention"] * 5, "full_attention"],
    "query_pre_attn_scalar": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
"""Gemma-3's shape, small: five layers with a sliding window to one without, which share a block pool."""

GEMMA2 = {
    "architectures": ["Gemma2ForCausalLM"],
    "model_type": "gemma2",
    "dtype": "bfloat16",
    "vocab_size": 128,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "max_position_embeddings": 8192,
    "sliding_window": 64,
    "query_pre_attn_scalar": 256,
    "attn_logit_softcapping": 5.0,
    "final_logit_softcapping": 30.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
"""Gemma-2's shape, small: logits of the attention are capped, low enough to matter."""

QWEN3_NEXT = {
    "architectures": ["Qwen3NextForCausalLM"],
    "model_type": "qwen3_next",
    "dtype": "bfloat16",
    "vocab_size": 128,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
    "full_attention_interval": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 128,
    "shared_expert_intermediate_size": 128,
    "mlp_only_layers": [0, 1, 2],
    "max_position_embeddings": 8192,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
"""Qwen3-Next's shape, small: three layers of linear attention to one of attention, which has experts."""

FALCON_H1 = {
    "architectures": ["FalconH1ForCausalLM"],
    "model_type": "falcon_h1",
    "dtype": "bfloat16",
    "vocab_size": 128,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "mamba_d_ssm": 256,
    "mamba_n_heads": 8,
    "mamba_d_head": 32,
    "mamba_n_groups": 1,
    "mamba_d_state": 64,
    "max_position_embeddings": 8192,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
"""Falcon-H1's shape, small: Mamba-2 and attention side by side in every layer."""

GPT_OSS = {
    "architectures": ["GptOssForCausalLM"],
    "model_type": "gpt_oss",
    "dtype": "bfloat16",
    "vocab_size": 128,
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "num_local_experts": 2,
    "num_experts_per_tok": 2,
    "sliding_window": 64,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "max_position_embeddings": 8192,
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 2.0,
        "original_max_position_embeddings": 4096,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
    },
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
"""gpt-oss's shape, small: sinks beside every layer's scores, and a window in every other layer. A token goes
to both experts: which of many it goes to would flip with rounding."""


def write_model(folder: Path, shape: dict[str, Any], **overrides: Any) -> Path:
    """Writes config.json and a tokenizer into `folder`; `overrides` replace entries of the shape."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder.mkdir(parents=True, exist_ok=True)
    config = shape | overrides
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    words = {f"w{index}": index for index in range(config["vocab_size"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w2").save_pretrained(folder)
    return folder


def write_weights(folder: Path, seed: int = 0) -> None:
    """Adds random weights to a folder made by `write_model`: the same for the same seed.

    Rows of a matrix are of length 1, so that hidden states keep their size; queries and keys are made twice
    as long (scores then spread by about 4), and logits three times. Sinks are as high as the larger scores.
    The keys of Qwen2's layer 1 get a bias much longer than they are, in coordinates that hardly turn with the
    position, so that it adds nearly the same to all scores. Other biases and norms are left as they are
    initialized.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    config = AutoConfig.from_pretrained(folder)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    for name, weight in model.named_parameters():
        if name.endswith("sinks"):
            torch.nn.init.normal_(weight, mean=10.0, std=2.0)
        if config.model_type == "qwen2" and name.endswith("layers.1.self_attn.k_proj.bias"):
            heads = weight.detach().view(config.num_key_value_heads, 2, -1)
            heads[:, :, -1] = 400.0
        if weight.dim() < 2:
            continue
        gain = 2.0 if "q_proj" in name or "k_proj" in name else 1.0
        if "lm_head" in name or ("embed" in name and config.tie_word_embeddings):
            gain = 3.0
        torch.nn.init.normal_(weight, std=gain * weight.shape[-1] ** -0.5)
    model.save_pretrained(folder)
