"""Replication connections: a server connection of their own, bytes as they are, and two ends that end together."""

import asyncio
import contextlib
import socket
import subprocess
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from login_kit import Door, on_both_loops, place

from cenote import embedded
from cenote.proxy.auth.keys import KeyCache
from cenote.proxy.target import Target
from cenote.proxy.tunnel import Tunnels
from cenote.testing.faults import FaultProxy
from cenote.testing.scripted_server import ScriptedServer, ServerEnd
from cenote.testing.wire import RawClient, WireFailure, error, kinds, rows, value
from cenote.wire import messages
from cenote.wire.tls import server_context
from pool_kit import until

KEY = b"abcd"


@pytest.fixture(scope="module")
def primary() -> Iterator[embedded.Postgres]:
    """A server that lets its user replicate."""
    settings = {"wal_level": "logical", "max_wal_senders": 5, "wal_sender_timeout": "5s"}
    with embedded.Postgres(18, settings=settings) as server:
        server.psql("ALTER ROLE app REPLICATION; CREATE TABLE t (x text); CREATE PUBLICATION p FOR ALL TABLES")
        yield server


@contextlib.asynccontextmanager
async def tunnelled(server: Any, *, limit: int = 10, **options: Any) -> AsyncIterator[tuple[Door, Tunnels]]:
    """A door whose clients are led through to `server`."""
    tunnels = Tunnels(KeyCache(), limit)
    ended: list[Any] = []

    async def lead(client: Any, login: Any) -> None:
        target = Target(place(server), server.database, server.user, server.password)
        key = messages.backend_key_data(1, KEY)
        ended.append(await tunnels.run(client, login, target, timeout=5.0, key=key))

    async with Door(
        {server.user: server.password}, databases=(server.database,), on_login=lead, **options
    ) as door:
        yield door, tunnels
        for visitor in door.visitors:
            visitor.task.cancel()
        await until(lambda: len(tunnels) == 0, "no tunnel is left")


async def replicating(door: Door, server: Any, mode: str = "database", **named: Any) -> RawClient:
    client = await RawClient.connect(door.address, **named)
    await client.startup(server.user, server.database, server.password, {"replication": mode})
    return client


@pytest.mark.parametrize("mode", ["database", "true"])
def test_A9_a_replication_connection_has_a_server_connection_of_its_own(primary, mode):
    @on_both_loops
    async def body():
        async with tunnelled(primary) as (door, tunnels):
            async with await replicating(door, primary, mode) as client:
                assert client.key == (1, KEY)
                assert client.parameters["server_version"].startswith("18")
                system = rows(await client.query("IDENTIFY_SYSTEM"))[0]
                assert system[3] == ("app" if mode == "database" else None)
                assert len(tunnels) == 1
                await client.terminate()
            await until(lambda: len(tunnels) == 0)

    body()


def test_A9_settings_of_the_client_go_along(primary):
    @on_both_loops
    async def body():
        async with tunnelled(primary) as (door, _), await RawClient.connect(door.address) as client:
            settings = {"replication": "database", "application_name": "copy", "options": "-c work_mem=5MB"}
            await client.startup(primary.user, primary.database, primary.password, settings)
            assert value(await client.query("SHOW application_name")) == "copy"
            assert value(await client.query("SHOW work_mem")) == "5MB"

    body()


@pytest.mark.parametrize("tls", [None, "postgres", "direct"])
def test_D7_a_stream_of_changes_passes_both_ways(primary, tls_files, tls):
    @on_both_loops
    async def body():
        context = server_context(tls_files.server_certificate, tls_files.server_key)
        async with tunnelled(primary, tls=context) as (door, _):
            async with await replicating(door, primary, tls=tls) as client:
                await client.query("CREATE_REPLICATION_SLOT s TEMPORARY LOGICAL pgoutput")
                client.feed(
                    messages.query(
                        "START_REPLICATION SLOT s LOGICAL 0/0 (proto_version '1', publication_names 'p')"
                    )
                )
                assert (await client.receive()).kind == "W"
                text = "x" * 100_000
                await asyncio.to_thread(primary.psql, f"INSERT INTO t VALUES ('{text}')")
                seen = b""
                while text.encode() not in seen:
                    message = await client.receive()
                    assert message.kind == "d"
                    seen += message.body
                client.feed(messages.message(b"c"))
                assert kinds(await client.until_ready())[-1] == "Z"
                assert value(await client.query("SELECT 1")) == "1"

    body()


