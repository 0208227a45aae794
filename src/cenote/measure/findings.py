"""What the figures of a demonstration say, in words and under names.

Pure functions of a `Result`: every word and number comes from what was measured, and a figure that is
missing is left out, not guessed.
"""

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from cenote.measure.demo import Result, Side


def as_dict(result: Result) -> dict[str, Any]:
    """Every figure under its name, for JSON; of the latencies the distribution instead of each."""
    return {
        "setup": asdict(result.setup),
        "machine": result.machine,
        **{side.way: _figures(side) for side in (*result.sides, *result.serverless)},
        "conclusion": conclusion(result),
    }


def _figures(side: Side) -> dict[str, Any]:
    figures = asdict(side)
    del figures["latencies_s"]
    figures["latency_s"] = {f"p{share}": side.latency_s(share / 100) for share in (50, 90, 95, 99, 100)}
    for end in ("server", "callers", "proxy"):
        figures[f"{end}_cpu_per_answer_s"] = getattr(side, f"{end}_cpu_per_answer_s")
    return figures


def conclusion(result: Result) -> str:
    """What the figures say, in a few sentences."""
    size = result.setup.pool_size
    connections = f"{size}" if size > 1 else "one connection"
    ways = (
        "With a connection for each request",
        f"Through a pool of {connections}",
        f"Through a proxy with {size}",
    )
    sentences = [_fate(side, way) for side, way in zip(result.sides, ways, strict=True)]
    for side, name in ((result.pool, "pool"), (result.proxy, "proxy")):
        *shares, last = list(_shares(result.direct, side)) or [""]
        if last:
            listed = f"{', '.join(shares)} and {last}" if shares else last
            sentences.append(f"The {name} needed {listed}.")
    if result.serverless:
        directly, through = result.serverless
        sentences.append(_fate(directly, "When short-lived tasks connect once each", "tasks"))
        sentences.append(_fate(through, "When they connect to the proxy", "tasks"))
    return " ".join(sentences)


def _fate(side: Side, way: str, what: str = "requests") -> str:
    endings = ((side.refused, "refused"), (side.failed, "failed"), (side.unfinished, "not finished"))
    lost = ", ".join(f"{count:,} {word}" for count, word in endings if count)
    everything = side.answered == side.requests
    answered = f"all {side.requests:,}" if everything else f"{side.answered:,} of {side.requests:,}"
    p50 = side.latency_s(0.5)
    median = f", half of them within {duration(p50)}" if p50 is not None else ""
    return f"{way}, {answered} {what} were answered{f' ({lost})' if lost else ''}{median}."


def _shares(direct: Side, other: Side) -> Iterator[str]:
    pairs: tuple[tuple[str, float | None, float | None], ...] = (
        ("server connections", direct.opened, other.opened),
        ("backends at the peak", direct.peak_backends, other.peak_backends),
        ("backend memory", direct.peak_memory_bytes, other.peak_memory_bytes),
        ("server CPU per answer", direct.server_cpu_per_answer_s, other.server_cpu_per_answer_s),
    )
    for what, one, two in pairs:
        if one and two:
            ratio = times(one, two)
            yield f"about the same {what}" if ratio == "equal" else f"{ratio} the {what}"


def times(one: float, other: float) -> str:
    """`other` as a share or multiple of `one`: "1/12 of", "3.4 times", or "equal" within a twentieth."""
    if abs(other - one) <= one / 20:
        return "equal"
    return f"{_short(other / one)} times" if other > one else f"1/{_short(one / other)} of"


def _short(ratio: float) -> str:
    return f"{ratio:.1f}" if ratio < 9.95 else f"{ratio:,.0f}"


def duration(seconds: float) -> str:
    """Seconds for a reader: three digits, in the unit that fits."""
    if seconds >= 0.9995:
        return f"{seconds:.2f} s"
    if seconds >= 0.0009995:
        return f"{seconds * 1e3:.3g} ms"
    return f"{seconds * 1e6:.3g} µs"


def span(seconds: float) -> str:
    """Seconds for a reader, however many: "2 h 11 min", "90 s", "12.3 ms"."""
    if seconds < 10:
        return duration(seconds)
    for unit_s, unit, part_s, part in ((86_400, "d", 3600, "h"), (3600, "h", 60, "min")):
        if seconds >= unit_s:
            whole, rest = divmod(int(seconds), unit_s)
            return f"{whole:,} {unit} {rest // part_s} {part}" if rest >= part_s else f"{whole:,} {unit}"
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def mebibytes(count: float) -> str:
    """Bytes for a reader, in MiB."""
    return f"{count / 2**20:,.1f} MiB"


def percent(part: int, whole: int) -> str:
    """A share for a reader; only nothing is 0 %, only all is 100 %."""
    share = 100 * part / whole
    if part in (0, whole):
        return f"{share:.0f} %"
    if share < 0.05:
        return "< 0.1 %"
    return f"{share:.1f} %" if share < 99.95 else "> 99.9 %"
