"""Prometheus metrics of in-process pools, under the names that the daemon uses too.

A collector: figures are read when somebody scrapes, nothing is counted twice. Needs `prometheus-client`
(`pip install "cenote[metrics]"`). Opens no port; that is the application's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol

from cenote.errors import MissingDependency
from cenote.pool.stats import Distribution, PoolStats

try:
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
    from prometheus_client.registry import Collector
except ImportError as error:
    raise MissingDependency('metrics need prometheus-client: pip install "cenote[metrics]"') from error

STATES = ("idle", "leased", "connecting", "checking", "resetting", "closing")


class HasStats(Protocol):
    """A `Pool` or an `AsyncPool`."""

    def stats(self) -> PoolStats: ...


class PoolCollector(Collector):
    """All metrics of some pools, each with the label `pool`.

    Register it once: `prometheus_client.REGISTRY.register(PoolCollector([pool, ...]))`.

    :param pools: the pools; a list may grow later, a callable is not needed
    """

    def __init__(self, pools: Iterable[HasStats]) -> None:
        self._pools = pools

    def describe(self) -> Iterable[Metric]:
        """Nothing: names must be known without asking a pool at registration."""
        return []

    def collect(self) -> Iterator[Metric]:
        """One family after the other, over all pools."""
        all_stats = [pool.stats() for pool in self._pools]
        size = GaugeMetricFamily("cenote_pool_connections", "Connections by state.", labels=["pool", "state"])
        limit = GaugeMetricFamily("cenote_pool_max_size", "The bound on connections.", labels=["pool"])
        waiting = GaugeMetricFamily("cenote_pool_waiting", "Callers in line.", labels=["pool"])
        acquired = CounterMetricFamily("cenote_pool_acquired", "Leases granted.", labels=["pool"])
        refused = CounterMetricFamily("cenote_pool_refused", "Acquires refused.", labels=["pool", "reason"])
        opened = CounterMetricFamily("cenote_pool_opened", "Connections opened.", labels=["pool", "reason"])
        closed = CounterMetricFamily("cenote_pool_closed", "Connections closed.", labels=["pool", "reason"])
        shed = CounterMetricFamily("cenote_pool_would_shed", "Callers CoDel would have refused.", labels=["pool"])
        stale = CounterMetricFamily("cenote_pool_epoch", "Times everything was declared stale.", labels=["pool"])
        in_query = CounterMetricFamily(
            "cenote_pool_in_query_seconds", "Time of leases spent in queries.", labels=["pool"]
        )
        idle_held = CounterMetricFamily(
            "cenote_pool_idle_while_held_seconds", "Time of leases spent outside queries.", labels=["pool"]
        )
        wait = HistogramMetricFamily("cenote_pool_wait_seconds", "From acquire to grant.", labels=["pool"])
        hold = HistogramMetricFamily("cenote_pool_hold_seconds", "From grant to release.", labels=["pool"])
        connect = HistogramMetricFamily("cenote_pool_connect_seconds", "To open a connection.", labels=["pool"])
        for stats in all_stats:
            name = stats.name
            for state in STATES:
                size.add_metric([name, state], getattr(stats, state))
            limit.add_metric([name], stats.max_size)
            waiting.add_metric([name], stats.waiting)
            acquired.add_metric([name], stats.acquired)
            for family, counts in ((refused, stats.refused), (opened, stats.opened), (closed, stats.closed)):
                for reason, number in sorted(counts.items()):
                    family.add_metric([name, reason], number)
            shed.add_metric([name], stats.would_shed)
            stale.add_metric([name], stats.epoch)
            in_query.add_metric([name], stats.in_query_s)
            idle_held.add_metric([name], stats.idle_while_held_s)
            for histogram, figures in ((wait, stats.wait), (hold, stats.hold), (connect, stats.connect)):
                histogram.add_metric([name], _buckets(figures), figures.sum_s)
        yield from (size, limit, waiting, acquired, refused, opened, closed, shed, stale)
        yield from (in_query, idle_held, wait, hold, connect)


def _buckets(figures: Distribution) -> list[tuple[str, float]]:
    """Prometheus counts cumulatively."""
    rows, seen = [], 0
    for bound, number in zip(figures.bounds_s, figures.buckets, strict=True):
        seen += number
        rows.append(("+Inf" if bound == float("inf") else repr(bound), float(seen)))
    return rows
