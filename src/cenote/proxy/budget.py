"""How many connections of a server are ours: asks it what it has, and divides that among its pools.

One per server, by host and port, over all its databases and users. It asks the server for `max_connections` on the
first connection to it, before that is lent, and every minute from then on; until it knows, it opens no more than
a few. What others have there is reported and warned about, not subtracted: an autoscaler on the other side that
did the same would chase its own tail. Division is `core/budget.py`'s.
"""

from __future__ import annotations

import asyncio
from time import monotonic
from typing import TYPE_CHECKING, Any

from cenote.core.budget import Budget, Cap
from cenote.core.growth import DIAL_GATE
from cenote.core.machine import Machine
from cenote.errors import ProtocolError
from cenote.proxy.config import Config, Database, Server
from cenote.proxy.log import get_log
from cenote.wire import messages

if TYPE_CHECKING:
    from cenote.proxy.pool import ProxyPool
    from cenote.proxy.server import ServerConnection

log = get_log("cenote.proxy")

_ASK_EVERY_S = 60.0
_ASK_TIMEOUT_S = 5.0
_AGAIN_S = 0.02  # while somebody is hungry

# PostgreSQL 15 and older have no reserved_connections.
# Without pg_read_all_stats the type of other roles' sessions is NULL; only those of clients have a database.
_QUESTION = b"""SELECT current_setting('max_connections'), current_setting('superuser_reserved_connections'),
coalesce(current_setting('reserved_connections', true), '0'),
(SELECT count(*) FROM pg_catalog.pg_stat_activity WHERE coalesce(
backend_type = 'client backend', datid IS NOT NULL))"""

# Where PostgreSQL says that a role or a database has no connections left, not the server (postinit.c, miscinit.c).
_OWN_LIMITS = frozenset(("InitializeSessionUserId", "CheckMyDatabase"))


