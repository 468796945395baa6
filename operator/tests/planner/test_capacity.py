"""Bytes per token and tokens that fit: numbers worked out by hand, and those that engines have reported."""

from dataclasses import replace

import pytest

from turboquant_kernels.formats import BF16, FP8, KVFormat
from turboquant_operator.planner.capacity import LayerCache, layer_caches, layout
from turboquant_operator.planner.engine import EngineSettings
from turboquant_operator.planner.options import Choice, Option

GIB = 2**30
CPU = EngineSettings(block_tokens=128, batched_tokens=2048, sequences=128)
GPU = EngineSettings(16, 8192, 1024, overlaps_steps=True, least_plain_tokens=16)


def option(facts, fmt, settings=CPU, context=2048, memory=GIB, tensor=1, skip=(), pipeline=1) -> Option:
    return Option(Choice.uniform(fmt, facts, skip), facts, settings, context, tensor, pipeline, memory)


@pytest.mark.parametrize(
    ("name", "bf16", "k4v4"),
    [
        ("llama-3.1-8b", 131_072, 33_792),
        ("llama-3.1-70b", 327_680, 84_480),
        ("qwen2.5-7b", 57_344, 14_784),
        ("qwen3-0.6b", 114_688, 29_568),
        ("qwen3-8b", 147_456, 38_016),
        ("mistral-7b-v0.3", 131_072, 33_792),
        ("gemma-3-270m", 18_432, 4_680),
        ("gemma-3-4b", 139_264, 35_360),
        ("gemma-3-27b", 507_904, 130_944),
        ("gemma-2-9b", 344_064, 87_360),
        ("phi-2", 327_680, 86_016),
        ("llama-3.2-1b", 32_768, 8_704),
    ],
)
def test_bytes_per_token(facts, name, bf16, k4v4):
    assert option(facts(name), BF16).bytes_per_token == bf16
    assert option(facts(name), KVFormat(4, 4)).bytes_per_token == k4v4


def test_kv_heads_are_split_over_gpus_and_replicated_beyond(facts):
    llama = facts("llama-3.1-8b")
    assert [option(llama, BF16, tensor=t).bytes_per_token for t in (1, 8, 16, 32)] == [
        131_072,
        131_072,
        262_144,
        524_288,
    ]


def test_h200_engine_bf16_and_fp8(facts):
    """vLLM 0.25.1, whose layout of these caches is that of 0.32.0, at 0.9: both from one memory size."""
    memory = 117_806_465_024
    llama = facts("llama-3.1-8b")
    assert option(llama, BF16, GPU, 131_072, memory).tokens == 898_784
    assert option(llama, FP8, GPU, 131_072, memory).tokens == 1_797_584


@pytest.mark.parametrize(("batched_tokens", "tokens"), [(2048, 55_356), (512, 91_656)])
def test_cpu_engine_gemma_3_270m(facts, batched_tokens, tokens):
    """vLLM on CPU at 1 GiB and 2,048 tokens of context: what `kv_cache_size_tokens` showed."""
    settings = EngineSettings(128, batched_tokens, 128)
    assert option(facts("gemma-3-270m"), BF16, settings).tokens == tokens


