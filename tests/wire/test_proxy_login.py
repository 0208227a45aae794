"""The log-in of a client: what it may ask for first, how it proves who it is, and what a stranger learns."""

import asyncio
import hashlib
import random
import ssl
from typing import Any

import asyncpg
import psycopg
import pytest
from login_kit import CountingThreads, Door, dialed, mutated, on_both_loops

from cenote.proxy.auth.keys import KeyCache
from cenote.proxy.dial import DialError
from cenote.proxy.inbox import Inbox
from cenote.proxy.login import Cancel, Login, Refused
from cenote.testing.faults import Fault, FaultProxy, every
from cenote.testing.postgres import TLSFiles
from cenote.testing.wire import LoginRefused, RawClient, Scram, error, unchecked_context
from cenote.wire import messages
from cenote.wire.scram import Verifier
from cenote.wire.tls import server_context
from pool_kit import until

PASSWORD = "s3crét pass"
SALT = bytes(range(16))
VERIFIER = Verifier.of_password(PASSWORD, SALT, 4096).format()
MD5 = "md5" + hashlib.md5(PASSWORD.encode() + b"ann").hexdigest()
WRONG = 'password authentication failed for user "{}"'


@pytest.fixture(scope="module")
def context(tls_files: TLSFiles) -> ssl.SSLContext:
    return server_context(tls_files.server_certificate, tls_files.server_key)


def libpq(door: Door, user: str = "ann", password: str = PASSWORD, **more: Any) -> Any:
    """Connect by libpq, in a thread; the connection, or the text of the error."""

    def connect() -> Any:
        words = {"host": door.host, "port": door.port, "user": user, "password": password, "dbname": "db"}
        try:
            return psycopg.connect(**{"gssencmode": "disable", "connect_timeout": 10, **words, **more})
        except psycopg.OperationalError as refused:
            return str(refused)

    return asyncio.to_thread(connect)


async def refusal(door: Door, user: str = "ann", password: str = PASSWORD, **named: Any) -> dict[str, str]:
    """The error with which the door sends a client away."""
    connect = {name: named.pop(name) for name in ("tls", "context") if name in named}
    async with await RawClient.connect(door.address, **connect) as client:
        return await client.refusal(user, named.pop("database", "db"), password, **named)


# -- methods --------------------------------------------------------------------------------------------------

STORED = {"plain": PASSWORD, "verifier": VERIFIER, "md5": MD5}
WORKS = [
    ("scram-sha-256", "plain"),
    ("scram-sha-256", "verifier"),
    ("md5", "plain"),
    ("md5", "md5"),
    ("md5", "verifier"),  # by SCRAM, as PostgreSQL does it
    ("password", "plain"),
    ("password", "md5"),
    ("password", "verifier"),
]


@pytest.mark.parametrize(("auth", "stored"), WORKS)
def test_A14_every_method_lets_in_who_knows_the_password_and_nobody_else(auth, stored, context):
    @on_both_loops
    async def body():
        async with Door({"ann": STORED[stored]}, auth=auth, tls=context) as door:
            conn = await libpq(door, sslmode="require")
            conn.close()
            login = await door.outcome()
            assert (login.user, login.database, login.replication) == ("ann", "db", None)
            assert login.tls == "TLSv1.3"
            for number, wrong in enumerate(("wrong", PASSWORD + " ", MD5, VERIFIER), 1):
                assert WRONG.format("ann") in await libpq(door, password=wrong, sslmode="require")
                refused = await door.outcome(number)
                assert (str(refused), refused.sqlstate, refused.user) == ("wrong_password", "28P01", "ann")

    body()


@pytest.mark.parametrize("auth", ["scram-sha-256", "md5", "password"])
def test_A14_asyncpg_logs_in_by_every_method(auth, context):
    async def body():
        async with Door({"ann": PASSWORD}, auth=auth, tls=context) as door:
            conn = await asyncpg.connect(
                host=door.host,
                port=door.port,
                user="ann",
                password=PASSWORD,
                database="db",
                ssl=unchecked_context(),
            )
            conn.terminate()
            assert isinstance(await door.outcome(), Login)

    asyncio.run(body())


