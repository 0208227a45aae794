"""The asyncpg adapter against real servers: what it promises to a pool."""

import asyncio
import gc
import inspect
import io
import json
import os
import socket
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import asyncpg
import pytest
from asyncpg.cursor import Cursor, CursorIterator
from asyncpg.prepared_stmt import PreparedStatement
from asyncpg.transaction import Transaction
from wire_recorder import WireRecorder

from cenote import embedded
from cenote.config import PoolOptions
from cenote.errors import ConfigError, MisuseError
from cenote.pool.drivers.asyncpg import AsyncpgDriver
from cenote.pool.drivers.base import BROKEN, BUSY, IDLE, IN_TRANSACTION, CannotReset
from cenote.reasons import Failure
from cenote.sql import touch
from cenote.sql.classify import classify
from cenote.testing.postgres import backends, fresh_database, terminate

Steps = Callable[[Any, Any], Awaitable[None]]


def run(dsn: str, steps: Steps, **options: Any) -> None:
    """Run `steps(driver, conn)` on a loop, with a settled connection that is closed afterwards."""

    async def main() -> None:
        async with opened(dsn, **options) as (driver, conn):
            await steps(driver, conn)

    asyncio.run(main())


@asynccontextmanager
async def opened(dsn: Any, args: Any = None, **options: Any) -> AsyncIterator[tuple[Any, Any]]:
    driver = AsyncpgDriver(dsn, args or {}, PoolOptions(**options))
    conn = await driver.connect(5)
    driver.settle(conn)
    try:
        yield driver, conn
    finally:
        await driver.close(conn, None, 5)


async def until(condition: Callable[[], object]) -> None:
    """Let the event loop run until `condition()` holds; it has ten seconds."""
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 - what is waited for is not an event of asyncio's
            await asyncio.sleep(0)


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture(scope="module")
def database(pg18: embedded.Postgres) -> Iterator[str]:
    """One database for this file: a test leaves nothing in it that another could stumble over."""
    with fresh_database(pg18) as name:
        yield pg18.dsn_for(database=name)


@pytest.fixture(scope="module")
def each_database(pg: embedded.Postgres) -> Iterator[str]:
    """The same on each version in turn."""
    with fresh_database(pg) as name:
        yield pg.dsn_for(database=name)


@pytest.fixture
def wire(each_database: str) -> Iterator[WireRecorder]:
    with WireRecorder(each_database) as recorder:
        yield recorder


# -- every statement is seen --------------------------------------------------------------------------------------


async def _cursor(conn: Any) -> None:
    async with conn.transaction():
        cursor = await conn.cursor("SELECT generate_series(1, $1::int)", 9)
        assert len(await cursor.fetch(2)) == 2
        assert (await cursor.fetchrow())[0] == 3
        assert await cursor.forward(2) == 2


async def _cursor_iterator(conn: Any) -> None:
    async with conn.transaction():
        rows = [row[0] async for row in conn.cursor("SELECT generate_series(1, 9)", prefetch=4)]
    assert rows == list(range(1, 10))


async def _transaction(conn: Any) -> None:
    async with conn.transaction(isolation="serializable", readonly=True, deferrable=True), conn.transaction():
        await conn.execute("SET LOCAL work_mem = '5MB'")


async def _transaction_by_hand(conn: Any) -> None:
    transaction = conn.transaction()
    await transaction.start()
    await transaction.rollback()
    transaction = conn.transaction()
    await transaction.start()
    await transaction.commit()


async def _prepare(conn: Any) -> None:
    statement = await conn.prepare("SELECT $1::int + length(set_config('work_mem', '5MB', false))")
    await statement.fetch(1)
    await statement.fetchval(1)
    await statement.fetchrow(1)
    await statement.executemany([(1,), (2,)])
    await statement.fetchmany([(1,), (2,)])
    await statement.explain(1)
    await statement.explain(1, analyze=True)
    async with conn.transaction():
        assert [row async for row in statement.cursor(1)]
        assert await (await statement.cursor(1)).fetchrow()


