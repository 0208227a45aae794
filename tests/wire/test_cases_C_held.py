"""Group C, what cannot be carried: locks, temporary objects, held cursors, channels, sequences, prepared by SQL,
and what nobody can undo. A client keeps its connection while it has some; nobody ever meets another's.
"""

from __future__ import annotations

import pytest
from proxy_kit import RunningProxy, until, wire
from scripts_BD import SYNC, again, parse, query, run
from state_kit import conversions, elsewhere, pid_of, pinned, roles_of, shown, tell

from cenote.embedded import Postgres
from cenote.testing.wire import RawClient, error, errors, kinds, rows, value

ENDS = ("terminate", "close", "reset")
LOCKS = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'"
EXTENDED = pytest.mark.parametrize("extended", [False, True], ids=["simple", "extended"])


@pytest.fixture
def pair(proxy_for, pg: Postgres) -> RunningProxy:
    """A proxy with two server connections, both of which may be kept, on each version in turn."""
    return proxy_for(pg, max_size=2, max_pinned=2)


async def ties(proxy: RunningProxy, client: RawClient, *texts: str, extended: bool = False) -> None:
    """After these texts the client keeps its connection."""
    await tell(client, *texts, extended=extended)
    await until(lambda: pinned(proxy) == 1, f"{texts[-1]} pins")
    assert await pid_of(client) == await pid_of(client)


async def frees(proxy: RunningProxy, client: RawClient, *texts: str, extended: bool = False) -> None:
    """After these it does not."""
    await tell(client, *texts, extended=extended)
    await until(lambda: pinned(proxy) == 0, f"{texts[-1]} ends the pin")
    async with await proxy.client() as other:
        assert value(await other.query("SELECT 'served'")) == "served"


async def left_clean(proxy: RunningProxy, client: RawClient, end: str = "terminate") -> RawClient:
    """The client leaves what it has to a proxy with one connection; yields who comes next: it has the same one."""
    pid = await pid_of(client)
    await getattr(client, end)()
    other = await proxy.client()
    assert await pid_of(other) == pid
    assert pinned(proxy) == 0
    return other


# -- C12: advisory locks ------------------------------------------------------------------------------------------


@EXTENDED
@wire
async def test_C12_a_lock_of_a_session_stays_with_its_client_until_it_gives_it_back(pair, extended):
    async with await pair.client() as client, await pair.client() as other:
        await ties(pair, client, "SELECT pg_advisory_lock(12)", "SELECT pg_advisory_lock(12)", extended=extended)
        assert value(await other.query("SELECT pg_try_advisory_lock(12)")) == "f"
        assert pinned(pair) == 1, "who did not get it has nothing to keep"
        await tell(client, "SELECT pg_advisory_unlock(12)", extended=extended)
        assert value(await other.query("SELECT pg_try_advisory_lock(12)")) == "f", "it was taken twice"
        assert pinned(pair) == 1
        await frees(pair, client, "SELECT pg_advisory_unlock(12)", extended=extended)
        assert value(await other.query("SELECT pg_try_advisory_lock(12)")) == "t"
        await frees(pair, other, "SELECT pg_advisory_unlock_all()", extended=extended)


@pytest.mark.parametrize("end", ["COMMIT", "ROLLBACK", "SELECT 1/0; COMMIT", "ROLLBACK TO a; COMMIT"])
@wire
async def test_C12_it_outlives_its_transaction_and_one_of_a_transaction_does_not(pair, end):
    async with await pair.client() as client, await pair.client() as other:
        await tell(client, "BEGIN", "SAVEPOINT a", "SELECT pg_advisory_lock(12), pg_advisory_xact_lock(13)")
        await client.query(end)
        await client.query("ROLLBACK")
        await until(lambda: pinned(pair) == 1)
        assert value(await client.query(LOCKS)) == "1"
        assert value(await other.query("SELECT pg_try_advisory_lock(12)")) == "f"
        await frees(pair, client, "SELECT pg_advisory_unlock_all()")
        await tell(client, "BEGIN", "SELECT pg_advisory_xact_lock(12)")
        await frees(pair, client, end.split("; ")[-1])


