"""A queue of object keys: each key once, one worker on it at a time, later or after a failure with backoff.

Level-based reconciliation needs no events, only the fact that something may have changed; ten events of one
object while it waits are one pass. The semantics are those of client-go's rate-limiting work queue.
"""

import asyncio
from collections.abc import Hashable
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)


class WorkQueue(Generic[Key]):
    """Belongs to one event loop."""

    def __init__(self, first_backoff: float = 1.0, longest_backoff: float = 300.0) -> None:
        self._ready: asyncio.Queue[Key] = asyncio.Queue()
        self._waiting: set[Key] = set()
        self._processing: set[Key] = set()
        self._timers: dict[Key, asyncio.TimerHandle] = {}
        self._failures: dict[Key, int] = {}
        self._first_backoff = first_backoff
        self._longest_backoff = longest_backoff

    def add(self, key: Key) -> None:
        """Wants a pass over the key: as soon as a worker is free, and not while one is on it."""
        if key in self._waiting:
            return
        self._waiting.add(key)
        if key not in self._processing:
            self._ready.put_nowait(key)

    def add_after(self, key: Key, seconds: float) -> None:
        """Wants a pass in some time; the soonest of several wishes holds."""
        loop = asyncio.get_running_loop()
        timer = self._timers.get(key)
        if timer is not None and timer.when() <= loop.time() + seconds:
            return
        if timer is not None:
            timer.cancel()
        self._timers[key] = loop.call_later(seconds, self._expire, key)

    def _expire(self, key: Key) -> None:
        del self._timers[key]
        self.add(key)

    async def get(self) -> Key:
        """The next key, which then is this worker's until `done` or `failed`."""
        key = await self._ready.get()
        self._waiting.discard(key)
        self._processing.add(key)
        return key

    def done(self, key: Key) -> None:
        """Ends a pass that succeeded."""
        self._failures.pop(key, None)
        self._release(key)

    def failed(self, key: Key) -> float:
        """Ends a pass that failed and wants another; in how many seconds, doubling up to the longest."""
        failures = self._failures.get(key, 0)
        self._failures[key] = failures + 1
        delay = min(self._first_backoff * 2.0**failures, self._longest_backoff)
        self._release(key)
        self.add_after(key, delay)
        return delay

    def _release(self, key: Key) -> None:
        self._processing.discard(key)
        if key in self._waiting:
            self._ready.put_nowait(key)
