"""Group A, the doors: who a client is said to be, and how many may come in."""

import asyncio
import logging
import os
import resource
import socket
import struct
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import pytest
from benchmarks.proxy.storm import Door, storm
from proxy_kit import RunningProxy, running, until, wire, works

from cenote.errors import ConfigError
from cenote.proxy.config import config_of
from cenote.testing.wire import Address, LoginRefused, RawClient, error, unchecked_context, value
from cenote.wire import messages
from cenote.wire.scram import Keys, Verifier

SIGNATURE = bytes.fromhex("0d0a0d0a000d0a515549540a")
SALT = bytes(range(16))
CLIENT = "203.0.113.9:51034"
V1 = b"PROXY TCP4 203.0.113.9 10.0.0.1 51034 6432\r\n"
V2 = SIGNATURE + b"\x21\x11\0\x0c" + bytes([203, 0, 113, 9, 10, 0, 0, 1]) + struct.pack("!HH", 51034, 6432)
LOCAL = SIGNATURE + b"\x20\0\0\0"
HEADERS = {"v1": V1, "v2": V2}
BALANCED = {"proxy_protocol_from": ["127.0.0.0/8"]}


def named(name: bytes) -> bytes:
    """V2 with the host name that the client asked for."""
    vector = struct.pack("!BH", 2, len(name)) + name
    return V2[:14] + struct.pack("!H", 12 + len(vector)) + V2[16:] + vector


def addresses(proxy: RunningProxy) -> list[str]:
    return [client.address for client in proxy.call(lambda: list(proxy.daemon.clients.values()))]


async def through(proxy: RunningProxy, header: bytes, *, pieces: int = 0, **connect: Any) -> RawClient:
    """A client behind a balancer that sends this header."""
    client = await RawClient.connect(proxy.address, **connect)
    if pieces:
        await client.send_in_pieces(header, pieces)
    else:
        client.feed(header)
    try:
        await client.startup(proxy.user, proxy.database, proxy.password)
    except BaseException:
        await client.abort()
        raise
    return client


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Callable[[str], list[Any]]:
    """What was logged with this reason."""
    caplog.set_level(logging.DEBUG, "cenote")

    def found(reason: str) -> list[Any]:
        return [
            record.fields  # type: ignore[attr-defined]
            for record in caplog.records
            if getattr(record, "fields", {}).get("reason") == reason
        ]

    return found


# -- A20: the PROXY protocol ---------------------------------------------------------------------------------


@pytest.mark.parametrize("pieces", [0, 1, 7])
@pytest.mark.parametrize("header", HEADERS.values(), ids=HEADERS)
@wire
async def test_A20_a_header_from_a_trusted_address_says_who_the_client_is(proxy_for, pg18, header, pieces):
    proxy = proxy_for(pg18, listen=BALANCED)
    async with await through(proxy, header, pieces=pieces) as client:
        assert addresses(proxy) == [CLIENT]
        await works(client)


@pytest.mark.parametrize("header", HEADERS.values(), ids=HEADERS)
@wire
async def test_A20_what_follows_the_header_may_come_with_it(proxy_for, pg18, header):
    proxy = proxy_for(pg18, listen=BALANCED)
    async with await RawClient.connect(proxy.address) as client:
        client.feed(header + messages.startup([("user", proxy.user), ("database", proxy.database)]))
        await client.authenticate(proxy.user, proxy.password)
        assert addresses(proxy) == [CLIENT]


@pytest.mark.parametrize("header", HEADERS.values(), ids=HEADERS)
@wire
async def test_A20_the_header_comes_before_tls(proxy_for, pg18, tls_listen, header):
    proxy = proxy_for(pg18, listen=BALANCED | tls_listen | {"tls_mode": "require"})
    async with await RawClient.connect(proxy.address) as client:
        client.feed(header)
        await client.negotiate_tls(unchecked_context())
        await client.startup(proxy.user, proxy.database, proxy.password)
        assert addresses(proxy) == [CLIENT]
    async with await RawClient.connect(proxy.address) as client:
        client.feed(header)
        context = unchecked_context("postgresql")
        await client.writer.start_tls(context, server_hostname="localhost", ssl_handshake_timeout=10)
        await client.startup(proxy.user, proxy.database, proxy.password)
        await works(client)


