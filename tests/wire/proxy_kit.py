"""What the wire tests are made of: a proxy in a thread of its own before whatever server, and the comparison of
what a script hears from PostgreSQL with what it hears through the proxy.
"""

from __future__ import annotations

import asyncio
import functools
import secrets
import threading
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from typing import Any

import uvloop

from cenote.testing.postgres import wait_until
from cenote.testing.scripted_server import ScriptedServer, ServerEnd
from cenote.testing.wire import Address, Message, RawClient, Step, kinds, login_trace, normalised, play, value
from cenote.wire import messages
from pool_kit import Admin, until

__all__ = [
    "BIND",
    "DEADLINE_S",
    "EXECUTE",
    "GATE",
    "PARSE",
    "SLEEP",
    "Admin",
    "Differential",
    "RunningProxy",
    "config_for",
    "finishes_anyway",
    "logged_in",
    "not_running",
    "running",
    "until",
    "wire",
    "works",
]

DEADLINE_S = 60.0  # one whole test

SLEEP = "SELECT pg_sleep(60)"
GATE = "SELECT pg_advisory_xact_lock(20061)"  # waits until the fixture `gate` opens it

# One batch of the extended protocol, but for its Sync: it answers "12DC".
PARSE = messages.parse(b"", b"SELECT 7\0\0\0")
BIND = messages.message(b"B", bytes(8))
EXECUTE = messages.message(b"E", bytes(5))


