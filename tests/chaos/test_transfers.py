"""Money moves between accounts while backends and servers are killed: afterwards nothing is lost, neither money
nor a connection nor a waiter.

Every transfer is one transaction and leaves a receipt in it. So the sums prove that no half of a transfer was
kept, and the receipts prove that whoever was told "done" was told the truth. (Who got an error may not conclude
that it was not done: the connection may have died between commit and answer.)
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import asyncpg
import psycopg
import psycopg2
import pytest

import cenote
from cenote import embedded
from cenote.testing.postgres import wait_until
from pool_kit import Admin, add_up, until

pytestmark = pytest.mark.chaos

ACCOUNTS = 20
START = 1000
TRANSFERS = 1000  # at once, in each round
AT_ONCE = 100  # threads
MAX_SIZE = 10
APP = "transfers"

# asyncpg's InternalClientError is what it says when the server's last word came just before a statement.
ASYNCPG = (asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError)
CLEAR = (cenote.CenoteError, psycopg.Error, psycopg2.Error, OSError, *ASYNCPG)

SCHEMA = f"""
DROP TABLE IF EXISTS account, receipt;
CREATE TABLE account (id int PRIMARY KEY, balance int NOT NULL);
CREATE TABLE receipt (number int PRIMARY KEY);
INSERT INTO account SELECT id, {START} FROM generate_series(1, {ACCOUNTS}) AS id;
"""
TAKE = "UPDATE account SET balance = balance - 1 WHERE id = "
GIVE = "UPDATE account SET balance = balance + 1 WHERE id = "
SIGN = "INSERT INTO receipt VALUES "


@pytest.fixture(scope="module")
def victim() -> Iterator[embedded.Postgres]:
    with embedded.Postgres(18, settings={"max_connections": 50}) as server:
        yield server


@pytest.fixture
def server(victim: embedded.Postgres) -> embedded.Postgres:
    with psycopg.connect(victim.dsn) as conn:
        conn.execute(SCHEMA)
    return victim


@pytest.fixture
def seconds(request: pytest.FixtureRequest) -> float:
    """Each test's share."""
    tests = [item for item in request.session.items if item.get_closest_marker("chaos")]
    return float(request.config.getoption("--chaos-seconds")) / max(1, len(tests))


def statements(number: int) -> list[str]:
    """A transfer, with the accounts in order: no deadlocks, which are not what this is about."""
    draw = random.Random(number)
    payer, payee = draw.sample(range(1, ACCOUNTS + 1), 2)
    moves = sorted([(payer, f"{TAKE}{payer}"), (payee, f"{GIVE}{payee}")])
    return [move for _, move in moves] + [f"{SIGN}({number})"]


REFUSED = "refused"


def refused(error: BaseException) -> Any:
    """What is noted of a transfer that was not done: a clear error, or what came instead of one."""
    return REFUSED if isinstance(error, CLEAR) else error


# -- what goes wrong -------------------------------------------------------------------------------------------


def kill_backends(server: embedded.Postgres) -> None:
    """`kill -9` of every backend of the pool: the postmaster then ends all sessions and recovers."""
    with contextlib.suppress(psycopg.Error), contextlib.closing(Admin(server.superuser_dsn).conn) as conn:
        found = conn.execute("SELECT pid FROM pg_stat_activity WHERE application_name = %s", (APP,)).fetchall()
        for (pid,) in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def terminate_some(server: embedded.Postgres) -> None:
    """End a third of the sessions, one by one, as an operator or a failover script does."""
    with contextlib.suppress(psycopg.Error), contextlib.closing(Admin(server.superuser_dsn).conn) as conn:
        conn.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE application_name = %s AND random() < 0.4",
            (APP,),
        )


def crash(server: embedded.Postgres) -> None:
    """The whole server at once, as when the power fails; and again up."""
    server.kill()
    server.start()


HARMS: dict[str, Callable[[embedded.Postgres], None]] = {
    "kill -9 of every backend": kill_backends,
    "sessions terminated": terminate_some,
    "server crash": crash,
}
EACH_HARM = pytest.mark.parametrize("harm", HARMS.values(), ids=HARMS)


