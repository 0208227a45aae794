"""How pools end that nobody closes: with the program, with their event loop, with the last reference."""

from __future__ import annotations

import asyncio
import gc
import socket
import subprocess
import sys
import textwrap
import threading
import weakref
from collections.abc import Iterator

import pytest

import cenote
from cenote import errors
from cenote.testing.postgres import wait_until
from pool_kit import raises_clearly

PROGRAMS = {
    "after use": "pool.fetch_value('SELECT 1')",
    "with idle connections": "pool.wait_ready()",
    "with a lease out": "conn = pool.acquire(); conn.cursor().execute('SELECT 1')",
    "while it dials a server that does not answer": "pool.open()",
    "before anything": "",
}


def run(program: str, *args: str) -> None:
    """Run it with warnings as errors: it must end by itself, well and without a word."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(program), *args],
        check=False,
        capture_output=True,
        text=True,
        timeout=20,  # far below any timeout of a pool or driver that it might wait for
    )
    assert (done.returncode, done.stderr, done.stdout) == (0, "", "")


@pytest.fixture
def silent_dsn() -> Iterator[str]:
    """A server that accepts and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"postgresql://app@127.0.0.1:{server.getsockname()[1]}/app"


@pytest.mark.parametrize("driver", ["psycopg", "psycopg2"])
@pytest.mark.parametrize("moment", PROGRAMS)
def test_a_program_may_end_without_closing_its_pool(dsn: str, silent_dsn: str, driver: str, moment: str) -> None:
    target = silent_dsn if "not answer" in moment else dsn
    run(
        f"""
        import sys, cenote
        pool = cenote.Pool(sys.argv[1], driver={driver!r}, min_size=2)
        {PROGRAMS[moment]}
        """,
        target,
    )


@pytest.mark.parametrize("driver", ["psycopg", "asyncpg"])
@pytest.mark.parametrize("moment", PROGRAMS)
def test_a_program_may_end_without_closing_its_async_pool(
    dsn: str, silent_dsn: str, driver: str, moment: str
) -> None:
    target = silent_dsn if "not answer" in moment else dsn
    statement = {
        "after use": "await pool.fetch_value('SELECT 1')",
        "with idle connections": "await pool.wait_ready()",
        "with a lease out": "global conn; conn = await pool.acquire(); await conn.execute('SELECT 1')",
        "while it dials a server that does not answer": "await pool.open(); await asyncio.sleep(0)",
        "before anything": "pass",
    }[moment]
    run(
        f"""
        import asyncio, sys, cenote
        pool = cenote.AsyncPool(sys.argv[1], driver={driver!r}, min_size=2)
        async def main():
            {statement}
        asyncio.run(main())
        """,
        target,
    )


def test_a_program_may_end_while_threads_wait_in_its_pool(dsn: str) -> None:
    run(
        """
        import sys, threading, cenote
        pool = cenote.Pool(sys.argv[1], max_size=1, acquire_timeout=600)
        held = pool.acquire()
        for _ in range(3):
            threading.Thread(target=pool.acquire, daemon=True).start()
        while pool.stats().waiting < 3:
            pass
        """,
        dsn,
    )


def cenote_threads(name: str) -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith(f"cenote-{name}")]


def test_a_forgotten_pool_goes_and_its_threads_and_sessions_with_it(dsn: str) -> None:
    pool = cenote.Pool(f"{dsn}?application_name=forgotten", name="forgotten", min_size=2)
    pool.wait_ready()
    gone = weakref.ref(pool)
    del pool
    gc.collect()
    wait_until(lambda: gone() is None)
    wait_until(lambda: not cenote_threads("forgotten"))
    with cenote.Pool(dsn) as other:
        count = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'forgotten'"
        wait_until(lambda: (gc.collect(), other.fetch_value(count))[1] == 0)


def test_a_closed_pool_leaves_no_thread(dsn: str) -> None:
    with cenote.Pool(dsn, name="short", min_size=4) as pool:
        pool.wait_ready()
    wait_until(lambda: not cenote_threads("short"))


def test_a_second_event_loop_is_told_to_make_a_pool_of_its_own(dsn: str) -> None:
    pool = cenote.AsyncPool(dsn, name="orders")

    async def use() -> None:
        assert await pool.fetch_value("SELECT 1") == 1

    async def first() -> None:
        await use()
        uses = [
            pool.acquire(),
            pool.fetch_value("SELECT 1"),
            pool.wait_ready(),
            pool.open(),
            pool.drain(1),
            pool.close(),
            pool.connection().__aenter__(),
        ]
        # While the first loop is alive: from another thread's.
        for use_ in uses:
            error = await asyncio.to_thread(_error_of, use_)
            assert isinstance(error, errors.WrongEventLoop), error
            for words in ('pool "orders"', "another", "one pool for each event loop", "[P3002]"):
                assert words in str(error)
        await use()
        await pool.close()

    asyncio.run(first())
    with raises_clearly(errors.WrongEventLoop, '"orders"', "closed"):
        asyncio.run(use())


def _error_of(work: object) -> BaseException | None:
    async def run() -> None:
        await work  # type: ignore[misc]

    try:
        asyncio.run(run())
    except BaseException as error:
        return error
    return None
