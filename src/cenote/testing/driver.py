"""A PostgreSQL driver in memory, for tests of what a pool does when a driver is slow, fails or is cancelled.

`ScriptedDriver` is for `Pool`, `AsyncScriptedDriver` for `AsyncPool`; both are passed as `driver=`. Whatever
an adapter can be asked for is an *operation* ("connect", "query", "reset" ...), and a test says what the next
one does: take time, fail, break the connection, be held until the test lets it go. Behind the connections
stands a `ScriptedServer` that answers each query with the mark the query carried; a client that reads an
answer meant for somebody else is seen there (`misdelivered`), as is session state that was left behind.

It refuses to understand SQL beyond the classifier: every statement is answered with its parameters, or with
its text when it has none. It never sleeps: asyncio delays are timers of the running loop, those of
`ScriptedDriver` move a `VirtualClock`.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable
from contextlib import contextmanager
from time import monotonic
from typing import TYPE_CHECKING, Any

from cenote.pool.drivers.base import IN_TRANSACTION, Session
from cenote.reasons import Failure, failure_of
from cenote.sql.classify import classify
from cenote.testing.clock import VirtualClock
from cenote.testing.scripted import (
    AsyncScriptedConnection,
    Call,
    Hold,
    Outcome,
    ScriptedConnection,
    ScriptedError,
    ScriptedServer,
    mark,
    turn,
    wake,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cenote.pool.drivers.base import AsyncDriver, Driver

# What can be scripted; each is a call of the adapter that may reach the server.
OPERATIONS = (
    "connect",
    "ping",
    "reset",
    "convert",
    "cancel",
    "close",
    "leave",
    "begin",
    "commit",
    "rollback",
    "query",
)

_HELD_FOR_S = 30.0  # a held operation of a blocking driver ends by itself: a failed test must not hang


class Scripted:
    """What both drivers share: the script, the record, the server, and everything that does no waiting.

    server: the `ScriptedServer`
    calls: every operation asked for, a `Call` each, in order
    """

    name = "scripted"
    weak = True
    cancellable = True
    carries = True
    _connection_class: type[ScriptedConnection]

    def __init__(self, server: ScriptedServer | None, clock: Callable[[], float] | None) -> None:
        self.server = server if server is not None else ScriptedServer()
        self.calls: list[Call] = []
        self._clock = clock
        self._changed = threading.Condition()
        self._next: dict[str, deque[Outcome]] = {}
        self._always: dict[str, Outcome] = {}

    # -- the script ---------------------------------------------------------------------------------------------

    def next(
        self, operation: str, *, delay: float = 0.0, error: BaseException | None = None, breaks: bool = False
    ) -> None:
        """Say what the next `operation` does that nothing was said of yet.

        :param operation: one of `OPERATIONS`
        :param delay: seconds it takes
        :param error: raised at its end
        :param breaks: the connection is broken at its end
        """
        self._queue(operation).append(Outcome(delay, error, breaks))

    def always(
        self, operation: str, *, delay: float = 0.0, error: BaseException | None = None, breaks: bool = False
    ) -> None:
        """Say what every `operation` does for which `next` says nothing. Parameters as for `next`."""
        self._queue(operation)
        self._always[operation] = Outcome(delay, error, breaks)

    def hold(self, operation: str) -> Hold:
        """Stop the next `operation` after the server has seen it, until the `Hold` is released."""
        hold = Hold(self._changed)
        self._queue(operation).append(Outcome(hold=hold))
        return hold

    def hang(self, operation: str) -> None:
        """The next `operation` never ends by itself: only by its timeout, a cancellation, `cancel` or `cut`."""
        self.hold(operation)

    def count(self, operation: str) -> int:
        """How often `operation` was asked for."""
        return sum(call.operation == operation for call in self.calls)

    def _queue(self, operation: str) -> deque[Outcome]:
        if operation not in OPERATIONS:
            raise ValueError(f"operation = {operation!r}: use one of {', '.join(OPERATIONS)}")
        return self._next.setdefault(operation, deque())

    def _begins(self, operation: str, conn: ScriptedConnection | None, detail: Any = None) -> Outcome:
        """An operation reaches the driver: record it, look up what it does, send it."""
        self.calls.append(Call(operation, conn.number if conn is not None else 0, detail, self._time()))
        queue = self._next.get(operation)
        outcome = queue.popleft() if queue else self._always.get(operation, Outcome())
        if conn is not None:
            self._alive(conn)
            conn.interrupt = None
            conn.unread.append(detail if operation == "query" else operation)
        return outcome

    def _ends(self, outcome: Outcome, conn: ScriptedConnection | None, asked: Any) -> Any:
        """The first answer that was not read yet arrives; it need not be the one that was asked for."""
        error = outcome.error
        if conn is None:
            if error is not None:
                raise error
            return None
        if conn.interrupt is not None:
            error, conn.interrupt = conn.interrupt, None
        if outcome.breaks:
            conn.broken = True
            self.server.sessions.pop(conn.number, None)
        if conn.broken and error is not None:
            raise error
        self._alive(conn)
        got = conn.unread.popleft()
        if error is not None:  # the error is the answer
            conn.session.sqlstate = getattr(error, "sqlstate", "")
            raise error
        if got is not asked and got != asked:
            self.server.misdelivered.append((conn.number, asked, got))
        return got

    def _alive(self, conn: ScriptedConnection) -> None:
        if conn.wire.last_word is not None and not conn.broken:
            conn.broken = True
            conn.session.sqlstate = conn.wire.last_word
            raise ScriptedError("the server closed the connection", conn.wire.last_word)
        if conn.closed or conn.broken:
            raise ScriptedError("the connection is closed")

    def _dialed(self) -> ScriptedConnection:
        server = self.server
        conn = self._connection_class(self, next(server._numbers))
        server.sessions[conn.number] = conn.wire
        server.most = max(server.most, len(server.sessions))
        return conn

    def _sends(self, conn: ScriptedConnection, sql: str, params: Any) -> Outcome:
        """A statement goes to the server, which will answer with its mark."""
        outcome = self._begins("query", conn, mark(sql, params))
        session = conn.session
        if not session.statements and conn.residue:
            self.server.inherited.append((conn.number, tuple(conn.residue)))
        verdict = classify(sql)
        session.touched |= verdict.touches
        if verdict.touches:
            conn.residue.append(sql)
        if verdict.opens_transaction:
            conn.in_transaction = True
        elif sql.split(None, 1)[0].upper() in ("COMMIT", "ROLLBACK"):
            conn.in_transaction = False
        session.last_sql = sql
        session.statements += 1
        session.query_since_s = self._time()
        return outcome

    def _not_busy(self, conn: ScriptedConnection) -> None:
        if conn.unread:
            raise ScriptedError("another operation is in progress")

    def _clean(self, conn: ScriptedConnection, touched: int) -> None:
        conn.unread.clear()
        conn.in_transaction = False
        conn.residue.clear()
        if touched:
            conn.conversions.clear()
        conn.session.touched = 0

    @contextmanager
    def _timed(self, conn: ScriptedConnection) -> Iterator[None]:
        session = conn.session
        try:
            yield
        finally:
            if session.query_since_s:
                session.in_query_s += self._time() - session.query_since_s
                session.query_since_s = 0.0

    def _time(self) -> float:
        raise NotImplementedError

    def ask(self, conn: ScriptedConnection, sql: str, params: Any) -> Any:
        """What a connection's `execute` does."""
        raise NotImplementedError

    # -- the part of the protocol that never waits --------------------------------------------------------------

    def settle(self, conn: ScriptedConnection) -> None:
        conn.session.touched = 0
        conn.residue.clear()

    def session(self, conn: ScriptedConnection) -> Session:
        return conn.session

    def handle(self, conn: ScriptedConnection) -> int:
        return conn.number

    def condition(self, conn: ScriptedConnection) -> int:
        return conn.condition()

    def peek(self, conn: ScriptedConnection) -> str | None:
        return "" if conn.closed or conn.broken else conn.wire.last_word

    def tidy(self, conn: ScriptedConnection) -> None:
        conn.session.attributes = False

    def cut(self, conn: ScriptedConnection) -> None:
        conn.broken = True
        self._interrupt(conn, ScriptedError("the socket was shut down"))
        self.server.sessions.pop(conn.number, None)

    def closed_by_borrower(self, conn: ScriptedConnection) -> bool:
        return conn.closed_by_borrower

    def disown(self, conn: ScriptedConnection) -> None:
        conn.closed = True

    def failure(self, error: BaseException) -> tuple[Failure, str]:
        if isinstance(error, ScriptedError):
            return (failure_of(error.sqlstate) if error.sqlstate else Failure.CONNECTION), error.sqlstate
        if isinstance(error, OSError):  # TimeoutError is one
            return Failure.DESTINATION, ""
        raise TypeError(f"not an error of this driver: {error!r}")

    def _interrupt(self, conn: ScriptedConnection, error: BaseException) -> None:
        """Whatever runs on `conn` ends with `error`."""
        with self._changed:
            conn.interrupt = error
            self._changed.notify_all()
        wake(conn._waiters)

    def _gone(self, conn: ScriptedConnection | None, handle: int) -> None:
        self.server.sessions.pop(handle if handle is not None else conn.number if conn is not None else 0, None)
        if conn is not None:
            conn.closed = True


