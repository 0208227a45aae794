"""One bound for all pools of a server, divided fairly.

Anybody may use room that is there. When there is none, a pool that needs a connection and has less than its share
gets one at the cost of a pool that has more than its own: an idle one if there is one, else the next that comes
back. Shares are max-min fair on measured demand: nobody gets more than it needs, each gets its floor first, and
what is left is divided equally among those who want more (Bertsekas and Gallager, "Data Networks", 6.5.2).
A greedy pool can use what the others leave, and nothing else.

Like the machine it is pure: it is told the time, and moves machines by their inputs; whoever calls `serve` or
`tick` performs the effects of the machines they return. It knows nothing of servers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from cenote.core.growth import Gate
from cenote.core.machine import RUNNING, Machine
from cenote.core.slot import NEVER

WINDOW_S = 15.0  # demand is the most seen in this window and the one before
TURN_S = 0.5  # where there are fewer connections than pools, how long one keeps its turn
REFUSED_S = 60.0  # how long a server that refused a connection is asked for no more than it had given
GRACE_S = 1.0  # how long idle until a pool that has its share already may take it


class Cap:
    """A bound of some of the pools, such as those of one database. `used` counts their connections."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.used = 0


class Share:
    """What one pool has a right to.

    floor: connections it gets first
    demand: connections it had use for lately
    fair: its share of the bound, as of the last look
    """

    def __init__(self, machine: Machine, floor: int, caps: Sequence[Cap]) -> None:
        self.machine = machine
        self.floor = floor
        self.caps = caps
        self.demand = 0
        self.fair = 0
        self.hungry_since = NEVER
        self.turn_ends = -NEVER
        self._peak = 0
        self._peak_before = 0
        self._window = -NEVER

    def measure(self, now: float) -> None:
        """Look at what it could use now, and at what it has used lately. O(its idle connections)"""
        m = self.machine
        busy = self.needs()
        for slot in m.shelf.slots():
            busy += slot.uses > 0 and now - slot.since < WINDOW_S
        if now >= self._window + WINDOW_S:
            self._peak_before = self._peak if now < self._window + 2 * WINDOW_S else 0
            self._peak = 0
            self._window = now
        self._peak = max(self._peak, busy)
        self.demand = min(max(self._peak, self._peak_before), m.max_size)

    def needs(self) -> int:
        """How many connections it could use at this moment."""
        m = self.machine
        return m.leased.size + m.resetting.size + m.waiting.size

    def rank(self, now: float) -> tuple[bool, bool, int, float]:
        """Who comes first where there is not enough for all: those who need something now; of them those whose
        turn it is, then those who have least, then those who are hungry for longest."""
        in_turn = now < self.turn_ends
        return (not self.needs(), not in_turn, 0 if in_turn else self.alive(), self.hungry_since)

    def alive(self) -> int:
        """Connections that are not on their way out."""
        return self.machine.size - self.machine.closing.size

    def owes(self) -> int:
        """Connections that it gives up when they come back."""
        return max(0, self.alive() - self.machine.limit)

    def spare(self) -> int:
        """Connections above its share that it is not to give up already."""
        return min(self.alive(), self.machine.limit) - self.fair


