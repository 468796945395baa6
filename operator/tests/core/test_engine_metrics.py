"""The series that autoscalers and the operator read, on the metrics page of the engine itself."""

import os
from pathlib import Path

import pytest
import yaml

from turboquant_operator.engine_capacity import capacity_in

pytestmark = pytest.mark.engine

ROOT = Path(__file__).parents[3]
CONFIG = ROOT / "operator" / "tests" / "planner" / "configs" / "llama-3.2-1b.json"
TOKENS = 91_656


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What /metrics shows once an engine is ready: vLLM's own loggers and the plugin's, without an engine."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from prometheus_client import REGISTRY, generate_latest
    from vllm.engine.arg_utils import EngineArgs
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.metrics.loggers import PrometheusStatLogger

    from turboquant_runtime.metrics import CapacityStatLogger

    folder = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text(CONFIG.read_text())
    arguments = EngineArgs(model=str(folder), skip_tokenizer_init=True, load_format="dummy")
    config = arguments.create_engine_config(usage_context=UsageContext.OPENAI_API_SERVER)
    config.cache_config.kv_cache_size_tokens, config.cache_config.num_gpu_blocks = TOKENS, 717
    for logger in (PrometheusStatLogger(config, [0]), CapacityStatLogger(config)):
        logger.log_engine_initialized()
    return generate_latest(REGISTRY).decode()


def test_the_engine_has_the_series_that_the_examples_autoscale_on(page: str) -> None:
    objects = [
        found
        for example in (ROOT / "examples").glob("*.yaml")
        for found in yaml.safe_load_all(example.read_text())
    ]
    scalers = [found for found in objects if found["kind"] == "HorizontalPodAutoscaler"]
    wanted = {metric["pods"]["metric"]["name"] for scaler in scalers for metric in scaler["spec"]["metrics"]}
    gauges = {
        line.split()[2]
        for line in page.splitlines()
        if line.startswith("# TYPE ") and line.endswith(" gauge")
    }
    assert wanted
    assert wanted - gauges == set()


def test_the_operator_reads_the_capacity_off_the_page(page: str) -> None:
    assert capacity_in(page) == TOKENS
