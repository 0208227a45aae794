"""Group B, the extended protocol: Flush, errors anywhere in a batch, portals."""

import asyncio

import pytest
from proxy_kit import RunningProxy, wire
from scripts_BD import (
    FLUSH,
    INT4,
    SYNC,
    TEXT,
    again,
    bind,
    close,
    close_portal,
    describe,
    describe_portal,
    execute,
    parse,
    query,
    run,
)

from cenote.testing.wire import errors, kinds, ready, rows, value
from cenote.testing.wire import until as answered

pytest_plugins = ["fixtures_BD"]


@pytest.fixture
def single(proxy_for, pg18) -> RunningProxy:
    """One server connection for all."""
    return proxy_for(pg18, max_size=1)


# -- B4 ------------------------------------------------------------------------------------------------------


@wire
async def test_B4_flush_brings_what_there_is_without_a_sync(everywhere):
    said = await everywhere(
        parse("s", "SELECT generate_series(1, 3)") + FLUSH,
        answered("1"),
        describe("s") + FLUSH,
        answered("T"),
        bind("s") + FLUSH,
        answered("2"),
        execute(limit=2) + FLUSH,
        answered("s"),
        execute() + FLUSH,
        answered("C"),
        close("s") + FLUSH,
        answered("3"),
        SYNC,
        ready(),
    )
    assert kinds(said) == "1tT2DDsDC3Z"


@wire
async def test_B4_an_error_comes_with_flush_and_the_rest_is_discarded_to_sync(everywhere):
    said = await everywhere(
        parse("s", "SELECT 1") + bind("nothing") + FLUSH,
        answered("E"),
        parse("a", "SELECT 2") + FLUSH + describe("s") + FLUSH + SYNC,
        ready(),
        describe("a") + FLUSH,
        answered("E"),
        SYNC,
        ready(),
        describe("s") + FLUSH,
        answered("T"),
        SYNC,
        ready(),
    )
    assert [fields["C"] for fields in errors(said)] == ["26000", "26000"]


@wire
async def test_B4_after_flush_the_connection_stays(single):
    async with await single.client() as client, await single.client() as other:
        await client.send(run("SELECT 1"), FLUSH)
        assert kinds(await client.until("C")) == "12TDC"
        waits = asyncio.create_task(other.query("SELECT 'other'"))
        await single.reached(waiting=1, leased=1)
        await client.send(bind(), FLUSH)
        assert kinds(await client.until("2")) == "2"
        assert single.counts()["waiting"] == 1
        await client.send(SYNC)
        await client.until_ready()
        assert value(await waits) == "other"


# -- B5 ------------------------------------------------------------------------------------------------------

GOOD = [
    parse("a", "SELECT 'a' || $1", TEXT),
    parse("b", "SELECT 'b'"),
    bind("a", "1", portal="p"),
    describe_portal("p"),
    execute("p"),
    close("c"),
    parse("c", "SELECT 'c'"),
    describe("c"),
    bind("c"),
    execute(),
    parse("", "SELECT 'unnamed'"),
    again(),
]
WRONG = {
    "Parse": parse("wrong", "SELECT 1/"),
    "Parse_of_what_is_there": parse("kept", "SELECT 1"),
    "Bind": bind("nothing"),
    "Bind_with_too_few_values": bind("kept"),
    "Bind_with_a_wrong_value": bind("kept", "x"),
    "Describe": describe("nothing"),
    "Describe_of_a_portal": describe_portal("nothing"),
    "Execute": execute("nothing"),
    "Execute_of_what_fails": bind("kept", "0", portal="q") + execute("q"),
}


@pytest.mark.parametrize("wrong", WRONG)
@wire
async def test_B5_after_an_error_anywhere_in_a_batch_both_sides_know_what_is_prepared(everywhere, wrong):
    """What stands behind the error was never done: no Parse of it, and no Close."""
    begin = (
        parse("kept", "SELECT 1 / ($1 * ceil(random() + 1))::int", INT4)
        + parse("c", "SELECT 'old'")
        + parse("", "SELECT 'before'")
        + SYNC
    )
    probes = [again(name, *values) + SYNC for name, *values in (("a", "1"), ("b",), ("c",), ("kept", "1"))]
    clear = b"".join(map(close, ("a", "b", "c", "kept"))) + SYNC
    batches = []
    for at in range(len(GOOD) + 1):
        batch = b"".join([*GOOD[:at], WRONG[wrong], *GOOD[at:]]) + SYNC
        batches += [begin, batch, *probes, clear]
    said = await everywhere.batches(*batches, pieces=(0,))
    assert "E" in kinds(said)


