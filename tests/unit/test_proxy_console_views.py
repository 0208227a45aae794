"""What the console says about who may have how much, about itself, and about texts it does not know; and that an
order runs when it is executed, not when it is prepared.
"""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from proxy_fakes import FakeDaemon
from test_proxy_console import NOW, SYNC, Answer, B, D, E, P, Q, ask, show

from cenote.core.machine import DRAINING, PAUSED, RUNNING
from cenote.proxy.admin.console import Console
from cenote.proxy.admin.orders import ORDERS
from cenote.proxy.admin.tables import TABLES
from cenote.proxy.config import config_of
from cenote.proxy.operations import Scope
from cenote.reasons import TEXT


@pytest.fixture
def daemon(monkeypatch: pytest.MonkeyPatch) -> FakeDaemon:
    for name in ("table", "views"):
        monkeypatch.setattr(f"cenote.proxy.admin.{name}.monotonic", lambda: NOW)
    daemon = FakeDaemon(NOW)
    daemon.pool.perform = daemon.pool.machine.effects.clear
    daemon.pool.tick_now = daemon.pool.machine.effects.clear
    daemon.asked = asyncio.Queue()
    return daemon


@pytest.fixture
def console(daemon: FakeDaemon) -> Console:
    return Console(daemon)


# -- who may have how much ----------------------------------------------------------------------------------


def test_users_and_databases_are_sums_over_their_pools(console: Console, daemon: FakeDaemon) -> None:
    daemon.open_server()
    daemon.lend(daemon.client())
    waiting = daemon.client()
    waiting.waiter = daemon.pool.machine.acquire(NOW, 60.0, None, waiting)
    app, boss = show(console, "USERS")
    assert (app["user"], app["configured"], app["admin"], app["pools"]) == ("app", "t", "f", "1")
    assert (app["clients"], app["connections"], app["leased"], app["waiting"]) == ("2", "1", "1", "1")
    assert (boss["user"], boss["admin"], boss["clients"], boss["max_clients"]) == ("boss", "t", "0", None)
    (orders,) = show(console, "DATABASES")
    assert (orders["database"], orders["dbname"], orders["host"], orders["port"]) == (
        "orders",
        "orders",
        "db.example",
        "5432",
    )
    assert (orders["state"], orders["clients"], orders["waiting"]) == ("running", "2", "1")


def test_a_database_that_is_gone_from_the_configuration_is_shown_while_it_drains(
    console: Console, daemon: FakeDaemon
) -> None:
    daemon.config = config_of({"databases": {"other": {}}, "users": {"boss": {"password": "x"}}})
    daemon.pool.machine.drain(NOW, NOW + 5)
    other, orders = show(console, "DATABASES")
    assert (other["database"], other["configured"]) == ("other", "t")
    assert (orders["database"], orders["configured"], orders["state"]) == ("orders", "f", "draining")
    assert [row["user"] for row in show(console, "USERS")] == ["boss", "app"]


def test_limits_say_what_a_server_gives_and_why_it_is_asked_for_less(console: Console, daemon: FakeDaemon) -> None:
    daemon.open_server()
    (row,) = show(console, "LIMITS")
    assert (row["server"], row["server_max"], row["reserved"], row["percent"]) == (
        "db.example:5432",
        "100",
        "3",
        "70.0",
    )
    assert (row["most"], row["limit"], row["used"], row["idle"], row["others"]) == ("68", "68", "1", "1", "7")
    assert (row["lowered_s"], row["reason"]) == (None, "")
    server = daemon.budgets["db.example:5432"]
    server.budget.refused(NOW)
    server.reason = "sorry, too many clients already"
    (row,) = show(console, "LIMITS")
    assert (row["limit"], row["lowered_s"], row["reason"]) == ("1", "60.0", "sorry, too many clients already")


def test_the_budget_says_of_each_pool_what_it_has_and_has_a_right_to(console: Console, daemon: FakeDaemon) -> None:
    daemon.open_server()
    daemon.lend(daemon.client())
    daemon.budgets["db.example:5432"].budget.divide(NOW)
    (row,) = show(console, "BUDGET")
    assert (row["database"], row["user"], row["floor"], row["demand"], row["share"]) == (
        "orders",
        "app",
        "1",
        "1",
        "1",
    )
    assert (row["size"], row["leased"], row["idle"], row["max_size"], row["limit"]) == ("1", "1", "0", "3", "3")


