"""Leases of asyncpg: the connection, its protocol, and what is noted of them.

All of asyncpg's methods end in ten methods of its protocol object; there, in a subclass, statements are
seen. The connection's class marks what a borrower leaves on the client's side: objects that hold on to the
connection, callbacks, codecs. Nothing here decides or sends anything of its own; `asyncpg.py` does.
"""

import asyncio
import functools
import os
import socket
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import asyncpg
from asyncpg import introspection
from asyncpg.protocol import Protocol

from cenote.pool.drivers import base
from cenote.sql import touch
from cenote.sql.classify import classify

PlainProtocol: Any = Protocol  # untyped: its methods differ from one release of asyncpg to the next

CodecKey = tuple[int, str, str]  # type oid, type name, schema
Codecs = dict[CodecKey, Callable[[], object] | None]

CALLBACKS = ("_listeners", "_log_listeners", "_query_loggers", "_termination_listeners")
NO_CALLBACKS: tuple[Any, ...] = ({}, set(), set(), set())


class Session(base.Session):
    """What is known of one connection; also the handle that closes it when its lease was dropped.

    It holds the protocol and the transport, never the connection, so that a dropped lease is collected.
    """

    __slots__ = (
        "abandoned",
        "base_callbacks",
        "base_codecs",
        "base_touched",
        "block",
        "by_borrower",
        "callbacks",
        "codecs",
        "forgotten",
        "last_socket",
        "last_word",
        "named",
        "on_end",
        "opened",
        "protocol",
        "recoded",
        "seen",
        "seen_touches",
        "transport",
    )

    def __init__(self, protocol: Any, transport: Any) -> None:
        super().__init__()
        self.protocol = protocol
        self.transport = transport
        self.opened = False  # dialed and ours; asyncpg terminates some before (target_session_attrs)
        self.last_socket: socket.socket | None = None  # a duplicate, when the borrower terminated it
        self.block: Any = None  # the Transaction of a `transaction()` block
        self.named: list[Any] = []  # statements prepared under the borrower's own names
        self.forgotten: set[Any] = set()  # those the server has forgotten while an object of them lives
        # Custom codecs by type: how to set it again without a round trip, None where that cannot be.
        self.codecs: Codecs = {}
        self.recoded: dict[CodecKey, bool] = {}  # types whose codec changed since the base; is it scalar?
        self.base_codecs: Codecs = {}
        self.base_callbacks = NO_CALLBACKS
        self.callbacks = False  # some were added or removed
        self.base_touched = 0
        self.seen = ""
        self.seen_touches = 0
        self.last_word = ""  # why the server ended the session, as SQLSTATE
        self.abandoned = False  # a query runs whose coroutine has gone
        self.by_borrower = False  # who closed it
        self.on_end: asyncio.Future[None] | None = None  # wanted by who waits for the running query

    def executes(self, text: str) -> None:
        """Note a statement that is about to be sent."""
        if text is not self.seen:  # a loop sends the same text again: spare the look-up
            self.seen_touches = classify(text).touches
            self.seen = text
        self.touched |= self.seen_touches
        self.statements += 1

    def query_ends(self) -> None:
        super().query_ends()
        if self.on_end is not None and not self.on_end.done():
            self.on_end.set_result(None)

    def calls_back(self) -> None:
        """Note that a callback is about to be added or removed."""
        self.attributes = self.callbacks = True

    async def timed(self, text: str, answer: Coroutine[Any, Any, Any]) -> Any:
        """Send a request by awaiting `answer`, and note how long it took and how it ended."""
        self.last_sql = text
        self.query_starts()
        try:
            result = await answer
        except GeneratorExit:
            self.abandoned = True  # thrown away in mid-flight: nobody reads the answer, it stays BUSY
            raise
        except asyncpg.PostgresError as error:
            # "closed in the middle of operation" has the server's last word for a cause (asyncpg 0.32)
            cause = getattr(error.__cause__, "sqlstate", None)
            self.sqlstate = self.last_word or cause or error.sqlstate or ""
            self.query_ends()
            raise
        except BaseException:
            self.query_ends()
            raise
        self.query_ends()
        return result

    def duplicate(self) -> socket.socket | None:
        """A second descriptor of the connection's socket; None when it is closed."""
        if self.transport.is_closing():
            return None
        try:
            return socket.socket(fileno=os.dup(self.transport.get_extra_info("socket").fileno()))
        except OSError:
            return None


