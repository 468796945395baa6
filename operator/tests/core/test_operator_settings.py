"""The operator's settings, from its environment."""

import pytest

from turboquant_operator.settings import Settings


def test_lease_is_in_the_operators_namespace_unless_told() -> None:
    assert Settings.from_environment({"POD_NAMESPACE": "system"}).lease_namespace == "system"
    told = {"POD_NAMESPACE": "system", "TURBOQUANT_LEASE_NAMESPACE": "team-a"}
    assert Settings.from_environment(told).lease_namespace == "team-a"


def test_defaults_need_no_environment() -> None:
    settings = Settings.from_environment({})
    assert (settings.metrics_port, settings.resync_seconds) == (8080, 300)


def test_port_that_is_no_number_is_an_error() -> None:
    with pytest.raises(ValueError, match="http"):
        Settings.from_environment({"TURBOQUANT_METRICS_PORT": "http"})
