"""The log-in at a server: every way to get there, every way to prove who we are, and every way it can go wrong."""

import asyncio
import hashlib
import random
import socket
import struct
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import psycopg
import pytest
from login_kit import CountingThreads, Dialed, dialed, mutated, on_both_loops, place

from cenote import embedded
from cenote.embedded.configuration import literal
from cenote.errors import EmbeddedError
from cenote.proxy.auth.keys import KeyCache
from cenote.proxy.dial import Address, DialError, send_cancel
from cenote.reasons import Failure
from cenote.testing.faults import Fault, FaultProxy, every
from cenote.testing.postgres import DebianPostgres, TLSFiles
from cenote.testing.scripted_server import ScriptedServer, ServerEnd
from cenote.wire import messages
from cenote.wire.tls import server_context
from pool_kit import until

METHODS = ("trust", "password", "md5", "scram-sha-256")
PASSWORD = "s3crét pass"


@pytest.fixture(scope="module", params=[16, 18], ids=lambda version: f"pg{version}")
def methods(request: pytest.FixtureRequest) -> Iterator[embedded.Postgres]:
    """A server with a role for each way to log in, called like it."""
    hba = [f'host all "{method}" 127.0.0.1/32 {method}' for method in METHODS]
    with embedded.Postgres(request.param, hba=[*hba, "host all nobody 127.0.0.1/32 reject"]) as server:
        for method in METHODS:
            kind = "md5" if method == "md5" else "scram-sha-256"
            server.psql(
                f"SET password_encryption = '{kind}'; CREATE ROLE \"{method}\" LOGIN PASSWORD {literal(PASSWORD)}"
            )
        yield server


@pytest.fixture(scope="module")
def debian() -> Iterator[DebianPostgres]:
    """A server with TLS, and roles that it lets in with TLS only, without only, and by certificate only."""
    hba = [
        "hostssl all ssl_only 127.0.0.1/32 trust",
        "hostnossl all plain_only 127.0.0.1/32 trust",
        "host all either 127.0.0.1/32 trust",
        "host all ssl_only,plain_only 127.0.0.1/32 reject",
        "hostssl postgres app 127.0.0.1/32 cert",
    ]
    try:
        server = DebianPostgres(hba=hba)
    except EmbeddedError as missing:
        pytest.skip(str(missing))
    with server:
        for role in ("ssl_only", "plain_only", "either"):
            server.psql(f"CREATE ROLE {role} LOGIN")
        yield server


async def fails(server: Any, *args: Any, **named: Any) -> DialError:
    """The error with which dialing ends."""
    with pytest.raises(DialError) as caught:
        await dialed(server, *args, **named)
    return caught.value


# -- methods --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_A14_every_method_of_the_server_lets_us_in(methods, method):
    @on_both_loops
    async def body():
        server = await dialed(methods, method, PASSWORD, parameters={b"application_name": b"dialled"})
        assert await server.value("SELECT current_user || ' ' || current_setting('application_name')") == (
            f"{method} dialled"
        )
        assert server.inbox is None
        assert server.parameters[b"application_name"] == b"dialled"
        assert server.parameters[b"server_version"].startswith(str(methods.version).encode())
        assert await server.value("SELECT pg_backend_pid()") == str(server.backend_pid)
        await server.leave()

    body()


@pytest.mark.parametrize("method", METHODS[1:])
def test_A21_a_wrong_password_is_the_servers_own_error_and_final(methods, method):
    @on_both_loops
    async def body():
        error = await fails(methods, method, "wrong")
        assert (error.sqlstate, error.failure, error.step) == ("28P01", Failure.PERMANENT, "authentication")
        assert error.fields["M"] == f'password authentication failed for user "{method}"'
        assert f"127.0.0.1:{methods.port}" in error.message
        assert "check the password" in error.message

    body()


@pytest.mark.parametrize("method", METHODS[1:])
def test_A21_no_password_where_the_server_asks_for_one_is_our_error_and_final(methods, method):
    @on_both_loops
    async def body():
        error = await fails(methods, method, None)
        assert (error.sqlstate, error.failure, error.fields) == ("28000", Failure.PERMANENT, {})
        assert "no password" in error.message or "there is none" in error.message

    body()


