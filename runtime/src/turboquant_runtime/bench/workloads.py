"""The cases' workloads on one engine: requests in, times of tokens out, rates as rows.

Everything goes through vLLM's offline front end (`LLM.llm_engine`): requests reach the engine core in its own
process as those of the server do, without HTTP, JSON and detokenization, which are no part of what is
measured. A workload yields the name of what it does before it does it (a str) and then its rows.
"""

import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import pairwise
from statistics import median
from typing import Any

from turboquant_runtime.bench.cases import Batch, Case, Decode, Prefill, Sessions
from turboquant_runtime.bench.results import Row, repeated

SETTLE_STEPS = 5
"""Steps that are let pass between a batch's last prefill and the first measured step."""

MARGIN_TOKENS = 512
"""Room that a sequence of a decode case needs beyond its context, for the tokens that it gets meanwhile."""

Progress = Iterator[str | Row]


@dataclass(eq=False)
class Request:
    """One request on its way, with the seconds at which its tokens came (`time.perf_counter`)."""

    id: str
    submitted: float
    tokens: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    cached_tokens: int = 0
    finished: bool = False

    @property
    def first_token_seconds(self) -> float:
        return self.times[0] - self.submitted


class Client:
    """Greedy requests of random tokens to one engine, and its steps. `llm` is a `vllm.LLM`."""

    def __init__(self, llm: Any) -> None:
        self._engine = llm.llm_engine
        self._vocabulary = self._engine.model_config.get_vocab_size()
        self._random = random.Random(0)
        self._requests: dict[str, Request] = {}
        self._submitted = 0

    @property
    def capacity_tokens(self) -> int:
        return self._engine.vllm_config.cache_config.kv_cache_size_tokens

    def random_tokens(self, count: int) -> list[int]:
        """Tokens of a prompt that no other prompt shares; equal on every engine."""
        return self._random.choices(range(3, self._vocabulary), k=count)

    def submit(self, prompt: list[int], max_tokens: int) -> Request:
        """Gives the engine a prompt of token ids; it computes whatever `max_tokens` allows."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        parameters = SamplingParams(
            temperature=0.0,
            max_tokens=max_tokens,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        request = Request(str(self._submitted), time.perf_counter())
        self._submitted += 1
        self._requests[request.id] = request
        self._engine.add_request(request.id, {"prompt_token_ids": prompt}, parameters)
        return request

    def step(self) -> list[Request]:
        """Waits for the next step of the engine core; the requests that finished with it."""
        outputs = self._engine.step()
        now, finished = time.perf_counter(), []
        for output in outputs:
            request = self._requests[output.request_id]
            new = output.outputs[0].token_ids
            request.tokens.extend(new)
            request.times.extend([now] * len(new))
            request.cached_tokens = output.num_cached_tokens or request.cached_tokens
            if output.finished:
                request.finished = True
                finished.append(self._requests.pop(request.id))
        return finished

    def finish(self) -> None:
        """Steps until nothing runs or waits."""
        while self._requests:
            self.step()

    def abort(self) -> None:
        """Drops what still runs or waits."""
        self._engine.abort_request(list(self._requests))
        self._requests.clear()


def run(client: Client, case: Case, blank: Row) -> Progress:
    """Measures one case. `blank` is a row with everything that the engine's rows share."""
    match case:
        case Prefill():
            yield from _prefill(client, case, blank)
        case Decode():
            yield from _decode(client, case, blank)
        case Batch():
            yield from _batch(client, case, blank)
        case Sessions():
            yield from _sessions(client, case, blank)
        case _:  # a start has been measured when an engine runs
            yield replace(blank, case=case.names[0])


def _prefill(client: Client, case: Prefill, blank: Row) -> Progress:
    (name,) = case.names
    yield name
    rates = []
    for repeat in range(-1, case.repeats):  # the first one compiles what the engine's own warm-up left out
        request = client.submit(client.random_tokens(case.tokens), max_tokens=1)
        client.finish()
        if repeat >= 0:
            rates.append(case.tokens / request.first_token_seconds)
    yield replace(blank, case=name, prefill_tokens_per_second=median(rates), **repeated(rates))


def _decode(client: Client, case: Decode, blank: Row) -> Progress:
    running: list[Request] = []
    for count, name in zip(case.sequences, case.names, strict=True):
        needed = count * (case.context + MARGIN_TOKENS)
        if client.capacity_tokens < needed:
            yield replace(
                blank,
                case=name,
                note=f"holds {client.capacity_tokens:,} of the {needed:,} tokens of this case",
            )
            continue
        yield f"{name}, prefill"
        while len(running) < count:
            tokens = client.random_tokens(case.context)
            running.append(client.submit(tokens, max_tokens=8 * MARGIN_TOKENS))
        while not all(request.times for request in running):
            client.step()
        for _ in range(SETTLE_STEPS):
            client.step()
        yield name
        rates = []
        for _ in range(case.repeats):
            before = sum(len(request.tokens) for request in running)
            begin = max(request.times[-1] for request in running)
            for _ in range(case.steps):
                client.step()
            tokens_made = sum(len(request.tokens) for request in running) - before
            rates.append(tokens_made / (max(request.times[-1] for request in running) - begin))
        yield replace(blank, case=name, decode_tokens_per_second=median(rates), **repeated(rates))
    client.abort()


def _batch(client: Client, case: Batch, blank: Row) -> Progress:
    (name,) = case.names
    yield name
    rates = []
    for repeat in range(-1, case.repeats):
        prompts = [client.random_tokens(case.prompt_tokens) for _ in range(case.prompts)]
        begin = time.perf_counter()
        for prompt in prompts:
            client.submit(prompt, case.output_tokens)
        client.finish()
        if repeat >= 0:
            rates.append(case.prompts * case.output_tokens / (time.perf_counter() - begin))
    yield replace(blank, case=name, output_tokens_per_second=median(rates), **repeated(rates))


def _sessions(client: Client, case: Sessions, blank: Row) -> Progress:
    (name,) = case.names
    said = [client.random_tokens(case.first_prompt_tokens) for _ in range(case.sessions)]
    to_say = [[client.random_tokens(case.user_tokens) for _ in range(case.turns)] for _ in said]
    waiting = [(turn, session) for turn in range(case.turns + 1) for session in range(case.sessions)]
    active: dict[Request, tuple[int, int]] = {}
    ended: list[float] = []
    measured: list[tuple[float, int, int]] = []
    yield f"{name}, first turns"
    while waiting or active:
        talking = {session for _, session in active.values()}
        while waiting and len(active) < case.at_once and waiting[0][1] not in talking:
            turn, session = waiting.pop(0)
            if turn:
                said[session] += to_say[session][turn - 1]
            active[client.submit(said[session], case.output_tokens)] = turn, session
        for request in client.step():
            turn, session = active.pop(request)
            ended.append(request.times[-1])
            if turn:
                measured.append((request.first_token_seconds, request.cached_tokens, len(said[session])))
            said[session] += request.tokens
            if len(ended) == case.sessions:
                yield name
    seconds, cached, prompts = zip(*measured, strict=True)
    marks = ended[case.sessions - 1 :: case.sessions]
    rates = [case.sessions * case.output_tokens / (end - begin) for begin, end in pairwise(marks)]
    yield replace(
        blank,
        case=name,
        output_tokens_per_second=median(rates),
        median_ttft_seconds=median(seconds),
        cached_prompt_fraction=sum(cached) / sum(prompts),
        **repeated(rates),
    )
