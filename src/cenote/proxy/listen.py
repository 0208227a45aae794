"""Listening sockets: opened, accepted from, closed.

A process out of descriptors has one in reserve: with it the clients that wait now are told so and sent away, and
not left to hang. Then nothing is accepted for a moment: without a pause it would do nothing else.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cenote.proxy.admission import Admission
from cenote.proxy.log import get_log
from cenote.wire import messages

log = get_log("cenote.proxy")

_AT_ONCE = 8  # accepted in one turn of the loop: more would hold up those who are in
_PAUSE_S = 0.5  # how long nothing is accepted when there are no descriptors left
_MOMENT_S = 0.01  # and when there is no room for one more log-in
_READ_BYTES = 65_536
_FULL = messages.error(
    "FATAL",
    "53300",
    "cenote: no file descriptor is left for one more client",
    hint="See RLIMIT_NOFILE and max_clients.",
)


def tcp_sockets(host: str, port: int) -> list[socket.socket]:
    """Sockets bound to every address of a name.

    :raises OSError: an address is taken or not ours
    """
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    made: list[socket.socket] = []
    try:
        for family, kind, protocol, _, found_address in dict.fromkeys(found):
            address: Any = found_address
            sock = socket.socket(family, kind, protocol)
            made.append(sock)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            try:
                sock.bind(address)
            except OSError as error:
                raise OSError(error.errno, f"{address[0]}:{address[1]}: {os.strerror(error.errno or 0)}") from None
    except BaseException:
        for sock in made:
            sock.close()
        raise
    return made


def unix_socket(path: Path) -> socket.socket:
    """A socket bound to a path; one that a dead process left there is taken over.

    :raises OSError: the directory is not ours, or somebody answers there
    """
    if path.is_socket():
        with socket.socket(socket.AF_UNIX) as probe:
            if probe.connect_ex(str(path)) == 0:
                raise OSError(errno.EADDRINUSE, f"{path}: {os.strerror(errno.EADDRINUSE)}")
        path.unlink()
    sock = socket.socket(socket.AF_UNIX)
    try:
        sock.bind(str(path))
        path.chmod(0o777)  # who may log in is decided by the log-in
    except OSError as error:
        sock.close()
        raise OSError(error.errno, f"{path}: {os.strerror(error.errno or 0)}") from None
    return sock


class Listener:
    """One listening socket. On the event loop.

    :param arrived: called with each connection
    :param turned_away: called for each client that there was no descriptor for
    :param admission: says whether there is room for one more log-in
    """

    def __init__(
        self,
        sock: socket.socket,
        arrived: Callable[[socket.socket], None],
        turned_away: Callable[[], None],
        admission: Admission,
    ) -> None:
        self.sock = sock
        self.admission = admission
        self.arrived = arrived
        self.turned_away = turned_away
        self._reserve = _open_reserve()
        self._loop = asyncio.get_running_loop()
        self._pause: asyncio.TimerHandle | None = None
        self._open = True
        sock.setblocking(False)
        sock.listen(_backlog())
        self._loop.add_reader(sock, self._ready)

    def close(self) -> None:
        """Accept no more."""
        if self._open:
            self._open = False
            if self._pause is not None:
                self._pause.cancel()
            else:
                self._loop.remove_reader(self.sock)
            if self.sock.family == socket.AF_UNIX:
                with contextlib.suppress(OSError):
                    Path(self.sock.getsockname()).unlink()
            self.sock.close()
            if self._reserve >= 0:
                os.close(self._reserve)

    def _ready(self) -> None:
        for _ in range(_AT_ONCE):
            if not self.admission.has_room():
                self._rest(_MOMENT_S)
                return
            try:
                sock, _ = self.sock.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                if error.errno not in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                    raise
                log.error("no_descriptors", error=os.strerror(error.errno or 0), pause_s=_PAUSE_S)
                if error.errno in (errno.EMFILE, errno.ENFILE):
                    self._turn_away()
                self._rest(_PAUSE_S)
                return
            self.arrived(sock)

    def _rest(self, seconds: float) -> None:
        """Accept nothing meanwhile: clients wait in the kernel's line."""
        self._loop.remove_reader(self.sock)
        self._pause = self._loop.call_later(seconds, self._again)

    def _turn_away(self) -> None:
        """Send those who wait now away, each with the one descriptor that is kept for it."""
        for _ in range(_AT_ONCE):
            if self._reserve < 0:
                self._reserve = _open_reserve()  # somebody else was faster last time
            if self._reserve < 0:
                return
            os.close(self._reserve)
            self._reserve = -1
            try:
                sock, _ = self.sock.accept()
            except OSError:
                self._reserve = _open_reserve()
                return
            with contextlib.suppress(OSError):
                sock.setblocking(False)
                sock.send(_FULL)
                sock.shutdown(socket.SHUT_WR)
                sock.recv(_READ_BYTES)  # unread, it would turn the end into a reset, and the words would be lost
            sock.close()
            self._reserve = _open_reserve()
            self.turned_away()

    def _again(self) -> None:
        self._pause = None
        self._loop.add_reader(self.sock, self._ready)


def _open_reserve() -> int:
    """A descriptor to be given up when there is no other; -1: there is none."""
    try:
        return os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return -1


def _backlog() -> int:
    """As many as the kernel lets wait."""
    try:
        return int(Path("/proc/sys/net/core/somaxconn").read_text())
    except (OSError, ValueError):
        return 4096
