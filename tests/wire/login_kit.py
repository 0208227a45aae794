"""What the tests of the two log-in conversations are made of: peers to converse with, and a door to knock at."""

from __future__ import annotations

import asyncio
import functools
import random
import socket
import ssl
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import uvloop

from cenote.proxy.auth.keys import KeyCache
from cenote.proxy.config import Config, Database, config_of
from cenote.proxy.dial import dial
from cenote.proxy.inbox import Inbox
from cenote.proxy.login import Gate, Login, login
from cenote.proxy.peer import Peer
from cenote.testing.wire import Address
from cenote.wire import messages
from pool_kit import until

DEADLINE_S = 60.0
_LOOPS: tuple[Callable[[], asyncio.AbstractEventLoop], ...] = (asyncio.new_event_loop, uvloop.new_event_loop)


def on_both_loops(body: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    """A test whose body runs on asyncio and on uvloop, within a deadline; no task may be left, and nothing raised
    into the loop."""

    @functools.wraps(body)
    def test(*args: Any, **named: Any) -> None:
        for factory in _LOOPS:
            with asyncio.Runner(loop_factory=factory) as runner:
                runner.run(_whole(body(*args, **named)))

    return test


async def _whole(body: Awaitable[None]) -> None:
    loop = asyncio.get_running_loop()
    problems: list[Any] = []
    loop.set_exception_handler(lambda _, context: problems.append(context))
    async with asyncio.timeout(DEADLINE_S):
        await body
        # Transports that were told to close do so in the loop's next turns.
        while left := asyncio.all_tasks() - {asyncio.current_task()}:
            await asyncio.wait(left)
        for _ in range(3):
            await asyncio.sleep(0)
    assert problems == []


class CountingThreads(ThreadPoolExecutor):
    """Counts what it is given to do."""

    def __init__(self) -> None:
        super().__init__(2)
        self.given = 0

    def submit(self, *args: Any, **named: Any) -> Any:
        self.given += 1
        return super().submit(*args, **named)


def mutated(data: bytes, chance: random.Random) -> bytes:
    """Some bytes changed, inserted, dropped or repeated."""
    raw = bytearray(data)
    for _ in range(chance.randint(1, 4)):
        at = chance.randrange(len(raw))
        match chance.randrange(4):
            case 0:
                raw[at] = chance.choice((0, 1, 0x7F, 0xFF, chance.randrange(256)))
            case 1:
                raw[at:at] = chance.randbytes(chance.randint(1, 5))
            case 2:
                del raw[at : at + chance.randint(1, 5)]
            case 3:
                raw[at:at] = raw[at : at + chance.randint(1, 40)]
        raw = raw or bytearray(b"\0")
    return bytes(raw)


# -- a server connection --------------------------------------------------------------------------------------


class Dialed(Peer, asyncio.Protocol):
    """What `dial` makes in these tests: a connection on which a query can be asked."""

    def __init__(self) -> None:
        super().__init__()
        self.parameters: dict[bytes, bytes] = {}
        self.backend_pid = 0
        self.backend_secret = b""
        self.endpoint: Any = None
        self.version = 0
        self.early = b""
        self.over: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def received(self, data: bytes) -> None:
        self.early += data

    def gone(self, error: Exception | None) -> None:
        self.over.set_result(None)

    async def ask(self, sql: str) -> list[tuple[str, bytes]]:
        """The answer to a query, up to ReadyForQuery or the end of the connection."""
        self.inbox = Inbox(self.mute, self.unmute)
        self.inbox.feed(self.early)
        self.write(messages.query(sql))
        answer: list[tuple[str, bytes]] = []
        try:
            while not answer or answer[-1][0] != "Z":
                kind, body = await self.inbox.message()
                answer.append((chr(kind), body))
        except ConnectionResetError:
            pass
        self.inbox = None
        return answer

    async def value(self, sql: str) -> str | None:
        """The one value that a query returns."""
        row = next(body for kind, body in await self.ask(sql) if kind == "D")
        length = int.from_bytes(row[2:6], "big", signed=True)
        return None if length < 0 else row[6:].decode()

    async def leave(self) -> None:
        """Close and wait for the end."""
        if not self.lost:
            self.write(messages.TERMINATE)
            self.close()
        await self.over


def place(server: Any, **options: Any) -> Database:
    """A configured database: that of `server`, without TLS, but for what is given."""
    given = {"host": server.host, "port": server.port, "sslmode": "disable", **options}
    return config_of({"databases": {"x": given}, "users": {"x": {"password": "x"}}}).databases["x"]


async def dialed(
    server: Any,
    user: str = "",
    password: str | None = "",
    *,
    dbname: str = "",
    parameters: Mapping[bytes, bytes] | None = None,
    timeout: float = 10.0,
    keys: KeyCache | None = None,
    notice: Any = None,
    **options: Any,
) -> Dialed:
    """Dial `server`, as its own user if no other is given; options as `place`."""
    return await dial(
        Dialed,
        place(server, **options),
        user or server.user,
        server.password if password == "" else password,
        parameters or {},
        timeout,
        keys or KeyCache(),
        dbname=dbname or server.database,
        notice=notice,
    )


# -- a door ---------------------------------------------------------------------------------------------------


class _Visitor(Peer, asyncio.Protocol):
    """A client that arrives."""

    def __init__(self, door: Door) -> None:
        super().__init__()
        self.door = door
        self.over: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def made(self) -> None:
        self.inbox = Inbox(self.mute, self.unmute)
        self.door.visitors.append(self)
        self.task = asyncio.get_running_loop().create_task(self._admit())

    async def _admit(self) -> None:
        door = self.door
        try:
            outcome = await login(self, door.gate)
        except BaseException as error:
            outcome = error
            self.abort()
        door.outcomes.append(outcome)
        if isinstance(outcome, Login) and door.on_login is not None:
            await door.on_login(self, outcome)
        elif isinstance(outcome, Login) and not self.lost:
            self.write(
                messages.AUTHENTICATION_OK
                + messages.parameter_status("server_version", "18.0")
                + messages.parameter_status("client_encoding", "UTF8")
                + messages.parameter_status("standard_conforming_strings", "on")
                + messages.parameter_status("integer_datetimes", "on")
                + messages.backend_key_data(7, b"\1" * (32 if outcome.version >= messages.PROTOCOL_3_2 else 4))
                + messages.READY_IDLE
            )
        else:
            self.close()

    def gone(self, error: Exception | None) -> None:
        self.over.set_result(None)


class Door:
    """Listens, and lets clients log in; `outcomes` has what `login` returned or raised for each.

    users, databases, auth, tls_mode, admin_users: of the configuration. tls: the context for clients.
    on_login: what to do with a client that has logged in; default: welcome it.
    """

    def __init__(
        self,
        users: Mapping[str, Any],
        *,
        auth: str = "scram-sha-256",
        databases: tuple[str, ...] = ("db",),
        tls: ssl.SSLContext | None = None,
        tls_mode: str | None = None,
        admin_users: tuple[str, ...] = (),
        unix_dir: Path | None = None,
        keys: KeyCache | None = None,
        on_login: Callable[[Any, Login], Awaitable[Any]] | None = None,
    ) -> None:
        self.on_login = on_login
        self.gate = Gate(self._config(users, auth, databases, tls_mode, admin_users), tls, keys or KeyCache())
        self.outcomes: list[Any] = []
        self.visitors: list[_Visitor] = []
        self.unix_dir = unix_dir
        self.host = "127.0.0.1" if unix_dir is None else str(unix_dir)
        self.port = 0 if unix_dir is None else 5432

    @staticmethod
    def _config(users: Any, auth: str, databases: Any, tls_mode: str | None, admin_users: Any) -> Config:
        config = config_of(
            {
                "auth": auth,
                "databases": {name: {"host": "127.0.0.1"} for name in databases},
                "users": {
                    name: user if isinstance(user, Mapping) else {"password": user} for name, user in users.items()
                },
                "admin_users": list(admin_users),
            }
        )
        if tls_mode is not None:
            config = config.model_copy(update={"listen": config.listen.model_copy(update={"tls_mode": tls_mode})})
        return config

    @property
    def address(self) -> Address:
        return Address(self.host, self.port)

    async def __aenter__(self) -> Door:
        loop = asyncio.get_running_loop()
        if self.unix_dir is not None:
            self._server: Any = await loop.create_unix_server(
                lambda: _Visitor(self), str(self.unix_dir / f".s.PGSQL.{self.port}")
            )
        else:
            self._server = await loop.create_server(lambda: _Visitor(self), self.host, 0, family=socket.AF_INET)
            self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for visitor in self.visitors:
            visitor.abort()
        for visitor in self.visitors:
            visitor.task.cancel()
            await asyncio.wait([visitor.task])
            await visitor.over

    async def outcome(self, number: int = 0) -> Any:
        """What came of the n-th visitor."""
        await until(lambda: len(self.outcomes) > number, "a log-in to end")
        return self.outcomes[number]
