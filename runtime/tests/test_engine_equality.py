"""What a query reads follows from positions: chunking, caching, load and preemption do not change an answer.

On two layers of a pretrained model in float32, one with a sliding window shorter than the prompts and one
without. What remains is rounding: a sum taken in another order. Almost always it stays rounding (1e-5 nats);
now and then it moves a coordinate over the border between two codes, which shows as up to 0.05. Changing the
embeddings by one part in ten million, without any change of load, does the same. Through a whole model that
does not stay rare, since layers after the first flip see other vectors and more codes change: by one part in
a million in the embeddings all 18 layers of this model move by up to 0.17, at 8 bits. Hence two layers.
"""

from functools import partial
from pathlib import Path

import pytest
from answers import assert_same_answers

pytestmark = pytest.mark.engine

ROUNDING = 1e-3
"""Nats, for the median over the tokens of a test."""

FLIP = 0.1
"""Nats, for each token. Tokens where the two best are further apart must be equal."""

same_answers = partial(assert_same_answers, rounding=ROUNDING, flip=FLIP)

BLOCKS = 38
"""The null block and room for two sequences of one block of tokens, which have 8 more for their raw block in
each of the two layers, and for one block beyond that."""

MAX_TOKENS = 8

ARGUMENTS = {
    "dtype": "float32",
    "max_model_len": 512,
    "max_num_batched_tokens": 512,
    "kv_cache_memory_bytes": 64 << 20,
}


