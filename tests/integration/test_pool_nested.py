"""A caller that holds a connection and asks for another: certain deadlock is an error, mere risk a warning."""

from __future__ import annotations

import asyncio
import threading
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

import cenote
from cenote import errors
from cenote.testing.postgres import wait_until
from pool_kit import behaviour, until


@pytest.fixture
def risks() -> Iterator[list[str]]:
    """The texts of NestedAcquireWarning, from whichever thread."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", errors.NestedAcquireWarning)
        texts: list[str] = []
        yield texts
        texts += [str(warning.message) for warning in caught if warning.category is errors.NestedAcquireWarning]


def found(caught: Any) -> list[str]:
    return [str(warning.message) for warning in caught if warning.category is errors.NestedAcquireWarning]


def test_threads_that_all_hold_one_and_want_another_are_told_of_their_deadlock(dsn: str) -> None:
    both = threading.Barrier(2)
    ends: list[BaseException | str] = []

    def greedy() -> None:
        try:
            with pool.connection():
                both.wait(20)
                with pool.connection():
                    ends.append("served")
        except errors.NestedAcquireDeadlock as error:
            ends.append(error)

    with warnings.catch_warnings(record=True), cenote.Pool(dsn, max_size=2, name="orders") as pool:
        warnings.simplefilter("always")
        threads = [threading.Thread(target=greedy) for _ in range(2)]
        for each in threads:
            each.start()
        for each in threads:
            each.join(20)
        errors_seen = [end for end in ends if end != "served"]
        assert len(ends) == 2
        assert len(errors_seen) == 1, "one is refused, and so the other is served"
        text = str(errors_seen[0])
        for words in ('pool "orders"', "all 2 connections", "nested.py", "greedy", "pass the connection on"):
            assert words in text
        stats = pool.stats()
        assert (stats.leased, stats.waiting) == (0, 0)
        assert stats.refused == {"deadlock": 1}


@behaviour
async def test_tasks_that_all_hold_one_and_want_another_are_told_of_their_deadlock(dsn: str) -> None:
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        async with cenote.AsyncPool(dsn, min_size=2, max_size=2) as pool:
            both = asyncio.Barrier(2)

            async def greedy() -> str:
                async with pool.connection():
                    await both.wait()
                    async with pool.connection():
                        return "served"

            ends = await asyncio.gather(greedy(), greedy(), return_exceptions=True)
            assert sorted(type(end).__name__ for end in ends) == ["NestedAcquireDeadlock", "str"]
            assert pool.stats().refused == {"deadlock": 1}
            assert (pool.stats().leased, pool.stats().waiting) == (0, 0)


def test_one_caller_who_wants_two_of_one_is_told_at_once(dsn: str) -> None:
    with cenote.Pool(dsn, max_size=1, acquire_timeout=600) as pool, pool.connection():
        with pytest.raises(errors.NestedAcquireDeadlock):
            pool.fetch_value("SELECT 1")


def test_a_merely_risky_nested_acquire_is_warned_of_once_for_each_place(dsn: str) -> None:
    def nested(release_other: threading.Event) -> None:
        with pool.connection():
            with pool.connection():
                pass

    with warnings.catch_warnings(record=True) as caught, cenote.Pool(dsn, min_size=2, max_size=2) as pool:
        warnings.simplefilter("always")
        pool.wait_ready()
        for _ in range(3):
            # Somebody else has the second connection, bare: no deadlock can be proved.
            other = pool.acquire()
            done = threading.Event()
            caller = threading.Thread(target=nested, args=(done,))
            caller.start()
            wait_until(lambda: pool.stats().waiting == 1)
            pool.release(other)
            caller.join(20)
        texts = found(caught)
    assert len(texts) == 1, texts
    assert "in test_a_merely_risky_nested_acquire" in texts[0]
    assert "pass the connection on" in texts[0]


def test_no_alarm_while_one_of_the_holders_is_in_a_query(dsn: str) -> None:
    with warnings.catch_warnings(record=True), cenote.Pool(dsn, min_size=2, max_size=2) as pool:
        warnings.simplefilter("always")
        pool.wait_ready()

        def busy() -> None:
            with pool.connection() as conn:
                conn.execute("SELECT pg_sleep(0.3)")

        caller = threading.Thread(target=busy)
        caller.start()
        wait_until(lambda: any(holder.in_query for holder in pool.holders()))
        with pool.connection():
            with pool.connection(20):
                pass
        caller.join(20)
        assert pool.stats().refused == {}


def test_no_alarm_for_bare_leases_for_they_may_have_been_handed_on(dsn: str, risks: list[str]) -> None:
    """A producer acquires, and others work with what it acquired and give it back."""
    with cenote.Pool(dsn, min_size=2, max_size=2) as pool:
        pool.wait_ready()
        leases = [pool.acquire() for _ in range(2)]

        def consume() -> None:
            wait_until(lambda: pool.stats().waiting == 1)
            for lease in leases:
                pool.release(lease)

        with ThreadPoolExecutor(1) as elsewhere:
            done = elsewhere.submit(consume)
            pool.release(pool.acquire(20))
            done.result(20)
        assert pool.stats().refused == {}
    assert risks == []


def test_no_alarm_when_a_framework_runs_the_ends_of_a_block_on_threads_of_its_own(
    dsn: str, risks: list[str]
) -> None:
    """As web frameworks do with a dependency that is a generator: entered on one thread of a pool, left on
    another, while the first already serves the next request."""

    def dependency() -> Iterator[Any]:
        with pool.connection(20) as conn:
            yield conn

    with cenote.Pool(dsn, min_size=2, max_size=2) as pool, ThreadPoolExecutor(2) as frame:
        pool.wait_ready()
        requests = [dependency() for _ in range(4)]
        for request in requests[:2]:
            frame.submit(next, request).result(20)
        waiting = [frame.submit(next, request) for request in requests[2:]]
        wait_until(lambda: pool.stats().waiting == 2)
        for request in requests[:2]:
            request.close()
        for each in waiting:
            each.result(20)
        for request in requests[2:]:
            request.close()
        assert pool.stats().refused == {}
    assert risks == []


@behaviour
async def test_no_alarm_for_a_task_whose_lease_lives_longer_than_the_task(dsn: str) -> None:
    async with cenote.AsyncPool(dsn, min_size=1, max_size=1) as pool:
        held = await asyncio.create_task(pool.acquire())
        waiter = asyncio.create_task(pool.acquire(20))
        await until(lambda: pool.stats().waiting == 1)
        await pool.release(held)
        await pool.release(await waiter)
        assert pool.stats().refused == {}