_data_received = PlainProtocol.data_received


class _Protocol(PlainProtocol):  # type: ignore[misc]
    """asyncpg's protocol, watched.

    A protocol becomes one by assigning its `__class__`: asyncpg cannot be told which class to use, and a
    wrapper object would not be what its C code calls back. Parse, further rows of a portal and Close run no
    statement of their own: they are only timed.
    """

    cenote: Session

    def data_received(self, data: bytes) -> None:
        session = self.cenote
        if not session.query_since_s and b"\0VFATAL\0" in data:
            # To an idle session: why the server ends it; the end follows at once. asyncpg would drop it, and
            # until the end came answer the next statement with an error about its own state.
            session.sqlstate = session.last_word = base.fatal_state(data) or ""
        else:
            _data_received(self, data)

    def query(self, query: str, *rest: Any) -> Awaitable[Any]:
        self.cenote.executes(query)
        return self.cenote.timed(query, super().query(query, *rest))

    def bind_execute(self, state: Any, *rest: Any, **more: Any) -> Awaitable[Any]:
        self.cenote.executes(state.query)
        return self.cenote.timed(state.query, super().bind_execute(state, *rest, **more))

    def bind_execute_many(self, state: Any, *rest: Any, **more: Any) -> Awaitable[Any]:
        self.cenote.executes(state.query)
        return self.cenote.timed(state.query, super().bind_execute_many(state, *rest, **more))

    def bind(self, state: Any, *rest: Any) -> Awaitable[Any]:
        self.cenote.executes(state.query)
        return self.cenote.timed(state.query, super().bind(state, *rest))

    def copy_out(self, copy_stmt: str, *rest: Any) -> Awaitable[Any]:
        self.cenote.executes(copy_stmt)
        return self.cenote.timed(copy_stmt, super().copy_out(copy_stmt, *rest))

    def copy_in(self, copy_stmt: str, *rest: Any) -> Awaitable[Any]:
        self.cenote.executes(copy_stmt)
        return self.cenote.timed(copy_stmt, super().copy_in(copy_stmt, *rest))

    def prepare(self, stmt_name: str, query: str, *rest: Any, **more: Any) -> Awaitable[Any]:
        return self.cenote.timed(query, super().prepare(stmt_name, query, *rest, **more))

    def execute(self, state: Any, *rest: Any) -> Awaitable[Any]:
        return self.cenote.timed(state.query, super().execute(state, *rest))

    def close_portal(self, *rest: Any) -> Awaitable[Any]:
        return self.cenote.timed(self.cenote.last_sql, super().close_portal(*rest))

    def close_statement(self, *rest: Any) -> Awaitable[Any]:
        return self.cenote.timed(self.cenote.last_sql, super().close_statement(*rest))


