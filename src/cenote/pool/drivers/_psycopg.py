"""What the two psycopg 3 adapters share: the connection that watches, and the protocol of housekeeping.

`Watched` is the part of both connection classes that sees every statement. The seams are those that all
cursors share, also one that the borrower makes himself (`psycopg.Cursor(conn)`): the connection's cache of
prepared statements, which is asked about each query; `_exec_command`, which sends psycopg's own commands;
and `wait`, through which every byte goes, so that a generator nobody knows marks the session UNKNOWN.
Housekeeping (ping, reset, dial) is written as psycopg writes it, as generators that yield when they would
block, so that it exists once for threads and for asyncio.

It refuses to patch psycopg. What a borrower does with `conn.pgconn` himself (the libpq handle) is the one path
that is not seen. Names of psycopg that start with an underscore are used in this file only, and
tests/contract/test_driver_psycopg.py fails when a release moves one of the seams.
"""

import ctypes
import functools
import math
import os
import re
from collections.abc import Callable, Generator, Mapping
from contextlib import suppress
from contextvars import ContextVar
from importlib import import_module
from time import monotonic
from types import CodeType
from typing import Any

from cenote.config import PoolOptions
from cenote.errors import ConfigError, MissingDependency
from cenote.pool.drivers import base
from cenote.pool.drivers.base import BROKEN, BUSY, IDLE, IN_TRANSACTION, CannotReset, Session
from cenote.reasons import Failure, failure_of
from cenote.sql import touch
from cenote.sql.classify import classify

try:
    import psycopg
except ImportError as missing:
    raise MissingDependency('psycopg is not installed: pip install "cenote[psycopg]"') from missing

from psycopg import errors, generators, pq, waiting
from psycopg._connection_base import BaseConnection
from psycopg._copy_base import BaseCopy
from psycopg._cursor_base import BaseCursor
from psycopg._pipeline_base import BasePipeline
from psycopg._preparing import PrepareManager
from psycopg._server_cursor_base import ServerCursorMixin
from psycopg._typeinfo import TypesRegistry
from psycopg.adapt import AdaptersMap
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg.transaction import BaseTransaction

has_cancel_safe = psycopg.capabilities.has_cancel_safe

Waits = Generator[Any, Any, Any]  # of psycopg's kind: yields what it waits for, is sent what is ready

INTERVAL_S = 0.1  # how often a wait wakes to look at its deadline
CANCEL_TIMEOUT_S = 5.0
CANCEL_AGAIN_S = 0.25  # doubles each time
_WATCHED = frozenset(
    (
        "row_factory",
        "cursor_factory",
        "server_cursor_factory",
        "prepare_threshold",
        "prepared_max",
        "_adapters",
        "_autocommit",
        "_deferrable",
        "_isolation_level",
        "_read_only",
        "_tpc",
    )
)
_BASE = tuple(name for name in sorted(_WATCHED) if name not in ("_adapters", "prepare_threshold", "prepared_max"))

# -- seeing statements --------------------------------------------------------------------------------------

SEEN, SENDS, LISTENS, UNSEEN = range(4)


def _codes(owner: Any, *names: str) -> list[CodeType]:
    """The code of those generators of `owner` that this release of psycopg has."""
    return [getattr(owner, name).__code__ for name in names if hasattr(owner, name)]


