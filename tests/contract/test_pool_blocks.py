"""Blocks and single statements: what is committed, what is rolled back, and as the driver itself does it."""

from __future__ import annotations

from typing import Any

import pytest
from wire_recorder import WireRecorder

from pool_kit import Kit, add_up, behaviour, notes, write


@behaviour
async def test_a_connection_block_keeps_what_was_written(any_kit: Kit) -> None:
    async with any_kit.pool(max_size=2) as pool:
        async with pool.connection() as conn:
            await write(any_kit, conn, "kept")
        assert await notes(pool) == ["kept"]
        add_up(await pool.settled())


@behaviour
async def test_a_connection_block_that_raises_rolls_back_as_the_driver_does(any_kit: Kit) -> None:
    async with any_kit.pool(max_size=2) as pool:
        stop = ZeroDivisionError("stop")
        with pytest.raises(ZeroDivisionError) as caught:
            async with pool.connection() as conn:
                await write(any_kit, conn, "half")
                raise stop
        assert caught.value is stop
        assert await notes(pool) == ([] if any_kit.implicit else ["half"])  # asyncpg has no implicit transaction


@behaviour
async def test_a_transaction_block_commits_at_its_end(any_kit: Kit) -> None:
    async with any_kit.pool(min_size=2, max_size=2) as pool:
        await pool.wait_ready()
        async with pool.transaction() as conn:
            await write(any_kit, conn, "one")
            assert await notes(pool) == [], "others see it before the commit"
            await write(any_kit, conn, "two")
        assert await notes(pool) == ["one", "two"]


@behaviour
async def test_a_transaction_block_that_raises_rolls_back_and_passes_the_error_on(any_kit: Kit) -> None:
    async with any_kit.pool(max_size=1) as pool:
        stop = KeyError("stop")
        with pytest.raises(KeyError) as caught:
            async with pool.transaction() as conn:
                await write(any_kit, conn, "half")
                raise stop
        assert caught.value is stop
        assert await notes(pool) == []
        assert (await pool.settled()).size == 1


@behaviour
async def test_a_transaction_block_with_a_failed_statement_inside_rolls_back_and_the_connection_lives_on(
    any_kit: Kit,
) -> None:
    async with any_kit.pool(max_size=1) as pool:
        for _ in range(2):
            with pytest.raises(any_kit.errors()):
                async with pool.transaction() as conn:
                    await write(any_kit, conn, "same")
                    await write(any_kit, conn, "same")
        assert await notes(pool) == []
        stats = await pool.settled()
        assert sum(stats.opened.values()) == 1


@behaviour
async def test_a_commit_that_fails_raises_the_drivers_error_and_loses_no_connection(kit: Kit) -> None:
    async with kit.pool(max_size=1) as pool:
        with pytest.raises(kit.errors(), match="due_id_key"):
            async with pool.transaction() as conn:
                await kit.sql(conn, "INSERT INTO due VALUES (1), (1)")
        assert await pool.fetch_value("SELECT count(*) FROM due") == 0
        stats = await pool.settled()
        assert (stats.size, stats.leased) == (1, 0)


@behaviour
async def test_one_statement_methods_give_the_drivers_rows(any_kit: Kit) -> None:
    kit = any_kit
    async with kit.pool(max_size=1) as pool:
        add = f"INSERT INTO note (text) VALUES ({kit.mark})"
        assert await pool.execute(add, ("a",)) == 1
        assert await pool.execute(add, ["b"]) == 1
        assert await pool.execute("UPDATE note SET text = text") == 2
        assert [tuple(row) for row in await pool.fetch_all("SELECT text FROM note ORDER BY 1")] == [("a",), ("b",)]
        one = await pool.fetch_one(f"SELECT text FROM note WHERE text = {kit.mark}", ("b",))
        assert tuple(one) == ("b",)
        assert await pool.fetch_one("SELECT text FROM note WHERE 1 = 0") is None
        assert await pool.fetch_value("SELECT count(*) FROM note") == 2
        assert await pool.fetch_value("SELECT text FROM note WHERE 1 = 0") is None
        assert list(await pool.fetch_all("SELECT text FROM note WHERE 1 = 0")) == []
        assert (await pool.settled()).leased == 0


@behaviour
async def test_one_statement_methods_run_in_autocommit(kit: Kit) -> None:
    async with kit.pool(max_size=1) as pool:
        await pool.execute("VACUUM note")  # refused inside a transaction block
        before = await pool.fetch_value("SELECT now()")
        assert await pool.fetch_value("SELECT now()") != before
        async with pool.connection() as conn:
            await kit.begin(conn)
            first = await kit.sql(conn, "SELECT now()")
            assert await kit.sql(conn, "SELECT now()") == first, "a lease afterwards is not in autocommit"
            await kit.commit(conn)


@behaviour
async def test_a_one_statement_method_costs_one_round_trip(kit: Kit, server: Any) -> None:
    pg, name, _ = server
    with WireRecorder(pg.dsn_for(database=name)) as wire:
        async with kit.pool(f"{wire.dsn}&application_name={kit.app}", max_size=1) as pool:
            await pool.fetch_value("SELECT 1")
            wire.clear()
            await pool.fetch_value("SELECT 1")
            await pool.fetch_all("SELECT 1")
            assert wire.round_trips() == 2, wire.requests


@behaviour
async def test_a_failed_one_statement_method_gives_its_connection_back_clean(any_kit: Kit) -> None:
    async with any_kit.pool(max_size=1) as pool:
        for method in ("execute", "fetch_all", "fetch_one", "fetch_value"):
            with pytest.raises(any_kit.errors()):
                await pool.call(method, "SELECT no_such_column FROM note")
        assert await pool.fetch_value("SELECT 1") == 1
        stats = await pool.settled()
        assert (stats.size, stats.leased, sum(stats.opened.values())) == (1, 0, 1)
        add_up(stats)


@behaviour
async def test_a_lease_is_the_drivers_own_connection(any_kit: Kit) -> None:
    async with any_kit.pool(max_size=1) as pool:
        async with pool.connection() as conn:
            assert isinstance(conn, any_kit.connection_class())
