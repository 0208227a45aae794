"""What the figures of `cenote storm` say, in words and under names. Pure functions of a `Storm`."""

from collections.abc import Iterator
from typing import Any

from cenote.core.growth import DIAL_GATE
from cenote.measure.findings import duration, percent
from cenote.measure.outcome import Outcome
from cenote.measure.storm import Storm, as_tables

NAMES = {
    "none": "no pool",
    "local": "local pools",
    "budget": "local, budget",
    "proxy": "proxy",
}
RATE_ERROR = 0.10
P99_RATIO = 2.0
"""The stated error of the simulation (docs/storm.md): of the answers a second, and of p99."""

_BOUND = 0.9  # so busy, something is what the others wait for
HEADINGS = (
    "way",
    "answered",
    "refused",
    "failed",
    "median",
    "p99",
    "longest",
    "peak",
    "opened",
    "rejected",
    "CPU",
)


def rows(storm: Storm) -> list[tuple[str, ...]]:
    """The table, line by line."""

    def time(value: float | None) -> str:
        return "-" if value is None else duration(value)

    lines: list[tuple[str, ...]] = []
    for each in storm.outcomes:
        busy = "-" if each.cpu_s is None else f"{busy_share(storm, each):.0%}"
        lost = sum(each.failed.values()) + each.unfinished
        lines.append(
            (
                NAMES[each.way],
                percent(each.answered, each.requests),
                f"{sum(each.refused.values()):,}",
                f"{lost:,}",
                time(each.percentile_s(0.5)),
                time(each.percentile_s(0.99)),
                time(each.percentile_s(1.0)),
                f"{each.peak:,}",
                f"{each.opened:,}",
                f"{each.rejected:,}",
                busy,
            )
        )
    return lines


def busy_share(storm: Storm, outcome: Outcome) -> float:
    """Of the server's CPUs, until the last request had ended."""
    if not outcome.cpu_s or not outcome.seconds:
        return 0.0
    return min(1.0, outcome.cpu_s / outcome.seconds / storm.scenario.server.cores)


def as_dict(storm: Storm) -> dict[str, Any]:
    """Every figure under its name, for JSON; of the latencies the distribution instead of each."""
    ways = {}
    for each, wall_s in zip(storm.outcomes, storm.wall_s, strict=True):
        ways[each.way] = {
            "requests": each.requests,
            "answered": each.answered,
            "refused": each.refused,
            "failed": each.failed,
            "unfinished": each.unfinished,
            "rate": each.rate,
            "latency_s": {f"p{share}": each.percentile_s(share / 100) for share in (50, 90, 95, 99, 100)},
            "opened": each.opened,
            "peak": each.peak,
            "rejected": each.rejected,
            "cpu_s": each.cpu_s,
            "seconds": each.seconds,
            "events": each.events,
            "wall_s": wall_s,
            "samples": [
                {name: getattr(sample, name) for name in sample.__dataclass_fields__} for sample in each.samples
            ],
        }
    return {"scenario": as_tables(storm.scenario), "ways": ways, "explained": list(explained(storm))}


def explained(storm: Storm) -> Iterator[str]:
    """What happened each way, and why."""
    for each in storm.outcomes:
        words = [f"{NAMES[each.way].capitalize()}: {_fate(each)}"]
        words += _why(storm, each)
        yield "; ".join(words) + "."


def _fate(each: Outcome) -> str:
    if not each.answered:
        return "nobody was answered"
    p99 = each.percentile_s(0.99)
    assert p99 is not None
    everybody = each.answered == each.requests
    answered = "everybody was answered" if everybody else f"{percent(each.answered, each.requests)} were answered"
    return f"{answered}, 99 of 100 of them within {duration(p99)}"


def _why(storm: Storm, each: Outcome) -> Iterator[str]:
    scenario = storm.scenario
    for reason, count in {**each.refused, **each.failed}.items():
        yield f"{count:,} ended as {reason}"
    if each.unfinished:
        yield f"{each.unfinished:,} had not ended when the run did"
    if each.rejected:
        yield f"{each.rejected:,} dials were refused: all {scenario.usable} connections were taken"
    if each.way == "none" and each.opened:
        dial_s = each.opened * (scenario.costs.connect_ms + scenario.costs.fork_ms) / 1e3
        yield f"{each.opened:,} connections were opened, which took {duration(dial_s)} of CPU"
        forks_s = (each.opened + each.rejected) * scenario.costs.fork_ms / 1e3
        if each.events and forks_s > _BOUND * each.seconds:
            yield (
                f"the one process that starts the server's sessions was the bound, at {duration(forks_s)} of "
                f"{duration(each.seconds)}: it starts no more than {1e3 / scenario.costs.fork_ms:,.0f} a second"
            )
        patient = int((each.latency_s > scenario.clients.timeout_s).sum())
        if patient:
            yield (
                f"{patient:,} waited longer than the {duration(scenario.clients.timeout_s)} after which a pool "
                "refuses: without a pool nobody gives up"
            )
    if each.cpu_s is not None and busy_share(storm, each) > _BOUND:
        yield "the server's CPUs were the bound"
    if each.way == "local":
        wanted = scenario.clients.instances * scenario.clients.pool_size
        if wanted > scenario.usable:
            yield (
                f"{scenario.clients.instances} pools of {scenario.clients.pool_size} may want {wanted:,} "
                f"connections of {scenario.usable}, and who comes last gets none"
            )
    if each.way == "budget" and scenario.clients.instances > scenario.budget:
        yield (
            f"{scenario.clients.instances:,} pools share {scenario.budget} connections, fewer than one each: a "
            f"connection that changes hands is closed and opened anew ({each.opened:,} were opened), and no more "
            f"than {DIAL_GATE} are opened at once, so most callers wait for their turn at that"
        )


def disagreements(real: Storm, simulated: Storm) -> Iterator[str]:
    """Where the simulation is further from the real run than its stated error."""
    for ours, theirs in zip(simulated.outcomes, real.outcomes, strict=True):
        found = []
        if abs(ours.rate - theirs.rate) > RATE_ERROR * theirs.rate:
            found.append(f"{theirs.rate:.1f} answers a second real, {ours.rate:.1f} simulated")
        simulated_s, real_s = ours.percentile_s(0.99), theirs.percentile_s(0.99)
        if simulated_s and real_s and not 1 / P99_RATIO <= simulated_s / real_s <= P99_RATIO:
            found.append(f"p99 {duration(real_s)} real, {duration(simulated_s)} simulated")
        if found:
            words = f"{NAMES[ours.way].capitalize()}: beyond the stated error: {'; '.join(found)}"
            if ours.way == "none":
                words += "; it holds for few connections a second only, as callers and server share these CPUs"
            yield words + "."
