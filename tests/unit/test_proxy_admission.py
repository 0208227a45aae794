"""Turns at a bounded rate and in order, and a bound on log-ins under way: on a clock that tests move."""

import asyncio
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import pytest

from cenote.proxy.admission import Admission
from cenote.testing.clock import VirtualLoop
from cenote.wire.refusal import Refusal


def options(*, login_rate: float = 100.0, max_logins: int = 1000, max_clients: int = 1000) -> Any:
    return SimpleNamespace(login_rate=login_rate, max_logins=max_logins, max_clients=max_clients)


def run(body: Callable[[], Awaitable[Any]]) -> Any:
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(body())  # type: ignore[arg-type]


def now() -> float:
    return asyncio.get_running_loop().time()


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def test_a_single_login_does_not_wait() -> None:
    async def body() -> None:
        admission = Admission(lambda: options(login_rate=0.001))
        began = now()
        await admission.turn()
        assert now() == began
        assert (admission.admitted, admission.waiting) == (1, 0)

    run(body)


@pytest.mark.parametrize("rate", [10.0, 100.0, 500.0, 2000.0])
def test_a_crowd_has_its_turns_in_order_at_the_rate(rate: float) -> None:
    async def body() -> None:
        admission = Admission(lambda: options(login_rate=rate))
        came: list[tuple[int, float]] = []

        async def one(number: int) -> None:
            await admission.turn()
            came.append((number, now()))

        began = now()
        tasks = [asyncio.create_task(one(number)) for number in range(200)]
        await settle()
        burst = admission.admitted
        assert burst <= max(1, rate * 0.02)
        assert admission.waiting == 200 - burst
        await asyncio.gather(*tasks)
        assert [number for number, _ in came] == list(range(200))
        assert came[-1][1] - began == pytest.approx((200 - burst) / rate, rel=0.05)
        for first, last in zip(came, came[50:], strict=False):
            assert last[1] - first[1] >= (50 - burst) / rate - 1e-6
        assert (admission.admitted, admission.waiting) == (200, 0)

    run(body)


def test_turns_that_nobody_asked_for_are_not_saved_up() -> None:
    async def body() -> None:
        admission = Admission(lambda: options(login_rate=100.0))
        await admission.turn()
        await asyncio.sleep(60)
        began = now()
        await asyncio.gather(*(admission.turn() for _ in range(100)))
        assert now() - began > 0.9

    run(body)


def test_whoever_leaves_the_line_costs_nobody_a_turn() -> None:
    async def body() -> None:
        admission = Admission(lambda: options(login_rate=10.0))
        await admission.turn()
        tasks = [asyncio.create_task(admission.turn()) for _ in range(5)]
        await settle()
        assert admission.waiting == 5
        for task in tasks[:4]:
            task.cancel()
        await settle()
        assert admission.waiting == 1
        began = now()
        await tasks[4]
        assert now() - began <= 0.1 + 1e-9
        assert admission.admitted == 2

    run(body)


def test_a_line_as_long_as_there_may_be_clients_takes_no_more() -> None:
    async def body() -> None:
        admission = Admission(lambda: options(login_rate=1.0, max_clients=3))
        tasks = [asyncio.create_task(admission.turn()) for _ in range(4)]
        await settle()
        with pytest.raises(Refusal) as refused:
            await admission.turn()
        assert refused.value.sqlstate == "53300"
        assert "max_clients is 3" in refused.value.text
        assert admission.turned_away == 1
        await asyncio.gather(*tasks)

    run(body)


def test_options_that_were_read_again_hold_at_once() -> None:
    async def body() -> None:
        held = [options(login_rate=0.1)]
        admission = Admission(lambda: held[0])
        await admission.turn()
        held[0] = options(login_rate=1000.0)
        tasks = [asyncio.create_task(admission.turn()) for _ in range(100)]
        began = now()
        await asyncio.gather(*tasks)
        assert now() - began < 11  # the one turn that was given at the old rate, then the new rate

    run(body)


