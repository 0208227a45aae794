"""Group B, pipelines: batches are sent before those ahead of them are answered, and any of them may fail; and
proxies in a row.
"""

import asyncio
from typing import NamedTuple

import psycopg
import pytest
from proxy_kit import RunningProxy, until, wire
from scripts_BD import (
    SYNC,
    TEXT,
    again,
    bind,
    close,
    describe,
    describe_portal,
    execute,
    parse,
    query,
    run,
)

from cenote.testing.wire import Message, RawClient, error, errors, kinds, ready, rows, value

pytest_plugins = ["fixtures_BD"]


@pytest.fixture
def single(proxy_for, pg18) -> RunningProxy:
    """One server connection for all."""
    return proxy_for(pg18, max_size=1)


async def ask(client: RawClient, *parts: bytes) -> list[Message]:
    """The answer to a batch; the Sync is added."""
    await client.send(*parts, SYNC)
    return await client.until_ready()


# -- B3 ------------------------------------------------------------------------------------------------------


@wire
async def test_B3_a_pipeline_of_many_batches_is_answered_in_order(everywhere):
    count = 300
    batches = [
        run(f"SELECT {number}", name=f"n{number % 7}") + close(f"n{number % 7}") + SYNC for number in range(count)
    ]
    said = await everywhere(b"".join(batches), ready(count), pieces=(0, 1000))
    assert [row[0] for row in rows(said)] == [str(number) for number in range(count)]


@wire
async def test_B3_a_pipeline_of_everything_is_answered_in_order(everywhere):
    said = await everywhere(
        query("SELECT 1")
        + run("SELECT 2")
        + SYNC
        + SYNC
        + query("")
        + parse("s", "SELECT 3")
        + SYNC
        + query("SELECT 1/0")
        + again("s")
        + again("s")
        + SYNC
        + run("SELECT 1/0")
        + run("SELECT 'discarded'")
        + query("SELECT 'discarded too'")
        + SYNC
        + query("SELECT 4; SELECT 5"),
        ready(9),
    )
    assert [row[0] for row in rows(said)] == ["1", "2", "3", "3", "4", "5"]


@wire
async def test_B3_a_batch_whose_end_comes_after_the_ready_of_the_one_before(everywhere):
    """What came with the first Sync is already under way on that connection."""
    said = await everywhere(
        run("SELECT 1") + SYNC + parse("", "SELECT 2"),
        ready(),
        bind() + execute() + SYNC + parse("s", "SELECT 3") + bind("s"),
        ready(),
        execute() + SYNC + query("SELECT 4") + bind("s"),
        ready(2),
        describe_portal() + execute() + SYNC,
        ready(),
    )
    assert [row[0] for row in rows(said)] == ["1", "2", "3", "4", "3"]


@wire
async def test_B3_the_connection_is_kept_for_a_batch_that_has_begun(single):
    async with await single.client() as client, await single.client() as other:
        await client.send(run("SELECT 1"), SYNC, parse("", "SELECT 2"))
        assert value(await client.until_ready()) == "1"
        waits = asyncio.create_task(other.query("SELECT 'other'"))
        await single.reached(waiting=1, leased=1)
        await client.send(bind(), execute(), SYNC)
        assert value(await client.until_ready()) == "2"
        assert value(await waits) == "other"


@wire
async def test_B3_a_message_that_has_begun_is_not_lost_between_two_connections(everywhere):
    """The first bytes of the next request come with the Sync, its rest after the connection was given back."""
    text = query("SELECT 'in two halves'")
    for cut in (1, 4, 5, 6, len(text) - 1):
        said = await everywhere(
            run("SELECT 1") + SYNC + text[:cut], ready(), text[cut:] + SYNC, ready(2), pieces=(0,)
        )
        assert [row[0] for row in rows(said)] == ["1", "in two halves"]


def test_B3_the_pipeline_mode_of_libpq(proxy_for, pg18):
    proxy = proxy_for(pg18, max_size=1)
    with psycopg.connect(proxy.dsn, autocommit=True, prepare_threshold=0) as conn:
        for _ in range(3):
            with conn.pipeline() as pipeline:
                cursors = [conn.execute("SELECT %s::int", (number,)) for number in range(50)]
                pipeline.sync()
                cursors += [conn.execute("SELECT %s::text", (str(number),)) for number in range(50)]
            got = [cursor.fetchone()[0] for cursor in cursors]
            assert got == [*range(50), *map(str, range(50))]
        with pytest.raises(psycopg.errors.DivisionByZero), conn.pipeline():
            conn.execute("SELECT 1/0")
        assert conn.execute("SELECT 1").fetchone() == (1,)