async def _copy(conn: Any) -> None:
    await conn.execute("CREATE TEMP TABLE pairs (a int, b text)")
    await conn.copy_records_to_table("pairs", records=[(1, "x"), (2, "y")])
    await conn.copy_to_table("pairs", source=io.BytesIO(b"3\tz\n"))
    assert await conn.copy_from_table("pairs", output=io.BytesIO()) == "COPY 3"
    assert await conn.copy_from_query("SELECT a FROM pairs WHERE a > $1", 1, output=io.BytesIO()) == "COPY 2"


async def _codecs(conn: Any) -> None:
    await conn.set_type_codec("json", schema="pg_catalog", encoder=json.dumps, decoder=json.loads)
    assert await conn.fetchval("SELECT '[1]'::json") == [1]
    await conn.reset_type_codec("json", schema="pg_catalog")
    await conn.execute("CREATE TYPE mood AS ENUM ('well', 'unwell')")
    await conn.set_builtin_type_codec("mood", codec_name="text")
    await conn.set_type_codec("mood", encoder=str, decoder=str.upper)
    assert await conn.fetchval("SELECT 'well'::mood") == "WELL"
    await conn.reload_schema_state()
    await conn.execute("CREATE TYPE pair AS (a int, b text)")
    assert (await conn.fetchval("SELECT ROW(1, 'well')::pair"))["a"] == 1


async def _listeners(conn: Any) -> None:
    def heard(*_: Any) -> None: ...

    await conn.add_listener("news", heard)
    await conn.remove_listener("news", heard)
    await conn.add_listener("news", heard)


async def _callbacks(conn: Any) -> None:
    def told(*_: Any) -> None: ...

    conn.add_log_listener(told)
    conn.remove_log_listener(told)
    conn.add_query_logger(told)
    conn.remove_query_logger(told)
    conn.add_termination_listener(told)
    conn.remove_termination_listener(told)
    with conn.query_logger(told):
        await conn.fetch("SELECT set_config('work_mem', '5MB', false)")


async def _plain(conn: Any) -> None:
    await conn.execute("SET work_mem = '5MB'; LISTEN news")
    await conn.execute("SELECT set_config('work_mem', $1, false)", "6MB")
    await conn.executemany("SELECT pg_advisory_lock($1)", [(1,), (2,)])
    await conn.fetch("SELECT 1")
    await conn.fetchval("SELECT 1")
    await conn.fetchrow("SELECT 1", timeout=5)
    await conn.fetchmany("SELECT $1::int", [(1,), (2,)])
    with suppress(asyncpg.PostgresError):
        await conn.fetch("SELECT 1/0")


async def _reset(conn: Any) -> None:
    await conn.reset()


CASES = {
    _plain: "execute executemany fetch fetchval fetchrow fetchmany",
    _cursor: "cursor",
    _cursor_iterator: "cursor",
    _transaction: "transaction",
    _transaction_by_hand: "transaction",
    _prepare: "prepare",
    _copy: "copy_from_query copy_from_table copy_records_to_table copy_to_table",
    _codecs: "set_type_codec reset_type_codec set_builtin_type_codec reload_schema_state",
    _listeners: "add_listener remove_listener",
    _callbacks: "add_log_listener remove_log_listener add_query_logger remove_query_logger query_logger"
    " add_termination_listener remove_termination_listener",
    _reset: "reset",
}
SILENT = (
    "close terminate is_closed is_in_transaction get_reset_query get_server_pid get_server_version get_settings"
)
STATEMENT_METHODS = (
    "get_name get_query get_statusmsg get_parameters get_attributes cursor explain fetch fetchval fetchrow"
    " fetchmany executemany"
)


def sent_statements(wire: WireRecorder) -> int:
    """Simple queries and bound statements; the many Binds of one executemany() count once."""
    kinds = [request.kind for request in wire.requests]
    return sum(
        kind == "Q" or (kind == "B" and before != "E") for before, kind in zip(["", *kinds], kinds, strict=False)
    )


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__.strip("_"))
def test_what_is_sent_by_any_public_method_was_seen_before(wire: WireRecorder, case: Any) -> None:
    async def steps(driver: AsyncpgDriver, conn: Any) -> None:
        session = driver.session(conn)
        wire.clear()
        await case(conn)
        assert session.statements == sent_statements(wire) > 0
        sent = 0
        for text in wire.texts():
            if "'jit'" not in text:  # asyncpg puts that one back itself
                sent |= classify(text).touches
        assert sent & ~session.touched == 0, touch.words(sent & ~session.touched)
        assert session.query_since_s == 0
        assert session.in_query_s > 0

    run(wire.dsn, steps)


