"""The object that most tests make: Gemma-3-270m from a claim, on cpu, without any hub or GPU."""

import json
from pathlib import Path
from typing import Any

from kubelet_player import Kubelet
from operator_process import Workspace, eventually

GEMMA: dict[str, Any] = {
    "model": {"uri": "pvc://models/gemma"},
    "accelerator": {"type": "cpu"},
    "kvCache": {"format": "tq-k4v4", "memory": "1Gi"},
    "capacity": {"contextLength": 8192},
}
CONFIG = json.loads((Path(__file__).parents[1] / "planner" / "configs" / "gemma-3-270m.json").read_text())
WEIGHTS = {"BF16": 536_223_056}


def inspect(workspace: Workspace, kubelet: Kubelet, name: str) -> None:
    """Lets the inspection pod of an object read the model."""
    pod = f"{name}-inspect"
    eventually(lambda: workspace.exists("Pod", pod))
    kubelet.inspected(pod, CONFIG, WEIGHTS)
