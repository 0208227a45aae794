"""The classifier on texts alone; that it tells the truth is `tests/integration/test_sql_against_server.py`."""

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cenote.sql import touch
from cenote.sql.classify import Classifier, classify
from cenote.sql.scan import scan
from cenote.sql.touch import PREPARED, ROLE, SEQUENCE, SETTINGS, TEMP, UNKNOWN
from cenote.sql.verdict import DEFAULT


def test_every_flag_is_one_bit_with_a_word_of_its_own() -> None:
    assert sum(touch.WORDS) == touch.ALL
    assert len(set(touch.WORDS.values())) == len(touch.WORDS)
    assert touch.words(SETTINGS | UNKNOWN) == ("settings", "unknown")
    assert touch.words(0) == ()


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("set a = 1; set session B.c to 2; reset d", ("a", "b.c", "d")),
        ("set time zone 'UTC'", ("timezone",)),
        ("set names 'utf8'", ("client_encoding",)),
        ("set schema 'a'", ("search_path",)),
        ("set session characteristics as transaction read only", ("default_transaction_read_only",)),
        ("select set_config('A.b', 'x', false), set_config('c', 'x', false)", ("a.b", "c")),
        ('set "My.Setting" = 1', ("my.setting",)),
        ("set sort_mem = 1", ("work_mem",)),
        ("set local a = 1", ()),
    ],
)
def test_the_settings_set_are_named(text: str, names: tuple[str, ...]) -> None:
    verdict = classify(text)
    assert verdict.settings == names
    assert verdict.touches == (SETTINGS if names else 0)


@pytest.mark.parametrize(
    "text",
    [
        "reset all",
        "discard all",
        "set a = 1; reset all",
        "select set_config($1, 'x', false)",
        "select set_config('a', 'x', false), set_config(n, 'x', false) from t",
        "set " + "a." * 50 + "b = 1",
        "select set_config('a'",
    ],
)
def test_no_setting_is_named_unless_all_are_known(text: str) -> None:
    verdict = classify(text)
    assert verdict.touches & SETTINGS
    assert verdict.settings == ()


@pytest.mark.parametrize(
    ("text", "assigns"),
    [
        ("set a = 1", []),
        ("set local a = 1", [("a", "", True)]),
        ('set/**/local "A"."b" to default', [("a.b", DEFAULT, True)]),
        ("set local a = 'default'", [("a", "", True)]),
        ("set time zone/**/local", [("timezone", DEFAULT, False)]),
        ("set local role r", [("role", "", True)]),
        ("set transaction read only", []),
        ("select set_config('a', 'x', false)", []),
        ("select set_config('a', 'x', true)", [("a", "", True)]),
        ("select set_config('a', null, false)", [("a", DEFAULT, False)]),
        ("select set_config('a', lower('X'), true)", [("a", DEFAULT, True)]),
        ("select set_config($1, $2::text, true)", [("$1", "$2", True)]),
        ("select set_config(n, 'x', true) from t", [("", "", True)]),
    ],
)
def test_what_is_set_for_a_transaction_or_to_its_default_is_told(text, assigns) -> None:
    assert list(classify(text).assigns) == assigns


def test_a_computed_name_may_be_the_role() -> None:
    assert classify("select set_config($1, $2, false)").touches == SETTINGS | ROLE
    assert classify("select set_config($1, $2, true)").touches == 0
    assert classify("select set_config('a.b', $1, $2)").touches == SETTINGS


@pytest.mark.parametrize(
    ("text", "verb"),
    [
        ("select 1", "SELECT"),
        ("  (Select 1)", "SELECT"),
        ("/* x */ with a as (select 1) insert into t select * from a", "WITH"),
        ("begin; insert into t values (1); commit", "INSERT"),
        ("begin", "BEGIN"),
        ("commit; begin", "COMMIT"),
        ("update t set a = 1; select 1", "SELECT"),
        ("", ""),
        (";;", ""),
        ("'x'", ""),
    ],
)
def test_the_verb_is_that_of_the_last_statement_that_does_something(text: str, verb: str) -> None:
    assert classify(text).verb == verb


