"""Group E, cancel: by which way it comes and goes, floods, and cancels that do not get through."""

import asyncio
import secrets
import ssl

import pytest
from proxy_kit import GATE, SLEEP, finishes_anyway, not_running, running, until, wire, works

from cenote.testing.scripted_server import ScriptedServer, ServerEnd
from cenote.testing.wire import Address, RawClient, error, kinds, send_cancel, value
from cenote.wire import messages


@pytest.mark.parametrize("transport", ["plain", "postgres", "direct", "unix"])
@wire
async def test_E6_a_cancel_may_come_by_every_transport(proxy_for, pg18, admin, tls_listen, tmp_path, transport):
    tmp_path.chmod(0o755)
    proxy = proxy_for(pg18, listen=tls_listen | {"unix_dir": str(tmp_path)})
    address = Address(str(tmp_path), proxy.port) if transport == "unix" else proxy.address
    tls = {"tls": transport} if transport in ("postgres", "direct") else {}
    async with await RawClient.connect(address, **tls) as client:
        await client.startup(proxy.user, proxy.database, proxy.password)
        await client.send(messages.query(SLEEP))
        await running(admin, SLEEP)
        assert await send_cancel(address, client.key, **tls) == b""
        assert error(await client.until_ready())["C"] == "57014"
        await client.terminate()


@wire
async def test_E6_a_cancel_goes_to_the_server_by_its_unix_socket(proxy_for, pg18, admin):
    proxy = proxy_for(pg18, host=str(pg18.socket_dir))
    async with await proxy.client() as client:
        await client.send(messages.query(SLEEP))
        await running(admin, SLEEP)
        await send_cancel(proxy.address, client.key)
        assert error(await client.until_ready())["C"] == "57014"


@pytest.mark.parametrize("direct", [False, True], ids=["ssl-request", "direct"])
@wire
async def test_E6_a_cancel_goes_to_the_server_encrypted_where_the_session_is(proxy_for, tls_files, direct):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tls_files.server_certificate, tls_files.server_key)
    context.set_alpn_protocols(["postgresql"])
    seen = []

    async def on_cancel(end: ServerEnd) -> None:
        seen.append(end.secure)

    async with ScriptedServer(
        finishes_anyway, on_cancel=on_cancel, ssl=b"S", tls=context, direct=direct
    ) as server:
        proxy = proxy_for(server, sslmode="require", sslnegotiation="direct" if direct else "postgres")
        async with await proxy.client() as client:
            await client.send(messages.query("SELECT slow"))
            await until(lambda: server.sessions[0].heard)
            await send_cancel(proxy.address, client.key)
            assert value(await client.until_ready()) == "0: finished"
            assert seen == [True]


# -- E8, E9, E10: floods and failures ------------------------------------------------------------------------


@wire
async def test_E8_a_flood_of_cancels_takes_no_server_connection(proxy_for, pg18):
    proxy = proxy_for(pg18, max_size=1)
    async with await proxy.client() as client:
        await works(client)
        keys = [(secrets.randbelow(1 << 31), secrets.token_bytes(4)) for _ in range(200)]
        flood = asyncio.gather(*(send_cancel(proxy.address, key) for key in keys))
        for _ in range(20):
            await works(client)
        assert set(await flood) == {b""}
        await proxy.reached(idle=1)


@wire
async def test_E8_many_cancels_of_one_query_are_few_at_the_server(proxy_for):
    at_once, most = 0, 0
    closing = asyncio.Event()

    async def on_cancel(_: ServerEnd) -> None:
        nonlocal at_once, most
        at_once += 1
        most = max(most, at_once)
        await closing.wait()
        at_once -= 1

    async with ScriptedServer(finishes_anyway, on_cancel=on_cancel) as server:
        proxy = proxy_for(server, max_size=1)
        async with await proxy.client() as client:
            await client.send(messages.query("SELECT slow"))
            await until(lambda: server.sessions[0].heard)
            cancels = asyncio.gather(*(send_cancel(proxy.address, client.key) for _ in range(50)))
            assert value(await client.until_ready()) == "0: finished"
            assert most <= 2
            closing.set()
            assert set(await cancels) == {b""}
            assert value(await client.query("SELECT next")) == "0: SELECT next"


@pytest.mark.parametrize("end", ["close", "reset", "terminate"])
@wire
async def test_E9_a_client_that_goes_away_cancels_its_own_query_only(proxy, admin, gate, end):
    async with await proxy.client() as other, await proxy.client() as client:
        await other.send(messages.query(GATE))
        await running(admin, GATE)
        await client.send(messages.query(SLEEP))
        await running(admin, SLEEP)
        await getattr(client, end)()
        await not_running(admin, SLEEP)
        gate()
        assert kinds(await other.until_ready()) == "TDCZ"


@wire
async def test_E10_where_no_cancel_gets_through_the_connection_is_closed_and_nobody_waits(proxy_for):
    """A client died in mid-query, and the server takes no cancel: it cannot be proven clean in time."""

    async def deaf(session: ServerEnd) -> None:
        await session.expect("Q")
        await session.ended()

    async with ScriptedServer(deaf, ServerEnd.serve) as server:
        proxy = proxy_for(server, max_size=1, cleanup_timeout=0.5)
        async with await proxy.client() as first:
            await first.send(messages.query("SELECT slow"))
            await until(lambda: server.sessions[0].heard)
            server.refuse()
            await first.reset()
        await until(server.sessions[0].gone.is_set)
        await server.listen()
        async with await proxy.client() as second:
            assert value(await second.query("SELECT second")) == "1: SELECT second"


@wire
async def test_E10_a_cancel_that_cannot_be_passed_on_leaves_the_query_alone(proxy_for):
    finish = asyncio.Event()

    async def script(session: ServerEnd) -> None:
        await session.expect("Q")
        await finish.wait()
        session.answer("finished")
        await session.serve()

    async with ScriptedServer(script) as server:
        proxy = proxy_for(server, max_size=1)
        async with await proxy.client() as client:
            await client.send(messages.query("SELECT slow"))
            await until(lambda: server.sessions[0].heard)
            server.refuse()
            assert await send_cancel(proxy.address, client.key) == b""
            finish.set()
            assert value(await client.until_ready()) == "0: finished"
            assert value(await client.query("SELECT next")).endswith("next")
