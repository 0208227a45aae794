"""Group A, connection start: where secrets come from, and how the proxy logs in at servers with what it knows."""

import asyncio
import base64
import contextlib
import json
import logging
import os
import ssl
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from login_kit import on_both_loops, place
from proxy_kit import RunningProxy, config_for, logged_in, until, wire

from cenote import embedded
from cenote.embedded.configuration import literal
from cenote.errors import EmbeddedError
from cenote.proxy.auth.keys import KeyCache
from cenote.proxy.auth.lookup import Lookups, Unreachable
from cenote.proxy.config import AUTH_QUERY, config_of
from cenote.proxy.reload import reload
from cenote.testing.postgres import DebianPostgres, TLSFiles, backends, fresh_database, terminate
from cenote.testing.scripted_server import ScriptedServer
from cenote.testing.wire import Address, LoginRefused, RawClient, error, value

SUPER = "postgres"
# As the default, and it says when the secret expires, not only whether it has.
UNTIL = (
    "SELECT rolname, rolpassword, rolcanlogin, EXTRACT(epoch FROM rolvaliduntil) - EXTRACT(epoch FROM now())"
    " FROM pg_catalog.pg_authid WHERE rolname = $1"
)
Asking = Callable[..., RunningProxy]


def asking_config(server: Any, *, users: Any = None, top: Any = None, **options: Any) -> dict[str, Any]:
    """A configuration that knows nobody but who looks others up."""
    config = config_for(server, top={"auth_user": SUPER, **(top or {})}, **{"audit": "off", **options})
    config["users"] = {SUPER: {"password": server.password}, **(users or {})}
    return config


#: The sessions of such a proxy that ask. That of an earlier test may be about to end.
ASKING = "SELECT pid, datname FROM pg_stat_activity WHERE application_name = 'cenote auth_query'"


@pytest.fixture
def started() -> Iterator[Callable[[dict[str, Any], Any], RunningProxy]]:
    """`started(config, server)` is a proxy of the test's own."""
    proxies: list[RunningProxy] = []

    def start(config: dict[str, Any], server: Any) -> RunningProxy:
        proxies.append(RunningProxy(config, server))
        return proxies[-1].start()

    yield start
    try:
        for proxy in proxies:
            if proxy.alive:
                proxy.clean()
    finally:
        for proxy in proxies:
            proxy.stop()


@pytest.fixture
def asking(started: Any) -> Asking:
    """`asking(server)` is a proxy that asks the server who somebody is."""
    return lambda server, **options: started(asking_config(server, **options), server)


@pytest.fixture
def role(pg18: embedded.Postgres) -> Iterator[Callable[..., str]]:
    """`role("ann", "PASSWORD 'x'")` makes a role for the test."""
    made: list[str] = []

    def make(name: str, options: str) -> str:
        pg18.psql(f'CREATE ROLE "{name}" LOGIN {options}', database="postgres")
        made.append(name)
        return name

    yield make
    for name in made:
        terminate(pg18.superuser_dsn, backends(pg18.superuser_dsn, user=name))
        pg18.psql(f'DROP OWNED BY "{name}"; DROP ROLE "{name}"', database="postgres")


def verifier_of(server: embedded.Postgres, name: str) -> str:
    return server.psql(f"SELECT rolpassword FROM pg_authid WHERE rolname = {literal(name)}").strip()


async def refused(proxy: RunningProxy, user: str, password: str, **named: Any) -> dict[str, str]:
    """The error with which a log-in ends."""
    with pytest.raises(LoginRefused) as caught:
        await logged_in(proxy.address, proxy, user=user, password=password, **named)
    return caught.value.fields


async def serves(proxy: RunningProxy, user: str, password: str, **named: Any) -> None:
    """The user is let in, and a query runs as this very role."""
    async with await logged_in(proxy.address, proxy, user=user, password=password, **named) as client:
        assert value(await client.query("SELECT session_user")) == user
        await client.terminate()


