"""What must hold for every model and every memory size."""

from dataclasses import replace

from hypothesis import assume, given
from hypothesis import strategies as st

from turboquant_kernels.formats import BF16, COMPRESSED_FORMATS, FP8
from turboquant_operator.api.spec import TurboQuantDeploymentSpec
from turboquant_operator.api.status import Plan
from turboquant_operator.planner import ModelFacts, make_plan
from turboquant_operator.planner.engine import EngineSettings
from turboquant_operator.planner.options import Choice, Option

CPU = EngineSettings(block_tokens=128, batched_tokens=2048, sequences=128)


@st.composite
def models(draw: st.DrawFn) -> ModelFacts:
    kv_heads = draw(st.sampled_from([1, 2, 4, 8, 16]))
    layers = draw(st.integers(1, 80))
    every = draw(st.sampled_from([1, 2, 4, 6]))
    window = draw(st.sampled_from([128, 512, 4096]))
    return ModelFacts(
        architecture="AnyForCausalLM",
        windows=tuple(None if (i + 1) % every == 0 else window for i in range(layers)),
        attention_heads=kv_heads * draw(st.sampled_from([1, 2, 4, 8])),
        key_value_heads=kv_heads,
        head_dim=draw(st.sampled_from([64, 80, 96, 128, 192, 256])),
        context_length=draw(st.integers(1, 262_144)),
        dtype="bfloat16",
        weight_bytes=draw(st.integers(10**8, 10**11)),
        key_bias=False,
        vocab_size=128_256,
    )


formats = st.sampled_from([BF16, FP8, *COMPRESSED_FORMATS])
memories = st.integers(0, 2**37)


def option(facts: ModelFacts, fmt, memory: int, tensor: int = 1) -> Option:
    return Option(Choice.uniform(fmt, facts), facts, CPU, facts.context_length, tensor, 1, memory)


@given(models(), formats, memories, memories)
def test_more_memory_never_holds_fewer_tokens(facts, fmt, one, other):
    less, more = sorted((one, other))
    assert option(facts, fmt, less).tokens <= option(facts, fmt, more).tokens


@given(models(), formats, memories, st.sampled_from([1, 2, 4]))
def test_more_gpus_never_hold_fewer_tokens_for_the_same_memory_on_each(facts, fmt, memory, tensor):
    assert option(facts, fmt, memory, tensor).tokens <= option(facts, fmt, memory, 2 * tensor).tokens


@given(models(), formats, memories)
def test_no_format_is_larger_than_the_models_own_dtype(facts, fmt, memory):
    assert option(facts, fmt, memory).tokens >= option(facts, BF16, memory).tokens


@given(models(), formats, memories)
def test_tokens_take_no_more_than_the_memory_where_all_attention_is_full(facts, fmt, memory):
    full = replace(facts, windows=(None,) * facts.layers)
    found = option(full, fmt, memory)
    assert found.tokens * found.bytes_per_token <= memory


@given(models(), formats, memories)
def test_sequences_that_fit_are_within_the_tokens(facts, fmt, memory):
    found = option(facts, fmt, memory)
    assert found.sequences * facts.context_length <= found.tokens


@given(models(), st.integers(1, 64), st.sampled_from(["near-lossless", "balanced", "max-capacity"]))
def test_a_plan_keeps_its_promise(facts, wanted, quality):
    spec = TurboQuantDeploymentSpec.model_validate(
        {
            "model": {"uri": "hf://any/model"},
            "accelerator": {"type": "nvidia-h100-80gb"},
            "capacity": {"concurrentSequences": wanted},
            "kvCache": {"quality": quality},
        }
    )
    plan = make_plan(spec, facts)
    assume(isinstance(plan, Plan))
    assert plan.predicted_tokens >= wanted * plan.context_length
    assert facts.attention_heads % plan.tensor_parallel_size == 0
    # Whatever has fewer GPUs, or the same and better quality, does not fit.
    assert not any(
        other.fits and other.tensor_parallel_size < plan.tensor_parallel_size for other in plan.alternatives
    )
