"""asyncpg through the proxy, with its defaults: binary, everything prepared and cached, pools that reset."""

from __future__ import annotations

import asyncio
import datetime as dt
import decimal
import io
import ipaddress
import uuid
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import asyncpg
import pytest
from front import CLIENTS, MAX_SIZE, Front

from pool_kit import behaviour, until


@asynccontextmanager
async def connected(dsn: str) -> AsyncIterator[Any]:
    conn = await asyncpg.connect(dsn)
    try:
        yield conn
    finally:
        await conn.close(timeout=10)


@asynccontextmanager
async def several(dsn: str, count: int = CLIENTS) -> AsyncIterator[list[Any]]:
    """More connections than the server has."""
    async with AsyncExitStack() as stack:
        yield [await stack.enter_async_context(connected(dsn)) for _ in range(count)]


VALUES: list[tuple[str, Any]] = [
    ("bool", True),
    ("int2", -(2**15)),
    ("int8", 2**62),
    ("float8", 1.5e300),
    ("numeric", decimal.Decimal("1234567890.0987654321")),
    ("text", "naïve ☃ 漢字 'quoted' \\ back"),
    ("bytea", bytes(range(256))),
    ("date", dt.date(2024, 2, 29)),
    ("timestamptz", dt.datetime(2024, 2, 29, 12, 30, 15, 123456, tzinfo=dt.UTC)),
    ("interval", dt.timedelta(days=3, seconds=7)),
    ("uuid", uuid.UUID(int=7)),
    ("jsonb", '{"a": [1, null, "x"]}'),
    ("inet", ipaddress.ip_address("10.1.2.3")),
    ("int[]", [[1, None], [2, 3]]),
    ("int4range", asyncpg.Range(1, 10)),
    ("text", None),
]


@behaviour
async def test_every_type_comes_back_as_it_was_sent(dsn: str) -> None:
    async with connected(dsn) as conn:
        for kind, value in VALUES:
            assert await conn.fetchval(f"SELECT $1::{kind}", value) == value


@behaviour
async def test_the_connection_knows_its_server(dsn: str, front: Front) -> None:
    async with connected(dsn) as conn:
        assert conn.get_server_version().major == front.server.version
        assert conn.get_settings().server_encoding == "UTF8"
        assert conn.get_settings().client_encoding == "UTF8"
        assert conn.get_server_pid() > 0


@behaviour
async def test_errors_of_the_server_come_through_and_the_connection_goes_on(dsn: str) -> None:
    async with connected(dsn) as conn:
        for statement, error in [
            ("SELECT 1/0", asyncpg.DivisionByZeroError),
            ("SELEC 1", asyncpg.PostgresSyntaxError),
            ("SELECT * FROM no_such_table", asyncpg.UndefinedTableError),
        ]:
            for call in (conn.fetch, conn.execute):
                with pytest.raises(error):
                    await call(statement)
                assert await conn.fetchval("SELECT $1::int", 5) == 5
        with pytest.raises(asyncpg.PostgresError) as caught:
            await conn.execute("DO $$ BEGIN RAISE 'mine' USING ERRCODE = 'AB123', HINT = 'do this'; END $$")
        assert (caught.value.sqlstate, caught.value.hint) == ("AB123", "do this")  # type: ignore[attr-defined]
        with pytest.raises(asyncpg.DataError):
            await conn.fetchval("SELECT $1::int", "no number")  # the driver's own, half-way through the batch
        assert await conn.fetchval("SELECT 6") == 6


@behaviour
async def test_transactions_and_savepoints_keep_what_they_committed(dsn: str) -> None:
    async with connected(dsn) as one, connected(dsn) as other:
        await one.execute("CREATE TABLE t (id int PRIMARY KEY)")
        async with one.transaction():
            await one.execute("INSERT INTO t VALUES (1)")
            assert await other.fetchval("SELECT count(*) FROM t") == 0
            with pytest.raises(asyncpg.UniqueViolationError):
                async with one.transaction():
                    await one.execute("INSERT INTO t VALUES (1)")
            await one.execute("INSERT INTO t VALUES (2)")
        with pytest.raises(ZeroDivisionError):
            async with one.transaction():
                await one.execute("INSERT INTO t VALUES (3)")
                raise ZeroDivisionError
        assert await other.fetchval("SELECT array_agg(id ORDER BY id) FROM t") == [1, 2]
        async with one.transaction(isolation="serializable", readonly=True):
            assert await one.fetchval("SHOW transaction_isolation") == "serializable"
        assert await one.fetchval("SHOW transaction_isolation") == "read committed"


@behaviour
async def test_cached_statements_follow_the_connection_to_any_server(dsn: str) -> None:
    """Every connection names its statements `__asyncpg_stmt_1__` and so on, for texts of its own."""
    async with several(dsn) as conns:

        async def client(number: int, conn: Any) -> None:
            for turn in range(40):
                text = f"SELECT $1::int + {number}, 'statement of {number}', $2::text"
                row = await conn.fetchrow(text, turn, f"{number}/{turn}")
                assert tuple(row) == (turn + number, f"statement of {number}", f"{number}/{turn}")
                assert await conn.fetchval("SELECT $1::text || '!'", f"{turn}") == f"{turn}!"

        await asyncio.gather(*(client(number, conn) for number, conn in enumerate(conns)))


