"""Group D, COPY in both directions: whatever happens to it, it stays between the client and its own server."""

import asyncio

import pytest
from proxy_kit import RunningProxy, wire
from scripts_BD import (
    COPY_DONE,
    FLUSH,
    SYNC,
    bind,
    close_portal,
    copy_fail,
    data,
    describe,
    describe_portal,
    execute,
    parse,
    query,
    run,
    undisturbed,
)

from cenote.testing.scripted_server import ScriptedServer, ServerEnd
from cenote.testing.wire import Message, error, errors, kinds, ready, rows, value
from cenote.testing.wire import until as answered
from cenote.wire import messages

pytest_plugins = ["fixtures_BD"]

TABLE = "CREATE TABLE d_copy (id int PRIMARY KEY, name text)"
DROP = "DROP TABLE d_copy"
IN, OUT = "COPY d_copy FROM STDIN", "COPY (SELECT * FROM d_copy ORDER BY id) TO STDOUT"
COUNT = "SELECT count(*) FROM d_copy"
PID = "SELECT pg_backend_pid()"


@pytest.fixture
def single(proxy_for, pg18) -> RunningProxy:
    """One server connection for all."""
    return proxy_for(pg18, max_size=1)


@pytest.fixture
def table(admin):
    """`d_copy`, empty."""
    admin.rows(f"DROP TABLE IF EXISTS d_copy; {TABLE}; ALTER TABLE d_copy OWNER TO app")
    yield "d_copy"
    admin.rows("DROP TABLE IF EXISTS d_copy")


def lines(*numbers: int) -> bytes:
    """Rows of the table, as CopyData."""
    return data(*(f"{number}\trow {number}" for number in numbers))


def copied(trace: list[Message]) -> bytes:
    """What came out."""
    return b"".join(message.body for message in trace if message.kind == "d")


# -- D1 ------------------------------------------------------------------------------------------------------


@wire
async def test_D1_copy_in_and_out_by_simple_query(everywhere):
    said = await everywhere(
        query(IN),
        answered("G"),
        lines(1, 2) + data("3\tin", "4\ttwo") + lines(5) + COPY_DONE,
        ready(),
        query(IN) + lines(6, 7) + COPY_DONE,
        ready(),
        query("COPY d_copy FROM STDIN (FORMAT csv)") + data('8,"a\nb"') + COPY_DONE + query(COUNT),
        ready(2),
        query(IN) + COPY_DONE + query(IN) + lines(9) + copy_fail("no more") + query(COUNT),
        ready(3),
        query(OUT),
        ready(),
        query("COPY d_copy TO STDOUT (FORMAT binary)"),
        ready(),
        query("COPY (SELECT 1 WHERE false) TO STDOUT") + query(COUNT),
        ready(2),
        setup=TABLE,
        teardown=DROP,
    )
    assert ("8",) in rows(said)
    assert copied(said).startswith(b"1\trow 1\n2\trow 2\n3\tin\n4\ttwo\n")
    assert error(said)["M"] == "COPY from stdin failed: no more"


@wire
async def test_D1_data_may_come_in_any_pieces(everywhere):
    """A CopyData is not a line: lines begin and end anywhere in it."""
    text = b"".join(b"%d\tsome text of row %d\n" % (number, number) for number in range(500))
    split = b"".join(messages.message(b"d", text[at : at + 7]) for at in range(0, len(text), 7))
    said = await everywhere(
        query(IN) + split + messages.message(b"d") + COPY_DONE,
        ready(),
        query(IN) + messages.message(b"d", text.replace(b"\t", b"1\t")) + COPY_DONE,
        ready(),
        query(COUNT),
        ready(),
        setup=TABLE.replace(" PRIMARY KEY", ""),
        teardown=DROP,
        pieces=(0, 1000),
    )
    assert rows(said) == [("1000",)]


@wire
async def test_D1_while_a_copy_lasts_the_connection_is_nobody_elses(single, table):
    async with await single.client() as client, await single.client() as other:
        await client.send(query(IN))
        await client.until("G")
        waits = asyncio.create_task(other.query(COUNT))
        await single.reached(waiting=1, leased=1)
        await client.send(lines(1))
        await client.send(lines(2), COPY_DONE)
        assert kinds(await client.until_ready()) == "CZ"
        assert value(await waits) == "2"


