"""Never somebody else's data: nothing of a session reaches the next borrower, and cleaning makes nobody wait."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from wire_recorder import WireRecorder

from pool_kit import Api, Kit, behaviour, notes, write

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
    "a setting of one's own": (
        ["SET app.tenant = '42'"],
        "SELECT coalesce(current_setting('app.tenant', true), '')",
    ),
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
