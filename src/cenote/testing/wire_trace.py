"""What came over the wire, as tests read it: messages, their types in a row, rows, errors, and traces that two
servers can be compared by.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from cenote.wire import messages

Trace = list[tuple[str, Any]]


class WireFailure(AssertionError):
    """The other end did not do what was expected in time; the text ends with what it sent last."""


class Message(NamedTuple):
    """One message from a server: its type as a character, and its body."""

    kind: str
    body: bytes

    @property
    def fields(self) -> dict[str, str]:
        """The fields of an ErrorResponse or NoticeResponse by their letter."""
        return messages.error_fields(self.body)


def kinds(trace: Iterable[Message]) -> str:
    """The types of messages in order, one character each: "TDCZ"."""
    return "".join(message.kind for message in trace)


def rows(trace: Iterable[Message]) -> list[tuple[str | None, ...]]:
    """The values of all DataRows in text format."""
    found: list[tuple[str | None, ...]] = []
    for message in trace:
        if message.kind == "D":
            values, at = [], 2
            for _ in range(int.from_bytes(message.body[:2], "big")):
                length = int.from_bytes(message.body[at : at + 4], "big", signed=True)
                at += 4
                values.append(None if length < 0 else message.body[at : at + length].decode())
                at += max(length, 0)
            found.append(tuple(values))
    return found


def value(trace: Iterable[Message]) -> str | None:
    """The first value of the only DataRow."""
    found = rows(trace)
    assert len(found) == 1, f"{len(found)} rows: {found!r}"
    return found[0][0]


def errors(trace: Iterable[Message]) -> list[dict[str, str]]:
    """The fields of every ErrorResponse."""
    return [message.fields for message in trace if message.kind == "E"]


def error(trace: Iterable[Message]) -> dict[str, str]:
    """The fields of the only ErrorResponse: C is the SQLSTATE, M the message, V the severity."""
    trace = list(trace)
    found = errors(trace)
    assert len(found) == 1, f"{len(found)} errors in {kinds(trace)!r}: {found!r}"
    return found[0]


def normalised(trace: Iterable[Message], *, texts: bool = True) -> Trace:
    """What two servers must have in common: no keys, no process ids, no place in the server's source.

    texts: False leaves out the wording of errors too (severity and SQLSTATE stay).
    """
    kept: Trace = []
    for kind, body in trace:
        if kind in "EN":
            fields = messages.error_fields(body)
            names = sorted(set(fields) - set("FLR")) if texts else ["C", "V"]
            kept.append((kind, {name: fields.get(name) for name in names}))
        elif kind == "K":
            kept.append((kind, None))
        elif kind == "A":
            kept.append((kind, body[4:]))
        elif kind == "R":
            kept.append((kind, int.from_bytes(body[:4], "big")))
        else:
            kept.append((kind, body))
    return kept


def login_trace(trace: Iterable[Message]) -> Trace:
    """The same for a log-in, where the order of ParameterStatus is nobody's promise."""
    kept = normalised(trace)
    return [item for item in kept if item[0] != "S"] + sorted(item for item in kept if item[0] == "S")
