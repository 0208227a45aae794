"""The psycopg2 adapter against real servers: what it promises to a pool."""

import gc
import io
import os
import re
import socket
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import psycopg2
import pytest
from psycopg2 import errors, extensions, extras
from psycopg2.sql import SQL, Identifier, Literal
from wire_recorder import WireRecorder

from cenote import embedded
from cenote.config import PoolOptions
from cenote.errors import ConfigError
from cenote.pool.drivers.base import BROKEN, BUSY, IDLE, IN_TRANSACTION, CannotReset
from cenote.pool.drivers.psycopg2 import Psycopg2Driver
from cenote.reasons import Failure
from cenote.sql import touch
from cenote.sql.classify import classify
from cenote.testing.postgres import backends, fresh_database, terminate, wait_until


@contextmanager
def opened(dsn: Any, args: Any = None, **options: Any) -> Iterator[tuple[Psycopg2Driver, Any]]:
    driver = Psycopg2Driver(dsn, args or {}, PoolOptions(**options))
    conn = driver.connect(5)
    driver.settle(conn)
    try:
        yield driver, conn
    finally:
        driver.close(conn, None, 5)


def value(conn: Any, sql: str, params: Any = None) -> Any:
    cursor = conn.cursor()
    cursor.execute(sql, params)
    row = cursor.fetchone()
    return row[0]


@contextmanager
def sleeping(driver: Psycopg2Driver, conn: Any) -> Iterator[list[BaseException]]:
    """A query that sleeps, in another thread; yields the list its error is put in."""
    caught: list[BaseException] = []

    def sleep() -> None:
        try:
            conn.cursor().execute("SELECT pg_sleep(30)")
        except psycopg2.Error as error:
            caught.append(error)

    thread = threading.Thread(target=sleep)
    thread.start()
    wait_until(lambda: "pg_sleep" in driver.session(conn).last_sql and driver.condition(conn) == BUSY)
    try:
        yield caught
    finally:
        thread.join(10)
        assert not thread.is_alive()


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


def _execute(conn: Any) -> None:
    cursor = conn.cursor()
    cursor.execute("SET work_mem = '5MB'")
    cursor.execute(b"SELECT set_config('work_mem', '6MB', false)")
    cursor.execute(SQL("SET {} = {}").format(Identifier("work_mem"), Literal("7MB")))
    cursor.execute("SELECT %(a)s, %(b)s", {"a": 1, "b": [1, 2]})
    with pytest.raises(errors.DivisionByZero):
        cursor.execute("SELECT 1/%s", (0,))
    conn.rollback()


def _executemany(conn: Any) -> None:
    conn.cursor().executemany("SELECT pg_advisory_lock(%s)", ((number,) for number in range(3)))


def _raw_text_in_a_parameter(conn: Any) -> None:
    cursor = conn.cursor()
    cursor.execute("%s work_mem = '5MB'", (extensions.AsIs("SET"),))
    cursor.executemany("%(verb)s news", [{"verb": extensions.AsIs("LISTEN")}])


def _callproc(conn: Any) -> None:
    conn.cursor().callproc("set_config", ("work_mem", "5MB", False))
    conn.cursor().callproc("pg_advisory_lock", {"key": 1} if False else (1,))


def _copy(conn: Any) -> None:
    cursor = conn.cursor()
    cursor.execute("CREATE TEMP TABLE pairs (a int, b text)")
    cursor.copy_from(io.StringIO("1\tx\n"), "pairs", columns=("a", "b"))
    cursor.copy_to(io.StringIO(), "pairs")
    cursor.copy_expert("COPY pairs TO STDOUT", io.StringIO())
    cursor.copy_expert(
        SQL("COPY (SELECT set_config({}, '5MB', false)) TO STDOUT").format(Literal("work_mem")), io.StringIO()
    )


