"""Thousands of clients on ten server connections: nobody is refused, nobody overtakes, and the server never sees
more than the bound.

The proxy is a process of its own, `cenote serve --config`, with its own limit of open files. It trusts its clients
here: what is counted are connections, and 5,000 SCRAM proofs in this process would only take time.
"""

from __future__ import annotations

import asyncio
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, closing, contextmanager
from decimal import Decimal
from pathlib import Path
from typing import Any

import psycopg
import pytest
import uvloop

from cenote import embedded
from cenote.embedded.places import free_port
from cenote.testing.postgres import wait_until
from cenote.wire import messages

MAX_SIZE = 10
ROUNDS = 3  # transactions of each active client
AT_ONCE = 200  # log-ins under way
DEADLINE_S = 120.0
#: Which of them came first. (A sequence would do, but whoever asks it is pinned, for `currval`.)
WHEN = "SELECT extract(epoch FROM clock_timestamp())"


class Client(asyncio.Protocol):
    """As little of a client as does: simple queries, one at a time."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._values: list[str] = []
        self._error = ""
        self._answer: asyncio.Future[list[str]] = asyncio.get_running_loop().create_future()
        self._transport: Any = None

    @classmethod
    async def connect(cls, port: int, user: str, database: str) -> Client:
        loop = asyncio.get_running_loop()
        transport, client = await loop.create_connection(cls, "127.0.0.1", port)
        transport.write(messages.startup([("user", user), ("database", database)]))
        await client._answer
        return client

    def ask(self, sql: str) -> asyncio.Future[list[str]]:
        """The first column of all rows."""
        self._values, self._error = [], ""
        self._answer = asyncio.get_running_loop().create_future()
        self._transport.write(messages.query(sql))
        return self._answer

    def close(self) -> None:
        self._transport.write(messages.TERMINATE)
        self._transport.close()

    # -- asyncio's protocol -----------------------------------------------------------------------------------

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        buffer = self._buffer
        buffer += data
        while len(buffer) >= 5 and len(buffer) > (length := int.from_bytes(buffer[1:5], "big")):
            kind, body = buffer[:1], bytes(buffer[5 : length + 1])
            del buffer[: length + 1]
            if kind == b"D":
                size = int.from_bytes(body[2:6], "big", signed=True)
                self._values.append(body[6 : 6 + size].decode() if size >= 0 else "")
            elif kind == b"E":
                self._error = str(messages.error_fields(body))
                if "FATAL" in self._error:
                    self._end()
            elif kind == b"Z":
                self._end()

    def connection_lost(self, error: Exception | None) -> None:
        self._error = self._error or f"connection lost: {error!r}"
        self._end()

    def _end(self) -> None:
        if self._answer.done():
            return
        if self._error:
            self._answer.set_exception(AssertionError(self._error))
        else:
            self._answer.set_result(self._values)


class Sampler:
    """Counts the server's client sessions again and again, over a connection opened beforehand."""

    def __init__(self, server: embedded.Postgres) -> None:
        self.peak = 0
        self.samples = 0
        self._conn = psycopg.connect(server.superuser_dsn, autocommit=True)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="sampler")

    def __enter__(self) -> Sampler:
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._ended.set()
        self._thread.join()
        self._conn.close()

    def _run(self) -> None:
        count = (
            "SELECT count(*) FROM pg_stat_activity"
            " WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()"
        )
        while not self._ended.wait(0.002):
            (found,) = self._conn.execute(count).fetchone() or (0,)
            self.peak = max(self.peak, found)
            self.samples += 1


