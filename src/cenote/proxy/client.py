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

from cenote.errors import ProtocolError
from cenote.proxy.prepared import HARMLESS, TOO_LONG, Reading, Statement, read
from cenote.proxy.replies import (
    BIND,
    CLOSE,
    DESCRIBE,
    EXECUTE,
    NAMED_PARSE,
    NONE,
    OWN_PARSE,
    PARSE,
    QUERY,
    SYNC,
    SYNTHETIC,
    SYNTHETIC_CLOSE,
    Entry,
)
from cenote.proxy.roles import Borrower
from cenote.proxy.server import ServerConnection
from cenote.sql import touch
from cenote.sql.plain import plain
from cenote.wire import messages

# The same as C sees them.
_OWED_NONE, _OWED_QUERY, _OWED_SYNC, _OWED_PARSE, _OWED_BIND = NONE, QUERY, SYNC, PARSE, BIND
_OWED_DESCRIBE, _OWED_EXECUTE, _OWED_CLOSE, _OWED_OWN_PARSE, _OWED_SYNTHETIC_CLOSE = (
    DESCRIBE,
    EXECUTE,
    CLOSE,
    OWN_PARSE,
    SYNTHETIC_CLOSE,
)
_OWED_SYNTHETIC, _OWED_NAMED_PARSE = SYNTHETIC, NAMED_PARSE

# Types of messages, as numbers: the scan compares bytes.
_QUERY, _PARSE, _BIND, _DESCRIBE, _CLOSE, _EXECUTE = 0x51, 0x50, 0x42, 0x44, 0x43, 0x45  # Q P B D C E
_SYNC, _FLUSH, _FUNCTION, _TERMINATE = 0x53, 0x48, 0x46, 0x58  # S H F X
_COPY_DATA, _COPY_DONE, _COPY_FAIL = 0x64, 0x63, 0x66  # d c f
_KINDS = b"QPBDCESHFXdcf"
_STATEMENT = 0x53  # S, in Describe and Close
_IDLE = 0x49
_PREPARED = touch.PREPARED

# A text is read up to this length; longer ones are streamed and cannot be told.
_TEXT_BYTES = 1_048_576
# Names and the like: nothing that must be seen whole may be longer.
_HOLD_BYTES = 1_048_576
# Input held before the client is made to wait.
_HELD_BYTES = 262_144
# Large objects, the only functions that libpq calls by number.
_LARGE_OBJECT_CALLS = frozenset(
    (715, 764, 765, 767, 952, 953, 954, 955, 956, 957, 958, 964, 1004, 3170, 3171, 3172, 3457, 3458, 3459, 3460)
)


