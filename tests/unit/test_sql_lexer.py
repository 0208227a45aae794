"""The lexer on its own; that it agrees with real servers is `tests/integration/test_sql_against_server.py`."""

import sys
import types
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cenote.sql import lexer, literals
from cenote.sql.lexer import KIND_NAMES, Lexer, split, tokenize


def shown(text: str, conforming: bool = True) -> str:
    """The tokens that count, as `KIND:text`."""
    return " ".join(
        f"{KIND_NAMES[kind]}:{text[start:end]}"
        for kind, start, end in tokenize(text, conforming)
        if kind not in (lexer.SPACE, lexer.COMMENT)
    )


def test_importing_tells_whether_the_lexer_is_compiled() -> None:
    """Both are the same source, and only one is behind the import."""
    interpreted = isinstance(Lexer.advance, types.FunctionType)
    assert interpreted == str(lexer.__file__).endswith(".py")


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("Select aB_1$é", "WORD:Select WORD:aB_1$é"),
        ("a\u00a0b", "WORD:a\u00a0b"),
        ('"a b" "x""y"', 'QUOTED:"a b" QUOTED:"x""y"'),
        ('U&"a" u&"b"', 'QUOTED:U&"a" QUOTED:u&"b"'),
        ("u & x, u&x", "WORD:u OPERATOR:& WORD:x PUNCT:, WORD:u OPERATOR:& WORD:x"),
        ('""', 'ERROR:""'),
        ('"open', 'ERROR:"open'),
    ],
)
def test_identifiers_are_words_or_quoted(text: str, tokens: str) -> None:
    assert shown(text) == tokens


@pytest.mark.parametrize(
    "text",
    [
        "'plain'",
        "'it''s'",
        "'\\'",
        "E'it\\'s'",
        "e'\\\\'",
        "B'01'",
        "x'1F'",
        "N'a'",
        "U&'\\0041'",
        "'a'\n'b'",
        "'a' -- comment\n  \t-- another\n 'b'",
        "E'a'\r'\\''",
        "$$ ' \" $a$ $$",
        "$tag$ $$ $Tag$ $tag$",
        "$é$ $é$",
    ],
)
def test_each_string_form_is_one_token(text: str) -> None:
    assert shown(text) == f"STRING:{text}"


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("'a' 'b'", "STRING:'a' STRING:'b'"),
        ("'a' /* c */\n 'b'", "STRING:'a' STRING:'b'"),
        ("'a' -- c 'b'", "STRING:'a'"),
        ("B'1''0'", "STRING:B'1' STRING:'0'"),
        ("'open", "ERROR:'open"),
        ("E'open\\'", "ERROR:E'open\\'"),
        ("$a$ open", "ERROR:$a$ open"),
        ("$a b", "ERROR:$ WORD:a WORD:b"),
        ("a$b$c$b$", "WORD:a$b$c$b$"),
        ("'a'\n'open", "ERROR:'a'\n'open"),
    ],
)
def test_where_a_string_ends_follows_the_server(text: str, tokens: str) -> None:
    assert shown(text) == tokens


def test_without_standard_conforming_strings_a_backslash_escapes_in_a_plain_string() -> None:
    text = "'a\\'; select 1 --'"
    assert shown(text) == "STRING:'a\\' SEMICOLON:; WORD:select NUMBER:1"
    assert shown(text, conforming=False) == f"STRING:{text}"
    assert shown("U&'a'", conforming=False) == "ERROR:U&'a'"


@pytest.mark.parametrize(
    "text",
    ["1", "1_000", "0x1F", "0XaB_c", "0o17", "0b1_0", "1.", ".5", "1.5", "1e5", "1.5E-3", "1_0.0_1e1_0"],
)
def test_each_form_of_number_is_one_token(text: str) -> None:
    assert shown(text) == f"NUMBER:{text}"


@pytest.mark.parametrize(
    "text", ["1a", "1_", "1__0", "0x", "0b2", "0x1g", "1e", "1e+", "1.5x", "$1a", "1e5$", "1_0$"]
)
def test_letters_glued_to_a_number_are_an_error(text: str) -> None:
    assert shown(text) == f"ERROR:{text}"


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("1..2", "NUMBER:1 PUNCT:.. NUMBER:2"),
        ("1.5.3", "NUMBER:1.5 NUMBER:.3"),
        ("a.b", "WORD:a PUNCT:. WORD:b"),
        ("$1,$12", "PARAM:$1 PUNCT:, PARAM:$12"),
        ("a::b:c:=d", "WORD:a PUNCT::: WORD:b PUNCT:: WORD:c PUNCT::= WORD:d"),
        ("a[1]", "WORD:a PUNCT:[ NUMBER:1 PUNCT:]"),
        ("a=-1", "WORD:a OPERATOR:= OPERATOR:- NUMBER:1"),
        ("a@-1", "WORD:a OPERATOR:@- NUMBER:1"),
        ("a=>-b", "WORD:a OPERATOR:=> OPERATOR:- WORD:b"),
        ("a*-+-b", "WORD:a OPERATOR:* OPERATOR:- OPERATOR:+ OPERATOR:- WORD:b"),
        ("a+--b", "WORD:a OPERATOR:+"),
        ("a*/*c*/b", "WORD:a OPERATOR:* WORD:b"),
        ("a->>'b'", "WORD:a OPERATOR:->> STRING:'b'"),
        ("{ a \\", "ERROR:{ WORD:a ERROR:\\"),
    ],
)
def test_operators_and_punctuation_end_where_the_server_ends_them(text: str, tokens: str) -> None:
    assert shown(text) == tokens


