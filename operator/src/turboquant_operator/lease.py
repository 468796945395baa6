"""Proof that the operator still sees the cluster: a Lease that it renews and must see renewed.

A watch can die silently, and an idle cluster looks the same as a dead watch. So the operator makes a change
of its own every few seconds; when its renewals succeed and its watch does not show them, it is blind, and the
liveness probe says so. While the API server is down no renewal succeeds, and a restart would not help.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any

from turboquant_operator.builders.metadata import MANAGED_BY, MANAGER, Manifest

LEASE_NAME = "turboquant-operator"
RENEW_SECONDS = 20
BLIND_SECONDS = 120
"""Longer than kopf takes to give up a silent watch (70 s) and open another."""

logger = logging.getLogger(__name__)


class Heartbeat:
    """Renewals written and renewals seen, in seconds of a monotonic clock."""

    def __init__(self, namespace: str, identity: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._namespace = namespace
        self._identity = identity
        self._clock = clock
        self._renewed: float | None = None
        self._seen = clock()

    def lease(self) -> Manifest:
        """The Lease, renewed now."""
        return {
            "apiVersion": "coordination.k8s.io/v1",
            "kind": "Lease",
            "metadata": {
                "namespace": self._namespace,
                "name": LEASE_NAME,
                "labels": {MANAGED_BY: MANAGER},
            },
            "spec": {
                "holderIdentity": self._identity,
                "leaseDurationSeconds": BLIND_SECONDS,
                "renewTime": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
            },
        }

    async def renew_forever(self, apply: Callable[[Manifest], Manifest]) -> None:
        """Renews until cancelled. A failed renewal is logged, not fatal."""
        while True:
            try:
                await asyncio.to_thread(apply, self.lease())
                self._renewed = self._clock()
            except Exception as error:
                logger.warning("The Lease could not be renewed: %s", error)
            await asyncio.sleep(RENEW_SECONDS)

    def see(self, lease: Mapping[str, Any]) -> None:
        """The watch shows a Lease."""
        mine = lease["metadata"]["namespace"] == self._namespace
        if mine and lease.get("spec", {}).get("holderIdentity") == self._identity:
            self._seen = self._clock()

    def blind_seconds(self) -> float:
        """For how long renewals have succeeded that the watch did not show."""
        return 0.0 if self._renewed is None else max(0.0, self._renewed - self._seen)

    def is_blind(self) -> bool:
        """Whether the operator must be restarted."""
        return self.blind_seconds() > BLIND_SECONDS
