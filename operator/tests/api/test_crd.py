"""The generated CustomResourceDefinition: current, structural, described, and true to the types."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from turboquant_operator.api.crd import (
    CHART_FILE,
    CRD_FILE,
    PRINTER_COLUMNS,
    chart_text,
    crd_text,
    custom_resource_definition,
    structural_schema,
)
from turboquant_operator.api.spec import NAME_RULE, SPEC_RULES, TurboQuantDeploymentSpec
from turboquant_operator.api.status import TurboQuantDeploymentStatus

ROOT = Path(__file__).parents[3]
[VERSION] = custom_resource_definition()["spec"]["versions"]
SCHEMA = VERSION["schema"]["openAPIV3Schema"]


def nodes(schema: dict[str, Any], path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every node of a schema with its path, the root first."""
    yield path, schema
    for name, child in schema.get("properties", {}).items():
        yield from nodes(child, f"{path}.{name}")
    if "items" in schema:
        yield from nodes(schema["items"], f"{path}[]")
    if isinstance(schema.get("additionalProperties"), dict):
        yield from nodes(schema["additionalProperties"], f"{path}.*")


def fill(value: Any, schema: dict[str, Any]) -> Any:
    """The value with defaults filled in, as the API server does it."""
    if isinstance(value, dict):
        for name, child in schema.get("properties", {}).items():
            if name not in value and "default" in child:
                value = {**value, name: child["default"]}
            if name in value:
                value = {**value, name: fill(value[name], child)}
    return value


@pytest.mark.parametrize(("file", "text"), [(CRD_FILE, crd_text()), (CHART_FILE, chart_text())], ids=str)
def test_written_file_is_current(file: Path, text: str) -> None:
    assert (ROOT / file).read_text() == text, "run `make generate`"


def test_chart_differs_by_condition_and_keep_policy_alone() -> None:
    first, *lines, last = chart_text().splitlines()
    assert (first, last) == ("{{- if .Values.crds.install }}", "{{- end }}")
    in_chart = yaml.safe_load("\n".join(lines))
    assert in_chart["metadata"].pop("annotations") == {"helm.sh/resource-policy": "keep"}
    assert in_chart == yaml.safe_load(crd_text())


def test_chart_copy_holds_nothing_else_that_helm_would_expand() -> None:
    assert chart_text().count("{{") == 2


def test_schema_is_structural() -> None:
    for path, node in nodes(SCHEMA):
        assert not {"$ref", "$defs", "anyOf", "allOf", "oneOf", "title", "const"} & node.keys(), path
        assert ("type" in node) != ("x-kubernetes-int-or-string" in node), path
        assert node.get("type") != "null", path


def test_only_objects_of_the_core_api_keep_unknown_fields() -> None:
    free = {path for path, node in nodes(SCHEMA) if "x-kubernetes-preserve-unknown-fields" in node}
    pod = {".affinity", ".tolerations[]", ".volumes[]", ".volumeMounts[]"}
    assert free == {f".spec.pod{field}" for field in pod} | {".spec.engine.env[].valueFrom"}


def test_every_field_is_described() -> None:
    fields = [(path, node) for path, node in nodes(SCHEMA) if path and not path.endswith(("[]", ".*"))]
    assert [path for path, node in fields if not node.get("description") and path != ".metadata"] == []


def test_smallest_object_gets_the_defaults_of_the_types() -> None:
    smallest = {"model": {"uri": "hf://meta-llama/Llama-3.1-8B-Instruct"}}
    filled = fill(smallest, SCHEMA["properties"]["spec"])
    parsed = TurboQuantDeploymentSpec.model_validate(smallest).model_dump(by_alias=True, mode="json")
    assert TurboQuantDeploymentSpec.model_validate(filled).model_dump(by_alias=True, mode="json") == parsed
    assert filled == without_empty(parsed)


def without_empty(value: Any) -> Any:
    """The value without null, empty strings, lists and maps: what a default of the schema does not say."""
    if not isinstance(value, dict):
        return value
    parts = {name: without_empty(part) for name, part in value.items()}
    return {name: part for name, part in parts.items() if part not in (None, "", [], {})}


def test_every_rule_of_the_types_is_in_the_crd_with_a_message() -> None:
    in_crd = [rule for _, node in nodes(SCHEMA) for rule in node.get("x-kubernetes-validations", [])]
    assert all(rule["message"].strip() and "\n" not in rule["message"] for rule in in_crd)
    declared = {rule["rule"] for rule in [NAME_RULE, *SPEC_RULES["x-kubernetes-validations"]]}
    for model in (TurboQuantDeploymentSpec, TurboQuantDeploymentStatus):
        declared |= set(rules_of(model.model_json_schema()))
    assert {rule["rule"] for rule in in_crd} == declared


def rules_of(value: Any) -> Iterator[str]:
    """Every CEL expression anywhere in pydantic's own schema."""
    if isinstance(value, dict):
        yield from (rule["rule"] for rule in value.get("x-kubernetes-validations", []))
        value = list(value.values())
    if isinstance(value, list):
        for part in value:
            yield from rules_of(part)


def test_no_number_is_a_float() -> None:
    assert [path for path, node in nodes(SCHEMA) if node.get("type") == "number"] == []


@pytest.mark.parametrize("path", [*VERSION["subresources"]["scale"].values()])
def test_scale_reads_and_writes_fields_of_the_schema(path: str) -> None:
    assert path in dict(nodes(SCHEMA))


def test_columns_show_fields_of_the_schema() -> None:
    known = {path: node["type"] for path, node in nodes(SCHEMA) if "type" in node}
    for column in PRINTER_COLUMNS:
        path = column["jsonPath"].replace('[?(@.type=="Ready")]', "[]")
        if path != ".metadata.creationTimestamp":
            assert known[path] == column["type"], column["name"]


def test_two_columns_appear_only_when_wide() -> None:
    assert [column["name"] for column in PRINTER_COLUMNS if column["priority"]] == ["Model", "Message"]


def test_optional_field_is_neither_null_nor_required() -> None:
    class Example(BaseModel):
        """An example."""

        wanted: int
        maybe: int | None = None

    schema = structural_schema(Example)
    assert schema["required"] == ["wanted"]
    assert schema["properties"]["maybe"] == {"type": "integer"}


def test_object_with_a_required_part_gets_no_default() -> None:
    assert "default" not in SCHEMA["properties"]["spec"]["properties"]["model"]
