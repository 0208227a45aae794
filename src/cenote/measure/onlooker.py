"""Who watches an experiment: reads what the callers tell, and samples the server's processes meanwhile.

It takes a small share of one CPU, and none of the callers' time.
"""

import os
import selectors
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass

from cenote.errors import CenoteError
from cenote.measure.load import Counts, Report, heard
from cenote.measure.proc import Backends, ServerProcesses, process_memory_bytes

_SAMPLE_EVERY_S = 0.1
_SAMPLING_SHARE = 0.1
_BACKENDS_END_WITHIN_S = 5.0


@dataclass(frozen=True, slots=True)
class Look:
    """The processes at one moment of the monotonic clock.

    proxy_bytes: PSS of the proxy; None: there is none, or it is not known
    """

    at_s: float
    backends: Backends
    proxy_bytes: int | None


class Onlooker:
    """Looks at the server, and at the proxy if there is one, until the callers have reported."""

    def __init__(
        self, processes: ServerProcesses, proxy_pid: int | None, tell: Callable[[Counts, Backends], None]
    ) -> None:
        self.looks: list[Look] = []
        self.cpu_s = 0.0
        self._processes = processes
        self._proxy_pid = proxy_pid
        self._tell = tell
        self._counts = Counts()

    def until_report(self, process: "subprocess.Popen[bytes]", timeout_s: float) -> Report:
        """Return the callers' report; raise `CenoteError` when they die without one or exceed `timeout_s`."""
        assert process.stdout is not None
        started, cpu = time.monotonic(), time.process_time()
        next_look_s = started
        unread = b""
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            while (now := time.monotonic()) < started + timeout_s:
                if selector.select(max(0.0, next_look_s - now)):
                    piece = os.read(process.stdout.fileno(), 1 << 20)
                    if not piece:
                        raise CenoteError(f"the callers' process ended early (exit status {process.wait()})")
                    *lines, unread = (unread + piece).split(b"\n")
                    for line in lines:
                        message = heard(line)
                        if isinstance(message, Report):
                            self.cpu_s = time.process_time() - cpu
                            return message
                        self._counts = message
                if time.monotonic() >= next_look_s:
                    next_look_s = self._look()
        raise CenoteError(f"the callers did not end within {timeout_s:g} s")

    def _look(self) -> float:
        """Look once; when to look again, so that looking stays a small share of one CPU."""
        began, cpu = time.monotonic(), time.thread_time()
        seen = self._processes.backends()
        proxy = None if self._proxy_pid is None else process_memory_bytes(self._proxy_pid)
        self.looks.append(Look(began, seen, proxy))
        self._tell(self._counts, seen)
        return began + max(_SAMPLE_EVERY_S, (time.thread_time() - cpu) / _SAMPLING_SHARE)


def cpu_when_quiet(processes: ServerProcesses) -> float | None:
    """The server's CPU time when every backend has ended and is accounted for."""
    deadline = time.monotonic() + _BACKENDS_END_WITHIN_S
    while processes.backends().number and time.monotonic() < deadline:
        time.sleep(0.01)
    return processes.cpu_s()
