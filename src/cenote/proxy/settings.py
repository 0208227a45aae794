"""The settings a client logged in with, and the SQL that makes a server connection carry them.

A client's startup parameters are settings like any others: a connection keeps the base state that its own
log-in gave it, and carries the settings of the client it serves. Equal settings are one object, so that the
pool machine compares identities. It knows nothing of what clients SET later: that pins them.

Source: PostgreSQL documentation, `set_config` and "Setting Parameters": values come in as they stand in a
startup packet, which `set_config` takes and SET would quote anew.
"""

from __future__ import annotations

import re

# Client encodings in which a byte below 128 may be the second half of a character: texts cannot be read.
_OPAQUE = frozenset(
    b"sjis shiftjis mskanji win932 windows932 shiftjis2004 big5 win950 windows950 "
    b"gbk win936 windows936 uhc win949 windows949 gb18030 johab".split()
)
_ENCODING_NAME = re.compile(rb"[^a-z0-9]")
_NAME_BYTES = 63  # longer ones are cut by the server

APPLICATION_NAME = b"application_name"


class Settings:
    """What one kind of client wants beside the base state. Compared by identity: a pool makes one of each.

    meaning: the part of it that changes what a text means, None if none does
    opaque: in this client encoding texts cannot be read byte by byte
    """

    def __init__(self, items: tuple[tuple[bytes, bytes], ...], meaning: object) -> None:
        self.items = items
        self.meaning = meaning
        encoding = dict(items).get(b"client_encoding", b"")
        self.opaque = _ENCODING_NAME.sub(b"", encoding.lower()) in _OPAQUE

    def __repr__(self) -> str:
        return f"<Settings {b' '.join(name + b'=' + value for name, value in self.items).decode('latin-1')}>"


def settings_key(parameters: dict[bytes, bytes]) -> tuple[tuple[bytes, bytes], ...]:
    """Startup parameters in one order, names in lower case."""
    return tuple(sorted((name.lower(), value) for name, value in parameters.items()))


def with_address(name: bytes, address: str) -> bytes:
    """An application_name that says where the client is; the name gives way where both are too long."""
    where = b" - " + address.encode()
    return (name or b"app")[: max(0, _NAME_BYTES - len(where))] + where


def conversion(carried: Settings | None, wanted: Settings | None) -> bytes:
    """The SQL that takes a connection from one to the other; it runs as one transaction. O(settings)"""
    before = dict(carried.items) if carried is not None else {}
    after = dict(wanted.items) if wanted is not None else {}
    statements = [b"RESET " + _identifier(name) for name in before if name not in after]
    changes = [
        b"pg_catalog.set_config(" + _literal(name) + b"," + _literal(value) + b",false)"
        for name, value in after.items()
        if before.get(name) != value
    ]
    if changes:
        statements.append(b"SELECT " + b",".join(changes))
    return b";".join(statements)


def _identifier(name: bytes) -> bytes:
    """A setting's name, quoted part by part: `app.tenant` is two."""
    return b".".join(b'"' + part.replace(b'"', b'""') + b'"' for part in name.split(b"."))


def _literal(value: bytes) -> bytes:
    """A text constant of plain ASCII, the same under every setting and encoding."""
    quoted = bytearray(b"E'")
    for code in value:
        if code in (0x27, 0x5C) or not 32 <= code < 127:
            quoted += b"\\x%02x" % code
        else:
            quoted.append(code)
    return bytes(quoted) + b"'"
