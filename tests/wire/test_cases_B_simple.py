"""Group B, simple queries: when a server connection is taken and given back, and what is relayed as it is."""

import asyncio

import pytest
from proxy_kit import RunningProxy, running, wire
from scripts_BD import (
    FLUSH,
    SYNC,
    again,
    bind,
    call,
    close,
    close_portal,
    copy_fail,
    data,
    execute,
    parse,
    query,
    run,
)

from cenote.testing.wire import END, RawClient, error, errors, kinds, ready, rows, value

pytest_plugins = ["fixtures_BD"]

GATE = "SELECT pg_advisory_xact_lock(20061)"
PID = "SELECT pg_backend_pid()"


@pytest.fixture
def gate(admin):
    """`GATE` waits until the test opens it."""
    admin.rows("SELECT pg_advisory_lock(20061)")
    return lambda: admin.rows("SELECT pg_advisory_unlock(20061)")


@pytest.fixture
def single(proxy_for, pg18) -> RunningProxy:
    """One server connection for all."""
    return proxy_for(pg18, max_size=1)


async def stands_in_line(proxy: RunningProxy, client: RawClient, text: str = "SELECT 'waited'") -> asyncio.Task:
    """A client that asks and has to wait."""
    task = asyncio.create_task(client.query(text))
    await proxy.reached(waiting=1)
    return task


# -- B1 ------------------------------------------------------------------------------------------------------


@wire
async def test_B1_a_connection_is_taken_with_the_first_message_that_needs_one(single):
    async with await single.client() as client, await single.client() as other:
        await single.reached(leased=0)
        await client.query("BEGIN")
        assert single.counts()["leased"] == 1
        await client.query("COMMIT")
        await single.reached(leased=0)
        await other.send(run("SELECT 1"), FLUSH)
        assert kinds(await other.until("C")) == "12TDC"
        assert single.counts()["leased"] == 1
        await other.send(SYNC)
        assert kinds(await other.until_ready()) == "Z"
        await single.reached(leased=0)


@wire
async def test_B1_what_needs_no_connection_is_answered_while_there_is_none(single):
    async with await single.client() as holder, await single.client() as client:
        await holder.query("BEGIN")
        await client.send(SYNC, close("nothing"), close_portal("nothing"), FLUSH, close(), SYNC, FLUSH, SYNC)
        assert kinds(await client.trace(3)) == "Z333ZZ"
        await client.send(data("late"), copy_fail("late"), SYNC)
        assert kinds(await client.until_ready()) == "Z"
        assert single.counts()["waiting"] == 0
        await holder.query("ROLLBACK")


@wire
async def test_B1_a_statement_that_is_known_is_parsed_while_there_is_none(single):
    """One thread with two connections would wait for itself otherwise."""
    text = "SELECT 'known to B1'"
    async with await single.client() as holder, await single.client() as client:
        await holder.send(parse("mine", text), SYNC)
        await holder.until_ready()
        await holder.query("BEGIN")
        await client.send(parse("theirs", text), SYNC)
        assert kinds(await client.until_ready()) == "1Z"
        await client.send(again("theirs"), SYNC)
        await single.reached(waiting=1)
        await holder.query("COMMIT")
        answer = await client.until_ready()
        assert kinds(answer) == "2TDCZ"
        assert value(answer) == "known to B1"


@wire
async def test_B1_what_is_answered_without_a_server_is_answered_alike(everywhere):
    said = await everywhere.batches(
        SYNC,
        FLUSH + SYNC,
        close("nothing") + close_portal("nothing") + close() + close_portal() + SYNC,
        data("late") + messages_late() + SYNC,
    )
    assert kinds(said) == "ZZ3333ZZ"


def messages_late() -> bytes:
    """What a client may send after a COPY that has failed."""
    return copy_fail("late") + data("later still")


# -- B2 ------------------------------------------------------------------------------------------------------


@wire
async def test_B2_an_open_transaction_keeps_the_connection_failed_or_not(single):
    async with await single.client() as client, await single.client() as other:
        for text in ("SELECT 1", "SELECT 1/0"):
            await client.query("BEGIN")
            await client.query(text)
            answer = await stands_in_line(single, other)
            assert single.counts()["leased"] == 1
            await client.query("ROLLBACK")
            assert value(await answer) == "waited"


@wire
async def test_B2_nothing_is_given_back_while_an_answer_is_owed(single, admin, gate):
    """The first ReadyForQuery says idle, but a second query is on its way."""
    async with await single.client() as client, await single.client() as other:
        await client.send(query("SELECT 1"), query(GATE), run("SELECT 3"), SYNC)
        assert value(await client.until_ready()) == "1"
        await running(admin, GATE)
        answer = await stands_in_line(single, other)
        gate()
        assert kinds(await client.until_ready()) == "TDCZ"
        assert value(await client.until_ready()) == "3"
        assert value(await answer) == "waited"


