"""The virtual database `cenote`, byte by byte: what a client sends is answered as PostgreSQL would, from tables of
the daemon's state.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from proxy_fakes import FakeDaemon

from cenote.errors import ProtocolError
from cenote.proxy.admin import console as module
from cenote.proxy.admin.console import Console
from cenote.proxy.admin.orders import ORDERS
from cenote.proxy.admin.tables import COMMANDS, TABLES, markdown
from cenote.wire import messages

DOCS = Path(__file__).parents[2] / "docs" / "console.md"
NOW = 1000.0
COMMANDS_OF_HELP = [
    *(f"SHOW {table.name}" for table in TABLES),
    *(order.usage for order in ORDERS),
    "HELP [command]",
]
SYNC, FLUSH = messages.SYNC, messages.FLUSH


def Q(text: str) -> bytes:
    return messages.query(text)


def P(text: str, name: str = "", types: Sequence[int] = ()) -> bytes:
    oids = struct.pack(f"!H{len(types)}I", len(types), *types)
    return messages.parse(name.encode(), messages.cstring(text) + oids)


def B(portal: str = "", statement: str = "", formats: Sequence[int] = (), values: Sequence[bytes] = ()) -> bytes:
    given = b"".join(struct.pack("!i", len(value)) + value for value in values)
    body = messages.cstring(portal) + messages.cstring(statement) + struct.pack("!HH", 0, len(values)) + given
    return messages.message(b"B", body + struct.pack(f"!H{len(formats)}H", len(formats), *formats))


def D(kind: str, name: str = "") -> bytes:
    return messages.message(b"D", kind.encode() + messages.cstring(name))


def E(portal: str = "", limit: int = 0) -> bytes:
    return messages.message(b"E", messages.cstring(portal) + struct.pack("!i", limit))


def C(kind: str, name: str = "") -> bytes:
    return messages.message(b"C", kind.encode() + messages.cstring(name))


class Answer:
    """Messages of the console, taken apart."""

    def __init__(self, data: bytes) -> None:
        self.messages: list[tuple[str, bytes]] = []
        while data:
            length = int.from_bytes(data[1:5], "big")
            assert len(data) >= length + 1, "an answer is whole"
            self.messages.append((chr(data[0]), data[5 : length + 1]))
            data = data[length + 1 :]

    @property
    def kinds(self) -> str:
        return "".join(kind for kind, _ in self.messages)

    def bodies(self, kind: str) -> list[bytes]:
        return [body for found, body in self.messages if found == kind]

    @property
    def columns(self) -> list[tuple[str, int, int]]:
        """Name, type OID and format of each."""
        body = self.bodies("T")[-1]
        found, at = [], 2
        for _ in range(int.from_bytes(body[:2], "big")):
            end = body.index(b"\0", at)
            _, _, oid, _, _, form = struct.unpack("!ihihih", body[end + 1 : end + 19])
            found.append((body[at:end].decode(), oid, form))
            at = end + 19
        return found

    @property
    def rows(self) -> list[list[bytes | None]]:
        return [self._row(body) for body in self.bodies("D")]

    @staticmethod
    def _row(body: bytes) -> list[bytes | None]:
        found: list[bytes | None] = []
        at = 2
        for _ in range(int.from_bytes(body[:2], "big")):
            (size,) = struct.unpack("!i", body[at : at + 4])
            found.append(None if size < 0 else body[at + 4 : at + 4 + size])
            at += 4 + max(size, 0)
        assert at == len(body)
        return found

    @property
    def records(self) -> list[dict[str, str | None]]:
        names = [name for name, _, _ in self.columns]
        texts = [[None if value is None else value.decode() for value in row] for row in self.rows]
        return [dict(zip(names, row, strict=True)) for row in texts]

    @property
    def tags(self) -> list[str]:
        return [body[:-1].decode() for body in self.bodies("C")]

    @property
    def error(self) -> dict[str, str]:
        (body,) = self.bodies("E")
        return messages.error_fields(body)

    @property
    def status(self) -> str:
        return self.bodies("Z")[-1].decode()


@pytest.fixture
def daemon(monkeypatch: pytest.MonkeyPatch) -> FakeDaemon:
    for name in ("table", "views"):
        monkeypatch.setattr(f"cenote.proxy.admin.{name}.monotonic", lambda: NOW)
    return FakeDaemon(NOW)


@pytest.fixture
def console(daemon: FakeDaemon) -> Console:
    return Console(daemon)


def ask(console: Console, *sent: bytes) -> Answer:
    return Answer(console.receive(b"".join(sent)))


def show(console: Console, what: str) -> list[dict[str, str | None]]:
    answer = ask(console, Q(f"SHOW {what}"))
    assert answer.kinds == "T" + "D" * len(answer.rows) + "CZ"
    assert answer.tags == ["SHOW"]
    return answer.records


# -- tables -------------------------------------------------------------------------------------------------


def test_pools_say_how_many_server_connections_are_in_which_state_and_who_waits(
    console: Console, daemon: FakeDaemon
) -> None:
    daemon.open_server()
    client = daemon.client()
    daemon.lend(client)
    waiting = daemon.client()
    waiting.waiter = daemon.pool.machine.acquire(NOW - 2.5, 60.0, None, waiting)
    daemon.pool.pinned = 1
    (row,) = show(console, "POOLS")
    assert row["database"] == "orders"
    assert row["user"] == "app"
    assert (row["mode"], row["state"]) == ("transaction", "running")
    assert (row["size"], row["min_size"], row["max_size"]) == ("1", "1", "3")
    assert (row["idle"], row["leased"], row["connecting"]) == ("0", "1", "0")
    assert (row["waiting"], row["oldest_wait_s"]) == ("1", "2.5")
    assert (row["clients"], row["pinned"], row["acquired"], row["refused"]) == ("2", "1", "1", "0")


def test_clients_say_what_each_does_since_when_and_why_it_keeps_its_connection(
    console: Console, daemon: FakeDaemon
) -> None:
    daemon.open_server()
    worker = daemon.client(pin="listen", bytes_in=7, bytes_out=9)
    daemon.lend(worker, asked=True)
    waiting = daemon.client()
    waiting.waiter = daemon.pool.machine.acquire(NOW - 2.0, 60.0, None, waiting)
    first, second = show(console, "CLIENTS")
    assert first["state"] == "active"
    assert (first["server_pid"], first["pin"]) == ("4242", "listen")
    assert (first["bytes_in"], first["bytes_out"], first["connected_s"]) == ("7", "9", "5.0")
    assert (first["database"], first["user"], first["application_name"]) == ("orders", "app", "shop")
    assert (first["waited_s"], first["tls"]) == (None, "")
    assert (second["state"], second["state_s"], second["waited_s"]) == ("waiting", "2.0", "2.0")
    assert second["server_pid"] is None


@pytest.mark.parametrize("state", ["login", "closing", "console", "replication", "idle", "in_transaction"])
def test_every_other_state_of_a_client_is_told_too(state: str, console: Console, daemon: FakeDaemon) -> None:
    daemon.open_server()
    visitor = daemon.arrive() if state == "login" else daemon.client()
    if state == "closing":
        visitor.ending = True
    elif state in ("console", "replication"):
        visitor.pool = None
        visitor.login.replication = b"true" if state == "replication" else None
    elif state == "in_transaction":
        daemon.lend(visitor, status="T", asked=False)
    assert [row["state"] for row in show(console, "CLIENTS")] == [state]


def test_a_client_that_logs_in_is_among_the_clients(console: Console, daemon: FakeDaemon) -> None:
    daemon.arrive()
    (row,) = show(console, "CLIENTS")
    assert (row["state"], row["user"], row["pid"]) == ("login", "", "0")


def test_servers_say_who_has_them_and_for_how_long(console: Console, daemon: FakeDaemon) -> None:
    daemon.open_server()
    daemon.now = NOW - 3.0
    client = daemon.client(pin="settings")
    daemon.lend(client, status="T")
    (row,) = show(console, "SERVERS")
    assert (row["state"], row["state_s"], row["pid"]) == ("leased", "3.0", "4242")
    assert (row["address"], row["tls"], row["uses"], row["opened"]) == (
        "192.0.2.1:5432",
        "TLSv1.3",
        "1",
        "minimum",
    )
    assert (row["status"], row["transaction_s"], row["query_s"]) == ("T", "3.0", "3.0")
    assert (row["client_pid"], row["client_address"], row["pin"]) == ("1", "10.0.0.1:4000", "settings")


def test_an_idle_server_connection_has_nobody_and_one_being_opened_has_no_process(
    console: Console, daemon: FakeDaemon
) -> None:
    daemon.pool.machine.start(NOW)
    (row,) = show(console, "SERVERS")
    assert (row["state"], row["opened"]) == ("connecting", "minimum")
    assert (row["pid"], row["age_s"], row["client_pid"]) == (None, None, None)
    daemon.open_server()
    (row,) = show(console, "SERVERS")
    assert (row["state"], row["pid"], row["client_pid"], row["transaction_s"]) == ("idle", "4242", None, None)


def test_stats_are_totals_and_times_by_reason(console: Console, daemon: FakeDaemon) -> None:
    pool = daemon.pool
    daemon.open_server()
    pool.transactions, pool.queries, pool.errors = 3, 5, 1
    pool.bytes_from_clients = 100
    daemon.client(bytes_in=11, bytes_out=22)
    pool.pins = {"settings": 2, "listen": 1}
    for _ in range(100):
        pool.query_s.observe(0.001)
    (row,) = show(console, "STATS")
    assert (row["transactions"], row["queries"], row["errors"]) == ("3", "5", "1")
    assert (row["bytes_from_clients"], row["bytes_to_clients"]) == ("111", "22")
    assert (row["opened"], row["pins"], row["closed"]) == ("minimum=1", "listen=1 settings=2", "")
    assert row["query_avg_s"] == "0.001"
    assert 0.001 <= float(row["query_p99_s"] or "") <= 0.002048
    assert row["transaction_avg_s"] is row["hold_p50_s"] is None


def test_the_configuration_is_shown_with_what_holds_for_each_pool_and_without_passwords(console: Console) -> None:
    rows = {row["key"]: row for row in show(console, "CONFIG")}
    assert rows["listen.port"]["value"] == rows["listen.port"]["default"] == "6432"
    assert rows["listen.login_timeout"]["unit"] == "seconds"
    assert rows["databases.orders.max_size"]["value"] == "3"
    assert rows["pools.orders/app.max_size"]["value"] == "3"
    assert rows["pools.orders/app.acquire_timeout"]["value"] == "120.0"
    assert rows["users.app.password"]["value"] == "***"
    assert rows["admin_users"]["value"] == "boss"
    assert "hunter" not in json.dumps(rows)


def test_help_lists_every_table_and_version_says_what_runs(console: Console) -> None:
    assert [row["command"] for row in show(console, "HELP")] == COMMANDS_OF_HELP
    (version,) = show(console, "VERSION")
    assert version["uptime_s"] == "60.0"
    assert version["version"]


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.name)
def test_every_column_has_a_value_in_every_row_and_its_type_in_binary(
    table: Any, console: Console, daemon: FakeDaemon
) -> None:
    daemon.open_server()
    daemon.lend(daemon.client(pin="listen", text=b"LISTEN there"))
    answer = ask(console, P(f"show {table.name}"), B(formats=[1]), D("P"), E(), SYNC)
    assert answer.kinds.startswith("12TD")
    assert [name for name, _, _ in answer.columns] == [column.name for column in table.columns]
    for row in answer.rows:
        for value, (_, oid, form) in zip(row, answer.columns, strict=True):
            assert form == 1
            if value is not None and oid != 25:
                assert len(value) == {20: 8, 701: 8, 16: 1}[oid]


def test_names_that_clients_give_themselves_cannot_break_a_row(console: Console, daemon: FakeDaemon) -> None:
    client = daemon.client()
    client.login.application_name = "a\0b\ud800"
    assert show(console, "CLIENTS")[0]["application_name"] == "a?b?"


def test_the_page_of_tables_is_current() -> None:
    assert DOCS.read_text() == markdown(), "run: python -m cenote.proxy.admin.tables > docs/console.md"
    for table in TABLES:
        names = [column.name for column in table.columns]
        assert len(set(names)) == len(names)
        assert all(re.fullmatch(r"[a-z0-9_]+", name) for name in names)


# -- what a text may look like ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    ["SHOW POOLS", "show pools;", "  Show\n\tPools ; ", "/* why */ show -- pools?\n pools", ";;show pools;;"],
)
def test_case_space_comments_and_semicolons_do_not_matter(text: str, console: Console) -> None:
    answer = ask(console, Q(text))
    assert answer.kinds == "TDCZ"
    assert answer.records[0]["database"] == "orders"


def test_several_commands_in_one_text_are_answered_one_by_one(console: Console) -> None:
    assert ask(console, Q("show version; begin; select 1")).kinds == "TDC" + "C" + "TDC" + "Z"


@pytest.mark.parametrize("text", ["", " ", ";", "-- nothing"])
def test_an_empty_text_is_answered_as_one(text: str, console: Console) -> None:
    assert ask(console, Q(text)).kinds == "IZ"
    assert ask(console, P(text), B(), D("P"), E(), SYNC).kinds == "12nIZ"


@pytest.mark.parametrize(
    ("text", "sqlstate"),
    [
        ("SHOW", "42601"),
        ("SHOW NOTHING", "42601"),
        ("KILL everyone", "42601"),
        ("SHOW POOLS POOLS", "42601"),
        ("'", "42601"),
        ("SELECT * FROM orders", "0A000"),
        ("SELECT 1, 2", "0A000"),
        ("COPY a FROM STDIN", "0A000"),
        ("LISTEN a", "0A000"),
        ("SHOW POOLS; DROP TABLE a", "0A000"),
    ],
)
def test_what_is_not_known_is_an_error_with_the_commands_and_nothing_of_the_text_runs(
    text: str, sqlstate: str, console: Console
) -> None:
    answer = ask(console, Q(text))
    assert answer.kinds == "EZ"
    assert answer.error["C"] == sqlstate
    assert answer.error["M"].startswith("cenote: ")
    if text != "KILL everyone":
        assert answer.error["H"] == COMMANDS
    assert ask(console, Q("SHOW VERSION")).kinds == "TDCZ"


def test_a_text_of_very_many_commands_is_refused(console: Console) -> None:
    assert ask(console, Q("show stats;" * 5000)).error["C"] == "54000"


@pytest.mark.parametrize(
    ("text", "kinds", "tag"),
    [
        ("SET application_name = 'x'", "CZ", "SET"),
        ("SET SESSION CHARACTERISTICS AS TRANSACTION READ ONLY", "CZ", "SET"),
        ("RESET ALL", "CZ", "RESET"),
        ("DISCARD ALL", "CZ", "DISCARD ALL"),
        ("UNLISTEN *", "CZ", "UNLISTEN"),
        ("CLOSE ALL", "CZ", "CLOSE CURSOR ALL"),
        ("DEALLOCATE ALL", "CZ", "DEALLOCATE ALL"),
        ("DEALLOCATE PREPARE ALL", "CZ", "DEALLOCATE ALL"),
        ('DEALLOCATE "_pg3_0"', "CZ", "DEALLOCATE"),
        ("SELECT 1", "TDCZ", "SELECT 1"),
        ("select pg_catalog.version()", "TDCZ", "SELECT 1"),
        ("SELECT current_schema()", "TDCZ", "SELECT 1"),
        ("SELECT pg_catalog.pg_is_in_recovery()", "TDCZ", "SELECT 1"),
        ("SHOW standard_conforming_strings", "TDCZ", "SHOW"),
        ("show transaction isolation level", "TDCZ", "SHOW"),
        ("SELECT t.oid, typarray FROM pg_type t WHERE typname = 'hstore'", "TCZ", "SELECT 0"),
    ],
)
def test_what_drivers_send_by_themselves_is_answered(text: str, kinds: str, tag: str, console: Console) -> None:
    answer = ask(console, Q(text))
    assert (answer.kinds, answer.tags) == (kinds, [tag])


def test_the_reset_of_asyncpg_is_answered_whole(console: Console) -> None:
    text = "SELECT pg_advisory_unlock_all();\nCLOSE ALL;\nUNLISTEN *;\nRESET ALL;"
    assert ask(console, Q(text)).kinds == "TDCCCCZ"


def test_the_version_is_one_that_drivers_can_read(console: Console) -> None:
    (row,) = ask(console, Q("select version()")).records
    assert re.match(r"PostgreSQL (\d+)\.(\d+) ", row["version"] or "")
    greeting = Answer(console.greeting())
    told = dict(body[:-1].split(b"\0") for body in greeting.bodies("S"))
    assert re.match(rb"\d+\.\d+ \(Cenote ", told[b"server_version"])
    assert told[b"client_encoding"] == b"UTF8"
    assert told[b"standard_conforming_strings"] == b"on"


# -- transactions, in name ----------------------------------------------------------------------------------


def test_the_transaction_status_follows_what_drivers_look_at(console: Console) -> None:
    for text, tag, status in [
        ("BEGIN", "BEGIN", "T"),
        ("SAVEPOINT a", "SAVEPOINT", "T"),
        ("nonsense", None, "E"),
        ("SHOW POOLS", None, "E"),
        ("ROLLBACK TO a", "ROLLBACK", "T"),
        ("RELEASE a", "RELEASE", "T"),
        ("SHOW POOLS", "SHOW", "T"),
        ("COMMIT", "COMMIT", "I"),
        ("START TRANSACTION READ ONLY", "START TRANSACTION", "T"),
        ("nonsense", None, "E"),
        ("COMMIT", "ROLLBACK", "I"),
        ("ROLLBACK", "ROLLBACK", "I"),
    ]:
        answer = ask(console, Q(text))
        assert (answer.tags, answer.status) == ([tag] if tag else [], status), text


def test_in_a_failed_transaction_commands_are_refused_as_postgresql_does(console: Console) -> None:
    ask(console, Q("BEGIN"), Q("nonsense"))
    assert ask(console, Q("SHOW POOLS")).error["C"] == "25P02"
    assert ask(console, P("SHOW POOLS"), B(), E(), SYNC).error["C"] == "25P02"


# -- the extended protocol ----------------------------------------------------------------------------------


def test_a_statement_is_described_with_its_columns_and_no_parameters(console: Console) -> None:
    answer = ask(console, P("SHOW POOLS", "s"), D("S", "s"), SYNC)
    assert answer.kinds == "1tTZ"
    assert answer.bodies("t") == [b"\0\0"]
    assert ("waiting", 20, 0) in answer.columns
    assert ("oldest_wait_s", 701, 0) in answer.columns


def test_a_prepared_statement_may_be_used_again_until_it_is_closed(console: Console) -> None:
    assert ask(console, P("SHOW VERSION", "s"), SYNC).kinds == "1Z"
    for _ in range(3):
        assert ask(console, B("", "s"), E(), SYNC).kinds == "2DCZ"
    assert ask(console, P("SHOW VERSION", "s"), SYNC).error["C"] == "42P05"
    assert ask(console, C("S", "s"), SYNC).kinds == "3Z"
    assert ask(console, B("", "s"), SYNC).error["C"] == "26000"


@pytest.mark.parametrize("text", ["DEALLOCATE s", "DEALLOCATE ALL", "DISCARD ALL"])
def test_deallocate_forgets_prepared_statements(text: str, console: Console) -> None:
    ask(console, P("SHOW VERSION", "s"), SYNC)
    ask(console, Q(text))
    assert ask(console, D("S", "s"), SYNC).error["C"] == "26000"


def test_result_formats_are_one_for_all_or_one_for_each(console: Console) -> None:
    answer = ask(console, P("SHOW VERSION"), B(formats=[0, 0, 1]), D("P"), E(), SYNC)
    assert [form for _, _, form in answer.columns] == [0, 0, 1]
    assert struct.unpack("!d", answer.rows[0][2] or b"") == (60.0,)
    assert ask(console, P("SHOW VERSION"), B(formats=[1, 1]), SYNC).error["C"] == "08P01"
    assert ask(console, P("SHOW VERSION"), B(formats=[2]), SYNC).error["C"] == "22023"


def test_a_portal_gives_its_rows_in_portions(console: Console) -> None:
    answer = ask(console, P("SHOW HELP"), B("p"), E("p", 3), E("p", 3), E("p"), SYNC)
    assert answer.kinds == "12" + "DDDs" + "DDDs" + "D" * (len(COMMANDS_OF_HELP) - 6) + "C" + "Z"
    assert [row[0].decode() for row in answer.rows] == COMMANDS_OF_HELP


def test_portals_end_with_their_transaction(console: Console) -> None:
    ask(console, P("SHOW HELP", "s"), B("p", "s"), E("p", 1), SYNC)
    assert ask(console, E("p"), SYNC).error["C"] == "34000"
    ask(console, Q("BEGIN"))
    ask(console, B("p", "s"), E("p", 1), SYNC)
    assert ask(console, E("p"), SYNC).kinds == "D" * (len(COMMANDS_OF_HELP) - 1) + "CZ"


def test_parameters_are_refused_and_said_to_be(console: Console) -> None:
    for sent in (P("SHOW POOLS", types=[25]), P("SHOW POOLS") + B(values=[b"x"])):
        error = ask(console, sent, SYNC).error
        assert error["C"] == "0A000"
        assert "takes no parameters" in error["M"]


def test_a_driver_s_search_for_a_type_may_have_parameters_and_finds_none(console: Console) -> None:
    text = "SELECT typname FROM pg_type t WHERE t.oid = to_regtype($1)"
    assert ask(console, P(text, types=[25]), B(values=[b"hstore"]), D("P"), E(), SYNC).kinds == "12TCZ"


def test_after_an_error_everything_up_to_sync_is_skipped(console: Console) -> None:
    answer = ask(console, P("nonsense"), B(), D("P"), E(), Q("SHOW POOLS"), SYNC, Q("SHOW VERSION"))
    assert answer.kinds == "EZ" + "TDCZ"


def test_two_commands_cannot_be_prepared_as_one(console: Console) -> None:
    assert ask(console, P("SHOW POOLS; SHOW STATS"), SYNC).error["C"] == "42601"


def test_a_function_call_is_refused_and_copy_messages_outside_of_copy_are_ignored(console: Console) -> None:
    call = messages.message(b"F", b"\0\0\2\xcb" + b"\0" * 6)
    assert ask(console, call).error["C"] == "0A000"
    assert ask(console, messages.message(b"d", b"x"), messages.message(b"c"), Q("select 1")).kinds == "TDCZ"


def test_what_a_client_makes_it_keep_is_bounded(console: Console) -> None:
    for nth in range(module._MAX_KEPT):
        assert ask(console, P("SHOW POOLS", f"s{nth}"), SYNC).kinds == "1Z"
    assert ask(console, P("SHOW POOLS", "more"), SYNC).error["C"] == "54000"
    ask(console, Q("BEGIN"))
    for nth in range(module._MAX_KEPT):
        assert ask(console, B(f"p{nth}", "s1"), FLUSH).kinds == "2"
    assert ask(console, B("more", "s1"), SYNC).error["C"] == "54000"


# -- bytes --------------------------------------------------------------------------------------------------

CONVERSATION = b"".join(
    [
        Q("BEGIN"),
        P("SHOW STATS", "s"),
        D("S", "s"),
        FLUSH,
        B("p", "s", [1]),
        E("p", 1),
        E("p"),
        SYNC,
        Q("bad"),
        Q("ROLLBACK; show clients"),
        C("S", "s"),
        SYNC,
    ]
)


@given(cuts=st.lists(st.integers(0, len(CONVERSATION)), max_size=8))
def test_messages_may_come_in_any_pieces(cuts: list[int]) -> None:
    daemon = FakeDaemon(NOW)
    whole = Console(daemon).receive(CONVERSATION)
    console = Console(daemon)
    bounds = [0, *sorted(cuts), len(CONVERSATION)]
    pieces = [CONVERSATION[a:b] for a, b in pairwise(bounds)]
    assert b"".join(console.receive(piece) for piece in pieces) == whole
    assert Answer(whole).kinds == "CZ" + "1tT2DsCZ" + "EZ" + "CTCZ" + "3Z"


def test_a_termination_closes_it_and_what_follows_is_not_read(console: Console) -> None:
    assert not console.closed
    assert ask(console, Q("select 1"), messages.TERMINATE, Q("select 1")).kinds == "TDCZ"
    assert console.closed


@pytest.mark.parametrize(
    "data",
    [
        b"\xff\0\0\0\4",
        b"p\0\0\0\4",
        b"Q\0\0\0\3",
        b"Q\x7f\xff\xff\xff",
        b"Q\0\0\0\4",
        b"P\0\0\0\5\0",
        b"B\0\0\0\6\0\0",
        b"D\0\0\0\4",
        b"E\0\0\0\5\0",
        messages.message(b"Q", b"select 1\0select 2\0"),
        SYNC[:1] + b"\0\0\0\5x",
        messages.message(b"B", b"\0\0\0\0\0\1\0\0\0\xffx"),
    ],
)
def test_malformed_messages_are_a_protocol_error(data: bytes, console: Console) -> None:
    ask(console, P("SHOW POOLS"), P("select oid from pg_type where oid = $1"))
    with pytest.raises(ProtocolError):
        console.receive(data)


def test_answers_to_one_piece_are_bounded(console: Console, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MAX_ANSWER", 50_000)
    with pytest.raises(ProtocolError, match="too much"):
        console.receive(Q("show config;" * 5) * 20)


@pytest.mark.parametrize("sent", ["SHOW CLIENTS; SHOW CLIENTS", "extended"])
def test_a_long_answer_comes_in_portions_and_is_the_same(sent: str, daemon: FakeDaemon) -> None:
    for _ in range(25):
        daemon.client()
    text = P("SHOW CLIENTS") + B() + E() + SYNC if sent == "extended" else Q(sent)
    whole = Console(daemon).receive(text + Q("SHOW VERSION"))
    console = Console(daemon, portion=10)
    portions = [console.receive(text + Q("SHOW VERSION"))]
    while console.unfinished:
        portions.append(console.receive(b""))
    assert b"".join(portions) == whole
    assert len(portions) == (3 if sent == "extended" else 5)
    assert max(portion.count(b"10.0.0.") for portion in portions) <= 15


def test_what_is_sent_while_an_answer_goes_on_waits_and_is_bounded(daemon: FakeDaemon) -> None:
    for _ in range(25):
        daemon.client()
    console = Console(daemon, portion=10)
    first = console.receive(Q("SHOW CLIENTS"))
    assert console.unfinished
    rest = [console.receive(Q("SHOW VERSION")), console.receive(b"")]
    assert Answer(first + b"".join(rest)).kinds == "T" + "D" * 25 + "CZ" + "TDCZ"
    console.receive(Q("SHOW CLIENTS"))
    with pytest.raises(ProtocolError, match="too much"):
        console.receive(Q("SHOW VERSION") * 100_000)


@given(data=st.binary(max_size=200), split=st.integers(0, 200))
def test_no_bytes_whatever_do_worse_than_a_protocol_error(data: bytes, split: int) -> None:
    console = Console(FakeDaemon(NOW))
    console.receive(P("SHOW HELP", "s") + SYNC)
    try:
        Answer(console.receive(data[:split]) + console.receive(data[split:]))
    except ProtocolError:
        pass


@given(kind=st.sampled_from(b"QPBDECSHF"), body=st.binary(max_size=60))
def test_no_message_whatever_does_worse_than_a_protocol_error(kind: int, body: bytes) -> None:
    console = Console(FakeDaemon(NOW))
    console.receive(P("SHOW HELP", "s") + SYNC)
    try:
        Answer(console.receive(messages.message(bytes([kind]), body)))
    except ProtocolError:
        pass