@pytest.mark.parametrize(
    ("text", "opens"),
    [
        ("begin", True),
        ("start transaction read only", True),
        ("begin; select 1", True),
        ("begin; commit", False),
        ("begin; end", False),
        ("begin; rollback to a", True),
        ("begin; rollback work to savepoint a", True),
        ("commit and chain", True),
        ("rollback and no chain", False),
        ("begin; prepare transaction 'x'", False),
        ("commit prepared 'x'", False),
        ("commit; begin", True),
        ("select 1", False),
    ],
)
def test_a_transaction_left_open_is_told(text: str, opens: bool) -> None:
    assert classify(text).opens_transaction is opens


@pytest.mark.parametrize(
    ("text", "functions"),
    [
        ("select count(*), lower(a), pg_catalog.md5(b) from t", ()),
        ("select f(1), F (2), g(f(3))", ("f", "g")),
        ('select app.f(), "App"."G"()', ("app.f", "App.G")),
        ("select app.set_config('a', 'b', false)", ("app.set_config",)),
        ("insert into t (a, b) values (f(1), 2)", ("f",)),
        ("select * from g(1) as x(a, b) join h(2) y(a) using (a)", ("g", "h")),
        ("with t(a) as (select 1) select a::vector(3), cast(a as numeric(3)) from t where a in (1)", ()),
        ("select a from t where exists (select 1) and (a, b) = any (values (1, 2))", ()),
        ("call p(1)", ("p",)),
        ("create function f() returns int language sql as 'x'", ()),
        ("create view v as select f()", ()),
        ("explain select f()", ()),
        ("explain analyze select f()", ("f",)),
        ("select 'f()', \"f()\", $$f()$$ /* f() */", ()),
        ("select information_schema._pg_truetypid(a, t) from x", ()),
    ],
)
def test_functions_that_do_not_come_with_the_server_are_listed(text: str, functions: tuple[str, ...]) -> None:
    assert classify(text).unknown_functions == functions


@pytest.mark.parametrize(
    ("text", "hidden"),
    [
        ("select a from t for update", False),
        ("select a from t for no key update", False),
        ("insert into t values (1)", True),
        ("with x as (update t set a = 1 returning a) select * from x", True),
        ("copy t from stdin", True),
        ("do $$ $$", True),
        ("call p()", True),
        ("create table t (a int)", True),
        ("show work_mem", False),
        ("begin", False),
    ],
)
def test_a_text_that_runs_code_it_does_not_show_says_so(text: str, hidden: bool) -> None:
    assert classify(text).hidden is hidden


def test_what_a_text_needs_of_earlier_statements_is_told() -> None:
    assert classify("select currval('s')").reads == SEQUENCE
    assert classify("execute p").reads == PREPARED
    assert classify("explain execute p").reads == PREPARED
    assert classify("fetch c").reads == touch.CURSOR
    assert classify("select nextval('s')").reads == 0


@pytest.mark.parametrize(
    ("text", "touches"),
    [
        ("select dblink_connect('c', 'dbname=x')", touch.LOAD),
        ("select ext.dblink_connect('dbname=x')", touch.LOAD),
        ("select set_limit(0.5)", SETTINGS),
        ("select set_user('x')", ROLE),
        ("select pg_replication_origin_session_setup('x')", touch.LOAD),
        ("select pg_create_physical_replication_slot('x', true, true)", touch.LOAD),
        ("select query_to_xml('select 1', true, true, '')", UNKNOWN),
    ],
)
def test_functions_known_to_touch_the_session_are_marked(text: str, touches: int) -> None:
    assert classify(text).touches == touches


