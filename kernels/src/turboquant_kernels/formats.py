"""KV-cache formats: their names, bits and bytes. The only place where bytes of the cache are counted.

The kernels take their page layout from here, the engine its page size, the operator's planner its
bytes per token. No torch: the planner answers in milliseconds on a laptop.

A compressed token of one KV head holds key codes, value codes and one 2-byte scale for each of the two
(paper: arXiv 2504.19874, algorithm 1). Tokens are stored in pages of `PAGE_TOKENS`; the order of bytes
inside a page is in `turboquant_kernels.packing`.
"""

import difflib
import re
from dataclasses import dataclass, replace
from enum import StrEnum
from math import ceil, lcm
from typing import Self

KEY_BITS = (2, 3, 4, 5, 6, 8)
VALUE_BITS = (2, 3, 4, 8)
PROD_KEY_BITS = (3, 4)
HEAD_DIMS = (64, 80, 96, 128, 192, 256)

PAGE_TOKENS = 16
"""Tokens in one kernel page: the unit in which codes and scales are laid out."""

BLOCK_TOKENS = 128
"""Tokens of a block, by position: read raw by the queries among them, encoded once the block is complete.
They share one key anchor, the mean of their keys, which is subtracted before quantization."""

SCALE_BYTES = 2
"""One fp16 scale per vector: the factor from unit codebook levels to the rotated vector."""

ANCHOR_ELEMENT_BYTES = 2
"""Anchors are bf16 vectors of head_dim elements."""


class Encoding(StrEnum):
    """How the numbers of a format are stored."""

    PLAIN = "plain"
    """The engine's own floating-point cache: no rotation, no codes, no scales."""
    MSE = "mse"
    """Rotation and a Lloyd-Max codebook for keys and values (paper, algorithm 1)."""
    PROD = "prod"
    """Keys by the unbiased inner-product estimator (paper, algorithm 2); values as in `MSE`."""


