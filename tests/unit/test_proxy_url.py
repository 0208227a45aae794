"""A start without a file: what libpq would connect with becomes the configuration, and nothing weaker."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cenote.errors import ConfigError
from cenote.proxy.config import Config
from cenote.proxy.url import config_of_url, password_in


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No PG* variables, and a home with nothing in it."""
    for name in list(os.environ):
        if name.startswith("PG"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))


def server(config: Config) -> tuple[str, str, str, str | None, str]:
    """Host, port, database, password and user of a configuration that has one of each."""
    ((name, database),) = config.databases.items()
    ((user, known),) = config.users.items()
    assert config.admin_users == [user]
    assert database.dbname == name
    return database.host, str(database.port), name, known.password, user


def problems(url: str | None, **overrides: Any) -> list[str]:
    with pytest.raises(ConfigError) as raised:
        config_of_url(url, **overrides)
    return list(raised.value.problems)


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://alice:se%3Acret@db:5433/shop",
        "postgres://alice:se%3Acret@db:5433/shop",
        "host=db port=5433 user=alice password='se:cret' dbname=shop",
        "postgresql:///shop?host=db&port=5433&user=alice&password=se%3Acret",
    ],
)
def test_all_ways_to_write_it_say_the_same(url: str) -> None:
    assert server(config_of_url(url)) == ("db", "5433", "shop", "se:cret", "alice")


def test_what_the_url_leaves_out_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGHOST", "db")
    monkeypatch.setenv("PGPORT", "5433")
    monkeypatch.setenv("PGUSER", "alice")
    monkeypatch.setenv("PGPASSWORD", "secret")
    monkeypatch.setenv("PGSSLMODE", "disable")
    config = config_of_url("postgresql://bob@/")
    assert server(config) == ("db", "5433", "bob", "secret", "bob")
    assert config.databases["bob"].sslmode == "disable"
    assert server(config_of_url(None)) == ("db", "5433", "alice", "secret", "alice")


@pytest.mark.parametrize("named", ["url", "environment"])
def test_a_service_is_looked_up_in_its_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, named: str) -> None:
    (tmp_path / ".pg_service.conf").write_text(
        "[shop]\nhost=db\nport=5433\nuser=alice\npassword=secret\ndbname=s\n"
    )
    if named == "environment":
        monkeypatch.setenv("PGSERVICE", "shop")
    url = "service=shop" if named == "url" else "port=1"
    host, port, *rest = server(config_of_url(url))
    assert (host, *rest) == ("db", "s", "secret", "alice")
    assert port == ("5433" if named == "url" else "1")


def test_a_service_that_is_nowhere_is_a_problem_with_the_files(tmp_path: Path) -> None:
    (problem,) = problems("service=nowhere")
    assert problem.startswith(f"service 'nowhere': in none of {tmp_path}/.pg_service.conf")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("sslmod=verify-full", "sslmod: unknown key; did you mean 'sslmode'?"),
        ("nonsense", "must be key=value"),
        ("service=other", "service: unknown key"),
    ],
)
def test_a_wrong_line_of_a_service_is_a_problem_with_its_number(tmp_path: Path, line: str, said: str) -> None:
    file = tmp_path / ".pg_service.conf"
    file.write_text(f"[other]\nnot looked at\n[shop]\n# a comment\nhost=db\n{line}\n[last]\nnor this\n")
    (problem,) = problems("service=shop user=u password=p")
    assert problem.startswith(f"{file}: line 6: service 'shop': {said}")


def test_several_hosts_keep_their_ports() -> None:
    config = config_of_url("postgresql://u:p@a:1,b:2/x")
    assert (config.databases["x"].host, config.databases["x"].port) == ("a,b", "1,2")


@pytest.mark.parametrize(("hosts", "ports"), [("a,b", "5432,5432"), ("a:1,b", "1,5432")])
def test_a_host_without_a_port_has_the_usual_one(hosts: str, ports: str) -> None:
    config = config_of_url(f"postgresql://u:p@{hosts}/x")
    assert (config.databases["x"].host, config.databases["x"].port) == ("a,b", ports)


