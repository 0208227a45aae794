"""Limits that move, draining and closing."""

from __future__ import annotations

import asyncio

import pytest

from cenote import errors
from pool_kit import Kit, add_up, behaviour, raises_clearly, until, write

# -- limits that move ------------------------------------------------------------------------------------------


@behaviour
async def test_a_higher_limit_serves_who_waits(any_kit: Kit) -> None:
    async with any_kit.pool(max_size=1) as pool:
        held = await pool.acquire()
        waiter = pool.start("acquire")
        await pool.standing(1)
        pool.raw.resize(max_size=2)
        second = await waiter
        assert pool.stats().leased == 2
        await pool.release(held)
        await pool.release(second)


@behaviour
async def test_a_lower_limit_closes_idle_connections_at_once_and_leased_ones_when_they_come_back(kit: Kit) -> None:
    async with kit.pool(min_size=4, max_size=4) as pool:
        await pool.wait_ready()
        held = [await pool.acquire() for _ in range(2)]
        pool.raw.resize(min_size=1, max_size=1)
        await until(lambda: len(kit.backends()) == 2, "the idle ones to go")
        await pool.release(held[0])
        await until(lambda: len(kit.backends()) == 1, "the surplus one to go")
        await pool.release(held[1])
        stats = await pool.settled()
        assert (stats.size, stats.idle, stats.max_size, stats.min_size) == (1, 1, 1, 1)
        assert stats.closed == {"surplus": 3}
        add_up(stats)


@behaviour
async def test_a_resize_that_cannot_be_is_refused_as_a_whole(any_kit: Kit) -> None:
    async with any_kit.pool(min_size=1, max_size=2, name="orders") as pool:
        with raises_clearly(errors.ConfigError, '"orders"', "min_size = 3 is above max_size = 2"):
            pool.raw.resize(min_size=3)
        with pytest.raises(errors.ConfigError):
            pool.raw.resize(max_size=0)
        with pytest.raises(errors.ConfigError):
            pool.raw.resize(max_size="4")
        stats = pool.stats()
        assert (stats.min_size, stats.max_size) == (1, 2)


@behaviour
async def test_a_pool_may_be_resized_before_it_is_open(any_kit: Kit) -> None:
    async with any_kit.pool(min_size=0, max_size=1) as pool:
        pool.raw.resize(min_size=2, max_size=3)
        await pool.wait_ready()
        assert (await pool.settled()).idle == 2


@behaviour
async def test_min_size_connections_are_opened_before_anybody_asks(any_kit: Kit) -> None:
    async with any_kit.pool(min_size=3, max_size=5) as pool:
        await pool.open()
        await pool.open()
        await until(lambda: pool.stats().idle == 3, "three idle connections")
        assert pool.stats().opened == {"minimum": 3}


@behaviour
async def test_min_size_zero_opens_nothing_until_somebody_asks(any_kit: Kit) -> None:
    async with any_kit.pool(min_size=0, max_size=2) as pool:
        await pool.open()
        assert pool.stats().size == 0
        await pool.release(await pool.acquire())
        assert pool.stats().opened == {"demand": 1}


# -- drain and close -------------------------------------------------------------------------------------------


@behaviour
async def test_a_drain_refuses_newcomers_serves_who_waits_and_ends_when_all_came_back(any_kit: Kit) -> None:
    async with any_kit.pool(max_size=1, name="orders") as pool:
        held = await pool.acquire()
        waiter = pool.start("acquire")
        await pool.standing(1)
        drain = pool.start("drain", 10.0)
        await until(lambda: pool.stats().mode == "draining")
        with raises_clearly(errors.PoolDraining, '"orders"', "resume()", "[P2004]"):
            await pool.acquire()
        await pool.release(held)
        second = await waiter
        assert not drain.done()
        await pool.release(second)
        assert await drain is True
        stats = await pool.settled()
        assert (stats.size, stats.leased) == (0, 0)
        await pool.resume()
        await pool.release(await pool.acquire())
        assert pool.stats().mode == "running"


