"""The one-file report: both drawings are whole in it, and nothing comes from elsewhere."""

import re

import pytest

pytest.importorskip("matplotlib")

from matplotlib.figure import Figure

from cenote.measure.ink import DARK, LIGHT, Ink, svg
from cenote.measure.page import Grid, Picture, Words, page

pytestmark = pytest.mark.interpreted


def draw(figure: Figure, ink: Ink) -> None:
    axes = figure.subplots()
    axes.barh(["may come"], [3], color=ink.series[1], hatch="//", edgecolor=ink.paper)
    axes.plot([1, 2], [0, 0], color=ink.series[0], marker="o")


def report() -> str:
    drawn = Picture(svg(draw, size=(4, 3), ink=LIGHT), svg(draw, size=(4, 3), ink=DARK), "bars & <hatches>")
    return page("A & B", "here", [Words(["x < y"]), Grid(["what", "n"], [["<b>", "1"]]), drawn])


def test_every_reference_of_a_drawing_leads_to_its_own_part_of_the_page() -> None:
    text = report()
    names = re.findall(r' id="([^"]+)"', text)
    assert len(names) == len(set(names)) > 0
    references = re.findall(r'(?:href="#|url\(#)([^")]+)', text)
    assert references
    assert set(references) <= set(names)


def test_colours_are_left_as_they_were_drawn() -> None:
    text = report()
    for ink in (LIGHT, DARK):
        assert f'fill="{ink.series[1]}"' in text or f"fill: {ink.series[1]}" in text
    assert not re.search(r'(?:fill|stroke)="#[ld]\d+-', text)


def test_words_are_words_and_nothing_is_fetched() -> None:
    text = report()
    assert "x &lt; y" in text
    assert "&lt;b&gt;" in text
    assert "bars &amp; &lt;hatches&gt;" in text
    assert not re.search(r'(?:src|href)="(?!#)', text)
