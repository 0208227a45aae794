"""Group F, ends: clients that leave, in whatever moment, and those that are made to."""

import asyncio

import pytest
from proxy_kit import BIND, EXECUTE, PARSE, SLEEP, RunningProxy, not_running, running, until, wire

from cenote.embedded import Postgres
from cenote.testing.scripted_server import ScriptedServer, ServerEnd
from cenote.testing.wire import END, RawClient, error, kinds, ready, value
from cenote.wire import messages

ENDS = ("terminate", "close", "reset")
PID = "SELECT pg_backend_pid()"


async def pid_of(client: RawClient) -> str | None:
    """The server connection that serves this client now; it also shows that the session is in no transaction."""
    answer = await client.query(PID)
    assert kinds(answer) == "TDCZ", answer
    assert answer[-1].body == b"I"
    return value(answer)


async def next_pid(proxy: RunningProxy) -> str | None:
    """The same for a client that comes anew."""
    async with await proxy.client() as client:
        pid = await pid_of(client)
        await client.terminate()
        return pid


@pytest.fixture
def single(proxy_for, pg18) -> RunningProxy:
    """A proxy with one server connection: what one client leaves behind, the next one gets."""
    return proxy_for(pg18, max_size=1)


# -- F1, F2, F3, F4, F15: clients that leave -------------------------------------------------------------------


@pytest.mark.parametrize("end", ENDS)
@wire
async def test_F1_an_idle_client_that_leaves_leaves_no_trace(single, end):
    async with await single.client() as client:
        pid = await pid_of(client)
        await getattr(client, end)()
    assert await next_pid(single) == pid


@pytest.mark.parametrize("end", ENDS)
@wire
async def test_F1_a_client_that_waits_and_leaves_is_out_of_the_line(single, end):
    async with await single.client() as holder, await single.client() as waiter:
        pid = await pid_of(holder)
        await holder.query("BEGIN")
        await waiter.send(messages.query("SELECT 1"))
        await single.reached(waiting=1)
        await getattr(waiter, end)()
        await single.reached(waiting=0)
        await holder.query("COMMIT")
        assert await pid_of(holder) == pid


@wire
async def test_F1_so_is_one_that_sent_more_than_is_read_ahead(single):
    """It is not read from while it waits; that it has died is seen all the same."""
    async with await single.client() as holder, await single.client() as waiter:
        await holder.query("BEGIN")
        waiter.feed(messages.query("SELECT 1" + " " * 1000) * 700)
        await single.reached(waiting=1)
        await asyncio.wait_for(waiter.writer.drain(), 5)
        await waiter.reset()
        await single.reached(waiting=0)
        await holder.query("COMMIT")


@pytest.mark.parametrize("end", ["close", "reset"])
@wire
async def test_F1_a_client_that_leaves_while_its_log_in_waits_for_a_server_is_out_of_the_line(proxy_for, end):
    async with ScriptedServer() as server:
        server.refuse()
        proxy = proxy_for(server)
        async with await RawClient.connect(proxy.address) as client:
            hello = asyncio.create_task(client.startup(proxy.user, proxy.database, proxy.password))
            await proxy.reached(waiting=1)
            hello.cancel()
            await asyncio.wait([hello])
            await getattr(client, end)()
        await proxy.reached(waiting=0)
        await until(lambda: proxy.clients() == 0)


@pytest.mark.parametrize("sql", ["SELECT 1; SELECT 2", "SELECT pg_sleep(0.2)"])
@wire
async def test_F1_a_goodbye_is_heard_behind_the_answers_to_what_came_before_it(differential, sql):
    """As PostgreSQL reads it: in its turn. What was asked before it is done, committed and answered."""
    said = await differential(
        messages.query("INSERT INTO farewell VALUES (1)") + messages.query(sql) + messages.TERMINATE,
        END,
        setup="CREATE TABLE farewell (id int PRIMARY KEY)",
        teardown="SELECT 1 / count(*) FROM farewell; DROP TABLE farewell",
    )
    assert kinds(said).startswith("CZTDC")


@wire
async def test_F1_so_is_one_that_comes_between_the_answers(differential):
    said = await differential(
        messages.query("SELECT 1") + messages.query("SELECT pg_sleep(0.2)"), ready(), messages.TERMINATE, END
    )
    assert kinds(said) == "TDCZTDCZ"


