"""A configuration that is read again: all of it holds or nothing, and nobody who is connected is dropped."""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import psycopg
import pytest

from cenote import embedded

sys.path += [str(Path(__file__).parents[1] / "wire"), str(Path(__file__).parent)]

from proxy_kit import Admin, RunningProxy, config_for, until, wire
from test_cli_serve import serving

from cenote.proxy.config import config_of
from cenote.proxy.reload import Changes, ReloadError, differences, reload
from cenote.testing.postgres import make_tls_files, wait_until
from cenote.testing.wire import error, kinds, value
from cenote.wire import messages

Tables = dict[str, Any]


@pytest.fixture
def proxy_for(pg18: embedded.Postgres) -> Iterator[Callable[..., RunningProxy]]:
    proxies: list[RunningProxy] = []

    def start(**options: Any) -> RunningProxy:
        top = {"admin_users": [pg18.user], **options.pop("top", {})}
        proxies.append(RunningProxy(config_for(pg18, top=top, **options), pg18))
        return proxies[-1].start()

    yield start
    try:
        for proxy in proxies:
            proxy.clean()
            proxy.call(lambda proxy=proxy: [server.budget.check() for server in proxy.daemon.budgets.values()])
    finally:
        for proxy in proxies:
            proxy.stop()


@pytest.fixture
def admin(pg18: embedded.Postgres) -> Iterator[Admin]:
    admin = Admin(pg18.superuser_dsn)
    yield admin
    admin.conn.close()


def changed(config: Tables, **sections: Tables) -> Tables:
    """The tables with some values changed: `database=` the one that there is, others by name; None takes away."""
    found = {key: dict(given) if isinstance(given, dict) else given for key, given in config.items()}
    for section, options in sections.items():
        for key, given in options.items():
            if given is None:
                del found[section][key]
            else:
                before = found[section].get(key)
                found[section][key] = {**before, **given} if isinstance(before, dict) else given
    return found


async def reloaded(proxy: RunningProxy, tables: Tables) -> Changes:
    """Have the proxy read these tables."""
    proxy.daemon.read_config = lambda: config_of(tables, file="cenote.toml", complete=True)
    changes = await proxy.begin(lambda: reload(proxy.daemon))
    assert isinstance(changes, Changes)
    return changes


def pools(proxy: RunningProxy) -> dict[str, Any]:
    return proxy.call(lambda: {pool.name: pool for pool in proxy.daemon.pools})


# -- what a reload changes ----------------------------------------------------------------------------------


@wire
async def test_certificates_passwords_and_sizes_change_under_clients_that_stay(
    proxy_for: Callable[..., RunningProxy], tmp_path: Path
) -> None:
    """One connected by the old certificate and password, in a transaction; one in line; new ones by the new."""
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
    old, new = (make_tls_files(tmp_path / name) for name in ("old", "new"))
    users = {"guest": {"password": "before", "server_password": "x"}}
    proxy = proxy_for(
        listen={"tls_cert": str(old.server_certificate), "tls_key": str(old.server_key)},
        users=users,
        max_size=1,
    )
    secret = proxy.password

    def dsn(files: Any, password: str = secret) -> str:
        return f"{proxy.dsn_for(password=password)}?sslmode=verify-full&sslrootcert={files.ca}"

    holder = await psycopg.AsyncConnection.connect(dsn(old))
    await holder.execute("SELECT 1")
    idle = await psycopg.AsyncConnection.connect(dsn(old), autocommit=True)
    in_line = asyncio.create_task(idle.execute("SELECT 2"))
    await proxy.reached(waiting=1)

    # The user keeps its role's password at the server, and has another one for the proxy.
    tables = changed(
        proxy.config,
        listen={"tls_cert": str(new.server_certificate), "tls_key": str(new.server_key)},
        users={proxy.user: {"password": "after", "server_password": secret}, "guest": {"password": "new"}},
        databases={proxy.database: {"max_size": 2}},
    )
    changes = await reloaded(proxy, tables)
    assert changes.restart == []
    assert set(changes.applied) == {
        "listen.tls_cert",
        "listen.tls_key",
        f"users.{proxy.user}.password",
        f"users.{proxy.user}.server_password",
        "users.guest.password",
        f"databases.{proxy.database}.max_size",
    }
    assert await (await in_line).fetchone() == (2,), "there is room for it now"
    assert await (await holder.execute("SELECT 3")).fetchone() == (3,)
    await holder.commit()
    with pytest.raises(psycopg.OperationalError, match="certificate verify failed"):
        await psycopg.AsyncConnection.connect(dsn(old, "after"))
    with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
        await psycopg.AsyncConnection.connect(dsn(new))
    async with await psycopg.AsyncConnection.connect(dsn(new, "after")) as conn:
        assert await (await conn.execute("SELECT 4")).fetchone() == (4,)
    for conn in (holder, idle):
        assert await (await conn.execute("SELECT 5")).fetchone() == (5,)
        await conn.close()


