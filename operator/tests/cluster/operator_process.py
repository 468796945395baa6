"""The operator as a process of its own, and a namespace that it serves, as a test sees them."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import kubernetes
from kubernetes.dynamic import DynamicClient
from kubernetes.dynamic.exceptions import NotFoundError

from turboquant_operator.api import API_VERSION, KIND

Found = TypeVar("Found")

PROMPTLY = 10.0
"""Seconds within which the object tells what a pod or Deployment shows."""


def eventually(look: Callable[[], Found], seconds: float = 30.0) -> Found:
    """The first true value that `look` returns. Its last assertion is what a failing test shows."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            found = look()
            if found:
                return found
            problem: Exception = AssertionError(f"still {found!r} after {seconds} s")
        except (AssertionError, KeyError, NotFoundError) as error:
            problem = error
        if time.monotonic() > deadline:
            raise problem
        time.sleep(0.1)


def free_port() -> int:
    """A port of 127.0.0.1 that nobody uses right now."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


class OperatorProcess:
    """`kopf run` on all namespaces, as the chart runs it."""

    def __init__(self, kubeconfig: Path, log: Path) -> None:
        self._log = log
        self.metrics_port = free_port()
        self.health_port = free_port()
        self._environment = {
            **os.environ,
            "KUBECONFIG": str(kubeconfig),
            "HF_HUB_OFFLINE": "1",
            "HF_HOME": str(log.parent / "hub"),
            "POD_NAMESPACE": "default",
            "POD_NAME": "operator-under-test",
            "TURBOQUANT_METRICS_PORT": str(self.metrics_port),
            "TURBOQUANT_RUNTIME_IMAGE": "registry.test/runtime:gpu",
            "TURBOQUANT_RUNTIME_CPU_IMAGE": "registry.test/runtime:cpu",
        }
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Starts it, and returns when it answers."""
        command = [sys.executable, "-m", "kopf", "run", "-m", "turboquant_operator.handlers", "--standalone"]
        command += [
            "--all-namespaces",
            f"--liveness=http://127.0.0.1:{self.health_port}/healthz",
            "--log-format=json",
        ]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(command, env=self._environment, stdout=log, stderr=log)
        eventually(self.metrics, 60)

    def kill(self) -> None:
        """SIGKILL: no clean-up of any kind."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(30)
            self._process = None

    def metrics(self) -> str:
        """Its metrics page, empty while it does not answer."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics_port}/metrics") as page:
                return str(page.read().decode())
        except urllib.error.URLError:
            return ""

    def health(self) -> dict[str, Any]:
        """What its liveness probe answers. Raises HTTPError where it fails."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.health_port}/healthz") as answer:
            found: dict[str, Any] = json.load(answer)
            return found

    @property
    def running(self) -> bool:
        """Whether the process is alive."""
        return self._process is not None and self._process.poll() is None

    def errors(self, namespace: str) -> list[str]:
        """What it has logged of failures in a namespace."""
        lines = [json.loads(line) for line in self._log.read_text().splitlines() if line.startswith("{")]
        failures = [line["message"] for line in lines if line.get("severity") == "error"]
        return [message for message in failures if namespace in message]


class Workspace:
    """One namespace of the API server."""

    def __init__(self, client: kubernetes.client.ApiClient, namespace: str, cache_file: Path) -> None:
        self.namespace = namespace
        self._client = DynamicClient(client, cache_file=str(cache_file))

    def create(self, name: str, spec: dict[str, Any], **metadata: Any) -> dict[str, Any]:
        """A TurboQuantDeployment."""
        manifest = {"apiVersion": API_VERSION, "kind": KIND, "metadata": {"name": name, **metadata}}
        return self.make({**manifest, "spec": spec})

    def make(self, manifest: dict[str, Any]) -> dict[str, Any]:
        """Any object of the namespace."""
        resource = self._resource(manifest["kind"])
        return resource.create(body=manifest, namespace=self.namespace).to_dict()

    def get(self, kind: str, name: str) -> dict[str, Any]:
        """One object. Raises NotFoundError."""
        return self._resource(kind).get(name=name, namespace=self.namespace).to_dict()

    def exists(self, kind: str, name: str) -> bool:
        """Whether there is such an object."""
        try:
            self.get(kind, name)
        except NotFoundError:
            return False
        return True

    def all_of(self, kind: str, selector: str = "") -> list[dict[str, Any]]:
        """The objects of a kind, without those on their way out."""
        found = self._resource(kind).get(namespace=self.namespace, label_selector=selector).to_dict()["items"]
        return [item for item in found if not item["metadata"].get("deletionTimestamp")]

    def patch(self, kind: str, name: str, body: dict[str, Any], manager: str = "kubectl") -> dict[str, Any]:
        """A merge patch, as a user's `kubectl patch` or `kubectl edit` sends it."""
        return (
            self._resource(kind)
            .patch(
                name=name,
                namespace=self.namespace,
                body=body,
                content_type="application/merge-patch+json",
                field_manager=manager,
            )
            .to_dict()
        )

    def scale(self, name: str, replicas: int) -> None:
        """What `kubectl scale` and an autoscaler do."""
        self._resource(KIND).scale.patch(
            name=name,
            namespace=self.namespace,
            body={"spec": {"replicas": replicas}},
            content_type="application/merge-patch+json",
        )

    def delete(self, kind: str, name: str) -> None:
        """Deletes an object; its children go in the background."""
        self._resource(kind).delete(name=name, namespace=self.namespace)

    def condition(self, name: str, kind: str) -> dict[str, Any]:
        """A condition of a TurboQuantDeployment. Raises KeyError before it has any."""
        conditions = self.get(KIND, name)["status"]["conditions"]
        return {condition["type"]: condition for condition in conditions}[kind]

    def engine_pods(self, name: str) -> list[str]:
        """Names of an object's engine pods, the newest last."""
        pods = self.all_of("Pod", f"app.kubernetes.io/instance={name},app.kubernetes.io/component=engine")
        pods.sort(key=lambda pod: pod["metadata"]["creationTimestamp"])
        return [pod["metadata"]["name"] for pod in pods]

    def _resource(self, kind: str) -> Any:
        if kind == "Event":
            return self._client.resources.get(api_version="v1", kind=kind)
        return self._client.resources.get(kind=kind)
