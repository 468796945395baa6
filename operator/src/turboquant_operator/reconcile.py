"""What an object's children should be. Pure: from what was read to what is to be applied and deleted.

One level-based decision for every occasion (created, changed, a child touched, the operator restarted): it
looks at what is, never at what happened. `controller` reads and applies; `status` tells the user.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

from turboquant_kernels.plans import KVPlan
from turboquant_operator.api.object import Identity
from turboquant_operator.api.spec import TurboQuantDeploymentSpec
from turboquant_operator.api.status import Plan
from turboquant_operator.builders import children as build
from turboquant_operator.builders.deployment import Engine, deployment
from turboquant_operator.builders.inspection import inspection_pod
from turboquant_operator.builders.metadata import (
    COMPONENT,
    ENGINE,
    MANIFEST_HASH,
    Manifest,
    inspection_pod_name,
    plan_config_map_name,
)
from turboquant_operator.planner import ModelFacts, NoPlan, make_plan
from turboquant_operator.planner.accelerators import CPU, NodeGPUs
from turboquant_operator.planner.outcome import unknown
from turboquant_operator.problems import pod_problem

AUTO = "auto"

INSPECTION_RETRY = timedelta(minutes=2)
"""How long a failed inspection stands, to be read by people too, before another is tried."""

Document = dict[str, Any]
"""A model as it was read: `config`, `weights` and `revision`, by the hub reader or an inspection pod."""


@dataclass(frozen=True)
class Children:
    """The children that an object has, by kind and name, as last seen."""

    by_name: Mapping[tuple[str, str], Manifest] = field(default_factory=dict)

    def get(self, kind: str, name: str) -> Manifest | None:
        """A child, None where there is none."""
        return self.by_name.get((kind, name))

    def owned_by(self, owner: Identity) -> "Children":
        """Those that are the object's own: others of its labels and names are not to be touched."""

        def is_own(kind: str, manifest: Manifest) -> bool:
            return kind == "Event" or _is_engine_pod(kind, manifest) or owner.owns(manifest)

        own = {key: manifest for key, manifest in self.by_name.items() if is_own(key[0], manifest)}
        return Children(own)

    def engine_pods(self) -> tuple[Manifest, ...]:
        """The pods of the Deployment, of this and of earlier plans."""
        return tuple(
            manifest for (kind, _), manifest in self.by_name.items() if _is_engine_pod(kind, manifest)
        )

    def mount_failures(self) -> dict[str, str]:
        """The last complaint about a volume, by the pod's uid."""
        events = [manifest for (kind, _), manifest in self.by_name.items() if kind == "Event"]
        events.sort(key=lambda event: event.get("lastTimestamp") or event["metadata"]["creationTimestamp"])
        return {event["involvedObject"].get("uid", ""): event.get("message", "") for event in events}


def _is_engine_pod(kind: str, manifest: Manifest) -> bool:
    """By its label: a ReplicaSet owns it."""
    return kind == "Pod" and manifest["metadata"].get("labels", {}).get(COMPONENT) == ENGINE


@dataclass(frozen=True)
class Images:
    """The operator's default runtime images."""

    gpu: str
    cpu: str

    def of(self, spec: TurboQuantDeploymentSpec) -> str:
        """The image that an object's engine runs."""
        return spec.engine.image or (self.cpu if spec.accelerator.type == "cpu" else self.gpu)


@dataclass(frozen=True)
class Planned:
    """What planning came to in this pass."""

    source: str
    """`model_source` of the present spec."""
    outcome: Plan | NoPlan
    document: Document | None = None
    """The model, once it is read."""
    facts: ModelFacts | None = None
    """What the document says, where that is enough to plan."""
    kv_plan: KVPlan | None = None
    inspect: bool = False
    """Whether the document must come from an inspection pod and is not there yet."""

    @property
    def revision(self) -> str:
        """The commit of a hub model that the plan was made from."""
        return str((self.document or {}).get("revision", ""))