@pytest.mark.parametrize("end", ENDS)
@wire
async def test_C12_what_its_client_has_left_locked_is_unlocked(single, end):
    async with await single.client() as client:
        await ties(single, client, "SELECT pg_try_advisory_lock_shared(12)", "SELECT pg_advisory_lock(1, 2)")
        async with await left_clean(single, client, end) as other:
            assert value(await other.query(LOCKS)) == "0"


# -- C13: temporary objects ---------------------------------------------------------------------------------------

TEMPORARY = {
    "table": ("CREATE TEMP TABLE c13 (id int)", "DROP TABLE c13"),
    "table, qualified": ("CREATE TABLE pg_temp.c13 (id int)", "DROP TABLE pg_temp.c13"),
    "table, deleting rows": ("CREATE LOCAL TEMPORARY TABLE c13 (id int) ON COMMIT DELETE ROWS", "DROP TABLE c13"),
    "table as": ("CREATE TEMP TABLE c13 AS SELECT 1 AS id", "DROP TABLE IF EXISTS c13"),
    "select into": ("SELECT 1 AS id INTO TEMP c13", "DROP TABLE c13"),
    "view": ("CREATE TEMP VIEW c13 AS SELECT 1 AS id", "DROP VIEW c13"),
    "view of what is temporary": (
        "CREATE TEMP TABLE c13t (id int); CREATE VIEW c13 AS TABLE c13t",
        "DROP TABLE c13t CASCADE",
    ),
    "sequence": ("CREATE TEMP SEQUENCE c13", "DROP SEQUENCE c13"),
    "function": (
        "CREATE FUNCTION pg_temp.c13() RETURNS int LANGUAGE sql AS 'SELECT 1'",
        "DROP FUNCTION pg_temp.c13()",
    ),
    "type": ("CREATE TYPE pg_temp.c13 AS ENUM ('a')", "DROP TYPE pg_temp.c13"),
    "domain": ("CREATE DOMAIN pg_temp.c13 AS int", "DROP DOMAIN pg_temp.c13"),
    "collation": ("CREATE COLLATION pg_temp.c13 (locale = 'C')", "DROP COLLATION pg_temp.c13"),
    "dictionary": (
        "CREATE TEXT SEARCH DICTIONARY pg_temp.c13 (template = simple)",
        "DROP TEXT SEARCH DICTIONARY pg_temp.c13",
    ),
    "operator": (
        "CREATE OPERATOR pg_temp.<<+>> (leftarg = int, rightarg = int, function = int4pl)",
        "DROP OPERATOR pg_temp.<<+>> (int, int)",
    ),
    "by search_path": ("SET search_path = pg_temp, public; CREATE TABLE c13 (id int)", "DROP TABLE c13"),
    "discarded": ("CREATE TEMP TABLE c13 (id int)", "DISCARD TEMP"),
    "in DO": ("DO $$BEGIN EXECUTE 'CREATE TEMP TABLE ' || 'c13 (id int)'; END$$", "DROP TABLE c13"),
}
LEFT = (
    "SELECT count(*) FROM pg_depend WHERE refclassid = 'pg_namespace'::regclass AND refobjid = pg_my_temp_schema()"
    " AND refobjid <> 0"
)


@EXTENDED
@pytest.mark.parametrize("kind", TEMPORARY)
@wire
async def test_C13_a_temporary_object_stays_with_its_client_until_it_is_dropped(single, kind, extended):
    create, drop = TEMPORARY[kind]
    async with await single.client() as client:
        await ties(single, client, *create.split("; ", 1 if "DO" not in create else 0), extended=extended)
        assert value(await client.query(LEFT)) != "0"
        await frees(single, client, drop, extended=extended)
        await ties(single, client, *create.split("; ", 1 if "DO" not in create else 0), extended=extended)
        async with await left_clean(single, client) as other:
            assert value(await other.query(LEFT)) == "0"
            assert await shown(other, "search_path") == '"$user", public'


@EXTENDED
@wire
async def test_C13_one_that_ends_with_its_transaction_keeps_nobody(single, extended):
    async with await single.client() as client:
        await tell(client, "BEGIN", "CREATE TEMP TABLE c13 ON COMMIT DROP AS SELECT 1 AS id", extended=extended)
        assert value(await client.query("SELECT id FROM c13")) == "1"
        await frees(single, client, "COMMIT", extended=extended)
        await tell(client, "BEGIN", "CREATE TEMP TABLE c13 (id int)", "SELECT * FROM c13", extended=extended)
        await frees(single, client, "ROLLBACK", extended=extended)
        await tell(client, "BEGIN", "SAVEPOINT a", "CREATE TEMP TABLE c13 (id int)", "ROLLBACK TO a")
        await frees(single, client, "COMMIT", extended=extended)
        await client.query("CREATE TEMP TABLE c13 (id int); SELECT 1/0")
        await frees(single, client, "SELECT 1")


