"""What the two pools share: options, names, the machine, hooks, reports. No threads, no event loop.

`Pool` and `AsyncPool` are shells: they turn the machine's effects into I/O of their colour. Everything that
neither blocks nor awaits is here, once.
"""

from __future__ import annotations

import itertools
import logging
import os
import random
import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cenote import errors
from cenote.config import PoolOptions, pool_options
from cenote.core.machine import CLOSED, Machine
from cenote.core.slot import Waiter
from cenote.pool.drivers.base import BROKEN, IDLE, CannotReset, Session
from cenote.pool.holders import HOLDERS_SHOWN, Holder, cause, describe, first_line
from cenote.pool.link import Link
from cenote.pool.settings import TOUCHES, Carried, Wishes, WrongSettings, conversion, drops, replans
from cenote.pool.stats import PoolStats, snapshot
from cenote.reasons import Failure, failure_of, fatal_failure
from cenote.sql import touch

logger = logging.getLogger("cenote.pool")

CHECK_TIMEOUT_S = 5.0
RESET_TIMEOUT_S = 5.0
CONVERT_TIMEOUT_S = 5.0
CLOSE_TIMEOUT_S = 5.0
REPORT_KEPT_S = 0.25  # a thousand callers that time out together share one look at the holders
DIAL_TOLD_EVERY_S = 30.0

_WARNED = frozenset(("leaked", "held_long", "cut", "dial_failed"))
_numbers = itertools.count(1)


@dataclass(frozen=True, slots=True)
class Event:
    """What a listener is told. `reason` is a word of `cenote.reasons`; `seconds` where a duration belongs to it.

    kind: "opened", "closed", "dial_failed", "refused", "reset", "leaked", "held_long", "cut"
    """

    pool: str
    kind: str
    reason: str = ""
    seconds: float = 0.0
    detail: str = ""
    error: BaseException | None = None


