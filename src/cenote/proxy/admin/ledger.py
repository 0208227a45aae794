"""What session state costs: who keeps a connection and why, and which texts pinned, carried or were refused."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from cenote.proxy.admin.table import Table, named
from cenote.proxy.admin.values import Column
from cenote.reasons import ADVICE, TEXT


@dataclass(frozen=True, slots=True)
class _Pin:
    """One client that keeps its connection. `seconds`: since its last transaction began or ended."""

    database: str
    user: str
    pid: int
    client: str
    server_pid: int
    reason: str
    seconds: float
    statement: str
    advice: str


def _pins(daemon: Any, now: float) -> Iterator[_Pin]:
    for client in list(daemon.sessions()):
        if client.pin and client.pool is not None:
            yield _Pin(
                client.pool.database,
                client.pool.user,
                client.pid,
                client.address,
                client.server.backend_pid if client.server is not None else 0,
                client.pin,
                round(max(0.0, now - client.since), 3),
                _shown(client.text),
                ADVICE.get(client.pin, ""),
            )


PINS = Table(
    "PINS",
    "One row for each client that keeps a server connection, and why.",
    (
        named("database", "text", "the pool's"),
        named("user", "text", "the pool's"),
        named("pid", "int", "the client's, as in SHOW CLIENTS"),
        named("client", "text", "its address"),
        named("server_pid", "int", "of the connection it keeps"),
        named("reason", "text", "what it keeps it for (SHOW REASONS)"),
        named("seconds", "float", "since its last transaction"),
        named("statement", "text", "the last of its texts that touched session state"),
        named("advice", "text", "what to do about it"),
    ),
    _pins,
)


@dataclass(frozen=True, slots=True)
class _Entry:
    """What one kind of text has had as a consequence."""

    database: str
    user: str
    what: str
    statement: str
    count: int
    advice: str


def _entries(daemon: Any, _: float) -> Iterator[_Entry]:
    for pool in daemon.pools:
        for (what, text), count in sorted(pool.ledger.items(), key=lambda item: -item[1]):
            reason = what.partition(": ")[2]
            advice = ADVICE.get(reason, TEXT["pinned"].get(reason, ""))
            yield _Entry(pool.database, pool.user, what, _shown(text), count, advice)
        if pool.unlisted:
            yield _Entry(pool.database, pool.user, "others", "", pool.unlisted, "the ledger is full")


LEDGER = Table(
    "LEDGER",
    "One row for each kind of text that touched session state: what came of it, how often, and what to do.",
    (
        named("database", "text", "the pool's"),
        named("user", "text", "the pool's"),
        named("what", "text", "settings: they were carried; pinned: or refused: and the reason"),
        named("statement", "text", "without its literals"),
        Column("times", "int", "since the start", lambda row, _: row.count),
        named("advice", "text", "what to do about it"),
    ),
    _entries,
)

TABLES = (PINS, LEDGER)


def _shown(text: bytes) -> str:
    return text.partition(b"\0")[0].decode("utf-8", "replace")[:200]
