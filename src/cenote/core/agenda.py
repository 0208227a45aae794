"""What is due when: deadlines of waiters, the next look at an idle slot. A heap of times, no clock.

Cancelling is lazy: a waiter that was served leaves its entry behind, a slot that was used meanwhile is only
looked at and scheduled anew (one heap operation in half a minute instead of two a lease). Once dead entries
are the majority they are swept out, so memory follows those who really wait.
"""

from __future__ import annotations

from heapq import heapify, heappop, heappush

from cenote.core.ring import Node
from cenote.core.slot import NEVER, Slot

SWEEP_FROM = 64


class Agenda:
    """Entries `(when, ticket, node)`, earliest first; equal times in order of entry."""

    def __init__(self) -> None:
        self.heap: list[tuple[float, int, Node]] = []
        self.ticket = 0

    def add(self, when: float, node: Node) -> None:
        """Note that `node` is due at `when`. O(log n)."""
        self.ticket += 1
        heappush(self.heap, (when, self.ticket, node))
        if isinstance(node, Slot):
            node.timed = True

    def first(self) -> float:
        """When the earliest entry is due, dead or not; NEVER if there is none. O(1)."""
        return self.heap[0][0] if self.heap else NEVER

    def pop_due(self, now: float) -> Node | None:
        """The next node whose time has come, out of the agenda; None when there is none. O(log n)."""
        if not self.heap or self.heap[0][0] > now:
            return None
        node = heappop(self.heap)[2]
        if isinstance(node, Slot):
            node.timed = False
        return node

    def sweep(self, alive: int) -> None:
        """Drop the entries of waiters and slots that are gone, if they are the majority. O(1) amortised.

        :param alive: waiters in line and slots, each of which has one entry at most
        """
        if len(self.heap) > 2 * alive + SWEEP_FROM:
            self.heap = [entry for entry in self.heap if entry[2].ring is not None]
            heapify(self.heap)
