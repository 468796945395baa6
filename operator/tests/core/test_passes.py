"""Passes against an API server in memory: what waits, what fails, and what is not asked twice."""

import asyncio
import copy
import threading
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from turboquant_kernels.formats import KVFormat
from turboquant_kernels.plans import KVPlan
from turboquant_operator.api.object import Identity
from turboquant_operator.builders.metadata import INSTANCE, PLAN_HASH, labels
from turboquant_operator.children import Children
from turboquant_operator.controller import Controller, Key
from turboquant_operator.engine_capacity import CapacityReader, ScrapeError
from turboquant_operator.kube import ConflictError, NotFoundError, RequestError
from turboquant_operator.metrics import OperatorMetrics
from turboquant_operator.model_reader import PATIENCE_SECONDS, ModelReader
from turboquant_operator.planner.outcome import unknown
from turboquant_operator.planning import Planning
from turboquant_operator.reconcile import Images
from turboquant_operator.status import Event, conditions_by_type

LLAMA = {
    "config": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "vocab_size": 128256,
        "max_position_embeddings": 8192,
        "torch_dtype": "bfloat16",
    },
    "weights": {"BF16": 16_060_522_496},
    "revision": "c0ffee",
}
CPU = {"accelerator": {"type": "cpu"}, "kvCache": {"memory": "4Gi", "format": "tq-k4v4"}}
H100 = {"nvidia.com/gpu.product": "NVIDIA-H100-80GB-HBM3", "nvidia.com/gpu.memory": "81559"}
L4 = {"nvidia.com/gpu.product": "NVIDIA-L4", "nvidia.com/gpu.memory": "23034"}


class Server:
    """An API server in memory: what the controller writes it reads back. Namespaces can be made to fail."""

    def __init__(self) -> None:
        self.objects: dict[tuple[str, str, str], dict[str, Any]] = {}
        self.events: list[Event] = []
        self.failures: dict[str, Exception] = {}
        self.nodes: list[dict[str, Any]] | None = []
        self.node_lists = 0

    def create(self, name: str, namespace: str = "models", **spec: Any) -> Key:
        """A TurboQuantDeployment."""
        metadata = {"namespace": namespace, "name": name, "uid": f"uid-{namespace}-{name}", "generation": 1}
        body = {"metadata": metadata, "spec": {"model": {"uri": "hf://a/b"}, **CPU, **spec}, "status": {}}
        self.objects["TurboQuantDeployment", namespace, name] = body
        return namespace, name

    def node(self, name: str, node_labels: dict[str, str]) -> None:
        """A node with eight GPUs."""
        assert self.nodes is not None
        allocatable = {"nvidia.com/gpu": "8"}
        self.nodes.append(
            {"metadata": {"name": name, "labels": node_labels}, "status": {"allocatable": allocatable}}
        )

    # What the controller uses of `Kube`.

    def apply(self, manifest: dict[str, Any]) -> dict[str, Any]:
        metadata = manifest["metadata"]
        if metadata["namespace"] in self.failures:
            raise self.failures[metadata["namespace"]]
        stored = copy.deepcopy(manifest)
        stored["metadata"] |= {"uid": f"uid-{metadata['name']}", "generation": 1}
        self.objects[manifest["kind"], metadata["namespace"], metadata["name"]] = stored
        return stored

    def get(self, kind: str, namespace: str, name: str) -> dict[str, Any] | None:
        return self.objects.get((kind, namespace, name))

    def apply_status(self, owner: Identity, status: dict[str, Any]) -> None:
        self.objects["TurboQuantDeployment", owner.namespace, owner.name]["status"] = status

    def post_event(self, owner: Identity, event: Event, reporter: str) -> None:
        self.events.append(event)

    def list_nodes(self) -> list[dict[str, Any]] | None:
        self.node_lists += 1
        return self.nodes

    # What the controller uses of the indexes.

    def object(self, key: Key) -> dict[str, Any] | None:
        return self.objects.get(("TurboQuantDeployment", *key))

    def keys(self) -> Iterable[Key]:
        return [(ns, name) for kind, ns, name in self.objects if kind == "TurboQuantDeployment"]

    def children(self, key: Key) -> Children:
        found = {
            (kind, name): child
            for (kind, namespace, name), child in self.objects.items()
            if namespace == key[0] and child["metadata"].get("labels", {}).get(INSTANCE) == key[1]
        }
        return Children(found)


