"""Group B, prepared statements in transaction mode: whatever backend a client comes to, there they are."""

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
    describe,
    execute,
    parse,
    query,
    run,
)

from cenote.testing.wire import Message, RawClient, error, errors, kinds, rows, value

pytest_plugins = ["fixtures_BD"]

PID = "SELECT pg_backend_pid()"
THERE = "SELECT count(*) FROM pg_prepared_statements WHERE statement LIKE '%{}%' AND statement NOT LIKE '%LIKE%'"


@pytest.fixture
def single(proxy_for, pg18) -> RunningProxy:
    """One server connection for all."""
    return proxy_for(pg18, max_size=1)


@pytest.fixture
def pair(proxy_for, pg18) -> RunningProxy:
    """Two server connections for all."""
    return proxy_for(pg18, max_size=2, audit="off")


async def ask(client: RawClient, *parts: bytes) -> list[Message]:
    """The answer to a batch; the Sync is added."""
    await client.send(*parts, SYNC)
    return await client.until_ready()


async def move(client: RawClient, holder: RawClient) -> None:
    """`holder` takes the server connection that `client` had last, so that it comes to the other one."""
    before = value(await client.query(PID))
    await holder.query("BEGIN")
    assert value(await holder.query(PID)) == before
    assert value(await client.query(PID)) != before


# -- B6, B7, B8 ----------------------------------------------------------------------------------------------


@wire
async def test_B6_what_is_prepared_already_is_not_prepared_again_and_answered_in_its_place(single):
    text = "SELECT 'B6, shared'"
    async with await single.client() as first, await single.client() as second:
        await ask(first, parse("mine", text))
        batch = run("SELECT 1") + parse("theirs", text) + run("SELECT 2") + again("theirs") + parse("more", text)
        answer = await ask(second, batch + again("more"))
        assert kinds(answer) == "12TDC" + "1" + "12TDC" + "2TDC" + "1" + "2TDC" + "Z"
        assert [row[0] for row in rows(answer)] == ["1", "2", "B6, shared", "B6, shared"]
        assert value(await first.query(THERE.format("B6, shared"))) == "1"


@wire
async def test_B6_what_is_prepared_already_is_answered_with_flush(single):
    text = "SELECT 'B6, flushed'"
    async with await single.client() as first, await single.client() as second:
        await ask(first, parse("mine", text))
        await second.send(run("SELECT 1"), parse("theirs", text), FLUSH)
        assert kinds(await second.until("1") + await second.until("1")) == "12TDC1"
        assert value(await ask(second, again("theirs"))) == "B6, flushed"


@wire
async def test_B7_a_parse_that_fails_leaves_no_name_and_no_statement(everywhere):
    said = await everywhere.batches(
        parse("s", "SELECT 'wrong' +") + SYNC,
        again("s") + SYNC,
        parse("s", "SELECT 'right'") + again("s") + SYNC,
        parse("a", "SELECT 'wrong' +") + SYNC,
        parse("a", "SELECT 'wrong' +") + SYNC,
        describe("a") + SYNC,
        close("a") + parse("a", "SELECT 'right'") + SYNC,
        again("a") + again("s") + SYNC,
    )
    assert [fields["C"] for fields in errors(said)] == ["42601", "26000", "42601", "42601", "26000"]


@wire
async def test_B7_what_could_not_be_parsed_may_be_parsed_later(single):
    text = "SELECT count(*) FROM b7_later"
    async with await single.client() as client:
        for _ in range(2):
            assert error(await ask(client, parse("s", text)))["C"] == "42P01"
        await client.query("CREATE TABLE b7_later ()")
        assert error(await ask(client, again("s")))["C"] == "26000"
        assert value(await ask(client, parse("s", text), again("s"))) == "0"
        await client.query("DROP TABLE b7_later")


@wire
async def test_B7_a_parse_that_failed_for_one_client_is_tried_anew_for_the_next(single):
    async with await single.client() as first, await single.client() as second:
        for client in (first, second, first):
            assert error(await ask(client, parse("s", "SELECT 'B7' +")))["C"] == "42601"
        assert kinds(await ask(first, parse("s", "SELECT 'B7'"), again("s"))) == "12TDCZ"
        assert error(await ask(second, again("s")))["C"] == "26000"


