"""Group A, connection start: who the client is, what it is told, and which connections are no sessions."""

import asyncio
import base64
import hashlib
import struct

import pytest
from proxy_kit import RunningProxy, running, until, wire

from cenote.testing.postgres import backends, wait_until
from cenote.testing.wire import (
    Address,
    LoginRefused,
    RawClient,
    Scram,
    certificate_hash,
    error,
    kinds,
    login_trace,
    normalised,
    rows,
    send_cancel,
    value,
)
from cenote.wire import messages

AUTHS = ("scram-sha-256", "md5", "password", "trust")


async def refused(proxy: RunningProxy, user: str, database: str, password: str, **connect: object) -> LoginRefused:
    """The refusal of a log-in, with what was said before."""
    async with await RawClient.connect(proxy.address, **connect) as client:
        with pytest.raises(LoginRefused) as caught:
            await client.startup(user, database, password)
        assert await client.closed() == []
        return caught.value


def asked(trace: list) -> list[int]:
    """The codes of the Authentication messages."""
    return [int.from_bytes(message.body[:4], "big") for message in trace if message.kind == "R"]


# -- A9: replication ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("replication", ["true", "database"])
@wire
async def test_A9_a_replication_connection_is_a_tunnel_of_its_own(proxy_for, pg18, replication):
    superuser = {"postgres": {"password": pg18.password}}
    proxy = proxy_for(pg18, max_size=1, users=superuser)
    before = backends(pg18.superuser_dsn, user="postgres")
    async with await proxy.client(user="postgres", params={"replication": replication}) as client:
        answer = await client.query("IDENTIFY_SYSTEM")
        assert kinds(answer) == "TDCZ"
        assert rows(answer)[0][3] == (proxy.database if replication == "database" else None)
        assert proxy.counts()["leased"] == 0, "it is not a lease"
        async with await proxy.client() as other:
            assert value(await other.query("SELECT 1")) == "1"
        assert kinds(await client.query("IDENTIFY_SYSTEM")) == "TDCZ"
        await client.terminate()
    wait_until(lambda: len(walsenders(pg18)) == 0, what="its server connection ends with it")
    others = len(before) + 1
    wait_until(lambda: len(backends(pg18.superuser_dsn, user="postgres")) <= others, what="no other is left")


def walsenders(pg) -> list[str]:
    found = pg.psql("SELECT pid FROM pg_stat_activity WHERE backend_type = 'walsender'", database="postgres")
    return [line for line in found.split() if line.isdigit()]


@wire
async def test_A9_a_replication_connection_can_be_cancelled(proxy_for, pg18, admin):
    proxy = proxy_for(pg18, users={"postgres": {"password": pg18.password}})
    sleep = "SELECT pg_sleep(60)"
    async with await proxy.client(user="postgres", params={"replication": "database"}) as client:
        await client.send(messages.query(sleep))
        await running(admin, sleep)
        assert await send_cancel(proxy.address, client.key) == b""
        assert error(await client.until_ready())["C"] == "57014"


@pytest.mark.parametrize("end", ["terminate", "close", "reset"])
@wire
async def test_A9_both_ends_of_a_replication_connection_end_together(proxy_for, pg18, end):
    proxy = proxy_for(pg18, users={"postgres": {"password": pg18.password}})
    async with await proxy.client(user="postgres", params={"replication": "true"}) as client:
        await getattr(client, end)()
    await until(lambda: not walsenders(pg18))
    async with await proxy.client(user="postgres", params={"replication": "true"}) as client:
        pg18.psql(f"SELECT pg_terminate_backend({walsenders(pg18)[0]})", database="postgres")
        assert error(await client.closed())["C"] == "57P01"
    async with await proxy.client(user="postgres", params={"replication": "true"}) as client:
        await asyncio.to_thread(proxy.stop)
        await client.closed()
    await until(lambda: not walsenders(pg18))


@wire
async def test_A9_a_replication_connection_that_the_server_refuses_is_refused_in_its_words(proxy):
    """The role of the tests may not replicate."""
    errors = []
    for address in (Address(proxy.server.host, proxy.server.port), proxy.address):
        async with await RawClient.connect(address) as client:
            with pytest.raises(LoginRefused) as caught:
                await client.startup(proxy.user, proxy.database, proxy.password, {"replication": "true"})
            errors.append({name: caught.value.fields.get(name) for name in "VCMD"})
    assert errors[1] == errors[0]


