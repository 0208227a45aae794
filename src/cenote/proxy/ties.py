"""What a client's texts do to its session: noted before they run, so that the server is asked afterwards; and why
a client keeps its server connection.

A text only says what it may touch (`Reading`). Nothing here waits for an answer: what came of it is asked in
`asking.py` and settled by the pool.
"""

from __future__ import annotations

from time import monotonic

from cenote.proxy import kinds
from cenote.proxy.naming import Named
from cenote.proxy.prepared import Statement
from cenote.proxy.reading import Reading, bound, bound_names, executed, nulled
from cenote.proxy.replies import NONE
from cenote.proxy.server import ServerConnection
from cenote.sql import touch
from cenote.wire import messages

# The same as C sees them.
_OWED_NONE = NONE
_BIND, _EXECUTE, _DESCRIBE, _SYNC, _FLUSH = kinds.BIND, kinds.EXECUTE, kinds.DESCRIBE, kinds.SYNC, kinds.FLUSH
_PREPARED, _SEQUENCE, _UNKNOWN, _LOAD = touch.PREPARED, touch.SEQUENCE, touch.UNKNOWN, touch.LOAD
_SETTINGS, _TEMP = touch.SETTINGS, touch.TEMP
_IDLE, _FAILED = 0x49, 0x45  # I and E, as a transaction status
_MAX_HINTS = 256


