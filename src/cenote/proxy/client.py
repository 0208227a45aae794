"""A logged-in client: reads its messages, finds each a server connection, and keeps its own names.

Messages are scanned, not parsed; runs of messages that need no decision go on in one piece. A client has a
server connection from the first message that needs one to the ReadyForQuery after which nothing is owed and
no transaction is open, or, pinned, to its end. While a message cannot go on (no connection free, settings
being changed, a COPY not yet answered) its input is held, and only then.

Source: PostgreSQL documentation, "Message Flow" and "Message Formats".
"""

from __future__ import annotations

from time import monotonic
from typing import Any

from cenote.proxy import kinds
from cenote.proxy.replies import NONE
from cenote.proxy.requests import Requesting
from cenote.proxy.server import ServerConnection
from cenote.wire import messages

# The same as C sees them.
_OWED_NONE = NONE
_QUERY, _PARSE, _BIND, _DESCRIBE, _CLOSE = kinds.QUERY, kinds.PARSE, kinds.BIND, kinds.DESCRIBE, kinds.CLOSE
_EXECUTE, _SYNC, _FLUSH, _FUNCTION, _TERMINATE = (
    kinds.EXECUTE,
    kinds.SYNC,
    kinds.FLUSH,
    kinds.FUNCTION,
    kinds.TERMINATE,
)
_COPY_DATA, _COPY_DONE, _COPY_FAIL = kinds.COPY_DATA, kinds.COPY_DONE, kinds.COPY_FAIL
_EMPTY, _SHORTEST, _STATEMENT = kinds.EMPTY, kinds.SHORTEST, kinds.STATEMENT
_IDLE, _FAILED = 0x49, 0x45  # I and E, as a transaction status

# A text is read up to this length; longer ones are streamed and cannot be told.
_TEXT_BYTES = 1_048_576
# Names and the like: nothing that must be seen whole may be longer.
_HOLD_BYTES = 1_048_576
_LONGEST = 0x7FFFFFFF
# Input held before the client is made to wait.
_HELD_BYTES = 262_144


