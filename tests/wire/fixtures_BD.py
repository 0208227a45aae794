"""Fixtures of groups B and D, a plugin for their modules: `everywhere` plays a script directly and through three
proxies, on each version of PostgreSQL in turn.
"""

from collections.abc import Iterator

import pytest
from proxy_kit import RunningProxy, config_for
from scripts_BD import Everywhere


@pytest.fixture(scope="session")
def crowded_proxies() -> Iterator[dict[tuple[str, int], RunningProxy]]:
    proxies: dict[tuple[str, int], RunningProxy] = {}
    yield proxies
    for proxy in proxies.values():
        proxy.stop()


@pytest.fixture
def everywhere(
    each_proxy: RunningProxy, crowded_proxies: dict[tuple[str, int], RunningProxy]
) -> Iterator[Everywhere]:
    """Plays a script wherever it can be played, on each version in turn."""
    server, crowded = each_proxy.server, []
    for size in (1, 2):
        key = (server.dsn, size)
        if key not in crowded_proxies:
            config = config_for(server, max_size=size, max_prepared=2 * size)
            crowded_proxies[key] = RunningProxy(config, server).start()
        crowded.append(crowded_proxies[key])
    yield Everywhere(server, each_proxy, crowded)
    for proxy in crowded:
        proxy.clean()
