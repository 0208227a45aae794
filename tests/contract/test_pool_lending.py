"""Who gets which connection, how long he waits, what may be given back, and figures that add up."""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from typing import Any

import pytest

import cenote
from cenote import errors
from cenote.testing.postgres import wait_until
from pool_kit import Kit, add_up, behaviour, raises_clearly, until

# -- who gets which connection ---------------------------------------------------------------------------------


@behaviour
async def test_waiters_are_served_in_the_order_they_came(any_kit: Kit) -> None:
    async with any_kit.pool(max_size=1, acquire_timeout=20) as pool:
        served: list[int] = []

        async def caller(number: int) -> None:
            conn = await pool.acquire()
            served.append(number)
            await pool.release(conn)

        held = await pool.acquire()
        tasks = []
        for number in range(12):
            tasks.append(asyncio.create_task(caller(number)))
            await pool.standing(number + 1)
        await pool.release(held)
        await asyncio.gather(*tasks)
        if any_kit.is_async:
            assert served == list(range(12))
        else:  # threads may note their turn late; the pool's own order is what the next line shows
            assert sorted(served) == list(range(12))
        add_up(pool.stats())


@behaviour
async def test_a_newcomer_never_overtakes_a_waiter(any_kit: Kit) -> None:
    async with any_kit.pool(max_size=1) as pool:
        held = await pool.acquire()
        first = pool.start("acquire")
        await pool.standing(1)
        await pool.release(held)
        # Handed on before release returned: nothing is left for one who does not wait.
        with pytest.raises(errors.AcquireTimeout):
            await pool.acquire(0)
        second = pool.start("acquire")
        await pool.standing(1)
        conn = await first
        assert not second.done()
        await pool.release(conn)
        await pool.release(await second)


@behaviour
async def test_the_connection_used_last_is_lent_first(any_kit: Kit) -> None:
    async with any_kit.pool(min_size=3, max_size=3) as pool:
        await pool.wait_ready()
        a, b, c = [await pool.acquire() for _ in range(3)]
        names = {id(a): "a", id(b): "b", id(c): "c"}
        kept = [a, b, c]  # so that no address is used twice
        for conn in (a, b, c):
            await pool.release(conn)
        await pool.settled()
        again = [await pool.acquire() for _ in range(3)]
        assert [names[id(conn)] for conn in again] == ["c", "b", "a"]
        for conn in kept:
            await pool.release(conn)


@behaviour
async def test_there_are_never_more_server_connections_than_max_size(kit: Kit) -> None:
    """Counted by the server, with connections dying all the time."""
    async with kit.pool(min_size=0, max_size=3, acquire_timeout=20) as pool:
        seen: list[int] = []
        over = False

        async def look() -> None:
            while not over:
                seen.append(len(kit.backends()))
                await asyncio.sleep(0)

        async def caller(number: int) -> None:
            conn = await pool.acquire()
            await kit.sql(conn, "SELECT 1")
            if number % 3 == 0:
                pid = kit.pid(conn)
                await kit.close_connection(conn)
                # The pool does not wait for the end of what its borrower has closed.
                await until(lambda: pid not in kit.backends(), "the session to end")
            await pool.release(conn)

        watcher = asyncio.create_task(look())
        await asyncio.gather(*(caller(number) for number in range(30)))
        over = True
        await watcher
        assert 1 <= max(seen) <= 3
        add_up(await pool.settled())


@behaviour
async def test_an_acquire_that_times_out_says_the_numbers(any_kit: Kit) -> None:
    async with any_kit.pool(max_size=1, acquire_timeout=0.15, name="orders") as pool:
        held = await pool.acquire()
        before = time.monotonic()
        with pytest.raises(errors.AcquireTimeout) as caught:
            await pool.acquire()
        assert time.monotonic() - before >= 0.14
        error = caught.value
        assert isinstance(error, TimeoutError)
        assert isinstance(error, errors.AcquireRefused)
        assert error.reason == "timeout"
        numbers = r"0\.15 s \(1/1 leased, 0 dialing, \d+ waiting, oldest \d+\.\d\d s\)\."
        numbers = r'pool "orders": no connection within ' + numbers
        assert re.match(numbers, str(error)), str(error)
        assert "[P2003]" in str(error)
        assert len(error.holders) == 1
        await pool.release(held)
        await pool.release(await pool.acquire())
        assert pool.stats().refused == {"timeout": 1}