@wire
async def test_D1_copy_inside_a_transaction_block(everywhere):
    said = await everywhere.batches(
        query("BEGIN"),
        query(IN) + lines(1) + COPY_DONE,
        query(OUT),
        query("SAVEPOINT s"),
        query(IN) + lines(1) + COPY_DONE,
        query(IN),
        query("ROLLBACK TO s"),
        query(IN) + lines(2) + copy_fail("no"),
        query("ROLLBACK TO s"),
        run(IN) + lines(3) + COPY_DONE + SYNC,
        query(COUNT),
        query("COMMIT"),
        query(COUNT),
        setup=TABLE,
        teardown=DROP,
    )
    assert [row[0] for row in rows(said)] == ["2", "2"]
    status = "".join(message.body.decode() for message in said if message.kind == "Z")
    assert status == "TTTTEETETTTII"


# -- D2 ------------------------------------------------------------------------------------------------------

BEGUN = parse("", IN) + bind() + execute()


@wire
async def test_D2_copy_by_extended_query(everywhere):
    said = await everywhere(
        parse("", IN) + describe() + bind() + describe_portal() + execute() + FLUSH,
        answered("G"),
        lines(1, 2) + COPY_DONE + SYNC,
        ready(),
        BEGUN + lines(3) + COPY_DONE + SYNC,
        ready(),
        BEGUN + lines(4) + copy_fail("no") + SYNC,
        ready(),
        run("SELECT 'before'") + BEGUN + lines(5) + COPY_DONE + run("SELECT 'after'") + SYNC,
        ready(),
        parse("s", IN) + bind("s", portal="p") + execute("p") + lines(6) + COPY_DONE + close_portal("p") + SYNC,
        ready(),
        bind("s") + execute() + lines(7) + COPY_DONE + SYNC + query(COUNT),
        ready(2),
        run(OUT) + SYNC,
        ready(),
        run(OUT) + run("SELECT 'behind'") + SYNC,
        ready(),
        setup=TABLE,
        teardown=DROP,
    )
    assert kinds(said).startswith("1tn2nGCZ" + "12GCZ" + "12GEZ")
    assert [row[0] for row in rows(said)] == ["before", "after", "6", "behind"]


@wire
async def test_D2_a_sync_before_the_copy_begins_is_eaten_by_it(everywhere):
    """As many drivers send it. The server ignores it in COPY mode, so it brings no ReadyForQuery."""
    said = await everywhere(
        BEGUN + SYNC,
        answered("G"),
        lines(1) + COPY_DONE + SYNC,
        ready(),
        BEGUN + SYNC + lines(2) + COPY_DONE + SYNC,
        ready(),
        BEGUN + SYNC + SYNC + FLUSH,
        answered("G"),
        SYNC + lines(3) + SYNC + FLUSH + lines(4) + SYNC + COPY_DONE + SYNC,
        ready(),
        BEGUN + SYNC + lines(5) + copy_fail("no") + SYNC,
        ready(),
        BEGUN + FLUSH + SYNC + lines(6) + COPY_DONE + SYNC + query(COUNT) + run("SELECT 'behind'") + SYNC,
        ready(3),
        setup=TABLE,
        teardown=DROP,
    )
    assert [row[0] for row in rows(said)] == ["5", "behind"]
    assert kinds(said).endswith("12GCZ" + "TDCZ" + "12TDCZ")


@wire
async def test_D2_where_the_copy_does_not_begin_the_sync_counts(everywhere):
    said = await everywhere(
        parse("", "COPY d_nothing FROM STDIN") + bind() + execute() + SYNC + lines(1) + COPY_DONE + SYNC,
        ready(2),
        bind("nothing") + execute() + SYNC + lines(1) + COPY_DONE + SYNC,
        ready(2),
        query("BEGIN; SELECT 1/0"),
        ready(),
        BEGUN + SYNC + lines(1) + COPY_DONE + SYNC + query("ROLLBACK"),
        ready(3),
        parse("s", OUT) + bind("s") + execute() + SYNC + SYNC,
        ready(2),
        query(COUNT),
        ready(),
        setup=TABLE,
        teardown=DROP,
    )
    assert rows(said) == [("0",)]


