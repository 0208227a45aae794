"""A client that listens: what it hears by the shared connection, and what is still to be handed over to that.

LISTEN and UNLISTEN run on whatever connection the client has at the time, and the server decides what comes of
them: a transaction may end as a roll-back, and a savepoint may take one of them back. Behind the transaction the
server is asked for the channels, which are then handed over, exactly, by a token of our own:

    client's connection   ... LISTEN token .................. token | UNLISTEN *, back to the pool
    shared connection         ... LISTEN token, channels; NOTIFY token ... token | the channels

The server has one queue for all, so the token stands at the same place of both streams. Before it the client hears
its own connection, behind it the shared one: everything once, in order.

What an UNLISTEN of such a client does is in `marks.py`.

Source: PostgreSQL documentation, "NOTIFY"; the order of the queue is that of the commits (async.c).
"""

from __future__ import annotations

from time import monotonic
from typing import TYPE_CHECKING, Any

from cenote.errors import ProtocolError
from cenote.proxy.asking import timed_out
from cenote.proxy.channels import channel_of, listening, quoted
from cenote.proxy.marks import Marks
from cenote.proxy.returning import Return
from cenote.proxy.settings import UNHINDERED
from cenote.reasons import Pinned
from cenote.sql import touch

if TYPE_CHECKING:
    from cenote.proxy.listener import Listener

#: Notifications for one client that does not take them, in bytes; beyond it is closed.
BACKLOG_BYTES = 16_777_216
#: How long a client is held while its channels are handed over: the server may be slow to empty its queue.
HANDOVER_S = 2.0
AGAIN_S = 10.0  # and how long it is let alone after that
_TRIES = 5
_IDLE = 0x49
_LISTEN = str(Pinned.LISTEN)


