"""A real storm against a server on this machine, bounded, and the simulation of the very same beside it.

The requests are those of the scenario; a query sleeps on the server for as long as the scenario says it works and
waits, because work cannot be dosed and sleep can. The costs of this server (a connection, a query that does
nothing, the way through a proxy) are measured first, and the simulation gets them: then both must agree, as far as
the model is right. Callers and, for that way, the proxy are processes of their own.
"""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any

from cenote.errors import CenoteError, ConfigError, TargetUnusable
from cenote.measure.outcome import Outcome, Sample
from cenote.measure.pressure import cores
from cenote.measure.scenario import Requests, Scenario, Server
from cenote.measure.served import daemon
from cenote.measure.simulation import simulate
from cenote.measure.storm import Moment, Storm
from cenote.measure.target import CONNECT_TIMEOUT_S, Target, one_line, target

REAL_WAYS = ("none", "local", "proxy")
APPLICATION = "cenote storm"
MOST_REQUESTS = 20_000
_MOST_SECONDS = 30.0
_MOST_CONNECTIONS = 400
_LEAST_CONNECTIONS = 4
_PROXY_CLIENTS = 100
_GRACE_S = 15.0
_STOPS_WITHIN_S = 5.0
_TIMES = 25
_SLEEP_S = 0.005


@dataclass(frozen=True, slots=True)
class Plan:
    """What the callers' process is to do. most: connections at once, all callers together; beyond it one is
    refused."""

    dsn: str
    way: str
    at_s: list[float]
    sleep_s: list[float]
    instance: list[int]
    instances: int
    pool_size: int
    min_size: int
    timeout_s: float
    max_waiting: int
    most: int
    bound_s: float


@dataclass(frozen=True, slots=True)
class Measured:
    """What one of these takes on the server, alone, in seconds: the median of some tries.

    connect_s: opening and closing a connection; query_s: a query beyond its sleep; hop_s: what the proxy adds
    """

    connect_s: float
    query_s: float
    hop_s: float


@dataclass(frozen=True, slots=True)
class Done:
    """A real storm, and its simulation. `title` names the server."""

    title: str
    measured: Measured
    storm: Storm
    simulated: Storm


def run_real(
    scenario: Scenario, ways: Sequence[str], url: str | None, tell: Callable[[Moment], None] = lambda _: None
) -> Done:
    """Do it to the server of `url`, or to a private one that has the scenario's max_connections.

    :raises ConfigError: the scenario is more than is done to a real server
    :raises TargetUnusable: the server is not on this machine, has too few free connections, or went away
    """
    _must_be_bounded(scenario)
    settings = {"max_connections": scenario.server.max_connections} if url is None else {}
    with target(url, **settings) as server:
        if server.server_pid is None:
            raise TargetUnusable(
                f"{server.title} is not on this machine: a real storm is for a server that is yours"
            )
        most = _most(server, scenario)
        outcomes: dict[str, Outcome] = {}
        walls: dict[str, float] = {}

        def do(way: str, dsn: str) -> None:
            began = time.perf_counter()
            outcomes[way] = _storm(real, way, dsn, requests, most, server, tell)
            walls[way] = time.perf_counter() - began

        # The proxy first, and alone: while it runs it holds connections, which count as much as the callers'.
        with _proxy(server, min(scenario.proxy_size, most)) if "proxy" in ways else nullcontext(None) as proxy_dsn:
            measured = measure(server, proxy_dsn)
            real = as_real(scenario, measured, most, cores())
            requests = real.requests()
            if proxy_dsn is not None:
                do("proxy", proxy_dsn)
        for way in ways:
            if way != "proxy":
                do(way, server.dsn)
        title = server.title
    simulated = [simulate(real, way, requests) for way in ways]
    return Done(
        title,
        measured,
        Storm(real, tuple(outcomes[way] for way in ways), tuple(walls[way] for way in ways)),
        Storm(real, tuple(simulated), tuple(0.0 for _ in ways)),
    )