@dataclass(frozen=True)
class Desired:
    """What is to be done to the children."""

    apply: tuple[Manifest, ...] = ()
    delete: tuple[Manifest, ...] = ()
    merge: tuple[Manifest, ...] = ()
    """Parts to be written where there is no plan to apply the whole: a Deployment that must shrink."""


@dataclass(frozen=True)
class PlanRequest:
    """Everything that a plan is made of but the nodes."""

    spec: TurboQuantDeploymentSpec
    facts: ModelFacts
    kv_plan: KVPlan | None = None
    revision: str = ""

    def plan(self, nodes: Sequence[NodeGPUs] | None, before: str = "") -> Plan | NoPlan:
        """The plan. `auto` keeps to the accelerator that it chose before, as long as that holds what is asked
        for: a node that comes or goes must not roll a running model.
        """
        if self.spec.accelerator.type == AUTO and before not in ("", CPU):
            named = self.spec.accelerator.model_copy(update={"type": before})
            kept = self._plan(self.spec.model_copy(update={"accelerator": named}), nodes)
            if isinstance(kept, Plan):
                return kept
        return self._plan(self.spec, nodes)

    def _plan(self, spec: TurboQuantDeploymentSpec, nodes: Sequence[NodeGPUs] | None) -> Plan | NoPlan:
        return make_plan(spec, self.facts, nodes=nodes, kv_plan=self.kv_plan, revision=self.revision)


def gpus_of(nodes: Iterable[Manifest]) -> list[NodeGPUs]:
    """The GPUs of the cluster's nodes."""
    found = (
        NodeGPUs.from_node(n["metadata"].get("labels", {}), n.get("status", {}).get("allocatable", {}))
        for n in nodes
    )
    return [gpus for gpus in found if gpus is not None]


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
    stored = build.stored_document(config_map, source) if config_map is not None else None
    if stored is not None:
        return stored
    pod = _inspection_pod(owner, children, source)
    if pod is None or pod.get("status", {}).get("phase") != "Succeeded":
        return None
    try:
        document = json.loads(_last_words(pod))
    except ValueError:
        return None
    return document if isinstance(document, dict) else None


def waiting_for_inspection(owner: Identity, children: Children, source: str) -> NoPlan:
    """What the inspection pod keeps us waiting for, or why it failed."""
    pod = _inspection_pod(owner, children, source)
    if pod is None:
        return unknown("InspectingModel", "A pod is made that reads the model's configuration.")
    phase = pod.get("status", {}).get("phase")
    if phase == "Succeeded":
        return unknown("ModelInspectionFailed", f"The inspection pod said no facts: {_last_words(pod)!r}")
    if phase == "Failed":
        why = _last_words(pod) or pod["status"].get("message", "it gave no reason")
        return unknown("ModelInspectionFailed", f"The model could not be read: {why}")
    problem = pod_problem(pod, children.mount_failures())
    if problem is not None:
        return unknown(problem.reason, f"Reading the model's configuration: {problem.message}")
    return unknown("InspectingModel", f"Pod {pod['metadata']['name']} reads the model's configuration.")


def _inspection_pod(owner: Identity, children: Children, source: str) -> Manifest | None:
    pod = children.get("Pod", inspection_pod_name(owner.name))
    if pod is None or pod["metadata"].get("annotations", {}).get(build.MODEL_SOURCE) != source:
        return None
    return pod


def _terminated(pod: Manifest) -> Mapping[str, Any]:
    for container in pod.get("status", {}).get("containerStatuses", ()):
        terminated: Mapping[str, Any] = container.get("state", {}).get("terminated", {})
        return terminated
    return {}


def _last_words(pod: Manifest) -> str:
    return str(_terminated(pod).get("message", "")).strip()