# -- A12, A13, A14: authentication ----------------------------------------------------------------------------


@pytest.mark.parametrize("auth", AUTHS)
@wire
async def test_A12_every_way_to_log_in(proxy_for, pg18, tls_listen, auth):
    proxy = proxy_for(pg18, listen=tls_listen, top={"auth": auth})
    tls = "postgres" if auth == "password" else None
    async with await RawClient.connect(proxy.address, tls=tls) as client:
        trace = await client.startup(proxy.user, proxy.database, proxy.password)
        codes = {"scram-sha-256": [10, 11, 12, 0], "md5": [5, 0], "password": [3, 0], "trust": [0]}
        assert asked(trace) == codes[auth]
        assert value(await client.query("SELECT current_user")) == proxy.user


@wire
async def test_A12_the_wrong_password_is_refused_as_postgresql_does(proxy):
    errors = []
    for address in (Address(proxy.server.host, proxy.server.port), proxy.address):
        async with await RawClient.connect(address) as client:
            fields = await client.refusal(proxy.user, proxy.database, "wrong")
            errors.append({name: fields.get(name) for name in "VCM"})
    assert errors[1] == errors[0]


@pytest.mark.parametrize("auth", ["scram-sha-256", "md5", "password"])
@wire
async def test_A12_an_unknown_user_sees_what_a_wrong_password_sees(proxy_for, pg18, tls_listen, auth):
    proxy = proxy_for(pg18, listen=tls_listen, top={"auth": auth})
    tls = "postgres" if auth == "password" else None
    known = await refused(proxy, proxy.user, proxy.database, "wrong", tls=tls)
    unknown = await refused(proxy, "ghost", proxy.database, "wrong", tls=tls)
    nowhere = await refused(proxy, "ghost", "nowhere", "wrong", tls=tls)
    assert known.fields["C"] == "28P01"
    for other in (unknown, nowhere):
        assert asked(other.before) == asked(known.before)
        assert other.fields["C"] == known.fields["C"]
        assert other.fields["M"] == known.fields["M"].replace(proxy.user, "ghost")
        assert other.fields.keys() == known.fields.keys()


@wire
async def test_A12_an_unknown_user_has_the_same_salt_each_time(proxy):
    """A salt that changes would tell that there is no such user."""
    challenges = []
    for user in ("ghost", "ghost", "other", proxy.user, proxy.user):
        known = await refused(proxy, user, proxy.database, "wrong")
        first = next(message for message in known.before if message.body[:4] == struct.pack("!I", 11))
        parts = dict(part.split("=", 1) for part in first.body[4:].decode().split(","))
        challenges.append((parts["s"], parts["i"]))
    assert challenges[0] == challenges[1] != challenges[2]
    assert challenges[3] == challenges[4]
    assert len({iterations for _, iterations in challenges}) == 1
    assert len({len(base64.b64decode(salt)) for salt, _ in challenges}) == 1


@wire
async def test_A12_who_has_not_proven_who_he_is_hears_nothing_of_databases(proxy):
    assert (await refused(proxy, proxy.user, "nowhere", "wrong")).fields["C"] == "28P01"
    proven = await refused(proxy, proxy.user, "nowhere", proxy.password)
    assert proven.fields["C"] == "3D000"
    assert proven.fields["M"] == 'database "nowhere" does not exist'


@pytest.mark.parametrize("auth", ["scram-sha-256", "md5", "password"])
@wire
async def test_A13_an_empty_password_is_refused(proxy_for, pg18, tls_listen, auth):
    """Also where the configured one is empty by mistake: it lets nobody in."""
    proxy = proxy_for(pg18, listen=tls_listen, top={"auth": auth})
    tls = "postgres" if auth == "password" else None
    assert (await refused(proxy, proxy.user, proxy.database, "", tls=tls)).fields["C"] == "28P01"


@wire
async def test_A13_a_long_password_is_taken_and_an_endless_one_is_not(proxy_for, pg18, tls_listen):
    long = "p" * 60_000
    proxy = proxy_for(
        pg18,
        listen=tls_listen,
        top={"auth": "password"},
        users={pg18.user: {"password": long, "server_password": pg18.password}},
    )
    async with await proxy.client(password=long, tls="postgres") as client:
        assert value(await client.query("SELECT 1")) == "1"
    async with await RawClient.connect(proxy.address, tls="postgres") as client:
        await client.send(messages.startup([("user", proxy.user)]))
        assert asked([await client.receive()]) == [3]
        client.feed(b"p" + struct.pack("!I", 1 << 30) + b"x" * 100_000)
        assert "Z" not in kinds(await client.closed())


