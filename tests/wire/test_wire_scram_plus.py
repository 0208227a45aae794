"""SCRAM-SHA-256-PLUS through our TLS filter, with a real server that has TLS."""

import os
import socket
from collections.abc import Iterator

import pytest
from wire_kit import packet, told

from cenote.errors import EmbeddedError
from cenote.testing.postgres import DebianPostgres, debian_bin_dir
from cenote.wire import messages
from cenote.wire.binding import server_end_point
from cenote.wire.scram import MECHANISM, MECHANISM_PLUS, ClientExchange, Keys
from cenote.wire.tls import TlsFilter, client_context


@pytest.fixture(scope="module")
def server() -> Iterator[DebianPostgres]:
    try:
        debian_bin_dir()
    except EmbeddedError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(error))
    with DebianPostgres() as server:
        yield server


class Encrypted:
    """A client of the server that has asked for TLS and got it."""

    def __init__(self, sock: socket.socket, server: DebianPostgres) -> None:
        self._socket = sock
        sock.sendall(messages.request(messages.SSL_REQUEST))
        assert sock.recv(1) == b"S"
        context = client_context("verify-full", server.tls.ca)
        self.filter = TlsFilter(context, server_side=False, server_hostname="localhost")
        self._plain = b""
        while not self.filter.established:
            self._read()

    def _read(self) -> None:
        self._socket.sendall(self.filter.pending())
        data = self._socket.recv(65_536)
        assert data
        self._plain += self.filter.receive(data)
        self._socket.sendall(self.filter.pending())

    def send(self, data: bytes) -> None:
        self._socket.sendall(self.filter.send(data))

    def message(self) -> tuple[bytes, bytes]:
        while len(self._plain) < 5 or len(self._plain) <= int.from_bytes(self._plain[1:5], "big"):
            self._read()
        length = int.from_bytes(self._plain[1:5], "big") + 1
        whole, self._plain = self._plain[:length], self._plain[length:]
        return whole[:1], whole[5:]


def log_in(server: DebianPostgres, *, offered: list[str] | None = None, wrong: bytes = b"") -> tuple[bytes, bytes]:
    """The server's last word. offered: what the client believes to be offered. wrong: added to the binding."""
    with socket.create_connection((server.host, server.port), timeout=20) as sock:
        client = Encrypted(sock, server)
        certificate = client.filter.peer_certificate
        assert certificate
        binding = server_end_point(certificate)
        assert binding
        client.send(packet([("user", server.user), ("database", server.database)]))
        kind, body = client.message()
        assert (kind, body[:4]) == (b"R", b"\0\0\0\x0a")
        names = [name.decode() for name in messages.cstrings(body[4:]) if name]
        assert names == [MECHANISM_PLUS, MECHANISM]
        exchange = ClientExchange(offered or names, binding=binding + wrong)
        first = exchange.first()
        client.send(messages.password(exchange.mechanism.encode() + b"\0" + len(first).to_bytes(4, "big") + first))
        kind, body = client.message()
        if kind == b"E":
            return kind, body
        exchange.challenge(body[4:])
        keys = Keys.of_password(server.password, exchange.salt, exchange.iterations)
        client.send(messages.password(exchange.final(keys)))
        kind, body = client.message()
        if kind == b"R":
            exchange.verify(body[4:])
            kind, body = client.message()
        return kind, body


@pytest.mark.debian_pg
def test_A14_the_server_lets_our_client_in_with_channel_binding(server: DebianPostgres) -> None:
    assert log_in(server) == (b"R", b"\0\0\0\0")


@pytest.mark.debian_pg
def test_A14_the_server_refuses_the_binding_of_another_certificate(server: DebianPostgres) -> None:
    kind, body = log_in(server, wrong=b"x")
    assert kind == b"E"
    assert told(body)["M"] == "SCRAM channel binding check failed"


@pytest.mark.debian_pg
def test_A14_the_server_finds_out_that_its_offer_was_taken_away(server: DebianPostgres) -> None:
    kind, body = log_in(server, offered=[MECHANISM])
    assert kind == b"E"
    assert told(body)["M"] == "SCRAM channel binding negotiation error"
