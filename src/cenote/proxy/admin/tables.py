"""What SHOW shows: every table of the console with its columns, each declared once, docs/console.md included.

Names are the library's and the metrics' where they mean the same; a name that ends in `_s` is seconds. Tables only
read; nothing secret is in any of them.
"""

from __future__ import annotations

import dataclasses
import platform
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from time import monotonic
from typing import Any

from cenote.core.stats import Distribution
from cenote.proxy.admin import views
from cenote.proxy.admin.values import Column, Value

Row = Sequence[Value]


@dataclass(frozen=True, slots=True)
class Table:
    """One command SHOW. `rows` gives objects that the columns' `read` takes values from."""

    name: str
    text: str
    columns: tuple[Column, ...]
    rows: Callable[[Any, float], Iterable[Any]]

    def read(self, daemon: Any) -> Iterator[Row]:
        """All rows, each as it is when it is taken. On the event loop; a portal pays for what it takes."""
        reads = [column.read for column in self.columns if column.read is not None]
        for item in self.rows(daemon, monotonic()):
            now = monotonic()
            yield [read(item, now) for read in reads]


def _by_reason(counts: dict[str, int]) -> str:
    return " ".join(f"{reason}={number}" for reason, number in sorted(counts.items()))


def _stat(name: str, text: str) -> Column:
    """A figure of the machine, by the name it has in `PoolStats`."""
    return Column(name, "int", text, lambda figures, _: getattr(figures.stats, name))


def _figure(name: str, text: str) -> Column:
    """A figure of the proxy's, by the name it has in `PoolFigures`."""
    return Column(name, "int", text, lambda figures, _: getattr(figures, name))


def _durations(name: str, text: str, get: Callable[[views.PoolFigures], Distribution]) -> tuple[Column, ...]:
    """The average of a histogram, and upper bounds for shares of it."""

    def average(figures: views.PoolFigures, _: float) -> Value:
        found = get(figures)
        return found.sum_s / found.count if found.count else None

    def quantile(share: float) -> Callable[[views.PoolFigures, float], Value]:
        return lambda figures, _: get(figures).quantile(share) if get(figures).count else None

    return (
        Column(f"{name}_avg_s", "float", f"{text}: average", average),
        Column(f"{name}_p50_s", "float", f"{text}: half of them took no longer", quantile(0.5)),
        Column(f"{name}_p99_s", "float", f"{text}: 99 of 100 took no longer", quantile(0.99)),
    )


_WHOSE = (
    Column("database", "text", "as clients ask for it", lambda figures, _: figures.database),
    Column("user", "text", "as clients log in", lambda figures, _: figures.user),
)


def _pools(daemon: Any, now: float) -> list[views.PoolFigures]:
    return [views.pool_figures(pool, now) for pool in daemon.pools]


POOLS = Table(
    "POOLS",
    "One row for each pool (database and user): what it is doing now.",
    (
        *_WHOSE,
        Column("mode", "text", "transaction, session or statement", lambda figures, _: figures.mode),
        Column("state", "text", "running, draining or closed", lambda figures, _: figures.stats.mode),
        _stat("size", "server connections that count against max_size: the sum of the six states below"),
        _stat("min_size", "kept open even when nobody uses them"),
        _stat("max_size", "the bound"),
        _stat("idle", "usable, and nobody has them"),
        _stat("leased", "a client has them"),
        _stat("connecting", "being opened"),
        _stat("checking", "idle ones being looked at"),
        _stat("resetting", "being cleaned up after a lease"),
        _stat("closing", "being closed; the server has not let go of them yet"),
        _stat("waiting", "clients that stand in line for a server connection"),
        Column("oldest_wait_s", "float", "how long the first in line has waited", lambda f, _: f.oldest_wait_s),
        _figure("clients", "logged-in clients"),
        _figure("pinned", "clients that keep their server connection; SHOW CLIENTS says why"),
        _stat("acquired", "leases granted since the start"),
        Column("refused", "int", "leases refused since the start", lambda f, _: sum(f.stats.refused.values())),
        _stat("would_shed", "clients CoDel would have refused (codel = shadow)"),
        _stat("epoch", "times all older server connections were declared stale"),
    ),
    _pools,
)


def _clients(daemon: Any, now: float) -> list[Any]:
    return views.all_clients(daemon)