# What `wait` is given, by the identity of its code (hashing a code object takes microseconds).
_KNOWN = {
    SEEN: [  # their texts pass through `_Prepared` or `_exec_command`, or they send none
        *_codes(BaseCursor, "_execute_gen", "_executemany_gen_pipeline", "_executemany_gen_no_pipeline"),
        *_codes(BaseCursor, "_stream_fetchone_gen"),
        *_codes(ServerCursorMixin, "_fetch_gen", "_scroll_gen", "_close_gen"),
        *_codes(BaseConnection, "_commit_gen", "_rollback_gen", "_set_autocommit_gen"),
        *_codes(BaseConnection, "_set_isolation_level_gen", "_set_read_only_gen", "_set_deferrable_gen"),
        *_codes(BaseConnection, "_tpc_begin_gen", "_tpc_prepare_gen", "_tpc_finish_gen"),
        *_codes(BasePipeline, "_enter_gen", "_exit_gen", "_sync_gen", "_fetch_gen"),
        *_codes(BaseTransaction, "_enter_gen", "_exit_gen"),
        *_codes(BaseCopy, "_read_gen", "_read_row_gen", "_end_copy_out_gen"),
        *_codes(generators, "copy_from", "copy_to", "copy_end"),
    ],
    # They send their cursor's query themselves.
    SENDS: [
        *_codes(BaseCursor, "_stream_send_gen", "_start_copy_gen"),
        *_codes(ServerCursorMixin, "_declare_gen"),
    ],
    LISTENS: _codes(generators, "notifies"),
}
KINDS = {id(code): kind for kind, codes in _KNOWN.items() for code in codes}


def _note(session: Session, pgconn: Any, text: bytes) -> None:
    """A statement is about to be sent, or was just given to libpq."""
    sql = text.decode() if text.isascii() else text.decode(pgconn._encoding, "replace")
    session.last_sql = sql
    session.statements += 1
    touches = classify(sql).touches
    if touches:
        session.touched |= touches


class _Prepared(PrepareManager):
    """psycopg's cache of prepared statements: every cursor asks it about every query it executes."""

    def __init__(self, session: Session, pgconn: Any) -> None:
        super().__init__()
        self._session = session
        self._pgconn = pgconn  # not the connection: a dropped lease must be collected at once
        self._asked: Any = None

    def get(self, query: Any, prepare: bool | None = None) -> Any:
        _note(self._session, self._pgconn, query.query)
        self._asked = query
        return PrepareManager.get(self, query, prepare)

    def maybe_add_to_cache(self, query: Any, prep: Any, name: bytes) -> Any:
        if self._asked is query:
            self._asked = None
        else:  # a ClientCursor does not ask, it only tells
            _note(self._session, self._pgconn, query.query)
        return PrepareManager.maybe_add_to_cache(self, query, prep, name)


def _marks(method: Callable[..., Any]) -> Any:
    """`method` of the connection, noting that it changes a client-side attribute."""

    @functools.wraps(method)
    def marked(self: Any, *args: Any, **kwargs: Any) -> Any:
        self._session.attributes = True
        return method(self, *args, **kwargs)

    return marked


class _Types(TypesRegistry):
    _session: Session
    add = _marks(TypesRegistry.add)
    clear = _marks(TypesRegistry.clear)


class _Adapters(AdaptersMap):
    _session: Session
    register_dumper = _marks(AdaptersMap.register_dumper)
    register_loader = _marks(AdaptersMap.register_loader)

    def __init__(self, template: AdaptersMap, session: Session) -> None:
        super().__init__(template)
        self._session = session
        self.types = types = _Types(template.types)
        types._session = session


dial_until: ContextVar[float] = ContextVar("dial_until")


