"""How many tokens a cache of given bytes holds: the rule of vLLM 0.25.1, without vLLM.

Source: v1/core/kv_cache_utils.py, `get_kv_cache_groups` (which layers share blocks),
`get_kv_cache_config_from_groups` (how many blocks there are) and `get_kv_cache_capacity` (the tokens that
`vllm:cache_config_info` shows as `kv_cache_size_tokens`). ``operator/tests/planner/test_vllm_capacity.py``
compares the two on many shapes. Bytes of a page come from `KVFormat` alone.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil

from turboquant_kernels.formats import BF16, KVFormat
from turboquant_operator.planner.engine import WINDOW_BLOCK_TOKENS, EngineSettings
from turboquant_operator.planner.facts import ELEMENT_BYTES, ModelFacts


@dataclass(frozen=True)
class LayerCache:
    """The cache of one attention layer on one device."""

    window: int | None
    block_tokens: int
    block_bytes: int


@dataclass(frozen=True)
class CacheLayout:
    """How the layers' blocks share one pool of memory."""

    bytes_per_block: int
    """Bytes of one block number, of all layers that it stands for."""
    groups: tuple[LayerCache, ...]
    """One per block table: layers of one group are filled alike. `block_bytes` is that of one layer."""

    def blocks_per_sequence(self, context_length: int, batched_tokens: int) -> int:
        """Blocks that one sequence of the full context needs at its peak, in all groups."""
        return sum(_blocks(group, context_length, batched_tokens) for group in self.groups)

    def tokens(self, memory: int, context_length: int, batched_tokens: int) -> int:
        """`kv_cache_size_tokens` for `memory` bytes, in the engine's own floating-point steps."""
        concurrency = (
            memory // self.bytes_per_block / self.blocks_per_sequence(context_length, batched_tokens)
        )
        return int(concurrency * context_length)

    def sequences(self, memory: int, context_length: int, batched_tokens: int) -> int:
        """Sequences of the full context that fit at once. One block is the engine's null block."""
        usable = max(0, memory // self.bytes_per_block - 1)
        return usable // self.blocks_per_sequence(context_length, batched_tokens)


def layer_caches(
    facts: ModelFacts, formats: Sequence[KVFormat], tensor: int, settings: EngineSettings
) -> tuple[LayerCache, ...]:
    """The cache of each layer on one of `tensor` devices; KV heads are replicated where there are fewer.

    `formats`: one per layer, `BF16` for the engine's own dtype. Raises ValueError where a format cannot
    store this head_dim or block.
    """
    heads = max(1, facts.key_value_heads // tensor)
    return tuple(
        LayerCache(window, block, heads * format_bytes(fmt, facts, block))
        for window, fmt in zip(facts.windows, formats, strict=True)
        for block in [settings.block_tokens if window is None else WINDOW_BLOCK_TOKENS]
    )


def format_bytes(fmt: KVFormat, facts: ModelFacts, tokens: int) -> int:
    """Bytes of `tokens` tokens of one KV head; float32 engines keep an uncompressed cache in float32."""
    size = fmt.page_bytes(facts.head_dim, tokens)
    return size * ELEMENT_BYTES[facts.dtype] // ELEMENT_BYTES["bfloat16"] if fmt == BF16 else size


def layout(layers: Sequence[LayerCache]) -> CacheLayout | None:
    """How the engine groups these layers; None where their blocks cannot share one pool and it refuses.

    Layers of one kind (all full attention, or one window) form one group, whatever their sizes. Others are
    dealt into groups of equally many layers, whose blocks must have one size.
    """
    if len({(layer.window, layer.block_tokens) for layer in layers}) == 1:
        return CacheLayout(sum(layer.block_bytes for layer in layers), (layers[0],))
    unified = _one_block_size(layers)
    if unified is None:
        return None
    kinds = Counter(unified)
    group_layers = min(kinds.values())
    if max(kinds.values()) < 1.5 * group_layers:
        group_layers = max(kinds.values())
    groups = tuple(kind for kind, count in kinds.items() for _ in range(ceil(count / group_layers)))
    # Dealing n layers into m groups makes none longer than ceil(n / m), which may be below group_layers.
    longest = max(ceil(count / ceil(count / group_layers)) for count in kinds.values())
    return CacheLayout(unified[0].block_bytes * longest, groups)


def _one_block_size(layers: Sequence[LayerCache]) -> tuple[LayerCache, ...] | None:
    """Smaller blocks grow by whole factors until all have the bytes of the largest."""
    largest = max(layer.block_bytes for layer in layers)
    if any(largest % layer.block_bytes for layer in layers):
        return None
    return tuple(
        replace(layer, block_tokens=layer.block_tokens * (largest // layer.block_bytes), block_bytes=largest)
        for layer in layers
    )


def _blocks(layer: LayerCache, context_length: int, batched_tokens: int) -> int:
    if layer.window is None:
        return ceil(context_length / layer.block_tokens)
    held = min(layer.window - 1 + batched_tokens, context_length)
    # The window need not start where a block does.
    return ceil(held / layer.block_tokens) + 1