def _other_cursor_classes(conn: Any) -> None:
    for factory in (extras.RealDictCursor, extras.DictCursor, extras.NamedTupleCursor, extensions.cursor):
        cursor = conn.cursor(cursor_factory=factory)
        assert isinstance(cursor, factory)
        cursor.execute("SET work_mem = '5MB'")
    conn.cursor_factory = extras.RealDictCursor
    cursor = conn.cursor()
    cursor.execute("SELECT 1 AS one")
    assert cursor.fetchall() == [{"one": 1}]


def _extras(conn: Any) -> None:
    cursor = conn.cursor()
    cursor.execute("CREATE TEMP TABLE pairs (a int, b text)")
    extras.execute_values(cursor, "INSERT INTO pairs VALUES %s", [(1, "x"), (2, "y"), (3, "z")], page_size=2)
    extras.execute_batch(cursor, "SELECT set_config('work_mem', %s, false)", [("5MB",), ("6MB",)])
    extras.register_composite("pairs", conn)
    extras.register_uuid(conn_or_curs=conn)


def _held_cursor(conn: Any) -> None:
    cursor = conn.cursor("held", withhold=True)
    cursor.execute("SELECT generate_series(1, 9)")
    conn.commit()
    assert cursor.fetchone() == (1,)
    conn.commit()


def _two_phases(conn: Any) -> None:
    conn.tpc_begin(conn.xid(1, "global", "branch"))
    conn.cursor().execute("SELECT 1")
    conn.tpc_rollback()
    assert conn.tpc_recover() == []


def _settings_by_attribute(conn: Any) -> None:
    conn.autocommit = True
    conn.isolation_level = "SERIALIZABLE"
    conn.readonly = True
    conn.deferrable = True
    conn.set_session(isolation_level="READ COMMITTED", readonly=False)
    conn.set_isolation_level(extensions.ISOLATION_LEVEL_REPEATABLE_READ)
    conn.set_client_encoding("LATIN1")


def _connection_reset(conn: Any) -> None:
    conn.reset()


def _with_blocks(conn: Any) -> None:
    with conn, conn.cursor() as cursor:
        cursor.execute("SET work_mem = '5MB'")
    with suppress(ZeroDivisionError), conn:
        conn.cursor().execute("SELECT 1")
        raise ZeroDivisionError
    conn.commit()
    conn.rollback()


def _large_object(conn: Any) -> None:
    conn.lobject(0, "w").write("x")


CASES: dict[Callable[[Any], None], str] = {
    _execute: "cursor",
    _executemany: "cursor",
    _raw_text_in_a_parameter: "cursor",
    _callproc: "cursor",
    _copy: "cursor",
    _other_cursor_classes: "cursor cursor_factory",
    _extras: "string_types binary_types",
    _held_cursor: "cursor",
    _two_phases: "xid tpc_begin tpc_prepare tpc_commit tpc_rollback tpc_recover",
    _settings_by_attribute: "autocommit isolation_level readonly deferrable set_session set_isolation_level"
    " set_client_encoding",
    _connection_reset: "reset",
    _with_blocks: "commit rollback",
    _large_object: "lobject",
}
SILENT = (
    "async async_ cancel close closed dsn encoding fileno get_backend_pid get_dsn_parameters"
    " get_native_connection get_parameter_status get_transaction_status info isexecuting notices notifies"
    " pgconn_ptr poll protocol_version server_version status"
)
CURSOR_METHODS = "callproc copy_expert copy_from copy_to execute executemany"
CURSOR_SILENT = (
    "arraysize binary_types cast close closed connection description fetchall fetchmany fetchone itersize"
    " lastrowid mogrify name nextset pgresult_ptr query row_factory rowcount rownumber scroll scrollable"
    " setinputsizes setoutputsize statusmessage string_types typecaster tzinfo_factory withhold"
)
# What psycopg2 and libpq send of themselves is not counted as a statement; it touches what its methods mark.
OF_PSYCOPG2 = re.compile(
    r"(BEGIN|COMMIT|ROLLBACK|ABORT|DISCARD ALL)$|(BEGIN|FETCH|CLOSE|PREPARE TRANSACTION) "
    r"|SELECT gid, |select proname, |SET (default_transaction_|client_encoding|datestyle|SESSION AUTHORIZATION)"
)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__.strip("_"))
def test_what_is_sent_by_any_public_method_was_seen_before(
    wire: WireRecorder, case: Callable[[Any], None]
) -> None:
    with opened(wire.dsn) as (driver, conn):
        session = driver.session(conn)
        wire.clear()
        case(conn)
        texts = wire.texts()
        assert wire.requests
        assert session.statements == sum(not OF_PSYCOPG2.match(text) for text in texts), texts
        sent = 0
        for text in texts:
            sent |= classify(text).touches
        assert sent & ~session.touched == 0, touch.words(sent & ~session.touched)
        assert session.query_since_s == 0