class Crowd:
    """Log-ins that do nothing but be there; `ended` has those that were cut, with the words."""

    def __init__(self, admission: Admission) -> None:
        self.admission = admission
        self.ended: list[tuple[int, str, str]] = []
        self.tasks: list[asyncio.Task[Any]] = []

    def add(self, work: Awaitable[Any] | None = None) -> asyncio.Task[Any]:
        async def stay() -> None:
            await (work if work is not None else asyncio.get_running_loop().create_future())

        number, task = len(self.tasks), asyncio.create_task(stay())
        self.tasks.append(task)
        self.admission.enter(task, lambda state, text: self._end(number, state, text))
        return task

    def _end(self, number: int, sqlstate: str, text: str) -> None:
        self.ended.append((number, sqlstate, text))
        self.tasks[number].cancel()

    async def leave(self) -> None:
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        assert self.admission.present == 0


def test_one_login_too_many_ends_the_one_that_has_taken_longest() -> None:
    async def body() -> None:
        crowd = Crowd(Admission(lambda: options(max_logins=3)))
        for _ in range(3):
            crowd.add()
            await asyncio.sleep(1)
        assert crowd.ended == []
        crowd.add()
        ((number, sqlstate, text),) = crowd.ended
        assert (number, sqlstate) == (0, "53300")
        assert "max_logins" in text
        assert "3.0 s" in text
        assert crowd.admission.present == 3
        assert crowd.admission.cut == 1
        await crowd.leave()

    run(body)


def test_those_who_wait_for_us_do_not_count_and_are_not_ended() -> None:
    async def body() -> None:
        admission = Admission(lambda: options(login_rate=1.0, max_logins=2))
        await admission.turn()
        crowd = Crowd(admission)
        in_line = []
        for _ in range(5):
            in_line.append(crowd.add(admission.turn()))
            await settle()
        assert (admission.present, admission.waiting) == (0, 5)
        silent = [crowd.add() for _ in range(2)]
        await asyncio.sleep(0.6)
        crowd.add()
        assert [number for number, _, _ in crowd.ended] == [5]
        assert not silent[1].done()
        await asyncio.gather(*in_line)
        # Each came back as the youngest, and those who say nothing made room.
        assert all(number >= len(in_line) for number, _, _ in crowd.ended)
        await crowd.leave()

    run(body)


def test_a_login_that_comes_back_from_a_wait_is_the_youngest() -> None:
    async def body() -> None:
        admission = Admission(lambda: options(max_logins=2))
        crowd = Crowd(admission)
        back = asyncio.Event()

        async def waits_for_a_server() -> None:
            with admission.aside():
                await back.wait()
            await asyncio.get_running_loop().create_future()

        crowd.add(waits_for_a_server())
        await settle()
        crowd.add()
        crowd.add()
        await asyncio.sleep(0.6)
        assert crowd.ended == []
        back.set()
        await settle()
        assert [number for number, _, _ in crowd.ended] == [1]
        await crowd.leave()

    run(body)


def test_nobody_is_ended_who_has_just_come_and_nobody_is_accepted_meanwhile() -> None:
    async def body() -> None:
        admission = Admission(lambda: options(max_logins=2))
        crowd = Crowd(admission)
        assert admission.has_room()
        crowd.add()
        assert admission.has_room()
        crowd.add()
        assert not admission.has_room()
        await asyncio.sleep(0.4)
        assert not admission.has_room()
        await asyncio.sleep(0.2)
        assert admission.has_room()
        crowd.add()
        assert [number for number, _, _ in crowd.ended] == [0]
        await crowd.leave()
        assert admission.has_room()

    run(body)


def test_a_login_that_ended_makes_room() -> None:
    async def body() -> None:
        admission = Admission(lambda: options(max_logins=1))
        crowd = Crowd(admission)
        first = crowd.add()
        admission.leave(first)
        crowd.add()
        assert crowd.ended == []
        await crowd.leave()

    run(body)
