"""psycopg 3 through the proxy, with its defaults."""

from __future__ import annotations

import datetime as dt
import decimal
import io
import threading
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager

import psycopg
import pytest
from front import CLIENTS, MAX_SIZE, Front
from psycopg import errors
from psycopg.pq import TransactionStatus
from psycopg.types.json import Jsonb

from cenote.testing.postgres import wait_until


@pytest.fixture
def conn(dsn: str) -> Iterator[psycopg.Connection]:
    with psycopg.connect(dsn) as conn:
        yield conn


@contextmanager
def several(dsn: str, count: int = CLIENTS) -> Iterator[list[psycopg.Connection]]:
    """More connections than the server has."""
    with ExitStack() as stack:
        yield [stack.enter_context(psycopg.connect(dsn)) for _ in range(count)]


VALUES = [
    None,
    True,
    -(2**31),
    2**62,
    decimal.Decimal("1234567890.0987654321"),
    1.5e300,
    "naïve ☃ 漢字 'quoted' \\ back",
    b"\x00\xff bytes",
    dt.date(2024, 2, 29),
    dt.datetime(2024, 2, 29, 12, 30, 15, 123456, tzinfo=dt.UTC),
    dt.timedelta(days=3, seconds=7),
    uuid.UUID(int=7),
    Jsonb({"a": [1, None, "x"]}),
    [1, 2, 3],
]


@pytest.mark.parametrize("binary", [False, True], ids=["text", "binary"])
def test_every_type_comes_back_as_it_was_sent(conn: psycopg.Connection, binary: bool) -> None:
    cursor = conn.cursor(binary=binary)
    marks = "%b" if binary else "%t"
    for value in VALUES:
        row = cursor.execute(f"SELECT {marks}, 'x'".encode(), [value]).fetchone()
        assert row is not None
        assert row[0] == (value.obj if isinstance(value, Jsonb) else value)


def test_the_connection_knows_its_server(conn: psycopg.Connection, front: Front) -> None:
    assert conn.info.server_version // 10000 == front.server.version
    assert conn.info.parameter_status("server_encoding") == "UTF8"
    assert conn.info.parameter_status("integer_datetimes") == "on"
    assert conn.info.backend_pid > 0
    assert conn.info.encoding == "utf-8"


@pytest.mark.parametrize(
    ("statement", "error"),
    [
        ("SELECT 1/0", errors.DivisionByZero),
        ("SELEC 1", errors.SyntaxError),
        ("SELECT * FROM no_such_table", errors.UndefinedTable),
        ("SELECT 'x'::int", errors.InvalidTextRepresentation),
        ("DO $$ BEGIN RAISE EXCEPTION 'mine' USING ERRCODE = 'AB123', HINT = 'do this'; END $$", psycopg.Error),
    ],
)
def test_errors_of_the_server_come_through_and_the_connection_goes_on(
    conn: psycopg.Connection, statement: str, error: type[psycopg.Error]
) -> None:
    with pytest.raises(error) as caught:
        conn.execute(statement.encode())
    assert caught.value.sqlstate == (error.sqlstate or "AB123")
    if caught.value.sqlstate == "AB123":
        assert caught.value.diag.message_primary == "mine"
        assert caught.value.diag.message_hint == "do this"
    assert conn.info.transaction_status == TransactionStatus.INERROR
    with pytest.raises(errors.InFailedSqlTransaction):
        conn.execute("SELECT 1")
    conn.rollback()
    assert conn.execute("SELECT 1").fetchone() == (1,)


def test_notices_come_with_their_statement(conn: psycopg.Connection) -> None:
    heard: list[str | None] = []
    conn.add_notice_handler(lambda diagnostic: heard.append(diagnostic.message_primary))
    conn.execute("DO $$ BEGIN RAISE NOTICE 'one'; RAISE WARNING 'two'; END $$")
    assert heard == ["one", "two"]


def test_transactions_are_seen_by_others_when_they_commit_and_never_before(dsn: str) -> None:
    with psycopg.connect(dsn) as one, psycopg.connect(dsn) as other:
        one.execute("CREATE TABLE t (id int PRIMARY KEY)")
        one.commit()
        one.execute("INSERT INTO t VALUES (1)")
        assert other.execute("SELECT count(*) FROM t").fetchone() == (0,)
        one.commit()
        assert other.execute("SELECT count(*) FROM t").fetchone() == (1,)  # read committed: same transaction
        other.rollback()
        with pytest.raises(ZeroDivisionError), one.transaction():
            one.execute("INSERT INTO t VALUES (2)")
            raise ZeroDivisionError
        with one.transaction():
            one.execute("INSERT INTO t VALUES (3)")
            with pytest.raises(errors.UniqueViolation), one.transaction():
                one.execute("INSERT INTO t VALUES (3)")
            one.execute("INSERT INTO t VALUES (4)")
        assert other.execute("SELECT array_agg(id ORDER BY id) FROM t").fetchone() == ([1, 3, 4],)


