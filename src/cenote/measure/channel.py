"""A blocking socket, with TLS where asked for, that keeps account: of time, CPU, bytes and round trips.

It knows no protocol above TLS. What it counts are bytes of the stream, TLS records and handshake included, TCP and
IP headers not. A round trip is counted when the other end is waited for after something was said to it: an answer
in several pieces is one.
"""

import contextlib
import io
import socket
import ssl
import time
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

KNOCK = b"\0"  # said and answered once at the beginning, through a `DelayLine` only
_PIECE = 262_144


@dataclass(frozen=True, slots=True)
class Step:
    """What one phase took.

    seconds: of the wall clock
    cpu_s: of the thread that measures
    up, down: bytes sent and received
    trips: round trips; None where it cannot be known
    """

    seconds: float
    cpu_s: float
    up: int
    down: int
    trips: int | None


@dataclass(frozen=True, slots=True)
class Reading:
    """The account at one moment."""

    at_s: float
    cpu_s: float
    up: int
    down: int
    trips: int

    def until(self, later: "Reading") -> Step:
        """What lies between."""
        return Step(
            later.at_s - self.at_s,
            later.cpu_s - self.cpu_s,
            later.up - self.up,
            later.down - self.down,
            later.trips - self.trips,
        )


class Channel:
    """One connection from this end.

    timeout: seconds that one wait may last

    Used in the thread that made it; `with` closes it.
    """

    def __init__(self, family: int, timeout: float) -> None:
        self._socket = socket.socket(family, socket.SOCK_STREAM)
        self._socket.settimeout(timeout)
        self._up = 0
        self._down = 0
        self._trips = 0
        self._said = False
        self._tls: ssl.SSLObject | None = None
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self.local_port = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._socket.close()

    def reading(self) -> Reading:
        """The account now."""
        return Reading(time.perf_counter(), time.thread_time(), self._up, self._down, self._trips)

    # -- the stream ---------------------------------------------------------------------------------------------

    def connect(self, sockaddr: Any, *, far: bool = False) -> None:
        """Connect; `far`: through a `DelayLine`, whose knock takes the place of TCP's own round trip.

        :raises OSError: it does not answer, or says no
        """
        self._socket.connect(sockaddr)
        if self._socket.family != socket.AF_UNIX:
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            self.local_port = self._socket.getsockname()[1]
            self._trips += 1  # SYN, and its acknowledgement
        if far:
            self._socket.sendall(KNOCK)
            if self._socket.recv(1) != KNOCK:
                raise ConnectionRefusedError("refused at the far end")

    def send(self, data: bytes) -> None:
        """Send all of it, as one write where there is no TLS or it makes one record."""
        if self._tls is not None:
            self._tls.write(data)
            data = self._outgoing.read()
        self._send_raw(data)

    def recv(self) -> bytes:
        """What comes next; b"": the other end has said that nothing more comes."""
        if self._tls is None:
            return self._recv_raw()
        while True:
            try:
                data = self._tls.read(_PIECE)
            except ssl.SSLWantReadError:
                if not self._fill():
                    return b""
            except ssl.SSLZeroReturnError:
                return b""
            else:
                return data

    def say_goodbye(self) -> None:
        """Say that nothing more comes from here (TLS close_notify, FIN), and go on listening.

        So this end closes first, as a driver's does that closes without waiting.
        """
        if self._tls is not None:
            with contextlib.suppress(ssl.SSLError):
                self._tls.unwrap()
            with contextlib.suppress(OSError):
                self._send_raw(self._outgoing.read())
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)

    def await_end(self) -> None:
        """Until the other end has closed, which it says by FIN or by RST. TLS is not looked into any more."""
        with contextlib.suppress(ConnectionError):
            while self._recv_raw():
                pass

    def _send_raw(self, data: bytes) -> None:
        if data:
            self._socket.sendall(data)
            self._up += len(data)
            self._said = True

    def _recv_raw(self) -> bytes:
        data = self._socket.recv(_PIECE)
        self._down += len(data)
        if self._said:
            self._trips += 1
            self._said = False
        return data

    def _fill(self) -> bool:
        """Give TLS what comes next; False: nothing more comes."""
        data = self._recv_raw()
        if data:
            self._incoming.write(data)
        else:
            self._incoming.write_eof()
        return bool(data)

    # -- TLS ----------------------------------------------------------------------------------------------------

    def start_tls(self, context: ssl.SSLContext, hostname: str | None, session: Any = None) -> ssl.SSLObject:
        """Shake hands, offering `session` of an earlier connection where there is one.

        :raises ssl.SSLError: it failed, or the certificate does not pass
        :raises ConnectionResetError: the other end hung up
        """
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_hostname=hostname)
        if session is not None:
            self._tls.session = session
        while True:
            try:
                self._tls.do_handshake()
            except ssl.SSLWantReadError:
                self._send_raw(self._outgoing.read())
                if not self._fill():
                    raise ConnectionResetError("the other end hung up in the TLS handshake") from None
            except ssl.SSLError:
                with contextlib.suppress(OSError):  # the alert that says why
                    self._send_raw(self._outgoing.read())
                raise
            else:
                self._send_raw(self._outgoing.read())
                return self._tls

    # -- what http.client needs of a socket ---------------------------------------------------------------------

    sendall = send

    def makefile(self, mode: str) -> io.BufferedReader:
        """A file that reads from here."""
        assert mode == "rb"
        return io.BufferedReader(_Reader(self))

    def close(self) -> None:
        """Nothing: the `with` closes it."""


class _Reader(io.RawIOBase):
    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._rest = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._rest or self._channel.recv()
        count = min(len(buffer), len(data))
        buffer[:count] = data[:count]
        self._rest = data[count:]
        return count
