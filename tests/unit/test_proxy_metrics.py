"""What Prometheus reads of the daemon, under the names of docs/metrics.md."""

from __future__ import annotations

import asyncio
import re
import socket
import urllib.request
from collections.abc import Callable
from pathlib import Path

import prometheus_client
import pytest
from prometheus_client.parser import text_string_to_metric_families
from proxy_fakes import FakeDaemon

from cenote.proxy.admin.views import CLIENT_STATES, moment
from cenote.proxy.metrics import ProxyCollector, start_metrics_server
from cenote.watch.metrics import PoolCollector

DOCS = Path(__file__).parents[2] / "docs" / "metrics.md"
LABELS = {"pool": "orders/app", "database": "orders", "user": "app"}
Samples = dict[str, dict[frozenset[tuple[str, str]], float]]


def busy(now: float = 1000.0) -> FakeDaemon:
    """A daemon where a little of everything has happened."""
    daemon = FakeDaemon(now)
    daemon.open_server()
    worker = daemon.client(bytes_in=10, bytes_out=1000)
    daemon.client()
    daemon.lend(worker)
    pool = daemon.pool
    pool.bytes_from_clients, pool.bytes_to_clients = 5, 500
    pool.transactions, pool.queries, pool.errors, pool.replays, pool.recovered_plans = 7, 9, 2, 1, 3
    pool.pins, pool.pinned = {"settings": 2, "listen": 1}, 1
    pool.query_s.observe(0.25)
    pool.transaction_s.observe(0.5)
    daemon.logins.observe(0.001)
    daemon.login_failures["wrong_password"] = 4
    daemon.cancels["delivered"] = 6
    return daemon


def parsed(text: str) -> Samples:
    samples: Samples = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            samples.setdefault(sample.name, {})[frozenset(sample.labels.items())] = sample.value
    return samples


def scraped(daemon: FakeDaemon) -> Samples:
    registry = prometheus_client.CollectorRegistry()
    registry.register(ProxyCollector(lambda: moment(daemon)))
    return parsed(prometheus_client.generate_latest(registry).decode())


def of_pool(**more: str) -> frozenset[tuple[str, str]]:
    return frozenset({**LABELS, **more}.items())


def test_a_pool_of_the_daemon_has_the_library_s_metrics_with_database_and_user() -> None:
    samples = scraped(busy())
    assert samples["cenote_pool_connections"][of_pool(state="leased")] == 1
    assert samples["cenote_pool_connections"][of_pool(state="idle")] == 0
    assert samples["cenote_pool_max_size"][of_pool()] == 3
    assert samples["cenote_pool_acquired_total"][of_pool()] == 1
    assert samples["cenote_pool_conversions_total"][of_pool()] == 5
    assert samples["cenote_pool_opened_total"][of_pool(reason="minimum")] == 1
    assert samples["cenote_pool_wait_seconds_count"][of_pool()] == 1
    assert samples["cenote_pool_connect_seconds_sum"][of_pool()] == pytest.approx(0.01)
    assert samples["cenote_pool_in_query_seconds_total"][of_pool()] == 0.25


def test_the_library_and_the_daemon_have_the_same_families() -> None:
    class Library:
        def stats(self) -> object:
            return moment(busy()).pools[0].stats

    def families(collector: PoolCollector | ProxyCollector) -> list[tuple[str, str, str]]:
        found = [(family.name, family.type, family.documentation) for family in collector.collect()]
        return [family for family in found if family[0].startswith("cenote_pool_")]

    library = families(PoolCollector([Library()]))  # type: ignore[list-item]
    assert len(library) >= 14
    assert families(ProxyCollector(lambda: moment(busy()))) == library


def test_what_only_the_daemon_counts_is_told_by_pool() -> None:
    samples = scraped(busy())
    for name, value in {
        "transactions_total": 7,
        "queries_total": 9,
        "errors_total": 2,
        "audits_total": 0,
        "incidents_total": 0,
        "replays_total": 1,
        "listening": 0,
        "notifications_total": 0,
        "listener_gaps_total": 0,
        "recovered_plans_total": 3,
        "pinned": 1,
        "pool_clients": 2,
        "oldest_wait_seconds": 0,
        "transaction_seconds_sum": 0.5,
        "query_seconds_count": 1,
    }.items():
        assert samples[f"cenote_proxy_{name}"] == {of_pool(): value}, name
    assert samples["cenote_proxy_pins_total"] == {of_pool(reason="settings"): 2, of_pool(reason="listen"): 1}