# -- A12: names cannot be found out ------------------------------------------------------------------------------


async def conversation(proxy: RunningProxy, user: str, database: str = "") -> tuple[list[Any], str]:
    """What a failing log-in by SCRAM hears, without what is random, and its salt."""
    salts: list[str] = []

    def told(message: Any) -> tuple[Any, ...]:
        if message.kind != "R" or message.body[:4] != bytes((0, 0, 0, 11)):
            return message.kind, message.body
        parts = dict(part.split("=", 1) for part in message.body[4:].decode().split(","))
        salts.append(parts["s"])
        return len(base64.b64decode(parts["s"])), len(parts["r"]), parts["i"]

    with pytest.raises(LoginRefused) as caught:
        await logged_in(proxy.address, proxy, user=user, password="wrong", database=database)
    heard = [told(message) for message in caught.value.before]
    fields = {name: text.replace(user, "?") for name, text in caught.value.fields.items()}
    return [*heard, fields], salts[0]


@pytest.mark.parametrize("iterations", [4096, 1000])
@wire
async def test_A12_auth_query_tells_no_stranger_from_a_known_user(asking, pg18, role, iterations):
    role("ann", "")
    pg18.psql(
        f"SET scram_iterations = {iterations}; ALTER ROLE ann PASSWORD 'secret';"
        f" ALTER ROLE {SUPER} SET scram_iterations = {iterations}"
    )
    try:
        proxy = asking(pg18)
        known, salt = await conversation(proxy, "ann")
        stranger, mock = await conversation(proxy, "bob")
        assert known == stranger
        assert known[-1]["C"] == "28P01"
        assert (await conversation(proxy, "bob"))[1] == mock, "the salt of a stranger stays"
        assert (await conversation(proxy, "ann"))[1] == salt
        assert (await conversation(proxy, "eve"))[1] not in (salt, mock)
    finally:
        pg18.psql(f"ALTER ROLE {SUPER} RESET scram_iterations")


@wire
async def test_A12_a_database_that_does_not_exist_knows_the_same_users(asking, pg18, role):
    """Or else whoever looks different there exists here."""
    role("ann", "PASSWORD 'secret'")
    proxy = asking(pg18)
    for name in ("ann", "bob"):
        assert await conversation(proxy, name) == await conversation(proxy, name, "nowhere")
        assert await conversation(proxy, name) == await conversation(proxy, name, "cenote")
    assert (await refused(proxy, "ann", "secret", database="nowhere"))["C"] == "3D000"
    assert (await refused(proxy, "ann", "secret", database="cenote"))["C"] == "42501"


@wire
async def test_A12_an_administrator_is_never_looked_up_for_the_console(asking, pg18, role):
    """Whoever can make roles at a server does not become the pooler's administrator."""
    role("chief", "PASSWORD 'secret'")
    proxy = asking(pg18, users={"chief": {}}, top={"admin_users": ["chief"]})
    await serves(proxy, "chief", "secret")
    assert (await refused(proxy, "chief", "secret", database="cenote"))["C"] == "28P01"


@wire
async def test_A12_who_cannot_be_looked_up_hears_so_whoever_it_is(asking):
    async with ScriptedServer() as server:
        proxy = asking(server)
        server.refuse()
        told = [await refused(proxy, name, "x") for name in ("ann", "bob")]
        assert told[0] == told[1]
        assert (told[0]["C"], told[0]["M"]) == ("57P03", "cenote: users cannot be looked up now")
        await server.listen()
        await proxy.finish()


