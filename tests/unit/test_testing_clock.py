"""Virtual time: it moves when told to, or jumps, and always in the same order."""

import asyncio
import time
from typing import Any

import pytest

import cenote
from cenote.testing import AsyncScriptedDriver, ScriptedDriver, Stuck, VirtualClock, VirtualLoop, run


def test_the_clock_moves_only_forward_and_only_when_told() -> None:
    clock = VirtualClock(5.0)
    assert clock() == clock.now == 5.0
    clock.advance(2.5)
    assert clock() == 7.5
    with pytest.raises(ValueError, match="does not go back"):
        clock.advance(-1)


def test_a_driven_pool_does_what_is_due_before_advance_returns() -> None:
    clock = VirtualClock()
    pool = cenote.Pool(driver=ScriptedDriver(), clock=clock, min_size=0, idle_timeout=60, check_after=500)
    clock.drive(pool)
    with pool:
        pool.release(pool.acquire())
        clock.advance(59)
        assert pool.stats().idle == 1
        clock.advance(1)
        assert pool.stats().idle == 0
        assert pool.stats().closed == {"idle_timeout": 1}


def test_an_hour_of_sleep_takes_no_time_and_ends_on_the_second() -> None:
    async def main() -> float:
        loop = asyncio.get_running_loop()
        started = loop.time()
        await asyncio.sleep(3600)
        return loop.time() - started

    started = time.monotonic()
    assert run(main()) == 3600
    assert time.monotonic() - started < 60


def test_timers_of_one_moment_fire_in_the_order_in_which_they_were_armed() -> None:
    async def main() -> list[int]:
        order: list[int] = []
        loop = asyncio.get_running_loop()
        for number in range(20):
            loop.call_later(1.0, order.append, number)
        loop.call_later(0.5, order.append, -1)
        await asyncio.sleep(1.0)
        return order

    assert run(main()) == [-1, *range(20)]


def test_a_program_in_which_nothing_can_happen_any_more_is_told_so() -> None:
    with pytest.raises(Stuck, match=r"waiting for ever:\n  - <Task.*Event.wait"):
        run(asyncio.Event().wait())


def test_a_virtual_loop_refuses_threads_and_sockets() -> None:
    async def threads() -> None:
        await asyncio.to_thread(time.monotonic)

    async def sockets() -> None:
        await asyncio.open_connection(host="127.0.0.1", port=9)

    for main in (threads, sockets):
        with pytest.raises(NotImplementedError):
            run(main())


def test_asyncio_timeouts_task_groups_and_cancelled_timers_work_on_it() -> None:
    async def main() -> str:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        loop.call_later(0.1, pytest.fail, "a cancelled timer fired").cancel()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(5), asyncio.TaskGroup() as tasks:
                tasks.create_task(asyncio.sleep(1))
                tasks.create_task(asyncio.Event().wait())
        return f"{loop.time() - 1000:.0f}"

    assert run(main()) == "5"


def test_an_async_pool_lives_through_its_idle_timeout_on_virtual_time() -> None:
    async def main() -> Any:
        loop = asyncio.get_running_loop()
        driver = AsyncScriptedDriver()
        async with cenote.AsyncPool(
            driver=driver, clock=loop.time, min_size=1, max_size=3, idle_timeout=60
        ) as pool:
            barrier = asyncio.Barrier(3)

            async def user() -> None:
                async with pool.connection():
                    await barrier.wait()

            await asyncio.gather(user(), user(), user())
            await asyncio.sleep(200)
            return pool.stats().size, dict(pool.stats().closed)

    assert run(main()) == (1, {"idle_timeout": 2})
