"""Prometheus metrics of in-process pools, under the names that the daemon uses too.

A collector: figures are read when somebody scrapes, nothing is counted twice. Needs `prometheus-client`
(`pip install "cenote[metrics]"`). Opens no port; that is the application's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol

from cenote.core.stats import PoolStats
from cenote.errors import MissingDependency

try:
    from prometheus_client.core import Metric
    from prometheus_client.registry import Collector
except ImportError as error:
    raise MissingDependency('metrics need prometheus-client: pip install "cenote[metrics]"') from error

from cenote.proxy.metrics import STATES, pool_families

__all__ = ["STATES", "HasStats", "PoolCollector"]


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
        everything = [pool.stats() for pool in self._pools]
        yield from pool_families([((stats.name,), stats) for stats in everything], ("pool",))
