"""One SHOW of the console: its columns and where their values come from, declared once.

Names are the library's and the metrics' where they mean the same; a name that ends in `_s` is seconds. Tables only
read; nothing secret is in any of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from time import monotonic
from typing import Any

from cenote.proxy.admin.values import Column, Kind, Value

Row = Sequence[Value]


@dataclass(frozen=True, slots=True)
class Table:
    """One command SHOW. `rows` gives objects that the columns' `read` takes values from."""

    name: str
    text: str
    columns: tuple[Column, ...]
    rows: Callable[[Any, float], Iterable[Any]]

    def read(self, daemon: Any) -> Iterator[Row]:
        """All rows, each as it is when it is taken. On the event loop; a portal pays for what it takes."""
        reads = [column.read for column in self.columns if column.read is not None]
        for item in self.rows(daemon, monotonic()):
            now = monotonic()
            yield [read(item, now) for read in reads]


def by_reason(counts: dict[str, int]) -> str:
    """`reason=number` for each, in order."""
    return " ".join(f"{reason}={number}" for reason, number in sorted(counts.items()))


def named(name: str, kind: Kind, text: str) -> Column:
    """A column whose value is an attribute of that name."""
    return Column(name, kind, text, lambda item, _: getattr(item, name))
