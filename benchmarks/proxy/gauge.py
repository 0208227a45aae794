"""What a process has used: processor time and memory, read from outside, and where it may run.

Linux only. It refuses to guess: what the kernel does not tell is an error, not a zero.
"""

import ctypes
import os
import resource
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_PROCESS_CLOCK = 2  # CPUCLOCK_SCHED: user and system time of all threads, in ns
_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Used:
    """Processor time of a process since it began, with threads that ended. `user_s` is coarse (10 ms)."""

    cpu_s: float
    user_s: float


def used(pid: int) -> Used:
    """:raises OSError: there is no such process."""
    # As clock_getcpuclockid(3) has it. /proc/PID/stat counts in 10 ms, which is too coarse for short windows.
    cpu_s = time.clock_gettime((~pid << 3) | _PROCESS_CLOCK)
    after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return Used(cpu_s, int(after_name[11]) / _TICKS)


def pss_kib(smaps_rollup: str) -> int:
    """The proportional set size in the text of /proc/PID/smaps_rollup: shared pages are shared out."""
    for line in smaps_rollup.splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1])
    raise ValueError("no Pss in smaps_rollup")


def open_files_to_the_limit() -> int:
    """Allow this process, and those it starts, as many open files as it may have at all."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


def gone_with_us(processors: set[int] | None) -> Callable[[], None]:
    """What a child does before it is the program: die when we die, and run on these processors only."""
    library = ctypes.CDLL(None)

    def prepare() -> None:
        library.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if processors is not None:
            os.sched_setaffinity(0, processors)

    return prepare


@dataclass(frozen=True, slots=True)
class Places:
    """Which processors are whose, of `count`. None: the scheduler's choice."""

    proxy: set[int] | None
    others: set[int] | None
    count: int

    @classmethod
    def chosen(cls, pin: bool) -> "Places":
        """One processor for the proxy under test, the rest for clients and server, where there are two."""
        all_of_them = os.sched_getaffinity(0)
        if not pin or len(all_of_them) < 2:
            return cls(None, None, len(all_of_them))
        return cls({max(all_of_them)}, all_of_them - {max(all_of_them)}, len(all_of_them))

    @contextmanager
    def for_others(self) -> Iterator[None]:
        """Within the block this process, and what it starts, is where clients and server belong."""
        before = os.sched_getaffinity(0)
        os.sched_setaffinity(0, self.others or before)
        try:
            yield
        finally:
            os.sched_setaffinity(0, before)

    def __str__(self) -> str:
        if self.proxy is None or self.others is None:
            return "nothing is pinned"
        listed = ", ".join(map(str, sorted(self.others)))
        return f"the proxy under test on processor {max(self.proxy)}, clients and server on {listed}"
