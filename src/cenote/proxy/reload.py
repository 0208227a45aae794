"""Reads the configuration again and makes it hold, while everybody stays connected.

All problems are told at once, and with any nothing is applied. What can change only with a restart keeps its value
and is named. A database that is gone drains: its clients finish their transactions and are sent home, new ones
hear 3D000. Where a pool's connections go or how they begin has changed, old ones are closed when they come back.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import ssl
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from time import monotonic
from typing import Any

from cenote.errors import ConfigError
from cenote.proxy import observe, operations
from cenote.proxy.budget import server_name
from cenote.proxy.config import Config, load_config, pool_options
from cenote.proxy.log import get_log, start_logging
from cenote.proxy.target import Target, target_of

log = get_log("cenote.proxy")

#: Options that hold from one start to the next stop, by key path; the mode of a pool that is there is one too.
NEED_RESTART = ("listen.host", "listen.port", "listen.unix_dir", "metrics_host", "metrics_port")
_RESTART = "takes a restart"
_WHERE = (
    "host",
    "port",
    "dbname",
    "user",
    "password",
    "sslmode",
    "sslrootcert",
    "sslcert",
    "sslkey",
    "sslnegotiation",
)
_LOOK_S = 0.02
_MACHINE = ("max_waiting", "idle_timeout", "max_lifetime", "check_after")


class ReloadError(Exception):
    """Nothing was applied; `problems` says why, each in a line."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


@dataclass(frozen=True, slots=True)
class Changes:
    """What a reload found: key paths that hold now, and what takes a restart, in words."""

    applied: list[str]
    restart: list[str]


async def reload(daemon: Any) -> Changes:
    """Read the configuration again and apply it.

    :raises ReloadError: with every problem; nothing has changed
    """
    read = _reader(daemon)
    if daemon.reloading:
        raise _refused(["a reload is under way"])
    daemon.reloading = True
    try:
        # Off the loop: reading loads every certificate and checks every verifier.
        config = await asyncio.get_running_loop().run_in_executor(None, read)
        kept, restart = _without_restart(daemon.config, config)
        gate = daemon.make_gate(kept)
    except ConfigError as error:
        raise _refused(list(error.problems)) from None
    except (OSError, ssl.SSLError) as error:
        raise _refused([str(error)]) from None
    finally:
        daemon.reloading = False
    applied = differences(daemon.config, kept)
    restart += _apply(daemon, kept, gate)
    log.info(
        "reloaded",
        changed=", ".join(applied) or "nothing",
        restart="; ".join(restart) or None,
        clients=len(daemon.clients),
        pools=len(daemon.pools),
    )
    return Changes(applied, restart)


async def reload_on_signal(daemon: Any) -> None:
    """The same for SIGHUP: the log says what came of it. Without a file it means what it always did, that the
    terminal is gone: stop."""
    if daemon.read_config is None and daemon.config_path is None:
        operations.shutdown(daemon)
        return
    with contextlib.suppress(ReloadError):
        await reload(daemon)


def _reader(daemon: Any) -> Callable[[], Config]:
    if daemon.read_config is not None:
        return daemon.read_config  # type: ignore[no-any-return]
    path = daemon.config_path
    if path is None:
        raise _refused(["there is nothing to read again: this daemon was started without a configuration file"])
    return lambda: load_config(path)


def _refused(problems: list[str]) -> ReloadError:
    log.error("reload_refused", problems="; ".join(problems))
    return ReloadError(problems)


def _without_restart(old: Config, new: Config) -> tuple[Config, list[str]]:
    """The new one with the old values of what cannot change now, and which those are."""
    restart = []
    top: dict[str, Any] = {}
    listen: dict[str, Any] = {}
    for key in NEED_RESTART:
        section, _, name = key.rpartition(".")
        before, after = (getattr(config.listen if section else config, name) for config in (old, new))
        if before != after:
            restart.append(f"{key} = {after!r} {_RESTART}; it stays {before!r}")
            (listen if section else top)[name] = before
    if listen:
        top["listen"] = new.listen.model_copy(update=listen)
    return new.model_copy(update=top) if top else new, restart


# -- what is different --------------------------------------------------------------------------------------


def differences(old: Config, new: Config) -> list[str]:
    """Key paths whose values are not the same; databases, users and servers that are new or gone as a whole."""
    return list(_differences(old, new, ""))


def _differences(old: Any, new: Any, prefix: str) -> Iterator[str]:
    for name in type(new).model_fields:
        before, after = getattr(old, name), getattr(new, name)
        if before == after:
            continue
        key = prefix + name
        if hasattr(type(after), "model_fields"):
            yield from _differences(before, after, f"{key}.")
        elif isinstance(after, dict):
            yield from (f"{key}.{entry}: gone" for entry in before if entry not in after)
            for entry, section in after.items():
                if entry not in before:
                    yield f"{key}.{entry}: new"
                else:
                    yield from _differences(before[entry], section, f"{key}.{entry}.")
        else:
            yield key


