"""What keeps the engine's pods from running: (Deployment, pods) to one problem with the pods' own words.

Kubernetes tells it in a dozen places; a user of the object should need to look at one. Pure.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

Manifest = Mapping[str, Any]

_WAITING = {
    "ErrImagePull": "ImagePullFailed",
    "ImagePullBackOff": "ImagePullFailed",
    "ErrImageNeverPull": "ImagePullFailed",
    "InvalidImageName": "ImagePullFailed",
    "ImageInspectError": "ImagePullFailed",
    "RegistryUnavailable": "ImagePullFailed",
    "SignatureValidationFailed": "ImagePullFailed",
    "CreateContainerConfigError": "CreateContainerConfigError",
    "CreateContainerError": "CreateContainerError",
    "RunContainerError": "RunContainerError",
    "CreatePodSandboxError": "CreatePodSandboxError",
}
"""Reasons of a waiting container that time alone does not cure, by the reason that the object shows."""

_MOST_TELLING = (
    "OOMKilled",
    "CrashLoop",
    "ImagePullFailed",
    "CreateContainerConfigError",
    "FailedMount",
    "Unschedulable",
)
"""Which problem speaks for the object where its pods have different ones; others follow after these."""

LAST_WORDS = 600
"""Characters of an engine's termination message that the object shows: the end, where the error is."""


@dataclass(frozen=True)
class Problem:
    """Reason and message as the object's conditions show them."""

    reason: str
    message: str


def deployment_problem(
    deployment: Manifest, pods: Iterable[Manifest], mount_failures: Mapping[str, str]
) -> Problem | None:
    """The most telling problem of a Deployment and its pods, None where all goes its way.

    `mount_failures`: what the kubelet says of volumes, by the uid of the pod.
    """
    found = [problem for pod in pods if (problem := pod_problem(pod, mount_failures))]
    found.sort(key=_rank)
    conditions = {c["type"]: c for c in deployment.get("status", {}).get("conditions", ())}
    refused = conditions.get("ReplicaFailure", {})
    if refused.get("status") == "True":
        found.append(Problem("ReplicaFailure", refused.get("message", "")))
    progress = conditions.get("Progressing", {})
    if progress.get("reason") == "ProgressDeadlineExceeded":
        found.append(Problem("ProgressDeadlineExceeded", progress.get("message", "")))
    return found[0] if found else None


def _rank(problem: Problem) -> tuple[int, str, str]:
    known = problem.reason in _MOST_TELLING
    place = _MOST_TELLING.index(problem.reason) if known else len(_MOST_TELLING)
    # The message as tie-breaker: pods come in no order, and the status must not flicker between two of them.
    return place, problem.reason, problem.message


def pod_problem(pod: Manifest, mount_failures: Mapping[str, str]) -> Problem | None:
    """What is wrong with one pod; None for one that runs, is on its way, or is going."""
    status = pod.get("status", {})
    if pod["metadata"].get("deletionTimestamp") or status.get("phase") in ("Succeeded", "Failed"):
        return None  # On its way out: the ReplicaSet has replaced it.
    name, mount_failure = pod["metadata"]["name"], mount_failures.get(pod["metadata"]["uid"])
    for container in (*status.get("initContainerStatuses", ()), *status.get("containerStatuses", ())):
        problem = _container_problem(name, container)
        if problem:
            return problem
        waits_for_volumes = container.get("state", {}).get("waiting", {}).get("reason") == "ContainerCreating"
        if waits_for_volumes and mount_failure:
            return Problem("FailedMount", f"Pod {name}: {mount_failure}")
    conditions: dict[str, Manifest] = {c["type"]: c for c in status.get("conditions", ())}
    scheduled = conditions.get("PodScheduled", {})
    if scheduled.get("status") == "False" and scheduled.get("reason") == "Unschedulable":
        return Problem("Unschedulable", f"No node takes a pod: {scheduled.get('message', '')}")
    return None


def _container_problem(pod: str, container: Manifest) -> Problem | None:
    state = container.get("state", {})
    waiting = state.get("waiting", {})
    if waiting.get("reason") in _WAITING:
        return Problem(_WAITING[waiting["reason"]], f"Pod {pod}: {waiting.get('message', waiting['reason'])}")
    # A restarted engine takes minutes to be ready again: until then its last end is what there is to know.
    before = {} if container.get("ready") else container.get("lastState", {}).get("terminated", {})
    ended = state.get("terminated") or before
    if ended.get("exitCode", 0) == 0 and waiting.get("reason") != "CrashLoopBackOff":
        return None
    if ended.get("reason") == "OOMKilled":
        return Problem(
            "OOMKilled",
            f"Pod {pod}: container {container['name']} was killed for want of memory "
            f"({_restarts(container)}); raise spec.pod.resources.limits.memory.",
        )
    words = last_words(ended.get("message", "")) or f"exit code {ended.get('exitCode')}"
    return Problem(
        "CrashLoop", f"Pod {pod}: container {container['name']} ended ({_restarts(container)}): {words}"
    )


def last_words(message: str) -> str:
    """The end of a termination message, from the start of a line where that is not too long."""
    message = message.strip()
    if len(message) <= LAST_WORDS:
        return message
    tail = message[-LAST_WORDS:]
    _, newline, whole_lines = tail.partition("\n")
    return whole_lines if newline else tail


def _restarts(container: Manifest) -> str:
    count = container.get("restartCount", 0)
    return f"{count} restart" + ("" if count == 1 else "s")


def is_ready(pod: Manifest) -> bool:
    """Whether a pod passes its readiness probe and is not going."""
    conditions = pod.get("status", {}).get("conditions", ())
    ready = any(c["type"] == "Ready" and c["status"] == "True" for c in conditions)
    return ready and not pod["metadata"].get("deletionTimestamp")
