"""Group A, connection start: everything a client may send before it is asked who it is."""

import ssl
import struct

import pytest
from proxy_kit import RunningProxy, wire

from cenote.testing.wire import (
    Address,
    LoginRefused,
    RawClient,
    WireFailure,
    error,
    kinds,
    login_trace,
    ready,
    rows,
    unchecked_context,
    value,
)
from cenote.wire import messages

SSL, GSS = messages.SSL_REQUEST, messages.GSSENC_REQUEST
GREASE = 3 << 16 | 9999


async def said(address: Address, *sent: bytes) -> bytes:
    """All that comes back, up to the end of the connection, for bytes sent at once."""
    async with await RawClient.connect(address) as client:
        client.feed(*sent)
        return await client.rest()


async def same(proxy: RunningProxy, *sent: bytes) -> bytes:
    """What PostgreSQL says, which the proxy must say too but for places in the server's source."""
    server = Address(proxy.server.host, proxy.server.port)
    wanted, got = await said(server, *sent), await said(proxy.address, *sent)
    assert _without_places(got) == _without_places(wanted)
    return wanted


def _without_places(data: bytes) -> object:
    answer = data[:1] if data[:1] == b"N" else b""  # to an encryption request
    error = data[len(answer) :]
    if error[:1] != b"E" or error[5:6] != b"S":
        return data
    fields = messages.error_fields(error[5:])
    return answer, {name: text for name, text in fields.items() if name not in "FLR"}


def hello(proxy: RunningProxy, *more: tuple[str, str], version: int = messages.PROTOCOL_3_0) -> bytes:
    return messages.startup([("user", proxy.user), ("database", proxy.database), *more], version)


# -- A1, A2, A3: encryption ---------------------------------------------------------------------------------


@pytest.mark.parametrize("requests", [[SSL], [GSS], [SSL, GSS], [GSS, SSL]], ids=["ssl", "gss", "both", "turned"])
@wire
async def test_A1_encryption_requests_are_refused_and_the_session_goes_on(proxy, requests):
    async with await RawClient.connect(proxy.address) as client:
        for code in requests:
            assert await client.request(code) == b"N"
        await client.startup(proxy.user, proxy.database, proxy.password)
        assert value(await client.query("SELECT 1")) == "1"


@pytest.mark.parametrize("code", [SSL, GSS], ids=["ssl", "gss"])
@wire
async def test_A1_an_encryption_request_comes_at_most_once(proxy, code):
    for address in (Address(proxy.server.host, proxy.server.port), proxy.address):
        async with await RawClient.connect(address) as client:
            assert await client.request(code) == b"N"
            client.feed(messages.request(code))
            assert error(await client.closed())["C"] == "0A000"


@pytest.mark.parametrize("before", [[], [GSS]], ids=["ssl", "gss-first"])
@wire
async def test_A1_tls_is_offered_where_a_certificate_is_given(proxy_for, pg18, tls_listen, before):
    proxy = proxy_for(pg18, listen=tls_listen)
    async with await RawClient.connect(proxy.address) as client:
        for code in before:
            assert await client.request(code) == b"N"
        await client.negotiate_tls(unchecked_context())
        await client.startup(proxy.user, proxy.database, proxy.password)
        assert value(await client.query("SELECT 1")) == "1"


@wire
async def test_A1_inside_tls_no_encryption_can_be_asked_for_again(proxy_for, pg18, tls_listen):
    proxy = proxy_for(pg18, listen=tls_listen)
    for code in (SSL, GSS):
        async with await RawClient.connect(proxy.address, tls="postgres") as client:
            client.feed(messages.request(code))
            assert error(await client.closed())["C"] == "0A000"


@wire
async def test_A1_tls_can_be_required_of_sessions(proxy_for, pg18, tls_listen):
    proxy = proxy_for(pg18, listen=tls_listen | {"tls_mode": "require"})
    async with await RawClient.connect(proxy.address) as client:
        fields = await client.refusal(proxy.user, proxy.database, proxy.password)
        assert fields["C"] == "28000"
        assert "TLS" in fields["M"]
    async with await proxy.client(tls="postgres") as client:
        assert value(await client.query("SELECT 1")) == "1"


@pytest.mark.parametrize("code", [SSL, GSS], ids=["ssl", "gss"])
@wire
async def test_A2_bytes_behind_an_encryption_request_end_the_connection(proxy, code):
    assert b"received unencrypted data" in await same(proxy, messages.request(code) + hello(proxy))


@wire
async def test_A2_bytes_injected_before_a_handshake_are_never_taken_for_encrypted_ones(
    proxy_for, pg18, tls_listen
):
    proxy = proxy_for(pg18, listen=tls_listen)
    answer = await said(proxy.address, messages.request(SSL) + hello(proxy))
    assert answer in (b"", b"S"), "a client would have to trust whatever else is said before the handshake"


@wire
async def test_A2_bytes_that_trickle_in_are_no_injection(proxy):
    async with await RawClient.connect(proxy.address) as client:
        await client.send_in_pieces(messages.request(SSL))
        assert await client.exactly(1) == b"N"
        await client.startup(proxy.user, proxy.database, proxy.password)


