"""The PROXY protocol, versions 1 and 2: what a load balancer says of the client behind it, before anything else.

`parse_header` looks at what has come so far and never reads behind the header. It takes nothing that is not the
protocol to the letter: a header that can be read in two ways would let a client choose its address. What is valid
and tells no TCP address (LOCAL, UNKNOWN, Unix sockets, datagrams) leaves the connection its own. It does not say
whom to believe.

Source: haproxy.org, proxy-protocol.txt, sections 2.1 and 2.2; RFC 4960, appendix B (CRC32c).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address

from cenote.errors import ProtocolError

#: The longest header that is taken. The protocol allows 65,551 bytes; balancers send some hundred.
MAX_HEADER_BYTES = 4096

_V1 = b"PROXY "
_V1_MAX_BYTES = 107
_V1_LINE = re.compile(
    rb"PROXY (TCP[46]) ([0-9a-fA-F:.]+) ([0-9a-fA-F:.]+) (0|[1-9][0-9]{0,4}) (0|[1-9][0-9]{0,4})"
)
_V2 = b"\r\n\r\n\0\r\nQUIT\n"
_V2_FIXED = 16  # signature, version and command, family and transport, length
_LOCAL, _PROXY = 0x20, 0x21
_FAMILIES, _TRANSPORTS = 3, 2  # the highest that are assigned
_TCP4, _TCP6 = 0x11, 0x21
_ADDRESSES = {1: 12, 2: 36, 3: 216}  # bytes, by family
_AUTHORITY, _CRC32C, _UNIQUE_ID, _SSL, _SSL_CN = 0x02, 0x03, 0x05, 0x20, 0x22
_CERTIFICATE = 0x02 | 0x04  # the client has shown one on this connection, or in this TLS session
_LABEL_LENGTH = 128


@dataclass(frozen=True, slots=True)
class ProxyHeader:
    """What a header says.

    length: in bytes; what follows is the client's. source: its address and port; None: the connection's own hold.
    label: the name in the certificate it has proven to have, else the host name it asked for, else the unique id
    """

    length: int
    source: tuple[str, int] | None = None
    label: str = ""


def parse_header(data: bytes) -> ProxyHeader | None:
    """Read the header that `data` begins with; None while more must come. O(header)

    :raises ProtocolError: this can become no header, whatever follows.
    """
    if data[:1] == _V2[:1]:
        return _parse_v2(data)
    return _parse_v1(data)


# -- version 1: a line ----------------------------------------------------------------------------------------


def _parse_v1(data: bytes) -> ProxyHeader | None:
    if not data.startswith(_V1[: len(data)]):
        raise ProtocolError("there is no PROXY header")
    end = data.find(b"\n", 0, _V1_MAX_BYTES)
    if end < 0:
        if len(data) >= _V1_MAX_BYTES:
            raise ProtocolError(f"a PROXY header has no end within {_V1_MAX_BYTES} bytes")
        return None
    if data[end - 1 : end] != b"\r":
        raise ProtocolError("a PROXY header ends in a line feed alone")
    line = data[: end - 1]
    if b"\r" in line or b"\0" in line:
        raise ProtocolError("a PROXY header has a control character in it")
    if line == b"PROXY UNKNOWN" or line.startswith(b"PROXY UNKNOWN "):
        return ProxyHeader(end + 1)
    found = _V1_LINE.fullmatch(line)
    if found is None:
        raise ProtocolError("a PROXY header of version 1 that is malformed")
    kind = IPv4Address if found[1] == b"TCP4" else IPv6Address
    try:
        source, _ = (kind(found[place].decode()) for place in (2, 3))
    except ValueError as error:
        raise ProtocolError(f"a PROXY header whose address is none: {error}") from None
    ports = int(found[4]), int(found[5])
    if max(ports) > 0xFFFF:
        raise ProtocolError(f"a PROXY header whose port is none: {max(ports)}")
    return ProxyHeader(end + 1, (_shown(source), ports[0]))


# -- version 2: binary ----------------------------------------------------------------------------------------


def _parse_v2(data: bytes) -> ProxyHeader | None:
    if not data.startswith(_V2[: len(data)]):
        raise ProtocolError("there is no PROXY header")
    if len(data) > len(_V2) and data[12] not in (_LOCAL, _PROXY):
        raise ProtocolError(f"a PROXY header of version {data[12] >> 4}, command {data[12] & 15}")
    if len(data) < _V2_FIXED:
        return None
    length = _V2_FIXED + int.from_bytes(data[14:16], "big")
    if length > MAX_HEADER_BYTES:
        raise ProtocolError(f"a PROXY header of {length} bytes: at most {MAX_HEADER_BYTES} are taken")
    family, transport = data[13] >> 4, data[13] & 15
    if data[12] == _PROXY:
        if family > _FAMILIES or transport > _TRANSPORTS:
            raise ProtocolError(f"a PROXY header of address family {family}, transport {transport}")
        if family and transport and length < _V2_FIXED + _ADDRESSES[family]:
            raise ProtocolError("a PROXY header that is too short for its addresses")
    if len(data) < length:
        return None
    if data[12] == _LOCAL or not family or not transport:
        return ProxyHeader(length)  # the rest of it is to be ignored
    behind = _V2_FIXED + _ADDRESSES[family]
    label = _label(data[:length], behind)
    if data[13] == _TCP4:
        source: IPv4Address | IPv6Address = IPv4Address(data[16:20])
    elif data[13] == _TCP6:
        source = IPv6Address(data[16:32])
    else:
        return ProxyHeader(length, None, label)
    return ProxyHeader(length, (_shown(source), int.from_bytes(data[behind - 4 : behind - 2], "big")), label)


def _label(header: bytes, behind: int) -> str:
    """The best name in the vectors that follow the addresses; all of them are checked."""
    certificate = authority = unique = ""
    for kind, at, value in _vectors(header, behind, len(header)):
        if kind == _CRC32C:
            if len(value) != 4 or _crc32c(header[:at] + bytes(4) + header[at + 4 :]) != int.from_bytes(
                value, "big"
            ):
                raise ProtocolError("a PROXY header whose checksum is wrong")
        elif kind == _AUTHORITY:
            authority = authority or _legible(value)
        elif kind == _UNIQUE_ID:
            unique = unique or _legible(value)
        elif kind == _SSL:
            if len(value) < 5:
                raise ProtocolError("a PROXY header whose TLS part is cut off")
            proven = value[0] & _CERTIFICATE and not any(value[1:5])
            for part, _, name in _vectors(header, at + 5, at + len(value)):
                if part == _SSL_CN and proven:
                    certificate = certificate or _legible(name)
    return certificate or authority or unique


def _vectors(data: bytes, begin: int, end: int) -> Iterator[tuple[int, int, bytes]]:
    """Type, place and value of each."""
    while begin < end:
        at = begin + 3
        begin = at + int.from_bytes(data[begin + 1 : at], "big")
        if begin > end or at > end:
            raise ProtocolError("a PROXY header with a part that is cut off")
        yield data[at - 3], at, data[at:begin]


# -- words ----------------------------------------------------------------------------------------------------


def _shown(address: IPv4Address | IPv6Address) -> str:
    """As rules and logs have it: an IPv4 address inside IPv6 is one."""
    inner = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return str(inner or address)


def _legible(value: bytes) -> str:
    """As a text, or in hexadecimal digits where it is none."""
    try:
        text = value.decode()
    except UnicodeDecodeError:
        text = ""
    return (text if text.isprintable() and text else value.hex())[:_LABEL_LENGTH]


def _crc32c(data: bytes) -> int:
    crc = 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ _CRC_TABLE[(crc ^ byte) & 0xFF]
    return crc ^ 0xFFFFFFFF


def _crc_table() -> list[int]:
    table = []
    for number in range(256):
        crc = number
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
        table.append(crc)
    return table


_CRC_TABLE = _crc_table()