def test_isolation_and_read_only_are_those_of_the_transaction(dsn: str) -> None:
    with psycopg.connect(dsn) as strict, psycopg.connect(dsn) as plain:
        strict.isolation_level = psycopg.IsolationLevel.SERIALIZABLE
        strict.read_only = True
        for _ in range(3):
            assert strict.execute("SHOW transaction_isolation").fetchone() == ("serializable",)
            assert plain.execute("SHOW transaction_isolation").fetchone() == ("read committed",)
            with pytest.raises(errors.ReadOnlySqlTransaction):
                strict.execute("CREATE TABLE never (id int)")
            strict.rollback()
            plain.rollback()


def test_more_connections_than_the_server_has_take_turns(dsn: str) -> None:
    with several(dsn) as conns:
        conns[0].execute("CREATE TABLE t (owner int, turn int)")
        conns[0].commit()
        for turn in range(20):
            for number, conn in enumerate(conns):
                with conn.transaction():
                    conn.execute("INSERT INTO t VALUES (%s, %s)", (number, turn))
                    row = conn.execute("SELECT count(*), max(turn) FROM t WHERE owner = %s", (number,)).fetchone()
                    assert row == (turn + 1, turn)


def test_threads_on_their_own_connections_get_their_own_answers(dsn: str) -> None:
    def client(number: int) -> None:
        with psycopg.connect(dsn, autocommit=True) as conn:
            for turn in range(50):
                mark = f"{number}/{turn}"
                row = conn.execute(f"SELECT %s, {number}".encode(), (mark,)).fetchone()
                assert row == (mark, number)

    with ThreadPoolExecutor(CLIENTS) as threads:
        list(threads.map(client, range(CLIENTS)))


def test_automatic_prepared_statements_follow_the_connection_to_any_server(dsn: str) -> None:
    """After five times psycopg prepares, and every connection calls its first statement `_pg3_0`."""
    with several(dsn) as conns:
        for conn in conns:
            conn.autocommit = True
        for turn in range(15):
            for number, conn in enumerate(conns):
                other_text = f"SELECT %s + {number}, 'statement of {number}'".encode()
                assert conn.execute(other_text, (turn,)).fetchone() == (turn + number, f"statement of {number}")
                assert conn.execute("SELECT %s || '!'", (f"{turn}",)).fetchone() == (f"{turn}!",)


def test_statements_prepared_at_once_live_over_transactions_and_deallocate_is_theirs_alone(dsn: str) -> None:
    with several(dsn) as conns:
        for _ in range(3):
            for number, conn in enumerate(conns):
                with conn.transaction():
                    row = conn.execute("SELECT %s::int * 2", (number,), prepare=True).fetchone()
                    assert row == (number * 2,)
        first, *others = conns
        first.execute("SELECT 1 AS other", prepare=True)
        first.prepared_max = 1  # psycopg then deallocates, by protocol or by SQL
        first.execute("SELECT 2 AS yet_other", prepare=True)
        first.commit()
        for number, conn in enumerate(others, start=1):
            assert conn.execute("SELECT %s::int * 2", (number,), prepare=True).fetchone() == (number * 2,)
            conn.commit()


def test_one_text_with_other_parameter_types_is_another_statement(conn: psycopg.Connection) -> None:
    for _ in range(8):
        for value in (1, "text", 1.5, dt.date(2024, 1, 1), None):
            assert conn.execute("SELECT %s", (value,)).fetchone() == (value,)
        conn.commit()


def test_pipeline_mode_answers_in_order(dsn: str) -> None:
    with several(dsn, MAX_SIZE * 2) as conns:
        for conn in conns:
            conn.autocommit = True
        for turn in range(5):
            for number, conn in enumerate(conns):
                with conn.pipeline():
                    cursors = [conn.execute("SELECT %s, %s, %s", (number, turn, step)) for step in range(30)]
                assert [cursor.fetchone() for cursor in cursors] == [(number, turn, step) for step in range(30)]


