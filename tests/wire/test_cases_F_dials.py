"""Group F, ends: what the end of one server connection says of the others, words at any moment, and dials."""

import asyncio
import ssl

import pytest
from proxy_kit import RunningProxy, until, wire

from cenote.testing.scripted_server import ScriptedServer, ServerEnd
from cenote.testing.wire import (
    LoginRefused,
    RawClient,
    error,
    kinds,
    rows,
    value,
)
from cenote.wire import messages

PID = "SELECT pg_backend_pid()"
serve = ServerEnd.serve
COLUMN = messages.row_description([("answer", 25)])


def fatal(sqlstate: str) -> bytes:
    return messages.error("FATAL", sqlstate, "the script ends this session")


async def idle_sessions(proxy: RunningProxy, server: ScriptedServer, count: int) -> None:
    """So many server connections, all idle."""
    clients = [await proxy.client() for _ in range(count)]
    for client in clients:
        await client.query("BEGIN")
    for client in clients:
        await client.query("COMMIT")
        await client.terminate()
    await proxy.reached(idle=count, leased=0)
    assert len(server.open()) == count


# -- F8, F10, F11: what an end says of the others ------------------------------------------------------------


@pytest.mark.parametrize(("sqlstate", "stale"), [("57P02", True), ("57P01", False)])
@wire
async def test_F8_when_the_server_crashed_older_connections_are_stale(proxy_for, sqlstate, stale):
    async def breakable(session: ServerEnd) -> None:
        while (message := await session.receive()).kind == "Q":
            if message.body == b"SELECT crash\0":
                session.send(fatal(sqlstate))
                return
            session.answer(message.body[:-1].decode())

    async with ScriptedServer(breakable) as server:
        proxy = proxy_for(server, max_size=2)
        await idle_sessions(proxy, server, 2)
        async with await proxy.client() as client:
            await client.query("BEGIN")
            await client.send(messages.query("SELECT crash"))
            assert error(await client.closed())["C"] == sqlstate
        if stale:
            await until(lambda: not server.open())
        else:
            await proxy.reached(idle=1, closing=0)
            assert len(server.open()) == 1


@wire
async def test_F10_too_many_connections_means_less_of_them_and_no_refusal(proxy_for):
    """The one connection there is serves all who wait, and dials are few."""
    refused_at: list[ServerEnd] = []

    async def only_one(session: ServerEnd) -> None:
        if session is server.connections[0]:
            if await session.converse():
                await session.serve()
            return
        refused_at.append(session)
        await session.exactly(8)
        session.send(messages.error("FATAL", "53300", "sorry, too many clients already"))
        session.close()

    async with ScriptedServer(on_connect=only_one) as server:
        proxy = proxy_for(server, max_size=4)
        holder = await proxy.client()
        await holder.query("BEGIN")
        clients = [await proxy.client() for _ in range(8)]
        for client in clients:
            await client.send(messages.query("SELECT hello"))
        await proxy.reached(waiting=8)
        await until(lambda: refused_at)
        await until(lambda: proxy.limits()["limit"] == 1)
        await proxy.reached(connecting=0)
        knocks = len(refused_at)  # those that were at the door together
        await holder.query("COMMIT")
        for client in clients:
            assert value(await client.until_ready()) == "0: SELECT hello"
            await client.terminate()
        await holder.terminate()
        assert len(refused_at) == knocks <= 4, "it asks for no more than it was given"


@wire
async def test_F11_a_password_that_changed_at_the_server_does_not_touch_who_is_inside(proxy_for):
    """Who waits is served by the connections there are."""
    async with ScriptedServer(auth="scram-sha-256") as server:
        proxy = proxy_for(server, max_size=2)
        async with await proxy.client() as client, await proxy.client() as other:
            await client.query("BEGIN")
            server.password = "rotated"
            await other.send(messages.query("SELECT hello"))
            await until(lambda: len(server.connections) >= 2)
            await client.query("COMMIT")
            assert value(await other.until_ready()) == "0: SELECT hello"


@wire
async def test_F11_a_password_that_changed_is_told_and_works_again_when_it_fits_again(proxy_for):
    async with ScriptedServer(auth="scram-sha-256") as server:
        proxy = proxy_for(server, max_size=2)
        assert await served(proxy)
        server.password = "rotated"
        server.sessions[0].reset()
        await proxy.reached(idle=0, closing=0)
        async with await proxy.client() as client:
            answer = await client.query("SELECT hello")
            assert error(answer)["C"] == "28P01"
            assert kinds(answer) == "EZ"
        server.password = proxy.password
        async with asyncio.timeout(10):
            while not await served(proxy):
                pass


async def served(proxy: RunningProxy) -> bool:
    try:
        async with await proxy.client() as client:
            await client.send(messages.query("SELECT hello"))
            return (await client.until("E", "Z"))[-1].kind == "Z"
    except LoginRefused:
        return False


# -- F12: words at any moment --------------------------------------------------------------------------------


