"""What a session is taken for, and what it is: planted leaks are found, attributed and contained; pins are
bounded, refused where they are not wanted, and written down.
"""

import pytest
from proxy_kit import until, wire

from cenote.embedded import Postgres
from cenote.testing.wire import error, kinds, value
from cenote.wire import messages

BUILT_IN = """CREATE OR REPLACE FUNCTION sets_work_mem() RETURNS int LANGUAGE plpgsql AS
$$BEGIN PERFORM pg_catalog.set_config('work_mem', '7MB', false); RETURN 1; END$$"""
CUSTOM = """CREATE OR REPLACE FUNCTION sets_tenant() RETURNS int LANGUAGE plpgsql AS
$$BEGIN PERFORM set_config('hidden.tenant', 'mine', false); RETURN 1; END$$"""
TRIGGER = """CREATE TABLE IF NOT EXISTS watched (id int); CREATE OR REPLACE FUNCTION leaks() RETURNS trigger
LANGUAGE plpgsql AS $$BEGIN SET search_path = pg_temp, public; RETURN NEW; END$$;
DROP TRIGGER IF EXISTS leaks ON watched; INSERT INTO watched VALUES (1);
CREATE TRIGGER leaks BEFORE UPDATE ON watched FOR EACH ROW EXECUTE FUNCTION leaks()"""


@pytest.mark.parametrize(
    ("setup", "leak", "asked", "wanted"),
    [
        (BUILT_IN, "SELECT sets_work_mem()", "SHOW work_mem", "4MB"),
        (CUSTOM, "SELECT sets_tenant()", "SELECT coalesce(current_setting('hidden.tenant', true), '')", ""),
        (TRIGGER, "UPDATE watched SET id = 2", "SHOW search_path", '"$user", public'),
    ],
    ids=["a built-in setting", "a custom one named only in its body", "a trigger"],
)
@pytest.mark.parametrize("extended", [False, True], ids=["simple", "extended"])
@wire
async def test_C6_a_setting_that_hides_in_a_function_is_found_attributed_and_contained(
    proxy_for, pg18: Postgres, setup, leak, asked, wanted, extended
):
    proxy = proxy_for(pg18, max_size=1, audit="first")
    async with await proxy.client() as client:
        await client.query(setup)
        await proxy.reached(idle=1)
        client_sends = (
            (
                messages.parse(b"", leak.encode() + bytes(3)),
                messages.message(b"B", bytes(8)),
                messages.message(b"E", bytes(5)),
                messages.SYNC,
            )
            if extended
            else (messages.query(leak),)
        )
        await client.send(*client_sends)
        assert "E" not in kinds(await client.until_ready())
        async with await proxy.client() as other:
            assert value(await other.query(asked)) == wanted, "somebody else's"
        await until(lambda: proxy.call(lambda: proxy.pools()[0].incidents) == 1)
        known = proxy.call(lambda: [text for text, leaks in proxy.pools()[0].audited.items() if leaks])
        assert any(leak.split()[1].lower().encode() in text.lower() for text in known), known

        # From then on it is known, and carried as if the client had said it itself.
        await client.send(*client_sends)
        await client.until_ready()
        async with await proxy.client() as other:
            assert value(await other.query(asked)) == wanted
        assert value(await client.query(asked)) != wanted
    proxy.incidents = 1


@wire
async def test_only_so_many_clients_keep_a_connection_and_the_next_is_told_what_to_do(proxy_for, pg18: Postgres):
    proxy = proxy_for(pg18, max_size=3)
    async with await proxy.client() as a, await proxy.client() as b, await proxy.client() as c:
        for client in (a, b):
            assert "E" not in kinds(await client.query("CREATE TEMP TABLE mine (id int)"))
        refused = error(await c.query("CREATE TEMP TABLE mine (id int)"))
        assert refused["C"] == "53300"
        assert "max_pinned is 2" in refused["M"]
        assert "ON COMMIT DROP" in refused["H"]
        assert value(await c.query("SELECT 1")) == "1"
        await a.query("DROP TABLE mine")
        await until(lambda: proxy.call(lambda: proxy.pools()[0].pinned) == 1)
        assert "E" not in kinds(await c.query("CREATE TEMP TABLE mine (id int)"))


@wire
async def test_a_refused_statement_fails_its_transaction_as_any_other(proxy_for, pg18: Postgres):
    proxy = proxy_for(pg18, unsafe="refuse")
    async with await proxy.client() as client:
        await client.query("BEGIN")
        assert error(await client.query("SELECT pg_advisory_lock(3)"))["C"] == "53300"
        assert error(await client.query("SELECT 1"))["C"] == "25P02"
        await client.query("ROLLBACK")
        assert value(await client.query("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'")) == "0"
        assert "E" not in kinds(await client.query("SET work_mem = '5MB'")), "what is carried is never refused"
        assert value(await client.query("SHOW work_mem")) == "5MB"


@wire
async def test_the_ledger_knows_which_text_did_what_and_how_often(proxy_for, pg18: Postgres):
    proxy = proxy_for(pg18)
    async with await proxy.client() as client:
        for number in range(3):
            await client.query(f"SET my.number = '{number}'")
            await client.query(f"SELECT pg_advisory_lock({number})")
            await client.query(f"SELECT pg_advisory_unlock({number})")
    ledger = proxy.call(lambda: dict(proxy.pools()[0].ledger))
    assert ledger["carried: settings", b"SET my.number = ?"] == 3
    assert ledger["pinned: advisory_locks", b"SELECT pg_advisory_lock(?)"] == 3


@wire
async def test_a_client_that_leaves_its_state_behind_leaves_the_connection_clean_and_there(
    proxy_for, pg18: Postgres
):
    proxy = proxy_for(pg18, max_size=1)
    async with await proxy.client() as client:
        pid = value(await client.query("SELECT pg_backend_pid()"))
        await client.query("CREATE TEMP TABLE mine (id int)")
        await client.query("SELECT pg_advisory_lock(7)")
        await client.query("LISTEN there")
        await client.query("SET my.own = 'x'; SET work_mem = '5MB'")
    await proxy.reached(idle=1)
    async with await proxy.client() as other:
        assert value(await other.query("SELECT pg_backend_pid()")) == pid
        assert value(await other.query("SELECT coalesce(to_regclass('mine')::text, '')")) == ""
        assert value(await other.query("SHOW work_mem")) == "4MB"
