"""Objects that the API server admits and the operator refuses: each with a reason, and none ends it."""

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml
from operator_process import OperatorProcess, Workspace, eventually

pytestmark = pytest.mark.cluster

CASES = yaml.safe_load((Path(__file__).parents[1] / "api" / "invalid_objects.yaml").read_text())["admitted"]


def refused(workspace: Workspace, name: str, case: dict[str, Any]) -> bool:
    """Whether Accepted and Ready say what the table says."""
    for kind in ("Accepted", "Ready"):
        condition = workspace.condition(name, kind)
        assert (condition["status"], condition["reason"]) == ("False", case["reason"])
        assert case["message"] in condition["message"]
    return True


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_invalid_object_is_not_accepted(
    case: dict[str, Any], workspace: Workspace, operator: OperatorProcess
) -> None:
    workspace.create("wrong", copy.deepcopy(case["spec"]))
    assert eventually(lambda: refused(workspace, "wrong", case))
    assert workspace.engine_pods("wrong") == []
    assert operator.running
