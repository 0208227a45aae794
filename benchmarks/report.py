"""The result on paper: one small table for each group, and the same as JSON.

It refuses to round a figure into a promise: a bound is met or missed by the median, and where the spread
crosses it, that is said too.
"""

import json
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import TextIO

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.rounds import Row, Spread

WIDTH = 140  # of a table that is not printed on a terminal
DIGITS = 3


def print_machine(facts: Mapping[str, str], stream: TextIO) -> None:
    wide = max(map(len, facts))
    for name, value in facts.items():
        print(f"{name:>{wide}}: {value}", file=stream)
    print(file=stream, flush=True)


def print_rows(rows: Sequence[Row], stream: TextIO) -> None:
    """The tables of one benchmark."""
    console = Console(file=stream, width=None if stream.isatty() else WIDTH, highlight=False)
    for (benchmark, group), each in groupby(rows, lambda row: (row.benchmark, row.group)):
        lines = list(each)
        title = f"{benchmark}: {group} ({lines[0].rounds} rounds)"
        table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
        several = len({row.measure for row in lines}) > 1
        if several:
            table.add_column("measure")
        table.add_column("contestant")
        table.add_column("median", justify="right")
        table.add_column("quartiles", justify="right")
        table.add_column(f"ratio to {lines[0].reference}", justify="right")
        table.add_column("bound", justify="right")
        table.add_column("")
        for measure, some in groupby(lines, lambda row: (row.measure, row.unit)):
            heading = f"{measure[0]}, {measure[1]}"
            if not several:
                table.columns[1].header = measure[1]
            for row in some:
                cells = [row.contestant, _number(row.value.median), _quartiles(row.value), *_ratio(row)]
                table.add_row(*([heading, *cells] if several else cells))
                heading = ""
            table.add_section()
        console.print(table)
        console.print()


def write_json(
    path: Path,
    facts: Mapping[str, str],
    rows: Sequence[Row],
    skipped: Sequence[tuple[str, str, str]],
    seconds: float,
) -> None:
    content = {
        "machine": dict(facts),
        "seconds": round(seconds, 1),
        "rows": [row.as_dict() for row in rows],
        "skipped": [dict(zip(("benchmark", "contestant", "why"), each, strict=True)) for each in skipped],
    }
    path.write_text(json.dumps(content, indent=2) + "\n")


def _ratio(row: Row) -> list[str]:
    if row.contestant == row.reference:
        return ["1", "", ""]
    ratio = f"{_number(row.ratio.median)} ({_quartiles(row.ratio)})" if row.ratio else "-"
    return [ratio, f"<= {row.bound:g}" if row.bound is not None else "", row.verdict]


def _quartiles(spread: Spread) -> str:
    return f"{_number(spread.low)}..{_number(spread.high)}"


def _number(value: float) -> str:
    """Three digits are more than these figures are good for."""
    if value >= 100 or value == int(value):
        return f"{value:,.0f}"
    return f"{value:.{1 if value >= 10 else 2 if value >= 0.1 else 3}f}"
