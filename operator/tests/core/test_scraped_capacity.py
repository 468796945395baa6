"""The capacity that an engine's metrics page shows."""

import asyncio

import pytest

from turboquant_operator.engine_capacity import ScrapeError, capacity_in, scrape_capacity

PAGE = """\
# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="gemma"} 0.0
# HELP vllm:cache_config_info Information of the LLMEngine CacheConfig
# TYPE vllm:cache_config_info gauge
vllm:cache_config_info{block_size="128",cache_dtype="tq-k4v4",engine="0",kv_cache_size_tokens="91656"} 1.0
"""


def test_capacity_is_vllms_own_number() -> None:
    assert capacity_in(PAGE) == 91_656


def test_engine_processes_of_one_pod_add_up() -> None:
    second = PAGE.splitlines()[-1].replace('engine="0"', 'engine="1"').replace("91656", "344")
    assert capacity_in(PAGE + second + "\n") == 92_000


@pytest.mark.parametrize("page", ["", PAGE.replace("91656", "None"), PAGE.replace("cache_config", "other")])
def test_page_without_the_number_is_an_error(page: str) -> None:
    with pytest.raises(ScrapeError, match="kv_cache_size_tokens"):
        capacity_in(page)


@pytest.mark.parametrize("page", ["{{{", 'vllm:cache_config_info{kv_cache_size_tokens="1'])
def test_page_that_is_no_metrics_page_is_an_error(page: str) -> None:
    with pytest.raises(ScrapeError):
        capacity_in(page)


def test_engine_that_does_not_answer_is_an_error() -> None:
    with pytest.raises(ScrapeError, match=r"127\.10\.20\.31"):
        asyncio.run(scrape_capacity("127.10.20.31"))
