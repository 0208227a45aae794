"""How many connections of a server are ours: the bound, its division among pools, caps, and a server that is full.

In front of real servers; the division itself has its own tests in tests/unit/test_core_budget.py.
"""

import asyncio
import random
from collections.abc import Iterator
from contextlib import asynccontextmanager

import psutil
import psycopg
import pytest
from proxy_kit import config_for, until, wire

from cenote.embedded import Postgres
from cenote.testing.postgres import wait_until
from cenote.testing.wire import RawClient, error, value
from cenote.wire import messages

N_TENANTS = 200
N_GREEDY = 3


@pytest.fixture(scope="module")
def small() -> Iterator[Postgres]:
    """A server with 40 connections and 200 roles, whose passwords cost nothing to prove."""
    with Postgres(18, settings={"max_connections": 40, "scram_iterations": 1}) as server:
        with psycopg.connect(server.superuser_dsn, autocommit=True) as conn:
            for number in range(N_TENANTS):
                conn.execute(f"CREATE ROLE tenant_{number} LOGIN PASSWORD 'secret'".encode())
        yield server


@pytest.fixture(autouse=True)
def nobody_else(small: Postgres) -> None:
    """What was closed before this test has ended at the server, which counts it until then."""
    with psycopg.connect(small.superuser_dsn, autocommit=True) as conn:
        others = "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend' AND pid <> %s"
        pid = conn.info.backend_pid
        wait_until(lambda: conn.execute(others, (pid,)).fetchone() == (0,), what="earlier sessions have ended")
    wait_until(lambda: not psutil.pid_exists(pid), what="this one, too")


def tenants(**options: object) -> dict[str, object]:
    return {f"tenant_{number}": {"password": "secret", **options} for number in range(N_TENANTS)}


@asynccontextmanager
async def logged_in_as(proxy, user, count=1):
    clients = []
    try:
        for _ in range(count):
            client = await RawClient.connect(proxy.address)
            clients.append(client)
            await client.startup(user, proxy.database, "secret")
        yield clients
    finally:
        for client in clients:
            await client.terminate()


def sessions(server: Postgres) -> int:
    """What the server says of all sessions but those of superusers."""
    with psycopg.connect(server.superuser_dsn, autocommit=True) as conn:
        found = conn.execute(
            "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend'"
            " AND usename NOT IN (SELECT rolname FROM pg_roles WHERE rolsuper)"
        ).fetchone()
    assert found is not None
    return int(found[0])


@wire
async def test_the_bound_is_a_percentage_of_what_the_server_has_without_what_it_reserves(proxy_for, small):
    proxy = proxy_for(small, max_size=100)
    async with await proxy.client() as client:
        await client.query("SELECT 1")
        limits = proxy.limits()
        assert limits["most"] == int(0.7 * (40 - 3))
        assert limits["others"] == 0


@wire
async def test_what_others_have_there_is_told_and_not_subtracted(proxy_for, small):
    with psycopg.connect(small.dsn), psycopg.connect(small.dsn):
        proxy = proxy_for(small, max_size=100)
        async with await proxy.client() as client:
            await client.query("SELECT 1")
            limits = proxy.limits()
            assert (limits["most"], limits["others"]) == (25, 2)


@wire
async def test_no_pool_and_not_all_pools_together_open_more_than_the_bound(proxy_for, small):
    proxy = proxy_for(small, max_size=100, top={"users": tenants(), "server": {"max_connections": 6}})
    async with logged_in_as(proxy, "tenant_1", 9) as first, logged_in_as(proxy, "tenant_2", 9) as second:
        for client in [*first, *second]:
            await client.send(messages.query("SELECT pg_sleep(0.05)"))
        seen = []
        while not all(client.reader._buffer for client in [*first, *second]):
            seen.append(await asyncio.to_thread(sessions, small))
        for client in [*first, *second]:
            assert "E" not in [message.kind for message in await client.until_ready()]
        assert max(seen) <= 6
        assert proxy.limits()["used"] <= 6


@pytest.mark.parametrize("of", ["database", "user"])
@wire
async def test_a_database_and_a_user_may_have_a_cap_over_all_their_pools(proxy_for, small, of):
    capped = {"max_connections": 2}
    proxy = proxy_for(
        small,
        **(capped if of == "database" else {}),
        max_size=10,
        top={"users": tenants(**(capped if of == "user" else {}))},
        databases={
            "second": {
                **config_for(small)["databases"][small.database],
                "dbname": small.database,
                **(capped if of == "database" else {}),
            }
        },
    )
    async with logged_in_as(proxy, "tenant_1", 6) as clients:
        for client in clients:
            await client.send(messages.query("SELECT pg_sleep(0.02)"))
        for client in clients:
            await client.until_ready()
            assert proxy.limits()["used"] <= 2


