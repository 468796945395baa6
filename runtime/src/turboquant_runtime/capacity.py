"""How much the engine's KV cache holds, beside what the model's own dtype would hold in the same memory.

Measured once, in the engine core when it has laid the cache out (`adapters`), sent to its front ends with the
engine's ready message, and shown there as metrics (`metrics`).
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class CacheCapacity:
    """The cache of one engine rank, read from the layout that vLLM made."""

    baseline_tokens: int
    """Tokens that the same memory holds in the model's own dtype, by vLLM's own page rules."""
    bytes_per_token: float
    """Bytes that one token's keys and values take in all layers of this rank."""


REPORTED: dict[str, CacheCapacity] = {}
"""What engines have reported to this front end, by vLLM's instance id. No entry for an uncompressed cache."""
