"""Where secrets come from, without a server: the users file, the order, what is remembered and for how long."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from cenote.errors import ConfigError
from cenote.proxy.auth.admit import Known
from cenote.proxy.auth.keys import KeyCache
from cenote.proxy.auth.lookup import Found, LookupFailed, Unreachable
from cenote.proxy.auth.secrets import KEEP_S, Secrets
from cenote.proxy.auth.users_file import parse_users
from cenote.proxy.config import config_of
from cenote.proxy.target import target_of
from cenote.wire.refusal import Refusal
from cenote.wire.scram import Keys, Verifier

KEYS = Keys(b"c" * 32, b"s" * 32)
VERIFIER = Verifier.of_keys(KEYS, b"salt" * 4)
STORED = VERIFIER.format()


# -- the users file ---------------------------------------------------------------------------------------------


def test_a_users_file_is_read_as_pgbouncer_reads_it() -> None:
    text = (
        f'; a comment\n\n"ann" "se""cret"\n  "b""b"\t"{STORED}" "what follows" means nothing\r\n"cat"""\n"dän" ""'
    )
    assert parse_users(text, "f") == {"ann": 'se"cret', 'b"b': STORED, "cat": "", "dän": ""}
    assert parse_users("", "f") == {}


def test_all_problems_of_a_users_file_are_told_with_their_lines_and_no_secret() -> None:
    lines = [
        '"ann" "hidden"',
        "ann hidden",
        '"ann" "hidden2"',
        '"bob" "hidden',
        '"" "hidden"',
        f'"{"é" * 32}" "hidden"',
        '"eve" "SCRAM-SHA-256$hidden"',
        '"zed"',
        '"fay" "hidden"more',
    ]
    with pytest.raises(ConfigError) as caught:
        parse_users("\n".join(lines), "users.txt")
    problems = caught.value.problems
    assert [problem.split(": ")[0] for problem in problems] == [f"users.txt:{n}" for n in range(2, 10)]
    assert 'user "ann" is on line 1 already' in problems[1]
    assert "63 bytes at most" in problems[4]
    assert "hidden" not in "".join(problems)


def problems(tables: dict[str, Any]) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        config_of({"databases": {"db": {}}, **tables}, complete=True)
    return list(caught.value.problems)


def test_check_config_tells_what_is_wrong_with_users_and_how_they_are_looked_up(tmp_path: Path) -> None:
    path = tmp_path / "users"
    path.write_text('"ann" "x"\nnonsense\n')
    assert problems({"users_file": str(path)}) == [
        f'users_file: {path}:2: not of the form "user" "secret", a quote inside written twice'
    ]
    path.write_text('"ann" "x"\n')
    assert config_of({"databases": {"db": {}}, "users_file": str(path)}, complete=True)
    (problem,) = problems({"users_file": str(path), "admin_users": ["anne"]})
    assert problem == "admin_users = 'anne': neither in users nor in users_file; did you mean 'ann'?"
    (problem,) = problems({"users_file": str(tmp_path / "none")})
    assert problem.endswith("none: No such file or directory")
    (problem,) = problems({"auth_user": "looker", "auth_query": "SELECT 1"})
    assert problem == "auth_query: it has no $1, which stands for the user's name"
    (problem,) = problems({"users": {"a": {"password": "x"}}, "databases": {"db": {"auth_dbname": "postgres"}}})
    assert problem == "databases.db: there is no auth_user to look users up as"
    assert config_of({"databases": {"db": {}}, "auth_user": "looker", "users": {"ann": {}}}, complete=True)


# -- what a server says -----------------------------------------------------------------------------------------


class Server:
    """Lookups at a server whose answers are those of `users`; an exception is raised."""

    def __init__(self, **users: Any) -> None:
        self.users = users
        self.asked: list[str] = []

    def at(self, *place: Any) -> Server:
        return self

    async def ask(self, query: str, user: str) -> Found | None:
        self.asked.append(user)
        answer = self.users.get(user)
        if isinstance(answer, Exception):
            raise answer
        return answer  # type: ignore[no-any-return]


def secrets_of(server: Any, keys: KeyCache | None = None, **tables: Any) -> Secrets:
    given = {"databases": {"db": {"host": "here"}, "other": {"host": "there"}}, "auth_user": "looker", **tables}
    return Secrets(config_of(given), keys or KeyCache(), server)


