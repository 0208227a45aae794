"""Two shells for tests of the core: `Shell` does nothing by itself, `Simulation` lets a virtual world run.

Both are deterministic: the clock moves when told, random numbers are given.
"""

import heapq
from collections.abc import Callable
from typing import Any

from cenote.core.machine import CLOSE, GRANT, OPEN, PEEK, PING, REFUSE, RESET, WAKE, Machine
from cenote.core.slot import NEVER, Slot, Waiter

EFFECTS = (OPEN, PING, PEEK, RESET, CLOSE, GRANT, REFUSE, WAKE)


def new_machine(
    *,
    min_size: int = 0,
    max_size: int = 4,
    max_waiting: int = 1_000_000,
    idle_timeout: float = 300.0,
    max_lifetime: float = 1800.0,
    check_after: float = 30.0,
    codel: str = "off",
    random: Callable[[], float] = lambda: 0.0,
) -> Machine:
    return Machine(min_size, max_size, max_waiting, idle_timeout, max_lifetime, check_after, codel, random)


class Shell:
    """Collects effects in `todo` until the test performs them; checks the invariants after each input."""

    def __init__(self, **options: Any) -> None:
        self.m = new_machine(**options)
        self.now = 1000.0
        self.todo: dict[str, list[Any]] = {kind: [] for kind in EFFECTS}

    def gather(self) -> None:
        for kind, whom in self.m.effects:
            self.todo[kind].append(whom)
        self.m.effects.clear()
        self.m.check()

    def take(self, kind: str) -> list[Any]:
        """The effects of this kind since it was last asked for."""
        found, self.todo[kind] = self.todo[kind], []
        return found

    # inputs

    def start(self) -> None:
        self.m.start(self.now)
        self.gather()

    def acquire(self, timeout: float = 30.0, settings: object = None, again: bool = False) -> Slot | Waiter:
        got = self.m.acquire(self.now, timeout, settings, None, again)
        self.gather()
        return got

    def lease(self, settings: object = None) -> Slot:
        """A lease that is there at once."""
        got = self.acquire(0.0, settings)
        assert isinstance(got, Slot)
        return got

    def wait(self, timeout: float = 30.0, settings: object = None, again: bool = False) -> Waiter:
        """A place in line."""
        got = self.acquire(timeout, settings, again)
        assert isinstance(got, Waiter)
        assert got.ring is self.m.waiting
        return got

    def dial(self, slot: Slot, took: float = 0.0) -> None:
        assert self.m.dial_needed(slot, self.now)
        self.now += took
        self.m.dialed(slot, self.now)
        self.gather()

    def dial_all(self) -> int:
        """Perform every dial that is needed, until none is left."""
        dialed = 0
        while slots := self.take(OPEN):
            for slot in slots:
                if self.m.dial_needed(slot, self.now):
                    self.m.dialed(slot, self.now)
                    dialed += 1
                self.gather()
        return dialed

    def fail_dial(self, slot: Slot, failure: str) -> None:
        assert self.m.dial_needed(slot, self.now)
        self.m.dial_failed(slot, self.now, failure)
        self.gather()

    def release(self, slot: Slot, settings: object = None) -> None:
        slot.settings = settings
        self.m.release(slot, self.now)
        self.gather()

    def touch(self, slot: Slot) -> None:
        self.m.release_touched(slot, self.now)
        self.gather()

    def break_lease(self, slot: Slot, failure: str, reason: str = "broken") -> None:
        self.m.release_broken(slot, self.now, reason, failure)
        self.gather()

    def close_all(self) -> None:
        for slot in self.take(CLOSE):
            self.m.closed(slot, self.now)
        self.gather()

    def tick(self, step: float = 0.0) -> None:
        self.now += step
        self.m.tick(self.now)
        self.gather()

    def run(self, until: float, answer: Callable[["Shell"], None] = lambda shell: None) -> None:
        """Let time pass until `until`, calling tick at each alarm; `answer` performs what the shell has to."""
        while self.m.alarm <= until:
            self.now = max(self.now, self.m.alarm)
            self.m.tick(self.now)
            self.gather()
            answer(self)
        self.now = until

    # scenes

    def filled(self, number: int, *settings: object) -> list[Slot]:
        """`number` idle connections, given back a millisecond apart; the last ones carry `settings`."""
        waiters = [self.wait() for _ in range(number)]
        self.dial_all()
        slots = [self.m.accept(waiter) for waiter in waiters]
        carried = [None] * (number - len(settings)) + list(settings)
        for slot, what in zip(slots, carried, strict=True):
            self.now += 0.001
            self.release(slot, what)
        self.take(GRANT)
        return slots

    def states(self) -> dict[str, int]:
        m = self.m
        return {
            "idle": m.shelf.size(),
            **{r.name: r.size for r in (m.connecting, m.checking, m.leased, m.resetting, m.closing, m.waiting)},
        }


class Simulation:
    """Everything works: dials take `dial_s`, leases `hold_s`; what is granted is released in time."""

    def __init__(self, machine: Machine, dial_s: float, hold_s: float) -> None:
        self.m = machine
        self.dial_s = dial_s
        self.hold_s = hold_s
        self.now = 0.0
        self.ticket = 0
        self.agenda: list[tuple[float, int, Callable[..., Any], tuple[Any, ...]]] = []
        self.served: list[Waiter] = []
        self.refused: list[Waiter] = []
        self.most_connecting = 0
        self.ended = 0.0

    def at(self, when: float, what: Callable[..., Any], *args: Any) -> None:
        self.ticket += 1
        heapq.heappush(self.agenda, (when, self.ticket, what, args))

    def ask(self, timeout: float = 30.0) -> None:
        got = self.m.acquire(self.now, timeout)
        if isinstance(got, Slot):
            self.at(self.now + self.hold_s, self._release, got)
        elif got.refused:
            self.refused.append(got)
        self._perform()

    def run(self) -> None:
        """Until nothing more will happen."""
        while self.agenda:
            self.now, _, what, args = heapq.heappop(self.agenda)
            what(*args)
            self._perform()

    def _release(self, slot: Slot) -> None:
        self.ended = self.now
        self.m.release(slot, self.now)

    def _dialed(self, slot: Slot) -> None:
        self.m.dialed(slot, self.now)

    def _closed(self, slot: Slot) -> None:
        self.m.closed(slot, self.now)

    def _tick(self) -> None:
        # Idle connections are of no interest here; without waiters and dials the world stands still.
        if self.m.waiting.size and self.m.alarm <= self.now:
            self.m.tick(self.now)

    def _perform(self) -> None:
        while self.m.effects:
            kind, whom = self.m.effects.pop(0)
            if kind == OPEN and self.m.dial_needed(whom, self.now):
                self.at(self.now + self.dial_s, self._dialed, whom)
            elif kind == GRANT:
                self.served.append(whom)
                self.at(self.now + self.hold_s, self._release, self.m.accept(whom))
            elif kind == REFUSE:
                self.refused.append(whom)
            elif kind == CLOSE:
                self.at(self.now, self._closed, whom)
            elif kind == WAKE and self.m.alarm != NEVER:
                self.at(self.m.alarm, self._tick)
            self.most_connecting = max(self.most_connecting, self.m.connecting.size)

    def opened(self) -> int:
        return sum(self.m.opened_by.values())
