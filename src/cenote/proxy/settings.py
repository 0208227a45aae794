"""The settings of a client, and the SQL that makes a server connection carry them.

A client's startup parameters are settings like any others, and so is its role: a connection keeps the base state
that its own log-in and `init_query` gave it, and carries the settings of the client it serves. Equal settings are
one object, so that the pool machine compares identities. What they are after a SET, `state.py` finds out.

Source: PostgreSQL documentation, `set_config` and "Setting Parameters": values come in as they stand in a
startup packet, which `set_config` takes, and SET too but for the few lists that it would quote anew.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from cenote.sql.lexer import split
from cenote.wire import messages

# Client encodings in which a byte below 128 may be the second half of a character: texts cannot be read.
_OPAQUE = frozenset(
    b"sjis shiftjis mskanji win932 windows932 shiftjis2004 big5 win950 windows950 "
    b"gbk win936 windows936 uhc win949 windows949 gb18030 johab".split()
)
_ENCODING_NAME = re.compile(rb"[^a-z0-9]")
NAME_BYTES = 63  # longer ones are cut by the server

APPLICATION_NAME = b"application_name"
ROLES = (b"session_authorization", b"role")
TIMEOUT = b"statement_timeout"
# Not to be changed any more on a connection that has once used a temporary table.
TEMP_BUFFERS = b"temp_buffers"
IDLE_TIMEOUT = b"idle_session_timeout"
MAX_PREPARED_BY_SQL = 64  # of one client; one with more is pinned
PATIENCE = b"SET LOCAL statement_timeout = 0"
# A transaction that is serializable, read only and deferrable waits at its first snapshot for others to end.
DEFERRABLE = b"default_transaction_deferrable"
AT_ONCE = b"SET LOCAL transaction_deferrable = off"
#: Ahead of a query of our own, of which there is to be an answer whatever the client has set.
UNHINDERED = AT_ONCE + b";" + PATIENCE + b";"
_SHORT = re.compile(rb"\s*\d{1,3}\s*(?:ms|us)?\s*|.*us\s*|.*[.eExX].*")
# SET would take the list in one constant for one name, and quote it.
_LISTS = frozenset(b"search_path temp_tablespaces session_preload_libraries local_preload_libraries".split())


Pairs = tuple[tuple[bytes, bytes], ...]


class Settings:
    """What one kind of client wants beside the base state. Compared by identity: a pool makes one of each.

    canonical: what the server calls values that the client has put in its own words, where that is known
    customs: names of custom settings among them
    temporary: what is created may be created in the temporary schema
    meaning: the part of it that changes what a text means, None if none does
    prepared: what it has prepared by SQL, names and texts
    opaque: in this client encoding texts cannot be read byte by byte
    hasty: its timeout may strike whatever runs
    expires: the server ends a session with them that is idle, as one in the pool is
    """

    def __init__(self, items: Pairs, meaning: object, prepared: Pairs = ()) -> None:
        self.items = items
        self.prepared = prepared
        self.prepared_names = frozenset(name for name, _ in prepared)
        self.meaning = meaning
        encoding = dict(items).get(b"client_encoding", b"")
        self.temporary = b"pg_temp" in dict(items).get(b"search_path", b"")
        self.canonical: dict[bytes, bytes] = {}
        self.customs = frozenset(name for name, _ in items if b"." in name)
        self.expires = any(name == IDLE_TIMEOUT for name, _ in items)
        self.hasty = _SHORT.fullmatch(dict(items).get(TIMEOUT, b"")) is not None
        self.opaque = _ENCODING_NAME.sub(b"", encoding.lower()) in _OPAQUE

    def cost_from(self, carried: Settings | None, stain: frozenset[bytes]) -> int:
        """What it costs to make a connection carry these: most, to stain it with one more name. O(settings)"""
        before = carried.items if carried is not None else ()
        needless = len(stain) if not self.customs else 0
        texts = set(carried.prepared if carried is not None else ()) ^ set(self.prepared)
        return (
            len(set(before) ^ set(self.items)) + 5 * len(texts) + 100 * len(self.customs - stain) + 10 * needless
        )

    def roles(self) -> list[tuple[bytes, bytes]]:
        """Its role and session authorization, if they are not the log-in's own."""
        return [item for item in self.items if item[0] in ROLES]

    def __repr__(self) -> str:
        return f"<Settings {b' '.join(name + b'=' + value for name, value in self.items).decode('latin-1')}>"


