"""A model as it lies on disk or on the hub: its config.json and the bytes of its weights. No torch.

Read at the edge by the operator (public hub models, `tq plan`) and by the inspection pod (everything that
only a pod of the user's namespace may read); what the numbers mean is the planner's business. Only small
files are read: config.json, a weights index, and the headers of safetensors files.
"""

import json
import os
import struct
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, BinaryIO

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"

DTYPE_BITS = {
    "F64": 64,
    "F32": 32,
    "F16": 16,
    "BF16": 16,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "F8_E8M0": 8,
    "F4": 4,
    "I64": 64,
    "I32": 32,
    "I16": 16,
    "I8": 8,
    "U64": 64,
    "U32": 32,
    "U16": 16,
    "U8": 8,
    "BOOL": 8,
}
"""Bits of one element of the safetensors dtypes."""

UNKNOWN_DTYPE = ""
"""Key of weight bytes whose dtype the files do not tell."""

_HEADER_LIMIT = 100 * 2**20
"""The safetensors format's own limit of a header."""


class CheckpointError(Exception):
    """A model that cannot be read; `reason` is CamelCase for a status condition, the message for a person."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class Checkpoint:
    """What was read of a model."""

    config: Mapping[str, Any]
    weights: Mapping[str, int] = field(default_factory=dict)
    """Bytes of all weights by safetensors dtype, `UNKNOWN_DTYPE` where files do not say; empty if none."""
    revision: str = ""
    """The commit on the hub."""


def read_folder(folder: Path) -> Checkpoint:
    """Reads a model folder. Raises CheckpointError: ModelNotFound, ModelNotReadable, InvalidModel."""
    if not folder.is_dir():
        raise CheckpointError("ModelNotFound", f"{folder} is not a folder: check the path of the model.")
    path = folder / CONFIG
    if not path.is_file():
        found = ", ".join(sorted(entry.name for entry in folder.iterdir())[:8]) or "nothing"
        raise CheckpointError("ModelNotFound", f"{folder} has no {CONFIG} (it has: {found}).")
    try:
        return Checkpoint(_json_object(path), _folder_weights(folder))
    except PermissionError as error:
        raise CheckpointError(
            "ModelNotReadable",
            f"{error.filename} may not be read by user {os.getuid()}: make its files readable for all.",
        ) from error


def read_hub(repository: str, revision: str = "") -> Checkpoint:
    """Reads a model of a Hugging Face hub, honouring HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE.

    Raises CheckpointError: ModelNotFound, ModelAccessDenied, HubUnreachable, InvalidModel.
    """
    # Imported here: it takes half a second, and folders are read without it.
    from huggingface_hub import HfApi, constants, hf_hub_download

    if constants.HF_HUB_OFFLINE:
        return _read_hub_cache(repository, revision)
    try:
        info = HfApi().model_info(repository, revision=revision or None, files_metadata=True)
        sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
        parameters = info.safetensors.parameters if info.safetensors else {}
        with TemporaryDirectory() as scratch:

            def fetch(name: str) -> Mapping[str, Any]:
                return _json_object(
                    Path(hf_hub_download(repository, name, revision=info.sha, local_dir=scratch))
                )

            config = fetch(CONFIG)
            if parameters and parameters.keys() <= DTYPE_BITS.keys():
                weights = {dtype: count * DTYPE_BITS[dtype] // 8 for dtype, count in parameters.items()}
            elif INDEX in sizes:
                weights = {UNKNOWN_DTYPE: int(fetch(INDEX).get("metadata", {}).get("total_size", 0))}
            else:
                weights = {UNKNOWN_DTYPE: sum(sizes[name] for name in weight_files(sizes))}
    except Exception as error:
        explained = _hub_error(error, repository, revision, constants.ENDPOINT)
        if explained is None:
            raise
        raise explained from error
    return Checkpoint(config, {dtype: size for dtype, size in weights.items() if size}, info.sha or "")


def _hub_error(error: Exception, repository: str, revision: str, endpoint: str) -> CheckpointError | None:
    """What an error of the hub's client means; None for one that is not the hub's."""
    from huggingface_hub import errors

    what = f"{repository}{'@' + revision if revision else ''} on {endpoint}"
    token = "spec.model.credentialsSecretRef, or HF_TOKEN on the command line"
    match error:
        case errors.GatedRepoError():
            return CheckpointError(
                "ModelAccessDenied",
                f"{what} is gated: accept its terms on the hub and give a token that may read it ({token}).",
            )
        case errors.RevisionNotFoundError():
            return CheckpointError("ModelNotFound", f"{what}: the hub has the model but no such revision.")
        case errors.RepositoryNotFoundError():
            return CheckpointError(
                "ModelNotFound", f"{what} does not exist, or is private and needs a token ({token})."
            )
        case errors.EntryNotFoundError():
            return CheckpointError("ModelNotFound", f"{what} has no {CONFIG}: is it a transformers model?")
        case errors.HFValidationError():
            return CheckpointError("ModelNotFound", f"{repository!r} cannot be a model of a hub: {error}")
    if isinstance(error, OSError) or type(error).__module__.startswith("httpx"):
        return CheckpointError(
            "HubUnreachable",
            f"{what} could not be read ({_first_line(error)}). HF_ENDPOINT names another hub, "
            "HF_HUB_OFFLINE=1 uses what was downloaded before.",
        )
    return None


def _read_hub_cache(repository: str, revision: str) -> Checkpoint:
    from huggingface_hub import constants, try_to_load_from_cache

    config = try_to_load_from_cache(repository, CONFIG, revision=revision or None)
    if not isinstance(config, str):
        raise CheckpointError(
            "HubUnreachable",
            f"{repository} is not in the cache {constants.HF_HUB_CACHE} and HF_HUB_OFFLINE is set: "
            "download it first, or unset HF_HUB_OFFLINE.",
        )
    snapshot = Path(config).parent
    found = read_folder(snapshot)
    return Checkpoint(found.config, found.weights, snapshot.name)


def _json_object(path: Path) -> Mapping[str, Any]:
    try:
        document = json.loads(path.read_text())
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError("InvalidModel", f"{path.name} is not JSON: {error}") from error
    if not isinstance(document, dict):
        raise CheckpointError("InvalidModel", f"{path.name} holds no JSON object")
    return document


def _folder_weights(folder: Path) -> Mapping[str, int]:
    """Bytes by dtype of the files that the engine would load."""
    sizes = {entry.name: entry.stat().st_size for entry in folder.iterdir() if entry.is_file()}
    names = loaded_files(sizes, _json_object(folder / INDEX) if INDEX in sizes else None)
    if missing := [name for name in names if name not in sizes]:
        raise CheckpointError(
            "InvalidModel", f"{folder} lacks {missing[0]}, which {INDEX} names: the copy is incomplete."
        )
    total: Counter[str] = Counter()
    for name in names:
        if name.endswith(".safetensors"):
            total += _tensor_bytes(folder / name)
        else:
            total[UNKNOWN_DTYPE] += sizes[name]
    return dict(total)


def loaded_files(names: Iterable[str], index: Mapping[str, Any] | None) -> list[str]:
    """The weight files that the engine loads, sorted: those that the index names, if the model has one."""
    return sorted(weight_files(names) if index is None else set(index.get("weight_map", {}).values()))


def weight_files(names: Iterable[str]) -> list[str]:
    """The files that hold weights: safetensors before PyTorch's own, no second copy in another layout."""
    names = list(names)
    safetensors = [name for name in names if name.endswith(".safetensors") and "/" not in name]
    return (
        [name for name in safetensors if not name.startswith("consolidated")]
        or safetensors
        or [name for name in names if name.startswith("pytorch_model") and name.endswith(".bin")]
    )


