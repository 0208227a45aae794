"""Fork with a live pool, as gunicorn's --preload does: each child drops what it inherited and dials its own.

python examples/preload.py
"""

import os

import cenote
from cenote import embedded


def main() -> None:
    with embedded.Postgres() as server, cenote.Pool(server.dsn, min_size=1, max_size=2) as pool:
        mine = pool.fetch_value("SELECT pg_backend_pid()")
        for _ in range(2):
            child = os.fork()
            if child == 0:
                its = pool.fetch_value("SELECT pg_backend_pid()")
                os._exit(0 if its != mine else 1)
            _, status = os.waitpid(child, 0)
            print("child used its own connection:", os.waitstatus_to_exitcode(status) == 0)
        print("parent kept its own:", pool.fetch_value("SELECT pg_backend_pid()") == mine)


if __name__ == "__main__":
    main()
