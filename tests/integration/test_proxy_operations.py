"""What an operator does to a running proxy, before a real server, through drivers: nobody loses an answer."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import asyncpg
import psycopg
import pytest
from psycopg.rows import dict_row

from cenote import embedded

sys.path.append(str(Path(__file__).parents[1] / "wire"))

from proxy_kit import (
    BIND,
    EXECUTE,
    PARSE,
    SLEEP,
    Admin,
    RunningProxy,
    config_for,
    not_running,
    running,
    until,
    wire,
)

from cenote.proxy import operations
from cenote.testing.wire import RawClient, error, kinds, send_cancel, value
from cenote.wire import messages

#: Backends of the proxy's at the server, by process.
BACKENDS = "SELECT pid FROM pg_stat_activity WHERE usename = %s AND backend_type = 'client backend'"


@pytest.fixture(scope="module")
def pg18() -> Iterator[embedded.Postgres]:
    """A server that no other proxy has connections to."""
    with embedded.Postgres(18, settings={"max_connections": 200}) as server:
        yield server


@pytest.fixture
def admin(pg18: embedded.Postgres) -> Iterator[Admin]:
    """The superuser's look at the server, past the proxy."""
    admin = Admin(pg18.superuser_dsn)
    yield admin
    admin.conn.close()


@pytest.fixture
def proxy_for(pg18: embedded.Postgres) -> Iterator[Callable[..., RunningProxy]]:
    proxies: list[RunningProxy] = []

    def start(**options: Any) -> RunningProxy:
        top = {"admin_users": [pg18.user], **options.pop("top", {})}
        proxies.append(RunningProxy(config_for(pg18, top=top, **options), pg18))
        return proxies[-1].start()

    yield start
    try:
        for proxy in proxies:
            proxy.clean()
    finally:
        for proxy in proxies:
            proxy.stop()


@pytest.fixture
def proxy(proxy_for: Callable[..., RunningProxy]) -> RunningProxy:
    return proxy_for()


async def console_of(proxy: RunningProxy) -> psycopg.AsyncConnection[dict[str, Any]]:
    """A session of an operator's."""
    return await psycopg.AsyncConnection.connect(
        proxy.dsn_for(database="cenote"), autocommit=True, row_factory=dict_row
    )


async def rows(console: psycopg.AsyncConnection[dict[str, Any]], text: str) -> list[dict[str, Any]]:
    return await (await console.execute(text)).fetchall()


def backends(admin: Admin, proxy: RunningProxy) -> set[int]:
    return {pid for (pid,) in admin.rows(BACKENDS, (proxy.user,))}


def modes(proxy: RunningProxy) -> dict[str, str]:
    return proxy.call(lambda: {pool.name: pool.machine.mode for pool in proxy.daemon.pools})


async def sent_away(client: RawClient) -> None:
    """It hears 57P01 and nothing more."""
    ended = await client.closed()
    assert kinds(ended) == "E"
    assert (error(ended)["C"], error(ended)["V"]) == ("57P01", "FATAL")


# -- PAUSE and RESUME ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("driver", ["psycopg", "asyncpg"])
@wire
async def test_pause_and_resume_under_load_fail_nobody_and_leave_the_server_alone_in_between(
    driver: str, proxy_for: Callable[..., RunningProxy], admin: Admin
) -> None:
    proxy = proxy_for(max_size=3)
    done = [0] * 8
    stop = asyncio.Event()

    async def load(nth: int) -> None:
        conn: Any
        if driver == "asyncpg":
            conn = await asyncpg.connect(proxy.dsn)
        else:
            conn = await psycopg.AsyncConnection.connect(proxy.dsn, autocommit=True)
        while not stop.is_set():
            if driver == "asyncpg":
                async with conn.transaction():
                    assert await conn.fetchval("SELECT $1::int", nth) == nth
            else:
                async with conn.transaction():
                    assert await (await conn.execute("SELECT %s::int", [nth])).fetchone() == (nth,)
            done[nth] += 1
        await conn.close()

    clients = [asyncio.create_task(load(nth)) for nth in range(8)]
    await until(lambda: min(done) > 3 or any(task.done() for task in clients), "all are at work")
    async with await console_of(proxy) as console:
        for _ in range(3):
            await console.execute("PAUSE")
            assert backends(admin, proxy) == set(), "the server is left alone"
            await until(lambda: proxy.counts()["waiting"] == 8, "all stand in line")
            counted = list(done)
            await console.execute("RESUME")
            await until(lambda counted=counted: all(map(int.__lt__, counted, done)), "all have gone on")
    stop.set()
    await asyncio.gather(*clients)


