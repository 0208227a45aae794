"""Session state that nobody thought of: random scripts of settings and roles, each played alone on PostgreSQL and,
among others, through the proxy, which has two server connections for all of them. Every client must hear what it
would hear if it were alone, and be told the same of the server's parameters.

A custom setting that has no value may read as an empty string: PostgreSQL never forgets its name.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, note, settings
from hypothesis import strategies as st
from proxy_kit import RunningProxy, config_for, logged_in
from scripts_BD import SYNC, again, bind, close, parse, query, run

from cenote import embedded
from cenote.testing.postgres import wait_until
from cenote.testing.wire import Address, Message, RawClient, rows
from pool_kit import Admin

# The long profile looks as far as it says, and looks for the shortest scripts that fail: that may take minutes.
LONG = settings().max_examples > 100
EXAMPLES = settings().max_examples if LONG else 60
PHASES = tuple(Phase) if LONG else (Phase.generate,)
DEADLINE_S = 30.0  # one example
CONNECTIONS = 2
CLIENTS = 20
HOLDERS = 5  # clients that may keep a connection each

ROLES = ("state_reader", "state_writer")
NAMES = ("work_mem", "datestyle", "timezone", "search_path", "app.tenant", "app.user")
VALUES = {
    "work_mem": ("5MB", "6144kB", "nonsense"),
    "datestyle": ("German", "dmy", "ISO, MDY"),
    "timezone": ("Asia/Tokyo", "UTC", "-7"),
    "search_path": ("a, b", "", "pg_catalog"),
    "app.tenant": ("one", "two", "3", ""),
    "app.user": ("1", "it's \\ me", ""),
}
PROBES = (
    *(f"SELECT current_setting('{name}', true)" for name in NAMES),
    "SHOW work_mem",
    "SHOW TIME ZONE",
    "SHOW client_encoding",
    "SELECT current_user, session_user, current_setting('role')",
)
PROBE_ALL = (
    "SELECT "
    + ", ".join(f"current_setting('{name}', true)" for name in NAMES)
    + ", current_user, session_user, current_setting('role'), current_setting('client_encoding')"
    ", current_setting('default_transaction_isolation'), current_setting('transaction_isolation')"
    ", current_setting('intervalstyle'), current_setting('application_name')"
)


@dataclass(frozen=True)
class Said:
    """One text, as a Query or, with its values, as a batch of the extended protocol."""

    text: str
    values: tuple[str, ...] = ()

    def message(self, extended: bool) -> bytes:
        return self.part() + SYNC if extended or self.values else query(self.text)

    def part(self) -> bytes:
        """As a part of a batch."""
        return run(self.text, *self.values)


@dataclass(frozen=True)
class Bound(Said):
    """A text that is bound and not executed."""

    def message(self, extended: bool) -> bytes:
        return self.part() + SYNC

    def part(self) -> bytes:
        return parse("", self.text) + bind("")


@dataclass(frozen=True)
class Named(Said):
    """A statement prepared by the protocol: with a text it is parsed, without one it is executed or closed."""

    name: str = ""
    ends: bool = False

    def message(self, extended: bool) -> bytes:
        return self.part() + SYNC

    def part(self) -> bytes:
        if self.text:
            return parse(self.name, self.text)
        return close(self.name) if self.ends else again(self.name)


@dataclass(frozen=True)
class Batch(Said):
    """Some of these, up to one Sync."""

    parts: tuple[Said, ...] = ()

    def message(self, extended: bool) -> bytes:
        return b"".join(said.part() for said in self.parts) + SYNC


@dataclass(frozen=True)
class Script:
    """One client: what it logs in with, its protocol, and what it says."""

    params: dict[str, str]
    extended: bool
    said: list[Said]

    def __str__(self) -> str:
        how = "extended" if self.extended else "simple"
        return f"{how}, {self.params}:\n" + "\n".join(f"    {said.text} {said.values or ''}" for said in self.said)


def quoted(value: str) -> str:
    """As a literal, whatever standard_conforming_strings says."""
    return ("E'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'") if "\\" in value else "'" + value + "'"


def _pairs() -> st.SearchStrategy[tuple[str, str]]:
    return st.sampled_from([(name, value) for name, values in VALUES.items() for value in values])


def _set(scope: str, pair: tuple[str, str]) -> Said:
    name, value = pair
    listed = value if name in ("search_path", "datestyle") and value else quoted(value)
    return Said(f"SET {scope} {name} = {listed}")


def _config(pair: tuple[str, str], local: bool, bound: bool) -> Said:
    name, value = pair
    if bound:
        return Said(f"SELECT set_config($1, $2, {local})", pair)
    return Said(f"SELECT set_config('{name}', {quoted(value)}, {local})")


def said(*texts: str) -> st.SearchStrategy[Said]:
    return st.sampled_from([Said(text) for text in texts])


SETS = st.builds(_set, st.sampled_from(["", "", "SESSION", "LOCAL"]), _pairs())
# PostgreSQL itself does not RESET a custom startup parameter that set_config has emptied, but one that SET has.
CONFIGS = st.builds(
    _config, _pairs().filter(lambda pair: bool(pair[1]) or "." not in pair[0]), st.booleans(), st.booleans()
)
RESETS = st.one_of(
    st.sampled_from(NAMES).map(lambda name: Said(f"RESET {name}")),
    st.sampled_from(NAMES).map(lambda name: Said(f"SET {name} TO DEFAULT")),
    st.sampled_from(NAMES).map(lambda name: Said(f"SET LOCAL {name} TO DEFAULT")),
    said("RESET ALL", "RESET ALL", "DISCARD ALL"),
)
TRANSACTIONS = said(
    *("BEGIN", "BEGIN", "BEGIN", "COMMIT", "COMMIT", "ROLLBACK", "ROLLBACK", "COMMIT AND CHAIN"),
    *("SAVEPOINT a", "SAVEPOINT b", "ROLLBACK TO a", "ROLLBACK TO b", "RELEASE a"),
    # Not SET TRANSACTION ISOLATION LEVEL: behind a RESET it comes too late, test_cases_C_settings.py says.
    *("SELECT 1/0", "SELECT nonsense", "START TRANSACTION ISOLATION LEVEL SERIALIZABLE"),
)
WHO = said(
    *(f"SET {scope} ROLE {role}" for scope in ("", "LOCAL") for role in (*ROLES, "none", "app")),
    *("RESET ROLE", "SET SESSION AUTHORIZATION DEFAULT", "RESET SESSION AUTHORIZATION"),
    *("SET SESSION AUTHORIZATION app", "SET SESSION AUTHORIZATION state_reader"),
)
OTHERS = said(
    *("SET TIME ZONE 'America/New_York'", "SET TIME ZONE LOCAL"),
    *(
        "SET TIME ZONE INTERVAL '+03:30' HOUR TO MINUTE",
        "SET NAMES 'UTF8'",
        "SET NAMES 'LATIN1'",
        "SET NAMES DEFAULT",
    ),
    "SET SESSION CHARACTERISTICS AS TRANSACTION ISOLATION LEVEL REPEATABLE READ",
    *("RESET default_transaction_isolation", "SET SCHEMA 'elsewhere'", "SET application_name = 'me'"),
)
# More than one statement in a text is for the simple protocol only; the extended one answers with an error.
MANY = said(
    "SET work_mem = '9MB'; SELECT 1/0",
    "SET app.tenant = 'both'; SET work_mem = '10MB'",
    "BEGIN; SET app.user = 'within'; COMMIT; SET app.tenant = 'behind'",
    "BEGIN; SET work_mem = '11MB'; ROLLBACK",
    "SELECT set_config('app.user', 'many', false); SELECT set_config('work_mem', '12MB', true)",
)
PREPARED = said(
    "PREPARE p AS SELECT current_setting('work_mem'), 'one'",
    "PREPARE p AS SELECT 'another'",
    "PREPARE q (text) AS SELECT set_config('app.user', $1, false)",
    "SELECT 1; PREPARE \"P\" AS SELECT 'it''s'; SELECT 2",
    *("EXECUTE p", "EXECUTE p", "EXECUTE q ('me')", "EXECUTE q ('you')", 'EXECUTE "P"', "EXPLAIN EXECUTE p"),
    *("DEALLOCATE p", "DEALLOCATE q", "DEALLOCATE ALL"),
)
BOUND = st.sampled_from(
    [
        Bound(text)
        for text in ("RESET ALL", "DISCARD ALL", "DEALLOCATE ALL", "SET work_mem = '13MB'", "RESET work_mem")
    ]
)
NAMED = st.sampled_from(
    [
        *(Named("SELECT current_setting('work_mem'), 'r'", name="r"), Named("SELECT 's'", name="s")),
        *(Named("SELECT current_setting('app.user', true)", name="s"), Named("SET app.user = 'named'", name="t")),
        *(Named("DEALLOCATE ALL", name="t"), Named("nonsense", name="r")),
        *(Named("", name=name, ends=ends) for name in "rst" for ends in (False, False, True)),
    ]
)
# A Parse that the proxy answers takes no snapshot, so a transaction may yet be made SERIALIZABLE behind it. And
# nothing is put back before the end of a batch: test_cases_C_settings.py says what is missing behind a RESET.
BATCHES = st.lists(
    st.one_of(
        NAMED,
        NAMED,
        PREPARED,
        SETS,
        TRANSACTIONS.filter(lambda said: "LEVEL" not in said.text),
        said("SELECT 1/0", "DEALLOCATE ALL", "SELECT 2"),
    ),
    min_size=2,
    max_size=4,
).map(
    lambda parts: Batch(
        " | ".join(f"{part.text}{getattr(part, 'name', '')}" for part in parts), parts=tuple(parts)
    )
)
LINES = st.one_of(
    *(SETS, SETS, CONFIGS, RESETS, TRANSACTIONS, TRANSACTIONS, WHO, OTHERS, MANY, PREPARED, PREPARED),
    *(BOUND, NAMED, NAMED, BATCHES, BATCHES),
    *(said(*PROBES), said(*PROBES)),
)
STARTUPS = st.fixed_dictionaries(
    {},
    optional={
        "DateStyle": st.sampled_from(["German", "SQL, DMY"]),
        "TimeZone": st.sampled_from(["Europe/Paris", "UTC"]),
        "search_path": st.sampled_from(["c, public", "pg_temp"]),
        "client_encoding": st.sampled_from(["UTF8", "LATIN1"]),
        "work_mem": st.just("7MB"),
        "options": st.sampled_from(
            [
                "-c app.tenant=born",
                "-c work_mem=8MB -c app.user=born",
                "-c intervalstyle=iso_8601",
                "-c role=state_reader",
            ]
        ),
    },
)
HELD = said(
    *(
        "CREATE TEMP TABLE held (n int)",
        "INSERT INTO held VALUES (1)",
        "SELECT count(*) FROM held",
        "DROP TABLE held",
    ),
    *("CREATE TEMP TABLE held ON COMMIT DROP AS SELECT 2 AS n", "DISCARD TEMP"),
    *("DECLARE c CURSOR WITH HOLD FOR SELECT generate_series(1, 3)", "FETCH 1 FROM c", "CLOSE c", "CLOSE ALL"),
    *("DECLARE c CURSOR FOR SELECT 1", "MOVE 1 FROM c"),
    *("SELECT pg_try_advisory_lock_shared(7)", "SELECT pg_advisory_unlock_shared(7)"),
    *("SELECT pg_try_advisory_xact_lock_shared(7)", "SELECT pg_advisory_unlock_all()"),
    *("LISTEN one", "LISTEN two", "UNLISTEN one", "UNLISTEN *"),
)


def scripts(lines: st.SearchStrategy[Said], most: int) -> st.SearchStrategy[list[Script]]:
    script = st.builds(Script, STARTUPS, st.booleans(), st.lists(lines, min_size=3, max_size=12))
    return st.lists(script, min_size=1, max_size=most)


class Player:
    """Plays one script on one connection, line by line.

    heard: by line, what came back and what the client then takes the server's parameters for
    """

    def __init__(self, script: Script) -> None:
        self.script = script
        self.lines = [*script.said, Said("ROLLBACK"), Said(PROBE_ALL)]
        self.at = 0
        self.status = "I"
        self.heard: list[Any] = []
        self.client: RawClient

    async def start(self, address: Address, login: Any) -> None:
        self.client = await logged_in(address, login, params=self.script.params, timeout=10.0)
        self.heard.append(dict(self.client.parameters))

    @property
    def ended(self) -> bool:
        return self.at == len(self.lines)

    async def step(self) -> None:
        """Say the next line and hear the answer."""
        line = self.lines[self.at]
        self.at += 1
        await self.client.send(line.message(self.script.extended))
        answer = await self.client.until_ready()
        self.status = answer[-1].body.decode()
        self.heard.append((line.text, [_told(m) for m in answer if m.kind != "S"], dict(self.client.parameters)))


def _told(message: Message) -> Any:
    """A message as it is compared: an unset custom setting is an empty one."""
    if message.kind == "D":
        return tuple(column or "" for column in rows([message])[0])
    if message.kind in "EN":
        return message.kind, message.fields["C"], message.fields["M"]
    if message.kind in "Tt":
        return message.kind
    return message.kind, message.body


async def alone(server: Any, script: Script) -> list[Any]:
    """What PostgreSQL says to it."""
    player = Player(script)
    await player.start(Address(server.host, server.port), server)
    while not player.ended:
        await player.step()
    await player.client.terminate()
    return player.heard


async def among_others(
    proxy: RunningProxy, scripts: Sequence[Script], dice: random.Random, most: int
) -> list[list[Any]]:
    """What the proxy says to each: line by line, whose turn it is is drawn, and no more are in a transaction at a
    time than `most`, the number of connections there are for them."""
    players = [Player(script) for script in scripts]
    for player in players:
        await player.start(proxy.address, proxy)
    while going := [player for player in players if not player.ended]:
        within = [player for player in going if player.status != "I"]
        player = dice.choice(going if len(within) < most else within)
        await player.step()
    for player in players:
        await player.client.terminate()
    return [player.heard for player in players]


@pytest.fixture
def roles(pg: embedded.Postgres) -> Iterator[None]:
    """Roles that a client may take."""
    admin = Admin(pg.superuser_dsn)
    try:
        for role in ROLES:
            admin.rows(f"CREATE ROLE {role}")
            admin.rows(f"GRANT {role} TO {pg.user}")
        yield
        for role in ROLES:
            admin.rows(f"DROP ROLE {role}")
    finally:
        admin.conn.close()


@pytest.mark.usefixtures("roles")
def test_C_each_client_hears_what_it_would_hear_alone(pg: embedded.Postgres) -> None:
    compared(pg, scripts(LINES, CLIENTS), CONNECTIONS, max_size=CONNECTIONS)


@pytest.mark.usefixtures("roles")
def test_C_what_ties_a_client_to_a_connection_changes_nothing_it_hears(pg: embedded.Postgres) -> None:
    """Temporary tables, cursors, locks and channels among all the rest, with more connections than clients."""
    size = HOLDERS + CONNECTIONS
    compared(pg, scripts(st.one_of(HELD, HELD, LINES), HOLDERS), HOLDERS, max_size=size, max_pinned=size - 1)


def compared(pg: embedded.Postgres, drawn: st.SearchStrategy[list[Script]], most: int, **options: int) -> None:
    proxy = RunningProxy(config_for(pg, **options), pg).start()
    try:
        check = settings(
            max_examples=EXAMPLES,
            phases=PHASES,
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
        )(given(drawn, st.integers(0, 1 << 32))(lambda scripts, seed: example(proxy, scripts, seed, most)))
        check()
    finally:
        proxy.stop()


def example(proxy: RunningProxy, scripts: list[Script], seed: int, most: int) -> None:
    """Some scripts, both ways."""
    for script in scripts:
        note(str(script))

    async def compare() -> None:
        async with asyncio.timeout(DEADLINE_S):
            wanted = [await alone(proxy.server, script) for script in scripts]
            try:
                heard = await among_others(proxy, scripts, random.Random(seed), most)
            finally:
                for client in list(RawClient.live):
                    await client.abort()
            for number, (got, said) in enumerate(zip(heard, wanted, strict=True)):
                differing = [
                    f"\n  PostgreSQL: {theirs}\n  the proxy:  {ours}"
                    for theirs, ours in zip(said, got, strict=True)
                    if theirs != ours
                ]
                assert not differing, f"client {number}: {''.join(differing[:3])}"

    asyncio.run(compare())
    # What this example has leaked must not fail those behind it.
    leaked, proxy.incidents = proxy.incidents, incidents(proxy)
    proxy.clean()
    assert proxy.incidents == leaked, "a session leaked"


def incidents(proxy: RunningProxy) -> int:
    """How often a session was found to be another than it was taken for."""
    wait_until(lambda: not proxy.clients() and not proxy.counts()["resetting"], what="all is audited")
    return int(proxy.call(lambda: sum(pool.incidents for pool in proxy.pools())))
