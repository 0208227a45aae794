"""What the two psycopg 3 adapters share: the protocol of housekeeping, and all that never waits.

Housekeeping (ping, reset, drain) is written as psycopg writes it, as generators that yield when they would
block, so that it exists once for threads and for asyncio. It refuses to go through the borrower's connection
object for that: nothing here counts as his statement, and nothing here can be cancelled half-way by psycopg.

Tested with psycopg 3.2 and 3.3. Names of psycopg that start with an underscore are used in `_psycopg*` only,
but for a handful of attributes of a connection.
"""

import math
import os
from collections.abc import Mapping
from contextlib import suppress
from time import monotonic
from typing import Any

from cenote.config import PoolOptions
from cenote.errors import ConfigError
from cenote.pool.drivers import base
from cenote.pool.drivers._psycopg_condition import condition
from cenote.pool.drivers._psycopg_dial import Waits, dial_until, refused
from cenote.pool.drivers._psycopg_watch import KINDS, LISTENS, UNSEEN, Watched, settle, tidy
from cenote.pool.drivers.base import BUSY, IN_TRANSACTION, CannotReset, Session
from cenote.reasons import Failure, failure_of
from cenote.sql import touch

import psycopg  # isort: skip  (after `_psycopg_dial`, which says what to install)
from psycopg import errors, generators, pq, rows  # isort: skip
from psycopg.conninfo import conninfo_to_dict, make_conninfo  # isort: skip

__all__ = ["KINDS", "LISTENS", "UNSEEN", "Common", "Waits", "Watched", "dial_until", "refused"]

INTERVAL_S = 0.1  # how often a wait wakes to look at its deadline
CANCEL_TIMEOUT_S = 5.0
CANCEL_AGAIN_S = 0.25  # doubles each time


class NotPrimary(errors.ReadOnlySqlTransaction):
    """A connection opened with `target_session_attrs=read-write` or `primary` leads to a standby now."""


# -- housekeeping, as generators ------------------------------------------------------------------------------


def until(gen: Waits, deadline: float, what: str) -> Waits:
    """`gen`, ended by an error when it still waits at `deadline`; looked at whenever the wait wakes."""
    ready = None
    while True:
        try:
            wants = gen.send(ready)
        except StopIteration as done:
            return done.value
        if monotonic() >= deadline:
            gen.close()
            raise psycopg.OperationalError(f"no answer to {what} in time")
        ready = yield wants


def query(pgconn: Any, text: str) -> Waits:
    """One round trip that no interception sees; raises the first error among its results."""
    pgconn.send_query(text.encode(pgconn._encoding))
    results = yield from generators.execute(pgconn)
    for result in results:
        if result.status == pq.ExecStatus.FATAL_ERROR:
            raise errors.error_from_result(result, encoding=pgconn._encoding)
    return results


def drain(pgconn: Any) -> Waits:
    """Read what is left of a cancelled query or COPY."""
    yield from generators.send(pgconn)
    while results := (yield from generators.fetch_many(pgconn)):
        status = results[-1].status
        with suppress(psycopg.Error):  # the error that our cancel brought about
            if status == pq.ExecStatus.COPY_IN:
                yield from generators.copy_end(pgconn, b"given back to the pool unfinished")
            elif status == pq.ExecStatus.COPY_OUT:
                while isinstance((yield from generators.copy_from(pgconn)), memoryview):
                    pass
            elif status == pq.ExecStatus.COPY_BOTH:
                raise CannotReset("the connection is in replication mode")


