"""Group C, conversions: a connection is made to carry a client's settings in the same write as its first message.

What that message asks for may only run once the connection carries them.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from proxy_kit import wire
from scripts_BD import SYNC, again, bind, close, describe, execute, parse, query, run
from state_kit import pid_of, roles_of, shown, tell

from cenote.embedded import Postgres
from cenote.testing.wire import RawClient, WireFailure, error, errors, kinds, rows, value
from pool_kit import Admin

INSERT = "INSERT INTO c_log VALUES (1)"


@pytest.fixture
def log(pg: Postgres) -> Iterator[Admin]:
    """A table that everybody may write to, and a role to be taken and lost."""
    with roles_of(pg, "c_lost") as admin:
        admin.rows("DROP TABLE IF EXISTS c_log; CREATE TABLE c_log (x int); GRANT ALL ON c_log TO PUBLIC")
        yield admin
        admin.rows("DROP TABLE c_log")


@pytest.mark.parametrize(
    "batch",
    [
        pytest.param(query(INSERT), id="a query"),
        pytest.param(query("BEGIN") + query(INSERT) + query("COMMIT"), id="a transaction in one write"),
        pytest.param(query(f"BEGIN; {INSERT}; COMMIT; {INSERT}"), id="a transaction in one text"),
        pytest.param(query(f"SELECT 1; COMMIT; {INSERT}"), id="a text that ends what failed"),
        pytest.param(query("SELECT 1") + query("ROLLBACK") + query(INSERT), id="a pipeline that ends what failed"),
        pytest.param(query("ROLLBACK") + query(INSERT), id="a roll-back first"),
        pytest.param(query("COMMIT") + run(INSERT) + SYNC, id="a commit first"),
        pytest.param(run(INSERT) + SYNC, id="a batch"),
        pytest.param(run("SELECT 1") + run("ROLLBACK") + run(INSERT) + SYNC, id="a batch that ends what failed"),
        pytest.param(run("SELECT 1") + SYNC + run("ROLLBACK") + SYNC + run(INSERT) + SYNC, id="batches"),
        pytest.param(again("mine") + SYNC, id="a prepared statement"),
        pytest.param(again("end") + again("mine") + SYNC, id="a prepared roll-back first"),
        pytest.param(close("nobody") + again("mine") + SYNC, id="a Close first"),
        pytest.param(describe("mine") + again("mine") + SYNC, id="a Describe first"),
        pytest.param(parse("other", INSERT) + bind("other") + execute() + SYNC, id="a named Parse first"),
        pytest.param(b"S\0\0\0\4" + query(INSERT), id="a Sync first"),
    ],
)
@wire
async def test_C22_nothing_runs_on_a_connection_that_cannot_be_made_to_carry_the_settings(
    single, log: Admin, batch: bytes
):
    """The client hears why, once, and is disconnected; the connection serves others as before."""
    async with await single.client() as client, await single.client() as other:
        await tell(client, "SET ROLE c_lost")
        await client.send(parse("mine", INSERT) + parse("end", "ROLLBACK") + SYNC)
        await client.until_ready()
        await tell(other, "SET app.tenant = 'other'")
        pid = await pid_of(other)
        log.rows("REVOKE c_lost FROM app")
        await client.send(batch)
        heard = await until_the_end(client)
        assert errors(heard)[-1]["S"] == "FATAL"
        assert 'permission denied to set role "c_lost"' in errors(heard)[-1]["M"]
        assert len(errors(heard)) == 1
        assert log.rows("SELECT count(*) FROM c_log") == [(0,)]
        assert await shown(other, "role", "app.tenant") == ["none", "other"]
        assert await pid_of(other) == pid


async def until_the_end(client: RawClient) -> list:
    heard = []
    while True:
        try:
            heard.append(await client.receive())
        except (WireFailure, EOFError, ConnectionError):
            return heard


@wire
async def test_C22_many_tenants_in_turn_have_their_own_settings_in_every_kind_of_message(single):
    """Each of them finds the connection as another one has left it."""
    clients = [await single.client() for _ in range(4)]
    ask = "SELECT current_setting('app.tenant'), current_setting('work_mem')"
    for number, client in enumerate(clients):
        await tell(client, f"SET app.tenant = 't{number}'", f"SET work_mem = '{number + 1}MB'")
        await client.send(parse("ask", ask) + SYNC)
        await client.until_ready()
    for batch, n_ready in [
        (query(ask), 1),
        (run(ask) + SYNC, 1),
        (again("ask") + SYNC, 1),
        (query("BEGIN") + query(ask) + query("COMMIT"), 3),
        (query("COMMIT") + query(ask), 2),
        (query(ask) + again("ask") + SYNC + run(ask) + SYNC, 3),
        (close("nobody") + run(ask) + SYNC, 1),
    ]:
        for number, client in enumerate(clients):
            await client.send(batch)
            answer = await client.trace(n_ready)
            assert "E" not in kinds(answer)
            assert set(rows(answer)) == {(f"t{number}", f"{number + 1}MB")}
    for client in clients:
        await client.terminate()


@wire
async def test_B19_a_plan_that_has_changed_is_made_anew_behind_a_conversion_too(single, log: Admin):
    async with await single.client() as client, await single.client() as other:
        await tell(client, "SET work_mem = '5MB'")
        await client.send(parse("all", "SELECT * FROM c_log") + again("all") + SYNC)
        await client.until_ready()
        log.rows("ALTER TABLE c_log ADD COLUMN y int DEFAULT 2; INSERT INTO c_log VALUES (1)")
        assert value(await other.query("SHOW work_mem")) == "4MB"
        await client.send(again("all") + SYNC)
        answer = await client.until_ready()
        assert errors(answer) == []
        assert rows(answer) == [("1", "2")]
        log.rows("ALTER TABLE c_log DROP COLUMN y")


@wire
async def test_C22_an_error_of_the_client_itself_is_its_own(single):
    """Its batch fails as always, and the connection carries its settings all the same."""
    async with await single.client() as client, await single.client() as other:
        await tell(client, "SET work_mem = '5MB'")
        await tell(other, "SET work_mem = '6MB'")
        assert error(await client.query("SELECT 1/0"))["C"] == "22012"
        assert await shown(client, "work_mem") == "5MB"
        await other.send(run("SELECT 1/0") + SYNC)
        assert error(await other.until_ready())["C"] == "22012"
        assert await shown(other, "work_mem") == "6MB"


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("search_path", '"$user", public'),
        ("search_path", "pg_catalog"),
        ("DateStyle", "German, YMD"),
        ("TimeZone", "Europe/Zurich"),
        ("TimeZone", "<+05>-05"),
        ("application_name", 'it\'s \\ "me" é'),
        ("app.tenant", "a, 'b' \\ \"c\""),
        ("temp_tablespaces", ""),
        ("log_parameter_max_length_on_error", "-1"),
        ("statement_timeout", "1min"),
        ("extra_float_digits", "0"),
        ("client_min_messages", "warning"),
    ],
)
@wire
async def test_C3_values_of_every_form_come_through_a_conversion(single, name: str, given: str):
    async with await single.client() as client, await single.client() as other:
        await client.send(run("SELECT set_config($1, $2, false)", name, given) + SYNC)
        assert errors(await client.until_ready()) == []
        expected = await shown(client, name)
        await tell(other, "SET work_mem = '6MB'")
        for _ in range(2):
            assert await shown(client, name) == expected
            assert await shown(other, "work_mem") == "6MB"
