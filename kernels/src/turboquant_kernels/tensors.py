"""Single tensors of a model's safetensors files, from a folder or by ranges from a Hugging Face hub.

Only what is asked for is read: of a hub's model the headers and the tensors that are named, not its weights.
"""

import json
from collections.abc import Callable, Collection, Iterator
from math import prod
from pathlib import Path
from typing import Any

import torch

from turboquant_kernels.checkpoint import (
    CONFIG,
    INDEX,
    CheckpointError,
    TensorPlace,
    loaded_files,
    read_header,
)

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "F8_E8M0": torch.uint8,  # exponents
}


class Tensors:
    """The tensors of one model, by name.

    `names` are its files, of which those are read that the engine loads; `open_file` opens one, seekable.
    Raises CheckpointError (InvalidModel) where one is no safetensors file.
    """

    def __init__(self, names: Collection[str], open_file: Callable[[str], Any]) -> None:
        self._open_file = open_file
        self._places: dict[str, tuple[str, TensorPlace]] = {}
        for name in self._loaded(names):
            if name.endswith(".safetensors"):
                with open_file(name) as file:
                    places = read_header(file, name)
                self._places.update({tensor: (name, place) for tensor, place in places.items()})

    def _loaded(self, names: Collection[str]) -> list[str]:
        """The weight files that the engine loads."""
        if INDEX not in names:
            return loaded_files(names, None)
        try:
            with self._open_file(INDEX) as file:
                return loaded_files(names, json.load(file))
        except (ValueError, TypeError, AttributeError) as error:
            raise CheckpointError("InvalidModel", f"{INDEX} names no files: {error}") from error

    @classmethod
    def of_folder(cls, folder: Path) -> "Tensors":
        """Of a model's folder."""
        return cls([entry.name for entry in folder.iterdir()], lambda name: (folder / name).open("rb"))

    @classmethod
    def of_hub(cls, repository: str, revision: str = "") -> "Tensors":
        """Of a model of the hub that HF_ENDPOINT names; of the local copy where HF_HUB_OFFLINE is set."""
        from huggingface_hub import HfFileSystem, constants, try_to_load_from_cache

        if constants.HF_HUB_OFFLINE:
            return cls.of_folder(
                Path(str(try_to_load_from_cache(repository, CONFIG, revision=revision or None))).parent
            )

        hub = HfFileSystem()
        root = f"{repository}@{revision}" if revision else repository
        names = [path.rsplit("/", 1)[-1] for path in hub.ls(root, detail=False)]
        return cls(names, lambda name: hub.open(f"{root}/{name}", "rb", cache_type="none"))

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def read(self, name: str) -> torch.Tensor:
        """A tensor in its own dtype, on the CPU. KeyError for a name that is not there, CheckpointError for a
        dtype that is not known or a file that ends too early."""
        file_name, place = self._places[name]
        if (dtype := _DTYPES.get(place.dtype)) is None:
            raise CheckpointError(
                "InvalidModel", f"{file_name}: {name} is in {place.dtype}, which is not read"
            )
        with self._open_file(file_name) as file:
            file.seek(place.begin)
            data = bytearray(file.read(place.end - place.begin))
        if len(data) != prod(place.shape) * dtype.itemsize:
            raise CheckpointError("InvalidModel", f"{file_name} ends within {name}: the copy is incomplete")
        return torch.frombuffer(data, dtype=dtype).reshape(place.shape)