@wire
async def test_A3_direct_tls_needs_alpn(proxy_for, pg18, tls_listen):
    proxy = proxy_for(pg18, listen=tls_listen)
    async with await proxy.client(tls="direct") as client:
        assert client.writer.get_extra_info("ssl_object").selected_alpn_protocol() == "postgresql"
        assert value(await client.query("SELECT 1")) == "1"
    for context in (unchecked_context(), unchecked_context("http/1.1")):
        with pytest.raises((WireFailure, OSError)):
            await proxy.client(tls="direct", context=context)


@wire
async def test_A3_direct_tls_is_refused_where_tls_is_off(proxy):
    with pytest.raises((WireFailure, OSError)):
        await proxy.client(tls="direct")


@wire
async def test_A3_direct_tls_may_trickle_in(proxy_for, pg18, tls_listen):
    """The first byte decides, whatever comes with it."""
    proxy = proxy_for(pg18, listen=tls_listen)
    client_hello = tls_client_hello()
    async with await RawClient.connect(proxy.address) as client:
        await client.send_in_pieces(client_hello, 7)
        assert (await client.exactly(1))[0] == 0x16, "the server's side of the handshake begins"


def tls_client_hello() -> bytes:
    outgoing = ssl.MemoryBIO()
    tls = unchecked_context("postgresql").wrap_bio(ssl.MemoryBIO(), outgoing)
    with pytest.raises(ssl.SSLWantReadError):
        tls.do_handshake()
    return outgoing.read()


# -- A4, A5, A6, A7: versions --------------------------------------------------------------------------------


@wire
async def test_A4_protocol_2_is_refused_in_words_that_it_can_read(proxy):
    body = struct.pack("!I64s32s64s64s64s", 2 << 16, b"app", b"app", b"", b"", b"")
    answer = await same(proxy, struct.pack("!I", len(body) + 4) + body)
    assert answer.startswith(b"EFATAL:  unsupported frontend protocol 2.0")


@pytest.mark.parametrize("version", [0, 1 << 16, 4 << 16, 77 << 16 | 1])
@wire
async def test_A4_other_major_versions_are_refused(proxy, version):
    body = struct.pack("!I", version) + b"user\0app\0\0"
    assert b"unsupported frontend protocol" in await same(proxy, struct.pack("!I", len(body) + 4) + body)


@pytest.mark.parametrize(
    ("version", "params", "negotiated"),
    [
        (messages.PROTOCOL_3_0, {}, 0),
        (messages.PROTOCOL_3_2, {}, 0),
        (3 << 16 | 3, {}, 1),
        (GREASE, {}, 1),
        (messages.PROTOCOL_3_0, {"_pq_.compression": "zstd"}, 1),
        (messages.PROTOCOL_3_2, {"_pq_.a": "1", "_pq_.b": "2"}, 1),
        (GREASE, {"_pq_.test_protocol_negotiation": ""}, 1),
    ],
)
@wire
async def test_A5_A6_versions_and_options_are_negotiated_once_and_to_the_byte(proxy, version, params, negotiated):
    direct = await logged_in_trace(Address(proxy.server.host, proxy.server.port), proxy, params, version)
    through = await logged_in_trace(proxy.address, proxy, params, version)
    assert login_trace(through) == login_trace(direct)
    assert kinds(through).count("v") == negotiated


async def logged_in_trace(address, login, params, version):
    async with await RawClient.connect(address) as client:
        trace = await client.startup(login.user, login.database, login.password, params, version)
        assert value(await client.query("SELECT 1")) == "1"
        await client.terminate()
        return trace


@pytest.mark.parametrize("version", [messages.PROTOCOL_3_0, messages.PROTOCOL_3_2], ids=["client3.0", "client3.2"])
@wire
async def test_A7_each_side_has_its_own_version(each_proxy, version):
    async with await each_proxy.client(version=version) as client:
        length = len(client.key[1])
        assert length == 4 if version == messages.PROTOCOL_3_0 else 4 <= length <= 256
        assert value(await client.query("SELECT 1")) == "1"


# -- A8, A10, A11: the startup packet ------------------------------------------------------------------------


@wire
async def test_A8_a_startup_packet_may_come_byte_by_byte(proxy):
    async with await RawClient.connect(proxy.address) as client:
        await client.send_in_pieces(hello(proxy))
        await client.authenticate(proxy.user, proxy.password)
        assert value(await client.query("SELECT 1")) == "1"


def padded(proxy: RunningProxy, size: int) -> bytes:
    """A startup packet of so many bytes, length included."""
    bare = len(hello(proxy, ("application_name", "")))
    return hello(proxy, ("application_name", "x" * (size - bare)))


@wire
async def test_A8_a_startup_packet_may_have_the_size_that_postgresql_takes(proxy):
    async with await RawClient.connect(proxy.address) as client:
        await client.send(padded(proxy, messages.MAX_STARTUP_BYTES))
        await client.authenticate(proxy.user, proxy.password)
        assert value(await client.query("SHOW application_name")) == "x" * 63
    assert await same(proxy, padded(proxy, messages.MAX_STARTUP_BYTES + 5)) == b""


