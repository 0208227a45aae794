"""`Pool`: the pool for threads.

A thin shell over the machine: one lock around it, decisions inside the lock, everything slow outside. The
caller's thread never dials, resets or closes; daemon workers do. A keeper thread calls `tick` when something
is due. A waiting caller sleeps on a lock of its own, which whoever releases a connection to it opens.
"""

from __future__ import annotations

import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Mapping
from contextlib import suppress
from queue import Empty, SimpleQueue
from threading import get_ident
from time import monotonic
from types import TracebackType
from typing import Any

from cenote import errors
from cenote.core.machine import CLOSE, CLOSED, GRANT, OPEN, PEEK, PING, REFUSE, RESET, RUNNING, WAKE
from cenote.core.slot import NEVER, Slot, Waiter
from cenote.pool import base
from cenote.pool.base import BasePool, Event
from cenote.pool.desk import Desk
from cenote.pool.drivers import sync_driver
from cenote.pool.drivers.base import IDLE, ConnectArgs, Credentials, Driver
from cenote.pool.forks import dials
from cenote.pool.holders import Holder, describe, first_line
from cenote.pool.link import Link
from cenote.pool.settings import TOUCHES, Carried, replans
from cenote.pool.stats import PoolStats
from cenote.pool.workers import Workers

_KEEPER_LINGERS_S = 3600.0


