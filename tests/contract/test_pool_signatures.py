"""`Pool` and `AsyncPool` are one interface in two colours."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

from cenote import AsyncPool, Pool

# What may be asked or told without waiting, in both pools.
PLAIN = {"stats", "resize", "refresh", "holders", "assert_all_returned", "connection", "transaction"}
ATTRIBUTES = {"closed", "name", "options"}


def public(pool: type[Any]) -> set[str]:
    return {name for name in dir(pool) if not name.startswith("_")}


def parameters(function: Any) -> list[tuple[str, Any, Any]]:
    return [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]


def test_the_pools_have_the_same_public_names() -> None:
    assert public(Pool) == public(AsyncPool)


def test_the_constructors_take_the_same_parameters() -> None:
    assert parameters(Pool.__init__) == parameters(AsyncPool.__init__)


@pytest.mark.parametrize("name", sorted(public(Pool) - ATTRIBUTES))
def test_a_method_takes_the_same_parameters_in_both_pools(name: str) -> None:
    assert parameters(getattr(Pool, name)) == parameters(getattr(AsyncPool, name))


@pytest.mark.parametrize("name", sorted(public(Pool) - ATTRIBUTES))
def test_a_method_is_a_coroutine_function_in_the_async_pool_exactly_where_it_may_wait(name: str) -> None:
    assert not inspect.iscoroutinefunction(getattr(Pool, name))
    assert inspect.iscoroutinefunction(getattr(AsyncPool, name)) == (name not in PLAIN)


@pytest.mark.parametrize("name", sorted(public(Pool)))
def test_every_public_name_is_documented_in_both_pools(name: str) -> None:
    for pool in (Pool, AsyncPool):
        assert inspect.getdoc(getattr(pool, name))


def test_the_pools_are_context_managers_of_their_colour() -> None:
    assert {"__enter__", "__exit__"} <= set(dir(Pool))
    assert {"__aenter__", "__aexit__"} <= set(dir(AsyncPool))
    assert not {"__aenter__", "__aexit__"} & set(dir(Pool))
    assert not {"__enter__", "__exit__"} & set(dir(AsyncPool))
