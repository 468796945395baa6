"""The weight of a linear layer as numbers, from however a checkpoint stores it.

Plain, with scales (fp8, int8), or as packed integers with a scale and a zero point for each group of inputs:
GPTQ's layout, AWQ's, and the `pack-quantized` one of compressed-tensors.
"""

from collections.abc import Mapping
from typing import Any

import torch

from turboquant_kernels.tensors import Tensors

_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where each of eight neighbouring outputs lies in AWQ's packed word, from the lowest bits on."""


def read_linear(tensors: Tensors, name: str, quantization: Mapping[str, Any]) -> torch.Tensor | None:
    """Weight float32 [outputs, inputs] of the layer `name`; None where it is stored in no known way.

    `quantization` is `quantization_config` of config.json.
    """
    if f"{name}.weight" in tensors:
        return _scaled(tensors, name)
    if f"{name}.weight_packed" in tensors and f"{name}.weight_shape" in tensors:
        return _pack_quantized(tensors, name)
    method = quantization.get("quant_method")
    if f"{name}.qweight" in tensors and method == "gptq":
        return _gptq(tensors, name, quantization.get("checkpoint_format") != "gptq_v2")
    if f"{name}.qweight" in tensors and method == "awq":
        return _awq(tensors, name)
    return None


def _scaled(tensors: Tensors, name: str) -> torch.Tensor | None:
    """A weight and its scale: for the tensor, a row, or a block. Floats of 16 bits and more have none."""
    weight = tensors.read(f"{name}.weight")
    if weight.dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        return weight.float()
    if weight.dtype not in (torch.float8_e4m3fn, torch.float8_e5m2, torch.int8):
        return None
    for suffix in ("weight_scale", "weight_scale_inv"):
        if f"{name}.{suffix}" in tensors:
            scale = tensors.read(f"{name}.{suffix}")
            if scale.dtype == torch.uint8:  # exponents: MXFP8
                scale = torch.exp2(scale.float() - 127)
            return weight.float() * _spread(scale.float(), weight.shape)
    return None


def _spread(scale: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """A scale [], [1], [rows], [rows, 1] or one for each block, for the elements of a weight."""
    if scale.numel() == 1:
        return scale.reshape(1, 1)
    if scale.dim() == 1:
        return scale[:, None]
    for axis in (0, 1):
        # Blocks are powers of two; the last one of a row or column may be smaller.
        size = -(-shape[axis] // scale.shape[axis])
        scale = scale.repeat_interleave(1 << (size - 1).bit_length(), dim=axis).narrow(axis, 0, shape[axis])
    return scale


def _pack_quantized(tensors: Tensors, name: str) -> torch.Tensor | None:
    """Inputs are packed, scales are [outputs, groups]; without zero points they are in the middle."""
    scale = tensors.read(f"{name}.weight_scale").float()
    packed = tensors.read(f"{name}.weight_packed")
    if packed.dtype != torch.int32:
        return None
    inputs = int(tensors.read(f"{name}.weight_shape")[1])
    bits = 32 * packed.shape[1] // inputs
    if f"{name}.weight_zero_point" in tensors or bits not in (4, 8):
        return None
    levels = _unpack(packed, bits)[:, :inputs].float() - (1 << (bits - 1))
    return levels * scale.repeat_interleave(inputs // scale.shape[1], dim=1)


def _gptq(tensors: Tensors, name: str, zeros_less_one: bool) -> torch.Tensor | None:
    """Inputs are packed, scales and zero points are [groups, outputs], the latter packed by outputs."""
    packed_zeros, outputs = tensors.read(f"{name}.qzeros"), tensors.read(f"{name}.scales").shape[1]
    bits = 32 * packed_zeros.shape[1] // outputs
    if bits not in (4, 8):
        return None
    levels = _unpack(tensors.read(f"{name}.qweight").T.contiguous(), bits).float()
    zeros = _unpack(packed_zeros, bits).T.float() + int(zeros_less_one)
    scale = tensors.read(f"{name}.scales").T.float()
    if f"{name}.g_idx" in tensors:
        group = tensors.read(f"{name}.g_idx").long()
    else:
        group = torch.arange(levels.shape[1]) // (levels.shape[1] // scale.shape[1])
    return (levels - zeros[:, group]) * scale[:, group]


def _awq(tensors: Tensors, name: str) -> torch.Tensor | None:
    """Outputs are packed in AWQ's order, 4 bits each; scales and zero points are [groups, outputs]."""
    scale = tensors.read(f"{name}.scales").float()
    packed = tensors.read(f"{name}.qweight")
    if 8 * packed.shape[1] != scale.shape[1]:
        return None

    def unpack(words: torch.Tensor) -> torch.Tensor:
        return _unpack(words, 4).unflatten(1, (-1, 8))[..., list(_AWQ_ORDER)].flatten(1).float()

    levels, zeros = unpack(packed), unpack(tensors.read(f"{name}.qzeros"))
    size = len(levels) // len(scale)
    return ((levels - zeros.repeat_interleave(size, 0)) * scale.repeat_interleave(size, 0)).T


def _unpack(words: torch.Tensor, bits: int) -> torch.Tensor:
    """int32 [rows, n] -> int32 [rows, n * 32 / bits]: the integers in each word, from the lowest bits on."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    return ((words[..., None] >> shifts) & ((1 << bits) - 1)).flatten(1)
