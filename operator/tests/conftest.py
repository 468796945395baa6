"""What the operator's tests share."""

from pathlib import Path

import pytest
from kubernetes import client, config


@pytest.fixture(scope="session")
def api_client(kubeconfig: Path) -> client.ApiClient:
    """An administrator's client of the session's API server."""
    return config.new_client_from_config(str(kubeconfig))