# -- why does a client wait? --------------------------------------------------------------------------------


def test_a_client_that_waits_sees_its_place_and_who_has_the_connections(
    console: Console, daemon: FakeDaemon
) -> None:
    daemon.open_server()
    holder = daemon.client(pin="listen")
    daemon.now = NOW - 12.0
    daemon.lend(holder)
    for _ in range(2):
        client = daemon.client()
        client.waiter = daemon.pool.machine.acquire(NOW - 2.0, 60.0, None, client)
    rows = show(console, "CLIENTS")
    assert [(row["place"], row["waited_s"]) for row in rows] == [(None, None), ("1", "2.0"), ("2", "2.0")]
    assert rows[0]["waits_for"] == ""
    assert rows[2]["waits_for"] == (
        "1 of 3 connections are leased, 1 pinned (listen=1), the oldest lease is 12.0 s old (client 1), "
        "2 connecting"
    )


def test_a_client_of_a_paused_pool_is_told_that_it_is(console: Console, daemon: FakeDaemon) -> None:
    daemon.pool.machine.pause(NOW)
    client = daemon.client()
    client.waiter = daemon.pool.machine.acquire(NOW, 60.0, None, client)
    assert show(console, "POOLS")[0]["state"] == "paused"
    assert show(console, "CLIENTS")[0]["waits_for"] == "the pool is paused (RESUME ends that)"


def test_a_client_that_waits_for_a_server_that_is_down_hears_why(console: Console, daemon: FakeDaemon) -> None:
    daemon.pool.works.last_error = ConnectionError("connection refused")
    client = daemon.client()
    client.waiter = daemon.pool.machine.acquire(NOW, 60.0, None, client)
    assert show(console, "CLIENTS")[0]["waits_for"] == (
        "0 of 3 connections are leased, 1 connecting, the last attempt to connect failed: connection refused"
    )


def test_how_a_client_logged_in_is_shown_where_it_is_known(console: Console, daemon: FakeDaemon) -> None:
    login = SimpleNamespace(
        user="a", database="b", application_name="", replication=None, method="cert", label="x"
    )
    daemon.client(login=login)
    daemon.client()
    assert [(row["method"], row["label"]) for row in show(console, "CLIENTS")] == [("cert", "x"), ("", "")]


# -- itself -------------------------------------------------------------------------------------------------


def test_the_configuration_says_which_key_sets_a_value_and_whether_reload_changes_it(console: Console) -> None:
    rows = {row["key"]: row for row in show(console, "CONFIG")}
    assert (rows["pools.orders/app.max_size"]["source"], rows["pools.orders/app.max_size"]["default"]) == (
        "databases.orders.max_size",
        "10",
    )
    assert rows["pools.orders/app.acquire_timeout"]["source"] == rows["listen.port"]["source"] == ""
    assert rows["users.app.password"]["source"] == "users.app.password"
    unloadable = {key for key, row in rows.items() if row["reloadable"] == "f"}
    assert {"listen.host", "listen.port", "listen.unix_dir", "metrics_port", "pools.orders/app.mode"} <= unloadable
    assert rows["listen.tls_cert"]["reloadable"] == rows["admin_users"]["reloadable"] == "t"


def test_every_reason_is_listed_with_its_meaning_and_how_often_it_was_given(
    console: Console, daemon: FakeDaemon
) -> None:
    daemon.open_server()
    daemon.pool.pins = {"listen": 4}
    rows = {(row["kind"], row["reason"]): row for row in show(console, "REASONS")}
    assert set(rows) == {(kind, word) for kind, words in TEXT.items() for word in words}
    assert all(row["text"] for row in rows.values())
    assert rows["opened", "minimum"]["count"] == "1"
    assert rows["pinned", "listen"]["count"] == "4"
    assert rows["closed", "stale"]["count"] == "0"
    assert rows["failure", "private"]["count"] is None


def test_logins_are_counted_by_what_came_of_them(console: Console, daemon: FakeDaemon) -> None:
    daemon.arrive()
    daemon.logins.observe(0.1)
    daemon.login_failures = {"wrong_password": 3, "a_new_word": 1}
    counts = {row["outcome"]: row["count"] for row in show(console, "LOGINS")}
    assert (counts["under_way"], counts["admitted"]) == ("1", "1")
    assert (counts["wrong_password"], counts["no_database"], counts["a_new_word"]) == ("3", "0", "1")


