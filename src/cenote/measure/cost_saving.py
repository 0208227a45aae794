"""What pooling saves at a rate of requests, and from which rate on a connection for each request cannot work.

Pure arithmetic on what was measured (Little's law: how many are there at once is the rate times how long each
stays). A figure whose ground was not measured is None.
"""

from dataclasses import dataclass

from cenote.measure.cost import Result
from cenote.measure.cost_figures import Distance

TIME_WAIT_S = 60.0  # Linux: TCP_TIMEWAIT_LEN, not to be changed


@dataclass(frozen=True, slots=True)
class AtDistance:
    """At one distance, with a connection for each request against a pool.

    wait_s: what each request waits for more than a warm query
    sessions: held at once on average with a connection for each request
    busy: pool connections that work at once on average
    session_bytes, pool_bytes: memory of those sessions, and of that many pooled ones (at least one)
    slots_rate: requests a second at which the sessions fill all of the server's free slots; None: it is a pooler's
    """

    rtt_s: float | None
    wait_s: float
    sessions: float
    busy: float
    session_bytes: float | None
    pool_bytes: float | None
    slots_rate: float | None


@dataclass(frozen=True, slots=True)
class Saving:
    """Every second at `rate` requests a second.

    server_cpu_s, client_cpu_s: seconds of CPU saved each second: cores
    server_core_rate: requests a second at which opening connections alone takes one core of the server
    ports: of a client on another machine, in TIME_WAIT all the time; available: how many this one has for one
        address; ports_rate: where they run out; None: nothing stays in TIME_WAIT, or it is not known
    """

    rate: float
    server_cpu_s: float | None
    client_cpu_s: float
    server_core_rate: float | None
    client_core_rate: float | None
    ports: float | None
    available: int | None
    ports_rate: float | None
    at: tuple[AtDistance, ...]


def saving(result: Result, rate: float | None = None) -> Saving:
    """What a pool saves at `rate` requests a second (default: the one of the setup)."""
    rate = result.setup.rate if rate is None else rate
    each = _server_cpu_each_s(result)
    client = result.client_cpu_s
    known = result.ports
    waits = known is not None and (known.client is None or bool(known.client or known.server))
    available = known.available if known is not None and waits else None
    return Saving(
        rate=rate,
        server_cpu_s=None if each is None else rate * each,
        client_cpu_s=rate * client,
        server_core_rate=1 / each if each else None,
        client_core_rate=1 / client if client > 0 else None,
        ports=rate * TIME_WAIT_S if waits else None,
        available=available,
        ports_rate=available / TIME_WAIT_S if available else None,
        at=tuple(_at(result, distance, rate) for distance in result.distances),
    )


def _server_cpu_each_s(result: Result) -> float | None:
    """What opening and ending a connection costs the server, without the query, which is asked in either way."""
    cpu = result.server_cpu
    if cpu is None:
        return None
    return max(0.0, cpu.per_connection_s - (cpu.warm_query.median if cpu.warm_query is not None else 0.0))


def _at(result: Result, distance: Distance, rate: float) -> AtDistance:
    sessions = rate * distance.held.median
    busy = rate * distance.warm_s
    idle, used = result.memory.idle.pss, result.memory.used.pss
    return AtDistance(
        rtt_s=distance.rtt_s,
        wait_s=distance.answered.median - distance.warm_s,
        sessions=sessions,
        busy=busy,
        session_bytes=None if idle is None else sessions * idle,
        pool_bytes=None if used is None else max(1.0, busy) * used,
        slots_rate=result.target.free / distance.held.median if result.direct else None,
    )
