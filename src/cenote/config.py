"""The pool's options, each declared once: name, type, unit, default, range, whether it may change while
the pool runs, and its text. Constructors, docs, samples and checks are made from this table. The daemon's
options build on it. Nothing is repaired silently: a wrong value is a problem, and all problems are
reported together.
"""

from __future__ import annotations  # types stay text: the table reads them

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from cenote.errors import ConfigError

CODEL_MODES = ("off", "shadow", "on")
RESET_MODES = ("auto", "always", "never")


@dataclass(frozen=True, slots=True)
class Option:
    """What is known of one option besides its name, type and default."""

    text: str
    unit: str = ""
    low: float = -math.inf
    high: float = math.inf
    above: bool = False  # True: `low` itself is not allowed
    choices: tuple[str, ...] = ()
    reloadable: bool = False
    none_means: str = ""

    def problem(self, name: str, value: object, kind: str) -> str | None:
        """What is wrong with `value`, or None."""
        if value is None and self.none_means:
            return None
        unit = f" {self.unit}" if self.unit else ""
        if self.choices:
            if value in self.choices:
                return None
            near = difflib.get_close_matches(str(value), self.choices, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            return f"{name} = {value!r}: use one of {', '.join(map(repr, self.choices))}{hint}"
        if kind.startswith("str"):
            return (
                None
                if isinstance(value, str) and value.strip()
                else f"{name} = {value!r}: must be a non-empty text"
            )
        whole = kind.startswith("int")
        right = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
        if not right or (isinstance(value, float) and math.isnan(value)):
            return (
                f"{name} = {value!r}: must be {'a whole number' if whole else 'a number'}{unit and ' of' + unit}"
            )
        assert isinstance(value, (int, float))
        if value < self.low or value > self.high or (self.above and value == self.low):
            return f"{name} = {value!r}: allowed is {self.range()}{unit}"
        return None

    def range(self) -> str:
        """The allowed range in words."""
        low = f"more than {self.low:,.15g}" if self.above else f"{self.low:,.15g}"
        if math.isinf(self.high):
            return low if self.above else f"{low} or more"
        return f"{low} to {self.high:,.15g}"


def _option(default: Any, text: str, **known: Any) -> Any:
    return field(default=default, metadata={"option": Option(text, **known)})


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolOptions:
    """All options of an in-process pool. Times are seconds."""

    min_size: int = _option(
        2, "connections kept open even when nobody uses them", low=0, high=100_000, reloadable=True
    )
    max_size: int = _option(
        10,
        "the bound: never more connections than this, dying ones included",
        low=1,
        high=100_000,
        reloadable=True,
    )
    acquire_timeout: float = _option(30.0, "how long an acquire may wait; 0 does not wait", unit="seconds", low=0)
    max_waiting: int = _option(
        10_000, "callers that may stand in line; one more is refused at once", low=0, high=10_000_000
    )
    idle_timeout: float = _option(
        300.0, "an unused connection above min_size is closed after this", unit="seconds", low=0, above=True
    )
    max_lifetime: float = _option(
        1800.0,
        "a connection older than this is replaced (each has its own jitter of up to 10 % less)",
        unit="seconds",
        low=0,
        above=True,
    )
    check_after: float = _option(
        30.0,
        "a connection idle for longer is pinged off the caller's path; 0 pings at every borrow, on the path",
        unit="seconds",
        low=0,
    )
    peek_after: float = _option(
        0.5,
        "a connection unused for longer has its socket polled at borrow (no round trip)",
        unit="seconds",
        low=0,
    )
    connect_timeout: float = _option(
        10.0, "how long one attempt to open a connection may take", unit="seconds", low=0, above=True
    )
    codel: str = _option(
        "shadow",
        "refuse callers when the queue has stood for too long; shadow only counts whom it would refuse",
        choices=CODEL_MODES,
    )
    reset: str = _option(
        "auto",
        "after a lease: auto undoes only what was touched, always all, never nothing (behind a pooler)",
        choices=RESET_MODES,
    )
    leak_after: float | None = _option(
        None,
        "warn while a lease is held for longer than this",
        unit="seconds",
        low=0,
        above=True,
        none_means="no warning",
    )
    init_query: str | None = _option(
        None,
        "SQL run on each new connection; what it sets is the state that a reset returns to",
        none_means="nothing is run",
    )

    def replaced(self, changes: Mapping[str, Any], *, pool: str = "") -> PoolOptions:
        """These options with `changes`, checked as a whole.

        :raises ConfigError: naming every problem, unknown names included.
        """
        known = {f.name: f for f in fields(self)}
        problems = []
        for name in changes:
            if name not in known:
                near = difflib.get_close_matches(name, known, 1)
                problems.append(f"unknown option {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
        values = {name: changes.get(name, getattr(self, name)) for name in known}
        for name, value in values.items():
            problem = known[name].metadata["option"].problem(name, value, str(known[name].type))
            if problem:
                problems.append(problem)
        sizes = values["min_size"], values["max_size"]
        if all(isinstance(size, int) for size in sizes) and sizes[0] > sizes[1]:
            problems.append(
                f"min_size = {sizes[0]} is above max_size = {sizes[1]}: lower min_size or raise max_size"
            )
        if problems:
            raise ConfigError(problems, pool=pool)
        return PoolOptions(**values)


def pool_options(given: Mapping[str, Any], *, pool: str = "") -> PoolOptions:
    """The options of a pool from keyword arguments.

    `min_size` has the default 2, or `max_size` where only that is given and smaller.

    :raises ConfigError: naming every problem at once.
    """
    defaults = PoolOptions()
    bound = given.get("max_size")
    if "min_size" not in given and isinstance(bound, int) and 0 < bound < defaults.min_size:
        given = {**given, "min_size": int(bound)}
    return defaults.replaced(given, pool=pool)


def option_table() -> list[tuple[str, str, str, Option]]:
    """`(name, type, default, option)` of every option, for docs and help."""
    rows = []
    for f in fields(PoolOptions):
        default = "none" if f.default is None else str(f.default)
        rows.append((f.name, str(f.type).replace(" | None", ""), default, f.metadata["option"]))
    return rows
