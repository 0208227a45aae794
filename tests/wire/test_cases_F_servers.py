"""Group F, ends: servers that die while idle or in somebody's hands."""

import asyncio

import pytest
from proxy_kit import RunningProxy, until, wire

from cenote.testing.postgres import terminate
from cenote.testing.scripted_server import Script, ScriptedServer, ServerEnd
from cenote.testing.wire import (
    Message,
    error,
    errors,
    kinds,
    rows,
    value,
)
from cenote.wire import messages

PID = "SELECT pg_backend_pid()"
serve = ServerEnd.serve
COLUMN = messages.row_description([("answer", 25)])


def fatal(sqlstate: str) -> bytes:
    return messages.error("FATAL", sqlstate, "the script ends this session")


async def idle_sessions(proxy: RunningProxy, server: ScriptedServer, count: int) -> None:
    """So many server connections, all idle."""
    clients = [await proxy.client() for _ in range(count)]
    for client in clients:
        await client.query("BEGIN")
    for client in clients:
        await client.query("COMMIT")
        await client.terminate()
    await proxy.reached(idle=count, leased=0)
    assert len(server.open()) == count


# -- F5: while idle ------------------------------------------------------------------------------------------


@wire
async def test_F5_a_server_connection_that_ends_while_idle_is_noticed_at_once(proxy_for, pg18):
    proxy = proxy_for(pg18, max_size=1)
    async with await proxy.client() as client:
        pid = int(value(await client.query(PID)) or 0)
        await proxy.reached(idle=1)
        await asyncio.to_thread(terminate, pg18.superuser_dsn, [pid])
        await proxy.reached("noticed without being asked", idle=0)
        assert int(value(await client.query(PID)) or 0) != pid


@wire
async def test_F5_a_server_that_is_killed_right_before_it_is_asked_costs_no_error(proxy_for, pg18, admin):
    """Its last words arrive before or behind our query; either way nothing has been executed."""
    proxy = proxy_for(pg18, max_size=1)
    async with await proxy.client() as client:
        for _ in range(25):
            pid = int(value(await client.query(PID)) or 0)
            admin.rows("SELECT pg_terminate_backend(%s)", (pid,))
            answer = await client.query(PID)
            assert kinds(answer) == "TDCZ", answer
            assert int(value(answer) or 0) != pid


@pytest.mark.parametrize("end", ["close", "reset", "words"])
@wire
async def test_F5_every_way_to_end_while_idle_is_noticed(proxy_for, end):
    async with ScriptedServer() as server:
        proxy = proxy_for(server, max_size=1)
        await idle_sessions(proxy, server, 1)
        session = server.sessions[0]
        if end == "words":
            session.send(fatal("57P01"))
            session.close()
        else:
            getattr(session, end)()
        await proxy.reached(idle=0, closing=0)
        async with await proxy.client() as client:
            assert value(await client.query("SELECT hello")) == "1: SELECT hello"


@wire
async def test_F5_what_an_idle_server_says_is_not_the_next_clients(proxy_for):
    async with ScriptedServer() as server:
        proxy = proxy_for(server, max_size=1)
        await idle_sessions(proxy, server, 1)
        session = server.sessions[0]
        notification = b"\0\0\0\1" + messages.cstring("channel") + messages.cstring("")
        session.send(messages.notice("WARNING", "01000", "not for you"), messages.message(b"A", notification))
        async with await proxy.client() as client:
            answer = await client.query("SELECT hello")
            assert kinds(answer) == "TDCZ"
            assert (value(answer) or "").endswith("hello")


