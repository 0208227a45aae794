"""Group F, probes: whoever only looks whether somebody is there leaves no line in the log and costs little."""

import logging
from collections.abc import Awaitable, Callable
from typing import Any

import psycopg
import pytest
from proxy_kit import RunningProxy, until, wire, works

from cenote.testing.wire import RawClient
from cenote.wire import messages

ENDS = ("close", "reset")
#: The beginning of a ClientHello, of 512 bytes.
HALF_A_HELLO = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"
LOCAL = bytes.fromhex("0d0a0d0a000d0a515549540a") + b"\x20\0\0\0"

Probe = Callable[[RawClient, RunningProxy], Awaitable[Any]]


async def nothing(client: RawClient, proxy: RunningProxy) -> None:
    """A balancer's check of the port."""


async def asks_for_tls(client: RawClient, proxy: RunningProxy) -> None:
    await client.request(messages.SSL_REQUEST)


async def asks_for_both(client: RawClient, proxy: RunningProxy) -> None:
    await client.request(messages.GSSENC_REQUEST)
    await client.request(messages.SSL_REQUEST)


async def half_a_packet(client: RawClient, proxy: RunningProxy) -> None:
    client.feed(messages.startup([("user", proxy.user)])[:6])


async def begins_tls(client: RawClient, proxy: RunningProxy) -> None:
    await client.request(messages.SSL_REQUEST)
    client.feed(HALF_A_HELLO)


async def begins_direct_tls(client: RawClient, proxy: RunningProxy) -> None:
    client.feed(HALF_A_HELLO)


PROBES: list[tuple[Probe, bool]] = [
    *(
        (probe, secure)
        for probe in (nothing, asks_for_tls, asks_for_both, half_a_packet)
        for secure in (False, True)
    ),
    (begins_tls, True),
    (begins_direct_tls, True),
]


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """What was logged by now, at any level but that of a start."""
    caplog.set_level(logging.DEBUG, "cenote")
    return lambda: [line for line in caplog.messages if not line.startswith(("started", "stopped"))]


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize(
    ("probe", "secure"), PROBES, ids=lambda of: getattr(of, "__name__", "tls" if of else "plain")
)
@wire
async def test_F22_a_probe_of_the_port_leaves_nothing_behind(
    proxy_for, pg18, tls_listen, lines, probe, secure, end
):
    proxy = proxy_for(pg18, listen=tls_listen if secure else {})
    for _ in range(5):
        client = await RawClient.connect(proxy.address)
        await probe(client, proxy)
        await getattr(client, end)()
    await until(lambda: proxy.clients() == 0, "all have left")
    assert lines() == []
    assert proxy.daemon.login_failures == {}
    assert proxy.daemon.admission.admitted == 0


@pytest.mark.parametrize("end", ENDS)
@wire
async def test_F22_a_probe_that_asks_who_it_should_be_leaves_nothing_behind(proxy_for, pg18, lines, end):
    """As pg_isready does: the first answer says enough."""
    proxy = proxy_for(pg18)
    for _ in range(5):
        client = await RawClient.connect(proxy.address)
        client.feed(messages.startup([("user", proxy.user), ("database", "whatever")]))
        await client.until("R")
        await getattr(client, end)()
    await until(lambda: proxy.clients() == 0, "all have left")
    assert lines() == []
    assert proxy.daemon.login_failures == {}


@pytest.mark.parametrize("end", [*ENDS, "terminate"])
@wire
async def test_F22_a_check_that_logs_in_and_asks_for_1_leaves_no_line(proxy_for, pg18, lines, end):
    proxy = proxy_for(pg18)
    for _ in range(3):
        client = await proxy.client()
        await works(client)
        await getattr(client, end)()
    await until(lambda: proxy.clients() == 0, "all have left")
    assert lines() == []


def test_F22_the_console_answers_a_check_without_a_server_connection(proxy_for, pg18, lines):
    proxy = proxy_for(pg18, top={"admin_users": [pg18.user]})
    with psycopg.connect(proxy.dsn_for(database="cenote"), autocommit=True) as conn:
        assert conn.execute("SELECT 1").fetchone() is not None
    assert proxy.counts()["idle"] == 0
    assert lines() == []


@pytest.mark.parametrize("end", ENDS)
@wire
async def test_F22_a_balancers_own_check_leaves_nothing_behind(proxy_for, pg18, lines, end):
    proxy = proxy_for(pg18, listen={"proxy_protocol_from": ["127.0.0.1"]})
    for first in (b"", LOCAL, b"PROXY UNKNOWN\r\n"):
        client = await RawClient.connect(proxy.address)
        client.feed(first)
        await getattr(client, end)()
    await until(lambda: proxy.clients() == 0, "all have left")
    assert lines() == []
    assert proxy.daemon.login_failures == {}


@wire
async def test_F22_probes_do_not_wait_and_nobody_waits_for_them(proxy_for, pg18):
    """However slowly log-ins are let in."""
    proxy = proxy_for(pg18, listen={"login_rate": 0.01})
    for _ in range(50):
        async with await RawClient.connect(proxy.address) as probe:
            assert await probe.request(messages.SSL_REQUEST) == b"N"
    async with await proxy.client() as client:
        await works(client)
