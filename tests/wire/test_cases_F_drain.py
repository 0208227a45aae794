"""Group F, ends: how the proxy sends everybody home, and the strangers it has no word for."""

import asyncio
import logging

import pytest
from proxy_kit import BIND, EXECUTE, PARSE, SLEEP, RunningProxy, not_running, running, until, wire

from cenote.testing.scripted_server import ScriptedServer, ServerEnd
from cenote.testing.wire import LoginRefused, RawClient, error, errors, kinds, value
from cenote.wire import messages


@pytest.fixture
def single(proxy_for, pg18) -> RunningProxy:
    return proxy_for(pg18, max_size=1)


def drain(proxy: RunningProxy, timeout: float) -> asyncio.Future:
    return proxy.begin(lambda: proxy.daemon.drain(timeout))


async def sent_home(client: RawClient) -> None:
    """The client hears 57P01 and nothing else, and the connection ends."""
    ended = await client.closed()
    assert kinds(ended) == "E"
    assert error(ended)["C"] == "57P01"
    assert error(ended)["V"] == "FATAL"


@wire
async def test_F18_idle_clients_are_sent_home_and_nobody_comes_in(single):
    clients = [await single.client() for _ in range(5)]
    await clients[0].query("SELECT 1")
    drained = drain(single, 10)
    for client in clients:
        await sent_home(client)
    await asyncio.wait_for(drained, 10)
    with pytest.raises((OSError, AssertionError)):
        await single.client()


@wire
async def test_F18_a_transaction_runs_to_its_end(single):
    async with await single.client() as client:
        await client.query("BEGIN")
        drained = drain(single, 20)
        await until(lambda: single.daemon.draining)
        assert value(await client.query("SELECT 5")) == "5"
        await client.send(messages.query("COMMIT"))
        assert kinds(await client.until_ready()) == "CZ"
        await sent_home(client)
        await asyncio.wait_for(drained, 10)


@wire
async def test_F18_a_client_in_line_is_served(single):
    """It had its place before the drain began."""
    async with await single.client() as holder, await single.client() as waiter:
        await holder.query("BEGIN")
        await waiter.send(messages.query("SELECT 'served'"))
        await single.reached(waiting=1)
        drained = drain(single, 20)
        await until(lambda: single.daemon.draining)
        await holder.send(messages.query("COMMIT"))
        assert kinds(await holder.until_ready()) == "CZ"
        await sent_home(holder)
        assert value(await waiter.until_ready()) == "served"
        await sent_home(waiter)
        await asyncio.wait_for(drained, 10)


@wire
async def test_F18_at_the_deadline_waiting_ends_with_a_refusal(single):
    async with await single.client() as holder, await single.client() as waiter:
        await holder.query("BEGIN")
        await waiter.send(messages.query("SELECT 'served'"))
        await single.reached(waiting=1)
        drained = drain(single, 0.3)
        ended = await waiter.closed()
        assert error(ended)["C"] == "57P01"
        await asyncio.wait_for(drained, 10)
        await asyncio.to_thread(single.stop)


@wire
async def test_F18_at_the_limit_a_running_query_is_cancelled(single, admin):
    async with await single.client() as client:
        await client.send(messages.query("BEGIN; " + SLEEP))
        await running(admin, "BEGIN; " + SLEEP)
        await asyncio.wait_for(drain(single, 0.3), 10)
        stopped = asyncio.create_task(asyncio.to_thread(single.stop))
        ended = await client.closed()
        assert len(errors(ended)) == 1, ended
        assert error(ended)["C"] in ("57P01", "57014")
        await stopped
        await not_running(admin, "BEGIN; " + SLEEP)


@wire
async def test_F18_at_the_end_no_server_connection_is_left(proxy_for, pg18, admin):
    name = "drained by a test"
    proxy = proxy_for(pg18, max_size=3, init_query=f"SET application_name = '{name}'")
    clients = [await proxy.client() for _ in range(3)]
    for client in clients:
        await client.query("BEGIN")
    assert len(admin.backends(name)) == 3
    await asyncio.to_thread(proxy.stop)
    for client in clients:
        await sent_home(client)
    await until(lambda: not admin.backends(name))


@pytest.mark.parametrize("dial", ["silent", "refused", "idle"])
@wire
async def test_F18_a_server_that_does_not_answer_does_not_keep_it_from_stopping(proxy_for, dial):
    async def silent(session: ServerEnd) -> None:
        await session.silent()

    async def deaf(session: ServerEnd) -> None:
        await session.serve_one()
        await session.silent()

    async with ScriptedServer(deaf, on_connect=silent if dial == "silent" else None) as server:
        if dial == "refused":
            server.refuse()
        proxy = proxy_for(server, max_size=2, min_size=1)
        client = await RawClient.connect(proxy.address)
        hello = asyncio.create_task(client.startup(proxy.user, proxy.database, proxy.password))
        if dial == "idle":
            await hello
            await client.query("SELECT hello")
        else:
            await proxy.reached(waiting=1)
        began = asyncio.get_running_loop().time()
        await asyncio.to_thread(proxy.stop)
        assert asyncio.get_running_loop().time() - began < 15
        if dial == "idle":
            await sent_home(client)
        else:
            with pytest.raises(LoginRefused) as caught:
                await hello
            assert caught.value.fields["C"] == "57P01"


@wire
async def test_F17_F18_a_pipeline_that_is_half_sent_is_waited_for(single):
    async with await single.client() as client:
        await client.send(PARSE, BIND, EXECUTE, messages.FLUSH)
        assert kinds(await client.until("C")) == "12DC"
        drained = drain(single, 20)
        await until(lambda: single.daemon.draining)
        await client.send(PARSE, BIND, EXECUTE, messages.SYNC)
        assert kinds(await client.until_ready()) == "12DCZ"
        await sent_home(client)
        await asyncio.wait_for(drained, 10)


@wire
async def test_F17_F18_copy_in_is_waited_for(single):
    async with await single.client() as client:
        await client.query("BEGIN; CREATE TABLE drained (id int)")
        await client.send(messages.query("COPY drained FROM STDIN"))
        await client.until("G")
        drained = drain(single, 20)
        await until(lambda: single.daemon.draining)
        await client.send(messages.message(b"d", b"1\n"), messages.message(b"c"))
        assert kinds(await client.until_ready()) == "CZ"
        await client.send(messages.query("ROLLBACK"))
        assert kinds(await client.until_ready()) == "CZ"
        await sent_home(client)
        await asyncio.wait_for(drained, 10)


PROBES = {
    "open and close": b"",
    "one byte": b"\0",
    "ssl request": messages.request(messages.SSL_REQUEST),
    "half a packet": messages.startup([("user", "app")])[:11],
}


@pytest.mark.parametrize("end", ["close", "reset"])
@pytest.mark.parametrize("probe", PROBES.values(), ids=PROBES)
@wire
async def test_F22_a_probe_costs_nothing_and_makes_no_noise(proxy_for, pg18, capfd, caplog, probe, end):
    caplog.set_level(logging.INFO)
    proxy = proxy_for(pg18, top={"log_level": "info"})
    await proxy.reached(leased=0)
    capfd.readouterr()
    caplog.clear()
    for _ in range(20):
        async with await RawClient.connect(proxy.address) as client:
            client.feed(probe)
            await getattr(client, end)()
    await until(lambda: proxy.clients() == 0)
    assert proxy.counts()["idle"] == 0, "no server connection was opened for them"
    out, err = capfd.readouterr()
    assert out + err == ""
    assert caplog.records == []
