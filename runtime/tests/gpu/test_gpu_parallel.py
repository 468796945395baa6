"""Engines over two GPUs, in workers of their own: the answers of one, and twice its cache.

In float16, which rounds eight times finer than bf16: what differs is not the order of sums.
"""

from functools import partial

import pytest
import torch
from answers import assert_same_answers

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]

MEMORY, MAX_TOKENS = 64 << 20, 32
same_answers = partial(assert_same_answers, rounding=0.1, flip=1.0)


@pytest.mark.parametrize("parallel", ["tensor", "pipeline"])
def test_two_gpus_answer_as_one_and_hold_twice_as_much(
    start_on_gpu, dummy_model, tokens, parallel: str
) -> None:
    from turboquant_runtime.adapters.baseline import measure_capacity

    model, start = dummy_model("LLAMA", weights=0), partial(start_on_gpu, dtype="float16")
    prompts = [tokens(length, length) for length in (700, 300, 100, 33, 1)]
    one = start(model, "tq-k4v4")
    two = start(
        model,
        "tq-k4v4",
        **{f"{parallel}_parallel_size": 2},
        distributed_executor_backend="mp",
        disable_custom_all_reduce=True,
    )
    try:
        outputs = two.generate(prompts, MAX_TOKENS, logprobs=2)
        specs = two.executor.get_kv_cache_specs()
    finally:
        two.executor.shutdown()  # its workers do not sleep while they wait
    same_answers(outputs, one.generate(prompts, MAX_TOKENS, logprobs=2))
    assert two.capacity_tokens == pytest.approx(2 * one.capacity_tokens, rel=0.01)
    capacity = measure_capacity(two.config, specs, [MEMORY, MEMORY])
    plain = start(model, "auto")
    assert capacity.baseline_tokens == pytest.approx(2 * plain.capacity_tokens, rel=0.01)
