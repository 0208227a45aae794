"""What the proxy itself wants of a server connection: to borrow one for a moment, to have it carry settings, to be
told what has become of a session. Each is a query of our own with something to do behind its answer.

It decides nothing: what an answer means is the pool's.
"""

from __future__ import annotations

from typing import Any

from cenote.errors import ProtocolError
from cenote.proxy.replies import OWN_QUERY
from cenote.proxy.roles import Borrower
from cenote.proxy.settings import AT_ONCE, DEFERRABLE, ROLES
from cenote.proxy.state import answer, patient, question, version_of
from cenote.reasons import Pinned
from cenote.sql import touch
from cenote.wire import messages

_IDLE = 0x49
_TRIES = 5  # under a statement_timeout of a millisecond even the shortest text is cancelled at times


class Guest(Borrower):
    """A borrower of our own: it wants a connection with certain settings for a moment, as a client would.

    there: done with None when it has one, with the error message otherwise
    """

    def __init__(self, pool: Any, settings: Any, there: Any) -> None:
        super().__init__()
        self.pool = pool
        self.settings = settings
        self.there = there
        self.address = "cenote"

    def granted(self, server: Any) -> None:
        self.waiter = None
        if not self.pool.convert(self, server):
            self.go_on()

    def borrow(self) -> Any:
        """A connection that carries its settings, or None: wait for `there`, unless `declined` says why not."""
        server = self.pool.borrow(self)
        if server is None or self.pool.convert(self, server):
            return None
        return server

    def go_on(self) -> None:
        self.holding = False
        self.end(None)

    def refuse(self, error: bytes) -> None:
        """There is no connection."""
        self.waiter = None
        self.end(error)

    def misfit(self, error: bytes) -> None:
        """The server refuses these settings."""
        self.end(messages.message(b"E", error))

    def start_over(self, server: Any) -> None:
        """The connection ended before it carried the settings: have another one."""
        if self.borrow() is not None:
            self.go_on()
        elif self.declined is not None:
            self.end(self.declined)

    def server_lost(self, server: Any) -> None:
        """The connection ended."""
        self.fail("08006", "cenote: the server closed the connection unexpectedly")

    def fail(self, sqlstate: str, text: str) -> None:
        """The pool ends."""
        self.end(messages.error("FATAL", sqlstate, text))

    def end(self, error: bytes | None) -> None:
        """Tell who waits."""
        if not self.there.done():
            self.there.set_result(error)

    def write(self, data: bytes) -> None:
        """Nobody reads it."""

    def mute(self) -> None:
        """There is nothing to stop."""


class Learning:
    """What is known of a question until the server answers."""

    def __init__(self, pool: Any, client: Any, server: Any) -> None:
        self.pool = pool
        self.client = client
        self.server = server
        self.rows: list[bytes] = []
        self.sql = b""
        self.touches = client.touched
        self.builtin = client.builtin
        self.tries = 0
        self.untold = False

    def ask(self, again: bool = False) -> None:
        """Ask; again: its own statement_timeout was in the way."""
        client, server = self.client, self.server
        customs: set[bytes] = set()
        said: set[bytes] = set()
        if self.touches & (touch.SETTINGS | touch.UNKNOWN):
            said |= client.customs or set()
            customs |= server.defaults.keys() - set(ROLES)
            if client.settings is not None:
                customs |= client.settings.customs
        if self.touches & touch.UNKNOWN:
            customs |= self.pool.custom_names()
        sql = question(self.touches, self.builtin, customs, said, version_of(server.parameters))
        self.tries += 1
        self.rows.clear()
        sql = patient(sql) if again else sql
        if self.builtin or (client.settings is not None and DEFERRABLE in dict(client.settings.items)):
            sql = AT_ONCE + b";" + sql
        self.server.inject(sql, self.done, self.rows)

    def done(self, error: bytes | None) -> None:
        """The server has answered."""
        client, server = self.client, self.server
        if server.client is not client:
            return  # it has left; the connection is cleaned for that
        if timed_out(error) and self.tries < _TRIES:
            self.ask(again=True)
            return
        client.touched = 0
        client.builtin = False
        client.asking = False
        roles = self.pool.base_of(server)
        try:
            told = answer(self.rows, self.touches, self.builtin, roles) if error is None else None
        except ProtocolError:
            told = None
        if told is None:
            if self.pool.keeps(client, server, str(Pinned.UNKNOWN), touch.UNKNOWN):
                client.own_names(server)
                client.go_on_after(server)
            return
        self.pool.learned(client, server, told)

    def put_back(self, error: bytes | None) -> None:
        """The client's settings are back, or cannot be had."""
        client, server = self.client, self.server
        if timed_out(error) and self.tries < _TRIES and server.status == _IDLE:
            self.tries += 1
            server.inject(self.sql, self.put_back, None, True)
            return
        client.asking = False
        if server.client is client:
            if self.untold:
                client.write(messages.ready(bytes((server.status,))))
            if error is not None:
                client.touched |= touch.SETTINGS
                client.builtin = True
            client.go_on_after(server)


class Conversion:
    """What is known of a conversion until the server answers.

    cancelled: it was, for its client: that hears so in answer to what it has sent
    """

    def __init__(self, pool: Any, client: Any, server: Any, settings: Any, sql: bytes) -> None:
        self.pool = pool
        self.client = client
        self.server = server
        self.settings = settings
        self.sql = sql
        self.tries = 0
        self.cancelled = False

    def ask(self) -> None:
        """Send it."""
        self.tries += 1
        self.server.inject(self.sql, self.done)

    def runs(self) -> bool:
        """Whether the server has answered to everything that was sent before."""
        return bool(self.server.replies.kind == OWN_QUERY and self.server.replies.pending() == 1)

    def done(self, error: bytes | None) -> None:
        """The server has answered."""
        if timed_out(error) and self.tries < _TRIES and not self.cancelled:
            self.ask()
        else:
            self.pool.converted(self.client, self.server, self.settings, error, self.cancelled)


def timed_out(error: bytes | None) -> bool:
    """A statement_timeout that was there before was in the way."""
    return error is not None and b"\0C57014\0" in error
