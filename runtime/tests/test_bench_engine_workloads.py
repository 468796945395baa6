"""The workloads of `tq bench engine` on an engine that only counts tokens and time."""

from types import SimpleNamespace

import pytest

from turboquant_runtime.bench import workloads
from turboquant_runtime.bench.cases import Batch, Decode, Prefill, Sessions, Start
from turboquant_runtime.bench.results import Row

PREFILL_SECONDS, DECODE_SECONDS = 0.001, 0.5
"""A prompt token's and a step's time on the engine of these tests."""

BLANK = Row("fixture", "model", "plain", "tq-k4v4", "", capacity_tokens=10_000, start_seconds=3.0)


class CountingEngine:
    """One whole prompt a step, its first token with it; without prompts one token for each sequence."""

    def __init__(self, capacity: int = 10_000) -> None:
        self.now = 0.0
        self.model_config = SimpleNamespace(get_vocab_size=lambda: 100)
        self.vllm_config = SimpleNamespace(cache_config=SimpleNamespace(kv_cache_size_tokens=capacity))
        self.waiting, self.running, self.known, self.prompts = [], [], set(), []

    def add_request(self, request_id, prompt, parameters):
        tokens = prompt["prompt_token_ids"]
        self.prompts.append(list(tokens))
        self.waiting.append([request_id, list(tokens), parameters.max_tokens])

    def abort_request(self, ids):
        self.waiting = [request for request in self.waiting if request[0] not in ids]
        self.running = [request for request in self.running if request[0] not in ids]

    def step(self):
        self.now += DECODE_SECONDS
        stepped, cached = self.running, 0
        if self.waiting:
            request = self.waiting.pop(0)
            tokens = request[1]
            cached = max((n for n in range(len(tokens) + 1) if tuple(tokens[:n]) in self.known), default=0)
            self.now += PREFILL_SECONDS * (len(tokens) - cached)
            self.running.append(request)
            stepped = [request]
        outputs = []
        for request in stepped:
            request[1].append(7)
            request[2] -= 1
            outputs.append(
                SimpleNamespace(
                    request_id=request[0],
                    outputs=[SimpleNamespace(token_ids=[7])],
                    finished=request[2] == 0,
                    num_cached_tokens=cached,
                )
            )
            if request[2] == 0:
                self.known.add(tuple(request[1]))
        self.running = [request for request in self.running if request[2]]
        return outputs


@pytest.fixture
def engine(monkeypatch):
    pytest.importorskip("vllm")
    engine = CountingEngine()
    monkeypatch.setattr(workloads.time, "perf_counter", lambda: engine.now)
    return engine


def measured(engine, case):
    client = workloads.Client(SimpleNamespace(llm_engine=engine))
    return [message for message in workloads.run(client, case, BLANK) if isinstance(message, Row)]


def test_prefill_is_a_prompts_tokens_over_the_time_to_its_first_token(engine) -> None:
    (row,) = measured(engine, Prefill(1000, repeats=2))
    assert row.case == "prefill 1000"
    assert row.prefill_tokens_per_second == pytest.approx(1000 / (1000 * PREFILL_SECONDS + DECODE_SECONDS))
    assert (row.repeats, row.spread) == (2, pytest.approx(0))
    assert len(engine.prompts) == 3
    assert len({tuple(prompt) for prompt in engine.prompts}) == 3


def test_decode_counts_steps_in_which_all_sequences_get_a_token(engine) -> None:
    first, second = measured(engine, Decode((1, 4), 100, steps=5))
    assert (first.case, second.case) == ("1x100", "4x100")
    assert first.decode_tokens_per_second == pytest.approx(1 / DECODE_SECONDS)
    assert second.decode_tokens_per_second == pytest.approx(4 / DECODE_SECONDS)
    assert second.repeats == 3


def test_sequences_of_a_smaller_decode_case_go_on_and_none_is_left(engine) -> None:
    measured(engine, Decode((1, 4), 100, steps=5))
    assert len(engine.prompts) == 4
    assert not engine.running
    assert not engine.waiting


def test_a_decode_case_beyond_the_capacity_is_a_row_that_says_so(engine) -> None:
    first, second = measured(engine, Decode((1, 20), 100))
    assert first.decode_tokens_per_second
    assert second.rate is None
    assert second.note == "holds 10,000 of the 12,240 tokens of this case"
    assert len(engine.prompts) == 1


def test_a_batch_counts_output_tokens_over_the_time_of_all(engine) -> None:
    (row,) = measured(engine, Batch(prompts=4, prompt_tokens=100, output_tokens=3))
    seconds = 4 * (100 * PREFILL_SECONDS + DECODE_SECONDS) + 2 * DECODE_SECONDS
    assert row.output_tokens_per_second == pytest.approx(4 * 3 / seconds)
    assert row.decode_tokens_per_second is None


def test_sessions_repeat_what_was_said_and_measure_what_the_cache_held(engine) -> None:
    case = Sessions(2, 100, turns=2, user_tokens=10, output_tokens=5, at_once=1)
    (row,) = measured(engine, case)
    assert row.case == "sessions 2x135"
    assert [len(prompt) for prompt in engine.prompts] == [100, 100, 115, 115, 130, 130]
    assert engine.prompts[2][:105] == engine.prompts[0] + [7] * 5
    assert row.cached_prompt_fraction == pytest.approx((105 + 120) / (115 + 130))
    turn = 10 * PREFILL_SECONDS + DECODE_SECONDS
    assert row.median_ttft_seconds == pytest.approx(turn)
    assert row.output_tokens_per_second == pytest.approx(5 / (turn + 4 * DECODE_SECONDS))
    assert row.repeats == 2


def test_a_session_waits_for_its_own_answer(engine) -> None:
    case = Sessions(2, 100, turns=1, user_tokens=10, output_tokens=5, at_once=2)
    measured(engine, case)
    assert all(prompt[100:105] == [7] * 5 for prompt in engine.prompts[2:])


def test_an_engines_start_is_its_own_row(engine) -> None:
    (row,) = measured(engine, Start())
    assert (row.case, row.start_seconds, row.rate) == ("start", 3.0, None)