@behaviour
async def test_a_drain_gives_up_at_its_deadline_and_refuses_who_still_waits(any_kit: Kit) -> None:
    async with any_kit.pool(max_size=1) as pool:
        held = await pool.acquire()
        waiter = pool.start("acquire")
        await pool.standing(1)
        assert await pool.drain(0.05) is False
        with pytest.raises(errors.PoolDraining):
            await waiter
        await pool.release(held)
        await pool.resume()
        await pool.release(await pool.acquire())


@behaviour
async def test_close_with_nothing_out_leaves_no_session_and_reports_nobody(any_kit: Kit) -> None:
    async with any_kit.pool(min_size=2, max_size=2) as pool:
        await pool.wait_ready()
        assert await pool.close() == ()
        assert pool.raw.closed
        stats = pool.stats()
        assert (stats.size, stats.mode, stats.closed) == (0, "closed", {"pool_closed": 2})


@behaviour
async def test_close_waits_for_leases_that_come_back_in_time(any_kit: Kit) -> None:
    async with any_kit.pool(max_size=1) as pool:
        held = await pool.acquire()
        closing = pool.start("close", 15.0)
        await until(lambda: pool.raw.closed)
        await write(any_kit, held, "in time")
        await any_kit.commit(held)
        await pool.release(held)
        assert await closing == ()
        assert pool.stats().size == 0


@behaviour
async def test_close_cancels_the_query_of_a_lease_that_is_late_and_says_whose_it_was(kit: Kit) -> None:
    async with kit.pool(max_size=1) as pool:

        async def sleeper() -> None:
            async with pool.connection() as conn:
                await kit.sql(conn, "SELECT pg_sleep(600)")

        task = asyncio.create_task(sleeper())
        busy = "SELECT count(*) FROM pg_stat_activity WHERE application_name = %s AND query LIKE '%%pg_sleep%%'"
        await until(lambda: kit.admin.value(busy, (kit.app,)), "the query to run")
        cut = await pool.close(0.05)
        (holder,) = cut
        assert holder.in_query
        assert holder.last_verb == "SELECT"
        with pytest.raises(kit.errors()):
            await task
        await until(lambda: kit.backends() == [])
        assert (await pool.settled()).size == 0


@behaviour
async def test_close_cuts_a_lease_that_is_late_and_idle(kit: Kit) -> None:
    async with kit.pool(max_size=1) as pool:
        held = await pool.acquire()
        await kit.begin(held)
        (holder,) = await pool.close(0.02)
        assert not holder.in_query
        assert holder.in_transaction
        await until(lambda: kit.backends() == [], "the session to end")
        with pytest.raises(kit.errors()):
            await kit.sql(held, "SELECT 1")
        await pool.release(held)
        assert (await pool.settled()).size == 0
        add_up(pool.stats())


@behaviour
async def test_close_refuses_who_waits_at_once(any_kit: Kit) -> None:
    async with any_kit.pool(max_size=1, acquire_timeout=600) as pool:
        held = await pool.acquire()
        waiters = [pool.start("acquire") for _ in range(3)]
        await pool.standing(3)
        closing = pool.start("close", 10.0)
        for waiter in waiters:
            with pytest.raises(errors.PoolClosed):
                await waiter
        await pool.release(held)
        assert await closing == ()


@behaviour
async def test_a_closed_pool_says_so_to_everyone(any_kit: Kit) -> None:
    async with any_kit.pool(max_size=1, name="orders") as pool:
        await pool.release(await pool.acquire())
        await pool.close()
        assert await pool.close() == ()
        uses = [
            pool.acquire(),
            pool.acquire(0),
            pool.execute("SELECT 1"),
            pool.fetch_value("SELECT 1"),
            pool.wait_ready(1),
            pool.connection().__aenter__(),
            pool.transaction().__aenter__(),
        ]
        for use in uses:
            with raises_clearly(errors.PoolClosed, '"orders"', "make a new pool", "[P2005]"):
                await use
        await pool.resume()
        assert pool.raw.closed, "resume() does not reopen"
        assert await pool.drain(0.1) is True
        pool.raw.resize(max_size=3)
        pool.raw.refresh()
        await pool.open()
        assert (await pool.settled()).size == 0


@behaviour
async def test_a_pool_that_never_opened_can_be_closed(any_kit: Kit) -> None:
    async with any_kit.pool() as pool:
        assert await pool.close() == ()
        with pytest.raises(errors.PoolClosed):
            await pool.acquire()
