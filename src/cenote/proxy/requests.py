"""One message of a client, by its type: where it goes, what is expected in answer, what has to be done before it.

Each takes the buffer it came in and from where on that still waits to be sent (`start`), and says from where on
the rest may go as it is. Whether there is a server connection for it, and whose turn it is, the session decides.

Source: PostgreSQL documentation, "Message Flow" and "Message Formats".
"""

from __future__ import annotations

from typing import Any

from cenote.errors import ProtocolError
from cenote.proxy import kinds
from cenote.proxy.reading import HARMLESS, change, may_copy, read
from cenote.proxy.replies import BIND, CLOSE, DESCRIBE, EXECUTE, NONE, PARSE, QUERY, SYNC, UNNAMED_PARSE, Entry
from cenote.proxy.server import ServerConnection
from cenote.proxy.ties import Tied
from cenote.reasons import Pinned
from cenote.sql import touch
from cenote.sql.plain import plain
from cenote.wire import messages

# The same as C sees them.
_OWED_NONE, _OWED_QUERY, _OWED_SYNC, _OWED_PARSE, _OWED_BIND = NONE, QUERY, SYNC, PARSE, BIND
_OWED_DESCRIBE, _OWED_EXECUTE, _OWED_CLOSE, _OWED_UNNAMED_PARSE = DESCRIBE, EXECUTE, CLOSE, UNNAMED_PARSE
_QUERY, _PARSE, _BIND, _DESCRIBE, _CLOSE = kinds.QUERY, kinds.PARSE, kinds.BIND, kinds.DESCRIBE, kinds.CLOSE
_EXECUTE, _SYNC, _FLUSH, _FUNCTION = kinds.EXECUTE, kinds.SYNC, kinds.FLUSH, kinds.FUNCTION
_COPY_DATA = kinds.COPY_DATA
_IDLE = 0x49  # I, as a transaction status
_PREPARED, _UNKNOWN = touch.PREPARED, touch.UNKNOWN
# How texts begin that a failed transaction refuses: not as COMMIT, END, ABORT, ROLLBACK or PREPARE TRANSACTION.
_STOPPED = (b"s", b"i", b"u", b"d", b"w", b"b")
_CHANGES = kinds.table(b"UuDd", bytes((1, 1, 1, 1)))  # how a plain text begins that runs triggers

_STATEMENT_TOO_LONG, _FUNCTION_CALL = (
    str(Pinned.STATEMENT_TOO_LONG),
    str(Pinned.FUNCTION_CALL),
)
_LONG_TEXT = b"(too long)"
#: Large objects, the only functions that libpq calls by number.
LARGE_OBJECT_CALLS = frozenset(
    (715, 764, 765, 767, 952, 953, 954, 955, 956, 957, 958, 964, 1004, 3170, 3171, 3172, 3457, 3458, 3459, 3460)
)


