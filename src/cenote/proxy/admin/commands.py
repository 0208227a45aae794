"""What a text on the console means: a SHOW or an order of ours, what drivers send by themselves, or an error that
helps.

It understands and runs nothing. Small talk is answered so that any driver can log in, pool its connection and give
it back; it changes nothing here.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from cenote.proxy.admin import views
from cenote.proxy.admin.orders import ORDERS, Act
from cenote.proxy.admin.refusal import Refusal
from cenote.proxy.admin.table import Row
from cenote.proxy.admin.tables import HELP, TABLES, help_for
from cenote.proxy.admin.values import Column, Value
from cenote.sql import lexer

# Old enough that no client warns of being older, new enough that none refuses.
SERVER_VERSION = f"14.0 (Cenote {views.version()})"
_VERSION_TEXT = f"PostgreSQL 14.0 compatible console of Cenote {views.version()}"
_MAX_STATEMENTS = 20  # in one text: each may be a long answer

#: What a client is told at log-in, and what SHOW of these names says.
PARAMETERS = {
    "server_version": SERVER_VERSION,
    "server_encoding": "UTF8",
    "client_encoding": "UTF8",
    "DateStyle": "ISO, MDY",
    "TimeZone": "UTC",
    "IntervalStyle": "postgres",
    "integer_datetimes": "on",
    "standard_conforming_strings": "on",
    "is_superuser": "off",
    "default_transaction_read_only": "off",
    "in_hot_standby": "off",
}
_SHOWN = {
    **{name.lower(): value for name, value in PARAMETERS.items()},
    "server_version_num": "140000",
    "transaction isolation level": "read committed",
    "transaction_isolation": "read committed",
    "default_transaction_isolation": "read committed",
    "transaction_read_only": "off",
    "transaction_deferrable": "off",
    "search_path": "public",
    "application_name": "",
    "bytea_output": "hex",
    "extra_float_digits": "1",
    "max_identifier_length": "63",
    "statement_timeout": "0",
    "time zone": "UTC",
}
_TABLES = {table.name.lower(): table for table in TABLES}
_ORDERS = {order.name.lower(): order for order in ORDERS}

# One row of one column.
_SELECTED: dict[str, tuple[Column, Value]] = {
    "version ( )": (Column("version", "text"), _VERSION_TEXT),
    "current_schema ( )": (Column("current_schema", "text"), "public"),
    "current_schema": (Column("current_schema", "text"), "public"),
    "current_database ( )": (Column("current_database", "text"), "cenote"),
    "pg_is_in_recovery ( )": (Column("pg_is_in_recovery", "bool"), False),
    "pg_advisory_unlock_all ( )": (Column("pg_advisory_unlock_all", "text"), ""),
}
# Drivers look for types that extensions bring (hstore); there are none.
_CATALOG_OF_TYPES = "from pg_type"

# Verbs that are answered with their tag, and what they do to the transaction.
_TAGS = {
    "set": "SET",
    "reset": "RESET",
    "unlisten": "UNLISTEN",
    "begin": "BEGIN",
    "start": "START TRANSACTION",
    "commit": "COMMIT",
    "end": "COMMIT",
    "rollback": "ROLLBACK",
    "abort": "ROLLBACK",
    "savepoint": "SAVEPOINT",
    "release": "RELEASE",
}
_BEGIN, _COMMIT, _ROLLBACK, _BACK_TO = "begin", "commit", "rollback", "back_to"
_TURNS = {
    "begin": _BEGIN,
    "start": _BEGIN,
    "commit": _COMMIT,
    "end": _COMMIT,
    "rollback": _ROLLBACK,
    "abort": _ROLLBACK,
}
_SQL = frozenset(
    (
        "select",
        "insert",
        "update",
        "delete",
        "merge",
        "with",
        "values",
        "table",
        "create",
        "alter",
        "drop",
        "copy",
        "call",
        "do",
        "execute",
        "prepare",
        "declare",
        "fetch",
        "listen",
        "notify",
        "lock",
        "truncate",
        "vacuum",
        "analyze",
        "explain",
        "grant",
    )
)


@dataclass(frozen=True, slots=True)
class Command:
    """A statement that is understood.

    columns: of its result; empty: it has none
    order: what it does to the daemon, as the log names it; `act` does it, and may give the rows
    turn: what it does to the transaction: begin, commit, rollback, back_to (a savepoint), or nothing
    forgets: the prepared statement that it deallocates; "*" all
    parameters: it is sent with parameters, which do not matter
    """

    tag: str
    columns: tuple[Column, ...] = ()
    rows: Callable[[], Iterable[Row]] = list
    order: str = ""
    act: Act | None = None
    turn: str = ""
    forgets: str = ""
    parameters: bool = False


def understand(text: str, daemon: Any) -> list[Command]:
    """The statements of a text; none if it is empty.

    :raises Refusal: one of them is not known here; nothing of the text is to run
    """
    spans = lexer.split(text)
    if len(spans) > _MAX_STATEMENTS:
        raise Refusal("54000", f"cenote: {len(spans)} statements in one text; {_MAX_STATEMENTS} are the most here")
    return [_command(text[start:end], daemon) for start, end in spans]


def _command(text: str, daemon: Any) -> Command:
    words = _words(text)
    verb, rest = words[0] if words else "", " ".join(words[1:])
    order = _ORDERS.get(verb)
    if order is not None:
        arguments = _arguments(text)
        act = order.act(arguments)
        return Command(order.name, order.columns, order=f"{order.name} {arguments}".rstrip(), act=act)
    if verb == "help":
        return _help(words[1:], text, daemon)
    if verb == "show":
        return _show(rest, text, daemon)
    if verb == "select":
        found = _select(rest)
        if found is not None:
            return found
    elif verb == "discard":
        return Command(f"DISCARD {rest.upper()}", forgets="*" if rest == "all" else "")
    elif verb == "deallocate":
        name = rest.removeprefix("prepare ")
        return Command("DEALLOCATE ALL" if name == "all" else "DEALLOCATE", forgets="*" if name == "all" else name)
    elif verb == "close" and rest == "all":
        return Command("CLOSE CURSOR ALL")
    elif verb in _TAGS:
        turn = _TURNS.get(verb, "")
        if turn == _ROLLBACK and "to" in words:
            turn = _BACK_TO
        return Command(_TAGS[verb], turn=turn)
    if verb in _SQL:
        raise Refusal("0A000", "cenote: this is the console of the pooler, not a database: it runs no SQL")
    raise _unknown(text, verb, rest)


def _help(words: list[str], text: str, daemon: Any) -> Command:
    if not words:
        return Command("HELP", HELP.columns, lambda: HELP.read(daemon))
    found = help_for(words)
    if found is None:
        raise _unknown(text, "help", " ".join(words))
    return Command("HELP", HELP.columns, lambda: found)


def _show(what: str, text: str, daemon: Any) -> Command:
    table = _TABLES.get(what)
    if table is not None:
        return Command("SHOW", table.columns, lambda: table.read(daemon))
    value = _SHOWN.get(what)
    if value is not None:
        name = what.replace("transaction isolation level", "transaction_isolation").replace(
            "time zone", "TimeZone"
        )
        return Command("SHOW", (Column(name, "text"),), lambda: [(value,)])
    raise _unknown(text, "show", what)


def _select(what: str) -> Command | None:
    what = what.replace("pg_catalog . ", "")
    if what.isdecimal() and len(what) < 19:
        number = int(what)
        return Command("SELECT", (Column("?column?", "int"),), lambda: [(number,)])
    found = _SELECTED.get(what)
    if found is not None:
        column, value = found
        return Command("SELECT", (column,), lambda: [(value,)])
    if _CATALOG_OF_TYPES in what:
        return Command("SELECT", (Column("oid", "int"),), parameters=True)
    return None


def _unknown(text: str, verb: str, rest: str) -> Refusal:
    shown = text if len(text) <= 60 else f"{text[:60]}..."
    near = _near(verb, rest)
    question = f'; did you mean "{near}"?' if near else ""
    return Refusal("42601", f'cenote: the console does not know "{shown}"{question}')


def _near(verb: str, rest: str) -> str:
    """The command that may have been meant; "" if none is like it."""
    if verb == "show":
        found = difflib.get_close_matches(rest, _TABLES, 1)
        return f"SHOW {found[0].upper()}" if found else ""
    if verb == "help":
        found = difflib.get_close_matches(rest.removeprefix("show "), [*_ORDERS, *_TABLES], 1)
        return f"HELP {found[0].upper()}" if found else ""
    found = difflib.get_close_matches(verb, [*_ORDERS, "show", "help"], 1)
    if found == ["show"]:
        return _near("show", rest) or "SHOW"
    if found:
        return found[0].upper()
    return f"SHOW {verb.upper()}" if verb in _TABLES and not rest else ""


def _arguments(text: str) -> str:
    """What follows the first word, as it was written, without comments."""
    parts = [text[start:end] for kind, start, end in lexer.tokenize(text) if kind != lexer.COMMENT]
    return "".join(parts).strip().partition(" ")[2].strip() if len(parts) > 1 else ""


def _words(text: str) -> list[str]:
    """The tokens that count, words in lower case, quoted names without their quotes."""
    words = []
    for kind, start, end in lexer.tokenize(text):
        raw = text[start:end]
        if kind == lexer.WORD:
            words.append(raw.lower())
        elif kind == lexer.QUOTED:
            words.append(raw.strip('"'))
        elif kind not in (lexer.SPACE, lexer.COMMENT):
            words.append(raw)
    return words
