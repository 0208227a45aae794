"""The psycopg 3 adapter for asyncio: leases are `psycopg.AsyncConnection` objects whose statements are noted.

Everything that does not wait, and what goes over the wire, is in `_psycopg`; here is how a task waits for it.
Any await may be cancelled. While a borrower's statement runs, psycopg then has the server cancel it and
waits for the answer (5 s at most, then it closes the connection); housekeeping is left where it stands, and
`condition` says BUSY. It refuses to shield anything from cancellation.
"""

import asyncio
import inspect
import os
from collections.abc import Awaitable
from contextlib import suppress
from time import monotonic
from typing import Any

from cenote.pool.drivers import _psycopg as shared
from cenote.pool.drivers import base

import psycopg  # isort: skip  (after `_psycopg`, which says what to install)
from psycopg import errors, waiting  # isort: skip

_wait: Any = psycopg.AsyncConnection.wait
_kind_at = shared.KINDS.get


class AsyncPooledConnection(shared.Watched, psycopg.AsyncConnection[Any]):
    """psycopg's connection, noting what passes."""

    async def wait(self, gen: Any, *args: Any, **kwargs: Any) -> Any:
        session = self._session
        kind = _kind_at(id(gen.gi_code), shared.UNSEEN)
        sender = self._before(gen, kind) if kind else None
        if session.query_since_s or kind == shared.LISTENS:
            # Inside another wait (a COPY writer's task), whose time counts, or for notifications: no query.
            return await _wait(self, gen, *args, **kwargs)
        started = session.query_since_s = monotonic()
        try:
            return await _wait(self, gen, *args, **kwargs)
        except psycopg.Error as error:
            self._failed(error)
            raise
        finally:
            session.in_query_s += monotonic() - started
            session.query_since_s = 0.0
            if sender is not None:
                self._after(sender)


