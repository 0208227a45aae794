"""Failures of connection pools that were published elsewhere, played against Cenote.

Each test plays the scenario of one report, in our own words and code, and asserts what its reporter would
have wanted. Where the fault lay in the order of events, the scripted driver and every schedule; where the
driver itself takes part (answers not yet read), the real drivers and a real server.
"""

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest

import cenote
from cenote.testing import AsyncScriptedDriver, Play, VirtualLoop, explore, run

BUDGET = 250
LIMIT_S = 20.0  # a real server answers at once; this only ends a test that hangs


def _pool(driver: AsyncScriptedDriver, clock: Any, **options: Any) -> cenote.AsyncPool:
    sizes = {"min_size": 1, "max_size": 1}
    return cenote.AsyncPool(driver=driver, clock=clock, name="published", **(sizes | options))


async def _whole(pool: cenote.AsyncPool, driver: AsyncScriptedDriver) -> None:
    """The pool has all its slots, and after it is closed the server has nothing of it left."""
    size = pool.stats().max_size
    barrier = asyncio.Barrier(size)

    async def borrower(mark: int) -> None:
        async with pool.connection(60) as conn:
            await barrier.wait()
            assert await conn.execute("select", mark) == mark

    await asyncio.gather(*map(borrower, range(size)))
    pool._machine.check()
    pool.assert_all_returned()
    await pool.close()
    assert pool.stats().size == 0
    assert not driver.server.sessions
    driver.server.assert_honest()


def test_a_check_that_is_cancelled_costs_no_connection() -> None:
    """psycopg/psycopg#1208: cancelled while the pool checked it, the connection never came back."""

    async def cancelled_in_the_check(play: Play) -> None:
        driver = AsyncScriptedDriver()

        async def check(conn: Any) -> None:
            await conn.execute("select 1")

        pool = _pool(driver, play.now, check_after=0, check=check)
        await pool.wait_ready()
        play.party("borrower", pool.fetch_value("select", "mine"))
        play.party("another", pool.fetch_value("select", "other"))
        await play.go()
        await _whole(pool, driver)

    assert explore(cancelled_in_the_check, deviations=1, budget=BUDGET).cancellations


def test_a_waiter_cancelled_while_it_is_given_a_connection_is_cancelled() -> None:
    """psycopg/psycopg#1275: the connection won over the cancellation that came with it, which was lost."""
    for cancel_first in (True, False):

        async def main(cancel_first: bool = cancel_first) -> None:
            driver = AsyncScriptedDriver()
            pool = _pool(driver, asyncio.get_running_loop().time)
            conn = await pool.acquire()
            waiter = asyncio.create_task(pool.acquire())
            await asyncio.sleep(1)
            if cancel_first:
                waiter.cancel()
                await pool.release(conn)
            else:
                await pool.release(conn)
                waiter.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiter
            assert waiter.cancelled()
            await _whole(pool, driver)

        run(main())


def test_a_waiter_cancelled_while_the_pool_grows_for_it_is_cancelled() -> None:
    """psycopg/psycopg#1345: cancelled in the very moment a new connection was assigned, the task lived on."""

    async def cancelled_while_growing(play: Play) -> None:
        driver = AsyncScriptedDriver()
        driver.always("connect", delay=0.01)
        pool = _pool(driver, play.now, min_size=0, max_size=2)

        async def periodic() -> None:
            while True:  # only its cancellation ends it: one that is swallowed is a test that never ends
                await pool.fetch_value("select", "tick")
                await asyncio.sleep(1)

        async def worker() -> None:
            task = asyncio.create_task(periodic())
            try:
                await pool.fetch_value("select", "work")
            finally:
                task.cancel()
                await asyncio.wait([task])
                assert task.cancelled()

        play.party("worker", worker())
        await play.go()
        await _whole(pool, driver)

    assert explore(cancelled_while_growing, budget=BUDGET).cancellations


def test_wait_for_bounds_an_acquire_whose_check_does_not_end() -> None:
    """psycopg/psycopg#1401: the check loop absorbed the cancellation and went on for the pool's own timeout."""

    async def main() -> None:
        loop = asyncio.get_running_loop()
        driver = AsyncScriptedDriver()
        silent = True

        async def check(conn: Any) -> None:
            if silent:
                await asyncio.Event().wait()

        pool = _pool(driver, loop.time, min_size=0, max_size=1, check_after=0, check=check)
        started = loop.time()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(pool.acquire(), 1.0)
        assert loop.time() - started == 1.0
        silent = False
        await _whole(pool, driver)

    run(main())


