"""Asks a server who a user is: auth_query, on a connection of its own that no client ever has a part in.

It is opened when it is needed and closed when nobody has asked for a minute. Its session is the same whoever asks:
search_path is pg_catalog, so that nothing that others have made is found by an unqualified name, transactions are
read-only, and nothing of a client reaches it but the user's name, as a bound parameter. Time and size are bounded.
One question at a time; whoever else asks waits in line. What is made of the answer is for `secrets.py`.

Source: PostgreSQL documentation, "Extended Query", and "Writing SECURITY DEFINER Functions Safely".
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cenote.errors import ProtocolError
from cenote.proxy.auth import say
from cenote.proxy.auth.keys import KeyCache
from cenote.proxy.dial import DialError, dial
from cenote.proxy.inbox import Inbox
from cenote.proxy.peer import Peer
from cenote.wire import messages

if TYPE_CHECKING:
    from cenote.proxy.config import Database

TIMEOUT_S = 5.0  # one question, with the wait in line and the log-in
IDLE_S = 60.0  # after which the connection is closed
_PAUSE_S = 1.0  # after the server could not be reached nobody else tries for so long
_MAX_BYTES = 65_536
_PLACE = ("host", "port", "sslmode", "sslrootcert", "sslcert", "sslkey", "sslnegotiation")
_TEXT = 25
_BOOLEAN = 16
_NOT_ITS_FAULT = ("53", "57", "58")  # errors that say something of the server, nothing of the user
_NUMBERS = (20, 21, 23, 700, 701, 1700)

#: What the session is, whoever asks. A startup packet's settings win over those of the role and the database.
PARAMETERS = {
    b"search_path": b"pg_catalog",
    b"default_transaction_read_only": b"on",
    b"statement_timeout": str(round(TIMEOUT_S * 1000)).encode(),
    b"client_encoding": b"UTF8",
    b"application_name": b"cenote auth_query",
}


@dataclass(frozen=True, slots=True)
class Found:
    """What the server says of a user.

    secret: None: it has none. seconds_left: how long its secret is good for, which may be in the past
    """

    secret: str | None
    can_login: bool = True
    seconds_left: float = math.inf


class LookupFailed(Exception):
    """The query failed, or answered with what cannot be used: this user is not known. `sqlstate`: the server's."""

    def __init__(self, text: str, sqlstate: str = "") -> None:
        super().__init__(text)
        self.sqlstate = sqlstate


class Unreachable(Exception):
    """Nobody can be looked up now, whoever it is."""

    def __init__(self, text: str, sqlstate: str) -> None:
        super().__init__(text)
        self.sqlstate = sqlstate


class Lookups:
    """All that can be asked, for one daemon: after a reload the connections that there are go on. On the event
    loop."""

    def __init__(self, keys: KeyCache, idle_s: float = IDLE_S) -> None:
        self._keys = keys
        self._idle_s = idle_s
        self._made: dict[tuple[object, ...], Lookup] = {}

    def at(self, database: Database, dbname: str, user: str, password: str | None) -> Lookup:
        """Where to ask; databases of one server that are asked about in the same place share a connection."""
        key = (*(getattr(database, name) for name in _PLACE), dbname, user, password)
        lookup = self._made.get(key)
        if lookup is None:
            lookup = self._made[key] = Lookup(database, dbname, user, password, self._keys, self._idle_s)
        return lookup

    async def close(self) -> None:
        """Leave all servers."""
        for lookup in self._made.values():
            await lookup.end()