# -- applying -----------------------------------------------------------------------------------------------


def _apply(daemon: Any, config: Config, gate: Any) -> list[str]:
    """Make it hold. Nothing in here waits, so that nobody sees half of it. Returns what takes a restart."""
    old: Config = daemon.config
    daemon.config, daemon.gate = config, gate
    daemon.servers.configure(config)
    restart = []
    for pool in list(daemon.pools):
        if pool.database not in config.databases or (
            pool.user in old.users and pool.user not in config.users and not pool.clients
        ):
            _leave(daemon, pool)
            continue
        leaving = daemon.leaving.pop(pool, None)
        if leaving is not None:
            leaving.cancel()
            pool.machine.resume(monotonic())
            operations.join(daemon, pool)
        restart += _adjust(daemon, pool, old, config)
    daemon.open_known()
    if (old.log_level, old.log_format) != (config.log_level, config.log_format):
        if old.log_format != config.log_format:
            start_logging(config.log_level, config.log_format)
        else:
            logging.getLogger("cenote").setLevel(config.log_level.upper())
    return restart


def _adjust(daemon: Any, pool: Any, old: Config, config: Config) -> list[str]:
    """Give a pool its options and its target. Returns what takes a restart."""
    before, machine, now = pool.options, pool.machine, monotonic()
    options = pool_options(config, pool.database, pool.user)
    restart = []
    if options.mode != before.mode:
        restart.append(f'mode of pool "{pool.name}" = {options.mode!r} {_RESTART}; it stays {before.mode!r}')
        options = replace(options, mode=before.mode, observe=options.observe and before.mode == "session")
    target = target_of(config, pool.database, pool.user)
    moved = _place(target) != _place(pool.works.target)
    pool.works.target = target
    _rejoin(daemon, pool, old, config)
    pool.options = options
    pool.acquire_timeout = options.acquire_timeout
    observe.adjust(pool, options.observe, daemon.clients.values())
    pool.max_prepared = options.max_prepared
    for name in _MACHINE:
        setattr(machine, name, getattr(options, name))
    machine.codel_mode = options.codel
    if moved or options.init_query != before.init_query:
        machine.refresh(now)
    if (options.min_size, options.max_size) != (before.min_size, before.max_size):
        machine.resize(now, options.min_size, options.max_size)
    pool.perform()
    return restart


def _place(target: Target) -> tuple[Any, ...]:
    """What makes a connection another one: where it goes, and as whom."""
    return (target.dbname, target.user, target.password, *(getattr(target.database, name) for name in _WHERE))


def _rejoin(daemon: Any, pool: Any, old: Config, new: Config) -> None:
    """Count a pool's connections where its configuration has them now: at another server, under new caps."""
    was, now = old.databases.get(pool.database), new.databases[pool.database]
    if was is None or not (
        server_name(was) != server_name(now)
        or _is_new(was, now)
        or _is_new(old.users.get(pool.user), new.users.get(pool.user))
    ):
        return
    machine, server = pool.machine, pool.budget
    size, pending = machine.size, machine.connecting.size
    share = server.budget.shares.pop(machine)
    server.leave(pool)
    _count(server.budget, share, -size, -pending)
    daemon.servers.join(new, pool)
    _count(pool.budget.budget, pool.budget.budget.shares[machine], size, pending)
    _let_go(daemon, server)


def _is_new(was: Any, now: Any) -> bool:
    """Whether a cap has come."""
    return getattr(was, "max_connections", None) is None and getattr(now, "max_connections", None) is not None


def _count(budget: Any, share: Any, size: int, pending: int) -> None:
    budget.used += size
    budget.gate.pending += pending
    for cap in share.caps:
        cap.used += size


def _let_go(daemon: Any, server: Any) -> None:
    """A server without pools is not asked any more."""
    if not server.pools and not server.budget.used:
        server.stop()
        daemon.budgets.pop(server.name, None)


# -- pools that are gone ------------------------------------------------------------------------------------


def _leave(daemon: Any, pool: Any) -> None:
    if pool not in daemon.leaving:
        now = monotonic()
        pool.machine.drain(now, now + operations.DRAIN_S)
        pool.perform()
        daemon.leaving[pool] = daemon.spawn(_ended(daemon, pool, now + operations.DRAIN_S))


async def _ended(daemon: Any, pool: Any, deadline: float) -> None:
    """Send its clients home as they come to rest, at the deadline all, and close it."""
    while pool.clients:
        late = monotonic() >= deadline
        for client in list(daemon.clients.values()):
            if client.pool is pool and (late or operations.at_rest(client)):
                client.fail("57P01", f'cenote: database "{pool.database}" is no longer served here')
        await asyncio.sleep(_LOOK_S)
    daemon.forget(pool)
    pool.works.stop()
    pool.machine.close(monotonic())
    pool.perform()
    await pool.works.ended()
    daemon.pools.remove(pool)
    pool.budget.leave(pool)
    _let_go(daemon, pool.budget)
