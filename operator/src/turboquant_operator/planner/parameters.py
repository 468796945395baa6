"""Parameters of a dense decoder, counted from its config: for a config.json without weights beside it.

Only families whose blocks are attention and a gated MLP, which the config describes whole. Sizes read from
files always win; the tests hold each family to the published count of one of its models.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Block:
    """What differs between the families' decoder blocks."""

    norms: int = 2
    """Norms over the hidden size in one block."""
    qk_norm: bool = False
    """A norm over head_dim for queries and one for keys."""
    qkv_bias: bool = False
    """Biases of the three input projections, whatever `attention_bias` says."""
    tied: bool = False
    """Whether input and output embedding are one where `tie_word_embeddings` is absent."""


BLOCKS: Mapping[str, Block] = {
    "llama": Block(),
    "mistral": Block(),
    "phi3": Block(),
    "smollm3": Block(tied=True),
    "qwen2": Block(qkv_bias=True),
    "qwen3": Block(qk_norm=True),
    "gemma": Block(tied=True),
    "gemma2": Block(norms=4, tied=True),
    "gemma3_text": Block(norms=4, qk_norm=True, tied=True),
}
"""By the `model_type` of the text config."""


def count_parameters(
    text: Mapping[str, Any], layers: int, heads: int, kv_heads: int, head_dim: int
) -> int | None:
    """Parameters of the model of a text config; None where its family or a size is not known."""
    block = BLOCKS.get(str(text.get("model_type", "")))
    hidden, inner, vocabulary = (text.get(n) for n in ("hidden_size", "intermediate_size", "vocab_size"))
    if block is None or not hidden or not inner or not vocabulary:
        return None
    queries, keys = heads * head_dim, kv_heads * head_dim
    attention = hidden * (2 * queries + 2 * keys)
    if block.qkv_bias or text.get("attention_bias"):
        attention += queries + 2 * keys + (0 if block.qkv_bias else hidden)
    if block.qk_norm:
        attention += 2 * head_dim
    mlp = 3 * hidden * inner + (2 * inner + hidden if text.get("mlp_bias") else 0)
    embeddings = 1 if text.get("tie_word_embeddings", block.tied) else 2
    return int(layers * (attention + mlp + block.norms * hidden) + embeddings * vocabulary * hidden + hidden)
