"""The classifier and the lexer against what real servers do: soundness first, then exactness."""

import contextlib
import re
from collections.abc import Iterator

import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from psycopg import pq
from sql_corpus import CAUTIOUS, HARMLESS, HIDDEN, SETUP, TOUCHING

from cenote import embedded
from cenote.sql import builtins, lexer, literals, touch
from cenote.sql.classify import classify
from cenote.sql.functions import EXTENSION_TOUCHES, READS, SET_CONFIG, TOUCHES
from cenote.testing.postgres import fresh_database

pytestmark = pytest.mark.pg

# Settings that pg_settings does not list.
CUSTOM = ["app.tenant"] + [
    f"{keyword}.x" for keyword in ("local", "session", "time", "names", "role", "transaction", "constraints")
]

SNAPSHOT = {
    # Left out: the settings of the transaction, and those a library brings when it is loaded. That a custom
    # setting reads as '' once it was set, and not as NULL, is a stain nothing takes away, and no change.
    touch.SETTINGS: "select name, setting, source from pg_settings where name !~ '^transaction_|^plpgsql'"
    f" union all select n, nullif(current_setting(n, true), ''), '' from unnest(array{CUSTOM}) n",
    touch.TEMP: "select 'c', relname from pg_class where relnamespace = pg_my_temp_schema() union all"
    " select 'f', proname from pg_proc where pronamespace = pg_my_temp_schema() union all"
    " select 't', typname from pg_type where typnamespace = pg_my_temp_schema()",
    touch.ADVISORY: "select classid, objid, objsubid, mode from pg_locks"
    " where locktype = 'advisory' and pid = pg_backend_pid()",
    touch.LISTEN: "select pg_listening_channels()",
    touch.PREPARED: "select name from pg_prepared_statements",
    touch.CURSOR: "select name from pg_cursors where is_holdable",
}
VISIBLE = sum(SNAPSHOT) | touch.ROLE | touch.SEQUENCE


class Session:
    """A new session that can tell what changed in it."""

    def __init__(self, dsn: str) -> None:
        self.connection = psycopg.connect(dsn, autocommit=True)

    def rows(self, sql: str) -> set[tuple[bytes | None, ...]] | str:
        result = self.connection.pgconn.exec_(sql.encode())
        if result.status != pq.ExecStatus.TUPLES_OK:
            return result.error_message.decode()
        return {
            tuple(result.get_value(row, column) for column in range(result.nfields))
            for row in range(result.ntuples)
        }

    def snapshot(self) -> dict[int, set[tuple[bytes | None, ...]] | str]:
        seen = {touch.ROLE: self.rows("select current_user, session_user, current_setting('role')")}
        # The other questions must not fail for want of rights.
        self.rows("reset session authorization")
        self.rows("reset role")
        seen |= {flag: self.rows(sql) for flag, sql in SNAPSHOT.items()}
        sequences = ("public.s", "public.t_id_seq", "public.temp_made_serial_seq")
        questions = ["select lastval()", *(f"select currval('{name}')" for name in sequences)]
        seen[touch.SEQUENCE] = "".join(str(self.rows(question)) for question in questions)
        return seen

    def run(self, text: str) -> tuple[list[pq.ExecStatus], list[str]]:
        """The status of each result of `text`, sent as a simple query, and the errors among them."""
        pgconn = self.connection.pgconn
        pgconn.send_query(text.encode())
        statuses, errors = [], []
        while result := pgconn.get_result():
            statuses.append(pq.ExecStatus(result.status))
            if result.status == pq.ExecStatus.FATAL_ERROR:
                errors.append(result.error_message.decode())
        return statuses, errors


def changes(dsn: str, text: str) -> tuple[int, set[str], list[str]]:
    """What running `text` changes in a new session: flags, names of settings; and the errors it met."""
    session = Session(dsn)
    with contextlib.closing(session.connection):
        before = session.snapshot()
        statuses, errors = session.run(text)
        status = session.connection.pgconn.transaction_status
        if not errors:
            verdict = classify(text)
            assert verdict.opens_transaction == (status != pq.TransactionStatus.IDLE), text
            ran = sum(status != pq.ExecStatus.EMPTY_QUERY for status in statuses)
            assert verdict.statements == ran, text
        if status != pq.TransactionStatus.IDLE:
            session.run("commit")
        after = session.snapshot()
    flags = sum(flag for flag in before if before[flag] != after[flag])
    settings = set(before[touch.SETTINGS]) ^ set(after[touch.SETTINGS])
    return flags, {row[0].decode().lower() for row in settings if isinstance(row, tuple) and row[0]}, errors


@pytest.fixture(scope="module")
def corpus_dsn(pg: embedded.Postgres) -> Iterator[str]:
    with fresh_database(pg, owner="postgres") as name:
        dsn = pg.dsn_for(user="postgres", database=name)
        with psycopg.connect(dsn, autocommit=True) as connection:
            connection.pgconn.exec_(SETUP.encode())
        yield dsn
        with psycopg.connect(dsn, autocommit=True) as connection:
            connection.execute("drop owned by cenote_other cascade")
            connection.execute("drop role cenote_other")