class Harness:
    """A controller on such a server."""

    def __init__(self, read: Callable[..., Any] = lambda _: LLAMA) -> None:
        self.server = Server()
        self.registry = CollectorRegistry()
        self.scraped: list[str] = []
        kube: Any = self.server
        self.controller = Controller(
            kube=kube,
            cluster=self.server,
            images=Images("gpu:1", "cpu:1"),
            metrics=OperatorMetrics(list, self.registry),
            identity="test",
            planning=Planning(kube, ModelReader(read)),
            scrape=self._scrape,
        )

    async def _scrape(self, address: str) -> int:
        self.scraped.append(address)
        return 12_345

    def conditions(self, key: Key) -> dict[str, tuple[str, str]]:
        """Status and reason by condition."""
        body = self.server.object(key)
        assert body is not None
        return {kind: (c["status"], c["reason"]) for kind, c in conditions_by_type(body["status"]).items()}

    async def work(self, seconds: float = 0.3) -> None:
        """Lets two workers run for a while."""
        workers = [asyncio.create_task(self.controller.work_forever()) for _ in range(2)]
        await asyncio.sleep(seconds)
        assert not any(worker.done() for worker in workers)
        for worker in workers:
            worker.cancel()

    def errors(self) -> float:
        """Failed passes so far."""
        return self.registry.get_sample_value("turboquant_operator_reconcile_errors_total") or 0.0


def run(scenario: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(scenario(), 20))  # type: ignore[arg-type]


def test_failing_object_stops_no_other_and_is_tried_again() -> None:
    async def scenario() -> None:
        harness = Harness()
        bad, good = harness.server.create("bad", "broken"), harness.server.create("good")
        harness.server.failures["broken"] = RequestError("etcdserver: request timed out")
        for key in (bad, good):
            harness.controller.queue.add(key)
        await harness.work()
        assert harness.conditions(good)["PlanFits"] == ("True", "Fits")
        assert harness.conditions(bad)["Degraded"] == ("True", "InternalError")
        assert harness.errors() == 1
        harness.server.failures.clear()
        await harness.work(1.5)
        assert harness.conditions(bad)["Degraded"] == ("False", "AsExpected")

    run(scenario)


@pytest.mark.parametrize("error", [NotFoundError("gone"), ConflictError("newer")])
def test_object_that_changes_under_a_pass_is_no_error(error: Exception) -> None:
    async def scenario() -> None:
        harness = Harness()
        harness.server.failures["models"] = error
        harness.controller.queue.add(harness.server.create("llama"))
        await harness.work()
        assert harness.errors() == 0

    run(scenario)


def test_slow_hub_holds_up_no_other_object() -> None:
    async def scenario() -> None:
        release = threading.Event()

        def read(model: Any) -> dict[str, Any]:
            if model.uri == "hf://slow/hub":
                release.wait(10)
            return LLAMA

        harness = Harness(read)
        slow = [harness.server.create(f"slow-{i}", model={"uri": "hf://slow/hub"}) for i in range(5)]
        for key in slow:
            harness.controller.queue.add(key)
        quick = harness.server.create("quick")
        harness.controller.queue.add(quick)
        # Two workers, five objects that each are waited for a moment.
        await harness.work(4 * PATIENCE_SECONDS)
        assert harness.conditions(slow[0])["PlanFits"] == ("Unknown", "ReadingModel")
        assert harness.conditions(quick)["PlanFits"] == ("True", "Fits")
        release.set()
        await harness.work(1)
        assert harness.conditions(slow[0])["PlanFits"] == ("True", "Fits")

    run(scenario)


def test_failed_reading_is_not_repeated_at_every_event() -> None:
    async def scenario() -> None:
        reads = []

        def read(model: Any) -> Any:
            reads.append(model.uri)
            return unknown("HubUnreachable", "no route")

        harness = Harness(read)
        key = harness.server.create("llama")
        for _ in range(5):
            await harness.controller.reconcile(key)
        assert harness.conditions(key)["PlanFits"] == ("Unknown", "HubUnreachable")
        assert len(reads) == 1

    run(scenario)


def test_model_is_read_once_for_the_life_of_an_object() -> None:
    async def scenario() -> None:
        reads = []
        harness = Harness(lambda model: reads.append(model.uri) or LLAMA)
        key = harness.server.create("llama")
        await harness.controller.reconcile(key)
        restarted = Harness(lambda model: reads.append(model.uri) or LLAMA)
        restarted.server.objects = harness.server.objects
        await restarted.controller.reconcile(key)
        assert len(reads) == 1

    run(scenario)


def test_auto_keeps_to_the_gpu_that_it_chose() -> None:
    async def scenario() -> None:
        harness = Harness()
        harness.server.node("large", H100)
        key = harness.server.create("llama", accelerator={"type": "auto"}, kvCache={"format": "tq-k4v4"})
        await harness.controller.reconcile(key)
        first = harness.server.objects["TurboQuantDeployment", *key]["status"]["plan"]
        assert first["accelerator"] == "nvidia-h100-80gb"
        harness.server.node("small", L4)
        restarted = Harness()
        restarted.server.objects, restarted.server.nodes = harness.server.objects, harness.server.nodes
        await restarted.controller.reconcile(key)
        assert harness.server.objects["TurboQuantDeployment", *key]["status"]["plan"] == first

    run(scenario)


def test_nodes_are_listed_once_for_many_passes() -> None:
    async def scenario() -> None:
        harness = Harness()
        harness.server.node("large", H100)
        for name in ("a", "b", "c"):
            await harness.controller.reconcile(harness.server.create(name, accelerator={"type": "auto"}))
        assert harness.server.node_lists == 1

    run(scenario)