@wire
async def test_A13_passwords_in_the_clear_are_for_tls_and_unix_sockets_only(proxy_for, pg18, tls_listen, tmp_path):
    tmp_path.chmod(0o755)
    proxy = proxy_for(pg18, listen=tls_listen | {"unix_dir": str(tmp_path)}, top={"auth": "password"})
    async with await RawClient.connect(Address(str(tmp_path), proxy.port)) as client:
        await client.startup(proxy.user, proxy.database, proxy.password)
        assert value(await client.query("SELECT 1")) == "1"
    plain = await refused(proxy, proxy.user, proxy.database, proxy.password)
    assert asked(plain.before) == [], "it does not even ask"


@pytest.mark.parametrize("what", ["proof", "nonce"])
@wire
async def test_A14_a_wrong_proof_or_nonce_is_refused(proxy, what):
    async with await RawClient.connect(proxy.address) as client:
        scram = Scram(proxy.password)
        final = scram.final
        spoiled = {"proof": bytes(32)} if what == "proof" else {"nonce": "not-the-one-that-was-agreed-on"}
        scram.final = lambda said: final(said, **spoiled)
        with pytest.raises(LoginRefused) as caught:
            await client.startup(proxy.user, proxy.database, proxy.password, scram=scram)
        assert caught.value.fields["C"] in ("28P01", "08P01")


ANSWERS = {
    "a query": messages.query("SELECT 1"),
    "a sync": messages.SYNC,
    "an unknown mechanism": messages.password(b"SCRAM-SHA-1\0" + bytes(4)),
    "no mechanism": messages.password(b""),
    "no data": messages.password(b"SCRAM-SHA-256\0\xff\xff\xff\xff") + messages.TERMINATE,
    "half a mechanism": messages.password(b"SCRAM-SHA"),
    "length that lies": messages.password(b"SCRAM-SHA-256\0\0\0\0\x63n,,n=,r=abc"),
    "no header": messages.password(b"SCRAM-SHA-256\0\0\0\0\x05r=abc"),
    "other user": messages.password(b"SCRAM-SHA-256\0\0\0\0\x0cn,a=x,n=,r=abc"),
    "goodbye": messages.TERMINATE,
}


@pytest.mark.parametrize("answer", ANSWERS.values(), ids=ANSWERS)
@wire
async def test_A14_what_is_no_answer_to_the_challenge_is_refused_as_postgresql_does(proxy, answer):
    said = []
    for address in (Address(proxy.server.host, proxy.server.port), proxy.address):
        async with await RawClient.connect(address) as client:
            await client.send(messages.startup([("user", proxy.user), ("database", proxy.database)]))
            assert asked([await client.receive()]) == [10]
            await client.send(answer)
            said.append(normalised(await client.closed(), texts=False))
    assert said[1] == said[0]


@wire
async def test_A14_what_a_client_sends_ahead_of_its_welcome_is_not_lost(proxy_for, pg18):
    proxy = proxy_for(pg18, top={"auth": "trust"})
    async with await RawClient.connect(proxy.address) as client:
        hello = messages.startup([("user", proxy.user), ("database", proxy.database)])
        await client.send(hello + messages.query("SELECT 1") + messages.query("SELECT 2"))
        assert rows(await client.trace(3)) == [("1",), ("2",)]


@pytest.mark.parametrize("header", ["n,,", "y,,"])
@wire
async def test_A14_without_tls_both_ways_to_do_without_channel_binding_are_fine(proxy, header):
    async with await RawClient.connect(proxy.address) as client:
        scram = Scram(proxy.password, header=header)
        await client.startup(proxy.user, proxy.database, proxy.password, scram=scram)


@wire
async def test_A14_channel_binding_where_it_was_not_offered_is_refused(proxy):
    async with await RawClient.connect(proxy.address) as client:
        scram = Scram(proxy.password, header="p=tls-server-end-point,,")
        with pytest.raises(LoginRefused):
            await client.startup(proxy.user, proxy.database, proxy.password, scram=scram)


