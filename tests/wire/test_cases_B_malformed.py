"""Group B, what is not the protocol, from either side: that pair ends, clearly, and nobody else is touched."""

import asyncio
import struct

import pytest
from proxy_kit import RunningProxy, wire
from scripts_BD import (
    COPY_DONE,
    SYNC,
    TEXT,
    again,
    bind,
    close,
    data,
    parse,
    query,
    run,
    undisturbed,
)

from cenote.testing.scripted_server import ScriptedServer, ServerEnd
from cenote.testing.wire import errors, kinds, rows, value
from cenote.wire import messages

PID = "SELECT pg_backend_pid()"
MEGABYTE = 1_000_000


@pytest.fixture
def single(proxy_for, pg18) -> RunningProxy:
    """One server connection for all."""
    return proxy_for(pg18, max_size=1)


# -- B30 -----------------------------------------------------------------------------------------------------


def raw(kind: str, body: bytes = b"", length: int | None = None) -> bytes:
    """A message that may lie about its length."""
    return kind.encode() + struct.pack("!i", len(body) + 4 if length is None else length) + body


NOT_THE_PROTOCOL = {
    "unknown type": raw("z"),
    "type 109": raw("m", b"\0\0\0\0"),
    "a startup packet": messages.startup([("user", "app")]),
    "an SSLRequest": messages.request(messages.SSL_REQUEST),
    "a password": raw("p", b"secret\0"),
    "zero bytes": bytes(64),
    "HTTP": b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "bytes of all kinds": bytes(range(255, 155, -1)),
    **{
        f"{kind} of length {length}": raw(kind, length=length)
        for kind in "QPBS"
        for length in (0, 3, -1, -(2**31))
    },
    **{f"{kind} of a gigabyte": raw(kind, length=2**30) for kind in "DECHS"},
}
MALFORMED = {
    **{f"{kind} without a body": raw(kind) for kind in "QPBDCEF"},
    **{f"{kind} without an end": raw(kind, b"S" + b"x" * 20) for kind in "QPBDCEF"},
    "Parse without types": raw("P", b"s\0SELECT 1\0"),
    "Parse that counts types it has not": raw("P", b"s\0SELECT 1\0\x7f\xff"),
    "Bind without a statement": raw("B", b"p\0"),
    "Bind that counts values it has not": raw("B", b"\0s\0\0\0\x7f\xff\0\0"),
    "Bind with a value that is too long": raw("B", b"\0s\0\0\0\0\1" + struct.pack("!i", 1000) + b"x"),
    "Execute without a limit": raw("E", b"\0"),
    "Execute with more": raw("E", bytes(9)),
    "Describe of something else": raw("D", b"Xs\0"),
    "Close of something else": raw("C", b"Xs\0"),
    "Close with more": raw("C", b"Ss\0more"),
    "Describe with more": raw("D", b"Ss\0more"),
    "Sync with more": raw("S", b"more"),
    "Flush with more": raw("H", b"more"),
    "Query with more": raw("Q", b"SELECT 1\0SELECT 2\0"),
    "FunctionCall that ends early": raw("F", struct.pack("!ihh", 715, 0, 5)),
}
STATES = {
    "idle": b"",
    "in a batch": run("SELECT 1"),
    "in a transaction": query("BEGIN"),
    "in a failed batch": bind("nothing"),
    "behind a Sync": run("SELECT 1") + SYNC,
}


@pytest.mark.parametrize("what", NOT_THE_PROTOCOL)
@pytest.mark.parametrize("state", STATES)
@wire
async def test_B30_what_is_not_the_protocol_ends_its_client_and_nobody_else(proxy_for, pg18, state, what):
    proxy = proxy_for(pg18, max_size=2)
    async with await proxy.client() as other, await proxy.client() as client:
        await other.query("BEGIN")
        await client.send(STATES[state], NOT_THE_PROTOCOL[what])
        told = errors(await client.closed())[-1]
        assert (told["V"], told["C"]) == ("FATAL", "08P01")
        assert value(await other.query("SELECT 'other'")) == "other"
        assert kinds(await other.query("COMMIT")) == "CZ"
        await undisturbed(proxy)


