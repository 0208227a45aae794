"""The asyncpg adapter: leases are `asyncpg.Connection` objects whose protocol notes each statement.

It refuses to go round asyncpg: no message is made here, and whatever asyncpg holds about a session (cached
statements, codecs, a cancel under way) stays true across leases. What a borrower still holds after release
(prepared statements, cursors, transactions) answers `InterfaceError`, by the counter that asyncpg's own pool
uses. The connection object itself is no proxy and is not guarded.

Tested with asyncpg 0.29 to 0.32. Names of asyncpg that start with an underscore are used here and in
`_asyncpg.py` only.
"""

import asyncio
import inspect
import os
import ssl
from collections.abc import Awaitable, Mapping
from contextlib import suppress
from typing import Any, cast

from cenote.config import PoolOptions
from cenote.errors import ConfigError, MissingDependency, MisuseError
from cenote.pool.drivers import base
from cenote.pool.drivers.base import BROKEN, BUSY, IDLE, IN_TRANSACTION, CannotReset
from cenote.reasons import Failure, failure_of
from cenote.sql import touch

try:
    import asyncpg
    from asyncpg import connect_utils
    from asyncpg.protocol import NO_TIMEOUT

    from cenote.pool.drivers import _asyncpg as lease
except ImportError as missing:
    raise MissingDependency('asyncpg is not installed: pip install "cenote[asyncpg]"') from missing

_LONG_S = 86_400.0  # our own timeouts are around asyncpg's; None would mean the user's command_timeout
_GIVE_UP_S = 1.0  # for closing a connection whose first statement failed
_LOST = "08003"  # asyncpg's own SQLSTATE for an end it has no word for
_PING = "SELECT 1"  # not the empty query: asyncpg fails on its answer (0.29 to 0.32)

# Statements prepared by the protocol under a name of the borrower's choice. asyncpg's own stay: its cache
# knows them.
_DROP_NAMED = (
    "DO $cenote$ DECLARE s pg_catalog.text; BEGIN FOR s IN SELECT name FROM pg_catalog.pg_prepared_statements"
    " WHERE NOT from_sql AND NOT pg_catalog.starts_with(name, '__asyncpg_')"
    " LOOP EXECUTE pg_catalog.format('DEALLOCATE %I', s); END LOOP; END $cenote$"
)


