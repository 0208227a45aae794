"""Every pool with every driver: `kit` and `any_kit` run a behaviour over `Pool` with psycopg, psycopg2 and, where
the server does not matter, sqlite3, and over `AsyncPool` with psycopg and asyncpg."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from cenote import embedded
from cenote.testing.postgres import fresh_database
from pool_kit import DRIVERS, EVERY_DRIVER, Admin, Kit

SETUP = """
CREATE TABLE note (id serial PRIMARY KEY, text text UNIQUE);
CREATE TABLE due (id int UNIQUE DEFERRABLE INITIALLY DEFERRED);
CREATE SEQUENCE counter;
CREATE FUNCTION hidden() RETURNS void LANGUAGE plpgsql AS
  $$ BEGIN PERFORM set_config('work_mem', '7MB', false); END $$;
GRANT ALL ON ALL TABLES IN SCHEMA public TO PUBLIC;
GRANT ALL ON ALL SEQUENCES IN SCHEMA public TO PUBLIC;
"""


@pytest.fixture(scope="session")
def server(pg18: embedded.Postgres) -> Iterator[tuple[embedded.Postgres, str, Admin]]:
    with fresh_database(pg18) as name:
        admin = Admin(pg18.dsn_for(user="postgres", database=name))
        admin.rows(SETUP)
        admin.rows(f'CREATE ROLE guest_{name}; GRANT guest_{name} TO "{pg18.user}"')
        yield pg18, name, admin
        admin.rows(f"DROP ROLE guest_{name}")
        admin.conn.close()


@pytest.fixture(params=DRIVERS)
def kit(request: pytest.FixtureRequest, server: tuple[embedded.Postgres, str, Admin]) -> Kit:
    pg, name, admin = server
    admin.rows("DELETE FROM note; DELETE FROM due")
    return Kit(request.param, pg.dsn_for(database=name), admin)


@pytest.fixture(params=EVERY_DRIVER)
def any_kit(request: pytest.FixtureRequest, tmp_path: Path) -> Kit:
    if request.param == "sqlite3":
        kit = Kit("sqlite3", str(tmp_path / "notes.db"), None)
        with contextlib.closing(sqlite3.connect(kit.dsn)) as conn:
            conn.execute("PRAGMA journal_mode = wal")
            conn.execute("CREATE TABLE note (id integer PRIMARY KEY, text text UNIQUE)")
        return kit
    pg, name, admin = request.getfixturevalue("server")
    admin.rows("DELETE FROM note; DELETE FROM due")
    return Kit(request.param, pg.dsn_for(database=name), admin)
