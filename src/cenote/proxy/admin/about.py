"""What the daemon is: its options and what they come to, its words, its version, where it listens, who came in."""

from __future__ import annotations

import dataclasses
import platform
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from cenote.proxy.admin import views
from cenote.proxy.admin.table import Table, named
from cenote.proxy.admin.values import Column
from cenote.proxy.config import pool_defaults
from cenote.proxy.reload import NEED_RESTART
from cenote.reasons import TEXT

# -- the configuration --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Setting:
    """`source`: the key that sets it, "" where nothing does."""

    key: str
    value: str | None
    default: str | None
    source: str
    reloadable: bool
    unit: str
    text: str


def _word(value: Any) -> str | None:
    if value is None:
        return None
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value))
    return str(value)


def _settings(model: Any, prefix: str, *, given_only: bool = False) -> Iterator[_Setting]:
    """Every option of a section, sections within it included. Passwords are not shown."""
    for name, field in type(model).model_fields.items():
        value = getattr(model, name)
        key = prefix + name
        if hasattr(type(value), "model_fields"):
            yield from _settings(value, f"{key}.", given_only=given_only or name == "pool")
        elif isinstance(value, dict):
            for entry, section in value.items():
                yield from _settings(section, f"{key}.{entry}.", given_only=True)
        elif not given_only or name in model.model_fields_set:
            shown = "***" if "password" in name and value is not None else _word(value)
            extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
            yield _Setting(
                key,
                shown,
                None if field.is_required() else _word(field.get_default(call_default_factory=True)),
                key if name in model.model_fields_set else "",
                key not in NEED_RESTART and name != "mode",
                str(extra.get("unit") or ""),
                field.description or "",
            )


def _source(config: Any, database: str, user: str, name: str) -> str:
    """The key that decides an option of a pool."""
    sections = (
        (f"users.{user}", config.users.get(user)),
        (f"databases.{database}", config.databases.get(database)),
        ("pool", config.pool),
    )
    return next((f"{key}.{name}" for key, section in sections if getattr(section, name, None) is not None), "")


def _config(daemon: Any, now: float) -> Iterator[_Setting]:
    config = daemon.config
    yield from _settings(config, "")
    defaults = pool_defaults()
    for pool in daemon.pools:
        for field in dataclasses.fields(pool.options):
            name = field.name
            yield _Setting(
                f"pools.{pool.name}.{name}",
                _word(getattr(pool.options, name)),
                _word(defaults[name]),
                _source(config, pool.database, pool.user, name),
                name != "mode",
                "",
                "what holds for this pool",
            )


CONFIG = Table(
    "CONFIG",
    "One row for each option: as it was given or left, and, below `pools.`, what that comes to for each pool. "
    "Passwords are not shown.",
    (
        named("key", "text", "as in the configuration file"),
        named("value", "text", "now"),
        named("default", "text", "if nothing is given"),
        named("source", "text", "the key that sets it, here or on the command line; empty: it has its default"),
        named("reloadable", "bool", "RELOAD changes it; else it takes a restart"),
        named("unit", "text", ""),
        named("text", "text", "what it does"),
    ),
    _config,
)

# -- words --------------------------------------------------------------------------------------------------


def _reasons(daemon: Any, now: float) -> Iterator[tuple[str, str, int | None, str]]:
    counted: dict[str, Counter[str]] = {kind: Counter() for kind in ("opened", "refused", "closed", "pinned")}
    for pool in daemon.pools:
        machine = pool.machine
        counted["opened"].update(machine.opened_by)
        counted["refused"].update(machine.refused_by)
        counted["closed"].update(machine.closed_by)
        counted["pinned"].update(pool.pins)
    for kind, words in TEXT.items():
        for word, text in words.items():
            yield kind, word, counted[kind][word] if kind in counted else None, text


REASONS = Table(
    "REASONS",
    "One row for each reason that errors, logs, metrics and these tables name.",
    (
        Column(
            "kind", "text", "what it is a reason for: opened, refused, closed, pinned; failure", lambda r, _: r[0]
        ),
        Column("reason", "text", "the word", lambda row, _: row[1]),
        Column("count", "int", "how often, over the pools there are; NULL: not counted", lambda row, _: row[2]),
        Column("text", "text", "what it means", lambda row, _: row[3]),
    ),
    _reasons,
)

_FAILURES = {
    "protocol": "what it sent is not the protocol",
    "unsupported": "it asked for what is not supported",
    "bad_parameter": "its startup packet has a parameter that cannot be",
    "not_allowed": "the rules do not let it in, or not this way",
    "wrong_password": "wrong password, or nobody of that name",
    "no_database": "there is no such database",
    "no_admin": "the console is for the users in admin_users",
    "max_clients": "there were max_clients already",
    "max_clients_database": "there were as many clients of its database already as that may have",
    "max_clients_user": "there were as many clients of its user already as that may have",
    "max_logins": "it was the slowest of too many at once (max_logins)",
    "login_line": "too many stood in line for their turn already",
    "no_descriptors": "the process had no descriptor left",
    "proxy_header": "its load balancer sent no PROXY protocol header, or a wrong one",
    "timeout": "it took longer than login_timeout",
    "no_server": "there was no server connection to learn the parameters from",
    "tls": "its TLS handshake failed",
    "error": "a bug in Cenote: its log has the details",
}


def _logins(daemon: Any, now: float) -> Iterator[tuple[str, int, str]]:
    oldest = max((now - client.connected for client in daemon.arriving), default=0.0)
    yield "under_way", len(daemon.arriving), f"now; the oldest for {max(0.0, oldest):.1f} s"
    yield "in_line", daemon.admission.waiting, "of these, those that wait for their turn (login_rate)"
    refused = daemon.login_failures
    late = sum(number for word, number in refused.items() if word.startswith("max_clients"))
    yield "admitted", max(0, daemon.logins.count() - late), "since the start"
    for word in sorted({*_FAILURES, *refused}):
        yield word, refused.get(word, 0), f"refused: {_FAILURES.get(word, word.replace('_', ' '))}"


LOGINS = Table(
    "LOGINS",
    "One row for each outcome of a log-in, and how many there were.",
    (
        Column("outcome", "text", "under_way, in_line, admitted, or why it was refused", lambda row, _: row[0]),
        Column("count", "int", "", lambda row, _: row[1]),
        Column("text", "text", "what that means", lambda row, _: row[2]),
    ),
    _logins,
)

# -- the process --------------------------------------------------------------------------------------------


def _version(daemon: Any, now: float) -> list[tuple[str, str, float]]:
    return [(views.version(), platform.python_version(), now - daemon.started)]


VERSION = Table(
    "VERSION",
    "What runs here.",
    (
        Column("version", "text", "of Cenote", lambda row, _: row[0]),
        Column("python", "text", "", lambda row, _: row[1]),
        Column("uptime_s", "float", "since it began to listen", lambda row, _: row[2]),
    ),
    _version,
)


def _listen(daemon: Any, now: float) -> Iterator[tuple[str, str, str]]:
    listen = daemon.config.listen
    tls = listen.tls_mode if listen.tls_cert is not None else "disable"
    for address in daemon.addresses:
        if address.startswith("/"):
            yield address, "unix", "disable"
        else:
            yield address, "tcp", tls


LISTEN = Table(
    "LISTEN",
    "One row for each address that clients come in at.",
    (
        Column("address", "text", "host:port, or the path of a Unix socket", lambda row, _: row[0]),
        Column("transport", "text", "tcp or unix", lambda row, _: row[1]),
        Column("tls", "text", "disable, allow or require", lambda row, _: row[2]),
    ),
    _listen,
)
