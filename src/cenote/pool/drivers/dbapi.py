"""The adapter for any DB-API 2.0 (PEP 249) `connect` callable: sqlite3, pg8000, pymysql and others.

A lease is what `connect` returns, unchanged. So nothing watches its statements, and this adapter refuses to
pretend: after each lease it rolls back (only if a transaction is open, where the connection has
`in_transaction`), puts back the usual attributes (`row_factory`, `isolation_level` ...), and knows of no other
session state. Where borrowers set some, clean it with the pool's `reset=<callable>` hook. There are no
timeouts but the driver's own, and closing cannot wait for the server.

The pool opens and closes connections on threads of its own: a driver that binds a connection to one thread
cannot be pooled, unless it can be told not to (sqlite3: `connect_args={"check_same_thread": False}`).
"""

import threading
import weakref
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from cenote.config import PoolOptions
from cenote.errors import ConfigError
from cenote.pool.drivers import base
from cenote.pool.drivers.base import BROKEN, IDLE, IN_TRANSACTION
from cenote.reasons import Failure, failure_of

_PING = "SELECT 1"
_ATTRIBUTES = ("autocommit", "isolation_level", "row_factory", "text_factory")
_ABSENT = object()
_SQLITE_ADVICE = (
    "sqlite3 binds a connection to the thread that opened it, and a pool opens connections on threads of its own:"
    ' give connect_args={"check_same_thread": False} (sqlite3 itself is safe then; the pool lends a connection'
    " to one borrower at a time)"
)

# Connections a forked child inherited. They must not be closed there: SQLite would drop the parent's locks.
_inherited: list[Any] = []


class _Session(base.Session):
    """What is known of one connection."""

    __slots__ = ("attributes_base",)

    def __init__(self) -> None:
        super().__init__()
        self.attributes_base: tuple[tuple[str, Any], ...] = ()


