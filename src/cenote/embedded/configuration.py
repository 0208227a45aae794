"""The text a server is configured with: its settings, who may log in, and quoting for SQL.

Pure functions from values to text. Nothing here reads or writes a file.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

Auth = Literal["scram-sha-256", "md5", "password", "trust"]
Setting = str | int | float | bool

SUPERUSER = "postgres"
HOST = "127.0.0.1"

DEFAULT_SETTINGS: Mapping[str, Setting] = {
    "max_connections": 100,
    "shared_buffers": "32MB",
    # The cluster is thrown away after use, so nothing is paid for surviving a power failure. A crash of
    # the server alone still loses nothing that was committed: what it wrote is in the kernel's hands.
    # (synchronous_commit stays on for that: without it the last commits are not even written.)
    "fsync": False,
    "full_page_writes": False,
    # A killed server leaves no file in /dev/shm and no large System V segment.
    "shared_memory_type": "mmap",
    "dynamic_shared_memory_type": "mmap",
    "log_line_prefix": "%m [%p] %q%u@%d ",
}


def postgresql_conf(settings: Mapping[str, Setting], *, port: int, socket_dir: str, auth: Auth) -> bytes:
    """Return postgresql.conf; where the server listens is not the caller's to set."""
    fixed: dict[str, Setting] = {
        "listen_addresses": HOST,
        "port": port,
        "unix_socket_directories": socket_dir,
        "unix_socket_permissions": "0777",
        "logging_collector": False,
    }
    chosen = dict(settings)
    if auth == "md5":
        chosen.setdefault("password_encryption", "md5")
    return _lines(f"{name} = {_conf_value(value)}" for name, value in (chosen | fixed).items())


def pg_hba_conf(first: Sequence[str], auth: Auth) -> bytes:
    """Return pg_hba.conf: the lines `first`, then the superuser by `pg_ident_conf`, then all by `auth`."""
    return _lines(
        [
            *first,
            f"local all {SUPERUSER} peer map=owner",
            f"local all all {auth}",
            f"host all all {HOST}/32 {auth}",
            f"host replication all {HOST}/32 {auth}",
        ]
    )


def pg_ident_conf(accounts: Iterable[str]) -> bytes:
    """Return pg_ident.conf: these system accounts are the superuser when they come through the socket."""
    return _lines(f'owner "{account}" {SUPERUSER}' for account in accounts)


def set_up_sql(user: str, password: str, database: str, *, version: int) -> str:
    """Return psql input that makes the role and the database where they are missing, and sets passwords."""
    # A plain copy of files: the default since 15 writes all pages to WAL, which takes three times as long.
    strategy = " STRATEGY file_copy" if version >= 15 else ""
    make_role = f"CREATE ROLE {identifier(user)} LOGIN"
    make_database = f"CREATE DATABASE {identifier(database)} OWNER {identifier(user)}{strategy}"
    return (
        f"SELECT {literal(make_role)} WHERE NOT EXISTS "
        f"(SELECT FROM pg_roles WHERE rolname = {literal(user)}) \\gexec\n"
        f"ALTER ROLE {identifier(user)} PASSWORD {literal(password)};\n"
        f"ALTER ROLE {identifier(SUPERUSER)} PASSWORD {literal(password)};\n"
        f"SELECT {literal(make_database)} WHERE NOT EXISTS "
        f"(SELECT FROM pg_database WHERE datname = {literal(database)}) \\gexec\n"
    )


def identifier(name: str) -> str:
    """Quote a name for SQL."""
    return '"' + name.replace('"', '""') + '"'


def literal(text: str) -> str:
    """Quote a string for SQL."""
    return "'" + text.replace("'", "''") + "'"


def _conf_value(value: Setting) -> str:
    text = ("on" if value else "off") if isinstance(value, bool) else str(value)
    return "'" + text.replace("\\", "\\\\").replace("'", "''") + "'"


def _lines(lines: Iterable[str]) -> bytes:
    return "".join(f"{line}\n" for line in lines).encode()
