"""The clients of the chaos run. Each knows what only it can be told, and compares.

`Marked` (asyncpg) and `Piped` (psycopg) ask for their own marks, `Payer` moves money, `Raw` speaks the protocol by
hand and is cancelled by others, `Dying` goes in the middle of everything. All but the last two are never
cancelled by anybody: a 57014 would be somebody else's.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import struct
from typing import Any, ClassVar

import asyncpg
import psycopg
from chaos_arena import CANCELLED, SCHEMAS, Arena, WrongAnswer, parties

from cenote.testing import wire
from cenote.wire import messages

PATIENCE_S = 3.0  # for one answer; then the client goes away


class Client:
    """One that connects, works, leaves, and comes again until all is over."""

    cancellable = False

    def __init__(self, arena: Arena, number: int) -> None:
        self.arena = arena
        self.number = number
        self.chance = random.Random(f"{arena.seed}/{type(self).__name__}/{number}")
        self.mark = ""

    def __repr__(self) -> str:
        return f"{type(self).__name__} {self.number}"

    async def work(self) -> None:
        while not self.arena.over:
            self.mark = f"<{self!r} {self.chance.getrandbits(32):08x}>"
            try:
                await self.session()
            except asyncio.CancelledError:
                raise
            except (Exception, ExceptionGroup) as failure:
                self.arena.judge(self, failure, cancellable=self.cancellable)

    async def session(self) -> None:
        raise NotImplementedError

    def turns(self) -> Any:
        """So many turns in one session."""
        for turn in range(self.chance.randint(1, 40)):
            if self.arena.over:
                return
            yield turn

    def must(self, found: object, expected: object) -> None:
        self.arena.answered(found == expected, f"{self.mark} expected {expected!r:.200}, was told {found!r:.200}")


class Marked(Client):
    """asyncpg, with statements of its own in its cache; every second one with settings of its own."""

    async def session(self) -> None:
        own = {}
        if self.number % 2:
            schema = f"s{self.number % SCHEMAS}"
            own = {"application_name": f"client {self.number}", "search_path": schema}
        connect = asyncpg.connect(
            **self.arena.login, database=self.arena.database, server_settings=own, timeout=PATIENCE_S
        )
        conn = await connect
        try:
            for turn in self.turns():
                async with asyncio.timeout(PATIENCE_S):
                    await self.ask(conn, own, f"{self.mark} {turn}")
            if self.chance.random() < 0.7:
                await conn.close(timeout=PATIENCE_S)
        finally:
            conn.terminate()

    async def ask(self, conn: Any, own: dict[str, str], mark: str) -> None:
        match self.chance.randrange(6):
            case 0:
                self.must(await conn.fetchval("SELECT $1::text", mark), mark)
            case 1:
                text = f"SELECT '{self!r} ' || $1::text"
                self.must(await conn.fetchval(text, mark), f"{self!r} {mark}")
            case 2:
                found = await conn.fetch(
                    "SELECT $1::text || repeat('x', n) FROM generate_series(1, 200) AS n", mark
                )
                self.must([row[0] for row in found], [mark + "x" * n for n in range(1, 201)])
            case 3:
                async with conn.transaction():
                    self.must(await conn.fetchval("SELECT $1::text", mark), mark)
                    text = f"SELECT n, '{self!r}' FROM generate_series(1, $1::int) AS n"
                    found = [tuple(row) async for row in conn.cursor(text, 70)]
                    self.must(found, [(n, repr(self)) for n in range(1, 71)])
            case 4:
                parts: list[bytes] = []

                async def keep(part: bytes) -> None:
                    parts.append(bytes(part))

                await conn.copy_from_query(f"SELECT '{mark}' FROM generate_series(1, 300)", output=keep)
                self.must(b"".join(parts), f"{mark}\n".encode() * 300)
            case _:
                if own:
                    settings = "current_setting('search_path'), current_setting('application_name')"
                    found = tuple(await conn.fetchrow(f"SELECT owner, {settings} FROM who"))
                    schema = own["search_path"]
                    self.must(found, (schema, schema, own["application_name"]))
                else:
                    text = "SELECT current_setting('search_path'), to_regclass('who')::text"
                    self.must(tuple(await conn.fetchrow(text)), ('"$user", public', None))


class Driven(Client):
    """psycopg; closes its connection whatever happens."""

    async def session(self) -> None:
        async with asyncio.timeout(2 * PATIENCE_S):
            conn = await psycopg.AsyncConnection.connect(
                **self.arena.login, dbname=self.arena.database, connect_timeout=3, sslmode="disable"
            )
        try:
            await self.talk(conn)
        finally:
            await conn.close()

    async def talk(self, conn: psycopg.AsyncConnection) -> None:
        raise NotImplementedError


class Piped(Driven):
    """Pipelines, statements that psycopg prepares by itself, notices."""

    async def talk(self, conn: psycopg.AsyncConnection) -> None:
        await conn.set_autocommit(True)
        for turn in self.turns():
            mark = f"{self.mark} {turn}"
            async with asyncio.timeout(PATIENCE_S):
                if self.chance.random() < 0.5:
                    async with conn.pipeline():
                        cursors = [await conn.execute("SELECT %s, %s", (mark, step)) for step in range(20)]
                    self.must([await cursor.fetchone() for cursor in cursors], [(mark, n) for n in range(20)])
                else:
                    cursor = await conn.execute(f"SELECT %s || ' {self!r}'".encode(), (mark,))
                    self.must(await cursor.fetchone(), (f"{mark} {self!r}",))


class Payer(Driven):
    """One transfer is one transaction and leaves a receipt in it."""

    async def talk(self, conn: psycopg.AsyncConnection) -> None:
        for _ in self.turns():
            number = self.arena.number()
            payer, payee = parties(number)
            async with asyncio.timeout(PATIENCE_S):
                # In the order of accounts: no deadlocks, which are not what this is about.
                for account, change in sorted([(payer, -1), (payee, 1)]):
                    await conn.execute(
                        "UPDATE account SET balance = balance + %s WHERE id = %s", (change, account)
                    )
                await conn.execute("INSERT INTO receipt VALUES (%s)", (number,))
                await conn.commit()
            self.arena.done.add(number)
            self.arena.answers += 1


class Spoken(Client):
    """Speaks the protocol by hand."""

    async def session(self) -> None:
        arena = self.arena
        client = await wire.RawClient.connect((arena.front.host, arena.front.port), timeout=PATIENCE_S)
        try:
            await client.startup(arena.server.user, arena.database, arena.server.password)
            await self.talk(client)
            await client.terminate()
        finally:
            await client.abort()

    async def talk(self, client: wire.RawClient) -> None:
        raise NotImplementedError


class Raw(Spoken):
    """Everybody's statement has the same name; others cancel what it does, at any moment."""

    cancellable = True

    async def talk(self, client: wire.RawClient) -> None:
        self.arena.cancellable[self.number] = client.key
        try:
            text = f"SELECT $1 || ' {self!r}'"
            parse = messages.parse(b"mine", text.encode() + b"\0" + struct.pack("!hI", 1, 25))
            await client.send(parse, messages.SYNC)
            if not self.allowed(await client.until_ready()):
                return
            for turn in self.turns():
                mark = f"{self.mark} {turn}"
                if self.chance.random() < 0.5:
                    await client.send(_bind(b"mine", mark.encode()), _EXECUTE, messages.SYNC)
                    expected: list[tuple[str | None, ...]] = [(f"{mark} {self!r}",)]
                else:
                    await client.send(messages.query(f"SELECT '{mark}', pg_sleep(0.01)"))
                    expected = [(mark, "")]
                answer = await client.until_ready()
                if self.allowed(answer):
                    self.must(wire.rows(answer), expected)
        finally:
            self.arena.cancellable.pop(self.number, None)

    def allowed(self, answer: list[Any]) -> bool:
        """False: it was cancelled, or the server went away."""
        if not any(message.kind == "E" for message in answer):
            return True
        fields = wire.error(answer)
        if fields["C"] == CANCELLED:
            self.arena.ends["cancelled"] += 1
            return False
        failure = WrongAnswer(str(fields))
        failure.sqlstate = fields["C"]  # type: ignore[attr-defined]
        raise failure