class ScriptedDriver(Scripted):
    """The scripted driver for `Pool`: `Pool(driver=ScriptedDriver())`.

    :param server: default: one of its own
    :param clock: a `VirtualClock` that scripted delays advance; without one an operation takes no time
    """

    _connection_class = ScriptedConnection

    def __init__(self, server: ScriptedServer | None = None, *, clock: VirtualClock | None = None) -> None:
        super().__init__(server, clock)

    def _time(self) -> float:
        return self._clock() if self._clock is not None else monotonic()

    def _pass(
        self,
        outcome: Outcome,
        conn: ScriptedConnection | None,
        asked: Any = None,
        timeout_s: float = _HELD_FOR_S,
    ) -> Any:
        if outcome.delay:
            if not isinstance(self._clock, VirtualClock):
                raise ValueError(
                    "a delay moves a virtual clock: ScriptedDriver(clock=VirtualClock()), or use hold()"
                )
            self._clock.advance(min(outcome.delay, timeout_s))
            if outcome.delay > timeout_s:
                raise TimeoutError(f"no answer within {timeout_s:g} s")
        hold = outcome.hold
        if hold is not None:
            hold._arrive()
            with self._changed:
                went_on = self._changed.wait_for(
                    lambda: hold._released or (conn is not None and conn.interrupt is not None), timeout_s
                )
            if not went_on:
                raise TimeoutError(f"no answer within {timeout_s:g} s")
        return self._ends(outcome, conn, asked)

    def ask(self, conn: ScriptedConnection, sql: str, params: Any) -> Any:
        outcome = self._sends(conn, sql, params)
        with self._timed(conn):
            return self._pass(outcome, conn, mark(sql, params))

    def connect(self, timeout_s: float) -> ScriptedConnection:
        outcome = self._begins("connect", None)
        self._pass(outcome, None, None, timeout_s)
        return self._dialed()

    def ping(self, conn: ScriptedConnection, timeout_s: float) -> None:
        self._pass(self._begins("ping", conn), conn, "ping", timeout_s)

    def reset(self, conn: ScriptedConnection, touched: int, timeout_s: float) -> None:
        conn.unread.clear()  # what still ran was stopped, and its answer thrown away
        self._pass(self._begins("reset", conn, touched), conn, "reset", timeout_s)
        self._clean(conn, touched)

    def convert(self, conn: ScriptedConnection, script: str, replan: bool, timeout_s: float) -> None:
        outcome = self._begins("convert", conn, script)
        conn.conversions.append(script)  # sent is done, as far as the server is concerned
        self._pass(outcome, conn, "convert", timeout_s)

    def cancel(self, conn: ScriptedConnection) -> None:
        self._pass(self._begins("cancel", None, conn.number), None)
        self._interrupt(conn, ScriptedError("canceling statement due to user request", "57014"))

    def close(self, conn: ScriptedConnection | None, handle: int, timeout_s: float) -> None:
        try:
            self._pass(self._begins("close", None, handle), None, None, timeout_s)
        finally:
            self._gone(conn, handle)

    def leave(self, conn: ScriptedConnection, failed: bool) -> None:
        if conn.condition() == IN_TRANSACTION:  # else there is nothing to end, or no way to end it here
            self._pass(self._begins("leave", conn, failed), conn, "leave")
            conn.in_transaction = False

    def begin(self, conn: ScriptedConnection) -> None:
        self._not_busy(conn)
        outcome = self._begins("begin", conn)
        conn.in_transaction = True  # sent is begun, as far as the server is concerned
        self._pass(outcome, conn, "begin")

    def commit(self, conn: ScriptedConnection) -> None:
        self._not_busy(conn)
        self._pass(self._begins("commit", conn), conn, "commit")
        conn.in_transaction = False

    def rollback(self, conn: ScriptedConnection) -> None:
        self._not_busy(conn)
        self._pass(self._begins("rollback", conn), conn, "rollback")
        conn.in_transaction = False

    def execute(self, conn: ScriptedConnection, sql: Any, params: Any) -> int:
        self.ask(conn, sql, params)
        return -1

    def fetch_all(self, conn: ScriptedConnection, sql: Any, params: Any) -> list[Any]:
        return [(self.ask(conn, sql, params),)]

    def fetch_one(self, conn: ScriptedConnection, sql: Any, params: Any) -> Any:
        return (self.ask(conn, sql, params),)

    def fetch_value(self, conn: ScriptedConnection, sql: Any, params: Any) -> Any:
        return self.ask(conn, sql, params)


