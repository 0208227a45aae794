"""The raw client and the scripted server against each other, and each against a stranger: psycopg, PostgreSQL."""

import asyncio
import functools

import psycopg
import pytest

from cenote.testing.scripted_server import ScriptedServer, ServerEnd
from cenote.testing.wire import (
    END,
    Address,
    LoginRefused,
    Message,
    RawClient,
    WireFailure,
    error,
    kinds,
    normalised,
    play,
    ready,
    rows,
    send_cancel,
    until,
    value,
)
from cenote.wire import messages

AUTHS = ("trust", "password", "md5", "scram-sha-256")


def on_loop(body):
    @functools.wraps(body)
    def test(*args, **named):
        asyncio.run(asyncio.wait_for(body(*args, **named), 30))

    return test


def address(server) -> Address:
    return Address(server.host, server.port)


@pytest.mark.parametrize("auth", AUTHS)
@pytest.mark.parametrize("version", [messages.PROTOCOL_3_0, messages.PROTOCOL_3_2])
@on_loop
async def test_client_and_server_log_in_with_each_other_and_converse(auth, version):
    async with ScriptedServer(auth=auth, version=version, secret_bytes=32) as server:
        async with await RawClient.connect(address(server)) as client:
            trace = await client.startup("app", "app", "scripted", {"TimeZone": "UTC"}, messages.PROTOCOL_3_2)
            assert trace[-1] == Message("Z", b"I")
            assert kinds(trace).count("v") == (version == messages.PROTOCOL_3_0)
            session = server.sessions[0]
            assert client.key == (session.pid, session.secret)
            assert client.parameters == dict(server.parameters)
            assert session.startup == {"user": "app", "database": "app", "TimeZone": "UTC"}
            assert value(await client.query("hello")) == "0: hello"
            assert await send_cancel(address(server), client.key) == b""
            assert session.cancelled.is_set()
            await client.terminate()
        await session.gone.wait()


@pytest.mark.parametrize("auth", AUTHS[1:])
@on_loop
async def test_the_server_refuses_a_wrong_password(auth):
    async with ScriptedServer(auth=auth) as server, await RawClient.connect(address(server)) as client:
        with pytest.raises(LoginRefused, match="28P01") as caught:
            await client.startup("app", "app", "wrong")
        assert caught.value.fields["C"] == "28P01"
        assert await client.closed() == []
        assert server.sessions == []


@pytest.mark.parametrize("auth", AUTHS)
@on_loop
async def test_psycopg_logs_in_at_the_server_and_reads_its_answers(auth):
    async with ScriptedServer(auth=auth) as server:
        dsn = f"postgresql://app:scripted@127.0.0.1:{server.port}/app"
        async with await psycopg.AsyncConnection.connect(dsn, autocommit=True) as connection:
            cursor = await connection.execute(b"SELECT 1")
            assert await cursor.fetchall() == [("0: SELECT 1",)]


@pytest.mark.pg
@on_loop
async def test_the_client_logs_in_at_postgresql(pg):
    async with await RawClient.connect(address(pg)) as client:
        await client.startup(pg.user, pg.database, pg.password)
        assert rows(await client.query("SELECT 1, NULL UNION ALL SELECT 2, 'x'")) == [("1", None), ("2", "x")]
        assert error(await client.query("SELECT 1/0"))["C"] == "22012"
        await client.terminate()
    async with await RawClient.connect(address(pg)) as client:
        assert (await client.refusal(pg.user, pg.database, "wrong"))["C"] == "28P01"


@pytest.mark.parametrize("pieces", [0, 1, 7])
@on_loop
async def test_a_script_is_played_step_by_step(pieces):
    async def copies(session: ServerEnd) -> None:
        await session.expect("Q")
        session.send(messages.message(b"G", b"\0\0\0"))
        await session.expect("dc")
        session.send(messages.command_complete("COPY 1"), messages.ready())
        session.send(messages.error("FATAL", "57P01", "that is all"))

    steps = [
        messages.query("COPY"),
        until("G"),
        messages.message(b"d", b"1\n") + messages.message(b"c"),
        ready(),
        END,
    ]
    async with ScriptedServer(copies) as server, await RawClient.connect(address(server)) as client:
        await client.startup("app", "app")
        trace = await play(client, steps, pieces=pieces)
        assert kinds(trace) == "GCZE"
        assert normalised(trace, texts=False)[-1] == ("E", {"C": "57P01", "V": "FATAL"})


@on_loop
async def test_a_failure_says_what_had_come_until_then():
    async with ScriptedServer() as server:
        client = await RawClient.connect(address(server), timeout=0.1)
        await client.startup("app", "app")
        await client.query("hello")
        with pytest.raises(WireFailure, match=r"(?s)a message expected, nothing within 0.1 s.*C b'SELECT 1"):
            await client.receive()
        server.sessions[0].reset()
        with pytest.raises(WireFailure, match="the other end is gone"):
            await client.receive()
        await client.close()


@on_loop
async def test_what_goes_wrong_in_a_script_fails_the_test():
    async def strict(session: ServerEnd) -> None:
        await session.expect("P")

    with pytest.raises(WireFailure, match="expected 'P'"):
        async with ScriptedServer(strict) as server, await RawClient.connect(address(server)) as client:
            await client.startup("app", "app")
            await client.send(messages.query("hello"))
            await client.closed()