@wire
async def test_A15_the_function_of_the_documentation_looks_up_without_a_superuser(asking, pg18, role):
    page = (Path(__file__).parents[2] / "docs" / "authentication.md").read_text()
    made = page.split("```sql\n")[1].split("```")[0].replace("'...'", "'looks'")
    query = page.split('auth_query = "')[1].split('"')[0]
    role("ann", "PASSWORD 'secret'")
    role("bob", "PASSWORD 'secret' VALID UNTIL '2099-01-01'")
    pg18.psql("ALTER ROLE bob NOLOGIN")
    role("cat", "PASSWORD 'secret' VALID UNTIL '2000-01-01'")
    with fresh_database(pg18) as name:
        pg18.psql(made, database=name)
        try:
            base = asking_config(pg18)["databases"][pg18.database]
            proxy = asking(
                pg18,
                databases={name: base},
                users={"cenote_lookup": {"password": "looks"}},
                top={"auth_user": "cenote_lookup", "auth_query": query},
            )
            await serves(proxy, "ann", "secret", database=name)
            for user, sqlstate in (("bob", "28000"), ("cat", "28P01"), ("dan", "28P01"), ("eve", "28P01")):
                assert (await refused(proxy, user, "secret", database=name))["C"] == sqlstate
            await proxy.finish()
        finally:
            pg18.psql("DROP OWNED BY cenote_lookup; DROP ROLE cenote_lookup", database=name)


@wire
async def test_A12_a_query_that_fails_makes_a_user_unknown(asking, pg18, role):
    role("ann", "PASSWORD 'secret'")
    for query in (
        "SELECT rolname, rolpassword, 1 / 0 > 0 FROM pg_authid WHERE rolname = $1",
        "SELECT rolname, rolpassword, 1 FROM pg_authid WHERE rolname = $1",
        "SELECT 'bob', rolpassword FROM pg_authid WHERE rolname = $1",
        "SELECT rolname, rolpassword FROM pg_authid, generate_series(1, 2) WHERE rolname = $1",
        "SELECT rolname FROM pg_authid WHERE rolname = $1",
        "SELECT rolname, repeat('x', 100000) FROM pg_authid WHERE rolname = $1",
        "nonsense $1",
    ):
        proxy = asking(pg18, top={"auth_query": query})
        assert (await refused(proxy, "ann", "secret"))["C"] in ("28P01", "57P03"), query
        await proxy.finish()


# -- A15: who may not log in ----------------------------------------------------------------------------------


@pytest.mark.parametrize("query", ["", UNTIL])
@pytest.mark.parametrize(
    ("options", "sqlstate", "text"),
    [
        ("VALID UNTIL '2000-01-01'", "28P01", 'password authentication failed for user "ann"'),
        ("NOLOGIN", "28000", 'role "ann" is not permitted to log in'),
        ("NOLOGIN VALID UNTIL '2000-01-01'", "28P01", 'password authentication failed for user "ann"'),
    ],
)
@wire
async def test_A15_auth_query_keeps_out_whom_postgresql_keeps_out(
    asking, pg18, role, options, sqlstate, text, query
):
    role("ann", "PASSWORD 'secret'")
    pg18.psql(f"ALTER ROLE ann {options}")
    proxy = asking(pg18, top={"auth_query": query} if query else {})
    fields = await refused(proxy, "ann", "secret")
    assert (fields["C"], fields["M"]) == (sqlstate, text)
    async with await RawClient.connect((pg18.host, pg18.port)) as direct:
        theirs = await direct.refusal("ann", pg18.database, "secret")
        assert (theirs["C"], theirs["M"]) == (sqlstate, text)
    assert (await refused(proxy, "ann", "wrong"))["C"] == "28P01"


@pytest.mark.parametrize("query", ["", UNTIL])
@pytest.mark.parametrize("valid", ["infinity", "2099-01-01", None])
@wire
async def test_A15_auth_query_lets_in_who_may(asking, pg18, role, query, valid):
    role("ann", "PASSWORD 'secret'" + (f" VALID UNTIL '{valid}'" if valid else ""))
    await serves(asking(pg18, top={"auth_query": query} if query else {}), "ann", "secret")


@wire
async def test_A15_the_connection_limit_of_a_role_holds(asking, pg18, role):
    """It is the server that counts; who waits hears its words."""
    role("ann", "PASSWORD 'secret' CONNECTION LIMIT 0")
    fields = await refused(asking(pg18, acquire_timeout=2.0), "ann", "secret")
    assert fields["C"] == "53300"
    assert 'too many connections for role "ann"' in fields["M"]


