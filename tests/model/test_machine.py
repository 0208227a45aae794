"""The pool machine, driven by every input in any order, against a reference that is written differently.

The rules are the inputs; `Machine.check()` runs after each, and so does everything here that `check()` cannot
see: what was ordered when, who stood where in line, which work the shell was given. The work is performed in
any order and at any later time; at the end of each run everything works, and the pool must come to rest.
"""

import random
from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from cenote.core.machine import CLOSE, GRANT, OPEN, PEEK, PING, REFUSE, RESET, Machine
from cenote.core.slot import NEVER, Slot, Waiter
from cenote.reasons import Closed, Opened, Refused

PASSES = 8
GATE = 4
FATAL_WINDOW_S = 1.0

WHICH = st.integers(0, 1000)
SETTINGS = st.sampled_from([None, None, "a", "b"])
FAILURES = ["destination", "connection", "private", "temporary", "permanent"]
FAILURE = st.sampled_from(FAILURES)
STEPS = st.sampled_from([0.0, 0.0, 0.001, 0.01, 0.07, 0.4, 1.0, 1.3, 2.0, 7.0, 29.0, 61.0])
TIMEOUTS = st.sampled_from([0.0, 0.05, 0.5, 3.0, 30.0, 1000.0])

# What each input may do to the slot it names; to other slots see `side_moves`. `_place` has three outcomes.
PLACED = {"leased", "idle", "closing"}
MOVES = {
    "acquire": {("idle", "leased"), ("idle", "closing")},
    "dial_needed": {("connecting", "gone")},
    "dialed": {("connecting", to) for to in PLACED},
    "dial_failed": {("connecting", "gone")},
    "release": {("leased", to) for to in PLACED},
    "abandon": {("leased", to) for to in PLACED},
    "release_touched": {("leased", "resetting")},
    "release_broken": {("leased", "closing")},
    "reset_done": {("resetting", to) for to in PLACED},
    "reset_failed": {("resetting", "closing")},
    "tick": {("idle", "checking"), ("idle", "closing")},
    "check_passed": {("checking", to) for to in PLACED},
    "check_failed": {("checking", "closing")},
    "closed": {("closing", "gone")},
    "drain": {("idle", "closing")},
    "pause": {("idle", "closing")},
    "close": {("idle", "closing")},
    "resize": {("idle", "closing")},
    "refresh": {("idle", "closing")},
    "resume": set(),
    "start": set(),
}
FAILING = {"release_broken", "reset_failed", "check_failed", "dial_failed"}