@wire
async def test_A14_over_tls_channel_binding_is_offered_and_checked(proxy_for, pg18, tls_listen):
    proxy = proxy_for(pg18, listen=tls_listen)

    async def bound(binding: bytes) -> None:
        async with await RawClient.connect(proxy.address, tls="postgres") as client:
            certificate = client.writer.get_extra_info("ssl_object").getpeercert(True)
            scram = Scram(proxy.password, binding=binding or certificate_hash(certificate))
            trace = await client.startup(proxy.user, proxy.database, proxy.password, scram=scram)
            offered = messages.cstrings(trace[0].body[4:])
            assert offered[:2] == [b"SCRAM-SHA-256-PLUS", b"SCRAM-SHA-256"]

    await bound(b"")
    with pytest.raises(LoginRefused):
        await bound(bytes(32))


@wire
async def test_A14_a_client_that_was_told_there_is_no_channel_binding_was_lied_to(proxy_for, pg18, tls_listen):
    """Flag y: it could bind but believes we cannot, though we offered it: somebody sits between."""
    proxy = proxy_for(pg18, listen=tls_listen)
    async with await RawClient.connect(proxy.address, tls="postgres") as client:
        scram = Scram(proxy.password, header="y,,")
        with pytest.raises(LoginRefused) as caught:
            await client.startup(proxy.user, proxy.database, proxy.password, scram=scram)
        assert "channel binding" in caught.value.fields["M"]


@wire
async def test_A14_passwords_are_prepared_before_they_are_compared(proxy_for, pg18):
    """RFC 4013's own example: the soft hyphen counts for nothing, the Roman numeral is its letters."""
    users = {pg18.user: {"password": "I\u00adX\u2168", "server_password": pg18.password}}
    proxy = proxy_for(pg18, users=users)
    async with await proxy.client(password="IXIX") as client:
        assert value(await client.query("SELECT 1")) == "1"


@pytest.mark.parametrize("auth", ["scram-sha-256", "md5"])
@wire
async def test_A14_a_stored_verifier_is_enough_to_check_a_password(proxy_for, pg18, auth):
    pg18.psql("CREATE ROLE stored LOGIN PASSWORD 'secret'", database="postgres")
    try:
        found = pg18.psql("SELECT rolpassword FROM pg_authid WHERE rolname = 'stored'", database="postgres")
        scram = next(word for word in found.split() if word.startswith("SCRAM-SHA-256$"))
        md5 = "md5" + hashlib.md5(b"secretstored").hexdigest()
        verifier = scram if auth == "scram-sha-256" else md5
        users = {"stored": {"password": verifier, "server_password": "secret"}}
        proxy = proxy_for(pg18, users=users, top={"auth": auth})
        async with await proxy.client(user="stored", password="secret") as client:
            assert value(await client.query("SELECT current_user")) == "stored"
        assert (await refused(proxy, "stored", proxy.database, "wrong")).fields["C"] == "28P01"
        await proxy.finish()
    finally:
        pg18.psql("DROP ROLE stored", database="postgres")


# -- A17, A19: what the client is told ----------------------------------------------------------------------


@wire
async def test_A17_the_first_client_is_told_what_the_server_would_tell_it(proxy_for, pg):
    proxy = proxy_for(pg)
    for params in ({}, {"application_name": "shop", "DateStyle": "German", "TimeZone": "Europe/Zurich"}):
        for _ in range(2):
            traces = []
            for address in (Address(pg.host, pg.port), proxy.address):
                async with await RawClient.connect(address) as client:
                    traces.append(await client.startup(pg.user, pg.database, pg.password, params))
            assert login_trace(traces[1]) == login_trace(traces[0])


@wire
async def test_A19_keys_are_the_proxys_own_and_cannot_be_guessed(proxy):
    clients = [await proxy.client(version=messages.PROTOCOL_3_2) for _ in range(8)]
    clients += [await proxy.client() for _ in range(8)]
    pids, secrets = zip(*(client.key for client in clients), strict=True)
    assert len(set(pids)) == len(set(secrets)) == len(clients)
    assert all(0 < pid < 1 << 31 for pid in pids)
    assert {len(secret) for secret in secrets[8:]} == {4}
    assert all(16 <= len(secret) <= 128 for secret in secrets[:8]), "long, with room for a proxy before this one"
    for client in clients:
        await client.terminate()
