"""What the Helm chart renders, for several sets of values, and that an API server takes it."""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from rendering import CHART, Helm, Objects, Render, of_kind

from turboquant_operator.api.crd import crd_text

EVERYTHING = {
    "image": {"reference": "registry.example/operator@sha256:0", "pullPolicy": "Always"},
    "imagePullSecrets": [{"name": "registry"}],
    "runtime": {"image": "registry.example/runtime:1", "cpuImage": "registry.example/runtime-cpu:1"},
    "watchNamespaces": ["team-a", "team-b"],
    "env": [{"name": "HF_ENDPOINT", "value": "https://hub.example"}],
    "nodeSelector": {"kubernetes.io/os": "linux"},
    "tolerations": [{"key": "control-plane", "operator": "Exists"}],
    "affinity": {"nodeAffinity": {}},
    "priorityClassName": "system-cluster-critical",
}
VALUES = {
    "defaults": {},
    "everything": EVERYTHING,
    "least rights": {
        "watchNamespaces": ["team-a"],
        "crds": {"install": False},
        "rbac": {"listNodes": False, "aggregate": False},
    },
}


@pytest.fixture(params=VALUES.values(), ids=VALUES)
def objects(request: pytest.FixtureRequest, render: Render) -> Objects:
    """The rendered objects for each set of values in turn."""
    return render(request.param)


def one(objects: Objects, kind: str) -> dict[str, Any]:
    [found] = of_kind(objects, kind)
    return found


def rules(objects: Objects) -> Iterator[dict[str, Any]]:
    """Every rule that is bound to the operator."""
    bound = {binding["roleRef"]["name"] for binding in of_kind(objects, "RoleBinding", "ClusterRoleBinding")}
    for role in of_kind(objects, "Role", "ClusterRole"):
        if role["metadata"]["name"] in bound:
            yield from role["rules"]


@pytest.mark.parametrize("values", VALUES.values(), ids=VALUES)
def test_lint_finds_nothing(helm: Helm, values: dict[str, Any]) -> None:
    done = helm("lint", "--strict", str(CHART), values=values)
    assert done.returncode == 0, done.stdout + done.stderr


def test_crd_is_the_generated_one_and_survives_uninstall(render: Render) -> None:
    crd = one(render({}), "CustomResourceDefinition")
    assert crd["metadata"].pop("annotations") == {"helm.sh/resource-policy": "keep"}
    assert crd == yaml.safe_load(crd_text())


def test_crd_can_be_left_out(render: Render) -> None:
    assert of_kind(render({"crds": {"install": False}}), "CustomResourceDefinition") == []


def test_one_operator_at_a_time(objects: Objects) -> None:
    spec = one(objects, "Deployment")["spec"]
    assert (spec["replicas"], spec["strategy"]) == (1, {"type": "Recreate"})


def test_pod_meets_the_restricted_pod_security_standard(objects: Objects) -> None:
    pod = one(objects, "Deployment")["spec"]["template"]["spec"]
    assert pod["securityContext"] == {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}
    [container] = pod["containers"]
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }


def test_operator_may_do_nothing_with_secrets_and_has_no_wildcard(objects: Objects) -> None:
    for rule in rules(objects):
        assert not {"secrets", "*"} & {*rule["resources"], *rule["apiGroups"], *rule["verbs"]}


def test_operator_never_changes_what_a_user_asked_for(objects: Objects) -> None:
    writes = [rule for rule in rules(objects) if {"create", "update", "patch"} & set(rule["verbs"])]
    assert not any("turboquantdeployments" in rule["resources"] for rule in writes)


def test_operator_takes_over_no_lease_but_its_own(objects: Objects) -> None:
    for rule in rules(objects):
        assert "leases" not in rule["resources"] or rule["resourceNames"] == ["turboquant-operator"]


def test_all_namespaces_are_watched_by_default(render: Render) -> None:
    objects = render({})
    assert "--all-namespaces" in arguments(objects)
    assert not [
        role for role in of_kind(objects, "Role") if role["metadata"]["name"] == "turboquant-operator"
    ]


def test_named_namespaces_are_watched_with_rights_in_them_alone(render: Render) -> None:
    objects = render(EVERYTHING)
    assert [a for a in arguments(objects) if "namespace" in a] == ["--namespace=team-a", "--namespace=team-b"]
    roles = [role for role in of_kind(objects, "Role") if role["metadata"]["name"] == "turboquant-operator"]
    assert [role["metadata"]["namespace"] for role in roles] == ["team-a", "team-b"]
    [cluster_binding] = of_kind(objects, "ClusterRoleBinding")
    assert cluster_binding["roleRef"]["name"].endswith(":nodes")


def test_least_rights_need_no_cluster_role(render: Render) -> None:
    kinds = {item["kind"] for item in render(VALUES["least rights"])}
    assert not {"ClusterRole", "ClusterRoleBinding", "CustomResourceDefinition"} & kinds


