"""SCRAM: the RFC's example, both sides against each other, every lie found out, PostgreSQL's words."""

import base64
import contextlib
import secrets
import socket
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from wire_kit import raw, told

from cenote.embedded import Postgres
from cenote.errors import ProtocolError
from cenote.wire import messages
from cenote.wire.refusal import Refusal
from cenote.wire.scram import (
    MECHANISM,
    MECHANISM_PLUS,
    ClientExchange,
    Keys,
    ServerExchange,
    Verifier,
    mechanisms,
    new_nonce,
    prepared,
)

# RFC 7677, section 3: user "user", password "pencil".
SALT = base64.b64decode("W22ZaJ0SNY7soEsUEjb6gQ==")
CLIENT_NONCE = b"rOprNGfwEbeRWgbNEkqO"
SERVER_NONCE = b"%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0"
CLIENT_FIRST = b"n,,n=user,r=rOprNGfwEbeRWgbNEkqO"
SERVER_FIRST = b"r=rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0,s=W22ZaJ0SNY7soEsUEjb6gQ==,i=4096"
CLIENT_FINAL = (
    b"c=biws,r=rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0,p=dHzbZapWIk4jUhN+Ute9ytag9zjfMHgsqmmiz7AndVQ="
)
SERVER_FINAL = b"v=6rriTRBi23WpRR/wtup+mMhUZUn/dB5nLTJRsjl95G4="

PENCIL = Verifier.of_password("pencil", SALT)
BINDING = b"hash of a certificate"


def server(mechanism: str = MECHANISM, binding: bytes | None = None) -> ServerExchange:
    return ServerExchange(PENCIL, mechanism, binding=binding, nonce=SERVER_NONCE)


def waiting() -> ServerExchange:
    """A server that waits for the last message of the RFC's example."""
    exchange = server()
    exchange.first(CLIENT_FIRST)
    return exchange


def refusal_of(exchange: ServerExchange, first: bytes, final: bytes | None = None) -> Refusal:
    if final is not None:
        exchange.first(first)
    with pytest.raises(Refusal) as caught:
        exchange.first(first) if final is None else exchange.final(final)
    return caught.value


def agree(client: ClientExchange, at: ServerExchange, password: str | bytes) -> bool:
    """Run the whole exchange; whether the client was let in and believed the server."""
    client.challenge(at.first(client.first()))
    answer = at.final(client.final(Keys.of_password(password, client.salt, client.iterations)))
    if answer is None:
        return False
    client.verify(answer)
    return True


# -- the RFC's example ------------------------------------------------------------------------------------


def test_the_server_says_what_the_rfc_says() -> None:
    exchange = server()
    assert exchange.first(CLIENT_FIRST) == SERVER_FIRST
    assert exchange.final(CLIENT_FINAL) == SERVER_FINAL


def test_the_server_learns_the_client_key_from_a_good_proof_only() -> None:
    exchange = waiting()
    assert exchange.client_key is None
    exchange.final(CLIENT_FINAL)
    assert exchange.client_key == Keys.of_password("pencil", SALT).client


def test_keys_without_the_password_are_enough_to_log_in() -> None:
    """Pass-through: what the server's side learned opens another server with the same verifier."""
    exchange = waiting()
    exchange.final(CLIENT_FINAL)
    assert exchange.client_key is not None
    client = ClientExchange([MECHANISM])
    at = ServerExchange(PENCIL)
    client.challenge(at.first(client.first()))
    answer = at.final(client.final(Keys(exchange.client_key, PENCIL.server_key)))
    assert answer is not None
    client.verify(answer)


# -- both sides -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("binding", [None, BINDING], ids=["plain", "plus"])
def test_both_sides_agree_on_the_right_password_and_on_no_other(binding: bytes | None) -> None:
    for password, fits in (("pencil", True), ("pencil ", False), ("", False)):
        client = ClientExchange(mechanisms(binding), binding=binding)
        at = ServerExchange(PENCIL, client.mechanism, binding=binding)
        assert client.mechanism == (MECHANISM if binding is None else MECHANISM_PLUS)
        assert agree(client, at, password) is fits


