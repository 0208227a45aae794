"""Group A, connection start: who may log in and how, rule by rule, through a real proxy and against PostgreSQL."""

import asyncio
import os
import pwd
import random
import resource
import socket
import ssl
import struct
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import asyncpg
import psycopg
import pytest
from login_kit import Door, mutated, on_both_loops
from proxy_kit import RunningProxy, wire

from cenote import embedded
from cenote.errors import EmbeddedError
from cenote.proxy.auth.maps import parse_maps
from cenote.proxy.auth.rules import parse_rules
from cenote.proxy.login import Login
from cenote.testing.postgres import DebianPostgres, TLSFiles, make_tls_files, wait_until
from cenote.testing.wire import (
    Address,
    LoginRefused,
    RawClient,
    WireFailure,
    error,
    kinds,
    rows,
    unchecked_context,
    value,
)
from cenote.wire import messages
from cenote.wire.scram import Verifier

OURSELVES = pwd.getpwuid(os.getuid()).pw_name
HERE = "127.0.0.1/32"
Ruled = Callable[..., RunningProxy]


@pytest.fixture
def ruled(proxy_for: Any, pg18: embedded.Postgres, tls_files: TLSFiles, tmp_path: Path) -> Ruled:
    """`ruled(rules)` starts a proxy with these lines of pg_hba.conf; it speaks TLS and has a Unix socket."""
    tmp_path.chmod(0o755)

    def start(*rules: str, maps: str = "", users: Any = None, **listen: Any) -> RunningProxy:
        (tmp_path / "hba").write_text("\n".join(rules))
        (tmp_path / "ident").write_text(maps)
        tls = {"tls_cert": str(tls_files.server_certificate), "tls_key": str(tls_files.server_key)}
        return proxy_for(  # type: ignore[no-any-return]
            pg18,
            listen={"unix_dir": str(tmp_path), "tls_ca": str(tls_files.ca), **tls, **listen},
            users=users,
            top={"rules_file": str(tmp_path / "hba"), "map_file": str(tmp_path / "ident")},
        )

    return start


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory, tls_files: TLSFiles) -> Callable[..., ssl.SSLContext]:
    """A client's TLS with a certificate of the authority for this common name; "": with none."""
    folder = tmp_path_factory.mktemp("clients")

    def make(name: str, authority: TLSFiles = tls_files) -> ssl.SSLContext:
        context = unchecked_context()
        if name:
            both = folder / f"{name}.pem"
            command = [
                "openssl",
                "req",
                "-x509",
                "-newkey",
                "ec",
                "-pkeyopt",
                "ec_paramgen_curve:prime256v1",
                "-nodes",
                "-days",
                "2",
                "-subj",
                f"/CN={name}",
                "-addext",
                "basicConstraints=CA:FALSE",
                "-CA",
                str(authority.ca),
                "-CAkey",
                str(authority.folder / "ca.key"),
                "-keyout",
                str(both),
            ]
            done = subprocess.run(command, capture_output=True, check=True)  # fmt: skip
            both.write_bytes(both.read_bytes() + done.stdout)
            context.load_cert_chain(both)
        return context

    return make


def asked(trace: list) -> list[int]:
    """The codes of the Authentication messages."""
    return [int.from_bytes(message.body[:4], "big") for message in trace if message.kind == "R"]


async def attempt(
    address: Address, user: str, database: str, password: str, params: Any = None, **connect: Any
) -> tuple[list[int], dict[str, str]]:
    """What a log-in is asked for, and the error it ends with, if it does."""
    async with await RawClient.connect(address, **connect) as client:
        try:
            trace = await client.startup(user, database, password, params)
        except LoginRefused as refused:
            assert await client.closed() == []
            fields = {name: refused.fields[name] for name in "VCM"}
            return asked(refused.before), fields
        await client.terminate()
        return asked(trace), {}


def unix(proxy: RunningProxy) -> Address:
    return Address(proxy.config["listen"]["unix_dir"], proxy.port)


def libpq(proxy: RunningProxy, **words: Any) -> str:
    """`current_user` for a client of libpq; the error where it is refused."""
    given = {
        "host": "127.0.0.1",
        "port": proxy.port,
        "user": proxy.user,
        "password": proxy.password,
        "dbname": proxy.database,
        "gssencmode": "disable",
        "connect_timeout": 10,
        **words,
    }
    try:
        with psycopg.connect(**given, autocommit=True) as conn:
            return str(conn.execute("SELECT current_user").fetchone()[0])
    except psycopg.OperationalError as refused:
        return str(refused)


