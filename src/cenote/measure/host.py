"""What this machine's kernel says: ports, queues, open files, memory. And what it says of a server that runs here.

It only reads, from /proc and from the limits of this process. What cannot be read is None; nothing is estimated,
and nothing is judged here.
"""

import os
import resource
import socket
import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

_TIME_WAIT, _LISTEN = "06", 10  # include/net/tcp_states.h
_CGROUPS = Path("/sys/fs/cgroup")
_SOCK_DIAG, _BY_FAMILY, _DUMP, _NETLINK_DONE = 4, 20, 0x301, (2, 3)  # include/uapi/linux: netlink.h, sock_diag.h


@dataclass(frozen=True, slots=True)
class HostFacts:
    """This machine, at one moment. Counters are since it booted.

    cpus: those that this process may use
    port_first, port_last: the range of ports for outgoing connections
    tw_reuse: tcp_tw_reuse: 0 never, 1 always, 2 over loopback only: may a port in TIME_WAIT be taken again
    time_wait: sockets in TIME_WAIT towards the server's address and port
    listen_overflows: connections dropped because a program did not accept them soon enough
    files_soft, files_hard: what this process may open, and may raise that to; None: without a limit
    name_servers: of /etc/resolv.conf
    """

    cpus: int
    port_first: int | None = None
    port_last: int | None = None
    tw_reuse: int | None = None
    time_wait: int | None = None
    somaxconn: int | None = None
    listen_overflows: int | None = None
    uptime_s: float | None = None
    files_soft: int | None = None
    files_hard: int | None = None
    name_servers: tuple[str, ...] = ()

    @property
    def ports(self) -> int | None:
        if self.port_first is None or self.port_last is None:
            return None
        return self.port_last - self.port_first + 1


@dataclass(frozen=True, slots=True)
class ServerHostFacts:
    """A server on this machine, as its kernel sees it.

    memory_bytes: what it may use: the machine's, or its control group's limit where that is lower
    backends: those whose memory was read, of all roles
    backend_bytes: the mean memory of one: private pages and page tables, without shared buffers
    largest_bytes: of the largest of them
    backend_source: "smaps_rollup", or "status" where only that may be read (it counts a little more)
    files_soft, processes: the postmaster's limits on open files and on processes of its user; None: unlimited,
        or not known (`limits_known` tells)
    accept_waiting: connections in the queues of its listening sockets, not accepted yet
    accept_length: how many fit into the shortest of them; both None: not seen, or it listens on a Unix socket only
    """

    memory_bytes: int | None = None
    backends: int = 0
    backend_bytes: int | None = None
    largest_bytes: int | None = None
    backend_source: str = ""
    limits_known: bool = False
    files_soft: int | None = None
    processes: int | None = None
    accept_waiting: int | None = None
    accept_length: int | None = None


def look_at_host(address: str | None, port: int) -> HostFacts:
    """What this machine says, for connections to `address` (a number, None: a Unix socket) and `port`."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    first, last = _port_range()
    return HostFacts(
        cpus=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        port_first=first,
        port_last=last,
        tw_reuse=_number("/proc/sys/net/ipv4/tcp_tw_reuse"),
        time_wait=None if address is None else _time_wait(address, port),
        somaxconn=_number("/proc/sys/net/core/somaxconn"),
        listen_overflows=listen_overflows(),
        uptime_s=_uptime(),
        files_soft=None if soft == resource.RLIM_INFINITY else soft,
        files_hard=None if hard == resource.RLIM_INFINITY else hard,
        name_servers=tuple(name_servers(_text("/etc/resolv.conf") or "")),
    )


def look_at_server(postmaster: int, port: int, backends: list[int]) -> ServerHostFacts:
    """What this machine says of the server of this postmaster and of these of its processes."""
    sizes, source = _sizes(backends)
    limits = _text(f"/proc/{postmaster}/limits")
    queues = list(_accept_queues(port))
    return ServerHostFacts(
        memory_bytes=_memory_for(postmaster),
        backends=len(sizes),
        backend_bytes=sum(sizes) // len(sizes) if sizes else None,
        largest_bytes=max(sizes, default=None),
        backend_source=source,
        limits_known=limits is not None,
        files_soft=_limit(limits or "", "Max open files"),
        processes=_limit(limits or "", "Max processes"),
        accept_waiting=sum(waiting for waiting, _ in queues) if queues else None,
        accept_length=min((length for _, length in queues), default=None),
    )


# -- files of /proc ---------------------------------------------------------------------------------------------


def _text(path: str) -> str | None:
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return None


def _number(path: str) -> int | None:
    text = (_text(path) or "").strip()
    return int(text) if text.isdecimal() else None


def _port_range() -> tuple[int | None, int | None]:
    words = (_text("/proc/sys/net/ipv4/ip_local_port_range") or "").split()
    return (int(words[0]), int(words[1])) if len(words) == 2 else (None, None)


def _uptime() -> float | None:
    words = (_text("/proc/uptime") or "").split()
    return float(words[0]) if words else None


def listen_overflows() -> int | None:
    """TcpExt ListenOverflows: a line of names, then a line of numbers."""
    lines = (_text("/proc/net/netstat") or "").splitlines()
    for names, values in zip(lines[::2], lines[1::2], strict=False):
        found = dict(zip(names.split(), values.split(), strict=False))
        if "ListenOverflows" in found:
            return int(found["ListenOverflows"])
    return None


def name_servers(resolv_conf: str) -> Iterator[str]:
    """The addresses of the lines `nameserver`."""
    for line in resolv_conf.splitlines():
        words = line.split()
        if len(words) >= 2 and words[0] == "nameserver":
            yield words[1]


def _rows() -> Iterator[list[str]] | None:
    """The rows of the kernel's tables of TCP sockets: number, local, remote, state, queues, ..."""
    tables = [text for text in (_text("/proc/net/tcp"), _text("/proc/net/tcp6")) if text is not None]
    if not tables:
        return None
    return (row for table in tables for line in table.splitlines()[1:] if len(row := line.split(None, 5)) > 4)


