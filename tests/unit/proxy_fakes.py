"""Stand-ins for the daemon's sessions, as far as the console and the metrics look, on real pool machines."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from cenote.core.budget import Budget
from cenote.core.histogram import Histogram
from cenote.core.machine import Machine
from cenote.core.slot import Slot
from cenote.proxy.config import Config, config_of, pool_options
from cenote.proxy.observe import Watch

CONFIG = {
    "databases": {"orders": {"host": "db.example", "max_size": 3, "min_size": 1}},
    "users": {"app": {"password": "hunter2"}, "boss": {"password": "hunter3"}},
    "admin_users": ["boss"],
}


class FakeDaemon:
    """One pool, `orders/app`, and whoever a test lets in."""

    def __init__(self, now: float) -> None:
        self.config: Config = config_of(CONFIG)
        self.now = now
        self.started = now - 60.0
        self.clients: dict[int, Any] = {}
        self.arriving: dict[Any, Any] = {}
        self.logins = Histogram()
        self.login_failures: dict[str, int] = {}
        self.cancels: dict[str, int] = {}
        self.pool = fake_pool(self.config, "orders", "app")
        self.pools = [self.pool]
        self.addresses = ["127.0.0.1:6432"]
        self.budgets = {"db.example:5432": fake_budget(self.config, self.pool)}
        self.standing: list[Any] = []
        self.leaving: dict[Any, Any] = {}
        self.draining = False
        self.admission = SimpleNamespace(waiting=0)

    def client(self, **fields: Any) -> Any:
        """A client that has logged in."""
        pid = len(self.clients) + 1
        client = fake_client(self.pool, pid, self.now, **fields)
        self.clients[pid] = client
        self.pool.clients += 1
        return client

    def sessions(self) -> Any:
        return self.clients.values()

    def arrive(self) -> Any:
        """A client that has not logged in."""
        client = Visitor(**vars(fake_client(None, 0, self.now, login=None)))
        self.arriving[client] = None
        return client

    def open_server(self) -> Any:
        """One more server connection of the pool, idle or granted to who waits."""
        machine = self.pool.machine
        machine.start(self.now)
        slot = next(slot for what, slot in machine.effects if what == "open" and slot.data is None)
        server = fake_server(slot, self.now)
        slot.data = server
        machine.effects.clear()
        assert machine.dial_needed(slot, self.now)
        machine.dialed(slot, self.now + 0.01)
        self.pool.servers.add(server)
        return server

    def lend(self, client: Any, *, status: str = "I", asked: bool = True) -> Any:
        """Lease a server connection to a client."""
        slot = self.pool.machine.acquire(self.now, 1.0, None, client)
        assert isinstance(slot, Slot)
        server = slot.data
        server.client, client.server = client, server
        server.began_at = self.now
        server.asked_at = self.now if asked else 0.0
        server.status = ord(status)
        return server


def fake_budget(config: Config, pool: Any) -> Any:
    """The server's, with one pool."""
    budget = Budget(68, 48, lambda: 0.5)
    budget.join(pool.machine, 1)
    return SimpleNamespace(
        name="db.example:5432",
        options=config.server,
        server_max=100,
        reserved=3,
        others=7,
        reason="",
        budget=budget,
        pools={pool.machine: pool},
    )


def fake_pool(config: Config, database: str, user: str) -> Any:
    options = pool_options(config, database, user)
    machine = Machine(
        options.min_size,
        options.max_size,
        options.max_waiting,
        options.idle_timeout,
        options.max_lifetime,
        options.check_after,
        options.codel,
        lambda: 0.5,
    )
    pool = SimpleNamespace(
        name=f"{database}/{user}",
        database=database,
        user=user,
        mode=options.mode,
        options=options,
        machine=machine,
        servers=Servers(),
        works=SimpleNamespace(last_error=None),
        clients=0,
        transactions=0,
        queries=0,
        errors=0,
        bytes_from_clients=0,
        bytes_to_clients=0,
        conversions=5,
        audits_done=0,
        incidents=0,
        ledger={("carried: settings", b"SET work_mem = ?"): 2},
        session_mode=options.mode == "session",
        unlisted=0,
        recovered_plans=0,
        replays=0,
        listener=SimpleNamespace(server=None, ears=list, delivered=0, gaps=0, look=lambda now: None),
        pins={},
        pinned=0,
        transaction_s=Histogram(),
        query_s=Histogram(),
    )
    pool.watch = Watch(pool)
    return pool


class Servers(list[Any]):
    """A set in order."""

    def add(self, server: Any) -> None:
        self.append(server)


def fake_client(pool: Any, pid: int, now: float, **fields: Any) -> Any:
    login = SimpleNamespace(user="app", database="orders", application_name="shop", replication=None)
    values = {
        "pool": pool,
        "pid": pid,
        "login": login,
        "address": f"10.0.0.{pid}:4000",
        "tls": None,
        "lost": False,
        "ending": False,
        "waiter": None,
        "server": None,
        "since": now,
        "connected": now - 5.0,
        "pin": "",
        "text": b"",
        "sight": None,
        "pinned_at": now,
        "bytes_in": 0,
        "bytes_out": 0,
    }
    return SimpleNamespace(**{**values, **fields})


class Visitor(SimpleNamespace):
    """One that sets and dictionaries take, as sessions are."""

    __hash__ = object.__hash__


def fake_server(slot: Any, now: float) -> Any:
    return SimpleNamespace(
        slot=slot,
        backend_pid=4242,
        endpoint=SimpleNamespace(sockaddr=("192.0.2.1", 5432)),
        tls=SimpleNamespace(version="TLSv1.3"),
        client=None,
        opened_at=now - 10.0,
        status=ord("I"),
        replies=SimpleNamespace(kind=0),
        asked_at=0.0,
        began_at=0.0,
        known={"a": b"a"},
    )