# -- against PostgreSQL -------------------------------------------------------------------------------------------

DIFFERENTIAL = [
    "# who, where, how",
    "host nobody all 0.0.0.0/0 trust",
    f"host app /^no {HERE} reject",
    f"host sameuser all {HERE} scram-sha-256",
    f'host "all",/^shop all {HERE} reject',
    f'host reports,"two words" app {HERE} \\',
    "  scram-sha-256",
    f"hostssl postgres all {HERE} trust",
    f"hostnossl postgres app {HERE} reject",
    "host postgres all 127.0.0.1 255.0.0.0 scram-sha-256",
    f"host replication app {HERE} reject",
    "local all postgres peer map=owner",
    "local sameuser all scram-sha-256",
    "local app all reject",
    "local shop all peer",
]
ASKED = [
    ("app", "app", {}),
    ("ghost", "app", {}),
    ("nobody", "app", {}),
    ("ghost", "ghost", {}),
    ("app", "all", {}),
    ("app", "shopping", {}),
    ("app", "reports", {}),
    ("ghost", "reports", {}),
    ("app", "two words", {}),
    ("app", "postgres", {}),
    ("ghost", "postgres", {}),
    ("app", "nowhere", {}),
    ("app", "shop", {}),
    ("app", "app", {"replication": "true"}),
    ("ghost", "app", {"replication": "true"}),
    ("ghost", "app", {"replication": "database"}),
]


@wire
async def test_A12_the_same_rules_make_the_same_decisions_in_the_same_words_as_postgresql(ruled):
    files = {"rules.conf": "\n".join(DIFFERENTIAL).encode()}
    with embedded.Postgres(18, settings={"hba_file": "data/rules.conf"}, files=files) as server:
        proxy = ruled(
            *DIFFERENTIAL, maps=f'owner "{OURSELVES}" postgres', tls_cert=None, tls_key=None, tls_ca=None
        )
        ways = {
            "host": (Address(server.host, server.port), proxy.address),
            "local": (Address(str(server.socket_dir), server.port), unix(proxy)),
        }
        for way, (direct, through) in ways.items():
            for user, database, params in ASKED:
                wanted = await attempt(direct, user, database, "wrong", params)
                assert await attempt(through, user, database, "wrong", params) == wanted, (way, user, database)
        assert (await attempt(proxy.address, "app", "app", proxy.password))[1] == {}


WITH_CERTIFICATES = [
    "hostssl cert all all cert",
    "hostssl mapped all all cert map=staff",
    "hostssl dn all all cert clientname=DN map=names",
    "hostssl ca all all scram-sha-256 clientcert=verify-ca",
    "hostssl full all all scram-sha-256 clientcert=verify-full",
    "hostssl trust all all trust clientcert=verify-full",
    "hostssl app all all reject",
    "hostnossl all all all reject",
]
STAFF = ["staff nemo app", r"staff /^n(.)mo$ gh\1st", "names CN=nemo app", r"names /^CN=(.*)$ \1"]


@wire
async def test_A14_the_same_rules_for_certificates_make_the_same_decisions_as_postgresql(ruled, certificates):
    try:
        server = DebianPostgres(
            hba=WITH_CERTIFICATES, settings={"ident_file": "data/maps.conf"}, files={"maps.conf": ident_of_owner()}
        )
        server.start()
    except EmbeddedError as missing:
        pytest.skip(str(missing))
    try:
        authority = {"tls_ca": str(server.tls.ca)}
        proxy = ruled(*WITH_CERTIFICATES, maps="\n".join(STAFF), **authority)
        direct = Address(server.host, server.port)
        for database in ("cert", "mapped", "dn", "ca", "full", "trust", "app"):
            for user in ("app", "ghost"):
                for name in ("app", "nemo", ""):
                    context = certificates(name, server.tls)
                    said = [
                        await attempt(address, user, database, "wrong", tls="postgres", context=context)
                        for address in (direct, proxy.address)
                    ]
                    # PostgreSQL says AuthenticationOk (0) before it looks for the role and the database.
                    said = [([code for code in codes if code], fields) for codes, fields in said]
                    assert said[1] == said[0], (database, user, name)
    finally:
        server.close()


