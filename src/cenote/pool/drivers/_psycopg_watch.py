"""How statements are seen: the half that both psycopg 3 connection classes have in common.

The seams are those that all cursors share, also one that the borrower makes himself (`psycopg.Cursor(conn)`):
the connection's cache of prepared statements, which is asked about each query; `_exec_command`, which sends
psycopg's own commands; and `wait`, through which every byte goes, so that a generator nobody knows marks the
session UNKNOWN. Changed attributes are seen by `__setattr__`, so that reading them costs nothing.

It refuses to patch psycopg, and no object here holds the connection: a dropped lease is collected at once.
What a borrower does with `conn.pgconn` himself (the libpq handle) is the one path that is not seen.
tests/contract/test_driver_psycopg.py fails when a release of psycopg moves a seam.
"""

import functools
import math
from collections.abc import Callable
from time import monotonic
from types import CodeType
from typing import Any

from cenote.pool.drivers._psycopg_dial import Waits, dial, dial_until
from cenote.pool.drivers.base import Session
from cenote.sql import touch
from cenote.sql.classify import classify

import psycopg  # isort: skip  (after `_psycopg_dial`, which says what to install)
from psycopg import generators  # isort: skip
from psycopg._connection_base import BaseConnection  # isort: skip
from psycopg._copy_base import BaseCopy  # isort: skip
from psycopg._cursor_base import BaseCursor  # isort: skip
from psycopg._pipeline_base import BasePipeline  # isort: skip
from psycopg._preparing import PrepareManager  # isort: skip
from psycopg._server_cursor_base import ServerCursorMixin  # isort: skip
from psycopg._typeinfo import TypesRegistry  # isort: skip
from psycopg.adapt import AdaptersMap  # isort: skip
from psycopg.transaction import BaseTransaction  # isort: skip

_WATCHED = frozenset(
    (
        "row_factory",
        "cursor_factory",
        "server_cursor_factory",
        "prepare_threshold",
        "prepared_max",
        "_adapters",
        "_autocommit",
        "_deferrable",
        "_isolation_level",
        "_read_only",
        "_tpc",
    )
)
_BASE = tuple(name for name in sorted(_WATCHED) if name not in ("_adapters", "prepare_threshold", "prepared_max"))

SEEN, SENDS, LISTENS, UNSEEN = range(4)


def _codes(owner: Any, *names: str) -> list[CodeType]:
    """The code of those generators of `owner` that this release of psycopg has."""
    return [getattr(owner, name).__code__ for name in names if hasattr(owner, name)]


# What `wait` is given, by the identity of its code (hashing a code object takes microseconds).
_KNOWN = {
    SEEN: [  # their texts pass through `_Prepared` or `_exec_command`, or they send none
        *_codes(BaseCursor, "_execute_gen", "_executemany_gen_pipeline", "_executemany_gen_no_pipeline"),
        *_codes(BaseCursor, "_stream_fetchone_gen"),
        *_codes(ServerCursorMixin, "_fetch_gen", "_scroll_gen", "_close_gen"),
        *_codes(BaseConnection, "_commit_gen", "_rollback_gen", "_set_autocommit_gen"),
        *_codes(BaseConnection, "_set_isolation_level_gen", "_set_read_only_gen", "_set_deferrable_gen"),
        *_codes(BaseConnection, "_tpc_begin_gen", "_tpc_prepare_gen", "_tpc_finish_gen"),
        *_codes(BasePipeline, "_enter_gen", "_exit_gen", "_sync_gen", "_fetch_gen"),
        *_codes(BaseTransaction, "_enter_gen", "_exit_gen"),
        *_codes(BaseCopy, "_read_gen", "_read_row_gen", "_end_copy_out_gen"),
        *_codes(generators, "copy_from", "copy_to", "copy_end"),
    ],
    # They send their cursor's query themselves.
    SENDS: [
        *_codes(BaseCursor, "_stream_send_gen", "_start_copy_gen"),
        *_codes(ServerCursorMixin, "_declare_gen"),
    ],
    LISTENS: _codes(generators, "notifies"),
}
KINDS = {id(code): kind for kind, codes in _KNOWN.items() for code in codes}


# What was said of a text in bytes, so that a repeated statement costs one look-up (0.9 us became 0.2 us).
# ASCII only, because it means the same in every client encoding; short ones; emptied when full.
_seen: dict[bytes, tuple[str, int]] = {}
_SEEN_MOST, _SEEN_LONGEST = 2048, 2048


def _note(session: Session, pgconn: Any, text: bytes) -> None:
    """A statement is about to be sent, or was just given to libpq."""
    said = _seen.get(text)
    if said is None:
        ascii_only = text.isascii()
        sql = text.decode() if ascii_only else text.decode(pgconn._encoding, "replace")
        said = sql, classify(sql).touches
        if ascii_only and len(text) <= _SEEN_LONGEST:
            if len(_seen) >= _SEEN_MOST:
                _seen.clear()
            _seen[text] = said
    session.last_sql, touches = said
    session.statements += 1
    if touches:
        session.touched |= touches


