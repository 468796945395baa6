"""The edge to running engines: how many tokens a pod's KV cache really holds, from its /metrics."""

import asyncio
from collections.abc import Awaitable, Callable

import aiohttp
from prometheus_client.parser import text_string_to_metric_families

from turboquant_operator.builders.arguments import ENGINE_PORT

SCRAPE_SECONDS = 10

Scrape = Callable[[str], Awaitable[int]]
"""From a pod's address to the tokens of its cache; raises ScrapeError."""


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

    Source: `vllm:cache_config_info`, label `kv_cache_size_tokens` (vLLM 0.25.1). Engine processes of one pod
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
