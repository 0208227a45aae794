"""One way to drive every pool with every driver, so that a promised behaviour is written down once.

A behaviour is a coroutine function under `behaviour`. An `AsyncPool` is awaited directly; the calls of a
`Pool` run in threads of their own, so that callers which stand in line do not stand in each other's way.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import sqlite3
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psycopg
import pytest

import cenote
from cenote.pool.stats import PoolStats
from cenote.testing.postgres import wait_until

WRONG = "n0tth1s"  # a password
DEADLINE_S = 15.0
CALLERS = 128  # calls of a blocking pool that may be under way at once

DRIVERS = ("psycopg", "psycopg2", "async-psycopg", "asyncpg")
EVERY_DRIVER = (*DRIVERS, "sqlite3")

_numbers = itertools.count(1)


def behaviour(body: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    """A test whose body is a coroutine function."""

    @functools.wraps(body)
    def test(*args: Any, **named: Any) -> None:
        async def run() -> None:
            loop = asyncio.get_running_loop()
            # What a failed test leaves behind is its own failure's, and not worth a traceback of its own.
            loop.set_exception_handler(lambda *_: None)
            with ThreadPoolExecutor(CALLERS, thread_name_prefix="caller") as threads:
                loop.set_default_executor(threads)
                await body(*args, **named)

        asyncio.run(run())

    return test


async def until(condition: Callable[[], Any], what: str = "", timeout: float = DEADLINE_S) -> Any:
    """What `condition()` returns as soon as it is true."""
    deadline = time.monotonic() + timeout
    while not (answer := condition()):
        assert time.monotonic() < deadline, f"not within {timeout:g} s: {what or condition}"
        await asyncio.sleep(0.002)
    return answer


class Admin:
    """A superuser's look at the server."""

    def __init__(self, dsn: str) -> None:
        self.conn = psycopg.connect(dsn, autocommit=True)

    def rows(self, sql: Any, params: Any = None) -> list[Any]:
        cursor = self.conn.execute(sql, params)
        return cursor.fetchall() if cursor.description else []

    def value(self, sql: Any, params: Any = None) -> Any:
        return self.rows(sql, params)[0][0]

    def backends(self, app: str) -> list[int]:
        """Process ids of the sessions with this application_name."""
        found = self.rows("SELECT pid FROM pg_stat_activity WHERE application_name = %s ORDER BY pid", (app,))
        return [row[0] for row in found]

    def kill(self, *pids: int) -> None:
        """Terminate these backends and wait until they have gone."""
        self.rows("SELECT pg_terminate_backend(pid) FROM unnest(%s::int[]) AS pid", (list(pids),))
        # Not by its second parameter, which looks only every tenth of a second.
        left = "SELECT count(*) FROM pg_stat_activity WHERE pid = ANY (%s)"
        wait_until(lambda: self.value(left, (list(pids),)) == 0, what="the backends to be gone")


