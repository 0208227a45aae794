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
from cenote.proxy.naming import Named
from cenote.proxy.prepared import HARMLESS, Reading, bound, executed, may_copy, read
from cenote.proxy.replies import BIND, CLOSE, DESCRIBE, EXECUTE, NONE, PARSE, QUERY, SYNC, UNNAMED_PARSE, Entry
from cenote.proxy.server import ServerConnection
from cenote.reasons import Pinned
from cenote.sql import touch
from cenote.sql.plain import plain
from cenote.wire import messages

# The same as C sees them.
_OWED_NONE, _OWED_QUERY, _OWED_SYNC, _OWED_PARSE, _OWED_BIND = NONE, QUERY, SYNC, PARSE, BIND
_OWED_DESCRIBE, _OWED_EXECUTE, _OWED_CLOSE, _OWED_UNNAMED_PARSE = DESCRIBE, EXECUTE, CLOSE, UNNAMED_PARSE

# Types of messages, as numbers: the scan compares bytes.
_QUERY, _PARSE, _BIND, _DESCRIBE, _CLOSE, _EXECUTE = 0x51, 0x50, 0x42, 0x44, 0x43, 0x45  # Q P B D C E
_SYNC, _FLUSH, _FUNCTION, _TERMINATE = 0x53, 0x48, 0x46, 0x58  # S H F X
_COPY_DATA, _COPY_DONE, _COPY_FAIL = 0x64, 0x63, 0x66  # d c f
_KINDS = b"QPBDCESHFXdcf"
_EMPTY = b"SHXc"  # these have no body


def _shortest() -> list[int]:
    """The least length a message of each type can have; more than any for what is no type."""
    found = [1 << 32] * 256
    for code, least in zip(_KINDS, (5, 8, 12, 6, 6, 9, 4, 4, 14, 4, 4, 4, 5), strict=True):
        found[code] = least
    return found


_SHORTEST = _shortest()
_STATEMENT = 0x53  # S, in Describe and Close
_IDLE = 0x49
_PREPARED, _SEQUENCE, _UNKNOWN, _LOAD = touch.PREPARED, touch.SEQUENCE, touch.UNKNOWN, touch.LOAD
_SETTINGS, _ROLE = touch.SETTINGS, touch.ROLE
_TEMP = touch.TEMP
# How texts begin that a failed transaction refuses: not as COMMIT, END, ABORT, ROLLBACK or PREPARE TRANSACTION.
_STOPPED = (b"s", b"i", b"u", b"d", b"w", b"b")
_CHANGES = b"ud"  # how a plain text begins that runs triggers
_FAILED = 0x45  # E, as a transaction status

_STATEMENT_TOO_LONG, _FUNCTION_CALL = (
    str(Pinned.STATEMENT_TOO_LONG),
    str(Pinned.FUNCTION_CALL),
)
# A text is read up to this length; longer ones are streamed and cannot be told.
_TEXT_BYTES = 1_048_576
# Names and the like: nothing that must be seen whole may be longer.
_HOLD_BYTES = 1_048_576
_LONGEST = 0x7FFFFFFF
_LONG_TEXT = b"(too long)"
# Input held before the client is made to wait.
_HELD_BYTES = 262_144
#: Large objects, the only functions that libpq calls by number.
LARGE_OBJECT_CALLS = frozenset(
    (715, 764, 765, 767, 952, 953, 954, 955, 956, 957, 958, 964, 1004, 3170, 3171, 3172, 3457, 3458, 3459, 3460)
)


