"""The dry run: session mode that says what transaction mode would carry, pin or refuse, and changes nothing.

The measure of it is transaction mode itself: the same script in both, and the same words in both ledgers.
"""

from __future__ import annotations

from typing import Any

import psycopg
import pytest
from proxy_kit import Differential, RunningProxy, until, wire
from scripts_BD import SYNC, parse, query, run
from state_kit import pinned, tell

from cenote.embedded import Postgres
from cenote.proxy.config import config_of
from cenote.proxy.reload import reload
from cenote.testing.wire import error, kinds, ready, rows, value
from cenote.wire import messages

EXTENDED = pytest.mark.parametrize("extended", [False, True], ids=["simple", "extended"])

# Texts that one client runs one after the other, the consequences they have, and whether it is pinned at the end.
SCRIPTS: dict[str, tuple[tuple[str, ...], set[str], bool]] = {
    "plain": (("SELECT 1", "BEGIN", "SELECT 2", "COMMIT"), set(), False),
    "SET": (("SET work_mem = '5MB'",), {"carried: settings"}, False),
    "set_config": (("SELECT set_config('app.tenant', '7', false)",), {"carried: settings"}, False),
    "SET LOCAL": (("BEGIN", "SET LOCAL work_mem = '5MB'", "COMMIT"), set(), False),
    "SET TIME ZONE": (("SET TIME ZONE 'Asia/Tokyo'",), {"carried: settings"}, False),
    "characteristics": (
        ("SET SESSION CHARACTERISTICS AS TRANSACTION ISOLATION LEVEL SERIALIZABLE",),
        {"carried: settings"},
        False,
    ),
    "role": (("SET ROLE NONE", "SET SESSION AUTHORIZATION DEFAULT"), {"carried: role"}, False),
    "LISTEN": (("LISTEN c", 'LISTEN "D"'), {"carried: listen"}, False),
    "UNLISTEN": (("LISTEN c", 'LISTEN "D"', "UNLISTEN c", 'UNLISTEN "D"'), {"carried: listen"}, False),
    "UNLISTEN *": (("LISTEN c", "UNLISTEN *"), {"carried: listen"}, False),
    "one of two channels": (("LISTEN c", 'LISTEN "D"', "UNLISTEN c"), {"carried: listen"}, False),
    "lock": (("SELECT pg_advisory_lock(41)",), {"pinned: advisory_locks"}, True),
    "unlock": (
        ("SELECT pg_advisory_lock(41)", "SELECT pg_advisory_unlock(41)"),
        {"pinned: advisory_locks"},
        False,
    ),
    "locked twice": (
        ("SELECT pg_advisory_lock(41)", "SELECT pg_advisory_lock(41)", "SELECT pg_advisory_unlock(41)"),
        {"pinned: advisory_locks"},
        True,
    ),
    "a lock of the transaction": (("BEGIN", "SELECT pg_advisory_xact_lock(41)", "COMMIT"), set(), False),
    "temporary table": (("CREATE TEMP TABLE t41 (i int)",), {"pinned: temporary_objects"}, True),
    "dropped": (
        ("CREATE TEMP TABLE t41 (i int)", "CREATE TEMP TABLE u41 AS SELECT 1", "DROP TABLE t41, pg_temp.u41"),
        {"pinned: temporary_objects"},
        False,
    ),
    "dropped on commit": (
        ("BEGIN", "CREATE TEMP TABLE t41 (i int) ON COMMIT DROP", "COMMIT"),
        set(),
        False,
    ),
    "discarded": (("CREATE TEMP TABLE t41 (i int)", "DISCARD ALL"), {"pinned: temporary_objects"}, False),
    "held cursor": (("DECLARE h41 CURSOR WITH HOLD FOR SELECT 1",), {"pinned: held_cursors"}, True),
    "closed cursor": (
        ("DECLARE h41 CURSOR WITH HOLD FOR SELECT 1", "FETCH h41", "CLOSE h41"),
        {"pinned: held_cursors"},
        False,
    ),
    "cursor": (("BEGIN", "DECLARE h41 CURSOR FOR SELECT 1", "FETCH h41", "COMMIT"), set(), False),
    "sequence": (("SELECT nextval('s41')",), {"pinned: sequences"}, True),
    "sequences discarded": (("SELECT nextval('s41')", "DISCARD SEQUENCES"), {"pinned: sequences"}, False),
    "prepared by SQL": (
        ("PREPARE p41 (int) AS SELECT $1", "EXECUTE p41 (1)", "DEALLOCATE p41"),
        {"carried: prepared"},
        False,
    ),
    "too much prepared by SQL": (
        tuple(f"PREPARE p{number} AS SELECT 1" for number in range(65)),
        {"carried: prepared", "pinned: prepared_by_sql"},
        True,
    ),
    "code that does nothing": (("DO $$BEGIN PERFORM 1; END$$",), set(), False),
    "seed": (("SELECT setseed(0.5)",), {"pinned: process_state"}, True),
}


