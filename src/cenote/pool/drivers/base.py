"""What a pool asks of a driver, and what every PostgreSQL adapter shares.

An adapter translates; it decides nothing about pooling. It opens connections of the driver's own class (or
a subclass that watches statements pass), tells the pool in which condition one is, and can check, reset,
cancel and close it. `Session` is where an adapter notes what it saw; the pool reads it at release.
No adapter takes a lock of the pool or knows of other connections.
"""

import asyncio
import re
import select
import socket
from collections.abc import Awaitable, Callable, Mapping, Sequence
from time import monotonic
from typing import Any, Protocol

from cenote.reasons import Failure
from cenote.sql import touch

# Conditions of a connection, as the driver knows them without asking the server.
IDLE = 0  # no transaction, nothing in flight
IN_TRANSACTION = 1  # a transaction is open or failed
BUSY = 2  # a query or COPY is in flight, or its answer is not read
BROKEN = 3  # closed or unusable

Credentials = str | Callable[[], Any] | None
ConnectArgs = Mapping[str, Any] | Callable[[], Any]


class Session:
    """What is known of one connection. Written by its adapter, read by the pool when it comes back.

    touched: bits of `cenote.sql.touch`, collected since the session was last in its base state
    attributes: a client-side attribute of the driver's object was changed by the borrower
    last_sql: the statement sent last ("" for none)
    query_since_s: monotonic time at which the running query started, 0.0 when none runs
    in_query_s: time spent in queries during the current lease
    statements: statements seen during the current lease
    sqlstate: SQLSTATE of the last error that came from the server ("" for none)
    kept: what its adapter keeps from one one-shot statement to the next, never a way back to the connection
    """

    __slots__ = (
        "attributes",
        "in_query_s",
        "kept",
        "last_sql",
        "query_since_s",
        "sqlstate",
        "statements",
        "touched",
    )

    def __init__(self) -> None:
        self.touched = 0
        self.attributes = False
        self.last_sql = ""
        self.query_since_s = 0.0
        self.in_query_s = 0.0
        self.statements = 0
        self.sqlstate = ""
        self.kept: Any = None

    def query_starts(self) -> None:
        self.query_since_s = monotonic()

    def query_ends(self) -> None:
        self.in_query_s += monotonic() - self.query_since_s
        self.query_since_s = 0.0


class Driver(Protocol):
    """The adapter of a blocking driver. Called from any thread, one thread at a time per connection,
    but for `cancel`, which another thread may call. Never called with a lock of the pool held."""

    name: str
    weak: bool  # its connections can be referenced weakly
    cancellable: bool  # `cancel` works
    carries: bool  # it is PostgreSQL, and what a borrower changes is seen: connections may carry settings

    def connect(self, timeout_s: float) -> Any:
        """Open a connection in base state (`init_query` done), or raise the driver's error."""

    def settle(self, conn: Any) -> None:
        """The connection as it is now is the base state: note its attributes, clear its session's notes.

        Called after `connect` and the pool's `configure` hook, and when `configure` ran again after a reset."""

    def session(self, conn: Any) -> Session:
        """The connection's `Session` (the same object for its whole life)."""

    def handle(self, conn: Any) -> Any:
        """What must be kept so that `close` works when the borrower dropped `conn`, or None."""

    def condition(self, conn: Any) -> int:
        """IDLE, IN_TRANSACTION, BUSY or BROKEN, without a round trip."""

    def peek(self, conn: Any) -> str | None:
        """None while nothing says the server has gone; else its SQLSTATE, "" for a bare end. No round trip."""

    def ping(self, conn: Any, timeout_s: float) -> None:
        """One round trip outside any transaction; raises when there is no answer in time."""

    def tidy(self, conn: Any) -> None:
        """Return client-side attributes to their base. No I/O."""

    def reset(self, conn: Any, touched: int, timeout_s: float) -> None:
        """Return the session to its base state: stop what runs, roll back, undo what `touched` says.

        Clears `session.touched`. Raises when that cannot be done or proven; the pool then closes."""

    def convert(self, conn: Any, script: str, replan: bool, timeout_s: float) -> None:
        """Run a script of the pool's own, ASCII, in one round trip outside any transaction, as one transaction.

        Of an idle connection, and not noted as the borrower's. Raises the driver's error, or when there is no
        answer in time; `condition` then says what became of the connection.

        :param replan: the driver's own prepared statements are to be forgotten, here and on the server
        """

    def cancel(self, conn: Any) -> None:
        """Ask the server to stop the query that runs now."""

    def close(self, conn: Any, handle: Any, timeout_s: float) -> None:
        """Close and wait until the server has let go, `timeout_s` at most. `conn` is None after a leak."""

    def cut(self, conn: Any) -> None:
        """Shut the connection's socket down, from any thread, while its borrower may be inside the driver."""

    def closed_by_borrower(self, conn: Any) -> bool:
        """Of a BROKEN connection: was it the borrower who closed it, rather than the server or the network?"""

    def disown(self, conn: Any) -> None:
        """In a forked child: give up the descriptor without a byte to the server."""

    def failure(self, error: BaseException) -> tuple[Failure, str]:
        """What an error of this driver says about the destination, and its SQLSTATE ("" if none)."""

    def leave(self, conn: Any, failed: bool) -> None:
        """End a `connection()` block as the driver's own context manager does (commit or roll back)."""

    def begin(self, conn: Any) -> None:
        """Open the transaction of a `transaction()` block."""

    def commit(self, conn: Any) -> None: ...
    def rollback(self, conn: Any) -> None: ...

    def execute(self, conn: Any, sql: Any, params: Any) -> int:
        """One statement in autocommit; the number of rows it affected, -1 where there is none."""

    def fetch_all(self, conn: Any, sql: Any, params: Any) -> list[Any]: ...
    def fetch_one(self, conn: Any, sql: Any, params: Any) -> Any: ...
    def fetch_value(self, conn: Any, sql: Any, params: Any) -> Any: ...