@behaviour
async def test_each_call_may_bring_its_own_timeout(any_kit: Kit) -> None:
    async with any_kit.pool(max_size=1, acquire_timeout=30) as pool:
        held = await pool.acquire()
        calls = [
            pool.acquire(0.01),
            pool.execute("SELECT 1", timeout=0.01),
            pool.fetch_all("SELECT 1", timeout=0.01),
            pool.fetch_one("SELECT 1", timeout=0.01),
            pool.fetch_value("SELECT 1", timeout=0.01),
            pool.connection(0.01).__aenter__(),
            pool.transaction(0.01).__aenter__(),
        ]
        for call in calls:
            with pytest.raises(errors.AcquireTimeout, match=r"within 0\.01 s"):
                await call
        await pool.release(held)


@behaviour
async def test_a_timeout_that_is_no_number_of_seconds_is_refused(any_kit: Kit) -> None:
    async with any_kit.pool(max_size=1) as pool:
        for wrong in (-1, float("nan")):
            with raises_clearly(errors.ConfigError, "timeout", "0 (do not wait) or more"):
                await pool.acquire(wrong)
        await pool.release(await pool.acquire())
        assert pool.stats().leased == 0


@behaviour
async def test_timeout_zero_takes_what_is_there_and_never_waits(any_kit: Kit) -> None:
    async with any_kit.pool(min_size=0, max_size=1) as pool:
        with pytest.raises(errors.AcquireTimeout):
            await pool.acquire(0)  # nothing is open yet; the attempt opens one for the next who asks
        await until(lambda: pool.stats().idle == 1, "the attempt to be open")
        held = await pool.acquire(0)
        with pytest.raises(errors.AcquireTimeout):
            await pool.acquire(0)
        await pool.release(held)
        assert pool.stats().opened == {"attempt": 1}


@behaviour
async def test_beyond_max_waiting_callers_are_refused_at_once(any_kit: Kit) -> None:
    async with any_kit.pool(max_size=1, max_waiting=2) as pool:
        held = await pool.acquire()
        waiters = [pool.start("acquire") for _ in range(2)]
        await pool.standing(2)
        with raises_clearly(errors.QueueFull, "max_waiting = 2", "1/1 leased", "[P2001]"):
            await pool.acquire()
        await pool.release(held)
        for waiter in asyncio.as_completed(waiters):
            await pool.release(await waiter)
        assert pool.stats().refused == {"queue_full": 1}


@behaviour
async def test_max_waiting_zero_lets_nobody_stand_in_line_but_a_free_connection_is_lent(any_kit: Kit) -> None:
    async with any_kit.pool(min_size=1, max_size=1, max_waiting=0) as pool:
        await pool.open()
        await until(lambda: pool.stats().idle == 1)
        held = await pool.acquire()
        with pytest.raises(errors.QueueFull):
            await pool.acquire()
        await pool.release(held)


# -- giving back what is not ours ------------------------------------------------------------------------------


@behaviour
async def test_a_connection_can_be_released_only_once(any_kit: Kit) -> None:
    async with any_kit.pool(max_size=1, name="orders") as pool:
        conn = await pool.acquire()
        await pool.release(conn)
        with raises_clearly(errors.NotLeased, '"orders"', "released already", "[P3001]"):
            await pool.release(conn)
        stats = await pool.settled()
        assert (stats.idle, stats.leased, stats.size) == (1, 0, 1)