def test_no_public_method_of_psycopg2_is_left_out() -> None:
    errors_of_dbapi = {name for name in dir(extensions.connection) if name[0].isupper()}
    public = {name for name in dir(extensions.connection) if not name.startswith("_")} - errors_of_dbapi
    assert public == set(" ".join([*CASES.values(), SILENT]).split())
    public = {name for name in dir(extensions.cursor) if not name.startswith("_")}
    assert public == set(f"{CURSOR_METHODS} {CURSOR_SILENT}".split())


def test_a_held_cursor_is_marked(database: str) -> None:
    with opened(database) as (driver, conn):
        _held_cursor(conn)
        assert driver.session(conn).touched & touch.CURSOR
        driver.reset(conn, driver.session(conn).touched, 5)
        assert value(conn, "SELECT count(*) FROM pg_cursors WHERE is_holdable") == 0


def test_a_cursor_that_cannot_be_watched_marks_everything_touched(database: str) -> None:
    class Odd:
        def __init__(self, conn: Any, *_: Any, **__: Any) -> None: ...

    with opened(database) as (driver, conn):
        with suppress(TypeError):
            conn.cursor(cursor_factory=Odd)
        conn.cursor(None, extensions.cursor)
        assert driver.session(conn).touched & touch.UNKNOWN


def test_the_session_tells_the_last_statement_and_the_servers_last_error(database: str) -> None:
    with opened(database) as (driver, conn):
        session = driver.session(conn)
        with pytest.raises(errors.DivisionByZero):
            value(conn, "SELECT 1/%s", (0,))
        assert session.last_sql == "SELECT 1/%s"
        assert session.sqlstate == "22012"
        assert session.in_query_s > 0
        conn.rollback()
        with sleeping(driver, conn) as caught:
            assert session.query_since_s > 0
            while not caught:  # a cancel may arrive before the query, and is nothing then
                driver.cancel(conn)
                time.sleep(0.01)
        assert isinstance(caught[0], errors.QueryCanceled)
        assert session.query_since_s == 0


# -- the session returns to its base ------------------------------------------------------------------------------


def test_a_reset_undoes_what_was_touched_and_runs_init_query_again(each_database: str) -> None:
    with opened(each_database, init_query="SET application_name = 'base'") as (driver, conn):
        cursor = conn.cursor()
        cursor.execute("SET timezone = 'Asia/Tokyo'; SET application_name = 'other'; SET ROLE app; LISTEN news")
        cursor.execute("CREATE TEMP TABLE mine (a int); SELECT pg_advisory_lock(7); PREPARE one AS SELECT 1")
        conn.commit()
        session = driver.session(conn)
        driver.reset(conn, session.touched, 5)
        assert session.touched == 0
        assert driver.condition(conn) == IDLE
        assert value(conn, "SHOW timezone") != "Asia/Tokyo"
        assert value(conn, "SHOW application_name") == "base"
        assert value(conn, "SHOW role") == "none"
        assert value(conn, "SELECT to_regclass('mine')") is None
        assert value(conn, "SELECT count(*) FROM pg_listening_channels()") == 0
        assert value(conn, "SELECT count(*) FROM pg_prepared_statements") == 0
        assert value(conn, "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'") == 0


