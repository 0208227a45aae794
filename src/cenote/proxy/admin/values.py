"""Values and columns of the console as they stand on the wire, in text and in binary format.

Source: PostgreSQL documentation, "Message Formats" and "Formats and Format Codes". Four types are enough.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from cenote.wire import messages

Kind = Literal["text", "int", "float", "bool"]
Value = str | int | float | bool | None

TEXT, BINARY = 0, 1
# Type by kind: OID, size.
_TYPES: dict[Kind, tuple[int, int]] = {"text": (25, -1), "int": (20, 8), "float": (701, 8), "bool": (16, 1)}
_column = struct.Struct("!ihihih").pack
_count = struct.Struct("!h").pack
_size = struct.Struct("!i").pack
_NULL = _size(-1)


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a result. `text` says what it means, `read` gets it from an object of a table's at `now`."""

    name: str
    kind: Kind
    text: str = ""
    read: Callable[[Any, float], Value] | None = None


def description(columns: Sequence[Column], formats: Sequence[int]) -> bytes:
    """RowDescription."""
    body = _count(len(columns))
    for column, form in zip(columns, formats, strict=True):
        oid, size = _TYPES[column.kind]
        body += messages.cstring(column.name) + _column(0, 0, oid, size, -1, form)
    return messages.message(b"T", body)


def row(columns: Sequence[Column], formats: Sequence[int], values: Sequence[Value]) -> bytes:
    """DataRow."""
    parts = [_count(len(columns))]
    for column, form, value in zip(columns, formats, values, strict=True):
        if value is None:
            parts.append(_NULL)
        else:
            raw = _text(value) if form == TEXT else _binary(column.kind, value)
            parts.append(_size(len(raw)) + raw)
    return messages.message(b"D", b"".join(parts))


def _text(value: Value) -> bytes:
    if value is True or value is False:
        return b"t" if value else b"f"
    if isinstance(value, float):
        if value == float("inf"):
            return b"Infinity"
        return repr(round(value, 6)).encode()
    if isinstance(value, str):
        # What a client calls itself may hold a zero or half a character; a row must not end there.
        return value.replace("\0", "?").encode("utf-8", "replace")
    return str(value).encode()


def _binary(kind: Kind, value: Value) -> bytes:
    if kind == "int":
        return struct.pack("!q", value)
    if kind == "float":
        return struct.pack("!d", value)
    if kind == "bool":
        return b"\1" if value else b"\0"
    return _text(value)