def ident_of_owner() -> bytes:
    return "\n".join([f'owner "{name}" postgres' for name in {OURSELVES, "postgres", "nobody"}] + STAFF).encode()


# -- A12: strangers -----------------------------------------------------------------------------------------------

STRANGE = {
    "scram-sha-256": "hostssl all all all scram-sha-256",
    "md5": "hostssl all all all md5",
    "password": "hostssl all all all password",
    "reject": "hostssl all all all reject",
    "cert": "hostssl all all all cert",
    "cert by map": "hostssl all all all cert map=staff",
    "cert and password": "hostssl all all all scram-sha-256 clientcert=verify-full",
    "nothing": "hostnossl all all all trust",
}


@pytest.mark.parametrize("rule", STRANGE.values(), ids=STRANGE)
@wire
async def test_A12_users_and_databases_that_do_not_exist_look_like_those_that_do(ruled, certificates, rule):
    proxy = ruled(rule, maps="staff nobody app\nstaff nobody ghost")
    context = certificates("nemo" if "cert" in rule else "")
    known = await attempt(proxy.address, proxy.user, proxy.database, "wrong", tls="postgres", context=context)
    assert known[1]["C"] in ("28000", "28P01")
    for user, database in (("ghost", proxy.database), (proxy.user, "nowhere"), ("ghost", "nowhere")):
        codes, fields = await attempt(proxy.address, user, database, "wrong", tls="postgres", context=context)
        fields["M"] = fields["M"].replace('"ghost"', f'"{proxy.user}"').replace('"nowhere"', f'"{proxy.database}"')
        assert (codes, fields) == known


@wire
async def test_A12_with_md5_a_stranger_is_asked_by_scram_where_all_are_who_exist(ruled, pg18):
    verifier = Verifier.of_password("secret", bytes(16)).format()
    users = {pg18.user: {"password": verifier, "server_password": pg18.password}}
    proxy = ruled("host all all all md5", users=users)
    for user in (proxy.user, "ghost"):
        assert await attempt(proxy.address, user, proxy.database, "wrong") == (
            [10, 11],
            {"V": "FATAL", "C": "28P01", "M": f'password authentication failed for user "{user}"'},
        )


@wire
async def test_A12_a_database_that_does_not_exist_is_named_to_who_has_come_in_only(ruled):
    proxy = ruled("host all all all scram-sha-256")
    assert (await attempt(proxy.address, proxy.user, "nowhere", "wrong"))[1]["C"] == "28P01"
    assert (await attempt(proxy.address, proxy.user, "nowhere", proxy.password))[1]["C"] == "3D000"


@wire
async def test_A12_trust_is_for_users_who_exist(ruled):
    proxy = ruled("local all all trust")
    async with await RawClient.connect(unix(proxy)) as client:
        await client.startup(proxy.user, proxy.database)
        assert value(await client.query("SELECT current_user")) == proxy.user
    _, fields = await attempt(unix(proxy), "ghost", proxy.database, "")
    assert (fields["C"], fields["M"]) == ("28000", 'role "ghost" does not exist')


@wire
async def test_A12_the_kind_of_connection_decides(ruled):
    proxy = ruled("hostssl all all all scram-sha-256", "hostnossl all all all reject", "local all all md5")
    assert (await attempt(proxy.address, proxy.user, proxy.database, proxy.password, tls="postgres"))[1] == {}
    plain = await attempt(proxy.address, proxy.user, proxy.database, proxy.password)
    assert plain[1]["M"] == (
        f'pg_hba.conf rejects connection for host "127.0.0.1", user "{proxy.user}", '
        f'database "{proxy.database}", no encryption'
    )
    assert (await attempt(unix(proxy), proxy.user, proxy.database, proxy.password))[0] == [5, 0]


@wire
async def test_A12_rules_decide_and_not_the_option_auth(ruled, pg18):
    users = {pg18.user: {"password": pg18.password, "auth": "trust"}}
    proxy = ruled("host all all all md5", users=users)
    assert await attempt(proxy.address, proxy.user, proxy.database, proxy.password) == ([5, 0], {})


