"""When to reconcile: kopf watches, indexes and probes; each handler only says which object to look at.

Run by `kopf run -m turboquant_operator.handlers --standalone`. Only `on.event` handlers and indexes are used:
kopf then writes nothing to any object, neither annotations nor finalizers, so deleting an object needs no
operator. What one pass does is in `controller`.
"""

import asyncio
import logging
from collections.abc import Iterable, Mapping
from typing import Any

import kopf
from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, ProcessCollector, generate_latest

from turboquant_operator.api import GROUP, PLURAL, VERSION
from turboquant_operator.builders.metadata import INSTANCE, MANAGED_BY, MANAGER, Manifest, object_of_pod
from turboquant_operator.children import Children
from turboquant_operator.controller import Controller, Key
from turboquant_operator.kube import Kube
from turboquant_operator.lease import LEASE_NAME, Heartbeat
from turboquant_operator.metrics import OperatorMetrics
from turboquant_operator.model_reader import ModelReader
from turboquant_operator.planning import Planning
from turboquant_operator.reconcile import Images
from turboquant_operator.settings import Settings

WORKERS = 8
"""Objects reconciled at once: a pass mostly waits for the API server."""

OBJECTS = (GROUP, VERSION, PLURAL)
CHILDREN = (
    ("apps", "v1", "deployments"),
    ("", "v1", "pods"),
    ("", "v1", "services"),
    ("", "v1", "configmaps"),
    ("", "v1", "persistentvolumeclaims"),
    ("policy", "v1", "poddisruptionbudgets"),
)
EVENTS = ("", "v1", "events")
LEASES = ("coordination.k8s.io", "v1", "leases")


class IndexedCluster:
    """The cluster as kopf's indexes show it. Both indexes have one entry per key of an object."""

    def __init__(self, objects: kopf.Index[Key, Manifest], children: kopf.Index[Key, Manifest]) -> None:
        self._objects = objects
        self._children = children

    def keys(self) -> Iterable[Key]:
        """All objects."""
        return list(self._objects)

    def bodies(self) -> list[Mapping[str, Any]]:
        """All objects, whole."""
        return [body for key in self.keys() for body in self._objects.get(key, ())]

    def object(self, key: Key) -> Mapping[str, Any] | None:
        """One object. After a quick deletion and re-creation the later of two."""
        bodies = list(self._objects.get(key, ()))
        return bodies[-1] if bodies else None

    def children(self, key: Key) -> Children:
        """What is labelled as an object's child."""
        return Children({(c["kind"], c["metadata"]["name"]): c for c in self._children.get(key, ())})


@kopf.on.startup()
async def start(settings: kopf.OperatorSettings, memo: kopf.Memo, **indexes: Any) -> None:
    """Configures kopf and starts the workers, the resync, the Lease's renewal and the metrics page."""
    configure(settings)
    own = Settings.from_environment()
    kube = await asyncio.to_thread(Kube.connect)
    if not await asyncio.to_thread(kube.serves_objects):
        # kopf looks for it once, at start: better to be restarted until it is there than to be idle forever.
        raise kopf.PermanentError(f"The API server does not know {PLURAL}.{GROUP}: install the CRD.")
    cluster = IndexedCluster(indexes["objects"], indexes["children"])
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    controller = Controller(
        kube=kube,
        cluster=cluster,
        images=Images(gpu=own.runtime_image, cpu=own.runtime_cpu_image),
        metrics=OperatorMetrics(cluster.bodies, registry),
        identity=own.identity,
        planning=Planning(kube, ModelReader()),
    )
    memo.queue = controller.queue
    memo.heartbeat = Heartbeat(own.lease_namespace, own.identity)
    memo.metrics_page = await serve_metrics(registry, own.metrics_port)
    memo.tasks = [
        *(asyncio.create_task(controller.work_forever()) for _ in range(WORKERS)),
        asyncio.create_task(controller.resync_forever(own.resync_seconds)),
        asyncio.create_task(memo.heartbeat.renew_forever(kube.apply)),
    ]


