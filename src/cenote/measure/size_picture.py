"""The picture of `cenote size`: the curve with its knee, and under it why bigger is slower.

It draws figures that were measured elsewhere and computes none. It needs matplotlib.
"""

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator, PercentFormatter

from cenote.measure.findings import duration
from cenote.measure.ink import Draw, Ink, head
from cenote.measure.size import Level, Result
from cenote.measure.size_findings import Advice

SIZE = (11.0, 8.6)


def drawing(result: Result, found: Advice) -> Draw:
    """What draws this result."""

    def draw(figure: Figure, ink: Ink) -> None:
        fit = result.fit
        verdict = f"the knee is at {fit.knee} connections" if fit.saturated else f"no knee up to {fit.most}"
        head(figure, ink, f"Throughput against connections: {verdict}", _below(result))
        panels = figure.subplot_mosaic(
            [["rate", "rate", "rate"], ["latency", "switches", "shares"]], height_ratios=[1.35, 1]
        )
        _rate(panels["rate"], result, found, ink)
        _latency(panels["latency"], result, ink)
        _switches(panels["switches"], result, ink)
        _shares(panels["shares"], result, ink)

    return draw


def _below(result: Result) -> str:
    names = ", ".join(source.name for source in result.setup.sources[:3])
    rounds = min(len(level.rates) for level in result.levels)
    return (
        f"{result.target.title} · queries: {names}, {result.setup.protocol} protocol · {rounds} rounds or more of "
        f"{duration(result.round_s)} at each level · number of connections on a logarithmic scale"
    )


def _axis(axes: Any, levels: Sequence[Level]) -> None:
    axes.set_xscale("log", base=2)
    numbers = [level.connections for level in levels]
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(_told_apart(numbers), [str(n) for n in _told_apart(numbers)])
    axes.set_xlim(numbers[0] / 1.12, numbers[-1] * 1.12)
    axes.set_xlabel("connections")


def _told_apart(numbers: Sequence[int]) -> list[int]:
    """Those whose labels do not touch: with many levels every power of two, and the last."""
    if len(numbers) <= 9:
        return list(numbers)
    kept = [n for n in numbers if n & (n - 1) == 0]
    return kept if numbers[-1] < 1.4 * kept[-1] else [*kept, numbers[-1]]


def _rate(axes: Any, result: Result, found: Advice, ink: Ink) -> None:
    levels, fit = result.levels, result.fit
    colour = ink.series[0]
    numbers = list(range(1, fit.most + 1))
    axes.fill_between(
        numbers,
        [fit.band[n][0] for n in numbers],
        [fit.band[n][1] for n in numbers],
        color=colour,
        alpha=0.18,
        lw=0,
        label="90 % band of the fit",
    )
    cut = "" if fit.law.ceiling is None else ", cut off at a ceiling"
    finely = [fit.most ** (step / 400) for step in range(401)]
    axes.plot(finely, [fit.law.at(n) for n in finely], color=colour, lw=2, label=f"scalability law fitted{cut}")
    xs = [level.connections for level in levels for _ in level.rates]
    ys = [rate for level in levels for rate in level.rates]
    axes.plot(xs, ys, ".", color=ink.faint, ms=5, alpha=0.7, label="each round")
    axes.plot(
        [level.connections for level in levels],
        [level.rate for level in levels],
        "o",
        color=ink.series[1],
        ms=7,
        mec=ink.paper,
        label="median of the rounds",
        zorder=4,
    )
    top = max([*ys, *(high for _, high in fit.band.values())])
    if fit.saturated:
        axes.axvspan(fit.knee_low / 1.02, fit.knee_high * 1.02, ymax=0.84, color=ink.good, alpha=0.14, lw=0)
        axes.axvline(fit.knee, ymax=0.84, color=ink.good, lw=1.8)
        span = "" if fit.knee_low == fit.knee_high else f" ({fit.knee_low} to {fit.knee_high})"
        _note(axes, fit.knee, 0.06, f"knee {fit.knee}{span}", ink.good, fit.most, ink.paper)
    if found.formula is not None and found.formula <= fit.most * 1.1:
        axes.axvline(found.formula, ymax=0.84, color=ink.faint, lw=1.2, ls=(0, (4, 3)))
        words = f"cores x 2 + spindles = {found.formula}"
        # Away from the knee's line, where there is room.
        left = fit.saturated and fit.most**0.3 <= found.formula < fit.knee
        _note(axes, found.formula, 0.16, words, ink.faint, fit.most, ink.paper, left=left)
    _axis(axes, levels)
    axes.set_title("Transactions per second")
    axes.set_ylim(0, top * 1.28)  # room for the legend above every curve
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.legend(loc="upper left", ncols=4, fontsize=9, columnspacing=1.5).set_in_layout(False)


def _note(
    axes: Any, at: float, height: float, words: str, colour: str, most: int, paper: str, *, left: bool = False
) -> None:
    """Words beside a vertical line, legible where they lie across another."""
    left = left or at > most**0.6
    axes.annotate(
        words,
        (at, height),
        xycoords=("data", "axes fraction"),
        xytext=(-6 if left else 6, 0),
        textcoords="offset points",
        ha="right" if left else "left",
        color=colour,
        fontweight="bold",
        bbox={"facecolor": paper, "edgecolor": "none", "pad": 1.5},
    )


def _latency(axes: Any, result: Result, ink: Ink) -> None:
    shown = (("p99", "p99_s", 1), ("p95", "p95_s", 3), ("median", "p50_s", 0))
    for name, field, number in shown:
        points = [(level.connections, getattr(level, field)) for level in result.levels if getattr(level, field)]
        if points:
            axes.plot(*zip(*points, strict=True), "o-", ms=4, lw=1.8, color=ink.series[number], label=name)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: duration(value)))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_title("Latency (log scale)")
    _axis(axes, result.levels)
    axes.legend(loc="upper left", fontsize=9)


def _switches(axes: Any, result: Result, ink: Ink) -> None:
    axes.set_title("Context switches per second")
    points = [
        (level.connections, level.switches_per_s) for level in result.levels if level.switches_per_s is not None
    ]
    if not points:
        _unseen(axes, ink)
        return
    axes.plot(*zip(*points, strict=True), "o-", ms=4, lw=1.8, color=ink.series[2])
    axes.set_ylim(0, max(value for _, value in points) * 1.15 or 1)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    _axis(axes, result.levels)


def _shares(axes: Any, result: Result, ink: Ink) -> None:
    axes.set_title("Locks and the machine's CPU")
    levels = result.levels
    numbers = [level.connections for level in levels]
    axes.plot(
        numbers,
        [level.locked for level in levels],
        "o-",
        ms=4,
        lw=1.8,
        color=ink.bad,
        label="connections waiting for locks",
    )
    for name, field, number in (("system CPU", "system_cpu", 1), ("user CPU", "user_cpu", 0)):
        points = [(n, getattr(level, field)) for n, level in zip(numbers, levels, strict=True)]
        points = [(n, value) for n, value in points if value is not None]
        if points:
            axes.plot(*zip(*points, strict=True), "o-", ms=4, lw=1.8, color=ink.series[number], label=name)
    axes.set_ylim(0, 1.42)  # room for the legend
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1])
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=" %"))
    _axis(axes, levels)
    axes.legend(loc="upper left", fontsize=9)


def _unseen(axes: Any, ink: Ink) -> None:
    axes.text(0.5, 0.5, "not seen: the server is elsewhere", ha="center", va="center", color=ink.faint)
    axes.set_xticks([])
    axes.set_yticks([])