def test_both_readings_of_a_backslash_count() -> None:
    """With standard_conforming_strings off, the second statement is the one that runs."""
    verdict = classify("select 'a\\'; set a = 1; --' ; set b = 2")
    assert verdict.touches == SETTINGS
    assert verdict.settings == ("a", "b")
    assert classify("select 'x' like 'a' escape '\\'").touches == 0


def test_a_body_that_is_none_hides_nothing() -> None:
    """CASE as a bare label keeps the body open for the lexer; what then follows is not trusted."""
    verdict = classify(
        "create function f() returns int begin atomic select 1 case; end;"
        " set a = 1; select nextval('s'); select 1 end"
    )
    assert verdict.touches == UNKNOWN | SEQUENCE
    long_head = "create function f(" + ", ".join(f"a{i} int" for i in range(50)) + ") returns bigint"
    assert classify(long_head + " begin atomic select nextval('s'); end").touches == SEQUENCE


@pytest.mark.parametrize(
    ("text", "touches"),
    [
        ("update t set work_mem = 1, role = 2", 0),
        ("update pg_settings set setting = '5MB' where name = 'work_mem'", SETTINGS),
        ('explain analyze update only pg_catalog."pg_settings" as s set setting = 1', SETTINGS),
        ("update pg_settings_of_ours set setting = 1", 0),
        ("select * from pg_settings for update", 0),
        ("insert into t values (1) on conflict (a) do update set a = 2", 0),
        ("merge into t using u on t.a = u.a when matched then update set a = 1", 0),
        ("insert into pg_temp.x values (1)", 0),
        ("select * from pg_temp.x", 0),
        ("create table pg_temp.x (a int) on commit drop", 0),
        ("create table a.pg_temp (a int)", 0),
        ("create temp table x (a int) on commit preserve rows", TEMP),
        ("create temp view x as select 1 as on_commit_drop", TEMP),
        ("create schema a create view v as select set_config('a', 'b', false)", SETTINGS),
        ("select 1 into pg_temp_3.x", TEMP),
        ("create table pg_temp_3.x (a int)", TEMP),
        ("select 1 into temp", TEMP),  # a table named temp: not worth telling apart
        ("explain (analyze off) create temp table x as select 1", TEMP),
        ("explain create temp table x as select 1", 0),
        ("explain (" + "costs off, " * 20 + "analyze) select nextval('s')", UNKNOWN),
        ("alter system set work_mem = 1; alter database d set role = 'x'; alter role r set a = 1", 0),
        ("set transaction snapshot 'x'", 0),
        ("create table x as execute p", UNKNOWN),
        ("prepare p as select nextval('s'), set_config('a', 'b', false)", PREPARED),
        ("vacuum (analyze) t", 0),
        ("\\. ", UNKNOWN),
        ("set", SETTINGS),
        ("set session characteristics as transaction", 0),
        ("select set_config('search_path', 'a, pg_temp', true)", TEMP),
        ("declare c cursor for select 1 as hold", 0),
    ],
)
def test_phrases_that_look_alike_are_told_apart(text: str, touches: int) -> None:
    assert touch.words(classify(text).touches) == touch.words(touches)


@pytest.mark.parametrize(
    ("text", "defines"),
    [
        ("create or replace function f() returns int language sql as 'select 1'", True),
        ("begin; alter table t alter a set default f(); commit", True),
        ("alter role r set app.tenant = 'x'", True),
        ("create table t (a int default f())", True),
        ("create temp table t (a int)", False),
        ("create unique index on t (a)", False),
        ("drop function f; insert into t values (1)", False),
    ],
)
def test_what_others_may_run_from_then_on_is_a_definition(text: str, defines: bool) -> None:
    assert classify(text).defines is defines


def test_names_are_folded_as_the_server_does_it() -> None:
    """The ASCII letters only: a byte of a longer character is none, whatever it looks like in Latin-1."""
    assert classify("set App.Caf\xc3\xa9 = 1").settings == ("app.caf\xc3\xa9",)


