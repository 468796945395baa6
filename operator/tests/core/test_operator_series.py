"""The operator's metrics, from objects as they are now."""

from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from sample import OWNER, PLAN, deployment, spec

from turboquant_operator.metrics import OperatorMetrics
from turboquant_operator.status import Seen, next_status


def body(name: str, *tokens: int) -> dict[str, Any]:
    from datetime import UTC, datetime

    seen = Seen(PLAN, deployment=deployment(updated=1, ready=1), measured_tokens=tokens)
    status = next_status(OWNER, spec(), {}, seen, datetime(2026, 1, 1, tzinfo=UTC))
    return {
        "metadata": {"namespace": "models", "name": name},
        "spec": {"model": {"uri": "hf://a/b"}},
        "status": status.model_dump(by_alias=True, mode="json", exclude_none=True),
    }


def page(*bodies: dict[str, Any]) -> str:
    registry = CollectorRegistry()
    OperatorMetrics(lambda: bodies, registry)
    return generate_latest(registry).decode()


def test_capacities_of_an_object() -> None:
    found = page(body("llama", 400_000))
    key = '{name="llama",namespace="models"}'
    assert f"turboquant_deployment_predicted_capacity_tokens{key} 388000.0" in found
    assert f"turboquant_deployment_measured_capacity_tokens{key} 400000.0" in found
    assert f"turboquant_deployment_baseline_capacity_tokens{key} 100000.0" in found
    assert f"turboquant_deployment_plan_error_ratio{key} -0.03" in found
    assert 'format="tq-k5v3",model="hf://a/b"' in found


def test_unmeasured_object_has_no_measured_series() -> None:
    assert "measured_capacity_tokens{" not in page(body("llama"))


def test_objects_are_counted_by_condition() -> None:
    found = page(body("a", 1), body("b"), {"metadata": {"namespace": "n", "name": "new"}, "spec": {}})
    assert 'turboquant_operator_deployments{condition="Ready"} 2.0' in found
    assert 'turboquant_operator_deployments{condition="Degraded"} 0.0' in found


def test_reconciles_are_counted() -> None:
    registry = CollectorRegistry()
    metrics = OperatorMetrics(list, registry)
    metrics.reconcile_errors.inc()
    metrics.reconcile_seconds.observe(0.2)
    found = generate_latest(registry).decode()
    assert "turboquant_operator_reconcile_errors_total 1.0" in found
    assert "turboquant_operator_reconcile_duration_seconds_count 1.0" in found
