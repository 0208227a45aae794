"""Group B, when prepared statements change under their clients: by SQL, and by DDL."""

import psycopg
import pytest
from proxy_kit import RunningProxy, until, wire
from scripts_BD import INT4, SYNC, again, bind, close, describe, execute, parse, query, run
from state_kit import elsewhere, pid_of, pinned

from cenote.testing.wire import Message, RawClient, error, errors, kinds, rows, value

pytest_plugins = ["fixtures_BD"]

PID = "SELECT pg_backend_pid()"


@pytest.fixture
def single(proxy_for, pg18) -> RunningProxy:
    """One server connection for all."""
    return proxy_for(pg18, max_size=1)


@pytest.fixture
def changing(admin):
    """A table that a test may alter."""
    admin.rows("DROP TABLE IF EXISTS b19; CREATE TABLE b19 AS SELECT 1 AS id; ALTER TABLE b19 OWNER TO app")
    yield "b19"
    admin.rows("DROP TABLE IF EXISTS b19")


async def ask(client: RawClient, *parts: bytes) -> list[Message]:
    """The answer to a batch; the Sync is added."""
    await client.send(*parts, SYNC)
    return await client.until_ready()


# -- B17, B18: prepared statements by SQL ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["DEALLOCATE a", "DEALLOCATE ALL", "DISCARD ALL", "DISCARD PLANS", "DISCARD TEMP"]
)
@wire
async def test_B17_deallocate_and_discard_act_on_this_clients_statements(everywhere, text):
    said = await everywhere.batches(
        parse("a", "SELECT 'mine'") + parse("b", "SELECT 'mine too'") + SYNC,
        again("a") + SYNC,
        query(text),
        again("a") + SYNC,
        again("b") + SYNC,
        parse("c", "SELECT 'new'") + again("c") + SYNC,
        parse("a", "SELECT 'anew'") + again("a") + SYNC,
    )
    gone = text not in ("DISCARD PLANS", "DISCARD TEMP")
    assert ("26000" in {fields["C"] for fields in errors(said)}) == gone


@wire
async def test_B17_deallocate_of_an_unknown_name_is_the_servers_error(everywhere):
    said = await everywhere.batches(
        query("DEALLOCATE nothing"),
        parse("a", "SELECT 'still'") + SYNC,
        query("DEALLOCATE nothing"),
        again("a") + SYNC,
    )
    assert [fields["C"] for fields in errors(said)] == ["26000", "26000"]
    assert rows(said) == [("still",)]


@pytest.mark.parametrize("text", ["DEALLOCATE ALL", "DISCARD ALL", "BEGIN; DEALLOCATE ALL; COMMIT"])
@wire
async def test_B17_what_one_client_drops_is_not_dropped_for_the_others(single, text):
    sql = "SELECT 'shared by B17'"
    async with await single.client() as first, await single.client() as second:
        for client in (first, second):
            await client.send(parse("a", sql), SYNC)
            assert kinds(await client.until_ready()) == "1Z"
        assert "E" not in kinds(await second.query(text))
        await second.send(again("a"), SYNC)
        assert error(await second.until_ready())["C"] == "26000"
        await second.terminate()
        await first.send(again("a"), SYNC)
        assert value(await first.until_ready()) == "shared by B17"


@wire
async def test_B18_prepare_and_execute_by_sql(everywhere):
    said = await everywhere.batches(
        query("PREPARE p (int) AS SELECT $1 * 2"),
        query("EXECUTE p (21)"),
        query("EXPLAIN (COSTS OFF) EXECUTE p (1)"),
        query("CREATE TEMP TABLE copied AS EXECUTE p (4)"),
        query('SELECT sum("?column?") FROM copied'),
        query("PREPARE p AS SELECT 1"),
        query("DEALLOCATE p"),
        query("EXECUTE p (1)"),
    )
    assert [row for row in rows(said) if row[0] in ("42", "8")] == [("42",), ("8",)]
    assert [fields["C"] for fields in errors(said)] == ["42P05", "26000"]


