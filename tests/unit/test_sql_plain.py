"""What is taken for plain at a glance is so to the classifier, too."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cenote.proxy.reading import read
from cenote.sql.plain import plain

# fmt: off
PIECES = [
    "SELECT", "select", "UPDATE", "delete from", "begin", "COMMIT", "a", "t", ",", "1", "x1", "FROM t",
    "WHERE a =", "$1", "$12", "$", "$$", "$q$", "a$1", "$1 $", "$_$", "'it'", "'", "''", "E'", '"', "\\", "/*",
    "*/", "--", "-", ";", "SET a = 1", "into", "INTO n", "nextval('s')", "f(1)", "()", "&",
    "set_config", "%", "[1]", "::int", "+ 2", "é",
]
# fmt: on


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("SELECT abalance FROM pgbench_accounts WHERE aid = $1;", True),
        ("select $1, $22", True),
        ("UPDATE t SET a = $1 WHERE b = $2", True),
        ("SELECT $", False),
        ("SELECT $$x$$", False),
        ("SELECT $1$q$;SET a=1;$q$", False),
        ("SELECT $q$ $q$", False),
        ("SELECT a$b FROM t", False),
        ("SELECT f($1)", False),
        ("SELECT $1 INTO n", False),
    ],
)
def test_parameters_are_plain_and_quotes_are_not(text: str, wanted: bool) -> None:
    assert plain(text.encode(), 0, len(text)) == wanted


@given(st.sampled_from(PIECES[:6]), st.lists(st.sampled_from(PIECES), max_size=12).map(" ".join))
def test_what_is_plain_does_nothing_to_the_session(first: str, rest: str) -> None:
    text = f"{first} {rest}".encode()
    if plain(text, 0, len(text)):
        assert not read(text).matters, text
