"""Maps in the form of pg_ident.conf: whom a system's name may be in the database."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cenote.errors import ConfigError
from cenote.proxy.auth.maps import NO_MAPS, Maps, load_maps, parse_maps


def problems(text: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse_maps(text, "ident")
    return list(caught.value.problems)


def test_without_a_map_both_names_must_be_equal() -> None:
    assert NO_MAPS.allows("", "ann", "ann")
    assert not NO_MAPS.allows("", "ann", "Ann")
    assert not NO_MAPS.allows("staff", "ann", "ann")


@pytest.mark.parametrize(
    ("line", "system", "user", "expected"),
    [
        ("staff ann shop", "ann", "shop", True),
        ("staff ann shop", "ann", "ann", False),
        ("staff ann shop", "bob", "shop", False),
        ("other ann shop", "ann", "shop", False),
        ('"staff" "ann lee" "the shop"', "ann lee", "the shop", True),
        ("staff ann all", "ann", "whoever", True),
        ('staff ann "all"', "ann", "whoever", False),
        ('staff ann "all"', "ann", "all", True),
        ("staff all ann", "bob", "ann", False),
        (r"staff /^(.*)@example\.com$ \1", "ann@example.com", "ann", True),
        (r"staff /^(.*)@example\.com$ \1", "ann@example.com", "bob", False),
        (r"staff /^(.*)@example\.com$ \1", "ann@example.org", "ann", False),
        (r"staff /^(.*)@example\.com$ \1", "ann@example.com\n", "ann", False),
        (r"staff /^(.*)@x$ app_\1_ro", "ann@x", "app_ann_ro", True),
        (r"staff /^(.*)@x$ \1\1", "a@x", r"a\1", True),
        (r"staff /^(.*)@x$ \1", "all@x", "whoever", False),
        (r"staff /^(.*)@x$ \1", "/.@x", "whoever", False),
        (r"staff ann \1", "ann", r"\1", True),
        ("staff /^a guest", "ann", "guest", True),
        ("staff ann /^app_", "ann", "app_ro", True),
        ("staff ann /^app_", "ann", "web", False),
        ("staff /n app", "ann", "app", True),
    ],
)
def test_a_line_lets_a_systems_name_be_a_user(line, system, user, expected) -> None:
    assert parse_maps(line, "ident").allows("staff", system, user) is expected


def test_any_line_of_the_map_may_allow() -> None:
    maps = parse_maps("staff ann shop\nstaff ann web\nowner ann postgres\n", "ident")
    assert [user for user in ("shop", "web", "postgres") if maps.allows("staff", "ann", user)] == ["shop", "web"]
    assert maps.names == {"staff", "owner"}


def test_a_group_that_matched_nothing_ends_the_search_as_at_postgresql() -> None:
    maps = parse_maps(r"staff /^(x)?ann$ \1" + "\nstaff ann shop\n", "ident")
    assert not maps.allows("staff", "ann", "shop")


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("staff", "1 fields"),
        ("staff ann", "2 fields"),
        ("staff ann shop more", "4 fields"),
        ("staff ann,bob shop", "more than one"),
        ("staff ann +ops", "known to the server only"),
        ("staff /( shop", "regular expression"),
        ("staff ann /(", "regular expression"),
        (r"staff /^ann$ \1", "which has none"),
        ("include other", "other files are not read"),
        ("staff @names shop", "other files are not read"),
    ],
)
def test_what_cannot_be_used_is_a_problem_with_its_line(line, problem) -> None:
    (found,) = problems(f"# maps\n{line}\n")
    assert found.startswith("ident:2: ")
    assert problem in found


def test_all_problems_are_told_at_once() -> None:
    assert [text.split(":")[1] for text in problems("a\nb c d\ne f\n")] == ["1", "3"]


def test_an_empty_file_has_no_maps(tmp_path) -> None:
    (tmp_path / "ident").write_text("# none yet\n")
    assert not load_maps(tmp_path / "ident").names


PIECES = st.sampled_from(["staff", "ann", "all", "/^(.*)$", "/(", r"\1", '"', "\\\n", "\n", " ", ",", "#", "+x"])


def maps_or_problems(text: str) -> Maps | list[str]:
    try:
        return parse_maps(text, "ident")
    except ConfigError as error:
        return list(error.problems)


@given(st.lists(PIECES | st.text(max_size=4), max_size=30).map(" ".join), st.text(), st.text())
def test_whatever_the_file_says_it_is_maps_or_problems(text, system, user) -> None:
    maps = maps_or_problems(text)
    if not isinstance(maps, Maps):
        assert all(re.match(r"ident:\d+: ", problem) for problem in maps)
        return
    for name in [*maps.names, "", "none"]:
        assert maps.allows(name, system, user) in (True, False)
