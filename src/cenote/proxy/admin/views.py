"""What the console and the metrics read of the daemon, all in one place, so that sessions and pools may change.

Nothing here changes anything. `Moment` is taken on the event loop, so that its figures fit together, and is cheap
to take; what costs something for each client is done by whoever has the moment, on any thread.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from time import monotonic
from typing import Any

from cenote.core.histogram import Histogram
from cenote.core.machine import PAUSED
from cenote.core.stats import Distribution, PoolStats, snapshot

#: What a client can be doing.
CLIENT_STATES = ("login", "idle", "waiting", "active", "in_transaction", "closing", "console", "replication")
_IDLE = 0x49


@cache
def version() -> str:
    """Of Cenote, as it was installed."""
    return metadata.version("cenote")


@dataclass(frozen=True, slots=True)
class PoolFigures:
    """One pool: what the machine knows (`stats`), and what only the proxy counts.

    bytes_from_clients, bytes_to_clients: of clients that have left; `Moment.traffic` has all
    """

    name: str
    database: str
    user: str
    mode: str
    limit: int
    stats: PoolStats
    oldest_wait_s: float
    clients: int
    pinned: int
    pins: dict[str, int]
    transactions: int
    queries: int
    errors: int
    bytes_from_clients: int
    bytes_to_clients: int
    audits: int
    incidents: int
    recovered_plans: int
    replays: int
    listening: int
    notifications: int
    listener_gaps: int
    transaction: Distribution
    query: Distribution


@dataclass(frozen=True, slots=True)
class Moment:
    """The daemon at one moment."""

    pools: list[PoolFigures]
    clients: list[Any]
    max_clients: int
    login: Distribution
    login_failures: dict[str, int]
    cancels: dict[str, int]

    def traffic(self) -> dict[str, tuple[int, int]]:
        """Bytes from and to the clients of each pool, those that are still there included. O(clients)"""
        total = {pool.name: [pool.bytes_from_clients, pool.bytes_to_clients] for pool in self.pools}
        for client in self.clients:
            if client.pool is not None:
                sums = total.get(client.pool.name)
                if sums is not None:
                    sums[0] += client.bytes_in
                    sums[1] += client.bytes_out
        return {name: (sums[0], sums[1]) for name, sums in total.items()}

    def client_states(self) -> dict[str, int]:
        """How many clients are in each state. O(clients)"""
        counted = Counter(map(client_state, self.clients))
        return {state: counted[state] for state in CLIENT_STATES}


def moment(daemon: Any) -> Moment:
    """The daemon now. On the event loop; O(pools), and one copy of the list of clients."""
    now = monotonic()
    return Moment(
        pools=[pool_figures(pool, now) for pool in daemon.pools],
        clients=all_clients(daemon),
        max_clients=daemon.config.listen.max_clients,
        login=Distribution.of(daemon.logins),
        login_failures=dict(daemon.login_failures),
        cancels=dict(daemon.cancels),
    )


def pool_figures(pool: Any, now: float) -> PoolFigures:
    """The figures of one pool."""
    query_s: Histogram = pool.query_s
    waiting = pool.machine.waiting
    return PoolFigures(
        name=pool.name,
        database=pool.database,
        user=pool.user,
        mode=pool.mode,
        limit=pool.machine.limit,
        stats=snapshot(pool.name, pool.machine, query_s.sum_s, pool.conversions),
        oldest_wait_s=max(0.0, now - waiting.first.since) if waiting.size else 0.0,
        clients=pool.clients,
        pinned=pool.pinned,
        pins={str(reason): number for reason, number in pool.pins.items()},
        transactions=pool.transactions,
        queries=pool.queries,
        errors=pool.errors,
        bytes_from_clients=pool.bytes_from_clients,
        bytes_to_clients=pool.bytes_to_clients,
        audits=pool.audits_done,
        incidents=pool.incidents,
        recovered_plans=pool.recovered_plans,
        replays=pool.replays,
        listening=len(pool.listener.ears()),
        notifications=pool.listener.delivered,
        listener_gaps=pool.listener.gaps,
        transaction=Distribution.of(pool.transaction_s),
        query=Distribution.of(query_s),
    )


def all_clients(daemon: Any) -> list[Any]:
    """Everybody who is connected, those that log in included."""
    return [*daemon.clients.values(), *daemon.arriving]


# -- clients ------------------------------------------------------------------------------------------------


def client_state(client: Any) -> str:
    """One of CLIENT_STATES."""
    if client.lost or client.ending:
        return "closing"
    if not client.pid:
        return "login"
    if client.waiter is not None:
        return "waiting"
    server = client.server
    if server is not None:
        if server.replies.kind or server.asked_at:
            return "active"
        return "idle" if server.status == _IDLE else "in_transaction"
    if client.pool is None:
        return "replication" if client.login.replication else "console"
    return "idle"


def client_state_s(client: Any, now: float) -> float | None:
    """For how long it has been in that state; None: nobody has looked at the clock when it began."""
    state = client_state(client)
    waiter, server = client.waiter, client.server
    if state == "waiting" and waiter is not None:
        return now - float(waiter.since)
    if state == "active" and server is not None and server.asked_at:
        return now - float(server.asked_at)
    if state in ("in_transaction", "login"):
        return now - float(client.since)
    if state in ("console", "replication"):
        return now - float(client.connected)
    return None


def waited_s(client: Any, now: float) -> float | None:
    """How long a client has stood in line; None: it does not."""
    waiter = client.waiter
    return None if waiter is None else now - float(waiter.since)


def login_field(client: Any, name: str) -> str:
    """A field of how it logged in; "" while it has not."""
    login = getattr(client, "login", None)
    return "" if login is None else str(getattr(login, name, "") or "")


def tls_version(peer: Any) -> str:
    """The version of TLS of this connection; "" if it is not encrypted."""
    return "" if peer.tls is None else str(peer.tls.version or "")


def channels(client: Any) -> int:
    """How many channels it listens to by the connection that listens for all."""
    ear = getattr(client, "ear", None)
    return 0 if ear is None else len(ear.channels)


def backend_pid(client: Any) -> int | None:
    """The process of the server connection it has."""
    server = client.server
    return None if server is None else int(server.backend_pid)


@dataclass(frozen=True, slots=True)
class ClientRow:
    """A client, its place in its pool's line, and what that waits for."""

    client: Any
    place: int | None
    why: str


