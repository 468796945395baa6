"""When the operator counts as blind: its renewals succeed and its watch does not show them."""

import asyncio
import contextlib
from typing import Any

from turboquant_operator.lease import BLIND_SECONDS, Heartbeat


class Clock:
    """A clock that a test moves."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def renew(heartbeat: Heartbeat, fails: bool = False) -> None:
    """One renewal."""

    def apply(lease: dict[str, Any]) -> dict[str, Any]:
        if fails:
            raise OSError("no API server")
        return lease

    async def once() -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(heartbeat.renew_forever(apply), 0.05)

    asyncio.run(once())


def beating() -> tuple[Heartbeat, Clock]:
    clock = Clock()
    return Heartbeat("system", "operator-1", clock), clock


def test_seen_renewals_are_sight() -> None:
    heartbeat, clock = beating()
    for _ in range(5):
        clock.now += BLIND_SECONDS
        renew(heartbeat)
        heartbeat.see(heartbeat.lease())
    assert not heartbeat.is_blind()


def test_renewals_that_the_watch_does_not_show_are_blindness() -> None:
    heartbeat, clock = beating()
    clock.now = BLIND_SECONDS + 1
    renew(heartbeat)
    assert heartbeat.is_blind()


def test_watch_may_take_its_time() -> None:
    heartbeat, clock = beating()
    clock.now = BLIND_SECONDS - 1
    renew(heartbeat)
    assert not heartbeat.is_blind()


def test_api_server_that_is_down_is_not_the_operators_fault() -> None:
    heartbeat, clock = beating()
    clock.now = 10 * BLIND_SECONDS
    renew(heartbeat, fails=True)
    assert not heartbeat.is_blind()


def test_leases_of_others_do_not_count() -> None:
    heartbeat, clock = beating()
    clock.now = BLIND_SECONDS + 1
    renew(heartbeat)
    heartbeat.see(Heartbeat("elsewhere", "operator-1").lease())
    heartbeat.see(Heartbeat("system", "operator-0").lease())
    assert heartbeat.is_blind()
