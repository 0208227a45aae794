"""A TCP relay that writes down what a driver sends, so that tests can compare it with what an adapter saw.

It forwards bytes unchanged and reads only the client's half of the protocol. No TLS: connect with
sslmode=disable. Each connection is pumped by two threads, so any driver can be behind it.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from dataclasses import dataclass
from typing import Self
from urllib.parse import urlsplit, urlunsplit

CANCEL_REQUEST = 80877102


@dataclass(frozen=True)
class Request:
    """One message of the client: its type byte as a letter ("K" for a CancelRequest), and its text.

    The text is the statement's for Query and Parse, the names for the others, "" where there is none.
    """

    kind: str
    text: str = ""


class WireRecorder:
    """Relays connections to the server of `dsn`; `requests` is what clients sent since `clear()`."""

    def __init__(self, dsn: str) -> None:
        parts = urlsplit(dsn)
        self._upstream = (parts.hostname or "127.0.0.1", parts.port or 5432)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._lock = threading.Lock()
        self._requests: list[Request] = []
        self._sockets: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._open = threading.Event()
        self._open.set()
        user = parts.netloc.rpartition("@")[0]
        port = self._listener.getsockname()[1]
        self.dsn = urlunsplit(parts._replace(netloc=f"{user}@127.0.0.1:{port}", query="sslmode=disable"))

    def __enter__(self) -> Self:
        self._start(self._accept)
        return self

    def __exit__(self, *_: object) -> None:
        self._open.set()
        # shutdown() wakes the thread in accept(); close() alone would not.
        self._listener.shutdown(socket.SHUT_RDWR)
        for sock in self._sockets:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(5)
        self._listener.close()
        for sock in self._sockets:
            sock.close()

    @property
    def requests(self) -> list[Request]:
        """A copy of what was recorded. A driver that has its answer has been recorded before it."""
        with self._lock:
            return list(self._requests)

    def clear(self) -> None:
        with self._lock:
            self._requests.clear()

    def texts(self) -> list[str]:
        """The statements that were sent, by Query or Parse, in order."""
        return [request.text for request in self.requests if request.kind in "QP"]

    def executions(self) -> int:
        """How many times a statement was started: simple queries, bound statements, function calls."""
        return sum(request.kind in "QBF" for request in self.requests)

    def round_trips(self) -> int:
        """How many answers the client had to wait for: simple queries and Syncs (Flush is not counted)."""
        return sum(request.kind in "QSF" for request in self.requests)

    def wait_for(self, kind: str, timeout: float = 5.0) -> None:
        """Return once a message of this kind was recorded."""
        deadline = time.monotonic() + timeout
        while all(request.kind != kind for request in self.requests):
            if time.monotonic() > deadline:
                raise TimeoutError(f"no {kind} within {timeout} s; recorded: {self.requests}")
            time.sleep(0.002)

    def hold(self) -> None:
        """Stop relaying, in both directions, as a peer that has died without a word. Until `release()`."""
        self._open.clear()

    def release(self) -> None:
        self._open.set()

    def _start(self, target: object, *args: object) -> None:
        thread = threading.Thread(target=target, args=args, daemon=True)  # type: ignore[arg-type]
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            server = socket.create_connection(self._upstream)
            for sock in (client, server):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._sockets += [client, server]
            self._start(self._pump, client, server, _Reader(self._note))
            self._start(self._pump, server, client, None)

    def _note(self, request: Request) -> None:
        with self._lock:
            self._requests.append(request)

    def _pump(self, source: socket.socket, sink: socket.socket, reader: _Reader | None) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                self._open.wait()
                if reader is not None:
                    reader.feed(data)  # before it is sent on, so that no answer overtakes the record
                sink.sendall(data)
        self._open.wait()
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_WR)


class _Reader:
    """Cuts the client's stream into messages."""

    def __init__(self, note: object) -> None:
        self._note = note
        self._buffer = b""
        self._started = False

    def feed(self, data: bytes) -> None:
        self._buffer += data
        while (message := self._next()) is not None:
            self._note(message)  # type: ignore[operator]

    def _next(self) -> Request | None:
        head = 1 if self._started else 0
        if len(self._buffer) < head + 4:
            return None
        length = int.from_bytes(self._buffer[head : head + 4], "big")
        if len(self._buffer) < head + length:
            return None
        kind = self._buffer[:head].decode()
        body = self._buffer[head + 4 : head + length]
        self._buffer = self._buffer[head + length :]
        if not kind:
            code = int.from_bytes(body[:4], "big")
            self._started = code >> 16 == 3
            return Request("K" if code == CANCEL_REQUEST else "startup")
        words = body.split(b"\0")
        text = {
            "Q": lambda: words[0],
            "P": lambda: words[1],
            "B": lambda: words[0] + b"/" + words[1],
            "C": lambda: words[0],
            "D": lambda: words[0],
        }.get(kind, lambda: b"")()
        return Request(kind, text.decode(errors="replace"))
