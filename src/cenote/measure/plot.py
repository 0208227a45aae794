"""The picture of a demonstration: what became of the requests, how long they took, what the server carried.

It draws figures that were measured elsewhere and computes none. It needs matplotlib, draws without a display,
and leaves matplotlib's global settings alone.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, NullFormatter, PercentFormatter

from cenote.measure.demo import Result, Side
from cenote.measure.findings import duration, mebibytes, percent

_INK, _FAINT, _GRID = "#1f2933", "#69757f", "#e4e7eb"
_DIRECT, _POOL = "#c2541b", "#0f7b8a"
_REFUSED, _OTHER = "#e9b8a0", "#b8c1c9"
_STYLE: Any = {
    "font.size": 10,
    "axes.edgecolor": _FAINT,
    "axes.labelcolor": _INK,
    "axes.titlecolor": _INK,
    "axes.titlesize": 11.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _GRID,
    "xtick.color": _FAINT,
    "ytick.color": _FAINT,
    "text.color": _INK,
    "legend.frameon": False,
    "svg.fonttype": "path",
}


def draw(result: Result, path: Path) -> None:
    """Draw `result` into `path`; its suffix (.png, .svg) says how.

    :raises OSError: the file cannot be written
    """
    layout = ConstrainedLayoutEngine(w_pad=0.14, h_pad=0.14, hspace=0.04, wspace=0.04)
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(11, 8.2), dpi=130, layout=layout)
        FigureCanvasAgg(figure)
        _head(figure, result)
        panels = figure.subplot_mosaic(
            [["latency", "latency", "fate"], ["backends", "backends", "memory"]], height_ratios=[1.15, 1]
        )
        _latency(panels["latency"], result)
        _fate(panels["fate"], result)
        _backends(panels["backends"], result)
        _memory(panels["memory"], result)
        figure.savefig(path)


def _head(figure: Figure, result: Result) -> None:
    setup, machine = result.setup, result.machine
    figure.suptitle(
        f"{setup.clients:,} callers at once: a connection for each request, or a pool of {setup.pool_size}",
        x=0.012,
        ha="left",
        fontsize=15,
        fontweight="bold",
    )
    figure.supxlabel(
        f"{setup.requests} look-ups by key of each caller, every {setup.every:g} s · PostgreSQL {setup.postgres}, "
        f"max_connections = {setup.max_connections} · {machine['cpus']} CPUs, {machine['system']} · "
        f"Python {machine['python']} · cenote {machine['cenote']}, core {machine['core']}",
        x=0.012,
        ha="left",
        fontsize=8.5,
        color=_FAINT,
    )


def _names(result: Result) -> list[tuple[Side, str, str]]:
    return [
        (result.direct, "connection per request", _DIRECT),
        (result.pool, f"pool of {result.setup.pool_size}", _POOL),
    ]


def _latency(axes: Any, result: Result) -> None:
    """Share of all requests, so that what was never answered is seen as the ceiling of a curve."""
    axes.set_title("Answered within ... (share of all requests)")
    axes.set_xscale("log")
    slowest = max((side.latencies_s[-1] for side, _, _ in _names(result) if side.answered), default=1.0)
    fastest = min((side.latencies_s[0] for side, _, _ in _names(result) if side.answered), default=0.001)
    right = slowest * 1.6
    for side, name, colour in _names(result):
        if not side.answered:
            axes.plot([], [], color=colour, lw=2.4, label=f"{name}: none answered")
            continue
        count = len(side.latencies_s)
        shares = [number / side.requests for number in range(1, count + 1)]
        label = f"{name}: {percent(side.answered, side.requests)} answered"
        axes.step(
            [*side.latencies_s, right], [*shares, shares[-1]], where="post", color=colour, lw=2.4, label=label
        )
        median = side.latency_s(0.5)
        assert median is not None
        axes.plot([median], [0.5 * count / side.requests], "o", ms=7, color=colour, mec="white", mew=1.5, zorder=5)
        axes.annotate(
            f"median {duration(median)}",
            (median, 0.5 * count / side.requests),
            xytext=(-9, 3),
            textcoords="offset points",
            ha="right",
            color=colour,
            fontweight="bold",
        )
    axes.set_xlim(fastest / 2.5, right)
    axes.set_ylim(0, 1.2)  # room for the legend above every curve
    axes.set_yticks([0, 0.2, 0.4, 0.6, 0.8, 1])
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=" %"))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _time_tick(value)))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("latency, from asking to the answer, waiting included (log scale)")
    _legend(axes)


def _legend(axes: Any) -> None:
    # Not in the layout: a wide legend would narrow its panel instead of being narrower itself.
    axes.legend(loc="upper left", ncols=2, fontsize=9.5, columnspacing=1.5).set_in_layout(False)


def _fate(axes: Any, result: Result) -> None:
    axes.set_title("What became of the requests")
    names = []
    for at, (side, _, colour) in enumerate(_names(result)):
        names.append("connection\nper request" if at == 0 else f"pool of {result.setup.pool_size}")
        base = 0.0
        parts = (
            (side.answered, "answered", colour, "white"),
            (side.refused, "refused", _REFUSED, _INK),
            (side.failed + side.unfinished, "failed", _OTHER, _INK),
        )
        for number, word, fill, ink in parts:
            share = number / side.requests
            axes.bar(at, share, bottom=base, width=0.72, color=fill, edgecolor="white")
            if share >= 0.04:
                line = "\n" if share >= 0.16 else " "
                axes.text(at, base + share / 2, f"{number:,}{line}{word}", ha="center", va="center", color=ink)
            base += share
    axes.set_xticks(range(len(names)), names, color=_INK)
    axes.set_xlim(-0.5, len(names) - 0.5)
    axes.set_ylim(0, 1.04)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=" %"))
    axes.grid(False)


def _backends(axes: Any, result: Result) -> None:
    peaks = [side.peak_backends or 0 for side, _, _ in _names(result)]
    for side, name, colour in _names(result):
        points = [(sample.at_s, sample.backends) for sample in side.samples if sample.backends is not None]
        if points:
            times, numbers = zip(*points, strict=True)
            axes.plot(times, numbers, color=colour, lw=1.8, label=f"{name}: {side.peak_backends:,} at the peak")
            axes.fill_between(times, numbers, color=colour, alpha=0.13, lw=0)
    limit = result.setup.max_connections
    beyond = " (beyond the limit: only to refuse)" if max(peaks) > limit else ""
    axes.set_title(f"Server processes for connections{beyond}")
    axes.axhline(limit, color=_INK, lw=1.1, ls=(0, (4, 3)), label=f"max_connections = {limit}")
    axes.set_ylim(0, max(limit, *peaks) * 1.45)  # room for the legend
    axes.set_xlim(0, max(side.seconds for side, _, _ in _names(result)))
    axes.set_xlabel("seconds since the callers began (each run by itself)")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    _legend(axes)


def _memory(axes: Any, result: Result) -> None:
    axes.set_title("The server's price")
    bars: list[tuple[str, list[float | None], Callable[[float], str]]] = [
        ("memory of the\nbackends, peak", [side.peak_memory_bytes for side, _, _ in _names(result)], mebibytes),
        ("CPU for each\nanswer", [side.server_cpu_per_answer_s for side, _, _ in _names(result)], duration),
    ]
    for group, (_, values, show) in enumerate(bars):
        highest = max((value for value in values if value), default=None)
        for at, (value, (_, _, colour)) in enumerate(zip(values, _names(result), strict=True)):
            if value is None or not highest:
                continue
            # Each group on its own scale: the units differ, and the labels carry the figures.
            place = group + (at - 0.5) * 0.36
            axes.bar(place, value / highest, width=0.32, color=colour)
            axes.text(place, value / highest + 0.02, show(value), ha="center", va="bottom", fontsize=9)
    axes.set_xticks(range(len(bars)), [name for name, _, _ in bars], color=_INK)
    axes.set_yticks([])
    axes.set_ylim(0, 1.14)
    axes.set_xlim(-0.5, len(bars) - 0.5)
    axes.spines["left"].set_visible(False)
    axes.grid(False)


def _time_tick(seconds: float) -> str:
    if seconds >= 1:
        return f"{seconds:g} s"
    return f"{seconds * 1000:g} ms" if seconds >= 0.001 else f"{seconds * 1e6:g} µs"