@wire
async def test_CVE_2025_2291_a_password_is_no_good_from_the_moment_it_expires(asking, pg18, role):
    """Also while the answer that it was good is remembered."""
    role("ann", "PASSWORD 'secret'")
    proxy = asking(pg18, top={"auth_query": UNTIL})
    pg18.psql(
        "DO $$ BEGIN EXECUTE format('ALTER ROLE ann VALID UNTIL %L', clock_timestamp() + interval '2.5 s'); END $$"
    )
    end = asyncio.get_running_loop().time() + 2.5
    await serves(proxy, "ann", "secret")
    await until(lambda: asyncio.get_running_loop().time() > end)
    assert (await refused(proxy, "ann", "secret"))["C"] == "28P01"


# -- A16: nothing of a client reaches the connection that asks ----------------------------------------------------

# What a query without schemas would find on another search_path: everybody has the password that the thief knows.
PLANTED = """
    CREATE SCHEMA planted;
    GRANT USAGE ON SCHEMA planted TO PUBLIC;
    CREATE VIEW planted.pg_authid AS SELECT rolname, {verifier}::text AS rolpassword, true AS rolcanlogin,
        NULL::timestamptz AS rolvaliduntil FROM pg_catalog.pg_authid;
    GRANT SELECT ON planted.pg_authid TO PUBLIC;
    CREATE FUNCTION planted.always(name, text) RETURNS boolean LANGUAGE sql IMMUTABLE AS 'SELECT true';
    CREATE OPERATOR planted.= (LEFTARG = name, RIGHTARG = text, FUNCTION = planted.always);
    CREATE FUNCTION planted.now() RETURNS timestamptz LANGUAGE sql AS $$ SELECT '1970-01-01'::timestamptz $$;
"""


@pytest.mark.parametrize("query", ["SELECT rolname, rolpassword FROM pg_authid WHERE rolname = $1", ""])
@wire
async def test_CVE_2025_12819_A16_what_a_client_sets_never_reaches_the_connection_that_asks(
    asking, pg18, admin, role, query
):
    """Nor does what somebody has set for the role or the database."""
    await until(lambda: not admin.rows(ASKING))
    role("ann", "PASSWORD 'secret'")
    role("thief", "PASSWORD 'stolen'")
    with fresh_database(pg18) as name:
        pg18.psql(PLANTED.format(verifier=literal(verifier_of(pg18, "thief"))), database=name)
        path = "planted, pg_catalog"
        pg18.psql(
            f"ALTER DATABASE {name} SET search_path = {path};"
            f" ALTER ROLE {SUPER} IN DATABASE {name} SET search_path = {path}"
        )
        base = asking_config(pg18)["databases"][pg18.database]
        proxy = asking(pg18, databases={name: base}, top={"auth_query": query} if query else {})
        for params in (
            {"search_path": path},
            {"options": "-c search_path=planted,pg_catalog -c default_transaction_read_only=off"},
            {"role": SUPER, "session_authorization": SUPER},
            {},
        ):
            fields = await refused(proxy, "ann", "stolen", database=name, params=params)
            assert fields["C"] == "28P01", params
            await serves(proxy, "ann", "secret", database=name)
        assert [database for _, database in admin.rows(ASKING)] == [name], "one connection for all of them"
        await proxy.finish()


@wire
async def test_A16_the_name_of_a_user_is_never_part_of_the_query(asking, pg18, role):
    names = ["x' OR true --", "x\\' OR 1=1; DROP TABLE t; --", "$1", "%s", 'q"q']
    for name in names:
        role(name.replace('"', '""'), "PASSWORD 'secret'")
    proxy = asking(pg18)
    for name in names:
        await serves(proxy, name, "secret")
    assert (await refused(proxy, "' OR rolname = 'postgres", "secret"))["C"] == "28P01"
    for name in names:
        terminate(pg18.superuser_dsn, backends(pg18.superuser_dsn, user=name))
    await proxy.finish()