class AsyncPsycopgDriver(shared.Common):
    """Implements `base.AsyncDriver`. All methods run on the pool's event loop."""

    async def connect(self, timeout_s: float) -> Any:
        deadline = monotonic() + timeout_s
        try:
            async with asyncio.timeout(timeout_s):
                try:
                    conn = await self._dial(deadline)
                except psycopg.Error as error:
                    if not self._rotating or (error.sqlstate or "")[:2] != "28":
                        raise
                    conn = await self._dial(deadline)  # the password may have changed just after we had it
        except TimeoutError:  # resolving the host's name has no timeout of its own
            raise shared.refused(errors.ConnectionTimeout("connection timeout expired")) from None
        try:
            if self._options.init_query:
                init = shared.query(conn.pgconn, self._options.init_query)
                await self._run(conn, init, deadline, "init_query")
            return self._opened(conn)
        except BaseException:
            conn.pgconn.finish()
            raise

    async def _dial(self, deadline: float) -> Any:
        dsn = await _maybe(self._dsn() if callable(self._dsn) else self._dsn)
        args = await _maybe(self._args() if callable(self._args) else self._args)
        conninfo, kwargs = self._arguments(dsn, args, deadline - monotonic())
        token = shared.dial_until.set(deadline)
        try:
            return await AsyncPooledConnection.connect(conninfo, **kwargs)
        except psycopg.Error as error:
            raise shared.refused(error)  # noqa: B904  (the same error)
        finally:
            shared.dial_until.reset(token)

    async def _run(self, conn: Any, gen: shared.Waits, deadline: float, what: str) -> Any:
        interval = max(0.001, min(shared.INTERVAL_S, deadline - monotonic()))
        return await waiting.wait_async(shared.until(gen, deadline, what), conn.pgconn.socket, interval)

    async def ping(self, conn: Any, timeout_s: float) -> None:
        await self._run(conn, shared.query(conn.pgconn, ""), monotonic() + timeout_s, "the ping")

    async def reset(self, conn: Any, touched: int, timeout_s: float) -> None:
        deadline = monotonic() + timeout_s
        self._check_reset(conn)
        pause_s = shared.CANCEL_AGAIN_S
        while self.condition(conn) == base.BUSY:
            await conn.cancel_safe(timeout=max(0.01, deadline - monotonic()))
            try:
                soon = min(deadline, monotonic() + pause_s)
                await self._run(conn, shared.drain(conn.pgconn), soon, "the cancel request")
            except psycopg.OperationalError:
                if self.condition(conn) == base.BROKEN or monotonic() >= deadline:
                    raise
            pause_s *= 2
        await self._run(conn, shared.reset(conn, touched, self._options), deadline, "the reset")

    async def convert(self, conn: Any, script: str, replan: bool, timeout_s: float) -> None:
        await self._run(conn, shared.convert(conn, script, replan), monotonic() + timeout_s, "the settings")

    async def cancel(self, conn: Any) -> None:
        await conn.cancel_safe(timeout=shared.CANCEL_TIMEOUT_S)

    async def close(self, conn: Any, handle: Any, timeout_s: float) -> None:
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
                    with suppress(psycopg.Error, TimeoutError):
                        if canceller.blocking is not None:
                            await asyncio.wait_for(asyncio.to_thread(canceller.blocking), left)
                        else:
                            stop = shared.until(canceller.send(), deadline, "the cancel request")
                            await waiting.wait_conn_async(stop, shared.INTERVAL_S)
                    left = min(deadline - monotonic(), pause_s)
                if await base.await_eof_async(os.dup(last), left):
                    return
                pause_s *= 2
        finally:
            os.close(last)

    async def leave(self, conn: Any, failed: bool) -> None:
        if self._has_work(conn, failed):
            await conn.__aexit__(psycopg.Rollback if failed else None, None, None)

    async def begin(self, conn: Any) -> None:
        block = psycopg.AsyncTransaction(conn)
        await block.__aenter__()
        conn._block = block

    async def commit(self, conn: Any) -> None:
        block, conn._block = conn._block, None
        conn._check_connection_ok()
        if self._has_work(conn, False):
            await block.__aexit__(None, None, None)

    async def rollback(self, conn: Any) -> None:
        block, conn._block = conn._block, None
        if self._has_work(conn, True):
            await block.__aexit__(psycopg.Rollback, psycopg.Rollback(), None)

    async def execute(self, conn: Any, sql: Any, params: Any) -> int:
        return int((await self._once(conn, conn.row_factory, sql, params)).rowcount)

    async def fetch_all(self, conn: Any, sql: Any, params: Any) -> list[Any]:
        found: list[Any] = await (await self._once(conn, conn.row_factory, sql, params)).fetchall()
        return found

    async def fetch_one(self, conn: Any, sql: Any, params: Any) -> Any:
        return await (await self._once(conn, conn.row_factory, sql, params)).fetchone()

    async def fetch_value(self, conn: Any, sql: Any, params: Any) -> Any:
        cursor = shared.kept_cursor(conn)
        await self._execute(conn, cursor, sql, params)
        row = await cursor.fetchone()
        shared.keep_cursor(conn, cursor)
        return row[0] if row else None

    def _once(self, conn: Any, row_factory: Any, sql: Any, params: Any) -> Awaitable[Any]:
        return self._execute(conn, conn.cursor_factory(conn, row_factory=row_factory), sql, params)

    async def _execute(self, conn: Any, cursor: Any, sql: Any, params: Any) -> Any:
        """Execute in autocommit. It is a client-side matter: psycopg sends BEGIN when it is off."""
        if conn._autocommit:
            return await cursor.execute(sql, params)
        conn.__dict__["_autocommit"] = True  # not by the setter, which marks the session
        try:
            return await cursor.execute(sql, params)
        finally:
            conn.__dict__["_autocommit"] = False


async def _maybe(result: Any) -> Any:
    return await result if inspect.isawaitable(result) else result
