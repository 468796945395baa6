"""The edge to running engines: how many tokens a pod's KV cache really holds, from its /metrics."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence

import aiohttp
from prometheus_client.parser import text_string_to_metric_families

from turboquant_operator.builders.arguments import ENGINE_PORT
from turboquant_operator.builders.metadata import Manifest

SCRAPE_SECONDS = 3
"""An engine answers in milliseconds; an address that leads nowhere must not hold up the pass for long."""

SCRAPE_AGAIN_SECONDS = 15.0
"""Until the engines of an object of which one did not answer are asked again."""

Scrape = Callable[[str], Awaitable[int]]
"""From a pod's address to the tokens of its cache; raises ScrapeError."""

logger = logging.getLogger(__name__)


class ScrapeError(Exception):
    """A pod that does not tell its capacity: not reachable, or another engine."""


async def scrape_capacity(address: str) -> int:
    """Tokens of the KV cache of the engine at a pod address."""
    host = f"[{address}]" if ":" in address else address
    url = f"http://{host}:{ENGINE_PORT}/metrics"
    try:
        timeout = aiohttp.ClientTimeout(total=SCRAPE_SECONDS)
        async with aiohttp.ClientSession(timeout=timeout) as session, session.get(url) as response:
            response.raise_for_status()
            text = await response.text()
    except (aiohttp.ClientError, TimeoutError, UnicodeDecodeError) as error:
        raise ScrapeError(f"{url}: {error or type(error).__name__}") from error
    # Thousands of lines on a busy engine: parsed where it does not hold up the event loop.
    return await asyncio.to_thread(capacity_in, text)


def capacity_in(text: str) -> int:
    """The capacity that a metrics page shows: vLLM's own number, which knows sliding windows and padding.

    Source: `vllm:cache_config_info`, label `kv_cache_size_tokens` (vLLM 0.32.0). Engine processes of one pod
    (data parallelism) add up. Raises ScrapeError where the page has no such number.
    """
    try:
        tokens = [
            int(sample.labels["kv_cache_size_tokens"])
            for family in text_string_to_metric_families(text)
            if family.name == "vllm:cache_config_info"
            for sample in family.samples
            if sample.labels.get("kv_cache_size_tokens", "").isdigit()
        ]
    except ValueError as error:
        raise ScrapeError(f"no metrics page: {error}") from error
    if not tokens:
        raise ScrapeError("no vllm:cache_config_info with kv_cache_size_tokens")
    return sum(tokens)


class CapacityReader:
    """Capacities of one object's pods. Each container is asked once: its cache has one size for life."""

    def __init__(self, scrape: Scrape = scrape_capacity) -> None:
        self._scrape = scrape
        self._known: dict[str, int] = {}
        self._not_before = 0.0

    async def read(self, pods: Sequence[Manifest]) -> tuple[int, ...]:
        """Tokens of the pods that tell; fewer than pods where one does not, or did not a moment ago."""
        containers = {_engine_container_id(pod): pod["status"].get("podIP", "") for pod in pods}
        self._known = {c: tokens for c, tokens in self._known.items() if c in containers}
        unknown = {c: address for c, address in containers.items() if c not in self._known}
        if unknown and time.monotonic() >= self._not_before:
            answers = await asyncio.gather(*map(self._scrape, unknown.values()), return_exceptions=True)
            for container, answer in zip(unknown, answers, strict=True):
                if isinstance(answer, int):
                    self._known[container] = answer
                elif isinstance(answer, ScrapeError):
                    logger.warning("Capacity not read: %s", answer)
                    self._not_before = time.monotonic() + SCRAPE_AGAIN_SECONDS
                else:
                    raise answer
        return tuple(self._known.values())


def _engine_container_id(pod: Manifest) -> str:
    """The container that serves, or the pod where its runtime gives no ids."""
    for container in pod["status"].get("containerStatuses", ()):
        if container["name"] == "engine" and container.get("containerID"):
            return str(container["containerID"])
    return str(pod["metadata"]["uid"])
