"""The edge to the Kubernetes API: the few requests that the operator makes, each blocking.

Watching is kopf's. What is written goes through the dynamic client by server-side apply under one field
manager, so that fields of others survive and one's own are corrected. Called in threads by `controller`.
"""

import contextlib
import json
from dataclasses import dataclass
from datetime import UTC, datetime
from http import HTTPStatus
from typing import Any

import kubernetes
from kubernetes.dynamic import DynamicClient
from kubernetes.dynamic.exceptions import DynamicApiError

from turboquant_operator.api import API_VERSION, GROUP, KIND, PLURAL, VERSION
from turboquant_operator.api.object import Identity
from turboquant_operator.builders.metadata import MANAGER, Manifest
from turboquant_operator.status import Event

REQUEST_SECONDS = 30
"""After which a request counts as failed; the pass is then tried again."""


_UNREADABLE_MANIFEST = ("failed to create typed patch object", "failed to convert new object")
"""How Kubernetes 1.34 begins its answer to a server-side apply with an unknown field, a value of the wrong
type or two list entries of one name. Its status is 500 then, as if the fault were the server's."""


class RequestError(Exception):
    """The API server answered with an error. The text is its message, and the same for the same error."""


class RefusedError(RequestError):
    """It refuses a manifest for what is in it: no later try can succeed."""


class ForbiddenError(RequestError):
    """It forbids the request: a quota, an admission policy, or missing rights."""


class NotFoundError(RequestError):
    """The object, or its namespace, is not there."""


class ConflictError(RequestError):
    """The object has changed since it was read; the event of that change brings the next pass."""


@dataclass(frozen=True)
class _Kind:
    group: str
    version: str
    plural: str


_KINDS = {
    "Deployment": _Kind("apps", "v1", "deployments"),
    "Service": _Kind("", "v1", "services"),
    "ConfigMap": _Kind("", "v1", "configmaps"),
    "Pod": _Kind("", "v1", "pods"),
    "PersistentVolumeClaim": _Kind("", "v1", "persistentvolumeclaims"),
    "PodDisruptionBudget": _Kind("policy", "v1", "poddisruptionbudgets"),
    "Event": _Kind("", "v1", "events"),
    "Lease": _Kind("coordination.k8s.io", "v1", "leases"),
    "Node": _Kind("", "v1", "nodes"),
    KIND: _Kind(GROUP, VERSION, PLURAL),
}


class _NoDiscovery:
    """The kinds are known, so nothing is discovered: no rights, no requests and no cache file for it."""

    def __init__(self, client: DynamicClient, cache_file: str | None) -> None:
        pass


