"""What the operator's own Deployment tells it, by environment variables. Read once, at start."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self


@dataclass(frozen=True)
class Settings:
    """Settings of one operator process."""

    runtime_image: str
    """TURBOQUANT_RUNTIME_IMAGE: the engine's image on GPUs, where `spec.engine.image` names none."""
    runtime_cpu_image: str
    """TURBOQUANT_RUNTIME_CPU_IMAGE: the same for accelerator type cpu."""
    lease_namespace: str
    """TURBOQUANT_LEASE_NAMESPACE: a namespace that the operator watches, for its Lease; where it runs
    (POD_NAMESPACE) if unset."""
    identity: str
    """POD_NAME: the holder that the Lease names."""
    metrics_port: int = 8080
    """TURBOQUANT_METRICS_PORT: where /metrics is served."""
    resync_seconds: float = 300
    """TURBOQUANT_RESYNC_SECONDS: time in which every object is reconciled at least once."""

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Self:
        """Reads the variables; raises ValueError for a number that is none."""
        return cls(
            runtime_image=environment.get("TURBOQUANT_RUNTIME_IMAGE", "turboquant-runtime:latest"),
            runtime_cpu_image=environment.get(
                "TURBOQUANT_RUNTIME_CPU_IMAGE", "turboquant-runtime-cpu:latest"
            ),
            lease_namespace=environment.get("TURBOQUANT_LEASE_NAMESPACE")
            or environment.get("POD_NAMESPACE", "default"),
            identity=environment.get("POD_NAME", "turboquant-operator"),
            metrics_port=int(environment.get("TURBOQUANT_METRICS_PORT", cls.metrics_port)),
            resync_seconds=float(environment.get("TURBOQUANT_RESYNC_SECONDS", cls.resync_seconds)),
        )