@pytest.mark.parametrize(
    ("user", "dbname", "parameters", "sqlstate"),
    [
        ("trust", "nowhere", {}, "3D000"),
        ("nobody", "app", {}, "28000"),
        ("trust", "app", {b"no_such_setting": b"1"}, "42704"),
        ("trust", "app", {b"work_mem": b"much"}, "22023"),
    ],
)
def test_A21_what_the_server_refuses_for_good_is_permanent(methods, user, dbname, parameters, sqlstate):
    @on_both_loops
    async def body():
        error = await fails(methods, user, PASSWORD, dbname=dbname, parameters=parameters)
        assert (error.sqlstate, error.failure) == (sqlstate, Failure.PERMANENT)

    body()


@on_both_loops
async def _temporary(fields: bytes, sqlstate: str, failure: Failure) -> None:
    async def refuse(end: ServerEnd) -> None:
        end.send(fields)

    async with ScriptedServer(on_connect=refuse) as server:
        error = await fails(server)
        assert (error.sqlstate, error.failure) == (sqlstate, failure)


@pytest.mark.parametrize(
    ("sqlstate", "failure"),
    [("53300", Failure.TEMPORARY), ("57P03", Failure.DESTINATION), ("57P01", Failure.CONNECTION)],
)
def test_A21_the_sqlstate_says_what_a_refusal_means(sqlstate, failure):
    _temporary(messages.error("FATAL", sqlstate, "not now"), sqlstate, failure)


def test_A21_a_server_that_cannot_start_a_process_says_so_without_a_length():
    _temporary(b"Ecould not fork new process for connection: No memory\n\0", "53300", Failure.TEMPORARY)


def test_A14_md5_works_with_the_stored_form_of_the_password(methods):
    stored = "md5" + hashlib.md5(PASSWORD.encode() + b"md5").hexdigest()

    @on_both_loops
    async def body():
        server = await dialed(methods, "md5", stored)
        assert await server.value("SELECT 1") == "1"
        await server.leave()

    body()


def test_A14_scram_keys_are_derived_once_and_in_a_thread(methods):
    @on_both_loops
    async def body():
        with CountingThreads() as threads:
            keys = KeyCache(threads)
            servers = await asyncio.gather(
                *(dialed(methods, "scram-sha-256", PASSWORD, keys=keys) for _ in range(5))
            )
            servers.append(await dialed(methods, "scram-sha-256", PASSWORD, keys=keys))
            assert threads.given == 1
            for server in servers:
                await server.leave()

    body()


def test_A22_notices_of_the_log_in_are_handed_on():
    @on_both_loops
    async def body():
        async def chatter(end: ServerEnd) -> None:
            end.send(messages.notice("WARNING", "01000", "collation"))
            await end.serve()

        async def connect(end: ServerEnd) -> None:
            await end.exactly(8)
            end.send(messages.AUTHENTICATION_OK, messages.notice("WARNING", "01000", "early"))
            end.welcome(but="R")
            await chatter(end)

        said: list[dict[str, str]] = []
        async with ScriptedServer(on_connect=connect) as scripted:
            server = await dialed(scripted, notice=said.append)
            assert [fields["M"] for fields in said] == ["early"]
            # What comes behind ReadyForQuery belongs to the session.
            await until(lambda: b"collation" in server.early)
            server.abort()
            await server.over

    body()


# -- protocol versions ----------------------------------------------------------------------------------------


def test_A7_the_newest_protocol_of_the_server_is_spoken(methods):
    @on_both_loops
    async def body():
        server = await dialed(methods, "trust")
        newest, secret = (messages.PROTOCOL_3_2, 32) if methods.version == 18 else (messages.PROTOCOL_3_0, 4)
        assert (server.version, len(server.backend_secret)) == (newest, secret)
        await server.leave()

    body()


@pytest.mark.parametrize(
    "answer",
    [messages.error("FATAL", "0A000", "unsupported"), messages.error("ERROR", "08P01", "startup version"), b""],
    ids=["unsupported", "violation", "silence"],
)
def test_A7_what_hangs_up_on_a_new_protocol_is_asked_for_the_old_one_and_remembered(answer):
    @on_both_loops
    async def body():
        asked: list[int] = []

        async def connect(end: ServerEnd) -> None:
            length, version = struct.unpack("!II", await end.exactly(8))
            await end.exactly(length - 8)
            asked.append(version)
            if version > messages.PROTOCOL_3_0:
                end.send(answer)
            else:
                end.welcome()
                await end.serve()

        async with ScriptedServer(on_connect=connect) as scripted:
            for _ in range(2):
                server = await dialed(scripted)
                assert server.version == messages.PROTOCOL_3_0
                await server.leave()
        assert asked == [messages.PROTOCOL_3_2, messages.PROTOCOL_3_0, messages.PROTOCOL_3_0]

    body()


