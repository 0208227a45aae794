"""What has become of a session: the question that settles it, and what the answer says.

A text only says what it may have touched. What came of it, through savepoints, roll-backs, commits that ended as
roll-backs and functions nobody can see into, the server knows exactly, and says so between two transactions, where
nobody waits for it: the settings that differ from the base state in their canonical form, the role, and whether
anything is left that a connection cannot carry to another client.

Every name in the question is qualified, operators too: it is asked in the client's own session, and its
search_path must not decide what `=` means. It decides nothing about pins.

Source: PostgreSQL documentation, "System Views"; pg_settings does not list custom settings ("Customized Options"),
which are asked for by name.
"""

from __future__ import annotations

import binascii
import re
from collections.abc import Iterable

from cenote.errors import ProtocolError
from cenote.proxy.settings import NAME_BYTES, ROLES, Settings, literal
from cenote.sql import touch
from cenote.wire import messages

Items = tuple[tuple[bytes, bytes], ...]

# Kinds of state that cannot be carried, each with the question whether any is there.
_HELD = {
    touch.TEMP: b"pg_catalog.pg_my_temp_schema() OPERATOR(pg_catalog.<>) 0::pg_catalog.oid AND"
    b" EXISTS (SELECT FROM pg_catalog.pg_depend"
    b" WHERE refclassid OPERATOR(pg_catalog.=) 'pg_catalog.pg_namespace'::pg_catalog.regclass"
    b" AND refobjid OPERATOR(pg_catalog.=) pg_catalog.pg_my_temp_schema())",
    touch.ADVISORY: b"EXISTS (SELECT FROM pg_catalog.pg_locks WHERE locktype OPERATOR(pg_catalog.=) 'advisory'"
    b" AND pid OPERATOR(pg_catalog.=) pg_catalog.pg_backend_pid())",
    touch.LISTEN: b"EXISTS (SELECT FROM pg_catalog.pg_listening_channels())",
    touch.CURSOR: b"EXISTS (SELECT FROM pg_catalog.pg_cursors WHERE is_holdable)",
}
HELD = touch.TEMP | touch.ADVISORY | touch.LISTEN | touch.CURSOR
#: What the question can find out. UNKNOWN is all of it.
TOLD = touch.SETTINGS | touch.ROLE | touch.PREPARED | HELD

#: What looks like the name of a custom setting, in a text or in a parameter. No other can be one.
CUSTOM_NAME = re.compile(rb"[A-Za-z_\x80-\xff][\w$\x80-\xff]*(?:\.[A-Za-z_\x80-\xff][\w$\x80-\xff]*)+")

# A value in the server's own encoding, whatever the client's is: it is written back as such bytes.
_VALUE = b"pg_catalog.encode(pg_catalog.convert_to(%s, pg_catalog.getdatabaseencoding()), 'hex')"
# These are the transaction's, although PostgreSQL lists them as the session's once it has set them.
_NOT_OF_THE_SESSION = b"'{transaction_isolation,transaction_read_only,transaction_deferrable}'::pg_catalog.text[]"


# Whether pg_settings lists a setting, without reading all of it: not if NO_SHOW_ALL is said; NULL: there is none.
_FLAGS = b"pg_catalog.pg_settings_get_flags(n)"
# The same for PostgreSQL 14 and older.
_OLD_FLAGS = b"""CASE WHEN pg_catalog.current_setting(n, true) IS NOT NULL THEN CASE WHEN EXISTS (
SELECT FROM pg_catalog.pg_settings WHERE pg_catalog.lower(name) OPERATOR(pg_catalog.=) n)
THEN '{}' ELSE '{NO_SHOW_ALL}' END::pg_catalog.text[] END"""
# A custom setting has a value or none. One that a library has defined is like the server's own: it is the
# session's if the session has set it.
_CUSTOM = (
    b"SELECT CASE WHEN NOT f OPERATOR(pg_catalog.@>) '{NO_SHOW_ALL}' THEN 'd' ELSE 'c' END, "
    + _VALUE % b"n"
    + b", CASE WHEN f OPERATOR(pg_catalog.@>) '{NO_SHOW_ALL}' THEN "
    + _VALUE % b"pg_catalog.current_setting(n, true)"
    + b" WHEN f IS NOT NULL THEN (SELECT "
    + _VALUE % b"pg_catalog.current_setting(name)"
    + b" FROM pg_catalog.pg_settings WHERE pg_catalog.lower(name) OPERATOR(pg_catalog.=) n"
    b" AND source OPERATOR(pg_catalog.=) 'session') END"
    b" FROM (SELECT n, %s AS f FROM pg_catalog.unnest(ARRAY[%s]::pg_catalog.text[]) AS u (n)) AS t"
)