def as_real(scenario: Scenario, measured: Measured, most: int, cpus: int) -> Scenario:
    """The scenario as it is done: its work and waiting are sleep, all else costs what it costs here."""
    fork_s = min(scenario.costs.fork_ms / 1e3, measured.connect_s / 4)
    costs = replace(
        scenario.costs,
        query_ms=max(0.001, measured.query_s * 1e3),
        wait_ms=scenario.costs.query_ms + scenario.costs.wait_ms,
        # Server and callers share the CPUs of this machine: a connection's time is theirs, not the network's.
        connect_ms=max(0.0, (measured.connect_s - fork_s) * 1e3),
        fork_ms=fork_s * 1e3,
        connect_wait_ms=0.0,
        contention=0.0,
        law_to=0,
        proxy_ms=min(scenario.costs.proxy_ms, measured.hop_s * 1e3),
        hop_ms=max(0.0, measured.hop_s * 1e3),
    )
    reserved = scenario.server.reserved
    clients = replace(scenario.clients, proxy_size=min(scenario.proxy_size, most))
    return replace(scenario, server=Server(cpus, most + reserved, reserved), costs=costs, clients=clients)


def _must_be_bounded(scenario: Scenario) -> None:
    problems = []
    if scenario.expected > MOST_REQUESTS:
        problems.append(
            f"real: {scenario.expected:,.0f} requests: {MOST_REQUESTS:,} at most are sent to a real server"
        )
    if scenario.load.seconds > _MOST_SECONDS:
        problems.append(
            f"real: load.seconds = {scenario.load.seconds:g}: at most {_MOST_SECONDS:g} on a real server"
        )
    if scenario.server.max_connections > _MOST_CONNECTIONS:
        problems.append(
            f"real: server.max_connections = {scenario.server.max_connections}: at most {_MOST_CONNECTIONS}"
        )
    wanted = scenario.clients.instances * scenario.clients.pool_size
    if wanted > _MOST_CONNECTIONS:
        problems.append(
            f"real: clients.instances x clients.pool_size = {wanted:,}: at most {_MOST_CONNECTIONS} connections"
        )
    if scenario.restart or scenario.deploy:
        problems.append("real: restarts and deployments are only simulated")
    if problems:
        raise ConfigError([*problems, "use --set to make it smaller, or the scenario `validation`"])


def _most(server: Target, scenario: Scenario) -> int:
    """How many connections a way may have at once: all of a private server, which then refuses, and that is the
    point; of somebody's server the last ones are never taken, nor is the one that we look with."""
    if server.embedded:
        return server.max_connections - server.reserved
    server.need(_LEAST_CONNECTIONS + 1, "a real storm")
    return min(server.free - 1, scenario.usable)


# -- what things cost here --------------------------------------------------------------------------------------


def measure(server: Target, proxy_dsn: str | None = None) -> Measured:
    """Try each some times, one after the other.

    :raises TargetUnusable: the server went away
    """
    import psycopg

    def connect() -> None:
        psycopg.connect(server.dsn, connect_timeout=CONNECT_TIMEOUT_S, application_name=APPLICATION).close()

    def direct(dsn: str) -> float:
        with psycopg.connect(
            dsn, autocommit=True, connect_timeout=CONNECT_TIMEOUT_S, application_name=APPLICATION
        ) as conn:
            return _median(lambda: conn.execute("SELECT pg_sleep(%s)", (_SLEEP_S,))) - _SLEEP_S

    try:
        query_s = max(0.0, direct(server.dsn))
        hop_s = max(0.0, direct(proxy_dsn) - query_s) if proxy_dsn else 0.0
        return Measured(connect_s=_median(connect), query_s=query_s, hop_s=hop_s)
    except psycopg.Error as error:
        raise TargetUnusable(f"cannot measure this server: {one_line(error)}") from None


def _median(what: Callable[[], Any]) -> float:
    times = []
    for _ in range(_TIMES):
        began = time.perf_counter()
        what()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


# -- processes --------------------------------------------------------------------------------------------------