@wire
async def test_A16_the_session_that_asks_is_read_only_and_opened_again(asking, pg18, admin, role):
    await until(lambda: not admin.rows(ASKING))
    role("ann", "PASSWORD 'secret'")
    query = "SELECT $1, current_setting('transaction_read_only') || current_setting('search_path')"
    proxy = asking(pg18, top={"auth_query": query, "auth": "password"})
    find = lambda: proxy.daemon.gate.secrets.find(pg18.database, "ann", True)  # noqa: E731
    assert (await proxy.begin(find)).text == "onpg_catalog"
    (first,) = admin.rows(ASKING)
    assert (await proxy.begin(find)).text == "onpg_catalog"
    assert admin.rows(ASKING) == [first], "it is kept"
    terminate(pg18.superuser_dsn, first[:1])
    assert (await proxy.begin(find)).text == "onpg_catalog"


@on_both_loops
async def test_A16_the_session_that_asks_ends_when_nobody_has_asked_for_long(pg18, admin):
    await until(lambda: not admin.rows(ASKING))
    lookups = Lookups(KeyCache(), idle_s=0.5)
    lookup = lookups.at(place(pg18), "postgres", SUPER, pg18.password)
    assert lookups.at(place(pg18, max_size=3), "postgres", SUPER, pg18.password) is lookup
    assert (await lookup.ask(AUTH_QUERY, "app")).can_login
    assert await lookup.ask(AUTH_QUERY, "nobody") is None
    began = asyncio.get_running_loop().time()
    slow = "SELECT $1, pg_sleep(0.2)::text"
    assert len(await asyncio.gather(*(lookup.ask(slow, "app") for _ in range(50)))) == 50
    assert asyncio.get_running_loop().time() - began < 5, "who asks the same gets the same answer"
    assert len(admin.rows(ASKING)) == 1
    await until(lambda: not admin.rows(ASKING))
    assert (await lookup.ask(AUTH_QUERY, "app")).can_login
    await lookups.close()
    await until(lambda: not admin.rows(ASKING))


@on_both_loops
async def test_A16_a_server_that_does_not_answer_is_given_up_and_not_asked_by_all(pg18):
    """Who stands in line behind does not wait for as long again each."""
    async with ScriptedServer() as server:
        server.refuse()
        lookup = Lookups(KeyCache()).at(place(server), "db", SUPER, "x")
        loop = asyncio.get_running_loop()
        began = loop.time()
        came = await asyncio.gather(*(lookup.ask(AUTH_QUERY, f"u{n}") for n in range(50)), return_exceptions=True)
        assert {type(each) for each in came} == {Unreachable}
        assert loop.time() - began < 2
        await server.listen()


# -- A21, A22: the server refuses, or speaks ----------------------------------------------------------------------


@wire
async def test_A21_what_postgresql_refuses_for_good_reaches_who_waits(started, pg18, role):
    """In its words, at once; the client itself is let in by the configuration."""
    role("ann", "PASSWORD 'secret'")
    with fresh_database(pg18) as closed:
        pg18.psql(f"REVOKE CONNECT ON DATABASE {closed} FROM PUBLIC", database="postgres")
        base = config_for(pg18, acquire_timeout=30.0)["databases"][pg18.database]
        users = {"ann": {"password": "secret"}, "bob": {"password": "x"}}
        places = {closed: base, "gone": base}
        proxy = started(config_for(pg18, users=users, databases=places, audit="off"), pg18)
        loop = asyncio.get_running_loop()
        began = loop.time()
        for user, password, database, sqlstate in (
            ("bob", "x", pg18.database, "28P01"),
            ("ann", "secret", "gone", "3D000"),
            ("ann", "secret", closed, "42501"),
        ):
            fields = await refused(proxy, user, password, database=database)
            assert fields["C"] == sqlstate
            assert f"({sqlstate})" in fields["M"], "and where it comes from"
        assert loop.time() - began < 10
        await proxy.finish()