def run(body: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(body())


class Clock:
    """Moves the time of the running loop on by `added`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        loop = asyncio.get_running_loop()
        self.added = 0.0
        real = loop.time
        monkeypatch.setattr(loop, "time", lambda: real() + self.added)


def test_the_configuration_comes_first_then_the_file_then_the_server(tmp_path: Path) -> None:
    path = tmp_path / "users"
    path.write_text('"ann" "file"\n"bob" "file"\n"cat" ""\n')
    server = Server(ann=Found("server"), bob=Found("server"), cat=Found("server"), dan=Found("server"))
    known = secrets_of(server, users={"ann": {"password": "config"}, "dan": {}, "eve": {}}, users_file=str(path))

    async def body() -> None:
        found = {name: await known.find("db", name) for name in ("ann", "bob", "cat", "dan", "eve", "fay")}
        assert found == {
            "ann": Known("config"),
            "bob": Known("file"),
            "cat": Known(None),
            "dan": Known("server"),
            "eve": Known(None),
            "fay": None,
        }
        assert server.asked == ["dan", "eve", "fay"]

    run(body)


def test_what_a_server_said_is_used_for_a_while_and_no_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    async def body() -> None:
        clock = Clock(monkeypatch)
        server = Server(ann=Found("old"))
        known = secrets_of(server)
        for _ in range(3):
            assert await known.find("db", "ann") == Known("old")
            assert await known.find("db", "bob") is None
        assert server.asked == ["ann", "bob"]
        server.users["ann"] = Found("new")
        assert await known.find("db", "ann") == Known("old")
        clock.added = KEEP_S
        assert await known.find("db", "ann") == Known("new")

    run(body)


def test_a_proof_that_failed_and_whoever_wants_it_fresh_ask_again() -> None:
    async def body() -> None:
        server = Server(ann=Found("old"))
        known = secrets_of(server)
        assert await known.find("db", "ann") == Known("old")
        server.users["ann"] = Found("new")
        known.doubt("db", "ann")
        assert await known.find("db", "ann") == Known("new")
        server.users["ann"] = Found("newer")
        assert await known.find("db", "ann", fresh=True) == Known("newer")
        assert await known.find("db", "ann") == Known("newer")
        assert len(server.asked) == 3

    run(body)


def test_CVE_2025_2291_a_secret_that_is_remembered_expires_at_its_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    async def body() -> None:
        clock = Clock(monkeypatch)
        server = Server(
            ann=Found("x", seconds_left=1.0),
            bob=Found("x", seconds_left=-1.0),
            cat=Found("x", can_login=False),
            dan=Found("x", can_login=False, seconds_left=-1.0),
            eve=Found("x", seconds_left=math.nan),
        )
        known = secrets_of(server)
        assert await known.find("db", "ann") == Known("x")
        assert await known.find("db", "bob") == Known("x", False, "expired")
        assert await known.find("db", "cat") == Known("x", False, "nologin")
        assert await known.find("db", "dan") == Known(None, False, "nologin")
        assert await known.find("db", "eve") == Known("x", False, "expired")
        clock.added = 1.1
        assert await known.find("db", "ann") == Known("x", False, "expired")
        assert server.asked.count("ann") == 1

    run(body)


def test_a_query_that_fails_makes_one_unknown_and_a_server_out_of_reach_refuses_all_alike() -> None:
    async def body() -> None:
        known = secrets_of(Server(ann=LookupFailed("no", "42501"), bob=Unreachable("away", "08001")))
        assert await known.find("db", "ann") is None
        with pytest.raises(Refusal) as refused:
            await known.find("db", "bob")
        assert refused.value.sqlstate == "57P03"
        assert b"bob" not in refused.value.reply

    run(body)


def test_how_much_is_remembered_has_a_bound() -> None:
    async def body() -> None:
        server = Server()
        known = secrets_of(server)
        for number in [*range(5000), 4999, 904, 903]:
            await known.find("db", f"u{number}")
        assert server.asked[5000:] == ["u903"], "the latest 4096"
        keys = KeyCache(size=100)
        for number in range(200):
            keys.show("here:5432", f"u{number}", VERIFIER, KEYS.client)
        assert [keys.shown("here:5432", f"u{number}") is not None for number in (99, 100, 199)] == [
            False,
            True,
            True,
        ]

    run(body)


# -- what a client has shown ------------------------------------------------------------------------------------


def test_keys_of_a_proof_are_for_the_server_that_the_client_came_for() -> None:
    """Another one could show the same salt, and try passwords on the proof it gets."""

    async def body() -> None:
        keys = KeyCache()
        known = secrets_of(Server(ann=Found(STORED)), keys)
        await known.find("db", "ann")
        known.proven("db", "ann", VERIFIER, KEYS.client)
        assert keys.shown("there:5432", "ann") is None
        found = keys.shown("here:5432", "ann")
        assert found is not None
        assert (found.salt, found.iterations, found.keys) == (VERIFIER.salt, VERIFIER.iterations, KEYS)
        keys.drop("here:5432", "ann", found._replace(iterations=1))
        assert keys.shown("here:5432", "ann") is found, "newer ones are not dropped"
        keys.drop("here:5432", "ann", found)
        assert keys.shown("here:5432", "ann") is None

    run(body)


@pytest.mark.parametrize(
    "tables",
    [
        {"users": {"ann": {"password": "plain"}}},
        {"users": {"ann": {"password": STORED, "server_password": "x"}}},
        {"users": {"ann": {"password": STORED}}, "databases": {"db": {"host": "here", "password": "x"}}},
        {"users": {"ann": {"password": STORED}}, "databases": {"db": {"host": "here", "user": "shared"}}},
        {"users": {"ann": {"password": STORED}}, "databases": {"another": {"host": "here"}}},
    ],
)
def test_keys_that_are_no_use_are_not_kept(tables: dict[str, Any]) -> None:
    keys = KeyCache()
    secrets_of(Server(), keys, **tables).proven("db", "ann", VERIFIER, KEYS.client)
    assert keys.shown("here:5432", "ann") is None


def test_a_pool_begins_before_its_client_where_there_is_something_to_log_in_with() -> None:
    users = {"ann": {"password": STORED}, "bob": {"password": "x"}, "cat": {}, "looker": {"password": "x"}}
    keys = KeyCache()
    known = secrets_of(Server(), keys, users=users)
    config = config_of({"databases": {"db": {"host": "here"}}, "users": users})
    begins = [name for name in users if known.can_begin(target_of(config, "db", name))]
    assert begins == ["bob", "cat"]
    known.proven("db", "ann", VERIFIER, KEYS.client)
    assert known.can_begin(target_of(config, "db", "ann"))


def test_with_md5_strangers_are_asked_as_those_are_who_exist() -> None:
    known = secrets_of(Server(), users={"ann": {"password": "plain"}})
    assert known.strangers_by_scram(), "servers have verifiers"
    for secret, by_scram in ((STORED, True), ("plain", False)):
        config = config_of({"databases": {"db": {}}, "users": {"ann": {"password": secret}}})
        assert Secrets(config, KeyCache(), Server()).strangers_by_scram() is by_scram  # type: ignore[arg-type]
