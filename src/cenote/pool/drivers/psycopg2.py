"""The psycopg2 adapter: leases are `psycopg2.extensions.connection` objects whose cursors note statements.

Cursors get their statement from Python, everything below is C: so each cursor that a lease hands out is of a
subclass, of whatever class was asked for. It refuses to guess what C hides. A cursor built by hand
(`psycopg2.extensions.cursor(conn)`) is not seen: use `conn.cursor(cursor_factory=...)`. What psycopg2 sends
of itself (BEGIN, COMMIT, ROLLBACK, the FETCH and CLOSE of a named cursor, large objects) touches no session
state and is not counted. Cursors and the connection itself are not guarded against use after release.

psycopg2 has no timeouts. Where one is due a timer shuts the socket down, which ends the call with an error;
opening relies on libpq's connect_timeout, which counts whole seconds, two at least, for each address.
"""

import datetime
import decimal
import functools
import math
import os
import re
import socket
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from cenote.config import PoolOptions
from cenote.errors import ConfigError, MissingDependency
from cenote.pool.drivers import base
from cenote.pool.drivers.base import BROKEN, BUSY, IDLE, IN_TRANSACTION, CannotReset
from cenote.reasons import Failure, failure_of
from cenote.sql import touch
from cenote.sql.classify import classify

try:
    import psycopg2
    from psycopg2 import extensions
    from psycopg2.sql import Composable
except ImportError as missing:
    raise MissingDependency('psycopg2 is not installed: pip install "cenote[psycopg2]"') from missing

_Connection: Any = extensions.connection
_Cursor: Any = extensions.cursor

# (autocommit, (isolation level, readonly, deferrable)) as psycopg2 starts with.
_LEVELS = (None, None, None)
_WATCHED_ATTRIBUTES = frozenset(
    ("autocommit", "isolation_level", "readonly", "deferrable", "cursor_factory", "notices", "notifies")
)

# Parameters of these types become one literal each, whatever their value; of others (AsIs, Json, one's own
# adapters) the text that is sent is read instead of the template.
_LITERALS = frozenset(
    (
        *(type(None), bool, int, float, str, bytes, memoryview, decimal.Decimal, uuid.UUID),
        *(datetime.date, datetime.time, datetime.datetime, datetime.timedelta),
    )
)


class _Session(base.Session):
    """What is known of one connection."""

    __slots__ = ("base", "base_touched", "born", "cancelling")

    def __init__(self) -> None:
        super().__init__()
        self.cancelling = threading.Lock()  # held while a cancel request is on its way
        self.base_touched = 0
        self.born = self.base = _Attributes()

    def executes(self, text: str) -> None:
        """Note a statement that is about to be sent."""
        self.last_sql = text
        self.touched |= classify(text).touches
        self.statements += 1

    @contextmanager
    def timed(self) -> Iterator[None]:
        self.query_starts()
        try:
            yield
        except psycopg2.Error as error:
            self.sqlstate = error.pgcode or ""
            raise
        finally:
            self.query_ends()


class _Attributes:
    """The client-side state of a connection object."""

    __slots__ = ("autocommit", "binary_types", "cursor_factory", "encoding", "levels", "string_types")

    def __init__(self, conn: Any = None) -> None:
        self.autocommit: bool = conn.autocommit if conn else False
        self.levels = _levels(conn) if conn else _LEVELS
        self.cursor_factory = conn.cursor_factory if conn else None
        self.encoding: str = conn.encoding if conn else ""
        self.string_types = dict(conn.string_types) if conn else {}
        self.binary_types = dict(conn.binary_types) if conn else {}


def _levels(conn: Any) -> tuple[Any, Any, Any]:
    return (conn.isolation_level, conn.readonly, conn.deferrable)


