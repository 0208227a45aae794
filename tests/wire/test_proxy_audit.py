"""What a session is taken for, and what it is: planted leaks are found, attributed and contained; pins are
bounded, refused where they are not wanted, and written down.
"""

import pytest
from proxy_kit import RunningProxy, until, wire
from scripts_BD import SYNC, bind, execute, parse, query, run
from state_kit import direct, elsewhere, pid_of, pinned, roles_of, shown, tell

from cenote.embedded import Postgres
from cenote.testing.wire import error, kinds, rows, value
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


async def incidents(proxy: RunningProxy, count: int) -> None:
    """So many leaks were found, and are expected."""
    await until(lambda: proxy.call(lambda: proxy.pools()[0].incidents) == count)
    proxy.incidents = count


NAMES = {
    "made later": "SELECT set_config('late.tenant', 'mine', false)",
    "made later, body by the standard": None,
    "in a constant": "SELECT made('late.tenant', 'mine')",
    "in a parameter": "SELECT made($1, $2)",
}


@pytest.mark.parametrize("how", NAMES)
@wire
async def test_C6_the_name_of_a_custom_setting_is_found_wherever_it_is(proxy_for, pg, how):
    proxy = proxy_for(pg, max_size=1)
    async with await proxy.client() as client, await proxy.client() as other:
        await tell(client, "SELECT 1")
        await proxy.reached(idle=1)  # what the database has was looked through
        text = "SELECT made()"
        body = "AS $$SELECT set_config('late.tenant', 'mine', false)$$"
        if how == "made later, body by the standard":
            body = "BEGIN ATOMIC SELECT set_config('late.tenant', 'mine', false); END"
        declared = "made()"
        if how.startswith("in a"):
            declared, body = "made(n text, v text)", "AS 'SELECT set_config(n, v, false)'"
            text = NAMES[how]
        await tell(client, f"CREATE FUNCTION {declared} RETURNS text LANGUAGE sql {body}")
        message = run(text, *(["late.tenant", "mine"] if "$1" in text else [])) + SYNC
        try:
            for known in (False, True):
                await client.send(message)
                await client.until_ready()
                assert await shown(other, "late.tenant") == ""
                await incidents(proxy, 1)
                assert await shown(client, "late.tenant") == ("mine" if known else "")
        finally:
            await tell(client, "DROP FUNCTION made")


LEAKS = "CREATE FUNCTION sets_it() RETURNS text LANGUAGE sql AS $$SELECT set_config('work_mem', '7MB', false)$$"
TOO_EARLY = {
    "rolled back": ("BEGIN", "SELECT sets_it()", "ROLLBACK"),
    "rolled back to a savepoint": ("BEGIN", "SAVEPOINT a", "SELECT sets_it()", "ROLLBACK TO a", "COMMIT"),
    "taken for the client's own": (
        "BEGIN",
        "SET work_mem = '6MB'",
        "SELECT sets_it()",
        "COMMIT",
        "RESET work_mem",
    ),
    "cleaned up": ("CREATE TEMP TABLE x (n int)", "SELECT sets_it()"),
    "replaced since": ("SELECT sets_it()", LEAKS.replace("CREATE", "CREATE OR REPLACE")),
}


@pytest.mark.parametrize("how", TOO_EARLY)
@wire
async def test_C6_a_text_is_harmless_only_if_it_did_nothing_where_that_would_have_been_seen(proxy_for, pg18, how):
    proxy = proxy_for(pg18, max_size=2, audit="first")
    async with await direct(pg18) as alone:
        await tell(
            alone, LEAKS.replace("set_config('work_mem', '7MB', false)", "'fine'") if "rep" in how else LEAKS
        )
        try:
            async with await proxy.client() as client:
                async with await proxy.client() as first:
                    await tell(first, *TOO_EARLY[how])
                await until(lambda: not proxy.counts()["leased"] and not proxy.counts()["resetting"])
                await tell(client, "SELECT sets_it()")
                await incidents(proxy, 1)
        finally:
            await tell(alone, "DROP FUNCTION sets_it")


@wire
async def test_C6_what_ran_right_before_its_client_left_is_looked_at_too(proxy_for, pg18):
    proxy = proxy_for(pg18, max_size=1)
    async with await direct(pg18) as alone, await proxy.client() as other:
        await tell(alone, LEAKS)
        try:
            async with await proxy.client() as client:
                await client.send(query("SELECT sets_it()") + messages.TERMINATE)
                await client.closed()
            assert await shown(other, "work_mem") == "4MB"
            await incidents(proxy, 1)
        finally:
            await tell(alone, "DROP FUNCTION sets_it")


