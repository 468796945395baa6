"""From the user's words to a KV plan, or to a refusal in one line that names a way out."""

from types import SimpleNamespace

import pytest

from turboquant_kernels.formats import KVFormat
from turboquant_kernels.plans import KVPlan
from turboquant_runtime.configuration import (
    EngineFacts,
    RefusedConfiguration,
    attention_layers,
    check_servable,
    requested_plan,
)

K5V3 = {"key_bits": 5, "value_bits": 3}
BF16 = {"key_bits": 16, "value_bits": 16, "encoding": "plain"}


def document(*layers: dict, **fields: object) -> dict:
    return {"turboquant": {"version": 1, "seed": 7, "layers": list(layers)} | fields}


def test_a_format_name_is_a_uniform_plan() -> None:
    assert requested_plan("tq-k4v4", {}, 3, "cpu") == KVPlan.uniform(KVFormat(4, 4), 3)


def test_other_cache_dtypes_are_not_ours() -> None:
    assert requested_plan("auto", {}, 3, "cpu") is None
    assert requested_plan("fp8", {"another_plugin": {}}, 3, "cpu") is None


def test_a_plan_overrides_the_format_and_sets_the_seed() -> None:
    plan = requested_plan("tq-k4v4", document(K5V3, BF16), 2, "cpu")
    assert plan is not None
    assert plan.layers[0] == KVFormat(5, 3)
    assert plan.seed == 7


@pytest.mark.parametrize(
    ("cache_dtype", "additional_config", "says"),
    [
        ("auto", document(K5V3), "add --kv-cache-dtype tq-balanced"),
        ("tq-k4v4", document(K5V3), "1 layers, but the model has 2 attention layers"),
        ("tq-k4v4", document(K5V3, {"key_bits": 7, "value_bits": 4}), "layers[1]: key_bits 7"),
        ("tq-k4v4", document(K5V3, K5V3, version=2), "version is 2"),
        ("tq-k4v4", document(BF16, BF16), "no layer is compressed"),
        ("tq-k4v4", {"turboquant": "plan.json"}, "not an object"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused(cache_dtype: str, additional_config: dict, says: str) -> None:
    with pytest.raises(RefusedConfiguration) as refusal:
        requested_plan(cache_dtype, additional_config, 2, "cpu")
    assert says in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_every_format_can_be_served_on_the_cpu(facts: SimpleNamespace) -> None:
    check_servable(KVPlan.uniform(KVFormat(4, 4), 4), EngineFacts(**vars(facts)))


@pytest.mark.parametrize(
    ("fact", "value", "says"),
    [
        ("device", "rocm", "not on rocm"),
        ("mla", True, "MLA"),
        ("encoder_decoder", True, "encoder-decoder"),
        ("hybrid", True, "served on GPUs only"),
        ("chunked_local_attention", True, "chunked local attention"),
        ("kv_connector", "OffloadingConnector", "OffloadingConnector"),
        ("bidirectional_modalities", ("image",), """--limit-mm-per-prompt '{"image": 0}'"""),
        ("bidirectional_modalities", ("video",), """--limit-mm-per-prompt '{"video": 0}'"""),
        ("bidirectional_modalities", ("image", "video"), """'{"image": 0, "video": 0}'"""),
        ("reference_window", True, "R-SWA"),
        ("adaptive_verification", True, "adaptive verification"),
        ("fast_prefill", True, "--kv-sharing-fast-prefill"),
        ("block_size", 64, "multiple of 128"),
        ("draft_tokens", 40, "at most 30 can be: lower num_speculative_tokens"),
        ("head_dim", 72, "head_dim 72"),
        ("draft_head_dim", 72, "the draft model's head_dim 72"),
    ],
)
def test_what_cannot_be_served_is_refused(
    facts: SimpleNamespace, fact: str, value: object, says: str
) -> None:
    setattr(facts, fact, value)
    with pytest.raises(RefusedConfiguration) as refusal:
        check_servable(KVPlan.uniform(KVFormat(4, 4), 4), EngineFacts(**vars(facts)))
    assert says in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("fact", "value", "says"),
    [
        ("compute_capability", (7, 5), "this one has 7.5"),
        ("dtype", "float32", "add --dtype bfloat16"),
        ("mla", True, "MLA"),
        ("context_parallel", True, "context parallelism"),
        ("dual_batch", True, "dual batch overlap"),
        ("kv_connector", "NixlConnector", "NixlConnector"),
    ],
)
def test_what_cannot_be_served_on_a_gpu_is_refused(
    facts: SimpleNamespace, fact: str, value: object, says: str
) -> None:
    vars(facts).update({"device": "cuda", "compute_capability": (9, 0), fact: value})
    with pytest.raises(RefusedConfiguration) as refusal:
        check_servable(KVPlan.uniform(KVFormat(4, 4), 4), EngineFacts(**vars(facts)))
    assert says in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(("fact", "value"), [("hybrid", True), ("kv_connector", "OffloadingConnector")])
def test_a_gpu_serves_more_than_a_cpu(facts: SimpleNamespace, fact: str, value: object) -> None:
    vars(facts).update({"device": "cuda", "compute_capability": (9, 0), fact: value})
    check_servable(KVPlan.uniform(KVFormat(4, 4), 4), EngineFacts(**vars(facts)))


def test_anchors_are_refused_on_gpus_until_they_exist_there(facts: SimpleNamespace) -> None:
    facts.num_layers = 2
    plan = KVPlan((KVFormat(4, 4), KVFormat(4, 4, anchor=True)))
    check_servable(plan, EngineFacts(**vars(facts)))
    vars(facts).update(device="cuda", compute_capability=(9, 0))
    with pytest.raises(RefusedConfiguration, match=r"layers\[1\] has an anchor"):
        check_servable(plan, EngineFacts(**vars(facts)))


def test_fp8_layers_beside_compressed_ones_are_refused(facts: SimpleNamespace) -> None:
    plan = KVPlan((KVFormat(4, 4), KVFormat.parse("fp8")))
    with pytest.raises(RefusedConfiguration, match=r"layers\[1\] is fp8"):
        check_servable(plan, EngineFacts(**vars(facts)))


@pytest.mark.parametrize(
    ("layer_types", "expected"),
    [
        (None, (0, 1, 2)),
        (["linear_attention", "full_attention", "sliding_attention"], (1, 2)),
        (["mamba", "attention", "mlp"], (1,)),
        (["hybrid", "hybrid", "hybrid"], (0, 1, 2)),
    ],
)
def test_a_plan_is_for_the_layers_with_attention(layer_types, expected) -> None:
    assert attention_layers(3, layer_types) == expected
