"""Servers that refuse, connections that grow old or die: what a caller notices of it."""

from __future__ import annotations

import socket
import time
from typing import Any

import pytest
from wire_recorder import WireRecorder

from cenote import errors
from pool_kit import WRONG, Kit, add_up, behaviour, raises_clearly, until

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
        await until(lambda: pool.stats().closed.get("dial_failed"), "a dial to fail")
        with raises_clearly(errors.NotReady, '"orders"', "within 0.20 s", "127.0.0.1", "[P2008]", secret="s3cr3t"):
            await pool.wait_ready(0.2)
        with raises_clearly(errors.AcquireTimeout, "cannot be reached", "127.0.0.1", secret="s3cr3t") as caught:
            await pool.acquire(0.2)
        assert caught.value.__cause__ is not None
        assert pool.stats().leased == 0


@behaviour
async def test_a_wrong_password_is_said_at_once(kit: Kit, server: Any) -> None:
    pg, name, _ = server
    wrong = kit.named(pg.dsn_for(database=name, password=WRONG))
    async with kit.pool(wrong, name="orders", acquire_timeout=60) as pool:
        began = time.monotonic()
        with raises_clearly(errors.NotReady, '"orders"', "password authentication failed", secret=WRONG):
            await pool.wait_ready(60)
        with raises_clearly(errors.ConnectFailed, "password authentication failed", "[P2006]", secret=WRONG) as no:
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
        await until(lambda: pool.stats().closed.get("max_lifetime", 0) >= 2, "both to be replaced")
        await until(lambda: not before & set(kit.backends()) and pool.stats().idle == 2, "the old ones to be gone")
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
        async with kit.pool(f"{wire.dsn}&application_name={kit.app}", max_size=1, peek_after=0) as pool:
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