@wire
async def test_B18_sql_and_the_protocol_have_the_same_names(everywhere):
    said = await everywhere.batches(
        parse("a", "SELECT 'by the protocol'") + parse("", "SELECT 'unnamed'") + SYNC,
        query("EXECUTE a"),
        query("PREPARE s AS SELECT 'by SQL'"),
        describe("s") + again("s") + SYNC,
        parse("s", "SELECT 'once more'") + SYNC,
        close("s") + SYNC,
        query("EXECUTE s"),
        again("a") + SYNC,
    )
    assert ("by the protocol",) in rows(said)
    assert [fields["C"] for fields in errors(said)] == ["42P05", "26000"]


@wire
async def test_B18_prepare_by_sql_in_an_extended_batch_and_in_a_transaction(everywhere):
    said = await everywhere.batches(
        parse("a", "SELECT 'mine'") + SYNC,
        run("PREPARE s AS SELECT 'in a batch'") + SYNC,
        again("s") + SYNC,
        query("BEGIN; PREPARE b AS SELECT 'kept'; ROLLBACK"),
        query("EXECUTE b"),
        again("a") + again("b") + SYNC,
    )
    assert [row[0] for row in rows(said)] == ["in a batch", "kept", "mine", "kept"]


@wire
async def test_B18_what_a_client_prepares_by_sql_is_on_whatever_connection_it_has(proxy_for, pg18):
    """And on none that somebody else has."""
    proxy = proxy_for(pg18, max_size=2)
    async with await proxy.client() as client, await proxy.client() as other:
        await client.query("PREPARE p AS " + PID)
        assert (value(await client.query("EXECUTE p")) or "").isdigit()
        await proxy.reached(leased=0, resetting=0)
        assert error(await other.query("EXECUTE p"))["C"] == "26000"
        async with elsewhere(proxy, client):
            assert value(await client.query("EXECUTE p")) == await pid_of(client)
        await other.query("PREPARE p AS SELECT 'other'")
        assert (value(await client.query("EXECUTE p")) or "").isdigit()
        assert value(await other.query("EXECUTE p")) == "other"
        await client.send(again("p"), SYNC)
        assert (value(await client.until_ready()) or "").isdigit()
        assert "E" not in kinds(await client.query("DEALLOCATE p"))
        assert error(await client.query("EXECUTE p"))["C"] == "26000"
        assert value(await other.query("EXECUTE p")) == "other"


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("/* one */ PREPARE p AS SELECT 'it''s'; SELECT 2", "p"),
        ("SELECT 1; PREPARE \"P q\" (int) AS SELECT 'it''s'::text WHERE $1 = 1", '"P q" (1)'),
        ("BEGIN; PREPARE p AS SELECT 'it''s'; ROLLBACK", "p"),
        ("prepare P as\n-- a comment\nselect $$it's$$", "p"),
    ],
)
@wire
async def test_B18_a_statement_prepared_among_others_is_carried_alone(proxy_for, pg18, text, name):
    proxy = proxy_for(pg18, max_size=1)
    async with await proxy.client() as client, await proxy.client() as other:
        assert "E" not in kinds(await client.query(text))
        await proxy.reached(leased=0)
        for _ in range(2):
            assert value(await other.query(PID))
            assert value(await client.query(f"EXECUTE {name}")) == "it's"


@wire
async def test_B18_what_an_executed_statement_sets_is_its_clients(proxy_for, pg18):
    """EXECUTE shows nothing of what it runs."""
    proxy = proxy_for(pg18, max_size=1)
    async with await proxy.client() as client, await proxy.client() as other:
        await client.query("PREPARE p AS SELECT set_config('app.b18', 'mine', false), set_config($1, $2, false)")
        assert "E" not in kinds(await client.query("EXECUTE p ('work_mem', '7MB')"))
        assert "E" not in kinds(await client.query("EXECUTE p ('app.more', '8')"))
        shown = "SELECT concat_ws('|', current_setting('app.b18', true), current_setting('work_mem'))"
        assert value(await other.query(shown)) in ("4MB", "|4MB")
        assert value(await client.query(shown)) == "mine|7MB"
        assert value(await other.query("SELECT coalesce(current_setting('app.more', true), '')")) == ""
        assert "E" not in kinds(await client.query("EXECUTE p ('app.' || 'computed', '9')"))
        await until(lambda: pinned(proxy) == 1, "a computed name pins")


