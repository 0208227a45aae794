"""What stands behind a scripted driver, and what a test says to it: its connections, their server, and holds.

It belongs to `driver.py`, which says what it is for.
"""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cenote.pool.drivers.base import BROKEN, BUSY, IDLE, IN_TRANSACTION, Session

if TYPE_CHECKING:
    from cenote.testing.driver import Scripted


class ScriptedError(Exception):
    """An error of the scripted driver. `sqlstate` is the server's ("" when it did not come from there)."""

    def __init__(self, message: str = "scripted", sqlstate: str = "") -> None:
        self.sqlstate = sqlstate
        super().__init__(message)


class Hold:
    """An operation that was stopped on its way; the test decides when it goes on.

    From a coroutine `await hold.reached()`; from a thread `hold.wait_reached()`. Then `hold.release()`.
    """

    def __init__(self, changed: threading.Condition) -> None:
        self._changed = changed
        self._reached = False
        self._released = False
        self._waiters: list[asyncio.Future[None]] = []

    @property
    def is_reached(self) -> bool:
        """Whether the operation has arrived here."""
        return self._reached

    def wait_reached(self, timeout: float = 10.0) -> None:
        """Wait, on a thread, until the operation has arrived here.

        :param timeout: real seconds
        :raises TimeoutError: it has not
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self._reached, timeout):
                raise TimeoutError(f"nothing has arrived at the hold within {timeout:g} s")

    async def reached(self) -> None:
        """Wait, in a coroutine, until the operation has arrived here."""
        while not self._reached:
            await turn(self._waiters)

    def release(self) -> None:
        """Let the operation go on, now or when it arrives."""
        with self._changed:
            self._released = True
            self._changed.notify_all()
        wake(self._waiters)

    def _arrive(self) -> None:
        with self._changed:
            self._reached = True
            self._changed.notify_all()
        wake(self._waiters)


async def turn(*waiters: list[asyncio.Future[None]]) -> None:
    """Suspend until somebody wakes one of these lists."""
    future = asyncio.get_running_loop().create_future()
    for some in waiters:
        some.append(future)
    try:
        await future
    finally:
        for some in waiters:
            if future in some:
                some.remove(future)


def wake(waiters: list[asyncio.Future[None]]) -> None:
    woken, waiters[:] = list(waiters), []
    for future in woken:
        if not future.done():
            future.set_result(None)


@dataclass
class Outcome:
    """What one operation does.

    delay: seconds it takes; error: raised at its end; breaks: the connection is broken then;
    hold: it stops here first, after the server has seen it
    """

    delay: float = 0.0
    error: BaseException | None = None
    breaks: bool = False
    hold: Hold | None = None


@dataclass(frozen=True)
class Call:
    """One operation that was asked for: at what time, of which connection (0: none yet), and with what."""

    operation: str
    connection: int
    detail: Any
    at: float


class ServerSession:
    """The server's side of a connection. It does not keep the client's side alive: a dropped one is a leak.

    last_word: SQLSTATE with which the server ended it, None while it has not
    """

    def __init__(self, number: int) -> None:
        self.number = number
        self.last_word: str | None = None


class ScriptedServer:
    """What the connections of scripted drivers are connected to; several drivers may share one.

    sessions: what the server believes to be connected, by number: a connection nobody closed stays here
    most: how many it had at once
    misdelivered: answers that reached somebody else, as (connection, asked, got)
    inherited: borrowers that found the last one's session state, as (connection, what)
    """

    def __init__(self) -> None:
        self.sessions: dict[int, ServerSession] = {}
        self.most = 0
        self.misdelivered: list[tuple[int, Any, Any]] = []
        self.inherited: list[tuple[int, tuple[str, ...]]] = []
        self._numbers = itertools.count(1)

    def kill(self, conn: ScriptedConnection, sqlstate: str = "57P01") -> None:
        """End one session, as `pg_terminate_backend` does. Its client notices when it looks or sends."""
        self._end(conn.wire, sqlstate)

    def _end(self, wire: ServerSession, sqlstate: str) -> None:
        wire.last_word = sqlstate
        self.sessions.pop(wire.number, None)

    def restart(self, sqlstate: str = "57P01") -> None:
        """End every session."""
        for wire in list(self.sessions.values()):
            self._end(wire, sqlstate)

    def assert_honest(self) -> None:
        """Raise AssertionError if an answer or session state reached the wrong borrower."""
        assert not self.misdelivered, f"answers reached the wrong borrower: {self.misdelivered}"
        assert not self.inherited, f"session state was handed on: {self.inherited}"


class ScriptedConnection:
    """A connection of `ScriptedDriver`.

    number: from 1, in the order they were opened
    wire: the server's side
    unread: marks of queries whose answers were not read
    residue: statements that left session state behind
    conversions: scripts that made it carry settings, since the last reset
    """

    def __init__(self, driver: Scripted, number: int) -> None:
        self._driver = driver
        self.number = number
        self.session = Session()
        self.wire = ServerSession(number)
        self.closed = False
        self.closed_by_borrower = False
        self.broken = False
        self.in_transaction = False
        self.unread: deque[Any] = deque()
        self.residue: list[str] = []
        self.conversions: list[str] = []
        self.interrupt: BaseException | None = None
        self._waiters: list[asyncio.Future[None]] = []

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.number} {_CONDITIONS[self.condition()]}>"

    def condition(self) -> int:
        """IDLE, IN_TRANSACTION, BUSY or BROKEN of `cenote.pool.drivers.base`."""
        if self.closed or self.broken:
            return BROKEN
        if self.unread:
            return BUSY
        return IN_TRANSACTION if self.in_transaction else IDLE

    def execute(self, sql: str, params: Any = None) -> Any:
        """Send a statement and return its mark: `params`, or the text."""
        return self._driver.ask(self, sql, params)

    def close(self) -> None:
        """Close it, as a borrower may."""
        self.closed = self.closed_by_borrower = True
        self._driver.server.sessions.pop(self.number, None)


class AsyncScriptedConnection(ScriptedConnection):
    """A connection of `AsyncScriptedDriver`: the same, `execute` and `close` being coroutines."""

    async def execute(self, sql: str, params: Any = None) -> Any:
        return await self._driver.ask(self, sql, params)

    async def close(self) -> None:  # type: ignore[override]
        ScriptedConnection.close(self)


def mark(sql: str, params: Any) -> Any:
    return params if params is not None else sql


_CONDITIONS = {IDLE: "idle", IN_TRANSACTION: "in transaction", BUSY: "busy", BROKEN: "broken"}