@wire
async def test_A12_behind_a_load_balancer_rules_are_for_the_client_behind_it(ruled):
    """Also through a Unix socket: `local`, peer and passwords in the clear are for who is at its other end."""
    proxy = ruled(
        "local all all trust",
        "host all app 192.0.2.0/24 scram-sha-256",
        "host all all 198.51.100.0/24 password",
        proxy_protocol_from=["unix"],
    )
    said = {}
    for host in ("192.0.2.9", "198.51.100.9", "203.0.113.9"):
        async with await RawClient.connect(unix(proxy)) as client:
            client.feed(f"PROXY TCP4 {host} 192.0.2.1 4000 5432\r\n".encode())
            client.feed(messages.startup([("user", proxy.user), ("database", proxy.database)]))
            message = await client.receive()
            said[host] = message.body[3] if message.kind == "R" else message.fields["M"]
    assert said == {
        "192.0.2.9": 10,
        "198.51.100.9": "cenote: a password in clear text is accepted over TLS or a Unix socket only",
        "203.0.113.9": 'no pg_hba.conf entry for host "203.0.113.9", user "app", database "app", no encryption',
    }


# -- A13 ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["scram-sha-256", "md5", "password"])
@wire
async def test_A13_passwords_are_checked_by_the_method_of_the_rule(ruled, method):
    proxy = ruled(f"hostssl all all all {method}", f"local all all {method}")
    for address, tls in ((proxy.address, "postgres"), (unix(proxy), None)):
        for password, sqlstate in ((proxy.password, None), ("wrong", "28P01"), ("", "28P01")):
            _, fields = await attempt(address, proxy.user, proxy.database, password, tls=tls)
            assert fields.get("C") == sqlstate


@wire
async def test_A13_a_password_in_the_clear_is_not_even_asked_for_without_tls(ruled):
    proxy = ruled("host all all all password")
    codes, fields = await attempt(proxy.address, proxy.user, proxy.database, proxy.password)
    assert (codes, fields["C"]) == ([], "28000")


# -- A14: channel binding -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("negotiation", ["postgres", "direct"])
@pytest.mark.parametrize("binding", ["require", "prefer", "disable"])
@wire
async def test_A14_libpq_binds_its_log_in_to_our_certificate(ruled, tls_files, binding, negotiation):
    proxy = ruled("hostssl all all all scram-sha-256")
    found = await asyncio.to_thread(
        libpq,
        proxy,
        channel_binding=binding,
        sslmode="verify-full",
        sslrootcert=str(tls_files.ca),
        sslnegotiation=negotiation,
        host="localhost",
        hostaddr="127.0.0.1",
    )
    assert found == proxy.user


@wire
async def test_A14_libpq_refuses_us_where_we_cannot_bind_and_it_must(ruled):
    proxy = ruled("host all all all scram-sha-256")
    said = await asyncio.to_thread(libpq, proxy, channel_binding="require", sslmode="disable")
    assert "channel binding" in said


@wire
async def test_A14_with_rules_a_wrong_password_over_tls_is_refused_bound_or_not(ruled):
    proxy = ruled("hostssl all all all scram-sha-256")
    for binding in ("require", "disable"):
        said = await asyncio.to_thread(libpq, proxy, channel_binding=binding, sslmode="require", password="wrong")
        assert "password authentication failed" in said


@wire
async def test_A14_asyncpg_which_does_not_bind_logs_in_over_tls(ruled):
    proxy = ruled("hostssl all all all scram-sha-256")
    conn = await asyncpg.connect(proxy.dsn, ssl=unchecked_context())
    assert await conn.fetchval("SELECT current_user") == proxy.user
    await conn.close()


# -- A14: certificates --------------------------------------------------------------------------------------------


@wire
async def test_A14_a_certificate_is_enough_where_the_rule_says_so(ruled, tls_files):
    proxy = ruled("hostssl all all all cert")
    own = {"sslcert": str(tls_files.client_certificate), "sslkey": str(tls_files.client_key)}
    tls_files.client_key.chmod(0o600)
    assert await asyncio.to_thread(libpq, proxy, sslmode="require", password=None, **own) == proxy.user
    said = await asyncio.to_thread(libpq, proxy, sslmode="require")
    assert "connection requires a valid client certificate" in said
    assert 'certificate authentication failed for user "ghost"' in await asyncio.to_thread(
        libpq, proxy, sslmode="require", user="ghost", **own
    )