class ClientSession(Named):
    """One client after its log-in. On the event loop.

    server: the connection it has now
    waiter: its place in the pool's line
    holding, held: its input waits, and what has come meanwhile
    skipping: refused inside an extended batch, so everything up to Sync is discarded, as a server would
    pin: why it keeps its server connection ("" if it does not)
    customs: the custom settings it may have set; builtin: it may have set others since the server was asked
    text: the text that touched something; pinned_at: since when it keeps its connection
    raw: its statements have its own names on its own connection: nothing is translated any more
    """

    def __init__(self, daemon: Any) -> None:
        super().__init__()
        self.daemon = daemon
        self.copy_portals: set[bytes] | None = None
        self.clearing = 0
        self.customs: set[bytes] | None = None
        self.builtin = False
        self.text = b""
        self.skipping = False
        self.held = b""
        self.part = b""
        self.ending = False
        self.repeatable = False
        self.described = False
        self.copies = False
        self.copying_query = False
        self.bytes_in = 0
        self.pid = 0
        self.secret = b""
        self.login: Any = None
        self.pinned_at = 0.0
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

    def scan(self, data: bytes) -> None:  # noqa: PLR0915 - one loop, and its end
        """Every message in `data`, until one has to be held. O(bytes)

        What needs no decision goes on as it is: `start` is where that began, `i` where the message begins.
        """
        p = data
        n = len(data)
        i = 0
        start = 0
        server = self.server
        first = p[0] if n else 0
        kind = 0
        self.described = False
        # Whether what is sent here could be sent once more as it is: one buffer, nothing else in flight.
        self.repeatable = not (self.left or self.pin) and (
            server is None
            or (
                not server.answered
                and (server.replies.kind == _OWED_NONE or (server.guard and server.replies.pending() == 1))
            )
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
            if length < _SHORTEST[kind] or length > _LONGEST or (length > 4 and kind in _EMPTY):
                self._flush(data, start, i)
                self._malformed(kind)
                return
            if (self.skipping or (server is not None and server.skipping)) and kind not in (_SYNC, _TERMINATE):
                self._flush(data, start, i)
                i = start = end
                continue
            if end > n and kind != _COPY_DATA:
                seen = self._seen_enough(data, kind, i, length)
                if seen < 0:
                    self._flush(data, start, i)
                    self._malformed(kind)
                    return
                if seen == 0:
                    break
                self.repeatable = False
            if kind == _TERMINATE:
                self._flush(data, start, i)
                self._goodbye(server)
                return
            if server is None:
                if self._without_server(data, kind, i, end):
                    i = start = end
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
                self.repeatable = self.repeatable and i == 0
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
                self._flush(data, start, i)
                self._hold(data[i:] if i else data)
                self.order_asked = True
                return
            if self.raw:
                start = self._pass(server, data, kind, start, i, end)
            elif kind == _QUERY:
                start = self._query(server, data, start, i, end)
            elif kind == _PARSE:
                start = self._parse(server, data, start, i, end)
            elif kind == _BIND:
                start = self._bind(server, data, start, i, end)
            elif kind == _EXECUTE and self.copy_portals is not None:
                start = self._execute(server, data, start, i, end)
            elif kind == _FUNCTION:
                start = self._function(server, data, start, i, end)
            elif kind in (_DESCRIBE, _CLOSE) and p[i + 5] == _STATEMENT:
                start = self._by_name(server, data, kind, start, i, end)
            else:
                start = self._pass(server, data, kind, start, i, end)
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
            if self.repeatable and not server.answered and server.status == _IDLE:
                server.batch = data
                server.described = self.described and first == _BIND and kind == _SYNC
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
            if _two_names(data, i + 5):
                return 1
            return 0 if len(data) - i <= _HOLD_BYTES else -1
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
        named = self.settings is not None and self.settings.prepared_names
        if kind == _CLOSE and not (named and data[i + 5] == _STATEMENT and data[i + 6 : end - 1] in named):
            if data[i + 5] == _STATEMENT:
                self.undefine_name(data[i + 6 : end - 1])
            self.write(messages.CLOSE_COMPLETE)
            return True
        if kind == _PARSE and end <= len(data) and data[i + 5] and self.parse_known(data, i + 5, end):
            return True
        if self.declined is None:
            server = self.pool.borrow(self)
            if server is not None:
                if server.settings is not self.settings or self.pool.reads_nothing:
                    self.pool.convert(self, server, self._stops(data, kind, i, end))
            elif self.declined is None:
                self.holding = True
        return False

    def _stops(self, data: bytes, kind: int, i: int, end: int) -> bool:
        """Whether a failed transaction stops this message, and what follows it up to the end of its batch: then it
        can go on right behind what is to succeed first."""
        if end > len(data):
            return False
        at = i + 5
        if kind == _BIND:
            at = data.find(b"\0", at) + 1
            name = data[at : data.find(b"\0", at)]
            statement = self.statements.get(name) if name and self.statements is not None else None
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

    def _query(self, server: ServerConnection, data: bytes, start: int, i: int, end: int) -> int:
        if server.replies.open and server.replies.kind != _OWED_NONE:
            # It ends the unnamed statement, unless the batch it stands in has failed: that has to be known first.
            self._flush(data, start, i)
            self._hold(data[i:] if i else data)
            server.write(messages.FLUSH)
            self.copy_asked = True
            return i
        reading = HARMLESS
        if end > len(data):
            self.keep(server, _STATEMENT_TOO_LONG, _UNKNOWN)
        elif not plain(data, i + 5, end - 1):
            reading = read(data[i + 5 : end - 1])
            if reading.hidden:
                self._suspect(server, reading.fingerprint)
            self.touched |= reading.ends & self.ties
        elif data[i + 5] | 0x20 in _CHANGES:
            self._suspect(server, _change(data, i + 5, end))
        if reading.matters:
            self.repeatable = False
            self._flush(data, start, i)
            start = i
            self._fresh_sequences(server, reading)
            if reading.ties and not self.pin and self.pool.pins_none(reading.ties):
                server.write(self.pool.refusing(reading.ties, data[i + 5 : end - 1]))
                self.unnamed = None
                server.unnamed = None
                server.replies.expect(_OWED_QUERY)
                return end
            if (reading.touches or reading.resets) and not self._beware(server, reading, data, i, end):
                return i
        self.unnamed = None
        server.unnamed = None
        server.replies.expect(_OWED_QUERY)
        if self.clearing or self.resets:
            # What it leaves behind is the base of what comes next.
            self._flush(data, start, end)
            self._hold(data[end:])
        elif reading.copies and end <= len(data):
            self._await_copy(data, start, end)
        return start

    def _await_copy(self, data: bytes, start: int, end: int) -> None:
        """A server that reads CopyData ignores Sync: nothing may go ahead until it is known whether it does."""
        self._flush(data, start, end)
        self.copying_query = True
        self.copy_asked = True
        self._hold(data[end:])

    def _parse(self, server: ServerConnection, data: bytes, start: int, i: int, end: int) -> int:
        p = data
        n = len(data)
        if end > n:
            self._flush(data, start, i)
            self.keep(server, _STATEMENT_TOO_LONG, _UNKNOWN)
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
            self._flush(data, start, i)
            self._malformed(_PARSE)
            return i
        reading = HARMLESS
        if not plain(data, j + 1, k):
            reading = read(data[j + 1 : k])
            if reading.matters:
                self._flush(data, start, i)
                start = i
                self._fresh_sequences(server, reading)
                if reading.touches & _PREPARED & ~reading.clears and not self._may_prepare(server, data, i):
                    return i
                if self.raw:
                    server.replies.expect(_OWED_PARSE)
                    return i
                if self.ear is not None and reading.unlistens:
                    self.ear.beware_parsed(server, reading)
        elif p[j + 1] | 0x20 in _CHANGES:
            self._suspect(server, _change(data, j + 1, k))
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
        self._flush(data, start, i)
        return end if self.parse_named(server, data[i + 5 : j], data[j + 1 : end]) else i

    def _bind(  # noqa: PLR0915 - one message, its two names
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
            self._flush(data, start, i)
            self._malformed(_BIND)
            return i
        statement = None
        reading = HARMLESS
        name = data[j + 1 : k]
        if not name:
            reading = self.unnamed_reading
        elif self.statements is not None:
            statement = self.statements.get(name)
            if statement is not None:
                reading = statement.reading
        if reading.hidden:
            self._suspect(server, reading.fingerprint)
        self.touched |= reading.ends & self.ties
        if reading.matters:
            self.repeatable = False
            self._flush(data, start, i)
            start = i
            if reading.touches & _PREPARED & ~reading.clears and not self._may_prepare(server, data, i):
                return i
            if (
                reading.ties
                and not self.pin
                and server.status == _IDLE
                and server.replies.kind == _OWED_NONE
                and not server.replies.open
                and self.pool.pins_none(reading.ties)
            ):
                self.write(self.pool.refused_pin(reading.ties, self._text_bound(data, i)))
                self.skipping = True
                return end
            self._beware_bound(server, reading, data, i, j, end)
        elif self.copy_portals is not None:
            self.copy_portals.discard(data[i + 5 : j])
        if self.raw:
            pass  # it has its own names now
        elif not name:
            if server.unnamed is None or server.unnamed != self.unnamed:
                self._flush(data, start, i)
                start = i
                self.bring_unnamed(server)
        else:
            if statement is not None and statement.changed:
                self._flush(data, start, i)
                start = i
                if self._outdated(server, data, end):
                    return end
                statement = self.renewed(server, name, statement)
            there = server.known.get(statement) if statement is not None else None
            if there is None:
                self._flush(data, start, i)
                start = i
                there = self.bring(server, name, statement)
            if statement is not None:
                self.pool.tick += 1
                statement.used = self.pool.tick
            if there != name:
                self._flush(data, start, i)
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

    def _execute(self, server: ServerConnection, data: bytes, start: int, i: int, end: int) -> int:
        server.replies.expect(_OWED_EXECUTE)
        if self.copy_portals is not None and data[i + 5 : data.find(b"\0", i + 5, end)] in self.copy_portals:
            self._await_copy(data, start, end)
            self.copying_query = False
            server.write(messages.FLUSH)
        return start

    def _function(self, server: ServerConnection, data: bytes, start: int, i: int, end: int) -> int:
        if int.from_bytes(data[i + 5 : i + 9], "big") not in LARGE_OBJECT_CALLS:
            self._flush(data, start, i)
            start = i
            self.keep(server, _FUNCTION_CALL, _UNKNOWN)
        self.repeatable = False
        server.replies.expect(_OWED_QUERY)
        return start

    def _by_name(self, server: ServerConnection, data: bytes, kind: int, start: int, i: int, end: int) -> int:
        """Describe or Close of a prepared statement."""
        self._flush(data, start, i)
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

    def _pass(self, server: ServerConnection, data: bytes, kind: int, start: int, i: int, end: int) -> int:
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
                    self._flush(data, start, end)
                    self._hold(data[end:])
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
                    self._await_copy(data, start, end)  # the same text may copy once more
        if not goes:
            self._flush(data, start, i)
            return end
        if self.raw:
            if self.sight is not None:
                self.sight.message(data, kind, i, end)
            if not self.holding and end <= len(data):
                self._mind_copy(server, data, kind, start, i, end)
        return start

    def _mind_copy(self, server: ServerConnection, data: bytes, kind: int, start: int, i: int, end: int) -> None:
        """The texts of a client that is not translated are looked at for COPY only."""
        if kind == _QUERY:
            if not plain(data, i + 5, end - 1) and may_copy(data[i + 5 : end - 1]):
                self._await_copy(data, start, end)
        elif kind == _PARSE:
            self.copies = self.copies or may_copy(data[i + 5 : end])
        elif kind == _EXECUTE and self.copies:
            self._await_copy(data, start, end)
            self.copying_query = False
            server.write(messages.FLUSH)

    def _flush(self, data: bytes, start: int, end: int) -> None:
        """Send on what needed no decision so far."""
        if start < end and self.server is not None:
            self.server.write(data[start:end])

    # -- session state ----------------------------------------------------------------------------------------

    def _beware(self, server: ServerConnection, reading: Reading, data: bytes, i: int, end: int) -> bool:
        """A text that may touch something is about to run. Whether it may go on now."""
        touches = reading.touches
        at_rest = server.replies.kind == _OWED_NONE and not server.replies.open
        if (
            touches
            and touches & ~reading.clears == 0
            and at_rest
            and not self.raw
            and (server.status == _IDLE or touches == _PREPARED)
        ):
            self.clearing = touches  # DEALLOCATE ALL is not undone by a roll-back
            self._mind_base(reading.resets)
            return True
        if touches & _PREPARED and not self._may_prepare(server, data, i):
            return False
        self._note(server, reading, data, i, end)
        return True

    def _suspect(self, server: ServerConnection, fingerprint: bytes) -> None:
        """What is about to run does more than it shows: if it is new, or known to touch something, the server will
        be asked."""
        server.hid = True
        if self.settings is not None and self.settings.temporary:
            self.touched |= _TEMP
        if self.pool.audits and self.pool.suspect(server, fingerprint) and not self.raw:
            self.touched |= _UNKNOWN
            self.builtin = True

    def _mind_base(self, resets: tuple[tuple[bytes, bool], ...]) -> None:
        """These settings may go back to the server's base state: this client's own has to be put back."""
        own = (
            {*self.pool.base_items, *(name for name, _ in self.startup.items)}
            if self.startup is not None
            else self.pool.base_items
        )
        for name, local in resets:
            if name in own or (own and name == b"*"):
                self.resets = {**(self.resets or {}), name: local}

    def _note(self, server: ServerConnection, reading: Reading, data: bytes, i: int, end: int) -> None:
        """What is about to run may touch this: the server will be asked what came of it."""
        touches = reading.touches
        self.touched |= touches
        self.text = self._text_bound(data, i) if data[i] == _BIND else data[i + 5 : min(end, i + 1024)]
        if touches & (_SETTINGS | _UNKNOWN):
            self.builtin = self.builtin or reading.builtin
            if reading.customs:
                self.customs = (self.customs or set()).union(reading.customs)
            if touches & _PREPARED and self.settings is not None:
                found, computed = executed(self.settings.prepared, self.text.partition(b"\0")[0])
                self.customs = (self.customs or set()) | found
                if computed:
                    self.keep(server, self.pool.pin_reason(_UNKNOWN), _UNKNOWN)
            untold = reading.untold
            if reading.names_at:
                # In a Query there are no parameters, and it fails.
                names = bound(data[i + 5 : end], reading.names_at) if data[i] == _BIND else []
                untold = untold or names is None
                self.customs = (self.customs or set()).union(name for name in names or () if b"." in name)
            if untold:
                self.keep(server, self.pool.pin_reason(_UNKNOWN), _UNKNOWN)
        if reading.resets:
            self._mind_base(reading.resets)
        if touches & _LOAD:
            self.keep(server, self.pool.pin_reason(_LOAD), _LOAD)
        if reading.ties & _SEQUENCE:
            self.keep(server, self.pool.pin_reason(_SEQUENCE), _SEQUENCE)
        if self.ear is not None and reading.unlistens:
            self.ear.beware(server, reading)

    def _text_bound(self, data: bytes, i: int) -> bytes:
        """The text of the statement that a Bind names, as far as the ledger needs it."""
        at = data.index(b"\0", i + 5) + 1
        name = data[at : data.index(b"\0", at)]
        statement = self.statements.get(name) if name and self.statements is not None else None
        tail: bytes = statement.tail if statement is not None else self.unnamed or b""
        return tail[:1024].partition(b"\0")[0]

    def _fresh_sequences(self, server: ServerConnection, reading: Reading) -> None:
        """What reads `currval` or `lastval` shall fail rather than hear of another client's sequences."""
        if not reading.reads & _SEQUENCE:
            return
        self.pool.minds_sequences = True
        if not server.sequenced:
            return
        replies = server.replies
        if server.status != _FAILED and (replies.ends() or not replies.open):
            server.sequenced = False
            server.inject(b"DISCARD SEQUENCES", None)

    def _beware_bound(
        self, server: ServerConnection, reading: Reading, data: bytes, i: int, j: int, end: int
    ) -> None:
        """A statement that is more than harmless is about to be bound, to the portal whose name ends at `j`."""
        self._fresh_sequences(server, reading)
        touches = reading.touches
        if (
            touches
            and touches & ~reading.clears == 0
            and not self.raw
            and server.status == _IDLE
            and (server.replies.kind == _OWED_NONE or server.replies.pending() == 1)
        ):
            self.clearing = touches
            self._mind_base(reading.resets)
        elif touches or reading.resets:
            self._note(server, reading, data, i, end)
        if reading.copies:
            if self.copy_portals is None:
                self.copy_portals = set()
            self.copy_portals.add(data[i + 5 : j])

    def keep(self, server: ServerConnection, reason: str, flags: int) -> None:
        """Keep this server connection while it has this kind of state."""
        self.ties |= flags
        if not self.pin:
            self.pin = reason
            self.pinned_at = monotonic()
            self.pool.pinned_by(self, reason)

    def unpin(self) -> None:
        """Nothing ties it to its connection any more."""
        self.ties = 0
        self.pin = ""
        self.pool.pinned -= 1

    def own_names(self, server: ServerConnection) -> None:
        """From now on the names on its server connection are the client's own, and nothing is translated."""
        if not self.raw:
            self.take_names(server)
            self.raw = True
            self.copies = True  # what it prepared before is not looked at again

    def _may_prepare(self, server: ServerConnection, data: bytes, i: int) -> bool:
        """PREPARE, EXECUTE or DEALLOCATE by SQL, which goes by the server's names: they are made this client's.
        Whether the message may go on now; if not, it is held until it is known what came of those before."""
        if self.raw or server.taken_at == server.replies.sent:
            return True
        if server.replies.kind != _OWED_NONE:
            self._hold(data[i:] if i else data)
            if server.replies.open:
                server.write(messages.FLUSH)
                self.copy_asked = True
            else:
                self.order_asked = True
            return False
        self.take_names(server)
        server.taken_at = server.replies.sent
        return True

    # -- a server connection comes and goes -------------------------------------------------------------------

    def _hold(self, data: bytes) -> None:
        self.holding = True
        self.held = data

    def go_on(self) -> None:
        """Whatever held the input is over."""
        data = self.part + self.held if self.part else self.held
        self.holding = False
        self.held = b""
        self.part = b""
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
        elif not self.pool.convert(self, server, self._next_stops()):
            self.go_on()

    def _next_stops(self) -> bool:
        """Whether a failed transaction stops the message that is held."""
        data = self.held
        if self.part or len(data) < 5:
            return False
        return self._stops(data, data[0], 0, 1 + int.from_bytes(data[1:5], "big"))

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
            clearing = self.clearing
            self.clearing = 0
            self.pool.cleared(self, server, clearing)
            return
        if self.resets:
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
            self.go_on()

    def _maybe_release(self, server: ServerConnection) -> None:
        if server.status == _IDLE and server.replies.kind == _OWED_NONE and self.left == 0:
            if server.batch is None and not server.replies.open:
                if self.touched and not self.raw:
                    self.pool.learn(self, server)
                else:
                    self.pool.settled(self, server)
        elif server.status != _IDLE:
            self.pool.in_transaction(self, server)

    def repeat(self, batch: bytes) -> None:
        """A plan was wrong and nothing of this batch has run: prepare anew and send it once more."""
        self.scan(batch)

    def resubmit(self, batch: bytes) -> None:
        """The server ended before anything of this batch ran: send it once more, on another connection."""
        self.scan(batch)

    def misfit(self, error: bytes) -> None:
        """The server refuses the settings this client logged in with."""
        server = self.server
        fields = messages.error_fields(error)
        if server is not None and server.rests():
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

    # -- ends -------------------------------------------------------------------------------------------------

    def fail(self, sqlstate: str, text: str) -> None:
        """Tell the client why this is the end, and close."""
        if not self.lost and not self.ending:
            self.ending = True
            self.write(messages.error("FATAL", sqlstate, text))
            self.close()
            self.daemon.cut_later(self)

    def _malformed(self, kind: int) -> None:
        error = ProtocolError(f"a client sent a malformed message of type {chr(kind)!r}")
        self.daemon.malformed(self, error)
        if kind in _KINDS:
            self.fail("08P01", "invalid message length")
        else:
            self.fail("08P01", f"invalid frontend message type {kind}")


def _change(data: bytes, at: int, end: int) -> bytes:
    """The first words of UPDATE or DELETE: triggers are those of a table."""
    return b" ".join(data[at : min(end, at + 80)].lower().split(None, 3)[:3])


def _two_names(data: bytes, at: int) -> bool:
    """Whether two zero-terminated texts are there in whole."""
    end = data.find(b"\0", at)
    return end >= 0 and data.find(b"\0", end + 1) >= 0
