"""The picture of a connection: its phases one after the other, as bars in time, for each distance.

Each distance has a panel and a scale of its own, from zero; what a warm query takes stands below on that scale. It
draws figures that were measured elsewhere and computes none.
"""

from math import ceil
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from cenote.measure.cost import Result
from cenote.measure.cost_figures import OPENING, Way
from cenote.measure.cost_https import OriginResult
from cenote.measure.cost_words import TITLES, is_local, place
from cenote.measure.findings import duration
from cenote.measure.ink import Ink, head

_COLUMNS = 2
_LONG = 44
_ROW_IN = 0.3
_PANEL_IN = 1.15
_ROOM = 1.22  # for the labels right of the bars


def size(result: Result | OriginResult) -> tuple[float, float]:
    """Inches for `draw`."""
    panels = len(result.distances)
    rows = ceil(panels / _COLUMNS) if panels > 1 else 1
    return 11.0 if panels > 1 else 9.5, 1.3 + rows * (_PANEL_IN + _ROW_IN * len(result.near.phases))


def draw(result: Result | OriginResult, figure: Figure, ink: Ink) -> None:
    """Draw into an empty figure."""
    ways = result.distances
    head(figure, ink, f"One connection, phase by phase: {_what(result)}", _below(result))
    columns = _COLUMNS if len(ways) > 1 else 1
    panels = figure.subplots(ceil(len(ways) / columns), columns, squeeze=False)
    for axes, way in zip(panels.flat, ways, strict=False):
        _waterfall(axes, way, ink, place(way, local=is_local(result)))
    for axes in panels.flat[len(ways) :]:
        axes.set_axis_off()


def _below(result: Result | OriginResult) -> str:
    machine = result.machine
    far = " +N ms: a simulated distance, there and back." if result.far else ""
    return (
        f"Medians, one after the other; thin lines: p10 to p90 of each.{far} "
        f"{machine['cpus']} CPUs, {machine['system']} · Python {machine['python']} · cenote {machine['cenote']}"
    )


def _what(result: Result | OriginResult) -> str:
    if isinstance(result, OriginResult):
        return _short(result.title)
    target = result.target
    major = f"PostgreSQL {target.version // 10_000}"
    return major if target.embedded else f"{major} at {_short(target.host)}:{target.port}"


def _short(host: str) -> str:
    return host if len(host) <= _LONG else f"{host[: _LONG - 3]}..."


def _waterfall(axes: Any, way: Way, ink: Ink, name: str) -> None:
    warm = way.warm
    phases = [phase for phase in way.phases if phase is not warm]
    trips = f"{way.trips} round trip{'' if way.trips == 1 else 's'}"
    axes.set_title(f"{name}: ready after {duration(way.ready.median)}")
    start = 0.0
    for row, phase in enumerate(phases):
        times = phase.seconds
        opening = phase.name in OPENING
        colour = ink.series[0] if opening else ink.series[1] if phase.name.startswith("first_") else ink.faint
        axes.barh(row, times.median, left=start, height=0.62, color=colour)
        axes.plot([start + times.p10, start + times.p90], [row, row], color=ink.ink, lw=1, solid_capstyle="butt")
        _label(axes, start + max(times.median, times.p90), row, duration(times.median), ink)
        start += times.median
    names = [TITLES[phase.name] for phase in phases]
    right = max(start, *(_end(phases, number) for number in range(len(phases))))
    if warm is not None:
        row, took = len(phases), warm.seconds.median
        axes.barh(row, took, height=0.62, color=ink.good)
        # Where the bar leaves room for it.
        what = " on a connection that is there" if took < right / 3 else ""
        _label(axes, took, row, f"{duration(took)}{what}", ink)
        names.append(TITLES[warm.name])
        right = max(right, took)
    axes.set_yticks(range(len(names)), names, color=ink.ink)
    axes.invert_yaxis()
    axes.set_xlim(0, right * _ROOM)
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value * 1e3:g}"))
    axes.set_xlabel(f"milliseconds; {trips} until ready, n={way.samples}")
    axes.grid(axis="y", visible=False)
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)


def _end(phases: list[Any], number: int) -> float:
    """Where the line of a phase ends."""
    before = sum(phase.seconds.median for phase in phases[:number])
    return float(before + phases[number].seconds.p90)


def _label(axes: Any, at: float, row: int, text: str, ink: Ink) -> None:
    axes.annotate(
        text,
        (at, row),
        xytext=(5, 0),
        textcoords="offset points",
        va="center",
        fontsize=8.5,
        color=ink.ink,
        annotation_clip=False,
    )