class Requesting(Tied):
    """A borrower that sends messages.

    skipping: refused inside an extended batch, so everything up to Sync is discarded, as a server would
    ending: it hears nothing more
    repeatable: what is sent now could be sent once more as it is; described: it asks for the description of rows
    copying_query: the COPY under way is of a Query
    """

    def __init__(self, daemon: Any) -> None:
        super().__init__()
        self.daemon = daemon
        self.skipping = False
        self.ending = False
        self.repeatable = False
        self.described = False
        self.copying_query = False

    def stops(self, data: bytes, kind: int, i: int, end: int) -> bool:
        """Whether a failed transaction stops this message, and what follows it up to the end of its batch: then it
        can go on right behind what is to succeed first."""
        if end > len(data):
            return False
        at = i + 5
        if kind == _BIND:
            name, statement = self.bound_to(data, i)
            if name and statement is None:
                return False
            reading = statement.reading if statement is not None else self.unnamed_reading
            text = statement.tail if statement is not None else self.unnamed or b""
            return not reading.matters and text[:1].lower() in _STOPPED
        if kind == _PARSE:
            at = data.find(b"\0", at) + 1
        elif kind != _QUERY:
            return False
        last = data.find(b"\0", at)
        return data[at : at + 1].lower() in _STOPPED and (plain(data, at, last) or not read(data[at:last]).matters)

    def reads_parameters(self, data: bytes, i: int) -> bool:
        """Whether what this Bind does may depend on its parameters."""
        name, statement = self.bound_to(data, i)
        reading = self.unnamed_reading if not name else statement.reading if statement is not None else HARMLESS
        return reading.matters or reading.hidden

    def query(self, server: ServerConnection, data: bytes, start: int, i: int, end: int) -> int:
        if server.replies.open and server.replies.kind != _OWED_NONE:
            # It ends the unnamed statement, unless the batch it stands in has failed: that has to be known first.
            self.flush(data, start, i)
            self.hold(data[i:] if i else data)
            server.write(messages.FLUSH)
            self.copy_asked = True
            return i
        reading = HARMLESS
        if end > len(data):
            self.flush(data, start, i)
            start = i
            if not self.pool.keeps(self, server, _STATEMENT_TOO_LONG, _UNKNOWN):
                return i
        elif not plain(data, i + 5, end - 1):
            reading = read(data[i + 5 : end - 1])
        elif _CHANGES[data[i + 5]]:
            self.suspect(server, change(data, i + 5, end), data, i, end)
        if reading.matters:
            self.repeatable = False
            self.flush(data, start, i)
            start = i
            self.fresh_sequences(server, reading)
            if reading.ties and not self.pin and self.pool.pins_none(reading.ties):
                server.write(self.pool.refusing(reading.ties, data[i + 5 : end - 1]))
                self.unnamed = None
                server.unnamed = None
                server.replies.expect(_OWED_QUERY)
                return end
            if (reading.touches or reading.resets) and not self.beware(server, reading, data, i, end):
                return i
        if reading.hidden:
            self.suspect(server, reading, data, i, end)
        self.touched |= reading.ends & self.ties
        self.apart = self.apart or reading.alters
        self.unnamed = None
        server.unnamed = None
        server.replies.expect(_OWED_QUERY)
        if reading.copies and end <= len(data):
            self.await_copy(data, start, end)
        elif self.clearing or self.resets:
            # What it leaves behind is the base of what comes next.
            self.flush(data, start, end)
            self.hold(data[end:])
        return start

    def parse(self, server: ServerConnection, data: bytes, start: int, i: int, end: int) -> int:
        p = data
        n = len(data)
        if end > n:
            self.flush(data, start, i)
            if not self.pool.keeps(self, server, _STATEMENT_TOO_LONG, _UNKNOWN):
                return i
            other = server.names.get(data[i + 5 : data.find(b"\0", i + 5)])
            if other is not None:
                server.close_statement(other, server.known[other])
            if not p[i + 5]:
                # It cannot be brought to another server; nor need it, this one is kept.
                self.unnamed = server.unnamed = _LONG_TEXT
                self.unnamed_reading = HARMLESS
            server.replies.expect(_OWED_PARSE)
            return i
        j = i + 5
        while j < end and p[j]:
            j += 1
        k = j + 1
        while k < end and p[k]:
            k += 1
        if k >= end:
            self.flush(data, start, i)
            self.malformed(_PARSE)
            return i
        reading = HARMLESS
        if not plain(data, j + 1, k):
            reading = read(data[j + 1 : k])
            if reading.matters:
                self.flush(data, start, i)
                start = i
                self.fresh_sequences(server, reading)
                if reading.touches & _PREPARED & ~reading.clears and not self.may_prepare(server, data, i):
                    return i
                if self.raw:
                    server.replies.expect(_OWED_PARSE)
                    return i
                if self.ear is not None and reading.unlistens:
                    self.ear.beware_parsed(server, reading)
        elif _CHANGES[p[j + 1]]:
            reading = change(data, j + 1, k)
        if j == i + 5:
            before = self.unnamed
            self.unnamed = data[j + 1 : end]
            self.unnamed_reading = reading
            server.unnamed = self.unnamed
            server.unnamed_at = server.replies.sent
            if server.replies.kind == _OWED_NONE:
                server.replies.expect(_OWED_PARSE)
            else:
                entry = Entry(_OWED_UNNAMED_PARSE, None, self.unnamed)
                entry.before = before
                server.replies.add(entry)
            return start
        self.repeatable = False
        self.flush(data, start, i)
        return end if self.parse_named(server, data[i + 5 : j], data[j + 1 : end]) else i

    def bind(  # noqa: PLR0915 - one message, its two names
        self, server: ServerConnection, data: bytes, start: int, i: int, end: int
    ) -> int:
        p = data
        n = len(data) if end > len(data) else end
        j = i + 5
        while j < n and p[j]:
            j += 1
        k = j + 1
        while k < n and p[k]:
            k += 1
        if k >= n:
            self.flush(data, start, i)
            self.malformed(_BIND)
            return i
        statement = None
        reading = HARMLESS
        name = data[j + 1 : k] if k > j + 1 else b""
        if not name:
            reading = self.unnamed_reading
        elif self.statements is not None:
            statement = self.statements.get(name)
            if statement is not None:
                reading = statement.reading
        if reading.matters:
            self.repeatable = False
            self.flush(data, start, i)
            start = i
            if reading.touches & _PREPARED & ~reading.clears and not self.may_prepare(server, data, i):
                return i
        if reading.hidden:
            self.suspect(server, reading, data, i, end)
        self.touched |= reading.ends & self.ties
        self.apart = self.apart or reading.alters
        if reading.nulls_at:
            self.mind_nulls(reading, data, i, end)
            self.repeatable = self.repeatable and not self.resets
        if reading.matters:
            if reading.ties and not self.pin and self.pool.pins_none(reading.ties):
                reason = self.pool.pin_reason(reading.ties)
                server.refuse(self.pool.refused_pin(reason, self._text_bound(data, i)))
                return end
            self.beware_bound(server, reading, data, i, j, end)
        elif self.copy_portals is not None:
            self.copy_portals.discard(data[i + 5 : j])
        if self.raw:
            pass  # it has its own names now
        elif not name:
            if server.unnamed is None or server.unnamed is not self.unnamed:
                self.flush(data, start, i)
                start = i
                self.bring_unnamed(server)
        else:
            if statement is not None and statement.changed:
                self.flush(data, start, i)
                start = i
                if self._outdated(server, data, end):
                    return end
                statement = self.renewed(server, name, statement)
            there = server.known.get(statement) if statement is not None else None
            if there is None:
                self.flush(data, start, i)
                start = i
                there = self.bring(server, name, statement)
                statement = self.statements.get(name) if self.statements is not None else None
            if statement is not None:
                self.pool.tick += 1
                statement.used = self.pool.tick
            if there != name:
                self.flush(data, start, i)
                size = end - i - 1 - len(name) + len(there)
                server.write(messages.frame(b"B", size) + data[i + 5 : j + 1] + there)
                start = k
        server.binding.append(statement)
        server.replies.expect(_OWED_BIND)
        return start

    def _outdated(self, server: ServerConnection, data: bytes, end: int) -> bool:
        """Bind of a statement whose rows have changed since. Whether the client was told so: one that does not
        ask for their description would take them for what they were."""
        at = end
        while len(data) - at >= 5 and data[at] != _SYNC:
            if data[at] == _DESCRIBE:
                return False
            at += 1 + int.from_bytes(data[at + 1 : at + 5], "big")
        if server.status != _IDLE or server.replies.kind != _OWED_NONE or server.replies.open:
            return False
        text = "cached plan must not change result type"
        self.write(messages.error("ERROR", "0A000", text, routine="RevalidateCachedQuery"))
        self.skipping = True
        return True

    def execute(self, server: ServerConnection, data: bytes, start: int, i: int, end: int) -> int:
        server.replies.expect(_OWED_EXECUTE)
        if self.copy_portals is not None and data[i + 5 : data.find(b"\0", i + 5, end)] in self.copy_portals:
            self.await_copy(data, start, end)
            self.copying_query = False
            server.write(messages.FLUSH)
        return start

    def function(self, server: ServerConnection, data: bytes, start: int, i: int, end: int) -> int:
        if int.from_bytes(data[i + 5 : i + 9], "big") not in LARGE_OBJECT_CALLS:
            self.flush(data, start, i)
            start = i
            if not self.pool.keeps(self, server, _FUNCTION_CALL, _UNKNOWN):
                return i
        self.repeatable = False
        server.replies.expect(_OWED_QUERY)
        return start

    def by_name(self, server: ServerConnection, data: bytes, kind: int, start: int, i: int, end: int) -> int:
        """Describe or Close of a prepared statement."""
        self.flush(data, start, i)
        name = data[i + 6 : end - 1]
        if kind == _CLOSE:
            self.repeatable = False
            self.close_name(server, name)
            return end
        sent = self.describe(server, name)
        bound = server.replies.bound
        server.replies.expect(_OWED_DESCRIBE)
        server.replies.bound = bound
        return end if sent else i

    def pass_on(self, server: ServerConnection, data: bytes, kind: int, start: int, i: int, end: int) -> int:
        """A message that goes on as it is, unless the server would ignore it."""
        replies = server.replies
        goes = True
        if kind == _SYNC:
            if server.copying:
                goes = False
            else:
                self.skipping = False
                server.skipping = False
                replies.expect(_OWED_SYNC)
                if self.clearing or self.resets:
                    self.flush(data, start, end)
                    self.hold(data[end:])
        elif kind == _EXECUTE:
            replies.expect(_OWED_EXECUTE)
        elif kind == _DESCRIBE:
            self.described = True
            replies.expect(_OWED_DESCRIBE)
        elif kind == _BIND:
            replies.expect(_OWED_BIND)
        elif kind == _PARSE:
            replies.expect(_OWED_PARSE)
        elif kind == _CLOSE:
            replies.expect(_OWED_CLOSE)
        elif kind in (_QUERY, _FUNCTION):
            replies.expect(_OWED_QUERY)
        elif kind == _FLUSH:
            goes = not server.copying
        else:  # of COPY
            self.repeatable = False
            goes = replies.kind != _OWED_NONE
            if goes and kind != _COPY_DATA:
                server.copy_ended()
                if self.copying_query and replies.kind == _OWED_QUERY and end <= len(data):
                    self.await_copy(data, start, end)  # the same text may copy once more
        if not goes:
            self.flush(data, start, i)
            return end
        if self.raw:
            if self.sight is not None:
                self.sight.message(data, kind, i, end)
            if not self.holding and end <= len(data):
                self._mind_copy(server, data, kind, start, i, end)
        return start

    def await_copy(self, data: bytes, start: int, end: int) -> None:
        """A server that reads CopyData ignores Sync: nothing may go ahead until it is known whether it does."""
        self.flush(data, start, end)
        self.copying_query = True
        self.copy_asked = True
        self.hold(data[end:])

    def _mind_copy(self, server: ServerConnection, data: bytes, kind: int, start: int, i: int, end: int) -> None:
        """The texts of a client that is not translated are looked at for COPY only."""
        if kind == _QUERY:
            if not plain(data, i + 5, end - 1) and may_copy(data[i + 5 : end - 1]):
                self.await_copy(data, start, end)
        elif kind == _PARSE:
            self.copies = self.copies or may_copy(data[i + 5 : end])
        elif kind == _EXECUTE and self.copies:
            self.await_copy(data, start, end)
            self.copying_query = False
            server.write(messages.FLUSH)

    def flush(self, data: bytes, start: int, end: int) -> None:
        """Send on what needed no decision so far."""
        if start < end and self.server is not None:
            self.server.write(data[start:end])

    def fail(self, sqlstate: str, text: str) -> None:
        """Tell the client why this is the end, and close."""
        if not self.lost and not self.ending:
            self.ending = True
            self.write(messages.error("FATAL", sqlstate, text))
            self.close()
            self.daemon.cut_later(self)

    def malformed(self, kind: int) -> None:
        error = ProtocolError(f"a client sent a malformed message of type {chr(kind)!r}")
        self.daemon.malformed(self, error)
        if kind in kinds.KINDS:
            self.fail("08P01", "invalid message length")
        else:
            self.fail("08P01", f"invalid frontend message type {kind}")
