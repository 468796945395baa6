"""The codec: keys and values to codes and scales, and back.

    vector -> rotate -> divide by its RMS -> nearest codebook level -> one scale

`Codec` stands between `rotation`, `codebook` and `packing` on one side and the operations of a cache on the
other: `store.reference` writes what it encodes, `decode.reference` reads pages through it. Paper: arXiv
2504.19874, algorithm 1.
"""

from dataclasses import dataclass

import torch

from turboquant_kernels.codebook import Codebook, codebook
from turboquant_kernels.formats import Encoding, KVFormat
from turboquant_kernels.packing import Region, page_layout, unpack
from turboquant_kernels.plans import DEFAULT_SEED
from turboquant_kernels.rotation import rotation_matrix

MAX_SCALE = torch.finfo(torch.float16).max
"""Scales are fp16. A longer vector keeps its direction and is stored at this scale."""


@dataclass(frozen=True)
class EncodedVectors:
    """Vectors as the cache holds them, not packed."""

    codes: torch.Tensor
    """uint8 [..., D]: `Codebook` codes of the rotated coordinates."""
    scale: torch.Tensor
    """fp16 [...]: from codebook levels to rotated coordinates."""


class Codec:
    """Encodes and decodes the vectors of one layer: its format, head dimension and rotation seed.

    Tensors inside live on the CPU and are shared by all codecs of the same parameters. Raises ValueError for
    a plain format, for a head_dim that compressed formats do not have, and for anchors.
    """

    def __init__(self, fmt: KVFormat, head_dim: int, seed: int = DEFAULT_SEED) -> None:
        if not fmt.compressed:
            raise ValueError(f"{fmt.name} is the engine's own cache: there is nothing to encode")
        if fmt.anchor:
            raise ValueError(f"{fmt.name}: key anchors are not supported yet")
        if fmt.encoding is Encoding.PROD:
            raise ValueError(f"{fmt.name}: prod is not supported yet")
        self.fmt = fmt
        self.head_dim = head_dim
        self.seed = seed
        self.layout = page_layout(fmt, head_dim)
        self.key_codebook = codebook(fmt.key_code_bits, head_dim)
        self.value_codebook = codebook(fmt.value_bits, head_dim)
        self._rotation = rotation_matrix(head_dim, seed)

    def rotate(self, vectors: torch.Tensor) -> torch.Tensor:
        """R x: any float [..., D] -> float32 [..., D]."""
        return vectors.float() @ self._rotation.T

    def unrotate(self, rotated: torch.Tensor) -> torch.Tensor:
        """R.T y, the inverse of `rotate`: any float [..., D] -> float32 [..., D]."""
        return rotated.float() @ self._rotation

    def encode_keys(self, key: torch.Tensor) -> EncodedVectors:
        """Any float [..., D] -> codes and scale; what is not finite becomes the zero vector."""
        return self._encode(key, self.key_codebook)

    def encode_values(self, value: torch.Tensor) -> EncodedVectors:
        """Any float [..., D] -> codes and scale; what is not finite becomes the zero vector."""
        return self._encode(value, self.value_codebook)

    def decode_keys(self, encoded: EncodedVectors) -> torch.Tensor:
        """The keys that attention sees, un-rotated: float32 [..., D]."""
        return self.unrotate(_dequantize(encoded.codes, encoded.scale, self.key_codebook))

    def decode_values(self, encoded: EncodedVectors) -> torch.Tensor:
        """The values that attention sees, un-rotated: float32 [..., D]."""
        return self.unrotate(_dequantize(encoded.codes, encoded.scale, self.value_codebook))

    def read_rotated_keys(self, pages: torch.Tensor) -> torch.Tensor:
        """Keys of whole pages, still rotated: uint8 [..., page_bytes] -> float32 [..., 16, D].

        Slots that were never written give finite, meaningless vectors.
        """
        return _read(pages, self.layout.key_planes, self.layout.key_scale, self.key_codebook)

    def read_rotated_values(self, pages: torch.Tensor) -> torch.Tensor:
        """Values of whole pages, still rotated: uint8 [..., page_bytes] -> float32 [..., 16, D]."""
        return _read(pages, self.layout.value_planes, self.layout.value_scale, self.value_codebook)

    def _encode(self, vectors: torch.Tensor, book: Codebook) -> EncodedVectors:
        # The largest magnitude is taken out first: squares of bf16 vectors can overflow float32.
        vectors = vectors.float()
        largest = vectors.abs().amax(-1, keepdim=True)
        usable = torch.isfinite(largest) & (largest > torch.finfo(torch.float32).tiny)
        rotated = self.rotate(torch.where(usable, vectors / largest, 0.0))
        rms = rotated.square().mean(-1, keepdim=True).sqrt()
        unit = rotated / rms.where(usable, 1.0)
        codes = book.quantize(unit)
        # Unbiased over rotations: <y, scale * level> = |y|**2. Least squares would shrink every vector by
        # the distortion (12% at 2 bits), which averaging over tokens does not remove.
        overlap = (unit * book.levels[codes.int()]).mean(-1, keepdim=True)
        scale = torch.where(usable, largest * rms / overlap, 0.0)
        return EncodedVectors(codes, scale.squeeze(-1).clamp_max(MAX_SCALE).half())


def _dequantize(codes: torch.Tensor, scale: torch.Tensor, book: Codebook) -> torch.Tensor:
    levels = book.levels.index_select(0, codes.flatten().int()).view(codes.shape)
    # A slot that was never written holds any bytes. Its scale must not turn a masked token into NaN.
    return levels * scale.float().nan_to_num(0.0, 0.0, 0.0).unsqueeze(-1)


def _read(pages: torch.Tensor, planes: tuple[Region, ...], scale: Region, book: Codebook) -> torch.Tensor:
    codes = unpack([region.of(pages) for region in planes], book.bits)
    return _dequantize(codes, scale.of(pages).contiguous().view(torch.float16).squeeze(-1), book)
