"""Prometheus metrics of the daemon, and of pools as such: the library's exporter uses the same families.

A collector: figures are read when somebody scrapes, nothing is counted twice. The server has threads of its own; a
scrape asks the event loop for one moment's figures, which cost it microseconds, and does the rest by itself.
`cenote_pool_*` means the same for the library's pools and the daemon's, `cenote_proxy_*` is the daemon's alone.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from cenote.core.stats import Distribution, PoolStats
from cenote.errors import MissingDependency
from cenote.proxy.admin import views
from cenote.proxy.log import get_log

try:
    import prometheus_client
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
    from prometheus_client.registry import Collector
except ImportError as error:
    raise MissingDependency('metrics need prometheus-client: pip install "cenote[metrics]"') from error

log = get_log("cenote.proxy")

STATES = ("idle", "leased", "connecting", "checking", "resetting", "closing")
_SCRAPE_S = 5.0  # how long a scrape waits for the event loop

#: Labels of one pool, and its figures.
Labelled = tuple[Sequence[str], PoolStats]


def pool_families(pools: Sequence[Labelled], labels: Sequence[str]) -> Iterator[Metric]:
    """The metrics `cenote_pool_*`, one family after the other.

    :param labels: names of the labels that tell the pools apart
    """
    size = GaugeMetricFamily("cenote_pool_connections", "Connections by state.", labels=[*labels, "state"])
    for label, stats in pools:
        for state in STATES:
            size.add_metric([*label, state], getattr(stats, state))
    yield size
    for name, text, attribute in _GAUGES:
        gauge = GaugeMetricFamily(f"cenote_pool_{name}", text, labels=labels)
        for label, stats in pools:
            gauge.add_metric(label, getattr(stats, attribute))
        yield gauge
    for name, text, attribute in _COUNTERS:
        counter = CounterMetricFamily(f"cenote_pool_{name}", text, labels=labels)
        for label, stats in pools:
            counter.add_metric(label, getattr(stats, attribute))
        yield counter
    for name, text in _BY_REASON:
        yield by_word(
            f"cenote_pool_{name}", text, [*labels, "reason"], [(lb, getattr(stats, name)) for lb, stats in pools]
        )
    for name, text in _HISTOGRAMS:
        yield histogram(
            f"cenote_pool_{name}_seconds", text, labels, [(label, getattr(stats, name)) for label, stats in pools]
        )


# Name, text, attribute of PoolStats.
_GAUGES = (
    ("max_size", "The bound on connections.", "max_size"),
    ("waiting", "Callers in line.", "waiting"),
)
_COUNTERS = (
    ("acquired", "Leases granted.", "acquired"),
    ("conversions", "Connections made to carry a borrower's settings.", "conversions"),
    ("would_shed", "Callers CoDel would have refused.", "would_shed"),
    ("epoch", "Times everything was declared stale.", "epoch"),
    ("in_query_seconds", "Time of leases spent in queries.", "in_query_s"),
    ("idle_while_held_seconds", "Time of leases spent outside queries.", "idle_while_held_s"),
)
_BY_REASON = (
    ("refused", "Acquires refused."),
    ("opened", "Connections opened."),
    ("closed", "Connections closed."),
)
_HISTOGRAMS = (
    ("wait", "From acquire to grant."),
    ("hold", "From grant to release."),
    ("connect", "To open a connection."),
)


def by_word(
    name: str, text: str, labels: Sequence[str], counts: Iterable[tuple[Sequence[str], dict[str, int]]]
) -> Metric:
    """A counter whose last label is a word, such as a reason."""
    family = CounterMetricFamily(name, text, labels=labels)
    for label, numbers in counts:
        for word, number in sorted(numbers.items()):
            family.add_metric([*label, word], number)
    return family


def histogram(
    name: str, text: str, labels: Sequence[str], figures: Iterable[tuple[Sequence[str], Distribution]]
) -> Metric:
    """A histogram; Prometheus counts its buckets cumulatively."""
    family = HistogramMetricFamily(name, text, labels=labels)
    for label, distribution in figures:
        rows, seen = [], 0
        for bound, number in zip(distribution.bounds_s, distribution.buckets, strict=True):
            seen += number
            rows.append(("+Inf" if bound == float("inf") else repr(bound), float(seen)))
        family.add_metric(label, rows, distribution.sum_s)
    return family


# -- the daemon's -------------------------------------------------------------------------------------------

_POOL_LABELS = ("pool", "database", "user")
# Name, text, attribute of PoolFigures.
_PROXY_GAUGES = (
    ("pool_clients", "Logged-in clients.", "clients"),
    ("pinned", "Clients that keep their server connection now.", "pinned"),
    ("listening", "Clients for which one shared connection listens.", "listening"),
    ("oldest_wait_seconds", "How long the first client in line has waited.", "oldest_wait_s"),
)
_PROXY_COUNTERS = (
    ("transactions", "Transactions ended.", "transactions"),
    ("queries", "Requests answered.", "queries"),
    ("errors", "Requests answered with an error.", "errors"),
    ("audits", "Sessions that were asked about.", "audits"),
    ("incidents", "Sessions that were not what they were taken for.", "incidents"),
    ("recovered_plans", "Invalid cached plans kept from clients.", "recovered_plans"),
    ("notifications", "Passed to clients by the shared connection.", "notifications"),
    ("listener_gaps", "Times the shared connection was lost or given up.", "listener_gaps"),
    ("replays", "Requests sent once more, on another server connection.", "replays"),
)


class ProxyCollector(Collector):
    """All metrics of one daemon.

    :param look: gives the daemon's figures of one moment
    """

    def __init__(self, look: Callable[[], views.Moment]) -> None:
        self._look = look

    def describe(self) -> Iterable[Metric]:
        """Nothing: names must be known without asking the daemon at registration."""
        return []

    def collect(self) -> Iterator[Metric]:
        """One family after the other."""
        now = self._look()
        pools = [((pool.name, pool.database, pool.user), pool) for pool in now.pools]
        yield from pool_families([(label, pool.stats) for label, pool in pools], _POOL_LABELS)
        yield from self._of_pools(pools)
        yield from self._of_daemon(now)
        traffic = now.traffic()
        for way, direction in enumerate(("from", "to")):
            name, text = f"cenote_proxy_bytes_{direction}_clients", f"Bytes {direction} clients."
            family = CounterMetricFamily(name, text, labels=_POOL_LABELS)
            for label, pool in pools:
                family.add_metric(label, traffic[pool.name][way])
            yield family

    def _of_pools(self, pools: Sequence[tuple[Sequence[str], views.PoolFigures]]) -> Iterator[Metric]:
        for kind, rows in ((GaugeMetricFamily, _PROXY_GAUGES), (CounterMetricFamily, _PROXY_COUNTERS)):
            for name, text, attribute in rows:
                family = kind(f"cenote_proxy_{name}", text, labels=_POOL_LABELS)
                for label, pool in pools:
                    family.add_metric(label, getattr(pool, attribute))
                yield family
        pins = [(label, pool.pins) for label, pool in pools]
        yield by_word("cenote_proxy_pins", "Clients that came to keep theirs.", [*_POOL_LABELS, "reason"], pins)
        spent = [(label, pool.transaction) for label, pool in pools]
        yield histogram("cenote_proxy_transaction_seconds", "From lease to end.", _POOL_LABELS, spent)
        asked = [(label, pool.query) for label, pool in pools]
        yield histogram("cenote_proxy_query_seconds", "From request to end of answer.", _POOL_LABELS, asked)

    def _of_daemon(self, now: views.Moment) -> Iterator[Metric]:
        clients = GaugeMetricFamily("cenote_proxy_clients", "Client connections by state.", labels=["state"])
        for state, number in now.client_states().items():
            clients.add_metric([state], number)
        yield clients
        limit = GaugeMetricFamily("cenote_proxy_max_clients", "The bound on clients.")
        limit.add_metric([], now.max_clients)
        yield limit
        build = GaugeMetricFamily("cenote_proxy_build_info", "What runs here.", labels=["version"])
        build.add_metric([views.version()], 1)
        yield build
        yield histogram("cenote_proxy_login_seconds", "Log-ins of clients.", (), [((), now.login)])
        yield by_word(
            "cenote_proxy_login_failures", "Log-ins that failed.", ["reason"], [((), now.login_failures)]
        )
        yield by_word("cenote_proxy_cancels", "Cancel requests.", ["outcome"], [((), now.cancels)])


class MetricsServer:
    """Serves one daemon's metrics until it is called. `port` is where."""

    def __init__(self, server: Any) -> None:
        self.port: int = server.server_port
        self._server = server

    def __call__(self) -> None:
        """Stop. Takes up to half a second."""
        self._server.shutdown()
        self._server.server_close()


