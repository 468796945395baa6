"""Helm, and the chart rendered by it."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from rendering import CHART, Helm, Objects, Render


@pytest.fixture(scope="session")
def helm(kubernetes_tools: Path) -> Helm:
    def run(*arguments: str, values: dict[str, Any]) -> subprocess.CompletedProcess[str]:
        """A helm command with values from standard input, in JSON, which is YAML too."""
        command = [kubernetes_tools / "helm", *arguments, "--values", "-"]
        return subprocess.run(command, input=json.dumps(values), capture_output=True, text=True)

    return run


@pytest.fixture(scope="session")
def render(helm: Helm) -> Render:
    def render(
        values: dict[str, Any], release: str = "turboquant-operator", namespace: str = "turboquant-system"
    ) -> Objects:
        """The objects of a release."""
        done = helm("template", release, str(CHART), "--namespace", namespace, values=values)
        assert done.returncode == 0, done.stderr
        return [document for document in yaml.safe_load_all(done.stdout) if document]

    return render
