"""The operator's own metrics, on :8080/metrics.

What concerns an object is collected from its last status at scrape time, so its series vanish with it.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from turboquant_operator.status import conditions_by_type

Bodies = Callable[[], Iterable[Mapping[str, Any]]]
"""All TurboQuantDeployments as they are now known."""


class OperatorMetrics:
    """Counters of the reconciles, and the collector of the objects' state."""

    def __init__(self, bodies: Bodies, registry: CollectorRegistry) -> None:
        self.reconcile_seconds = Histogram(
            "turboquant_operator_reconcile_duration_seconds",
            "Time of one reconcile of one object.",
            buckets=(0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30),
            registry=registry,
        )
        self.reconcile_errors = Counter(
            "turboquant_operator_reconcile_errors_total",
            "Reconciles that failed and were tried again.",
            registry=registry,
        )
        registry.register(DeploymentCollector(bodies))


class DeploymentCollector(Collector):
    """State of the objects. Labels name the object, never a pod."""

    def __init__(self, bodies: Bodies) -> None:
        self._bodies = bodies

    def collect(self) -> Iterable[GaugeMetricFamily]:
        """One sample set per object and family."""
        by_condition: dict[str, int] = {}
        info = GaugeMetricFamily(
            "turboquant_deployment_info",
            "What an object runs; always 1.",
            labels=["namespace", "name", "model", "format", "accelerator", "tensor_parallel_size"],
        )
        predicted = _gauge("predicted_capacity_tokens", "KV capacity of one replica by the plan.")
        measured = _gauge("measured_capacity_tokens", "KV capacity of one replica as its engine reports it.")
        baseline = _gauge("baseline_capacity_tokens", "KV capacity of one replica without compression.")
        error = _gauge("plan_error_ratio", "(predicted - measured) / measured.")
        total = _gauge("total_capacity_tokens", "KV capacity of all ready replicas.")
        for body in self._bodies():
            metadata, status = body["metadata"], body.get("status", {})
            for kind, condition in conditions_by_type(status).items():
                by_condition.setdefault(kind, 0)
                by_condition[kind] += condition["status"] == "True"
            plan = status.get("plan")
            if plan is None:
                continue
            key = [metadata["namespace"], metadata["name"]]
            what = [body["spec"]["model"]["uri"], plan["format"], plan.get("accelerator", "")]
            info.add_metric([*key, *what, str(plan["tensorParallelSize"])], 1)
            predicted.add_metric(key, plan["predictedTokens"])
            baseline.add_metric(key, plan["baselineTokens"])
            capacity = status.get("capacity")
            if capacity is not None:
                measured.add_metric(key, capacity["measuredTokens"])
                total.add_metric(key, capacity["totalTokens"])
                error.add_metric(key, float(capacity["predictionErrorPercent"]) / 100)
        deployments = GaugeMetricFamily(
            "turboquant_operator_deployments", "Objects whose condition is True.", labels=["condition"]
        )
        for kind, count in sorted(by_condition.items()):
            deployments.add_metric([kind], count)
        return [deployments, info, predicted, measured, total, baseline, error]


def _gauge(name: str, documentation: str) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"turboquant_deployment_{name}", documentation, labels=["namespace", "name"])