@pytest.mark.parametrize(
    "words",
    [
        fatal("57P01"),
        messages.error("ERROR", "XX000", "oops"),
        messages.ready(),
        COLUMN,
        b"D\0\0\0\x04",
        b"\0\0\0\0\0\0",
        b"E\0\0",
    ],
    ids=["fatal", "error", "ready", "description", "row", "zeros", "half"],
)
@wire
async def test_F5_an_idle_server_that_says_what_nobody_asked_for_is_not_lent_out(proxy_for, words):
    async with ScriptedServer() as server:
        proxy = proxy_for(server, max_size=1)
        await idle_sessions(proxy, server, 1)
        server.sessions[0].send(words)
        if words == b"E\0\0":
            server.sessions[0].close()
        await until(server.sessions[0].gone.is_set)
        async with await proxy.client() as client:
            assert value(await client.query("SELECT hello")) == "1: SELECT hello"


# -- F6, F7: in somebody's hands -----------------------------------------------------------------------------


@pytest.mark.parametrize("sqlstate", ["57P01", "57P05"])
@wire
async def test_F6_what_a_dying_server_never_began_is_asked_of_another_one(proxy_for, sqlstate):
    """Its last words answer the first request of a lease: that was not executed, so it may be asked again."""

    async def dying(session: ServerEnd) -> None:
        await session.expect("Q")
        session.send(fatal(sqlstate))

    async with ScriptedServer(dying, serve) as server:
        proxy = proxy_for(server, max_size=1)
        async with await proxy.client() as client:
            answer = await client.query("SELECT hello")
            assert kinds(answer) == "TDCZ"
            assert value(answer) == "1: SELECT hello"


@wire
async def test_F6_the_same_in_the_extended_protocol(proxy_for):
    async def dying(session: ServerEnd) -> None:
        await session.expect("P")
        session.send(fatal("57P01"))

    batch = messages.parse(b"", b"SELECT 7\0\0\0") + messages.message(b"B", bytes(8))
    batch += messages.message(b"E", bytes(5)) + messages.SYNC
    async with ScriptedServer(dying, serve) as server:
        proxy = proxy_for(server, max_size=1)
        async with await proxy.client() as client:
            await client.send(batch)
            assert kinds(await client.until_ready()) == "12DCZ"


def dying_at(word: bytes, armed: asyncio.Event, last: bytes = b"") -> Script:
    """Serves; once armed, it ends at the first query with this word in it."""

    async def script(session: ServerEnd) -> None:
        while True:
            kind, text = await session.receive()
            if kind == "X":
                return
            if kind == "Q" and word in text and armed.is_set():
                session.send(last)
                return
            session.answer(text[:-1].decode())

    return script


@pytest.mark.parametrize(
    ("text", "last"),
    [
        pytest.param("SELECT hello", fatal("57P01"), id="in one write with the settings"),
        pytest.param("VALUES (1)", fatal("57P05"), id="behind them"),
        pytest.param("VALUES (1)", b"", id="behind them, without a word"),
    ],
)
@wire
async def test_F6_a_server_that_ends_while_it_is_given_the_settings_costs_no_error(proxy_for, text, last):
    armed = asyncio.Event()
    async with ScriptedServer(dying_at(b"SET", armed, last), serve) as server:
        proxy = proxy_for(server, max_size=1)
        async with await proxy.client(params={"work_mem": "5MB"}) as client, await proxy.client() as other:
            assert value(await other.query("SELECT hello")) == "0: SELECT hello"
            armed.set()
            assert value(await client.query(text)) == f"1: {text}"
            assert value(await client.query(text)) == f"1: {text}"


@pytest.mark.parametrize("text", ["SELECT hello", "VALUES (1)"])
@wire
async def test_F6_if_every_server_does_the_client_is_told_in_the_end(proxy_for, text):
    armed = asyncio.Event()
    async with ScriptedServer(dying_at(b"SET", armed, fatal("57P05"))) as server:
        proxy = proxy_for(server, max_size=1)
        async with await proxy.client(params={"work_mem": "5MB"}) as client, await proxy.client() as other:
            assert value(await other.query("SELECT hello")) == "0: SELECT hello"
            armed.set()
            await client.send(messages.query(text))
            ended = await client.closed()
            assert kinds(ended) == "E"
            assert error(ended)["C"] == "08006"
            assert 2 < len(server.sessions) < 10


