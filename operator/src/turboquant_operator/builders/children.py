"""The small children: Service, disruption budget, cache claim, and the ConfigMap with the plan."""

import hashlib
import json
from typing import Any

from turboquant_kernels.plans import KVPlan
from turboquant_operator.api import GROUP
from turboquant_operator.api.object import Identity
from turboquant_operator.api.spec import TurboQuantDeploymentSpec
from turboquant_operator.api.status import Plan
from turboquant_operator.builders.metadata import Manifest, child, plan_config_map_name, selector

DOCUMENT = "model.json"
"""Key of the plan's ConfigMap: the model as it was read, config and weight sizes."""
MODEL_SOURCE = f"{GROUP}/model-source"
"""Annotation of that ConfigMap, and of an inspection pod: which model it is about."""
MODEL_DIGEST = f"{GROUP}/model-digest"
"""Annotation of that ConfigMap: digest of the document, which gives an edit by hand away."""


def service(owner: Identity, spec: TurboQuantDeploymentSpec) -> Manifest:
    """The OpenAI-compatible endpoint."""
    manifest = child(
        owner,
        "v1",
        "Service",
        owner.name,
        spec={
            "type": spec.service.type,
            "selector": selector(owner.name),
            "ports": [{"name": "http", "port": spec.service.port, "targetPort": "http", "protocol": "TCP"}],
        },
    )
    if spec.service.annotations:
        manifest["metadata"]["annotations"] = dict(spec.service.annotations)
    return manifest


def endpoint(owner: Identity, spec: TurboQuantDeploymentSpec) -> str:
    """The base URL that an OpenAI client inside the cluster is given."""
    return f"http://{owner.name}.{owner.namespace}.svc:{spec.service.port}/v1"


def disruption_budget(owner: Identity) -> Manifest:
    """Lets a node drain take one replica at a time. None for a single replica: it would block every drain."""
    return child(
        owner,
        "policy/v1",
        "PodDisruptionBudget",
        owner.name,
        spec={"maxUnavailable": 1, "selector": {"matchLabels": selector(owner.name)}},
    )


def cache_claim(owner: Identity, spec: TurboQuantDeploymentSpec) -> Manifest | None:
    """The claim for downloaded weights, where the object gives it a size; else the user's own is mounted."""
    cache = spec.model.cache
    if cache is None or cache.size is None:
        return None
    claim: dict[str, Any] = {
        "accessModes": [cache.access_mode],
        "resources": {"requests": {"storage": cache.size}},
    }
    if cache.storage_class_name is not None:
        claim["storageClassName"] = cache.storage_class_name
    return child(owner, "v1", "PersistentVolumeClaim", cache.claim_name, spec=claim)


def plan_config_map(
    owner: Identity, plan: Plan | None, kv_plan: KVPlan | None, document: dict[str, Any], source: str
) -> Manifest:
    """The plan for people to read, and the model as it was read, so that none is read twice.

    `source` identifies the model that the document is of.
    """
    data = {DOCUMENT: _readable(document)}
    if plan is not None:
        data["plan.json"] = _readable(plan.model_dump(by_alias=True, mode="json"))
    if kv_plan is not None:
        data["kv-plan.json"] = _readable(kv_plan.to_dict())
    manifest = child(owner, "v1", "ConfigMap", plan_config_map_name(owner.name), data=data)
    manifest["metadata"]["annotations"] = {MODEL_SOURCE: source, MODEL_DIGEST: _digest(data[DOCUMENT])}
    return manifest


def stored_document(config_map: Manifest, source: str) -> dict[str, Any] | None:
    """The document in an object's ConfigMap, if it is of this source and as the operator wrote it."""
    annotations = config_map["metadata"].get("annotations", {})
    text = config_map.get("data", {}).get(DOCUMENT, "")
    if annotations.get(MODEL_SOURCE) != source or annotations.get(MODEL_DIGEST) != _digest(text):
        return None
    document: dict[str, Any] = json.loads(text)
    return document


def _readable(document: dict[str, Any]) -> str:
    return json.dumps(document, indent=2) + "\n"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
