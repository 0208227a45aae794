"""psycopg 3's asyncio half through the proxy, with its defaults."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import psycopg
import pytest
from front import CLIENTS, MAX_SIZE, Front
from psycopg import errors
from psycopg.pq import TransactionStatus

from pool_kit import behaviour, until


@asynccontextmanager
async def several(dsn: str, count: int = CLIENTS) -> AsyncIterator[list[psycopg.AsyncConnection]]:
    """More connections than the server has."""
    async with AsyncExitStack() as stack:
        yield [
            await stack.enter_async_context(await psycopg.AsyncConnection.connect(dsn, autocommit=True))
            for _ in range(count)
        ]


@behaviour
async def test_tasks_on_their_own_connections_get_their_own_answers(dsn: str) -> None:
    async with several(dsn) as conns:

        async def client(number: int, conn: psycopg.AsyncConnection) -> None:
            for turn in range(30):
                cursor = await conn.execute(f"SELECT %s, 'text of {number}'".encode(), (f"{number}/{turn}",))
                assert await cursor.fetchone() == (f"{number}/{turn}", f"text of {number}")

        await asyncio.gather(*(client(number, conn) for number, conn in enumerate(conns)))


@behaviour
async def test_transactions_at_once_keep_their_sums(dsn: str) -> None:
    async with several(dsn) as conns:
        await conns[0].execute("CREATE TABLE account (id int PRIMARY KEY, balance int)")
        await conns[0].execute("INSERT INTO account SELECT n, 100 FROM generate_series(0, 5) AS n")

        async def client(number: int, conn: psycopg.AsyncConnection) -> None:
            for turn in range(10):
                low, high = sorted(((number + turn) % 6, (number + turn + 1 + turn % 4) % 6))
                async with conn.transaction():
                    await conn.execute("UPDATE account SET balance = balance - 1 WHERE id = %s", (low,))
                    await conn.execute("UPDATE account SET balance = balance + 1 WHERE id = %s", (high,))

        await asyncio.gather(*(client(number, conn) for number, conn in enumerate(conns)))
        cursor = await conns[0].execute("SELECT sum(balance), count(*) FROM account")
        assert await cursor.fetchone() == (600, 6)


@behaviour
async def test_pipelines_on_more_connections_than_servers(dsn: str) -> None:
    async with several(dsn) as conns:

        async def client(number: int, conn: psycopg.AsyncConnection) -> None:
            for turn in range(5):
                async with conn.pipeline() as pipeline:
                    cursors = []
                    for step in range(20):
                        cursors.append(await conn.execute("SELECT %s, %s, %s", (number, turn, step)))
                        if step == 10:
                            await pipeline.sync()
                assert [await cursor.fetchone() for cursor in cursors] == [(number, turn, n) for n in range(20)]

        await asyncio.gather(*(client(number, conn) for number, conn in enumerate(conns)))


@behaviour
async def test_errors_leave_the_connection_usable(dsn: str) -> None:
    async with several(dsn, 2) as (conn, _other):
        for _ in range(3):
            with pytest.raises(errors.DivisionByZero):
                await conn.execute("SELECT 1/0")
            with pytest.raises(errors.UniqueViolation):
                async with conn.transaction():
                    await conn.execute("CREATE TABLE t (id int PRIMARY KEY)")
                    await conn.execute("INSERT INTO t VALUES (1), (1)")
            assert conn.info.transaction_status == TransactionStatus.IDLE
        cursor = await conn.execute("SELECT to_regclass('t')")
        assert await cursor.fetchone() == (None,)


@behaviour
async def test_copy_and_server_side_cursors(dsn: str) -> None:
    async with several(dsn, MAX_SIZE) as conns:
        await conns[0].execute("CREATE TABLE t (owner int, n int)")

        async def client(number: int, conn: psycopg.AsyncConnection) -> None:
            async with conn.cursor() as cursor:
                async with cursor.copy("COPY t FROM STDIN") as copy:
                    for n in range(2000):
                        await copy.write_row((number, n))
            async with conn.transaction(), conn.cursor("mine") as named:
                await named.execute("SELECT n FROM t WHERE owner = %s ORDER BY n", (number,))
                assert [row[0] async for row in named] == list(range(2000))
            async with conn.cursor() as cursor:
                async with cursor.copy("COPY (SELECT n FROM t WHERE owner = %s) TO STDOUT", (number,)) as copy:
                    assert len([row async for row in copy.rows()]) == 2000

        await asyncio.gather(*(client(number, conn) for number, conn in enumerate(conns)))


@behaviour
async def test_a_cancelled_task_cancels_its_query(dsn: str, front: Front) -> None:
    running = "SELECT count(*) FROM pg_stat_activity WHERE state = 'active' AND query ~ 'cancel.m[e]'"
    async with several(dsn, 2) as (conn, _other):
        for _ in range(3):
            task = asyncio.create_task(conn.execute("SELECT pg_sleep(60), 'cancel me'"))
            await until(lambda: front.ask(running) == 1)
            task.cancel()
            with pytest.raises((asyncio.CancelledError, errors.QueryCanceled)):
                await task
            await until(lambda: front.ask(running) == 0)
            cursor = await conn.execute("SELECT 'alive'")
            assert await cursor.fetchone() == ("alive",)


@behaviour
async def test_a_notification_reaches_its_listener(dsn: str) -> None:
    async with several(dsn, 2) as (listener, speaker):
        await listener.execute("LISTEN news")
        await speaker.execute("NOTIFY news, 'hello'")
        heard = [note.payload async for note in listener.notifies(timeout=15, stop_after=1)]
        assert heard == ["hello"]