@wire
async def test_C6_texts_that_begin_alike_are_told_apart(proxy_for, pg18):
    proxy = proxy_for(pg18, max_size=1, audit="first")
    columns = ", ".join(f"column_number_{i}" for i in range(20))
    numbers = ", ".join(map(str, range(20)))
    async with await direct(pg18) as alone, await proxy.client() as client:
        await tell(alone, LEAKS, "CREATE FUNCTION fine() RETURNS int LANGUAGE sql AS 'SELECT 1'")
        try:
            for name in ("fine", "sets_it"):
                await tell(client, f"WITH r ({columns}) AS (VALUES ({numbers})) SELECT {name}(), * FROM r")
            await incidents(proxy, 1)
        finally:
            await tell(alone, "DROP FUNCTION sets_it, fine")


@wire
async def test_C6_a_plain_update_counts_when_it_is_bound(proxy_for, pg18):
    proxy = proxy_for(pg18, max_size=1, audit="first")
    async with await direct(pg18) as alone, await proxy.client() as client:
        await tell(alone, TRIGGER)
        try:
            await client.send(parse("", "UPDATE watched SET id = 3") + SYNC)
            await client.until_ready()
            await client.send(bind("") + execute() + SYNC)
            await client.until_ready()
            await incidents(proxy, 1)
        finally:
            await tell(alone, "DROP TABLE watched", "DROP FUNCTION leaks")


@wire
async def test_C6_a_setting_that_a_library_has_defined_is_not_taken_for_a_leak(proxy_for, pg):
    """There is no telling from its value whether the session has set it."""
    proxy = proxy_for(pg, max_size=2)
    async with await proxy.client() as client, await proxy.client() as other:
        for text in ("SET plpgsql.extra_warnings = 'all'", "RESET plpgsql.extra_warnings", "RESET ALL"):
            await tell(client, text)
            wanted = "all" if "SET p" in text and "RE" not in text else "none"
            await tell(other, "DO $$BEGIN END$$", "DO $$BEGIN END$$")
            await tell(client, "DO $$BEGIN END$$")
            async with elsewhere(proxy, client):
                await tell(client, "DO $$BEGIN END$$")
                assert await shown(client, "plpgsql.extra_warnings") == wanted
            assert await shown(other, "plpgsql.extra_warnings") in ("none", "")
        assert pinned(proxy) == 0


@wire
async def test_C20_a_client_with_more_custom_settings_than_can_be_carried_keeps_its_connection(proxy_for, pg):
    proxy = proxy_for(pg, max_size=3)
    async with await proxy.client() as client, await proxy.client() as other:
        for begin in range(0, 300, 60):
            await tell(client, ";".join(f"SET app.n{n} = 'x'" for n in range(begin, begin + 60)))
        assert await shown(client, "app.n0", "app.n299") == ["x", "x"]
        assert pinned(proxy) == 1
        assert await shown(other, "app.n0", "app.n299") == ["", ""]
        pid = await pid_of(client)
        assert proxy.call(lambda: len(proxy.pools()[0].customs)) <= 256
        await client.terminate()
        await until(lambda: pinned(proxy) == 0)
        assert await pid_of(other) != pid


@wire
async def test_C20_a_connection_that_many_have_stained_is_not_kept(proxy_for, pg18):
    """PostgreSQL forgets none of the names, and each audit asks for all."""
    proxy = proxy_for(pg18, max_size=1)
    pids = set()
    for number in range(6):
        async with await proxy.client() as client:
            for begin in range(0, 240, 60):
                await tell(client, ";".join(f"SET app{number}.n{n} = 'x'" for n in range(begin, begin + 60)))
            pids.add(await pid_of(client))
    assert len(pids) == 2


@wire
async def test_C20_all_the_names_of_one_text_count(proxy_for, pg18):
    proxy = proxy_for(pg18, max_size=2)
    async with await proxy.client() as client, await proxy.client() as other:
        await tell(client, ";".join(f"SET app.n{n} = 'x'" for n in range(100)))
        assert await shown(other, "app.n0", "app.n99") == ["", ""]