class Ear:
    """One client's side. On the event loop.

    channels: what it hears by the shared connection; coming: what is being handed over to that
    notes: what it is to hear when it rests, with the channel of each; b"": it is a notice of ours
    deaf: it does not read, and the others do not wait for it any more
    marks: what says whether an UNLISTEN took effect
    kept_for_us: it keeps its connection only while its channels are handed over
    held: what else it keeps it for
    again_at: it is let alone until then
    here, there: the token was seen on its own connection, on the shared one; after: what came behind it here
    leaving: what comes on its own connection comes by the shared one, too
    """

    def __init__(self, client: Any, listener: Listener) -> None:
        self.client = client
        self.listener = listener
        self.channels: set[bytes] = set()
        self.coming: set[bytes] = set()
        self.notes: list[tuple[bytes, bytes]] = []
        self.notes_bytes = 0
        self.deaf = False
        self.marks = Marks(listener.word)
        self.rows: list[bytes] = []
        self.token = b""
        self.here = self.there = False
        self.after: list[bytes] = []
        self.leaving = False
        self.kept_for_us = False
        self.returning: Return | None = None
        self.held = 0
        self.since = 0.0
        self.again_at = 0.0
        self.tries = 0

    # -- what comes -------------------------------------------------------------------------------------------

    def hears(self, frame: bytes) -> bool:
        """A notification on the client's own connection. Whether it goes on to the client."""
        channel = channel_of(frame)
        if self.returning is not None:
            return self.returning.hears(channel, frame)
        if channel.startswith(self.listener.prefix):
            if channel == self.token:
                self.here = True
                self._maybe_crossed()
            return False
        if self.leaving or channel in self.channels:
            return False  # the shared connection brings it
        if self.here:
            self.after.append(frame)  # so does that one, if nothing comes between
            return False
        return True

    def deliver(self, channel: bytes, frame: bytes) -> None:
        """A notification, or a notice of ours, by the shared connection."""
        if channel in self.coming and not self.there:
            return
        if self.returning is not None and self.returning.there and channel:
            return
        self.notes.append((channel, frame))
        self.notes_bytes += len(frame)
        if self.at_rest():
            self.tell()
        if self.client.stalled and not self.deaf:
            self.listener.wait_for(self)
        self._maybe_too_much()

    def at_rest(self) -> bool:
        """Whether no answer is due and no transaction open: something else may be said in between."""
        client = self.client
        if client.asking:
            return False
        server = client.server
        return server is None or bool(
            server.status == _IDLE and server.replies.kind == 0 and not server.replies.open and not server.left
        )

    def rested(self) -> None:
        """A transaction of the client has ended, and it knows."""
        client, listener = self.client, self.listener
        if client.asking:
            return
        if self.notes:
            self.tell()
        if self.channels and listener.live and (client.raw or not listener.fits(client.server)):
            now = monotonic()
            if now >= self.again_at:
                Return(self, client.server, now).begin()

    def drained(self) -> None:
        """It has read most of what was sent."""
        self.deaf = False
        self.listener.wait_no_longer(self)

    def tell(self) -> None:
        """Say what has waited."""
        client = self.client
        data = b"".join([frame for _, frame in self.notes])
        self.notes.clear()
        self.notes_bytes = 0
        client.write(data)
        client.bytes_out += len(data)

    def _maybe_too_much(self) -> None:
        client = self.client
        if self.notes_bytes <= BACKLOG_BYTES and not client.stalled:
            return
        if self.notes_bytes + client.transport.get_write_buffer_size() > BACKLOG_BYTES:
            self.departed()
            client.ear = None
            if client.server is not None and client.server.left:
                client.abort()  # in the middle of a message nothing can be said
            client.fail(
                "53400",
                f"cenote: more than {BACKLOG_BYTES >> 20} MiB of notifications wait for this client: "
                "it does not read them, or not before its transaction ends",
            )

    # -- texts that may change it -----------------------------------------------------------------------------

    def beware_parsed(self, server: Any, reading: Any) -> None:
        """An UNLISTEN is about to be parsed; at Bind it is too late to put anything before it."""
        replies = server.replies
        if (
            server.status == _IDLE
            and not replies.open
            and replies.kind == 0
            and not reading.touches & ~reading.clears
        ):
            return  # it clears all, if it succeeds
        self.client.touched |= touch.LISTEN
        self.beware(server, reading)
        self.marks.parsed(server)

    def beware(self, server: Any, reading: Any) -> None:
        """A text is about to run that may UNLISTEN."""
        if self.channels:
            self.marks.before(server, reading, self.listener.new_token(), self.listening_anew(server))

    def in_transaction(self, server: Any) -> None:
        """A batch was answered, and a transaction is open."""
        if self.channels:
            self.marks.behind(server, self.listener.new_token())

    def listening_anew(self, server: Any) -> bytes:
        """The SQL that listens, there, to all that the shared connection brings."""
        other = b"" if self.listener.fits(server) else self.listener.encoding
        return listening(self.channels, other)

    def forget(self) -> None:
        """It listens to nothing any more."""
        self.lose(set(self.channels))
        if not self.client.ties & touch.LISTEN:
            self.client.ear = None

    def lose(self, channels: set[bytes]) -> None:
        """It does not listen to these any more."""
        if channels:
            self.channels -= channels
            self._unsay(channels)
            self.listener.remove(self, channels)

    def _unsay(self, channels: set[bytes]) -> None:
        self.notes = [note for note in self.notes if note[0] not in channels]
        self.notes_bytes = sum(len(frame) for _, frame in self.notes)

    def departed(self) -> None:
        """The client has left."""
        self.listener.dismiss(self)
        self.notes.clear()
        self.notes_bytes = 0

    # -- the hand-over ----------------------------------------------------------------------------------------

    def settle(self, server: Any, held: int) -> None:
        """Ask what it listens to, and have the shared connection listen to that. The client is held meanwhile."""
        client = self.client
        client.holding = client.asking = True
        client.ties |= touch.LISTEN
        self.held = held & ~touch.LISTEN
        self.keep_quietly()
        self.tries = 0
        self.since = monotonic()
        self.here = self.there = self.leaving = False
        self.coming = set()
        self._ask(server)

    def _ask(self, server: Any) -> None:
        self.tries += 1
        self.rows.clear()
        self.token = self.listener.new_token() if self.listener.live else b""
        sql = UNHINDERED + self.marks.question()
        server.inject(sql + (b";" + listening((self.token,)) if self.token else b""), self._told, self.rows)

    def _told(self, error: bytes | None) -> None:
        """The server has answered."""
        client, server = self.client, self.client.server
        if server is None or client.ear is not self:
            return
        if timed_out(error) and self.tries < _TRIES:
            self._ask(server)
            return
        try:
            if error is not None:
                raise ProtocolError("the server does not say what the client listens to")
            after = self.marks.answer(self.rows, self.channels, self.listener.prefix, server.failed)
        except ProtocolError:
            self._stay(server)
            return
        self.lose(self.channels - after)
        added = after - self.channels
        if not added:
            self._leave(server)
        elif self.token and self.listener.live and self.listener.fits(server):
            self.coming = added
            self.listener.receive(self, added)
        elif not self.held and not self.channels and self.listener.may_adopt(client, server):
            self.kept_for_us = False
            client.unpin()
            client.asking = False
            self.listener.adopt(client, server, self, added)
            client.go_on()
        else:
            self._stay(server)

    def crossed(self) -> None:
        """The token has come by the shared connection."""
        self.there = True
        self._maybe_crossed()

    def _maybe_crossed(self) -> None:
        client = self.client
        if self.here and self.there and not self.leaving and client.server is not None:
            self.channels |= self.coming
            self.coming = set()
            self.after.clear()
            self.tries = 0
            self.listener.uncross(self.token)
            self._leave(client.server)

    def _leave(self, server: Any) -> None:
        """The shared connection has everything: listen to nothing on the client's own."""
        self.leaving = True
        self.tries += 1
        server.inject(UNHINDERED + b"UNLISTEN *;" + self.marks.reset(), self._left)

    def _left(self, error: bytes | None) -> None:
        client, server = self.client, self.client.server
        if server is None or client.ear is not self:
            return
        if timed_out(error) and self.tries < _TRIES:
            self._leave(server)
            return
        self.keep_no_longer()
        client.asking = False
        self.token = b""
        self.here = self.leaving = False
        if not self.channels:
            client.ear = None
            for _, frame in self.notes:
                client.write(frame)
        held = self.held
        if error is not None:
            held |= touch.UNKNOWN  # it may listen yet: nobody else may have it
            self.leaving = True
        client.pool.tied(client, server, held)

    def give_up(self, pause: float) -> None:
        """It takes too long, or the shared connection is lost. The client hears its own connection as before.

        :param pause: seconds until it is tried again
        """
        server = self.client.server
        if self.coming and server is not None:
            self.again_at = monotonic() + pause
            self._stay(server)

    def _stay(self, server: Any) -> None:
        """The client keeps its connection, and is looked at again later."""
        client = self.client
        self.keep_no_longer()
        client.asking = False
        if self.coming:
            # What has come of these by the shared connection has come, or will come, here.
            coming, self.coming = self.coming, set()
            self._unsay(coming)
            self.listener.remove(self, coming)
        self.listener.uncross(self.token)
        for frame in self.after:
            client.write(frame)
        self.after.clear()
        if self.token:
            server.inject(UNHINDERED + b"UNLISTEN " + quoted(self.token), None)
        self.token = b""
        self.here = self.there = False
        self.listener.waiting.add(self)
        client.pool.tied(client, server, self.held | touch.LISTEN)

    def keep_quietly(self) -> None:
        """The client keeps its connection until its channels are where they belong: no pin to speak of."""
        self.kept_for_us = not self.client.pin
        if self.kept_for_us:
            self.client.pin = _LISTEN
            self.client.pool.pinned += 1

    def keep_no_longer(self) -> None:
        """It need not any more; what else ties it is said next."""
        if self.kept_for_us:
            self.kept_for_us = False
            self.client.unpin()
