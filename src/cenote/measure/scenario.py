"""A scenario of `cenote storm`: who asks how often, what a query and a connection cost, what happens meanwhile.

Scenarios are TOML files; a good set is included. Each option is declared once, with its unit and range; unknown
names and wrong values are refused, all of them at once. Requests are drawn from a seed, so that a simulation and a
real run get the very same ones.
"""

import difflib
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from cenote.config import Option
from cenote.errors import ConfigError

MOST_REQUESTS = 5_000_000
_KINDS = {"int": "int", "float": "float", "str": "str"}


def _option(default: Any, text: str, **known: Any) -> Any:
    return field(default=default, metadata={"option": Option(text, **known)})


@dataclass(frozen=True, slots=True)
class Server:
    """[server]"""

    cores: int = _option(8, "CPUs of the server", low=1, high=1024)
    max_connections: int = _option(100, "what it allows", low=4, high=100_000)
    reserved: int = _option(3, "of these, kept for superusers", low=0, high=1000)


@dataclass(frozen=True, slots=True)
class Costs:
    """[costs]"""

    query_ms: float = _option(0.5, "server CPU of a query, on average", unit="ms", low=0.001, high=60_000)
    wait_ms: float = _option(0.5, "a query's waiting for disk, locks, sleep", unit="ms", low=0, high=60_000)
    spread: float = _option(1.0, "standard deviation of these by their mean; 0: all alike", low=0, high=5)
    connect_ms: float = _option(
        4.0, "server CPU of a connection: process, TLS, password", unit="ms", low=0, high=10_000
    )
    fork_ms: float = _option(
        0.4, "of one process that starts all sessions, one at a time", unit="ms", low=0, high=1000
    )
    connect_wait_ms: float = _option(2.0, "round trips of a connection", unit="ms", low=0, high=10_000)
    close_ms: float = _option(1.0, "until the server has let go of one", unit="ms", low=0, high=10_000)
    contention: float = _option(
        0.0, "share of the work done one at a time (of the scalability law)", low=0, high=1
    )
    coherency: float = _option(0.000002, "price of each pair of active connections (of the same)", low=0, high=1)
    law_to: int = _option(
        0,
        "active connections up to which that law was measured, CPUs and all; 0: it is none of a measured server",
        low=0,
        high=100_000,
    )
    proxy_ms: float = _option(0.03, "the proxy's CPU for a request", unit="ms", low=0, high=1000)
    hop_ms: float = _option(0.2, "the way through the proxy and back", unit="ms", low=0, high=1000)


@dataclass(frozen=True, slots=True)
class Clients:
    """[clients]"""

    instances: int = _option(10, "processes of the program, each with a pool", low=1, high=10_000)
    pool_size: int = _option(10, "max_size of each", low=1, high=10_000)
    min_size: int = _option(2, "min_size of each", low=0, high=10_000)
    timeout_s: float = _option(5.0, "acquire_timeout", unit="seconds", low=0, high=600)
    max_waiting: int = _option(10_000, "who may stand in line at a pool", low=0, high=10_000_000)
    idle_timeout_s: float = _option(300.0, "idle_timeout", unit="seconds", low=0, above=True, high=86_400)
    budget: int = _option(
        0, "bound of all local pools together; 0: 70 % of what the server gives", low=0, high=100_000
    )
    proxy_size: int = _option(0, "max_size of the proxy; 0: twice the cores and what waits", low=0, high=100_000)
    proxy_workers: int = _option(1, "processes of the proxy", low=1, high=64)


@dataclass(frozen=True, slots=True)
class Load:
    """[load]"""

    seconds: float = _option(10.0, "how long requests come", unit="seconds", low=0.01, high=3600)
    rate: float = _option(1000.0, "requests a second, at random moments", low=0, high=1_000_000)
    to_rate: float = _option(-1.0, "what the rate grows to; -1: it stays", low=-1, high=1_000_000)
    burst: int = _option(0, "requests at the very same moment, at the start", low=0, high=1_000_000)
    every_s: float = _option(0.0, "the burst comes again after this; 0: once", unit="seconds", low=0, high=3600)


