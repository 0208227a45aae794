"""`AsyncPool`: the pool for asyncio.

A thin shell over the machine. Everything runs on one event loop, so there is no lock: between two awaits the
machine is nobody else's. Cancellation may come at any await; there is none between reading a grant and giving
the lease to the caller, and `release` never awaits at all. What is slow (dial, check, reset, close) runs in
tasks of the pool, never in the caller's.
"""

from __future__ import annotations

import asyncio
import warnings
import weakref
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Mapping
from contextlib import suppress
from inspect import isawaitable
from time import monotonic
from types import TracebackType
from typing import Any

from cenote import errors
from cenote.core.machine import CLOSE, CLOSED, GRANT, OPEN, PEEK, PING, REFUSE, RESET, RUNNING, WAKE
from cenote.core.slot import NEVER, Slot
from cenote.pool import base
from cenote.pool.base import BasePool, Event
from cenote.pool.drivers import async_driver
from cenote.pool.drivers.base import IDLE, AsyncDriver, ConnectArgs, Credentials
from cenote.pool.holders import Holder, describe, first_line
from cenote.pool.link import Link
from cenote.pool.settings import TOUCHES, Carried, replans
from cenote.pool.stats import PoolStats

_PUT_AWAY_S = 0.5


class AsyncPool(BasePool):
    """A pool of connections for asyncio.

    The constructor does no I/O and needs no event loop; the pool belongs to the loop that first uses it. It
    opens with `async with pool:`, `open()` or the first acquire, and never fails to open because the server is
    down; `wait_ready` tells.

    :param dsn: connection string, or a callable (also a coroutine function) returning one, asked anew for each
        connection (rotating credentials); None to leave all to `connect_args` and the driver's defaults
    :param driver: "psycopg" (default), "asyncpg", or an adapter of your own
    :param connect_args: keyword arguments for the driver's connect, or a callable returning them
    :param name: the name in every message, log line and metric; default "pool-1", "pool-2" ...
    :param configure: called (may be a coroutine function) with each new connection before anybody borrows it
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
        driver: str | AsyncDriver = "psycopg",
        connect_args: ConnectArgs | None = None,
        name: str | None = None,
        configure: Callable[[Any], Any] | None = None,
        check: Callable[[Any], Any] | None = None,
        listener: Callable[[Event], Any] | None = None,
        clock: Callable[[], float] = monotonic,
        **options: Any,
    ) -> None:
        super().__init__(name, options, configure, check, listener, clock)
        self._driver = async_driver(driver, dsn, connect_args or {}, self.options, self.name)
        self._sentries: list[AsyncGenerator[None, None]] = []
        self._start_over()
        base.pools.add(self)

    def _start_over(self) -> None:
        """Everything that belongs to one loop and process: after the constructor, and in a forked child."""
        self._loop: asyncio.AbstractEventLoop | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = NEVER
        self._waiting: dict[Any, int] = {}  # tasks in line, for the detection of nested acquires
        self._watchers: list[tuple[Callable[[], bool], asyncio.Future[None]]] = []
        self._lent = {}
        # Idle for this long, a connection needs a look before it is lent (0: each one does).
        self._rest_s = self.options.peek_after if self.options.check_after else 0.0

    # -- opening and closing ------------------------------------------------------------------------------------

    async def open(self) -> None:
        """Start the pool: begin to open `min_size` connections and return at once. Idempotent."""
        self._open()

    def _open(self) -> None:
        loop = asyncio.get_running_loop()
        if self._loop is loop:
            return
        if self._loop is not None:
            state = "closed" if self._loop.is_closed() else "another"
            raise errors.WrongEventLoop(
                f"it belongs to the event loop that first used it, which is {state} "
                "now: make one pool for each event loop (for tests: one for each test's loop)",
                pool=self.name,
            )
        self._loop = loop
        self._sentries.append(sentry := _at_the_loops_end(weakref.ref(self)))
        with suppress(StopIteration):
            sentry.__anext__().__await__().send(None)
        if self._machine.mode != CLOSED:
            self._machine.start(self._now())
            self._perform()

    async def __aenter__(self) -> AsyncPool:
        self._open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self.close()

    async def wait_ready(self, timeout: float = 30.0) -> None:
        """Wait until `min_size` connections (at least one) are open.

        :param timeout: seconds
        :raises NotReady: after `timeout`, with the last error of a dial; at once if the server refuses for good
        """
        deadline = self._now() + timeout
        try:
            await self.release(await self.acquire(timeout))
        except errors.AcquireRefused as error:
            if isinstance(error, (errors.PoolClosed, errors.PoolDraining)):
                raise
            cause = self._dial_error or error
            raise errors.NotReady(
                f"not ready within {timeout:.2f} s: {first_line(cause)}", pool=self.name
            ) from cause
        m = self._machine
        if not await self._until(
            lambda: m.size - m.connecting.size - m.closing.size >= m.min_size, deadline - self._now()
        ):
            have = m.size - m.connecting.size - m.closing.size
            raise errors.NotReady(
                f"{have} of min_size = {m.min_size} connections within {timeout:.2f} s", pool=self.name
            ) from self._dial_error

    async def drain(self, timeout: float = 30.0) -> bool:
        """Refuse new leases, serve who waits, and wait until every lease came back.

        :param timeout: seconds
        :returns: True when none is out; False after `timeout`. `resume()` takes leases again.
        """
        self._open()
        m = self._machine
        m.drain(self._now(), self._now() + timeout)
        self._perform()
        return await self._until(lambda: not (m.leased.size or m.waiting.size or m.resetting.size), timeout)

    async def resume(self) -> None:
        """End a drain."""
        self._open()
        self._machine.resume(self._now())
        self._perform()

    async def close(self, timeout: float = 5.0) -> tuple[Holder, ...]:
        """Close the pool for good. Whoever waits is refused at once; leases have `timeout` seconds to come back,
        then their queries are cancelled, then their sockets are cut.

        :param timeout: seconds
        :returns: the leases that had to be cut (empty if all came back); also logged. Idempotent.
        """
        self._open()
        m = self._machine
        m.close(self._now())
        self._perform()
        await self._until(lambda: not m.leased.size, timeout)
        late = self._leases()
        cut = tuple(describe(link, self._driver, self._now()) for link in late)
        for link in late:
            await self._cut(link)
        await self._until(lambda: m.size == m.leased.size, base.CLOSE_TIMEOUT_S)
        if self._timer is not None and not self._lent:
            self._timer.cancel()
        return cut

    async def _cut(self, link: Link) -> None:
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
                await self._driver.cancel(conn)
            except Exception as error:
                base.logger.warning('pool "%s": cancel failed: %s', self.name, error)
            await self._until(lambda: link.slot.state() != "leased", 1.0)
        if link.slot.state() == "leased" and self._lent.get(link.key) is link:
            try:
                self._driver.cut(conn)
            except Exception as error:
                base.logger.warning('pool "%s": cut failed: %s', self.name, error)

    async def _until(self, condition: Callable[[], bool], timeout: float) -> bool:
        """Wait until `condition` holds, which only the machine's moves can bring about."""
        if condition():
            return True
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        watcher = (condition, done)
        self._watchers.append(watcher)
        try:
            async with asyncio.timeout(max(0.0, timeout)):
                await done
        except TimeoutError:
            return condition()
        finally:
            if watcher in self._watchers:
                self._watchers.remove(watcher)
        return True

    async def _put_away(self) -> None:
        m = self._machine
        m.drain(self._now(), self._now())
        self._perform()
        with suppress(TimeoutError):
            async with asyncio.timeout(_PUT_AWAY_S):
                for link in self._leases():  # nobody can use them any more
                    conn = link.ref()
                    if conn is not None:
                        await self._close_quietly(conn, link.handle)
                await self._until(lambda: m.size <= m.leased.size + m.connecting.size, _PUT_AWAY_S)

    # -- borrowing ----------------------------------------------------------------------------------------------

    async def acquire(self, timeout: float | None = None, *, settings: Mapping[str, Any] | None = None) -> Any:
        """Borrow a connection. Give it back with `release`; prefer `async with pool.connection()`.

        :param timeout: seconds; default `acquire_timeout`; 0 does not wait
        :param settings: session settings that the connection is to carry, by name (docs/settings.md)
        :returns: the driver's own connection
        :raises ConfigError: naming everything that is wrong with `settings`; what the server has against them is
            the driver's own error
        :raises AcquireTimeout: with every holder, its stack, and the cause in one sentence
        :raises AcquireRefused: another of its subclasses: QueueFull, Shed, PoolDraining, PoolClosed,
            ConnectFailed, NestedAcquireDeadlock
        """
        return await self._borrow(timeout, False, None if settings is None else self._wanted(settings))

    async def _borrow(self, timeout: float | None, scoped: bool, wanted: Carried | None = None) -> Any:
        limit = self.options.acquire_timeout if timeout is None else self._timeout(timeout)
        task = asyncio.current_task()
        # Weakly: a task that has ended still holds its result, which may be the very connection it dropped.
        me = None if task is None else weakref.ref(task)
        if self._loop is not asyncio.get_running_loop():
            self._open()
        machine = self._machine
        again, left = False, limit
        started = now = self._now()
        while True:
            got = machine.acquire(now, left, wanted, None, again)
            if machine.effects:
                self._perform()
            slot = got if type(got) is Slot else await self._wait(got, limit, me)
            link: Link = slot.data
            try:
                dead = None
                if slot.rested >= self._rest_s:
                    dead = await self._look(link)
                if dead is None and slot.settings is not wanted and slot.settings != wanted:
                    dead = await self._convert(link, wanted)
                if dead is None:
                    self._lent[link.key] = link
                    return link.lend(me, scoped)
            except BaseException as error:
                self._not_lent(link, error)
                raise
            machine.release_broken(slot, self._now(), *dead)
            self._perform()
            again = True
            now = self._now()
            left = max(0.0, started + limit - now)

    async def _convert(self, link: Link, wanted: Carried | None) -> tuple[str, str] | None:
        """Make a connection carry what is wanted, by one round trip. None if it does, else why it is of no more
        use and another is to be found."""
        session = link.session
        before = session.touched
        session.touched |= TOUCHES  # until it is known what came of it
        try:
            if self._needs_configure(link, wanted):
                await self._undo(link)
                await self._configured(link.conn, base.CONVERT_TIMEOUT_S)
                before = 0
                session.touched |= TOUCHES
            script, replan = self._conversion(link, wanted)
            if script or replan:
                await self._driver.convert(link.conn, script, replan, base.CONVERT_TIMEOUT_S)
        except BaseException as error:
            dead = self._misfit(link, wanted, error)
            if dead is None:
                raise
            return dead
        link.slot.settings = wanted
        session.touched = before
        self._conversions += 1
        return None

    def _not_lent(self, link: Link, error: BaseException) -> None:
        """A connection was granted, and what was to be done before it is lent has failed or was cancelled."""
        self._lent.pop(link.key, None)
        dead = self._unlent(link, error) if isinstance(error, Exception) else None
        if dead is not None:
            self._machine.release_broken(link.slot, self._now(), *dead)
        else:
            # Cancelled in mid-ping, for one: a reset proves what the connection still has to say.
            self._machine.release_touched(link.slot, self._now())
        self._perform()

    async def _wait(self, waiter: Any, timeout: float, me: Any) -> Slot:
        """Stand in line until granted or refused; whatever else ends the wait gives the place or lease back."""
        machine = self._machine
        if not waiter.refused:
            assert self._loop is not None
            waiter.data = self._loop.create_future()
            if waiter.slot is not None:
                waiter.data.set_result(None)
            try:
                deadlock, risk = self._nested(me, self._is_in_line)
                if deadlock is not None:
                    machine.abandon(waiter, self._now(), "deadlock")
                    self._tell("refused", "deadlock")
                    raise deadlock
                if risk:
                    warnings.warn(risk, errors.NestedAcquireWarning, stacklevel=4)
                task = asyncio.current_task()
                self._waiting[task] = self._waiting.get(task, 0) + 1
                try:
                    await waiter.data
                finally:
                    self._waiting[task] -= 1
                    if not self._waiting[task]:
                        del self._waiting[task]
            except BaseException:
                machine.abandon(waiter, self._now())
                self._perform()
                raise
        if waiter.refused:
            raise self._refusal(waiter, timeout, self._now())
        return machine.accept(waiter)

    def _is_in_line(self, holder: Any) -> bool:
        task = holder() if holder is not None else None
        return task is not None and task in self._waiting

    async def _look(self, link: Link) -> tuple[str, str] | None:
        """Look at a connection before it is lent: poll its socket, or ping when every borrow is to be checked.
        None if it is alive, else the reason and the failure."""
        if self.options.check_after == 0:
            try:
                await self._prove(link)
            except Exception as error:
                return "check_failed", self._loss(error)
            return None
        sqlstate = self._driver.peek(link.conn)
        return None if sqlstate is None else ("server_closed", base.peek_failure(sqlstate))

    async def _prove(self, link: Link) -> None:
        conn, session = link.conn, link.session
        if self._check is None:
            await self._driver.ping(conn, base.CHECK_TIMEOUT_S)
            return
        await _maybe(self._check(conn), base.CHECK_TIMEOUT_S)
        if session.touched or session.attributes or self._driver.condition(conn) != IDLE:
            await self._undo(link)

    async def _undo(self, link: Link) -> int:
        """Return a connection to its base state, or, where only a transaction was open, to what it carries; what
        was undone."""
        touched = self._to_undo(link)
        await self._driver.reset(link.conn, touched, base.RESET_TIMEOUT_S)
        carried: Any = link.slot.settings
        if touched and carried is not None:
            if replans(carried, None):
                await self._driver.convert(link.conn, "", True, base.RESET_TIMEOUT_S)
            link.slot.settings = None
        return touched

    async def _configured(self, conn: Any, timeout_s: float) -> None:
        """Run the configure hook as a block: what it set is committed. Then the connection is in base state."""
        if self._configure is not None:
            await _maybe(self._configure(conn), timeout_s)
            await self._driver.leave(conn, False)
            if self._driver.condition(conn) != IDLE:
                raise self._left_open("configure")
            self._note_configured(self._driver.session(conn))
        self._driver.settle(conn)

    async def release(self, conn: Any) -> None:
        """Give a connection back. Never awaits: what has to be undone is undone in a task of the pool.

        :raises NotLeased: it is not on loan from this pool
        """
        self._give_back(conn)

    def _give_back(self, conn: Any) -> None:
        link = self._lent.pop(id(conn), None)  # `_claim` written out: this is the path of every release
        if link is None:
            self._claim(conn)
            return
        slot = link.slot
        machine = self._machine
        link.conn = conn
        try:
            if link.gone:
                link.watch(conn)
            verdict = self._verdict(link, conn)
            why = self._why_broken(link, conn) if verdict == "broken" else ("", "")
            if link.session.statements:
                self._account(link)
        except BaseException:
            machine.release_broken(slot, self._now(), "broken", "private")
            self._perform()
            raise
        if verdict == "clean":
            machine.release(slot, self._now())
        elif verdict == "touched":
            machine.release_touched(slot, self._now())
        else:
            machine.release_broken(slot, self._now(), *why)
        if machine.effects or machine.mode != RUNNING:
            self._perform()

    def connection(
        self, timeout: float | None = None, *, settings: Mapping[str, Any] | None = None
    ) -> _Connection:
        """`async with pool.connection() as conn:` borrow, and at the end commit or roll back as the driver's own
        context manager does.

        :param timeout: seconds; default `acquire_timeout`
        :param settings: session settings that the connection is to carry, by name (docs/settings.md)
        :raises: as `acquire`
        """
        return _Connection(self, timeout, None if settings is None else self._wanted(settings))

    def transaction(
        self, timeout: float | None = None, *, settings: Mapping[str, Any] | None = None
    ) -> _Transaction:
        """`async with pool.transaction() as conn:` borrow, BEGIN, and COMMIT at the end, or ROLLBACK after an
        exception.

        :param timeout: seconds to wait for a connection; default `acquire_timeout`
        :param settings: session settings that the connection is to carry, by name (docs/settings.md)
        :raises: as `acquire`
        """
        return _Transaction(self, timeout, None if settings is None else self._wanted(settings))

    async def execute(
        self,
        sql: Any,
        params: Any = None,
        *,
        timeout: float | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> int:
        """Run one statement in autocommit, one round trip.

        :param params: as the driver takes them (asyncpg: a sequence for $1, $2 ...)
        :param timeout: seconds to wait for a connection
        :param settings: session settings under which it is to run, by name (docs/settings.md)
        :returns: the number of rows affected, -1 where there is none
        """
        return int(await self._once(self._driver.execute, sql, params, timeout, settings))

    async def fetch_all(
        self,
        sql: Any,
        params: Any = None,
        *,
        timeout: float | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> list[Any]:
        """Run one statement in autocommit; all its rows, as the driver gives them."""
        rows: list[Any] = await self._once(self._driver.fetch_all, sql, params, timeout, settings)
        return rows

    async def fetch_one(
        self,
        sql: Any,
        params: Any = None,
        *,
        timeout: float | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run one statement in autocommit; its first row, or None."""
        return await self._once(self._driver.fetch_one, sql, params, timeout, settings)

    async def fetch_value(
        self,
        sql: Any,
        params: Any = None,
        *,
        timeout: float | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run one statement in autocommit; the first column of its first row, or None."""
        return await self._once(self._driver.fetch_value, sql, params, timeout, settings)

    async def _once(
        self,
        run: Callable[[Any, Any, Any], Awaitable[Any]],
        sql: Any,
        params: Any,
        timeout: float | None,
        settings: Mapping[str, Any] | None,
    ) -> Any:
        conn = await self._borrow(timeout, True, None if settings is None else self._wanted(settings))
        try:
            return await run(conn, sql, params)
        finally:
            self._give_back(conn)

    # -- looking and moving -------------------------------------------------------------------------------------

    def stats(self) -> PoolStats:
        """The pool's figures now, consistent with each other. Call it on the pool's event loop."""
        return self._snapshot()

    def resize(self, *, min_size: int | None = None, max_size: int | None = None) -> None:
        """Move the limits while the pool runs. Surplus connections go when they are idle.

        :raises ConfigError: as the constructor
        """
        options = self._new_sizes(min_size, max_size)
        self.options = options
        self._machine.resize(self._now(), options.min_size, options.max_size)
        if self._loop is not None:
            self._perform()

    def refresh(self) -> None:
        """Replace every connection opened until now: idle ones at once, others when they come back."""
        self._machine.refresh(self._now())
        if self._loop is not None:
            self._perform()

    # -- effects ------------------------------------------------------------------------------------------------

    def _perform(self) -> None:
        """Do what the machine wants done. On the event loop; never awaits."""
        machine = self._machine
        effects, machine.effects = machine.effects, []
        for what, subject in effects:
            if what in (GRANT, REFUSE):
                if subject.data is not None and not subject.data.done():  # done: its task was cancelled just now
                    subject.data.set_result(None)
            elif what == WAKE:
                self._arm()
            else:
                self._start(what, subject)
        for condition, done in self._watchers:
            if not done.done() and condition():
                done.set_result(None)

    def _start(self, what: str, slot: Slot) -> None:
        loop = self._loop
        assert loop is not None
        begun = False

        async def work() -> None:
            nonlocal begun
            begun = True
            await _WORKS[what](self, slot)

        task = loop.create_task(work(), name=f"cenote-{self.name}")
        self._tasks.add(task)

        def ended(task: asyncio.Task[None]) -> None:
            self._tasks.discard(task)
            if not begun and self._loop is loop:  # cancelled before its first step: the work is still to be done
                self._machine.effects.append((what, slot))
                loop.call_soon(self._perform)

        task.add_done_callback(ended)

    def _arm(self) -> None:
        due = min(self._machine.alarm, self._next_leak_check())
        if due < self._timer_at and self._loop is not None:
            if self._timer is not None:
                self._timer.cancel()
            self._timer_at = due
            self._timer = self._loop.call_later(max(0.0, due - self._now()), self._tick)

    def _tick(self) -> None:
        self._timer, self._timer_at = None, NEVER
        now = self._now()
        self._machine.tick(now)
        self._perform()
        for link in self._long_leases(now, self._leases()):
            self._tell_long_lease(link)
        if self._machine.mode != CLOSED or self._lent:
            self._arm()

    def _next_leak_check(self) -> float:
        after = self.options.leak_after
        if after is None:
            return NEVER
        dues = [link.slot.since + after for link in self._lent.values() if not link.warned]
        return float(min(dues, default=self._now() + after))

    def _input(self, method: Callable[..., Any], *args: Any) -> Any:
        """Feed the machine and perform what follows."""
        answer = method(*args)
        self._perform()
        return answer

    def _dropped(self, link: Link) -> None:
        """A borrower dropped its connection. Called by the collector, on any thread: only passes it on."""
        loop = self._loop
        if loop is not None and not loop.is_closed():
            loop.call_soon_threadsafe(self._leaked, link)

    def _leaked(self, link: Link) -> None:
        if link.slot.state() != "leased" or not link.gone:
            return
        self._forget(link)
        self._input(self._machine.release_broken, link.slot, self._now(), "leaked", "private")
        self._tell_leak(link)

    async def _open_one(self, slot: Slot) -> None:
        machine = self._machine
        if not self._input(machine.dial_needed, slot, self._now()):
            return
        conn: Any = None
        started = self._now()
        try:
            conn = await self._driver.connect(self.options.connect_timeout)
            await self._configured(conn, self.options.connect_timeout)
            handle = self._driver.handle(conn)
            link = Link(
                slot, conn, self._driver.session(conn), handle, self._dropped if self._driver.weak else None
            )
        except BaseException as error:
            failure = self._dial_failure(error)
            if isinstance(error, Exception):  # a loop that ends cancels its tasks: that is no failure to tell of
                self._dial_error = error
            try:
                if conn is not None:
                    await self._close_quietly(conn, None)
            finally:
                self._input(machine.dial_failed, slot, self._now(), failure)
            if isinstance(error, Exception):
                self._tell("dial_failed", failure, self._now() - started, error=error)
            if not isinstance(error, Exception):
                raise
            return
        slot.data = link
        self._reached()
        self._input(machine.dialed, slot, self._now())
        self._tell("opened", slot.opened, self._now() - started)

    async def _ping_one(self, slot: Slot) -> None:
        link: Any = slot.data
        machine = self._machine
        try:
            await self._prove(link)
        except BaseException as error:
            self._input(machine.check_failed, slot, self._now(), "check_failed", self._loss(error))
            if not isinstance(error, Exception):
                raise
        else:
            self._input(machine.check_passed, slot, self._now(), True)

    async def _peek_one(self, slot: Slot) -> None:
        link: Any = slot.data
        try:
            sqlstate = self._driver.peek(link.conn)
        except Exception:
            base.logger.exception('pool "%s": a look at a socket failed', self.name)
            sqlstate = ""
        if sqlstate is None:
            self._input(self._machine.check_passed, slot, self._now(), False)
        else:
            failure = base.peek_failure(sqlstate)
            self._input(self._machine.check_failed, slot, self._now(), "server_closed", failure)

    async def _reset_one(self, slot: Slot) -> None:
        link: Any = slot.data
        conn, touched = link.conn, 0
        try:
            touched = await self._undo(link)
            if self._after_reset(touched):
                await self._configured(conn, base.RESET_TIMEOUT_S)
            if self._reset_hook is not None:
                await _maybe(self._reset_hook(conn), base.RESET_TIMEOUT_S)
                if self._driver.condition(conn) != IDLE:
                    await self._driver.reset(conn, 0, base.RESET_TIMEOUT_S)
        except BaseException as error:
            self._input(self._machine.reset_failed, slot, self._now(), self._loss(error))
            self._tell("reset", "reset_failed", error=error)
            if not isinstance(error, Exception):
                raise
        else:
            link.session.sqlstate = ""
            self._input(self._machine.reset_done, slot, self._now())
            self._tell("reset", "touched", detail=hex(touched))

    async def _close_one(self, slot: Slot) -> None:
        link: Any = slot.data
        conn, link.conn = link.conn, None
        try:
            await self._close_quietly(conn, link.handle)
        finally:
            self._input(self._machine.closed, slot, self._now())
            self._tell("closed", slot.reason)

    async def _close_quietly(self, conn: Any, handle: Any) -> None:
        try:
            await self._driver.close(conn, handle, base.CLOSE_TIMEOUT_S)
        except Exception as error:
            base.logger.debug('pool "%s": close failed: %s', self.name, error)


class _Connection:
    """The block of `pool.connection()`."""

    __slots__ = ("_conn", "_link", "_pool", "_timeout", "_uses", "_wanted")

    def __init__(self, pool: AsyncPool, timeout: float | None, wanted: Carried | None) -> None:
        self._pool = pool
        self._timeout = timeout
        self._wanted = wanted

    async def __aenter__(self) -> Any:
        self._conn = conn = await self._pool._borrow(self._timeout, True, self._wanted)
        self._link = self._pool._lent.get(id(conn))
        self._uses = 0 if self._link is None else self._link.slot.uses
        return conn

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None
    ) -> None:
        conn, self._conn = self._conn, None
        if not self._pool._still_lent(conn, self._link, self._uses):
            return
        try:
            await self._pool._driver.leave(conn, kind is not None)
        except Exception:
            # The block's own error, or its cancellation, matters more than a roll-back that failed because of
            # it; the connection's condition tells the pool all the same.
            if kind is None:
                raise
        finally:
            self._pool._give_back(conn)


class _Transaction:
    """The block of `pool.transaction()`."""

    __slots__ = ("_conn", "_link", "_pool", "_timeout", "_uses", "_wanted")

    def __init__(self, pool: AsyncPool, timeout: float | None, wanted: Carried | None) -> None:
        self._pool = pool
        self._timeout = timeout
        self._wanted = wanted

    async def __aenter__(self) -> Any:
        self._conn = conn = await self._pool._borrow(self._timeout, True, self._wanted)
        self._link = self._pool._lent.get(id(conn))
        self._uses = 0 if self._link is None else self._link.slot.uses
        try:
            await self._pool._driver.begin(conn)
        except BaseException:
            self._pool._give_back(conn)
            raise
        return conn

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None
    ) -> None:
        conn, self._conn = self._conn, None
        driver = self._pool._driver
        if not self._pool._still_lent(conn, self._link, self._uses):
            return
        try:
            if kind is None:
                await driver.commit(conn)
            else:
                await driver.rollback(conn)
        except Exception:
            # The block's own error, or its cancellation, matters more than a roll-back that failed because of
            # it; the connection's condition tells the pool all the same.
            if kind is None:
                raise
        finally:
            self._pool._give_back(conn)


async def _at_the_loops_end(pool_ref: weakref.ref[AsyncPool]) -> AsyncGenerator[None, None]:
    """Close what is idle when the event loop ends, for a program that ends without closing its pool. A generator,
    because a loop tells those of its end (`shutdown_asyncgens`), and nobody else."""
    try:
        yield
    finally:
        pool = pool_ref()
        if pool is not None and asyncio.get_running_loop() is pool._loop:
            await pool._put_away()


async def _maybe(result: Any, timeout_s: float) -> Any:
    """What a hook returned, awaited if it was a coroutine function: for so long, because it occupies a slot."""
    if not isawaitable(result):
        return result
    async with asyncio.timeout(timeout_s):
        return await result


_WORKS: dict[str, Callable[[AsyncPool, Slot], Coroutine[Any, Any, None]]] = {
    OPEN: AsyncPool._open_one,
    PING: AsyncPool._ping_one,
    PEEK: AsyncPool._peek_one,
    RESET: AsyncPool._reset_one,
    CLOSE: AsyncPool._close_one,
}