# -- ways there -----------------------------------------------------------------------------------------------


def test_E6_a_unix_socket_is_dialled_and_cancelled_through(pg18):
    @on_both_loops
    async def body():
        server = await dialed(pg18, host=str(pg18.socket_dir), sslmode="require")  # sslmode says nothing here
        assert await server.value("SELECT inet_server_port()") is None
        await cancels(server)
        await server.leave()

    body()


async def cancels(server: Dialed) -> None:
    """A cancel request through the server's endpoint ends its query."""
    answer = asyncio.create_task(server.ask("SELECT pg_sleep(30)"))
    # Cancelled before it has begun, it would go on: ask until it has ended.
    while not answer.done():
        assert await send_cancel(server.endpoint, server.backend_pid, server.backend_secret)
        await asyncio.wait([answer], timeout=0.02)
    errors = [messages.error_fields(body)["C"] for kind, body in answer.result() if kind == "E"]
    assert errors == ["57014"]


def test_E6_a_cancel_request_reaches_the_query_over_tcp(pg):
    @on_both_loops
    async def body():
        server = await dialed(pg)
        await cancels(server)
        assert await server.value("SELECT 1") == "1"
        await server.leave()

    body()


@pytest.mark.debian_pg
@pytest.mark.parametrize("sslmode", ["prefer", "require", "verify-full"])
def test_E6_a_cancel_request_goes_encrypted_where_the_session_is(debian, sslmode):
    @on_both_loops
    async def body():
        root = str(debian.tls.ca) if sslmode == "verify-full" else None
        server = await dialed(debian, sslmode=sslmode, sslrootcert=root)
        assert server.endpoint.tls is not None
        assert await server.value("SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()") == "t"
        await cancels(server)
        await server.leave()

    body()


def test_E8_a_cancel_request_that_nobody_answers_ends_in_time():
    @on_both_loops
    async def body():
        async def never(end: ServerEnd) -> None:
            await end.silent()

        async with ScriptedServer(on_cancel=never) as scripted:
            server = await dialed(scripted)
            assert not await send_cancel(server.endpoint, 1, b"abcd", timeout=0.05)
            await server.leave()
        assert not await send_cancel(server.endpoint, 1, b"abcd", timeout=5)  # nobody listens now

    body()


def test_E6_the_resolved_address_is_kept_and_not_resolved_again(pg18):
    @on_both_loops
    async def body():
        server = await dialed(pg18, host="localhost")
        assert server.endpoint.host == "localhost"
        assert server.endpoint.sockaddr[:2] == ("127.0.0.1", pg18.port)
        assert str(server.endpoint) == f"localhost:{pg18.port} (127.0.0.1)"
        await server.leave()

    body()


SSLMODES = ("disable", "allow", "prefer", "require")


@pytest.mark.debian_pg
@pytest.mark.parametrize("sslmode", SSLMODES)
@pytest.mark.parametrize("role", ["ssl_only", "plain_only", "either"])
def test_A1_sslmode_means_what_it_means_to_libpq(debian, role, sslmode):
    dsn = f"host=127.0.0.1 port={debian.port} dbname=app user={role} sslmode={sslmode} gssencmode=disable"
    query = "SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()"
    try:
        with psycopg.connect(dsn) as conn:
            wanted = "t" if conn.execute(query).fetchone()[0] else "f"
    except psycopg.OperationalError:
        wanted = "refused"

    @on_both_loops
    async def body():
        if wanted == "refused":
            error = await fails(debian, role, sslmode=sslmode)
            assert (error.sqlstate, error.failure) == ("28000", Failure.PERMANENT)
        else:
            server = await dialed(debian, role, sslmode=sslmode)
            assert await server.value(query) == wanted
            assert (server.endpoint.tls is not None) == (wanted == "t")
            await server.leave()

    body()