class Tied(Named):
    """A borrower whose texts are looked at for what they may leave in its session.

    held: what has come while its input waits
    customs: the custom settings it may have set; builtin: it may have set others since the server was asked
    text: the text that touched something; pinned_at: since when it keeps its connection
    clearing: what the text under way brings back to nothing, and nothing else; executed: if it is bound, it runs
    copies: its statements may make the server read CopyData; copy_portals: those of its portals that do
    """

    def __init__(self) -> None:
        super().__init__()
        self.held = b""
        self.customs: set[bytes] | None = None
        self.builtin = False
        self.text = b""
        self.clearing = 0
        self.executed = False
        self.pinned_at = 0.0
        self.copies = False
        self.copy_portals: set[bytes] | None = None

    def beware(self, server: ServerConnection, reading: Reading, data: bytes, i: int, end: int) -> bool:
        """A text that may touch something is about to run. Whether it may go on now."""
        touches = reading.touches
        at_rest = server.replies.only_ours() and not server.replies.open
        if (
            touches
            and touches & ~reading.clears == 0
            and at_rest
            and not self.raw
            and (server.status == _IDLE or touches == _PREPARED)
            # DEALLOCATE ALL is not undone by a roll-back, what stands beside it in a text may be.
            and (touches == _PREPARED or not touches & _PREPARED or data.find(b";", i + 5, end - 2) < 0)
        ):
            self.clearing = touches
            self.executed = True
            self._mind_base(reading.resets)
            return True
        if touches & _PREPARED and not self.may_prepare(server, data, i):
            return False
        self._note(server, reading, data, i, end)
        return True

    def beware_bound(
        self, server: ServerConnection, reading: Reading, data: bytes, i: int, j: int, end: int
    ) -> None:
        """A statement that is more than harmless is about to be bound, to the portal whose name ends at `j`."""
        self.fresh_sequences(server, reading)
        touches = reading.touches
        if (
            touches
            and touches & ~reading.clears == 0
            and not self.raw
            and server.status == _IDLE
            and not server.replies.bound
            and (server.replies.kind == _OWED_NONE or server.replies.pending() == 1)
        ):
            self.clearing = touches
            self.executed = False
            self._mind_base(reading.resets)
        elif touches or reading.resets:
            self._note(server, reading, data, i, end)
        if reading.copies:
            if self.copy_portals is None:
                self.copy_portals = set()
            self.copy_portals.add(data[i + 5 : j])

    def suspect(self, server: ServerConnection, reading: Reading, data: bytes, i: int, end: int) -> None:
        """What is about to run does more than it shows: if it is new, or known to touch something, the server will
        be asked."""
        if self.settings is not None and self.settings.temporary:
            self.touched |= _TEMP
        if not self.pool.audits:
            return
        if reading.defines:
            server.defines = server.audit = True
        known = self.pool.suspect(server, reading.fingerprint) and not self.raw
        if reading.calls and (known or server.audit):
            names = {*reading.said, *(bound_names(data[i + 5 : end]) if data[i] == _BIND else ())}
            if len(server.hints) < _MAX_HINTS:
                server.hints |= names
            if known:
                self.customs = (self.customs or set()) | names
        if known:
            self.touched |= _UNKNOWN
            self.builtin = True
            self.apart = True

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
                found, computed, sets = executed(self.settings.prepared, self.text.partition(b"\0")[0])
                self.customs = (self.customs or set()) | found
                self.apart = self.apart or sets
                if computed:
                    self.ties |= _UNKNOWN  # it is kept when the server was asked for the rest
            untold = reading.untold
            if reading.names_at:
                # In a Query there are no parameters, and it fails.
                names = bound(data[i + 5 : end], reading.names_at) if data[i] == _BIND else []
                untold = untold or names is None
                self.customs = (self.customs or set()).union(name for name in names or () if b"." in name)
            if untold:
                self.ties |= _UNKNOWN
        if reading.resets:
            self._mind_base(reading.resets)
        if touches & _LOAD:
            self.keep(server, self.pool.pin_reason(_LOAD), _LOAD)
        if reading.ties & _SEQUENCE:
            self.keep(server, self.pool.pin_reason(_SEQUENCE), _SEQUENCE)
        if self.ear is not None and reading.unlistens:
            self.ear.beware(server, reading)

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

    def mind_nulls(self, reading: Reading, data: bytes, i: int, end: int) -> None:
        """A statement is about to be bound in which a NULL takes a setting back."""
        if self.pool.base_items or (self.startup is not None and self.startup.items):
            resets = nulled(data[i + 5 : end], reading.nulls_at)
            if resets:
                self._mind_base(tuple(resets))

    def bound_to(self, data: bytes, i: int) -> tuple[bytes, Statement | None]:
        """The name of the statement that a Bind is of, empty for the unnamed one; and what it stands for."""
        at = data.find(b"\0", i + 5) + 1
        name = data[at : data.find(b"\0", at)]
        return name, self.statements.get(name) if name and self.statements is not None else None

    def _text_bound(self, data: bytes, i: int) -> bytes:
        """The text of the statement that a Bind names, as far as the ledger needs it."""
        _, statement = self.bound_to(data, i)
        tail: bytes = statement.tail if statement is not None else self.unnamed or b""
        return tail[:1024].partition(b"\0")[0]

    def fresh_sequences(self, server: ServerConnection, reading: Reading) -> None:
        """What reads `currval` or `lastval` shall fail rather than hear of another client's sequences; and what
        `nextval` leaves is all there is for whom it pins."""
        if not (reading.reads | reading.ties) & _SEQUENCE:
            return
        if reading.reads & _SEQUENCE:
            self.pool.minds_sequences = True
        if server.sequenced and server.status != _FAILED:
            self.pool.tick += 1
            server.discard_sequences(b"cenote_%x" % self.pool.tick)

    def may_prepare(self, server: ServerConnection, data: bytes, i: int) -> bool:
        """PREPARE, EXECUTE or DEALLOCATE by SQL, which goes by the server's names: they are made this client's.
        Whether the message may go on now; if not, it is held until it is known what came of those before."""
        if self.raw or server.taken_at == server.replies.sent:
            return True
        if not server.replies.only_ours():
            self.hold(data[i:] if i else data)
            if server.replies.open:
                server.write(messages.FLUSH)
                self.copy_asked = True
            else:
                self.order_asked = True
            return False
        self.take_names(server)
        server.taken_at = server.replies.sent
        return True

    def clears_alone(self, server: ServerConnection, data: bytes, kind: int, i: int) -> bool:
        """A statement that clears state was bound in this batch. Whether this message changes nothing about that;
        if not, what came of it is settled first, for which the message may be held."""
        if kind == _EXECUTE and not self.executed:
            self.executed = True
            return True
        if kind in (_DESCRIBE, _SYNC, _FLUSH):
            return True
        if server.replies.kind == _OWED_NONE:
            self.cleared_within(server)
            return True
        self.hold(data[i:] if i else data)
        server.write(messages.FLUSH)
        self.copy_asked = True
        return False

    def cleared_within(self, server: ServerConnection) -> None:
        """A statement that clears was answered inside of its batch: what no roll-back brings back is gone, and the
        server is asked for the rest at the end."""
        kinds, self.clearing = self.clearing, 0
        if self.executed and not server.failed:
            self.pool.forgotten(self, server, kinds)
            self.touched |= kinds & ~(_PREPARED | _SEQUENCE)
            self.builtin = self.builtin or kinds & _SETTINGS != 0

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
            if server.sequenced:
                server.discard_sequences(b"")  # from now on nobody sees what it asks
            self.take_names(server)
            self.raw = True
            self.copies = True  # what it prepared before is not looked at again

    def hold(self, data: bytes) -> None:
        self.holding = True
        self.held = data