@pytest.fixture
def observing(proxy_for, pg18: Postgres) -> RunningProxy:
    return proxy_for(pg18, mode="session", observe=True)


@pytest.fixture
def sequence(admin) -> Any:
    admin.rows("CREATE SEQUENCE s41")
    admin.rows("GRANT ALL ON SEQUENCE s41 TO PUBLIC")
    yield
    admin.rows("DROP SEQUENCE s41")


def watch(proxy: RunningProxy) -> Any:
    return proxy.pools()[0].watch


def now(proxy: RunningProxy) -> dict[str, int]:
    return dict(proxy.call(lambda: dict(watch(proxy).now)))


def peaks(proxy: RunningProxy) -> dict[str, int]:
    return dict(proxy.call(lambda: dict(watch(proxy).peaks)))


def ledger(proxy: RunningProxy) -> dict[tuple[str, str], int]:
    found = proxy.call(lambda: dict(proxy.pools()[0].ledger))
    return {(what, text.decode()): count for (what, text), count in found.items()}


def consequences(proxy: RunningProxy) -> set[str]:
    """What was carried and what pinned."""
    return {what for what, _ in ledger(proxy) if what.startswith(("carried", "pinned"))}


# -- it says what transaction mode does ---------------------------------------------------------------------------


@EXTENDED
@pytest.mark.parametrize("script", SCRIPTS)
@wire
async def test_a_dry_run_and_transaction_mode_agree_on_what_is_carried_and_what_pins(
    proxy_for, pg18: Postgres, sequence, script, extended
):
    texts, wanted, stays = SCRIPTS[script]
    real, dry = proxy_for(pg18), proxy_for(pg18, mode="session", observe=True)
    async with await real.client() as client:
        await tell(client, *texts, extended=extended)
        await until(
            lambda: pinned(real) == stays and consequences(real) == wanted, f"{wanted}, by the server's word"
        )
    async with await dry.client() as client:
        await tell(client, *texts, extended=extended)
        assert consequences(dry) == wanted
        assert now(dry)["pinned"] == stays
        await client.terminate()
    await until(lambda: now(dry)["clients"] == 0)
    assert not any(now(dry).values())


@wire
async def test_both_ledgers_name_the_text_of_a_statement_that_was_bound(proxy_for, pg18: Postgres):
    for options in ({}, {"mode": "session", "observe": True}):
        proxy = proxy_for(pg18, **options)
        async with await proxy.client() as client:
            await tell(client, "SET work_mem = '5MB'", extended=True)
            await client.send(parse("one", "SELECT pg_advisory_lock(7)") + SYNC)
            await client.until_ready()
            bind = messages.message(b"B", b"\0one\0" + bytes(6)) + messages.message(b"E", bytes(5))
            for _ in range(2):
                await client.send(bind + SYNC)
                assert kinds(await client.until_ready()) == "2DCZ"
            found = ledger(proxy)
            assert found["carried: settings", "SET work_mem = ?"] == 1
            assert found["pinned: advisory_locks", "SELECT pg_advisory_lock(?)"] == (2 if options else 1)


@wire
async def test_with_unsafe_refuse_it_counts_the_texts_that_would_fail_and_lets_them_pass(
    proxy_for, pg18: Postgres
):
    real = proxy_for(pg18, unsafe="refuse")
    dry = proxy_for(pg18, unsafe="refuse", mode="session", observe=True)
    text = "SELECT pg_advisory_lock(3)"
    async with await real.client() as client:
        assert error(await client.query(text))["C"] == "53300"
    async with await dry.client() as client:
        assert kinds(await client.query(text)) == "TDCZ"
        assert now(dry)["pinned"] == 0, "in transaction mode there would be nothing to keep"
    assert ledger(dry) == ledger(real) == {("refused: advisory_locks", "SELECT pg_advisory_lock(?)"): 1}


@wire
async def test_code_that_a_text_does_not_show_is_counted_as_asked_about(observing):
    async with await observing.client() as client:
        await tell(client, "DO $$BEGIN PERFORM 1; END$$")
        assert now(observing)["pinned"] == 0
    assert ledger(observing) == {("asked: unknown", "DO $$BEGIN PERFORM ?; END$$"): 1}