def settings_key(parameters: dict[bytes, bytes]) -> tuple[tuple[bytes, bytes], ...]:
    """Startup parameters in one order, names in lower case."""
    return tuple(sorted((name.lower(), value) for name, value in parameters.items()))


def with_address(name: bytes, address: str) -> bytes:
    """An application_name that says where the client is; the name gives way where both are too long."""
    where = b" - " + address.encode()
    return (name or b"app")[: max(0, NAME_BYTES - len(where))] + where


class Way:
    """A conversion.

    sql: it runs as one transaction
    query: the message that does it before the client's own in the same write, and leaves a failed transaction
        if it fails; b"" where that cannot be
    """

    __slots__ = ("query", "sql")

    def __init__(self, sql: bytes, first: bool) -> None:
        self.sql = sql
        self.query = messages.query(b"BEGIN;" + sql + b";COMMIT") if first else b""


def way(
    carried: Settings | None,
    wanted: Settings | None,
    base: dict[bytes, bytes],
    own: frozenset[bytes] = frozenset(),
) -> Way | None:
    """How to take a connection from one to the other; None: there is nothing to do. O(settings)"""
    sql = conversion(carried, wanted, base, own)
    # A text that cannot be read pins; behind a timeout that strikes at once, nothing may follow unseen; to prepare
    # may take long: a table is locked; and what another connection can do better is to be tried there.
    alone = any(word in sql for word in (PATIENCE, _PREPARING, TEMP_BUFFERS))
    first = not alone and (wanted is None or not (wanted.opaque or wanted.hasty))
    return Way(sql, first) if sql else None


def conversion(
    carried: Settings | None,
    wanted: Settings | None,
    base: dict[bytes, bytes],
    own: frozenset[bytes] = frozenset(),
) -> bytes:
    """The SQL that takes a connection from one to the other; it runs as one transaction. O(settings)

    SET costs the server a third of what `set_config` does: nothing is planned and no snapshot taken.

    :param base: what init_query has set: RESET would not return to that
    :param own: custom names that RESET may return to a value of the log-in
    """
    before = {**base, **dict(carried.items if carried is not None else ())}
    after = {**base, **dict(wanted.items if wanted is not None else ())}
    statements = []
    # What was set as ourselves may be beyond another role, so roles go first and come last.
    changes_role = any(name in before for name in ROLES) and before != after
    if changes_role:
        statements += [b"RESET SESSION AUTHORIZATION", b"RESET ROLE"]
    changes = []
    for name in {**before, **after}:
        if name in ROLES or before.get(name) == after.get(name):
            continue
        value = after.get(name)
        if not name.isascii() or max(map(len, name.split(b"."))) > NAME_BYTES:
            # SET and RESET would cut it, or take it for a name in the client's encoding.
            changes.append(_set(name, b"NULL" if value is None else literal(value)))
        elif value is None:
            # A custom one that is empty would be empty behind RESET, too.
            if before[name] or b"." not in name or name in own:
                statements.append(b"RESET " + identifier(name))
        elif name in _LISTS:
            changes.append(_set(name, literal(value)))
        else:
            statements.append(b"SET " + identifier(name) + b"=" + literal(value))
    if changes:
        statements.append(b"SELECT " + b",".join(changes))
    for name in ROLES:
        if name in after and (changes_role or before.get(name) != after[name]):
            statements.append(b"SELECT " + _set(name, literal(after[name])))
    statements += _preparations(carried, wanted)
    if statements and _SHORT.fullmatch(before.get(TIMEOUT, b"")):
        # It may be too short even for this; behind the first statement it is out of the way.
        statements.insert(0, PATIENCE)
    if statements and DEFERRABLE in before:
        statements.insert(0, AT_ONCE)
    return b";".join(statements)


