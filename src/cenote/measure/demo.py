"""The demonstration: the same requests with a connection for each, through a pool, and through the proxy.

Every way gets a new server of its own, the same table, the same callers, the same moments and the same
queries, and nothing is prepared for one that the others do not have. It measures and returns figures, and draws
no conclusion.
"""

import os
import platform
import resource
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, fields, replace
from typing import Any

from cenote._build import is_compiled
from cenote._version import __version__
from cenote.config import Option
from cenote.embedded import Postgres
from cenote.embedded.configuration import literal
from cenote.embedded.install import VERSIONS
from cenote.errors import ConfigError, MissingDependency
from cenote.measure.load import MAKE_TABLE, Counts, Plan, callers, files_needed
from cenote.measure.onlooker import Onlooker, cpu_when_quiet
from cenote.measure.proc import UNKNOWN, Backends, ServerProcesses, process_cpu_s
from cenote.measure.served import Served, need_packages, served

WAYS = ("direct", "pool", "proxy")
SERVERLESS = ("serverless_direct", "serverless_proxy")
_CALLERS = {
    "direct": "direct",
    "pool": "pool",
    "proxy": "kept",
    "serverless_direct": "direct",
    "serverless_proxy": "direct",
}
_RESERVED = 3  # superuser_reserved_connections
_GRACE_S = 15.0

# Settings that are not the embedded server's: autovacuum workers would be taken for backends.
_SETTINGS: Mapping[str, str | int | bool] = {"autovacuum": False}


def _option(default: Any, text: str, **known: Any) -> Any:
    return field(default=default, metadata={"option": Option(text, **known)})


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What the demonstration is to do.

    :raises ConfigError: from `check`, naming every problem
    """

    clients: int = _option(1000, "callers that ask at the same moment", low=1, high=10_000)
    requests: int = _option(5, "requests of each caller, one after the other", low=1, high=1000)
    every: float = _option(2.0, "all callers ask again after this", unit="seconds", low=0, high=60)
    pool_size: int = _option(10, "connections of the pool, and of the proxy", low=1, high=1000)
    max_connections: int = _option(100, "what the server allows", low=10, high=1000)
    seconds: float = _option(20.0, "the longest each run may take", unit="seconds", low=0, above=True, high=50)
    serverless: int = _option(
        1000, "short-lived tasks that connect once, ask once and leave; 0 leaves them out", low=0, high=10_000
    )
    postgres: int = _option(max(VERSIONS), "major version of the embedded server", choices=())

    def check(self) -> None:
        problems = []
        for f in fields(self):
            problem = f.metadata["option"].problem(f.name, getattr(self, f.name), getattr(f.type, "__name__", ""))
            if problem:
                problems.append(problem)
        if self.postgres not in VERSIONS:
            known = " or ".join(map(str, sorted(VERSIONS)))
            problems.append(f"postgres = {self.postgres}: the embedded server is {known}")
        if not problems:
            problems += self._conflicts()
        if problems:
            raise ConfigError(problems)

    def _conflicts(self) -> Iterator[str]:
        usable = self.max_connections - _RESERVED
        if self.pool_size > usable:
            yield (
                f"pool_size = {self.pool_size} does not fit into max_connections = {self.max_connections}, "
                f"of which {_RESERVED} are kept for superusers: use {usable} at most"
            )
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        for name in ("clients", "serverless"):
            number = getattr(self, name)
            if hard == resource.RLIM_INFINITY or files_needed(number) + self.pool_size <= hard:
                continue
            yield (
                f"{name} = {number}: this process may open {hard} files, and each caller needs one: "
                "raise the limit (ulimit -Hn) or use fewer"
            )
        if (self.requests - 1) * self.every >= self.seconds:
            yield (
                f"requests = {self.requests}, every = {self.every:g} s: the last ones begin after "
                f"seconds = {self.seconds:g}: lower requests or every, or raise seconds"
            )


@dataclass(frozen=True, slots=True)
class Sample:
    """The server at one moment, seconds after the callers began."""

    at_s: float
    backends: int | None
    memory_bytes: int | None


@dataclass(frozen=True, slots=True)
class Side:
    """What one way gave. Every request is answered, refused, failed or unfinished.

    refused_by, failed_by: the same, by what was said
    latencies_s: of the answered requests, sorted
    opened: server connections opened
    peak_backends, peak_memory_bytes: the highest of the samples; None where /proc does not tell
    server_cpu_s: of all server processes, from before the first connection until the last one has ended
    callers_cpu_s: of the callers' process, the time in the driver included
    sampling_cpu_s: of the watching process, for comparison
    time_wait: sockets in TIME_WAIT on the server's port, and the proxy's, at the end
    proxy_cpu_s, proxy_memory_bytes: of the proxy's process: CPU while the callers ran, the highest PSS of the
        samples; None where there is no proxy, or /proc does not tell
    """

    way: str
    requests: int
    answered: int
    refused: int
    failed: int
    unfinished: int
    refused_by: dict[str, int]
    failed_by: dict[str, int]
    latencies_s: tuple[float, ...]
    seconds: float
    opened: int
    peak_backends: int | None
    peak_memory_bytes: int | None
    server_cpu_s: float | None
    callers_cpu_s: float
    sampling_cpu_s: float
    time_wait: int | None
    samples: tuple[Sample, ...]
    proxy_cpu_s: float | None = None
    proxy_memory_bytes: int | None = None

    def latency_s(self, share: float) -> float | None:
        """The latency that `share` (0 to 1) of the answered requests did not exceed; None without any."""
        return percentile(self.latencies_s, share)

    @property
    def server_cpu_per_answer_s(self) -> float | None:
        """All of the server's CPU, refusals included, for each answer it gave."""
        if self.server_cpu_s is None or not self.answered:
            return None
        return self.server_cpu_s / self.answered

    @property
    def callers_cpu_per_answer_s(self) -> float | None:
        return self.callers_cpu_s / self.answered if self.answered else None

    @property
    def proxy_cpu_per_answer_s(self) -> float | None:
        if self.proxy_cpu_s is None or not self.answered:
            return None
        return self.proxy_cpu_s / self.answered