@functools.cache
def lease_class(parent: Any) -> Any:
    """The class of leases: `parent` (psycopg2's connection or a subclass of it), watched."""
    plain = parent is _Connection

    class Lease(parent):  # type: ignore[misc]
        """A psycopg2 connection on loan from a pool."""

        __slots__ = ("_cenote",)

        def __init__(self, *args: Any, **more: Any) -> None:
            self._cenote = _Session()
            super().__init__(*args, **more)

        def cursor(self, *args: Any, **how: Any) -> Any:
            if plain and not args and not how and self.cursor_factory is None:
                return super().cursor(cursor_factory=_WatchedCursor)
            cursor = super().cursor(*args, **how)
            if getattr(cursor, "_cenote_watched", False):
                return cursor
            if len(args) > 1 or not isinstance(cursor, _Cursor):
                self._cenote.touched |= touch.UNKNOWN  # not a class we can extend: what it sends is not seen
                return cursor
            # The class is known now; a cursor costs no round trip until it executes.
            return super().cursor(*args, **{**how, "cursor_factory": cursor_class(_class_of(cursor))})

        def __setattr__(self, name: str, value: Any) -> None:
            if name in _WATCHED_ATTRIBUTES:
                with self._characteristics():
                    super().__setattr__(name, value)
            else:
                super().__setattr__(name, value)

        def set_session(self, *args: Any, **how: Any) -> None:
            with self._characteristics():
                super().set_session(*args, **how)

        def set_isolation_level(self, *args: Any) -> None:
            with self._characteristics():
                super().set_isolation_level(*args)

        @contextmanager
        def _characteristics(self) -> Iterator[None]:
            """Around a change of attributes: in autocommit psycopg2 turns transaction levels into settings."""
            before = self.autocommit, _levels(self)
            self._cenote.attributes = True
            try:
                yield
            finally:
                in_autocommit = not self.closed and (before[0] or self.autocommit)
                if in_autocommit and (before[1] != _LEVELS or _levels(self) != _LEVELS):
                    self._cenote.touched |= touch.SETTINGS

        def set_client_encoding(self, *args: Any) -> None:
            self._cenote.attributes = True
            self._cenote.touched |= touch.SETTINGS
            super().set_client_encoding(*args)

        def reset(self) -> None:
            self._cenote.attributes = True
            self._cenote.touched |= touch.SETTINGS | touch.ROLE  # init_query is undone as well
            with self._cenote.timed():
                super().reset()

        def commit(self) -> None:
            with self._cenote.timed():
                super().commit()

        def rollback(self) -> None:
            with self._cenote.timed():
                super().rollback()

        def cancel(self) -> None:
            # A reset waits for this lock: the request must not arrive during the next lease.
            with self._cenote.cancelling:
                super().cancel()

    return Lease


@functools.cache
def cursor_class(parent: Any) -> Any:
    """The class of a lease's cursors: `parent` (psycopg2's cursor or a subclass of it), watched."""

    class Cursor(parent):  # type: ignore[misc]
        """A psycopg2 cursor that notes what it sends."""

        __slots__ = ()
        _cenote_watched = True

        def execute(self, query: Any, vars: Any = None) -> Any:
            session: _Session = self.connection._cenote
            query = _text(self, query)
            if self.name is not None and self.withhold:
                session.touched |= touch.CURSOR
            session.executes(_shown(self, query, vars))
            session.query_starts()  # `timed()` written out: this is the busiest path, and it costs a microsecond
            try:
                return super().execute(query, vars)
            except psycopg2.Error as error:
                session.sqlstate = error.pgcode or ""
                raise
            finally:
                session.query_ends()

        def executemany(self, query: Any, vars_list: Iterable[Any]) -> Any:
            session: _Session = self.connection._cenote
            query = _text(self, query)

            def noted() -> Iterator[Any]:
                for row in vars_list:
                    session.executes(_shown(self, query, row))
                    yield row

            with session.timed():
                return super().executemany(query, noted())

        def callproc(self, procname: str, *parameters: Any) -> Any:
            session: _Session = self.connection._cenote
            session.executes(f"SELECT * FROM {procname}()")
            with session.timed():
                return super().callproc(procname, *parameters)

        def copy_expert(self, sql: Any, *rest: Any, **how: Any) -> Any:
            session: _Session = self.connection._cenote
            sql = _text(self, sql)
            session.executes(_shown(self, sql, None))
            with session.timed():
                return super().copy_expert(sql, *rest, **how)

        def copy_from(self, *args: Any, **how: Any) -> Any:
            session: _Session = self.connection._cenote
            session.executes("COPY FROM STDIN")
            with session.timed():
                return super().copy_from(*args, **how)

        def copy_to(self, *args: Any, **how: Any) -> Any:
            session: _Session = self.connection._cenote
            session.executes("COPY TO STDOUT")
            with session.timed():
                return super().copy_to(*args, **how)

    return Cursor