@wire
async def test_B18_what_is_prepared_amid_other_settings_is_nobody_elses(proxy_for, pg18):
    text = "PREPARE p AS SELECT '2020-01-02 00:00'::timestamptz::text"
    proxy = proxy_for(pg18, max_size=2)
    async with await proxy.client() as client, await proxy.client() as other:
        await other.query(text)
        wanted = value(await other.query("EXECUTE p"))
        await client.query("BEGIN; SET LOCAL TimeZone = 'Asia/Tokyo'; " + text + "; COMMIT")
        for _ in range(2):
            async with elsewhere(proxy, other):
                assert value(await other.query("EXECUTE p")) == wanted
            assert value(await client.query("EXECUTE p")) == wanted  # prepared anew, under what it has now
        assert pinned(proxy) == 0


@wire
async def test_B18_a_statement_whose_table_is_gone_fails_for_its_client_alone(proxy_for, pg18, changing):
    proxy = proxy_for(pg18, max_size=1)
    async with await proxy.client() as client, await proxy.client() as other:
        await client.query(f"PREPARE p AS SELECT * FROM {changing}")
        await client.query("PREPARE q AS SELECT 'still'")
        await other.query(f"DROP TABLE {changing}")
        assert value(await other.query("SELECT 'fine'")) == "fine"
        assert error(await client.query("EXECUTE p"))["C"] in ("26000", "42P01")
        assert value(await client.query("EXECUTE q")) == "still"


# -- B19 -----------------------------------------------------------------------------------------------------

ALL = "SELECT * FROM b19"
ADD = "ALTER TABLE b19 ADD COLUMN more int DEFAULT 2"


@wire
async def test_B19_a_plan_whose_result_changed_is_made_anew_without_the_clients_knowing(single, changing):
    async with await single.client() as client, await single.client() as other:
        for each in (client, other):
            await ask(each, parse("s", ALL))
            assert rows(await ask(each, again("s"))) == [("1",)]
        await client.query(ADD)
        for each in (client, other, client):
            answer = await ask(each, again("s"))
            assert kinds(answer) == "2TDCZ", errors(answer)
            assert rows(answer) == [("1", "2")]


@wire
async def test_B19_behind_a_query_of_ours_too(single, changing):
    """Who asks for a number makes each client that comes begin with a DISCARD SEQUENCES."""
    async with await single.client() as client, await single.client() as other:
        await ask(client, parse("s", "SELECT * FROM b19"), again("s"))
        await other.query("SELECT lastval()")
        await other.query("ALTER TABLE b19 ADD more int")
        for _ in range(2):
            assert rows(await ask(client, again("s"))) == [("1", None)]


@wire
async def test_B19_on_every_server_connection(proxy_for, pg18, changing):
    proxy = proxy_for(pg18, max_size=2)
    async with await proxy.client() as client, await proxy.client() as holder:
        await ask(client, parse("s", ALL), again("s"))
        await holder.query("BEGIN")
        assert rows(await ask(client, again("s"))) == [("1",)]
        await holder.query("ROLLBACK")
        for _ in range(2):
            await client.query("ALTER TABLE b19 ADD COLUMN more int")
            assert rows(await ask(client, again("s"))) == [("1", None)]
            await holder.query("BEGIN")
            assert rows(await ask(client, again("s"))) == [("1", None)]
            await holder.query("ROLLBACK")
            await client.query("ALTER TABLE b19 DROP COLUMN more")
            assert rows(await ask(client, again("s"))) == [("1",)]


@wire
async def test_B19_what_is_done_anew_is_done_once(single, changing):
    async with await single.client() as client:
        await ask(client, parse("s", "INSERT INTO b19 VALUES ($1) RETURNING *", INT4), again("s", "10"))
        await client.query(ADD)
        answer = await ask(client, again("s", "20"))
        assert rows(answer) == [("20", "2")]
        assert rows(await client.query("SELECT id FROM b19 ORDER BY id")) == [("1",), ("10",), ("20",)]


@wire
async def test_B19_without_describe_the_error_is_passed_on_once(single, changing):
    """Whoever did not ask for the description would take the new rows for the old ones."""
    async with await single.client() as client, await single.client() as other:
        for each in (client, other):
            await ask(each, parse("s", ALL), again("s"))
        await client.query(ADD)
        told = error(await ask(client, bind("s"), execute()))
        assert (told["C"], told["M"]) == ("0A000", "cached plan must not change result type")
        assert rows(await ask(client, parse("t", ALL), bind("t"), execute())) == [("1", "2")]
        assert kinds(await ask(client, close("s"), parse("s", ALL), again("s"))) == "312TDCZ"
        assert rows(await ask(other, again("s"))) == [("1", "2")]