def test_A14_md5_cannot_be_checked_by_scram_and_looks_like_a_wrong_password():
    @on_both_loops
    async def body():
        async with Door({"ann": MD5}) as door:
            assert WRONG.format("ann") in await libpq(door)

    body()


def test_A14_a_user_may_have_a_method_of_its_own():
    @on_both_loops
    async def body():
        async with Door({"ann": {"password": PASSWORD, "auth": "md5"}, "bob": PASSWORD}) as door:
            for user, code in (("ann", 5), ("bob", 10)):
                async with await RawClient.connect(door.address) as client:
                    client.feed(messages.startup([("user", user), ("database", "db")]))
                    assert (await client.receive()).body[3] == code

    body()


def test_A14_trust_lets_in_users_who_are_configured_and_only_where_it_is_written():
    @on_both_loops
    async def body():
        async with Door({"ann": PASSWORD}, auth="trust") as door:
            (await libpq(door, password="")).close()
            fields = await refusal(door, "bob")
            assert (fields["C"], fields["M"]) == ("28000", 'role "bob" does not exist')

    body()


def test_A13_a_password_in_clear_text_needs_tls_or_a_unix_socket(context, tmp_path):
    @on_both_loops
    async def body():
        async with Door({"ann": PASSWORD}, auth="password", tls=context) as door:
            fields = await refusal(door)
            assert fields["C"] == "28000"
            assert "sslmode=require" in fields["H"]
            (await libpq(door, sslmode="require")).close()
        async with Door({"ann": PASSWORD}, auth="password", unix_dir=tmp_path) as door:
            (await libpq(door)).close()
            assert (await door.outcome()).tls is None

    body()


def test_A13_long_passwords_are_taken_and_longer_ones_end_the_connection(context):
    longest = "x" * 65_534

    @on_both_loops
    async def body():
        async with Door({"ann": longest}, auth="password", tls=context) as door:
            async with await RawClient.connect(door.address, tls="postgres") as client:
                await client.startup("ann", "db", longest)
            assert isinstance(await door.outcome(), Login)
            fields = await refusal(door, password=longest + "x", tls="postgres")
            assert fields["C"] == "08P01"

    body()


@pytest.mark.parametrize("auth", ["password", "md5"])
def test_A13_an_empty_password_is_never_right(auth, context):
    @on_both_loops
    async def body():
        async with Door({"ann": {"password": PASSWORD}}, auth=auth, tls=context) as door:
            async with await RawClient.connect(door.address, tls="postgres") as client:
                client.feed(messages.startup([("user", "ann"), ("database", "db")]))
                await client.receive()
                client.feed(messages.password(b"\0"))
                fields = error(await client.closed())
                assert (fields["C"], fields["M"]) == ("28P01", "empty password returned by client")

    body()


def test_A14_keys_of_a_password_are_derived_once_per_user_and_in_a_thread():
    @on_both_loops
    async def body():
        with CountingThreads() as threads:
            async with Door({"ann": PASSWORD, "bob": PASSWORD}, keys=KeyCache(threads)) as door:
                for user in ("ann", "bob") * 3:
                    async with await RawClient.connect(door.address) as client:
                        await client.startup(user, "db", PASSWORD)
                assert threads.given == 2
                # Equal passwords do not show: each user has a salt of its own.
                keys = door.gate.keys
                assert (await keys.verifier("ann", PASSWORD)).salt != (await keys.verifier("bob", PASSWORD)).salt

    body()


def test_A14_a_verifier_needs_no_derivation_at_all():
    @on_both_loops
    async def body():
        with CountingThreads() as threads:
            async with Door({"ann": VERIFIER}, keys=KeyCache(threads)) as door:
                async with await RawClient.connect(door.address) as client:
                    await client.startup("ann", "db", PASSWORD)
                assert isinstance(await door.outcome(), Login)
                assert threads.given == 0

    body()