@pytest.mark.parametrize("what", MALFORMED)
@wire
async def test_B30_a_malformed_message_is_an_error_of_its_client_alone(proxy_for, pg18, what):
    """PostgreSQL refuses some of them and goes on; the pooler may end the client, but in no other words."""
    proxy = proxy_for(pg18, max_size=2)
    async with await proxy.client() as other:
        await other.query("BEGIN")
        for state in STATES.values():
            async with await proxy.client() as client:
                await client.send(parse("s", "SELECT $1::int"), SYNC)
                await client.until_ready()
                await client.send(state, MALFORMED[what], SYNC, b"X\0\0\0\x04")
                told = errors(await client.closed())
                assert {fields["C"] for fields in told} <= {
                    "08P01",
                    "26000",
                    "25P02",
                    "42601",
                    "34000",
                    "42883",
                }, told
        proxy.no_problems()
        assert value(await other.query("SELECT 'other'")) == "other"
        assert kinds(await other.query("COMMIT")) == "CZ"
    await undisturbed(proxy)


@pytest.mark.parametrize("what", MALFORMED)
@wire
async def test_B30_a_malformed_message_may_be_the_last_thing_a_client_says(single, caplog, what):
    """Nothing follows it, not even a byte to be mistaken for a part of it."""
    for state in STATES.values():
        async with await single.client() as client:
            await client.send(state)
            await client.send(MALFORMED[what])
            await client.close()
    await undisturbed(single)
    single.no_problems()
    assert not [record for record in caplog.records if record.exc_info], "a traceback is no answer"


@pytest.mark.parametrize(
    "behind",
    [
        MALFORMED["Flush with more"],
        *(MALFORMED[what] + SYNC for what in ("Flush with more", "Sync with more", "Describe with more")),
        MALFORMED["Query with more"],
    ],
)
@wire
async def test_B30_the_error_of_a_malformed_message_is_never_the_next_clients(single, behind):
    """It stands behind a Sync, whose answer gives the connection to who waits for it."""
    for number in range(10):
        async with (
            await single.client() as holder,
            await single.client() as client,
            await single.client() as other,
        ):
            await holder.query("BEGIN")
            await client.send(run("SELECT 1"), SYNC, behind)
            await single.reached(waiting=1)
            other.timeout = 10.0
            await other.send(query(f"SELECT {number}"))
            await single.reached(waiting=2)
            await holder.query("COMMIT")
            answer = await other.until_ready()
            assert kinds(answer) == "TDCZ", errors(answer)
            assert value(answer) == str(number)


@wire
async def test_B30_the_server_never_sees_part_of_a_message(single):
    """Its connection is kept: what was whole was sent, what was not was not."""
    async with await single.client() as client:
        pid = value(await client.query(PID))
    for part in (query("SELECT 1")[:-1], parse("s", "SELECT 1")[:7], b"Q\0", bind("s", "1")[:6]):
        async with await single.client() as dying:
            await dying.send(run("SELECT 1"), SYNC, part)
            assert kinds(await dying.until_ready()) == "12TDCZ"
            await dying.abort()
        await undisturbed(single, pid)


@pytest.mark.parametrize("whole", [bind("s", "x" * 1000), bind("s", "x" * MEGABYTE), query("x" * 3 * MEGABYTE)])
@wire
async def test_B30_a_client_that_dies_inside_a_large_message_costs_at_most_the_connection(single, whole):
    """The server waits for the rest, which nobody has; it cannot hear a farewell, so it is not waited for."""
    async with await single.client() as dying:
        await dying.send(parse("s", "SELECT $1", TEXT), SYNC)
        await dying.until_ready()
        await dying.send(whole[:-100])
        await dying.close()
    async with asyncio.timeout(4.5):
        await undisturbed(single)


@wire
async def test_B30_in_the_middle_of_a_copy(single, admin):
    admin.rows("DROP TABLE IF EXISTS b30; CREATE TABLE b30 (id int); ALTER TABLE b30 OWNER TO app")
    try:
        for wrong in (raw("z"), raw("d", length=3), query("SELECT 1"), parse("", "SELECT 1")):
            async with await single.client() as client:
                await client.send(query("COPY b30 FROM STDIN"))
                await client.until("G")
                await client.send(data("1"), wrong, COPY_DONE)
                assert errors(await client.closed())[-1]["C"] == "08P01"
            await undisturbed(single)
        assert admin.rows("SELECT * FROM b30") == []
    finally:
        admin.rows("DROP TABLE b30")


# -- B31 -----------------------------------------------------------------------------------------------------

