"""One pass over one object, at the edge: read what is, ask what should be, write the difference.

`handlers` says when (an event of the object or a child, the slow resync) and provides the reader of what kopf
has indexed. Every pass does everything that is needed and nothing twice, whatever happened before it.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Any, Protocol

from turboquant_operator.api.object import Identity, InvalidSpecError, parse_spec
from turboquant_operator.builders.metadata import PLAN_HASH, Manifest
from turboquant_operator.children import Children
from turboquant_operator.engine_capacity import (
    SCRAPE_AGAIN_SECONDS,
    CapacityReader,
    Scrape,
    scrape_capacity,
)
from turboquant_operator.kube import (
    ConflictError,
    ForbiddenError,
    Kube,
    NotFoundError,
    RefusedError,
    RequestError,
)
from turboquant_operator.metrics import OperatorMetrics
from turboquant_operator.planner import NoPlan
from turboquant_operator.planning import Planning
from turboquant_operator.problems import Problem, is_ready
from turboquant_operator.reconcile import Desired, Images, desired, is_applied
from turboquant_operator.status import (
    Seen,
    events,
    failed_status,
    next_status,
    refused_status,
    template_plan_hash,
)
from turboquant_operator.workqueue import WorkQueue

Key = tuple[str, str]
"""Namespace and name of an object."""

LOOK_AGAIN_SECONDS = 30.0
"""Until the next pass over an object that waits for something no watch tells of: the hub, nodes, a ConfigMap
of the user's."""

logger = logging.getLogger(__name__)


class Cluster(Protocol):
    """What is indexed of the cluster."""

    def object(self, key: Key) -> Mapping[str, Any] | None: ...

    def keys(self) -> Iterable[Key]: ...

    def children(self, key: Key) -> Children: ...


class _NameTakenError(Exception):
    """A child's name belongs to an object of somebody else's."""