_WatchedCursor = cursor_class(_Cursor)


def _class_of(cursor: Any) -> Any:
    return type(cursor)


def _text(cursor: Any, query: Any) -> Any:
    return query.as_string(cursor) if isinstance(query, Composable) else query


def _shown(cursor: Any, query: Any, vars: Any) -> str:
    """The text to classify: the template, which repeats, unless a parameter may be more than a literal."""
    if vars is not None and not _only_literals(vars):
        query = cursor.mogrify(query, vars)
    if isinstance(query, bytes):
        return query.decode(extensions.encodings.get(cursor.connection.encoding, "utf-8"), "replace")
    return str(query)


def _only_literals(vars: Any) -> bool:
    if isinstance(vars, Mapping):
        vars = vars.values()
    elif not isinstance(vars, (tuple, list)):
        return False
    for value in vars:
        kind = type(value)
        if kind not in _LITERALS and not (
            kind in (list, tuple) and all(type(item) in _LITERALS for item in value)
        ):
            return False
    return True


# libpq gives no SQLSTATE for an error at connection start, only its message. These are the server's and
# libpq's own words in English; anything else falls to what `failure` says at its end.
_MESSAGES: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), sqlstate)
    for pattern, sqlstate in (
        (r"password authentication failed|no password supplied|empty password", "28P01"),
        (r"authentication failed|no pg_hba\.conf entry|pg_hba\.conf rejects|not permitted to log in", "28000"),
        (r'role "[^\n]*" does not exist', "28000"),
        (r'database "[^\n]*" (does not exist|has disappeared)', "3D000"),
        (r'database "[^\n]*" is not currently accepting connections', "55000"),
        (r"too many (clients|connections)|remaining connection slots are reserved", "53300"),
        (r"database system is (starting up|shutting down|in recovery|not (yet )?accepting conn)", "57P03"),
        (r"terminating connection due to administrator command", "57P01"),
        (r"terminating connection because of crash of another server process", "57P02"),
        (r"terminating connection due to idle-in-transaction timeout", "25P03"),
        (r"terminating connection due to idle-session timeout", "57P05"),
        (r"unrecognized configuration parameter", "42704"),
        (r"invalid value for parameter", "22023"),
        (r"permission denied for database", "42501"),
    )
)
_LOST = re.compile(r"closed the connection|connection (has been|was) closed|already closed|connection not open")
_WRONG_TLS = re.compile(r"certificate|SSL was required|does not support SSL")


def sqlstate_of(message: str) -> str:
    """The SQLSTATE that belongs to an English message of the server at connection start, "" if not known."""
    return next((sqlstate for pattern, sqlstate in _MESSAGES if pattern.search(message)), "")


class _Guard:
    """Bounds a blocking call: after `timeout_s` the connection's socket is shut down, and the call fails.

    Raises `TimeoutError` at the end of the block when it had to; the connection is of no more use then.
    """

    def __init__(self, conn: Any, timeout_s: float, what: str) -> None:
        self._sock = socket.socket(fileno=os.dup(conn.fileno()))
        self._lock = threading.Lock()
        self._over = self._cut = False
        self._says = f"{what}: no answer within {timeout_s:g} s"
        self._timer = threading.Timer(timeout_s, self._shut)
        self._timer.daemon = True

    def __enter__(self) -> None:
        self._timer.start()

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self._timer.cancel()
        with self._lock:
            self._over = True
        self._sock.close()
        if self._cut:
            raise TimeoutError(self._says) from error

    def _shut(self) -> None:
        with self._lock:
            if not self._over:
                self._cut = True
                _shut(self._sock)


