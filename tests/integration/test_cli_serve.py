"""`cenote serve` and `cenote check-config` as their user meets them: processes, words, exit statuses."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import psycopg
import pytest

from cenote.embedded import Postgres

_LAST_LINE = "Ctrl-C drains and stops"


def environment(**more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PG")}
    return {**kept, "HOME": "/nonexistent", **more}


def cenote(*words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run the command to its end."""
    return subprocess.run(
        [sys.executable, "-m", "cenote.cli", *words],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        stdin=subprocess.DEVNULL,
        env=environment(**variables),
    )


class Serving:
    """A daemon that has shown its banner."""

    def __init__(self, process: subprocess.Popen[str], banner: str) -> None:
        self.process = process
        self.banner = banner

    def shown(self, label: str) -> str:
        found = re.search(rf"^{re.escape(label)} +(.+)$", self.banner, re.MULTILINE)
        assert found, f"{label!r} is not in the banner:\n{self.banner}"
        return found[1]

    @property
    def port(self) -> int:
        found = re.search(r":(\d+)/", self.shown("connect to"))
        assert found
        return int(found[1])

    def end(self, number: int = signal.SIGINT) -> tuple[int, str, str]:
        """Send a signal; exit status and all it has written since the banner."""
        self.process.send_signal(number)
        out, err = self.process.communicate(timeout=60)
        return self.process.returncode, out, err