def test_A14_a_client_without_an_initial_response_is_asked_again():
    @on_both_loops
    async def body():
        async with Door({"ann": PASSWORD}) as door, await RawClient.connect(door.address) as client:
            client.feed(messages.startup([("user", "ann"), ("database", "db")]))
            await client.receive()
            client.feed(messages.password(b"SCRAM-SHA-256\0\xff\xff\xff\xff"))
            assert (await client.receive()).body == b"\0\0\0\x0b"
            scram = Scram(PASSWORD)
            client.feed(messages.password(scram.first()))
            client.feed(messages.password(scram.final((await client.receive()).body[4:])))
            scram.verify((await client.receive()).body[4:])
            assert isinstance(await door.outcome(), Login)

    body()


MALFORMED = {
    "a-query": messages.query("SELECT 1"),
    "terminate": messages.TERMINATE,
    "no-mechanism": messages.password(b""),
    "unknown-mechanism": messages.password(b"SCRAM-SHA-1\0\0\0\0\4n,,n"),
    "plus": messages.password(b"SCRAM-SHA-256-PLUS\0\0\0\0\4p=tl"),
    "length-missing": messages.password(b"SCRAM-SHA-256\0\0\0"),
    "length-lies": messages.password(b"SCRAM-SHA-256\0\0\0\0\xffn,,"),
    "length-negative": messages.password(b"SCRAM-SHA-256\0\x80\0\0\0n,,"),
    "no-nonce": messages.password(b"SCRAM-SHA-256\0\0\0\0\5n,,n="),
    "channel-binding": messages.password(b"SCRAM-SHA-256\0\0\0\0\x10p=tls-unique,,n="),
    "too-long": b"p\0\2\0\0",
    "no-length": b"p\0\0\0\0",
}


@pytest.mark.parametrize("name", MALFORMED)
def test_A14_a_malformed_answer_is_a_protocol_error_and_the_end(name):
    @on_both_loops
    async def body():
        async with Door({"ann": PASSWORD}) as door, await RawClient.connect(door.address) as client:
            client.feed(messages.startup([("user", "ann"), ("database", "db")]))
            await client.receive()
            client.feed(MALFORMED[name])
            assert error(await client.closed())["C"] == "08P01"
            refused = await door.outcome()
            assert (str(refused), refused.sqlstate) == ("protocol", "08P01")

    body()


# -- strangers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("auth", ["scram-sha-256", "md5", "password"])
def test_A12_a_stranger_hears_what_a_user_with_a_wrong_password_hears(auth, context):
    async def conversation(door: Door, user: str, database: str) -> tuple[list[Any], dict[str, str]]:
        async with await RawClient.connect(door.address, tls="postgres") as client:
            with pytest.raises(LoginRefused) as refused:
                await client.startup(user, database, "wrong")
            lengths = [(message.kind, len(message.body)) for message in refused.value.before]
            return lengths, {name: text.replace(user, "?") for name, text in refused.value.fields.items()}

    @on_both_loops
    async def body():
        async with Door({"ann": PASSWORD, "nopassword": {}}, auth=auth, tls=context) as door:
            known = await conversation(door, "ann", "db")
            assert known[1]["C"] == "28P01"
            for user, database in (
                ("stranger", "db"),
                ("nopassword", "db"),
                ("ann", "nowhere"),
                ("ann", "cenote"),
            ):
                assert await conversation(door, user, database) == known

    body()


def test_A12_a_stranger_has_the_same_salt_every_time():
    async def salt(door: Door, user: str) -> bytes:
        async with await RawClient.connect(door.address) as client:
            client.feed(messages.startup([("user", user), ("database", "db")]))
            await client.receive()
            first = Scram("x").first()
            client.feed(messages.password(b"SCRAM-SHA-256\0" + len(first).to_bytes(4, "big") + first))
            return (await client.receive()).body.split(b",")[1]

    @on_both_loops
    async def body():
        async with Door({"ann": PASSWORD}) as door:
            salts = {user: {await salt(door, user) for _ in range(3)} for user in ("ann", "eve", "mallory")}
            assert all(len(found) == 1 for found in salts.values())
            assert len(set.union(*salts.values())) == 3

    body()


def test_A12_who_has_proven_who_it_is_hears_that_there_is_no_such_database():
    @on_both_loops
    async def body():
        async with Door({"ann": PASSWORD}) as door:
            fields = await refusal(door, database="nowhere")
            assert (fields["S"], fields["C"]) == ("FATAL", "3D000")
            assert fields["M"] == 'database "nowhere" does not exist'
            refused = await door.outcome()
            assert (str(refused), refused.database) == ("no_database", "nowhere")

    body()


