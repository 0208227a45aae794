"""PROXY protocol headers: every form of both versions, in pieces of every size, and nothing that resembles one."""

import ipaddress
import random
import struct

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from login_kit import mutated

from cenote.errors import ProtocolError
from cenote.wire.proxy_header import MAX_HEADER_BYTES, ProxyHeader, parse_header

SIGNATURE = bytes.fromhex("0d0a0d0a000d0a515549540a")
ADDRESSES_4 = bytes([203, 0, 113, 9, 10, 0, 0, 1]) + struct.pack("!HH", 51034, 6432)
ADDRESSES_6 = (
    ipaddress.ip_address("2001:db8::9").packed
    + ipaddress.ip_address("::1").packed
    + struct.pack("!HH", 51034, 6432)
)
CLIENT = ("203.0.113.9", 51034)
CLIENT_6 = ("2001:db8::9", 51034)
TRAILING = [b"", b"\0", b"\r\n", b"\0\0\0\x08\x04\xd2\x16\x2f", b"PROXY TCP4 9.9.9.9 9.9.9.9 9 9\r\n"]


def v2(body: bytes, *, command: int = 0x21, family: int = 0x11) -> bytes:
    return SIGNATURE + bytes([command, family]) + struct.pack("!H", len(body)) + body


def vector(kind: int, value: bytes) -> bytes:
    return struct.pack("!BH", kind, len(value)) + value


def tls(name: bytes, *, client: int = 0x07, verify: int = 0) -> bytes:
    return vector(0x20, struct.pack("!BI", client, verify) + vector(0x21, b"TLSv1.3") + vector(0x22, name))


def checked(body: bytes) -> bytes:
    """With its checksum, in the way of the specification: computed with zeros in its place."""
    crc = 0xFFFFFFFF
    for byte in v2(body + vector(3, bytes(4))):
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ 0x82F63B78 * (crc & 1)
    return v2(body + vector(3, struct.pack("!I", crc ^ 0xFFFFFFFF)))


AUTHORITY = vector(2, b"orders.example.net")
HEADERS = {
    "v1-tcp4": (b"PROXY TCP4 203.0.113.9 10.0.0.1 51034 6432\r\n", CLIENT, ""),
    "v1-tcp6": (b"PROXY TCP6 2001:DB8::9 ::1 51034 6432\r\n", CLIENT_6, ""),
    "v1-tcp6-long": (
        b"PROXY TCP6 2001:0db8:0000:0000:0000:0000:0000:0009 " + b"ffff:" * 7 + b"ffff 51034 65535\r\n",
        CLIENT_6,
        "",
    ),
    "v1-mapped": (b"PROXY TCP6 ::ffff:203.0.113.9 ::1 51034 6432\r\n", CLIENT, ""),
    "v1-port-0": (b"PROXY TCP4 203.0.113.9 10.0.0.1 0 0\r\n", (CLIENT[0], 0), ""),
    "v1-unknown": (b"PROXY UNKNOWN\r\n", None, ""),
    "v1-unknown-more": (b"PROXY UNKNOWN ffff::1 nonsense 65535 70000\r\n", None, ""),
    "v2-tcp4": (v2(ADDRESSES_4), CLIENT, ""),
    "v2-tcp6": (v2(ADDRESSES_6, family=0x21), CLIENT_6, ""),
    "v2-udp": (v2(ADDRESSES_4, family=0x12), None, ""),
    "v2-unix": (v2(bytes(216), family=0x31), None, ""),
    "v2-local": (v2(b"", command=0x20, family=0), None, ""),
    "v2-local-with-addresses": (v2(ADDRESSES_4 + AUTHORITY, command=0x20), None, ""),
    "v2-local-of-no-family": (v2(b"", command=0x20, family=0xFF), None, ""),
    "v2-unspecified": (v2(b"whatever", family=0), None, ""),
    "v2-family-without-transport": (v2(b"x", family=0x10), None, ""),
    "v2-authority": (v2(ADDRESSES_4 + AUTHORITY), CLIENT, "orders.example.net"),
    "v2-padding-and-unknown": (
        v2(ADDRESSES_6 + vector(4, bytes(9)) + vector(0xEE, b"?"), family=0x21),
        CLIENT_6,
        "",
    ),
    "v2-certificate": (v2(ADDRESSES_4 + AUTHORITY + tls(b"billing")), CLIENT, "billing"),
    "v2-certificate-of-the-session": (v2(ADDRESSES_4 + tls(b"billing", client=0x05)), CLIENT, "billing"),
    "v2-certificate-that-was-not-verified": (v2(ADDRESSES_4 + tls(b"billing", verify=18)), CLIENT, ""),
    "v2-no-certificate-shown": (v2(ADDRESSES_4 + AUTHORITY + tls(b"x", client=1)), CLIENT, "orders.example.net"),
    "v2-unique-id": (v2(ADDRESSES_4 + vector(5, b"\x01\xff")), CLIENT, "01ff"),
    "v2-name-that-is-no-text": (v2(ADDRESSES_4 + vector(2, b"a\nb")), CLIENT, "610a62"),
    "v2-checksum": (checked(ADDRESSES_4 + AUTHORITY), CLIENT, "orders.example.net"),
    "v2-longest": (v2(ADDRESSES_4 + vector(4, bytes(MAX_HEADER_BYTES - 16 - 12 - 3))), CLIENT, ""),
}