@wire
async def test_A22_what_a_login_event_trigger_says_is_logged(started, pg18):
    with fresh_database(pg18) as name:
        pg18.psql(
            "CREATE FUNCTION greet() RETURNS event_trigger LANGUAGE plpgsql AS"
            " $$ BEGIN RAISE NOTICE 'wipe your feet'; END $$;"
            " CREATE EVENT TRIGGER greeter ON login EXECUTE FUNCTION greet();"
            " ALTER EVENT TRIGGER greeter ENABLE ALWAYS",
            database=name,
        )
        base = config_for(pg18)["databases"][pg18.database]
        proxy = started(config_for(pg18, databases={name: base}), pg18)
        events: list[dict[str, Any]] = []
        with listening("cenote.proxy.pool", events):
            await serves(proxy, pg18.user, pg18.password, database=name)
        assert any("server_notice" in text and "wipe your feet" in text for text in map(str, events)), events
        await proxy.finish()


@contextlib.contextmanager
def listening(logger: str, lines: list[Any]) -> Iterator[None]:
    """What is logged meanwhile."""

    class Hearer(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(self.format(record))

    hearer = Hearer()
    logging.getLogger(logger).addHandler(hearer)
    try:
        yield
    finally:
        logging.getLogger(logger).removeHandler(hearer)


# -- F11: passwords change ----------------------------------------------------------------------------------------


@wire
async def test_F11_a_password_changed_at_the_server_works_at_the_second_try_at_the_latest(asking, pg18, role):
    """What the server said before is forgotten when a proof fails."""
    role("ann", "PASSWORD 'old'")
    proxy = asking(pg18)
    await serves(proxy, "ann", "old")
    pg18.psql("ALTER ROLE ann PASSWORD 'new'")
    with contextlib.suppress(LoginRefused):
        await serves(proxy, "ann", "new")
    await serves(proxy, "ann", "new")
    assert (await refused(proxy, "ann", "old"))["C"] == "28P01"


@wire
async def test_F11_after_a_rotation_pools_go_on_with_the_first_who_knows_the_new_password(asking, pg18, role):
    """Keys that the server does not take are dropped; who came by the old ones hears why and stays connected."""
    role("ann", "PASSWORD 'old'")
    proxy = asking(pg18)
    async with await logged_in(proxy.address, proxy, user="ann", password="old") as client:
        assert value(await client.query("SELECT 1")) == "1"
        pg18.psql("ALTER ROLE ann PASSWORD 'new'")
        terminate(pg18.superuser_dsn, backends(pg18.superuser_dsn, user="ann"))
        await proxy.reached(idle=0)
        fields = error(await client.query("SELECT 2"))
        assert fields["C"] == "28P01"
        assert "verifier" in fields["M"]
        await serves(proxy, "ann", "new")
        assert value(await client.query("SELECT 3")) == "3"
        await client.terminate()


@wire
async def test_F11_a_secret_that_can_log_in_is_asked_for_again_and_nobody_notices(asking, pg18, role):
    role("ann", "PASSWORD 'old'")
    with fresh_database(pg18) as name:
        pg18.psql(
            "CREATE TABLE book (name text, secret text); INSERT INTO book VALUES ('ann', 'old')", database=name
        )
        query = "SELECT name, secret FROM public.book WHERE name = $1"
        base = asking_config(pg18, auth_query=query)["databases"][pg18.database]
        proxy = asking(pg18, databases={name: base})
        async with await logged_in(proxy.address, proxy, user="ann", password="old", database=name) as client:
            assert value(await client.query("SELECT 1")) == "1"
            pg18.psql("ALTER ROLE ann PASSWORD 'new'; UPDATE book SET secret = 'new'", database=name)
            terminate(pg18.superuser_dsn, backends(pg18.superuser_dsn, user="ann"))
            await proxy.reached(idle=0)
            assert value(await client.query("SELECT 2")) == "2"
            await client.terminate()
        await proxy.finish()


# -- pass-through -------------------------------------------------------------------------------------------------


@wire
async def test_A14_with_verifiers_alone_no_password_is_stored_anywhere(started, pg18, role):
    role("ann", "PASSWORD 'secret'")
    config = config_for(pg18, min_size=1, audit="off")
    config["users"] = {"ann": {"password": verifier_of(pg18, "ann")}}
    assert "secret" not in json.dumps(config)
    proxy = started(config, pg18)
    await serves(proxy, "ann", "secret")
    await serves(proxy, "ann", "secret")
    async with await RawClient.connect((pg18.host, pg18.port)) as direct:
        await direct.startup("ann", pg18.database, "secret")
        assert (await refused(proxy, "ann", "wrong"))["C"] == "28P01"


@wire
async def test_A14_what_a_client_has_shown_outlives_a_reload(started, pg18, role):
    role("ann", "PASSWORD 'secret'")
    config = config_for(pg18, audit="off")
    config["users"] = {"ann": {"password": verifier_of(pg18, "ann")}}
    proxy = started(config, pg18)
    async with await logged_in(proxy.address, proxy, user="ann", password="secret") as client:
        proxy.daemon.read_config = lambda: config_of(config)
        await proxy.begin(lambda: reload(proxy.daemon))
        terminate(pg18.superuser_dsn, backends(pg18.superuser_dsn, user="ann"))
        await proxy.reached(idle=0)
        assert value(await client.query("SELECT 1")) == "1"
        await client.terminate()


@wire
async def test_A14_another_verifier_than_the_servers_is_named(started, pg18, role):
    """The same password with another salt: its keys log in nowhere else."""
    role("ann", "PASSWORD 'secret'")
    theirs = verifier_of(pg18, "ann")
    pg18.psql("ALTER ROLE ann PASSWORD 'secret'")
    config = config_for(pg18, audit="off")
    config["users"] = {"ann": {"password": theirs}}
    fields = await refused(started(config, pg18), "ann", "secret")
    assert fields["C"] == "28P01"
    assert 'the server\'s verifier of user "ann" is not the one' in fields["M"]


@wire
async def test_A14_a_users_file_has_secrets_of_every_form(started, pg18, role, tmp_path: Path):
    role("ann", "PASSWORD 'secret'")
    role("bob", "PASSWORD 'pa\"ss'")
    (tmp_path / "users").write_text(
        f'; who may come\n"ann" "{verifier_of(pg18, "ann")}"\n\n"bob" "pa""ss" ""\n"cat" ""\n'
    )
    config = config_for(pg18, top={"users_file": str(tmp_path / "users")}, audit="off")
    config["users"] = {}
    proxy = started(config, pg18)
    await serves(proxy, "ann", "secret")
    await serves(proxy, "bob", 'pa"ss')
    for name in ("cat", "dan"):
        assert (await refused(proxy, name, "x"))["C"] == "28P01"


@wire
async def test_A14_a_section_without_a_password_is_no_secret(asking, pg18, role):
    """It has options for a user whom the server knows."""
    role("ann", "PASSWORD 'secret'")
    proxy = asking(pg18, users={"ann": {"max_size": 1}})
    await serves(proxy, "ann", "secret")
    assert [pool.options.max_size for pool in proxy.pools() if pool.user == "ann"] == [1]


# -- TLS to the server --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def debian() -> Iterator[DebianPostgres]:
    """PostgreSQL with TLS; `app` logs in to the database `postgres` by its certificate."""
    try:
        server = DebianPostgres(hba=["hostssl postgres app 127.0.0.1/32 cert"])
        server.start()
    except EmbeddedError as missing:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(missing))
    with contextlib.closing(server):
        yield server


