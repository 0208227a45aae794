"""Group A, connection start, seen from the server's side: how the proxy logs in, and what it makes of refusals."""

import asyncio
import json
import os
import resource
import ssl
import subprocess
import sys
import textwrap

import pytest
from proxy_kit import config_for, until, wire

from cenote.testing.postgres import TLSFiles, fresh_database
from cenote.testing.scripted_server import PARAMETERS, ScriptedServer, ServerEnd
from cenote.testing.wire import Address, LoginRefused, RawClient, WireFailure, error, kinds, send_cancel, value
from cenote.wire import messages


def server_tls(files: TLSFiles, *alpn: str) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(files.server_certificate, files.server_key)
    if alpn:
        context.set_alpn_protocols(alpn)
    return context


async def first_error(proxy, **startup) -> dict[str, str]:
    """The error that a client hears at its log-in or, at the latest, at its first query."""
    try:
        client = await proxy.client(**startup)
    except LoginRefused as refused:
        return refused.fields
    async with client:
        await client.send(messages.query("SELECT 1"))
        return error(await client.until("E"))


@pytest.mark.parametrize("auth", ["trust", "password", "md5", "scram-sha-256"])
@pytest.mark.parametrize("version", [messages.PROTOCOL_3_0, messages.PROTOCOL_3_2], ids=["3.0", "3.2"])
@wire
async def test_A7_servers_of_both_versions_and_every_way_to_log_in_there(proxy_for, auth, version):
    secret_bytes = 4 if version == messages.PROTOCOL_3_0 else 256
    async with ScriptedServer(auth=auth, version=version, secret_bytes=secret_bytes) as server:
        proxy = proxy_for(server)
        async with await proxy.client() as client:
            assert value(await client.query("SELECT hello")) == "0: SELECT hello"


@pytest.mark.parametrize("secret_bytes", [4, 12, 32, 256])
@wire
async def test_A7_cancel_keys_are_translated_whatever_their_length(proxy_for, secret_bytes):
    async def slow(session: ServerEnd) -> None:
        while (await session.expect("Q")) != b"SELECT slow\0":
            session.answer("quick")
        await session.cancelled.wait()
        session.send(messages.error("ERROR", "57014", "canceling"), messages.ready())
        await session.serve()

    version = messages.PROTOCOL_3_0 if secret_bytes == 4 else messages.PROTOCOL_3_2
    for client_version in (messages.PROTOCOL_3_0, messages.PROTOCOL_3_2):
        async with ScriptedServer(slow, version=version, secret_bytes=secret_bytes) as server:
            proxy = proxy_for(server)
            async with await proxy.client(version=client_version) as client:
                await client.send(messages.query("SELECT slow"))
                await until(lambda server=server: server.sessions and server.sessions[0].heard)
                await send_cancel(proxy.address, client.key)
                assert error(await client.until_ready())["C"] == "57014"
                session = server.sessions[0]
                assert server.cancels == [(session.pid, session.secret)]
            await proxy.finish()


@pytest.mark.parametrize("answer", [b"N", b"E", b"x", b""])
@pytest.mark.parametrize("sslmode", ["prefer", "require"])
@wire
async def test_A1_a_server_without_tls_is_used_only_where_that_is_allowed(proxy_for, answer, sslmode):
    async def hello(session: ServerEnd) -> None:
        if answer != b"N":
            await session.exactly(8)
            session.send(answer if answer != b"E" else messages.error("FATAL", "0A000", "what SSL?"))
            session.close()
        elif await session.converse():
            await session.serve()

    async with ScriptedServer(on_connect=hello, ssl=answer) as server:
        proxy = proxy_for(server, sslmode=sslmode, acquire_timeout=2.0, connect_timeout=2)
        if sslmode == "prefer" and answer == b"N":
            async with await proxy.client() as client:
                assert value(await client.query("SELECT hello")) == "0: SELECT hello"
        else:
            assert await first_error(proxy)
            assert server.sessions == []


@wire
async def test_A2_bytes_that_a_server_sends_ahead_of_the_handshake_end_the_dial(proxy_for, tls_files):
    """Plain text behind the S would be taken for the server's (CVE-2021-23222)."""

    async def inject(session: ServerEnd) -> None:
        await session.exactly(8)
        session.send(b"S" + messages.AUTHENTICATION_OK + messages.READY_IDLE)
        await session.exactly(1 << 20)

    async with ScriptedServer(on_connect=inject, tls=server_tls(tls_files)) as server:
        proxy = proxy_for(server, sslmode="require", acquire_timeout=0.5, connect_timeout=2)
        assert await first_error(proxy)


