"""Daemon threads that do a pool's slow work: dial, check, reset, close.

Started when there is work and nobody free, ended after a while without any. Not a
`concurrent.futures` executor: that joins its threads when the program ends, and a program must be able to
end while a server does not answer.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import Any

logger = logging.getLogger("cenote.pool")

LINGER_S = 5.0


class Workers:
    """Up to `most` threads named after the pool."""

    def __init__(self, name: str, most: int) -> None:
        self._name = name
        self._most = most
        self._tasks: SimpleQueue[tuple[Callable[[Any, Any], None], Any, Any] | None] = SimpleQueue()
        self._lock = threading.Lock()
        self._threads = 0
        self._free = 0
        self._linger_s = LINGER_S
        self._stopped = False

    def submit(self, work: Callable[[Any, Any], None], owner: Any, subject: Any) -> None:
        """Run `work(owner, subject)` on a thread, soon. `work` handles its own errors.

        Nothing is allocated inside the lock that the garbage collector follows: what it finalizes there may come
        back here. Where no thread can be started the task stays in line for the next one that can.
        """
        task = (work, owner, subject)
        with self._lock:
            # Those in the queue of a stopped one are told to end: one of them might take this for another's.
            alone = self._stopped
            # Tasks in the queue have each claimed a free thread; only an unclaimed one need not be started.
            if not alone:
                self._free -= 1
            start = alone or (self._free < 0 and self._threads < self._most)
            if not alone:
                if start:
                    self._threads += 1
                    self._free += 1
                # Inside the lock: a thread about to end looks here whether it may.
                self._tasks.put(task)
        if start:
            self._start(self._do if alone else self._run, task if alone else ())

    def _start(self, run: Callable[..., None], args: tuple[Any, ...]) -> None:
        try:
            threading.Thread(target=run, args=args, name=f"cenote-{self._name}-worker", daemon=True).start()
        except RuntimeError as error:  # the system has no thread for us, or the interpreter is ending
            logger.warning('pool "%s": cannot start a worker: %s', self._name, error)
            if args:
                run(*args)
                return
            with self._lock:
                self._threads -= 1
                self._free -= 1

    def catch_up(self) -> None:
        """Try again to start a thread if tasks are in line and none is there."""
        with self._lock:
            start = not self._threads and not self._tasks.empty()
            if start:
                self._threads += 1
                self._free += 1
        if start:
            self._start(self._run, ())

    def stop(self) -> None:
        """Let the threads end once what is queued is done. Does not wait; a late task still gets a thread."""
        with self._lock:
            self._linger_s = 0.0
            self._stopped = True
            for _ in range(self._threads):
                self._tasks.put(None)

    def abandon(self) -> None:
        """The same, for the collector, which may have interrupted whoever holds the lock: takes none."""
        for _ in range(self._most):
            self._tasks.put(None)

    def _run(self) -> None:
        while True:
            try:
                task = self._tasks.get(timeout=self._linger_s)
            except Empty:
                with self._lock:
                    if not self._tasks.empty():
                        continue
                    self._threads -= 1
                    self._free -= 1
                    return
            if task is None:
                with self._lock:
                    self._threads -= 1
                    self._free -= 1
                return
            try:
                self._do(*task)
            finally:
                # A thread that waits for its next task must not keep the pool alive.
                del task
                with self._lock:
                    self._free += 1

    def _do(self, work: Callable[[Any, Any], None], owner: Any, subject: Any) -> None:
        try:
            work(owner, subject)
        except BaseException:
            logger.exception('pool "%s": a background task failed', self._name)