# What the server refuses here, and still must not be wrong.
FAILING = re.compile(
    r"nothing_prepared|'none'|"
    r"reset transaction|is_local =>|unterminated|frobnicate|atomic set|currval\('s'\)|lastval"
)


def test_a_text_called_harmless_leaves_nothing_in_the_session(corpus_dsn: str) -> None:
    wrong = []
    for text in HARMLESS:
        touches = classify(text).touches
        flags, _, errors = changes(corpus_dsn, text)
        if touches or flags or bool(errors) != bool(FAILING.search(text)):
            wrong.append((text, touch.words(touches), touch.words(flags), errors))
    assert wrong == []


def test_a_text_that_changes_the_session_is_marked_with_exactly_what_it_changes(corpus_dsn: str) -> None:
    wrong = []
    for text, touches in TOUCHING:
        verdict = classify(text)
        flags, settings, errors = changes(corpus_dsn, text)
        # A computed name may be the role's.
        certain = touches & ~touch.ROLE if touches & touch.SETTINGS else touches
        named = not verdict.settings or settings == set(verdict.settings)
        if verdict.touches != touches or flags != certain or errors or not named:
            wrong.append((text, verdict, touch.words(flags), settings, errors))
    assert wrong == []


def test_where_the_text_does_not_tell_the_mark_is_more_than_the_change(corpus_dsn: str) -> None:
    wrong = []
    for text, touches in CAUTIOUS:
        verdict = classify(text)
        flags, _, errors = changes(corpus_dsn, text)
        sound = flags & ~touches == 0 or touches & touch.UNKNOWN
        if verdict.touches != touches or not sound or bool(errors) != bool(FAILING.search(text)):
            wrong.append((text, verdict, touch.words(flags), errors))
    assert wrong == []


def test_what_the_text_does_not_show_is_left_to_an_audit_and_said_so(corpus_dsn: str) -> None:
    wrong = []
    for text, touches in HIDDEN:
        verdict = classify(text)
        flags, _, errors = changes(corpus_dsn, text)
        if not (verdict.hidden or verdict.unknown_functions) or flags != touches or errors:
            wrong.append((text, verdict, touch.words(flags), errors))
    assert wrong == []


def test_a_string_reads_otherwise_without_standard_conforming_strings(corpus_dsn: str) -> None:
    """Whatever the server runs when backslashes escape is in the verdict too."""
    session = Session(corpus_dsn)
    session.run("set standard_conforming_strings = off; set escape_string_warning = off")
    other = "select 'a\\'; set work_mem = 1000; --' ; set app.tenant = 'x'"
    assert session.run(other)[1] == []
    assert session.rows("select current_setting('app.tenant')") == {(b"x",)}
    assert classify(other).touches == touch.SETTINGS
    assert classify(other).settings == ("work_mem", "app.tenant")
    session.connection.close()


def test_the_names_of_built_in_functions_are_those_of_the_server(pg: embedded.Postgres) -> None:
    with psycopg.connect(pg.dsn) as connection:
        names = {name for (name,) in connection.execute(builtins.QUERY)}
    assert names - builtins.NAMES == set()
    assert {*TOUCHES, *READS, SET_CONFIG} <= builtins.NAMES
    assert not builtins.NAMES & set(EXTENSION_TOUCHES)


# -- the lexer ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def quiet(pg: embedded.Postgres) -> Iterator[psycopg.Connection]:
    with psycopg.connect(pg.dsn, autocommit=True) as connection:
        yield connection


LEXICAL = ("unterminated", "trailing junk", "zero-length", "too long", "invalid", "unsafe use")
FRAGMENTS = [
    *("a", "Ab_1$", "é", "\u00a0", "select", "e", "E", "U", "u&", "U&", "N", "n", "b", "X", "x1"),
    *("'", "''", '"', '""', "\\", "'a'", "'a\\'", '"a"', "$", "$$", "$a$", "$1", "$1a", "$_$", "0"),
    *("1", "12_3", "1_", "_", "0x", "0x1F", "0b1", "0o7", "0b2", "1e", "1e5", "1e+", "1E-3", "."),
    *("..", "...", "1.", ".5", ":", "::", ":=", "=>", "<=", "!=", "+", "-", "--", "/", "*", "/*", "*/"),
    *("@", "#", "?", "%", "|", "||", "&", "^", "~", "`", "<", ">", "=", "!", "(", ")", "[", "]", ","),
    *(" ", "\n", "\r", "\t", "\f", "\v", "-- c\n", "/* c */", "{", "uescape", "UESCAPE '!'"),
]
SOUP = st.lists(st.sampled_from(FRAGMENTS), min_size=1, max_size=12).map("".join)


