"""What a pool says: names in every message, passwords in none, holders, and options that cannot be used."""

from __future__ import annotations

import contextlib
import gc
import logging
import re
from typing import Any

import pytest

import cenote
from cenote import errors
from cenote.pool.base import Event
from pool_kit import WRONG, Api, Kit, behaviour, raises_clearly, until

# -- what is said ----------------------------------------------------------------------------------------------


@behaviour
async def test_the_pools_name_is_in_its_repr_its_log_and_its_threads(
    any_kit: Kit, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "cenote")
    async with any_kit.pool(max_size=1, name="orders-17") as pool:
        await pool.release(await pool.acquire())
        assert repr(pool.raw).startswith(f"<{type(pool.raw).__name__} 'orders-17' running: 1/1 connections")
    records = [record for record in caplog.records if record.name == "cenote.pool"]
    assert records
    assert all('pool "orders-17"' in record.getMessage() for record in records)


@behaviour
async def test_no_password_is_in_any_text(kit: Kit, server: Any, caplog: pytest.LogCaptureFixture) -> None:
    pg, name, _ = server
    caplog.set_level(logging.DEBUG)
    texts: list[str] = []
    for dsn in (kit.dsn, kit.named(pg.dsn_for(database=name, password=WRONG))):
        heard: list[Event] = []
        async with kit.pool(dsn if dsn is not kit.dsn else None, max_size=1, listener=heard.append) as pool:
            with contextlib.suppress(errors.CenoteError):
                await pool.wait_ready(0.2)
            texts += [repr(pool.raw), repr(pool.stats()), repr(pool.raw.holders())]
            try:
                async with pool.connection():
                    texts.append(repr(pool.raw.holders()))
                    await pool.acquire(0)
            except errors.CenoteError as error:
                texts += [str(error), repr(error), repr(error.__cause__)]
        texts += map(repr, heard)
    texts.append(caplog.text)
    for secret in (pg.password, WRONG):
        assert not [text for text in texts if secret in text]


def test_the_constructor_touches_nothing(any_kit: Kit) -> None:
    """No thread, no socket, no event loop: it may run at import time."""
    import threading

    threads = set(threading.enumerate())
    pool = any_kit.make("postgresql://app@192.0.2.1/app" if any_kit.on_server else any_kit.dsn)
    assert not set(threading.enumerate()) - threads
    assert pool.stats().size == 0
    assert not pool.closed


def test_pools_without_a_name_get_one_each(any_kit: Kit) -> None:
    names = [any_kit.make().name for _ in range(3)]
    assert len(set(names)) == 3
    assert all(re.fullmatch(r"pool-\d+", name) for name in names)


@behaviour
async def test_refresh_replaces_every_connection_opened_until_now(kit: Kit) -> None:
    async with kit.pool(min_size=2, max_size=3) as pool:
        await pool.wait_ready()
        held = await pool.acquire()
        before = set(kit.backends())
        pool.raw.refresh()
        await kit.sql(held, "SELECT 1")  # a lease runs to its end
        await kit.commit(held)
        await pool.release(held)
        await until(lambda: not before & set(kit.backends()) and pool.stats().idle == 2)
        stats = await pool.settled()
        assert stats.closed == {"stale": len(before)}
        assert stats.epoch == 1


@behaviour
async def test_a_dropped_lease_comes_back_and_the_warning_says_where_it_was_acquired(kit: Kit) -> None:
    heard: list[Event] = []
    with pytest.MonkeyPatch.context() as patch:
        # The warning is given by the keeper thread or a callback of the loop: no caller can catch it.
        warned: list[str] = []
        patch.setattr("warnings.warn", lambda message, *_, **__: warned.append(str(message)))
        async with kit.pool(min_size=0, max_size=1, listener=heard.append) as pool:
            await _drop(pool)
            gc.collect()
            await until(lambda: pool.stats().closed == {"leaked": 1}, "the lease to be missed")
            await until(lambda: kit.backends() == [], "its session to end")
            assert await pool.fetch_value("SELECT 1") == 1
            await until(lambda: warned, "the warning")
            await until(lambda: sum(event.reason == "leaked" for event in heard) == 2, "both to be told")
    assert [event.kind for event in heard if event.reason == "leaked"] == ["leaked", "closed"] or [
        event.kind for event in heard if event.reason == "leaked"
    ] == ["closed", "leaked"]
    assert "dropped without being released; acquired at" in warned[0]


async def _drop(pool: Api) -> None:
    await pool.acquire()


