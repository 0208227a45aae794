"""`explore` finds the classic races of pools in a few schedules, and says how to repeat them."""

import asyncio
from collections import deque
from typing import Any

import pytest

from cenote.testing import Play, ScheduleFailed, explore, replay


class NaivePool:
    """A pool of one connection with a fault of one's choice."""

    def __init__(self, *, loses_grants: bool = False, swallows: bool = False) -> None:
        self.free = 1
        self.waiting: deque[asyncio.Future[None]] = deque()
        self.loses_grants = loses_grants
        self.swallows = swallows

    async def acquire(self) -> None:
        if self.free:
            self.free -= 1
            return
        future = asyncio.get_running_loop().create_future()
        self.waiting.append(future)
        try:
            await future
        except asyncio.CancelledError:
            if future in self.waiting:
                self.waiting.remove(future)
            elif not future.cancelled():
                if self.swallows:
                    return
                if not self.loses_grants:
                    self.release()
            raise

    def release(self) -> None:
        while self.waiting:
            future = self.waiting.popleft()
            if not future.done():
                future.set_result(None)
                return
        self.free += 1


def _scenario(**faults: bool) -> Any:
    async def scenario(play: Play) -> None:
        pool = NaivePool(**faults)

        async def user() -> None:
            await pool.acquire()
            try:
                await asyncio.sleep(0)
            finally:
                pool.release()

        play.party("first", user())
        play.party("second", user())
        await play.go()
        assert pool.free == 1, "the connection is lost"

    return scenario


def test_a_correct_pool_passes_every_schedule_and_the_report_counts_them() -> None:
    report = explore(_scenario())
    assert report.schedules > 30
    assert report.cancellations > 20
    assert not report.truncated
    assert report.outcomes["done"]
    assert report.outcomes["cancelled"]


def test_a_grant_lost_to_a_cancellation_is_found_without_any_deviation() -> None:
    with pytest.raises(ScheduleFailed, match="the connection is lost") as caught:
        explore(_scenario(loses_grants=True), deviations=0)
    assert len(caught.value.plan) == 1


def test_a_swallowed_cancellation_is_found() -> None:
    with pytest.raises(ScheduleFailed, match="cancellation of second was swallowed"):
        explore(_scenario(swallows=True), deviations=0)


def test_a_plan_can_be_replayed_and_tells_what_happened_step_by_step() -> None:
    scenario = _scenario(loses_grants=True)
    with pytest.raises(ScheduleFailed) as caught:
        explore(scenario)
    with pytest.raises(ScheduleFailed, match="cancel second"):
        replay(scenario, caught.value.plan)
    assert any("next" in line for line in replay(scenario, ()))


def test_time_may_pass_first_although_something_is_ready() -> None:
    seen = set()

    async def scenario(play: Play) -> None:
        order: list[str] = []

        async def busy() -> None:
            for _ in range(3):
                await asyncio.sleep(0)
            order.append("busy")

        async def sleeper() -> None:
            await asyncio.sleep(10)
            order.append("sleeper")

        play.party("sleeper", sleeper())
        play.party("busy", busy())
        await play.go()
        seen.add(tuple(order))

    explore(scenario, cancels=0, deviations=1)
    assert ("busy", "sleeper") in seen
    explore(scenario, cancels=0, deviations=2)
    assert ("sleeper", "busy") in seen


def test_an_error_in_a_task_that_nobody_looks_at_fails_the_schedule() -> None:
    async def scenario(play: Play) -> None:
        async def dies() -> None:
            raise ZeroDivisionError

        async def party() -> None:
            task = asyncio.ensure_future(dies())
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            assert task.done()

        play.party("party", party(), spared=True)
        await play.go()

    with pytest.raises(ScheduleFailed, match="died of ZeroDivisionError"):
        explore(scenario)


def test_a_budget_cuts_the_exploration_and_the_report_says_so() -> None:
    report = explore(_scenario(), budget=20)
    assert report.schedules == 20
    assert report.truncated
    assert "budget reached" in str(report)