@pytest.mark.parametrize("begins", ["psycopg2", "the borrower", "two phases", "a failure", "an end by hand"])
def test_a_reset_rolls_back_whoever_began(database: str, begins: str) -> None:
    with opened(database) as (driver, conn):
        if begins == "psycopg2":
            conn.cursor().execute("SELECT 1")
        elif begins == "the borrower":
            conn.autocommit = True
            conn.cursor().execute("BEGIN")
        elif begins == "two phases":
            conn.tpc_begin(conn.xid(1, "global", "branch"))
        elif begins == "a failure":
            with suppress(psycopg2.Error):
                conn.cursor().execute("SELECT 1/0")
        else:
            conn.cursor().execute("COMMIT")  # psycopg2 believes to be in a transaction still
        assert driver.condition(conn) == IN_TRANSACTION
        driver.reset(conn, 0, 5)
        assert driver.condition(conn) == IDLE
        assert not conn.autocommit
        assert not driver.session(conn).attributes


def test_psycopg2_can_read_dates_after_a_reset_whatever_the_servers_default(database: str) -> None:
    name = database.rpartition("/")[2]
    with opened(database) as (driver, conn):
        conn.cursor().execute(f"ALTER DATABASE {name} SET datestyle = 'German'")
        conn.commit()
    with opened(database) as (driver, conn):
        conn.cursor().execute("SET timezone = 'Asia/Tokyo'")
        driver.reset(conn, driver.session(conn).touched, 5)
        assert value(conn, "SELECT date '2020-02-29'").day == 29
        conn.cursor().execute(f"ALTER DATABASE {name} RESET datestyle")
        conn.commit()


def test_reset_always_resets_what_nobody_saw_and_never_only_rolls_back(database: str) -> None:
    hide = "CREATE OR REPLACE FUNCTION hide() RETURNS text LANGUAGE sql"
    hide += " AS $$ SELECT set_config('work_mem', '7MB', false) $$"
    with opened(database, reset="always") as (driver, conn):
        with conn:
            conn.cursor().execute(hide)
            conn.cursor().execute("SELECT hide()")
        driver.reset(conn, 0, 5)
        assert value(conn, "SHOW work_mem") == "4MB"
    with opened(database, reset="never") as (driver, conn):
        with conn:
            conn.cursor().execute("SET timezone = 'Asia/Tokyo'")
        conn.cursor().execute("SELECT 1")
        driver.reset(conn, driver.session(conn).touched, 5)
        assert driver.condition(conn) == IDLE
        assert value(conn, "SHOW timezone") == "Asia/Tokyo"


def test_what_no_statement_undoes_costs_the_connection(database: str) -> None:
    with opened(database) as (driver, conn):
        conn.cursor().execute("SELECT setseed(0.5)")
        with pytest.raises(CannotReset):
            driver.reset(conn, driver.session(conn).touched, 5)


def test_attributes_of_a_borrower_end_with_the_lease_without_a_round_trip(wire: WireRecorder) -> None:
    with opened(wire.dsn) as (driver, conn):
        conn.autocommit = True
        conn.cursor().execute("DO $$ BEGIN RAISE NOTICE 'mine'; END $$; NOTIFY news")
        conn.autocommit = False
        conn.isolation_level = "SERIALIZABLE"
        conn.readonly = True
        conn.deferrable = True
        conn.cursor_factory = extras.DictCursor
        conn.notifies = []
        extensions.register_type(extensions.new_type((23,), "INT", lambda *_: "mine"), conn)
        assert driver.condition(conn) == IDLE
        assert driver.session(conn).attributes
        wire.clear()
        driver.tidy(conn)
        assert wire.requests == []
        assert (conn.autocommit, conn.isolation_level, conn.readonly, conn.deferrable) == (False, None, None, None)
        assert conn.cursor_factory is None
        assert conn.notices == conn.notifies == []
        assert value(conn, "SELECT 1") == 1


def test_registered_types_and_notices_are_found_although_no_method_tells(database: str) -> None:
    with opened(database) as (driver, conn):
        extensions.register_type(extensions.new_type((23,), "INT", lambda *_: "mine"), conn)
        assert driver.condition(conn) == IDLE
        assert driver.session(conn).attributes
        driver.tidy(conn)
        driver.condition(conn)
        assert not driver.session(conn).attributes
        with conn:
            conn.cursor().execute("DO $$ BEGIN RAISE NOTICE 'mine'; END $$")
        driver.condition(conn)
        assert driver.session(conn).attributes


