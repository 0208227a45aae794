"""The exceptions: stable codes, messages that name the pool, and copies that are equal."""

import copy
import inspect
import pickle
import re
from collections.abc import Callable

import pytest

from cenote import errors
from cenote.reasons import Refused

ALL = [
    found
    for _, found in inspect.getmembers(errors, inspect.isclass)
    if issubclass(found, errors.CenoteError) and found.__module__ == errors.__name__
]
REFUSALS = [
    found for found in ALL if issubclass(found, errors.AcquireRefused) and found is not errors.AcquireRefused
]
COPIES: list[Callable[[BaseException], BaseException]] = [
    copy.copy,
    copy.deepcopy,
    *(lambda error, protocol=n: pickle.loads(pickle.dumps(error, protocol)) for n in range(2, 6)),
]


def example(kind: type[errors.CenoteError]) -> errors.CenoteError:
    if kind is errors.ConfigError:
        return errors.ConfigError(["max_size = 0: wrong", "min_size = x: wrong"], pool="orders")
    if kind is errors.AcquireTimeout:
        return errors.AcquireTimeout("none came", pool="orders", cause="too slow", holders=("one", "two"))
    return kind("something happened", pool="orders")


def test_every_error_has_a_code_of_its_own() -> None:
    codes = [kind.code for kind in ALL]
    assert len(set(codes)) == len(codes) == len(ALL) > 15
    assert all(re.fullmatch(r"P\d{4}", code) for code in codes)


@pytest.mark.parametrize("kind", ALL, ids=lambda kind: kind.__name__)
def test_a_message_begins_with_the_pool_and_carries_the_code_once(kind: type[errors.CenoteError]) -> None:
    text = str(example(kind))
    assert text.startswith('pool "orders": ')
    assert text.count(f"[{kind.code}]") == 1


@pytest.mark.parametrize("kind", ALL, ids=lambda kind: kind.__name__)
def test_an_error_without_a_pool_says_none(kind: type[errors.CenoteError]) -> None:
    error = kind(["wrong"]) if kind is errors.ConfigError else kind("wrong")
    assert str(error).endswith(f"wrong [{kind.code}]")
    assert "pool" not in str(error)
    assert error.pool == ""


@pytest.mark.parametrize("kind", ALL, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("copied", COPIES)
def test_a_pickled_or_copied_error_says_the_same(
    kind: type[errors.CenoteError], copied: Callable[[BaseException], BaseException]
) -> None:
    error = example(kind)
    twin = copied(error)
    assert type(twin) is kind
    assert (str(twin), twin.args) == (str(error), error.args)
    assert twin.__dict__ == error.__dict__
    assert copied(twin).args == error.args


def test_one_problem_is_told_in_line_and_several_as_a_list() -> None:
    assert str(errors.ConfigError(["a is wrong"])) == "cannot use this configuration: a is wrong [P1001]"
    assert "\n  - a\n  - b" in str(errors.ConfigError(["a", "b"]))
    assert errors.ConfigError(["a", "b"]).problems == ("a", "b")


def test_a_timeout_lists_its_holders_one_a_line_after_the_code() -> None:
    error = errors.AcquireTimeout("none came.", pool="orders", cause="too slow", holders=["one", "two"])
    assert str(error) == 'pool "orders": none came. [P2003]\none\ntwo'
    assert (error.cause, error.holders) == ("too slow", ("one", "two"))


@pytest.mark.parametrize("kind", REFUSALS, ids=lambda kind: kind.__name__)
def test_every_refusal_names_its_reason(kind: type[errors.AcquireRefused]) -> None:
    assert kind.reason in set(Refused)


def test_every_reason_to_refuse_somebody_who_is_still_there_has_its_error() -> None:
    assert {kind.reason for kind in REFUSALS} == set(Refused) - {"abandoned"}


@pytest.mark.parametrize(
    ("kind", "base"),
    [
        (errors.ConfigError, ValueError),
        (errors.MissingDependency, ImportError),
        (errors.AcquireTimeout, TimeoutError),
        (errors.NotReady, TimeoutError),
        (errors.MisuseError, RuntimeError),
        (errors.LeasesOutstanding, AssertionError),
        (errors.LeakWarning, ResourceWarning),
    ],
)
def test_errors_are_also_what_python_calls_them(kind: type[Exception], base: type[Exception]) -> None:
    assert issubclass(kind, base)