class Lookup:
    """Questions to one database of one server, as one role. On the event loop.

    :param database: where it is
    :param dbname: the server's name of the database to ask in
    :param user, password: who asks
    """

    def __init__(
        self,
        database: Database,
        dbname: str,
        user: str,
        password: str | None,
        keys: KeyCache,
        idle_s: float = IDLE_S,
    ) -> None:
        self._database = database
        self._dbname = dbname
        self._user = user
        self._password = password
        self._keys = keys
        self._idle_s = idle_s
        self._turn = asyncio.Lock()
        self._line: _Line | None = None
        self._closing: asyncio.TimerHandle | None = None
        self._down: tuple[float, Unreachable] | None = None
        self._asking: dict[tuple[str, str], asyncio.Task[Found | LookupFailed | Unreachable | None]] = {}

    async def ask(self, query: str, user: str) -> Found | None:
        """What the server knows of this user; None: nothing. Who asks the same meanwhile gets the same answer.

        :raises LookupFailed: it would not say.
        :raises Unreachable: it cannot be asked.
        """
        key = (query, user)
        task = self._asking.get(key)
        if task is None:
            task = self._asking[key] = asyncio.get_running_loop().create_task(self._answer(query, user))
            task.add_done_callback(lambda _: self._asking.pop(key, None))
        # Shielded: whoever began it may leave while others wait.
        answer = await asyncio.shield(task)
        if isinstance(answer, Exception):
            raise answer.with_traceback(None)
        return answer

    async def end(self) -> None:
        """Answer nobody any more, and leave the server."""
        tasks = set(self._asking.values())
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        self.close()

    async def _answer(self, query: str, user: str) -> Found | LookupFailed | Unreachable | None:
        """Errors are returned: there may be nobody left to be told."""
        try:
            return await self._in_turn(query, user)
        except (LookupFailed, Unreachable) as error:
            return error

    async def _in_turn(self, query: str, user: str) -> Found | None:
        try:
            async with asyncio.timeout(TIMEOUT_S), self._turn:
                return await self._ask(query, user)
        except TimeoutError:
            raise self._unreachable(f"no answer within {TIMEOUT_S:g} s", "57014") from None

    def close(self) -> None:
        """Leave the server."""
        if self._closing is not None:
            self._closing.cancel()
            self._closing = None
        line, self._line = self._line, None
        if line is not None and not line.lost:
            line.write(messages.TERMINATE)
            line.close()

    async def _ask(self, query: str, user: str) -> Found | None:
        if self._closing is not None:
            self._closing.cancel()
        while True:
            line = self._line
            new = line is None or line.lost
            if line is None or new:
                self._line = line = await self._opened()
            done = False
            try:
                found = await line.ask(query, user)
                done = True
                return found
            except LookupFailed as error:
                done = True
                if error.sqlstate[:2] in _NOT_ITS_FAULT:
                    raise self._unreachable(str(error), error.sqlstate) from None
                raise
            except ProtocolError as error:
                raise self._unreachable(str(error.args[0]), "08P01") from error
            except OSError as error:
                if new:
                    raise self._unreachable(str(error), "08006") from error
                # The server has closed the connection since the last question: one more time, on a new one.
            finally:
                if done:
                    self._closing = asyncio.get_running_loop().call_later(self._idle_s, self.close)
                else:
                    self._line = None
                    line.abort()

    async def _opened(self) -> _Line:
        now = asyncio.get_running_loop().time()
        if self._down is not None and now < self._down[0]:
            raise self._down[1]
        self._down = None
        try:
            line = await dial(
                _Line,
                self._database,
                self._user,
                self._password,
                PARAMETERS,
                TIMEOUT_S,
                self._keys,
                dbname=self._dbname,
            )
        except DialError as error:
            raise self._unreachable(error.message, error.sqlstate) from None
        line.listen()
        with contextlib.suppress(ValueError):
            # Users who do not exist are to look like those that the server makes.
            self._keys.iterations = int(line.parameters.get(b"scram_iterations", b""))
        return line

    def _unreachable(self, text: str, sqlstate: str) -> Unreachable:
        error = Unreachable(text, sqlstate)
        self._down = asyncio.get_running_loop().time() + _PAUSE_S, error
        return error


