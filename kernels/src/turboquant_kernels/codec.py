"""The codec: keys and values to codes and scales, and back.

    MSE   x -> rotate -> divide by the RMS -> nearest codebook level of each coordinate -> one scale
    PROD  the same with a bit less, then one sign per coordinate of the projected residual and its norm

(paper: arXiv 2504.19874, algorithms 1 and 2). `Codec` stands between `rotation`, `codebook` and `packing` on
one side and the operations of a cache on the other: `store.reference` writes what it encodes,
`decode.reference` reads pages through it.
"""

import math
from dataclasses import dataclass
from functools import cache

import torch

from turboquant_kernels.codebook import codebook
from turboquant_kernels.formats import Encoding, KVFormat
from turboquant_kernels.packing import (
    KEY_RESIDUAL_NORM,
    KEY_SCALE,
    VALUE_SCALE,
    CodeOrder,
    Region,
    group_codes,
    key_order,
    page_layout,
    sign_order,
    take_rows,
    value_order,
)
from turboquant_kernels.plans import DEFAULT_SEED
from turboquant_kernels.rotation import projection_matrix, rotate, rotation_matrix

MAX_SCALE = torch.finfo(torch.float16).max
"""Scales and residual norms are fp16 and saturate here: a longer vector keeps its direction."""

_TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class EncodedVectors:
    """Vectors as the cache holds them, before packing."""

    codes: torch.Tensor
    """uint8 [..., D]: `Codebook` codes of the rotated coordinates."""
    scale: torch.Tensor
    """fp16 [...]: from codebook levels to rotated coordinates."""
    residual_signs: torch.Tensor | None = None
    """`Encoding.PROD`: uint8 [..., D], 1 where a coordinate of the projected residual is negative."""
    residual_norm: torch.Tensor | None = None
    """`Encoding.PROD`: fp16 [...], Euclidean norm of what codes and scale leave over."""


