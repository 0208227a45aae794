"""What the drivers' tests connect to: Cenote before a server, or the server itself, with a look at both."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Self

import psycopg
from proxy_kit import config_for
from proxy_process import ProxyProcess

from cenote import embedded
from cenote.testing.postgres import wait_until

MAX_SIZE = 4  # server connections
CLIENTS = 12  # connections a test interleaves over them
DEADLINE_S = 20.0


class Front:
    """Host, port, user, password and database for a driver, and a superuser's look at the server."""

    name = ""

    def __init__(self, server: embedded.Postgres, *, max_size: int) -> None:
        self.server = server
        self.max_size = max_size
        self.host = server.host
        self.port = server.port
        self.user = server.user
        self.password = server.password
        self.database = server.database

    def __enter__(self) -> Self:
        self.admin = psycopg.connect(self.server.superuser_dsn, autocommit=True)
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.admin.close()

    @property
    def dsn(self) -> str:
        return f"postgresql://{self.user}:{self.password}@{self.host}:{self.port}/{self.database}"

    def url(self, scheme: str) -> str:
        """The DSN with another scheme, as SQLAlchemy has them."""
        return self.dsn.replace("postgresql", scheme, 1)

    @property
    def arguments(self) -> dict[str, Any]:
        """The same by the names most drivers use."""
        return {"host": self.host, "port": self.port, "user": self.user, "password": self.password}

    @property
    def environment(self) -> dict[str, str]:
        """The same for programs: psql, pgbench, node."""
        return {
            "PGHOST": self.host,
            "PGPORT": str(self.port),
            "PGUSER": self.user,
            "PGPASSWORD": self.password,
            "PGDATABASE": self.database,
            "PATH": "/usr/local/bin:/usr/bin:/bin",
            "LC_ALL": "C.UTF-8",
        }

    def ask(self, sql: str, *params: Any) -> Any:
        """One value, straight from the server."""
        row = self.admin.execute(sql.encode(), params or None).fetchone()
        return None if row is None else row[0]

    def sessions(self) -> list[tuple[Any, ...]]:
        """The client's user's sessions at the server: pid, state, last query."""
        return self.admin.execute(
            "SELECT pid, state, query FROM pg_stat_activity"
            " WHERE backend_type = 'client backend' AND usename = %s",
            (self.user,),
        ).fetchall()

    def drop_tables(self) -> None:
        """What tests made in the schema public."""
        made = self.admin.execute(
            "SELECT format('DROP %s IF EXISTS %s CASCADE', kind, name) FROM ("
            " SELECT 'TABLE' AS kind, oid::regclass::text AS name FROM pg_class"
            "  WHERE relnamespace = 'public'::regnamespace AND relkind = 'r'"
            " UNION ALL SELECT 'SEQUENCE', oid::regclass::text FROM pg_class"
            "  WHERE relnamespace = 'public'::regnamespace AND relkind = 'S'"
            " UNION ALL SELECT 'TYPE', oid::regtype::text FROM pg_type"
            "  WHERE typnamespace = 'public'::regnamespace AND typtype = 'e') AS made"
        ).fetchall()
        for (statement,) in made:
            self.admin.execute(statement)

    def assert_nothing_left(self) -> None:
        """No query, transaction or lock of a client, once what is under way has ended."""
        left: list[Any] = []

        def clean() -> bool:
            left[:] = self.left()
            return not left

        try:
            wait_until(clean, timeout=DEADLINE_S)
        except TimeoutError:
            raise AssertionError(f"left after the test: {left}") from None

    def left(self) -> list[Any]:
        """What should not be there after a test."""
        sessions = self.sessions()
        left: list[Any] = [session for session in sessions if session[1] != "idle"]
        if len(sessions) > self.most_sessions:
            left.append(f"{len(sessions)} sessions at the server")
        left += self.admin.execute(
            "SELECT locktype, mode, pid FROM pg_locks WHERE pid <> pg_backend_pid() AND pid IN"
            " (SELECT pid FROM pg_stat_activity WHERE usename = %s)",
            (self.user,),
        ).fetchall()
        return left

    @property
    def most_sessions(self) -> int:
        """How many sessions may stay open."""
        raise NotImplementedError


class Direct(Front):
    """No proxy."""

    name = "direct"

    @property
    def most_sessions(self) -> int:
        return 0


class Cenote(Front):
    """Cenote before the server."""

    name = "cenote"

    @property
    def most_sessions(self) -> int:
        return self.max_size

    def __enter__(self) -> Self:
        super().__enter__()
        self.proxy = ProxyProcess(config_for(self.server, max_size=self.max_size), self.server)
        self.port = self.proxy.port
        return self

    def __exit__(self, *error: Any) -> None:
        try:
            self.proxy.stop()
        finally:
            super().__exit__(*error)

    def assert_nothing_left(self) -> None:
        super().assert_nothing_left()
        self.proxy.clean()