@wire
async def test_B5_the_unnamed_statement_survives_a_batch_that_failed_before_it_was_reached(everywhere):
    said = await everywhere.batches(
        parse("", "SELECT 'kept'") + SYNC,
        bind("nothing") + parse("", "SELECT 'never parsed'") + SYNC,
        again() + SYNC,
    )
    assert [row[0] for row in rows(said)] == ["kept"]


@wire
async def test_B5_a_query_that_was_discarded_takes_nothing_with_it(everywhere):
    said = await everywhere(
        parse("", "SELECT 'kept'") + SYNC,
        ready(),
        bind("nothing") + query("SELECT 'discarded'") + SYNC,
        ready(),
        again() + SYNC,
        ready(),
    )
    assert [row[0] for row in rows(said)] == ["kept"]


@wire
async def test_B5_a_failed_transaction_refuses_what_it_must_and_nothing_else(everywhere):
    said = await everywhere.batches(
        parse("a", "SELECT 'a'") + parse("end", "ROLLBACK") + SYNC,
        query("BEGIN"),
        run("SELECT 1/0") + SYNC,
        parse("b", "SELECT 'b'") + SYNC,
        again("a") + SYNC,
        describe("a") + SYNC,
        close("a") + SYNC,
        parse("c", "") + SYNC,
        query("SELECT 1"),
        again("end") + SYNC,
        again("a") + SYNC,
        again("b") + SYNC,
        again("c") + SYNC,
    )
    assert [fields["C"] for fields in errors(said)] == [
        "22012",
        "25P02",
        "25P02",
        "25P02",
        "25P02",
        "26000",
        "26000",
    ]


@wire
async def test_B5_whatever_fails_is_undone_on_the_server_as_well(single):
    """What is answered for one client stands on what the server really has, for all."""
    async with await single.client() as first, await single.client() as second:
        await first.send(bind("nothing"), parse("s", "SELECT 'B5, prepared once'"), SYNC)
        assert kinds(await first.until_ready()) == "EZ"
        for client in (second, first):
            await client.send(run("SELECT 'B5, prepared once'", name="s"), SYNC)
            assert kinds(await client.until_ready()) == "12TDCZ"


# -- B16 -----------------------------------------------------------------------------------------------------


@wire
async def test_B16_portals_with_a_row_limit_live_as_long_as_their_transaction(everywhere):
    said = await everywhere.batches(
        parse("s", "SELECT generate_series(1, $1)", INT4) + SYNC,
        query("BEGIN"),
        bind("s", "5", portal="p") + execute("p", 2) + SYNC,
        bind("s", "3", portal="q") + describe_portal("q") + execute("q", 1) + SYNC,
        execute("p", 2) + execute("q", 1) + SYNC,
        execute("p", 2) + execute("p", 2) + SYNC,
        close_portal("q") + execute("q") + SYNC,
        query("ROLLBACK"),
        execute("p") + SYNC,
    )
    assert kinds(said) == "1Z" + "CZ" + "2DDsZ" + "2TDsZ" + "DDsDsZ" + "DCCZ" + "3EZ" + "CZ" + "EZ"
    assert [fields["C"] for fields in errors(said)] == ["34000", "34000"]


@wire
async def test_B16_outside_a_transaction_block_a_portal_ends_with_its_batch(everywhere):
    said = await everywhere.batches(
        parse("s", "SELECT generate_series(1, 5)") + SYNC,
        bind("s", portal="p") + execute("p", 2) + SYNC,
        execute("p", 2) + SYNC,
        bind("s") + execute(limit=1) + execute(limit=1) + describe_portal() + execute() + SYNC,
        execute() + SYNC,
        bind("s", portal="p") + bind("s", portal="q") + execute("p", 1) + execute("q", 1) + execute("p", 9) + SYNC,
        bind("s", portal="p") + bind("s", portal="p") + SYNC,
        bind("s", portal="p") + close_portal("p") + bind("s", portal="p") + execute("p", 1) + SYNC,
    )
    assert [fields["C"] for fields in errors(said)] == ["34000", "34000", "42P03"]


