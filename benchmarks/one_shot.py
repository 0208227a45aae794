"""One statement on its own: `pool.fetch_value("SELECT 1")`, against the bare driver on an open connection.

All run in autocommit, so that each costs one round trip; asyncpg.Pool adds its reset query. The statement is the
cheapest there is: with a real one every ratio is nearer to 1. CPU is this process's own, and steadier than the
time, which has the server and its scheduling in it. It refuses to measure the server: each contestant asks the
same one from the same thread. Client and server share one processor (`Run.together` says why), and connections are
opened anew a few times on the way.
"""

from time import perf_counter, process_time

from benchmarks import contestants as who
from benchmarks.arena import Run
from benchmarks.contestants import Sizes, Tasks, Threads
from benchmarks.rounds import Measure, Sample, rows

NAME = "one_shot"
TEXT = "one statement through the pool, against the bare driver in autocommit"

ROUNDS, QUICK_ROUNDS = 60, 8
QUERIES, QUICK_QUERIES = 250, 100
SITTINGS = 4
SIZES = Sizes(4, 4, autocommit=True)
SQL = "SELECT 1"
MEASURES = (Measure("time", "us per query", 1e6), Measure("CPU", "us per query", 1e6))
BOUND = 1.15

GROUPS = (
    ("psycopg, threads", (who.BARE_PSYCOPG, who.CENOTE, who.PSYCOPG_POOL, who.QUEUE_POOL)),
    ("psycopg2, threads", (who.BARE_PSYCOPG2, who.CENOTE_2, who.PSYCOPG2_POOL)),
)
ASYNC_GROUPS = (
    ("asyncpg", (who.BARE_ASYNCPG, who.CENOTE_ASYNCPG, who.ASYNCPG_POOL)),
    ("psycopg, asyncio", (who.BARE_ASYNC_PSYCOPG, who.CENOTE_PSYCOPG, who.ASYNC_PSYCOPG_POOL)),
)


def run(run: Run) -> None:
    with run.together():
        _run(run)


def _run(run: Run) -> None:
    rounds = run.number(ROUNDS, QUICK_ROUNDS)
    queries = QUICK_QUERIES if run.quick else QUERIES

    def sample(time_s: float, cpu_s: float) -> Sample:
        return {"time": time_s / queries, "CPU": cpu_s / queries}

    def measure(name: str, pool: Threads) -> Sample:
        value = pool.value
        started, cpu = perf_counter(), process_time()
        for _ in range(queries):
            value(SQL)
        return sample(perf_counter() - started, process_time() - cpu)

    async def measure_async(name: str, pool: Tasks) -> Sample:
        value = pool.value
        started, cpu = perf_counter(), process_time()
        for _ in range(queries):
            await value(SQL)
        return sample(perf_counter() - started, process_time() - cpu)

    for title, names in GROUPS:
        samples = run.compete(NAME, title, names, SIZES, rounds, measure, sittings=SITTINGS)
        # Promised for psycopg; psycopg2 is shown for comparison.
        bounds = {(who.CENOTE, "time"): BOUND}
        run.rows += rows(NAME, title, samples, MEASURES, reference=names[0], bounds=bounds)
    for title, names in ASYNC_GROUPS:
        samples = run.compete_async(NAME, title, names, SIZES, rounds, measure_async, sittings=SITTINGS)
        bounds = {(names[1], "time"): BOUND}
        run.rows += rows(NAME, title, samples, MEASURES, reference=names[0], bounds=bounds)