class _Prepared(PrepareManager):
    """psycopg's cache of prepared statements: every cursor asks it about every query it executes."""

    def __init__(self, session: Session, pgconn: Any) -> None:
        super().__init__()
        self._session = session
        self._pgconn = pgconn  # not the connection: a dropped lease must be collected at once
        self._asked: Any = None

    def get(self, query: Any, prepare: bool | None = None) -> Any:
        _note(self._session, self._pgconn, query.query)
        self._asked = query
        return PrepareManager.get(self, query, prepare)

    def maybe_add_to_cache(self, query: Any, prep: Any, name: bytes) -> Any:
        if self._asked is query:
            self._asked = None
        else:  # a ClientCursor does not ask, it only tells
            _note(self._session, self._pgconn, query.query)
        return PrepareManager.maybe_add_to_cache(self, query, prep, name)


def _marks(method: Callable[..., Any]) -> Any:
    """`method` of the connection, noting that it changes a client-side attribute."""

    @functools.wraps(method)
    def marked(self: Any, *args: Any, **kwargs: Any) -> Any:
        self._session.attributes = True
        return method(self, *args, **kwargs)

    return marked


class _Types(TypesRegistry):
    _session: Session
    add = _marks(TypesRegistry.add)
    clear = _marks(TypesRegistry.clear)


class _Adapters(AdaptersMap):
    _session: Session
    register_dumper = _marks(AdaptersMap.register_dumper)
    register_loader = _marks(AdaptersMap.register_loader)

    def __init__(self, template: AdaptersMap, session: Session) -> None:
        super().__init__(template)
        self._session = session
        self.types = types = _Types(template.types)
        types._session = session


class Watched(BaseConnection[Any]):
    """Mixed into psycopg's connection classes: notes statements, errors and changed attributes."""

    # psycopg asks for it by name: no warning when a lease is dropped (the pool gives its own), and
    # `with conn:` ends the transaction without closing.
    _pool: Any = "cenote"

    _session: Session
    _prepared: Any
    _base: dict[str, Any]
    _base_handlers: tuple[list[Any], list[Any]]
    _base_adapters: AdaptersMap
    _base_prepare: tuple[int | None, int | None]
    _block: Any
    _wants_primary: bool
    _doubtful: bool  # a primary was asked for, and the server said it is read only

    def __init__(self, pgconn: Any, *args: Any) -> None:
        self.__dict__["_session"] = session = Session()
        super().__init__(pgconn, *args)
        self._prepared = _Prepared(session, pgconn)
        self._wants_primary = self._doubtful = False
        self._block = None

    @classmethod
    def _connect_gen(cls, conninfo: str = "", *, timeout: float = math.inf) -> Waits:
        # Up to psycopg 3.2 the time for one host is counted here, later by who waits.
        pgconn = yield from dial(conninfo, min(dial_until.get(), monotonic() + timeout))
        return cls(pgconn)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _WATCHED:
            self._session.attributes = True
        object.__setattr__(self, name, value)

    add_notice_handler = _marks(BaseConnection.add_notice_handler)
    remove_notice_handler = _marks(BaseConnection.remove_notice_handler)
    add_notify_handler = _marks(BaseConnection.add_notify_handler)
    remove_notify_handler = _marks(BaseConnection.remove_notify_handler)

    def _exec_command(self, command: Any, *args: Any, **kwargs: Any) -> Waits:
        if isinstance(command, str):
            command = command.encode(self.pgconn._encoding)
        elif not isinstance(command, bytes):
            command = command.as_bytes(self)
        if command.startswith(b"DEALLOCATE "):  # of its own prepared statements: that leaves nothing behind
            self._session.statements += 1
            self._session.last_sql = command.decode()
        else:
            _note(self._session, self.pgconn, command)
        return super()._exec_command(command, *args, **kwargs)

    def _before(self, gen: Any, kind: int) -> tuple[Any, Any] | None:
        """Before a wait that is not `SEEN`: the cursor whose query will be read after it, and its query now."""
        if kind == UNSEEN:
            self._session.touched |= touch.UNKNOWN
        if kind != SENDS or gen.gi_frame is None:
            return None
        cursor = gen.gi_frame.f_locals["self"]
        return cursor, cursor._query

    def _after(self, sender: tuple[Any, Any]) -> None:
        cursor, before = sender
        query = cursor._query
        if query is not None and query is not before:
            _note(self._session, self.pgconn, query.query)

    def _failed(self, error: psycopg.Error) -> None:
        sqlstate = error.sqlstate
        if sqlstate:
            self._session.sqlstate = sqlstate
            if sqlstate == "25006" and self._wants_primary:
                self._doubtful = True
                # Dropped plans need no statement; the flag makes the pool call `reset`, which asks.
                self._session.touched |= touch.PLANS


def settle(conn: Any) -> None:
    session = conn._session
    values = conn.__dict__
    values["_base"] = {name: values[name] for name in _BASE}
    values["_base_handlers"] = conn._notice_handlers[:], conn._notify_handlers[:]
    values["_base_prepare"] = conn.prepare_threshold, conn.prepared_max
    values["_base_adapters"] = AdaptersMap(conn.adapters)
    tidy(conn)
    session.touched = 0
    session.sqlstate = session.last_sql = ""
    session.statements = 0
    session.in_query_s = 0.0


def tidy(conn: Any) -> None:
    values = conn.__dict__
    values.update(conn._base)
    values["_begin_statement"] = b""
    notice, notify = conn._base_handlers
    values["_notice_handlers"] = notice[:]
    values["_notify_handlers"] = notify[:]
    conn._prepared.prepare_threshold, conn.prepared_max = conn._base_prepare
    values["_adapters"] = _Adapters(conn._base_adapters, conn._session)
    conn._session.attributes = False
    conn._session.kept = None
