"""What the API server itself accepts, fills in and refuses, with the generated CRD."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from kubernetes import client

from turboquant_operator.api import API_VERSION, GROUP, KIND, PLURAL, VERSION
from turboquant_operator.api.crd import custom_resource_definition
from turboquant_operator.api.spec import TurboQuantDeploymentSpec

pytestmark = pytest.mark.cluster

INVALID = yaml.safe_load((Path(__file__).parent / "invalid_objects.yaml").read_text())
SMALLEST = {"model": {"uri": "hf://meta-llama/Llama-3.1-8B-Instruct"}}


@pytest.fixture
def deployments(api_client: client.ApiClient, namespace: str) -> "Deployments":
    return Deployments(api_client, namespace)


class Deployments:
    """The TurboQuantDeployments of one namespace, as kubectl would reach them."""

    def __init__(self, api_client: client.ApiClient, namespace: str) -> None:
        self.api = client.CustomObjectsApi(api_client)
        self.where = {"group": GROUP, "version": VERSION, "namespace": namespace, "plural": PLURAL}

    def create(self, spec: dict[str, Any], name: str = "llama-8b", **options: Any) -> dict[str, Any]:
        body = {"apiVersion": API_VERSION, "kind": KIND, "metadata": {"name": name}, "spec": spec}
        return self.api.create_namespaced_custom_object(
            **self.where, body=body, field_validation="Strict", **options
        )


def spec_of(case: dict[str, Any]) -> dict[str, Any]:
    """The smallest spec with a case of the table written over it."""
    spec: dict[str, Any] = copy.deepcopy(SMALLEST)
    for field, value in case.get("spec", {}).items():
        spec[field] = {**spec.get(field, {}), **value} if isinstance(value, dict) else value
    return {field: value for field, value in spec.items() if field not in case.get("remove", [])}


def test_crd_installs_without_a_warning(api_client: client.ApiClient) -> None:
    _, status, headers = client.ApiextensionsV1Api(
        api_client
    ).patch_custom_resource_definition_with_http_info(
        f"{PLURAL}.{GROUP}",
        custom_resource_definition(),
        field_manager="test",
        field_validation="Strict",
        force=True,
        dry_run="All",
        _content_type="application/apply-patch+yaml",
    )
    assert (status, headers.get("Warning")) == (200, None)


def test_smallest_object_is_filled_with_the_defaults_of_the_types(deployments: Deployments) -> None:
    stored = deployments.create(SMALLEST)["spec"]
    assert stored["kvCache"] == {"format": "auto", "quality": "balanced"}
    assert stored["replicas"] == 1
    assert TurboQuantDeploymentSpec.model_validate(stored) == TurboQuantDeploymentSpec.model_validate(
        SMALLEST
    )


def test_scale_subresource_writes_replicas_and_reads_status(deployments: Deployments) -> None:
    deployments.create(SMALLEST)
    address = {**deployments.where, "name": "llama-8b"}
    deployments.api.patch_namespaced_custom_object_scale(**address, body={"spec": {"replicas": 3}})
    status = {"status": {"replicas": 2, "selector": "app.kubernetes.io/instance=llama-8b"}}
    deployments.api.patch_namespaced_custom_object_status(**address, body=status)
    scale = deployments.api.get_namespaced_custom_object_scale(**address)
    assert scale["spec"] == {"replicas": 3}
    assert scale["status"] == {"replicas": 2, "selector": "app.kubernetes.io/instance=llama-8b"}
    assert deployments.api.get_namespaced_custom_object(**address)["spec"]["replicas"] == 3


def test_spec_and_status_are_written_apart(deployments: Deployments) -> None:
    deployments.create(SMALLEST)
    address = {**deployments.where, "name": "llama-8b"}
    both = {"spec": {"replicas": 5}, "status": {"replicas": 5}}
    assert "status" not in deployments.api.patch_namespaced_custom_object(**address, body=both)
    stored = deployments.api.patch_namespaced_custom_object_status(
        **address, body={"spec": {"replicas": 7}, "status": {"replicas": 6}}
    )
    assert (stored["spec"]["replicas"], stored["status"]["replicas"]) == (5, 6)


def test_largest_object_stays_within_the_cost_limit_of_the_rules(deployments: Deployments) -> None:
    many, long = range(64), "x" * 200
    spec = {
        "model": {"uri": f"hf://organisation/{'x' * 494}"},
        "kvCache": {"skipLayers": list(range(256))},
        "engine": {
            "args": [f"--{'long-' * 101}{i:05}" for i in many],
            "env": [{"name": f"{long}{i}", "value": long * 20} for i in many],
        },
        "pod": {
            "labels": {f"example.com/label-{i}": "x" * 63 for i in many},
            "resources": {"limits": {f"example.com/resource-{i}": 1 for i in range(32)}},
            "imagePullSecrets": [{"name": "x" * 253} for _ in range(16)],
        },
    }
    assert deployments.create(spec)


@pytest.mark.parametrize("case", INVALID["rejected"].values(), ids=INVALID["rejected"])
def test_invalid_object_is_rejected_with_the_field_and_the_way_out(
    case: dict[str, Any], api_client: client.ApiClient
) -> None:
    deployments = Deployments(api_client, "default")
    with pytest.raises(client.ApiException) as refusal:
        deployments.create(spec_of(case), case.get("name", "llama-8b"), dry_run="All")
    message = json.loads(refusal.value.body)["message"]
    assert case["field"] in message
    assert case["message"] in message


@pytest.mark.parametrize("case", INVALID["admitted"].values(), ids=INVALID["admitted"])
def test_object_that_only_the_operator_can_judge_is_admitted(
    case: dict[str, Any], api_client: client.ApiClient
) -> None:
    assert Deployments(api_client, "default").create(spec_of(case), dry_run="All")
