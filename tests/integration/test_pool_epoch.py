"""A server that restarts costs a caller one dial; a single lost connection costs the others nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest

from cenote import embedded
from pool_kit import DRIVERS, Admin, Kit, add_up, behaviour, until

SIZE = 20


@pytest.fixture(scope="module")
def own() -> Iterator[embedded.Postgres]:
    """A server of these tests' own, to be stopped and killed."""
    with embedded.Postgres(18, settings={"max_connections": 60}) as server:
        yield server


@pytest.fixture(params=DRIVERS)
def kit(request: pytest.FixtureRequest, own: embedded.Postgres) -> Iterator[Kit]:
    admin = Admin(own.superuser_dsn)
    yield Kit(request.param, own.dsn, admin)
    with contextlib.suppress(Exception):
        admin.conn.close()


def tells_why(kit: Kit, request: pytest.FixtureRequest, *silent: str) -> None:
    """Some drivers drop what the server said last, so that its reason for ending a session is lost (with asyncpg
    not always: only once its event loop has read it)."""
    if kit.kind in silent:
        reason = f"{kit.kind} drops the server's last word"
        request.applymarker(pytest.mark.xfail(strict=kit.kind != "asyncpg", reason=reason))


async def fill(pool: Any, size: int) -> list[int]:
    """Have so many connections idle, the last to be lent first."""
    conns = [await pool.acquire() for _ in range(size)]
    pids = [pool.kit.pid(conn) for conn in conns]
    for conn in conns:
        await pool.release(conn)
    await pool.settled()
    assert pool.stats().idle == size
    return pids


@pytest.mark.parametrize("crash", [False, True], ids=["restart", "crash"])
@behaviour
async def test_after_a_restart_the_first_caller_is_served_for_the_price_of_one_dial(
    kit: Kit, own: embedded.Postgres, crash: bool
) -> None:
    async with kit.pool(kit.dsn, min_size=0, max_size=SIZE, peek_after=0) as pool:
        before = await fill(pool, SIZE)
        if crash:
            own.kill()
            own.start()
        else:
            own.restart()
        opened = sum(pool.stats().opened.values())
        conn = await pool.acquire(10)
        assert sum(pool.stats().opened.values()) == opened + 1
        assert (await kit.sql(conn, "SELECT pg_backend_pid()"))[0][0] not in before
        await pool.release(conn)
        stats = await pool.settled()
        assert stats.refused == {}
        assert stats.epoch >= 1
        assert stats.size == 1
        add_up(stats)


@behaviour
async def test_one_killed_connection_costs_the_others_nothing(kit: Kit) -> None:
    async with kit.pool(min_size=0, max_size=6, peek_after=0) as pool:
        pids = await fill(pool, 6)
        kit.kill(pids[-1])
        assert await pool.fetch_value("SELECT 1") == 1
        stats = await pool.settled()
        assert stats.epoch == 0
        assert stats.closed.get("server_closed") == 1
        assert set(stats.closed) <= {"server_closed", "not_needed"}
        assert set(kit.backends()) == set(pids[:-1])


@behaviour
async def test_two_killed_within_a_second_mean_the_server(kit: Kit) -> None:
    async with kit.pool(min_size=0, max_size=6, peek_after=0) as pool:
        pids = await fill(pool, 6)
        kit.kill(pids[-1], pids[0])
        assert await pool.fetch_value("SELECT 1") == 1
        await until(lambda: not set(pids) & set(kit.backends()), "all to be replaced")
        stats = await pool.settled()
        assert stats.epoch == 1
        assert stats.refused == {}
        add_up(stats)


@behaviour
async def test_sessions_the_server_ends_for_being_idle_say_nothing_of_the_others(
    kit: Kit, request: pytest.FixtureRequest
) -> None:
    tells_why(kit, request, "psycopg2")
    async with kit.pool(min_size=0, max_size=5, peek_after=0) as pool:
        conns = [await pool.acquire() for _ in range(5)]
        others = [kit.pid(conn) for conn in conns[:2]]
        for conn in conns[2:]:
            await kit.sql(conn, "SET idle_session_timeout = 20")
            await kit.commit(conn)
        ended = [kit.pid(conn) for conn in conns[2:]]
        await until(lambda: not set(ended) & set(kit.backends()), "the server to end them (57P05)")
        for conn in conns:
            await pool.release(conn)
        assert await pool.fetch_value("SELECT 1") == 1
        stats = await pool.settled()
        assert stats.epoch == 0
        assert set(kit.backends()) == set(others)


@behaviour
async def test_transactions_the_server_ends_for_being_idle_say_nothing_of_the_others(
    kit: Kit, request: pytest.FixtureRequest
) -> None:
    tells_why(kit, request, "psycopg2")
    async with kit.pool(min_size=0, max_size=5, peek_after=0) as pool:
        conns = [await pool.acquire() for _ in range(5)]
        others = [kit.pid(conn) for conn in conns[:2]]
        for conn in conns[2:]:
            await kit.begin(conn)
            await kit.sql(conn, "SET LOCAL idle_in_transaction_session_timeout = 20")
        ended = [kit.pid(conn) for conn in conns[2:]]
        await until(lambda: not set(ended) & set(kit.backends()), "the server to end them (25P03)")
        for conn in conns[2:]:
            with pytest.raises(kit.errors()):
                await kit.sql(conn, "SELECT 1")
        for conn in conns:
            await pool.release(conn)
        stats = await pool.settled()
        assert stats.epoch == 0
        assert stats.closed == {"broken": 3}
        assert set(kit.backends()) == set(others)


@behaviour
async def test_idle_connections_ended_by_idle_session_timeout_are_not_lent_and_flush_nothing(kit: Kit) -> None:
    """The same, while they lie in the pool: it is the pool that reads the server's last word."""
    dsn = kit.dsn + ("&" if kit.kind == "asyncpg" else "&options=-c%20") + "idle_session_timeout%3D1500"
    dsn = dsn.replace("%3D", "=") if kit.kind == "asyncpg" else dsn
    async with kit.pool(dsn, min_size=0, max_size=4, peek_after=0) as pool:
        await fill(pool, 4)
        await until(lambda: kit.backends() == [], "the server to end them (57P05)")
        assert await pool.fetch_value("SELECT 1") == 1
        stats = await pool.settled()
        assert stats.epoch == 0
        assert stats.refused == {}


@behaviour
async def test_while_the_server_is_down_one_dial_at_a_time_asks_and_callers_are_told_why(
    kit: Kit, own: embedded.Postgres
) -> None:
    async with kit.pool(kit.dsn, min_size=2, max_size=10, peek_after=0) as pool:
        await pool.wait_ready()
        own.stop()
        try:
            callers = [pool.start("acquire", 1.0) for _ in range(10)]
            most = 0
            while not all(caller.done() for caller in callers):
                stats = pool.stats()
                if stats.closed.get("dial_failed", 0) >= 4:
                    most = max(most, stats.connecting)
                await until(lambda: True)
                await _turn()
            for caller in callers:
                assert "cannot be reached" in str(caller.exception())
            assert most <= 1
        finally:
            own.start()
        assert await pool.fetch_value("SELECT 1", timeout=10) == 1
        await pool.wait_ready()
        add_up(await pool.settled())


async def _turn() -> None:
    import asyncio

    await asyncio.sleep(0.001)
