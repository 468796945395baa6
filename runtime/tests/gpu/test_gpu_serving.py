"""Speculation, offloading and vLLM's compilation on a GPU: what computes a token, when, and where its page is
changes no answer."""

from functools import partial

import pytest
from answers import assert_same_answers

pytestmark = pytest.mark.gpu

ROUNDING, FLIP, MAX_TOKENS = 0.1, 1.0, 32
same_answers = partial(assert_same_answers, rounding=ROUNDING, flip=FLIP)


@pytest.fixture(scope="module")
def model(dummy_model):
    return dummy_model("LLAMA", weights=0)


@pytest.fixture(scope="module")
def prompts(tokens) -> list[list[int]]:
    """Texts that repeat themselves, for n-grams to be found in."""
    return [
        tokens(length, length) * repeats for length, repeats in ((20, 6), (7, 3), (90, 4), (1, 30), (33, 1))
    ]


@pytest.fixture(scope="module")
def expected(start_on_gpu, model, prompts):
    return start_on_gpu(model, "tq-k4v4").generate(prompts, MAX_TOKENS, logprobs=2)


def counts(engine, name: str) -> int:
    return sum(m.value for m in engine.llm.get_metrics() if m.name == name)


def test_ngram_speculation_answers_as_none(start_on_gpu, model, prompts, expected) -> None:
    engine = start_on_gpu(
        model,
        "tq-k4v4",
        speculative_config={
            "method": "ngram",
            "num_speculative_tokens": 3,
            "prompt_lookup_min": 1,
            "prompt_lookup_max": 3,
        },
    )
    same_answers(engine.generate(prompts, MAX_TOKENS, logprobs=2), expected)
    drafts = counts(engine, "vllm:spec_decode_num_draft_tokens")
    accepted = counts(engine, "vllm:spec_decode_num_accepted_tokens")
    assert 0 < accepted < drafts


@pytest.mark.parametrize("seed", [0, 1], ids=["accepted", "rejected"])
def test_a_draft_model_answers_as_none(
    start_on_gpu, dummy_model, model, prompts, expected, seed: int
) -> None:
    """A draft model that is the target itself is mostly right, one with other weights mostly wrong."""
    engine = start_on_gpu(
        model,
        "tq-k4v4",
        speculative_config={
            "method": "draft_model",
            "model": str(dummy_model("LLAMA", weights=seed)),
            "num_speculative_tokens": 3,
        },
    )
    same_answers(engine.generate(prompts, MAX_TOKENS, logprobs=2), expected)
    drafts = counts(engine, "vllm:spec_decode_num_draft_tokens")
    accepted = counts(engine, "vllm:spec_decode_num_accepted_tokens")
    assert accepted > 0.8 * drafts if seed == 0 else accepted < 0.5 * drafts


def test_pages_that_were_in_host_memory_give_the_same_answers(start_on_gpu, model, tokens) -> None:
    # The GPU holds one request of 1,000 tokens and a little.
    engine = start_on_gpu(model, "tq-k4v4", num_gpu_blocks_override=80, kv_offloading_size=1)
    prompts = [tokens(1000, seed) for seed in range(4)]
    expected = [engine.generate([prompt], 8, logprobs=2)[0] for prompt in prompts]
    outputs = [engine.generate([prompt], 8, logprobs=2)[0] for prompt in prompts]
    assert counts(engine, "vllm:prompt_tokens_cached") > 2000
    same_answers(outputs, expected)
    (fresh,) = start_on_gpu(model, "tq-k4v4").generate([prompts[0]], 8, logprobs=2)
    same_answers([outputs[0]], [fresh])


def test_a_compiled_engine_answers_as_one_that_is_not(
    start_on_gpu, dummy_model, prompts, monkeypatch
) -> None:
    """vLLM's default: torch.compile, piecewise graphs for prompts and whole ones for decodes."""
    from vllm.compilation.counter import compilation_counter
    from vllm.config import CompilationMode, CUDAGraphMode

    model = dummy_model("GEMMA3", weights=0, tie_word_embeddings=False)
    expected = start_on_gpu(model, "tq-k4v4").generate(prompts, MAX_TOKENS, logprobs=2)
    monkeypatch.delenv("TORCHDYNAMO_DISABLE")
    before = compilation_counter.num_backend_compilations
    engine = start_on_gpu(model, "tq-k4v4", compilation_config={})
    settings = engine.config.compilation_config
    assert settings.mode == CompilationMode.VLLM_COMPILE
    assert settings.cudagraph_mode == CUDAGraphMode.FULL_AND_PIECEWISE
    assert compilation_counter.num_backend_compilations > before
    same_answers(engine.generate(prompts, MAX_TOKENS, logprobs=2), expected)


def test_with_no_format_of_ours_nothing_of_ours_runs(start_on_gpu, model) -> None:
    engine = start_on_gpu(model, "auto")
    layers = engine.config.compilation_config.static_forward_context
    assert {layers[name].attn_backend.get_name() for name in engine.layer_names} == {"FLASH_ATTN"}