class BasePool:
    """The part of a pool that neither blocks nor awaits."""

    _driver: Any

    def __init__(
        self,
        name: str | None,
        options: Mapping[str, Any],
        configure: Callable[[Any], Any] | None,
        check: Callable[[Any], Any] | None,
        listener: Callable[[Event], Any] | None,
        clock: Callable[[], float],
    ) -> None:
        self.name = name if name is not None else f"pool-{next(_numbers)}"
        given = dict(options)
        self._reset_hook: Callable[[Any], Any] | None = None
        if callable(given.get("reset")):
            self._reset_hook = given.pop("reset")
        problems = [
            f"{what} = {hook!r}: must be callable"
            for what, hook in (
                ("configure", configure),
                ("check", check),
                ("listener", listener),
                ("clock", clock),
            )
            if hook is not None and not callable(hook)
        ]
        if not isinstance(self.name, str) or not self.name:
            problems.append(f"name = {name!r}: must be a non-empty text")
            self.name = "?"
        try:
            self.options: PoolOptions = pool_options(given, pool=self.name)
        except errors.ConfigError as error:
            problems.extend(error.problems)
        if problems:
            raise errors.ConfigError(problems, pool=self.name)
        self._now = clock
        self._configure = configure
        self._check = check
        self._listener = listener
        self._lent: dict[int, Link] = {}
        self._inherited: list[Any] = []  # in a forked child: the leases that were out
        self._in_query_s = 0.0
        self._wishes = Wishes()
        self._conversions = 0
        self._configured_touches = 0  # what the configure hook was seen to touch
        self._dial_error: BaseException | None = None
        self._dial_told = -DIAL_TOLD_EVERY_S
        self._report: tuple[float, tuple[Holder, ...]] = (-1.0, ())
        self._warned_sites: set[str] = set()
        self._machine = self._new_machine()

    def _new_machine(self) -> Machine:
        options = self.options
        return Machine(
            options.min_size,
            options.max_size,
            options.max_waiting,
            options.idle_timeout,
            options.max_lifetime,
            options.check_after,
            options.codel,
            random.random,
        )

    def __repr__(self) -> str:
        m = self._machine
        return (
            f"<{type(self).__name__} {self.name!r} {m.mode}: {m.size}/{m.max_size} connections, "
            f"{m.shelf.size()} idle, {m.leased.size} leased, {m.waiting.size} waiting>"
        )

    @property
    def closed(self) -> bool:
        """True once `close` was called."""
        return self._machine.mode == CLOSED

    # -- telling ------------------------------------------------------------------------------------------------

    def _tell(
        self,
        kind: str,
        reason: str = "",
        seconds: float = 0.0,
        detail: str = "",
        error: BaseException | None = None,
    ) -> None:
        """Log an event and pass it to the listener. Never with the lock held."""
        level = logging.WARNING if kind in _WARNED else logging.DEBUG
        if kind == "dial_failed":
            # A server that is down fails a dial every second or two; once in a while is enough to say so.
            now = self._now()
            if now < self._dial_told + DIAL_TOLD_EVERY_S:
                level = logging.DEBUG
            else:
                self._dial_told = now
        if logger.isEnabledFor(level):
            text = " ".join(
                part
                for part in (kind, reason if reason != kind else "", detail, first_line(error) if error else "")
                if part
            )
            logger.log(level, 'pool "%s": %s', self.name, text)
        if self._listener is not None:
            try:
                self._listener(Event(self.name, kind, reason, seconds, detail, error))
            except BaseException:  # it runs on a worker, the keeper or the loop: there is nobody to catch it
                logger.exception('pool "%s": the listener failed on %s', self.name, kind)

    def _reached(self) -> None:
        """A dial succeeded: what kept failing is over."""
        if self._dial_error is not None:
            self._dial_error = None
            self._dial_told = -DIAL_TOLD_EVERY_S
            logger.info('pool "%s": the server can be reached again', self.name)

    def _tell_leak(self, link: Link) -> None:
        message = f'pool "{self.name}": a connection was dropped without being released; acquired at {link.site()}'
        self._tell("leaked", "leaked", self._now() - link.slot.since, f"acquired at {link.site()}")
        _warn_of_leak(message)

    def _long_leases(self, now: float, links: Iterable[Link]) -> list[Link]:
        """Leases older than `leak_after` that were not warned about yet; marks them."""
        after = self.options.leak_after
        if after is None:
            return []
        late = [link for link in links if not link.warned and now - link.slot.since >= after]
        for link in late:
            link.warned = True
        return late

    def _tell_long_lease(self, link: Link) -> None:
        holder = describe(link, self._driver, self._now())
        self._tell("held_long", "", holder.age_s, f"for {holder.age_s:.1f} s\n{holder}")
        _warn_of_leak(f'pool "{self.name}": a lease is out for {holder.age_s:.1f} s\n{holder}')

    # -- refusing -----------------------------------------------------------------------------------------------

    def _refusal(self, waiter: Waiter, timeout: float, now: float) -> errors.AcquireRefused:
        """The error for a refused waiter, with the numbers. Not with the lock held: it takes stacks."""
        m = self._machine
        reason = waiter.refused
        self._tell("refused", reason, now - waiter.since)
        if reason == "closed":
            return errors.PoolClosed("it is closed; make a new pool, or acquire before close()", pool=self.name)
        if reason == "draining":
            return errors.PoolDraining(
                "it is draining and takes no new leases; resume() ends that", pool=self.name
            )
        if reason == "queue_full":
            return errors.QueueFull(
                f"max_waiting = {m.max_waiting} callers already wait ({m.leased.size}/{m.max_size} leased): "
                "retry later with a pause, or raise max_waiting",
                pool=self.name,
            )
        if reason == "shed":
            return errors.Shed(
                f"refused after {now - waiter.since:.2f} s: the queue has not drained for 2 s "
                f"({m.leased.size}/{m.max_size} leased, {m.waiting.size} waiting): retry later with a pause",
                pool=self.name,
            )
        if reason == "connect_failed":
            error = self._dial_error
            failed = errors.ConnectFailed(
                f"the server refuses the connection: {first_line(error) if error else 'unknown'}",
                pool=self.name,
            )
            failed.__cause__ = error
            return failed
        return self._timed_out(waiter, timeout, now)

    def _timed_out(self, waiter: Waiter, timeout: float, now: float) -> errors.AcquireTimeout:
        m = self._machine
        holders = self._holders(now)
        down = self._dial_error if m.growth.failing() else None
        first = m.waiting.first
        oldest = now - (first.since if first is not None else waiter.since)
        cleaning = m.resetting.size + m.checking.size + m.closing.size
        why = cause(holders, limit=m.max_size, connecting=m.connecting.size, cleaning=cleaning, down=down)
        error = errors.AcquireTimeout(
            f"no connection within {timeout:.2f} s ({m.leased.size}/{m.max_size} leased, "
            f"{m.connecting.size} dialing, {m.waiting.size} waiting, oldest {max(0.0, oldest):.2f} s). {why}",
            pool=self.name,
            cause=why,
            holders=holders[:HOLDERS_SHOWN],
        )
        error.holders = holders
        error.__cause__ = down
        return error

    def _holders(self, now: float) -> tuple[Holder, ...]:
        if now - self._report[0] > REPORT_KEPT_S:
            links = sorted(self._leases(), key=_lent_since)
            self._report = (now, tuple(describe(link, self._driver, now) for link in links))
        return self._report[1]

    def holders(self) -> tuple[Holder, ...]:
        """Every lease that is out, the oldest first: who, since when, where acquired, doing what, its stack."""
        self._report = (-1.0, ())
        return self._holders(self._now())

    def _leases(self) -> list[Link]:
        """The leases that are out: a copy, because other threads lend and claim without the lock."""
        return list(self._lent.values())

    def _nested(self, me: Any, waits: Callable[[Any], bool]) -> tuple[errors.NestedAcquireDeadlock | None, str]:
        """`me` stands in line. Everybody who holds a lease waits too: the error to raise. `me` holds one himself:
        the warning to give, once per site.

        Only `with` blocks prove who holds a lease; one from `acquire()` may have been handed to somebody else.
        Called with the lock held, and only on the way into the line."""
        leases = self._leases()
        mine = [link for link in leases if link.scoped and link.holder == me and self._is_held(link)]
        if not mine:
            return None, ""
        most = self._machine.max_size
        if len(leases) >= most and all(
            link.scoped
            and not link.session.query_since_s
            and (link.holder == me or waits(link.holder))
            and self._is_held(link)
            for link in leases
        ):
            sites = "; ".join(sorted({link.site() for link in leases}))
            return errors.NestedAcquireDeadlock(
                f"all {most} connections are held by callers that wait for another one of this pool "
                f"(acquired at {sites}): pass the connection on instead of acquiring a second one",
                pool=self.name,
            ), ""
        site = mine[0].site()
        if site in self._warned_sites or len(self._warned_sites) >= 1000:
            return None, ""
        self._warned_sites.add(site)
        return None, (
            f'pool "{self.name}": the holder of a connection acquired at {site} waits for a second one; '
            f"{most} of these at once would deadlock: pass the connection on, or raise max_size"
        )

    def _is_held(self, link: Link) -> bool:
        """Is the borrower still inside the `with` block that `link` was lent to?"""
        return True

    # -- giving back --------------------------------------------------------------------------------------------

    def _still_lent(self, conn: Any, link: Link | None, uses: int) -> bool:
        """For a block at its end: does it still have its lease? False for one lent before a fork, and
        for one that was dropped together with its block, which the collector tells first: that is a leak.

        :raises NotLeased: it was released inside the block; somebody else may have the connection by now."""
        if link is not None and link.gone:
            return False
        if link is not None and self._lent.get(link.key) is link and link.slot.uses == uses:
            return True
        if any(conn is each for each in self._inherited):
            return False
        raise errors.NotLeased(f"{conn!r} was released before the end of its block", pool=self.name)

    def _claim(self, conn: Any) -> Link | None:
        """The link of a connection that comes back; None for one lent before a fork, which is the parent's: a
        forked child has the parent's stack, and so leaves the blocks that are on it.

        :raises NotLeased: it is not on loan from this pool."""
        link = self._lent.pop(id(conn), None)
        if link is None and any(conn is each for each in self._inherited):
            return None
        if link is None:
            mine = any(link.conn is conn for link in self._links())
            why = "it was released already" if mine else "it is another pool's, or was released and closed already"
            raise errors.NotLeased(f"{conn!r} is not on loan from this pool: {why}", pool=self.name)
        return link

    def _forget(self, link: Link) -> None:
        """A dropped connection is no longer on loan. By identity: a new one may live at its address by now."""
        key = link.key
        if self._lent.get(key) is link:
            del self._lent[key]

    # -- settings that connections carry ------------------------------------------------------------------------

    def _wanted(self, settings: Mapping[str, Any] | None) -> Carried | None:
        """The canonical form of the settings a borrower asks for, None for none.

        :raises ConfigError: naming everything that is wrong with them."""
        if settings is None:
            return None
        problems: Sequence[str] = ()
        try:
            wanted = self._wishes.read(settings)
        except WrongSettings as wrong:
            wanted, problems = None, wrong.problems
        if wanted is None and not problems:
            return None
        if not getattr(self._driver, "carries", False):
            problems = [
                *problems,
                f"settings: driver {self._driver.name!r} cannot carry any: Cenote knows neither whether the "
                "server is PostgreSQL nor what a borrower changes",
            ]
        if self.options.reset == "never":
            problems = [
                *problems,
                'settings: not with reset="never": what a connection behind another pooler carries is not known '
                'there; use reset="auto" before the server itself, or SET LOCAL in a transaction',
            ]
        if problems:
            raise errors.ConfigError(problems, pool=self.name)
        return wanted

    def _needs_configure(self, link: Link, wanted: Carried | None) -> bool:
        """Would a connection lose settings that the `configure` hook may have set before?"""
        sets = self._configure is not None and self._configured_touches & (TOUCHES | touch.UNKNOWN)
        return bool(sets) and drops(link.slot.settings, wanted)

    def _conversion(self, link: Link, wanted: Carried | None) -> tuple[str, bool]:
        """The script that makes a connection carry what is wanted; have its prepared statements to go, too?"""
        carried: Any = link.slot.settings
        script = conversion(carried, wanted, self.options.init_query)
        return script, replans(carried, wanted)

    def _misfit(self, link: Link, wanted: Carried | None, error: BaseException) -> tuple[str, str] | None:
        """A connection could not be made to carry what is wanted. Why it is of no more use, if another may do in
        its place: it had died while it was idle, which only shows now. None: the error is the borrower's."""
        slot = link.slot
        if not isinstance(error, Exception):
            return None
        names = ", ".join(name for name, _ in wanted or ()) or "none (the base state)"
        error.add_note(f'pool "{self.name}": while a connection was made to carry these settings: {names}')
        fresh = slot.uses == 1 and not slot.rested
        if fresh or isinstance(error, TimeoutError) or self._driver.condition(link.conn) != BROKEN:
            return None
        return "server_closed", self._loss(error)

    def _unlent(self, link: Link, error: BaseException) -> tuple[str, str] | None:
        """What the machine is to be told of a connection that was granted and could not be lent: reason and
        failure of a broken one, None for one that a reset brings back."""
        if not link.session.touched:  # not by a conversion: those touch it until they are done
            return "broken", Failure.PRIVATE.value
        try:
            broken = self._driver.condition(link.conn) == BROKEN
        except Exception:
            broken = True
        if not broken:
            return None
        return "broken", self._loss(error) if isinstance(error, Exception) else Failure.PRIVATE.value

    def _to_undo(self, link: Link) -> int:
        """What a reset has to undo. A lease that has touched its session leaves nothing of what it was to carry,
        either: `init_query` and `configure` run again, and they are to find the base state."""
        touched: int = link.session.touched
        if link.slot.settings is None:
            return touched
        undone = touched or self.options.reset == "always" or self._reset_hook is not None
        return touched | TOUCHES if undone else 0

    def _account(self, link: Link) -> None:
        session = link.session
        if session.statements:
            self._in_query_s += session.in_query_s
            session.in_query_s = 0.0
            session.statements = 0

    def _verdict(self, link: Link, conn: Any) -> str:
        """What the machine is to be told of a connection that comes back: "clean", "touched" or "broken"."""
        condition = self._driver.condition(conn)
        session = link.session
        if condition == IDLE:
            if session.attributes:
                self._driver.tidy(conn)
            if self._reset_hook is not None or self.options.reset == "always":
                return "touched"
            if session.touched and self.options.reset != "never":
                return "touched"
            return "clean"
        if condition == BROKEN:
            return "broken"
        return "touched"  # a transaction is open, or a query in flight

    def _note_configured(self, session: Session) -> None:
        """The configure hook has run: what it touched is part of the base state."""
        self._configured_touches |= session.touched

    def _after_reset(self, touched: int) -> bool:
        """Must `configure` run again, because what it set was undone?"""
        return self._configure is not None and bool(touched or self.options.reset == "always")

    def _links(self) -> list[Link]:
        """Every open connection, wherever it is."""
        m = self._machine
        slots = m.shelf.slots() + [
            slot for ring in (m.checking, m.leased, m.resetting, m.closing) for slot in ring
        ]
        return [slot.data for slot in slots if isinstance(slot.data, Link)]

    # -- fork ---------------------------------------------------------------------------------------------------

    def _start_over(self) -> None:
        """Everything that belongs to this process: after the constructor, and in a forked child."""
        raise TypeError("a pool without a shell")

    def _after_fork_in_child(self) -> None:
        """Give up what was inherited, without a byte to the server, and begin anew, unopened."""
        links = self._links()
        closed = self._machine.mode == CLOSED
        self._machine = self._new_machine()
        if closed:
            self._machine.close(self._now())
        self._start_over()
        for link in links:
            conn = link.ref()
            if conn is not None:
                if link.conn is None:
                    self._inherited.append(conn)
                try:
                    self._driver.disown(conn)
                except Exception as error:
                    logger.warning('pool "%s": disown failed: %s', self.name, error)

    # -- looking ------------------------------------------------------------------------------------------------

    def _snapshot(self) -> PoolStats:
        return snapshot(self.name, self._machine, self._in_query_s, self._conversions)

    def assert_all_returned(self) -> None:
        """For tests: raise unless every lease came back.

        :raises LeasesOutstanding: with every holder, where it acquired and where it is now.
        """
        holders = self.holders()
        if holders:
            text = "\n".join(str(holder) for holder in holders)
            error = errors.LeasesOutstanding(f"{len(holders)} leases are still out\n{text}", pool=self.name)
            error.holders = holders
            raise error

    def _new_sizes(self, min_size: int | None, max_size: int | None) -> PoolOptions:
        changes = {k: v for k, v in (("min_size", min_size), ("max_size", max_size)) if v is not None}
        return self.options.replaced(changes, pool=self.name)

    def _timeout(self, timeout: float | None) -> float:
        if timeout is None:
            return self.options.acquire_timeout
        if not timeout >= 0:
            raise errors.ConfigError([f"timeout = {timeout!r}: seconds, 0 (do not wait) or more"], pool=self.name)
        return timeout

    def _dial_failure(self, error: BaseException) -> str:
        """What a failed dial says; an error that is not the driver's (a hook's) says nothing of the server."""
        try:
            failure, _ = self._driver.failure(error)
        except Exception:
            return Failure.TEMPORARY.value
        return str(failure.value)

    def _loss(self, error: BaseException) -> str:
        """What the failed check or reset of an open connection says: what the server said, else that this
        connection is lost; only a dial that fails in silence accuses the destination."""
        if isinstance(error, CannotReset):
            return Failure.PRIVATE.value
        try:
            failure, sqlstate = self._driver.failure(error)
        except Exception:
            return Failure.PRIVATE.value
        return str(failure.value) if sqlstate else Failure.CONNECTION.value

    def _left_open(self, hook: str) -> errors.MisuseError:
        return errors.MisuseError(
            f"the {hook} hook left a transaction open: commit or roll back in it", pool=self.name
        )

    def _why_broken(self, link: Link, conn: Any) -> tuple[str, str]:
        """Reason and failure of a connection that came back unusable."""
        said = fatal_failure(link.session.sqlstate)
        if said is not None:
            return "broken", said.value
        if self._driver.closed_by_borrower(conn):
            return "by_borrower", Failure.PRIVATE.value
        return "broken", Failure.CONNECTION.value


def _warn_of_leak(message: str) -> None:
    """Where warnings are errors there is nobody to catch this one: it is given by the keeper or by the loop."""
    try:
        warnings.warn(message, errors.LeakWarning, stacklevel=3)
    except errors.LeakWarning:
        logger.debug("a leak warning was turned into an error")


def peek_failure(sqlstate: str) -> str:
    """What a closed idle connection says: its server's last word, or a bare end of stream."""
    return failure_of(sqlstate).value if sqlstate else Failure.CONNECTION.value


def _lent_since(link: Link) -> float:
    return float(link.slot.since)


pools: weakref.WeakSet[BasePool] = weakref.WeakSet()  # those whose shell is complete


def _after_fork_in_child() -> None:
    for pool in list(pools):
        pool._after_fork_in_child()


os.register_at_fork(after_in_child=_after_fork_in_child)
