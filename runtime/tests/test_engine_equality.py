"""One value, whoever reads it: chunking, caching, load and preemption do not change an answer.

On pretrained weights in float32, with a sliding window short enough that the prompts are longer. What remains
is rounding: a sum taken in another order can move a coordinate over the border between two codes. So the log
probabilities may differ by `BOUND`, and tokens where the two best are further apart than that must be equal.
"""

import itertools

import pytest

pytestmark = pytest.mark.engine

BOUND = 0.05
MAX_TOKENS = 8


@pytest.fixture(scope="module")
def engine(start_engine, gemma):
    # 200 blocks of 16 tokens: the least that one request of the maximum length needs, so that sixteen short
    # ones do not all fit.
    return start_engine(
        gemma,
        "tq-k4v4",
        dtype="float32",
        hf_overrides={"sliding_window": 64},
        block_size=16,
        max_model_len=512,
        max_num_batched_tokens=512,
        num_gpu_blocks_override=200,
        kv_cache_memory_bytes=64 << 20,
    )


@pytest.fixture(scope="module")
def text(engine) -> list[int]:
    from models.texts import TEXTS

    return engine.llm.get_tokenizer()(TEXTS[0]).input_ids


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


def assert_same_answer(output, expected) -> None:
    steps = zip(output.outputs[0].logprobs, expected.outputs[0].logprobs, strict=True)
    for token, other, (step, reference) in zip(
        output.outputs[0].token_ids, expected.outputs[0].token_ids, steps, strict=True
    ):
        assert step[token].logprob == pytest.approx(reference[other].logprob, abs=BOUND)
        if token != other:
            best, second = sorted((p.logprob for p in reference.values()), reverse=True)[:2]
            assert best - second <= BOUND, f"{token} for {other}, which was ahead by {best - second:.3f}"
            return  # from here on the two continue different texts


def test_a_prefix_hit_answers_as_a_fresh_request(engine, text, lone) -> None:
    prompt = text[:190]
    expected = lone(prompt)
    engine.forget()
    engine.generate([text[:150]], max_tokens=1)
    (output,) = engine.generate([prompt], MAX_TOKENS, logprobs=2)
    assert output.num_cached_tokens == 144
    assert_same_answer(output, expected)


def test_a_chunked_prefill_answers_as_a_whole_one(engine, text, lone, monkeypatch) -> None:
    prompt = text[:190]
    expected = lone(prompt)
    engine.forget()
    monkeypatch.setattr(engine.scheduler.scheduler_config, "long_prefill_token_threshold", 50)
    schedule, chunks = engine.scheduler.schedule, []

    def record(*args):
        step = schedule(*args)
        chunks.append(step.total_num_scheduled_tokens)
        return step

    monkeypatch.setattr(engine.scheduler, "schedule", record)
    (output,) = engine.generate([prompt], MAX_TOKENS, logprobs=2)
    assert chunks[:4] == [50, 50, 50, 40]
    assert_same_answer(output, expected)


def test_a_batch_of_mixed_lengths_answers_as_lone_requests(engine, text, lone) -> None:
    prompts = [text[:190], text[100:200], text[30:67], text[:1]]
    expected = [lone(prompt) for prompt in prompts]
    engine.forget()
    for output, reference in zip(engine.generate(prompts, MAX_TOKENS, logprobs=2), expected, strict=True):
        assert_same_answer(output, reference)


def test_a_preempted_request_answers_as_an_undisturbed_one(engine, text, lone) -> None:
    # Each holds 2 blocks in each of the 6 groups of layers, 192 of the 199; the third token needs more.
    prompts = [text[start : start + 30] for start in range(0, 160, 10)]
    expected = [lone(prompt) for prompt in prompts]
    engine.forget()
    before = preemptions(engine)
    outputs = engine.generate(prompts, MAX_TOKENS, logprobs=2)
    assert preemptions(engine) > before
    for output, reference in zip(outputs, expected, strict=True):
        assert_same_answer(output, reference)


def preemptions(engine) -> int:
    return sum(m.value for m in engine.llm.get_metrics() if m.name == "vllm:num_preemptions")


def test_the_bound_tells_other_prompts_apart(text, lone) -> None:
    """The comparison above can fail: a prompt without its first token has another answer."""
    prompts = [text[:190], text[1:190]]
    for one, other in itertools.permutations(prompts, 2):
        with pytest.raises(AssertionError):
            assert_same_answer(lone(one), lone(other))
