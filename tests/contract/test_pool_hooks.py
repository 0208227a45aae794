"""What a program may hang into a pool: init_query, configure, check, reset, listener, credentials."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from cenote import errors
from cenote.pool.base import Event
from pool_kit import Kit, add_up, behaviour, raises_clearly, until


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
        await pool.open()
        await until(lambda: pool.stats().closed.get("dial_failed"), "a dial to fail")
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
        await pool.open()
        await until(lambda: pool.stats().closed.get("dial_failed"), "a dial to fail")
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
        await until(lambda: len(heard) == 5, "all to be told: the pool tells it after it has done it")
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
            with pytest.raises(errors.AcquireTimeout):
                await pool.acquire(0)  # begins to dial
            await until(lambda: pool.stats().closed.get("dial_failed"), "the dial to fail")
            with raises_clearly((errors.ConnectFailed, errors.AcquireTimeout), "password", secret="second"):
                await pool.acquire(0.2)
            passwords["now"] = "second"
            second = await pool.acquire(20)
            await kit.sql(second, "SELECT 1")
            for conn in (held, second):
                await pool.release(conn)
            assert await pool.fetch_value("SELECT 1") == 1
    finally:
        admin.rows(f"DROP ROLE {role}")