@wire
async def test_A14_a_certificate_of_somebody_elses_authority_ends_the_handshake(
    ruled, tmp_path_factory, tls_files
):
    proxy = ruled("hostssl all all all trust")
    strangers = make_tls_files(tmp_path_factory.mktemp("strangers"))
    context = unchecked_context()
    context.load_cert_chain(strangers.client_certificate, strangers.client_key)
    with pytest.raises((WireFailure, OSError)):
        await proxy.client(tls="postgres", context=context)


@pytest.mark.parametrize(
    ("rule", "maps", "user"),
    [
        ("cert map=staff", "staff app app", "app"),
        ("cert map=staff", "staff app postgres", "postgres"),
        ("cert map=staff", "staff app all", "postgres"),
        ("cert map=staff", r"staff /^(.*)$ \1", "app"),
        ("cert clientname=DN map=staff", "staff CN=app app", "app"),
        ("cert clientname=DN map=staff", r"staff /^CN=(\w+)$ \1", "app"),
        ("cert map=staff", "staff nobody app", None),
        ("cert clientname=DN", "", None),
        ("trust clientcert=verify-full", "", "app"),
        ("trust clientcert=verify-ca", "", "postgres"),
    ],
)
@wire
async def test_A14_names_in_certificates_are_users_as_rules_and_maps_say(
    ruled, certificates, pg18, rule, maps, user
):
    proxy = ruled(f"hostssl all all all {rule}", maps=maps, users={"postgres": {"password": pg18.password}})
    context = certificates("app")
    for name in ("app", "postgres"):
        _, fields = await attempt(proxy.address, name, proxy.database, "", tls="postgres", context=context)
        allowed = name == user or (user == "postgres" and "verify-ca" in rule) or maps.endswith(" all")
        assert fields.get("C") == (None if allowed else "28000"), fields


@pytest.mark.parametrize(
    ("option", "name", "password", "message"),
    [
        ("clientcert=verify-ca", "app", "right", None),
        ("clientcert=verify-ca", "app", "wrong", 'password authentication failed for user "app"'),
        ("clientcert=verify-ca", "", "right", "connection requires a valid client certificate"),
        ("clientcert=verify-full", "app", "right", None),
        ("clientcert=verify-full", "app", "wrong", 'password authentication failed for user "app"'),
        ("clientcert=verify-full", "", "right", "connection requires a valid client certificate"),
    ],
)
@wire
async def test_A14_a_certificate_may_be_asked_for_beside_a_password(
    ruled, certificates, option, name, password, message
):
    proxy = ruled(f"hostssl all all all scram-sha-256 {option}")
    given = proxy.password if password == "right" else password
    _, fields = await attempt(
        proxy.address, proxy.user, proxy.database, given, tls="postgres", context=certificates(name)
    )
    assert fields.get("M") == message


@wire
async def test_A14_a_password_does_not_make_up_for_somebody_elses_certificate(ruled, certificates, pg18):
    proxy = ruled(
        "hostssl all all all scram-sha-256 clientcert=verify-full", users={"postgres": {"password": pg18.password}}
    )
    _, fields = await attempt(
        proxy.address, "postgres", proxy.database, pg18.password, tls="postgres", context=certificates("app")
    )
    assert (fields["C"], fields["M"]) == ("28P01", 'password authentication failed for user "postgres"')


@wire
async def test_A14_a_session_that_is_taken_up_again_keeps_its_certificate(ruled, tls_files):
    proxy = ruled("hostssl all all all cert")
    context = unchecked_context()
    context.load_cert_chain(tls_files.client_certificate, tls_files.client_key)
    for version in (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3):
        context.minimum_version = context.maximum_version = version
        session = None
        for resumed in (False, True):
            session, reused, answer = await asyncio.to_thread(tls_startup, proxy, context, session)
            assert reused is resumed
            assert answer[:1] == b"R", answer


def tls_startup(proxy: RunningProxy, context: ssl.SSLContext, session: Any) -> tuple[Any, bool, bytes]:
    with socket.create_connection(proxy.address, 10) as sock:
        sock.sendall(messages.request(messages.SSL_REQUEST))
        assert sock.recv(1) == b"S"
        with context.wrap_socket(sock, server_hostname="localhost", session=session) as tls:
            tls.sendall(messages.startup([("user", proxy.user), ("database", proxy.database)]))
            answer = tls.recv(4096)
            tls.sendall(messages.TERMINATE)
            return tls.session, bool(tls.session_reused), answer


