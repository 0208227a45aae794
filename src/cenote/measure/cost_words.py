"""The figures of a connection in words, rows and under names.

Pure functions of a result: every word and number comes from what was measured, and a figure that is missing is
left out or called unknown, not guessed.
"""

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from cenote.measure.cost import Result
from cenote.measure.cost_figures import Phase, Spread, Way
from cenote.measure.cost_https import OriginResult
from cenote.measure.cost_saving import TIME_WAIT_S, AtDistance, Saving, saving
from cenote.measure.findings import duration, mebibytes

TITLES = {
    "dns": "DNS look-up",
    "connect": "connect",
    "tcp": "TCP",
    "first_answer": "server's first answer",
    "tls": "TLS handshake",
    "authentication": "authentication",
    "setup": "server set-up",
    "parameters": "session parameters",
    "first_query": "first query",
    "warm_query": "warm query",
    "teardown": "teardown, this end",
    "gone": "until the server let go",
    "first_request": "first request",
    "reused_request": "reused connection",
}

PHASE_HEADINGS = ("phase", "median", "p10 to p90", "round trips", "bytes up", "bytes down", "client CPU")
SAVING_HEADINGS = (
    "distance",
    "each waits longer by",
    "sessions at once",
    "their memory",
    "slots full from",
    "pooled: busy",
    "their memory",
)


def as_dict(result: Result | OriginResult) -> dict[str, Any]:
    """Every figure under its name, for JSON. The password of the URL is not in it."""
    figures = asdict(result)
    if isinstance(result, Result):
        figures["target"] = {**figures["target"], "title": result.target.title, "free": result.target.free}
        del figures["target"]["dsn"]
        figures["saving"] = asdict(saving(result))
        figures["storm_costs"] = storm_costs(result)
    figures["round_trips_to_ready"] = result.near.trips
    return figures


def storm_costs(result: Result) -> dict[str, float]:
    """What `cenote storm --costs` takes of this: a connection's price, as far as it is known."""
    costs: dict[str, float] = {}
    ready_s = result.near.ready.median
    if result.server_cpu is not None:
        query = result.server_cpu.first_query
        cpu_s = max(0.0, result.server_cpu.per_connection_s - (query.median if query is not None else 0.0))
        costs = {"connect_ms": cpu_s * 1e3, "connect_wait_ms": max(0.0, ready_s - cpu_s) * 1e3}
    else:
        costs = {"connect_ms": 0.0, "connect_wait_ms": ready_s * 1e3}
    gone = result.near.phase("gone")
    if gone is not None:
        costs["close_ms"] = gone.seconds.median * 1e3
    return costs


# -- tables -----------------------------------------------------------------------------------------------------


def place(way: Way, *, local: bool = False) -> str:
    """Where a distance is, for a heading."""
    if way.rtt_s is None:
        return "same host" if local else "as it is"
    return f"+{duration(way.rtt_s)}"


def is_local(result: Result | OriginResult) -> bool:
    """Whether the server is known to be on this machine."""
    return isinstance(result, Result) and result.local


def phase_rows(way: Way) -> list[tuple[str, ...]]:
    """One row for each phase, as PHASE_HEADINGS has it; a row for the sum behind the phases of opening."""
    rows: list[tuple[str, ...]] = []
    opened = False
    for phase in way.phases:
        if not opened and phase.name in ("first_query", "first_request"):
            rows.append(_ready_row(way))
            opened = True
        rows.append(_phase_row(phase))
    return rows


def _phase_row(phase: Phase) -> tuple[str, ...]:
    trips = "not known" if phase.trips is None else str(phase.trips)
    if phase.name == "gone":
        trips = "not waited for"  # a driver does not
    times = phase.seconds
    return (
        TITLES[phase.name],
        duration(times.median),
        range_of(times),
        trips,
        f"{phase.up:,}",
        f"{phase.down:,}",
        duration(phase.cpu.median),
    )


def _ready_row(way: Way) -> tuple[str, ...]:
    opening = way.opening
    return (
        "ready",
        duration(way.ready.median),
        range_of(way.ready),
        str(way.trips),
        f"{sum(phase.up for phase in opening):,}",
        f"{sum(phase.down for phase in opening):,}",
        duration(sum(phase.cpu.median for phase in opening)),
    )


def range_of(spread: Spread) -> str:
    """Its p10 and p90 for a reader."""
    return f"{duration(spread.p10)} to {duration(spread.p90)}"


def distance_rows(ways: tuple[Way, ...], *, local: bool) -> tuple[list[str], list[list[str]]]:
    """Headings and rows: the medians of each phase over each distance."""
    headings = ["phase", *(f"{place(way, local=local)} (n={way.samples})" for way in ways)]
    rows = []
    for phase in ways[0].phases:
        if phase.name in ("first_query", "first_request"):
            rows.append(["ready", *(duration(way.ready.median) for way in ways)])
        found = [way.phase(phase.name) for way in ways]
        rows.append([TITLES[phase.name], *(duration(one.seconds.median) if one else "-" for one in found)])
    return headings, rows


