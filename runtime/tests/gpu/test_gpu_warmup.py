"""What an engine has done when it is ready: compiled its kernels, and counted its memory."""

import gc

import pytest

pytestmark = pytest.mark.gpu


def test_no_kernel_of_ours_is_compiled_for_a_request(start_on_gpu, dummy_model, tokens, monkeypatch) -> None:
    """Lengths and batch sizes that no warm-up had, of a shape that no other test has compiled."""
    from triton import knobs

    engine = start_on_gpu(dummy_model("LLAMA", num_key_value_heads=1), "tq-k5v4", load_format="dummy")
    compiled: list[str] = []

    def record(*args, **kwargs) -> None:
        compiled.append(kwargs["fn"].jit_function.fn.__module__)

    monkeypatch.setattr(knobs.runtime, "jit_post_compile_hook", record)
    engine.generate([tokens(700)], max_tokens=2)
    engine.generate([tokens(length, length) for length in (1, 2, 16, 17, 100, 333, 48)], max_tokens=20)
    engine.generate([tokens(64, seed) for seed in range(16)], max_tokens=3)
    assert not [module for module in compiled if module.startswith("turboquant")]


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