@pytest.mark.parametrize("end", ENDS)
@wire
async def test_F1_in_session_mode_nothing_of_a_session_is_left_to_the_next_one(proxy_for, pg18, end):
    proxy = proxy_for(pg18, max_size=1, mode="session")
    async with await proxy.client() as client:
        pid = await pid_of(client)
        await client.query("SET work_mem = '77kB'; CREATE TEMP TABLE mine (id int); PREPARE mine AS SELECT 1")
        await client.query("LISTEN mine; SELECT pg_advisory_lock(20061)")
        await client.query("BEGIN")
        await getattr(client, end)()
    async with await proxy.client() as client:
        assert await pid_of(client) == pid
        assert value(await client.query("SHOW work_mem")) == "4MB"
        assert error(await client.query("SELECT * FROM mine"))["C"] == "42P01"
        assert error(await client.query("EXECUTE mine"))["C"] == "26000"
        assert value(await client.query("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'")) == "0"
        assert value(await client.query("SELECT count(*) FROM pg_listening_channels()")) == "0"


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("last", ["SELECT 1", "SELECT 1/0"], ids=["T", "E"])
@wire
async def test_F2_F15_a_transaction_of_a_client_that_left_is_rolled_back(single, admin, end, last):
    async with await single.client() as client:
        pid = await pid_of(client)
        await client.query("BEGIN; SELECT pg_advisory_xact_lock(20062)")
        assert (await client.query(last))[-1].body == (b"E" if "0" in last else b"T")
        assert admin.value("SELECT pg_try_advisory_lock(20062)") is False or "0" in last
        await getattr(client, end)()
    assert await next_pid(single) == pid
    assert admin.value("SELECT pg_try_advisory_lock(20062)") is True
    admin.rows("SELECT pg_advisory_unlock_all()")


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("sql", [SLEEP, "BEGIN; " + SLEEP])
@wire
async def test_F3_the_query_of_a_client_that_left_is_cancelled_and_the_connection_kept(single, admin, end, sql):
    """Also behind a goodbye: what nobody will read is not worth a connection."""
    async with await single.client() as client:
        pid = await pid_of(client)
        await client.send(messages.query(sql))
        await running(admin, sql)
        await getattr(client, end)()
    await not_running(admin, sql)
    assert await next_pid(single) == pid


@pytest.mark.parametrize("end", ["close", "reset"])
@wire
async def test_F3_so_is_one_in_the_extended_protocol(single, admin, end):
    async with await single.client() as client:
        pid = await pid_of(client)
        parse = messages.parse(b"", SLEEP.encode() + b"\0\0\0")
        await client.send(parse, BIND, EXECUTE, messages.SYNC)
        await running(admin, SLEEP)
        await getattr(client, end)()
    assert await next_pid(single) == pid


@pytest.mark.parametrize("end", ["close", "reset"])
@wire
async def test_F3_so_is_one_whose_rows_nobody_reads_any_more(single, end):
    async with await single.client() as client:
        pid = await pid_of(client)
        await client.send(messages.query("SELECT repeat('x', 1000) FROM generate_series(1, 10000000)"))
        await client.until("D")
        await getattr(client, end)()
    assert await next_pid(single) == pid


@wire
async def test_F3_a_pipeline_whose_client_left_runs_no_further_than_its_cancel(single, admin):
    """The first query sleeps; those behind it are in the server's hands already, and are waited for."""
    async with await single.client() as client:
        pid = await pid_of(client)
        await client.send(messages.query(SLEEP), *[messages.query("SELECT 1")] * 50)
        await running(admin, SLEEP)
        await client.reset()
    assert await next_pid(single) == pid


@wire
async def test_F3_the_clean_up_is_bounded_and_then_the_connection_goes(proxy_for):
    async def stubborn(session: ServerEnd) -> None:
        await session.expect("Q")
        await session.ended()

    async with ScriptedServer(stubborn, ServerEnd.serve) as server:
        proxy = proxy_for(server, max_size=1, cleanup_timeout=0.3)
        async with await proxy.client() as client:
            await client.send(messages.query("SELECT slow"))
            await until(lambda: server.sessions[0].heard)
            await client.reset()
        async with await proxy.client() as client:
            assert value(await client.query("SELECT next")) == "1: SELECT next"
        assert server.sessions[0].cancelled.is_set()
        await until(server.sessions[0].gone.is_set)


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize(
    "batch",
    [
        PARSE + messages.FLUSH,
        PARSE + BIND + messages.FLUSH,
        PARSE + BIND + EXECUTE + messages.FLUSH,
        messages.query("BEGIN") + PARSE + BIND + EXECUTE + messages.FLUSH,
        PARSE + BIND + EXECUTE,
        messages.parse(b"s", b"SELECT nonsense\0\0\0") + BIND + messages.FLUSH,
    ],
    ids=["P", "PB", "PBE", "Q-PBE", "PBE-unflushed", "failed"],
)
@wire
async def test_F4_a_batch_without_its_sync_is_brought_to_an_end(single, batch, end):
    async with await single.client() as client:
        pid = await pid_of(client)
        await client.send(batch)
        if batch.endswith(messages.FLUSH):
            await client.until("1", "E")
        await getattr(client, end)()
    assert await next_pid(single) == pid