def test_transaction_levels_and_encoding_set_in_autocommit_are_reset_on_both_sides(database: str) -> None:
    with opened(database) as (driver, conn):
        _settings_by_attribute(conn)
        driver.tidy(conn)
        driver.reset(conn, driver.session(conn).touched, 5)
        assert not driver.session(conn).attributes
        assert (conn.autocommit, conn.isolation_level, conn.readonly, conn.deferrable) == (False, None, None, None)
        assert conn.encoding == "UTF8"
        assert value(conn, "SHOW default_transaction_isolation") == "read committed"
        assert value(conn, "SHOW client_encoding") == "UTF8"
        assert value(conn, "SELECT 'ł'") == "ł"


def test_what_configure_set_is_the_base(database: str) -> None:
    driver = Psycopg2Driver(database, {}, PoolOptions())
    conn = driver.connect(5)

    def configure() -> None:
        conn.autocommit = True
        conn.cursor_factory = extras.RealDictCursor
        conn.cursor().execute("SET work_mem = '9MB'; PREPARE one AS SELECT 1")

    configure()
    driver.settle(conn)
    conn.autocommit = False
    conn.cursor_factory = None
    assert driver.condition(conn) == IDLE
    driver.tidy(conn)
    assert conn.autocommit
    assert conn.cursor_factory is extras.RealDictCursor
    conn.cursor().execute("SET timezone = 'Asia/Tokyo'")
    driver.reset(conn, driver.session(conn).touched, 5)
    configure()  # as the pool does after a reset; it must find the state it began with
    driver.settle(conn)
    assert driver.fetch_value(conn, "SHOW work_mem", None) == "9MB"
    driver.close(conn, None, 5)


# -- cancelling, closing ------------------------------------------------------------------------------------------


def test_a_connection_in_use_by_another_thread_is_busy_and_not_reset(database: str) -> None:
    with opened(database) as (driver, conn), sleeping(driver, conn) as caught:
        with pytest.raises(CannotReset):
            driver.reset(conn, 0, 5)
        driver.close(conn, None, 5)
        assert driver.condition(conn) == BROKEN
        wait_until(lambda: caught)


def test_a_reset_waits_for_a_cancel_request_under_way(database: str) -> None:
    with WireRecorder(database) as wire, opened(wire.dsn) as (driver, conn):
        wire.hold()
        canceller = threading.Thread(target=driver.cancel, args=(conn,))
        canceller.start()
        wait_until(lambda: driver.condition(conn) == BUSY)
        with pytest.raises(CannotReset):
            driver.reset(conn, 0, 0.02)
        wire.release()
        driver.reset(conn, 0, 5)
        canceller.join(5)
        assert driver.condition(conn) == IDLE
        assert value(conn, "SELECT 1") == 1


def test_what_gets_no_answer_ends_in_time(database: str) -> None:
    with WireRecorder(database) as wire:
        with opened(wire.dsn) as (driver, conn):
            wire.hold()
            with pytest.raises(TimeoutError) as caught:
                driver.ping(conn, 0.05)
            assert driver.failure(caught.value)[0] == Failure.DESTINATION
            assert driver.condition(conn) == BROKEN
            wire.release()
        with opened(wire.dsn) as (driver, conn):
            conn.cursor().execute("SET work_mem = '5MB'")
            wire.hold()
            with pytest.raises(CannotReset):
                driver.reset(conn, driver.session(conn).touched, 0.05)
            wire.release()


@pytest.mark.parametrize("how", ["idle", "busy"])
def test_close_returns_when_the_server_has_let_go(pg18: embedded.Postgres, database: str, how: str) -> None:
    driver = Psycopg2Driver(database, {}, PoolOptions())
    before = os.listdir("/proc/self/fd")
    conn = driver.connect(5)
    pid = conn.get_backend_pid()
    if how == "busy":
        with sleeping(driver, conn):
            driver.close(conn, None, 5)
    else:
        driver.close(conn, None, 5)
    assert pid not in backends(pg18.dsn)
    assert driver.closed_by_borrower(conn)
    assert os.listdir("/proc/self/fd") == before