@given(st.text(max_size=20) | st.binary(max_size=20), st.binary(min_size=1, max_size=40), st.integers(1, 50))
def test_both_sides_agree_on_any_password(password: str | bytes, salt: bytes, iterations: int) -> None:
    verifier = Verifier.of_password(password, salt, iterations)
    assert Verifier.parse(verifier.format()) == verifier
    assert verifier.fits(password)
    assert agree(ClientExchange([MECHANISM]), ServerExchange(verifier), password)


def test_A13_a_password_of_65535_bytes_is_a_password() -> None:
    password = "p" * 65_535
    verifier = Verifier.of_password(password, SALT, 1)
    assert agree(ClientExchange([MECHANISM]), ServerExchange(verifier), password)
    assert not verifier.fits(password[:-1])


def test_nonces_are_printable_and_never_the_same() -> None:
    assert len({new_nonce() for _ in range(100)}) == 100
    assert all(len(nonce) == 24 and b"," not in nonce for nonce in (new_nonce(), new_nonce()))


# -- unknown users ----------------------------------------------------------------------------------------


def test_A12_the_verifier_of_an_unknown_user_stays_the_same_and_lets_nobody_in() -> None:
    secret = secrets.token_bytes(32)
    mock = Verifier.mock(b"nobody", secret)
    assert mock == Verifier.mock(b"nobody", secret)
    assert mock.salt != Verifier.mock(b"somebody", secret).salt
    assert mock.salt != Verifier.mock(b"nobody", secrets.token_bytes(32)).salt
    assert not agree(ClientExchange([MECHANISM]), ServerExchange(mock), "nobody")


def test_A12_the_challenge_of_an_unknown_user_looks_like_any_other() -> None:
    mock = ServerExchange(Verifier.mock(b"nobody", b"secret"), nonce=SERVER_NONCE).first(CLIENT_FIRST)
    assert len(mock) == len(SERVER_FIRST)
    assert mock.endswith(b",i=4096")


# -- what the server refuses ------------------------------------------------------------------------------


def test_A14_a_wrong_proof_is_no_error_of_the_protocol_but_a_no() -> None:
    wrong = base64.b64encode(bytes(32))
    assert waiting().final(CLIENT_FINAL.rpartition(b"p=")[0] + b"p=" + wrong) is None


@pytest.mark.parametrize(
    "final",
    [
        CLIENT_FINAL.replace(SERVER_NONCE, SERVER_NONCE[::-1]),
        CLIENT_FINAL.replace(SERVER_NONCE, b""),
        CLIENT_FINAL.replace(SERVER_NONCE, SERVER_NONCE + b"x"),
    ],
)
def test_A14_another_nonce_is_refused(final: bytes) -> None:
    assert refusal_of(server(), CLIENT_FIRST, final).detail == "Nonce does not match."


ENDS_IN_A_COMMA = b"n,,n=,r=a,"  # PostgreSQL lets it pass
MALFORMED_FIRST = [
    b"", b"n", b"n,", b"n,,", b"x,,n=,r=a", b"n,x,n=,r=a", b"n,,r=a", b"n,,n=", b"n,,n=,r", b"n,,n=,x=a",
    b"n,,n=,r=a b", b"n,,n=,r=\xc3\xa4", ENDS_IN_A_COMMA, b"n,,n=,r=a,1=x", b"n,,n=,r=a\0", b"p,,n=,r=a",
    b"nn,,n=,r=a", b"n,,m=x,n=,r=a", b"n,a=x,n=,r=a",
]  # fmt: skip


@pytest.mark.parametrize("data", MALFORMED_FIRST)
def test_A14_a_malformed_first_message_is_refused(data: bytes) -> None:
    assert refusal_of(server(), data).sqlstate in ("08P01", "0A000")


MALFORMED_FINAL = [
    b"", b"x", CLIENT_FINAL.partition(b",p=")[0], CLIENT_FINAL.replace(b"biws", b"eSws"),
    CLIENT_FINAL.replace(b"biws", b"biwsAA=="), CLIENT_FINAL.replace(b"c=biws,", b""), CLIENT_FINAL + b",x=y",
    CLIENT_FINAL[:-4], CLIENT_FINAL + b"=", CLIENT_FINAL.replace(b"p=d", b"p=\xff"), CLIENT_FINAL + b"\0",
    CLIENT_FINAL.replace(b",p=", b",p=eA==,p="), CLIENT_FINAL.replace(b",p=", b",1=2,p="),
]  # fmt: skip


