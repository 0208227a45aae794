"""A client's first packets: the same answers as PostgreSQL's, bounded, and no way around them."""

import asyncio
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from wire_kit import body_of, framed, our_verdict, packet, server_verdict, split, told, verdict

from cenote.embedded import Postgres
from cenote.proxy.inbox import Inbox
from cenote.wire import messages
from cenote.wire.messages import GSSENC_REQUEST, PROTOCOL_3_0, PROTOCOL_3_2, SSL_REQUEST
from cenote.wire.refusal import Refusal
from cenote.wire.startup import (
    Answer,
    Cancel,
    EncryptionRequest,
    Hello,
    StartTLS,
    Startup,
    packet_length,
    parse_packet,
)

SSL = messages.request(SSL_REQUEST)
GSS = messages.request(GSSENC_REQUEST)
ALICE = packet([("user", "alice")])
NEWER = 3 << 16 | 3
GREASE = 3 << 16 | 9999


def started(whole: bytes) -> Startup:
    found = parse_packet(body_of(whole))
    assert isinstance(found, Startup)
    return found


def refused(whole: bytes) -> Refusal:
    with pytest.raises(Refusal) as caught:
        parse_packet(body_of(whole))
    return caught.value


# -- encryption requests ----------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [(SSL, GSS), (GSS, SSL)], ids=["ssl-gss", "gss-ssl"])
def test_A1_both_requests_may_come_in_any_order_and_are_declined_without_tls(order: tuple[bytes, bytes]) -> None:
    hello = Hello(tls=False)
    for request in order:
        assert hello.packet(body_of(request), 0) == Answer(b"N")
    assert isinstance(hello.packet(body_of(ALICE), 0), Startup)


def test_A1_ssl_is_accepted_after_gss_was_declined() -> None:
    hello = Hello(tls=True)
    assert hello.packet(body_of(GSS), 0) == Answer(b"N")
    assert hello.packet(body_of(SSL), 0) == StartTLS(b"S")
    hello.secured(None)
    assert isinstance(hello.packet(body_of(ALICE), 0), Startup)


@pytest.mark.parametrize("request_", [SSL, GSS], ids=["ssl", "gss"])
def test_A1_a_request_comes_at_most_once(request_: bytes) -> None:
    hello = Hello(tls=False)
    hello.packet(body_of(request_), 0)
    with pytest.raises(Refusal, match=r"unsupported frontend protocol 1234\.56"):
        hello.packet(body_of(request_), 0)


@pytest.mark.parametrize("request_", [SSL, GSS], ids=["ssl", "gss"])
def test_A1_inside_negotiated_tls_no_request_may_come(request_: bytes) -> None:
    hello = Hello(tls=True)
    hello.packet(body_of(SSL), 0)
    hello.secured("postgresql")
    with pytest.raises(Refusal, match="unsupported frontend protocol"):
        hello.packet(body_of(request_), 0)


def test_A1_inside_direct_tls_a_request_for_tls_is_declined() -> None:
    hello = Hello(tls=True)
    hello.first_byte(0x16)
    hello.secured("postgresql")
    assert hello.packet(body_of(SSL), 0) == Answer(b"N")


def test_A1_a_unix_socket_has_no_tls() -> None:
    assert Hello(tls=True, unix=True).packet(body_of(SSL), 0) == Answer(b"N")


@pytest.mark.parametrize("request_", [SSL, GSS], ids=["ssl", "gss"])
@pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])
def test_A2_bytes_behind_a_request_end_the_connection(request_: bytes, tls: bool) -> None:
    with pytest.raises(Refusal, match="received unencrypted data after") as caught:
        Hello(tls=tls).packet(body_of(request_), 1)
    accepted = tls and request_ == SSL
    assert (caught.value.reply == b"") is accepted
    if not accepted:
        assert caught.value.reply[:2] == b"NE"


