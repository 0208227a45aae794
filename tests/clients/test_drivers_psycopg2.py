"""psycopg2 through the proxy, with its defaults: the simple protocol, implicit transactions, large objects."""

from __future__ import annotations

import io
import select
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from typing import Any

import psycopg2
import pytest
from front import CLIENTS, DEADLINE_S, MAX_SIZE, Front
from psycopg2 import errors, extensions, extras, sql

from cenote.testing.postgres import wait_until


@pytest.fixture
def conn(dsn: str) -> Iterator[Any]:
    with closing(psycopg2.connect(dsn)) as conn:
        yield conn


@contextmanager
def several(dsn: str, count: int = CLIENTS) -> Iterator[list[Any]]:
    """More connections than the server has."""
    with ExitStack() as stack:
        yield [stack.enter_context(closing(psycopg2.connect(dsn))) for _ in range(count)]


def rows(conn: Any, text: Any, params: Any = None) -> list[Any]:
    with conn.cursor() as cursor:
        cursor.execute(text, params)
        return list(cursor.fetchall()) if cursor.description else []


def test_values_errors_and_the_transaction_around_them(conn: Any) -> None:
    values = (None, True, 2**62, 1.5, "naïve ☃ 'q' \\ %", [1, 2], b"\x00\xff")
    (row,) = rows(conn, "SELECT %s, %s, %s, %s, %s, %s, %s", values)
    assert (*row[:-1], bytes(row[-1])) == values
    for statement, error in [
        ("SELECT 1/0", errors.DivisionByZero),
        ("SELEC 1", errors.SyntaxError),
        ("SELECT * FROM no_such_table", errors.UndefinedTable),
    ]:
        with pytest.raises(error) as caught:
            rows(conn, statement)
        assert caught.value.pgcode
        assert conn.get_transaction_status() == extensions.TRANSACTION_STATUS_INERROR
        with pytest.raises(errors.InFailedSqlTransaction):
            rows(conn, "SELECT 1")
        conn.rollback()
        assert rows(conn, "SELECT 1") == [(1,)]


def test_its_transactions_commit_and_roll_back_as_a_whole(dsn: str) -> None:
    with several(dsn, 2) as (one, other):
        rows(one, "CREATE TABLE t (id int PRIMARY KEY)")
        one.commit()
        with one:
            rows(one, "INSERT INTO t VALUES (1)")
        with pytest.raises(errors.UniqueViolation), one:
            rows(one, "INSERT INTO t VALUES (2)")
            rows(one, "INSERT INTO t VALUES (1)")
        assert rows(other, "SELECT id FROM t") == [(1,)]
        other.rollback()
        one.set_session(isolation_level="SERIALIZABLE", readonly=True)
        assert rows(one, "SHOW transaction_isolation") == [("serializable",)]
        with pytest.raises(errors.ReadOnlySqlTransaction):
            rows(one, "INSERT INTO t VALUES (3)")
        one.rollback()
        assert rows(other, "SHOW transaction_isolation") == [("read committed",)]


def test_more_connections_than_the_server_has_take_turns(dsn: str) -> None:
    def client(number: int) -> None:
        with closing(psycopg2.connect(dsn)) as conn:
            for turn in range(30):
                assert rows(conn, "SELECT %s, %s", (number, turn)) == [(number, turn)]
                assert rows(conn, "SELECT %s || '!'", (f"{number}/{turn}",)) == [(f"{number}/{turn}!",)]
                conn.commit()

    with ThreadPoolExecutor(CLIENTS) as threads:
        list(threads.map(client, range(CLIENTS)))


def test_copy_expert_in_and_out(conn: Any) -> None:
    with conn.cursor() as cursor:
        cursor.execute("CREATE TABLE t (id int, note text)")
        lines = "".join(f"{n},note {n}\n" for n in range(20_000))
        cursor.copy_expert("COPY t FROM STDIN (FORMAT csv)", io.StringIO(lines))
        assert cursor.rowcount == 20_000
        out = io.StringIO()
        cursor.copy_expert("COPY (SELECT * FROM t ORDER BY id) TO STDOUT (FORMAT csv)", out)
        assert out.getvalue() == lines
        conn.commit()
        with pytest.raises(errors.BadCopyFileFormat):
            cursor.copy_expert("COPY t FROM STDIN (FORMAT csv)", io.StringIO("1,2,3\n" * 100_000))
        conn.rollback()

        class Broken(io.StringIO):
            def read(self, size: int | None = -1, /) -> str:
                raise ZeroDivisionError

        with pytest.raises(psycopg2.Error):
            cursor.copy_expert("COPY t FROM STDIN", Broken())
        conn.rollback()
        cursor.execute("SELECT count(*) FROM t")
        assert cursor.fetchone() == (20_000,)


def test_named_cursors_in_their_transactions(dsn: str) -> None:
    with several(dsn, MAX_SIZE) as conns:
        for number, conn in enumerate(conns):
            with conn.cursor("mine") as cursor:
                cursor.itersize = 100
                cursor.execute("SELECT n * %s FROM generate_series(0, 999) AS n", (number,))
                assert cursor.fetchmany(2) == [(0,), (number,)]
                assert sum(row[0] for row in cursor) == number * 499_499
        for conn in conns:
            conn.commit()


