"""The callers of a real storm: each request at its own moment, over a connection of its own or one of a pool.

Run as `python -m cenote.measure.storm_callers` by `measure/storm_real.py`. They are asyncio tasks; a request that
is refused is counted and never tried again. The end of standard input is the order to stop: what runs on the
server is cancelled, and its connections are closed.
"""

import asyncio
import contextlib
import json
import sys
from collections import Counter
from time import monotonic
from typing import Any

import psycopg

from cenote import errors
from cenote.measure.storm_real import APPLICATION, Plan
from cenote.measure.target import one_line
from cenote.pool.aio import AsyncPool

_SQL = "SELECT pg_sleep(%s)"
_TOO_MANY = ("too many clients already", "remaining connection slots are reserved")
_SAMPLE_EVERY_S = 0.1
_READY_S = 15.0


class Callers:
    """All requests of one plan, on one event loop."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._latency_s: dict[int, float] = {}
        self._refused: Counter[str] = Counter()
        self._failed: Counter[str] = Counter()
        self._open = self._opened = self._peak = self._rejected = 0
        self._pools: list[AsyncPool] = []
        self._samples: list[dict[str, float]] = []

    async def run(self) -> dict[str, Any]:
        """Send every request, and say what became of them."""
        async with contextlib.AsyncExitStack() as stack:
            if self._plan.way != "none":
                await self._open_pools(stack)
            return await self._send()

    async def _open_pools(self, stack: contextlib.AsyncExitStack) -> None:
        plan = self._plan
        # Clients of a proxy are there already when the storm begins: what it costs to be one is not its subject.
        least = plan.pool_size if plan.way == "proxy" else min(plan.min_size, plan.pool_size)
        for number in range(plan.instances):
            pool = AsyncPool(
                plan.dsn,
                name=f"storm-{number}",
                connect_args={"application_name": APPLICATION},
                min_size=least,
                max_size=plan.pool_size,
                acquire_timeout=plan.timeout_s,
                max_waiting=plan.max_waiting,
            )
            self._pools.append(await stack.enter_async_context(pool))
        if plan.way == "proxy":
            await self._pools[0].wait_ready(_READY_S)

    async def _send(self) -> dict[str, Any]:
        plan = self._plan
        began = monotonic()
        watching = asyncio.create_task(self._watch(began))
        tasks = set()
        for number, at_s in enumerate(plan.at_s):
            if (early := began + at_s - monotonic()) > 0:
                await asyncio.sleep(early)
            tasks.add(asyncio.create_task(self._request(number, began + at_s)))
        _, late = await asyncio.wait(tasks, timeout=max(0.0, began + plan.bound_s - monotonic()))
        seconds = monotonic() - began
        watching.cancel()
        for task in late:
            task.cancel()
        await asyncio.gather(watching, *tasks, return_exceptions=True)
        if plan.way != "none":
            self._opened = sum(sum(pool.stats().opened.values()) for pool in self._pools)
        return {
            "latency_s": [self._latency_s[number] for number in sorted(self._latency_s)],
            "refused": dict(self._refused),
            "failed": dict(self._failed),
            "unfinished": len(late),
            "opened": self._opened,
            "peak": self._peak,
            "rejected": self._rejected,
            "seconds": seconds,
            "samples": self._samples,
        }

    async def _request(self, number: int, since: float) -> None:
        try:
            if self._plan.way == "none":
                await self._ask_directly(self._plan.sleep_s[number])
            else:
                pool = self._pools[self._plan.instance[number] if len(self._pools) > 1 else 0]
                await pool.fetch_value(_SQL, (self._plan.sleep_s[number],))
        except errors.AcquireRefused as error:
            self._refused[error.reason] += 1
        except (psycopg.Error, OSError) as error:
            if any(words in str(error) for words in _TOO_MANY):
                self._rejected += 1
                self._refused["too_many_connections"] += 1
            else:
                self._failed[one_line(error)] += 1
        else:
            self._latency_s[number] = monotonic() - since

    async def _ask_directly(self, sleep_s: float) -> None:
        # A private server refuses by itself, at the same number; somebody's is not driven that far.
        if self._open >= self._plan.most:
            raise OSError(_TOO_MANY[0])
        self._open += 1
        try:
            conn = await psycopg.AsyncConnection.connect(
                self._plan.dsn, autocommit=True, application_name=APPLICATION
            )
            self._opened += 1
            self._peak = max(self._peak, self._open)
            async with conn:
                await conn.execute(_SQL, (sleep_s,))
        finally:
            self._open -= 1

    async def _watch(self, began: float) -> None:
        """Ten times a second: say how far it is, and take a sample."""
        before = (0, 0)
        while True:
            refused = sum(self._refused.values()) + sum(self._failed.values())
            now = (len(self._latency_s), refused)
            stats = [pool.stats() for pool in self._pools]
            connections = sum(each.size for each in stats) if stats else self._open
            self._peak = max(self._peak, connections)
            self._samples.append(
                {
                    "at_s": monotonic() - began,
                    "connections": connections,
                    "waiting": sum(each.waiting for each in stats),
                    "answered": now[0] - before[0],
                    "refused": now[1] - before[1],
                }
            )
            before = now
            try:
                print(json.dumps({"ended": sum(now)}), flush=True)
            except BrokenPipeError:
                return  # whoever started us has gone; the end of our input stops everything
            await asyncio.sleep(_SAMPLE_EVERY_S)


async def _until_told(plan: Plan) -> dict[str, Any]:
    """Run the plan; stop when nobody listens any more."""
    running = asyncio.create_task(Callers(plan).run())
    loop = asyncio.get_running_loop()
    # Nothing more is ever written to it: readable means that the other end has closed it.
    loop.add_reader(sys.stdin.fileno(), running.cancel)
    try:
        return await running
    finally:
        loop.remove_reader(sys.stdin.fileno())


def main() -> None:
    """Read a plan from standard input, carry it out, write what came of it."""
    plan = Plan(**json.loads(sys.stdin.readline()))
    message: dict[str, Any]
    try:
        message = {"outcome": asyncio.run(_until_told(plan))}
    except asyncio.CancelledError:
        return
    except (psycopg.Error, errors.CenoteError, OSError) as error:
        message = {"unusable": f"the storm could not be run: {one_line(error)}"}
    try:
        print(json.dumps(message), flush=True)
    except BrokenPipeError:
        pass


if __name__ == "__main__":
    main()