def test_A3_direct_tls_starts_by_its_first_byte_and_without_an_answer() -> None:
    hello = Hello(tls=True)
    assert hello.first_byte(0x16) == StartTLS(b"")
    hello.secured("postgresql")
    assert isinstance(hello.packet(body_of(ALICE), 0), Startup)


@pytest.mark.parametrize("alpn", [None, "http/1.1"])
def test_A3_direct_tls_without_our_alpn_is_closed(alpn: str | None) -> None:
    hello = Hello(tls=True)
    hello.first_byte(0x16)
    with pytest.raises(Refusal, match="without ALPN") as caught:
        hello.secured(alpn)
    assert caught.value.reply == b""


@pytest.mark.parametrize("options", [{"tls": False}, {"tls": True, "unix": True}])
def test_A3_direct_tls_is_closed_where_there_is_no_tls(options: dict[str, bool]) -> None:
    with pytest.raises(Refusal) as caught:
        Hello(**options).first_byte(0x16)
    assert caught.value.reply == b""


def test_A3_any_other_first_byte_is_left_to_the_packets() -> None:
    assert [byte for byte in range(256) if Hello(tls=True).first_byte(byte) is not None] == [0x16]


def test_a_session_without_tls_is_refused_where_tls_is_required() -> None:
    with pytest.raises(Refusal) as caught:
        Hello(tls=True, tls_required=True).packet(body_of(ALICE), 0)
    assert caught.value.sqlstate == "28000"
    cancel = messages.cancel_request(1, b"keys")
    assert isinstance(Hello(tls=True, tls_required=True).packet(body_of(cancel), 0), Cancel)
    assert isinstance(Hello(tls=True, unix=True, tls_required=True).packet(body_of(ALICE), 0), Startup)
    hello = Hello(tls=True, tls_required=True)
    hello.packet(body_of(SSL), 0)
    hello.secured(None)
    assert isinstance(hello.packet(body_of(ALICE), 0), Startup)


# -- versions ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [2 << 16, 1 << 16, 1, 2 << 16 | 7])
def test_A4_an_older_protocol_is_refused_in_its_own_words(version: int) -> None:
    refusal = refused(packet([("user", "alice")], version))
    assert refusal.sqlstate == "0A000"
    assert refusal.reply[:1] == b"E"
    assert refusal.reply.startswith(b"EFATAL:  unsupported frontend protocol %d." % (version >> 16))
    assert refusal.reply.endswith(b"\n\0")


def test_a_later_major_protocol_is_refused_in_protocol_3() -> None:
    ((kind, body),) = split(refused(packet([("user", "alice")], 4 << 16)).reply)
    assert kind == b"E"
    assert told(body)["C"] == "0A000"


@pytest.mark.parametrize("version", [NEWER, GREASE])
def test_A5_A6_a_later_minor_protocol_is_answered_with_ours_once(version: int) -> None:
    startup = started(packet([("user", "alice")], version))
    assert startup.version == PROTOCOL_3_2
    assert startup.negotiate == b"v\0\0\0\x0c\0\3\0\2\0\0\0\0"


def test_A5_unknown_protocol_options_are_named_in_order_and_are_no_settings() -> None:
    pairs = [("_pq_.b", "1"), ("user", "alice"), ("_pq_.a", ""), ("TimeZone", "UTC")]
    startup = started(packet(pairs))
    assert startup.unknown == (b"_pq_.b", b"_pq_.a")
    assert startup.parameters == ((b"TimeZone", b"UTC"),)
    assert startup.version == PROTOCOL_3_0
    assert startup.negotiate == b"v\0\0\0\x1a\0\3\0\0\0\0\0\2_pq_.b\0_pq_.a\0"


@pytest.mark.parametrize(("minor", "long_key"), [(0, False), (1, False), (2, True), (3, True)])
def test_A7_the_version_decides_on_the_length_of_cancel_keys(minor: int, long_key: bool) -> None:
    startup = started(packet([("user", "alice")], 3 << 16 | minor))
    assert startup.long_key is long_key
    assert (startup.negotiate == b"") is (minor <= 2)


