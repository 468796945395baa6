"""The blocks that a sequence has beyond those of its tokens, where its raw block lies.

vLLM plans memory by each layer's cache spec and gives sequences blocks through the manager that is registered
for the spec's class. These two pairs, for full attention and for sliding windows, count and allocate blocks
of `raw_tokens` more tokens for each sequence that runs; nothing of vLLM is patched. The blocks follow those
of the tokens in the sequence's block table, belong to it alone, are never hashed, and go back with the
others.

Registered where this module is imported: in workers, which make the specs, and in the engine core, which
unpickles them.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Self

from vllm.config import VllmConfig
from vllm.utils.math_utils import cdiv
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager, SlidingWindowManager
from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec, SlidingWindowSpec, replace_as
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry


@dataclass(frozen=True, kw_only=True)
class RawBlockSpec(FullAttentionSpec):
    """Full attention over blocks of which each sequence has some more than its tokens need."""

    raw_tokens: int
    """Tokens, compressed, whose bytes hold a sequence's raw block."""

    @classmethod
    def merge(cls, specs: list[Self]) -> Self:
        """As vLLM's, which builds the result field by field and leaves out those that it does not know."""
        found = {getattr(spec, "raw_tokens", None) for spec in specs}
        # vLLM asks whether layers may share a group by catching this.
        assert len(found) == 1, "all layers of a group have the same additional blocks"
        return replace_as(FullAttentionSpec.merge(specs), cls, raw_tokens=found.pop())

    def max_memory_usage_bytes(self, vllm_config: VllmConfig) -> int:
        return super().max_memory_usage_bytes(vllm_config) + extra_blocks(self) * self.page_size_bytes

    def max_num_blocks_per_req(self, vllm_config: VllmConfig, max_len: int) -> int:
        return super().max_num_blocks_per_req(vllm_config, max_len) + extra_blocks(self)


@dataclass(frozen=True, kw_only=True)
class RawBlockWindowSpec(SlidingWindowSpec):
    """The same for attention with a sliding window."""

    raw_tokens: int

    def max_admission_blocks_per_request(self, max_in_flight_tokens: int, max_model_len: int) -> int:
        blocks = super().max_admission_blocks_per_request(max_in_flight_tokens, max_model_len)
        return blocks + extra_blocks(self)

    def max_num_blocks_per_req(self, vllm_config: VllmConfig, max_len: int) -> int:
        return super().max_num_blocks_per_req(vllm_config, max_len) + extra_blocks(self)


def extra_blocks(spec: RawBlockSpec | RawBlockWindowSpec) -> int:
    """Blocks that a sequence has beyond those of its tokens. vLLM enlarges the blocks of some layers."""
    return cdiv(spec.raw_tokens, spec.block_size)


class _ExtraBlocks:
    """Comes before a manager of vLLM's, which is asked for so many tokens more.

    Both methods are called after the number of tokens has been bounded by the model's length, so the last
    block has its additional ones too.
    """

    supports_fine_grained_hash_lookup: ClassVar[bool] = False
    """A hit that ended inside a block would find no raw tokens there."""

    def get_num_blocks_to_allocate(self, request_id: str, num_tokens: int, *args: Any, **kwargs: Any) -> int:
        return super().get_num_blocks_to_allocate(  # type: ignore[misc, no-any-return]
            request_id, num_tokens + self._extra_tokens, *args, **kwargs
        )

    def allocate_new_blocks(self, request_id: str, num_tokens: int, *args: Any, **kwargs: Any) -> list[Any]:
        return super().allocate_new_blocks(  # type: ignore[misc, no-any-return]
            request_id, num_tokens + self._extra_tokens, *args, **kwargs
        )

    @property
    def _extra_tokens(self) -> int:
        return extra_blocks(self.kv_cache_spec) * self.block_size  # type: ignore[attr-defined, no-any-return]


class RawBlockManager(_ExtraBlocks, FullAttentionManager):
    """Gives each sequence the additional blocks of its `RawBlockSpec`."""


class RawBlockWindowManager(_ExtraBlocks, SlidingWindowManager):
    """Gives each sequence the additional blocks of its `RawBlockWindowSpec`."""


def with_extra_blocks(spec: AttentionSpec, raw_tokens: int) -> AttentionSpec:
    """The spec of a layer whose group gives each sequence blocks for so many tokens more."""
    if isinstance(spec, SlidingWindowSpec):
        return replace_as(spec, RawBlockWindowSpec, raw_tokens=raw_tokens)
    assert isinstance(spec, FullAttentionSpec), "other kinds of attention are refused"
    return replace_as(spec, RawBlockSpec, raw_tokens=raw_tokens)


def without_extra_blocks(spec: AttentionSpec) -> AttentionSpec:
    """vLLM's own spec of a layer whose sequences have no additional blocks."""
    for kind, plain in ((RawBlockSpec, FullAttentionSpec), (RawBlockWindowSpec, SlidingWindowSpec)):
        if isinstance(spec, kind):
            return replace_as(spec, plain, drop=("raw_tokens",))
    return spec


def as_full_attention(spec: AttentionSpec) -> AttentionSpec:
    """A window's spec where all layers' blocks are kept as for full attention (vLLM's hybrid manager is off).

    vLLM would do so itself, to a class that does not know the additional blocks.
    """
    if not isinstance(spec, SlidingWindowSpec):
        return spec
    return replace_as(spec, FullAttentionSpec, drop=("extra_retained_tokens",))


# First vLLM's own specs, which it registers only where nothing is registered yet.
KVCacheSpecRegistry._ensure_registered()
KVCacheSpecRegistry.register(RawBlockSpec, RawBlockManager, uniform_type_base_spec=FullAttentionSpec)
KVCacheSpecRegistry.register(
    RawBlockWindowSpec, RawBlockWindowManager, uniform_type_base_spec=SlidingWindowSpec
)
