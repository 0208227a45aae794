"""Scripts that nobody thought of: random messages, played on PostgreSQL and through the proxy, while two other
clients use the same two server connections. The two traces must be equal, and so must what is in the table after.
"""

from __future__ import annotations

import asyncio
import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, note, settings
from hypothesis import strategies as st
from proxy_kit import RunningProxy, config_for, logged_in
from scripts_BD import (
    COPY_DONE,
    FLUSH,
    SYNC,
    bind,
    close,
    close_portal,
    company,
    copy_fail,
    data,
    describe,
    describe_portal,
    execute,
    parse,
    query,
)

from cenote import embedded
from cenote.testing.postgres import fresh_database
from cenote.testing.wire import Address, Message, RawClient, normalised
from cenote.testing.wire_trace import Trace

# The long profile looks as far as it says, and looks for the shortest script that fails: that may take minutes.
LONG = settings().max_examples > 100
EXAMPLES = settings().max_examples if LONG else 40
PHASES = tuple(Phase) if LONG else (Phase.generate,)
DEADLINE_S = 30.0  # one example

NAMES = st.sampled_from(["", "s", "a", "b"])
PORTALS = st.sampled_from(["", "", "p"])
TEXTS = st.sampled_from(
    [
        "SELECT 'one'",
        "SELECT 'two', $1::text",
        "SELECT generate_series(1, 3)",
        "SELECT 1 / (random() * 0)::int",
        "SELECT 1 +",
        "SELECT * FROM nothing",
        "INSERT INTO random_rows VALUES (7) RETURNING id + 0",
        "INSERT INTO random_rows VALUES ($1::int)",
        "SELECT count(*) FROM random_rows",
        "COPY random_rows TO STDOUT",
        "BEGIN",
        "COMMIT",
        "ROLLBACK",
        "",
    ]
)
QUERIES = st.sampled_from(
    [
        "SELECT 'simple'",
        "SELECT 1/0",
        "SELECT 'first'; SELECT 'second', 2",
        "INSERT INTO random_rows VALUES (1); SELECT count(*) FROM random_rows",
        "INSERT INTO random_rows VALUES (2); SELECT 1/0",
        "BEGIN",
        "BEGIN; SELECT 'in it'",
        "COMMIT",
        "COMMIT AND CHAIN",
        "ROLLBACK",
        "SAVEPOINT x",
        "ROLLBACK TO x",
        "COPY random_rows TO STDOUT",
        "SET work_mem = '5MB'",
        "SHOW work_mem",
        "DEALLOCATE ALL",
        "EXECUTE s",
        "PREPARE b AS SELECT 'by SQL'",
    ]
)
VALUES = st.sampled_from([(), ("5",), ("x",), (None,), ("5", "6")])
MESSAGES = st.one_of(
    st.builds(parse, NAMES, TEXTS),
    st.builds(lambda name, values, portal: bind(name, *values, portal=portal), NAMES, VALUES, PORTALS),
    st.builds(lambda name: bind(name) + describe_portal() + execute(), NAMES),
    st.builds(describe, NAMES),
    st.builds(describe_portal, PORTALS),
    st.builds(execute, PORTALS, st.sampled_from([0, 0, 1, 2])),
    st.builds(close, NAMES),
    st.builds(close_portal, PORTALS),
    st.just(FLUSH),
)
# Whether a Sync behind a row that fails is eaten cannot be known before the server says so: none stands there.
ROWS = st.builds(
    lambda before, rows: b"".join(before + rows),
    st.lists(st.sampled_from([FLUSH, SYNC]), max_size=2),
    st.lists(st.sampled_from([data("1"), data("2", "3"), data("x"), FLUSH]), max_size=3),
)
COPY_IN = "COPY random_rows FROM STDIN"


@dataclass(frozen=True)
class Sent:
    """Bytes sent at once, and how many ReadyForQuery to wait for then; None: until the answer to a fence."""

    data: bytes
    n_ready: int | None = 0

    def __str__(self) -> str:
        rest, words = self.data, []
        while rest:
            length = int.from_bytes(rest[1:5], "big")
            words.append(f"{chr(rest[0])} {rest[5 : length + 1]!r}")
            rest = rest[length + 1 :]
        return f"{self.n_ready} <- " + ", ".join(words)


# Nobody can tell how many ReadyForQuery will come, so a fence stands behind: nothing else is an empty query.
FENCE = copy_fail("the fence") + SYNC + query("")


def _batch(parts: list[bytes], cut: int, waits: bool) -> list[Sent]:
    whole = [Sent(b"".join(parts) + SYNC, 1)]
    if waits and 0 < cut < len(parts):
        whole = [Sent(b"".join(parts[:cut])), Sent(b"".join(parts[cut:]) + SYNC, 1)]
    return whole


def _pipeline(batches: list[list[bytes]]) -> list[Sent]:
    return [Sent(b"".join(b"".join(parts) + SYNC for parts in batches), len(batches))]


