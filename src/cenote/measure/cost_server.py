"""What /proc says of a server's processes while one connection after another is taken apart.

A backend counts as the server's only if it is a child of its postmaster: something between us and the server (a
proxy, a pooler) hands out numbers of its own. Where /proc does not tell, a figure is None.
"""

import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from cenote.measure.proc import ServerProcesses

_SETTLE_S = 2.0
_TIME_WAIT = "06"  # include/net/tcp_states.h
_PAGE_TABLES = "VmPTE:"


@dataclass(frozen=True, slots=True)
class Footprint:
    """One process's memory in bytes; None: /proc does not tell us.

    pss: private, and its share of what is shared; private: what would be free without it
    page_tables: the kernel's, on top of that
    """

    pss: int | None
    private: int | None
    page_tables: int | None


class LocalServer:
    """The server's processes, seen from this machine."""

    def __init__(self, pid: int, port: int) -> None:
        self._pid = pid
        self._processes = ServerProcesses(pid, port)

    def owns(self, backend: int) -> bool:
        """Whether this process serves a connection of this server."""
        text = _read(f"/proc/{backend}/stat")
        return bool(text) and int(text.rpartition(")")[2].split()[1]) == self._pid

    def backend_cpu_s(self, backend: int) -> float | None:
        """The CPU time of one backend since it was forked, to the nanosecond."""
        words = _read(f"/proc/{backend}/schedstat").split()
        return int(words[0]) / 1e9 if words and self.owns(backend) else None

    def cpu_s(self) -> float | None:
        """The CPU time of all of the server since it started; exact to a clock tick."""
        return self._processes.cpu_s()

    def settle(self, backend: int) -> None:
        """Until its postmaster has collected an ended backend: from then on its CPU is in the account."""
        until = time.monotonic() + _SETTLE_S
        while self.owns(backend) and time.monotonic() < until:
            time.sleep(0.0005)

    def footprint(self, backend: int) -> Footprint:
        """The memory of one backend now."""
        if not self.owns(backend):
            return Footprint(None, None, None)
        rollup = _kilobytes(_read(f"/proc/{backend}/smaps_rollup"))
        private = [rollup[key] for key in ("Private_Clean:", "Private_Dirty:") if key in rollup]
        status = _kilobytes(_read(f"/proc/{backend}/status"))
        return Footprint(rollup.get("Pss:"), sum(private) if private else None, status.get(_PAGE_TABLES))


@dataclass(frozen=True, slots=True)
class Ports:
    """The ports of this end, for connections to one address.

    client, server: of the connections just closed, how many stay in TIME_WAIT at this end and at the server's;
        the server's can be seen only on its own machine. None: not known. Both 0: they were ended by RST
    available: how many ports there are for outgoing connections; None: not known
    reuse: net.ipv4.tcp_tw_reuse: "0" never, "1" after a second, "2" after a second on loopback; "": not known
    """

    client: int | None
    server: int | None
    available: int | None
    reuse: str


def ports(closed: Collection[int], server_port: int) -> Ports:
    """What the kernel says of the ports, and of connections from the ports `closed` that have just ended."""
    words = _read("/proc/sys/net/ipv4/ip_local_port_range").split()
    low_high = [int(word) for word in words]
    table = _read("/proc/net/tcp") + _read("/proc/net/tcp6")
    sides = list(_waiting_sides(table, closed, server_port))
    return Ports(
        client=sides.count("client") if table else None,
        server=sides.count("server") if table else None,
        available=low_high[1] - low_high[0] + 1 if len(low_high) == 2 else None,
        reuse=_read("/proc/sys/net/ipv4/tcp_tw_reuse").strip(),
    )


def _waiting_sides(table: str, closed: Collection[int], server_port: int) -> Iterator[str]:
    for line in table.splitlines():
        # The columns: number, local address, remote address, state, ...
        row = line.split(None, 4)
        if len(row) > 3 and row[3] == _TIME_WAIT:
            local, remote = _port(row[1]), _port(row[2])
            if local in closed and remote == server_port:
                yield "client"
            elif local == server_port and remote in closed:
                yield "server"


def _port(address: str) -> int:
    return int(address.rpartition(":")[2], 16)


def _kilobytes(text: str) -> dict[str, int]:
    """The lines `name: number kB`, in bytes."""
    rows = (line.split() for line in text.splitlines())
    return {row[0]: int(row[1]) * 1024 for row in rows if len(row) == 3 and row[2] == "kB"}


def _read(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""