@pytest.mark.parametrize("data", MALFORMED_FINAL)
def test_A14_a_malformed_last_message_is_refused(data: bytes) -> None:
    assert refusal_of(server(), CLIENT_FIRST, data).sqlstate == "08P01"


def test_A14_extensions_that_are_optional_are_let_pass() -> None:
    assert server().first(CLIENT_FIRST + b",x=1,y=2") == SERVER_FIRST
    assert waiting().final(CLIENT_FINAL.replace(b",p=", b",x=1,p=")) is None  # another message, another proof


def test_A14_a_client_that_was_told_of_no_channel_binding_where_there_is_one_is_refused() -> None:
    assert server().first(CLIENT_FIRST.replace(b"n,,", b"y,,")) == SERVER_FIRST
    refusal = refusal_of(server(binding=BINDING), CLIENT_FIRST.replace(b"n,,", b"y,,"))
    assert refusal.sqlstate == "28000"
    assert refusal.text == "SCRAM channel binding negotiation error"


def test_A14_a_client_without_channel_binding_may_come_where_it_is_offered() -> None:
    assert agree(ClientExchange([MECHANISM]), ServerExchange(PENCIL, binding=BINDING), "pencil")


@pytest.mark.parametrize("flag", [b"n,,", b"y,,"])
def test_A14_plus_without_channel_binding_is_refused(flag: bytes) -> None:
    refusal = refusal_of(server(MECHANISM_PLUS, BINDING), CLIENT_FIRST.replace(b"n,,", flag))
    assert "does not include channel binding data" in refusal.detail


def test_A14_channel_binding_without_plus_is_refused() -> None:
    first = CLIENT_FIRST.replace(b"n,,", b"p=tls-server-end-point,,")
    assert "includes channel binding data" in refusal_of(server(binding=BINDING), first).detail


def test_A14_another_type_of_channel_binding_is_refused() -> None:
    first = CLIENT_FIRST.replace(b"n,,", b"p=tls-unique,,")
    assert 'type "tls-unique"' in refusal_of(server(MECHANISM_PLUS, BINDING), first).text


def test_A14_the_binding_of_another_connection_is_refused() -> None:
    client = ClientExchange(mechanisms(BINDING), binding=b"hash of the certificate of a man in the middle")
    at = server(MECHANISM_PLUS, BINDING)
    client.challenge(at.first(client.first()))
    with pytest.raises(Refusal, match="SCRAM channel binding check failed") as caught:
        at.final(client.final(Keys.of_password("pencil", client.salt, client.iterations)))
    assert caught.value.sqlstate == "28000"


@pytest.mark.parametrize("mechanism", [MECHANISM_PLUS, "SCRAM-SHA-1", ""])
def test_A14_a_mechanism_that_was_not_offered_is_refused(mechanism: str) -> None:
    with pytest.raises(Refusal, match="invalid SASL authentication mechanism"):
        ServerExchange(PENCIL, mechanism)


# -- what the client refuses ------------------------------------------------------------------------------


def client_after(challenge: bytes) -> ClientExchange:
    client = ClientExchange([MECHANISM], nonce=CLIENT_NONCE)
    client.challenge(challenge)
    return client


@pytest.mark.parametrize(
    "challenge",
    [
        b"", b"r=", SERVER_FIRST.replace(b"rOpr", b"xOpr"), b"r=" + CLIENT_NONCE + b",s=AAAA,i=1",
        SERVER_FIRST.replace(b"i=4096", b"i=0"), SERVER_FIRST.replace(b"i=4096", b"i=-1"),
        SERVER_FIRST.replace(b"i=4096", b"i=4e3"), SERVER_FIRST.replace(b"i=4096", b"i=2147483647"),
        SERVER_FIRST.replace(b"s=W", b"s=*"), SERVER_FIRST.replace(b"s=W22ZaJ0SNY7soEsUEjb6gQ==", b"s="),
        b"m=x," + SERVER_FIRST, b"e=other-error", SERVER_FIRST.replace(b"%", b"\xff"),
    ],
)  # fmt: skip
def test_A14_the_client_refuses_a_challenge_that_is_not_for_it(challenge: bytes) -> None:
    with pytest.raises(ProtocolError):
        client_after(challenge)