@pytest.mark.parametrize("header", [LOCAL, b"PROXY UNKNOWN\r\n"], ids=["local", "unknown"])
@wire
async def test_A20_the_balancers_own_connection_keeps_its_address(proxy_for, pg18, header):
    proxy = proxy_for(pg18, listen=BALANCED)
    async with await through(proxy, header) as client:
        host, port = client.writer.get_extra_info("sockname")
        assert addresses(proxy) == [f"{host}:{port}"]


@wire
async def test_A20_a_cancel_request_has_a_header_before_it_too(proxy_for, pg18, admin):
    proxy = proxy_for(pg18, listen=BALANCED)
    async with await through(proxy, V2) as client:
        client.feed(messages.query("SELECT pg_sleep(60)"))
        await running(admin, "SELECT pg_sleep(60)")
        async with await RawClient.connect(proxy.address) as other:
            other.feed(V1 + messages.cancel_request(*client.key))
            assert await other.rest() == b""
        assert error(await client.until_ready())["C"] == "57014"


@wire
async def test_A20_a_name_in_the_header_becomes_the_clients_label(proxy_for, pg18):
    proxy = proxy_for(pg18, listen=BALANCED)
    async with await through(proxy, named(b"orders.example.net")):
        (login,) = proxy.call(lambda: [client.login for client in proxy.daemon.clients.values()])
        assert login.label == "orders.example.net"


NOT_HEADERS = {
    "startup": messages.startup([("user", "x")]),
    "encryption-request": messages.request(messages.SSL_REQUEST),
    "tls": b"\x16\x03\x01\x02\x00\x01",
    "http": b"GET / HTTP/1.0\r\n\r\n",
    "leading-zero": V1.replace(b"10.0.0.1", b"10.0.0.01"),
    "line-feed": V1.replace(b"\r", b""),
    "endless": b"PROXY UNKNOWN " + b"x" * 10_000,
    "version-3": V2.replace(b"\x21\x11", b"\x31\x11"),
    "too-long": SIGNATURE + b"\x21\x11\xff\xff",
    "cut-off": V2[:14] + b"\0\x0e" + V2[16:] + b"\2\0",
}


@pytest.mark.parametrize("first", NOT_HEADERS.values(), ids=NOT_HEADERS)
@wire
async def test_A20_without_a_proper_header_a_trusted_address_is_turned_away(proxy_for, pg18, said, first):
    proxy = proxy_for(pg18, listen=BALANCED)
    async with await RawClient.connect(proxy.address) as client:
        client.feed(first)
        host, port = client.writer.get_extra_info("sockname")
        assert await client.rest() == b""
    (line,) = await until(lambda: said("proxy_header"), "the log says so")
    assert line["client"] == f"{host}:{port}"
    assert proxy.daemon.login_failures == {"proxy_header": 1}


@pytest.mark.parametrize("header", HEADERS.values(), ids=HEADERS)
@wire
async def test_A20_from_everybody_else_a_header_is_garbage(proxy_for, pg18, said, header):
    for listen in ({}, {"proxy_protocol_from": ["10.0.0.0/8", "::1", "unix"]}):
        proxy = proxy_for(pg18, listen=listen)
        async with await RawClient.connect(proxy.address) as client:
            client.feed(header + messages.startup([("user", proxy.user), ("database", proxy.database)]))
            host, port = client.writer.get_extra_info("sockname")
            assert await client.rest() == b""
        lines = await until(lambda: said("protocol"), "the log says so")
        assert lines[-1]["client"] == f"{host}:{port}"
        assert proxy.daemon.login_failures == {"protocol": 1}
        async with await proxy.client() as client:
            await works(client)


