"""The daemon: listens, admits clients, keeps the pools, drains and stops. One event loop, one process.

It decides who may come in and when all ends; pools decide who gets a connection.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import hmac
import math
import os
import random
import resource
import secrets
import signal
import socket
import ssl
from collections.abc import Callable, Coroutine, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from time import monotonic
from typing import Any

from cenote.core.histogram import Histogram
from cenote.errors import ProtocolError
from cenote.proxy import operations
from cenote.proxy.admin.visit import Visit
from cenote.proxy.admission import Admission
from cenote.proxy.auth.keys import KeyCache
from cenote.proxy.auth.lookup import Lookups
from cenote.proxy.auth.maps import NO_MAPS, load_maps
from cenote.proxy.auth.rules import load_rules
from cenote.proxy.auth.secrets import Secrets
from cenote.proxy.balancer import introduction
from cenote.proxy.budget import Budgets
from cenote.proxy.caps import Census
from cenote.proxy.client import ClientSession
from cenote.proxy.config import Config, pool_options
from cenote.proxy.inbox import Inbox
from cenote.proxy.listen import Listener, tcp_sockets, unix_socket
from cenote.proxy.log import flush_logs, get_log
from cenote.proxy.login import Cancel, Gate, Login, login
from cenote.proxy.metrics import start_metrics_server
from cenote.proxy.pool import ProxyPool
from cenote.proxy.reload import reload_on_signal
from cenote.proxy.settings import APPLICATION_NAME, settings_key, with_address
from cenote.proxy.sockets import attach
from cenote.proxy.target import target_of
from cenote.proxy.tunnel import Tunnels
from cenote.proxy.works import Declined, Works, parameters_for
from cenote.wire import messages
from cenote.wire.tls import server_context

log = get_log("cenote.proxy")

#: The virtual database that answers SHOW.
CONSOLE = "cenote"
_SWEEP_S = 1.0
_STOP_S = 10.0
_FAREWELL_S = 10.0  # how long a client that was sent away may take to read why
_HIGH_WATER = 1_048_576  # bytes a peer may have unsent before the other end is made to wait


class Daemon:
    """The proxy of one process.

    :param config: what to listen on, which databases, who may log in
    :param config_path: the file it came from, read again by RELOAD; None: there is none

    read_config: reads it, where what the command line said has to be added; None: it is read as it is
    standing: operators' orders, the last one wins; leaving: pools of databases that are gone
    asked: how to stop (words of operations.py)
    """

    def __init__(self, config: Config, config_path: Path | None = None) -> None:
        self.config = config
        self.config_path = config_path
        self.clients: dict[int, ClientSession] = {}
        self.arriving: dict[ClientSession, asyncio.Task[Any]] = {}
        self.pools: list[ProxyPool] = []
        self.addresses: list[str] = []
        self.port = 0
        self.started = 0.0
        self.logins = Histogram()
        self.login_failures: dict[str, int] = {}
        self.admission = Admission(lambda: self.config.listen)
        self.census = Census()
        self.cancels: dict[str, int] = {}
        self.draining = False
        self.read_config: Callable[[], Config] | None = None
        self.standing: list[tuple[operations.Scope, str]] = []
        self.leaving: dict[ProxyPool, asyncio.Task[Any]] = {}
        self.reloading = False
        self.asked: asyncio.Queue[str] = asyncio.Queue()
        self._by_key: dict[tuple[str, str], ProxyPool] = {}
        self._listeners: list[Listener] = []
        self._tasks: set[asyncio.Task[Any]] = set()
        self._executor = ThreadPoolExecutor(2, "cenote-keys")
        self._keys = KeyCache(self._executor)
        self._lookups = Lookups(self._keys)
        self.tunnels = Tunnels(self._keys)
        self._left = asyncio.Event()  # somebody has left
        self._sweeper: asyncio.TimerHandle | None = None
        self._stop_metrics: Callable[[], None] | None = None
        self._pids = secrets.randbelow(1 << 20) + 1
        self._random = random.Random()
        self.servers = Budgets(self._random.random)
        self.budgets = self.servers.by_server

    # -- beginning and end ------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Listen, and open the warm minimum of every pool that is known by name.

        :raises OSError: an address is taken or not ours
        """
        loop = asyncio.get_running_loop()
        listen = self.config.listen
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft < hard:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        self.gate = self.make_gate(self.config)
        self.started = monotonic()
        try:
            for host in filter(None, (host.strip() for host in listen.host.split(","))):
                for sock in tcp_sockets(host, self.port or listen.port):
                    self._listeners.append(Listener(sock, self._accepted, self._turned_away, self.admission))
                    numeric, self.port = sock.getsockname()[:2]
                    self.addresses.append(
                        f"[{numeric}]:{self.port}" if ":" in numeric else f"{numeric}:{self.port}"
                    )
            if listen.unix_dir is not None:
                path = Path(listen.unix_dir) / f".s.PGSQL.{self.port or listen.port}"
                self._listeners.append(
                    Listener(unix_socket(path), self._accepted, self._turned_away, self.admission)
                )
                self.addresses.append(str(path))
            if self.config.metrics_port is not None:
                self._stop_metrics = start_metrics_server(self, self.config.metrics_host, self.config.metrics_port)
        except BaseException:
            await self.stop()
            raise
        self.open_known()
        self._sweeper = loop.call_later(_SWEEP_S, self._sweep)
        log.info("started", listening=" ".join(self.addresses), pools=len(self.pools))

    def open_known(self) -> None:
        """The pools that are known by name, with their warm minimum."""
        for name, database in self.config.databases.items():
            for user in self.config.users:
                usual = database.user is None or database.user == user or len(self.config.users) == 1
                if usual and self.gate.secrets.can_begin(target_of(self.config, name, user)):
                    self.pool(name, user)

    def make_gate(self, config: Config) -> Gate:
        """What log-ins are decided by under this configuration.

        :raises ConfigError: a certificate, a key, rules, maps or users cannot be read
        """
        listen = config.listen
        context: ssl.SSLContext | None = None
        if listen.tls_cert is not None and listen.tls_mode != "disable":
            context = server_context(listen.tls_cert, listen.tls_key or listen.tls_cert, listen.tls_ca)
        rules = load_rules(config.rules_file) if config.rules_file is not None else None
        maps = load_maps(config.map_file) if config.map_file is not None else NO_MAPS
        known = Secrets(config, self._keys, self._lookups)
        return Gate(config, context, self._keys, rules, maps, known, self.admission)

    async def drain(self, timeout: float = 30.0) -> None:
        """Take no new client, let running transactions end, and send everybody home.

        :param timeout: seconds after which running queries are cancelled
        """
        self.draining = True
        for listener in self._listeners:
            listener.close()
        now = monotonic()
        for pool in self.pools:
            pool.machine.drain(now, now + timeout)
            pool.tick_now()  # it may have been paused, with clients in line and nothing open
        log.info("draining", clients=len(self.clients), timeout_s=timeout)
        deadline = now + timeout
        while self.clients and monotonic() < deadline:
            for client in list(self.clients.values()):
                if operations.at_rest(client):
                    client.fail("57P01", "cenote: the pooler is draining; connect again")
            await asyncio.sleep(0.02)

    async def stop(self) -> None:
        """End everything now: clients hear 57P01, their queries are cancelled, connections closed."""
        self.draining = True
        if self._sweeper is not None:
            self._sweeper.cancel()
        for listener in self._listeners:
            listener.close()
        for client in [*self.clients.values(), *self.arriving]:
            client.fail("57P01", "cenote: the pooler is shutting down")
        for task in list(self._tasks):
            task.cancel()
        await asyncio.sleep(0)
        await self._emptied(1.0)
        for client in [*self.clients.values(), *self.arriving]:
            client.abort()
        await self._emptied(1.0)
        now = monotonic()
        self.servers.stop()
        for pool in self.pools:
            pool.works.stop()
            pool.machine.close(now)
            pool.perform()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_STOP_S):
                for pool in self.pools:
                    await pool.works.ended()
        if self._tasks:
            await asyncio.wait(set(self._tasks))
        await self._lookups.close()
        if self._stop_metrics is not None:
            self._stop_metrics()
        self._executor.shutdown(wait=False, cancel_futures=True)
        log.info("stopped")
        flush_logs(last=True)

    async def _emptied(self, timeout: float) -> None:
        """Wait until no client is left, but not for long."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                while self.clients or self.arriving:
                    self._left.clear()
                    await self._left.wait()

    # -- pools ------------------------------------------------------------------------------------------------

    def pool(self, database: str, user: str) -> ProxyPool:
        """The pool of this database and user."""
        key = (database, user)
        pool = self._by_key.get(key)
        if pool is None:
            options = pool_options(self.config, database, user)
            pool = ProxyPool(self, database, user, options, self._random.random)
            pool.works = Works(pool, target_of(self.config, database, user))
            self._by_key[key] = pool
            self.pools.append(pool)
            self.servers.join(self.config, pool)
            operations.join(self, pool)
            pool.machine.start(monotonic())
            pool.perform()
        return pool

    def forget(self, pool: ProxyPool) -> None:
        """Whoever asks for this pool from now on gets a new one."""
        self.leaving.pop(pool, None)
        if self._by_key.get((pool.database, pool.user)) is pool:
            del self._by_key[pool.database, pool.user]

    def _accepted(self, sock: socket.socket) -> None:
        attach(sock, ClientSession(self))

    def _turned_away(self) -> None:
        self._count(self.login_failures, "no_descriptors")

    # -- clients ----------------------------------------------------------------------------------------------

    def arrived(self, client: ClientSession) -> None:
        """A connection was accepted."""
        transport = client.transport
        client.inbox = Inbox(client.mute, client.unmute)
        transport.set_write_buffer_limits(high=_HIGH_WATER, low=_HIGH_WATER // 4)
        peer = transport.get_extra_info("peername")
        if peer is None:
            client.abort()  # a probe that has hung up already
            return
        client.address = f"{peer[0]}:{peer[1]}" if isinstance(peer, tuple) else "unix"
        task = self.arriving[client] = self.spawn(self._admit(client))
        self.admission.enter(task, lambda sqlstate, text: self._cut(client, sqlstate, text))

    def spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Run a task that ends with the daemon at the latest."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def departed(self, client: ClientSession) -> None:
        """A client's connection has ended."""
        admitting = self.arriving.pop(client, None)
        if admitting is not None:
            admitting.cancel()  # it may stand in line
        self._left.set()
        if self.clients.pop(client.pid, None) is None:
            return
        self.census.left(client.login)
        if client.pool is not None:
            pool = client.pool
            pool.clients -= 1
            pool.bytes_from_clients += client.bytes_in
            pool.bytes_to_clients += client.bytes_out
            pool.client_gone(client)

    async def _admit(self, client: ClientSession) -> None:
        begun = monotonic()
        who: object = None
        try:
            async with asyncio.timeout(self.config.listen.login_timeout):
                label = await introduction(client, self.config.listen.proxy_protocol_from)
                who = await login(client, self.gate)
                if isinstance(who, Cancel):
                    under_way = self.cancel(who.pid, who.secret)
                    if under_way is not None:
                        await asyncio.wait((under_way,))  # when this connection ends, it has been delivered
                elif isinstance(who, Login):
                    client.login = who if who.label or not label else replace(who, label=label)
                    if not self._refused(client) and who.replication is None:
                        await self._welcome(client, who)
                    self.logins.observe(monotonic() - begun)
                elif who is not None:
                    self._count(self.login_failures, who.reason)
                    log.warning(
                        "login_refused",
                        client=client.address,
                        user=who.user,
                        database=who.database,
                        reason=who.reason,
                        sqlstate=who.sqlstate,
                    )
        except TimeoutError:
            self._count(self.login_failures, "timeout")
            client.fail("08P01", f"cenote: log-in took longer than {self.config.listen.login_timeout:g} s")
        except Declined as declined:
            self._count(self.login_failures, "no_server")
            client.write(declined.args[0].replace(b"SERROR\0", b"SFATAL\0").replace(b"VERROR\0", b"VFATAL\0"))
        except ConnectionError:
            pass
        except ProtocolError as error:
            self._count(self.login_failures, "proxy_header")
            log.warning("login_refused", client=client.address, reason="proxy_header", error=str(error.args[0]))
        except Exception as error:
            self._count(self.login_failures, "error")
            log.error("login_failed", client=client.address, error=str(error), exc_info=error)
            client.fail("XX000", "cenote: log-in failed inside the pooler; its log has the details")
        finally:
            self.arriving.pop(client, None)
            self.admission.leave(asyncio.current_task())
            if client.pid == 0 and not (isinstance(who, Login) and who.replication):
                client.close()
        if isinstance(who, Login) and who.replication is not None and not client.ending:
            await self._tunnel(client, who)

    def _refused(self, client: ClientSession) -> bool:
        """Whether there is no room for one more client; it was told."""
        if self.draining:
            client.fail("57P01", "cenote: the pooler is shutting down")
            return True
        database = client.login.database
        if database != CONSOLE and database not in self.config.databases:
            self._count(self.login_failures, "no_database")  # a reload has taken it away since the log-in began
            client.fail("3D000", f'database "{database}" does not exist')
            return True
        full = self.census.refusal(self.config, client.login)
        if full is not None:
            self._count(self.login_failures, full[0])
            client.fail("53300", full[1])
            return True
        return False

    def _cut(self, client: ClientSession, sqlstate: str, text: str) -> None:
        """A log-in has to make room for others."""
        self._count(self.login_failures, "max_logins")
        log.warning("login_refused", client=client.address, reason="max_logins", sqlstate=sqlstate)
        if client.tls is not None and not client.tls.established:
            client.close()  # nothing can be said in the middle of a handshake
        else:
            client.fail(sqlstate, text)

    async def _welcome(self, client: ClientSession, who: Login) -> None:
        """The client is who it says: give it its pool, its key and the server's parameters."""
        if who.database == CONSOLE:
            await self._console(client)
            return
        pool = self.pool(who.database, who.user)
        settings = pool.settings_of(settings_key(who.parameters))
        told = pool.welcome.get(settings)
        if told is None:
            with self.admission.aside():
                parameters = await parameters_for(pool, settings)
            if self._refused(client):
                return  # others were faster
            told = b"".join(messages.parameter_status(*item) for item in parameters.items())
            pool.welcome[settings] = told
        if pool.options.application_name_add_host:
            name = with_address(who.parameters.get(APPLICATION_NAME, b""), client.address)
            settings = pool.settings_of(settings_key({**who.parameters, APPLICATION_NAME: name}))
            told += messages.parameter_status(APPLICATION_NAME, name)  # the last one holds
        client.settings = client.startup = settings
        client.pool = pool
        self._enter(client)
        pool.clients += 1
        if pool.watch is not None:
            pool.watch.enters(client)
        client.write(
            messages.AUTHENTICATION_OK
            + told
            + messages.backend_key_data(client.pid, client.secret)
            + messages.READY_IDLE
        )
        self._begin(client)

    def _enter(self, client: ClientSession) -> None:
        """Give the client its key: a positive number nobody has, and a secret."""
        while self._pids in self.clients:
            self._pids = self._pids % 0x7FFFFFFF + 1
        client.pid = self._pids
        self._pids = self._pids % 0x7FFFFFFF + 1
        client.secret = secrets.token_bytes(32 if client.login.version >= messages.PROTOCOL_3_2 else 4)
        self.clients[client.pid] = client
        self.census.entered(client.login)
        self.arriving.pop(client, None)

    def _begin(self, client: ClientSession) -> None:
        """From here on the session reads for itself."""
        inbox = client.inbox
        client.inbox = None
        client.connected = client.since = monotonic()
        client.unmute()
        rest = inbox.take() if inbox is not None else b""
        if rest:
            client.received(rest)

    async def _tunnel(self, client: ClientSession, who: Login) -> None:
        """A replication connection: a server connection of its own, and nothing in between."""
        self._enter(client)
        key = messages.backend_key_data(client.pid, client.secret)
        target = target_of(self.config, who.database, who.user)
        timeout = self.config.listen.login_timeout
        await self.tunnels.run(client, who, target, timeout=timeout, key=key, secrets=self.gate.secrets)

    async def _console(self, client: ClientSession) -> None:
        """The virtual database: read, answer, until the client ends."""
        visit = Visit(self, client)
        self._enter(client)
        client.write(
            messages.AUTHENTICATION_OK
            + visit.console.greeting()
            + messages.backend_key_data(client.pid, client.secret)
            + messages.READY_IDLE
        )
        inbox = client.inbox
        client.inbox = visit
        client.unmute()
        if inbox is not None:
            visit.feed(inbox.take())

    # -- cancels ----------------------------------------------------------------------------------------------

    def cancel(self, pid: int, secret: bytes) -> asyncio.Task[Any] | None:
        """A CancelRequest: it can only hit what this very client is running, or waits for.

        Returns the task that passes it on, if there is one to wait for.
        """
        client = self.clients.get(pid)
        if client is None or not hmac.compare_digest(client.secret, secret):
            self.count_cancel("unknown")
        elif client.waiter is not None:
            client.pool.machine.abandon(client.waiter, monotonic())
            client.waiter.data = None
            self.count_cancel("while_waiting")
            client.refuse(messages.error("ERROR", "57014", "canceling statement due to user request"))
            client.pool.perform()
        elif client.server is not None and client.server.replies.kind:
            return client.pool.works.cancel(client.server)  # type: ignore[no-any-return]
        elif client.login.replication is not None:
            return self.spawn(self.tunnels.cancel(client))
        elif isinstance(client.inbox, Visit) and client.inbox.console.cancel():
            self.count_cancel("delivered")
        else:
            self.count_cancel("idle")
        return None

    def count_cancel(self, word: str) -> None:
        """What became of a cancel request."""
        self._count(self.cancels, word)

    def cut_later(self, client: ClientSession) -> None:
        """A client that was sent away and does not read that is not waited for forever."""
        asyncio.get_running_loop().call_later(_FAREWELL_S, client.abort)

    def malformed(self, client: ClientSession, error: Exception) -> None:
        """A client broke the protocol."""
        log.warning("client_protocol_error", client=client.address, error=str(error))

    def _count(self, counts: dict[str, int], word: str) -> None:
        counts[word] = counts.get(word, 0) + 1

    def _sweep(self) -> None:
        now = monotonic()
        for pool in self.pools:
            pool.works.sweep(now)
        self.servers.tick(now)
        flush_logs()
        self._sweeper = asyncio.get_running_loop().call_later(_SWEEP_S, self._sweep)

    def sessions(self) -> Iterable[ClientSession]:
        """All logged-in clients."""
        return self.clients.values()