def test_a_window_keeps_the_tokens_of_all_steps_under_way(facts):
    gemma = facts("gemma-3-270m")

    def blocks(settings: EngineSettings, pipeline: int = 1) -> int:
        found = option(gemma, BF16, settings, 131_072, pipeline=pipeline)
        return found.cache_layout.blocks_per_sequence(131_072, found.in_flight_tokens)

    full, windows = 131_072 // 16, 5
    one_step = EngineSettings(16, 2048, 128)
    assert blocks(one_step) == full + windows * ((512 - 1 + 2048) // 16 + 2)
    overlapped = replace(one_step, overlaps_steps=True)
    assert blocks(overlapped) == full + windows * ((512 - 1 + 4096) // 16 + 2)
    assert blocks(overlapped, pipeline=2) == full + windows * ((512 - 1 + 6144) // 16 + 2)


def test_blocks_are_whole(facts):
    llama = facts("llama-3.1-8b")
    block = 128 * 131_072
    assert option(llama, BF16, context=128, memory=3 * block).tokens == 384
    assert option(llama, BF16, context=128, memory=3 * block - 1).tokens == 256


def test_a_context_of_one_token_takes_a_block(facts):
    llama = facts("llama-3.1-8b")
    assert option(llama, BF16, context=1, memory=3 * 128 * 131_072).tokens == 3


def test_one_block_of_the_pool_serves_no_sequence(facts):
    llama = facts("llama-3.1-8b")
    assert option(llama, BF16, context=128, memory=3 * 128 * 131_072).sequences == 2


def test_layers_of_different_formats_share_one_group_without_padding(facts):
    llama = facts("llama-3.1-8b")
    mixed = option(llama, KVFormat(4, 4), skip=range(16), memory=GIB)
    assert mixed.bytes_per_token == 16 * 8 * (512 + 132)
    assert mixed.tokens == GIB // (128 * mixed.bytes_per_token) * 128


@pytest.mark.parametrize(
    ("settings", "compressed", "plain"),
    [
        # A block of 32 tokens in bfloat16 takes 32,768 bytes, of 128 tokens in k4v4 33,280.
        (CPU, LayerCache(512, 128, 128 * 260), LayerCache(512, 32, 32 * 1024, 512)),
        # 64 tokens in k4v4 are the fewest whose 16,640 bytes hold 16 tokens in bfloat16.
        (GPU, LayerCache(512, 64, 64 * 260), LayerCache(512, 16, 16 * 1024, 256)),
    ],
    ids=["cpu", "gpu"],
)
def test_plain_layers_beside_sliding_windows_share_the_compressed_layers_blocks(
    facts, settings, compressed, plain
):
    gemma = facts("gemma-3-270m")
    layers = layer_caches(gemma, Choice.uniform(KVFormat(4, 4), gemma, (0,)).formats, 1, settings)
    assert layers[:2] == (plain, compressed)
    assert {layer.page_bytes for layer in layers} == {compressed.page_bytes}
    assert layout(layers).bytes_per_block == compressed.page_bytes


def test_smaller_blocks_beside_sliding_windows_are_padded(facts):
    gemma = facts("gemma-3-270m")
    formats = tuple(KVFormat(8, 4) if i % 6 == 5 else KVFormat(4, 4) for i in range(gemma.layers))
    found = Option(Choice("tq-k4v4", formats), gemma, CPU, 2048, 1, 1, GIB)
    uniform = option(gemma, KVFormat(8, 4))
    assert found.tokens == uniform.tokens
    assert uniform.cache_layout.padding_percent == 0
    assert found.cache_layout.padding_percent == round(100 * 5 / 6 * (388 - 260) / 388)


def test_formats_of_equal_bytes_may_be_mixed_beside_sliding_windows(facts):
    gemma = facts("gemma-3-270m")
    formats = tuple(KVFormat(6, 2) if i % 2 else KVFormat(4, 4) for i in range(gemma.layers))
    mixed = Option(Choice("tq-k4v4", formats), gemma, CPU, 2048, 1, 1, GIB)
    assert mixed.tokens == option(gemma, KVFormat(4, 4)).tokens


def test_small_blocks_grow_by_whole_factors_to_the_size_of_the_others(facts):
    gemma = facts("gemma-3-270m")
    found = layout(layer_caches(gemma, Choice.uniform(FP8, gemma, range(6)).formats, 1, CPU))
    assert {(group.block_tokens, group.padding_bytes) for group in found.groups} == {(128, 0), (256, 0)}
    assert found.padding_percent == 0


def test_groups_take_the_larger_layer_count_where_counts_are_close():
    full, windowed = LayerCache(None, 16, 1000), LayerCache(64, 16, 1000)
    found = layout([full] * 12 + [windowed] * 13)
    assert found.bytes_per_block == 13_000
    assert found.groups == (full, windowed)


def test_float32_engines_keep_an_uncompressed_cache_in_float32(facts):
    from turboquant_operator.planner.facts import with_dtype

    wide = with_dtype(facts("llama-3.1-8b"), "float32")
    assert option(wide, BF16).bytes_per_token == 262_144
    assert option(wide, KVFormat(4, 4)).bytes_per_token == 33_792