@pytest.mark.parametrize("end", ["abort", "reset", "terminate", "close"])
@pytest.mark.parametrize("seen", [True, False])
@wire
async def test_B8_a_client_that_dies_before_its_sync_leaves_nothing_unproven(single, end, seen):
    """Its statement is there or is not; whoever comes next finds what it prepares itself."""
    text = "SELECT 'B8'"
    async with await single.client() as client:
        pid = value(await client.query(PID))
        await client.send(parse("s", text), parse("", "SELECT 'unnamed of the dead'"), FLUSH)
        if seen:
            assert kinds(await client.until("1") + await client.until("1")) == "11"
        await getattr(client, end)()
    await single.reached(leased=0, resetting=0)
    async with await single.client() as other:
        assert error(await ask(other, again()))["C"] == "26000"
        assert error(await ask(other, again("s")))["C"] == "26000"
        assert value(await ask(other, parse("s", "SELECT 'of the living'"), again("s"))) == "of the living"
        assert value(await ask(other, parse("t", text), again("t"))) == "B8"
        assert value(await other.query(PID)) == pid, "the server connection was kept"


@wire
async def test_B8_a_client_that_dies_after_a_parse_that_failed_leaves_nothing_either(single):
    async with await single.client() as client:
        await client.send(parse("s", "SELECT 'B8' +"), parse("t", "SELECT 'B8, never parsed'"), FLUSH)
        assert kinds([await client.receive()]) == "E"
        await client.abort()
    async with await single.client() as other:
        assert value(await ask(other, parse("t", "SELECT 'B8, never parsed'"), again("t"))) == "B8, never parsed"
        assert error(await ask(other, again("s")))["C"] == "26000"


# -- B9 ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["Bind", "Describe", "Close"])
@wire
async def test_B9_on_another_backend_a_statement_is_prepared_unseen(pair, how):
    async with await pair.client() as client, await pair.client() as holder:
        await ask(client, parse("s", "SELECT pg_backend_pid(), $1::int"))
        await move(client, holder)
        if how == "Describe":
            assert kinds(await ask(client, describe("s"))) == "tTZ"
        elif how == "Close":
            assert kinds(await ask(client, close("s"))) == "3Z"
            assert error(await ask(client, again("s", "1")))["C"] == "26000"
            return
        answer = await ask(client, run("SELECT 1"), again("s", "5"), again("s", "6"))
        assert kinds(answer) == "12TDC2TDC2TDCZ"
        there = value(await holder.query(PID))
        assert [row[1:] for row in rows(answer)[1:]] == [("5",), ("6",)]
        assert rows(answer)[1][0] != there


@pytest.mark.parametrize("first", ["Bind", "Describe"])
@wire
async def test_B9_if_it_cannot_be_prepared_there_the_client_hears_one_error(pair, admin, first):
    """The table is gone by now: on the first backend the same message would fail the same way."""
    async with await pair.client() as client, await pair.client() as holder:
        await client.query("CREATE TABLE b9 AS SELECT 1 AS a")
        await ask(client, parse("s", "SELECT a FROM b9"))
        await client.query("DROP TABLE b9")
        await move(client, holder)
        for _ in range(2):
            answer = await ask(
                client, run("SELECT 1"), describe("s") if first == "Describe" else again("s"), run("SELECT 2")
            )
            assert kinds(answer) == "12TDCEZ"
            assert error(answer)["C"] == "42P01"
        await client.query("CREATE TABLE b9 AS SELECT 2 AS a")
        assert value(await ask(client, again("s"))) == "2"
        await client.query("DROP TABLE b9")


@wire
async def test_B9_statements_follow_their_client_wherever_it_goes(everywhere):
    names = [f"n{number}" for number in range(8)]
    said = await everywhere.batches(
        *(parse(name, f"SELECT '{name} ' || $1", TEXT) + SYNC for name in names),
        *(again(name, str(turn)) + SYNC for turn in range(3) for name in names),
        b"".join(again(name, "all") for name in names) + SYNC,
        b"".join(describe(name) for name in reversed(names)) + SYNC,
        query("BEGIN"),
        *(again(name, "in one") + SYNC for name in names),
        query("COMMIT"),
    )
    assert len(rows(said)) == 40


# -- B10 ----------------------------------------------------------------------------------------------------


@wire
async def test_B10_the_same_text_with_other_types_is_another_statement(everywhere):
    text = "SELECT $1"
    said = await everywhere.batches(
        parse("a", text, INT4) + parse("b", text, TEXT) + parse("c", text) + SYNC,
        describe("a") + describe("b") + describe("c") + SYNC,
        again("a", "042") + again("b", "042") + again("c", "042") + SYNC,
        parse("d", text, TEXT) + again("d", "007") + SYNC,
        parse("", text, INT4) + again("", "007") + SYNC,
        parse("", text, TEXT) + again("", "007") + SYNC,
    )
    assert [row[0] for row in rows(said)] == ["42", "042", "042", "007", "7", "007"]


