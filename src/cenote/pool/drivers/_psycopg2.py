"""Leases of psycopg2: the connection, its cursors, and what is noted of them.

Cursors are given their statements in Python, everything below is C: so each cursor that a lease hands out is
of a subclass, of whatever class was asked for. The connection's class marks changes of its attributes.
Nothing here decides about pooling; `psycopg2.py` does.
"""

import ctypes
import datetime
import decimal
import functools
import sys
import threading
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import psycopg2
from psycopg2 import extensions
from psycopg2.sql import Composable

from cenote.pool.drivers import base
from cenote.sql import touch
from cenote.sql.classify import classify

PlainConnection: Any = extensions.connection
PlainCursor: Any = extensions.cursor

# (isolation level, readonly, deferrable) as psycopg2 starts with.
LEVELS = (None, None, None)
_WATCHED_ATTRIBUTES = frozenset(
    ("autocommit", "isolation_level", "readonly", "deferrable", "cursor_factory", "notices", "notifies")
)

# Parameters of these types become one literal each, whatever their value; of others (AsIs, Json, one's own
# adapters) the text that is sent is read instead of the template.
_LITERALS = frozenset(
    (
        *(type(None), bool, int, float, str, bytes, memoryview, decimal.Decimal, uuid.UUID),
        *(datetime.date, datetime.time, datetime.datetime, datetime.timedelta),
    )
)


class Session(base.Session):
    """What is known of one connection."""

    __slots__ = ("base", "base_touched", "born", "canceller", "cancelling", "seen", "seen_touches")

    def __init__(self) -> None:
        super().__init__()
        self.cancelling = threading.Lock()  # held while a cancel request is on its way
        self.canceller: Canceller | None = None
        self.base_touched = 0
        self.seen = ""
        self.seen_touches = 0
        self.born = self.base = Attributes()

    def executes(self, text: str) -> None:
        """Note a statement that is about to be sent."""
        if text is not self.seen:  # a loop sends the same text again: spare the look-up
            self.seen = self.last_sql = text
            self.seen_touches = classify(text).touches
        self.touched |= self.seen_touches
        self.statements += 1

    @contextmanager
    def timed(self) -> Iterator[None]:
        self.query_starts()
        try:
            yield
        except psycopg2.Error as error:
            self.sqlstate = error.pgcode or ""
            raise
        finally:
            self.query_ends()


def _find_libpq() -> Any:
    """The libpq that psycopg2 is linked to, None where its functions cannot be found."""
    try:
        # A look-up in an extension module also searches the libraries it is linked to.
        library = ctypes.CDLL(sys.modules["psycopg2._psycopg"].__file__)
        library.PQgetCancel.argtypes = library.PQfreeCancel.argtypes = [ctypes.c_void_p]
        library.PQgetCancel.restype = ctypes.c_void_p
        library.PQfreeCancel.restype = None
        library.PQcancel.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int]
    except (KeyError, OSError, AttributeError):
        return None
    return library


_libpq = _find_libpq()


class Canceller:
    """Cancels the query of one connection, from any thread.

    psycopg2's own `cancel` keeps the interpreter's lock while it dials, so that one unreachable server would
    stop every thread of the process. libpq's object may be used while the connection is, or after it."""

    def __init__(self, pgconn: int) -> None:
        self._request = _libpq.PQgetCancel(pgconn)

    def send(self) -> None:
        """Returns when the server has taken the request; raises psycopg2's error when it has not."""
        says = ctypes.create_string_buffer(256)
        if not _libpq.PQcancel(self._request, says, len(says)):
            raise psycopg2.OperationalError(says.value.decode(errors="replace"))

    def __del__(self) -> None:
        if _libpq is not None:  # at the interpreter's end modules lose their names
            _libpq.PQfreeCancel(self._request)