@contextlib.contextmanager
def serving(*words: str, **variables: str) -> Iterator[Serving]:
    process = subprocess.Popen(
        [sys.executable, "-m", "cenote.cli", "serve", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        stdin=subprocess.DEVNULL,
        env=environment(**variables),
    )
    watchdog = threading.Timer(60, process.kill)
    watchdog.start()
    try:
        assert process.stdout is not None
        banner = _until(process.stdout, _LAST_LINE)
        if _LAST_LINE not in banner:
            raise AssertionError(f"no banner: {banner}{process.communicate(timeout=10)[1]}")
        yield Serving(process, banner)
    finally:
        watchdog.cancel()
        if process.poll() is None:
            process.kill()
        process.communicate(timeout=10)


def _until(stream: IO[str], last: str) -> str:
    lines = []
    for line in stream:
        lines.append(line)
        if last in line:
            break
    return "".join(lines)


# -- starting, serving, stopping --------------------------------------------------------------------------------


def test_without_a_word_it_serves_a_private_server_and_ctrl_c_ends_both() -> None:
    with serving("--port", "0", "--max-size", "3") as daemon:
        url = daemon.shown("connect to")
        assert re.fullmatch(r"postgresql://app:[0-9a-f]+@127\.0\.0\.1:\d+/app", url)
        assert daemon.shown("mode") == "transaction"
        assert daemon.shown("server connections") == "at most 3 (max_size 3 x 1 pool)"
        assert daemon.shown("clients") == "at most 10,000"
        with psycopg.connect(url) as connection:
            row = connection.execute("SELECT current_user, current_database(), inet_server_port()").fetchone()
        assert row is not None
        assert row[:2] == ("app", "app")
        with psycopg.connect(daemon.shown("console (SHOW ...)"), autocommit=True) as console:
            assert console.execute("SHOW POOLS").fetchall()
        status, out, err = daemon.end()
        assert status == 0
        assert re.fullmatch(r"cenote: stopped after [\d.]+ s; 2 log-ins of clients, 0 refused\n", out)
        assert "Traceback" not in err
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", row[2])) != 0


def test_a_url_is_pooled_and_its_password_is_not_shown(pg18: Postgres) -> None:
    with serving(pg18.dsn, "--port", "0", "--mode", "session") as daemon:
        assert daemon.shown("connect to") == f"postgresql://app:****@127.0.0.1:{daemon.port}/app"
        assert daemon.shown("mode") == "session"
        with psycopg.connect(pg18.dsn, port=daemon.port) as connection:
            assert connection.execute("SELECT 1").fetchone() == (1,)
        with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
            psycopg.connect(pg18.dsn, port=daemon.port, password="wrong")
        status, out, err = daemon.end(signal.SIGTERM)
    assert (status, pg18.password in daemon.banner + out + err) == (0, False)


def test_an_empty_url_is_all_from_the_environment(pg18: Postgres) -> None:
    known = {"PGHOST": pg18.host, "PGPORT": str(pg18.port), "PGUSER": pg18.user, "PGPASSWORD": pg18.password}
    with serving("", "--port", "0", **known, PGDATABASE="app") as daemon:
        with psycopg.connect(pg18.dsn, port=daemon.port) as connection:
            assert connection.execute("SELECT 1").fetchone() == (1,)
        assert daemon.end()[0] == 0


def test_a_file_is_served_and_options_win_over_it(pg18: Postgres, tmp_path: Path) -> None:
    file = tmp_path / "cenote.toml"
    file.write_text(
        f"""
        log_level = "warning"
        [listen]
        port = 1
        [databases.shop]
        host = "{pg18.host}"
        port = {pg18.port}
        dbname = "app"
        max_size = 50
        [users.app]
        password = "{pg18.password}"
        """
    )
    words = ("--port", "0", "--max-size", "4", "--unix-dir", str(tmp_path), "--metrics-port", "0")
    with serving("--config", str(file), *words) as daemon:
        assert daemon.shown("server connections") == "at most 4 (max_size 4 x 1 pool)"
        assert "console" not in daemon.banner
        with psycopg.connect(pg18.dsn, host=str(tmp_path), port=daemon.port, dbname="shop") as connection:
            assert connection.execute("SELECT current_database()").fetchone() == ("app",)
        status, _, err = daemon.end()
    assert (status, err) == (0, "")


def test_the_metrics_are_where_the_banner_says(pg18: Postgres) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with serving(pg18.dsn, "--port", "0", "--metrics-port", str(port)) as daemon:
        assert daemon.shown("metrics") == f"http://127.0.0.1:{port}/metrics"
        with urllib.request.urlopen(daemon.shown("metrics"), timeout=10) as answer:
            assert answer.status == 200
        assert daemon.end()[0] == 0


def test_json_logs_are_objects_and_the_banner_is_not_among_them(pg18: Postgres) -> None:
    with serving(pg18.dsn, "--port", "0", "--log-format", "json") as daemon:
        _, _, err = daemon.end()
    assert {"started", "stopped"} <= {json.loads(line)["event"] for line in err.splitlines()}


# -- what cannot be ----------------------------------------------------------------------------------------------


def test_a_port_in_use_is_a_clear_error_and_status_1() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        ended = cenote("serve", "postgresql://u:p@127.0.0.1:1/x", "--port", str(taken.getsockname()[1]))
    assert ended.returncode == 1
    assert "ddress already in use; choose another port with --port (0 takes a free one)" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert ended.stdout == ""


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["postgresql://alice@db/shop"], "no password is known for user 'alice' at db:5432"),
        (["nonsense"], "no connection string"),
        (["postgresql://u:p@h/x", "--config", "c.toml"], "a URL and --config: give one of them"),
        (["--config", "/no/such.toml"], "/no/such.toml: No such file or directory"),
        (["--mode", "transactions"], "--mode = 'transactions': allowed is 'transaction', 'session', 'statement'"),
        (["postgresql://u:p@h/x", "--port", "70000"], "--port = 70000: allowed is 0 to 65,535"),
        (["--max-size", "0"], "--max-size = 0: allowed is 1 to 100,000"),
        (["--tls-key", "key.pem"], "--tls-key: there is no listen.tls_cert"),
    ],
)
def test_what_cannot_be_is_told_before_anything_starts(words: list[str], said: str) -> None:
    ended = cenote("serve", *words)
    assert ended.returncode == 2
    assert said in ended.stderr
    assert "Traceback" not in ended.stderr
    assert ended.stdout == ""


