"""The contestants: each pool, and each bare driver, opened as its own documentation recommends.

What is timed are their own bound methods; where one needs a function of ours around it, that is said here.
This file refuses to tune anybody: sizes and timeouts are given to all alike, the rest is default.

psycopg2's `ThreadedConnectionPool` has no queue: it raises when it is empty. Where more callers come than it
has connections it gets what its users write, a semaphore in front of it. It has no `with` block either.
SQLAlchemy's `QueuePool` calls the driver's `rollback()` at every return, which sends nothing when no transaction
is open. `asyncpg.Pool` sends a reset query at every release: one round trip, by design.
"""

import operator
import threading
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

ACQUIRE_TIMEOUT_S = 30.0

CENOTE = "cenote.Pool, psycopg"
CENOTE_2 = "cenote.Pool, psycopg2"
PSYCOPG_POOL = "psycopg_pool"
QUEUE_POOL = "SQLAlchemy QueuePool"
PSYCOPG2_POOL = "psycopg2 ThreadedConnectionPool"
BARE_PSYCOPG = "bare psycopg"
BARE_PSYCOPG2 = "bare psycopg2"

CENOTE_ASYNCPG = "cenote.AsyncPool, asyncpg"
CENOTE_PSYCOPG = "cenote.AsyncPool, psycopg"
ASYNCPG_POOL = "asyncpg.Pool"
ASYNC_PSYCOPG_POOL = "psycopg_pool, asyncio"
BARE_ASYNCPG = "bare asyncpg"
BARE_ASYNC_PSYCOPG = "bare psycopg, asyncio"


@dataclass(frozen=True, slots=True)
class Sizes:
    """How many connections, and whether they are in autocommit (where that is a setting of the connection)."""

    min_size: int
    max_size: int
    autocommit: bool = False
    crowded: bool = False  # more callers than connections will come


@dataclass(slots=True)
class Threads:
    """A pool for threads, open and full. None: this contestant has no such thing."""

    acquire: Callable[[], Any] | None
    release: Callable[[Any], Any] | None
    connection: Callable[[], Any] | None  # a `with` block
    value: Callable[[str], Any]  # one statement, on its own
    close: Callable[[], Any]


@dataclass(slots=True)
class Tasks:
    """The same for asyncio."""

    acquire: Callable[[], Awaitable[Any]] | None
    release: Callable[[Any], Awaitable[Any]] | None
    connection: Callable[[], Any] | None
    value: Callable[[str], Awaitable[Any]]
    close: Callable[[], Awaitable[Any]]


# -- for threads -----------------------------------------------------------------------------------------------


def cenote_pool(dsn: str, sizes: Sizes) -> Threads:
    return _cenote_pool(dsn, sizes, "psycopg")


def cenote_pool_psycopg2(dsn: str, sizes: Sizes) -> Threads:
    return _cenote_pool(dsn, sizes, "psycopg2")


def _cenote_pool(dsn: str, sizes: Sizes, driver: str) -> Threads:
    import cenote

    pool = cenote.Pool(
        dsn,
        driver=driver,
        min_size=sizes.min_size,
        max_size=sizes.max_size,
        acquire_timeout=ACQUIRE_TIMEOUT_S,
    )
    pool.wait_ready()
    return Threads(pool.acquire, pool.release, pool.connection, pool.fetch_value, pool.close)


def psycopg_pool(dsn: str, sizes: Sizes) -> Threads:
    from psycopg_pool import ConnectionPool

    pool = ConnectionPool(
        dsn,
        min_size=sizes.min_size,
        max_size=sizes.max_size,
        timeout=ACQUIRE_TIMEOUT_S,
        kwargs={"autocommit": True} if sizes.autocommit else None,
        open=True,
    )
    pool.wait()

    def value(sql: str) -> Any:
        with pool.connection() as conn:
            return _ask_psycopg(conn, sql)

    return Threads(pool.getconn, pool.putconn, pool.connection, value, pool.close)


def queue_pool(dsn: str, sizes: Sizes) -> Threads:
    import sqlalchemy

    engine = sqlalchemy.create_engine(
        dsn.replace("postgresql://", "postgresql+psycopg://"),
        pool_size=sizes.min_size,
        max_overflow=sizes.max_size - sizes.min_size,
        pool_timeout=ACQUIRE_TIMEOUT_S,
        **({"isolation_level": "AUTOCOMMIT"} if sizes.autocommit else {}),
    )
    # It opens connections when they are asked for; the others begin with theirs open.
    held = [engine.raw_connection() for _ in range(sizes.min_size)]
    for conn in held:
        conn.close()

    def value(sql: str) -> Any:
        with engine.connect() as conn:
            return conn.exec_driver_sql(sql).scalar()

    return Threads(
        engine.raw_connection,
        operator.methodcaller("close"),
        engine.connect,
        value,
        engine.dispose,
    )