class Between:
    """Ends the TLS of whoever comes and begins another with the server: channel binding is there to notice."""

    def __init__(self, server: DebianPostgres, files: TLSFiles) -> None:
        self.server = server
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.load_cert_chain(files.server_certificate, files.server_key)
        self.host = "127.0.0.1"
        self.user, self.password, self.database = server.user, server.password, server.database
        self.port = 0
        self.came = 0

    async def __aenter__(self) -> "Between":
        self.listener = await asyncio.start_server(self.meet, self.host, 0)
        self.port = self.listener.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self.listener.close()

    async def meet(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, ssl.SSLError):
            await reader.readexactly(8)
            writer.write(b"S")
            await writer.start_tls(self.context)
            self.came += 1
            async with await RawClient.connect(
                Address(self.server.host, self.server.port), tls="postgres"
            ) as onward:
                await asyncio.wait(
                    [
                        asyncio.ensure_future(self.pump(reader, onward.writer)),
                        asyncio.ensure_future(self.pump(onward.reader, writer)),
                    ],
                    return_when=asyncio.FIRST_COMPLETED,
                )
        writer.close()

    async def pump(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, ssl.SSLError):
            while data := await source.read(65_536):
                sink.write(data)
                await sink.drain()


@wire
async def test_A14_over_tls_the_proof_to_the_server_is_bound_to_its_certificate(proxy_for, debian, tls_files):
    """Also that by keys which a client has shown. Whoever stands between does not get in."""
    verifier = debian.psql("SELECT rolpassword FROM pg_authid WHERE rolname = 'app'").strip()
    for users in ({}, {"app": {"password": verifier}}):
        options: dict[str, Any] = {"users": users, "sslmode": "verify-full", "sslrootcert": str(debian.tls.ca)}
        proxy = proxy_for(debian, host="localhost", **options)
        async with await proxy.client() as client:
            assert value(await client.query("SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()")) == "t"
            await client.terminate()
        await proxy.finish()
        async with Between(debian, tls_files) as between:
            proxy = proxy_for(between, sslmode="require", users=users, acquire_timeout=5)
            fields = await refused(proxy, "app", debian.password)
            assert fields["C"][:2] == "28"
            assert "channel binding" in fields["M"]
            assert between.came == 1, "and it is not tried again"
            await proxy.finish()


