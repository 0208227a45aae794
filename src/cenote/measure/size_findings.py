"""What the figures of `cenote size` say: the pool size, what each process may have, and why, in words and names.

Pure functions of a `Result`. Every number is measured or computed from what was; what is not known is left out.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from cenote.measure.findings import duration
from cenote.measure.size import Level, Result
from cenote.measure.statements import mean_s

_BUSY_CALLERS = 0.85
_POOR_FIT = 0.10
_SHORT_S = 0.0003


@dataclass(frozen=True, slots=True)
class Fleet:
    """Who shares the server: so many instances of so many processes, and how many more there are for a moment
    while a deployment replaces them (1.0: old and new all at once)."""

    instances: int = 1
    workers: int = 1
    overlap: float = 1.0

    @property
    def processes(self) -> int:
        return self.instances * self.workers

    @property
    def deploying(self) -> int:
        """Processes while a deployment is under way."""
        return self.workers * (self.instances + round(self.instances * self.overlap))


@dataclass(frozen=True, slots=True)
class Advice:
    """What follows for pools.

    total: connections that serve best, of all processes together
    usable: slots of max_connections that are there for them: not reserved, not taken by others when we looked
    each: of one process, so that all of them together have no more than `total`; 0: more processes than that
    each_most: of one process, so that all fit into `usable` also while a deployment is under way
    formula: cores x 2 + spindles; None where the cores are not known
    """

    total: int
    usable: int
    each: int
    each_most: int
    formula: int | None


def advice(result: Result, fleet: Fleet, cores: int | None, spindles: int) -> Advice:
    """Set the knee beside the limits."""
    target = result.target
    usable = max(0, target.max_connections - target.reserved - target.others)
    known = cores if cores is not None else result.cores
    return Advice(
        total=result.fit.knee,
        usable=usable,
        each=min(result.fit.knee // fleet.processes, usable // fleet.deploying),
        each_most=usable // fleet.deploying,
        formula=None if known is None else known * 2 + spindles,
    )


def as_dict(result: Result, fleet: Fleet, found: Advice) -> dict[str, Any]:
    """Every figure under its name, for JSON."""
    target, fit = result.target, result.fit
    levels = []
    for level in result.levels:
        low, high = fit.band[level.connections]
        figures = asdict(level)
        figures |= {"rate": level.rate, "fitted": fit.law.at(level.connections), "fitted_low": low}
        levels.append(figures | {"fitted_high": high, "locked": level.locked})
    return {
        "server": {
            "title": target.title,
            "version": target.version,
            "max_connections": target.max_connections,
            "reserved": target.reserved,
            "others": target.others,
            "others_by_application": {other.application: other.sessions for other in result.others},
            "cores": result.cores,
        },
        "mix": [asdict(source) for source in result.setup.sources],
        "protocol": result.setup.protocol,
        "levels": levels,
        "fit": asdict(fit.law)
        | {
            "knee": fit.knee,
            "knee_low": fit.knee_low,
            "knee_high": fit.knee_high,
            "measured_knee": fit.measured_knee,
            "error": fit.error,
            "saturated": fit.saturated,
        },
        "fleet": asdict(fleet),
        "advice": asdict(found),
        "ended": result.ended,
        "seconds": result.seconds,
        "round_s": result.round_s,
        "statements": None if result.statements is None else [asdict(each) for each in result.statements],
        "explained": list(explained(result, fleet, found)),
    }


def answer(result: Result) -> str:
    """The pool size in one sentence."""
    fit = result.fit
    if not fit.saturated:
        return (
            f"No knee up to {fit.most} connections: throughput still grows there. "
            f"{fit.knee} is the least that is safe to say; measure further with a higher --max."
        )
    between = "" if fit.knee_low == fit.knee_high else f" (between {fit.knee_low} and {fit.knee_high})"
    return (
        f"Pool size: {fit.knee}{between}, for all processes together. "
        f"It gives {fit.law.at(fit.knee):,.0f} transactions per second of at most "
        f"{fit.law.best(fit.most)[1]:,.0f}."
    )


def explained(result: Result, fleet: Fleet, found: Advice) -> Iterator[str]:
    """Each number, and where it comes from."""
    yield _curve(result)
    yield from _slower(result)
    yield from _formula(result, found)
    yield from _room(result, fleet, found)
    yield from _doubts(result)
    if result.statements:
        calls = sum(each.calls for each in result.statements)
        yield (
            f"pg_stat_statements: the {len(result.statements)} dearest statements of this database ran "
            f"{calls:,} times, {duration(mean_s(result.statements))} on average."
        )


def _curve(result: Result) -> str:
    law, fit = result.fit.law, result.fit
    words = (
        f"The law: one connection does {law.rate:,.0f} per second; {100 * law.contention:.1f} % of the work is "
        f"done one at a time (contention), and each pair of connections costs {100 * law.coherency:.2f} % more "
        f"(coherency)"
    )
    if law.ceiling is not None:
        words += (
            f"; at {law.ceiling:,.0f} per second there is a hard limit (a lock, a quota, a device), where the "
            "curve bends at once"
        )
    words += f". It misses the measured medians by {100 * fit.error:.1f} %."
    if fit.saturated:
        words += (
            " The knee is the least number that reaches 95 % of its maximum; measured alone, without a law, it is "
            f"{fit.measured_knee}."
        )
    return words


def _slower(result: Result) -> Iterator[str]:
    knee, top = _at_knee(result), result.levels[-1]
    if not result.fit.saturated or top is knee:
        return
    change = top.rate / knee.rate - 1
    words = [f"throughput {change:+.0%}"]
    if knee.p99_s and top.p99_s:
        words.append(f"p99 {duration(knee.p99_s)} -> {duration(top.p99_s)}")
    if knee.switches_per_s and top.switches_per_s:
        words.append(
            f"context switches for each transaction {knee.switches_per_s / knee.rate:.2g} -> "
            f"{top.switches_per_s / top.rate:.2g}"
        )
    words.append(f"waiting for locks {knee.locked:.0%} -> {top.locked:.0%}")
    if knee.system_cpu is not None and top.system_cpu is not None:
        words.append(f"system CPU {knee.system_cpu:.0%} -> {top.system_cpu:.0%}")
    yield (
        f"Bigger: from {knee.connections} to {top.connections} connections, {', '.join(words)}. "
        "A closed loop of n callers has them wait n / throughput each: beyond the knee that is all that grows."
    )


def _formula(result: Result, found: Advice) -> Iterator[str]:
    if found.formula is None:
        yield "The formula cores x 2 + spindles: the server's cores are not known from here (--cores)."
        return
    inside = result.fit.knee_low <= found.formula <= result.fit.knee_high
    agrees = "agrees with" if inside else "is not"
    yield (
        f"The formula cores x 2 + spindles gives {found.formula}, which {agrees} what was measured for this mix. "
        "It knows neither your queries nor your locks."
    )


def _room(result: Result, fleet: Fleet, found: Advice) -> Iterator[str]:
    target = result.target
    who = ", ".join(f"{other.sessions} of {other.application}" for other in result.others[:3])
    yield (
        f"max_connections = {target.max_connections}: {target.reserved} reserved, {target.others} taken by others"
        f"{f' ({who})' if who else ''}, {found.usable} usable."
    )
    if found.total > found.usable:
        yield f"That is less than {found.total}: raise max_connections, or have the others share a pool."
    if fleet.processes == 1:
        return
    many = f"{fleet.instances} instances x {fleet.workers} workers = {fleet.processes} processes"
    best = "serve best" if result.fit.saturated else "are the least that is safe to say"
    if found.each:
        share = "1 connection" if found.each == 1 else f"{found.each} connections"
        yield f"{many}, and {found.total} connections {best}: {share} each (max_size = {found.each})."
    else:
        yield (
            f"{many}, and {found.total} connections {best}: not even one each. Put one proxy before the "
            f"server (cenote serve) with max_size = {found.total}."
        )
    each = max(1, found.each)
    total = each * fleet.deploying
    fits = "fits" if total <= found.usable else f"does not fit into {found.usable}: new instances are refused"
    yield (
        f"While a deployment replaces them, {fleet.deploying} processes hold up to {total} connections, "
        f"which {fits}. "
        + (
            f"No process may have more than {found.each_most}."
            if found.each_most
            else "There is no size of a pool in each process that fits."
        )
    )


def _doubts(result: Result) -> Iterator[str]:
    fit = result.fit
    if fit.error > _POOR_FIT:
        yield f"The law misses by {100 * fit.error:.0f} %: trust the measured levels more than the curve."
    if not fit.knee_low / 1.5 <= fit.measured_knee <= fit.knee_high * 1.5:
        yield (
            f"The law's knee and the measured one, {fit.measured_knee}, are more than a step apart: the truth is "
            "between them, and more --seconds bring them together."
        )
    if fit.knee_high > 2 * fit.knee_low:
        yield "The knee is not sharp, or the machine was not quiet: more --seconds narrow the interval."
    busiest = max(result.levels, key=lambda level: level.callers_cpu)
    if busiest.callers_cpu >= _BUSY_CALLERS:
        yield (
            f"The measuring process used {busiest.callers_cpu:.2f} CPUs at {busiest.connections} connections: "
            "beyond one CPU the curve is its own, not the server's."
        )
    if result.cores is not None and busiest.callers_cpu >= 0.1 * result.cores:
        yield (
            f"The measuring process took up to {busiest.callers_cpu:.2f} of this machine's {result.cores} CPUs, "
            "which the server then does not have: with the callers elsewhere the knee may be higher."
        )
    alone_s = result.levels[0].p50_s
    if alone_s is not None and alone_s < _SHORT_S:
        yield (
            f"A transaction takes {duration(alone_s)} alone, of which the measuring process needs some 30 µs to "
            "send the next: that lowers the curve at its beginning and moves the knee up by a connection or two."
        )
    failed = sum(sum(level.failed.values()) for level in result.levels)
    if failed:
        first = next(word for level in result.levels for word in level.failed)
        yield f"{failed:,} transactions failed and are not counted: {first}."


def marked(level: Level, result: Result) -> str:
    """What a level is beside its number: the one that stands for the knee is marked."""
    return "<- knee" if level is _at_knee(result) and result.fit.saturated else ""


def _at_knee(result: Result) -> Level:
    """The smallest measured level that is no less than the knee: below it the throughput is still on its way."""
    return next(level for level in result.levels if level.connections >= result.fit.knee)
