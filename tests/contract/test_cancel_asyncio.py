"""However an asyncio task is cancelled while it uses an AsyncPool, nothing is lost and nobody is betrayed.

Each test is a small scenario that `cenote.testing.explore` runs under every schedule within bounds: at every
step of every party each party is cancelled once, in the natural order and in orders that deviate from it.
After each run `_all_is_well` asserts what the pool promises. Real drivers are not used here: they have tests
of their own, and no two runs of theirs are equal.
"""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

import cenote
from cenote.testing import AsyncScriptedDriver, Play, ScriptedError, explore

# About 0.7 ms a schedule on a slow core; all of this file in some ten seconds.
BUDGET = 450

Scenario = Callable[[Play], Coroutine[Any, Any, None]]


def every_schedule(
    scenario: Scenario, *, deviations: int = 2, cancels: int = 1, budget: int = BUDGET
) -> dict[str, int]:
    """Explore, print what was explored (pytest -s shows it), and return how often each outcome was seen."""
    report = explore(scenario, deviations=deviations, cancels=cancels, budget=budget)
    print(f"\n{report}")
    assert report.cancellations, "nothing was cancelled: the scenario has no party"
    return report.outcomes


async def _world(
    play: Play, driver: AsyncScriptedDriver, *, min_size: int = 0, max_size: int = 1, **options: Any
) -> cenote.AsyncPool:
    """A pool that is up, `min_size` connections idle."""
    pool = cenote.AsyncPool(
        driver=driver, clock=play.now, min_size=min_size, max_size=max_size, name="world", **options
    )
    if min_size:
        await pool.wait_ready()
    return pool


async def _all_is_well(
    pool: cenote.AsyncPool,
    driver: AsyncScriptedDriver,
    play: Play,
    *allowed: type[BaseException],
) -> None:
    """What must hold after every run, whoever was cancelled where."""
    for task in play.parties:
        if not task.cancelled():
            error = task.exception()
            assert error is None or isinstance(error, allowed), f"{task.get_name()} ended with {error!r}"
    pool._machine.check()
    pool.assert_all_returned()
    stats = pool.stats()
    assert (stats.leased, stats.waiting) == (0, 0), stats
    if stats.mode == "running":
        barrier = asyncio.Barrier(stats.max_size)
        await asyncio.gather(*(_meet(pool, number, barrier) for number in range(stats.max_size)))
    pool._machine.check()
    await pool.close()
    pool._machine.check()
    assert pool.stats().size == 0, pool.stats()
    assert not driver.server.sessions, "the server has connections that the pool does not know"
    assert driver.server.most <= stats.max_size, "more connections than allowed"
    driver.server.assert_honest()


async def _meet(pool: cenote.AsyncPool, number: int, barrier: asyncio.Barrier) -> None:
    """Borrow, and keep it until everybody has one: only a pool with all its slots can do that."""
    conn = await pool.acquire(60)
    await barrier.wait()
    assert await conn.execute("select", ("last", number)) == ("last", number)
    await pool.release(conn)


async def _waiting(pool: cenote.AsyncPool, number: int) -> None:
    """Let others run until so many stand in line."""
    while pool.stats().waiting < number:  # noqa: ASYNC110
        await asyncio.sleep(0)


async def _query(pool: cenote.AsyncPool, mark: Any, **more: Any) -> None:
    """Borrow, ask for one's mark, give back."""
    async with pool.connection(**more) as conn:
        assert await conn.execute("select", mark) == mark


def test_an_acquire_that_need_not_wait_can_be_cancelled_anywhere() -> None:
    async def scenario(play: Play) -> None:
        driver = AsyncScriptedDriver()
        pool = await _world(play, driver, min_size=1)

        async def borrower() -> None:
            conn = await pool.acquire()
            try:
                await conn.execute("select", "mine")
            finally:
                await pool.release(conn)

        play.party("borrower", borrower())
        await play.go()
        await _all_is_well(pool, driver, play)

    assert every_schedule(scenario)["cancelled"]


def test_an_acquire_in_line_can_be_cancelled_anywhere() -> None:
    async def scenario(play: Play) -> None:
        driver = AsyncScriptedDriver()
        pool = await _world(play, driver, min_size=1)
        for name in ("first", "second", "third"):
            play.party(name, _query(pool, name))
        await play.go()
        await _all_is_well(pool, driver, play)

    assert every_schedule(scenario)["done"]