class _Line(Peer, asyncio.Protocol):
    """A connection for questions."""

    def __init__(self) -> None:
        super().__init__()
        self.parameters: dict[bytes, bytes] = {}
        self.backend_pid = 0
        self.backend_secret = b""
        self.endpoint: Any = None
        self.version = 0
        self._early = b""

    def received(self, data: bytes) -> None:
        self._early += data

    def listen(self) -> None:
        """The log-in is over."""
        self.inbox = Inbox(self.mute, self.unmute)
        self.inbox.feed(self._early)

    async def ask(self, query: str, user: str) -> Found | None:
        """Send the question and read to the end of its answer."""
        inbox = self.inbox
        assert inbox is not None
        say(self, _question(query, user))
        columns: list[tuple[str, int]] = []
        rows: list[list[bytes | None]] = []
        error: dict[str, str] | None = None
        left = _MAX_BYTES
        while True:
            number, body = await inbox.message(left)
            kind = bytes((number,))
            left -= len(body)
            if kind == b"Z":
                if body != b"I":
                    raise ProtocolError("auth_query leaves a transaction open")
                break
            if kind == b"T":
                columns = _columns(body)
            elif kind == b"D":
                rows.append(messages.values(body))
            elif kind == b"E" and error is None:
                error = messages.error_fields(body)
            elif kind not in b"12nCsISNA":
                raise ProtocolError(f"auth_query was answered with a message of type {kind!r}")
        if error is not None:
            raise LookupFailed(f"auth_query: {error.get('M', '')}", error.get("C", ""))
        if len(rows) > 1:
            raise LookupFailed("auth_query has found more than one row")
        # A function that finds nobody may return a row of nothing.
        return _found(columns, rows[0], user) if rows and rows[0][:1] != [None] else None


def _question(query: str, user: str) -> bytes:
    """Parse, Bind, Describe, Execute (two rows at most), Sync."""
    name = user.encode()
    text = messages.cstring(query) + (1).to_bytes(2, "big") + _TEXT.to_bytes(4, "big")
    bound = bytes((0, 0, 0, 0, 0, 1)) + len(name).to_bytes(4, "big") + name + bytes(2)
    return (
        messages.parse(b"", text)
        + messages.message(b"B", bound)
        + messages.message(b"D", b"P\0")
        + messages.message(b"E", b"\0" + (2).to_bytes(4, "big"))
        + messages.SYNC
    )


def _columns(body: bytes) -> list[tuple[str, int]]:
    """Names and types of a RowDescription."""
    found = []
    at = 2
    for _ in range(int.from_bytes(body[:2], "big")):
        end = body.find(b"\0", at)
        if end < 0 or end + 19 > len(body):
            raise ProtocolError("a RowDescription that ends too early")
        found.append((body[at:end].decode("utf-8", "replace"), int.from_bytes(body[end + 7 : end + 11], "big")))
        at = end + 19
    return found


def _found(columns: list[tuple[str, int]], row: list[bytes | None], user: str) -> Found:
    """What a row says: the name, the secret, whether it may log in, whether or when the secret expires."""
    if not 2 <= len(row) <= 4 or len(columns) != len(row):
        raise LookupFailed(f"auth_query has {len(row)} columns: name, secret, may log in, expiry")
    texts = [None if part is None else part.decode("utf-8", "surrogateescape") for part in row]
    name, secret, can_login, expiry = [*texts, None, None][:4]
    if name != user:
        raise LookupFailed("auth_query has found another user than it was asked for")
    if len(row) > 2 and columns[2][1] != _BOOLEAN:
        raise LookupFailed("auth_query: the third column, whether the user may log in, is no boolean")
    seconds_left = math.inf
    if len(row) > 3 and columns[3][1] == _BOOLEAN:
        seconds_left = -1.0 if expiry == "t" else math.inf
    elif len(row) > 3 and columns[3][1] in _NUMBERS:
        seconds_left = math.inf if expiry is None else float(expiry)
    elif len(row) > 3:
        raise LookupFailed(
            "auth_query: the fourth column is neither a boolean (expired) nor a number (seconds until it expires)"
        )
    return Found(secret, len(row) < 3 or can_login == "t", seconds_left)
