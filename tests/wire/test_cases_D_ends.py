"""Group D, when one side of a COPY dies, or does not keep up with the other."""

import asyncio

import pytest
from proxy_kit import RunningProxy, until, wire
from scripts_BD import (
    COPY_DONE,
    FLUSH,
    SYNC,
    bind,
    data,
    execute,
    memory,
    parse,
    query,
    stands_still,
    undisturbed,
)

from cenote.testing.wire import kinds, value
from cenote.wire import messages

IN, COUNT = "COPY d_ends FROM STDIN", "SELECT count(*) FROM d_ends"
BEGUN = parse("", IN) + bind() + execute()
PID = "SELECT pg_backend_pid()"
MEGABYTE = 1_000_000


@pytest.fixture
def single(proxy_for, pg18) -> RunningProxy:
    """One server connection for all."""
    return proxy_for(pg18, max_size=1)


@pytest.fixture
def table(admin):
    """`d_ends`, empty."""
    admin.rows("DROP TABLE IF EXISTS d_ends; CREATE TABLE d_ends (id int, name text)")
    admin.rows("ALTER TABLE d_ends OWNER TO app")
    yield "d_ends"
    admin.rows("DROP TABLE IF EXISTS d_ends")


# -- D5, D6 --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["abort", "reset", "terminate", "close"])
@pytest.mark.parametrize("how", ["simple", "extended", "in a transaction", "in the middle of a row"])
@wire
async def test_D5_a_client_that_dies_in_copy_in_leaves_no_rows_and_the_connection(single, table, end, how):
    async with await single.client() as client:
        pid = value(await client.query(PID))
        if how == "in a transaction":
            await client.query("BEGIN")
        await client.send(BEGUN + FLUSH if how == "extended" else query(IN))
        await client.until("G")
        await client.send(
            data("1\tone", "2\ttwo"), messages.message(b"d", b"3\thalf a row") if "row" in how else b""
        )
        await getattr(client, end)()
    await undisturbed(single, pid)
    async with await single.client() as client:
        assert value(await client.query(COUNT)) == "0"


@wire
async def test_D5_a_client_that_dies_inside_a_message_costs_at_most_the_connection(single, table):
    async with await single.client() as client:
        await client.send(query(IN))
        await client.until("G")
        await client.send(data("1\tone"), data("2\ttwo")[:-3])
        await client.abort()
    await undisturbed(single)
    async with await single.client() as client:
        assert value(await client.query(COUNT)) == "0"


@pytest.mark.parametrize(
    "batch",
    [query(IN), BEGUN, BEGUN + FLUSH, BEGUN + SYNC, query(IN) + data("1\tone")],
    ids=["simple", "extended", "with Flush", "with Sync", "with data"],
)
@wire
async def test_D5_a_client_that_dies_before_it_was_told_to_send(single, table, batch):
    """COPY begins when nobody is there any more, and a server that waits for data heeds no cancel."""
    async with await single.client() as client:
        pid = value(await client.query(PID))
        for _ in range(5):
            async with await single.client() as dying:
                await dying.send(batch)
                await dying.abort()
            await undisturbed(single, pid)
            assert value(await client.query(COUNT)) == "0"


@pytest.mark.parametrize("end", ["abort", "terminate"])
@wire
async def test_D6_a_client_that_dies_in_copy_out_leaves_the_connection(single, end):
    async with await single.client() as client:
        pid = value(await client.query(PID))
        await client.send(
            query("COPY (SELECT repeat('x', 1000) FROM (SELECT generate_series(1, 100000000)) AS s) TO STDOUT")
        )
        await client.until("d")
        await getattr(client, end)()
    await undisturbed(single, pid)


# -- D9 ------------------------------------------------------------------------------------------------------


@wire
async def test_D9_a_client_that_does_not_read_makes_the_server_wait(single, admin):
    """And memory stays what it was."""
    text = "COPY (SELECT repeat('x', 1000) FROM generate_series(1, 60000)) TO STDOUT"
    async with await single.client() as client:
        before = memory()
        await client.send(query(text))
        waiting = "SELECT wait_event FROM pg_stat_activity WHERE query = %s AND wait_event = 'ClientWrite'"
        await until(lambda: admin.rows(waiting, (text,)), "the server waits")
        assert memory() - before < 16 * MEGABYTE
        assert (
            sum(len(message.body) for message in await client.until_ready() if message.kind == "d") == 60_060_000
        )


@wire
async def test_D9_a_server_that_does_not_read_makes_the_client_wait(single, table, admin):
    """COPY waits for a lock, and 60 MB of rows are behind it."""
    block = messages.message(b"d", b"".join(b"%d\t%s\n" % (number, b"x" * 990) for number in range(1000)))

    async def send_all() -> None:
        for _ in range(60):
            await client.send(block)
        await client.send(COPY_DONE)

    async with await single.client() as client:
        with admin.conn.transaction():
            admin.rows("LOCK TABLE d_ends")
            before = memory()
            await client.send(query(IN))
            sending = asyncio.create_task(send_all())
            await stands_still(client, sending)
            assert memory() - before < 16 * MEGABYTE
        await sending
        assert kinds(await client.until_ready()) == "GCZ"
        assert memory() - before < 24 * MEGABYTE
        assert value(await client.query(COUNT)) == "60000"


@wire
async def test_D9_others_go_on_while_a_copy_stands_still(proxy_for, pg18, table, admin):
    proxy = proxy_for(pg18, max_size=3)
    async with await proxy.client() as out, await proxy.client() as into:
        await out.send(query("COPY (SELECT repeat('x', 1000) FROM generate_series(1, 60000)) TO STDOUT"))
        await out.until("H")
        await into.send(query(IN))
        await into.until("G")
        await into.send(data("1\tone"))
        for _ in range(20):
            await undisturbed(proxy)
        await into.send(COPY_DONE)
        assert kinds(await into.until_ready()) == "CZ"
        await out.abort()
