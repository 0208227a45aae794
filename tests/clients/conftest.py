"""A server with one Cenote before it, for every driver's tests: 4 server connections, transaction mode, all
else as it comes. After each test nothing may be left, neither at the proxy nor at the server.

`--through=direct` runs the same tests on the server itself: what fails there is the driver's or the test's fault.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cenote import embedded

sys.path.append(str(Path(__file__).parents[1] / "wire"))  # proxy_kit

from front import MAX_SIZE, Cenote, Direct, Front


@pytest.fixture(scope="session")
def upstream() -> Iterator[embedded.Postgres]:
    """A server of its own: what pools and drivers do to sessions stays away from other tests."""
    settings: dict[str, int | str] = {
        "max_connections": 60,
        "max_prepared_transactions": 5,
        "client_connection_check_interval": "100ms",  # for `direct`: the server alone would not notice
    }
    with embedded.Postgres(18, settings=settings) as server:
        yield server


@pytest.fixture(scope="session")
def door(request: pytest.FixtureRequest, upstream: embedded.Postgres) -> Iterator[Front]:
    """What the drivers connect to, started once."""
    through = request.config.getoption("--through", default="cenote")
    kind = {"cenote": Cenote, "direct": Direct}[str(through)]
    with kind(upstream, max_size=MAX_SIZE) as front:
        yield front


@pytest.fixture
def front(door: Front) -> Iterator[Front]:
    """The same, empty before the test and checked after it."""
    yield door
    door.assert_nothing_left()
    door.drop_tables()


@pytest.fixture
def dsn(front: Front) -> str:
    return front.dsn
