"""What makes more connections slower, watched while they work: context switches, waits, the machine's CPU.

One more connection asks pg_stat_activity what our sessions wait for; /proc tells of their processes and of the
CPUs, where the server runs on this machine. It looks and never touches; what cannot be seen is None.
"""

import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from cenote.errors import TargetUnusable
from cenote.measure.target import CONNECT_TIMEOUT_S, Target, one_line

T = TypeVar("T")

_SAMPLE_EVERY_S = 0.05
_GONE_WITHIN_S = 3.0
_SESSIONS = """
SELECT pid, CASE WHEN state = 'active' THEN coalesce(wait_event_type, 'running') ELSE 'idle' END
FROM pg_stat_activity WHERE application_name = %s
"""
_TERMINATE = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = %s"


@dataclass(frozen=True, slots=True)
class Pressure:
    """What was seen in one round.

    waits: samples of our sessions by what they did: "running", "idle" (between statements), or the kind of wait
        event: "Lock", "LWLock", "IO", "Timeout" ...
    samples: how often was looked
    switches_per_s: context switches of the sessions' processes, wanted or not; None: not seen
    user_cpu, system_cpu: shares (0 to 1) of all CPUs of this machine, whoever used them; None: not seen
    """

    waits: Counter[str]
    samples: int
    switches_per_s: float | None
    user_cpu: float | None
    system_cpu: float | None


class Watch:
    """Watches the sessions of one application_name. Not for several threads."""

    def __init__(self, conn: Any, application: str, local: bool) -> None:
        self._conn = conn
        self._application = application
        self._local = local
        self._waits: Counter[str] = Counter()
        self._samples = 0
        self._pids: set[int] = set()
        self._before: tuple[float, dict[int, int] | None, tuple[int, int, int] | None] = (0.0, None, None)

    def ask(self, question: Callable[[Any], T]) -> T:
        """What `question` finds with the watch's own connection, between rounds.

        :raises TargetUnusable: the server has gone
        """
        import psycopg

        try:
            return question(self._conn)
        except psycopg.Error as error:
            raise TargetUnusable(f"the server went away in the middle: {one_line(error)}") from None

    def begin(self) -> None:
        """A round begins."""
        self._waits = Counter()
        self._samples = 0
        self._before = self._read()

    def look(self) -> float:
        """Take a sample; in how many seconds to take the next.

        :raises TargetUnusable: the server has gone
        """
        rows = self.ask(lambda conn: conn.execute(_SESSIONS, (self._application,)).fetchall())
        self._pids = {pid for pid, _ in rows}
        if self._before[1] == {}:  # the first round opens its connections after `begin`
            self._before = self._read()
        self._waits.update(what for _, what in rows)
        self._samples += 1
        return _SAMPLE_EVERY_S

    def end(self) -> Pressure:
        """The round has ended."""
        (began, switches, cpu), (ended, switches_now, cpu_now) = self._before, self._read()
        rate = user = system = None
        if switches and switches_now and ended > began:
            # Of those that were there before and after; one opened in between has no "before".
            both = switches.keys() & switches_now.keys()
            rate = sum(switches_now[pid] - switches[pid] for pid in both) / (ended - began)
        if cpu and cpu_now and (ticks := cpu_now[2] - cpu[2]) > 0:
            user, system = (cpu_now[0] - cpu[0]) / ticks, (cpu_now[1] - cpu[1]) / ticks
        return Pressure(self._waits, self._samples, rate, user, system)

    def _read(self) -> tuple[float, dict[int, int] | None, tuple[int, int, int] | None]:
        if not self._local:
            return time.monotonic(), None, None
        switches = {pid: count for pid in self._pids if (count := _switches(pid)) is not None}
        return time.monotonic(), switches, _cpu_ticks()


@contextmanager
def watch(target: Target, application: str) -> Iterator[Watch]:
    """A watch on one more connection of `target`.

    When the block ends no session of `application` is left on the server: one that does not go is terminated.

    :raises TargetUnusable: it cannot connect
    """
    import psycopg

    try:
        conn = psycopg.connect(
            target.dsn,
            autocommit=True,
            connect_timeout=CONNECT_TIMEOUT_S,
            application_name=f"{application} watch",
        )
    except psycopg.Error as error:
        raise TargetUnusable(f"cannot measure this server: {one_line(error)}") from None
    try:
        yield Watch(conn, application, target.server_pid is not None)
    finally:
        try:
            _see_them_off(conn, application)
        except psycopg.Error:
            pass  # the server has gone, and its sessions with it
        conn.close()


def _see_them_off(conn: Any, application: str) -> None:
    deadline = time.monotonic() + _GONE_WITHIN_S
    patience = time.monotonic() + _GONE_WITHIN_S / 3
    while conn.execute(_SESSIONS, (application,)).fetchall() and time.monotonic() < deadline:
        if time.monotonic() > patience:
            conn.execute(_TERMINATE, (application,))
        time.sleep(0.01)


def cores() -> int:
    """The CPUs this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _switches(pid: int) -> int | None:
    """voluntary_ctxt_switches and nonvoluntary_ctxt_switches of proc_pid_status(5)."""
    try:
        text = Path(f"/proc/{pid}/status").read_text(errors="replace")
    except OSError:
        return None
    if not text.startswith("Name:\tpostgres"):
        return None  # another process has this number here: the server is in another container
    return sum(int(line.split()[1]) for line in text.splitlines() if "ctxt_switches:" in line)


def _cpu_ticks() -> tuple[int, int, int] | None:
    """User, system and all ticks of all CPUs since boot (proc_stat(5)); stolen ones count as neither."""
    try:
        words = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    except OSError:
        return None
    user, nice, system, idle, iowait, irq, softirq, steal = map(int, words[:8])
    return user + nice, system + irq + softirq, user + nice + system + idle + iowait + irq + softirq + steal