def start_metrics_server(daemon: Any, host: str, port: int) -> MetricsServer:
    """Serve the daemon's metrics on `http://host:port/metrics`, from threads. On the daemon's event loop.

    :param port: 0 takes a free one
    :return: stops it when called
    :raises OSError: the address is taken or not ours
    """
    loop = asyncio.get_running_loop()

    def look() -> views.Moment:
        told: concurrent.futures.Future[views.Moment] = concurrent.futures.Future()
        loop.call_soon_threadsafe(_look, daemon, told)
        return told.result(_SCRAPE_S)

    registry = prometheus_client.CollectorRegistry()
    registry.register(ProxyCollector(look))
    prometheus_client.ProcessCollector(registry=registry)
    try:
        server, _ = prometheus_client.start_http_server(port, host, registry)
    except OSError as error:
        number = error.errno or 0
        reason = os.strerror(number) if number > 0 else str(error)
        raise OSError(
            number, f"cenote: cannot serve metrics on {host}:{port}: {reason}; see metrics_host and metrics_port"
        ) from None
    running = MetricsServer(server)
    log.info("metrics_served", url=f"http://{host}:{running.port}/metrics")
    return running


def _look(daemon: Any, told: concurrent.futures.Future[views.Moment]) -> None:
    try:
        told.set_result(views.moment(daemon))
    except BaseException as error:
        told.set_exception(error)