def configure(settings: kopf.OperatorSettings) -> None:
    """kopf's settings, each with its reason."""
    # The watched kinds are fixed; watching CRDs and namespaces would need rights on the whole cluster.
    settings.scanning.disabled = True
    # A line for every watched event and every probe would bury the rest.
    for chatty in ("kopf.objects", "kopf.activities.probe", "aiohttp.access"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    # Events are posted by the controller, for objects and not for log lines.
    settings.posting.enabled = False
    # Of the children only the operator's own cross the wire, and of all Leases only the heartbeat.
    for kind in CHILDREN:
        settings.watching.label_selectors[kind] = f"{MANAGED_BY}={MANAGER}"
    # A volume that cannot be mounted is told by an Event alone.
    settings.watching.field_selectors[EVENTS] = "involvedObject.kind=Pod,reason=FailedMount"
    settings.watching.field_selectors[LEASES] = f"metadata.name={LEASE_NAME}"
    # A watch ends by itself now and then, and a request that hangs fails before its caller is missed.
    settings.watching.server_timeout = 300
    settings.watching.connect_timeout = 10
    settings.networking.request_timeout = 30


async def serve_metrics(registry: CollectorRegistry, port: int) -> web.AppRunner:
    """Serves /metrics from the event loop, where the indexes can be read without a lock."""

    async def page(_: web.Request) -> web.Response:
        return web.Response(body=generate_latest(registry), headers={"Content-Type": CONTENT_TYPE_LATEST})

    application = web.Application()
    application.router.add_get("/metrics", page)
    runner = web.AppRunner(application, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, port=port).start()
    return runner


@kopf.on.cleanup()
async def stop(memo: kopf.Memo, **_: Any) -> None:
    """Ends what `start` has started; a pass in progress is cut off, which any later pass makes good."""
    for task in memo.tasks:
        task.cancel()
    await asyncio.gather(*memo.tasks, return_exceptions=True)
    await memo.metrics_page.cleanup()


@kopf.index(*OBJECTS)
async def objects(body: kopf.Body, **_: Any) -> dict[Key, Manifest]:
    """Every TurboQuantDeployment."""
    return {(body["metadata"]["namespace"], body["metadata"]["name"]): lean(body)}


async def children(body: kopf.Body, **_: Any) -> dict[Key, Manifest]:
    """Every child by its object."""
    return {object_of(body): lean(body)}


for _kind in (*CHILDREN, EVENTS):
    kopf.index(*_kind)(children)


def object_of(child: kopf.Body) -> Key:
    """The object whose child this is, by its instance label: pods are owned by a ReplicaSet in between.

    An Event belongs to the object of the pod that it is about.
    """
    if child["kind"] == "Event":
        return child["metadata"]["namespace"], object_of_pod(child["involvedObject"]["name"])
    return child["metadata"]["namespace"], child["metadata"].get("labels", {}).get(INSTANCE, "")


def lean(body: kopf.Body) -> Manifest:
    """An object without its managed fields, which are most of its bytes and of no use here."""
    metadata = {key: value for key, value in body["metadata"].items() if key != "managedFields"}
    return {**body, "metadata": metadata}


@kopf.on.event(*OBJECTS)
async def object_changed(body: kopf.Body, memo: kopf.Memo, **_: Any) -> None:
    """An object was made, changed, deleted, or found at start."""
    memo.queue.add((body["metadata"]["namespace"], body["metadata"]["name"]))


async def child_changed(body: kopf.Body, memo: kopf.Memo, **_: Any) -> None:
    """A child was made, changed or deleted, by whomever."""
    memo.queue.add(object_of(body))


for _kind in (*CHILDREN, EVENTS):
    kopf.on.event(*_kind)(child_changed)


@kopf.on.event(*LEASES)
async def lease_renewed(body: kopf.Body, memo: kopf.Memo, **_: Any) -> None:
    """The watch shows the operator's own heartbeat."""
    memo.heartbeat.see(body)


@kopf.on.probe(id="watch")
async def watch_is_alive(memo: kopf.Memo, **_: Any) -> str:
    """Fails the liveness probe of an operator whose watch has died."""
    heartbeat: Heartbeat = memo.heartbeat
    if heartbeat.is_blind():
        # Permanent: kopf would otherwise retry the probe inside the request until it times out.
        raise kopf.PermanentError(f"no Lease renewal seen for {heartbeat.blind_seconds():.0f} s")
    return "ok"