def saving_rows(result: Result, saved: Saving) -> list[tuple[str, ...]]:
    """One row for each distance, as SAVING_HEADINGS has it."""
    pairs = zip(saved.at, result.distances, strict=True)
    return [_saving_row(at, place(way, local=is_local(result))) for at, way in pairs]


def _saving_row(at: AtDistance, name: str) -> tuple[str, ...]:
    return (
        name,
        duration(at.wait_s),
        amount(at.sessions),
        "not known" if at.session_bytes is None else mebibytes(at.session_bytes),
        "not known" if at.slots_rate is None else f"{amount(at.slots_rate)}/s",
        amount(at.busy),
        "not known" if at.pool_bytes is None else mebibytes(at.pool_bytes),
    )


def amount(value: float) -> str:
    """A number for a reader: two digits below ten, whole above."""
    return f"{value:,.0f}" if value >= 9.95 else f"{value:#.2g}"


# -- what else was seen -----------------------------------------------------------------------------------------


def facts(result: Result | OriginResult) -> list[tuple[str, str]]:
    """What was seen beside the phases: a name and a sentence each."""
    found = _origin_facts(result) if isinstance(result, OriginResult) else _server_facts(result)
    return list(found)


def _server_facts(result: Result) -> Iterator[tuple[str, str]]:
    yield "way", _way_there(result)
    yield "TLS", _tls(result)
    yield "authentication", _authentication(result)
    yield "session", f"{result.parameters} settings reported by the server"
    yield "server CPU", _server_cpu(result)
    yield "client CPU", f"{duration(result.client_cpu_s)} to open and close a connection, in this Python program"
    yield from _memory(result)
    if not result.unix:
        yield "ports", _ports(result)
    yield (
        "by libpq",
        f"ready after {duration(result.libpq.median)} ({range_of(result.libpq)}, n={result.libpq.samples}), of it "
        f"{duration(result.libpq_cpu.median)} CPU; phase by phase {duration(result.near.ready.median)}, of it "
        f"{duration(sum(phase.cpu.median for phase in result.near.opening))}",
    )


def _way_there(result: Result) -> str:
    if result.unix:
        return "a Unix socket: no DNS, no TCP, no TLS"
    name = "" if result.near.phase("dns") else "; an address, no name: no DNS look-up"
    between = "" if result.direct else "; a pooler stands between, and this is what a connection to it costs"
    return f"TCP{name}; {result.near.trips} round trips until ready{between}"


def _tls(result: Result) -> str:
    tls = result.tls
    if tls is None:
        asked = "" if result.near.phase("first_answer") is None or result.unix else _refused_tls(result)
        return f"none{asked}"
    text = f"{tls.version}, {tls.cipher}; "
    if result.resumed:
        text += "an earlier session was resumed when we offered it (libpq does not offer)"
    elif tls.ticket:
        text += "not resumed: the server gave a ticket, and did not take it"
    else:
        text += "not resumed: the server gives no ticket, each connection pays a full handshake"
    handshake = result.near.phase("tls")
    if tls.version == "TLSv1.3" and handshake is not None and (handshake.trips or 0) > 1:
        text += (
            f"; {handshake.trips} round trips instead of 1: the server did not take the key share that the client "
            "sent first (ssl_ecdh_curve)"
        )
    return text


def _refused_tls(result: Result) -> str:
    phase = result.near.phase("first_answer")
    # SSLRequest is 8 bytes, a startup packet always more.
    asked = phase is not None and phase.up == 8
    refused = ": asked for (sslmode=prefer) and refused, which costs a round trip; sslmode=disable saves it"
    return refused if asked else ""


def _authentication(result: Result) -> str:
    if not result.iterations:
        return result.method
    return (
        f"{result.method}, {result.iterations:,} iterations: {duration(result.derivation.median)} of the client's "
        "CPU to derive the keys"
    )


def _server_cpu(result: Result) -> str:
    cpu = result.server_cpu
    if cpu is None:
        if result.local:
            return "not known: it did not move within the time given"
        return (
            "not known: the server's processes cannot be seen from here"
            if result.direct
            else "the pooler's, not known"
        )
    text = f"{duration(cpu.per_connection_s)} for a connection with one query (mean of {cpu.connections:,})"
    if cpu.ready is not None and cpu.first_query is not None and cpu.warm_query is not None:
        text += (
            f"; its own process: {duration(cpu.ready.median)} until ready, {duration(cpu.first_query.median)} for "
            f"the first query, {duration(cpu.warm_query.median)} for a warm one"
        )
    if result.target.others:
        text += f"; {result.target.others} other sessions were connected, what they did is in the mean"
    return text


