"""A thousand tasks share ten connections, with asyncpg.

    python examples/tasks.py [postgresql://user:secret@host/db]

Without an address it starts a private PostgreSQL (`pip install "cenote[asyncpg,embedded]"`).
"""

import asyncio
import sys
from contextlib import ExitStack

import cenote
from cenote import embedded


async def run(dsn: str) -> None:
    async with cenote.AsyncPool(dsn, driver="asyncpg", name="example", max_size=10) as pool:

        async def square(number: int) -> int:
            return int(await pool.fetch_value("SELECT $1::int * $1::int", [number]))

        print(sum(await asyncio.gather(*(square(n) for n in range(1000)))))
        async with pool.transaction() as conn:
            await conn.execute("CREATE TEMP TABLE notes (text text)")
            await conn.execute("INSERT INTO notes VALUES ($1)", "gone with this lease")
        stats = pool.stats()
        print(f"{stats.acquired} leases on {sum(stats.opened.values())} connections")


def main() -> None:
    with ExitStack() as stack:
        asyncio.run(run(sys.argv[1] if len(sys.argv) > 1 else stack.enter_context(embedded.Postgres()).dsn))


if __name__ == "__main__":
    main()
