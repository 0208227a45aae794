"""The query mix that a measurement runs: SQL with weights, and a part of pgbench's scripts.

A script is SQL statements, each ended by `;`, and the meta-commands `\\set` and `\\sleep`; `:name` in a statement
becomes the variable's value, as in pgbench. What is not understood is refused with its line, never skipped: a
script that is run in part would be measured as something that nobody wrote. It opens nothing and runs nothing.
"""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

from cenote.errors import ConfigError
from cenote.measure.expression import BadExpression, Expression, Variables, parse_expression
from cenote.sql.lexer import COMMENT, END, ERROR, NUL, SEMICOLON, SPACE, Lexer

GIVEN = ("client_id", "scale")
"""Variables that every script has; `-D name=value` adds others, and says what `scale` is if not 1."""

_WEIGHT = re.compile(r"\s*(\d+)\s*:\s*(?=\D)")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_USE = re.compile(r"(?<!:):([A-Za-z_][A-Za-z0-9_]*)")
_SLEEP_UNITS_S = {"us": 1e-6, "ms": 1e-3, "s": 1.0}
_UNSUPPORTED = "not supported here: \\set and \\sleep are"


@dataclass(frozen=True, slots=True)
class Source:
    """One script as the user wrote it. `name` is for messages; of several, each is run `weight` times as often."""

    name: str
    text: str
    weight: int = 1


@dataclass(frozen=True, slots=True)
class Statement:
    """One SQL statement. `pieces` are its words around the variables `names`: one more than these."""

    pieces: tuple[str, ...]
    names: tuple[str, ...]

    def simple(self, variables: Variables) -> bytes:
        """The text with the values in it."""
        if not self.names:
            return self.pieces[0].encode()
        out = [self.pieces[0]]
        for name, piece in zip(self.names, self.pieces[1:], strict=True):
            out.append(shown(variables[name]))
            out.append(piece)
        return "".join(out).encode()

    def prepared(self) -> bytes:
        """The text with $1, $2 ... in place of the variables."""
        out = [self.pieces[0]]
        for number, piece in enumerate(self.pieces[1:], 1):
            out.append(f"${number}{piece}")
        return "".join(out).encode()

    def values(self, variables: Variables) -> list[bytes | None]:
        """What $1, $2 ... are."""
        return [shown(variables[name]).encode() for name in self.names]


@dataclass(frozen=True, slots=True)
class Set:
    """`\\set name expression`."""

    name: str
    value: Expression


@dataclass(frozen=True, slots=True)
class Sleep:
    """`\\sleep expression unit`."""

    amount: Expression
    unit_s: float


Step = Statement | Set | Sleep


@dataclass(frozen=True, slots=True)
class Script:
    """One kind of transaction: its steps in order, and how often it is drawn."""

    name: str
    weight: int
    steps: tuple[Step, ...]


class Mix:
    """Several scripts, drawn by weight."""

    def __init__(self, scripts: Sequence[Script]) -> None:
        self.scripts = tuple(scripts)
        self._weights = [script.weight for script in scripts]

    def draw(self, chance: random.Random) -> Script:
        """The next transaction's script."""
        if len(self.scripts) == 1:
            return self.scripts[0]
        return chance.choices(self.scripts, self._weights)[0]


def shown(value: float) -> str:
    """A variable's value as it stands in SQL."""
    return str(value) if isinstance(value, int) else f"{value:.17g}"


def weighted(name: str, text: str) -> Source:
    """`3: SELECT ...` as a source of weight 3; no SQL begins with a number, so nothing else is meant."""
    found = _WEIGHT.match(text)
    if found is None:
        return Source(name, text)
    return Source(name, text[found.end() :], int(found[1]))


def parse_mix(sources: Sequence[Source], defined: Sequence[str] = ()) -> Mix:
    """All scripts of a mix.

    :param defined: names of variables that are given from outside, beside `GIVEN`
    :raises ConfigError: everything that is not understood, with its script and line
    """
    problems: list[str] = []
    scripts = []
    for source in sources:
        reading = _Reading(source, {*GIVEN, *defined})
        scripts.append(Script(source.name, source.weight, reading.steps()))
        problems += reading.problems
        if source.weight < 1:
            problems.append(f"{source.name}: a weight of {source.weight}: use 1 or more")
        if not any(isinstance(step, Statement) for step in scripts[-1].steps) and not reading.problems:
            problems.append(f"{source.name}: there is no SQL statement in it")
    if problems:
        raise ConfigError(problems)
    return Mix(scripts)


