"""The CPU engine in two workers, each with a process of its own: the answers of one, and twice its cache.

In float32, so that only the order of sums differs.
"""

from functools import partial

import pytest
from answers import assert_same_answers

pytestmark = pytest.mark.engine

MEMORY, MAX_TOKENS = 16 << 20, 16
PROMPTS = [[3 + index * index * 7 % 113 for index in range(length)] for length in (300, 40)]


PIPELINE = pytest.mark.skip(
    reason="vLLM 0.32.0 loses requests with pipeline parallelism on the CPU, with its own cache too"
)


@pytest.mark.parametrize("parallel", ["tensor", pytest.param("pipeline", marks=PIPELINE)])
@pytest.mark.parametrize(("shape", "cache"), [("LLAMA", "tq-k4v4"), ("QWEN2", "tq-balanced")])
def test_two_workers_answer_as_one_and_hold_twice_as_much(
    start_engine, dummy_model, parallel: str, shape: str, cache: str
) -> None:
    """Where a tier gives layers bits of their own, all workers have the same."""
    from turboquant_runtime.adapters.baseline import measure_capacity

    start = partial(
        start_engine,
        dummy_model(shape, weights=0),
        dtype="float32",
        kv_cache_memory_bytes=MEMORY,
        max_model_len=1024,
        max_num_batched_tokens=512,
    )
    one = start(cache)
    two = start(cache, **{f"{parallel}_parallel_size": 2}, distributed_executor_backend="mp")
    try:
        outputs, expected = (engine.generate(PROMPTS, MAX_TOKENS, logprobs=2) for engine in (two, one))
        specs = two.executor.get_kv_cache_specs()
    finally:
        two.executor.shutdown()  # its workers do not sleep while they wait
    assert_same_answers(outputs, expected, rounding=0.01, flip=0.2)
    assert two.capacity_tokens == pytest.approx(2 * one.capacity_tokens, rel=0.01)
    # The baseline of two workers is what two would hold of the model's own dtype.
    plain = start("auto")
    assert len(specs) == 2
    capacity = measure_capacity(two.config, specs, [MEMORY, MEMORY])
    assert capacity.baseline_tokens == pytest.approx(2 * plain.capacity_tokens, rel=0.02)