class DbApiDriver:
    """Implements `base.Driver`."""

    name = "dbapi"
    carries = False

    def __init__(
        self,
        connect: Callable[..., Any],
        dsn: base.Credentials,
        connect_args: base.ConnectArgs,
        options: PoolOptions,
    ) -> None:
        self._connect = connect
        self._dsn = dsn
        self._connect_args = connect_args
        self._options = options
        self._sessions: dict[int, _Session] = {}  # by id(): a connection may be neither hashable nor weak
        self.weak = True  # both are known once there is a connection
        self.cancellable = False
        if (
            _is_sqlite(connect)
            and isinstance(connect_args, Mapping)
            and connect_args.get("check_same_thread", True)
        ):
            raise ConfigError([_SQLITE_ADVICE])

    # -- opening ------------------------------------------------------------------------------------------

    def connect(self, timeout_s: float) -> Any:
        try:
            conn = self._dial()
        except Exception as error:
            rotates = callable(self._dsn) or callable(self._connect_args)
            if not rotates or not _sqlstate(error).startswith("28"):
                raise
            conn = self._dial()  # the password may have been changed since it was asked for
        try:
            self._probe(conn)
            if self._options.init_query:
                self._run(conn, self._options.init_query)
            self._sessions[id(conn)] = _Session()
            self.settle(conn)
        except BaseException:
            with suppress(Exception):
                conn.close()
            raise
        return conn

    def _dial(self) -> Any:
        dsn: Any = self._dsn() if callable(self._dsn) else self._dsn
        args: Any = self._connect_args() if callable(self._connect_args) else self._connect_args
        return self._connect(*(() if dsn is None else (dsn,)), **(args or {}))

    def _probe(self, conn: Any) -> None:
        """Learn what the connection can do.

        :raises ConfigError: it refuses to be used from another thread."""
        try:
            weakref.ref(conn)
        except TypeError:
            self.weak = False
        self.cancellable = _canceller(conn) is not None
        refusals: list[Exception] = []

        def use() -> None:
            try:
                conn.cursor().close()
            except Exception as error:
                refusals.append(error)

        other = threading.Thread(target=use)
        other.start()
        other.join()
        if refusals:
            advice = _SQLITE_ADVICE if _is_sqlite(type(conn)) else str(refusals[0])
            raise ConfigError([f"the connection cannot be used from another thread: {advice}"]) from refusals[0]

    def settle(self, conn: Any) -> None:
        """What `configure` has done is the base from here on."""
        session = self._sessions[id(conn)]
        present = ((name, getattr(conn, name, _ABSENT)) for name in _ATTRIBUTES)
        session.attributes_base = tuple(
            (name, value) for name, value in present if value is not _ABSENT and not _is_method(conn, value)
        )
        session.touched = session.statements = 0
        session.in_query_s = 0.0
        session.last_sql = session.sqlstate = ""
        session.attributes = False

    # -- knowing, without I/O -----------------------------------------------------------------------------

    def session(self, conn: Any) -> base.Session:
        return self._sessions[id(conn)]

    def handle(self, conn: Any) -> int:
        """The key of its session; a dropped connection closes itself."""
        return id(conn)

    def condition(self, conn: Any) -> int:
        if _is_closed(conn):
            return BROKEN
        session = self._sessions[id(conn)]
        try:
            session.attributes = any(getattr(conn, name) is not value for name, value in session.attributes_base)
            in_transaction = conn.in_transaction
        except AttributeError:
            return IN_TRANSACTION  # it cannot be told: roll back
        except Exception:
            return BROKEN  # sqlite3's way to say that it is closed
        return IN_TRANSACTION if in_transaction else IDLE

    def peek(self, conn: Any) -> str | None:
        if _is_closed(conn):
            return ""
        descriptor = _descriptor(conn)
        # Whatever the protocol is, only its end is understood here.
        return None if descriptor < 0 else base.peek_socket(descriptor, encrypted=True)

    def failure(self, error: BaseException) -> tuple[Failure, str]:
        sqlstate = _sqlstate(error)
        if sqlstate:
            return failure_of(sqlstate), sqlstate
        if isinstance(error, OSError):
            return Failure.DESTINATION, ""
        # PEP 249 names the classes and gives them no common base.
        names = {kind.__name__ for kind in type(error).__mro__}
        if names & {"OperationalError", "InterfaceError"}:
            return Failure.CONNECTION, ""
        if names & {"ConfigError", "ProgrammingError", "NotSupportedError", "TypeError", "ValueError"}:
            return Failure.PERMANENT, ""
        return Failure.PRIVATE, ""

    # -- returning to the base ----------------------------------------------------------------------------

    def tidy(self, conn: Any) -> None:
        session = self._sessions[id(conn)]
        for name, value in session.attributes_base:
            if getattr(conn, name) is not value:
                setattr(conn, name, value)
        session.attributes = False

    def reset(self, conn: Any, touched: int, timeout_s: float) -> None:
        conn.rollback()
        self.tidy(conn)
        if self._options.reset == "always" and self._options.init_query:
            self._run(conn, self._options.init_query)
        self._sessions[id(conn)].touched = 0

    def convert(self, conn: Any, script: str, replan: bool, timeout_s: float) -> None:
        raise TypeError("what this connection carries is not known")

    def ping(self, conn: Any, timeout_s: float) -> None:
        self._run(conn, _PING)

    def cancel(self, conn: Any) -> None:
        canceller = _canceller(conn)
        if canceller is not None:
            canceller()

    # -- closing ------------------------------------------------------------------------------------------

    def close(self, conn: Any, handle: Any, timeout_s: float) -> None:
        self._sessions.pop(id(conn) if conn is not None else handle, None)
        if conn is not None:
            conn.close()

    def cut(self, conn: Any) -> None:
        descriptor = _descriptor(conn)
        if descriptor >= 0:
            base.shut_socket(descriptor)
        else:
            self.cancel(conn)

    def closed_by_borrower(self, conn: Any) -> bool:
        return True  # nobody else's closing can be told

    def disown(self, conn: Any) -> None:
        _inherited.append(conn)

    # -- statements ---------------------------------------------------------------------------------------

    def leave(self, conn: Any, failed: bool) -> None:
        if failed:
            conn.rollback()
        else:
            conn.commit()

    def begin(self, conn: Any) -> None:
        # PEP 249 opens transactions by itself. What has `in_transaction` may not do so for each statement
        # (sqlite3: not for DDL and SELECT, or not at all) and understands BEGIN.
        if getattr(conn, "in_transaction", True) is False:
            conn.cursor().execute("BEGIN")

    def commit(self, conn: Any) -> None:
        conn.commit()

    def rollback(self, conn: Any) -> None:
        conn.rollback()

    def execute(self, conn: Any, sql: Any, params: Any) -> int:
        return int(self._noted(conn, sql, params, lambda cursor: cursor.rowcount))

    def fetch_all(self, conn: Any, sql: Any, params: Any) -> list[Any]:
        return list(self._noted(conn, sql, params, _all))

    def fetch_one(self, conn: Any, sql: Any, params: Any) -> Any:
        return self._noted(conn, sql, params, _one)

    def fetch_value(self, conn: Any, sql: Any, params: Any) -> Any:
        row = self._noted(conn, sql, params, _one)
        if isinstance(row, Mapping):
            return next(iter(row.values()))
        return None if row is None else row[0]

    def _noted(self, conn: Any, sql: Any, params: Any, result: Callable[[Any], Any]) -> Any:
        session = self._sessions[id(conn)]
        session.last_sql = str(sql)
        session.statements += 1
        session.query_starts()
        try:
            return self._run(conn, sql, params, result)
        except Exception as error:
            session.sqlstate = _sqlstate(error)
            raise
        finally:
            session.query_ends()

    def _run(self, conn: Any, sql: Any, params: Any = None, result: Callable[[Any], Any] | None = None) -> Any:
        """One statement and its commit."""
        cursor = conn.cursor()
        try:
            if params is None:
                cursor.execute(sql)
            else:
                cursor.execute(sql, params)
            answer = result(cursor) if result is not None else None
            if getattr(conn, "in_transaction", True):
                conn.commit()
            return answer
        except BaseException:
            with suppress(Exception):
                conn.rollback()
            raise
        finally:
            with suppress(Exception):
                cursor.close()


