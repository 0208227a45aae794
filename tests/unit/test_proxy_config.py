"""A configuration of the daemon: what is taken, and every problem in the words that its author reads."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from cenote.errors import ConfigError
from cenote.proxy.config import Config, config_of, load_config, pool_defaults, pool_names, pool_options
from cenote.proxy.problems import warnings_of
from cenote.proxy.sample import reference, sample_file
from cenote.testing.postgres import make_tls_files

DOCS = Path(__file__).parents[2] / "docs"
VERIFIER = (
    "SCRAM-SHA-256$4096:AAAAAAAAAAAAAAAAAAAAAA==$"
    "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=:AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA="
)
MD5 = "md5" + "0" * 32


def problems(values: dict[str, Any], *, complete: bool = False) -> list[str]:
    with pytest.raises(ConfigError) as raised:
        config_of(values, complete=complete)
    return list(raised.value.problems)


def whole(**more: Any) -> dict[str, Any]:
    """A good configuration, with some of its tables replaced."""
    return {"databases": {"app": {}}, "users": {"app": {"password": "x"}}, **more}


def test_nothing_written_is_a_good_configuration_for_a_program() -> None:
    config = config_of({})
    assert (config.listen.host, config.listen.port, config.auth) == ("127.0.0.1", 6432, "scram-sha-256")


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"listen": {"port": 70000}}, "listen.port = 70000: allowed is 0 to 65,535"),
        ({"listen": {"port": "6432"}}, "listen.port = '6432': must be a whole number, 0 to 65,535"),
        ({"listen": {"prot": 1}}, "listen.prot: unknown key; did you mean 'port'?"),
        ({"listen": 3}, "listen = 3: must be a table"),
        ({"auth": "scram"}, "auth = 'scram': allowed is 'scram-sha-256', 'md5', 'password', 'trust'"),
        ({"pool": {"max_size": 0}}, "pool.max_size = 0: allowed is 1 to 100,000"),
        ({"pool": {"max_size": True}}, "pool.max_size = True: must be a whole number, 1 to 100,000"),
        ({"pool": {"idle_timeout": 0}}, "pool.idle_timeout = 0: allowed is more than 0 seconds"),
        ({"pool": {"mode": "transactoin"}}, "did you mean 'transaction'?"),
        ({"databases": {"a": {"max_sise": 1}}}, "databases.a.max_sise: unknown key; did you mean 'max_size'?"),
        (
            {"databases": {"a": {"port": "x"}}},
            "databases.a.port = 'x': allowed is 1 to 65,535, or one port for each",
        ),
        ({"databases": {"a": {"host": "x,y,z", "port": "1,2"}}}, "databases.a.port = '1,2': 2 ports for 3 hosts"),
        ({"databases": {"cenote": {}}}, "databases.cenote: this name is the virtual database's"),
        (
            {"users": {"alice": {}}, "admin_users": ["alcie"]},
            "admin_users = 'alcie': not in users; did you mean 'ali",
        ),
        ({"listen": {"tls_key": "/k"}}, "listen.tls_key: there is no listen.tls_cert"),
        ({"database": {}}, "database: unknown key; did you mean 'databases'?"),
    ],
)
def test_a_wrong_value_is_told_with_its_key_path_and_what_is_allowed(values: dict[str, Any], said: str) -> None:
    (problem,) = problems(values)
    assert said in problem


def test_all_problems_are_told_at_once() -> None:
    told = problems({"listen": {"port": -1}, "pool": {"max_size": 0}, "databases": {"a": {"sslmode": "on"}}})
    assert [problem.split(" = ")[0] for problem in told] == ["listen.port", "pool.max_size", "databases.a.sslmode"]


def test_a_wrong_password_is_not_shown() -> None:
    assert problems({"users": {"a": {"password": 424242}}}) == ["users.a.password = ...: must be a text"]


def test_min_size_above_max_size_names_each_pool() -> None:
    told = problems({"databases": {"a": {"min_size": 5}, "b": {}}, "users": {"u": {"max_size": 3}, "v": {}}})
    assert told == ['pool "a/u": min_size = 5 is above max_size = 3: lower min_size or raise max_size']


def test_the_users_options_come_before_the_databases_and_those_before_the_pools() -> None:
    config = config_of(
        {
            "pool": {"max_size": 7, "mode": "session"},
            "databases": {"a": {"max_size": 5}, "b": {}},
            "users": {"u": {"max_size": 1}, "v": {}},
        }
    )
    sizes = {pool: pool_options(config, *pool).max_size for pool in pool_names(config)}
    assert sizes == {("a", "u"): 1, ("a", "v"): 5, ("b", "u"): 1, ("b", "v"): 7}
    assert pool_options(config, "a", "u").min_size == 1
    assert pool_options(config, "a", "u").mode == "session"


# -- what is told of a whole configuration ----------------------------------------------------------------------


def test_without_databases_or_users_there_is_nothing_to_serve() -> None:
    assert [problem.split(":")[0] for problem in problems({}, complete=True)] == ["databases", "users"]


@pytest.mark.parametrize(
    ("user", "said"),
    [
        ({}, "this user can never log in"),
        ({"password": ""}, "users.app.password: it is empty, and an empty password proves nothing"),
        ({"password": "", "auth": "md5"}, "an empty password proves nothing"),
        ({"password": MD5, "server_password": "x"}, 'cannot prove anything by auth = "scram-sha-256"'),
        ({"password": "SCRAM-SHA-256$x", "server_password": "x"}, "not a verifier of the form"),
        ({"password": "x", "auth": "password"}, "over TLS or a Unix socket only"),
    ],
)
def test_a_user_who_could_never_log_in_is_a_problem(user: dict[str, Any], said: str) -> None:
    (problem,) = problems(whole(users={"app": user}), complete=True)
    assert said in problem


@pytest.mark.parametrize(
    "more",
    [
        {"users": {"app": {"password": VERIFIER, "server_password": "x"}}},
        {"users": {"app": {"password": VERIFIER}}, "databases": {"app": {"password": "x"}}},
        {"users": {"app": {"password": MD5, "auth": "md5", "server_password": ""}}},
        {"users": {"app": {}}, "auth": "trust"},
    ],
)
def test_a_user_who_can_log_in_is_none(more: dict[str, Any]) -> None:
    assert config_of(whole(**more), complete=True)


def test_trust_is_never_a_default() -> None:
    assert Config().auth == "scram-sha-256"
    assert all("trust" not in line for line in sample_file().splitlines() if not line.startswith("#"))


def test_trust_is_warned_of_with_who_and_where() -> None:
    assert warnings_of(config_of(whole())) == []
    more = {"listen": {"host": "0.0.0.0"}, "users": {"a": {"auth": "trust"}, "b": {"password": "x"}}}
    (warning,) = warnings_of(config_of(whole(**more), complete=True))
    assert warning == "auth = 'trust': whoever can reach 0.0.0.0 is let in without a password as a"


def test_a_key_of_another_certificate_is_told_with_both_files(tmp_path: Path) -> None:
    files = make_tls_files(tmp_path)
    good = {"tls_cert": str(files.server_certificate), "tls_key": str(files.server_key)}
    assert config_of(whole(listen=good), complete=True)
    wrong = {**good, "tls_key": str(files.client_key)}
    (problem,) = problems(whole(listen=wrong), complete=True)
    assert problem.startswith(f'listen.tls_cert: certificate "{files.server_certificate}" with private key')
    assert str(files.client_key) in problem
    assert "mismatch" in problem


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (
            {"listen": {"tls_cert": "/no/cert.pem"}},
            'listen.tls_cert: certificate file "/no/cert.pem" does not exist',
        ),
        ({"listen": {"tls_mode": "require"}}, "listen.tls_mode = 'require': there is no listen.tls_cert"),
        ({"listen": {"unix_dir": "/no/such"}}, "listen.unix_dir = '/no/such': there is no such directory"),
        ({"metrics_port": 6432}, "metrics_port = 6432: clients have this port"),
        (
            {"databases": {"app": {"sslrootcert": "/no/ca"}}},
            "databases.app.sslmode = 'prefer': root certificate file",
        ),
        ({"databases": {"app": {"sslnegotiation": "direct"}}}, "sslmode = 'prefer' is too weak for it"),
    ],
)
def test_what_cannot_work_on_this_machine_is_told(more: dict[str, Any], said: str) -> None:
    assert any(said in problem for problem in problems(whole(**more), complete=True))


# -- files --------------------------------------------------------------------------------------------------------


def test_the_problems_of_a_file_begin_with_its_name(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text("[listen]\nport = 'x'\n")
    with pytest.raises(ConfigError) as raised:
        load_config(file)
    assert raised.value.problems[0].startswith(f"{file}: listen.port = 'x'")


def test_a_syntax_error_has_line_and_column(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text("[listen]\nport = \n")
    with pytest.raises(ConfigError, match=r"c\.toml: not TOML: .*line 2, column 8"):
        load_config(file)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.toml: No such file"):
        load_config(tmp_path / "none.toml")


def test_the_sample_is_a_good_configuration(tmp_path: Path) -> None:
    file = tmp_path / "sample.toml"
    file.write_text(sample_file())
    config = load_config(file)
    assert pool_names(config) == [("app", "app")]


def test_what_the_sample_comments_out_is_the_default() -> None:
    text = re.sub(r"^# no default: .*\n#.*$", "", sample_file(), flags=re.MULTILINE)
    config = config_of(tomllib.loads(re.sub(r"^#(?=[a-z_]+ = )", "", text, flags=re.MULTILINE)))
    assert config.listen == Config().listen
    assert {name: getattr(config.pool, name) for name in pool_defaults()} == pool_defaults()


def test_the_examples_of_the_sample_are_values_that_are_allowed() -> None:
    values = tomllib.loads(re.sub(r"^#(?=[a-z_]+ = )", "", sample_file(), flags=re.MULTILINE))
    assert config_of(values).pool.init_query == "SET statement_timeout = '30s'"


@pytest.mark.parametrize(
    ("name", "made", "option"),
    [("cenote.sample.toml", sample_file, "--sample"), ("configuration.md", reference, "--markdown")],
)
def test_the_generated_pages_in_the_docs_are_current(name: str, made: Any, option: str) -> None:
    assert (DOCS / name).read_text() == made(), f"run: cenote check-config {option} > docs/{name}"
