"""A server connection after its log-in: reads answers, keeps the account, forwards, and says when it is at rest.

Frames are scanned, not parsed, and whole buffers are passed on: what a buffer brings is written to the client
in one piece unless something in it has to be taken out (answers to what we injected) or put in (answers to
what we left out). It decides nothing about pools: at rest it tells its pool, which hands it on.

Source: PostgreSQL documentation, "Message Flow" and "Message Formats".
"""

from __future__ import annotations

import asyncio
from time import monotonic
from typing import Any

from cenote.errors import ProtocolError
from cenote.proxy.peer import Peer
from cenote.proxy.prepared import Statement
from cenote.proxy.replies import (
    BIND,
    CLOSE,
    DESCRIBE,
    EXECUTE,
    NAMED_PARSE,
    NONE,
    OWN_BRING,
    OWN_CLOSE,
    OWN_PARSE,
    OWN_QUERY,
    OWN_STEP,
    OWN_SYNC,
    PARSE,
    QUERY,
    SWALLOWED,
    SYNC,
    SYNTHETIC,
    SYNTHETIC_CLOSE,
    UNNAMED_PARSE,
    Entry,
    ReplyQueue,
)
from cenote.proxy.roles import Borrower, Lender
from cenote.wire import messages

# The same as C sees them.
_OWED_NONE, _OWED_QUERY, _OWED_SYNC, _OWED_PARSE, _OWED_BIND = NONE, QUERY, SYNC, PARSE, BIND
_OWED_NAMED_PARSE, _OWED_UNNAMED_PARSE, _OWED_OWN_BRING = NAMED_PARSE, UNNAMED_PARSE, OWN_BRING
_OWED_DESCRIBE, _OWED_EXECUTE, _OWED_CLOSE, _OWED_SWALLOWED, _OWED_OWN_PARSE, _OWED_OWN_STEP = (
    DESCRIBE,
    EXECUTE,
    CLOSE,
    SWALLOWED,
    OWN_PARSE,
    OWN_STEP,
)
_OWED_OWN_CLOSE, _OWED_OWN_QUERY, _OWED_OWN_SYNC, _OWED_SYNTHETIC_CLOSE, _OWED_SYNTHETIC = (
    OWN_CLOSE,
    OWN_QUERY,
    OWN_SYNC,
    SYNTHETIC_CLOSE,
    SYNTHETIC,
)

# Types of messages, as numbers: the scan compares bytes.
_ROW, _COPY_DATA, _NOTICE, _NOTIFICATION, _FUNCTION_RESULT = 0x44, 0x64, 0x4E, 0x41, 0x56  # D d N A V
_PARAMETERS, _COPY_OUT, _COPY_IN, _COPY_DONE = 0x74, 0x48, 0x47, 0x63  # t H G c
_COMPLETE, _EMPTY, _SUSPENDED = 0x43, 0x49, 0x73  # C I s
_DESCRIPTION, _NO_DATA = 0x54, 0x6E  # T n
_PARSED, _BOUND, _CLOSED = 0x31, 0x32, 0x33  # 1 2 3
_READY, _ERROR, _STATUS = 0x5A, 0x45, 0x53  # Z E S
_IDLE, _FAILED = 0x49, 0x45  # I and E, as a transaction status

# A message that has to be seen whole is held up to this size; rows and copy data are never held.
_HOLD_BYTES = 16_777_216
# It does not hide that the transaction has failed already, as a text that cannot be parsed would.
_FAILING_PARSE = messages.parse(b"cenote_refused", b"SELECT refused_by_cenote\0\0\0")