def wire(body: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    """A test whose body is a coroutine function, with a deadline for the whole of it."""

    @functools.wraps(body)
    def test(*args: Any, **named: Any) -> None:
        async def run() -> None:
            try:
                async with asyncio.timeout(DEADLINE_S):
                    await body(*args, **named)
            finally:
                # A test that failed must not hold on to what the next one needs.
                for client in list(RawClient.live):
                    await client.abort()

        asyncio.run(run())

    return test


async def running(admin: Admin, sql: str) -> int:
    """The process id of the backend that runs this text, as soon as there is one."""
    find = "SELECT pid FROM pg_stat_activity WHERE query = %s AND state = 'active' AND pid <> pg_backend_pid()"
    return int((await until(lambda: admin.rows(find, (sql,)), f"{sql!r} runs"))[0][0])


async def not_running(admin: Admin, sql: str) -> None:
    """Wait until no backend runs this text."""
    find = "SELECT pid FROM pg_stat_activity WHERE query = %s AND state = 'active' AND pid <> pg_backend_pid()"
    await until(lambda: not admin.rows(find, (sql,)), f"{sql!r} runs no more")


async def works(client: RawClient) -> None:
    """The session is usable and nobody else's answer is under way."""
    token = secrets.token_hex(4)
    answer = await client.query(f"SELECT '{token}'")
    assert kinds(answer) == "TDCZ", answer
    assert value(answer) == token


async def finishes_anyway(session: ServerEnd) -> None:
    """The cancel comes too late for the first query."""
    await session.expect("Q")
    await session.cancelled.wait()
    session.answer("finished")
    await session.serve()


class RunningProxy:
    """A daemon on an event loop in a thread of its own, so that drivers of every kind can be its clients.

    `user`, `password` and `database` are what a test logs in with; `server` is what stands behind it.
    """

    incidents = 0  # that the test has planted

    def __init__(self, config: Mapping[str, Any], server: Any) -> None:
        self.server = server
        self.config = config
        self.user: str = server.user
        self.password: str = server.password
        self.database: str = server.database
        self.daemon: Any = None
        self.problems: list[str] = []
        self._loop: asyncio.AbstractEventLoop | None = None
        self._started = threading.Event()
        self._stop: asyncio.Event | None = None
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="proxy under test", daemon=True)

    # -- life ------------------------------------------------------------------------------------------------

    def start(self) -> RunningProxy:
        self._thread.start()
        assert self._started.wait(30), "the proxy did not start within 30 s"
        if self._failure is not None:
            raise self._failure
        return self

    def stop(self) -> None:
        """Stop it and wait; raises what went wrong on its loop. Again: nothing."""
        if self.alive:
            assert self._loop is not None
            assert self._stop is not None
            self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join(30)
            assert not self._thread.is_alive(), "the proxy did not stop within 30 s"
        self.no_problems()
        if self._failure is not None:
            raise self._failure

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def _run(self) -> None:
        try:
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                runner.run(self._main())
        except BaseException as failure:
            self._failure = failure
        finally:
            self._started.set()

    async def _main(self) -> None:
        from cenote.proxy.config import config_of
        from cenote.proxy.daemon import Daemon

        self._loop = asyncio.get_running_loop()
        self._loop.set_exception_handler(self._problem)
        self._stop = asyncio.Event()
        self.daemon = Daemon(config_of(self.config))
        await self.daemon.start()
        self._started.set()
        await self._stop.wait()
        await self.daemon.stop()

    def _problem(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        self.problems.append(f"{context.get('message')}: {context.get('exception')!r}")

    # -- clients ---------------------------------------------------------------------------------------------

    @property
    def port(self) -> int:
        return int(self.daemon.port)

    @property
    def address(self) -> Address:
        return Address("127.0.0.1", self.port)

    @property
    def dsn(self) -> str:
        return self.dsn_for()

    def dsn_for(self, *, user: str = "", password: str = "", database: str = "") -> str:
        """A URL for drivers."""
        return (
            f"postgresql://{user or self.user}:{password or self.password}@127.0.0.1:{self.port}"
            f"/{database or self.database}"
        )

    async def client(self, **named: Any) -> RawClient:
        """A connected client that has logged in; `params` and `version` as in `RawClient.startup`, the rest as
        in `RawClient.connect`."""
        return await logged_in(self.address, self, **named)

    # -- its inside, looked at on its own loop ---------------------------------------------------------------

    def call(self, function: Callable[[], Any]) -> Any:
        """What `function()` returns on the proxy's loop."""

        async def there() -> Any:
            return function()

        assert self._loop is not None
        return asyncio.run_coroutine_threadsafe(there(), self._loop).result(10)

    def begin(self, work: Callable[[], Coroutine[Any, Any, Any]]) -> asyncio.Future[Any]:
        """Start `work()` on the proxy's loop; the future is the caller's."""
        assert self._loop is not None
        return asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work(), self._loop))

    def pools(self) -> list[Any]:
        """The pools there are now."""
        found = self.daemon.pools
        return list(found.values() if isinstance(found, Mapping) else found)

    def counts(self) -> dict[str, int]:
        """How many slots are in each state, over all pools; and `waiting`."""
        return self.call(self.counts_now)

    def counts_now(self) -> dict[str, int]:
        """The same, on the proxy's loop."""
        states = ("connecting", "checking", "leased", "resetting", "closing", "waiting")
        counts = dict.fromkeys((*states, "idle"), 0)
        for pool in self.pools():
            pool.machine.check()
            for state in states:
                counts[state] += len(getattr(pool.machine, state))
            counts["idle"] += pool.machine.shelf.size()
        return counts

    def limits(self) -> dict[str, Any]:
        """The budget of its only server."""

        def now() -> dict[str, Any]:
            (server,) = self.daemon.budgets.values()
            server.budget.check()
            return {
                "limit": server.budget.limit,
                "most": server.budget.most,
                "used": server.budget.used,
                "others": server.others,
                "refusals": server.refusals,
            }

        return dict(self.call(now))

    def until(self, what: str = "", *, timeout: float = 10.0, **wanted: int) -> None:
        """Wait until the counts are these: `until(leased=1, waiting=2)`. It blocks the loop."""
        wait_until(
            lambda: self.counts().items() >= wanted.items(), timeout=timeout, what=f"{what} {wanted} in {self}"
        )

    async def reached(self, what: str = "", **wanted: int) -> None:
        """The same for coroutines: whatever runs on the test's own loop goes on meanwhile."""
        await until(lambda: self.counts().items() >= wanted.items(), f"{what} {wanted} in {self}")

    def clients(self) -> int:
        """How many clients there are, those that log in included."""
        return int(self.call(lambda: len(self.daemon.clients) + len(self.daemon.arriving)))

    def clean(self) -> None:
        """Nothing is left over: no client, lease or waiter; every invariant of the machines holds."""
        wait_until(lambda: self.clients() == 0, what="no client is left")
        self.until("nothing is left", leased=0, waiting=0, resetting=0, checking=0, connecting=0, closing=0)
        self.no_problems()
        incidents = self.call(lambda: sum(pool.incidents for pool in self.pools()))
        assert incidents == self.incidents, "a session leaked"

    async def finish(self) -> None:
        """`clean` and `stop` for coroutines: a scripted server goes on meanwhile."""
        await asyncio.to_thread(self.clean)
        await asyncio.to_thread(self.stop)

    def no_problems(self) -> None:
        """Nothing has been raised into the event loop."""
        problems, self.problems = self.problems, []
        assert not problems, f"raised on the proxy's event loop: {problems}"

    def __repr__(self) -> str:
        counts = self.counts() if self.alive else "stopped"
        return f"<RunningProxy {counts}>"