def test_no_public_method_of_asyncpg_is_left_out() -> None:
    known = set(" ".join([*CASES.values(), SILENT]).split())
    public = {name for name in dir(asyncpg.Connection) if not name.startswith("_")}
    assert public == known
    methods = {
        kind: {name for name, _ in inspect.getmembers(kind, inspect.isfunction) if not name.startswith("_")}
        for kind in (PreparedStatement, Cursor, CursorIterator, Transaction)
    }
    assert methods == {
        PreparedStatement: set(STATEMENT_METHODS.split()),
        Cursor: {"fetch", "fetchrow", "forward"},
        CursorIterator: set(),
        Transaction: {"start", "commit", "rollback"},
    }


def test_the_session_tells_the_last_statement_and_the_servers_last_error(database: str) -> None:
    async def steps(driver: AsyncpgDriver, conn: Any) -> None:
        session = driver.session(conn)
        with pytest.raises(asyncpg.DivisionByZeroError):
            await conn.fetchval("SELECT 1/$1::int", 0)
        assert session.last_sql == "SELECT 1/$1::int"
        assert session.sqlstate == "22012"
        with pytest.raises(asyncpg.DataError):
            await conn.fetch("SELECT $1::int", "not a number")
        assert session.query_since_s == 0
        query = asyncio.create_task(conn.fetch("SELECT pg_sleep(30)"))
        await until(lambda: session.query_since_s)
        assert session.last_sql == "SELECT pg_sleep(30)"
        while not query.done():  # a cancel may arrive before the query, and is nothing then
            await driver.cancel(conn)
            await asyncio.wait({query}, timeout=0.1)
        with pytest.raises(asyncpg.QueryCanceledError):
            await query
        assert session.query_since_s == 0

    run(database, steps)


# -- the session returns to its base ------------------------------------------------------------------------------


def test_a_reset_undoes_what_was_touched_and_runs_init_query_again(each_database: str) -> None:
    async def steps(driver: AsyncpgDriver, conn: Any) -> None:
        session = driver.session(conn)
        await conn.execute("SET timezone = 'Asia/Tokyo'; SET application_name = 'other'; SET ROLE app")
        await conn.execute("CREATE TEMP TABLE mine (a int); LISTEN news; SELECT pg_advisory_lock(7)")
        await conn.execute("PREPARE one AS SELECT 1; DECLARE held CURSOR WITH HOLD FOR SELECT 1")
        await driver.reset(conn, session.touched, 5)
        assert session.touched == 0
        assert await conn.fetchval("SELECT current_setting('timezone')") != "Asia/Tokyo"
        assert await conn.fetchval("SELECT current_setting('application_name')") == "base"
        assert await conn.fetchval("SHOW role") == "none"
        assert await conn.fetchval("SELECT to_regclass('mine')") is None
        left = "pg_listening_channels() UNION ALL SELECT name FROM pg_cursors WHERE is_holdable"
        left += " UNION ALL SELECT name FROM pg_prepared_statements WHERE from_sql"
        left += " UNION ALL SELECT 'lock' FROM pg_locks WHERE locktype = 'advisory'"
        assert await conn.fetch(f"SELECT {left}") == []

    run(each_database, steps, init_query="SET application_name = 'base'")


def test_a_reset_takes_one_round_trip_even_out_of_a_failed_transaction(wire: WireRecorder) -> None:
    async def steps(driver: AsyncpgDriver, conn: Any) -> None:
        with pytest.raises(asyncpg.UndefinedTableError):
            async with conn.transaction():
                await conn.execute("SET timezone = 'Asia/Tokyo'")
                await conn.transaction().start()
                await conn.execute("SELECT * FROM nowhere")
        await conn.execute("BEGIN")
        with pytest.raises(asyncpg.UndefinedTableError):
            await conn.execute("SELECT * FROM nowhere")
        assert driver.condition(conn) == IN_TRANSACTION
        wire.clear()
        await driver.reset(conn, driver.session(conn).touched, 5)
        assert wire.round_trips() == 1
        assert driver.condition(conn) == IDLE
        async with conn.transaction():
            assert await conn.fetchval("SELECT 1") == 1

    run(wire.dsn, steps)