def rounds(seconds: float) -> Iterator[range]:
    """The numbers of one round's transfers after the other; ends after so many seconds, one round at least."""
    began = time.monotonic()
    number = 0
    while not number or time.monotonic() - began < seconds:
        yield range(number, number + TRANSFERS)
        number += TRANSFERS


def harmed_in_the_middle(
    server: embedded.Postgres, harm: Callable[[embedded.Postgres], None], ended: Callable[[], int]
) -> threading.Thread:
    """Do harm when a fifth of the transfers has ended, and again at the half."""

    def work() -> None:
        for share in (5, 2):
            wait_until(lambda share=share: ended() >= TRANSFERS // share, timeout=120)  # type: ignore[misc]
            harm(server)

    thread = threading.Thread(target=work, name="harm")
    thread.start()
    return thread


def books(server: embedded.Postgres, ends: dict[int, Any]) -> None:
    """The sums stay right, and who was told so has his receipt."""

    def ask() -> tuple[int, int, set[int]]:
        with psycopg.connect(server.dsn) as conn:
            (total,) = conn.execute("SELECT sum(balance) FROM account").fetchone() or (0,)
            (smallest,) = conn.execute("SELECT count(*) FROM account").fetchone() or (0,)
            return int(total), int(smallest), {row[0] for row in conn.execute("SELECT number FROM receipt")}

    total, accounts, receipts = _patiently(ask)
    assert (total, accounts) == (ACCOUNTS * START, ACCOUNTS)
    done = {number for number, end in ends.items() if end is True}
    assert done <= receipts, "somebody was told that it was done, and it was not"
    assert [end for end in ends.values() if end not in (True, REFUSED)] == []
    balances = dict.fromkeys(range(1, ACCOUNTS + 1), 0)
    for number in receipts:
        for text in statements(number)[:2]:
            balances[int(text.rsplit(" ", 1)[1])] += -1 if text.startswith(TAKE) else 1
    with psycopg.connect(server.dsn) as conn:
        found = dict(conn.execute("SELECT id, balance FROM account").fetchall())
    assert found == {number: START + change for number, change in balances.items()}


def _patiently(ask: Callable[[], Any]) -> Any:
    """The server may still be recovering."""
    answers: list[Any] = []

    def answered() -> bool:
        with contextlib.suppress(psycopg.OperationalError):
            answers.append(ask())
        return bool(answers)

    wait_until(answered, timeout=30)
    return answers[0]


def exact(server: embedded.Postgres, pool: Any) -> None:
    """The pool's figures are true, and the server agrees."""
    stats = pool.stats()
    add_up(stats)
    assert (stats.leased, stats.waiting) == (0, 0)
    assert stats.size <= MAX_SIZE
    pool.assert_all_returned()
    with contextlib.closing(Admin(server.superuser_dsn).conn) as conn:
        count = "SELECT count(*) FROM pg_stat_activity WHERE application_name = %s"
        assert conn.execute(count, (APP,)).fetchone() == (stats.size,)


def still(pool: Any) -> bool:
    stats = pool.stats()
    return not (stats.connecting or stats.checking or stats.resetting or stats.closing or stats.waiting)


# -- the tests -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("driver", ["psycopg", "psycopg2"])
@EACH_HARM
def test_threads_lose_neither_money_nor_connections(
    server: embedded.Postgres, seconds: float, driver: str, harm: Callable[[embedded.Postgres], None]
) -> None:
    ends: dict[int, Any] = {}

    def transfer(number: int) -> None:
        try:
            with pool.transaction() as conn:
                cursor = conn.cursor()
                for statement in statements(number):
                    cursor.execute(statement)
            ends[number] = True
        except BaseException as error:
            ends[number] = refused(error)

    dsn = f"{server.dsn}?application_name={APP}"
    with (
        cenote.Pool(dsn, driver=driver, min_size=2, max_size=MAX_SIZE, acquire_timeout=60) as pool,
        ThreadPoolExecutor(AT_ONCE) as callers,
    ):
        for numbers in rounds(seconds):
            before = len(ends)
            bad = harmed_in_the_middle(server, harm, lambda before=before: len(ends) - before)  # type: ignore[misc]
            list(callers.map(transfer, numbers, timeout=120))
            bad.join(60)
            assert len(ends) == before + TRANSFERS
            _patiently(lambda: psycopg.connect(server.dsn).close())
            pool.wait_ready(30)
            # Full speed again: nobody is served a dead connection.
            assert [pool.fetch_value("SELECT 1", timeout=10) for _ in range(100)] == [1] * 100
            wait_until(lambda: still(pool), timeout=20)
            exact(server, pool)
        books(server, ends)
        assert sum(end is True for end in ends.values()) > TRANSFERS // 4, "nothing much was tried"


@pytest.mark.parametrize("driver", ["psycopg", "asyncpg"])
@EACH_HARM
def test_tasks_lose_neither_money_nor_connections(
    server: embedded.Postgres, seconds: float, driver: str, harm: Callable[[embedded.Postgres], None]
) -> None:
    ends: dict[int, Any] = {}

    async def transfer(pool: cenote.AsyncPool, number: int) -> None:
        try:
            async with pool.transaction() as conn:
                for statement in statements(number):
                    await conn.execute(statement)
            ends[number] = True
        except BaseException as error:
            ends[number] = refused(error)

    async def run() -> None:
        dsn = f"{server.dsn}?application_name={APP}"
        async with cenote.AsyncPool(dsn, driver=driver, min_size=2, max_size=MAX_SIZE, acquire_timeout=60) as pool:
            for numbers in rounds(seconds):
                before = len(ends)
                bad = harmed_in_the_middle(server, harm, lambda before=before: len(ends) - before)  # type: ignore[misc]
                async with asyncio.timeout(120):
                    await asyncio.gather(*(transfer(pool, number) for number in numbers))
                await asyncio.to_thread(bad.join, 60)
                assert len(ends) == before + TRANSFERS
                await asyncio.to_thread(_patiently, lambda: psycopg.connect(server.dsn).close())
                await pool.wait_ready(30)
                assert [await pool.fetch_value("SELECT 1", timeout=10) for _ in range(100)] == [1] * 100
                await until(lambda: still(pool), timeout=20)
                exact(server, pool)

    asyncio.run(run())
    books(server, ends)
    assert sum(end is True for end in ends.values()) > TRANSFERS // 4, "nothing much was tried"


@pytest.mark.parametrize("driver", ["psycopg", "asyncpg"])
def test_tasks_that_are_cancelled_at_random_lose_neither_money_nor_connections(
    server: embedded.Postgres, seconds: float, driver: str
) -> None:
    """Cancellation at whatever await it strikes, in 1,000 transfers at once."""
    ends: dict[int, Any] = {}

    async def transfer(pool: cenote.AsyncPool, number: int) -> None:
        try:
            async with pool.transaction() as conn:
                for statement in statements(number):
                    await conn.execute(statement)
            ends[number] = True
        except asyncio.CancelledError:
            ends[number] = REFUSED
        except BaseException as error:
            ends[number] = refused(error)

    async def run() -> None:
        dsn = f"{server.dsn}?application_name={APP}"
        async with cenote.AsyncPool(dsn, driver=driver, min_size=2, max_size=MAX_SIZE, acquire_timeout=60) as pool:
            draw = random.Random(7)
            for numbers in rounds(seconds):
                before = len(ends)
                tasks = [asyncio.create_task(transfer(pool, number)) for number in numbers]
                async with asyncio.timeout(120):
                    while not all(task.done() for task in tasks):
                        await asyncio.sleep(draw.random() * 0.002)
                        victim = draw.choice(tasks)
                        victim.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                never_ran = TRANSFERS - (len(ends) - before)  # cancelled before their first step
                assert never_ran < TRANSFERS // 2
                await until(lambda: still(pool), timeout=20)
                assert [await pool.fetch_value("SELECT 1", timeout=10) for _ in range(100)] == [1] * 100
                await until(lambda: still(pool), timeout=20)
                exact(server, pool)

    asyncio.run(run())
    books(server, ends)
