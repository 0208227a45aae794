"""What borrowers ask for in different words is one thing, and SQL is made of the differences only."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cenote.pool.settings import MOST_SETTINGS, Carried, Wishes, WrongSettings, canonical, conversion, literal


def test_equal_wishes_are_one_object_whatever_their_order_case_and_type() -> None:
    wishes = Wishes()
    first = wishes.read({"app.tenant": 42, "TimeZone": "UTC"})
    assert first == (("app.tenant", "42"), ("timezone", "UTC"))
    assert wishes.read({"timezone": "UTC", "APP.tenant": "42"}) is first
    assert wishes.read({"app.tenant": 42, "TimeZone": "UTC"}) is first


@pytest.mark.parametrize(("value", "text"), [(1, "1"), (True, "on"), (1.0, "1.0"), (False, "off"), (-0.0, "0.0")])
def test_values_that_are_equal_in_python_keep_their_own_texts(value: Any, text: str) -> None:
    wishes = Wishes()
    for other in (1, True, 1.0, 0, False, 0.0, -0.0):
        wishes.read({"app.x": other})
    assert wishes.read({"app.x": value}) == (("app.x", text),)


def test_asking_for_nothing_is_asking_for_the_base_state() -> None:
    assert Wishes().read({}) is None


def test_a_long_value_is_not_kept() -> None:
    wishes = Wishes()
    wish = {"request.jwt": "x" * 5000}
    assert wishes.read(wish) == wishes.read(wish)
    assert wishes.read(wish) is not wishes.read(wish)


def test_as_many_settings_as_allowed_are_allowed() -> None:
    wish = {f"app.x{number}": number for number in range(MOST_SETTINGS)}
    assert len(canonical(wish) or ()) == MOST_SETTINGS
    with pytest.raises(WrongSettings):
        canonical({**wish, "one": "more"})


@pytest.mark.parametrize("wrong", [{"x": "secret\0"}, {"x": b"secret"}, {"x": ["secret"]}, {"x y": "secret"}])
def test_a_problem_never_repeats_a_value(wrong: dict[str, Any]) -> None:
    with pytest.raises(WrongSettings) as caught:
        canonical(wrong)
    assert "secret" not in str(caught.value)


A: Carried = (("app.tenant", "1"), ("search_path", "a"))
B: Carried = (("app.tenant", "2"), ("search_path", "a"))
ROLE: Carried = (("app.tenant", "1"), ("role", "x"))


@pytest.mark.parametrize(
    ("carried", "wanted", "script"),
    [
        (A, A, ""),
        (None, None, ""),
        (A, B, "SELECT pg_catalog.set_config('app.tenant','2',false)"),
        (
            A,
            (("app.tenant", "1"),),
            "SELECT pg_catalog.set_config('search_path',NULL,false)",
        ),
        (None, ROLE, "SELECT pg_catalog.set_config('app.tenant','1',false)\n;SET ROLE 'x'"),
        (
            ROLE,
            (("app.tenant", "2"), ("role", "x")),
            "RESET ROLE\n;SELECT pg_catalog.set_config('app.tenant','2',false)\n;SET ROLE 'x'",
        ),
        (ROLE, (("app.tenant", "1"),), "RESET ROLE"),
    ],
)
def test_only_the_differences_are_sent(carried: Carried | None, wanted: Carried | None, script: str) -> None:
    assert conversion(carried, wanted, None) == script


@pytest.mark.parametrize(
    ("init_query", "runs"), [(None, False), ("SELECT 1", False), ("SET work_mem = '1MB'", True), ("DO $$$$", True)]
)
def test_an_init_query_runs_again_where_settings_go_and_it_makes_some(init_query: str | None, runs: bool) -> None:
    assert ((init_query or "nothing") in conversion(A, None, init_query)) is runs
    assert "work_mem" not in conversion(A, B, init_query), "nothing is lost"


@given(st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0")))
def test_a_literal_is_plain_ascii_and_cannot_end_early(text: str) -> None:
    written = literal(text)
    inside = written[2:-1] if written.startswith("E") else written[1:-1]
    assert written.isascii()
    assert written.isprintable()
    assert "'" not in inside
    assert (inside.encode().decode("unicode_escape") if written.startswith("E") else inside) == text