@wire
async def test_A20_whoever_comes_by_the_unix_socket_can_be_trusted(proxy_for, pg18):
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        proxy = proxy_for(pg18, listen={"unix_dir": folder, "proxy_protocol_from": ["unix"]})
        address = Address(folder, proxy.port)
        async with await RawClient.connect(address) as client:
            client.feed(V1)
            await client.startup(proxy.user, proxy.database, proxy.password)
            assert addresses(proxy) == [CLIENT]
        async with await RawClient.connect(address) as client:
            client.feed(LOCAL)
            await client.startup(proxy.user, proxy.database, proxy.password)
            assert "unix" in addresses(proxy)
        async with await proxy.client() as client:  # TCP is not trusted
            await works(client)
        proxy.stop()


@wire
async def test_A20_rules_go_by_the_address_in_the_header(proxy_for, pg18, tmp_path):
    rules = tmp_path / "rules.conf"
    rules.write_text("host all all 203.0.113.9/32 scram-sha-256\nhost all all 127.0.0.0/8 reject\n")
    proxy = proxy_for(pg18, listen=BALANCED, top={"rules_file": str(rules)})
    async with await through(proxy, V2) as client:
        await works(client)
    for header in (LOCAL, V1.replace(b"203.0.113.9", b"203.0.113.8")):
        with pytest.raises(LoginRefused) as refused:
            await through(proxy, header)
        assert refused.value.fields["C"] == "28000"


@wire
async def test_A20_a_header_that_does_not_end_is_not_waited_for_longer_than_a_login(proxy_for, pg18):
    proxy = proxy_for(pg18, listen=BALANCED | {"login_timeout": 0.2})
    async with await RawClient.connect(proxy.address) as client:
        client.feed(V2[:20])
        assert error(await client.closed())["C"] == "08P01"
    assert proxy.daemon.login_failures == {"timeout": 1}


@pytest.mark.parametrize("word", ["10.0.0.1/8", "10.0.0.0/33", "balancer.example", "", "Unix"])
def test_A20_a_network_that_is_none_is_a_problem_of_the_configuration(word: str) -> None:
    with pytest.raises(ConfigError) as refused:
        config_of({"listen": {"proxy_protocol_from": ["unix", "10.0.0.0/8", "192.0.2.7", "2001:db8::/32", word]}})
    (problem,) = refused.value.problems
    assert f"listen.proxy_protocol_from = {word!r}" in problem


# -- A23: no descriptor left ---------------------------------------------------------------------------------


