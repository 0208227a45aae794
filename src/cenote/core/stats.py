"""A pool's figures at one moment, under the names that every exporter uses."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from cenote.core.histogram import BOUNDS_S, Histogram
from cenote.core.machine import Machine


@dataclass(frozen=True, slots=True)
class Distribution:
    """Durations in seconds: how many, their sum, and counts at or below each bound (the last is infinite)."""

    count: int
    sum_s: float
    bounds_s: tuple[float, ...]
    buckets: tuple[int, ...]

    @classmethod
    def of(cls, histogram: Histogram, *, at_zero: int = 0) -> Distribution:
        """From a histogram and a number of durations of zero that it was spared."""
        buckets = list(histogram.buckets)
        buckets[0] += at_zero
        return cls(sum(buckets), histogram.sum_s, (*BOUNDS_S, float("inf")), tuple(buckets))

    def quantile(self, share: float) -> float:
        """An upper bound in seconds for what `share` (0 to 1) of all stayed below; 0 when there are none."""
        seen = 0
        for bound, number in zip(self.bounds_s, self.buckets, strict=True):
            seen += number
            if number and seen >= share * self.count:
                return bound
        return 0.0


@dataclass(frozen=True, slots=True)
class PoolStats:
    """Sizes by state now, counters since the pool was made, durations.

    size: connections that count against max_size: the sum of the six states
    in_query_s, idle_while_held_s: how leases that ended spent their time
    would_shed: callers CoDel would have refused (mode "shadow")
    epoch: how often everything older was declared stale
    conversions: connections made to carry a borrower's settings
    """

    name: str
    mode: str
    min_size: int
    max_size: int
    size: int
    idle: int
    leased: int
    connecting: int
    checking: int
    resetting: int
    closing: int
    waiting: int
    acquired: int
    refused: dict[str, int]
    opened: dict[str, int]
    closed: dict[str, int]
    would_shed: int
    epoch: int
    in_query_s: float
    idle_while_held_s: float
    wait: Distribution
    hold: Distribution
    connect: Distribution
    conversions: int = 0


def snapshot(name: str, machine: Machine, in_query_s: float, conversions: int = 0) -> PoolStats:
    """The figures of `machine`. Called with the lock held."""
    immediate = machine.acquired - machine.waits.count()
    hold = Distribution.of(machine.holds)
    return PoolStats(
        name=name,
        mode=machine.mode,
        min_size=machine.min_size,
        max_size=machine.max_size,
        size=machine.size,
        idle=machine.shelf.size(),
        leased=machine.leased.size,
        connecting=machine.connecting.size,
        checking=machine.checking.size,
        resetting=machine.resetting.size,
        closing=machine.closing.size,
        waiting=machine.waiting.size,
        acquired=machine.acquired,
        refused=dict(machine.refused_by),
        opened=dict(machine.opened_by),
        closed=dict(machine.closed_by),
        would_shed=machine.would_shed,
        epoch=machine.epoch,
        in_query_s=in_query_s,
        idle_while_held_s=max(0.0, hold.sum_s - in_query_s),
        wait=Distribution.of(machine.waits, at_zero=immediate),
        hold=hold,
        connect=Distribution.of(machine.dials),
        conversions=conversions,
    )


def as_dict(stats: PoolStats) -> dict[str, Any]:
    """For logs and JSON: the same names."""
    return asdict(stats)
