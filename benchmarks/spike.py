"""The spike: 50 callers at once on a pool of 5 to 50 connections, when a dial takes 150 ms and a query 2 ms.

The five open connections could serve everybody in 20 ms, before any dial ends. A pool that dials for each caller
opens 45 connections that nobody needs, at the moment when the server has the least time for it. The story and its
numbers are HikariCP's ("Welcome to the Jungle"). The connections are counted by the front that delays them, not by
the pools, until 0.4 s after the last caller was served: a dial under way counts.

The callers are threads, or tasks; psycopg2's pool dials while it holds its lock, one after the other. It refuses
to call few connections good by themselves: the time until all were served stands beside them. The
counts hardly vary, so that few rounds are enough.
"""

import asyncio
import threading
from collections.abc import Sequence
from functools import partial
from time import perf_counter, sleep

from benchmarks import contestants as who
from benchmarks.arena import Run
from benchmarks.contestants import TASKS, THREADS, Sizes
from benchmarks.front import Front, delayed
from benchmarks.rounds import Measure, Sample, rows

NAME = "spike"
TEXT = "50 callers at once, 150 ms dials, 2 ms queries: how many connections get opened"

ROUNDS, QUICK_ROUNDS = 3, 1
CALLERS = 50
DIAL_S = 0.150
SETTLE_S = 0.4
SQL = "SELECT pg_sleep(0.002)"
SIZES = Sizes(5, 50, autocommit=True)
MEASURES = (
    Measure("connections opened", "beyond the five"),
    Measure("all served", "ms", 1e3),
    Measure("median served", "ms", 1e3),
)


def run(run: Run) -> None:
    rounds = run.number(ROUNDS, QUICK_ROUNDS)
    with delayed(run.server.host, run.server.port, DIAL_S) as front:
        dsn = run.server.dsn.replace(f":{run.server.port}/", f":{front.port}/")
        for title, names, reference, measure in (
            (f"{CALLERS} threads", who.POOLS, who.PSYCOPG_POOL, _threads),
            (f"{CALLERS} tasks", who.ASYNC_POOLS, who.ASYNCPG_POOL, _tasks),
        ):
            samples = run.one_by_one(NAME, title, names, rounds, partial(measure, dsn=dsn, front=front))
            run.rows += rows(NAME, title, samples, MEASURES, reference=reference, bounds={})


def _threads(name: str, dsn: str, front: Front) -> Sample:
    pool = THREADS[name](dsn, SIZES)
    try:
        for _ in range(3):  # the first query of a connection prepares things
            pool.value(SQL)
        before = front.accepted()
        start = threading.Barrier(CALLERS)
        began: list[float] = []
        served: list[float] = []

        def call() -> None:
            start.wait()
            began.append(perf_counter())
            pool.value(SQL)
            served.append(perf_counter())

        callers = [threading.Thread(target=call) for _ in range(CALLERS)]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join()
        sleep(SETTLE_S)
        return _sample(front.accepted() - before, min(began), served)
    finally:
        pool.close()


def _tasks(name: str, dsn: str, front: Front) -> Sample:
    return asyncio.run(_tasks_async(name, dsn, front))


async def _tasks_async(name: str, dsn: str, front: Front) -> Sample:
    pool = await TASKS[name](dsn, SIZES)
    try:
        for _ in range(3):
            await pool.value(SQL)
        before = front.accepted()
        served: list[float] = []

        async def call() -> None:
            await pool.value(SQL)
            served.append(perf_counter())

        began = perf_counter()
        await asyncio.gather(*(call() for _ in range(CALLERS)))
        await asyncio.sleep(SETTLE_S)
        return _sample(front.accepted() - before, began, served)
    finally:
        await pool.close()


def _sample(opened: int, began: float, served: Sequence[float]) -> Sample:
    if len(served) < CALLERS:
        raise RuntimeError(f"only {len(served)} of {CALLERS} callers were served")
    waits = sorted(at - began for at in served)
    return {
        "connections opened": opened,
        "all served": waits[-1],
        "median served": waits[len(waits) // 2],
    }
