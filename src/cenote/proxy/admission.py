"""Who may go on with a log-in now: turns at a bounded rate, and a bound on log-ins under way.

A log-in costs the event loop more than a query, so a thousand at once would hold up everybody who is in. Turns are
given in the order in which they were asked for, `login_rate` in a second. A log-in asks for its turn once its
startup packet is read: cancel requests and probes never wait.

    present --turn--> in line --> present --aside--> waits for a server --> present --> logged in, refused or gone

Those present are bounded by `max_logins`: one more, and the one that has been present longest is ended; while even
that one has just come, nobody is accepted. Those in line, or waiting for a server, do not count: they wait for us.
The line is bounded by `max_clients`. Whoever stays silent keeps nobody out: the silent are the oldest soon.

It knows nothing of what log-ins do, and reads its bounds anew each time, so that a reload holds at once.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from cenote.wire.refusal import Refusal

if TYPE_CHECKING:
    from cenote.proxy.config import Listen

_BURST_S = 0.02  # turns that were not asked for in this time may be had at once
_GRACE_S = 0.5  # nobody is cut before: a client far away, or one of a crowd, needs so long to say who it is
_TICK_S = 0.002  # turns are given so often at most: uvloop's clock counts in ms, and would come back too early

_Cut = Callable[[str, str], object]


class Admission:
    """One for all listeners. On the event loop.

    :param listen: gives the options that hold now: `login_rate`, `max_logins`, `max_clients`

    admitted: turns given; cut: log-ins ended for `max_logins`; turned_away: for the length of the line
    """

    def __init__(self, listen: Callable[[], Listen]) -> None:
        self.admitted = 0
        self.cut = 0
        self.turned_away = 0
        self._listen = listen
        # In the order of arrival, or of the end of the last wait: the first has been present longest.
        self._present: dict[asyncio.Task[Any], tuple[float, _Cut]] = {}
        self._line: dict[asyncio.Future[None], None] = {}
        self._even = -math.inf  # when the next turn would be due if they had been given evenly
        self._timer: asyncio.TimerHandle | None = None

    @property
    def waiting(self) -> int:
        """How many stand in line."""
        return len(self._line)

    @property
    def present(self) -> int:
        """How many are under way and wait for nobody but their client."""
        return len(self._present)

    # -- presence ---------------------------------------------------------------------------------------------

    def has_room(self) -> bool:
        """Whether one more log-in may begin, if need be in the place of another."""
        return len(self._present) < self._listen().max_logins or self._grown_old()

    def enter(self, task: asyncio.Task[Any], cut: _Cut) -> None:
        """A log-in begins in this task, and is under way until `leave`, or the task's end.

        :param cut: ends it, with a SQLSTATE and the reason in words
        """
        task.add_done_callback(self.leave)
        self._join(task, cut)

    def leave(self, task: asyncio.Task[Any] | None) -> None:
        """This log-in is under way no more."""
        if task is not None:
            self._present.pop(task, None)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Within the block the log-in of the current task waits for us, and does not count."""
        task = asyncio.current_task()
        known = self._present.pop(task, None) if task is not None else None
        try:
            yield
        finally:
            if task is not None and known is not None and not task.cancelling():
                self._join(task, known[1])

    def _grown_old(self) -> bool:
        """Whether the one present longest has had its time."""
        since, _ = next(iter(self._present.values()))
        return asyncio.get_running_loop().time() - since >= _GRACE_S

    def _join(self, task: asyncio.Task[Any], cut: _Cut) -> None:
        now = asyncio.get_running_loop().time()
        self._present[task] = now, cut
        limit = self._listen().max_logins
        # Those who come back from the line may be more for a moment: as many as have their turn in that time.
        while len(self._present) > limit and self._grown_old():
            oldest = next(iter(self._present))
            since, cut = self._present.pop(oldest)
            self.cut += 1
            cut(
                "53300",
                f"cenote: more than {limit} log-ins are under way (max_logins), and this one has taken longest: "
                f"{now - since:.1f} s",
            )

    # -- turns ------------------------------------------------------------------------------------------------

    async def turn(self) -> None:
        """Wait for one's turn. O(1)

        :raises Refusal: the line is as long as there may be clients.
        """
        loop = asyncio.get_running_loop()
        if not self._line and self._due() <= loop.time():
            self._give(loop.time())
            return
        bound = self._listen().max_clients
        if len(self._line) >= bound:
            self.turned_away += 1
            raise Refusal(
                "53300",
                f"cenote: {len(self._line)} log-ins wait for their turn, and max_clients is {bound}",
                hint="try again later; login_rate is how many have their turn in a second",
            )
        place = loop.create_future()
        self._line[place] = None
        self._arrange()
        with self.aside():
            try:
                await place
            finally:
                self._line.pop(place, None)  # it may have left before its turn

    def _due(self) -> float:
        """When the next turn may be given."""
        rate = self._listen().login_rate
        return self._even - max(0.0, _BURST_S - 1 / rate)

    def _give(self, now: float) -> None:
        self._even = max(self._even, now) + 1 / self._listen().login_rate
        self.admitted += 1

    def _arrange(self) -> None:
        if self._line and self._timer is None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(max(_TICK_S, self._due() - loop.time()), self._go_on)

    def _go_on(self) -> None:
        self._timer = None
        now = asyncio.get_running_loop().time()
        while self._line and self._due() <= now:
            place = next(iter(self._line))
            del self._line[place]
            if not place.done():
                self._give(now)
                place.set_result(None)
        self._arrange()
