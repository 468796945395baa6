"""Which children an object should have, as a table of situations."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sample import OWNER, PLAN, deployment, owned, pod, spec

from turboquant_operator.api.spec import TurboQuantDeploymentSpec
from turboquant_operator.api.status import Plan
from turboquant_operator.builders.children import MODEL_SOURCE, plan_config_map
from turboquant_operator.children import Children
from turboquant_operator.inspection import (
    known_document,
    model_source,
    needs_inspection,
    waiting_for_inspection,
)
from turboquant_operator.planner.outcome import NoPlan, unfit, unknown
from turboquant_operator.reconcile import Desired, Images, Planned, desired, is_applied, marked

NOW = datetime(2026, 1, 1, 12, tzinfo=UTC)
IMAGES = Images(gpu="gpu:1", cpu="cpu:1")
DOCUMENT = {"config": {"architectures": ["LlamaForCausalLM"]}, "weights": {"BF16": 16}, "revision": "c0ffee"}


def decide(
    asked: TurboQuantDeploymentSpec, outcome: Plan | NoPlan, *children: dict[str, Any], inspect: bool = False
) -> Desired:
    document = None if inspect else DOCUMENT
    planned = Planned("source-1", outcome, document, inspect=inspect)
    return desired(OWNER, asked, planned, having(*children), IMAGES, NOW)


def having(*children: dict[str, Any]) -> Children:
    return Children({(c["kind"], c["metadata"]["name"]): c for c in children})


def kinds(manifests: tuple[dict[str, Any], ...]) -> list[str]:
    return [manifest["kind"] for manifest in manifests]


def inspection(
    phase: str = "Pending", source: str = "source-1", message: str = "", age: int = 0
) -> dict[str, Any]:
    finished = (NOW - timedelta(seconds=age)).isoformat()
    ended = {"message": message, "finishedAt": finished, "exitCode": 0 if phase == "Succeeded" else 1}
    state = {"terminated": ended} if phase in ("Succeeded", "Failed") else {"running": {}}
    return {
        "kind": "Pod",
        "metadata": owned("llama-inspect") | {"annotations": {MODEL_SOURCE: source}},
        "status": {"phase": phase, "containerStatuses": [{"name": "inspect", "state": state}]},
    }


def killed(reason: str) -> dict[str, Any]:
    """An inspection whose container was killed, and whose pod does not say so yet."""
    ended = inspection("Running")
    ended["status"]["containerStatuses"][0]["state"] = {"terminated": {"exitCode": 137, "reason": reason}}
    return ended


def evicted(message: str) -> dict[str, Any]:
    return inspection() | {"status": {"phase": "Failed", "reason": "Evicted", "message": message}}


BUDGET = {"kind": "PodDisruptionBudget", "metadata": owned("llama")}
UNFIT = unfit("InsufficientMemory", "too big")
WAITING = unknown("InspectingModel", "wait")
CACHE = {"uri": "hf://a/b", "cache": {"claimName": "weights", "size": "1Gi"}}


@pytest.mark.parametrize(
    ("asked", "outcome", "applied"),
    [
        (spec(), PLAN, ["ConfigMap", "Service", "Deployment"]),
        (spec(replicas=2), PLAN, ["ConfigMap", "Service", "Deployment", "PodDisruptionBudget"]),
        (spec(replicas=2, suspend=True), PLAN, ["ConfigMap", "Service", "Deployment"]),
        (spec(model=CACHE), PLAN, ["ConfigMap", "PersistentVolumeClaim", "Service", "Deployment"]),
        (spec(planOnly=True), PLAN, ["ConfigMap"]),
        (spec(), UNFIT, ["ConfigMap"]),
    ],
    ids=["one replica", "two replicas", "suspended", "cache of a size", "plan only", "unfit"],
)
def test_children_by_situation(
    asked: TurboQuantDeploymentSpec, outcome: Plan | NoPlan, applied: list[str]
) -> None:
    assert kinds(decide(asked, outcome).apply) == applied


def test_unread_model_gets_an_inspection_pod_and_nothing_else() -> None:
    assert kinds(decide(spec(), WAITING, inspect=True).apply) == ["Pod"]


def test_inspection_pod_is_not_made_twice() -> None:
    assert decide(spec(), WAITING, inspection(), inspect=True) == Desired()


def test_inspection_pod_goes_when_the_model_is_known() -> None:
    assert kinds(decide(spec(), PLAN, inspection("Succeeded")).delete) == ["Pod"]


def test_inspection_pod_of_another_model_goes() -> None:
    assert kinds(decide(spec(), WAITING, inspection(source="source-0"), inspect=True).delete) == ["Pod"]


@pytest.mark.parametrize(("age", "deleted"), [(60, []), (180, ["Pod"])])
def test_failed_inspection_is_tried_again_after_a_while(age: int, deleted: list[str]) -> None:
    assert kinds(decide(spec(), WAITING, inspection("Failed", age=age), inspect=True).delete) == deleted


def test_children_of_others_are_not_the_objects_own() -> None:
    foreign = {"kind": "Service", "metadata": owned("llama") | {"ownerReferences": []}}
    engine = pod()
    assert having(foreign, engine, BUDGET).owned_by(OWNER) == having(engine, BUDGET)


def test_budget_goes_with_the_second_replica() -> None:
    assert kinds(decide(spec(), PLAN, BUDGET).delete) == ["PodDisruptionBudget"]


@pytest.mark.parametrize("asked", [{"replicas": 3}, {"replicas": 3, "planOnly": True}])
def test_running_deployment_without_a_fitting_plan_is_left_alone(asked: dict[str, Any]) -> None:
    found = decide(spec(**asked), UNFIT, deployment(wanted=2))
    assert kinds(found.apply) == ["ConfigMap"]
    assert found.merge == ()


@pytest.mark.parametrize(("asked", "replicas"), [({"suspend": True}, 0), ({"replicas": 1}, 1)])
def test_running_deployment_without_a_plan_can_shrink(asked: dict[str, Any], replicas: int) -> None:
    [part] = decide(spec(**asked), UNFIT, deployment(wanted=2)).merge
    assert part["spec"] == {"replicas": replicas}


def test_image_is_the_users_then_that_of_the_accelerator() -> None:
    assert IMAGES.of(spec()) == "gpu:1"
    assert IMAGES.of(spec(accelerator={"type": "cpu"})) == "cpu:1"
    assert IMAGES.of(spec(engine={"image": "own:1"})) == "own:1"


@pytest.mark.parametrize(
    ("model", "pod_needed"),
    [
        ({"uri": "hf://a/b"}, False),
        ({"uri": "hf://a/b", "credentialsSecretRef": {"name": "token"}}, True),
        ({"uri": "pvc://claim/path"}, True),
    ],
)
def test_what_only_a_pod_can_read(model: dict[str, Any], pod_needed: bool) -> None:
    assert needs_inspection(spec(model=model)) is pod_needed


def test_model_is_another_by_uri_revision_and_credentials_alone() -> None:
    base = model_source(spec(model={"uri": "hf://a/b"}))
    assert model_source(spec(model={"uri": "hf://a/b", "servedName": "x"}, replicas=3)) == base
    for other in (
        {"uri": "hf://a/c"},
        {"uri": "hf://a/b", "revision": "v2"},
        {"uri": "hf://a/b", "credentialsSecretRef": {"name": "t"}},
    ):
        assert model_source(spec(model=other)) != base


def test_document_comes_from_the_config_map_before_the_pod() -> None:
    stored = plan_config_map(OWNER, None, None, DOCUMENT, "source-1")
    pod = inspection("Succeeded", message='{"config": {}}')
    assert known_document(OWNER, having(stored, pod), "source-1") == DOCUMENT
    assert known_document(OWNER, having(pod), "source-1") == {"config": {}}


@pytest.mark.parametrize(
    "pod",
    [
        inspection("Running"),
        inspection("Failed", message='{"config": {}}'),
        inspection("Succeeded", message="no JSON"),
        inspection("Succeeded", message="[]"),
        inspection("Succeeded", source="source-0", message='{"config": {}}'),
    ],
    ids=["running", "failed", "not JSON", "not an object", "another model"],
)
def test_pod_that_brings_no_document(pod: dict[str, Any]) -> None:
    assert known_document(OWNER, having(pod), "source-1") is None


@pytest.mark.parametrize(
    ("pod", "reason", "words"),
    [
        (None, "InspectingModel", ""),
        (inspection("Running"), "InspectingModel", ""),
        (inspection("Failed", message="no config.json in /model"), "ModelInspectionFailed", "no config.json"),
        (inspection("Succeeded", message="garbage"), "ModelInspectionFailed", "garbage"),
        (killed("OOMKilled"), "ModelInspectionFailed", "OOMKilled"),
        (evicted("The node was low on resource: memory."), "ModelInspectionFailed", "low on resource"),
    ],
    ids=["none", "running", "failed", "garbage", "killed", "evicted"],
)
def test_what_an_object_waits_for(pod: dict[str, Any] | None, reason: str, words: str) -> None:
    children = having(pod) if pod else having()
    outcome = waiting_for_inspection(OWNER, children, "source-1")
    assert (outcome.type, outcome.status, outcome.reason) == ("PlanFits", "Unknown", reason)
    assert words in outcome.message


MANIFEST = marked({"kind": "Service", "metadata": {"name": "a"}, "spec": {"ports": [{"port": 1}], "x": {}}})


def live(**spec_fields: Any) -> dict[str, Any]:
    """The manifest as the API server shows it, with what others have added."""
    metadata = {**MANIFEST["metadata"], "uid": "u", "labels": {"foreign": "1"}}
    return {
        "kind": "Service",
        "metadata": metadata,
        "spec": {"ports": [{"port": 1, "nodePort": 5}], **spec_fields},
    }


def test_child_with_fields_of_others_counts_as_applied() -> None:
    assert is_applied(MANIFEST, live(sessionAffinity="None"))


@pytest.mark.parametrize(
    "drifted",
    [None, live(ports=[{"port": 2}]), live(ports=[]), live(ports=[{"port": 1}, {"port": 2}])],
    ids=["missing", "value", "fewer", "more"],
)
def test_drift_is_seen(drifted: dict[str, Any] | None) -> None:
    assert not is_applied(MANIFEST, drifted)


def test_field_that_the_manifest_no_longer_has_is_seen() -> None:
    without = marked({"kind": "Service", "metadata": {"name": "a"}, "spec": {"ports": [{"port": 1}]}})
    assert not is_applied(without, live())