def test_timeouts_that_meet_a_slow_dial_leak_no_connection() -> None:
    """MagicStack/asyncpg#467: a timeout on acquire, about as long as a dial takes, leaked the connection."""

    async def main() -> None:
        driver = AsyncScriptedDriver()
        driver.always("connect", delay=0.1)
        pool = _pool(driver, asyncio.get_running_loop().time, min_size=0, max_size=3)
        # Around the moment at which the dial ends, and exactly then.
        for timeout in (0.05, 0.0999, 0.1, 0.1001, 0.2):
            for _ in range(4):
                try:
                    async with pool.connection(timeout) as conn:
                        await conn.execute("select 1")
                except cenote.AcquireTimeout:
                    pass
                pool.refresh()
        await _whole(pool, driver)
        assert driver.server.most <= 3

    run(main())


def test_a_pool_closes_although_an_acquire_with_a_timeout_was_cancelled() -> None:
    """MagicStack/asyncpg#547: the cancelled acquire had left its connection in use; close() waited for ever."""

    async def cancelled_then_closed(play: Play) -> None:
        driver = AsyncScriptedDriver()
        pool = _pool(driver, play.now)
        await pool.wait_ready()
        # Before Python 3.12 wait_for() itself may swallow a cancellation that comes together with the result.
        play.may_swallow = True

        async def user() -> None:
            conn = await asyncio.wait_for(pool.acquire(timeout=200), 300)
            await pool.release(conn)

        play.party("user", user())
        await play.go()
        started = play.now()
        assert await pool.close(timeout=100) == ()
        assert play.now() == started, "close() had to wait for a lease that nobody has"
        assert not driver.server.sessions

    assert explore(cancelled_then_closed, deviations=1, budget=BUDGET).cancellations


def test_no_worker_starves_however_many_share_the_connections() -> None:
    """MagicStack/asyncpg#1247: 100 workers, 10 connections, 200 ms each: somebody waited for over 10 s."""

    async def main() -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        driver = AsyncScriptedDriver()
        pool = _pool(driver, loop.time, min_size=10, max_size=10, acquire_timeout=10)
        await pool.wait_ready()
        waits: list[float] = []
        turns = [0] * 100

        async def worker(number: int) -> None:
            while loop.time() < 1100:
                asked = loop.time()
                async with pool.connection():
                    waits.append(loop.time() - asked)
                    turns[number] += 1
                    await asyncio.sleep(0.2)

        async with asyncio.TaskGroup() as tasks:
            for number in range(100):
                tasks.create_task(worker(number))
        # 10 workers a connection, 200 ms each: nobody waits for longer than the nine before him take.
        assert max(waits) < 1.9
        assert max(turns) - min(turns) <= 1
        await _whole(pool, driver)

    run(main())


def test_a_cancelled_task_gives_its_connection_back_even_if_the_clean_up_is_cancelled_again() -> None:
    """sqlalchemy/sqlalchemy#8145: every await of the clean-up was cancelled anew; the pool never saw the end."""

    async def cancelled_again_and_again(play: Play) -> None:
        driver = AsyncScriptedDriver()
        pool = _pool(driver, play.now)
        await pool.wait_ready()

        async def user() -> None:
            async with pool.transaction() as conn:
                while True:
                    await conn.execute("select now()")
                    await asyncio.sleep(1)

        async def scope() -> None:
            # Like a cancel scope: as long as the task lives, each of its awaits is cancelled.
            task = asyncio.create_task(user())
            await asyncio.sleep(2.5)
            while not task.done():
                task.cancel()
                await asyncio.sleep(0)

        play.party("scope", scope(), spared=True)
        await play.go()
        await _whole(pool, driver)

    explore(cancelled_again_and_again, deviations=1, cancels=0, budget=BUDGET)


def test_requests_cancelled_under_contention_cost_no_slot() -> None:
    """encode/httpcore#1093: each request cancelled between assignment and dial kept a slot for ever."""

    async def main() -> None:
        loop = asyncio.get_running_loop()
        driver = AsyncScriptedDriver()
        driver.always("connect", delay=0.02)
        driver.always("query", delay=0.003)
        pool = _pool(driver, loop.time, min_size=0, max_size=10, idle_timeout=0.01)

        async def client(number: int) -> None:
            for turn in range(40):
                patience = 0.0005 * ((number * 7 + turn * 13) % 50)
                try:
                    async with asyncio.timeout(patience):
                        assert await pool.fetch_value("select", (number, turn)) == (number, turn)
                except TimeoutError:
                    pass

        async with asyncio.TaskGroup() as tasks:
            for number in range(20):
                tasks.create_task(client(number))
        assert pool.stats().refused.get("abandoned"), "nobody was cancelled in line: the test proves nothing"
        await _whole(pool, driver)
        assert driver.server.most <= 10

    run(main())