class AsyncDriver(Protocol):
    """The adapter of an asyncio driver: the same, with `async` where the network may be touched.

    Every coroutine may be cancelled at any await; the connection is then in whatever condition it says."""

    name: str
    weak: bool
    cancellable: bool
    carries: bool

    def settle(self, conn: Any) -> None: ...
    def session(self, conn: Any) -> Session: ...
    def handle(self, conn: Any) -> Any: ...
    def condition(self, conn: Any) -> int: ...
    def peek(self, conn: Any) -> str | None: ...
    def tidy(self, conn: Any) -> None: ...
    def cut(self, conn: Any) -> None: ...
    def closed_by_borrower(self, conn: Any) -> bool: ...
    def disown(self, conn: Any) -> None: ...
    def failure(self, error: BaseException) -> tuple[Failure, str]: ...
    def connect(self, timeout_s: float) -> Awaitable[Any]: ...
    def ping(self, conn: Any, timeout_s: float) -> Awaitable[None]: ...
    def reset(self, conn: Any, touched: int, timeout_s: float) -> Awaitable[None]: ...
    def convert(self, conn: Any, script: str, replan: bool, timeout_s: float) -> Awaitable[None]: ...
    def cancel(self, conn: Any) -> Awaitable[None]: ...
    def close(self, conn: Any, handle: Any, timeout_s: float) -> Awaitable[None]: ...
    def leave(self, conn: Any, failed: bool) -> Awaitable[None]: ...
    def begin(self, conn: Any) -> Awaitable[None]: ...
    def commit(self, conn: Any) -> Awaitable[None]: ...
    def rollback(self, conn: Any) -> Awaitable[None]: ...
    def execute(self, conn: Any, sql: Any, params: Any) -> Awaitable[int]: ...
    def fetch_all(self, conn: Any, sql: Any, params: Any) -> Awaitable[list[Any]]: ...
    def fetch_one(self, conn: Any, sql: Any, params: Any) -> Awaitable[Any]: ...
    def fetch_value(self, conn: Any, sql: Any, params: Any) -> Awaitable[Any]: ...


class CannotReset(Exception):
    """The session carries something that no statement undoes (a loaded library, a random seed)."""


# What undoes each kind of touch. The order matters: cursors and locks first, the role before RESET ALL
# (which a lesser role might not be allowed), temporary objects last. DEALLOCATE names only statements
# made by SQL: the driver's own prepared statements stay, so its cache stays true.
_UNDO: tuple[tuple[int, str], ...] = (
    (touch.CURSOR, "CLOSE ALL"),
    (touch.LISTEN, "UNLISTEN *"),
    (touch.ROLE, "SET SESSION AUTHORIZATION DEFAULT; RESET ROLE"),
    (touch.SETTINGS, "RESET ALL"),
    (touch.ADVISORY, "SELECT pg_catalog.pg_advisory_unlock_all()"),
    (
        touch.PREPARED,
        "DO $cenote$ DECLARE s pg_catalog.text; BEGIN"
        " FOR s IN SELECT name FROM pg_catalog.pg_prepared_statements WHERE from_sql"
        " LOOP EXECUTE pg_catalog.format('DEALLOCATE %I', s); END LOOP; END $cenote$",
    ),
    (touch.SEQUENCE, "DISCARD SEQUENCES"),
    (touch.TEMP, "DISCARD TEMP"),
)


