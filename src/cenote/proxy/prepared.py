"""Prepared statements as the proxy knows them: what a client called by a name, wherever it has to be prepared.

A statement is its text, the types of its parameters, and the settings that change what a text means. Clients
with the same three share one; each server connection has it under a name of its own choosing, the client's
whenever that is free there, so that most messages pass unchanged.
"""

from __future__ import annotations

from cenote.sql import touch
from cenote.sql.classify import classify

# Settings that cannot change the meaning of a text.
_MEANINGLESS = frozenset((b"application_name", b"client_min_messages", b"extra_float_digits", b"bytea_output"))


class Statement:
    """What was prepared. Shared by all who prepare the same; compared by identity.

    tail: text, zero, number of parameter types, types: all of Parse behind the name
    reading: what it may touch
    used: when it was last bound, on the pool's own counter
    proved: a server has parsed it
    changed: its rows are others now than when it was prepared
    """

    def __init__(self, tail: bytes, reading: Reading) -> None:
        self.tail = tail
        self.reading = reading
        self.used = 0
        self.proved = False
        self.changed = False


class Reading:
    """What a text may do, as the proxy asks: the flags, and whether it is COPY or clears state only."""

    def __init__(self, touches: int, copies: bool, reads: int, clears: int) -> None:
        self.touches = touches
        self.copies = copies
        self.reads = reads
        self.clears = clears


HARMLESS = Reading(0, False, 0, 0)


def read(text: bytes) -> Reading:
    """What running `text` may touch. O(1) for what was read before, O(text) else.

    Plain texts need not come here: see `cenote.sql.plain`.

    Bytes are read as Latin-1: in every encoding a server may have, and in UTF-8, a byte below 128 is the ASCII
    character. The client encodings where it may be half of a character are refused at log-in time.
    """
    reading = _readings.get(text)
    if reading is None:
        reading = _read(text)
        if len(_readings) >= _MAX_READINGS:
            _readings.clear()
        if len(text) <= _MAX_TEXT:
            _readings[text] = reading
    return reading


_MAX_READINGS, _MAX_TEXT = 4096, 16_384
_readings: dict[bytes, Reading] = {}


def _read(text: bytes) -> Reading:
    latin = text.decode("latin-1")
    verdict = classify(latin)
    # EXECUTE needs the names to be the client's, as PREPARE does.
    touches = verdict.touches | verdict.reads & touch.PREPARED
    clears = clearing(latin) if touches else 0
    copies = may_copy(text)
    if not (touches or copies or verdict.reads & touch.SEQUENCE):
        return HARMLESS
    return Reading(touches, copies, verdict.reads, clears)


def may_copy(text: bytes) -> bool:
    """Whether running this may make the server read CopyData. O(text)"""
    small = text.lower()
    return b"stdin" in small and b"copy" in small


_CLEARS = {
    "RESET": touch.SETTINGS,
    "DISCARD": touch.DISCARDED,
    "UNLISTEN": touch.LISTEN,
    "CLOSE": touch.CURSOR,
    "DEALLOCATE": touch.PREPARED,
    "SELECT": touch.ADVISORY,
}


def clearing(text: str) -> int:
    """The kinds of state that this text brings back to nothing, if it does nothing else; 0 for other texts.

    Only the forms that clear all of a kind count: they are what drivers send on giving a connection back.
    """
    cleared = 0
    for statement in text.split(";"):
        words = tuple(statement.upper().replace("PG_CATALOG.", "").split())
        if words:
            kind = _CLEARS.get(words[0], 0) if words in _CLEARING else 0
            if not kind:
                return 0
            cleared |= kind
    return cleared


_CLEARING = frozenset(
    (
        ("RESET", "ALL"),
        ("DISCARD", "ALL"),
        ("UNLISTEN", "*"),
        ("CLOSE", "ALL"),
        ("DEALLOCATE", "ALL"),
        ("DEALLOCATE", "PREPARE", "ALL"),
        ("SELECT", "PG_ADVISORY_UNLOCK_ALL()"),
    )
)


def meaning(items: tuple[tuple[bytes, bytes], ...]) -> object:
    """The part of a client's settings that changes what a text means: a key, None for the base state."""
    kept = tuple(item for item in items if item[0] not in _MEANINGLESS)
    return kept or None