@wire
async def test_B3_sixty_clients_pipeline_on_two_connections(proxy_for, pg18):
    """Each gets its own answers, in its own order."""
    proxy = proxy_for(pg18, max_size=2)
    clients = [await proxy.client() for _ in range(60)]

    async def work(number: int) -> None:
        client = clients[number]
        for turn in range(5):
            wanted = [f"{number}/{turn}/{step}" for step in range(4)]
            await client.send(
                *(
                    run("SELECT $1", text, name="s" if turn == step == 0 else "", types=(TEXT,))
                    for step, text in enumerate(wanted)
                ),
                SYNC,
                again("s", "last"),
                SYNC,
            )
            answer = await client.trace(2)
            assert [row[0] for row in rows(answer)] == [*wanted, "last"]

    await asyncio.gather(*map(work, range(len(clients))))
    await until(lambda: proxy.counts()["leased"] == 0)
    for client in clients:
        await client.terminate()


# -- B5: what an error ahead of them does to the batches behind ------------------------------------------------

WRONG = bind("nothing")


@wire
async def test_B5_a_known_statement_is_not_parsed_in_a_transaction_that_has_failed_meanwhile(everywhere):
    """The failure is on its way when the Parse comes, and only the server knows of it."""
    said = await everywhere(
        parse("a", "SELECT 'B5, known'") + close("a") + SYNC,
        ready(),
        query("BEGIN") + query("SELECT 1/0") + parse("a", "SELECT 'B5, known'") + SYNC + query("ROLLBACK"),
        ready(4),
        again("a") + SYNC,
        ready(),
    )
    assert [fields["C"] for fields in errors(said)] == ["22012", "25P02", "26000"]


@wire
async def test_B5_whatever_was_discarded_is_not_taken_for_done_by_the_next_batch(everywhere):
    """Both batches are sent at once. What the first needed prepared on this server, the second still needs."""
    said = await everywhere(
        parse("s", "SELECT 's'") + parse("a", "SELECT 'a'") + SYNC,
        ready(),
        WRONG + again("s") + describe("a") + SYNC + again("s") + SYNC + WRONG + SYNC + again("a") + SYNC,
        ready(4),
        WRONG + parse("b", "SELECT 'b'") + again("b") + SYNC + parse("b", "SELECT 'B'") + again("b") + SYNC,
        ready(2),
        WRONG + close("b") + SYNC + again("b") + close("b") + SYNC + WRONG + again("s") + SYNC + again("b") + SYNC,
        ready(4),
        WRONG + parse("b", "SELECT 'b'") + SYNC + again("b") + SYNC,
        ready(2),
    )
    assert [row[0] for row in rows(said)] == ["s", "a", "B", "B"]
    assert {fields["C"] for fields in errors(said)} == {"26000"}


@wire
async def test_B5_the_unnamed_statement_is_not_taken_for_parsed_either(everywhere):
    said = await everywhere(
        parse("", "SELECT 'mine'") + SYNC,
        ready(),
        WRONG + again() + SYNC + again() + SYNC,
        ready(2),
        WRONG
        + parse("", "SELECT 'never parsed'")
        + SYNC
        + again()
        + SYNC
        + WRONG
        + describe()
        + SYNC
        + again()
        + SYNC,
        ready(4),
        query("SELECT 'simple'"),
        ready(),
        WRONG + again() + SYNC + again() + SYNC,
        ready(2),
    )
    assert [row[0] for row in rows(said)] == ["mine", "mine", "mine", "simple"]


@wire
async def test_B14_a_query_behind_an_unanswered_batch_ends_the_unnamed_statement(everywhere):
    said = await everywhere(
        run("SELECT 1") + SYNC + query("SELECT 2"),
        ready(2),
        again() + SYNC,
        ready(),
        run("SELECT 3") + SYNC + run("SELECT 4") + SYNC + query("") + describe() + SYNC,
        ready(4),
        again() + SYNC,
        ready(),
    )
    assert [row[0] for row in rows(said)] == ["1", "2", "3", "4"]
    assert [fields["C"] for fields in errors(said)] == ["26000"] * 3


