"""What must hold when hooks, borrowers and the system misbehave: nothing lost, lent twice or lent dirty."""

from __future__ import annotations

import asyncio
import gc
import logging
import threading
from collections.abc import Iterator
from typing import Any

import pytest

import cenote
from cenote import errors
from cenote.testing import AsyncScriptedDriver, ScriptedDriver
from cenote.testing.postgres import wait_until


def test_a_configure_hook_that_opens_a_transaction_has_it_committed(database: str) -> None:
    def configure(conn: Any) -> None:
        conn.execute("SET statement_timeout = '10s'")

    with cenote.Pool(database, min_size=0, max_size=1, configure=configure) as pool:
        pool.execute("CREATE TABLE kept (id int)")
        assert pool.execute("INSERT INTO kept VALUES (1)") == 1
        with pool.connection() as conn:
            conn.execute("SET search_path = elsewhere")
        assert pool.fetch_value("SHOW statement_timeout") == "10s"
        assert pool.fetch_value("SELECT count(*) FROM kept") == 1


def test_a_check_hook_that_opens_a_transaction_does_not_swallow_the_borrowers_work(database: str) -> None:
    def check(conn: Any) -> None:
        conn.execute("SELECT 1")

    with cenote.Pool(database, min_size=0, max_size=1, check=check, check_after=0) as pool:
        pool.execute("CREATE TABLE kept (id int)")
        pool.execute("INSERT INTO kept VALUES (1)")
        assert pool.fetch_value("SELECT count(*) FROM kept") == 1


def test_the_same_hooks_of_an_async_pool_lose_nothing_either(database: str) -> None:
    async def hook(conn: Any) -> None:
        await conn.execute("SELECT 1")

    async def main() -> None:
        async with cenote.AsyncPool(
            database, min_size=0, max_size=1, configure=hook, check=hook, check_after=0
        ) as pool:
            await pool.execute("CREATE TABLE kept (id int)")
            await pool.execute("INSERT INTO kept VALUES (1)")
            assert await pool.fetch_value("SELECT count(*) FROM kept") == 1

    asyncio.run(main())


def test_a_block_whose_connection_was_released_inside_it_leaves_the_next_borrowers_lease_alone() -> None:
    with cenote.Pool(driver=ScriptedDriver(), min_size=1, max_size=1) as pool:
        block = pool.connection()
        conn = block.__enter__()
        pool.release(conn)
        with pool.connection() as again:
            assert again is conn
            with pytest.raises(errors.NotLeased, match="before the end of its block"):
                block.__exit__(None, None, None)
            assert pool.stats().leased == 1
            with pytest.raises(errors.AcquireTimeout):
                pool.acquire(timeout=0)


def test_a_connection_that_served_a_one_shot_is_still_noticed_when_dropped(dsn: str) -> None:
    gc.disable()
    try:
        with cenote.Pool(dsn, min_size=1, max_size=1) as pool:
            pool.fetch_value("SELECT 1")
            conn = pool.acquire()
            del conn
            wait_until(lambda: pool.stats().closed == {"leaked": 1})
    finally:
        gc.enable()


def test_a_release_by_the_garbage_collector_inside_the_pools_own_steps_does_not_hang() -> None:
    with cenote.Pool(driver=ScriptedDriver(), min_size=4, max_size=250) as pool:  # more than are ever forgotten

        def rows() -> Iterator[int]:
            with pool.connection():
                yield 1

        def crowd() -> None:
            for _ in range(50):
                cycle: list[Any] = [rows()]
                next(cycle[0])
                cycle.append(cycle)  # only the collector ends this block, whenever it runs
                del cycle
                for _ in range(3):
                    with pool.connection():
                        pass

        before = gc.get_threshold()
        gc.set_threshold(5)
        try:
            threads = [threading.Thread(target=crowd, daemon=True) for _ in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(30)
            assert not any(thread.is_alive() for thread in threads)
        finally:
            gc.set_threshold(*before)
        gc.collect()
        wait_until(lambda: pool.stats().leased == 0)


def test_a_thread_that_cannot_be_started_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    start = threading.Thread.start
    refusing = True

    def limited(thread: threading.Thread) -> None:
        if refusing and "worker" in thread.name:
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", limited)
    with cenote.Pool(driver=ScriptedDriver(), min_size=0, max_size=2) as pool:
        for _ in range(10):
            with pytest.raises(errors.AcquireTimeout):
                pool.acquire(timeout=0.01)
        refusing = False
        with pool.connection(timeout=10):
            pass


class Unspeakable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no words")


def test_a_dial_error_that_cannot_be_printed_costs_no_slot() -> None:
    driver = ScriptedDriver()
    driver.next("connect", error=Unspeakable())
    with cenote.Pool(driver=driver, min_size=0, max_size=1) as pool, pool.connection(timeout=10):
        assert pool.stats().size == 1


def test_a_listener_that_ends_its_thread_costs_neither_slot_nor_keeper(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.CRITICAL + 1, "cenote.pool")  # a kept record would keep the dropped connection

    def listener(event: cenote.Event) -> None:
        raise SystemExit

    with cenote.Pool(driver=ScriptedDriver(), min_size=0, max_size=1, listener=listener) as pool:
        for _ in range(2):
            conn = pool.acquire(timeout=10)
            del conn
        with pool.connection(timeout=10):
            pass


def test_tasks_of_the_pool_cancelled_before_their_first_step_are_done_all_the_same() -> None:
    async def main() -> None:
        async with cenote.AsyncPool(driver=AsyncScriptedDriver(), min_size=2, max_size=2) as pool:
            for task in asyncio.all_tasks() - {asyncio.current_task()}:
                task.cancel()
            await pool.wait_ready(10)
            pool.refresh()
            for task in asyncio.all_tasks() - {asyncio.current_task()}:
                task.cancel()
            async with pool.connection(10), pool.connection(10):
                pass

    asyncio.run(main())


def test_each_long_lease_is_warned_about_not_only_the_first_of_a_connection() -> None:
    heard: list[str] = []
    with cenote.Pool(
        driver=ScriptedDriver(), min_size=1, max_size=1, leak_after=0.02, listener=lambda e: heard.append(e.kind)
    ) as pool:
        for number in (1, 2):
            with pool.connection():
                wait_until(lambda number=number: heard.count("held_long") == number)  # type: ignore[misc]