#: What this log-in begins with that pg_settings does not list: custom settings and a role, from ALTER ROLE and
#: ALTER DATABASE ... SET. One round trip; the answer has the form of a question's.
DEFAULTS = (
    b"SELECT 'c', "
    + _VALUE % b"n"
    + b", "
    + _VALUE % b"pg_catalog.current_setting(n, true)"
    + b""" FROM (SELECT DISTINCT pg_catalog.lower(pg_catalog.split_part(said, '=', 1)) AS n
FROM pg_catalog.pg_db_role_setting, LATERAL pg_catalog.unnest(setconfig) AS s (said)
WHERE (setrole OPERATOR(pg_catalog.=) 0::pg_catalog.oid OR setrole OPERATOR(pg_catalog.=)
(SELECT oid FROM pg_catalog.pg_roles WHERE rolname OPERATOR(pg_catalog.=) session_user))
AND (setdatabase OPERATOR(pg_catalog.=) 0::pg_catalog.oid OR setdatabase OPERATOR(pg_catalog.=)
(SELECT oid FROM pg_catalog.pg_database WHERE datname OPERATOR(pg_catalog.=) pg_catalog.current_database()))
) AS t WHERE pg_catalog.strpos(n, '.') OPERATOR(pg_catalog.>) 0
UNION ALL SELECT 'r', 'role', """
    + _VALUE % b"pg_catalog.current_setting('role')"
)

#: Custom settings that code in the database names: function bodies, policies, views, defaults, ALTER ... SET.
CUSTOMS = (
    rb"""WITH texts(body) AS (
SELECT CASE WHEN prosrc OPERATOR(pg_catalog.=) '' AND prokind OPERATOR(pg_catalog.=) ANY ('{f,p}'::"char"[])
THEN pg_catalog.pg_get_functiondef(oid) ELSE prosrc END
FROM pg_catalog.pg_proc WHERE pronamespace <> 'pg_catalog'::pg_catalog.regnamespace
UNION ALL SELECT pg_catalog.concat(qual, with_check) FROM pg_catalog.pg_policies
UNION ALL SELECT definition FROM pg_catalog.pg_views WHERE schemaname NOT IN ('pg_catalog', 'information_schema')
UNION ALL SELECT pg_catalog.pg_get_expr(adbin, adrelid) FROM pg_catalog.pg_attrdef
UNION ALL SELECT 'SET ' OPERATOR(pg_catalog.||) pg_catalog.unnest(setconfig) FROM pg_catalog.pg_db_role_setting)
SELECT """
    + _VALUE % b"n"
    + rb""" FROM (SELECT DISTINCT pg_catalog.lower(m[1]) FROM texts, LATERAL (
SELECT pg_catalog.regexp_matches(body, $r$(?:set_config|current_setting)\s*\(\s*'([^']+\.[^']+)'$r$, 'gi')
UNION ALL
SELECT pg_catalog.regexp_matches(body,
$r$\mset\s+(?:session\s+|local\s+)?([a-z_]\w*\.[\w.]+)\s*(?:=|\mto\M)$r$, 'gi')
) AS found(m) LIMIT 500) AS t(n)"""
)

#: A row if code in this database asks what a sequence gave its session last. The server's own views, below the
#: first OID of a user's object, would take most of the time.
SEQUENCES = rb"""SELECT WHERE EXISTS (SELECT FROM pg_catalog.pg_proc
WHERE pronamespace OPERATOR(pg_catalog.<>) 'pg_catalog'::pg_catalog.regnamespace
AND (prosrc OPERATOR(pg_catalog.~*) '(last|curr)val'
OR prosqlbody::pg_catalog.text OPERATOR(pg_catalog.~) %(calls)b))
OR EXISTS (SELECT FROM pg_catalog.pg_rewrite WHERE ev_class OPERATOR(pg_catalog.>=) 16384::pg_catalog.oid
AND ev_action::pg_catalog.text OPERATOR(pg_catalog.~) %(calls)b)
OR EXISTS (SELECT FROM pg_catalog.pg_attrdef WHERE adbin::pg_catalog.text OPERATOR(pg_catalog.~) %(calls)b)
OR EXISTS (SELECT FROM pg_catalog.pg_trigger WHERE tgqual::pg_catalog.text OPERATOR(pg_catalog.~) %(calls)b)
OR EXISTS (SELECT FROM pg_catalog.pg_policy WHERE pg_catalog.concat(polqual, polwithcheck) OPERATOR(pg_catalog.~)
%(calls)b)""" % {b"calls": b"':funcid (1575|2559) '"}  # currval, lastval