class Watched(BaseConnection[Any]):
    """Mixed into psycopg's connection classes: notes statements, errors and changed attributes."""

    # psycopg asks for it by name: no warning when a lease is dropped (the pool gives its own), and
    # `with conn:` ends the transaction without closing.
    _pool: Any = "cenote"

    _session: Session
    _prepared: Any
    _base: dict[str, Any]
    _base_handlers: tuple[list[Any], list[Any]]
    _base_adapters: AdaptersMap
    _base_prepare: tuple[int | None, int | None]
    _block: Any
    _wants_primary: bool
    _doubtful: bool  # a primary was asked for, and the server said it is read only

    def __init__(self, pgconn: Any, *args: Any) -> None:
        self.__dict__["_session"] = session = Session()
        super().__init__(pgconn, *args)
        self._prepared = _Prepared(session, pgconn)
        self._wants_primary = self._doubtful = False
        self._block = None

    @classmethod
    def _connect_gen(cls, conninfo: str = "", *, timeout: float = math.inf) -> Waits:
        # Up to psycopg 3.2 the time for one host is counted here, later by who waits.
        pgconn = yield from _dial(conninfo, min(dial_until.get(), monotonic() + timeout))
        return cls(pgconn)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _WATCHED:
            self._session.attributes = True
        object.__setattr__(self, name, value)

    add_notice_handler = _marks(BaseConnection.add_notice_handler)
    remove_notice_handler = _marks(BaseConnection.remove_notice_handler)
    add_notify_handler = _marks(BaseConnection.add_notify_handler)
    remove_notify_handler = _marks(BaseConnection.remove_notify_handler)

    def _exec_command(self, command: Any, *args: Any, **kwargs: Any) -> Waits:
        if isinstance(command, str):
            command = command.encode(self.pgconn._encoding)
        elif not isinstance(command, bytes):
            command = command.as_bytes(self)
        if command == b"DEALLOCATE ALL":  # psycopg's own, after a rollback: it leaves nothing behind
            self._session.statements += 1
            self._session.last_sql = "DEALLOCATE ALL"
        else:
            _note(self._session, self.pgconn, command)
        return super()._exec_command(command, *args, **kwargs)

    def _before(self, gen: Any, kind: int) -> tuple[Any, Any] | None:
        """Before a wait that is not `SEEN`: the cursor whose query will be read after it, and its query now."""
        if kind == UNSEEN:
            self._session.touched |= touch.UNKNOWN
        if kind != SENDS or gen.gi_frame is None:
            return None
        cursor = gen.gi_frame.f_locals["self"]
        return cursor, cursor._query

    def _after(self, sender: tuple[Any, Any]) -> None:
        cursor, before = sender
        query = cursor._query
        if query is not None and query is not before:
            _note(self._session, self.pgconn, query.query)

    def _failed(self, error: psycopg.Error) -> None:
        sqlstate = error.sqlstate
        if sqlstate:
            self._session.sqlstate = sqlstate
            if sqlstate == "25006" and self._wants_primary:
                self._doubtful = True
                # Dropped plans need no statement; the flag makes the pool call `reset`, which asks.
                self._session.touched |= touch.PLANS


# -- dialing --------------------------------------------------------------------------------------------------


def _find_verbosity() -> Callable[[Any, int], Any] | None:
    """libpq's PQsetErrorVerbosity, which psycopg does not offer, from the very library that psycopg uses."""
    try:
        if pq.__impl__ == "python":
            library = import_module("psycopg.pq._pq_ctypes").pq
        else:  # a look-up in an extension module also searches the libraries it is linked to
            library = ctypes.CDLL(str(import_module(f"psycopg_{pq.__impl__}.pq").__file__))
        function = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int)
        return function(("PQsetErrorVerbosity", library))
    except (ImportError, OSError, AttributeError):
        return None


_set_verbosity = _find_verbosity()
_DEFAULT, _VERBOSE = 1, 2  # libpq's PGVerbosity
_STATE = re.compile(r":  ([0-9A-Z]{5}): ")


def _dial(conninfo: str, deadline: float) -> Waits:
    """Open a connection as psycopg does, within a deadline, and with the server's SQLSTATE when it refuses.

    libpq gives the SQLSTATE of a refused connection only as a part of a verbose message."""
    if monotonic() >= deadline:
        raise errors.ConnectionTimeout("connection timeout expired")
    pgconn: Any = pq.PGconn.connect_start(conninfo.encode())
    if _set_verbosity is not None:
        _set_verbosity(pgconn.pgconn_ptr, _VERBOSE)
    while pgconn.status != pq.ConnStatus.BAD:
        status = pgconn.connect_poll()
        if status == pq.PollingStatus.OK:
            break
        if status == pq.PollingStatus.FAILED:
            raise _dial_error(pgconn)
        wait = waiting.Wait.R if status == pq.PollingStatus.READING else waiting.Wait.W
        ready = None
        while not ready:
            if monotonic() >= deadline:
                pgconn.finish()
                raise errors.ConnectionTimeout("connection timeout expired")
            ready = yield pgconn.socket, wait
    else:
        raise _dial_error(pgconn)
    if _set_verbosity is not None:
        _set_verbosity(pgconn.pgconn_ptr, _DEFAULT)
    pgconn.nonblocking = 1
    return pgconn


