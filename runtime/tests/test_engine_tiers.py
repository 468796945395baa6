"""Tiers in an engine: `--kv-cache-dtype tq-balanced` is all that is said, and layers get their own bits."""

import json
import shutil
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from turboquant_kernels.allocation import allocate
from turboquant_kernels.cli import app
from turboquant_kernels.formats import TIER_NAMES, Tier, base_format
from turboquant_kernels.plans import PLAN_KEY, KVPlan
from turboquant_kernels.tensors import Tensors

pytestmark = pytest.mark.engine

ARGUMENTS = {"max_model_len": 1024, "max_num_batched_tokens": 512, "kv_cache_memory_bytes": 64 << 20}
PROMPTS = [[3 + index * index * 7 % 113 for index in range(length)] for length in (300, 40)]


def plan(engine) -> KVPlan:
    return KVPlan.from_dict(engine.config.additional_config[PLAN_KEY])


@pytest.fixture(scope="module")
def biased(dummy_model) -> Path:
    """A model whose second layer has keys with a large bias."""
    return dummy_model("QWEN2", weights=0)


@pytest.fixture(scope="module")
def uneven(biased, tmp_path_factory) -> Path:
    """A model whose second layer has larger keys."""
    folder = shutil.copytree(biased, tmp_path_factory.mktemp("uneven"), dirs_exist_ok=True)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.self_attn.k_proj.weight"] *= 8
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_layers_with_larger_keys_get_more_bits_at_equal_bytes(start_engine, uneven) -> None:
    balanced = start_engine(uneven, "tq-balanced", **ARGUMENTS)
    bits = [layer.key_bits for layer in plan(balanced).layers]
    assert sum(bits) == 5 * len(bits)
    assert bits[1] == max(bits) > 5
    assert {layer.value_bits for layer in plan(balanced).layers} == {3}
    uniform = start_engine(uneven, "tq-k5v3", **ARGUMENTS)
    # Key means cost a byte a token, and a sequence of 8 blocks has 6 more, not 4: layers may have 3 bits.
    expected = uniform.capacity_tokens * 68 / 69 * (8 + 4) / (8 + 6)
    assert balanced.capacity_tokens == pytest.approx(expected, rel=0.01)
    pages = {name: tensor.shape[-1] for name, tensor in balanced.kv_tensors.items()}
    assert list(pages.values()) == [layer.token_bytes(64) for layer in plan(balanced).layers]


def test_a_tiers_plan_is_nearer_to_bf16_than_equal_bits(start_engine, biased) -> None:
    """Its key means take the bias away. With values at 8 bits: the answers of random weights hang on every
    value."""
    config = json.loads((biased / "config.json").read_text())
    dealt = allocate(Tier("dealt", 6, 8), Tensors.of_folder(biased), config)
    plain, equal, unequal = (
        start_engine(biased, "auto", **ARGUMENTS),
        start_engine(biased, "tq-k6v8", **ARGUMENTS),
        start_engine(biased, "tq-k6v8", additional_config={PLAN_KEY: dealt.to_dict()}, **ARGUMENTS),
    )
    expected = plain.prompt_logits(PROMPTS[0]).log_softmax(-1)

    def divergence(engine) -> float:
        found = engine.prompt_logits(PROMPTS[0]).log_softmax(-1)
        return float((expected.exp() * (expected - found)).sum(-1).mean())

    print(f"KL {divergence(unequal):.3f}, with equal bits {divergence(equal):.3f}")
    assert divergence(unequal) < 0.7 * divergence(equal)


@pytest.mark.parametrize("name", TIER_NAMES)
def test_every_tier_starts_and_answers(start_engine, biased, name: str) -> None:
    engine = start_engine(biased, name, **ARGUMENTS)
    fmt = base_format(name)
    layers = plan(engine).layers
    assert sum(layer.key_bits for layer in layers) == fmt.key_bits * len(layers)
    (output,) = engine.generate([PROMPTS[1]], max_tokens=4)
    assert len(output.outputs[0].token_ids) == 4


def test_a_plan_of_the_users_own_wins(start_engine, biased) -> None:
    layers = [{"key_bits": bits, "value_bits": 4} for bits in (8, 8, 4, 4)]
    own = {PLAN_KEY: {"version": 1, "layers": layers}}
    engine = start_engine(biased, "tq-balanced", additional_config=own, **ARGUMENTS)
    assert [layer.key_bits for layer in plan(engine).layers] == [8, 8, 4, 4]


def test_skipped_layers_take_no_bits_from_the_others(start_engine, biased) -> None:
    engine = start_engine(biased, "tq-balanced", kv_cache_dtype_skip_layers=["1"], **ARGUMENTS)
    bits = [layer.key_bits for layer in plan(engine).layers]
    assert bits[1] == 16
    assert sum(bits) - 16 == 5 * 3


@pytest.mark.parametrize(
    ("shape", "arguments", "reason"),
    [
        ("LLAMA", {"load_format": "dummy"}, "--load-format dummy reads no safetensors"),
        ("GEMMA3", {}, "share pages of one size"),
    ],
)
def test_where_bits_cannot_be_dealt_every_layer_has_the_mean(
    start_engine, dummy_model, monkeypatch, shape: str, arguments: dict, reason: str
) -> None:
    from turboquant_runtime.adapters import tiers

    warnings: list[str] = []
    monkeypatch.setattr(tiers.logger, "warning", lambda text, *values: warnings.append(text % values))
    model = dummy_model(shape, weights=None if arguments else 0)
    engine = start_engine(model, "tq-max-capacity", **ARGUMENTS, **arguments)
    assert {layer.name for layer in plan(engine).layers} == {"tq-k4v2"}
    assert {tensor.shape[-1] for tensor in engine.kv_tensors.values()} == {
        base_format("tq-max-capacity", "cpu").token_bytes(128)
    }
    assert any(reason in warning for warning in warnings)


def test_a_draft_model_may_have_another_cache(start_engine, biased) -> None:
    draft = {"method": "draft_model", "model": str(biased), "num_speculative_tokens": 2}
    engine = start_engine(
        biased, "tq-balanced", speculative_config=draft | {"kv_cache_dtype": "auto"}, **ARGUMENTS
    )
    (output,) = engine.generate([PROMPTS[1]], max_tokens=4)
    assert len(output.outputs[0].token_ids) == 4


def test_tq_allocate_prints_the_engines_plan(start_engine, biased) -> None:
    commands = entry_points(group="turboquant.commands")
    arguments = ["allocate", str(biased), "--tier", "max-capacity", "--device", "cpu", "--json"]
    printed = CliRunner().invoke(app(arguments, commands), arguments)
    expected = plan(start_engine(biased, "tq-max-capacity", **ARGUMENTS))
    assert KVPlan.from_dict(json.loads(printed.stdout)) == expected