@pytest.mark.parametrize(
    ("setting", "values", "text", "wanted"),
    [
        ("search_path", ("b_one", "b_two"), "SELECT v FROM b10", ("one", "two")),
        ("DateStyle", ("ISO, DMY", "ISO, MDY"), "SELECT extract(month FROM date '01/02/2020')", ("2", "1")),
        ("TimeZone", ("UTC", "America/New_York"), "SELECT timestamptz '2020-01-01'::text", (None, None)),
    ],
)
@wire
async def test_B10_what_a_text_means_depends_on_the_settings_it_was_parsed_under(
    single, admin, setting, values, text, wanted
):
    admin.rows(
        "DROP SCHEMA IF EXISTS b_one, b_two CASCADE; CREATE SCHEMA b_one; CREATE SCHEMA b_two;"
        "CREATE TABLE b_one.b10 AS SELECT 'one' AS v; CREATE TABLE b_two.b10 AS SELECT 'two' AS v;"
        "GRANT ALL ON SCHEMA b_one, b_two TO app; GRANT ALL ON b_one.b10, b_two.b10 TO app"
    )
    try:
        clients = [await single.client(params={setting: given}) for given in values]
        for client in clients:
            assert kinds(await ask(client, parse("s", text))) == "1Z"
        for _ in range(2):
            got = [value(await ask(client, again("s"))) for client in clients]
            assert len(set(got)) == 2
            assert wanted == (None, None) or tuple(got) == wanted
        for client in clients:
            await client.terminate()
    finally:
        admin.rows("DROP SCHEMA b_one, b_two CASCADE")


NOON = "SELECT '2020-01-02 00:00'::timestamptz::text || ' ' || '01/02/2020'::date::text"
TOKYO = "SET {}TimeZone = 'Asia/Tokyo'; SET {}DateStyle = 'DMY'"


@pytest.mark.parametrize("name", ["s", ""])
@pytest.mark.parametrize(
    "texts",
    [
        ["BEGIN; " + TOKYO.format("LOCAL ", "LOCAL ")],
        ["BEGIN; " + TOKYO.format("", "")],
        ["BEGIN", "SELECT set_config('TimeZone', 'Asia/Tokyo', true), set_config('DateStyle', 'DMY', true)"],
        ["BEGIN", "DO $$BEGIN SET LOCAL TimeZone = 'Asia/Tokyo'; SET LOCAL DateStyle = 'DMY';END$$"],
    ],
    ids=["SET LOCAL", "SET", "set_config", "DO"],
)
@wire
async def test_B10_what_is_parsed_amid_other_settings_is_nobody_elses(single, texts, name):
    async with await single.client() as client, await single.client() as other:
        wanted = value(await other.query(NOON))
        for text in texts:
            await client.query(text)
        assert value(await ask(client, parse(name, NOON), again(name))) != wanted
        await client.query("ROLLBACK")
        assert value(await ask(other, parse(name, NOON), again(name))) == wanted


@wire
async def test_B10_what_is_parsed_behind_a_set_in_its_batch_is_nobody_elses(single):
    async with await single.client() as client, await single.client() as other:
        wanted = value(await other.query(NOON))
        assert value(await ask(client, run("SET TimeZone = 'Asia/Tokyo'"), parse("s", NOON), again("s"))) != wanted
        assert value(await ask(other, parse("s", NOON), again("s"))) == wanted
        assert value(await ask(client, parse("t", NOON), again("t"))) != wanted


@pytest.mark.parametrize("local", ["LOCAL ", ""])
@wire
async def test_B10_what_is_brought_to_a_backend_under_other_settings_is_nobody_elses(pair, local):
    """Its client prepared it before, on the other connection, where somebody shares it."""
    async with await pair.client() as client, await pair.client() as other:
        wanted = value(await ask(client, parse("s", NOON), again("s")))
        await other.query("BEGIN")
        assert value(await ask(other, parse("s", NOON), again("s"))) == wanted
        if not local:
            await client.query(TOKYO.format("", ""))
        await client.query("BEGIN; " + TOKYO.format(local, local))
        await other.query("COMMIT")
        await other.query("BEGIN")
        await ask(client, again("s"))
        await client.query("COMMIT")
        for _ in range(2):
            assert value(await ask(other, again("s"))) == wanted
            await other.query("COMMIT")
            await client.query("BEGIN")