@wire
async def test_every_option_of_a_pool_holds_for_the_pool_that_is_there(
    proxy_for: Callable[..., RunningProxy],
) -> None:
    proxy = proxy_for(max_size=4)
    async with await proxy.client() as client:
        await client.query("SELECT 1")
        options = {
            "min_size": 1,
            "max_size": 3,
            "acquire_timeout": 7.0,
            "max_waiting": 5,
            "idle_timeout": 11.0,
            "max_lifetime": 13.0,
            "check_after": 17.0,
            "connect_timeout": 3.0,
            "codel": "on",
            "wait_notice": 1.0,
            "max_prepared": 9,
            "query_timeout": 19.0,
        }
        await reloaded(proxy, changed(proxy.config, databases={proxy.database: options}))
        (pool,) = pools(proxy).values()
        machine = pool.machine
        assert {name: getattr(pool.options, name) for name in options} == options
        assert (machine.min_size, machine.max_size, machine.max_waiting) == (1, 3, 5)
        assert (machine.idle_timeout, machine.max_lifetime, machine.check_after) == (11.0, 13.0, 17.0)
        assert (machine.codel_mode, pool.acquire_timeout, pool.max_prepared) == ("on", 7.0, 9)
        assert value(await client.query("SELECT 2")) == "2"


@wire
async def test_a_lowered_max_size_holds_as_soon_as_transactions_have_ended(
    proxy_for: Callable[..., RunningProxy],
) -> None:
    proxy = proxy_for(max_size=3)
    clients = [await proxy.client() for _ in range(3)]
    for client in clients:
        await client.query("BEGIN")
    await reloaded(proxy, changed(proxy.config, databases={proxy.database: {"max_size": 1}}))
    for client in clients:
        assert value(await client.query("SELECT 1")) == "1"
        await client.query("COMMIT")
    await proxy.reached(idle=1, leased=0, closing=0)
    for client in clients:
        assert value(await client.query("SELECT 1")) == "1"
        await client.terminate()


@wire
async def test_new_databases_and_users_are_there_at_once(
    proxy_for: Callable[..., RunningProxy], pg18: embedded.Postgres
) -> None:
    proxy = proxy_for()
    with pytest.raises(psycopg.OperationalError, match='database "more" does not exist'):
        await psycopg.AsyncConnection.connect(proxy.dsn_for(database="more"))
    more = {
        "host": pg18.host,
        "port": pg18.port,
        "sslmode": "disable",
        "dbname": pg18.database,
        "user": pg18.user,
        "password": pg18.password,
        "min_size": 1,
    }
    tables = changed(proxy.config, databases={"more": more}, users={"newcomer": {"password": "hello"}})
    changes = await reloaded(proxy, tables)
    assert changes.applied == ["databases.more: new", "users.newcomer: new"]
    async with await proxy.client(user="newcomer", password="hello", database="more") as client:
        assert value(await client.query("SELECT 1")) == "1"
    await until(lambda: pools(proxy)[f"more/{pg18.user}"].machine.shelf.size() == 1, "the warm minimum is there")


@wire
async def test_F19_a_database_that_is_gone_drains_and_refuses_new_clients(
    proxy_for: Callable[..., RunningProxy], pg18: embedded.Postgres
) -> None:
    proxy = proxy_for(databases={"kept": {"host": pg18.host, "port": pg18.port, "sslmode": "disable"}})
    async with (
        await proxy.client() as busy,
        await proxy.client() as idle,
        await proxy.client(database="cenote") as console,
    ):
        await busy.query("BEGIN")
        changes = await reloaded(proxy, changed(proxy.config, databases={proxy.database: None}))
        assert changes.applied == [f"databases.{proxy.database}: gone"]
        ended = await idle.closed()
        assert (kinds(ended), error(ended)["C"]) == ("E", "57P01")
        with pytest.raises(psycopg.OperationalError, match="does not exist"):
            await psycopg.AsyncConnection.connect(proxy.dsn)
        assert "draining" in {value.decode() for value in _cells(await console.query("SHOW DATABASES"))}
        assert value(await busy.query("SELECT 1")) == "1"
        await busy.send(messages.query("COMMIT"))
        assert kinds(await busy.until_ready()) == "CZ"
        ended = await busy.closed()
        assert (kinds(ended), error(ended)["C"]) == ("E", "57P01")
        await until(lambda: f"{proxy.database}/{proxy.user}" not in pools(proxy), "the pool is gone")
        assert value(await console.query("SELECT 1")) == "1"


def _cells(answer: list[Any]) -> list[bytes]:
    cells = []
    for message in answer:
        if message.kind == "D":
            cells += [cell for cell in messages.values(message.body) if cell is not None]
    return cells


