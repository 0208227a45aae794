"""Group C, texts that only clear state (DISCARD ALL, RESET ALL, DEALLOCATE ALL ...): what came of them counts, not
that they were sent.
"""

from __future__ import annotations

import pytest
from proxy_kit import wire
from scripts_BD import COPY_DONE, FLUSH, SYNC, bind, data, execute, parse, query, run
from state_kit import direct, pinned, shown, tell

from cenote.testing.wire import error, kinds, rows, value


def bound(text: str) -> bytes:
    """A batch that prepares and binds it, and leaves it at that."""
    return parse("", text) + bind("") + SYNC


@pytest.mark.parametrize("text", ["RESET ALL", "DISCARD ALL", "DEALLOCATE ALL"])
@wire
async def test_C21_what_is_bound_and_not_executed_clears_nothing(single, text):
    async with await single.client() as client, await single.client() as other:
        await tell(client, "SET search_path = mine", "SET app.tenant = 'mine'")
        await client.send(parse("a", "SELECT 'mine'") + SYNC)
        await client.until_ready()
        await client.send(bound(text))
        assert kinds(await client.until_ready()) == "12Z"
        assert await shown(other, "search_path", "app.tenant") == ['"$user", public', ""]
        await other.send(bind("a") + execute() + SYNC)
        assert error(await other.until_ready())["C"] == "26000"
        assert await shown(client, "search_path", "app.tenant") == ["mine", "mine"]
        await client.send(bind("a") + execute() + SYNC)
        assert rows(await client.until_ready()) == [("mine",)]


@wire
async def test_C18_to_stop_listening_takes_more_than_a_bind(pair):
    async with await pair.client() as client:
        await tell(client, "LISTEN a")
        await client.send(bound("UNLISTEN *"))
        await client.until_ready()
        assert rows(await client.query("SELECT * FROM pg_listening_channels()")) == [("a",)]


@wire
async def test_C16_a_discard_that_was_not_executed_frees_nobody(pair, pg):
    async with await direct(pg) as admin, await pair.client() as client:
        await tell(admin, "CREATE SEQUENCE c16_bound")
        try:
            await tell(client, "SELECT nextval('c16_bound')")
            await client.send(bound("DISCARD SEQUENCES"))
            await client.until_ready()
            assert pinned(pair) == 1
            assert value(await client.query("SELECT currval('c16_bound')")) == "1"
        finally:
            await tell(admin, "DROP SEQUENCE c16_bound")


@wire
async def test_C17_a_deallocation_stands_when_its_batch_fails(single, pg):
    async with await direct(pg) as alone, await single.client() as client, await single.client() as other:
        await other.send(parse("mine", "SELECT 'mine'") + SYNC)
        await other.until_ready()
        heard = []
        for side in (alone, client):
            await side.send(parse("a", "SELECT 1") + SYNC)
            await side.until_ready()
            await side.send(run("DEALLOCATE ALL") + run("SELECT 1/0") + SYNC)
            assert error(await side.until_ready())["C"] == "22012"
            await side.send(bind("a") + execute() + SYNC)
            heard.append(error(await side.until_ready())["C"])
        assert heard == ["26000", "26000"]
        await other.send(bind("mine") + execute() + SYNC)
        assert rows(await other.until_ready()) == [("mine",)]


@pytest.mark.parametrize("text", ["DEALLOCATE ALL", "DISCARD ALL"])
@pytest.mark.parametrize("between", [b"", FLUSH], ids=["at once", "flushed"])
@wire
async def test_C17_what_a_batch_prepares_behind_a_deallocation_is_its_clients(single, text, between):
    """psycopg's pipeline mode deallocates, and prepares anew, in one batch."""
    async with await single.client() as client, await single.client() as other:
        await client.send(parse("a", "SELECT 1") + SYNC)
        await client.until_ready()
        await client.send(run(text) + between + parse("a", "SELECT 'its own'") + bind("a") + execute() + SYNC)
        assert rows(await client.until_ready()) == [("its own",)]
        await other.send(bind("a") + execute() + SYNC)
        assert error(await other.until_ready())["C"] == "26000"
        await other.send(parse("a", "SELECT 'mine'") + bind("a") + execute() + SYNC)
        assert rows(await other.until_ready()) == [("mine",)]
        await client.send(run(text) + bind("a") + execute() + SYNC)
        assert error(await client.until_ready())["C"] == "26000"


@wire
async def test_C4_a_reset_that_is_committed_before_its_batch_fails_stands(single, pg):
    async with await direct(pg) as alone, await single.client() as client, await single.client() as other:
        for text in (run("RESET ALL") + run("COMMIT") + run("SELECT 1/0"), run("RESET ALL") + run("SELECT 1/0")):
            heard = []
            for side in (alone, client):
                await tell(side, "SET work_mem = '5MB'")
                await side.send(text + SYNC)
                await side.until_ready()
                await tell(other, "SET work_mem = '6MB'", "SELECT 1")
                heard.append(await shown(side, "work_mem"))
            assert heard[0] == heard[1]


@wire
async def test_C8_a_copy_follows_a_reset_in_one_text(pair, pg):
    params = {"search_path": "public"}
    async with await pair.client(params=params) as client, await direct(pg, params) as alone:
        await tell(alone, "CREATE TABLE IF NOT EXISTS c8_copied (n int)")
        try:
            for side in (alone, client):
                await side.send(query("RESET search_path; COPY c8_copied FROM STDIN; SHOW work_mem"))
                await side.until("G")
                await side.send(data("1") + COPY_DONE)
                assert rows(await side.until_ready()) == [("4MB",)]
                assert await shown(side, "search_path") == "public"
        finally:
            await tell(alone, "DROP TABLE c8_copied")


@wire
async def test_C17_a_failed_transaction_refuses_an_execute_once(single, pg):
    """What the server would have to prepare for it is refused, too, and nobody's business."""
    async with await direct(pg) as alone, await single.client() as client:
        heard = []
        for side in (alone, client):
            await side.send(run("BEGIN") + run("SELECT 1/0") + run("SELECT 2") + SYNC)
            await side.until_ready()
            await side.send(query("EXECUTE p"))
            heard.append(kinds(await side.until_ready()))
        assert heard == ["EZ", "EZ"]