@wire
async def test_F10_a_server_that_is_full_is_not_pressed_and_everybody_is_served(proxy_for, small):
    """Others have what there is: no client hears of it, and what there is serves all."""
    others = [psycopg.connect(small.dsn) for _ in range(33)]
    try:
        proxy = proxy_for(small, max_size=20)
        async with logged_in_as(proxy, small.user, 0):
            clients = [await proxy.client() for _ in range(20)]
            for client in clients:
                await client.send(messages.query("SELECT pg_sleep(0.02), 7"))
            for client in clients:
                assert not [m for m in await client.until_ready() if m.kind == "E"]
                await client.terminate()
        limits = proxy.limits()
        assert limits["refusals"] >= 1
        assert 1 <= limits["used"] <= limits["limit"] <= 40 - 3 - 33
        assert limits["most"] == 25
    finally:
        for conn in others:
            conn.close()


@wire
async def test_F10_a_role_that_has_no_connections_left_says_nothing_of_the_server(proxy_for, small):
    with psycopg.connect(small.superuser_dsn, autocommit=True) as conn:
        conn.execute("ALTER ROLE tenant_7 CONNECTION LIMIT 1")
    proxy = proxy_for(small, max_size=5, top={"users": tenants()})
    async with logged_in_as(proxy, "tenant_7", 3) as clients:
        for client in clients:
            await client.send(messages.query("SELECT pg_sleep(0.05)"))
        for client in clients:
            assert not [m for m in await client.until_ready() if m.kind == "E"]
    limits = proxy.limits()
    assert limits["refusals"] >= 1
    assert limits["limit"] == limits["most"] == 25


@wire
async def test_3_greedy_tenants_of_200_do_not_starve_the_others(proxy_for, small):
    """197 ask now and then, and each is answered at once, by the standards of a full server; nobody is refused."""
    proxy = proxy_for(small, max_size=20, acquire_timeout=5.0, top={"users": tenants()})
    choose = random.Random(5)
    done = [0] * N_GREEDY
    over = asyncio.Event()
    seen: list[int] = []

    async def greedy(number: int, client: RawClient) -> None:
        while not over.is_set():
            assert not [m for m in await client.query("SELECT pg_sleep(0.005)") if m.kind == "E"]
            done[number] += 1

    async def quiet(number: int) -> None:
        async with logged_in_as(proxy, f"tenant_{number}") as (client,):
            for _ in range(3):
                await until(lambda: choose.random() < 0.05)
                assert value(await client.query("SELECT 42")) == "42"

    async def watched() -> None:
        while not over.is_set():
            seen.append(await asyncio.to_thread(sessions, small))

    crowds = [logged_in_as(proxy, f"tenant_{number}", 30) for number in range(N_GREEDY)]
    async with crowds[0] as a, crowds[1] as b, crowds[2] as c:
        async with asyncio.TaskGroup() as group:
            for number, clients in enumerate((a, b, c)):
                for client in clients:
                    group.create_task(greedy(number, client))
            group.create_task(watched())
            async with asyncio.timeout(60):
                for start in range(N_GREEDY, N_TENANTS, 20):
                    await asyncio.gather(*(quiet(n) for n in range(start, min(start + 20, N_TENANTS))))
            over.set()
    assert max(seen) <= 25 == proxy.limits()["most"]
    # What the quiet leave them are five connections: two, two and one, for as long as nobody gives any back.
    assert max(done) <= 3 * min(done), f"the greedy are not equals: {done}"


@wire
async def test_a_cap_refuses_nobody_and_its_error_would_name_it(proxy_for, small):
    proxy = proxy_for(small, max_size=10, acquire_timeout=2.0, top={"server": {"max_connections": 1}})
    async with await proxy.client() as holder, await proxy.client() as other:
        await holder.query("BEGIN")
        refused = error(await other.query("SELECT 1"))
        assert refused["C"] == "53300"
        assert f"server {small.host}:{small.port}: 1/1 used" in refused["D"]
        await holder.query("COMMIT")
