"""Fixtures for every test: PostgreSQL 16 and 18, each started when first asked for, once per run.

Tests that stop, kill or reconfigure a server start one of their own (it takes a tenth of a second); these
are shared, and a test leaves nothing in them: it takes `database`, which is new for it.
"""

import platform
import signal
from collections.abc import Iterator

import pytest
from hypothesis import settings

import cenote
from cenote import embedded
from cenote.embedded.install import VERSIONS
from cenote.testing.postgres import fresh_database

# The same examples in every run; `--hypothesis-profile=long` looks further, elsewhere each time.
settings.register_profile("fast", derandomize=True, database=None, deadline=None, print_blob=True)
settings.register_profile(
    "long", max_examples=3000, stateful_step_count=150, database=None, deadline=None, print_blob=True
)
settings.load_profile("fast")

# A shell that runs the suite in the background has SIGINT ignored, and children inherit that; some tests send it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--chaos-seconds", type=float, default=5.0, help="how long the tests of tests/chaos go on, all together"
    )
    parser.addoption(
        "--build", choices=["pure", "compiled"], help="fail unless this build of the hot modules is under test"
    )
    parser.addoption(
        "--through",
        choices=["cenote", "direct"],
        default="cenote",
        help="what the drivers of tests/clients speak to",
    )
    parser.addoption(
        "--require-node",
        action="store_true",
        help="fail where node's driver cannot be tested, instead of skipping",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The compiled wheel has the same instruments as plain Python, and what differs between versions of PostgreSQL
    is the same Python: these are tested once."""
    if config.getoption("--build") == "compiled":
        left_out = [item for item in items if _tested_once(item)]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not _tested_once(item)]


def _tested_once(item: pytest.Item) -> bool:
    call = getattr(item, "callspec", None)
    old = call is not None and call.params.get("pg") == min(VERSIONS)
    return old or item.get_closest_marker("interpreted") is not None


def pytest_report_header(config: pytest.Config) -> list[str]:
    build_info = getattr(cenote, "build_info", None)
    build = build_info() if callable(build_info) else "unknown"
    return [f"python: {platform.python_version()} {platform.python_implementation()}", f"cenote: {build}"]


@pytest.fixture(scope="session")
def pg16() -> Iterator[embedded.Postgres]:
    with embedded.Postgres(16, settings={"max_connections": 200}) as server:
        yield server


@pytest.fixture(scope="session")
def pg18() -> Iterator[embedded.Postgres]:
    with embedded.Postgres(18, settings={"max_connections": 200}) as server:
        yield server


@pytest.fixture(scope="session", params=sorted(VERSIONS), ids=lambda version: f"pg{version}")
def pg(request: pytest.FixtureRequest) -> embedded.Postgres:
    """Each version in turn."""
    server = request.getfixturevalue(f"pg{request.param}")
    assert isinstance(server, embedded.Postgres)
    return server


@pytest.fixture
def dsn(pg18: embedded.Postgres) -> str:
    """The shared database of PostgreSQL 18; leave nothing in it."""
    return pg18.dsn


@pytest.fixture
def database(pg18: embedded.Postgres) -> Iterator[str]:
    """The DSN of a new, empty database on PostgreSQL 18, dropped after the test."""
    with fresh_database(pg18) as name:
        yield pg18.dsn_for(database=name)


@pytest.fixture
def each_database(pg: embedded.Postgres) -> Iterator[str]:
    """The DSN of a new, empty database, on each version in turn."""
    with fresh_database(pg) as name:
        yield pg.dsn_for(database=name)
