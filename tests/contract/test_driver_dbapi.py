"""The adapter for any DB-API driver, proved with sqlite3 and, as a foreign driver, psycopg2's bare connect."""

import functools
import os
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg2
import pytest
from psycopg2.extras import RealDictCursor

from cenote import embedded
from cenote.config import PoolOptions
from cenote.errors import ConfigError
from cenote.pool.drivers.base import BROKEN, IDLE, IN_TRANSACTION
from cenote.pool.drivers.dbapi import DbApiDriver
from cenote.reasons import Failure
from cenote.testing.postgres import fresh_database, terminate, wait_until

UNBOUND = {"check_same_thread": False}


@pytest.fixture(scope="module")
def database(pg18: embedded.Postgres) -> Iterator[str]:
    """One database for this file: a test leaves nothing in it that another could stumble over."""
    with fresh_database(pg18) as name:
        yield pg18.dsn_for(database=name)


@pytest.fixture
def file(tmp_path: Path) -> str:
    return str(tmp_path / "test.sqlite")


@contextmanager
def opened(connect: Any, dsn: Any, args: Any = None, **options: Any) -> Iterator[tuple[DbApiDriver, Any]]:
    driver = DbApiDriver(connect, dsn, args or {}, PoolOptions(**options))
    conn = driver.connect(5)
    driver.settle(conn)
    try:
        yield driver, conn
    finally:
        driver.close(conn, driver.handle(conn), 5)


def test_a_lease_is_what_connect_returns_unchanged(file: str) -> None:
    with opened(sqlite3.connect, file, UNBOUND) as (driver, conn):
        assert type(conn) is sqlite3.Connection
        assert driver.session(conn) is driver.session(conn)
        assert driver.handle(conn) == id(conn)


@pytest.mark.parametrize("connect", [sqlite3.connect, functools.partial(sqlite3.connect)])
def test_a_connection_bound_to_its_thread_is_refused_with_advice(file: str, connect: Any) -> None:
    with pytest.raises(ConfigError, match=r'connect_args=\{"check_same_thread": False\}'):
        DbApiDriver(connect, file, {}, PoolOptions()).connect(5)


def test_any_driver_that_refuses_another_thread_is_told_at_the_dial() -> None:
    class Bound:
        def __init__(self) -> None:
            self.thread = threading.get_ident()

        def cursor(self) -> Any:
            if threading.get_ident() != self.thread:
                raise RuntimeError("not my thread")
            return sqlite3.connect(":memory:").cursor()

        def close(self) -> None: ...

    driver = DbApiDriver(Bound, None, {}, PoolOptions())
    with pytest.raises(ConfigError, match="not my thread") as caught:
        driver.connect(5)
    assert driver.failure(caught.value) == (Failure.PERMANENT, "")


def test_the_condition_is_what_the_connection_says(file: str) -> None:
    with opened(sqlite3.connect, file, UNBOUND) as (driver, conn):
        conn.execute("CREATE TABLE t (n int)")
        assert driver.condition(conn) == IDLE
        conn.execute("INSERT INTO t VALUES (1)")
        assert driver.condition(conn) == IN_TRANSACTION
        driver.reset(conn, 0, 5)
        assert driver.condition(conn) == IDLE
        assert conn.execute("SELECT count(*) FROM t").fetchone() == (0,)
        conn.close()
        assert driver.condition(conn) == BROKEN
        assert driver.closed_by_borrower(conn)


def test_attributes_of_a_borrower_end_with_the_lease(file: str) -> None:
    with opened(sqlite3.connect, file, UNBOUND) as (driver, conn):
        conn.row_factory = sqlite3.Row
        conn.text_factory = bytes
        conn.isolation_level = None
        assert driver.condition(conn) == IDLE
        assert driver.session(conn).attributes
        driver.tidy(conn)
        assert conn.row_factory is None
        assert conn.isolation_level == ""
        assert conn.execute("SELECT 'x'").fetchone() == ("x",)
        assert driver.condition(conn) == IDLE
        assert not driver.session(conn).attributes


def test_init_query_and_one_statement_at_a_time(file: str) -> None:
    with opened(sqlite3.connect, file, UNBOUND, init_query="PRAGMA foreign_keys = on") as (driver, conn):
        assert driver.fetch_value(conn, "PRAGMA foreign_keys", None) == 1
        driver.execute(conn, "CREATE TABLE t (n int)", None)
        assert driver.execute(conn, "INSERT INTO t VALUES (?), (?)", (1, 2)) == 2
        assert driver.fetch_all(conn, "SELECT n FROM t WHERE n > :n", {"n": 0}) == [(1,), (2,)]
        assert driver.fetch_one(conn, "SELECT n FROM t", None) == (1,)
        assert driver.fetch_value(conn, "SELECT n FROM t WHERE n = ?", (9,)) is None
        assert driver.fetch_all(conn, "DELETE FROM t WHERE n = 2", None) == []
        assert driver.condition(conn) == IDLE
        assert driver.session(conn).statements == 7
        assert driver.session(conn).in_query_s > 0
        with pytest.raises(sqlite3.OperationalError) as caught:
            driver.execute(conn, "INSERT INTO nowhere VALUES (1)", None)
        assert driver.failure(caught.value) == (Failure.CONNECTION, "")
        assert driver.condition(conn) == IDLE
        driver.ping(conn, 5)