@behaviour
async def test_a_small_statement_cache_throws_away_only_its_own(dsn: str) -> None:
    conns = [await asyncpg.connect(dsn, statement_cache_size=3) for _ in range(6)]
    try:
        for _ in range(4):
            for number, conn in enumerate(conns):
                for step in range(8):
                    assert await conn.fetchval(f"SELECT {step} + $1::int", number) == step + number
    finally:
        for conn in conns:
            await conn.close()


@behaviour
async def test_prepared_statements_live_over_transactions(dsn: str) -> None:
    async with several(dsn, MAX_SIZE * 2) as conns:
        prepared = [await conn.prepare(f"SELECT $1::text, {n}::int8") for n, conn in enumerate(conns)]
        for turn in range(5):
            for number, (conn, statement) in enumerate(zip(conns, prepared, strict=True)):
                assert [kind.name for kind in statement.get_parameters()] == ["text"]
                assert [column.type.name for column in statement.get_attributes()] == ["text", "int8"]
                async with conn.transaction():
                    assert tuple(await statement.fetchrow(f"t{turn}")) == (f"t{turn}", number)
                assert await statement.fetchval("alone") == "alone"


@behaviour
async def test_a_changed_result_type_is_recovered_from(dsn: str) -> None:
    """asyncpg prepares again by itself; other connections hold a plan of the same text."""
    async with several(dsn, MAX_SIZE) as conns, AsyncExitStack() as transactions:
        await conns[0].execute("CREATE TABLE t AS SELECT 1 AS a")
        # At once, so that every connection of the server knows the text: one that meets it later prepares it anew.
        for conn in conns:
            await transactions.enter_async_context(conn.transaction())
            assert tuple(await conn.fetchrow("SELECT * FROM t")) == (1,)
        await transactions.aclose()
        await conns[0].execute("ALTER TABLE t ADD COLUMN b text DEFAULT 'new'")
        for conn in conns:
            assert tuple(await conn.fetchrow("SELECT * FROM t")) == (1, "new")


@behaviour
async def test_cursors_in_their_transactions(dsn: str) -> None:
    async with several(dsn, MAX_SIZE) as conns:

        async def client(number: int, conn: Any) -> None:
            async with conn.transaction():
                seen = 0
                async for row in conn.cursor(f"SELECT n * {number + 1} FROM generate_series(1, 500) AS n"):
                    seen += row[0]
                assert seen == 125_250 * (number + 1)
                cursor = await conn.cursor("SELECT n FROM generate_series(1, 100) AS n")
                assert [row[0] for row in await cursor.fetch(3)] == [1, 2, 3]
                await cursor.forward(10)
                assert (await cursor.fetchrow())[0] == 14

        await asyncio.gather(*(client(number, conn) for number, conn in enumerate(conns)))


@behaviour
async def test_executemany_is_all_or_nothing(dsn: str) -> None:
    async with connected(dsn) as conn:
        await conn.execute("CREATE TABLE t (id int PRIMARY KEY, note text)")
        await conn.executemany("INSERT INTO t VALUES ($1, $2)", [(n, f"n{n}") for n in range(3000)])
        with pytest.raises(asyncpg.UniqueViolationError):
            await conn.executemany("INSERT INTO t VALUES ($1, $2)", [(n, "x") for n in (-1, -2, 5, -3)])
        rows = await conn.fetchmany("INSERT INTO t VALUES ($1, $2) RETURNING id", [(-4, "a"), (-5, "b")])
        assert [row[0] for row in rows] == [-4, -5]
        assert tuple(await conn.fetchrow("SELECT count(*), min(id) FROM t")) == (3002, -5)


@behaviour
async def test_copy_in_and_out(dsn: str) -> None:
    async with connected(dsn) as conn:
        await conn.execute("CREATE TABLE t (id int, note text)")
        records = [(n, None if n % 7 == 0 else f"note\t{n}\n") for n in range(20_000)]
        assert await conn.copy_records_to_table("t", records=records) == "COPY 20000"
        out = io.BytesIO()
        assert await conn.copy_from_query("SELECT id FROM t WHERE id < $1 ORDER BY id", 3, output=out) == "COPY 3"
        assert out.getvalue() == b"0\n1\n2\n"
        out = io.BytesIO()
        await conn.copy_from_table("t", output=out, format="csv")
        await conn.copy_to_table("t", source=io.BytesIO(out.getvalue()), format="csv")
        assert await conn.fetchval("SELECT count(*) FROM t") == 40_000
        with pytest.raises(asyncpg.BadCopyFileFormatError):
            await conn.copy_to_table("t", source=io.BytesIO(b"1,2,3,4\n" * 10_000), format="csv")

        async def broken() -> AsyncIterator[bytes]:
            yield b"1,half\n"
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            await conn.copy_to_table("t", source=broken(), format="csv")

        async def full(_: bytes) -> None:
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            await conn.copy_from_table("t", output=full)
        assert await conn.fetchval("SELECT count(*) FROM t") == 40_000