def _dial_error(pgconn: Any) -> psycopg.OperationalError:
    message = pgconn.get_error_message()
    pgconn.finish()
    return psycopg.OperationalError(f"connection failed: {message}")


def refused(error: psycopg.Error) -> psycopg.Error:
    """An error of psycopg's `connect`, with the server's SQLSTATE, if it gave one, and marked as a dial's.

    Of several hosts the last one's word counts; psycopg puts its message first, and then all of them."""
    states = _STATE.findall(str(error).partition("\nMultiple connection attempts failed")[0])
    if states:
        error.sqlstate = states[-1]
    error.__dict__["cenote_dial"] = True
    return error


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


class Canceller:
    """Asks the server to stop what runs on a connection that is being closed, again if need be.

    Without it the server would work on, and keep its slot, until it looks at the socket again. One request
    may come too early, before the query has begun, and is then lost."""

    def __init__(self, pgconn: Any) -> None:
        running = pgconn.transaction_status == pq.TransactionStatus.ACTIVE
        self._request = pgconn.cancel_conn() if running and has_cancel_safe() else None
        self._sent = False

    def __bool__(self) -> bool:
        return self._request is not None

    def send(self) -> Waits:
        assert self._request is not None
        if self._sent:
            self._request.reset()
        self._sent = True
        self._request.start()
        gen: Waits = generators.cancel(self._request)
        return gen


# -- what needs no network ----------------------------------------------------------------------------------

_CONDITIONS = (IDLE, BUSY, IN_TRANSACTION, IN_TRANSACTION, BROKEN)  # by PQtransactionStatus


def condition(conn: Any) -> int:
    pgconn = conn.pgconn
    status = _CONDITIONS[pgconn.transaction_status]
    # The lock is held by a stream, COPY or notifies() that the borrower has not ended.
    if (pgconn.pipeline_status or conn.lock.locked()) and status != BROKEN:
        return BUSY
    return status


def settle(conn: Any) -> None:
    session = conn._session
    values = conn.__dict__
    values["_base"] = {name: values[name] for name in _BASE}
    values["_base_handlers"] = conn._notice_handlers[:], conn._notify_handlers[:]
    values["_base_prepare"] = conn.prepare_threshold, conn.prepared_max
    values["_base_adapters"] = AdaptersMap(conn.adapters)
    tidy(conn)
    session.touched = 0
    session.sqlstate = session.last_sql = ""
    session.statements = 0
    session.in_query_s = 0.0


def tidy(conn: Any) -> None:
    values = conn.__dict__
    values.update(conn._base)
    values["_begin_statement"] = b""
    notice, notify = conn._base_handlers
    values["_notice_handlers"] = notice[:]
    values["_notify_handlers"] = notify[:]
    conn._prepared.prepare_threshold, conn.prepared_max = conn._base_prepare
    values["_adapters"] = _Adapters(conn._base_adapters, conn._session)
    conn._session.attributes = False


class Common:
    """The half of both drivers that never waits. Implements a part of `base.Driver` and `base.AsyncDriver`."""

    name = "psycopg"
    weak = True
    cancellable = True
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
            raise ConfigError([f"psycopg cannot use this dsn or connect_args: {str(error).strip()}"]) from None
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
        if getattr(error, "cenote_dial", False):
            return Failure.DESTINATION, ""
        return Failure.CONNECTION, ""