@pytest.mark.parametrize("end", ENDS)
@wire
async def test_C13_a_table_that_hides_another_hides_it_from_its_client_only(single, pg, end):
    with roles_of(pg) as admin:
        admin.rows("CREATE TABLE c13 AS SELECT 'everybody' AS whose; GRANT ALL ON c13 TO app")
        try:
            async with await single.client() as client:
                await ties(single, client, "CREATE TEMP TABLE c13 AS SELECT 'mine' AS whose")
                assert value(await client.query("SELECT whose FROM c13")) == "mine"
                async with await left_clean(single, client, end) as other:
                    assert value(await other.query("SELECT whose FROM c13")) == "everybody"
        finally:
            admin.rows("DROP TABLE c13")


# -- C14: held cursors --------------------------------------------------------------------------------------------


@EXTENDED
@wire
async def test_C14_a_held_cursor_stays_with_its_client_until_it_is_closed(single, extended):
    declare = "DECLARE c14 NO SCROLL CURSOR WITH HOLD FOR SELECT generate_series(1, 3)"
    async with await single.client() as client:
        for close in ("CLOSE c14", "CLOSE ALL", "DISCARD ALL"):
            await ties(single, client, declare, extended=extended)
            assert rows(await client.query("FETCH 2 c14")) == [("1",), ("2",)]
            assert rows(await client.query("FETCH ALL c14")) == [("3",)]
            await frees(single, client, close, extended=extended)
            assert error(await client.query("FETCH c14"))["C"] == "34000"
        await tell(client, "BEGIN", declare, extended=extended)
        await ties(single, client, "COMMIT")
        async with await left_clean(single, client) as other:
            assert error(await other.query("FETCH c14"))["C"] == "34000"


@wire
async def test_C14_a_cursor_that_ends_with_its_transaction_keeps_nobody(single):
    async with await single.client() as client:
        for declare, end in (
            ("DECLARE c14 CURSOR FOR SELECT 1", "COMMIT"),
            ("DECLARE c14 CURSOR WITHOUT HOLD FOR SELECT 1", "COMMIT"),
            ("DECLARE c14 CURSOR WITH HOLD FOR SELECT 1", "ROLLBACK"),
        ):
            await tell(client, "BEGIN", declare, "FETCH c14")
            await frees(single, client, end)
            assert error(await client.query("FETCH c14"))["C"] == "34000"


# -- C15: LISTEN, in each client's own transactions ---------------------------------------------------------------


@EXTENDED
@wire
async def test_C15_who_listens_hears_everybody_until_it_listens_no_more(pair, extended):
    async with await pair.client() as client, await pair.client() as other:
        await tell(client, "LISTEN c15", extended=extended)
        await tell(other, "NOTIFY c15, 'first'", "SELECT pg_notify('c15', 'second')", extended=extended)
        heard = [(await client.until("A"))[-1].body[4:] for _ in range(2)]
        assert heard == [b"c15\0first\0", b"c15\0second\0"]
        await tell(client, "UNLISTEN c15", extended=extended)
        await tell(other, "NOTIFY c15, 'third'")
        for _ in range(2):
            assert kinds(await client.query("SELECT 1")) == "TDCZ"
        assert pinned(pair) == 0


@wire
async def test_C15_it_takes_effect_with_its_transaction(pair):
    async with await pair.client() as client, await pair.client() as other:
        await tell(client, "BEGIN", "LISTEN c15", "ROLLBACK")
        await tell(other, "NOTIFY c15, 'never'")
        assert kinds(await client.query("SELECT 1")) == "TDCZ"
        assert pinned(pair) == 0
        await tell(client, "BEGIN", "LISTEN c15", "SAVEPOINT a", "LISTEN c15b", "ROLLBACK TO a", "COMMIT")
        await tell(other, "BEGIN", "NOTIFY c15, 'rolled back'", "ROLLBACK", "NOTIFY c15b", "NOTIFY c15, 'heard'")
        assert (await client.until("A"))[-1].body[4:] == b"c15\0heard\0"
        await tell(client, "BEGIN", "UNLISTEN *", "ROLLBACK")
        await tell(other, "NOTIFY c15, 'still'")
        assert (await client.until("A"))[-1].body[4:] == b"c15\0still\0"