@pytest.mark.parametrize(
    ("name", "called", "label"),
    [("app", "shop.example", "app"), ("", "shop.example", "shop.example"), ("", None, "")],
)
@wire
async def test_A14_a_client_has_a_label_from_its_certificate_or_from_how_it_calls_us(
    ruled, certificates, name, called, label
):
    proxy = ruled("hostssl all all all trust")
    client = await RawClient.connect(proxy.address)
    assert await client.request(messages.SSL_REQUEST) == b"S"
    await client.writer.start_tls(certificates(name), server_hostname=called)
    await client.startup(proxy.user, proxy.database)
    (login,) = proxy.call(lambda: [session.login for session in proxy.daemon.clients.values()])
    assert (login.label, login.method) == (label, "trust")
    await client.terminate()


# -- peer ---------------------------------------------------------------------------------------------------------


@wire
async def test_A12_peer_lets_the_account_in_that_the_map_names(ruled):
    proxy = ruled("local all all peer map=owner", maps=f'owner "{OURSELVES}" app')
    found = await asyncio.to_thread(libpq, proxy, host=unix(proxy).host, password=None)
    assert found == proxy.user
    _, fields = await attempt(unix(proxy), "postgres", proxy.database, "")
    assert (fields["C"], fields["M"]) == ("28000", 'Peer authentication failed for user "postgres"')


@wire
async def test_A12_peer_without_a_map_needs_the_same_name(ruled):
    proxy = ruled("local all all peer", users={OURSELVES: {}})
    assert 'Peer authentication failed for user "app"' in await asyncio.to_thread(
        libpq, proxy, host=unix(proxy).host
    )
    _, fields = await attempt(unix(proxy), OURSELVES, "nowhere", "")
    assert fields["C"] == "3D000", "it is in, as it is who it says"


# -- A9 -----------------------------------------------------------------------------------------------------------


@wire
async def test_A9_replication_has_rules_of_its_own(ruled, pg18):
    proxy = ruled(
        "host replication postgres all scram-sha-256",
        "host all app all scram-sha-256",
        users={"postgres": {"password": pg18.password}},
    )
    physical = {"replication": "true"}
    async with await proxy.client(user="postgres", params=physical) as client:
        assert kinds(await client.query("IDENTIFY_SYSTEM")) == "TDCZ"
        await client.terminate()
    _, fields = await attempt(proxy.address, "app", proxy.database, proxy.password, physical)
    assert fields["M"] == (
        'no pg_hba.conf entry for replication connection from host "127.0.0.1", user "app", no encryption'
    )
    _, fields = await attempt(proxy.address, "postgres", proxy.database, pg18.password)
    assert fields["C"] == "28000"


# -- injected bytes -----------------------------------------------------------------------------------------------

EVIL = "SELECT 'injected' FROM pg_sleep(0)"


@pytest.mark.parametrize("rule", ["hostssl all all all cert", "hostssl all all all trust"])
@wire
async def test_CVE_2021_3935_bytes_behind_an_ssl_request_are_never_the_clients(ruled, certificates, rule, admin):
    proxy = ruled(rule)
    startup = messages.startup([("user", proxy.user), ("database", proxy.database)])
    for injected in (startup + messages.query(EVIL), messages.query(EVIL), b"\0", startup):
        async with await RawClient.connect(proxy.address) as client:
            client.feed(messages.request(messages.SSL_REQUEST) + injected)
            assert await client.rest() in (b"", b"S"), "and nothing was asked of a server"
    assert not admin.rows("SELECT 1 FROM pg_stat_activity WHERE query = %s", (EVIL,))


@pytest.mark.parametrize("rule", ["hostssl all all all cert", "hostssl all all all trust"])
@wire
async def test_CVE_2021_3935_bytes_between_the_answer_and_the_handshake_are_never_the_clients(
    ruled, certificates, rule
):
    """The man in the middle lets the SSLRequest pass, and adds his bytes before the client's first of TLS."""
    proxy = ruled(rule)
    startup = messages.startup([("user", proxy.user), ("database", proxy.database)])
    for injected in (startup + messages.query(EVIL), messages.query(EVIL), startup):
        async with await RawClient.connect(proxy.address) as client:
            assert await client.request(messages.SSL_REQUEST) == b"S"
            await client.send(injected)
            with pytest.raises((OSError, ssl.SSLError)):
                await client.writer.start_tls(certificates("app"), server_hostname="localhost")


