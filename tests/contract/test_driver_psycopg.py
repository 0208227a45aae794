"""The psycopg adapters, sync and async, against real servers: what they promise to a pool.

Each test runs in both colours: `kit.do(x)` is x for the blocking driver, and runs x on a loop for the other.
"""

import asyncio
import contextlib
import gc
import inspect
import os
import signal
import socket
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import psycopg
import pytest
from psycopg import sql as psql
from psycopg.rows import dict_row
from psycopg.types import TypeInfo
from psycopg.types.string import StrDumper
from wire_recorder import WireRecorder

from cenote import embedded
from cenote.config import PoolOptions
from cenote.errors import ConfigError
from cenote.pool.drivers import base
from cenote.pool.drivers._psycopg import NotPrimary
from cenote.pool.drivers.psycopg import PsycopgDriver
from cenote.pool.drivers.psycopg_async import AsyncPsycopgDriver
from cenote.reasons import Failure
from cenote.sql import touch
from cenote.testing.postgres import backends, fresh_database, terminate, wait_until

STATEMENT_TIMEOUT = 20.0


@dataclass
class Kit:
    """One colour of the driver, and how to wait for it."""

    colour: str
    runner: asyncio.Runner | None = None

    def do(self, result: Any) -> Any:
        if self.runner is None or not inspect.isawaitable(result):
            return result

        async def awaited() -> Any:
            return await result

        return self.runner.run(awaited())

    def driver(self, dsn: Any, args: Any = None, **options: Any) -> Any:
        kind = PsycopgDriver if self.runner is None else AsyncPsycopgDriver
        return kind(dsn, {} if args is None else args, PoolOptions(**options))

    def psycopg(self, name: str) -> Any:
        """A class of psycopg's, in this colour."""
        return getattr(psycopg, name if self.runner is None else f"Async{name}")

    @contextlib.contextmanager
    def block(self, manager: Any) -> Iterator[Any]:
        """`with manager` or `async with manager`."""
        if self.runner is None:
            with manager as value:
                yield value
            return
        value = self.do(manager.__aenter__())
        try:
            yield value
        except BaseException as error:
            if not self.do(manager.__aexit__(type(error), error, error.__traceback__)):
                raise
        else:
            self.do(manager.__aexit__(None, None, None))

    def each(self, iterable: Any) -> list[Any]:
        if self.runner is None:
            return list(iterable)

        async def gather() -> list[Any]:
            return [item async for item in iterable]

        return list(self.do(gather()))

    def step(self, iterator: Any) -> Any:
        return next(iterator) if self.runner is None else self.do(iterator.__anext__())

    @contextlib.contextmanager
    def opened(self, dsn: Any, args: Any = None, **options: Any) -> Iterator[tuple[Any, Any]]:
        driver = self.driver(dsn, args, **options)
        conn = self.do(driver.connect(5))
        try:
            yield driver, conn
        finally:
            self.do(driver.close(conn, None, 5))

    def value(self, conn: Any, text: str, params: Any = None) -> Any:
        row = self.do(self.do(conn.execute(text, params)).fetchone())
        return None if row is None else row[0]


@pytest.fixture(params=["sync", "async"])
def kit(request: pytest.FixtureRequest) -> Iterator[Kit]:
    if request.param == "sync":
        yield Kit("sync")
    else:
        with asyncio.Runner() as runner:
            yield Kit("async", runner)


@pytest.fixture(scope="module")
def database(pg18: embedded.Postgres) -> Iterator[str]:
    """One for all tests of this file (a new one costs more than most of them); no test leaves a table."""
    with fresh_database(pg18) as name:
        yield pg18.dsn_for(database=name)