@wire
async def test_B19_in_a_transaction_the_error_is_passed_on(single, changing):
    async with await single.client() as client:
        await ask(client, parse("s", ALL), again("s"))
        await client.query(ADD)
        await client.query("BEGIN")
        answer = await ask(client, again("s"))
        assert error(answer)["C"] == "0A000"
        assert answer[-1].body == b"E"
        assert error(await client.query("SELECT 1"))["C"] == "25P02"
        await client.query("ROLLBACK")
        assert rows(await ask(client, parse("t", ALL), again("t"))) == [("1", "2")]
        assert rows(await ask(client, again("s"))) == [("1", "2")]


@wire
async def test_B19_when_something_has_run_before_it_in_the_batch_the_error_is_passed_on(single, changing):
    async with await single.client() as client:
        await ask(client, parse("s", ALL), parse("i", "INSERT INTO b19 VALUES (5)"), again("s"))
        await client.query(ADD)
        answer = await ask(client, again("i"), again("s"))
        assert error(answer)["C"] == "0A000"
        assert rows(await client.query("SELECT id FROM b19")) == [("1",)]
        assert rows(await ask(client, again("i"), again("s"))) == [("1", "2"), ("5", "2")]


@wire
async def test_B19_what_was_sent_behind_it_is_answered_behind_it(single, changing):
    async with await single.client() as client:
        for _ in range(2):
            await ask(client, parse("s", ALL), again("s"))
            await client.query(ADD)
            await client.send(again("s"), SYNC, query("SELECT 'behind'"), run("SELECT 'and more'"), SYNC)
            answer = await client.trace(3)
            assert [row[0] for row in rows(answer)][-2:] == ["behind", "and more"]
            assert kinds(answer) in ("2TDCZ" + "TDCZ" + "12TDCZ", "EZ" + "TDCZ" + "12TDCZ")
            assert rows(await ask(client, again("s"))) == [("1", "2")]
            await client.query("ALTER TABLE b19 DROP COLUMN more")
            await ask(client, close("s"))


def test_B19_a_driver_that_prepares_never_hears_of_it(single, changing):
    with psycopg.connect(single.dsn, autocommit=True, prepare_threshold=0) as conn:
        for columns in range(1, 5):
            assert len(conn.execute(ALL).fetchone()) == columns
            conn.execute(f"ALTER TABLE b19 ADD COLUMN more_{columns} int")


# -- B20 -----------------------------------------------------------------------------------------------------


@wire
async def test_B20_statements_go_on_when_an_enum_grows(proxy_for, pg):
    """On the server connection where the type was changed, and on the other one."""
    proxy = proxy_for(pg, max_size=2)
    async with await proxy.client() as client, await proxy.client() as holder:
        await client.query("DROP TYPE IF EXISTS b_mood; CREATE TYPE b_mood AS ENUM ('fine')")
        await ask(client, parse("s", "SELECT $1::b_mood::text"), again("s", "fine"))
        await holder.query("BEGIN")
        assert value(await ask(client, again("s", "fine"))) == "fine"
        await holder.query("COMMIT")
        for change, good, bad in (
            ("ADD VALUE 'better'", "better", "good"),
            ("RENAME VALUE 'fine' TO 'good'", "good", "fine"),
        ):
            await client.query("ALTER TYPE b_mood " + change)
            for end in ("BEGIN", "COMMIT"):
                assert value(await ask(client, again("s", good))) == good
                assert error(await ask(client, again("s", bad)))["C"] == "22P02"
                await holder.query(end)
        await client.query("DROP TYPE b_mood")


@wire
async def test_B20_when_a_type_is_made_anew_the_next_parse_sees_the_new_one(single, admin):
    """The backend has the old statement still, for the old type: nobody may be given that one again."""
    admin.rows("DROP TYPE IF EXISTS b20_mood")
    text = "SELECT $1::b20_mood::text"
    async with await single.client() as client, await single.client() as other:
        await client.query("CREATE TYPE b20_mood AS ENUM ('old')")
        assert value(await ask(client, parse("s", text), again("s", "old"))) == "old"
        await client.query("DROP TYPE b20_mood; CREATE TYPE b20_mood AS ENUM ('new')")
        assert kinds(await ask(client, again("s", "new"))) in ("EZ", "2TDCZ")
        await ask(client, close("s"))
        assert rows(await ask(client, parse("s", text), again("s", "new"))) == [("new",)]
        assert rows(await ask(other, parse("mine", text), again("mine", "new"))) == [("new",)]
        await client.query("DROP TYPE b20_mood")


