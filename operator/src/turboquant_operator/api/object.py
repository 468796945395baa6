"""A TurboQuantDeployment as the operator reads it: who it is, what is asked of it, what was last said of it.

Parsed once at the edge of a reconcile; everything behind it works on these typed values.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from pydantic import ValidationError

from turboquant_operator.api import API_VERSION, KIND
from turboquant_operator.api.spec import TurboQuantDeploymentSpec


class InvalidSpecError(ValueError):
    """A spec that the API server admitted and the types refuse. The text names the field and the fault."""


@dataclass(frozen=True)
class Identity:
    """Which object it is. Children point back to it."""

    namespace: str
    name: str
    uid: str
    generation: int
    resource_version: str

    @classmethod
    def of(cls, body: Mapping[str, Any]) -> Self:
        """The identity in an object's metadata."""
        metadata = body["metadata"]
        return cls(
            namespace=metadata["namespace"],
            name=metadata["name"],
            uid=metadata["uid"],
            generation=metadata.get("generation", 0),
            resource_version=metadata.get("resourceVersion", ""),
        )

    @property
    def owner_reference(self) -> dict[str, Any]:
        """Makes a child the object's: deleted with it by the garbage collector, no finalizer needed."""
        return {
            "apiVersion": API_VERSION,
            "kind": KIND,
            "name": self.name,
            "uid": self.uid,
            "controller": True,
            "blockOwnerDeletion": True,
        }

    def owns(self, child: Mapping[str, Any]) -> bool:
        """Whether this object is the controller of a child."""
        references = child["metadata"].get("ownerReferences", ())
        return any(r["uid"] == self.uid and r.get("controller") for r in references)


def parse_spec(body: Mapping[str, Any]) -> TurboQuantDeploymentSpec:
    """The typed spec of an object; raises InvalidSpecError that names each wrong field."""
    try:
        return TurboQuantDeploymentSpec.model_validate(body.get("spec", {}))
    except ValidationError as error:
        faults = ("spec." + ".".join(map(str, e["loc"])) + ": " + e["msg"] for e in error.errors())
        raise InvalidSpecError("; ".join(faults)) from error
