"""The engine's Deployment: (object, plan) to a manifest."""

import math
from dataclasses import dataclass
from typing import Any

from turboquant_kernels.plans import KVPlan
from turboquant_operator.api.object import Identity
from turboquant_operator.api.spec import TurboQuantDeploymentSpec
from turboquant_operator.api.status import Plan
from turboquant_operator.builders.arguments import (
    CACHE_DIRECTORY,
    ENGINE_PORT,
    MODEL_DIRECTORY,
    WEIGHTS_DIRECTORY,
    claim_and_path,
    engine_arguments,
    engine_environment,
)
from turboquant_operator.builders.metadata import PLAN_HASH, Manifest, child, labels, selector
from turboquant_operator.planner.accelerators import GPU_RESOURCE, PRODUCT_LABEL, catalogue

STARTUP_PERIOD_SECONDS = 10
PROGRESS_MARGIN_SECONDS = 600
"""What a pod may take before its container starts (scheduling, a 10 GB image) on top of the engine's own
startup timeout, until the Deployment calls its rollout stuck."""

DRAIN_SECONDS = 10
"""From the pod's removal from the Service until the engine is told to stop: routes need to forget it."""
TERMINATION_SECONDS = 130
"""`DRAIN_SECONDS` and two minutes for answers that are being generated."""

SECURE_CONTAINER: dict[str, Any] = {
    "allowPrivilegeEscalation": False,
    "readOnlyRootFilesystem": True,
    "capabilities": {"drop": ["ALL"]},
}
SECURE_POD: dict[str, Any] = {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}
"""Together they meet the restricted Pod Security Standard."""

CACHE_GROUP = 65532
"""The runtime images' group: it owns the files of a cache claim, so that engines may write to a fresh one."""


@dataclass(frozen=True)
class Engine:
    """What the builders need besides the spec to write down an engine."""

    plan: Plan
    image: str
    revision: str = ""
    """Commit of a hub model; empty for other sources."""
    kv_plan: KVPlan | None = None


def deployment(owner: Identity, spec: TurboQuantDeploymentSpec, engine: Engine) -> Manifest:
    """The Deployment that runs `spec.replicas` engines, or none while suspended."""
    return child(
        owner,
        "apps/v1",
        "Deployment",
        owner.name,
        spec={
            "replicas": 0 if spec.suspend else spec.replicas,
            "selector": {"matchLabels": selector(owner.name)},
            "strategy": _strategy(spec.replicas),
            "progressDeadlineSeconds": spec.engine.startup_timeout_seconds + PROGRESS_MARGIN_SECONDS,
            "revisionHistoryLimit": 2,
            "template": _pod_template(owner, spec, engine),
        },
    )


def _strategy(replicas: int) -> dict[str, Any]:
    """Several replicas roll in place, one at a time, because spare GPUs are rare. The only replica stays
    until its successor is ready, because an endpoint that answers nothing is worse than a rollout that waits
    for a GPU; the object then says Unschedulable, and suspending it for a moment makes the room.
    """
    surge, unavailable = (0, 1) if replicas > 1 else (1, 0)
    return {
        "type": "RollingUpdate",
        "rollingUpdate": {"maxSurge": surge, "maxUnavailable": unavailable},
    }


def _pod_template(owner: Identity, spec: TurboQuantDeploymentSpec, engine: Engine) -> Manifest:
    pod = spec.pod
    # The user's labels first: none of them may break the selector.
    template_labels = {**pod.labels, **labels(owner.name), PLAN_HASH: engine.plan.hash}
    pod_spec: dict[str, Any] = {
        "automountServiceAccountToken": False,
        # A Service named vllm would otherwise set VLLM_PORT, which the engine reads as its own.
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": TERMINATION_SECONDS,
        "securityContext": _pod_security(spec),
        "containers": [_container(owner, spec, engine)],
        "volumes": _volumes(spec) + list(pod.volumes),
    }
    optional = {
        "nodeSelector": pod.node_selector,
        "tolerations": list(pod.tolerations),
        "affinity": affinity(pod.affinity, engine.plan.accelerator),
        "priorityClassName": pod.priority_class_name,
        "runtimeClassName": pod.runtime_class_name,
        "imagePullSecrets": [{"name": secret.name} for secret in pod.image_pull_secrets],
        "serviceAccountName": pod.service_account_name,
    }
    pod_spec |= {field: value for field, value in optional.items() if value}
    metadata: dict[str, Any] = {"labels": template_labels}
    if pod.annotations:
        metadata["annotations"] = dict(pod.annotations)
    return {"metadata": metadata, "spec": pod_spec}