def _is_sqlite(thing: Any) -> bool:
    """Is it a class or function of the standard library's sqlite3? (Not imported: not every Python has it.)"""
    return getattr(thing, "__module__", None) in ("sqlite3", "_sqlite3")


def _all(cursor: Any) -> Any:
    return cursor.fetchall() if cursor.description is not None else []


def _one(cursor: Any) -> Any:
    return cursor.fetchone() if cursor.description is not None else None


def _canceller(conn: Any) -> Callable[[], Any] | None:
    """`cancel` as PostgreSQL's drivers have it, or `interrupt` as SQLite's."""
    for name in ("cancel", "interrupt"):
        method = getattr(conn, name, None)
        if callable(method):
            return method  # type: ignore[no-any-return]
    return None


def _is_closed(conn: Any) -> bool:
    closed = getattr(conn, "closed", False)
    return isinstance(closed, int) and bool(closed)


def _is_method(conn: Any, value: Any) -> bool:
    return getattr(value, "__self__", None) is conn


def _descriptor(conn: Any) -> int:
    try:
        descriptor = conn.fileno()
    except Exception:
        return -1
    return descriptor if isinstance(descriptor, int) else -1


def _sqlstate(error: BaseException) -> str:
    """The SQLSTATE where the usual drivers put it, "" if there is none."""
    first = error.args[0] if error.args else None
    for value in (
        getattr(error, "sqlstate", None),
        getattr(error, "pgcode", None),
        first.get("C") if isinstance(first, Mapping) else None,  # pg8000
    ):
        if isinstance(value, str) and len(value) == 5:
            return value
    return ""