class Codec:
    """Encodes and decodes the vectors of one layer: its format, head dimension and rotation seed.

    Non-finite input: a vector with a NaN or an infinity is stored as the zero vector. Pages outlive the
    request that wrote them (prefix caching), so a fault must not reach others through them; in its own
    request it stays visible, since the residual stream that produced it carries it on.

    Key anchors (`KVFormat.anchor`) are not its business: the cache's operations subtract them from keys
    before they are encoded and add them to keys that were decoded.

    Raises ValueError for a plain format and for a head_dim that compressed formats do not have. Tensors live
    on the CPU; those of equal parameters are shared by all codecs.
    """

    def __init__(self, fmt: KVFormat, head_dim: int, seed: int = DEFAULT_SEED) -> None:
        if not fmt.compressed:
            raise ValueError(f"{fmt.name} is the engine's own cache: there is nothing to encode")
        self.fmt = fmt
        self.head_dim = head_dim
        self.seed = seed
        self.layout = page_layout(fmt, head_dim)
        self.key_order = key_order(fmt, head_dim)
        self.value_order = value_order(fmt, head_dim)
        self.sign_order = sign_order(head_dim)
        self._rotation = rotation_matrix(head_dim, seed)
        self._projection = projection_matrix(head_dim, seed) if fmt.encoding is Encoding.PROD else None

    def rotate(self, vectors: torch.Tensor) -> torch.Tensor:
        """R x: any float [..., D] -> float32 [..., D].

        For queries: it rounds as a matrix product does. What is stored goes through `rotation.rotate`.
        """
        return vectors.float() @ self._rotation.T

    def unrotate(self, rotated: torch.Tensor) -> torch.Tensor:
        """R.T y, the inverse of `rotate`: any float [..., D] -> float32 [..., D]."""
        return rotated.float() @ self._rotation

    def encode(self, key: torch.Tensor, value: torch.Tensor) -> tuple[EncodedVectors, EncodedVectors]:
        """`encode_keys` and `encode_values` of the same shape, in fewer operations: a single token's cost."""
        unit, rms = self._normalize(torch.stack((key, value)))
        if self._projection is None:
            keys, values = self._encode(unit, rms, self.fmt.key_bits, self.fmt.value_bits)
            return keys, values
        return self._encode_prod(unit[0], rms[0]), *self._encode(unit[1:], rms[1:], self.fmt.value_bits)

    def encode_keys(self, key: torch.Tensor) -> EncodedVectors:
        """Any float [..., D] -> codes and scale and, for PROD, the residual's signs and norm."""
        unit, rms = self._normalize(key)
        if self._projection is None:
            return self._encode(unit[None], rms[None], self.fmt.key_bits)[0]
        return self._encode_prod(unit, rms)

    def encode_values(self, value: torch.Tensor) -> EncodedVectors:
        """Any float [..., D] -> codes and scale."""
        unit, rms = self._normalize(value)
        return self._encode(unit[None], rms[None], self.fmt.value_bits)[0]

    def decode_keys(self, encoded: EncodedVectors) -> torch.Tensor:
        """The keys that attention sees, un-rotated: float32 [..., D]."""
        rotated = self._dequantize(encoded, self.fmt.key_code_bits)
        if encoded.residual_signs is not None:
            rotated = rotated + self._residual(encoded.residual_signs, encoded.residual_norm)
        return self.unrotate(rotated)

    def decode_values(self, encoded: EncodedVectors) -> torch.Tensor:
        """The values that attention sees, un-rotated: float32 [..., D]."""
        return self.unrotate(self._dequantize(encoded, self.fmt.value_bits))

    def read_rotated_keys(self, pages: torch.Tensor) -> torch.Tensor:
        """Keys of whole pages, still rotated: uint8 [..., page_bytes] -> float32 [..., 16, D].

        Slots that were never written give finite, meaningless vectors, here and for values: a masked token's
        weight is zero, and zero times NaN is not.
        """
        keys = self._read(pages, self.layout.key_planes, self.key_order, KEY_SCALE)
        if self.layout.key_residual_signs is not None:
            signs = self.sign_order.unpack([self.layout.key_residual_signs.of(pages)])
            keys += self._residual(signs, self._scales(pages, KEY_RESIDUAL_NORM))
        return keys

    def read_rotated_values(self, pages: torch.Tensor) -> torch.Tensor:
        """Values of whole pages, still rotated: uint8 [..., page_bytes] -> float32 [..., 16, D]."""
        return self._read(pages, self.layout.value_planes, self.value_order, VALUE_SCALE)

    def _encode_prod(self, unit: torch.Tensor, rms: torch.Tensor) -> EncodedVectors:
        # Algorithm 2. The first stage takes the scale that leaves the smallest residual, least squares; the
        # second makes the whole unbiased. Relative to rms nothing overflows, however long the vector.
        codes, levels = self._nearest(unit, self.fmt.key_code_bits)
        factor = row_mean(unit * levels) / row_mean(levels * levels)
        scale = _half(rms * factor)
        residual = unit - levels * (scale.float() / rms.clamp_min(_TINY))
        # In float64, so that no order of summation can change a sign.
        signs = (residual.double() @ self._projection.double().T < 0).to(torch.uint8)
        norm = _half(row_mean(residual * residual).sqrt() * self.head_dim**0.5 * rms)
        return EncodedVectors(codes, scale.squeeze(-1), signs, norm.squeeze(-1))

    def _encode(self, unit: torch.Tensor, rms: torch.Tensor, *bits: int) -> list[EncodedVectors]:
        """Algorithm 1 for a stack of one or both of keys and values: float32 [len(bits), ..., D]."""
        codes, levels = zip(*map(self._nearest, unit, bits), strict=True)
        # Unbiased over rotations: <y, scale * levels> = |y|**2. Least squares would shrink every vector by
        # the distortion (12% at 2 bits), which averaging over tokens does not remove.
        overlap = row_mean(unit * torch.stack(levels)).clamp_min(_TINY)
        scale = _half(rms / overlap).squeeze(-1)
        return [EncodedVectors(*encoded) for encoded in zip(codes, scale, strict=True)]

    def _normalize(self, vectors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Rotated coordinates of RMS 1, float32 [..., D], and the RMS, float32 [..., 1].

        Both are zero for vectors that are zero, below float32's normal range, or not finite.
        """
        vectors = vectors.float()
        # The largest magnitude is taken out first: squares of bf16 numbers can overflow float32.
        largest = vectors.abs().amax(-1, keepdim=True)
        unusable = ~((largest >= _TINY) & (largest < torch.inf))
        rotated = rotate((vectors / largest).masked_fill_(unusable, 0.0), self.seed)
        rms = row_mean(rotated * rotated).sqrt()
        return rotated / rms.clamp_min(_TINY), (largest * rms).masked_fill_(unusable, 0.0)

    def _nearest(self, unit: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes, uint8 [..., D], and levels, float32 [..., D], nearest to coordinates of unit variance."""
        book = codebook(bits, self.head_dim)
        codes = book.quantize(unit)
        return codes, take_rows(book.levels[:, None], codes)

    def _dequantize(self, encoded: EncodedVectors, bits: int) -> torch.Tensor:
        levels = codebook(bits, self.head_dim).levels
        return take_rows(levels[:, None], encoded.codes) * encoded.scale.float().unsqueeze(-1)

    def _read(
        self, pages: torch.Tensor, planes: tuple[Region, ...], order: CodeOrder, scale: int
    ) -> torch.Tensor:
        index = order.group_index([region.of(pages) for region in planes])
        levels = take_rows(_group_levels(order.bits, self.head_dim), index)
        return levels.mul_(self._scales(pages, scale).unsqueeze(-1))

    def _scales(self, pages: torch.Tensor, which: int) -> torch.Tensor:
        """One of the scales: float32 [..., 16]; not finite (a slot that was never written) reads as zero."""
        scales = self.layout.scales.of(pages).view(torch.float16)[..., which]
        return scales.float().nan_to_num(0.0, 0.0, 0.0)

    def _residual(self, signs: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
        """norm * sqrt(pi / 2) / D * S.T (+-1): uint8 [..., D] and [...] -> float32 [..., D], rotated."""
        factor = math.sqrt(math.pi / 2) / self.head_dim
        return (1.0 - 2.0 * signs.float()) @ self._projection * (norm.float() * factor).unsqueeze(-1)


def row_mean(terms: torch.Tensor) -> torch.Tensor:
    """The mean of each row: float32 [..., D] -> float32 [..., 1].

    Neighbours are added while their number is even, then the rest (3 or 5 of the head dimensions that are no
    power of two) in ascending order: the library's sum rounds as the shape of the batch suggests, and a token
    must be stored as the same bytes in every batch and on every device.
    """
    head_dim = terms.shape[-1]
    while terms.shape[-1] % 2 == 0:
        terms = terms[..., 0::2] + terms[..., 1::2]
    total = terms[..., :1]
    for i in range(1, terms.shape[-1]):
        total = total + terms[..., i : i + 1]
    return total * (1 / head_dim)


@cache
def _group_levels(bits: int, head_dim: int) -> torch.Tensor:
    """The levels of a group of coordinates, by its `group_index`: float32 [2**n, group_size]."""
    return codebook(bits, head_dim).levels[group_codes(bits).int()]


def _half(scale: torch.Tensor) -> torch.Tensor:
    return scale.clamp_max(MAX_SCALE).half()
