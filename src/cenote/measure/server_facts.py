"""What a server says of itself, of its sessions and of the way to it, asked on one connection.

Plain questions, nothing is changed and nothing judged. What our role may not see is None, or is counted as hidden.
"""

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ipaddress import ip_address
from typing import Any, TypeVar

import psycopg

from cenote.errors import TargetUnusable
from cenote.measure.doctor_facts import ServerFacts, Session, WayFacts
from cenote.measure.target import APPLICATION, CONNECT_TIMEOUT_S, Target, one_line

_ROUND_TRIPS = 7
_LOG_INS = 3
_PATIENCE_S = 20.0

_SETTINGS = (
    "max_connections", "superuser_reserved_connections", "reserved_connections", "shared_buffers", "work_mem",
    "password_encryption", "scram_iterations", "tcp_keepalives_idle", "tcp_keepalives_interval",
    "tcp_keepalives_count", "tcp_user_timeout", "client_connection_check_interval", "statement_timeout",
    "idle_in_transaction_session_timeout", "idle_session_timeout", "transaction_timeout", "lock_timeout",
    "authentication_timeout", "autovacuum_max_workers", "max_worker_processes", "max_wal_senders", "ssl",
)  # fmt: skip
_UNITS = {
    None: 1.0,
    "": 1.0,
    "ms": 0.001,
    "s": 1.0,
    "min": 60.0,
    "B": 1.0,
    "kB": 1024.0,
    "8kB": 8192.0,
    "MB": 2.0**20,
}

_ASK_SETTINGS = "SELECT name, setting, unit FROM pg_catalog.pg_settings WHERE name = ANY (%s)"
# Hidden sessions (of others, without pg_read_all_stats) have no kind; those with a database hold a slot.
_ASK_SESSIONS = """
SELECT pid, coalesce(usename::text, ''), coalesce(application_name, ''),
       CASE WHEN backend_type IS NULL THEN 'hidden' ELSE coalesce(state, 'starting') END,
       extract(epoch FROM clock_timestamp() - state_change)::float8,
       extract(epoch FROM clock_timestamp() - xact_start)::float8
FROM pg_catalog.pg_stat_activity
WHERE coalesce(backend_type = 'client backend', datid IS NOT NULL) AND pid <> pg_catalog.pg_backend_pid()
"""
_ASK_ROLE = """
SELECT r.rolsuper, r.rolconnlimit, d.datconnlimit,
       pg_catalog.pg_has_role(current_user, 'pg_read_all_stats', 'USAGE')
FROM pg_catalog.pg_roles r, pg_catalog.pg_database d
WHERE r.rolname = current_user AND d.datname = current_database()
"""
_ASK_SECRETS = """
SELECT count(*) FILTER (WHERE rolpassword LIKE 'md5%'),
       max(substring(rolpassword FROM '^SCRAM-SHA-256\\$([0-9]+):')::int)
FROM pg_catalog.pg_authid WHERE rolcanlogin
"""
_ASK_TLS = "SELECT ssl, version, cipher FROM pg_catalog.pg_stat_ssl WHERE pid = pg_catalog.pg_backend_pid()"


T = TypeVar("T")


