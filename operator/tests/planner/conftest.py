"""What the planner's tests share: real config.json files, written down under `configs/`."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from turboquant_operator.api.spec import TurboQuantDeploymentSpec
from turboquant_operator.planner import ModelFacts, read_facts

CONFIGS = Path(__file__).parent / "configs"

WEIGHTS = {
    "llama-3.1-8b": 16_060_522_240,
    "llama-3.1-70b": 141_107_412_992,
    "qwen2.5-7b": 15_231_233_024,
    "qwen3-8b": 16_381_470_720,
    "gemma-3-270m": 536_223_056,
    "gemma-3-27b": 54_864_668_640,
}
"""`metadata.total_size` of the models' weights indexes, in bytes of bfloat16."""


@pytest.fixture
def config() -> Callable[[str], dict[str, Any]]:
    """Reads one of the config.json files."""

    def read(name: str) -> dict[str, Any]:
        document: dict[str, Any] = json.loads((CONFIGS / f"{name}.json").read_text())
        return document

    return read


@pytest.fixture
def facts(config: Callable[[str], dict[str, Any]]) -> Callable[[str], ModelFacts]:
    """Facts of one of the models, with its weights where their size is known."""

    def read(name: str) -> ModelFacts:
        found = read_facts(config(name), {"BF16": WEIGHTS[name]} if name in WEIGHTS else None)
        assert isinstance(found, ModelFacts), found
        return found

    return read


@pytest.fixture
def spec() -> Callable[..., TurboQuantDeploymentSpec]:
    """A spec from the parts of the object that a test cares about, as a user writes them."""

    def build(**parts: Any) -> TurboQuantDeploymentSpec:
        return TurboQuantDeploymentSpec.model_validate(
            {"model": {"uri": "hf://organisation/name"}, "accelerator": {"type": "nvidia-h100-80gb"}, **parts}
        )

    return build
