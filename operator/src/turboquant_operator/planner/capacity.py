"""How many tokens a cache of given bytes holds: the rule of vLLM 0.32.0, without vLLM.

Source: v1/core/kv_cache_utils.py, `get_kv_cache_groups` (which layers share blocks),
`get_kv_cache_config_from_groups` (how many blocks there are) and `get_kv_cache_capacity` (the tokens that
`vllm:cache_config_info` shows as `kv_cache_size_tokens`). ``operator/tests/planner/test_vllm_capacity.py``
compares the two on many shapes. Bytes of a page come from `KVFormat` alone.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from math import ceil

from turboquant_kernels.formats import BF16, BLOCK_TOKENS, PAGE_TOKENS, KVFormat, blocks_of_one_size
from turboquant_operator.planner.engine import EngineSettings
from turboquant_operator.planner.facts import ELEMENT_BYTES, ModelFacts


@dataclass(frozen=True)
class LayerCache:
    """The cache of one attention layer on one device."""

    window: int | None
    block_tokens: int
    block_bytes: int
    """Bytes that the block's tokens take."""
    padding_bytes: int = 0
    """Bytes at the block's end that nothing uses."""
    raw_tokens: int = 0
    """Tokens, compressed, whose bytes hold a sequence's newest ones, which are not compressed yet."""

    @property
    def raw_blocks(self) -> int:
        """Blocks that a sequence has beyond those of its tokens."""
        return ceil(self.raw_tokens / self.block_tokens)

    @property
    def page_bytes(self) -> int:
        """What the block takes of the pool."""
        return self.block_bytes + self.padding_bytes