def psycopg2_pool(dsn: str, sizes: Sizes) -> Threads:
    import psycopg2
    from psycopg2.pool import ThreadedConnectionPool

    pool = ThreadedConnectionPool(sizes.min_size, sizes.max_size, dsn)
    if sizes.autocommit:
        held = [pool.getconn() for _ in range(sizes.min_size)]
        for conn in held:
            conn.autocommit = True
            pool.putconn(conn)
    places = threading.BoundedSemaphore(sizes.max_size)
    acquire: Callable[[], Any] = pool.getconn
    release: Callable[[Any], Any] = pool.putconn

    def acquire_in_turn() -> Any:
        places.acquire()
        try:
            return pool.getconn()
        except BaseException:
            places.release()
            raise

    def release_in_turn(conn: Any) -> None:
        try:
            pool.putconn(conn)
        finally:
            places.release()

    if sizes.crowded:
        acquire, release = acquire_in_turn, release_in_turn

    def value(sql: str) -> Any:
        conn = acquire()
        try:
            return _ask_psycopg2(conn, sql)
        finally:
            release(conn)

    def close() -> None:
        with suppress(psycopg2.Error):  # it stops at the first connection that is closed already
            pool.closeall()

    return Threads(acquire, release, None, value, close)


def bare_psycopg(dsn: str, sizes: Sizes) -> Threads:
    import psycopg

    conn = psycopg.connect(dsn, autocommit=True)
    return Threads(None, None, None, lambda sql: _ask_psycopg(conn, sql), conn.close)


def bare_psycopg2(dsn: str, sizes: Sizes) -> Threads:
    import psycopg2

    conn = psycopg2.connect(dsn)
    conn.autocommit = True
    return Threads(None, None, None, lambda sql: _ask_psycopg2(conn, sql), conn.close)


def _ask_psycopg(conn: Any, sql: str) -> Any:
    return conn.execute(sql).fetchone()[0]


def _ask_psycopg2(conn: Any, sql: str) -> Any:
    cursor = conn.cursor()
    cursor.execute(sql)
    return cursor.fetchone()[0]


# -- for asyncio -----------------------------------------------------------------------------------------------


async def cenote_asyncpg(dsn: str, sizes: Sizes) -> Tasks:
    return await _cenote_async(dsn, sizes, "asyncpg")


async def cenote_psycopg(dsn: str, sizes: Sizes) -> Tasks:
    return await _cenote_async(dsn, sizes, "psycopg")


async def _cenote_async(dsn: str, sizes: Sizes, driver: str) -> Tasks:
    import cenote

    pool = cenote.AsyncPool(
        dsn,
        driver=driver,
        min_size=sizes.min_size,
        max_size=sizes.max_size,
        acquire_timeout=ACQUIRE_TIMEOUT_S,
    )
    await pool.wait_ready()
    return Tasks(pool.acquire, pool.release, pool.connection, pool.fetch_value, pool.close)


async def asyncpg_pool(dsn: str, sizes: Sizes) -> Tasks:
    import asyncpg

    pool = await asyncpg.create_pool(dsn, min_size=sizes.min_size, max_size=sizes.max_size)
    return Tasks(pool.acquire, pool.release, pool.acquire, pool.fetchval, pool.close)


async def async_psycopg_pool(dsn: str, sizes: Sizes) -> Tasks:
    from psycopg_pool import AsyncConnectionPool

    pool = AsyncConnectionPool(
        dsn,
        min_size=sizes.min_size,
        max_size=sizes.max_size,
        timeout=ACQUIRE_TIMEOUT_S,
        kwargs={"autocommit": True} if sizes.autocommit else None,
        open=False,
    )
    await pool.open(wait=True)

    async def value(sql: str) -> Any:
        async with pool.connection() as conn:
            return await _ask_async_psycopg(conn, sql)

    return Tasks(pool.getconn, pool.putconn, pool.connection, value, pool.close)


async def bare_asyncpg(dsn: str, sizes: Sizes) -> Tasks:
    import asyncpg

    conn = await asyncpg.connect(dsn)
    return Tasks(None, None, None, conn.fetchval, conn.close)


async def bare_async_psycopg(dsn: str, sizes: Sizes) -> Tasks:
    import psycopg

    conn = await psycopg.AsyncConnection.connect(dsn, autocommit=True)

    async def value(sql: str) -> Any:
        return await _ask_async_psycopg(conn, sql)

    return Tasks(None, None, None, value, conn.close)


async def _ask_async_psycopg(conn: Any, sql: str) -> Any:
    cursor = await conn.execute(sql)
    return (await cursor.fetchone())[0]


Opener = Callable[[str, Sizes], Threads]
AsyncOpener = Callable[[str, Sizes], Awaitable[Tasks]]

THREADS: dict[str, Opener] = {
    CENOTE: cenote_pool,
    PSYCOPG_POOL: psycopg_pool,
    QUEUE_POOL: queue_pool,
    CENOTE_2: cenote_pool_psycopg2,
    PSYCOPG2_POOL: psycopg2_pool,
    BARE_PSYCOPG: bare_psycopg,
    BARE_PSYCOPG2: bare_psycopg2,
}
TASKS: dict[str, AsyncOpener] = {
    CENOTE_ASYNCPG: cenote_asyncpg,
    ASYNCPG_POOL: asyncpg_pool,
    CENOTE_PSYCOPG: cenote_psycopg,
    ASYNC_PSYCOPG_POOL: async_psycopg_pool,
    BARE_ASYNCPG: bare_asyncpg,
    BARE_ASYNC_PSYCOPG: bare_async_psycopg,
}

POOLS = (CENOTE, PSYCOPG_POOL, QUEUE_POOL, CENOTE_2, PSYCOPG2_POOL)
ASYNC_POOLS = (CENOTE_ASYNCPG, ASYNCPG_POOL, CENOTE_PSYCOPG, ASYNC_PSYCOPG_POOL)
