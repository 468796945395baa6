"""KV plans: which format each attention layer of a model uses. No torch.

A uniform format needs no plan. A plan is a small JSON document (schema: `kv_plan.schema.json` beside this
file) that the operator carries in a ConfigMap and the engine reads from `--additional-config`.
"""

import json
from dataclasses import dataclass
from typing import Any, Self

from turboquant_kernels.formats import Encoding, KVFormat

PLAN_VERSION = 1
PLAN_KEY = "turboquant"
"""Where a KV plan lies in vLLM's `--additional-config`: written by the operator, read by the engine."""
DEFAULT_SEED = 0
"""Seed of the rotation signs where no plan names one."""

_LAYER_FIELDS = {"key_bits", "value_bits", "encoding", "anchor"}


@dataclass(frozen=True)
class KVPlan:
    """The format of every attention layer, in the model's layer order, and the seed they share."""

    layers: tuple[KVFormat, ...]
    seed: int = DEFAULT_SEED

    @classmethod
    def uniform(cls, fmt: KVFormat, num_layers: int, seed: int = DEFAULT_SEED) -> Self:
        """One format for all layers."""
        return cls((fmt,) * num_layers, seed)

    @classmethod
    def from_dict(cls, document: dict[str, Any]) -> Self:
        """Reads a plan document; raises ValueError that names the field and the value that are wrong."""
        unknown = document.keys() - {"version", "seed", "layers"}
        if unknown:
            raise ValueError(f"KV plan: unknown field {sorted(unknown)[0]!r}; known: version, seed, layers")
        if _integer(document.get("version")) != PLAN_VERSION:
            raise ValueError(
                f"KV plan: version is {document.get('version')!r}, this release reads {PLAN_VERSION}"
            )
        seed = _integer(document.get("seed", DEFAULT_SEED))
        if seed is None or seed < 0:
            raise ValueError(f"KV plan: seed is {document['seed']!r}, not a non-negative integer")
        layers = document.get("layers")
        if not isinstance(layers, list) or not layers:
            raise ValueError("KV plan: layers is not a list with one entry per attention layer")
        return cls(tuple(_layer(index, entry) for index, entry in enumerate(layers)), seed)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Reads a plan from JSON text; raises ValueError as `from_dict` does."""
        try:
            document = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"KV plan: not JSON: {error}") from error
        if not isinstance(document, dict):
            raise ValueError("KV plan: the document is not a JSON object")
        return cls.from_dict(document)

    def to_dict(self) -> dict[str, Any]:
        """The document that `from_dict` reads."""
        return {
            "version": PLAN_VERSION,
            "seed": self.seed,
            "layers": [
                {
                    "key_bits": layer.key_bits,
                    "value_bits": layer.value_bits,
                    "encoding": str(layer.encoding),
                    "anchor": layer.anchor,
                }
                for layer in self.layers
            ],
        }


def _integer(value: object) -> int | None:
    """A JSON integer, which may be written 4.0; None for anything else, true and false included."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    return int(value) if isinstance(value, float) and value.is_integer() else None


def _layer(index: int, entry: object) -> KVFormat:
    where = f"KV plan: layers[{index}]"
    if not isinstance(entry, dict):
        raise ValueError(f"{where} is {entry!r}, not an object with key_bits and value_bits")
    unknown = entry.keys() - _LAYER_FIELDS
    if unknown:
        raise ValueError(f"{where}: unknown field {sorted(unknown)[0]!r}; known: {sorted(_LAYER_FIELDS)}")
    for field in ("key_bits", "value_bits"):
        if field not in entry:
            raise ValueError(f"{where}: {field} is missing")
        if _integer(entry[field]) is None:
            raise ValueError(f"{where}: {field} is {entry[field]!r}, not an integer")
    anchor = entry.get("anchor", False)
    if not isinstance(anchor, bool):
        raise ValueError(f"{where}: anchor is {anchor!r}, not true or false")
    try:
        encoding = Encoding(entry.get("encoding", Encoding.MSE))
        return KVFormat(int(entry["key_bits"]), int(entry["value_bits"]), encoding, anchor)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