def test_A12_the_virtual_database_is_for_admin_users():
    @on_both_loops
    async def body():
        async with Door({"ann": PASSWORD, "bob": PASSWORD}, admin_users=("ann",)) as door:
            async with await RawClient.connect(door.address) as client:
                await client.startup("ann", "cenote", PASSWORD)
            assert (await door.outcome()).database == "cenote"
            fields = await refusal(door, "bob", database="cenote")
            assert (fields["C"], fields["M"]) == ("42501", 'permission denied for database "cenote"')

    body()


# -- before the log-in ----------------------------------------------------------------------------------------


def test_A1_libpq_asks_for_encryption_as_it_likes(context):
    @on_both_loops
    async def body():
        async with Door({"ann": PASSWORD}, tls=context) as door:
            for sslmode, version in (("disable", None), ("prefer", "TLSv1.3"), ("require", "TLSv1.3")):
                (await libpq(door, sslmode=sslmode, gssencmode="prefer")).close()
                assert (await door.outcome(len(door.outcomes) - 1)).tls == version
        async with Door({"ann": PASSWORD}) as door:
            (await libpq(door, sslmode="prefer")).close()
            assert "SSL" in await libpq(door, sslmode="require")

    body()


def test_A1_tls_may_be_required_of_sessions_but_not_of_cancel_requests(context):
    @on_both_loops
    async def body():
        async with Door({"ann": PASSWORD}, tls=context, tls_mode="require") as door:
            fields = await refusal(door)
            assert (fields["C"], fields["H"]) == ("28000", "Use sslmode=require.")
            async with await RawClient.connect(door.address) as client:
                client.feed(messages.cancel_request(3, b"abcd"))
                assert await client.rest() == b""
            assert await door.outcome(1) == Cancel(3, b"abcd")

    body()


@pytest.mark.parametrize("code", [messages.SSL_REQUEST, messages.GSSENC_REQUEST])
def test_A2_bytes_behind_an_encryption_request_end_the_connection(context, code):
    @on_both_loops
    async def body():
        async with Door({"ann": PASSWORD}, tls=context) as door, await RawClient.connect(door.address) as client:
            client.feed(messages.request(code) + messages.startup([("user", "ann")]))
            assert b"R" not in (await client.rest())[:1]
            assert (await door.outcome()).sqlstate == "08P01"

    body()


def test_A3_direct_tls_needs_alpn(context):
    @on_both_loops
    async def body():
        async with Door({"ann": PASSWORD}, tls=context) as door:
            (await libpq(door, sslmode="require", sslnegotiation="direct")).close()
            assert (await door.outcome()).tls == "TLSv1.3"
            async with await RawClient.connect(door.address, tls="direct", context=unchecked_context()) as client:
                assert await client.rest() == b""
            assert (await door.outcome(1)).sqlstate == "08P01"
        async with Door({"ann": PASSWORD}) as door:
            assert isinstance(await libpq(door, sslmode="require", sslnegotiation="direct"), str)
            assert (await door.outcome()).sqlstate == "08P01"

    body()


def test_A3_a_handshake_that_fails_is_nobodys_trouble(context):
    @on_both_loops
    async def body():
        async with Door({"ann": PASSWORD}, tls=context) as door:
            async with await RawClient.connect(door.address) as client:
                assert await client.request(messages.SSL_REQUEST) == b"S"
                client.feed(b"\x16\x03\x01\x00\x05hello")
                await client.rest()
            assert str(await door.outcome()) == "tls"
            # A client that does not trust us says so in the middle of the handshake, or leaves.
            assert "certificate" in await libpq(door, sslmode="verify-full", sslrootcert="system")
            assert await door.outcome(1) is None or str(await door.outcome(1)) == "tls"
            (await libpq(door)).close()

    body()