WORDS = (
    "select set local session to = from all reset role time zone ( ) , ; . 'a' \"b\" $1 1 set_config nextval f"
    " create temp table as begin atomic end case explain analyze into pg_temp on commit drop declare cursor with"
    " hold prepare execute uescape U&'a' U&\"b\" E'\\'' '\\' transaction authorization characteristics discard"
    " pg_temp.x search_path true false :: bool partition of function or replace \0"
)


@given(st.one_of(st.text(max_size=60), st.lists(st.sampled_from(WORDS.split(" ")), max_size=25).map(" ".join)))
def test_any_text_has_a_verdict(text: str) -> None:
    verdict = scan(text)
    assert 0 <= verdict.touches <= touch.ALL
    assert verdict.settings == () or verdict.touches & SETTINGS
    assert verdict.statements >= 0
    assert repr(verdict)


PLAIN = (
    "select insert update delete SELECT into INTO values temp a b_1 1 1.5 'x' 'into' E'y' , . = < - * ; \n [ ] ::"
    " from ( ) (a) (1,'b') nextval set_config (1)"
)
STARTS = ["", "select ", "Insert into t values ", "insert into s.t (a, b) values (1, 2)", "update t set a = "]


@given(st.sampled_from(STARTS), st.lists(st.sampled_from(PLAIN.split(" ")), max_size=12).map(" ".join))
def test_the_short_cut_for_plain_texts_agrees_with_reading_them(start: str, rest: str) -> None:
    text = start + rest
    short, long = Classifier().classify(text), scan(text)
    assert (short.touches, short.settings, short.verb) == (long.touches, long.settings, long.verb)
    assert (short.reads, short.statements) == (long.reads, long.statements)
    assert short.opens_transaction == long.opens_transaction
    assert short.unknown_functions == long.unknown_functions
    assert short.hidden >= long.hidden or "select" in text.lower()


@pytest.mark.parametrize(
    "text",
    [
        "SELECT abalance FROM pgbench_accounts WHERE aid = 12345;",
        "UPDATE pgbench_accounts SET abalance = abalance + -12 WHERE aid = 1;",
        "INSERT INTO h (tid, bid, mtime) VALUES (1, -2, CURRENT_TIMESTAMP), (1, 'it''s', null);",
        "delete from t where a = 'x'",
    ],
)
def test_plain_texts_with_literals_do_not_fill_the_cache(text: str) -> None:
    classifier = Classifier()
    assert classifier.classify(text).touches == 0
    assert classifier.cached() == (0, 0)


def test_a_verdict_is_kept_and_given_again() -> None:
    classifier = Classifier()
    text = "select f(1)"
    assert classifier.classify(text) is classifier.classify("select " + "f(1)")


def test_the_cache_is_bounded_in_entries_and_in_characters() -> None:
    classifier = Classifier(entries=100, characters=100_000)
    for i in range(1000):
        classifier.classify(f"select f({i})")
    assert 0 < classifier.cached()[0] <= 100
    for i in range(100):
        classifier.classify(f"select f({i}, '{'x' * 10_000}')")
    assert 0 < classifier.cached()[1] <= 100_000
    before = classifier.cached()
    classifier.classify(f"select f('{'x' * 20_000}')")
    assert classifier.cached() == before


def test_what_is_asked_for_again_and_again_stays_cached() -> None:
    classifier = Classifier(entries=100)
    kept = classifier.classify("select kept()")
    for i in range(1000):
        classifier.classify(f"select f({i})")
        if i % 20 == 0:
            assert classifier.classify("select kept()") is kept


def test_many_threads_may_ask_at_once() -> None:
    classifier = Classifier(entries=50)
    wrong: list[str] = []

    def ask(seed: int) -> None:
        for i in range(2000):
            name = f"f{(i * seed) % 97}"
            if classifier.classify(f"select {name}()").unknown_functions != (name,):
                wrong.append(name)

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in (1, 3, 5, 7)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert classifier.cached()[0] <= 50