def test_bytes_of_clients_that_are_still_there_count_with_those_of_clients_that_have_left() -> None:
    samples = scraped(busy())
    assert samples["cenote_proxy_bytes_from_clients_total"] == {of_pool(): 15}
    assert samples["cenote_proxy_bytes_to_clients_total"] == {of_pool(): 1500}


def test_log_ins_and_cancels_are_the_daemon_s_own() -> None:
    samples = scraped(busy())
    assert samples["cenote_proxy_login_seconds_count"] == {frozenset(): 1}
    assert samples["cenote_proxy_login_failures_total"] == {frozenset({("reason", "wrong_password")}): 4}
    assert samples["cenote_proxy_cancels_total"] == {frozenset({("outcome", "delivered")}): 6}
    assert samples["cenote_proxy_max_clients"] == {frozenset(): 10_000}


def test_clients_are_counted_in_every_state_also_where_nobody_is() -> None:
    states = {dict(key)["state"]: value for key, value in scraped(busy())["cenote_proxy_clients"].items()}
    assert states == {**dict.fromkeys(CLIENT_STATES, 0), "active": 1, "idle": 1}


def test_the_oldest_wait_is_that_of_the_first_in_line(monkeypatch: pytest.MonkeyPatch) -> None:
    daemon = FakeDaemon(1000.0)
    client = daemon.client()
    client.waiter = daemon.pool.machine.acquire(990.0, 100.0, None, client)
    monkeypatch.setattr("cenote.proxy.admin.views.monotonic", lambda: 1000.0)
    samples = scraped(daemon)
    assert samples["cenote_proxy_oldest_wait_seconds"] == {of_pool(): 10.0}
    assert samples["cenote_pool_waiting"] == {of_pool(): 1}


def test_every_metric_of_the_daemon_is_in_the_docs_with_its_type_and_every_one_in_the_docs_is_there() -> None:
    rows = re.findall(r"^\| `(cenote_proxy_\w+)` \| (\w+) \|", DOCS.read_text(), re.M)
    there = {
        (family.name + ("_total" if family.type == "counter" else ""), family.type)
        for family in ProxyCollector(lambda: moment(busy())).collect()
        if family.name.startswith("cenote_proxy_")
    }
    assert set(rows) == there


# -- the port -----------------------------------------------------------------------------------------------


def serving(body: Callable[[int, FakeDaemon], None], port: int = 0) -> None:
    """Run `body` in a thread while the metrics are served from an event loop."""

    async def run() -> None:
        daemon = busy()
        stop = start_metrics_server(daemon, "127.0.0.1", port)
        try:
            await asyncio.to_thread(body, stop.port, daemon)
        finally:
            stop()

    asyncio.run(run())


def get(port: int) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        return str(answer.read().decode())


def test_the_port_serves_the_text_that_prometheus_reads() -> None:
    def body(port: int, daemon: FakeDaemon) -> None:
        assert parsed(get(port))["cenote_proxy_transactions_total"] == {of_pool(): 7}
        daemon.pool.transactions = 8
        samples = parsed(get(port))
        assert samples["cenote_proxy_transactions_total"] == {of_pool(): 8}
        assert samples["process_open_fds"][frozenset()] > 0

    serving(body)


def test_after_the_stop_nobody_listens() -> None:
    found: list[int] = []
    serving(lambda port, _: found.append(port))
    with pytest.raises(ConnectionRefusedError), socket.create_connection(("127.0.0.1", found[0]), timeout=5):
        pass


def test_a_port_in_use_is_told_with_the_option_s_name() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=rf"127\.0\.0\.1:{port}: Address already in use; see .*metrics_port"):
            serving(lambda *_: None, port)