def reset(conn: Any, touched: int, options: PoolOptions) -> Waits:
    """Roll back and undo in one round trip. The connection answers no query (see `drain`)."""
    pgconn = conn.pgconn
    prepared = conn._prepared
    status = pgconn.transaction_status
    if status not in (pq.TransactionStatus.IDLE, pq.TransactionStatus.INTRANS, pq.TransactionStatus.INERROR):
        raise CannotReset("the connection is not idle after its query was cancelled")
    if options.reset == "always":
        touched |= touch.ALL & ~(touch.LOAD | touch.UNKNOWN)
    elif options.reset == "never":
        touched = 0
    statements = base.reset_statements(touched, options.init_query)
    # psycopg forgets its prepared statements after a rollback and after DROP, because a table of the same name
    # may have other columns next time. Dropped temporary tables are the same case; and of an unknown
    # touch nobody knows which of them it dropped.
    rolls_back = status != pq.TransactionStatus.IDLE
    if (rolls_back or touched & (touch.TEMP | touch.UNKNOWN)) and prepared.clear():
        statements.insert(0, "DEALLOCATE ALL")
    if rolls_back:
        statements.insert(0, "ROLLBACK")
    if conn._doubtful:
        statements.append("SELECT pg_catalog.pg_is_in_recovery()")
    if statements:
        results = yield from query(pgconn, ";\n".join(statements))
        prepared._to_flush.clear()
        if conn._doubtful:
            if results[-1].get_value(0, 0) == b"t":
                raise NotPrimary("the server is a standby now, and a primary was asked for")
            conn._doubtful = False
        if pgconn.transaction_status != pq.TransactionStatus.IDLE:
            raise CannotReset("a transaction is open after the reset (does init_query open one?)")
    conn.__dict__.update(_num_transactions=0, _block=None)
    if conn._notifies_backlog:
        conn._notifies_backlog.clear()
    tidy(conn)
    conn._session.touched = 0


def convert(conn: Any, script: str, replan: bool) -> Waits:
    """Run the pool's own script, and forget what psycopg has prepared, in one round trip."""
    forgets = replan and conn._prepared.clear()
    if forgets:
        script = f"DEALLOCATE ALL;{script}"
    if script:
        yield from query(conn.pgconn, script)
    if forgets:
        conn._prepared._to_flush.clear()


class Canceller:
    """Asks the server to stop what runs on a connection that is being closed, again if need be.

    Without it the server would work on, and keep its slot, until it looks at the socket again. One request
    may come too early, before the query has begun, and is then lost."""

    def __init__(self, pgconn: Any) -> None:
        self._request: Any = None
        self.blocking: Any = None  # what libpq had before 17: a call without a timeout
        self._sent = False
        if pgconn.transaction_status == pq.TransactionStatus.ACTIVE:
            if psycopg.capabilities.has_cancel_safe():
                self._request = pgconn.cancel_conn()
            else:
                self.blocking = pgconn.get_cancel().cancel

    def __bool__(self) -> bool:
        return self._request is not None or self.blocking is not None

    def send(self) -> Waits:
        if self._sent:
            self._request.reset()
        self._sent = True
        self._request.start()
        gen: Waits = generators.cancel(self._request)
        return gen


# -- what needs no network ----------------------------------------------------------------------------------


_PLAIN_CURSORS = (psycopg.Cursor, psycopg.AsyncCursor)


def kept_cursor(conn: Any) -> Any:
    """A cursor for one value: the one of the last time, because making one costs as much as all else we add."""
    session = conn._session
    cursor = session.kept
    if cursor is None:
        return conn.cursor_factory(conn, row_factory=rows.tuple_row)
    session.kept = None
    cursor._conn = conn
    return cursor


def keep_cursor(conn: Any, cursor: Any) -> None:
    """Keep it, without its result and without the connection, to which its transformer leads too and which must
    be collected when a borrower drops it; not one of the user's own class."""
    if type(cursor) in _PLAIN_CURSORS:
        cursor._reset()
        cursor._conn = cursor._tx = cursor._last_query = None
        conn._session.kept = cursor


