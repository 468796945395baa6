"""Names and byte counts. The numbers are written out: they are what the engine and the planner promise."""

import subprocess
import sys

import pytest

from turboquant_kernels.formats import (
    BF16,
    COMPRESSED_FORMATS,
    FORMAT_NAMES,
    HEAD_DIMS,
    KEY_BITS,
    PAGE_TOKENS,
    PROD_KEY_BITS,
    QUALITIES,
    TIERS,
    VALUE_BITS,
    Encoding,
    KVFormat,
    base_format,
    find_tier,
)


@pytest.mark.parametrize(
    ("name", "slot_bytes"),
    [
        ("bf16", 512),
        ("fp8", 256),
        ("tq-k8v4", 196),
        ("tq-k5v3", 132),
        ("tq-k4v4", 132),
        ("tq-k4v2", 100),
        ("tq-k3v3", 100),
        ("tq-k3v2", 84),
        ("tq-k2v2", 68),
        ("tq-k8v8", 260),
        ("tq-k3v4-prod", 118),
        ("tq-k4v4-prod", 134),
    ],
)
def test_bytes_of_a_token_at_head_dim_128(name, slot_bytes):
    assert KVFormat.parse(name).slot_bytes(128) == slot_bytes


@pytest.mark.parametrize(
    ("head_dim", "slot_bytes"), [(64, 68), (80, 84), (96, 100), (128, 132), (192, 196), (256, 260)]
)
def test_bytes_of_a_k4v4_token_at_each_head_dim(head_dim, slot_bytes):
    assert KVFormat(4, 4).slot_bytes(head_dim) == slot_bytes


def test_a_page_of_sixteen_tokens_has_no_padding():
    assert PAGE_TOKENS == 16
    assert KVFormat(4, 4).page_bytes(128) == 2112


def test_an_anchor_is_charged_once_for_128_tokens():
    anchored = KVFormat(4, 4, anchor=True)
    assert anchored.page_bytes(128, tokens=128) == 128 * 132 + 256
    assert anchored.ratio_to_bf16(128) == pytest.approx(512 / 134)


def test_tokens_that_are_no_whole_pages_are_refused():
    with pytest.raises(ValueError, match="24 tokens are not a multiple of 16"):
        KVFormat(4, 4).page_bytes(128, tokens=24)
    with pytest.raises(ValueError, match="16 tokens are not a multiple of 128"):
        KVFormat(4, 4, anchor=True).page_bytes(128)


@pytest.mark.parametrize(("name", "ratio"), [("bf16", 1), ("fp8", 2), ("tq-k4v4", 3.879), ("tq-k4v2", 5.12)])
def test_ratio_to_bf16(name, ratio):
    assert KVFormat.parse(name).ratio_to_bf16(128) == pytest.approx(ratio, abs=5e-4)


def test_every_uniform_pair_and_every_prod_format_has_a_name():
    assert len(COMPRESSED_FORMATS) == len(KEY_BITS) * len(VALUE_BITS) + len(PROD_KEY_BITS) * len(VALUE_BITS)
    assert len(set(FORMAT_NAMES)) == len(COMPRESSED_FORMATS) + 2


@pytest.mark.parametrize("name", FORMAT_NAMES)
def test_a_name_parses_to_the_format_of_that_name(name):
    assert KVFormat.parse(name).name == name


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tq-k4v5", "did you mean .*tq-k4v4"),
        ("tq-k7v4", "did you mean"),
        ("tq-k8v4-prod", "did you mean .*tq-k4v4-prod"),
        ("k4v4", "did you mean .*tq-k4v4"),
        ("tq-k2.5v2.5", "fractional bits are not supported yet"),
        ("int4", "tq formats"),
        ("", "tq formats"),
    ],
)
def test_an_unknown_name_is_refused_with_a_way_out(name, message):
    with pytest.raises(ValueError, match=message):
        KVFormat.parse(name)


def test_a_head_dim_without_a_layout_is_refused():
    with pytest.raises(ValueError, match="head_dim 100 is not one of"):
        KVFormat(4, 4).slot_bytes(100)
    assert BF16.slot_bytes(100) == 400


@pytest.mark.parametrize(
    "arguments",
    [
        {"key_bits": 7, "value_bits": 4},
        {"key_bits": 4, "value_bits": 5},
        {"key_bits": 8, "value_bits": 4, "encoding": Encoding.PROD},
        {"key_bits": 16, "value_bits": 8, "encoding": Encoding.PLAIN},
        {"key_bits": 16, "value_bits": 16, "encoding": Encoding.PLAIN, "anchor": True},
    ],
)
def test_bits_that_no_format_has_are_refused(arguments):
    with pytest.raises(ValueError, match=r"bits|anchor"):
        KVFormat(**arguments)


def test_tiers_by_their_formats():
    assert {tier.cache_dtype: tier.format.name for tier in TIERS.values()} == {
        "tq-near-lossless": "tq-k8v4",
        "tq-balanced": "tq-k5v3",
        "tq-max-capacity": "tq-k4v2",
        "tq-experimental": "tq-k3v2",
    }
    assert list(QUALITIES) == ["near-lossless", "balanced", "max-capacity"]


def test_names_of_tiers_and_formats_are_told_apart():
    assert find_tier("tq-balanced") == TIERS["balanced"]
    assert find_tier("tq-k5v3") is None
    assert base_format("tq-balanced") == base_format("tq-k5v3") == KVFormat(5, 3)
    with pytest.raises(ValueError, match="did you mean tq-balanced"):
        base_format("tq-balance")


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_every_token_fills_whole_bytes(head_dim):
    for fmt in COMPRESSED_FORMATS:
        bits = head_dim * (fmt.key_bits + fmt.value_bits) + 8 * fmt.scale_bytes
        assert fmt.slot_bytes(head_dim) * 8 == bits


def test_formats_and_plans_import_no_torch():
    code = (
        "import sys, turboquant_kernels.formats, turboquant_kernels.plans;"
        "sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
