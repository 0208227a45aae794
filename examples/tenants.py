"""Twenty tenants share three connections; each sees its own rows only, and nobody else's session.

    python examples/tenants.py [postgresql://user:secret@host/db]

Without an address it starts a private PostgreSQL (`pip install "cenote[psycopg,embedded]"`). It makes a table,
`cenote_example_deed`, and drops it again.
"""

import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import cenote
from cenote import embedded

TENANTS = 20

# The policy holds for the owner of the table too, but never for a superuser.
SCHEMA = (
    "DROP TABLE IF EXISTS cenote_example_deed",
    "CREATE TABLE cenote_example_deed (tenant int, deed text)",
    f"INSERT INTO cenote_example_deed SELECT t, 'deed of ' || t FROM generate_series(1, {TENANTS}) t",
    "ALTER TABLE cenote_example_deed ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY",
    "CREATE POLICY own ON cenote_example_deed"
    " USING (tenant = nullif(current_setting('app.tenant', true), '')::int)",
)


def run(dsn: str) -> None:
    with cenote.Pool(dsn, name="example", max_size=3) as pool:
        for statement in SCHEMA:
            pool.execute(statement)

        def serve(tenant: int) -> bool:
            with pool.connection(settings={"app.tenant": tenant}) as conn:
                rows = conn.execute("SELECT deed FROM cenote_example_deed").fetchall()
            return rows == [(f"deed of {tenant}",)]

        # Ten requests of each tenant, as they would come: a few in a row from the same one.
        requests = [tenant for _ in range(2) for tenant in range(1, TENANTS + 1) for _ in range(5)]
        with ThreadPoolExecutor(6) as threads:
            own = sum(threads.map(serve, requests))
        print(f"{own} of {len(requests)} requests saw their own rows and no others")
        print(f"without settings: {pool.fetch_value('SELECT count(*) FROM cenote_example_deed')} rows")
        stats = pool.stats()
        saved = stats.acquired - stats.conversions
        print(f"{stats.acquired} leases, {stats.conversions} conversions: {saved} found what they asked for")
        pool.execute("DROP TABLE cenote_example_deed")


def main() -> None:
    with ExitStack() as stack:
        run(sys.argv[1] if len(sys.argv) > 1 else stack.enter_context(embedded.Postgres()).dsn)


if __name__ == "__main__":
    main()