class Controller:
    """Reconciles objects, one worker at a time on each."""

    def __init__(
        self,
        kube: Kube,
        cluster: Cluster,
        images: Images,
        metrics: OperatorMetrics,
        identity: str,
        planning: Planning,
        scrape: Scrape = scrape_capacity,
    ) -> None:
        self.queue: WorkQueue[Key] = WorkQueue()
        self._kube = kube
        self._cluster = cluster
        self._images = images
        self._metrics = metrics
        self._identity = identity
        self._planning = planning
        self._scrape = scrape
        self._uids: dict[Key, str] = {}
        self._capacities: dict[str, CapacityReader] = {}

    async def work_forever(self) -> None:
        """One worker. An exception ends one pass, never the worker."""
        while True:
            key = await self.queue.get()
            started = time.monotonic()
            try:
                await self.reconcile(key)
            except NotFoundError as error:
                # The object or its namespace was deleted in the middle of the pass.
                logger.info("%s/%s: gone: %s", *key, error)
                self.queue.done(key)
            except ConflictError:
                # Read before the last write was indexed; that write's event is on its way.
                self.queue.add_after(key, 0.2)
                self.queue.done(key)
            except Exception as error:
                self._metrics.reconcile_errors.inc()
                delay = self.queue.failed(key)
                logger.exception("%s/%s: reconcile failed, next try in %.0f s", *key, delay)
                await self._report_failure(key, error)
            else:
                self.queue.done(key)
            finally:
                self._metrics.reconcile_seconds.observe(time.monotonic() - started)

    async def resync_forever(self, seconds: float) -> None:
        """Puts every object in turn, spread over the time, so that whatever was missed is caught up."""
        while True:
            keys = list(self._cluster.keys())
            for key in keys:
                await asyncio.sleep(seconds / len(keys))
                self.queue.add(key)
            if not keys:
                await asyncio.sleep(seconds)

    async def reconcile(self, key: Key) -> None:
        """One pass. Raises ConflictError where what was read is out of date."""
        body = self._cluster.object(key)
        if body is None or body["metadata"].get("deletionTimestamp"):
            self._forget(key)
            return  # The garbage collector takes the children.
        owner = Identity.of(body)
        self._remember(key, owner)
        previous: Mapping[str, Any] = body.get("status", {})
        now = datetime.now(UTC)
        try:
            spec = parse_spec(body)
        except InvalidSpecError as error:
            refused = refused_status(owner, previous, "InvalidSpec", str(error), now)
            await self._write_status(owner, previous, refused)
            return

        children = self._cluster.children(key).owned_by(owner)
        planned = await self._planning.plan(owner, spec, previous, children, wake=lambda: self.queue.add(key))
        wanted = desired(owner, spec, planned, children, self._images, now)
        children, refusal = await self._apply(owner, wanted, children)
        seen = Seen(
            outcome=planned.outcome,
            model=planned.facts.to_status(planned.revision) if planned.facts else None,
            deployment=children.get("Deployment", owner.name),
            pods=children.engine_pods(),
            mount_failures=children.mount_failures(),
            measured_tokens=await self._measure(key, owner, children),
            refusal=refusal,
        )
        status = next_status(owner, spec, previous, seen, now)
        await self._write_status(
            owner, previous, status.model_dump(by_alias=True, mode="json", exclude_none=True)
        )
        waits = isinstance(planned.outcome, NoPlan) and planned.outcome.status == "Unknown"
        if waits or refusal is not None or spec.kv_cache.plan_ref is not None:
            self.queue.add_after(key, LOOK_AGAIN_SECONDS)

    def _remember(self, key: Key, owner: Identity) -> None:
        """Whatever was kept of an earlier object of this name is not this one's."""
        if self._uids.get(key) != owner.uid:
            self._forget(key)
            self._uids[key] = owner.uid

    def _forget(self, key: Key) -> None:
        uid = self._uids.pop(key, "")
        self._planning.forget(uid)
        self._capacities.pop(uid, None)

    async def _apply(
        self, owner: Identity, wanted: Desired, children: Children
    ) -> tuple[Children, Problem | None]:
        """Writes the difference; the children as they are then, and what was refused of them."""
        by_name = dict(children.by_name)
        refusal: Problem | None = None
        for manifest in wanted.apply:
            name = (manifest["kind"], manifest["metadata"]["name"])
            if is_applied(manifest, by_name.get(name)):
                continue
            try:
                by_name[name] = await asyncio.to_thread(self._apply_one, owner, manifest, by_name.get(name))
                logger.info("%s/%s: applied %s %s", owner.namespace, owner.name, *name)
            except RefusedError as error:
                refusal = Problem(
                    "InvalidPod" if name[0] == "Deployment" else f"Invalid{name[0]}", str(error)
                )
                break
            except ForbiddenError as error:
                refusal = Problem(f"{name[0]}Forbidden", str(error))
                break
            except _NameTakenError as error:
                refusal = Problem("NameTaken", str(error))
                break
        for manifest in wanted.delete:
            await asyncio.to_thread(self._kube.delete, manifest)
        for manifest in wanted.merge:
            await asyncio.to_thread(self._kube.merge, manifest)
        return Children(by_name), refusal

    def _apply_one(self, owner: Identity, manifest: Manifest, live: Manifest | None) -> Manifest:
        """Applies a child, but never takes over an object of that name that is not this object's child."""
        metadata = manifest["metadata"]
        live = live or self._kube.get(manifest["kind"], metadata["namespace"], metadata["name"])
        if live is not None and not owner.owns(live):
            raise _NameTakenError(
                f"{manifest['kind']} {metadata['name']} exists and does not belong to this object: "
                "delete or rename one of the two."
            )
        try:
            return self._kube.apply(manifest)
        except RefusedError:
            if live is None:
                raise
            # Somebody's entry may stand in a list where ours would have to stand beside it, such as a
            # Service's port of the same name: then the list is ours alone.
            return self._kube.merge(manifest)

    async def _measure(self, key: Key, owner: Identity, children: Children) -> tuple[int, ...]:
        """Capacities that the ready pods of the Deployment's present plan report."""
        deployment = children.get("Deployment", owner.name)
        if deployment is None:
            return ()
        plan_hash = template_plan_hash(deployment)
        pods = [
            pod
            for pod in children.engine_pods()
            if is_ready(pod) and pod["metadata"]["labels"].get(PLAN_HASH) == plan_hash
        ]
        tokens = await self._capacities.setdefault(owner.uid, CapacityReader(self._scrape)).read(pods)
        if len(tokens) < len(pods):
            self.queue.add_after(key, SCRAPE_AGAIN_SECONDS)
        return tokens

    async def _write_status(
        self, owner: Identity, previous: Mapping[str, Any], status: dict[str, Any]
    ) -> None:
        """Writes a status that differs from the present one, and tells of it in events."""
        if status == previous:
            return
        await asyncio.to_thread(self._kube.apply_status, owner, status)
        for event in events(previous, status):
            try:
                await asyncio.to_thread(self._kube.post_event, owner, event, self._identity)
            except Exception as error:
                # Events inform; the status above is what counts.
                logger.warning("%s/%s: event not posted: %s", owner.namespace, owner.name, error)

    async def _report_failure(self, key: Key, error: Exception) -> None:
        """Says on the object that the operator itself failed. Best effort: the API may be what fails."""
        body = self._cluster.object(key)
        if body is None:
            return
        owner, previous = Identity.of(body), body.get("status", {})
        # The same error must read the same each time: a status that changes brings another pass at once.
        known = isinstance(error, RequestError)
        message = str(error) if known else f"{type(error).__name__}: the operator's log tells more."
        with contextlib.suppress(Exception):
            await self._write_status(
                owner, previous, failed_status(owner, previous, message, datetime.now(UTC))
            )