@pytest.mark.parametrize("port", ["abc", "99999", "0", "5432,x"])
def test_a_port_that_is_none_is_a_problem(port: str) -> None:
    (problem,) = problems(f"host=h user=u password=p dbname=x port={port}")
    assert problem.startswith("databases.x.port = ")
    assert "allowed is 1 to 65,535" in problem


def test_an_address_of_ipv6_loses_its_brackets() -> None:
    assert server(config_of_url("postgresql://u:p@[::1]:5433/x"))[:2] == ("::1", "5433")


def test_a_directory_is_a_unix_socket() -> None:
    assert server(config_of_url("postgresql://u:p@%2Frun%2Fpg/x"))[0] == "/run/pg"


def test_tls_options_are_carried(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        config_of_url(f"postgresql://u:p@h/x?sslmode=verify-full&sslrootcert={tmp_path}/ca.crt")
    config = config_of_url("postgresql://u:p@h/x?sslmode=require&sslnegotiation=direct")
    assert (config.databases["x"].sslmode, config.databases["x"].sslnegotiation) == ("require", "direct")


def test_what_the_caller_adds_wins() -> None:
    config = config_of_url("postgresql://u:p@h/x", listen={"port": 0}, pool={"max_size": 3}, metrics_port=9127)
    assert (config.listen.port, config.pool.max_size, config.metrics_port) == (0, 3, 9127)


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("target_session_attrs=read-write", "target_session_attrs = 'read-write': not supported"),
        ("channel_binding=require", "channel_binding = 'require': not supported"),
        ("require_auth=scram-sha-256", "require_auth = 'scram-sha-256': not supported"),
        ("options=-cwork_mem=1MB", "use `init_query` in a configuration file"),
        ("gssencmode=require", "gssencmode = 'require': not supported"),
        ("connect_timeout=soon", "connect_timeout = 'soon': must be a whole number of seconds"),
        ("hostaddr=127.0.0.1 sslmode=verify-full", "give the host alone, whose name the certificate has"),
    ],
)
def test_what_would_be_lost_is_refused(word: str, said: str) -> None:
    (problem,) = problems(f"host=h user=u password=p {word}")
    assert said in problem


def test_a_connect_timeout_is_the_databases() -> None:
    assert config_of_url("postgresql://u:p@h/x?connect_timeout=3").databases["x"].connect_timeout == 3.0
    assert config_of_url("postgresql://u:p@h/x?connect_timeout=0").databases["x"].connect_timeout is None


def test_what_is_not_utf8_is_a_problem(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PGPASSWORD", "p\udce4ss")
    assert problems("postgresql://u@h/x") == ["password: it is not UTF-8"]
    monkeypatch.delenv("PGPASSWORD")
    (tmp_path / ".pgpass").write_bytes(b"*:*:*:*:p\xe4ss\n")
    (tmp_path / ".pgpass").chmod(0o600)
    assert problems("postgresql://u@h/x") == [f"{tmp_path}/.pgpass: the password of user 'u' is not UTF-8"]


def test_what_is_no_connection_string_is_told() -> None:
    assert problems("nonsense")[0].startswith("no connection string: missing")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become an account without a name")
def test_an_account_without_a_name_must_say_which_user() -> None:
    code = (
        "import os\n"
        "from cenote.errors import ConfigError\n"
        "from cenote.proxy.url import config_of_url\n"
        "config_of_url('host=h user=u password=p')  # imports what it needs, before it may not read it\n"
        "os.setuid(54321)\n"
        "for url in 'host=h password=p', 'host=h user=u':\n"
        "    try:\n"
        "        config_of_url(url)\n"
        "    except ConfigError as error:\n"
        "        print(error.problems[0])\n"
    )
    bare = {name: value for name, value in os.environ.items() if name != "HOME"}
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=bare)
    no_user, no_password = ended.stdout.splitlines()
    assert no_user == "user: none is given, and this account has no name; give it, or PGUSER"
    assert no_password.startswith("no password is known for user 'u'")


