"""What an operator may do to a running daemon: pause, resume, drain, reconnect, kill, shut down.

The console, signals, reloads and tests share these functions. They find out who is meant and when it is over;
what an order means for a connection is the pool machine's to decide. Orders stand: a pool that is made later, for
a user who comes later, obeys them too. On the event loop.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from time import monotonic
from typing import Any

from cenote.core.machine import DRAINING, PAUSED, RUNNING

DRAIN_S = 30.0  # how long a drain serves those who stand in line, unless it is told
_LOOK_S = 0.02
KILLED = "terminating connection due to administrator command"  # as PostgreSQL says it


class OperationError(Exception):
    """An order that cannot be carried out: SQLSTATE and why."""

    def __init__(self, sqlstate: str, text: str) -> None:
        super().__init__(text)
        self.sqlstate = sqlstate
        self.text = text


@dataclass(frozen=True, slots=True)
class Scope:
    """Whom an order is for: everybody, the clients of a database, or one user's of it."""

    database: str | None = None
    user: str | None = None

    def has(self, database: str, user: str) -> bool:
        return self.database in (None, database) and self.user in (None, user)

    def contains(self, other: Scope) -> bool:
        return self.database in (None, other.database) and self.user in (None, other.user)

    def __str__(self) -> str:
        if self.database is None:
            return "all"
        return self.database if self.user is None else f"{self.database}/{self.user}"


ALL = Scope()


def pools_of(daemon: Any, scope: Scope) -> list[Any]:
    """The pools there are now.

    :raises OperationError: there is no such database, or it has no such pool
    """
    found = [pool for pool in daemon.pools if scope.has(pool.database, pool.user)]
    if found or scope.database is None:
        return found
    if scope.database not in daemon.config.databases:
        raise OperationError("3D000", f'there is no database "{scope.database}"; SHOW DATABASES lists them')
    if scope.user is not None and scope.user not in daemon.config.users:
        raise OperationError("42704", f'there is no pool "{scope}"; SHOW POOLS lists them')
    return found


def join(daemon: Any, pool: Any) -> None:
    """A new pool obeys the orders that stand. To be called before its machine starts."""
    mode = RUNNING
    for scope, ordered in daemon.standing:
        if scope.has(pool.database, pool.user):
            mode = ordered
    now = monotonic()
    if mode == PAUSED:
        pool.machine.pause(now)
    elif mode == DRAINING:
        pool.machine.drain(now, now)


def _stand(daemon: Any, scope: Scope, mode: str) -> None:
    """From now on this holds, and what it covers does not any more."""
    kept = [order for order in daemon.standing if not scope.contains(order[0])]
    if mode != RUNNING or any(other.contains(scope) for other, _ in kept):
        kept.append((scope, mode))
    daemon.standing[:] = kept


# -- pools --------------------------------------------------------------------------------------------------


def pause(daemon: Any, scope: Scope = ALL) -> asyncio.Task[None]:
    """Let no transaction begin. The task ends when the running ones have, and all their connections are closed.

    Clients stand in line meanwhile, for as long as their acquire_timeout lets them. Pinned clients keep their
    connections, and the task waits for them to leave. Cancelled, it resumes what was paused. It raises
    OperationError if somebody resumes or drains before it is done.

    :raises OperationError: there is nothing of that name; the pooler shuts down
    """
    _not_stopping(daemon)
    pools = [pool for pool in pools_of(daemon, scope) if pool.machine.mode == RUNNING]
    _stand(daemon, scope, PAUSED)
    now = monotonic()
    for pool in pools:
        pool.machine.pause(now)
        pool.perform()
        pool.listener.look(now)
    released = asyncio.get_running_loop().create_task(_released(daemon, scope, pools))

    def undo(task: asyncio.Task[None]) -> None:
        if task.cancelled() and not daemon.draining:
            daemon.standing[:] = [order for order in daemon.standing if order != (scope, PAUSED)]
            _run_again(pool for pool in pools if pool.machine.mode == PAUSED)

    released.add_done_callback(undo)
    return released


async def _released(daemon: Any, scope: Scope, pools: list[Any]) -> None:
    while any(pool.machine.size for pool in _in_mode(daemon, scope, PAUSED)):  # noqa: ASYNC110 - rare and short
        await asyncio.sleep(_LOOK_S)
    if any(pool.machine.mode != PAUSED for pool in pools):
        raise OperationError("55000", "it was resumed or drained before everything had been released")


