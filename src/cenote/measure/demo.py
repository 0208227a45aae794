"""The demonstration: the same requests with a connection for each, then through a pool, side by side.

Both ways get a new server of their own, the same table, the same callers, the same moments and the same
queries, and nothing is prepared for one that the other does not have. It measures and returns figures;
"""

import os
import platform
import resource
import selectors
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from cenote._build import is_compiled
from cenote._version import __version__
from cenote.config import Option
from cenote.embedded import Postgres
from cenote.embedded.install import VERSIONS
from cenote.errors import CenoteError, ConfigError, MissingDependency
from cenote.measure.load import MAKE_TABLE, Counts, Plan, Report, callers, files_needed, heard
from cenote.measure.proc import UNKNOWN, Backends, ServerProcesses

WAYS = ("direct", "pool")
_RESERVED = 3  # superuser_reserved_connections
_SAMPLE_EVERY_S = 0.1
_SAMPLING_SHARE = 0.1
_GRACE_S = 15.0
_BACKENDS_END_WITHIN_S = 5.0

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
    pool_size: int = _option(10, "connections of the pool", low=1, high=1000)
    max_connections: int = _option(100, "what the server allows", low=10, high=1000)
    seconds: float = _option(
        20.0, "the longest each of the two runs may take", unit="seconds", low=0, above=True, high=50
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
        if hard != resource.RLIM_INFINITY and files_needed(self.clients) > hard:
            yield (
                f"clients = {self.clients}: this process may open {hard} files, and each caller needs one: "
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
    time_wait: sockets in TIME_WAIT on the server's port at the end
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


@dataclass(frozen=True, slots=True)
class Result:
    """Both sides and where they were measured."""

    setup: Setup
    machine: dict[str, str | int]
    direct: Side
    pool: Side


@dataclass(frozen=True, slots=True)
class Moment:
    """The progress of one way: how many requests ended how, and the server's processes.

    stage: "starting" the server, "running", or "ended"
    backends: now; in the stage "ended" the peaks
    """

    way: str
    stage: str
    counts: Counts = field(default_factory=Counts)
    backends: Backends = UNKNOWN


def run(setup: Setup, tell: Callable[[Moment], None] = lambda _: None) -> Result:
    """Run both ways, one after the other. Takes up to twice `setup.seconds` and some seconds more.

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
    setup.check()
    direct, pool = (_run_side(way, setup, tell) for way in WAYS)
    machine: dict[str, str | int] = {
        "cenote": __version__,
        "core": "compiled" if is_compiled() else "pure Python",
        "python": platform.python_version(),
        "postgres": setup.postgres,
        "cpus": os.cpu_count() or 0,
        "system": f"{platform.system()} {platform.machine()}",
    }
    return Result(setup, machine, direct, pool)


def _run_side(way: str, setup: Setup, tell: Callable[[Moment], None]) -> Side:
    tell(Moment(way, "starting"))
    # A server of its own: no warm cache, no sockets and no CPU account left from the other way.
    settings = {**_SETTINGS, "max_connections": setup.max_connections}
    with Postgres(setup.postgres, settings=settings) as server:
        server.psql(MAKE_TABLE)
        processes = ServerProcesses(server.pid, server.port)
        cpu = processes.cpu_s()
        watch = _Watch(way, processes, tell)
        with callers(_plan(way, setup, server.dsn)) as process:
            report = watch.until_report(process, setup.seconds + _GRACE_S)
        cpu_after = _cpu_when_quiet(processes)
        time_wait = processes.time_wait()
    side = Side(
        way=way,
        requests=setup.clients * setup.requests,
        answered=len(report.latencies_s),
        refused=sum(report.refused.values()),
        failed=sum(report.failed.values()),
        unfinished=report.unfinished,
        refused_by=report.refused,
        failed_by=report.failed,
        latencies_s=tuple(report.latencies_s),
        seconds=report.seconds,
        opened=report.opened,
        peak_backends=_highest(sample.backends for sample in watch.samples),
        peak_memory_bytes=_highest(sample.memory_bytes for sample in watch.samples),
        server_cpu_s=None if cpu is None or cpu_after is None else max(0.0, cpu_after - cpu),
        callers_cpu_s=report.cpu_s,
        sampling_cpu_s=watch.cpu_s,
        time_wait=time_wait,
        samples=tuple(
            Sample(sample.at_s - report.started_s, sample.backends, sample.memory_bytes)
            for sample in watch.samples
        ),
    )
    counts = Counts(side.answered, side.refused, side.failed)
    tell(Moment(way, "ended", counts, Backends(side.peak_backends, side.peak_memory_bytes)))
    return side


def _plan(way: str, setup: Setup, dsn: str) -> Plan:
    return Plan(
        way=way,
        dsn=dsn,
        clients=setup.clients,
        requests=setup.requests,
        every_s=setup.every,
        bound_s=setup.seconds,
        pool_size=setup.pool_size,
    )


class _Watch:
    """Reads what the callers tell and samples the server, until the report comes."""

    def __init__(self, way: str, processes: ServerProcesses, tell: Callable[[Moment], None]) -> None:
        self.samples: list[Sample] = []
        self.cpu_s = 0.0
        self._way = way
        self._processes = processes
        self._tell = tell
        self._counts = Counts()

    def until_report(self, process: "subprocess.Popen[bytes]", timeout_s: float) -> Report:
        """Return the callers' report; raise `CenoteError` when they die without one or exceed `timeout_s`."""
        assert process.stdout is not None
        started, cpu = time.monotonic(), time.process_time()
        next_sample_s = started
        unread = b""
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            while (now := time.monotonic()) < started + timeout_s:
                if selector.select(max(0.0, next_sample_s - now)):
                    piece = os.read(process.stdout.fileno(), 1 << 20)
                    if not piece:
                        raise CenoteError(f"the callers' process ended early (exit status {process.wait()})")
                    *lines, unread = (unread + piece).split(b"\n")
                    for line in lines:
                        message = heard(line)
                        if isinstance(message, Report):
                            self.cpu_s = time.process_time() - cpu
                            return message
                        self._counts = message
                if time.monotonic() >= next_sample_s:
                    next_sample_s = self._sample()
        raise CenoteError(f"the callers did not end within {timeout_s:g} s")

    def _sample(self) -> float:
        """Take a sample; when to take the next, so that sampling stays a small share of one CPU."""
        began, cpu = time.monotonic(), time.thread_time()
        seen = self._processes.backends()
        self.samples.append(Sample(began, seen.number, seen.memory_bytes))
        self._tell(Moment(self._way, "running", self._counts, seen))
        return began + max(_SAMPLE_EVERY_S, (time.thread_time() - cpu) / _SAMPLING_SHARE)


def _cpu_when_quiet(processes: ServerProcesses) -> float | None:
    """The server's CPU time when every backend has ended and is accounted for."""
    deadline = time.monotonic() + _BACKENDS_END_WITHIN_S
    while processes.backends().number and time.monotonic() < deadline:
        time.sleep(0.01)
    return processes.cpu_s()


def _highest(values: Iterator[int | None]) -> int | None:
    return max((value for value in values if value is not None), default=None)


def percentile(ordered: tuple[float, ...], share: float) -> float | None:
    """The nearest-rank percentile of sorted values."""
    if not ordered:
        return None
    return ordered[min(len(ordered) - 1, max(0, -int(-share * len(ordered) // 1) - 1))]