class ServerBudget:
    """The budget of one server. On the event loop.

    server_max, reserved, others: what it said last; None: not known yet
    reason: why fewer than usual are asked for; empty: they are not
    """

    def __init__(self, name: str, options: Server, random: Any) -> None:
        self.name = name
        self.options = options
        self.server_max: int | None = None
        self.reserved: int | None = None
        self.others: int | None = None
        self.reason = ""
        self.refusals = 0
        self.pools: dict[Machine, ProxyPool] = {}
        first = options.max_connections or DIAL_GATE
        self.budget = Budget(first, first, random)
        self._asking = asyncio.Lock()
        self._asked_at = monotonic()
        self._serving: asyncio.Handle | None = None
        self._crowded = False
        self._tasks: set[asyncio.Task[None]] = set()

    def join(self, pool: ProxyPool, caps: list[Cap]) -> None:
        """A pool that has no connections yet."""
        self.pools[pool.machine] = pool
        self.budget.join(pool.machine, self.options.floor, caps)

    def leave(self, pool: ProxyPool) -> None:
        """A pool that is no more."""
        self.pools.pop(pool.machine, None)
        self.budget.leave(pool.machine)

    def configure(self, options: Server) -> None:
        """Other options from now on."""
        self.options = options
        for share in self.budget.shares.values():
            share.floor = options.floor
        self._bound()

    # -- division ---------------------------------------------------------------------------------------------

    def serve_soon(self) -> None:
        """A pool lacks room, or there is some: look at it in the next turn of the loop."""
        if self._serving is None:
            self._serving = asyncio.get_running_loop().call_soon(self._serve)

    def _serve(self) -> None:
        self._serving = None
        self._perform(self.budget.serve(monotonic()))
        if self.budget.hungry and self._serving is None:
            self._serving = asyncio.get_running_loop().call_later(_AGAIN_S, self._serve)

    def tick(self, now: float) -> None:
        """Every second."""
        budget = self.budget
        if self.reason and now >= budget.lowered_until:
            self.reason = ""
        self._perform(budget.tick(now))
        if now - self._asked_at >= _ASK_EVERY_S and not self._asking.locked():
            self._asked_at = now
            self._spawn(self._ask_again())

    def _perform(self, machines: list[Machine]) -> None:
        for machine in machines:
            pool = self.pools.get(machine)
            if pool is not None:
                pool.perform()

    # -- what the server says ---------------------------------------------------------------------------------

    async def introduced(self, server: ServerConnection) -> None:
        """A connection was opened: if it is the first, and the bound is not given, ask on it how many there may
        be."""
        if self.server_max is None and self.options.max_connections is None:
            async with self._asking:
                if self.server_max is None:
                    await self._ask(server)

    async def _ask_again(self) -> None:
        """On a connection that is idle; if none is, next time."""
        async with self._asking:
            for pool in self.pools.values():
                done = await pool.works.on_idle(self._ask)
                if done:
                    return

    async def _ask(self, server: ServerConnection) -> None:
        rows: list[bytes] = []
        loop = asyncio.get_running_loop()
        answered: asyncio.Future[bytes | None] = loop.create_future()

        def done(error: bytes | None) -> None:
            if not answered.done():
                answered.set_result(error)

        server.inject(_QUESTION, done, rows)
        try:
            await asyncio.wait_for(answered, _ASK_TIMEOUT_S)
            server_max, superuser, reserved, there = (int(value or b"") for value in messages.values(rows[0]))
        except (TimeoutError, IndexError, ValueError, ProtocolError):
            # It speaks the protocol and is no PostgreSQL, or is not well: take the default of PostgreSQL.
            if self.server_max is None:
                self.told(100, 3, 0)
            return
        self._asked_at = monotonic()
        mine = self.budget.used - self.budget.gate.pending + (server.slot is None)
        self.told(server_max, superuser + reserved, max(0, there - mine))

    def told(self, server_max: int, reserved: int, others: int) -> None:
        """What the server has said."""
        self.server_max = server_max
        self.reserved = reserved
        self.others = others
        self._bound()
        crowded = others + self.budget.most > server_max - reserved
        if crowded and not self._crowded:
            log.warning(
                "server_crowded",
                server=self.name,
                server_max=server_max,
                reserved=reserved,
                ours=self.budget.most,
                others=others,
            )
        self._crowded = crowded

    def most(self) -> tuple[int, int]:
        """How many may be ours, and how many of them idle."""
        options = self.options
        if self.server_max is None or self.reserved is None:
            first = options.max_connections or DIAL_GATE
            return first, first
        there = max(1, self.server_max - self.reserved)
        most = options.max_connections or max(1, int(options.max_connections_percent * there / 100))
        return most, int(options.max_idle_percent * there / 100)

    def _bound(self) -> None:
        most, max_idle = self.most()
        self.budget.resize(monotonic(), most, max_idle)
        self.serve_soon()

    def refused(self, pool: ProxyPool, fields: dict[str, str]) -> None:
        """The server had no connection to give (53300): ask for no more than there are, for a minute."""
        now = monotonic()
        self.refusals += 1
        if fields.get("R") in _OWN_LIMITS:
            return  # a limit of that role or that database: the others are none the worse
        self.budget.refused(now)
        self.reason = fields.get("M", "") or "the server has no connection to give"
        log.warning("server_full", server=self.name, pool=pool.name, limit=self.budget.limit, error=self.reason)

    def _spawn(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def stop(self) -> None:
        """Ask no more."""
        if self._serving is not None:
            self._serving.cancel()
        for task in self._tasks:
            task.cancel()


class Budgets:
    """The budgets of all servers, and the caps of databases and users. On the event loop."""

    def __init__(self, random: Any) -> None:
        self.random = random
        self.by_server: dict[str, ServerBudget] = {}
        self._caps: dict[tuple[str, str], Cap] = {}

    def join(self, config: Config, pool: ProxyPool) -> None:
        """Give a pool that has no connections yet its budget."""
        database = config.databases[pool.database]
        name = server_name(database)
        server = self.by_server.get(name)
        if server is None:
            server = ServerBudget(name, server_options(config, name), self.random)
            self.by_server[name] = server
        caps = []
        user = config.users.get(pool.user)
        for kind, key, most in (
            ("database", pool.database, database.max_connections),
            ("user", pool.user, user.max_connections if user is not None else None),
        ):
            if most is not None:
                cap = self._caps.setdefault((kind, key), Cap(most))
                cap.most = most
                caps.append(cap)
        server.join(pool, caps)
        pool.budget = server

    def configure(self, config: Config) -> None:
        """Another configuration: bounds that are there move; new ones hold for the pools that come."""
        for name, server in self.by_server.items():
            server.configure(server_options(config, name))
        for (kind, key), cap in self._caps.items():
            sections: Any = config.databases if kind == "database" else config.users
            most = sections[key].max_connections if key in sections else None
            cap.most = most if most is not None else 1 << 30

    def tick(self, now: float) -> None:
        """Every second."""
        for server in self.by_server.values():
            server.tick(now)

    def stop(self) -> None:
        """The end."""
        for server in self.by_server.values():
            server.stop()


def server_name(database: Database) -> str:
    """What a server is known by: host:port, as they are configured."""
    return f"{database.host}:{database.port}"


def server_options(config: Config, name: str) -> Server:
    """The options of a server: its own table, or the general one."""
    return config.servers.get(name, config.server)
