"""Who asks for session settings has exactly those, pays for a difference only, and leaves none behind."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from typing import Any

import pytest
from wire_recorder import WireRecorder

import cenote
from pool_kit import Api, Kit, add_up, behaviour, raises_clearly, until

TENANT = "coalesce(current_setting('app.tenant', true), '')"
LOOK = f"SELECT {TENANT}, current_setting('search_path'), current_user::text, current_setting('timezone')"


def wishes(server: Any) -> dict[str, Any]:
    return {"app.tenant": 42, "search_path": "a,b", "role": f"guest_{server[1]}", "TimeZone": "Asia/Tokyo"}


async def look(pool: Api, settings: Any = None) -> tuple[Any, ...]:
    return tuple(await pool.fetch_one(LOOK, settings=settings))


# -- what a lease carries ---------------------------------------------------------------------------------------


@behaviour
async def test_a_lease_carries_exactly_the_settings_that_were_asked_for(kit: Kit, server: Any) -> None:
    wanted = wishes(server)
    async with kit.pool(max_size=1) as pool:
        base = await look(pool)
        has = ("42", "a,b", wanted["role"], "Asia/Tokyo")
        assert await look(pool, wanted) == has
        assert await look(pool, {"app.tenant": "7", "search_path": "c"}) == ("7", "c", base[2], base[3])
        assert await look(pool, {"role": wanted["role"]}) == ("", base[1], wanted["role"], base[3])
        assert await look(pool) == base
        assert sum(pool.stats().opened.values()) == 1, "it was converted, not reconnected"


@behaviour
async def test_every_way_to_borrow_takes_settings(kit: Kit) -> None:
    wanted = {"app.tenant": "42"}
    ask = f"SELECT {TENANT}"
    async with kit.pool(max_size=1) as pool:
        assert await pool.fetch_value(ask, settings=wanted) == "42"
        assert tuple(await pool.fetch_one(ask, settings=wanted)) == ("42",)
        assert [tuple(row) for row in await pool.fetch_all(ask, settings=wanted)] == [("42",)]
        kit.admin.rows("DELETE FROM note")
        assert await pool.execute(f"INSERT INTO note (text) SELECT {TENANT}", settings=wanted) == 1
        assert kit.admin.rows("SELECT text FROM note") == [("42",)]
        async with pool.connection(settings=wanted) as conn:
            assert await kit.sql(conn, ask) == [("42",)]
        async with pool.transaction(settings=wanted) as conn:
            assert await kit.sql(conn, ask) == [("42",)]
        conn = await pool.acquire(settings=wanted)
        assert await kit.sql(conn, ask) == [("42",)]
        await kit.commit(conn)
        await pool.release(conn)
        assert await pool.fetch_value(ask, settings={}) == ""


@pytest.mark.parametrize(
    "value", ["", "it's", 'a"b', "a\\b", "$1 %s {}", "é€😀", "a,b; RESET ROLE --", "x" * 5000]
)
@behaviour
async def test_a_value_arrives_as_it_is(kit: Kit, value: str) -> None:
    async with kit.pool(max_size=1) as pool:
        settings = {"app.tenant": value}
        assert await pool.fetch_value(f"SELECT {TENANT}", settings=settings) == value


@behaviour
async def test_numbers_and_truth_are_given_as_postgresql_writes_them(kit: Kit) -> None:
    settings = {"work_mem": 2048, "enable_seqscan": False, "seq_page_cost": 1.5, "app.yes": True, "app.one": 1}
    async with kit.pool(max_size=1) as pool:
        row = await pool.fetch_one(
            "SELECT current_setting('work_mem'), current_setting('enable_seqscan'),"
            " current_setting('seq_page_cost'), current_setting('app.yes'), current_setting('app.one')",
            settings=settings,
        )
        assert tuple(row) == ("2MB", "off", "1.5", "on", "1")
        # Equal in Python, different as texts.
        for value, text in ((1, "1"), (True, "on"), (1.0, "1.0")):
            ask = "SELECT current_setting('app.one')"
            assert await pool.fetch_value(ask, settings={"app.one": value}) == text


@behaviour
async def test_a_role_is_set_whatever_its_name(kit: Kit, server: Any) -> None:
    name = f"Guest \"é' {server[1]}"
    quoted = '"' + name.replace('"', '""') + '"'
    kit.admin.rows(f"CREATE ROLE {quoted}")
    kit.admin.rows(f'GRANT {quoted} TO "{server[0].user}"')
    try:
        async with kit.pool(max_size=1) as pool:
            assert await pool.fetch_value("SELECT current_user::text", settings={"role": name}) == name
            assert await pool.fetch_value("SELECT current_user::text") == server[0].user
    finally:
        kit.admin.rows(f"DROP ROLE {quoted}")


@behaviour
async def test_a_session_authorization_is_carried_for_who_may(kit: Kit, server: Any) -> None:
    pg, name, _ = server
    guest = f"guest_{name}"
    ask = "SELECT session_user::text || ' ' || current_user::text"
    async with kit.pool(kit.named(pg.dsn_for(user="postgres", database=name)), max_size=1) as pool:
        assert await pool.fetch_value(ask, settings={"session_authorization": guest}) == f"{guest} {guest}"
        assert await pool.fetch_value(ask, settings={"role": guest}) == f"postgres {guest}"
        # What only a superuser may, beside a role that may not.
        mixed = {"role": guest, "log_min_messages": "error"}
        assert await pool.fetch_value(ask, settings=mixed) == f"postgres {guest}"
        mixed["log_min_messages"] = "fatal"
        assert await pool.fetch_value("SHOW log_min_messages", settings=mixed) == "fatal"
        assert await pool.fetch_value(ask) == "postgres postgres"


# -- what it leaves, and what it costs ----------------------------------------------------------------------------


@behaviour
async def test_a_borrower_who_asks_for_none_never_sees_another_ones(kit: Kit, server: Any) -> None:
    async with kit.pool(max_size=2) as pool:
        base = await look(pool)

        async def one(number: int) -> None:
            if number % 3:
                wanted = {**wishes(server), "app.tenant": number}
                assert (await look(pool, wanted))[0] == str(number)
            else:
                assert await look(pool) == base

        await asyncio.gather(*(one(number) for number in range(60)))
        assert (await pool.settled()).size <= 2


@behaviour
async def test_equal_settings_cost_no_round_trip(kit: Kit, server: Any) -> None:
    pg, name, _ = server
    with WireRecorder(pg.dsn_for(database=name)) as wire:
        async with kit.pool(f"{wire.dsn}&application_name={kit.app}", max_size=2, min_size=2) as pool:
            await pool.wait_ready()
            wanted = {"app.tenant": "42", "search_path": "a"}
            conn = await pool.acquire(settings=wanted)
            await pool.release(conn)
            await pool.settled()
            wire.clear()
            # In another order, other case, other types: it is the same.
            for same in (wanted, {"SEARCH_PATH": "a", "App.Tenant": "42"}, {"search_path": "a", "app.tenant": 42}):
                conn = await pool.acquire(settings=same)
                await pool.release(conn)
                conn = await pool.acquire(5, settings=same)
                await pool.release(conn)
            conn = await pool.acquire()  # and the other connection still has the base
            await pool.release(conn)
            stats = await pool.settled()
            assert wire.requests == []
            assert (stats.acquired, stats.conversions) == (9, 1)


@behaviour
async def test_a_difference_costs_one_round_trip_that_names_only_the_differences(kit: Kit, server: Any) -> None:
    pg, name, _ = server
    with WireRecorder(pg.dsn_for(database=name)) as wire:
        async with kit.pool(f"{wire.dsn}&application_name={kit.app}", max_size=1) as pool:
            await pool.wait_ready()
            for settings, sent, left_out in (
                ({"app.tenant": "1", "search_path": "a", "work_mem": "7MB"}, "'7MB'", "NULL"),
                ({"app.tenant": "2", "search_path": "a"}, "'work_mem',NULL", "search_path"),
                (None, "'app.tenant',NULL", "work_mem"),
            ):
                wire.clear()
                conn = await pool.acquire(settings=settings)
                await pool.release(conn)
                (text,) = wire.texts()
                assert wire.round_trips() == 1
                assert sent in text
                assert left_out not in text


@behaviour
async def test_a_roll_back_keeps_what_the_connection_carries(kit: Kit, server: Any) -> None:
    pg, name, _ = server
    with WireRecorder(pg.dsn_for(database=name)) as wire:
        async with kit.pool(f"{wire.dsn}&application_name={kit.app}", max_size=1) as pool:
            wanted = {"app.tenant": "42"}
            with pytest.raises(KeyError):
                async with pool.transaction(settings=wanted):
                    raise KeyError
            conn = await pool.acquire(settings=wanted)
            await kit.begin(conn)
            await pool.release(conn)  # with its transaction open
            assert await pool.fetch_value(f"SELECT {TENANT}", settings=wanted) == "42"
            assert sum("set_config" in text for text in wire.texts()) == 1
            assert await pool.fetch_value(f"SELECT {TENANT}") == ""


CHANGES = {
    "another value": "SET app.tenant = '43'",
    "another setting": "SET work_mem = '7MB'",
    "RESET ALL": "RESET ALL",
    "RESET ROLE": "RESET ROLE",
    "the role": "SET ROLE NONE",
    "set_config": "SELECT set_config('search_path', 'elsewhere', false)",
    "a lock": "SELECT pg_advisory_lock(7)",
    "a temporary table": "CREATE TEMP TABLE carried (x int)",
}


@pytest.mark.parametrize("change", CHANGES)
@behaviour
async def test_what_a_borrower_changes_on_top_is_undone_together_with_what_he_asked_for(
    kit: Kit, server: Any, change: str
) -> None:
    wanted = {"app.tenant": "42", "search_path": "a", "role": f"guest_{server[1]}"}
    if change == "a temporary table":
        del wanted["role"]  # who may create them is another question
    async with kit.pool(max_size=1) as pool:
        base = await look(pool)
        async with pool.connection(settings=wanted) as conn:
            await kit.sql(conn, CHANGES[change])
        assert await look(pool) == base
        has = await look(pool, wanted)
        assert has[:2] == ("42", "a")
        assert await pool.fetch_value("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'") == 0
        assert sum(pool.stats().opened.values()) == 1, "it was reconnected, not reset"


@pytest.mark.parametrize("how", ["always", "hook"])
@behaviour
async def test_a_pool_that_resets_after_each_lease_carries_nothing_to_the_next(
    kit: Kit, server: Any, how: str
) -> None:
    hook = kit.hook(lambda conn: None)
    async with kit.pool(max_size=1, reset=hook if how == "hook" else "always") as pool:
        base = await look(pool)
        for _ in range(2):
            assert (await look(pool, wishes(server)))[0] == "42"
            await pool.settled()
            assert await look(pool) == base


@behaviour
async def test_an_idle_connection_with_equal_settings_is_preferred(kit: Kit) -> None:
    async with kit.pool(max_size=3, min_size=3) as pool:
        await pool.wait_ready()
        pids: dict[str, int] = {}
        conns = [await pool.acquire(settings={"app.tenant": each}) for each in "abc"]
        for each, conn in zip("abc", conns, strict=True):
            pids[each] = kit.pid(conn)
            await pool.release(conn)
        assert len(set(pids.values())) == 3
        for each in "cabbac":
            conn = await pool.acquire(settings={"app.tenant": each})
            assert kit.pid(conn) == pids[each]
            await pool.release(conn)


@behaviour
async def test_who_waits_gets_the_connection_with_his_settings(kit: Kit) -> None:
    async with kit.pool(max_size=1) as pool:
        conn = await pool.acquire(settings={"app.tenant": "a"})
        ask = f"SELECT {TENANT}"
        others = [pool.start("fetch_value", ask, settings={"app.tenant": each}) for each in "bacb"]
        nobody = pool.start("fetch_value", ask)
        await pool.standing(5)
        await pool.release(conn)
        assert await asyncio.gather(*others, nobody) == ["b", "a", "c", "b", ""]


# -- the base state -------------------------------------------------------------------------------------------


@behaviour
async def test_what_init_query_sets_is_the_base_that_a_conversion_returns_to(kit: Kit, server: Any) -> None:
    init = f"SET app.tenant = 'base'; SET search_path = q; SET ROLE guest_{server[1]} -- the base"
    async with kit.pool(max_size=1, init_query=init) as pool:
        base = ("base", "q", f"guest_{server[1]}")
        assert (await look(pool))[:3] == base
        assert (await look(pool, {"app.tenant": "1", "role": server[0].user}))[:3] == ("1", "q", server[0].user)
        assert (await look(pool, {"app.tenant": "2"}))[:3] == ("2", *base[1:])
        assert (await look(pool, {"search_path": "z"}))[:3] == ("base", "z", base[2])
        assert (await look(pool))[:3] == base


@behaviour
async def test_what_configure_sets_is_the_base_that_a_conversion_returns_to(kit: Kit) -> None:
    ran = 0

    def note() -> None:
        nonlocal ran
        ran += 1

    if kit.is_async:

        async def configure(conn: Any) -> None:
            note()
            await conn.execute("SET app.tenant = 'base'")
    else:

        def configure(conn: Any) -> None:  # type: ignore[misc]
            note()
            conn.cursor().execute("SET app.tenant = 'base'")

    async with kit.pool(max_size=1, configure=configure) as pool:
        assert (await look(pool))[0] == "base"
        assert (await look(pool, {"app.tenant": "1"}))[0] == "1"
        assert (await look(pool, {"app.tenant": "2"}))[0] == "2"
        assert ran == 1, "nothing of the base was lost"
        assert (await look(pool, {"search_path": "a"}))[:2] == ("base", "a")
        assert (await look(pool))[0] == "base"


@behaviour
async def test_a_constant_is_read_in_the_time_zone_of_its_borrower(kit: Kit) -> None:
    ask = "SELECT extract(epoch FROM '2020-01-01 00:00'::timestamptz)::int"
    async with kit.pool(max_size=1) as pool:
        for _ in range(8):  # often enough for drivers that prepare what is repeated
            assert await pool.fetch_value(ask, settings={"timezone": "UTC"}) == 1577836800
        assert await pool.fetch_value(ask, settings={"timezone": "Asia/Tokyo"}) == 1577836800 - 9 * 3600
        async with pool.connection(settings={"timezone": "UTC"}) as conn:
            assert await kit.sql(conn, ask) == [(1577836800,)]
            await kit.sql(conn, "SET work_mem = '7MB'")
        tokyo = {"timezone": "Asia/Tokyo"}
        for _ in range(8):
            assert await pool.fetch_value(ask, settings=tokyo) == 1577836800 - 9 * 3600


@behaviour
async def test_a_short_statement_timeout_does_not_strike_its_own_removal(kit: Kit) -> None:
    init = "SET work_mem = '7MB'; SELECT pg_sleep(0.3)"  # longer than the timeout that is carried then
    async with kit.pool(max_size=1, init_query=init) as pool:
        conn = await pool.acquire(settings={"statement_timeout": 200, "app.tenant": "42"})
        await pool.release(conn)
        assert await pool.fetch_value("SHOW statement_timeout") == "0"
        assert await pool.fetch_value("SHOW work_mem") == "7MB"
        assert sum(pool.stats().opened.values()) == 1


# -- what goes wrong ------------------------------------------------------------------------------------------

WRONG = {
    "an unknown setting": ({"no_such_setting": "1"}, "no_such_setting"),
    "a bad value": ({"work_mem": "plenty"}, "work_mem"),
    "no right": ({"role": "postgres"}, "role"),
    "no such role": ({"role": "nobody at all"}, "nobody at all"),
}


@pytest.mark.parametrize("wrong", WRONG)
@behaviour
async def test_what_the_server_refuses_is_the_drivers_own_error_and_costs_no_slot(
    kit: Kit, server: Any, wrong: str
) -> None:
    settings, word = WRONG[wrong]
    asked = {"app.tenant": "s3cr3t", **settings}
    async with kit.pool(max_size=1) as pool:
        base = await look(pool)
        for carried in (None, {"app.tenant": "41", "search_path": "a"}):
            await look(pool, carried)
            for _ in range(2):
                with pytest.raises(kit.errors()) as caught:
                    await look(pool, asked)
                assert word in str(caught.value)
                assert any("app.tenant" in note for note in caught.value.__notes__)
                assert "s3cr3t" not in "".join(caught.value.__notes__), "a value may be a secret"
            assert await look(pool) == base
        stats = await pool.settled()
        assert (stats.size, stats.leased, stats.waiting) == (1, 0, 0)
        assert sum(stats.opened.values()) == 1, "it was reconnected, not reset"
        add_up(stats)


@behaviour
async def test_a_connection_that_died_while_idle_is_replaced_before_the_borrower_notices(kit: Kit) -> None:
    async with kit.pool(max_size=2, min_size=2, peek_after=1000) as pool:  # nobody looks before it is lent
        await pool.wait_ready()
        for each in "ab":
            conn = await pool.acquire(settings={"app.tenant": each})
            await pool.release(conn)
        kit.kill(*kit.backends())
        assert await pool.fetch_value(f"SELECT {TENANT}", settings={"app.tenant": "c"}) == "c"
        add_up(await pool.settled())


@behaviour
async def test_a_server_that_does_not_answer_while_converting_loses_no_slot(kit: Kit, server: Any) -> None:
    pg, name, _ = server
    with WireRecorder(pg.dsn_for(database=name)) as wire:
        async with kit.pool(f"{wire.dsn}&application_name={kit.app}", max_size=1) as pool:
            await look(pool)
            wire.hold()
            asked = pool.start("acquire", None, settings={"app.tenant": "42"})
            await until(lambda: pool.stats().leased == 1)
            if kit.is_async:
                asked.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await asked
                wire.release()
            else:
                wire.release()
                await pool.release(await asked)
            assert (await look(pool))[0] == ""
            assert (await look(pool, {"app.tenant": "7"}))[0] == "7"
            stats = await pool.settled()
            assert (stats.leased, stats.waiting) == (0, 0)
            add_up(stats)


# -- what cannot be asked for -----------------------------------------------------------------------------------


def test_all_that_is_wrong_with_settings_is_told_at_once(any_kit: Kit) -> None:
    pool = any_kit.make()
    wrong = {
        "a b": "1",
        "": 1,
        "x; DROP TABLE note": 1,
        "n" * 64: 1,
        "work_mem": None,
        "WORK_MEM": [1],
        "seq_page_cost": float("nan"),
        "app.x": "\0",
        "role": "",
        "client_encoding": "latin1",
        "transaction_isolation": "serializable",
    }
    for method in ("connection", "transaction"):
        with raises_clearly(cenote.ConfigError, pool.name, "'a b'", "default_transaction_isolation") as caught:
            getattr(pool, method)(settings=wrong)
        extra = 0 if any_kit.on_server else 1
        assert len(caught.value.problems) == len(wrong) + extra
    with raises_clearly(cenote.ConfigError, "at most 32"):
        pool.connection(settings={f"app.x{number}": 1 for number in range(33)})
    with raises_clearly(cenote.ConfigError, "mapping"):
        pool.connection(settings=[("work_mem", "1MB")])
    assert pool.stats().size == 0, "a wrong wish opens nothing"


@behaviour
async def test_settings_behind_another_pooler_are_refused(kit: Kit) -> None:
    async with kit.pool(max_size=1, reset="never") as pool:
        with raises_clearly(cenote.ConfigError, 'reset="never"', "SET LOCAL"):
            await pool.fetch_value("SELECT 1", settings={"app.tenant": "1"})
        assert await pool.fetch_value("SELECT 1", settings={}) == 1


def test_settings_are_refused_where_the_database_is_not_known_to_be_postgresql(any_kit: Kit) -> None:
    if any_kit.on_server:
        assert any_kit.make().connection(settings={"app.tenant": "1"}) is not None
        return
    with raises_clearly(cenote.ConfigError, "PostgreSQL", "dbapi"):
        any_kit.make().connection(settings={"app.tenant": "1"})


# -- tenants -----------------------------------------------------------------------------------------------------


@pytest.fixture
def tenants(server: Any) -> Iterator[str]:
    """A table of 20 tenants' rows; only its own are shown to each."""
    admin = server[2]
    admin.rows(
        "CREATE TABLE deed (tenant text, number int);"
        " INSERT INTO deed SELECT t::text, n FROM generate_series(1, 20) t, generate_series(1, 3) n;"
        " ALTER TABLE deed ENABLE ROW LEVEL SECURITY;"
        " CREATE POLICY own ON deed USING (tenant = current_setting('app.tenant', true));"
        " GRANT ALL ON deed TO PUBLIC"
    )
    yield "deed"
    admin.rows("DROP TABLE deed")


