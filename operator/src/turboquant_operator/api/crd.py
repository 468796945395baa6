"""The CustomResourceDefinition, generated from the API types; `make generate` writes it.

pydantic describes a type in JSON schema; the API server wants the structural subset of OpenAPI v3: no
references, a type on every node, no `null`. `custom_resource_definition` translates; nothing is added by
hand, so the types stay the single source of fields, defaults, limits and rules.
"""

from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from turboquant_operator.api import GROUP, KIND, PLURAL, SHORT_NAME, SINGULAR, VERSION
from turboquant_operator.api.spec import NAME_RULE, SPEC_RULES, TurboQuantDeploymentSpec
from turboquant_operator.api.status import TurboQuantDeploymentStatus

CRD_FILE = Path("crds") / f"{PLURAL}.yaml"
CHART_FILE = Path("charts") / "turboquant-operator" / "templates" / "crd.yaml"

Schema = dict[str, Any]

_HEADER = "# Written by `make generate` from turboquant_operator.api. Do not edit.\n"

_OBJECT_PROPERTIES: Schema = {
    "apiVersion": {"type": "string", "description": "Version of the API that this object is written in."},
    "kind": {"type": "string", "description": KIND},
    "metadata": {"type": "object"},  # more is not allowed here
}


def _ready(field: str) -> str:
    return f'.status.conditions[?(@.type=="Ready")].{field}'


def _column(name: str, path: str, description: str, *, kind: str = "string", wide: bool = False) -> Schema:
    return {
        "name": name,
        "type": kind,
        "jsonPath": path,
        "description": description,
        "priority": 1 if wide else 0,
    }


PRINTER_COLUMNS = [
    _column("Ready", _ready("status"), "Whether all wanted replicas serve the present plan."),
    _column("Reason", _ready("reason"), "Why it is ready or not."),
    _column("Replicas", ".status.replicas", "Pods that exist.", kind="integer"),
    _column("TP", ".status.plan.tensorParallelSize", "Tensor-parallel size.", kind="integer"),
    _column("KV", ".status.plan.format", "How keys and values are stored."),
    _column("Gain", ".status.capacity.gain", "Measured tokens over those of the uncompressed cache."),
    _column("Capacity", ".status.capacity.totalTokens", "Tokens in all ready replicas.", kind="integer"),
    _column("Age", ".metadata.creationTimestamp", "Time since the object was made.", kind="date"),
    _column("Model", ".spec.model.uri", "Where the model comes from.", wide=True),
    _column("Message", _ready("message"), "What to know about its state.", wide=True),
]


def structural_schema(model: type[BaseModel]) -> Schema:
    """The structural OpenAPI v3 schema of an API type, with CEL rules and Kubernetes' list types.

    A default is written where it says more than absence does: `auto` or 8000, but no empty string, list or
    map. An object whose parts have defaults gets the default `{}`, from where the API server fills them.
    """
    schema = model.model_json_schema(by_alias=True, mode="validation")
    return _structural(schema, schema.get("$defs", {}))


def _structural(node: Schema, definitions: dict[str, Schema]) -> Schema:
    """One node of pydantic's schema and all below it."""
    node = {key: value for key, value in node.items() if key not in ("title", "$defs")}
    if "anyOf" in node:  # pydantic's `X | None`: here a field is optional by not being required
        [present] = [option for option in node.pop("anyOf") if option != {"type": "null"}]
        node = {**present, **node}
    if "$ref" in node:
        definition = definitions[node.pop("$ref").removeprefix("#/$defs/")]
        node = {**{key: value for key, value in definition.items() if key != "title"}, **node}
    if "description" in node:
        node["description"] = " ".join(node["description"].split())
    if "properties" in node:
        node["properties"] = {
            name: _structural(child, definitions) for name, child in node["properties"].items()
        }
    for key in ("items", "additionalProperties"):
        if key in node:
            node[key] = _structural(node[key], definitions)
    default = node.pop("default", None)
    if "properties" in node:
        parts_have_defaults = any("default" in child for child in node["properties"].values())
        if default is not None and parts_have_defaults:
            node["default"] = {}
    elif default not in (None, "", [], {}):
        node["default"] = default
    return node


def custom_resource_definition() -> Schema:
    """The manifest that makes an API server know TurboQuantDeployments."""
    spec = structural_schema(TurboQuantDeploymentSpec) | SPEC_RULES
    status = structural_schema(TurboQuantDeploymentStatus)
    version: Schema = {
        "name": VERSION,
        "served": True,
        "storage": True,
        "schema": {
            "openAPIV3Schema": {
                "description": TurboQuantDeploymentSpec.__doc__,
                "type": "object",
                "properties": {**_OBJECT_PROPERTIES, "spec": spec, "status": status},
                "required": ["spec"],
                "x-kubernetes-validations": [NAME_RULE],
            }
        },
        "subresources": {
            "status": {},
            "scale": {
                "specReplicasPath": ".spec.replicas",
                "statusReplicasPath": ".status.replicas",
                "labelSelectorPath": ".status.selector",
            },
        },
        "additionalPrinterColumns": PRINTER_COLUMNS,
    }
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{PLURAL}.{GROUP}"},
        "spec": {
            "group": GROUP,
            "names": {
                "kind": KIND,
                "listKind": f"{KIND}List",
                "plural": PLURAL,
                "singular": SINGULAR,
                "shortNames": [SHORT_NAME],
                "categories": ["all"],
            },
            "scope": "Namespaced",
            "versions": [version],
        },
    }


def crd_text() -> str:
    """The file in ``crds/``, for `kubectl apply`."""
    return _HEADER + _yaml(custom_resource_definition())


def chart_text() -> str:
    """The chart's template: the same definition, optional, and kept when the release is uninstalled.

    Templates, because Helm never upgrades what lies in a chart's ``crds/``.
    """
    crd = custom_resource_definition()
    crd["metadata"]["annotations"] = {"helm.sh/resource-policy": "keep"}
    return "{{- if .Values.crds.install }}\n" + _HEADER + _yaml(crd) + "{{- end }}\n"


def _yaml(manifest: Schema) -> str:
    class NoAliases(yaml.SafeDumper):
        """Columns and rules repeat equal values; anchors would be hard to read."""

        def ignore_aliases(self, data: object) -> bool:
            return True

    return yaml.dump(manifest, Dumper=NoAliases, sort_keys=False, width=110)


def main(root: Path = Path()) -> None:
    """Write both files below the repository's root."""
    for file, text in ((CRD_FILE, crd_text()), (CHART_FILE, chart_text())):
        path = root / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


if __name__ == "__main__":
    main()