def _storm(
    scenario: Scenario,
    way: str,
    dsn: str,
    requests: Requests,
    most: int,
    server: Target,
    tell: Callable[[Moment], None],
) -> Outcome:
    """One way. The callers' process does not outlive it."""
    clients = scenario.clients
    plan = Plan(
        dsn=dsn,
        way=way,
        at_s=requests.at_s.tolist(),
        sleep_s=requests.wait_s.tolist(),
        instance=requests.instance.tolist(),
        instances=1 if way == "proxy" else clients.instances,
        pool_size=_PROXY_CLIENTS if way == "proxy" else clients.pool_size,
        min_size=clients.min_size,
        timeout_s=clients.timeout_s,
        max_waiting=clients.max_waiting,
        most=_PROXY_CLIENTS if way == "proxy" else most,
        bound_s=scenario.load.seconds + clients.timeout_s + _GRACE_S,
    )
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "cenote.measure.storm_callers"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,  # Ctrl-C in the terminal is for us, and we end it
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        # Through the pipe and not as an argument: it holds a password. Its end is the order to stop.
        process.stdin.write(json.dumps(asdict(plan)) + "\n")
        process.stdin.flush()
        with _counted(server) as count:
            samples: list[int] = []
            for line in process.stdout:
                message = json.loads(line)
                if "unusable" in message:
                    raise TargetUnusable(message["unusable"])
                if "outcome" in message:
                    return _outcome(way, len(plan.at_s), message["outcome"], samples)
                samples.append(count())
                tell(Moment(way, message["ended"], len(plan.at_s)))
        raise CenoteError(f"the callers' process ended early (exit status {process.wait()})")
    finally:
        try:
            process.communicate(timeout=_STOPS_WITHIN_S)  # ends its input, and reads what it still has to say
        except (subprocess.TimeoutExpired, BrokenPipeError):
            process.kill()
            process.communicate()


@contextmanager
def _counted(server: Target) -> Iterator[Callable[[], int]]:
    """How many sessions there are now, beside ours and those that were there before."""
    import psycopg

    sql = (
        "SELECT count(*)::int FROM pg_stat_activity "
        "WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()"
    )
    try:
        with psycopg.connect(
            server.dsn, autocommit=True, connect_timeout=CONNECT_TIMEOUT_S, application_name=APPLICATION
        ) as conn:

            def count() -> int:
                row = conn.execute(sql).fetchone()
                return max(0, row[0] - server.others) if row else 0

            yield count
    except psycopg.Error as error:
        raise TargetUnusable(f"the server went away in the middle: {one_line(error)}") from None


def _outcome(way: str, number: int, figures: dict[str, Any], connections: Sequence[int]) -> Outcome:
    import numpy as np

    samples = tuple(Sample(**sample) for sample in figures.pop("samples"))
    if way == "proxy":  # the callers see their connections to the proxy only
        seen = [*connections, *([connections[-1]] * len(samples) if connections else [])]
        samples = tuple(replace(each, connections=n) for each, n in zip(samples, seen, strict=False))
        figures["peak"] = figures["opened"] = max(connections, default=0)
    latency_s = np.array(figures.pop("latency_s"), dtype=float)
    return Outcome(way=way, requests=number, latency_s=latency_s, samples=samples, cpu_s=None, **figures)


@contextmanager
def _proxy(server: Target, size: int) -> Iterator[str]:
    """A proxy daemon before the server, and its DSN. It ends with the block, or with our process.

    :raises CenoteError: it does not start
    """
    from psycopg.conninfo import make_conninfo

    known = _login(server)
    with daemon(_proxy_config(known, size)) as (_, port):
        yield make_conninfo("", **{**known, "host": "127.0.0.1", "port": port, "sslmode": "disable"})


def _login(server: Target) -> dict[str, Any]:
    """How libpq gets in, with all that it finds elsewhere (~/.pgpass, PGPASSWORD ...)."""
    import psycopg

    try:
        with psycopg.connect(server.dsn, connect_timeout=CONNECT_TIMEOUT_S, application_name=APPLICATION) as conn:
            info = conn.info
            return {
                "host": info.host,
                "port": info.port,
                "user": info.user,
                "password": info.password,
                "dbname": info.dbname,
            }
    except psycopg.Error as error:
        raise TargetUnusable(f"cannot measure this server: {one_line(error)}") from None


def _proxy_config(known: dict[str, Any], size: int) -> str:
    """JSON's texts are TOML's too."""
    database, user = json.dumps(known["dbname"]), json.dumps(known["user"])
    lines = ['log_level = "error"', "[listen]", 'host = "127.0.0.1"', "port = 0"]
    lines += ["[server]", f"max_connections = {size}"]
    lines += ["[pool]", f"max_size = {size}", f"min_size = {min(2, size)}"]
    lines += [f"[databases.{database}]", f"host = {json.dumps(known['host'])}", f"port = {known['port']}"]
    lines += [f"[users.{user}]"]
    if known["password"]:
        lines.append(f"password = {json.dumps(known['password'])}")
    return "\n".join(lines) + "\n"