class Pool(RuleBasedStateMachine):
    """A shell that does its work when it pleases, and a reference that watches."""

    @initialize(
        min_size=st.integers(0, 3),
        extra=st.integers(0, 4),
        max_waiting=st.sampled_from([0, 3, 12, 1000]),
        idle_timeout=st.sampled_from([5.0, 40.0, 300.0]),
        max_lifetime=st.sampled_from([20.0, 1800.0]),
        check_after=st.sampled_from([0.0, 3.0, 30.0]),
        codel=st.sampled_from(["off", "shadow", "on"]),
        seed=st.integers(0, 1000),
        leases=st.integers(0, 6),
        waiters=st.integers(0, 4),
    )
    def new(
        self,
        min_size: int,
        extra: int,
        max_waiting: int,
        idle_timeout: float,
        max_lifetime: float,
        check_after: float,
        codel: str,
        seed: int,
        leases: int,
        waiters: int,
    ) -> None:
        self.m = Machine(
            min_size,
            max(1, min_size + extra),
            max_waiting,
            idle_timeout,
            max_lifetime,
            check_after,
            codel,
            random.Random(seed).random,
        )
        self.now = 1000.0
        self.slots: list[Slot] = []
        # Work of the shell.
        self.to_dial: list[Slot] = []
        self.dialing: list[Slot] = []
        self.to_check: dict[Slot, bool] = {}  # slot: by a ping
        self.to_reset: list[Slot] = []
        self.to_close: list[Slot] = []
        self.leases: list[Slot] = []
        # Borrowers: in line, granted and not yet accepted; and all that have left.
        self.line: list[Waiter] = []
        self.passed: dict[Waiter, int] = {}
        self.granted: list[Waiter] = []
        self.left: list[Waiter] = []
        self.leased_in_all = 0
        # The destination.
        self.epoch = 0
        self.epoch_of: dict[Slot, int] = {}
        self.last_fatal = -NEVER
        self.down = False
        self.expires: dict[Slot, float] = {}
        self.idle_since: dict[Slot, float] = {}
        self.served_until = NEVER
        self.run("start", self.m.start, self.now)
        # Most of what can go wrong goes wrong in a pool at work.
        for _ in range(leases):
            self.acquire(30.0, None, 1)
            self.work(0, 30)
        self.acquire(30.0, None, waiters)

    # -- one input, and what it did ---------------------------------------------------------------------------

    def run(self, name: str, call: Callable[..., Any], *args: Any, slot: Slot | None = None) -> Any:
        """Give the machine one input and follow what it did."""
        m = self.m
        before = {known: known.state() for known in self.slots}
        size = m.size
        result = call(*args)
        if isinstance(result, Waiter):
            self.stand(result)
        elif isinstance(result, Slot) and name == "acquire":
            self.leases.append(result)
            self.leased_in_all += 1
        effects, m.effects = m.effects, []
        ordered = [whom for what, whom in effects if what == OPEN]
        for what, whom in effects:
            self.follow(what, whom, name)
        m.check()
        self.moved(name, before, slot)
        if ordered:
            self.grew(size, ordered)
        return result

    def stand(self, waiter: Waiter) -> None:
        if waiter.refused:
            assert waiter.ring is None
            self.left.append(waiter)
        else:
            self.passed[waiter] = 0
            self.line.append(waiter)

    def follow(self, what: str, whom: Any, name: str) -> None:
        if what == OPEN:
            self.slots.append(whom)
            self.to_dial.append(whom)
            assert whom.opened in set(Opened)
        elif what in (PING, PEEK):
            assert whom not in self.to_check
            self.to_check[whom] = what == PING
            assert (what == PING) == (name == "tick"), "only a tick pings, only a failure peeks"
            if what == PING:
                proved = max(whom.proved, whom.since)
                assert self.now >= proved + 0.75 * self.m.check_after, "pinged too early"
        elif what == RESET:
            self.to_reset.append(whom)
        elif what == CLOSE:
            self.to_close.append(whom)
            self.follow_close(whom)
        elif what == GRANT:
            self.follow_grant(whom)
        elif what == REFUSE:
            assert whom.refused in set(Refused)
            assert whom.slot is None
            ahead = self.line[: self.line.index(whom)]
            if whom.refused == "shed":
                assert self.m.codel_mode == "on"
                assert self.now - whom.since > 0.1, "shed although he has hardly waited"
                for other in ahead:
                    self.passed[other] += 1
            elif whom.refused == "timeout":
                assert self.now >= whom.deadline, "refused before his deadline"
            self.line.remove(whom)
            self.left.append(whom)
        else:
            assert self.m.alarm < NEVER

    def follow_close(self, slot: Slot) -> None:
        assert slot.reason in set(Closed)
        usable = self.m.size - self.m.closing.size - self.m.connecting.size
        if slot.reason == "idle_timeout":
            assert self.now - self.idle_since[slot] >= self.m.idle_timeout * (1 - 1e-9), "closed too early"
            assert usable >= self.m.min_size, "idle timeout undercut the warm minimum"
        elif slot.reason == "max_lifetime":
            assert self.now >= self.expires[slot], "closed before the end of its life"
        elif slot.reason == "surplus":
            assert self.m.size - self.m.closing.size >= self.m.max_size
        elif slot.reason == "stale":
            assert self.epoch_of[slot] < self.epoch, "closed as stale though opened since"

    def follow_grant(self, waiter: Waiter) -> None:
        """First come, first served among equals; the oldest at most PASSES times passed over for affinity."""
        assert self.m.mode != "paused", "granted while paused"
        slot = waiter.slot
        assert slot is not None
        assert slot.epoch == self.m.epoch
        assert self.now < self.expires[slot]
        at = self.line.index(waiter)
        ahead = self.line[:at]
        assert all(other.settings != slot.settings for other in ahead), "an equal who came earlier was passed over"
        assert at < PASSES
        if at:
            assert waiter.settings == slot.settings, "barged without having the settings"
        elif waiter.settings != slot.settings:
            window = self.line[:PASSES]
            tired = [i for i, other in enumerate(window) if self.passed[other] >= PASSES]
            window = window[: tired[0]] if tired else window
            assert all(other.settings != slot.settings for other in window), "somebody wanted these settings"
        for other in ahead:
            self.passed[other] += 1
            assert self.passed[other] <= PASSES, "passed over too often"
        self.line.remove(waiter)
        self.granted.append(waiter)
        self.leased_in_all += 1

    def moved(self, name: str, before: dict[Slot, str], named: Slot | None) -> None:
        """Every move is one of the table."""
        for slot in self.slots:
            old, new = before.get(slot, "gone"), slot.state()
            if (old, new) == ("idle", "idle") or old == new == "leased":
                continue
            if new == "idle" and old != "checking":
                self.idle_since[slot] = self.now
            if old == new:
                continue
            if slot not in before:
                assert new == "connecting", f"{name} made a slot {new}"
            elif slot is named or name in ("acquire", "tick", "drain", "pause", "close", "resize", "refresh"):
                assert (old, new) in MOVES[name], f"{name} moved a slot from {old} to {new}"
            else:
                assert name in FAILING, f"{name} moved another slot from {old} to {new}"
                assert (old, new) in {("idle", "checking"), ("idle", "closing")}
        for slot in [slot for slot in self.slots if slot.state() == "gone"]:
            self.slots.remove(slot)

    def grew(self, size: int, ordered: list[Slot]) -> None:
        """Dials were ordered: were they allowed?"""
        m = self.m
        assert m.size <= m.max_size, "ordered above the limit"
        assert m.mode not in ("paused", "closed")
        assert m.connecting.size <= (1 if self.down else GATE), "more than one dial while the destination is down"
        if any(slot.opened != "attempt" for slot in ordered):
            usable = m.size - m.closing.size - m.connecting.size
            wanted = max(m.waiting.size, m.min_size - usable if m.mode == "running" else 0)
            assert m.connecting.size <= wanted, "more dials than anybody needs"

    # -- failures, as the design tells them --------------------------------------------------------------------

    def expect(self, slot: Slot, failure: str) -> Callable[[], None]:
        """What a failure must do to the idle ones; to be called after the input."""
        idle = self.m.shelf.slots()
        if self.epoch_of[slot] != self.epoch:
            return lambda: self.all_are(idle, "idle")
        if failure == "destination" or (failure == "connection" and self.now - self.last_fatal <= FATAL_WINDOW_S):
            self.new_epoch()
            self.down = True
            return lambda: self.all_are(idle, "closing", "stale")
        if failure == "connection":
            self.last_fatal = self.now
            return lambda: self.all_are(idle, "checking")
        return lambda: self.all_are(idle, "idle")

    def new_epoch(self) -> None:
        self.epoch += 1
        self.last_fatal = -NEVER

    def all_are(self, slots: list[Slot], state: str, reason: str = "") -> None:
        for slot in slots:
            assert slot.state() == state, f"an idle connection is {slot.state()}, should be {state}"
            assert not reason or slot.reason == reason

    # -- borrowers ---------------------------------------------------------------------------------------------

    @rule(timeout=TIMEOUTS, settings=SETTINGS, number=st.sampled_from([1, 1, 1, 2, 5, 12]))
    def acquire(self, timeout: float, settings: object, number: int) -> None:
        for _ in range(number):
            m = self.m
            idle = m.shelf.slots()
            fresh = [slot for slot in idle if self.now < self.expires[slot]]
            waiting = m.waiting.size
            got = self.run("acquire", m.acquire, self.now, timeout, settings)
            if isinstance(got, Slot):
                self.check_choice(got, settings, fresh)
                continue
            assert not fresh, "made to wait, or refused, while a connection was idle"
            if m.mode in ("draining", "closed"):
                assert got.refused == m.mode
            elif timeout == 0:
                assert got.refused == "timeout"
            else:
                assert (got.refused == "queue_full") == (waiting >= m.max_waiting)

    def check_choice(self, got: Slot, settings: object, fresh: list[Slot]) -> None:
        assert got in fresh
        for wanted in (settings, None):
            same = [slot for slot in fresh if slot.settings == wanted]
            if same:
                assert got in same, "another one was cheaper to convert"
                assert self.idle_since[got] == max(self.idle_since[slot] for slot in same), "not the last used"
                return
        assert self.idle_since[got] == max(self.idle_since[slot] for slot in fresh)

    @precondition(lambda self: self.line or self.granted or self.left)
    @rule(which=WHICH)
    def abandon(self, which: int) -> None:
        """In line, after the grant, or when all is over: a borrower may leave at any moment."""
        known = self.granted + self.line + self.left
        waiter = known[which % len(known)]
        slot, refused = waiter.slot, waiter.refused
        for place in (self.granted, self.line):
            if waiter in place:
                place.remove(waiter)
                self.left.append(waiter)
        self.run("abandon", self.m.abandon, waiter, self.now, slot=slot)
        assert (waiter.refused, waiter.slot, waiter.ring) == (refused, None, None)

    @precondition(lambda self: self.granted)
    @rule(which=WHICH)
    def accept(self, which: int) -> None:
        waiter = self.granted.pop(which % len(self.granted))
        self.left.append(waiter)
        slot = self.run("accept", self.m.accept, waiter)
        assert slot.state() == "leased"
        self.leases.append(slot)

    def lease(self, which: int) -> Slot:
        return self.leases.pop(which % len(self.leases))

    @precondition(lambda self: self.leases)
    @rule(which=WHICH, settings=SETTINGS)
    def release(self, which: int, settings: object) -> None:
        slot = self.lease(which)
        slot.settings = settings
        self.place("release", self.m.release, slot)

    @precondition(lambda self: self.leases)
    @rule(which=WHICH)
    def release_touched(self, which: int) -> None:
        slot = self.lease(which)
        self.run("release_touched", self.m.release_touched, slot, self.now, slot=slot)

    @precondition(lambda self: self.leases)
    @rule(which=WHICH, failure=FAILURE)
    def release_broken(self, which: int, failure: str) -> None:
        self.fail("release_broken", self.m.release_broken, self.lease(which), "broken", failure)

    @precondition(lambda self: self.leases)
    @rule(which=WHICH, timeout=TIMEOUTS, settings=SETTINGS)
    def dead_at_the_door(self, which: int, timeout: float, settings: object) -> None:
        """A borrower finds his connection closed by the server, and asks again: he is the first in line."""
        self.fail("release_broken", self.m.release_broken, self.lease(which), "server_closed", "private")
        idle = self.m.shelf.slots()
        got = self.run("acquire", self.m.acquire, self.now, timeout, settings, None, True)
        if isinstance(got, Waiter):
            assert not [slot for slot in idle if self.now < self.expires[slot]]
            if not got.refused:
                self.line.remove(got)
                self.line.insert(0, got)
            else:
                assert got.refused == "closed" if self.m.mode == "closed" else timeout == 0

    # -- the shell's work --------------------------------------------------------------------------------------

    def place(self, name: str, call: Callable[..., Any], slot: Slot, *args: Any) -> None:
        """An input that ends in `_place`: an old connection is never used again."""
        stale = self.epoch_of[slot] != self.epoch
        old = self.now >= self.expires[slot]
        surplus = self.m.size - self.m.closing.size > self.m.max_size
        self.run(name, call, slot, self.now, *args, slot=slot)
        if stale or old or surplus:
            assert slot.state() == "closing"
            assert slot.reason == ("stale" if stale else "max_lifetime" if old else "surplus")

    def fail(self, name: str, call: Callable[..., Any], slot: Slot, *args: str) -> None:
        """An input that says that a connection failed."""
        verify = self.expect(slot, args[-1])
        self.run(name, call, slot, self.now, *args, slot=slot)
        verify()

    @precondition(lambda self: self.to_dial)
    @rule(which=WHICH)
    def ask_dial(self, which: int) -> None:
        slot = self.to_dial.pop(which % len(self.to_dial))
        m = self.m
        usable = m.size - m.closing.size - m.connecting.size
        above = m.size > m.max_size
        asked = m.waiting.size >= m.connecting.size or slot.opened == "attempt"
        if self.run("dial_needed", m.dial_needed, slot, self.now, slot=slot):
            self.dialing.append(slot)
            self.epoch_of[slot] = self.epoch
            assert not above, "dialed although the limit was lowered meanwhile"
            assert m.mode not in ("paused", "closed")
            assert asked or usable < m.min_size
        else:
            assert slot.state() == "gone"
            assert above or m.mode != "running" or not asked

    @precondition(lambda self: self.dialing)
    @rule(which=WHICH, settings=SETTINGS)
    def dialed(self, which: int, settings: object) -> None:
        slot = self.dialing.pop(which % len(self.dialing))
        slot.settings = settings
        self.down = False
        life = self.m.max_lifetime
        # Known after the input only, and needed during it: the jitter is the machine's next random number.
        self.expires[slot] = self.now + 0.9 * life
        self.place("dialed", self.m.dialed, slot)
        assert self.now + 0.9 * life <= slot.expires <= self.now + life
        self.expires[slot] = slot.expires

    @precondition(lambda self: self.dialing)
    @rule(which=WHICH, failure=FAILURE)
    def dial_failed(self, which: int, failure: str) -> None:
        slot = self.dialing.pop(which % len(self.dialing))
        m = self.m
        self.down = True
        alive = m.size - m.closing.size - 1
        line = list(self.line)
        # Only the destination's own failure says something of connections that were open already.
        verify = self.expect(slot, failure if failure == "destination" else "private")
        self.run("dial_failed", m.dial_failed, slot, self.now, failure, slot=slot)
        verify()
        refused = failure == "permanent" and not alive
        assert all((waiter.refused == "connect_failed") == refused for waiter in line)

    @precondition(lambda self: self.to_check)
    @rule(which=WHICH)
    def check_passed(self, which: int) -> None:
        slot = list(self.to_check)[which % len(self.to_check)]
        pinged = self.to_check.pop(slot)
        idle_since = slot.since
        self.place("check_passed", self.m.check_passed, slot, pinged)
        if slot.state() == "idle":
            assert slot.since == idle_since, "being looked at is not being used"
            assert not pinged or slot.proved == self.now

    @precondition(lambda self: self.to_check)
    @rule(which=WHICH, failure=FAILURE)
    def check_failed(self, which: int, failure: str) -> None:
        slot = list(self.to_check)[which % len(self.to_check)]
        del self.to_check[slot]
        self.fail("check_failed", self.m.check_failed, slot, "check_failed", failure)

    @precondition(lambda self: self.to_reset)
    @rule(which=WHICH)
    def reset_done(self, which: int) -> None:
        slot = self.to_reset.pop(which % len(self.to_reset))
        slot.settings = None
        self.place("reset_done", self.m.reset_done, slot)

    @precondition(lambda self: self.to_reset)
    @rule(which=WHICH, failure=FAILURE)
    def reset_failed(self, which: int, failure: str) -> None:
        slot = self.to_reset.pop(which % len(self.to_reset))
        self.fail("reset_failed", self.m.reset_failed, slot, failure)

    @precondition(lambda self: self.to_close)
    @rule(which=WHICH)
    def closed(self, which: int) -> None:
        slot = self.to_close.pop(which % len(self.to_close))
        self.run("closed", self.m.closed, slot, self.now, slot=slot)

    @rule(which=WHICH, number=st.integers(1, 10))
    def work(self, which: int, number: int) -> None:
        """Some of the work gets done, all of it well."""
        for _ in range(number):
            if self.to_dial:
                self.ask_dial(which)
            elif self.dialing:
                self.dialed(which, None)
            elif self.to_check:
                self.check_passed(which)
            elif self.to_reset:
                self.reset_done(which)
            elif self.to_close:
                self.closed(which)
            elif self.granted:
                self.accept(which)

    # -- operators and time ------------------------------------------------------------------------------------

    @precondition(lambda self: self.slots)
    @rule(seconds=st.sampled_from([0.0, 1.0, 10.0]))
    def drain(self, seconds: float) -> None:
        if self.m.mode != "closed":
            self.served_until = self.now + seconds
        self.run("drain", self.m.drain, self.now, self.now + seconds)
        assert self.m.mode in ("draining", "closed")

    @precondition(lambda self: self.slots)
    @rule()
    def pause(self) -> None:
        before = self.m.mode
        self.run("pause", self.m.pause, self.now)
        assert self.m.mode == ("paused" if before == "running" else before)

    @precondition(lambda self: self.m.mode in ("paused", "draining"))
    @rule()
    def resume(self) -> None:
        self.served_until = NEVER
        self.run("resume", self.m.resume, self.now)
        assert self.m.mode == "running"

    @precondition(lambda self: self.m.mode != "closed" and self.leased_in_all > 6)
    @rule()
    def close(self) -> None:
        self.run("close", self.m.close, self.now)
        assert not self.line

    @precondition(lambda self: self.slots)
    @rule(min_size=st.integers(0, 3), extra=st.integers(0, 5))
    def resize(self, min_size: int, extra: int) -> None:
        self.run("resize", self.m.resize, self.now, min_size, max(1, min_size + extra))
        alive = self.m.size - self.m.closing.size
        assert alive <= self.m.max_size or not self.m.shelf.size(), "above the limit with idle connections left"

    @precondition(lambda self: self.m.shelf.size() or self.leases or self.dialing)
    @rule()
    def refresh(self) -> None:
        idle = self.m.shelf.slots()
        self.new_epoch()
        self.run("refresh", self.m.refresh, self.now)
        self.all_are(idle, "closing", "stale")

    @rule(step=STEPS)
    def tick(self, step: float) -> None:
        self.now += step
        self.on_tick()

    @precondition(lambda self: self.m.alarm < NEVER)
    @rule()
    def tick_at_the_alarm(self) -> None:
        self.now = max(self.now, self.m.alarm)
        self.on_tick()

    def on_tick(self) -> None:
        m = self.m
        self.run("tick", m.tick, self.now)
        assert m.alarm > self.now, "a tick that asks for itself again at once"
        assert all(waiter.deadline > self.now for waiter in self.line), "waits longer than he wanted"
        if self.now >= self.served_until:
            self.served_until = NEVER
            assert not self.line, "in line after the deadline of the drain"
        for slot in m.shelf.slots():
            assert self.now < slot.expires, "idle and too old"
            assert not m.check_after or self.now < max(slot.proved, slot.since) + m.check_after, "not checked"

    # -- after each step ---------------------------------------------------------------------------------------

    @invariant()
    def no_work_is_lost(self) -> None:
        """Where the machine waits for the shell, the shell has been told."""
        m = self.m
        assert set(m.connecting) == {*self.to_dial, *self.dialing}
        assert set(m.checking) == set(self.to_check)
        assert set(m.resetting) == set(self.to_reset)
        assert set(m.closing) == set(self.to_close)
        assert set(m.leased) == {*self.leases, *(waiter.slot for waiter in self.granted)}
        assert m.leased.size == len(self.leases) + len(self.granted)

    @invariant()
    def nobody_is_lost(self) -> None:
        """Every waiter is in line in order, or granted, or gone; each ended once."""
        assert list(self.m.waiting) == self.line
        assert len(set(self.left)) == len(self.left)
        assert all(waiter.slot is None and waiter.ring is None for waiter in self.left)
        assert all(waiter.slot is not None and not waiter.refused for waiter in self.granted)

    @invariant()
    def numbers_add_up(self) -> None:
        m = self.m
        opened = sum(m.opened_by.values())
        never_opened = m.closed_by.get("dial_failed", 0) + m.closed_by.get("not_needed", 0)
        closed = sum(m.closed_by.values()) - never_opened
        assert opened - closed == m.size - m.connecting.size - m.closing.size
        assert m.acquired == self.leased_in_all
        assert m.epoch == self.epoch

    # -- the end -----------------------------------------------------------------------------------------------

    def perform(self) -> None:
        """Everything works, at once, and every lease comes back."""
        m = self.m
        while m.leased.size or m.connecting.size or m.checking.size or m.resetting.size or m.closing.size:
            self.work(0, 1)
            if self.leases:
                self.release(0, None)

    def teardown(self) -> None:
        """Whatever happened: once all works, everybody is served and the pool comes to rest at its minimum."""
        if not hasattr(self, "m"):
            return
        m = self.m
        if m.mode == "paused":
            self.resume()
        self.perform()
        while self.line and m.alarm <= self.now + 2.0:  # the longest pause after a failed dial
            self.tick_at_the_alarm()
            self.perform()
        assert not self.line, "somebody still waits though everything works"
        rest = self.now + 3 * max(m.idle_timeout, 40.0)
        self.perform()
        while m.alarm <= rest:
            self.tick_at_the_alarm()
            self.perform()
        self.no_work_is_lost()
        self.nobody_is_lost()
        self.numbers_add_up()
        warm = m.min_size if m.mode == "running" else 0
        assert m.shelf.size() == m.size == warm, f"{m.size} connections at rest, the minimum is {warm}"


TestPool = Pool.TestCase