def write_layers(gemma: Path, folder: Path, *kinds: str) -> Path:
    """Gemma-3-270m with its first layer of each of these kinds alone."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(gemma, dtype=torch.bfloat16)
    layer_types = model.config.layer_types
    chosen = [layer_types.index(kind) for kind in kinds]
    model.model.layers = torch.nn.ModuleList(model.model.layers[index] for index in chosen)
    model.config.layer_types = list(kinds)
    model.config.num_hidden_layers = len(kinds)
    model.config.sliding_window = 64
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gemma).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def two_layers(gemma, tmp_path_factory) -> Path:
    """A sliding-window layer and one with full attention."""
    folder = tmp_path_factory.mktemp("two-layers")
    return write_layers(gemma, folder, "sliding_attention", "full_attention")


@pytest.fixture(scope="module")
def engine(start_engine, two_layers):
    return start_engine(two_layers, "tq-k4v4", num_gpu_blocks_override=BLOCKS, **ARGUMENTS)


@pytest.fixture(scope="module")
def text(engine) -> list[int]:
    from models.texts import TEXTS

    return engine.llm.get_tokenizer()("\n".join(TEXTS)).input_ids


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


def test_a_prefix_hit_answers_as_a_fresh_request(engine, text, lone) -> None:
    prompt = text[:390]
    expected = lone(prompt)
    engine.forget()
    engine.generate([text[:300]], max_tokens=1)
    (output,) = engine.generate([prompt], MAX_TOKENS, logprobs=2)
    assert output.num_cached_tokens == 256
    same_answers([output], [expected])


@pytest.mark.parametrize(
    ("size", "expected_chunks"), [(100, [100, 100, 100, 90]), (128, [128, 128, 128, 6]), (255, [255, 135])]
)
def test_a_chunked_prefill_answers_as_a_whole_one(
    engine, text, lone, monkeypatch, size: int, expected_chunks: list[int]
) -> None:
    prompt = text[:390]
    expected = lone(prompt)
    engine.forget()
    monkeypatch.setattr(engine.scheduler, "max_num_scheduled_tokens", size)
    schedule, chunks = engine.scheduler.schedule, []

    def record(*args):
        step = schedule(*args)
        chunks.append(step.total_num_scheduled_tokens)
        return step

    monkeypatch.setattr(engine.scheduler, "schedule", record)
    (output,) = engine.generate([prompt], MAX_TOKENS, logprobs=2)
    assert chunks[: len(expected_chunks)] == expected_chunks
    same_answers([output], [expected])


def test_a_batch_of_mixed_lengths_answers_as_lone_requests(engine, text, lone) -> None:
    prompts = [text[:390], text[100:300], text[30:158], text[30:67], text[:1]]
    expected = [lone(prompt) for prompt in prompts]
    engine.forget()
    same_answers(engine.generate(prompts, MAX_TOKENS, logprobs=2), expected)


def test_a_preempted_request_answers_as_an_undisturbed_one(engine, text, lone) -> None:
    # Two fit at a time, until their third token needs a second block.
    prompts = [text[start : start + 126] for start in range(0, 80, 20)]
    expected = [lone(prompt) for prompt in prompts]
    engine.forget()
    before = preemptions(engine)
    outputs = engine.generate(prompts, MAX_TOKENS, logprobs=2)
    assert preemptions(engine) > before
    same_answers(outputs, expected)


def test_blocks_of_raw_tokens_go_back_and_are_never_shared(engine, text) -> None:
    manager = engine.scheduler.kv_cache_manager
    engine.forget()
    free = manager.block_pool.get_num_free_blocks()
    schedule, held = engine.scheduler.schedule, []

    def record(*args):
        step = schedule(*args)
        for single in manager.coordinator.single_type_managers:
            for blocks in single.req_to_blocks.values():
                raw = blocks[-8:]
                assert all(block.ref_cnt == 1 and block.block_hash is None for block in raw)
                held.append(len(blocks))
        return step

    engine.scheduler.schedule = record
    try:
        engine.generate([text[:130], text[:130], text[:250]], max_tokens=10)
    finally:
        del engine.scheduler.schedule
    assert max(held) == 3 + 8
    assert manager.block_pool.get_num_free_blocks() == free
    assert not any(single.req_to_blocks for single in manager.coordinator.single_type_managers)


def preemptions(engine) -> int:
    return sum(m.value for m in engine.llm.get_metrics() if m.name == "vllm:num_preemptions")


def test_a_cancelled_request_leaves_the_others_alone(engine, text, lone) -> None:
    prompts = [text[start : start + 125] for start in (0, 40, 80)]
    expected = [lone(prompt) for prompt in prompts]
    engine.forget()
    finished = engine.generate_and_cancel(prompts, MAX_TOKENS, cancelled=1, after_steps=4, logprobs=2)
    same_answers(finished, [expected[0], expected[2]])
    # Its blocks are free again, and whoever gets them reads their own tokens.
    same_answers(engine.generate(prompts, MAX_TOKENS, logprobs=2), expected)


def test_speculation_leaves_no_trace(start_engine, two_layers, gemma, text, lone, tmp_path) -> None:
    """Drafts of a model that is often wrong, across the ends of blocks."""
    draft = write_layers(gemma, tmp_path, "sliding_attention")
    speculating = start_engine(
        two_layers,
        "tq-k4v4",
        speculative_config={"method": "draft_model", "model": str(draft), "num_speculative_tokens": 4},
        **ARGUMENTS,
    )
    prompts = [text[:end] for end in (123, 125, 250, 254)]
    outputs = speculating.generate(prompts, MAX_TOKENS, logprobs=2)
    counts = {m.name: m.value for m in speculating.llm.get_metrics() if hasattr(m, "value")}
    drafts = counts["vllm:spec_decode_num_draft_tokens"]
    assert drafts > counts["vllm:spec_decode_num_accepted_tokens"] > 0
    same_answers(outputs, [lone(prompt) for prompt in prompts])


def test_answers_within_the_first_block_are_those_of_an_uncompressed_cache(
    engine, start_engine, two_layers, text, lone
) -> None:
    plain = start_engine(two_layers, "auto", **ARGUMENTS)
    prompts = [text[:118], text[200:300], text[:1]]
    same_answers([lone(prompt) for prompt in prompts], plain.generate(prompts, MAX_TOKENS, logprobs=2))
    # Not so behind it.
    with pytest.raises(AssertionError):
        same_answers([lone(text[:390])], plain.generate([text[:390]], MAX_TOKENS, logprobs=2))


@pytest.mark.parametrize("missing", [1, 150, 380])
def test_the_comparison_shows_one_token_that_is_not_read(text, lone, missing: int) -> None:
    """The comparison above can fail: with one token of the prompt left out it does."""
    prompt = text[:390]
    with pytest.raises(AssertionError):
        same_answers([lone(prompt[:missing] + prompt[missing + 1 :])], [lone(prompt)])