class ClientSession(Requesting):
    """One client after its log-in. On the event loop.

    server: the connection it has now
    waiter: its place in the pool's line
    holding, held: its input waits, and what has come meanwhile; part: the beginning of a message
    pin: why it keeps its server connection ("" if it does not)
    raw: its statements have its own names on its own connection: nothing is translated any more
    """

    def __init__(self, daemon: Any) -> None:
        super().__init__(daemon)
        self.part = b""
        self.bytes_in = 0
        self.pid = 0
        self.secret = b""
        self.login: Any = None
        self.since = self.connected = monotonic()

    # -- messages ---------------------------------------------------------------------------------------------

    def received(self, data: bytes) -> None:
        """Bytes from the client."""
        self.bytes_in += len(data)
        if self.holding:
            self.held += data
            if len(self.held) > _HELD_BYTES:
                self.mute()
            return
        if self.part:
            data = self.part + data
            self.part = b""
        self.guessed = None
        self.scan(data)

    def scan(self, data: bytes) -> None:  # noqa: PLR0915 - one loop, and its end
        """Every message in `data`, until one has to be held. O(bytes)

        What needs no decision goes on as it is: `start` is where that began, `i` where the message begins. What
        stands before `first` was answered here.
        """
        p = data
        n = len(data)
        i = 0
        start = 0
        server = self.server
        kind = 0
        self.described = False
        first = 0
        # Whether what is sent here could be sent once more as it is: one buffer, nothing else in flight.
        self.repeatable = not (self.left or self.pin) and (
            server is None or (not server.answered and server.replies.only_ours())
        )
        if self.left:
            i = n if self.left > n else self.left
            self.left -= i
            if self.dropping:
                start = i
        while n - i >= 5:
            kind = p[i]
            length = p[i + 1] << 24 | p[i + 2] << 16 | p[i + 3] << 8 | p[i + 4]
            end = i + 1 + length
            least = _SHORTEST[kind]
            if length < least or not least or length > _LONGEST or (length > 4 and _EMPTY[kind]):
                self.flush(data, start, i)
                self.malformed(kind)
                return
            if (self.skipping or (server is not None and server.skipping)) and kind not in (_SYNC, _TERMINATE):
                self.flush(data, start, i)
                i = start = end
                continue
            if end > n and kind != _COPY_DATA:
                seen = self._seen_enough(data, kind, i, length)
                if seen < 0:
                    self.flush(data, start, i)
                    self.malformed(kind)
                    return
                if seen == 0:
                    break
                self.repeatable = False
            if kind == _TERMINATE:
                self.flush(data, start, i)
                self._goodbye(server)
                return
            if server is None:
                if self._without_server(data, kind, i, end):
                    i = start = first = end
                    continue
                server = self.server
                if self.holding:
                    self.held = data[i:] if i else data
                    return
                if server is None:
                    self._decline(kind)
                    if self.ending:
                        return
                    i = start = end
                    continue
                self.repeatable = self.repeatable and i == first
            if server.asked_at == 0.0:
                server.asked_at = monotonic()
                server.failed = False
                server.unparsed = False
                if server.status == _IDLE:
                    server.began_at = server.asked_at
            if (
                server.replies.sent != server.replies.done
                and not self.raw
                and self._uncertain(server, data, kind, i)
            ):
                self.flush(data, start, i)
                self.hold(data[i:] if i else data)
                self.order_asked = True
                return
            if self.clearing:
                self.flush(data, start, i)
                start = i
                if not self.clears_alone(server, data, kind, i):
                    return
            if self.raw:
                start = self.pass_on(server, data, kind, start, i, end)
            elif kind == _QUERY:
                start = self.query(server, data, start, i, end)
            elif kind == _PARSE:
                start = self.parse(server, data, start, i, end)
            elif kind == _BIND:
                start = self.bind(server, data, start, i, end)
            elif kind == _EXECUTE and self.copy_portals is not None:
                start = self.execute(server, data, start, i, end)
            elif kind == _FUNCTION:
                start = self.function(server, data, start, i, end)
            elif kind in (_DESCRIBE, _CLOSE) and p[i + 5] == _STATEMENT:
                start = self.by_name(server, data, kind, start, i, end)
            else:
                start = self.pass_on(server, data, kind, start, i, end)
            if self.holding or self.ending:
                return
            i = end
        if i > n:
            self.left = i - n
            self.dropping = start == i
            i = n
        elif i < n:
            self.part = data[i:] if i else data
            self.repeatable = False
        if server is not None:
            if start < i:
                server.write(data if start == 0 and i == n else data[start:i])
            if self.repeatable and first < n and not server.answered and server.status == _IDLE:
                server.batch = data[first:] if first else data
                server.described = self.described and p[first] == _BIND and kind == _SYNC
            elif i == n and self.left == 0 and server.replies.kind == _OWED_NONE:
                self._maybe_release(server)

    def _goodbye(self, server: ServerConnection | None) -> None:
        """Terminate, in its turn: what was asked before it is done and answered first."""
        self.polite = True
        self.holding = True
        if server is None or not server.replies.ends():
            self.ending = True
            self.close()

    def _uncertain(self, server: ServerConnection, data: bytes, kind: int, i: int) -> bool:
        """Whether this message depends on what an earlier batch is to prepare or to forget. That batch may fail,
        and then the name would mean something else by the time the server sees it: somebody else's statement."""
        replies = server.replies
        if server.guard:
            if replies.sent > server.guard:
                return True  # only the batch right behind it is stopped if that fails
            if replies.pending() == 1:
                return False
        at = i + 5
        if kind == _BIND:
            at = data.find(b"\0", at) + 1
        elif kind in (_DESCRIBE, _CLOSE):
            if data[at] != _STATEMENT:
                return False
            at += 1
        elif kind == _PARSE:
            # Left out, it could not be refused with the rest of a transaction that has failed meanwhile.
            return data[at] != 0
        else:
            return False
        return replies.uncertain(server.named_at if data[at] else server.unnamed_at)

    def _seen_enough(self, data: bytes, kind: int, i: int, length: int) -> int:
        """Of a message that has not come in whole: 1 if it can go on as far as it is there, 0 if more must come
        first, -1 if it is longer than such a message may be."""
        if kind in (_QUERY, _PARSE):
            return 0 if length <= _TEXT_BYTES else 1
        if kind == _BIND:
            if not _two_names(data, i + 5):
                return 0 if len(data) - i <= _HOLD_BYTES else -1
            return 0 if length <= _HOLD_BYTES and not self.raw and self.reads_parameters(data, i) else 1
        if kind == _FUNCTION:
            return 1 if len(data) - i >= 9 else 0
        return 0 if length <= _HOLD_BYTES else -1

    def _without_server(self, data: bytes, kind: int, i: int, end: int) -> bool:
        """A message while the client has no server connection. Whether it was dealt with here; if not, there is
        a connection now, or the input is held, or `declined` says why not."""
        if kind == _SYNC:
            self.skipping = False
            self.write(messages.READY_IDLE)
            return True
        if kind in (_COPY_DATA, _COPY_DONE, _COPY_FAIL, _FLUSH):
            return True  # outside of COPY a server ignores them
        if kind == _CLOSE:
            name = data[i + 6 : end - 1] if data[i + 5] == _STATEMENT else None
            if name is None or self.settings is None or name not in self.settings.prepared_names:
                if name is not None:
                    self.undefine_name(name)
                self.write(messages.CLOSE_COMPLETE)
                return True
        if kind == _PARSE and end <= len(data) and data[i + 5] and self.parse_known(data, i + 5, end):
            return True
        if self.declined is None:
            server = self.pool.borrow(self)
            if server is not None:
                if not self._fits(server):
                    self.pool.convert(self, server, self.stops(data, kind, i, end))
            elif self.declined is None:
                self.holding = True
        return False

    # -- a server connection comes and goes -------------------------------------------------------------------

    def go_on(self) -> None:
        """Whatever held the input is over."""
        data = self.part + self.held if self.part else self.held
        self.holding = False
        self.held = b""
        self.part = b""
        if self.lost:
            return
        self.hear()
        self.scan_again(data)

    def scan_again(self, data: bytes) -> None:
        """What was held, or is to be repeated. Of a client that is being ended nobody would hear the answers."""
        if data and not self.ending:
            self.scan(data)

    def granted(self, server: ServerConnection) -> None:
        """The pool's line has come to this client."""
        self.waiter = None
        if not self.holding:
            self.pool.unneeded(self, server)
        elif self._fits(server) or not self.pool.convert(self, server, self._next_stops()):
            self.go_on()

    def _fits(self, server: ServerConnection) -> bool:
        """Whether this connection is as the client wants it."""
        return server.settings is self.settings and not self.pool.reads_nothing

    def _next_stops(self) -> bool:
        """Whether a failed transaction stops the message that is held."""
        data = self.held
        if self.part or len(data) < 5:
            return False
        return self.stops(data, data[0], 0, 1 + int.from_bytes(data[1:5], "big"))

    def refuse(self, error: bytes) -> None:
        """There is no server connection for the message held."""
        self.waiter = None
        if b"SFATAL\0" in error:
            self._sent_away(error)
            return
        self.declined = error
        self.go_on()

    def _sent_away(self, error: bytes) -> None:
        self.ending = True
        self.write(error)
        self.close()

    def _decline(self, kind: int) -> None:
        """Answer a message with the error there is instead of a server connection."""
        error = self.declined or b""
        self.declined = None
        if b"SFATAL\0" in error:
            self._sent_away(error)
        elif kind in (_QUERY, _FUNCTION):
            self.write(error + messages.READY_IDLE)
        else:
            self.skipping = True
            self.write(error)

    def answered(self, server: ServerConnection) -> None:
        """The server owes nothing, and is in the transaction status it says."""
        if self.polite:
            self.ending = True
            self.close()
            return
        if self.order_asked:
            self.order_asked = False
            self.go_on_after(server)
            return
        if self.clearing:
            clearing = self.clearing if self.executed else 0
            self.clearing = 0
            self.pool.cleared(self, server, clearing)
            return
        if self.resets:
            self.copy_asked = False
            resets, self.resets = self.resets, None
            if server.status == _FAILED or not self.pool.put_back(self, server, resets, True):
                self.go_on_after(server)
            return
        if self.copy_asked:
            self.copy_asked = False
            self.go_on_after(server)
            return
        self._maybe_release(server)

    def go_on_after(self, server: ServerConnection) -> None:
        """What cleared session state was answered: the connection comes back before anything else is sent."""
        self._maybe_release(server)
        if not self.asking:
            self.go_on()

    def in_order(self) -> None:
        """A batch was answered to its end: what was held may depend on it."""
        self.order_asked = False
        self.go_on()

    def copy_begins(self) -> None:
        """The server reads CopyData: what was held may follow."""
        if self.copy_asked:
            self.copy_asked = False
            if self.clearing and self.server is not None:
                self.cleared_within(self.server)
            self.go_on()

    def _maybe_release(self, server: ServerConnection) -> None:
        if server.status == _IDLE and server.replies.kind == _OWED_NONE and self.left == 0:
            if server.batch is None and not server.replies.open:
                if self.touched and not self.raw:
                    self.pool.learn(self, server)
                else:
                    self.apart = False
                    self.pool.settled(self, server)
        elif server.status != _IDLE:
            self.pool.in_transaction(self, server)

    def repeat(self, batch: bytes) -> None:
        """A plan was wrong and nothing of this batch has run: prepare anew and send it once more."""
        guessed = self.guessed
        if guessed is not None and self.statements is not None and self.server is not None:
            for name, statement in list(self.statements.items()):
                if statement is guessed:
                    self.renewed(self.server, name, guessed)
        self.scan_again(batch)

    def resubmit(self, batch: bytes) -> None:
        """The server ended before anything of this batch ran: send it once more, on another connection."""
        self.scan_again(batch)

    def start_over(self, server: ServerConnection) -> None:
        """This server connection is gone before anything of what is held was sent: it goes to another one."""
        self.go_on()

    def misfit(self, error: bytes) -> None:
        """The server refuses the settings this client logged in with."""
        server = self.server
        fields = messages.error_fields(error)
        if server is not None and server.rests():
            self.pool.settled(self, server)
        self.fail(fields.get("C", "XX000"), fields.get("M", "the server refuses the settings of this session"))

    def server_lost(self, server: ServerConnection) -> None:
        """The server connection ended in this client's hands. It hears of it once."""
        if server.told or (server.left and not server.dropping):
            # The server's own words were passed on; or half a message was, and nothing can follow that.
            self.ending = True
            self.close()
            return
        what = " while it was asked what had become of this session: its state is lost" if self.asking else ""
        name = self.pool.name
        self.fail("08006", f'cenote: pool "{name}": the server closed the connection unexpectedly{what}')

    def hear(self) -> None:
        """Read from the client again, unless its input is held or its server takes no more."""
        if not self.holding and (self.server is None or not self.server.stalled):
            self.unmute()

    # -- the transport ----------------------------------------------------------------------------------------

    def made(self) -> None:
        self.daemon.arrived(self)

    def gone(self, error: Exception | None) -> None:
        self.daemon.departed(self)

    def full(self) -> None:
        if self.server is not None:
            self.server.mute()

    def drained(self) -> None:
        if self.server is not None:
            self.server.unmute()
        if self.ear is not None:
            self.ear.drained()

    def notice_wait(self, now: float) -> None:
        """It has stood in line for long: say so, once."""
        if not self.noticed and self.waiter is not None:
            self.noticed = True
            machine = self.pool.machine
            text = (
                f'cenote: pool "{self.pool.name}": waiting for a server connection since {now - self.since:.0f} s '
                f"({machine.leased.size}/{machine.max_size} leased, {machine.waiting.size} waiting)"
            )
            self.write(messages.notice("NOTICE", "00000", text))


def _two_names(data: bytes, at: int) -> bool:
    """Whether two zero-terminated texts are there in whole."""
    end = data.find(b"\0", at)
    return end >= 0 and data.find(b"\0", end + 1) >= 0