REFUSED = {
    "startup": b"\0\0\0\x08",
    "tls": b"\x16\x03\x01",
    "http": b"GET / HTTP/1.1\r\n",
    "lower-case": b"proxy",
    "v1-other-family": b"PROXY TCP5 1.1.1.1 1.1.1.1 1 1\r\n",
    "v1-udp": b"PROXY UDP4 1.1.1.1 1.1.1.1 1 1\r\n",
    "v1-nothing": b"PROXY \r\n",
    "v1-unknown-word": b"PROXY UNKNOWNS\r\n",
    "v1-two-blanks": b"PROXY TCP4  1.1.1.1 1.1.1.1 1 1\r\n",
    "v1-trailing-blank": b"PROXY TCP4 1.1.1.1 1.1.1.1 1 1 \r\n",
    "v1-tab": b"PROXY\tTCP4 1.1.1.1 1.1.1.1 1 1\r\n",
    "v1-line-feed-alone": b"PROXY TCP4 1.1.1.1 1.1.1.1 1 1\n",
    "v1-carriage-return-inside": b"PROXY UNKNOWN \r 1\r\n",
    "v1-zero-inside": b"PROXY UNKNOWN \0\r\n",
    "v1-leading-zero": b"PROXY TCP4 1.1.1.01 1.1.1.1 1 1\r\n",
    "v1-leading-zero-in-port": b"PROXY TCP4 1.1.1.1 1.1.1.1 01 1\r\n",
    "v1-port-too-high": b"PROXY TCP4 1.1.1.1 1.1.1.1 65536 1\r\n",
    "v1-destination-port-too-high": b"PROXY TCP4 1.1.1.1 1.1.1.1 1 65536\r\n",
    "v1-negative-port": b"PROXY TCP4 1.1.1.1 1.1.1.1 -1 1\r\n",
    "v1-three-numbers": b"PROXY TCP4 1.1.1 1.1.1.1 1 1\r\n",
    "v1-6-as-4": b"PROXY TCP4 ::1 ::1 1 1\r\n",
    "v1-4-as-6": b"PROXY TCP6 1.1.1.1 1.1.1.1 1 1\r\n",
    "v1-scope": b"PROXY TCP6 fe80::1%eth0 ::1 1 1\r\n",
    "v1-too-long": b"PROXY UNKNOWN " + b"x" * 93,
    "v1-too-long-with-end": b"PROXY UNKNOWN " + b"x" * 92 + b"\r\n",
    "v2-other-signature": SIGNATURE[:-1] + b"\r",
    "v2-version-1": v2(ADDRESSES_4, command=0x11),
    "v2-version-3": v2(ADDRESSES_4, command=0x31),
    "v2-command-2": v2(ADDRESSES_4, command=0x22),
    "v2-family-4": v2(ADDRESSES_4, family=0x41),
    "v2-transport-3": v2(ADDRESSES_4, family=0x13),
    "v2-short-4": v2(ADDRESSES_4[:-1]),
    "v2-short-6": v2(ADDRESSES_4, family=0x21),
    "v2-short-unix": v2(bytes(215), family=0x31),
    "v2-too-long": SIGNATURE + b"\x21\x11" + struct.pack("!H", MAX_HEADER_BYTES - 15),
    "v2-longest-there-is": SIGNATURE + b"\x21\x11\xff\xff",
    "v2-vector-without-length": v2(ADDRESSES_4 + b"\x02\0"),
    "v2-vector-cut-off": v2(ADDRESSES_4 + AUTHORITY[:-1]),
    "v2-tls-cut-off": v2(ADDRESSES_4 + vector(0x20, b"\7\0\0\0")),
    "v2-tls-name-cut-off": v2(ADDRESSES_4 + vector(0x20, bytes(5) + b"\x22\0\x09x") + AUTHORITY),
    "v2-wrong-checksum": checked(ADDRESSES_4)[:-1] + b"\0",
    "v2-short-checksum": v2(ADDRESSES_4 + vector(3, b"\0")),
}