def desired(
    owner: Identity,
    spec: TurboQuantDeploymentSpec,
    planned: Planned,
    children: Children,
    images: Images,
    now: datetime,
) -> Desired:
    """The children of an object.

    Without a plan, and with planOnly, nothing that runs is touched and no engine pod is made: a mistake in a
    spec must not take a working endpoint down. Giving GPUs back is always possible.
    """
    apply: list[Manifest] = []
    delete: list[Manifest] = []
    plan = planned.outcome if isinstance(planned.outcome, Plan) else None

    if planned.document is not None:
        apply.append(build.plan_config_map(owner, plan, planned.kv_plan, planned.document, planned.source))
    inspection = children.get("Pod", inspection_pod_name(owner.name))
    if inspection is not None and _is_spent(inspection, planned, now):
        delete.append(inspection)
    elif planned.inspect and inspection is None:
        apply.append(inspection_pod(owner, spec, images.of(spec), planned.source))

    merge: list[Manifest] = []
    wanted = 0 if spec.suspend else spec.replicas
    if plan is not None and not spec.plan_only:
        apply += _serving(owner, spec, planned, plan, images)
    else:
        merge += _scale_down(owner, children, wanted)

    budget = children.get("PodDisruptionBudget", owner.name)
    if wanted <= 1 and budget is not None:
        delete.append(budget)
    return Desired(
        tuple(marked(manifest) for manifest in apply),
        tuple(delete),
        tuple(merge),
    )


def _serving(
    owner: Identity, spec: TurboQuantDeploymentSpec, planned: Planned, plan: Plan, images: Images
) -> list[Manifest]:
    """Everything that serves. The claim and the Service before the pods that need them."""
    engine = Engine(
        plan=plan,
        image=images.of(spec),
        revision=planned.revision,
        kv_plan=planned.kv_plan,
    )
    claim = build.cache_claim(owner, spec)
    manifests = [] if claim is None else [claim]
    manifests += [build.service(owner, spec), deployment(owner, spec, engine)]
    if spec.replicas > 1 and not spec.suspend:
        manifests.append(build.disruption_budget(owner))
    return manifests


def _is_spent(pod: Manifest, planned: Planned, now: datetime) -> bool:
    """Whether an inspection pod has nothing more to say: wrong model, facts known, or failed a while ago."""
    if (
        not planned.inspect
        or pod["metadata"].get("annotations", {}).get(build.MODEL_SOURCE) != planned.source
    ):
        return True
    if pod.get("status", {}).get("phase") not in ("Succeeded", "Failed"):
        return False
    finished = _terminated(pod).get("finishedAt") or pod["metadata"]["creationTimestamp"]
    return now - datetime.fromisoformat(finished) > INSPECTION_RETRY


def _scale_down(owner: Identity, children: Children, wanted: int) -> list[Manifest]:
    """The replicas of a Deployment that has more than are wanted, and nothing else of it."""
    running = children.get("Deployment", owner.name)
    if running is None or running["spec"].get("replicas", 1) <= wanted:
        return []
    metadata = {"namespace": owner.namespace, "name": owner.name}
    return [{"kind": "Deployment", "metadata": metadata, "spec": {"replicas": wanted}}]


def marked(manifest: Manifest) -> Manifest:
    """The manifest with its own digest as annotation."""
    digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()[:16]
    annotations = {**manifest["metadata"].get("annotations", {}), MANIFEST_HASH: digest}
    return {**manifest, "metadata": {**manifest["metadata"], "annotations": annotations}}


def is_applied(manifest: Manifest, live: Manifest | None) -> bool:
    """Whether a child is as its manifest wants it, so that applying it again would change nothing.

    The digest tells of fields that the manifest no longer has; the comparison tells of drift. Values that
    the API server writes in another form than we do compare as different, which costs a request and no more.
    """
    return live is not None and _covers(live, manifest)


def _covers(live: Any, wanted: Any) -> bool:
    """Whether every field of `wanted` is in `live` with the same value; `live` may hold more fields."""
    if isinstance(wanted, Mapping):
        return isinstance(live, Mapping) and all(
            (key in live and _covers(live[key], value)) or (key not in live and value == {})
            for key, value in wanted.items()
        )
    if isinstance(wanted, list | tuple):
        return (
            isinstance(live, list | tuple)
            and len(live) == len(wanted)
            and all(_covers(a, b) for a, b in zip(live, wanted, strict=True))
        )
    return bool(live == wanted)