@dataclass(frozen=True)
class CacheLayout:
    """How the layers' blocks share one pool of memory."""

    bytes_per_block: int
    """Bytes of one block number, of all layers that it stands for."""
    groups: tuple[LayerCache, ...]
    """One per block table: layers of one group are filled alike. The bytes are those of one layer."""

    @property
    def padding_percent(self) -> int:
        """Share of the memory that is padding inside blocks, in whole percent."""
        padding = sum(group.padding_bytes for group in self.groups)
        return round(100 * padding / sum(group.page_bytes for group in self.groups))

    def blocks_per_sequence(self, context_length: int, in_flight_tokens: int) -> int:
        """Blocks that one sequence of the full context needs at its peak, in all groups.

        `in_flight_tokens`: most tokens of all steps that have begun and not ended, whose blocks a sliding
        window cannot give up yet.
        """
        return sum(_blocks(group, context_length, in_flight_tokens) for group in self.groups)

    @property
    def raw_block_bytes(self) -> int:
        """Bytes that a sequence takes beyond those of its tokens."""
        return self.bytes_per_block * sum(group.raw_blocks for group in self.groups)

    def tokens(self, memory: int, context_length: int, in_flight_tokens: int) -> int:
        """`kv_cache_size_tokens` for `memory` bytes, in the engine's own floating-point steps."""
        concurrency = (
            memory // self.bytes_per_block / self.blocks_per_sequence(context_length, in_flight_tokens)
        )
        return int(concurrency * context_length)

    def sequences(self, memory: int, context_length: int, in_flight_tokens: int) -> int:
        """Sequences of the full context that fit at once. One block is the engine's null block."""
        usable = max(0, memory // self.bytes_per_block - 1)
        return usable // self.blocks_per_sequence(context_length, in_flight_tokens)


def layer_caches(
    facts: ModelFacts,
    formats: tuple[KVFormat, ...],
    tensor: int,
    settings: EngineSettings,
    lowest: KVFormat | None = None,
) -> tuple[LayerCache, ...]:
    """The cache of each layer on one of `tensor` devices; KV heads are replicated where there are fewer.

    `formats`: one per layer, `BF16` for the engine's own dtype. `lowest`: what the engine may give some layer
    instead. Raises ValueError where a format cannot store this head_dim or block.
    """
    heads = max(1, facts.key_value_heads // tensor)
    block, plain, padding = settings.block_tokens, settings.block_tokens, 0
    compressed = [fmt for fmt in formats if fmt.compressed]
    raw = plain_raw = _raw_tokens(facts, [*compressed, lowest] if lowest else compressed, settings)
    if facts.shares_page_size and BF16 in formats and compressed:
        plain_raw = 0
        block, plain, padding = _blocks_of_one_size(facts, compressed, settings)

    def cache(window: int | None, fmt: KVFormat) -> LayerCache:
        if fmt == BF16:
            size = heads * format_bytes(fmt, facts, plain)
            return LayerCache(window, plain, size, heads * padding, plain_raw)
        # A window's blocks begin with the longest that the backend reads whole; `layout` enlarges them.
        tokens = BLOCK_TOKENS if raw and window is not None else block
        return LayerCache(window, tokens, heads * format_bytes(fmt, facts, tokens), raw_tokens=raw)

    return tuple(cache(window, fmt) for window, fmt in zip(facts.windows, formats, strict=True))


def _raw_tokens(facts: ModelFacts, compressed: Iterable[KVFormat], settings: EngineSettings) -> int:
    """`LayerCache.raw_tokens`: as many as the smallest format needs, since layers share block tables."""
    if not settings.raw_block:
        return 0
    element_bytes = ELEMENT_BYTES[facts.dtype]
    blocks = max((fmt.raw_blocks(facts.head_dim, element_bytes) for fmt in compressed), default=0)
    return blocks * BLOCK_TOKENS


def _blocks_of_one_size(
    facts: ModelFacts, compressed: Iterable[KVFormat], settings: EngineSettings
) -> tuple[int, int, int]:
    """Tokens of a compressed block, of one in the model's own dtype, and the latter's padding in a KV head.

    Source: ``turboquant_runtime.adapters.specs``, `fit_plain_layers`.
    """
    stored = max(format_bytes(fmt, facts, 1) for fmt in compressed)
    least = settings.least_plain_tokens
    unit = BLOCK_TOKENS if settings.raw_block else PAGE_TOKENS
    block, plain = blocks_of_one_size(
        settings.block_tokens, unit, stored, least, format_bytes(BF16, facts, 1)
    )
    return block, plain, block * stored - format_bytes(BF16, facts, plain)


def format_bytes(fmt: KVFormat, facts: ModelFacts, tokens: int) -> int:
    """Bytes of `tokens` tokens of one KV head; float32 engines keep an uncompressed cache in float32."""
    size = tokens * fmt.token_bytes(facts.head_dim)
    return size * ELEMENT_BYTES[facts.dtype] // ELEMENT_BYTES["bfloat16"] if fmt == BF16 else size


def layout(layers: Sequence[LayerCache]) -> CacheLayout:
    """How the engine groups these layers.

    Layers of one kind (all full attention, or one window) form one group, whatever their sizes. Others are
    dealt into groups of equally many layers, whose blocks must have one size.
    """
    if len({(layer.window, layer.block_tokens) for layer in layers}) == 1:
        return CacheLayout(sum(layer.page_bytes for layer in layers), (layers[0],))
    unified = _one_block_size(layers)
    kinds = Counter(unified)
    group_layers = min(kinds.values())
    if max(kinds.values()) < 1.5 * group_layers:
        group_layers = max(kinds.values())
    groups = tuple(kind for kind, count in kinds.items() for _ in range(ceil(count / group_layers)))
    # Dealing n layers into m groups makes none longer than ceil(n / m), which may be below group_layers.
    longest = max(ceil(count / ceil(count / group_layers)) for count in kinds.values())
    return CacheLayout(unified[0].page_bytes * longest, groups)


def _one_block_size(layers: Sequence[LayerCache]) -> tuple[LayerCache, ...]:
    """Smaller blocks grow by whole factors to the bytes of the largest, or are padded to them."""
    largest = max(layer.page_bytes for layer in layers)

    def grown(layer: LayerCache) -> LayerCache:
        if largest % layer.page_bytes or layer.padding_bytes:
            return replace(layer, padding_bytes=largest - layer.block_bytes)
        factor = largest // layer.page_bytes
        return replace(layer, block_tokens=layer.block_tokens * factor, block_bytes=largest)

    return tuple(grown(layer) for layer in layers)


def _blocks(layer: LayerCache, context_length: int, in_flight_tokens: int) -> int:
    if layer.window is None:
        return ceil(context_length / layer.block_tokens) + layer.raw_blocks
    held = min(layer.window - 1 + in_flight_tokens, context_length)
    # The window need not start where a block does.
    return ceil(held / layer.block_tokens) + 1 + layer.raw_blocks