def _memory(result: Result) -> Iterator[tuple[str, str]]:
    memory = result.memory
    if memory.idle.pss is not None and memory.used.pss is not None:
        text = f"idle {mebibytes(memory.idle.pss)}, used {mebibytes(memory.used.pss)} (PSS)"
        if memory.idle.private is not None and memory.used.private is not None:
            text += f"; of it private: {mebibytes(memory.idle.private)}, {mebibytes(memory.used.private)}"
        yield "backend memory", text
    else:
        yield "backend memory", f"not known: {memory.why_no_pss}"
    if memory.allocated_idle is not None and memory.allocated_used is not None:
        yield (
            "as it says itself",
            f"idle {mebibytes(memory.allocated_idle)}, used {mebibytes(memory.allocated_used)} allocated "
            "(pg_backend_memory_contexts: without stack, program, libraries, shared memory)",
        )
    elif memory.idle.pss is None and result.direct:
        yield "as it says itself", f"not known: {memory.why_not_allocated}"


def _ports(result: Result) -> str:
    ports = result.ports
    assert ports is not None
    if ports.client is None or ports.server is None:
        return "not known: there is no /proc/net/tcp here"
    seen = f"of {result.near.samples} connections closed, {ports.client} left this end's port in TIME_WAIT"
    if not ports.client and not ports.server:
        return f"{seen}: the server ended them by RST, as it does where TLS had something more to say"
    if ports.server:
        seen += f", {ports.server} the server's (its process was quicker than our close, as on one host it may be)"
    seen += f" for {TIME_WAIT_S:.0f} s"
    if ports.available:
        rate = ports.available / TIME_WAIT_S
        seen += f"; {ports.available:,} ports for one address: at most {rate:,.0f} new connections a second"
    again = {"1": "any address", "2": "loopback only"}.get(ports.reuse)
    return seen + (f" (tcp_tw_reuse = {ports.reuse}: taken again after 1 s, {again})" if again else "")


def _origin_facts(result: OriginResult) -> Iterator[tuple[str, str]]:
    kept = result.near.phase("reused_request") is not None
    yield (
        "answer",
        f"{result.protocol} {result.status}, {result.body_bytes:,} bytes"
        + ("" if kept else "; the origin closes after each answer: nothing can be reused"),
    )
    tls = result.tls
    if tls is None:
        yield "TLS", "none"
    elif result.resumed is not None:
        again = f"{duration(result.resumed.median)} ({range_of(result.resumed)}, n={result.resumed.samples})"
        yield "TLS", f"{tls.version}, {tls.cipher}; resumed from an earlier connection the handshake takes {again}"
    else:
        what = "gave a ticket, and did not take it" if tls.ticket else "gives no ticket"
        yield "TLS", f"{tls.version}, {tls.cipher}; never resumed: the origin {what}"
    yield "client CPU", f"{duration(result.client_cpu_s)} to open and close a connection, in this Python program"


# -- what follows -----------------------------------------------------------------------------------------------


def conclusion(result: Result | OriginResult) -> list[str]:
    """What the figures say, in a few sentences."""
    if isinstance(result, OriginResult):
        return [_times(result.near, "request")] if result.near.warm is not None else []
    saved = saving(result)
    return [_times(result.near, "query"), *_saved(saved), *_limits(saved, result)]


def _times(near: Way, what: str) -> str:
    warm = near.warm
    assert warm is not None
    ratio = near.answered.median / warm.seconds.median
    faster = f"{amount(ratio)} times as fast" if ratio >= 1.05 else "no faster"
    return (
        f"A {what} on a new connection is answered after {duration(near.answered.median)}, on one that is there "
        f"after {duration(warm.seconds.median)}: {faster}."
    )


def _saved(saved: Saving) -> Iterator[str]:
    rate = f"{saved.rate:,.6g} requests a second"
    client = f"{saved.client_cpu_s:.2g} s of CPU on the client"
    if saved.server_cpu_s is not None:
        yield f"At {rate} a pool saves {saved.server_cpu_s:.2g} s of CPU on the server and {client}, every second."
    else:
        yield f"At {rate} a pool saves {client}, every second."
    if saved.ports is not None:
        yield (
            f"It keeps {saved.ports:,.0f} ports of a client on another machine out of TIME_WAIT"
            + (f" (there are {saved.available:,} for one address)." if saved.available else ".")
        )


def _limits(saved: Saving, result: Result) -> Iterator[str]:
    limits: list[str] = []
    if saved.server_core_rate:
        limits.append(f"one CPU of the server does nothing else from {amount(saved.server_core_rate)}/s on")
    if saved.ports_rate:
        limits.append(f"ports run out at {amount(saved.ports_rate)}/s")
    local = is_local(result)
    pairs = zip(saved.at, result.distances, strict=True)
    slots = [f"{amount(at.slots_rate)}/s ({place(way, local=local)})" for at, way in pairs if at.slots_rate]
    if slots:
        limits.append(f"the server's {result.target.free} free slots are full at {', '.join(slots)}")
    if limits:
        yield f"With a connection for each request, {'; '.join(limits)}."
