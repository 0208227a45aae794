"""More callers than connections: 32 threads, or 1,000 tasks, take turns on 8 connections and hold each for 1 ms.

The work is a sleep while the connection is held, not a query: with 8 connections and 1 ms the ceiling is known
(8,000 cycles a second, less what the sleep oversleeps), and what a pool stays below it is its own doing. A query
of 1 ms would spend the machine's processors on the driver and the server, which are the same for all, and hide
the pools behind them. asyncpg.Pool sends its reset query at each release all the same; that is how it works.

Unfairness is the deviation of the callers' numbers of turns from each other: 0 where all had equally many.
It refuses to call throughput alone good: a pool may win it by serving whoever comes first again, so the waits and
the fairness stand beside it.
"""

import asyncio
import statistics
import threading
from collections.abc import Sequence
from time import perf_counter, process_time, sleep

from benchmarks import contestants as who
from benchmarks.arena import Run
from benchmarks.contestants import Sizes, Tasks, Threads
from benchmarks.rounds import Measure, Sample, rows

NAME = "contended"
TEXT = "32 threads or 1,000 tasks on 8 connections, 1 ms each: throughput, waits, fairness"

ROUNDS, QUICK_ROUNDS = 9, 1
ROUND_S, QUICK_ROUND_S = 0.6, 0.3
TASK_ROUND_S, QUICK_TASK_ROUND_S = 1.2, 0.6  # a thousand callers need longer for a few turns each
CALLERS, TASKS = 32, 1000
WORK_S = 0.001
SIZES = Sizes(8, 8, crowded=True)
MEASURES = (
    Measure("throughput", "cycles per s"),
    Measure("CPU", "us per cycle", 1e6),
    Measure("p99 wait", "ms", 1e3),
    Measure("longest wait", "ms", 1e3),
    Measure("unfairness", "stdev / mean"),
)


def run(run: Run) -> None:
    rounds = run.number(ROUNDS, QUICK_ROUNDS)
    lasts_s = QUICK_ROUND_S if run.quick else ROUND_S
    title = f"{CALLERS} threads on {SIZES.max_size} connections"
    samples = run.compete(NAME, title, who.POOLS, SIZES, rounds, lambda _, pool: _threads(pool, lasts_s))
    run.rows += rows(NAME, title, samples, MEASURES, reference=who.PSYCOPG_POOL, bounds={})

    async def measure(_: str, pool: Tasks) -> Sample:
        return await _tasks(pool, QUICK_TASK_ROUND_S if run.quick else TASK_ROUND_S)

    title = f"{TASKS:,} tasks on {SIZES.max_size} connections"
    samples = run.compete_async(NAME, title, who.ASYNC_POOLS, SIZES, rounds, measure)
    run.rows += rows(NAME, title, samples, MEASURES, reference=who.ASYNCPG_POOL, bounds={})


def _threads(pool: Threads, lasts_s: float) -> Sample:
    acquire, release = pool.acquire, pool.release
    assert acquire is not None
    assert release is not None
    waits: list[list[float]] = [[] for _ in range(CALLERS)]
    start = threading.Barrier(CALLERS + 1)
    until = 0.0

    def call(mine: list[float]) -> None:
        start.wait()
        while (asked := perf_counter()) < until:
            conn = acquire()
            mine.append(perf_counter() - asked)
            sleep(WORK_S)
            release(conn)

    callers = [threading.Thread(target=call, args=(mine,)) for mine in waits]
    for caller in callers:
        caller.start()
    began, cpu = perf_counter(), process_time()
    until = began + lasts_s
    start.wait()
    for caller in callers:
        caller.join()
    return _sample(waits, perf_counter() - began, process_time() - cpu)


async def _tasks(pool: Tasks, lasts_s: float) -> Sample:
    acquire, release = pool.acquire, pool.release
    assert acquire is not None
    assert release is not None
    waits: list[list[float]] = [[] for _ in range(TASKS)]
    began, cpu = perf_counter(), process_time()
    until = began + lasts_s

    async def call(mine: list[float]) -> None:
        while (asked := perf_counter()) < until:
            conn = await acquire()
            mine.append(perf_counter() - asked)
            await asyncio.sleep(WORK_S)
            await release(conn)

    await asyncio.gather(*(call(mine) for mine in waits))
    return _sample(waits, perf_counter() - began, process_time() - cpu)


def _sample(waits: Sequence[Sequence[float]], lasted_s: float, cpu_s: float) -> Sample:
    every = sorted(wait for mine in waits for wait in mine)
    turns = [len(mine) for mine in waits]
    return {
        "throughput": len(every) / lasted_s,
        "CPU": cpu_s / len(every),
        "p99 wait": every[int(0.99 * (len(every) - 1))],
        "longest wait": every[-1],
        "unfairness": statistics.pstdev(turns) / statistics.fmean(turns),
    }