def parse_definitions(words: Sequence[str]) -> Variables:
    """`name=value` of the command line, values being numbers.

    :raises ConfigError: naming each that is not
    """
    values: Variables = {}
    problems = []
    for word in words:
        name, equals, value = word.partition("=")
        try:
            if not equals or not _NAME.fullmatch(name):
                raise ValueError
            values[name] = int(value) if re.fullmatch(r"[-+]?\d+", value) else float(value)
        except ValueError:
            problems.append(f"define = {word!r}: must be name=number")
    if problems:
        raise ConfigError(problems)
    return values


class _Reading:
    """Cuts one script into steps."""

    def __init__(self, source: Source, known: set[str]) -> None:
        self.problems: list[str] = []
        self._source = source
        self._text = source.text
        self._known = known

    def steps(self) -> tuple[Step, ...]:
        steps: list[Step] = []
        at = 0
        while (at := self._skip(at)) < len(self._text):
            if self._text[at] == "\\":
                at, line = self._line(at)
                step = self._meta(line, at - 1)
                if step is not None:
                    steps.append(step)
            else:
                start = at
                at, text = self._sql(at)
                if text:
                    steps.append(self._statement(text))
                if at <= start:
                    break
        return tuple(steps)

    def _problem(self, at: int, words: str) -> None:
        line = self._text.count("\n", 0, at) + 1
        self.problems.append(f"{self._source.name}, line {line}: {words}")

    def _skip(self, at: int) -> int:
        """Over white space and comments to where a statement or a meta-command begins."""
        lexer = Lexer(self._text)
        lexer.end = at
        while lexer.advance() in (SPACE, COMMENT, SEMICOLON):
            pass
        return lexer.start

    def _line(self, at: int) -> tuple[int, str]:
        """The rest of the line, and of those after it while it ends in a backslash."""
        found = re.compile(r"(?:\\\r?\n|[^\n])*").match(self._text, at)
        assert found is not None
        return found.end() + 1, re.sub(r"\\\r?\n", " ", found[0]).strip()

    def _sql(self, at: int) -> tuple[int, str]:
        """Up to the `;` that ends the statement, or to the end of the script."""
        lexer = Lexer(self._text)
        lexer.end = at
        while (kind := lexer.advance()) not in (SEMICOLON, END):
            if kind in (ERROR, NUL):
                backslash = self._text[lexer.start] == "\\"
                why = (
                    "a meta-command within a statement: end the statement with ; before it"
                    if backslash
                    else "this is not SQL: a quote or a comment without an end, or a character that cannot be"
                )
                self._problem(lexer.start, why)
                return len(self._text), ""
        return max(lexer.end, at), self._text[at : lexer.start].strip()

    def _statement(self, text: str) -> Statement:
        pieces, names = [""], []
        at = 0
        for found in _USE.finditer(text):
            # As in pgbench, a name that nobody set stays as it is: it may be a slice.
            if found[1] in self._known:
                pieces[-1] += text[at : found.start()]
                pieces.append("")
                names.append(found[1])
                at = found.end()
        pieces[-1] += text[at:]
        return Statement(tuple(pieces), tuple(names))

    def _meta(self, line: str, at: int) -> Step | None:
        word, _, rest = line.partition(" ")
        try:
            if word == "\\set":
                name, _, expression = rest.strip().partition(" ")
                if not _NAME.fullmatch(name):
                    raise BadExpression(f"\\set needs a name and a value, not {rest.strip()!r}")
                value = parse_expression(expression, self._known)
                self._known.add(name)
                return Set(name, value)
            if word == "\\sleep":
                return self._sleep(rest.strip())
            self._problem(at, f"{word} is {_UNSUPPORTED}")
        except BadExpression as error:
            self._problem(at, str(error))
        return None

    def _sleep(self, words: str) -> Sleep:
        amount, _, unit = words.rpartition(" ")
        if unit not in _SLEEP_UNITS_S:
            amount, unit = words, "s"
        return Sleep(parse_expression(amount, self._known), _SLEEP_UNITS_S[unit])