CLIENTS = Table(
    "CLIENTS",
    "One row for each client connection.",
    (
        Column("pid", "int", "the process id it was told; what a cancel names", lambda c, _: c.pid),
        Column("database", "text", "", lambda c, _: views.login_field(c, "database")),
        Column("user", "text", "", lambda c, _: views.login_field(c, "user")),
        Column("application_name", "text", "at log-in", lambda c, _: views.login_field(c, "application_name")),
        Column("address", "text", "where it comes from", lambda c, _: c.address),
        Column("tls", "text", "version of TLS; empty: not encrypted", lambda c, _: views.tls_version(c)),
        Column("state", "text", f"one of: {', '.join(views.CLIENT_STATES)}", lambda c, _: views.client_state(c)),
        Column("state_s", "float", "for how long; NULL: not measured (idle)", views.client_state_s),
        Column("waited_s", "float", "how long it has stood in line; NULL: it does not", views.waited_s),
        Column("connected_s", "float", "how long it has been here", lambda c, now: now - c.connected),
        Column("server_pid", "int", "its server process now", lambda c, _: views.backend_pid(c)),
        Column("pin", "text", "why it keeps that; empty: it does not", lambda c, _: c.pin),
        Column("bytes_in", "int", "from the client", lambda c, _: c.bytes_in),
        Column("bytes_out", "int", "to the client", lambda c, _: c.bytes_out),
    ),
    _clients,
)


def _of_server(read: Callable[[Any, float], Value]) -> Callable[[Any, float], Value]:
    """NULL while the connection is being opened."""
    return lambda row, now: None if row.server is None else read(row.server, now)


def _of_holder(read: Callable[[Any, float], Value]) -> Callable[[Any, float], Value]:
    """NULL while nobody has it."""
    return lambda row, now: None if row.client is None else read(row.client, now)


def _servers(daemon: Any, now: float) -> list[views.ServerRow]:
    return views.server_rows(daemon)


SERVERS = Table(
    "SERVERS",
    "One row for each server connection: who has it, for how long, and why it is kept.",
    (
        Column("database", "text", "the pool's", lambda row, _: row.pool.database),
        Column("user", "text", "the pool's", lambda row, _: row.pool.user),
        Column(
            "state", "text", "connecting, idle, checking, leased, resetting, closing", lambda r, _: r.slot.state()
        ),
        Column(
            "state_s",
            "float",
            "for how long; a lease's length",
            lambda row, now: max(0.0, now - row.slot.since),
        ),
        Column(
            "pid", "int", "of the server process; NULL while connecting", _of_server(lambda s, _: s.backend_pid)
        ),
        Column("address", "text", "where it goes", _of_server(lambda s, _: views.server_address(s))),
        Column(
            "tls", "text", "version of TLS; empty: not encrypted", _of_server(lambda s, _: views.tls_version(s))
        ),
        Column("age_s", "float", "since it was opened", _of_server(lambda s, now: now - s.opened_at)),
        Column("uses", "int", "leases so far", lambda row, _: row.slot.uses),
        Column("opened", "text", "why it was opened: demand, minimum, probe, attempt", lambda r, _: r.slot.opened),
        Column("reason", "text", "why it is being closed; empty: it is not", lambda row, _: row.slot.reason),
        Column(
            "status",
            "text",
            "of its transaction, as the server says: I none, T open, E failed",
            _of_server(lambda server, _: chr(server.status)),
        ),
        Column(
            "transaction_s", "float", "age of the open transaction; NULL: none", _of_server(views.transaction_s)
        ),
        Column("query_s", "float", "age of the request under way; NULL: none", _of_server(views.query_s)),
        Column("prepared", "int", "prepared statements on it", _of_server(lambda server, _: len(server.known))),
        Column("client_pid", "int", "who has it; NULL: nobody", _of_holder(lambda c, _: getattr(c, "pid", 0))),
        Column("client_address", "text", "where that one is", _of_holder(lambda client, _: client.address)),
        Column(
            "application_name",
            "text",
            "what that one calls itself",
            _of_holder(lambda client, _: views.login_field(client, "application_name")),
        ),
        Column("pin", "text", "why that one keeps it; empty: it does not", _of_holder(lambda c, _: c.pin)),
    ),
    _servers,
)


def _stats(daemon: Any, now: float) -> list[views.PoolFigures]:
    moment = views.moment(daemon)
    traffic = moment.traffic()
    return [
        dataclasses.replace(pool, bytes_from_clients=traffic[pool.name][0], bytes_to_clients=traffic[pool.name][1])
        for pool in moment.pools
    ]