def _tensor_bytes(path: Path) -> Counter[str]:
    """Bytes by dtype."""
    total: Counter[str] = Counter()
    with path.open("rb") as file:
        for tensor in read_header(file, path.name).values():
            total[tensor.dtype] += tensor.end - tensor.begin
    return total


@dataclass(frozen=True)
class TensorPlace:
    """Where a tensor lies in a safetensors file."""

    dtype: str
    """safetensors' name: a key of `DTYPE_BITS`."""
    shape: tuple[int, ...]
    begin: int
    """Bytes from the start of the file."""
    end: int


def read_header(file: BinaryIO, name: str) -> dict[str, TensorPlace]:
    """The tensors of a safetensors file: 8 bytes of length, then JSON, then the data.

    Raises CheckpointError (InvalidModel) where `file` is none; `name` is for the message.
    """
    try:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        (length,) = struct.unpack("<Q", file.read(8))
        if length > min(_HEADER_LIMIT, size):
            raise ValueError(f"a header of {length} bytes")
        return {
            tensor: TensorPlace(
                entry["dtype"],
                tuple(entry["shape"]),
                8 + length + entry["data_offsets"][0],
                8 + length + entry["data_offsets"][1],
            )
            for tensor, entry in json.loads(file.read(length)).items()
            if tensor != "__metadata__"
        }
    except (struct.error, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise CheckpointError("InvalidModel", f"{name} is not a safetensors file: {error}") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
