"""What one connection costs: connections taken apart one after the other, near and far, and what the server paid.

One connection at a time, never two: the load is one impatient client's. Nothing is made on the server but these
sessions. It measures and returns figures; the words are `cost_words`', the picture `cost_picture`'s.
"""

import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from cenote._build import is_compiled
from cenote._version import __version__
from cenote.errors import ConfigError, TargetUnusable
from cenote.measure.address import Address, address_of
from cenote.measure.anatomy import Anatomy, Session, Tls
from cenote.measure.cost_figures import Distance, Spread, distance, spread
from cenote.measure.cost_memory import Memory, backend_memory, unknown_memory
from cenote.measure.cost_server import LocalServer, Ports, ports
from cenote.measure.distance import DelayLine
from cenote.measure.target import CONNECT_TIMEOUT_S, Target, one_line, target

_WARM = 3  # queries on a connection that has answered one, the middle one counts
_LIBPQ_MOST = 20
_CPU_ENOUGH_S = 0.4  # /proc counts in ticks of 10 ms
_CPU_CONNECTIONS = 300
_MOST_RTTS = 8
_POOLER = "a pooler stands between, and lends the process of whoever comes next"
_LONGEST_RTT_S = 5.0

Tell = Callable[[str, int, int], None]
"""Is told what is being measured, how many of it are done, and how many there are to be."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What is to be measured.

    samples: connections for each distance
    rtts: seconds there and back of the simulated distances
    rate: requests a second, for what pooling would save
    seconds: the longest that each part (each distance, the server's CPU) may take; one sample it always has
    sql: the query; it is run several times on each connection
    """

    samples: int = 30
    rtts: tuple[float, ...] = ()
    rate: float = 100.0
    seconds: float = 10.0
    sql: str = "SELECT 1"

    def check(self) -> None:
        """:raises ConfigError: every problem"""
        problems = list(self._problems())
        if problems:
            raise ConfigError(problems)

    def _problems(self) -> Iterator[str]:
        if not 1 <= self.samples <= 1000:
            yield f"samples = {self.samples}: must be 1 to 1000"
        if not 0 < self.rate <= 1_000_000:
            yield f"rate = {self.rate:g}: must be above 0 and at most 1000000 requests a second"
        if not 0 < self.seconds <= 600:
            yield f"seconds = {self.seconds:g}: must be above 0 and at most 600"
        if len(self.rtts) > _MOST_RTTS:
            yield f"rtt: {len(self.rtts)} distances; at most {_MOST_RTTS}"
        for rtt_s in self.rtts:
            if not 0.0001 <= rtt_s <= _LONGEST_RTT_S:
                yield f"rtt = {rtt_s * 1e3:g}ms: must be 0.1ms to {_LONGEST_RTT_S:g}s"
        if not self.sql.strip():
            yield "sql: there is no statement"
        if "\0" in self.sql:
            yield "sql: there is a zero byte in it"


@dataclass(frozen=True, slots=True)
class ServerCpu:
    """What the server's machine worked, in seconds of CPU.

    per_connection_s: fork, log-in, one query and end, of all its processes; the mean over `connections`
    ready, first_query, warm_query: of the connection's own process alone; None: not known
    """

    per_connection_s: float
    connections: int
    ready: Spread | None
    first_query: Spread | None
    warm_query: Spread | None


@dataclass(frozen=True, slots=True)
class Result:
    """All that was seen of a server.

    resumed: whether TLS took an earlier session up; None: no TLS
    method, iterations, derivation: of the log-in; the CPU seconds that deriving SCRAM's keys takes
    direct: whether what answers is a process of the server, and not a pooler between
    local: whether the server's processes can be seen from here
    near: without a simulated distance; far: with one each
    libpq, libpq_cpu: until ready, by libpq (psycopg), in seconds
    client_cpu_s: of opening and closing, without queries
    """

    setup: Setup
    target: Target
    machine: dict[str, str | int]
    unix: bool
    tls: Tls | None
    resumed: bool | None
    method: str
    iterations: int
    derivation: Spread
    parameters: int
    direct: bool
    local: bool
    near: Distance
    far: tuple[Distance, ...]
    libpq: Spread
    libpq_cpu: Spread
    client_cpu_s: float
    server_cpu: ServerCpu | None
    memory: Memory
    ports: Ports | None

    @property
    def distances(self) -> tuple[Distance, ...]:
        return self.near, *self.far


def run(url: str | None, setup: Setup, tell: Tell = lambda stage, done, total: None) -> Result:
    """Take connections to the server of `url` (None: an embedded one) apart.

    :raises ConfigError: the setup or the URL cannot be used
    :raises TargetUnusable: the server is not there, refuses us, has no two slots free, or went away
    """
    setup.check()
    with target(url) as server:
        # One at a time; the second may be one whose process has not quite ended.
        server.need(2, "taking connections apart")
        address = address_of(server.dsn)
        if setup.rtts and address.unix:
            raise ConfigError(["rtt: a Unix socket has no distance; give the server's host and port"])
        return _Run(server, address, setup, tell).result()


