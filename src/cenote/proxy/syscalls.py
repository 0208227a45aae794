"""The system calls on the path of every message, on sockets that do not block. Nothing here waits.

In these few lines they are Python's. Where the proxy is compiled, `syscalls.pxd` has the same in C: the way there
through the arguments of Python's methods and around the interpreter's lock was a tenth of the proxy's CPU.
"""

from __future__ import annotations

import select
import socket

_BATCH = 256  # of those that are ready
_RECEIVE_BYTES = 65_536  # what is more would be mapped anew for each message; in C it is 256 KiB


def receive(sock: socket.socket, fd: int) -> bytes:
    """What has come, or the first of it; nothing at the end.

    :raises BlockingIOError: there is nothing yet.
    :raises OSError: as the system says.
    """
    return sock.recv(_RECEIVE_BYTES)


def send(sock: socket.socket, fd: int, data: bytes) -> int:
    """Send what can be sent now. How much that was.

    :raises BlockingIOError: nothing can be.
    :raises OSError: as the system says.
    """
    return sock.send(data)


def ready(epoll: select.epoll, fd: int) -> list[tuple[int, int]]:
    """Some of those that are ready, and for what: descriptor and mask."""
    return epoll.poll(0, _BATCH)
