"""Where the shared listener ends: connections that are lost, clients that leave or do not read, operators' orders,
and pools in which it cannot be. Drivers listen as they do at the server.
"""

from __future__ import annotations

import asyncio
import select

import psycopg
import psycopg2
import pytest
from listen_kit import channels, hear, heard, listener_pid, listening, shared
from proxy_kit import Admin, RunningProxy, until, wire
from scripts_BD import query
from state_kit import direct, pid_of, pinned, tell

from cenote.embedded import Postgres
from cenote.proxy import operations
from cenote.testing.wire import RawClient, error, kinds, rows, value

asyncpg = pytest.importorskip("asyncpg")


@pytest.fixture
def three(proxy_for, pg18: Postgres) -> RunningProxy:
    """A proxy with three server connections, and a console."""
    return proxy_for(pg18, max_size=3, top={"admin_users": [pg18.user]})


async def told_of_the_gap(client: RawClient) -> None:
    """The client hears that notifications may have been lost."""
    notice = (await client.until("N"))[-1].fields
    assert (notice["V"], notice["C"]) == ("WARNING", "01000")
    assert "notifications may have been lost" in notice["M"]


def gaps(proxy: RunningProxy) -> int:
    return int(proxy.call(lambda: sum(pool.listener.gaps for pool in proxy.pools())))


# -- the connection ends ------------------------------------------------------------------------------------------


@wire
async def test_when_the_shared_connection_is_lost_another_listens_and_every_listener_is_told(three, admin: Admin):
    clients = [await three.client() for _ in range(5)]
    async with await direct(three.server) as other:
        for number, client in enumerate(clients):
            await listening(three, client, f"LISTEN c{number % 2}")
        lost = listener_pid(three)
        admin.rows("SELECT pg_terminate_backend(%s)", (lost,))
        for client in clients:
            await told_of_the_gap(client)
        assert listener_pid(three) != lost
        assert gaps(three) == 1
        await tell(other, "NOTIFY c0, 'even'", "NOTIFY c1, 'odd'")
        for number, client in enumerate(clients):
            assert await hear(client) == [(f"c{number % 2}", "odd" if number % 2 else "even")]
            await client.terminate()


@wire
async def test_a_client_in_a_transaction_is_told_of_the_gap_behind_it(three, admin: Admin):
    async with await three.client() as client, await three.client() as other:
        await listening(three, client, "LISTEN a")
        await listening(three, other, "LISTEN a")
        await tell(client, "BEGIN")
        admin.rows("SELECT pg_terminate_backend(%s)", (listener_pid(three),))
        await told_of_the_gap(other)
        assert kinds(await client.query("SELECT 1")) == "TDCZ"
        assert kinds(await client.query("COMMIT")) == "CZ"
        await told_of_the_gap(client)


@wire
async def test_reconnect_gives_the_shared_connection_back_and_the_gap_is_told(three):
    async with await three.client() as client:
        await listening(three, client, "LISTEN a")
        before = listener_pid(three)
        three.call(lambda: operations.reconnect(three.daemon))
        await told_of_the_gap(client)
        assert listener_pid(three) != before
        await tell(client, "NOTIFY a")
        assert await hear(client) == [("a", "")]


@wire
async def test_a_pause_does_not_wait_for_the_shared_connection(three):
    async with await three.client() as client, await three.client(database="cenote") as console:
        await listening(three, client, "LISTEN a")
        await tell(console, "PAUSE")
        assert three.counts()["leased"] == 0
        await tell(console, "RESUME")
        await told_of_the_gap(client)
        await tell(client, "NOTIFY a")
        assert await hear(client) == [("a", "")]


@wire
async def test_a_drain_sends_listeners_home(three):
    async with await three.client() as client:
        await listening(three, client, "LISTEN a")
        await asyncio.wait_for(three.begin(lambda: three.daemon.drain(5.0)), 5.0)
        assert error(await client.closed())["C"] == "57P01"


