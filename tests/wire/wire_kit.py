"""Raw conversations with a real server, and the same conversations with the room `wire`."""

import socket
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import BinaryIO

from cenote.embedded import Postgres
from cenote.wire import messages
from cenote.wire.refusal import Refusal
from cenote.wire.scram import ClientExchange, Keys
from cenote.wire.startup import Answer, Hello, Startup, packet_length

Message = tuple[bytes, bytes]

# What an error says to people and programs; the rest is where in the server's source it was raised.
TOLD = "SVCMDH"


def told(body: bytes) -> dict[str, str]:
    return {letter: text for letter, text in messages.error_fields(body).items() if letter in TOLD}


def split(data: bytes) -> list[Message]:
    """Whole messages of protocol 3."""
    found = []
    while data:
        length = int.from_bytes(data[1:5], "big")
        assert len(data) >= length + 1
        found.append((data[:1], data[5 : length + 1]))
        data = data[length + 1 :]
    return found


class Raw:
    """A client that says exactly what the test says."""

    def __init__(self, sock: socket.socket, reader: BinaryIO) -> None:
        self.socket = sock
        self._reader = reader

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def exactly(self, count: int) -> bytes:
        data = self._reader.read(count)
        if len(data) < count:
            raise ConnectionResetError("the server closed the connection")
        return data

    def message(self) -> Message:
        head = self.exactly(5)
        return head[:1], self.exactly(int.from_bytes(head[1:], "big") - 4)

    def rest(self) -> bytes:
        """Everything until the server closes."""
        return self._reader.read()

    def until(self, kind: bytes) -> list[Message]:
        """Messages up to one of this type, or up to a FATAL error."""
        found = []
        while True:
            found.append(self.message())
            if found[-1][0] == kind or (found[-1][0] == b"E" and told(found[-1][1])["V"] == "FATAL"):
                return found

    def log_in(
        self, parameters: Iterable[tuple[str | bytes, str | bytes]], password: str | bytes
    ) -> list[Message]:
        """Start a session by SCRAM; return the messages from AuthenticationOk, or the error alone."""
        self.send(packet([*parameters]))
        kind, body = self.message()
        if kind == b"E":
            return [(kind, body)]
        assert kind == b"R"
        assert body[:4] == (10).to_bytes(4, "big")
        offered = [name.decode() for name in messages.cstrings(body[4:]) if name]
        exchange = ClientExchange(offered)
        first = exchange.first()
        self.send(messages.password(exchange.mechanism.encode() + b"\0" + len(first).to_bytes(4, "big") + first))
        kind, body = self.message()
        if kind == b"E":
            return [(kind, body)]
        exchange.challenge(body[4:])
        self.send(
            messages.password(exchange.final(Keys.of_password(password, exchange.salt, exchange.iterations)))
        )
        kind, body = self.message()
        if kind == b"E":
            return [(kind, body)]
        exchange.verify(body[4:])
        return self.until(b"Z")

    def query(self, text: str) -> list[tuple[str | None, ...]]:
        self.send(messages.query(text))
        rows = []
        for kind, body in self.until(b"Z"):
            assert kind != b"E", told(body)
            if kind == b"D":
                rows.append(columns(body))
        return rows


def columns(body: bytes) -> tuple[str | None, ...]:
    values: list[str | None] = []
    at = 2
    while at < len(body):
        length = int.from_bytes(body[at : at + 4], "big", signed=True)
        at += 4
        values.append(None if length < 0 else body[at : at + length].decode())
        at += max(length, 0)
    return tuple(values)


@contextmanager
def raw(server: Postgres) -> Iterator[Raw]:
    with socket.create_connection((server.host, server.port), timeout=20) as sock:
        with sock.makefile("rb") as reader:
            yield Raw(sock, reader)


def framed(body: bytes) -> bytes:
    return (len(body) + 4).to_bytes(4, "big") + body


def packet(
    parameters: Sequence[tuple[str | bytes, str | bytes]], version: int = messages.PROTOCOL_3_0, end: bytes = b"\0"
) -> bytes:
    body = version.to_bytes(4, "big")
    for name, value in parameters:
        body += messages.cstring(name) + messages.cstring(value)
    return framed(body + end)


def body_of(whole: bytes) -> bytes:
    assert packet_length(whole[:4]) == len(whole) - 4
    return whole[4:]


Verdict = tuple[bytes, dict[str, str] | bytes | None]


def verdict(said: bytes) -> Verdict:
    """What a server said before it asked for a password: bytes that answer encryption requests, messages
    before the end, and the end: an error's fields (v3), its bytes (v2), or None: it went on or fell silent."""
    answers = b""
    while said[:1] in (b"N", b"S"):
        answers, said = answers + said[:1], said[1:]
    if said[:1] == b"E" and len(said) > 4 and int.from_bytes(said[1:5], "big") > len(said):
        return answers, said
    end = None
    for kind, body in split(said):
        if kind == b"E":
            end = told(body)
        elif kind != b"R":
            answers += kind + body
    return answers, end


def server_verdict(server: Postgres, packets: Sequence[bytes]) -> Verdict:
    """A real server's verdict on packets, each sent when the one before was answered."""
    with raw(server) as client:
        said = b""
        for data in packets[:-1]:
            client.send(data)
            said += client.exactly(1)
        client.send(packets[-1])
        client.socket.shutdown(socket.SHUT_WR)
        return verdict(said + client.rest())


def our_verdict(packets: Sequence[bytes]) -> Verdict:
    """The same packets, before a server without TLS."""
    hello = Hello(tls=False)
    said = b""
    try:
        for data in packets:
            length = packet_length(data[:4])
            step = hello.packet(data[4 : 4 + length], len(data) - 4 - length)
            if isinstance(step, Answer):
                said += step.reply
            elif isinstance(step, Startup):
                said += step.negotiate
    except Refusal as refusal:
        said += refusal.reply
    return verdict(said)
