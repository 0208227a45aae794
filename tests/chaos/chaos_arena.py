"""Where the chaos run takes place: clients - faults - Cenote - faults - PostgreSQL; what is done to it, and who
judges what clients were told.

The proxy runs in a thread of this process, so that its counts, its event loop's complaints and its objects can be
looked at. Everything that is drawn comes from one seed.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import asyncpg
import psycopg
from proxy_kit import RunningProxy, config_for

from cenote import embedded
from cenote.proxy.client import ClientSession
from cenote.proxy.server import ServerConnection
from cenote.testing.faults import FaultProxy, at_random, nothing
from cenote.testing.postgres import wait_until
from cenote.testing.wire import LoginRefused, WireFailure
from pool_kit import until

MAX_SIZE = 6
ACCOUNTS = 20
START = 1000
SCHEMAS = 4
DEADLINE_S = 60.0
PROGRESS = 60  # answers that clients must get between one harm and the next

#: What a client may be told when things break: shutdown, crash, starting up, no connection in time, connection
#: lost. 08P01, a protocol violation, is none of them, and 57014 is for those only whom somebody cancelled.
CLEAR_STATES = {"57P01", "57P02", "57P03", "53300", "08000", "08001", "08003", "08006", "58000"}
CANCELLED = "57014"

SETUP = f"""
CREATE TABLE account (id int PRIMARY KEY, balance int NOT NULL);
CREATE TABLE receipt (number int PRIMARY KEY);
CREATE TABLE dump (note text);
INSERT INTO account SELECT id, {START} FROM generate_series(1, {ACCOUNTS}) AS id;
""" + "".join(
    f"CREATE SCHEMA s{n}; CREATE TABLE s{n}.who (owner text); INSERT INTO s{n}.who VALUES ('s{n}');\n"
    for n in range(SCHEMAS)
)


class WrongAnswer(Exception):
    """A client was told something that is not true, or not its own."""


class Arena:
    """Use it with `async with`. `begin` the clients first; `over` becomes true when they are to go home."""

    def __init__(self, server: embedded.Postgres, seed: int) -> None:
        self.server = server
        self.seed = seed
        self.chance = random.Random(f"{seed}/arena")
        self.over = False
        self.answers = 0
        self.ends: Counter[str] = Counter()
        self.harms: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.done: set[int] = set()  # numbers of transfers whose client was told "committed"
        self.cancellable: dict[int, tuple[int, bytes]] = {}  # worker: its key, while somebody may cancel it
        self._numbers = iter(range(1, 1 << 31))
        self._hands = ThreadPoolExecutor(1, "harm")  # one thread: a server object is for one

    async def __aenter__(self) -> Arena:
        self.back = FaultProxy(self.server.host, self.server.port)
        self.back.start()
        behind = SimpleNamespace(
            host=self.back.host,
            port=self.back.port,
            user=self.server.user,
            password=self.server.password,
            database=self.server.database,
        )
        options = {"max_size": MAX_SIZE, "acquire_timeout": 20.0, "connect_timeout": 2.0, "cleanup_timeout": 1.0}
        config = config_for(behind, top={"log_level": "error"}, **options)
        self.proxy = await asyncio.to_thread(RunningProxy(config, behind).start)
        self.front = FaultProxy("127.0.0.1", self.proxy.port)
        self.front.start()
        return self

    async def __aexit__(self, *_: Any) -> None:
        await self.front.close()
        try:
            await asyncio.to_thread(self.proxy.stop)
        finally:
            await self.back.close()
            self._hands.shutdown()

    @property
    def login(self) -> dict[str, Any]:
        """How a client gets in, by the names drivers use."""
        return {
            "host": self.front.host,
            "port": self.front.port,
            "user": self.server.user,
            "password": self.server.password,
        }

    @property
    def database(self) -> str:
        return self.server.database

    def number(self) -> int:
        """A number that was never given before."""
        return next(self._numbers)

    # -- judging ----------------------------------------------------------------------------------------------

    def answered(self, right: bool, what: object) -> None:
        """A client got an answer."""
        if not right:
            raise WrongAnswer(str(what))
        self.answers += 1

    def judge(self, who: object, error: BaseException, *, cancellable: bool = False) -> None:
        """How a client's session ended: by something that may happen, or not."""
        self.ends[_name(error)] += 1
        if not _clear(error, cancellable):
            self.wrong.append(f"{who}: {error!r:.400} {getattr(error, 'sqlstate', '')}")

    # -- doing harm -------------------------------------------------------------------------------------------

    def faulty(self) -> None:
        """From now on connections on both sides are harmed by chance."""
        self.front.plan = at_random(f"{self.seed}/front", share=0.25)
        self.back.plan = at_random(f"{self.seed}/back", share=0.25)

    async def harm(self) -> None:
        """One thing that goes wrong for many."""
        harms: dict[Callable[[], Awaitable[None]], int] = {
            self._terminate_some: 5,
            self._cut_back: 3,
            self._cut_front: 3,
            self._stall_back: 2,
            self._refuse: 2,
            self._kill_backend: 1,
            self._restart: 1,
        }
        (harm,) = self.chance.choices(list(harms), list(harms.values()))
        self.harms[harm.__name__.strip("_")] += 1
        await harm()

    async def progress(self, enough: int = PROGRESS) -> None:
        """Until clients have got so many more answers, faults or not: service comes back by itself."""
        goal = self.answers + enough
        since = time.monotonic()
        while self.answers < goal and not self.wrong:
            if time.monotonic() - since > DEADLINE_S:
                raise AssertionError(
                    f"{self.answers - goal + enough} of {enough} answers in {DEADLINE_S:g} s: {self}"
                )
            await asyncio.sleep(0.005)
            if time.monotonic() - since > 1.0:  # nobody is held up for longer by what the network swallowed
                for proxy in (self.front, self.back):
                    for link in proxy.links:
                        if any(fault.what in ("stall", "swallow") for fault in link.faults):
                            link.cut()

    async def _terminate_some(self) -> None:
        share = self.chance.choice((0.2, 0.5, 1.0))
        await self._by_hand(
            lambda: self._sql(
                f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = '{self.server.user}'"
                f" AND random() < {share}"
            )
        )

    async def _kill_backend(self) -> None:
        """SIGKILL: the postmaster then ends all sessions and recovers."""

        def kill() -> None:
            rows = self._sql(f"SELECT pid FROM pg_stat_activity WHERE usename = '{self.server.user}' LIMIT 1")
            for (pid,) in rows:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

        await self._by_hand(kill)

    async def _restart(self) -> None:
        mode = self.chance.choice(("fast", "immediate"))
        await self._by_hand(lambda: self.server.restart(mode))

    async def _cut_back(self) -> None:
        for link in self.chance.sample(self.back.links, len(self.back.links) // 2):
            link.cut(reset=self.chance.random() < 0.5)

    async def _cut_front(self) -> None:
        for link in self.chance.sample(self.front.links, len(self.front.links) // 3):
            link.cut(reset=self.chance.random() < 0.5)

    async def _stall_back(self) -> None:
        """Everything hangs, and then goes on or is lost."""
        links = self.back.links
        for link in links:
            link.stall()
        await asyncio.sleep(self.chance.uniform(0, 0.2))
        for link in links:
            link.cut() if self.chance.random() < 0.3 else link.go_on()

    async def _refuse(self) -> None:
        self.back.refuse()
        await self._cut_back()
        await asyncio.sleep(self.chance.uniform(0, 0.2))
        self.back.start()

    async def _by_hand(self, deed: Callable[[], Any]) -> None:
        await asyncio.get_running_loop().run_in_executor(self._hands, deed)

    def _sql(self, sql: str) -> list[Any]:
        """As the superuser; nothing when the server is just not there."""
        with contextlib.suppress(psycopg.OperationalError):
            with psycopg.connect(self.server.superuser_dsn, autocommit=True) as conn:
                cursor = conn.execute(sql.encode())
                return cursor.fetchall() if cursor.description else []
        return []

    # -- afterwards -------------------------------------------------------------------------------------------

    async def calm(self) -> None:
        """No more faults, and what is faulty is gone."""
        for proxy in (self.front, self.back):
            proxy.plan = nothing
            for link in proxy.links:
                if link.faults:
                    link.cut()
                link.go_on()
        await until(lambda: not any(link.faults for link in self.front.links + self.back.links), timeout=20)
        await asyncio.to_thread(wait_until, lambda: self._sql("SELECT 1") == [(1,)], timeout=30)

    async def assert_nothing_left(self) -> None:
        """No client, lease, waiter or lost connection; what the proxy counts is what the server has."""
        await until(lambda: not self.front.links, "the clients' connections to end", timeout=30)
        await asyncio.to_thread(self.proxy.clean)
        sessions = (
            "SELECT count(*) FILTER (WHERE state = 'idle'), count(*) FROM pg_stat_activity"
            f" WHERE usename = '{self.server.user}'"
        )

        def agreed() -> bool:
            idle = self.proxy.counts()["idle"]
            return self._sql(sessions) == [(idle, idle)] and len(self.back.links) == idle

        try:
            await asyncio.to_thread(wait_until, agreed, timeout=30)
        except TimeoutError:
            told = self._sql("SELECT pid, state, query FROM pg_stat_activity WHERE usename = 'app'")
            raise AssertionError(f"{self}: the server has {told}, links {len(self.back.links)}") from None
        assert self.proxy.counts()["idle"] <= MAX_SIZE

    def books(self) -> None:
        """No half of a transfer was kept, and whoever was told "committed" was told the truth."""
        ((total, accounts),) = self._sql("SELECT sum(balance), count(*) FROM account")
        assert (total, accounts) == (ACCOUNTS * START, ACCOUNTS)
        receipts = {row[0] for row in self._sql("SELECT number FROM receipt")}
        assert self.done <= receipts, f"told that it was done, and it was not: {sorted(self.done - receipts)}"
        balances = dict.fromkeys(range(1, ACCOUNTS + 1), START)
        for number in receipts:
            payer, payee = parties(number)
            balances[payer] -= 1
            balances[payee] += 1
        assert dict(self._sql("SELECT id, balance FROM account")) == balances

    def __repr__(self) -> str:
        return (
            f"<seed {self.seed}: {self.answers} answers, {len(self.done)} transfers, harms {dict(self.harms)},"
            f" faults before {dict(self.front.struck)}, behind {dict(self.back.struck)}, ends {dict(self.ends)},"
            f" {self.proxy!r}, wrong {self.wrong}>"
        )


def parties(number: int) -> tuple[int, int]:
    """Payer and payee of a transfer."""
    payer, payee = random.Random(number).sample(range(1, ACCOUNTS + 1), 2)
    return payer, payee


def sessions_in_memory() -> Counter[str]:
    """How many clients' and servers' sessions the process still knows, by class."""
    gc.collect()
    kinds = (ClientSession, ServerConnection)
    return Counter(type(found).__name__ for found in gc.get_objects() if isinstance(found, kinds))


def _name(error: BaseException) -> str:
    if isinstance(error, LoginRefused):
        return f"refused {error.fields.get('C')}"
    return f"{type(error).__name__} {getattr(error, 'sqlstate', None) or ''}".strip()


def _clear(error: BaseException, cancellable: bool) -> bool:
    """Whether a client may be told that when things break."""
    state = error.fields.get("C") if isinstance(error, LoginRefused) else getattr(error, "sqlstate", None)
    if state:
        return state in CLEAR_STATES or (state == CANCELLED and cancellable)
    if isinstance(error, WireFailure):
        return "the other end is gone" in str(error) or "nothing within" in str(error)
    if isinstance(error, asyncpg.InternalClientError):
        # What asyncpg says, also without a proxy, when the server's last word came just before a statement.
        return "cannot switch to state" in str(error)
    if isinstance(error, psycopg.InternalError):
        # What psycopg makes of BEGIN or COMMIT when libpq reads the server's FATAL and the end of the connection
        # one after the other: two failed results. Without SQLSTATE, so it is not the server's own.
        return "received 2 results from command" in str(error)
    gone = (OSError, TimeoutError, psycopg.OperationalError, psycopg.InterfaceError, asyncpg.InterfaceError)
    return isinstance(error, gone)