@wire
async def test_D2_syncs_are_counted_so_for_a_simple_query_too(everywhere):
    said = await everywhere(
        query(IN) + SYNC + FLUSH + lines(1) + SYNC + COPY_DONE,
        ready(),
        query(IN),
        answered("G"),
        SYNC + lines(2) + FLUSH + SYNC + COPY_DONE + SYNC,
        ready(2),
        query(COUNT) + run("SELECT 'behind'") + SYNC,
        ready(2),
        setup=TABLE,
        teardown=DROP,
    )
    assert [row[0] for row in rows(said)] == ["2", "behind"]


@wire
async def test_D2_syncs_are_counted_so_for_a_pinned_client_too(everywhere):
    said = await everywhere(
        query("CREATE TEMP TABLE d_mine (id int, name text)"),
        ready(),
        parse("", "COPY d_mine FROM STDIN") + bind() + execute() + SYNC,
        answered("G"),
        lines(1) + COPY_DONE + SYNC,
        ready(),
        parse("", "COPY d_mine FROM STDIN") + bind() + execute() + SYNC + lines(2) + COPY_DONE + SYNC,
        ready(),
        query("COPY d_mine FROM STDIN") + SYNC + lines(3) + COPY_DONE,
        ready(),
        query("SELECT count(*) FROM d_mine"),
        ready(),
        run("SELECT 'behind'") + SYNC,
        ready(),
    )
    assert [row[0] for row in rows(said)] == ["3", "behind"]


@wire
async def test_D2_after_an_eaten_sync_the_connection_is_given_back(single, table):
    async with await single.client() as client:
        for batch in (BEGUN + SYNC + lines(1) + COPY_DONE + SYNC, query(IN) + SYNC + lines(2) + COPY_DONE):
            await client.send(batch)
            assert kinds(await client.until_ready())[-2:] == "CZ"
            await single.reached(leased=0)
            await undisturbed(single)


@wire
async def test_D2_copies_that_were_sent_whole_before_the_first_was_answered(proxy_for):
    """The first is refused; the client has ended the second one as well, so its Sync behind that counts."""

    async def refuses_the_first(session: ServerEnd) -> None:
        await session.expect("Q")
        session.send(messages.error("ERROR", "42P01", "no such table"), messages.ready())
        await until_kind(session, "Q")
        session.send(messages.message(b"G", b"\0\0\0"))
        await synced.wait()
        await until_kind(session, "c")
        session.send(messages.command_complete("COPY 1"), messages.ready())
        await session.serve()

    async def until_kind(session: ServerEnd, kind: str) -> None:
        while (await session.receive()).kind != kind:
            pass

    synced = asyncio.Event()
    async with ScriptedServer(refuses_the_first) as server:
        proxy = proxy_for(server, max_size=1)
        async with await proxy.client(timeout=10.0) as client:
            await client.send((query(IN) + lines(1) + COPY_DONE) * 2)
            assert kinds(await client.until("G")) == "EZG"
            await client.send(SYNC, query("SELECT 1"))
            await proxy.reached(leased=1)
            synced.set()
            assert kinds(await client.trace(3)) == "CZ" + "Z" + "TDCZ"
            await client.terminate()
        await proxy.finish()


# -- D3, D4 --------------------------------------------------------------------------------------------------


