"""What a pool costs when nothing stands in the way: one caller, a connection is free, no statement is sent.

One round of a contestant is a batch of a few hundredths of a second of acquire and release, or of empty `with`
blocks; the figure is the time of one. It refuses to subtract the loop around them: it is the same for all and
makes the ratios milder.
"""

import asyncio
from collections.abc import Awaitable, Callable
from time import perf_counter

from benchmarks import contestants as who
from benchmarks.arena import Run
from benchmarks.contestants import Sizes, Tasks, Threads
from benchmarks.rounds import Measure, Sample, rows

NAME = "uncontended"
TEXT = "acquire and release with a free connection: the pool's own cost"

ROUNDS, QUICK_ROUNDS = 60, 8
BATCH_S, QUICK_BATCH_S = 0.025, 0.01
SIZES = Sizes(4, 4)
BOUND = 0.4  # against psycopg_pool
ASYNC_BOUND = 0.1  # against asyncpg.Pool, which makes a round trip
CYCLE = Measure("time", "us per cycle", 1e6)

BLOCKS = tuple(name for name in who.POOLS if name != who.PSYCOPG2_POOL)


def run(run: Run) -> None:
    with run.together():
        _run(run)


def _run(run: Run) -> None:
    rounds = run.number(ROUNDS, QUICK_ROUNDS)
    batch_s = QUICK_BATCH_S if run.quick else BATCH_S
    for title, names, cycle in (
        ("acquire + release, threads", who.POOLS, acquire_release),
        ("with pool.connection(), threads", BLOCKS, block),
    ):
        samples = run.compete(NAME, title, names, SIZES, rounds, _timed(cycle, batch_s))
        bounds = {(who.CENOTE, "time"): BOUND}
        run.rows += rows(NAME, title, samples, [CYCLE], reference=who.PSYCOPG_POOL, bounds=bounds)
    for title, async_cycle, bounds in (
        ("acquire + release, asyncio", acquire_release_async, {(who.CENOTE_ASYNCPG, "time"): ASYNC_BOUND}),
        ("async with pool.connection(), asyncio", block_async, {}),
    ):
        measure = _timed_async(async_cycle, batch_s)
        samples = run.compete_async(NAME, title, who.ASYNC_POOLS, SIZES, rounds, measure)
        run.rows += rows(NAME, title, samples, [CYCLE], reference=who.ASYNCPG_POOL, bounds=bounds)


def _timed(cycle: Callable[[Threads, int], float], batch_s: float) -> Callable[[str, Threads], Sample]:
    batches: dict[str, int] = {}

    def measure(name: str, pool: Threads) -> Sample:
        if name not in batches:  # the round to warm up
            batches[name] = _batch(cycle(pool, 200) / 200, batch_s)
        return {"time": cycle(pool, batches[name]) / batches[name]}

    return measure


def _timed_async(
    cycle: Callable[[Tasks, int], Awaitable[float]], batch_s: float
) -> Callable[[str, Tasks], Awaitable[Sample]]:
    batches: dict[str, int] = {}

    async def measure(name: str, pool: Tasks) -> Sample:
        if name not in batches:
            batches[name] = _batch(await cycle(pool, 50) / 50, batch_s)
        return {"time": await cycle(pool, batches[name]) / batches[name]}

    return measure


def _batch(one_s: float, batch_s: float) -> int:
    return max(10, int(batch_s / one_s))


def acquire_release(pool: Threads, cycles: int) -> float:
    acquire, release = pool.acquire, pool.release
    assert acquire is not None
    assert release is not None
    started = perf_counter()
    for _ in range(cycles):
        release(acquire())
    return perf_counter() - started


def block(pool: Threads, cycles: int) -> float:
    connection = pool.connection
    assert connection is not None
    started = perf_counter()
    for _ in range(cycles):
        with connection():
            pass
    return perf_counter() - started


async def acquire_release_async(pool: Tasks, cycles: int) -> float:
    acquire, release = pool.acquire, pool.release
    assert acquire is not None
    assert release is not None
    started = perf_counter()
    for _ in range(cycles):
        await release(await acquire())
    spent = perf_counter() - started
    await asyncio.sleep(0)  # what a pool left for later belongs to nobody else's batch
    return spent


async def block_async(pool: Tasks, cycles: int) -> float:
    connection = pool.connection
    assert connection is not None
    started = perf_counter()
    for _ in range(cycles):
        async with connection():
            pass
    spent = perf_counter() - started
    await asyncio.sleep(0)
    return spent