def test_a_cancellation_in_the_same_turn_as_the_grant_gives_the_lease_to_the_next_in_line() -> None:
    async def scenario(play: Play) -> None:
        driver = AsyncScriptedDriver()
        pool = await _world(play, driver, min_size=1)
        conn = await pool.acquire()
        for name in ("first", "second"):
            play.party(name, _query(pool, name))
        await _waiting(pool, 2)

        async def releaser() -> None:
            await pool.release(conn)

        play.party("releaser", releaser(), spared=True)
        await play.go()
        await _all_is_well(pool, driver, play)

    assert every_schedule(scenario, cancels=2, deviations=1)["cancelled"]


@pytest.mark.parametrize("cancel_first", [True, False])
def test_release_and_cancel_in_one_turn_lose_no_lease_in_either_order(cancel_first: bool) -> None:
    async def scenario(play: Play) -> None:
        driver = AsyncScriptedDriver()
        pool = await _world(play, driver, min_size=1)
        conn = await pool.acquire()
        waiter = asyncio.ensure_future(pool.acquire())
        await _waiting(pool, 1)

        async def both() -> None:
            if cancel_first:
                waiter.cancel()
            await pool.release(conn)
            waiter.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiter

        play.party("both", both(), spared=True)
        other = play.party("other", _query(pool, "other"))
        await play.go()
        assert waiter.cancelled()
        assert other.done()
        await _all_is_well(pool, driver, play)

    assert every_schedule(scenario, budget=300)["done"]


def test_a_deadline_in_the_same_moment_as_the_grant_ends_in_a_lease_or_a_timeout() -> None:
    async def scenario(play: Play) -> None:
        driver = AsyncScriptedDriver()
        pool = await _world(play, driver, min_size=1)

        async def holder() -> None:
            async with pool.connection():
                await asyncio.sleep(1.0)

        play.party("holder", holder())
        play.party("waiter", _query(pool, "waiter", timeout=1.0))
        play.party("patient", _query(pool, "patient", timeout=1.5))
        await play.go()
        await _all_is_well(pool, driver, play, cenote.AcquireTimeout)

    seen = every_schedule(scenario)
    assert seen["AcquireTimeout"]
    assert seen["done"]


def test_a_cancelled_asker_leaves_its_dial_to_the_pool() -> None:
    async def scenario(play: Play) -> None:
        driver = AsyncScriptedDriver()
        driver.always("connect", delay=0.1)
        pool = await _world(play, driver, max_size=2)
        for name in ("first", "second", "third"):
            play.party(name, _query(pool, name))
        await play.go()
        await _all_is_well(pool, driver, play)

    assert every_schedule(scenario)["cancelled"]


def test_failing_dials_lose_no_slot_and_no_waiter() -> None:
    async def scenario(play: Play) -> None:
        driver = AsyncScriptedDriver()
        driver.next("connect", error=ConnectionRefusedError("refused"))
        driver.next("connect", delay=0.2, error=ScriptedError("starting up", "57P03"))
        driver.next("connect", error=TimeoutError("no route"))
        pool = await _world(play, driver, max_size=2, acquire_timeout=20)
        for name in ("first", "second"):
            play.party(name, _query(pool, name))
        await play.go()
        await _all_is_well(pool, driver, play, cenote.AcquireTimeout)

    assert every_schedule(scenario)["done"]


def test_a_server_that_refuses_for_good_is_told_to_everybody_in_line() -> None:
    async def scenario(play: Play) -> None:
        driver = AsyncScriptedDriver()
        driver.next("connect", error=ScriptedError("password authentication failed", "28P01"))
        pool = await _world(play, driver)
        for name in ("first", "second"):
            play.party(name, _query(pool, name))
        await play.go()
        await _all_is_well(pool, driver, play, cenote.ConnectFailed)

    assert every_schedule(scenario)["ConnectFailed"]


def test_a_touched_session_is_reset_before_the_next_one_has_it_whoever_is_cancelled() -> None:
    async def scenario(play: Play) -> None:
        driver = AsyncScriptedDriver()
        driver.always("reset", delay=0.01)
        pool = await _world(play, driver, min_size=1)

        async def toucher(name: str) -> None:
            async with pool.connection() as conn:
                await conn.execute(f"SET application_name = '{name}'")
                assert await conn.execute("select", name) == name

        for name in ("first", "second"):
            play.party(name, toucher(name))
        play.party("third", _query(pool, "third"))
        await play.go()
        await _all_is_well(pool, driver, play)

    assert every_schedule(scenario)["done"]