@behaviour
async def test_large_values_pass_both_ways(dsn: str) -> None:
    async with connected(dsn) as conn:
        data = bytes(range(256)) * 65_536  # 16 MB
        assert await conn.fetchval("SELECT $1::bytea", data) == data
        rows = await conn.fetch("SELECT repeat('y', 1000) FROM generate_series(1, $1)", 20_000)
        assert sum(len(row[0]) for row in rows) == 20_000_000


@behaviour
async def test_a_timeout_cancels_its_own_query_and_no_other(dsn: str) -> None:
    async with connected(dsn) as victim, connected(dsn) as bystander:
        for _ in range(3):
            other = asyncio.create_task(bystander.fetchval("SELECT pg_sleep(0.3)::text || 'bystander'"))
            with pytest.raises(TimeoutError):
                await victim.fetch("SELECT pg_sleep(60)", timeout=0.1)
            assert await victim.fetchval("SELECT 'alive'") == "alive"
            assert await other == "bystander"


@behaviour
async def test_a_cancelled_task_cancels_its_query(dsn: str, front: Front) -> None:
    async with connected(dsn) as conn:
        running = "SELECT count(*) FROM pg_stat_activity WHERE state = 'active' AND query ~ 'cancel.m[e]'"
        for _ in range(3):
            task = asyncio.create_task(conn.fetch("SELECT pg_sleep(60), 'cancel me'"))
            await until(lambda: front.ask(running) == 1)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert await conn.fetchval("SELECT 1") == 1
            await until(lambda: front.ask(running) == 0)


@behaviour
async def test_its_pool_serves_more_tasks_and_connections_than_the_server_has(dsn: str) -> None:
    """asyncpg resets what it gives back: `SELECT pg_advisory_unlock_all(); CLOSE ALL; UNLISTEN *; RESET ALL;`."""
    async with asyncpg.create_pool(dsn, min_size=CLIENTS, max_size=CLIENTS) as pool:

        async def client(number: int) -> None:
            for turn in range(10):
                async with pool.acquire() as conn:
                    assert await conn.fetchval("SELECT $1::int", number) == number
                    async with conn.transaction():
                        assert await conn.fetchval(f"SELECT $1::int + {turn}", number) == number + turn

        async with asyncio.timeout(30):
            await asyncio.gather(*(client(number) for number in range(CLIENTS * 2)))


@behaviour
async def test_listeners_hear_what_others_notify(dsn: str) -> None:
    heard: list[Any] = []
    async with connected(dsn) as listener, connected(dsn) as speaker:
        await listener.add_listener("news", lambda _conn, _pid, channel, payload: heard.append((channel, payload)))
        async with speaker.transaction():
            for number in range(5):
                await speaker.execute("SELECT pg_notify('news', $1)", str(number))
            assert heard == []
        await until(lambda: heard == [("news", str(number)) for number in range(5)])
        await listener.execute("NOTIFY news, 'own'")
        await until(lambda: heard[-1] == ("news", "own"))
        await listener.reset()


@behaviour
async def test_types_of_the_database_are_looked_up(dsn: str) -> None:
    """For that asyncpg switches `jit` off and on again in its session."""
    async with several(dsn, 2) as conns:
        await conns[0].execute("CREATE TYPE mood AS ENUM ('sad', 'happy')")
        for conn in conns:
            assert await conn.fetchval("SELECT ARRAY['sad', 'happy']::mood[]") == ["sad", "happy"]
        await conns[1].set_type_codec("jsonb", schema="pg_catalog", encoder=str, decoder=len)
        assert await conns[1].fetchval("SELECT '[1, 2]'::jsonb") == 6


@behaviour
async def test_notices_reach_the_connection_that_caused_them(dsn: str) -> None:
    heard: list[str] = []
    async with connected(dsn) as conn, connected(dsn) as other:
        other.add_log_listener(lambda _conn, message: heard.append(f"other: {message}"))
        conn.add_log_listener(lambda _conn, message: heard.append(message.message))
        await conn.execute("DO $$ BEGIN RAISE NOTICE 'one'; RAISE WARNING 'two'; END $$")
        await until(lambda: len(heard) == 2)
        assert heard == ["one", "two"]


@behaviour
async def test_connections_that_are_dropped_without_a_word_leave_nothing(dsn: str) -> None:
    conns = [await asyncpg.connect(dsn) for _ in range(6)]
    for conn in conns[:3]:
        await conn.execute("BEGIN")
    await conns[0].execute("CREATE TABLE never_committed (id int)")
    for conn in conns:
        conn.terminate()
    async with connected(dsn) as conn:
        assert await conn.fetchval("SELECT to_regclass('never_committed')") is None
