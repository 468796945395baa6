"""Key bits by layer: how they are dealt, and what is read of a model's weights."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from turboquant_kernels.allocation import AllocationError, allocate, deal, sensitivities
from turboquant_kernels.checkpoint import CheckpointError
from turboquant_kernels.codebook import codebook
from turboquant_kernels.formats import BF16, BLOCK_TOKENS, KEY_BITS, TIERS, KVFormat
from turboquant_kernels.tensors import Tensors

HIDDEN, HEADS, KV_HEADS, HEAD_DIM = 32, 4, 2, 64
CONFIG = {
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "num_hidden_layers": 12,
}


def weights(layers: int = 4, prefix: str = "model.") -> dict[str, torch.Tensor]:
    """A model's attention, whose later layers have larger keys."""
    torch.manual_seed(0)
    tensors = {}
    for layer in range(layers):
        name = f"{prefix}layers.{layer}."
        tensors[f"{name}input_layernorm.weight"] = torch.rand(HIDDEN) + 0.5
        tensors[f"{name}self_attn.q_proj.weight"] = torch.randn(HEADS * HEAD_DIM, HIDDEN)
        tensors[f"{name}self_attn.k_proj.weight"] = torch.randn(KV_HEADS * HEAD_DIM, HIDDEN) * (1 + layer)
    return tensors


def read(folder: Path, tensors: dict[str, torch.Tensor], *, anchor: bool = False, **config) -> list[float]:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return sensitivities(Tensors.of_folder(folder), CONFIG | config, anchor=anchor)


def relative(values: list[float]) -> list[float]:
    return [value / values[0] for value in values]


class TestDeal:
    @given(
        st.lists(st.floats(1e-3, 1e9), min_size=1, max_size=40),
        st.sampled_from([3, 4, 5, 6]),
    )
    def test_the_mean_is_kept(self, sensitivities, mean_bits):
        bits = deal(sensitivities, mean_bits, 128)
        assert set(bits) <= set(KEY_BITS)
        total = mean_bits * len(bits)
        # One bit may be left where a layer could only take two.
        assert total - 1 <= sum(bits) <= total

    @given(st.lists(st.floats(1e-3, 1e9), min_size=2, max_size=20, unique=True))
    def test_larger_keys_never_get_fewer_bits(self, sensitivities):
        bits = deal(sorted(sensitivities), 5, 128)
        assert bits == sorted(bits)

    def test_equal_layers_get_equal_bits(self):
        assert deal([7.0] * 12, 5, 128) == [5] * 12

    def test_of_equal_layers_the_first_gets_the_odd_bit(self):
        assert deal([1.0, 1.0, 1e-9], 3, 128) == [4, 3, 2]

    def test_eight_bits_are_eight_everywhere(self):
        assert deal([1.0, 1e9], 8, 128) == [8, 8]

    def test_it_leaves_less_noise_than_the_mean_in_every_layer(self):
        sensitivities = [1e4, 50.0, 1.0, 2.0, 3.0, 1.5]

        def noise(bits: list[int]) -> float:
            pairs = zip(sensitivities, bits, strict=True)
            return sum(s * codebook(b, 128).distortion for s, b in pairs)

        assert noise(deal(sensitivities, 4, 128)) < noise([4] * 6) / 10


