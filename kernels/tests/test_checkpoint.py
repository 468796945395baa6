"""Reading a model folder: config, bytes of weights by dtype, and errors that name the way out."""

import json
import struct
from pathlib import Path

import pytest

from turboquant_kernels.checkpoint import CheckpointError, read_folder


def write_safetensors(path: Path, tensors: dict[str, tuple[str, int]]) -> None:
    """A safetensors file with the given tensors: name to (dtype, bytes)."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, (dtype, size) in tensors.items():
        header[name] = {"dtype": dtype, "shape": [size], "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(end))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    return tmp_path


def test_bytes_are_summed_by_dtype(folder):
    write_safetensors(folder / "model.safetensors", {"a": ("BF16", 64), "b": ("F32", 16), "c": ("BF16", 8)})
    found = read_folder(folder)
    assert found.config == {"model_type": "llama"}
    assert found.weights == {"BF16": 72, "F32": 16}


def test_the_index_says_which_files_count(folder):
    write_safetensors(folder / "model-00001-of-00002.safetensors", {"a": ("BF16", 64)})
    write_safetensors(folder / "model-00002-of-00002.safetensors", {"b": ("BF16", 32)})
    write_safetensors(folder / "adapter.safetensors", {"c": ("BF16", 1000)})
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert read_folder(folder).weights == {"BF16": 96}


def test_a_second_copy_in_another_layout_is_not_counted(folder):
    write_safetensors(folder / "model.safetensors", {"a": ("BF16", 64)})
    write_safetensors(folder / "consolidated.safetensors", {"a": ("BF16", 64)})
    (folder / "pytorch_model.bin").write_bytes(bytes(64))
    assert read_folder(folder).weights == {"BF16": 64}


def test_pytorch_files_count_with_unknown_dtype(folder):
    (folder / "pytorch_model-00001-of-00001.bin").write_bytes(bytes(100))
    (folder / "training_args.bin").write_bytes(bytes(7))
    assert read_folder(folder).weights == {"": 100}


def test_a_folder_without_weights_has_none(folder):
    assert read_folder(folder).weights == {}


def test_an_incomplete_copy_names_the_missing_file(folder):
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"lacks model-00001-of-00002\.safetensors") as error:
        read_folder(folder)
    assert error.value.reason == "InvalidModel"


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="nowhere is not a folder") as error:
        read_folder(tmp_path / "nowhere")
    assert error.value.reason == "ModelNotFound"


def test_a_folder_without_config_tells_what_it_has(tmp_path):
    (tmp_path / "model.gguf").touch()
    with pytest.raises(CheckpointError, match=r"has no config\.json \(it has: model\.gguf\)"):
        read_folder(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", "\udcff"])
def test_a_config_that_is_no_json_object_is_invalid(tmp_path, text):
    (tmp_path / "config.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(CheckpointError, match=r"config\.json") as error:
        read_folder(tmp_path)
    assert error.value.reason == "InvalidModel"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"1234",
        struct.pack("<Q", 2**60),
        struct.pack("<Q", 2) + b"{]",
        struct.pack("<Q", 9) + b'{"a": {}}',
    ],
)
def test_a_broken_safetensors_file_is_named(folder, content):
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors is not a safetensors file"):
        read_folder(folder)


def test_files_of_another_user_are_named_with_the_way_out(folder, monkeypatch):
    def refuse(path, *_, **__):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", refuse)  # tests may run as root, whom no file mode stops
    with pytest.raises(CheckpointError, match=r"may not be read by user \d+: make its files") as error:
        read_folder(folder)
    assert error.value.reason == "ModelNotReadable"
