"""Far more callers than connections, all at once."""

from __future__ import annotations

import asyncio
import threading

import pytest

import cenote
from pool_kit import add_up, behaviour

CALLERS = 1000


@pytest.mark.parametrize("driver", ["psycopg", "psycopg2"])
def test_a_thousand_threads_at_once_are_all_served(dsn: str, driver: str) -> None:
    start = threading.Event()
    ends: list[object] = []

    def caller() -> None:
        start.wait(30)
        try:
            with pool.connection() as conn:
                cursor = conn.cursor()
                cursor.execute("SELECT 1")
                ends.append(cursor.fetchone()[0])
        except BaseException as error:
            ends.append(error)

    with cenote.Pool(dsn, driver=driver, min_size=0, max_size=10) as pool:
        callers = [threading.Thread(target=caller) for _ in range(CALLERS)]
        for each in callers:
            each.start()
        start.set()
        for each in callers:
            each.join(60)
        assert ends == [1] * CALLERS
        stats = pool.stats()
        assert stats.refused == {}
        assert stats.acquired == CALLERS
        assert sum(stats.opened.values()) <= 10
        assert (stats.leased, stats.waiting) == (0, 0)


@pytest.mark.parametrize("driver", ["psycopg", "asyncpg"])
@behaviour
async def test_a_thousand_tasks_at_once_are_all_served_in_the_order_they_came(dsn: str, driver: str) -> None:
    served: list[int] = []

    async def caller(number: int) -> None:
        async with pool.connection() as conn:
            served.append(number)
            await conn.execute("SELECT 1")

    async with cenote.AsyncPool(dsn, driver=driver, min_size=0, max_size=10) as pool:
        async with asyncio.timeout(60):
            await asyncio.gather(*(caller(number) for number in range(CALLERS)))
        assert served == list(range(CALLERS))
        stats = pool.stats()
        assert stats.refused == {}
        assert stats.acquired == CALLERS
        assert sum(stats.opened.values()) <= 10
        assert (stats.leased, stats.waiting) == (0, 0)
        add_up(stats)


@behaviour
async def test_beyond_max_waiting_a_crowd_is_refused_and_the_rest_served(dsn: str) -> None:
    async with cenote.AsyncPool(dsn, min_size=0, max_size=2, max_waiting=100) as pool:
        ends = await asyncio.gather(*(pool.fetch_value("SELECT 1") for _ in range(500)), return_exceptions=True)
        refused = [end for end in ends if isinstance(end, cenote.QueueFull)]
        assert len(refused) == 400
        assert ends.count(1) == 100
        assert pool.stats().refused == {"queue_full": 400}
