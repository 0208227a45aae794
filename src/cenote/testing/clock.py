"""Time that tests move: a clock for any pool, and an asyncio event loop that never sleeps.

`VirtualClock` stands still until a test advances it. `VirtualLoop` advances by itself: when nothing is ready
to run, the time jumps to the next timer, so a test of half an hour of idle timeouts takes a millisecond and
runs the same way every time. It refuses what would bring the outside world in: sockets, subprocesses and
executors; tests with a real driver use a real loop.
"""

from __future__ import annotations

import asyncio
import heapq
import weakref
from collections.abc import Callable, Coroutine
from concurrent.futures import Executor
from contextvars import Context
from typing import Any, TypeVar, TypeVarTuple, Unpack

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

START_S = 1000.0  # not 0.0: a time of zero means "not yet" in too many places, in drivers and in programs


class Stuck(RuntimeError):
    """Every task waits for another one and no timer is armed: nothing can ever happen. Lists the tasks."""


class VirtualClock:
    """A monotonic clock that moves only when told to: `Pool(clock=VirtualClock())`.

    :param now: where it starts, in seconds

    The threads of a `Pool` sleep in real time and read this clock when they wake up. A pool that was handed to
    `drive` does what has become due within `advance`, in the calling thread, before `advance` returns.
    """

    def __init__(self, now: float = START_S) -> None:
        self.now = now
        self._driven: weakref.WeakSet[Any] = weakref.WeakSet()

    def __call__(self) -> float:
        return self.now

    def drive(self, pool: Any) -> None:
        """Let this pool (`Pool` or `AsyncPool`) do what has become due at every `advance`."""
        self._driven.add(pool)

    def advance(self, seconds: float) -> None:
        """Move on.

        :param seconds: 0 or more
        :raises ValueError: a monotonic clock does not go back
        """
        if not seconds >= 0:
            raise ValueError(f"cannot advance by {seconds!r} seconds: a monotonic clock does not go back")
        self.now += seconds
        for pool in list(self._driven):
            pool._tick()


class VirtualLoop(asyncio.BaseEventLoop):
    """An asyncio event loop whose time jumps to the next timer when nothing is ready.

    Callbacks run in the order in which they became ready, timers in order of their time, equal times in order
    of arming. `call_soon_threadsafe` works (finalizers use it), but no thread can wake a loop that never waits.

    :raises Stuck: from `run_forever` and `run_until_complete`, when nothing is ready and no timer is armed
    """

    def __init__(self) -> None:
        super().__init__()
        self._now = START_S
        self._order = 0
        self._timers: list[tuple[float, int, asyncio.TimerHandle]] = []
        self._ready_handles: list[asyncio.Handle] = []

    def time(self) -> float:
        return self._now

    # -- what asyncio's base class leaves open, or does in an order that is not settled for equal times ---------

    def call_soon(
        self, callback: Callable[[Unpack[Ts]], object], *args: *Ts, context: Context | None = None
    ) -> asyncio.Handle:
        self._check_open()
        handle = asyncio.Handle(callback, args, self, context)
        self._ready_handles.append(handle)
        return handle

    def call_soon_threadsafe(
        self, callback: Callable[[Unpack[Ts]], object], *args: *Ts, context: Context | None = None
    ) -> asyncio.Handle:
        return self.call_soon(callback, *args, context=context)

    def call_at(
        self,
        when: float,
        callback: Callable[[Unpack[Ts]], object],
        *args: *Ts,
        context: Context | None = None,
    ) -> asyncio.TimerHandle:
        self._check_open()
        timer = asyncio.TimerHandle(when, callback, args, self, context)
        self._order += 1
        heapq.heappush(self._timers, (when, self._order, timer))
        return timer

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        """A cancelled timer stays in the heap until its time comes; `_next_timer` drops it."""

    def _check_open(self) -> None:
        if self.is_closed():
            raise RuntimeError("Event loop is closed")

    def _next_timer(self) -> asyncio.TimerHandle | None:
        while self._timers and self._timers[0][2].cancelled():
            heapq.heappop(self._timers)
        return self._timers[0][2] if self._timers else None

    def _ready_now(self) -> list[asyncio.Handle]:
        """The callbacks that can run now, in order, those of due timers included; the time jumps if need be.

        :raises Stuck: there will never be one
        """
        ready = self._ready_handles = [handle for handle in self._ready_handles if not handle.cancelled()]
        timer = self._next_timer()
        if timer is not None and not ready:
            self._now = max(self._now, timer.when())
        while timer is not None and timer.when() <= self._now:
            heapq.heappop(self._timers)
            ready.append(timer)
            timer = self._next_timer()
        if not ready:
            waits = "".join(f"\n  - {task!r}" for task in asyncio.all_tasks(self))
            raise Stuck(f"nothing is ready and no timer is armed; waiting for ever:{waits or ' nobody'}")
        return ready

    def _run_once(self) -> None:
        if self._stopping:  # `stop` came from outside of any callback
            return
        self._run_handle(self._ready_now().pop(0))

    def _run_handle(self, handle: asyncio.Handle) -> None:
        handle._run()

    def _process_events(self, event_list: Any) -> None:
        raise NotImplementedError("a virtual loop has no sockets")

    def _write_to_self(self) -> None:
        """Nobody sleeps, so nobody has to be woken."""

    def run_in_executor(
        self, executor: Executor | None, func: Callable[[Unpack[Ts]], T], *args: *Ts
    ) -> asyncio.Future[T]:
        raise NotImplementedError("a virtual loop has no threads: use a real event loop for this test")

    _stopping: bool


def run(main: Coroutine[Any, Any, T], *, debug: bool | None = None) -> T:
    """Run `main` on a new virtual loop, as `asyncio.run` would on a real one, and return its result.

    :raises Stuck: when every task waits for another one
    """
    with asyncio.Runner(debug=debug, loop_factory=VirtualLoop) as runner:
        return runner.run(main)
