"""Facts from the config.json files of well-known models, and the refusal of those that cannot be planned."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from turboquant_operator.api.spec import Architecture, TurboQuantDeploymentSpec
from turboquant_operator.api.status import Plan
from turboquant_operator.planner import ModelFacts, NoPlan, make_plan, read_facts
from turboquant_operator.planner.families import FAMILIES

CONFIGS = Path(__file__).parent / "configs"


@pytest.mark.parametrize(
    ("name", "layers", "heads", "kv_heads", "head_dim", "context"),
    [
        ("llama-3.1-8b", 32, 32, 8, 128, 131_072),
        ("llama-3.1-70b", 80, 64, 8, 128, 131_072),
        ("llama-3.2-1b", 16, 32, 8, 64, 131_072),
        ("qwen2.5-7b", 28, 28, 4, 128, 131_072),
        ("qwen3-0.6b", 28, 16, 8, 128, 40_960),
        ("qwen3-8b", 36, 32, 8, 128, 40_960),
        ("qwen3-8b-yarn", 36, 32, 8, 128, 40_960),
        ("qwen3-30b-a3b", 48, 32, 4, 128, 40_960),
        ("mistral-7b-v0.3", 32, 32, 8, 128, 32_768),
        ("mistral-nemo-12b", 40, 32, 8, 128, 131_072),
        ("mixtral-8x7b", 32, 32, 8, 128, 32_768),
        ("gemma-2b", 18, 8, 1, 256, 8_192),
        ("gemma-2-9b", 42, 16, 8, 256, 8_192),
        ("gemma-3-270m", 18, 4, 1, 256, 32_768),
        ("gemma-3-1b", 26, 4, 1, 256, 32_768),
        ("gemma-3-4b", 34, 8, 4, 256, 131_072),
        ("gemma-3-27b", 62, 32, 16, 128, 131_072),
        ("phi-2", 32, 32, 32, 80, 2_048),
        ("phi-3-mini-4k", 32, 32, 32, 96, 4_096),
        ("gpt-oss-20b", 24, 64, 8, 64, 131_072),
        ("command-r-35b", 40, 64, 64, 128, 131_072),
        ("qwen2.5-vl-7b", 28, 28, 4, 128, 128_000),
        ("qwen2.5-vl-7b-nested", 28, 28, 4, 128, 128_000),
        ("mistral-small-3.1-24b", 40, 32, 8, 128, 131_072),
    ],
)
def test_shape_of_known_models(facts, name, layers, heads, kv_heads, head_dim, context):
    found = facts(name)
    assert (found.layers, found.attention_heads, found.key_value_heads) == (layers, heads, kv_heads)
    assert (found.head_dim, found.context_length) == (head_dim, context)


@pytest.mark.parametrize(
    ("name", "window", "windowed"),
    [
        ("gemma-3-270m", 512, 15),
        ("gemma-3-1b", 512, 22),
        ("gemma-3-4b", 1024, 29),
        ("gemma-3-27b", 1024, 52),
        ("gemma-2-9b", 4096, 21),
        ("gpt-oss-20b", 128, 12),
        ("command-r7b", 4097, 24),
        ("mistral-7b-v0.1", 4096, 32),
        ("phi-3-mini-4k", 2047, 32),
        ("starcoder2-3b", 4096, 30),
    ],
)
def test_sliding_windows_by_layer(facts, name, window, windowed):
    windows = facts(name).windows
    assert {w for w in windows if w is not None} == {window}
    assert sum(w is not None for w in windows) == windowed


@pytest.mark.parametrize(
    "name", ["llama-3.1-8b", "qwen2.5-7b", "qwen3-8b", "mistral-7b-v0.3", "mixtral-8x7b"]
)
def test_models_with_full_attention_alone_have_no_window(facts, name):
    assert set(facts(name).windows) == {None}


def test_gemma_3_pattern_starts_with_windows_and_ends_the_sixth_layer_full(facts):
    assert facts("gemma-3-1b").windows[:7] == (512, 512, 512, 512, 512, None, 512)


def test_gemma_2_alternates_from_a_windowed_layer(facts):
    assert facts("gemma-2-9b").windows[:3] == (4096, None, 4096)


@pytest.mark.parametrize(
    ("name", "biased"),
    [
        ("qwen2.5-7b", True),
        ("qwen2.5-0.5b", True),
        ("gpt-oss-20b", True),
        ("qwen2.5-vl-7b", True),
        ("qwen1.5-moe-a2.7b", True),
        ("glm-4-9b-chat-hf", True),
        ("phi-2", True),
        ("stablelm-2-1.6b", True),
        ("starcoder2-3b", True),
        ("qwen3-8b", False),
        ("llama-3.1-8b", False),
        ("gemma-3-270m", False),
        ("glm-4-9b-0414", False),
    ],
)
def test_key_bias(facts, name, biased):
    assert facts(name).key_bias is biased


def test_llama_with_attention_bias_has_a_key_bias(config):
    assert read_facts({**config("llama-3.1-8b"), "attention_bias": True}).key_bias


def test_float32_weights_are_loaded_in_half_the_bytes(config):
    found = read_facts(config("gemma-2-9b"), {"F32": 36_966_823_936})
    assert found.dtype == "bfloat16"
    assert found.weight_bytes == 18_483_411_968


def test_weights_of_unknown_dtype_are_taken_for_the_configs(config):
    assert read_facts(config("gemma-2-9b"), {"": 1000}).weight_bytes == 500
    assert read_facts(config("llama-3.1-8b"), {"": 1000}).weight_bytes == 1000


def test_weights_of_quantized_and_multi_modal_models_are_not_counted_from_the_config(config):
    quantized = {**config("llama-3.1-8b"), "quantization_config": {"quant_method": "awq"}}
    assert read_facts(quantized).weight_bytes is None
    assert read_facts(config("gemma-3-4b")).weight_bytes is None


def test_quantized_weights_keep_their_bytes(config):
    found = read_facts(
        {**config("llama-3.1-8b"), "quantization_config": {"quant_method": "fp8"}},
        {"F8_E4M3": 7_000, "BF16": 2_000},
    )
    assert (found.quantization, found.weight_bytes) == ("fp8", 9_000)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("deepseek-v2-lite", "kv_lora_rank"),
        ("qwen3-next-80b-a3b", "full_attention_interval"),
        ("jamba-1.5-mini", "attn_layer_period"),
        ("llama-4-scout", "attention_chunk_size"),
        ("gemma-3n-e2b", "num_kv_shared_layers"),
        ("t5-base", "encoder-decoder"),
        ("mamba-2.8b", "mamba"),
    ],
)
def test_attention_that_cannot_be_planned_is_refused_by_name(config, name, why):
    answer = read_facts(config(name))
    assert isinstance(answer, NoPlan)
    assert (answer.type, answer.status, answer.reason) == ("Accepted", "False", "UnsupportedAttention")
    assert why in answer.message


def test_hybrid_layer_types_are_refused_under_an_unknown_name():
    answer = read_facts(
        {
            "model_type": "brand_new",
            "layer_types": ["linear_attention", "full_attention"],
            "num_hidden_layers": 2,
        }
    )
    assert answer.reason == "UnsupportedAttention"
    assert "linear_attention" in answer.message


def test_an_unknown_architecture_is_never_guessed(config):
    answer = read_facts({**config("llama-3.1-8b"), "model_type": "brand_new", "architectures": ["BrandNew"]})
    assert (answer.type, answer.status, answer.reason) == ("PlanFits", "Unknown", "UnknownArchitecture")
    assert "spec.model.architecture (layers, attentionHeads, keyValueHeads, headDim)" in answer.message


def test_given_facts_stand_in_for_an_unknown_architecture():
    facts_given = Architecture(
        layers=4, attention_heads=8, key_value_heads=2, head_dim=64, context_length=4096, weight_bytes=10**9
    )
    found = read_facts({"model_type": "brand_new"}, None, facts_given)
    assert found == ModelFacts("brand_new", (None,) * 4, 8, 2, 64, 4096, "bfloat16", 10**9, key_bias=False)


def test_given_facts_win_over_the_config(config):
    found = read_facts(config("llama-3.1-8b"), {"BF16": 5}, Architecture(context_length=8192, weight_bytes=7))
    assert (found.context_length, found.weight_bytes, found.layers) == (8192, 7, 32)


@pytest.mark.parametrize("field", ["num_hidden_layers", "num_attention_heads"])
def test_missing_fields_are_named(config, field):
    document = config("llama-3.1-8b")
    del document[field]
    answer = read_facts(document)
    assert (answer.reason, answer.status) == ("MissingModelFacts", "Unknown")
    assert field in answer.message


def test_layer_types_of_another_length_are_a_contradiction(config):
    answer = read_facts({**config("gemma-3-270m"), "num_hidden_layers": 20})
    assert answer.reason == "MissingModelFacts"
    assert "18 layer_types for 20 layers" in answer.message


def test_a_null_window_is_no_window(config):
    assert set(read_facts({**config("mistral-7b-v0.1"), "sliding_window": None}).windows) == {None}


def test_an_absent_window_is_the_familys_default(config):
    document = config("mistral-7b-v0.1")
    del document["sliding_window"]
    assert set(read_facts(document).windows) == {4096}


def test_a_null_head_dim_is_hidden_size_over_heads(config):
    assert read_facts({**config("llama-3.1-8b"), "head_dim": None}).head_dim == 128


def test_every_family_has_a_config_that_the_engine_test_builds(config):
    configs = [config(path.stem) for path in CONFIGS.glob("*.json")]
    assert FAMILIES.keys() <= {(c.get("text_config") or c).get("model_type") for c in configs}


def test_a_window_that_starts_at_a_later_layer_is_refused(config):
    answer = read_facts({**config("qwen2.5-7b"), "use_sliding_window": True, "max_window_layers": 14})
    assert (answer.reason, answer.type) == ("UnsupportedAttention", "Accepted")
    assert "from layer 14 on" in answer.message


def test_a_window_of_all_layers_is_read(config):
    found = read_facts({**config("qwen2.5-7b"), "use_sliding_window": True, "max_window_layers": 28})
    assert set(found.windows) == {131_072}


@pytest.mark.parametrize(
    ("field", "value"),
    [("num_key_value_heads", "8"), ("hidden_size", -1), ("sliding_window", 0.5), ("vocab_size", [1])],
)
def test_a_number_that_is_none_is_named(config, field, value):
    answer = read_facts({**config("llama-3.1-8b"), field: value})
    assert answer.reason == "MissingModelFacts"
    assert field in answer.message


ODD_VALUES = [None, True, 0, -1, 7, 2**70, 0.5, 1e300, "", "8", [], [1], ["full_attention"], {}, {"a": {}}]


@pytest.mark.parametrize("layers", ["", [], {}])
def test_an_empty_start_of_the_windows_is_none(config, layers):
    odd = {**config("qwen2.5-7b"), "use_sliding_window": True, "max_window_layers": layers}
    assert isinstance(read_facts(odd), ModelFacts)


def test_a_start_of_the_windows_that_is_no_number_is_named(config):
    answer = read_facts({**config("qwen2.5-7b"), "use_sliding_window": True, "max_window_layers": "8"})
    assert answer.reason == "MissingModelFacts"
    assert "max_window_layers" in answer.message


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.json")), ids=lambda path: path.stem)
@settings(max_examples=50, deadline=None)
@given(st.data())
def test_no_config_makes_the_planner_fail(path, data):
    """A config comes from outside: whatever stands in its fields, the answer is facts or a condition."""
    document = json.loads(path.read_text())
    inner = document.get("text_config", document)
    fields = data.draw(st.lists(st.sampled_from(sorted(inner)), min_size=1, max_size=3))
    for field in fields:
        inner[field] = data.draw(st.sampled_from(ODD_VALUES))
    found = read_facts(document, {"BF16": 10**9})
    assert isinstance(found, ModelFacts | NoPlan)
    if isinstance(found, ModelFacts):
        assert isinstance(make_plan(ON_H100, found), Plan | NoPlan)


ON_H100 = TurboQuantDeploymentSpec.model_validate(
    {"model": {"uri": "hf://any/model"}, "accelerator": {"type": "nvidia-h100-80gb"}}
)