@pytest.mark.parametrize("sslmode", [*SSLMODES, "verify-full"])
def test_A1_a_server_without_tls_serves_whoever_does_not_need_it(pg18, sslmode, tls_files):
    @on_both_loops
    async def body():
        root = str(tls_files.ca) if sslmode == "verify-full" else None
        if sslmode in ("disable", "allow", "prefer"):
            server = await dialed(pg18, sslmode=sslmode, sslrootcert=root)
            assert server.endpoint.tls is None
            await server.leave()
        else:
            error = await fails(pg18, sslmode=sslmode, sslrootcert=root)
            assert (error.step, error.failure) == ("tls", Failure.PERMANENT)
            assert "has no TLS" in error.message

    body()


@pytest.mark.debian_pg
@pytest.mark.parametrize("sslmode", ["require", "verify-ca", "verify-full"])
@pytest.mark.parametrize("authority", ["right", "wrong"])
def test_A1_certificates_are_checked_as_libpq_checks_them(debian, tls_files: TLSFiles, sslmode, authority):
    root = str(debian.tls.ca if authority == "right" else tls_files.ca)
    dsn = f"host=127.0.0.1 port={debian.port} dbname=app user=either sslmode={sslmode} sslrootcert={root}"
    try:
        psycopg.connect(dsn).close()
        wanted = True
    except psycopg.OperationalError:
        wanted = False

    @on_both_loops
    async def body():
        if wanted:
            await (await dialed(debian, "either", sslmode=sslmode, sslrootcert=root)).leave()
        else:
            error = await fails(debian, "either", sslmode=sslmode, sslrootcert=root)
            assert (error.step, error.failure) == ("tls", Failure.PERMANENT)
            assert "certificate" in error.message

    body()


@pytest.mark.debian_pg
def test_A1_verify_full_wants_the_name_we_called_in_the_certificate(debian):
    @on_both_loops
    async def body():
        unnamed = {"host": "127.1", "sslrootcert": str(debian.tls.ca)}
        await (await dialed(debian, "either", sslmode="verify-ca", **unnamed)).leave()
        error = await fails(debian, "either", sslmode="verify-full", **unnamed)
        assert (error.step, error.failure) == ("tls", Failure.PERMANENT)
        assert "127.1" in error.message

    body()


@pytest.mark.debian_pg
def test_A1_a_client_certificate_logs_in_where_the_server_asks_for_one(debian):
    @on_both_loops
    async def body():
        certificate = {"sslcert": str(debian.tls.client_certificate), "sslkey": str(debian.tls.client_key)}
        server = await dialed(debian, password=None, dbname="postgres", sslmode="require", **certificate)
        assert await server.value("SELECT client_dn FROM pg_stat_ssl WHERE pid = pg_backend_pid()") == "/CN=app"
        await server.leave()
        error = await fails(debian, dbname="postgres", sslmode="require")
        assert (error.sqlstate, error.failure) == ("28000", Failure.PERMANENT)

    body()


def test_A1_a_certificate_file_that_is_missing_is_named(pg18, tmp_path):
    @on_both_loops
    async def body():
        error = await fails(pg18, sslmode="verify-full", sslrootcert=str(tmp_path / "none.crt"))
        assert (error.step, error.failure) == ("tls", Failure.PERMANENT)
        assert "none.crt" in error.message

    body()


def test_A3_direct_tls_is_spoken_to_servers_with_alpn(tls_files: TLSFiles):
    @on_both_loops
    async def body():
        context = server_context(tls_files.server_certificate, tls_files.server_key)
        async with ScriptedServer(tls=context, direct=True) as scripted:
            options = {"sslmode": "verify-full", "sslrootcert": str(tls_files.ca), "sslnegotiation": "direct"}
            server = await dialed(scripted, **options)
            assert server.endpoint.direct
            assert server.tls.alpn == "postgresql"
            assert await send_cancel(server.endpoint, 5, b"abcd")
            assert scripted.cancels == [(5, b"abcd")]
            await server.leave()

    body()


def test_A3_direct_tls_without_alpn_is_refused(tls_files: TLSFiles):
    @on_both_loops
    async def body():
        context = server_context(tls_files.server_certificate, tls_files.server_key)
        context.set_alpn_protocols(["http/1.1"])
        async with ScriptedServer(tls=context, direct=True) as scripted:
            error = await fails(scripted, sslmode="require", sslnegotiation="direct")
            assert error.step == "tls"

    body()