@wire
async def test_A14_our_certificate_logs_in_at_a_server_that_asks_for_one(proxy_for, debian):
    """Then there is no password anywhere."""
    verifier = debian.psql("SELECT rolpassword FROM pg_authid WHERE rolname = 'app'").strip()
    options = {
        "users": {"app": {"password": verifier}},
        "dbname": "postgres",
        "sslmode": "verify-full",
        "sslrootcert": str(debian.tls.ca),
        "host": "localhost",
    }
    files = {"sslcert": str(debian.tls.client_certificate), "sslkey": str(debian.tls.client_key)}
    proxy = proxy_for(debian, **options, **files)
    async with await proxy.client() as client:
        asked = "SELECT client_dn FROM pg_stat_ssl WHERE pid = pg_backend_pid()"
        assert value(await client.query(asked)) == "/CN=app"
        await client.terminate()
    await proxy.finish()
    proxy = proxy_for(debian, **options, acquire_timeout=5)
    assert (await refused(proxy, "app", debian.password))["C"][:2] == "28"


@pytest.mark.parametrize("auth", ["password", "md5"])
@wire
async def test_A14_an_md5_hash_and_a_plain_password_from_auth_query_log_in(started, auth):
    """At servers that ask for them."""
    with embedded.Postgres(16, auth=auth, settings={"password_encryption": "md5"}) as server:
        secret = "'secret'" if auth == "password" else "rolpassword"
        server.psql("CREATE ROLE ann LOGIN PASSWORD 'secret'")
        query = f"SELECT rolname, {secret} FROM pg_authid WHERE rolname = $1"
        way = {"auth": "md5"} if auth == "md5" else {}
        proxy = started(asking_config(server, top={"auth_query": query, **way}), server)
        await serves(proxy, "ann", "secret")
        await serves(proxy, "ann", "secret")
        await proxy.finish()
