"""What an acquire timeout tells: one thread sleeps on the only connection, another asks in vain.

python examples/who_holds_it.py
"""

import threading

import cenote
from cenote import embedded


def main() -> None:
    asked = threading.Event()

    def forgetful(pool: cenote.Pool, holding: threading.Event) -> None:
        with pool.transaction() as conn:
            conn.execute("SELECT 1")
            holding.set()
            asked.wait()  # an HTTP call, say

    with embedded.Postgres() as server, cenote.Pool(server.dsn, name="orders", max_size=1) as pool:
        holding = threading.Event()
        thread = threading.Thread(target=forgetful, args=(pool, holding), name="forgetful")
        thread.start()
        holding.wait()
        try:
            pool.acquire(timeout=0.2)
        except cenote.AcquireTimeout as error:
            print(error)
        asked.set()
        thread.join()


if __name__ == "__main__":
    main()
