"""One value, whoever reads it, on a GPU: chunking, caching, load, preemption and graphs change no answer.

As `test_engine_equality` on the CPU, under both of vLLM's model runners.
"""

import os
from collections.abc import Iterator
from functools import partial

import pytest
from answers import assert_same_answers

pytestmark = pytest.mark.gpu

ROUNDING, FLIP, MAX_TOKENS = 0.1, 1.0, 16
same_answers = partial(assert_same_answers, rounding=ROUNDING, flip=FLIP)


@pytest.fixture(scope="module", params=["v2", "v1"])
def engine(request, start_on_gpu, dummy_model) -> Iterator:
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = str(int(request.param == "v2"))
    engine = start_on_gpu(dummy_model("LLAMA", weights=0), "tq-k4v4", num_gpu_blocks_override=70)
    assert engine.config.use_v2_model_runner == (request.param == "v2")
    yield engine
    del os.environ["VLLM_USE_V2_MODEL_RUNNER"]


@pytest.fixture(scope="module")
def lone(engine):
    """The answer to a fresh request that is alone in the engine."""
    answers: dict[tuple[int, ...], object] = {}

    def lone(prompt: list[int]):
        if tuple(prompt) not in answers:
            engine.forget()
            answers[tuple(prompt)] = engine.generate([prompt], MAX_TOKENS, logprobs=2)[0]
        return answers[tuple(prompt)]

    return lone


def test_a_prefix_hit_answers_as_a_fresh_request(engine, tokens, lone) -> None:
    prompt = tokens(300)
    expected = lone(prompt)
    engine.forget()
    engine.generate([prompt[:200]], max_tokens=1)
    (output,) = engine.generate([prompt], MAX_TOKENS, logprobs=2)
    assert output.num_cached_tokens == 192
    same_answers([output], [expected])


def test_a_chunked_prefill_answers_as_a_whole_one(engine, tokens, lone, monkeypatch) -> None:
    prompt = tokens(300)
    expected = lone(prompt)
    engine.forget()
    monkeypatch.setattr(engine.scheduler, "max_num_scheduled_tokens", 70)
    (output,) = engine.generate([prompt], MAX_TOKENS, logprobs=2)
    same_answers([output], [expected])


def test_a_batch_of_mixed_lengths_answers_as_lone_requests(engine, tokens, lone) -> None:
    prompts = [tokens(length, seed) for seed, length in enumerate((300, 100, 37, 1, 16, 17))]
    expected = [lone(prompt) for prompt in prompts]
    engine.forget()
    same_answers(engine.generate(prompts, MAX_TOKENS, logprobs=2), expected)


def test_a_preempted_request_answers_as_an_undisturbed_one(engine, tokens, lone) -> None:
    # Each holds 9 blocks and begins a tenth while it answers. Seven fit in 69 blocks, but not with ten each.
    prompts = [tokens(140, seed) for seed in range(8)]
    expected = [lone(prompt) for prompt in prompts]
    engine.forget()
    before = preemptions(engine)
    outputs = engine.generate(prompts, MAX_TOKENS, logprobs=2)
    assert preemptions(engine) > before
    same_answers(outputs, expected)


def preemptions(engine) -> int:
    return sum(m.value for m in engine.llm.get_metrics() if m.name == "vllm:num_preemptions")


def test_a_cancelled_request_leaves_the_others_alone(engine, tokens, lone) -> None:
    prompts = [tokens(140, seed) for seed in range(3)]
    expected = [lone(prompt) for prompt in prompts]
    engine.forget()
    finished = engine.generate_and_cancel(prompts, MAX_TOKENS, cancelled=1, after_steps=5, logprobs=2)
    same_answers(finished, [expected[0], expected[2]])
    # Its blocks are free again, and whoever gets them reads their own tokens.
    same_answers(engine.generate(prompts, MAX_TOKENS, logprobs=2), expected)


@pytest.mark.parametrize("missing", [1, 150, 290])
def test_the_comparison_shows_one_token_that_is_not_read(tokens, lone, missing: int) -> None:
    """The comparison above can fail: with one token of the prompt left out it does."""
    prompt = tokens(300)
    with pytest.raises(AssertionError):
        same_answers([lone(prompt[:missing] + prompt[missing + 1 :])], [lone(prompt)])


def test_an_eager_engine_answers_as_captured_graphs_do(
    engine, start_on_gpu, dummy_model, tokens, lone
) -> None:
    eager = start_on_gpu(
        dummy_model("LLAMA", weights=0), "tq-k4v4", enforce_eager=True, compilation_config=None
    )
    prompts = [tokens(length, length) for length in (5, 120, 260)]
    same_answers(eager.generate(prompts, MAX_TOKENS, logprobs=2), [lone(prompt) for prompt in prompts])