def test_a_cursor_with_hold_outlives_its_transaction(dsn: str) -> None:
    with several(dsn, MAX_SIZE) as (conn, *others):
        with conn.cursor("held", withhold=True) as cursor:
            cursor.execute("SELECT n FROM generate_series(1, 100) AS n")
            assert cursor.fetchone() == (1,)
            conn.commit()
            for other in others:
                assert rows(other, "SELECT 1") == [(1,)]
                other.rollback()
            assert len(cursor.fetchall()) == 99
        conn.commit()


def test_execute_values_and_batch(conn: Any) -> None:
    with conn.cursor() as cursor:
        cursor.execute("CREATE TABLE t (id int, note text)")
        found = extras.execute_values(
            cursor,
            "INSERT INTO t VALUES %s RETURNING id",
            [(n, f"n{n}") for n in range(1000)],
            page_size=100,
            fetch=True,
        )
        assert [row[0] for row in found] == list(range(1000))
        extras.execute_batch(cursor, "UPDATE t SET note = %s WHERE id = %s", [(f"m{n}", n) for n in range(500)])
        cursor.execute("SELECT count(*) FROM t WHERE note LIKE 'm%'")
        assert cursor.fetchone() == (500,)


def test_prepared_by_sql_and_temporary_tables_stay_with_their_connection(dsn: str) -> None:
    with several(dsn, MAX_SIZE - 1) as conns:
        for number, conn in enumerate(conns):
            conn.autocommit = True
            rows(conn, f"PREPARE mine AS SELECT {number}")
            rows(conn, "CREATE TEMP TABLE own (n int)")
            rows(conn, "INSERT INTO own VALUES (%s)", (number,))
            rows(conn, "SET my.owner = %s", (str(number),))
        for _ in range(3):
            for number, conn in enumerate(conns):
                assert rows(conn, "EXECUTE mine") == [(number,)]
                assert rows(conn, "SELECT n FROM own") == [(number,)]
                assert rows(conn, "SHOW my.owner") == [(str(number),)]
    with closing(psycopg2.connect(dsn)) as fresh:
        for text in ("EXECUTE mine", "SELECT n FROM own"):
            with pytest.raises(psycopg2.Error):
                rows(fresh, text)
            fresh.rollback()
        # PostgreSQL never forgets the name of a custom setting: on a connection that had it, it is empty.
        assert rows(fresh, "SELECT nullif(current_setting('my.owner', true), '')") == [(None,)]


def test_large_objects_by_function_call(conn: Any) -> None:
    """libpq reads and writes them with FunctionCall, which nothing else uses."""
    data = bytes(range(256)) * 4000
    made = conn.lobject(0, "wb")
    assert made.write(data) == len(data)
    made.close()
    conn.commit()
    found = conn.lobject(made.oid, "rb")
    assert found.read() == data
    assert found.seek(256) == 256
    assert found.read(3) == b"\x00\x01\x02"
    found.unlink()
    conn.commit()
    with pytest.raises(psycopg2.Error):
        conn.lobject(made.oid, "rb")
    conn.rollback()


def test_large_values_pass_both_ways(conn: Any) -> None:
    text = "0123456789abcdef" * (1024 * 1024)
    assert rows(conn, "SELECT %s", (text,)) == [(text,)]
    assert len(rows(conn, "SELECT repeat('y', 1000) FROM generate_series(1, 20000)")) == 20_000


def test_a_cancel_ends_its_own_query_and_no_other(front: Front, dsn: str) -> None:
    running = "SELECT count(*) FROM pg_stat_activity WHERE state = 'active' AND query ~ 'cancel.m[e]'"
    with several(dsn, 2) as (victim, bystander), ThreadPoolExecutor(2) as threads:
        for _ in range(3):
            slow = threads.submit(rows, victim, "SELECT pg_sleep(60), 'cancel me'")
            other = threads.submit(rows, bystander, "SELECT pg_sleep(0.3)::text || 'bystander'")
            wait_until(lambda: front.ask(running) == 1)
            victim.cancel()
            with pytest.raises(errors.QueryCanceled):
                slow.result(15)
            assert other.result(15) == [("bystander",)]
            victim.rollback()
            bystander.rollback()
        victim.cancel()
        assert rows(victim, "SELECT 'alive'") == [("alive",)]


def test_notifications_are_polled(dsn: str) -> None:
    with several(dsn, 2) as (listener, speaker):
        for conn in (listener, speaker):
            conn.autocommit = True
        rows(listener, "LISTEN news")
        rows(speaker, sql.SQL("NOTIFY {}, 'hello'").format(sql.Identifier("news")))
        deadline = time.monotonic() + DEADLINE_S
        while not listener.notifies:
            assert time.monotonic() < deadline
            select.select([listener], [], [], 0.5)
            listener.poll()
        assert [(note.channel, note.payload) for note in listener.notifies] == [("news", "hello")]


def test_its_asynchronous_connections_work_too(dsn: str) -> None:
    conn = psycopg2.connect(dsn, async_=True)
    extras.wait_select(conn)
    with closing(conn), conn.cursor() as cursor:
        for number in range(3):
            cursor.execute("SELECT %s", (number,))
            extras.wait_select(conn)
            assert cursor.fetchall() == [(number,)]
