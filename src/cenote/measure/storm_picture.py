"""The picture of `cenote storm`: how long requests took, what became of them, and what the server had to carry.

It draws figures that were simulated or measured elsewhere and computes none. It needs matplotlib.
"""

from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter, PercentFormatter

from cenote.measure.findings import duration, percent
from cenote.measure.ink import Draw, Ink, head
from cenote.measure.storm import Storm
from cenote.measure.storm_findings import NAMES

SIZE = (11.0, 8.6)
_POINTS = 400
_LEAST_S = 1e-5


def drawing(storm: Storm, kind: str) -> Draw:
    """What draws this storm. `kind`: "simulated", or how it was measured."""

    def draw(figure: Figure, ink: Ink) -> None:
        scenario = storm.scenario
        below = (
            f"{kind} · {storm.outcomes[0].requests:,} requests, the same for each way\n"
            f"{scenario.server.cores} cores, {scenario.usable:,} connections to be had · "
            f"{scenario.clients.instances} instances, pools of {scenario.clients.pool_size}; "
            f"budget {scenario.budget}, proxy {scenario.proxy_size}"
        )
        head(figure, ink, scenario.title, below)
        panels = figure.subplot_mosaic(
            [["latency", "latency", "fate"], ["connections", "connections", "rate"]], height_ratios=[1.2, 1]
        )
        _latency(panels["latency"], storm, ink)
        _fate(panels["fate"], storm, ink)
        _connections(panels["connections"], storm, ink)
        _rate(panels["rate"], storm, ink)

    return draw


def _latency(axes: Any, storm: Storm, ink: Ink) -> None:
    """Share of all requests, so that what was never answered is seen as the ceiling of a curve."""
    axes.set_title("Answered within ... (share of all requests)")
    axes.set_xscale("log")
    longest = max((float(each.latency_s.max()) for each in storm.outcomes if each.answered), default=1.0)
    for number, each in enumerate(storm.outcomes):
        name = f"{NAMES[each.way]}: {percent(each.answered, each.requests)}"
        if not each.answered:
            axes.plot([], [], color=ink.series[number], lw=2.2, label=name)
            continue
        shares = np.linspace(0, 1, _POINTS)
        values = np.maximum(np.quantile(each.latency_s, shares), _LEAST_S)
        top = each.answered / each.requests
        axes.plot([*values, longest * 1.5], [*(shares * top), top], color=ink.series[number], lw=2.2, label=name)
    fastest = [float(np.quantile(each.latency_s, 0.005)) for each in storm.outcomes if each.answered]
    axes.set_xlim(max(_LEAST_S, min(fastest, default=0.001)), longest * 1.5)
    axes.set_ylim(0, 1.3)  # room for the legend above every curve
    axes.set_yticks([0, 0.2, 0.4, 0.6, 0.8, 1])
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=" %"))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: duration(value)))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("latency, from asking to the answer, waiting included (log scale)")
    axes.legend(loc="upper left", ncols=2, fontsize=9.5).set_in_layout(False)


def _fate(axes: Any, storm: Storm, ink: Ink) -> None:
    axes.set_title("What became of them")
    for number, each in enumerate(storm.outcomes):
        base = 0.0
        lost = sum(each.failed.values()) + each.unfinished
        parts = (
            (each.answered, ink.series[number], 1.0),
            (sum(each.refused.values()), ink.bad, 0.75),
            (lost, ink.faint, 0.6),
        )
        for count, fill, alpha in parts:
            share = count / max(1, each.requests)
            axes.bar(number, share, bottom=base, width=0.7, color=fill, alpha=alpha, edgecolor=ink.paper)
            base += share
    axes.bar(0, 0, color=ink.bad, alpha=0.75, label="refused")
    axes.bar(0, 0, color=ink.faint, alpha=0.6, label="failed, unfinished")
    axes.set_xticks(range(len(storm.outcomes)), [NAMES[each.way].replace(" ", "\n") for each in storm.outcomes])
    axes.set_xlim(-0.5, len(storm.outcomes) - 0.5)
    axes.set_ylim(0, 1.3)
    axes.set_yticks([0, 0.2, 0.4, 0.6, 0.8, 1])
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=" %"))
    axes.legend(loc="upper left", fontsize=9)
    axes.grid(axis="x", visible=False)


def _connections(axes: Any, storm: Storm, ink: Ink) -> None:
    axes.set_title("Server connections")
    highest = storm.scenario.usable
    for number, each in enumerate(storm.outcomes):
        if each.samples:
            at = [sample.at_s for sample in each.samples]
            axes.plot(
                at,
                [sample.connections for sample in each.samples],
                color=ink.series[number],
                lw=1.8,
                label=f"{NAMES[each.way]}: {each.peak:,} at most",
            )
    axes.axhline(highest, color=ink.bad, lw=1.2, ls=(0, (4, 3)), label=f"{highest:,} to be had")
    # Room for the legend. A real server's sessions are counted, and a neighbour's may be among them.
    axes.set_ylim(0, max([highest, *(each.peak for each in storm.outcomes)]) * 1.5)
    axes.set_xlim(0, _until(storm))
    axes.set_xlabel("seconds")
    axes.legend(loc="upper left", ncols=3, fontsize=8.5, columnspacing=1.2).set_in_layout(False)


def _rate(axes: Any, storm: Storm, ink: Ink) -> None:
    axes.set_title("Answers a second")
    for number, each in enumerate(storm.outcomes):
        if len(each.samples) < 2:
            continue
        width = max(1, len(each.samples) // 40)
        points = each.samples[1:]
        at = [points[i].at_s for i in range(width - 1, len(points), width)]
        every_s = each.samples[1].at_s - each.samples[0].at_s
        rates = [
            sum(sample.answered for sample in points[i - width + 1 : i + 1]) / (width * every_s)
            for i in range(width - 1, len(points), width)
        ]
        axes.plot(at, rates, color=ink.series[number], lw=1.8)
    axes.set_ylim(bottom=0)
    axes.set_xlim(0, _until(storm))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.set_xlabel("seconds")


def _until(storm: Storm) -> float:
    return max([storm.scenario.load.seconds, *(each.seconds for each in storm.outcomes)])