@wire
async def test_B10_what_cannot_change_a_meaning_takes_nothing_from_the_others(single):
    async with await single.client() as client, await single.client() as other:
        await client.query("BEGIN; SET LOCAL statement_timeout = '1min'; SET LOCAL work_mem = '5MB'")
        await ask(client, run("SELECT set_config('app.tenant', $1, true)", "mine"))
        await ask(client, parse("s", "SELECT 'shared by B10'"))
        await client.query("COMMIT")
        await ask(other, parse("s", "SELECT 'shared by B10'"))
        assert value(await other.query(THERE.format("shared by B10"))) == "1"


# -- B12 -----------------------------------------------------------------------------------------------------


@wire
async def test_B12_what_was_not_used_for_longest_is_closed_and_comes_back_when_asked_for(proxy_for, pg18):
    proxy = proxy_for(pg18, max_size=1, max_prepared=3)
    names = [f"n{number}" for number in range(8)]
    async with await proxy.client() as client:
        for name in names:
            assert kinds(await ask(client, parse(name, f"SELECT 'B12 {name}'"))) == "1Z"
            assert int(value(await client.query(THERE.format("B12"))) or 0) <= 3
        for _ in range(2):
            for name in names:
                assert value(await ask(client, again(name))) == f"B12 {name}"
                assert value(await client.query(THERE.format("B12"))) == "3"
        kept = [row[0] for row in rows(await client.query("SELECT statement FROM pg_prepared_statements"))]
        assert sorted(kept) == [f"SELECT 'B12 {name}'" for name in names[-3:]]


@wire
async def test_B12_nothing_is_closed_that_the_batch_still_needs(proxy_for, pg18):
    proxy = proxy_for(pg18, max_size=1, max_prepared=2)
    names = [f"n{number}" for number in range(6)]
    async with await proxy.client() as client, await proxy.client() as other:
        answer = await ask(client, *(parse(name, f"SELECT '{name}'") for name in names), *map(again, names * 2))
        assert [row[0] for row in rows(answer)] == names * 2
        await ask(other, *(parse(name, f"SELECT 'other {name}'") for name in names))
        answer = await ask(client, *map(again, names * 2))
        assert [row[0] for row in rows(answer)] == names * 2
        answer = await ask(client, bind("n0", portal="p"), *map(again, names), execute("p"))
        assert [row[0] for row in rows(answer)] == [*names, "n0"]
        answer = await ask(other, *map(again, names))
        assert [row[0] for row in rows(answer)] == [f"other {name}" for name in names]


@wire
async def test_B12_an_eviction_that_the_server_discarded_is_taken_back(proxy_for, pg18):
    """The Close and the Parse stand behind an error, so neither was done."""
    proxy = proxy_for(pg18, max_size=1, max_prepared=2)
    async with await proxy.client() as client:
        for name in ("a", "b"):
            await ask(client, parse(name, f"SELECT 'B12 {name}'"))
        await ask(client, again("b"))
        for _ in range(3):
            answer = await ask(client, bind("nothing"), parse("c", "SELECT 'B12 c'"), again("c"))
            assert kinds(answer) == "EZ"
            assert error(answer)["C"] == "26000"
            assert [value(await ask(client, again(name))) for name in ("a", "b")] == ["B12 a", "B12 b"]
            assert error(await ask(client, again("c")))["C"] == "26000"
        assert kinds(await ask(client, parse("c", "SELECT 'B12 c'"), again("c"))) == "12TDCZ"
        assert [value(await ask(client, again(name))) for name in "abc"] == ["B12 a", "B12 b", "B12 c"]


# -- B13, B14, B15 -------------------------------------------------------------------------------------------


@wire
async def test_B13_a_name_that_is_taken_is_42P05_and_the_unnamed_one_is_replaced(everywhere):
    said = await everywhere.batches(
        parse("s", "SELECT 'first'") + SYNC,
        parse("s", "SELECT 'second'") + SYNC,
        parse("s", "SELECT 'first'") + SYNC,
        again("s") + SYNC,
        run("SELECT 1") + parse("s", "SELECT 'third'") + run("SELECT 2") + SYNC,
        parse("s", "not even SQL") + SYNC,
        parse("a", "SELECT 'a'") + parse("a", "SELECT 'a'") + SYNC,
        again("a") + SYNC,
        close("s") + parse("s", "SELECT 'fourth'") + again("s") + SYNC,
        parse("", "SELECT 5") + parse("", "SELECT 6") + again() + SYNC,
    )
    assert [fields["C"] for fields in errors(said)] == ["42P05"] * 3 + ["42601"] + ["42P05"]
    assert [row[0] for row in rows(said)] == ["first", "1", "a", "fourth", "6"]