async def logged_in(
    address: Address,
    login: Any,
    *,
    user: str = "",
    database: str = "",
    password: str = "",
    params: Mapping[str, str] | None = None,
    version: int = messages.PROTOCOL_3_0,
    **connect: Any,
) -> RawClient:
    """A client of `address` logged in with what `login` has, or what is given."""
    client = await RawClient.connect(address, **connect)
    try:
        await client.startup(
            user or login.user, database or login.database, password or login.password, params, version
        )
    except BaseException:
        await client.abort()
        raise
    return client


def config_for(
    server: Any,
    *,
    listen: Mapping[str, Any] | None = None,
    users: Mapping[str, Any] | None = None,
    databases: Mapping[str, Any] | None = None,
    top: Mapping[str, Any] | None = None,
    **database_options: Any,
) -> dict[str, Any]:
    """The configuration of a proxy before `server`, a `Postgres`, `ScriptedServer` or anything with a host, port,
    database, user and password.

    database_options: of that database: `mode`, `max_size`... listen, users, databases, top: added to their tables.
    """
    database = {
        "host": server.host,
        "port": server.port,
        "sslmode": "disable",
        "min_size": 0,
        "max_size": 4,
        # After each transaction the server is asked whether the session is what it is taken for.
        "audit": "off" if isinstance(server, ScriptedServer) else "always",
        "acquire_timeout": 20.0,
    }
    return {
        "listen": {"host": "127.0.0.1", "port": 0, **(listen or {})},
        "auth": "scram-sha-256",
        "databases": {server.database: {**database, **database_options}, **(databases or {})},
        "users": {server.user: {"password": server.password}, **(users or {})},
        "log_level": "warning",
        # A scripted server has no settings to ask for.
        **({"server": {"max_connections": 1000}} if isinstance(server, ScriptedServer) else {}),
        **(top or {}),
    }


class Differential:
    """Plays a script on PostgreSQL and through the proxy, and holds the two traces against each other.

    A script is a sequence of steps: bytes are sent, `ready(n)`, `until("G")` and `END` are waited for.
    """

    def __init__(self, server: Any, proxy: RunningProxy) -> None:
        self.server = server
        self.proxy = proxy

    async def __call__(
        self,
        *steps: Step,
        setup: str = "",
        teardown: str = "",
        pieces: Sequence[int] = (0, 3),
        texts: bool = True,
        params: Mapping[str, str] | None = None,
        version: int = messages.PROTOCOL_3_0,
    ) -> list[Message]:
        """Returns what PostgreSQL said, for the test to see that the script did what it was meant to do.

        setup, teardown: SQL that PostgreSQL runs before and after each play. pieces: play through the proxy once
        for each, that many bytes at a time (0: step by step). texts: False compares errors by SQLSTATE and
        severity only, where the proxy speaks for itself.
        """
        said = await self._play(
            Address(self.server.host, self.server.port), steps, 0, setup, teardown, params, version
        )
        for size in pieces:
            heard = await self._play(self.proxy.address, steps, size, setup, teardown, params, version)
            assert login_trace(heard[0]) == login_trace(said[0]), "the log-ins differ"
            got, wanted = normalised(heard[1], texts=texts), normalised(said[1], texts=texts)
            assert got == wanted, f"in pieces of {size}: {got} instead of {wanted}"
        return said[1]

    async def _play(
        self,
        address: Address,
        steps: Sequence[Step],
        pieces: int,
        setup: str,
        teardown: str,
        params: Mapping[str, str] | None,
        version: int,
    ) -> tuple[list[Message], list[Message]]:
        server = self.server
        await self._run(setup)
        try:
            async with await RawClient.connect(address) as client:
                login = await client.startup(server.user, server.database, server.password, params, version)
                trace = await play(client, steps, pieces=pieces)
                await client.terminate()
                return login, trace
        finally:
            await self._run(teardown)

    async def _run(self, sql: str) -> None:
        if sql:
            async with await logged_in(Address(self.server.host, self.server.port), self.server) as client:
                answer = await client.query(sql)
                assert "E" not in {message.kind for message in answer}, answer
                await client.terminate()
