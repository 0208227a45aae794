"""The callers: many tasks that each ask a database again and again, with or without a pool.

Run as `python -m cenote.measure.callers` by `measure/load.py`, which tells them what to do. They are asyncio
tasks on psycopg connections, as in a web service; a thousand threads would measure the interpreter's lock.
They measure themselves only: the server is measured from outside. A refused request is counted and never
tried again.
"""

import asyncio
import json
import os
import random
import resource
import sys
import threading
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import replace
from time import monotonic, process_time
from typing import Any

import psycopg

from cenote import errors
from cenote.measure.load import ROWS, SQL, Counts, Plan, Report, balance, files_needed, said
from cenote.pool.aio import AsyncPool

_TOO_MANY = ("too many clients already", "remaining connection slots are reserved")
_TELL_EVERY_S = 0.1
_SEED = 53300


Ask = Callable[[int], Awaitable[Any]]
"""Ask for an account's balance, one way or another."""


class Callers:
    """All callers of one plan, on one event loop."""

    def __init__(self, plan: Plan) -> None:
        self.counts = Counts()
        self._plan = plan
        self._latencies_s: list[float] = []
        self._refused: Counter[str] = Counter()
        self._failed: Counter[str] = Counter()
        self._opened = 0

    async def run(self) -> Report:
        """Send every request of the plan, and report."""
        if self._plan.way == "direct":
            return await self._call(lambda: nullcontext(self._ask_directly))
        if self._plan.way == "kept":
            return await self._call(lambda: _Kept(self._plan.dsn))
        # Opened in the moment the callers arrive, so its connections are part of what they wait for.
        size = self._plan.pool_size
        async with AsyncPool(self._plan.dsn, name="demo", min_size=size, max_size=size) as pool:

            async def ask(account: int) -> Any:
                return await pool.fetch_value(SQL, (account,))

            report = await self._call(lambda: nullcontext(ask))
            opened = sum(pool.stats().opened.values())
        return replace(report, opened=opened)

    async def _call(self, way: Callable[[], AbstractAsyncContextManager[Ask]]) -> Report:
        plan = self._plan
        started, cpu = monotonic(), process_time()
        callers = [asyncio.create_task(self._caller(number, way, started)) for number in range(plan.clients)]
        _, late = await asyncio.wait(callers, timeout=plan.bound_s)
        seconds, cpu = monotonic() - started, process_time() - cpu
        for caller in late:
            caller.cancel()
        await asyncio.gather(*callers, return_exceptions=True)
        ended = self.counts.answered + self.counts.refused + self.counts.failed
        return Report(
            latencies_s=sorted(self._latencies_s),
            refused=dict(self._refused),
            failed=dict(self._failed),
            unfinished=plan.clients * plan.requests - ended,
            opened=self._opened,
            started_s=started,
            seconds=seconds,
            cpu_s=cpu,
        )

    async def _caller(
        self, number: int, way: Callable[[], AbstractAsyncContextManager[Ask]], started: float
    ) -> None:
        draw = random.Random(_SEED + number)  # the same accounts, whichever the way
        free = started
        async with way() as ask:
            for turn in range(self._plan.requests):
                due = started + turn * self._plan.every_s
                await asyncio.sleep(max(0.0, due - monotonic()))
                await self._request(ask, draw.randint(1, ROWS), since=max(due, free))
                free = monotonic()

    async def _request(self, ask: Ask, account: int, since: float) -> None:
        try:
            answer = await ask(account)
        except errors.AcquireRefused as error:
            self._refuse(error.reason)
        except (psycopg.Error, OSError) as error:
            if _is_refusal(error):
                self._refuse("too_many_connections")
            else:
                self._fail(str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__)
        else:
            if answer == balance(account):
                self.counts.answered += 1
                self._latencies_s.append(monotonic() - since)
            else:
                self._fail("wrong answer")

    async def _ask_directly(self, account: int) -> Any:
        async with await psycopg.AsyncConnection.connect(self._plan.dsn, autocommit=True) as conn:
            self._opened += 1
            row = await (await conn.execute(SQL, (account,))).fetchone()
            return row[0] if row else None

    def _refuse(self, reason: str) -> None:
        self.counts.refused += 1
        self._refused[reason] += 1

    def _fail(self, reason: str) -> None:
        self.counts.failed += 1
        self._failed[reason] += 1


class _Kept:
    """One caller's own connection: opened for the first request, kept for the others."""

    def __init__(self, dsn: str) -> None:
        self._dsn = dsn
        self._conn: psycopg.AsyncConnection[Any] | None = None

    async def __aenter__(self) -> Ask:
        return self._ask

    async def __aexit__(self, *_: object) -> None:
        if self._conn is not None:
            await self._conn.close()

    async def _ask(self, account: int) -> Any:
        if self._conn is None or self._conn.closed:
            self._conn = await psycopg.AsyncConnection.connect(self._dsn, autocommit=True)
        row = await (await self._conn.execute(SQL, (account,))).fetchone()
        return row[0] if row else None


def _is_refusal(error: BaseException) -> bool:
    """SQLSTATE 53300; of a failed connect libpq passes on the words only."""
    if getattr(error, "sqlstate", None) == "53300":
        return True
    return any(words in str(error) for words in _TOO_MANY)


def _raise_file_limit(clients: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < files_needed(clients):
        resource.setrlimit(resource.RLIMIT_NOFILE, (files_needed(clients), hard))


def _tell(callers: Callers, ended: threading.Event) -> None:
    """Write the counts as they grow. A thread, because the loop may be late when it is most interesting."""
    while not ended.wait(_TELL_EVERY_S):
        try:
            print(said(callers.counts), flush=True)
        except BrokenPipeError:
            os._exit(1)  # whoever started us has gone, and nobody wants to know


def main() -> None:
    """Read a plan from standard input, carry it out, and write the report."""
    plan = Plan(**json.loads(sys.stdin.readline()))
    _raise_file_limit(plan.clients)
    callers = Callers(plan)
    ended = threading.Event()
    teller = threading.Thread(target=_tell, args=(callers, ended), daemon=True)
    teller.start()
    report = asyncio.run(callers.run())
    ended.set()
    teller.join()
    print(said(report), flush=True)


if __name__ == "__main__":
    main()