class ServerConnection(Peer):
    """One server connection. `client` has it, or nobody. On the event loop.

    status: the transaction status of the last ReadyForQuery (I, T, E)
    settings: what it carries beside its base state, an object of `settings.py`; None is the base state
    stain: names of custom settings that were ever set on it
    expires: with its settings the server would end it while it is idle
    unclean: its last client has left state behind that has to be discarded
    sequenced: somebody has had it who may have asked a sequence: `currval` and `lastval` would tell of it
    audit: before anybody else has it, the server is asked whether it is what it is taken for
    suspects: what has run since and does more than it shows, and whether nothing was known of it
    proof: how often something had been defined when the first of these ran: if that is all there is, an audit that
        finds nothing shows that they are harmless; -1: it shows nothing, what they did may be undone or taken over
    hints: custom settings that these may set, by what they were called with
    defines: something was created or altered
    defaults: what its log-in began with and pg_settings does not list
    known, names: prepared statements the server has (or will have), by statement and by name
    unnamed: what the unnamed statement was parsed from; None if the server has none that we know
    copying: the server reads CopyData; it ignores Sync and Flush meanwhile
    skipping: it discards everything until Sync
    guard: number of the batch that the client's next one runs behind, if it succeeds; 0: none
    fatal: its last words; told: its client has heard them
    at_rest: nothing is owed and no transaction is open
    """

    def __init__(self, pool: Lender) -> None:  # noqa: PLR0915 - all it has is declared here
        super().__init__()
        self.pool: Any = pool
        self.slot: Any = None
        self.client: Borrower | None = None
        self.replies = ReplyQueue()
        self.status = _IDLE
        self.settings: Any = None
        self.stain: frozenset[bytes] = frozenset()
        self.expires = self.unclean = False
        self.sequenced = False
        self.audit = False
        self.suspects: dict[bytes, bool] = {}
        self.proof = 0
        self.hints: set[bytes] = set()
        self.defines = False
        self.defaults: dict[bytes, bytes] = {}
        self.known: dict[Statement, bytes] = {}
        self.names: dict[bytes, Statement] = {}
        self.unnamed: bytes | None = None
        self.taken_at = -1  # the batch for which the names here were made its client's
        self.named_at = -1  # the batch in which the named statements changed last; and the unnamed one
        self.unnamed_at = -1
        self.copying = False
        self.early_ends = 0  # the client ended a COPY before we saw that it began
        self.skipping = False
        self.guard = 0
        self.answered = False  # something came since the lease began
        self.batch: bytes | None = None  # what is in flight, while it could be sent once more as it is
        self.described = False  # that batch is Bind ... Sync and asks for the description of its rows
        self.replaying = self.told = False
        self.lease_tick = 0
        self.began_at = 0.0  # the transaction; and the request, 0 when none is under way
        self.asked_at = 0.0
        self.part = b""
        self.left = 0
        self.dropping = False
        self.finished: list[Entry] = []
        self.binding: list[Statement | None] = []  # what the Binds under way are of, oldest first
        self.instead = b""  # an error as the client shall hear it
        self.fatal: bytes | None = None
        self.failed = False  # the request under way was answered with an error
        self.unparsed = False  # and nothing of it ran: the server could not parse it
        self.quiet: asyncio.Future[None] | None = None
        self.farewell: asyncio.Future[None] | None = None
        self.cancels = 0
        self.doubtful = False  # a cancel request may or may not have been delivered
        self.cancel_wanted = 0.0  # asked_at of the request that a cancel waits for; 0: none
        # Filled in by the log-in.
        self.parameters: dict[bytes, bytes] = {}
        self.backend_pid = 0
        self.backend_secret = b""
        self.endpoint: Any = None
        self.version = 0
        self.opened_at = monotonic()

    # -- answers --------------------------------------------------------------------------------------------

    def received(self, data: bytes) -> None:  # noqa: PLR0915 - one loop: a call per message costs
        """Bytes from the server. O(bytes), and nothing is copied that can pass as it is."""
        if self.part:
            data = self.part + data
            self.part = b""
        p = data
        n = len(data)
        i = 0
        start = 0
        begin = 0  # nothing but answers to our own comes before it
        ready = False
        theirs = False
        client = self.client
        replies = self.replies
        fresh = not self.answered
        self.answered = True
        if self.left:
            i = n if self.left > n else self.left
            self.left -= i
            if self.dropping:
                start = i
        while n - i >= 5:
            kind = p[i]
            length = p[i + 1] << 24 | p[i + 2] << 16 | p[i + 3] << 8 | p[i + 4]
            end = i + 1 + length
            if length < 4 or length > 0x7FFFFFFF:
                self._broken(f"a message of type {chr(kind)!r} claims {length} bytes")
                return
            owed = replies.kind
            drop = client is None or owed >= _OWED_SWALLOWED
            if owed == _OWED_NONE and client is None and kind not in (_NOTICE, _NOTIFICATION, _STATUS):
                if kind == _ERROR and end <= n:
                    self.fatal = data[i + 5 : end]
                self.pool.idle_ended(self)
                return
            if kind in (_ROW, _COPY_DATA):
                if drop:
                    if i > start and client is not None:
                        client.write(data[start:i])
                    if owed == _OWED_OWN_QUERY and replies.entry().rows is not None:
                        start = i
                        if end > n:
                            break
                        replies.entry().rows.append(data[i + 5 : end])
                    start = end
                i = end
                continue
            if kind == _NOTIFICATION and client is not None and (drop or client.ear is not None):
                # It is the client's, whatever of ours is under way.
                if end > n:
                    break
                if i > start:
                    client.write(data[start:i])
                if client.ear is None or client.ear.hears(data[i:end]):
                    client.write(data[i:end])
                i = start = end
                continue
            if end > n and kind not in (_NOTICE, _FUNCTION_RESULT):
                if length > _HOLD_BYTES:
                    self._broken(f"a message of type {chr(kind)!r} of {length} bytes")
                    return
                break
            head = i == begin
            if head and owed == _OWED_OWN_QUERY:
                begin = end
            if kind == _ERROR and (owed in (_OWED_OWN_PARSE, _OWED_OWN_CLOSE, _OWED_OWN_STEP)):
                drop = client is None  # it is the answer to what made us send that
            if drop and i > start and client is not None:
                client.write(data[start:i])
            if kind == _READY:
                self.status = p[i + 5]
                if owed not in (_OWED_QUERY, _OWED_SYNC):
                    if owed not in (_OWED_OWN_QUERY, _OWED_OWN_SYNC):
                        self._broken("ReadyForQuery that nobody asked for")
                        return
                    self.finished.append(replies.entry())
                    if replies.entry().guards:
                        self.guard = 0
                        if replies.entry().failed is not None:
                            client = None  # what it sent has met a failed transaction, and is its no more
                        else:
                            fresh = True
                            begin = end
                elif self.replaying or (
                    client is not None and client.resets and self.status != _FAILED and replies.pending() == 1
                ):
                    drop = True  # it is to be told when its settings are back
                    if i > start and client is not None:
                        client.write(data[start:i])
                theirs = theirs or not drop or self.replaying
                replies.ready()
                self.copying = False
                self.early_ends = 0
                if replies.kind == _OWED_NONE and self.binding:
                    self.binding.clear()
                ready = True
            elif kind in (_COMPLETE, _EMPTY, _SUSPENDED):
                self.copying = False
                if self.suspects and data.startswith(b"ROLLBACK", i + 5):
                    self.proof = -1
                if owed in (_OWED_EXECUTE, _OWED_OWN_STEP):
                    replies.advance()
                elif owed not in (_OWED_QUERY, _OWED_OWN_QUERY):
                    self._broken(f"a message of type {chr(kind)!r} that nobody asked for")
                    return
            elif kind in (_DESCRIPTION, _NO_DATA):
                if owed == _OWED_DESCRIBE:
                    replies.advance()
                elif owed not in (_OWED_QUERY, _OWED_OWN_QUERY):
                    self._broken(f"a message of type {chr(kind)!r} that nobody asked for")
                    return
            elif kind == _BOUND:
                if owed not in (_OWED_BIND, _OWED_OWN_STEP):
                    self._broken("BindComplete that nobody asked for")
                    return
                if self.binding and owed == _OWED_BIND:
                    del self.binding[0]
                replies.advance()
            elif kind == _PARSED:
                if owed not in (
                    _OWED_PARSE,
                    _OWED_NAMED_PARSE,
                    _OWED_UNNAMED_PARSE,
                    _OWED_OWN_PARSE,
                    _OWED_OWN_BRING,
                ):
                    self._broken("ParseComplete that nobody asked for")
                    return
                if owed != _OWED_PARSE:
                    entry = replies.entry()
                    if entry.statement is not None:
                        entry.statement.proved = True
                replies.advance()
            elif kind == _CLOSED:
                if owed not in (_OWED_CLOSE, _OWED_OWN_CLOSE):
                    self._broken("CloseComplete that nobody asked for")
                    return
                replies.advance()
            elif kind == _ERROR:
                if self._error(data[i + 5 : end], owed, fresh and head) and client is not None:
                    drop = True
                    if i > start:
                        client.write(data[start:i])
                    if self.instead:
                        client.write(self.instead)
                        self.instead = b""
            elif kind == _STATUS:
                self._parameter(data[i + 5 : end])
                if drop and client is not None and owed == _OWED_OWN_QUERY and replies.entry().tells:
                    client.write(data[i:end])
            elif kind == _COPY_IN:
                if owed not in (_OWED_QUERY, _OWED_EXECUTE):
                    self._broken("CopyInResponse that nobody asked for")
                    return
                if client is None:
                    # Nobody is left to send it anything. What was sent ahead, Sync too, it has ignored.
                    self.write(messages.copy_fail("the client has left"))
                    if owed == _OWED_EXECUTE and replies.synced():
                        self.write(messages.SYNC)
                elif self.early_ends:
                    self.early_ends -= 1
                else:
                    self.copying = True
            elif kind not in (_NOTICE, _NOTIFICATION, _FUNCTION_RESULT, _PARAMETERS, _COPY_OUT, _COPY_DONE):
                self._broken(f"a message of type {chr(kind)!r}, which is not of this protocol")
                return
            if drop:
                start = end
            i = end
            while replies.kind >= _OWED_SYNTHETIC:
                if client is not None:
                    if i > start:
                        client.write(data[start:i])
                    start = i
                    client.write(replies.entry().reply)
                replies.advance()
        if i > n:
            self.left = i - n
            self.dropping = start == i
            i = n
        elif i < n:
            self.part = data[i:] if i else data
        if client is not None and start < i:
            if start == 0 and i == n:
                client.write(data)
                client.bytes_out += n
            else:
                client.write(data[start:i])
                client.bytes_out += i - start
        if fresh and i == begin and begin:
            self.answered = False  # nothing but our own
        if ready:
            self._ready(theirs)
            client = self.client
            if client is not None and client.copy_asked and self.copying:
                client.copy_begins()
        elif client is not None and client.copy_asked and (self.copying or replies.kind == _OWED_NONE):
            client.copy_begins()
        elif client is not None and replies.open and replies.kind == _OWED_NONE and self._only_prepared(client):
            self.sync()

    def _only_prepared(self, client: Borrower) -> bool:
        """Statements were prepared and described, and the answers asked for by Flush: nothing of that needs this
        connection any longer."""
        return self.status == _IDLE and not (self.replies.bound or self.skipping or self.left or client.pin)

    def _ready(self, theirs: bool) -> None:
        """After a ReadyForQuery, the client's or only our own: callbacks, then the pool if nothing is owed."""
        if self.finished:
            finished = self.finished
            self.finished = []
            for entry in finished:
                if entry.guards:
                    self.pool.went_first(self, entry.statement, entry.failed)
                elif entry.done is not None:
                    entry.done(entry.failed)
        batch = self.batch
        if theirs or self.replies.kind == _OWED_NONE:
            self.batch = None
        if self.replies.kind == _OWED_NONE:
            if self.quiet is not None and not self.quiet.done():
                self.quiet.set_result(None)
            client = self.client
            if client is not None:
                if self.replaying and batch is not None:
                    self.replaying = False
                    client.repeat(batch)
                else:
                    client.answered(self)
        elif self.client is not None and self.client.order_asked:
            self.client.in_order()
        elif self.cancel_wanted != 0.0:
            self.pool.cancel_now(self)

    def _error(self, body: bytes, owed: int, first: bool) -> bool:
        """An ErrorResponse. Whether the client shall not hear of it.

        :param first: nothing else has come since the lease began
        """
        replies = self.replies
        self.copying = False
        self.failed = True
        self.proof = -1
        self.unparsed = owed == _OWED_QUERY and first and b"\0Rscanner_yyerror\0" in body and b"\0q" not in body
        if b"SFATAL\0" in body or b"SPANIC\0" in body or b"VFATAL\0" in body or b"VPANIC\0" in body:
            self.fatal = body
            return self._last_words(owed, first)
        if owed in (_OWED_NONE, _OWED_QUERY, _OWED_SYNC):
            return False
        if owed in (_OWED_OWN_QUERY, _OWED_OWN_SYNC):
            replies.entry().failed = body
            return True
        client = self.client
        if client is not None and b'"cenote_' in body:
            told = client.in_own_names(self, body)
            if told != body:
                self.instead = messages.message(b"E", told)
        if owed == _OWED_OWN_PARSE and replies.entry().reply and b"\0C42703\0" in body:
            self.instead = replies.entry().reply
        changed = b"C0A000\0" in body and b"RevalidateCachedQuery\0" in body
        bound = self.binding[0] if self.binding and owed == _OWED_BIND else None
        guessed = client.guessed if client is not None and first else None
        if guessed is not None and owed == _OWED_DESCRIBE:
            bound = guessed
        self._undo(replies.discard_to_sync(), owed)
        if replies.kind == _OWED_NONE:
            self.skipping = True
        if replies.dropped_binds:
            del self.binding[: replies.dropped_binds]
            replies.dropped_binds = 0
        if bound is not None:
            unparsed = guessed is bound  # for this client: what it has sent first was left out
            stale = b"\0C42" in body or b"\0CXX" in body or (unparsed and b"\0C22" in body)
            if stale:
                self.pool.retire(bound)  # what it names may have been made anew
            if changed:
                self.pool.plan_changed(bound)
            # The plan is looked at before anything runs, so nothing has been done; and only a client that asked
            # for the description of the rows, or has none yet, will notice that they are others now.
            whole = self.batch is not None and replies.pending() == 1
            if first and whole and ((changed and self.described) or (unparsed and (changed or stale))):
                self.replaying = True
        if self.replaying:
            self.instead = b""
        return self.replaying or self.instead != b""

    def _last_words(self, owed: int, first: bool) -> bool:
        """The server ends the session. Whether the client shall not hear of it in these words: its batch runs on
        another one; or they come in answer to what it has not asked, and it will be told in ours.

        57P01 and 57P05 roll back what was begun, and no command had completed: its answer would have come first.
        """
        fatal = self.fatal or b""
        self.replaying = first and self.batch is not None and (b"C57P01\0" in fatal or b"C57P05\0" in fatal)
        nobodys = owed == _OWED_NONE and self.status == _IDLE
        ours = owed >= _OWED_SWALLOWED and owed not in (_OWED_OWN_PARSE, _OWED_OWN_CLOSE)
        self.told = not (self.replaying or nobodys or ours)
        return not self.told

    def _undo(self, dropped: list[Entry] | None, failed: int) -> None:
        """The server discarded these requests: so does the bookkeeping."""
        client = self.client
        if self.replies.dropped_unnamed:
            self.replies.dropped_unnamed = False
            self.unnamed = None
            if client is not None and failed == _OWED_PARSE:
                client.unnamed = None
        if dropped is None:
            return
        for entry in reversed(dropped):
            if entry.kind == _OWED_NAMED_PARSE:
                self.forget(entry.statement)
                if client is not None:
                    client.undefine(entry.name, entry.statement)
            elif entry.kind == _OWED_UNNAMED_PARSE:
                self.unnamed = None
                # The one that failed has taken the old one with it; those behind it were never begun.
                if client is not None and client.unnamed is entry.name:
                    client.unnamed = (
                        None if entry is dropped[0] and failed == _OWED_UNNAMED_PARSE else entry.before
                    )
            elif entry.kind in (_OWED_OWN_PARSE, _OWED_OWN_BRING):
                if entry.statement is not None:
                    self.forget(entry.statement)
                else:
                    self.unnamed = None
            elif entry.kind == _OWED_OWN_CLOSE:
                if entry.statement is not None:
                    self.know(entry.statement, entry.name)
            elif entry.kind == _OWED_SYNTHETIC:
                if client is not None:
                    client.undefine(entry.name, entry.statement)
            elif entry.kind == _OWED_SYNTHETIC_CLOSE and client is not None:
                client.define(entry.name, entry.statement)

    def _parameter(self, body: bytes) -> None:
        """A ParameterStatus."""
        texts = body.split(b"\0")
        if len(texts) == 3:
            self.parameters[texts[0]] = texts[1]

    def _broken(self, what: str) -> None:
        """The server does not keep to the protocol: this pair ends, nobody else is touched."""
        self.pool.broken(self, ProtocolError(f"the server sent {what}", pool=self.pool.name))

    # -- prepared statements ----------------------------------------------------------------------------------

    def know(self, statement: Statement, name: bytes) -> None:
        """The server has, or will have, this statement under this name."""
        self.known[statement] = name
        self.names[name] = statement
        self.named_at = self.replies.sent

    def forget(self, statement: Statement) -> None:
        """The server does not have it (any more)."""
        name = self.known.pop(statement, None)
        if name is not None:
            self.names.pop(name, None)
            self.named_at = self.replies.sent

    def forget_all(self) -> None:
        """The server has no prepared statement."""
        self.known.clear()
        self.names.clear()
        self.unnamed = None

    # -- own requests -----------------------------------------------------------------------------------------

    def inject(self, sql: bytes, done: Any, rows: list[bytes] | None = None, tells: bool = False) -> None:
        """Send a query of our own; `done(error body or None)` is called at its ReadyForQuery.

        :param rows: is given the body of each DataRow; None: nobody wants them. They are held until they are whole
        :param tells: the client hears of parameters that change
        """
        entry = Entry(_OWED_OWN_QUERY)
        entry.done = done
        entry.rows = rows
        entry.tells = tells
        self.unnamed = None
        self.write(messages.query(sql))
        self.replies.add(entry)

    def convert_first(self, query: bytes, settings: Any) -> None:
        """Send a query that makes this connection carry these settings, right before the client's next batch: if
        it fails, that finds a failed transaction, and does nothing."""
        entry = Entry(_OWED_OWN_QUERY, settings)
        entry.guards = True
        self.unnamed = None
        self.write(query)
        self.replies.add(entry)
        self.guard = self.replies.sent

    def close_statement(self, statement: Statement | None, name: bytes) -> None:
        """Send a Close of our own."""
        if statement is not None:
            self.forget(statement)
        self.write(messages.close_statement(name))
        self.replies.add(Entry(_OWED_OWN_CLOSE, statement, name))

    def discard_sequences(self, name: bytes) -> None:
        """Make `currval` and `lastval` fail; in a batch that has begun, as part of it, by this name.

        A sequence whose values are cached by the session loses those that are left.
        """
        self.sequenced = False
        if not self.replies.open or self.replies.ends():
            self.inject(b"DISCARD SEQUENCES", None)
            return
        self.write(
            messages.parse(name, b"DISCARD SEQUENCES\0\0\0")
            + messages.message(b"B", name + b"\0" + name + b"\0" + bytes(6))
            + messages.message(b"E", name + bytes(5))
            + messages.message(b"C", b"P" + name + b"\0")
        )
        for kind in (OWN_PARSE, OWN_STEP, OWN_STEP, OWN_CLOSE):
            self.replies.add(Entry(kind))
        self.close_statement(None, name)

    def sync(self) -> None:
        """Send a Sync of our own."""
        self.skipping = False
        self.write(messages.SYNC)
        self.replies.add(Entry(_OWED_OWN_SYNC))

    def refuse(self, error: bytes) -> None:
        """Fail the extended batch under way at the server, for a reason of our own: the client hears that."""
        self.write(_FAILING_PARSE)
        self.replies.add(Entry(_OWED_OWN_PARSE, None, b"", error))

    def farewell_sent(self, unfinished: bool) -> None:
        """Say goodbye and send nothing more; in the middle of a message there is no way to say it."""
        if not unfinished:
            self.write(messages.TERMINATE)
        if self.tls is None and self.transport.can_write_eof():
            self.transport.write_eof()
        elif unfinished:
            self.abort()

    def copy_ended(self) -> None:
        """The client has sent CopyDone or CopyFail: the server heeds Sync again."""
        if self.copying:
            self.copying = False
        else:
            self.early_ends += 1

    def rests(self) -> bool:
        """Nothing is owed, nothing half said, no transaction open."""
        return (
            self.replies.kind == _OWED_NONE
            and self.status == _IDLE
            and not (self.replies.open or self.left or self.part)
        )

    # -- the transport ----------------------------------------------------------------------------------------

    def gone(self, error: Exception | None) -> None:
        if self.quiet is not None and not self.quiet.done():
            self.quiet.set_result(None)
        if self.farewell is not None and not self.farewell.done():
            self.farewell.set_result(None)
        self.pool.server_gone(self)

    def full(self) -> None:
        if self.client is not None:
            self.client.mute()

    def drained(self) -> None:
        if self.client is not None:
            self.client.hear()