@wire
async def test_A3_direct_tls_towards_a_server_needs_alpn(proxy_for, tls_files):
    async with ScriptedServer(tls=server_tls(tls_files, "postgresql"), direct=True) as server:
        proxy = proxy_for(server, sslmode="require", sslnegotiation="direct")
        async with await proxy.client() as client:
            assert value(await client.query("SELECT hello")) == "0: SELECT hello"
            chosen = server.sessions[0].writer.get_extra_info("ssl_object").selected_alpn_protocol()
            assert chosen == "postgresql"
    async with ScriptedServer(tls=server_tls(tls_files), direct=True) as server:
        proxy = proxy_for(
            server, sslmode="require", sslnegotiation="direct", acquire_timeout=0.5, connect_timeout=2
        )
        assert await first_error(proxy)
        assert server.sessions == [], "a server that does not know the protocol is not logged in to"


@wire
async def test_A3_tls_towards_a_server_checks_what_sslmode_says(proxy_for, tls_files):
    async with ScriptedServer(tls=server_tls(tls_files), ssl=b"S") as server:
        for options, trusted in (
            ({"sslmode": "require"}, True),
            ({"sslmode": "verify-full", "sslrootcert": str(tls_files.ca)}, True),
            ({"sslmode": "verify-ca", "sslrootcert": str(tls_files.server_certificate)}, False),
        ):
            proxy = proxy_for(server, acquire_timeout=20.0 if trusted else 0.5, connect_timeout=2, **options)
            if trusted:
                async with await proxy.client() as client:
                    assert value(await client.query("SELECT hello")).endswith("hello")
            else:
                assert await first_error(proxy)
            await proxy.finish()


# -- A17, A18: what the server says of itself -----------------------------------------------------------------


@wire
async def test_A17_clients_are_welcomed_while_the_server_is_away(proxy_for):
    """What the server once said of itself is known; only the query needs a server."""
    async with ScriptedServer() as server:
        proxy = proxy_for(server)
        async with await proxy.client() as first:
            assert first.parameters == dict(server.parameters)
        server.refuse()
        for session in server.sessions:
            session.reset()
        await proxy.reached(idle=0)
        async with await proxy.client() as second:
            assert second.parameters == first.parameters
            await second.send(messages.query("SELECT hello"))
            await proxy.reached(waiting=1)
            await server.listen()
            assert value(await second.until_ready()) == "1: SELECT hello"


@wire
async def test_A18_new_clients_hear_of_a_new_server_version(proxy_for):
    async with ScriptedServer() as server:
        proxy = proxy_for(server)
        async with await proxy.client() as old:
            assert old.parameters["server_version"] == PARAMETERS["server_version"]
            server.parameters["server_version"] = "19.1"
            for session in server.sessions:
                session.reset()
            await proxy.reached(idle=0)
            assert value(await old.query("SELECT hello")) == "1: SELECT hello"
        async with await proxy.client() as new:
            assert new.parameters["server_version"] == "19.1"
            assert kinds(await new.query("SELECT hello")) == "TDCZ", "and it hears it once"


# -- A21, A22: the server refuses ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sqlstate", "text"),
    [
        ("28P01", 'password authentication failed for user "app"'),
        ("28000", 'role "app" is not permitted to log in'),
        ("3D000", 'database "app" does not exist'),
        ("42501", 'permission denied for database "app"'),
    ],
)
@wire
async def test_A21_a_refusal_for_good_reaches_who_waits(proxy_for, sqlstate, text):
    async def refuse(session: ServerEnd) -> None:
        await session.exactly(8)
        session.send(messages.error("FATAL", sqlstate, text))
        session.close()

    async with ScriptedServer(on_connect=refuse) as server:
        proxy = proxy_for(server, acquire_timeout=30)
        began = asyncio.get_running_loop().time()
        fields = await first_error(proxy)
        assert fields["C"] == sqlstate
        assert text in fields["M"]
        assert asyncio.get_running_loop().time() - began < 10, "it does not wait for what will not change"


@pytest.mark.parametrize(
    ("sqlstate", "text"), [("57P03", "the database system is starting up"), ("53300", "sorry, too many clients")]
)
@wire
async def test_A21_who_waits_goes_on_waiting_while_a_refusal_passes(proxy_for, sqlstate, text):
    dials = []

    async def starting(session: ServerEnd) -> None:
        dials.append(session)
        if len(dials) <= 3:
            await session.exactly(8)
            session.send(messages.error("FATAL", sqlstate, text))
            session.close()
        elif await session.converse():
            await session.serve()

    async with ScriptedServer(on_connect=starting) as server:
        proxy = proxy_for(server)
        async with await proxy.client() as client:
            assert value(await client.query("SELECT hello")) == "0: SELECT hello"
        assert len(dials) >= 4


@wire
async def test_A21_a_refusal_that_lasts_is_named_when_the_wait_is_over(proxy_for):
    async def full(session: ServerEnd) -> None:
        await session.exactly(8)
        session.send(messages.error("FATAL", "53300", "sorry, too many clients already"))
        session.close()

    async with ScriptedServer(on_connect=full) as server:
        proxy = proxy_for(server, acquire_timeout=2.0)
        fields = await first_error(proxy)
        assert fields["C"] == "53300"
        assert "too many clients already" in fields["M"], "the server's own words"


