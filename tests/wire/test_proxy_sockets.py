"""The proxy's own transports where there is no epoll: the event loop says of each socket when it is ready."""

import asyncio
import select

import pytest
from proxy_kit import RunningProxy, until, wire
from scripts_BD import query

from cenote.embedded import Postgres
from cenote.testing.wire import kinds, value


@pytest.fixture
def proxy(proxy_for, pg18: Postgres, monkeypatch: pytest.MonkeyPatch) -> RunningProxy:
    monkeypatch.delattr(select, "epoll")
    return proxy_for(pg18, max_size=2)


@wire
async def test_without_epoll_many_are_served_and_leave(proxy: RunningProxy):
    async def session(number: int) -> None:
        async with await proxy.client() as client:
            for turn in range(5):
                assert value(await client.query(f"SELECT '{number}/{turn}'")) == f"{number}/{turn}"
            await (client.reset() if number % 3 == 0 else client.terminate())

    await asyncio.gather(*(session(number) for number in range(40)))
    await proxy.finish()


@wire
async def test_without_epoll_who_does_not_read_is_waited_for_and_nobody_else(proxy: RunningProxy):
    async with await proxy.client() as slow, await proxy.client() as other:
        await slow.send(query("SELECT repeat('x', 1000) FROM generate_series(1, 50000)"))
        await slow.until("T")
        for turn in range(20):
            assert value(await other.query(f"SELECT {turn}")) == str(turn)
        assert kinds(await slow.until_ready()).endswith("DCZ")
        # The other way round: more than the server takes at once.
        await other.send(query("SELECT 1" + " " * 5_000_000), query("SELECT 2"))
        assert kinds(await other.until_ready()) == "TDCZ"
        assert value(await other.until_ready()) == "2"


@wire
async def test_without_epoll_the_end_of_a_server_is_seen(proxy: RunningProxy, admin):
    async with await proxy.client() as client:
        pid = value(await client.query("SELECT pg_backend_pid()"))
        admin.rows(f"SELECT pg_terminate_backend({pid})")
        (pool,) = proxy.pools()
        await until(lambda: proxy.call(lambda: int(pid) not in {server.backend_pid for server in pool.servers}))
        assert value(await client.query("SELECT pg_backend_pid()")) != pid
