"""Where a `Pool` lends and takes back: the common case in the fewest steps, the base class of `Pool`.

An idle connection that needs no look, a clean connection that comes back: that is done here, between two
calls of the machine. Everything else (None, False: nothing was done) goes the long way, which `Pool` has:
`_borrow`, `_give_back`. The same machine, the same lock. A class of its own because it is compiled with C
types, which nearly halves what an uncontended acquire and release cost.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from threading import get_ident
from types import TracebackType
from typing import Any

from cenote.core.machine import RUNNING, Machine
from cenote.core.slot import Slot


class Desk:
    """The short way over one machine. `_furnish` comes first."""

    def _furnish(
        self,
        machine: Machine,
        lock: Any,
        lent: dict[int, Any],  # of Link, never None
        driver: Any,
        clock: Callable[[], float],
        rest_s: float,
        plain: bool,
    ) -> None:
        """
        :param rest_s: a connection idle for this long needs a look first (0: every one does)
        :param plain: nothing has to be done to a connection that comes back clean
        """
        self._machine = machine
        # Taken by `with` only: an interrupt between `lock.acquire()` and a `try` would leave it locked for ever.
        self._gate = lock
        self._locked = lock.locked
        self._lent = lent
        self._driver = driver
        self._condition = driver.condition
        self._now = clock
        self._rest_s = rest_s
        self._plain = plain
        self._in_query_s = 0.0

    def acquire(self, timeout: float | None = None, *, settings: Mapping[str, Any] | None = None) -> Any:
        """Borrow a connection. Give it back with `release`; prefer `with pool.connection()`.

        :param timeout: seconds; default `acquire_timeout`; 0 does not wait
        :param settings: session settings that the connection is to carry, by name (docs/settings.md)
        :returns: the driver's own connection
        :raises ConfigError: naming everything that is wrong with `settings`; what the server has against them is
            the driver's own error
        :raises AcquireTimeout: with every holder, its stack, and the cause in one sentence
        :raises AcquireRefused: another of its subclasses: QueueFull, Shed, PoolDraining, PoolClosed,
            ConnectFailed, NestedAcquireDeadlock
        """
        if settings is not None:
            settings = self._wanted(settings)
        conn = self._lend(False, False, settings) if timeout is None else None
        return self._borrow(timeout, False, settings) if conn is None else conn

    def release(self, conn: Any) -> None:
        """Give a connection back. Costs no round trip: what has to be undone is undone on a worker.

        :raises NotLeased: it is not on loan from this pool
        """
        if not self._take_back(conn):
            self._give_back(conn)

    def connection(self, timeout: float | None = None, *, settings: Mapping[str, Any] | None = None) -> Block:
        """`with pool.connection() as conn:` borrow, and at the end commit or roll back as the driver's own
        context manager does.

        :param timeout: seconds; default `acquire_timeout`
        :param settings: session settings that the connection is to carry, by name (docs/settings.md)
        :raises: as `acquire`
        """
        return Block(self, timeout, None if settings is None else self._wanted(settings))

    def _once(
        self,
        run: Callable[[Any, Any, Any], Any],
        sql: Any,
        params: Any,
        timeout: float | None,
        settings: Mapping[str, Any] | None,
    ) -> Any:
        """One statement on a connection borrowed for it."""
        wanted = None if settings is None else self._wanted(settings)
        conn = self._lend(True, True, wanted) if timeout is None else None
        if conn is None:
            conn = self._borrow(timeout, True, wanted)
        try:
            return run(conn, sql, params)
        finally:
            if not self._take_back(conn):
                self._give_back(conn)

    def _wanted(self, settings: Mapping[str, Any] | None) -> Any:
        """The canonical form of the settings a borrower asks for, None for none."""
        raise TypeError("a desk without a pool")

    def _borrow(self, timeout: float | None, scoped: bool, wanted: Any = None) -> Any:
        """The long way of `acquire`."""
        raise TypeError("a desk without a pool")

    def _give_back(self, conn: Any) -> None:
        """The long way of `release`."""
        raise TypeError("a desk without a pool")

    def _still_lent(self, conn: Any, link: Any, uses: int) -> bool:
        """For a block at its end: False where there is nothing to give back; raises where it is another's now."""
        raise TypeError("a desk without a pool")

    def _flush(self) -> None:
        """Perform the machine's effects. Called without the lock."""
        raise TypeError("a desk without a pool")

    def _lend(self, scoped: bool, once: bool, wanted: Any) -> Any:
        """A connection that carries just what is wanted, or None: go the long way.

        `once`: for one statement of the pool's own."""
        machine = self._machine
        slot: Any = None
        if self._locked():
            return None  # taken, perhaps by what this call interrupted (a finalizer, a signal handler)
        try:
            now = self._now()
            with self._gate:
                ring = machine.shelf.bare if wanted is None else machine.shelf.rings.get(wanted)
                if ring is None:
                    return None
                best = ring.last
                if best is None or machine.effects or now - best.since >= self._rest_s or now >= best.expires:
                    return None
                slot = machine.acquire(now, 0.0, wanted)
            link = slot.data
            conn = link.lend_once(get_ident()) if once else link.lend(get_ident(), scoped)
            self._lent[link.key] = link
            return conn
        except BaseException:
            # Interrupted between two steps of ours: the lease must not be lost with this frame.
            if slot is not None:
                self._drop(slot)
            raise

    def _take_back(self, conn: Any) -> bool:
        """Put a clean connection back; False: go the long way (also when it is not on loan at all)."""
        link = self._lent.get(id(conn))
        if link is None or link.gone or not self._plain:
            return False
        session = link.session
        try:
            # The condition first: some adapters find out about changed attributes only there.
            if self._condition(conn) or session.touched or session.attributes:
                return False
        except Exception:
            return False  # the long way gives the lease back all the same
        if self._locked():
            return False
        machine = self._machine
        slot = link.slot
        now = self._now()
        try:
            with self._gate:
                # Nothing here allocates what the garbage collector follows: it might finalize a block of this
                # pool, which would come back for the lock.
                if machine.waiting.size or machine.effects or machine.mode != RUNNING:
                    return False
                if not slot.timed or slot.epoch != machine.epoch or now >= slot.expires:
                    return False
                if machine.size - machine.closing.size > machine.max_size:
                    return False
                if self._lent.pop(link.key, None) is not link:
                    return False
                link.conn = conn
                machine.release(slot, now)
                if session.statements:
                    self._in_query_s += session.in_query_s
                    session.in_query_s = 0.0
                    session.statements = 0
                    session.sqlstate = ""
        except BaseException:
            if link.conn is conn and slot.ring is machine.leased:
                self._drop(slot)
            raise
        return True

    def _drop(self, slot: Slot) -> None:
        key = slot.data.key
        if self._lent.get(key) is slot.data:
            del self._lent[key]
        with self._gate:
            self._machine.release_broken(slot, self._now(), "broken", "private")
        self._flush()


class Block:
    """The block of `pool.connection()`."""

    def __init__(self, desk: Desk, timeout: float | None, wanted: Any) -> None:
        self.desk = desk
        self.timeout = timeout
        self.wanted = wanted
        self.conn: Any = None
        self.link: Any = None
        self.uses = 0

    def __enter__(self) -> Any:
        desk = self.desk
        conn = desk._lend(True, False, self.wanted) if self.timeout is None else None
        if conn is None:
            conn = desk._borrow(self.timeout, True, self.wanted)
        self.conn = conn
        self.link = link = desk._lent.get(id(conn))
        if link is not None:
            self.uses = link.slot.uses
        return conn

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None
    ) -> None:
        desk = self.desk
        conn = self.conn
        self.conn = None
        link = self.link
        if link is None or link.gone or link.slot.uses != self.uses or desk._lent.get(link.key) is not link:
            desk._still_lent(conn, link, self.uses)
            return
        try:
            desk._driver.leave(conn, kind is not None)
        except Exception:
            # The block's own error, or its cancellation, matters more than a roll-back that failed because of
            # it; the connection's condition tells the pool all the same.
            if kind is None:
                raise
        finally:
            if not desk._take_back(conn):
                desk._give_back(conn)
