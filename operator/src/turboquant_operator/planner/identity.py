"""The plan's hash: equal for objects whose engines are interchangeable, different where pods must roll.

It stands in the pod template and beside the measured capacity, so it covers what the engine is started with
and nothing that only explains it: neither replicas nor reasons nor predictions, nor the wishes
(quality, concurrentSequences) that led to the same engine.
"""

import hashlib
import json
from functools import partial

from pydantic import BaseModel

from turboquant_kernels.plans import KVPlan
from turboquant_operator.api.schema import parse_quantity
from turboquant_operator.api.spec import TurboQuantDeploymentSpec
from turboquant_operator.planner.options import Option

HASH_CHARACTERS = 16
"""64 bits, and short enough for a label value."""


def plan_hash(
    spec: TurboQuantDeploymentSpec,
    chosen: Option,
    accelerator: str,
    kv_plan: KVPlan | None,
    revision: str,
) -> str:
    """Hexadecimal digest of the canonical JSON of everything that the engine is started with."""
    # Without defaults: a field that a later release adds must not roll engines that do not use it.
    dump = partial(BaseModel.model_dump, mode="json", by_alias=True, exclude_defaults=True)
    memory = spec.kv_cache.memory
    document = {
        "accelerator": accelerator,
        "contextLength": chosen.context_length,
        "engine": dump(spec.engine),
        "format": chosen.choice.name,
        "kvPlan": kv_plan.to_dict() if kv_plan else None,
        "memory": None if memory is None else parse_quantity(memory),
        "model": dump(spec.model, exclude={"architecture"}),
        "pipeline": chosen.pipeline,
        "pod": dump(spec.pod),
        "revision": revision,
        "service": dump(spec.service, include={"api_key_secret_ref"}),
        "skipLayers": sorted(spec.kv_cache.skip_layers),
        "tensor": chosen.tensor,
    }
    canonical = json.dumps(document, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:HASH_CHARACTERS]