@dataclass(frozen=True, slots=True)
class Result:
    """All sides and where they were measured. serverless: directly and through the proxy; empty: left out."""

    setup: Setup
    machine: dict[str, str | int]
    direct: Side
    pool: Side
    proxy: Side
    serverless: tuple[Side, ...] = ()

    @property
    def sides(self) -> tuple[Side, Side, Side]:
        return self.direct, self.pool, self.proxy


@dataclass(frozen=True, slots=True)
class Moment:
    """The progress of one way: how many requests ended how, and the server's processes.

    way: one of `WAYS` or `SERVERLESS`
    stage: "starting" the server, "running", or "ended"
    backends: now; in the stage "ended" the peaks
    """

    way: str
    stage: str
    counts: Counts = field(default_factory=Counts)
    backends: Backends = UNKNOWN


def run(setup: Setup, tell: Callable[[Moment], None] = lambda _: None) -> Result:
    """Run every way, one after the other. Each takes up to `setup.seconds`, and all some seconds more.

    :param tell: called several times a second with the progress
    :raises ConfigError: naming every problem of `setup`
    :raises MissingDependency: psycopg or the embedded server is not installed
    :raises EmbeddedError: the server could not be started
    """
    try:
        import psycopg  # noqa: F401 (the callers' process needs it)
    except ImportError:
        raise MissingDependency(
            'the demo needs psycopg, which is not installed: pip install "cenote[embedded]"'
        ) from None
    need_packages()
    setup.check()
    direct, pool, proxy = (_run_side(way, setup, tell) for way in WAYS)
    serverless = tuple(_run_side(way, setup, tell) for way in SERVERLESS) if setup.serverless else ()
    machine: dict[str, str | int] = {
        "cenote": __version__,
        "core": "compiled" if is_compiled() else "pure Python",
        "python": platform.python_version(),
        "postgres": setup.postgres,
        "cpus": os.cpu_count() or 0,
        "system": f"{platform.system()} {platform.machine()}",
    }
    return Result(setup, machine, direct, pool, proxy, serverless)


