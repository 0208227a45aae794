"""Run an asyncio scenario under every schedule up to a bound, cancelling it at every point on the way.

asyncio tests see one order of events, the one that happened. `explore` repeats a scenario on a `VirtualLoop`
that it steers: before each callback it may run another one that is ready, let time pass first, or cancel one
of the parties. It goes through all such *plans* in order of how far they deviate from the natural order
(Emmi, Qadeer, Rakamaric, "Delay-bounded scheduling", POPL 2011, is where bounding deviations comes from), so
small bounds find most races, and the first failing plan is a shortest one. A plan that fails is printed and
can be run again with `replay`.

It does not preempt: between two awaits asyncio code is atomic, and stays so here. It knows no threads.
"""

from __future__ import annotations

import asyncio
import gc
import heapq
import random
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from cenote.testing.clock import VirtualLoop

STEPS_AT_MOST = 20_000  # a run longer than this goes round in circles

# A decision: ("run", n) the n-th ready callback instead of the first; ("time", 0) the next timer first,
# although something is ready; ("cancel", n) cancel the n-th party.
Decision = tuple[str, int]
Plan = tuple[tuple[int, Decision], ...]


class Play:
    """What a scenario gets: it makes ready, names its parties, and lets them loose under the plan.

    may_swallow: set it where the scenario itself uses something that may swallow a cancellation
        (`asyncio.wait_for` before Python 3.12)
    """

    def __init__(self, loop: _SteeredLoop, plan: Plan) -> None:
        self.loop = loop
        self.plan = plan
        self.parties: list[asyncio.Task[Any]] = []
        self.may_swallow = False

    def now(self) -> float:
        """The loop's time, for `AsyncPool(clock=play.now)`."""
        return self.loop.time()

    def party(self, name: str, what: Coroutine[Any, Any, Any], *, spared: bool = False) -> asyncio.Task[Any]:
        """Add a task that takes part.

        :param name: for the report
        :param spared: it is never cancelled
        """
        task = self.loop.create_task(what, name=name)
        self.parties.append(task)
        if not spared:
            self.loop.victims.append(task)
        return task

    async def go(self) -> None:
        """Let the parties run under the plan until all have ended; their errors are looked at by the scenario."""
        ended = self.loop.create_future()

        def one_ended(_: object) -> None:
            if all(task.done() for task in self.parties) and not ended.done():
                ended.set_result(None)

        for task in self.parties:
            task.add_done_callback(one_ended)
        self.loop.steer(one_ended)
        try:
            await ended
        finally:
            self.loop.steer(None)

    def outcome(self, task: asyncio.Task[Any]) -> str:
        """How a party ended: "cancelled", the name of its exception's class, or "done"."""
        if task.cancelled():
            return "cancelled"
        error = task.exception()
        return "done" if error is None else type(error).__name__


@dataclass
class Report:
    """What was explored: number of plans run, how many of them cancelled a party, the longest run in steps,
    how often each outcome of a party was seen, and whether the budget ended before the plans did."""

    name: str
    schedules: int = 0
    cancellations: int = 0
    steps: int = 0
    truncated: bool = False
    outcomes: dict[str, int] = field(default_factory=dict)

    def note(self, plan: Plan, loop: _SteeredLoop) -> None:
        """Count one run."""
        self.schedules += 1
        self.cancellations += any(kind == "cancel" for _, (kind, _) in plan)
        self.steps = max(self.steps, len(loop.choices))
        for outcome in loop.outcomes:
            self.outcomes[outcome] = self.outcomes.get(outcome, 0) + 1

    def __str__(self) -> str:
        seen = ", ".join(f"{name} {number}" for name, number in sorted(self.outcomes.items()))
        more = " (budget reached)" if self.truncated else ""
        return (
            f"{self.name}: {self.schedules} schedules{more}, {self.cancellations} with a cancellation, "
            f"up to {self.steps} steps; {seen}"
        )


class ScheduleFailed(AssertionError):
    """A plan under which the scenario failed; `plan` can be given to `replay`."""

    def __init__(self, name: str, plan: Plan, trace: Sequence[str], error: BaseException) -> None:
        self.plan = plan
        steps = "".join(f"\n  {line}" for line in trace)
        super().__init__(f"{name} fails under plan {plan!r}: {type(error).__name__}: {error}{steps}")


Scenario = Callable[[Play], Coroutine[Any, Any, None]]