@pytest.mark.parametrize("final", [b"", b"v=", SERVER_FINAL[:-4], b"v=" + base64.b64encode(bytes(32)), b"e=no"])
def test_A14_the_client_refuses_a_server_that_cannot_prove_itself(final: bytes) -> None:
    client = client_after(SERVER_FIRST)
    client.final(Keys.of_password("pencil", client.salt, client.iterations))
    with pytest.raises(ProtocolError):
        client.verify(final)


def test_A14_the_client_believes_nobody_before_it_has_proven_itself() -> None:
    with pytest.raises(ProtocolError):
        client_after(SERVER_FIRST).verify(SERVER_FINAL)


def test_the_client_says_that_it_could_have_bound_the_channel() -> None:
    assert ClientExchange([MECHANISM], binding=BINDING).first().startswith(b"y,,")
    assert ClientExchange([MECHANISM, MECHANISM_PLUS]).first().startswith(b"n,,")


def test_the_client_knows_no_other_mechanism() -> None:
    with pytest.raises(ProtocolError, match="OAUTHBEARER"):
        ClientExchange(["OAUTHBEARER", MECHANISM_PLUS])


# -- any bytes --------------------------------------------------------------------------------------------

pieces = st.sampled_from(
    [b"n", b"y", b"p=", b",", b",,", b"n=", b"r=", b"c=biws", b"p=", b"s=", b"i=1", b"=", b"x"]
)
scram_like = st.binary(max_size=80) | st.lists(pieces, max_size=12).map(b"".join)


@given(scram_like, scram_like, st.sampled_from([None, BINDING]))
def test_no_bytes_do_worse_to_a_server_than_be_refused(first: bytes, final: bytes, binding: bytes | None) -> None:
    exchange = server(mechanisms(binding)[0], binding)
    try:
        assert len(exchange.first(first)) <= len(first) + 100
    except Refusal:
        exchange = waiting()
    with contextlib.suppress(Refusal):
        assert exchange.final(final) is None


@given(scram_like, scram_like)
def test_no_bytes_do_worse_to_a_client_than_be_refused(first: bytes, final: bytes) -> None:
    client = ClientExchange([MECHANISM], nonce=b"x")
    with pytest.raises(ProtocolError):
        client.challenge(first)
        client.final(Keys(bytes(32), bytes(32)))
        client.verify(final)


@given(st.text(max_size=120) | st.text(alphabet="SCRAM-SHA-256$:=A1", max_size=60))
def test_no_text_does_worse_than_be_no_verifier(text: str) -> None:
    with pytest.raises(ValueError):
        Verifier.parse(text)


GOOD = PENCIL.format()


@pytest.mark.parametrize(
    "text",
    ["", "md5" + "0" * 32, GOOD[:-4], GOOD + "x", GOOD.replace("4096", "x"), GOOD.replace("4096", "0"),
     GOOD.replace("256$", "1$"), GOOD.replace("W22", "*"), GOOD.replace(":", "$"), f"{GOOD}:", GOOD + "é"],
)  # fmt: skip
def test_what_is_no_verifier_is_said_to_be_none(text: str) -> None:
    with pytest.raises(ValueError):
        Verifier.parse(text)


# -- the server's own words -------------------------------------------------------------------------------

PASSWORDS = [
    "pencil", "", "a b", "naïve", "nai\u0308ve", "Ⅸ", "I\u00adX", "\u2000x", "\u200b", "x\u200by", "\u00ad",
    "x\u00a0y", "\u0627\u0644", "\u06271", "\u0627a\u0627", "a\u0627", "\U0001f600", "\u0378", "\ufb01",
    "\u1e9b\u0323", "\ue000", "x\x7f", "\x01", "x\x80", "ß", "Å", "K", "\u0340", "\u2028", "é\x07", "é\ufffd",
    "\u0627\u0644\u0300", "ﷺ", "x" * 900, "é" * 500,
]  # fmt: skip


