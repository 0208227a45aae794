"""The scripted driver does what it was told, and its server sees what a pool did wrong."""

import asyncio
import threading

import pytest

import cenote
from cenote.pool.drivers.base import BROKEN, BUSY, IDLE, IN_TRANSACTION
from cenote.testing import AsyncScriptedDriver, ScriptedDriver, ScriptedError, ScriptedServer, VirtualClock, run


def test_every_statement_is_answered_with_its_mark() -> None:
    driver = ScriptedDriver()
    conn = driver.connect(1)
    assert conn.execute("select", "mark") == "mark"
    assert conn.execute("select 1") == "select 1"
    assert driver.fetch_all(conn, "select", 1) == [(1,)]
    assert [call.operation for call in driver.calls] == ["connect", "query", "query", "query"]


def test_outcomes_are_taken_in_order_and_then_the_standing_one() -> None:
    driver = ScriptedDriver()
    driver.always("connect", error=ScriptedError("standing"))
    driver.next("connect", error=ScriptedError("first"))
    driver.next("connect")
    with pytest.raises(ScriptedError, match="first"):
        driver.connect(1)
    driver.connect(1)
    with pytest.raises(ScriptedError, match="standing"):
        driver.connect(1)


def test_an_operation_that_does_not_exist_cannot_be_scripted() -> None:
    with pytest.raises(ValueError, match="use one of connect, ping"):
        ScriptedDriver().next("conect")


def test_a_delay_of_the_blocking_driver_moves_the_virtual_clock_up_to_the_timeout() -> None:
    clock = VirtualClock()
    driver = ScriptedDriver(clock=clock)
    driver.next("connect", delay=3)
    driver.next("connect", delay=30)
    driver.connect(10)
    assert clock.now == 1003
    with pytest.raises(TimeoutError):
        driver.connect(10)
    assert clock.now == 1013
    with pytest.raises(ValueError, match="virtual clock"):
        refuses = ScriptedDriver()
        refuses.next("connect", delay=1)
        refuses.connect(1)


def test_a_held_operation_waits_for_its_release_and_says_that_it_was_reached() -> None:
    driver = ScriptedDriver()
    hold = driver.hold("connect")
    got: list[object] = []
    thread = threading.Thread(target=lambda: got.append(driver.connect(10)))
    thread.start()
    hold.wait_reached()
    assert not got
    hold.release()
    thread.join(10)
    assert len(got) == 1


@pytest.mark.parametrize(("end", "sqlstate"), [("cancel", "57014"), ("cut", "")])
def test_a_query_that_hangs_ends_when_it_is_cancelled_or_cut(end: str, sqlstate: str) -> None:
    driver = ScriptedDriver()
    conn = driver.connect(1)
    hold = driver.hold("query")
    caught: list[str] = []

    def ask() -> None:
        with pytest.raises(ScriptedError) as error:
            conn.execute("select pg_sleep(3600)")
        caught.append(error.value.sqlstate)

    thread = threading.Thread(target=ask)
    thread.start()
    hold.wait_reached()
    getattr(driver, end)(conn)
    thread.join(10)
    assert caught == [sqlstate]


def test_a_cancelled_query_leaves_its_answer_for_whoever_asks_next_and_the_server_sees_it() -> None:
    async def main() -> ScriptedServer:
        driver = AsyncScriptedDriver()
        conn = await driver.connect(1)
        driver.next("query", delay=1)
        first = asyncio.create_task(conn.execute("select", "first"))
        await asyncio.sleep(0.5)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        assert conn.condition() == BUSY
        assert await conn.execute("select", "second") == "first"
        return driver.server

    server = run(main())
    assert server.misdelivered == [(1, "second", "first")]
    with pytest.raises(AssertionError, match="wrong borrower"):
        server.assert_honest()


def test_session_state_left_behind_is_seen_when_the_next_borrower_uses_the_connection() -> None:
    driver = ScriptedDriver()
    with cenote.Pool(driver=driver, min_size=1, max_size=1, reset="never") as pool:
        with pool.connection() as conn:
            conn.execute("SET search_path = tenant_1")
        with pool.connection() as conn:
            conn.execute("select", "mine")
    with pytest.raises(AssertionError, match="session state"):
        driver.server.assert_honest()


def test_conditions_follow_what_happened_to_the_connection() -> None:
    driver = ScriptedDriver()
    conn = driver.connect(1)
    assert conn.condition() == IDLE
    driver.begin(conn)
    assert conn.condition() == IN_TRANSACTION
    driver.rollback(conn)
    assert driver.peek(conn) is None
    driver.server.restart()
    assert driver.peek(conn) == "57P01"
    assert conn.condition() == IDLE  # as with a real driver: nobody has looked yet
    with pytest.raises(ScriptedError) as caught:
        conn.execute("select 1")
    assert caught.value.sqlstate == "57P01"
    assert conn.condition() == BROKEN
    assert not driver.server.sessions