@behaviour
async def test_who_holds_what_is_told(any_kit: Kit) -> None:
    async with any_kit.pool(max_size=2) as pool:
        assert pool.raw.holders() == ()
        pool.raw.assert_all_returned()
        conn = await pool.acquire()
        (holder,) = pool.raw.holders()
        assert not holder.in_query
        assert not holder.in_transaction
        assert holder.last_verb == ""
        if any_kit.on_server:
            await any_kit.begin(conn)
            (holder,) = pool.raw.holders()
            assert holder.in_transaction
            assert holder.last_verb in ("SELECT", "BEGIN")
        with pytest.raises(errors.LeasesOutstanding, match="1 lease") as caught:
            pool.raw.assert_all_returned()
        assert isinstance(caught.value, AssertionError)
        assert len(caught.value.holders) == 1
        await pool.release(conn)
        await pool.settled()
        pool.raw.assert_all_returned()


# -- options ---------------------------------------------------------------------------------------------------


def test_all_problems_of_a_configuration_are_told_at_once(any_kit: Kit) -> None:
    with pytest.raises(errors.ConfigError) as caught:
        wrong = {
            "min_size": -1,
            "max_size": "9",
            "aquire_timeout": 3,
            "codel": "of",
            "check": 7,
            "idle_timeout": 0,
        }
        any_kit.make(name="orders", **wrong)
    assert len(caught.value.problems) == 6
    text = str(caught.value)
    for words in (
        "min_size = -1",
        "max_size = '9'",
        "did you mean 'acquire_timeout'?",
        "did you mean 'off'?",
        "check = 7: must be callable",
        "idle_timeout = 0: allowed is more than 0 seconds",
        'pool "orders"',
    ):
        assert words in text
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"min_size": 5, "max_size": 2}, "min_size = 5 is above max_size = 2: lower min_size or raise max_size"),
        ({"max_size": 0}, "max_size = 0: allowed is 1 to"),
        ({"max_size": True}, "must be a whole number"),
        ({"max_size": 2.5}, "must be a whole number"),
        ({"acquire_timeout": None}, "acquire_timeout = None: must be a number of seconds"),
        ({"acquire_timeout": float("nan")}, "must be a number"),
        ({"reset": "sometimes"}, "use one of 'auto', 'always', 'never'"),
        ({"init_query": " "}, "must be a non-empty text"),
        ({"name": ""}, "must be a non-empty text"),
        ({"listener": "print"}, "listener = 'print': must be callable"),
        ({"driver": "psycopgg"}, "did you mean 'psycopg'?"),
        ({"maxsize": 3}, "did you mean 'max_size'?"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
@pytest.mark.parametrize("pool_class", [cenote.Pool, cenote.AsyncPool])
def test_a_wrong_option_is_named_with_what_is_allowed(pool_class: Any, wrong: dict[str, Any], words: str) -> None:
    with raises_clearly(errors.ConfigError, words, "[P1001]"):
        pool_class("postgresql://app@127.0.0.1/app", **wrong)


@pytest.mark.parametrize(
    "dsn", ["postgresql://app:s3cr3t@[::1/app", "host=127.0.0.1 passwort=s3cr3t", "postgres//app:s3cr3t@h"]
)
def test_a_dsn_that_cannot_be_read_is_refused_without_repeating_its_password(
    any_kit: Kit, dsn: str, recwarn: pytest.WarningsRecorder
) -> None:
    if not any_kit.on_server:
        pytest.skip("any text is a file's name to sqlite3")
    with raises_clearly(errors.ConfigError, '"orders"', any_kit.kind, secret="s3cr3t"):
        any_kit.make(dsn, name="orders")


def test_unsafe_sqlite_is_refused_with_advice() -> None:
    import sqlite3

    with raises_clearly(errors.ConfigError, "check_same_thread", "False"):
        cenote.Pool(":memory:", driver=sqlite3.connect)


def test_numbers_given_to_a_pool_are_its_options(any_kit: Kit) -> None:
    pool = any_kit.make(max_size=1)
    assert (pool.options.min_size, pool.options.max_size) == (1, 1)  # the default of min_size follows max_size
    pool = any_kit.make()
    assert (pool.options.min_size, pool.options.max_size, pool.options.acquire_timeout) == (2, 10, 30.0)


def test_every_option_is_accepted_by_both_pools() -> None:
    from cenote.config import option_table

    given = {name: getattr(cenote.Pool("dbname=app").options, name) for name, *_ in option_table()}
    given = {name: value for name, value in given.items() if value is not None}
    for pool_class in (cenote.Pool, cenote.AsyncPool):
        pool = pool_class("postgresql://app@127.0.0.1/app", **given)
        for name, value in given.items():
            assert getattr(pool.options, name) == value