@wire
async def test_it_gives_way_when_nobody_else_could_be_served(proxy_for, pg18):
    proxy = proxy_for(pg18, max_size=2, max_pinned=2)
    async with await proxy.client() as client, await proxy.client() as holder, await proxy.client() as other:
        await tell(holder, "SELECT pg_advisory_lock(1)")
        await listening_beside(proxy, client, "LISTEN a")
        assert value(await other.query("SELECT 'served'")) == "served"
        await told_of_the_gap(client)
        await tell(holder, "SELECT pg_advisory_unlock(1)")
        await until(lambda: shared(proxy) == 1)
        await other.query("NOTIFY a")
        await client.until("A")


async def listening_beside(proxy: RunningProxy, client: RawClient, text: str) -> None:
    """The client listens by the shared connection, while another keeps one for a reason of its own."""
    await tell(client, text)
    await until(lambda: shared(proxy) == 1 and pinned(proxy) == 1)


# -- the client ends ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["terminate", "close", "reset"])
@wire
async def test_nobody_listens_for_a_client_that_has_left(three, end):
    async with await three.client() as stays:
        await listening(three, stays, "LISTEN a")
        for text in ("LISTEN a; LISTEN b", "BEGIN; LISTEN b; COMMIT; BEGIN; UNLISTEN b"):
            client = await three.client()
            await client.query("LISTEN b")
            await client.send(query(text))
            await getattr(client, end)()
        await until(lambda: channels(three) == ["a"])
        await tell(stays, "NOTIFY a")
        assert await hear(stays) == [("a", "")]


@pytest.mark.parametrize("why", ["does not read", "is in a transaction"])
@wire
async def test_a_client_for_which_too_much_waits_is_closed_and_the_others_hear_on(three, monkeypatch, why):
    monkeypatch.setattr("cenote.proxy.ear.BACKLOG_BYTES", 2_000_000)
    monkeypatch.setattr("cenote.proxy.listener.SLOW_S", 0.0)
    async with await three.client() as deaf, await three.client() as client, await direct(three.server) as other:
        await listening(three, client, "LISTEN a")
        await listening(three, deaf, "LISTEN a")
        if why == "is in a transaction":
            await tell(deaf, "BEGIN")
        text = "SELECT pg_notify('a', n || repeat('x', 7000)) FROM generate_series(1, 100) AS n"
        for _ in range(20 if why == "is in a transaction" else 200):
            await other.query(text)
            assert len(await hear(client, 100)) == 100
            if three.call(lambda: any(c.ending for c in three.daemon.clients.values())):
                break
        answer = await deaf.closed()
        assert error(answer)["C"] == "53400"
        assert "notifications" in error(answer)["M"]
        assert (heard(answer) == []) == (why == "is in a transaction")
        assert await pid_of(client)


@wire
async def test_who_reads_slowly_hears_everything(three):
    """A burst of more than may wait for a client: the server keeps it until the client has read."""
    async with await three.client() as client, await three.client() as second, await direct(three.server) as other:
        await listening(three, client, "LISTEN a")
        await listening(three, second, "LISTEN a")
        text = "SELECT pg_notify('a', n || repeat('x', 7000)) FROM generate_series(1, 4000) AS n"
        await other.query(text)
        for told in await asyncio.gather(hear(client, 4000), hear(second, 4000)):
            assert [payload.rstrip("x") for _, payload in told] == [str(number) for number in range(1, 4001)]


# -- where it cannot be -------------------------------------------------------------------------------------------


@wire
async def test_with_one_connection_a_listener_keeps_it(proxy_for, pg):
    proxy = proxy_for(pg, max_size=1)
    async with await proxy.client() as client:
        await tell(client, "LISTEN a", "SELECT 1")
        assert (pinned(proxy), shared(proxy)) == (1, 0)
        await tell(client, "UNLISTEN a", "SELECT 1")
        assert pinned(proxy) == 0


