"""Reads a text once, token by token, and says what it may touch: the classifier without its cache.

Gathers for each statement its first words (judged in `verbs.py`), the functions called (judged in
`calls.py`) and the few phrases that count wherever they stand. It refuses to parse: where the grammar would
be needed to tell harmless from not, it takes the text for not harmless.

Two facts about the server carry much of the weight. A text with a syntax error anywhere is refused as a
whole before any of it runs; and a keyword that starts a clause cannot stand where a name is expected.
"""

from cenote.sql.calls import call
from cenote.sql.lexer import COMMENT, ERROR, NUL, OPERATOR, QUOTED, SEMICOLON, SPACE, STRING, WORD, Lexer
from cenote.sql.literals import fold, identifier, string
from cenote.sql.touch import UNKNOWN
from cenote.sql.verbs import HEAD, Statement, decide, is_transaction_control
from cenote.sql.verdict import Findings, Verdict

_DML = frozenset(("insert", "update", "delete", "merge"))
# The view that sets what it is updated to.
_SETTINGS_VIEW = frozenset(("pg_settings", '"pg_settings'))
_PHRASES = _DML | _SETTINGS_VIEW | {"temp", "temporary", "as", "execute", "drop", "of"}
# What a statement in a routine's SQL body may start with.
_BODY_VERBS = frozenset(("select", "insert", "update", "delete", "merge", "values", "with", "return", "end"))
# Longer strings are not looked into for the name of the temporary schema: no search path is that long.
_MAX_PATH = 10_000


def scan(text: str) -> Verdict:
    """What running `text` may touch."""
    reading = _Reading(text, True)
    if reading.backslashes:
        # With standard_conforming_strings off the text may fall into other tokens. Which one is on is
        # not asked here; both readings count, and one that the server would refuse does nothing.
        other = _Reading(text, False)
        if not other.refused:
            reading.total.add(other.total)
            reading.opens_transaction = reading.opens_transaction or other.opens_transaction
    return reading.verdict()