class Psycopg2Driver:
    """Implements `base.Driver`."""

    name = "psycopg2"
    weak = True
    cancellable = True

    def __init__(self, dsn: base.Credentials, connect_args: base.ConnectArgs, options: PoolOptions) -> None:
        self._dsn = dsn
        self._connect_args = connect_args
        self._options = options
        self._rotates = callable(dsn) or callable(connect_args)
        if not self._rotates:
            self._arguments(10.0)

    # -- opening ------------------------------------------------------------------------------------------

    def connect(self, timeout_s: float) -> Any:
        try:
            conn = self._dial(timeout_s)
        except psycopg2.OperationalError as error:
            if not self._rotates or not sqlstate_of(str(error)).startswith("28"):
                raise
            conn = self._dial(timeout_s)  # the password may have been changed since it was asked for
        try:
            conn._cenote.born = _Attributes(conn)
            if self._options.init_query:
                with _Guard(conn, timeout_s, "init_query"):
                    _alone(conn, self._options.init_query)
            self.settle(conn)
        except BaseException:
            conn.close()
            raise
        return conn

    def _dial(self, timeout_s: float) -> Any:
        dsn, args = self._arguments(timeout_s)
        parent = args.pop("connection_factory", None) or _Connection
        return psycopg2.connect(dsn, connection_factory=lease_class(parent), **args)

    def _arguments(self, timeout_s: float) -> tuple[str | None, dict[str, Any]]:
        """What psycopg2 is called with.

        :raises ConfigError: it cannot be used, as far as can be told without connecting."""
        dsn: Any = self._dsn() if callable(self._dsn) else self._dsn
        given: Any = self._connect_args() if callable(self._connect_args) else self._connect_args
        args = dict(given or {})
        factory = args.get("connection_factory")
        problems = []
        if args.get("async_") or args.get("async"):
            problems.append("connect_args has async_: a pool needs blocking connections")
        if factory is not None and not (isinstance(factory, type) and issubclass(factory, _Connection)):
            problems.append(f"connection_factory = {factory!r}: must be a subclass of psycopg2's connection")
        texts = {
            name: value
            for name, value in args.items()
            if name not in ("connection_factory", "cursor_factory", "async_", "async")
        }
        try:
            known = extensions.parse_dsn(extensions.make_dsn(dsn, **texts)) if dsn or texts else {}
        except (psycopg2.Error, TypeError) as error:
            problems.append(f"psycopg2 cannot use this DSN or connect_args: {str(error).strip()}")
        if problems:
            raise ConfigError(problems)
        if "connect_timeout" not in known:
            args["connect_timeout"] = max(2, math.ceil(timeout_s))
        return dsn, args

    def settle(self, conn: Any) -> None:
        """What `configure` has done is the base from here on."""
        session = conn._cenote
        session.base = _Attributes(conn)
        session.base_touched = session.touched
        session.touched = 0
        session.attributes = False

    # -- knowing, without I/O -----------------------------------------------------------------------------

    def session(self, conn: Any) -> base.Session:
        return conn._cenote  # type: ignore[no-any-return]

    def handle(self, conn: Any) -> None:
        """None: psycopg2 says Terminate and closes when the object goes."""

    def condition(self, conn: Any) -> int:
        if conn.closed:
            return BROKEN
        session = conn._cenote
        # What no method of ours sees change: registered types, and what the server sent unasked.
        if (
            conn.notices
            or conn.notifies
            or conn.string_types != session.base.string_types
            or conn.binary_types != session.base.binary_types
        ):
            session.attributes = True
        status = conn.get_transaction_status()
        if session.query_since_s or session.cancelling.locked() or status == _STATUS_ACTIVE:
            return BUSY
        if status == _STATUS_UNKNOWN:
            return BROKEN
        # psycopg2's own opinion counts too: it would send no BEGIN for the next borrower.
        idle = status == _STATUS_IDLE and conn.status == extensions.STATUS_READY
        return IDLE if idle else IN_TRANSACTION

    def peek(self, conn: Any) -> str | None:
        if conn.closed:
            return ""
        return base.peek_socket(conn.fileno(), encrypted=conn.info.ssl_in_use)

    def failure(self, error: BaseException) -> tuple[Failure, str]:
        if isinstance(error, psycopg2.Error):
            message = str(error)
            sqlstate = error.pgcode or sqlstate_of(message)
            if sqlstate:
                return failure_of(sqlstate), sqlstate
            if isinstance(error, (psycopg2.OperationalError, psycopg2.InterfaceError)):
                if _WRONG_TLS.search(message):
                    return Failure.PERMANENT, ""
                if _LOST.search(message):
                    return Failure.CONNECTION, ""
                if "FATAL:" in message:
                    return Failure.TEMPORARY, ""  # the server is there, and says what we cannot read
                return Failure.DESTINATION, ""  # refused, unreachable, timeout, no such host
            return Failure.PRIVATE, ""
        if isinstance(error, OSError):
            return Failure.DESTINATION, ""
        return (Failure.PERMANENT if isinstance(error, ConfigError) else Failure.PRIVATE), ""

    # -- returning to the base ----------------------------------------------------------------------------

    def tidy(self, conn: Any) -> None:
        session = conn._cenote
        if conn.autocommit and _levels(conn) != _LEVELS and self._options.reset != "never":
            session.touched |= touch.SETTINGS  # they are settings of the server now: the reset undoes them
            return
        self._restore(conn, session.base)

    def _restore(self, conn: Any, wanted: _Attributes) -> None:
        """Attributes as they were. No round trip unless transaction levels were set in autocommit."""
        if (conn.autocommit, _levels(conn)) != (wanted.autocommit, wanted.levels):
            if _levels(conn) != wanted.levels:
                _Connection.set_session(conn, autocommit=False)
                _Connection.set_session(conn, *("DEFAULT" if each is None else each for each in wanted.levels))
            _set_autocommit(conn, wanted.autocommit)
        _Connection.cursor_factory.__set__(conn, wanted.cursor_factory)
        for now, then in ((conn.string_types, wanted.string_types), (conn.binary_types, wanted.binary_types)):
            now.clear()
            now.update(then)
        if conn.notices:
            conn.notices.clear()
        if conn.notifies:
            conn.notifies.clear()
        conn._cenote.attributes = False

    def reset(self, conn: Any, touched: int, timeout_s: float) -> None:
        session = conn._cenote
        if not session.cancelling.acquire(timeout=timeout_s):
            raise CannotReset(f"a cancel request was not delivered within {timeout_s:g} s")
        session.cancelling.release()
        if self.condition(conn) == BUSY:
            raise CannotReset("another thread is still using the connection")
        with _Guard(conn, timeout_s, "reset"):
            self._reset(conn, session, touched)
        if self.condition(conn) != IDLE:
            raise CannotReset("the session is not idle after its reset")
        session.touched = 0

    def _reset(self, conn: Any, session: _Session, touched: int) -> None:
        if conn.status == extensions.STATUS_PREPARED:
            conn.tpc_rollback()
        _Connection.rollback(conn)
        always = self._options.reset == "always"
        again = bool(touched) or always
        script = ["ROLLBACK"] if conn.get_transaction_status() != _STATUS_IDLE else []
        if self._options.reset != "never":
            if again:
                touched |= session.base_touched & ~touch.LOAD
            if always:
                touched |= touch.ALL & ~touch.LOAD
            script += base.reset_statements(touched, self._options.init_query)
        # After a reset of more than the transaction `configure` runs again, from where it began.
        wanted = session.born if again else session.base
        if conn.encoding != wanted.encoding:
            _Connection.set_client_encoding(conn, wanted.encoding)
        self._restore(conn, wanted)
        if script:
            _alone(conn, "; ".join(script))
            if not conn.get_parameter_status("DateStyle").startswith("ISO"):
                _alone(conn, "SET datestyle TO 'ISO'")  # psycopg2 reads no other; it set it when connecting
            conn.notices.clear()
            conn.notifies.clear()

    def ping(self, conn: Any, timeout_s: float) -> None:
        with _Guard(conn, timeout_s, "ping"):
            _alone(conn, "SELECT 1")

    def cancel(self, conn: Any) -> None:
        if not conn.closed:
            conn.cancel()

    # -- closing ------------------------------------------------------------------------------------------

    def close(self, conn: Any, handle: Any, timeout_s: float) -> None:
        if conn is None or conn.closed:
            return
        last = socket.socket(fileno=os.dup(conn.fileno()))
        if self.condition(conn) == BUSY:
            # close() would wait for the query of the other thread. PQcancel has no timeout: in a thread.
            canceller = threading.Thread(target=_quietly, args=(conn.cancel,), daemon=True)
            canceller.start()
            canceller.join(timeout_s / 2)
            _shut(last)
        _quietly(conn.close)
        base.await_eof(last.detach(), timeout_s)

    def disown(self, conn: Any) -> None:
        # psycopg2 sends nothing from a process that did not open the connection, but keeps the descriptor.
        if conn.closed:
            return
        nothing = os.open(os.devnull, os.O_RDWR)
        os.dup2(nothing, conn.fileno())
        os.close(nothing)

    # -- statements ---------------------------------------------------------------------------------------

    def leave(self, conn: Any, failed: bool) -> None:
        if failed:
            conn.rollback()
        else:
            conn.commit()

    def begin(self, conn: Any) -> None:
        if conn.autocommit:  # else psycopg2 sends BEGIN before the first statement
            conn.cursor().execute("BEGIN")

    def commit(self, conn: Any) -> None:
        if conn.autocommit:
            conn.cursor().execute("COMMIT")
        else:
            conn.commit()

    def rollback(self, conn: Any) -> None:
        if conn.autocommit:
            conn.cursor().execute("ROLLBACK")
        else:
            conn.rollback()

    def execute(self, conn: Any, sql: Any, params: Any) -> int:
        return int(_alone(conn, sql, params, conn.cursor(), _row_count))

    def fetch_all(self, conn: Any, sql: Any, params: Any) -> list[Any]:
        return _alone(conn, sql, params, conn.cursor(), _all) or []

    def fetch_one(self, conn: Any, sql: Any, params: Any) -> Any:
        return _alone(conn, sql, params, conn.cursor(), _one)

    def fetch_value(self, conn: Any, sql: Any, params: Any) -> Any:
        row = _alone(conn, sql, params, _WatchedCursor(conn), _one)
        return None if row is None else row[0]


