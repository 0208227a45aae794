"""`RawClient`: PostgreSQL's protocol by hand, message by message, for tests of whoever speaks it at the other end.

Every wait has a deadline and fails with what had come until then. Scripts of raw messages are played against two
servers and their traces compared. It knows no SQL and no types, and it never repairs or skips what it is sent.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import struct
import weakref
from collections import deque
from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, ClassVar, Literal, NamedTuple, Self, TypeVar

from cenote.testing.wire_login import Scram, certificate_hash, md5_answer
from cenote.testing.wire_trace import (
    Message,
    WireFailure,
    error,
    errors,
    kinds,
    login_trace,
    normalised,
    rows,
    value,
)
from cenote.wire import messages

__all__ = [
    "END",
    "Address",
    "LoginRefused",
    "Message",
    "RawClient",
    "Scram",
    "Step",
    "WireFailure",
    "certificate_hash",
    "error",
    "errors",
    "kinds",
    "login_trace",
    "md5_answer",
    "normalised",
    "play",
    "ready",
    "rows",
    "send_cancel",
    "unchecked_context",
    "until",
    "value",
]

TIMEOUT_S = 10.0
_AT_ONCE_RESET = struct.pack("ii", 1, 0)  # SO_LINGER on with no time: close() sends RST
_T = TypeVar("_T")


class Address(NamedTuple):
    """Where a server listens; a `host` that begins with a slash is the directory of a Unix socket, as in libpq."""

    host: str
    port: int


class LoginRefused(WireFailure):
    """An ErrorResponse instead of a log-in: `fields` by their letter, `before` what came before it."""

    def __init__(self, text: str, fields: dict[str, str], before: list[Message]) -> None:
        super().__init__(text)
        self.fields = fields
        self.before = before


# -- the client --------------------------------------------------------------------------------------------


class RawClient:
    """One connection, driven by hand. On the event loop.

    timeout: seconds for each wait. `key` is (process id, secret) once BackendKeyData has come, `parameters` what
    ParameterStatus said last, `heard` the last messages received. `live` has those that are not closed.
    """

    live: ClassVar[weakref.WeakSet[RawClient]] = weakref.WeakSet()

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, timeout: float) -> None:
        self.reader = reader
        self.writer = writer
        self.timeout = timeout
        self.key: tuple[int, bytes] = (0, b"")
        self.parameters: dict[str, str] = {}
        self.heard: deque[Message] = deque(maxlen=40)
        self.live.add(self)

    @classmethod
    async def connect(
        cls,
        address: Address | tuple[str, int],
        *,
        tls: Literal["postgres", "direct"] | None = None,
        context: ssl.SSLContext | None = None,
        timeout: float = TIMEOUT_S,
    ) -> RawClient:
        """Connect; with `tls`, shake hands after an SSLRequest or at once.

        context: default: one that checks nothing and, for "direct", offers ALPN `postgresql`.

        :raises OSError, ssl.SSLError: nobody listens; the handshake failed.
        :raises WireFailure: the answer to SSLRequest is not S; nothing within `timeout`.
        """
        host, port = address
        if tls is not None and context is None:
            context = unchecked_context(*(["postgresql"] if tls == "direct" else []))
        at_once: dict[str, Any] = {"ssl": context, "server_hostname": "localhost"} if tls == "direct" else {}
        try:
            async with asyncio.timeout(timeout):
                if host.startswith("/"):
                    reader, writer = await asyncio.open_unix_connection(f"{host}/.s.PGSQL.{port}", **at_once)
                else:
                    reader, writer = await asyncio.open_connection(host, port, **at_once)
                client = cls(reader, writer, timeout)
                if tls == "postgres":
                    assert context is not None
                    await client.negotiate_tls(context)
        except TimeoutError:
            raise WireFailure(f"no connection to {host}:{port} within {timeout:g} s") from None
        return client

    async def negotiate_tls(self, context: ssl.SSLContext) -> None:
        """SSLRequest and the handshake."""
        answer = await self.request(messages.SSL_REQUEST)
        if answer != b"S":
            await self.abort()
            raise WireFailure(f"the answer to SSLRequest is {answer!r}")
        await self.writer.start_tls(context, server_hostname="localhost", ssl_handshake_timeout=self.timeout)

    async def request(self, code: int) -> bytes:
        """Send SSLRequest or GSSENCRequest and return the one byte of the answer."""
        self.feed(messages.request(code))
        return await self.exactly(1)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.abort()

    # -- out ------------------------------------------------------------------------------------------------

    def feed(self, *data: bytes) -> None:
        """Hand bytes to the transport and wait for nothing, however many they are."""
        self.writer.write(b"".join(data))

    async def send(self, *data: bytes) -> None:
        """Send, and wait while the other end does not read."""
        self.feed(*data)
        await self._in_time(self.writer.drain(), "room to send")

    async def send_in_pieces(self, data: bytes, size: int = 1) -> None:
        """Send so many bytes at a time, each a write of its own."""
        for at in range(0, len(data), size):
            self.feed(data[at : at + size])
            await asyncio.sleep(0)
        await self._in_time(self.writer.drain(), "room to send")

    # -- in -------------------------------------------------------------------------------------------------

    async def exactly(self, count: int) -> bytes:
        """The next bytes, whatever they are."""
        return await self._in_time(self.reader.readexactly(count), f"{count} bytes")

    async def receive(self) -> Message:
        """The next message."""
        return await self._in_time(self._receive(), "a message")

    async def until(self, *wanted: str) -> list[Message]:
        """All messages up to the first of one of these types."""
        trace = [await self.receive()]
        while trace[-1].kind not in wanted:
            trace.append(await self.receive())
        return trace

    async def until_ready(self) -> list[Message]:
        """All messages up to the next ReadyForQuery, with it."""
        return await self.until("Z")

    async def trace(self, n_ready: int = 1) -> list[Message]:
        """All messages up to the n-th ReadyForQuery from here."""
        return [message for _ in range(n_ready) for message in await self.until_ready()]

    async def query(self, sql: str) -> list[Message]:
        """Send one Query and return its answer."""
        await self.send(messages.query(sql))
        return await self.until_ready()

    async def closed(self) -> list[Message]:
        """All messages until the other end closes the connection, which it must do in time."""
        trace = await self._in_time(self._to_the_end(), "the end of the connection")
        await self.close()
        return trace

    async def rest(self) -> bytes:
        """All bytes until the other end closes the connection, which it must do in time."""
        data = await self._in_time(self._rest(), "the end of the connection")
        await self.close()
        return data

    async def _rest(self) -> bytes:
        data = b""
        with contextlib.suppress(ConnectionError):
            while chunk := await self.reader.read(65_536):
                data += chunk
        return data

    async def _receive(self) -> Message:
        head = await self.reader.readexactly(5)
        length = int.from_bytes(head[1:], "big")
        if length < 4:
            raise WireFailure(f"a message of type {head[:1]!r} claims {length} bytes{self._heard()}")
        message = Message(chr(head[0]), await self.reader.readexactly(length - 4))
        self.heard.append(message)
        if message.kind == "K":
            self.key = (int.from_bytes(message.body[:4], "big", signed=True), message.body[4:])
        elif message.kind == "S":
            name, text = message.body[:-1].split(b"\0")
            self.parameters[name.decode()] = text.decode("utf-8", "replace")
        return message

    async def _to_the_end(self) -> list[Message]:
        trace = []
        try:
            while True:
                trace.append(await self._receive())
        except asyncio.IncompleteReadError as gone:
            if gone.partial:
                raise WireFailure(f"closed inside a message, after {gone.partial!r}{self._heard()}") from None
        except ConnectionError:
            pass
        return trace

    async def _in_time(self, step: Awaitable[_T], what: str) -> _T:
        try:
            async with asyncio.timeout(self.timeout):
                return await step
        except TimeoutError:
            raise WireFailure(f"{what} expected, nothing within {self.timeout:g} s{self._heard()}") from None
        except (asyncio.IncompleteReadError, ConnectionError) as gone:
            raise WireFailure(f"{what} expected, but the other end is gone ({gone}){self._heard()}") from None

    def _heard(self) -> str:
        lines = [
            f"{message.kind} {message.fields if message.kind in 'EN' else message.body[:60]!r}"
            for message in self.heard
        ]
        return "; it had sent:" + "".join(f"\n  {line}" for line in lines or ["nothing"])

    # -- the log-in -----------------------------------------------------------------------------------------

    async def startup(
        self,
        user: str,
        database: str = "",
        password: str = "",
        params: Mapping[str, str] | None = None,
        version: int = messages.PROTOCOL_3_0,
        *,
        scram: Scram | None = None,
    ) -> list[Message]:
        """Log in, by whatever the server asks for, and return all messages up to the first ReadyForQuery.

        :raises LoginRefused: the server sent an error instead.
        """
        names = {"user": user} | ({"database": database} if database else {})
        await self.send(messages.startup([*names.items(), *(params or {}).items()], version))
        return await self.authenticate(user, password, scram=scram)

    async def authenticate(self, user: str, password: str, *, scram: Scram | None = None) -> list[Message]:
        """The log-in behind the startup packet."""
        trace: list[Message] = []
        while not trace or trace[-1].kind != "Z":
            message = await self.receive()
            trace.append(message)
            if message.kind == "E":
                raise LoginRefused(f"refused: {message.fields}", message.fields, trace[:-1])
            if message.kind == "R":
                code, data = int.from_bytes(message.body[:4], "big"), message.body[4:]
                if code == 3:
                    await self.send(messages.password(password.encode() + b"\0"))
                elif code == 5:
                    await self.send(messages.password(md5_answer(user, password, data) + b"\0"))
                elif code == 10:
                    scram = scram or Scram(password)
                    first = scram.first()
                    chosen = b"SCRAM-SHA-256" + (b"-PLUS" if scram.binding else b"")
                    await self.send(messages.password(chosen + b"\0" + struct.pack("!I", len(first)) + first))
                elif code == 11:
                    assert scram is not None
                    await self.send(messages.password(scram.final(data)))
                elif code == 12:
                    assert scram is not None
                    scram.verify(data)
                elif code != 0:
                    raise WireFailure(f"the server asks for authentication {code}")
        return trace

    async def refusal(self, *args: Any, **named: Any) -> dict[str, str]:
        """The error with which the log-in (parameters as `startup`) is refused, after which nothing may come."""
        try:
            trace = await self.startup(*args, **named)
        except LoginRefused as refused:
            rest = await self.closed()
            if rest:
                raise WireFailure(f"after the refusal came {rest}") from None
            return refused.fields
        raise WireFailure(f"it was let in: {kinds(trace)}")

    # -- ends -----------------------------------------------------------------------------------------------

    async def terminate(self) -> None:
        """Terminate and close, as a well-behaved client does."""
        with contextlib.suppress(ConnectionError):
            self.feed(messages.TERMINATE)
        await self.close()

    async def close(self) -> None:
        """Close without a word: FIN."""
        self.live.discard(self)
        self.writer.close()
        with contextlib.suppress(ConnectionError, ssl.SSLError, TimeoutError):
            async with asyncio.timeout(self.timeout):
                await self.writer.wait_closed()

    async def reset(self) -> None:
        """Close with RST, as a crashed peer's kernel does."""
        sock = self.writer.get_extra_info("socket")
        if sock is not None and sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _AT_ONCE_RESET)
        await self.abort()

    async def abort(self) -> None:
        """Close now, whatever is unsent."""
        self.writer.transport.abort()
        await self.close()


