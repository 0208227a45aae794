"""A distance on this machine: a forwarder that holds every piece back for half a round trip, each way.

It really waits: nothing is computed. Bandwidth is not limited and nothing is lost; pieces follow each other at the
pace they came in. The kernel answers a connection request to a local port by itself, which nothing here can hold
back; therefore a client that came through knocks (one byte) before it begins: the knock travels to the far end as
the SYN would, the line connects there, and the answer travels back as its acknowledgement would.

Blocking threads and not an event loop: epoll rounds its timeouts up to whole milliseconds, and a
millisecond is what may be asked for here.
"""

import contextlib
import queue
import socket
import struct
import threading
import time
from types import TracebackType
from typing import Any, Self

from cenote.measure.channel import KNOCK

_PIECE = 65_536
_CONNECT_S = 10.0
_JOIN_S = 5.0
_OVERSLEPT_S = 0.0002  # how much longer than asked for a sleep may last
_AT_ONCE_RESET = struct.pack("ii", 1, 0)  # SO_LINGER on with no time: close() sends RST


class DelayLine:
    """Listens on loopback and forwards to `sockaddr`, `rtt_s` away. `with` opens and closes it.

    family, sockaddr: for connect(2)
    rtt_s: seconds there and back
    """

    def __init__(self, family: int, sockaddr: Any, rtt_s: float) -> None:
        self._target = family, sockaddr
        self._half_s = rtt_s / 2
        self._listener = socket.socket()
        self._open: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()
        self._closed = False

    def __enter__(self) -> Self:
        self._listener.bind(("127.0.0.1", 0))
        self._listener.listen()
        self._start(self._accept)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._lock:
            self._closed = True
            ends = list(self._open)
        for end in (self._listener, *ends):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)  # wakes whoever waits on it; close() would not
        for thread in self._threads:
            thread.join(_JOIN_S)
        self._listener.close()

    @property
    def sockaddr(self) -> tuple[str, int]:
        """Where it listens, by IPv4."""
        host, port = self._listener.getsockname()
        return host, port

    def _start(self, work: Any, *given: Any) -> threading.Thread:
        thread = threading.Thread(target=work, args=given, name="delay line", daemon=True)
        thread.start()
        with self._lock:
            self._threads = [one for one in self._threads if one.is_alive()]
            self._threads.append(thread)
        return thread

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            if self._keep(client):
                self._admit(client)

    def _keep(self, end: socket.socket) -> bool:
        """Note an end so that closing the line ends it; False: the line is closed, and so is the end now."""
        with self._lock:
            if not self._closed:
                self._open.add(end)
                return True
        end.close()
        return False

    def _admit(self, client: socket.socket) -> None:
        """Connect at the far end and start both ways. Who comes next waits in the backlog meanwhile."""
        server = socket.socket(self._target[0], socket.SOCK_STREAM)
        try:
            if not self._keep(server) or client.recv(1) != KNOCK:
                raise ConnectionAbortedError
            _wait_until(time.monotonic() + self._half_s)
            server.settimeout(_CONNECT_S)
            server.connect(self._target[1])
            server.settimeout(None)
            due_s = time.monotonic() + self._half_s
            for end in (client, server):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            lanes = [self._lane(client, server), self._lane(server, client)]
            self._start(self._see_off, (client, server), lanes)
            _wait_until(due_s)
            client.sendall(KNOCK)
        except OSError:
            self._forget(client, server)  # the client sees the end of its connection

    def _forget(self, *ends: socket.socket) -> None:
        with self._lock:
            self._open.difference_update(ends)
        for end in ends:
            end.close()

    def _see_off(self, ends: tuple[socket.socket, socket.socket], lanes: list[threading.Thread]) -> None:
        for lane in lanes:
            lane.join()
        self._forget(*ends)

    def _lane(self, source: socket.socket, sink: socket.socket) -> threading.Thread:
        """Start to forward one way, to the end; the thread ends when all is delivered."""
        # Without bound: what it holds is what the sender sends within half a round trip.
        under_way: queue.SimpleQueue[tuple[float, bytes | None]] = queue.SimpleQueue()
        self._start(_collect, source, under_way, self._half_s)
        return self._start(_deliver, under_way, sink)


def _collect(
    source: socket.socket, under_way: "queue.SimpleQueue[tuple[float, bytes | None]]", half_s: float
) -> None:
    """Note of each piece when it is due."""
    data: bytes | None = b"-"
    while data:
        try:
            data = source.recv(_PIECE)
        except OSError:
            data = None
        under_way.put((time.monotonic() + half_s, data))


def _deliver(under_way: "queue.SimpleQueue[tuple[float, bytes | None]]", sink: socket.socket) -> None:
    """Hand on what is due. b"" is the sender's FIN, None its RST."""
    with contextlib.suppress(OSError):
        while True:
            due_s, data = under_way.get()
            _wait_until(due_s)
            if data:
                sink.sendall(data)
                continue
            if data is None:
                sink.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _AT_ONCE_RESET)
                sink.shutdown(socket.SHUT_RDWR)
            else:
                sink.shutdown(socket.SHUT_WR)
            return


def _wait_until(due_s: float) -> None:
    left_s = due_s - time.monotonic()
    if left_s > _OVERSLEPT_S:
        time.sleep(left_s - _OVERSLEPT_S)
    while time.monotonic() < due_s:
        time.sleep(0)  # gives way, and comes back sooner than from any real sleep