def test_an_operator_too_long_for_a_name_is_an_error() -> None:
    assert tokenize("@" * 63) == [(lexer.OPERATOR, 0, 63)]
    assert tokenize("@" * 64) == [(lexer.ERROR, 0, 64)]


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("/* a /* b */ ; */ 1", "NUMBER:1"),
        ("/*/ */ 1", "NUMBER:1"),
        ("/*/*/ */*/1", "NUMBER:1"),
        ("/**/1", "NUMBER:1"),
        ("/* ' */ 1", "NUMBER:1"),
        ("/* /* */", "ERROR:/* /* */"),
        ("-- a\r1 -- b\n2", "NUMBER:1 NUMBER:2"),
    ],
)
def test_comments_nest_and_lines_end_at_either_break(text: str, tokens: str) -> None:
    assert shown(text) == tokens


def test_a_nul_byte_ends_the_text() -> None:
    assert tokenize("a\0b'") == [(lexer.WORD, 0, 1), (lexer.NUL, 1, 4)]
    assert tokenize("'a\0'")[0][0] == lexer.ERROR
    assert split("a;\0b") == [(0, 1)]


@pytest.mark.parametrize(
    ("text", "statements"),
    [
        ("", []),
        (" ; -- x\n;", []),
        ("a; b ;c", ["a", "b", "c"]),
        ("a (; ) b; c", ["a (; ) b", "c"]),
        ("'a;'; $$;$$; \";\"", ["'a;'", "$$;$$", '";"']),
        (
            "create function f() returns int begin atomic select 1; select 2; end; next",
            ["create function f() returns int begin atomic select 1; select 2; end", "next"],
        ),
        (
            "CREATE OR REPLACE PROCEDURE p() BEGIN /* x */ ATOMIC SELECT CASE WHEN a THEN 1 END AS end; END; x",
            [
                "CREATE OR REPLACE PROCEDURE p() BEGIN /* x */ ATOMIC SELECT CASE WHEN a THEN 1 END AS end; END",
                "x",
            ],
        ),
        (
            "create function f() begin atomic select t.case, t.end from t; end; x",
            ["create function f() begin atomic select t.case, t.end from t; end", "x"],
        ),
        ("create table f as select begin atomic; b; end", ["create table f as select begin atomic", "b", "end"]),
        ("begin; atomic; end", ["begin", "atomic", "end"]),
        ("begin atomic; end", ["begin atomic", "end"]),
    ],
)
def test_statements_end_at_a_semicolon_outside_of_parentheses_and_bodies(text: str, statements: list[str]) -> None:
    assert [text[start:end] for start, end in split(text)] == statements


PIECES = (
    "' '' \" E' U&' U&\" B' $$ $a$ $1 -- /* */ ( ) ; : :: . .. 1 1.5 0x 1e _ a begin atomic case end create"
    " function or replace as é \\ \0 \n + - * / < = @ ! # { 'x' \"y\""
)
SQL_PIECES = st.sampled_from(PIECES.split(" ")) | st.sampled_from([" ", "\n", "\r", "\\'"])
TEXTS = st.one_of(st.text(max_size=60), st.lists(SQL_PIECES, max_size=30).map("".join))
WHOLE = st.lists(
    st.sampled_from(["select", "1", "'a;b'", '"c;"', "$$;$$", "(", ")", ";", "+", "f", ",", "create", "E'\\''"]),
    max_size=15,
)


@given(TEXTS, st.booleans())
def test_the_tokens_of_any_text_tile_it(text: str, conforming: bool) -> None:
    """It never raises, every token has a length, and together they are the text."""
    tokens = tokenize(text, conforming)
    position = 0
    for kind, start, end in tokens:
        assert kind in range(1, len(KIND_NAMES))
        assert start == position
        assert end > start
        position = end
    assert position == len(text)


