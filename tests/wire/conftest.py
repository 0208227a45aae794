"""A proxy for every wire test: one shared by all, in transaction mode on 4 connections, or one of the test's own.

After each test nothing may be left in it: no client, no lease, no waiter, and every invariant of the pool machine
holds. Tests leave no table behind in the shared database.
"""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from proxy_kit import Admin, Differential, RunningProxy, config_for

from cenote import embedded
from cenote.testing.postgres import TLSFiles, make_tls_files


@pytest.fixture(scope="session")
def shared_proxies() -> Iterator[dict[str, RunningProxy]]:
    proxies: dict[str, RunningProxy] = {}
    yield proxies
    for proxy in proxies.values():
        proxy.stop()


def _shared(proxies: dict[str, RunningProxy], server: embedded.Postgres) -> Iterator[RunningProxy]:
    if server.dsn not in proxies:
        proxies[server.dsn] = RunningProxy(config_for(server), server).start()
    yield proxies[server.dsn]
    proxies[server.dsn].clean()


@pytest.fixture
def proxy(pg18: embedded.Postgres, shared_proxies: dict[str, RunningProxy]) -> Iterator[RunningProxy]:
    """The shared proxy before PostgreSQL 18."""
    yield from _shared(shared_proxies, pg18)


@pytest.fixture
def each_proxy(pg: embedded.Postgres, shared_proxies: dict[str, RunningProxy]) -> Iterator[RunningProxy]:
    """The shared proxy before each version in turn."""
    yield from _shared(shared_proxies, pg)


@pytest.fixture
def differential(each_proxy: RunningProxy) -> Differential:
    """Plays a script on PostgreSQL and through the proxy and compares, on each version in turn."""
    return Differential(each_proxy.server, each_proxy)


@pytest.fixture
def proxy_for() -> Iterator[Callable[..., RunningProxy]]:
    """`proxy_for(server, **options)` starts a proxy of the test's own; parameters as `proxy_kit.config_for`."""
    proxies: list[RunningProxy] = []

    def start(server: Any, **options: Any) -> RunningProxy:
        proxies.append(RunningProxy(config_for(server, **options), server))
        return proxies[-1].start()

    yield start
    try:
        for proxy in proxies:
            if proxy.alive:
                proxy.clean()
    finally:
        for proxy in proxies:
            proxy.stop()


@pytest.fixture
def single(proxy_for: Callable[..., RunningProxy], pg: embedded.Postgres) -> RunningProxy:
    """A proxy with one server connection, on each version in turn: what one client leaves, the next one gets."""
    return proxy_for(pg, max_size=1)


@pytest.fixture
def pair(proxy_for: Callable[..., RunningProxy], pg: embedded.Postgres) -> RunningProxy:
    """A proxy with two server connections, on each version in turn."""
    return proxy_for(pg, max_size=2)


@pytest.fixture
def admin(pg18: embedded.Postgres) -> Iterator[Admin]:
    """The superuser's look at PostgreSQL 18, past the proxy."""
    admin = Admin(pg18.superuser_dsn)
    yield admin
    admin.conn.close()


@pytest.fixture(scope="session")
def tls_files(tmp_path_factory: pytest.TempPathFactory) -> TLSFiles:
    """Certificates for whoever listens."""
    return make_tls_files(tmp_path_factory.mktemp("tls"))


@pytest.fixture
def tls_listen(tls_files: TLSFiles) -> dict[str, str]:
    """What to add to `listen` for a proxy that speaks TLS."""
    return {"tls_cert": str(tls_files.server_certificate), "tls_key": str(tls_files.server_key)}


@pytest.fixture
def gate(admin: Admin) -> Callable[[], Any]:
    """`GATE` waits until the test opens it."""
    admin.rows("SELECT pg_advisory_lock(20061)")
    return lambda: admin.rows("SELECT pg_advisory_unlock(20061)")
