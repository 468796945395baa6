"""Engines over two GPUs, in workers of their own: next to the answers of one, and twice its cache.

Sums that each GPU rounds for itself differ from one GPU's, and codes magnify that: a coordinate that rounding
takes over a boundary moves by a whole step. So at 8 bits, and in float16, which rounds eight times finer
than bf16.
"""

from functools import partial

import pytest
import torch
from answers import assert_next_to_each_other

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]

MEMORY = 64 << 20


@pytest.mark.parametrize(("parallel", "near"), [("tensor", 0.15), ("pipeline", 0.01)])
def test_two_gpus_answer_next_to_one_and_hold_twice_as_much(
    start_on_gpu, dummy_model, tokens, parallel: str, near: float
) -> None:
    """`near`: nats, at most, for the median token; .04 and 0 were seen."""
    from turboquant_runtime.adapters.baseline import measure_capacity

    model, start = dummy_model("LLAMA", weights=0), partial(start_on_gpu, dtype="float16")
    prompts = [tokens(length, length) for length in (700, 300, 100, 33)]
    one = start(model, "tq-k8v8")
    two = start(
        model,
        "tq-k8v8",
        **{f"{parallel}_parallel_size": 2},
        distributed_executor_backend="mp",
        disable_custom_all_reduce=True,
    )
    try:
        assert_next_to_each_other(two, one, prompts, near=near)
        specs = two.executor.get_kv_cache_specs()
    finally:
        two.executor.shutdown()  # its workers do not sleep while they wait
    assert two.capacity_tokens == pytest.approx(2 * one.capacity_tokens, rel=0.01)
    capacity = measure_capacity(two.config, specs, [MEMORY, MEMORY])
    plain = start(model, "auto")
    assert capacity.baseline_tokens == pytest.approx(2 * plain.capacity_tokens, rel=0.01)
