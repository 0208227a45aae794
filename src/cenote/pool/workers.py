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
        """Run `work(owner, subject)` on a thread, soon. `work` handles its own errors."""
        with self._lock:
            if self._stopped:
                # Those in the queue are told to end: one of them might take this for another's.
                threading.Thread(
                    target=self._do, args=(work, owner, subject), name=f"cenote-{self._name}-worker", daemon=True
                ).start()
                return
            # Tasks in the queue have each claimed a free thread; only an unclaimed one need not be started.
            self._free -= 1
            start = self._free < 0 and self._threads < self._most
            if start:
                self._threads += 1
                self._free += 1
            # Inside the lock: a thread about to end looks here whether it may.
            self._tasks.put((work, owner, subject))
        if start:
            threading.Thread(target=self._run, name=f"cenote-{self._name}-worker", daemon=True).start()

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
            self._do(*task)
            # A thread that waits for its next task must not keep the pool alive.
            del task
            with self._lock:
                self._free += 1

    def _do(self, work: Callable[[Any, Any], None], owner: Any, subject: Any) -> None:
        try:
            work(owner, subject)
        except Exception:
            logger.exception('pool "%s": a background task failed', self._name)
