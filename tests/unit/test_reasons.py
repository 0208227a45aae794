"""The words: each has a text, and the core uses no other."""

import ast
import re
from enum import StrEnum
from pathlib import Path

import pytest

import cenote.reasons
from cenote.core import machine
from cenote.reasons import TEXT, Closed, Failure, Opened, Pinned, Refused, failure_of, fatal_failure

KINDS: dict[str, type[StrEnum]] = {
    "opened": Opened,
    "refused": Refused,
    "closed": Closed,
    "pinned": Pinned,
    "failure": Failure,
}
# Not machine.__file__: that is an extension module in a compiled build. The sources lie beside each other.
MACHINE = Path(cenote.reasons.__file__).parent / "core" / "machine.py"


@pytest.mark.parametrize("kind", KINDS)
def test_every_word_has_a_text_and_every_text_a_word(kind: str) -> None:
    assert set(TEXT[kind]) == set(KINDS[kind])
    assert set(TEXT) == set(KINDS)
    assert all(len(text) > 10 for text in TEXT[kind].values())


@pytest.mark.parametrize("kind", KINDS)
def test_words_are_plain_lower_case_and_named_like_their_members(kind: str) -> None:
    for member in KINDS[kind]:
        assert re.fullmatch(r"[a-z_]+", member.value)
        assert member.name == member.value.upper()


# Which argument of which function of the machine is a reason, and of which kind.
PLACES = {
    "_close": (1, Closed),
    "_close_idle": (0, Closed),
    "_lost": (2, Closed),
    "_refuse": (1, Refused),
    "_refuse_later": (1, Refused),
    "_refuse_all": (0, Refused),
    "_order": (0, Opened),
}
COUNTS = {"opened_by": Opened, "closed_by": Closed, "refused_by": Refused}


def literals(node: ast.expr) -> set[str]:
    """The texts this expression may be; conditions inside it are no words."""
    if isinstance(node, ast.IfExp):
        return literals(node.body) | literals(node.orelse)
    return {node.value} if isinstance(node, ast.Constant) and isinstance(node.value, str) else set()


def words_of_the_machine() -> list[tuple[str, type[StrEnum]]]:
    found = []
    for node in ast.walk(ast.parse(MACHINE.read_text())):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        name = node.func.attr
        if name in PLACES and len(node.args) > PLACES[name][0]:
            at, kind = PLACES[name]
            found += [(word, kind) for word in literals(node.args[at])]
        elif name == "_count" and isinstance(node.args[0], ast.Attribute):
            kind = COUNTS[node.args[0].attr]
            found += [(word, kind) for word in literals(node.args[1])]
    return found


def test_every_reason_that_the_machine_gives_is_a_word_of_reasons() -> None:
    words = words_of_the_machine()
    assert {"stale", "max_lifetime", "idle_timeout", "shed", "timeout", "probe", "dial_failed"} <= {
        w for w, _ in words
    }
    assert [(word, kind.__name__) for word, kind in words if word not in set(kind)] == []
    assert {machine.DRAINING, machine.CLOSED} <= set(Refused), "the mode is the reason of a refusal"
    assert {machine.DESTINATION, machine.CONNECTION, machine.PERMANENT} <= set(Failure)


@pytest.mark.parametrize(
    ("sqlstate", "said"),
    [
        ("57P01", Failure.CONNECTION),
        ("57P02", Failure.DESTINATION),
        ("57P03", Failure.DESTINATION),
        ("25006", Failure.DESTINATION),
        ("25P03", Failure.PRIVATE),
        ("25P04", Failure.PRIVATE),
        ("57P05", Failure.PRIVATE),
        ("53300", Failure.TEMPORARY),
        ("53200", Failure.TEMPORARY),
        ("28P01", Failure.PERMANENT),
        ("28000", Failure.PERMANENT),
        ("3D000", Failure.PERMANENT),
        ("08006", Failure.CONNECTION),
        ("XX000", Failure.PRIVATE),
        ("", Failure.PRIVATE),
    ],
)
def test_what_a_fatal_error_says_of_the_destination_follows_from_its_sqlstate(
    sqlstate: str, said: Failure
) -> None:
    assert failure_of(sqlstate) is said


@pytest.mark.parametrize("sqlstate", ["57014", "25001", "22023", "0A000", "53300", "23505", "42501", "28P01", ""])
def test_an_error_that_need_not_end_the_session_says_nothing_of_it(sqlstate: str) -> None:
    assert fatal_failure(sqlstate) is None


@pytest.mark.parametrize(
    ("sqlstate", "said"),
    [("57P01", Failure.CONNECTION), ("08006", Failure.CONNECTION), ("25P03", Failure.PRIVATE)],
)
def test_an_error_that_ended_the_session_says_what_it_means_for_the_others(sqlstate: str, said: Failure) -> None:
    assert fatal_failure(sqlstate) is said
