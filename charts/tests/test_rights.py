"""The rights that the chart gives the operator, asked of a real API server: enough, and no more."""

import json
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from rendering import Objects, Render, of_kind

pytestmark = pytest.mark.cluster

CHILDREN = (
    "deployments.apps",
    "poddisruptionbudgets.policy",
    "services",
    "configmaps",
    "persistentvolumeclaims",
    "pods",
)


@dataclass(frozen=True)
class Operator:
    """The operator's service account on the API server."""

    kubectl: tuple[str | Path, ...]
    home: str
    """Where the release is."""
    watched: str
    """A namespace that it watches."""

    def run(self, *arguments: str, manifests: Objects | None = None) -> bool:
        """Whether a kubectl command in the operator's name succeeds."""
        account = f"--as=system:serviceaccount:{self.home}:turboquant-operator"
        return run(*self.kubectl, account, *arguments, manifests=manifests or []).returncode == 0

    def may(self, verb: str, resource: str, *options: str, namespace: str) -> bool:
        """What the API server's authorizer says."""
        return self.run("auth", "can-i", verb, resource, *options, "--namespace", namespace)


def run(*command: str | Path, manifests: Objects) -> subprocess.CompletedProcess[str]:
    body = json.dumps({"apiVersion": "v1", "kind": "List", "items": manifests})
    return subprocess.run(command, input=body, capture_output=True, text=True)


@pytest.fixture(params=["all namespaces", "one namespace"])
def operator(
    request: pytest.FixtureRequest, render: Render, namespace: str, kubernetes_tools: Path, kubeconfig: Path
) -> Iterator[Operator]:
    """The operator installed in a namespace of its own: with all of them, or just this one, to watch."""
    kubectl = (kubernetes_tools / "kubectl", "--kubeconfig", kubeconfig)
    everywhere = request.param == "all namespaces"
    objects = render({"watchNamespaces": [] if everywhere else [namespace]}, namespace=namespace)
    rights = of_kind(objects, "ServiceAccount", "Role", "RoleBinding", "ClusterRole", "ClusterRoleBinding")
    made = run(*kubectl, "apply", "-f", "-", manifests=rights)
    assert made.returncode == 0, made.stderr
    yield Operator(kubectl, namespace, "default" if everywhere else namespace)
    run(*kubectl, "delete", "-f", "-", manifests=rights)


@pytest.mark.parametrize("resource", CHILDREN)
def test_children_are_made_watched_and_deleted(operator: Operator, resource: str) -> None:
    for verb in ("get", "list", "watch", "create", "patch", "delete"):
        assert operator.may(verb, resource, namespace=operator.watched), verb


def test_objects_are_read_and_their_status_written(operator: Operator) -> None:
    kind = "turboquantdeployments.serving.turboquant.io"
    for verb in ("get", "list", "watch"):
        assert operator.may(verb, kind, namespace=operator.watched)
    assert operator.may("patch", kind, "--subresource=status", namespace=operator.watched)
    for verb in ("create", "update", "patch", "delete"):
        assert not operator.may(verb, kind, namespace=operator.watched)


def test_events_are_watched_and_posted(operator: Operator) -> None:
    for verb in ("list", "watch", "create"):
        assert operator.may(verb, "events", namespace=operator.watched)


def test_secrets_stay_unread(operator: Operator) -> None:
    for verb in ("get", "list", "watch"):
        assert not operator.may(verb, "secrets", namespace=operator.watched)


def test_nothing_is_done_in_a_namespace_that_is_not_watched(operator: Operator) -> None:
    watches_all = operator.watched == "default"
    assert operator.may("list", "pods", namespace="kube-system") == watches_all


def test_nodes_are_listed(operator: Operator) -> None:
    assert operator.run("get", "nodes")


def lease(name: str, namespace: str) -> Objects:
    metadata: dict[str, Any] = {"name": name, "namespace": namespace}
    return [{"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": metadata}]


def test_own_lease_is_made_renewed_and_seen_by_name(operator: Operator) -> None:
    own = lease("turboquant-operator", operator.home)
    for _ in ("make", "renew"):
        assert operator.run("apply", "--server-side", "-f", "-", manifests=own)
    where = ["--all-namespaces"] if operator.watched == "default" else ["--namespace", operator.home]
    assert operator.run("get", "leases", *where, "--field-selector=metadata.name=turboquant-operator")


def test_no_other_lease_is_touched(operator: Operator) -> None:
    other = lease("kube-scheduler", operator.home)
    assert not operator.run("apply", "--server-side", "-f", "-", manifests=other)
    assert not operator.run("get", "leases", "--namespace", operator.home)