@pytest.mark.parametrize("answer", [b"S" + b"R\0\0\0\x08\0\0\0\0", b"X", b"HTTP/1.1 400"])
def test_A2_bytes_that_a_server_slips_in_before_the_handshake_end_the_dial(answer):
    @on_both_loops
    async def body():
        async def connect(end: ServerEnd) -> None:
            await end.exactly(8)
            end.send(answer)
            await end.ended()

        async with ScriptedServer(on_connect=connect) as scripted:
            error = await fails(scripted, sslmode="require")
            assert (error.sqlstate, error.step) == ("08P01", "tls")

    body()


def test_A1_an_error_instead_of_an_answer_to_sslrequest_is_not_believed():
    @on_both_loops
    async def body():
        async def connect(end: ServerEnd) -> None:
            await end.exactly(8)
            end.send(messages.error("FATAL", "28000", "a man in the middle says hello"))

        async with ScriptedServer(on_connect=connect) as scripted:
            error = await fails(scripted, sslmode="require")
            assert error.failure == Failure.TEMPORARY
            assert "hello" not in error.message

    body()


# -- several hosts, and time ----------------------------------------------------------------------------------


def closed_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def test_F21_hosts_are_tried_in_order_until_one_answers(pg18):
    @on_both_loops
    async def body():
        async def never(end: ServerEnd) -> None:
            await end.silent()

        async with ScriptedServer(on_connect=never) as silent:
            for port in (closed_port(), silent.port):
                async with FaultProxy("127.0.0.1", pg18.port) as there:
                    both = SimpleNamespace(host="127.0.0.1,127.0.0.1", port=f"{port},{there.port}")
                    server = await dialed_at(both, pg18, timeout=2.5)
                    assert server.endpoint.port == there.port
                    await server.leave()

    body()


async def dialed_at(where: Any, login: Any, **named: Any) -> Dialed:
    """Dial hosts that each have their port."""
    from cenote.proxy.dial import dial

    base = place(login).model_copy(update={"host": where.host, "port": where.port})
    return await dial(Dialed, base, login.user, login.password, {}, keys=KeyCache(), dbname="app", **named)


def test_F21_hosts_that_all_fail_are_all_named():
    @on_both_loops
    async def body():
        ports = closed_port(), closed_port()
        both = SimpleNamespace(host="127.0.0.1,127.0.0.1", port=f"{ports[0]},{ports[1]}")
        with pytest.raises(DialError) as caught:
            await dialed_at(both, SimpleNamespace(host="x", port=1, user="app", password="x"), timeout=5.0)
        assert caught.value.failure == Failure.DESTINATION
        assert all(f"127.0.0.1:{port}: connect: " in caught.value.message for port in ports)

    body()


def test_F21_a_host_that_does_not_let_us_in_is_the_end_of_the_list(methods):
    @on_both_loops
    async def body():
        async with FaultProxy("127.0.0.1", methods.port) as second:
            both = SimpleNamespace(host="127.0.0.1,127.0.0.1", port=f"{methods.port},{second.port}")
            login = SimpleNamespace(host="x", port=1, user="md5", password="wrong")
            with pytest.raises(DialError) as caught:
                await dialed_at(both, login, timeout=5.0)
            assert caught.value.sqlstate == "28P01"
            assert second.accepted == 0

    body()


@pytest.mark.parametrize("step", ["refused", "unix", "dns", "tls", "authentication"])
def test_F21_every_step_says_where_it_failed_and_what_it_means(step, tmp_path):
    @on_both_loops
    async def body():
        async def silent(end: ServerEnd) -> None:
            await end.silent()

        async with ScriptedServer(on_connect=silent) as scripted:
            where: dict[str, Any] = {"timeout": 1.0}
            if step == "refused":
                where |= {"port": closed_port(), "timeout": 5.0}
            elif step == "unix":
                where |= {"host": str(tmp_path), "timeout": 5.0}
            elif step == "dns":
                where |= {"host": "no-such-host.invalid", "timeout": 5.0}
            elif step == "tls":
                where |= {"sslmode": "prefer"}
            error = await fails(scripted, **where)
            expected = "connect" if step in ("refused", "unix") else step
            assert (error.sqlstate, error.failure, error.step) == ("08001", Failure.DESTINATION, expected)
            assert f"{expected}: " in error.message

    body()


