"""`status` and the events of an object: what the operator tells its user. Pure.

`next_status` turns what one reconcile has seen into the whole status; conditions are metav1.Condition and
move their time only with their status. `events` are the differences worth a line in `kubectl describe`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal

from pydantic import ValidationError

from turboquant_operator.api.object import Identity
from turboquant_operator.api.spec import TurboQuantDeploymentSpec
from turboquant_operator.api.status import (
    Condition,
    MeasuredCapacity,
    ModelStatus,
    Plan,
    TurboQuantDeploymentStatus,
)
from turboquant_operator.builders.children import endpoint
from turboquant_operator.builders.metadata import PLAN_HASH, selector
from turboquant_operator.planner.outcome import NoPlan
from turboquant_operator.problems import Manifest, Problem, deployment_problem

WARNING = "Warning: "
"""Begins a reason of the plan that obeys the spec against advice."""

ON_THE_WAY = ("InspectingModel", "ReadingModel")
"""Reasons of an unknown plan that pass by themselves in seconds."""

Truth = Literal["True", "False", "Unknown"]


@dataclass(frozen=True)
class Seen:
    """What one reconcile knows of an object when it writes the status."""

    outcome: Plan | NoPlan
    """The plan of the present spec, or why there is none."""
    model: ModelStatus | None = None
    deployment: Manifest | None = None
    pods: tuple[Manifest, ...] = ()
    """The engine's pods, of this and of earlier plans."""
    mount_failures: Mapping[str, str] = field(default_factory=dict)
    """What the kubelet says of volumes, by the uid of the pod."""
    measured_tokens: tuple[int, ...] = ()
    """Capacity that each ready pod of the present plan reports."""
    refusal: Problem | None = None
    """What the API server, or another owner's object, refused of the children."""


@dataclass(frozen=True)
class Rollout:
    """How far the Deployment is on the present plan."""

    wanted: int
    ready: int
    """Ready pods of the present plan."""
    any_ready: int
    """Ready pods of whatever plan."""
    complete: bool
    """All wanted replicas are ready on the present plan and no other pod is left."""


@dataclass(frozen=True)
class Event:
    """One event for `kubectl describe`."""

    type: Literal["Normal", "Warning"]
    reason: str
    message: str


@dataclass
class _Conditions:
    """Collects conditions; the time of one moves only when its status differs from before."""

    generation: int
    previous: Mapping[str, Mapping[str, Any]]
    now: datetime
    found: dict[str, Condition] = field(default_factory=dict)

    def set(self, kind: str, status: Truth, reason: str, message: str = "") -> None:
        before = self.previous.get(kind, {})
        moved = self.now.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        self.found[kind] = Condition(
            type=kind,
            status=status,
            reason=reason,
            message=message,
            observed_generation=self.generation,
            last_transition_time=before["lastTransitionTime"] if before.get("status") == status else moved,
        )


