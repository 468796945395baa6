"""What the status says, in each situation that an object can be in."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sample import OWNER, PLAN, deployment, pod, spec

from turboquant_operator.api.status import Plan, TurboQuantDeploymentStatus
from turboquant_operator.planner.outcome import NoPlan, refused, unfit, unknown
from turboquant_operator.problems import Problem
from turboquant_operator.status import (
    Event,
    Seen,
    conditions_by_type,
    events,
    failed_status,
    measured_capacity,
    next_status,
    refused_status,
)

NOW = datetime(2026, 1, 1, 12, tzinfo=UTC)
LATER = NOW + timedelta(hours=1)


def look(
    seen: Seen,
    asked: dict[str, Any] | None = None,
    previous: dict[str, Any] | None = None,
    now: datetime = NOW,
) -> dict[str, Any]:
    status = next_status(OWNER, spec(**(asked or {})), previous or {}, seen, now)
    return status.model_dump(by_alias=True, mode="json", exclude_none=True)


def told(status: dict[str, Any]) -> dict[str, tuple[str, str]]:
    """Status and reason by condition."""
    return {kind: (c["status"], c["reason"]) for kind, c in conditions_by_type(status).items()}


IMAGE = pod(containerStatuses=[{"name": "engine", "state": {"waiting": {"reason": "ErrImagePull"}}}])
READY = deployment(wanted=2, updated=2, ready=2)

SITUATIONS: dict[str, tuple[dict[str, Any], Seen, dict[str, tuple[str, str]]]] = {
    "nothing yet": (
        {},
        Seen(PLAN),
        {
            "Accepted": ("True", "Accepted"),
            "PlanFits": ("True", "Fits"),
            "Available": ("False", "NoReadyReplica"),
            "Progressing": ("True", "RollingOut"),
            "Degraded": ("False", "AsExpected"),
            "Ready": ("False", "RollingOut"),
        },
    ),
    "all ready": (
        {},
        Seen(PLAN, deployment=READY),
        {
            "Available": ("True", "EndpointReady"),
            "Progressing": ("False", "Complete"),
            "Ready": ("True", "ReplicasReady"),
        },
    ),
    "one of two ready": (
        {},
        Seen(PLAN, deployment=deployment(wanted=2, updated=2, ready=1)),
        {
            "Available": ("True", "EndpointReady"),
            "Progressing": ("True", "RollingOut"),
            "Ready": ("False", "RollingOut"),
        },
    ),
    "an old pod still there": (
        {},
        Seen(PLAN, deployment=deployment(wanted=1, updated=1, total=2, ready=2)),
        {"Available": ("True", "EndpointReady"), "Ready": ("False", "RollingOut")},
    ),
    "ready on an earlier plan": (
        {},
        Seen(PLAN.model_copy(update={"hash": "new"}), deployment=READY),
        {"Available": ("True", "EndpointReady"), "Ready": ("False", "RollingOut")},
    ),
    "change not yet seen by the Deployment's controller": (
        {},
        Seen(PLAN, deployment=deployment(wanted=2, updated=2, ready=2, observed=False)),
        {"Ready": ("False", "RollingOut")},
    ),
    "image missing": (
        {},
        Seen(PLAN, deployment=deployment(updated=1), pods=(IMAGE,)),
        {
            "Available": ("False", "NoReadyReplica"),
            "Progressing": ("True", "RollingOut"),
            "Degraded": ("True", "ImagePullFailed"),
            "Ready": ("False", "ImagePullFailed"),
        },
    ),
    "image missing for the change of a running object": (
        {},
        Seen(PLAN, deployment=deployment(wanted=1, updated=1, total=2, ready=1), pods=(IMAGE,)),
        {
            "Available": ("True", "EndpointReady"),
            "Degraded": ("True", "ImagePullFailed"),
            "Ready": ("False", "ImagePullFailed"),
        },
    ),
    "suspended": (
        {"suspend": True},
        Seen(PLAN, deployment=deployment(wanted=0)),
        {
            "PlanFits": ("True", "Fits"),
            "Available": ("False", "Suspended"),
            "Progressing": ("False", "Complete"),
            "Ready": ("False", "Suspended"),
        },
    ),
    "suspended and unfit": (
        {"suspend": True},
        Seen(unfit("InsufficientMemory", "too big")),
        {"PlanFits": ("False", "InsufficientMemory"), "Ready": ("False", "Suspended")},
    ),
    "plan only": (
        {"planOnly": True},
        Seen(PLAN),
        {
            "PlanFits": ("True", "Fits"),
            "Progressing": ("False", "PlanOnly"),
            "Ready": ("False", "PlanOnly"),
        },
    ),
    "plan only and unfit": (
        {"planOnly": True},
        Seen(unfit("InsufficientMemory", "too big")),
        {"PlanFits": ("False", "InsufficientMemory"), "Ready": ("False", "InsufficientMemory")},
    ),
    "scaled to zero": (
        {"replicas": 0},
        Seen(PLAN, deployment=deployment(wanted=0)),
        {"Available": ("False", "ScaledToZero"), "Ready": ("True", "ScaledToZero")},
    ),
    "unfit": (
        {},
        Seen(unfit("InsufficientMemory", "too big")),
        {
            "Accepted": ("True", "Accepted"),
            "PlanFits": ("False", "InsufficientMemory"),
            "Progressing": ("False", "NotStarted"),
            "Ready": ("False", "InsufficientMemory"),
        },
    ),
    "unfit while an earlier plan runs": (
        {},
        Seen(unfit("InsufficientMemory", "too big"), deployment=READY),
        {
            "PlanFits": ("False", "InsufficientMemory"),
            "Available": ("True", "EndpointReady"),
            "Ready": ("False", "InsufficientMemory"),
        },
    ),
    "model being read": (
        {},
        Seen(unknown("InspectingModel", "wait")),
        {
            "PlanFits": ("Unknown", "InspectingModel"),
            "Progressing": ("True", "InspectingModel"),
            "Ready": ("False", "InspectingModel"),
        },
    ),
    "refused by the planner": (
        {},
        Seen(refused("UnsupportedAttention", "MLA")),
        {
            "Accepted": ("False", "UnsupportedAttention"),
            "PlanFits": ("Unknown", "NotAccepted"),
            "Progressing": ("False", "NotStarted"),
            "Ready": ("False", "UnsupportedAttention"),
        },
    ),
    "refused by the API server": (
        {},
        Seen(PLAN, refusal=Problem("InvalidPod", "no such medium")),
        {
            "Accepted": ("False", "InvalidPod"),
            "PlanFits": ("True", "Fits"),
            "Progressing": ("False", "NotStarted"),
            "Ready": ("False", "InvalidPod"),
        },
    ),
    "obeyed against advice": (
        {},
        Seen(PLAN.model_copy(update={"reasons": ("Warning: key bias.",)})),
        {"Accepted": ("True", "AcceptedWithWarning")},
    ),
}


@pytest.mark.parametrize(("asked", "seen", "expected"), SITUATIONS.values(), ids=SITUATIONS)
def test_conditions_by_situation(
    asked: dict[str, Any], seen: Seen, expected: dict[str, tuple[str, str]]
) -> None:
    found = told(look(seen, {"replicas": 2, **asked}))
    assert {kind: found[kind] for kind in expected} == expected


@pytest.mark.parametrize(("asked", "seen", "_"), SITUATIONS.values(), ids=SITUATIONS)
def test_every_situation_has_every_condition_for_this_generation(
    asked: dict[str, Any], seen: Seen, _: object
) -> None:
    """What kstatus, Argo CD and `kubectl wait` look at."""
    status = look(seen, asked)
    assert set(told(status)) == {"Accepted", "PlanFits", "Available", "Progressing", "Degraded", "Ready"}
    assert status["observedGeneration"] == OWNER.generation
    for condition in status["conditions"]:
        assert condition["observedGeneration"] == OWNER.generation
        assert condition["reason"].isalnum()
        assert condition["reason"][0].isupper()


def test_time_of_a_condition_moves_only_with_its_status() -> None:
    first = look(Seen(unknown("HubUnreachable", "a")))
    same = look(Seen(unknown("HubUnreachable", "b")), previous=first, now=LATER)
    times = {c["type"]: c["lastTransitionTime"] for c in same["conditions"]}
    assert set(times.values()) == {"2026-01-01T12:00:00Z"}
    fits = look(Seen(PLAN), previous=same, now=LATER)
    moved = {c["type"] for c in fits["conditions"] if c["lastTransitionTime"] == "2026-01-01T13:00:00Z"}
    assert moved == {"PlanFits", "Progressing"}


def test_same_situation_gives_the_same_status_at_any_time() -> None:
    first = look(Seen(PLAN, deployment=READY, measured_tokens=(5, 6)))
    assert look(Seen(PLAN, deployment=READY, measured_tokens=(5, 6)), previous=first, now=LATER) == first


def test_numbers_of_the_deployment_are_those_of_the_status() -> None:
    status = look(Seen(PLAN, deployment=deployment(wanted=3, updated=3, ready=2)))
    assert (status["replicas"], status["readyReplicas"]) == (3, 2)
    assert status["endpoint"] == "http://llama.models.svc:8000/v1"
    assert "app.kubernetes.io/instance=llama" in status["selector"]


def test_plan_that_still_runs_stays_in_the_status() -> None:
    running = look(Seen(PLAN, deployment=READY))
    unfitting = Seen(unfit("InsufficientMemory", "x"), deployment=READY, measured_tokens=(7,))
    status = look(unfitting, previous=running)
    assert status["plan"] == running["plan"]
    assert status["capacity"]["measuredTokens"] == 7


def test_plan_that_nothing_runs_leaves_the_status() -> None:
    planned = look(Seen(PLAN))
    assert "plan" not in look(Seen(unfit("InsufficientMemory", "x")), previous=planned)


def test_capacity_is_the_minimum_and_the_sum_over_pods() -> None:
    capacity = measured_capacity(PLAN, (388_000, 400_000))
    assert capacity is not None
    assert (capacity.measured_tokens, capacity.total_tokens) == (388_000, 788_000)
    assert capacity.gain == "3.88"
    assert capacity.prediction_error_percent == "0.0"
    assert capacity.max_concurrency_at_context == "11.84"


def test_prediction_error_has_a_sign() -> None:
    capacity = measured_capacity(PLAN, (400_000,))
    assert capacity is not None
    assert capacity.prediction_error_percent == "-3.0"


def test_no_capacity_before_a_pod_has_told() -> None:
    assert measured_capacity(PLAN, ()) is None


def test_unparsable_spec_keeps_what_was_known() -> None:
    running = look(Seen(PLAN, deployment=READY))
    status = refused_status(OWNER, running, "InvalidSpec", "spec.replicas: no number", LATER)
    assert told(status)["Accepted"] == ("False", "InvalidSpec")
    assert told(status)["Ready"] == ("False", "InvalidSpec")
    assert told(status)["Available"] == ("True", "EndpointReady")
    assert status["plan"] == running["plan"]


def test_failed_pass_degrades_and_a_good_one_recovers() -> None:
    running = look(Seen(PLAN, deployment=READY))
    status = failed_status(OWNER, running, "boom", LATER)
    assert told(status)["Degraded"] == ("True", "InternalError")
    assert told(status)["Ready"] == ("True", "ReplicasReady")
    assert told(look(Seen(PLAN, deployment=READY), previous=status))["Degraded"] == ("False", "AsExpected")


def test_written_status_is_one_that_the_types_read() -> None:
    status = look(Seen(PLAN, deployment=READY, measured_tokens=(5,)))
    TurboQuantDeploymentStatus.model_validate(status)


def reasons(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    return [event.reason for event in events(before, after)]


def test_events_of_a_life() -> None:
    waits = look(Seen(unknown("InspectingModel", "wait")))
    planned = look(Seen(PLAN), previous=waits)
    pulling = look(Seen(PLAN, deployment=deployment(updated=1), pods=(IMAGE,)), previous=planned)
    ready = look(Seen(PLAN, deployment=READY), {"replicas": 2}, pulling)
    other: Plan | NoPlan = PLAN.model_copy(update={"hash": "new"})
    changed = look(Seen(other, deployment=READY), previous=ready)
    assert reasons({}, waits) == []
    assert reasons(waits, planned) == ["Planned"]
    assert reasons(planned, pulling) == ["ImagePullFailed"]
    assert reasons(pulling, ready) == ["Recovered", "Ready"]
    assert reasons(ready, changed) == ["PlanChanged"]
    assert reasons(ready, ready) == []


def test_refusal_is_a_warning_with_its_message() -> None:
    status = look(Seen(refused("UnsupportedAttention", "MLA is not supported")))
    assert events({}, status) == [Event("Warning", "UnsupportedAttention", "MLA is not supported")]