@pytest.mark.parametrize(
    ("role", "sqlstate"),
    [("LOGIN VALID UNTIL '2000-01-01'", "28P01"), ("NOLOGIN", "28000"), ("LOGIN CONNECTION LIMIT 0", "53300")],
)
@wire
async def test_A15_what_keeps_a_role_out_at_the_server_keeps_it_out_here(proxy_for, pg18, role, sqlstate):
    """In the server's words: the password was right, so there is nothing to hide."""
    pg18.psql(f"CREATE ROLE outsider PASSWORD 'secret' {role}", database="postgres")
    try:
        proxy = proxy_for(pg18, users={"outsider": {"password": "secret"}}, acquire_timeout=2.0)
        fields = await first_error(proxy, user="outsider", password="secret")
        assert fields["C"] == sqlstate
        assert "outsider" in fields["M"]
        await proxy.finish()
    finally:
        pg18.psql("DROP ROLE outsider", database="postgres")


@wire
async def test_A22_a_login_event_trigger_speaks_to_the_client_that_made_the_proxy_connect(proxy_for, pg18):
    with fresh_database(pg18) as name:
        pg18.psql(
            "CREATE FUNCTION keep_out() RETURNS event_trigger LANGUAGE plpgsql AS"
            " $$ BEGIN IF session_user = 'app' THEN RAISE EXCEPTION 'closed on Sundays'; END IF; END $$;"
            " CREATE EVENT TRIGGER doorman ON login EXECUTE FUNCTION keep_out();"
            " ALTER EVENT TRIGGER doorman ENABLE ALWAYS",
            database=name,
        )
        base = config_for(pg18)["databases"][pg18.database]
        proxy = proxy_for(pg18, databases={name: base | {"acquire_timeout": 3}})
        assert "closed on Sundays" in (await first_error(proxy, database=name))["M"]
        await proxy.finish()


# -- A23: too many ------------------------------------------------------------------------------------------

DAEMON = textwrap.dedent("""
    import asyncio, json, resource, sys, uvloop
    from cenote.proxy.config import config_of
    from cenote.proxy.daemon import Daemon

    async def main():
        resource.setrlimit(resource.RLIMIT_NOFILE, (60, 60))
        daemon = Daemon(config_of(json.loads(sys.stdin.readline())))
        await daemon.start()
        print(daemon.port, flush=True)
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline)
        await daemon.stop()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())
""")


@wire
async def test_A23_out_of_descriptors_it_goes_on_serving_and_recovers(pg18):
    """Many connect and say nothing: who is inside is served, and when they leave others get in."""
    command = [sys.executable, "-c", DAEMON]
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] > 300
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as daemon:  # noqa: ASYNC220
        assert daemon.stdin is not None
        assert daemon.stdout is not None
        daemon.stdin.write(json.dumps(config_for(pg18)) + "\n")
        daemon.stdin.flush()
        address = Address("127.0.0.1", int(daemon.stdout.readline()))
        try:
            inside = await RawClient.connect(address)
            await inside.startup(pg18.user, pg18.database, pg18.password)
            crowd = [await RawClient.connect(address) for _ in range(120)]
            assert value(await inside.query("SELECT 1")) == "1"
            used = cpu_seconds(daemon.pid)
            for _ in range(20):
                assert value(await inside.query("SELECT pg_sleep(0.02)")) == ""
            assert cpu_seconds(daemon.pid) - used < 0.3, "it does not spin on a listener it cannot serve"
            for client in crowd:
                await client.abort()

            async def another() -> bool:
                try:
                    async with await RawClient.connect(address, timeout=2) as client:
                        await client.startup(pg18.user, pg18.database, pg18.password)
                        return value(await client.query("SELECT 2")) == "2"
                except (WireFailure, OSError):
                    return False

            async with asyncio.timeout(10):
                while not await another():
                    pass
            await inside.terminate()
        finally:
            daemon.stdin.close()
            assert daemon.wait(15) == 0


@wire
async def test_A23_above_max_clients_who_comes_is_refused_with_the_numbers(proxy_for, pg18):
    proxy = proxy_for(pg18, listen={"max_clients": 3})
    clients = [await proxy.client() for _ in range(3)]
    async with await RawClient.connect(proxy.address) as fourth:
        fields = await fourth.refusal(proxy.user, proxy.database, proxy.password)
        assert (fields["V"], fields["C"]) == ("FATAL", "53300")
        assert "3" in fields["M"]
    assert await send_cancel(proxy.address, clients[0].key) == b"", "a cancel is no client"
    await clients.pop().terminate()
    await until(lambda: proxy.clients() == 2)
    async with await proxy.client() as fourth:
        assert value(await fourth.query("SELECT 1")) == "1"
    for client in clients:
        await client.terminate()


def cpu_seconds(pid: int) -> float:
    with open(f"/proc/{pid}/stat") as file:
        fields = file.read().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
