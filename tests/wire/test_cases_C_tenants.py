"""Group C22, tenants: two hundred clients, each with rows of its own behind a row-level security policy, on four
server connections. Nobody may ever see, count or write a row of another.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator, Sequence

import pytest
from proxy_kit import RunningProxy, wire
from scripts_BD import SYNC, again, parse, query, run
from state_kit import roles_of, tell

from cenote.embedded import Postgres
from cenote.testing.wire import RawClient, error, kinds, rows, value

N_TENANTS = 200
N_CONNECTIONS = 4
N_ROUNDS = 2
N_AT_ONCE = 24  # clients at work at a time, more than there are connections

COUNT = "SELECT count(*), min(tenant), max(tenant) FROM c22"


class Tenant:
    """One client, and what it knows of itself. `begin` is the text that makes it who it is."""

    def __init__(self, name: str, client: RawClient, begin: str) -> None:
        self.name = name
        self.client = client
        self.begin = begin
        self.n_rows = 1

    async def ask(self, *parts: bytes, n_ready: int = 1) -> list[tuple[str | None, ...]]:
        """The rows of an answer without errors."""
        await self.client.send(*parts)
        answer = await self.client.trace(n_ready)
        assert "E" not in kinds(answer), answer
        return rows(answer)

    @property
    def own(self) -> tuple[str, str, str]:
        return str(self.n_rows), self.name, self.name

    async def start(self) -> None:
        """It says who it is, and prepares what it asks for most."""
        await tell(self.client, self.begin)
        await self.ask(parse("mine", COUNT) + SYNC)

    async def looks(self) -> None:
        """It sees its own rows and no others, whichever way it asks."""
        assert await self.ask(query(COUNT)) == [self.own]
        assert await self.ask(run(COUNT) + SYNC) == [self.own]
        assert await self.ask(again("mine") + SYNC) == [self.own]
        assert await self.ask(query(COUNT) + again("mine") + SYNC + query(COUNT), n_ready=3) == [self.own] * 3

    async def writes(self) -> None:
        """It adds a row, and cannot add one for somebody else."""
        await self.ask(query(f"INSERT INTO c22 VALUES ('{self.name}')"))
        self.n_rows += 1
        assert error(await self.client.query("INSERT INTO c22 VALUES ('another')"))["C"] == "42501"
        await self.ask(query("BEGIN"), query(f"INSERT INTO c22 VALUES ('{self.name}')"), n_ready=2)
        self.n_rows += 1
        assert await self.ask(query(COUNT)) == [self.own]
        await self.ask(query("ROLLBACK"))
        self.n_rows -= 1

    async def wavers(self, reset: str, other: str) -> None:
        """It is somebody else for a while, and nobody; what it rolls back it never was."""
        await self.ask(query("BEGIN") + query(other) + query("ROLLBACK"), n_ready=3)
        assert await self.ask(query(COUNT)) == [self.own]
        await self.ask(query("BEGIN") + query("SAVEPOINT a") + query(reset) + query("SELECT 1/0"), n_ready=0)
        await self.client.trace(4)
        await self.ask(query("ROLLBACK TO a") + query("COMMIT"), n_ready=2)
        assert await self.ask(query(COUNT)) == [self.own]
        await tell(self.client, reset)
        assert value(await self.client.query("SELECT count(*) FROM c22")) == "0"
        await tell(self.client, self.begin)
        assert await self.ask(query(COUNT)) == [self.own]


@pytest.fixture
def names() -> list[str]:
    return [f"c22_{number}" for number in range(N_TENANTS)]


@pytest.fixture
def table(pg: Postgres, names: list[str]) -> Iterator[None]:
    """A table with one row for each tenant. Each sees what `app.tenant` says, or its role."""
    with roles_of(pg, *names) as admin:
        admin.rows("CREATE TABLE c22 (tenant text); ALTER TABLE c22 ENABLE ROW LEVEL SECURITY")
        admin.rows(
            "CREATE POLICY c22 ON c22 USING"
            " (tenant = CASE current_user WHEN 'app' THEN current_setting('app.tenant', true)"
            " ELSE current_user END)"
        )
        admin.rows(
            "INSERT INTO c22 SELECT 'c22_' || n FROM generate_series(0, 199) AS n; GRANT ALL ON c22 TO PUBLIC"
        )
        try:
            yield
        finally:
            admin.rows("DROP TABLE c22")


def by_setting(name: str) -> str:
    return f"SET app.tenant = '{name}'"


def by_set_config(name: str) -> str:
    return f"SELECT set_config('app.tenant', '{name}', false)"


def by_role(name: str) -> str:
    return f"SET ROLE {name}"


@pytest.mark.usefixtures("table")
@pytest.mark.parametrize(
    ("begins", "reset"),
    [
        ((by_setting, by_set_config), "RESET app.tenant"),
        ((by_role,), "RESET ROLE"),
        ((by_setting, by_role, by_set_config), "DISCARD ALL"),
    ],
    ids=["SET", "SET ROLE", "each its own way"],
)
@wire
async def test_C22_no_tenant_ever_meets_a_row_of_another(proxy_for, pg: Postgres, names, begins, reset):
    proxy = proxy_for(pg, max_size=N_CONNECTIONS)
    dice = random.Random(22)
    at_once = asyncio.Semaphore(N_AT_ONCE)

    async def arrive(name: str, begin: str) -> Tenant:
        async with at_once:
            tenant = Tenant(name, await proxy.client(), begin)
            await tenant.start()
            return tenant

    async def work(tenant: Tenant) -> None:
        async with at_once:
            await tenant.looks()
            turn = dice.choice(("looks", "writes", "wavers"))
            if turn == "wavers":
                # DISCARD is not for transactions, and roles are not for those who have taken one.
                mild = reset if "DISCARD" not in reset else "RESET ROLE; RESET ALL"
                await tenant.wavers(mild, by_setting(dice.choice(names)))
                if mild != reset:
                    await tell(tenant.client, reset)
                    await tenant.start()
            else:
                await getattr(tenant, turn)()
            await tenant.looks()

    tenants = await asyncio.gather(
        *(arrive(name, begins[number % len(begins)](name)) for number, name in enumerate(names))
    )
    for _ in range(N_ROUNDS):
        dice.shuffle(tenants)
        await asyncio.gather(*map(work, tenants))
    await nobody_is_somebody(proxy, tenants)


async def nobody_is_somebody(proxy: RunningProxy, tenants: Sequence[Tenant]) -> None:
    """When they have left, in whatever way, a client that says nothing sees nothing."""
    for number, tenant in enumerate(tenants):
        if number % 3:
            tenant.client.feed(query(tenant.begin))
        await getattr(tenant.client, ("terminate", "close", "reset")[number % 3])()
    strangers = [await proxy.client() for _ in range(N_CONNECTIONS)]
    for stranger in strangers:
        await stranger.query("BEGIN")
        assert value(await stranger.query("SELECT count(*) FROM c22")) == "0"
    for stranger in strangers:
        await stranger.terminate()
