"""The callers of a real storm: each request at its own moment, over a connection of its own or one of a pool.

Run as `python -m cenote.measure.storm_callers` by `measure/storm_real.py`. They are asyncio tasks; a request that
is refused is counted and never tried again. All their connections together stay within one bound. The end of
standard input is the order to stop: what runs on the server is cancelled, and its connections are closed.
"""

import asyncio
import contextlib
import json
import logging
import sys
from collections import Counter
from time import monotonic
from typing import Any

import psycopg

from cenote import errors
from cenote.config import PoolOptions
from cenote.measure.storm_real import APPLICATION, Plan
from cenote.measure.target import one_line
from cenote.pool.aio import AsyncPool
from cenote.pool.drivers.psycopg_async import AsyncPsycopgDriver

_SQL = "SELECT pg_sleep(%s)"
_TOO_MANY = "53300"
_SAMPLE_EVERY_S = 0.1
_READY_S = 15.0
_CLOSE_S = 10.0


class Bounded(AsyncPsycopgDriver):
    """Opens every connection of the callers, and none beyond the bound: as a server that is full refuses it.

    A connection counts from its dial until the server has let go: one that is only closed here may still hold its
    place there.
    """

    def __init__(self, plan: Plan) -> None:
        super().__init__(plan.dsn, {"application_name": APPLICATION}, PoolOptions())
        self.opened = self.peak = self.rejected = 0
        self._most = plan.most
        self._dialing = 0
        self._held: set[Any] = set()

    @property
    def connections(self) -> int:
        """Those that there are now."""
        return self._dialing + len(self._held)

    async def connect(self, timeout_s: float) -> Any:
        if self.connections >= self._most:
            self.rejected += 1
            raise psycopg.errors.TooManyConnections("sorry, too many clients already")
        self._dialing += 1
        self.peak = max(self.peak, self.connections)
        try:
            conn = await super().connect(timeout_s)
            self._held.add(conn.pgconn)
        except psycopg.Error as error:
            self.rejected += error.sqlstate == _TOO_MANY
            raise
        finally:
            self._dialing -= 1
        self.opened += 1
        return conn

    async def close(self, conn: Any, handle: Any, timeout_s: float) -> None:
        try:
            await super().close(conn, handle, timeout_s)
        finally:
            self._held.discard(handle if handle is not None else conn.pgconn)


class Callers:
    """All requests of one plan, on one event loop."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._latency_s: dict[int, float] = {}
        self._refused: Counter[str] = Counter()
        self._failed: Counter[str] = Counter()
        self._driver = Bounded(plan)
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
                driver=self._driver,
                name=f"storm-{number}",
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
        ended = len(self._latency_s) + self._refused.total() + self._failed.total()
        return {
            "latency_s": [self._latency_s[number] for number in sorted(self._latency_s)],
            "refused": dict(self._refused),
            "failed": dict(self._failed),
            "unfinished": len(plan.at_s) - ended,
            "opened": self._driver.opened,
            "peak": self._driver.peak,
            "rejected": self._driver.rejected,
            "seconds": seconds,
            "samples": self._samples,
        }

    async def _request(self, number: int, since: float) -> None:
        sleep_s = self._plan.sleep_s[number]
        try:
            if self._plan.way == "none":
                await self._ask_directly(number, sleep_s, since)
            else:
                pool = self._pools[self._plan.instance[number] if len(self._pools) > 1 else 0]
                await pool.fetch_value(_SQL, (sleep_s,))
                self._latency_s[number] = monotonic() - since
        except errors.AcquireRefused as error:
            self._refused[error.reason] += 1
        except (psycopg.Error, OSError) as error:
            if getattr(error, "sqlstate", None) == _TOO_MANY:
                self._refused["too_many_connections"] += 1
            else:
                self._failed[one_line(error)] += 1

    async def _ask_directly(self, number: int, sleep_s: float, since: float) -> None:
        driver = self._driver
        conn = await driver.connect(self._plan.bound_s)
        try:
            await driver.fetch_value(conn, _SQL, (sleep_s,))
            self._latency_s[number] = monotonic() - since
        finally:
            await driver.close(conn, None, _CLOSE_S)

    async def _watch(self, began: float) -> None:
        """Ten times a second: say how far it is, and take a sample."""
        before = (0, 0)
        while True:
            refused = sum(self._refused.values()) + sum(self._failed.values())
            now = (len(self._latency_s), refused)
            self._samples.append(
                {
                    "at_s": monotonic() - began,
                    "connections": self._driver.connections,
                    "waiting": sum(pool.stats().waiting for pool in self._pools),
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
    line = sys.stdin.readline()
    if not line.endswith("\n"):
        return  # whoever started us has gone before all was said
    plan = Plan(**json.loads(line))
    for name in ("cenote", "psycopg"):  # what they would log is counted here, or ends in the message
        logging.getLogger(name).addHandler(logging.NullHandler())
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