def _run_side(way: str, setup: Setup, tell: Callable[[Moment], None]) -> Side:
    tell(Moment(way, "starting"))
    # A server of its own: no warm cache, no sockets and no CPU account left from the other ways.
    settings = {**_SETTINGS, "max_connections": setup.max_connections}
    with Postgres(setup.postgres, settings=settings) as server:
        server.psql(MAKE_TABLE)
        sessions = _sessions(server)
        processes = ServerProcesses(server.pid, server.port)
        cpu = processes.cpu_s()
        clients = setup.serverless if way in SERVERLESS else setup.clients
        with ExitStack() as stack:
            proxy = None
            if way.endswith("proxy"):
                proxy = stack.enter_context(served(server, size=setup.pool_size, clients=clients))
            plan = _plan(way, setup, server.dsn if proxy is None else proxy.dsn, clients)
            side = _watched(plan, way, processes, proxy, tell)
        cpu_after = cpu_when_quiet(processes)
        side = replace(
            side,
            # Behind a proxy the callers know of their own connections only.
            opened=side.opened if proxy is None else _sessions(server) - sessions,
            server_cpu_s=None if cpu is None or cpu_after is None else max(0.0, cpu_after - cpu),
            time_wait=processes.time_wait(server.port, *([] if proxy is None else [proxy.port])),
        )
    counts = Counts(side.answered, side.refused, side.failed)
    tell(Moment(way, "ended", counts, Backends(side.peak_backends, side.peak_memory_bytes)))
    return side


def _sessions(server: Postgres) -> int:
    """How many sessions the callers' database has had. (A session is counted when it ends, at the latest.)"""
    question = f"SELECT sessions FROM pg_stat_database WHERE datname = {literal(server.database)}"
    return int(server.psql(question, database="postgres"))


def _watched(
    plan: Plan, way: str, processes: ServerProcesses, proxy: Served | None, tell: Callable[[Moment], None]
) -> Side:
    """What the callers and their onlooker report; the server's account is still open."""

    def told(counts: Counts, backends: Backends) -> None:
        tell(Moment(way, "running", counts, backends))

    onlooker = Onlooker(processes, None if proxy is None else proxy.pid, told)
    before = None if proxy is None else process_cpu_s(proxy.pid)
    with callers(plan) as process:
        report = onlooker.until_report(process, plan.bound_s + _GRACE_S)
    after = None if proxy is None else process_cpu_s(proxy.pid)
    return Side(
        way=way,
        requests=plan.clients * plan.requests,
        answered=len(report.latencies_s),
        refused=sum(report.refused.values()),
        failed=sum(report.failed.values()),
        unfinished=report.unfinished,
        refused_by=report.refused,
        failed_by=report.failed,
        latencies_s=tuple(report.latencies_s),
        seconds=report.seconds,
        opened=report.opened,
        peak_backends=_highest(look.backends.number for look in onlooker.looks),
        peak_memory_bytes=_highest(look.backends.memory_bytes for look in onlooker.looks),
        server_cpu_s=None,
        callers_cpu_s=report.cpu_s,
        sampling_cpu_s=onlooker.cpu_s,
        time_wait=None,
        samples=tuple(
            Sample(look.at_s - report.started_s, look.backends.number, look.backends.memory_bytes)
            for look in onlooker.looks
        ),
        proxy_cpu_s=None if before is None or after is None else after - before,
        proxy_memory_bytes=_highest(look.proxy_bytes for look in onlooker.looks),
    )


def _plan(way: str, setup: Setup, dsn: str, clients: int) -> Plan:
    once = way in SERVERLESS
    return Plan(
        way=_CALLERS[way],
        dsn=dsn,
        clients=clients,
        requests=1 if once else setup.requests,
        every_s=setup.every,
        bound_s=setup.seconds,
        pool_size=setup.pool_size,
    )


def _highest(values: Iterator[int | None]) -> int | None:
    return max((value for value in values if value is not None), default=None)


def percentile(ordered: tuple[float, ...], share: float) -> float | None:
    """The nearest-rank percentile of sorted values."""
    if not ordered:
        return None
    return ordered[min(len(ordered) - 1, max(0, -int(-share * len(ordered) // 1) - 1))]
