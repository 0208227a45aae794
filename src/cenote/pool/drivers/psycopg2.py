"""The psycopg2 adapter: leases are `psycopg2.extensions.connection` objects whose cursors note statements.

It refuses to guess what C hides. A cursor built by hand (`psycopg2.extensions.cursor(conn)`) is not seen: use
`conn.cursor(cursor_factory=...)`. What psycopg2 sends of itself (BEGIN, COMMIT, ROLLBACK, the FETCH and CLOSE
of a named cursor, large objects, two-phase commit) touches no session state and is not counted. Cursors and
the connection are not guarded against use after release.

psycopg2 has no timeouts. Where one is due a timer shuts the socket down, which ends the call with an error;
opening relies on libpq's connect_timeout, which counts whole seconds, two at least, for each address.
"""

import math
import os
import socket
import threading
from contextlib import suppress
from time import monotonic
from typing import Any

from cenote.config import PoolOptions
from cenote.errors import ConfigError, MissingDependency
from cenote.pool.drivers import _libpq_messages as messages
from cenote.pool.drivers import base
from cenote.pool.drivers.base import BROKEN, BUSY, IDLE, IN_TRANSACTION, CannotReset
from cenote.reasons import Failure, failure_of
from cenote.sql import touch

try:
    import psycopg2
    from psycopg2 import extensions

    from cenote.pool.drivers import _psycopg2 as lease
except ImportError as missing:
    raise MissingDependency('psycopg2 is not installed: pip install "cenote[psycopg2]"') from missing

_STATUS_IDLE = extensions.TRANSACTION_STATUS_IDLE
_STATUS_ACTIVE = extensions.TRANSACTION_STATUS_ACTIVE
_CLOSED_BY_CALL = 1  # of `connection.closed`; 2 is "found broken"
_STATUS_UNKNOWN = extensions.TRANSACTION_STATUS_UNKNOWN


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
                base.shut_socket(self._sock.fileno())