def run(config: Config, on_ready: Callable[[Daemon], None] | None = None, drain_timeout: float = 30.0) -> None:
    """Serve until SIGINT or SIGTERM; the first one drains, the second one stops at once. SIGHUP reloads."""
    try:
        import uvloop

        runner = asyncio.Runner(loop_factory=uvloop.new_event_loop)
    except ImportError:
        runner = asyncio.Runner()
    with runner:
        runner.run(_serve(config, on_ready, drain_timeout))


async def _serve(config: Config, on_ready: Callable[[Daemon], None] | None, drain_timeout: float) -> None:
    loop = asyncio.get_running_loop()
    daemon = Daemon(config)
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, operations.shutdown, daemon)
    loop.add_signal_handler(signal.SIGHUP, lambda: daemon.spawn(reload_on_signal(daemon)))
    await daemon.start()
    try:
        if on_ready is not None:
            on_ready(daemon)
        # What is there now stays: the collector need not look at it again (25 ms in a storm of log-ins).
        gc.collect()
        gc.freeze()
        how = await daemon.asked.get()
        log.info("stopping", clients=len(daemon.clients), pid=os.getpid(), how=how)
        if how == operations.SHUTDOWN_IMMEDIATE:
            return
        timeout = math.inf if how == operations.SHUTDOWN_WAIT else drain_timeout
        draining = loop.create_task(daemon.drain(timeout))
        again = loop.create_task(daemon.asked.get())
        await asyncio.wait((draining, again), return_when=asyncio.FIRST_COMPLETED)
        for task in (draining, again):
            task.cancel()
    finally:
        await daemon.stop()
