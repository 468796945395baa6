"""Fixtures for the tests of every distribution that need Kubernetes' own programs or a real API server."""

import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent


@pytest.fixture(scope="session")
def kubernetes_tools() -> Path:
    """The folder that holds kubectl and helm. Unpacked on first use, and kept in the user's cache."""
    return Path(_output(ROOT / "tests" / "cluster" / "binaries", "--tools"))


@pytest.fixture(scope="session")
def kubeconfig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An administrator's kubeconfig of an API server with controllers, which knows TurboQuantDeployments.

    There is no node: pods stay Pending. One server serves the whole session, so a test works in a
    `namespace` of its own.
    """
    script = ROOT / "tests" / "cluster" / "apiserver"
    folder = tmp_path_factory.mktemp("apiserver")
    try:
        kubeconfig = Path(_output(script, "up", folder, "--with-controllers"))
        kubectl = Path(_output(ROOT / "tests" / "cluster" / "binaries")) / "kubectl"
        _output(kubectl, "--kubeconfig", kubeconfig, "apply", "--server-side", "-f", ROOT / "crds")
        _output(kubectl, "--kubeconfig", kubeconfig, "wait", "--for=condition=Established", "crd", "--all")
        yield kubeconfig
    finally:
        subprocess.run([script, "down", folder], check=True, capture_output=True)


@pytest.fixture
def namespace(kubeconfig: Path, kubernetes_tools: Path) -> Iterator[str]:
    """A fresh namespace, deleted afterwards with all that is in it."""
    name = f"test-{uuid.uuid4().hex[:8]}"
    kubectl = [kubernetes_tools / "kubectl", "--kubeconfig", kubeconfig]
    _output(*kubectl, "create", "namespace", name)
    yield name
    _output(*kubectl, "delete", "namespace", name, "--wait=false")


def _output(*command: str | Path) -> str:
    """Standard output of a program; its standard error is in the exception's notes if it fails."""
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    except subprocess.CalledProcessError as error:
        error.add_note(error.stderr)
        raise
