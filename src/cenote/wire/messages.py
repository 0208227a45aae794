"""Single messages of PostgreSQL's protocol, built and taken apart. Cold paths only: the relay scans frames.

Source: PostgreSQL documentation, "Frontend/Backend Protocol", chapter "Message Formats". Builders return whole
messages as bytes; parsers take the body, without type and length. Text is UTF-8 unless it says bytes.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence

from cenote.errors import ProtocolError

PROTOCOL_3_0 = 3 << 16
PROTOCOL_3_2 = 3 << 16 | 2
SSL_REQUEST = 1234 << 16 | 5679
GSSENC_REQUEST = 1234 << 16 | 5680
CANCEL_REQUEST = 1234 << 16 | 5678

#: What PostgreSQL accepts as a startup packet (MAX_STARTUP_PACKET_LENGTH).
MAX_STARTUP_BYTES = 10_000

_length = struct.Struct("!I").pack
_int16 = struct.Struct("!h").pack
_int32 = struct.Struct("!i").pack


def message(kind: bytes, body: bytes = b"") -> bytes:
    """A message: type, length of what follows with itself, body."""
    return kind + _length(len(body) + 4) + body


def frame(kind: bytes, length: int) -> bytes:
    """The head of a message whose length, with itself, is known."""
    return kind + _length(length)


def cstring(text: str | bytes) -> bytes:
    """A text with its closing zero.

    :raises ProtocolError: it has a zero inside.
    """
    raw = text.encode() if isinstance(text, str) else text
    if b"\0" in raw:
        raise ProtocolError("a text on the wire cannot have a zero byte in it")
    return raw + b"\0"


# -- from the server ----------------------------------------------------------------------------------------

AUTHENTICATION_OK = message(b"R", _int32(0))
AUTHENTICATION_CLEARTEXT = message(b"R", _int32(3))
PARSE_COMPLETE = message(b"1")
BIND_COMPLETE = message(b"2")
CLOSE_COMPLETE = message(b"3")
EMPTY_QUERY = message(b"I")
NO_DATA = message(b"n")
READY_IDLE = message(b"Z", b"I")


def authentication_md5(salt: bytes) -> bytes:
    """AuthenticationMD5Password with a salt of four bytes."""
    return message(b"R", _int32(5) + salt)


def authentication_sasl(mechanisms: Iterable[str]) -> bytes:
    """AuthenticationSASL with the mechanisms in order of preference."""
    return message(b"R", _int32(10) + b"".join(map(cstring, mechanisms)) + b"\0")


def authentication_sasl_continue(data: bytes) -> bytes:
    """AuthenticationSASLContinue."""
    return message(b"R", _int32(11) + data)


def authentication_sasl_final(data: bytes) -> bytes:
    """AuthenticationSASLFinal."""
    return message(b"R", _int32(12) + data)


def parameter_status(name: str | bytes, value: str | bytes) -> bytes:
    """ParameterStatus."""
    return message(b"S", cstring(name) + cstring(value))


def backend_key_data(pid: int, secret: bytes) -> bytes:
    """BackendKeyData: 4 bytes of secret in protocol 3.0, up to 256 in 3.2."""
    return message(b"K", _int32(pid) + secret)


def ready(status: bytes = b"I") -> bytes:
    """ReadyForQuery: I idle, T in a transaction, E in a failed one."""
    return message(b"Z", status)


def negotiate_protocol_version(newest: int, unknown: Sequence[str | bytes]) -> bytes:
    """NegotiateProtocolVersion: the newest version spoken here, and the `_pq_.` options nobody knows."""
    return message(b"v", _int32(newest) + _int32(len(unknown)) + b"".join(map(cstring, unknown)))


def _fields(severity: str, sqlstate: str, text: str, detail: str, hint: str, routine: str = "") -> bytes:
    body = b"S" + cstring(severity) + b"V" + cstring(severity) + b"C" + cstring(sqlstate) + b"M" + cstring(text)
    if detail:
        body += b"D" + cstring(detail)
    if hint:
        body += b"H" + cstring(hint)
    if routine:
        body += b"R" + cstring(routine)
    return body + b"\0"


def error(
    severity: str, sqlstate: str, text: str, *, detail: str = "", hint: str = "", routine: str = ""
) -> bytes:
    """ErrorResponse. `severity` is ERROR or FATAL; `routine` is the server's function that drivers look at."""
    return message(b"E", _fields(severity, sqlstate, text.replace("\0", "?"), detail, hint, routine))