@pytest.mark.parametrize("waits", [False, True], ids=["at once", "in line"])
@pytest.mark.parametrize(
    ("text", "value_", "change"),
    [
        ("SELECT $1::b20_mood", "1", "DROP TYPE b20_mood; CREATE TYPE b20_mood AS ENUM ('1')"),
        ("SELECT n FROM b20 WHERE n = $1", "1", "ALTER TABLE b20 ALTER n TYPE text"),
        ("SELECT n FROM b20 WHERE n = $1", "one", "ALTER TABLE b20 ALTER n TYPE text; UPDATE b20 SET n = 'one'"),
        ("SELECT * FROM b20 WHERE $1 > ''", "1", "ALTER TABLE b20 ADD m int"),
    ],
    ids=["enum", "type", "value", "rows"],
)
@wire
async def test_B20_who_parses_behind_a_change_sees_what_is_there_now(proxy_for, pg, text, value_, change, waits):
    """Its Parse is answered by what another client had parsed before that."""
    proxy = proxy_for(pg, max_size=1)
    with psycopg.connect(pg.dsn, autocommit=True) as admin:
        admin.execute("CREATE TYPE b20_mood AS ENUM ('1'); CREATE TABLE b20 AS SELECT 1 AS n")
        try:
            async with await proxy.client() as client, await proxy.client() as other:
                assert "E" not in kinds(await ask(client, parse("s", text), bind("s", "1"), execute()))
                admin.execute(change)
                if waits:
                    await client.query("BEGIN")
                await other.send(parse("s", text), bind("s", value_), execute(), SYNC)
                if waits:
                    await client.query("COMMIT")
                answer = await other.until_ready()
                assert "E" not in kinds(answer), answer
                assert (kinds(answer), rows(answer)[0][0]) == ("12DCZ", value_)
                assert kinds(await ask(other, parse("t", text), describe("t"))) == "1tTZ"
        finally:
            admin.execute("DROP TABLE b20; DROP TYPE b20_mood")


@wire
async def test_B20_an_error_of_a_value_is_told_once(single):
    text = "SELECT $1::int"
    async with await single.client() as client, await single.client() as other:
        assert "E" not in kinds(await ask(client, parse("s", text), again("s", "1")))
        for name in ("s", "t"):
            answer = await ask(other, parse(name, text), again(name, "one"))
            assert (kinds(answer), error(answer)["C"]) == ("1EZ", "22P02")
            assert value(await ask(other, again(name, "2"))) == "2"


@wire
async def test_B20_a_table_that_is_dropped_and_made_anew(everywhere):
    said = await everywhere.batches(
        parse("s", "SELECT count(*), sum(id) FROM b20") + again("s") + SYNC,
        query("DROP TABLE b20"),
        again("s") + SYNC,
        query("CREATE TABLE b20 AS SELECT 1 AS other, 5 AS id"),
        again("s") + SYNC,
        query("ALTER TABLE b20 RENAME id TO renamed"),
        again("s") + SYNC,
        query("ALTER TABLE b20 RENAME renamed TO id"),
        again("s") + SYNC,
        setup="CREATE TABLE b20 (id int)",
        teardown="DROP TABLE b20",
    )
    assert rows(said) == [("0", None), ("1", "5"), ("1", "5")]
    assert [fields["C"] for fields in errors(said)] == ["42P01", "42703"]


@wire
async def test_B20_a_known_text_whose_table_is_gone_fails_when_it_is_bound(single):
    """Its Parse is not sent, so the error comes one message later; in the same batch nobody can tell."""
    text = "SELECT count(*) FROM b20_gone"
    async with await single.client() as client:
        await client.query("CREATE TABLE b20_gone ()")
        await ask(client, parse("s", text), again("s"), close("s"))
        await client.query("DROP TABLE b20_gone")
        assert error(await ask(client, parse("s", text), again("s")))["C"] == "42P01"
        answer = await ask(client, parse("a", text))
        assert kinds(answer) == "1Z" or error(answer)["C"] == "42P01"