def test_all_problems_of_the_command_line_are_told_together() -> None:
    ended = cenote("serve", "--port", "-1", "--max-clients", "0", "--log-level", "loud")
    assert [line.split(" = ")[0] for line in ended.stderr.splitlines()] == [
        "cenote: --port",
        "cenote: --max-clients",
        "cenote: --log-level",
    ]


def test_too_few_open_files_for_the_clients_are_warned_of() -> None:
    with socket.socket() as taken:  # so that it ends by itself, after the warning
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        words = ("postgresql://u:p@127.0.0.1:1/x", "--port", port, "--max-clients", "1000000")
        command = "import resource, sys; resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 1024)); sys.argv[1:] = "
        ended = subprocess.run(
            [
                sys.executable,
                "-c",
                f"{command}{['serve', *words]!r}\nfrom cenote.cli.__main__ import main; main()",
            ],
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
            env=environment(),
        )
    assert "need 1000074 open files, and this process may have 1024" in ended.stderr


# -- check-config ------------------------------------------------------------------------------------------------


def test_the_sample_checks_and_is_summed_up(tmp_path: Path) -> None:
    file = tmp_path / "cenote.toml"
    file.write_text(cenote("check-config", "--sample").stdout)
    ended = cenote("check-config", str(file))
    assert ended.returncode == 0
    assert ended.stdout.splitlines() == [
        f"{file}: good",
        "databases: app",
        "users: app",
        'pool "app/app": transaction, 2 to 10 connections',
        "server connections: at most 10",
        "clients: at most 10,000",
    ]
    found = json.loads(cenote("check-config", str(file), "--json").stdout)
    assert (found["valid"], found["max_server_connections"]) == (True, 10)


def test_a_bad_file_exits_1_with_all_problems(tmp_path: Path) -> None:
    file = tmp_path / "cenote.toml"
    file.write_text("[listen]\nprot = 1\nport = 70000\n")
    ended = cenote("check-config", str(file))
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr.splitlines() == [
        f"{file}: listen.port = 70000: allowed is 0 to 65,535",
        f"{file}: listen.prot: unknown key; did you mean 'port'?",
        "2 problems",
    ]
    ended = cenote("check-config", str(file), "--json")
    assert ended.returncode == 1
    assert len(json.loads(ended.stdout)["problems"]) == 2


def test_trust_is_good_and_warned_of(tmp_path: Path) -> None:
    file = tmp_path / "cenote.toml"
    file.write_text('auth = "trust"\n[databases.app]\n[users.app]\n')
    ended = cenote("check-config", str(file))
    assert (ended.returncode, ended.stdout.splitlines()[0]) == (0, f"{file}: good")
    warning = "auth = 'trust': whoever can reach 127.0.0.1 is let in without a password as app"
    assert ended.stderr == f"{file}: warning: {warning}\n"
    assert json.loads(cenote("check-config", str(file), "--json").stdout)["warnings"] == [warning]
    with socket.socket() as taken:  # so that it ends by itself, after the warning
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        served = cenote("serve", "--config", str(file), "--port", str(taken.getsockname()[1]))
    assert f"cenote: warning: {warning}\n" in served.stderr


def test_without_a_file_it_says_what_it_wants() -> None:
    ended = cenote("check-config")
    assert ended.returncode == 2
    assert "check-config needs a file, or --sample" in ended.stderr


@pytest.mark.parametrize("verb", ["serve", "check-config"])
def test_the_help_has_examples(verb: str) -> None:
    ended = cenote(verb, "--help")
    assert ended.returncode == 0
    assert f"  cenote {verb} " in ended.stdout


@pytest.mark.parametrize("missing", ["psycopg", "prometheus_client"])
def test_without_the_extra_proxy_it_says_what_to_install(missing: str) -> None:
    code = (
        f"import sys; sys.modules[{missing!r}] = None; sys.argv = ['cenote', 'serve', 'postgresql://u:p@h/x']\n"
        "from cenote.cli.__main__ import main; main()"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert ended.returncode == 2
    assert 'pip install "cenote[proxy]"' in ended.stderr
    assert "Traceback" not in ended.stderr
