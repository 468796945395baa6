"""What an engine has done when it is ready: compiled its kernels, and counted its memory."""

import gc

import pytest

pytestmark = pytest.mark.gpu


@pytest.fixture
def compiled(monkeypatch) -> list[str]:
    """Names of our kernels that are compiled from now on; empty it to begin anew."""
    from triton import knobs

    names: list[str] = []

    def record(*args, **kwargs) -> None:
        function = kwargs["fn"].jit_function.fn
        if function.__module__.startswith("turboquant"):
            names.append(function.__name__)

    monkeypatch.setattr(knobs.runtime, "jit_post_compile_hook", record)
    return names


SPECULATION = {
    "none": {},
    "n-gram": {
        "method": "ngram",
        "num_speculative_tokens": 5,
        "prompt_lookup_min": 1,
        "prompt_lookup_max": 3,
    },
    "draft model": {"method": "draft_model", "num_speculative_tokens": 3},
}


@pytest.mark.parametrize("eager", [False, True], ids=["captured", "eager"])
@pytest.mark.parametrize("speculation", SPECULATION)
def test_no_kernel_of_ours_is_compiled_for_a_request(
    start_on_gpu, dummy_model, tokens, compiled, speculation: str, eager: bool
) -> None:
    """Lengths, batch sizes and numbers of drafts that no warm-up had, of a shape that no other test has
    compiled."""
    # Another number of query heads in each case.
    heads = 2 + 2 * list(SPECULATION).index(speculation) + eager
    model = dummy_model("LLAMA", num_attention_heads=heads, num_key_value_heads=1, hidden_size=64 * heads)
    settings = SPECULATION[speculation]
    if speculation == "draft model":
        settings = settings | {"model": str(model)}
    arguments = {"speculative_config": settings} if settings else {}
    if eager:
        arguments |= {"enforce_eager": True, "compilation_config": None}
    engine = start_on_gpu(model, "tq-k5v4", load_format="dummy", **arguments)
    assert compiled
    compiled.clear()
    engine.generate([tokens(700)], max_tokens=2)
    engine.generate([tokens(length, length) for length in (1, 2, 16, 17, 100, 333, 48)], max_tokens=20)
    engine.generate([tokens(64, seed) for seed in range(16)], max_tokens=3)
    # Texts in which n-grams are found, from one to all of the drafts.
    engine.generate([tokens(n, n) * 8 for n in (2, 3, 5, 9, 20)], max_tokens=24)
    engine.generate([tokens(9, 5) * 8], max_tokens=24)
    assert not compiled


def test_no_kernel_of_ours_is_compiled_for_a_request_to_a_large_cache(
    start_on_gpu, dummy_model, tokens, compiled
) -> None:
    """A layer's tensor of 12 GiB, which the decode kernel reads with 64-bit offsets."""
    model = dummy_model(
        "LLAMA", num_attention_heads=12, num_key_value_heads=1, num_hidden_layers=1, hidden_size=768
    )
    engine = start_on_gpu(
        model, "tq-k5v4", load_format="dummy", kv_cache_memory_bytes=12 << 30, gpu_memory_utilization=0.2
    )
    assert next(iter(engine.kv_tensors.values())).nbytes > 8 << 30
    compiled.clear()
    engine.generate([tokens(length, length) for length in (1, 100, 333, 700)], max_tokens=8)
    assert not compiled


def test_serving_stays_within_the_memory_that_was_measured(start_on_gpu, dummy_model, tokens) -> None:
    """The largest prefill and decode take no more than the run in which vLLM measured memory."""
    import torch

    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    engine = start_on_gpu(
        dummy_model("LLAMA", num_hidden_layers=1),
        "tq-k4v4",
        load_format="dummy",
        kv_cache_memory_bytes=None,
        gpu_memory_utilization=0.4,
        max_model_len=8192,
        max_num_batched_tokens=4096,
        enable_prefix_caching=False,
    )
    gc.collect()
    worker = engine.executor.driver_worker.worker
    measured = worker.peak_activation_memory
    kept = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    engine.generate([tokens(8000, seed) for seed in range(4)], max_tokens=4)
    used = torch.cuda.max_memory_allocated() - kept
    print(f"measured {measured >> 20} MiB, used {used >> 20} MiB above {(kept - before) >> 20} MiB")
    assert used <= measured
