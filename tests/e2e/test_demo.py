"""The demo as a test: what `make demo` promises, from set-up to an answer, and nothing left behind."""

import json
import os
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
CLUSTER = ROOT / ".cluster"

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1500)]


def run(*command: str) -> str:
    """Standard output of a command that must succeed; what it said stands in the failure."""
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, f"{command} exited {done.returncode}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def demo() -> Iterator[str]:
    """What `make demo` prints; taken down afterwards, whatever happened."""
    if os.geteuid() != 0:
        pytest.skip("the local cluster needs root")
    try:
        yield run("tests/e2e/demo", "up")
    finally:
        run("tests/e2e/demo", "down")


@pytest.fixture(scope="module")
def status(demo: str) -> dict[str, Any]:
    """`status` of the demo's object."""
    kubectl = [str(CLUSTER / "bin/kubectl"), "--kubeconfig", str(CLUSTER / "kubeconfig")]
    return json.loads(run(*kubectl, "get", "tqd/gemma-3-270m", "-o", "jsonpath={.status}"))


def test_the_object_becomes_ready(status: dict[str, Any]) -> None:
    ready = next(c for c in status["conditions"] if c["type"] == "Ready")
    assert ready["status"] == "True", ready


def test_the_engine_has_as_many_tokens_as_predicted(status: dict[str, Any]) -> None:
    assert status["capacity"]["measuredTokens"] == status["plan"]["predictedTokens"]
    assert status["capacity"]["predictionErrorPercent"] == "0.0"


def test_the_gain_is_measured_over_baseline(status: dict[str, Any]) -> None:
    measured, baseline = status["capacity"]["measuredTokens"], status["plan"]["baselineTokens"]
    assert float(status["capacity"]["gain"]) == pytest.approx(measured / baseline, abs=0.005)
    # Each sequence keeps its newest tokens uncompressed, in full attention and in five kinds of windows.
    assert measured > 3.5 * baseline


@pytest.fixture
def images(tmp_path: Path) -> list[str]:
    """Two images that this machine has never had, on a common layer of many files."""
    (tmp_path / "common").mkdir()
    for index in range(2000):
        (tmp_path / "common" / str(index)).write_text(str(tmp_path) + str(time.time_ns()))
    run("git", "init", "--quiet", str(tmp_path))  # build-image copies what git knows or would add
    names = []
    for index in range(2):
        (tmp_path / f"own-{index}").touch()
        dockerfile = tmp_path / f"{index}.Dockerfile"
        dockerfile.write_text(f"FROM scratch\nCOPY common /common\nCOPY own-{index} /\n")
        built = run("tests/cluster/build-image", f"test-{index}", str(dockerfile), str(tmp_path))
        names.append(built.strip())
    return names


def test_images_with_a_common_layer_load_side_by_side(demo: str, images: list[str]) -> None:
    with ThreadPoolExecutor(len(images)) as pool:
        loaded = list(pool.map(lambda image: run("tests/cluster/load-image", image).strip(), images))
    assert loaded == images


def test_the_model_answers(demo: str) -> None:
    assert "Paris is the capital of France" in demo