@dataclass(frozen=True, slots=True)
class Deploy:
    """[deploy]: new instances start, get the load, and the old ones drain."""

    at_s: float = _option(5.0, "when the first new instance starts", unit="seconds", low=0, high=3600)
    ready_s: float = _option(1.0, "from its start until it gets the load", unit="seconds", low=0, high=3600)
    overlap_s: float = _option(3.0, "from its start until the old one drains", unit="seconds", low=0, high=3600)
    spread_s: float = _option(
        0.0, "over which the instances start, one after the other", unit="seconds", low=0, high=3600
    )


@dataclass(frozen=True, slots=True)
class Restart:
    """[restart]: the server ends every connection and comes back."""

    at_s: float = _option(5.0, "when", unit="seconds", low=0, high=3600)
    down_s: float = _option(2.0, "for how long it refuses everybody", unit="seconds", low=0, high=600)


@dataclass(frozen=True, slots=True)
class Scenario:
    """What happens. Defaults are those of the tables."""

    title: str
    text: str = ""
    seed: int = 1
    server: Server = field(default_factory=Server)
    costs: Costs = field(default_factory=Costs)
    clients: Clients = field(default_factory=Clients)
    load: Load = field(default_factory=Load)
    deploy: Deploy | None = None
    restart: Restart | None = None

    @property
    def usable(self) -> int:
        """Connections that clients can have."""
        return self.server.max_connections - self.server.reserved

    @property
    def budget(self) -> int:
        return self.clients.budget or max(1, int(0.7 * self.usable))

    @property
    def proxy_size(self) -> int:
        """Enough to keep the cores busy while others wait, and never more than the server gives."""
        if self.clients.proxy_size:
            return self.clients.proxy_size
        waiting = (self.costs.query_ms + self.costs.wait_ms) / self.costs.query_ms
        return max(1, min(int(2 * self.server.cores * waiting), int(0.7 * self.usable)))

    @property
    def expected(self) -> float:
        """How many requests there will be, on average."""
        load = self.load
        rate = load.rate if load.to_rate < 0 else (load.rate + load.to_rate) / 2
        bursts = 1 + (int(load.seconds / load.every_s) if load.every_s else 0)
        return rate * load.seconds + bursts * load.burst

    def requests(self) -> "Requests":
        """The requests, in order of their arrival."""
        return _drawn(self)


@dataclass(frozen=True, slots=True)
class Requests:
    """All requests of a scenario. Parallel arrays.

    at_s: when each arrives; instance: at which; work_s, wait_s: server CPU and waiting of its query
    """

    at_s: Any
    instance: Any
    work_s: Any
    wait_s: Any


def _drawn(scenario: Scenario) -> Requests:
    chance = np.random.default_rng(scenario.seed)
    load, costs = scenario.load, scenario.costs
    last = load.rate if load.to_rate < 0 else load.to_rate
    number = chance.poisson((load.rate + last) / 2 * load.seconds)
    # Of a linearly growing load the share (a x + (b - a) x^2 / 2) / mean has come after a share x of the time:
    # solved for x, uniform draws become the moments of a Poisson process with that rate.
    u = chance.random(number)
    a, b = load.rate, last
    if a == b:
        x = u
    else:
        x = (np.sqrt(a * a + (b * b - a * a) * u) - a) / (b - a)
    moments = [x * load.seconds]
    if load.burst:
        starts = np.arange(0, load.seconds, load.every_s) if load.every_s else np.zeros(1)
        moments.append(np.repeat(starts, load.burst))
    at = np.sort(np.concatenate(moments))
    return Requests(
        at_s=at,
        instance=chance.integers(0, scenario.clients.instances, len(at)),
        work_s=_spread(chance, costs.query_ms / 1e3, costs.spread, len(at)),
        wait_s=_spread(chance, costs.wait_ms / 1e3, costs.spread, len(at)),
    )


def through(scenario: Scenario, requests: Requests) -> Any:
    """When each request has passed the proxy, whose workers take their requests one after the other.

    The queue needs no events: with equal costs c the n-th leaves at c n + the highest of (its arrival - c times
    its number) up to it (Lindley's recursion, solved).
    """
    cost_s, workers = scenario.costs.proxy_ms / 1e3, scenario.clients.proxy_workers
    left = np.array(requests.at_s, dtype=float)
    for worker in range(workers):
        own = left[worker::workers]
        number = np.arange(len(own))
        left[worker::workers] = cost_s * (number + 1) + np.maximum.accumulate(own - cost_s * number)
    # Workers may overtake each other; the machine is asked in the order of time all the same.
    return np.maximum.accumulate(left) + scenario.costs.hop_ms / 2e3