@pytest.mark.parametrize("end", ENDS)
@wire
async def test_C15_nobody_hears_what_another_had_listened_to(single, end):
    async with await single.client() as client:
        await tell(client, "LISTEN c15")
        await getattr(client, end)()
    async with await single.client() as other:
        assert value(await other.query("SELECT count(*) FROM pg_listening_channels()")) == "0"
        await other.query("NOTIFY c15, 'nobody'")
        assert kinds(await other.query("SELECT 1")) == "TDCZ"


# -- C16: sequences -----------------------------------------------------------------------------------------------


@pytest.fixture
def serial(pg: Postgres):
    """A table whose rows are numbered."""
    with roles_of(pg) as admin:
        admin.rows("CREATE TABLE c16 (id serial, v text); GRANT ALL ON c16, c16_id_seq TO app")
        try:
            yield
        finally:
            admin.rows("DROP TABLE c16")


@EXTENDED
@wire
async def test_C16_who_takes_a_number_keeps_its_connection_and_can_ask_for_it(pair, serial, extended):
    async with await pair.client() as client, await pair.client() as other:
        await ties(pair, client, "SELECT nextval('c16_id_seq')", extended=extended)
        await tell(other, "INSERT INTO c16 (v) VALUES ('other')")
        for ask in ("SELECT lastval()", "SELECT currval('c16_id_seq')"):
            assert value(await client.query(ask)) == "1"
        await frees(pair, client, "DISCARD SEQUENCES", extended=extended)
        assert error(await client.query("SELECT lastval()"))["C"] == "55000"
        await ties(pair, client, "SELECT setval('c16_id_seq', 40)", extended=extended)
        assert value(await client.query("SELECT currval('c16_id_seq')")) == "40"
        await frees(pair, client, "DISCARD ALL", extended=extended)
        assert error(await client.query("SELECT currval('c16_id_seq')"))["C"] == "55000"


@EXTENDED
@wire
async def test_C16_what_only_clears_and_fails_keeps_nobody(pair, extended):
    """DISCARD ALL is refused in a transaction."""
    async with await pair.client() as client:
        await tell(client, "BEGIN")
        await client.send(run("DISCARD ALL") + SYNC if extended else query("DISCARD ALL"))
        assert error(await client.until_ready())["C"] == "25001"
        await tell(client, "ROLLBACK")
        assert pinned(pair) == 0


@wire
async def test_C16_discarding_what_is_not_there_keeps_nobody(single):
    async with await single.client() as client:
        for text in (
            "DISCARD SEQUENCES",
            "DISCARD PLANS",
            "DISCARD TEMP",
            "UNLISTEN *",
            "CLOSE ALL",
            "DEALLOCATE ALL",
        ):
            await frees(single, client, text)
            await frees(single, client, text, extended=True)


@pytest.mark.parametrize("ask", ["SELECT lastval()", "SELECT currval('c16_id_seq')"])
@pytest.mark.parametrize(
    "how", ["simple", "in a transaction", "pipelined", "in a batch", "prepared", "behind a SELECT", "EXECUTE"]
)
@wire
async def test_C16a_nobody_is_told_a_number_that_another_has_taken(single, serial, how, ask):
    """An INSERT takes it unseen. To fail is honest: the connection is another's by now."""
    async with await single.client() as client, await single.client() as other:
        await other.send(parse("s", ask) + SYNC)
        await other.until_ready()
        await tell(client, "INSERT INTO c16 (v) VALUES ('mine')")
        if how == "EXECUTE":
            await tell(other, "PREPARE p AS " + ask)
            await tell(client, "INSERT INTO c16 (v) VALUES ('mine')")
            answer = await other.query("EXECUTE p")
        elif how == "simple":
            answer = await other.query(ask)
        elif how == "in a transaction":
            await tell(other, "BEGIN")
            answer = await other.query(ask)
        elif how == "pipelined":
            await other.send(query("SELECT 'first'") + query(ask))
            answer = await other.trace(2)
        elif how == "in a batch":
            await other.send(run("SELECT 'first'") + run(ask) + SYNC)
            answer = await other.until_ready()
        elif how == "prepared":
            await other.send(query("BEGIN") + again("s") + SYNC)
            answer = await other.trace(2)
        else:
            await tell(other, "SELECT 1")
            answer = await other.query(ask)
        assert [fields["C"] for fields in errors(answer)] == ["55000"]
        await other.query("ROLLBACK")