def test_addresses_say_how_clients_come_in(console: Console, daemon: FakeDaemon) -> None:
    daemon.addresses.append("/run/.s.PGSQL.6432")
    assert [tuple(row.values()) for row in show(console, "LISTEN")] == [
        ("127.0.0.1:6432", "tcp", "disable"),
        ("/run/.s.PGSQL.6432", "unix", "disable"),
    ]


def test_help_for_one_command_says_all_about_it(console: Console) -> None:
    for order in ORDERS:
        page = ask(console, Q(f"help {order.name.lower()}")).records
        assert [(row["command"], row["text"]) for row in page] == [(order.usage, order.text), ("", order.details)]
        assert len(order.text) < 200
    for table in TABLES:
        for text in (f"HELP SHOW {table.name}", f"help {table.name.lower()};"):
            first, *columns = ask(console, Q(text)).records
            assert (first["command"], first["text"]) == (f"SHOW {table.name}", table.text)
            assert [row["command"] for row in columns] == [column.name for column in table.columns]


# -- what it does not know ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("SHOW POLS", "SHOW POOLS"),
        ("show client", "SHOW CLIENTS"),
        ("SHWO POOLS", "SHOW POOLS"),
        ("POOLS", "SHOW POOLS"),
        ("PUASE orders", "PAUSE"),
        ("RELAOD", "RELOAD"),
        ("HELP PAUSED", "HELP PAUSE"),
        ("HLEP", "HELP"),
    ],
)
def test_a_misspelt_command_is_answered_with_the_one_that_was_meant(
    text: str, meant: str, console: Console
) -> None:
    error = ask(console, Q(text)).error
    assert (error["C"], error["M"]) == (
        "42601",
        f'cenote: the console does not know "{text}"; did you mean "{meant}"?',
    )


@pytest.mark.parametrize("text", ["XYZZY", "SHOW XYZZY", "HELP XYZZY"])
def test_a_text_that_is_like_nothing_is_not_guessed_at(text: str, console: Console) -> None:
    assert "did you mean" not in ask(console, Q(text)).error["M"]


@pytest.mark.parametrize(
    "text",
    [
        'SELECT d.datname as "Name",\n pg_catalog.pg_get_userbyid(d.datdba) as "Owner"\n'
        "FROM pg_catalog.pg_database d\nORDER BY 1;",
        "SELECT c.relname FROM pg_catalog.pg_class c WHERE (c.relname) LIKE 'a%' LIMIT 1000",
        "SELECT pg_catalog.quote_ident(datname) FROM pg_catalog.pg_database WHERE datname LIKE 'ce%'",
    ],
)
def test_what_psql_asks_of_the_catalog_is_an_error_and_the_session_goes_on(text: str, console: Console) -> None:
    answer = ask(console, Q(text), Q("SHOW VERSION"))
    assert answer.kinds == "EZ" + "TDCZ"
    assert answer.error["C"] == "0A000"


# -- orders -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "scope"),
    [
        ("DRAIN", Scope()),
        ("drain orders;", Scope("orders")),
        ("DRAIN\n  orders/app -- now", Scope("orders", "app")),
        ('/* x */ DRAIN /* y */ "orders"/"app"', Scope("orders", "app")),
        ("DRAIN orders/app TIMEOUT 1.5", Scope("orders", "app")),
        ("DRAIN timeout 3", Scope()),
    ],
)
def test_an_order_names_all_a_database_or_a_pool(
    text: str, scope: Scope, console: Console, daemon: FakeDaemon
) -> None:
    assert ask(console, Q(text)).tags == ["DRAIN"]
    assert daemon.standing == [(scope, DRAINING)]
    assert daemon.pool.machine.mode == DRAINING


@pytest.mark.parametrize(
    "text",
    [
        "DRAIN orders app",
        "DRAIN orders/app/x",
        "DRAIN TIMEOUT",
        "DRAIN TIMEOUT -1",
        "RESUME 'orders'/",
        "KILL",
        "KILL orders",
        "KILL POOL",
        "KILL 1 2",
        "KILL 99999999999999999999",
        "RELOAD now",
        "SHUTDOWN orders",
        "RECONNECT a/b c",
    ],
)
def test_an_order_that_makes_no_sense_says_how_it_is_written_and_does_nothing(
    text: str, console: Console, daemon: FakeDaemon
) -> None:
    answer = ask(console, Q(f"RESUME; {text}"))
    assert answer.kinds == "EZ"
    assert answer.error["C"] == "42601"
    assert " is written " in answer.error["M"]
    assert answer.error["H"].startswith("HELP ")
    assert daemon.pool.machine.mode == RUNNING


