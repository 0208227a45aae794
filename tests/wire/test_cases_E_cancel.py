"""Group E, cancel: it hits the query it was meant for, or nothing."""

import asyncio

import pytest
from proxy_kit import GATE, SLEEP, Admin, RunningProxy, finishes_anyway, running, until, wire, works
from state_kit import elsewhere, tell

from cenote.testing.scripted_server import ScriptedServer, ServerEnd
from cenote.testing.wire import RawClient, error, kinds, send_cancel, value
from cenote.wire import messages

# -- E1, E2, E3: nothing to hit ------------------------------------------------------------------------------


@wire
async def test_E1_an_unknown_key_is_closed_without_a_word_and_hits_nobody(proxy, admin, gate):
    async with await proxy.client(version=messages.PROTOCOL_3_2) as client:
        await client.send(messages.query(GATE))
        await running(admin, GATE)
        pid, secret = client.key
        wrong = [
            (pid, bytes(len(secret))),
            (pid, secret[:-1]),
            (pid, secret[:4]),
            (pid, secret + b"x"),
            (pid + 1, secret),
            (-pid, secret),
            (0, secret),
            (0x7FFFFFFF, secret),
        ]
        for key in wrong:
            assert await send_cancel(proxy.address, key) == b""
        gate()
        assert kinds(await client.until_ready()) == "TDCZ"


@wire
async def test_E1_the_key_of_a_client_that_left_hits_nobody(proxy_for, pg18, admin, gate):
    proxy = proxy_for(pg18, max_size=1)
    async with await proxy.client() as gone:
        await works(gone)
        key = gone.key
        await gone.terminate()
    async with await proxy.client() as client:
        await client.send(messages.query(GATE))
        await running(admin, GATE)
        await send_cancel(proxy.address, key)
        gate()
        assert kinds(await client.until_ready()) == "TDCZ"


@wire
async def test_E2_a_client_that_waits_leaves_the_line_and_keeps_its_session(proxy_for, pg18):
    proxy = proxy_for(pg18, max_size=1)
    async with await proxy.client() as holder, await proxy.client() as waiter:
        await holder.query("BEGIN")
        await waiter.send(messages.query("SELECT 'too late'"))
        await proxy.reached(waiting=1)
        assert await send_cancel(proxy.address, waiter.key) == b""
        answer = await waiter.until_ready()
        assert kinds(answer) == "EZ"
        assert error(answer)["C"] == "57014"
        assert proxy.counts()["waiting"] == 0
        await holder.query("COMMIT")
        await works(waiter)
        await works(holder)


@wire
async def test_E2_in_an_extended_batch_the_rest_of_it_is_discarded(proxy_for, pg18):
    proxy = proxy_for(pg18, max_size=1)
    batch = messages.parse(b"", b"SELECT 1\0\0\0") + messages.message(b"B", b"\0\0" + bytes(6))
    batch += messages.message(b"E", b"\0" + bytes(4))
    async with await proxy.client() as holder, await proxy.client() as waiter:
        await holder.query("BEGIN")
        await waiter.send(batch + messages.SYNC + messages.query("SELECT 2"))
        await proxy.reached(waiting=1)
        await send_cancel(proxy.address, waiter.key)
        assert kinds(await waiter.until_ready()) == "EZ"
        await holder.query("COMMIT")
        assert value(await waiter.until_ready()) == "2", "what came behind the Sync is a request of its own"


@wire
async def test_E3_a_cancel_for_an_idle_client_hits_nobody(proxy_for, pg18, admin, gate):
    """Least of all who now has the server connection that it had before."""
    proxy = proxy_for(pg18, max_size=1)
    async with await proxy.client() as idle, await proxy.client() as busy:
        await works(idle)
        await busy.send(messages.query(GATE))
        await running(admin, GATE)
        assert await send_cancel(proxy.address, idle.key) == b""
        gate()
        assert kinds(await busy.until_ready()) == "TDCZ"
        await works(idle)


@wire
async def test_E3_a_cancel_between_the_statements_of_a_transaction_does_nothing(proxy):
    async with await proxy.client() as client:
        await client.query("BEGIN")
        assert await send_cancel(proxy.address, client.key) == b""
        answer = await client.query("SELECT 1")
        assert kinds(answer) == "TDCZ"
        assert answer[-1].body == b"T"
        await client.query("COMMIT")


# -- cancel as it should be ----------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [messages.PROTOCOL_3_0, messages.PROTOCOL_3_2], ids=["3.0", "3.2"])
@wire
async def test_E4_a_cancel_ends_the_query_and_nothing_else(each_proxy, version):
    admin = Admin(each_proxy.server.superuser_dsn)
    try:
        async with await each_proxy.client(version=version) as client:
            for sleep in (SLEEP, "BEGIN; " + SLEEP):
                await client.send(messages.query(sleep))
                await running(admin, sleep)
                assert await send_cancel(each_proxy.address, client.key) == b""
                assert error(await client.until_ready())["C"] == "57014"
                await client.query("ROLLBACK")
                await works(client)
    finally:
        admin.conn.close()


