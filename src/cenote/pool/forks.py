"""Keeps a fork and a dial apart.

OpenSSL takes locks of its own while a connection authenticates. A fork at that moment copies them held, by a
thread that the child does not have, and every later dial of the child hangs. So a fork waits for the dials of
this process's pools that are under way, and no dial begins during a fork. It waits a moment only: a dial that
hangs must not hang the fork.
"""

from __future__ import annotations

import os
import threading

WAIT_S = 1.0


class Dials:
    """A context manager around each dial, and the hooks around a fork."""

    def __init__(self) -> None:
        self._renew()
        os.register_at_fork(before=self._before, after_in_parent=self._after, after_in_child=self._renew)

    def _renew(self) -> None:
        self._idle = threading.Condition(threading.Lock())
        self._under_way = 0

    def __enter__(self) -> None:
        with self._idle:
            self._under_way += 1

    def __exit__(self, *error: object) -> None:
        with self._idle:
            self._under_way -= 1
            self._idle.notify_all()

    def _before(self) -> None:
        self._idle.acquire()  # held until after the fork: no dial begins
        self._idle.wait_for(lambda: not self._under_way, WAIT_S)

    def _after(self) -> None:
        self._idle.release()


dials = Dials()
