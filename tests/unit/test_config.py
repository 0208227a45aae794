"""The options of a pool: each declared once, wrong ones refused, all problems told together."""

import dataclasses
import math
from typing import Any

import pytest

from cenote.config import PoolOptions, option_table, pool_options
from cenote.errors import ConfigError

NUMBERS = [name for name, kind, _, option in option_table() if kind in ("int", "float") and not option.choices]


def problems(**given: Any) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        pool_options(given)
    return caught.value.problems


def test_the_defaults_are_those_of_the_design() -> None:
    assert dataclasses.asdict(pool_options({})) == {
        "min_size": 2,
        "max_size": 10,
        "acquire_timeout": 30.0,
        "max_waiting": 10_000,
        "idle_timeout": 300.0,
        "max_lifetime": 1800.0,
        "check_after": 30.0,
        "peek_after": 0.5,
        "connect_timeout": 10.0,
        "codel": "shadow",
        "reset": "auto",
        "leak_after": None,
        "init_query": None,
    }


def test_all_problems_are_told_at_once() -> None:
    found = problems(max_size="x", acquire_timeout=-1, codel="maybe", nonsense=1, idle_timeout="soon")
    assert len(found) == 5
    for name in ("max_size", "acquire_timeout", "codel", "nonsense", "idle_timeout"):
        assert sum(name in text for text in found) == 1


def test_the_message_shows_every_problem_and_the_pool_s_name() -> None:
    with pytest.raises(ConfigError) as caught:
        pool_options({"max_size": 0, "codel": "maybe"}, pool="orders")
    text = str(caught.value)
    assert text.startswith('pool "orders": cannot use this configuration:')
    assert all(f"\n  - {problem}" in text for problem in caught.value.problems)


@pytest.mark.parametrize(
    ("wrong", "right"),
    [("max_sise", "max_size"), ("acquire_timout", "acquire_timeout"), ("idle_timout", "idle_timeout")],
)
def test_an_unknown_name_is_refused_with_the_nearest_known_one(wrong: str, right: str) -> None:
    assert problems(**{wrong: 1}) == (f"unknown option {wrong!r}; did you mean {right!r}?",)


def test_an_unknown_name_like_no_other_is_refused_without_a_guess() -> None:
    assert problems(zzz=1) == ("unknown option 'zzz'",)


def test_an_unknown_choice_is_refused_with_all_choices_and_the_nearest() -> None:
    assert problems(codel="shadows") == (
        "codel = 'shadows': use one of 'off', 'shadow', 'on'; did you mean 'shadow'?",
    )


@pytest.mark.parametrize("value", [["auto"], {}, 1, None, True])
def test_a_choice_that_is_no_text_is_refused(value: object) -> None:
    assert len(problems(reset=value)) == 1


@pytest.mark.parametrize("value", [True, False, math.nan, "1", b"1", 1j, [1]])
@pytest.mark.parametrize("name", NUMBERS)
def test_what_is_no_number_is_refused_wherever_a_number_belongs(name: str, value: object) -> None:
    assert any(problem.startswith(f"{name} = {value!r}: must be ") for problem in problems(**{name: value}))


@pytest.mark.parametrize("name", ["min_size", "max_size", "max_waiting"])
def test_sizes_are_whole_numbers(name: str) -> None:
    for value in (2.0, 2.5, math.inf):
        assert "must be a whole number" in problems(**{name: value})[0]


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("min_size", [0, 10], [-1]),
        ("max_size", [2, 100_000], [0, -1, 100_001]),
        ("acquire_timeout", [0, 0.5, math.inf], [-0.001, -math.inf]),
        ("max_waiting", [0, 10_000_000], [-1, 10_000_001]),
        ("idle_timeout", [0.001, math.inf], [0, -1]),
        ("max_lifetime", [0.001, math.inf], [0, -1]),
        ("check_after", [0, 1], [-1]),
        ("peek_after", [0, 1], [-1]),
        ("connect_timeout", [0.1], [0, -1]),
        ("leak_after", [0.1, None], [0, -1]),
    ],
)
def test_each_number_has_its_range_and_the_problem_names_it(
    name: str, good: list[float | None], bad: list[float]
) -> None:
    for value in good:
        assert getattr(pool_options({name: value}), name) == value
    for value in bad:
        assert any(f"{name} = {value!r}: allowed is " in text for text in problems(**{name: value}))


def test_a_problem_with_a_duration_says_its_unit() -> None:
    assert problems(idle_timeout=0) == ("idle_timeout = 0: allowed is more than 0 seconds",)
    assert problems(acquire_timeout="x") == ("acquire_timeout = 'x': must be a number of seconds",)
    assert problems(max_waiting=-1) == ("max_waiting = -1: allowed is 0 to 10,000,000",)


@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(PoolOptions)])
def test_none_is_allowed_only_where_it_means_something(name: str) -> None:
    if name in ("leak_after", "init_query"):
        assert getattr(pool_options({name: None}), name) is None
    else:
        assert len(problems(**{name: None})) == 1


@pytest.mark.parametrize("value", ["", "  ", 7, b"select 1"])
def test_an_init_query_is_a_text_that_says_something(value: object) -> None:
    assert problems(init_query=value) == (f"init_query = {value!r}: must be a non-empty text",)


def test_a_minimum_above_the_maximum_is_refused_with_both_numbers() -> None:
    (problem,) = problems(min_size=5, max_size=3)
    assert "min_size = 5 is above max_size = 3" in problem
    assert "min_size = 11 is above max_size = 10" in problems(min_size=11)[0]


def test_a_maximum_of_one_alone_is_fine_and_lowers_the_default_minimum() -> None:
    options = pool_options({"max_size": 1})
    assert (options.min_size, options.max_size) == (1, 1)
    assert pool_options({"max_size": 2}).min_size == 2


def test_changes_are_checked_against_what_is_already_set() -> None:
    options = pool_options({"min_size": 5, "codel": "on"})
    with pytest.raises(ConfigError, match="min_size = 5 is above max_size = 4"):
        options.replaced({"max_size": 4})
    changed = options.replaced({"max_size": 6})
    assert (changed.min_size, changed.max_size, changed.codel) == (5, 6, "on")
    assert options.max_size == 10


def test_options_cannot_be_changed_in_place() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        pool_options({}).max_size = 3  # type: ignore[misc]


def test_every_option_has_a_text_and_every_duration_a_unit() -> None:
    rows = option_table()
    assert [row[0] for row in rows] == [f.name for f in dataclasses.fields(PoolOptions)]
    for name, kind, default, option in rows:
        assert len(option.text) > 10, name
        assert kind in ("int", "float", "str")
        assert default
        assert bool(option.unit) == (kind == "float"), name
        assert bool(option.none_means) == (default == "none"), name


def test_the_table_shows_defaults_that_are_themselves_allowed() -> None:
    for name, kind, default, option in option_table():
        value: Any = {"int": int, "float": float, "str": str}[kind](default) if default != "none" else None
        assert option.problem(name, value, kind) is None
