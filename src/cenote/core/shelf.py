"""The idle slots, ordered by when they came back, and found by the settings they carry.

Taken last in, first out: what was used last is warm, and what is not needed grows old enough to be closed.
One ring for each distinct settings value; the ring of the base state is always there, others only while
they hold something. Does not decide how long a slot may stay.
"""

from __future__ import annotations

from collections.abc import Callable

from cenote.core.ring import Ring
from cenote.core.slot import NEVER, Slot


class Shelf:
    """All slots in state IDLE.

    cost: what it costs to make a slot carry settings that it does not carry now: a number; None: all the same
    """

    def __init__(self) -> None:
        self.cost: Callable[[Slot, object], int] | None = None
        self.bare = Ring("idle")
        self.rings: dict[object, Ring] = {None: self.bare}

    def size(self) -> int:
        """O(number of distinct settings on the shelf)."""
        if len(self.rings) == 1:
            return int(self.bare.size)
        return sum([ring.size for ring in self.rings.values()])

    def best(self, settings: object) -> Slot | None:
        """The slot that is cheapest to lend to somebody who wants `settings`: one that carries them, else the one
        of least cost; without costs one in base state, else any; among equals the one used last.

        O(1), or O(number of distinct settings on the shelf) when none carries them."""
        if settings is not None:
            ring = self.rings.get(settings)
            if ring is not None:
                return ring.last  # type: ignore[no-any-return]
        if len(self.rings) == 1 or (self.bare.last is not None and (self.cost is None or settings is None)):
            return self.bare.last  # type: ignore[no-any-return]
        if self.cost is not None:
            return self._cheapest(settings)
        return max([ring.last for ring in self.rings.values() if ring.size], key=_since)  # type: ignore[no-any-return]

    def _cheapest(self, settings: object) -> Slot | None:
        cheapest, least = None, NEVER
        for ring in self.rings.values():
            slot = ring.last
            if slot is not None and self.cost is not None:
                cost = self.cost(slot, settings)
                if cost < least or (cost == least and cheapest is not None and slot.since > cheapest.since):
                    cheapest, least = slot, cost
        return cheapest

    def oldest(self) -> Slot | None:
        """The slot that has been idle for longest. O(number of distinct settings on the shelf)."""
        return min([ring.first for ring in self.rings.values() if ring.size], key=_since, default=None)

    def slots(self) -> list[Slot]:
        """All of them, within equal settings the oldest first."""
        return [slot for ring in list(self.rings.values()) for slot in ring]

    def put(self, slot: Slot) -> None:
        """Add, in order of `slot.since`: O(1) for one that just came back, O(n) for one that was only checked."""
        ring = self.bare
        if slot.settings is not None:
            ring = self.rings.get(slot.settings) or self.rings.setdefault(slot.settings, Ring("idle"))
        older = ring.last
        while older is not None and older.since > slot.since:
            older = older.before
        if older is None:
            ring.appendleft(slot)
        else:
            ring.insert_after(slot, older)

    def remove(self, slot: Slot) -> None:
        """Take out. O(1)."""
        ring = slot.ring
        if ring is None or ring.name != "idle":
            raise ValueError(f"illegal move: the slot is {slot.state()}, not idle")
        ring.remove(slot)
        if ring.size == 0 and ring is not self.bare:
            del self.rings[slot.settings]


def _since(slot: Slot) -> float:
    return slot.since if slot is not None else -NEVER
