"""What the tests of group C share: the server connection a client was served by, how to make sure that it gets
another one next time, and roles that it may take.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

from proxy_kit import RunningProxy
from scripts_BD import SYNC, query, run

from cenote.embedded import Postgres
from cenote.testing.wire import Address, RawClient, kinds, value
from pool_kit import Admin

PID = "SELECT pg_backend_pid()"


async def pid_of(client: RawClient) -> str | None:
    """The server connection that serves this client now."""
    return value(await client.query(PID))


async def tell(client: RawClient, *texts: str, extended: bool = False) -> None:
    """Say texts that must not fail."""
    for text in texts:
        await client.send(run(text) + SYNC if extended else query(text))
        answer = await client.until_ready()
        assert "E" not in kinds(answer), (text, answer)


async def shown(client: RawClient, *names: str) -> Any:
    """What these settings are: one value, or one for each. One that was never set reads as an empty string."""
    asked = ", ".join(f"coalesce(current_setting('{name}', true), '')" for name in names)
    answer = await client.query(f"SELECT array_to_string(ARRAY[{asked}], '|')")
    values = (value(answer) or "").split("|")
    return values[0] if len(names) == 1 else values


@contextlib.asynccontextmanager
async def elsewhere(proxy: RunningProxy, *clients: RawClient) -> AsyncIterator[None]:
    """While the block lasts, the connections that these clients have just had are somebody else's.

    The proxy must have more of them than there are clients.
    """
    taken = {await pid_of(client) for client in clients}
    holders = []
    free = 0
    while taken:
        holder = await proxy.client()
        await holder.query("BEGIN")
        pid = await pid_of(holder)
        if pid in taken:
            taken.discard(pid)
            holders.append(holder)
        else:
            holders.insert(0, holder)
            free += 1
    for holder in holders[:free]:
        await holder.query("ROLLBACK")
    try:
        yield
    finally:
        for holder in holders:
            await holder.terminate()


async def direct(server: Postgres, params: dict[str, str] | None = None) -> RawClient:
    """A client of the server itself."""
    client = await RawClient.connect(Address(server.host, server.port))
    await client.startup(server.user, server.database, server.password, params)
    return client


@contextlib.contextmanager
def roles_of(server: Postgres, *names: str) -> Iterator[Admin]:
    """Roles that the user of the tests may take, for the block; yields a superuser's connection."""
    admin = Admin(server.superuser_dsn)
    made: list[str] = []
    try:
        for name in names:
            admin.rows(f"CREATE ROLE {name}")
            made.append(name)
            admin.rows(f"GRANT {name} TO {server.user}")
        yield admin
    finally:
        for name in made:
            admin.rows(f"DROP OWNED BY {name}")
            admin.rows(f"DROP ROLE {name}")
        admin.conn.close()


def pinned(proxy: RunningProxy) -> int:
    """How many clients keep their connection now."""
    return int(proxy.call(lambda: sum(pool.pinned for pool in proxy.pools())))


def conversions(proxy: RunningProxy) -> int:
    """How often a connection was made to carry other settings."""
    return int(proxy.call(lambda: sum(pool.conversions for pool in proxy.pools())))


def texts(rows: Sequence[tuple[str | None, ...]]) -> list[str | None]:
    """The first column."""
    return [row[0] for row in rows]
