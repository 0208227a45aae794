"""A pool opened before fork(): the child gets one of its own, the parent's sessions never notice.

Each test is a program, because a test runner is nothing to fork.
"""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest

COMMON = """
import asyncio, gc, os, signal, sys, threading, traceback
import cenote

DSN, DRIVER = sys.argv[1:3]

def child(body):
    pid = os.fork()
    if pid:
        return pid
    signal.alarm(20)
    code = 70
    try:
        body()
        gc.collect()
        code = 0
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        gc.collect()
        sys.stderr.flush()
        os._exit(code)

def ended_well(*pids):
    for pid in pids:
        _, status = os.waitpid(pid, 0)
        assert os.waitstatus_to_exitcode(status) == 0, f"a child ended with {status}"

def backends(pool, number):
    with_all = [pool.acquire() for _ in range(number)]
    pids = sorted(conn.info.backend_pid for conn in with_all)
    for c in with_all:
        c.rollback()
        pool.release(c)
    return pids

"""


def run(script: str, dsn: str, driver: str) -> None:
    program = COMMON + textwrap.dedent(script)
    done = subprocess.run(
        # Threads and fork in one process are what this is about; later Pythons warn of it.
        [sys.executable, "-W", "error", "-W", "ignore::DeprecationWarning", "-c", program, dsn, driver],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONFAULTHANDLER": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert done.stdout == "fine\n"


SYNC = pytest.mark.parametrize("driver", ["psycopg", "psycopg2"])
ASYNC = pytest.mark.parametrize("driver", ["psycopg", "asyncpg"])


@SYNC
def test_children_of_a_preloaded_parent_have_connections_of_their_own(dsn: str, driver: str) -> None:
    """As a web server does that loads the application, then forks its workers."""
    run(
        """
        pool = cenote.Pool(DSN, driver=DRIVER, min_size=2, max_size=4)
        pool.wait_ready()
        mine = backends(pool, 2)

        def worker():
            assert pool.stats().size == 0
            theirs = backends(pool, 2)
            assert not set(theirs) & set(mine), (theirs, mine)
            assert pool.fetch_value("SELECT 1") == 1
            if os.getpid() % 2:
                pool.close()

        ended_well(*[child(worker) for _ in range(4)])
        assert backends(pool, 2) == mine, "the parent's sessions are gone"
        stats = pool.stats()
        assert (stats.size, stats.closed, stats.epoch) == (2, {}, 0), stats
        pool.close()
        print("fine")
        """,
        dsn,
        driver,
    )


@SYNC
def test_a_fork_while_leases_are_out_leaves_the_parents_transaction_alone(dsn: str, driver: str) -> None:
    run(
        """
        pool = cenote.Pool(DSN, driver=DRIVER, min_size=2, max_size=2)
        with pool.connection() as conn:
            cursor = conn.cursor()
            cursor.execute("SELECT pg_current_xact_id()::text")
            before = cursor.fetchone()

            def worker():
                assert pool.stats().leased == 0
                assert pool.fetch_value("SELECT 1") == 1

            ended_well(*[child(worker) for _ in range(2)])
            cursor.execute("SELECT pg_current_xact_id()::text")
            assert cursor.fetchone() == before, "another transaction"
        pool.close()
        print("fine")
        """,
        dsn,
        driver,
    )


@SYNC
@pytest.mark.parametrize("block", ["connection", "transaction"])
def test_a_child_that_leaves_the_block_it_was_forked_in_does_so_quietly(dsn: str, driver: str, block: str) -> None:
    """It inherits the stack, and so the end of every `with` block on it."""
    run(
        f"""
        pool = cenote.Pool(DSN, driver=DRIVER, min_size=1, max_size=2)
        with pool.{block}() as conn:
            conn.cursor().execute("SELECT 1")
            pid = os.fork()
            if not pid:
                signal.alarm(20)
                sys.exit(0)
            ended_well(pid)
            conn.cursor().execute("SELECT 1")
        assert pool.stats().leased == 0
        pool.close()
        print("fine")
        """,
        dsn,
        driver,
    )


@SYNC
def test_a_fork_while_other_threads_use_the_pool_does_not_hang(dsn: str, driver: str) -> None:
    run(
        """
        pool = cenote.Pool(DSN, driver=DRIVER, min_size=2, max_size=3)
        over = threading.Event()
        failures = []

        def user():
            try:
                while not over.is_set():
                    assert pool.fetch_value("SELECT 1") == 1
            except BaseException as error:
                failures.append(error)

        users = [threading.Thread(target=user, daemon=True) for _ in range(4)]
        for each in users:
            each.start()

        def worker():
            assert pool.fetch_value("SELECT 1", timeout=15) == 1

        for _ in range(5):
            ended_well(child(worker))
        over.set()
        for each in users:
            each.join()
        assert failures == [], failures
        assert pool.stats().epoch == 0
        pool.close()
        print("fine")
        """,
        dsn,
        driver,
    )


@ASYNC
def test_an_async_pool_works_in_a_child_on_a_loop_of_its_own(dsn: str, driver: str) -> None:
    run(
        """
        async def pids(pool):
            conns = [await pool.acquire() for _ in range(2)]
            found = sorted(c.get_server_pid() if DRIVER == "asyncpg" else c.info.backend_pid for c in conns)
            for c in conns:
                await pool.release(c)
            return found

        pool = cenote.AsyncPool(DSN, driver=DRIVER, min_size=2, max_size=2)

        async def parent():
            await pool.wait_ready()
            mine = await pids(pool)

            def worker():
                async def use():
                    theirs = await pids(pool)
                    assert not set(theirs) & set(mine)
                    assert await pool.fetch_value("SELECT 1") == 1
                    await pool.close()
                asyncio.run(use())

            ended_well(*[child(worker) for _ in range(3)])
            assert await pids(pool) == mine
            assert await pool.fetch_value("SELECT 1") == 1
            assert pool.stats().closed == {}
            await pool.close()

        asyncio.run(parent())
        print("fine")
        """,
        dsn,
        driver,
    )


@ASYNC
def test_an_async_fork_while_a_lease_is_out_leaves_its_transaction_alone(dsn: str, driver: str) -> None:
    run(
        """
        pool = cenote.AsyncPool(DSN, driver=DRIVER, min_size=1, max_size=2)

        async def xid(conn):
            sql = "SELECT pg_current_xact_id()::text"
            if DRIVER == "asyncpg":
                return await conn.fetchval(sql)
            return (await (await conn.execute(sql)).fetchone())[0]

        async def parent():
            async with pool.transaction() as conn:
                before = await xid(conn)

                def worker():
                    async def use():
                        assert await pool.fetch_value("SELECT 1") == 1
                    asyncio.run(use())

                ended_well(*[child(worker) for _ in range(2)])
                assert await xid(conn) == before
            await pool.close()

        asyncio.run(parent())
        print("fine")
        """,
        dsn,
        driver,
    )


@SYNC
def test_a_closed_pool_is_closed_in_the_child_too(dsn: str, driver: str) -> None:
    run(
        """
        pool = cenote.Pool(DSN, driver=DRIVER)
        pool.fetch_value("SELECT 1")
        pool.close()

        def worker():
            try:
                pool.acquire()
            except cenote.PoolClosed:
                return
            raise AssertionError("it came back to life")

        ended_well(child(worker))
        print("fine")
        """,
        dsn,
        driver,
    )