_STATUS_IDLE = extensions.TRANSACTION_STATUS_IDLE
_STATUS_ACTIVE = extensions.TRANSACTION_STATUS_ACTIVE
_STATUS_UNKNOWN = extensions.TRANSACTION_STATUS_UNKNOWN
_set_autocommit = _Connection.autocommit.__set__  # of the class itself, which notes nothing


def _alone(
    conn: Any, sql: Any, params: Any = None, cursor: Any = None, result: Callable[[Any], Any] | None = None
) -> Any:
    """Run one statement outside a transaction, by `cursor` or by one that notes nothing."""
    if cursor is None:
        cursor = _Cursor(conn)
    # In autocommit with transaction levels psycopg2 would turn them into settings, by a round trip each.
    switch = not conn.autocommit and _levels(conn) == _LEVELS
    if switch:
        _set_autocommit(conn, True)
    try:
        cursor.execute(sql, params)
        answer = result(cursor) if result is not None else None
        if not switch and not conn.autocommit:
            _Connection.commit(conn)
        return answer
    except BaseException:
        if not switch and not conn.closed:
            _Connection.rollback(conn)
        raise
    finally:
        if switch and not conn.closed:
            _set_autocommit(conn, False)


def _row_count(cursor: Any) -> int:
    return cursor.rowcount  # type: ignore[no-any-return]


def _all(cursor: Any) -> Any:
    return cursor.fetchall() if cursor.description is not None else None


def _one(cursor: Any) -> Any:
    return cursor.fetchone() if cursor.description is not None else None


def _shut(sock: socket.socket) -> None:
    try:
        sock.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass


def _quietly(act: Callable[[], Any]) -> None:
    try:
        act()
    except Exception:
        pass
