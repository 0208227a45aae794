"""`cenote doctor` on real servers, as its user meets it: findings, exit statuses, messages."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psycopg
import pytest
from typer.testing import CliRunner

from cenote.cli.app import app
from cenote.embedded import Postgres
from cenote.errors import EmbeddedError, TargetUnusable
from cenote.measure.served import served
from cenote.measure.server_facts import look_at_sessions_and_way
from cenote.measure.target import look
from cenote.testing.postgres import DebianPostgres, debian_bin_dir, wait_until

pytestmark = [pytest.mark.pg, pytest.mark.interpreted]


def environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("PG")}


def doctor(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "cenote.cli", "doctor", *words],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env=environment(),
    )


def findings(*words: str, status: int = 0) -> dict[str, Any]:
    """The findings by name; everything of the JSON under ""."""
    ended = CliRunner().invoke(app, ["doctor", *words, "--json"])
    assert (ended.exit_code, ended.stderr) == (status, "")
    told = json.loads(ended.stdout)
    return {"": told, **{finding["name"]: finding for finding in told["findings"]}}


@pytest.fixture(scope="module")
def server() -> Iterator[Postgres]:
    with Postgres(16) as running:
        running.psql("CREATE ROLE reader LOGIN PASSWORD 'r' CONNECTION LIMIT 7")
        running.psql("ALTER ROLE reader SET default_transaction_read_only = on")
        yield running


@pytest.fixture(autouse=True)
def nobody_else(server: Postgres) -> None:
    """What was closed before this test has ended at the server. The doctor does not count who has its name."""
    others = (
        "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()"
    )
    with psycopg.connect(server.superuser_dsn, autocommit=True, application_name="cenote") as conn:
        wait_until(lambda: conn.execute(others).fetchone() == (0,), what="earlier sessions have ended")


# -- what it finds ----------------------------------------------------------------------------------------------


def test_without_a_url_it_examines_a_private_server_and_draws_what_it_finds(tmp_path: Path) -> None:
    picture, page = tmp_path / "slots.png", tmp_path / "report.html"
    ended = doctor("--pool-size", "5", "--plot", str(picture), "--report", str(page))
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "PostgreSQL 18, started for this" in ended.stdout
    assert "5 may connect, 97 fit" in ended.stdout
    assert "\x1b" not in ended.stdout
    assert max(map(len, ended.stdout.splitlines())) <= 120
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert page.read_text().count("<svg") == 2
    assert "slots_overcommitted" in page.read_text()


def test_the_sessions_of_others_are_counted_by_state(server: Postgres) -> None:
    with ExitStack() as stack:
        conns = [stack.enter_context(psycopg.connect(server.dsn, application_name="web")) for _ in range(4)]
        conns[0].execute("SELECT 1")
        found = findings(server.dsn)
        assert found["slots_used"]["figures"] == {"used": 4, "usable": 97, "max_connections": 100}
        assert found["idle_in_transaction"]["figures"]["sessions"] == 1
        assert found["idle_sessions"]["figures"]["idle"] == 3
        # The doctor's own session is the fifth process.
        assert found["memory"]["figures"]["backends_seen"] == 5
        assert 2**16 < found["memory"]["figures"]["backend_bytes"] < 2**26
        own = findings(server.dsn, "--pool-size", "97", "--application", "web")
        assert own["slots_overcommitted"]["severity"] == "ok"
        strangers = findings(server.dsn, "--pool-size", "97", status=3)
        assert strangers["slots_overcommitted"]["figures"]["others"] == 4


def test_what_the_role_may_not_see_is_not_known_and_still_counted(server: Postgres) -> None:
    with psycopg.connect(server.superuser_dsn):
        found = findings(server.dsn)
    assert found["slots_used"]["figures"]["used"] == 1
    for name in ("idle_sessions", "idle_in_transaction"):
        assert found[name]["severity"] == "not known"
        assert "hidden from role app" in found[name]["number"]
        assert "GRANT pg_monitor TO app" in found[name]["remedy"]
    assert found["password_encryption"]["figures"]["md5_roles"] is None


def test_a_read_only_role_is_enough_and_its_connection_limit_is_told(server: Postgres) -> None:
    found = findings(server.dsn_for(user="reader", password="r"), "--pool-size", "8", status=4)
    assert found["role_limits"]["number"] == "role reader may have 7 connections, 8 announced"


def test_a_superuser_also_learns_of_old_passwords(server: Postgres) -> None:
    server.psql("SET password_encryption = md5; CREATE ROLE old LOGIN PASSWORD 'x'")
    try:
        found = findings(server.superuser_dsn, status=3)
    finally:
        server.psql("DROP ROLE old")
    assert found["password_encryption"]["figures"]["md5_roles"] == 1
    assert found["superuser_login"]["severity"] == "note"


def test_through_a_unix_socket_it_says_what_does_not_apply_there(server: Postgres) -> None:
    found = findings(server.socket_dsn)
    assert found["ephemeral_ports"]["number"] == "a Unix socket needs no port"
    assert found["keepalive_server"]["severity"] == "not known"
    assert found["tls"]["figures"]["way"] == "socket"


def test_the_budget_of_a_proxy_is_judged_against_the_same_server(server: Postgres, tmp_path: Path) -> None:
    config = tmp_path / "cenote.toml"
    text = '[users.app]\npassword = "x"\n[databases.app]\nhost = "{}"\nport = {}\nmax_size = 80\n'
    config.write_text(text.format("localhost", server.port))
    found = findings(server.dsn, "--config", str(config))
    assert found["proxy_budget"]["figures"] == {"budget": 67, "pools": 80, "left_by_others": 97, "usable": 97}
    assert found["proxy_budget"]["severity"] == "note"
    assert found["slots_overcommitted"]["figures"]["announced"] == 67
    config.write_text(text.format("db.example.org", 5432))
    assert findings(server.dsn, "--config", str(config))["proxy_budget"]["severity"] == "not known"


def test_behind_a_pooler_it_says_whose_way_it_examined(server: Postgres) -> None:
    with served(server, size=2, clients=5) as proxy:
        found = findings(proxy.dsn)
    assert found["pooler_between"]["severity"] == "note"
    assert found["slots_used"]["figures"]["max_connections"] == 100


@pytest.mark.debian_pg
def test_tls_its_version_and_its_check_are_told() -> None:
    try:
        debian_bin_dir()
    except EmbeddedError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(error))
    with DebianPostgres() as debian:
        found = findings(debian.tls_dsn())
        assert found["tls"]["figures"]["tls"] == "TLSv1.3"
        assert found["tls"]["figures"]["sslmode"] == "verify-full"
        # Before 16 there is no scram_iterations; 4096 are built in.
        assert found["log_in_rate"]["figures"]["scram_iterations"] == 4096
        assert found["idle_session_timeout"]["number"] == "idle_session_timeout = off"
        named = debian.tls_dsn().replace("127.0.0.1", "localhost")
        assert findings(named)["dns_ttl"]["severity"] in {"ok", "note", "not known"}


# -- endings ----------------------------------------------------------------------------------------------------


def test_nothing_is_left_on_the_server(server: Postgres) -> None:
    doctor(server.dsn)
    sessions = "SELECT count(*) FROM pg_stat_activity WHERE application_name LIKE 'cenote%'"
    wait_until(lambda: server.psql(sessions) == "0", what="the doctor's sessions to end")
    assert server.psql("SELECT count(*) FROM pg_class WHERE relnamespace = 'public'::regnamespace") == "0"


def test_a_full_server_turns_the_doctor_away_with_one_clear_message_but_not_a_superuser() -> None:
    settings = {"max_connections": 6, "superuser_reserved_connections": 2, "max_wal_senders": 0}
    with Postgres(18, settings=settings) as small, ExitStack() as stack:
        for _ in range(4):
            stack.enter_context(psycopg.connect(small.dsn))
        ended = doctor(small.dsn)
        assert (ended.returncode, ended.stdout) == (1, "")
        assert ended.stderr.count("\n") == 1
        assert "No slot is left for the doctor: as a superuser" in ended.stderr
        found = findings(small.superuser_dsn, status=4)
        assert found["slots_used"]["number"] == "4 of 4 usable slots are taken (100 %)"


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (("postgresql://app@127.0.0.1:1/app",), 1, "Connection refused. Is the server running"),
        (("postgresql://[",), 2, "cenote: url: "),
        (("--instances", "2"), 2, "give that too"),
        (("--pool-size", "0"), 2, "pool_size = 0: allowed is 1 to 100,000"),
        (("--rate", "many"), 2, "Invalid value"),
        (("--config", "/nonexistent/cenote.toml"), 2, "No such file"),
        (("--plot", "slots.pdf"), 2, "the name must end in .png or .svg"),
    ],
)
def test_what_cannot_be_is_told_in_a_line_and_by_the_exit_status(
    words: tuple[str, ...], status: int, said: str
) -> None:
    ended = doctor(*words)
    assert (ended.returncode, ended.stdout) == (status, "")
    assert said in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_wrong_password_is_said_and_not_shown(server: Postgres) -> None:
    ended = doctor(server.dsn_for(password="falsch"))
    assert (ended.returncode, ended.stdout) == (1, "")
    assert "password authentication failed" in ended.stderr
    assert "falsch" not in ended.stderr


def test_a_server_that_dies_half_way_is_said_to_have_stopped_answering() -> None:
    with Postgres(18) as mortal:
        seen = look(mortal.dsn)
        mortal.kill()
        with pytest.raises(TargetUnusable, match="stopped answering while it was asked"):
            look_at_sessions_and_way(seen, lambda _: None)


def test_a_server_that_falls_silent_is_hung_up_on(server: Postgres) -> None:
    with psycopg.connect(server.superuser_dsn) as locking:
        locking.execute("LOCK TABLE pg_catalog.pg_stat_ssl IN ACCESS EXCLUSIVE MODE")
        with pytest.raises(TargetUnusable, match="stopped answering"):
            look_at_sessions_and_way(look(server.dsn), lambda _: None, patience_s=0.3)


def test_interrupted_it_ends_with_130_and_its_session_ends(server: Postgres) -> None:
    waiting = (
        "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'cenote' AND wait_event_type = 'Lock'"
    )
    with psycopg.connect(server.superuser_dsn) as locking:
        locking.execute("LOCK TABLE pg_catalog.pg_stat_ssl IN ACCESS EXCLUSIVE MODE")
        with subprocess.Popen(
            [sys.executable, "-m", "cenote.cli", "doctor", server.dsn],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(),
        ) as process:
            wait_until(lambda: server.psql(waiting) == "1", what="the doctor to wait")
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (130, "", "cenote: interrupted\n")
    wait_until(lambda: server.psql(waiting) == "0", what="its session to end")