@wire
async def test_a_database_that_comes_back_while_it_drains_goes_on(proxy_for: Callable[..., RunningProxy]) -> None:
    proxy = proxy_for()
    other = {"host": "127.0.0.1", "port": 1, "min_size": 0}
    async with await proxy.client() as busy:
        await busy.query("BEGIN")
        gone = changed(proxy.config, databases={proxy.database: None, "other": other})
        await reloaded(proxy, gone)
        await reloaded(proxy, proxy.config)
        (pool,) = [pool for pool in pools(proxy).values() if pool.database == proxy.database]
        assert pool.machine.mode == "running"
        await busy.query("COMMIT")
        assert value(await busy.query("SELECT 1")) == "1"
        await until(lambda: len(pools(proxy)) == 1, "the other's pool is gone")
        assert set(proxy.daemon.budgets) == {f"{proxy.server.host}:{proxy.server.port}"}


@wire
async def test_a_database_that_has_moved_is_followed_as_its_connections_come_back(
    proxy_for: Callable[..., RunningProxy],
) -> None:
    """To another name of the host, which is another server to us, and another database there."""
    proxy = proxy_for()
    async with await proxy.client() as busy, await proxy.client() as client:
        await busy.query("BEGIN")
        await client.query("SELECT 1")
        moved = {"host": "localhost", "dbname": "postgres"}
        await reloaded(proxy, changed(proxy.config, databases={proxy.database: moved}))
        assert value(await client.query("SELECT current_database()")) == "postgres"
        assert value(await busy.query("SELECT current_database()")) == proxy.database
        await busy.query("COMMIT")
        assert value(await busy.query("SELECT current_database()")) == "postgres"
        await until(lambda: proxy.counts()["closing"] == 0)

        def counted() -> tuple[dict[str, int], int]:
            used = {name: server.budget.used for name, server in proxy.daemon.budgets.items()}
            return used, proxy.daemon.pools[0].machine.size

        budgets, size = proxy.call(counted)
        assert budgets == {f"localhost:{proxy.server.port}": size}


@wire
async def test_an_init_query_that_is_new_is_run_on_every_connection(
    proxy_for: Callable[..., RunningProxy],
) -> None:
    proxy = proxy_for()
    async with await proxy.client() as client:
        assert value(await client.query("SELECT current_setting('application_name')")) == ""
        init = {"init_query": "SET application_name = 'made anew'"}
        await reloaded(proxy, changed(proxy.config, databases={proxy.database: init}))
        assert value(await client.query("SELECT current_setting('application_name')")) == "made anew"


# -- what it does not change --------------------------------------------------------------------------------


@wire
async def test_with_problems_nothing_is_applied_and_all_are_told(
    proxy_for: Callable[..., RunningProxy], tmp_path: Path
) -> None:
    proxy = proxy_for()
    tables = changed(
        proxy.config,
        listen={"tls_cert": str(tmp_path / "missing.crt")},
        users={"newcomer": {}},
        databases={proxy.database: {"max_size": 1}},
    )
    before = proxy.daemon.config, proxy.daemon.gate
    with pytest.raises(ReloadError) as caught:
        await reloaded(proxy, tables)
    assert len(caught.value.problems) >= 2
    assert any("missing.crt" in problem for problem in caught.value.problems)
    assert any("users.newcomer.password" in problem for problem in caught.value.problems)
    assert (proxy.daemon.config, proxy.daemon.gate) == before
    assert pools(proxy)[f"{proxy.database}/{proxy.user}"].machine.max_size == 4
    with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
        await psycopg.AsyncConnection.connect(proxy.dsn_for(user="newcomer"))
    async with await psycopg.AsyncConnection.connect(proxy.dsn_for(database="cenote"), autocommit=True) as console:
        with pytest.raises(psycopg.errors.ConfigFileError, match="nothing has changed") as told:
            await console.execute("RELOAD")
        assert (told.value.diag.message_detail or "").splitlines() == caught.value.problems


@wire
async def test_what_takes_a_restart_keeps_its_value_and_is_named_each_time(
    proxy_for: Callable[..., RunningProxy],
) -> None:
    proxy = proxy_for()
    tables = changed(
        proxy.config,
        listen={"port": 7777, "max_clients": 50},
        databases={proxy.database: {"mode": "session"}},
    )
    for applied in (["listen.max_clients", f"databases.{proxy.database}.mode"], []):
        changes = await reloaded(proxy, tables)
        assert changes.applied == applied
        assert changes.restart == [
            "listen.port = 7777 takes a restart; it stays 0",
            f"mode of pool \"{proxy.database}/{proxy.user}\" = 'session' takes a restart; it stays 'transaction'",
        ]
    async with await psycopg.AsyncConnection.connect(proxy.dsn_for(database="cenote"), autocommit=True) as console:
        rows = await (await console.execute("RELOAD")).fetchall()
        assert rows == [(text, False) for text in changes.restart]
        config = {row[0]: row[1] for row in await (await console.execute("SHOW CONFIG")).fetchall()}
        assert (config["listen.port"], config["listen.max_clients"]) == ("0", "50")