@pytest.mark.parametrize("name", HEADERS)
def test_A20_a_header_is_read_whole_with_whatever_follows_it(name: str) -> None:
    header, source, label = HEADERS[name]
    for trailing in TRAILING:
        assert parse_header(header + trailing) == ProxyHeader(len(header), source, label)


@pytest.mark.parametrize("name", HEADERS)
def test_A20_a_header_is_waited_for_byte_by_byte(name: str) -> None:
    header = HEADERS[name][0]
    assert [size for size in range(len(header)) if parse_header(header[:size]) is not None] == []


@pytest.mark.parametrize("name", REFUSED)
def test_A20_what_is_not_exactly_a_header_is_refused(name: str) -> None:
    raw = REFUSED[name]
    for trailing in TRAILING:
        with pytest.raises(ProtocolError):
            parse_header(raw + trailing)


@pytest.mark.parametrize("name", REFUSED)
def test_A20_no_piece_of_what_is_refused_passes_for_a_header(name: str) -> None:
    raw = REFUSED[name]
    for size in range(len(raw)):
        try:
            assert parse_header(raw[:size]) is None
        except ProtocolError:
            return


@pytest.mark.parametrize("first", [b"\0", b"\x16", b"p", b"G", b"\n", b"\x0c", b"\xff"])
def test_A20_the_first_byte_tells_that_there_is_no_header(first: bytes) -> None:
    with pytest.raises(ProtocolError, match="there is no PROXY header"):
        parse_header(first)


def test_A20_the_checksum_is_the_one_of_RFC_4960() -> None:
    """The specification's own examples: 32 bytes of zeros, of ones, and ascending."""
    from cenote.wire.proxy_header import _crc32c

    assert _crc32c(bytes(32)) == 0x8A9136AA
    assert _crc32c(b"\xff" * 32) == 0x62A8AB43
    assert _crc32c(bytes(range(32))) == 0x46DD794E


def test_A20_a_label_is_bounded() -> None:
    found = parse_header(v2(ADDRESSES_4 + vector(2, b"x" * 2000)))
    assert found is not None
    assert found.label == "x" * 128


@given(st.integers(0, 2**32), st.integers(0, 3))
def test_A20_mutated_headers_are_read_or_refused_and_never_more(seed: int, times: int) -> None:
    chance = random.Random(seed)
    raw = chance.choice([header for header, _, _ in HEADERS.values()])
    for _ in range(times):
        raw = mutated(raw, chance)
    _sound(raw)


@given(st.binary(max_size=200))
@example(b"")
def test_A20_any_bytes_are_read_or_refused_and_never_more(raw: bytes) -> None:
    for start in (b"", b"PROXY ", b"PROXY TCP4 ", SIGNATURE, SIGNATURE + b"\x21\x11\0"):
        _sound(start + raw)


def _sound(raw: bytes) -> None:
    """Nothing but a verdict comes of it; the same one for any continuation, and within the bound."""
    try:
        found = parse_header(raw)
    except ProtocolError:
        with pytest.raises(ProtocolError):
            parse_header(raw + b"\r\n")
        return
    if found is None:
        assert len(raw) < MAX_HEADER_BYTES
        return
    assert 0 < found.length <= min(len(raw), MAX_HEADER_BYTES)
    assert parse_header(raw[: found.length]) == found
    assert parse_header(raw + b"x") == found
    if found.source is not None:
        ipaddress.ip_address(found.source[0])
        assert 0 <= found.source[1] <= 0xFFFF
    assert found.label.isprintable()