def test_a_reset_that_fails_costs_the_connection_and_nothing_else() -> None:
    async def scenario(play: Play) -> None:
        driver = AsyncScriptedDriver()
        driver.next("reset", delay=0.01, error=ScriptedError("reset failed", "XX000"))
        driver.next("reset", breaks=True, error=ScriptedError("server closed"))
        pool = await _world(play, driver, min_size=1)

        async def toucher(name: str) -> None:
            async with pool.connection() as conn:
                await conn.execute(f"SET application_name = '{name}'")

        for name in ("first", "second"):
            play.party(name, toucher(name))
        await play.go()
        await _all_is_well(pool, driver, play)

    assert every_schedule(scenario)["done"]


def test_a_connection_block_may_be_cancelled_while_it_commits() -> None:
    async def scenario(play: Play) -> None:
        driver = AsyncScriptedDriver()
        pool = await _world(play, driver, min_size=1)

        async def worker(name: str) -> None:
            async with pool.connection() as conn:
                await conn.execute("BEGIN")
                assert await conn.execute("insert", name) == name

        for name in ("first", "second"):
            play.party(name, worker(name))
        await play.go()
        await _all_is_well(pool, driver, play)

    # Twice: the second one hits the clean-up after the first.
    assert every_schedule(scenario, deviations=1, cancels=2, budget=900)["cancelled"]


def test_a_transaction_block_may_be_cancelled_while_it_begins_commits_or_rolls_back() -> None:
    class Oops(Exception):
        pass

    async def scenario(play: Play) -> None:
        driver = AsyncScriptedDriver()
        pool = await _world(play, driver, min_size=1)

        async def worker(name: str, fails: bool) -> None:
            async with pool.transaction() as conn:
                assert await conn.execute("insert", name) == name
                if fails:
                    raise Oops

        play.party("commits", worker("commits", fails=False))
        play.party("fails", worker("fails", fails=True))
        await play.go()
        # A rollback that is refused because the cancelled query still runs is the driver's error.
        await _all_is_well(pool, driver, play, Oops)

    assert every_schedule(scenario, deviations=1, cancels=2, budget=900)["Oops"]


def test_a_query_cancelled_in_flight_never_answers_the_next_borrower() -> None:
    async def scenario(play: Play) -> None:
        driver = AsyncScriptedDriver()
        driver.always("query", delay=0.01)
        pool = await _world(play, driver, min_size=1)

        async def asker(name: str) -> None:
            assert await pool.fetch_value("select", name) == name

        for name in ("first", "second", "third"):
            play.party(name, asker(name))
        await play.go()
        await _all_is_well(pool, driver, play)

    assert every_schedule(scenario)["cancelled"]


def test_a_query_that_breaks_the_connection_breaks_nobody_else() -> None:
    async def scenario(play: Play) -> None:
        driver = AsyncScriptedDriver()
        driver.next("query", delay=0.01, breaks=True, error=ScriptedError("terminating", "57P01"))
        driver.next("query", error=ScriptedError("division by zero", "22012"))
        pool = await _world(play, driver, min_size=2, max_size=2)
        for name in ("first", "second", "third"):
            play.party(name, _query(pool, name))
        await play.go()
        await _all_is_well(pool, driver, play, ScriptedError)

    assert every_schedule(scenario)["ScriptedError"]


def test_a_ping_at_the_door_can_be_cancelled_and_its_answer_reaches_nobody() -> None:
    async def scenario(play: Play) -> None:
        driver = AsyncScriptedDriver()
        pool = await _world(play, driver, min_size=1, check_after=0)
        for name in ("first", "second"):
            play.party(name, _query(pool, name))
        await play.go()
        await _all_is_well(pool, driver, play)
        assert driver.count("ping")

    assert every_schedule(scenario)["cancelled"]


@pytest.mark.parametrize("fails", [False, True])
def test_a_conversion_can_be_cancelled_and_nobody_has_settings_he_did_not_ask_for(fails: bool) -> None:
    async def scenario(play: Play) -> None:
        driver = AsyncScriptedDriver()
        driver.always("reset", delay=0.01)
        pool = await _world(play, driver, min_size=1)
        if fails:
            driver.next("convert", error=ScriptedError("unrecognized configuration parameter", "42704"))
            driver.next("convert", breaks=True, error=ScriptedError("server closed the connection"))

        async def tenant(name: str, wanted: str | None) -> None:
            settings = None if wanted is None else {"app.tenant": wanted}
            async with pool.connection(settings=settings) as conn:
                _carries(conn, wanted)
                assert await conn.execute("select", name) == name
                _carries(conn, wanted)

        play.party("first", tenant("first", "a"))
        play.party("second", tenant("second", "b"))
        play.party("third", tenant("third", None))
        play.party("fourth", tenant("fourth", "b"))
        await play.go()
        assert driver.count("convert")
        await _all_is_well(pool, driver, play, *([ScriptedError] if fails else []))

    seen = every_schedule(scenario, deviations=1)
    assert seen["cancelled"]
    assert seen["done"]


