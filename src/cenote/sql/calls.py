"""What the call of a function may touch: by the table of `functions.py`, set_config by its arguments.

Asked at the opening parenthesis of what looks like a call. It refuses to say whether it is one: the name of
a table before its columns is asked about too, and only the report of unknown functions leaves those out.
"""

from cenote.sql.builtins import NAMES
from cenote.sql.functions import (
    EXTENSION_SETTINGS,
    EXTENSION_TOUCHES,
    NOT_CALLS,
    READS,
    SET_CONFIG,
    TOUCHES,
)
from cenote.sql.lexer import COMMENT, END, ERROR, LPAREN, NUL, PARAM, PUNCT, RPAREN, SPACE, STRING, Lexer
from cenote.sql.literals import fold, string
from cenote.sql.touch import TEMP
from cenote.sql.verdict import DEFAULT, Findings

# Arguments are looked at no further than this, so that nested calls stay linear.
_MAX_TOKENS = 48

# Before a name these say that it is a table, an alias, a type or a statement's name, not a function.
_BEFORE_OTHERS = """
) :: as table references copy with recursive exists execute prepare analyze analyse vacuum type function
procedure
"""
_NOT_BEFORE_CALLS = frozenset(_BEFORE_OTHERS.split())

_TRUE = frozenset(("t", "tr", "tru", "true", "y", "ye", "yes", "on", "1"))

_Token = tuple[int, str]


def call(findings: Findings, lexer: Lexer, schema: str | None, name: str, before: str) -> None:
    """Note what calling `schema.name` may touch.

    `lexer` stands at the opening parenthesis; `name` has a `"` before it when it was quoted; `before` is
    the token that precedes the whole name.
    """
    # After INTO stands a table, never an expression.
    if before == "into" or (schema is None and name in NOT_CALLS):
        return
    name = name[1:] if name[:1] == '"' else name
    if schema is None or schema == "pg_catalog":
        if name == SET_CONFIG:
            _set_config(findings, _arguments(lexer), lexer.conforming)
            return
        touches = TOUCHES.get(name)
        if touches is not None:
            findings.touches |= touches
            return
        if name in NAMES:
            findings.reads |= READS.get(name, 0)
            return
    if schema == "information_schema":
        return
    touches = EXTENSION_TOUCHES.get(name)
    if touches is not None:
        findings.touches |= touches
        if name in EXTENSION_SETTINGS:
            findings.setting(EXTENSION_SETTINGS[name])
    if before not in _NOT_BEFORE_CALLS:
        findings.unknown_functions[name if schema is None else f"{schema}.{name}"] = None


def _arguments(lexer: Lexer) -> list[list[_Token]] | None:
    """The arguments of the call, each as its tokens; None when they are too long to tell."""
    inner = Lexer(lexer.text, lexer.conforming)
    inner.end = lexer.end
    arguments: list[list[_Token]] = [[]]
    depth = 0
    for _ in range(2 * _MAX_TOKENS):
        kind = inner.advance()
        if kind in (SPACE, COMMENT):
            continue
        if kind in (END, NUL, ERROR):
            return None
        if kind == RPAREN and depth == 0:
            return arguments
        depth += (kind == LPAREN) - (kind == RPAREN)
        raw = inner.text[inner.start : inner.end]
        if kind == PUNCT and raw == "," and depth == 0:
            arguments.append([])
        else:
            arguments[-1].append((kind, raw))
    return None


def _set_config(findings: Findings, arguments: list[list[_Token]] | None, conforming: bool) -> None:
    # The server's set_config has no names for its arguments, and no defaults.
    if arguments is None or len(arguments) != 3:
        findings.setting(None)
        return
    name = _text(arguments[0], conforming)
    value = _text(arguments[1], conforming)
    if name is not None and name.lower() == "search_path" and value and "pg_temp" in value.lower():
        # What is created while pg_temp comes first outlives even a SET LOCAL.
        findings.touches |= TEMP
    local = _is_true(arguments[2], conforming)
    source = "" if value is not None else _parameter(arguments[1]) or DEFAULT
    if local or source:
        findings.assign(_parameter(arguments[0]) if name is None else name, source, local)
    if local:
        if name is not None and name.lower() == "seed":
            findings.setting(name)
        return
    findings.setting(name)


def _uncast(tokens: list[_Token], types: tuple[str, ...]) -> list[_Token]:
    if len(tokens) > 2 and tokens[-2][1] == "::" and fold(tokens[-1][1]) in types:
        return tokens[:-2]
    return tokens


def _text(tokens: list[_Token], conforming: bool) -> str | None:
    tokens = _uncast(tokens, ("text",))
    if len(tokens) == 1 and tokens[0][0] == STRING:
        return string(tokens[0][1], conforming)
    if len(tokens) == 3 and fold(tokens[1][1]) == "uescape" and tokens[2][0] == STRING:
        escape = string(tokens[2][1], conforming)
        return string(tokens[0][1], conforming, escape) if escape and len(escape) == 1 else None
    return None


def _parameter(tokens: list[_Token]) -> str | None:
    tokens = _uncast(tokens, ("text",))
    return tokens[0][1] if len(tokens) == 1 and tokens[0][0] == PARAM else None


def _is_true(tokens: list[_Token], conforming: bool) -> bool:
    tokens = _uncast(tokens, ("bool", "boolean"))
    if len(tokens) != 1:
        return False
    kind, raw = tokens[0]
    if kind == STRING:
        return (string(raw, conforming) or "").strip(" \t\n\r\f\v").lower() in _TRUE
    return fold(raw) == "true"