@wire
async def test_E4_a_connection_whose_cancel_is_under_way_is_nobodys(proxy_for):
    """Until the server closes the cancel connection it may still strike, and would strike the next client."""
    closing = asyncio.Event()
    async with ScriptedServer(finishes_anyway, on_cancel=lambda _: closing.wait()) as server:
        proxy = proxy_for(server, max_size=1)
        async with await proxy.client() as first, await proxy.client() as second:
            await first.send(messages.query("SELECT slow"))
            await until(lambda: server.sessions[0].heard)
            cancel = asyncio.create_task(send_cancel(proxy.address, first.key))
            assert value(await first.until_ready()) == "0: finished"
            await second.send(messages.query("SELECT second"))
            await proxy.reached(waiting=1)
            assert proxy.counts()["resetting"] == 1
            assert len(server.sessions[0].heard) == 1
            closing.set()
            assert value(await second.until_ready()) == "0: SELECT second"
            assert await cancel == b""


@wire
async def test_E4_when_the_cancel_connection_ends_the_cancel_has_been_delivered(proxy_for):
    """Clients wait for that end before they ask for something else, which the cancel must not hit."""
    closing = asyncio.Event()
    async with ScriptedServer(finishes_anyway, on_cancel=lambda _: closing.wait()) as server:
        proxy = proxy_for(server)
        async with await proxy.client() as client, await RawClient.connect(proxy.address) as cancel:
            await client.send(messages.query("SELECT slow"))
            await until(lambda: server.sessions[0].heard)
            cancel.feed(messages.cancel_request(*client.key))
            ended = asyncio.create_task(cancel.rest())
            await until(server.sessions[0].cancelled.is_set)
            assert value(await client.until_ready()) == "0: finished"
            await works_for(proxy)
            assert not ended.done()
            closing.set()
            assert await ended == b""


@wire
async def test_E4_an_answer_in_the_same_turn_as_the_cancel_does_not_free_the_connection(proxy_for):
    """Between the cancel request and its dial there is no moment in which nobody remembers it."""
    closing = asyncio.Event()

    async def answered_by_the_test(session: ServerEnd) -> None:
        await session.expect("Q")
        await session.serve()

    async with ScriptedServer(answered_by_the_test, on_cancel=lambda _: closing.wait()) as server:
        proxy = proxy_for(server, max_size=1)
        async with await proxy.client() as client, await proxy.client() as other:
            await client.send(messages.query("SELECT slow"))
            await until(lambda: server.sessions[0].heard)

            def at_once() -> dict[str, int]:
                session = proxy.daemon.clients[client.key[0]]
                proxy.daemon.cancel(*client.key)
                session.server.data_received(messages.command_complete("SELECT 0") + messages.READY_IDLE)
                return proxy.counts_now()

            counts = proxy.call(at_once)
            assert kinds(await client.until_ready()) == "CZ"
            assert (counts["resetting"], counts["idle"]) == (1, 0)
            await other.send(messages.query("SELECT next"))
            await until(server.sessions[0].cancelled.is_set)
            assert len(server.sessions[0].heard) == 1
            closing.set()
            assert value(await other.until_ready()) == "0: SELECT next"


@wire
async def test_E4_a_cancel_of_which_nobody_knows_whether_it_was_delivered_costs_the_connection(proxy_for):
    async def resets(end: ServerEnd) -> None:
        end.reset()

    async with ScriptedServer(finishes_anyway, ServerEnd.serve, on_cancel=resets) as server:
        proxy = proxy_for(server, max_size=1)
        async with await proxy.client() as first, await proxy.client() as second:
            await first.send(messages.query("SELECT slow"))
            await until(lambda: server.sessions[0].heard)
            await send_cancel(proxy.address, first.key)
            assert value(await first.until_ready()) == "0: finished"
            assert value(await second.query("SELECT next")) == "1: SELECT next"


@wire
async def test_E4_a_cancel_that_never_ends_costs_the_connection_and_nobody_waits_for_it(proxy_for):
    forever = asyncio.Event()
    async with ScriptedServer(finishes_anyway, ServerEnd.serve, on_cancel=lambda _: forever.wait()) as server:
        proxy = proxy_for(server, max_size=1, cleanup_timeout=0.3)
        async with await proxy.client() as first, await proxy.client() as second:
            await first.send(messages.query("SELECT slow"))
            await until(lambda: server.sessions[0].heard)
            cancel = asyncio.create_task(send_cancel(proxy.address, first.key))
            assert value(await first.until_ready()) == "0: finished"
            assert value(await second.query("SELECT second")) == "1: SELECT second"
            await until(server.sessions[0].gone.is_set)
            forever.set()
            assert await cancel == b""


