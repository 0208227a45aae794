"""`cenote report` as its user meets it: a daemon of its own, words, exit statuses, files."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from typer.testing import CliRunner

from cenote.cli.app import app
from cenote.embedded import Postgres

sys.path += [str(Path(__file__).parents[1] / "wire"), str(Path(__file__).parent)]

from proxy_kit import RunningProxy, config_for
from test_cli_serve import cenote, serving


@pytest.fixture
def daemon(pg18: Postgres) -> Iterator[Callable[..., RunningProxy]]:
    """`daemon(**options)`: a proxy whose console is for `boss`."""
    proxies: list[RunningProxy] = []

    def start(**options: Any) -> RunningProxy:
        config = config_for(
            pg18,
            users={"boss": {"password": "b", "auth": "scram-sha-256"}},
            top={"admin_users": ["boss"]},
            **options,
        )
        proxies.append(RunningProxy(config, pg18))
        return proxies[-1].start()

    yield start
    for proxy in proxies:
        proxy.stop()


def asked(*words: str, **variables: str) -> Any:
    """`cenote report` with these words, away from this machine's own PG* variables."""
    own: dict[str, str | None] = {name: None for name in os.environ if name.startswith("PG")}
    return CliRunner(env={**own, **variables}).invoke(app, ["report", *words])


def console(proxy: RunningProxy) -> str:
    return proxy.dsn_for(user="boss", password="b", database="cenote")


def pool_of(found: dict[str, Any], user: str) -> dict[str, Any]:
    (pool,) = (pool for pool in found["pools"] if pool["user"] == user)
    return dict(pool)


# -- what it says -------------------------------------------------------------------------------------------------


def test_a_dry_run_that_is_ready_is_told_so_with_what_it_would_need(daemon, pg18: Postgres) -> None:
    proxy = daemon(mode="session", observe=True, max_size=9)
    clients = [psycopg.connect(proxy.dsn, autocommit=True) for _ in range(6)]
    for client in clients:
        client.execute("SET work_mem = '5MB'")
    with clients[0].transaction(), clients[1].transaction():
        clients[0].execute("SELECT 1")
        clients[1].execute("SELECT 1")
    done = asked(console(proxy))
    assert done.exit_code == 0, done.stderr
    assert re.search(rf"pool {pg18.database}/{pg18.user}: session mode, dry run for \d+ s", done.stdout)
    assert re.search(r"clients +6 now, 6 at most", done.stdout)
    assert re.search(r"would be needed +2 server connections at most at one moment; [12] were", done.stdout)
    assert re.search(r"would carry: settings +6 +SET work_mem = \?", done.stdout)
    words = " ".join(done.stdout.split())
    assert "needed at most 2 server connections instead of 6" in words
    assert re.search(r"Suggested for it: max_size = [23]\.", words)
    assert f"Nothing stands against transaction mode in {pg18.database}/{pg18.user}." in words
    for client in clients:
        client.close()


def test_what_stands_against_it_is_listed_with_advice_and_ends_with_status_3(daemon, tmp_path: Path) -> None:
    proxy = daemon(mode="session", observe=True)
    page = tmp_path / "ready.html"
    with psycopg.connect(proxy.dsn, autocommit=True) as client:
        client.execute("SELECT pg_try_advisory_lock(1572350391218170155)")
        client.execute("DO $$BEGIN END$$")
        done = asked(console(proxy), "--report", str(page))
        assert done.exit_code == 3, done.stderr
        words = " ".join(done.stdout.split())
        assert "1 kind of statement would keep up to 1 of 1 client pinned (1 now): advisory_locks." in words
        assert "advisory_locks: false" in words
        assert "would ask" in words
        assert f"Report: {page}" in done.stdout
        html = page.read_text()
        assert "SELECT pg_try_advisory_lock(?)" in html
        assert "http" not in html, "a page that needs nothing else"
        as_json = asked(console(proxy), "--json")
        assert as_json.exit_code == 3
        found = json.loads(as_json.stdout)
        pool = pool_of(found, proxy.user)
        suggested = {"max_size": 3, "max_pinned": 2}
        assert (pool["verdict"], pool["pinned"], pool["suggestion"]) == ("stands", 1, suggested)
        assert [(line["consequence"], line["reason"], line["times"]) for line in pool["lines"]] == [
            ("pinned", "advisory_locks", 1),
            ("asked", "unknown", 1),
        ]
        assert pool_of(found, "boss")["verdict"] == "idle"


def test_transaction_mode_is_reported_by_what_pins_now(daemon) -> None:
    proxy = daemon(max_size=3)
    with psycopg.connect(proxy.dsn, autocommit=True) as client:
        client.execute("SELECT 1")
        assert asked(console(proxy)).exit_code == 0
        client.execute("SELECT pg_advisory_lock(5)")
        client.execute("SELECT 1")  # behind it, the server has said what is there
        done = asked(console(proxy))
        assert done.exit_code == 3
        words = " ".join(done.stdout.split())
        assert "1 kind of statement keeps 1 of 1 client pinned now: advisory_locks." in words
        assert "pinned 1 client now (max_pinned = max_size - 1)" in words


def test_session_mode_that_nobody_observes_is_not_called_ready(daemon) -> None:
    proxy = daemon(mode="session")
    with psycopg.connect(proxy.dsn) as client:
        client.execute("SELECT 1")
        client.commit()
        done = asked(console(proxy))
        assert done.exit_code == 3
        assert "Nobody has looked" in done.stdout


