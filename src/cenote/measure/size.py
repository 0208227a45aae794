"""How many connections a server is served best with: throughput and latency, measured at growing numbers of them.

Levels of connections are measured in several short rounds, up and down in turn, so that a drift of the machine
shows as spread and not as a slope. The climb ends where more connections clearly give nothing more; the whole ends
when the answer is certain, or the time is over. Queries are the user's own, or a harmless look-up in the catalog.
"""

import os
import secrets
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from cenote.config import Option
from cenote.errors import ConfigError, TargetUnusable
from cenote.measure.curve import Fit, fit
from cenote.measure.mix import Source, parse_mix
from cenote.measure.pressure import Pressure, Watch, cores, watch
from cenote.measure.rounds import PROTOCOLS, Callers, Plan, Round, callers, latency_s
from cenote.measure.statements import Statement, statements
from cenote.measure.target import CONNECT_TIMEOUT_S, Target

DEFAULT = Source(
    "the default",
    "\\set n random(1, 28)\n"
    "SELECT attname, atttypid FROM pg_catalog.pg_attribute WHERE attrelid = 1259 AND attnum = :n;",
)
"""A look-up by key of one row of the catalog: any role may, nothing is left behind. It stays in memory."""

_MOST_BY_ITSELF = 64
_LEAST_LEVELS = 4
_ROUNDS = 4  # how many of each level have to fit into the time
_CERTAIN_AFTER = 3
_TRIAL_S = 0.3
_SETTLE = 0.2  # of a round's time: not counted, until every caller is in its stride
_LEAST_ROUND_S, _MOST_ROUND_S = 0.1, 2.0
_ENDS_S = 0.5  # of the time, for opening connections and closing them
_FLAT_FACTOR = 4  # no further than this beyond the smallest level that is nearly as good as the best
_FLAT_LEVELS = 3


