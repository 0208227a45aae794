"""A client's first packets: encryption requests, cancel requests, direct TLS, the startup packet.

`packet_length` and `parse_packet` read one packet; `Hello` knows what a client may still ask for. Everything
follows PostgreSQL 18 (backend_startup.c) to the byte, but for two things it lets pass and this refuses: an
encryption request with bytes behind its code, and a startup packet that ends in one stray byte instead of its
terminator. It reads nothing and sends nothing; the text of `options` is read by `cenote.wire.options`.

    hello = Hello(tls=True)
    step = hello.first_byte(byte)                 # StartTLS (direct TLS), or None: packets follow
    body = <as many bytes as packet_length(head of 4 bytes) says>
    step = hello.packet(body, bytes_buffered_behind_it)
    # Answer: send it, read the next packet.  StartTLS: send it, do the handshake, then hello.secured(alpn).
    # Cancel, Startup: the end of the hello.  Refusal is raised: send its reply, close.
"""

from __future__ import annotations

from dataclasses import dataclass

from cenote.wire import messages
from cenote.wire.messages import (
    CANCEL_REQUEST,
    GSSENC_REQUEST,
    MAX_STARTUP_BYTES,
    PROTOCOL_3_0,
    PROTOCOL_3_2,
    SSL_REQUEST,
)
from cenote.wire.options import parse_options
from cenote.wire.refusal import Refusal
from cenote.wire.tls import ALPN

_TLS_HANDSHAKE = 0x16  # the first byte of a TLS ClientHello; as a length it would be 369 MB
_MAX_CANCEL_KEY = 256
_NAME_BYTES = 63  # NAMEDATALEN - 1: longer names are cut, as PostgreSQL cuts them before it looks them up


@dataclass(frozen=True, slots=True)
class EncryptionRequest:
    """SSLRequest or GSSENCRequest, told apart by `code`."""

    code: int


@dataclass(frozen=True, slots=True)
class Cancel:
    """CancelRequest: the query of the connection with this key shall end. It gets no answer."""

    pid: int
    secret: bytes


@dataclass(frozen=True, slots=True)
class Startup:
    """A session is asked for. `negotiate` goes to the client before anything else (b"": nothing to say).

    version: the protocol spoken from here on, at most 3.2. parameters: what remains beside the named ones, in
    order, names as often as they came. unknown: `_pq_.` options. replication: "", "true" or "database".
    database: the user's name where none was given, also for `replication=true`, where PostgreSQL ignores it.
    """

    version: int
    user: bytes
    database: bytes
    replication: str
    options: bytes
    parameters: tuple[tuple[bytes, bytes], ...]
    unknown: tuple[bytes, ...]
    negotiate: bytes

    @property
    def long_key(self) -> bool:
        """Whether this client takes cancel keys of more than four bytes."""
        return self.version >= PROTOCOL_3_2

    def settings(self) -> list[tuple[bytes, bytes]]:
        """Every setting asked for, in the order in which PostgreSQL applies them: a later one wins.

        :raises Refusal: `options` cannot be understood. PostgreSQL says so after authentication.
        """
        return [*parse_options(self.options), *self.parameters]


@dataclass(frozen=True, slots=True)
class Answer:
    """Send `reply`; the next packet follows."""

    reply: bytes


@dataclass(frozen=True, slots=True)
class StartTLS:
    """Send `reply` (empty for direct TLS), then do a handshake, then call `Hello.secured`."""

    reply: bytes


def packet_length(head: bytes) -> int:
    """How many bytes follow the first four of a packet, which say so.

    :raises Refusal: fewer than a code needs, or more than PostgreSQL takes. Closed without a word.
    """
    length = int.from_bytes(head[:4], "big", signed=True) - 4
    if not 4 <= length <= MAX_STARTUP_BYTES:
        raise _silence(f"invalid length of startup packet: {length + 4} bytes")
    return length


def parse_packet(body: bytes) -> EncryptionRequest | Cancel | Startup:
    """Read a packet; `body` is all behind its length.

    :raises Refusal: a protocol that is not spoken here, a layout or a value that is wrong, no user.
    """
    code = int.from_bytes(body[:4], "big")
    if code in (SSL_REQUEST, GSSENC_REQUEST):
        if len(body) != 4:
            raise _silence(f"invalid length of an encryption request: {len(body) + 4} bytes")
        return EncryptionRequest(code)
    if code == CANCEL_REQUEST:
        if not 1 <= len(body) - 8 <= _MAX_CANCEL_KEY:
            raise _silence(f"invalid length of cancel key in cancel request packet: {len(body) - 8} bytes")
        return Cancel(int.from_bytes(body[4:8], "big", signed=True), body[8:])
    if code >> 16 != PROTOCOL_3_0 >> 16:
        raise _unsupported(code)
    return _parse_startup(code, body)


