"""What the tests of groups B and D share: a client's messages, one builder each, and company, so that a script is
played where other clients use the same server connections, the same names and the same unnamed statement.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import struct
from collections.abc import AsyncIterator, Sequence
from typing import Any

import psutil
from proxy_kit import Differential, RunningProxy

from cenote import embedded
from cenote.testing.wire import Message, RawClient, Step, error, kinds, ready, rows, value
from cenote.wire import messages

INT4, TEXT = 23, 25
SYNC, FLUSH = messages.SYNC, messages.FLUSH
COPY_DONE = messages.message(b"c")
query, copy_fail = messages.query, messages.copy_fail

_int16 = struct.Struct("!h").pack
_int32 = struct.Struct("!i").pack
_uint32 = struct.Struct("!I").pack

# -- messages ------------------------------------------------------------------------------------------------


def parse(name: str, sql: str, *types: int) -> bytes:
    """Parse, with the types of parameters by OID."""
    tail = messages.cstring(sql) + _int16(len(types)) + b"".join(map(_uint32, types))
    return messages.parse(name.encode(), tail)


def _values(values: Sequence[str | bytes | None]) -> bytes:
    body = _int16(len(values))
    for given in values:
        raw = given.encode() if isinstance(given, str) else given
        body += _int32(-1) if raw is None else _int32(len(raw)) + raw
    return body


def bind(statement: str = "", *values: str | bytes | None, portal: str = "", results: Sequence[int] = ()) -> bytes:
    """Bind in text format; `results` are the formats of the columns."""
    body = messages.cstring(portal) + messages.cstring(statement) + _int16(0) + _values(values)
    return messages.message(b"B", body + _int16(len(results)) + b"".join(map(_int16, results)))


def describe(name: str = "") -> bytes:
    """Describe of a statement."""
    return messages.message(b"D", b"S" + messages.cstring(name))


def describe_portal(name: str = "") -> bytes:
    """Describe of a portal."""
    return messages.message(b"D", b"P" + messages.cstring(name))


def execute(portal: str = "", limit: int = 0) -> bytes:
    """Execute, of so many rows at most."""
    return messages.message(b"E", messages.cstring(portal) + _int32(limit))


def close(name: str = "") -> bytes:
    """Close of a statement."""
    return messages.close_statement(name.encode())


def close_portal(name: str = "") -> bytes:
    """Close of a portal."""
    return messages.message(b"C", b"P" + messages.cstring(name))


def call(function: int, *values: str | bytes | None, form: int = 0) -> bytes:
    """FunctionCall, everything in the same format."""
    body = _uint32(function) + _int16(1) + _int16(form) + _values(values) + _int16(form)
    return messages.message(b"F", body)


def data(*lines: str) -> bytes:
    """CopyData, one message for each line."""
    return b"".join(messages.message(b"d", line.encode() + b"\n") for line in lines)


def run(sql: str, *values: str | bytes | None, name: str = "", types: Sequence[int] = ()) -> bytes:
    """Parse, Bind, Describe and Execute of one text: all but the Sync."""
    return parse(name, sql, *types) + again(name, *values)


def again(name: str = "", *values: str | bytes | None) -> bytes:
    """Bind, Describe and Execute of what was parsed before."""
    return bind(name, *values) + describe_portal() + execute()


# -- company -------------------------------------------------------------------------------------------------


class Neighbour:
    """Another client of the same pool, that uses the names that scripts use, for texts of its own.

    Every answer that it gets must be the one to its own question: it carries its mark.
    """

    def __init__(self, client: RawClient, mark: str) -> None:
        self.client = client
        self.mark = mark
        self.turns = 0

    async def go_on(self, ended: asyncio.Event) -> None:
        """Work until the script is over."""
        await self._prepare()
        while not ended.is_set():
            for work in (self._named, self._unnamed, self._simple, self._transaction, self._failing):
                await work(f"{self.mark} {self.turns}")
                self.turns += 1

    async def _ask(self, *parts: bytes, n_ready: int = 1) -> list[Message]:
        await self.client.send(*parts)
        return await self.client.trace(n_ready)

    async def _prepare(self) -> None:
        parts = [parse(name, f"SELECT '{self.mark}' || '{name}' || $1") for name in ("s", "a", "b")]
        assert kinds(await self._ask(*parts, SYNC)) == "111Z"

    async def _named(self, text: str) -> None:
        answer = await self._ask(*(again(name, text) for name in "sab"), SYNC)
        assert kinds(answer) == "2TDC" * 3 + "Z"
        assert rows(answer) == [(self.mark + name + text,) for name in "sab"]

    async def _unnamed(self, text: str) -> None:
        assert kinds(await self._ask(parse("", f"SELECT '{text}'"), SYNC)) == "1Z"
        assert value(await self._ask(again(), SYNC)) == text

    async def _simple(self, text: str) -> None:
        assert value(await self._ask(query(f"SELECT '{text}'"))) == text

    async def _transaction(self, text: str) -> None:
        answer = await self._ask(query("BEGIN"), run(f"SELECT '{text}'"), SYNC, query("ROLLBACK"), n_ready=3)
        assert kinds(answer) == "CZ" + "12TDCZ" + "CZ"
        assert value(answer) == text

    async def _failing(self, text: str) -> None:
        answer = await self._ask(parse("", f"SELECT '{text}'::int"), bind(), execute(), SYNC)
        assert kinds(answer) == "EZ"
        assert text in error(answer)["M"]


@contextlib.asynccontextmanager
async def company(proxy: RunningProxy, count: int = 2) -> AsyncIterator[list[Neighbour]]:
    """So many other clients at work for as long as the block lasts."""
    ended = asyncio.Event()
    neighbours = [Neighbour(await proxy.client(), f"neighbour {number}:") for number in range(count)]
    tasks = [asyncio.create_task(neighbour.go_on(ended)) for neighbour in neighbours]
    try:
        yield neighbours
    finally:
        ended.set()
        await asyncio.gather(*tasks)
        for neighbour in neighbours:
            await neighbour.client.terminate()


# -- scripts played everywhere -------------------------------------------------------------------------------


class Everywhere:
    """Plays a script on PostgreSQL and through proxies: alone on four connections, whole and in pieces, and in
    company on one and on two, where almost nothing stays prepared. All traces must be equal."""

    def __init__(self, server: embedded.Postgres, alone: RunningProxy, crowded: Sequence[RunningProxy]) -> None:
        self.server = server
        self.alone = alone
        self.crowded = crowded

    async def __call__(self, *steps: Step, **named: Any) -> list[Message]:
        """Parameters as of `Differential`; returns what PostgreSQL said."""
        said = await Differential(self.server, self.alone)(*steps, **named)
        named["pieces"] = (0,)
        for proxy in self.crowded:
            async with company(proxy):
                await Differential(self.server, proxy)(*steps, **named)
        return said

    async def batches(self, *batches: bytes, **named: Any) -> list[Message]:
        """The same for batches that end in one ReadyForQuery each; each is answered before the next is sent."""
        steps: list[Step] = []
        for batch in batches:
            steps += [batch, ready()]
        return await self(*steps, **named)


# -- what others notice --------------------------------------------------------------------------------------


async def undisturbed(proxy: RunningProxy, pid: str | None = None) -> None:
    """Whoever comes next gets what it asks for: from this backend."""
    async with await proxy.client() as client:
        await client.send(
            query("BEGIN"), run("SELECT 'next'"), SYNC, query("SELECT pg_backend_pid()"), query("COMMIT")
        )
        answer = await client.trace(4)
        assert kinds(answer) == "CZ" + "12TDCZ" + "TDCZ" + "CZ"
        assert rows(answer)[0] == ("next",)
        assert pid is None or rows(answer)[1] == (pid,)


def memory() -> int:
    """Bytes that this process, and the proxy in it, has in use."""
    return psutil.Process(os.getpid()).memory_info().rss


async def stands_still(client: RawClient, sending: asyncio.Task[None]) -> None:
    """Wait until the other end takes nothing more of what is being sent; fail if all of it was taken."""
    last, same = 0, 0
    while same < 20:
        assert not sending.done(), "everything was taken"
        now = client.writer.transport.get_write_buffer_size()
        same = same + 1 if now == last > 0 else 0
        last = now
        await asyncio.sleep(0.005)
