"""The gauges of one engine, from what vLLM tells a stat logger."""

from types import SimpleNamespace

import pytest
from prometheus_client import REGISTRY

from turboquant_runtime.capacity import REPORTED, CacheCapacity

BLOCKS, BLOCK = 101, 128
CAPACITY = BLOCKS * BLOCK


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest):
    """A ready engine under a model name of its own; returns (logger, read a gauge)."""
    from turboquant_runtime.metrics import CapacityStatLogger

    def make(compressed: CacheCapacity | None, capacity: int | None = CAPACITY):
        name = request.node.name
        if compressed:
            monkeypatch.setitem(REPORTED, name, compressed)
        logger = CapacityStatLogger(
            SimpleNamespace(
                instance_id=name,
                model_config=SimpleNamespace(served_model_name=name),
                parallel_config=SimpleNamespace(data_parallel_size=1),
                cache_config=SimpleNamespace(kv_cache_size_tokens=capacity, num_gpu_blocks=BLOCKS),
            )
        )
        logger.log_engine_initialized()

        def read(gauge: str) -> float | None:
            return REGISTRY.get_sample_value(f"turboquant_kv_{gauge}", {"model_name": name, "engine": "0"})

        return logger, read

    return make


def test_capacity_stands_beside_the_baseline(engine) -> None:
    _, read = engine(CacheCapacity(baseline_tokens=CAPACITY // 4, bytes_per_token=1056.0))
    assert read("capacity_tokens") == CAPACITY
    assert read("baseline_capacity_tokens") == CAPACITY // 4
    assert read("capacity_gain_ratio") == CAPACITY / (CAPACITY // 4)
    assert read("bytes_per_token") == 1056.0


def test_use_follows_the_block_pool(engine) -> None:
    logger, read = engine(CacheCapacity(baseline_tokens=3_000, bytes_per_token=1056.0))
    assert read("used_tokens") == 0
    # 7 of the 100 blocks that are not the null block.
    logger.record(SimpleNamespace(kv_cache_usage=0.07), None)
    assert read("used_tokens") == 7 * BLOCK
    assert read("headroom_tokens") == CAPACITY - 7 * BLOCK
    assert read("usage_ratio") == 0.07
    logger.record(None, None)
    assert read("used_tokens") == 7 * BLOCK


def test_an_uncompressed_cache_shows_a_gain_of_one(engine) -> None:
    _, read = engine(None)
    assert read("capacity_tokens") == read("baseline_capacity_tokens") == CAPACITY
    assert read("capacity_gain_ratio") == 1.0
    assert read("bytes_per_token") is None


def test_a_model_without_a_cache_has_no_gauges(engine) -> None:
    logger, read = engine(None, capacity=None)
    logger.record(SimpleNamespace(kv_cache_usage=0.0), None)
    assert read("capacity_tokens") is None
    assert read("used_tokens") is None