@wire
async def test_B2_the_connection_goes_to_whoever_has_waited_longest(single):
    async with await single.client() as client:
        await client.query("BEGIN")
        others = [await single.client() for _ in range(5)]
        order: list[int] = []

        async def ask(number: int) -> None:
            assert value(await others[number].query(f"SELECT {number}")) == str(number)
            order.append(number)

        tasks = []
        for number in range(len(others)):
            tasks.append(asyncio.create_task(ask(number)))
            await single.reached(waiting=number + 1)
        await client.query("COMMIT")
        await asyncio.gather(*tasks)
        assert order == [0, 1, 2, 3, 4]
        for other in others:
            await other.terminate()


# -- B21, B22, B24 -------------------------------------------------------------------------------------------

DEFERRED = (
    "CREATE TABLE b_parent (id int PRIMARY KEY);"
    "CREATE TABLE b_child (id int REFERENCES b_parent DEFERRABLE INITIALLY DEFERRED)"
)
DROP_DEFERRED = "DROP TABLE b_child, b_parent"


@wire
async def test_B21_several_statements_are_one_transaction(everywhere):
    said = await everywhere.batches(
        query("SELECT 1; SELECT 2, 3; SELECT"),
        query("CREATE TABLE b_many (id int); INSERT INTO b_many VALUES (1); SELECT 1/0; SELECT 4"),
        query("SELECT to_regclass('b_many')"),
        query(";;SELECT 5;;"),
        query("SELECT 6; BEGIN; SELECT 7; ROLLBACK; SELECT 8"),
        query("BEGIN; SELECT 9; SELECT 1/0; COMMIT"),
        query("COMMIT; SELECT 10; BEGIN; COMMIT"),
    )
    assert [row[0] for row in rows(said) if row] == ["1", "2", None, "5", "6", "7", "8", "9", "10"]
    assert [fields["C"] for fields in errors(said)] == ["22012", "22012"]


@wire
async def test_B21_a_commit_that_fails_late_takes_the_place_of_the_last_tag(everywhere):
    said = await everywhere.batches(
        query("INSERT INTO b_child VALUES (1)"),
        query("SELECT 1; INSERT INTO b_child VALUES (2)"),
        query("BEGIN; INSERT INTO b_child VALUES (3)"),
        query("COMMIT"),
        run("INSERT INTO b_child VALUES (4)") + SYNC,
        run("INSERT INTO b_child VALUES (5)") + run("SELECT 2") + SYNC,
        query("SELECT count(*) FROM b_child"),
        setup=DEFERRED,
        teardown=DROP_DEFERRED,
    )
    assert [fields["C"] for fields in errors(said)] == ["23503"] * 5
    assert kinds(said) == "EZ" + "TDCEZ" + "CCZ" + "EZ" + "12nCEZ" + "12nC12TDCEZ" + "TDCZ"
    assert rows(said)[-1] == ("0",)


@wire
async def test_B22_the_servers_status_counts_and_not_the_text(everywhere):
    said = await everywhere.batches(
        query("BEGIN"),
        query("COMMIT AND CHAIN"),
        query("SELECT 1/0"),
        query("ROLLBACK AND CHAIN"),
        query("SAVEPOINT a"),
        query("SELECT 1/0"),
        query("SELECT 2"),
        query("ROLLBACK TO a"),
        query("BEGIN"),
        query("SELECT 1/0"),
        query("COMMIT"),
        query("COMMIT"),
        query("COMMIT AND CHAIN"),
        query("START TRANSACTION ISOLATION LEVEL SERIALIZABLE READ ONLY"),
        query("SHOW transaction_isolation"),
        query("END"),
    )
    status = "".join(message.body.decode() for message in said if message.kind == "Z")
    assert status == "TTETTEETTEIIITTI"


@wire
async def test_B22_a_chained_transaction_keeps_the_connection(single):
    async with await single.client() as client, await single.client() as other:
        await client.query("BEGIN")
        await client.query("COMMIT AND CHAIN")
        answer = await stands_in_line(single, other)
        await client.query("ROLLBACK AND CHAIN")
        assert single.counts()["waiting"] == 1
        await client.query("ROLLBACK")
        assert value(await answer) == "waited"


@wire
async def test_B24_empty_queries_and_commands_without_rows_are_relayed_as_they_are(everywhere):
    said = await everywhere.batches(
        query(""),
        query(" ; "),
        query("-- nothing"),
        query("SELECT"),
        query("SELECT NULL, ''"),
        query("CREATE TEMP TABLE b_empty ()"),
        query("TABLE b_empty"),
        query("DO $$ BEGIN RAISE NOTICE 'noticed'; RAISE WARNING 'warned'; END $$"),
        query("SET application_name = 'told'"),
    )
    assert kinds(said) == "IZ" * 3 + "TDCZ" * 2 + "CZ" + "TCZ" + "NNCZ" + "CSZ"