def test_an_error_in_a_pipeline_skips_the_rest_up_to_the_sync(conn: psycopg.Connection) -> None:
    conn.autocommit = True
    skipped = None
    with pytest.raises(errors.DivisionByZero), conn.pipeline() as pipeline:
        good = conn.execute("SELECT 1")
        conn.execute("SELECT 1/%s", (0,))
        skipped = conn.execute("SELECT 2")  # says so itself where the answer is here already
        pipeline.sync()
    assert good.fetchone() == (1,)
    if skipped is not None:
        with pytest.raises(psycopg.Error):
            skipped.fetchone()
    assert conn.info.transaction_status == TransactionStatus.IDLE
    assert conn.execute("SELECT 3").fetchone() == (3,)


def test_a_pipeline_with_several_syncs_and_transactions_keeps_what_committed(conn: psycopg.Connection) -> None:
    conn.execute("CREATE TABLE t (id int PRIMARY KEY)")
    conn.commit()
    conn.autocommit = True
    with pytest.raises(errors.UniqueViolation), conn.pipeline() as pipeline:
        conn.execute("INSERT INTO t VALUES (1)")
        pipeline.sync()
        conn.execute("INSERT INTO t VALUES (2)")
        conn.execute("INSERT INTO t VALUES (1)")
        pipeline.sync()
    with conn.pipeline(), conn.transaction():
        conn.execute("INSERT INTO t VALUES (3)")
    assert conn.execute("SELECT array_agg(id ORDER BY id) FROM t").fetchone() == ([1, 3],)


def test_a_pipeline_of_large_answers_does_not_block(conn: psycopg.Connection) -> None:
    """Both sides have more to send than the sockets hold."""
    big = "x" * 300_000
    with conn.pipeline():
        cursors = [conn.execute("SELECT %s || %s", (big, str(step))) for step in range(30)]
    assert [len(cursor.fetchall()[0][0]) for cursor in cursors] == [300_000 + len(str(step)) for step in range(30)]


def test_executemany_gives_each_its_row(conn: psycopg.Connection) -> None:
    conn.execute("CREATE TABLE t (id int, note text)")
    with conn.cursor() as cursor:
        cursor.executemany(
            "INSERT INTO t VALUES (%s, %s) RETURNING id", [(n, f"n{n}") for n in range(500)], returning=True
        )
        found = [cursor.fetchone()]
        while cursor.nextset():
            found.append(cursor.fetchone())
    assert found == [(n,) for n in range(500)]
    assert conn.execute("SELECT count(*), max(note) FROM t").fetchone() == (500, "n99")


def test_server_side_cursors_in_their_transactions(dsn: str) -> None:
    with several(dsn, MAX_SIZE) as conns:
        for number, conn in enumerate(conns):
            with conn.cursor("mine") as cursor:  # the same name on every connection
                cursor.execute("SELECT n * %s FROM generate_series(0, 999) AS n", (number,))
                assert cursor.fetchmany(3) == [(0,), (number,), (2 * number,)]
                cursor.scroll(10)
                assert cursor.fetchone() == (13 * number,)
                assert len(cursor.fetchall()) == 986
        for conn in conns:
            conn.rollback()


def test_streamed_rows_and_an_early_end(conn: psycopg.Connection) -> None:
    rows = conn.cursor().stream("SELECT n FROM generate_series(1, 100000) AS n")
    assert [next(rows) for _ in range(3)] == [(1,), (2,), (3,)]
    rows.close()
    conn.rollback()
    assert sum(row[0] for row in conn.cursor().stream("SELECT n FROM generate_series(1, 5000) AS n")) == 12_502_500


def test_copy_in_and_out(conn: psycopg.Connection) -> None:
    conn.execute("CREATE TABLE t (id int, note text)")
    with conn.cursor() as cursor:
        with cursor.copy("COPY t FROM STDIN") as copy:
            for number in range(20_000):
                copy.write_row((number, None if number % 7 == 0 else f"note\t{number}\n"))
        assert cursor.rowcount == 20_000
        with cursor.copy("COPY (SELECT * FROM t ORDER BY id) TO STDOUT") as copy:
            rows = list(copy.rows())
        assert len(rows) == 20_000
        assert rows[7] == ("7", None)
        assert rows[8] == ("8", "note\t8\n")
        with cursor.copy("COPY t FROM STDIN (FORMAT binary)") as copy:
            copy.set_types(["int4", "text"])
            copy.write_row((-1, "binary"))
        raw = io.BytesIO()
        with cursor.copy("COPY (SELECT id FROM t WHERE id < 3 ORDER BY id) TO STDOUT") as copy:
            for part in copy:
                raw.write(part)
        assert raw.getvalue() == b"-1\n0\n1\n2\n"
    conn.commit()
    assert conn.execute("SELECT count(*) FROM t").fetchone() == (20_001,)


