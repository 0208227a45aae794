"""What flows: the pools, their clients, their server connections, and totals."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from cenote.core.stats import Distribution
from cenote.proxy.admin import views
from cenote.proxy.admin.table import Table, by_reason
from cenote.proxy.admin.values import Column, Kind, Value


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
        Column("state", "text", "running, paused, draining or closed", lambda figures, _: figures.stats.mode),
        _stat("size", "server connections that count against max_size: the sum of the six states below"),
        _stat("min_size", "kept open even when nobody uses them"),
        _stat("max_size", "the bound"),
        Column("limit", "int", "what the server's budget leaves of it now", lambda figures, _: figures.limit),
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
        _figure("listening", "clients for which one shared server connection listens"),
        _stat("acquired", "leases granted since the start"),
        Column("refused", "int", "leases refused since the start", lambda f, _: sum(f.stats.refused.values())),
        _stat("would_shed", "clients CoDel would have refused (codel = shadow)"),
        _stat("epoch", "times all older server connections were declared stale"),
    ),
    _pools,
)


def _of_client(name: str, kind: Kind, text: str) -> Column:
    return Column(name, kind, text, lambda row, _: getattr(row.client, name))


def _of_login(name: str, text: str) -> Column:
    return Column(name, "text", text, lambda row, _: views.login_field(row.client, name))


CLIENTS = Table(
    "CLIENTS",
    "One row for each client connection; of one that waits: where in the line it stands, and what it waits for.",
    (
        _of_client("pid", "int", "the process id it was told; what a cancel and KILL name"),
        _of_login("database", ""),
        _of_login("user", ""),
        _of_login("application_name", "at log-in"),
        _of_client("address", "text", "where it comes from"),
        Column(
            "tls", "text", "version of TLS; empty: not encrypted", lambda row, _: views.tls_version(row.client)
        ),
        _of_login("method", "how it logged in"),
        _of_login("label", "the name in its certificate, else the host name it asked for by TLS"),
        Column(
            "state", "text", f"one of: {', '.join(views.CLIENT_STATES)}", lambda r, _: views.client_state(r.client)
        ),
        Column(
            "state_s",
            "float",
            "for how long; NULL: not measured (idle)",
            lambda row, now: views.client_state_s(row.client, now),
        ),
        Column(
            "waited_s",
            "float",
            "how long it has stood in line; NULL: it does not",
            lambda row, now: views.waited_s(row.client, now),
        ),
        Column("place", "int", "in the line, 1 is next; NULL: it does not wait", lambda row, _: row.place),
        Column(
            "waits_for", "text", "who has the connections, and why; empty: it does not wait", lambda r, _: r.why
        ),
        Column("connected_s", "float", "how long it has been here", lambda row, now: now - row.client.connected),
        Column("server_pid", "int", "its server process now", lambda row, _: views.backend_pid(row.client)),
        _of_client("pin", "text", "why it keeps that; empty: it does not"),
        Column(
            "channels",
            "int",
            "that it listens to by the pool's shared connection",
            lambda row, _: views.channels(row.client),
        ),
        _of_client("bytes_in", "int", "from the client"),
        _of_client("bytes_out", "int", "to the client"),
    ),
    views.client_rows,
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
        Column(
            "client_address",
            "text",
            "where that one is; cenote (listener): it listens for all who do",
            _of_holder(lambda client, _: client.address),
        ),
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
        Column("opened", "text", "server connections opened, by reason", lambda f, _: by_reason(f.stats.opened)),
        Column("closed", "text", "server connections closed, by reason", lambda f, _: by_reason(f.stats.closed)),
        Column("refused", "text", "leases refused, by reason", lambda f, _: by_reason(f.stats.refused)),
        Column("pins", "text", "clients that came to keep theirs, by reason", lambda f, _: by_reason(f.pins)),
        Column(
            "conversions", "int", "connections made to carry a client's settings", lambda f, _: f.stats.conversions
        ),
        _figure("audits", "times the server was asked whether a session is what it is taken for"),
        _figure("incidents", "times it was not; the log says more, and the connection was closed"),
        _figure("recovered_plans", "times `cached plan must not change result type` was kept from a client"),
        _figure("notifications", "passed to clients by the connection that listens for them"),
        _figure("listener_gaps", "times that connection was lost or given up; every listener was told"),
        _figure("replays", "requests sent once more because an idle server connection turned out to be dead"),
    ),
    _stats,
)