FROM_A_BROKEN_SERVER = {
    "an unknown type": messages.message(b"g", b"go away\0"),
    "a length below 4": b"D\0\0\0\3",
    "a negative length": b"C\xff\xff\xff\xff",
    "a huge length of what is never huge": b"Z\x7f\xff\xff\xff",
    "zero bytes": bytes(16),
    "BindComplete": messages.BIND_COMPLETE,
    "ParseComplete": messages.PARSE_COMPLETE,
    "CloseComplete": messages.CLOSE_COMPLETE,
    "two ReadyForQuery": messages.ready() + messages.ready(),
    "a log-in": messages.AUTHENTICATION_OK,
    "a message of the client's": messages.frame(b"p", 4),
}


@pytest.mark.parametrize("what", FROM_A_BROKEN_SERVER)
@wire
async def test_B31_a_server_that_does_not_keep_to_the_protocol_ends_with_its_client(proxy_for, what):
    async def broken(session: ServerEnd) -> None:
        await session.expect("Q")
        session.send(FROM_A_BROKEN_SERVER[what])
        await session.ended()

    async with ScriptedServer(ServerEnd.serve, broken, ServerEnd.serve) as server:
        proxy = proxy_for(server, max_size=2)
        async with await proxy.client() as other, await proxy.client() as client:
            await other.query("BEGIN")
            await client.send(query("SELECT 1"))
            answer = await client.closed()
            assert kinds(answer) in ("E", "ZE", "Z"), answer
            assert all((fields["V"], fields["C"]) == ("FATAL", "08P01") for fields in errors(answer))
            assert value(await other.query("SELECT 'other'")) == "0: SELECT 'other'"
            async with await proxy.client() as third:
                assert value(await third.query("SELECT 3")) == "2: SELECT 3"
                await third.terminate()
            await other.query("ROLLBACK")
            await other.terminate()
        await proxy.finish()


@wire
async def test_B31_what_comes_unasked_and_means_no_harm_is_relayed(proxy_for):
    aside = messages.notice("WARNING", "01000", "by the way")
    told = messages.message(b"A", struct.pack("!i", 7) + b"channel\0payload\0")
    status = messages.parameter_status("TimeZone", "Europe/Berlin")

    async def talkative(session: ServerEnd) -> None:
        session.send(aside, told)
        await session.expect("Q")
        session.send(aside, messages.row_description([("answer", 25)]), told, session.row("1"), status, aside)
        session.send(messages.command_complete("SELECT 1"), status, told, messages.ready())
        await session.serve()

    async with ScriptedServer(talkative) as server:
        proxy = proxy_for(server, max_size=1)
        async with await proxy.client() as client:
            assert kinds(await client.query("SELECT 1")) in ("NTADSNCSAZ", "NANTADSNCSAZ")
            assert value(await client.query("SELECT 2")) == "0: SELECT 2"
            await client.terminate()
        await proxy.finish()


@wire
async def test_B31_messages_may_come_in_any_pieces(proxy_for):
    """A byte at a time: heads and bodies are cut anywhere."""

    async def dribble(session: ServerEnd) -> None:
        while (await session.receive()).kind != "X":
            whole = messages.row_description([("a", 25)]) + session.row("x") * 3
            whole += messages.command_complete("SELECT 3") + messages.ready()
            for at in range(len(whole)):
                session.send(whole[at : at + 1])
                await session.flushed()
                await asyncio.sleep(0)

    async with ScriptedServer(dribble) as server:
        proxy = proxy_for(server, max_size=1)
        async with await proxy.client() as client:
            for _ in range(3):
                answer = await client.query("SELECT 1")
                assert kinds(answer) == "TDDDCZ"
                assert rows(answer) == [("0: x",)] * 3
            await client.terminate()
        await proxy.finish()


@wire
async def test_B31_a_server_that_answers_close_of_a_statement_late_confuses_nobody(proxy_for, pg18):
    """Whatever the pooler asks for itself is swallowed wherever its answer comes."""
    proxy = proxy_for(pg18, max_size=1, max_prepared=1)
    async with await proxy.client() as client, await proxy.client() as other:
        for number in range(10):
            for each, mark in ((client, "client"), (other, "other")):
                await each.send(
                    parse("s", f"SELECT '{mark} {number}'"), again("s"), close("s"), SYNC, query("SELECT 1")
                )
                answer = await each.trace(2)
                assert kinds(answer) == "12TDC3Z" + "TDCZ"
                assert rows(answer)[0] == (f"{mark} {number}",)