def notice(severity: str, sqlstate: str, text: str, *, detail: str = "", hint: str = "") -> bytes:
    """NoticeResponse. `severity` is WARNING, NOTICE, INFO or LOG."""
    return message(b"N", _fields(severity, sqlstate, text.replace("\0", "?"), detail, hint))


def error_version_2(text: str) -> bytes:
    """ErrorResponse as a client of protocol 2 reads it: type and text, no length."""
    return b"E" + cstring(text)


def row_description(columns: Sequence[tuple[str, int]]) -> bytes:
    """RowDescription in text format: names and type OIDs."""
    body = _int16(len(columns))
    for name, oid in columns:
        size = {16: 1, 20: 8, 23: 4, 701: 8}.get(oid, -1)
        body += cstring(name) + _int32(0) + _int16(0) + _int32(oid) + _int16(size) + _int32(-1) + _int16(0)
    return message(b"T", body)


def data_row(values: Sequence[bytes | None]) -> bytes:
    """DataRow; None is NULL."""
    body = _int16(len(values))
    for value in values:
        body += _int32(-1) if value is None else _int32(len(value)) + value
    return message(b"D", body)


def command_complete(tag: str) -> bytes:
    """CommandComplete."""
    return message(b"C", cstring(tag))


# -- from the client ----------------------------------------------------------------------------------------

SYNC = message(b"S")
FLUSH = message(b"H")
TERMINATE = message(b"X")


def startup(parameters: Iterable[tuple[str, str]], version: int = PROTOCOL_3_0) -> bytes:
    """StartupMessage."""
    body = _int32(version) + b"".join(cstring(n) + cstring(v) for n, v in parameters) + b"\0"
    return _length(len(body) + 4) + body


def request(code: int) -> bytes:
    """SSLRequest or GSSENCRequest."""
    return _length(8) + _int32(code)


def cancel_request(pid: int, secret: bytes) -> bytes:
    """CancelRequest."""
    return _length(12 + len(secret)) + _int32(CANCEL_REQUEST) + _int32(pid) + secret


def query(text: str | bytes) -> bytes:
    """Query."""
    return message(b"Q", cstring(text))


def parse(name: bytes, tail: bytes) -> bytes:
    """Parse. `tail` is all behind the name: text, number of parameter types, types."""
    return message(b"P", name + b"\0" + tail)


def close_statement(name: bytes) -> bytes:
    """Close of a prepared statement."""
    return message(b"C", b"S" + name + b"\0")


def password(data: bytes) -> bytes:
    """PasswordMessage, SASLInitialResponse or SASLResponse: they share a type."""
    return message(b"p", data)


def copy_fail(text: str) -> bytes:
    """CopyFail."""
    return message(b"f", cstring(text))


# -- parsers ------------------------------------------------------------------------------------------------


def error_fields(body: bytes) -> dict[str, str]:
    """The fields of an ErrorResponse or NoticeResponse by their letter: S severity, V severity untranslated,
    C SQLSTATE, M message, D detail, H hint, R routine ...

    :raises ProtocolError: a field without end.
    """
    fields: dict[str, str] = {}
    at = 0
    while at < len(body) and body[at]:
        end = body.find(b"\0", at + 1)
        if end < 0:
            raise ProtocolError("an error message ends inside a field")
        fields[chr(body[at])] = body[at + 1 : end].decode("utf-8", "replace")
        at = end + 1
    return fields


def values(row: bytes) -> list[bytes | None]:
    """The values of a DataRow, by its body.

    :raises ProtocolError: it is none
    """
    found: list[bytes | None] = []
    at = 2
    for _ in range(int.from_bytes(row[:2], "big")):
        length = int.from_bytes(row[at : at + 4], "big", signed=True)
        at += 4
        found.append(None if length < 0 else row[at : at + length])
        at += max(length, 0)
    if at != len(row):
        raise ProtocolError("a DataRow that is longer or shorter than its values")
    return found


def cstrings(body: bytes) -> list[bytes]:
    """The zero-terminated texts a body is made of.

    :raises ProtocolError: the last one does not end.
    """
    if not body.endswith(b"\0"):
        raise ProtocolError("a text on the wire does not end with a zero byte")
    return body[:-1].split(b"\0")
