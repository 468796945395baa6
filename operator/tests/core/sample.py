"""Values that the tests of the pure core share: an object, a plan, children as the API server shows them."""

from typing import Any

from turboquant_operator.api.object import Identity
from turboquant_operator.api.spec import TurboQuantDeploymentSpec
from turboquant_operator.api.status import Plan
from turboquant_operator.builders.metadata import PLAN_HASH, labels

OWNER = Identity(namespace="models", name="llama", uid="uid-1", generation=3, resource_version="7")

SMALLEST: dict[str, Any] = {"model": {"uri": "hf://meta-llama/Llama-3.1-8B"}}

PLAN = Plan(
    format="tq-k5v3",
    key_bits=5,
    value_bits=3,
    tensor_parallel_size=2,
    accelerator="nvidia-h100-80gb",
    gpus_per_replica=2,
    context_length=32768,
    weightBytesPerGPU=8 * 10**9,
    kv_bytes_per_token=33792,
    baseline_kv_bytes_per_token=131072,
    baseline_tokens=100_000,
    predicted_tokens=388_000,
    reasons=("tq-k5v3 fits.",),
    hash="0123456789abcdef",
)


def spec(**fields: Any) -> TurboQuantDeploymentSpec:
    """The smallest spec with further fields, as in YAML."""
    return TurboQuantDeploymentSpec.model_validate({**SMALLEST, **fields})


def deployment(
    plan: Plan = PLAN,
    wanted: int = 1,
    updated: int = 0,
    total: int | None = None,
    ready: int = 0,
    observed: bool = True,
    conditions: tuple[dict[str, Any], ...] = (),
) -> dict[str, Any]:
    """A Deployment of the object with its controller's account of the pods."""
    return {
        "kind": "Deployment",
        "metadata": owned("llama") | {"generation": 5},
        "spec": {
            "replicas": wanted,
            "template": {"metadata": {"labels": {**labels("llama"), PLAN_HASH: plan.hash}}},
        },
        "status": {
            "observedGeneration": 5 if observed else 4,
            "replicas": updated if total is None else total,
            "updatedReplicas": updated,
            "readyReplicas": ready,
            "conditions": list(conditions),
        },
    }


def pod(name: str = "llama-abc-1", **status: Any) -> dict[str, Any]:
    """An engine pod with a status."""
    return {
        "kind": "Pod",
        "metadata": {
            "namespace": "models",
            "name": name,
            "uid": f"uid-{name}",
            "labels": {**labels("llama"), PLAN_HASH: PLAN.hash},
        },
        "status": status,
    }


def owned(name: str) -> dict[str, Any]:
    """Metadata of a child."""
    return {
        "namespace": "models",
        "name": name,
        "uid": f"uid-of-{name}",
        "creationTimestamp": "2026-01-01T00:00:00Z",
        "labels": labels("llama"),
        "ownerReferences": [OWNER.owner_reference],
    }
