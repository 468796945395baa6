"""What keeps pods from running stands on the object within ten seconds, with the pods' own words."""

from typing import Any

import pytest
from kubelet_player import Kubelet
from operator_process import PROMPTLY, Workspace, eventually

pytestmark = pytest.mark.cluster


@pytest.fixture
def pod(planned: Any, workspace: Workspace) -> str:
    """The engine pod of a fresh object `gemma`."""
    planned()
    [name] = eventually(lambda: workspace.engine_pods("gemma"))
    return str(name)


def told(workspace: Workspace, reason: str, words: str) -> bool:
    """Whether Degraded and Ready both tell it, in time."""

    def look() -> bool:
        for kind, status in (("Degraded", "True"), ("Ready", "False")):
            condition = workspace.condition("gemma", kind)
            assert (condition["status"], condition["reason"]) == (status, reason)
            assert words in condition["message"]
        return True

    return eventually(look, PROMPTLY)


def test_image_that_cannot_be_pulled(pod: str, kubelet: Kubelet, workspace: Workspace) -> None:
    kubelet.image_pull_fails(pod, "registry.test/runtime:cpu: not found")
    assert told(workspace, "ImagePullFailed", "registry.test/runtime:cpu: not found")


def test_pod_that_no_node_takes(pod: str, kubelet: Kubelet, workspace: Workspace) -> None:
    kubelet.unschedulable(pod, "0/3 nodes are available: 3 Insufficient nvidia.com/gpu.")
    assert told(workspace, "Unschedulable", "3 Insufficient nvidia.com/gpu")


def test_missing_secret(pod: str, kubelet: Kubelet, workspace: Workspace) -> None:
    kubelet.config_error(pod, 'secret "hf-token" not found')
    assert told(workspace, "CreateContainerConfigError", 'secret "hf-token" not found')


def test_crash_loop_with_the_engines_last_words(pod: str, kubelet: Kubelet, workspace: Workspace) -> None:
    kubelet.crashed(pod, "ValueError: head_dim 72 is not one of ...")
    assert told(workspace, "CrashLoop", "ValueError: head_dim 72")


def test_out_of_memory_kill(pod: str, kubelet: Kubelet, workspace: Workspace) -> None:
    kubelet.crashed(pod, "", reason="OOMKilled", exit_code=137)
    assert told(workspace, "OOMKilled", "resources.limits.memory")


def test_volume_that_cannot_be_mounted(pod: str, kubelet: Kubelet, workspace: Workspace) -> None:
    kubelet.failed_mount(pod, 'MountVolume.SetUp failed: secret "tls" not found')
    assert told(workspace, "FailedMount", 'secret "tls" not found')


def test_quota_that_refuses_pods(planned: Any, workspace: Workspace) -> None:
    quota = {"apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "none"}}
    workspace.make({**quota, "spec": {"hard": {"limits.memory": "1Gi"}}})
    eventually(lambda: workspace.get("ResourceQuota", "none")["status"]["hard"])
    planned(pod={"resources": {"limits": {"memory": "8Gi"}, "requests": {"memory": "8Gi"}}})
    assert told(workspace, "ReplicaFailure", "exceeded quota")


def test_problem_that_is_over_leaves_the_object(pod: str, kubelet: Kubelet, workspace: Workspace) -> None:
    kubelet.image_pull_fails(pod, "not found")
    eventually(lambda: workspace.condition("gemma", "Degraded")["status"] == "True")
    kubelet.ready(pod)
    assert eventually(lambda: workspace.condition("gemma", "Degraded")["status"] == "False")
    assert eventually(lambda: workspace.condition("gemma", "Ready")["status"] == "True")


def test_inspection_pod_that_cannot_start(kubelet: Kubelet, workspace: Workspace, operator: Any) -> None:
    workspace.create("gemma", {"model": {"uri": "pvc://missing"}})
    eventually(lambda: workspace.exists("Pod", "gemma-inspect"))
    kubelet.unschedulable("gemma-inspect", 'persistentvolumeclaim "missing" not found')
    assert eventually(lambda: workspace.condition("gemma", "PlanFits")["reason"] == "Unschedulable")
    assert 'persistentvolumeclaim "missing" not found' in workspace.condition("gemma", "Ready")["message"]


def test_inspection_that_finds_no_model(kubelet: Kubelet, workspace: Workspace, operator: Any) -> None:
    workspace.create("gemma", {"model": {"uri": "pvc://models/gemma"}})
    eventually(lambda: workspace.exists("Pod", "gemma-inspect"))
    kubelet.inspection_failed("gemma-inspect", "/model/gemma has no config.json")
    assert eventually(lambda: workspace.condition("gemma", "PlanFits")["reason"] == "ModelInspectionFailed")
    assert "/model/gemma has no config.json" in workspace.condition("gemma", "Ready")["message"]