# -- lengths ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [0, 1, 4, 7, -1, -(2**31), 10_005, 2**30, 2**31 - 1])
def test_A8_a_length_that_cannot_be_is_closed_without_a_word(length: int) -> None:
    with pytest.raises(Refusal, match="invalid length of startup packet") as caught:
        packet_length(length.to_bytes(4, "big", signed=True))
    assert caught.value.reply == b""


@pytest.mark.parametrize("length", [8, 10_004])
def test_A8_the_shortest_and_the_longest_packet_are_read(length: int) -> None:
    assert packet_length(length.to_bytes(4, "big")) == length - 4


@pytest.mark.parametrize("code", [SSL_REQUEST, GSSENC_REQUEST])
def test_A8_a_request_with_something_behind_its_code_is_closed(code: int) -> None:
    with pytest.raises(Refusal) as caught:
        parse_packet(code.to_bytes(4, "big") + b"x")
    assert caught.value.reply == b""


@pytest.mark.parametrize("length", [1, 4, 32, 256])
def test_A8_a_cancel_request_has_a_key_of_up_to_256_bytes(length: int) -> None:
    assert parse_packet(body_of(messages.cancel_request(-5, b"k" * length))) == Cancel(-5, b"k" * length)


@pytest.mark.parametrize("body", [b"", b"pid", b"\0\0\0\1", b"\0\0\0\1" + b"k" * 257])
def test_A8_a_cancel_request_without_a_key_or_with_a_longer_one_is_closed(body: bytes) -> None:
    with pytest.raises(Refusal) as caught:
        parse_packet(messages.CANCEL_REQUEST.to_bytes(4, "big") + body)
    assert caught.value.reply == b""


# -- parameters -------------------------------------------------------------------------------------------


def test_parameters_keep_their_order_and_the_last_user_database_and_options_win() -> None:
    pairs = [("user", "bob"), ("search_path", "a"), ("database", "x"), ("user", "alice"), ("search_path", "b")]
    startup = started(packet([*pairs, ("options", "-c a=b"), ("database", "shop")]))
    assert (startup.user, startup.database, startup.options) == (b"alice", b"shop", b"-c a=b")
    assert startup.parameters == ((b"search_path", b"a"), (b"search_path", b"b"))
    assert startup.settings() == [(b"a", b"b"), (b"search_path", b"a"), (b"search_path", b"b")]


@pytest.mark.parametrize("pairs", [[], [("database", "")]])
def test_A11_a_missing_database_is_named_like_the_user(pairs: list[tuple[str, str]]) -> None:
    assert started(packet([("user", "alice"), *pairs])).database == b"alice"


@pytest.mark.parametrize("pairs", [[], [("user", "")], [("database", "x")]])
def test_A11_a_missing_user_is_refused(pairs: list[tuple[str, str]]) -> None:
    refusal = refused(packet(pairs))
    assert (refusal.sqlstate, refusal.text) == ("28000", "no PostgreSQL user name specified in startup packet")


def test_A11_a_missing_user_is_refused_after_the_protocol_was_negotiated() -> None:
    assert [kind for kind, _ in split(refused(packet([], GREASE)).reply)] == [b"v", b"E"]


def test_names_are_cut_as_postgresql_cuts_them() -> None:
    startup = started(packet([("user", "u" * 80), ("database", "d" * 80)]))
    assert (startup.user, startup.database) == (b"u" * 63, b"d" * 63)


@pytest.mark.parametrize(
    ("value", "meaning"),
    [("database", "database"), ("true", "true"), ("on", "true"), ("1", "true"), ("Y", "true"), ("TR", "true"),
     ("false", ""), ("0", ""), ("of", ""), ("n", "")],
)  # fmt: skip
def test_A9_replication_is_read_as_postgresql_reads_it(value: str, meaning: str) -> None:
    assert started(packet([("user", "alice"), ("replication", value)])).replication == meaning