def test_lease_is_where_the_operator_watches(render: Render) -> None:
    for values, namespace in (({}, "turboquant-system"), (EVERYTHING, "team-a")):
        objects = render(values)
        [role] = [r for r in of_kind(objects, "Role") if r["metadata"]["name"].endswith("-lease")]
        assert role["metadata"]["namespace"] == namespace
        assert environment(objects)["TURBOQUANT_LEASE_NAMESPACE"] == namespace


def test_every_binding_names_a_role_and_the_service_account_of_the_release(objects: Objects) -> None:
    account = one(objects, "ServiceAccount")["metadata"]
    roles = {(r["kind"], r["metadata"].get("namespace"), r["metadata"]["name"]) for r in objects}
    for binding in of_kind(objects, "RoleBinding", "ClusterRoleBinding"):
        assert (
            binding["roleRef"]["kind"],
            binding["metadata"].get("namespace"),
            binding["roleRef"]["name"],
        ) in roles
        assert binding["subjects"] == [
            {"kind": "ServiceAccount", "name": account["name"], "namespace": account["namespace"]}
        ]


def test_runtime_images_reach_the_operator(render: Render) -> None:
    variables = environment(render(EVERYTHING))
    assert variables["TURBOQUANT_RUNTIME_IMAGE"] == "registry.example/runtime:1"
    assert variables["TURBOQUANT_RUNTIME_CPU_IMAGE"] == "registry.example/runtime-cpu:1"
    assert variables["HF_ENDPOINT"] == "https://hub.example"


def test_probes_and_metrics_service_reach_ports_of_the_pod(objects: Objects) -> None:
    deployment, service = one(objects, "Deployment"), one(objects, "Service")
    [container] = deployment["spec"]["template"]["spec"]["containers"]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert container["readinessProbe"]["httpGet"] == {"path": "/metrics", "port": "metrics"}
    assert f"--liveness=http://0.0.0.0:{ports['health']}/healthz" in container["args"]
    assert container["livenessProbe"]["httpGet"] == {"path": "/healthz", "port": "health"}
    [port] = service["spec"]["ports"]
    assert port["port"] == ports[port["targetPort"]]
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert service["spec"]["selector"].items() <= labels.items()
    assert deployment["spec"]["selector"]["matchLabels"].items() <= labels.items()


def test_placement_reaches_the_pod(render: Render) -> None:
    pod = one(render(EVERYTHING), "Deployment")["spec"]["template"]["spec"]
    for field in ("imagePullSecrets", "nodeSelector", "tolerations", "affinity", "priorityClassName"):
        assert pod[field] == EVERYTHING[field]


def test_release_of_another_name_is_told_apart(render: Render) -> None:
    assert one(render({}, "blue"), "Deployment")["metadata"]["name"] == "blue-turboquant-operator"


def test_users_roles_are_extended(render: Render) -> None:
    roles = {role["metadata"]["name"].rpartition(":")[2]: role for role in of_kind(render({}), "ClusterRole")}
    assert roles["view"]["metadata"]["labels"]["rbac.authorization.k8s.io/aggregate-to-view"] == "true"
    assert roles["edit"]["metadata"]["labels"]["rbac.authorization.k8s.io/aggregate-to-edit"] == "true"


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"watchNamespace": ["team-a"]}, "watchNamespace"),
        ({"watchNamespaces": ["Team A"]}, "watchNamespaces"),
        ({"image": {"reference": ""}}, "reference"),
        ({"image": {"tag": "1"}}, "tag"),
        ({"replicas": 2}, "replicas"),
        ({"env": [{"value": "no name"}]}, "name"),
    ],
)
def test_wrong_value_is_refused_by_name(helm: Helm, values: dict[str, Any], named: str) -> None:
    done = helm("template", "turboquant-operator", str(CHART), values=values)
    assert done.returncode != 0
    assert named in done.stderr


@pytest.mark.cluster
def test_api_server_takes_every_object(objects: Objects, kubernetes_tools: Path, kubeconfig: Path) -> None:
    kubectl = [kubernetes_tools / "kubectl", "--kubeconfig", kubeconfig]
    namespaces = sorted({o["metadata"]["namespace"] for o in objects if "namespace" in o["metadata"]})
    made = [{"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}} for name in namespaces]
    for manifests, options in ((made, []), (objects, ["--dry-run=server"])):
        done = subprocess.run(
            [
                *kubectl,
                "apply",
                "--server-side",
                "--force-conflicts",
                "--validate=strict",
                *options,
                "-f",
                "-",
            ],
            input=json.dumps({"apiVersion": "v1", "kind": "List", "items": manifests}),
            capture_output=True,
            text=True,
        )
        assert (done.returncode, done.stderr) == (0, "")


def arguments(objects: Objects) -> list[str]:
    [container] = one(objects, "Deployment")["spec"]["template"]["spec"]["containers"]
    return list(container["args"])


def environment(objects: Objects) -> dict[str, str]:
    """The variables of the operator's container that have a plain value."""
    [container] = one(objects, "Deployment")["spec"]["template"]["spec"]["containers"]
    return {variable["name"]: variable["value"] for variable in container["env"] if "value" in variable}
