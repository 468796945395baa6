"""An object's life: children, readiness, capacity, scaling, suspension, changes, deletion."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest
from gemma_object import GEMMA, inspect
from kubelet_player import Kubelet
from operator_process import OperatorProcess, Workspace, eventually

from turboquant_operator.api import KIND

pytestmark = pytest.mark.cluster

ENGINE_ADDRESS = "127.10.20.30"
"""A loopback address of the test's own, so that port 8000 is free on it."""
MEASURED = 81_920


@pytest.fixture
def engine() -> Iterator[None]:
    """Something that answers as a vLLM engine's /metrics does."""

    class Engine(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            labels = f'block_size="16",kv_cache_size_tokens="{MEASURED}",num_gpu_blocks="5121"'
            self.wfile.write(
                f"# TYPE vllm:cache_config_info gauge\nvllm:cache_config_info{{{labels}}} 1\n".encode()
            )

        def log_message(self, *_: Any) -> None:
            """Nothing on the test's output."""

    server = HTTPServer((ENGINE_ADDRESS, 8000), Engine)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield
    server.shutdown()


def ready_reason(workspace: Workspace, name: str = "gemma") -> str:
    return str(workspace.condition(name, "Ready")["reason"])


def test_object_becomes_ready_and_tells_its_endpoint(serving: Any, workspace: Workspace) -> None:
    status = serving()["status"]
    assert status["observedGeneration"] == 1
    assert (status["replicas"], status["readyReplicas"]) == (1, 1)
    assert status["endpoint"] == f"http://gemma.{workspace.namespace}.svc:8000/v1"
    truths = {condition["type"]: condition["status"] for condition in status["conditions"]}
    assert truths == {
        "Accepted": "True",
        "PlanFits": "True",
        "Available": "True",
        "Progressing": "False",
        "Degraded": "False",
        "Ready": "True",
    }


def test_children_are_the_objects_own(serving: Any, workspace: Workspace) -> None:
    uid = serving(replicas=2)["metadata"]["uid"]
    for kind, name in [
        ("Deployment", "gemma"),
        ("Service", "gemma"),
        ("PodDisruptionBudget", "gemma"),
        ("ConfigMap", "gemma-plan"),
    ]:
        [owner] = workspace.get(kind, name)["metadata"]["ownerReferences"]
        assert (owner["uid"], owner["controller"]) == (uid, True)
    assert not workspace.exists("Pod", "gemma-inspect")


def test_plan_is_readable_in_its_config_map(planned: Any, workspace: Workspace) -> None:
    plan = planned()["status"]["plan"]
    assert json.loads(workspace.get("ConfigMap", "gemma-plan")["data"]["plan.json"]) == plan


def test_nothing_is_written_when_nothing_changes(serving: Any, workspace: Workspace) -> None:
    serving()
    settled = workspace.get(KIND, "gemma")["metadata"]["resourceVersion"]
    # An event of a child brings a pass, which finds all as it should be.
    workspace.patch("Service", "gemma", {"metadata": {"labels": {"team": "a"}}})
    service = workspace.get("Service", "gemma")["metadata"]["resourceVersion"]
    workspace.create("other", GEMMA)
    eventually(lambda: workspace.exists("Pod", "other-inspect"))
    assert workspace.get(KIND, "gemma")["metadata"]["resourceVersion"] == settled
    assert workspace.get("Service", "gemma")["metadata"]["resourceVersion"] == service


def test_object_carries_no_finalizer_and_no_annotation_of_the_operator(serving: Any) -> None:
    metadata = serving()["metadata"]
    assert "finalizers" not in metadata
    assert "annotations" not in metadata


def test_capacity_is_read_from_the_running_engine(
    planned: Any, workspace: Workspace, kubelet: Kubelet, engine: None, operator: OperatorProcess
) -> None:
    plan = planned(replicas=2)["status"]["plan"]
    for pod in eventually(lambda: len(pods := workspace.engine_pods("gemma")) == 2 and pods):
        kubelet.ready(pod, ENGINE_ADDRESS)
    capacity = eventually(lambda: workspace.get(KIND, "gemma")["status"]["capacity"])
    eventually(lambda: workspace.get(KIND, "gemma")["status"]["capacity"]["totalTokens"] == 2 * MEASURED)
    assert capacity["measuredTokens"] == MEASURED
    assert capacity["gain"] == f"{MEASURED / plan['baselineTokens']:.2f}"
    error = (plan["predictedTokens"] - MEASURED) / MEASURED * 100
    assert capacity["predictionErrorPercent"] == f"{error:.1f}"
    assert capacity["maxConcurrencyAtContext"] == "10.00"
    label = f'{{name="gemma",namespace="{workspace.namespace}"}}'
    assert f"turboquant_deployment_measured_capacity_tokens{label} {float(MEASURED)}" in operator.metrics()


def test_series_vanish_with_the_object(planned: Any, workspace: Workspace, operator: OperatorProcess) -> None:
    planned()
    assert eventually(lambda: workspace.namespace in operator.metrics())
    workspace.delete(KIND, "gemma")
    assert eventually(lambda: workspace.namespace not in operator.metrics())


def test_scaling_changes_the_deployment_and_rolls_nothing(
    serving: Any, workspace: Workspace, kubelet: Kubelet
) -> None:
    serving()
    [first] = workspace.engine_pods("gemma")
    workspace.scale("gemma", 3)
    pods = eventually(lambda: len(pods := workspace.engine_pods("gemma")) == 3 and pods)
    assert first in pods
    assert eventually(lambda: workspace.exists("PodDisruptionBudget", "gemma"))


def test_replicas_of_an_autoscaler_are_not_fought(serving: Any, workspace: Workspace) -> None:
    serving()
    workspace.scale("gemma", 4)
    eventually(lambda: workspace.get("Deployment", "gemma")["spec"]["replicas"] == 4)
    workspace.patch(KIND, "gemma", {"spec": {"service": {"annotations": {"a": "b"}}}})
    eventually(lambda: workspace.get("Service", "gemma")["metadata"]["annotations"]["a"] == "b")
    assert workspace.get("Deployment", "gemma")["spec"]["replicas"] == 4
    assert workspace.get(KIND, "gemma")["spec"]["replicas"] == 4


def test_scale_subresource_tells_pods_and_their_selector(serving: Any, workspace: Workspace) -> None:
    status = serving(replicas=2)["status"]
    assert status["replicas"] == 2
    assert len(workspace.all_of("Pod", status["selector"])) == 2


def test_suspended_object_gives_its_pods_back_and_keeps_the_rest(serving: Any, workspace: Workspace) -> None:
    serving()
    workspace.patch(KIND, "gemma", {"spec": {"suspend": True}})
    eventually(lambda: workspace.engine_pods("gemma") == [])
    assert eventually(lambda: ready_reason(workspace) == "Suspended")
    assert workspace.get("Service", "gemma")["spec"]["ports"]
    workspace.patch(KIND, "gemma", {"spec": {"suspend": False}})
    assert eventually(lambda: len(workspace.engine_pods("gemma")) == 1)


def test_plan_only_object_has_a_plan_and_no_pod(planned: Any, workspace: Workspace) -> None:
    assert planned(planOnly=True)["status"]["plan"]["format"] == "tq-k4v4"
    assert ready_reason(workspace) == "PlanOnly"
    assert not workspace.exists("Deployment", "gemma")


def test_changed_plan_rolls_the_pods(serving: Any, workspace: Workspace, kubelet: Kubelet) -> None:
    serving()
    [old] = workspace.engine_pods("gemma")
    workspace.patch(KIND, "gemma", {"spec": {"kvCache": {"format": "tq-k8v4"}}})
    new = eventually(lambda: len(pods := workspace.engine_pods("gemma")) == 2 and (set(pods) - {old}).pop())
    assert eventually(lambda: ready_reason(workspace) == "RollingOut")
    kubelet.ready(new)
    assert eventually(lambda: workspace.engine_pods("gemma") == [new])
    assert eventually(lambda: workspace.condition("gemma", "Ready")["status"] == "True")


def test_spec_that_does_not_fit_leaves_what_runs(serving: Any, workspace: Workspace) -> None:
    plan = serving()["status"]["plan"]
    pods = workspace.engine_pods("gemma")
    workspace.patch(KIND, "gemma", {"spec": {"capacity": {"concurrentSequences": 100000}}})
    assert eventually(lambda: workspace.condition("gemma", "PlanFits")["status"] == "False")
    assert workspace.condition("gemma", "Ready")["status"] == "False"
    assert workspace.condition("gemma", "Available")["status"] == "True"
    assert workspace.engine_pods("gemma") == pods
    assert workspace.get(KIND, "gemma")["status"]["plan"] == plan


def test_unfit_object_can_still_be_suspended(serving: Any, workspace: Workspace) -> None:
    serving()
    workspace.patch(KIND, "gemma", {"spec": {"capacity": {"concurrentSequences": 100000}}})
    eventually(lambda: workspace.condition("gemma", "PlanFits")["status"] == "False")
    workspace.patch(KIND, "gemma", {"spec": {"suspend": True}})
    assert eventually(lambda: workspace.engine_pods("gemma") == [])


def test_changed_model_is_inspected_anew(serving: Any, workspace: Workspace) -> None:
    serving()
    workspace.patch(KIND, "gemma", {"spec": {"model": {"uri": "pvc://models/other"}}})
    pod = eventually(lambda: workspace.get("Pod", "gemma-inspect"))
    assert pod["spec"]["containers"][0]["args"] == ["/model/other"]
    assert len(workspace.engine_pods("gemma")) == 1


def test_pod_field_that_the_api_server_refuses_is_told_and_not_retried(
    kubelet: Kubelet, workspace: Workspace, operator: OperatorProcess
) -> None:
    workspace.create("gemma", {**GEMMA, "pod": {"volumes": [{"name": "tmp", "emptyDir": {}}]}})
    inspect(workspace, kubelet, "gemma")
    eventually(lambda: ready_reason(workspace) == "InvalidPod")
    condition = workspace.condition("gemma", "Accepted")
    assert condition["status"] == "False"
    assert 'duplicate entries for key [name="tmp"]' in condition["message"]
    assert not operator.errors(workspace.namespace)


def test_name_of_a_foreign_service_is_not_taken(planned: Any, workspace: Workspace) -> None:
    spec = {"ports": [{"port": 80}], "selector": {"app": "mine"}}
    workspace.make({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "gemma"}, "spec": spec})
    planned()
    assert eventually(lambda: ready_reason(workspace) == "NameTaken")
    assert workspace.get("Service", "gemma")["spec"]["selector"] == {"app": "mine"}


def test_claim_with_a_size_is_made(workspace: Workspace, operator: OperatorProcess) -> None:
    cache = {"claimName": "weights", "size": "20Gi", "accessMode": "ReadWriteMany"}
    architecture = {
        "layers": 2,
        "attentionHeads": 4,
        "keyValueHeads": 2,
        "headDim": 64,
        "contextLength": 1024,
    }
    model = {"uri": "hf://example/tiny", "architecture": architecture, "cache": cache}
    workspace.create("tiny", {**GEMMA, "model": model, "capacity": {"contextLength": 1024}})
    claim = eventually(lambda: workspace.get("PersistentVolumeClaim", "weights"))
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    assert claim["spec"]["resources"]["requests"]["storage"] == "20Gi"


def test_deletion_takes_the_children(serving: Any, workspace: Workspace) -> None:
    serving()
    workspace.delete(KIND, "gemma")
    for kind in ("Deployment", "Service", "ConfigMap", "Pod"):
        assert eventually(lambda kind=kind: not workspace.all_of(kind, "app.kubernetes.io/instance=gemma"))