@pytest.mark.parametrize("first", ["UTF8", "LATIN1"])
@wire
async def test_a_listener_of_another_client_encoding_than_the_first_keeps_its_connection(three, first):
    others = "LATIN1" if first == "UTF8" else "UTF8"
    async with (
        await three.client(params={"client_encoding": first}) as client,
        await three.client(params={"client_encoding": others}) as second,
        await three.client(params={"client_encoding": first}) as third,
    ):
        codecs = {client: first, second: others, third: first}
        for one, codec in codecs.items():
            await one.send(query('LISTEN "é"'.encode(codec)))
            await one.until_ready()
            assert kinds(await one.query("SELECT 1")) == "TDCZ"
            await until(lambda: shared(three) == 1)
        assert pinned(three) == 1
        async with await direct(three.server) as sender:
            await tell(sender, "NOTIFY \"é\", 'ü'")
            for one, codec in codecs.items():
                assert (await one.until("A"))[-1].body[4:] == "é\0ü\0".encode(codec)


@wire
async def test_a_connection_that_listens_for_all_keeps_no_settings_of_the_client_that_had_it(three):
    async with await three.client() as client, await three.client() as other:
        await tell(client, "SET statement_timeout = '1s'", "SET search_path = mine", "SET ROLE app")
        await listening(three, client, "LISTEN a")
        assert value(await client.query("SHOW search_path")) == "mine"
        assert value(await other.query("SHOW search_path")) == '"$user", public'
        (pool,) = three.pools()
        assert three.call(lambda: pool.listener.server.settings) is None
        await tell(client, "UNLISTEN a")
        await until(lambda: three.counts()["idle"] == len(pool.servers), "it was given back")
        for _ in range(3):
            assert value(await other.query("SHOW idle_session_timeout")) == "0"
            assert value(await other.query("SHOW synchronous_commit")) == "on"


@wire
async def test_one_that_chooses_another_client_encoding_gets_its_channels_back(three):
    async with await three.client() as client, await three.client() as other, await direct(three.server) as sender:
        await listening(three, client, 'LISTEN "é"')
        await listening(three, other, 'LISTEN "é"')
        sender.feed(b"".join(query(f"NOTIFY \"é\", '{number}ü'") for number in range(200)))
        answers = await client.query("SET client_encoding = 'LATIN1'") + await client.query("SELECT 1")
        await sender.trace(200)
        await until(lambda: pinned(three) == 1)
        await tell(sender, "NOTIFY \"é\", '200ü'")
        while kinds(answers).count("A") < 201:
            answers += await client.until("A")
        told = [message.body[4:] for message in answers if message.kind == "A"]
        assert [
            int(text.split(b"\0")[1].removesuffix("ü".encode()).removesuffix("ü".encode("latin-1")))
            for text in told
        ] == list(range(201))
        assert told[-1] == "é\x00200ü\0".encode("latin-1")
        await tell(client, "RESET client_encoding")
        await until(lambda: pinned(three) == 0, "it shares again")
        await tell(sender, "NOTIFY \"é\", 'ü'")
        assert (await client.until("A"))[-1].body[4:] == "é\0ü\0".encode()


@wire
async def test_one_whose_names_are_its_own_gets_its_channels_back(three):
    async with await three.client() as client, await three.client() as other, await direct(three.server) as sender:
        await listening(three, client, "LISTEN a; LISTEN b")
        await listening(three, other, "LISTEN a")
        await tell(client, "PREPARE p AS SELECT 1; DEALLOCATE p; PREPARE p AS SELECT 2", "EXECUTE p")
        await tell(sender, "NOTIFY a, 'one'")
        assert await hear(client) == [("a", "one")]
        await tell(client, "UNLISTEN a")
        await tell(sender, "NOTIFY a, 'two'", "NOTIFY b, 'three'")
        assert await hear(client) == [("b", "three")]
        await client.terminate()
        assert await hear(other, 2) == [("a", "one"), ("a", "two")]