@pytest.mark.parametrize("begin", [b"", query("BEGIN")], ids=["batch", "transaction"])
@wire
async def test_C16a_the_first_to_ask_is_told_no_other_number_either(single, serial, begin):
    """In a batch that has begun, which goes on behind what is left out."""
    async with await single.client() as client, await single.client() as other:
        await tell(client, "INSERT INTO c16 (v) VALUES ('mine')")
        await other.send(begin + run("SELECT 'first'") + run("SELECT currval('c16_id_seq')") + SYNC)
        answer = await other.trace(1 + bool(begin))
        assert [fields["C"] for fields in errors(answer)] == ["55000"]
        await other.query("ROLLBACK")
        await tell(client, "INSERT INTO c16 (v) VALUES ('more')")
        await other.send(run("SELECT 'first'") + parse("s", "SELECT lastval()") + run("SELECT 'last'") + SYNC)
        assert rows(await other.until_ready()) == [("first",), ("last",)]


@wire
async def test_C16a_what_a_view_has_taken_is_told_nobody(single, serial):
    async with await single.client() as client, await single.client() as other:
        await other.query("SELECT lastval()")
        with roles_of(single.server) as admin:
            admin.rows("CREATE VIEW c16_v AS SELECT nextval('c16_id_seq'); GRANT ALL ON c16_v TO app")
            try:
                await tell(client, "SELECT * FROM c16_v")
                assert error(await other.query("SELECT lastval()"))["C"] == "55000"
            finally:
                admin.rows("DROP VIEW c16_v")


@pytest.mark.parametrize(
    ("made", "ask"),
    [
        ("FUNCTION c16_f() RETURNS bigint LANGUAGE sql AS 'SELECT lastval()'", "SELECT c16_f()"),
        ("FUNCTION c16_f() RETURNS bigint LANGUAGE sql RETURN lastval()", "SELECT c16_f()"),
        ("VIEW c16_f AS SELECT currval('c16_id_seq')", "SELECT * FROM c16_f"),
    ],
    ids=["text", "body", "view"],
)
@wire
async def test_C16a_code_that_asks_is_told_no_other_number(proxy_for, pg, serial, made, ask):
    with roles_of(pg) as admin:
        admin.rows(f"CREATE {made}; GRANT ALL ON ALL TABLES IN SCHEMA public TO app")
        try:
            proxy = proxy_for(pg, max_size=1)
            async with await proxy.client() as client, await proxy.client() as other:
                await tell(client, "INSERT INTO c16 (v) VALUES ('mine')")
                assert error(await other.query(ask))["C"] == "55000"
        finally:
            admin.rows("DROP " + " ".join(made.split()[:2]).removesuffix("()"))


@wire
async def test_C16a_who_keeps_its_connection_for_a_number_has_its_own_only(single, serial):
    async with await single.client() as client, await single.client() as other:
        await tell(client, "INSERT INTO c16 (v) VALUES ('mine')")
        await ties(single, other, "SELECT setval('c16_id_seq', 40, false)")
        assert error(await other.query("SELECT lastval()"))["C"] == "55000"
        await tell(other, "SELECT nextval('c16_id_seq')")
        assert value(await other.query("SELECT lastval()")) == "40"


@EXTENDED
@wire
async def test_C16a_within_its_transaction_a_client_is_told_its_own(single, serial, extended):
    async with await single.client() as client, await single.client() as other:
        for number in (1, 3, 5):
            await tell(client, "BEGIN", "INSERT INTO c16 (v) VALUES ('mine')", extended=extended)
            await client.send(run("SELECT lastval(), currval('c16_id_seq')") + SYNC)
            assert rows(await client.until_ready()) == [(str(number), str(number))]
            await tell(client, "COMMIT")
            await tell(other, "INSERT INTO c16 (v) VALUES ('other')")
        answer = await client.query("INSERT INTO c16 (v) VALUES ('x'); SELECT lastval()")
        assert value(answer) == "7"