@wire
async def test_F6_a_server_that_ends_while_it_is_asked_what_was_set_is_told_of_once(proxy_for):
    """What the session has become is lost with it."""
    armed = asyncio.Event()
    async with ScriptedServer(dying_at(b"pg_settings", armed, fatal("57P01"))) as server:
        proxy = proxy_for(server, max_size=1)
        async with await proxy.client() as client:
            armed.set()
            assert kinds(await client.query("SET work_mem = '5MB'"))[-1] == "Z"
            ended = await client.closed()
            assert kinds(ended) == "E"
            assert error(ended)["C"] == "08006"
            assert "its state is lost" in error(ended)["M"]


@wire
async def test_F6_a_client_that_keeps_an_idle_server_hears_that_it_has_ended(proxy_for, pg18, admin):
    proxy = proxy_for(pg18)
    async with await proxy.client() as client:
        await client.query("SELECT pg_advisory_lock(1)")
        admin.rows("SELECT pg_terminate_backend(%s)", (int(value(await client.query(PID)) or 0),))
        ended = await client.closed()
        assert kinds(ended) == "E"
        assert error(ended)["C"] == "08006"


@pytest.mark.parametrize("how", ["set", "startup"])
@wire
async def test_F5_the_idle_session_timeout_of_a_client_ends_no_connection_of_the_pool(proxy_for, pg18, admin, how):
    proxy = proxy_for(pg18, max_size=1)
    params = {"idle_session_timeout": "100"} if how == "startup" else {}
    async with await proxy.client(params=params) as client:
        if how == "set":
            await client.query("SET idle_session_timeout = 100")
        pid = value(await client.query(PID))
        for _ in range(3):
            admin.rows("SELECT pg_sleep(0.3)")
            assert value(await client.query("SHOW idle_session_timeout")) == "100ms"
            assert value(await client.query(PID)) == pid


@pytest.mark.parametrize("end", ["close", "reset"])
@wire
async def test_F6_what_a_silently_dying_server_may_have_executed_is_never_asked_twice(proxy_for, end):
    async def dying(session: ServerEnd) -> None:
        await session.expect("Q")
        getattr(session, end)()

    async with ScriptedServer(dying, serve) as server:
        proxy = proxy_for(server, max_size=1)
        async with await proxy.client() as client:
            await client.send(messages.query("UPDATE once SET x = 1"))
            ended = await client.closed()
            assert kinds(ended) == "E"
            assert error(ended)["C"] == "08006"
        asked = [message for session in server.sessions for message in session.heard if message.kind == "Q"]
        assert len(asked) == 1


@pytest.mark.parametrize("batch", ["long", "pipeline", "pieces"])
@wire
async def test_F6_what_cannot_be_asked_again_as_it_was_is_told_of_once(proxy_for, batch):
    """Or it is asked again and answered in full: a client hears one of the two, and never a mixture."""

    async def dying(session: ServerEnd) -> None:
        await session.expect("Q")
        session.send(fatal("57P01"))
        await session.flushed()
        session.close()

    text = "SELECT '" + "x" * 300_000 + "'"
    async with ScriptedServer(dying, serve) as server:
        proxy = proxy_for(server, max_size=1)
        async with await proxy.client() as client:
            if batch == "long":
                await client.send(messages.query(text))
            elif batch == "pieces":
                await client.send_in_pieces(messages.query("SELECT hello"), 4)
            else:
                await client.send(messages.query("SELECT hello") * 3)
            client.feed(messages.TERMINATE)
            heard = kinds(await client.closed())
            assert heard in ("E", "", "TDCZ" * (3 if batch == "pipeline" else 1))


