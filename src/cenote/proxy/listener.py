"""The shared listener of a pool: one server connection hears for all of its clients that listen.

It is a lease like any other, in `max_size` and in the server's budget, and there only while somebody listens: the
connection of the first client that does is taken over as it is, and given back after the last. It gives way to an
operator's pause and reconnect, and when nobody else could be served any more. Until another connection listens
there is a gap, of which each client is told.

How a client's channels come here without losing a notification is in `ear.py`. It decides nothing about who may
keep a connection.
"""

from __future__ import annotations

import secrets
from time import monotonic
from typing import Any

from cenote.core.machine import PAUSED, RUNNING
from cenote.proxy.asking import Guest
from cenote.proxy.channels import channel_of, listening, quoted
from cenote.proxy.ear import AGAIN_S, HANDOVER_S, Ear
from cenote.proxy.log import get_log
from cenote.proxy.returning import Return
from cenote.reasons import TEXT, Closed
from cenote.sql import touch
from cenote.wire import messages

log = get_log("cenote.proxy.pool")

#: How long all wait for a client that does not read.
SLOW_S = 5.0
_PAUSE_S = 1.0  # between two attempts to listen again; and how long others may stand in line before it gives way
# A session that only hears is not idle for nothing, and has time; its tokens need not survive a crash.
_SETUP = (
    b"SELECT pg_catalog.set_config(name, '0', false) FROM pg_catalog.pg_settings"
    b" WHERE name OPERATOR(pg_catalog.=) 'idle_session_timeout';"
    b"SET synchronous_commit = off;SET statement_timeout = 0;SET lock_timeout = 0"
)