@wire
async def test_CVE_2021_3935_what_the_client_itself_sends_ahead_inside_tls_is_its_own(ruled, certificates):
    proxy = ruled("hostssl all all all cert")
    async with await RawClient.connect(proxy.address, tls="postgres", context=certificates("app")) as client:
        startup = messages.startup([("user", proxy.user), ("database", proxy.database)])
        await client.send(startup + messages.query("SELECT 1") + messages.query("SELECT 2"))
        assert rows(await client.trace(3)) == [("1",), ("2",)]


@wire
async def test_CVE_2021_3935_bytes_behind_a_refused_request_end_the_connection(ruled):
    proxy = ruled("hostnossl all all all trust", "local all all trust")
    startup = messages.startup([("user", proxy.user), ("database", proxy.database)])
    for address, code in ((proxy.address, messages.GSSENC_REQUEST), (unix(proxy), messages.SSL_REQUEST)):
        async with await RawClient.connect(address) as client:
            client.feed(messages.request(code) + startup + messages.query(EVIL))
            answer = await client.rest()
            assert answer[:2] == b"NE"
            assert b"received unencrypted data" in answer


# -- any bytes ----------------------------------------------------------------------------------------------------


def packets(proxy: RunningProxy) -> list[bytes]:
    """What log-ins begin with."""
    startup = messages.startup([("user", proxy.user), ("database", proxy.database)])
    first = b"n,,n=,r=abcdef"
    scram = messages.password(b"SCRAM-SHA-256\0" + struct.pack("!I", len(first)) + first)
    return [
        startup + scram + messages.password(b"c=biws,r=abcdef,p=" + b"A" * 43 + b"="),
        startup + messages.password(b"md5" + b"0" * 32 + b"\0") + messages.query("SELECT 1"),
        messages.request(messages.GSSENC_REQUEST) + startup,
        messages.request(messages.SSL_REQUEST),
        messages.cancel_request(7, bytes(32)),
        messages.startup([("user", "x" * 70), ("replication", "true"), ("options", "-c a=b")], 3 << 16 | 9999),
        b"\x16\x03\x01\x00\xf4" + bytes(244),
    ]


@pytest.mark.parametrize("rule", ["scram-sha-256", "md5", "password", "trust", "reject", "peer"])
@wire
async def test_A8_no_bytes_before_the_log_in_cost_much_time_or_memory(ruled, rule):
    proxy = ruled(f"local all app {rule}", "local all all scram-sha-256")
    chance = random.Random(rule)
    whole = packets(proxy)
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begun = time.process_time()
    for _ in range(400):
        async with await RawClient.connect(unix(proxy)) as client:
            sent = mutated(chance.choice(whole), chance) + chance.randbytes(chance.choice((0, 9, 3000)))
            client.feed(sent[:9])
            client.feed(sent[9:])
            client.writer.write_eof()
            await client.rest()
    wait_until(lambda: proxy.clients() == 0, what="nobody is left")
    assert time.process_time() - begun < 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - used < 40_000, "KiB"
    proxy.no_problems()


@wire
async def test_A8_a_client_that_sends_on_and_on_before_its_log_in_is_not_read_further(ruled):
    proxy = ruled("host all all all scram-sha-256")
    async with await RawClient.connect(proxy.address) as client:
        client.feed(messages.startup([("user", proxy.user), ("database", proxy.database)]))
        assert asked([await client.receive()]) == [10]
        client.feed(b"p" + struct.pack("!I", 65_535 + 4) + b"x" * 65_000)  # the end is missing
        (visitor,) = proxy.call(lambda: list(proxy.daemon.arriving))
        wait_until(lambda: proxy.call(visitor.inbox.buffered) > 65_000)
        client.feed(b"y" * 8_000_000)
        error_fields = error(await client.closed())
        assert error_fields["C"] == "08P01"


# -- what is known of users ---------------------------------------------------------------------------------------


