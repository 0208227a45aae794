"""An acquire that times out says who holds what, where he stands now, and why nothing is free."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest

import cenote
from cenote import embedded, errors
from cenote.testing.postgres import wait_until
from pool_kit import Admin, behaviour, until


@contextlib.contextmanager
def thread(work: Any, name: str = "worker") -> Iterator[threading.Thread]:
    running = threading.Thread(target=work, name=name)
    running.start()
    try:
        yield running
    finally:
        running.join(20)
        assert not running.is_alive()


def test_the_stack_of_a_thread_shows_the_line_where_it_stands(dsn: str) -> None:
    go_on = threading.Event()

    def payment() -> None:
        with pool.connection() as conn:
            conn.execute("SELECT 1")
            dreaming()

    def dreaming() -> None:
        go_on.wait(20)  # here

    with cenote.Pool(dsn, max_size=1, name="orders") as pool:
        with thread(payment, "payer-7"):
            try:
                wait_until(lambda: any("# here" in line for h in pool.holders() for line in h.stack))
                with pytest.raises(errors.AcquireTimeout) as caught:
                    pool.acquire(0.3)
            finally:
                go_on.set()
        (holder,) = caught.value.holders
        assert holder.name == 'thread "payer-7"'
        assert holder.last_verb == "SELECT"
        assert holder.in_transaction
        assert not holder.in_query
        assert holder.age_s >= holder.idle_s > 0
        assert any("in dreaming: go_on.wait(20)  # here" in line for line in holder.stack)
        assert "test_pool_holders.py" in holder.site
        assert holder.site.endswith("payment")
        text = str(caught.value)
        assert 'by thread "payer-7": idle, in transaction, last SELECT' in text
        assert "1 of 1 leases are idle" in text
        assert "in dreaming" in text


@behaviour
async def test_the_stack_of_a_task_shows_the_coroutines_it_awaits(dsn: str) -> None:
    go_on = asyncio.Event()

    async def payment() -> None:
        async with pool.connection() as conn:
            await conn.execute("SELECT 1")
            await card_service()

    async def card_service() -> None:
        await over_the_wire()

    async def over_the_wire() -> None:
        await go_on.wait()

    async with cenote.AsyncPool(dsn, max_size=1) as pool:
        task = asyncio.create_task(payment(), name="payer-7")
        await until(lambda: any("over_the_wire" in line for h in pool.holders() for line in h.stack))
        with pytest.raises(errors.AcquireTimeout) as caught:
            await pool.acquire(0.05)
        go_on.set()
        await task
        (holder,) = caught.value.holders
        assert holder.name == 'task "payer-7"'
        chain = [line.split(" in ", 1)[1].split(":")[0] for line in holder.stack if " in " in line]
        assert chain[:4] == ["payment", "card_service", "over_the_wire", "wait"]
        assert "over_the_wire" in str(caught.value)


def test_a_lease_in_a_query_is_told_from_one_that_is_idle(dsn: str, pg18: embedded.Postgres) -> None:
    admin = Admin(pg18.superuser_dsn)
    ours = "pg_stat_activity WHERE query LIKE 'SELECT pg_sleep(600)%'"
    with contextlib.closing(admin.conn), cenote.Pool(dsn, min_size=2, max_size=2) as pool:

        def query() -> None:
            with contextlib.suppress(Exception), pool.connection() as conn:
                conn.execute("SELECT pg_sleep(600)")

        with thread(query):
            wait_until(lambda: admin.rows(f"SELECT 1 FROM {ours} AND state = 'active'"))
            with pool.connection():
                wait_until(lambda: max(holder.age_s for holder in pool.holders()) > 0.2)
                busy, idle = sorted(pool.holders(), key=lambda holder: not holder.in_query)
                assert busy.in_query
                assert busy.in_query_s > busy.idle_s
                assert not idle.in_query
                assert idle.in_query_s == 0
                assert idle.idle_s == idle.age_s
                assert "in query" in str(busy)
            admin.rows(f"SELECT pg_cancel_backend(pid) FROM {ours}")


# -- the cause in one sentence ---------------------------------------------------------------------------------


def refused(pool: cenote.Pool, timeout: float = 0.15) -> errors.AcquireTimeout:
    with pytest.raises(errors.AcquireTimeout) as caught:
        pool.acquire(timeout)
    assert caught.value.cause in str(caught.value)
    return caught.value


def test_cause_the_database_cannot_be_reached() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with cenote.Pool(f"postgresql://app@127.0.0.1:{port}/app") as pool:
        pool.open()
        wait_until(lambda: pool.stats().closed.get("dial_failed"))
        error = refused(pool)
        assert error.cause.startswith("The database cannot be reached: ")
        assert str(port) in error.cause
        assert error.__cause__ is not None


def test_cause_connections_are_still_being_dialed() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts, and says nothing
        port = silent.getsockname()[1]
        with cenote.Pool(f"postgresql://app@127.0.0.1:{port}/app", min_size=1, max_size=3) as pool:
            try:
                error = refused(pool)
            finally:
                silent.close()
            assert "1 of 3 connections are still being dialed" in error.cause
            assert "raise acquire_timeout or min_size" in error.cause


def test_cause_queries_are_slow(dsn: str) -> None:
    with cenote.Pool(dsn, min_size=1, max_size=1) as pool:

        def query() -> None:
            with contextlib.suppress(Exception), pool.connection() as conn:
                conn.execute("SELECT pg_sleep(600)")

        with thread(query):
            try:
                wait_until(lambda: any("pg_sleep" in link.session.last_sql for link in pool._leases()))
                wait_until(lambda: any(h.in_query and h.in_query_s > 0.1 for h in pool.holders()))
                assert refused(pool, 0.1).cause.startswith("1 of 1 leases are in queries: make the queries sho")
            finally:
                pool.close(0)  # cancels the query


def test_cause_leases_are_idle_in_their_holder(dsn: str) -> None:
    with cenote.Pool(dsn, min_size=1, max_size=1) as pool, pool.connection():
        cause = threading_refused(pool).cause
        assert cause == "1 of 1 leases are idle in their holder: shorten what runs between acquire and release."


def test_cause_leases_are_short_but_callers_too_many(dsn: str) -> None:
    """Everybody holds for a blink, and yet the line is longer than anybody waits."""
    with cenote.Pool(dsn, min_size=1, max_size=1) as pool:
        pool.wait_ready()

        def crowd() -> set[str]:
            causes: set[str] = set()

            def caller() -> None:
                try:
                    with pool.connection(0.15):
                        threading.Event().wait(0.02)
                except errors.AcquireTimeout as error:
                    causes.add(error.cause)

            callers = [threading.Thread(target=caller) for _ in range(30)]
            for each in callers:
                each.start()
            for each in callers:
                each.join(20)
            assert causes
            return causes

        # A machine that pauses makes a short lease a long one: one crowd of a few has to be undisturbed.
        short = (
            "Leases are short, but more callers arrive than connections can serve: raise max_size or shed load."
        )
        assert any(crowd() == {short} for _ in range(10))


def test_cause_connections_are_being_cleaned(dsn: str) -> None:
    go_on = threading.Event()
    with cenote.Pool(dsn, min_size=1, max_size=1, reset=lambda conn: go_on.wait(20)) as pool:
        try:
            pool.release(pool.acquire())
            assert refused(pool).cause.startswith("No lease is out: connections are being reset, checked or")
        finally:
            go_on.set()


def threading_refused(pool: cenote.Pool) -> errors.AcquireTimeout:
    """`refused`, by another thread than the one that holds."""
    found: list[errors.AcquireTimeout] = []
    with thread(lambda: found.append(refused(pool))):
        pass
    return found[0]


def test_a_thousand_callers_that_time_out_together_do_not_each_take_all_stacks(dsn: str) -> None:
    """The report is shared; what it costs must not grow with the number of those who want it."""
    with cenote.Pool(dsn, min_size=1, max_size=1) as pool, pool.connection():
        found: list[tuple[Any, ...]] = []

        def caller() -> None:
            found.append(refused(pool, 0.05).holders)

        callers = [threading.Thread(target=caller) for _ in range(50)]
        for each in callers:
            each.start()
        for each in callers:
            each.join(20)
        assert len(found) == 50
        assert len({id(holders[0]) for holders in found}) < 50
