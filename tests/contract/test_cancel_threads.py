"""A thread that is interrupted inside a Pool loses no connection, wherever the interrupt arrives.

CPython delivers an asynchronous exception (Ctrl-C, `PyThreadState_SetAsyncExc`) when a Python function is
entered and when a C function returns to Python. A profile function sees exactly these moments, so each test
repeats a scenario and raises at the first, the second, the third ... of them inside the pool's shell, until
one run has no such moment left. Not looked at: interrupts inside the machine, which is C in releases and
cannot be interrupted there. Only in the pure build can the moments inside the desk be seen.
"""

import ctypes
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import cenote
from cenote._build import is_compiled
from cenote.testing import ScriptedDriver
from cenote.testing.postgres import wait_until

POOL = str(Path(cenote.__file__).parent / "pool")
CORE = str(Path(cenote.__file__).parent / "core")
INSIDE = ("sync.py", "desk.py", "base.py", "link.py")

pytestmark = [
    pytest.mark.skipif(is_compiled(), reason="compiled code has no frames in which an interrupt could be placed"),
    # An interrupted borrower may drop its connection, which the pool finds and reports.
    pytest.mark.filterwarnings("ignore::cenote.LeakWarning"),
]


class Interrupt(BaseException):
    """Stands for KeyboardInterrupt."""


def _inside(frame: FrameType | None) -> bool:
    if frame is None:
        return False
    path = Path(frame.f_code.co_filename)
    return str(path.parent) == POOL and path.name in INSIDE


def _interrupted(work: Callable[[], None], moment: int) -> bool:
    """Run `work` and raise at the given moment inside the pool; False if there were fewer."""
    left = moment

    def profile(frame: FrameType, event: str, arg: Any) -> None:
        nonlocal left
        if event == "call":
            # Of a function of the machine only the entry: nothing has moved yet.
            here = _inside(frame) or (frame.f_code.co_filename.startswith(CORE) and _inside(frame.f_back))
        else:
            here = event == "c_return" and _inside(frame) and arg is not sys.setprofile
        if here:
            left -= 1
            if left == -1:
                raise Interrupt(f"{event} in {frame.f_code.co_qualname}, line {frame.f_lineno}")

    sys.setprofile(profile)
    try:
        work()
    except Interrupt:
        pass
    finally:
        sys.setprofile(None)
    return left < 0


def _every_moment(make: Callable[[int], Callable[[], None]], check: Callable[[], None]) -> int:
    """Interrupt what `make` gives at each moment in turn and check after each; how many there were."""
    moment = 0
    while _interrupted(make(moment), moment):
        try:
            check()
        except BaseException as error:
            raise AssertionError(f"interrupted at moment {moment}: {error}") from error
        moment += 1
    check()
    print(f"\n{moment} moments")
    return moment


def _pool(driver: ScriptedDriver, **options: Any) -> cenote.Pool:
    pool = cenote.Pool(driver=driver, **({"min_size": 1, "max_size": 1, "name": "interrupted"} | options))
    pool.wait_ready(10)
    return pool


def _all_is_well(pool: cenote.Pool, driver: ScriptedDriver) -> None:
    """Nothing is lost: at once, or as soon as the keeper has found what was dropped."""
    wait_until(
        lambda: pool.stats().leased == 0 and pool.stats().waiting == 0, timeout=10, what=f"the leases of {pool}"
    )
    conn = pool.acquire(10)
    assert conn.execute("select", "mark") == "mark"
    pool.release(conn)
    wait_until(
        lambda: pool.stats().resetting == 0 and pool.stats().closing == 0, what=f"the cleaning up of {pool}"
    )
    with pool._lock:
        pool._machine.check()
    assert driver.server.most <= 1
    driver.server.assert_honest()


def test_an_interrupt_anywhere_in_acquire_and_release_loses_nothing() -> None:
    driver = ScriptedDriver()
    with _pool(driver) as pool:

        def work() -> None:
            pool.release(pool.acquire())

        assert _every_moment(lambda _: work, lambda: _all_is_well(pool, driver)) > 5


