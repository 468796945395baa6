"""Weights in the layouts of quantized checkpoints, packed here number by number as each layout is defined."""

import pytest
import torch
from safetensors.torch import save_file

from turboquant_kernels.linear_weights import read_linear
from turboquant_kernels.tensors import Tensors

OUTPUTS, INPUTS, GROUP = 16, 64, 32
GROUPS = INPUTS // GROUP


def words(levels: list[int], bits: int) -> int:
    """Integers in one int32, the first in the lowest bits."""
    word = sum(level << (bits * place) for place, level in enumerate(levels))
    return word - (1 << 32) if word >= 1 << 31 else word


def packed(rows: list[list[int]], bits: int, order: tuple[int, ...] | None = None) -> torch.Tensor:
    """Rows of integers as int32 words; `order`: which of a word's integers stands at each place."""
    count = 32 // bits
    order = order or tuple(range(count))
    return torch.tensor(
        [
            [words([row[begin + i] for i in order], bits) for begin in range(0, len(row), count)]
            for row in rows
        ],
        dtype=torch.int32,
    )


@pytest.fixture
def read(tmp_path):
    def read(tensors: dict[str, torch.Tensor], **quantization):
        named = {f"layer.{name}": tensor.contiguous() for name, tensor in tensors.items()}
        save_file(named, tmp_path / "model.safetensors")
        return read_linear(Tensors.of_folder(tmp_path), "layer", quantization)

    return read


@pytest.fixture
def drawn():
    """Levels [OUTPUTS, INPUTS], zero points and scales [OUTPUTS, GROUPS] of so many bits."""

    def draw(bits: int):
        generator = torch.Generator().manual_seed(bits)
        levels = torch.randint(0, 1 << bits, (OUTPUTS, INPUTS), generator=generator)
        zeros = torch.randint(1, 1 << bits, (OUTPUTS, GROUPS), generator=generator)
        return levels, zeros, torch.rand(OUTPUTS, GROUPS, generator=generator) + 0.1

    return draw


def by_input(groups: torch.Tensor) -> torch.Tensor:
    return groups.repeat_interleave(GROUP, 1)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("checkpoint_format", ["gptq", "gptq_v2"])
def test_gptq(read, drawn, bits: int, checkpoint_format: str) -> None:
    levels, zeros, scales = drawn(bits)
    stored = zeros - int(checkpoint_format == "gptq")
    # Layers may have other bits than the model (`dynamic`).
    found = read(
        {
            "qweight": packed(levels.tolist(), bits).T,
            "qzeros": packed(stored.T.tolist(), bits),
            "scales": scales.T,
        },
        quant_method="gptq",
        bits=4,
        checkpoint_format=checkpoint_format,
    )
    assert torch.allclose(found, (levels - by_input(zeros)) * by_input(scales))


def test_gptq_with_inputs_in_another_order(read, drawn) -> None:
    levels, zeros, scales = drawn(4)
    group = torch.arange(INPUTS, dtype=torch.int32) % GROUPS
    found = read(
        {
            "qweight": packed(levels.tolist(), 4).T,
            "qzeros": packed((zeros - 1).T.tolist(), 4),
            "scales": scales.T,
            "g_idx": group,
        },
        quant_method="gptq",
        bits=4,
    )
    assert torch.allclose(found, (levels - zeros[:, group.long()]) * scales[:, group.long()])


def test_awq(read, drawn) -> None:
    levels, zeros, scales = drawn(4)
    order = (0, 2, 4, 6, 1, 3, 5, 7)  # AutoAWQ's order of packing
    found = read(
        {
            "qweight": packed(levels.T.tolist(), 4, order),
            "qzeros": packed(zeros.T.tolist(), 4, order),
            "scales": scales.T,
        },
        quant_method="awq",
        bits=4,
    )
    assert torch.allclose(found, (levels - by_input(zeros)) * by_input(scales))


@pytest.mark.parametrize("bits", [4, 8])
def test_compressed_tensors(read, drawn, bits: int) -> None:
    levels, _, scales = drawn(bits)
    found = read(
        {
            "weight_packed": packed(levels.tolist(), bits),
            "weight_scale": scales,
            "weight_shape": torch.tensor([OUTPUTS, INPUTS]),
        },
        quant_method="compressed-tensors",
    )
    assert torch.allclose(found, (levels - (1 << (bits - 1))) * by_input(scales))


def test_scales_that_are_exponents(read) -> None:
    """MXFP8: one byte for 32 inputs."""
    weight = torch.randn(OUTPUTS, INPUTS).to(torch.float8_e4m3fn)
    exponents = torch.randint(118, 130, (OUTPUTS, GROUPS), dtype=torch.uint8)
    found = read({"weight": weight, "weight_scale": exponents})
    assert torch.equal(found, weight.float() * by_input(2.0 ** (exponents.float() - 127)))


@pytest.mark.parametrize(
    ("tensors", "quantization"),
    [
        (
            {
                "qweight": torch.ones(6, 16, dtype=torch.int32),
                "qzeros": torch.ones(2, 3, dtype=torch.int32),
                "scales": torch.ones(2, 32),
            },
            {"quant_method": "gptq", "bits": 3},
        ),
        ({"weight": torch.ones(8, 16, dtype=torch.int8), "SCB": torch.ones(8)}, {}),
        ({"weight": torch.ones(8, 16).to(torch.float8_e4m3fn)}, {"quant_method": "fp8"}),
        (
            {
                "weight_packed": torch.ones(8, 8, dtype=torch.uint8),
                "weight_scale": torch.ones(8, 1).to(torch.float8_e4m3fn),
                "weight_global_scale": torch.ones(1),
            },
            {"quant_method": "compressed-tensors"},
        ),
        ({"qweight": torch.ones(8, 16, dtype=torch.int32)}, {"quant_method": "other"}),
        ({"weight": torch.ones(8, 16, dtype=torch.uint8)}, {"quant_method": "modelopt"}),
        ({"other": torch.ones(1)}, {}),
    ],
)
def test_what_is_not_known_is_none(read, tensors, quantization) -> None:
    assert read(tensors, **quantization) is None