@pytest.mark.parametrize("mode", ["database", "true"])
def test_A9_programs_of_postgresql_replicate_through_it(primary, mode):
    async def body():
        async with tunnelled(primary) as (door, tunnels):
            base = f"host=127.0.0.1 port={door.port} user={primary.user} password={primary.password} dbname=app"
            if mode == "database":
                program = [primary.binary("pg_recvlogical"), "--slot=r", "--plugin=pgoutput"]
            else:
                program = [primary.binary("pg_receivewal"), "--slot=p"]
            program += ["-d", base, "--create-slot", "--if-not-exists"]
            done = await asyncio.to_thread(
                subprocess.run, [str(word) for word in program], capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, done.stderr
            slots = await asyncio.to_thread(primary.psql, "SELECT slot_name FROM pg_replication_slots")
            assert ("r" if mode == "database" else "p") in slots
            await until(lambda: len(tunnels) == 0)

    asyncio.run(body())


def test_A9_beyond_the_bound_a_client_is_refused(primary):
    @on_both_loops
    async def body():
        async with tunnelled(primary, limit=1) as (door, tunnels):
            async with await replicating(door, primary), await RawClient.connect(door.address) as second:
                fields = await second.refusal(
                    primary.user, primary.database, primary.password, {"replication": "database"}
                )
                assert (fields["S"], fields["C"]) == ("FATAL", "53300")
                assert "all 1 replication connections" in fields["M"]
            await until(lambda: len(tunnels) == 0)
            async with await replicating(door, primary) as client:
                await client.terminate()

    body()


def test_A9_what_the_server_refuses_is_told_in_its_words(pg18):
    @on_both_loops
    async def body():
        async with tunnelled(pg18) as (door, _), await RawClient.connect(door.address) as client:
            fields = await client.refusal(pg18.user, pg18.database, pg18.password, {"replication": "database"})
            assert (fields["S"], fields["C"]) == ("FATAL", "42501")
            assert "WAL sender" in fields["M"] or "replication" in fields["M"]

    body()


def test_A9_a_server_that_is_not_there_is_an_error_that_says_so():
    @on_both_loops
    async def body():
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            async with ScriptedServer() as gone:
                gone.refuse()
                async with tunnelled(gone) as (door, _), await RawClient.connect(door.address) as client:
                    fields = await client.refusal(gone.user, gone.database, gone.password, {"replication": "on"})
                    assert fields["C"] == "08001"
                    assert "cenote: no replication connection" in fields["M"]

    body()


@pytest.mark.parametrize("how", ["close", "reset"])
def test_D7_when_one_end_ends_so_does_the_other(how):
    @on_both_loops
    async def body():
        async def session(end: ServerEnd) -> None:
            if await end.serve_one():
                getattr(end, how)()

        async with ScriptedServer(session) as scripted, tunnelled(scripted) as (door, tunnels):
            # The server goes.
            async with await replicating(door, scripted) as client:
                client.feed(messages.query("go"))
                await client.rest()
            await until(lambda: len(tunnels) == 0)
            # The client goes.
            client = await replicating(door, scripted)
            await getattr(client, how)()
            await scripted.sessions[1].gone.wait()
            await until(lambda: len(tunnels) == 0)
            assert all(visitor.lost for visitor in door.visitors)

    body()


def test_D7_what_was_sent_before_the_end_still_arrives():
    @on_both_loops
    async def body():
        many = [messages.message(b"d", b"x" * 60_000)] * 100

        async def session(end: ServerEnd) -> None:
            await end.receive()
            end.send(*many)
            end.close()

        async with ScriptedServer(session) as scripted, tunnelled(scripted) as (door, _):
            async with await replicating(door, scripted) as client:
                client.feed(messages.query("go"))
                assert await client.rest() == b"".join(many)

    body()


@pytest.mark.parametrize("slow", ["client", "server"])
def test_D9_a_side_that_takes_no_more_makes_the_other_wait(slow):
    piece = messages.message(b"d", b"x" * 60_000)

    @on_both_loops
    async def body():
        reading = asyncio.Event()
        total = 0

        async def session(end: ServerEnd) -> None:
            nonlocal total
            await end.receive()
            if slow == "server":
                await reading.wait()
                for _ in range(500):
                    await end.receive()
                    total += 1
                end.send(messages.READY_IDLE)
            else:
                for _ in range(500):
                    end.send(piece)
                    await end.flushed()
                    total += 1
            await end.ended()

        async with ScriptedServer(session) as scripted, tunnelled(scripted) as (door, tunnels):
            async with await replicating(door, scripted) as client:
                client.feed(messages.query("go"))
                if slow == "client":
                    client.writer.transport.pause_reading()
                else:
                    client.feed(*[piece] * 500)
                (server,) = tunnels._running.values()
                await until(lambda: server is not None and (server.muted or server.stalled), "one side is full")
                held = server.other.transport.get_write_buffer_size() + server.transport.get_write_buffer_size()
                assert held < 2_000_000
                assert total < 500
                reading.set()
                if slow == "client":
                    client.writer.transport.resume_reading()
                    for _ in range(500):
                        await client.receive()
                else:
                    await client.until_ready()
                assert total == 500

    body()


def test_E6_a_query_of_a_replication_connection_can_be_cancelled(primary):
    @on_both_loops
    async def body():
        async with tunnelled(primary) as (door, tunnels), await replicating(door, primary) as client:
            client.feed(messages.query("SELECT pg_sleep(30)"))
            answer = asyncio.create_task(client.until_ready())
            while not answer.done():
                assert await tunnels.cancel(door.visitors[0])
                await asyncio.wait([answer], timeout=0.02)
            assert error(answer.result())["C"] == "57014"
            assert not await tunnels.cancel(object())

    body()


def test_D7_a_tunnel_that_is_cancelled_ends_at_both_ends(primary):
    @on_both_loops
    async def body():
        async with FaultProxy("127.0.0.1", primary.port) as between:
            between.user, between.password, between.database = primary.user, primary.password, primary.database
            async with tunnelled(between) as (door, tunnels), await replicating(door, primary) as client:
                door.visitors[0].task.cancel()
                await client.rest()
                await until(lambda: not between.links and len(tunnels) == 0)

    body()


def test_D7_a_tunnel_that_is_cancelled_while_it_dials_ends_too():
    @on_both_loops
    async def body():
        async def silent(end: ServerEnd) -> None:
            await end.silent()

        async with ScriptedServer(on_connect=silent) as scripted, tunnelled(scripted) as (door, tunnels):
            async with await RawClient.connect(door.address) as client:
                client.feed(messages.startup([("user", "app"), ("replication", "database")]))
                login = asyncio.create_task(client.authenticate("app", scripted.password))
                await until(lambda: scripted.connections and len(tunnels) == 1)
                door.visitors[0].task.cancel()
                with pytest.raises(WireFailure):
                    await login
                await door.visitors[0].over

    body()
