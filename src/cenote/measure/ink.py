"""How every picture of an instrument looks, on light and on dark paper, and how it gets into a file.

It knows colours, sizes and file forms; what is drawn is the instruments' own. It needs matplotlib, draws without
a display, and leaves matplotlib's global settings alone.
"""

from collections.abc import Callable
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine


@dataclass(frozen=True, slots=True)
class Ink:
    """Colours that can be told apart on one kind of paper, by the colour-blind too.

    series: for lines and bars, in this order
    good, bad: for what is judged
    """

    paper: str
    ink: str
    faint: str
    grid: str
    series: tuple[str, ...]
    good: str
    bad: str


LIGHT = Ink(
    paper="#ffffff",
    ink="#1f2933",
    faint="#69757f",
    grid="#e4e7eb",
    series=("#0f7b8a", "#c2541b", "#6b4fa0", "#8a7a12", "#3b6fb5", "#a33b6b", "#5d6b36"),
    good="#1b7f4b",
    bad="#b3261e",
)
DARK = Ink(
    paper="#14181d",
    ink="#e6eaee",
    faint="#98a4af",
    grid="#2b333b",
    series=("#3fb8c8", "#f08a4b", "#a98be0", "#d6c24a", "#78aaf0", "#e57aa8", "#a3b86c"),
    good="#5cc98f",
    bad="#f2766d",
)

Draw = Callable[[Figure, Ink], None]
"""Draws an instrument's result into an empty figure."""


def save(draw: Draw, path: Path, *, size: tuple[float, float], ink: Ink = LIGHT) -> None:
    """Draw into `path`; its suffix (.png, .svg) says how. `size` in inches.

    :raises OSError: the file cannot be written
    """
    with mpl.rc_context(style(ink)):
        _figure(draw, size, ink).savefig(path)


def svg(draw: Draw, *, size: tuple[float, float], ink: Ink) -> str:
    """The drawing as one <svg> element, to stand in a page."""
    out = StringIO()
    with mpl.rc_context(style(ink)):
        _figure(draw, size, ink).savefig(out, format="svg")
    text = out.getvalue()
    return text[text.index("<svg") :]


def _figure(draw: Draw, size: tuple[float, float], ink: Ink) -> Figure:
    layout = ConstrainedLayoutEngine(w_pad=0.14, h_pad=0.14, hspace=0.04, wspace=0.04)
    figure = Figure(figsize=size, dpi=130, layout=layout)
    FigureCanvasAgg(figure)
    draw(figure, ink)
    return figure


def head(figure: Figure, ink: Ink, title: str, below: str) -> None:
    """The title above, and below all what was measured on what, in as many lines as that needs."""
    figure.suptitle(title, x=0.012, ha="left", fontsize=15, fontweight="bold")
    figure.supxlabel(below, x=0.012, ha="left", fontsize=8.5, color=ink.faint, wrap=True)


def style(ink: Ink) -> Any:
    """What matplotlib is to draw with."""
    return {
        "font.size": 10,
        "figure.facecolor": ink.paper,
        "savefig.facecolor": ink.paper,
        "axes.facecolor": ink.paper,
        "axes.edgecolor": ink.faint,
        "axes.labelcolor": ink.ink,
        "axes.titlecolor": ink.ink,
        "axes.titlesize": 11.5,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.titlepad": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": ink.grid,
        "xtick.color": ink.faint,
        "ytick.color": ink.faint,
        "text.color": ink.ink,
        "legend.frameon": False,
        "svg.fonttype": "path",
    }