# -- C17: what cannot be undone, and prepared by SQL --------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["SELECT setseed(0.5)", "SET seed = 0.5", "SELECT set_config('seed', '0.5', true)"]
)
@wire
async def test_C17_a_connection_whose_process_was_changed_is_closed_after_its_client(single, text):
    async with await single.client() as client:
        pid = await pid_of(client)
        await ties(single, client, text)
        first = value(await client.query("SELECT random()"))
        await tell(client, text, "RESET ALL")
        assert value(await client.query("SELECT random()")) == first
        assert await pid_of(client) == pid
        await client.terminate()
        async with await single.client() as other:
            assert await pid_of(other) != pid
            assert pinned(single) == 0


@wire
async def test_C17_so_is_one_that_has_loaded_a_library(proxy_for, pg):
    superuser = {"user": "postgres", "password": pg.password}
    proxy = proxy_for(pg, max_size=1, users={"postgres": {"password": pg.password}})
    async with await proxy.client(**superuser) as client:
        pid = await pid_of(client)
        await ties(proxy, client, "LOAD 'plpgsql'")
        await client.terminate()
        async with await proxy.client(**superuser) as other:
            assert await pid_of(other) != pid


@wire
async def test_C15_a_notification_that_comes_while_the_server_is_asked_is_the_clients(single, pg):
    async with await single.client() as client, await RawClient.connect((pg.host, pg.port)) as other:
        await other.startup(pg.user, pg.database, pg.password)
        await client.query("LISTEN c15")
        answers = []
        for number in range(100):
            other.feed(query(f"NOTIFY c15, '{number}'"))
            answers += await client.query("SET work_mem = '5MB'")
        await other.trace(100)
        while kinds(answers).count("A") < 100:
            answers += await client.query("SELECT 1")
        told = [message.body[4:] for message in answers if message.kind == "A"]
        assert told == [b"c15\0%d\0" % number for number in range(100)]


@EXTENDED
@wire
async def test_C17_prepared_by_sql_goes_with_its_client_until_it_is_deallocated(single, extended):
    async with await single.client(params={"DateStyle": "German"}) as client:
        for deallocate in ("DEALLOCATE c17", "DEALLOCATE ALL", "DISCARD ALL"):
            await frees(single, client, "PREPARE c17 AS SELECT 17", extended=extended)
            assert value(await client.query("EXECUTE c17")) == "17"
            await tell(
                client, "SET DateStyle = 'SQL'", "SET work_mem = '5MB'", "RESET DateStyle", extended=extended
            )
            assert await shown(client, "DateStyle", "work_mem") == ["German, DMY", "5MB"]
            await frees(single, client, deallocate, extended=extended)
            assert error(await client.query("EXECUTE c17"))["C"] == "26000"
            await tell(client, "RESET work_mem")
            assert await shown(client, "DateStyle", "work_mem") == ["German, DMY", "4MB"]
        await frees(single, client, "PREPARE c17 AS SELECT 17", extended=extended)
        async with await left_clean(single, client) as other:
            assert error(await other.query("EXECUTE c17"))["C"] == "26000"


@wire
async def test_C17_names_by_sql_and_by_protocol_are_the_clients_own(single):
    async with await single.client() as client, await single.client() as other:
        for owner in (client, other):
            await owner.send(parse("s", f"SELECT '{'mine' if owner is client else 'other'}'") + SYNC)
            assert kinds(await owner.until_ready()) == "1Z"
        assert value(await client.query("EXECUTE s")) == "mine"
        await frees(single, client, "DEALLOCATE s")
        await client.send(again("s") + SYNC)
        assert error(await client.until_ready())["C"] == "26000"
        await other.send(again("s") + SYNC)
        assert value(await other.until_ready()) == "other"


# -- C21: what cleaning costs -------------------------------------------------------------------------------------


