"""Leases that are forgotten, and leases that are out for too long."""

from __future__ import annotations

import asyncio
import gc
import threading
import warnings
from typing import Any

import pytest

import cenote
from cenote import errors
from cenote.pool.base import Event
from cenote.testing.postgres import wait_until
from pool_kit import behaviour, until


def leaks(caught: Any) -> list[str]:
    return [str(warning.message) for warning in caught if warning.category is errors.LeakWarning]


@pytest.mark.parametrize("driver", ["psycopg", "psycopg2"])
def test_a_connection_that_a_thread_drops_comes_back(dsn: str, driver: str) -> None:
    def forgetful() -> None:
        pool.acquire()

    with warnings.catch_warnings(record=True) as caught, cenote.Pool(dsn, driver=driver, max_size=1) as pool:
        warnings.simplefilter("always")
        for number in range(3):
            forgetful()
            gc.collect()
            wait_until(lambda number=number: pool.stats().closed.get("leaked") == number + 1)  # type: ignore[misc]
        assert pool.fetch_value("SELECT 1") == 1
        wait_until(lambda: len(leaks(caught)) == 3)
    for text in leaks(caught):
        assert "in test_a_connection_that_a_thread_drops_comes_back.<locals>.forgetful" in text
        assert "test_pool_leaks.py:" in text


@pytest.mark.parametrize("driver", ["psycopg", "asyncpg"])
@behaviour
async def test_a_connection_that_a_task_drops_comes_back(dsn: str, driver: str) -> None:
    async def forgetful() -> None:
        await pool.acquire()

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        async with cenote.AsyncPool(dsn, driver=driver, max_size=1) as pool:
            for number in range(3):
                await asyncio.create_task(forgetful())
                gc.collect()
                await until(lambda number=number: pool.stats().closed.get("leaked") == number + 1)
            assert await pool.fetch_value("SELECT 1") == 1
            await until(lambda: len(leaks(caught)) == 3)
    assert all("forgetful" in text for text in leaks(caught))


def test_a_waiter_gets_the_place_of_a_dropped_connection(dsn: str) -> None:
    with warnings.catch_warnings(), cenote.Pool(dsn, max_size=1) as pool:
        warnings.simplefilter("ignore", errors.LeakWarning)
        lease = [pool.acquire()]
        served: list[Any] = []
        waiter = threading.Thread(target=lambda: served.append(pool.fetch_value("SELECT 1")))
        waiter.start()
        wait_until(lambda: pool.stats().waiting == 1)
        lease.clear()
        gc.collect()
        waiter.join(20)
        assert served == [1]


def test_leak_after_warns_of_a_threads_lease_while_it_is_out(dsn: str) -> None:
    heard: list[Event] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with cenote.Pool(dsn, max_size=2, leak_after=0.5, name="orders", listener=heard.append) as pool:
            with pool.connection():
                wait_until(lambda: leaks(caught))
                assert pool.stats().leased == 1, "it only warns"
            with pool.connection():
                pass
    (text,) = leaks(caught)
    for words in ('pool "orders"', "a lease is out for", "MainThread", "test_pool_leaks.py", "wait_until"):
        assert words in text
    assert [event.kind for event in heard if event.kind == "held_long"] == ["held_long"]


@behaviour
async def test_leak_after_warns_of_a_tasks_lease_while_it_is_out(dsn: str) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        async with cenote.AsyncPool(dsn, max_size=2, leak_after=0.05) as pool:
            async with pool.connection():
                await until(lambda: leaks(caught))
    (text,) = leaks(caught)
    assert "test_leak_after_warns_of_a_tasks_lease" in text


def test_where_warnings_are_errors_a_leak_warning_harms_no_pool(dsn: str) -> None:
    heard: list[Event] = []
    with cenote.Pool(dsn, max_size=1, leak_after=0.03, listener=heard.append) as pool:
        conn = pool.acquire()
        wait_until(lambda: any(event.kind == "held_long" for event in heard))
        with pytest.raises(errors.AcquireTimeout):
            pool.acquire(0.05)
        pool.release(conn)
        del conn
        pool.acquire()  # and dropped
        gc.collect()
        wait_until(lambda: pool.stats().closed.get("leaked") == 1)
        assert pool.fetch_value("SELECT 1") == 1


@behaviour
async def test_where_warnings_are_errors_a_leak_warning_harms_no_async_pool(dsn: str) -> None:
    failures: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: failures.append(context))
    heard: list[Event] = []
    async with cenote.AsyncPool(dsn, max_size=2, leak_after=0.03, listener=heard.append) as pool:
        first = await pool.acquire()
        await until(lambda: sum(event.kind == "held_long" for event in heard) == 1)
        second = await pool.acquire()
        await until(lambda: sum(event.kind == "held_long" for event in heard) == 2)
        with pytest.raises(errors.AcquireTimeout):
            await asyncio.wait_for(pool.acquire(0.05), 10)
        await pool.release(first)
        await pool.release(second)
        del first, second
        await asyncio.create_task(pool.acquire())  # and dropped
        gc.collect()
        await until(lambda: pool.stats().closed.get("leaked") == 1)
        assert await pool.fetch_value("SELECT 1") == 1
    assert failures == []