@wire
async def test_F12_notices_notifications_and_parameters_pass_wherever_they_come(proxy_for):
    words = [
        messages.notice("NOTICE", "00000", "by the way"),
        messages.message(b"A", b"\0\0\0\1" + messages.cstring("channel") + messages.cstring("payload")),
        messages.parameter_status("application_name", "changed"),
    ]
    answer = [COLUMN, messages.data_row([b"1"]), messages.data_row([b"2"]), messages.command_complete("SELECT 2")]

    async def talkative(session: ServerEnd) -> None:
        while True:
            await session.expect("Q")
            for part in answer:
                session.send(*words, part)
                await session.flushed()
            session.send(*words, messages.ready())

    async with ScriptedServer(talkative) as server:
        proxy = proxy_for(server, max_size=1)
        async with await proxy.client() as client:
            for _ in range(3):
                said = await client.query("SELECT hello")
                assert kinds(said) == "NASTNASDNASDNASCNASZ"
                assert rows(said) == [("1",), ("2",)]


@wire
async def test_F12_they_pass_inside_an_extended_batch_and_shift_no_answer(proxy_for):
    notice = messages.notice("NOTICE", "00000", "by the way")

    async def talkative(session: ServerEnd) -> None:
        while True:
            await session.expect("PBES")
            for part in (messages.PARSE_COMPLETE, messages.BIND_COMPLETE, messages.command_complete("SELECT 0")):
                session.send(notice, part)
            session.send(notice, messages.ready())

    batch = messages.parse(b"", b"SELECT 7\0\0\0") + messages.message(b"B", bytes(8))
    batch += messages.message(b"E", bytes(5)) + messages.SYNC
    async with ScriptedServer(talkative) as server:
        proxy = proxy_for(server, max_size=1)
        async with await proxy.client() as client:
            for _ in range(3):
                await client.send(batch)
                assert kinds(await client.until_ready()) == "N1N2NCNZ"


# -- F21: a dial always ends ---------------------------------------------------------------------------------


async def never_answers(session: ServerEnd) -> None:
    await session.silent()


async def never_shakes_hands(session: ServerEnd) -> None:
    await session.exactly(8)
    session.send(b"S")
    await session.silent()


async def never_authenticates(session: ServerEnd) -> None:
    await session.exactly(8)
    await session.silent()


async def never_continues(session: ServerEnd) -> None:
    await session.exactly(8)
    session.send(messages.authentication_sasl(["SCRAM-SHA-256"]))
    await session.silent()


async def never_ready(session: ServerEnd) -> None:
    await session.exactly(8)
    session.send(messages.AUTHENTICATION_OK)
    await session.silent()


async def always_notices(session: ServerEnd) -> None:
    await session.exactly(8)
    while True:
        session.send(messages.notice("NOTICE", "00000", "one moment"))
        await session.flushed()
        await asyncio.sleep(0.01)


@pytest.mark.parametrize(
    ("stall", "sslmode"),
    [
        (never_answers, "disable"),
        (never_answers, "require"),
        (never_shakes_hands, "require"),
        (never_authenticates, "disable"),
        (never_continues, "disable"),
        (never_ready, "disable"),
        (always_notices, "disable"),
    ],
)
@wire
async def test_F21_no_step_of_a_dial_lasts_for_ever(proxy_for, tls_files, stall, sslmode):
    """Two dials stall, whatever the step; their slots come back, and the third one serves who waits."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tls_files.server_certificate, tls_files.server_key)
    dials = 0

    async def script(session: ServerEnd) -> None:
        nonlocal dials
        dials += 1
        if dials <= 2:
            await stall(session)
        elif await session.converse():
            await session.serve()

    async with ScriptedServer(on_connect=script, ssl=b"S", tls=context) as server:
        proxy = proxy_for(server, max_size=1, connect_timeout=0.3, sslmode=sslmode)
        async with await proxy.client() as client:
            assert (value(await client.query("SELECT hello")) or "").endswith(": SELECT hello")
        assert dials >= 3


@wire
async def test_F21_an_init_query_that_never_ends_ends_the_dial(proxy_for):
    async def stuck(session: ServerEnd) -> None:
        await session.expect("Q")
        await session.ended()

    async with ScriptedServer(stuck, serve) as server:
        proxy = proxy_for(server, max_size=1, connect_timeout=0.4, init_query="SELECT 1")
        async with await proxy.client() as client:
            assert (value(await client.query("SELECT hello")) or "").endswith(": SELECT hello")


@wire
async def test_F21_who_waits_for_a_server_that_is_silent_is_told_so_in_time(proxy_for):
    async with ScriptedServer(on_connect=never_answers) as server:
        proxy = proxy_for(server, connect_timeout=0.3, acquire_timeout=0.8)
        async with await RawClient.connect(proxy.address) as client:
            with pytest.raises(LoginRefused) as caught:
                await client.startup(proxy.user, proxy.database, proxy.password)
            assert caught.value.fields["C"][:2] in ("08", "53")
            assert "cenote" in caught.value.fields["M"]