class AsyncpgDriver:
    """Implements `base.AsyncDriver`. All methods run on the pool's event loop."""

    name = "asyncpg"
    weak = True
    cancellable = True
    carries = True

    def __init__(self, dsn: base.Credentials, connect_args: base.ConnectArgs, options: PoolOptions) -> None:
        self._dsn = dsn
        self._connect_args = connect_args
        self._options = options
        self._rotates = callable(dsn) or callable(connect_args)
        if not self._rotates:
            _validate(dsn, cast("Mapping[str, Any]", connect_args))

    # -- opening ------------------------------------------------------------------------------------------

    async def connect(self, timeout_s: float) -> Any:
        try:
            async with asyncio.timeout(timeout_s):
                return await self._connect(timeout_s)
        except TimeoutError as error:
            raise TimeoutError(f"no connection to the server within {timeout_s:g} s") from error

    async def _connect(self, timeout_s: float) -> Any:
        try:
            conn = await self._dial(timeout_s)
        except asyncpg.PostgresError as error:
            if not self._rotates or not str(error.sqlstate).startswith("28"):
                raise
            conn = await self._dial(timeout_s)  # the password may have been changed since it was asked for
        try:
            if self._options.init_query:
                await _send(conn, self._options.init_query)
        except BaseException:
            await self.close(conn, None, _GIVE_UP_S)
            raise
        return conn

    async def _dial(self, timeout_s: float) -> Any:
        args = {"timeout": timeout_s, **(await _ask(self._connect_args) or {})}
        parent = args.pop("connection_class", asyncpg.Connection)
        dsn = await _ask(self._dsn)
        conn = await asyncpg.connect(dsn, connection_class=lease.lease_class(parent), **args)
        conn._cenote.opened = True
        return conn

    def settle(self, conn: Any) -> None:
        """What `configure` has done is the base from here on."""
        session = conn._cenote
        session.base_touched = session.touched
        session.base_codecs = dict(session.codecs)
        session.base_callbacks = tuple(_copied(getattr(conn, name)) for name in lease.CALLBACKS)
        session.recoded.clear()
        session.touched = session.statements = 0
        session.in_query_s = 0.0
        session.last_sql = session.sqlstate = ""
        session.attributes = session.callbacks = False

    # -- knowing, without I/O -----------------------------------------------------------------------------

    def session(self, conn: Any) -> base.Session:
        return conn._cenote  # type: ignore[no-any-return]

    def handle(self, conn: Any) -> Any:
        return conn._cenote

    def condition(self, conn: Any) -> int:
        protocol = conn._protocol
        session = conn._cenote
        if protocol is None or session.last_word or not protocol.is_connected():
            return BROKEN
        # A cancel under way counts as busy until it is known to have arrived: see `_settle_cancels`.
        if session.query_since_s or conn._cancellations or protocol._is_cancelling():
            return BUSY
        return IN_TRANSACTION if protocol.is_in_transaction() else IDLE

    def peek(self, conn: Any) -> str | None:
        transport = conn._transport
        if self.condition(conn) == BROKEN or transport.is_closing():
            return str(conn._cenote.last_word)
        encrypted = transport.get_extra_info("ssl_object") is not None
        return base.peek_socket(transport.get_extra_info("socket").fileno(), encrypted=encrypted)

    def failure(self, error: BaseException) -> tuple[Failure, str]:
        sqlstate = getattr(error, "sqlstate", None) or ""
        if isinstance(error, asyncpg.ConnectionDoesNotExistError) and sqlstate == _LOST and error.__cause__:
            return self.failure(error.__cause__)  # the server's last word, or what befell the socket
        if sqlstate:
            return failure_of(sqlstate), sqlstate
        if isinstance(error, asyncpg.InterfaceError) and "closed" in str(error):
            return Failure.CONNECTION, ""
        if isinstance(error, asyncpg.InternalClientError):
            return Failure.TEMPORARY, ""  # among others: no host has the wanted target_session_attrs
        if isinstance(error, ssl.SSLCertVerificationError):
            return Failure.PERMANENT, ""
        if isinstance(error, (ConnectionResetError, BrokenPipeError)):
            return Failure.CONNECTION, ""
        if isinstance(error, OSError):  # TimeoutError is one
            return Failure.DESTINATION, ""
        if isinstance(error, (ValueError, TypeError, ConfigError)):
            return Failure.PERMANENT, ""
        return Failure.PRIVATE, ""

    # -- returning to the base ----------------------------------------------------------------------------

    def tidy(self, conn: Any) -> None:
        session = conn._cenote
        conn._pool_release_ctr += 1  # what the borrower still holds is void from here on
        conn._top_xact = None
        if session.callbacks or session.recoded:
            self._restore(conn, session.base_callbacks, session.base_codecs)
        session.attributes = False

    def _restore(self, conn: Any, callbacks: tuple[Any, ...], codecs: lease.Codecs) -> None:
        session = conn._cenote
        for name, base_value in zip(lease.CALLBACKS, callbacks, strict=True):
            setattr(conn, name, _copied(base_value))
        for key in set(session.recoded) | (session.codecs.keys() - codecs.keys()):
            session.protocol.get_settings().remove_python_codec(*key)
            again = codecs.get(key)
            if again is not None:
                again()
            elif key in codecs:
                session.touched |= touch.LOAD  # nothing but a new connection brings it back
            conn._drop_local_statement_cache()
        session.recoded.clear()
        session.codecs = dict(codecs)
        session.callbacks = False

    async def reset(self, conn: Any, touched: int, timeout_s: float) -> None:
        session = conn._cenote
        try:
            async with asyncio.timeout(timeout_s):
                await self._settle_cancels(conn)
                if session.query_since_s:
                    raise CannotReset("another task is still using the connection")
                script = self._script(conn, session, touched)
                if script:
                    await _send(conn, "; ".join(script))
        except TimeoutError as error:
            raise CannotReset(f"the session could not be reset within {timeout_s:g} s") from error
        if self.condition(conn) != IDLE:
            raise CannotReset("the session is not idle after its reset")
        if _DROP_NAMED in script:
            self._forget_named(conn, session)
        session.touched = 0

    def _script(self, conn: Any, session: lease.Session, touched: int) -> list[str]:
        """Restore what is on the client's side, and give the statements for the server's."""
        always = self._options.reset == "always"
        script = ["ROLLBACK"] if conn._protocol.is_in_transaction() else []
        self.tidy(conn)
        touched |= session.touched & touch.LOAD  # tidy() may have found what cannot be restored
        if not touched and not always:
            return script
        # `configure` runs again after this: from where it began, or its work would add up.
        self._restore(conn, lease.NO_CALLBACKS, {})
        if self._options.reset == "never":
            return script
        touched |= session.base_touched & ~touch.LOAD
        if always:
            touched |= touch.ALL & ~(touch.LOAD | touch.UNKNOWN)
        script += base.reset_statements(touched, self._options.init_query)
        if session.named:
            script.append(_DROP_NAMED)
        return script

    async def convert(self, conn: Any, script: str, replan: bool, timeout_s: float) -> None:
        if replan:
            # Into the set of those that asyncpg is to close, one round trip each: here it is one for all.
            conn._drop_local_statement_cache()
            if conn._stmts_to_close:
                script = f"DEALLOCATE ALL;{script}"
        if script:
            try:
                async with asyncio.timeout(timeout_s):
                    await _send(conn, script)
            except TimeoutError as error:
                raise TimeoutError(f"no answer to the settings within {timeout_s:g} s") from error
        if replan:
            conn._stmts_to_close.clear()

    def _forget_named(self, conn: Any, session: lease.Session) -> None:
        for state in session.named:
            if not state.closed or state in conn._stmts_to_close:
                state.mark_closed()
                conn._stmts_to_close.discard(state)
                session.forgotten.add(state)
        session.named.clear()

    async def _settle_cancels(self, conn: Any) -> None:
        """Wait until a cancelled query has ended and its cancel request has been delivered.

        asyncpg sends the request from a connection of its own, in the background; delivered after the next
        query began it would hit that one (asyncpg issues 467 and 547). The server closes that connection
        once it has signalled, which is what asyncpg waits for; then the answer of the query itself."""
        while conn._protocol is not None and (conn._cancellations or conn._protocol._is_cancelling()):
            await conn._protocol._wait_for_cancellation()
            if conn._cancellations:
                await asyncio.wait(tuple(conn._cancellations))
        conn._check_open()

    async def ping(self, conn: Any, timeout_s: float) -> None:
        async with asyncio.timeout(timeout_s):
            await _send(conn, _PING)

    async def cancel(self, conn: Any) -> None:
        if conn.is_closed():
            return
        sent = asyncio.get_running_loop().create_future()
        # A task of asyncpg's, in `_cancellations`: it goes on if we are cancelled, and a reset waits for it.
        # Where the request fails it terminates the connection.
        conn._cancel_current_command(sent)
        await sent

    # -- closing ------------------------------------------------------------------------------------------

    async def close(self, conn: Any, handle: Any, timeout_s: float) -> None:
        session: lease.Session = handle if conn is None else conn._cenote
        clock = asyncio.get_running_loop().time
        deadline = clock() + timeout_s
        session.last_socket = last = session.last_socket or session.duplicate()
        try:
            try:
                async with asyncio.timeout_at(deadline):
                    if conn is not None and session.query_since_s and not session.abandoned:
                        await self._stop_query(conn, session, timeout_s / 2)
                    # Says Terminate and waits for the server's end.
                    if conn is None:
                        await session.protocol.close(NO_TIMEOUT)
                    else:
                        await conn.close(timeout=NO_TIMEOUT)
            except Exception:  # what asyncpg could not close it aborts
                session.protocol.abort()
            if last is not None:
                await base.await_eof_async(last.detach(), deadline - clock())
        finally:
            session.last_socket = None
            if last is not None:
                last.close()

    async def _stop_query(self, conn: Any, session: lease.Session, timeout_s: float) -> None:
        """asyncpg's close would cancel it as well, and give whoever awaits the query a riddle for an error."""
        session.on_end = ended = asyncio.get_running_loop().create_future()
        pause_s = 0.01
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while not ended.done():
                    await self.cancel(conn)  # again and again: what arrives before the query is sent is nothing
                    await asyncio.wait({ended}, timeout=pause_s)
                    pause_s *= 2

    def cut(self, conn: Any) -> None:
        transport = conn._cenote.transport
        if not transport.is_closing():
            base.shut_socket(transport.get_extra_info("socket").fileno())

    def closed_by_borrower(self, conn: Any) -> bool:
        return bool(conn._cenote.by_borrower)

    def disown(self, conn: Any) -> None:
        # The loop and its epoll set are shared with the parent: the transport must not be told to close.
        # Its descriptor is replaced, so that whoever closes that number later closes nothing of ours.
        transport = conn._cenote.transport
        if transport.is_closing():
            return
        nothing = os.open(os.devnull, os.O_RDWR)
        os.dup2(nothing, transport.get_extra_info("socket").fileno())
        os.close(nothing)

    # -- statements ---------------------------------------------------------------------------------------

    async def leave(self, conn: Any, failed: bool) -> None:
        """Nothing: asyncpg has no implicit transaction. One left open is rolled back by the reset."""

    async def begin(self, conn: Any) -> None:
        # asyncpg's own object, so that `conn.transaction()` inside the block makes a savepoint.
        conn._cenote.block = block = conn.transaction()
        await block.start()

    async def commit(self, conn: Any) -> None:
        block, conn._cenote.block = conn._cenote.block, None
        await block.commit()

    async def rollback(self, conn: Any) -> None:
        block, conn._cenote.block = conn._cenote.block, None
        await block.rollback()

    async def execute(self, conn: Any, sql: Any, params: Any) -> int:
        return base.row_count(await conn.execute(sql, *_spread(params)))

    def fetch_all(self, conn: Any, sql: Any, params: Any) -> Awaitable[list[Any]]:
        return conn.fetch(sql, *_spread(params))  # type: ignore[no-any-return]

    def fetch_one(self, conn: Any, sql: Any, params: Any) -> Awaitable[Any]:
        return conn.fetchrow(sql, *_spread(params))  # type: ignore[no-any-return]

    def fetch_value(self, conn: Any, sql: Any, params: Any) -> Awaitable[Any]:
        return conn.fetchval(sql, *_spread(params))  # type: ignore[no-any-return]