@pytest.mark.parametrize("version", [2 << 16, 1 << 16, 4 << 16])
def test_A4_protocols_that_are_not_spoken_are_refused_legibly(version):
    @on_both_loops
    async def body():
        async with Door({"ann": PASSWORD}) as door, await RawClient.connect(door.address) as client:
            client.feed(messages.startup([("user", "ann")], version))
            said = await client.rest()
            assert b"unsupported frontend protocol" in said
            assert (said[1:2] == b"F") == (version < 3 << 16)  # protocol 2 has no length
            assert str(await door.outcome()) == "unsupported"

    body()


@pytest.mark.parametrize(
    ("version", "options", "spoken", "negotiated"),
    [
        (messages.PROTOCOL_3_0, {}, messages.PROTOCOL_3_0, None),
        (messages.PROTOCOL_3_2, {}, messages.PROTOCOL_3_2, None),
        (3 << 16 | 3, {}, messages.PROTOCOL_3_2, messages.PROTOCOL_3_2),
        (3 << 16 | 9999, {"_pq_.grease": "1"}, messages.PROTOCOL_3_2, messages.PROTOCOL_3_2),
        (messages.PROTOCOL_3_0, {"_pq_.x": "1"}, messages.PROTOCOL_3_0, messages.PROTOCOL_3_0),
    ],
)
def test_A5_newer_protocols_and_unknown_options_are_negotiated_once(version, options, spoken, negotiated):
    @on_both_loops
    async def body():
        async with Door({"ann": PASSWORD}) as door, await RawClient.connect(door.address) as client:
            trace = await client.startup("ann", "db", PASSWORD, options, version)
            said = [message.body for message in trace if message.kind == "v"]
            if negotiated is None:
                assert said == []
            else:
                assert trace[0].kind == "v"
                assert said == [messages.negotiate_protocol_version(negotiated, list(options))[5:]]
            assert (await door.outcome()).version == spoken
            assert len(client.key[1]) == (32 if spoken == messages.PROTOCOL_3_2 else 4)

    body()


def test_A6_libpq_speaks_3_2_with_us():
    @on_both_loops
    async def body():
        async with Door({"ann": PASSWORD}) as door:
            (await libpq(door, min_protocol_version="3.2", max_protocol_version="latest")).close()
            assert (await door.outcome()).version == messages.PROTOCOL_3_2

    body()


LYING = [
    b"\0\0\0\0",
    b"\0\0\0\7\0\3\0",
    b"\xff\xff\xff\xff",
    b"\x40\0\0\0",
    b"\0\0\x27\x15",
    b"GET / HTTP/1.1\r\n",
]


@pytest.mark.parametrize("head", LYING)
def test_A8_lengths_that_lie_end_the_connection_without_a_word(head):
    @on_both_loops
    async def body():
        async with Door({"ann": PASSWORD}) as door, await RawClient.connect(door.address) as client:
            client.feed(head)
            assert await client.rest() == b""
            assert (await door.outcome()).sqlstate == "08P01"

    body()


def test_A8_a_client_that_speaks_byte_by_byte_is_understood(context):
    @on_both_loops
    async def body():
        async with Door({"ann": PASSWORD}, tls=context) as door:
            async with FaultProxy(door.host, door.port, every(Fault("split", "up"))) as between:
                for tls in (None, "postgres", "direct"):
                    async with await RawClient.connect((between.host, between.port), tls=tls) as client:
                        await client.startup("ann", "db", PASSWORD)
                    assert isinstance(await door.outcome(len(door.outcomes) - 1), Login)

    body()


def test_A8_a_client_that_sends_ahead_is_not_read_further():
    @on_both_loops
    async def body():
        async with Door({"ann": PASSWORD}) as door, await RawClient.connect(door.address) as client:
            client.feed(messages.startup([("user", "ann"), ("database", "db")]))
            await client.receive()
            inbox = door.visitors[0].inbox
            most = 0
            # The first message lacks its last byte, the rest is behind it.
            client.feed(b"p" + (65_535 + 4).to_bytes(4, "big"), b"x" * 65_534)
            client.feed(*[b"x" * 100_000] * 40)
            while not door.outcomes:
                most = max(most, inbox.buffered())
                await asyncio.sleep(0)
            assert most <= 65_536 + 262_144  # one read of the loop above the bound
            assert (await door.outcome()).sqlstate == "08P01"

    body()


