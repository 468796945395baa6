"""Edge: from where a model lies to facts about it. The only place of the operator that reads models.

A public hub model is read here, by the operator itself; everything else by an inspection pod, whose
termination message `facts_from_inspection` reads. `tq plan` reads folders too.
"""

import json
from pathlib import Path

from turboquant_kernels.checkpoint import CONFIG, Checkpoint, CheckpointError, read_folder, read_hub
from turboquant_operator.api.spec import Architecture, Model
from turboquant_operator.planner.facts import ModelFacts, read_facts
from turboquant_operator.planner.outcome import NoPlan, refused, unknown

HUB = "hf://"

_WRONG = {"ModelNotFound", "ModelAccessDenied", "InvalidModel"}
"""Reasons that only a change of the object or of the model can cure; others may pass by themselves."""


def unsupported_source(model: Model) -> NoPlan | None:
    """The refusal of a URI scheme that is not implemented yet."""
    scheme = model.uri.partition("://")[0]
    if scheme in ("hf", "pvc"):
        return None
    return refused(
        "UnsupportedModelSource",
        f"model.uri {model.uri!r}: {scheme}:// is not supported yet, use hf:// or pvc://.",
    )


def facts_from_hub(model: Model) -> tuple[ModelFacts | NoPlan, str]:
    """Facts about a public hf:// model, and the commit that they were read from."""
    try:
        return _facts(read_hub(model.uri.removeprefix(HUB), model.revision), model.architecture)
    except CheckpointError as error:
        return _condition(error, model.architecture), ""


def facts_from_inspection(message: str, model: Model) -> tuple[ModelFacts | NoPlan, str]:
    """Facts from an inspection pod's termination message, and the commit where there is one."""
    try:
        document = json.loads(message)
        if "error" in document:
            raise CheckpointError(document["error"]["reason"], document["error"]["message"])
        return _facts(Checkpoint(**document), model.architecture)
    except CheckpointError as error:
        return _condition(error, model.architecture), ""
    except (ValueError, TypeError, KeyError):
        told = message.strip()[-300:] or "nothing"
        return unknown("InspectionFailed", f"The inspection pod reported no model facts but: {told}"), ""


def read_model(source: str, revision: str = "") -> Checkpoint:
    """What `tq plan` is pointed at: a config.json, a folder or a hub model. Raises CheckpointError."""
    path = Path(source).expanduser()
    if path.is_file():
        if path.name == CONFIG:
            return read_folder(path.parent)
        return _config_file(path)
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


def _facts(found: Checkpoint, given: Architecture) -> tuple[ModelFacts | NoPlan, str]:
    return read_facts(found.config, found.weights, given), found.revision


def _condition(error: CheckpointError, given: Architecture) -> ModelFacts | NoPlan:
    """Facts that the user gave stand in for a model that cannot be read; else the reason why it cannot."""
    facts = read_facts(None, None, given)
    if isinstance(facts, ModelFacts):
        return facts
    return (refused if error.reason in _WRONG else unknown)(error.reason, str(error))