def _spread(chance: Any, mean: float, deviation: float, number: int) -> Any:
    """Gamma distributed: 1 is the exponential, smaller is narrower, larger has the longer tail."""
    if deviation == 0 or mean == 0:
        return np.full(number, mean)
    shape = 1 / deviation**2
    return chance.gamma(shape, mean / shape, number)


# -- files ------------------------------------------------------------------------------------------------------

_TABLES: Mapping[str, type] = {
    "server": Server,
    "costs": Costs,
    "clients": Clients,
    "load": Load,
    "deploy": Deploy,
    "restart": Restart,
}
_WORDS = ("title", "text", "seed")


def included() -> dict[str, Scenario]:
    """The scenarios that come with Cenote, by name."""
    folder = files("cenote.measure") / "scenarios"
    found = sorted((item for item in folder.iterdir() if item.name.endswith(".toml")), key=lambda item: item.name)
    return {item.name.removesuffix(".toml"): parse(item.read_text(encoding="utf-8"), item.name) for item in found}


def load(name: str) -> Scenario:
    """An included scenario by name, or one of a file.

    :raises ConfigError: there is none, or everything that is wrong with it
    """
    if name.endswith(".toml") or "/" in name:
        try:
            return parse(Path(name).read_text(encoding="utf-8"), name)
        except (OSError, UnicodeDecodeError) as error:
            words = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
            raise ConfigError([f"scenario = {name!r}: {words}"]) from None
    known = included()
    if name not in known:
        near = difflib.get_close_matches(name, known, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}; a file ends in .toml"
        raise ConfigError([f"scenario = {name!r}: there is none of that name; {hint}"])
    return known[name]


def parse(text: str, name: str) -> Scenario:
    """A scenario from TOML.

    :raises ConfigError: naming every problem
    """
    try:
        given = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError([f"{name}: this is not TOML: {error}"]) from None
    problems = [f"{name}: {problem}" for problem in _problems(given)]
    if problems:
        raise ConfigError(problems)
    tables = {table: kind(**given[table]) for table, kind in _TABLES.items() if table in given}
    words = {word: given[word] for word in _WORDS if word in given}
    words.setdefault("title", Path(name).stem)
    scenario = Scenario(**words, **tables)
    conflicts = [f"{name}: {problem}" for problem in _conflicts(scenario)]
    if conflicts:
        raise ConfigError(conflicts)
    return scenario


def _problems(given: Mapping[str, Any]) -> Iterator[str]:
    for key, value in given.items():
        if key in _WORDS:
            if not isinstance(value, int if key == "seed" else str) or isinstance(value, bool):
                yield f"{key} = {value!r}: must be {'a whole number' if key == 'seed' else 'a text'}"
        elif key not in _TABLES:
            yield _unknown(key, [*_WORDS, *_TABLES])
        elif not isinstance(value, dict):
            yield f"{key}: must be a table, [{key}]"
        else:
            yield from _table_problems(key, value)


def _table_problems(table: str, given: Mapping[str, Any]) -> Iterator[str]:
    known = {f.name: f for f in fields(_TABLES[table])}
    for key, value in given.items():
        if key not in known:
            yield f"[{table}] {_unknown(key, list(known))}"
            continue
        kind = getattr(known[key].type, "__name__", str(known[key].type))
        problem = known[key].metadata["option"].problem(key, value, _KINDS[kind])
        if problem:
            yield f"[{table}] {problem}"


def _unknown(key: str, known: list[str]) -> str:
    near = difflib.get_close_matches(key, known, 1)
    return f"unknown name {key!r}" + (
        f"; did you mean {near[0]!r}?" if near else f"; known are {', '.join(known)}"
    )


def _conflicts(scenario: Scenario) -> Iterator[str]:
    clients = scenario.clients
    if clients.min_size > clients.pool_size:
        yield f"[clients] min_size = {clients.min_size} is above pool_size = {clients.pool_size}"
    if scenario.usable < 1:
        yield "[server] reserved leaves nothing of max_connections"
    if scenario.expected > MOST_REQUESTS:
        yield f"[load] that is {scenario.expected:,.0f} requests: {MOST_REQUESTS:,} at most"
    if scenario.expected < 1:
        yield "[load] nobody asks: give it a rate or a burst"