def test_a_dropped_lease_is_collected_at_once_and_says_good_bye(pg18: embedded.Postgres, database: str) -> None:
    driver = Psycopg2Driver(database, {}, PoolOptions())
    conn = driver.connect(5)
    driver.settle(conn)
    assert value(conn, "SELECT 1") == 1
    pid, died, handle = conn.get_backend_pid(), weakref.ref(conn), driver.handle(conn)
    gc.disable()
    try:
        del conn
        assert died() is None
    finally:
        gc.enable()
    driver.close(None, handle, 5)
    wait_until(lambda: pid not in backends(pg18.dsn))


def test_a_forked_child_gives_its_copy_up_without_a_byte(database: str) -> None:
    with opened(database) as (driver, conn):
        pid = os.fork()
        if pid == 0:
            try:
                driver.disown(conn)
                conn.close()
            finally:
                os._exit(0)
        os.waitpid(pid, 0)
        assert value(conn, "SELECT 1") == 1


def test_peek_reads_the_servers_last_word(pg18: embedded.Postgres, database: str) -> None:
    with opened(database) as (driver, conn):
        assert driver.peek(conn) is None
        terminate(pg18.dsn, [conn.get_backend_pid()])
        assert driver.peek(conn) == "57P01"
        with pytest.raises(psycopg2.OperationalError) as caught:
            conn.cursor().execute("SELECT 1")
        assert driver.failure(caught.value)[0] == Failure.CONNECTION
        assert driver.condition(conn) == BROKEN
        assert not driver.closed_by_borrower(conn)
        assert driver.peek(conn) == ""


def test_a_connection_that_is_cut_is_found_broken(database: str) -> None:
    with opened(database) as (driver, conn), sleeping(driver, conn) as caught:
        driver.cut(conn)
        wait_until(lambda: caught)
        assert driver.failure(caught[0]) == (Failure.CONNECTION, "")
        assert driver.condition(conn) == BROKEN


# -- opening ------------------------------------------------------------------------------------------------------


