"""The doctor's picture of the slots, and his report as a page: who has max_connections, and what may still come.

They show what was found elsewhere and judge nothing. It needs matplotlib.
"""

from collections import Counter
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from cenote.measure import page
from cenote.measure.doctor import Diagnosis
from cenote.measure.doctor_facts import Facts
from cenote.measure.ink import DARK, LIGHT, Ink, head, save, svg
from cenote.measure.verdict import Severity

_WIDTH, _HEIGHT, _HEIGHT_ALONE = 11.0, 6.4, 3.6  # inches; alone: there are no sessions to tell apart
_MOST_APPLICATIONS = 7
_UNNAMED = "(no application_name)"
_STATES = ("active", "idle in transaction", "idle", "other", "hidden")


def draw(diagnosis: Diagnosis, path: Path) -> None:
    """Draw the slots into `path`; its suffix (.png, .svg) says how.

    :raises OSError: the file cannot be written
    """
    save(lambda figure, ink: _slots(figure, ink, diagnosis.facts), path, size=_size(diagnosis.facts))


def write_report(diagnosis: Diagnosis, path: Path) -> None:
    """Write everything as one HTML file.

    :raises OSError: the file cannot be written
    """

    def drawn(ink: Ink) -> str:
        facts = diagnosis.facts
        return svg(lambda figure, paper: _slots(figure, paper, facts), size=_size(facts), ink=ink)

    findings = [
        (
            finding.name,
            finding.verdict.severity.word,
            finding.verdict.number,
            finding.verdict.consequence,
            finding.verdict.remedy,
        )
        for finding in diagnosis.findings
    ]
    counts = ", ".join(
        f"{diagnosis.count(severity)} {severity.word}"
        for severity in sorted(Severity, reverse=True)
        if diagnosis.count(severity)
    )
    parts: list[page.Part] = [
        page.Words([f"Findings: {counts}."]),
        page.Picture(drawn(LIGHT), drawn(DARK), "Who has the slots now, and what may still come.", "Slots"),
        page.Grid(
            ("finding", "severity", "number", "consequence", "remedy"),
            findings,
            "Findings",
            frozenset({1, 2, 3, 4}),
        ),
        page.Words(["Each finding is explained in docs/doctor.md under its name."]),
    ]
    page.write(path, "What the doctor found", f"{diagnosis.facts.target.title}, seen from this machine", parts)


# -- the picture ------------------------------------------------------------------------------------------------


def _slots(figure: Figure, ink: Ink, facts: Facts) -> None:
    target = facts.target
    head(
        figure,
        ink,
        f"{target.max_connections:,} slots: {facts.used:,} taken, {facts.usable:,} for ordinary roles",
        f"{target.title} · sessions of others as pg_stat_activity has them, at one moment",
    )
    if not facts.used:
        _bars(figure.subplots(), ink, facts)
        return
    above, below = figure.subplots(2, 1, height_ratios=[1, 1.1])
    _bars(above, ink, facts)
    _applications(below, ink, facts)


def _size(facts: Facts) -> tuple[float, float]:
    return _WIDTH, _HEIGHT if facts.used else _HEIGHT_ALONE


def _state(state: str) -> str:
    if state.startswith("idle in transaction"):
        return "idle in transaction"
    return state if state in _STATES else "other"


def _colours(ink: Ink) -> dict[str, str]:
    return {
        "active": ink.series[0],
        "idle in transaction": ink.bad,
        "idle": ink.series[4],
        "other": ink.series[3],
        "hidden": ink.faint,
    }


def _bars(axes: Any, ink: Ink, facts: Facts) -> None:
    """Above who has the slots now, below what may want them; both on the server's scale."""
    axes.set_title("The server's slots, now and when all come that may come", pad=34)
    colours = _colours(ink)
    states = Counter(_state(session.state) for session in facts.server.sessions)
    now = [(states[state], state, colours[state], "") for state in _STATES]
    announced = (
        (facts.announced, "your pools, full", ink.series[1], "///")
        if facts.proxied is None
        else (facts.announced, "the proxy's budget", ink.series[2], "\\\\\\")
    )
    coming = [(facts.strangers, "others, there now", ink.series[6], ""), announced]
    rows = [(1, now)] + ([(0, coming)] if facts.announced else [])
    ends = [_stack(axes, ink, at, parts) for at, parts in rows]
    most = facts.target.max_connections
    axes.axvspan(
        facts.usable, most, color=ink.faint, alpha=0.35, lw=0, label=f"reserved: {facts.target.reserved:,}"
    )
    axes.axvline(most, color=ink.ink, lw=1.4, ls=(0, (4, 3)), label=f"max_connections = {most:,}")
    axes.set_xlim(0, max(most, *ends) * 1.04)
    axes.set_ylim(-0.55 if facts.announced else 0.45, 1.55)
    axes.set_yticks([at for at, _ in rows], ["now", "may come"][: len(rows)], color=ink.ink)
    axes.set_xlabel("connections")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.grid(visible=False, axis="y")
    axes.legend(loc="lower left", bbox_to_anchor=(-0.01, 0.98), ncols=4, fontsize=8.5, columnspacing=1.4)


def _stack(axes: Any, ink: Ink, at: int, parts: list[tuple[int, str, str, str]]) -> int:
    base = 0
    for number, label, colour, hatch in parts:
        if number:
            axes.barh(
                at, number, left=base, height=0.6, color=colour, hatch=hatch, edgecolor=ink.paper, lw=1,
                label=f"{label}: {number:,}",
            )  # fmt: skip
            base += number
    if not base:
        axes.text(0.5, at, "nobody else is connected", va="center", color=ink.faint)
    return base


def _applications(axes: Any, ink: Ink, facts: Facts) -> None:
    axes.set_title("Sessions by application and state")
    by_name: dict[str, Counter[str]] = {}
    for session in facts.server.sessions:
        by_name.setdefault(session.application or _UNNAMED, Counter())[_state(session.state)] += 1
    ranked = sorted(by_name.items(), key=lambda item: -item[1].total())
    rest = ranked[_MOST_APPLICATIONS:]
    ranked = ranked[:_MOST_APPLICATIONS]
    if rest:
        together: Counter[str] = sum((counts for _, counts in rest), Counter())
        ranked.append((f"{len(rest)} others", together))
    colours = _colours(ink)
    for row, (_, counts) in enumerate(ranked):
        base = 0
        for state in _STATES:
            if counts[state]:
                axes.barh(row, counts[state], left=base, height=0.62, color=colours[state], edgecolor=ink.paper)
                base += counts[state]
        axes.text(base, row, f" {base:,}", va="center", color=ink.ink)
    axes.set_yticks(range(len(ranked)), [_short(name) for name, _ in ranked], color=ink.ink)
    axes.invert_yaxis()
    axes.set_xlabel("sessions")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlim(0, max(counts.total() for _, counts in ranked) * 1.1)
    axes.grid(visible=False, axis="y")


def _short(name: str) -> str:
    # matplotlib reads $...$ as formulas.
    name = name.replace("$", r"\$")
    return name if len(name) <= 28 else f"{name[:27]}…"
