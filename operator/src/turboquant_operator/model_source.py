"""Edge: from where a model lies to facts about it. The only place of the operator that reads models.

A public hub model is read here, by the operator itself; everything else by an inspection pod, which hands the
same document back (`turboquant_runtime.inspect`). `tq plan` reads folders too.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from turboquant_kernels.checkpoint import CONFIG, Checkpoint, CheckpointError, read_folder, read_hub
from turboquant_operator.api.spec import Architecture, Model
from turboquant_operator.planner.facts import Document, ModelFacts, read_facts
from turboquant_operator.planner.outcome import NoPlan, refused, unknown

HUB = "hf://"
SCHEMES = (HUB, "pvc://")
"""Model URIs that this release serves."""


def unsupported_source(uri: str) -> NoPlan | None:
    """The refusal of a URI whose scheme is not served yet."""
    if uri.startswith(SCHEMES):
        return None
    return refused(
        "UnsupportedModelSource",
        f"model.uri {uri!r} is not supported yet: use {' or '.join(SCHEMES)}.",
    )


def read_public_model(model: Model) -> Document | NoPlan:
    """The document of a public hf:// model, or the condition that says why it cannot be read. Blocking.

    Facts that the user gave stand in for a model that cannot be read.
    """
    if problem := unsupported_source(model.uri):
        return problem
    try:
        return asdict(read_hub(model.uri.removeprefix(HUB), model.revision))
    except CheckpointError as error:
        if isinstance(read_facts(None, None, model.architecture), ModelFacts):
            return asdict(Checkpoint({}))
        passing = error.reason == "HubUnreachable"
        return (unknown if passing else refused)(error.reason, str(error))


def facts_of(document: Mapping[str, Any], given: Architecture) -> ModelFacts | NoPlan:
    """What a document says; `given` wins. A document of another shape gives InvalidModelFacts."""
    config, weights = document.get("config"), document.get("weights", {})
    sizes = weights.values() if isinstance(weights, Mapping) else [None]
    if not isinstance(config, Mapping) or not all(isinstance(size, int) for size in sizes):
        return unknown("InvalidModelFacts", f"These are no model facts: {json.dumps(document)[:200]}")
    return read_facts(config, weights, given)


def read_model(source: str, revision: str = "") -> Checkpoint:
    """What `tq plan` is pointed at: a config.json, a folder or a hub model. Raises CheckpointError."""
    path = Path(source).expanduser()
    if path.is_file():
        return read_folder(path.parent) if path.name == CONFIG else _config_file(path)
    if path.is_dir() or source.startswith((".", "/", "~")):
        return read_folder(path)
    return read_hub(source.removeprefix(HUB), revision)


def _config_file(path: Path) -> Checkpoint:
    """A config under another name: facts about a model whose weights are elsewhere."""
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise CheckpointError("InvalidModel", f"{path} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError("InvalidModel", f"{path} holds no JSON object")
    return Checkpoint(config)
