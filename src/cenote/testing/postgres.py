"""PostgreSQL for tests: a database per test, a look at the server's backends, a server with real TLS.

It adds to `cenote.embedded` what only tests want. It refuses to hide a missing server: what is not
installed raises `EmbeddedError` with the reason, and the test decides whether to skip.
"""

import contextlib
import secrets
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from cenote.embedded import Postgres
from cenote.embedded.configuration import identifier
from cenote.errors import EmbeddedError

DEBIAN_ROOT = Path("/usr/lib/postgresql")


def wait_until(condition: Callable[[], object], *, timeout: float = 10.0, what: str = "") -> None:
    """Return as soon as `condition()` is true; raise `TimeoutError` naming `what` after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {timeout:g} s: {what or condition}")
        time.sleep(0.005)


@contextlib.contextmanager
def fresh_database(pg: Postgres, *, owner: str | None = None) -> Iterator[str]:
    """Make an empty database for the `with` block and drop it afterwards, sessions and all.

    owner: its owner; default `pg.user`. Yields the name; `pg.dsn_for(database=name)` is its DSN.
    """
    name = f"test_{secrets.token_hex(6)}"
    # FILE_COPY with fsync off is a plain copy of files; the default, WAL_LOG, writes every page to WAL.
    pg.psql(
        f"CREATE DATABASE {name} OWNER {identifier(owner or pg.user)} TEMPLATE template0 STRATEGY file_copy",
        database="postgres",
    )
    try:
        yield name
    finally:
        if pg.running:
            pg.psql(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)", database="postgres")


def backends(dsn: str, *, database: str | None = None, user: str | None = None) -> list[int]:
    """Return the process ids of client backends, oldest first, without the one that answers.

    dsn: the superuser's, to see everybody's. database, user: only theirs. Needs psycopg.
    """
    rows = _query(
        dsn,
        "SELECT pid FROM pg_stat_activity WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()"
        " AND (%(database)s::name IS NULL OR datname = %(database)s)"
        " AND (%(user)s::name IS NULL OR usename = %(user)s) ORDER BY backend_start, pid",
        {"database": database, "user": user},
    )
    return [row[0] for row in rows]


def terminate(dsn: str, pids: Iterable[int], *, timeout: float = 5.0) -> list[int]:
    """End these backends, wait until they are gone, and return those that were there. Needs psycopg.

    dsn: a role that may do so. timeout: seconds to wait for each.
    """
    rows = _query(
        dsn,
        "SELECT pid FROM unnest(%(pids)s::int[]) AS pid WHERE pg_terminate_backend(pid, %(ms)s)",
        {"pids": list(pids), "ms": round(timeout * 1000)},
    )
    return [row[0] for row in rows]


def server_settings(dsn: str, *names: str) -> dict[str, str]:
    """Return settings as a new session of `dsn` has them: those named, or all. Needs psycopg."""
    rows = _query(
        dsn,
        "SELECT name, current_setting(name) FROM pg_settings"
        " WHERE cardinality(%(names)s::text[]) = 0 OR name = ANY (%(names)s)",
        {"names": list(names)},
    )
    return dict(rows)


def _query(dsn: str, sql: str, params: Mapping[str, Any]) -> list[tuple[Any, ...]]:
    import psycopg

    with psycopg.connect(dsn, autocommit=True) as connection:
        return connection.execute(sql, params).fetchall()


def debian_bin_dir(version: int | None = None) -> Path:
    """Return the directory of Debian's PostgreSQL binaries: of `version`, or of the newest.

    Raises `EmbeddedError` when it is not installed.
    """
    found = {int(path.name): path / "bin" for path in DEBIAN_ROOT.glob("[0-9]*") if path.name.isdigit()}
    servers = {number: path for number, path in found.items() if (path / "postgres").is_file()}
    number = version if version is not None else max(servers, default=0)
    if number not in servers:
        wanted = f"postgresql-{version}" if version is not None else "postgresql"
        raise EmbeddedError(f"no {DEBIAN_ROOT}/{version or '*'}/bin/postgres: apt-get install {wanted}")
    return servers[number]


@dataclass(frozen=True, slots=True)
class TLSFiles:
    """A certificate authority, a server certificate for localhost and 127.0.0.1, a client certificate."""

    folder: Path

    @property
    def ca(self) -> Path:
        return self.folder / "ca.crt"

    @property
    def server_certificate(self) -> Path:
        return self.folder / "server.crt"

    @property
    def server_key(self) -> Path:
        return self.folder / "server.key"

    @property
    def client_certificate(self) -> Path:
        return self.folder / "client.crt"

    @property
    def client_key(self) -> Path:
        return self.folder / "client.key"


def make_tls_files(folder: Path, *, client: str = "app") -> TLSFiles:
    """Make certificates in `folder` with the openssl program; `client` is the client's common name.

    They are good for two days. Raises `EmbeddedError` when openssl is missing or fails.
    """
    files = TLSFiles(folder)
    new_key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-keyout")
    sign = ("-CA", str(files.ca), "-CAkey", str(folder / "ca.key"), "-days", "2")
    authority = ("-addext", "basicConstraints=critical,CA:TRUE", "-addext", "keyUsage=critical,keyCertSign")
    leaf = ("-addext", "basicConstraints=critical,CA:FALSE")
    names = ("-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1")
    _openssl(*new_key, str(folder / "ca.key"), "-out", str(files.ca), "-subj", "/CN=test ca", *authority)
    _openssl(
        *new_key, str(files.server_key), "-out", str(files.server_certificate), "-subj", "/CN=localhost",
        *sign, *leaf, *names,
    )  # fmt: skip
    _openssl(
        *new_key, str(files.client_key), "-out", str(files.client_certificate), "-subj", f"/CN={client}",
        *sign, *leaf,
    )  # fmt: skip
    return files


def _openssl(*words: str) -> None:
    command = ["openssl", "req", "-x509", *words]
    try:
        done = subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL, check=False)
    except FileNotFoundError:
        raise EmbeddedError("making certificates needs the openssl program: install openssl") from None
    if done.returncode != 0:
        raise EmbeddedError(f"{' '.join(command)} failed: {done.stderr.decode(errors='replace')}")


class DebianPostgres(Postgres):
    """Debian's PostgreSQL with TLS on, private like `Postgres` and with the same parameters.

    version: default: the newest that is installed.

    Client certificates of `tls.ca` are accepted where an `hba` line asks for them; `user` has one. Raises
    `EmbeddedError` when the server or openssl is not installed.
    """

    def __init__(self, version: int | None = None, **options: Any) -> None:
        bin_dir = debian_bin_dir(version)
        with tempfile.TemporaryDirectory(prefix="cenote-tls-") as name:
            make_tls_files(Path(name), client=options.get("user", "app"))
            made = {path.name: path.read_bytes() for path in Path(name).iterdir()}
        options["files"] = made | dict(options.get("files") or {})
        options["settings"] = {"ssl": True, "ssl_ca_file": "ca.crt"} | dict(options.get("settings") or {})
        super().__init__(int(bin_dir.parent.name), bin_dir=bin_dir, **options)

    @property
    def tls(self) -> TLSFiles:
        """The certificates, in the data directory. Raises `EmbeddedError` before `start`."""
        return TLSFiles(self.data_dir)

    def tls_dsn(self, *, sslmode: str = "verify-full", **parameters: str) -> str:
        """Return `dsn` with TLS: `sslmode` and our `sslrootcert`, and any other libpq parameter."""
        return f"{self.dsn}?{urlencode({'sslmode': sslmode, 'sslrootcert': str(self.tls.ca), **parameters})}"