class Told:
    """What the server has said.

    settings: by name, those that are set in the session; None: it was not asked for them
    customs: by name, the custom ones asked for that have a value; an empty one may be what another has left
    looked: the custom names asked for, as the server spells them: SET cuts what is too long
    defined: those among them that a library has defined: a RESET leaves its own value
    roles: role and session authorization, where they are not the session's own; None: not asked
    prepared: by name, what was prepared by SQL: the text that did it; None: not asked
    named: by name, what was prepared by the protocol; None: not asked
    held: flags of what is there and cannot be carried, SETTINGS if its user has no right to set one that is set
    asked: flags of what was asked about
    """

    def __init__(self) -> None:
        self.settings: dict[bytes, bytes] | None = None
        self.customs: dict[bytes, bytes] = {}
        self.looked: set[bytes] = set()
        self.defined: set[bytes] = set()
        self.roles: dict[bytes, bytes] | None = None
        self.prepared: dict[bytes, bytes] | None = None
        self.named: dict[bytes, bytes] | None = None
        self.held = 0
        self.asked = 0

    def items(self, before: Iterable[tuple[bytes, bytes]], base: dict[bytes, bytes]) -> Items:
        """The settings of the session beside its base state.

        :param before: what they were; what was not asked for is still that
        """
        found: dict[bytes, bytes] = {}
        for name, value in before:
            if name in ROLES:
                kept = self.roles is None
            elif b"." in name:
                kept = name not in self.looked
            else:
                kept = self.settings is None
            if kept:
                found[name] = value
        found.update(self.settings or {})
        found.update(self.customs)
        found.update(self.roles or {})
        return tuple(sorted(item for item in found.items() if base.get(item[0]) != item[1]))


def differences(carried: Settings | None, found: Items, base: dict[bytes, bytes], told: Told) -> list[str]:
    """How a session differs from what it is taken for, in words.

    What a client asked for in its own words (`datestyle=iso`) the server says in its own; the first time it is
    taken as it is.
    """
    words = []
    expected = dict(carried.items) if carried is not None else {}
    there = dict(found)
    for name in sorted(expected.keys() | there.keys()):
        wanted, got = expected.get(name, base.get(name)), there.get(name, base.get(name))
        if wanted == got or (b"." in name and not wanted and not got):
            continue
        renamed = carried is not None and wanted is not None and got is not None and name not in ROLES
        if renamed and carried is not None and carried.canonical.setdefault(name, got or b"") == got:
            continue
        words.append(f"{name.decode('utf-8', 'replace')} is {_shown(got)}, taken for {_shown(wanted)}")
    # One that could not be prepared here is no one else's.
    mine = dict(carried.prepared) if carried is not None else {}
    words += [f"prepared statement {_shown(name)}" for name in sorted(told.prepared or ()) if name not in mine]
    words += [word for flag, word in touch.WORDS.items() if told.held & HELD & flag]
    return words


def _shown(value: bytes | None) -> str:
    return "unset" if value is None else repr(value.decode("utf-8", "replace"))


def question(
    touches: int,
    builtin: bool,
    customs: Iterable[bytes],
    said: Iterable[bytes] = (),
    version: int = 0,
    audit: bool = False,
) -> bytes:
    """The SQL that asks what has become of what was touched.

    :param builtin: settings that have no dot in their names may be among it
    :param customs: names of custom settings to ask for
    :param said: more of them, as they were found in texts: in the encoding of the client that is asked about
    :param version: the server's
    :param audit: no client of its own waits for the answer
    """
    if touches & touch.UNKNOWN:
        touches |= TOLD
    parts = []
    if builtin:
        parts.append(
            b"SELECT %s, name, " % _kind(version)
            + _VALUE % b"pg_catalog.current_setting(name)"
            + b" FROM pg_catalog.pg_settings WHERE source OPERATOR(pg_catalog.=) 'session'"
            b" AND name OPERATOR(pg_catalog.<>) ALL (" + _NOT_OF_THE_SESSION + b")"
        )
    if touches & touch.ROLE:
        parts.append(b"SELECT 'r', 'role', " + _VALUE % b"pg_catalog.current_setting('role')")
        parts.append(b"SELECT 'r', 'session_authorization', " + _VALUE % b"session_user::pg_catalog.text")
    names = [literal(name) for name in sorted(customs)]
    for name in sorted(said):
        names += _spellings(name)
    if names:
        parts.append(_CUSTOM % (_FLAGS if version >= 15 else _OLD_FLAGS, b",".join(names)))
    if touches & touch.PREPARED:
        # By the protocol there may be thousands: an audit does not ask for them.
        whose = b" WHERE from_sql" if audit else b""
        parts.append(
            b"SELECT CASE WHEN from_sql THEN 'p' ELSE 'n' END, "
            + _VALUE % b"name"
            + b", "
            + _VALUE % b"statement"
            + b" FROM pg_catalog.pg_prepared_statements"
            + whose
        )
    parts += [b"SELECT 'h', '%d', '' WHERE %s" % (flag, sql) for flag, sql in _HELD.items() if touches & flag]
    return b" UNION ALL ".join(parts) or b";"