@pytest.mark.parametrize("cut", [1, 4, 5, 20])
@pytest.mark.parametrize("message", [messages.query("SELECT " + "1" * 100), PARSE, BIND], ids="QPB")
@wire
async def test_F4_a_message_that_its_client_never_finished_reaches_nobody(single, message, cut):
    async with await single.client() as client:
        await pid_of(client)
        await client.send((PARSE if message is BIND else b"") + message[:cut])
        await client.reset()
    async with await single.client() as client:
        await pid_of(client)
        await pid_of(client)


@pytest.mark.parametrize("pinned", [True, False], ids=["pinned", "long"])
@wire
async def test_F4_half_a_message_that_went_on_to_the_server_does_not_hold_its_slot(single, pinned):
    """Whatever is sent behind it, Terminate included, would be its other half to the server."""
    async with await single.client() as client:
        if pinned:
            await client.query("SET work_mem = '77kB'")
            await client.send(messages.query("SELECT 1" + " " * 100)[:50])
        else:
            await client.send(messages.query("SELECT 1" + " " * 3_000_000)[:1_500_000])
            await single.reached(leased=1)
        await client.reset()
    began = asyncio.get_running_loop().time()
    await single.reached(leased=0, closing=0, resetting=0)
    assert asyncio.get_running_loop().time() - began < 4.5
    assert await next_pid(single)


# -- F13, F14, F16: times and transactions ---------------------------------------------------------------------


@pytest.mark.parametrize("begin", ["BEGIN", "BEGIN; SELECT 1/0"], ids=["T", "E"])
@wire
async def test_F13_who_idles_in_a_transaction_for_too_long_is_sent_home(proxy_for, pg18, begin):
    proxy = proxy_for(pg18, max_size=1, idle_transaction_timeout=0.3)
    async with await proxy.client() as client:
        pid = await pid_of(client)
        await client.query(begin)
        ended = await client.closed()
        assert error(ended)["C"] == "25P03"
        assert error(ended)["V"] == "FATAL"
    assert await next_pid(proxy) == pid


@wire
async def test_F13_waiting_for_the_server_is_not_idling(proxy_for, pg18):
    proxy = proxy_for(pg18, max_size=1, idle_transaction_timeout=2.0)
    async with await proxy.client() as client, await proxy.client() as waiter:
        await client.query("BEGIN")
        await waiter.send(messages.query("SELECT 'served'"))
        assert kinds(await client.query("SELECT pg_sleep(3.5)")) == "TDCZ"
        assert kinds(await client.query("COMMIT")) == "CZ"
        assert value(await waiter.until_ready()) == "served"


@wire
async def test_F13_outside_a_transaction_a_client_may_idle(proxy_for, pg18, admin):
    proxy = proxy_for(pg18, max_size=1, idle_transaction_timeout=0.2)
    async with await proxy.client() as client:
        await pid_of(client)
        await asyncio.to_thread(admin.rows, "SELECT pg_sleep(1.5)")
        await pid_of(client)


@wire
async def test_F14_a_query_timeout_does_not_fire_where_nothing_runs(proxy_for, pg18, admin):
    proxy = proxy_for(pg18, max_size=1, query_timeout=1.0)
    async with await proxy.client() as client:
        pid = await pid_of(client)
        await client.query("BEGIN")
        await asyncio.to_thread(admin.rows, "SELECT pg_sleep(2.3)")
        assert kinds(await client.query("COMMIT")) == "CZ"
        await asyncio.to_thread(admin.rows, "SELECT pg_sleep(2.3)")
        assert await pid_of(client) == pid


@wire
async def test_F14_a_query_that_takes_too_long_is_cancelled_and_the_session_goes_on(proxy_for, pg18):
    proxy = proxy_for(pg18, max_size=1, query_timeout=1.0)
    async with await proxy.client() as client:
        pid = await pid_of(client)
        assert error(await client.query(SLEEP))["C"] == "57014"
        assert await pid_of(client) == pid


@wire
async def test_F16_a_prepared_transaction_outlives_the_lease_that_prepared_it(proxy_for):
    with Postgres(18, settings={"max_prepared_transactions": 4}) as pg:
        proxy = proxy_for(pg, max_size=1)
        async with await proxy.client() as client, await proxy.client() as other:
            await client.query("CREATE TABLE paid (id int)")
            await client.query("BEGIN; INSERT INTO paid VALUES (1); PREPARE TRANSACTION 'two phases'")
            pid = await pid_of(other)
            assert value(await other.query("SELECT count(*) FROM paid")) == "0"
            assert kinds(await other.query("COMMIT PREPARED 'two phases'")) == "CZ"
            assert value(await client.query("SELECT count(*) FROM paid")) == "1"
            assert await pid_of(client) == pid
            await client.terminate()
            await other.terminate()
        await proxy.finish()
