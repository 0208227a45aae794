"""The virtual database `cenote` from the programs and drivers that people use, with their defaults, and the port
of the metrics, on a running proxy.
"""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import asyncpg
import psycopg
import psycopg2
import pytest
import sqlalchemy
from psycopg.rows import dict_row

from cenote import embedded
from cenote.proxy.admin.tables import TABLES
from cenote.testing.postgres import wait_until
from cenote.wire import messages

sys.path.append(str(Path(__file__).parents[1] / "wire"))

from proxy_kit import RunningProxy, config_for, logged_in


@pytest.fixture(scope="module")
def shared(pg18: embedded.Postgres) -> Iterator[RunningProxy]:
    top = {"admin_users": [pg18.user], "metrics_port": 0}
    users = {"guest": {"password": "guest"}}
    proxy = RunningProxy(config_for(pg18, users=users, top=top), pg18).start()
    yield proxy
    proxy.stop()


@pytest.fixture
def proxy(shared: RunningProxy) -> Iterator[RunningProxy]:
    """One proxy for all; after each test nobody is left in it."""
    yield shared
    shared.clean()


@pytest.fixture
def console(proxy: RunningProxy) -> str:
    return proxy.dsn_for(database="cenote")


def mine(proxy: RunningProxy, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The row of the pool that the tests use; the guest has one too."""
    return next(row for row in rows if row["user"] == proxy.user)


def psql(proxy: RunningProxy, *options: str, script: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(proxy.server.binary("psql")), "-X", proxy.dsn_for(database="cenote"), *options],
        input=script,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


# -- psql ---------------------------------------------------------------------------------------------------


def test_psql_shows_every_table_and_warns_of_nothing(proxy: RunningProxy) -> None:
    for table in TABLES:
        done = psql(proxy, "-A", "-c", f"SHOW {table.name.lower()};")
        assert (done.returncode, done.stderr) == (0, ""), table.name
        assert done.stdout.splitlines()[0] == "|".join(column.name for column in table.columns)


def test_psql_as_a_session_sees_its_own_client_and_can_make_mistakes(proxy: RunningProxy) -> None:
    script = "SHOW NONSENSE;\n\\x\nSHOW CLIENTS;\nBEGIN;\nSHOW POOLS;\nCOMMIT;\nSHOW POOLS \\bind \\g\n\\d\n"
    done = psql(proxy, script=script)
    assert done.returncode == 0
    assert "SHOW POOLS | CLIENTS | SERVERS" in done.stderr
    assert re.search(r"^state +\| console$", done.stdout, re.M)
    assert re.search(r"^application_name +\| psql$", done.stdout, re.M)
    assert "this is the console of the pooler" in done.stderr


# -- psycopg ------------------------------------------------------------------------------------------------


def test_psycopg_reads_pools_with_transactions_text_and_binary_as_it_has_them(
    proxy: RunningProxy, console: str
) -> None:
    for binary in (False, True):
        with (
            psycopg.connect(proxy.dsn) as client,
            psycopg.connect(console) as conn,
            conn.cursor(binary=binary, row_factory=dict_row) as cursor,
        ):
            client.execute("SELECT 1")
            for _ in range(10):  # past its threshold it prepares
                row = mine(proxy, cursor.execute("SHOW POOLS").fetchall())
            assert row["database"] == proxy.database
            assert row["leased"] == 1
            assert row["clients"] == 1
            assert isinstance(row["oldest_wait_s"], float)
            with conn.transaction():
                assert cursor.execute("SHOW VERSION").fetchone()
            conn.commit()


def test_psycopg_hears_of_mistakes_and_goes_on(console: str) -> None:
    with psycopg.connect(console) as conn:
        with pytest.raises(psycopg.errors.FeatureNotSupported, match="runs no SQL") as caught:
            conn.execute("SELECT * FROM orders")
        assert "SHOW POOLS" in (caught.value.diag.message_hint or "")
        with pytest.raises(psycopg.errors.InFailedSqlTransaction):
            conn.execute("SHOW POOLS")
        conn.rollback()
        with pytest.raises(psycopg.errors.FeatureNotSupported, match="takes no parameters"):
            conn.execute("SHOW POOLS -- %s", ["x"])
        conn.rollback()
        assert conn.execute("SHOW POOLS").fetchall()


def test_psycopg_pipelines(console: str) -> None:
    with psycopg.connect(console, autocommit=True) as conn, conn.pipeline():
        cursors = [conn.execute(f"SHOW {table.name}") for table in TABLES]
        assert all(cursor.fetchall() is not None for cursor in cursors)


# -- asyncpg ------------------------------------------------------------------------------------------------


def test_asyncpg_reads_every_table_and_its_pool_gives_the_connection_back(console: str) -> None:
    async def run() -> None:
        async with asyncpg.create_pool(console, min_size=1, max_size=2) as pool:
            for _ in range(2):
                async with pool.acquire() as conn:
                    for table in TABLES:
                        await conn.fetch(f"SHOW {table.name}")
                    async with conn.transaction():
                        row = (await conn.fetch("SHOW POOLS"))[0]
                        helped = [row["command"] async for row in conn.cursor("SHOW HELP", prefetch=2)]
                    assert helped[: len(TABLES)] == [f"SHOW {table.name}" for table in TABLES]
                    assert isinstance(row["max_size"], int)
                    assert isinstance(row["oldest_wait_s"], float)
                    assert [row["user"] for row in await conn.fetch("SHOW CLIENTS")]
                    with pytest.raises(asyncpg.FeatureNotSupportedError):
                        await conn.fetch("SELECT * FROM orders WHERE id = $1", 1)
                    assert await conn.fetchval("SELECT 1") == 1

    asyncio.run(run())


# -- others -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("driver", ["psycopg", "psycopg2", "asyncpg"])
def test_sqlalchemy_connects_as_it_does_by_default(driver: str, console: str) -> None:
    url = console.replace("postgresql", f"postgresql+{driver}")
    if driver == "asyncpg":
        from sqlalchemy.ext.asyncio import create_async_engine

        async def run() -> list[Any]:
            engine = create_async_engine(url)
            async with engine.connect() as conn:
                rows = (await conn.execute(sqlalchemy.text("SHOW POOLS"))).all()
            await engine.dispose()
            return list(rows)

        assert asyncio.run(run())
    else:
        engine = sqlalchemy.create_engine(url, pool_pre_ping=True)
        for _ in range(2):
            with engine.connect() as conn:
                assert conn.execute(sqlalchemy.text("SHOW POOLS")).all()
        engine.dispose()


def test_psycopg2_connects_and_reads(console: str) -> None:
    with closing(psycopg2.connect(console)) as conn, conn.cursor() as cursor:
        cursor.execute("SHOW CLIENTS")
        assert [column.name for column in cursor.description or ()][:3] == ["pid", "database", "user"]
        assert cursor.fetchall()


# -- who may, and what it shows -----------------------------------------------------------------------------


def test_only_admin_users_may_log_in_to_it(proxy: RunningProxy) -> None:
    with pytest.raises(psycopg.OperationalError, match='permission denied for database "cenote"'):
        psycopg.connect(proxy.dsn_for(user="guest", password="guest", database="cenote"))
    with psycopg.connect(proxy.dsn_for(database="cenote")) as conn:
        assert "no_admin" in proxy.call(lambda: proxy.daemon.login_failures)
        assert conn.execute("SELECT 1").fetchone() == (1,)


def test_clients_that_idle_that_are_in_a_transaction_and_that_are_pinned_are_told_apart(
    proxy: RunningProxy, console: str
) -> None:
    with (
        psycopg.connect(console, autocommit=True) as admin,
        psycopg.connect(proxy.dsn, application_name="in transaction") as first,
        psycopg.connect(proxy.dsn, application_name="pinned", autocommit=True) as second,
        psycopg.connect(proxy.dsn, application_name="idle", autocommit=True) as third,
    ):
        first.execute("SELECT 1")
        second.execute("CREATE TEMP TABLE a (n int)")
        third.execute("SELECT 1")
        cursor = admin.cursor(row_factory=dict_row)

        def clients() -> dict[str, dict[str, Any]]:
            rows = cursor.execute("SHOW CLIENTS").fetchall()
            return {row["application_name"]: row for row in rows if row["application_name"]}

        wait_until(lambda: clients()["idle"]["state"] == "idle", what="the third has ended its transaction")
        rows = clients()
        assert rows["in transaction"]["state"] == "in_transaction"
        assert rows["in transaction"]["pid"] == first.info.backend_pid
        assert rows["in transaction"]["state_s"] >= 0
        assert (rows["pinned"]["state"], rows["pinned"]["pin"]) == ("idle", "temporary_objects")
        assert (rows["idle"]["server_pid"], rows["idle"]["pin"]) == (None, "")
        assert all(row["bytes_in"] > 0 and row["bytes_out"] > 0 for row in rows.values())
        servers = cursor.execute("SHOW SERVERS").fetchall()
        held = {row["application_name"]: row for row in servers if row["client_pid"] is not None}
        assert held["pinned"]["pin"] == "temporary_objects"
        assert held["in transaction"]["status"] == "T"
        assert held["in transaction"]["client_pid"] == rows["in transaction"]["pid"]
        assert held["in transaction"]["pid"] == rows["in transaction"]["server_pid"]
        assert {row["address"] for row in servers} == {f"{proxy.server.host}:{proxy.server.port}"}
        stats = mine(proxy, cursor.execute("SHOW STATS").fetchall())
        assert stats["queries"] >= 3
        assert "temporary_objects=" in stats["pins"]
        assert stats["query_avg_s"] > 0


# -- malformed ----------------------------------------------------------------------------------------------


def test_a_malformed_message_ends_that_connection_and_no_other(proxy: RunningProxy, console: str) -> None:
    async def run() -> None:
        async with await logged_in(proxy.address, proxy, database="cenote") as client:
            await client.send(b"Q\0\0\0\3")
            (heard,) = await client.closed()
            assert messages.error_fields(heard.body)["C"] == "08P01"

    with psycopg.connect(console, autocommit=True) as other:
        asyncio.run(run())
        assert other.execute("SHOW VERSION").fetchall()


# -- the metrics' port --------------------------------------------------------------------------------------


def test_the_metrics_port_tells_what_the_console_tells(proxy: RunningProxy, console: str) -> None:
    port = proxy.call(lambda: proxy.daemon._stop_metrics.port)
    with (
        psycopg.connect(console, autocommit=True) as admin,
        psycopg.connect(proxy.dsn, autocommit=True) as client,
    ):
        client.execute("SELECT 1")
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
            text = answer.read().decode()
        row = mine(proxy, admin.cursor(row_factory=dict_row).execute("SHOW STATS").fetchall())
        labels = f'{{database="{proxy.database}",pool="{proxy.database}/{proxy.user}",user="{proxy.user}"}}'
        values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
        assert float(values[f"cenote_proxy_queries_total{labels}"]) == row["queries"]
        assert float(values[f"cenote_proxy_bytes_to_clients_total{labels}"]) == row["bytes_to_clients"]
        assert float(values['cenote_proxy_clients{state="console"}']) == 1
