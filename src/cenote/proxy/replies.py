"""The reply queue: what a server connection still owes, request by request, and what to do with each answer.

One entry per request sent, in order. Most are plain numbers (forward the answer); an `Entry` is for requests
whose answer means more: what we injected is swallowed, what we left out is answered here in its place, and
what the bookkeeping took for granted is undone when the server discards it. A connection is at rest when this
queue is empty: that is the account that has to add up before it is handed on.

Source: PostgreSQL documentation, "Message Flow". After an error in the extended protocol the server discards
everything up to Sync, and answers nothing of it.
"""

from __future__ import annotations

from typing import Any

NONE = 0
QUERY = 1  # Query, FunctionCall: many messages, then ReadyForQuery
SYNC = 2  # ReadyForQuery
PARSE = 3
BIND = 4
DESCRIBE = 5
EXECUTE = 6
CLOSE = 7
SWALLOWED = 16  # from here on the client never hears of the answer
OWN_PARSE = 16
OWN_CLOSE = 17
OWN_QUERY = 18
OWN_SYNC = 19
SYNTHETIC = 32  # nothing was sent for a Parse: `reply` is the answer
SYNTHETIC_CLOSE = 33  # nor for a Close

# The same as C sees them.
_NONE, _SYNC, _PARSE, _OWN_PARSE, _OWN_CLOSE, _OWN_SYNC = NONE, SYNC, PARSE, OWN_PARSE, OWN_CLOSE, OWN_SYNC


class Entry:
    """A request whose answer means more than forwarding it.

    reply: what the client gets when its turn comes (SYNTHETIC)
    statement, name: what a Parse defines; for a SYNTHETIC answer to Close, what it took away
    known: it was sent, and its success makes the statement known to the server
    done: called with the body of the error, None for success (OWN_QUERY)
    """

    def __init__(self, kind: int, statement: Any = None, name: bytes = b"", reply: bytes = b"") -> None:
        self.kind = kind
        self.statement = statement
        self.name = name
        self.reply = reply
        self.done: Any = None
        self.failed: bytes | None = None


class ReplyQueue:
    """What is owed, oldest first. `kind` and `entry` describe the first."""

    def __init__(self) -> None:
        self.items: list[Any] = []
        self.first = 0
        self.kind = _NONE
        self.entry: Any = None
        self.open = False  # the server may be inside an extended batch: only ReadyForQuery ends that
        self.dropped_unnamed = False  # a Parse without entry, so of the unnamed statement, was discarded

    def expect(self, kind: int) -> None:
        """A request was sent whose answer is forwarded."""
        self.items.append(kind)
        if kind >= _PARSE:
            self.open = True
        if self.kind == _NONE:
            self.kind = kind

    def add(self, entry: Entry) -> None:
        """A request with an entry of its own was sent, or answered here."""
        self.items.append(entry)
        if entry.kind in (_PARSE, _OWN_PARSE, _OWN_CLOSE):
            self.open = True
        if self.kind == _NONE:
            self.kind = entry.kind
            self.entry = entry

    def advance(self) -> None:
        """The first was answered in full."""
        first = self.first + 1
        self.entry = None
        if first == len(self.items):
            self.items.clear()
            self.first = 0
            self.kind = _NONE
            return
        if first >= 256:  # a long pipeline that never empties
            del self.items[:first]
            first = 0
        self.first = first
        item = self.items[first]
        if isinstance(item, Entry):
            self.entry = item
            self.kind = item.kind
        else:
            self.kind = item

    def discard_to_sync(self) -> list[Entry] | None:
        """The server failed inside an extended batch: drop what it will not answer.

        Returns the dropped entries, oldest first (None: there were none), for their bookkeeping to be undone.
        Afterwards the first is a Sync, or the queue is empty.
        """
        dropped = None
        while self.kind not in (_NONE, _SYNC, _OWN_SYNC):
            if self.entry is not None:
                if dropped is None:
                    dropped = []
                dropped.append(self.entry)
            elif self.kind == _PARSE:
                self.dropped_unnamed = True
            self.advance()
        return dropped

    def ready(self) -> None:
        """The server said ReadyForQuery: the first is answered, and its batch is over."""
        self.advance()
        self.open = self.kind != _NONE

    def pending(self) -> int:
        """How many requests are owed an answer. O(1)"""
        return len(self.items) - self.first
