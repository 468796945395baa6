"""Shapes of models on the CPU: at 8 bits an engine answers next to as one with vLLM's own cache does."""

import pytest
from answers import assert_next_to_each_other

pytestmark = pytest.mark.engine

ARGUMENTS = {"max_model_len": 1024, "max_num_batched_tokens": 512, "kv_cache_memory_bytes": 64 << 20}
PROMPTS = [[3 + index * index * 7 % 113 for index in range(length)] for length in (700, 40)]


@pytest.mark.parametrize(("shape", "near"), [("GEMMA2", 0.1), ("GEMMA3", 0.1), ("GPT_OSS", 0.4)])
def test_answers_are_next_to_those_of_the_uncompressed_cache(
    start_engine, dummy_model, shape: str, near: float
) -> None:
    """Logits of the attention that are capped, sliding windows shorter than the prompt, and sinks.

    Without its sinks gpt-oss's shape is 2.2 away; no norm damps its rounding.
    """
    engines = [start_engine(dummy_model(shape, weights=0), name, **ARGUMENTS) for name in ("tq-k8v8", "auto")]
    assert_next_to_each_other(*engines, PROMPTS, near=near)


@pytest.mark.parametrize("skipped", [["0", "5"], ["sliding_window"]])
def test_layers_in_the_models_own_dtype_share_a_pool_with_compressed_ones(
    start_engine, dummy_model, skipped: list[str]
) -> None:
    model = dummy_model("GEMMA3", weights=0)
    skipping = start_engine(model, "tq-k8v8", kv_cache_dtype_skip_layers=skipped, **ARGUMENTS)
    compressed, plain = (start_engine(model, name, **ARGUMENTS) for name in ("tq-k8v8", "auto"))
    assert_next_to_each_other(skipping, plain, PROMPTS, near=0.1)
    assert plain.capacity_tokens < skipping.capacity_tokens < compressed.capacity_tokens
    groups = skipping.runner.kv_cache_config.kv_cache_groups
    assert len({group.kv_cache_spec.page_size_bytes for group in groups}) == 1


@pytest.mark.parametrize("window", [262144, 80])
def test_windows_in_every_layer(start_engine, dummy_model, window: int) -> None:
    """Longer than any sequence, as in Phi-3, and shorter than the prompts."""
    model = dummy_model("PHI3", weights=0, sliding_window=window)
    engines = [start_engine(model, name, **ARGUMENTS) for name in ("tq-k8v8", "auto")]
    assert_next_to_each_other(*engines, PROMPTS, near=0.4)


def test_fewer_bits_are_further_away(start_engine, dummy_model) -> None:
    """The comparison above can fail: at two bits it does."""
    engines = [
        start_engine(dummy_model("GEMMA2", weights=0), name, **ARGUMENTS) for name in ("tq-k2v2", "auto")
    ]
    with pytest.raises(AssertionError):
        assert_next_to_each_other(*engines, PROMPTS, near=0.1)
