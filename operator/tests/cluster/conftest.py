"""The operator under test against a real API server with controllers, and a played kubelet."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import kubernetes
import pytest
from kubelet_player import Kubelet
from operator_process import OperatorProcess, Workspace, eventually

from turboquant_operator.api import KIND

MODEL = Path(__file__).parents[1] / "planner" / "configs" / "gemma-3-270m.json"
WEIGHTS = {"BF16": 536_223_056}


@pytest.fixture(scope="session")
def api_client(kubeconfig: Path) -> kubernetes.client.ApiClient:
    return kubernetes.config.new_client_from_config(str(kubeconfig))


@pytest.fixture
def workspace(
    api_client: kubernetes.client.ApiClient, namespace: str, tmp_path_factory: pytest.TempPathFactory
) -> Workspace:
    return Workspace(api_client, namespace, tmp_path_factory.getbasetemp() / "discovery.json")


@pytest.fixture
def kubelet(api_client: kubernetes.client.ApiClient, namespace: str) -> Kubelet:
    return Kubelet(api_client, namespace)


@pytest.fixture(scope="session")
def operator_process(kubeconfig: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[OperatorProcess]:
    operator = OperatorProcess(kubeconfig, tmp_path_factory.mktemp("operator") / "operator.log")
    yield operator
    operator.kill()


@pytest.fixture
def operator(operator_process: OperatorProcess) -> OperatorProcess:
    """The one operator of the session, running. A test may kill it."""
    if not operator_process.running:
        operator_process.start()
    return operator_process


Serve = Callable[..., dict[str, Any]]


@pytest.fixture
def planned(workspace: Workspace, kubelet: Kubelet, operator: OperatorProcess) -> Serve:
    """Makes an object whose model has been inspected, so that it has a plan. More of the spec by keywords."""

    def make(name: str = "gemma", **spec: Any) -> dict[str, Any]:
        workspace.create(name, {**CPU_SPEC, **spec})
        inspect(workspace, kubelet, name)
        eventually(lambda: workspace.condition(name, "PlanFits")["status"] == "True")
        return workspace.get(KIND, name)

    return make


@pytest.fixture
def serving(workspace: Workspace, kubelet: Kubelet, planned: Serve) -> Serve:
    """Makes an object whose engines are all ready."""

    def make(name: str = "gemma", replicas: int = 1, **spec: Any) -> dict[str, Any]:
        planned(name, replicas=replicas, **spec)
        for pod in eventually(lambda: len(p := workspace.engine_pods(name)) == replicas and p):
            kubelet.ready(pod)
        eventually(lambda: workspace.condition(name, "Ready")["status"] == "True")
        return workspace.get(KIND, name)

    return make


CPU_SPEC: dict[str, Any] = {
    "model": {"uri": "pvc://models/gemma"},
    "accelerator": {"type": "cpu"},
    "kvCache": {"format": "tq-k4v4", "memory": "1Gi"},
    "capacity": {"contextLength": 8192},
}


def inspect(workspace: Workspace, kubelet: Kubelet, name: str) -> None:
    """Lets the inspection pod of an object read Gemma-3-270m."""
    pod = f"{name}-inspect"
    eventually(lambda: workspace.exists("Pod", pod))
    kubelet.inspected(pod, json.loads(MODEL.read_text()), WEIGHTS)