@wire
async def test_C21_settings_are_left_as_they_are_to_who_wants_the_same(single):
    """Nothing is discarded: neither plans nor prepared statements, and equal settings cost nothing."""
    async with await single.client(params={"work_mem": "6MB"}) as first:
        pid = await pid_of(first)
        await first.send(parse("s", "SELECT 'C21'") + SYNC)
        await first.until_ready()
        await tell(first, "SET search_path = mine")
        assert await pid_of(first) == pid
        await first.terminate()
    async with await single.client(params={"work_mem": "6MB"}) as second, await single.client() as third:
        await tell(second, "SET search_path = mine")
        before = conversions(single)
        assert await shown(second, "work_mem", "search_path") == ["6MB", "mine"]
        assert conversions(single) == before
        kept = "SELECT count(*) FROM pg_prepared_statements WHERE statement = 'SELECT ''C21'''"
        assert value(await third.query(kept)) == "1"
        assert await shown(third, "work_mem", "search_path") == ["4MB", '"$user", public']
        assert await pid_of(second) == await pid_of(third) == pid


@wire
async def test_C21_a_connection_that_had_to_be_cleaned_is_kept_and_known_to_be_empty(single):
    async with await single.client(params={"work_mem": "6MB"}) as client, await single.client() as other:
        for owner in (client, other):
            await owner.send(parse("s", "SELECT 'C21'") + SYNC)
            await owner.until_ready()
        await ties(single, client, "CREATE TEMP TABLE c21 (id int)", "SET app.tenant = 'mine'", "LISTEN c21")
        pid = await pid_of(client)
        await client.terminate()
        assert await pid_of(other) == pid
        assert await shown(other, "work_mem", "app.tenant") == ["4MB", ""]
        await other.send(again("s") + SYNC)
        assert value(await other.until_ready()) == "C21", "it is prepared again"


CLEARING = (
    "RESET ALL",
    "DISCARD ALL",
    "DISCARD TEMP",
    "DISCARD SEQUENCES",
    "DISCARD PLANS",
    "DEALLOCATE ALL",
    "UNLISTEN *",
    "UNLISTEN c21",
    "CLOSE ALL",
    "SELECT pg_advisory_unlock_all()",
    "DROP TABLE IF EXISTS c21",
    "SELECT pg_advisory_unlock_all(); CLOSE ALL; UNLISTEN *; RESET ALL",
)


@pytest.mark.parametrize("options", [{"max_pinned": 1}, {"unsafe": "refuse"}], ids=["all are kept", "none may be"])
@wire
async def test_C21_who_only_cleans_up_is_never_refused(proxy_for, pg, options):
    """Drivers send these whenever a connection goes back to their own pool, without anything to clean."""
    proxy = proxy_for(pg, max_size=2, **options)
    async with await proxy.client() as holder, await proxy.client() as client:
        if "max_pinned" in options:
            await ties(proxy, holder, "SELECT pg_advisory_lock(21)")
        for text in CLEARING:
            await tell(client, text)
            if ";" not in text:
                await tell(client, text, extended=True)
        assert pinned(proxy) == ("max_pinned" in options)


BOUNDS = pytest.mark.parametrize(
    "options", [{"max_pinned": 1}, {"unsafe": "refuse"}], ids=["all are kept", "none may be"]
)


@BOUNDS
@EXTENDED
@wire
async def test_C21_no_more_are_kept_than_may_be_by_what_runs_in_a_transaction_either(
    proxy_for, pg, options, extended
):
    proxy = proxy_for(pg, max_size=2, **options)
    text = "CREATE TEMP TABLE c21 (x int)"
    async with await proxy.client() as holder, await proxy.client() as client:
        if "max_pinned" in options:
            await ties(proxy, holder, "SELECT pg_advisory_lock(21)")
        await tell(client, "BEGIN", "SELECT 1")
        await client.send(run(text) + run("SELECT 1") + SYNC if extended else query(text))
        refused = await client.until_ready()
        assert kinds(refused) == ("1EZ" if extended else "EZ")
        assert error(refused)["C"] == "53300"
        assert "max_pinned" in error(refused)["M"] or "unsafe = refuse" in error(refused)["M"]
        await client.send(run(text) + SYNC if extended else query(text))
        assert error(await client.until_ready())["C"] == "25P02"
        await tell(client, "ROLLBACK")
        await tell(client, "SELECT 1", extended=extended)
        assert pinned(proxy) == ("max_pinned" in options)