@wire
async def test_D3_after_an_error_in_mid_copy_late_data_is_ignored(everywhere):
    wrong = data("not a number\tat all")
    said = await everywhere(
        query(IN),
        answered("G"),
        lines(1) + wrong,
        answered("E"),
        lines(2, 3, 4) + COPY_DONE + lines(5) + copy_fail("late"),
        ready(),
        lines(6) + COPY_DONE + copy_fail("later") + query(COUNT),
        ready(),
        query(IN) + lines(7) + wrong + lines(8) + COPY_DONE + query(COUNT),
        ready(2),
        BEGUN + SYNC + wrong + lines(9) + COPY_DONE + run("SELECT 'discarded'") + SYNC + query(COUNT),
        ready(2),
        BEGUN + FLUSH,
        answered("G"),
        wrong,
        answered("E"),
        lines(10) + COPY_DONE + SYNC,
        ready(),
        query(COUNT),
        ready(),
        setup=TABLE,
        teardown=DROP,
    )
    assert [row[0] for row in rows(said)] == ["0"] * 4
    assert {fields["C"] for fields in errors(said)} == {"22P02"}


@pytest.mark.parametrize("late", [lines(2, 3), COPY_DONE, copy_fail("late"), lines(2) + COPY_DONE])
@wire
async def test_D3_late_data_never_reaches_the_transaction_of_the_next_client(single, table, late):
    """The next client is in the middle of a COPY of its own on the same connection."""
    async with await single.client() as client, await single.client() as other:
        await client.send(query(IN))
        await client.until("G")
        await client.send(data("not a number"))
        assert error(await client.until_ready())["C"] == "22P02"
        await other.query("BEGIN")
        await other.send(query(IN))
        await other.until("G")
        await client.send(late, SYNC)
        assert kinds(await client.until_ready()) == "Z"
        await other.send(lines(1), COPY_DONE, query("COMMIT"))
        assert kinds(await other.trace(2)) == "CZCZ"
        assert value(await client.query(COUNT)) == "1"


@wire
async def test_D4_an_error_in_copy_leaves_transaction_pin_and_connection_as_they_were(single, table):
    async with await single.client() as client:
        pid = value(await client.query(PID))
        await client.query("CREATE TEMP TABLE d_mine (id int)")
        for _ in range(2):
            await client.send(query("COPY d_mine FROM STDIN"))
            await client.until("G")
            await client.send(data("1", "wrong"), COPY_DONE)
            assert error(await client.until_ready())["C"] == "22P02"
            assert value(await client.query("SELECT count(*) FROM d_mine")) == "0"
        await client.query("BEGIN")
        await client.send(query(IN), lines(1, 1), COPY_DONE)
        answer = await client.until_ready()
        assert error(answer)["C"] == "23505"
        assert answer[-1].body == b"E"
        assert single.counts()["leased"] == 1
        await client.query("ROLLBACK")
        assert value(await client.query(PID)) == pid


# -- D8 ------------------------------------------------------------------------------------------------------


@wire
async def test_D8_several_copies_in_one_simple_query(everywhere):
    said = await everywhere(
        query(f"{IN}; SELECT 'between'; {IN}; {OUT}; {IN}")
        + lines(1)
        + COPY_DONE
        + lines(2)
        + COPY_DONE
        + COPY_DONE,
        ready(),
        query(f"{IN}; {IN}"),
        answered("G"),
        lines(3) + COPY_DONE,
        answered("G"),
        lines(4) + COPY_DONE,
        ready(),
        query(f"{IN}; {IN}; SELECT 'never'") + lines(5) + COPY_DONE + lines(5) + COPY_DONE + COPY_DONE,
        ready(),
        query(f"{IN}; SELECT 1/0; {IN}") + lines(6) + COPY_DONE + lines(7) + COPY_DONE,
        ready(),
        query(COUNT),
        ready(),
        setup=TABLE,
        teardown=DROP,
    )
    assert kinds(said).startswith("GCTDCGCHdd" + "cCGCZ" + "GCGCZ")
    assert [row[0] for row in rows(said)] == ["between", "4"]


@wire
async def test_D1_a_copy_behind_another_answer_in_one_read_begins(single, table):
    """CopyInResponse may come in one piece with the ReadyForQuery before it."""
    async with await single.client() as client:
        for number in range(100):
            await client.send(query("SELECT 1") + query(IN))
            await client.until("G")
            await client.send(lines(number) + COPY_DONE)
            assert "E" not in kinds(await client.until_ready())
        assert value(await client.query(COUNT)) == "100"