@wire
async def test_a_commit_that_waits_for_a_standby_holds_up_no_client_that_comes_to_listen(proxy_for):
    """Notifications behind it cannot come, so the client keeps its connection until they can."""
    waits = "SELECT 1 FROM pg_stat_activity WHERE wait_event = 'SyncRep'"
    with Postgres(version=18) as server:
        proxy = proxy_for(server, max_size=3, max_pinned=3)
        admin = Admin(server.superuser_dsn)
        admin.rows("CREATE TABLE written (id int); GRANT ALL ON written TO PUBLIC")
        async with await proxy.client() as client, await proxy.client() as other, await direct(server) as writer:
            await listening(proxy, other, "LISTEN a")
            admin.rows("ALTER SYSTEM SET synchronous_standby_names = 'nobody'")
            admin.rows("SELECT pg_reload_conf()")
            async with await direct(server) as probe:
                while not admin.rows(waits):
                    probe.feed(query("INSERT INTO written VALUES (0)"))
                await tell(writer, "BEGIN", "INSERT INTO written VALUES (1)", "NOTIFY a, 'late'")
                await writer.send(query("COMMIT"))
                await until(lambda: len(admin.rows(waits)) == 2)
                await tell(client, "LISTEN a")
                assert value(await client.query("SELECT 'served'")) == "served"
                assert pinned(proxy) == 1
                admin.rows("ALTER SYSTEM RESET synchronous_standby_names")
                admin.rows("SELECT pg_reload_conf()")
                await writer.until_ready()
            for one in (client, other):
                assert await hear(one) == [("a", "late")]
        proxy.clean()
        proxy.stop()
        admin.conn.close()


@wire
async def test_listeners_come_through_whatever_happens_to_the_shared_connection(three, admin: Admin):
    """It is lost again and again while clients come to listen, listen to others and leave."""
    stop = asyncio.Event()

    async def come_and_go(number: int) -> None:
        while not stop.is_set():
            async with await three.client() as client:
                for text in (
                    f"LISTEN c{number}",
                    "LISTEN everybody",
                    f"UNLISTEN c{number}",
                    "SELECT 1",
                    "UNLISTEN *",
                ):
                    await client.query(text)

    async with await three.client() as client:
        await listening(three, client, "LISTEN everybody")
        going = [asyncio.create_task(come_and_go(number)) for number in range(4)]
        for lost in range(1, 4):
            await until(lambda: shared(three) == 1)
            admin.rows("SELECT pg_terminate_backend(%s)", (listener_pid(three),))
            await told_of_the_gap(client)
            assert gaps(three) >= lost
        stop.set()
        await asyncio.gather(*going)
        await until(lambda: (channels(three), pinned(three)) == (["everybody"], 0))
        await tell(client, "NOTIFY everybody")
        assert await hear(client) == [("everybody", "")]


@wire
async def test_listen_is_not_refused_where_pins_are(proxy_for, pg18):
    for options in ({"unsafe": "refuse"}, {"max_pinned": 1}):
        proxy = proxy_for(pg18, max_size=3, **options)
        clients = [await proxy.client() for _ in range(4)]
        for client in clients:
            await listening(proxy, client, "LISTEN a")
        refused = error(await clients[0].query("SELECT pg_advisory_lock(1)"))
        assert refused["C"] == "53300"
        await tell(clients[1], "NOTIFY a")
        for client in clients:
            assert await hear(client) == [("a", "")]
            await client.terminate()


@wire
async def test_in_session_mode_it_is_the_clients_own(proxy_for, pg18):
    proxy = proxy_for(pg18, max_size=2, mode="session")
    async with await proxy.client() as client:
        await tell(client, "LISTEN a")
        assert kinds(await client.query("NOTIFY a, 'mine'")) == "CAZ"
        assert shared(proxy) == 0


@wire
async def test_in_statement_mode_it_is_shared(proxy_for, pg18):
    proxy = proxy_for(pg18, max_size=2, mode="statement")
    async with await proxy.client() as client, await proxy.client() as other:
        await listening(proxy, client, "LISTEN a")
        await tell(other, "NOTIFY a, 'heard'")
        assert await hear(client) == [("a", "heard")]


@wire
async def test_one_that_keeps_its_connection_for_something_else_listens_by_the_shared_one(three):
    async with await three.client() as client, await three.client() as other:
        await listening(three, other, "LISTEN a")
        await tell(client, "SELECT pg_advisory_lock(1)", "LISTEN b", "SELECT 1")
        await until(lambda: pinned(three) == 1 and channels(three) == ["a", "b"])
        await tell(other, "NOTIFY b, 'heard'")
        assert await hear(client) == [("b", "heard")]
        await tell(client, "UNLISTEN b", "SELECT pg_advisory_unlock(1)", "SELECT 1")
        assert (pinned(three), channels(three)) == (0, ["a"])