def conditions_by_type(status: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The conditions of a raw status by their type."""
    return {condition["type"]: condition for condition in status.get("conditions", ())}


def next_status(
    owner: Identity,
    spec: TurboQuantDeploymentSpec,
    previous: Mapping[str, Any],
    seen: Seen,
    now: datetime,
) -> TurboQuantDeploymentStatus:
    """The status that the object should have. `previous` is its present one, as raw JSON."""
    before = _read(previous)
    if isinstance(seen.outcome, Plan):
        plan: Plan | None = seen.outcome
    else:  # The last one, as long as pods run on it.
        plan = before.plan if _runs(seen.deployment, before.plan) else None
    rollout = rollout_of(seen.deployment, plan)
    conditions = _Conditions(owner.generation, conditions_by_type(previous), now)
    _judge(conditions, spec, seen, rollout)
    return TurboQuantDeploymentStatus(
        observed_generation=owner.generation,
        conditions=tuple(conditions.found.values()),
        replicas=_count(seen.deployment, "replicas"),
        ready_replicas=_count(seen.deployment, "readyReplicas"),
        selector=",".join(f"{key}={value}" for key, value in selector(owner.name).items()),
        endpoint=endpoint(owner, spec) if seen.deployment is not None else None,
        model=seen.model or (before.model if plan is not None else None),
        plan=plan,
        capacity=measured_capacity(plan, seen.measured_tokens)
        if plan and _runs(seen.deployment, plan)
        else None,
    )


def refused_status(
    owner: Identity, previous: Mapping[str, Any], reason: str, message: str, now: datetime
) -> dict[str, Any]:
    """The status of an object whose spec cannot even be parsed; all else stays as it was."""
    conditions = _Conditions(owner.generation, conditions_by_type(previous), now)
    conditions.set("Accepted", "False", reason, message)
    conditions.set("PlanFits", "Unknown", "NotAccepted", "The object is not accepted.")
    conditions.set("Ready", "False", reason, message)
    return _with_conditions(owner, previous, conditions)


def failed_status(
    owner: Identity, previous: Mapping[str, Any], message: str, now: datetime
) -> dict[str, Any]:
    """The status after a pass that failed in the operator itself; what runs goes on running."""
    conditions = _Conditions(owner.generation, conditions_by_type(previous), now)
    conditions.set("Degraded", "True", "InternalError", message)
    if conditions.previous.get("Ready", {}).get("status") != "True":
        conditions.set("Ready", "False", "InternalError", message)
    return _with_conditions(owner, previous, conditions)


def _with_conditions(owner: Identity, previous: Mapping[str, Any], conditions: _Conditions) -> dict[str, Any]:
    found = {kind: c.model_dump(by_alias=True) for kind, c in conditions.found.items()}
    kept = {kind: dict(condition) for kind, condition in conditions.previous.items() if kind not in found}
    return {
        **previous,
        "observedGeneration": owner.generation,
        "conditions": [*kept.values(), *found.values()],
    }


def rollout_of(deployment: Manifest | None, plan: Plan | None) -> Rollout:
    """How far a Deployment is; nothing is ready on a plan that its template does not have yet."""
    if deployment is None:
        return Rollout(0, 0, 0, complete=False)
    status = deployment.get("status", {})
    wanted = deployment["spec"].get("replicas", 1)
    any_ready = status.get("readyReplicas", 0)
    seen_by_controller = status.get("observedGeneration", 0) >= deployment["metadata"].get("generation", 1)
    current = plan is not None and template_plan_hash(deployment) == plan.hash and seen_by_controller
    updated = status.get("updatedReplicas", 0) if current else 0
    others = status.get("replicas", 0) - updated
    # The Deployment does not tell which of its ready pods are new; those beyond the old ones surely are.
    ready = max(0, min(updated, any_ready - others))
    return Rollout(
        wanted, ready, any_ready, complete=current and others == 0 and updated == wanted and ready == wanted
    )


def template_plan_hash(deployment: Manifest) -> str:
    """The plan that a Deployment's pods are made for."""
    labels: Mapping[str, str] = deployment["spec"]["template"]["metadata"].get("labels", {})
    return labels.get(PLAN_HASH, "")


def _read(previous: Mapping[str, Any]) -> TurboQuantDeploymentStatus:
    """The present status. One that another version of the operator wrote in another shape counts as none."""
    try:
        return TurboQuantDeploymentStatus.model_validate(dict(previous))
    except ValidationError:
        return TurboQuantDeploymentStatus()


def _runs(deployment: Manifest | None, plan: Plan | None) -> bool:
    """Whether a Deployment's pods are made for a plan."""
    return deployment is not None and plan is not None and template_plan_hash(deployment) == plan.hash


def _count(deployment: Manifest | None, name: str) -> int:
    return 0 if deployment is None else int(deployment.get("status", {}).get(name, 0))


def measured_capacity(plan: Plan, tokens: Sequence[int]) -> MeasuredCapacity | None:
    """What the ready pods hold, beside what was predicted; None before one has told."""
    if not tokens or min(tokens) <= 0:
        return None
    measured = min(tokens)
    return MeasuredCapacity(
        measured_tokens=measured,
        total_tokens=sum(tokens),
        gain=f"{measured / plan.baseline_tokens:.2f}" if plan.baseline_tokens else "0.00",
        prediction_error_percent=f"{(plan.predicted_tokens - measured) / measured * 100:.1f}",
        max_concurrency_at_context=f"{measured / plan.context_length:.2f}",
    )


def _judge(conditions: _Conditions, spec: TurboQuantDeploymentSpec, seen: Seen, rollout: Rollout) -> None:
    outcome, refusal = seen.outcome, seen.refusal
    accepted = refusal is None
    if isinstance(outcome, NoPlan) and outcome.type == "Accepted":
        accepted = False
        conditions.set("Accepted", outcome.status, outcome.reason, outcome.message)
        conditions.set("PlanFits", "Unknown", "NotAccepted", "The object is not accepted.")
    elif refusal is not None:
        conditions.set("Accepted", "False", refusal.reason, refusal.message)
        _judge_plan(conditions, outcome)
    else:
        warnings = [r for r in outcome.reasons if r.startswith(WARNING)] if isinstance(outcome, Plan) else []
        reason = "AcceptedWithWarning" if warnings else "Accepted"
        conditions.set("Accepted", "True", reason, " ".join(warnings))
        _judge_plan(conditions, outcome)
    problem = None
    if seen.deployment is not None:
        problem = deployment_problem(seen.deployment, seen.pods, seen.mount_failures)
    _judge_rollout(conditions, spec, rollout, problem, startable=accepted and isinstance(outcome, Plan))
    _judge_ready(conditions, spec, rollout, problem)


def _judge_plan(conditions: _Conditions, outcome: Plan | NoPlan) -> None:
    if isinstance(outcome, Plan):
        message = f"{outcome.predicted_tokens} tokens in one replica with {outcome.format}"
        conditions.set("PlanFits", "True", "Fits", message)
    else:
        conditions.set("PlanFits", outcome.status, outcome.reason, outcome.message)


def _judge_rollout(
    conditions: _Conditions,
    spec: TurboQuantDeploymentSpec,
    rollout: Rollout,
    problem: Problem | None,
    startable: bool,
) -> None:
    """Available: the endpoint answers. Progressing: pods are on their way. Degraded: something is wrong."""
    ready = f"{rollout.any_ready} of {rollout.wanted} replicas ready"
    if rollout.any_ready:
        conditions.set("Available", "True", "EndpointReady", ready)
    elif spec.suspend:
        conditions.set("Available", "False", "Suspended", "spec.suspend is true")
    elif startable and rollout.complete:
        conditions.set("Available", "False", "ScaledToZero", "spec.replicas is 0")
    else:
        conditions.set("Available", "False", "NoReadyReplica", "No replica is ready")

    if rollout.complete:
        conditions.set("Progressing", "False", "Complete", ready)
    elif conditions.found["PlanFits"].reason in ON_THE_WAY:
        fits = conditions.found["PlanFits"]
        conditions.set("Progressing", "True", fits.reason, fits.message)
    elif not startable:
        conditions.set("Progressing", "False", "NotStarted", "No pod is made for the present spec")
    elif spec.plan_only:
        conditions.set("Progressing", "False", "PlanOnly", "spec.planOnly is true: no pod is made")
    elif problem is not None and problem.reason == "ProgressDeadlineExceeded":
        conditions.set("Progressing", "False", problem.reason, problem.message)
    else:
        conditions.set("Progressing", "True", "RollingOut", _progress(rollout))

    if problem is not None:
        conditions.set("Degraded", "True", problem.reason, problem.message)
    else:
        conditions.set("Degraded", "False", "AsExpected", "")


def _judge_ready(
    conditions: _Conditions, spec: TurboQuantDeploymentSpec, rollout: Rollout, problem: Problem | None
) -> None:
    """Ready sums up: the first thing that stands in the way, or all wanted replicas on the present plan."""
    accepted, fits = conditions.found["Accepted"], conditions.found["PlanFits"]
    if accepted.status != "True":
        conditions.set("Ready", "False", accepted.reason, accepted.message)
    elif spec.suspend:
        conditions.set("Ready", "False", "Suspended", "spec.suspend is true: no GPU is held")
    elif fits.status != "True":
        conditions.set("Ready", "False", fits.reason, fits.message)
    elif spec.plan_only:
        conditions.set("Ready", "False", "PlanOnly", f"spec.planOnly is true: {fits.message}")
    elif rollout.complete:
        reason = "ReplicasReady" if rollout.wanted else "ScaledToZero"
        conditions.set("Ready", "True", reason, f"{rollout.ready} of {rollout.wanted} replicas ready")
    elif problem is not None:
        conditions.set("Ready", "False", problem.reason, problem.message)
    else:
        conditions.set("Ready", "False", "RollingOut", _progress(rollout))


def _progress(rollout: Rollout) -> str:
    return f"{rollout.ready} of {rollout.wanted} replicas ready on the present plan"


def events(previous: Mapping[str, Any], status: Mapping[str, Any]) -> list[Event]:
    """What is worth an event between two raw statuses; a pass that changed nothing has none."""
    found: list[Event] = []
    old_plan, plan = previous.get("plan"), status.get("plan")
    if plan and plan != old_plan and plan["hash"] != (old_plan or {}).get("hash"):
        message = (
            f"{plan['format']}, {plan['gpusPerReplica']} GPU per replica, "
            f"{plan['predictedTokens']} tokens predicted"
        )
        found.append(Event("Normal", "PlanChanged" if old_plan else "Planned", message))
    before, after = conditions_by_type(previous), conditions_by_type(status)
    for kind in ("Accepted", "PlanFits", "Degraded", "Ready"):
        old, new = before.get(kind, {}), after.get(kind)
        if new is None or (old.get("status"), old.get("reason")) == (new["status"], new["reason"]):
            continue
        found += _condition_events(kind, old, new)
    return found


def _condition_events(kind: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Event]:
    if kind == "Degraded":
        if new["status"] == "True":
            return [Event("Warning", new["reason"], new["message"])]
        return (
            [Event("Normal", "Recovered", f"{old['reason']} is over")] if old.get("status") == "True" else []
        )
    if kind == "Ready":
        if new["status"] == "True":
            return [Event("Normal", "Ready", new["message"])]
        return [Event("Normal", "Suspended", new["message"])] if new["reason"] == "Suspended" else []
    if new["status"] == "True":
        return (
            [Event("Warning", new["reason"], new["message"])]
            if new["reason"] == "AcceptedWithWarning"
            else []
        )
    if new["reason"] in ("NotAccepted", *ON_THE_WAY):
        return []
    return [Event("Warning", new["reason"], new["message"])]