def test_F21_a_dial_that_is_cancelled_leaves_nothing(pg18):
    @on_both_loops
    async def body():
        for turns in range(40):
            task = asyncio.create_task(dialed(pg18))
            for _ in range(turns):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait([task])
            if not task.cancelled():
                await task.result().leave()

    body()


# -- malformed, cut, lying ------------------------------------------------------------------------------------

OK = messages.AUTHENTICATION_OK
KEY = messages.backend_key_data(1, b"abcd")
MALFORMED = {
    "nothing": b"",
    "another-protocol": b"HTTP/1.1 400 Bad Request\r\n\r\n",
    "no-length": b"R\0\0\0\3",
    "endless-length": b"S\x7f\xff\xff\xff",
    "endless-authentication": b"R\x40\0\0\0\0\0\0\0",
    "short-authentication": b"R\0\0\0\6\0\0",
    "unknown-authentication": messages.message(b"R", b"\0\0\0\x63"),
    "kerberos": messages.message(b"R", b"\0\0\0\2"),
    "gssapi": messages.message(b"R", b"\0\0\0\7"),
    "md5-without-salt": messages.message(b"R", b"\0\0\0\5"),
    "challenge-without-scram": messages.authentication_sasl_continue(b"r=x"),
    "proof-without-scram": messages.authentication_sasl_final(b"v=x"),
    "no-mechanism": messages.authentication_sasl([]),
    "unknown-mechanism": messages.authentication_sasl(["GS2-KRB5"]),
    "mechanism-without-end": messages.message(b"R", b"\0\0\0\x0aSCRAM-SHA-256"),
    "let-in-before-the-proof": messages.authentication_sasl(["SCRAM-SHA-256"]) + OK,
    "twice-asked": messages.AUTHENTICATION_CLEARTEXT + messages.AUTHENTICATION_CLEARTEXT,
    "twice-let-in": OK + OK,
    "ready-before-let-in": messages.READY_IDLE,
    "ready-in-a-transaction": OK + KEY + messages.ready(b"T"),
    "short-key": OK + messages.backend_key_data(1, b"abc"),
    "long-key": OK + messages.backend_key_data(1, b"x" * 257),
    "odd-parameter": OK + messages.message(b"S", b"name\0"),
    "parameter-without-end": OK + messages.message(b"S", b"name\0value"),
    "error-without-end": messages.message(b"E", b"SFATAL"),
    "unknown-message": OK + messages.message(b"~", b"what"),
    "row": OK + messages.data_row([b"1"]),
    "negotiation-of-nothing": messages.message(b"v", b""),
    "negotiation-upwards": messages.negotiate_protocol_version(messages.PROTOCOL_3_2 + 1, []),
    "negotiation-of-version-2": messages.negotiate_protocol_version(2 << 16, []),
    "negotiation-of-strange-options": messages.negotiate_protocol_version(messages.PROTOCOL_3_0, ["_pq_.x"]),
    "twice-negotiated": messages.negotiate_protocol_version(messages.PROTOCOL_3_0, []) * 2,
    "late-negotiation": OK + messages.negotiate_protocol_version(messages.PROTOCOL_3_0, []),
    "endless-notices": messages.notice("NOTICE", "00000", "x" * 60_000) * 30,
}


@pytest.mark.parametrize("name", MALFORMED)
def test_A8_a_server_that_breaks_the_protocol_gets_a_clear_error(name):
    @on_both_loops
    async def body():
        async def connect(end: ServerEnd) -> None:
            length = int.from_bytes(await end.exactly(4), "big")
            await end.exactly(length - 4)
            end.send(MALFORMED[name])
            await end.flushed()

        async with ScriptedServer(on_connect=connect) as scripted:
            error = await fails(scripted)
            assert error.sqlstate in ("08P01", "08006", "28000")
            assert error.failure in (Failure.CONNECTION, Failure.PERMANENT)
            assert error.message.startswith(f"127.0.0.1:{scripted.port}: ")

    body()