def _carries(conn: Any, tenant: str | None) -> None:
    """What the server was told last, and nothing after it was undone."""
    told = conn.conversions[-1] if conn.conversions else "'app.tenant',NULL"
    value = f"'{tenant}'" if tenant is not None else "NULL"
    assert f"'app.tenant',{value}" in told


def test_a_ping_at_the_door_that_fails_costs_a_retry_and_no_slot() -> None:
    async def scenario(play: Play) -> None:
        driver = AsyncScriptedDriver()
        pool = await _world(play, driver, min_size=1, check_after=0)
        driver.next("ping", breaks=True, error=ScriptedError("server closed the connection"))
        for name in ("first", "second"):
            play.party(name, _query(pool, name))
        await play.go()
        await _all_is_well(pool, driver, play)

    assert every_schedule(scenario)["done"]


def test_a_connection_found_dead_at_the_door_is_replaced_without_losing_the_place_in_line() -> None:
    async def scenario(play: Play) -> None:
        driver = AsyncScriptedDriver()
        pool = await _world(play, driver, min_size=2, max_size=2)
        await asyncio.sleep(5)  # longer than peek_after
        driver.server.restart()
        for name in ("first", "second", "third"):
            play.party(name, _query(pool, name))
        await play.go()
        await _all_is_well(pool, driver, play)

    assert every_schedule(scenario)["done"]


def test_a_drain_concurrent_with_acquires_refuses_or_serves_each() -> None:
    async def scenario(play: Play) -> None:
        driver = AsyncScriptedDriver()
        pool = await _world(play, driver, min_size=1)

        async def drainer() -> None:
            await pool.drain(5)
            await pool.resume()

        play.party("first", _query(pool, "first"))
        play.party("drainer", drainer())
        play.party("second", _query(pool, "second"))
        await play.go()
        await pool.resume()
        await _all_is_well(pool, driver, play, cenote.PoolDraining)

    seen = every_schedule(scenario)
    assert seen["PoolDraining"]
    assert seen["done"]


def test_a_close_concurrent_with_acquires_refuses_or_serves_each_and_leaves_nothing() -> None:
    async def scenario(play: Play) -> None:
        driver = AsyncScriptedDriver()
        driver.always("connect", delay=0.01)
        driver.always("close", delay=0.01)
        pool = await _world(play, driver, min_size=1, max_size=2)

        async def closer() -> None:
            await pool.close(timeout=1)

        for name in ("first", "second", "third"):
            play.party(name, _query(pool, name))
        play.party("closer", closer())
        await play.go()
        await _all_is_well(pool, driver, play, cenote.PoolClosed)

    assert every_schedule(scenario)["PoolClosed"]


def test_a_close_that_has_to_cut_a_query_ends_with_exact_counts() -> None:
    async def scenario(play: Play) -> None:
        driver = AsyncScriptedDriver()
        pool = await _world(play, driver, min_size=1)
        driver.hang("query")
        play.party("stuck", _query(pool, "stuck"))

        async def closer() -> None:
            await pool.close(timeout=0.5)

        play.party("closer", closer(), spared=True)
        await play.go()
        await _all_is_well(pool, driver, play, ScriptedError, cenote.PoolClosed)

    assert every_schedule(scenario)["ScriptedError"]


@pytest.mark.filterwarnings("ignore::cenote.NestedAcquireWarning")
def test_nested_acquires_end_in_service_a_timeout_or_the_deadlock_error() -> None:
    async def scenario(play: Play) -> None:
        driver = AsyncScriptedDriver()
        pool = await _world(play, driver, min_size=2, max_size=2)

        async def nested(name: str) -> None:
            async with pool.connection() as outer:
                assert await outer.execute("select", name) == name
                await _query(pool, (name, "inner"), timeout=5)

        for name in ("first", "second"):
            play.party(name, nested(name))
        await play.go()
        await _all_is_well(pool, driver, play, cenote.NestedAcquireDeadlock, cenote.AcquireTimeout)

    assert every_schedule(scenario)["NestedAcquireDeadlock"]


def test_a_nested_acquire_warning_turned_into_an_error_loses_nothing() -> None:
    async def scenario(play: Play) -> None:
        driver = AsyncScriptedDriver()
        pool = await _world(play, driver, min_size=1, max_size=2)
        driver.always("connect", delay=1)

        async def nested() -> None:
            async with pool.connection():
                await _query(pool, "inner")

        play.party("nested", nested())
        await play.go()
        await _all_is_well(pool, driver, play, cenote.NestedAcquireWarning)

    assert every_schedule(scenario)["NestedAcquireWarning"]


