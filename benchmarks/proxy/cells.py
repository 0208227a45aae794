"""The cells: what is measured, what each is called, and what was promised for it.

A name says all: `simple/8`, `prepared/64/tls`, `connect/8`, `select/4`, `copy/1/tls`, `idle/5000`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

from benchmarks.rounds import Measure, Sample

Kind = Literal["pgbench", "bulk", "idle"]

MODES = ("simple", "extended", "prepared")
CLIENTS = (1, 8, 64, 512)
IDLE_CLIENTS = 5000
BUDGET_CLIENTS = (8, 64)

# The performance budget: ratios to PgBouncer, and KiB.
CPU_MEAN, CPU_WORST = 1.05, 1.15
BULK_TIME, BULK_CPU = 0.91, 1.0  # a throughput of at least 1.1
TAIL = 1.0
IDLE_KIB = {False: 4.0, True: 40.0}

MEASURES: Mapping[Kind, Sequence[Measure]] = {
    "pgbench": (
        Measure("throughput", "transactions/s"),
        Measure("CPU", "us per transaction", 1e6),
        Measure("of it user", "us per transaction", 1e6),
        Measure("busy", "% of a processor", 100),
        Measure("p50", "ms", 1e3),
        Measure("p99", "ms", 1e3),
        Measure("tail", "p99 / p50"),
    ),
    "bulk": (
        Measure("throughput", "MB/s"),
        Measure("time", "ms per 100 MB", 1e3),
        Measure("CPU", "ms per 100 MB", 1e3),
    ),
    "idle": (
        Measure("memory", "KiB per client"),
        Measure("empty", "MiB, without clients"),
        Measure("CPU", "us per log-in", 1e6),
    ),
}


@dataclass(frozen=True, slots=True)
class Cell:
    """One thing that is measured. `act`: how pgbench asks, `connect`, `select`, `copy` or `idle`."""

    act: str
    clients: int
    tls: bool = False

    @property
    def name(self) -> str:
        return f"{self.act}/{self.clients}{'/tls' if self.tls else ''}"

    @property
    def kind(self) -> Kind:
        if self.act in ("select", "copy"):
            return "bulk"
        return "idle" if self.act == "idle" else "pgbench"

    @property
    def in_budget(self) -> bool:
        """Whether its CPU is part of the promised geometric mean."""
        return self.act in MODES and self.clients in BUDGET_CLIENTS

    def measures(self, samples: Mapping[str, Sequence[Sample]]) -> list[Measure]:
        """Those that its samples have."""
        has = next(iter(samples.values()))[0]
        return [measure for measure in MEASURES[self.kind] if measure.name in has]

    def bounds(self, contestant: str) -> dict[tuple[str, str], float]:
        """What was promised for its ratios."""
        if self.kind == "bulk":
            return {(contestant, "time"): BULK_TIME, (contestant, "CPU"): BULK_CPU}
        found: dict[tuple[str, str], float] = {}
        if self.in_budget:
            found[contestant, "CPU"] = CPU_WORST
            if self.clients == 64:
                found[contestant, "tail"] = TAIL
        return found


def every_cell() -> list[Cell]:
    """All of them, in the order in which they are measured."""
    both = (False, True)
    return [
        *(Cell(mode, clients, tls) for tls in both for mode in MODES for clients in CLIENTS),
        *(Cell("connect", 8, tls) for tls in both),
        *(Cell(act, clients, tls) for act in ("select", "copy") for clients in (1, 4) for tls in both),
        *(Cell("idle", IDLE_CLIENTS, tls) for tls in both),
    ]


def chosen(patterns: Sequence[str]) -> list[Cell]:
    """The cells with these names, or that these patterns (`simple/*`, `*/tls`, `budget`) fit.

    A plain name may have any number of clients: `simple/100`.

    :raises ValueError: nothing fits one of them.
    """
    found: list[Cell] = []
    for pattern in patterns:
        fitting = [
            cell
            for cell in every_cell()
            if (cell.in_budget if pattern == "budget" else fnmatchcase(cell.name, pattern))
        ]
        fitting = fitting or _of_own_size(pattern)
        if not fitting:
            raise ValueError(f"no cell is called {pattern!r}")
        found += [cell for cell in fitting if cell not in found]
    return found


def _of_own_size(name: str) -> list[Cell]:
    act, _, rest = name.partition("/")
    clients, _, tls = rest.partition("/")
    known = act in {cell.act for cell in every_cell()}
    if not known or not clients.isdecimal() or int(clients) < 1 or tls not in ("", "tls"):
        return []
    return [Cell(act, int(clients), tls == "tls")]
