"""What the kernel says of a PostgreSQL server's processes and sockets, read from /proc.

It looks from outside: it asks the server nothing, takes none of its connections and stops none of its
processes. Where there is no /proc, or it may not be read, a figure is None; nothing is estimated.
"""

import os
from dataclasses import dataclass
from pathlib import Path

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_TIME_WAIT = "06"  # include/net/tcp_states.h


@dataclass(frozen=True, slots=True)
class Backends:
    """The processes that serve connections, at one moment.

    number: those alive, the ones that are about to refuse their client included; None: not known
    memory_bytes: the sum of their PSS: private memory, and their share of what they share; None: not known
    """

    number: int | None
    memory_bytes: int | None


UNKNOWN = Backends(None, None)


class ServerProcesses:
    """One server, known by its postmaster and its port.

    Made while nobody is connected: the children there are then are the server's own helpers, and every later
    child serves a connection. (So autovacuum, whose workers come and go, has to be off.)
    """

    def __init__(self, pid: int, port: int) -> None:
        self._pid = pid
        self._port = port
        self._helpers = frozenset(self._children() or ())

    def backends(self) -> Backends:
        """Count the backends and add up their memory.

        Reading smaps_rollup walks the page tables of each: some 0.1 ms for a backend, so pace the calls.
        """
        children = self._children()
        if children is None:
            return UNKNOWN
        number, memory, readable = 0, 0, True
        for pid in children:
            if pid in self._helpers:
                continue
            try:
                memory += _pss_bytes(Path(f"/proc/{pid}/smaps_rollup").read_bytes())
            except PermissionError:
                readable = False
            except OSError:
                continue  # it has ended: gone, or a zombie without memory
            number += 1
        return Backends(number, memory if readable else None)

    def cpu_s(self) -> float | None:
        """The CPU time of the whole server since it started, user and system, ended processes included.

        Exact to one clock tick for each process that is alive.
        """
        children = self._children()
        if children is None:
            return None
        # A process that has ended is in its parent's account as soon as the parent has collected it.
        times = [_cpu_ticks(pid) for pid in (self._pid, *children)]
        return sum(times) / _TICKS_PER_S

    def time_wait(self, *ports: int) -> int | None:
        """Count the sockets in TIME_WAIT to or from these ports; without any, the server's.

        They stay for 60 s on the side that closed first, each keeping an address and port in use.
        """
        try:
            tables = [Path(f"/proc/net/{name}").read_text() for name in ("tcp", "tcp6") if _exists(name)]
        except OSError:
            return None
        return sum(_count_time_wait(table, ports or (self._port,)) for table in tables) if tables else None

    def _children(self) -> list[int] | None:
        try:
            text = Path(f"/proc/{self._pid}/task/{self._pid}/children").read_text()
        except OSError:
            return None
        return [int(word) for word in text.split()]


def process_cpu_s(pid: int) -> float | None:
    """The CPU time of one process and its ended children since it started; None when it has gone."""
    return _cpu_ticks(pid) / _TICKS_PER_S if Path(f"/proc/{pid}/stat").exists() else None


def process_memory_bytes(pid: int) -> int | None:
    """The PSS of one process; None when it may not be read, or has gone."""
    try:
        return _pss_bytes(Path(f"/proc/{pid}/smaps_rollup").read_bytes())
    except OSError:
        return None


def _count_time_wait(table: str, ports: tuple[int, ...]) -> int:
    ends = tuple(f":{port:04X}" for port in ports)
    # The columns: number, local address, remote address, state, ...
    rows = (line.split(None, 4) for line in table.splitlines()[1:])
    return sum(row[3] == _TIME_WAIT and (row[1].endswith(ends) or row[2].endswith(ends)) for row in rows)


def _exists(name: str) -> bool:
    return Path(f"/proc/net/{name}").exists()


def _pss_bytes(rollup: bytes) -> int:
    for line in rollup.splitlines():
        if line.startswith(b"Pss:"):
            return int(line.split()[1]) * 1024
    raise ProcessLookupError("a process without memory has ended")


def _cpu_ticks(pid: int) -> int:
    """utime, stime, cutime and cstime of one process (proc_pid_stat(5)); 0 when it has gone."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return 0
    after_name = text.rpartition(")")[2].split()  # the name may hold anything
    return sum(map(int, after_name[11:15]))