def test_asyncpgs_own_statement_cache_survives_a_reset(wire: WireRecorder) -> None:
    async def steps(driver: AsyncpgDriver, conn: Any) -> None:
        assert await conn.fetchval("SELECT $1::int", 1) == 1
        await conn.execute("SET work_mem = '5MB'; PREPARE mine AS SELECT 1")
        await driver.reset(conn, driver.session(conn).touched, 5)
        wire.clear()
        assert await conn.fetchval("SELECT $1::int", 2) == 2
        assert wire.texts() == []

    run(wire.dsn, steps)


def test_reset_always_resets_what_nobody_saw_and_never_only_rolls_back(database: str) -> None:
    async def hide(conn: Any) -> None:
        await conn.execute(
            "CREATE OR REPLACE FUNCTION hide() RETURNS text LANGUAGE sql"
            " AS $$ SELECT set_config('work_mem', '7MB', false) $$"
        )
        await conn.execute("SELECT hide()")

    async def always(driver: AsyncpgDriver, conn: Any) -> None:
        await hide(conn)
        await driver.reset(conn, 0, 5)
        assert await conn.fetchval("SHOW work_mem") == "4MB"

    async def never(driver: AsyncpgDriver, conn: Any) -> None:
        await hide(conn)
        await conn.execute("SET timezone = 'Asia/Tokyo'")
        await conn.execute("BEGIN")
        await driver.reset(conn, driver.session(conn).touched, 5)
        assert driver.condition(conn) == IDLE
        assert await conn.fetchval("SHOW timezone") == "Asia/Tokyo"

    run(database, always, reset="always")
    run(database, never, reset="never")


def test_what_no_statement_undoes_costs_the_connection(database: str) -> None:
    async def steps(driver: AsyncpgDriver, conn: Any) -> None:
        await conn.execute("SELECT setseed(0.5)")
        with pytest.raises(CannotReset):
            await driver.reset(conn, driver.session(conn).touched, 5)

    run(database, steps)


def test_callbacks_of_a_borrower_end_with_the_lease_and_those_of_configure_stay(database: str) -> None:
    async def main() -> None:
        driver = AsyncpgDriver(database, {}, PoolOptions())
        conn = await driver.connect(5)
        heard: list[str] = []

        def of_configure(*_: Any) -> None:
            heard.append("configure")

        def of_borrower(*_: Any) -> None:
            heard.append("borrower")

        conn.add_log_listener(of_configure)
        driver.settle(conn)
        conn.add_log_listener(of_borrower)
        conn.remove_log_listener(of_configure)
        await conn.add_listener("news", of_borrower)
        conn.add_query_logger(of_borrower)
        conn.add_termination_listener(of_borrower)
        assert driver.session(conn).attributes
        driver.tidy(conn)
        assert not driver.session(conn).attributes
        await conn.execute("DO $$ BEGIN RAISE WARNING 'now' USING ERRCODE = '01000'; END $$")
        await conn.execute("NOTIFY news")
        await driver.close(conn, None, 5)
        await asyncio.sleep(0)
        assert heard == ["configure"]

    asyncio.run(main())


def test_a_codec_of_a_borrower_ends_with_the_lease_without_a_round_trip(wire: WireRecorder) -> None:
    async def main() -> None:
        driver = AsyncpgDriver(wire.dsn, {}, PoolOptions())
        conn = await driver.connect(5)
        await conn.set_type_codec("jsonb", schema="pg_catalog", encoder=json.dumps, decoder=json.loads)
        driver.settle(conn)

        def shout(text: str) -> str:
            return f"{text}!"

        for name in ("json", "jsonb", "date"):
            await conn.set_type_codec(name, schema="pg_catalog", encoder=shout, decoder=shout)
        assert await conn.fetchval("SELECT '[1]'::jsonb") == "[1]!"
        wire.clear()
        driver.tidy(conn)
        assert wire.requests == []
        assert await conn.fetchval("SELECT '[1]'::jsonb") == [1]
        assert await conn.fetchval("SELECT '[1]'::json") == "[1]"
        assert (await conn.fetchval("SELECT date '2020-02-29'")).day == 29
        await driver.close(conn, None, 5)

    asyncio.run(main())