def reset_statements(touched: int, init_query: str | None) -> list[str]:
    """The statements that return a PostgreSQL session to its base state.

    :raises CannotReset: when something was touched that no statement undoes.
    """
    if touched & touch.LOAD:
        raise CannotReset("the session loaded a library, set the random seed or did what no statement undoes")
    if touched & touch.UNKNOWN:
        touched = touch.ALL & ~touch.LOAD
    statements = [sql for bit, sql in _UNDO if touched & bit]
    if init_query and touched & (touch.SETTINGS | touch.ROLE | touch.TEMP | touch.LISTEN | touch.PREPARED):
        statements.append(init_query)
    return statements


# Linux tells that the peer has closed its side without a read; elsewhere only an empty read does.
_GONE = getattr(select, "POLLRDHUP", 0) | select.POLLHUP | select.POLLERR | select.POLLNVAL
_LOOK = select.POLLIN | getattr(select, "POLLRDHUP", 0)
_PEEK_BYTES = 65_536  # notices that a server sends to an idle session are far smaller


def peek_socket(descriptor: int, *, encrypted: bool) -> str | None:
    """Look at an idle connection's socket without reading from it.

    None while nothing says that the server has gone; else the SQLSTATE of its last word, "" for a bare end
    of stream. A server that ends an idle session sends ErrorResponse first (protocol chapter "Message
    Formats"), perhaps after notices; through TLS only the end itself can be seen.
    """
    if descriptor < 0:
        return ""
    poll = select.poll()
    poll.register(descriptor, _LOOK)
    events = poll.poll(0)
    if not events:
        return None
    gone = bool(events[0][1] & _GONE)
    if encrypted and gone:
        return ""
    # A socket object borrows the descriptor for the call; the named family spares three system calls and
    # does not matter to recv().
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM, 0, fileno=descriptor)
    try:
        start = sock.recv(_PEEK_BYTES, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except (BlockingIOError, InterruptedError):
        return "" if gone else None
    except OSError:
        return ""
    finally:
        sock.detach()
    if not start:
        return ""
    sqlstate = None if encrypted else fatal_state(start)
    return "" if sqlstate is None and gone else sqlstate


def shut_socket(descriptor: int) -> None:
    """End both directions of a socket that somebody else owns and may be reading: he sees the end."""
    if descriptor < 0:
        return
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM, 0, fileno=descriptor)
    try:
        sock.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass  # not connected any more
    finally:
        sock.detach()


def fatal_state(data: bytes) -> str | None:
    """The SQLSTATE of the first ErrorResponse in `data`, or None if there is none (notices, notifications,
    parameter changes may arrive while idle)."""
    at = 0
    while at + 5 <= len(data):
        length = int.from_bytes(data[at + 1 : at + 5], "big")
        if data[at : at + 1] == b"E":
            for part in data[at + 5 : at + 1 + length].split(b"\0"):
                if part[:1] == b"C":
                    return part[1:].decode("ascii", "replace")
            return ""
        at += 1 + length
    return None


def await_eof(descriptor: int, timeout_s: float) -> bool:
    """Wait until the peer has closed its side, then close `descriptor` (ours from here on).

    A server process that was told to end still counts against `max_connections` until it has gone: its
    end of stream is the proof. Returns False when `timeout_s` passed first.
    """
    deadline = monotonic() + timeout_s
    with socket.socket(fileno=descriptor) as sock:
        try:
            # The driver has closed its own descriptor; while ours is open, only this tells the server so.
            sock.shutdown(socket.SHUT_WR)
            while (left := deadline - monotonic()) > 0:
                sock.settimeout(left)
                if not sock.recv(65536):
                    return True
        except TimeoutError:
            return False
        except OSError:
            return True
    return False


async def await_eof_async(descriptor: int, timeout_s: float) -> bool:
    """`await_eof` on an event loop. When cancelled it closes `descriptor` at once."""
    with socket.socket(fileno=descriptor) as sock:
        sock.setblocking(False)
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(timeout_s):
                sock.shutdown(socket.SHUT_WR)
                while await loop.sock_recv(sock, 65536):
                    pass
        except TimeoutError:
            return False
        except OSError:
            pass
        return True


def without_values(said: BaseException, dsn: Any) -> str:
    """What an error says about a connection string, without what it quotes from there but for the names of
    parameters: it may be a password."""
    text = str(dsn)

    def shown(quoted: re.Match[str]) -> str:
        part = quoted[2]
        return quoted[0] if len(part) == 1 or part not in text or f"{part}=" in text else "..."

    return re.sub(r"""(["'])(.+?)\1""", shown, str(said).strip())


def row_count(status: str | Sequence[Any]) -> int:
    """The number at the end of a command tag ("INSERT 0 3" gives 3), -1 where there is none."""
    last = str(status).rsplit(" ", 1)[-1]
    return int(last) if last.isdigit() else -1