def _kind(version: int) -> bytes:
    """What kind a setting is of: `f` if only a function's rights could set it, not those of who has logged in;
    none if that is over."""
    if version >= 15:
        may = b"pg_catalog.has_parameter_privilege(session_user, name, 'SET')"
    else:
        may = b"(SELECT rolsuper FROM pg_catalog.pg_roles WHERE rolname OPERATOR(pg_catalog.=) session_user)"
    return (
        b"CASE WHEN context OPERATOR(pg_catalog.<>) 'superuser' OR " + may + b" THEN 's'"
        b" WHEN setting OPERATOR(pg_catalog.<>) reset_val THEN 'f' END"
    )


def version_of(parameters: dict[bytes, bytes]) -> int:
    """The server's, the first number of it."""
    digits = re.match(rb"\d+", parameters.get(b"server_version", b""))
    return int(digits[0]) if digits is not None else 1


def _spellings(name: bytes) -> list[bytes]:
    """What a name in a text may be to the server, as SQL: `set_config` takes it as it is, SET cuts its parts."""
    if not CUSTOM_NAME.fullmatch(name):
        return []  # the server refuses it
    names = [_constant(name)]
    parts = name.split(b".")
    if max(map(len, parts)) * 4 > NAME_BYTES:  # a byte here may be four there
        cut = b", '.', ".join(_constant(part) + b"::pg_catalog.name" for part in parts)
        names.append(b"pg_catalog.concat(" + cut + b")")
    return names


def _constant(name: bytes) -> bytes:
    return literal(name) if name.isascii() else b"'" + name + b"'"


def patient(sql: bytes) -> bytes:
    """The same question for a session whose statement_timeout is too short for it: that is asked for first, and
    set aside for the rest."""
    first = b"SELECT 't', '', " + _VALUE % b"pg_catalog.current_setting('statement_timeout')"
    return first + b";SET LOCAL statement_timeout = 0;" + sql


def _bytes(hexed: bytes | None) -> bytes | None:
    try:
        return None if hexed is None else binascii.unhexlify(hexed)
    except binascii.Error:
        raise ProtocolError("the answer to a question about the session is not of the form asked for") from None


def answer(rows: Iterable[bytes], touches: int, builtin: bool, roles: dict[bytes, bytes]) -> Told:
    """What the rows say.

    :param roles: role and session authorization of the session's base state
    :raises ProtocolError: they are no rows
    """
    told = Told()
    told.asked = TOLD if touches & touch.UNKNOWN else touches & TOLD
    if builtin:
        told.settings = {}
    if told.asked & touch.ROLE:
        told.roles = {}
    if told.asked & touch.PREPARED:
        told.prepared, told.named = {}, {}
    timeout = None
    for row in rows:
        values = messages.values(row)
        if len(values) != 3:
            raise ProtocolError("the answer to a question about the session has not three columns")
        kind, name, hexed = values
        value = _bytes(hexed)
        if kind in (b"s", b"f") and told.settings is not None:
            told.settings[(name or b"").lower()] = value or b""
            if kind == b"f":
                told.held |= touch.SETTINGS
        elif kind in (b"c", b"d"):
            custom = _bytes(name) or b""
            told.looked.add(custom)
            if kind == b"d":
                told.defined.add(custom)
            if value is not None:
                told.customs[custom] = value
        elif kind == b"r" and told.roles is not None and value != roles.get(name or b""):
            told.roles[name or b""] = value or b""
        elif kind == b"p" and told.prepared is not None:
            told.prepared[_bytes(name) or b""] = value or b""
        elif kind == b"n" and told.named is not None:
            told.named[_bytes(name) or b""] = value or b""
        elif kind == b"h":
            told.held |= int(name or b"0")
        elif kind == b"t":
            timeout = value
    if timeout is not None and told.settings is not None:
        told.settings[b"statement_timeout"] = timeout
    return told
