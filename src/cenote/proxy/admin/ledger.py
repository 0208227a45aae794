"""What session state costs: who keeps a connection and why, and which texts pinned, carried or were refused; of a
dry run, what would have been.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from cenote.proxy.admin.table import Table, named
from cenote.proxy.admin.values import Column
from cenote.proxy.advice import advice


@dataclass(frozen=True, slots=True)
class _Pin:
    """One client that keeps its connection, or would."""

    database: str
    user: str
    pid: int
    client: str
    server_pid: int
    reason: str
    observed: bool
    pinned_s: float
    seconds: float
    statement: str
    advice: str


def _pins(daemon: Any, now: float) -> Iterator[_Pin]:
    for client in list(daemon.sessions()):
        if client.pool is None:
            continue
        observed = client.sight is not None
        kept = client.sight.reasons if observed else {client.pin: (client.pinned_at, client.text)}
        for reason, (since, text) in list(kept.items()):
            if reason:
                statement = _shown(text)
                yield _Pin(
                    client.pool.database,
                    client.pool.user,
                    client.pid,
                    client.address,
                    client.server.backend_pid if client.server is not None else 0,
                    reason,
                    observed,
                    round(max(0.0, now - since), 3),
                    round(max(0.0, now - client.since), 3),
                    statement,
                    advice(f"pinned: {reason}", statement),
                )


PINS = Table(
    "PINS",
    "One row for each client that keeps a server connection, and why; in a dry run, for each reason to.",
    (
        named("database", "text", "the pool's"),
        named("user", "text", "the pool's"),
        named("pid", "int", "the client's, as in SHOW CLIENTS"),
        named("client", "text", "its address"),
        named("server_pid", "int", "of the connection it keeps"),
        named("reason", "text", "what it keeps it for (SHOW REASONS)"),
        named("observed", "bool", "a dry run: transaction mode would have pinned it"),
        named("pinned_s", "float", "for how long it has been pinned"),
        named("seconds", "float", "since its last transaction"),
        named("statement", "text", "the last of its texts that touched session state; observed: that began it"),
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
    observed: bool
    statement: str
    count: int
    advice: str


def _entries(daemon: Any, _: float) -> Iterator[_Entry]:
    for pool in daemon.pools:
        observed = pool.session_mode
        for (what, text), count in sorted(pool.ledger.items(), key=lambda item: -item[1]):
            statement = _shown(text)
            yield _Entry(pool.database, pool.user, what, observed, statement, count, advice(what, statement))
        if pool.unlisted:
            yield _Entry(pool.database, pool.user, "others", observed, "", pool.unlisted, "the ledger is full")


LEDGER = Table(
    "LEDGER",
    "One row for each kind of text that touched session state: what came of it, how often, and what to do.",
    (
        named("database", "text", "the pool's"),
        named("user", "text", "the pool's"),
        named(
            "what",
            "text",
            "carried:, pinned: or refused: and the reason; cleared; asked: the server would settle it",
        ),
        named("observed", "bool", "a dry run: what would have come of it in transaction mode"),
        named("statement", "text", "without its literals"),
        Column("times", "int", "since the start", lambda row, _: row.count),
        named("advice", "text", "what to do about it"),
    ),
    _entries,
)


def _now(name: str, text: str) -> Column:
    return Column(name, "int", text, lambda pool, _: pool.watch.now[name])


def _peak(name: str, text: str) -> Column:
    return Column(f"{name}_peak", "int", text, lambda pool, _: pool.watch.peaks[name])


def _texts(name: str, text: str) -> Column:
    return Column(f"{name}_texts", "int", text, lambda pool, _: pool.watch.counts[name])


def _observed(daemon: Any, _: float) -> list[Any]:
    return [pool for pool in daemon.pools if pool.watch is not None]


OBSERVED = Table(
    "OBSERVED",
    "One row for each pool in a dry run (observe = true): what transaction mode would have needed and done.",
    (
        named("database", "text", "the pool's"),
        named("user", "text", "the pool's"),
        Column("seconds", "float", "since it began", lambda pool, now: round(now - pool.watch.since, 3)),
        _now("clients", "logged in"),
        _peak("clients", "the most at one moment"),
        _now("connections", "clients that have a server connection: one each, in session mode"),
        _peak("connections", "the most at one moment"),
        _now("busy", "clients inside a transaction or a request"),
        _peak("busy", "the most at one moment"),
        _now("pinned", "clients that transaction mode would keep pinned, as far as their texts tell"),
        _peak("pinned", "the most at one moment"),
        _now("listening", "clients that the pool's shared listener would tell"),
        _peak("listening", "the most at one moment"),
        _now("needed", "connections that transaction mode would need: clients busy or pinned, and one to listen"),
        _peak("needed", "the most at one moment"),
        Column(
            "needed_p99",
            "int",
            "as many were enough for 99 % of the time in which any was needed",
            lambda pool, _: pool.watch.needed_for(0.99),
        ),
        _texts("carried", "times that a text ran whose settings would be carried"),
        _texts("cleared", "that only clears"),
        _texts("asked", "that the server would be asked about"),
        _texts("pinned", "that would pin"),
        _texts("refused", "that would be refused (unsafe = refuse)"),
    ),
    _observed,
)

TABLES = (PINS, LEDGER, OBSERVED)


def _shown(text: bytes) -> str:
    return text.partition(b"\0")[0].decode("utf-8", "replace")[:200]