@wire
async def test_pause_waits_for_transactions_and_holds_up_new_ones_until_resume(proxy: RunningProxy) -> None:
    async with await proxy.client() as holder, await proxy.client() as other, await console_of(proxy) as console:
        heard: list[str] = []
        console.add_notice_handler(lambda notice: heard.append(notice.message_primary or ""))
        await holder.query("BEGIN")
        paused = asyncio.create_task(console.execute("PAUSE"))
        await until(lambda: set(modes(proxy).values()) == {"paused"})
        assert value(await holder.query("SELECT 5")) == "5"
        await other.send(messages.query("SELECT 'later'"))
        await proxy.reached(waiting=1)
        assert not paused.done()
        await holder.query("COMMIT")
        await paused
        assert heard == ["cenote: waiting: 1 server connection in use"]
        assert proxy.counts()["waiting"] == 1
        await (console_2 := await console_of(proxy)).execute("RESUME")
        assert value(await other.until_ready()) == "later"
        await console_2.close()


@wire
async def test_F17_pause_waits_for_the_sync_of_a_pipeline_that_is_half_sent(proxy: RunningProxy) -> None:
    async with await proxy.client() as client, await console_of(proxy) as console:
        await client.send(PARSE, BIND, EXECUTE, messages.FLUSH)
        assert kinds(await client.until("C")) == "12DC"
        paused = asyncio.create_task(console.execute("PAUSE"))
        await until(lambda: set(modes(proxy).values()) == {"paused"})
        await client.send(PARSE, BIND, EXECUTE)
        await client.send(messages.SYNC)
        assert kinds(await client.until_ready()) == "12DCZ"
        await paused
        await console.execute("RESUME")


@wire
async def test_a_pause_is_for_one_database_and_for_whoever_comes_to_it_later(
    proxy_for: Callable[..., RunningProxy], pg18: embedded.Postgres
) -> None:
    """Another user's pool is made while the database is paused; who logs in to it waits too."""
    other = {"host": pg18.host, "port": pg18.port, "sslmode": "disable", "dbname": pg18.database, "min_size": 0}
    guest = {"password": "guest", "server_password": pg18.password}
    users = {"guest": guest}
    databases = {"other": {**other, "user": pg18.user, "password": pg18.password}}
    proxy = proxy_for(users=users, databases=databases)
    async with await console_of(proxy) as console:
        await console.execute("PAUSE other")
        async with await proxy.client() as client:
            assert value(await client.query("SELECT 1")) == "1"
        coming = asyncio.create_task(proxy.client(user="guest", password="guest", database="other"))
        await proxy.reached(waiting=1)
        assert modes(proxy)["other/guest"] == "paused"
        states = {row["database"]: row["state"] for row in await rows(console, "SHOW DATABASES")}
        assert states == {"other": "paused", proxy.database: "running"}
        await console.execute("RESUME other")
        async with await coming as client:
            assert value(await client.query("SELECT 2")) == "2"