# -- B25 -----------------------------------------------------------------------------------------------------

LO_CREATE, LO_OPEN, LO_CLOSE, LO_READ, LO_WRITE, LO_SEEK, LO_UNLINK = 715, 952, 953, 954, 955, 956, 964


@wire
async def test_B25_large_objects_by_function_call(everywhere):
    oid, read_write = "2006199", str(0x20000 | 0x40000)
    said = await everywhere.batches(
        call(LO_CREATE, oid),
        query("BEGIN"),
        call(LO_OPEN, oid, read_write),
        call(LO_WRITE, "0", "a large object"),
        call(LO_SEEK, "0", "2", "0"),
        call(LO_READ, "0", "5"),
        call(LO_CLOSE, "0"),
        query("COMMIT"),
        call(LO_CREATE, oid),
        call(LO_UNLINK, oid),
        call(LO_UNLINK, oid),
        query("SELECT 1"),
    )
    assert kinds(said) == "VZ" + "CZ" + "VZ" * 5 + "CZ" + "EZ" + "VZ" + "EZ" + "TDCZ"


@wire
async def test_B25_a_function_call_is_a_request_with_its_own_ready_for_query(everywhere):
    plus = 177  # int4pl
    said = await everywhere(
        call(plus, "20", "22") + call(plus, "20", "x") + call(999_999) + query("SELECT 1") + call(plus, None, "1"),
        ready(5),
        run("SELECT 2") + call(plus, "1", "1") + run("SELECT 3") + SYNC,
        ready(2),
        parse("", "SELECT 1/") + call(plus, "1", "1") + SYNC,
        ready(),
        query("BEGIN; SELECT 1/0") + call(plus, "1", "1") + query("ROLLBACK"),
        ready(3),
    )
    assert b"\0\0\0\x0242" in [message.body for message in said if message.kind == "V"]
    assert {fields["C"] for fields in errors(said)} >= {"22P02", "42883", "42601", "25P02"}


@wire
async def test_B25_the_connection_is_kept_until_the_function_call_is_answered(single, admin):
    """The first ReadyForQuery says idle; the call behind it waits for a lock."""
    oid = "2006200"
    async with await single.client() as client, await single.client() as other:
        await client.send(call(LO_CREATE, oid))
        assert kinds(await client.until_ready()) == "VZ"
        with admin.conn.transaction():
            admin.rows("SELECT lo_unlink(%s)", (oid,))
            await client.send(query("SELECT 1"), call(LO_UNLINK, oid))
            assert value(await client.until_ready()) == "1"
            answer = await stands_in_line(single, other)
        assert error(await client.until_ready())["C"] == "42704"
        assert value(await answer) == "waited"


# -- B32 -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["BEGIN", "START TRANSACTION", "SELECT 1; BEGIN; SELECT 2", "BEGIN; SELECT 1/0"])
@wire
async def test_B32_in_statement_mode_a_transaction_ends_the_client_and_is_rolled_back(proxy_for, pg18, text):
    proxy = proxy_for(pg18, mode="statement", max_size=1)
    async with await proxy.client() as other, await proxy.client() as client:
        pid = value(await other.query(PID))
        await client.send(query(text))
        answer = await client.closed()
        assert kinds(answer)[-1] == "E"
        told = errors(answer)[-1]
        assert (told["V"], told["C"]) == ("FATAL", "08P01")
        assert "statement mode" in told["M"]
        assert value(await other.query(PID)) == pid, "the server connection goes on"
        assert value(await other.query("SELECT txid_current_if_assigned() IS NULL")) == "t"


@wire
async def test_B32_in_statement_mode_single_statements_and_implicit_transactions_run(proxy_for, pg18):
    proxy = proxy_for(pg18, mode="statement", max_size=1)
    async with await proxy.client() as client:
        assert rows(await client.query("SELECT 1; SELECT 2")) == [("1",), ("2",)]
        await client.send(parse("s", "SELECT $1::int"), bind("s", "3"), execute(), SYNC)
        assert value(await client.until_ready()) == "3"
        await client.send(bind("s", "4"), execute(), bind("s", "5"), execute(), SYNC)
        assert rows(await client.until_ready()) == [("4",), ("5",)]


@wire
async def test_B32_a_begin_in_a_batch_is_refused_as_well(proxy_for, pg18):
    proxy = proxy_for(pg18, mode="statement", max_size=1)
    async with await proxy.client() as client:
        await client.send(run("BEGIN"), SYNC)
        assert errors(await client.closed())[-1]["C"] == "08P01"


@wire
async def test_B32_terminate_is_the_end(everywhere):
    await everywhere(query("SELECT 1"), ready(), b"X\0\0\0\x04", END)
