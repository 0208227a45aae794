"""The session settings a borrower may ask for, and the SQL that makes a connection carry them.

`pool.connection(settings={"app.tenant": "42"})`: what was asked for is brought into one canonical form, a tuple of
names and texts in order, by which the pool's machine tells connections apart; None is the base state, what log-in,
`init_query` and `configure` leave. Equal settings give one and the same tuple. Nothing here sends anything.

Source: PostgreSQL documentation, "Setting Parameters", `set_config`, SET ROLE, SET SESSION AUTHORIZATION.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from cenote.sql import touch
from cenote.sql.classify import classify

Carried = tuple[tuple[str, str], ...]  # never empty: that is None

MOST_SETTINGS = 32
_NAME_LONGEST = 63  # longer ones are cut by the server, in some places
_REMEMBERED, _REMEMBERED_CHARACTERS = 4096, 1024  # how many wishes, and how long one may be

ROLES = ("session_authorization", "role")
# What has to be undone, as the classifier calls it, where it is not known what a connection carries.
TOUCHES = touch.SETTINGS | touch.ROLE

_NAME = re.compile(r"[a-z_][a-z0-9_$]*(\.[a-z_][a-z0-9_$]*)*")
_PLAIN = re.compile(r"[ -&(-\[\]-~]*")  # printable ASCII but for the quote and the backslash

# What cannot be carried, and what to do instead.
_REFUSED = {
    "client_encoding": "the driver decides it: set it when connecting (connect_args)",
    "seed": "it is no setting but a command: call setseed() in a transaction of your own",
    "transaction_isolation": 'it lasts for one transaction: ask for "default_transaction_isolation"',
    "transaction_read_only": 'it lasts for one transaction: ask for "default_transaction_read_only"',
    "transaction_deferrable": 'it lasts for one transaction: ask for "default_transaction_deferrable"',
}

# The server reads constants in a statement when it prepares it, under the settings of that moment. (search_path
# and the role it minds itself: it parses and plans anew.)
_READ_AT_PREPARE = frozenset(
    (
        "array_nulls",
        "backslash_quote",
        "datestyle",
        "intervalstyle",
        "lc_monetary",
        "standard_conforming_strings",
        "timezone",
        "timezone_abbreviations",
        "transform_null_equals",
        "xmloption",
    )
)


class Wishes:
    """What the borrowers of one pool have asked for: each wish read once, and equal ones made one object."""

    def __init__(self) -> None:
        self._known: dict[Any, Carried | None] = {}

    def read(self, settings: Any) -> Carried | None:
        """The canonical form of what a borrower asks for. O(settings)

        :raises WrongSettings: with everything that is wrong with them.
        """
        try:
            # The types too: 1, 1.0 and True are equal, and are different texts.
            key = (*settings.items(), *map(type, settings.values()))
            return self._known[key]
        except (KeyError, TypeError, AttributeError):
            carried = canonical(settings)
        if sum([len(text) for _, text in carried or ()]) > _REMEMBERED_CHARACTERS:
            return carried
        if len(self._known) >= _REMEMBERED:
            self._known.clear()
        # By another order of the same names it is the same object: a comparison ends at once.
        return self._known.setdefault(key, self._known.setdefault(carried, carried))


class WrongSettings(Exception):
    """`problems` lists everything that is wrong with the settings a borrower asks for."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems
        super().__init__("; ".join(problems))


def canonical(settings: Any) -> Carried | None:
    """Names in lower case and in order, values as the texts that PostgreSQL takes; None where there are none.

    :raises WrongSettings: with everything that is wrong with them.
    """
    if not isinstance(settings, Mapping):
        raise WrongSettings([f"settings: must be a mapping of names to values, not {type(settings).__name__}"])
    problems = []
    texts: dict[str, str] = {}
    if len(settings) > MOST_SETTINGS:
        problems.append(f"{len(settings)} settings: at most {MOST_SETTINGS} can be asked for")
    for given, value in settings.items():
        name = given.lower() if isinstance(given, str) else ""
        text, problem = _text(value)
        if len(name) > _NAME_LONGEST or not _NAME.fullmatch(name):
            problem = (
                "is no name of a setting: letters, digits, _ and $, in parts joined by dots, "
                f"at most {_NAME_LONGEST} characters"
            )
        elif name in texts:
            problem = "is given twice (upper and lower case are the same)"
        elif name in _REFUSED:
            problem = f"cannot be carried: {_REFUSED[name]}"
        elif name in ROLES and not text and not problem:
            problem = "names no role"
        if problem:
            problems.append(f"settings[{given!r}]: {problem}")
        texts[name] = text
    if problems:
        raise WrongSettings(problems)
    return tuple(sorted(texts.items())) or None