class AsyncScriptedDriver(Scripted):
    """The scripted driver for `AsyncPool`: `AsyncPool(driver=AsyncScriptedDriver(), clock=loop.time)`.

    Every operation suspends once at least, as one that reaches a network does; delays are timers of the
    running loop, which a `VirtualLoop` jumps over.

    :param server: default: one of its own
    """

    _connection_class = AsyncScriptedConnection

    def __init__(self, server: ScriptedServer | None = None) -> None:
        super().__init__(server, None)

    def _time(self) -> float:
        return asyncio.get_running_loop().time()

    async def _pass(
        self,
        outcome: Outcome,
        conn: ScriptedConnection | None,
        asked: Any = None,
        timeout_s: float | None = None,
    ) -> Any:
        mine = conn._waiters if conn is not None else []  # whoever interrupts the connection wakes these
        async with asyncio.timeout(timeout_s):
            hold = outcome.hold
            if hold is not None:
                hold._arrive()
                while not hold._released and (conn is None or conn.interrupt is None):
                    await turn(hold._waiters, mine)
            elif outcome.delay:
                timer = asyncio.get_running_loop().call_later(outcome.delay, wake, mine)
                try:
                    await turn(mine)
                finally:
                    timer.cancel()
            else:
                await asyncio.sleep(0)
        return self._ends(outcome, conn, asked)

    async def ask(self, conn: ScriptedConnection, sql: str, params: Any) -> Any:
        outcome = self._sends(conn, sql, params)
        with self._timed(conn):
            return await self._pass(outcome, conn, mark(sql, params))

    async def connect(self, timeout_s: float) -> ScriptedConnection:
        outcome = self._begins("connect", None)
        await self._pass(outcome, None, None, timeout_s)
        return self._dialed()

    async def ping(self, conn: ScriptedConnection, timeout_s: float) -> None:
        await self._pass(self._begins("ping", conn), conn, "ping", timeout_s)

    async def reset(self, conn: ScriptedConnection, touched: int, timeout_s: float) -> None:
        conn.unread.clear()  # what still ran was stopped, and its answer thrown away
        await self._pass(self._begins("reset", conn, touched), conn, "reset", timeout_s)
        self._clean(conn, touched)

    async def convert(self, conn: ScriptedConnection, script: str, replan: bool, timeout_s: float) -> None:
        outcome = self._begins("convert", conn, script)
        conn.conversions.append(script)
        await self._pass(outcome, conn, "convert", timeout_s)

    async def cancel(self, conn: ScriptedConnection) -> None:
        await self._pass(self._begins("cancel", None, conn.number), None)
        self._interrupt(conn, ScriptedError("canceling statement due to user request", "57014"))

    async def close(self, conn: ScriptedConnection | None, handle: int, timeout_s: float) -> None:
        try:
            await self._pass(self._begins("close", None, handle), None, None, timeout_s)
        finally:
            self._gone(conn, handle)

    async def leave(self, conn: ScriptedConnection, failed: bool) -> None:
        if conn.condition() == IN_TRANSACTION:  # else there is nothing to end, or no way to end it here
            await self._pass(self._begins("leave", conn, failed), conn, "leave")
            conn.in_transaction = False

    async def begin(self, conn: ScriptedConnection) -> None:
        self._not_busy(conn)
        outcome = self._begins("begin", conn)
        conn.in_transaction = True  # sent is begun, as far as the server is concerned
        await self._pass(outcome, conn, "begin")

    async def commit(self, conn: ScriptedConnection) -> None:
        self._not_busy(conn)
        await self._pass(self._begins("commit", conn), conn, "commit")
        conn.in_transaction = False

    async def rollback(self, conn: ScriptedConnection) -> None:
        self._not_busy(conn)
        await self._pass(self._begins("rollback", conn), conn, "rollback")
        conn.in_transaction = False

    async def execute(self, conn: ScriptedConnection, sql: Any, params: Any) -> int:
        await self.ask(conn, sql, params)
        return -1

    async def fetch_all(self, conn: ScriptedConnection, sql: Any, params: Any) -> list[Any]:
        return [(await self.ask(conn, sql, params),)]

    async def fetch_one(self, conn: ScriptedConnection, sql: Any, params: Any) -> Any:
        return (await self.ask(conn, sql, params),)

    async def fetch_value(self, conn: ScriptedConnection, sql: Any, params: Any) -> Any:
        return await self.ask(conn, sql, params)


if TYPE_CHECKING:
    _sync: type[Driver] = ScriptedDriver
    _asyncio: type[AsyncDriver] = AsyncScriptedDriver