@wire
async def test_a_daemon_without_a_file_has_nothing_to_reload(proxy_for: Callable[..., RunningProxy]) -> None:
    proxy = proxy_for()
    with pytest.raises(ReloadError, match="without a configuration file"):
        await proxy.begin(lambda: reload(proxy.daemon))


@wire
async def test_a_reload_leaves_one_line_without_secrets(
    proxy_for: Callable[..., RunningProxy], caplog: pytest.LogCaptureFixture
) -> None:
    proxy = proxy_for()
    tables = changed(proxy.config, users={"newcomer": {"password": "hidden-word"}})
    tables["listen"]["port"] = 7777
    with caplog.at_level(logging.INFO, "cenote"):
        await reloaded(proxy, tables)
    (line,) = [record.getMessage() for record in caplog.records if record.getMessage().startswith("reloaded")]
    assert 'changed="users.newcomer: new"' in line
    assert "listen.port" in line
    assert "hidden-word" not in caplog.text


def test_differences_are_key_paths_never_values() -> None:
    one = {
        "databases": {"a": {"max_size": 1}, "b": {}},
        "users": {"x": {"password": "one"}},
        "servers": {"h:1": {"floor": 2}},
    }
    two = {
        "databases": {"a": {"max_size": 2, "password": "p"}, "c": {}},
        "users": {"x": {"password": "two"}},
        "log_level": "debug",
    }
    assert differences(config_of(one), config_of(one)) == []
    assert set(differences(config_of(one), config_of(two))) == {
        "databases.b: gone",
        "databases.c: new",
        "databases.a.max_size",
        "databases.a.password",
        "users.x.password",
        "servers.h:1: gone",
        "log_level",
    }


# -- the process --------------------------------------------------------------------------------------------


def test_sighup_reads_the_file_again_and_options_still_win_over_it(
    pg18: embedded.Postgres, tmp_path: Path
) -> None:
    file = tmp_path / "cenote.toml"

    def write(clients: int, more: str = "") -> None:
        file.write_text(
            f'admin_users = ["{pg18.user}"]\n[listen]\nport = 0\nmax_clients = {clients}\n'
            f'[databases.{pg18.database}]\nhost = "{pg18.host}"\nport = {pg18.port}\nsslmode = "disable"\n'
            f'max_size = 5\n[users.{pg18.user}]\npassword = "{pg18.password}"\n{more}'
        )

    write(100)
    with serving("--config", str(file), "--max-size", "3") as daemon:
        dsn = pg18.dsn_for(database="cenote")
        with closing(psycopg.connect(dsn, port=daemon.port, autocommit=True)) as console:

            def shown() -> tuple[str, str]:
                rows = {row[0]: row[1] for row in console.execute("SHOW CONFIG").fetchall()}
                size = rows[f"pools.{pg18.database}/{pg18.user}.max_size"]
                return rows["listen.max_clients"], size

            assert shown() == ("100", "3")
            write(200)
            daemon.process.send_signal(signal.SIGHUP)
            wait_until(lambda: shown()[0] == "200", what="the file was read again")
            assert shown() == ("200", "3")
            write(300, "nonsense = 1\n")
            with pytest.raises(psycopg.errors.ConfigFileError) as caught:
                console.execute("RELOAD")
            assert "nonsense" in (caught.value.diag.message_detail or "")
            daemon.process.send_signal(signal.SIGHUP)
            assert shown() == ("200", "3")
        status, _, err = daemon.end()
    assert status == 0
    assert "reload_refused" in err
    assert "Traceback" not in err


def test_without_a_file_sighup_means_that_the_terminal_is_gone(pg18: embedded.Postgres) -> None:
    with serving(pg18.dsn, "--port", "0") as daemon:
        status, out, err = daemon.end(signal.SIGHUP)
    assert (status, "Traceback" in err) == (0, False)
    assert out.startswith("cenote: stopped")


@pytest.mark.parametrize("how", ["", " WAIT", " IMMEDIATE"])
def test_shutdown_stops_the_process(how: str, pg18: embedded.Postgres) -> None:
    with serving(pg18.dsn, "--port", "0") as daemon:
        with closing(
            psycopg.connect(pg18.dsn_for(database="cenote"), port=daemon.port, autocommit=True)
        ) as console:
            console.execute(f"SHUTDOWN{how}")
            out, err = daemon.process.communicate(timeout=20)
    assert daemon.process.returncode == 0
    assert out.startswith("cenote: stopped")
    assert "Traceback" not in err
