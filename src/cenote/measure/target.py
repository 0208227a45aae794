"""The server that an instrument looks at: the one of a URL, or an embedded one that lives as long as it is used.

It looks before anything is loaded onto the server: who may connect, how many connections are left, whether the
server's processes can be seen from here. It measures nothing, and leaves nothing behind.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cenote.errors import ConfigError, MissingDependency, TargetUnusable

CONNECT_TIMEOUT_S = 10
APPLICATION = "cenote"
_SPARE = 2  # slots that an instrument leaves free, beside the reserved ones

# Without pg_read_all_stats the kind of other roles' sessions is hidden; those with a database hold a slot.
_LOOK = """
SELECT current_setting('server_version_num')::int,
       current_setting('max_connections')::int,
       current_setting('superuser_reserved_connections')::int
         + coalesce(current_setting('reserved_connections', true)::int, 0),
       (SELECT count(*) FROM pg_stat_activity
         WHERE coalesce(backend_type = 'client backend', datid IS NOT NULL) AND pid <> pg_backend_pid()),
       (SELECT rolsuper FROM pg_roles WHERE rolname = current_user),
       pg_backend_pid(), current_database(), current_user::text
"""


@dataclass(frozen=True, slots=True)
class Target:
    """A server, as seen when the instrument began.

    dsn: what libpq takes
    host: a name, an address, or the directory of a Unix socket
    version: as in server_version_num, 180001
    reserved: slots of max_connections that only superusers and pg_use_reserved_connections may take
    others: client sessions of others when we looked
    superuser: whether our role is one
    server_pid: of the postmaster, where it runs on this machine and /proc shows it; else None
    embedded: whether it was started for this
    """

    dsn: str
    host: str
    port: int
    database: str
    user: str
    version: int
    max_connections: int
    reserved: int
    others: int
    superuser: bool
    server_pid: int | None
    embedded: bool

    @property
    def free(self) -> int:
        """How many connections an instrument may open: the last ones are never taken."""
        return max(0, self.max_connections - self.reserved - self.others - _SPARE)

    @property
    def title(self) -> str:
        """The server for a reader, without the password."""
        major = self.version // 10_000
        if self.embedded:
            return f"PostgreSQL {major}, started for this"
        return f"PostgreSQL {major} at {self.host}:{self.port}, database {self.database}, role {self.user}"

    def need(self, connections: int, what: str) -> None:
        """Return when `connections` more fit.

        :raises TargetUnusable: with the numbers, and what to do
        """
        if connections > self.free:
            raise TargetUnusable(
                f"{what} needs {connections} connections, and {self.title} has {self.free} left for it "
                f"(max_connections = {self.max_connections}, {self.reserved} reserved, {self.others} taken by "
                f"others, {_SPARE} kept free): ask for fewer, or try when fewer are connected"
            )


@contextmanager
def target(url: str | None, **settings: Any) -> Iterator[Target]:
    """The server of `url`, or an embedded one (with these server `settings`) until the block ends.

    :param url: anything that libpq takes; PGPASSWORD, PGSERVICE and the like count. None: an embedded server
    :raises ConfigError: libpq does not understand the URL
    :raises TargetUnusable: it cannot be reached, or refuses us
    :raises MissingDependency: psycopg, or without a URL the embedded server, is not installed
    """
    if url is not None:
        yield look(url)
        return
    from cenote.embedded import Postgres

    with Postgres(settings=settings) as server:
        yield look(server.dsn, embedded_pid=server.pid)


def look(url: str, *, embedded_pid: int | None = None) -> Target:
    """What the server of `url` says of itself now. One connection, closed again."""
    try:
        import psycopg
        from psycopg.conninfo import conninfo_to_dict
    except ImportError:
        raise MissingDependency(
            'this needs psycopg, which is not installed: pip install "cenote[measure]"'
        ) from None
    scheme, colon, _ = url.partition("://")
    if colon and "=" not in scheme and scheme not in ("postgresql", "postgres"):
        raise ConfigError([f"url: it begins with {scheme}://, PostgreSQL's with postgresql://"])
    try:
        conninfo_to_dict(url)
    except psycopg.ProgrammingError as error:
        raise ConfigError([f"url: {one_line(error)}"]) from None
    try:
        with psycopg.connect(
            url, autocommit=True, connect_timeout=CONNECT_TIMEOUT_S, application_name=APPLICATION
        ) as conn:
            row = conn.execute(_LOOK).fetchone()
            assert row is not None
            version, most, reserved, others, superuser, backend, database, user = row
            host, port = conn.info.host, conn.info.port
            return Target(
                dsn=url,
                host=host,
                port=port,
                database=database,
                user=user,
                version=version,
                max_connections=most,
                reserved=reserved,
                others=others,
                superuser=bool(superuser),
                server_pid=embedded_pid or _postmaster(backend),
                embedded=embedded_pid is not None,
            )
    except psycopg.Error as error:
        raise TargetUnusable(f"cannot measure this server: {one_line(error)}") from None


def one_line(error: BaseException) -> str:
    """The words of a driver's error on one line, each line of it once; its kind where it has no words.

    libpq says the same of each attempt (with TLS, without; each address), and goes on in lines of their own.
    """
    said = ""
    lines = (" ".join(line.split()) for line in str(error).removeprefix("connection failed: ").splitlines())
    for line in dict.fromkeys(filter(_has_words, lines)):
        said += line if not said else f" {line}" if said[-1] in ".,:;?!" else f". {line}"
    return said or type(error).__name__


def _has_words(line: str) -> bool:
    return any(map(str.isalnum, line))  # the arrow under a statement's error has none


def _postmaster(backend: int) -> int | None:
    """The parent of our backend, if a process of that number here is a PostgreSQL backend at all.

    A server in another container or on another machine may have the same number as some process here: only one
    whose command line is a backend's counts.
    """
    try:
        command = Path(f"/proc/{backend}/cmdline").read_bytes()
        status = Path(f"/proc/{backend}/stat").read_text(errors="replace")
    except OSError:
        return None
    if not command.startswith(b"postgres:"):
        return None
    parent = int(status.rpartition(")")[2].split()[1])
    return parent if parent != os.getpid() else None