def test_a_base_codec_that_cannot_be_set_again_costs_the_connection(database: str) -> None:
    async def main() -> None:
        driver = AsyncpgDriver(database, {}, PoolOptions())
        conn = await driver.connect(5)
        await conn.execute("CREATE TYPE pair AS (a int, b int)")
        await conn.set_type_codec("pair", encoder=list, decoder=list, format="tuple")
        driver.settle(conn)
        await conn.reset_type_codec("pair")
        driver.tidy(conn)
        with pytest.raises(CannotReset):
            await driver.reset(conn, driver.session(conn).touched, 5)
        await driver.close(conn, None, 5)

    asyncio.run(main())


def test_configure_may_run_again_after_a_reset(database: str) -> None:
    heard: list[str] = []

    async def configure(conn: Any) -> None:
        await conn.add_listener("news", lambda *_: heard.append("news"))
        await conn.prepare("SELECT 1", name="first")
        await conn.execute("SET work_mem = '9MB'")

    async def main() -> None:
        driver = AsyncpgDriver(database, {}, PoolOptions())
        conn = await driver.connect(5)
        await configure(conn)
        driver.settle(conn)
        for _ in range(3):
            await conn.execute("SET timezone = 'Asia/Tokyo'")
            await driver.reset(conn, driver.session(conn).touched, 5)
            await configure(conn)
            driver.settle(conn)
        await conn.execute("NOTIFY news")
        await asyncio.sleep(0)
        assert heard == ["news"]
        assert await conn.fetchval("SHOW work_mem") == "9MB"
        await driver.close(conn, None, 5)

    asyncio.run(main())


# -- what a borrower still holds ----------------------------------------------------------------------------------


def test_objects_held_after_release_do_not_act_on_the_next_lease(database: str) -> None:
    async def steps(driver: AsyncpgDriver, conn: Any) -> None:
        statement = await conn.prepare("SELECT 1")
        transaction = conn.transaction()
        await transaction.start()
        cursor = await conn.cursor("SELECT 1")
        await driver.reset(conn, 0, 5)
        for act in (statement.fetch, transaction.commit, lambda: cursor.fetch(1)):
            with pytest.raises(asyncpg.InterfaceError):
                await act()
        assert driver.condition(conn) == IDLE

    run(database, steps)


def test_a_name_for_a_prepared_statement_is_free_again_after_release(database: str) -> None:
    async def steps(driver: AsyncpgDriver, conn: Any) -> None:
        held = await conn.prepare("SELECT 1", name="mine")
        await driver.reset(conn, driver.session(conn).touched, 5)
        next_one = await conn.prepare("SELECT 2", name="mine")
        with pytest.raises(asyncpg.InterfaceError):
            await held.fetchval()
        del held  # asyncpg closes a statement when its object goes: it must not close the new one
        gc.collect()
        await conn.fetch("SELECT 'asyncpg cleans up now'")
        assert await next_one.fetchval() == 2

    run(database, steps)


# -- cancelling ---------------------------------------------------------------------------------------------------


def test_a_late_cancel_never_hits_the_next_lease(database: str) -> None:
    async def steps(driver: AsyncpgDriver, conn: Any) -> None:
        for turn in range(30):
            query = asyncio.create_task(conn.fetch("SELECT pg_sleep(0.002)"))
            for _ in range(turn % 10):
                await asyncio.sleep(0.0003)
            query.cancel()
            with suppress(asyncio.CancelledError):
                await query
            if driver.condition(conn) != IDLE:
                await driver.reset(conn, 0, 5)
            assert driver.condition(conn) == IDLE
            assert await conn.fetchval("SELECT pg_sleep(0.003), $1::int", turn, column=1) == turn

    run(database, steps)


def test_a_cancelled_query_is_busy_until_its_cancel_is_settled(database: str) -> None:
    async def steps(driver: AsyncpgDriver, conn: Any) -> None:
        for timeout in (None, 0.01):
            query = asyncio.create_task(conn.fetch("SELECT pg_sleep(2)", timeout=timeout))
            await until(lambda: driver.condition(conn) == BUSY)
            if timeout is None:
                query.cancel()
            with pytest.raises((asyncio.CancelledError, TimeoutError)):
                await query
            assert driver.condition(conn) == BUSY
            await driver.reset(conn, 0, 5)
            assert driver.condition(conn) == IDLE
            assert await conn.fetchval("SELECT 1") == 1

    run(database, steps)


