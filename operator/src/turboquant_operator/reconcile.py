"""What an object's children should be. Pure: from what was read to what is to be applied and deleted.

One level-based decision for every occasion (created, changed, a child touched, the operator restarted): it
looks at what is, never at what happened. `controller` reads and applies; `status` tells the user.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from turboquant_kernels.plans import KVPlan
from turboquant_operator.api.object import Identity
from turboquant_operator.api.spec import TurboQuantDeploymentSpec
from turboquant_operator.api.status import Plan
from turboquant_operator.builders import children as build
from turboquant_operator.builders.deployment import Engine, deployment
from turboquant_operator.builders.inspection import inspection_pod
from turboquant_operator.builders.metadata import MANIFEST_HASH, Manifest, inspection_pod_name
from turboquant_operator.children import Children
from turboquant_operator.inspection import is_spent
from turboquant_operator.planner import ModelFacts, NoPlan
from turboquant_operator.planner.accelerators import CPU
from turboquant_operator.planner.facts import Document


@dataclass(frozen=True)
class Images:
    """The operator's default runtime images."""

    gpu: str
    cpu: str

    def of(self, spec: TurboQuantDeploymentSpec) -> str:
        """The image that an object's engine runs."""
        return spec.engine.image or (self.cpu if spec.accelerator.type == CPU else self.gpu)


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
    if inspection is not None and is_spent(inspection, planned.source if planned.inspect else None, now):
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
