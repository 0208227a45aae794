"""`cenote size` on real servers: the planted knee, bad input, and that nothing is left behind."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg
import pytest
from typer.testing import CliRunner

from cenote import embedded
from cenote.cli.app import app
from cenote.embedded import Postgres
from cenote.errors import EmbeddedError, TargetUnusable
from cenote.measure.pressure import watch
from cenote.measure.rounds import Plan, callers
from cenote.measure.size import Moment, Setup, Source, run, steps
from cenote.measure.statements import mean_s, statements
from cenote.measure.target import look
from cenote.testing.postgres import DebianPostgres

pytestmark = [pytest.mark.pg, pytest.mark.interpreted]
COMMAND = [sys.executable, "-m", "cenote.cli", "size"]
TOKENS = 4
PLANTED = f"""DO $$ DECLARE token int; BEGIN
LOOP
  FOR token IN 1..{TOKENS} LOOP
    IF pg_try_advisory_xact_lock(53300, token) THEN PERFORM pg_sleep(0.005); RETURN; END IF;
  END LOOP;
  PERFORM pg_sleep(0.001);
END LOOP; END $$"""
"""Each query needs one of a few tokens for 5 ms of sleep: no CPU moves this knee."""


def size(*words: str) -> Any:
    """The verb, in this process: it is the same code, and the tests are not about starting interpreters."""
    return CliRunner().invoke(app, ["size", *words])


def eventually(condition: Callable[[], Any], within_s: float = 20.0) -> Any:
    deadline = time.monotonic() + within_s
    while not (value := condition()):
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.01)
    return value


def sessions(dsn: str) -> int:
    """Those of the instrument."""
    with psycopg.connect(dsn) as conn:
        row = conn.execute(
            "SELECT count(*) FROM pg_stat_activity WHERE application_name LIKE 'cenote size%'"
        ).fetchone()
        assert row is not None
        return int(row[0])


def test_a_planted_knee_is_found_within_one_step(database: str) -> None:
    setup = Setup(most=12, seconds=5.0, sources=(Source("planted", PLANTED),))
    levels = steps(12)
    at = levels.index(TOKENS)
    for _ in range(3):  # what else the machine does may bend the line
        seen: list[Moment] = []
        result = run(look(database), setup, seen.append)
        if levels[at - 1] <= result.fit.knee <= levels[at + 1]:
            break
    assert levels[at - 1] <= result.fit.knee <= levels[at + 1]
    assert result.fit.knee_low <= result.fit.knee <= result.fit.knee_high
    assert [level.connections for level in result.levels] == levels
    assert all(level.transactions > 0 and level.p99_s for level in result.levels)
    assert result.levels[0].waits["Timeout"] > 0.3, "it is seen to sleep"
    assert {moment.connections for moment in seen} == set(levels)
    eventually(lambda: sessions(database) == 0)


def test_waiting_for_locks_is_seen(database: str) -> None:
    one = Source("one lock", "BEGIN; SELECT pg_advisory_xact_lock(53300); SELECT pg_sleep(0.002); COMMIT;")
    result = run(look(database), Setup(most=6, seconds=2.0, sources=(one,)))
    assert result.levels[0].locked < 0.05
    assert result.levels[-1].locked > 0.4
    assert result.fit.knee < 6, "more connections only wait in line"


def test_json_picture_and_report_come_from_one_run_of_a_script(database: str, tmp_path: Path) -> None:
    script = tmp_path / "orders.sql"
    script.write_text("\\set n random(1, 10 * :scale)\nBEGIN;\nSELECT :n;\nSELECT count(*) FROM pg_am;\nEND;\n")
    plot, report = tmp_path / "size.svg", tmp_path / "size.html"
    words = ["--pgbench-script", f"{script}@2", "-D", "scale=3", "--sql", "SELECT 1", "--protocol", "prepared"]
    words += ["--max", "4", "--seconds", "2", "--json", "--plot", str(plot), "--report", str(report)]
    ended = size(database, *words)
    assert (ended.exit_code, ended.stderr) == (0, "")
    figures = json.loads(ended.stdout)
    assert [source["weight"] for source in figures["mix"]] == [1, 2]
    assert figures["protocol"] == "prepared"
    assert all(not level["failed"] for level in figures["levels"])
    assert figures["levels"][0]["switches_per_s"] > 0
    assert "</svg>" in plot.read_text()
    assert report.read_text().count("<svg") == 2
    eventually(lambda: sessions(database) == 0)


def test_without_a_url_it_measures_a_private_server_and_explains() -> None:
    ended = size("--seconds", "2", "--max", "4", "--instances", "10", "--workers", "4")
    assert (ended.exit_code, ended.stderr) == (0, "")
    for words in ("transactions/s", "system CPU", "The law:", "The formula", "max_connections = ", "40 processes"):
        assert words in ended.stdout
    assert max(map(len, ended.stdout.splitlines())) <= 120


def test_a_role_that_may_only_read_is_measured_with_the_default(pg18: Postgres, database: str) -> None:
    name = database.rsplit("/", 1)[1]
    pg18.psql(
        "CREATE ROLE size_reader LOGIN PASSWORD 'r'; ALTER ROLE size_reader SET default_transaction_read_only = on"
    )
    try:
        ended = size(pg18.dsn_for(user="size_reader", password="r", database=name), "--seconds", "2", "--max", "4")
        assert (ended.exit_code, ended.stderr) == (0, "")
        assert "role size_reader" in ended.stdout
        writes = size(
            pg18.dsn_for(user="size_reader", password="r", database=name),
            "--seconds",
            "3",
            "--sql",
            "CREATE TABLE t ()",
        )
        assert writes.exit_code == 1
        assert "read-only transaction" in writes.stderr
        assert len(writes.stderr.splitlines()) == 1
    finally:
        pg18.psql("DROP ROLE size_reader")


def test_failed_transactions_are_counted_and_rolled_back(database: str) -> None:
    clash = Source(
        "clash",
        "\\set n random(1, 1)\nBEGIN ISOLATION LEVEL SERIALIZABLE;\nUPDATE counts SET n = n + 1;\nCOMMIT;\n",
    )
    with psycopg.connect(database, autocommit=True) as conn:
        conn.execute("CREATE TABLE counts (n int)")
        conn.execute("INSERT INTO counts VALUES (0)")
        result = run(look(database), Setup(most=4, seconds=2.0, sources=(clash,)))
        assert sum(result.levels[-1].failed.values()) > 0
        row = conn.execute("SELECT n FROM counts").fetchone()
        assert row is not None
        assert row[0] >= sum(level.transactions for level in result.levels)


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (["postgresql://nobody@127.0.0.1:1/x"], 1, "cannot measure this server"),
        (["postgresql://{user}:wrong@{host}:{port}/{database}"], 1, "password authentication failed"),
        (["mysql://x"], 2, "url: it begins with mysql://"),
        (["{dsn}", "--max", "2000"], 1, "needs 2001 connections"),
        (["{dsn}", "--sql", "SELEC 1", "--seconds", "3"], 1, "syntax error"),
        (["{dsn}", "--sql", "COPY (SELECT 1) TO STDOUT", "--seconds", "3"], 1, "COPY cannot be measured"),
        (["{dsn}", "--sql", "SELECT pg_sleep(1)", "--seconds", "4"], 2, "which is too slow"),
        (["{dsn}", "--sql", "\\gset"], 2, "--sql, line 1: \\gset is not supported"),
        (["{dsn}", "--pgbench-script", "/nowhere.sql"], 2, "No such file"),
        (["{dsn}", "--max", "3"], 2, "allowed is 4 to 2,000"),
        (["{dsn}", "--plot", "x.pdf"], 2, "must end in .png or .svg"),
    ],
    ids=lambda value: None if not isinstance(value, list) else value[-1][:20],
)
def test_bad_input_gets_one_clear_message(pg18: Postgres, words: list[str], status: int, said: str) -> None:
    known = {"dsn": pg18.dsn, "user": pg18.user, "host": pg18.host, "port": pg18.port, "database": pg18.database}
    ended = size(*(word.format(**known) for word in words))
    assert (ended.exit_code, ended.stdout) == (status, "")
    assert said in ended.stderr
    assert len(ended.stderr.splitlines()) == 1
    eventually(lambda: sessions(pg18.dsn) == 0)


def test_too_few_free_slots_are_seen_before_anything_is_opened() -> None:
    with embedded.Postgres(settings={"max_connections": 8, "max_wal_senders": 0}) as server:
        eventually(lambda: "has 3 left" in size(server.dsn).stderr)  # who has made it ready has gone
        ended = size(server.dsn)
        assert ended.exit_code == 1
        assert "needs 5 connections" in ended.stderr


def test_a_server_that_dies_half_way_ends_it_with_one_message() -> None:
    setup = Setup(most=4, seconds=60.0, sources=(Source("slow", "SELECT pg_sleep(0.02)"),))
    with embedded.Postgres() as server:
        with pytest.raises(TargetUnusable) as caught:
            run(look(server.dsn), setup, lambda _: server.kill())
    assert "the server" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_interrupted_it_cancels_what_runs_and_leaves_no_session(database: str) -> None:
    words = [database, "--seconds", "60", "--max", "4", "--sql", "SELECT pg_sleep(0.3)"]
    with subprocess.Popen(
        [*COMMAND, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        eventually(lambda: sessions(database) >= 2)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (130, "", "cenote: interrupted\n")
    eventually(lambda: sessions(database) == 0)


def test_the_callers_stop_and_cancel_when_nobody_listens_any_more(database: str) -> None:
    target = look(database)
    plan = Plan(
        database, (Source("slow", "SELECT pg_sleep(60)"),), {}, "simple", "cenote size x", time.monotonic() + 50
    )

    class Enough(Exception):
        pass

    def meanwhile() -> float:
        if sessions(database) >= 3:  # the watch and two callers
            raise Enough
        return 0.01

    with pytest.raises(Enough), watch(target, "cenote size x"), callers(plan) as loop:
        loop.run(2, 1.0, 0.0, meanwhile, 30.0)
    eventually(lambda: sessions(database) == 0)


def test_connections_that_never_have_an_answer_are_told_with_how_many_had(database: str) -> None:
    # As behind a pooler with one connection: the first keeps it, and the second waits.
    lock = Source("lock", "SELECT pg_advisory_lock(1)")
    plan = Plan(database, (lock,), {}, "simple", "cenote size x", time.monotonic() + 5)
    with (
        pytest.raises(TargetUnusable, match=r"1 of 2 connections never had an answer: .* lets 1 work"),
        watch(look(database), "cenote size x"),
        callers(plan) as loop,
    ):
        loop.run(2, 0.1, 0.0, lambda: 0.01, 30.0)
    eventually(lambda: sessions(database) == 0)


@pytest.mark.debian_pg
def test_statements_are_read_where_the_extension_is_and_none_where_it_is_not() -> None:
    try:
        server = DebianPostgres(settings={"shared_preload_libraries": "pg_stat_statements"})
    except EmbeddedError as error:
        pytest.skip(f"Debian's PostgreSQL is not installed: {error}")
    with server, psycopg.connect(server.dsn, autocommit=True) as conn:
        assert statements(conn) is None
        server.psql("CREATE EXTENSION pg_stat_statements")
        server.psql(f"GRANT pg_read_all_stats TO {server.user}")
        for _ in range(3):
            conn.execute("SELECT pg_sleep(0.02)")
        found = statements(conn)
    assert found is not None
    slept = next(each for each in found if "pg_sleep" in each.query)
    assert slept.calls == 3
    assert slept.mean_s >= 0.02
    assert mean_s(found) > 0