def test_a_database_can_be_asked_for_and_must_be_there(daemon, pg18: Postgres) -> None:
    proxy = daemon(mode="session", observe=True)
    assert asked(console(proxy), "--database", pg18.database).exit_code == 3
    done = asked(console(proxy), "--database", "nosuch")
    assert done.exit_code == 2
    assert done.stderr == f"cenote: database = 'nosuch': the daemon has {pg18.database}\n"


def test_serve_observes_and_its_configuration_file_leads_to_the_console(pg18: Postgres, tmp_path: Path) -> None:
    """From the first command of the documentation to the last."""
    file = tmp_path / "cenote.toml"
    text = (
        '[listen]\nport = {port}\n[databases.shop]\nhost = "{host}"\nport = {server}\ndbname = "{dbname}"\n'
        'sslmode = "disable"\nmode = "transaction"\n[users.{user}]\npassword = "{password}"\n'
    )
    values = {
        "host": pg18.host,
        "server": pg18.port,
        "dbname": pg18.database,
        "user": pg18.user,
        "password": pg18.password,
    }
    file.write_text(f'admin_users = ["{pg18.user}"]\n' + text.format(port=0, **values))
    with serving("--config", str(file), "--observe") as process:
        assert process.shown("mode") == "session"
        port = int(process.port)
        with psycopg.connect(
            host="127.0.0.1", port=port, user=pg18.user, password=pg18.password, dbname="shop"
        ) as client:
            client.execute("SELECT 1")
            client.commit()
            file.write_text(f'admin_users = ["{pg18.user}"]\n' + text.format(port=port, **values))
            done = asked("--config", str(file))
            assert done.exit_code == 0, done.stdout + done.stderr
            assert "session mode, dry run" in done.stdout


# -- what can be wrong --------------------------------------------------------------------------------------------


def test_observe_needs_session_mode_and_says_so(pg18: Postgres, tmp_path: Path) -> None:
    done = cenote("serve", pg18.dsn, "--port", "0", "--mode", "transaction", "--observe")
    assert done.returncode == 2
    assert "observe = true with mode = 'transaction'" in done.stderr
    assert "it needs mode = 'session'" in done.stderr
    file = tmp_path / "cenote.toml"
    file.write_text('[databases.shop]\nobserve = true\n[users.app]\npassword = "x"\n')
    done = cenote("check-config", str(file))
    assert done.returncode == 1
    assert "pool \"shop/app\": observe = true with mode = 'transaction'" in done.stderr


def test_a_server_that_is_no_console_is_told_apart(pg18: Postgres) -> None:
    url = f"postgresql://{pg18.user}:{pg18.password}@{pg18.host}:{pg18.port}/cenote"
    done = asked(url)
    assert done.exit_code == 1
    assert done.stderr.startswith("cenote: there is no console: ")
    with psycopg.connect(pg18.superuser_dsn, autocommit=True) as admin:
        admin.execute("CREATE DATABASE cenote")
        try:
            done = asked(url)
        finally:
            admin.execute("DROP DATABASE cenote WITH (FORCE)")
    assert done.exit_code == 1
    assert "is not a console of Cenote but a server that calls itself '18" in done.stderr


def test_who_is_no_admin_or_has_no_password_is_told_so(daemon) -> None:
    proxy = daemon()
    done = asked(proxy.dsn_for(database="cenote"))
    assert done.exit_code == 1
    assert done.stderr.startswith(f"cenote: {proxy.user} is no admin of this daemon: ")
    done = asked(proxy.dsn_for(user="boss", password="wrong", database="cenote"))
    assert done.exit_code == 1
    assert done.stderr.startswith("cenote: the console does not let boss in: ")
    done = asked(PGPORT=str(proxy.port), PGUSER="boss", PGPASSWORD="b", PGHOST="127.0.0.1")
    assert done.exit_code == 3, "libpq's environment counts; nothing has been seen yet"


@pytest.mark.parametrize(
    ("words", "status", "told"),
    [
        (("postgresql://127.0.0.1:1/cenote",), 1, "cenote: cannot reach the console: "),
        (("postgresql://127.0.0.1:1/shop",), 2, "cenote: url: the database is 'shop'; the console is"),
        (("no=thing",), 2, 'cenote: url: invalid connection option "no"'),
        (("postgresql://a/cenote", "--config", "x.toml"), 2, "cenote: a URL and --config: give one of them"),
        (("--config", "/nonexistent/x.toml"), 2, "cenote: /nonexistent/x.toml: No such file"),
        (("--report", "ready.pdf"), 2, "cenote: report = 'ready.pdf': the name must end in .html"),
    ],
)
def test_what_cannot_be_is_told_in_a_line(words: tuple[str, ...], status: int, told: str) -> None:
    done = asked(*words)
    assert (done.exit_code, done.stdout) == (status, "")
    assert done.stderr.startswith(told), done.stderr


def test_a_configuration_that_does_not_say_where_its_console_is_is_a_problem(tmp_path: Path) -> None:
    file = tmp_path / "cenote.toml"
    file.write_text('[listen]\nport = 0\n[databases.shop]\nhost = "db"\n[users.app]\npassword = "x"\n')
    done = asked("--config", str(file))
    assert done.exit_code == 2
    assert f"cenote: {file}: admin_users is empty, so nobody may log in to the console\n" in done.stderr
    assert f"cenote: {file}: listen.port is 0, a free one each time: give a URL\n" in done.stderr