def _text(value: Any) -> tuple[str, str]:
    """A value as PostgreSQL takes it, and what is wrong with it. Never repeats a value: it may be a secret."""
    if isinstance(value, str):
        text = str.__str__(value)
        if "\0" in text or any("\ud800" <= char <= "\udfff" for char in text):
            return (
                "",
                "the text has a character that PostgreSQL cannot store (U+0000, or half of a surrogate pair)",
            )
        return text, ""
    if isinstance(value, bool):
        return ("on" if value else "off"), ""
    if isinstance(value, int):
        return int.__repr__(value), ""
    if isinstance(value, float):
        if math.isfinite(value):
            return float.__repr__(value + 0.0), ""
        return "", "the number is not finite"
    return "", f"must be str, int, float or bool, not {type(value).__name__}"


def drops(carried: Carried | None, wanted: Carried | None) -> bool:
    """Is one of the settings carried to have its base value again?"""
    return carried is not None and not {name for name, _ in wanted or ()}.issuperset(name for name, _ in carried)


def replans(carried: Carried | None, wanted: Carried | None) -> bool:
    """May statements that were prepared under these settings mean something else under those?"""
    return any(name in _READ_AT_PREPARE for name, _ in set(carried or ()) ^ set(wanted or ()))


def conversion(carried: Carried | None, wanted: Carried | None, init_query: str | None) -> str:
    """The SQL that takes a connection from one to the other, to be sent as one; "" for nothing. O(settings)

    Only the differences. But a RESET leads to what log-in gave: where settings go, an `init_query` that makes
    settings runs again behind it, as when a session is reset.
    """
    before, after = dict(carried or ()), dict(wanted or ())
    changes = [name for name in after if before.get(name) != after[name]]
    gone = [name for name in before if name not in after]
    if not gone and not changes:
        return ""
    # What was set as ourselves may be beyond another role, so roles go first and come last.
    statements = [f"RESET {_spelled(name)}" for name in ROLES if name in before]
    if gone and init_query and classify(init_query).touches & (TOUCHES | touch.UNKNOWN):
        statements += [*_assign(list(before), [], {}), init_query]  # it is to find the base state
        gone, changes = [], list(after)
    # The semicolon on a line of its own: init_query may end in a comment.
    return "\n;".join(statements + _assign(gone, changes, after))


def _assign(gone: list[str], changes: list[str], after: dict[str, str]) -> list[str]:
    """Statements that take some settings back and give others their values."""
    calls = [f"pg_catalog.set_config({literal(name)},NULL,false)" for name in gone if name not in ROLES]
    calls += [
        f"pg_catalog.set_config({literal(name)},{literal(after[name])},false)"
        for name in changes
        if name not in ROLES
    ]
    statements = [f"SELECT {','.join(calls)}"] if calls else []
    return statements + [f"SET {_spelled(name)} {literal(after[name])}" for name in ROLES if name in after]


def _spelled(role: str) -> str:
    return role.replace("_", " ").upper()


def literal(text: str) -> str:
    """A text constant of plain ASCII, the same under every setting and encoding."""
    if _PLAIN.fullmatch(text):
        return f"'{text}'"
    return "E'" + "".join(char if _PLAIN.fullmatch(char) else _escaped(char) for char in text) + "'"


def _escaped(char: str) -> str:
    code = ord(char)
    return f"\\x{code:02x}" if code < 128 else f"\\u{code:04x}" if code < 65536 else f"\\U{code:08x}"