def client_rows(daemon: Any, now: float) -> Iterator[ClientRow]:
    """Everybody who is connected. O(clients + servers of pools in which somebody waits)"""
    places: dict[Any, int] = {}
    reasons: dict[str, str] = {}
    for pool in daemon.pools:
        if pool.machine.waiting.size:
            places.update((waiter, nth) for nth, waiter in enumerate(pool.machine.waiting, 1))
            reasons[pool.name] = waits_for(pool, now)
    for client in all_clients(daemon):
        # It may be served before its row is taken.
        waits = client.waiter is not None
        place = places.get(client.waiter) if waits else None
        yield ClientRow(client, place, reasons.get(client.pool.name, "") if waits and client.pool else "")


def waits_for(pool: Any, now: float) -> str:
    """Why nobody in this pool's line is served now: who has the connections, how long, and why."""
    machine = pool.machine
    if machine.mode == PAUSED:
        return "the pool is paused (RESUME ends that)"
    held = [server.client for server in pool.servers if server.client is not None]
    pins = Counter(str(client.pin) for client in held if client.pin)
    limit = machine.limit
    words = [f"{machine.leased.size} of {limit} connections are leased"]
    if limit < machine.max_size:
        words[0] += f" (max_size is {machine.max_size}; the server's budget leaves {limit})"
    if pins:
        words.append(f"{sum(pins.values())} pinned ({_counts(pins)})")
    if pool.listener.server is not None:
        words.append("one listens for all clients")
    oldest = machine.leased.first
    if oldest is not None:
        server = oldest.data
        pid = getattr(server.client, "pid", 0) if server is not None else 0
        words.append(f"the oldest lease is {now - oldest.since:.1f} s old" + (f" (client {pid})" if pid else ""))
    for state in ("connecting", "checking", "resetting", "closing"):
        size = getattr(machine, state).size
        if size:
            words.append(f"{size} {state}")
    error = getattr(pool.works, "last_error", None)
    if error is not None and not machine.leased.size:
        words.append(f"the last attempt to connect failed: {error}")
    return ", ".join(words)