@wire
async def test_a_text_too_long_to_be_read_and_a_function_by_number_would_pin_to_the_end(observing):
    async with await observing.client() as client:
        assert kinds(await client.query("SELECT 1 --" + "x" * 1_100_000)) == "TDCZ"
        await client.send(messages.message(b"F", (1299).to_bytes(4, "big") + bytes(6)))  # now()
        assert kinds(await client.until_ready()) == "VZ"
        await tell(client, "DISCARD ALL")
        assert now(observing)["pinned"] == 1
        found = observing.call(lambda: [list(c.sight.reasons) for c in observing.daemon.sessions()])
        assert sorted(found[0]) == ["function_call", "statement_too_long"]


@wire
async def test_a_client_encoding_that_cannot_be_read_would_pin(observing):
    async with await observing.client(params={"client_encoding": "SJIS"}) as client:
        await tell(client, "LISTEN c")
        assert now(observing)["pinned"] == 1
    assert consequences(observing) == {"pinned: client_encoding"}


@wire
async def test_what_npgsql_sends_in_place_of_discard_all_clears_in_both(proxy_for, pg18: Postgres):
    text = (
        "SET SESSION AUTHORIZATION DEFAULT;RESET ALL;CLOSE ALL;UNLISTEN *;SELECT pg_advisory_unlock_all();"
        "DISCARD SEQUENCES;DISCARD TEMP"
    )
    for options in ({}, {"mode": "session", "observe": True}):
        proxy = proxy_for(pg18, **options)
        async with await proxy.client(params={"work_mem": "7MB"}) as client:
            await tell(client, "SET work_mem = '5MB'", "LISTEN c", "CREATE TEMP TABLE t41 (i int)")
            await tell(client, text)
            if options:
                assert now(proxy)["pinned"] == 0
            else:
                assert value(await client.query("SHOW work_mem")) == "7MB"
                await until(lambda proxy=proxy: pinned(proxy) == 0, "nothing ties it any more")


# -- it changes nothing -------------------------------------------------------------------------------------------


@wire
async def test_what_a_client_hears_is_what_postgresql_says(proxy_for, pg: Postgres):
    proxy = proxy_for(pg, mode="session", observe=True)
    differential = Differential(pg, proxy)
    await differential(
        query("SET work_mem = '5MB'"),
        ready(),
        parse("one", "SELECT set_config('app.tenant', $1, false)") + SYNC,
        ready(),
        query("PREPARE two AS SELECT 1; EXECUTE two; DEALLOCATE two"),
        ready(),
        run("LISTEN c") + run("SELECT 1 / 0") + run("UNLISTEN c") + SYNC,
        ready(),
        query("CREATE TEMP TABLE t41 (i int); COPY t41 FROM STDIN"),
        messages.message(b"d", b"1\n") + messages.message(b"c"),
        ready(),
        run("SELECT i + 0 AS i FROM t41") + SYNC,
        ready(),
        query("SELECT pg_advisory_lock(1), pg_advisory_unlock(1); SHOW work_mem"),
        ready(),
    )


def test_psycopg_s_prepared_statements_are_told_by_their_names(observing):
    with psycopg.connect(observing.dsn, autocommit=True, prepare_threshold=0) as connection:
        for number in range(3):
            connection.execute("SELECT pg_advisory_lock(%s)", (number,))
        assert now(observing)["pinned"] == 1
        for number in range(3):
            connection.execute("SELECT pg_advisory_unlock(%s)", (number,))
            assert now(observing)["pinned"] == (number < 2)
        with connection.transaction(), connection.cursor("held", withhold=True) as cursor:
            cursor.execute("SELECT 1")
            assert now(observing)["pinned"] == 1
        assert now(observing)["pinned"] == 0
    assert ledger(observing)["pinned: advisory_locks", "SELECT pg_advisory_lock(?)"] == 3


# -- what multiplexing would save ---------------------------------------------------------------------------------


