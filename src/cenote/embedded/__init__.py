"""A private PostgreSQL from a wheel, for first steps, examples and tests.

    with cenote.embedded.Postgres(version=18) as pg:
        psycopg.connect(pg.dsn)

It needs no PostgreSQL on the machine, runs as root or not, any number side by side, and is gone with the
process that started it, however that one ends. It refuses to be a production server: the cluster runs
without fsync, listens on loopback only, and is thrown away.
"""

from cenote.embedded.configuration import Auth
from cenote.embedded.server import Postgres, StopMode

__all__ = ["Auth", "Postgres", "StopMode"]