class _Run:
    """One measurement, part by part."""

    def __init__(self, server: Target, address: Address, setup: Setup, tell: Tell) -> None:
        self.server = server
        self.address = address
        self.setup = setup
        self.tell = tell
        self.local = LocalServer(server.server_pid, server.port) if server.server_pid is not None else None
        self.cpus: dict[str, list[float]] = {"ready": [], "first_query": [], "warm_query": []}
        self.direct = True

    def result(self) -> Result:
        resumed = self._resumed()
        seen = list(self._sample(None))
        closed = {one.local_port for one in seen}
        waiting = ports(closed, self.address.port) if not self.address.unix else None
        near = distance(None, seen)
        libpq, libpq_cpu = self._libpq()
        far = [distance(rtt_s, list(self._sample(rtt_s))) for rtt_s in self.setup.rtts]
        server_cpu = self._server_cpu(self.local) if self.local is not None else None
        self.tell("memory", 0, 1)
        memory = unknown_memory(_POOLER)
        if self.direct:
            memory = backend_memory(self.address, self.local, self.server.version, self.setup.sql)
        last = seen[-1]
        return Result(
            setup=self.setup,
            target=self.server,
            machine=machine(),
            unix=self.address.unix,
            tls=last.tls,
            resumed=resumed,
            method=last.method,
            iterations=last.iterations,
            derivation=spread([one.derivation_s for one in seen]),
            parameters=last.parameters,
            direct=self.direct,
            local=self.local is not None,
            near=near,
            far=tuple(far),
            libpq=libpq,
            libpq_cpu=libpq_cpu,
            client_cpu_s=_opening_cpu_s(near),
            server_cpu=server_cpu,
            memory=memory,
            ports=waiting,
        )

    def _resumed(self) -> bool | None:
        """Whether TLS takes up an earlier session; None without TLS. It also sees who answers, and warms up."""
        with Session(self.address) as first:
            pid = first.anatomy.backend_pid
            # A pooler hands out numbers of its own, to cancel by.
            self.direct = first.value("SELECT pg_backend_pid()") == str(pid)
            if self.local is not None and not (self.direct and self.local.owns(pid)):
                self.local = None
            first.query(self.setup.sql)
            first.finish()
        if first.anatomy.tls is None:
            return None
        with Session(self.address, resume=first.tls_session) as second:
            second.finish()
        return second.anatomy.tls is not None and second.anatomy.tls.resumed

    def _sample(self, rtt_s: float | None) -> Iterator[Anatomy]:
        """Connections over one distance, as many as asked for or as time allows."""
        stage = "near" if rtt_s is None else f"{rtt_s * 1e3:g} ms away"
        until = time.monotonic() + self.setup.seconds
        with ExitStack() as stack:
            far = None
            if rtt_s is not None:
                line = stack.enter_context(DelayLine(self.address.family, self.address.sockaddr, rtt_s))
                far = line.sockaddr
            for number in range(self.setup.samples):
                self.tell(stage, number, self.setup.samples)
                yield self._one(far)
                if time.monotonic() > until:
                    break
            self.tell(stage, self.setup.samples, self.setup.samples)

    def _one(self, far: Any, warm: int = _WARM) -> Anatomy:
        with Session(self.address, far=far) as session:
            steps, pid = session.anatomy.steps, session.anatomy.backend_pid
            used = [self._cpu(pid)]
            steps["first_query"] = session.query(self.setup.sql)
            used.append(self._cpu(pid))
            again = [session.query(self.setup.sql) for _ in range(warm)]
            used.append(self._cpu(pid))
            session.finish()
        if again:
            steps["warm_query"] = sorted(again, key=lambda step: step.seconds)[len(again) // 2]
            self._note(used, warm)
        return session.anatomy

    def _cpu(self, pid: int) -> float | None:
        return self.local.backend_cpu_s(pid) if self.local is not None else None

    def _note(self, used: list[float | None], warm: int) -> None:
        """Of each connection's own process: what it had used when ready, after one query, after all."""
        ready, first, last = used
        if ready is not None and first is not None and last is not None:
            self.cpus["ready"].append(ready)
            self.cpus["first_query"].append(first - ready)
            self.cpus["warm_query"].append((last - first) / warm)

    def _libpq(self) -> tuple[Spread, Spread]:
        """The whole of it once more by libpq, which knows nothing of our phases: time and CPU."""
        import psycopg

        taken: list[float] = []
        cpu: list[float] = []
        until = time.monotonic() + self.setup.seconds
        most = min(self.setup.samples, _LIBPQ_MOST)
        for number in range(most):
            self.tell("by libpq", number, most)
            begun, used = time.perf_counter(), time.thread_time()
            try:
                conn = psycopg.connect(self.server.dsn, autocommit=True, connect_timeout=CONNECT_TIMEOUT_S)
            except psycopg.Error as error:
                raise TargetUnusable(f"cannot measure this server: {one_line(error)}") from None
            taken.append(time.perf_counter() - begun)
            cpu.append(time.thread_time() - used)
            conn.close()
            if time.monotonic() > until:
                break
        return spread(taken), spread(cpu)

    def _server_cpu(self, local: LocalServer) -> ServerCpu | None:
        """Connections with one query each, until the server's CPU has moved enough to be read off in ticks."""
        before = local.cpu_s()
        until = time.monotonic() + self.setup.seconds
        used, number = 0.0, 0
        while before is not None and used < _CPU_ENOUGH_S and number < _CPU_CONNECTIONS:
            self.tell("the server's CPU", int(used * 100), int(_CPU_ENOUGH_S * 100))
            anatomy = self._one(None, warm=0)
            number += 1
            local.settle(anatomy.backend_pid)
            used = (local.cpu_s() or before) - before
            if time.monotonic() > until:
                break
        if before is None or used <= 0:
            return None
        known = {name: spread(values) if values else None for name, values in self.cpus.items()}
        return ServerCpu(used / number, number, **known)


def _opening_cpu_s(near: Distance) -> float:
    """The client's CPU for a connection, without the queries."""
    return sum(phase.cpu.median for phase in near.phases if not phase.name.endswith("_query"))


def machine() -> dict[str, str | int]:
    """Where this was measured."""
    return {
        "cpus": os.cpu_count() or 1,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "cenote": __version__,
        "core": "compiled" if is_compiled() else "pure Python",
    }
