"""Where a `Pool` lends and takes back when nothing stands in the way: the common case, in the fewest steps.

An idle connection that needs no look, a clean connection that comes back: everything else is refused here
(None, False: nothing was done) and goes the long way through `Pool`. The same machine, the same lock.
"""

from __future__ import annotations

from collections.abc import Callable
from threading import get_ident
from typing import Any

from cenote.core.machine import RUNNING, Machine
from cenote.core.slot import Slot
from cenote.pool.link import Link


class Desk:
    """The short way over one machine.

    :param flush: performs the machine's effects; called without the lock
    :param rest_s: a connection idle for this long needs a look first (0: every one does)
    :param plain: nothing has to be done to a connection that comes back clean
    """

    def __init__(
        self,
        machine: Machine,
        lock: Any,
        lent: dict[int, Link],
        condition: Callable[[Any], int],
        clock: Callable[[], float],
        flush: Callable[[], None],
        rest_s: float,
        plain: bool,
    ) -> None:
        self.machine = machine
        self.take = lock.acquire
        self.let = lock.release
        self.lent = lent
        self.condition = condition
        self.clock = clock
        self.flush = flush
        self.rest_s = rest_s
        self.plain = plain
        self.in_query_s = 0.0

    def lend(self, scoped: bool) -> Any:
        """A connection, or None: go the long way."""
        machine = self.machine
        slot = None
        try:
            now = self.clock()
            self.take()
            try:
                best = machine.shelf.bare.last
                if best is None or machine.effects or now - best.since >= self.rest_s or now >= best.expires:
                    return None
                slot = machine.acquire(now, 0.0)
            finally:
                self.let()
            link = slot.data
            conn = link.lend(get_ident(), scoped)
            self.lent[link.key] = link
            return conn
        except BaseException:
            # Interrupted between two steps of ours: the lease must not be lost with this frame.
            if slot is not None:
                self._lost(slot)
            raise

    def take_back(self, conn: Any) -> bool:
        """Put a clean connection back; False: go the long way (also when it is not on loan at all)."""
        link = self.lent.get(id(conn))
        if link is None or not self.plain:
            return False
        session = link.session
        if session.touched or session.attributes or self.condition(conn):
            return False
        machine = self.machine
        slot = link.slot
        effects = False
        now = self.clock()
        try:
            self.take()
            try:
                if machine.waiting.size or machine.effects or machine.mode != RUNNING:
                    return False
                if self.lent.pop(link.key, None) is not link:
                    return False
                link.conn = conn
                machine.release(slot, now)
                if session.statements:
                    self.in_query_s += session.in_query_s
                    session.in_query_s = 0.0
                    session.statements = 0
                if machine.effects:
                    effects = True
            finally:
                self.let()
        except BaseException:
            if link.conn is conn and slot.ring is machine.leased:
                self._lost(slot)
            raise
        if effects:
            self.flush()
        return True

    def _lost(self, slot: Slot) -> None:
        link = slot.data
        if self.lent.get(link.key) is link:
            del self.lent[link.key]
        self.take()
        try:
            self.machine.release_broken(slot, self.clock(), "broken", "private")
        finally:
            self.let()
        self.flush()