def test_wait_for_around_acquire_times_out_or_delivers_and_loses_nothing() -> None:
    async def scenario(play: Play) -> None:
        driver = AsyncScriptedDriver()
        pool = await _world(play, driver, min_size=1)
        # Before Python 3.12 wait_for() itself swallows a cancellation that comes with the result.
        play.may_swallow = True

        async def impatient(name: str) -> None:
            conn = await asyncio.wait_for(pool.acquire(), 0.5)
            try:
                assert await conn.execute("select", name) == name
                await asyncio.sleep(0.5)
            finally:
                await pool.release(conn)

        for name in ("first", "second"):
            play.party(name, impatient(name))
        await play.go()
        await _all_is_well(pool, driver, play, TimeoutError)

    seen = every_schedule(scenario)
    assert seen["TimeoutError"]
    assert seen["done"]


def test_asyncio_timeout_around_a_block_always_ends_it_in_time() -> None:
    async def scenario(play: Play) -> None:
        driver = AsyncScriptedDriver()
        pool = await _world(play, driver, min_size=1)

        async def impatient(name: str) -> None:
            async with asyncio.timeout(0.5):
                async with pool.connection() as conn:
                    assert await conn.execute("select", name) == name
                    await asyncio.sleep(0.4)

        for name in ("first", "second"):
            play.party(name, impatient(name))
        await play.go()
        await _all_is_well(pool, driver, play, TimeoutError)

    seen = every_schedule(scenario)
    assert seen["TimeoutError"]
    assert seen["cancelled"]


def test_a_task_group_that_falls_apart_leaves_the_pool_whole() -> None:
    class Oops(Exception):
        pass

    async def scenario(play: Play) -> None:
        driver = AsyncScriptedDriver()
        driver.always("connect", delay=0.01)
        pool = await _world(play, driver, max_size=2)

        async def failing() -> None:
            async with pool.connection() as conn:
                await conn.execute("select", "failing")
                raise Oops

        async def group() -> None:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(_query(pool, "one"))
                tasks.create_task(failing())
                tasks.create_task(_query(pool, "two"))

        play.may_swallow = True  # a group that has an error to raise raises that, even when cancelled
        play.party("group", group())
        play.party("other", _query(pool, "other"))
        await play.go()
        await _all_is_well(pool, driver, play, ExceptionGroup)

    assert every_schedule(scenario)["ExceptionGroup"]


def test_a_pool_that_opens_late_and_is_abandoned_at_once_keeps_its_minimum() -> None:
    async def scenario(play: Play) -> None:
        driver = AsyncScriptedDriver()
        driver.always("connect", delay=0.01)
        pool = await _world(play, driver, max_size=3)
        pool.resize(min_size=2)

        async def ready() -> None:
            await pool.wait_ready(timeout=5)

        play.party("ready", ready())
        play.party("user", _query(pool, "user"))
        await play.go()
        await _all_is_well(pool, driver, play)

    assert every_schedule(scenario)["done"]


def test_a_check_hook_that_never_ends_does_not_outlast_a_cancellation() -> None:
    async def scenario(play: Play) -> None:
        driver = AsyncScriptedDriver()
        hangs = False

        async def check(conn: Any) -> None:
            await conn.execute("select", "check")
            if hangs:
                await asyncio.Event().wait()

        pool = await _world(play, driver, min_size=1, check_after=0, check=check)
        hangs = True

        async def impatient() -> None:
            async with asyncio.timeout(1.0):
                await _query(pool, "never")

        play.party("impatient", impatient())
        await play.go()
        hangs = False
        await _all_is_well(pool, driver, play, TimeoutError)

    assert every_schedule(scenario)["TimeoutError"]


@pytest.mark.parametrize("hook", ["check", "configure", "reset"])
def test_a_hook_that_never_ends_is_given_up_so_that_it_cannot_keep_a_slot(hook: str) -> None:
    async def scenario(play: Play) -> None:
        driver = AsyncScriptedDriver()
        hangs = 1

        async def hooked(conn: Any) -> None:
            nonlocal hangs
            if hangs:
                hangs -= 1
                await asyncio.Event().wait()

        options: dict[str, Any] = {hook: hooked}
        pool = await _world(play, driver, check_after=0, **options)
        play.party("first", _query(pool, "first"))
        play.party("second", _query(pool, "second"))
        await play.go()
        await _all_is_well(pool, driver, play)
        assert not hangs

    assert every_schedule(scenario, budget=150)["done"]