def _option(default: Any, text: str, **known: Any) -> Any:
    return field(default=default, metadata={"option": Option(text, **known)})


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What to measure.

    :raises ConfigError: from `check`, naming every problem
    """

    most: int | None = _option(
        None, "the largest number of connections", low=4, high=2000, none_means="64, or as many as are free"
    )
    seconds: float = _option(30.0, "the longest the measurement may take", unit="seconds", low=2, high=3600)
    protocol: str = _option("simple", "how statements are sent, as in pgbench", choices=PROTOCOLS)
    sources: tuple[Source, ...] = (DEFAULT,)
    definitions: dict[str, int | float] = field(default_factory=dict)

    def check(self) -> None:
        problems = []
        for f in fields(self):
            option = f.metadata.get("option")
            kind = {"most": "int", "seconds": "float", "protocol": "str"}.get(f.name, "")
            problem = option.problem(f.name, getattr(self, f.name), kind) if option else None
            if problem:
                problems.append(problem)
        try:
            parse_mix(self.sources, tuple(self.definitions))
        except ConfigError as error:
            problems += error.problems
        if problems:
            raise ConfigError(problems)


@dataclass(frozen=True, slots=True)
class Level:
    """One number of connections, all its rounds together.

    rates: transactions per second of each round
    p50_s, p95_s, p99_s: latency of a transaction, of all rounds, to 1 %
    waits: share (0 to 1) of the connections that did what, on average; "running", "idle", "Lock", "LWLock" ...
    callers_cpu: of the measuring process, in CPUs
    """

    connections: int
    rates: tuple[float, ...]
    transactions: int
    failed: dict[str, int]
    p50_s: float | None
    p95_s: float | None
    p99_s: float | None
    waits: dict[str, float]
    switches_per_s: float | None
    user_cpu: float | None
    system_cpu: float | None
    callers_cpu: float

    @property
    def rate(self) -> float:
        """The median of the rounds."""
        ordered = sorted(self.rates)
        middle = len(ordered) // 2
        return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2

    @property
    def locked(self) -> float:
        """Share of the connections that waited for a lock, heavyweight or not."""
        return self.waits.get("Lock", 0.0) + self.waits.get("LWLock", 0.0)


@dataclass(frozen=True, slots=True)
class Others:
    """Sessions of one application that were there before us."""

    application: str
    sessions: int


@dataclass(frozen=True, slots=True)
class Result:
    """What was measured.

    ended: "certain" or "time"
    cores: of this machine, if the server runs here; None: not known
    """

    setup: Setup
    target: Target
    levels: tuple[Level, ...]
    fit: Fit
    ended: str
    seconds: float
    round_s: float
    cores: int | None
    others: tuple[Others, ...]
    statements: tuple[Statement, ...] | None


@dataclass(frozen=True, slots=True)
class Moment:
    """Progress: after each round.

    seconds_left: until the time is over
    rates: level -> median throughput so far
    """

    connections: int
    rates: dict[int, float]
    rounds: int
    seconds_left: float


def steps(most: int) -> list[int]:
    """The levels up to `most`, itself included: 1, 2, 3, 4, 6, 8, 12, 16, 24 ..."""
    levels = [1, 2, 3]
    power = 4
    while power <= most:
        levels += [power, power * 3 // 2]
        power *= 2
    return [n for n in levels if n < most] + [most]


def run(target: Target, setup: Setup, tell: Callable[[Moment], None] = lambda _: None) -> Result:
    """Measure `target`.

    :param tell: called after each round
    :raises ConfigError: of `setup`, or the time is too short for so slow a transaction
    :raises TargetUnusable: too few free connections, the mix fails, the server went away
    """
    setup.check()
    most = setup.most or min(_MOST_BY_ITSELF, max(_LEAST_LEVELS, target.free - 1))
    target.need(most + 1, f"measuring up to {most} connections")
    began = time.monotonic()
    application = f"cenote size {os.getpid()}-{secrets.token_hex(3)}"
    plan = Plan(
        dsn=target.dsn,
        sources=setup.sources,
        definitions=setup.definitions,
        protocol=setup.protocol,
        application=application,
        deadline_s=began + CONNECT_TIMEOUT_S + setup.seconds + _ENDS_S,
    )
    with watch(target, application) as watcher:
        others, found = _others(watcher), watcher.ask(statements)
        with callers(plan) as loop:
            climb = _Climb(loop, watcher, setup, steps(most), tell)
            ended = climb.run()
    levels = tuple(climb.levels())
    return Result(
        setup=setup,
        target=target,
        levels=levels,
        fit=fit({level.connections: level.rates for level in levels}),
        ended=ended,
        seconds=time.monotonic() - began,
        round_s=climb.round_s,
        cores=cores() if target.server_pid is not None else None,
        others=others,
        statements=found,
    )


class _Climb:
    """The rounds of one measurement, and when enough were had."""

    def __init__(
        self,
        loop: Callers,
        watcher: Watch,
        setup: Setup,
        levels: Sequence[int],
        tell: Callable[[Moment], None],
    ) -> None:
        self.round_s = 0.0
        self._loop = loop
        self._watch = watcher
        self._setup = setup
        self._levels = list(levels)
        self._ends = time.monotonic() + CONNECT_TIMEOUT_S
        self._tell = tell
        self._rounds: dict[int, list[tuple[Round, Pressure]]] = defaultdict(list)

    def run(self) -> str:
        """All rounds; why it ended."""
        self._pace()
        for n in list(self._levels):
            if not self._fits(n):
                self._levels = sorted(self._rounds)
                break
            self._round(n)
            if self._flat(n):
                self._levels = [level for level in self._levels if level <= n]
                break
        passes = 1
        while True:
            for n in reversed(self._levels) if passes % 2 else self._levels:
                if not self._fits(n):
                    self._must_suffice()
                    return "time"
                self._round(n)
            passes += 1
            if passes >= _CERTAIN_AFTER and self._certain():
                return "certain"

    def levels(self) -> Iterator[Level]:
        """What was measured."""
        for n in sorted(self._rounds):
            yield _level(n, self._rounds[n])

    def _pace(self) -> None:
        """How long a round is, from how long a transaction takes alone. It also warms the server's caches, and
        the time counts from its end."""
        trial = self._measure(1, _TRIAL_S, 0.0)
        self._ends = time.monotonic() + self._setup.seconds - _ENDS_S
        latency = trial.elapsed_s / max(1, trial.transactions)
        left = self._ends - time.monotonic()
        fair = left / (len(self._levels) * _ROUNDS) / (1 + _SETTLE)
        self.round_s = min(_MOST_ROUND_S, max(_LEAST_ROUND_S, fair))
        if latency * 4 > fair:
            enough = 5 * latency * len(self._levels) * _ROUNDS * (1 + _SETTLE) + 3
            raise ConfigError(
                [
                    f"seconds = {self._setup.seconds:g}: a transaction takes {latency:.3g} s alone, which is too "
                    f"slow to be measured at {len(self._levels)} levels in that time: use {enough:.0f}, or a "
                    "smaller --max"
                ]
            )

    def _fits(self, n: int) -> bool:
        done = self._rounds.get(n) or (self._rounds.get(max(self._rounds)) if self._rounds else None)
        lasted = done[-1][0].elapsed_s if done else self.round_s * (1 + _SETTLE)
        return time.monotonic() + 1.2 * lasted < self._ends

    def _round(self, n: int) -> None:
        done = self._measure(n, self.round_s, self.round_s * _SETTLE)
        pressure = self._watch.end()
        if done.transactions:
            self._rounds[n].append((done, pressure))
        elif done.failed:
            raise TargetUnusable(f"no transaction succeeds with {n} connections: {next(iter(done.failed))}")
        self._tell(
            Moment(
                connections=n,
                rates={level: _median(rounds) for level, rounds in self._rounds.items()},
                rounds=sum(map(len, self._rounds.values())),
                seconds_left=max(0.0, self._ends - time.monotonic()),
            )
        )

    def _measure(self, n: int, seconds: float, settle_s: float) -> Round:
        self._watch.begin()
        left = max(0.0, self._ends - time.monotonic())
        return self._loop.run(n, seconds, settle_s, self._watch.look, longest_s=left)

    def _flat(self, n: int) -> bool:
        """Whether the climb has seen enough: far beyond where the throughput was nearly at its best."""
        rates = {level: _median(rounds) for level, rounds in self._rounds.items()}
        best = max(rates.values(), default=0.0)
        near = min((level for level, rate in rates.items() if rate >= 0.95 * best), default=n)
        beyond = sum(level > near for level in rates)
        return n >= _FLAT_FACTOR * near and beyond >= _FLAT_LEVELS and len(rates) > _LEAST_LEVELS

    def _certain(self) -> bool:
        """Whether the knee is known to one step of the levels, with levels beyond it."""
        found = fit({n: [done.transactions / done.seconds for done, _ in r] for n, r in self._rounds.items()})
        at = [self._step_of(n) for n in (found.knee_low, found.knee, found.knee_high)]
        return found.saturated and at[2] - at[1] <= 1 and at[1] - at[0] <= 1

    def _step_of(self, n: int) -> int:
        """The last level that is not above `n`."""
        return max(i for i, level in enumerate(self._levels) if level <= n)

    def _must_suffice(self) -> None:
        if len(self._rounds) < 3:
            raise TargetUnusable(
                f"only {len(self._rounds)} levels could be measured in {self._setup.seconds:g} s: "
                "give it more time (--seconds)"
            )


def _median(rounds: Sequence[tuple[Round, Pressure]]) -> float:
    ordered = sorted(done.transactions / done.seconds for done, _ in rounds)
    return ordered[len(ordered) // 2] if ordered else 0.0


def _level(n: int, rounds: Sequence[tuple[Round, Pressure]]) -> Level:
    latencies: Counter[int] = Counter()
    failed: Counter[str] = Counter()
    waits: Counter[str] = Counter()
    samples = 0
    for done, pressure in rounds:
        latencies.update(done.latencies)
        failed.update(done.failed)
        waits.update(pressure.waits)
        samples += pressure.samples
    # Connections that this level leaves alone are idle in every sample; only its own are meant.
    busy = {what: count for what, count in waits.items() if what != "idle"}
    shares = {what: min(1.0, count / (n * samples)) for what, count in busy.items()} if samples else {}
    if samples:
        shares["idle"] = max(0.0, 1.0 - sum(shares.values()))
    return Level(
        connections=n,
        rates=tuple(done.transactions / done.seconds for done, _ in rounds),
        transactions=sum(done.transactions for done, _ in rounds),
        failed=dict(failed),
        p50_s=latency_s(latencies, 0.50),
        p95_s=latency_s(latencies, 0.95),
        p99_s=latency_s(latencies, 0.99),
        waits=shares,
        switches_per_s=_mean([pressure.switches_per_s for _, pressure in rounds]),
        user_cpu=_mean([pressure.user_cpu for _, pressure in rounds]),
        system_cpu=_mean([pressure.system_cpu for _, pressure in rounds]),
        callers_cpu=sum(done.cpu_s for done, _ in rounds) / sum(done.elapsed_s for done, _ in rounds),
    )


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _others(watcher: Watch) -> tuple[Others, ...]:
    """Who else is connected, by application; poolers usually say their name."""
    sql = (
        "SELECT coalesce(nullif(application_name, ''), '(no name)'), count(*)::int FROM pg_stat_activity "
        "WHERE backend_type = 'client backend' AND pid <> pg_backend_pid() GROUP BY 1 ORDER BY 2 DESC, 1 LIMIT 10"
    )
    rows = watcher.ask(lambda conn: conn.execute(sql).fetchall())
    return tuple(Others(name, sessions) for name, sessions in rows)
