"""`python -m cenote.embedded`: a PostgreSQL to try things on, until Ctrl-C. It has no other purpose."""

import argparse
import signal

from cenote.embedded.install import VERSIONS
from cenote.embedded.server import Postgres


def main() -> None:
    """Start a server, print how to reach it, and run until interrupted or terminated."""
    parser = argparse.ArgumentParser(prog="python -m cenote.embedded", description=__doc__)
    parser.add_argument("--version", type=int, choices=sorted(VERSIONS), default=max(VERSIONS))
    parser.add_argument("--port", type=int, default=0, help="TCP port on 127.0.0.1; default: a free one")
    options = parser.parse_args()
    # Blocked before the server starts, so that the one that arrives meanwhile is not lost.
    signals = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    with Postgres(options.version, port=options.port) as pg:
        print(f"dsn        {pg.dsn}")
        print(f"superuser  {pg.superuser_dsn}")
        print(f"socket     {pg.socket_dsn}")
        print(f"psql       {pg.binary('psql')} {pg.dsn}")
        print("Ctrl-C stops it and removes its data.", flush=True)
        signal.sigwait(signals)


if __name__ == "__main__":
    main()
