"""What survives: killed operators, meddling hands, an operator that is not there."""

from typing import Any

import pytest
from gemma_object import GEMMA, inspect
from kubelet_player import Kubelet
from operator_process import OperatorProcess, Workspace, eventually

from turboquant_operator.api import KIND

pytestmark = pytest.mark.cluster


def test_deleted_children_come_back(serving: Any, workspace: Workspace) -> None:
    serving(replicas=2)
    for kind, name in [
        ("Service", "gemma"),
        ("PodDisruptionBudget", "gemma"),
        ("ConfigMap", "gemma-plan"),
        ("Deployment", "gemma"),
    ]:
        uid = workspace.get(kind, name)["metadata"]["uid"]
        workspace.delete(kind, name)
        assert eventually(lambda k=kind, n=name, u=uid: workspace.get(k, n)["metadata"]["uid"] != u)


def test_edited_children_are_corrected(serving: Any, workspace: Workspace) -> None:
    serving()
    plan = workspace.get("ConfigMap", "gemma-plan")["data"]["plan.json"]
    workspace.patch("Service", "gemma", {"spec": {"ports": [{"name": "http", "port": 9999}]}})
    workspace.patch("ConfigMap", "gemma-plan", {"data": {"plan.json": "{}"}})
    workspace.patch("Deployment", "gemma", {"spec": {"replicas": 0}})
    assert eventually(lambda: workspace.get("Service", "gemma")["spec"]["ports"][0]["port"] == 8000)
    assert eventually(lambda: workspace.get("ConfigMap", "gemma-plan")["data"]["plan.json"] == plan)
    assert eventually(lambda: workspace.get("Deployment", "gemma")["spec"]["replicas"] == 1)


def test_foreign_labels_and_annotations_survive(serving: Any, workspace: Workspace) -> None:
    serving()
    foreign = {"metadata": {"labels": {"team": "search"}, "annotations": {"cost-center": "7"}}}
    for kind in ("Deployment", "Service"):
        workspace.patch(kind, "gemma", foreign)
    # A change of the object makes the operator apply both again.
    change = {"kvCache": {"format": "tq-k8v4"}, "service": {"annotations": {"a": "b"}}}
    workspace.patch(KIND, "gemma", {"spec": change})
    eventually(lambda: workspace.get("Service", "gemma")["metadata"]["annotations"]["a"] == "b")
    eventually(lambda: workspace.get("Deployment", "gemma")["metadata"]["generation"] > 1)
    for kind in ("Deployment", "Service"):
        metadata = workspace.get(kind, "gemma")["metadata"]
        assert metadata["labels"]["team"] == "search"
        assert metadata["annotations"]["cost-center"] == "7"


def test_child_that_lost_its_labels_gets_them_back(serving: Any, workspace: Workspace) -> None:
    serving()
    label = "app.kubernetes.io/managed-by"
    workspace.patch("Service", "gemma", {"metadata": {"labels": {label: None}}})
    assert eventually(
        lambda: workspace.get("Service", "gemma")["metadata"]["labels"][label] == "turboquant-operator"
    )


def test_without_an_operator_deletion_takes_object_and_children_at_once(
    serving: Any, workspace: Workspace, operator: OperatorProcess
) -> None:
    serving()
    operator.kill()
    workspace.delete(KIND, "gemma")
    assert not workspace.exists(KIND, "gemma")
    for kind in ("Deployment", "Service", "ConfigMap", "Pod"):
        assert eventually(lambda kind=kind: not workspace.all_of(kind, "app.kubernetes.io/instance=gemma"))


def test_changes_made_while_the_operator_was_away_are_caught_up(
    serving: Any, workspace: Workspace, operator: OperatorProcess
) -> None:
    serving()
    operator.kill()
    workspace.delete("Service", "gemma")
    workspace.scale("gemma", 2)
    workspace.create("other", GEMMA)
    operator.start()
    assert eventually(lambda: workspace.exists("Service", "gemma"), 30)
    assert eventually(lambda: workspace.get("Deployment", "gemma")["spec"]["replicas"] == 2)
    assert eventually(lambda: workspace.exists("Pod", "other-inspect"))


def test_restarted_operator_reads_no_model_again_and_rolls_nothing(
    serving: Any, workspace: Workspace, operator: OperatorProcess
) -> None:
    serving()
    before = {kind: version(workspace, kind) for kind in ("Deployment", "Service")}
    operator.kill()
    workspace.patch(KIND, "gemma", {"spec": {"replicas": 2}})
    operator.start()
    eventually(lambda: workspace.get("Deployment", "gemma")["spec"]["replicas"] == 2, 30)
    assert not workspace.exists("Pod", "gemma-inspect")
    assert version(workspace, "Service") == before["Service"]
    assert len(workspace.all_of("ReplicaSet")) == 1


def test_operator_that_sees_its_own_lease_is_alive(operator: OperatorProcess, workspace: Workspace) -> None:
    assert eventually(lambda: operator.health() == {"watch": "ok"})


def version(workspace: Workspace, kind: str) -> str:
    return str(workspace.get(kind, "gemma")["metadata"]["resourceVersion"])


@pytest.mark.parametrize("seconds", [0.0, 0.05, 0.1, 0.2, 0.4])
def test_operator_killed_in_a_rollout_converges_to_the_same_children(
    seconds: float, workspace: Workspace, kubelet: Kubelet, operator: OperatorProcess
) -> None:
    """SIGKILL at several times after the model is read, when the children are being made."""
    import time

    workspace.create("gemma", {**GEMMA, "replicas": 2})
    inspect(workspace, kubelet, "gemma")
    time.sleep(seconds)
    operator.kill()
    operator.start()
    for pod in eventually(lambda: len(pods := workspace.engine_pods("gemma")) == 2 and pods, 30):
        kubelet.ready(pod)
    eventually(lambda: workspace.condition("gemma", "Ready")["status"] == "True")
    owned = "app.kubernetes.io/managed-by=turboquant-operator"
    names = {
        (kind, child["metadata"]["name"])
        for kind in ("Deployment", "Service", "ConfigMap", "PodDisruptionBudget")
        for child in workspace.all_of(kind, owned)
    }
    assert names == {
        ("Deployment", "gemma"),
        ("Service", "gemma"),
        ("ConfigMap", "gemma-plan"),
        ("PodDisruptionBudget", "gemma"),
    }
    assert eventually(lambda: not workspace.exists("Pod", "gemma-inspect"))
    assert len(workspace.all_of("ReplicaSet")) == 1
