"""The dry run: in session mode, what transaction mode would have carried, asked about, pinned or refused.

Nothing a client sends is changed and the server is asked nothing: each client has its connection as ever, and its
texts are read on their way. A text says what it may touch; what came of it only the server knows, and it is not
asked, because a question of ours in a session that is the client's own would end its unnamed statement. So pins
are an upper bound as far as `holdings.py` goes, and what a text hides (triggers, bodies of functions) is not seen.

It decides nothing: what is counted here is read by SHOW LEDGER, SHOW PINS and SHOW OBSERVED.
"""

from __future__ import annotations

import re
from time import monotonic
from typing import Any

from cenote.proxy import kinds
from cenote.proxy.holdings import Holdings, may_end
from cenote.proxy.reading import HARMLESS, Reading, bound, read
from cenote.proxy.requests import LARGE_OBJECT_CALLS
from cenote.proxy.settings import MAX_PREPARED_BY_SQL
from cenote.reasons import Pinned
from cenote.sql import touch
from cenote.sql.plain import plain

_QUERY, _PARSE, _BIND, _DESCRIBE, _CLOSE = kinds.QUERY, kinds.PARSE, kinds.BIND, kinds.DESCRIBE, kinds.CLOSE
_EXECUTE, _FUNCTION, _STATEMENT = kinds.EXECUTE, kinds.FUNCTION, kinds.STATEMENT
#: For these a client needs a server connection.
_NEEDS_SERVER = frozenset((_QUERY, _PARSE, _BIND, _DESCRIBE, _EXECUTE, _FUNCTION))
_LONG_TEXT = b"(too long)"
_FUNCTION_TEXT = b"(function call)"
_MAX_STATEMENTS = 512  # of one client, remembered by name: those that touch something
_MAX_TEXT = 1_024  # bytes kept of each
_PREPARES = re.compile(rb"\bprepare\s+(\"[^\"]+\"|\w+)(?:\s*\([^)]*\))?\s+as\b", re.IGNORECASE)
_DEALLOCATES = re.compile(rb"\bdeallocate\s+(?:prepare\s+)?(\"[^\"]+\"|\w+)", re.IGNORECASE)


class Watch:
    """What transaction mode would have done with one pool, since `since`. On the event loop.

    clients: that are logged in; connections: of these, those that have a server connection
    busy: inside a transaction or a request; pinned: would keep their connection
    listening: would be told by the connection that all listeners of a pool share
    needed: connections for all of this
    peaks: the most of each there was at one moment
    times: for how many seconds so many were needed, by their number
    counts: consequences of texts, by the first word of what the ledger says
    """

    COUNTED = ("clients", "connections", "busy", "pinned", "listening", "needed")

    def __init__(self, pool: Any) -> None:
        self.pool = pool
        self.since = monotonic()
        self.now = dict.fromkeys(self.COUNTED, 0)
        self.peaks = dict.fromkeys(self.COUNTED, 0)
        self.times = [0.0]
        self._level_at = self.since
        self.counts = dict.fromkeys(("carried", "cleared", "asked", "pinned", "refused"), 0)

    def enters(self, client: Any) -> None:
        """A client has logged in, or was there when the dry run began."""
        client.sight = Sight(self, client.settings is not None and client.settings.opaque)
        self.count("clients", 1)

    def leaves(self, client: Any) -> None:
        """A client has left, or the dry run ends."""
        sight, client.sight = client.sight, None
        sight.is_now(False, False)
        sight.listens(False)
        self.count("connections", -sight.connected)
        self.count("clients", -1)

    def count(self, what: str, change: int) -> None:
        """One more or less of these."""
        number = self.now[what] = self.now[what] + change
        self.peaks[what] = max(self.peaks[what], number)

    def needs(self, change: int) -> None:
        """One more connection is needed, or one less."""
        if change:
            self._look()
            self.count("needed", change)

    def _look(self) -> None:
        """Account for the time since the last change."""
        moment, level = monotonic(), self.now["needed"]
        while len(self.times) <= level:
            self.times.append(0.0)
        self.times[level] += moment - self._level_at
        self._level_at = moment

    def needed_for(self, share: float) -> int:
        """So many connections were enough for this share of the time in which any was needed. O(clients)"""
        self._look()
        left = share * sum(self.times[1:])
        for level, seconds in enumerate(self.times[1:], 1):
            left -= seconds
            if left <= 0.0 and seconds:
                return level
        return 0

    def note(self, what: str, text: bytes) -> None:
        """A text has had this consequence."""
        self.counts[what.partition(":")[0]] += 1
        self.pool.note(what, text)