class Records:
    """Secrets that say what they are told to, and remember what they hear."""

    def __init__(self, **known: Any) -> None:
        self.known = known
        self.heard: list[Any] = []

    async def find(self, database: str, user: str) -> Any:
        return self.known.get(user)

    def proven(self, database: str, user: str, verifier: Verifier, client_key: bytes) -> None:
        self.heard.append((database, user, verifier, client_key))

    def doubt(self, database: str, user: str) -> None:
        pass

    def strangers_by_scram(self) -> bool:
        return True


def secret(text: str | None, allowed: bool = True, reason: str = "") -> Any:
    return SimpleNamespace(text=text, allowed=allowed, reason=reason)


VERIFIER = Verifier.of_password("secret", bytes(16))


def door(records: Records, rules: str, **more: Any) -> Door:
    made = Door({}, **more)
    made.gate = replace(made.gate, rules=parse_rules(rules, "hba"), maps=parse_maps("", ""), secrets=records)
    return made


@pytest.mark.parametrize("method", ["scram-sha-256", "md5", "password"])
def test_A15_a_log_in_by_a_verifier_is_handed_on(method, tmp_path):
    @on_both_loops
    async def body():
        records = Records(ann=secret(VERIFIER.format()))
        async with door(records, f"local all all {method}", unix_dir=tmp_path) as here:
            assert (await attempt(here.address, "ann", "db", "secret"))[1] == {}
            ((database, user, verifier, client_key),) = records.heard
            assert (database, user, verifier) == ("db", "ann", VERIFIER)
            assert (
                Verifier.of_keys(SimpleNamespace(client=client_key, server=VERIFIER.server_key), bytes(16))
                == VERIFIER
            )
            login = await here.outcome()
            assert isinstance(login, Login)
            assert login.method == method
            assert (await attempt(here.address, "ann", "db", "wrong"))[1]["C"] == "28P01"
            assert len(records.heard) == 1

    body()


@pytest.mark.parametrize("method", ["scram-sha-256", "md5", "password"])
def test_A15_a_password_that_has_expired_is_wrong(method, tmp_path):
    @on_both_loops
    async def body():
        known = Records(ann=secret(VERIFIER.format(), False, "expired"), bob=secret(VERIFIER.format()))
        async with door(known, f"local all all {method}", unix_dir=tmp_path) as here:
            right = await attempt(here.address, "ann", "db", "secret")
            assert right[1]["M"] == 'password authentication failed for user "ann"'
            assert right[1]["C"] == "28P01"
            stranger = await attempt(here.address, "eve", "db", "secret")
            assert stranger[0] == right[0] == (await attempt(here.address, "bob", "db", "wrong"))[0]

    body()


@pytest.mark.parametrize("method", ["scram-sha-256", "trust"])
def test_A15_who_may_not_log_in_hears_so_when_it_has_proven_who_it_is(method, tmp_path):
    @on_both_loops
    async def body():
        known = Records(ann=secret(VERIFIER.format(), False, "nologin"))
        async with door(known, f"local all all {method}", unix_dir=tmp_path) as here:
            _, fields = await attempt(here.address, "ann", "db", "secret")
            assert (fields["C"], fields["M"]) == ("28000", 'role "ann" is not permitted to log in')
            if method != "trust":
                assert (await attempt(here.address, "ann", "db", "wrong"))[1]["C"] == "28P01"

    body()


def test_A15_trust_does_not_ask_for_how_long_a_password_is_valid(tmp_path):
    @on_both_loops
    async def body():
        known = Records(ann=secret(None, False, "expired"))
        async with door(known, "local all all trust", unix_dir=tmp_path) as here:
            assert (await attempt(here.address, "ann", "db", ""))[1] == {}

    body()


def test_F25_a_log_in_waits_for_its_turn_and_a_cancel_does_not(tmp_path):
    @on_both_loops
    async def body():
        turns = []

        class Admission:
            async def turn(self) -> None:
                turns.append(await asyncio.sleep(0))

        async with door(Records(ann=secret(None)), "local all all trust", unix_dir=tmp_path) as here:
            here.gate = replace(here.gate, admission=Admission())
            async with await RawClient.connect(here.address) as client:
                client.feed(messages.cancel_request(3, b"abcd"))
                assert await client.rest() == b""
            assert turns == []
            assert (await attempt(here.address, "ann", "db", ""))[1] == {}
            assert len(turns) == 1

    body()