def test_nodes_that_may_not_be_listed() -> None:
    async def scenario() -> None:
        harness = Harness()
        harness.server.nodes = None
        auto = harness.server.create("auto", accelerator={"type": "auto"}, kvCache={})
        named = harness.server.create("named", accelerator={"type": "nvidia-h100-80gb"}, kvCache={})
        for key in (auto, named):
            await harness.controller.reconcile(key)
        assert harness.conditions(auto)["PlanFits"] == ("Unknown", "NodesNotReadable")
        assert harness.conditions(named)["PlanFits"] == ("True", "Fits")

    run(scenario)


GOOD_PLAN = KVPlan.uniform(KVFormat(4, 4), 32)


@pytest.mark.parametrize(
    ("data", "condition", "expected"),
    [
        (None, "PlanFits", ("Unknown", "KVPlanNotFound")),
        ({"other": ""}, "Accepted", ("False", "InvalidKVPlan")),
        ({"plan.json": "{"}, "Accepted", ("False", "InvalidKVPlan")),
        ({"plan.json": "GOOD"}, "PlanFits", ("True", "Fits")),
    ],
    ids=["missing", "without plan.json", "not JSON", "good"],
)
def test_kv_plan_from_a_config_map(
    data: dict[str, str] | None, condition: str, expected: tuple[str, str]
) -> None:
    import json

    async def scenario() -> None:
        harness = Harness()
        if data is not None:
            good = json.dumps(GOOD_PLAN.to_dict())
            filled = {key: value.replace("GOOD", good) for key, value in data.items()}
            harness.server.objects["ConfigMap", "models", "bits"] = {"metadata": {}, "data": filled}
        key = harness.server.create("llama", kvCache={"memory": "4Gi", "planRef": {"name": "bits"}})
        await harness.controller.reconcile(key)
        assert harness.conditions(key)[condition] == expected
        if expected == ("True", "Fits"):
            [container] = harness.server.objects["Deployment", *key]["spec"]["template"]["spec"]["containers"]
            assert any(argument.startswith("--additional-config=") for argument in container["args"])

    run(scenario)


def test_spec_that_the_types_refuse_is_told() -> None:
    async def scenario() -> None:
        harness = Harness()
        key = harness.server.create("llama", replicas="many")
        await harness.controller.reconcile(key)
        assert harness.conditions(key)["Accepted"] == ("False", "InvalidSpec")
        [event] = harness.server.events
        assert "spec.replicas" in event.message

    run(scenario)


def test_ready_pod_of_the_present_plan_is_asked_once() -> None:
    async def scenario() -> None:
        harness = Harness()
        key = harness.server.create("llama")
        await harness.controller.reconcile(key)
        template = harness.server.objects["Deployment", *key]["spec"]["template"]["metadata"]["labels"]
        for name, plan_hash in (("new", template[PLAN_HASH]), ("old", "another")):
            metadata = {
                "namespace": "models",
                "name": name,
                "uid": name,
                "labels": {**labels("llama"), PLAN_HASH: plan_hash},
            }
            status = {"podIP": f"10.0.0.{len(name)}", "conditions": [{"type": "Ready", "status": "True"}]}
            harness.server.objects["Pod", "models", name] = {
                "kind": "Pod",
                "metadata": metadata,
                "status": status,
            }
        for _ in range(3):
            await harness.controller.reconcile(key)
        assert harness.scraped == ["10.0.0.3"]
        status = harness.server.objects["TurboQuantDeployment", *key]["status"]
        assert status["capacity"]["measuredTokens"] == 12_345

    run(scenario)


def test_engine_that_does_not_answer_is_left_alone_for_a_while() -> None:
    async def scenario() -> None:
        asked = []

        async def scrape(address: str) -> int:
            asked.append(address)
            raise ScrapeError("connection refused")

        reader = CapacityReader(scrape)
        seen = {"metadata": {"uid": "u"}, "status": {"podIP": "10.0.0.1"}}
        assert [await reader.read([seen]) for _ in range(3)] == [(), (), ()]
        assert asked == ["10.0.0.1"]

    run(scenario)


def test_deleted_object_is_forgotten() -> None:
    async def scenario() -> None:
        harness = Harness()
        key = harness.server.create("llama")
        await harness.controller.reconcile(key)
        del harness.server.objects["TurboQuantDeployment", *key]
        await harness.controller.reconcile(key)
        assert not harness.controller._uids
        assert not harness.controller._capacities
        assert not harness.controller._planning._documents

    run(scenario)


def test_pass_that_changes_nothing_writes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        harness = Harness()
        key = harness.server.create("llama")
        for _ in range(2):
            await harness.controller.reconcile(key)
        posted = len(harness.server.events)

        def refuse(*_: Any) -> None:
            raise AssertionError("written")

        monkeypatch.setattr(harness.server, "apply", refuse)
        monkeypatch.setattr(harness.server, "apply_status", refuse)
        await harness.controller.reconcile(key)
        assert len(harness.server.events) == posted

    run(scenario)
