"""What it takes to have a plan, at the edge: the model's document, the KV plan, the cluster's GPUs.

Each may not be there yet; then the outcome is a condition that says what is waited for. The plan itself is
made by the pure `planner`.
"""

import asyncio
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from turboquant_kernels.plans import KVPlan
from turboquant_operator.api.object import Identity
from turboquant_operator.api.spec import TurboQuantDeploymentSpec
from turboquant_operator.api.status import Plan
from turboquant_operator.builders.metadata import Manifest
from turboquant_operator.children import Children
from turboquant_operator.inspection import (
    known_document,
    model_source,
    needs_inspection,
    waiting_for_inspection,
)
from turboquant_operator.kube import Kube
from turboquant_operator.model_reader import ModelReader
from turboquant_operator.model_source import facts_of, unsupported_source
from turboquant_operator.planner import ModelFacts, NoPlan, make_plan
from turboquant_operator.planner.accelerators import CPU, NodeGPUs
from turboquant_operator.planner.facts import Document
from turboquant_operator.planner.outcome import refused, unknown
from turboquant_operator.reconcile import Planned

AUTO = "auto"

NODES_SECONDS = 30.0
"""How long a list of the nodes stands: it is long, and asked for at every pass of every object on GPUs."""


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


class Planning:
    """Plans objects. Keeps documents between passes: the ConfigMaps that hold them may not be indexed yet."""

    def __init__(self, kube: Kube, models: ModelReader) -> None:
        self._kube = kube
        self._models = models
        self._documents: dict[str, tuple[str, Document]] = {}
        self._gpus: list[NodeGPUs] | None = None
        self._gpus_until = 0.0

    def forget(self, uid: str) -> None:
        """An object is gone."""
        self._documents.pop(uid, None)

    async def plan(
        self,
        owner: Identity,
        spec: TurboQuantDeploymentSpec,
        previous: Mapping[str, Any],
        children: Children,
        wake: Callable[[], None],
    ) -> Planned:
        """The plan of an object, or why there is none. `wake` is called when what is waited for is there."""
        source = model_source(spec)
        unsupported = unsupported_source(spec.model.uri)
        if unsupported is not None:
            return Planned(source, unsupported)
        held_source, held = self._documents.get(owner.uid, ("", None))
        document = held if held_source == source else known_document(owner, children, source)
        inspected = needs_inspection(spec)
        if document is None and inspected:
            return Planned(source, waiting_for_inspection(owner, children, source), inspect=True)
        # An empty config stands for a hub that did not answer when the user's own facts were enough.
        if document is None or not (inspected or document.get("config")):
            read = await self._models.read(spec.model, wake)
            if isinstance(read, NoPlan):
                return Planned(source, read)
            document = read
        self._documents[owner.uid] = source, document
        facts = facts_of(document, spec.model.architecture)
        if isinstance(facts, NoPlan):
            return Planned(source, facts, document)
        kv_plan = await self._kv_plan(owner, spec)
        if isinstance(kv_plan, NoPlan):
            return Planned(source, kv_plan, document, facts)
        request = PlanRequest(spec, facts, kv_plan, document.get("revision", ""))
        before = previous.get("plan", {}).get("accelerator", "")
        outcome = request.plan(await self._nodes(spec), before)
        return Planned(source, outcome, document, facts, kv_plan)

    async def _kv_plan(self, owner: Identity, spec: TurboQuantDeploymentSpec) -> KVPlan | NoPlan | None:
        reference = spec.kv_cache.plan_ref
        if reference is None:
            return None
        config_map = await asyncio.to_thread(self._kube.get, "ConfigMap", owner.namespace, reference.name)
        if config_map is None:
            return unknown("KVPlanNotFound", f"There is no ConfigMap {reference.name!r} (kvCache.planRef).")
        text = config_map.get("data", {}).get("plan.json")
        if text is None:
            return refused("InvalidKVPlan", f"ConfigMap {reference.name!r} has no key plan.json.")
        try:
            return KVPlan.from_json(text)
        except ValueError as error:
            return refused("InvalidKVPlan", f"ConfigMap {reference.name!r}: {error}")

    async def _nodes(self, spec: TurboQuantDeploymentSpec) -> list[NodeGPUs] | None:
        """The GPUs of the cluster's nodes; None where they may not be listed, or do not matter."""
        if spec.accelerator.type == CPU:
            return None
        if time.monotonic() >= self._gpus_until:
            nodes = await asyncio.to_thread(self._kube.list_nodes)
            self._gpus = None if nodes is None else gpus_of(nodes)
            self._gpus_until = time.monotonic() + NODES_SECONDS
        return self._gpus
