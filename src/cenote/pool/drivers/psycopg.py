"""The psycopg 3 adapter for threads: leases are `psycopg.Connection` objects whose statements are noted.

Everything that does not wait, and what goes over the wire, is in `_psycopg`; here is how a thread waits for
it. It refuses to wait without a deadline, except where the borrower's own statement runs.
"""

import os
from contextlib import suppress
from time import monotonic
from typing import Any

from cenote.pool.drivers import _psycopg as shared
from cenote.pool.drivers import base

import psycopg  # isort: skip  (after `_psycopg`, which says what to install)
from psycopg import waiting  # isort: skip

_wait: Any = psycopg.Connection.wait
_kind_at = shared.KINDS.get


class PooledConnection(shared.Watched, psycopg.Connection[Any]):
    """psycopg's connection, noting what passes."""

    def wait(self, gen: Any, *args: Any, **kwargs: Any) -> Any:
        # On the path of every statement: no call that can be spared (1.3 us became 0.6 us).
        session = self._session
        kind = _kind_at(id(gen.gi_code), shared.UNSEEN)
        sender = self._before(gen, kind) if kind else None
        if session.query_since_s or kind == shared.LISTENS:
            # Inside another wait (a COPY writer's thread), whose time counts, or for notifications: no query.
            return _wait(self, gen, *args, **kwargs)
        started = session.query_since_s = monotonic()
        try:
            if args or kwargs:
                return _wait(self, gen, *args, **kwargs)
            return _wait(self, gen)
        except psycopg.Error as error:
            self._failed(error)
            raise
        finally:
            session.in_query_s += monotonic() - started
            session.query_since_s = 0.0
            if sender is not None:
                self._after(sender)


class PsycopgDriver(shared.Common):
    """Implements `base.Driver`."""

    def connect(self, timeout_s: float) -> Any:
        deadline = monotonic() + timeout_s
        try:
            conn = self._dial(deadline)
        except psycopg.Error as error:
            if not self._rotating or (error.sqlstate or "")[:2] != "28":
                raise
            conn = self._dial(deadline)  # the password may have changed just after it was given to us
        try:
            if self._options.init_query:
                self._run(conn, shared.query(conn.pgconn, self._options.init_query), deadline, "init_query")
            return self._opened(conn)
        except BaseException:
            conn.pgconn.finish()
            raise

    def _dial(self, deadline: float) -> Any:
        dsn = self._dsn() if callable(self._dsn) else self._dsn
        args = self._args() if callable(self._args) else self._args
        conninfo, kwargs = self._arguments(dsn, args, deadline - monotonic())
        token = shared.dial_until.set(deadline)
        try:
            return PooledConnection.connect(conninfo, **kwargs)
        except psycopg.Error as error:
            raise shared.refused(error)  # noqa: B904  (the same error)
        finally:
            shared.dial_until.reset(token)

    def _run(self, conn: Any, gen: shared.Waits, deadline: float, what: str) -> Any:
        interval = max(0.001, min(shared.INTERVAL_S, deadline - monotonic()))
        return waiting.wait(shared.until(gen, deadline, what), conn.pgconn.socket, interval)

    def ping(self, conn: Any, timeout_s: float) -> None:
        self._run(conn, shared.query(conn.pgconn, ""), monotonic() + timeout_s, "the ping")

    def reset(self, conn: Any, touched: int, timeout_s: float) -> None:
        deadline = monotonic() + timeout_s
        self._check_reset(conn)
        pause_s = shared.CANCEL_AGAIN_S
        while self.condition(conn) == base.BUSY:
            conn.cancel_safe(timeout=max(0.01, deadline - monotonic()))
            try:
                soon = min(deadline, monotonic() + pause_s)
                self._run(conn, shared.drain(conn.pgconn), soon, "the cancel request")
            except psycopg.OperationalError:
                if self.condition(conn) == base.BROKEN or monotonic() >= deadline:
                    raise
            pause_s *= 2
        self._run(conn, shared.reset(conn, touched, self._options), deadline, "the reset")

    def convert(self, conn: Any, script: str, replan: bool, timeout_s: float) -> None:
        self._run(conn, shared.convert(conn, script, replan), monotonic() + timeout_s, "the settings")

    def cancel(self, conn: Any) -> None:
        conn.cancel_safe(timeout=shared.CANCEL_TIMEOUT_S)

    def close(self, conn: Any, handle: Any, timeout_s: float) -> None:
        deadline = monotonic() + timeout_s
        pgconn = handle if handle is not None else conn.pgconn
        canceller = shared.Canceller(pgconn)
        last = self._hang_up(conn, pgconn)
        if last < 0:
            return
        pause_s = shared.CANCEL_AGAIN_S
        try:
            while (left := deadline - monotonic()) > 0:
                if canceller:
                    with suppress(psycopg.Error):
                        if canceller.blocking is not None:
                            canceller.blocking()
                        else:
                            stop = shared.until(canceller.send(), deadline, "the cancel request")
                            waiting.wait_conn(stop, shared.INTERVAL_S)
                    left = min(deadline - monotonic(), pause_s)
                if base.await_eof(os.dup(last), left):
                    return
                pause_s *= 2
        finally:
            os.close(last)

    def leave(self, conn: Any, failed: bool) -> None:
        if self._has_work(conn, failed):
            conn.__exit__(psycopg.Rollback if failed else None, None, None)

    def begin(self, conn: Any) -> None:
        block = psycopg.Transaction(conn)
        block.__enter__()
        conn._block = block

    def commit(self, conn: Any) -> None:
        block, conn._block = conn._block, None
        conn._check_connection_ok()
        if self._has_work(conn, False):
            block.__exit__(None, None, None)

    def rollback(self, conn: Any) -> None:
        block, conn._block = conn._block, None
        if self._has_work(conn, True):
            block.__exit__(psycopg.Rollback, psycopg.Rollback(), None)

    def execute(self, conn: Any, sql: Any, params: Any) -> int:
        return int(self._once(conn, conn.row_factory, sql, params).rowcount)

    def fetch_all(self, conn: Any, sql: Any, params: Any) -> list[Any]:
        found: list[Any] = self._once(conn, conn.row_factory, sql, params).fetchall()
        return found

    def fetch_one(self, conn: Any, sql: Any, params: Any) -> Any:
        return self._once(conn, conn.row_factory, sql, params).fetchone()

    def fetch_value(self, conn: Any, sql: Any, params: Any) -> Any:
        cursor = shared.kept_cursor(conn)
        row = self._execute(conn, cursor, sql, params).fetchone()
        shared.keep_cursor(conn, cursor)
        return row[0] if row else None

    def _once(self, conn: Any, row_factory: Any, sql: Any, params: Any) -> Any:
        return self._execute(conn, conn.cursor_factory(conn, row_factory=row_factory), sql, params)

    def _execute(self, conn: Any, cursor: Any, sql: Any, params: Any) -> Any:
        """Execute in autocommit. It is a client-side matter: psycopg sends BEGIN when it is off."""
        if conn._autocommit:
            return cursor.execute(sql, params)
        conn.__dict__["_autocommit"] = True  # not by the setter, which marks the session
        try:
            return cursor.execute(sql, params)
        finally:
            conn.__dict__["_autocommit"] = False