@wire
async def test_C20_what_never_had_a_value_is_not_remembered(proxy_for, pg18):
    proxy = proxy_for(pg18, max_size=1)
    async with await proxy.client() as client:
        await tell(client, "SELECT set_config('app.one', 'x', true), 'some.words'", "DO $$BEGIN END$$")
        await tell(client, "DO $$BEGIN PERFORM 'other.words'; PERFORM set_config('app.two', 'x', false); END$$")
        assert await shown(client, "app.two") == "x"
        assert proxy.call(lambda: list(proxy.pools()[0].customs)) == [b"app.two"]


@wire
async def test_C21_the_name_of_a_custom_setting_may_be_in_any_encoding(proxy_for, pg):
    proxy = proxy_for(pg, max_size=2)
    latin = {"client_encoding": "LATIN1"}
    async with await proxy.client(params=latin) as client, await proxy.client() as other:
        await client.send(messages.query("SET app.caf\xe9 = 'h\xe9'".encode("latin-1")))
        assert "E" not in kinds(await client.until_ready())
        assert pinned(proxy) == 0
        async with elsewhere(proxy, client):
            await client.send(messages.query("SELECT length(current_setting('app.caf\xe9'))".encode("latin-1")))
            assert value(await client.until_ready()) == "2"
        assert await shown(other, "app.caf\xe9") == ""


DEFAULTS = {
    "a role": "ALTER ROLE app SET role = 'app_owner'",
    "of the role": "ALTER ROLE app SET app.env = 'prod'",
    "of the database": "ALTER DATABASE app SET app.env = 'prod'",
}
ASKED = "SELECT current_user, current_setting('role'), coalesce(current_setting('app.env', true), '')"
SAID = (
    *("DO $$BEGIN END$$", "RESET ROLE", "SET ROLE NONE", "RESET ALL", "SET SESSION AUTHORIZATION DEFAULT"),
    *("SET app.env = 'mine'", "DO $$BEGIN END$$", "RESET app.env", "SET app.env = ''", "RESET ALL"),
    *("SET app.env = ''", "SET ROLE app", "DISCARD ALL", "SET LOCAL app.env = 'no'"),
)


@pytest.mark.parametrize("audit", ["first", "always"])
@pytest.mark.parametrize("what", DEFAULTS)
@wire
async def test_C18_what_a_log_in_begins_with_is_no_leak_and_reset_returns_to_it(proxy_for, pg, what, audit):
    with roles_of(pg, "app_owner") as admin:
        admin.rows(DEFAULTS[what])
        try:
            proxy = proxy_for(pg, max_size=2, audit=audit)
            async with await proxy.client() as client, await proxy.client() as other, await direct(pg) as alone:
                fresh = rows(await alone.query(ASKED))
                for text in SAID:
                    await tell(alone, text)
                    await tell(client, text)
                    wanted = rows(await alone.query(ASKED))
                    assert rows(await other.query(ASKED)) == fresh, text
                    async with elsewhere(proxy, client):
                        assert rows(await client.query(ASKED)) == wanted, text
                    await tell(other, "DO $$BEGIN END$$")
            own = {"options": "-c app.env=born"}
            async with await proxy.client(params=own) as client:
                await tell(client, "SET app.env = 'mine'", "RESET app.env")
                assert await shown(client, "app.env") == "born"
        finally:
            admin.rows("ALTER ROLE app RESET ALL")
            admin.rows("ALTER DATABASE app RESET ALL")


@wire
async def test_C18_each_connection_has_the_defaults_of_its_own_log_in(proxy_for, pg18):
    with roles_of(pg18) as admin:
        proxy = proxy_for(pg18, max_size=2)
        async with await proxy.client() as client, await proxy.client() as other:
            await tell(other, "BEGIN")
            await proxy.reached(resetting=0, checking=0, connecting=0)
            kept = await pid_of(other)
            admin.rows("ALTER ROLE app SET app.env = 'prod'")
            try:
                others = f"pg_stat_activity WHERE usename = 'app' AND pid <> {kept}"
                admin.rows(f"SELECT pg_terminate_backend(pid) FROM {others}")
                assert await shown(client, "app.env") == "prod"
                await tell(client, "SET app.env = 'mine'", "SELECT 1", "RESET app.env")
                await tell(other, "SELECT 1", "COMMIT", "SELECT 1")
            finally:
                admin.rows("ALTER ROLE app RESET ALL")


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