@given(TEXTS)
def test_a_token_lexed_alone_is_the_same_token(text: str) -> None:
    for kind, start, end in tokenize(text):
        if kind in (lexer.WORD, lexer.QUOTED, lexer.STRING, lexer.NUMBER, lexer.PARAM):
            assert tokenize(text[start:end]) == [(kind, 0, end - start)]


@given(WHOLE, st.data())
def test_comments_between_tokens_do_not_change_the_statements(pieces: list[str], data: st.DataObject) -> None:
    one_line = st.sampled_from([" ", "/* ; ' */", "/* /* ; */ $$ */"])
    comment = one_line | st.just(" -- ; '\n")
    plain = " ".join(pieces)
    # After a string a line break may make the next string its continuation.
    commented = "".join(piece + data.draw(one_line if piece[-1] == "'" else comment) for piece in pieces)
    assert [shown(plain[s:e]) for s, e in split(plain)] == [shown(commented[s:e]) for s, e in split(commented)]


class CountingText(str):
    """A text that counts how many characters are looked at, in the interpreted lexer."""

    __slots__ = ("looks",)

    def __new__(cls, text: str) -> "CountingText":
        self = super().__new__(cls, text)
        self.looks = 0
        return self

    def __getitem__(self, key: object) -> str:
        self.looks += 1
        return super().__getitem__(key)  # type: ignore[index]

    def find(self, sub: str, start: int = 0, end: int = sys.maxsize) -> int:  # type: ignore[override]
        found = super().find(sub, start, end)
        self.looks += (found if found >= 0 else min(end, len(self))) - start
        return found


@pytest.mark.skipif(str(lexer.__file__).endswith(".so"), reason="counts the looks of interpreted code")
@pytest.mark.parametrize(
    "make",
    [
        lambda n: "a " * n,
        lambda n: "+-" * n + "+",
        lambda n: "*" + "+-" * n,
        lambda n: "/*" * n + "*/" * n,
        lambda n: "/* */" * n,
        lambda n: "/*" * n,
        lambda n: "$a" * n,
        lambda n: "$$ $$ " * n,
        lambda n: "$a$ $b$ " * n,
        lambda n: "'a' " * n,
        lambda n: "'a'\n" * n,
        lambda n: "'a' -- x\r" * n,
        lambda n: "-- x\r" * n,
        lambda n: '"a"' * n,
        lambda n: "e'\\'' " * n,
        lambda n: "1.5e5 " * n,
        lambda n: "1_" * n,
        lambda n: "(" * n,
        lambda n: "create function begin atomic " + "case " * n,
        lambda n: "".join(f"$a{i}$ " for i in range(n)),
    ],
)
def test_work_grows_with_the_length_of_the_text(make: Callable[[int], str]) -> None:
    def looks_per_character(n: int) -> float:
        text = CountingText(make(n))
        one = Lexer(text)
        while one.advance() != lexer.END:
            pass
        return text.looks / len(text)

    assert looks_per_character(4000) < 1.5 * looks_per_character(400) + 1


@pytest.mark.parametrize(
    ("raw", "value"),
    [
        ("'it''s'", "it's"),
        ("'a\\b'", "a\\b"),
        ("E'\\x41\\102\\n\\\\\\'\\u00e9\\q'", "AB\n\\'éq"),
        ("E'a''b\\''", "a'b'"),
        ("E'\\xc3\\xa9'", "é"),
        ("E'\\xff'", None),
        ("E'\\0'", None),
        ("E'\\ud83d\\ude00'", "😀"),
        ("E'\\ud83d'", None),
        ("U&'\\0041\\+01F600\\\\'", "A😀\\"),
        ("U&'\\00'", None),
        ("'a'\n'b'", "ab"),
        ("E'a\\''\n -- c'\n'\\x41'", "a'A"),
        ("$$a'b$$", "a'b"),
        ("$t$a$t$", "a"),
        ("N'a'", "a"),
        ("B'01'", None),
    ],
)
def test_a_string_is_decoded_as_the_server_does(raw: str, value: str | None) -> None:
    assert literals.string(raw) == value


def test_the_escape_of_uescape_and_the_old_backslashes_are_heeded() -> None:
    assert literals.string("U&'!0041\\'", escape="!") == "A\\"
    assert literals.string("'a\\x41'", conforming=False) == "aA"
    assert literals.identifier('U&"s!0065t"', "!") == "set"


@pytest.mark.parametrize(
    ("raw", "name"),
    [
        ("AbC", "abc"),
        ("ÀB", "Àb"),
        ("\u212a", "\u212a"),  # the Kelvin sign, whose lower case is k
        ('"A""b"', 'A"b'),
        ('U&"\\0053et"', "Set"),
        ("x" * 70, "x" * 63),
        ('"' + "é" * 40 + '"', "é" * 31),
    ],
)
def test_an_identifier_is_folded_and_cut_as_the_server_does(raw: str, name: str) -> None:
    assert literals.identifier(raw) == name