class TestSensitivities:
    def test_they_are_those_of_the_formula(self, tmp_path):
        tensors = weights()
        bias = torch.randn(KV_HEADS * HEAD_DIM) * 30
        tensors["model.layers.1.self_attn.k_proj.bias"] = bias
        expected = []
        for layer in range(4):
            name = f"model.layers.{layer}."
            gains = tensors[f"{name}input_layernorm.weight"]
            query = (tensors[f"{name}self_attn.q_proj.weight"] * gains).square().sum()
            key = (tensors[f"{name}self_attn.k_proj.weight"] * gains).square().sum()
            expected.append(float(query * (key + bias.square().sum() * (layer == 1))))
        assert read(tmp_path, tensors) == pytest.approx(expected)

    def test_a_forward_pass_over_random_inputs_agrees(self, tmp_path):
        tensors = weights()
        inputs = torch.nn.functional.normalize(torch.randn(4096, HIDDEN), dim=1) * HIDDEN**0.5
        measured = []
        for layer in range(4):
            name = f"model.layers.{layer}."
            normed = inputs * tensors[f"{name}input_layernorm.weight"]
            energies = [
                (normed @ tensors[f"{name}self_attn.{which}_proj.weight"].T).square().sum(1).mean()
                for which in "qk"
            ]
            measured.append(float(energies[0] * energies[1]))
        assert read(tmp_path, tensors) == pytest.approx(measured, rel=0.05)

    def test_norms_of_queries_and_keys_take_the_weights_place(self, tmp_path):
        tensors = weights()
        gains = {}
        for layer in range(4):
            for which in "qk":
                gains[layer, which] = torch.rand(HEAD_DIM)
                tensors[f"model.layers.{layer}.self_attn.{which}_norm.weight"] = gains[layer, which]
        expected = [
            float(gains[layer, "q"].square().sum() * gains[layer, "k"].square().sum()) for layer in range(4)
        ]
        assert read(tmp_path, tensors) == pytest.approx(expected)

    def test_gains_around_zero_are_those_of_gemma(self, tmp_path):
        tensors = weights()
        centered = {name: t - 1 if "norm" in name else t for name, t in tensors.items()}
        (tmp_path / "a").mkdir()
        expected = read(tmp_path / "a", tensors)
        assert read(tmp_path, centered, model_type="gemma") == pytest.approx(expected)

    def test_fused_projections_are_split(self, tmp_path):
        tensors = weights()
        (tmp_path / "a").mkdir()
        expected = read(tmp_path / "a", tensors)
        for layer in range(4):
            name = f"model.layers.{layer}.self_attn."
            parts = [tensors.pop(f"{name}{which}_proj.weight") for which in "qk"]
            values = torch.full_like(parts[1], 1e6)
            tensors[f"{name}qkv_proj.weight"] = torch.cat([*parts, values])
        assert read(tmp_path, tensors) == pytest.approx(expected)

    @pytest.mark.parametrize("scale", ["tensor", "row", "block"])
    def test_weights_with_scales(self, tmp_path, scale):
        tensors = weights()
        (tmp_path / "a").mkdir()
        expected = read(tmp_path / "a", tensors)
        for name in [name for name in tensors if name.endswith("k_proj.weight")]:
            rows, columns = tensors[name].shape
            factor = {
                "tensor": torch.tensor([4.0]),
                "row": torch.rand(rows, 1) + 0.5,
                "block": torch.rand(rows // 32, columns // 16) + 0.5,
            }[scale]
            spread = factor
            if scale == "block":
                spread = factor.repeat_interleave(32, 0).repeat_interleave(16, 1)
            tensors[name] = (tensors[name] / spread).to(torch.float8_e4m3fn)
            suffix = "weight_scale_inv" if scale == "block" else "weight_scale"
            tensors[name.replace("weight", suffix)] = factor
        assert read(tmp_path, tensors) == pytest.approx(expected, rel=0.02)

    def test_the_language_model_is_found_beside_a_vision_tower(self, tmp_path):
        text = weights(prefix="model.language_model.")
        vision = {
            name.replace("language_model", "vision_tower.encoder"): tensor * 100
            for name, tensor in weights(layers=6, prefix="model.language_model.").items()
        }
        (tmp_path / "a").mkdir()
        assert read(tmp_path, text | vision) == pytest.approx(read(tmp_path / "a", weights()))

    def test_layers_are_in_the_models_order(self, tmp_path):
        found = read(tmp_path, weights(layers=12))
        assert found == sorted(found)

    def test_weights_without_known_names_are_refused(self, tmp_path):
        with pytest.raises(AllocationError, match="no tensors named"):
            read(tmp_path, {"transformer.h.0.attn.c_attn.weight": torch.ones(3, 3)})

    def test_the_bias_of_the_norm_before_makes_one_of_keys(self, tmp_path):
        tensors = weights()
        constant = torch.randn(HIDDEN) * 20
        tensors["model.layers.0.input_layernorm.bias"] = constant
        (tmp_path / "a").mkdir()
        plain = read(tmp_path / "a", weights())
        gains = tensors["model.layers.0.input_layernorm.weight"]
        energies = [
            float((w * gains).square().sum() + (w @ constant).square().sum())
            for w in (tensors[f"model.layers.0.self_attn.{which}_proj.weight"] for which in "qk")
        ]
        assert read(tmp_path, tensors) == pytest.approx([energies[0] * energies[1], *plain[1:]])

    @pytest.mark.parametrize("names", [("query_layernorm", "key_layernorm"), ("q_layernorm", "k_layernorm")])
    def test_norms_of_queries_and_keys_by_other_names(self, tmp_path, names):
        tensors = weights()
        for layer in range(4):
            for name in names:
                tensors[f"model.layers.{layer}.self_attn.{name}.weight"] = torch.full(
                    (HEAD_DIM,), 1.0 + layer
                )
        assert read(tmp_path, tensors) == pytest.approx([(HEAD_DIM * (1 + n) ** 2) ** 2 for n in range(4)])

    def test_layers_without_a_norm_that_is_known_are_refused(self, tmp_path):
        tensors = {name: t for name, t in weights().items() if "layernorm" not in name}
        with pytest.raises(AllocationError, match=r"no tensor named model\.layers\.0\.input_layernorm"):
            read(tmp_path, tensors)
        assert read(tmp_path, tensors, model_type="olmo")

    def test_a_layer_behind_the_last_is_left_out(self, tmp_path):
        assert len(read(tmp_path, weights(layers=5), num_hidden_layers=4)) == 4

    def test_packed_weights_of_an_unknown_kind_are_refused(self, tmp_path):
        tensors = weights()
        tensors["model.layers.0.self_attn.q_proj.weight"] = torch.ones(8, 8, dtype=torch.uint8)
        with pytest.raises(AllocationError, match=r"q_proj .* not known"):
            read(tmp_path, tensors)


class TestAnchors:
    @pytest.mark.parametrize(
        "config",
        [
            {},
            {"rope_theta": 1e6},
            {"rope_parameters": {"rope_theta": 500.0, "rope_type": "default"}},
            {"rope_scaling": {"type": "linear", "factor": 4.0}},
            {"model_type": "glm4", "partial_rotary_factor": 0.5},
        ],
        ids=["default", "theta", "nested", "linear", "glm"],
    )
    def test_of_a_bias_what_turns_within_a_block_counts(self, tmp_path, config):
        """Against the keys of a whole block, turned by the rotary embeddings of transformers."""
        tensors, name = weights(1), "model.layers.0.self_attn.k_proj"
        torch.manual_seed(1)
        bias = torch.randn(KV_HEADS, HEAD_DIM) * 100
        (plain,) = read(tmp_path, tensors, anchor=True, **config)
        (found,) = read(tmp_path, tensors | {f"{name}.bias": bias.flatten()}, anchor=True, **config)

        scaling = config.get("rope_scaling", {}).get("factor", 1.0)
        theta = config.get("rope_theta") or config.get("rope_parameters", {}).get("rope_theta", 1e4)
        turning = int(HEAD_DIM * config.get("partial_rotary_factor", 1))
        angle = torch.arange(640, 640 + BLOCK_TOKENS)[:, None] / scaling
        angle = angle * theta ** -(torch.arange(0, turning, 2) / turning)
        x = bias[:, :turning]
        pairs = x.unflatten(-1, (-1, 2)) if "model_type" in config else x.unflatten(-1, (2, -1)).mT
        first, second = pairs[:, None].unbind(-1)
        turned = torch.stack(
            (first * angle.cos() - second * angle.sin(), first * angle.sin() + second * angle.cos())
        )
        moved = (turned - turned.mean(2, keepdim=True)).square().sum((0, 3)).mean(1).sum()
        queries = (tensors["model.layers.0.self_attn.q_proj.weight"] * gains(tensors)).square().sum()
        assert (found - plain) / queries == pytest.approx(float(moved), rel=1e-3)

    def test_layers_have_fewer_bits_only_to_a_point(self):
        assert min(deal([1e12, 1e12, 1.0, 1.0], 5, 128, 3)) == 3
        assert TIERS["balanced"].lowest == KVFormat(3, 3, anchor=True)
        assert TIERS["max-capacity"].lowest == KVFormat(2, 2, anchor=True)

    def test_a_tier_on_a_gpu_has_none(self, tmp_path):
        read(tmp_path, weights())
        for device, anchor in (("cpu", True), ("cuda", False)):
            plan = allocate(TIERS["balanced"].on(device), Tensors.of_folder(tmp_path), CONFIG)
            assert {layer.anchor for layer in plan.layers} == {anchor}


def gains(tensors):
    return tensors["model.layers.0.input_layernorm.weight"]


class TestAllocate:
    def test_a_tiers_plan(self, tmp_path):
        read(tmp_path, weights())
        plan = allocate(TIERS["balanced"], Tensors.of_folder(tmp_path), CONFIG)
        assert [layer.value_bits for layer in plan.layers] == [3] * 4
        bits = [layer.key_bits for layer in plan.layers]
        assert bits == sorted(bits)
        assert sum(bits) == 20

    def test_skipped_layers_keep_their_dtype_and_the_others_the_mean(self, tmp_path):
        read(tmp_path, weights())
        plan = allocate(TIERS["max-capacity"], Tensors.of_folder(tmp_path), CONFIG, skip=[3])
        assert plan.layers[3] == BF16
        assert sum(layer.key_bits for layer in plan.layers[:3]) == 12
        assert all(isinstance(layer, KVFormat) and layer.value_bits == 2 for layer in plan.layers[:3])

    @pytest.mark.parametrize(
        "config",
        [
            {"layer_types": ["full_attention", "sliding_attention"]},
            {"model_type": "gemma2"},
            {"model_type": "gemma3_text"},
        ],
    )
    def test_layers_that_share_pages_of_one_size_are_refused(self, tmp_path, config):
        read(tmp_path, weights())
        with pytest.raises(AllocationError, match="pages of one size"):
            allocate(TIERS["balanced"], Tensors.of_folder(tmp_path), CONFIG | config)

    @pytest.mark.parametrize(
        "nested",
        [
            {"text_config": CONFIG},
            {"llm_config": CONFIG},
            {"thinker_config": {"text_config": CONFIG}},
        ],
    )
    def test_the_text_models_config_counts(self, tmp_path, nested):
        read(tmp_path, weights())
        tensors = Tensors.of_folder(tmp_path)
        tier = TIERS["balanced"]
        assert allocate(tier, tensors, nested) == allocate(tier, tensors, CONFIG)

    @pytest.mark.parametrize("field", ["num_attention_heads", "num_hidden_layers"])
    @pytest.mark.parametrize("value", [None, "absent"])
    def test_a_config_that_does_not_say_is_one_line(self, tmp_path, field, value):
        read(tmp_path, weights())
        config = CONFIG | {field: value, "head_dim": None}
        if value == "absent":
            del config[field]
        with pytest.raises(AllocationError, match=r"config\.json"):
            allocate(TIERS["balanced"], Tensors.of_folder(tmp_path), config)

    @pytest.mark.parametrize("field", [{"mamba_d_state": 64}, {"full_attention_interval": 4}])
    def test_hybrids_are_refused(self, tmp_path, field):
        read(tmp_path, weights())
        with pytest.raises(AllocationError, match="windows or states"):
            allocate(TIERS["balanced"], Tensors.of_folder(tmp_path), CONFIG | field)

    @pytest.mark.parametrize(
        ("skip", "says"), [([4], "has layers 0 to 3"), (range(4), "all layers are skipped")]
    )
    def test_skips_that_leave_no_plan(self, tmp_path, skip, says):
        read(tmp_path, weights())
        with pytest.raises(AllocationError, match=says):
            allocate(TIERS["balanced"], Tensors.of_folder(tmp_path), CONFIG, skip)

    @pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
    def test_weights_that_say_nothing_are_refused(self, tmp_path, value):
        tensors = weights()
        tensors["model.layers.1.self_attn.k_proj.weight"].fill_(value)
        read(tmp_path, tensors)
        with pytest.raises(AllocationError, match="zero or no numbers"):
            allocate(TIERS["balanced"], Tensors.of_folder(tmp_path), CONFIG)


class TestTensors:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int8])
    def test_a_tensor_is_read_as_it_was_written(self, tmp_path, dtype):
        written = (torch.randn(5, 7) * 10).to(dtype)
        save_file({"a": torch.ones(3), "b": written}, tmp_path / "model.safetensors")
        tensors = Tensors.of_folder(tmp_path)
        assert list(tensors) == ["a", "b"]
        assert torch.equal(tensors.read("b"), written)

    def test_tensors_of_several_files(self, tmp_path):
        save_file({"a": torch.ones(3)}, tmp_path / "model-00001-of-00002.safetensors")
        save_file({"b": torch.zeros(2)}, tmp_path / "model-00002-of-00002.safetensors")
        tensors = Tensors.of_folder(tmp_path)
        assert torch.equal(tensors.read("b"), torch.zeros(2))
        assert "c" not in tensors

    def test_the_index_says_which_files_count(self, tmp_path):
        save_file({"a": torch.ones(3)}, tmp_path / "model-00001-of-00001.safetensors")
        save_file({"a": torch.zeros(3)}, tmp_path / "model.safetensors")
        (tmp_path / "optimizer.safetensors").write_bytes(b"no")
        index = {"weight_map": {"a": "model-00001-of-00001.safetensors"}}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
        assert torch.equal(Tensors.of_folder(tmp_path).read("a"), torch.ones(3))
        (tmp_path / "model.safetensors.index.json").write_text("[]")
        with pytest.raises(CheckpointError, match="names no files"):
            Tensors.of_folder(tmp_path)

    def test_an_incomplete_file_and_an_unknown_dtype_are_named(self, tmp_path):
        path = tmp_path / "model.safetensors"
        save_file({"a": torch.ones(100)}, path)
        whole = path.read_bytes()
        path.write_bytes(whole[:-8])
        with pytest.raises(CheckpointError, match="ends within a: the copy is incomplete"):
            Tensors.of_folder(tmp_path).read("a")
        path.write_bytes(whole.replace(b'"F32"', b'"F99"'))
        with pytest.raises(CheckpointError, match="a is in F99, which is not read"):
            Tensors.of_folder(tmp_path).read("a")

    @pytest.mark.parametrize(
        "content",
        [b"", b"12345678", b"\xff" * 64, b"\x02" + bytes(7) + b"[]", b"\x07" + bytes(7) + b'{"a":1}'],
    )
    def test_a_file_that_is_none_is_refused(self, tmp_path, content):
        (tmp_path / "model.safetensors").write_bytes(content)
        with pytest.raises(CheckpointError, match=r"model.safetensors is not a safetensors file"):
            Tensors.of_folder(tmp_path)