@pytest.fixture(scope="module")
def role(pg18: Postgres) -> Iterator[str]:
    """A role that may log in and whose password a test may change."""
    name = f"wire_{secrets.token_hex(4)}"
    pg18.psql(f"CREATE ROLE {name} LOGIN", database="postgres")
    yield name
    pg18.psql(f"DROP ROLE {name}", database="postgres")


def stored_by_server(dsn: str, role: str, passwords: list[str]) -> list[str]:
    import psycopg
    from psycopg import sql

    stored = []
    with psycopg.connect(dsn, autocommit=True) as conn:
        conn.execute("SET scram_iterations = 2")
        for password in passwords:
            conn.execute(sql.SQL("ALTER ROLE {} PASSWORD {}").format(sql.Identifier(role), sql.Literal(password)))
            row = conn.execute("SELECT rolpassword FROM pg_authid WHERE rolname = %s", [role]).fetchone()
            assert row is not None
            stored.append(row[0])
    return stored


def disagreements(dsn: str, role: str, passwords: list[str]) -> list[str]:
    return [
        password
        for password, text in zip(passwords, stored_by_server(dsn, role, passwords), strict=True)
        if text is not None  # an empty password is no password
        and Verifier.of_password(password, Verifier.parse(text).salt, 2).format() != text
    ]


@pytest.mark.pg
def test_A14_the_server_makes_the_same_verifiers(pg18: Postgres, role: str) -> None:
    assert disagreements(pg18.superuser_dsn, role, PASSWORDS) == []


@pytest.mark.pg
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    passwords=st.lists(
        st.text(
            alphabet=st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=3
        ),
        min_size=1,
        max_size=10,
    )
)
def test_A14_the_server_makes_the_same_verifier_of_any_password(
    pg18: Postgres, role: str, passwords: list[str]
) -> None:
    assert disagreements(pg18.superuser_dsn, role, passwords) == []


@pytest.mark.pg
@pytest.mark.parametrize("password", ["pencil", "nai\u0308ve Ⅸ", "\u0627a", "x" * 900])
def test_the_server_lets_our_client_in(pg18: Postgres, role: str, password: str) -> None:
    (text,) = stored_by_server(pg18.superuser_dsn, role, [password])
    assert Verifier.parse(text).format() == text
    with raw(pg18) as client:
        who = [("user", role), ("database", pg18.database)]
        assert client.log_in(who, password)[-1] == (b"Z", b"I")
    with raw(pg18) as client:
        kind, body = client.log_in(who, password + "x")[-1]
        assert (kind, told(body)["C"]) == (b"E", "28P01")


@pytest.mark.pg
@pytest.mark.parametrize("first", [data for data in MALFORMED_FIRST if data and data != ENDS_IN_A_COMMA])
def test_A14_the_server_refuses_a_first_message_in_the_same_words(pg18: Postgres, first: bytes) -> None:
    with raw(pg18) as client:
        client.send(messages.startup([("user", pg18.user), ("database", pg18.database)]))
        assert client.message()[0] == b"R"
        head = MECHANISM.encode() + b"\0" + len(first).to_bytes(4, "big")
        client.send(messages.password(head + first))
        client.socket.shutdown(socket.SHUT_WR)
        kind, body = client.message()
    refusal = refusal_of(server(), first)
    assert kind == b"E"
    assert (told(body)["C"], told(body)["M"]) == (refusal.sqlstate, refusal.text)


@pytest.mark.parametrize(
    ("password", "hashed"),
    [("", b""), ("\u2000x", b" x"), ("\u00ad", b"\xc2\xad"), (b"\xff\xfe", b"\xff\xfe"), ("Ⅸ", b"IX")],
)
def test_a_password_is_prepared_where_that_works_and_used_as_it_is_elsewhere(
    password: str | bytes, hashed: bytes
) -> None:
    assert prepared(password) == hashed