class _Reading:
    """One pass over a text. `previous` and the like are tokens in the form of `Statement.head`."""

    __slots__ = (
        "backslashes",
        "before_name",
        "before_previous",
        "body_verb_next",
        "lexer",
        "name",
        "opens_transaction",
        "previous",
        "refused",
        "schema",
        "statement",
        "statements",
        "total",
        "uescape",
        "unicode_token",
        "verb",
    )

    def __init__(self, text: str, conforming: bool) -> None:
        self.total = Findings()
        self.refused = False
        self.backslashes = False  # there is a plain string with a backslash in it
        self.opens_transaction = False
        self.statements = 0
        self.verb = ""
        self.lexer = Lexer(text, conforming)
        self.statement = Statement()
        self.previous = ""
        self.before_previous = ""
        # The dotted name that ends at the previous token ("" if none does), and what stands before it.
        self.schema: str | None = None
        self.name = ""
        self.before_name = ""
        # The previous token if it is U&"..." or U&'...'; and whether UESCAPE came after it.
        self.unicode_token = ""
        self.uescape = False
        # In the SQL body of a routine, at the start of a statement.
        self.body_verb_next = False
        self._read()
        if self.refused:
            self.total.touches |= UNKNOWN

    def verdict(self) -> Verdict:
        total = self.total
        return Verdict(
            touches=total.touches,
            settings=tuple(total.settings or ()),
            verb=self.verb.upper(),
            unknown_functions=tuple(total.unknown_functions),
            hidden=total.hidden,
            reads=total.reads,
            assigns=tuple(total.assigns),
            opens_transaction=self.opens_transaction,
            statements=self.statements,
            defines=total.defines,
        )

    def _read(self) -> None:
        lexer = self.lexer
        while True:
            kind = lexer.advance()
            if kind in (SPACE, COMMENT):
                continue
            if kind in (WORD, QUOTED):
                self._word(kind)
            elif kind == STRING:
                self._string()
            elif kind == SEMICOLON or kind <= NUL:
                if self.statement.head:
                    self._finish(self.statement)
                if kind != SEMICOLON:
                    self.refused = kind == ERROR
                    return
                self.statement = Statement()
                self._step("", "")
            else:
                self._other(kind)

    def _step(self, item: str, name: str) -> None:
        """Make `item` the previous token; `name` is the name that now ends there."""
        self.before_previous = self.previous
        self.previous = item
        self.name = name
        self.unicode_token = ""
        self.uescape = False

    def _word(self, kind: int) -> None:
        lexer, statement = self.lexer, self.statement
        raw = lexer.text[lexer.start : lexer.end]
        item = _item(raw)
        if item == "uescape" and self.unicode_token:
            self.uescape = True
            return
        if self.previous == "." and self.name:
            self.schema = self.name.removeprefix('"')
        else:
            self.schema = None
            self.before_name = self.previous
        if len(statement.head) < HEAD:
            statement.head.append(item)
        if item in _PHRASES or "pg_temp" in item:
            _phrase(statement, lexer.depth, item, self.previous, self.before_previous)
        if self.body_verb_next and item not in _BODY_VERBS:
            # Not a body after all (or none the server takes): what follows may run now.
            statement.found.touches |= UNKNOWN
        self.body_verb_next = item == "atomic" and lexer.body > 0
        if self.body_verb_next:
            statement.routine_body = True
        self._step(item, item)
        if kind == QUOTED and raw[0] != '"':
            self.unicode_token = raw

    def _string(self) -> None:
        lexer, statement = self.lexer, self.statement
        text, start, end = lexer.text, lexer.start, lexer.end
        if self.uescape:
            self._unicode_escape(string(text[start:end]) or "")
            return
        first = text[start]
        if not self.backslashes and first in "'nN":
            self.backslashes = text.find("\\", start, end) >= 0
        if statement.word(0) == "set":
            # Of a string with escapes yet to come, or too long for a path, the worst is assumed.
            known = end - start < _MAX_PATH and first not in "uU"
            value = string(text[start:end], lexer.conforming) if known else None
            if value is None or "pg_temp" in value.lower():
                statement.temp_path = True
        if len(statement.head) < HEAD:
            statement.head.append("'")
        self._step("'", "")
        if first in "uU":
            self.unicode_token = "'"

    def _unicode_escape(self, escape: str) -> None:
        """Read the U& token before UESCAPE again, with the escape character it was written with."""
        raw, statement = self.unicode_token, self.statement
        self.uescape = False
        self.unicode_token = ""
        if raw == "'" or len(escape) != 1:
            return
        self.previous = self.name = item = _item(raw, escape)
        if len(statement.head) < HEAD:
            statement.head[-1] = item
        if "pg_temp" in item:
            _phrase(statement, self.lexer.depth, item, self.before_previous, "")

    def _other(self, kind: int) -> None:
        lexer, statement = self.lexer, self.statement
        item = lexer.text[lexer.start : lexer.end] if kind >= OPERATOR else "0"
        if item == "(":
            if self.name and self.previous != ".":
                call(statement.calls, lexer, self.schema, self.name, self.before_name)
        elif item == ".":
            if self.previous.removeprefix('"').startswith("pg_temp"):
                statement.temp_schema = True
        elif item == ";":
            self.body_verb_next = lexer.body > 0
        if len(statement.head) < HEAD:
            statement.head.append(item)
        self._step(item, self.name if item == "." else "")

    def _finish(self, statement: Statement) -> None:
        self.statements += 1
        verb = next((word for word in statement.head if word != "("), "")
        control = is_transaction_control(statement)
        if self.statements == 1 or not control:
            self.verb = verb if verb.isidentifier() else ""
        if control:
            self._control(statement)
        runs = decide(statement)
        self.total.add(statement.found)
        if runs or statement.routine_body:
            self.total.add(statement.calls)

    def _control(self, statement: Statement) -> None:
        verb = statement.word(0)
        if verb in ("begin", "start"):
            self.opens_transaction = True
        elif verb in ("commit", "end", "rollback", "abort", "prepare"):
            rest = statement.head[1:]
            if "prepared" in rest[:1] or "to" in rest[:2]:
                return
            self.opens_transaction = "chain" in rest and "no" not in rest


def _item(raw: str, escape: str = "\\") -> str:
    """A word or quoted name in the form of `Statement.head`."""
    if raw[-1] != '"':
        return fold(raw)
    return '"' + (identifier(raw, escape) or "")


def _phrase(statement: Statement, depth: int, word: str, previous: str, before_previous: str) -> None:
    """Notice the words that count wherever they stand in a statement."""
    if word in _DML:
        if previous not in ("for", "key", "."):
            statement.found.hidden = True
    elif word in _SETTINGS_VIEW:
        if previous in ("update", "only") or (previous == "." and "update" in statement.head):
            statement.found.every_setting()
    elif word in ("temp", "temporary"):
        # INSERT INTO temp is a table of that name.
        direct = previous == "into" and before_previous not in ("insert", "merge")
        if direct or (previous in ("local", "global") and before_previous == "into"):
            statement.into_temp = True
    elif word == "as":
        if depth == 0:
            statement.as_query = True
    elif word == "execute":
        if previous == "as":
            statement.as_execute = True
    elif word == "drop":
        if previous == "commit" and before_previous == "on" and depth == 0:
            statement.drops_on_commit = True
    elif word == "of":
        if previous == "partition":
            statement.partition = True
    elif statement.head[0] == "set":
        statement.temp_path = True
    elif (previous == "into" and before_previous not in ("insert", "merge")) or (
        previous == "table" and before_previous == "into"
    ):
        statement.into_temp = True