@pytest.mark.parametrize("level", ["", None])
def test_blocks_commit_and_roll_back_ddl_included(file: str, level: str | None) -> None:
    with opened(sqlite3.connect, file, {**UNBOUND, "isolation_level": level}) as (driver, conn):
        driver.begin(conn)
        conn.execute("CREATE TABLE gone (n int)")
        driver.rollback(conn)
        driver.begin(conn)
        conn.execute("CREATE TABLE t (n int)")
        conn.execute("INSERT INTO t VALUES (1)")
        driver.commit(conn)
        tables = "SELECT name FROM sqlite_master"
        assert driver.fetch_all(conn, tables, None) == [("t",)]
        driver.begin(conn)
        conn.execute("INSERT INTO t VALUES (2)")
        driver.leave(conn, True)
        driver.begin(conn)
        conn.execute("INSERT INTO t VALUES (3)")
        driver.leave(conn, False)
        assert driver.fetch_all(conn, "SELECT n FROM t", None) == [(1,), (3,)]


def test_a_running_query_can_be_interrupted_from_another_thread(file: str) -> None:
    with opened(sqlite3.connect, file, UNBOUND) as (driver, conn):
        assert driver.cancellable
        caught: list[BaseException] = []

        def count() -> None:
            endless = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT max(i) FROM n"
            try:
                driver.fetch_value(conn, endless, None)
            except sqlite3.OperationalError as error:
                caught.append(error)

        thread = threading.Thread(target=count)
        thread.start()

        def interrupted() -> bool:
            driver.cancel(conn)  # before the query runs it is nothing
            return bool(caught)

        wait_until(interrupted)
        thread.join()
        assert str(caught[0]) == "interrupted"


def test_a_forked_child_leaves_an_inherited_connection_alone(file: str) -> None:
    with opened(sqlite3.connect, file, UNBOUND) as (driver, conn):
        conn.execute("CREATE TABLE t (n int)")
        conn.execute("INSERT INTO t VALUES (1)")
        pid = os.fork()
        if pid == 0:
            driver.disown(conn)
            os._exit(0)
        os.waitpid(pid, 0)
        conn.commit()
        assert driver.fetch_value(conn, "SELECT n FROM t", None) == 1


def test_what_cannot_be_referenced_weakly_says_so(file: str) -> None:
    class Weak(sqlite3.Connection):
        pass

    with opened(sqlite3.connect, file, UNBOUND) as (driver, _):
        assert not driver.weak
    with opened(sqlite3.connect, file, {**UNBOUND, "factory": Weak}) as (driver, _):
        assert driver.weak


def test_no_session_is_kept_of_a_closed_or_dropped_connection(file: str) -> None:
    driver = DbApiDriver(sqlite3.connect, file, UNBOUND, PoolOptions())
    conn, other = driver.connect(5), driver.connect(5)
    handle = driver.handle(other)
    driver.close(conn, driver.handle(conn), 5)
    other.close()
    del other
    driver.close(None, handle, 5)
    assert driver._sessions == {}


def test_a_driver_without_in_transaction_is_rolled_back_each_time(database: str) -> None:
    with opened(psycopg2.connect, database, {"cursor_factory": RealDictCursor}) as (driver, conn):
        assert driver.condition(conn) == IN_TRANSACTION
        conn.cursor().execute("CREATE TABLE t (n int)")
        driver.reset(conn, 0, 5)
        assert driver.fetch_value(conn, "SELECT to_regclass('t')::text", None) is None
        driver.begin(conn)
        conn.cursor().execute("CREATE TABLE t (n int)")
        driver.commit(conn)
        assert driver.fetch_value(conn, "SELECT to_regclass('t')::text", None) == "t"
        with pytest.raises(psycopg2.errors.UndefinedTable) as caught:
            driver.execute(conn, "SELECT * FROM nowhere", None)
        assert driver.session(conn).sqlstate == "42P01"
        assert driver.failure(caught.value)[1] == "42P01"


def test_the_end_of_a_connection_with_a_descriptor_is_seen(dsn: str, database: str) -> None:
    with opened(psycopg2.connect, database) as (driver, conn):
        assert driver.peek(conn) is None
        terminate(dsn, [conn.get_backend_pid()])
        assert driver.peek(conn) == ""
        driver.cut(conn)
        with pytest.raises(psycopg2.OperationalError):
            driver.ping(conn, 5)
        assert driver.condition(conn) == BROKEN


def test_rotating_credentials_are_asked_for_at_each_dial(file: str) -> None:
    asked: list[str] = []

    def dsn() -> str:
        asked.append("dsn")
        return file

    def args() -> dict[str, Any]:
        asked.append("args")
        return UNBOUND

    with opened(sqlite3.connect, dsn, args) as (driver, conn):
        driver.close(driver.connect(5), None, 5)
        assert driver.fetch_value(conn, "SELECT 1", None) == 1
    assert asked == ["dsn", "args"] * 2


def test_errors_without_a_sqlstate_are_read_by_their_class() -> None:
    driver = DbApiDriver(sqlite3.connect, ":memory:", UNBOUND, PoolOptions())
    assert driver.failure(ConnectionRefusedError()) == (Failure.DESTINATION, "")
    assert driver.failure(sqlite3.ProgrammingError()) == (Failure.PERMANENT, "")
    assert driver.failure(sqlite3.IntegrityError()) == (Failure.PRIVATE, "")
    assert driver.failure(RuntimeError({"S": "FATAL", "C": "57P03"})) == (Failure.DESTINATION, "57P03")