@pytest.mark.parametrize(
    ("asked", "replication"),
    [({}, None), ({"replication": "database"}, b"database"), ({"replication": "on"}, b"true"),
     ({"replication": "0"}, None)],
)  # fmt: skip
def test_A9_a_replication_connection_is_told_apart(asked, replication):
    @on_both_loops
    async def body():
        async with Door({"ann": PASSWORD}) as door, await RawClient.connect(door.address) as client:
            await client.startup("ann", "db", PASSWORD, asked)
            login = await door.outcome()
            assert login.replication == replication
            assert b"replication" not in login.parameters

    body()


def test_A9_a_strange_replication_value_is_refused():
    @on_both_loops
    async def body():
        async with Door({"ann": PASSWORD}) as door:
            assert (await refusal(door, params={"replication": "maybe"}))["C"] == "22023"

    body()


def test_A10_settings_come_from_the_packet_and_from_options_and_the_packet_wins():
    @on_both_loops
    async def body():
        async with Door({"ann": PASSWORD}) as door:
            conn = await libpq(
                door,
                application_name="mine",
                options=r"-c search_path=a\ b --work-mem=4MB -c application_name=other"
                " -c TimeZone=x -c timezone=UTC",
            )
            conn.close()
            login = await door.outcome()
            assert login.application_name == "mine"
            assert login.parameters == {
                b"search_path": b"a b",
                b"work_mem": b"4MB",
                b"application_name": b"mine",
                b"timezone": b"UTC",
            } | {name: login.parameters[name] for name in login.parameters if name == b"client_encoding"}

    body()


def test_A10_options_that_cannot_be_read_are_refused_after_the_log_in():
    @on_both_loops
    async def body():
        async with Door({"ann": PASSWORD}) as door:
            assert (await refusal(door, password="wrong", params={"options": "-c"}))["C"] == "28P01"
            assert (await refusal(door, params={"options": "--what"}))["C"] == "42601"

    body()


def test_A11_the_database_is_the_user_where_none_is_named_and_a_user_must_be():
    @on_both_loops
    async def body():
        async with Door({"ann": PASSWORD}, databases=("ann",)) as door:
            async with await RawClient.connect(door.address) as client:
                await client.startup("ann", "", PASSWORD)
            assert (await door.outcome()).database == "ann"
            async with await RawClient.connect(door.address) as client:
                client.feed(messages.startup([("database", "ann")]))
                fields = error(await client.closed())
            assert (fields["C"], fields["M"]) == ("28000", "no PostgreSQL user name specified in startup packet")

    body()


def test_A11_names_in_another_encoding_are_strangers_and_do_no_harm():
    @on_both_loops
    async def body():
        async with Door({"ann": PASSWORD}) as door, await RawClient.connect(door.address) as client:
            packet = messages.startup([("user", "bj?rn"), ("database", "db")]).replace(b"bj?rn", b"bj\xf6rn")
            client.feed(packet)
            with pytest.raises(LoginRefused) as refused:
                await client.authenticate("x", PASSWORD)
            assert refused.value.fields["M"] == WRONG.format(r"bj\xf6rn")

    body()


# -- ends -----------------------------------------------------------------------------------------------------


def test_F22_a_probe_that_says_nothing_is_nothing():
    @on_both_loops
    async def body():
        async with Door({"ann": PASSWORD}) as door:
            for number, end in enumerate(("close", "reset", "abort")):
                client = await RawClient.connect(door.address)
                await getattr(client, end)()
                assert await door.outcome(number) is None

    body()


def test_F22_a_client_that_leaves_to_ask_for_its_password_is_nothing():
    @on_both_loops
    async def body():
        async with Door({"ann": PASSWORD}) as door:
            assert "no password supplied" in await libpq(door, password="")
            assert await door.outcome() is None

    body()


