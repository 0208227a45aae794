"""The threads that do a pool's slow work lose none of it."""

from __future__ import annotations

import threading

from cenote.pool.workers import Workers


def test_work_that_comes_after_stop_is_done_all_the_same() -> None:
    """A lease that comes back to a closed pool must still be closed, however the worker threads end just then."""
    for _ in range(300):
        workers = Workers("late", 2)
        early, late = threading.Event(), threading.Event()
        workers.submit(lambda _, event: event.set(), None, early)
        assert early.wait(10)
        workers.stop()
        workers.submit(lambda _, event: event.set(), None, late)
        assert late.wait(10)


def test_work_that_was_queued_before_stop_is_done() -> None:
    for _ in range(50):
        workers = Workers("queued", 2)
        go_on, done = threading.Event(), threading.Semaphore(0)
        for _ in range(2):
            workers.submit(lambda _, event: event.wait(10), None, go_on)
        for _ in range(10):
            workers.submit(lambda _, end: end.release(), None, done)
        workers.stop()
        go_on.set()
        assert all(done.acquire(timeout=10) for _ in range(10))
