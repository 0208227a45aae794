"""What Prometheus reads is what `stats()` says, under the names of docs/metrics.md."""

from __future__ import annotations

import re
from pathlib import Path

import prometheus_client
import pytest
from prometheus_client.parser import text_string_to_metric_families

import cenote
from cenote import errors
from cenote.watch.metrics import PoolCollector

DOCS = Path(__file__).parents[2] / "docs" / "metrics.md"


def scraped(*pools: cenote.Pool) -> dict[str, dict[tuple[tuple[str, str], ...], float]]:
    registry = prometheus_client.CollectorRegistry()
    registry.register(PoolCollector(pools))
    text = prometheus_client.generate_latest(registry).decode()
    samples: dict[str, dict[tuple[tuple[str, str], ...], float]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            samples.setdefault(sample.name, {})[tuple(sorted(sample.labels.items()))] = sample.value
    return samples


def test_the_exposition_says_what_stats_says(dsn: str) -> None:
    with cenote.Pool(dsn, min_size=1, max_size=2, name="orders") as pool:
        pool.wait_ready()
        pool.fetch_value("SELECT pg_sleep(0.01)")
        held = [pool.acquire() for _ in range(2)]
        with pytest.raises(errors.AcquireTimeout):
            pool.acquire(0)
        samples = scraped(pool)
        stats = pool.stats()
        me = ("pool", "orders")
        for state in ("idle", "leased", "connecting", "checking", "resetting", "closing"):
            assert samples["cenote_pool_connections"][me, ("state", state)] == getattr(stats, state)
        assert samples["cenote_pool_max_size"][me,] == 2
        assert samples["cenote_pool_waiting"][me,] == 0
        assert samples["cenote_pool_acquired_total"][me,] == stats.acquired
        assert samples["cenote_pool_refused_total"] == {(me, ("reason", "timeout")): 1}
        opened = {dict(labels)["reason"]: value for labels, value in samples["cenote_pool_opened_total"].items()}
        assert opened == stats.opened
        assert samples["cenote_pool_in_query_seconds_total"][me,] == pytest.approx(stats.in_query_s)
        assert samples["cenote_pool_in_query_seconds_total"][me,] >= 0.01
        for name, figures in (("wait", stats.wait), ("hold", stats.hold), ("connect", stats.connect)):
            assert samples[f"cenote_pool_{name}_seconds_count"][me,] == figures.count
            assert samples[f"cenote_pool_{name}_seconds_sum"][me,] == pytest.approx(figures.sum_s)
            buckets = samples[f"cenote_pool_{name}_seconds_bucket"]
            assert buckets[("le", "+Inf"), me] == figures.count
            in_order = [v for _, v in sorted((float(dict(k)["le"]), v) for k, v in buckets.items())]
            assert in_order == sorted(in_order), "buckets are cumulative"
        for conn in held:
            pool.release(conn)


def test_several_pools_share_one_collector_and_keep_their_names(dsn: str) -> None:
    quoted = 'b "quoted"'
    with cenote.Pool(dsn, name="a", max_size=3) as first, cenote.Pool(dsn, name=quoted, max_size=4) as second:
        limits = scraped(first, second)["cenote_pool_max_size"]
        assert limits == {(("pool", "a"),): 3, (("pool", 'b "quoted"'),): 4}


def test_every_metric_is_in_the_docs_and_every_one_in_the_docs_is_there(dsn: str) -> None:
    documented = set(re.findall(r"^\| `(cenote_pool_\w+)` \|", DOCS.read_text(), re.M))
    with cenote.Pool(dsn, max_size=1) as pool:
        pool.release(pool.acquire())
        held = pool.acquire()
        with pytest.raises(errors.AcquireTimeout):
            pool.acquire(0)
        held.close()
        pool.release(held)
        names = {re.sub(r"_(bucket|count|sum|created)$", "", name) for name in scraped(pool)}
    assert names == documented
