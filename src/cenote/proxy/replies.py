"""The reply queue: what a server connection still owes, request by request, and what to do with each answer.

One byte per request sent, in order: what kind of answer is due. Some have an `Entry` beside it, because their
answer means more than forwarding it: what we injected is swallowed, what we left out is answered here in its
place, and what the bookkeeping took for granted is undone when the server discards it. A connection is at rest
when this queue is empty: that is the account that has to add up before it is handed on.

Source: PostgreSQL documentation, "Message Flow". After an error in the extended protocol the server discards
everything up to Sync, and answers nothing of it.
"""

from __future__ import annotations

from typing import Any

NONE = 0
QUERY = 1  # Query, FunctionCall: many messages, then ReadyForQuery
SYNC = 2  # ReadyForQuery
PARSE = 3  # of the unnamed statement when nothing else is owed, or of a raw client
BIND = 4
DESCRIBE = 5
EXECUTE = 6
CLOSE = 7
NAMED_PARSE = 8  # from here on with an entry
UNNAMED_PARSE = 9  # behind something that may fail
SWALLOWED = 16  # from here on the client never hears of the answer
OWN_PARSE = 16
OWN_CLOSE = 17
OWN_BRING = 20  # a Parse that may fail: nobody needs it at once
OWN_STEP = 21  # a Bind or an Execute in the midst of the client's batch
OWN_QUERY = 18
OWN_SYNC = 19
SYNTHETIC = 32  # nothing was sent for a Parse: `reply` is the answer
SYNTHETIC_CLOSE = 33  # nor for a Close

# The same as C sees them.
_NONE, _QUERY, _SYNC, _PARSE, _NAMED_PARSE, _OWN_SYNC = NONE, QUERY, SYNC, PARSE, NAMED_PARSE, OWN_SYNC
_OWN_QUERY, _OWN_BRING, _BIND, _SYNTHETIC = OWN_QUERY, OWN_BRING, BIND, SYNTHETIC
_OWN_STEP = OWN_STEP


class Entry:
    """A request whose answer means more than forwarding it.

    statement, name: what a Parse defines; for the answer to a Close, what it took away
    before: what the unnamed statement was before this one
    reply: what the client gets when its turn comes (SYNTHETIC), or instead of the error (OWN_PARSE)
    done: called with the body of the error, None for success (OWN_QUERY); failed: that body
    rows: is given the rows (OWN_QUERY); None: they are dropped; tells: the client hears of ParameterStatus
    guards: it makes the connection carry the settings in `statement`, and the client's batch went right behind
    """

    def __init__(self, kind: int, statement: Any = None, name: bytes = b"", reply: bytes = b"") -> None:
        self.kind = kind
        self.statement = statement
        self.name = name
        self.reply = reply
        self.before: bytes | None = None
        self.done: Any = None
        self.failed: bytes | None = None
        self.rows: Any = None
        self.tells = False
        self.guards = False


class ReplyQueue:
    """What is owed, oldest first. `kind` is the first one's, NONE when nothing is owed.

    open: the server may be inside an extended batch: only ReadyForQuery ends that
    bound: that batch did more than prepare and describe statements
    sent, done: batches ended by us (Sync, Query), and by the server (ReadyForQuery)
    dropped_unnamed, dropped_binds: a Parse without an entry was discarded; and so many Binds
    """

    def __init__(self) -> None:
        self.kind = NONE
        self.open = False
        self.bound = False
        self.sent = 0
        self.done = 0
        self.dropped_unnamed = False
        self.dropped_binds = 0
        # The first is in `kind`; these are behind it, from `next` on. What was answered is dropped now and then.
        self.behind = bytearray()
        self.next = 0
        # In the order of the kinds that have one, the first one's included.
        self.entries: list[Entry] = []

    def expect(self, kind: int) -> None:
        """A request was sent whose answer is forwarded."""
        if kind >= _PARSE:
            self.open = True
            if kind >= _BIND:
                self.bound = True
        else:
            self.sent += 1
        if self.kind == _NONE:
            self.kind = kind
        else:
            self.behind.append(kind)

    def add(self, entry: Entry) -> None:
        """A request with an entry of its own was sent, or answered here."""
        self.entries.append(entry)
        kind = entry.kind
        if kind < _OWN_QUERY or kind in (_OWN_BRING, _OWN_STEP):
            self.open = True
        elif kind < _SYNTHETIC:
            self.sent += 1
        if self.kind == _NONE:
            self.kind = kind
        else:
            self.behind.append(kind)

    def entry(self) -> Entry:
        """The entry of the first, which has one."""
        return self.entries[0]

    def advance(self) -> None:
        """The first was answered in full."""
        if self.kind >= _NAMED_PARSE:
            del self.entries[0]
        at = self.next
        behind = self.behind
        if at == len(behind):
            self.kind = _NONE
            return
        self.kind = behind[at]
        at += 1
        if at >= 4096:
            del behind[:at]
            at = 0
        self.next = at

    def ready(self) -> None:
        """The server said ReadyForQuery: the first is answered, and its batch is over."""
        self.advance()
        self.done += 1
        self.open = self.kind != _NONE
        self.bound = self.open

    def discard_to_sync(self) -> list[Entry] | None:
        """The server failed inside an extended batch: drop what it will not answer.

        Returns the dropped entries, oldest first (None: there were none), for their bookkeeping to be undone.
        Afterwards the first is a Sync, or the queue is empty.
        """
        dropped = None
        while self.kind not in (_NONE, _SYNC, _OWN_SYNC):
            if self.kind >= _NAMED_PARSE:
                if dropped is None:
                    dropped = []
                dropped.append(self.entries[0])
            elif self.kind == _PARSE:
                self.dropped_unnamed = True
            elif self.kind == _BIND:
                self.dropped_binds += 1
            elif self.kind == _QUERY:
                self.done += 1  # it will never be answered
            self.advance()
        return dropped

    def uncertain(self, at: int) -> bool:
        """Whether what was sent in batch number `at` may yet be discarded, without what is sent now."""
        return self.done <= at < self.sent

    def synced(self) -> bool:
        """A Sync has been sent behind the first. O(owed)"""
        return _SYNC in self.behind[self.next :] or _OWN_SYNC in self.behind[self.next :]

    def ends(self) -> bool:
        """Something is owed, and the last of it is a ReadyForQuery."""
        last = self.behind[-1] if self.next < len(self.behind) else self.kind
        return last in (_QUERY, _SYNC, _OWN_QUERY, _OWN_SYNC)

    def only_ours(self) -> bool:
        """Nothing is owed, or the answer to one query of our own."""
        return self.kind == _NONE or (self.kind == _OWN_QUERY and self.next == len(self.behind))

    def pending(self) -> int:
        """How many requests are owed an answer. O(1)"""
        return 0 if self.kind == _NONE else 1 + len(self.behind) - self.next