class Hello:
    """What one client may still ask for before its session begins.

    tls: TLS is configured. unix: the client came through a Unix socket, where PostgreSQL has no TLS.
    tls_required: a session needs TLS (not on a Unix socket; a cancel request does not need it either).
    """

    __slots__ = ("_direct", "_offers_tls", "_open", "_secure", "_tls_required")

    def __init__(self, *, tls: bool, unix: bool = False, tls_required: bool = False) -> None:
        self._offers_tls = tls and not unix
        self._tls_required = tls_required and not unix
        self._open = {SSL_REQUEST, GSSENC_REQUEST}  # the requests that may still come, each once
        self._direct = False
        self._secure = False

    def first_byte(self, byte: int) -> StartTLS | None:
        """What the very first byte of a connection means; it stays unread.

        :raises Refusal: it begins a TLS handshake, and there is no TLS here.
        """
        if byte != _TLS_HANDSHAKE:
            return None
        if not self._offers_tls:
            raise _silence("a direct TLS connection, and TLS is off")
        self._direct = True
        return StartTLS(b"")

    def secured(self, alpn: str | None) -> None:
        """The handshake is done; `alpn` is the protocol that it chose.

        :raises Refusal: direct TLS without ALPN: another protocol's client may have been led here.
        """
        if self._direct and alpn != ALPN:
            raise _silence(
                "received direct SSL connection request without ALPN protocol negotiation extension", "08P01"
            )
        self._secure = True

    def packet(self, body: bytes, behind: int) -> Answer | StartTLS | Cancel | Startup:
        """What the next packet asks for. `behind`: how many bytes have come after it.

        :raises Refusal: a packet that `parse_packet` refuses or that may not come now.
        """
        packet = parse_packet(body)
        if isinstance(packet, EncryptionRequest):
            return self._encryption(packet.code, behind)
        if isinstance(packet, Startup) and self._tls_required and not self._secure:
            raise Refusal(
                "28000", "cenote: this server accepts connections with TLS only", hint="Use sslmode=require."
            )
        return packet

    def _encryption(self, code: int, behind: int) -> Answer | StartTLS:
        if code not in self._open:
            raise _unsupported(code)
        accepted = code == SSL_REQUEST and self._offers_tls and not self._secure
        if behind:
            raise _injected(code, accepted)
        if accepted:
            self._open.clear()
            return StartTLS(b"S")
        self._open.remove(code)
        return Answer(b"N")


def _silence(text: str, sqlstate: str = "08P01") -> Refusal:
    return Refusal(sqlstate, text, reply=b"")


def _injected(code: int, accepted: bool) -> Refusal:
    """Unencrypted bytes that would be taken for encrypted ones (CVE-2021-3935). Nothing may be said before a
    handshake: the client would have to trust it. Where the answer is no, PostgreSQL says it and why."""
    what = "SSL request" if code == SSL_REQUEST else "GSSAPI encryption request"
    refusal = Refusal(
        "08P01",
        f"received unencrypted data after {what}",
        detail="This could be either a client-software bug or evidence of an attempted man-in-the-middle attack.",
    )
    refusal.reply = b"" if accepted else b"N" + refusal.reply
    return refusal


def _unsupported(code: int) -> Refusal:
    text = f"unsupported frontend protocol {code >> 16}.{code & 0xFFFF}: server supports 3.0 to 3.2"
    if 0 < code < PROTOCOL_3_0:
        return Refusal("0A000", text, reply=messages.error_version_2(f"FATAL:  {text}\n"))
    return Refusal("0A000", text)


def _parse_startup(version: int, body: bytes) -> Startup:
    """The rest of a startup packet: pairs of texts, then a zero as the very last byte."""
    rest = body[4:]
    texts = [] if rest == b"\0" else rest[:-2].split(b"\0")
    if rest[-2:] not in (b"\0", b"\0\0") or len(texts) % 2 or b"" in texts[::2]:
        raise Refusal("08P01", "invalid startup packet layout: expected terminator as last byte")
    named: dict[bytes, bytes] = {b"user": b"", b"database": b"", b"options": b""}
    parameters = []
    unknown = []
    replication = ""
    for name, value in zip(texts[::2], texts[1::2], strict=True):
        if name in named:
            named[name] = value
        elif name == b"replication":
            replication = _replication(value)
        elif name.startswith(b"_pq_."):
            unknown.append(name)
        else:
            parameters.append((name, value))
    spoken = min(version, PROTOCOL_3_2)
    # Our newest minor, or the client's where that is older: it may have asked for unknown options only.
    negotiate = b""
    if version > PROTOCOL_3_2 or unknown:
        negotiate = messages.negotiate_protocol_version(spoken, unknown)
    user = named[b"user"]
    if not user:
        refusal = Refusal("28000", "no PostgreSQL user name specified in startup packet")
        refusal.reply = negotiate + refusal.reply
        raise refusal
    return Startup(
        version=spoken,
        user=user[:_NAME_BYTES],
        database=(named[b"database"] or user)[:_NAME_BYTES],
        replication=replication,
        options=named[b"options"],
        parameters=tuple(parameters),
        unknown=tuple(unknown),
        negotiate=negotiate,
    )


def _replication(value: bytes) -> str:
    if value == b"database":
        return "database"
    given = _boolean(value)
    if given is None:
        raise Refusal(
            "22023",
            f'invalid value for parameter "replication": "{value.decode("utf-8", "replace")}"',
            hint='Valid values are: "false", 0, "true", 1, "database".',
        )
    return "true" if given else ""


def _boolean(value: bytes) -> bool | None:
    """A boolean as PostgreSQL's parse_bool reads it: any unambiguous beginning of a word, in any case."""
    text = value.lower()
    if text in (b"o", b""):
        return None
    for word, meaning in ((b"true", True), (b"yes", True), (b"on", True), (b"1", True),
                          (b"false", False), (b"no", False), (b"off", False), (b"0", False)):  # fmt: skip
        if word.startswith(text):
            return meaning
    return None
