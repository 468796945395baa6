"""The cache's capacity and use as gauges on the engine's own /metrics.

vLLM loads `CapacityStatLogger` through the group `vllm.stat_logger_plugins` in the API server's process,
where /metrics is served, once the engine is ready, and calls `record` after each step. The gauges lie in the
default registry, which vLLM serves, and carry vLLM's labels; with several API servers prometheus_client
merges the latest value of each.

With none of our formats chosen the gauges show vLLM's own capacity and a gain of 1, so that dashboards,
autoscalers and the operator read one set of names from every deployment. Only the bytes per token are left
out then: no part of this package runs in that engine to count them.
"""

from functools import cache
from typing import Any

from prometheus_client import Gauge
from vllm.config import VllmConfig
from vllm.v1.metrics.loggers import StatLoggerBase

from turboquant_runtime.capacity import REPORTED

_LABELS = ("model_name", "engine")
_GAUGES = {
    "turboquant_kv_capacity_tokens": "Tokens that the KV cache of one engine holds.",
    "turboquant_kv_baseline_capacity_tokens": "Tokens that the same memory holds in the model's own dtype.",
    "turboquant_kv_capacity_gain_ratio": "Capacity over baseline capacity.",
    "turboquant_kv_bytes_per_token": "Bytes of one token's keys and values in all layers of one engine rank.",
    "turboquant_kv_used_tokens": "Token slots in blocks that running requests hold.",
    "turboquant_kv_headroom_tokens": "Capacity less the used tokens.",
    "turboquant_kv_usage_ratio": "Share of the KV cache's blocks that running requests hold, 0 to 1.",
}


@cache
def _gauge(name: str) -> Gauge:
    """The gauge of that name, registered once a process however many loggers vLLM makes."""
    return Gauge(name, _GAUGES[name], _LABELS, multiprocess_mode="mostrecent")


class CapacityStatLogger(StatLoggerBase):
    """Sets the gauges of one engine: capacities when it is ready, use after each of its steps."""

    def __init__(self, vllm_config: VllmConfig, engine_index: int = 0) -> None:
        self._config = vllm_config
        self._labels = (str(vllm_config.model_config.served_model_name), str(engine_index))
        self._capacity = 0
        self._blocks = 0

    def log_engine_initialized(self) -> None:
        """Called when the engine has laid its cache out. A model without a KV cache has no gauges."""
        cache_config = self._config.cache_config
        if not cache_config.kv_cache_size_tokens:
            return
        self._capacity = cache_config.kv_cache_size_tokens
        # vLLM's front end holds the sum over data-parallel engines, which all have the same number.
        self._blocks = cache_config.num_gpu_blocks // self._config.parallel_config.data_parallel_size
        compressed = REPORTED.get(self._config.instance_id)
        baseline = compressed.baseline_tokens if compressed else self._capacity
        self._set("turboquant_kv_capacity_tokens", self._capacity)
        self._set("turboquant_kv_baseline_capacity_tokens", baseline)
        self._set("turboquant_kv_capacity_gain_ratio", self._capacity / baseline)
        if compressed:
            self._set("turboquant_kv_bytes_per_token", compressed.bytes_per_token)
        self._set_use(usage=0.0)

    def record(
        self,
        scheduler_stats: Any,
        iteration_stats: Any,
        mm_cache_stats: Any = None,
        engine_idx: int = 0,
    ) -> None:
        """Called after each step; `scheduler_stats` is None where another front end got them."""
        if scheduler_stats is not None and self._capacity:
            self._set_use(scheduler_stats.kv_cache_usage)

    def _set_use(self, usage: float) -> None:
        # One block is vLLM's null block, which no request can hold and `usage` leaves out.
        used_blocks = round(usage * (self._blocks - 1))
        used_tokens = used_blocks * self._capacity / self._blocks
        self._set("turboquant_kv_used_tokens", used_tokens)
        self._set("turboquant_kv_headroom_tokens", self._capacity - used_tokens)
        self._set("turboquant_kv_usage_ratio", usage)

    def _set(self, name: str, value: float) -> None:
        _gauge(name).labels(*self._labels).set(value)