@wire
async def test_F6_nothing_is_asked_again_inside_a_transaction(proxy_for):
    async def dying(session: ServerEnd) -> None:
        await session.serve_one()
        await session.expect("Q")
        session.send(fatal("57P01"))

    async with ScriptedServer(dying, serve) as server:
        proxy = proxy_for(server, max_size=1)
        async with await proxy.client() as client:
            await client.query("BEGIN")
            await client.send(messages.query("UPDATE half SET x = 1"))
            ended = await client.closed()
            assert kinds(ended) == "E"
            assert error(ended)["C"] == "57P01"
        assert [message.kind for session in server.sessions[1:] for message in session.heard] in ([], ["X"])


@pytest.mark.parametrize("sqlstate", ["57P02", "XX000", "25P04"])
@wire
async def test_F6_other_last_words_do_not_say_that_nothing_was_executed(proxy_for, sqlstate):
    async def dying(session: ServerEnd) -> None:
        await session.expect("Q")
        session.send(fatal(sqlstate))

    async with ScriptedServer(dying, serve) as server:
        proxy = proxy_for(server, max_size=1)
        async with await proxy.client() as client:
            await client.send(messages.query("UPDATE once SET x = 1"))
            ended = await client.closed()
            assert kinds(ended) == "E"
            assert error(ended)["C"] == sqlstate


def whole(data: bytes) -> tuple[list[Message], bytes]:
    """The whole messages in `data`, and what remains."""
    found = []
    while len(data) >= 5 and len(data) > (length := int.from_bytes(data[1:5], "big")):
        found.append(Message(chr(data[0]), data[5 : length + 1]))
        data = data[length + 1 :]
    return found, data


PARTS = {
    "nothing": b"",
    "description": COLUMN,
    "rows": COLUMN + messages.data_row([b"one"]),
    "half a row": COLUMN + messages.data_row([b"one" * 40])[:60],
    "half a header": COLUMN + b"D\0",
    "half an error": messages.error("ERROR", "XX000", "half of this")[:20],
    "complete": COLUMN + messages.command_complete("SELECT 0"),
}


@pytest.mark.parametrize("end", ["close", "reset"])
@pytest.mark.parametrize("part", PARTS.values(), ids=PARTS)
@wire
async def test_F7_a_server_that_dies_in_mid_answer_is_told_of_once(proxy_for, part, end):
    """And never by bytes that a client would take for the rest of what it was reading."""

    async def dying(session: ServerEnd) -> None:
        await session.expect("Q")
        session.send(part)
        await session.flushed()
        getattr(session, end)()

    async with ScriptedServer(dying, serve) as server:
        proxy = proxy_for(server, max_size=1)
        async with await proxy.client() as client:
            await client.send(messages.query("SELECT hello"), messages.query("SELECT behind"))
            ended, cut = whole(await client.rest())
            assert [fields["C"] for fields in errors(ended)] == ([] if cut else ["08006"])
            assert set(rows(ended)) <= {("one",)}, "a row that no server sent"
        async with await proxy.client() as client:
            assert value(await client.query("SELECT hello")) == "1: SELECT hello"


@wire
async def test_F7_a_backend_that_is_terminated_tells_its_client_itself(proxy_for, pg18, admin):
    proxy = proxy_for(pg18, max_size=1)
    async with await proxy.client() as client:
        await client.query("BEGIN")
        pid = int(value(await client.query(PID)) or 0)
        await client.send(messages.query("SELECT pg_sleep(60)"))
        admin.rows("SELECT pg_terminate_backend(%s)", (pid,))
        ended = await client.closed()
        assert error(ended)["C"] == "57P01"
    async with await proxy.client() as client:
        assert value(await client.query(PID)) != str(pid)


@wire
async def test_F7_a_backend_that_ends_inside_an_idle_transaction_is_told_of_once(proxy_for, pg18, admin):
    proxy = proxy_for(pg18, max_size=1)
    async with await proxy.client() as client:
        await client.query("BEGIN")
        pid = int(value(await client.query(PID)) or 0)
        admin.rows("SELECT pg_terminate_backend(%s)", (pid,))
        ended = await client.closed()
        assert kinds(ended) == "E"
        assert error(ended)["C"] == "57P01"
