"""What the machine moves: slots, and the waiters who want one. Plain records; all decisions are elsewhere."""

from __future__ import annotations

from typing import Any

from cenote.core.ring import Node

NEVER = float("inf")


class Slot(Node):
    """The right to one connection. `data` belongs to the shell; the rest to the machine.

    settings: what the connection carries beside its base state (None: nothing); the shell keeps it true
    opened, reason: why it was opened, why it is being closed (words of `cenote.reasons`)
    epoch: the machine's epoch when its dial began
    since: when it entered the state it is in, but for CHECKING: then still when it became idle
    proved: when its server last answered
    expires: end of its lifetime, its own share of jitter taken off
    jitter: drawn once, 0 to 1
    timed: the agenda holds an entry for it
    uses: leases so far
    owed: the machine ordered work on it that no shell has begun yet
    rested: how long it had been idle when it was lent last; 0 when it was handed on
    """

    def __init__(self, opened: str, epoch: int, now: float) -> None:
        super().__init__()
        self.data: Any = None
        self.settings: object = None
        self.opened = opened
        self.reason = ""
        self.epoch = epoch
        self.since = now
        self.proved = now
        self.expires = NEVER
        self.jitter = 0.0
        self.timed = False
        self.uses = 0
        self.rested = 0.0
        self.owed = False

    def state(self) -> str:
        """The name of the state, "gone" outside of all (not yet dialed, or let go by the server)."""
        return "gone" if self.ring is None else self.ring.name


class Waiter(Node):
    """A borrower in line. In the end it has a `slot` (granted), or a reason why not (`refused`)."""

    def __init__(self, now: float, deadline: float, settings: object, data: object) -> None:
        super().__init__()
        self.since = now
        self.deadline = deadline
        self.settings = settings
        self.data = data
        self.slot: Slot | None = None
        self.refused = ""
        self.passed = 0
