"""The queue's promises: once each, one worker at a time, later on demand, backoff after failures."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from turboquant_operator.workqueue import WorkQueue


def run(scenario: Callable[[WorkQueue[str]], Awaitable[None]], **options: float) -> None:
    async def main() -> None:
        await asyncio.wait_for(scenario(WorkQueue(**options)), 5)

    asyncio.run(main())


async def nothing_left(queue: WorkQueue[str]) -> bool:
    try:
        await asyncio.wait_for(queue.get(), 0.02)
    except TimeoutError:
        return True
    return False


def test_many_events_are_one_pass() -> None:
    async def scenario(queue: WorkQueue[str]) -> None:
        for _ in range(10):
            queue.add("a")
        assert await queue.get() == "a"
        queue.done("a")
        assert await nothing_left(queue)

    run(scenario)


def test_event_during_a_pass_brings_another_afterwards() -> None:
    async def scenario(queue: WorkQueue[str]) -> None:
        queue.add("a")
        await queue.get()
        queue.add("a")
        assert await nothing_left(queue)
        queue.done("a")
        assert await queue.get() == "a"

    run(scenario)


def test_keys_do_not_wait_for_one_another() -> None:
    async def scenario(queue: WorkQueue[str]) -> None:
        queue.add("a")
        queue.add("b")
        assert [await queue.get(), await queue.get()] == ["a", "b"]

    run(scenario)


def test_soonest_of_several_wishes_holds() -> None:
    async def scenario(queue: WorkQueue[str]) -> None:
        queue.add_after("a", 60)
        queue.add_after("a", 0.01)
        queue.add_after("a", 60)
        assert await queue.get() == "a"
        queue.done("a")
        assert await nothing_left(queue)

    run(scenario)


def test_backoff_doubles_up_to_the_longest_and_ends_with_success() -> None:
    async def scenario(queue: WorkQueue[str]) -> None:
        delays = []
        for _ in range(4):
            queue.add("a")
            await queue.get()
            delays.append(queue.failed("a"))
        queue.add("a")
        await queue.get()
        queue.done("a")
        queue.add("a")
        await queue.get()
        assert delays == [1.0, 2.0, 4.0, 5.0]
        assert queue.failed("a") == 1.0

    run(scenario, first_backoff=1.0, longest_backoff=5.0)


def test_failed_key_comes_back_by_itself() -> None:
    async def scenario(queue: WorkQueue[str]) -> None:
        queue.add("a")
        await queue.get()
        queue.failed("a")
        assert await queue.get() == "a"

    run(scenario, first_backoff=0.01)


@pytest.mark.parametrize("workers", [1, 4])
def test_a_key_is_never_with_two_workers(workers: int) -> None:
    async def scenario(queue: WorkQueue[str]) -> None:
        busy: set[str] = set()
        passes = 0

        async def work() -> None:
            nonlocal passes
            while True:
                key = await queue.get()
                assert key not in busy
                busy.add(key)
                await asyncio.sleep(0)
                busy.discard(key)
                passes += 1
                queue.done(key)

        tasks = [asyncio.create_task(work()) for _ in range(workers)]
        for step in range(200):
            queue.add("abc"[step % 3])
            if step % 5 == 0:
                await asyncio.sleep(0)
        await asyncio.sleep(0.05)
        assert passes >= 3
        assert not any(task.done() for task in tasks)
        for task in tasks:
            task.cancel()

    run(scenario)