def _counts(counts: Counter[str]) -> str:
    return " ".join(f"{word}={number}" for word, number in sorted(counts.items()))


# -- servers ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ServerRow:
    """A slot of a pool, and its connection once it is open."""

    pool: Any
    slot: Any
    server: Any

    @property
    def client(self) -> Any:
        """Who has it, or None."""
        return None if self.server is None else self.server.client


def server_rows(daemon: Any) -> list[ServerRow]:
    """All server connections, those that are being opened first. O(servers)"""
    rows = []
    for pool in daemon.pools:
        rows += [ServerRow(pool, slot, None) for slot in pool.machine.connecting]
        rows += [ServerRow(pool, server.slot, server) for server in pool.servers if server.slot is not None]
    return rows


def server_address(server: Any) -> str:
    """Where it goes: host:port, or the path of a Unix socket."""
    endpoint = server.endpoint
    if endpoint is None:
        return ""
    to = endpoint.sockaddr
    if isinstance(to, str):
        return to
    return f"[{to[0]}]:{to[1]}" if ":" in str(to[0]) else f"{to[0]}:{to[1]}"


def transaction_s(server: Any, now: float) -> float | None:
    """How old the transaction is that is open on it; None: none is."""
    if server.client is None or (server.status == _IDLE and not server.asked_at):
        return None
    return now - float(server.began_at)


def query_s(server: Any, now: float) -> float | None:
    """For how long the request under way has run; None: none is."""
    return now - float(server.asked_at) if server.asked_at and server.client is not None else None


# -- limits -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class LimitRow:
    """The bound of one server; columns of SHOW LIMITS."""

    server: str
    server_max: int | None
    reserved: int | None
    percent: float | None
    most: int
    limit: int
    used: int
    idle: int
    max_idle: int
    others: int | None
    waiting: int
    lowered_s: float | None
    reason: str


@dataclass(frozen=True, slots=True)
class ShareRow:
    """What one pool has of its server; columns of SHOW BUDGET."""

    server: str
    database: str
    user: str
    floor: int
    demand: int
    share: int
    max_size: int
    limit: int
    size: int
    leased: int
    idle: int
    waiting: int


def limit_rows(daemon: Any, now: float) -> Iterator[LimitRow]:
    """Every server's bound. O(pools)"""
    for name, server in daemon.budgets.items():
        budget, options = server.budget, server.options
        lowered = budget.lowered_until - now
        yield LimitRow(
            server=name,
            server_max=server.server_max,
            reserved=server.reserved,
            percent=None if options.max_connections is not None else options.max_connections_percent,
            most=budget.most,
            limit=budget.limit,
            used=budget.used,
            idle=budget.idle(),
            max_idle=budget.max_idle,
            others=server.others,
            waiting=sum(machine.waiting.size for machine in budget.shares),
            lowered_s=lowered if lowered > 0 else None,
            reason=server.reason if lowered > 0 else "",
        )


def share_rows(daemon: Any, now: float) -> Iterator[ShareRow]:
    """Every pool's share of its server. O(pools)"""
    for name, server in daemon.budgets.items():
        for machine, share in list(server.budget.shares.items()):
            pool = server.pools.get(machine)
            if pool is None:
                continue  # it is no more, and its last connections are being closed
            yield ShareRow(
                server=name,
                database=pool.database,
                user=pool.user,
                floor=share.floor,
                demand=share.demand,
                share=share.fair,
                max_size=machine.max_size,
                limit=machine.limit,
                size=machine.size,
                leased=machine.leased.size,
                idle=machine.shelf.size(),
                waiting=machine.waiting.size,
            )