STATS = Table(
    "STATS",
    "One row for each pool: totals since the start. Times are from histograms whose buckets double: an average is "
    "exact, the others are upper bounds. NULL where nothing has been counted.",
    (
        *_WHOSE,
        _figure("transactions", "ended"),
        _figure("queries", "requests answered: a simple query, or an extended batch up to its Sync"),
        _figure("errors", "requests answered with an error"),
        _figure("bytes_from_clients", ""),
        _figure("bytes_to_clients", ""),
        *_durations("transaction", "from the lease, or its first request, to its end", lambda f: f.transaction),
        *_durations("query", "from a request to the end of its answer", lambda f: f.query),
        *_durations("wait", "from asking for a server connection to having it", lambda f: f.stats.wait),
        *_durations("hold", "leases", lambda f: f.stats.hold),
        *_durations("connect", "to open a server connection", lambda f: f.stats.connect),
        Column("opened", "text", "server connections opened, by reason", lambda f, _: _by_reason(f.stats.opened)),
        Column("closed", "text", "server connections closed, by reason", lambda f, _: _by_reason(f.stats.closed)),
        Column("refused", "text", "leases refused, by reason", lambda f, _: _by_reason(f.stats.refused)),
        Column("pins", "text", "clients that came to keep theirs, by reason", lambda f, _: _by_reason(f.pins)),
        _figure("recovered_plans", "times `cached plan must not change result type` was kept from a client"),
        _figure("replays", "requests sent once more because an idle server connection turned out to be dead"),
    ),
    _stats,
)


# -- the configuration --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Setting:
    key: str
    value: str | None
    default: str | None
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
            default = None if field.is_required() else _word(field.get_default(call_default_factory=True))
            yield _Setting(key, shown, default, str(extra.get("unit") or ""), field.description or "")


def _config(daemon: Any, now: float) -> Iterator[_Setting]:
    yield from _settings(daemon.config, "")
    for pool in daemon.pools:
        for field in dataclasses.fields(pool.options):
            value = _word(getattr(pool.options, field.name))
            yield _Setting(f"pools.{pool.name}.{field.name}", value, None, "", "what holds for this pool")


CONFIG = Table(
    "CONFIG",
    "One row for each option: as it was given or left, and, below `pools.`, what that comes to for each pool. "
    "Passwords are not shown.",
    (
        Column("key", "text", "as in the configuration file", lambda setting, _: setting.key),
        Column("value", "text", "now", lambda setting, _: setting.value),
        Column("default", "text", "if nothing is given", lambda setting, _: setting.default),
        Column("unit", "text", "", lambda setting, _: setting.unit),
        Column("text", "text", "what it does", lambda setting, _: setting.text),
    ),
    _config,
)


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


def _help(daemon: Any, now: float) -> list[tuple[str, str]]:
    return [(f"SHOW {table.name}", table.text) for table in TABLES]


HELP = Table(
    "HELP",
    "The commands.",
    (
        Column("command", "text", "", lambda row, _: row[0]),
        Column("text", "text", "what it shows", lambda row, _: row[1]),
    ),
    _help,
)

TABLES = (POOLS, CLIENTS, SERVERS, STATS, CONFIG, VERSION, HELP)
#: For errors and hints.
COMMANDS = "SHOW " + " | ".join(table.name for table in TABLES)


# -- docs/console.md ----------------------------------------------------------------------------------------

_HEAD = """# The console

Generated by `python -m cenote.proxy.admin.tables`; change `src/cenote/proxy/admin/tables.py` instead.

The daemon answers on a virtual database, `cenote`, for the users in `admin_users`:

```
psql -h 127.0.0.1 -p 6432 -U app cenote -c "SHOW POOLS"
```

Any PostgreSQL driver will do, with simple and extended queries, text and binary results; commands take no
parameters. What drivers send by themselves (BEGIN, SET, RESET, DISCARD, `SELECT 1`, `select pg_catalog.version()`
and the like) is answered and changes nothing; anything else is an error that lists the commands. The console only
shows. A name that ends in `_s` is seconds.
"""


def markdown() -> str:
    """The page docs/console.md."""
    parts = [_HEAD]
    for table in TABLES:
        parts.append(
            f"\n## SHOW {table.name}\n\n{table.text}\n\n| column | type | meaning |\n| --- | --- | --- |\n"
        )
        parts += [f"| `{column.name}` | {column.kind} | {column.text} |\n" for column in table.columns]
    return "".join(parts)


if __name__ == "__main__":
    sys.stdout.write(markdown())
