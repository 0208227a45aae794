"""The form that pg_hba.conf and pg_ident.conf share: lines, continued lines, comments, fields, quoted words.

It reads text and knows no meaning. Other files are not read: `@file` is a problem, as is a quote without an end.

Source: PostgreSQL documentation, "The pg_hba.conf File"; PostgreSQL 18, hba.c.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, TypeVar

from cenote.errors import ConfigError
from cenote.proxy.auth.patterns import pattern

_BLANK = " \t\r"
_PIECE = re.compile(r'"(?:[^"]|"")*"?|[^"# \t\r,]+')
_INCLUDES = ("include", "include_if_exists", "include_dir")
_Made = TypeVar("_Made")


class Malformed(Exception):
    """What is wrong with a line."""


class Word(NamedTuple):
    """One word. quoted: it begins with a quote, so that it is no keyword. regex: it begins with a slash."""

    text: str
    quoted: bool
    regex: re.Pattern[str] | None = None

    def is_keyword(self, keyword: str) -> bool:
        return self.text == keyword and not self.quoted

    def matches(self, name: str) -> bool:
        """Whether it names this very name, or matches it as a regular expression. Keywords are not looked at."""
        return self.regex.search(name) is not None if self.regex is not None else self.text == name

    def compiled(self) -> Word:
        """With its regular expression, where it is one.

        :raises Malformed: it cannot be used.
        """
        if not self.text.startswith("/"):
            return self
        try:
            return self._replace(regex=pattern(self.text[1:]))
        except ValueError as error:
            raise Malformed(f'regular expression "{self.text[1:]}": {error}') from None


Field = list[Word]


def read_text(path: Path) -> str:
    """A file's text.

    :raises ConfigError: it cannot be read.
    """
    try:
        return path.read_bytes().decode()
    except OSError as error:
        raise ConfigError([f"{path}: {error.strerror}"]) from None
    except UnicodeDecodeError as error:
        raise ConfigError([f"{path}: not UTF-8: {error}"]) from None


def made_of(text: str, file: str, make: Callable[[int, list[Field]], _Made]) -> list[_Made]:
    """What `make` makes of each line that says something, by its number and its fields.

    :raises ConfigError: with the problems of all lines, each with file and line.
    """
    made = []
    problems = []
    for number, line in _whole_lines(text):
        try:
            fields = _fields(line)
            if not fields:
                continue
            if len(fields) == 2 and fields[0][0].text in _INCLUDES:
                raise Malformed(f"{fields[0][0].text}: other files are not read; put their lines here")
            made.append(make(number, fields))
        except Malformed as error:
            problems.append(f"{file}:{number}: {error}")
    if problems:
        raise ConfigError(problems)
    return made


def one(field: Field, what: str) -> Word:
    """The only word of a field.

    :raises Malformed: there are more.
    """
    if len(field) > 1:
        raise Malformed(f"more than one {what}: {','.join(word.text for word in field)}")
    return field[0]


def _whole_lines(text: str) -> Iterator[tuple[int, str]]:
    """Lines with those that continue them, and the number of the first. A backslash at the end of what was joined
    before continues nothing."""
    line, joined, first = "", 0, 1
    for number, piece in enumerate(text.split("\n"), 1):
        line = (line + piece).rstrip("\r\n")
        if len(line) > joined and line.endswith("\\"):
            line = line[:-1]
            joined = len(line)
            continue
        yield first, line
        line, joined, first = "", 0, number + 1
    if line:
        yield first, line


def _fields(line: str) -> list[Field]:
    """Words with commas between them are one field."""
    fields: list[Field] = []
    at, goes_on = 0, False
    while True:
        while at < len(line) and line[at] in _BLANK + ",":
            at += 1
        if at == len(line) or line[at] == "#":
            return fields
        word, at = _word(line, at)
        if word.text.startswith("@") and len(word.text) > 1 and not word.quoted:
            raise Malformed(f"{word.text}: other files are not read; write the names here")
        if goes_on:
            fields[-1].append(word)
        else:
            fields.append([word])
        goes_on = line[at : at + 1] == ","


def _word(line: str, at: int) -> tuple[Word, int]:
    """The word that begins here, and where it ends. Quoted and bare pieces may stand side by side."""
    start, text = at, ""
    while found := _PIECE.match(line, at):
        piece = found[0]
        if piece.startswith('"'):
            if piece.count('"') % 2:
                raise Malformed(f"a quote without an end: {piece}")
            piece = piece[1:-1].replace('""', '"')
        text += piece
        at = found.end()
    return Word(text, line[start] == '"'), at