@wire
async def test_pause_names_the_pinned_clients_that_it_waits_for(proxy: RunningProxy) -> None:
    async with await console_of(proxy) as console:
        heard: list[str] = []
        console.add_notice_handler(lambda notice: heard.append(notice.message_primary or ""))
        client = await psycopg.AsyncConnection.connect(proxy.dsn, autocommit=True)
        await client.execute("CREATE TEMP TABLE a (n int)")
        await until(lambda: proxy.call(lambda: sum(pool.pinned for pool in proxy.pools())) == 1)
        paused = asyncio.create_task(console.execute("PAUSE"))
        await until(lambda: heard)
        pid = client.info.backend_pid
        assert heard == [
            "cenote: waiting: 1 server connection in use, 1 of them until their clients leave "
            f"(pinned: temporary_objects=1; pids: {pid})"
        ]
        assert not paused.done()
        await client.close()
        await paused
        await console.execute("RESUME")


@pytest.mark.parametrize("end", ["cancel", "leave"])
@wire
async def test_a_pause_that_is_cancelled_or_whose_operator_leaves_is_undone(end: str, proxy: RunningProxy) -> None:
    async with await proxy.client() as holder, await proxy.client(database="cenote") as console:
        await holder.query("BEGIN")
        await console.send(messages.query("PAUSE; SHOW VERSION"))
        await until(lambda: set(modes(proxy).values()) == {"paused"})
        if end == "cancel":
            await send_cancel(proxy.address, console.key)
            answer = await console.until_ready()
            assert kinds(answer) == "NEZ"
            assert error(answer)["C"] == "57014"
        else:
            await console.reset()
        await until(lambda: set(modes(proxy).values()) == {"running"})
        assert proxy.daemon.standing == []


@wire
async def test_a_pause_that_somebody_ends_before_it_is_done_says_so(proxy: RunningProxy) -> None:
    async with await proxy.client() as holder, await console_of(proxy) as first, await console_of(proxy) as second:
        await holder.query("BEGIN")
        paused = asyncio.create_task(first.execute("PAUSE"))
        await until(lambda: set(modes(proxy).values()) == {"paused"})
        await second.execute("RESUME")
        with pytest.raises(psycopg.errors.ObjectNotInPrerequisiteState, match="resumed"):
            await paused
        await holder.query("COMMIT")


@wire
async def test_a_drain_of_everything_serves_those_whom_a_pause_made_wait(proxy: RunningProxy) -> None:
    async with await proxy.client() as client:
        await proxy.begin(lambda: paused(proxy))
        await client.send(messages.query("SELECT 'served'"))
        await proxy.reached(waiting=1)
        drained = proxy.begin(lambda: proxy.daemon.drain(20))
        assert value(await client.until_ready()) == "served"
        await sent_away(client)
        await drained


async def paused(proxy: RunningProxy) -> None:
    await operations.pause(proxy.daemon)


# -- DRAIN --------------------------------------------------------------------------------------------------


@wire
async def test_drain_refuses_new_transactions_and_serves_those_in_line(
    proxy_for: Callable[..., RunningProxy],
) -> None:
    proxy = proxy_for(max_size=1)
    async with (
        await proxy.client() as holder,
        await proxy.client() as waiter,
        await proxy.client() as late,
        await console_of(proxy) as console,
    ):
        await holder.query("BEGIN")
        await waiter.send(messages.query("SELECT 'served'"))
        await proxy.reached(waiting=1)
        await console.execute(f"DRAIN {proxy.database}/{proxy.user} TIMEOUT 20")
        await late.send(messages.query("SELECT 1"))
        refused = error(await late.until("E"))
        assert (refused["C"], refused["V"]) == ("57P01", "FATAL")
        await holder.query("COMMIT")
        assert value(await waiter.until_ready()) == "served"
        await console.execute("RESUME")
        assert value(await waiter.query("SELECT 'again'")) == "again"


# -- RECONNECT ----------------------------------------------------------------------------------------------


@wire
async def test_reconnect_replaces_every_backend_and_no_client_notices(proxy: RunningProxy, admin: Admin) -> None:
    async with await proxy.client() as busy, await proxy.client() as client, await console_of(proxy) as console:
        old = {int(value(await client.query("SELECT pg_backend_pid()")))}
        await busy.query("BEGIN")
        old.add(int(value(await busy.query("SELECT pg_backend_pid()"))))
        await console.execute(f"RECONNECT {proxy.database}")
        assert int(value(await client.query("SELECT pg_backend_pid()"))) not in old
        assert int(value(await busy.query("SELECT pg_backend_pid()"))) in old
        await busy.query("COMMIT")
        await until(lambda: not old & backends(admin, proxy), "the old ones are gone")
        assert int(value(await busy.query("SELECT pg_backend_pid()"))) not in old