class Canceller(Client):
    """Cancels one of those who may be, and sometimes nobody at all."""

    async def session(self) -> None:
        arena = self.arena
        keys = list(arena.cancellable.values())
        key = self.chance.choice(keys) if keys else (self.chance.getrandbits(31), b"none")
        if self.chance.random() < 0.1:
            key = (key[0], bytes(reversed(key[1])))  # a key that is nobody's
        await wire.send_cancel((arena.front.host, arena.front.port), key, timeout=PATIENCE_S)
        await asyncio.sleep(self.chance.uniform(0, 0.02))


class Dying(Client):
    """Comes only to go, in the middle of everything."""

    PHASES: ClassVar[tuple[str, ...]] = (
        *("nothing", "half a startup", "log-in", "idle", "query", "transaction", "failed transaction"),
        *("half a message", "parse", "pipeline", "copy in", "half a copy", "copy out", "lock", "settings"),
    )

    async def session(self) -> None:
        arena, phase = self.arena, self.chance.choice(self.PHASES)
        client = await wire.RawClient.connect((arena.front.host, arena.front.port), timeout=PATIENCE_S)
        try:
            await self.live(client, phase)
            await asyncio.sleep(self.chance.choice((0, 0, 0.001, 0.02)))
            match self.chance.randrange(3):
                case 0:
                    await client.reset()
                case 1:
                    await client.close()
                case _:
                    await client.terminate()
        finally:
            await client.abort()
        arena.ends[f"died: {phase}"] += 1

    async def live(self, client: wire.RawClient, phase: str) -> None:
        server = self.arena.server
        startup = messages.startup([("user", server.user), ("database", server.database)])
        match phase:
            case "nothing":
                return
            case "half a startup":
                await client.send(startup[: len(startup) // 2])
                return
            case "log-in":
                await client.send(startup)
                await client.receive()
                return
        await client.startup(server.user, server.database, server.password)
        if phase in ("transaction", "failed transaction", "lock"):
            # Money that would be gone if this were ever committed.
            await client.query("BEGIN")
            await client.query(f"UPDATE account SET balance = balance - 1 WHERE id = {self.chance.randint(1, 20)}")
        match phase:
            case "query":
                await client.send(messages.query(f"SELECT '{self.mark}', pg_sleep(0.1)"))
            case "failed transaction":
                await client.query("SELECT 1/0")
            case "half a message":
                whole = messages.query("UPDATE account SET balance = 0")
                await client.send(whole[: self.chance.randint(1, len(whole) - 1)])
            case "parse":
                await client.send(messages.parse(b"mine", b"SELECT 1\0\0\0"))
            case "pipeline":
                once = messages.parse(b"", b"SELECT 'nobody'\0\0\0") + _bind(b"") + _EXECUTE
                await client.send((once + messages.SYNC) * 20 + once)
            case "copy in" | "half a copy":
                await client.send(messages.query("COPY dump FROM STDIN"))
                await client.until("G", "E")
                await client.send(messages.message(b"d", b"never\n") * 50)
                if phase == "half a copy":
                    await client.send(messages.message(b"d", b"never\n" * 1000)[:2000])
            case "copy out":
                await client.send(
                    messages.query("COPY (SELECT repeat('x', 1000) FROM generate_series(1, 5000)) TO STDOUT")
                )
                await client.until("d", "E")
            case "lock":
                await client.send(messages.query("SELECT pg_advisory_lock(7)"))
            case "settings":
                await client.send(messages.query("SET search_path = nowhere; SET application_name = 'nobody'"))


_EXECUTE = messages.message(b"E", b"\0" + struct.pack("!I", 0))


def _bind(name: bytes, *values: bytes) -> bytes:
    """Bind to the unnamed portal, all in text."""
    body = b"\0" + name + b"\0" + struct.pack("!hh", 0, len(values))
    for value in values:
        body += struct.pack("!I", len(value)) + value
    return messages.message(b"B", body + struct.pack("!h", 0))


CROWD: dict[type[Client], int] = {Marked: 8, Piped: 5, Payer: 6, Raw: 5, Canceller: 2, Dying: 6}


async def gathered(arena: Arena) -> list[asyncio.Task[None]]:
    """All clients at work."""
    return [
        asyncio.create_task(kind(arena, number).work(), name=f"{kind.__name__} {number}")
        for kind, count in CROWD.items()
        for number in range(count)
    ]


async def sent_home(arena: Arena, tasks: list[asyncio.Task[None]]) -> None:
    """All clients end their session; raises what one of them could not."""
    arena.over = True
    with contextlib.suppress(wire.WireFailure):
        await asyncio.wait_for(asyncio.gather(*tasks), 40)