@wire
async def test_peaks_say_how_many_connections_transaction_mode_would_have_needed(observing):
    async with (
        await observing.client() as one,
        await observing.client() as two,
        await observing.client() as three,
        await observing.client(),
    ):
        for client in (one, two, three):
            await tell(client, "SELECT 1")
        assert now(observing) == {
            "clients": 4,
            "connections": 3,
            "busy": 0,
            "pinned": 0,
            "listening": 0,
            "needed": 0,
        }
        assert peaks(observing)["needed"] == 1
        await tell(one, "BEGIN")
        await tell(two, "BEGIN", "SELECT 1")
        assert now(observing) == {
            "clients": 4,
            "connections": 3,
            "busy": 2,
            "pinned": 0,
            "listening": 0,
            "needed": 2,
        }
        await tell(one, "COMMIT")
        await tell(three, "SELECT pg_advisory_lock(8)")
        assert now(observing) == {
            "clients": 4,
            "connections": 3,
            "busy": 1,
            "pinned": 1,
            "listening": 0,
            "needed": 2,
        }
        await tell(three, "BEGIN")
        assert now(observing) == {
            "clients": 4,
            "connections": 3,
            "busy": 2,
            "pinned": 1,
            "listening": 0,
            "needed": 2,
        }
        await two.abort()
        await until(lambda: now(observing)["clients"] == 3)
        assert now(observing) == {
            "clients": 3,
            "connections": 2,
            "busy": 1,
            "pinned": 1,
            "listening": 0,
            "needed": 1,
        }
        assert peaks(observing) == {
            "clients": 4,
            "connections": 3,
            "busy": 2,
            "pinned": 1,
            "listening": 0,
            "needed": 2,
        }


@wire
async def test_all_listeners_need_one_connection(observing):
    async with await observing.client() as one, await observing.client() as two:
        for client in (one, two):
            await tell(client, "LISTEN c")
        assert now(observing) == {
            "clients": 2,
            "connections": 2,
            "busy": 0,
            "pinned": 0,
            "listening": 2,
            "needed": 1,
        }
        await tell(one, "UNLISTEN c")
        assert now(observing)["needed"] == 1
        await two.abort()
        await until(lambda: now(observing)["needed"] == 0)


# -- the console --------------------------------------------------------------------------------------------------


@wire
async def test_show_pins_has_each_reason_marked_as_observed_and_none_of_session_mode(proxy_for, pg18: Postgres):
    dry = proxy_for(pg18, mode="session", observe=True, top={"admin_users": [pg18.user]})
    async with (
        await dry.client() as client,
        await dry.client() as quiet,
        await dry.client(database="cenote") as boss,
    ):
        await tell(quiet, "SELECT 1")
        await tell(client, "SELECT pg_advisory_lock(3)", "CREATE TEMP TABLE t41 (i int)")
        found = rows(await boss.query("SHOW PINS"))
        assert [(row[5], row[6], row[9]) for row in found] == [
            ("advisory_locks", "t", "SELECT pg_advisory_lock(3)"),
            ("temporary_objects", "t", "CREATE TEMP TABLE t41 (i int)"),
        ]
        ((_, _, _, *figures),) = rows(await boss.query("SHOW OBSERVED"))
        assert figures[:10] == ["2", "2", "2", "2", "0", "1", "1", "1", "0", "0"]
        await tell(client, "DISCARD ALL")
        assert rows(await boss.query("SHOW PINS")) == []


@wire
async def test_a_reload_begins_and_ends_it_while_clients_stay(proxy_for, pg18: Postgres):
    proxy = proxy_for(pg18, mode="session")

    def configured(observe: bool) -> None:
        changed = {**proxy.config, "databases": {pg18.database: dict(proxy.config["databases"][pg18.database])}}
        changed["databases"][pg18.database]["observe"] = observe
        proxy.daemon.read_config = lambda: config_of(changed)

    async with await proxy.client() as client:
        await tell(client, "LISTEN before")
        assert watch(proxy) is None
        configured(True)
        await proxy.begin(lambda: reload(proxy.daemon))
        await tell(client, "LISTEN behind")
        wanted = {"clients": 1, "connections": 1, "busy": 0, "pinned": 0, "listening": 1, "needed": 1}
        assert now(proxy) == wanted
        configured(False)
        await proxy.begin(lambda: reload(proxy.daemon))
        await tell(client, "LISTEN later")
        assert watch(proxy) is None
        assert set(ledger(proxy)) == {("carried: listen", "LISTEN behind")}


@wire
async def test_remembered_statements_are_bounded_for_each_client(observing):
    async with await observing.client() as client:
        for number in range(600):
            await client.send(parse(f"s{number}", f"SET work_mem = '{number + 64}kB'"))
        await client.send(SYNC)
        await client.until_ready()
        sizes = observing.call(lambda: [len(c.sight.statements) for c in observing.daemon.sessions()])
        assert sizes == [512]
