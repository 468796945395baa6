"""Parameter counts from a config against the counts that the models' publishers give."""

import json
from pathlib import Path
from typing import Any

import pytest

from turboquant_operator.planner.parameters import count_parameters

CONFIGS = Path(__file__).parent / "configs"


def shape(text: dict[str, Any]) -> tuple[int, int, int, int]:
    heads = text["num_attention_heads"]
    return (
        text["num_hidden_layers"],
        heads,
        text.get("num_key_value_heads", heads),
        text.get("head_dim") or text["hidden_size"] // heads,
    )


@pytest.mark.parametrize(
    ("config", "parameters"),
    [
        ("llama-3.1-8b", 8_030_261_248),
        ("llama-3.1-70b", 70_553_706_496),
        ("qwen2.5-7b", 7_615_616_512),
        ("qwen3-8b", 8_190_735_360),
        ("gemma-2-9b", 9_241_705_984),
        ("gemma-3-270m", 268_098_176),
    ],
)
def test_a_known_model_has_its_published_number_of_parameters(config: str, parameters: int) -> None:
    whole = json.loads((CONFIGS / f"{config}.json").read_text())
    text = whole.get("text_config", whole)
    assert count_parameters(text, *shape(text)) == parameters


def test_a_family_with_other_blocks_is_not_counted() -> None:
    text = {"model_type": "mixtral", "hidden_size": 4096, "intermediate_size": 14336, "vocab_size": 32000}
    assert count_parameters(text, 32, 32, 8, 128) is None


def test_a_config_without_its_sizes_is_not_counted() -> None:
    assert count_parameters({"model_type": "llama"}, 32, 32, 8, 128) is None