@pytest.mark.parametrize("how", ["connection", "transaction", "fetch_value", "checked", "timeout"])
def test_an_interrupt_anywhere_in_a_block_loses_nothing(how: str) -> None:
    driver = ScriptedDriver()
    with _pool(driver, check_after=0 if how == "checked" else 30) as pool:

        def work() -> None:
            if how == "fetch_value":
                assert pool.fetch_value("select", 1) == 1
                return
            block = (
                pool.transaction() if how == "transaction" else pool.connection(5 if how == "timeout" else None)
            )
            with block as conn:
                conn.execute("select 1")

        assert _every_moment(lambda _: work, lambda: _all_is_well(pool, driver)) > 5


def test_an_interrupt_anywhere_in_a_block_that_touched_its_session_loses_nothing() -> None:
    driver = ScriptedDriver()
    pool = _pool(driver)  # not closed: close() would wait for the slot that is lost

    def work() -> None:
        with pool.connection() as conn:
            conn.execute("SET search_path = elsewhere")

    def check() -> None:
        wait_until(lambda: pool.stats().idle == 1 or pool.stats().size == 0, timeout=10)
        _all_is_well(pool, driver)

    assert _every_moment(lambda _: work, check) > 10


@pytest.mark.parametrize("how", ["equal", "other"])
def test_an_interrupt_anywhere_in_a_lease_with_settings_loses_nothing_and_leaves_none(how: str) -> None:
    driver = ScriptedDriver()
    pool = _pool(driver)

    def make(moment: int) -> Callable[[], None]:
        if how == "equal":
            pool.release(pool.acquire(2, settings={"app.tenant": "a"}))

        def work() -> None:
            with pool.connection(settings={"app.tenant": "a"}) as conn:
                assert "'app.tenant','a'" in conn.conversions[-1]
                conn.execute("select 1")

        return work

    def check() -> None:
        wait_until(lambda: pool.stats().idle == 1 or pool.stats().size == 0, timeout=10)
        with pool.connection() as conn:
            assert not conn.conversions or "'app.tenant',NULL" in conn.conversions[-1]
        _all_is_well(pool, driver)

    assert _every_moment(make, check) > 10
    pool.close()


def test_an_interrupt_anywhere_while_in_line_loses_neither_place_nor_grant() -> None:
    driver = ScriptedDriver()
    with _pool(driver) as pool:

        def make(_: int) -> Callable[[], None]:
            conn = pool.acquire(10)

            def give_back() -> None:
                # As soon as the other one stands in line, so that the grant comes while it waits.
                wait_until(lambda: pool.stats().waiting or done.is_set())
                pool.release(conn)

            done = threading.Event()
            threading.Thread(target=give_back, daemon=True).start()

            def work() -> None:
                try:
                    pool.release(pool.acquire(10))
                finally:
                    done.set()

            return work

        assert _every_moment(make, lambda: _all_is_well(pool, driver)) > 10


def test_an_interrupt_anywhere_in_a_refused_acquire_leaves_no_waiter() -> None:
    driver = ScriptedDriver()
    with _pool(driver) as pool:
        conn = pool.acquire()

        def work() -> None:
            with pytest.raises(cenote.AcquireTimeout):
                pool.acquire(0)

        def check() -> None:
            assert pool.stats().waiting == 0
            assert pool.stats().leased == 1

        assert _every_moment(lambda _: work, check) > 5
        pool.release(conn)
        _all_is_well(pool, driver)


def test_an_asynchronous_exception_in_a_waiting_thread_leaves_the_line() -> None:
    driver = ScriptedDriver()
    with _pool(driver) as pool:
        conn = pool.acquire()
        ended = threading.Event()
        caught: list[BaseException] = []

        def wait() -> None:
            try:
                pool.release(pool.acquire(10))
            except Interrupt as error:
                caught.append(error)
            finally:
                ended.set()

        thread = threading.Thread(target=wait)
        thread.start()
        wait_until(lambda: pool.stats().waiting == 1)
        assert thread.ident is not None
        # It is delivered when the lock that the thread sleeps on lets go: the grant and the exception together.
        assert (
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(Interrupt))
            == 1
        )
        pool.release(conn)
        assert ended.wait(10)
        thread.join(10)
        assert len(caught) == 1
        _all_is_well(pool, driver)