@wire
async def test_B13_errors_name_a_statement_as_its_client_does(everywhere):
    """Where another client has the name, the statement has another one on the server."""
    said = await everywhere.batches(
        parse("s", "SELECT $1::int") + SYNC,
        again("s") + SYNC,
        again("s", "1", "2") + SYNC,
        parse("s", "SELECT 1") + SYNC,
        again("a") + SYNC,
    )
    assert [fields["C"] for fields in errors(said)] == ["08P01", "08P01", "42P05", "26000"]


@wire
async def test_B14_the_unnamed_statement_is_there_until_the_next_parse_or_query(everywhere):
    said = await everywhere.batches(
        again() + SYNC,
        parse("", "SELECT 'unnamed ' || $1", TEXT) + SYNC,
        again("", "1") + SYNC,
        describe() + SYNC,
        again("", "2") + again("", "3") + SYNC,
        run("SELECT 'named'", name="s") + SYNC,
        again("", "4") + SYNC,
        query("SELECT 'simple'"),
        again("", "5") + SYNC,
        describe() + SYNC,
        parse("", "SELECT 'new'") + SYNC,
        close() + SYNC,
        again() + SYNC,
        parse("", "SELECT 'failing' +") + SYNC,
        again() + SYNC,
        parse("", "SELECT 6") + SYNC,
        parse("", "SELECT 'failing' +") + SYNC,
        again() + SYNC,
    )
    assert [row[0] for row in rows(said)] == [
        *("unnamed 1", "unnamed 2", "unnamed 3", "named", "unnamed 4", "simple"),
    ]
    assert {fields["C"] for fields in errors(said)} == {"26000", "42601"}


@wire
async def test_B14_a_client_never_meets_the_unnamed_statement_of_another(single):
    async with await single.client() as first, await single.client() as second:
        await ask(first, parse("", "SELECT 'of the first'"))
        assert error(await ask(second, again()))["C"] == "26000"
        await ask(second, parse("", "SELECT 'of the second'"))
        assert value(await ask(first, again())) == "of the first"
        await first.query("SELECT 1")
        assert value(await ask(second, again())) == "of the second"
        assert error(await ask(first, again()))["C"] == "26000"


@wire
async def test_B14_the_unnamed_statement_follows_its_client_to_another_backend(pair):
    async with await pair.client() as client, await pair.client() as holder:
        before = value(await client.query(PID))
        await ask(client, parse("", PID))
        await holder.query("BEGIN")
        assert value(await holder.query(PID)) == before
        answer = await ask(client, describe(), again(), run("SELECT 1", name="s"), again())
        assert kinds(answer) == "tT2TDC12TDC2TDCZ"
        assert rows(answer)[0] == rows(answer)[2] != (before,)


@wire
async def test_B15_close_is_answered_in_its_place_and_forgets_the_name(everywhere):
    said = await everywhere.batches(
        parse("s", "SELECT 1") + again("s") + close("s") + run("SELECT 2") + close("s") + SYNC,
        again("s") + SYNC,
        parse("s", "SELECT 3") + close("a") + again("s") + close("s") + parse("s", "SELECT 4") + again("s") + SYNC,
        close("s") + again("s") + SYNC,
        parse("a", "SELECT 5") + SYNC,
        bind("nothing") + close("a") + SYNC,
        again("a") + SYNC,
        query("BEGIN"),
        query("SELECT 1/0"),
        close("a") + SYNC,
        query("ROLLBACK"),
        again("a") + SYNC,
    )
    assert [row[0] for row in rows(said)] == ["1", "2", "3", "4", "5"]
    assert [fields["C"] for fields in errors(said)] == ["26000", "26000", "26000", "22012", "26000"]


@wire
async def test_B15_what_one_client_closes_others_still_have(single):
    text = "SELECT 'B15, shared'"
    async with await single.client() as first, await single.client() as second:
        for client in (first, second):
            await ask(client, parse("s", text))
        assert kinds(await ask(first, close("s"))) == "3Z"
        assert value(await ask(second, again("s"))) == "B15, shared"
        assert error(await ask(first, again("s")))["C"] == "26000"
        assert (
            kinds(await ask(first, parse("s", text), close("s"), parse("s", "SELECT 2"), again("s"))) == "1312TDCZ"
        )