def test_a_reset_waits_for_a_cancel_request_that_another_task_sent(database: str) -> None:
    async def steps(driver: AsyncpgDriver, conn: Any) -> None:
        query = asyncio.create_task(conn.fetch("SELECT pg_sleep(30)"))
        await until(lambda: driver.condition(conn) == BUSY)
        while not query.done():  # a cancel may arrive before the query, and is nothing then
            canceller = asyncio.create_task(driver.cancel(conn))
            await asyncio.sleep(0)
            canceller.cancel()  # the request goes on without it
            assert driver.condition(conn) == BUSY
            await asyncio.wait({query}, timeout=0.1)
        with pytest.raises(asyncpg.QueryCanceledError):
            await query
        await driver.reset(conn, 0, 5)
        assert await conn.fetchval("SELECT pg_sleep(0.01), 5", column=1) == 5

    run(database, steps)


def test_a_query_of_another_task_that_still_runs_is_not_given_to_the_next_borrower(database: str) -> None:
    async def steps(driver: AsyncpgDriver, conn: Any) -> None:
        query = asyncio.create_task(conn.fetch("SELECT pg_sleep(30)"))
        await until(lambda: driver.condition(conn) == BUSY)
        with pytest.raises(CannotReset):
            await driver.reset(conn, 0, 5)
        await driver.close(conn, None, 5)
        with pytest.raises(asyncpg.QueryCanceledError):
            await query

    run(database, steps)


def test_a_coroutine_thrown_away_in_mid_query_leaves_the_connection_busy(database: str) -> None:
    async def steps(driver: AsyncpgDriver, conn: Any) -> None:
        coroutine = conn.execute("SELECT pg_sleep(30)")
        coroutine.send(None)
        coroutine.close()
        assert driver.condition(conn) == BUSY
        with pytest.raises(CannotReset):
            await driver.reset(conn, 0, 5)

    run(database, steps)


def test_a_reset_that_gets_no_answer_ends_in_time(database: str) -> None:
    async def main() -> None:
        with WireRecorder(database) as wire:
            async with opened(wire.dsn) as (driver, conn):
                await conn.execute("SET work_mem = '5MB'")
                wire.hold()
                with pytest.raises(CannotReset):
                    await driver.reset(conn, driver.session(conn).touched, 0.05)
                wire.release()

    asyncio.run(main())


# -- closing ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["idle", "busy", "dropped", "terminated"])
def test_close_returns_when_the_server_has_let_go(pg18: embedded.Postgres, database: str, how: str) -> None:
    async def main() -> None:
        driver = AsyncpgDriver(database, {}, PoolOptions())
        await driver.close(await driver.connect(5), None, 5)  # what the loop itself opens is open after that
        before = descriptors()
        conn = await driver.connect(5)
        pid, handle = conn.get_server_pid(), driver.handle(conn)
        query = None
        if how == "busy":
            query = asyncio.create_task(conn.fetch("SELECT pg_sleep(30)"))
            await until(lambda: driver.condition(conn) == BUSY)
        if how == "terminated":
            conn.terminate()
            assert driver.condition(conn) == BROKEN
            assert driver.closed_by_borrower(conn)
        if how == "dropped":
            await asyncio.sleep(0)  # asyncpg 0.31 keeps what it opened for one turn of the loop
            died = weakref.ref(conn)
            conn = None
            assert died() is None
        await driver.close(conn, handle, 5)
        assert pid not in backends(pg18.dsn)
        if query is not None:
            with pytest.raises(asyncpg.QueryCanceledError):
                await query
        await until(lambda: descriptors() == before)

    asyncio.run(main())


def test_a_close_that_is_cancelled_or_late_keeps_no_descriptor(database: str) -> None:
    async def main() -> None:
        with WireRecorder(database) as wire:
            driver = AsyncpgDriver(wire.dsn, {}, PoolOptions())
            conns = [await driver.connect(5) for _ in range(2)]
            wire.hold()
            inside = descriptors()
            closing = asyncio.create_task(driver.close(conns[0], None, 30))
            await asyncio.sleep(0)
            closing.cancel()
            with pytest.raises(asyncio.CancelledError):
                await closing
            await driver.close(conns[1], None, 0.02)
            await until(lambda: descriptors() == inside - 2)
            wire.release()

    asyncio.run(main())


