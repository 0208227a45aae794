"""Who may have how much, and has it: users, databases, servers, and what each pool gets of its server."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from cenote.core.machine import CLOSED, DRAINING, PAUSED, RUNNING
from cenote.proxy.admin import views
from cenote.proxy.admin.table import Table, named
from cenote.proxy.admin.values import Column

_GRAVEST = (RUNNING, CLOSED, DRAINING, PAUSED)


@dataclass(slots=True)
class _Sums:
    """Of all pools of a user or a database. `section` is its configuration, None where there is none."""

    name: str
    section: Any
    state: str = RUNNING
    pools: int = 0
    clients: int = 0
    connections: int = 0
    leased: int = 0
    idle: int = 0
    waiting: int = 0
    names: list[str] = field(default_factory=list)

    def add(self, pool: Any) -> None:
        machine = pool.machine
        self.pools += 1
        self.clients += pool.clients
        self.connections += machine.size
        self.leased += machine.leased.size
        self.idle += machine.shelf.size()
        self.waiting += machine.waiting.size
        self.state = max(self.state, machine.mode, key=_GRAVEST.index)

    def option(self, name: str) -> Any:
        return None if self.section is None else getattr(self.section, name, None)


def _sums(daemon: Any, sections: dict[str, Any], by: str) -> list[_Sums]:
    found = {name: _Sums(name, section) for name, section in sections.items()}
    for pool in daemon.pools:
        name = getattr(pool, by)
        if name not in found:
            found[name] = _Sums(name, None)
        found[name].add(pool)
    return list(found.values())


_SUMS = (
    named("pools", "int", "that there are"),
    named("clients", "int", "logged in"),
    Column("max_clients", "int", "the cap; NULL: none", lambda row, _: row.option("max_clients")),
    named("connections", "int", "server connections, in whatever state"),
    Column("max_connections", "int", "the cap; NULL: none", lambda row, _: row.option("max_connections")),
    named("leased", "int", "of these, those that clients have"),
    named("idle", "int", "of these, those that nobody has"),
    named("waiting", "int", "clients that stand in line"),
)

USERS = Table(
    "USERS",
    "One row for each user: those of the configuration, and those others who have a pool.",
    (
        Column("user", "text", "", lambda row, _: row.name),
        Column("configured", "bool", "whether it is in [users]", lambda row, _: row.section is not None),
        Column("auth", "text", "its own, where it has one", lambda row, _: row.option("auth") or ""),
        Column("admin", "bool", "may use this console", lambda row, _: row.name in row.names),
        *_SUMS,
    ),
    lambda daemon, _: _users(daemon),
)


def _users(daemon: Any) -> Iterator[_Sums]:
    for row in _sums(daemon, daemon.config.users, "user"):
        row.names = daemon.config.admin_users
        yield row


DATABASES = Table(
    "DATABASES",
    "One row for each database: those of the configuration, and those that are gone from it and still drain.",
    (
        Column("database", "text", "as clients ask for it", lambda row, _: row.name),
        Column("configured", "bool", "whether it is in [databases]", lambda row, _: row.section is not None),
        Column(
            "state", "text", "running, paused, draining, closed: the gravest of its pools'", lambda r, _: r.state
        ),
        Column("host", "text", "of the server", lambda row, _: row.option("host")),
        Column("port", "text", "of the server", lambda row, _: _word(row.option("port"))),
        Column(
            "dbname",
            "text",
            "its name there",
            lambda row, _: None if row.section is None else row.section.dbname or row.name,
        ),
        Column(
            "server_user", "text", "who logs in there; NULL: the client's own user", lambda r, _: r.option("user")
        ),
        *_SUMS,
    ),
    lambda daemon, _: _sums(daemon, daemon.config.databases, "database"),
)


def _word(value: Any) -> str | None:
    return None if value is None else str(value)


# -- servers ------------------------------------------------------------------------------------------------

LIMITS = Table(
    "LIMITS",
    "One row for each server: how many connections it gives, how many of them may be ours, and who has them.",
    (
        named("server", "text", "host:port"),
        named("server_max", "int", "its max_connections; NULL: not known yet"),
        named("reserved", "int", "of these, those it keeps for superusers and the like"),
        named("percent", "float", "max_connections_percent; NULL: max_connections is given instead"),
        named("most", "int", "what that comes to: as many may be ours"),
        named("limit", "int", "as many may be ours now"),
        named("used", "int", "ours now, those being opened and closed included"),
        named("idle", "int", "of these, those that nobody has"),
        named("max_idle", "int", "as many may be idle"),
        named("others", "int", "what others have there; NULL: not known"),
        named("waiting", "int", "clients that stand in line, over all pools"),
        named("lowered_s", "float", "for how long the limit stays lowered; NULL: it is not"),
        named("reason", "text", "why it is lowered; empty: it is not"),
    ),
    views.limit_rows,
)

BUDGET = Table(
    "BUDGET",
    "One row for each pool: what it has of its server's connections, and what it has a right to.",
    (
        named("server", "text", "host:port"),
        named("database", "text", "the pool's"),
        named("user", "text", "the pool's"),
        named("floor", "int", "what it gets whatever the others want"),
        named("demand", "int", "what it had use for lately"),
        named("share", "int", "its share of the server's limit, max-min fair"),
        named("max_size", "int", "its own bound"),
        named("limit", "int", "what it may have now"),
        named("size", "int", "what it has"),
        named("leased", "int", "of these, those that clients have"),
        named("idle", "int", "of these, those that nobody has"),
        named("waiting", "int", "clients that stand in line"),
    ),
    views.share_rows,
)

TABLES: Iterable[Table] = (USERS, DATABASES, LIMITS, BUDGET)