@dataclass(frozen=True)
class KVFormat:
    """How one attention layer stores its keys and values.

    `key_bits` counts every bit spent on a key coordinate: for `Encoding.PROD` that is key_bits - 1 bits of
    code and one sign of the projected residual.
    """

    key_bits: int
    value_bits: int
    encoding: Encoding = Encoding.MSE
    anchor: bool = False
    """One key anchor per KV head and `BLOCK_TOKENS` tokens is stored with the pages."""

    def __post_init__(self) -> None:
        if self.encoding is Encoding.PLAIN:
            if (self.key_bits, self.value_bits) not in {(16, 16), (8, 8)} or self.anchor:
                raise ValueError(f"a plain cache has 16 or 8 bits for both and no anchor, not {self}")
            return
        allowed = PROD_KEY_BITS if self.encoding is Encoding.PROD else KEY_BITS
        if self.key_bits not in allowed:
            raise ValueError(f"key_bits {self.key_bits} is not one of {allowed} ({self.encoding})")
        if self.value_bits not in VALUE_BITS:
            raise ValueError(f"value_bits {self.value_bits} is not one of {VALUE_BITS}")

    @classmethod
    def parse(cls, name: str) -> Self:
        """The format of a `--kv-cache-dtype` name: bf16, fp8, tq-k4v4, tq-k3v4-prod.

        Raises ValueError that names the near formats where there is no such one.
        """
        if name == "bf16":
            return cls(16, 16, Encoding.PLAIN)
        if name == "fp8":
            return cls(8, 8, Encoding.PLAIN)
        match = re.fullmatch(r"tq-k(\d)v(\d)(-prod)?", name)
        if match:
            key_bits, value_bits, prod = match.groups()
            try:
                return cls(int(key_bits), int(value_bits), Encoding.PROD if prod else Encoding.MSE)
            except ValueError:
                pass
        if re.fullmatch(r"tq-k\d+(\.\d+)?v\d+(\.\d+)?", name) and "." in name:
            raise ValueError(
                f"KV format {name!r}: fractional bits are not supported yet; choose a whole number"
            )
        near = difflib.get_close_matches(name, (*TIER_NAMES, *FORMAT_NAMES), n=4, cutoff=0.5)
        hint = f"did you mean {', '.join(near)}?" if near else "`tq formats` lists them all."
        raise ValueError(f"unknown KV format {name!r}: {hint}")

    @property
    def name(self) -> str:
        """The `--kv-cache-dtype` name. Anchors come from a KV plan and are no part of it."""
        if self.encoding is Encoding.PLAIN:
            return "bf16" if self.key_bits == 16 else "fp8"
        return f"tq-k{self.key_bits}v{self.value_bits}" + ("-prod" if self.encoding is Encoding.PROD else "")

    @property
    def compressed(self) -> bool:
        """Whether the pages hold codes, written and read by this project's kernels."""
        return self.encoding is not Encoding.PLAIN

    @property
    def key_code_bits(self) -> int:
        """Bits of the codebook index of a key coordinate."""
        return self.key_bits - 1 if self.encoding is Encoding.PROD else self.key_bits

    @property
    def scale_bytes(self) -> int:
        """Bytes of scales per token and KV head: key, value and, for `PROD`, the key residual's norm."""
        return {Encoding.PLAIN: 0, Encoding.MSE: 2 * SCALE_BYTES, Encoding.PROD: 3 * SCALE_BYTES}[
            self.encoding
        ]

    def slot_bytes(self, head_dim: int) -> int:
        """Bytes of one token of one KV head, keys and values and scales, without anchors.

        Raises ValueError for a head_dim that the compressed formats do not have.
        """
        if self.compressed and head_dim not in HEAD_DIMS:
            raise ValueError(f"head_dim {head_dim} is not one of {HEAD_DIMS}, which {self.name} can store")
        return head_dim * (self.key_bits + self.value_bits) // 8 + self.scale_bytes

    def page_bytes(self, head_dim: int, tokens: int = PAGE_TOKENS) -> int:
        """Bytes of `tokens` tokens of one KV head, anchors included.

        Raises ValueError where the tokens are no whole pages or, with anchors, no whole anchor blocks.
        """
        unit = BLOCK_TOKENS if self.anchor else PAGE_TOKENS if self.compressed else 1
        if tokens % unit:
            raise ValueError(
                f"{tokens} tokens are not a multiple of {unit}, the block that {self.name} stores"
            )
        return tokens * self.slot_bytes(head_dim) + self.anchor_bytes(head_dim, tokens)

    def anchor_bytes(self, head_dim: int, tokens: int) -> int:
        """Bytes of the anchors of `tokens` tokens of one KV head, a multiple of `BLOCK_TOKENS`."""
        return tokens // BLOCK_TOKENS * head_dim * ANCHOR_ELEMENT_BYTES if self.anchor else 0

    def token_bytes(self, head_dim: int) -> int:
        """Bytes of a cache for each token of one KV head: its slot and its share of the anchor, rounded up to
        a whole number, as the engine counts."""
        return ceil(self.page_bytes(head_dim, BLOCK_TOKENS) / BLOCK_TOKENS)

    def raw_blocks(self, head_dim: int, element_bytes: int) -> int:
        """Blocks of this format whose bytes hold `BLOCK_TOKENS` tokens of the model's own dtype."""
        raw_bytes = 2 * head_dim * element_bytes
        return ceil(BLOCK_TOKENS / (BLOCK_TOKENS * self.token_bytes(head_dim) // raw_bytes))

    def ratio_to_bf16(self, head_dim: int) -> float:
        """Tokens that fit where one bf16 token did, anchors charged."""
        return BF16.page_bytes(head_dim, BLOCK_TOKENS) / self.page_bytes(head_dim, BLOCK_TOKENS)


BF16 = KVFormat(16, 16, Encoding.PLAIN)
FP8 = KVFormat(8, 8, Encoding.PLAIN)

COMPRESSED_FORMATS = (
    *(KVFormat(k, v) for k in KEY_BITS for v in VALUE_BITS),
    *(KVFormat(k, v, Encoding.PROD) for k in PROD_KEY_BITS for v in VALUE_BITS),
)
"""Every uniform format that the engine accepts."""

FORMAT_NAMES = tuple(f.name for f in (BF16, FP8, *COMPRESSED_FORMATS))


@dataclass(frozen=True)
class Tier:
    """A quality that users pick: value bits of every layer, and the mean of the layers' key bits.

    `turboquant_kernels.allocation` deals the key bits to the layers of a model.
    """

    name: str
    key_bits: int
    """Mean over the layers."""
    value_bits: int
    anchor: bool = True
    """Keys are stored less the mean of their block."""

    @property
    def cache_dtype(self) -> str:
        """The `--kv-cache-dtype` name."""
        return f"tq-{self.name}"

    @property
    def format(self) -> KVFormat:
        """The format of every layer where bits are not dealt; its bytes are those of the tier."""
        return KVFormat(self.key_bits, self.value_bits, anchor=self.anchor)

    @property
    def lowest(self) -> KVFormat:
        """The format of fewest bits that a layer may have: two bits below the mean, so that the blocks which
        hold a raw block are known before bits are dealt."""
        return replace(self.format, key_bits=max(KEY_BITS[0], self.key_bits - 2))

    def on(self, device: str) -> "Tier":
        """The tier as an engine on `cpu` or `cuda` serves it."""
        return self if device in RAW_BLOCK_DEVICES else replace(self, anchor=False)


RAW_BLOCK_DEVICES = ("cpu",)
"""Devices whose engine reads each query's own block raw and stores key anchors; elsewhere every token is read
as stored, and tiers have no anchors."""

QUALITIES = {
    tier.name: tier
    for tier in (Tier("near-lossless", 8, 4), Tier("balanced", 5, 3), Tier("max-capacity", 4, 2))
}
"""The tiers among which format `auto` chooses, best first. Keys want about two bits more than values at the
same total: docs/fidelity.md."""

TIERS = QUALITIES | {"experimental": Tier("experimental", 3, 2)}
"""Every tier, best first; the last one by name only."""

TIER_NAMES = tuple(tier.cache_dtype for tier in TIERS.values())
"""The `--kv-cache-dtype` names of tiers."""

DEALT_QUANTIZATIONS = (None, "fp8", "gptq", "awq", "compressed-tensors")
"""Quantization methods of weights from which a tier's bits can be dealt (`linear_weights`)."""

DEALT_LOAD_FORMATS = ("auto", "hf", "safetensors", "fastsafetensors", "instanttensor", "runai_streamer")
"""Values of vLLM's `--load-format` that read a model's safetensors files."""


def find_tier(cache_dtype: str) -> Tier | None:
    """The tier of a `--kv-cache-dtype` name; None for any other name."""
    return next((tier for tier in TIERS.values() if tier.cache_dtype == cache_dtype), None)


def base_format(cache_dtype: str, device: str = "cuda") -> KVFormat:
    """The format of every layer that no plan names, in an engine on `cpu` or `cuda`. ValueError as
    `KVFormat.parse`."""
    tier = find_tier(cache_dtype)
    return tier.on(device).format if tier else KVFormat.parse(cache_dtype)


def blocks_of_one_size(
    block_tokens: int, unit: int, token_bytes: int, plain_unit: int, plain_bytes: int
) -> tuple[int, int]:
    """Tokens of a compressed block and of one in the model's own dtype, where all pages have one size.

    The compressed block is the smallest multiple of `unit`, from `block_tokens` on, whose bytes blocks in the
    model's own dtype fill well; such a block divides it, so that prefixes are shared at whole blocks of both.
    plain_unit: tokens of the smallest block in the model's own dtype. Bytes are those of a token.
    """
    first = ceil(block_tokens / unit) * unit
    most = ceil(plain_bytes / token_bytes) * ceil(first / plain_unit) * lcm(unit, plain_unit)
    best, filled = (most, plain_unit), 0.0
    for block in range(first, most + 1, unit):
        page = block * token_bytes
        fitting = [n for n in range(plain_unit, page // plain_bytes + 1, plain_unit) if block % n == 0]
        share = max(fitting, default=0) * plain_bytes / page
        if share > filled:
            best, filled = (block, fitting[-1]), share
        if filled >= _WELL_FILLED:
            break
    return best


_WELL_FILLED = 0.75
"""Of a page; longer blocks, which might be filled better, cost more where sequences end."""