class Budget:
    """The bound of one server.

    most: connections that there may be; limit: those the server has shown to give, if that is less
    used: connections that there are, dying ones included
    max_idle: how many of them may be idle
    gate: the way in, which its pools share
    hungry: pools that need what they cannot have, longest first; cold: that wait at the gate for their minimum
    taken, idled: connections that changed hands; that were closed as too many idle ones
    """

    def __init__(self, limit: int, max_idle: int, random: Callable[[], float]) -> None:
        self.most = limit
        self.limit = limit
        self.lowered_until = -NEVER
        self.max_idle = max_idle
        self.gate = Gate(random)
        self.used = 0
        self.shares: dict[Machine, Share] = {}
        self.hungry: dict[Machine, Share] = {}
        self.cold: dict[Machine, None] = {}
        self._feeding: Machine | None = None
        self._portion = 0
        self.taken = 0
        self.idled = 0

    # -- the machines -----------------------------------------------------------------------------------------

    def join(self, machine: Machine, floor: int, caps: Sequence[Cap] = ()) -> None:
        """A pool that has no connections yet."""
        machine.budget = self
        machine.growth.gate = self.gate
        self.shares[machine] = Share(machine, floor, caps)

    def leave(self, machine: Machine) -> None:
        """A pool that is no more. What it still has counts until it is gone."""
        self.hungry.pop(machine, None)
        self.cold.pop(machine, None)
        if not machine.size:
            self.shares.pop(machine, None)

    def room(self, machine: Machine) -> int:
        """How many connections more this pool may open now. O(caps)"""
        if machine is self._feeding:
            return self._portion
        return 0 if self.hungry else self._free(machine)  # else it has to stand in line

    def _free(self, machine: Machine) -> int:
        room = self.limit - self.used
        for cap in self.shares[machine].caps:
            room = min(room, cap.most - cap.used)
        return room

    def warm_room(self) -> int:
        """How many may be opened for nobody but the warm minimum. O(pools)"""
        if self.hungry:
            return 0
        return max(0, self.max_idle - self.idle() - self.gate.pending)

    def idle(self) -> int:
        """Connections that nobody uses. O(pools)"""
        return sum(machine.shelf.size() for machine in self.shares)

    def took(self, machine: Machine) -> None:
        """This pool has ordered a connection."""
        self.used += 1
        for cap in self.shares[machine].caps:
            cap.used += 1

    def gave(self, machine: Machine) -> None:
        """One of its connections is gone."""
        self.used -= 1
        for cap in self.shares[machine].caps:
            cap.used -= 1

    def hungers(self, machine: Machine, now: float) -> bool:
        """This pool lacks room or a way in; whether that is news."""
        if machine in self.hungry:
            return False
        share = self.shares[machine]
        share.hungry_since = now
        self.hungry[machine] = share
        return True

    def waits_cold(self, machine: Machine) -> None:
        """This pool has not its warm minimum, because others are at the gate."""
        self.cold[machine] = None

    def resize(self, now: float, most: int, max_idle: int) -> None:
        """Move the bound. What is above it goes bit by bit, at the next ticks."""
        self.most = most
        self.max_idle = max_idle
        self.limit = min(self.limit, most) if now < self.lowered_until else most

    def refused(self, now: float) -> None:
        """The server has refused a dial, which counts still: ask for no more than the rest, for a while."""
        self.limit = max(1, min(self.limit, self.used - 1))
        self.lowered_until = now + REFUSED_S

    # -- fairness ---------------------------------------------------------------------------------------------

    def serve(self, now: float) -> list[Machine]:
        """Give the hungry what there is, and take for them what others have too much of.

        Returns the machines that have effects to perform. To be called when a machine says SERVE, and every now
        and then while somebody is hungry. O(pools log pools)
        """
        for share in list(self.hungry.values()):
            m = share.machine
            if m.waiting.size <= m.connecting.size or m.mode != RUNNING:
                self._fed(share)
        touched: dict[Machine, None] = {}
        if not self.hungry:
            self._warm(now, touched)
            return list(touched)
        self.divide(now)
        entitled = [share for share in self.hungry.values() if share.alive() < share.fair]
        others = [share for share in self.hungry.values() if share.alive() >= share.fair]
        for share in entitled + others:
            self._feed(share, now, touched)
        # What is on its way out, or to be given up, will be room; and it is nobody's in particular.
        promised: dict[Cap | None, int] = {}
        soon: dict[Cap | None, int] = {}
        for share in entitled:
            if share.machine in self.hungry:
                self._take(share, promised, soon, now, touched)
        # A thousand hungry pools that each look through a thousand others take half a second: only if it can help.
        rested = [slot.since <= now - GRACE_S for m in self.shares if (slot := m.shelf.oldest()) is not None]
        for share in others if any(rested) else ():
            if share.machine in self.hungry and self._soon(share, soon) < self.gate.width():
                got = self._take_idle(share, self._rivals(share), 1, now - GRACE_S, touched)
                soon[self._full(share)] += got
        return list(touched)

    def divide(self, now: float) -> None:
        """Say what is whose share. O(pools log pools)"""
        shares = list(self.shares.values())
        for share in shares:
            share.measure(now)
        shares.sort(key=lambda share: share.rank(now))
        most = {share: share.demand for share in shares}
        for cap in {cap: None for share in shares for cap in share.caps}:
            members = [share for share in shares if cap in share.caps]
            got = max_min(cap.most, [(min(share.floor, most[share]), most[share]) for share in members])
            most.update(zip(members, (fair for fair, _ in got), strict=True))
        wanted = [(min(share.floor, most[share]), most[share]) for share in shares]
        for share, (fair, extra) in zip(shares, max_min(self.limit, wanted), strict=True):
            share.fair = fair
            if extra and share.alive() < fair:
                share.turn_ends = now + TURN_S

    def tick(self, now: float) -> list[Machine]:
        """Every second or so: look at the demand, close what is above the bounds. As `serve`."""
        touched: dict[Machine, None] = {}
        if self.limit < self.most and now >= self.lowered_until:
            self.limit = self.most
        self.divide(now)
        shares = list(self.shares.values())
        before = self.taken
        surplus = self.idle() - self.max_idle
        self._close_idle(shares, surplus, now, touched, lambda share: share.floor)
        surplus = self.used - self.limit - sum(share.machine.closing.size + share.owes() for share in shares)
        surplus -= self._close_idle(shares, surplus, now, touched, lambda _: 0)
        self._take_richest(shares, surplus, touched)
        self.idled += self.taken - before
        self.taken = before
        for machine in self.serve(now):
            touched[machine] = None
        if not self.hungry and self.used <= self.limit:
            for machine in self.shares:
                if machine.limit < machine.max_size or machine.size < machine.min_size:
                    machine.allow(now, machine.max_size)
                    touched[machine] = None
        return list(touched)

    def check(self) -> None:
        """Raise AssertionError where the account does not add up. O(pools)"""
        assert self.used == sum(machine.size for machine in self.shares), "connections are miscounted"
        for cap in {cap for share in self.shares.values() for cap in share.caps}:
            members = [share.machine for share in self.shares.values() if cap in share.caps]
            assert cap.used == sum(machine.size for machine in members), "a cap is miscounted"
        pending = sum(machine.connecting.size for machine in self.shares)
        assert self.gate.pending == pending, "dials under way are miscounted"

    # -- moves ------------------------------------------------------------------------------------------------

    def _fed(self, share: Share) -> None:
        del self.hungry[share.machine]
        share.hungry_since = NEVER

    def _feed(self, share: Share, now: float, touched: dict[Machine, None]) -> None:
        """Let it dial, as far as there is room. One that has less than its share gets no more than that: the gate
        is narrow, and those behind it in line would have to take back what it got beyond."""
        m = share.machine
        room = self._free(m)
        if room <= 0 or self.gate.pending >= self.gate.width():
            return
        self._fed(share)
        self._feeding = m
        self._portion = min(room, share.fair - share.alive()) if share.alive() < share.fair else room
        m.allow(now, max(m.limit, m.size + self._portion))
        self._feeding = None
        touched[m] = None

    def _warm(self, now: float, touched: dict[Machine, None]) -> None:
        """Let those at the gate have their warm minimum."""
        while self.cold and self.gate.pending < self.gate.width():
            machine = next(iter(self.cold))
            del self.cold[machine]
            machine.allow(now, machine.limit)
            touched[machine] = None
            if machine in self.cold:
                break

    def _take(
        self,
        share: Share,
        promised: dict[Cap | None, int],
        soon: dict[Cap | None, int],
        now: float,
        touched: dict[Machine, None],
    ) -> None:
        """For a pool that has less than its share: so many as it needs and will not have anyway.

        Idle ones are closed only as fast as the gate lets others in: room that nobody can dial into yet is of no
        use, and an idle connection is."""
        m = share.machine
        full = self._full(share)
        idle = self.gate.width() - self._soon(share, soon)
        if full not in promised:
            promised[full] = soon[full] + sum(member.owes() for member in [share, *self._rivals(share)])
        wanted = min(m.waiting.size - m.connecting.size, share.fair - share.alive())
        used = min(wanted, promised[full])
        promised[full] -= used
        wanted -= used
        idle = min(wanted, idle)
        if idle <= 0:
            return
        rivals = self._rivals(share)
        got = self._take_idle(share, rivals, idle, now, touched)
        soon[full] += got
        if got < idle:
            self._take_richest(rivals, wanted - got, touched)

    def _soon(self, share: Share, soon: dict[Cap | None, int]) -> int:
        """How much room there is for it already, or will be without anybody's doing. `soon` is kept for a look."""
        full = self._full(share)
        if full not in soon:
            closing = sum(member.machine.closing.size for member in [share, *self._rivals(share)])
            soon[full] = max(0, self._free(share.machine)) + closing
        return soon[full]

    def _take_richest(self, rivals: list[Share], wanted: int, touched: dict[Machine, None]) -> None:
        """Have those who have most above their share give up the next connections that come back."""
        for _ in range(wanted):
            richest = max(rivals, key=Share.spare, default=None)
            if richest is None or richest.spare() <= 0:
                return
            richest.machine.give_way(False)
            touched[richest.machine] = None
            self.taken += 1

    def _take_idle(
        self, share: Share, rivals: list[Share], wanted: int, before: float, touched: dict[Machine, None]
    ) -> int:
        """Close idle connections of others: above their share, then above their floor; below it for a pool that
        has none at all. Returns how many."""
        idle = [
            rival
            for rival in rivals
            if (shelf := rival.machine.shelf).size()
            and (slot := shelf.oldest()) is not None
            and slot.since <= before
        ]
        got = self._close_idle(idle, wanted, before, touched, lambda rival: max(rival.fair, rival.floor))
        got += self._close_idle(idle, wanted - got, before, touched, lambda rival: rival.floor)
        if not share.alive() and share.floor:
            got += self._close_idle(idle, wanted - got, before, touched, lambda _: 0)
        return got

    def _close_idle(
        self,
        idle: list[Share],
        wanted: int,
        before: float,
        touched: dict[Machine, None],
        keeps: Callable[[Share], int],
    ) -> int:
        """Close the longest idle of these pools, each of which keeps so many."""
        got = 0
        while got < wanted:
            found = None
            since = NEVER
            for share in idle:
                slot = share.machine.shelf.oldest()
                if (
                    slot is not None
                    and slot.since < since
                    and slot.since <= before
                    and share.alive() > keeps(share)
                ):
                    found, since = share, slot.since
            if found is None:
                break
            found.machine.give_way(True)
            touched[found.machine] = None
            self.taken += 1
            got += 1
        return got

    def _full(self, share: Share) -> Cap | None:
        """The cap that stands in its way; None: it is the server's bound."""
        for cap in share.caps:
            if cap.used >= cap.most:
                return cap
        return None

    def _rivals(self, share: Share) -> list[Share]:
        """From whom it could get room."""
        full = self._full(share)
        return [
            other for other in self.shares.values() if other is not share and (full is None or full in other.caps)
        ]


def max_min(limit: int, wanted: list[tuple[int, int]]) -> list[tuple[int, bool]]:
    """Divide `limit` among those who want (at least, at most): max-min fair, in whole numbers.

    Returns for each what it gets, and whether the last of that is a matter of luck: there was not enough to give
    it to all, and those who stand first had it. O(n log most)
    """

    def at(level: int) -> int:
        return sum(min(most, max(least, level)) for least, most in wanted)

    least_sum = sum(least for least, _ in wanted)
    if least_sum > limit:
        found = []
        for least, _ in wanted:
            got = min(least, limit)
            limit -= got
            found.append((got, got > 0))
        return found
    low, high = 0, max((most for _, most in wanted), default=0)
    while low < high:  # the highest level that there is enough for
        middle = (low + high + 1) // 2
        if at(middle) <= limit:
            low = middle
        else:
            high = middle - 1
    left = limit - at(low)
    shares = []
    for least, most in wanted:
        got = min(most, max(least, low))
        lucky = left > 0 and got < most and got == low
        left -= lucky
        shares.append((got + lucky, lucky))
    return shares
