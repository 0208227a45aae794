"""The pool machine: who gets which connection, and when to open, check, reset, close or refuse.

One machine serves one destination. It is synchronous and pure: inputs come in with the time `now`
(monotonic seconds), decisions go out as return values and as `effects`, which a shell performs and whose
outcome it feeds back as further inputs. It never connects, locks, sleeps, logs or draws random numbers by
itself; the sync pool, the asyncio pool and the simulator run this same code.

                 acquire, hand-off
      +------- IDLE ------------> LEASED -----------+
      |        ^  ^ <------------   |  release      | release_touched
      |  check |  |    release      |               v
      v passed |  +---------------- | --------- RESETTING
    CHECKING --+                    |  reset_done   |
      |                             |               |
      |   CONNECTING --> IDLE or LEASED             |
      v       |  dialed                             v
    CLOSING <-+--- broken, stale, too old, above the limit, check or reset failed
      | closed: gone

States. A slot's state is the ring it is in. While in this state ...
  CONNECTING  a shell opens a connection for it, on nobody's behalf.
  IDLE        its connection is usable, its settings are known, and nobody has it.
  CHECKING    a shell peeks at it or pings it; nobody may have it.
  LEASED      exactly one borrower (or one granted waiter) has it.
  RESETTING   a shell cleans up after a lease; nobody may have it.
  CLOSING     it still counts against the bound until the server has let go of it.

| input                        | from        | to                                   | because                     |
|------------------------------|-------------|--------------------------------------|-----------------------------|
| acquire                      | IDLE        | LEASED / CLOSING                     | nobody waits / too old      |
| (ordered by growth)          | gone        | CONNECTING                           | waiters, warm minimum       |
| dial_needed                  | CONNECTING  | gone                                 | the need has passed         |
| dialed                       | CONNECTING  | LEASED, IDLE or CLOSING              | _place                      |
| dial_failed                  | CONNECTING  | gone                                 | nothing was opened          |
| release, abandon             | LEASED      | LEASED, IDLE or CLOSING              | _place                      |
| release_touched              | LEASED      | RESETTING                            | session state to undo       |
| release_broken               | LEASED      | CLOSING                              | unusable                    |
| reset_done / reset_failed    | RESETTING   | _place / CLOSING                     |                             |
| tick                         | IDLE        | CHECKING, CLOSING                    | check due, too old          |
| a connection broke           | IDLE        | CHECKING                             | peek at the others          |
| idle_lost                    | IDLE        | CLOSING                              | its server closed it        |
| check_passed / check_failed  | CHECKING    | _place / CLOSING                     |                             |
| destination failed, refresh  | IDLE        | CLOSING                              | stale epoch                 |
| pause, drain, close, resize  | IDLE        | CLOSING                              | not wanted any more         |
| closed                       | CLOSING     | gone                                 | the server has let go       |

Invariants, executed by `check()`:
  I1  every slot is in exactly one ring, and the rings sum to `size`: those ordered and not yet gone.
  I2  waiters and idle slots never coexist.
  I3  a waiter in line has neither slot nor refusal; every lease is counted once.
  I4  `size` grows only while it is below `limit`, which is never above `max_size`, and while the budget has room.
  I5  no more slots CONNECTING than the gate.
  I6  an idle slot is of the current epoch.
  I7  a waiter was passed over at most PASSES times.
  I8  what is to happen later is armed: `alarm` is not after the first thing due.
  I9  while closed nobody waits; while paused, draining or closed nothing is idle.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from cenote.core.agenda import Agenda
from cenote.core.codel import INTERVAL_S, Codel
from cenote.core.growth import DIAL_GATE, Gate, Growth
from cenote.core.histogram import Histogram
from cenote.core.ring import Ring
from cenote.core.shelf import Shelf
from cenote.core.slot import NEVER, Slot, Waiter

if TYPE_CHECKING:
    from cenote.core.budget import Budget

# Effects: what a shell must do, each a pair (what, with whom).
OPEN = "open"  # slot: ask dial_needed, dial, answer dialed or dial_failed
PING = "ping"  # slot: one round trip, answer check_passed or check_failed
PEEK = "peek"  # slot: poll its socket, answer check_passed or check_failed
RESET = "reset"  # slot: clean up, answer reset_done or reset_failed
CLOSE = "close"  # slot: close (slot.reason says why), answer closed when the server has let go
GRANT = "grant"  # waiter: waiter.slot is its lease
REFUSE = "refuse"  # waiter: waiter.refused is the reason
WAKE = "wake"  # None: call tick at machine.alarm
SERVE = "serve"  # None: call budget.serve: somebody lacks room, or there is some

RUNNING, PAUSED, DRAINING, CLOSED = "running", "paused", "draining", "closed"

PASSES = 8  # how often a waiter may be passed over
LOOKS = 32  # waiters looked at for equal settings
FATAL_WINDOW_S = 1.0  # two connections broken within it mean the server, not the connections
JITTER_LIFETIME = 0.1
JITTER_CHECK = 0.25

# What a failure says: words of cenote.reasons.Failure, plain text because compiled code types it so.
DESTINATION, CONNECTION, PERMANENT = "destination", "connection", "permanent"


class Machine:
    """The state of one pool and all decisions about it. Called with the shell's lock held."""

    def __init__(
        self,
        min_size: int,
        max_size: int,
        max_waiting: int,
        idle_timeout: float,
        max_lifetime: float,
        check_after: float,
        codel: str,
        random: Callable[[], float],
    ) -> None:
        self.min_size = min_size
        self.max_size = max_size
        self.limit = max_size  # what the budget leaves of it
        self.max_waiting = max_waiting
        self.idle_timeout = idle_timeout
        self.max_lifetime = max_lifetime
        self.check_after = check_after
        self.codel_mode = codel
        self.random = random

        self.mode = RUNNING
        self.size = 0
        self.shelf = Shelf()
        self.connecting = Ring("connecting")
        self.checking = Ring("checking")
        self.leased = Ring("leased")
        self.resetting = Ring("resetting")
        self.closing = Ring("closing")
        self.waiting = Ring("waiting")

        self.effects: list[tuple[str, Any]] = []
        self.alarm = NEVER
        self.agenda = Agenda()
        self.drain_at = NEVER
        self.codel = Codel()
        self.codel_at = NEVER

        self.growth = Growth(Gate(random), random)
        self.budget: Budget | None = None
        self.epoch = 0
        self.last_fatal = -NEVER

        self.acquired = 0
        self.would_shed = 0
        self.opened_by: dict[str, int] = {}
        self.closed_by: dict[str, int] = {}
        self.refused_by: dict[str, int] = {}
        self.waits = Histogram()  # of those who had to wait; the others waited for nothing
        self.holds = Histogram()
        self.dials = Histogram()

    # -- borrowers ------------------------------------------------------------------------------------------

    def acquire(
        self, now: float, timeout: float, settings: object = None, data: object = None, again: bool = False
    ) -> Slot | Waiter:
        """A leased slot, or a waiter that stands in line or was refused at once. O(1), waiting O(log n).

        :param again: this borrower's slot was dead at the door: he keeps his place, the first.
        """
        slot = self.shelf.best(settings)  # paused or draining, there is none
        while slot is not None:
            self.shelf.remove(slot)
            if now < slot.expires:
                self.codel.shortest_s = 0.0
                slot.rested = now - slot.since
                self._lease(slot, now)
                return slot
            self._close(slot, "max_lifetime")
            slot = self.shelf.best(settings)
        waiter = Waiter(now, now + timeout, settings, data)
        if self.mode in (DRAINING, CLOSED) and not (again and self.mode == DRAINING):
            self._refuse(waiter, self.mode)
        elif timeout <= 0:
            # What he needed may be there for the next one who asks.
            growth = self.growth
            idle = self.mode == RUNNING and not self.connecting.size and growth.gate.pending < growth.gate.width()
            retry_at = max(growth.gate.retry_at, growth.own.retry_at)
            if idle and self._room() > 0 and retry_at <= now:
                self._order("attempt", now)
            self._refuse(waiter, "timeout")
        elif self.waiting.size >= self.max_waiting and not again:
            self._refuse(waiter, "queue_full")
        else:
            if again:
                self.waiting.appendleft(waiter)
            else:
                self.waiting.append(waiter)
            self.agenda.add(waiter.deadline, waiter)
            self.agenda.sweep(self.waiting.size + self.size)
            self._arm(waiter.deadline)
            if self.codel_mode != "off" and self.codel_at == NEVER:
                self.codel_at = now + INTERVAL_S
                self._arm(self.codel_at)
            self._grow(now)
        return waiter

    def abandon(self, waiter: Waiter, now: float, reason: str = "abandoned") -> None:
        """The borrower has left; legal at any moment. A lease granted and not yet accepted comes back. O(1)."""
        if waiter.ring is not None:
            self.waiting.remove(waiter)
            self._count(self.refused_by, reason)
            self.agenda.sweep(self.waiting.size + self.size)
        elif waiter.slot is not None:
            slot = waiter.slot
            waiter.slot = None
            self.leased.remove(slot)
            self.holds.observe(now - slot.since)
            self._place(slot, now, now)

    def accept(self, waiter: Waiter) -> Slot:
        """The granted borrower takes his lease; from here on he gives it back by `release`."""
        slot = waiter.slot
        if slot is None:
            raise ValueError("this waiter has no lease")
        waiter.slot = None
        return slot

    def release(self, slot: Slot, now: float) -> None:
        """A lease ends; the connection is in the state that `slot.settings` says. O(1)."""
        self._end_lease(slot, now)
        self._place(slot, now, now)

    def release_touched(self, slot: Slot, now: float) -> None:
        """A lease ends; its session must be cleaned first. O(1)."""
        self._end_lease(slot, now)
        slot.since = now
        self.resetting.append(slot)
        self._want(RESET, slot)

    def release_broken(self, slot: Slot, now: float, reason: str, failure: str) -> None:
        """A lease ends; the connection is not usable. `failure` says what that means for the others. O(1), or
        O(idle) where it means something."""
        self._end_lease(slot, now)
        self._lost(slot, now, reason, failure)

    # -- answers of the shell -------------------------------------------------------------------------------

    def reset_done(self, slot: Slot, now: float) -> None:
        """The session is known again (and the server has just answered)."""
        self.resetting.remove(slot)
        slot.proved = now
        self._place(slot, now, now)

    def reset_failed(self, slot: Slot, now: float, failure: str) -> None:
        self.resetting.remove(slot)
        self._lost(slot, now, "reset_failed", failure)

    def check_passed(self, slot: Slot, now: float, pinged: bool) -> None:
        """An idle connection is alive. Only a ping, which the server answered, proves it for `check_after`."""
        self.checking.remove(slot)
        if pinged:
            slot.proved = now
        self._place(slot, now, slot.since)  # being looked at is not being used: it keeps its age and its place

    def check_failed(self, slot: Slot, now: float, reason: str, failure: str) -> None:
        self.checking.remove(slot)
        self._lost(slot, now, reason, failure)

    def idle_lost(self, slot: Slot, now: float, reason: str, failure: str) -> None:
        """An idle connection was seen to end: a shell that reads while nobody has it learns so at once."""
        self.shelf.remove(slot)
        self._lost(slot, now, reason, failure)

    def dial_needed(self, slot: Slot, now: float) -> bool:
        """Asked right before a dial: is it still wanted, and allowed? If not, the slot is gone. O(1)."""
        if slot.ring is not self.connecting:
            raise ValueError(f"illegal move: the slot is {slot.state()}, not connecting")
        running = self.mode == RUNNING
        needed = self.size <= self.limit and (
            (running and slot.opened == "attempt")
            or (self.mode not in (PAUSED, CLOSED) and self.waiting.size >= self.connecting.size)
            or (running and self.size - self.closing.size <= self.min_size)
        )
        if needed:
            slot.epoch = self.epoch
            slot.since = now
            return True
        self._undialed(slot)
        self._count(self.closed_by, "not_needed")
        return False

    def dialed(self, slot: Slot, now: float) -> None:
        """A connection was opened."""
        self.connecting.remove(slot)
        self.growth.gate.pending -= 1
        self.dials.observe(now - slot.since)
        self.growth.dial_ended(now - slot.since)
        self._count(self.opened_by, slot.opened)
        slot.proved = now
        slot.jitter = self.random()
        slot.expires = now + self.max_lifetime * (1.0 - JITTER_LIFETIME * slot.jitter)
        self._place(slot, now, now)
        self._grow(now)
        self._offer()

    def dial_failed(self, slot: Slot, now: float, failure: str) -> None:
        """A connection could not be opened: one dial at a time from now on, after a growing random pause."""
        self._undialed(slot)
        self._count(self.closed_by, "dial_failed")
        self.growth.dial_failed(now, failure == PERMANENT)
        if failure == DESTINATION:
            self._judge(slot, now, failure)
        elif failure == PERMANENT and self.size == self.closing.size:
            self._refuse_all("connect_failed")
        self._grow(now)

    def closed(self, slot: Slot, now: float) -> None:
        """The server has let go of a closed connection."""
        self._gone(slot, self.closing)
        self._grow(now)

    # -- operators ------------------------------------------------------------------------------------------

    def start(self, now: float) -> None:
        """Open the warm minimum."""
        self._grow(now)

    def drain(self, now: float, deadline: float) -> None:
        """No new leases; those in line are served until `deadline`. Idle connections are closed at once."""
        if self.mode == CLOSED:
            return
        self.mode = DRAINING
        self.drain_at = deadline
        self._arm(deadline)
        self._close_idle("draining")
        self._grow(now)

    def pause(self, now: float) -> None:
        """Let nobody begin: who asks waits, for as long as he may. Idle connections go, leased ones when they
        come back."""
        if self.mode == RUNNING:
            self.mode = PAUSED
            self._close_idle("paused")

    def resume(self, now: float) -> None:
        """End a drain or a pause."""
        if self.mode in (PAUSED, DRAINING):
            self.mode = RUNNING
            self.drain_at = NEVER
            self._grow(now)

    def close(self, now: float) -> None:
        """End for good: whoever waits is refused, whatever is idle or comes back is closed."""
        self.mode = CLOSED
        self._refuse_all("closed")
        self._close_idle("pool_closed")

    def resize(self, now: float, min_size: int, max_size: int) -> None:
        """Move the limit. What is above it goes at once if idle, else when it comes back. O(surplus)."""
        self.min_size = min_size
        self.max_size = max_size
        self.limit = max_size
        for _ in range(min(self.size - self.closing.size - max_size, self.shelf.size())):
            self._close_oldest("surplus")
        self._grow(now)

    def give_way(self, idle: bool) -> None:
        """One connection less, for another pool of the budget: an idle one, or the next that comes back. O(1)."""
        self.limit = min(self.limit, self.size - self.closing.size) - 1
        if idle:
            self._close_oldest("gave_way")

    def allow(self, now: float, limit: int) -> None:
        """So many connections, as far as there is room, or `max_size` if that is less. O(dials ordered)."""
        self.limit = min(limit, self.max_size)
        self._grow(now)

    def refresh(self, now: float) -> None:
        """Every connection opened until now is stale: idle ones go at once, others when they come back."""
        self._advance_epoch()
        self._grow(now)

    def tick(self, now: float) -> None:
        """Do what has become due. Call at `alarm`; at any other time it is harmless. O(due log n)."""
        self.alarm = NEVER
        due = self.agenda.pop_due(now)
        while due is not None:
            if isinstance(due, Slot):
                if due.ring is not None and due.ring.name == "idle":
                    self._look_after(due, now)
            elif isinstance(due, Waiter) and due.ring is not None:
                self.waiting.remove(due)
                self._refuse_later(due, "timeout")
            due = self.agenda.pop_due(now)
        if now >= self.codel_at:
            self._poll_codel(now)
        if now >= self.drain_at:
            self.drain_at = NEVER
            self._refuse_all("draining")
        self.agenda.sweep(self.waiting.size + self.size)
        self._grow(now)
        self._arm(min(self.agenda.first(), self.codel_at, self.drain_at))

    # -- the mover ------------------------------------------------------------------------------------------
    # Ring.remove refuses a slot that is not where an input says it is; these are the only ways onwards.

    def _order(self, why: str, now: float) -> None:
        self.size += 1
        self.growth.gate.pending += 1
        if self.budget is not None:
            self.budget.took(self)
        slot = Slot(why, self.epoch, now)
        self.connecting.append(slot)
        self._want(OPEN, slot)

    def _want(self, what: str, slot: Slot) -> None:
        slot.owed = True
        self.effects.append((what, slot))

    def _gone(self, slot: Slot, source: Ring) -> None:
        source.remove(slot)
        self.size -= 1
        if self.budget is not None:
            self.budget.gave(self)
            if source is not self.connecting:
                self._offer()

    def _undialed(self, slot: Slot) -> None:
        self._gone(slot, self.connecting)
        self.growth.gate.pending -= 1
        self._offer()

    def _offer(self) -> None:
        """There may be room, or a way in, for another pool."""
        if self.budget is not None and (self.budget.hungry or self.budget.cold):
            self.effects.append((SERVE, None))

    def _room(self) -> int:
        """How many slots more there may be. O(1)."""
        room = self.limit - self.size
        return room if self.budget is None else min(room, self.budget.room(self))

    def _lease(self, slot: Slot, now: float) -> None:
        slot.since = now
        slot.uses += 1
        self.leased.append(slot)
        self.acquired += 1

    def _end_lease(self, slot: Slot, now: float) -> None:
        self.leased.remove(slot)
        held = now - slot.since
        self.holds.observe(held)
        self.growth.lease_ended(held)

    def _close(self, slot: Slot, reason: str) -> None:
        slot.reason = reason
        self.closing.append(slot)
        self._count(self.closed_by, reason)
        self._want(CLOSE, slot)

    def _place(self, slot: Slot, now: float, unused_since: float) -> None:
        """A usable connection that nobody has: to a waiter, on the shelf, or closed."""
        if slot.epoch != self.epoch:
            self._close(slot, "stale")
        elif now >= slot.expires:
            self._close(slot, "max_lifetime")
        elif self.size - self.closing.size > self.limit:
            self._close(slot, "surplus" if self.limit == self.max_size else "gave_way")
        else:
            waiter = self._next_waiter(slot, now) if self.waiting.size and self.mode != PAUSED else None
            if waiter is not None:
                slot.rested = 0.0
                self._lease(slot, now)
                self.waits.observe(now - waiter.since)
                waiter.slot = slot
                self.effects.append((GRANT, waiter))
                return
            if self.mode == RUNNING:
                slot.since = unused_since
                self.shelf.put(slot)
                if not slot.timed:
                    self._time(slot, now)
                return
            self._close(slot, "pool_closed" if self.mode == CLOSED else self.mode)
        self._grow(now)

    # -- choices --------------------------------------------------------------------------------------------

    def _next_waiter(self, slot: Slot, now: float) -> Waiter | None:
        """The waiter this connection goes to: the first of the oldest LOOKS that wants its settings, else the
        oldest, out of the line. O(1)."""
        while self.waiting.size:
            chosen = self.waiting.first
            candidate = chosen
            looked = 0
            while candidate is not None and looked < LOOKS:
                if candidate.settings == slot.settings:
                    chosen = candidate
                    break
                if candidate.passed >= PASSES:
                    break
                candidate = candidate.after
                looked += 1
            passed = chosen.before
            while passed is not None:
                passed.passed += 1
                passed = passed.before
            self.waiting.remove(chosen)
            if self.codel_mode == "off" or not self.codel.judge(now - chosen.since, now):
                return chosen  # type: ignore[no-any-return]
            if self.codel_mode == "shadow":
                self.would_shed += 1
                return chosen  # type: ignore[no-any-return]
            self._refuse_later(chosen, "shed")
        return None

    def _grow(self, now: float) -> None:
        """Order the dials that are needed now. O(dials ordered)."""
        if self.size >= self.max_size or self.connecting.size >= DIAL_GATE:
            return
        if self.mode != RUNNING and (self.mode != DRAINING or not self.waiting.size):
            return
        missing = self.min_size - (self.size - self.closing.size) if self.mode == RUNNING else 0
        if missing > 0 and self.budget is not None and not self.waiting.size:
            missing = min(missing, self.budget.warm_room())
        if missing <= 0 and not self.waiting.size:
            return
        # What is being reset comes back too; the oldest of those, so that one that hangs does not look new.
        returning = self.leased.size + self.resetting.size
        newest = now
        if self.leased.size:
            newest = self.leased.last.since
        elif self.resetting.size:
            newest = self.resetting.first.since
        growth = self.growth
        room = self._room()
        asked = self.waiting.size - self.connecting.size
        dials = growth.wanted(now, self.connecting.size, room, missing, self.waiting.size, returning, newest)
        if growth.look_at != NEVER:
            self._arm(growth.look_at)
        for nth in range(dials):
            self._order("probe" if growth.width() == 1 else "demand" if nth < asked else "minimum", now)
        if dials < missing and growth.gate.pending >= growth.gate.width() and self.budget is not None:
            self.budget.waits_cold(self)
        blocked = dials >= room or growth.gate.pending >= growth.gate.width()
        if dials < asked and blocked and self.budget is not None and self.budget.hungers(self, now):
            self.effects.append((SERVE, None))  # others have what is missing here, or are at the door

    # -- failures -------------------------------------------------------------------------------------------

    def _lost(self, slot: Slot, now: float, reason: str, failure: str) -> None:
        self._close(slot, reason)
        self._judge(slot, now, failure)
        self._grow(now)

    def _judge(self, slot: Slot, now: float, failure: str) -> None:
        """What the failure of this slot means for the others. Old news (an older epoch) means nothing."""
        if slot.epoch != self.epoch:
            return
        if failure == DESTINATION or (failure == CONNECTION and now - self.last_fatal <= FATAL_WINDOW_S):
            self.growth.gate.suspect = True
            self._advance_epoch()
        elif failure == CONNECTION:
            self.last_fatal = now
            for other in self.shelf.slots():
                self.shelf.remove(other)
                self.checking.append(other)
                self._want(PEEK, other)

    def _advance_epoch(self) -> None:
        self.epoch += 1
        self.last_fatal = -NEVER
        self._close_idle("stale")

    def _close_idle(self, reason: str) -> None:
        for slot in self.shelf.slots():
            self.shelf.remove(slot)
            self._close(slot, reason)

    def _close_oldest(self, reason: str) -> None:
        slot = self.shelf.oldest()
        if slot is not None:
            self.shelf.remove(slot)
            self._close(slot, reason)

    def _refuse_all(self, reason: str) -> None:
        for waiter in self.waiting:
            self.waiting.remove(waiter)
            self._refuse_later(waiter, reason)

    def _refuse_later(self, waiter: Waiter, reason: str) -> None:
        self._refuse(waiter, reason)
        self.effects.append((REFUSE, waiter))

    def _refuse(self, waiter: Waiter, reason: str) -> None:
        waiter.refused = reason
        self._count(self.refused_by, reason)

    def _count(self, counts: dict[str, int], word: str) -> None:
        counts[word] = counts.get(word, 0) + 1

    # -- time -----------------------------------------------------------------------------------------------

    def _arm(self, when: float) -> None:
        if when < self.alarm:
            self.alarm = when
            self.effects.append((WAKE, None))

    def _look_after(self, slot: Slot, now: float) -> None:
        """An idle slot's time has come: too old, idle for too long, to be checked, or not yet. O(log n)."""
        opened = self.size - self.closing.size - self.connecting.size
        if now >= slot.expires:
            self.shelf.remove(slot)
            self._close(slot, "max_lifetime")
        elif now >= slot.since + self.idle_timeout and opened > self.min_size:
            self.shelf.remove(slot)
            self._close(slot, "idle_timeout")
        elif now >= self._check_due(slot):
            self.shelf.remove(slot)
            self.checking.append(slot)
            self._want(PING, slot)
        else:
            self._time(slot, now)

    def _check_due(self, slot: Slot) -> float:
        """When to ping it; each slot has its own share of earliness, so that checks spread over time."""
        if self.check_after <= 0:
            return NEVER
        proved = slot.proved if slot.proved > slot.since else slot.since
        return float(proved + self.check_after * (1.0 - JITTER_CHECK * slot.jitter))

    def _time(self, slot: Slot, now: float) -> None:
        """Put the next look at an idle slot on the agenda. It stays there while the slot is used."""
        idle_out = slot.since + self.idle_timeout
        if idle_out <= now:  # kept for the warm minimum: ask again a timeout later
            idle_out = now + self.idle_timeout
        due = min(slot.expires, self._check_due(slot), idle_out)
        self.agenda.add(due, slot)
        self._arm(due)

    def _poll_codel(self, now: float) -> None:
        """A queue that nothing leaves has to be judged by the clock."""
        self.codel_at = NEVER
        waiter = self.waiting.first
        while waiter is not None and self.codel.judge(now - waiter.since, now) and self.codel_mode == "on":
            self.waiting.remove(waiter)
            self._refuse_later(waiter, "shed")
            waiter = self.waiting.first
        if waiter is not None:
            self.codel_at = now + INTERVAL_S

    # -- invariants -----------------------------------------------------------------------------------------

    def check(self) -> None:
        """Execute the invariants; raises AssertionError with the number of the broken one. O(n)."""
        rings = [self.connecting, self.checking, self.leased, self.resetting, self.closing]
        rings.extend(self.shelf.rings.values())
        for ring in rings:
            members = list(ring)
            assert len(members) == ring.size, f"I1: {ring.name} holds {len(members)}, says {ring.size}"
            assert all(node.ring is ring for node in members), f"I1: a slot in {ring.name} says otherwise"
        assert sum(ring.size for ring in rings) == self.size, "I1: the rings do not sum to the size"
        assert all(r.size or r is self.shelf.bare for r in self.shelf.rings.values()), "I1: an empty ring is kept"
        idle = self.shelf.slots()
        assert not (self.waiting.size and idle), "I2: somebody waits while a slot is idle"
        assert all(w.slot is None and not w.refused for w in self.waiting), "I3: waits and has an answer"
        assert self.acquired == self.holds.count() + self.leased.size, "I3: leases do not add up"
        assert self.limit <= self.max_size, "I4: a limit above max_size"
        pending = self.growth.gate.pending
        assert self.connecting.size <= pending <= DIAL_GATE, "I5: more dials than the gate lets through"
        assert self.budget is not None or pending == self.connecting.size, "I5: dials under way are miscounted"
        assert all(slot.epoch == self.epoch for slot in idle), "I6: an idle slot is stale"
        assert all(w.passed <= PASSES for w in self.waiting), "I7: passed over too often"
        due = min(self.agenda.first(), self.codel_at, self.drain_at)
        assert self.alarm <= due, f"I8: {due} is due and not armed"
        assert all(slot.timed for slot in idle), "I8: an idle slot has no next look"
        assert self.mode != CLOSED or not self.waiting.size, "I9: somebody waits in a closed pool"
        assert self.mode == RUNNING or not idle, f"I9: a slot is idle while {self.mode}"