def test_a_copy_that_fails_leaves_a_connection_that_works(conn: psycopg.Connection) -> None:
    conn.autocommit = True
    conn.execute("CREATE TABLE t (id int)")
    cursor = conn.cursor()
    with pytest.raises(errors.InvalidTextRepresentation), cursor.copy("COPY t FROM STDIN") as copy:
        for _ in range(1000):
            copy.write("no number\n")  # the error comes while more is on its way
    with pytest.raises(ZeroDivisionError), cursor.copy("COPY t FROM STDIN") as copy:
        copy.write("1\n")
        raise ZeroDivisionError
    with pytest.raises(errors.UndefinedTable), cursor.copy("COPY no_such_table FROM STDIN") as copy:
        copy.write("1\n")
    out = "COPY (SELECT repeat('x', 1000) FROM generate_series(1, 20000)) TO STDOUT"
    with pytest.raises(ZeroDivisionError), cursor.copy(out) as copy:
        copy.read()
        raise ZeroDivisionError  # psycopg cancels the rest
    assert conn.execute("SELECT count(*) FROM t").fetchone() == (0,)


def test_large_values_pass_both_ways(conn: psycopg.Connection) -> None:
    text = "0123456789abcdef" * (1024 * 1024)  # 16 MB
    row = conn.execute("SELECT %s, md5(%s), length(%s)", (text, text, text)).fetchone()
    assert row is not None
    assert row[0] == text
    assert row[2] == len(text)
    data = bytes(range(256)) * 20_000
    assert conn.execute("SELECT %b", (data,)).fetchone() == (data,)
    assert len(conn.execute("SELECT repeat('y', 1000) FROM generate_series(1, 20000)").fetchall()) == 20_000


def test_many_statements_in_one_string_are_one_transaction(conn: psycopg.Connection) -> None:
    conn.autocommit = True
    conn.execute("CREATE TABLE t (id int)")
    with pytest.raises(errors.DivisionByZero):
        conn.execute("INSERT INTO t VALUES (1); INSERT INTO t VALUES (2); SELECT 1/0")
    assert conn.execute("SELECT count(*) FROM t").fetchone() == (0,)
    cursor = conn.execute("SELECT 1; SELECT 2, 3")
    assert cursor.fetchall() == [(1,)]
    assert cursor.nextset()
    assert cursor.fetchall() == [(2, 3)]


@pytest.mark.parametrize("how", ["cancel", "cancel_safe"])
def test_a_cancel_ends_its_own_query_and_no_other(front: Front, dsn: str, how: str) -> None:
    with psycopg.connect(dsn, autocommit=True) as victim, psycopg.connect(dsn, autocommit=True) as bystander:
        with ThreadPoolExecutor(2) as threads:
            for _ in range(3):
                slow = threads.submit(victim.execute, "SELECT pg_sleep(60), 'victim'")
                other = threads.submit(bystander.execute, "SELECT pg_sleep(0.3), 'bystander'")
                wait_until(lambda: front.ask("SELECT count(*) FROM pg_stat_activity WHERE query ~ '60.*vict[i]m'"
                                             " AND state = 'active'") == 1)  # fmt: skip
                getattr(victim, how)()
                with pytest.raises(errors.QueryCanceled):
                    slow.result(15)
                assert other.result(15).fetchone() == ("", "bystander")
                assert victim.execute("SELECT 'alive'").fetchone() == ("alive",)
        victim.cancel()  # idle: nothing happens
        assert victim.execute("SELECT 'still'").fetchone() == ("still",)


def test_listen_and_notify_reach_the_listener(dsn: str) -> None:
    with psycopg.connect(dsn, autocommit=True) as listener, psycopg.connect(dsn, autocommit=True) as speaker:
        listener.execute("LISTEN news")

        def speak() -> None:
            for number in range(5):
                speaker.execute("SELECT pg_notify('news', %s)", (str(number),))

        thread = threading.Thread(target=speak)
        thread.start()
        heard = [note.payload for note in listener.notifies(timeout=15, stop_after=5)]
        thread.join(15)
        assert heard == ["0", "1", "2", "3", "4"]
        listener.execute("UNLISTEN *")


def test_two_phase_commit_is_finished_by_another_connection(dsn: str) -> None:
    with psycopg.connect(dsn) as one, psycopg.connect(dsn) as other:
        one.execute("CREATE TABLE t (id int)")
        one.commit()
        one.tpc_begin("cenote-1")
        one.execute("INSERT INTO t VALUES (1)")
        one.tpc_prepare()
        one.close()
        assert [xid.gtrid for xid in other.tpc_recover()] == ["cenote-1"]
        other.tpc_commit("cenote-1")
        assert other.execute("SELECT count(*) FROM t").fetchone() == (1,)