def look_at_sessions_and_way(
    target: Target, meanwhile: Callable[[list[int]], T], *, patience_s: float = _PATIENCE_S
) -> tuple[ServerFacts, T]:
    """Ask the server. One connection at a time.

    :param meanwhile: what is to be done before the last connection is closed, with the process numbers of all
        sessions, ours included
    :param patience_s: how long the questions may take together
    :raises TargetUnusable: it stops answering
    """
    try:
        # The look itself was the first log-in; where no slot is to spare the one that asks must do.
        log_ins = [_log_in(target) for _ in range(_LOG_INS - 1 if target.free else 0)]
        began, cpu = time.perf_counter(), time.thread_time()
        with _connect(target) as conn, _patience(conn, patience_s):
            log_ins.append((time.perf_counter() - began, time.thread_time() - cpu))
            facts, pid = _ask(conn, sorted(log_ins)[len(log_ins) // 2])
            return facts, meanwhile([pid, *(session.pid for session in facts.sessions)])
    except psycopg.OperationalError as error:
        raise TargetUnusable(f"{target.title} stopped answering while it was asked: {one_line(error)}") from None
    except psycopg.Error as error:
        raise TargetUnusable(f"{target.title} does not know what it is asked: {one_line(error)}") from None


def _connect(target: Target) -> "psycopg.Connection[Any]":
    return psycopg.connect(
        target.dsn, autocommit=True, connect_timeout=CONNECT_TIMEOUT_S, application_name=APPLICATION
    )


@contextmanager
def _patience(conn: "psycopg.Connection[Any]", seconds: float) -> Iterator[None]:
    """A server that falls silent is hung up on: libpq would wait for ever."""
    with socket.socket(fileno=os.dup(conn.fileno())) as sock:
        bell = threading.Timer(seconds, sock.shutdown, [socket.SHUT_RDWR])
        bell.daemon = True
        bell.start()
        try:
            yield
        finally:
            bell.cancel()
            bell.join()


def _log_in(target: Target) -> tuple[float, float]:
    began, cpu = time.perf_counter(), time.thread_time()
    with _connect(target):
        return time.perf_counter() - began, time.thread_time() - cpu


def _ask(conn: "psycopg.Connection[Any]", log_in: tuple[float, float]) -> tuple[ServerFacts, int]:
    conn.prepare_threshold = None
    row = conn.execute(_ASK_ROLE).fetchone()
    assert row is not None
    superuser, role_limit, database_limit, sees_all = row
    secrets = _maybe(conn, _ASK_SECRETS) or (None, None)
    pid = _value(conn, "SELECT pg_catalog.pg_backend_pid()")
    facts = ServerFacts(
        settings=dict(_settings(conn)),
        sessions=tuple(
            Session(*session)
            for session in conn.execute(_ASK_SESSIONS).fetchall()
            if session[2] != APPLICATION  # ours, on its way out
        ),
        superuser=bool(superuser),
        role_limit=role_limit if role_limit >= 0 else None,
        database_limit=database_limit if database_limit >= 0 else None,
        sees_all=bool(sees_all),
        md5_secrets=secrets[0],
        most_iterations=secrets[1],
        way=_way(conn, log_in, pooler=pid != conn.info.backend_pid),
    )
    return facts, pid


def _value(conn: "psycopg.Connection[Any]", sql: str) -> Any:
    row = conn.execute(sql).fetchone()
    return row[0] if row else None


def _maybe(conn: "psycopg.Connection[Any]", sql: str) -> tuple[Any, ...] | None:
    """The first row, or None where our role may not see it."""
    try:
        row: tuple[Any, ...] | None = conn.execute(sql).fetchone()
    except psycopg.errors.InsufficientPrivilege:
        return None
    return row


def _settings(conn: "psycopg.Connection[Any]") -> Iterator[tuple[str, float | str]]:
    for name, setting, unit in conn.execute(_ASK_SETTINGS, (list(_SETTINGS),)).fetchall():
        try:
            yield name, float(setting) * _UNITS[unit]
        except ValueError:
            yield name, setting


# -- the way ----------------------------------------------------------------------------------------------------


def _way(conn: "psycopg.Connection[Any]", log_in: tuple[float, float], *, pooler: bool) -> WayFacts:
    ssl = _maybe(conn, _ASK_TLS) or (False, None, None)
    round_trip, clock, error = _clock(conn)
    with socket.socket(fileno=os.dup(conn.fileno())) as sock:
        kind, address = _kind(sock)
        idle, interval, count, user_timeout = _keepalive(sock)
    in_use = bool(conn.pgconn.ssl_in_use) if pooler else bool(ssl[0])
    return WayFacts(
        kind=kind,
        address=address,
        sslmode=_parameter(conn, "sslmode"),
        tls=(ssl[1] or "of a version that is not known") if in_use else "",
        cipher=(ssl[2] or "") if in_use else "",
        keepalive_idle_s=idle,
        keepalive_interval_s=interval,
        keepalive_count=count,
        user_timeout_s=user_timeout,
        round_trip_s=round_trip,
        clock_s=clock,
        clock_error_s=error,
        log_in_s=log_in[0],
        log_in_cpu_s=log_in[1],
        used_password=bool(conn.pgconn.used_password),
        pooler=pooler,
    )


def _clock(conn: "psycopg.Connection[Any]") -> tuple[float, float, float]:
    """Round trip, the server's clock minus ours, and how wrong that may be: half the round trip."""
    seen = []
    for _ in range(_ROUND_TRIPS):
        wall, began = time.time(), time.perf_counter()
        theirs = _value(conn, "SELECT extract(epoch FROM pg_catalog.clock_timestamp())::float8")
        trip = time.perf_counter() - began
        seen.append((trip, theirs - (wall + trip / 2), trip / 2))
    return min(seen)


def _kind(sock: socket.socket) -> tuple[str, str | None]:
    if sock.family not in (socket.AF_INET, socket.AF_INET6):
        return "socket", None
    here, there = str(sock.getsockname()[0]), str(sock.getpeername()[0])
    own = here == there or ip_address(there.partition("%")[0]).is_loopback
    return ("loopback" if own else "network"), there


def _keepalive(sock: socket.socket) -> tuple[float | None, float | None, int | None, float | None]:
    """Idle, interval (seconds), count, user timeout (seconds; None: off) as the kernel has them."""
    if sock.family not in (socket.AF_INET, socket.AF_INET6):
        return None, None, None, None
    milliseconds = _option(sock, "TCP_USER_TIMEOUT")
    user_timeout = milliseconds / 1000 if milliseconds else None
    if not sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE):
        return None, None, None, user_timeout
    return (
        _option(sock, "TCP_KEEPIDLE"),
        _option(sock, "TCP_KEEPINTVL"),
        _option(sock, "TCP_KEEPCNT"),
        user_timeout,
    )


def _option(sock: socket.socket, name: str) -> int | None:
    number = getattr(socket, name, None)
    return None if number is None else sock.getsockopt(socket.IPPROTO_TCP, number)


def _parameter(conn: "psycopg.Connection[Any]", name: str) -> str:
    """A connection parameter as libpq settled it."""
    for option in conn.pgconn.info:
        if option.keyword == name.encode():
            return (option.val or b"").decode()
    return ""