@pytest.mark.parametrize(
    ("text", "sqlstate"),
    [
        ("DRAIN nowhere", "3D000"),
        ("RESUME Orders", "3D000"),
        ("RECONNECT orders/stranger", "42704"),
        ("KILL 77", "42704"),
        ("KILL POOL nowhere", "3D000"),
    ],
)
def test_an_order_for_what_is_not_there_is_an_error(text: str, sqlstate: str, console: Console) -> None:
    answer = ask(console, Q(text))
    assert answer.kinds == "EZ"
    assert answer.error["C"] == sqlstate
    assert "SHOW" in answer.error["M"]
    assert ask(console, P(text), B(), D("P"), E(), SYNC).kinds == "12nEZ"


def test_an_order_runs_when_it_is_executed_and_as_often(console: Console, daemon: FakeDaemon) -> None:
    machine = daemon.pool.machine
    assert ask(console, P("RECONNECT orders", "r"), D("S", "r"), B("", "r"), D("P"), SYNC).kinds == "1tn2nZ"
    assert machine.epoch == 0
    for epoch in (1, 2):
        assert ask(console, B("", "r"), E(), SYNC).tags == ["RECONNECT"]
        assert machine.epoch == epoch


def test_in_a_failed_transaction_no_order_runs(console: Console, daemon: FakeDaemon) -> None:
    assert ask(console, Q("BEGIN"), Q("nonsense"), Q("DRAIN"), Q("ROLLBACK")).kinds == "CZ" + "EZ" + "EZ" + "CZ"
    assert daemon.pool.machine.mode == RUNNING


@pytest.mark.parametrize(
    ("text", "how"), [("SHUTDOWN", "drain"), ("shutdown wait", "wait"), ("Shutdown Immediate;", "now")]
)
def test_shutdown_is_passed_on_to_whoever_runs_the_daemon(
    text: str, how: str, console: Console, daemon: FakeDaemon
) -> None:
    assert ask(console, Q(text)).tags == ["SHUTDOWN"]
    assert daemon.asked.get_nowait() == how


def test_a_user_that_is_no_admin_any_more_may_do_nothing_more(daemon: FakeDaemon) -> None:
    client: Any = SimpleNamespace(login=SimpleNamespace(user="boss"), address="here")
    console = Console(daemon, client=client)
    assert ask(console, Q("SHOW VERSION")).tags == ["SHOW"]
    daemon.config = config_of({"databases": {"orders": {}}, "users": {"app": {"password": "x"}}})
    for text in ("SHOW VERSION", "DRAIN"):
        assert ask(console, Q(text)).error["C"] == "42501"
    assert daemon.pool.machine.mode == RUNNING


def test_an_order_that_takes_a_while_is_answered_when_it_is_done(daemon: FakeDaemon) -> None:
    """What is sent meanwhile waits for it."""

    async def run() -> None:
        daemon.open_server()
        server = daemon.lend(daemon.client())
        console = Console(daemon)
        begun = Answer(console.receive(Q("PAUSE orders; SHOW VERSION") + Q("SELECT 1")))
        assert begun.kinds == "N"
        assert console.unfinished
        assert console.awaited is not None
        assert console.receive(Q("SELECT 2")) == b""
        machine = daemon.pool.machine
        assert machine.mode == PAUSED
        machine.release(server.slot, NOW)
        machine.closed(server.slot, NOW)
        await console.awaited
        assert Answer(console.receive(b"")).kinds == "C" + "TDC" + "Z" + "TDCZ" * 2
        assert not console.unfinished

    asyncio.run(run())


def test_an_order_that_is_cancelled_says_so_and_leaves_nothing_paused(daemon: FakeDaemon) -> None:
    async def run() -> None:
        daemon.open_server()
        daemon.lend(daemon.client())
        console = Console(daemon)
        assert not console.cancel()
        console.receive(P("PAUSE") + B() + E() + SYNC)
        awaited = console.awaited
        assert console.cancel()
        await asyncio.wait([awaited])
        answer = Answer(console.receive(b""))
        assert (answer.kinds, answer.error["C"]) == ("EZ", "57014")
        assert daemon.pool.machine.mode == RUNNING
        assert daemon.standing == []

    asyncio.run(run())