def _time_wait(address: str, port: int) -> int | None:
    rows = _rows()
    if rows is None:
        return None
    ends = {f"{form}:{port:04X}" for form in _hexadecimal(address)}
    return sum(row[3] == _TIME_WAIT and row[2] in ends for row in rows)


def _hexadecimal(address: str) -> tuple[str, ...]:
    """An address as the tables write it: words of four bytes, each in this machine's order; also as IPv6."""
    packed = ip_address(address.partition("%")[0]).packed

    def words(data: bytes) -> str:
        parts = (data[at : at + 4] for at in range(0, len(data), 4))
        return "".join(f"{int.from_bytes(part, sys.byteorder):08X}" for part in parts)

    if len(packed) == 4:
        return words(packed), words(bytes(10) + b"\xff\xff" + packed)
    return (words(packed),)


def _accept_queues(port: int) -> Iterator[tuple[int, int]]:
    """Of each listening socket of this port: how many connections wait to be accepted, and how many may.

    What listen() was given, or somaxconn where that is lower, is in no file of /proc. ss asks as this does, with
    sock_diag(7): of a listening socket the two queues are these numbers.
    """
    if not hasattr(socket, "AF_NETLINK"):
        return
    try:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _SOCK_DIAG) as kernel:
            kernel.settimeout(1.0)
            for family in (socket.AF_INET, socket.AF_INET6):
                asked = struct.pack("=BBBxI48x", family, socket.IPPROTO_TCP, 0, 1 << _LISTEN)
                kernel.send(struct.pack("=IHHII", 16 + len(asked), _BY_FAMILY, _DUMP, 0, 0) + asked)
                for answer in _dumped(kernel):
                    (at,) = struct.unpack_from(">H", answer, 4)
                    if at == port:
                        waiting, length = struct.unpack_from("=II", answer, 56)
                        yield waiting, length
    except OSError:
        return  # a kernel, or a container, that does not answer such questions


def _dumped(kernel: socket.socket) -> Iterator[bytes]:
    """The bodies of netlink's messages until the last."""
    while True:
        piece = kernel.recv(1 << 16)
        at = 0
        while at < len(piece):
            size, kind = struct.unpack_from("=IH", piece, at)
            if kind in _NETLINK_DONE:
                return
            yield piece[at + 16 : at + size]
            at += (size + 3) & ~3


# -- memory and limits of the server ----------------------------------------------------------------------------


def _sizes(backends: list[int]) -> tuple[list[int], str]:
    """The memory of these processes that is theirs alone, and where it was read."""
    for source, size in (("smaps_rollup", _anonymous_pss), ("status", _anonymous_rss)):
        found = [value for pid in backends if (value := size(pid)) is not None]
        if found:
            return found, source
    return [], ""


def _anonymous_pss(pid: int) -> int | None:
    pages = _kibibytes(_text(f"/proc/{pid}/smaps_rollup") or "", "Pss_Anon")
    tables = _kibibytes(_text(f"/proc/{pid}/status") or "", "VmPTE")
    return None if pages is None or tables is None else pages + tables


def _anonymous_rss(pid: int) -> int | None:
    status = _text(f"/proc/{pid}/status") or ""
    pages, tables = _kibibytes(status, "RssAnon"), _kibibytes(status, "VmPTE")
    return None if pages is None or tables is None else pages + tables


def _kibibytes(text: str, name: str) -> int | None:
    """The value of a line `name:  123 kB`, in bytes."""
    for line in text.splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return None


def _memory_for(pid: int) -> int | None:
    total = _kibibytes(_text("/proc/meminfo") or "", "MemTotal")
    limits = [limit for limit in (total, *_cgroup_limits(pid)) if limit]
    return min(limits, default=None)


def _cgroup_limits(pid: int) -> Iterator[int]:
    """Limits on memory of the process's control group and those above it, of either version."""
    for line in (_text(f"/proc/{pid}/cgroup") or "").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, name = _CGROUPS, "memory.max"
        elif "memory" in controllers.split(","):
            root, name = _CGROUPS / "memory", "memory.limit_in_bytes"
        else:
            continue
        group = root / path.lstrip("/")
        for place in (group, *group.parents):
            limit = _number(str(place / name))
            if limit:
                yield limit
            if place == root:
                break


def _limit(limits: str, name: str) -> int | None:
    """The soft limit of a line of /proc/PID/limits."""
    for line in limits.splitlines():
        if line.startswith(name):
            soft = line[len(name) :].split()[0]
            return int(soft) if soft.isdecimal() else None
    return None