class Pool(BasePool, Desk):
    """A pool of connections for threads.

    The constructor does no I/O. The pool opens with `with pool:`, `open()` or the first acquire, and never
    fails to open because the server is down; `wait_ready` tells.

    :param dsn: connection string, or a callable returning one, asked anew for each connection (rotating
        credentials); None to leave all to `connect_args` and the driver's defaults
    :param driver: "psycopg" (default), "psycopg2", any DB-API 2.0 `connect` callable, or an adapter of your own
    :param connect_args: keyword arguments for the driver's connect, or a callable returning them
    :param name: the name in every message, log line and metric; default "pool-1", "pool-2" ...
    :param configure: called with each new connection before anybody borrows it
    :param check: called instead of a ping to prove a connection alive; raises if it is not
    :param listener: called with an `Event` when a connection is opened, closed, leaked ...
    :param clock: monotonic seconds; another one is for tests
    :param options: the options of docs/options.md (`min_size`, `max_size`, `acquire_timeout` ...); `reset` may
        also be a callable, run on each connection that comes back, off the borrower's path
    :raises ConfigError: listing every option that cannot be used
    """

    def __init__(
        self,
        dsn: Credentials = None,
        *,
        driver: str | Callable[..., Any] | Driver = "psycopg",
        connect_args: ConnectArgs | None = None,
        name: str | None = None,
        configure: Callable[[Any], Any] | None = None,
        check: Callable[[Any], Any] | None = None,
        listener: Callable[[Event], Any] | None = None,
        clock: Callable[[], float] = monotonic,
        **options: Any,
    ) -> None:
        super().__init__(name, options, configure, check, listener, clock)
        self._driver = sync_driver(driver, dsn, connect_args or {}, self.options, self.name)
        self._start_over()
        base.pools.add(self)

    def _start_over(self) -> None:
        """Everything that belongs to this process: after the constructor, and in a forked child."""
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._opened = False
        self._inbox: SimpleQueue[Link | tuple[Any] | None] = SimpleQueue()
        self._workers = Workers(self.name, min(self.options.max_size + 4, 64))
        self._keeper_sleeps_until = NEVER
        self._owner = 0  # the thread that took the lock last
        # A pool that is forgotten without close() must not leave its threads asleep for long.
        weakref.finalize(self, self._inbox.put, None).atexit = False
        weakref.finalize(self, self._workers.abandon).atexit = False
        options = self.options
        self._furnish(
            self._machine,
            self._lock,
            {},
            self._driver,
            self._now,
            options.peek_after if options.check_after else 0.0,
            options.reset != "always" and self._reset_hook is None,
        )

    # -- opening and closing ------------------------------------------------------------------------------------

    def open(self) -> None:
        """Start the pool: begin to open `min_size` connections and return at once. Idempotent."""
        with self._lock:
            if self._opened or self._machine.mode == CLOSED:
                return
            self._opened = True
            self._machine.start(self._now())
        try:
            self._start_keeper()
        except BaseException:
            self._opened = False
            raise
        self._flush()

    def _start_keeper(self) -> None:
        threading.Thread(
            target=_keep,
            args=(weakref.ref(self), self._inbox),
            name=f"cenote-{self.name}-keeper",
            daemon=True,
        ).start()

    def __enter__(self) -> Pool:
        self.open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()

    def wait_ready(self, timeout: float = 30.0) -> None:
        """Wait until `min_size` connections (at least one) are open.

        :param timeout: seconds
        :raises NotReady: after `timeout`, with the last error of a dial; at once if the server refuses for good
        """
        self.open()
        deadline = self._now() + timeout
        try:
            self.release(self.acquire(timeout))
        except errors.AcquireRefused as error:
            if isinstance(error, (errors.PoolClosed, errors.PoolDraining)):
                raise
            cause = self._dial_error or error
            raise errors.NotReady(
                f"not ready within {timeout:.2f} s: {first_line(cause)}", pool=self.name
            ) from cause
        m = self._machine
        with self._changed:
            ready = self._changed.wait_for(
                lambda: m.size - m.connecting.size - m.closing.size >= m.min_size, deadline - self._now()
            )
            have = m.size - m.connecting.size - m.closing.size
        if not ready:
            raise errors.NotReady(
                f"{have} of min_size = {m.min_size} connections within {timeout:.2f} s", pool=self.name
            ) from self._dial_error

    def drain(self, timeout: float = 30.0) -> bool:
        """Refuse new leases, serve who waits, and wait until every lease came back.

        :param timeout: seconds
        :returns: True when none is out; False after `timeout`. `resume()` takes leases again.
        """
        deadline = self._now() + timeout
        with self._lock:
            self._machine.drain(self._now(), deadline)
        self._flush()
        m = self._machine
        with self._changed:
            return self._changed.wait_for(
                lambda: not (m.leased.size or m.waiting.size or m.resetting.size), deadline - self._now()
            )

    def resume(self) -> None:
        """End a drain."""
        with self._lock:
            self._machine.resume(self._now())
            self._changed.notify_all()
        self._flush()

    def close(self, timeout: float = 5.0) -> tuple[Holder, ...]:
        """Close the pool for good. Whoever waits is refused at once; leases have `timeout` seconds to come back,
        then their queries are cancelled, then their sockets are cut.

        :param timeout: seconds
        :returns: the leases that had to be cut (empty if all came back); also logged. Idempotent.
        """
        m = self._machine
        with self._lock:
            m.close(self._now())
        self._flush()
        with self._changed:
            self._changed.wait_for(lambda: not m.leased.size, timeout)
            late = self._leases()
        cut = tuple(describe(link, self._driver, self._now()) for link in late)
        for link in late:
            self._cut(link)
        with self._changed:
            self._changed.wait_for(lambda: m.size == m.leased.size, base.CLOSE_TIMEOUT_S)
        self._workers.stop()
        return cut

    def _cut(self, link: Link) -> None:
        """End what a borrower does after the deadline: cancel his query; if he still holds on, his socket."""
        conn = link.ref()
        if conn is None:
            return
        self._tell(
            "cut",
            "pool_closed",
            self._now() - link.slot.since,
            str(describe(link, self._driver, self._now())),
        )
        if link.session.query_since_s:
            try:
                self._driver.cancel(conn)
            except Exception as error:
                base.logger.warning('pool "%s": cancel failed: %s', self.name, error)
            with self._changed:
                self._changed.wait_for(lambda: link.slot.state() != "leased", 1.0)
        if link.slot.state() == "leased" and self._lent.get(link.key) is link:
            # Not closed: its borrower may be inside the driver. A shut socket ends that with an error.
            try:
                self._driver.cut(conn)
            except Exception as error:
                base.logger.warning('pool "%s": cut failed: %s', self.name, error)

    # -- borrowing ----------------------------------------------------------------------------------------------

    def _borrow(self, timeout: float | None, scoped: bool, wanted: Carried | None = None) -> Any:
        limit = self.options.acquire_timeout if timeout is None else self._timeout(timeout)
        if not self._opened:
            self.open()
        again, left = False, limit
        started = now = self._now()
        while True:
            slot = self._lease(now, left, again, wanted)
            link: Link = slot.data
            try:
                dead = None
                if slot.rested >= self.options.peek_after or not self.options.check_after:
                    dead = self._look(link)
                if dead is None and slot.settings is not wanted and slot.settings != wanted:
                    dead = self._convert(link, wanted)
                if dead is None:
                    break
            except BaseException as error:
                self._not_lent(link, error)
                raise
            self._lost(slot, *dead)
            again = True
            now = self._now()
            left = max(0.0, started + limit - now)
        try:
            conn = link.lend(get_ident(), scoped)
            self._lent[link.key] = link
        except BaseException:
            self._lost(slot, "broken", "private")
            raise
        return conn

    def _convert(self, link: Link, wanted: Carried | None) -> tuple[str, str] | None:
        """Make a connection carry what is wanted, by one round trip. None if it does, else why it is of no more
        use and another is to be found."""
        session = link.session
        before = session.touched
        session.touched |= TOUCHES  # until it is known what came of it
        try:
            if self._needs_configure(link, wanted):
                self._undo(link)
                self._configured(link.conn)
                before = 0
                session.touched |= TOUCHES
            script, replan = self._conversion(link, wanted)
            if script or replan:
                self._driver.convert(link.conn, script, replan, base.CONVERT_TIMEOUT_S)
        except BaseException as error:
            dead = self._misfit(link, wanted, error)
            if dead is None:
                raise
            return dead
        link.slot.settings = wanted
        session.touched = before
        with self._lock:
            self._owner = get_ident()
            self._conversions += 1
        return None

    def _not_lent(self, link: Link, error: BaseException) -> None:
        """A connection was granted, and what was to be done before it is lent has failed or was interrupted."""
        dead = self._unlent(link, error)
        if dead is not None:
            self._lost(link.slot, *dead)
        else:
            self._input(self._machine.release_touched, link.slot, self._now())

    def _lease(self, now: float, timeout: float, again: bool, wanted: Carried | None) -> Slot:
        """A leased slot, waiting for it if need be."""
        machine = self._machine
        got: Slot | Waiter | None = None
        try:
            if self._is_mine():
                raise errors.MisuseError(
                    "acquire from a finalizer or signal handler that interrupted the pool itself", pool=self.name
                )
            with self._lock:
                self._owner = get_ident()
                got = machine.acquire(now, timeout, wanted, None, again)
                if type(got) is Slot and not machine.effects:
                    return got
                deadlock, risk = None, ""
                if isinstance(got, Waiter) and got.ring is not None:
                    gate = threading.Lock()
                    gate.acquire()
                    me = get_ident()
                    got.data = (gate, me)
                    deadlock, risk = self._nested(me, self._is_in_line)
            self._flush()
            if isinstance(got, Slot):
                return got
            if deadlock is not None:
                self._input(machine.abandon, got, now, "deadlock")
                self._tell("refused", "deadlock")
                raise deadlock
            if risk:
                warnings.warn(risk, errors.NestedAcquireWarning, stacklevel=4)
            return self._wait(got, timeout)
        except BaseException:
            if isinstance(got, Slot):
                self._lost(got, "broken", "private")
            elif got is not None:
                self._input(machine.abandon, got, self._now())
            raise

    def _is_held(self, link: Link) -> bool:
        """On its thread's stack is the frame with the `with` statement, beyond entering it. Frameworks run the
        two ends of a block on whichever threads they have (a generator dependency, say): then it is not."""
        frame = sys._current_frames().get(link.holder)
        while frame is not None:
            if frame.f_code is link.code and frame.f_lasti != link.offset:
                return True
            frame = frame.f_back
        return False

    def _is_in_line(self, thread: int) -> bool:
        """Read off the line itself: a count of one's own would have to be undone, and that can be interrupted.
        Called with the lock held."""
        return any(waiter.data is not None and waiter.data[1] == thread for waiter in self._machine.waiting)

    def _wait(self, waiter: Waiter, timeout: float) -> Slot:
        line: Any = waiter.data
        while not waiter.refused:
            left = waiter.deadline - self._now()
            if line[0].acquire(timeout=min(max(left, 0.0), threading.TIMEOUT_MAX)):
                break
            self._tick()  # the deadline has come: the machine says so, and opens this gate
        if waiter.refused:
            raise self._refusal(waiter, timeout, self._now())
        return self._machine.accept(waiter)

    def _look(self, link: Link) -> tuple[str, str] | None:
        """Look at a connection before it is lent: poll its socket, or ping when every borrow is to be checked.
        None if it is alive, else the reason and the failure."""
        if self.options.check_after == 0:
            try:
                self._prove(link)
            except Exception as error:
                return "check_failed", self._loss(error)
            return None
        sqlstate = self._driver.peek(link.conn)
        return None if sqlstate is None else ("server_closed", base.peek_failure(sqlstate))

    def _prove(self, link: Link) -> None:
        conn, session = link.conn, link.session
        if self._check is None:
            self._driver.ping(conn, base.CHECK_TIMEOUT_S)
            return
        self._check(conn)
        if session.touched or session.attributes or self._driver.condition(conn) != IDLE:
            self._undo(link)

    def _undo(self, link: Link) -> int:
        """Return a connection to its base state, or, where only a transaction was open, to what it carries; what
        was undone."""
        touched = self._to_undo(link)
        self._driver.reset(link.conn, touched, base.RESET_TIMEOUT_S)
        carried: Any = link.slot.settings
        if touched and carried is not None:
            if replans(carried, None):
                self._driver.convert(link.conn, "", True, base.RESET_TIMEOUT_S)
            link.slot.settings = None
        return touched

    def _configured(self, conn: Any) -> None:
        """Run the configure hook as a block: what it set is committed. Then the connection is in base state."""
        if self._configure is not None:
            self._configure(conn)
            self._driver.leave(conn, False)
            if self._driver.condition(conn) != IDLE:
                raise self._left_open("configure")
            self._note_configured(self._driver.session(conn))
        self._driver.settle(conn)

    def _give_back(self, conn: Any) -> None:
        """What `release` does with a connection that is not simply clean, or that somebody waits for."""
        if self._is_mine():
            # A finalizer or signal handler that interrupted this very thread inside the lock: the keeper does it.
            self._inbox.put((conn,))
            return
        link = self._claim(conn)
        if link is None:
            return
        slot = link.slot
        try:
            if link.gone:
                link.watch(conn)
            verdict = self._verdict(link, conn)
            why = self._why_broken(link, conn) if verdict == "broken" else ("", "")
            link.conn = conn
            machine = self._machine
            now = self._now()
            with self._lock:
                self._owner = get_ident()
                self._account(link)
                if verdict == "clean":
                    machine.release(slot, now)
                elif verdict == "touched":
                    machine.release_touched(slot, now)
                else:
                    machine.release_broken(slot, now, *why)
                if not machine.effects and machine.mode == RUNNING:
                    return
            self._flush()
        except BaseException:
            if slot.state() == "leased":
                link.conn = conn
                self._lost(slot, "broken", "private")
            self._inbox.put(None)  # the keeper performs what the machine still wants
            raise

    def transaction(
        self, timeout: float | None = None, *, settings: Mapping[str, Any] | None = None
    ) -> _Transaction:
        """`with pool.transaction() as conn:` borrow, BEGIN, and COMMIT at the end, or ROLLBACK after an exception.

        :param timeout: seconds to wait for a connection; default `acquire_timeout`
        :param settings: session settings that the connection is to carry, by name (docs/settings.md)
        :raises: as `acquire`
        """
        return _Transaction(self, timeout, None if settings is None else self._wanted(settings))

    def execute(
        self,
        sql: Any,
        params: Any = None,
        *,
        timeout: float | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> int:
        """Run one statement in autocommit, one round trip.

        :param params: as the driver takes them
        :param timeout: seconds to wait for a connection
        :param settings: session settings under which it is to run, by name (docs/settings.md)
        :returns: the number of rows affected, -1 where there is none
        """
        return int(self._once(self._driver.execute, sql, params, timeout, settings))

    def fetch_all(
        self,
        sql: Any,
        params: Any = None,
        *,
        timeout: float | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> list[Any]:
        """Run one statement in autocommit; all its rows, as the driver gives them."""
        rows: list[Any] = self._once(self._driver.fetch_all, sql, params, timeout, settings)
        return rows

    def fetch_one(
        self,
        sql: Any,
        params: Any = None,
        *,
        timeout: float | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run one statement in autocommit; its first row, or None."""
        return self._once(self._driver.fetch_one, sql, params, timeout, settings)

    def fetch_value(
        self,
        sql: Any,
        params: Any = None,
        *,
        timeout: float | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run one statement in autocommit; the first column of its first row, or None."""
        return self._once(self._driver.fetch_value, sql, params, timeout, settings)

    # -- looking and moving -------------------------------------------------------------------------------------

    def stats(self) -> PoolStats:
        """The pool's figures now, consistent with each other."""
        if self._is_mine():
            return self._snapshot()
        with self._lock:
            self._owner = get_ident()
            return self._snapshot()

    def resize(self, *, min_size: int | None = None, max_size: int | None = None) -> None:
        """Move the limits while the pool runs. Surplus connections go when they are idle.

        :raises ConfigError: as the constructor
        """
        options = self._new_sizes(min_size, max_size)
        with self._lock:
            self.options = options
            self._machine.resize(self._now(), options.min_size, options.max_size)
        if self._opened:
            self._flush()

    def refresh(self) -> None:
        """Replace every connection opened until now: idle ones at once, others when they come back."""
        with self._lock:
            self._machine.refresh(self._now())
        if self._opened:
            self._flush()

    # -- effects ------------------------------------------------------------------------------------------------

    def _effects(self) -> list[tuple[str, Any]]:
        """Take what the machine wants done. Called with the lock held."""
        machine = self._machine
        # Always another list: this one is read without the lock, while other threads add to the machine's.
        effects: list[tuple[str, Any]] = machine.effects
        machine.effects = []
        if machine.mode != RUNNING:
            self._changed.notify_all()
            if machine.mode == CLOSED:
                self._inbox.put(None)  # the keeper may be done
        return effects

    def _is_mine(self) -> bool:
        """Does this very thread hold the lock, because what runs now interrupted it (the garbage collector, a
        signal)? Who held it last is noted, not who holds it: a stale note only costs the long way round."""
        return self._owner == get_ident() and self._lock.locked()

    def _flush(self) -> None:
        """Do it. Called without the lock.

        An interrupt in the middle (KeyboardInterrupt) must lose nothing: what is not done goes back to the
        machine, for the keeper. Doing the last one twice is harmless: a gate may be opened twice, and of two
        workers sent to a slot only one finds that its work is still owed.
        """
        effects: list[tuple[str, Any]] = []
        done = 0
        try:
            with self._lock:
                self._owner = get_ident()
                effects = self._effects()
            for what, subject in effects:
                if what in (GRANT, REFUSE):
                    if subject.data is not None and subject.data[0].locked():
                        subject.data[0].release()
                elif what == WAKE:
                    if self._machine.alarm < self._keeper_sleeps_until:
                        self._inbox.put(None)
                else:
                    self._workers.submit(_WORKS[what], self, subject)
                done += 1
        except BaseException:
            with self._lock:
                self._machine.effects = effects[done:] + self._machine.effects
            self._inbox.put(None)
            raise

    def _input(self, method: Callable[..., Any], *args: Any) -> Any:
        """Feed the machine and perform what follows."""
        with self._lock:
            self._owner = get_ident()
            answer = method(*args)
            self._changed.notify_all()
        self._flush()
        return answer

    def _lost(self, slot: Slot, reason: str, failure: str) -> None:
        """A leased slot whose connection cannot be lent."""
        self._input(self._machine.release_broken, slot, self._now(), reason, failure)

    def _tick(self) -> None:
        self._input(self._machine.tick, self._now())

    def _begin(self, slot: Slot) -> bool:
        """Is the work that was ordered on this slot still to be done? Then it is the caller's."""
        with self._lock:
            owed, slot.owed = slot.owed, False
        return owed

    def _open_one(self, slot: Slot) -> None:
        machine = self._machine
        if not (self._begin(slot) and self._input(machine.dial_needed, slot, self._now())):
            return
        conn: Any = None
        started = self._now()
        try:
            with dials:
                conn = self._driver.connect(self.options.connect_timeout)
            self._configured(conn)
            link = Link(
                slot,
                conn,
                self._driver.session(conn),
                self._driver.handle(conn),
                self._inbox.put if self._driver.weak else None,
            )
        except BaseException as error:
            if conn is not None:
                self._close_quietly(conn, None)
            failure = self._dial_failure(error)
            self._dial_error = error
            self._input(machine.dial_failed, slot, self._now(), failure)
            self._tell("dial_failed", failure, self._now() - started, error=error)
            return
        slot.data = link
        self._reached()
        self._input(machine.dialed, slot, self._now())
        self._tell("opened", slot.opened, self._now() - started)

    def _ping_one(self, slot: Slot) -> None:
        self._check_one(slot, self._prove)

    def _peek_one(self, slot: Slot) -> None:
        if not self._begin(slot):
            return
        link: Any = slot.data
        try:
            sqlstate = self._driver.peek(link.conn)
        except BaseException:
            base.logger.exception('pool "%s": a look at a socket failed', self.name)
            sqlstate = ""
        if sqlstate is None:
            self._input(self._machine.check_passed, slot, self._now(), False)
        else:
            failure = base.peek_failure(sqlstate)
            self._input(self._machine.check_failed, slot, self._now(), "server_closed", failure)

    def _check_one(self, slot: Slot, prove: Callable[[Link], None]) -> None:
        if not self._begin(slot):
            return
        link: Any = slot.data
        try:
            prove(link)
        except BaseException as error:
            failure = self._loss(error)
            self._input(self._machine.check_failed, slot, self._now(), "check_failed", failure)
        else:
            self._input(self._machine.check_passed, slot, self._now(), True)

    def _reset_one(self, slot: Slot) -> None:
        if not self._begin(slot):
            return
        link: Any = slot.data
        conn, touched = link.conn, 0
        try:
            touched = self._undo(link)
            if self._after_reset(touched):
                self._configured(conn)
            if self._reset_hook is not None:
                self._reset_hook(conn)
                if self._driver.condition(conn) != IDLE:
                    self._driver.reset(conn, 0, base.RESET_TIMEOUT_S)
        except BaseException as error:
            self._input(self._machine.reset_failed, slot, self._now(), self._loss(error))
            self._tell("reset", "reset_failed", error=error)
        else:
            link.session.sqlstate = ""
            self._input(self._machine.reset_done, slot, self._now())
            self._tell("reset", "touched", detail=hex(touched))

    def _close_one(self, slot: Slot) -> None:
        if not self._begin(slot):
            return
        link: Any = slot.data
        conn, link.conn = link.conn, None
        self._close_quietly(conn, link.handle)
        self._input(self._machine.closed, slot, self._now())
        self._tell("closed", slot.reason)

    def _close_quietly(self, conn: Any, handle: Any) -> None:
        try:
            self._driver.close(conn, handle, base.CLOSE_TIMEOUT_S)
        except BaseException as error:
            base.logger.debug('pool "%s": close failed: %s', self.name, error)

    # -- the keeper ---------------------------------------------------------------------------------------------

    def _keep_once(self, dropped: Link | None) -> float | None:
        """One turn of the keeper thread; how long to sleep, None when the pool has ended."""
        if dropped is not None and dropped.slot.state() == "leased" and dropped.gone:
            self._forget(dropped)
            self._lost(dropped.slot, "leaked", "private")
            self._tell_leak(dropped)
        if self._machine.effects:
            self._flush()
        self._workers.catch_up()
        if self._machine.alarm <= self._now():
            self._tick()
        for link in self._long_leases(self._now(), self._leases()):
            self._tell_long_lease(link)
        with self._lock:
            if self._machine.mode == CLOSED and not self._lent:
                return None
            until = min(self._machine.alarm, self._next_leak_check(), self._now() + _KEEPER_LINGERS_S)
            self._keeper_sleeps_until = until
        return max(0.0, until - self._now())

    def _next_leak_check(self) -> float:
        after = self.options.leak_after
        if after is None:
            return NEVER
        dues = [link.slot.since + after for link in self._leases() if not link.warned]
        return float(min(dues, default=self._now() + after))


class _Transaction:
    """The block of `pool.transaction()`."""

    __slots__ = ("_conn", "_link", "_pool", "_timeout", "_uses", "_wanted")

    def __init__(self, pool: Pool, timeout: float | None, wanted: Carried | None) -> None:
        self._pool = pool
        self._timeout = timeout
        self._wanted = wanted

    def __enter__(self) -> Any:
        self._conn = conn = self._pool._borrow(self._timeout, True, self._wanted)
        self._link = self._pool._lent.get(id(conn))
        self._uses = 0 if self._link is None else self._link.slot.uses
        try:
            self._pool._driver.begin(conn)
        except BaseException:
            self._pool.release(conn)
            raise
        return conn

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None
    ) -> None:
        conn, self._conn = self._conn, None
        driver = self._pool._driver
        if not self._pool._still_lent(conn, self._link, self._uses):
            return
        try:
            if kind is None:
                driver.commit(conn)
            else:
                driver.rollback(conn)
        except Exception:
            # The block's own error, or its cancellation, matters more than a roll-back that failed because of
            # it; the connection's condition tells the pool all the same.
            if kind is None:
                raise
        finally:
            self._pool.release(conn)


_WORKS: dict[str, Callable[[Pool, Slot], None]] = {
    OPEN: Pool._open_one,
    PING: Pool._ping_one,
    PEEK: Pool._peek_one,
    RESET: Pool._reset_one,
    CLOSE: Pool._close_one,
}


def _keep(pool_ref: weakref.ref[Pool], inbox: SimpleQueue[Link | tuple[Any] | None]) -> None:
    """The keeper thread. Holds the pool only while it works, so that a forgotten pool can go."""
    pause: float | None = 0.0
    while pause is not None:
        item: Link | tuple[Any] | None = None
        try:
            item = inbox.get(timeout=pause)
        except Empty:
            pass
        pool = pool_ref()
        if pool is None or pool._inbox is not inbox:
            return
        try:
            if isinstance(item, tuple):
                with suppress(errors.NotLeased):  # it counted as dropped meanwhile
                    pool.release(item[0])
                item = None
            pause = pool._keep_once(item)
        except BaseException:
            base.logger.exception('pool "%s": the keeper failed', pool.name)
            pause = 1.0
        del pool, item