@pytest.fixture(autouse=True)
def _no_connection_left(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "database" in request.fixturenames:
        database = request.getfixturevalue("database")
        wait_until(lambda: not _watch(database), what="no connection is left behind")


@pytest.fixture
def recorder(database: str) -> Iterator[WireRecorder]:
    with WireRecorder(database) as wire:
        yield wire


# -- every statement is seen --------------------------------------------------------------------------------

Use = Callable[[Kit, Any], Any]


def _executemany(kit: Kit, conn: Any) -> None:
    kit.do(conn.cursor().executemany("SET LOCAL work_mem = '4MB'; ", [(), (), ()]))


def _executemany_returning(kit: Kit, conn: Any) -> None:
    kit.do(conn.cursor().executemany("SELECT %s::int", [(1,), (2,)], returning=True))


def _stream(kit: Kit, conn: Any) -> None:
    assert len(kit.each(conn.cursor().stream("SELECT * FROM generate_series(1, %s)", [30]))) == 30


def _stream_sets(kit: Kit, conn: Any) -> None:
    kit.each(conn.cursor().stream("SELECT set_config('work_mem', %s, false)", ["5MB"]))


def _copy_out(kit: Kit, conn: Any) -> None:
    with kit.block(conn.cursor().copy("COPY (SELECT 1) TO STDOUT")) as copy:
        kit.each(copy)


def _copy_in(kit: Kit, conn: Any) -> None:
    kit.do(conn.execute("CREATE TEMP TABLE fed (n int)"))
    with kit.block(conn.cursor().copy("COPY fed FROM STDIN WHERE n < %s", [10])) as copy:
        for n in range(20):
            kit.do(copy.write_row((n,)))


def _server_cursor(kit: Kit, conn: Any) -> None:
    with kit.block(conn.cursor("mine")) as cursor:
        kit.do(cursor.execute("SELECT * FROM generate_series(1, %s)", [250]))
        kit.do(cursor.fetchmany(3))
        kit.do(cursor.scroll(2))
        assert len(kit.each(cursor)) == 245


def _held_cursor(kit: Kit, conn: Any) -> None:
    with kit.block(conn.cursor("held", withhold=True)) as cursor:
        kit.do(cursor.execute("SELECT 1"))
        kit.do(conn.commit())


def _client_cursor(kit: Kit, conn: Any) -> None:
    kit.do(kit.psycopg("ClientCursor")(conn).execute("SELECT set_config('work_mem', %s, false)", ["5MB"]))


def _raw_cursor(kit: Kit, conn: Any) -> None:
    kit.do(kit.psycopg("RawCursor")(conn).execute("SELECT $1::int", [1]))


def _own_cursor(kit: Kit, conn: Any) -> None:
    kit.do(kit.psycopg("Cursor")(conn).execute("SET work_mem = '5MB'"))


def _own_cursor_stream(kit: Kit, conn: Any) -> None:
    kit.each(kit.psycopg("Cursor")(conn).stream("SELECT pg_advisory_lock(1)"))


def _composed(kit: Kit, conn: Any) -> None:
    kit.do(conn.execute(psql.SQL("SET {} = {}").format(psql.Identifier("work_mem"), psql.Literal("5MB"))))


def _bytes(kit: Kit, conn: Any) -> None:
    kit.do(conn.execute(b"LISTEN news"))


def _binary(kit: Kit, conn: Any) -> None:
    kit.do(conn.execute("SELECT 1", binary=True))


def _prepared(kit: Kit, conn: Any) -> None:
    for _ in range(3):
        kit.do(conn.execute("SELECT %s::int", [1], prepare=True))
    for _ in range(7):
        kit.do(conn.execute("SELECT 7"))


def _evicted(kit: Kit, conn: Any) -> None:
    conn.prepared_max = 1
    for n in range(3):
        kit.do(conn.execute(f"SELECT {n}", prepare=True))


def _rollback_prepared(kit: Kit, conn: Any) -> None:
    kit.do(conn.execute("SELECT 1", prepare=True))
    kit.do(conn.rollback())


def _several(kit: Kit, conn: Any) -> None:
    kit.do(conn.execute("SELECT 1; SET work_mem = '5MB'"))


def _transactions(kit: Kit, conn: Any) -> None:
    with kit.block(conn.transaction()):
        kit.do(conn.execute("SELECT 1"))
        with kit.block(conn.transaction("inner")):
            kit.do(conn.execute("SELECT 2"))
        with kit.block(conn.transaction(force_rollback=True)):
            kit.do(conn.execute("SELECT 3"))


def _commit(kit: Kit, conn: Any) -> None:
    kit.do(conn.execute("SELECT 1"))
    kit.do(conn.commit())
    kit.do(conn.commit())  # nothing to commit: nothing is sent


def _pipeline(kit: Kit, conn: Any) -> None:
    with kit.block(conn.pipeline()) as pipeline:
        for n in range(3):
            kit.do(conn.execute("SELECT %s::int", [n]))
        kit.do(pipeline.sync())
        kit.do(conn.execute("SET work_mem = '5MB'"))


def _two_phase(kit: Kit, conn: Any) -> None:
    kit.do(conn.tpc_begin(conn.xid(1, "one", "two")))
    kit.do(conn.execute("SELECT 1"))
    kit.do(conn.tpc_commit())
    kit.do(conn.tpc_recover())


def _type_info(kit: Kit, conn: Any) -> None:
    assert kit.do(TypeInfo.fetch(conn, "int4")) is not None


def _notifies(kit: Kit, conn: Any) -> None:
    kit.do(conn.set_autocommit(True))
    kit.do(conn.execute("LISTEN news"))
    kit.do(conn.execute("NOTIFY news"))
    assert len(kit.each(conn.notifies(timeout=STATEMENT_TIMEOUT, stop_after=1))) == 1


def _fails(kit: Kit, conn: Any) -> None:
    with pytest.raises(psycopg.errors.DivisionByZero):
        kit.do(conn.execute("SELECT 1/0"))
    kit.do(conn.rollback())


def _fails_to_parse(kit: Kit, conn: Any) -> None:
    with pytest.raises(psycopg.errors.UndefinedColumn):
        kit.do(conn.cursor().execute("SELECT nonsense"))


def _with_connection(kit: Kit, conn: Any) -> None:
    with kit.block(conn):
        kit.do(conn.execute("SELECT 1"))
    assert not conn.closed


USES: list[tuple[Use, int]] = [
    (_executemany, 0),
    (_executemany_returning, 0),
    (_stream, 0),
    (_stream_sets, touch.SETTINGS),
    (_copy_out, 0),
    (_copy_in, touch.TEMP),
    (_server_cursor, 0),
    (_held_cursor, touch.CURSOR),
    (_client_cursor, touch.SETTINGS),
    (_raw_cursor, 0),
    (_own_cursor, touch.SETTINGS),
    (_own_cursor_stream, touch.ADVISORY),
    (_composed, touch.SETTINGS),
    (_bytes, touch.LISTEN),
    (_binary, 0),
    (_prepared, 0),
    (_evicted, 0),
    (_rollback_prepared, 0),
    (_several, touch.SETTINGS),
    (_transactions, 0),
    (_commit, 0),
    (_pipeline, touch.SETTINGS),
    (_two_phase, 0),
    (_type_info, 0),
    (_notifies, touch.LISTEN),
    (_fails, 0),
    (_fails_to_parse, 0),
    (_with_connection, 0),
]


@pytest.mark.parametrize(("use", "touches"), USES, ids=lambda value: getattr(value, "__name__", "")[1:])
def test_every_statement_on_the_wire_was_seen(kit: Kit, recorder: WireRecorder, use: Use, touches: int) -> None:
    with kit.opened(recorder.dsn) as (driver, conn):
        session = driver.session(conn)
        kit.do(conn.execute("SELECT 0"))
        kit.do(conn.rollback())
        driver.settle(conn)
        recorder.clear()
        use(kit, conn)
        # A Parse of its own that fails has no Bind; what is prepared is sent as Parse once and Bind each time.
        assert session.statements == recorder.executions(), recorder.requests
        if not any(request.text.startswith("_pg3_") for request in recorder.requests if request.kind == "B"):
            assert session.last_sql == recorder.texts()[-1]
        assert touch.words(session.touched) == touch.words(touches)
        assert session.query_since_s == 0.0
        assert session.in_query_s > 0.0


def test_every_generator_that_psycopg_waits_for_is_known(kit: Kit, database: str) -> None:
    """A new release of psycopg that adds a method must not silently turn sessions UNKNOWN."""
    with kit.opened(database) as (driver, conn):
        for attribute, value in (("autocommit", True), ("isolation_level", 2), ("read_only", True)):
            kit.do(getattr(conn, f"set_{attribute}")(value))
        kit.do(conn.set_deferrable(True))
        with kit.block(conn.cursor("c", withhold=True)) as cursor:
            kit.do(cursor.execute("SELECT 1"))
            kit.do(cursor.fetchall())
        assert not driver.session(conn).touched & touch.UNKNOWN


def test_a_wait_that_nobody_announced_marks_the_session_unknown(kit: Kit, database: str) -> None:
    with kit.opened(database) as (driver, conn):
        conn.pgconn.send_query(b"SET work_mem = '5MB'")
        kit.do(conn.wait(psycopg.generators.execute(conn.pgconn)))
        assert driver.session(conn).touched == touch.UNKNOWN


def test_text_of_a_client_encoding_is_decoded_by_it(kit: Kit, database: str) -> None:
    with kit.opened(database, {"client_encoding": "latin1", "autocommit": True}) as (driver, conn):
        kit.do(conn.execute("SELECT 'é'"))
        assert driver.session(conn).last_sql == "SELECT 'é'"


def test_the_last_error_of_the_server_is_noted(kit: Kit, database: str) -> None:
    with kit.opened(database) as (driver, conn):
        with pytest.raises(psycopg.errors.UndefinedTable):
            kit.do(conn.execute("SELECT * FROM nowhere"))
        assert driver.session(conn).sqlstate == "42P01"


# -- client-side attributes ---------------------------------------------------------------------------------


def _nothing(*_: Any) -> None: ...


class _Dumper(StrDumper):
    def dump(self, obj: Any) -> bytes:
        return b"leaked"


CHANGES: dict[str, tuple[Callable[[Kit, Any], Any], Callable[[Any], Any]]] = {
    "autocommit": (lambda kit, c: kit.do(c.set_autocommit(True)), lambda c: c.autocommit),
    "isolation_level": (lambda kit, c: kit.do(c.set_isolation_level(4)), lambda c: c.isolation_level),
    "read_only": (lambda kit, c: kit.do(c.set_read_only(True)), lambda c: c.read_only),
    "deferrable": (lambda kit, c: kit.do(c.set_deferrable(True)), lambda c: c.deferrable),
    "row_factory": (lambda kit, c: setattr(c, "row_factory", dict_row), lambda c: c.row_factory),
    "cursor_factory": (
        lambda kit, c: setattr(c, "cursor_factory", kit.psycopg("ClientCursor")),
        lambda c: c.cursor_factory,
    ),
    "server_cursor_factory": (
        lambda kit, c: setattr(c, "server_cursor_factory", kit.psycopg("RawServerCursor")),
        lambda c: c.server_cursor_factory,
    ),
    "prepare_threshold": (
        lambda kit, c: setattr(c, "prepare_threshold", None),
        lambda c: c.prepare_threshold,
    ),
    "prepared_max": (lambda kit, c: setattr(c, "prepared_max", 1), lambda c: c.prepared_max),
    "notice_handler": (lambda kit, c: c.add_notice_handler(_nothing), lambda c: list(c._notice_handlers)),
    "notify_handler": (lambda kit, c: c.add_notify_handler(_nothing), lambda c: list(c._notify_handlers)),
    "dumper": (
        lambda kit, c: c.adapters.register_dumper(str, _Dumper),
        lambda c: c.adapters.get_dumper(str, psycopg.adapt.PyFormat.TEXT),
    ),
    "loader": (
        lambda kit, c: c.adapters.register_loader("int4", psycopg.types.string.TextLoader),
        lambda c: c.adapters.get_loader(23, psycopg.pq.Format.TEXT),
    ),
    "type": (lambda kit, c: c.adapters.types.add(TypeInfo("odd", 4711, 0)), lambda c: c.adapters.types.get(4711)),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_attribute_is_noticed_and_does_not_reach_the_next_borrower(
    kit: Kit, database: str, name: str
) -> None:
    change, look = CHANGES[name]
    with kit.opened(database) as (driver, conn):
        kit.do(conn.execute("SELECT 1"))
        kit.do(conn.rollback())
        before = look(conn)
        assert driver.session(conn).attributes is False
        change(kit, conn)
        assert look(conn) != before
        assert driver.session(conn).attributes is True
        driver.tidy(conn)
        assert look(conn) == before
        assert driver.session(conn).attributes is False


def test_what_the_configure_hook_set_is_the_base(kit: Kit, database: str) -> None:
    with kit.opened(database) as (driver, conn):
        conn.row_factory = dict_row
        kit.do(conn.set_autocommit(True))
        conn.adapters.register_dumper(str, _Dumper)
        kit.do(conn.execute("SET work_mem = '5MB'"))
        driver.settle(conn)
        session = driver.session(conn)
        assert (session.touched, session.attributes, session.statements) == (0, False, 0)
        conn.row_factory = psycopg.rows.tuple_row
        driver.tidy(conn)
        assert conn.autocommit is True
        assert kit.do(driver.fetch_one(conn, "SELECT %s AS a", ["x"])) == {"a": "leaked"}


# -- reset --------------------------------------------------------------------------------------------------

DIRTY = """
    SET work_mem = '5MB'; SET search_path = public; LISTEN news;
    PREPARE mine AS SELECT 1; SELECT pg_advisory_lock(42);
    CREATE TEMP TABLE scratch (n serial); INSERT INTO scratch DEFAULT VALUES;
    DECLARE held CURSOR WITH HOLD FOR SELECT 1;
"""
STATE = """
    SELECT current_setting('work_mem'), current_setting('search_path'), current_user, session_user,
        (SELECT count(*) FROM pg_listening_channels()),
        (SELECT count(*) FROM pg_prepared_statements WHERE from_sql),
        (SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid()),
        to_regclass('pg_temp.scratch'), (SELECT count(*) FROM pg_cursors WHERE is_holdable)
"""


@pytest.mark.parametrize("args", [{}, {"options": "-c default_transaction_read_only=on"}], ids=["", "read only"])
def test_reset_undoes_what_was_touched_in_one_round_trip(
    kit: Kit, pg: embedded.Postgres, args: dict[str, Any]
) -> None:
    """As a role without privileges, also where transactions are read only by default."""
    with fresh_database(pg) as name, WireRecorder(pg.dsn_for(database=name)) as wire:
        with kit.opened(wire.dsn, {**args, "autocommit": True}) as (driver, conn):
            state = kit.do(driver.fetch_one(conn, STATE, None))
            kit.do(conn.execute("BEGIN READ WRITE; " + DIRTY + "COMMIT"))
            assert kit.do(driver.fetch_one(conn, STATE, None)) != state
            session = driver.session(conn)
            assert session.touched & touch.LISTEN
            wire.clear()
            kit.do(driver.reset(conn, session.touched, 5))
            assert wire.round_trips() == 1
            assert session.touched == 0
            assert kit.do(driver.fetch_one(conn, STATE, None)) == state
            with pytest.raises(psycopg.errors.ObjectNotInPrerequisiteState):
                kit.do(conn.execute("SELECT lastval()"))


def test_reset_ends_an_open_transaction_in_the_same_round_trip(kit: Kit, recorder: WireRecorder) -> None:
    with kit.opened(recorder.dsn) as (driver, conn):
        kit.do(conn.execute("SET work_mem = '5MB'"))
        assert driver.condition(conn) == base.IN_TRANSACTION
        recorder.clear()
        kit.do(driver.reset(conn, driver.session(conn).touched, 5))
        assert recorder.round_trips() == 1
        assert driver.condition(conn) == base.IDLE


def test_reset_returns_from_another_role(kit: Kit, pg18: embedded.Postgres, database: str) -> None:
    superuser = pg18.dsn_for(user="postgres", database=psycopg.conninfo.conninfo_to_dict(database)["dbname"])
    with kit.opened(superuser, {"autocommit": True}) as (driver, conn):
        state = kit.do(driver.fetch_one(conn, STATE, None))
        kit.do(conn.execute("SET SESSION AUTHORIZATION app; SET ROLE app; SET work_mem = '5MB'"))
        kit.do(driver.reset(conn, driver.session(conn).touched, 5))
        assert kit.do(driver.fetch_one(conn, STATE, None)) == state


def test_reset_leaves_the_statements_that_the_driver_prepared(kit: Kit, recorder: WireRecorder) -> None:
    with kit.opened(recorder.dsn, {"autocommit": True}) as (driver, conn):
        kit.do(conn.execute("SELECT %s::int", [1], prepare=True))
        kit.do(conn.execute('PREPARE "My One" AS SELECT 1'))
        kit.do(driver.reset(conn, driver.session(conn).touched, 5))
        recorder.clear()
        assert kit.value(conn, "SELECT %s::int", [2]) == 2
        assert [request.kind for request in recorder.requests] == ["B", "D", "E", "S"]
        assert kit.value(conn, "SELECT count(*) FROM pg_prepared_statements WHERE from_sql") == 0


def test_a_temporary_table_leaves_no_prepared_statement_that_knew_its_columns(kit: Kit, database: str) -> None:
    with kit.opened(database, {"autocommit": True}) as (driver, conn):
        kit.do(conn.execute("CREATE TABLE shared (a text)"))
        kit.do(conn.execute("CREATE TEMP TABLE shared (b int, c int)"))
        kit.do(conn.execute("SELECT * FROM shared", prepare=True))
        kit.do(driver.reset(conn, driver.session(conn).touched, 5))
        assert kit.do(driver.fetch_all(conn, "SELECT * FROM shared", None)) == []
        kit.do(conn.execute("DROP TABLE shared"))


def test_reset_runs_init_query_again_when_it_was_undone(kit: Kit, database: str) -> None:
    with kit.opened(database, {"autocommit": True}, init_query="SET work_mem = '6MB'") as (driver, conn):
        assert driver.session(conn).touched == 0
        kit.do(conn.execute("SET work_mem = '5MB'"))
        kit.do(driver.reset(conn, driver.session(conn).touched, 5))
        assert kit.do(driver.fetch_value(conn, "SHOW work_mem", None)) == "6MB"


def test_reset_always_undoes_what_nobody_saw(kit: Kit, database: str) -> None:
    with kit.opened(database, {"autocommit": True}, reset="always") as (driver, conn):
        conn.pgconn.exec_(b"SET work_mem = '5MB'")
        kit.do(driver.reset(conn, 0, 5))
        assert kit.do(driver.fetch_value(conn, "SHOW work_mem", None)) == "4MB"


def test_reset_never_only_rolls_back(kit: Kit, recorder: WireRecorder) -> None:
    with kit.opened(recorder.dsn, reset="never") as (driver, conn):
        kit.do(conn.execute("SET work_mem = '5MB'"))
        recorder.clear()
        kit.do(driver.reset(conn, driver.session(conn).touched, 5))
        assert recorder.texts() == ["ROLLBACK"]


def test_reset_refuses_what_no_statement_undoes(kit: Kit, database: str) -> None:
    with kit.opened(database) as (driver, conn):
        with pytest.raises(base.CannotReset):
            kit.do(driver.reset(conn, touch.LOAD, 5))
        assert driver.failure(base.CannotReset()) == (Failure.PRIVATE, "")


def test_notifications_for_the_last_borrower_are_dropped(kit: Kit, database: str) -> None:
    with kit.opened(database, {"autocommit": True}) as (driver, conn):
        kit.do(conn.execute("LISTEN news; NOTIFY news"))
        kit.do(conn.execute("SELECT 1"))
        kit.do(driver.reset(conn, driver.session(conn).touched, 5))
        assert kit.each(conn.notifies(timeout=0)) == []


def test_reset_stops_a_query_that_still_runs(kit: Kit, database: str) -> None:
    with kit.opened(database) as (driver, conn):
        conn.pgconn.send_query(b"SELECT pg_sleep(60)")
        assert driver.condition(conn) == base.BUSY
        kit.do(driver.reset(conn, 0, 5))
        assert driver.condition(conn) == base.IDLE
        assert kit.do(driver.fetch_value(conn, "SELECT 7", None)) == 7


@pytest.mark.parametrize("direction", ["FROM STDIN", "TO STDOUT"])
def test_reset_ends_a_copy(kit: Kit, database: str, direction: str) -> None:
    with kit.opened(database, {"autocommit": True}) as (driver, conn):
        kit.do(conn.execute("CREATE TEMP TABLE t AS SELECT g FROM generate_series(1, 100000) g"))
        conn.pgconn.exec_(f"COPY t {direction}".encode())
        assert driver.condition(conn) == base.BUSY
        kit.do(driver.reset(conn, 0, 5))
        assert kit.do(driver.fetch_value(conn, "SELECT count(*) FROM t", None)) == 100_000


def test_a_stream_that_the_borrower_still_holds_cannot_be_reset_and_blocks_nobody(kit: Kit, database: str) -> None:
    with kit.opened(database) as (driver, conn):
        stream = conn.cursor().stream("SELECT generate_series(1, 100000)")
        kit.step(stream)
        assert driver.condition(conn) == base.BUSY
        with pytest.raises(psycopg.ProgrammingError, match="still open"):
            kit.do(driver.leave(conn, False))
        kit.do(driver.leave(conn, True))
        with pytest.raises(base.CannotReset, match="still open"):
            kit.do(driver.reset(conn, 0, 5))
        kit.do(stream.close() if kit.runner is None else stream.aclose())


def test_a_pipeline_that_was_not_ended_cannot_be_reset(kit: Kit, database: str) -> None:
    with kit.opened(database) as (driver, conn), kit.block(conn.pipeline()):
        assert driver.condition(conn) == base.BUSY
        with pytest.raises(base.CannotReset, match="pipeline"):
            kit.do(driver.reset(conn, 0, 5))


def test_a_two_phase_transaction_does_not_block_the_next_borrower(kit: Kit, database: str) -> None:
    with kit.opened(database) as (driver, conn):
        kit.do(conn.tpc_begin(conn.xid(1, "one", "two")))
        kit.do(conn.execute("SELECT 1"))
        kit.do(driver.reset(conn, 0, 5))
        kit.do(conn.execute("SELECT 1"))
        kit.do(conn.commit())


def test_a_transaction_block_left_open_does_not_block_the_next_borrower(kit: Kit, database: str) -> None:
    with kit.opened(database) as (driver, conn):
        kit.do(driver.begin(conn))
        kit.do(driver.reset(conn, 0, 5))
        kit.do(conn.execute("SELECT 1"))
        kit.do(conn.commit())


# -- a primary that became a standby ------------------------------------------------------------------------


class _Liar:
    """A relay that says of a standby that it is none, as a stale answer of a load balancer would."""

    def __init__(self, port: int) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._port = port
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        with self._listener, self._listener.accept()[0] as client:
            with socket.create_connection(("127.0.0.1", self._port)) as server:
                other = threading.Thread(target=self._pump, args=(client, server), daemon=True)
                other.start()
                self._pump(server, client)
                other.join(5)

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data.replace(b"in_hot_standby\0on\0", b"in_hot_standby\0no\0"))
            sink.shutdown(socket.SHUT_WR)

    def join(self) -> None:
        self._thread.join(5)


def test_a_connection_to_what_is_a_standby_now_fails_its_reset(kit: Kit) -> None:
    with embedded.Postgres(18) as server:
        server.stop()
        (server.data_dir / "standby.signal").touch()
        server.start()
        relay = _Liar(server.port)
        args = {"port": relay.port, "target_session_attrs": "primary", "sslmode": "disable", "autocommit": True}
        with kit.opened(server.dsn, args) as (driver, conn):
            session = driver.session(conn)
            with pytest.raises(psycopg.errors.ReadOnlySqlTransaction):
                kit.do(conn.execute("CREATE TABLE t ()"))
            assert session.touched
            with pytest.raises(NotPrimary) as caught:
                kit.do(driver.reset(conn, session.touched, 5))
            assert driver.failure(caught.value) == (Failure.DESTINATION, "25006")
        relay.join()


def test_a_read_only_transaction_on_a_primary_is_nothing_special(kit: Kit, recorder: WireRecorder) -> None:
    args = {"target_session_attrs": "primary"}
    with kit.opened(recorder.dsn, args) as (driver, conn):
        kit.do(conn.set_read_only(True))
        with pytest.raises(psycopg.errors.ReadOnlySqlTransaction):
            kit.do(conn.execute("CREATE TABLE t ()"))
        for _ in range(2):
            recorder.clear()
            kit.do(driver.reset(conn, driver.session(conn).touched, 5))
        assert recorder.texts() == []  # asked once, and answered


# -- condition, peek, ping, timeouts ------------------------------------------------------------------------


def test_condition_tells_the_state_without_a_round_trip(kit: Kit, recorder: WireRecorder) -> None:
    driver = kit.driver(recorder.dsn)
    conn = kit.do(driver.connect(5))
    recorder.clear()
    assert driver.condition(conn) == base.IDLE
    assert recorder.requests == []
    kit.do(conn.execute("SELECT 1"))
    assert driver.condition(conn) == base.IN_TRANSACTION
    with pytest.raises(psycopg.Error):
        kit.do(conn.execute("nonsense"))
    assert driver.condition(conn) == base.IN_TRANSACTION
    kit.do(conn.rollback())
    assert driver.condition(conn) == base.IDLE
    assert not driver.closed_by_borrower(conn)
    kit.do(conn.close())
    assert driver.condition(conn) == base.BROKEN
    assert driver.closed_by_borrower(conn)
    assert driver.peek(conn) == ""
    kit.do(driver.close(conn, driver.handle(conn), 1))


def test_peek_hears_the_last_word_of_a_server_that_left(kit: Kit, pg18: embedded.Postgres, database: str) -> None:
    with kit.opened(database) as (driver, conn):
        assert driver.peek(conn) is None
        terminate(pg18.superuser_dsn, [conn.info.backend_pid])
        wait_until(lambda: driver.peek(conn) is not None)
        assert driver.peek(conn) == "57P01"
        assert driver.peek(conn) == "57P01"  # nothing was read
        with pytest.raises(psycopg.OperationalError) as caught:
            kit.do(driver.ping(conn, 5))
        assert driver.failure(caught.value) == (Failure.CONNECTION, "57P01")
        assert driver.condition(conn) == base.BROKEN
        assert not driver.closed_by_borrower(conn)


def test_ping_takes_one_round_trip_and_touches_nothing(kit: Kit, recorder: WireRecorder) -> None:
    with kit.opened(recorder.dsn) as (driver, conn):
        recorder.clear()
        kit.do(driver.ping(conn, 5))
        assert recorder.round_trips() == 1
        session = driver.session(conn)
        assert (driver.condition(conn), session.touched, session.statements) == (base.IDLE, 0, 0)


@pytest.mark.parametrize("what", ["ping", "reset"])
def test_a_peer_that_does_not_answer_ends_in_an_error_in_time(kit: Kit, database: str, what: str) -> None:
    driver = kit.driver(database)
    conn = kit.do(driver.connect(5))
    pid = conn.info.backend_pid
    os.kill(pid, signal.SIGSTOP)
    try:
        started = time.monotonic()
        with pytest.raises(psycopg.OperationalError, match="in time") as caught:
            kit.do(driver.ping(conn, 0.2) if what == "ping" else driver.reset(conn, touch.SETTINGS, 0.2))
        assert time.monotonic() - started < 3
        assert driver.failure(caught.value) == (Failure.CONNECTION, "")
        assert driver.condition(conn) == base.BUSY
    finally:
        os.kill(pid, signal.SIGCONT)
        kit.do(driver.close(conn, None, 5))


def test_a_query_is_cancelled_from_another_thread(database: str) -> None:
    kit = Kit("sync")
    with kit.opened(database) as (driver, conn):
        session = driver.session(conn)

        ended = threading.Event()

        def cancel() -> None:
            wait_until(lambda: session.query_since_s and session.last_sql.startswith("SELECT pg_sleep"))
            while not ended.is_set():  # a cancel may arrive before the query, and is nothing then
                driver.cancel(conn)
                ended.wait(0.1)

        thread = threading.Thread(target=cancel)
        thread.start()
        with pytest.raises(psycopg.errors.QueryCanceled):
            conn.execute("SELECT pg_sleep(60)")
        ended.set()
        thread.join()


def test_a_query_is_cancelled_by_another_task(database: str) -> None:
    async def scenario() -> None:
        driver = AsyncPsycopgDriver(database, {}, PoolOptions())
        conn = await driver.connect(5)
        task = asyncio.create_task(conn.execute("SELECT pg_sleep(60)"))
        while not driver.session(conn).query_since_s:  # noqa: ASYNC110  (nothing tells)
            await asyncio.sleep(0)
        while not task.done():  # a cancel may arrive before the query, and is nothing then
            await driver.cancel(conn)
            await asyncio.wait({task}, timeout=0.1)
        with pytest.raises(psycopg.errors.QueryCanceled):
            await task
        await driver.close(conn, None, 5)

    asyncio.run(scenario())


# -- closing ------------------------------------------------------------------------------------------------


def _watch(dsn: str) -> list[int]:
    name = str(psycopg.conninfo.conninfo_to_dict(dsn)["dbname"])
    return backends(dsn, database=name)


def test_close_returns_when_the_server_has_let_go(kit: Kit, database: str) -> None:
    for busy in (False, True):
        driver = kit.driver(database)
        conn = kit.do(driver.connect(5))
        if busy:
            conn.pgconn.send_query(b"SELECT pg_sleep(60)")
        pid = conn.info.backend_pid
        kit.do(driver.close(conn, driver.handle(conn), 5))
        assert pid not in _watch(database)


def test_a_dropped_connection_is_noticed_at_once_and_closed_by_its_handle(kit: Kit, database: str) -> None:
    driver = kit.driver(database)
    conn = kit.do(driver.connect(5))
    kit.do(conn.execute("SELECT 1"))
    with kit.block(conn.transaction()):
        kit.do(conn.execute("SELECT 1"))
    conn.adapters.register_dumper(str, _Dumper)
    pid, handle, ref = conn.info.backend_pid, driver.handle(conn), weakref.ref(conn)
    gc.disable()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            del conn
        assert ref() is None
    finally:
        gc.enable()
    assert pid in _watch(database)
    kit.do(driver.close(None, handle, 5))
    assert pid not in _watch(database)


def test_cut_ends_a_borrower_that_waits_for_the_server(pg18: embedded.Postgres, database: str) -> None:
    kit = Kit("sync")
    with kit.opened(database) as (driver, conn):
        session, pid = driver.session(conn), conn.info.backend_pid

        def cut() -> None:
            wait_until(lambda: session.last_sql.startswith("SELECT pg_sleep"))
            driver.cut(conn)

        thread = threading.Thread(target=cut)
        thread.start()
        with pytest.raises(psycopg.OperationalError):
            conn.execute("SELECT pg_sleep(60)")
        thread.join()
        assert driver.condition(conn) == base.BROKEN
        assert not driver.closed_by_borrower(conn)
    terminate(pg18.superuser_dsn, [pid])  # a server that computes does not look at its socket


def test_a_forked_child_gives_up_a_connection_without_a_byte(kit: Kit, recorder: WireRecorder) -> None:
    with kit.opened(recorder.dsn) as (driver, conn):
        recorder.clear()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # 3.12: this process has threads
            child = os.fork()
        if child == 0:
            code = 1
            try:
                driver.disown(conn)
                driver.disown(conn)
                code = 0 if driver.condition(conn) == base.BROKEN else 2
                del conn
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert kit.do(driver.fetch_value(conn, "SELECT 7", None)) == 7
        assert recorder.executions() == 1
        assert all(request.kind != "X" for request in recorder.requests)


# -- failures -----------------------------------------------------------------------------------------------


def _refusal(kit: Kit, dsn: Any, args: Any = None, timeout_s: float = 5) -> tuple[Failure, str, Any]:
    driver = kit.driver(dsn, args)
    with pytest.raises(psycopg.OperationalError) as caught:
        kit.do(driver.connect(timeout_s))
    return *driver.failure(caught.value), caught.value


@pytest.fixture(scope="module")
def small() -> Iterator[embedded.Postgres]:
    """A server with few places."""
    settings = {"max_connections": 5, "superuser_reserved_connections": 1, "reserved_connections": 0}
    with embedded.Postgres(18, settings=settings) as server:
        yield server


def test_what_the_server_says_at_the_door_is_understood(kit: Kit, pg: embedded.Postgres) -> None:
    assert _refusal(kit, pg.dsn_for(password="wrong"))[:2] == (Failure.PERMANENT, "28P01")
    assert _refusal(kit, pg.dsn_for(user="nobody"))[:2] == (Failure.PERMANENT, "28P01")
    failure, sqlstate, error = _refusal(kit, pg.dsn_for(database="nowhere"))
    assert (failure, sqlstate, error.sqlstate) == (Failure.PERMANENT, "3D000", "3D000")
    assert 'database "nowhere" does not exist' in str(error)
    assert _refusal(kit, pg.dsn, {"options": "-c no_such_setting=1"})[:2] == (Failure.PERMANENT, "42704")


def test_a_full_server_is_a_temporary_failure(kit: Kit, small: embedded.Postgres) -> None:
    with contextlib.ExitStack() as stack:

        def takes_a_seat() -> bool:
            with contextlib.suppress(psycopg.OperationalError):  # whoever sat there may be about to leave
                stack.enter_context(psycopg.connect(small.dsn))
                return True
            return False

        for _ in range(4):
            wait_until(takes_a_seat)
        assert _refusal(kit, small.dsn)[:2] == (Failure.TEMPORARY, "53300")
    wait_until(lambda: not _watch(small.dsn))


def test_a_server_that_shuts_down_is_a_failed_destination(kit: Kit) -> None:
    with embedded.Postgres(18) as server, psycopg.connect(server.dsn):
        postmaster = int((server.data_dir / "postmaster.pid").read_text().splitlines()[0])
        os.kill(postmaster, signal.SIGTERM)  # smart: waits for us, and lets nobody in
        wait_until(lambda: "smart shutdown" in server.log())
        assert _refusal(kit, server.dsn)[:2] == (Failure.DESTINATION, "57P03")


def test_a_refused_port_is_a_failed_destination(kit: Kit) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    assert _refusal(kit, f"host=127.0.0.1 port={port}")[:2] == (Failure.DESTINATION, "")


def test_an_unknown_host_is_a_failed_destination(kit: Kit) -> None:
    assert _refusal(kit, "host=nowhere.invalid")[:2] == (Failure.DESTINATION, "")


def test_a_server_that_never_answers_is_a_failed_destination_in_time(kit: Kit) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        started = time.monotonic()
        failure, sqlstate, error = _refusal(kit, f"host=127.0.0.1 port={port}", timeout_s=0.3)
        assert time.monotonic() - started < 3
        assert (failure, sqlstate) == (Failure.DESTINATION, "")
        assert isinstance(error, psycopg.errors.ConnectionTimeout)


def test_a_host_that_never_answers_leaves_time_for_the_next(database: str) -> None:
    kit = Kit("sync")  # it takes 2 s, and both colours share what it tests
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent_port = silent.getsockname()[1]
        port = psycopg.conninfo.conninfo_to_dict(database)["port"]
        args = {"host": "127.0.0.1,127.0.0.1", "port": f"{silent_port},{port}"}
        driver = kit.driver(database, args)
        conn = kit.do(driver.connect(4))
        assert kit.do(driver.fetch_value(conn, "SELECT 1", None)) == 1
        kit.do(driver.close(conn, None, 5))


def test_a_failing_init_query_leaves_no_connection_behind(kit: Kit, database: str) -> None:
    driver = kit.driver(database, init_query="SELECT * FROM nowhere")
    with pytest.raises(psycopg.errors.UndefinedTable):
        kit.do(driver.connect(5))
    wait_until(lambda: not _watch(database))


@pytest.mark.parametrize(
    ("dsn", "args"),
    [("host=x nonsense", {}), ("hots=x", {}), ("host=x", {"connection_class": object}), (7, {}), ("", 7)],
)
def test_a_connection_string_that_cannot_be_read_is_refused_without_io(kit: Kit, dsn: Any, args: Any) -> None:
    with pytest.raises(ConfigError):
        kit.driver(dsn, args)


def test_errors_of_hooks_say_nothing_of_the_destination(kit: Kit, database: str) -> None:
    driver = kit.driver(database)
    assert driver.failure(ValueError()) == (Failure.PRIVATE, "")
    assert driver.failure(psycopg.ProgrammingError()) == (Failure.PRIVATE, "")
    assert driver.failure(psycopg.errors.ReadOnlySqlTransaction()) == (Failure.PRIVATE, "25006")


# -- credentials --------------------------------------------------------------------------------------------


def test_credentials_are_asked_for_at_each_dial_and_once_more_when_refused(
    kit: Kit, pg18: embedded.Postgres
) -> None:
    answers = [pg18.dsn_for(password="old"), pg18.dsn, pg18.dsn_for(password="old"), pg18.dsn_for(password="old")]
    asked: list[str] = []

    def dsn() -> str:
        asked.append(answers[len(asked)])
        return asked[-1]

    async def dsn_async() -> str:
        return dsn()

    driver = kit.driver(dsn if kit.runner is None else dsn_async, lambda: {"autocommit": True})
    conn = kit.do(driver.connect(5))
    assert conn.autocommit is True
    assert len(asked) == 2
    kit.do(driver.close(conn, None, 5))
    with pytest.raises(psycopg.OperationalError) as caught:
        kit.do(driver.connect(5))
    assert driver.failure(caught.value) == (Failure.PERMANENT, "28P01")
    assert len(asked) == 4


# -- one statement, transactions, leaving -------------------------------------------------------------------


@pytest.mark.parametrize("autocommit", [True, False])
def test_one_statement_takes_one_round_trip_and_leaves_no_transaction(
    kit: Kit, recorder: WireRecorder, autocommit: bool
) -> None:
    with kit.opened(recorder.dsn, {"autocommit": autocommit, "row_factory": dict_row}) as (driver, conn):
        recorder.clear()
        assert kit.do(driver.fetch_value(conn, "SELECT %s::int AS a, 2 AS b", [1])) == 1
        assert kit.do(driver.fetch_one(conn, "SELECT %(x)s::int AS a", {"x": 3})) == {"a": 3}
        assert kit.do(driver.fetch_all(conn, "SELECT 1 AS a", None)) == [{"a": 1}]
        assert kit.do(driver.fetch_value(conn, "SELECT 1 WHERE false", None)) is None
        assert kit.do(driver.fetch_one(conn, "SELECT 1 WHERE false", None)) is None
        assert kit.do(driver.execute(conn, "CREATE TEMP TABLE t (n int)", None)) == -1
        assert kit.do(driver.execute(conn, "INSERT INTO t VALUES (1), (2)", None)) == 2
        with pytest.raises(psycopg.errors.DivisionByZero):
            kit.do(driver.execute(conn, "SELECT 1/0", None))
        assert recorder.round_trips() == 8
        assert driver.condition(conn) == base.IDLE
        assert conn.autocommit is autocommit
        assert driver.session(conn).attributes is False


@pytest.mark.parametrize("autocommit", [True, False])
def test_a_transaction_block_is_begin_and_commit_around_it(
    kit: Kit, recorder: WireRecorder, autocommit: bool
) -> None:
    with kit.opened(recorder.dsn, {"autocommit": autocommit}) as (driver, conn):
        recorder.clear()
        kit.do(driver.begin(conn))
        kit.do(conn.execute("CREATE TEMP TABLE t (n int)"))
        with kit.block(conn.transaction()):
            kit.do(conn.execute("SELECT 1"))
        with pytest.raises(psycopg.ProgrammingError, match="forbidden"):
            kit.do(conn.commit())
        kit.do(driver.commit(conn))
        assert [text.split()[0] for text in recorder.texts()] == [
            "BEGIN", "CREATE", "SAVEPOINT", "SELECT", "RELEASE", "COMMIT",
        ]  # fmt: skip
        kit.do(driver.begin(conn))
        kit.do(conn.execute("DROP TABLE t"))
        kit.do(driver.rollback(conn))
        assert recorder.texts()[-1] == "ROLLBACK"
        assert driver.condition(conn) == base.IDLE
        assert kit.do(driver.fetch_value(conn, "SELECT count(*) FROM t", None)) == 0


def test_commit_on_a_lost_connection_is_an_error(kit: Kit, pg18: embedded.Postgres, database: str) -> None:
    with kit.opened(database) as (driver, conn):
        kit.do(driver.begin(conn))
        terminate(pg18.superuser_dsn, [conn.info.backend_pid])
        with pytest.raises(psycopg.OperationalError):
            kit.do(conn.execute("SELECT 1"))
        with pytest.raises(psycopg.OperationalError):
            kit.do(driver.commit(conn))
        assert driver.session(conn).sqlstate == "57P01"


def test_leaving_a_block_commits_or_rolls_back_and_sends_nothing_when_idle(
    kit: Kit, recorder: WireRecorder
) -> None:
    with kit.opened(recorder.dsn) as (driver, conn):
        recorder.clear()
        kit.do(driver.leave(conn, False))
        kit.do(driver.leave(conn, True))
        assert recorder.requests == []
        kit.do(conn.execute("SELECT 1"))
        kit.do(driver.leave(conn, False))
        assert recorder.texts() == ["BEGIN", "SELECT 1", "COMMIT"]
        kit.do(conn.execute("SELECT 1"))
        kit.do(driver.leave(conn, True))
        assert recorder.texts()[-1] == "ROLLBACK"
        assert not conn.closed


# -- cancellation (asyncio) ---------------------------------------------------------------------------------


STEPS: dict[str, Callable[[AsyncPsycopgDriver, Any], Any]] = {
    "fetch_value": lambda driver, conn: driver.fetch_value(conn, "SELECT 1", None),
    "begin": lambda driver, conn: driver.begin(conn),
    "ping": lambda driver, conn: driver.ping(conn, 5),
    "reset": lambda driver, conn: driver.reset(conn, touch.SETTINGS, 5),
}


@pytest.mark.parametrize("what", STEPS)
def test_a_cancelled_coroutine_leaves_a_condition_that_is_true(database: str, what: str) -> None:
    """Wherever it was cancelled, the connection says what it is, and a reset makes it usable."""

    async def scenario() -> None:
        driver = AsyncPsycopgDriver(database, {}, PoolOptions())
        conn = await driver.connect(5)
        for step in range(1000):
            task = asyncio.ensure_future(STEPS[what](driver, conn))
            for _ in range(step):
                await asyncio.sleep(0)
            finished = not task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
            assert conn.autocommit is False
            assert driver.session(conn).query_since_s == 0.0
            await driver.reset(conn, driver.session(conn).touched, 5)
            assert driver.condition(conn) == base.IDLE
            assert await driver.fetch_value(conn, "SELECT 7", None) == 7
            if finished:
                break
        assert 0 < step < 999
        await driver.close(conn, None, 5)

    asyncio.run(scenario())


def test_a_cancelled_dial_leaves_no_connection_behind(database: str) -> None:
    async def scenario() -> None:
        driver = AsyncPsycopgDriver(database, {}, PoolOptions(init_query="SELECT pg_sleep(0.01)"))
        for step in range(0, 60, 3):
            task = asyncio.ensure_future(driver.connect(5))
            for _ in range(step):
                await asyncio.sleep(0)
            task.cancel()
            try:
                conn = await task
            except asyncio.CancelledError:
                continue
            await driver.close(conn, None, 5)

    asyncio.run(scenario())
    gc.collect()
    wait_until(lambda: not _watch(database))


def test_a_cancelled_close_leaks_no_descriptor(database: str) -> None:
    async def scenario() -> None:
        driver = AsyncPsycopgDriver(database, {}, PoolOptions())
        conn = await driver.connect(5)
        pid = conn.info.backend_pid
        before = set(os.listdir("/proc/self/fd"))
        os.kill(pid, signal.SIGSTOP)
        try:
            task = asyncio.ensure_future(driver.close(conn, None, 30))
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        finally:
            os.kill(pid, signal.SIGCONT)
        assert len(os.listdir("/proc/self/fd")) < len(before)

    asyncio.run(scenario())


# -- what base.py shares ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "ends", "expected"),
    [
        (b"", False, None),
        (b"", True, ""),
        (b"N\0\0\0\x08SOK\0", False, None),
        (b"N\0\0\0\x08SOK\0", True, ""),
        (b"N\0\0\0\x08SOK\0E\0\0\0\x0cC57P05\0\0", True, "57P05"),
        (b"E\0\0\0\x0cC57P05\0\0", False, "57P05"),
    ],
)
def test_peek_reads_notices_errors_and_the_end_without_taking_them(data: bytes, ends: bool, expected: Any) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(data)
        if ends:
            theirs.close()
        assert base.peek_socket(ours.fileno(), encrypted=False) == expected
        assert base.peek_socket(ours.fileno(), encrypted=True) == ("" if ends else None)
        if data:
            assert ours.recv(100) == data


def test_await_eof_tells_the_peer_and_gives_up_in_time() -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        assert base.await_eof(os.dup(ours.fileno()), 0.05) is False
        ours.close()
        assert theirs.recv(1) == b""
    ours, theirs = socket.socketpair()
    with ours:
        theirs.sendall(b"rest")
        theirs.close()
        assert base.await_eof(os.dup(ours.fileno()), 5) is True
        assert asyncio.run(base.await_eof_async(os.dup(ours.fileno()), 5)) is True
