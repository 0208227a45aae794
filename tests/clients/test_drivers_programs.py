"""psql and pgbench through the proxy, as people use them."""

from __future__ import annotations

import re
import signal
import subprocess
from pathlib import Path

import pytest
from front import MAX_SIZE, Front

from cenote.testing.postgres import wait_until

CLIENTS = 20
TRANSACTIONS = 50  # each client's


def psql(front: Front, script: str, *options: str, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run a script with psql, unaligned and without headers."""
    return subprocess.run(
        [str(front.server.binary("psql")), "-X", "-A", "-t", "-q", *options],
        input=script,
        env=front.environment,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def pgbench(front: Front, *options: str) -> str:
    """Run pgbench, which must succeed; returns its report."""
    done = subprocess.run(
        [str(front.server.binary("pgbench")), *options],
        env=front.environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_psql_runs_a_script_with_copies_descriptions_and_repeats(front: Front, tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_text("".join(f"{n},note {n}\n" for n in range(5000)))
    done = psql(
        front,
        r"""
        CREATE TABLE item (id int PRIMARY KEY, note text NOT NULL);
        \copy item FROM 'in.csv' (FORMAT csv)
        \copy (SELECT * FROM item ORDER BY id) TO 'out.csv' (FORMAT csv)
        SELECT count(*) AS n, max(id) AS top FROM item \gset
        \echo :n of :top
        \d item
        \dt
        BEGIN; INSERT INTO item VALUES (-1, 'never'); ROLLBACK;
        SELECT 'again' \watch interval=0.01 count=3
        SELECT $1::int + $2::int \bind 40 2 \g
        SELECT 'named ' || $1 \parse mine
        \bind_named mine statement \g
        \close_prepared mine
        SELECT format('SELECT %s', n) FROM generate_series(1, 3) AS n \gexec
        COPY (SELECT 'copied') TO STDOUT;
        \c
        SELECT 'after reconnecting';
        """,
        "-v",
        "ON_ERROR_STOP=1",
        folder=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out.csv").read_text() == (tmp_path / "in.csv").read_text()
    lines = [line for line in done.stdout.splitlines() if line]
    assert lines[0] == "5000 of 4999"
    assert "id|integer||not null|" in lines
    assert "public|item|table|app" in lines
    assert lines.count("again") == 3
    assert lines[-7:] == ["42", "named statement", "1", "2", "3", "copied", "after reconnecting"]


def test_psql_shows_errors_as_the_server_said_them_and_goes_on(front: Front) -> None:
    done = psql(front, "\\set VERBOSITY verbose\nSELECT 1/0;\nSELEC 1;\nSELECT 'alive';\n")
    assert done.returncode == 0
    assert done.stdout == "alive\n"
    assert re.search(r"ERROR:  22012: division by zero", done.stderr)
    assert re.search(r"ERROR:  42601: syntax error at or near \"SELEC\"\nLINE 1: SELEC 1;", done.stderr)
    assert psql(front, "SELECT 1/0;", "-v", "ON_ERROR_STOP=1").returncode == 3


def test_psql_in_one_transaction_is_all_or_nothing(front: Front) -> None:
    script = "CREATE TABLE item (id int);\nINSERT INTO item VALUES (1);\nSELECT 1/0;\n"
    assert psql(front, script, "-1", "-v", "ON_ERROR_STOP=1").returncode == 3
    assert front.ask("SELECT to_regclass('item') IS NULL")


def test_psql_pipelines(front: Front) -> None:
    r"""\startpipeline is PostgreSQL 18's."""
    script = "\\startpipeline\n" + "".join(f"SELECT $1::int * 2 \\bind {n} \\sendpipeline\n" for n in range(100))
    done = psql(front, script + "\\endpipeline\n")
    assert done.stdout.split() == [str(n * 2) for n in range(100)], done.stderr


def test_control_c_in_psql_cancels_the_query_and_nothing_else(front: Front) -> None:
    process = subprocess.Popen(
        [str(front.server.binary("psql")), "-X", "-A", "-t", "-q"],
        env=front.environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    running = "SELECT count(*) FROM pg_stat_activity WHERE state = 'active' AND query ~ 'cancel.m[e]'"
    try:
        assert process.stdin is not None
        process.stdin.write("SELECT pg_sleep(60), 'cancel me';\n")
        process.stdin.flush()
        wait_until(lambda: front.ask(running) == 1)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate("SELECT 'never read: a script ends here';\n", timeout=20)
    finally:
        process.kill()
        process.wait()
    assert "canceling statement due to user request" in err
    wait_until(lambda: front.ask(running) == 0)
    assert psql(front, "SELECT 'alive';").stdout == "alive\n"


@pytest.fixture
def bank(front: Front) -> Front:
    """pgbench's tables, made through the proxy."""
    pgbench(front, "-i", "-s", "1", "-q")
    return front


@pytest.mark.parametrize("protocol", ["simple", "extended", "prepared"])
def test_pgbench_fails_no_transaction_and_the_books_balance(bank: Front, protocol: str) -> None:
    report = pgbench(bank, "-M", protocol, "-c", str(CLIENTS), "-j", "2", "-t", str(TRANSACTIONS))
    done = CLIENTS * TRANSACTIONS
    assert f"number of transactions actually processed: {done}/{done}" in report
    assert "number of failed transactions: 0 " in report
    sums = [
        bank.ask(f"SELECT sum({column}) FROM pgbench_{table}")
        for table, column in (
            ("accounts", "abalance"),
            ("tellers", "tbalance"),
            ("branches", "bbalance"),
            ("history", "delta"),
        )
    ]
    assert len(set(sums)) == 1
    assert bank.ask("SELECT count(*) FROM pgbench_history") == done


def test_pgbench_pipelines_and_reconnects(bank: Front, tmp_path: Path) -> None:
    script = tmp_path / "pipeline.sql"
    script.write_text(
        "\\set aid random(1, 100000)\n\\startpipeline\nBEGIN;\n"
        "UPDATE pgbench_accounts SET abalance = abalance + 1 WHERE aid = :aid;\n"
        "SELECT abalance FROM pgbench_accounts WHERE aid = :aid;\nCOMMIT;\n\\endpipeline\n"
    )
    for options in (("-M", "prepared"), ("-M", "extended", "-C")):
        report = pgbench(bank, *options, "-n", "-f", str(script), "-c", str(CLIENTS), "-t", "10")
        assert f"number of transactions actually processed: {CLIENTS * 10}/{CLIENTS * 10}" in report
        assert "number of failed transactions: 0 " in report
    assert bank.ask("SELECT sum(abalance) FROM pgbench_accounts") == CLIENTS * 10 * 2
    if bank.name != "direct":
        assert len(bank.sessions()) <= MAX_SIZE
