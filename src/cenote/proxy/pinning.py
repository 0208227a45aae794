"""Who may keep a server connection past its transaction, and the ledger of what texts have done.

A pin has a reason, and there are at most `max_pinned`: beyond that, the statement that would pin is refused.
"""

from __future__ import annotations

from typing import Any

from cenote.proxy.listener import Listener
from cenote.proxy.reading import fingerprint_of
from cenote.proxy.roles import Lender
from cenote.reasons import ADVICE, TEXT, Pinned
from cenote.sql import touch
from cenote.wire import messages

# Plain strings: a compiled attribute that is a `str` takes no member of an enum.
_PIN_WORDS = {
    touch.SETTINGS: str(Pinned.SETTINGS),
    touch.ROLE: str(Pinned.ROLE),
    touch.TEMP: str(Pinned.TEMPORARY_OBJECTS),
    touch.ADVISORY: str(Pinned.ADVISORY_LOCKS),
    touch.LISTEN: str(Pinned.LISTEN),
    touch.CURSOR: str(Pinned.HELD_CURSORS),
    touch.PREPARED: str(Pinned.PREPARED_BY_SQL),
    touch.SEQUENCE: str(Pinned.SEQUENCES),
    touch.PLANS: str(Pinned.PLANS),
    touch.LOAD: str(Pinned.PROCESS_STATE),
    touch.UNKNOWN: str(Pinned.UNKNOWN),
}
_MAX_LEDGER = 1_000


class Pinning(Lender):
    """A lender of connections that some keep.

    pinned: how many do now; pins: how often that happened, by reason; refuses_pins: nobody may
    ledger: how often which kind of text pinned, set or was refused; unlisted: what there was no more room for
    listener: the connection that listens for all, if there is one, is kept, too
    """

    def __init__(self, options: Any) -> None:
        super().__init__()
        self.options = options
        self.machine: Any = None
        self.works: Any = None
        self.max_pinned = options.max_pinned or max(1, options.max_size - 1)
        self.refuses_pins = options.unsafe == "refuse"
        self.pins: dict[str, int] = {}
        self.pinned = 0
        self.ledger: dict[tuple[str, bytes], int] = {}
        self.unlisted = 0
        self.listener = Listener(self)

    def pin_reason(self, touches: int) -> str:
        """The word for the first kind of state that is touched, the gravest first."""
        for flag in (touch.UNKNOWN, touch.LOAD, touch.ROLE, *_PIN_WORDS):
            if touches & flag:
                return _PIN_WORDS[flag]
        return str(Pinned.UNKNOWN)

    def pinned_by(self, client: Any, reason: str) -> None:
        """A client keeps its connection from now on."""
        self.pins[reason] = self.pins.get(reason, 0) + 1
        self.pinned += 1
        if reason != Pinned.SESSION_MODE:
            self.note(f"pinned: {reason}", client.text)
            self.works.log_pin(client, reason)

    def pins_none(self, touches: int) -> bool:
        """Whether one more client may not keep its connection for this."""
        shared = self.listener.server is not None
        room = self.pinned + shared < self.max_pinned
        if touches == touch.LISTEN and self.machine.max_size > 1 and (shared or room):
            return False  # the connection that all listeners share is kept, if any
        return bool(self.refuses_pins or not room)

    def refused_pin(self, reason: str, text: bytes, severity: str = "ERROR") -> bytes:
        """The error that says so."""
        self.note(f"refused: {reason}", text)
        return messages.error(severity, "53300", self._no_pin(reason), hint=ADVICE.get(reason, ""))

    def keeps(self, client: Any, server: Any, reason: str, flags: int) -> bool:
        """A client has what cannot be carried, and it is too late to refuse the text that made it: it keeps the
        connection, or, where no more may, loses it. Whether it goes on."""
        if client.pin or not self.pins_none(flags):
            client.keep(server, reason, flags)
            return True
        client.ties |= flags
        error = self.refused_pin(reason, client.text, "FATAL")
        self.client_gone(client)
        client.refuse(error)
        return False

    def refusing(self, touches: int, text: bytes) -> bytes:
        """A query that fails with that error, in place of one that would pin: in a transaction it fails, too."""
        reason = self.pin_reason(touches)
        self.note(f"refused: {reason}", text)
        quoted = [
            part.replace("'", "''").replace("$", "") for part in (self._no_pin(reason), ADVICE.get(reason, ""))
        ]
        return messages.query(
            "DO $cenote$BEGIN RAISE EXCEPTION USING ERRCODE = '53300', "
            f"MESSAGE = '{quoted[0]}', HINT = '{quoted[1]}';END$cenote$"
        )

    def _no_pin(self, reason: str) -> str:
        why = TEXT["pinned"][reason]
        if self.refuses_pins:
            return (
                f'cenote: pool "{self.name}" refuses what ties a client to a connection (unsafe = refuse): {why}'
            )
        return (
            f'cenote: pool "{self.name}": {self.pinned} clients keep a connection of their own already, '
            f"{'one is shared by all who listen, ' if self.listener.server is not None else ''}and"
            f" max_pinned is {self.max_pinned}: {why}"
        )

    def note(self, what: str, text: bytes) -> None:
        """Write into the ledger that this kind of text has had this consequence. O(text)"""
        key = (what, fingerprint_of(text.partition(b"\0")[0]))
        if key in self.ledger or len(self.ledger) < _MAX_LEDGER:
            self.ledger[key] = self.ledger.get(key, 0) + 1
        else:
            self.unlisted += 1