def test_a_failed_dial_says_whose_fault_it_is(pg18: embedded.Postgres, database: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        closed_port = listener.getsockname()[1]

    def dial(dsn: str, **args: Any) -> tuple[Failure, str]:
        driver = Psycopg2Driver(dsn, args, PoolOptions())
        with pytest.raises(psycopg2.OperationalError) as caught:
            driver.connect(2)
        return driver.failure(caught.value)

    assert dial(f"postgresql://app@127.0.0.1:{closed_port}/app") == (Failure.DESTINATION, "")
    assert dial("postgresql://app@no.such.host.invalid/app") == (Failure.DESTINATION, "")
    assert dial(pg18.dsn_for(database="nowhere")) == (Failure.PERMANENT, "3D000")
    assert dial(database, password="wrong") == (Failure.PERMANENT, "28P01")
    assert dial(database, options="-c no_such_setting=x") == (Failure.PERMANENT, "42704")
    assert dial(database, sslmode="require") == (Failure.PERMANENT, "")


def test_a_dial_that_gets_no_answer_ends_with_libpqs_timeout() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        dsn = f"postgresql://app@127.0.0.1:{silent.getsockname()[1]}/app?sslmode=disable"
        driver = Psycopg2Driver(dsn, {}, PoolOptions())
        with pytest.raises(psycopg2.OperationalError) as caught:
            driver.connect(0.1)
        assert driver.failure(caught.value) == (Failure.DESTINATION, "")


def test_rotating_credentials_are_asked_for_at_each_dial_and_again_when_refused(database: str) -> None:
    asked: list[str] = []

    def dsn() -> str:
        asked.append("dsn")
        return database

    def args() -> dict[str, Any]:
        asked.append("args")
        return {"password": "old"} if len(asked) == 2 else {}

    with opened(dsn, args) as (driver, conn):
        assert driver.fetch_value(conn, "SELECT 1", None) == 1
    assert asked == ["dsn", "args", "dsn", "args"]


@pytest.mark.parametrize(
    ("dsn", "args"),
    [
        ("not a dsn", {}),
        ("postgresql://[", {}),
        ("dbname=x", {"no_such_argument": 1}),
        ("dbname=x", {"async_": True}),
        ("dbname=x", {"connection_factory": lambda *_: None}),
    ],
)
def test_what_psycopg2_could_never_use_is_refused_at_once(dsn: str, args: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        Psycopg2Driver(dsn, args, PoolOptions())


def test_a_lease_is_of_the_users_own_classes(database: str) -> None:
    args = {"connection_factory": extras.DictConnection}
    with opened(database, args) as (driver, conn):
        assert isinstance(conn, extras.DictConnection)
        cursor = conn.cursor()
        assert isinstance(cursor, extras.DictCursor)
        cursor.execute("SELECT 1 AS one")
        assert cursor.fetchone()["one"] == 1
        assert driver.session(conn).statements == 1
    with opened(database, {"cursor_factory": extras.RealDictCursor}) as (driver, conn):
        assert driver.fetch_all(conn, "SELECT 1 AS one", None) == [{"one": 1}]
        assert driver.fetch_value(conn, "SELECT 1 AS one", None) == 1
        conn.cursor_factory = None
        driver.tidy(conn)
        assert conn.cursor_factory is extras.RealDictCursor


# -- statements and transactions of the pool ----------------------------------------------------------------------


def test_one_statement_is_one_round_trip(wire: WireRecorder) -> None:
    with opened(wire.dsn) as (driver, conn):
        wire.clear()
        assert driver.execute(conn, "CREATE TEMP TABLE t AS SELECT generate_series(1, 3) AS n", None) == 3
        assert driver.fetch_all(conn, "SELECT n FROM t WHERE n > %s", [1]) == [(2,), (3,)]
        assert driver.fetch_one(conn, "SELECT n FROM t WHERE n > %(n)s", {"n": 2}) == (3,)
        assert driver.fetch_value(conn, "SELECT n FROM t WHERE n > %s", (3,)) is None
        assert driver.fetch_all(conn, "DELETE FROM t", None) == []
        assert wire.round_trips() == 5
        assert driver.condition(conn) == IDLE
        assert not conn.autocommit
        with pytest.raises(errors.DivisionByZero):
            driver.fetch_value(conn, "SELECT 1/0", None)
        assert driver.condition(conn) == IDLE


def test_one_statement_keeps_the_transaction_level_that_configure_set(database: str) -> None:
    with opened(database) as (driver, conn):
        conn.isolation_level = "SERIALIZABLE"
        driver.settle(conn)
        assert driver.fetch_value(conn, "SHOW transaction_isolation", None) == "serializable"
        assert driver.condition(conn) == IDLE
        with pytest.raises(errors.DivisionByZero):
            driver.fetch_value(conn, "SELECT 1/0", None)
        assert driver.condition(conn) == IDLE


@pytest.mark.parametrize("autocommit", [False, True])
def test_blocks_commit_and_roll_back(database: str, autocommit: bool) -> None:
    with opened(database) as (driver, conn):
        conn.autocommit = autocommit
        driver.settle(conn)
        driver.execute(conn, "CREATE TEMP TABLE t (n int)", None)
        for number, end in ((1, driver.commit), (2, driver.rollback)):
            driver.begin(conn)
            conn.cursor().execute("INSERT INTO t VALUES (%s)", (number,))
            end(conn)
        for number, failed in ((3, False), (4, True)):
            conn.cursor().execute("INSERT INTO t VALUES (%s)", (number,))
            driver.leave(conn, failed)
        kept = [(1,), (3,), (4,)] if autocommit else [(1,), (3,)]
        assert driver.fetch_all(conn, "SELECT n FROM t ORDER BY n", None) == kept
        assert driver.condition(conn) == IDLE