@behaviour
async def test_twenty_tenants_on_three_connections_never_see_a_foreign_row(kit: Kit, tenants: str) -> None:
    dice = random.Random(7)
    seen = 0

    async def visit(pool: Api, tenant: int) -> None:
        nonlocal seen
        ask, settings = f"SELECT tenant FROM {tenants}", {"app.tenant": tenant}
        how = dice.randrange(4)
        if how == 0:
            rows = await pool.fetch_all(ask, settings=settings)
        elif how == 1:
            async with pool.transaction(settings=settings) as conn:
                rows = await kit.sql(conn, ask)
        else:
            async with pool.connection(settings=settings) as conn:
                rows = await kit.sql(conn, ask)
                if how == 3:
                    await kit.sql(conn, f"SET app.tenant = '{tenant % 20 + 1}'")
        assert [row[0] for row in rows] == [str(tenant)] * 3
        seen += 1
        if dice.random() < 0.2:
            assert await pool.fetch_all(ask) == []

    async with kit.pool(max_size=3) as pool:
        visits = [tenant for tenant in range(1, 21) for _ in range(6)]
        dice.shuffle(visits)
        await asyncio.gather(*(visit(pool, tenant) for tenant in visits))
        stats = await pool.settled()
        assert seen == len(visits)
        assert stats.size <= 3
        add_up(stats)
