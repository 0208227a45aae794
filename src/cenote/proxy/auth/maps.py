"""Maps from the names that a system knows people by to those of the database, in the form of pg_ident.conf.

A line has a map's name, a system's name (a Unix account, a name in a certificate) and a database user; names that
begin with a slash are regular expressions, and \\1 in the third field is what the second's first group matched.
Memberships of roles (+role) are known to the server only and are a problem here.

Source: PostgreSQL documentation, "User Name Maps"; PostgreSQL 18, hba.c.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cenote.proxy.auth.lines import Field, Malformed, Word, made_of, one, read_text

_FIELDS = ("a map's name", "a system's name", "a database user")
_GROUP = "\\1"


@dataclass(frozen=True, slots=True)
class Mapping:
    """One line."""

    map: str
    system: Word
    user: Word


class Maps:
    """All maps."""

    def __init__(self, mappings: Sequence[Mapping] = ()) -> None:
        self.mappings = tuple(mappings)
        self.names = frozenset(mapping.map for mapping in mappings)

    def allows(self, name: str, system: str, user: str) -> bool:
        """Whether who is `system` may be the database user. name: of the map; "": both names must be equal."""
        if not name:
            return system == user
        for mapping in self.mappings:
            if mapping.map == name:
                allowed = _allows(mapping, system, user)
                if allowed is None:
                    return False
                if allowed:
                    return True
        return False


NO_MAPS = Maps()


def _allows(mapping: Mapping, system: str, user: str) -> bool | None:
    """What one line says. None: its group matched nothing, and PostgreSQL looks no further then."""
    expression = mapping.system.regex
    if expression is None:
        return mapping.system.text == system and _is(mapping.user, user)
    found = expression.search(system)
    if found is None:
        return False
    if mapping.user.regex is None and _GROUP in mapping.user.text:
        group = found[1]
        # What the group matched stands for itself, also where it looks like a keyword or an expression.
        return None if group is None else mapping.user.text.replace(_GROUP, group, 1) == user
    return _is(mapping.user, user)


def _is(word: Word, user: str) -> bool:
    return word.is_keyword("all") or word.matches(user)


def load_maps(path: Path) -> Maps:
    """The maps of a file.

    :raises ConfigError: with every problem, each with file and line.
    """
    return parse_maps(read_text(path), str(path))


def parse_maps(text: str, file: str) -> Maps:
    """The maps of a text; `file` is named in problems.

    :raises ConfigError: with every problem, each with file and line.
    """
    return Maps(made_of(text, file, _mapping))


def _mapping(number: int, fields: list[Field]) -> Mapping:
    if len(fields) != len(_FIELDS):
        raise Malformed(f"{len(fields)} fields; a line has {', '.join(_FIELDS)}")
    name, system, user = (one(field, what) for field, what in zip(fields, _FIELDS, strict=True))
    system = system.compiled()
    if user.text.startswith("+") and not user.quoted:
        raise Malformed(f"{user.text}: who is a member of which role is known to the server only; write the names")
    user = user.compiled()
    if system.regex is not None and user.regex is None and _GROUP in user.text and not system.regex.groups:
        raise Malformed(f'"{user.text}" asks for a group of "{system.text[1:]}", which has none')
    return Mapping(name.text, system, user)
