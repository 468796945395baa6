"""Where an object's model is read, and what the inspection pod has told of it. Pure.

A public hub model is read by the operator; all others by a pod (`builders.inspection`), whose termination
message is the model's document. The document is kept in the object's ConfigMap, so a model is read once.
"""

import hashlib
import json
from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Any

from turboquant_operator.api.object import Identity
from turboquant_operator.api.spec import TurboQuantDeploymentSpec
from turboquant_operator.builders.children import MODEL_SOURCE, stored_document
from turboquant_operator.builders.metadata import Manifest, inspection_pod_name, plan_config_map_name
from turboquant_operator.children import Children
from turboquant_operator.planner.facts import Document
from turboquant_operator.planner.outcome import NoPlan, unknown
from turboquant_operator.problems import last_words, pod_problem

INSPECTION_RETRY = timedelta(minutes=2)
"""How long a failed inspection stands, to be read by people too, before another is tried."""


def model_source(spec: TurboQuantDeploymentSpec) -> str:
    """Identifies the model that facts are of: they are read anew only when this changes."""
    model = spec.model
    secret = model.credentials_secret_ref
    parts = [model.uri, model.revision, secret.name if secret else ""]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def needs_inspection(spec: TurboQuantDeploymentSpec) -> bool:
    """Whether the model can only be read by a pod: it lies in a volume, or behind a Secret."""
    return spec.model.uri.startswith("pvc://") or spec.model.credentials_secret_ref is not None


def known_document(owner: Identity, children: Children, source: str) -> Document | None:
    """The model as an earlier pass has stored it, or as the inspection pod has just brought it."""
    config_map = children.get("ConfigMap", plan_config_map_name(owner.name))
    stored = stored_document(config_map, source) if config_map is not None else None
    if stored is not None:
        return stored
    pod = _inspection_pod(owner, children, source)
    ended = _ended(pod) if pod is not None else None
    if ended is None or ended.get("exitCode") != 0:
        return None
    try:
        document = json.loads(ended.get("message", ""))
    except ValueError:
        return None
    return document if isinstance(document, dict) else None


def waiting_for_inspection(owner: Identity, children: Children, source: str) -> NoPlan:
    """What the inspection pod keeps us waiting for, or why it failed."""
    pod = _inspection_pod(owner, children, source)
    if pod is None:
        return unknown("InspectingModel", "A pod is made that reads the model's configuration.")
    ended = _ended(pod)
    if ended is not None:
        why = last_words(ended.get("message", "")) or ended.get("reason", "it gave no reason")
        return unknown("ModelInspectionFailed", f"The model could not be read: {why}")
    problem = pod_problem(pod, children.mount_failures())
    if problem is not None:
        return unknown(problem.reason, f"Reading the model's configuration: {problem.message}")
    return unknown("InspectingModel", f"Pod {pod['metadata']['name']} reads the model's configuration.")


def is_spent(pod: Manifest, wanted: str | None, now: datetime) -> bool:
    """Whether an inspection pod has nothing more to say: it reads another model than the wanted one, none is
    wanted, or it has failed a while ago.
    """
    if _source_of(pod) != wanted:
        return True
    ended = _ended(pod)
    if ended is None:
        return False
    finished = ended.get("finishedAt") or pod["metadata"]["creationTimestamp"]
    return now - datetime.fromisoformat(finished) > INSPECTION_RETRY


def _source_of(pod: Manifest) -> str | None:
    source: str | None = pod["metadata"].get("annotations", {}).get(MODEL_SOURCE)
    return source


def _inspection_pod(owner: Identity, children: Children, source: str) -> Manifest | None:
    pod = children.get("Pod", inspection_pod_name(owner.name))
    if pod is None or _source_of(pod) != source:
        return None
    return pod


def _ended(pod: Manifest) -> Mapping[str, Any] | None:
    """How the pod's container ended, None while it has not. A pod that was evicted, or that ran into its
    deadline, may tell it of the pod alone.
    """
    status: Mapping[str, Any] = pod.get("status", {})
    for container in status.get("containerStatuses", ()):
        terminated: Mapping[str, Any] | None = container.get("state", {}).get("terminated")
        if terminated is not None:
            return terminated
    return status if status.get("phase") == "Failed" else None
