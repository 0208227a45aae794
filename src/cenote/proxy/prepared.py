"""Prepared statements as the proxy knows them: what a client called by a name, wherever it has to be prepared.

A statement is its text, the types of its parameters, and the settings that change what a text means. Clients
with the same three share one; each server connection has it under a name of its own choosing, the client's
whenever that is free there, so that most messages pass unchanged.
"""

from __future__ import annotations

from cenote.proxy.reading import MEANINGLESS, Reading


class Statement:
    """What was prepared. Shared by all who prepare the same; compared by identity.

    tail: text, zero, number of parameter types, types: all of Parse behind the name
    meaning: of the settings under which it is prepared; own: those nobody could tell, so one client has it alone
    reading: what it may touch
    used: when it was last bound, on the pool's own counter
    proved: a server has parsed it
    changed: its rows are others now than when it was prepared
    """

    def __init__(self, tail: bytes, reading: Reading, meaning: object = None, own: bool = False) -> None:
        self.tail = tail
        self.meaning = meaning
        self.own = own
        self.reading = reading
        self.used = 0
        self.proved = False
        self.changed = False


def meaning(items: tuple[tuple[bytes, bytes], ...]) -> object:
    """The part of a client's settings that changes what a text means: a key, None for the base state."""
    kept = tuple(item for item in items if MEANINGLESS.fullmatch(item[0]) is None)
    return kept or None
