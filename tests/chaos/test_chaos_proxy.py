"""Everything goes wrong at once around the proxy, and nobody is told anything but the truth.

Faults on both sides of it, backends that are terminated and killed, servers that restart, clients that die in
every phase, cancels at random; meanwhile money moves and marks are compared. The seed is printed; to go the same
way again, as far as the kernel lets it, write it in place of the random one.
"""

from __future__ import annotations

import asyncio
import secrets
import sys
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from cenote import embedded
from cenote.core.agenda import SWEEP_FROM
from pool_kit import behaviour

sys.path.append(str(Path(__file__).parents[1] / "wire"))  # proxy_kit

from chaos_arena import MAX_SIZE, SETUP, Arena, sessions_in_memory
from chaos_clients import gathered, sent_home

pytestmark = pytest.mark.chaos

LEAST_S = 8.0
#: What the proxy may keep of a run: statements and their verdicts, histograms, connections.
KEPT_BYTES = 4 * 1024 * 1024


@pytest.fixture
def victim() -> Iterator[embedded.Postgres]:
    settings: dict[str, int | str] = {"max_connections": 40, "restart_after_crash": True}
    with embedded.Postgres(18, settings=settings) as server:
        with psycopg.connect(server.dsn) as conn:
            conn.execute(SETUP.encode())
        yield server


@pytest.fixture
def seconds(request: pytest.FixtureRequest) -> float:
    """This test's share."""
    tests = [item for item in request.session.items if item.get_closest_marker("chaos")]
    return max(LEAST_S, float(request.config.getoption("--chaos-seconds")) / max(1, len(tests)))


async def asked_in_peace(arena: Arena) -> None:
    """Full service: so many clients as there are connections and some more, all answered at once."""

    async def one(number: int) -> None:
        async with asyncio.timeout(10):
            async with await psycopg.AsyncConnection.connect(arena.proxy.dsn, autocommit=True) as conn:
                for turn in range(5):
                    cursor = await conn.execute("SELECT %s, current_setting('search_path')", (f"{number}/{turn}",))
                    assert await cursor.fetchone() == (f"{number}/{turn}", '"$user", public')

    await asyncio.gather(*(one(number) for number in range(2 * MAX_SIZE)))


@pytest.mark.parametrize("faults", [False, True], ids=["killed", "killed and cut"])
@behaviour
async def test_every_answer_is_its_askers_own_and_nothing_is_left_behind(
    victim: embedded.Postgres, seconds: float, faults: bool
) -> None:
    seed = secrets.randbits(32)
    print(f"seed {seed}")
    before = sessions_in_memory()
    async with Arena(victim, seed) as arena:
        # A calm stretch first: what is kept from then on, grows.
        crowd = await gathered(arena)
        await arena.progress(500)
        tracemalloc.start()
        try:
            if faults:
                arena.faulty()
            ends = time.monotonic() + seconds
            while time.monotonic() < ends and not arena.wrong:
                await arena.progress()
                await arena.harm()
            await arena.calm()
            if not arena.wrong:
                await arena.progress(300)  # service is back, by itself
            await sent_home(arena, crowd)
            print(arena)
            assert arena.wrong == [], arena
            await asked_in_peace(arena)
            await arena.assert_nothing_left()
            arena.books()
            assert len(arena.done) > 50
            assert len(arena.harms) > 2, "nothing much was tried"
            in_memory = sessions_in_memory() - before
            # One more: the pool keeps its last dial's error for the words of its refusals.
            assert in_memory["ServerConnection"] <= arena.proxy.counts()["idle"] + 1, in_memory
            # The core's agenda lets go of waiters who have left only now and then.
            assert in_memory["ClientSession"] <= 2 * SWEEP_FROM, in_memory
            kept = _kept()
            assert kept < KEPT_BYTES, f"{kept:,} bytes kept"
        finally:
            tracemalloc.stop()


def _kept() -> int:
    """Bytes allocated since the start and still there, without what the clients of this test keep."""
    others = ("*/tests/*", "*/psycopg/*", "*/asyncpg/*", "*/_pytest/*", "*/cenote/testing/*", tracemalloc.__file__)
    snapshot = tracemalloc.take_snapshot().filter_traces([tracemalloc.Filter(False, other) for other in others])
    return sum(statistic.size for statistic in snapshot.statistics("filename"))