def explore(scenario: Scenario, *, deviations: int = 1, cancels: int = 1, budget: int = 2000) -> Report:
    """Run `scenario` under every plan within the bounds, and check after each that no task died of an error.

    :param scenario: a coroutine function that takes a `Play`, makes its world, and asserts at its end
    :param deviations: how often a plan may leave the natural order
    :param cancels: how often it may cancel a party
    :param budget: plans to run at most
    :raises ScheduleFailed: at the first plan under which the scenario raises
    """
    name = getattr(scenario, "__name__", str(scenario))
    report = Report(name)
    level: list[Plan] = [()]
    while level:
        left = budget - report.schedules
        if len(level) > left:
            # Evenly spaced, so that late steps are visited as well as early ones.
            report.truncated = True
            level = [level[nth * len(level) // left] for nth in range(left)]
        deeper: list[Plan] = []
        for plan in level:
            loop = _run(name, scenario, plan, trace=False)
            report.note(plan, loop)
            deeper.extend((*plan, decision) for decision in loop.decisions_after(plan, deviations, cancels))
        level = deeper
    return report


def replay(scenario: Scenario, plan: Plan) -> list[str]:
    """Run `scenario` under one plan and return what happened, step by step.

    :raises ScheduleFailed: if it fails, with the same list
    """
    return _run(getattr(scenario, "__name__", str(scenario)), scenario, plan, trace=True).trace


def _run(name: str, scenario: Scenario, plan: Plan, *, trace: bool) -> _SteeredLoop:
    loop = _SteeredLoop(dict(plan), trace)
    chance = random.getstate()
    random.seed(name)  # a plan means the same each time only if jitter does,
    collects = gc.isenabled()
    gc.disable()  # and finalizers run at the same time
    try:
        with asyncio.Runner(loop_factory=lambda: loop) as runner:
            runner.run(_whole(scenario, loop, plan))
        loop.assert_sound()
    except Exception as error:
        if not trace:
            replay(scenario, plan)  # raises the same, with the steps
        raise ScheduleFailed(name, plan, loop.trace, error) from error
    finally:
        random.setstate(chance)
        if collects:
            gc.enable()
    return loop


async def _whole(scenario: Scenario, loop: _SteeredLoop, plan: Plan) -> None:
    play = Play(loop, plan)
    await scenario(play)
    left = [task for task in loop.tasks if not task.done() and task is not asyncio.current_task()]
    assert not left, f"still running at the end: {left}"
    for task in loop.hit:
        assert task.cancelled() or play.may_swallow, f"the cancellation of {task.get_name()} was swallowed"
    loop.outcomes = [play.outcome(task) for task in play.parties]


class _SteeredLoop(VirtualLoop):
    """Between two calls of `steer` each callback that runs is a choice: counted, recorded, taken as planned."""

    def __init__(self, plan: dict[int, Decision], trace: bool) -> None:
        super().__init__()
        self.plan = plan
        self._steered = False
        self._bookkeeping: object = None
        self.victims: list[asyncio.Task[Any]] = []
        self.hit: set[asyncio.Task[Any]] = set()
        self.choices: list[tuple[int, bool, list[int]]] = []
        self.outcomes: list[str] = []
        self.trace: list[str] = []
        self._traced = trace
        self._broken: list[str] = []
        self.tasks: list[asyncio.Task[Any]] = []
        self.set_task_factory(self._new_task)
        self.set_exception_handler(self._note)

    def steer(self, bookkeeping: object) -> None:
        """From now on every step is a choice, but for this callback; with None no longer."""
        self._steered = bookkeeping is not None
        self._bookkeeping = bookkeeping

    def decisions_after(self, plan: Plan, deviations: int, cancels: int) -> Iterator[tuple[int, Decision]]:
        """What could have been decided otherwise in this run of `plan`, after the last decision of it."""
        cancelled = sum(kind == "cancel" for _, (kind, _) in plan)
        for step in range(plan[-1][0] + 1 if plan else 0, len(self.choices)):
            ready, timer, victims = self.choices[step]
            if cancelled < cancels:
                yield from ((step, ("cancel", nth)) for nth in victims)
            if len(plan) - cancelled < deviations:
                yield from ((step, ("run", nth)) for nth in range(1, ready))
                if timer:
                    yield step, ("time", 0)

    def _new_task(self, loop: Any, coro: Any, **more: Any) -> asyncio.Task[Any]:
        task: asyncio.Task[Any] = asyncio.Task(coro, loop=self, **more)
        self.tasks.append(task)
        return task

    def _note(self, loop: Any, context: dict[str, Any]) -> None:
        self._broken.append(f"{context.get('message')}: {context.get('exception')!r}")

    def assert_sound(self) -> None:
        """No task, of the scenario or of what it uses, may have died of an error that nobody has looked at."""
        wrong = [*self._broken]
        for task in self.tasks:
            # The flag is the one asyncio itself logs "exception was never retrieved" by, without waiting for
            # the collector.
            if not task.done():
                wrong.append(f"{task.get_name()} never ended")
            elif not task.cancelled() and getattr(task, "_log_traceback", False):
                wrong.append(f"{task.get_name()} died of {task.exception()!r}")
        if wrong:
            raise AssertionError("; ".join(wrong))

    def _run_once(self) -> None:
        if self._stopping or not self._steered:
            super()._run_once()
            return
        ready = self._ready_now()
        # Bookkeeping that nobody can see the order of is not a choice: a third of all steps.
        callback: Any = getattr(ready[0], "_callback", None)
        if isinstance(getattr(callback, "__self__", None), set) or callback == self._bookkeeping:
            self._run_handle(ready.pop(0))
            return
        timer = self._next_timer()
        step = len(self.choices)
        if step > STEPS_AT_MOST:
            raise AssertionError(f"no end after {step} steps")
        alive = [nth for nth, task in enumerate(self.victims) if not task.done()]
        self.choices.append((len(ready), timer is not None, alive))
        kind, nth = self.plan.get(step, ("run", 0))
        if kind == "cancel":
            self._say(step, "cancel", self.victims[nth].get_name())
            if self.victims[nth].cancel():
                self.hit.add(self.victims[nth])
            return
        if kind == "time" and timer is not None:
            heapq.heappop(self._timers)
            self._now = max(self._now, timer.when())
            self._say(step, "time passes;", timer)
            self._run_handle(timer)
            return
        # A scenario that iterates over a set of tasks (TaskGroup does) need not make the same choices twice.
        handle = ready.pop(min(nth, len(ready) - 1))
        self._say(step, "instead" if nth else "next", handle)
        self._run_handle(handle)

    def _say(self, step: int, how: str, what: object) -> None:
        if self._traced:
            self.trace.append(f"{step} ({self._now:.3f}): {how} {what!s:.150}")
