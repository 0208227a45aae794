"""A server restart under steady load: what fails, and how long until the waits are normal again.

16 callers on 8 connections ask `SELECT 1` every 10 ms, each by the one-statement way its documentation shows; one
that fails pauses as long and goes on. After a second of that the server restarts (mode "fast": sessions are told
57P01 and closed). The clock of the recovery starts when the server answers again and stops where the first 0.2 s
begins in which at least half the usual operations were started, none failed, and their p99 was at most twice the
normal one.

All contestants keep their defaults: a pool that can check at every borrow, and does not by default, is measured
without. It refuses to retry for anybody, and stops watching after ten seconds, which is then the figure. What the
pools log of the outage is not printed.
"""

import asyncio
import logging
import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from time import perf_counter, sleep

from benchmarks import contestants as who
from benchmarks.arena import Run
from benchmarks.contestants import TASKS, THREADS, Sizes
from benchmarks.rounds import Measure, Sample, rows

NAME = "recovery"
TEXT = "a server restart under load: failed operations, time until p99 is normal again"

ROUNDS, QUICK_ROUNDS = 4, 1
CALLERS = 16
PAUSE_S = 0.010
LATE_S = [PAUSE_S * caller / CALLERS for caller in range(CALLERS)]  # they do not march in step
NORMAL_S, QUICK_NORMAL_S = 1.0, 0.4
WARM_UP_S = 0.3
STEP_S, WINDOW = 0.01, 20  # a window is 0.2 s
GIVE_UP_S = 10.0
SQL = "SELECT 1"
SIZES = Sizes(8, 8, autocommit=True, crowded=True)
MEASURES = (
    Measure("failed", "operations"),
    Measure("recovered", "ms after the server answers", 1e3),
    Measure("longest", "ms for one operation", 1e3),
    Measure("normal p99", "ms", 1e3),
)


def run(run: Run) -> None:
    rounds = run.number(ROUNDS, QUICK_ROUNDS)
    logging.getLogger().addHandler(logging.NullHandler())  # else its last resort prints them
    for title, names, reference, load in (
        (f"{CALLERS} threads on {SIZES.max_size} connections", who.POOLS, who.PSYCOPG_POOL, _threads),
        (f"{CALLERS} tasks on {SIZES.max_size} connections", who.ASYNC_POOLS, who.ASYNCPG_POOL, _tasks),
    ):
        samples = run.one_by_one(NAME, title, names, rounds, partial(_measure, load=load, run=run))
        run.rows += rows(NAME, title, samples, MEASURES, reference=reference, bounds={})


@dataclass
class _Log:
    """What the callers did, by the step of time in which each operation started: how long, and did it fail."""

    steps: defaultdict[int, list[tuple[float, bool]]] = field(default_factory=lambda: defaultdict(list))
    ready: threading.Event = field(default_factory=threading.Event)
    stop: bool = False
    error: BaseException | None = None

    def add(self, started: float, failed: bool) -> None:
        self.steps[int(started / STEP_S)].append((perf_counter() - started, failed))

    def between(self, start: int, end: int) -> list[tuple[float, bool]]:
        return [each for step in range(start, end) for each in self.steps.get(step, ())]


def _measure(name: str, load: Callable[[str, str, _Log], None], run: Run) -> Sample:
    server, log = run.server, _Log()

    def play() -> None:
        try:
            load(name, server.dsn, log)
        except BaseException as error:
            log.error = error
        finally:
            log.ready.set()

    # The load has a thread of its own, so that this one can restart the server meanwhile.
    player = threading.Thread(target=play)
    player.start()
    try:
        log.ready.wait()
        if log.error is not None:
            raise log.error
        sleep(WARM_UP_S)
        began = _now()
        sleep(QUICK_NORMAL_S if run.quick else NORMAL_S)
        down = _now()
        server.restart()
        back = perf_counter()
        normal = log.between(began, down)
        normal_p99 = _p99([took for took, _ in normal])
        usual = len(normal) * WINDOW / (down - began)
        recovered = GIVE_UP_S
        step = _now() + 1
        while recovered == GIVE_UP_S and perf_counter() < back + GIVE_UP_S:
            sleep(0.02)
            # A window that has just ended may still have operations under way, the slow ones.
            while (step + WINDOW) * STEP_S + 2 * normal_p99 <= perf_counter():
                window = log.between(step, step + WINDOW)
                if _is_normal(window, usual, normal_p99):
                    recovered = max(0.0, step * STEP_S - back)
                    break
                step += 1
    finally:
        log.stop = True
        player.join()
    after = log.between(down - round(GIVE_UP_S / STEP_S), _now() + 1)
    return {
        "failed": sum(failed for _, failed in after),
        "recovered": recovered,
        "longest": max(took for took, _ in after),
        "normal p99": normal_p99,
    }


def _now() -> int:
    return int(perf_counter() / STEP_S)


def _is_normal(window: Sequence[tuple[float, bool]], usual: float, normal_p99: float) -> bool:
    if len(window) < usual / 2 or any(failed for _, failed in window):
        return False
    return _p99([took for took, _ in window]) <= 2 * normal_p99


def _p99(times: Sequence[float]) -> float:
    return sorted(times)[int(0.99 * (len(times) - 1))]


def _threads(name: str, dsn: str, log: _Log) -> None:
    pool = THREADS[name](dsn, SIZES)
    value = pool.value

    def call(late_s: float) -> None:
        sleep(late_s)
        while not log.stop:
            started, failed = perf_counter(), False
            try:
                value(SQL)
            except Exception:
                failed = True
            log.add(started, failed)
            sleep(PAUSE_S)

    callers = [threading.Thread(target=call, args=(late_s,)) for late_s in LATE_S]
    for caller in callers:
        caller.start()
    log.ready.set()
    for caller in callers:
        caller.join()
    pool.close()


def _tasks(name: str, dsn: str, log: _Log) -> None:
    asyncio.run(_tasks_async(name, dsn, log))


async def _tasks_async(name: str, dsn: str, log: _Log) -> None:
    pool = await TASKS[name](dsn, SIZES)
    value = pool.value

    async def call(late_s: float) -> None:
        await asyncio.sleep(late_s)
        while not log.stop:
            started, failed = perf_counter(), False
            try:
                await value(SQL)
            except Exception:
                failed = True
            log.add(started, failed)
            await asyncio.sleep(PAUSE_S)

    callers = [asyncio.create_task(call(late_s)) for late_s in LATE_S]
    log.ready.set()
    await asyncio.gather(*callers)
    await pool.close()