@contextmanager
def no_descriptors() -> Iterator[None]:
    """Within the block this process can open nothing."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(int(name) for name in os.listdir("/proc/self/fd"))
    taken = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 1, hard))
    try:
        with suppress(OSError):
            while True:
                taken.append(os.dup(0))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for number in taken:
            os.close(number)


@wire
async def test_A23_a_client_without_a_descriptor_is_told_and_the_next_one_is_served(proxy_for, pg18, said):
    proxy = proxy_for(pg18)
    loop = asyncio.get_running_loop()
    async with await proxy.client() as before:
        with ExitStack() as stack:
            socks = [stack.enter_context(socket.socket()) for _ in range(3)]
            stack.enter_context(no_descriptors())
            for sock in socks:
                sock.setblocking(False)
                await loop.sock_connect(sock, tuple(proxy.address))
            for sock in socks:
                answer = b""
                async with asyncio.timeout(10):
                    while chunk := await loop.sock_recv(sock, 4096):
                        answer += chunk
                assert messages.error_fields(answer[5:])["C"] == "53300"
            await works(before)
        async with await proxy.client() as after:
            await works(after)
    assert proxy.daemon.login_failures["no_descriptors"] == 3
    assert proxy.clients() == 0 or await until(lambda: proxy.clients() == 0, "all have left")


# -- caps ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["database", "user", "total"])
@wire
async def test_A21_one_client_above_a_cap_is_refused_with_its_numbers(proxy_for, pg18, what):
    listen: dict[str, Any] = {"max_clients": 2} if what == "total" else {}
    own = {"password": pg18.password}
    users = {pg18.user: own | ({"max_clients": 2} if what == "user" else {})}
    options = {"max_clients": 2} if what == "database" else {}
    proxy = proxy_for(pg18, listen=listen, users=users, **options)
    async with await proxy.client(), await proxy.client() as second:
        with pytest.raises(LoginRefused) as refused:
            await proxy.client()
        fields = refused.value.fields
        assert (fields["S"], fields["C"]) == ("FATAL", "53300")
        assert "max_clients is 2" in fields["M"]
        assert "2 clients" in fields["M"]
        assert {"database": f'"{proxy.database}"', "user": f'"{proxy.user}"', "total": ""}[what] in fields["M"]
        await second.terminate()
        await until(lambda: len(proxy.daemon.clients) == 1, "one has left")
        async with await proxy.client() as third:
            await works(third)
    word = "max_clients" if what == "total" else f"max_clients_{what}"
    assert proxy.daemon.login_failures == {word: 1}


@wire
async def test_A21_a_crowd_that_comes_at_once_does_not_pass_a_cap(proxy_for, pg18):
    """Also while all of them wait for the first server connection, which tells the parameters."""
    proxy = proxy_for(pg18, max_clients=5)
    came = await asyncio.gather(*(proxy.client() for _ in range(40)), return_exceptions=True)
    inside = [client for client in came if isinstance(client, RawClient)]
    assert len(inside) == 5
    assert {refused.fields["C"] for refused in came if isinstance(refused, LoginRefused)} == {"53300"}
    for client in inside:
        await client.close()


@wire
async def test_A21_caps_count_one_database_and_one_user_each(proxy_for, pg18):
    other = {"dbname": pg18.database, "host": pg18.host, "port": pg18.port, "sslmode": "disable"}
    proxy = proxy_for(pg18, databases={"other": other}, max_clients=1)
    async with await proxy.client(), await proxy.client(database="other") as second:
        await works(second)
        with pytest.raises(LoginRefused):
            await proxy.client()


@wire
async def test_A21_the_console_is_open_when_everything_is_full(proxy_for, pg18):
    users = {pg18.user: {"password": pg18.password, "max_clients": 1}}
    proxy = proxy_for(pg18, listen={"max_clients": 1}, users=users, top={"admin_users": [pg18.user]})
    async with await proxy.client() as client:
        async with await proxy.client(database="cenote") as first, await proxy.client(database="cenote"):
            assert "Z" in {message.kind for message in await first.query("SHOW CLIENTS")}
            with pytest.raises(LoginRefused):
                await proxy.client()
        await client.terminate()
        await until(lambda: proxy.clients() == 0, "all have left")
        # Those of the console were never counted.
        async with await proxy.client(database="cenote"), await proxy.client() as again:
            await works(again)


# -- bounds before anybody is known --------------------------------------------------------------------------


@wire
async def test_A25_silent_connections_do_not_keep_a_client_out(proxy_for, pg18, said):
    proxy = proxy_for(pg18, listen={"max_logins": 10})
    silent = [await RawClient.connect(proxy.address) for _ in range(30)]
    async with await proxy.client() as client:
        await works(client)
        first = error(await silent[0].closed())
        assert (first["S"], first["C"]) == ("FATAL", "53300")
        assert "max_logins" in first["M"]
        assert proxy.daemon.admission.cut >= 20
        await until(lambda: len(proxy.daemon.arriving) <= 10, "those that were cut are gone")
        assert proxy.daemon.login_failures["max_logins"] == proxy.daemon.admission.cut
    assert said("max_logins")
    for other in silent[1:]:
        await other.abort()


@wire
async def test_A25_half_a_handshake_is_ended_without_a_word(proxy_for, pg18, tls_listen):
    proxy = proxy_for(pg18, listen=tls_listen | {"max_logins": 1})
    async with await RawClient.connect(proxy.address) as client:
        assert await client.request(messages.SSL_REQUEST) == b"S"
        async with await proxy.client(tls="postgres") as other:
            await works(other)
            assert await client.rest() == b""


@wire
async def test_A25_a_crowd_waits_for_its_turns_and_nobody_is_lost(proxy_for, pg18):
    proxy = proxy_for(pg18, listen={"login_rate": 20.0, "max_logins": 20})
    admission = proxy.daemon.admission
    clients: list[RawClient] = []
    logins = []
    for number in range(1, 61):
        clients.append(await RawClient.connect(proxy.address))
        logins.append(asyncio.create_task(clients[-1].startup(proxy.user, proxy.database, proxy.password)))
        await until(lambda number=number: admission.admitted + admission.waiting == number, "it asks for its turn")
    assert admission.waiting > 20
    await asyncio.gather(*logins)
    for client in clients:
        await client.close()
    assert (admission.cut, admission.admitted, admission.waiting) == (0, 60, 0)


@wire
async def test_A25_of_a_crowd_larger_than_the_bound_everybody_gets_in(proxy_for, pg18, monkeypatch):
    """Those who have just come are not ended for others who have."""
    monkeypatch.setattr("cenote.proxy.admission._GRACE_S", 10.0)  # longer than a machine pauses
    keys = Keys.of_password(pg18.password, SALT)
    users = {pg18.user: {"password": Verifier.of_keys(keys, SALT).format(), "server_password": pg18.password}}
    proxy = proxy_for(pg18, listen={"login_rate": 500.0, "max_logins": 30}, users=users)
    took_s = await storm(Door(proxy.port, proxy.user, proxy.database, keys, None), 100)
    assert took_s > 0.1
    assert (proxy.daemon.admission.cut, proxy.daemon.login_failures) == (0, {})


@wire
async def test_A25_cancels_do_not_wait_in_line(proxy_for, pg18, admin):
    proxy = proxy_for(pg18, listen={"login_rate": 1.0})
    async with await proxy.client() as client:
        client.feed(messages.query("SELECT pg_sleep(60)"))
        await running(admin, "SELECT pg_sleep(60)")
        line = [asyncio.create_task(proxy.client()) for _ in range(20)]
        await until(lambda: proxy.daemon.admission.waiting >= 15, "there is a line")
        async with await RawClient.connect(proxy.address) as other:
            other.feed(messages.cancel_request(*client.key))
            assert await other.rest() == b""
        assert error(await client.until_ready())["C"] == "57014"
        assert proxy.daemon.admission.waiting >= 10
        for task in line:
            task.cancel()
        for came in await asyncio.gather(*line, return_exceptions=True):
            if isinstance(came, RawClient):
                await came.close()


@wire
async def test_A25_a_stranger_cannot_make_us_keep_more_than_a_little(proxy_for, pg18):
    """What is sent ahead of the log-in is not read beyond a bound."""
    proxy = proxy_for(pg18)
    async with await RawClient.connect(proxy.address) as client:
        client.feed(messages.startup([("user", proxy.user), ("database", proxy.database)]))
        await client.until("R")
        client.feed(messages.message(b"p", bytes(1 << 24))[:5] + bytes(1 << 22))
        kept = proxy.call(lambda: [guest.inbox.buffered() for guest in proxy.daemon.arriving])
        assert all(size <= 1 << 20 for size in kept)
        assert error(await client.closed())["C"] == "08P01"


# -- names ---------------------------------------------------------------------------------------------------


@wire
async def test_the_application_name_says_where_the_client_is(proxy_for, pg18):
    proxy = proxy_for(pg18, application_name_add_host=True)
    async with await proxy.client(params={"application_name": "billing"}) as client, await proxy.client() as plain:
        host, port = client.writer.get_extra_info("sockname")
        shown = f"billing - {host}:{port}"
        assert client.parameters["application_name"] == shown
        for _ in range(2):
            assert value(await client.query("SHOW application_name")) == shown
            host, port = plain.writer.get_extra_info("sockname")
            assert value(await plain.query("SHOW application_name")) == f"app - {host}:{port}"
        await client.query("SET application_name = 'its own'")
        assert value(await client.query("SHOW application_name")) == "its own"


@wire
async def test_a_long_application_name_gives_way_to_the_address(proxy_for, pg18):
    proxy = proxy_for(pg18, application_name_add_host=True)
    async with await proxy.client(params={"application_name": "x" * 200}) as client:
        host, port = client.writer.get_extra_info("sockname")
        shown = value(await client.query("SHOW application_name"))
        assert shown is not None
        assert shown.endswith(f"x - {host}:{port}")
        assert len(shown) == 63
        assert shown == client.parameters["application_name"]