def complaint(connection: psycopg.Connection, text: str) -> psycopg.Error | None:
    try:
        connection.pgconn.exec_(b"")
        connection.execute(text.encode())
    except psycopg.Error as error:
        return error
    return None


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(SOUP)
def test_every_token_is_where_the_server_finds_one(quiet: psycopg.Connection, soup: str) -> None:
    """After a complete statement the server names the very next token in its error; so each is asked for."""
    tokens = [t for t in lexer.tokenize(soup) if t[0] not in (lexer.SPACE, lexer.COMMENT)]
    for kind, start, _ in tokens:
        if kind == lexer.SEMICOLON:
            continue
        text = "unlisten * " + soup[start:]
        error = complaint(quiet, text)
        assert error is not None, text
        diag = error.diag
        assert diag.message_primary is not None, text
        assert diag.statement_position is not None, (text, diag.message_primary)
        at = int(diag.statement_position) - 1
        found = {t[1]: t for t in lexer.tokenize(text)}
        if diag.message_primary.startswith("syntax error"):
            assert at in found, (text, diag.message_primary)
            # N'...' is one token here; the server takes the N for itself.
            national = text[at : at + 2] in ("N'", "n'")
            assert national or found[at][0] != lexer.ERROR or text[at] in "$\\{", (text, diag.message_primary)
            near = text[at] if national else text[at : found[at][2]]
            message = diag.message_primary.removesuffix('"')
            if text[at : at + 2] in ("u&", "U&"):
                # UESCAPE and its string are joined to what they belong to before the grammar sees them.
                message = message[: len('syntax error at or near "') + len(near)]
            assert message == f'syntax error at or near "{near}', text
        elif "UESCAPE" in diag.message_primary or "Unicode" in diag.message_primary:
            pass  # found in a later step, inside of a token
        else:
            assert diag.message_primary.startswith(LEXICAL), (text, diag.message_primary)
            assert at in found, (text, diag.message_primary)
            assert found[at][0] == lexer.ERROR, (text, diag.message_primary)


PIECES = [
    *(
        "a",
        "é",
        "''",
        "\\\\",
        "\\'",
        "\\n",
        "\\x41",
        "\\x4",
        "\\xg",
        "\\101",
        "\\7",
        "\\0",
        "\\u0041",
        "\\u00e9",
    ),
    *(
        "\\U0001F600",
        "\\ud83d\\ude00",
        "\\ud83d",
        "\\q",
        "\\xc3\\xa9",
        "\\xff",
        "\\777",
        "\\0041",
        "\\+01F600",
    ),
    *("\\d83d\\de00", "'\n'", "' -- c\n '", "!0041", "!!", "\n", "$", '"'),
]
LITERALS = st.tuples(
    st.sampled_from(["'", "E'", "e'", "U&'", "N'", "$$", "$a$"]),
    st.lists(st.sampled_from(PIECES), max_size=5).map("".join),
    st.sampled_from(["", " uescape '!'"]),
)


@settings(max_examples=1000, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(LITERALS)
def test_a_string_has_the_value_the_server_gives_it(
    quiet: psycopg.Connection, literal: tuple[str, str, str]
) -> None:
    opening, content, uescape = literal
    closing = opening if opening[0] == "$" else "'"
    text = opening + content + closing
    escape = "!" if uescape and opening == "U&'" else "\\"
    if escape == "!":
        text += uescape
    result = quiet.pgconn.exec_(f"select {text}".encode())
    first = lexer.Lexer(text)
    kind = first.advance()
    raw = text[first.start : first.end]
    value = literals.string(raw, escape=escape) if kind == lexer.STRING else None
    if result.status == pq.ExecStatus.TUPLES_OK:
        # Where the literal ends early, what is left of the text became a label of the column.
        given_value = result.get_value(0, 0)
        assert given_value is not None
        assert value == given_value.decode()
    elif raw + (uescape if escape == "!" else "") == text:
        assert value is None, (text, result.error_message)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(['"', 'U&"']),
    st.lists(st.sampled_from(["a", "B", "é", '""', "\\0041", "\\+01F600", "\\", "x" * 40, "é" * 20]), max_size=4),
)
def test_an_identifier_has_the_name_the_server_gives_it(
    quiet: psycopg.Connection, opening: str, parts: list[str]
) -> None:
    raw = opening + "".join(parts) + '"'
    result = quiet.pgconn.exec_(f"select 1 as {raw}".encode())
    kind = lexer.Lexer(raw).advance()
    if result.status == pq.ExecStatus.TUPLES_OK:
        name = result.fname(0)
        assert name is not None
        assert literals.identifier(raw) == name.decode()
    else:
        assert kind == lexer.ERROR or literals.identifier(raw) is None


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text("+-*/<>=~!@#%^&|`?", min_size=1, max_size=8))
def test_an_operator_ends_where_the_server_ends_it(quiet: psycopg.Connection, text: str) -> None:
    result = quiet.pgconn.exec_(f"select point '(1,1)' {text} point '(1,1)'".encode())
    message = result.error_message.decode()
    match = re.search(r"operator does not exist: (?:point )?(\S+) (?:point|integer)", message)
    if match:
        tokens = {text[s:e] for kind, s, e in lexer.tokenize(text) if kind == lexer.OPERATOR}
        # The server takes != for <>.
        assert match[1] in tokens or (match[1] == "<>" and "!=" in tokens)