def test_a_query_cancelled_at_any_point_never_answers_the_next_one() -> None:
    """redis/redis-py#2624: the answer of a cancelled command was read by the next one, and so on for ever."""

    async def cancelled_in_mid_query(play: Play) -> None:
        driver = AsyncScriptedDriver()
        driver.always("query", delay=0.01)
        pool = _pool(driver, play.now)
        await pool.wait_ready()

        async def user(name: str) -> None:
            for turn in range(2):
                assert await pool.fetch_value("get", (name, turn)) == (name, turn)

        play.party("foo", user("foo"))
        play.party("bar", user("bar"))
        await play.go()
        await _whole(pool, driver)

    assert explore(cancelled_in_mid_query, deviations=1, budget=BUDGET).cancellations


def _on_a_real_loop(main: Coroutine[Any, Any, None]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(LIMIT_S):
            await main

    asyncio.run(bounded())


@pytest.mark.pg
@pytest.mark.parametrize("driver", ["psycopg", "asyncpg"])
def test_on_a_real_server_a_query_cancelled_at_any_point_never_answers_the_next_one(driver: str, dsn: str) -> None:
    """redis/redis-py#2624, psycopg and asyncpg: what is unread is read by nobody, and no connection is lost."""
    parameter = "%s" if driver == "psycopg" else "$1"

    async def main() -> None:
        async with cenote.AsyncPool(dsn, driver=driver, min_size=1, max_size=2) as pool:
            sql = f"select {parameter}::int4"
            await pool.wait_ready()

            async def ask(number: int) -> None:
                assert await pool.fetch_value(sql, [number]) == number

            cancelled = 0
            # The event loop itself counts: one turn later each time, from before the query to after its answer.
            for turns in range(60):
                task = asyncio.create_task(ask(turns))
                for _ in range(turns % 12):
                    await asyncio.sleep(0)
                task.cancel()
                await asyncio.wait([task])
                cancelled += task.cancelled()
                assert task.cancelled() or task.exception() is None
                await asyncio.gather(*(ask(1000 * turns + other) for other in range(3)))
            assert cancelled
            pool._machine.check()
            pool.assert_all_returned()
            assert await pool.close() == ()
            assert pool.stats().size == 0

    _on_a_real_loop(main())


@pytest.mark.pg
@pytest.mark.parametrize("driver", ["psycopg", "asyncpg"])
def test_on_a_real_server_a_slow_query_that_is_cancelled_frees_its_connection_at_once(
    driver: str, dsn: str
) -> None:
    """psycopg/psycopg#1208 and MagicStack/asyncpg#547 in mid-query: the only connection serves again."""

    async def main() -> None:
        async with cenote.AsyncPool(dsn, driver=driver, min_size=1, max_size=1) as pool:
            running = asyncio.create_task(pool.fetch_value("select pg_sleep(600)"))
            while not any(holder.in_query for holder in pool.holders()):  # noqa: ASYNC110
                await asyncio.sleep(0)
            running.cancel()
            await asyncio.wait([running])
            assert running.cancelled()
            assert await pool.fetch_value("select 42", timeout=10) == 42
            assert pool.stats().leased == 0

    _on_a_real_loop(main())


@pytest.mark.pg
@pytest.mark.parametrize("driver", ["psycopg", "asyncpg"])
def test_on_a_real_server_a_task_cancelled_in_a_transaction_leaves_none_open(driver: str, dsn: str) -> None:
    """sqlalchemy/sqlalchemy#8145: the block ends, is rolled back, and the pool has the connection."""

    async def main() -> None:
        async with cenote.AsyncPool(dsn, driver=driver, min_size=1, max_size=1) as pool:
            for _ in range(5):
                begun = asyncio.Event()

                async def user(begun: asyncio.Event = begun) -> None:
                    async with pool.transaction() as conn:
                        await conn.execute("select set_config('published.mark', 'still open', true)")
                        begun.set()
                        await conn.execute("select pg_sleep(600)")

                task = asyncio.create_task(user())
                await begun.wait()
                await asyncio.sleep(0)
                task.cancel()
                await asyncio.wait([task])
                assert task.cancelled()
                # Local to the transaction: it cannot be read once that has ended.
                mark = "select current_setting('published.mark', true)"
                assert not await pool.fetch_value(mark, timeout=10), "the transaction is still open"
            pool.assert_all_returned()

    _on_a_real_loop(main())