@wire
async def test_E4_a_cancel_reaches_a_pinned_client_and_a_copy_as_well(proxy_for, pg18, admin):
    proxy = proxy_for(pg18, max_size=1)
    async with await proxy.client() as client:
        await client.query("CREATE TEMP TABLE mine (id int)")
        await client.send(messages.query(SLEEP))
        await running(admin, SLEEP)
        await send_cancel(proxy.address, client.key)
        assert error(await client.until_ready())["C"] == "57014"
        await client.send(messages.query("COPY mine FROM STDIN"))
        await client.until("G")
        await send_cancel(proxy.address, client.key)
        await client.send(messages.message(b"d", b"1\n") * 2)  # a server that reads CopyData hears nothing else
        assert error(await client.until_ready())["C"] == "57014"
        await client.send(messages.message(b"c"))
        await works(client)


@wire
async def test_E4_a_cancel_request_may_come_in_pieces(proxy, admin):
    async with await proxy.client(version=messages.PROTOCOL_3_2) as client:
        await client.send(messages.query(SLEEP))
        await running(admin, SLEEP)
        async with await RawClient.connect(proxy.address) as cancel:
            await cancel.send_in_pieces(messages.cancel_request(*client.key))
            assert await cancel.rest() == b""
        assert error(await client.until_ready())["C"] == "57014"


@wire
async def test_E4_cancels_at_any_moment_never_hit_another_client(proxy_for, pg18):
    """One client is cancelled all the time, two others share its connections and must never notice."""
    proxy = proxy_for(pg18, max_size=2)
    ended = asyncio.Event()

    async def bystander(client: RawClient) -> int:
        count = 0
        while not ended.is_set():
            await works(client)
            count += 1
        return count

    async def victim(client: RawClient) -> None:
        for number in range(400):
            await client.send(messages.query("SELECT pg_sleep(0.002)" if number % 2 else "SELECT 1"))
            await send_cancel(proxy.address, client.key)
            answer = await client.until_ready()
            assert kinds(answer) in ("TDCZ", "EZ", "TEZ"), answer
            assert "E" not in kinds(answer) or error(answer)["C"] == "57014"

    clients = [await proxy.client() for _ in range(3)]
    others = [asyncio.create_task(bystander(client)) for client in clients[1:]]
    try:
        await victim(clients[0])
    finally:
        ended.set()
    assert min(await asyncio.gather(*others)) > 10
    for client in clients:
        await client.terminate()


@wire
async def test_E5_a_cancel_does_not_hit_what_the_proxy_runs_for_itself(proxy_for):
    """Here: the settings of the client being brought to the connection. The cancel is remembered for the query."""
    armed, converting, go_on = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def script(session: ServerEnd) -> None:
        while True:
            text = await session.expect("Q")
            if b"SET" in text:
                if armed.is_set():
                    converting.set()
                    await go_on.wait()
                session.send(messages.command_complete("SELECT 1"), messages.ready())
            elif text == b"SELECT slow\0":
                await session.cancelled.wait()
                session.send(messages.error("ERROR", "57014", "canceled"), messages.ready())
            else:
                session.answer(text[:-1].decode())

    async with ScriptedServer(script) as server:
        proxy = proxy_for(server, max_size=1)
        async with await proxy.client(params={"work_mem": "5MB"}) as client, await proxy.client() as other:
            assert value(await other.query("SELECT hello")) == "0: SELECT hello"
            armed.set()
            await client.send(messages.query("SELECT slow"))
            await asyncio.wait_for(converting.wait(), 10)
            assert await send_cancel(proxy.address, client.key) == b""
            await works_for(proxy)
            assert server.cancels == []
            go_on.set()
            assert error(await client.until_ready())["C"] == "57014"
            assert value(await client.query("SELECT next")) == "0: SELECT next"


@pytest.mark.parametrize("way_out", ["cancel", "query_timeout"])
@wire
async def test_E5_a_cancel_ends_what_its_client_waits_for_while_it_is_given_its_settings(
    proxy_for, pg18, admin, way_out
):
    """Here: a statement prepared by SQL, and another session that has locked its table."""
    proxy = proxy_for(pg18, max_size=2, query_timeout=2.0 if way_out == "query_timeout" else None)
    blocked = "SELECT 1 FROM pg_locks WHERE NOT granted AND relation = 'e_locked'::regclass"
    admin.rows("CREATE TABLE e_locked (x int); GRANT ALL ON e_locked TO PUBLIC")
    try:
        async with await proxy.client() as client:
            await tell(client, "PREPARE p AS SELECT count(*) FROM e_locked")
            async with elsewhere(proxy, client):
                with admin.conn.transaction():
                    admin.rows("LOCK TABLE e_locked")
                    await client.send(messages.query("SELECT 1"))
                    await until(lambda: admin.rows(blocked), "it is prepared on the other connection")
                    if way_out == "cancel":
                        await send_cancel(proxy.address, client.key)
                    answer = await client.until_ready()
                    assert kinds(answer) == "EZ"
                    assert error(answer)["C"] == "57014"
                assert value(await client.query("EXECUTE p")) == "0"
    finally:
        admin.rows("DROP TABLE e_locked")


async def works_for(proxy: RunningProxy) -> None:
    """One round trip through the proxy's loop: whatever it was going to do at once, it has done."""
    async with await RawClient.connect(proxy.address) as client:
        assert await client.request(messages.SSL_REQUEST) == b"N"
    proxy.counts()