@functools.cache
def lease_class(parent: type[Any]) -> type[Any]:
    """The class of leases: `parent` (asyncpg.Connection or the user's subclass of it), watched."""

    class Lease(parent):  # type: ignore[misc]
        """An asyncpg connection on loan from a pool."""

        __slots__ = ("_cenote",)
        _cenote: Session

        def __init__(self, protocol: Any, transport: Any, *rest: Any, **more: Any) -> None:
            super().__init__(protocol, transport, *rest, **more)
            self._cenote = Session(protocol, transport)
            protocol.__class__ = _Protocol
            protocol.cenote = self._cenote
            transport.set_protocol(protocol)  # uvloop keeps the bound method that it calls

        def __del__(self) -> None:
            """Nothing: asyncpg's would warn and terminate; the pool reports a dropped lease and closes it."""

        async def close(self, **how: Any) -> None:
            self._ends()
            await super().close(**how)

        def terminate(self) -> None:
            self._ends()
            super().terminate()

        def _ends(self) -> None:
            """Note who closes: asyncpg itself terminates when a cancel request fails."""
            if not self.is_closed():
                try:
                    asyncpg_does = asyncio.current_task() in self._cancellations
                except RuntimeError:  # no event loop runs here
                    asyncpg_does = False
                self._cenote.by_borrower = not asyncpg_does

        def _abort(self) -> None:
            # The server may live on after a terminate(): closing waits for its end on a second descriptor.
            session = self._cenote
            if session.opened and session.last_socket is None:
                session.last_socket = session.duplicate()
            super()._abort()
            if session.last_socket is not None:
                shut(session.last_socket)

        # Objects that hold the connection, and attributes: see `tidy`.

        def transaction(self, **how: Any) -> Any:
            self._cenote.attributes = True
            return super().transaction(**how)

        def cursor(self, *args: Any, **how: Any) -> Any:
            self._cenote.attributes = True
            return super().cursor(*args, **how)

        async def prepare(self, query: str, *, name: Any = None, **how: Any) -> Any:
            session = self._cenote
            session.attributes = True
            if name is not None:  # asyncpg before 0.25 has no names; None is the default since
                how["name"] = name
            if not isinstance(name, str):
                return await super().prepare(query, **how)
            session.touched |= touch.PREPARED  # before it is sent: a cancel may leave it on the server
            statement = await super().prepare(query, **how)
            session.named.append(statement._state)
            return statement

        def _maybe_gc_stmt(self, stmt: Any) -> None:
            # A statement that a reset dropped must not be closed again: the name may be another's by now.
            forgotten = self._cenote.forgotten
            if stmt not in forgotten:
                super()._maybe_gc_stmt(stmt)
            elif stmt.refs == 0:
                forgotten.discard(stmt)

        async def add_listener(self, channel: str, callback: Any) -> None:
            self._cenote.calls_back()
            await super().add_listener(channel, callback)

        async def remove_listener(self, channel: str, callback: Any) -> None:
            self._cenote.calls_back()
            await super().remove_listener(channel, callback)

        def add_log_listener(self, callback: Any) -> None:
            self._cenote.calls_back()
            super().add_log_listener(callback)

        def remove_log_listener(self, callback: Any) -> None:
            self._cenote.calls_back()
            super().remove_log_listener(callback)

        def add_query_logger(self, callback: Any) -> None:
            self._cenote.calls_back()
            super().add_query_logger(callback)

        def remove_query_logger(self, callback: Any) -> None:
            self._cenote.calls_back()
            super().remove_query_logger(callback)

        def add_termination_listener(self, callback: Any) -> None:
            self._cenote.calls_back()
            super().add_termination_listener(callback)

        def remove_termination_listener(self, callback: Any) -> None:
            self._cenote.calls_back()
            super().remove_termination_listener(callback)

        async def _introspect_type(self, typename: str, schema: str) -> Any:
            # The first step of the three methods that change a codec, and of nothing else.
            record = await super()._introspect_type(typename, schema)
            key = (record["oid"], typename, schema)
            self._cenote.attributes = True
            self._cenote.codecs.pop(key, None)
            self._cenote.recoded[key] = introspection.is_scalar_type(record)
            return record

        async def set_type_codec(self, typename: str, *, schema: str = "public", **how: Any) -> None:
            await super().set_type_codec(typename, schema=schema, **how)
            self._remember_codec(typename, schema, _set_codec, how)

        async def set_builtin_type_codec(self, typename: str, *, schema: str = "public", **how: Any) -> None:
            await super().set_builtin_type_codec(typename, schema=schema, **how)
            self._remember_codec(typename, schema, _set_builtin_codec, how)

        def _remember_codec(self, typename: str, schema: str, setter: Any, how: dict[str, Any]) -> None:
            session = self._cenote
            key = next(key for key in session.recoded if key[1:] == (typename, schema))
            if session.recoded[key]:
                session.codecs[key] = functools.partial(setter, session.protocol.get_settings(), key, **how)
            else:
                session.codecs[key] = None  # a composite type: its attributes would have to be asked again

        async def _introspect_types(self, *args: Any) -> Any:
            # asyncpg turns `jit` off for its own query and back on after it: no touch of the borrower's,
            # unless it is interrupted in between.
            touched = self._cenote.touched
            answer = await super()._introspect_types(*args)
            self._cenote.touched = touched
            return answer

    return Lease


def _set_codec(settings: Any, key: CodecKey, *, encoder: Any, decoder: Any, format: str = "text") -> None:
    settings.add_python_codec(*key, [], "scalar", encoder, decoder, format)


def _set_builtin_codec(settings: Any, key: CodecKey, *, codec_name: str, format: str | None = None) -> None:
    settings.set_builtin_type_codec(*key, "scalar", codec_name, format)


def shut(last: socket.socket) -> None:
    """End our direction: an event loop that aborts may drop the Terminate it had not sent yet (uvloop)."""
    try:
        last.shutdown(socket.SHUT_WR)
    except OSError:
        pass
