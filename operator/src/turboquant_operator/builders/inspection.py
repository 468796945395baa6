"""The inspection pod: reads a model where it lies and hands its facts back in the termination message.

The operator itself never mounts a volume and never reads a Secret.
"""

from typing import Any

from turboquant_operator.api.object import Identity
from turboquant_operator.api.spec import TurboQuantDeploymentSpec
from turboquant_operator.builders.arguments import (
    MODEL_DIRECTORY,
    claim_and_path,
    credentials,
    model_path,
)
from turboquant_operator.builders.children import MODEL_SOURCE
from turboquant_operator.builders.deployment import SECURE_CONTAINER, SECURE_POD
from turboquant_operator.builders.metadata import INSPECTION, Manifest, child, inspection_pod_name

TIMEOUT_SECONDS = 600
"""From the pod's start until it is killed: a config and the headers of the weight files are small."""


def inspection_pod(owner: Identity, spec: TurboQuantDeploymentSpec, image: str, source: str) -> Manifest:
    """A short pod of the runtime image. No GPU: it reads a config and the headers of the weights.

    It is annotated with the model that it reads: a pod that reads another one is replaced.
    """
    pod = spec.pod
    volumes: list[dict[str, Any]] = [{"name": "tmp", "emptyDir": {}}]
    mounts: list[dict[str, Any]] = [{"name": "tmp", "mountPath": "/tmp"}]
    arguments = [model_path(spec.model.uri)]
    if spec.model.uri.startswith("pvc://"):
        claim, _ = claim_and_path(spec.model.uri)
        volumes.append({"name": "model", "persistentVolumeClaim": {"claimName": claim, "readOnly": True}})
        mounts.append({"name": "model", "mountPath": MODEL_DIRECTORY, "readOnly": True})
    else:
        arguments = [spec.model.uri]
        if spec.model.revision:
            arguments += ["--revision", spec.model.revision]
    pod_spec: dict[str, Any] = {
        "restartPolicy": "Never",
        "activeDeadlineSeconds": TIMEOUT_SECONDS,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "securityContext": SECURE_POD,
        "containers": [
            {
                "name": "inspect",
                "image": image,
                "command": ["python3", "-m", "turboquant_runtime.inspect"],
                "args": arguments,
                "env": [
                    {"name": "HOME", "value": "/tmp"},
                    *credentials(spec),
                    *_hub_environment(spec),
                ],
                "resources": {
                    "requests": {"cpu": "100m", "memory": "256Mi"},
                    "limits": {"cpu": "1", "memory": "1Gi"},
                },
                "terminationMessagePolicy": "FallbackToLogsOnError",
                "securityContext": SECURE_CONTAINER,
                "volumeMounts": mounts,
            }
        ],
        "volumes": volumes,
    }
    # It must be able to run where the engine may: same nodes, same registry. Its own small resources.
    optional = {
        "nodeSelector": pod.node_selector,
        "tolerations": list(pod.tolerations),
        "affinity": pod.affinity,
        "imagePullSecrets": [{"name": secret.name} for secret in pod.image_pull_secrets],
        "serviceAccountName": pod.service_account_name,
    }
    pod_spec |= {field: value for field, value in optional.items() if value}
    manifest = child(owner, "v1", "Pod", inspection_pod_name(owner.name), INSPECTION, spec=pod_spec)
    manifest["metadata"]["annotations"] = {MODEL_SOURCE: source}
    return manifest


def _hub_environment(spec: TurboQuantDeploymentSpec) -> list[dict[str, Any]]:
    """The user's HF_* variables (endpoint, offline mode), which decide where the engine finds the model."""
    return [
        variable.model_dump(by_alias=True, exclude_none=True)
        for variable in spec.engine.env
        if variable.name.startswith("HF_") and variable.name != "HF_HOME"
    ]