class Sight:
    """One client as transaction mode would have it.

    holdings: what ties it to its connection; forever: reasons that no text ends
    reasons: why it would keep its connection, each with since when and the text that began it
    busy: inside a transaction or a request; pinned: there are reasons; listening: it has channels
    connected: it has a server connection
    opaque: its texts cannot be read in its client encoding
    prepared: names of statements prepared by SQL; statements: by the protocol
    """

    __slots__ = (
        "busy",
        "connected",
        "forever",
        "holdings",
        "listening",
        "opaque",
        "pinned",
        "prepared",
        "reasons",
        "statements",
        "unnamed",
        "watch",
    )

    def __init__(self, watch: Watch, opaque: bool) -> None:
        self.watch = watch
        self.opaque = opaque
        self.holdings = Holdings()
        self.forever: set[str] = set()
        self.busy = self.pinned = self.listening = self.connected = False
        self.reasons: dict[str, tuple[float, bytes]] = {}
        self.prepared: set[bytes] = set()
        self.statements: dict[bytes, tuple[Reading, bytes]] = {}
        self.unnamed: tuple[Reading, bytes] | None = None

    def is_now(self, busy: bool, pinned: bool) -> None:
        """The one place where it comes to need a connection, and to need none."""
        count = self.watch.count
        self.watch.needs((busy or pinned) - (self.busy or self.pinned))
        count("busy", busy - self.busy)
        count("pinned", pinned - self.pinned)
        self.busy, self.pinned = busy, pinned

    def listens(self, listening: bool) -> None:
        """The one place where it comes to listen, and to listen no more: all listeners need one connection."""
        change = listening - self.listening
        before = self.watch.now["listening"]
        self.watch.count("listening", change)
        self.watch.needs((before + change > 0) - (before > 0))
        self.listening = listening

    def rests(self) -> None:
        """Nothing is owed, and no transaction is open."""
        if self.busy:
            self.is_now(False, self.pinned)

    # -- messages ---------------------------------------------------------------------------------------------

    def message(self, data: bytes, kind: int, i: int, end: int) -> None:
        """A message of the client that goes on; of a long one only the beginning may be there. O(text)"""
        if kind in _NEEDS_SERVER and not self.busy:
            self.is_now(True, self.pinned)
            if not self.connected:
                self.connected = True
                self.watch.count("connections", 1)
                if self.opaque:
                    self.pins(str(Pinned.CLIENT_ENCODING), b"")
        if self.opaque:
            return
        if kind == _QUERY:
            self.unnamed = None
            if end > len(data):
                self.pins(str(Pinned.STATEMENT_TOO_LONG), _LONG_TEXT)
            elif not plain(data, i + 5, end - 1):
                text = data[i + 5 : end - 1]
                self._runs(read(text), text[:_MAX_TEXT], b"")
        elif kind == _PARSE:
            self._parse(data, i, end)
        elif kind == _BIND:
            self._bind(data, i, end)
        elif kind == _CLOSE and data[i + 5] == _STATEMENT:
            self._define(data[i + 6 : end - 1], None)
        elif kind == _FUNCTION and self._calls_unknown(data, i):
            self.pins(str(Pinned.FUNCTION_CALL), _FUNCTION_TEXT)

    def _parse(self, data: bytes, i: int, end: int) -> None:
        split = data.find(b"\0", i + 5)
        stop = data.find(b"\0", split + 1)
        name = data[i + 5 : split]
        if end > len(data):
            self._define(name, None)
            self.pins(str(Pinned.STATEMENT_TOO_LONG), _LONG_TEXT)
        elif 0 <= split < stop < end:
            text = data[split + 1 : stop]
            reading = HARMLESS if plain(data, split + 1, stop) else read(text)
            minds = reading.touches or (reading.ends and may_end(text))
            self._define(name, (reading, text[:_MAX_TEXT]) if minds else None)

    def _define(self, name: bytes, known: tuple[Reading, bytes] | None) -> None:
        """What this name stands for now; None: what touches nothing."""
        if not name:
            self.unnamed = known
        elif known is None:
            self.statements.pop(name, None)
        elif len(self.statements) < _MAX_STATEMENTS:
            self.statements[name] = known

    def _bind(self, data: bytes, i: int, end: int) -> None:
        if self.unnamed is None and not self.statements:
            return
        portal = data.find(b"\0", i + 5)
        name = data[portal + 1 : data.find(b"\0", portal + 1)]
        known = self.statements.get(name) if name else self.unnamed
        if known is not None:
            self._runs(*known, data[i + 5 : end])

    @staticmethod
    def _calls_unknown(data: bytes, i: int) -> bool:
        return int.from_bytes(data[i + 5 : i + 9], "big") not in LARGE_OBJECT_CALLS

    # -- what runs --------------------------------------------------------------------------------------------

    def _runs(self, reading: Reading, text: bytes, bind: bytes) -> None:
        """A text that is more than harmless runs.

        :param bind: the Bind that runs it, by its body; b"": it is a simple query
        """
        touches, ties, note = reading.touches, reading.ties, self.watch.note
        if not touches:
            self._ends(0, text)
        elif touches & ~reading.clears == 0:
            note("cleared", text)
            if touches & touch.PREPARED:
                self.prepared.clear()
            self._ends(0, text)
        elif ties & ~touch.LISTEN and not self.pinned and self.watch.pool.refuses_pins:
            note(f"refused: {self._word(ties)}", text)
        else:
            if touches & touch.SETTINGS:
                note(f"carried: {Pinned.SETTINGS}", text)
            elif touches & touch.ROLE:
                note(f"carried: {Pinned.ROLE}", text)
            if touches & touch.UNKNOWN:
                note(f"asked: {Pinned.UNKNOWN}", text)
            elif touches & touch.PREPARED:
                note("carried: prepared", text)
                self._prepares(text)
            if self._untold(reading, bind):
                self.pins(str(Pinned.UNKNOWN), text)
            self._ends(ties & ~touch.PREPARED, text)

    def _prepares(self, text: bytes) -> None:
        """Statements prepared by SQL go with their client, unless there are too many."""
        self.prepared.update(_PREPARES.findall(text))
        self.prepared.difference_update(_DEALLOCATES.findall(text))
        if len(self.prepared) > MAX_PREPARED_BY_SQL:
            self.prepared.clear()
            self.pins(str(Pinned.PREPARED_BY_SQL), text)

    def _untold(self, reading: Reading, bind: bytes) -> bool:
        """Nobody can tell which setting it sets."""
        return reading.untold or (bool(reading.names_at and bind) and bound(bind, reading.names_at) is None)

    def _ends(self, ties: int, text: bytes) -> None:
        """What it leaves and what it ends is known now."""
        holdings = self.holdings
        if ties or holdings.ties:
            begun = holdings.ran(ties, text)
            for flag in touch.WORDS:
                if begun & flag:
                    what = "carried" if flag == touch.LISTEN else "pinned"
                    self.watch.note(f"{what}: {self._word(flag)}", text)
            if bool(holdings.ties & touch.LISTEN) != self.listening:
                self.listens(not self.listening)
            self._keeps(text)

    def pins(self, reason: str, text: bytes) -> None:
        """It would keep its connection to the end for this."""
        self.watch.note(f"pinned: {reason}", text)
        self.forever.add(reason)
        self._keeps(text)

    def _keeps(self, text: bytes) -> None:
        ties = self.holdings.ties & ~touch.LISTEN
        wanted = self.forever | {self._word(flag) for flag in touch.WORDS if ties & flag}
        for reason in self.reasons.keys() - wanted:
            del self.reasons[reason]
        for reason in wanted - self.reasons.keys():
            self.reasons[reason] = monotonic(), text
        if bool(wanted) != self.pinned:
            self.is_now(self.busy, bool(wanted))

    def _word(self, flags: int) -> str:
        return str(self.watch.pool.pin_reason(flags))


def adjust(pool: Any, on: bool, clients: Any) -> None:
    """Begin or end the dry run of a pool that has clients: of these, what comes from now on is seen."""
    if on == (pool.watch is not None):
        return
    watch = pool.watch
    pool.watch = Watch(pool) if on else None
    for client in clients:
        if client.pool is not pool:
            continue
        if watch is not None and client.sight is not None:
            watch.leaves(client)
        if on:
            pool.watch.enters(client)