def _preparations(carried: Settings | None, wanted: Settings | None) -> list[bytes]:
    """What makes the statements prepared by SQL those of the other. One that cannot be prepared any more (its
    table is gone) is left out: whoever executes it hears that it is not there."""
    before = dict(carried.prepared) if carried is not None else {}
    after = dict(wanted.prepared) if wanted is not None else {}
    texts = [b"DEALLOCATE " + identifier_of(name) for name in before if before[name] != after.get(name)]
    texts += [text for name, text in after.items() if before.get(name) != text]
    return [_PREPARING + literal(text) + b";EXCEPTION WHEN OTHERS THEN NULL;END$cenote$" for text in texts]


def preparing(name: bytes, text: bytes) -> bytes | None:
    """Of a text that has prepared `name` by SQL, the one statement that did it; None: it cannot be told."""
    latin = text.decode("latin-1")
    spans = split(latin)
    found = []
    for start, end in spans:
        match = _PREPARE.match(latin, start, end)
        if match is not None:
            said = match[1]
            said = said[1:-1].replace('""', '"') if said[:1] == '"' else said.lower()
            if said.encode("latin-1") == name:
                found.append(latin[start:end].encode("latin-1"))
    return found[0] if len(found) == 1 and len(text) <= _MAX_PREPARED_BYTES else None


_PREPARING = b"DO $cenote$BEGIN EXECUTE "
_PREPARE = re.compile(r'prepare\s+("(?:[^"]|"")+"|[A-Za-z_][\w$]*)', re.IGNORECASE | re.ASCII)
_MAX_PREPARED_BYTES = 65_536


def put_back(items: Iterable[tuple[bytes, bytes, bool]], defaults: dict[bytes, bytes]) -> bytes:
    """The SQL that gives those of these settings their value again that a RESET has taken from the session (or,
    with True, from the transaction): the base state of a client is what it logged in with.

    :param defaults: what a RESET leaves of those that pg_settings does not list, where that is something
    """
    left = {b"role": b"none", **defaults, b"session_authorization": b""}
    values = b",".join(
        b"(%s,%s,%s,%s)" % (literal(n), literal(v), b"true" if here else b"false", literal(left.get(n, b"")))
        for n, v, here in items
    )
    return (
        b"SELECT pg_catalog.set_config(n, v, l) FROM (VALUES " + values + b") AS t (n, v, l, d)"
        b" LEFT JOIN pg_catalog.pg_settings AS s"
        b" ON pg_catalog.lower(s.name) OPERATOR(pg_catalog.=) pg_catalog.lower(n)"
        b" WHERE s.source OPERATOR(pg_catalog.<>) 'session' OR (s.name IS NULL AND"
        b" coalesce(pg_catalog.current_setting(n, true), '') OPERATOR(pg_catalog.=) d)"
    )


def _set(name: bytes, value: bytes) -> bytes:
    return b"pg_catalog.set_config(" + literal(name) + b"," + value + b",false)"


def identifier(name: bytes) -> bytes:
    """A setting's name, quoted part by part: `app.tenant` is two."""
    return b".".join(b'"' + part.replace(b'"', b'""') + b'"' for part in name.split(b"."))


def identifier_of(name: bytes) -> bytes:
    """A name, quoted."""
    return b'"' + name.replace(b'"', b'""') + b'"'


def literal(value: bytes) -> bytes:
    """A text constant of plain ASCII, the same under every setting and encoding."""
    quoted = bytearray(b"E'")
    for code in value:
        if code in (0x27, 0x5C) or not 32 <= code < 127:
            quoted += b"\\x%02x" % code
        else:
            quoted.append(code)
    return bytes(quoted) + b"'"