@pytest.mark.parametrize("lie", ["nonce", "signature", "no-signature", "iterations", "salt", "error"])
def test_A14_a_server_that_does_not_know_our_password_is_not_believed(lie):
    @on_both_loops
    async def body():
        async def connect(end: ServerEnd) -> None:
            length = int.from_bytes(await end.exactly(4), "big")
            await end.exactly(length - 4)
            end.send(messages.authentication_sasl(["SCRAM-SHA-256"]))
            nonce = (await end.expect("p")).rpartition(b"r=")[2]
            challenge = {
                "nonce": b"r=other,s=c2FsdA==,i=4096",
                "iterations": b"r=%sX,s=c2FsdA==,i=2000000000" % nonce,
                "salt": b"r=%sX,s=,i=4096" % nonce,
            }.get(lie, b"r=%sX,s=c2FsdA==,i=4096" % nonce)
            end.send(messages.authentication_sasl_continue(challenge))
            await end.expect("p")
            last = {"signature": b"v=" + b"A" * 43 + b"=", "error": b"e=other-error"}.get(lie)
            if last is not None:
                end.send(messages.authentication_sasl_final(last))
            end.send(OK, KEY, messages.READY_IDLE)
            await end.ended()

        async with ScriptedServer(on_connect=connect) as scripted:
            error = await fails(scripted)
            assert (error.sqlstate, error.failure) == ("28000", Failure.PERMANENT)

    body()


@pytest.mark.parametrize("how", ["close", "reset"])
@pytest.mark.parametrize("way", ["up", "down"])
def test_F21_a_dial_cut_at_any_byte_is_a_clean_error(methods, how, way):
    async def total() -> dict[str, int]:
        async with FaultProxy("127.0.0.1", methods.port) as between:
            server = await dialed(between, "scram-sha-256", PASSWORD, dbname="app")
            link = between.links[0]
            passed = {"up": link.up.passed, "down": link.down.passed}
            await server.leave()
            return passed

    @on_both_loops
    async def body():
        end = (await total())[way]
        for at in sorted({*range(0, end, 1 if end < 100 else 11), end - 1}):
            async with FaultProxy("127.0.0.1", methods.port, every(Fault(how, way, at=at))) as between:
                error = await fails(between, "scram-sha-256", PASSWORD, dbname="app")
                cut = ("08006", Failure.CONNECTION, "authentication")
                assert (error.sqlstate, error.failure, error.step) == cut, f"after {at} of {end} bytes"

    body()


def test_A8_a_server_that_speaks_byte_by_byte_is_understood(methods):
    @on_both_loops
    async def body():
        async with FaultProxy("127.0.0.1", methods.port, every(Fault("split", "down"))) as between:
            server = await dialed(between, "scram-sha-256", PASSWORD, dbname="app")
            assert await server.value("SELECT 1") == "1"
            await server.leave()

    body()


def test_E6_an_address_tells_where_it_is():
    assert str(Address("/run", 5432, socket.AF_UNIX, "/run/.s.PGSQL.5432")) == "/run/.s.PGSQL.5432"
    assert str(Address("db", 5432, socket.AF_INET, ("10.0.0.1", 5432))) == "db:5432 (10.0.0.1)"
    assert str(Address("10.0.0.1", 5432, socket.AF_INET, ("10.0.0.1", 5432))) == "10.0.0.1:5432"


@pytest.mark.parametrize("conversation", ["trust", "scram-sha-256"])
def test_A8_whatever_a_server_sends_ends_in_a_connection_or_a_clear_error(conversation):
    hello = {
        "trust": OK,
        "scram-sha-256": messages.authentication_sasl(["SCRAM-SHA-256"])
        + messages.authentication_sasl_continue(b"r=abc,s=c2FsdA==,i=2")
        + messages.authentication_sasl_final(b"v=" + b"A" * 43 + b"="),
    }
    whole = (
        messages.negotiate_protocol_version(messages.PROTOCOL_3_0, [])
        + hello[conversation]
        + messages.parameter_status("server_version", "18.0")
        + messages.notice("NOTICE", "00000", "hello")
        + KEY
        + messages.READY_IDLE
    )

    @on_both_loops
    async def body():
        chance = random.Random(12)

        async def connect(end: ServerEnd) -> None:
            length = int.from_bytes(await end.exactly(4), "big")
            await end.exactly(length - 4)
            end.send(mutated(whole, chance))

        async with ScriptedServer(on_connect=connect) as scripted:
            for _ in range(300):
                try:
                    server = await dialed(scripted)
                except DialError:
                    pass
                else:
                    await server.leave()

    body()