async def _send(conn: Any, script: str) -> None:
    """One simple query of the pool's own: not noted as the borrower's."""
    try:
        await lease.PlainProtocol.query(conn._protocol, script, _LONG_S)
    except (asyncpg.ConnectionDoesNotExistError, asyncpg.InterfaceError) as error:
        if conn._cenote.last_word:
            vars(error)["sqlstate"] = conn._cenote.last_word  # not "connection lost", but why: `failure` reads it
        raise


def _spread(params: Any) -> Any:
    if not params:
        return ()
    if isinstance(params, Mapping):
        raise MisuseError("asyncpg takes parameters by position ($1, $2 ...): give a sequence, not a mapping")
    return params


def _copied(callbacks: Any) -> Any:
    if isinstance(callbacks, dict):
        return {channel: set(those) for channel, those in callbacks.items()}
    return set(callbacks)


async def _ask(source: Any) -> Any:
    """`source`, or what it returns when it is a function or coroutine function."""
    if not callable(source):
        return source
    answer = source()
    return await answer if inspect.isawaitable(answer) else answer


def _validate(dsn: Any, connect_args: Mapping[str, Any]) -> None:
    """Let asyncpg read the DSN and arguments as it will at each dial.

    :raises ConfigError: with what asyncpg says against them."""
    try:
        given = inspect.signature(asyncpg.connect).bind(dsn, **connect_args)
        given.apply_defaults()
        parse: Any = vars(connect_utils)["_parse_connect_arguments"]
        wanted = inspect.signature(parse).parameters
        parse(**{name: given.arguments[name] for name in wanted})
    except (TypeError, ValueError, asyncpg.InterfaceError, OSError) as error:
        said = base.without_values(error, dsn)
        raise ConfigError([f"asyncpg cannot use this DSN or connect_args: {said}"]) from None