BAD_LAYOUTS = {
    "nothing": b"",
    "no end": b"user\0alice\0",
    "no value": b"user\0\0",
    "no value, cut": b"user\0",
    "name without end": b"user",
    "end in the middle": b"user\0alice\0\0more\0",
    "two ends": b"user\0alice\0\0\0",
    "only ends": b"\0\0",
    "value without end": b"user\0alice",
}


@pytest.mark.parametrize("layout", BAD_LAYOUTS.values(), ids=BAD_LAYOUTS)
def test_A8_a_layout_that_is_wrong_is_refused(layout: bytes) -> None:
    refusal = refused(framed(b"\0\3\0\0" + layout))
    assert refusal.sqlstate == "08P01"
    assert refusal.text == "invalid startup packet layout: expected terminator as last byte"


# -- against the server -----------------------------------------------------------------------------------

CONVERSATIONS: dict[str, list[bytes]] = {
    "plain": [ALICE],
    "ssl": [SSL, ALICE],
    "gss": [GSS, ALICE],
    "ssl, gss": [SSL, GSS, ALICE],
    "gss, ssl": [GSS, SSL, ALICE],
    "ssl twice": [SSL, SSL],
    "gss twice": [GSS, SSL, GSS],
    "behind ssl": [SSL + ALICE],
    "behind gss": [GSS + b"x"],
    "behind ssl after gss": [GSS, SSL + ALICE],
    "2.0": [packet([("user", "alice")], 2 << 16)],
    "0.0": [packet([("user", "alice")], 0)],
    "0.1": [packet([("user", "alice")], 1)],
    "2.7": [packet([("user", "alice")], 2 << 16 | 7)],
    "4.0": [packet([("user", "alice")], 4 << 16)],
    "3.1": [packet([("user", "alice")], 3 << 16 | 1)],
    "3.2": [packet([("user", "alice")], PROTOCOL_3_2)],
    "3.3": [packet([("user", "alice")], NEWER)],
    "3.9999": [packet([("user", "alice"), ("_pq_.test_protocol_negotiation", "")], GREASE)],
    "unknown options in 3.0": [packet([("_pq_.x", "1"), ("user", "alice"), ("_pq_.y", ""), ("_pq_.x", "2")])],
    "unknown options in 3.1": [packet([("user", "alice"), ("_pq_.x", "1")], 3 << 16 | 1)],
    "unknown options in 3.2": [packet([("user", "alice"), ("_pq_.x", "1")], PROTOCOL_3_2)],
    "no user": [packet([])],
    "empty user": [packet([("user", ""), ("database", "x")])],
    "no user in 3.3": [packet([("_pq_.x", "")], NEWER)],
    "replication": [packet([("user", "alice"), ("replication", "maybe")])],
    "replication o": [packet([("user", "alice"), ("replication", "o")])],
    "replication nothing": [packet([("user", "alice"), ("replication", "")])],
    "too short": [b"\0\0\0\7\0\3\0"],
    "too long": [(10_005).to_bytes(4, "big") + b"\0\3\0\0"],
    "the longest": [packet([("user", "alice"), ("a.b", "x" * (10_000 - 4 - 11 - 4 - 1 - 1))])],
    "negative": [b"\xff\xff\xff\xff\0\3\0\0"],
    "zero": [b"\0\0\0\0"],
    "cancel without key": [framed(messages.CANCEL_REQUEST.to_bytes(4, "big") + b"\0\0\0\1")],
    "cancel of nobody": [messages.cancel_request(2**31 - 1, b"keys")],
    **{f"layout: {name}": [framed(b"\0\3\0\0" + layout)] for name, layout in BAD_LAYOUTS.items()},
}


@pytest.mark.pg
@pytest.mark.parametrize("packets", CONVERSATIONS.values(), ids=CONVERSATIONS)
def test_A1_to_A11_the_server_says_the_same(pg18: Postgres, packets: list[bytes]) -> None:
    assert our_verdict(packets) == server_verdict(pg18, packets)