class Listener(Guest):
    """Who listens to what in one pool, and the borrower of the connection that hears it. On the event loop.

    live: the connection listens to all of `by_channel`
    encoding: the client encoding in which it hears; clients of another keep connections of their own
    crossing: by token, whose channels are being handed over
    waiting: clients that keep a connection of their own, because theirs could not be
    slow: clients that read more slowly than notifications come, since when: nothing more is heard until they have
    early: what came before the clients were told of the gap
    missed: there is a gap they are to be told of: its reason
    gaps: how many there were; delivered: notifications passed to clients
    word: in all the names that are ours; prefix: of our tokens, which no client sees
    """

    def __init__(self, pool: Any) -> None:
        super().__init__(pool, None, None)
        self.address = "cenote (listener)"
        self.ties = touch.LISTEN
        self.ear = self
        self.live = False
        self.encoding = b""
        self.by_channel: dict[bytes, set[Ear]] = {}
        self.crossing: dict[bytes, Ear | Return] = {}
        self.waiting: set[Ear] = set()
        self.slow: dict[Ear, float] = {}
        self.early: list[bytes] = []
        self.missed = ""
        self.gaps = 0
        self.delivered = 0
        self.tried_at = 0.0
        self.tokens = 0
        self.word = b"m" + secrets.token_hex(8).encode()
        self.prefix = b"cenote:" + self.word + b":"

    # -- clients ----------------------------------------------------------------------------------------------

    def settle(self, client: Any, server: Any, held: int) -> None:
        """A client may have come to listen, or to listen no more.

        :param held: the kinds of state that keep its connection
        """
        if client.ear is None:
            client.ear = Ear(client, self)
        self.waiting.discard(client.ear)
        client.ear.settle(server, held)

    def ears(self) -> set[Ear]:
        """All clients that listen by this connection. O(clients and channels)"""
        return {ear for ears in self.by_channel.values() for ear in ears}

    def new_token(self) -> bytes:
        """A word that nobody has used, of plain ASCII."""
        self.tokens += 1
        return self.prefix + b"%x" % self.tokens

    def may_adopt(self, client: Any, server: Any) -> bool:
        """Whether this client's own connection may become the shared one."""
        pool, machine = self.pool, self.pool.machine
        others = pool.pinned - bool(client.pin)
        free = self.server is None and self.waiter is None and not self.by_channel and machine.mode == RUNNING
        certain = not (server.cancels or server.doubtful)
        return free and certain and min(machine.limit, machine.max_size) > 1 and others < pool.max_pinned

    def adopt(self, client: Any, server: Any, ear: Ear, channels: set[bytes]) -> None:
        """Take over the connection of a client that listens to these."""
        self.encoding = server.parameters.get(b"client_encoding", b"")
        if self.pool.base.get(b"client_encoding") == self.encoding:
            self.settings = None
        else:
            self.settings = self.pool.settings_of(((b"client_encoding", self.encoding),))
        self._register(ear, channels)
        ear.channels |= channels
        self.pool.adopt(client, server, self)
        self.live = True
        self.missed = ""
        if not self.pool.convert(self, server):
            self.go_on()

    def receive(self, ear: Ear, channels: set[bytes]) -> None:
        """Listen to these, too, and send the token of this client on its way."""
        self._register(ear, channels)
        self.crossing[ear.token] = ear
        sql = listening({ear.token, *channels}) + b";NOTIFY " + quoted(ear.token)
        self.server.inject(sql, self._obeyed)

    def fits(self, server: Any) -> bool:
        """Whether it hears in the client encoding of this connection."""
        return bool(server.parameters.get(b"client_encoding") == self.encoding)

    def uncross(self, token: bytes) -> None:
        """The hand-over is over, in one way or the other."""
        if self.crossing.pop(token, None) is not None:
            self._unlisten([token])

    def remove(self, ear: Ear, channels: set[bytes]) -> None:
        """A client does not listen to these any more."""
        gone = []
        for channel in channels:
            ears = self.by_channel.get(channel, set())
            ears.discard(ear)
            if not ears and self.by_channel.pop(channel, None) is not None:
                gone.append(channel)
        self._unlisten(gone)

    def dismiss(self, ear: Ear) -> None:
        """A client listens to nothing any more, whatever was under way."""
        self.waiting.discard(ear)
        self.wait_no_longer(ear)
        self.remove(ear, ear.channels | ear.coming)
        self.uncross(ear.token)
        if ear.returning is not None:
            self.uncross(ear.returning.token)

    def _register(self, ear: Ear, channels: set[bytes]) -> None:
        for channel in channels:
            self.by_channel.setdefault(channel, set()).add(ear)

    def _unlisten(self, channels: list[bytes]) -> None:
        if not self.by_channel and not self.crossing:
            self._give_back()
        elif channels and self.live:
            self.server.inject(b";".join([b"UNLISTEN " + quoted(channel) for channel in channels]), self._obeyed)

    # -- what it hears ----------------------------------------------------------------------------------------

    def hears(self, frame: bytes) -> bool:
        """A notification has come by the shared connection."""
        if not self.live:
            self.early.append(frame)
            return False
        channel = channel_of(frame)
        if channel.startswith(self.prefix):
            ear = self.crossing.get(channel)
            if ear is not None:
                ear.crossed()
            return False
        for ear in tuple(self.by_channel.get(channel, ())):
            self.delivered += 1
            ear.deliver(channel, frame)
        return False

    def wait_for(self, ear: Ear) -> None:
        """A client has enough to read. The server keeps the rest meanwhile."""
        if self.server is not None:
            self.slow.setdefault(ear, monotonic())
            self.server.mute()

    def wait_no_longer(self, ear: Ear) -> None:
        """It has read, or is not waited for any more."""
        if self.slow.pop(ear, None) is not None and not self.slow and self.server is not None:
            self.server.unmute()

    def rested(self) -> None:
        """It has no transactions."""

    def departed(self) -> None:
        """It gives its connection back."""

    # -- its connection ---------------------------------------------------------------------------------------

    def look(self, now: float) -> None:
        """Give way, listen again, try again: what is due. Called every second. O(clients that listen)"""
        if self.server is not None:
            reason = self._must_go(now)
            if reason:
                self._give_back()
                self._lost(reason)
        for slow, since in list(self.slow.items()):
            if now - since >= SLOW_S:
                slow.deaf = True
                self.wait_no_longer(slow)
        for ear in list(self.crossing.values()):
            if now - ear.since >= HANDOVER_S:
                ear.give_up(AGAIN_S)
        self._listen_again(now)
        for ear in list(self.waiting):
            if now >= ear.again_at:
                self._try_again(ear)
        for ear in self.ears():
            if ear.notes and ear.at_rest():
                ear.tell()

    def _must_go(self, now: float) -> str:
        """Why the connection has to be given back; "" if it has not."""
        machine = self.pool.machine
        if machine.mode == PAUSED:
            return str(Closed.PAUSED)
        if self.server.slot.epoch != machine.epoch:
            return str(Closed.STALE)
        waiter = machine.waiting.first if machine.waiting.size else None
        to_come = machine.connecting.size + machine.checking.size + machine.resetting.size
        if waiter is None or now - waiter.since < _PAUSE_S or to_come:
            return ""
        # All other leases are for as long as their clients like.
        return str(Closed.GAVE_WAY) if self.pool.pinned + 1 >= machine.leased.size else ""

    def _listen_again(self, now: float) -> None:
        wanted = self.by_channel and self.server is None and self.waiter is None
        if wanted and self.pool.machine.mode == RUNNING and now - self.tried_at >= _PAUSE_S:
            self.tried_at = now
            self.declined = None
            if self.borrow() is not None:
                self.go_on()

    def _try_again(self, ear: Ear) -> None:
        """A client that keeps its own connection need not any more, if it can be helped now."""
        client = ear.client
        server = client.server
        if server is None or client.raw or client.holding or client.touched or not server.rests():
            return
        if (self.live and self.fits(server)) or (client.ties == touch.LISTEN and self.may_adopt(client, server)):
            self.settle(client, server, client.ties)

    def go_on(self) -> None:
        """The connection is there, with the settings asked for."""
        self.holding = False
        if not self.by_channel:
            self._give_back()
            return
        self.server.asked_at = 0.0  # nobody waits for an answer
        self.server.inject(_SETUP + b";" + listening(self.by_channel), self._opened)

    def _opened(self, error: bytes | None) -> None:
        if error is not None or self.server is None:
            self._obeyed(error)
            return
        self.live = True
        if self.missed:
            ears = self.ears()
            log.info("listening_again", pool=self.pool.name, listeners=len(ears), reason=self.missed)
            notice = self._gap()
            self.missed = ""
            for ear in ears:
                ear.deliver(b"", notice)
        early, self.early = self.early, []
        for frame in early:
            self.hears(frame)

    def _gap(self) -> bytes:
        return messages.notice(
            "WARNING",
            "01000",
            "cenote: notifications may have been lost: the connection that listened for this client was given up, "
            "and another one listens only now",
            detail=f"{self.missed}: {TEXT['closed'][self.missed]}",
        )

    def _obeyed(self, error: bytes | None) -> None:
        """The server has answered to an order."""
        if error is not None and self.server is not None:
            log.warning("listener_refused", pool=self.pool.name, error=messages.error_fields(error).get("M", ""))
            self.server.abort()

    def _give_back(self) -> None:
        self.live = False
        self.holding = False
        self.early.clear()
        self.slow.clear()
        if self.server is not None or self.waiter is not None:
            self.pool.client_gone(self)

    def _lost(self, reason: str) -> None:
        """The connection is not ours any more."""
        self.live = False
        self.holding = False
        self.early.clear()
        self.slow.clear()
        for ear in list(self.crossing.values()):
            ear.give_up(0.0)
        if self.by_channel:
            self.gaps += 1
            self.missed = reason
            log.warning("listener_lost", pool=self.pool.name, listeners=len(self.ears()), reason=reason)
            self._listen_again(monotonic())

    def refuse(self, error: bytes) -> None:
        """There is no connection: it stands in line again, a little later."""
        self.waiter = None

    def misfit(self, error: bytes) -> None:
        """The server refuses these settings."""
        self._obeyed(messages.message(b"E", error)[5:])

    def start_over(self, server: Any) -> None:
        """The connection ended before it carried the settings."""
        self.server_lost(server)

    def server_lost(self, server: Any) -> None:
        """The connection ended."""
        self._lost(str(Closed.SERVER_CLOSED))

    def fail(self, sqlstate: str, text: str) -> None:
        """The server broke the protocol."""
        self._lost(str(Closed.PROTOCOL))