class Common:
    """The half of both drivers that never waits. Implements a part of `base.Driver` and `base.AsyncDriver`."""

    name = "psycopg"
    weak = True
    cancellable = True
    carries = True
    _class: Any

    def __init__(self, dsn: base.Credentials, connect_args: base.ConnectArgs, options: PoolOptions) -> None:
        """:raises ConfigError: for a connection string that libpq cannot read."""
        self._dsn = dsn
        self._args = connect_args
        self._options = options
        self._rotating = callable(dsn) or callable(connect_args)
        if not self._rotating:
            self._arguments(dsn, connect_args, 0.0)

    def _arguments(self, dsn: Any, args: Any, timeout_s: float) -> tuple[str, dict[str, Any]]:
        """The arguments for psycopg's `connect`.

        Where several hosts are named, each has its share of the time, or one that does not answer would use
        it up. psycopg counts whole seconds, at least 2."""
        if not isinstance(dsn, str | None) or not isinstance(args, Mapping):
            kinds = f"{type(dsn).__name__} and {type(args).__name__}"  # not the values: they hold passwords
            raise ConfigError([f"dsn must give a str or None, and connect_args a mapping, not {kinds}"])
        conninfo, kwargs = dsn or "", dict(args)
        own = {"autocommit", "prepare_threshold", "context", "row_factory", "cursor_factory"}
        try:
            words = {key: value for key, value in kwargs.items() if key not in own}
            params = conninfo_to_dict(make_conninfo(conninfo, **words))
        except psycopg.Error as error:
            said = base.without_values(error, conninfo)
            raise ConfigError([f"psycopg cannot use this dsn or connect_args: {said}"]) from None
        if "connect_timeout" not in params:
            hosts = 1 + str(params.get("hostaddr") or params.get("host") or "").count(",")
            kwargs["connect_timeout"] = max(2, math.ceil(timeout_s / hosts))
        return conninfo, kwargs

    def _opened(self, conn: Any) -> Any:
        wants = conn.info.get_parameters().get("target_session_attrs")
        conn._wants_primary = wants in ("read-write", "primary")
        settle(conn)
        return conn

    def session(self, conn: Any) -> Session:
        session: Session = conn._session
        return session

    def handle(self, conn: Any) -> Any:
        """The libpq connection: it outlives the object that the borrower drops."""
        return conn.pgconn

    condition = staticmethod(condition)
    settle = staticmethod(settle)
    tidy = staticmethod(tidy)

    def peek(self, conn: Any) -> str | None:
        pgconn = conn.pgconn
        if pgconn.status != pq.ConnStatus.OK:
            return ""
        return base.peek_socket(pgconn.socket, encrypted=pgconn.ssl_in_use)

    def cut(self, conn: Any) -> None:
        with suppress(psycopg.Error):  # closed in the meantime
            base.shut_socket(conn.pgconn.socket)

    def closed_by_borrower(self, conn: Any) -> bool:
        return bool(conn._closed)

    def disown(self, conn: Any) -> None:
        # libpq says good-bye when it closes: let it say so to /dev/null. The descriptor is the child's own.
        with suppress(psycopg.Error, OSError):
            with open("/dev/null", "r+b", buffering=0) as nowhere:
                os.dup2(nowhere.fileno(), conn.pgconn.socket)
            conn.pgconn.finish()

    def _hang_up(self, conn: Any, handle: Any) -> int:
        """Close; returns a descriptor that sees the server's end, -1 if there is none."""
        pgconn = handle if handle is not None else conn.pgconn
        if conn is not None:
            conn._closed = True
        try:
            last = os.dup(pgconn.socket)
        except (psycopg.Error, OSError):
            last = -1
        pgconn.finish()
        return last

    def _check_reset(self, conn: Any) -> None:
        """:raises CannotReset: for a connection that its borrower still holds on to."""
        if conn.pgconn.pipeline_status:
            raise CannotReset("the connection is still in pipeline mode")
        if conn.lock.locked():
            raise CannotReset("a stream, COPY or notifies() of the borrower is still open")

    def _has_work(self, conn: Any, failed: bool) -> bool:
        """Is there something to commit or roll back? psycopg would wait for its lock for ever if the borrower
        still holds a stream or COPY: then it is an error, or, when rolling back, left to the pool, which closes.

        :raises psycopg.ProgrammingError: in that case."""
        if conn.lock.locked():
            if failed:
                return False
            raise psycopg.ProgrammingError(
                "cannot commit: a stream, COPY or notifies() of this connection is still open"
            )
        return condition(conn) in (IN_TRANSACTION, BUSY)

    def failure(self, error: BaseException) -> tuple[Failure, str]:
        if not isinstance(error, psycopg.Error):
            return (Failure.PERMANENT if isinstance(error, ConfigError) else Failure.PRIVATE), ""
        sqlstate = error.sqlstate or ""
        if sqlstate == "25006" and not isinstance(error, NotPrimary):
            return Failure.PRIVATE, sqlstate  # from a hook: it says nothing of what was asked for
        if sqlstate:
            return failure_of(sqlstate), sqlstate
        of_server = isinstance(error, psycopg.OperationalError | psycopg.InterfaceError)
        if getattr(error, "cenote_dial", False):
            return (Failure.DESTINATION if of_server else Failure.PERMANENT), ""
        return (Failure.CONNECTION if of_server else Failure.PRIVATE), ""