# -- KILL ---------------------------------------------------------------------------------------------------


@wire
async def test_kill_ends_a_client_and_cancels_what_it_runs(proxy: RunningProxy, admin: Admin) -> None:
    async with await proxy.client() as client, await console_of(proxy) as console:
        await client.send(messages.query(SLEEP))
        backend = await running(admin, SLEEP)
        (row,) = [row for row in await rows(console, "SHOW CLIENTS") if row["server_pid"] == backend]
        assert row["state"] == "active"
        await console.execute(f"KILL {row['pid']}")
        await sent_away(client)
        await not_running(admin, SLEEP)
        with pytest.raises(psycopg.errors.UndefinedObject, match="no client has the pid"):
            await console.execute(f"KILL {row['pid']}")


@wire
async def test_a_client_that_is_killed_in_line_is_never_served(
    proxy_for: Callable[..., RunningProxy], admin: Admin
) -> None:
    proxy = proxy_for(max_size=1)
    async with await proxy.client() as holder, await proxy.client() as waiter, await console_of(proxy) as console:
        await holder.query("BEGIN")
        await waiter.send(messages.query("CREATE TABLE never_made ()"))
        await proxy.reached(waiting=1)
        (row,) = [row for row in await rows(console, "SHOW CLIENTS") if row["place"] == 1]
        assert row["waits_for"].startswith("1 of 1 connections are leased, the oldest lease is ")
        await console.execute(f"KILL {row['pid']}")
        await sent_away(waiter)
        await holder.query("COMMIT")
        assert admin.value("SELECT to_regclass('never_made')") is None


@wire
async def test_an_operator_may_kill_itself(proxy: RunningProxy) -> None:
    console = await console_of(proxy)
    with pytest.raises(psycopg.errors.AdminShutdown):
        await console.execute(f"KILL {console.info.backend_pid}")
        await console.execute("SHOW VERSION")
    await console.close()


@wire
async def test_kill_pool_ends_its_clients_and_server_connections_and_no_others(
    proxy_for: Callable[..., RunningProxy], pg18: embedded.Postgres, admin: Admin
) -> None:
    other = {"host": pg18.host, "port": pg18.port, "sslmode": "disable", "dbname": pg18.database, "min_size": 0}
    proxy = proxy_for(databases={"other": other})
    async with (
        await proxy.client(database="other") as bystander,
        await proxy.client() as idle,
        await proxy.client() as busy,
        await console_of(proxy) as console,
    ):
        kept = int(value(await bystander.query("SELECT pg_backend_pid()")))
        await idle.query("SELECT 1")
        await busy.query("BEGIN")
        heard: list[str] = []
        console.add_notice_handler(lambda notice: heard.append(notice.message_primary or ""))
        await console.execute(f"KILL POOL {proxy.database}/{proxy.user}")
        assert heard == [f"cenote: 2 clients of {proxy.database}/{proxy.user} sent away"]
        await sent_away(idle)
        await sent_away(busy)
        await until(lambda: backends(admin, proxy) == {kept}, "only the bystander's is left")
        assert int(value(await bystander.query("SELECT pg_backend_pid()"))) == kept
        async with await proxy.client() as again:
            assert value(await again.query("SELECT 1")) == "1"