def test_a_dropped_lease_is_collected_at_once_and_without_a_warning(database: str) -> None:
    async def main() -> None:
        driver = AsyncpgDriver(database, {}, PoolOptions())
        conn = await driver.connect(5)
        driver.settle(conn)
        await conn.fetch("SELECT $1::int", 1)
        async with conn.transaction():
            await conn.execute("SELECT 1")
        handle, died = driver.handle(conn), weakref.ref(conn)
        await asyncio.sleep(0)
        gc.collect()
        gc.disable()
        try:
            del conn
            assert died() is None
        finally:
            gc.enable()
        await driver.close(None, handle, 5)

    asyncio.run(main())


def test_a_forked_child_gives_its_copy_up_without_a_byte(database: str) -> None:
    def in_a_child(act: Callable[[], None]) -> None:
        pid = os.fork()
        if pid == 0:
            try:
                act()
            finally:
                os._exit(0)
        os.waitpid(pid, 0)

    async def steps(driver: AsyncpgDriver, conn: Any) -> None:
        def act() -> None:
            driver.disown(conn)
            conn.terminate()

        in_a_child(act)
        assert await conn.fetchval("SELECT 1") == 1
        assert driver.condition(conn) == IDLE

    run(database, steps)


def test_peek_reads_the_servers_last_word(pg18: embedded.Postgres, database: str) -> None:
    async def steps(driver: AsyncpgDriver, conn: Any) -> None:
        assert driver.peek(conn) is None
        terminate(pg18.dsn, [conn.get_server_pid()])
        assert driver.peek(conn) == "57P01"
        await until(lambda: driver.condition(conn) == BROKEN)  # the event loop has read it now
        assert driver.peek(conn) == driver.session(conn).sqlstate == "57P01"
        with pytest.raises((asyncpg.ConnectionDoesNotExistError, asyncpg.InterfaceError)) as caught:
            await driver.ping(conn, 5)
        assert driver.failure(caught.value) == (Failure.CONNECTION, "57P01")
        assert not driver.closed_by_borrower(conn)

    run(database, steps)


def test_a_connection_that_is_cut_is_found_broken(database: str) -> None:
    async def steps(driver: AsyncpgDriver, conn: Any) -> None:
        await driver.ping(conn, 5)
        query = asyncio.create_task(conn.fetch("SELECT pg_sleep(30)"))
        await until(lambda: driver.condition(conn) == BUSY)
        driver.cut(conn)
        with pytest.raises(asyncpg.ConnectionDoesNotExistError) as caught:
            await query
        assert driver.failure(caught.value)[0] == Failure.CONNECTION
        assert driver.condition(conn) == BROKEN

    run(database, steps)


# -- opening ------------------------------------------------------------------------------------------------------


