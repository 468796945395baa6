"""What the object shows of its pods' problems."""

from typing import Any

import pytest
from sample import deployment, pod

from turboquant_operator.problems import LAST_WORDS, Problem, deployment_problem, last_words, pod_problem


def waiting(reason: str, message: str = "", **container: Any) -> dict[str, Any]:
    state = {"waiting": {"reason": reason, "message": message}}
    return pod(containerStatuses=[{"name": "engine", "ready": False, "state": state, **container}])


def ended(**terminated: Any) -> dict[str, Any]:
    return waiting("CrashLoopBackOff", restartCount=3, lastState={"terminated": terminated})


def unschedulable(message: str = "0/1 nodes") -> dict[str, Any]:
    condition = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": message}
    return pod(conditions=[condition])


@pytest.mark.parametrize(
    ("seen", "reason", "words"),
    [
        (waiting("ErrImagePull", "not found"), "ImagePullFailed", "not found"),
        (waiting("ImagePullBackOff", "Back-off"), "ImagePullFailed", "Back-off"),
        (waiting("InvalidImageName", "bad"), "ImagePullFailed", "bad"),
        (waiting("CreateContainerConfigError", 'secret "a"'), "CreateContainerConfigError", 'secret "a"'),
        (waiting("RunContainerError", "no runc"), "RunContainerError", "no runc"),
        (
            ended(exitCode=1, reason="Error", message="ValueError: x"),
            "CrashLoop",
            "3 restarts): ValueError: x",
        ),
        (ended(exitCode=2, reason="Error"), "CrashLoop", "exit code 2"),
        (ended(exitCode=0, reason="Completed"), "CrashLoop", "exit code 0"),
        (ended(exitCode=137, reason="OOMKilled"), "OOMKilled", "limits.memory"),
        (unschedulable(), "Unschedulable", "0/1 nodes"),
    ],
)
def test_problem_of_a_pod(seen: dict[str, Any], reason: str, words: str) -> None:
    problem = pod_problem(seen, {})
    assert problem is not None
    assert problem.reason == reason
    assert words in problem.message


def test_restarted_engine_shows_its_last_end_until_it_is_ready() -> None:
    container = {
        "name": "engine",
        "ready": False,
        "restartCount": 1,
        "state": {"running": {}},
        "lastState": {"terminated": {"exitCode": 1, "message": "boom"}},
    }
    problem = pod_problem(pod(containerStatuses=[container]), {})
    assert problem is not None
    assert "1 restart): boom" in problem.message
    assert pod_problem(pod(containerStatuses=[{**container, "ready": True}]), {}) is None


def test_last_words_begin_with_a_line() -> None:
    lines = [f"line {number:04}" for number in range(500)]
    words = last_words("\n".join(lines))
    assert words.splitlines() == lines[-len(words.splitlines()) :]
    assert len(words) <= LAST_WORDS


def test_last_words_are_the_end_of_a_long_message() -> None:
    problem = pod_problem(ended(exitCode=1, message="x" * 4000 + "the cause"), {})
    assert problem is not None
    assert problem.message.endswith("the cause")
    assert len(problem.message) < LAST_WORDS + 100


def test_failed_mount_counts_while_the_container_is_being_made() -> None:
    failures = {"uid-llama-abc-1": 'secret "tls" not found'}
    problem = pod_problem(waiting("ContainerCreating"), failures)
    assert problem == Problem("FailedMount", 'Pod llama-abc-1: secret "tls" not found')
    assert pod_problem(waiting("PodInitializing"), failures) is None
    assert pod_problem(waiting("ContainerCreating"), {}) is None


@pytest.mark.parametrize("phase", ["Failed", "Succeeded"])
def test_pod_that_has_ended_is_no_problem(phase: str) -> None:
    """Evicted pods stay; the ReplicaSet has made others."""
    assert pod_problem({**waiting("ErrImagePull"), "status": {"phase": phase}}, {}) is None


def test_pod_on_its_way_out_is_no_problem() -> None:
    seen = waiting("ErrImagePull")
    seen["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
    assert pod_problem(seen, {}) is None


def test_most_telling_problem_speaks_for_the_object() -> None:
    pods = [unschedulable(), waiting("ErrImagePull", "x"), ended(exitCode=137, reason="OOMKilled")]
    problem = deployment_problem(deployment(), pods, {})
    assert problem is not None
    assert problem.reason == "OOMKilled"


def test_choice_among_like_problems_does_not_depend_on_the_order_of_pods() -> None:
    pods = [waiting("ErrImagePull", "b"), waiting("ErrImagePull", "a")]
    assert deployment_problem(deployment(), pods, {}) == deployment_problem(deployment(), pods[::-1], {})


@pytest.mark.parametrize(
    ("condition", "reason"),
    [
        (
            {
                "type": "ReplicaFailure",
                "status": "True",
                "reason": "FailedCreate",
                "message": "exceeded quota",
            },
            "ReplicaFailure",
        ),
        (
            {
                "type": "Progressing",
                "status": "False",
                "reason": "ProgressDeadlineExceeded",
                "message": "late",
            },
            "ProgressDeadlineExceeded",
        ),
    ],
)
def test_problem_of_the_deployment(condition: dict[str, str], reason: str) -> None:
    problem = deployment_problem(deployment(conditions=(condition,)), [], {})
    assert problem == Problem(reason, condition["message"])


def test_pods_tell_more_than_the_deadline_that_they_missed() -> None:
    late = {"type": "Progressing", "status": "False", "reason": "ProgressDeadlineExceeded", "message": "late"}
    problem = deployment_problem(deployment(conditions=(late,)), [ended(exitCode=1, message="boom")], {})
    assert problem is not None
    assert problem.reason == "CrashLoop"


def test_healthy_pods_are_no_problem() -> None:
    running = pod(
        phase="Running", containerStatuses=[{"name": "engine", "ready": True, "state": {"running": {}}}]
    )
    assert deployment_problem(deployment(), [running, pod(phase="Pending")], {}) is None