def affinity(asked: dict[str, Any] | None, accelerator: str) -> dict[str, Any] | None:
    """The user's affinity, and that pods go to nodes of the GPU that was planned for.

    Nodes whose label names another GPU are left out; those without the label are not, since GPU feature
    discovery may be missing. Whoever writes a node affinity of their own decides alone.
    """
    gpu = catalogue().get(accelerator)
    if gpu is None or "nodeAffinity" in (asked or {}):
        return asked
    product = {"key": PRODUCT_LABEL, "operator": "In", "values": list(gpu.products)}
    unlabelled = {"key": PRODUCT_LABEL, "operator": "DoesNotExist"}
    terms = [{"matchExpressions": [product]}, {"matchExpressions": [unlabelled]}]
    required = {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": terms}}
    return {**(asked or {}), "nodeAffinity": required}


def _pod_security(spec: TurboQuantDeploymentSpec) -> dict[str, Any]:
    if spec.model.cache is None:
        return SECURE_POD
    return {**SECURE_POD, "fsGroup": CACHE_GROUP, "fsGroupChangePolicy": "OnRootMismatch"}


def _container(owner: Identity, spec: TurboQuantDeploymentSpec, engine: Engine) -> dict[str, Any]:
    container: dict[str, Any] = {
        "name": "engine",
        "image": engine.image,
        "args": engine_arguments(spec, owner.name, engine.plan, engine.revision, engine.kv_plan),
        "env": engine_environment(spec),
        "ports": [{"name": "http", "containerPort": ENGINE_PORT, "protocol": "TCP"}],
        "startupProbe": {
            **_health_check(),
            "periodSeconds": STARTUP_PERIOD_SECONDS,
            "failureThreshold": math.ceil(spec.engine.startup_timeout_seconds / STARTUP_PERIOD_SECONDS),
        },
        "readinessProbe": {**_health_check(), "periodSeconds": 5, "failureThreshold": 3},
        # Slower than readiness: a busy engine leaves the Service long before it would be restarted.
        "livenessProbe": {**_health_check(), "periodSeconds": 10, "failureThreshold": 12},
        "lifecycle": {"preStop": {"sleep": {"seconds": DRAIN_SECONDS}}},
        # The engine's last words reach the object's status even where it wrote no termination message.
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "securityContext": SECURE_CONTAINER,
        "volumeMounts": _mounts(spec) + list(spec.pod.volume_mounts),
    }
    resources = _resources(spec, engine.plan.gpus_per_replica)
    if resources:
        container["resources"] = resources
    return container


def _health_check() -> dict[str, Any]:
    return {"httpGet": {"path": "/health", "port": "http"}, "timeoutSeconds": 5}


def _resources(spec: TurboQuantDeploymentSpec, gpus: int) -> dict[str, Any]:
    resources = dict(spec.pod.resources or {})
    if gpus:
        # A limit alone: Kubernetes copies it to the request, and extended resources need the two equal.
        resources["limits"] = {**resources.get("limits", {}), GPU_RESOURCE: str(gpus)}
    return resources


def _volumes(spec: TurboQuantDeploymentSpec) -> list[dict[str, Any]]:
    volumes: list[dict[str, Any]] = [
        {"name": "tmp", "emptyDir": {}},
        {"name": "cache", "emptyDir": {}},
        # Tensor-parallel workers pass tensors through shared memory; the runtime's default is 64 MiB.
        {"name": "shm", "emptyDir": {"medium": "Memory"}},
    ]
    if spec.model.uri.startswith("pvc://"):
        claim, _ = claim_and_path(spec.model.uri)
        volumes.append({"name": "model", "persistentVolumeClaim": {"claimName": claim, "readOnly": True}})
    elif spec.model.cache is not None:
        claim = spec.model.cache.claim_name
        volumes.append({"name": "weights", "persistentVolumeClaim": {"claimName": claim}})
    else:
        volumes.append({"name": "weights", "emptyDir": {}})
    return volumes


def _mounts(spec: TurboQuantDeploymentSpec) -> list[dict[str, Any]]:
    mounts: list[dict[str, Any]] = [
        {"name": "tmp", "mountPath": "/tmp"},
        {"name": "cache", "mountPath": CACHE_DIRECTORY},
        {"name": "shm", "mountPath": "/dev/shm"},
    ]
    if spec.model.uri.startswith("pvc://"):
        mounts.append({"name": "model", "mountPath": MODEL_DIRECTORY, "readOnly": True})
    else:
        mounts.append({"name": "weights", "mountPath": WEIGHTS_DIRECTORY})
    return mounts