class Kube:
    """The requests, on one shared connection pool. Methods may be called from several threads."""

    def __init__(self, client: kubernetes.client.ApiClient) -> None:
        self._client = DynamicClient(client, discoverer=_NoDiscovery)  # type: ignore[no-untyped-call]

    @classmethod
    def connect(cls) -> "Kube":
        """Logs in with the pod's service account, or with KUBECONFIG outside a cluster."""
        try:
            kubernetes.config.load_incluster_config()  # type: ignore[no-untyped-call]
        except kubernetes.config.ConfigException:
            kubernetes.config.load_kube_config()  # type: ignore[no-untyped-call]
        return cls(kubernetes.client.ApiClient())

    def apply(self, manifest: Manifest, subresource: str = "") -> Manifest:
        """Server-side apply; the object as the server now has it. Raises RefusedError, ForbiddenError and,
        where the manifest carries a resourceVersion, ConflictError.
        """
        metadata = manifest["metadata"]
        path = self._path(manifest["kind"], metadata["namespace"], metadata["name"], subresource)
        return self._request(
            "patch",
            path,
            body=manifest,
            content_type="application/apply-patch+yaml",
            field_manager=MANAGER,
            force_conflicts=True,
        )

    def apply_status(self, owner: Identity, status: dict[str, Any]) -> Manifest:
        """Writes the status of an object, unless the object has changed since it was read (ConflictError)."""
        manifest = {
            "apiVersion": API_VERSION,
            "kind": KIND,
            "metadata": {
                "namespace": owner.namespace,
                "name": owner.name,
                "uid": owner.uid,
                "resourceVersion": owner.resource_version,
            },
            "status": status,
        }
        return self.apply(manifest, "status")

    def get(self, kind: str, namespace: str, name: str) -> Manifest | None:
        """One object, None where there is none."""
        try:
            return self._request("get", self._path(kind, namespace, name))
        except NotFoundError:
            return None

    def merge(self, manifest: Manifest) -> Manifest:
        """Merge patch: sets the manifest's fields, and its lists whole, without regard to who owns what."""
        metadata = manifest["metadata"]
        return self._request(
            "patch",
            self._path(manifest["kind"], metadata["namespace"], metadata["name"]),
            body=manifest,
            content_type="application/merge-patch+json",
            field_manager=MANAGER,
        )

    def delete(self, child: Manifest) -> None:
        """Deletes this very object, not a later one of its name. Gone already is fine."""
        metadata = child["metadata"]
        path = self._path(child["kind"], metadata["namespace"], metadata["name"])
        body = {"preconditions": {"uid": metadata["uid"]}, "propagationPolicy": "Background"}
        with contextlib.suppress(NotFoundError, ConflictError):
            self._request("delete", path, body=body)

    def serves_objects(self) -> bool:
        """Whether the CRD is installed."""
        try:
            kinds = self._request("get", f"/apis/{API_VERSION}")["resources"]
        except NotFoundError:
            return False
        return any(kind["name"] == PLURAL for kind in kinds)

    def list_nodes(self) -> list[Manifest] | None:
        """The cluster's nodes, None where the operator may not list them."""
        try:
            nodes: list[Manifest] = self._request("get", self._path("Node", "", ""))["items"]
        except ForbiddenError:
            return None
        return nodes

    def post_event(self, owner: Identity, event: Event, reporter: str) -> None:
        """One event on an object, as `kubectl describe` shows it."""
        now = datetime.now(UTC)
        body = {
            "apiVersion": "v1",
            "kind": "Event",
            "metadata": {"namespace": owner.namespace, "generateName": f"{owner.name}."},
            "involvedObject": {
                "apiVersion": API_VERSION,
                "kind": KIND,
                "namespace": owner.namespace,
                "name": owner.name,
                "uid": owner.uid,
            },
            "type": event.type,
            "reason": event.reason,
            "message": event.message[:1024],
            "action": "Reconcile",
            "count": 1,
            "firstTimestamp": now.strftime("%Y-%m-%dT%H:%M:%SZ"),
            "lastTimestamp": now.strftime("%Y-%m-%dT%H:%M:%SZ"),
            "eventTime": now.strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
            "source": {"component": MANAGER},
            "reportingComponent": MANAGER,
            "reportingInstance": reporter,
        }
        self._request("post", self._path("Event", owner.namespace, ""), body=body)

    @staticmethod
    def _path(kind: str, namespace: str, name: str, subresource: str = "") -> str:
        known = _KINDS[kind]
        prefix = f"apis/{known.group}" if known.group else "api"
        place = f"namespaces/{namespace}/" if namespace else ""
        path = f"/{prefix}/{known.version}/{place}{known.plural}"
        return "/".join(filter(None, (path, name, subresource)))

    def _request(self, method: str, path: str, **parameters: Any) -> Manifest:
        try:
            response = self._client.request(
                method, path, serialize=False, _request_timeout=REQUEST_SECONDS, **parameters
            )
        except DynamicApiError as error:
            raise _typed(error) from error
        manifest: Manifest = json.loads(response.data)
        return manifest


_ERRORS: dict[int, type[RequestError]] = {
    HTTPStatus.BAD_REQUEST: RefusedError,
    HTTPStatus.UNPROCESSABLE_ENTITY: RefusedError,
    HTTPStatus.FORBIDDEN: ForbiddenError,
    HTTPStatus.NOT_FOUND: NotFoundError,
    HTTPStatus.CONFLICT: ConflictError,
}


def _typed(error: DynamicApiError) -> RequestError:
    """The error by what follows from it."""
    message = _message(error)
    if message.startswith(_UNREADABLE_MANIFEST):
        return RefusedError(message)
    return _ERRORS.get(error.status, RequestError)(message)


def _message(error: DynamicApiError) -> str:
    try:
        return str(json.loads(error.body or "")["message"])
    except (ValueError, KeyError, TypeError):
        return f"{error.status} {error.reason}"