def unchecked_context(*alpn: str) -> ssl.SSLContext:
    """A client's TLS that trusts everybody."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    if alpn:
        context.set_alpn_protocols(alpn)
    return context


async def send_cancel(
    address: Address | tuple[str, int], key: tuple[int, bytes], *, timeout: float = TIMEOUT_S, **tls: Any
) -> bytes:
    """Send a CancelRequest on a connection of its own and wait for its end; returns what was answered: nothing."""
    async with await RawClient.connect(address, timeout=timeout, **tls) as client:
        client.feed(messages.cancel_request(*key))
        return await client.rest()


# -- scripts --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ready:  # noqa: N801  (a step reads as a word)
    """Step: wait for so many ReadyForQuery."""

    count: int = 1


@dataclass(frozen=True, slots=True)
class until:  # noqa: N801
    """Step: wait for a message of one of these types."""

    kinds: str


class _End:
    def __repr__(self) -> str:
        return "END"


#: Step: wait until the other end closes.
END = _End()
Step = bytes | ready | until | _End


async def play(client: RawClient, steps: Sequence[Step], *, pieces: int = 0) -> list[Message]:
    """Send what is bytes, wait for what is not, and return all that came.

    pieces: send so many bytes at a time.
    """
    trace: list[Message] = []
    for step in steps:
        if isinstance(step, bytes):
            if pieces:
                await client.send_in_pieces(step, pieces)
            else:
                await client.send(step)
        elif isinstance(step, ready):
            trace += await client.trace(step.count)
        elif isinstance(step, until):
            trace += await client.until(*step.kinds)
        else:
            trace += await client.closed()
    return trace
