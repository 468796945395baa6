"""What the API types share: camelCase names, frozen values, and the schema marks that the CRD needs.

A validation rule stands beside the field that it guards: `rule` puts a CEL expression and its message
into the JSON schema, from where `crd` carries it into the CRD.
"""

import re
from decimal import Decimal
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema
from pydantic.alias_generators import to_camel


class APIModel(BaseModel):
    """A part of the API object: camelCase on the wire, immutable in memory, docstrings as descriptions.

    Unknown fields are ignored: the API server has pruned them, and an older operator must read an object
    that a newer one wrote.
    """

    model_config = ConfigDict(
        alias_generator=to_camel,
        validate_by_name=True,
        validate_by_alias=True,
        frozen=True,
        use_attribute_docstrings=True,
    )


def rule(expression: str, message: str, **more: Any) -> dict[str, Any]:
    """One CEL rule in the form of `x-kubernetes-validations`."""
    return {"rule": expression, "message": message, **more}


def rules(*items: dict[str, Any]) -> dict[str, Any]:
    """The schema extension that carries CEL rules; for `json_schema_extra` of a field or a model."""
    return {"x-kubernetes-validations": list(items)}


Tensor = Annotated[
    Literal["auto"] | int,
    WithJsonSchema(
        {
            "x-kubernetes-int-or-string": True,
            **rules(
                rule(
                    "type(self) == int ? self >= 1 : self == 'auto'",
                    "must be auto or a number of GPUs, at least 1",
                )
            ),
        }
    ),
]
"""Tensor-parallel size: `auto` or a positive integer."""

_UNITS = {
    "": 1,
    "k": 10**3,
    "M": 10**6,
    "G": 10**9,
    "T": 10**12,
    "Ki": 2**10,
    "Mi": 2**20,
    "Gi": 2**30,
    "Ti": 2**40,
}


def parse_quantity(text: str) -> int:
    """Bytes of a Kubernetes quantity such as 8Gi or 1.5G, rounded down.

    The kubernetes client has a parser too, but `tq plan` must start without it. Raises ValueError.
    """
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)(k|M|G|T|Ki|Mi|Gi|Ti)?", text)
    if not match:
        raise ValueError(f"{text!r} is not a quantity of bytes; write for example 8Gi")
    return int(Decimal(match[1]) * _UNITS[match[2] or ""])


Quantity = Annotated[
    str,
    Field(
        max_length=32,
        json_schema_extra=rules(
            rule(
                "self.matches('^[0-9]+([.][0-9]+)?(k|M|G|T|Ki|Mi|Gi|Ti)?$') && self.matches('[1-9]')",
                "must be a number of bytes above 0 with a unit, such as 8Gi or 500M",
            )
        ),
    ),
]
"""Bytes as Kubernetes writes them: 8Gi, 500M, 1073741824."""

AnyObject = Annotated[
    dict[str, Any], WithJsonSchema({"type": "object", "x-kubernetes-preserve-unknown-fields": True})
]
"""An object of the core API that goes into the pod as it is; the API server checks it in the Deployment."""

_RESOURCE_LIST = {
    "type": "object",
    "additionalProperties": {"x-kubernetes-int-or-string": True, "maxLength": 32},
    "maxProperties": 32,
    **rules(
        rule(
            "self.all(name, type(self[name]) == int || isQuantity(self[name]))",
            "must be quantities, such as 500m or 8Gi",
        )
    ),
}

Resources = Annotated[
    dict[str, Any],
    WithJsonSchema(
        {
            "type": "object",
            "properties": {
                "requests": {"description": "Amounts that the scheduler sets aside.", **_RESOURCE_LIST},
                "limits": {"description": "Amounts that the container cannot pass.", **_RESOURCE_LIST},
            },
            **rules(
                rule(
                    "[has(self.requests) ? self.requests : {}, has(self.limits) ? self.limits : {}]"
                    ".all(list, !list.exists(name, name.endsWith('/gpu')))",
                    "the operator asks for the GPUs: remove them and set parallelism.tensor",
                )
            ),
        }
    ),
]
"""Requests and limits of a container, by resource name: {"requests": {"cpu": 4, "memory": "16Gi"}}."""