@contextmanager
def served(server: embedded.Postgres, folder: Path, max_size: int) -> Iterator[int]:
    """`cenote serve` before `server`; yields its port, and asserts that it ends well and complains of nothing."""
    port = free_port()
    text = json.dumps  # a JSON string is a TOML string
    config = folder / "cenote.toml"
    config.write_text(
        f'auth = "trust"\nlog_level = "warning"\n[listen]\nport = {port}\nmax_clients = 6000\n'
        f"[databases.{server.database}]\nhost = {text(server.host)}\nport = {server.port}\nmax_size = {max_size}\n"
        f"[users.{server.user}]\npassword = {text(server.password)}\n"
    )
    log_path = folder / "cenote.log"
    with open(log_path, "wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "cenote.cli", "serve", "--config", str(config)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )

    def answers() -> bool:
        assert process.poll() is None, log_path.read_text()
        try:
            psycopg.connect(f"{server.dsn.rsplit(':', 1)[0]}:{port}/{server.database}").close()
        except psycopg.OperationalError:
            return False
        return True

    try:
        wait_until(answers, timeout=20, what="cenote serve to answer")
        yield port
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0, log_path.read_text()
    finally:
        process.kill()
        process.wait()
    said = log_path.read_text()
    assert "Traceback" not in said, said
    assert "Exception" not in said, said


@pytest.fixture(scope="module")
def server() -> Iterator[embedded.Postgres]:
    with embedded.Postgres(18, settings={"max_connections": 20}) as server:
        yield server


@asynccontextmanager
async def arrived(server: embedded.Postgres, port: int, count: int) -> AsyncIterator[list[Client]]:
    """So many clients, logged in; they leave at the end."""
    door = asyncio.Semaphore(AT_ONCE)

    async def one() -> Client:
        async with door:
            return await Client.connect(port, server.user, server.database)

    clients = await asyncio.gather(*(one() for _ in range(count)))
    try:
        yield clients
    finally:
        for client in clients:
            client.close()


def run(server: embedded.Postgres, port: int, count: int, body: Callable[[list[Client]], Awaitable[None]]) -> None:
    """Run with so many clients on uvloop, with room for all sockets."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))

    async def main() -> None:
        async with asyncio.timeout(DEADLINE_S), arrived(server, port, count) as clients:
            await body(clients)

    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(main())
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize(("connected", "active"), [(500, 100), (5000, 1000)])
def test_a_crowd_is_served_on_ten_connections_and_the_server_never_sees_more(
    server: embedded.Postgres, tmp_path: Path, connected: int, active: int
) -> None:
    if connected + 100 > resource.getrlimit(resource.RLIMIT_NOFILE)[1]:
        pytest.fail(f"RLIMIT_NOFILE's hard limit is too low for {connected} clients")
    log_before = len(server.log())

    async def transactions(number: int, client: Client) -> None:
        for turn in range(ROUNDS):
            await client.ask("BEGIN")
            assert await client.ask(f"SELECT '{number}/{turn}'") == [f"{number}/{turn}"]
            await client.ask("COMMIT")
            assert await client.ask(f"SELECT 'alone {number}/{turn}'") == [f"alone {number}/{turn}"]

    async def crowd(clients: list[Client]) -> None:
        holders, rest = clients[:MAX_SIZE], clients[MAX_SIZE:]

        # All at once, while every connection is held; then in the order they came.
        for holder in holders:
            await holder.ask("BEGIN")
        line = [client.ask(WHEN) for client in rest[:active]]
        await asyncio.gather(*(holder.ask("COMMIT") for holder in holders))
        times = [Decimal((await answer)[0]) for answer in line]
        places = {came: place for place, came in enumerate(sorted(range(active), key=times.__getitem__))}
        # Ten are served at once, and the kernel may let a backend wait while the others serve a hundred.
        near = sum(abs(place - came) <= 3 * MAX_SIZE for came, place in places.items())
        assert near >= 0.8 * active, places

        await asyncio.gather(*(transactions(n, client) for n, client in enumerate(rest[:active])))
        # Those who have only looked on are connected all the same.
        seen = await asyncio.gather(*(client.ask(f"SELECT {n}") for n, client in enumerate(clients)))
        assert seen == [[str(n)] for n in range(connected)]

    with Sampler(server) as sampler, served(server, tmp_path, MAX_SIZE) as port:
        began = time.monotonic()
        run(server, port, connected, crowd)
        print(f"{connected} clients: {time.monotonic() - began:.1f} s, peak {sampler.peak}, pid {os.getpid()}")
        with closing(psycopg.connect(f"{server.dsn.rsplit(':', 1)[0]}:{port}/{server.database}")) as later:
            assert later.execute("SELECT 'still there'").fetchone() == ("still there",)
    assert sampler.samples > 100
    assert sampler.peak == MAX_SIZE
    said = server.log()[log_before:]
    assert "too many" not in said
    assert "remaining connection slots" not in said


def test_on_one_connection_everybody_is_served_in_the_order_they_came(
    server: embedded.Postgres, tmp_path: Path
) -> None:
    async def line(everybody: list[Client]) -> None:
        holder, *clients = everybody
        for _ in range(3):
            await holder.ask("BEGIN")
            answers = [client.ask(WHEN) for client in clients]
            await holder.ask("COMMIT")
            times = [Decimal((await answer)[0]) for answer in answers]
            assert times == sorted(times)

    with served(server, tmp_path, 1) as port:
        run(server, port, 301, line)
