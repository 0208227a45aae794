"""A report as one HTML file that needs nothing else: headings, words, tables, pictures for light and dark.

Instruments say what is in it; here it becomes a page. No script, no font and no picture from elsewhere.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from cenote._version import __version__

_CSS = """
:root { color-scheme: light dark; --paper: #ffffff; --ink: #1f2933; --faint: #69757f; --grid: #e4e7eb; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #14181d; --ink: #e6eaee; --faint: #98a4af; --grid: #2b333b; }
  .light { display: none; }
}
@media (prefers-color-scheme: light) { .dark { display: none; } }
body { background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, sans-serif;
       max-width: 64rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: 0.2rem; }
h2 { font-size: 1.15rem; margin-top: 2rem; }
.below, footer { color: var(--faint); }
figure { margin: 1rem 0; overflow-x: auto; }
svg { max-width: 100%; height: auto; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: 0.25rem 0.9rem 0.25rem 0; border-bottom: 1px solid var(--grid); text-align: right;
         vertical-align: top; }
td:not(:first-child) { overflow-wrap: anywhere; }
td.words { min-width: 6rem; }
th:first-child, td:first-child, td.words, th.words { text-align: left; }
pre { overflow-x: auto; }
"""


@dataclass(frozen=True, slots=True)
class Words:
    """Paragraphs, under a heading where there is one."""

    text: Sequence[str]
    heading: str = ""


@dataclass(frozen=True, slots=True)
class Grid:
    """A table. `words`: the columns (by number) that are text, not figures; the first always is."""

    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    heading: str = ""
    words: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class Picture:
    """One drawing twice, as <svg> elements: for light and for dark paper."""

    light: str
    dark: str
    caption: str
    heading: str = ""


Part = Words | Grid | Picture


def write(path: Path, title: str, below: str, parts: Sequence[Part]) -> None:
    """Write the report.

    :param below: under the title: which server, when, where
    :raises OSError: the file cannot be written
    """
    path.write_text(page(title, below, parts), encoding="utf-8")


def page(title: str, below: str, parts: Sequence[Part]) -> str:
    """The whole page as text."""
    body = "\n".join(_part(number, part) for number, part in enumerate(parts))
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_CSS}</style>\n</head>\n<body>\n"
        f'<h1>{escape(title)}</h1>\n<p class="below">{escape(below)}</p>\n{body}\n'
        f"<footer>cenote {escape(__version__)}</footer>\n</body>\n</html>\n"
    )


def _part(number: int, part: Part) -> str:
    heading = f"<h2>{escape(part.heading)}</h2>\n" if part.heading else ""
    if isinstance(part, Words):
        return heading + "\n".join(f"<p>{escape(text)}</p>" for text in part.text)
    if isinstance(part, Grid):
        return heading + _grid(part)
    # Both drawings use the same ids inside; each needs its own, or one would refer into the other.
    light = _own_ids(part.light, f"l{number}-")
    dark = _own_ids(part.dark, f"d{number}-")
    return (
        f'{heading}<figure><div class="light">{light}</div><div class="dark">{dark}</div>'
        f"<figcaption>{escape(part.caption)}</figcaption></figure>"
    )


def _grid(part: Grid) -> str:
    def cell(tag: str, column: int, text: str) -> str:
        kind = ' class="words"' if column == 0 or column in part.words else ""
        return f"<{tag}{kind}>{escape(text)}</{tag}>"

    head = "".join(cell("th", column, text) for column, text in enumerate(part.headings))
    rows = "\n".join(
        f"<tr>{''.join(cell('td', column, text) for column, text in enumerate(row))}</tr>" for row in part.rows
    )
    return f'<div class="wide"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody>\n</table></div>'


def _own_ids(svg: str, prefix: str) -> str:
    """Colours begin with # too: only references are renamed."""
    named = svg.replace(' id="', f' id="{prefix}')
    return named.replace('href="#', f'href="#{prefix}').replace("url(#", f"url(#{prefix}")
