"""A PostgreSQL client that costs next to nothing: log in, ask, and throw the answer away unread.

For what pgbench cannot do (large answers, COPY, thousands of idle clients). Blocking, one thread each. It refuses
to parse answers: the bytes that end one are found at the end of what has come.
"""

import functools
import socket
import ssl
import struct
from types import TracebackType
from typing import Self

from cenote.wire import messages, scram

_TIMEOUT_S = 60.0
_READY = b"Z\x00\x00\x00\x05I"
_ROOM = 1 << 18
_COPY_IN = ord("G")

_keys = functools.lru_cache(scram.Keys.of_password)


class Failed(Exception):
    """The other end said no, in its own words."""


class Client:
    """Logged in when it is made, with SCRAM-SHA-256.

    tls: ask for TLS, and check no certificate
    """

    def __init__(self, port: int, user: str, password: str, database: str, *, tls: bool = False) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=_TIMEOUT_S)
        self._room = memoryview(bytearray(_ROOM))
        try:
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if tls:
                self._begin_tls()
            self._log_in(user, password, database)
        except BaseException:
            self._socket.close()
            raise

    @property
    def cipher(self) -> str:
        """Protocol and cipher, or nothing without TLS."""
        if not isinstance(self._socket, ssl.SSLSocket):
            return ""
        return f"{self._socket.version()} {(self._socket.cipher() or ('?',))[0]}"

    def close(self) -> None:
        """Say goodbye and hang up."""
        try:
            self._socket.sendall(messages.TERMINATE)
        except OSError:
            pass  # it hung up before we did
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def idle(self) -> None:
        """Give the buffer back: from here on only `close`."""
        self._room.release()

    def query(self, sql: str) -> int:
        """Ask, and return how many bytes the answer had."""
        self._socket.sendall(messages.query(sql))
        return self._skip_answer()

    def copy_in(self, sql: str, head: bytes, chunk: bytes, times: int) -> None:
        """COPY FROM STDIN: send `head`, then `chunk` so often, ready-made CopyData messages both."""
        self._socket.sendall(messages.query(sql))
        kind, body = self._message()
        if kind != _COPY_IN:
            raise Failed(_words(kind, body))
        self._socket.sendall(head)
        for _ in range(times):
            self._socket.sendall(chunk)
        self._socket.sendall(messages.message(b"c"))
        self._skip_answer()

    def _skip_answer(self) -> int:
        count, tail = 0, b""
        while True:
            size = self._socket.recv_into(self._room)
            if size == 0:
                raise Failed("the connection was closed within an answer")
            # An error is a short answer, and its only message before the end.
            if count == 0 and self._room[0] == ord("E"):
                raise Failed(bytes(self._room[:size]).decode(errors="replace"))
            count += size
            tail = (tail + bytes(self._room[max(0, size - len(_READY)) : size]))[-len(_READY) :]
            if tail == _READY:
                return count

    def _begin_tls(self) -> None:
        self._socket.sendall(messages.request(messages.SSL_REQUEST))
        if self._socket.recv(1) != b"S":
            raise Failed("no TLS there")
        self._socket = _context().wrap_socket(self._socket)

    def _log_in(self, user: str, password: str, database: str) -> None:
        self._socket.sendall(messages.startup([("user", user), ("database", database)]))
        offered = self._authentication(10).split(b"\0")
        exchange = scram.ClientExchange([word.decode() for word in offered if word])
        first = exchange.first()
        answer = exchange.mechanism.encode() + b"\0" + struct.pack("!i", len(first)) + first
        self._socket.sendall(messages.password(answer))
        exchange.challenge(self._authentication(11))
        keys = _keys(password, exchange.salt, exchange.iterations)
        self._socket.sendall(messages.password(exchange.final(keys)))
        exchange.verify(self._authentication(12))
        self._skip_answer()

    def _authentication(self, wanted: int) -> bytes:
        kind, body = self._message()
        if kind != ord("R") or int.from_bytes(body[:4]) != wanted:
            raise Failed(_words(kind, body))
        return body[4:]

    def _message(self) -> tuple[int, bytes]:
        kind, length = struct.unpack("!Bi", self._exactly(5))
        return kind, self._exactly(length - 4)

    def _exactly(self, count: int) -> bytes:
        found = b""
        while len(found) < count:
            more = self._socket.recv(count - len(found))
            if not more:
                raise Failed("the connection was closed")
            found += more
        return found


@functools.cache
def _context() -> ssl.SSLContext:
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def _words(kind: int, body: bytes) -> str:
    if kind == ord("E"):
        return messages.error_fields(body).get("M", "an error without words")
    return f"an unexpected message {chr(kind)!r}: {body[:80]!r}"