class Attributes:
    """The client-side state of a connection object."""

    __slots__ = (
        "autocommit",
        "binary_types",
        "cursor_factory",
        "encoding",
        "levels",
        "notices",
        "notifies",
        "string_types",
    )

    def __init__(self, conn: Any = None) -> None:
        self.autocommit: bool = conn.autocommit if conn else False
        self.levels = levels(conn) if conn else LEVELS
        self.cursor_factory = conn.cursor_factory if conn else None
        self.encoding: str = conn.encoding if conn else ""
        self.notices = conn.notices if conn else []
        self.notifies = conn.notifies if conn else []
        self.string_types = dict(conn.string_types) if conn else {}
        self.binary_types = dict(conn.binary_types) if conn else {}


def levels(conn: Any) -> tuple[Any, Any, Any]:
    return (conn.isolation_level, conn.readonly, conn.deferrable)


@functools.cache
def lease_class(parent: Any) -> Any:
    """The class of leases: `parent` (psycopg2's connection or a subclass of it), watched."""
    plain = parent is PlainConnection

    class Lease(parent):  # type: ignore[misc]
        """A psycopg2 connection on loan from a pool."""

        __slots__ = ("_cenote",)

        def __init__(self, *args: Any, **more: Any) -> None:
            self._cenote = session = Session()
            super().__init__(*args, **more)
            session.canceller = Canceller(self.pgconn_ptr) if _libpq is not None else None

        def _cenote_cursor(self) -> Any:
            return super().cursor()

        def cursor(self, *args: Any, **how: Any) -> Any:
            if plain and not args and not how and self.cursor_factory is None:
                return super().cursor(cursor_factory=WatchedCursor)
            cursor = super().cursor(*args, **how)
            if getattr(cursor, "_cenote_watched", False):
                return cursor
            if len(args) > 1 or not isinstance(cursor, PlainCursor):
                self._cenote.touched |= touch.UNKNOWN  # not a class we can extend: what it sends is not seen
                return cursor
            # The class is known now; a cursor costs no round trip until it executes.
            return super().cursor(*args, **{**how, "cursor_factory": cursor_class(_class_of(cursor))})

        def __setattr__(self, name: str, value: Any) -> None:
            if name in _WATCHED_ATTRIBUTES:
                with self._characteristics():
                    super().__setattr__(name, value)
            else:
                super().__setattr__(name, value)

        def set_session(self, *args: Any, **how: Any) -> None:
            with self._characteristics():
                super().set_session(*args, **how)

        def set_isolation_level(self, *args: Any) -> None:
            with self._characteristics():
                super().set_isolation_level(*args)

        @contextmanager
        def _characteristics(self) -> Iterator[None]:
            """Around a change of attributes: in autocommit psycopg2 turns transaction levels into settings."""
            before = self.autocommit, levels(self)
            self._cenote.attributes = True
            try:
                yield
            finally:
                in_autocommit = not self.closed and (before[0] or self.autocommit)
                if in_autocommit and (before[1] != LEVELS or levels(self) != LEVELS):
                    self._cenote.touched |= touch.SETTINGS

        def set_client_encoding(self, *args: Any) -> None:
            self._cenote.attributes = True
            self._cenote.touched |= touch.SETTINGS
            super().set_client_encoding(*args)

        def reset(self) -> None:
            self._cenote.attributes = True
            self._cenote.touched |= touch.DISCARDED  # it sends DISCARD ALL, which undoes init_query as well
            with self._cenote.timed():
                super().reset()

        def commit(self) -> None:
            with self._cenote.timed():
                super().commit()

        def rollback(self) -> None:
            with self._cenote.timed():
                super().rollback()

        def cancel(self) -> None:
            session = self._cenote
            with session.cancelling:  # a reset waits for this: it must not arrive during the next lease
                if session.canceller is None:
                    super().cancel()
                else:
                    session.canceller.send()

    return Lease


