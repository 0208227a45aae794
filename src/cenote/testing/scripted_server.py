"""`ScriptedServer`: the server's side of PostgreSQL's protocol by script: what no real server can be made to do.

Log-ins, cancel requests and a small default session are here; a script is a coroutine that takes over after the
log-in, or at the first byte, and says what comes next: bad lengths, unknown types, silence, sudden ends. It runs
no SQL: the default session answers every query with one row, the number of the session and the text.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import ssl
import struct
from collections.abc import Awaitable, Callable, Mapping, Sequence
from types import TracebackType
from typing import Literal, Self, TypeVar

from cenote.testing.wire_login import ScramServer, md5_answer
from cenote.testing.wire_trace import Message, WireFailure
from cenote.wire import messages

Auth = Literal["trust", "password", "md5", "scram-sha-256"]
Script = Callable[["ServerEnd"], Awaitable[None]]

_T = TypeVar("_T")
TIMEOUT_S = 10.0
_AT_ONCE_RESET = struct.pack("ii", 1, 0)
PARAMETERS = {
    "server_version": "18.0",
    "server_encoding": "UTF8",
    "client_encoding": "UTF8",
    "DateStyle": "ISO, MDY",
    "IntervalStyle": "postgres",
    "TimeZone": "Etc/UTC",
    "integer_datetimes": "on",
    "standard_conforming_strings": "on",
    "is_superuser": "off",
    "session_authorization": "app",
    "application_name": "",
    "in_hot_standby": "off",
    "default_transaction_read_only": "off",
    "search_path": '"$user", public',
    "scram_iterations": "4096",
}


_EXTENDED = {
    "P": messages.PARSE_COMPLETE,
    "B": messages.BIND_COMPLETE,
    "C": messages.CLOSE_COMPLETE,
}


class PeerGone(Exception):
    """The other end closed. A script need not catch it: it ends the session."""


class ServerEnd:
    """One connection, as the scripted server sees it. On the event loop.

    number: counts log-ins of one server from 0. startup, version: what the client asked for. pid, secret: its key.
    heard: every message received. cancelled: set when a CancelRequest has come with its key. gone: it has ended.
    """

    def __init__(self, server: ScriptedServer, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.server = server
        self.reader = reader
        self.writer = writer
        self.number = -1
        self.version = 0
        self.startup: dict[str, str] = {}
        self.pid = 0
        self.secret = b""
        self.heard: list[Message] = []
        self.status = b"I"
        self.cancelled = asyncio.Event()
        self.gone = asyncio.Event()

    @property
    def secure(self) -> bool:
        """Whether it is encrypted."""
        return self.writer.get_extra_info("ssl_object") is not None

    # -- words of a script ----------------------------------------------------------------

    def send(self, *data: bytes) -> None:
        """Hand bytes to the transport; whoever wants to know that they are out awaits `flushed`."""
        self.writer.write(b"".join(data))

    async def flushed(self) -> None:
        """Wait while the other end does not read."""
        await self._in_time(self.writer.drain(), "room to send")

    async def exactly(self, count: int) -> bytes:
        """The next bytes. Raises `PeerGone`."""
        return await self._in_time(self.reader.readexactly(count), f"{count} bytes", forever=True)

    async def receive(self) -> Message:
        """The next message; it may take any time, since clients may idle. Raises `PeerGone`."""
        head = await self.exactly(5)
        body = await self.exactly(int.from_bytes(head[1:], "big") - 4)
        self.heard.append(Message(chr(head[0]), body))
        return self.heard[-1]

    async def expect(self, kinds: str) -> bytes:
        """The bodies, joined, of the next messages, which must be of these types, one character each."""
        bodies = []
        for kind in kinds:
            message = await self.receive()
            if message.kind != kind:
                raise WireFailure(f"the script expected {kind!r} of {kinds!r}, got {message}")
            bodies.append(message.body)
        return b"".join(bodies)

    async def ended(self) -> list[Message]:
        """Wait for the other end to say goodbye or to be gone; returns what it sent before."""
        before = len(self.heard)
        with contextlib.suppress(PeerGone):
            while (await self.receive()).kind != "X":
                pass
        return self.heard[before:]

    def close(self) -> None:
        """Close with FIN."""
        self.writer.close()

    def reset(self) -> None:
        """Close with RST."""
        sock = self.writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _AT_ONCE_RESET)
        self.writer.transport.abort()

    async def silent(self) -> None:
        """Read nothing and say nothing until the server is closed: a host behind a broken firewall."""
        self.writer.transport.pause_reading()  # type: ignore[attr-defined]
        await asyncio.Event().wait()

    # -- the default session ----------------------------------------------------------------

    async def serve(self) -> None:
        """Answer until the client leaves."""
        while await self.serve_one():
            pass

    async def serve_one(self) -> bool:
        """Answer one message; False at Terminate."""
        kind, body = await self.receive()
        if kind == "X":
            return False
        if kind == "Q":
            self.answer(body[:-1].decode())
        else:
            self.send(_EXTENDED.get(kind, b""))
            if kind == "S":
                self.send(messages.ready(self.status))
            elif kind == "D":
                self.send(messages.row_description([("answer", 25)]))
            elif kind == "E":
                self.send(self.row(""), messages.command_complete("SELECT 1"))
        return True

    def answer(self, sql: str) -> None:
        """The answer to a Query, ReadyForQuery included."""
        word = sql.split(maxsplit=1)[0].rstrip(";").upper() if sql.split() else ""
        if word in ("BEGIN", "COMMIT", "ROLLBACK"):
            self.status = b"T" if word == "BEGIN" else b"I"
            self.send(messages.command_complete(word))
        else:
            self.send(messages.row_description([("answer", 25)]), self.row(sql))
            self.send(messages.command_complete("SELECT 1"))
        self.send(messages.ready(self.status))

    def row(self, text: str) -> bytes:
        """The one DataRow."""
        return messages.data_row([f"{self.number}: {text}".encode()])

    # -- the log-in ----------------------------------------------------------------

    async def converse(self) -> bool:
        """From the first byte to ReadyForQuery; False when it was only a CancelRequest."""
        while True:
            length, code = struct.unpack("!II", await self.exactly(8))
            rest = await self.exactly(length - 8)
            if code == messages.SSL_REQUEST:
                self.send(self.server.ssl)
                if self.server.ssl == b"S" and self.server.tls is not None:
                    await self.writer.start_tls(self.server.tls)
            elif code == messages.GSSENC_REQUEST:
                self.send(b"N")
            elif code == messages.CANCEL_REQUEST:
                self.pid, self.secret = int.from_bytes(rest[:4], "big", signed=True), rest[4:]
                self.server.cancels.append((self.pid, self.secret))
                for session in self.server.sessions:
                    if (session.pid, session.secret) == (self.pid, self.secret):
                        session.cancelled.set()
                if self.server.on_cancel is not None:
                    await self.server.on_cancel(self)
                return False
            else:
                self.version = code
                texts = [text.decode() for text in messages.cstrings(rest[:-1])] if len(rest) > 1 else []
                self.startup = dict(zip(texts[::2], texts[1::2], strict=True))
                await self.log_in()
                return True

    async def log_in(self) -> None:
        """Negotiate, authenticate, welcome."""
        unknown = [name for name in self.startup if name.startswith("_pq_.")]
        if self.version > self.server.version or unknown:
            self.version = min(self.version, self.server.version)
            self.send(messages.negotiate_protocol_version(self.version, unknown))
        try:
            await self._authenticate()
        except WireFailure as failure:
            self.send(messages.error("FATAL", "28P01", str(failure)))
            self.close()
            raise PeerGone from None
        self.welcome()

    def welcome(self, *, but: str = "") -> None:
        """AuthenticationOk, ParameterStatus, BackendKeyData, ReadyForQuery; `but` leaves out these types."""
        self.number = len(self.server.sessions)
        self.server.sessions.append(self)
        self.pid = 4_000 + self.number
        self.secret = os.urandom(self.server.secret_bytes)
        statuses = b"".join(messages.parameter_status(*item) for item in self.server.parameters.items())
        parts = {
            "R": messages.AUTHENTICATION_OK,
            "S": statuses,
            "K": messages.backend_key_data(self.pid, self.secret),
            "Z": messages.READY_IDLE,
        }
        self.send(*(part for kind, part in parts.items() if kind not in but))

    async def _authenticate(self) -> None:
        server = self.server
        if server.auth == "password":
            self.send(messages.AUTHENTICATION_CLEARTEXT)
            answer, right = await self.expect("p"), server.password.encode() + b"\0"
        elif server.auth == "md5":
            salt = os.urandom(4)
            self.send(messages.authentication_md5(salt))
            answer = await self.expect("p")
            right = md5_answer(self.startup["user"], server.password, salt) + b"\0"
        elif server.auth == "scram-sha-256":
            scram = ScramServer(server.password)
            self.send(messages.authentication_sasl(["SCRAM-SHA-256"]))
            first = await self.expect("p")
            self.send(messages.authentication_sasl_continue(scram.first(first.split(b"\0", 1)[1][4:])))
            self.send(messages.authentication_sasl_final(scram.final(await self.expect("p"))))
            return
        else:
            return
        if answer != right:
            raise WireFailure("wrong password")

    # -- waiting ----------------------------------------------------------------

    async def _in_time(self, step: Awaitable[_T], what: str, *, forever: bool = False) -> _T:
        try:
            async with asyncio.timeout(None if forever else TIMEOUT_S):
                return await step
        except TimeoutError:
            raise WireFailure(f"the script waited for {what} in vain; heard {self.heard[-5:]}") from None
        except (asyncio.IncompleteReadError, ConnectionError):
            raise PeerGone from None


async def default(session: ServerEnd) -> None:
    """The script of a well-behaved session."""
    await session.serve()


class ScriptedServer:
    """Listens on loopback; each log-in is a `ServerEnd` and runs its script.

    scripts: called after the log-in: the n-th session runs the n-th, those after the last run the last.
    on_connect: called at the first byte instead of the log-in; it may call `converse` and `welcome` itself.
    on_cancel: called with a CancelRequest's connection, which closes when it returns.
    auth, user, password, database: how clients log in, and for tests to tell them; the database is not checked.
    version: the newest protocol. secret_bytes: length of the key's secret, 4 in protocol 3.0.
    ssl: the answer to SSLRequest. tls: the context behind S. direct: speak TLS from the first byte.

    Use it with `async with`; leaving it raises what a script raised.
    """

    def __init__(
        self,
        *scripts: Script,
        on_connect: Script | None = None,
        on_cancel: Script | None = None,
        auth: Auth = "trust",
        password: str = "scripted",
        version: int = messages.PROTOCOL_3_0,
        secret_bytes: int = 4,
        parameters: Mapping[str, str] = PARAMETERS,
        ssl: bytes = b"N",
        tls: ssl.SSLContext | None = None,
        direct: bool = False,
    ) -> None:
        self.scripts: Sequence[Script] = scripts or (default,)
        self.on_connect = on_connect
        self.on_cancel = on_cancel
        self.auth = auth
        self.user = self.database = "app"
        self.password = password
        self.version = version
        self.secret_bytes = secret_bytes
        self.parameters = dict(parameters)
        self.ssl = ssl
        self.tls = tls
        self.direct = direct
        self.host = "127.0.0.1"
        self.port = 0
        self.connections: list[ServerEnd] = []
        self.sessions: list[ServerEnd] = []
        self.cancels: list[tuple[int, bytes]] = []
        self.problems: list[BaseException] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._listener: asyncio.Server | None = None

    async def __aenter__(self) -> Self:
        await self.listen()
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()
        if exc is None and self.problems:
            raise self.problems[0]

    async def listen(self) -> None:
        """Listen: on a free port at first, on the same one after `refuse`."""
        self._listener = await asyncio.start_server(
            self._accept, self.host, self.port, ssl=self.tls if self.direct else None
        )
        self.port = self._listener.sockets[0].getsockname()[1]

    def refuse(self) -> None:
        """Stop listening: new connections are refused, open ones go on."""
        if self._listener is not None:
            self._listener.close()

    async def close(self) -> None:
        """Stop listening and abort all that is open."""
        self.refuse()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def open(self) -> list[ServerEnd]:
        """The sessions whose client has not left."""
        return [session for session in self.sessions if not session.gone.is_set()]

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        end = ServerEnd(self, reader, writer)
        self.connections.append(end)
        try:
            if self.on_connect is not None:
                await self.on_connect(end)
            elif await end.converse():
                await self.scripts[min(end.number, len(self.scripts) - 1)](end)
        except (PeerGone, ssl.SSLError):
            pass  # who does not trust us goes away
        except asyncio.CancelledError:
            writer.transport.abort()
        except Exception as problem:
            self.problems.append(problem)
        finally:
            end.gone.set()
            with contextlib.suppress(ConnectionError):
                writer.close()
