"""The picture of a demonstration: what became of the requests, how long they took, what the server carried.

It draws figures that were measured elsewhere and computes none. It needs matplotlib.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter, PercentFormatter

from cenote.measure.demo import Result, Side
from cenote.measure.findings import duration, mebibytes, percent
from cenote.measure.ink import LIGHT, Ink, head, save

_SIZE = (11.0, 8.2)


def draw(result: Result, path: Path, *, ink: Ink = LIGHT) -> None:
    """Draw `result` into `path`; its suffix (.png, .svg) says how.

    :raises OSError: the file cannot be written
    """
    save(lambda figure, paper: _panels(figure, paper, result), path, size=_SIZE, ink=ink)


@dataclass(frozen=True, slots=True)
class _Named:
    """A side with its name, in one line and for a narrow bar, and its colour."""

    side: Side
    name: str
    narrow: str
    colour: str


def _named(result: Result, ink: Ink) -> list[_Named]:
    size = result.setup.pool_size
    return [
        _Named(result.direct, "connection per request", "one per\nrequest", ink.series[1]),
        _Named(result.pool, f"pool of {size}", f"pool\nof {size}", ink.series[0]),
        _Named(result.proxy, f"proxy with {size}", f"proxy\nwith {size}", ink.series[2]),
    ]


def _panels(figure: Figure, ink: Ink, result: Result) -> None:
    setup, machine = result.setup, result.machine
    head(
        figure,
        ink,
        f"{setup.clients:,} callers at once: a connection for each request, a pool, a proxy",
        f"{setup.requests} look-ups by key of each caller, every {setup.every:g} s · PostgreSQL {setup.postgres}, "
        f"max_connections = {setup.max_connections} · {machine['cpus']} CPUs, {machine['system']} · "
        f"Python {machine['python']} · cenote {machine['cenote']}, core {machine['core']}",
    )
    named = _named(result, ink)
    last = "serverless" if result.serverless else "price"
    panels = figure.subplot_mosaic(
        [
            ["latency", "latency", "latency", "latency", "fate", "fate"],
            ["backends", "backends", "price", "price", last, last],
        ],
        height_ratios=[1.15, 1],
    )
    _latency(panels["latency"], ink, named)
    panels["fate"].set_title("What became of the requests")
    _fate(panels["fate"], ink, [(one.side, one.narrow, one.colour) for one in named])
    _backends(panels["backends"], ink, named, setup.max_connections)
    _price(panels["price"], named)
    if result.serverless:
        panels["serverless"].set_title(f"{setup.serverless:,} tasks, one connection each")
        bars = zip(result.serverless, ("directly", "through\nthe proxy"), (named[0], named[2]), strict=True)
        _fate(panels["serverless"], ink, [(side, words, one.colour) for side, words, one in bars], median=True)


def _latency(axes: Any, ink: Ink, named: list[_Named]) -> None:
    """Share of all requests, so that what was never answered is seen as the ceiling of a curve."""
    axes.set_title("Answered within ... (share of all requests)")
    axes.set_xscale("log")
    answered = [one.side.latencies_s for one in named if one.side.answered]
    right = max((latencies[-1] for latencies in answered), default=1.0) * 1.6
    left = min((latencies[0] for latencies in answered), default=0.001) / 2.5
    for one in named:
        _curve(axes, ink, one, right)
    axes.set_xlim(left, right)
    axes.set_ylim(0, 1.2)  # room for the legend above every curve
    axes.set_yticks([0, 0.2, 0.4, 0.6, 0.8, 1])
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=" %"))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _time_tick(value)))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("latency, from asking to the answer, waiting included (log scale)")
    _legend(axes, columns=3)


def _curve(axes: Any, ink: Ink, one: _Named, right: float) -> None:
    side = one.side
    if not side.answered:
        axes.plot([], [], color=one.colour, lw=2.4, label=f"{one.name}: none")
        return
    count = len(side.latencies_s)
    shares = [number / side.requests for number in range(1, count + 1)]
    label = f"{one.name}: {percent(side.answered, side.requests)}"
    axes.step(
        [*side.latencies_s, right], [*shares, shares[-1]], where="post", color=one.colour, lw=2.4, label=label
    )
    median = side.latency_s(0.5)
    assert median is not None
    middle = 0.5 * count / side.requests
    axes.plot([median], [middle], "o", ms=7, color=one.colour, mec=ink.paper, mew=1.5, zorder=5)
    axes.annotate(
        f"median {duration(median)}",
        (median, middle),
        xytext=(-9, 3) if side.way != "proxy" else (9, -13),
        textcoords="offset points",
        ha="right" if side.way != "proxy" else "left",
        color=one.colour,
        fontweight="bold",
    )


def _legend(axes: Any, *, columns: int) -> None:
    # Not in the layout: a wide legend would narrow its panel instead of being narrower itself.
    axes.legend(loc="upper left", ncols=columns, fontsize=8.8, columnspacing=1.2).set_in_layout(False)


def _fate(axes: Any, ink: Ink, bars: Sequence[tuple[Side, str, str]], *, median: bool = False) -> None:
    for at, (side, _, colour) in enumerate(bars):
        base = 0.0
        parts = (
            (side.answered, "answered", colour, 1.0, ink.paper),
            (side.refused, "refused", ink.bad, 0.30, ink.ink),
            (side.failed + side.unfinished, "failed", ink.faint, 0.45, ink.ink),
        )
        for number, word, fill, alpha, text in parts:
            share = number / side.requests
            axes.bar(at, share, bottom=base, width=0.76, color=fill, alpha=alpha, lw=0)
            if share >= 0.04:
                words = f"{number:,}\n{word}" if share >= 0.1 else f"{number:,}"
                typical = side.latency_s(0.5)
                if median and word == "answered" and typical is not None and share >= 0.16:
                    words += f"\nmedian {duration(typical)}"
                axes.text(at, base + share / 2, words, ha="center", va="center", color=text, fontsize=8.5)
            base += share
    axes.set_xticks(range(len(bars)), [words for _, words, _ in bars], color=ink.ink)
    axes.set_xlim(-0.5, len(bars) - 0.5)
    axes.set_ylim(0, 1.04)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=" %"))
    axes.grid(visible=False)


def _backends(axes: Any, ink: Ink, named: list[_Named], limit: int) -> None:
    peaks = [one.side.peak_backends or 0 for one in named]
    for one in named:
        points = [(sample.at_s, sample.backends) for sample in one.side.samples if sample.backends is not None]
        if points:
            times, numbers = zip(*points, strict=True)
            axes.plot(times, numbers, color=one.colour, lw=1.8, label=f"{one.name}: {one.side.peak_backends:,}")
            axes.fill_between(times, numbers, color=one.colour, alpha=0.13, lw=0)
    axes.set_title("Server processes, and their peak")
    axes.axhline(limit, color=ink.ink, lw=1.1, ls=(0, (4, 3)), label=f"max_connections: {limit}")
    axes.set_ylim(0, max(limit, *peaks) * 1.75)  # room for the legend
    axes.set_xlim(0, max(one.side.seconds for one in named))
    axes.set_xlabel("seconds since the callers began")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    _legend(axes, columns=1)


def _price(axes: Any, named: list[_Named]) -> None:
    axes.set_title("The server's price")
    groups: list[tuple[str, list[float | None], Callable[[float], str]]] = [
        ("memory of the\nbackends, peak", [one.side.peak_memory_bytes for one in named], mebibytes),
        ("CPU for each\nanswer", [one.side.server_cpu_per_answer_s for one in named], duration),
    ]
    for group, (_, values, show) in enumerate(groups):
        highest = max((value for value in values if value), default=None)
        for at, (value, one) in enumerate(zip(values, named, strict=True)):
            if value is None or not highest:
                continue
            # Each group on its own scale: the units differ, and the labels carry the figures.
            place = group + (at - 1) * 0.3
            axes.bar(place, value / highest, width=0.27, color=one.colour)
            words = show(value).replace(" ", "\n")
            axes.text(place, value / highest + 0.02, words, ha="center", va="bottom", fontsize=8.5)
    axes.set_xticks(range(len(groups)), [name for name, _, _ in groups])
    axes.set_yticks([])
    axes.set_ylim(0, 1.2)
    axes.set_xlim(-0.5, len(groups) - 0.5)
    axes.spines["left"].set_visible(False)
    axes.grid(visible=False)


def _time_tick(seconds: float) -> str:
    if seconds >= 1:
        return f"{seconds:g} s"
    return f"{seconds * 1000:g} ms" if seconds >= 0.001 else f"{seconds * 1e6:g} µs"