@behaviour
async def test_a_connection_goes_back_only_to_its_own_pool(any_kit: Kit) -> None:
    async with any_kit.pool(max_size=1) as mine, any_kit.pool(max_size=1, name="other") as other:
        conn = await mine.acquire()
        for foreign in (conn, object(), None):
            with raises_clearly(errors.NotLeased, '"other"', "another pool"):
                await other.release(foreign)
        await any_kit.sql(conn, "SELECT 1")
        await mine.release(conn)
        assert other.stats().size == 0


@behaviour
async def test_a_connection_its_borrower_closed_is_replaced(any_kit: Kit) -> None:
    async with any_kit.pool(min_size=1, max_size=1) as pool:
        conn = await pool.acquire()
        await any_kit.close_connection(conn)
        await pool.release(conn)
        assert await pool.fetch_value("SELECT 1") == 1
        stats = await pool.settled()
        assert stats.closed == {"by_borrower": 1}
        assert (stats.size, stats.epoch) == (1, 0)
        add_up(stats)


# -- figures ---------------------------------------------------------------------------------------------------


@behaviour
async def test_the_figures_add_up_at_every_moment(any_kit: Kit) -> None:
    kit = any_kit
    async with kit.pool(min_size=1, max_size=3, acquire_timeout=10) as pool:

        async def caller(number: int) -> None:
            if number % 5 == 0:
                with contextlib.suppress(errors.AcquireTimeout):
                    await pool.release(await pool.acquire(0))
            elif number % 7 == 0:
                conn = await pool.acquire()
                await kit.close_connection(conn)
                await pool.release(conn)
            elif number % 11 == 0:
                with contextlib.suppress(ZeroDivisionError):
                    async with pool.transaction() as conn:
                        raise ZeroDivisionError
            else:
                await pool.fetch_value("SELECT 1")
            add_up(pool.stats())

        await asyncio.gather(*(caller(number) for number in range(60)))
        stats = await pool.settled()
        add_up(stats)
        assert (stats.leased, stats.waiting) == (0, 0)
        assert stats.closed.get("by_borrower") == 7
        assert stats.acquired + stats.refused.get("timeout", 0) == 60
        if kit.on_server:
            # What a borrower has closed may still be ending.
            await until(lambda: len(kit.backends()) == stats.size, "the server to have as many")


@behaviour
async def test_time_in_queries_is_told_from_time_held_idle(kit: Kit) -> None:
    async with kit.pool(max_size=1) as pool:
        async with pool.connection() as conn:
            await kit.sql(conn, "SELECT pg_sleep(0.1)")
        stats = await pool.settled()
        assert 0.1 <= stats.in_query_s <= stats.hold.sum_s + 0.001
        assert stats.idle_while_held_s == pytest.approx(stats.hold.sum_s - stats.in_query_s)
        async with pool.connection() as conn:
            idle_from = time.monotonic()
            await until(lambda: time.monotonic() - idle_from > 0.1)
        more = await pool.settled()
        assert more.idle_while_held_s - stats.idle_while_held_s >= 0.1
        assert more.in_query_s - stats.in_query_s < more.hold.sum_s - stats.hold.sum_s - 0.09


def test_an_adapter_that_cannot_tell_a_connections_condition_costs_the_connection_and_not_its_slot(
    dsn: str,
) -> None:
    from cenote.config import PoolOptions
    from cenote.pool.drivers.psycopg import PsycopgDriver

    class Puzzled(PsycopgDriver):
        def condition(self, conn: Any) -> int:  # type: ignore[override]
            raise LookupError("no idea")

    driver = Puzzled(dsn, {}, PoolOptions())
    with cenote.Pool(driver=driver, min_size=0, max_size=1) as pool:
        for number in range(2):
            conn = pool.acquire(10)
            with pytest.raises(LookupError, match="no idea"):
                pool.release(conn)
            wait_until(lambda number=number: pool.stats().closed == {"broken": number + 1})  # type: ignore[misc]
        wait_until(lambda: pool.stats().size == 0)
        pool.assert_all_returned()
