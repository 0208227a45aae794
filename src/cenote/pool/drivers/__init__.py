"""Adapters: one file for each driver, and the choice between them by name."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

from cenote.config import PoolOptions
from cenote.errors import ConfigError
from cenote.pool.drivers.base import AsyncDriver, ConnectArgs, Credentials, Driver


def sync_driver(
    driver: str | Callable[..., Any] | Driver,
    dsn: Credentials,
    connect_args: ConnectArgs,
    options: PoolOptions,
    pool: str,
) -> Driver:
    """The adapter for a driver given by name, as a DB-API 2.0 connect callable, or as an adapter of one's own.

    :raises ConfigError: no such driver, or a connection string it cannot read
    :raises MissingDependency: the driver is not installed
    """
    if hasattr(driver, "condition"):
        return cast(Driver, driver)
    with _naming(pool):
        if callable(driver):
            from cenote.pool.drivers.dbapi import DbApiDriver

            return DbApiDriver(driver, dsn, connect_args, options)
        if driver == "psycopg":
            from cenote.pool.drivers.psycopg import PsycopgDriver

            return PsycopgDriver(dsn, connect_args, options)
        if driver == "psycopg2":
            from cenote.pool.drivers.psycopg2 import Psycopg2Driver

            return Psycopg2Driver(dsn, connect_args, options)
    raise _unknown(driver, ("psycopg", "psycopg2"), "or give a DB-API connect callable", pool)


def async_driver(
    driver: str | AsyncDriver, dsn: Credentials, connect_args: ConnectArgs, options: PoolOptions, pool: str
) -> AsyncDriver:
    """The adapter for an asyncio driver given by name, or as an adapter of one's own. Raises as `sync_driver`."""
    if hasattr(driver, "condition"):
        return cast(AsyncDriver, driver)
    with _naming(pool):
        if driver == "psycopg":
            from cenote.pool.drivers.psycopg_async import AsyncPsycopgDriver

            return AsyncPsycopgDriver(dsn, connect_args, options)
        if driver == "asyncpg":
            from cenote.pool.drivers.asyncpg import AsyncpgDriver

            return AsyncpgDriver(dsn, connect_args, options)
    raise _unknown(driver, ("psycopg", "asyncpg"), "an AsyncPool needs an asyncio driver", pool)


@contextmanager
def _naming(pool: str) -> Iterator[None]:
    """An adapter does not know its pool's name; the error shall."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(error.problems, pool=pool) from None


def _unknown(driver: object, known: tuple[str, ...], more: str, pool: str) -> ConfigError:
    near = difflib.get_close_matches(str(driver), known, 1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return ConfigError(
        [f"driver = {driver!r}: use one of {', '.join(map(repr, known))} ({more}){hint}"], pool=pool
    )