def test_a_failed_dial_says_whose_fault_it_is(pg18: embedded.Postgres, database: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        closed_port = listener.getsockname()[1]

    async def dial(dsn: str, **args: Any) -> tuple[Failure, str]:
        driver = AsyncpgDriver(dsn, args, PoolOptions())
        with pytest.raises(Exception) as caught:
            await driver.connect(2)
        return driver.failure(caught.value)

    async def main() -> None:
        assert await dial(f"postgresql://app@127.0.0.1:{closed_port}/app") == (Failure.DESTINATION, "")
        assert await dial("postgresql://app@no.such.host.invalid/app") == (Failure.DESTINATION, "")
        assert await dial(pg18.dsn_for(database="nowhere")) == (Failure.PERMANENT, "3D000")
        assert await dial(database, password="wrong") == (Failure.PERMANENT, "28P01")
        settings = {"no_such_setting": "x"}
        assert await dial(database, server_settings=settings) == (Failure.PERMANENT, "42704")
        assert await dial(database, target_session_attrs="standby") == (Failure.TEMPORARY, "")
        # asyncpg 0.31 closes the connection it rejected in a task of its own.
        await asyncio.gather(*(asyncio.all_tasks() - {asyncio.current_task()}))

    asyncio.run(main())


def test_a_dial_that_gets_no_answer_ends_in_time() -> None:
    async def main() -> None:
        with socket.create_server(("127.0.0.1", 0)) as silent:
            driver = AsyncpgDriver(f"postgresql://app@127.0.0.1:{silent.getsockname()[1]}/app", {}, PoolOptions())
            with pytest.raises(TimeoutError) as caught:
                await driver.connect(0.05)
            assert driver.failure(caught.value) == (Failure.DESTINATION, "")

    asyncio.run(main())


def test_a_wrong_init_query_fails_the_dial_and_leaves_nothing_open(pg18: embedded.Postgres, database: str) -> None:
    async def main() -> None:
        name = database.rpartition("/")[2]
        driver = AsyncpgDriver(database, {}, PoolOptions(init_query="SET no_such_setting = 1"))
        with pytest.raises(asyncpg.UndefinedObjectError):
            await driver.connect(5)
        await until(lambda: backends(pg18.dsn, database=name) == [])

    asyncio.run(main())


def test_rotating_credentials_are_asked_for_at_each_dial_and_again_when_refused(database: str) -> None:
    asked: list[str] = []

    async def dsn() -> str:
        asked.append("dsn")
        return database

    def args() -> dict[str, Any]:
        asked.append("args")
        return {"password": "old"} if len(asked) == 1 else {}

    async def main() -> None:
        async with opened(dsn, args) as (driver, conn):
            assert await driver.fetch_value(conn, "SELECT 1", None) == 1

    asyncio.run(main())
    assert asked == ["args", "dsn", "args", "dsn"]


@pytest.mark.parametrize(
    ("dsn", "args"),
    [
        ("not a dsn", {}),
        ("postgresql://host:port/x", {}),
        ("postgresql://localhost/x", {"no_such_argument": 1}),
        ("postgresql://localhost/x", {"statement_cache_size": -1}),
        ("postgresql://localhost/x", {"ssl": "no_such_mode"}),
    ],
)
def test_what_asyncpg_could_never_use_is_refused_at_once(dsn: str, args: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        AsyncpgDriver(dsn, args, PoolOptions())


def test_a_lease_is_of_the_users_own_connection_class(database: str) -> None:
    class Mine(asyncpg.Connection):
        async def one(self) -> Any:
            return await self.fetchval("SELECT 1")

    async def main() -> None:
        async with opened(database, {"connection_class": Mine}) as (driver, conn):
            assert isinstance(conn, Mine)
            assert await conn.one() == 1
            assert driver.session(conn).statements == 1

    asyncio.run(main())


# -- statements and transactions of the pool ----------------------------------------------------------------------


def test_one_statement_is_one_round_trip_once_prepared(wire: WireRecorder) -> None:
    async def steps(driver: AsyncpgDriver, conn: Any) -> None:
        assert await driver.execute(conn, "CREATE TEMP TABLE t AS SELECT generate_series(1, 3) AS n", None) == 3
        query = "SELECT n FROM t WHERE n > $1 ORDER BY n"
        assert [row["n"] for row in await driver.fetch_all(conn, query, [1])] == [2, 3]
        wire.clear()
        assert (await driver.fetch_one(conn, query, (1,)))["n"] == 2
        assert await driver.fetch_value(conn, query, (2,)) == 3
        assert wire.round_trips() == 2
        assert await driver.fetch_value(conn, query, (3,)) is None
        with pytest.raises(MisuseError):
            await driver.fetch_value(conn, query, {"n": 1})

    run(wire.dsn, steps)


def test_a_transaction_block_is_asyncpgs_own_so_that_savepoints_nest(database: str) -> None:
    async def steps(driver: AsyncpgDriver, conn: Any) -> None:
        await conn.execute("CREATE TEMP TABLE t (n int)")
        await driver.begin(conn)
        await conn.execute("INSERT INTO t VALUES (1)")
        with suppress(ZeroDivisionError):
            async with conn.transaction():
                await conn.execute("INSERT INTO t VALUES (2)")
                raise ZeroDivisionError
        await driver.commit(conn)
        await driver.begin(conn)
        await conn.execute("INSERT INTO t VALUES (3)")
        await driver.rollback(conn)
        assert await conn.fetch("SELECT n FROM t") == [(1,)]
        await driver.leave(conn, False)
        assert driver.condition(conn) == IDLE

    run(database, steps)
