"""Names, labels and ownership that all children share."""

from typing import Any

from turboquant_operator.api import GROUP
from turboquant_operator.api.object import Identity

MANAGER = "turboquant-operator"
"""Field manager of every server-side apply, and the managed-by label by which children are watched."""

MANAGED_BY = "app.kubernetes.io/managed-by"
INSTANCE = "app.kubernetes.io/instance"
COMPONENT = "app.kubernetes.io/component"
ENGINE, INSPECTION = "engine", "inspection"

PLAN_HASH = f"{GROUP}/plan-hash"
"""Label of the pod template: a changed plan rolls, and a pod tells which plan it runs."""

MANIFEST_HASH = f"{GROUP}/manifest-hash"
"""Annotation of a child: the digest of what was applied, by which an unchanged child is not applied again."""

_INSPECT = "-inspect"

Manifest = dict[str, Any]


def plan_config_map_name(name: str) -> str:
    """The ConfigMap with an object's plan and model facts."""
    return f"{name}-plan"


def inspection_pod_name(name: str) -> str:
    """The pod that reads an object's model."""
    return name + _INSPECT


def object_of_pod(pod: str) -> str:
    """The name of the object whose pod has this name; of any other pod, a name that no object has."""
    inspected = pod.removesuffix(_INSPECT)
    # The Deployment's name, the ReplicaSet's hash, five characters of the pod's own.
    return inspected if inspected != pod else pod.rsplit("-", 2)[0]


def selector(name: str) -> dict[str, str]:
    """Labels by which Service, Deployment, disruption budget and autoscaler find the engine's pods.

    A Deployment's selector can never change, so nothing that may change is in it.
    """
    return {"app.kubernetes.io/name": "turboquant", INSTANCE: name, COMPONENT: ENGINE}


def labels(name: str, component: str = ENGINE) -> dict[str, str]:
    """The recommended labels of a child of the object `name`."""
    return {
        **selector(name),
        COMPONENT: component,
        "app.kubernetes.io/part-of": "turboquant",
        MANAGED_BY: MANAGER,
    }


def child(
    owner: Identity, api_version: str, kind: str, name: str, component: str = ENGINE, **body: Any
) -> Manifest:
    """A manifest with the metadata of a child; `body` holds its further top-level fields."""
    return {
        "apiVersion": api_version,
        "kind": kind,
        "metadata": {
            "namespace": owner.namespace,
            "name": name,
            "labels": labels(owner.name, component),
            "ownerReferences": [owner.owner_reference],
        },
        **body,
    }