def _discarded(parts: list[bytes], text: str) -> list[Sent]:
    """Everything behind the first message is discarded, the Query too. (In a batch without an error, PostgreSQL 18
    may answer a Query that comes before the Sync with XX000, and nothing can be said of what follows.)"""
    return [Sent(bind("nothing") + b"".join(parts) + query(text) + FENCE, None)]


def _copied(rows: bytes, end: bytes) -> list[Sent]:
    return [Sent(query(COPY_IN) + rows + end + FENCE, None)]


def _copied_extended(sync: bytes, rows: bytes, end: bytes) -> list[Sent]:
    begin = parse("", COPY_IN) + bind() + execute()
    return [Sent(begin + sync + rows + end + SYNC + FENCE, None)]


BATCH = st.lists(MESSAGES, min_size=1, max_size=6)
ENDS = st.sampled_from([COPY_DONE, copy_fail("no")])
STEPS = st.one_of(
    st.builds(_batch, BATCH, st.integers(0, 6), st.booleans()),
    st.builds(_batch, BATCH, st.integers(0, 6), st.booleans()),
    st.builds(_pipeline, st.lists(BATCH, min_size=2, max_size=4)),
    st.builds(lambda text: [Sent(query(text), 1)], QUERIES),
    st.builds(
        lambda texts: [Sent(b"".join(map(query, texts)), len(texts))], st.lists(QUERIES, min_size=2, max_size=4)
    ),
    st.builds(_discarded, BATCH, QUERIES),
    st.builds(_copied, ROWS, ENDS),
    st.builds(_copied_extended, st.sampled_from([b"", SYNC, FLUSH]), ROWS, ENDS),
)
SCRIPTS = st.lists(STEPS, min_size=2, max_size=8).map(lambda steps: [sent for step in steps for sent in step])


async def play(address: Address, server: Any, script: Sequence[Sent], pieces: int) -> Trace:
    """What one end says to a script."""
    trace: list[Message] = []
    async with await logged_in(address, server, timeout=10.0) as client:
        for sent in script:
            if pieces:
                await client.send_in_pieces(sent.data, pieces)
            else:
                await client.send(sent.data)
            trace += await answers(client, sent)
        await client.send(SYNC, query("ROLLBACK"))
        trace += await client.trace(2)
        await client.terminate()
    return normalised(trace)


async def answers(client: RawClient, sent: Sent) -> list[Message]:
    """All that comes for it."""
    if sent.n_ready is not None:
        return await client.trace(sent.n_ready)
    trace = await client.until_ready()
    while trace[-2].kind != "I":
        trace += await client.until_ready()
    return trace


async def committed(server: Any) -> list[Message]:
    """What is in the table, which is emptied."""
    async with await logged_in(Address(server.host, server.port), server) as client:
        found = await client.query("SELECT array_agg(id ORDER BY id) FROM random_rows")
        await client.query("TRUNCATE random_rows")
        await client.terminate()
    return found


class Somewhere:
    """A server, with a database of one's own."""

    def __init__(self, server: embedded.Postgres, database: str) -> None:
        self.host, self.port, self.user, self.password = server.host, server.port, server.user, server.password
        self.database = database


@pytest.mark.parametrize("max_prepared", [200, 2])
def test_whatever_a_client_sends_it_hears_what_postgresql_says(pg: embedded.Postgres, max_prepared: int) -> None:
    with fresh_database(pg) as name:
        server = Somewhere(pg, name)
        proxy = RunningProxy(config_for(server, max_size=2, max_prepared=max_prepared), server).start()
        try:
            asyncio.run(make_table(server))
            check = settings(
                max_examples=EXAMPLES,
                phases=PHASES,
                suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
            )(
                given(SCRIPTS, st.sampled_from([0, 0, 7, 100]))(
                    lambda script, pieces: example(proxy, script, pieces)
                )
            )
            check()
        finally:
            proxy.stop()


def difference(said: Trace, heard: Trace) -> list[str]:
    """The two traces, line by line."""
    lines = [[f"{kind} {body!r}" for kind, body in trace] for trace in (said, heard)]
    return list(difflib.unified_diff(*lines, "PostgreSQL", "the proxy", lineterm=""))


async def make_table(server: Somewhere) -> None:
    """The table that scripts write to."""
    async with await logged_in(Address(server.host, server.port), server) as client:
        await client.query("CREATE TABLE random_rows (id int)")
        await client.terminate()


def example(proxy: RunningProxy, script: list[Sent], pieces: int) -> None:
    """One script, both ways."""
    note("\n".join(map(str, script)))

    async def compare() -> None:
        async with asyncio.timeout(DEADLINE_S):
            server = proxy.server
            said = await play(Address(server.host, server.port), server, script, 0)
            stored = await committed(server)
            try:
                async with company(proxy):
                    heard = await play(proxy.address, server, script, pieces)
                    assert heard == said, "\n".join(difference(said, heard))
            finally:
                found = await committed(server)
            assert found == stored
            for client in list(RawClient.live):
                await client.abort()

    asyncio.run(compare())
    proxy.clean()