def resume(daemon: Any, scope: Scope = ALL) -> None:
    """End a pause or a drain.

    :raises OperationError: there is nothing of that name; the pooler shuts down
    """
    _not_stopping(daemon)
    pools = pools_of(daemon, scope)
    _stand(daemon, scope, RUNNING)
    _run_again(pool for pool in pools if pool not in daemon.leaving)


def drain(daemon: Any, scope: Scope = ALL, timeout: float = DRAIN_S) -> None:
    """Refuse new transactions with 57P01; running ones go on, and those in line are served for `timeout` seconds.

    It does not wait. `resume` ends it.

    :raises OperationError: there is nothing of that name
    """
    pools = pools_of(daemon, scope)
    _stand(daemon, scope, DRAINING)
    now = monotonic()
    for pool in pools:
        pool.machine.drain(now, now + timeout)
        pool.tick_now()


def reconnect(daemon: Any, scope: Scope = ALL) -> None:
    """Close every server connection that was opened before now: idle ones at once, others when they come back.

    :raises OperationError: there is nothing of that name
    """
    now = monotonic()
    for pool in pools_of(daemon, scope):
        pool.machine.refresh(now)
        pool.perform()
        pool.listener.look(now)


def holders(daemon: Any, scope: Scope) -> str:
    """Who has the server connections now, in words; "" if nobody has."""
    clients = [
        server.client
        for pool in pools_of(daemon, scope)
        for server in pool.servers
        if server.client is not None and server.slot is not None
    ]
    pinned = [client for client in clients if client.pin]
    if not clients:
        return ""
    text = f"{_counted(len(clients), 'server connection')} in use"
    if pinned:
        reasons = ", ".join(f"{word}={number}" for word, number in sorted(Counter(c.pin for c in pinned).items()))
        pids = ", ".join(str(getattr(client, "pid", 0)) for client in pinned[:10])
        text += f", {len(pinned)} of them until their clients leave (pinned: {reasons}; pids: {pids})"
    return text


def _in_mode(daemon: Any, scope: Scope, mode: str) -> list[Any]:
    return [pool for pool in daemon.pools if scope.has(pool.database, pool.user) and pool.machine.mode == mode]


def _run_again(pools: Iterable[Any]) -> None:
    now = monotonic()
    for pool in pools:
        pool.machine.resume(now)
        pool.perform()
        pool.listener.look(now)


def _not_stopping(daemon: Any) -> None:
    if daemon.draining:
        raise OperationError("57P01", "the pooler is shutting down")


# -- clients ------------------------------------------------------------------------------------------------


def at_rest(client: Any) -> bool:
    """Whether nothing of this client is under way: it can be sent away without losing anything."""
    server = client.server
    if server is None:
        return client.waiter is None
    return bool(client.pin) and bool(server.rests())


def kill(daemon: Any, pid: int) -> None:
    """End a client with FATAL 57P01 and cancel what it runs.

    :raises OperationError: nobody has this pid
    """
    client = daemon.clients.get(pid)
    if client is None:
        raise OperationError("42704", f"no client has the pid {pid}; SHOW CLIENTS lists them")
    _end(client)


def kill_pool(daemon: Any, scope: Scope) -> int:
    """End all clients of these pools, replication included, and close their server connections; how many clients.

    :raises OperationError: there is nothing of that name
    """
    pools_of(daemon, scope)  # whether it is there
    found = [
        client
        for client in daemon.clients.values()
        if client.login is not None and scope.has(client.login.database, client.login.user)
    ]
    for client in found:
        _end(client)
    reconnect(daemon, scope)
    return len(found)


def _end(client: Any) -> None:
    waiter, server, pool = client.waiter, client.server, client.pool
    client.fail("57P01", KILLED)
    if waiter is not None:
        # It may be slow to go, and must not be served meanwhile.
        client.waiter = None
        pool.machine.abandon(waiter, monotonic())
        waiter.data = None
        pool.perform()
    elif server is not None:
        pool.works.cancel(server)


# -- the end ------------------------------------------------------------------------------------------------

SHUTDOWN, SHUTDOWN_WAIT, SHUTDOWN_IMMEDIATE = "drain", "wait", "now"


def shutdown(daemon: Any, how: str = SHUTDOWN) -> None:
    """Ask whoever runs the daemon to stop it.

    :param how: drain (as Ctrl-C: clients finish their transactions, for a while), wait (for as long as those
        take), now
    """
    daemon.asked.put_nowait(how)


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
