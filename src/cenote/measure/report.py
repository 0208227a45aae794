"""What stands between a pool and transaction mode: the console's tables, put into sentences.

Pure functions of rows as the console gives them; it connects nowhere and prints nothing. A figure that the daemon
does not have is left out: what transaction mode would have needed is known of a dry run only.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

Rows = Sequence[Mapping[str, Any]]

#: What `verdict` can be, and what it says.
READY, STANDS, UNKNOWN, IDLE = "ready", "stands", "unknown", "idle"
#: The consequences of texts, in the order of a report.
CONSEQUENCES = ("pinned", "refused", "carried", "asked", "cleared")
_PEAKS = (
    *(f"{name}_peak" for name in ("clients", "connections", "busy", "pinned", "listening", "needed")),
    "needed_p99",
)
_ROOM = 4  # one connection to spare for so many that were needed


@dataclass(frozen=True, slots=True)
class Line:
    """What one kind of text has had as a consequence. `reason` is "" where there is only one."""

    consequence: str
    reason: str
    statement: str
    times: int
    advice: str


@dataclass(frozen=True, slots=True)
class Peaks:
    """What a dry run saw: the most of each at one moment, over `seconds`.

    needed_p99: as many were enough for 99 % of the time in which any was needed
    """

    seconds: float
    clients: int
    connections: int
    busy: int
    pinned: int
    listening: int
    needed: int
    needed_p99: int


@dataclass(frozen=True, slots=True)
class Suggestion:
    """Options for transaction mode. `max_pinned` None: its default will do."""

    max_size: int
    max_pinned: int | None


@dataclass(frozen=True, slots=True)
class PoolReport:
    """One pool.

    observed: it is in a dry run, and `peaks` has what that saw
    connections: server connections now; pinned: clients that keep one now, or would
    unlisted: texts that the ledger had no room for
    """

    database: str
    user: str
    mode: str
    observed: bool
    clients: int
    connections: int
    max_size: int
    max_pinned: int | None
    pinned: int
    transactions: int
    conversions: int
    incidents: int
    unlisted: int
    peaks: Peaks | None
    lines: tuple[Line, ...]
    verdict: str = ""
    suggestion: Suggestion | None = None
    conclusion: str = ""

    @property
    def name(self) -> str:
        return f"{self.database}/{self.user}"

    def of(self, consequence: str) -> list[Line]:
        """Its lines of this consequence, the most frequent first."""
        return sorted((line for line in self.lines if line.consequence == consequence), key=lambda x: -x.times)


@dataclass(frozen=True, slots=True)
class Report:
    """All pools of one daemon."""

    where: str
    version: str
    uptime_s: float
    pools: tuple[PoolReport, ...]
    conclusion: str = field(default="")

    @property
    def stands_against(self) -> bool:
        """Something stands against transaction mode somewhere, or nobody can say."""
        verdicts = {pool.verdict for pool in self.pools}
        return READY not in verdicts or bool(verdicts & {STANDS, UNKNOWN})

    def as_dict(self) -> dict[str, Any]:
        """Every figure under its name, for JSON."""
        return {**asdict(self), "stands_against": self.stands_against}


def report(where: str, tables: Mapping[str, Rows], database: str | None = None) -> Report:
    """What the tables say.

    :param tables: rows by the console's names: VERSION, POOLS, STATS, CONFIG, LEDGER, PINS, OBSERVED
    :param database: only its pools; None: all
    """
    version = tables["VERSION"][0]
    pools = tuple(_pool(row, tables) for row in tables["POOLS"] if database is None or row["database"] == database)
    return Report(where, version["version"], version["uptime_s"], pools, _altogether(pools))


def _pool(row: Mapping[str, Any], tables: Mapping[str, Rows]) -> PoolReport:
    def mine(name: str) -> list[Mapping[str, Any]]:
        return [r for r in tables[name] if (r["database"], r["user"]) == (row["database"], row["user"])]

    (stats,) = mine("STATS")
    observed = mine("OBSERVED")
    name = f"pools.{row['database']}/{row['user']}.max_pinned"
    cap = next((r["value"] for r in tables["CONFIG"] if r["key"] == name), None)
    lines = [_line(r) for r in mine("LEDGER")]
    pool = PoolReport(
        database=row["database"],
        user=row["user"],
        mode=row["mode"],
        observed=bool(observed),
        clients=row["clients"],
        connections=row["size"],
        max_size=row["max_size"],
        max_pinned=None if cap is None else int(cap),
        pinned=len({pin["pid"] for pin in mine("PINS") if pin["reason"] != "session_mode"}),
        transactions=stats["transactions"],
        conversions=stats["conversions"],
        incidents=stats["incidents"],
        unlisted=sum(line.times for line in lines if line.consequence == "others"),
        peaks=_peaks(observed[0]) if observed else None,
        lines=tuple(line for line in lines if line.consequence in CONSEQUENCES),
    )
    return _judged(pool)


def _line(row: Mapping[str, Any]) -> Line:
    consequence, _, reason = str(row["what"]).partition(": ")
    return Line(consequence, reason, row["statement"], row["times"], row["advice"])


def _peaks(row: Mapping[str, Any]) -> Peaks:
    return Peaks(row["seconds"], *(row[name] for name in _PEAKS))


# -- judging --------------------------------------------------------------------------------------------------


def _judged(pool: PoolReport) -> PoolReport:
    values = asdict(pool)
    values.update(lines=pool.lines, peaks=pool.peaks)
    values["verdict"] = verdict = _verdict(pool)
    values["suggestion"] = _suggestion(pool) if verdict in (READY, STANDS) else None
    values["conclusion"] = _conclusion(pool, verdict, values["suggestion"])
    return PoolReport(**values)


def _verdict(pool: PoolReport) -> str:
    if not pool.transactions and not pool.lines:
        return IDLE
    if pool.mode == "session" and not pool.observed:
        return UNKNOWN
    against = pool.of("pinned") or pool.of("refused") or pool.pinned or pool.incidents or pool.unlisted
    return STANDS if against else READY


def _suggestion(pool: PoolReport) -> Suggestion | None:
    """What was enough for 99 % of the time, and a quarter to spare; no more than session mode had.

    A longer line for a moment is no harm.
    """
    if pool.peaks is None:
        return None
    kept = pool.peaks.pinned + (pool.peaks.listening > 0)  # the one that listens for all is kept, too
    pinned = _with_room(kept) if kept else None
    size = min(_with_room(pool.peaks.needed_p99), pool.peaks.connections)
    size = max(size, pinned + 1 if pinned else 1)
    return Suggestion(size, pinned)


def _with_room(number: int) -> int:
    return number + max(1, math.ceil(number / _ROOM))


def _conclusion(pool: PoolReport, verdict: str, suggestion: Suggestion | None) -> str:
    if verdict == IDLE:
        return "Nothing has been seen yet: no client has asked anything."
    if verdict == UNKNOWN:
        return (
            "Nobody has looked: in session mode texts are not read. Set observe = true (RELOAD is enough), let "
            "the clients work as usual for a while, and ask again."
        )
    sentences = [_ready(pool) if verdict == READY else _against(pool)]
    if pool.peaks is not None:
        sentences.append(_needed(pool.peaks))
    if suggestion is not None:
        options = f"max_size = {suggestion.max_size}"
        if suggestion.max_pinned is not None:
            options += f", max_pinned = {suggestion.max_pinned}"
        sentences.append(f"Suggested for it: {options}.")
    return " ".join(sentences)


def _ready(pool: PoolReport) -> str:
    if pool.observed and pool.peaks is not None:
        return f"Ready for transaction mode: nothing seen in {span(pool.peaks.seconds)} would keep a connection."
    if pool.mode == "session":
        return "Ready for transaction mode."
    return f"Nothing stands against {pool.mode} mode: no client has kept a connection."


def _against(pool: PoolReport) -> str:
    """The sentence that says what does, how much of it, and whom it holds."""
    parts = []
    pins = pool.of("pinned")
    if pins or pool.pinned:
        kinds = list(dict.fromkeys(line.reason for line in pins))
        would = "would keep" if pool.observed else "keep" if len(pins) != 1 else "keeps"
        what = f"{counted(len(pins), 'kind')} of statement {would}"
        most = f"up to {pool.peaks.pinned}" if pool.peaks is not None else str(pool.pinned)
        now = f" ({pool.pinned} now)" if pool.peaks is not None else " now"
        parts.append(f"{what} {most} of {counted(_clients(pool), 'client')} pinned{now}: {', '.join(kinds)}.")
    refused = pool.of("refused")
    if refused:
        verb = "would be" if pool.observed else "were"
        parts.append(f"{counted(len(refused), 'kind')} of statement {verb} refused (unsafe = refuse).")
    if pool.incidents:
        parts.append(f"{counted(pool.incidents, 'session')} leaked state: the log says which (state_leaked).")
    if pool.unlisted:
        parts.append(f"{counted(pool.unlisted, 'text')} more found no room in the ledger.")
    return " ".join(parts)


def _clients(pool: PoolReport) -> int:
    return pool.peaks.clients if pool.peaks is not None else pool.clients


def _needed(peaks: Peaks) -> str:
    if peaks.needed_p99 >= peaks.connections:
        return (
            "It would save nothing at this load: it would have needed all that session mode had, "
            f"{counted(peaks.connections, 'server connection')}."
        )
    usual = f", and {peaks.needed_p99} for 99 % of the time" if peaks.needed_p99 < peaks.needed else ""
    return (
        f"Transaction mode would have needed at most {counted(peaks.needed, 'server connection')} instead of "
        f"{peaks.connections}{usual}."
    )


def _altogether(pools: Sequence[PoolReport]) -> str:
    if not pools:
        return "There is no pool yet: nobody has connected."
    by_verdict = {word: [pool.name for pool in pools if pool.verdict == word] for word in (STANDS, UNKNOWN, READY)}
    if by_verdict[STANDS]:
        return f"Something stands against transaction mode in {_and(by_verdict[STANDS])}."
    if by_verdict[UNKNOWN]:
        return f"Nobody has looked at {_and(by_verdict[UNKNOWN])}: observe = true begins a dry run."
    if by_verdict[READY]:
        return f"Nothing stands against transaction mode in {_and(by_verdict[READY])}."
    return "Nothing has been seen yet in any pool."


# -- words ----------------------------------------------------------------------------------------------------


def _and(names: Iterable[str]) -> str:
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last


def counted(number: int, noun: str) -> str:
    """`1 client`, `2 clients`."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def span(seconds: float) -> str:
    """A time for a reader, in the unit that fits."""
    for size, unit in ((86_400.0, "days"), (3_600.0, "h"), (60.0, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"
