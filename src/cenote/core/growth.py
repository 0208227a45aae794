"""How many connections to dial now, and how soon to try again after a failure.

Callers never dial; the machine asks here how many dials the present need justifies. The rules, in order:
never more pending dials than the gate, one while the destination is down, and that only after a pause with
full jitter (Brooker, "Exponential Backoff and Jitter"); never more than waiters plus what is missing to the
warm minimum; and none for a queue that the connections already there will have served sooner than a dial
can end. Keeps averages; moves nothing.
"""

from __future__ import annotations

from collections.abc import Callable

from cenote.core.slot import NEVER

DIAL_GATE = 4  # simultaneous dials; more only fight each other for the server's fork and the client's CPU
BACKOFF_FIRST_S = 0.05
BACKOFF_MOST_S = 2.0
FIRST_LOOK = 0.1  # share of a dial's time that the very first leases get to show how long they are
NEXT_LOOK = 0.25  # share of a dial's time after which a queue that was left alone is looked at again
LEAST_LOOK_S = 0.001


class Gate:
    """The way in to one server. Several pools may share it: then they wait for each other.

    pending: dials under way
    failures: dials that failed in a row; the server counts as down while there are any
    suspect: established connections say that it failed, and no dial has said otherwise yet
    retry_at: when to try again
    """

    def __init__(self, random: Callable[[], float]) -> None:
        self.random = random
        self.pending = 0
        self.failures = 0
        self.suspect = False
        self.retry_at = -NEVER

    def width(self) -> int:
        """How many dials may be under way at once."""
        return 1 if self.failures or self.suspect else DIAL_GATE

    def passed(self) -> None:
        """The server let somebody in."""
        self.failures = 0
        self.suspect = False

    def failed(self, now: float) -> None:
        pause = min(BACKOFF_MOST_S, BACKOFF_FIRST_S * 2.0 ** min(self.failures, 10))
        self.retry_at = now + pause * self.random()
        self.failures += 1


class Growth:
    """What is known of the dials and leases of one pool.

    gate: the server's
    own: this pool's alone; a user or a database that is refused says nothing about the server
    hold_s, dial_s: moving averages of what a lease and a dial last; 0 until one was seen
    look_at: when to ask again although nothing moved
    """

    def __init__(self, gate: Gate, random: Callable[[], float]) -> None:
        self.gate = gate
        self.own = Gate(random)
        self.hold_s = 0.0
        self.dial_s = 0.0
        self.look_at = NEVER

    def lease_ended(self, held_s: float) -> None:
        self.hold_s = held_s if self.hold_s == 0.0 else self.hold_s + 0.1 * (held_s - self.hold_s)

    def dial_ended(self, took_s: float) -> None:
        self.dial_s = took_s if self.dial_s == 0.0 else self.dial_s + 0.3 * (took_s - self.dial_s)
        self.gate.passed()
        self.own.passed()

    def dial_failed(self, now: float, permanent: bool) -> None:
        """permanent: the server answered, and will not have this pool."""
        if permanent:
            self.gate.passed()
            self.own.failed(now)
        else:
            self.gate.failed(now)

    def failing(self) -> bool:
        """Whether the last dial failed."""
        return self.gate.failures > 0 or self.own.failures > 0

    def width(self) -> int:
        """How many dials of this pool may be under way at once."""
        return min(self.gate.width(), self.own.width())

    def wanted(
        self, now: float, pending: int, room: int, missing: int, waiting: int, leased: int, newest: float
    ) -> int:
        """How many dials to order now. O(1).

        :param pending: dials of this pool under way
        :param room: slots left below the limit
        :param missing: connections missing to the warm minimum, those pending not counted as missing
        :param leased: leases out or being reset, of which the latest began at `newest`
        """
        self.look_at = NEVER
        asked = waiting - pending
        need = min(max(missing, asked), room, self.own.width() - pending, self.gate.width() - self.gate.pending)
        if need <= 0:
            return 0
        if self.failing():
            retry_at = max(self.gate.retry_at, self.own.retry_at)
            if now < retry_at:
                self.look_at = retry_at
                return 0
        elif missing <= 0 and leased and self.served_sooner(now, waiting, leased, newest):
            self.look_at = now + max(self.dial_s * NEXT_LOOK, LEAST_LOOK_S)
            return 0
        return need

    def served_sooner(self, now: float, waiting: int, leased: int, newest: float) -> bool:
        """Will the leases that are out have served everybody in line before a dial could end?

        A lease lasts what leases lasted lately, or what the newest one has lasted already if that is more."""
        if self.dial_s == 0.0:
            return False
        age = now - newest
        hold = max(self.hold_s, age)
        if self.hold_s == 0.0 and age < self.dial_s * FIRST_LOOK:
            return True
        return hold * waiting / leased < self.dial_s