@wire
async def test_B5_no_client_ever_runs_the_unnamed_statement_of_another(single):
    """The one on the server is the other's, and the Parse that would replace it was discarded."""
    async with await single.client() as client, await single.client() as other:
        await ask(client, parse("", "SELECT 'mine'"))
        await ask(other, parse("", "SELECT 'secret of the other'"))
        await client.send(WRONG, again(), SYNC, again(), SYNC)
        answer = await client.trace(2)
        assert rows(answer) == [("mine",)]
        await ask(other, parse("", "SELECT 'secret of the other'"))
        await client.query("SELECT 1")
        await client.send(WRONG, again(), SYNC, again(), SYNC)
        answer = await client.trace(2)
        assert rows(answer) == []
        assert [fields["C"] for fields in errors(answer)] == ["26000", "26000"]


@wire
async def test_B5_no_client_ever_runs_the_named_statement_of_another(single):
    """The Close that would take it out of the way was discarded."""
    async with await single.client() as client, await single.client() as other:
        await ask(other, parse("s", "SELECT 'secret of the other'"))
        await client.send(
            WRONG, again("s"), SYNC, again("s"), SYNC, WRONG, describe("s"), SYNC, describe("s"), SYNC
        )
        answer = await client.trace(4)
        assert rows(answer) == []
        assert kinds(answer) == "EZ" * 4
        assert {fields["C"] for fields in errors(answer)} == {"26000"}
        assert value(await ask(other, again("s"))) == "secret of the other"


@wire
async def test_B5_a_pin_in_a_batch_that_fails_leaves_the_client_its_own_statements(everywhere):
    """The connection is to be this client's from here on; what was sent to make it so was discarded."""
    said = await everywhere(
        parse("a", "SELECT 'mine'") + parse("", "SELECT 'unnamed'") + SYNC,
        ready(),
        WRONG + run("CREATE TEMP TABLE b5 ()", name="t") + SYNC + again("a") + again() + SYNC,
        ready(2),
        again("a") + again() + again("t") + SYNC,
        ready(),
        again("b") + SYNC,
        ready(),
    )
    assert [row[0] for row in rows(said)] == ["mine", "unnamed"] * 2
    assert [fields["C"] for fields in errors(said)] == ["26000"] * 3


@wire
async def test_B12_an_eviction_that_was_discarded_is_not_taken_for_done(proxy_for, pg18):
    proxy = proxy_for(pg18, max_size=1, max_prepared=2)
    async with await proxy.client() as client:
        for name in ("a", "b"):
            await ask(client, parse(name, f"SELECT '{name}'"))
        for _ in range(3):
            await client.send(
                WRONG, run("SELECT 'c'", name="c"), SYNC, run("SELECT 'd'", name="d"), close("d"), SYNC
            )
            await client.send(again("a"), again("b"), SYNC)
            answer = await client.trace(3)
            assert [row[0] for row in rows(answer)] == ["d", "a", "b"], errors(answer)
            assert error(answer)["C"] == "26000"


@wire
async def test_B13_a_name_that_is_taken_in_a_batch_that_fails_is_free_for_the_next(everywhere):
    said = await everywhere(
        WRONG + parse("s", "SELECT 1") + SYNC + parse("s", "SELECT 2") + SYNC + parse("s", "SELECT 3") + SYNC,
        ready(3),
        again("s") + SYNC,
        ready(),
        WRONG + close("s") + SYNC + parse("s", "SELECT 4") + SYNC + close("s") + parse("s", "SELECT 5") + SYNC,
        ready(3),
        again("s") + SYNC,
        ready(),
    )
    assert [row[0] for row in rows(said)] == ["2", "5"]
    assert [fields["C"] for fields in errors(said)] == ["26000", "42P05", "26000", "42P05"]


# -- B11 -----------------------------------------------------------------------------------------------------


class Before(NamedTuple):
    """What a proxy needs to know of the proxy behind it."""

    host: str
    port: int
    database: str
    user: str
    password: str


@wire
async def test_B11_in_a_chain_of_proxies_names_do_not_clash(proxy_for, single):
    """Two proxies give names of their own to statements, and both speak to a third."""
    behind = Before("127.0.0.1", single.port, single.database, single.user, single.password)
    fronts = [proxy_for(behind, max_size=1), proxy_for(behind, max_size=1)]
    clients = [await front.client() for front in fronts for _ in range(3)]
    names = ["s", "a", "cenote_1", "cenote_2", "cenote_3", "cenote_4"]
    for number, client in enumerate(clients):
        for name in names:
            assert kinds(await ask(client, parse(name, f"SELECT '{name} of {number}'"))) == "1Z"
    for _ in range(2):
        for number, client in enumerate(clients):
            answer = await ask(client, *map(again, names))
            assert [row[0] for row in rows(answer)] == [f"{name} of {number}" for name in names]
    for client in clients:
        await client.terminate()
    for front in fronts:
        front.clean()
        front.stop()