@wire
async def test_C21_a_batch_of_which_a_part_is_refused_is_undone(proxy_for, pg):
    proxy = proxy_for(pg, max_size=2, unsafe="refuse")
    async with await proxy.client() as client:
        await client.send(run("CREATE TABLE c21 (x int)") + parse("t", "CREATE TEMP TABLE t (x int)") + SYNC)
        assert kinds(await client.until_ready()) == "12nC1Z"
        await client.send(run("INSERT INTO c21 VALUES (1)") + again("t") + run("SELECT 1") + SYNC)
        refused = await client.until_ready()
        assert kinds(refused) == "12nCEZ"
        assert error(refused)["C"] == "53300"
        assert value(await client.query("SELECT count(*) FROM c21")) == "0"
        await tell(client, "DROP TABLE c21")


@BOUNDS
@pytest.mark.parametrize(
    "body", ["PERFORM pg_advisory_lock(22)", "CREATE TEMP TABLE c21 (x int)"], ids=["lock", "table"]
)
@wire
async def test_C21_who_turns_out_to_have_something_when_no_more_may_be_kept_is_sent_away(
    proxy_for, pg, options, body
):
    """A text does not show what a block does; and what it has done can be carried nowhere."""
    proxy = proxy_for(pg, max_size=2, **options)
    async with await proxy.client() as holder, await proxy.client() as other, await proxy.client() as client:
        if "max_pinned" in options:
            await ties(proxy, holder, "SELECT pg_advisory_lock(21)")
        assert kinds(await client.query(f"DO $$BEGIN {body}; END$$")) == "CZ"
        sent_away = await client.closed()
        assert kinds(sent_away) == "E"
        assert error(sent_away)["S"] == "FATAL"
        assert error(sent_away)["C"] == "53300"
        assert value(await other.query(LOCKS)) == str(int("max_pinned" in options))
        assert value(await other.query("SELECT to_regclass('c21')")) is None
        assert pinned(proxy) == ("max_pinned" in options)
        kept = proxy.call(lambda: [what for pool in proxy.pools() for what, _ in pool.ledger])
        assert any(what.startswith("refused: ") for what in kept)


@EXTENDED
@wire
async def test_C21_so_is_who_sends_what_is_too_long_to_be_read(proxy_for, pg18, extended):
    proxy = proxy_for(pg18, max_size=2, unsafe="refuse")
    text = f"SELECT length('{'x' * 2_000_000}')"
    async with await proxy.client() as client, await proxy.client() as other:
        await client.send(run(text) + SYNC if extended else query(text))
        sent_away = await client.closed()
        assert kinds(sent_away) == "E"
        assert error(sent_away)["C"] == "53300"
        await tell(other, "SELECT 1")
        assert pinned(proxy) == 0


@wire
async def test_C11_what_its_user_may_not_set_is_kept_and_goes_when_it_is_reset(pair, pg):
    """A function has set it with its owner's rights: nobody could set it on another connection."""
    with roles_of(pg) as admin:
        admin.rows(
            "CREATE FUNCTION c11(value text) RETURNS text SECURITY DEFINER LANGUAGE sql AS "
            "$$SELECT set_config('session_replication_role', value, false)$$"
        )
        try:
            async with await pair.client() as client, await pair.client() as other:
                for end in ("DO $$BEGIN PERFORM c11('origin'); END$$", "RESET ALL", "DISCARD ALL"):
                    await ties(pair, client, "DO $$BEGIN PERFORM c11('replica'); END$$")
                    assert await shown(client, "session_replication_role") == "replica"
                    assert await shown(other, "session_replication_role") == "origin"
                    assert pair.call(lambda: pair.pools()[0].pins["settings"]) > 0
                    await frees(pair, client, end)
                    assert await shown(client, "session_replication_role") == "origin"
                await tell(client, "DO $$BEGIN PERFORM c11('replica'); END$$")
            async with await pair.client() as one, await pair.client() as two:
                for client in (one, two):
                    assert await shown(client, "session_replication_role") == "origin"
        finally:
            admin.rows("DROP FUNCTION c11")


@wire
async def test_C11_what_its_user_was_given_the_right_to_set_is_carried(pair, pg):
    with roles_of(pg) as admin:
        admin.rows("GRANT SET ON PARAMETER log_min_messages TO app")
        try:
            async with await pair.client() as client:
                await tell(client, "SET log_min_messages = error")
                async with elsewhere(pair, client):
                    assert await shown(client, "log_min_messages") == "error"
        finally:
            admin.rows("REVOKE SET ON PARAMETER log_min_messages FROM app")