class ClientSession(Borrower):
    """One client after its log-in. On the event loop.

    server: the connection it has now
    waiter: its place in the pool's line
    holding, held: its input waits, and what has come meanwhile
    skipping: refused inside an extended batch, so everything up to Sync is discarded, as a server would
    pin: why it keeps its server connection ("" if it does not)
    raw: its statements have its own names on its own connection: nothing is translated any more
    """

    def __init__(self, daemon: Any) -> None:
        super().__init__()
        self.daemon = daemon
        self.pool: Any = None
        self.statements: dict[bytes, Statement] | None = None
        self.unnamed_reading: Any = HARMLESS
        self.copy_portals: set[bytes] | None = None
        self.clearing = 0
        self.skipping = False
        self.held = b""
        self.part = b""
        self.ending = False
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
        self.scan(data)

    def scan(self, data: bytes) -> None:  # noqa: PLR0915 - one loop: a call per message costs
        """Every message in `data`, until one has to be held. O(bytes)"""
        p = data
        n = len(data)
        i = 0
        start = 0
        server = self.server
        first = p[0] if n else 0
        kind = 0
        described = False
        # Whether what is sent here could be sent once more as it is: one buffer, nothing else in flight.
        repeatable = not (self.left or self.raw) and (
            server is None or (server.replies.kind == _OWED_NONE and not server.answered)
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
            if length < 4 or length > 0x7FFFFFFF or kind not in _KINDS:
                self._flush(data, start, i)
                self._malformed(kind, length)
                return
            if self.skipping or (server is not None and server.skipping):
                if kind not in (_SYNC, _TERMINATE):  # noqa: SIM102
                    self._flush(data, start, i)
                    i = end
                    start = end
                    continue
            if end > n and kind != _COPY_DATA:
                # It has to be seen whole, or at least its beginning.
                if length <= _TEXT_BYTES and (kind in (_QUERY, _PARSE)):
                    break
                if kind == _BIND:
                    if not _two_names(data, i + 5):
                        if n - i > _HOLD_BYTES:
                            self._malformed(kind, length)
                            return
                        break
                elif kind == _FUNCTION:
                    if n - i < 9:
                        break
                elif kind not in (_QUERY, _PARSE):
                    if length > _HOLD_BYTES:
                        self._malformed(kind, length)
                        return
                    break
                repeatable = False
            if server is None:
                if kind in (_COPY_DATA, _COPY_DONE, _COPY_FAIL, _FLUSH):
                    i = end  # outside of COPY a server ignores them
                    start = end
                    continue
                if kind == _SYNC:
                    self.skipping = False
                    self.write(messages.READY_IDLE)
                    i = end
                    start = end
                    continue
                if kind == _TERMINATE:
                    self.ending = True
                    self.close()
                    return
                if kind == _CLOSE:
                    if p[i + 5] == _STATEMENT:
                        self._undefine_name(data[i + 6 : end - 1])
                    self.write(messages.CLOSE_COMPLETE)
                    i = end
                    start = end
                    continue
                if kind == _PARSE and p[i + 5] and end <= n and self._parse_known(data, i + 5, end):
                    i = end
                    start = end
                    continue
                if self.declined is None:
                    server = self.pool.borrow(self)
                    if server is None and self.declined is None:
                        self._hold(data[i:] if i else data)
                        return
                if self.declined is not None:
                    self._decline(kind)
                    i = end
                    start = end
                    continue
                if self.holding:
                    self.held = data[i:] if i else data
                    return
                repeatable = repeatable and i == 0
            if server.asked_at == 0.0:
                server.asked_at = monotonic()
                server.failed = False
                server.unparsed = False
                if server.status == _IDLE:
                    server.began_at = server.asked_at
            if self.raw:
                if kind == _TERMINATE:
                    self._flush(data, start, i)
                    self.ending = True
                    self.close()
                    return
                if not self._expect(server, kind):
                    self._flush(data, start, i)
                    start = end
                i = end
                continue
            if kind == _QUERY:
                if end > n and length > _TEXT_BYTES:
                    reading = TOO_LONG
                elif plain(data, i + 5, end - 1):
                    reading = HARMLESS
                else:
                    reading = read(data[i + 5 : end - 1])
                if reading is not HARMLESS:
                    repeatable = False
                    self._flush(data, start, i)
                    start = i
                    self._beware(server, reading)
                self.unnamed = None
                server.unnamed = None
                server.replies.expect(_OWED_QUERY)
                if self.clearing or self.touching:
                    # What it leaves behind is the base of what comes next.
                    self._flush(data, start, end)
                    self._hold(data[end:])
                    return
            elif kind == _PARSE:
                j = i + 5
                while j < n and j < end and p[j]:
                    j += 1
                if end > n:
                    self._flush(data, start, i)
                    start = i
                    self.keep(server, "statement_too_long")
                    server.replies.expect(_OWED_PARSE)
                elif j == i + 5:
                    self.unnamed = data[j + 1 : end]
                    k = j + 1
                    while k < end and p[k]:
                        k += 1
                    if plain(data, j + 1, k):
                        self.unnamed_reading = HARMLESS
                    else:
                        self.unnamed_reading = read(data[j + 1 : k])
                    server.unnamed = self.unnamed
                    server.replies.expect(_OWED_PARSE)
                else:
                    repeatable = False
                    self._flush(data, start, i)
                    start = i
                    if self._parse(server, data[i + 5 : j], data[j + 1 : end]):
                        start = end
            elif kind == _BIND:
                j = i + 5
                while j < n and p[j]:
                    j += 1
                k = j + 1
                while k < n and p[k]:
                    k += 1
                if k >= n or k >= end:
                    self._flush(data, start, i)
                    self._malformed(kind, length)
                    return
                name = data[j + 1 : k]
                statement = None
                if not name:
                    reading = self.unnamed_reading
                elif self.statements is not None:
                    statement = self.statements.get(name)
                    reading = HARMLESS if statement is None else statement.reading
                else:
                    reading = HARMLESS
                if reading is not HARMLESS:
                    repeatable = False
                    self._flush(data, start, i)
                    start = i
                    if reading.touches:
                        self.keep(server, self.pool.pin_reason(reading.touches))
                    if reading.copies:
                        if self.copy_portals is None:
                            self.copy_portals = set()
                        self.copy_portals.add(data[i + 5 : j])
                elif self.copy_portals is not None:
                    self.copy_portals.discard(data[i + 5 : j])
                if not name:
                    if server.unnamed is None or server.unnamed != self.unnamed:
                        self._flush(data, start, i)
                        start = i
                        self._bring_unnamed(server)
                elif not self.raw:
                    there = server.known.get(statement)
                    if there is None:
                        self._flush(data, start, i)
                        start = i
                        there = self._bring(server, name, statement)
                    if statement is not None:
                        self.pool.tick += 1
                        statement.used = self.pool.tick
                    if there != name:
                        self._flush(data, start, i)
                        size = length - len(name) + len(there)
                        server.write(messages.frame(b"B", size) + data[i + 5 : j + 1] + there)
                        start = k
                server.replies.expect(_OWED_BIND)
            elif kind == _DESCRIBE:
                if p[i + 5] != _STATEMENT:
                    described = True
                else:
                    self._flush(data, start, i)
                    start = i
                    start = end if self._describe(server, data, i, end) else i
                server.replies.expect(_OWED_DESCRIBE)
            elif kind == _EXECUTE:
                server.replies.expect(_OWED_EXECUTE)
                if self.copy_portals is not None:
                    j = data.find(b"\0", i + 5, end)
                    if data[i + 5 : j] in self.copy_portals:
                        # The server will ignore Sync while it reads CopyData, so nothing may go ahead.
                        self._flush(data, start, end)
                        server.write(messages.FLUSH)
                        self.copy_asked = True
                        self._hold(data[end:])
                        return
            elif kind == _SYNC:
                if server.copying:
                    self._flush(data, start, i)
                    start = end
                else:
                    server.skipping = False
                    server.replies.expect(_OWED_SYNC)
            elif kind == _CLOSE:
                if p[i + 5] == _STATEMENT:
                    repeatable = False
                    self._flush(data, start, i)
                    start = end
                    self._close_name(server, data[i + 6 : end - 1])
                else:
                    server.replies.expect(_OWED_CLOSE)
            elif kind == _FLUSH:
                if server.copying:
                    self._flush(data, start, i)
                    start = end
            elif kind in (_COPY_DATA, _COPY_DONE, _COPY_FAIL):
                repeatable = False
                if server.replies.kind == _OWED_NONE:
                    self._flush(data, start, i)
                    start = end
                elif kind != _COPY_DATA:
                    server.copy_ended()
            elif kind == _FUNCTION:
                function = p[i + 5] << 24 | p[i + 6] << 16 | p[i + 7] << 8 | p[i + 8]
                if function not in _LARGE_OBJECT_CALLS:
                    self._flush(data, start, i)
                    start = i
                    self.keep(server, "function_call")
                repeatable = False
                server.replies.expect(_OWED_QUERY)
            else:  # Terminate
                self._flush(data, start, i)
                self.ending = True
                self.close()
                return
            i = end
        if i > n:
            self.left = i - n
            self.dropping = start == i
            i = n
        elif i < n:
            self.part = data[i:] if i else data
            repeatable = False
        if server is not None:
            if start < i:
                server.write(data if start == 0 and i == n else data[start:i])
            if repeatable and not server.answered and server.status == _IDLE:
                server.batch = data
                server.described = described and first == _BIND and kind == _SYNC
            elif i == n and self.left == 0 and server.replies.kind == _OWED_NONE:
                self._maybe_release(server)

    def _flush(self, data: bytes, start: int, end: int) -> None:
        """Send on what needed no decision so far."""
        if start < end and self.server is not None:
            self.server.write(data[start:end])

    def _expect(self, server: ServerConnection, kind: int) -> bool:
        """The account of a message that goes on as it is. Whether it goes on at all."""
        replies = server.replies
        if kind in (_QUERY, _FUNCTION):
            replies.expect(_OWED_QUERY)
        elif kind == _SYNC:
            if server.copying:
                return False
            server.skipping = False
            replies.expect(_OWED_SYNC)
        elif kind == _PARSE:
            replies.expect(_OWED_PARSE)
        elif kind == _BIND:
            replies.expect(_OWED_BIND)
        elif kind == _DESCRIBE:
            replies.expect(_OWED_DESCRIBE)
        elif kind == _EXECUTE:
            replies.expect(_OWED_EXECUTE)
        elif kind == _CLOSE:
            replies.expect(_OWED_CLOSE)
        elif kind == _FLUSH:
            return not server.copying
        elif replies.kind == _OWED_NONE:
            return False
        elif kind != _COPY_DATA:
            server.copy_ended()
        return True

    # -- prepared statements ----------------------------------------------------------------------------------

    def _parse(self, server: ServerConnection, name: bytes, tail: bytes) -> bool:
        """Parse of a named statement. Whether what is to be sent was sent (or need not be)."""
        if self.statements is None:
            self.statements = {}
        old = self.statements.get(name)
        if old is not None:
            # The server shall say 42P05, as it would to a client of its own.
            there = server.known.get(old)
            if there is None:
                there = self._bring(server, name, old)
            server.write(messages.parse(there, tail))
            server.replies.add(Entry(_OWED_NAMED_PARSE))
            return True
        statement = self.pool.statement(self.settings, tail, read(tail[: tail.index(b"\0")]))
        self.pool.tick += 1
        statement.used = self.pool.tick
        self.statements[name] = statement
        there = server.known.get(statement)
        if there is not None and server.status != 0x45:
            entry = Entry(_OWED_SYNTHETIC, statement, name, messages.PARSE_COMPLETE)
            if server.replies.kind == _OWED_NONE:
                self.write(messages.PARSE_COMPLETE)
            else:
                server.replies.add(entry)
            return True
        if there is not None:
            # In a failed transaction a Parse is refused: the server shall say so itself.
            server.close_statement(statement, there)
        there = self._name_there(server, name)
        server.know(statement, there)
        server.replies.add(Entry(_OWED_NAMED_PARSE, statement, name))
        if there == name:
            return False
        server.write(messages.parse(there, tail))
        return True

    def _parse_known(self, data: bytes, at: int, end: int) -> bool:
        """Parse, without a server connection, of what some server has parsed before: answered here.

        A driver that prepares one client's statements while another one's transaction waits for it in the same
        thread would stop both otherwise.
        """
        split = data.find(b"\0", at, end)
        name = data[at:split]
        if split < 0 or (self.statements is not None and name in self.statements):
            return False
        statement = self.pool.known(self.settings, data[split + 1 : end])
        if statement is None:
            return False
        if self.statements is None:
            self.statements = {}
        self.statements[name] = statement
        self.write(messages.PARSE_COMPLETE)
        return True

    def _name_there(self, server: ServerConnection, name: bytes) -> bytes:
        """A name for one more statement, after making room for it."""
        if len(server.known) >= self.pool.max_prepared:
            oldest = None
            for statement in server.known:
                if oldest is None or statement.used < oldest.used:
                    oldest = statement
            if oldest is not None and oldest.used < server.lease_tick:
                server.close_statement(oldest, server.known[oldest])
        if name not in server.names:
            return name
        self.pool.tick += 1
        return b"cenote_%x" % self.pool.tick

    def _bring(self, server: ServerConnection, name: bytes, statement: Statement | None) -> bytes:
        """Prepare on this server what the client prepared elsewhere; the name it has there."""
        if statement is None:
            # Nobody's statement may answer to this name: the server shall say 26000.
            other = server.names.get(name)
            if other is not None:
                server.close_statement(other, name)
            return name
        there = self._name_there(server, name)
        server.write(messages.parse(there, statement.tail))
        server.know(statement, there)
        server.replies.add(Entry(_OWED_OWN_PARSE, statement, there))
        return there

    def _bring_unnamed(self, server: ServerConnection) -> None:
        """Give the server the client's unnamed statement, or none."""
        if self.unnamed is None:
            server.close_statement(None, b"")
        else:
            server.write(messages.parse(b"", self.unnamed))
            server.replies.add(Entry(_OWED_OWN_PARSE))
        server.unnamed = self.unnamed

    def _describe(self, server: ServerConnection, data: bytes, i: int, end: int) -> bool:
        """Describe of a statement. Whether it was sent here, under another name."""
        name = data[i + 6 : end - 1]
        if not name:
            if server.unnamed is None or server.unnamed != self.unnamed:
                self._bring_unnamed(server)
            return False
        statement = self.statements.get(name) if self.statements is not None else None
        there = server.known.get(statement) if statement is not None else None
        if there is None:
            there = self._bring(server, name, statement)
        if there == name:
            return False
        server.write(messages.message(b"D", b"S" + there + b"\0"))
        return True

    def _close_name(self, server: ServerConnection, name: bytes) -> None:
        """Close of a statement: the client forgets it, the server keeps it for others."""
        statement = self._undefine_name(name)
        if not name:
            server.unnamed = None
        if server.replies.kind == _OWED_NONE:
            self.write(messages.CLOSE_COMPLETE)
        else:
            server.replies.add(Entry(_OWED_SYNTHETIC_CLOSE, statement, name, messages.CLOSE_COMPLETE))

    def _undefine_name(self, name: bytes) -> Statement | None:
        if not name:
            self.unnamed = None
            return None
        return self.statements.pop(name, None) if self.statements is not None else None

    def define(self, name: bytes, statement: Statement | None) -> None:
        """The server discarded the Close of this statement."""
        if statement is not None:
            if self.statements is None:
                self.statements = {}
            self.statements[name] = statement

    def forget_statements(self) -> None:
        """It has dropped all its prepared statements."""
        self.statements = None
        self.unnamed = None

    def undefine(self, name: bytes, statement: Statement | None) -> None:
        """The server discarded the Parse of this statement."""
        if self.statements is not None and statement is not None and self.statements.get(name) is statement:
            del self.statements[name]

    # -- session state ----------------------------------------------------------------------------------------

    def _beware(self, server: ServerConnection, reading: Reading) -> None:
        """A text that is more than harmless is about to run."""
        touches = reading.touches
        if not touches:
            return
        # PREPARE needs the names to be the client's before it runs; the rest waits for the answer, since a text
        # that the server cannot even parse touches nothing.
        if touches & ~reading.clears == 0 and server.status == _IDLE and server.replies.kind == _OWED_NONE:
            self.clearing = touches
        elif touches & _PREPARED == 0 and server.replies.kind == _OWED_NONE:
            self.touching = touches
        else:
            self.keep(server, self.pool.pin_reason(touches))

    def keep(self, server: ServerConnection, reason: str) -> None:
        """Keep this server connection until the client ends. From now on its names are the client's own."""
        if self.pin:
            return
        self.pin = reason
        self.pool.pinned_by(self, reason)
        mine = self.statements or {}
        for name, statement in list(server.names.items()):
            if mine.get(name) is not statement:
                server.close_statement(statement, name)
        for name, statement in mine.items():
            if server.known.get(statement) != name:
                server.write(messages.parse(name, statement.tail))
                server.know(statement, name)
                server.replies.add(Entry(_OWED_OWN_PARSE, statement, name))
        if self.unnamed is not None and server.unnamed != self.unnamed:
            self._bring_unnamed(server)
        self.raw = True

    # -- a server connection comes and goes -------------------------------------------------------------------

    def _hold(self, data: bytes) -> None:
        self.holding = True
        self.held = data

    def go_on(self) -> None:
        """Whatever held the input is over."""
        data = self.held
        self.holding = False
        self.held = b""
        if self.lost:
            return
        self.hear()
        if data:
            self.scan(data)

    def granted(self, server: ServerConnection) -> None:
        """The pool's line has come to this client."""
        self.waiter = None
        if not self.holding:
            self.pool.unneeded(self, server)
        elif not self.pool.convert(self, server):
            self.go_on()

    def refuse(self, error: bytes) -> None:
        """There is no server connection for the message held."""
        self.waiter = None
        if error.startswith(b"E") and b"SFATAL\0" in error:
            self.ending = True
            self.write(error)
            self.close()
            return
        self.declined = error
        self.go_on()

    def _decline(self, kind: int) -> None:
        """Answer a message with the error there is instead of a server connection."""
        error = self.declined or b""
        self.declined = None
        if kind in (_QUERY, _FUNCTION):
            self.write(error + messages.READY_IDLE)
        else:
            self.skipping = True
            self.write(error)

    def answered(self, server: ServerConnection) -> None:
        """The server owes nothing, and is in the transaction status it says."""
        if self.clearing:
            clearing = self.clearing
            self.clearing = 0
            self.pool.cleared(self, server, clearing)
            return
        if self.touching:
            touches = self.touching
            self.touching = 0
            if not server.unparsed:
                self.keep(server, self.pool.pin_reason(touches))
            self.go_on_after(server)
            return
        if self.copy_asked:
            self.copy_asked = False
            self.go_on()
            return
        self._maybe_release(server)

    def go_on_after(self, server: ServerConnection) -> None:
        """What cleared session state was answered: the connection comes back before anything else is sent."""
        self._maybe_release(server)
        self.go_on()

    def copy_begins(self) -> None:
        """The server reads CopyData: what was held may follow."""
        if self.copy_asked:
            self.copy_asked = False
            self.go_on()

    def _maybe_release(self, server: ServerConnection) -> None:
        if server.status == _IDLE and server.replies.kind == _OWED_NONE and self.left == 0:
            if server.batch is None and not server.replies.open:
                self.pool.settled(self, server)
        elif server.status != _IDLE:
            self.pool.in_transaction(self, server)

    def repeat(self, batch: bytes) -> None:
        """A plan was wrong and nothing of this batch has run: prepare anew and send it once more."""
        server = self.server
        if server is not None and server.plans != self.pool.plans:
            server.inject(b"DEALLOCATE ALL", None)
            server.forget_all()
            server.plans = self.pool.plans
        self.scan(batch)

    def resubmit(self, batch: bytes) -> None:
        """The server ended before anything of this batch ran: send it once more, on another connection."""
        self.scan(batch)

    def misfit(self, error: bytes) -> None:
        """The server refuses the settings this client logged in with."""
        server = self.server
        fields = messages.error_fields(error)
        if server is not None:
            self.pool.settled(self, server)
        self.fail(fields.get("C", "XX000"), fields.get("M", "the server refuses the settings of this session"))

    def server_lost(self, server: ServerConnection) -> None:
        """The server connection ended in this client's hands. It hears of it once."""
        if server.fatal is not None or (server.left and not server.dropping):
            # The server's own words were passed on; or half a message was, and nothing can follow that.
            self.ending = True
            self.close()
        else:
            self.fail("08006", f'cenote: pool "{self.pool.name}": the server closed the connection unexpectedly')

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

    # -- ends -------------------------------------------------------------------------------------------------

    def fail(self, sqlstate: str, text: str) -> None:
        """Tell the client why this is the end, and close."""
        if not self.lost and not self.ending:
            self.ending = True
            self.write(messages.error("FATAL", sqlstate, text))
            self.close()

    def _malformed(self, kind: int, length: int) -> None:
        error = ProtocolError(f"a client sent a message of type {chr(kind)!r} and length {length}")
        self.daemon.malformed(self, error)
        if kind in _KINDS:
            self.fail("08P01", "invalid message length")
        else:
            self.fail("08P01", f"invalid frontend message type {kind}")


def _two_names(data: bytes, at: int) -> bool:
    """Whether two zero-terminated texts are there in whole."""
    end = data.find(b"\0", at)
    return end >= 0 and data.find(b"\0", end + 1) >= 0
