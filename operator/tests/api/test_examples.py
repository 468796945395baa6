"""The objects in examples/: what a user copies must be valid, and say how to see it run."""

import json
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from turboquant_operator.api import API_VERSION, KIND
from turboquant_operator.api.crd import structural_schema
from turboquant_operator.api.spec import TurboQuantDeploymentSpec

FOLDER = Path(__file__).parents[3] / "examples"
each_example = pytest.mark.parametrize("file", sorted(FOLDER.glob("*.yaml")), ids=lambda file: file.stem)


def documents(file: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(file.read_text()))


def deployment(file: Path) -> dict[str, Any]:
    [found] = [document for document in documents(file) if document["kind"] == KIND]
    return found


def closed(schema: Any) -> Any:
    """The schema with every field that it does not name forbidden."""
    if isinstance(schema, list):
        return [closed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    schema = {key: closed(part) for key, part in schema.items()}
    return {**schema, "additionalProperties": False} if isinstance(schema.get("properties"), dict) else schema


@each_example
def test_example_fits_the_schema_and_names_no_unknown_field(file: Path) -> None:
    example = deployment(file)
    assert example["apiVersion"] == API_VERSION
    jsonschema.validate(example["spec"], closed(structural_schema(TurboQuantDeploymentSpec)))


@each_example
def test_example_says_how_to_apply_it_and_see_it_ready(file: Path) -> None:
    name, text = deployment(file)["metadata"]["name"], file.read_text()
    assert f"#   kubectl apply -f {file.name}\n" in text
    assert f"tqd/{name}\n" in text


def test_autoscaled_example_leaves_replicas_to_the_autoscaler() -> None:
    scaled, autoscaler = documents(FOLDER / "autoscaled.yaml")
    assert "replicas" not in scaled["spec"]
    target = {"apiVersion": API_VERSION, "kind": KIND, "name": scaled["metadata"]["name"]}
    assert autoscaler["spec"]["scaleTargetRef"] == target


@pytest.mark.cluster
@each_example
def test_api_server_takes_the_example(
    file: Path, namespace: str, kubernetes_tools: Path, kubeconfig: Path
) -> None:
    kubectl = [kubernetes_tools / "kubectl", "--kubeconfig", kubeconfig, "--namespace", namespace]
    done = subprocess.run(
        [*kubectl, "apply", "--validate=strict", "-o", "json", "-f", file], capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)