@pytest.mark.parametrize("length", [0, 1, 4, 7, 10_005, 1 << 30, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF])
@wire
async def test_A8_a_length_that_lies_ends_the_connection_without_a_word(proxy, length):
    packet = struct.pack("!I", length) + hello(proxy)[4:]
    assert await same(proxy, packet) == b""


@pytest.mark.parametrize(
    "body",
    [b"", b"user", b"user\0app\0", b"user\0app", b"\0\0", b"user\0app\0\0trailing"],
    ids=repr,
)
@wire
async def test_A8_a_startup_packet_that_is_not_pairs_of_texts_is_refused(proxy, body):
    packet = struct.pack("!II", len(body) + 8, messages.PROTOCOL_3_0) + body
    answer = await said(proxy.address, packet)
    assert error_of(answer) in ("08P01", "28000")


def error_of(answer: bytes) -> str:
    assert answer[:1] == b"E", answer
    return messages.error_fields(answer[5:])["C"]


@wire
async def test_A8_garbage_instead_of_a_startup_packet_ends_the_connection(proxy):
    for garbage in (
        b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"\0" * 64,
        b"\xff" * 64,
        b"SSH-2.0-OpenSSH\r\n",
    ):
        assert await said(proxy.address, garbage) == b""


@pytest.mark.parametrize(
    ("options", "shown"),
    [
        ("-c work_mem=5MB --statement-timeout=77s", {"work_mem": "5MB", "statement_timeout": "77s"}),
        (r"-c application_name=two\ words\ and\\backslash", {"application_name": r"two words and\backslash"}),
        ("-cgeqo=off -c  enable_seqscan=0", {"geqo": "off", "enable_seqscan": "off"}),
        ("--app.tenant=42", {"app.tenant": "42"}),
        ("-S 3MB -fs", {"work_mem": "3MB", "enable_seqscan": "off"}),
    ],
)
@wire
async def test_A10_options_are_read_as_postgresql_reads_them(differential, options, shown):
    asked = [messages.query(f"SHOW {name}") for name in shown]
    answer = await differential(*asked, ready(len(asked)), params={"options": options})
    assert [row[0] for row in rows(answer)] == list(shown.values())


@wire
async def test_A10_startup_settings_do_not_reach_the_next_client(proxy_for, pg18):
    proxy = proxy_for(pg18, max_size=1)
    async with await proxy.client(params={"options": "-c work_mem=5MB", "DateStyle": "German"}) as client:
        pid = value(await client.query("SELECT pg_backend_pid()"))
        assert value(await client.query("SHOW work_mem")) == "5MB"
        async with await proxy.client() as other:
            assert value(await other.query("SELECT pg_backend_pid()")) == pid
            assert value(await other.query("SHOW work_mem")) == "4MB"
            assert value(await other.query("SHOW datestyle")) == "ISO, MDY"
        assert value(await client.query("SHOW datestyle")) == "German, DMY"


@pytest.mark.parametrize("options", ["-c", "-c work_mem", "--work_mem", "stranger", "-Q"])
@wire
async def test_A10_options_that_cannot_be_read_are_refused_in_postgresqls_words(proxy, options):
    words = []
    for address in (Address(proxy.server.host, proxy.server.port), proxy.address):
        async with await RawClient.connect(address) as client:
            fields = await client.refusal(proxy.user, proxy.database, proxy.password, {"options": options})
            words.append({name: fields.get(name) for name in "VCMH"})
    assert words[1] == words[0]


@pytest.mark.parametrize(
    ("params", "sqlstate"),
    [({"no_such_setting": "1"}, "42704"), ({"work_mem": "much"}, "22023"), ({"options": "-c port=1"}, "55P02")],
)
@wire
async def test_A10_a_setting_that_the_server_refuses_is_refused_with_its_sqlstate(proxy, params, sqlstate):
    async with await RawClient.connect(proxy.address) as client:
        fields = await first_error(client, proxy, params)
        assert fields["C"] == sqlstate
    async with await proxy.client() as client:
        assert value(await client.query("SELECT 1")) == "1"


async def first_error(client: RawClient, proxy: RunningProxy, params: dict[str, str]) -> dict[str, str]:
    """The error that ends the session, at the log-in or at its first query."""
    try:
        await client.startup(proxy.user, proxy.database, proxy.password, params)
    except LoginRefused as refused:
        return refused.fields
    await client.send(messages.query("SELECT 1"))
    return error(await client.closed())


@wire
async def test_A11_without_a_user_there_is_no_session(proxy):
    for given in ([], [("database", "app")], [("user", "")]):
        answer = await same(proxy, messages.startup(given))
        assert error_of(answer) == "28000"


@wire
async def test_A11_without_a_database_it_is_the_users_name(proxy):
    assert proxy.user == proxy.database
    async with await RawClient.connect(proxy.address) as client:
        await client.startup(proxy.user, "", proxy.password)
        assert value(await client.query("SELECT current_database()")) == proxy.user