@functools.cache
def cursor_class(parent: Any) -> Any:
    """The class of a lease's cursors: `parent` (psycopg2's cursor or a subclass of it), watched."""

    class Cursor(parent):  # type: ignore[misc]
        """A psycopg2 cursor that notes what it sends."""

        __slots__ = ()
        _cenote_watched = True

        def execute(self, query: Any, vars: Any = None) -> Any:
            session: Session = self.connection._cenote
            query = _text(self, query)
            if self.name is not None and self.withhold:
                session.touched |= touch.CURSOR
            session.executes(_shown(self, query, vars))
            session.query_starts()  # `timed()` written out: this is the busiest path, and it costs a microsecond
            try:
                return super().execute(query, vars)
            except psycopg2.Error as error:
                session.sqlstate = error.pgcode or ""
                raise
            finally:
                session.query_ends()

        def executemany(self, query: Any, vars_list: Iterable[Any]) -> Any:
            session: Session = self.connection._cenote
            query = _text(self, query)

            def noted() -> Iterator[Any]:
                for row in vars_list:
                    session.executes(_shown(self, query, row))
                    yield row

            with session.timed():
                return super().executemany(query, noted())

        def callproc(self, procname: str, *parameters: Any) -> Any:
            session: Session = self.connection._cenote
            session.executes(f"SELECT * FROM {procname}()")
            with session.timed():
                return super().callproc(procname, *parameters)

        def copy_expert(self, sql: Any, *rest: Any, **how: Any) -> Any:
            session: Session = self.connection._cenote
            sql = _text(self, sql)
            session.executes(_shown(self, sql, None))
            with session.timed():
                return super().copy_expert(sql, *rest, **how)

        def copy_from(self, *args: Any, **how: Any) -> Any:
            session: Session = self.connection._cenote
            session.executes("COPY FROM STDIN")
            with session.timed():
                return super().copy_from(*args, **how)

        def copy_to(self, *args: Any, **how: Any) -> Any:
            session: Session = self.connection._cenote
            session.executes("COPY TO STDOUT")
            with session.timed():
                return super().copy_to(*args, **how)

    return Cursor


WatchedCursor = cursor_class(PlainCursor)


def _class_of(cursor: Any) -> Any:
    return type(cursor)


def _text(cursor: Any, query: Any) -> Any:
    if type(query) is str:
        return query
    return query.as_string(cursor) if isinstance(query, Composable) else query


def _shown(cursor: Any, query: Any, vars: Any) -> str:
    """The text to classify: the template, which repeats, unless a parameter may be more than a literal."""
    if vars is not None and not _only_literals(vars):
        query = cursor.mogrify(query, vars)
    if isinstance(query, bytes):
        return query.decode(extensions.encodings.get(cursor.connection.encoding, "utf-8"), "replace")
    return str(query)


def _only_literals(vars: Any) -> bool:
    if not isinstance(vars, (tuple, list)):  # first: a check against Mapping, an abstract class, is slow
        if not isinstance(vars, Mapping):
            return False
        vars = vars.values()
    for value in vars:
        kind = type(value)
        if kind not in _LITERALS and not (
            kind in (list, tuple) and all(type(item) in _LITERALS for item in value)
        ):
            return False
    return True


set_autocommit = PlainConnection.autocommit.__set__  # of the class itself, which notes nothing


def alone(conn: Any, sql: Any, params: Any = None, cursor: Any = None) -> Any:
    """Run one statement outside a transaction, unnoted; returns the cursor with its result."""
    if cursor is None:
        cursor = PlainCursor(conn)
    if conn.autocommit:
        cursor.execute(sql, params)
    elif levels(conn) == LEVELS:
        set_autocommit(conn, True)
        try:
            cursor.execute(sql, params)
        finally:
            if not conn.closed:
                set_autocommit(conn, False)
    else:  # in autocommit psycopg2 would turn the levels into settings, by a round trip each
        try:
            cursor.execute(sql, params)
        except BaseException:
            if not conn.closed:
                PlainConnection.rollback(conn)
            raise
        PlainConnection.commit(conn)
    return cursor


def noted(conn: Any, sql: Any, params: Any, cursor: Any) -> Any:
    """`alone`, noted here: `cursor` is not watched."""
    session: Session = conn._cenote
    sql = _text(cursor, sql)
    session.executes(_shown(cursor, sql, params))
    session.query_starts()
    try:
        return alone(conn, sql, params, cursor)
    except psycopg2.Error as error:
        session.sqlstate = error.pgcode or ""
        raise
    finally:
        session.query_ends()
