"""Plays the kubelet for tests: writes into pods' statuses what a real one would.

The test API server has controllers but no node, so pods stay Pending until a test says what became of them.
"""

import json
from datetime import UTC, datetime
from typing import Any

import kubernetes


def now() -> str:
    """The time, as statuses have it. Of the moment that is played: an inspection that failed long ago is
    tried anew."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def finished() -> dict[str, str]:
    """The times of a container that has just ended."""
    return {"startedAt": now(), "finishedAt": now()}


class Kubelet:
    """The fate of pods in one namespace."""

    def __init__(self, client: kubernetes.client.ApiClient, namespace: str) -> None:
        self._pods = kubernetes.client.CoreV1Api(client)
        self._namespace = namespace

    def inspected(self, pod: str, config: dict[str, Any], weights: dict[str, int]) -> None:
        """An inspection pod that has read a model."""
        message = json.dumps({"config": config, "weights": weights, "revision": ""})
        state = {"terminated": {"exitCode": 0, "reason": "Completed", "message": message, **finished()}}
        self._set(pod, "Succeeded", [_container("inspect", state)])

    def inspection_failed(self, pod: str, sentence: str) -> None:
        """An inspection pod that could not read its model."""
        state = {"terminated": {"exitCode": 1, "reason": "Error", "message": sentence, **finished()}}
        self._set(pod, "Failed", [_container("inspect", state)])

    def ready(self, pod: str, address: str = "127.0.0.1") -> None:
        """An engine that serves."""
        state = {"running": {"startedAt": now()}}
        self._set(
            pod,
            "Running",
            [_container("engine", state, ready=True)],
            podIP=address,
            podIPs=[{"ip": address}],
            conditions=[_condition("Ready", "True"), _condition("PodScheduled", "True")],
        )

    def image_pull_fails(self, pod: str, message: str) -> None:
        """An image that does not exist."""
        self._set(pod, "Pending", [_waiting("ImagePullBackOff", message)])

    def config_error(self, pod: str, message: str) -> None:
        """A Secret that a variable needs and that is not there."""
        self._set(pod, "Pending", [_waiting("CreateContainerConfigError", message)])

    def unschedulable(self, pod: str, message: str) -> None:
        """No node that fits: the scheduler's word, which the kubelet never sees."""
        condition = _condition("PodScheduled", "False", "Unschedulable", message)
        self._set(pod, "Pending", [], conditions=[condition])

    def crashed(self, pod: str, last_words: str, reason: str = "Error", exit_code: int = 1) -> None:
        """An engine that ended and waits to be restarted."""
        ended = {"exitCode": exit_code, "reason": reason, "message": last_words, **finished()}
        container = _waiting("CrashLoopBackOff", "back-off 10s restarting failed container")
        container |= {"lastState": {"terminated": ended}, "restartCount": 2}
        self._set(pod, "Running", [container])

    def failed_mount(self, pod: str, message: str) -> None:
        """A volume that cannot be mounted, which stands in an event alone."""
        found = self._pods.read_namespaced_pod(pod, self._namespace)
        now = kubernetes.client.CoreV1Event(
            metadata=kubernetes.client.V1ObjectMeta(generate_name=f"{pod}."),
            involved_object=kubernetes.client.V1ObjectReference(
                api_version="v1", kind="Pod", namespace=self._namespace, name=pod, uid=found.metadata.uid
            ),
            reason="FailedMount",
            message=message,
            type="Warning",
        )
        self._pods.create_namespaced_event(self._namespace, now)
        self._set(pod, "Pending", [_waiting("ContainerCreating", "")])

    def _set(self, pod: str, phase: str, containers: list[dict[str, Any]], **status: Any) -> None:
        for container in containers:
            container["containerID"] = f"test://{pod}/{container['name']}"
        body = {"status": {"phase": phase, "containerStatuses": containers, **status}}
        self._pods.patch_namespaced_pod_status(
            pod, self._namespace, body, _content_type="application/merge-patch+json"
        )


def _container(name: str, state: dict[str, Any], ready: bool = False) -> dict[str, Any]:
    return {
        "name": name,
        "image": "test",
        "imageID": "",
        "ready": ready,
        "restartCount": 0,
        "state": state,
    }


def _waiting(reason: str, message: str) -> dict[str, Any]:
    return _container("engine", {"waiting": {"reason": reason, "message": message}})


def _condition(kind: str, status: str, reason: str = "", message: str = "") -> dict[str, Any]:
    return {
        "type": kind,
        "status": status,
        "reason": reason,
        "message": message,
        "lastTransitionTime": now(),
    }