@wire
async def test_show_says_who_listens(three):
    async with await three.client() as client, await three.client(database="cenote") as console:
        await listening(three, client, "LISTEN a", "LISTEN b")
        await tell(client, "NOTIFY a")
        await hear(client)

        async def show(name: str) -> list[dict[str, str | None]]:
            answer = await console.query(f"SHOW {name}")
            return [dict(zip(columns(answer[0].body), row, strict=True)) for row in rows(answer)]

        assert [row["channels"] for row in await show("CLIENTS") if row["database"] == three.database] == ["2"]
        (leased,) = [row for row in await show("SERVERS") if row["state"] == "leased"]
        assert leased["client_address"] == "cenote (listener)"
        (pool,) = await show("POOLS")
        assert (pool["leased"], pool["pinned"], pool["listening"]) == ("1", "0", "1")
        (stats,) = await show("STATS")
        assert (stats["notifications"], stats["listener_gaps"], stats["pins"]) == ("1", "0", "")


def columns(body: bytes) -> list[str]:
    """The names in a RowDescription."""
    names, at = [], 2
    for _ in range(int.from_bytes(body[:2], "big")):
        end = body.index(b"\0", at)
        names.append(body[at:end].decode())
        at = end + 19
    return names


# -- drivers ------------------------------------------------------------------------------------------------------


def test_psycopg_hears_notifications_in_and_out_of_autocommit(three) -> None:
    with psycopg.connect(three.dsn) as client, psycopg.connect(three.dsn, autocommit=True) as other:
        client.execute("LISTEN a")
        client.commit()
        for number in range(5):
            other.execute(f"NOTIFY a, '{number}'")
        assert [note.payload for note in client.notifies(timeout=10, stop_after=5)] == list("01234")
        client.execute("UNLISTEN a")
        client.rollback()
        other.execute("NOTIFY a, 'still'")
        assert [note.payload for note in client.notifies(timeout=10, stop_after=1)] == ["still"]
        client.execute("UNLISTEN a")
        client.commit()
        client.execute("SELECT 1")
        client.rollback()
        assert channels(three) == []


def test_psycopg2_hears_notifications(three) -> None:
    client, other = psycopg2.connect(three.dsn), psycopg2.connect(three.dsn)
    try:
        client.autocommit = other.autocommit = True
        client.cursor().execute("LISTEN a")
        client.cursor().execute("SELECT 1")
        other.cursor().execute("NOTIFY a, 'heard'")
        while not client.notifies:
            assert select.select([client], [], [], 10)[0], "a notification is due"
            client.poll()
        assert [(note.channel, note.payload) for note in client.notifies] == [("a", "heard")]
    finally:
        client.close()
        other.close()


@wire
async def test_asyncpg_hears_notifications_and_warns_of_gaps(three, admin: Admin):
    client, other = await asyncpg.connect(three.dsn), await asyncpg.connect(three.dsn)
    try:
        told: asyncio.Queue[tuple[str, str]] = asyncio.Queue()
        warned: asyncio.Queue[str] = asyncio.Queue()
        client.add_log_listener(lambda _, message: warned.put_nowait(message.message))

        def listener(_: object, pid: int, channel: str, payload: str) -> None:
            told.put_nowait((channel, payload))

        await client.add_listener("a", listener)
        await other.execute("NOTIFY a, 'one'")
        assert await told.get() == ("a", "one")
        await until(lambda: shared(three) == 1)
        admin.rows("SELECT pg_terminate_backend(%s)", (listener_pid(three),))
        assert "may have been lost" in await warned.get()
        async with client.transaction():
            await client.fetch("SELECT 1")
            await other.execute("NOTIFY a, 'two'")
        assert await told.get() == ("a", "two")
        await client.remove_listener("a", listener)
        await client.fetch("SELECT 1")
        assert channels(three) == []
    finally:
        await client.close()
        await other.close()