@wire
async def test_B16_a_suspended_portal_lives_until_sync_and_keeps_the_connection(single):
    async with await single.client() as client, await single.client() as other:
        await client.send(parse("", "SELECT generate_series(1, 3)"), bind(), execute(limit=1), FLUSH)
        assert kinds(await client.until("s")) == "12Ds"
        waits = asyncio.create_task(other.query("SELECT 'other'"))
        await single.reached(waiting=1, leased=1)
        await client.send(execute(limit=1), FLUSH)
        assert rows(await client.until("s")) == [("2",)]
        await client.send(SYNC)
        assert kinds(await client.until_ready()) == "Z"
        assert value(await waits) == "other"


@wire
async def test_B16_cursors_and_portals_are_the_same_thing(everywhere):
    said = await everywhere.batches(
        query("BEGIN; DECLARE c CURSOR FOR SELECT generate_series(1, 4)"),
        execute("c", 1) + SYNC,
        query("FETCH 1 FROM c"),
        parse("s", "FETCH 1 FROM c") + again("s") + again("s") + SYNC,
        close_portal("c") + SYNC,
        query("FETCH 1 FROM c"),
        query("ROLLBACK"),
        bind("s") + execute() + SYNC,
    )
    assert [row[0] for row in rows(said)] == ["1", "2", "3", "4"]
    assert [fields["C"] for fields in errors(said)] == ["34000", "34000"]


# -- B22, B24 ------------------------------------------------------------------------------------------------


@wire
async def test_B22_transactions_that_begin_and_end_inside_batches(everywhere):
    said = await everywhere.batches(
        run("BEGIN") + run("SELECT 1") + SYNC,
        run("SELECT 2") + run("COMMIT AND CHAIN") + SYNC,
        run("COMMIT") + run("SELECT 3") + SYNC,
        run("SELECT 4") + run("BEGIN") + run("SELECT 1/0") + SYNC,
        run("ROLLBACK") + run("BEGIN") + run("SELECT 5") + run("ROLLBACK") + SYNC,
        run("SET LOCAL work_mem = '1MB'") + run("SHOW work_mem") + SYNC,
        query("SHOW transaction_isolation"),
    )
    status = "".join(message.body.decode() for message in said if message.kind == "Z")
    assert status == "TTIEIII"
    assert ("5",) in rows(said)


@wire
async def test_B22_a_begin_in_a_batch_keeps_the_connection_and_a_commit_gives_it_back(single):
    async with await single.client() as client, await single.client() as other:
        await client.send(parse("b", "BEGIN"), parse("c", "COMMIT"), SYNC)
        await client.until_ready()
        for _ in range(2):
            await client.send(bind("b"), execute(), SYNC)
            await client.until_ready()
            waits = asyncio.create_task(other.query("SELECT 'other'"))
            await single.reached(waiting=1, leased=1)
            await client.send(bind("c"), execute(), SYNC)
            await client.until_ready()
            assert value(await waits) == "other"


@wire
async def test_B24_every_answer_comes_in_its_place(everywhere):
    said = await everywhere.batches(
        parse("", "") + describe() + bind() + describe_portal() + execute() + SYNC,
        parse("", "SELECT $1, $2 || ''", INT4) + describe() + SYNC,
        parse("i", "CREATE TEMP TABLE b_order (id int)") + describe("i") + bind("i") + describe_portal() + SYNC,
        close_portal() + close() + close_portal("nothing") + close("nothing") + SYNC,
        again("i") + execute() + SYNC,
        bind("i", results=(1, 1)) + SYNC,
        run("SELECT 1, NULL, ''") + SYNC,
        parse("n", "DO $$ BEGIN RAISE NOTICE 'noticed'; END $$") + bind("n") + execute() + SYNC,
    )
    assert kinds(said).startswith("1tn2nIZ" + "1tTZ" + "1tn2nZ" + "3333Z")


@wire
async def test_B24_binary_results_and_parameters_pass_as_they_are(everywhere):
    every_byte = bytes(range(256)) * 4
    said = await everywhere.batches(
        parse("s", "SELECT $1::bytea, 42, 'text'") + SYNC,
        bind("s", "\\x" + every_byte.hex(), results=(1, 1, 0)) + describe_portal() + execute() + SYNC,
        bind("s", "\\x", results=(0,)) + execute() + SYNC,
    )
    assert every_byte in said[kinds(said).index("D")].body
