"""What the chart's tests share: its path, and the types of their fixtures."""

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

CHART = Path(__file__).parents[1] / "turboquant-operator"

Objects = list[dict[str, Any]]
Helm = Callable[..., subprocess.CompletedProcess[str]]
Render = Callable[..., Objects]


def of_kind(objects: Objects, *kinds: str) -> Objects:
    """The objects of these kinds, in order."""
    return [item for item in objects if item["kind"] in kinds]