@pytest.mark.parametrize("auth", ["trust", "password", "md5", "scram-sha-256"])
def test_F22_a_client_that_says_everything_at_once_and_leaves_is_nothing(auth, tmp_path):
    startup = messages.startup([("user", "ann"), ("database", "db")])

    @on_both_loops
    async def body():
        async with Door({"ann": PASSWORD}, auth=auth, unix_dir=tmp_path) as door:
            for number, wait in enumerate((False, True)):
                client = await RawClient.connect(door.address)
                await until(lambda number=number: len(door.visitors) > number)
                visitor = door.visitors[number]
                if wait:
                    # It reads nothing until the client is gone.
                    inbox, visitor.inbox = visitor.inbox, Inbox(lambda: None, lambda: None)
                client.feed(startup + messages.password(PASSWORD.encode() + b"\0"))
                await client.close()
                if wait:
                    await until(lambda visitor=visitor: visitor.lost)
                    inbox.feed(visitor.inbox.take())
                    inbox.end()
                outcome = await door.outcome(number)
                assert outcome is None or isinstance(outcome, Login | Refused)

    body()


TLS = {
    "plain": {"sslmode": "disable"},
    "postgres": {"sslmode": "require"},
    "direct": {"sslmode": "require", "sslnegotiation": "direct"},
}


@pytest.mark.parametrize("how", ["close", "reset"])
@pytest.mark.parametrize("tls", TLS)
def test_F22_a_log_in_cut_at_any_byte_ends_cleanly(context, how, tls):
    @on_both_loops
    async def body():
        async with Door({"ann": VERIFIER}, tls=context) as door:

            async def end_of(between: FaultProxy) -> int:
                server = await dialed(between, "ann", PASSWORD, dbname="db", **TLS[tls])
                passed = between.links[0].up.passed
                await server.leave()
                return passed

            async with FaultProxy(door.host, door.port) as between:
                end = await end_of(between)
            for at in [*range(0, end - 1, 7 if tls == "plain" else 61), end - 1]:
                door.outcomes.clear()
                async with FaultProxy(door.host, door.port, every(Fault(how, "up", at=at))) as between:
                    with pytest.raises(DialError):
                        await dialed(between, "ann", PASSWORD, dbname="db", **TLS[tls])
                    outcome = await door.outcome()
                    assert outcome is None or str(outcome) == "tls", f"after {at} of {end} bytes"

    body()


def test_F25_a_log_in_can_be_given_up_at_any_moment():
    @on_both_loops
    async def body():
        startup = messages.startup([("user", "ann"), ("database", "db")])
        async with Door({"ann": PASSWORD}) as door:
            for number, sent in enumerate((b"", b"\0\0", startup)):
                async with await RawClient.connect(door.address) as client:
                    client.feed(sent)
                    await until(lambda number=number: len(door.visitors) > number)
                    visitor = door.visitors[number]
                    if sent == startup:
                        await client.receive()
                    await until(
                        lambda sent=sent, inbox=visitor.inbox: sent == startup or inbox.buffered() == len(sent)
                    )
                    visitor.task.cancel()
                    await asyncio.wait([visitor.task])
                    assert isinstance(door.outcomes[number], asyncio.CancelledError)

    body()


@pytest.mark.parametrize("auth", ["password", "scram-sha-256"])
def test_A8_whatever_a_client_sends_ends_in_a_log_in_a_refusal_or_nothing(auth, tmp_path):
    packet = messages.startup([("user", "ann"), ("database", "db"), ("options", "-c a=b")], messages.PROTOCOL_3_2)
    first = b"n,,n=,r=abcdef"
    answers = {
        "password": messages.password(PASSWORD.encode() + b"\0"),
        "scram-sha-256": messages.password(b"SCRAM-SHA-256\0" + len(first).to_bytes(4, "big") + first)
        + messages.password(b"c=biws,r=abcdef,p=" + b"A" * 43 + b"="),
    }
    whole = messages.request(messages.GSSENC_REQUEST) + packet + answers[auth]

    @on_both_loops
    async def body():
        chance = random.Random(11)
        async with Door({"ann": VERIFIER}, auth=auth, unix_dir=tmp_path) as door:
            for number in range(300):
                async with await RawClient.connect(door.address) as client:
                    sent = mutated(whole, chance)
                    client.feed(sent[:8])
                    await asyncio.sleep(0)
                    client.feed(sent[8:])
                    client.writer.write_eof()
                    await client.rest()
                outcome = await door.outcome(number)
                assert outcome is None or isinstance(outcome, Login | Refused | Cancel), (sent, outcome)

    body()
