"""The operator under test against a real API server with controllers, and a played kubelet."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import kubernetes
import pytest
from gemma_object import GEMMA, inspect
from kubelet_player import Kubelet
from operator_process import OperatorProcess, Workspace, eventually

from turboquant_operator.api import KIND


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
        workspace.create(name, {**GEMMA, **spec})
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