# -- any client ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("driver", ["psql", "psycopg", "asyncpg"])
def test_orders_can_be_given_with_any_client(driver: str, proxy: RunningProxy) -> None:
    """asyncpg's `fetch` and psycopg's binary cursor speak the extended protocol, `psql -c` the simple one."""
    dsn = proxy.dsn_for(database="cenote")
    orders = ["PAUSE", f"RESUME {proxy.database}", "RECONNECT", "DRAIN TIMEOUT 1", "RESUME", "HELP KILL"]
    if driver == "psql":
        for order in orders:
            done = subprocess.run(
                [str(proxy.server.binary("psql")), "-X", dsn, "-c", order],
                capture_output=True,
                text=True,
                timeout=30,
                check=False,
            )
            assert (done.returncode, done.stderr) == (0, "")
            assert ("KILL pid" if order.startswith("HELP") else order.split()[0]) in done.stdout
    elif driver == "psycopg":
        with psycopg.connect(dsn, autocommit=True) as conn:
            for order in orders:
                assert conn.cursor(binary=True).execute(order).statusmessage == order.split()[0]
    else:

        async def run() -> None:
            conn = await asyncpg.connect(dsn)
            answers = [await conn.fetch(order) for order in orders]
            assert [len(answer) for answer in answers] == [0, 0, 0, 0, 0, 2]
            await conn.close()

        asyncio.run(run())
    assert set(modes(proxy).values()) == {"running"}


# -- sums ---------------------------------------------------------------------------------------------------


@wire
async def test_the_sums_in_show_are_what_the_server_says(
    proxy_for: Callable[..., RunningProxy], pg18: embedded.Postgres, admin: Admin
) -> None:
    """Looked at while clients come and go: with both looks at the server the same, the console's in between is."""
    other = {"host": pg18.host, "port": pg18.port, "sslmode": "disable", "dbname": pg18.database, "min_size": 1}
    proxy = proxy_for(max_size=3, databases={"other": {**other, "max_size": 2}})
    stop = asyncio.Event()
    agreed = 0

    async def load(database: str, hold_s: float) -> None:
        while not stop.is_set():
            async with await psycopg.AsyncConnection.connect(proxy.dsn_for(database=database)) as conn:
                for _ in range(3):
                    await conn.execute("SELECT pg_sleep(%s)", [hold_s])
                    await conn.commit()

    def there() -> dict[int, bool]:
        """Our backends, and whether each is in a transaction."""
        query = BACKENDS.replace("SELECT pid", "SELECT pid, xact_start IS NOT NULL")
        return dict(admin.rows(query, (proxy.user,)))

    async with await console_of(proxy) as console:
        work = [load("other" if nth % 3 == 0 else proxy.database, 0.01 * nth) for nth in range(8)]
        clients = [asyncio.create_task(one) for one in work]

        async def look() -> bool:
            nonlocal agreed
            before = there()
            async with console.transaction():
                pools = await rows(console, "SHOW POOLS")
                (limits,) = await rows(console, "SHOW LIMITS")
                budget = await rows(console, "SHOW BUDGET")
                databases = await rows(console, "SHOW DATABASES")
                (user,) = [row for row in await rows(console, "SHOW USERS") if row["user"] == proxy.user]
                servers = await rows(console, "SHOW SERVERS")
            after = there()
            moving = sum(row["connecting"] + row["closing"] for row in pools)
            if set(before) != set(after) or moving:
                return False
            sums = {sum(row["size"] for row in pools), sum(row["size"] for row in budget), len(servers)}
            sums |= {limits["used"], user["connections"], sum(row["connections"] for row in databases)}
            if sums != {len(after)}:
                return False  # something moved between two of the tables
            assert {row["pid"] for row in servers} == set(after)
            assert limits["server_max"] == 200
            assert limits["limit"] == limits["most"] == int(0.7 * (200 - limits["reserved"]))
            for row in pools:
                states = ("idle", "leased", "connecting", "checking", "resetting", "closing")
                assert row["size"] == sum(row[state] for state in states)
                assert row["size"] <= row["limit"] <= row["max_size"]
            agreed += 1
            return agreed >= 20

        await until_async(look, "twenty looks have agreed")
        stop.set()
        await asyncio.gather(*clients)


async def until_async(condition: Callable[[], Awaitable[bool]], what: str, looks: int = 2000) -> None:
    for _ in range(looks):
        if await condition():
            return
    raise AssertionError(f"not within {looks} looks: {what}")
