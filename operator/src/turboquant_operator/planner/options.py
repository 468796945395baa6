"""One possible plan: a KV format on a number of GPUs, with the capacity that it gives."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property

from turboquant_kernels.formats import BF16, BLOCK_TOKENS, KVFormat, Tier
from turboquant_operator.planner.capacity import CacheLayout, format_bytes, layer_caches, layout
from turboquant_operator.planner.engine import EngineSettings
from turboquant_operator.planner.facts import ModelFacts


@dataclass(frozen=True)
class Choice:
    """A format for every attention layer."""

    name: str
    """What `--kv-cache-dtype` names."""
    formats: tuple[KVFormat, ...]
    """One per attention layer; `BF16` stands for the model's own dtype. Of a tier the mean, which takes the
    same bytes as what the engine deals."""
    tier: str | None = None
    """The quality tier that this is, where it is one."""
    lowest: KVFormat | None = None
    """The format of fewest bits that the engine may deal to a layer."""

    @classmethod
    def uniform(cls, fmt: KVFormat, facts: ModelFacts, skip: Iterable[int] = ()) -> "Choice":
        """One format for all layers but the skipped ones, which stay in the model's own dtype."""
        skipped = set(skip)
        return cls(fmt.name, tuple(BF16 if i in skipped else fmt for i in range(facts.layers)))

    @classmethod
    def of_tier(cls, tier: Tier, facts: ModelFacts, skip: Iterable[int] = ()) -> "Choice":
        """A tier, each layer with its mean of bits: the engine deals them at equal bytes."""
        uniform = cls.uniform(tier.format, facts, skip)
        lowest = None if facts.shares_page_size else tier.lowest
        return replace(uniform, name=tier.cache_dtype, tier=tier.name, lowest=lowest)


@dataclass(frozen=True)
class Option:
    """One choice on one number of devices."""

    choice: Choice
    facts: ModelFacts
    settings: EngineSettings
    context_length: int
    tensor: int
    pipeline: int
    memory: int
    """Bytes for the cache on each device; zero or less where the weights leave none."""

    @property
    def devices(self) -> int:
        """GPUs of one replica."""
        return self.tensor * self.pipeline

    @property
    def in_flight_tokens(self) -> int:
        """Most tokens of all steps that are under way at once."""
        return self.settings.in_flight_tokens(self.pipeline)

    @cached_property
    def cache_layout(self) -> CacheLayout:
        """How the layers' blocks share one pool on each device."""
        choice = self.choice
        whole = layout(layer_caches(self.facts, choice.formats, self.tensor, self.settings, choice.lowest))
        if self.pipeline == 1:
            return whole
        # The fullest pipeline stage decides; it has the odd layers.
        stage = -(-self.facts.layers // self.pipeline)
        return replace(whole, bytes_per_block=-(-whole.bytes_per_block * stage // self.facts.layers))

    @property
    def tokens(self) -> int:
        """Tokens of one replica, as the engine will report them."""
        if self.memory <= 0:
            return 0
        return self.cache_layout.tokens(self.memory, self.context_length, self.in_flight_tokens)

    @property
    def sequences(self) -> int:
        """Sequences of the full context that fit at once."""
        return self.sequences_of(self.context_length)

    def sequences_of(self, context_length: int) -> int:
        """Sequences of another length that would fit at once."""
        if self.memory <= 0:
            return 0
        return self.cache_layout.sequences(self.memory, context_length, self.in_flight_tokens)

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token in all layers on all devices of a replica, replicated KV heads included."""
        heads = self.tensor * max(1, self.facts.key_value_heads // self.tensor)
        block = heads * sum(format_bytes(fmt, self.facts, BLOCK_TOKENS) for fmt in self.choice.formats)
        return -(-block // BLOCK_TOKENS)