def test_the_longest_conversation_is_the_longest() -> None:
    assert len(CONVERSATIONS["the longest"][0]) == 10_004


# -- as they come from a network --------------------------------------------------------------------------


async def conversation(inbox: Inbox, hello: Hello) -> bytes:
    """What a proxy without TLS says, however the bytes come."""
    said = b""
    try:
        while True:
            length = packet_length(await inbox.exactly(4))
            step = hello.packet(await inbox.exactly(length), inbox.buffered())
            if not isinstance(step, Answer):
                return said + (step.negotiate if isinstance(step, Startup) else b"")
            said += step.reply
    except Refusal as refusal:
        return said + refusal.reply
    except ConnectionResetError:
        return said


async def said_to(pieces: list[bytes]) -> tuple[bytes, bytes]:
    """What is said to pieces that come one after the other, and what is left unread."""
    inbox = Inbox(lambda: None, lambda: None)
    talking = asyncio.create_task(conversation(inbox, Hello(tls=False)))
    for piece in pieces:
        await asyncio.sleep(0)
        inbox.feed(piece)
    await asyncio.sleep(0)
    inbox.end()
    return await talking, inbox.take()


CUT = {name: packets for name, packets in CONVERSATIONS.items() if not name.startswith("behind")}


@pytest.mark.parametrize("packets", CUT.values(), ids=CUT)
def test_A8_byte_by_byte_the_same_is_said(packets: list[bytes]) -> None:
    stream = b"".join(packets)
    said, _ = asyncio.run(said_to([stream[at : at + 1] for at in range(len(stream))]))
    assert verdict(said) == our_verdict(packets)


def test_what_follows_a_startup_packet_is_left_for_later() -> None:
    assert asyncio.run(said_to([ALICE + messages.password(b"secret\0")])) == (b"", messages.password(b"secret\0"))


# -- any bytes --------------------------------------------------------------------------------------------

texts = st.binary(max_size=12).map(lambda raw: raw.replace(b"\0", b""))
names = st.sampled_from([b"user", b"database", b"options", b"replication", b"_pq_.x", b"TimeZone"]) | texts
near_misses = st.builds(
    lambda version, parts: version + b"\0".join(parts),
    st.sampled_from(
        [b"\0\3\0\0", b"\0\3\0\2", b"\0\3\x27\x0f", b"\0\2\0\0", b"\x04\xd2\x16\x2f", b"\x04\xd2\x16\x2e"]
    ),
    st.lists(names, max_size=8),
)


def attempt(parse: Callable[[bytes], object], data: bytes) -> object:
    try:
        return parse(data)
    except Refusal as refusal:
        return refusal


@given(st.binary(max_size=300) | near_misses)
def test_no_packet_does_worse_than_be_refused(body: bytes) -> None:
    found = attempt(parse_packet, body)
    assert isinstance(found, (EncryptionRequest, Cancel, Startup, Refusal))
    if isinstance(found, Refusal):
        assert len(found.reply) < 3 * len(body) + 300


@given(st.binary(min_size=4, max_size=4))
def test_no_length_asks_for_more_than_postgresql_takes(head: bytes) -> None:
    found = attempt(packet_length, head)
    if isinstance(found, Refusal):
        assert found.reply == b""
    else:
        assert found in range(4, messages.MAX_STARTUP_BYTES + 1)


@given(st.lists(st.tuples(names.filter(bool), texts), max_size=6))
def test_whatever_is_asked_for_is_read_back(pairs: list[tuple[bytes, bytes]]) -> None:
    pairs = [(b"user", b"alice"), *(pair for pair in pairs if pair[0] not in (b"user", b"replication"))]
    startup = started(packet(pairs))
    assert startup.user == b"alice"
    named = [(name, value) for name, value in pairs if name not in (b"user", b"database", b"options")]
    assert [*startup.parameters] == [pair for pair in named if not pair[0].startswith(b"_pq_.")]
    assert [*startup.unknown] == [name for name, _ in named if name.startswith(b"_pq_.")]
