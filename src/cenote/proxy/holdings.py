"""What a session holds that ties it to its connection, as far as its texts tell: names and counts, no questions.

A dry run sends the server nothing of its own, so it cannot know what became of a text: one that failed or was
rolled back counts as if it had not, and what ends without a text of its own (a table dropped with its schema) is
held to the end. An ending that names what it ends is believed. The result is an upper bound for most programs.
"""

from __future__ import annotations

import re

from cenote.proxy.reading import clearing
from cenote.sql import touch

_NAME = rb'("[^"]*"|[\w.$]+)'
# By kind: how a text makes something with a name, and how it ends it.
_MAKES = {
    touch.LISTEN: re.compile(rb"\blisten\s+" + _NAME, re.IGNORECASE),
    touch.CURSOR: re.compile(rb"\bdeclare\s+" + _NAME + rb"[^;]*?\bwith\s+hold\b", re.IGNORECASE),
    touch.TEMP: re.compile(
        rb"\bcreate\s+(?:local\s+|global\s+)?temp(?:orary)?\s+(?:table|sequence|(?:recursive\s+)?view)\s+"
        rb"(?:if\s+not\s+exists\s+)?" + _NAME,
        re.IGNORECASE,
    ),
}
_ENDS = {
    touch.LISTEN: re.compile(rb"\bunlisten\s+" + _NAME + rb"()", re.IGNORECASE),
    touch.CURSOR: re.compile(rb"\bclose\s+" + _NAME + rb"()", re.IGNORECASE),
    touch.TEMP: re.compile(
        rb"\bdrop\s+(?:table|sequence|view)\s+(?:if\s+exists\s+)?" + _NAME + rb"((?:\s*,\s*" + _NAME + rb")*)",
        re.IGNORECASE,
    ),
}
_ANY_NAME = re.compile(_NAME)
_LOCKS = re.compile(rb"\bpg_(?:try_)?advisory_lock(?:_shared)?\s*\(", re.IGNORECASE)
_UNLOCKS = re.compile(rb"\bpg_advisory_unlock(?:_shared)?\s*\(", re.IGNORECASE)
_MAY_END = re.compile(rb"\b(?:unlisten|close|drop|pg_advisory_unlock\w*)\b", re.IGNORECASE)
_MAX_NAMES = 256  # of one kind; beyond that only what ends all of the kind ends it
_UNNAMED = b""


def may_end(text: bytes) -> bool:
    """Whether a text may end something that others have begun. O(text)"""
    return _MAY_END.search(text) is not None


class Holdings:
    """What one session holds.

    ties: the kinds of state it has now, flags of `cenote.sql.touch`
    """

    __slots__ = ("_locks", "_names", "ties")

    def __init__(self) -> None:
        self.ties = 0
        self._names: dict[int, set[bytes]] = {}
        self._locks = 0

    def ran(self, kinds: int, text: bytes) -> int:
        """A text ran that may leave these kinds of state, and end others; those that it may have begun. O(text)"""
        untold, begun = kinds, 0
        for statement in text.split(b";"):
            cleared = clearing(statement.decode("latin-1"))
            if cleared:
                self.clear(cleared)
                untold &= ~cleared
                continue
            begun |= self._begin(kinds, statement)
            # UNLISTEN touches what LISTEN does; to drop a table touches nothing.
            untold &= ~(self._end(statement) & touch.LISTEN)
        for kind in touch.WORDS:
            if untold & ~begun & kind:
                self._names.setdefault(kind, set()).add(_UNNAMED)
                self.ties |= kind
        return begun | untold

    def clear(self, kinds: int) -> None:
        """Nothing of these kinds is left."""
        self.ties &= ~kinds
        for kind in list(self._names):
            if kinds & kind:
                del self._names[kind]
        if kinds & touch.ADVISORY:
            self._locks = 0

    def _begin(self, kinds: int, statement: bytes) -> int:
        """Note what a statement begins; the kinds that it names."""
        named = 0
        for kind, makes in _MAKES.items():
            for found in makes.findall(statement) if kinds & kind else ():
                named |= kind
                names = self._names.setdefault(kind, set())
                names.add(_folded(found) if len(names) < _MAX_NAMES else _UNNAMED)
        if kinds & touch.ADVISORY:
            count = len(_LOCKS.findall(statement))
            self._locks += count
            named |= touch.ADVISORY if count else 0
        self.ties |= named
        return named

    def _end(self, statement: bytes) -> int:
        """Note what a statement ends; the kinds of which it ends some."""
        ended = 0
        for kind, ends in _ENDS.items():
            names = self._names.get(kind)
            for found in ends.finditer(statement):
                ended |= kind
                if names is not None:
                    names.difference_update(map(_folded, _ANY_NAME.findall(found[1] + b"," + (found[2] or b""))))
            if names is not None and not names:
                self.clear(kind)
        if self._locks:
            self._locks -= len(_UNLOCKS.findall(statement))
            if self._locks <= 0 and not self._names.get(touch.ADVISORY):
                self.clear(touch.ADVISORY)
        return ended


def _folded(name: bytes) -> bytes:
    """As the server has it: without its schema, in lower case unless it is quoted."""
    return name[1:-1] if name[:1] == b'"' else name.rpartition(b".")[2].lower()