class Psycopg2Driver:
    """Implements `base.Driver`."""

    name = "psycopg2"
    weak = True
    cancellable = True
    carries = True

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
            if not self._rotates or not messages.sqlstate_of(str(error)).startswith("28"):
                raise
            conn = self._dial(timeout_s)  # the password may have been changed since it was asked for
        try:
            conn._cenote.born = lease.Attributes(conn)
            if self._options.init_query:
                with _Guard(conn, timeout_s, "init_query"):
                    lease.alone(conn, self._options.init_query)
            self.settle(conn)
        except BaseException:
            conn.close()
            raise
        return conn

    def _dial(self, timeout_s: float) -> Any:
        dsn, args = self._arguments(timeout_s)
        parent = args.pop("connection_factory", None) or lease.PlainConnection
        return psycopg2.connect(dsn, connection_factory=lease.lease_class(parent), **args)

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
        if factory is not None and not (isinstance(factory, type) and issubclass(factory, lease.PlainConnection)):
            problems.append(f"connection_factory = {factory!r}: must be a subclass of psycopg2's connection")
        texts = {
            name: value
            for name, value in args.items()
            if name not in ("connection_factory", "cursor_factory", "async_", "async")
        }
        try:
            known = extensions.parse_dsn(extensions.make_dsn(dsn, **texts)) if dsn or texts else {}
        except (psycopg2.Error, TypeError) as error:
            said = base.without_values(error, dsn)
            problems.append(f"psycopg2 cannot use this DSN or connect_args: {said}")
        if problems:
            raise ConfigError(problems)
        if "connect_timeout" not in known:
            args["connect_timeout"] = max(2, math.ceil(timeout_s))
        return dsn, args

    def settle(self, conn: Any) -> None:
        """What `configure` has done is the base from here on."""
        session = conn._cenote
        session.base = lease.Attributes(conn)
        session.base_touched = session.touched
        session.touched = session.statements = 0
        session.in_query_s = 0.0
        session.last_sql = session.seen = session.sqlstate = ""
        session.seen_touches = 0
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
            sqlstate = error.pgcode or messages.sqlstate_of(message)
            if sqlstate:
                return failure_of(sqlstate), sqlstate
            if isinstance(error, (psycopg2.OperationalError, psycopg2.InterfaceError)):
                if messages.WRONG_TLS.search(message):
                    return Failure.PERMANENT, ""
                if messages.LOST.search(message):
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
        now = conn.autocommit, lease.levels(conn)
        base_is = session.base.autocommit, session.base.levels
        if now != base_is and now[0] and now[1] != lease.LEVELS and self._options.reset != "never":
            session.touched |= touch.SETTINGS  # they are settings of the server now: the reset undoes them
            return
        self._restore(conn, session.base)

    def _restore(self, conn: Any, wanted: lease.Attributes) -> None:
        """Attributes as they were. No round trip unless transaction levels were set in autocommit."""
        if (conn.autocommit, lease.levels(conn)) != (wanted.autocommit, wanted.levels):
            if lease.levels(conn) != wanted.levels:
                lease.PlainConnection.set_session(conn, autocommit=False)
                lease.PlainConnection.set_session(
                    conn, *("DEFAULT" if each is None else each for each in wanted.levels)
                )
            lease.set_autocommit(conn, wanted.autocommit)
        lease.PlainConnection.cursor_factory.__set__(conn, wanted.cursor_factory)
        for now, then in ((conn.string_types, wanted.string_types), (conn.binary_types, wanted.binary_types)):
            now.clear()
            now.update(then)
        for name in ("notices", "notifies"):
            kept = getattr(wanted, name)  # the borrower may have put an object of his own in its place
            getattr(lease.PlainConnection, name).__set__(conn, kept)
            if hasattr(kept, "clear"):
                kept.clear()
        conn._cenote.attributes = False

    def reset(self, conn: Any, touched: int, timeout_s: float) -> None:
        session = conn._cenote
        if not session.cancelling.acquire(timeout=timeout_s):
            raise CannotReset(f"a cancel request was not delivered within {timeout_s:g} s")
        session.cancelling.release()
        if self.condition(conn) == BUSY:
            raise CannotReset("another thread is still using the connection")
        try:
            with _Guard(conn, timeout_s, "reset"):
                self._reset(conn, session, touched)
        except TimeoutError as error:
            raise CannotReset(str(error)) from error
        if self.condition(conn) != IDLE:
            raise CannotReset("the session is not idle after its reset")
        session.touched = 0

    def _reset(self, conn: Any, session: lease.Session, touched: int) -> None:
        try:
            lease.PlainConnection.rollback(conn)
        except psycopg2.ProgrammingError:  # "cannot be used during a two-phase transaction"
            conn.tpc_rollback()
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
            lease.PlainConnection.set_client_encoding(conn, wanted.encoding)
        self._restore(conn, wanted)
        if script:
            lease.alone(conn, "; ".join(script))
            if not (conn.get_parameter_status("DateStyle") or "ISO").startswith("ISO"):
                lease.alone(conn, "SET datestyle TO 'ISO'")  # psycopg2 reads no other; it set it when connecting
            self._restore(conn, wanted)  # what the server said to that

    def convert(self, conn: Any, script: str, replan: bool, timeout_s: float) -> None:
        if script:  # psycopg2 prepares nothing by itself
            with _Guard(conn, timeout_s, "settings"):
                lease.alone(conn, script)

    def ping(self, conn: Any, timeout_s: float) -> None:
        with _Guard(conn, timeout_s, "ping"):
            lease.alone(conn, "SELECT 1")

    def cancel(self, conn: Any) -> None:
        if not conn.closed:
            conn.cancel()

    # -- closing ------------------------------------------------------------------------------------------

    def close(self, conn: Any, handle: Any, timeout_s: float) -> None:
        if conn is None or conn.closed:
            return
        deadline = monotonic() + timeout_s
        last = os.dup(conn.fileno())
        if self.condition(conn) == BUSY:
            # Closing waits for the query of the other thread, and a cancel has no timeout.
            too_late = threading.Event()
            closer = threading.Thread(target=self._stop_and_close, args=(conn, too_late), daemon=True)
            closer.start()
            closer.join(timeout_s / 2)
            too_late.set()
            if closer.is_alive():
                base.shut_socket(last)
                closer.join(timeout_s / 4)
        else:
            conn.close()
        base.await_eof(last, deadline - monotonic())

    def _stop_and_close(self, conn: Any, too_late: threading.Event) -> None:
        pause_s = 0.01
        while self.condition(conn) == BUSY:
            with suppress(psycopg2.Error):
                conn.cancel()  # again and again: what arrives before the query is sent is nothing
            if too_late.wait(pause_s):
                break
            pause_s *= 2
        conn.close()

    def cut(self, conn: Any) -> None:
        if not conn.closed:
            base.shut_socket(conn.fileno())

    def closed_by_borrower(self, conn: Any) -> bool:
        return bool(conn.closed == _CLOSED_BY_CALL)

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
        return int(lease.noted(conn, sql, params, conn._cenote_cursor()).rowcount)

    def fetch_all(self, conn: Any, sql: Any, params: Any) -> list[Any]:
        cursor = lease.noted(conn, sql, params, conn._cenote_cursor())
        return cursor.fetchall() if cursor.description is not None else []

    def fetch_one(self, conn: Any, sql: Any, params: Any) -> Any:
        return _one(lease.noted(conn, sql, params, conn._cenote_cursor()))

    def fetch_value(self, conn: Any, sql: Any, params: Any) -> Any:
        row = _one(lease.noted(conn, sql, params, lease.PlainCursor(conn)))
        return None if row is None else row[0]


def _one(cursor: Any) -> Any:
    return cursor.fetchone() if cursor.description is not None else None
