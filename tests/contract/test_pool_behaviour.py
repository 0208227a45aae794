"""What a pool promises, once, for every pool and driver: `Pool` with psycopg, psycopg2 and sqlite3,
`AsyncPool` with psycopg and asyncpg."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pool_kit import DRIVERS, EVERY_DRIVER, Admin, Api, Kit, add_up, behaviour, raises_clearly, until
from wire_recorder import WireRecorder

import cenote
from cenote import embedded, errors
from cenote.pool.base import Event
from cenote.testing.postgres import fresh_database

SETUP = """
CREATE TABLE note (id serial PRIMARY KEY, text text UNIQUE);
CREATE TABLE due (id int UNIQUE DEFERRABLE INITIALLY DEFERRED);
CREATE SEQUENCE counter;
CREATE FUNCTION hidden() RETURNS void LANGUAGE plpgsql AS
  $$ BEGIN PERFORM set_config('work_mem', '7MB', false); END $$;
GRANT ALL ON ALL TABLES IN SCHEMA public TO PUBLIC;
GRANT ALL ON ALL SEQUENCES IN SCHEMA public TO PUBLIC;
"""


@pytest.fixture(scope="module")
def server(pg18: embedded.Postgres) -> Iterator[tuple[embedded.Postgres, str, Admin]]:
    with fresh_database(pg18) as name:
        admin = Admin(pg18.dsn_for(user="postgres", database=name))
        admin.rows(SETUP)
        admin.rows(f'CREATE ROLE guest_{name}; GRANT guest_{name} TO "{pg18.user}"')
        yield pg18, name, admin
        admin.rows(f"DROP ROLE guest_{name}")
        admin.conn.close()


@pytest.fixture(params=DRIVERS)
def kit(request: pytest.FixtureRequest, server: tuple[embedded.Postgres, str, Admin]) -> Kit:
    pg, name, admin = server
    admin.rows("DELETE FROM note; DELETE FROM due")
    return Kit(request.param, pg.dsn_for(database=name), admin)


@pytest.fixture(params=EVERY_DRIVER)
def any_kit(request: pytest.FixtureRequest, tmp_path: Path) -> Kit:
    if request.param == "sqlite3":
        kit = Kit("sqlite3", str(tmp_path / "notes.db"), None)
        import sqlite3

        with contextlib.closing(sqlite3.connect(kit.dsn)) as conn:
            conn.executescript("PRAGMA journal_mode=wal; CREATE TABLE note (id integer PRIMARY KEY, text text UNIQUE)")
        return kit
    pg, name, admin = request.getfixturevalue("server")
    admin.rows("DELETE FROM note; DELETE FROM due")
    return Kit(request.param, pg.dsn_for(database=name), admin)


async def notes(pool: Api) -> list[str]:
    return sorted(row[0] for row in await pool.fetch_all("SELECT text FROM note"))


async def write(kit: Kit, conn: Any, text: str) -> None:
    await kit.sql(conn, f"INSERT INTO note (text) VALUES ('{text}')")


# -- connection(), transaction(), one statement ----------------------------------------------------------------


@behaviour
async def test_a_connection_block_keeps_what_was_written(any_kit: Kit) -> None:
    async with any_kit.pool(max_size=2) as pool:
        async with pool.connection() as conn:
            await write(any_kit, conn, "kept")
        assert await notes(pool) == ["kept"]
        add_up(await pool.settled())


@behaviour
async def test_a_connection_block_that_raises_rolls_back_as_the_driver_does(any_kit: Kit) -> None:
    async with any_kit.pool(max_size=2) as pool:
        stop = ZeroDivisionError("stop")
        with pytest.raises(ZeroDivisionError) as caught:
            async with pool.connection() as conn:
                await write(any_kit, conn, "half")
                raise stop
        assert caught.value is stop
        assert await notes(pool) == ([] if any_kit.implicit else ["half"])  # asyncpg has no implicit transaction


@behaviour
async def test_a_transaction_block_commits_at_its_end(any_kit: Kit) -> None:
    async with any_kit.pool(max_size=2) as pool:
        async with pool.transaction() as conn:
            await write(any_kit, conn, "one")
            assert await notes(pool) == [], "others see it before the commit"
            await write(any_kit, conn, "two")
        assert await notes(pool) == ["one", "two"]


@behaviour
async def test_a_transaction_block_that_raises_rolls_back_and_passes_the_error_on(any_kit: Kit) -> None:
    async with any_kit.pool(max_size=1) as pool:
        stop = KeyError("stop")
        with pytest.raises(KeyError) as caught:
            async with pool.transaction() as conn:
                await write(any_kit, conn, "half")
                raise stop
        assert caught.value is stop
        assert await notes(pool) == []
        assert (await pool.settled()).size == 1


@behaviour
async def test_a_transaction_block_with_a_failed_statement_inside_rolls_back_and_the_connection_lives_on(
    any_kit: Kit,
) -> None:
    async with any_kit.pool(max_size=1) as pool:
        for _ in range(2):
            with pytest.raises(any_kit.errors()):
                async with pool.transaction() as conn:
                    await write(any_kit, conn, "same")
                    await write(any_kit, conn, "same")
        assert await notes(pool) == []
        stats = await pool.settled()
        assert sum(stats.opened.values()) == 1


@behaviour
async def test_a_commit_that_fails_raises_the_drivers_error_and_loses_no_connection(kit: Kit) -> None:
    async with kit.pool(max_size=1) as pool:
        with pytest.raises(kit.errors(), match="due_id_key"):
            async with pool.transaction() as conn:
                await kit.sql(conn, "INSERT INTO due VALUES (1), (1)")
        assert await pool.fetch_value("SELECT count(*) FROM due") == 0
        stats = await pool.settled()
        assert (stats.size, stats.leased) == (1, 0)


@behaviour
async def test_one_statement_methods_give_the_drivers_rows(any_kit: Kit) -> None:
    kit = any_kit
    async with kit.pool(max_size=1) as pool:
        add = f"INSERT INTO note (text) VALUES ({kit.mark})"
        assert await pool.execute(add, ("a",)) == 1
        assert await pool.execute(add, ["b"]) == 1
        assert await pool.execute("UPDATE note SET text = text") == 2
        assert [tuple(row) for row in await pool.fetch_all("SELECT text FROM note ORDER BY 1")] == [("a",), ("b",)]
        one = await pool.fetch_one(f"SELECT text FROM note WHERE text = {kit.mark}", ("b",))
        assert tuple(one) == ("b",)
        assert await pool.fetch_one("SELECT text FROM note WHERE 1 = 0") is None
        assert await pool.fetch_value("SELECT count(*) FROM note") == 2
        assert await pool.fetch_value("SELECT text FROM note WHERE 1 = 0") is None
        assert list(await pool.fetch_all("SELECT text FROM note WHERE 1 = 0")) == []
        assert (await pool.settled()).leased == 0


@behaviour
async def test_one_statement_methods_run_in_autocommit(kit: Kit) -> None:
    async with kit.pool(max_size=1) as pool:
        await pool.execute("VACUUM note")  # refused inside a transaction block
        before = await pool.fetch_value("SELECT now()")
        assert await pool.fetch_value("SELECT now()") != before
        async with pool.connection() as conn:
            await kit.begin(conn)
            first = await kit.sql(conn, "SELECT now()")
            assert await kit.sql(conn, "SELECT now()") == first, "a lease afterwards is not in autocommit"
            await kit.commit(conn)


@behaviour
async def test_a_one_statement_method_costs_one_round_trip(kit: Kit, server: Any) -> None:
    pg, name, _ = server
    with WireRecorder(pg.dsn_for(database=name)) as wire:
        async with kit.pool(f"{wire.dsn}&application_name={kit.app}", max_size=1) as pool:
            await pool.fetch_value("SELECT 1")
            wire.clear()
            await pool.fetch_value("SELECT 1")
            await pool.fetch_all("SELECT 1")
            assert wire.round_trips() == 2, wire.requests


@behaviour
async def test_a_failed_one_statement_method_gives_its_connection_back_clean(any_kit: Kit) -> None:
    async with any_kit.pool(max_size=1) as pool:
        for method in ("execute", "fetch_all", "fetch_one", "fetch_value"):
            with pytest.raises(any_kit.errors()):
                await pool.call(method, "SELECT no_such_column FROM note")
        assert await pool.fetch_value("SELECT 1") == 1
        stats = await pool.settled()
        assert (stats.size, stats.leased, sum(stats.opened.values())) == (1, 0, 1)
        add_up(stats)


@behaviour
async def test_a_lease_is_the_drivers_own_connection(any_kit: Kit) -> None:
    async with any_kit.pool(max_size=1) as pool:
        async with pool.connection() as conn:
            assert isinstance(conn, any_kit.connection_class())


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
                await kit.close_connection(conn)
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
        numbers = r'pool "orders": no connection within 0\.15 s \(1/1 leased, 0 dialing, \d+ waiting, oldest 0\.\d\d s\)\.'
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
        assert "pool_kit.py" in holder.site or "test_pool_behaviour.py" in holder.site or "thread.py" in holder.site
        with pytest.raises(kit.errors()):
            await task
        assert kit.backends() == []
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
            assert len(kit.backends()) == stats.size


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


# -- is it ready? ----------------------------------------------------------------------------------------------


@behaviour
async def test_wait_ready_returns_once_min_size_connections_are_open(any_kit: Kit) -> None:
    async with any_kit.pool(min_size=3, max_size=4) as pool:
        await pool.wait_ready()
        stats = pool.stats()
        assert stats.size - stats.connecting >= 3
        assert stats.leased == 0


@behaviour
async def test_an_unreachable_server_fails_wait_ready_with_the_reason_and_the_pool_still_opens(kit: Kit) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    async with kit.pool(f"postgresql://app:s3cr3t@127.0.0.1:{port}/app", name="orders") as pool:
        await pool.open()
        with raises_clearly(errors.NotReady, '"orders"', "within 0.20 s", "127.0.0.1", "[P2008]", secret="s3cr3t"):
            await pool.wait_ready(0.2)
        with raises_clearly(errors.AcquireTimeout, "cannot be reached", "127.0.0.1", secret="s3cr3t") as caught:
            await pool.acquire(0.2)
        assert caught.value.__cause__ is not None
        assert pool.stats().leased == 0


@behaviour
async def test_a_wrong_password_is_said_at_once(kit: Kit, server: Any) -> None:
    pg, name, _ = server
    wrong = kit.named(pg.dsn_for(database=name, password="n0tth1s"))
    async with kit.pool(wrong, name="orders", acquire_timeout=60) as pool:
        began = time.monotonic()
        with raises_clearly(errors.NotReady, '"orders"', "password authentication failed", secret="n0tth1s"):
            await pool.wait_ready(60)
        with raises_clearly(errors.ConnectFailed, "password authentication failed", "[P2006]", secret="n0tth1s") as no:
            await pool.acquire()
        assert isinstance(no.value.__cause__, kit.errors())
        assert time.monotonic() - began < 30, "it waited although asking again cannot help"


@behaviour
async def test_a_database_that_does_not_exist_is_said_at_once(kit: Kit, server: Any) -> None:
    pg, _, _ = server
    async with kit.pool(kit.named(pg.dsn_for(database="nowhere")), acquire_timeout=60) as pool:
        with raises_clearly(errors.ConnectFailed, '"nowhere" does not exist'):
            await pool.acquire()


# -- connections grow old --------------------------------------------------------------------------------------


@behaviour
async def test_unused_connections_go_after_idle_timeout_but_min_size_stay(kit: Kit) -> None:
    async with kit.pool(min_size=2, max_size=5, idle_timeout=0.1) as pool:
        held = [await pool.acquire() for _ in range(5)]
        for conn in held:
            await pool.release(conn)
        await until(lambda: pool.stats().closed.get("idle_timeout") == 3, "three to go")
        stats = await pool.settled()
        assert (stats.size, stats.idle) == (2, 2)
        assert len(kit.backends()) == 2
        add_up(stats)


@behaviour
async def test_connections_older_than_max_lifetime_are_replaced(kit: Kit) -> None:
    async with kit.pool(min_size=2, max_size=2, max_lifetime=0.3) as pool:
        await pool.wait_ready()
        before = set(kit.backends())
        assert len(before) == 2
        await until(lambda: not before & set(kit.backends()) and pool.stats().idle == 2, "both to be replaced")
        assert pool.stats().closed["max_lifetime"] >= 2
        assert pool.stats().epoch == 0


@behaviour
async def test_a_lease_outlives_max_lifetime_and_its_connection_goes_afterwards(kit: Kit) -> None:
    async with kit.pool(min_size=0, max_size=1, max_lifetime=0.05) as pool:
        conn = await pool.acquire()
        since = time.monotonic()
        await until(lambda: time.monotonic() - since > 0.06)
        await kit.sql(conn, "SELECT 1")
        await pool.release(conn)
        await pool.settled()
        assert pool.stats().closed == {"max_lifetime": 1}
        await until(lambda: kit.backends() == [])


# -- dead connections ------------------------------------------------------------------------------------------


@behaviour
async def test_check_after_zero_pings_at_every_borrow(kit: Kit, server: Any) -> None:
    pg, name, _ = server
    with WireRecorder(pg.dsn_for(database=name)) as wire:
        dsn = f"{wire.dsn}&application_name={kit.app}"
        async with kit.pool(dsn, min_size=0, max_size=1, check_after=0) as pool:
            await pool.release(await pool.acquire())
            wire.clear()
            for _ in range(3):
                await pool.release(await pool.acquire())
            assert wire.round_trips() == 3, wire.requests


@behaviour
async def test_with_check_after_zero_a_killed_connection_is_never_lent(kit: Kit) -> None:
    async with kit.pool(min_size=1, max_size=1, check_after=0, peek_after=1000) as pool:
        for _ in range(3):
            conn = await pool.acquire()
            pid = kit.pid(conn)
            await pool.release(conn)
            kit.kill(pid)
            assert await pool.fetch_value("SELECT pg_backend_pid()") != pid
        assert pool.stats().leased == 0
        add_up(await pool.settled())


@behaviour
async def test_a_connection_that_died_while_it_lay_idle_is_never_lent(kit: Kit) -> None:
    async with kit.pool(min_size=2, max_size=2, peek_after=0) as pool:
        await pool.wait_ready()
        for _ in range(3):
            await until(lambda: pool.stats().idle == 2)
            dead = kit.backends()
            kit.kill(*dead)
            async with pool.connection() as conn:
                assert kit.pid(conn) not in dead
                await kit.sql(conn, "SELECT 1")
        stats = await pool.settled()
        assert set(stats.closed) <= {"server_closed", "stale"}
        assert stats.refused == {}
        add_up(stats)


@behaviour
async def test_a_borrow_after_peek_after_costs_no_round_trip(kit: Kit, server: Any) -> None:
    pg, name, _ = server
    with WireRecorder(pg.dsn_for(database=name)) as wire:
        async with kit.pool(f"{wire.dsn}&application_name={kit.app}", min_size=1, max_size=1, peek_after=0) as pool:
            await pool.release(await pool.acquire())
            wire.clear()
            for _ in range(5):
                await pool.release(await pool.acquire())
                async with pool.connection():
                    pass
            assert wire.requests == []


@behaviour
async def test_idle_connections_are_pinged_off_the_callers_path(kit: Kit) -> None:
    async with kit.pool(min_size=2, max_size=2, check_after=0.1, peek_after=1000) as pool:
        await pool.wait_ready()
        (first, second) = kit.backends()
        kit.kill(first)
        await until(lambda: pool.stats().closed, "the check to find it")
        await until(lambda: pool.stats().idle == 2, "a new one")
        assert first not in kit.backends()
        assert set(pool.stats().closed) <= {"check_failed", "server_closed"}
        assert second in kit.backends()


@behaviour
async def test_a_connection_killed_in_its_borrowers_hands_raises_the_drivers_error_and_is_replaced(
    kit: Kit,
) -> None:
    async with kit.pool(min_size=1, max_size=1) as pool:
        with pytest.raises(kit.errors()):
            async with pool.connection() as conn:
                kit.kill(kit.pid(conn))
                await kit.sql(conn, "SELECT 1")
        assert await pool.fetch_value("SELECT 1") == 1
        stats = await pool.settled()
        assert stats.closed == {"broken": 1}
        add_up(stats)


# -- hooks -----------------------------------------------------------------------------------------------------


@behaviour
async def test_init_query_sets_what_every_borrower_finds_also_after_a_reset(kit: Kit) -> None:
    async with kit.pool(max_size=1, init_query="SET work_mem = '5MB'; SET search_path = pg_catalog") as pool:
        for _ in range(2):
            async with pool.connection() as conn:
                assert await kit.sql(conn, "SHOW work_mem") == [("5MB",)]
                assert await kit.sql(conn, "SHOW search_path") == [("pg_catalog",)]
                await kit.sql(conn, "SET work_mem = '9MB'")
                await kit.sql(conn, "SET search_path = public")
        assert sum((await pool.settled()).opened.values()) == 1


@behaviour
async def test_an_init_query_that_fails_fails_the_dial_and_says_why(kit: Kit) -> None:
    async with kit.pool(max_size=1, init_query="SELECT nonsense") as pool:
        with raises_clearly(errors.NotReady, "nonsense"):
            await pool.wait_ready(0.2)
        stats = pool.stats()
        assert stats.opened == {}
    await until(lambda: kit.backends() == [])


@behaviour
async def test_configure_runs_once_for_each_connection_and_again_after_a_reset(kit: Kit) -> None:
    calls: list[int] = []

    async def set_async(conn: Any) -> None:
        calls.append(kit.pid(conn))
        await kit.sql(conn, "SET work_mem = '5MB'")
        await kit.commit(conn)

    def set_sync(conn: Any) -> None:
        calls.append(kit.pid(conn))
        conn.cursor().execute("SET work_mem = '5MB'")
        conn.commit()

    async with kit.pool(max_size=1, configure=set_async if kit.is_async else set_sync) as pool:
        async with pool.connection() as conn:
            assert await kit.sql(conn, "SHOW work_mem") == [("5MB",)]
        async with pool.connection() as conn:
            assert len(calls) == 1, "nothing was touched: nothing to run again"
            await kit.sql(conn, "SET work_mem = '9MB'")
        async with pool.connection() as conn:
            assert await kit.sql(conn, "SHOW work_mem") == [("5MB",)]
            assert len(calls) == 2
        assert len(set(calls)) == 1


@behaviour
async def test_a_configure_hook_that_fails_fails_the_dial_and_its_error_is_told(any_kit: Kit) -> None:
    def fail(conn: Any) -> None:
        raise LookupError("no such tenant")

    async with any_kit.pool(max_size=1, configure=any_kit.hook(fail)) as pool:
        with raises_clearly(errors.NotReady, "no such tenant") as caught:
            await pool.wait_ready(0.2)
        assert isinstance(caught.value.__cause__, LookupError)
        assert pool.stats().opened == {}


@behaviour
async def test_the_check_hook_replaces_the_ping(any_kit: Kit) -> None:
    verdicts = iter([None, LookupError("stale replica"), None, None, None, None])
    seen: list[int] = []

    def check(conn: Any) -> None:
        seen.append(id(conn))
        verdict = next(verdicts)
        if verdict is not None:
            raise verdict

    async with any_kit.pool(min_size=1, max_size=1, check=any_kit.hook(check), check_after=0) as pool:
        await pool.release(await pool.acquire())
        opened = sum(pool.stats().opened.values())
        if not seen:
            await pool.release(await pool.acquire())  # the first was new, and needed no check
        await pool.release(await pool.acquire())
        stats = await pool.settled()
        assert stats.closed == {"check_failed": 1}
        assert sum(stats.opened.values()) == opened + 1
        assert stats.epoch == 0, "a hook's own error says nothing of the server"


@behaviour
async def test_a_reset_hook_runs_for_every_connection_that_comes_back_off_the_callers_path(any_kit: Kit) -> None:
    kit = any_kit
    runs: list[int] = []
    open_now = asyncio.Event()

    async def hook_async(conn: Any) -> None:
        runs.append(id(conn))
        await open_now.wait()

    def hook_sync(conn: Any) -> None:
        runs.append(id(conn))
        while not open_now.is_set():
            time.sleep(0.002)

    async with kit.pool(max_size=1, reset=hook_async if kit.is_async else hook_sync) as pool:
        conn = await pool.acquire()
        await asyncio.wait_for(pool.release(conn), 10)
        await until(lambda: runs == [id(conn)], "the hook to run")
        assert pool.stats().resetting == 1
        waiter = pool.start("acquire")
        await pool.standing(1)
        open_now.set()
        assert await waiter is conn
        await pool.release(conn)
        await until(lambda: len(runs) == 2)
        assert (await pool.settled()).idle == 1


@behaviour
async def test_a_reset_hook_that_fails_costs_the_connection_and_nobody_elses(any_kit: Kit) -> None:
    def fail(conn: Any) -> None:
        raise LookupError("cannot clean")

    async with any_kit.pool(min_size=0, max_size=1, reset=any_kit.hook(fail)) as pool:
        await pool.release(await pool.acquire())
        stats = await pool.settled()
        assert stats.closed == {"reset_failed": 1}
        assert stats.epoch == 0
        await pool.release(await pool.acquire())
        assert sum(pool.stats().opened.values()) == 2


@behaviour
async def test_what_a_reset_hook_leaves_open_is_rolled_back(kit: Kit) -> None:
    async def hook_async(conn: Any) -> None:
        await kit.begin(conn)

    def hook_sync(conn: Any) -> None:
        conn.cursor().execute("SELECT 1")

    async with kit.pool(max_size=1, reset=hook_async if kit.is_async else hook_sync) as pool:
        await pool.release(await pool.acquire())
        await pool.settled()
        await pool.execute("VACUUM note")
        open_ones = "SELECT count(*) FROM pg_stat_activity WHERE application_name = %s AND state <> 'idle'"
        await pool.settled()
        assert kit.admin.value(open_ones, (kit.app,)) == 0


@behaviour
async def test_a_listener_hears_of_every_event_with_its_reason(any_kit: Kit) -> None:
    heard: list[Event] = []
    async with any_kit.pool(min_size=1, max_size=1, name="orders", listener=heard.append) as pool:
        await pool.wait_ready()
        held = await pool.acquire()
        with pytest.raises(errors.AcquireTimeout):
            await pool.acquire(0)
        await any_kit.close_connection(held)
        await pool.release(held)
        await until(lambda: pool.stats().idle == 1)
        await pool.close()
        await until(lambda: sum(event.kind == "closed" for event in heard) == 2)
    assert {event.pool for event in heard} == {"orders"}
    told = [(event.kind, event.reason) for event in heard]
    assert sorted(told) == [
        ("closed", "by_borrower"),
        ("closed", "pool_closed"),
        ("opened", "minimum"),
        ("opened", "minimum"),
        ("refused", "timeout"),
    ]


@behaviour
async def test_a_listener_that_fails_harms_nobody_and_is_logged(
    any_kit: Kit, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(event: Event) -> None:
        raise LookupError("no such queue")

    async with any_kit.pool(max_size=1, listener=fail) as pool:
        assert await pool.fetch_value("SELECT 1") == 1
        with pytest.raises(errors.AcquireTimeout):
            async with pool.connection():
                await pool.acquire(0)
        add_up(await pool.settled())
    assert "the listener failed" in caplog.text


@behaviour
async def test_credentials_are_asked_anew_for_each_connection(kit: Kit) -> None:
    asked: list[str] = []

    def dsn() -> str:
        asked.append("dsn")
        return kit.dsn

    for colour in (dsn, kit.hook(dsn)):
        asked.clear()
        async with kit.pool(colour, min_size=0, max_size=2) as pool:
            assert asked == []
            conns = [await pool.acquire() for _ in range(2)]
            assert asked == ["dsn", "dsn"]
            for conn in conns:
                await pool.release(conn)


@behaviour
async def test_a_pool_outlives_a_change_of_its_password(kit: Kit, server: Any) -> None:
    pg, name, admin = server
    role = f"rotating_{kit.app.replace('-', '_')}"
    passwords = {"now": "first"}
    admin.rows(f"CREATE ROLE {role} LOGIN PASSWORD 'first'")
    try:

        def dsn() -> str:
            return kit.named(pg.dsn_for(user=role, password=passwords["now"], database=name))

        async with kit.pool(dsn, min_size=0, max_size=2) as pool:
            held = await pool.acquire()
            admin.rows(f"ALTER ROLE {role} PASSWORD 'second'")
            with raises_clearly((errors.ConnectFailed, errors.AcquireTimeout), "password", secret="second"):
                await pool.acquire(0.2)
            passwords["now"] = "second"
            second = await pool.acquire(10)
            await kit.sql(second, "SELECT 1")
            for conn in (held, second):
                await pool.release(conn)
            assert await pool.fetch_value("SELECT 1") == 1
    finally:
        admin.rows(f"DROP ROLE {role}")


# -- never somebody else's data --------------------------------------------------------------------------------

# What a borrower does, and what the next one asks.
TRACES: dict[str, tuple[list[str], str]] = {
    "SET": (["SET work_mem = '7MB'"], "SHOW work_mem"),
    "set_config": (["SELECT set_config('work_mem', '7MB', false)"], "SHOW work_mem"),
    "SET after a comment": (["/* hello */ -- there\n set work_mem to '7MB'"], "SHOW work_mem"),
    "SET TIME ZONE": (["SET TIME ZONE 'Asia/Tokyo'"], "SHOW timezone"),
    "SET SESSION CHARACTERISTICS": (
        ["SET SESSION CHARACTERISTICS AS TRANSACTION READ ONLY"],
        "SHOW default_transaction_read_only",
    ),
    "a setting of one's own": (["SET app.tenant = '42'"], "SELECT coalesce(current_setting('app.tenant', true), '')"),
    "SET ROLE": (["SET ROLE {guest}"], "SELECT current_user"),
    "a DO block": (["DO $$ BEGIN SET work_mem = '7MB'; END $$"], "SHOW work_mem"),
    "a temporary table": (["CREATE TEMP TABLE t (x int)"], "SELECT to_regclass('pg_temp.t') IS NULL"),
    "a temporary view": (["CREATE TEMPORARY VIEW v AS SELECT 1"], "SELECT to_regclass('pg_temp.v') IS NULL"),
    "SELECT INTO TEMP": (["SELECT 1 AS x INTO TEMP t"], "SELECT to_regclass('pg_temp.t') IS NULL"),
    "an advisory lock": (
        ["SELECT pg_advisory_lock(42)"],
        "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid()",
    ),
    "LISTEN": (["LISTEN news"], "SELECT count(*) FROM pg_listening_channels()"),
    "a held cursor": (
        ["DECLARE c CURSOR WITH HOLD FOR SELECT 1"],
        "SELECT count(*) FROM pg_cursors WHERE name = 'c'",
    ),
    "PREPARE": (["PREPARE p AS SELECT 1"], "SELECT count(*) FROM pg_prepared_statements WHERE name = 'p'"),
    "a sequence": (["SELECT nextval('counter')"], "SELECT lastval()"),
    "all of them": (
        ["SET work_mem = '7MB'", "CREATE TEMP TABLE t (x int)", "SELECT pg_advisory_lock(42)", "LISTEN news"],
        "SELECT current_setting('work_mem'), to_regclass('pg_temp.t') IS NULL,"
        " (SELECT count(*) FROM pg_listening_channels())",
    ),
}


async def answer(kit: Kit, pool: Api, question: str) -> Any:
    """What a borrower finds; that he is refused an answer is one, too."""
    try:
        return [tuple(row) for row in await pool.fetch_all(question)]
    except kit.errors() as error:
        return type(error).__name__


@pytest.mark.parametrize("trace", TRACES)
@pytest.mark.parametrize("reset", ["auto", "always"])
@behaviour
async def test_session_state_does_not_reach_the_next_borrower(
    kit: Kit, server: Any, trace: str, reset: str
) -> None:
    statements, question = TRACES[trace]
    async with kit.pool(max_size=1, reset=reset) as pool:
        pid = await pool.fetch_value("SELECT pg_backend_pid()")
        clean = await answer(kit, pool, question)
        async with pool.connection() as conn:
            for statement in statements:
                await kit.sql(conn, statement.format(guest=f"guest_{server[1]}"))
                await kit.commit(conn)
            dirty = await kit.sql(conn, question)
            assert dirty != clean, "the statement left no trace: the test is void"
        assert await answer(kit, pool, question) == clean
        assert await pool.fetch_value("SELECT pg_backend_pid()") == pid, "it was reconnected, not reset"
        # And by one statement of the pool itself.
        await pool.execute(statements[0].format(guest=f"guest_{server[1]}"))
        assert await answer(kit, pool, question) == clean


@behaviour
async def test_reset_always_undoes_what_a_function_hides(kit: Kit) -> None:
    async with kit.pool(max_size=1, reset="always") as pool:
        clean = await pool.fetch_value("SHOW work_mem")
        await pool.execute("SELECT hidden()")
        assert await pool.fetch_value("SHOW work_mem") == clean


@behaviour
async def test_reset_never_sends_nothing_but_the_end_of_an_open_transaction(kit: Kit, server: Any) -> None:
    pg, name, _ = server
    with WireRecorder(pg.dsn_for(database=name)) as wire:
        async with kit.pool(f"{wire.dsn}&application_name={kit.app}", max_size=1, reset="never") as pool:
            async with pool.connection() as conn:
                await kit.sql(conn, "SET work_mem = '7MB'")
            wire.clear()
            await pool.settled()
            conn = await pool.acquire()
            assert wire.requests == []
            await kit.begin(conn)
            await kit.sql(conn, "SET work_mem = '8MB'")
            wire.clear()
            await pool.release(conn)
            await pool.settled()
            assert [text.upper() for text in wire.texts()] == ["ROLLBACK"]
            assert await pool.fetch_value("SHOW work_mem") == "7MB"


@pytest.mark.parametrize("reset", ["auto", "always", "never"])
@behaviour
async def test_an_open_transaction_is_rolled_back_at_release(kit: Kit, reset: str) -> None:
    async with kit.pool(max_size=1, reset=reset) as pool:
        for breaks in (False, True):
            conn = await pool.acquire()
            await kit.begin(conn)
            await write(kit, conn, "half")
            if breaks:
                with pytest.raises(kit.errors()):
                    await kit.sql(conn, "SELECT nonsense")
            pid = kit.pid(conn)
            await pool.release(conn)
            assert await notes(pool) == []
            async with pool.connection() as conn:
                assert kit.pid(conn) == pid


@behaviour
async def test_an_untouched_connection_is_released_without_a_message(kit: Kit, server: Any) -> None:
    pg, name, _ = server
    with WireRecorder(pg.dsn_for(database=name)) as wire:
        async with kit.pool(f"{wire.dsn}&application_name={kit.app}", max_size=1) as pool:
            conn = await pool.acquire()
            await kit.sql(conn, "SELECT 1")
            await kit.commit(conn)
            wire.clear()
            await pool.release(conn)
            await pool.settled()
            async with pool.connection():
                pass
            assert wire.requests == []


@behaviour
async def test_a_release_never_waits_for_the_server(kit: Kit, server: Any) -> None:
    """Not even when a transaction is to be rolled back and a session to be cleaned: the line is dead here."""
    pg, name, _ = server
    with WireRecorder(pg.dsn_for(database=name)) as wire:
        async with kit.pool(f"{wire.dsn}&application_name={kit.app}", max_size=1) as pool:
            conn = await pool.acquire()
            await kit.begin(conn)
            await kit.sql(conn, "SET work_mem = '7MB'")
            await kit.sql(conn, "SELECT pg_advisory_lock(42)")
            wire.clear()
            wire.hold()
            try:
                await asyncio.wait_for(pool.release(conn), 3)
                assert pool.stats().resetting == 1
            finally:
                wire.release()
            stats = await pool.settled()
            assert stats.idle == 1
            assert await pool.fetch_value("SHOW work_mem") != "7MB"


@behaviour
async def test_what_a_borrower_changes_on_the_connection_object_is_changed_back(any_kit: Kit) -> None:
    kit = any_kit
    async with kit.pool(max_size=1) as pool:
        conn = await pool.acquire()
        before = _attributes(kit, conn)
        await _change_attributes(kit, conn)
        assert _attributes(kit, conn) != before
        await pool.release(conn)
        again = await pool.acquire()
        assert again is conn
        assert _attributes(kit, again) == before
        if kit.name == "asyncpg":
            assert await conn.fetchval("SELECT '1'::json") == "1"
        await pool.release(again)


def _attributes(kit: Kit, conn: Any) -> Any:
    match kit.kind:
        case "psycopg":
            return (
                conn.autocommit,
                conn.isolation_level,
                conn.read_only,
                conn.deferrable,
                conn.row_factory,
                conn.cursor_factory,
                conn.prepare_threshold,
            )
        case "psycopg2":
            return conn.autocommit, conn.isolation_level, conn.readonly, conn.deferrable, conn.cursor_factory
        case "asyncpg":
            return len(conn._log_listeners), len(conn._listeners), len(conn._query_loggers)
        case _:
            return conn.isolation_level, conn.row_factory, conn.text_factory


async def _change_attributes(kit: Kit, conn: Any) -> None:
    import sqlite3

    import psycopg2.extensions
    import psycopg2.extras
    from psycopg.rows import dict_row

    match kit.kind:
        case "psycopg":
            if kit.is_async:
                await conn.set_isolation_level(3)
                await conn.set_read_only(True)
            else:
                conn.isolation_level = 3
                conn.read_only = True
            conn.row_factory = dict_row
            conn.prepare_threshold = 1
        case "psycopg2":
            conn.set_session(isolation_level="SERIALIZABLE", readonly=True)
            conn.cursor_factory = psycopg2.extras.DictCursor
        case "asyncpg":
            conn.add_log_listener(lambda *_: None)
            await conn.add_listener("news", lambda *_: None)
            await conn.set_type_codec("json", encoder=str, decoder=lambda text: ["mine"], schema="pg_catalog")
        case _:
            conn.isolation_level = None
            conn.row_factory = sqlite3.Row


@behaviour
async def test_autocommit_set_by_a_borrower_is_his_alone(kit: Kit) -> None:
    if kit.kind == "asyncpg":
        pytest.skip("asyncpg has no such attribute")
    async with kit.pool(max_size=1) as pool:
        conn = await pool.acquire()
        if kit.is_async:
            await conn.set_autocommit(True)
        else:
            conn.autocommit = True
        await write(kit, conn, "at once")
        await pool.release(conn)
        assert await notes(pool) == ["at once"]
        conn = await pool.acquire()
        assert not conn.autocommit
        await write(kit, conn, "half")
        await pool.release(conn)
        assert await notes(pool) == ["at once"]


# -- what is said ----------------------------------------------------------------------------------------------


@behaviour
async def test_the_pools_name_is_in_its_repr_its_log_and_its_threads(
    any_kit: Kit, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "cenote")
    async with any_kit.pool(max_size=1, name="orders-17") as pool:
        await pool.release(await pool.acquire())
        assert repr(pool.raw).startswith(f"<{type(pool.raw).__name__} 'orders-17' running: 1/1 connections")
    records = [record for record in caplog.records if record.name == "cenote.pool"]
    assert records
    assert all('pool "orders-17"' in record.getMessage() for record in records)


@behaviour
async def test_no_password_is_in_any_text(kit: Kit, server: Any, caplog: pytest.LogCaptureFixture) -> None:
    pg, name, _ = server
    caplog.set_level(logging.DEBUG)
    texts: list[str] = []
    for dsn in (kit.dsn, kit.named(pg.dsn_for(database=name, password="n0tth1s"))):
        heard: list[Event] = []
        async with kit.pool(dsn if dsn is not kit.dsn else None, max_size=1, listener=heard.append) as pool:
            with contextlib.suppress(errors.CenoteError):
                await pool.wait_ready(0.2)
            texts += [repr(pool.raw), repr(pool.stats()), repr(pool.raw.holders())]
            try:
                async with pool.connection():
                    texts.append(repr(pool.raw.holders()))
                    await pool.acquire(0)
            except errors.CenoteError as error:
                texts += [str(error), repr(error), repr(error.__cause__)]
        texts += map(repr, heard)
    texts.append(caplog.text)
    for secret in (pg.password, "n0tth1s"):
        assert not [text for text in texts if secret in text]


def test_the_constructor_touches_nothing(any_kit: Kit) -> None:
    """No thread, no socket, no event loop: it may run at import time."""
    import threading

    threads = threading.active_count()
    pool = any_kit.make("postgresql://app@192.0.2.1/app" if any_kit.on_server else any_kit.dsn)
    assert threading.active_count() == threads
    assert pool.stats().size == 0
    assert not pool.closed


def test_pools_without_a_name_get_one_each(any_kit: Kit) -> None:
    names = [any_kit.make().name for _ in range(3)]
    assert len(set(names)) == 3
    assert all(re.fullmatch(r"pool-\d+", name) for name in names)


@behaviour
async def test_refresh_replaces_every_connection_opened_until_now(kit: Kit) -> None:
    async with kit.pool(min_size=2, max_size=3) as pool:
        await pool.wait_ready()
        held = await pool.acquire()
        before = set(kit.backends())
        pool.raw.refresh()
        await kit.sql(held, "SELECT 1")  # a lease runs to its end
        await kit.commit(held)
        await pool.release(held)
        await until(lambda: not before & set(kit.backends()) and pool.stats().idle == 2)
        stats = await pool.settled()
        assert stats.closed == {"stale": len(before)}
        assert stats.epoch == 1


@behaviour
async def test_a_dropped_lease_comes_back_and_the_warning_says_where_it_was_acquired(kit: Kit) -> None:
    heard: list[Event] = []
    with pytest.MonkeyPatch.context() as patch:
        # The warning is given by the keeper thread or a callback of the loop: no caller can catch it.
        warned: list[str] = []
        patch.setattr("warnings.warn", lambda message, *_, **__: warned.append(str(message)))
        async with kit.pool(min_size=0, max_size=1, listener=heard.append) as pool:
            await _drop(pool)
            gc.collect()
            await until(lambda: pool.stats().closed == {"leaked": 1}, "the lease to be missed")
            await until(lambda: kit.backends() == [], "its session to end")
            assert await pool.fetch_value("SELECT 1") == 1
            await until(lambda: warned, "the warning")
    assert [event.kind for event in heard if event.reason == "leaked"] == ["leaked", "closed"] or [
        event.kind for event in heard if event.reason == "leaked"
    ] == ["closed", "leaked"]
    assert "dropped without being released; acquired at" in warned[0]


async def _drop(pool: Api) -> None:
    await pool.acquire()


@behaviour
async def test_who_holds_what_is_told(any_kit: Kit) -> None:
    async with any_kit.pool(max_size=2) as pool:
        assert pool.raw.holders() == ()
        pool.raw.assert_all_returned()
        conn = await pool.acquire()
        (holder,) = pool.raw.holders()
        assert not holder.in_query
        assert not holder.in_transaction
        assert holder.last_verb == ""
        if any_kit.on_server:
            await any_kit.begin(conn)
            (holder,) = pool.raw.holders()
            assert holder.in_transaction
            assert holder.last_verb in ("SELECT", "BEGIN")
        with pytest.raises(errors.LeasesOutstanding, match="1 lease") as caught:
            pool.raw.assert_all_returned()
        assert isinstance(caught.value, AssertionError)
        assert len(caught.value.holders) == 1
        await pool.release(conn)
        await pool.settled()
        pool.raw.assert_all_returned()


# -- options ---------------------------------------------------------------------------------------------------


def test_all_problems_of_a_configuration_are_told_at_once(any_kit: Kit) -> None:
    with pytest.raises(errors.ConfigError) as caught:
        any_kit.make(name="orders", min_size=-1, max_size="9", aquire_timeout=3, codel="of", check=7, idle_timeout=0)
    assert len(caught.value.problems) == 6
    text = str(caught.value)
    for words in (
        "min_size = -1",
        "max_size = '9'",
        "did you mean 'acquire_timeout'?",
        "did you mean 'off'?",
        "check = 7: must be callable",
        "idle_timeout = 0: allowed is more than 0 seconds",
        'pool "orders"',
    ):
        assert words in text
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"min_size": 5, "max_size": 2}, "min_size = 5 is above max_size = 2: lower min_size or raise max_size"),
        ({"max_size": 0}, "max_size = 0: allowed is 1 to"),
        ({"max_size": True}, "must be a whole number"),
        ({"max_size": 2.5}, "must be a whole number"),
        ({"acquire_timeout": None}, "acquire_timeout = None: must be a number of seconds"),
        ({"acquire_timeout": float("nan")}, "must be a number"),
        ({"reset": "sometimes"}, "use one of 'auto', 'always', 'never'"),
        ({"init_query": " "}, "must be a non-empty text"),
        ({"name": ""}, "must be a non-empty text"),
        ({"listener": "print"}, "listener = 'print': must be callable"),
        ({"driver": "psycopgg"}, "did you mean 'psycopg'?"),
        ({"maxsize": 3}, "did you mean 'max_size'?"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
@pytest.mark.parametrize("pool_class", [cenote.Pool, cenote.AsyncPool])
def test_a_wrong_option_is_named_with_what_is_allowed(pool_class: Any, wrong: dict[str, Any], words: str) -> None:
    with raises_clearly(errors.ConfigError, words, "[P1001]"):
        pool_class("postgresql://app@127.0.0.1/app", **wrong)


@pytest.mark.parametrize(
    "dsn", ["postgresql://app:s3cr3t@[::1/app", "host=127.0.0.1 passwort=s3cr3t", "postgres//app:s3cr3t@h"]
)
def test_a_dsn_that_cannot_be_read_is_refused_without_repeating_its_password(
    any_kit: Kit, dsn: str, recwarn: pytest.WarningsRecorder
) -> None:
    if not any_kit.on_server:
        pytest.skip("any text is a file's name to sqlite3")
    with raises_clearly(errors.ConfigError, '"orders"', any_kit.kind, secret="s3cr3t"):
        any_kit.make(dsn, name="orders")


def test_unsafe_sqlite_is_refused_with_advice() -> None:
    import sqlite3

    with raises_clearly(errors.ConfigError, "check_same_thread", "False"):
        cenote.Pool(":memory:", driver=sqlite3.connect)


def test_numbers_given_to_a_pool_are_its_options(any_kit: Kit) -> None:
    pool = any_kit.make(max_size=1)
    assert (pool.options.min_size, pool.options.max_size) == (1, 1)  # the default of min_size follows max_size
    pool = any_kit.make()
    assert (pool.options.min_size, pool.options.max_size, pool.options.acquire_timeout) == (2, 10, 30.0)


def test_every_option_is_accepted_by_both_pools() -> None:
    from cenote.config import option_table

    given = {name: getattr(cenote.Pool("dbname=app").options, name) for name, *_ in option_table()}
    given = {name: value for name, value in given.items() if value is not None}
    for pool_class in (cenote.Pool, cenote.AsyncPool):
        pool = pool_class("postgresql://app@127.0.0.1/app", **given)
        for name, value in given.items():
            assert getattr(pool.options, name) == value