class Kit:
    """A pool class with a driver, and a place to connect to."""

    def __init__(self, name: str, dsn: str, admin: Admin | None) -> None:
        self.name = name
        self.kind = name.removeprefix("async-")
        self.is_async = name in ("async-psycopg", "asyncpg")
        self.mark = {"asyncpg": "$1", "sqlite3": "?"}.get(name, "%s")
        self.on_server = name != "sqlite3"
        self.implicit = self.kind != "asyncpg"  # the driver opens transactions by itself
        self.app = f"kit-{next(_numbers)}"
        self.dsn = self.named(dsn) if self.on_server else dsn
        self._admin = admin
        self._open = 0

    def named(self, dsn: str) -> str:
        """`dsn` with this kit's application_name, by which the server's sessions are told apart."""
        return f"{dsn}{'&' if '?' in dsn else '?'}application_name={self.app}"

    @property
    def admin(self) -> Admin:
        assert self._admin is not None
        return self._admin

    def backends(self) -> list[int]:
        return self.admin.backends(self.app)

    def kill(self, *pids: int) -> None:
        self.admin.kill(*pids)

    def make(self, dsn: Any = None, **options: Any) -> Any:
        """The bare pool."""
        dsn = self.dsn if dsn is None else dsn
        if self.kind == "sqlite3":
            options = {"driver": sqlite3.connect, "connect_args": {"check_same_thread": False}, **options}
        else:
            options = {"driver": self.kind, **options}
        return (cenote.AsyncPool if self.is_async else cenote.Pool)(dsn, **options)

    def hook(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function` in this kit's colour."""
        if not self.is_async:
            return function

        async def coloured(*args: Any) -> Any:
            return function(*args)

        return coloured

    @contextlib.asynccontextmanager
    async def pool(self, dsn: Any = None, **options: Any) -> AsyncIterator[Api]:
        """A pool for the block, closed afterwards; every connection it had is gone then."""
        api = Api(self, self.make(dsn, **options))
        self._open += 1
        try:
            yield api
        finally:
            await asyncio.wait_for(api.close(0.5), 20)
            self._open -= 1
            if self.on_server and dsn is None and not self._open:
                # A connection that was refused while it was dialed is nobody's any more, but may still be ending.
                await until(lambda: self.backends() == [], "close() left no session on the server")

    # -- what drivers say differently -----------------------------------------------------------------------

    def pid(self, conn: Any) -> int:
        """The backend's process id, without asking it."""
        return int(conn.get_server_pid() if self.kind == "asyncpg" else conn.info.backend_pid)

    async def sql(self, conn: Any, text: str, *params: Any) -> list[tuple[Any, ...]]:
        """Run a statement as a borrower would."""
        if self.kind == "asyncpg":
            return [tuple(row) for row in await conn.fetch(text, *params)]
        if self.is_async:
            cursor = await conn.execute(text, params or None)
            return [tuple(row) for row in await cursor.fetchall()] if cursor.description else []
        return await asyncio.to_thread(_run, conn, text, params)

    async def begin(self, conn: Any) -> None:
        """Have a transaction open."""
        await self.sql(conn, "SELECT 1" if self.kind in ("psycopg", "psycopg2") else "BEGIN")

    async def commit(self, conn: Any) -> None:
        if self.kind == "asyncpg":
            if conn.is_in_transaction():
                await conn.execute("COMMIT")
        elif self.is_async:
            await conn.commit()
        else:
            await asyncio.to_thread(conn.commit)

    async def close_connection(self, conn: Any) -> None:
        if self.is_async:
            await conn.close()
        else:
            await asyncio.to_thread(conn.close)

    def connection_class(self) -> type[Any]:
        import asyncpg
        import psycopg2.extensions

        return {
            "psycopg": psycopg.Connection,
            "psycopg2": psycopg2.extensions.connection,
            "async-psycopg": psycopg.AsyncConnection,
            "asyncpg": asyncpg.Connection,
            "sqlite3": sqlite3.Connection,
        }[self.name]

    def errors(self) -> tuple[type[Exception], ...]:
        """What the driver raises when a session ends or a query is cancelled."""
        import asyncpg
        import psycopg2

        return {
            "psycopg": (psycopg.Error,),
            "psycopg2": (psycopg2.Error,),
            "asyncpg": (asyncpg.PostgresError, asyncpg.InterfaceError, OSError),
            "sqlite3": (sqlite3.Error,),
        }[self.kind]


def _run(conn: Any, text: str, params: tuple[Any, ...]) -> list[tuple[Any, ...]]:
    cursor = conn.cursor()
    try:
        cursor.execute(text, params) if params else cursor.execute(text)
        return [tuple(row) for row in cursor.fetchall()] if cursor.description else []
    finally:
        cursor.close()


class Api:
    """The public methods of a pool, all to be awaited. `raw` is the pool itself."""

    def __init__(self, kit: Kit, raw: Any) -> None:
        self.kit = kit
        self.raw = raw

    async def call(self, method: str, *args: Any, **named: Any) -> Any:
        function = getattr(self.raw, method)
        if self.kit.is_async:
            return await function(*args, **named)
        return await asyncio.to_thread(function, *args, **named)

    def start(self, method: str, *args: Any, **named: Any) -> asyncio.Task[Any]:
        """The same, on its way while the test goes on."""
        return asyncio.create_task(self.call(method, *args, **named))

    async def open(self) -> None:
        await self.call("open")

    async def wait_ready(self, timeout: float = 10.0) -> None:
        await self.call("wait_ready", timeout)

    async def acquire(self, timeout: float | None = None, **named: Any) -> Any:
        return await self.call("acquire", timeout, **named)

    async def release(self, conn: Any) -> None:
        await self.call("release", conn)

    async def drain(self, timeout: float = 10.0) -> Any:
        return await self.call("drain", timeout)

    async def resume(self) -> None:
        await self.call("resume")

    async def close(self, timeout: float = 5.0) -> Any:
        return await self.call("close", timeout)

    async def execute(self, sql: Any, params: Any = None, **named: Any) -> int:
        return int(await self.call("execute", sql, params, **named))

    async def fetch_all(self, sql: Any, params: Any = None, **named: Any) -> Any:
        return await self.call("fetch_all", sql, params, **named)

    async def fetch_one(self, sql: Any, params: Any = None, **named: Any) -> Any:
        return await self.call("fetch_one", sql, params, **named)

    async def fetch_value(self, sql: Any, params: Any = None, **named: Any) -> Any:
        return await self.call("fetch_value", sql, params, **named)

    def connection(self, timeout: float | None = None, **named: Any) -> Any:
        return self._block(self.raw.connection(timeout, **named))

    def transaction(self, timeout: float | None = None, **named: Any) -> Any:
        return self._block(self.raw.transaction(timeout, **named))

    @contextlib.asynccontextmanager
    async def _block(self, block: Any) -> AsyncIterator[Any]:
        if self.kit.is_async:
            async with block as conn:
                yield conn
            return
        conn = await asyncio.to_thread(block.__enter__)
        try:
            yield conn
        except BaseException as error:
            if not await asyncio.to_thread(block.__exit__, type(error), error, error.__traceback__):
                raise
        else:
            await asyncio.to_thread(block.__exit__, None, None, None)

    def stats(self) -> PoolStats:
        stats: PoolStats = self.raw.stats()
        return stats

    async def settled(self) -> PoolStats:
        """The figures once no work of the pool is under way."""
        await until(lambda: not _moving(self.stats()), "the pool's work to end")
        return self.stats()

    async def standing(self, number: int) -> None:
        """Once so many callers stand in line."""
        await until(lambda: self.stats().waiting == number, f"{number} waiting")


def _moving(stats: PoolStats) -> int:
    return stats.connecting + stats.checking + stats.resetting + stats.closing


def add_up(stats: PoolStats) -> None:
    """The figures of one moment agree with each other."""
    states = (stats.idle, stats.leased, stats.connecting, stats.checking, stats.resetting, stats.closing)
    assert stats.size == sum(states)
    never_opened = stats.closed.get("dial_failed", 0) + stats.closed.get("not_needed", 0)
    open_now = sum(stats.opened.values()) - (sum(stats.closed.values()) - never_opened)
    assert open_now == stats.size - stats.connecting - stats.closing
    assert stats.acquired == stats.hold.count + stats.leased == stats.wait.count
    assert sum(stats.connect.buckets) == sum(stats.opened.values())


@contextlib.contextmanager
def raises_clearly(kind: type[BaseException], *words: str, secret: str = "") -> Iterator[Any]:
    """`pytest.raises(kind)` whose message has all the words and nowhere the secret."""
    with pytest.raises(kind) as info:
        yield info
    error: BaseException | None = info.value
    missing = [word for word in words if word.lower() not in str(error).lower()]
    assert not missing, f"{missing} not in: {error}"
    while error is not None and secret:
        assert secret not in str(error) + repr(error)
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


async def notes(pool: Api) -> list[str]:
    """What is in the table `note`, as a new borrower sees it."""
    return sorted(row[0] for row in await pool.fetch_all("SELECT text FROM note"))


async def write(kit: Kit, conn: Any, text: str) -> None:
    await kit.sql(conn, f"INSERT INTO note (text) VALUES ('{text}')")