def test_the_name_of_the_virtual_database_is_refused() -> None:
    assert "this name is the virtual database's" in problems("postgresql://u:p@h/cenote")[0]


# -- passwords ----------------------------------------------------------------------------------------------------


def test_without_a_password_the_three_ways_to_give_one_are_told(tmp_path: Path) -> None:
    (problem,) = problems("postgresql://alice@db/shop")
    assert "postgresql://alice:PASSWORD@db:5432/shop" in problem
    assert "PGPASSWORD" in problem
    assert f"{tmp_path}/.pgpass, mode 0600, a line db:5432:shop:alice:PASSWORD" in problem


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://[::1]:5433/x",
        "postgresql://%2Frun%2Fpg/x",
        "postgresql://%2Ftmp/x",
        "postgresql://a%40b%3Ac@h/x%2Fy",
        r"host=h user='back\\slash' dbname=x",
    ],
)
def test_both_ways_to_write_it_that_are_told_work_as_told(tmp_path: Path, url: str) -> None:
    (problem,) = problems(url)
    told = re.search(r"in the URL \((.+?)\), or .* a line (.+)\)$", problem)
    assert told
    by_url = config_of_url(told[1])
    file = tmp_path / ".pgpass"
    file.write_text(f"{told[2]}\n")
    file.chmod(0o600)
    assert server(by_url) == server(config_of_url(url))
    assert server(by_url)[3] == "PASSWORD"


def test_an_empty_password_is_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / ".pgpass").write_text("h:*:*:*:\n")
    (tmp_path / ".pgpass").chmod(0o600)
    monkeypatch.setenv("PGPASSWORD", "")
    assert "no password is known" in problems("postgresql://u:@h/x")[0]


@pytest.mark.parametrize(
    ("lines", "password"),
    [
        (["db:5432:shop:alice:secret"], "secret"),
        (["*:*:*:*:secret"], "secret"),
        (["other:5432:shop:alice:no", "db:*:shop:alice:first", "*:*:*:*:second"], "first"),
        ([r"db:5432:shop:alice:se\:cr\\et"], r"se:cr\et"),
        (["db:5432:shop:alice:with:colon"], "with:colon"),
        (["# db:5432:shop:alice:no", "", "db:5432:shop:alice:yes"], "yes"),
        (["db:5432:shop:bob:no", "db:5432"], None),
        ([r"\*:5432:shop:alice:no"], None),
    ],
)
def test_the_first_line_of_the_password_file_that_fits_counts(lines: list[str], password: str | None) -> None:
    assert password_in(lines, "db", "5432", "shop", "alice") == password


def test_a_default_socket_directory_is_localhost_in_the_password_file() -> None:
    assert password_in(["localhost:5432:*:*:secret"], "/var/run/postgresql", "5432", "x", "u") == "secret"
    assert password_in(["/run/pg:5432:*:*:secret"], "/run/pg", "5432", "x", "u") == "secret"


def test_the_password_file_is_used_when_only_its_owner_may_read_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "passwords"
    file.write_text("db:*:shop:alice:secret\n")
    monkeypatch.setenv("PGPASSFILE", str(file))
    file.chmod(0o600)
    assert server(config_of_url("postgresql://alice@db/shop"))[3] == "secret"
    file.chmod(0o640)
    monkeypatch.setattr(logging.getLogger("cenote"), "propagate", True)
    with caplog.at_level(logging.WARNING, "cenote"):
        assert "no password is known" in problems("postgresql://alice@db/shop")[0]
    assert "password_file_ignored" in caplog.text
    assert f"chmod 0600 {file}" in caplog.text


def test_hosts_with_different_passwords_are_a_problem(tmp_path: Path) -> None:
    file = tmp_path / ".pgpass"
    file.write_text("a:*:*:*:one\nb:*:*:*:two\n")
    file.chmod(0o600)
    assert "different passwords for the hosts a, b" in problems("postgresql://u@a,b/x")[0]
