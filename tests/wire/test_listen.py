"""LISTEN and NOTIFY in transaction mode: who listens keeps no connection. One shared connection of the pool hears
for all, and every client hears what it would of PostgreSQL, once and in order.
"""

from __future__ import annotations

import asyncio
import random

import pytest
from listen_kit import channels, delivered, hear, heard, listening, shared
from proxy_kit import RunningProxy, until, wire
from scripts_BD import SYNC, query, run
from state_kit import direct, pid_of, pinned, tell

from cenote.embedded import Postgres
from cenote.testing.wire import RawClient, kinds, rows, value

EXTENDED = pytest.mark.parametrize("extended", [False, True], ids=["simple", "extended"])


@pytest.fixture
def three(proxy_for, pg18: Postgres) -> RunningProxy:
    """A proxy with three."""
    return proxy_for(pg18, max_size=3)


# -- C15 ----------------------------------------------------------------------------------------------------------


@EXTENDED
@wire
async def test_C15_who_listens_keeps_no_connection(pair, extended):
    listeners = [await pair.client() for _ in range(6)]
    for number, client in enumerate(listeners):
        await listening(pair, client, f"LISTEN c{number}", extended=extended)
    assert channels(pair) == [f"c{number}" for number in range(6)]
    async with await direct(pair.server) as other:
        for number, client in enumerate(listeners):
            await tell(other, f"NOTIFY c{number}, 'one'", f"SELECT pg_notify('c{number}', 'two')")
            assert await hear(client, 2) == [(f"c{number}", "one"), (f"c{number}", "two")]
    assert await pid_of(listeners[0]) == await pid_of(listeners[1]), "the one connection that is left serves all"
    for number, client in enumerate(listeners):
        await tell(client, f"UNLISTEN c{number}", extended=extended)
        await client.terminate()
    await until(lambda: not channels(pair))
    assert shared(pair) == 0


CHANGES = {
    "autocommit": (["LISTEN a"], "a"),
    "twice": (["LISTEN a", "LISTEN a", "LISTEN b"], "ab"),
    "committed": (["BEGIN", "LISTEN a", "COMMIT"], "a"),
    "rolled back": (["BEGIN", "LISTEN a", "ROLLBACK"], ""),
    "savepoint": (["BEGIN", "LISTEN a", "SAVEPOINT s", "LISTEN b", "ROLLBACK TO s", "COMMIT"], "a"),
    "one of two": (["LISTEN a; LISTEN b", "UNLISTEN a"], "b"),
    "quoted": (['LISTEN "a"', 'LISTEN "A ""b"', "UNLISTEN A"], '"A ""b"'),
    "all": (["LISTEN a", "LISTEN b", "UNLISTEN *"], ""),
    "discarded": (["LISTEN a", "DISCARD ALL"], ""),
    "unlisten committed": (["LISTEN a", "LISTEN b", "BEGIN", "UNLISTEN b", "COMMIT"], "a"),
    "unlisten rolled back": (["LISTEN a", "BEGIN", "UNLISTEN a", "ROLLBACK"], "a"),
    "all committed": (["LISTEN a", "BEGIN", "LISTEN b", "UNLISTEN *", "LISTEN c", "COMMIT"], "c"),
    "all rolled back": (["LISTEN a", "BEGIN", "UNLISTEN *", "LISTEN b", "ROLLBACK"], "a"),
    "all, in the end": (["LISTEN a", "BEGIN", "UNLISTEN *", "COMMIT"], ""),
    "unlisten to a savepoint": (
        ["LISTEN a", "BEGIN", "SAVEPOINT s", "UNLISTEN *", "ROLLBACK TO s", "COMMIT"],
        "a",
    ),
    "and more": (["LISTEN a", "BEGIN", "LISTEN b", "SAVEPOINT s", "UNLISTEN a", "ROLLBACK TO s", "COMMIT"], "ab"),
    "again behind it": (
        ["LISTEN a", "LISTEN b", "BEGIN", "SAVEPOINT s", "UNLISTEN a", "ROLLBACK TO s", "UNLISTEN b", "COMMIT"],
        "a",
    ),
    "two of three": (["LISTEN a; LISTEN b; LISTEN c", "BEGIN", "UNLISTEN a", "UNLISTEN b", "COMMIT"], "c"),
    "two, one rolled back": (
        [
            "LISTEN a; LISTEN b; LISTEN c",
            "BEGIN",
            "UNLISTEN a",
            "SAVEPOINT s",
            "UNLISTEN b",
            "ROLLBACK TO s",
            "END",
        ],
        "bc",
    ),
    "two, the other rolled back": (
        [
            "LISTEN a; LISTEN b",
            "BEGIN",
            "SAVEPOINT s",
            "UNLISTEN a",
            "ROLLBACK TO s",
            "UNLISTEN b",
            "LISTEN c",
            "END",
        ],
        "ac",
    ),
    "and again": (["LISTEN a", "BEGIN", "UNLISTEN a", "LISTEN a", "COMMIT"], "a"),
    "failed": (["LISTEN a", "BEGIN", "UNLISTEN a", "SELECT 1/0", "COMMIT"], "a"),
    "in one text": (["LISTEN a", "BEGIN; UNLISTEN a; LISTEN b; COMMIT"], "b"),
    "in one text, failed": (["LISTEN a", "UNLISTEN a; LISTEN b; SELECT 1/0"], "a"),
    "in DO": (["LISTEN a; LISTEN b", "DO $$BEGIN EXECUTE 'UNLISTEN a'; EXECUTE 'LISTEN c'; END$$"], "bc"),
}


@pytest.mark.parametrize("change", CHANGES)
@wire
async def test_C15_what_a_client_listens_to_is_what_it_would_be_at_the_server(pair, change):
    texts, left = CHANGES[change]
    wanted = ['A "b'] if left.startswith('"') else list(left)
    async with await direct(pair.server) as other:
        for extended in (False, True):
            async with await pair.client() as client:
                for text in texts:
                    single = extended and ";" not in text.partition("$$")[0]
                    await client.send(run(text) + SYNC if single else query(text))
                    await client.until_ready()
                await tell(other, "NOTIFY a", "NOTIFY b", "NOTIFY c", 'NOTIFY "A ""b"')
                answers = await client.query("LISTEN last") + await client.query("SELECT 1")
                await until(lambda: pinned(pair) == 0)  # by one connection everything comes in one order
                await tell(other, "NOTIFY last")
                answers += await client.until("A")
                while heard(answers)[-1][0] != "last":
                    answers += await client.until("A")
                assert sorted(channel for channel, _ in heard(answers)[:-1]) == sorted(wanted)
                await until(lambda: sorted(channels(pair)) == sorted([*wanted, "last"]))
            await until(lambda: not channels(pair))


@wire
async def test_C15_within_a_transaction_nothing_is_heard(pair):
    async with await pair.client() as client, await direct(pair.server) as other:
        await listening(pair, client, "LISTEN a")
        await tell(client, "BEGIN")
        await tell(other, "NOTIFY a, 'first'", "NOTIFY a, 'second'")
        await until(lambda: delivered(pair) == 2)
        assert kinds(await client.query("SELECT 1")) == "TDCZ"
        await client.send(query("COMMIT"))
        assert kinds(await client.trace()) == "CZ"
        assert await hear(client, 2) == [("a", "first"), ("a", "second")]


@EXTENDED
@wire
async def test_C15_own_notifications_come_behind_ready_for_query(pair, extended):
    async with await pair.client() as client:
        await listening(pair, client, "LISTEN a")
        await tell(client, "NOTIFY a, 'mine'", extended=extended)
        assert await hear(client) == [("a", "mine")]
        await tell(client, "BEGIN", "NOTIFY a, 'never'", "ROLLBACK", "NOTIFY a, 'then'", extended=extended)
        assert await hear(client) == [("a", "then")]


@wire
async def test_after_an_unlisten_was_answered_nothing_more_is_heard(pair):
    async with await pair.client() as client, await direct(pair.server) as other:
        for text in ("UNLISTEN a", "UNLISTEN *", "BEGIN; UNLISTEN a; COMMIT"):
            await listening(pair, client, "LISTEN a", "LISTEN b")
            other.feed(b"".join(query(f"NOTIFY a, '{number}'") for number in range(200)))
            answers = await client.query(text)
            await other.trace(200)
            behind = await client.query("SELECT 1")
            assert kinds(behind) == "TDCZ"
            told = [payload for _, payload in heard(answers)]
            assert told == [str(number) for number in range(len(told))]
            await tell(client, "UNLISTEN *")


@wire
async def test_nothing_is_lost_or_told_twice_while_channels_are_handed_over(three):
    """Somebody sends all the time, while clients come to listen and listen no more."""
    async with await direct(three.server) as other, await three.client() as first:
        await listening(three, first, "LISTEN busy")
        stop = asyncio.Event()
        sent = 0

        async def send() -> None:
            nonlocal sent
            while not stop.is_set():
                await tell(other, *(f"NOTIFY busy, '{sent + nth}'" for nth in range(20)))
                sent += 20

        sending = asyncio.create_task(send())
        for _ in range(15):
            async with await three.client() as client:
                answers = [m for _ in range(3) for m in await client.query("LISTEN busy")]
                answers += await client.query("LISTEN other")
                while len(heard(answers)) < 100:
                    answers += await client.until("A")
                numbers = [int(payload) for _, payload in heard(answers)]
                assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
        stop.set()
        await sending
        told = heard(await first.until("A"))
        while len(told) < sent:
            told += heard(await first.until("A"))
        assert told == [("busy", str(number)) for number in range(sent)]


@pytest.mark.parametrize("seed", range(3))
@wire
async def test_twenty_clients_on_three_connections_hear_their_own_channels_once_and_in_order(three, seed):
    chance = random.Random(seed)
    names = [f"ch{number}" for number in range(12)]
    clients = [await three.client() for _ in range(20)]
    wanted: list[list[tuple[str, str]]] = [[] for _ in clients]
    mine = [set(chance.sample(names, 3)) for _ in clients]

    async def subscribe(client: RawClient, own: set[str]) -> None:
        await tell(client, *(f"LISTEN {name}" for name in sorted(own)))

    await asyncio.gather(*(subscribe(client, own) for client, own in zip(clients, mine, strict=True)))
    await until(lambda: pinned(three) == 0 and shared(three) == 1)
    told: list[list[tuple[str, str]]] = [[] for _ in clients]

    async def works(client: RawClient, into: list[tuple[str, str]], own: random.Random) -> None:
        for _ in range(20):
            texts = (
                ["SELECT 1"] if own.random() < 0.5 else ["BEGIN", "SELECT 2", own.choice(["COMMIT", "ROLLBACK"])]
            )
            for text in texts:
                into += heard(await client.query(text))

    async def notify() -> None:
        async with await direct(three.server) as other:
            for number in range(200):
                name = chance.choice(names)
                for own, expected in zip(mine, wanted, strict=True):
                    if name in own:
                        expected.append((name, str(number)))
                await tell(other, f"NOTIFY {name}, '{number}'")

    await asyncio.gather(
        notify(),
        *(works(c, t, random.Random(seed + n)) for n, (c, t) in enumerate(zip(clients, told, strict=True))),
    )
    for client, into, expected in zip(clients, told, wanted, strict=True):
        while len(into) < len(expected):
            into += heard(await client.until("A"))
        assert into == expected
        assert kinds(await client.query("SELECT 1")) == "TDCZ"
        await client.terminate()


# -- at random ----------------------------------------------------------------------------------------------------

CHANNELS = "SELECT string_agg(c, ' ' ORDER BY c) FROM pg_listening_channels() AS c"


def texts_at_random(chance: random.Random) -> list[str]:
    """A session that listens, with transactions and savepoints of whatever end."""
    said = []
    for _ in range(12):
        change = lambda: chance.choice(["LISTEN", "UNLISTEN"]) + " " + chance.choice("abcd")  # noqa: E731
        inside = [
            chance.choice(
                [change(), change(), "UNLISTEN *", "SAVEPOINT s", "ROLLBACK TO s", "RELEASE s", "SELECT 1"]
            )
            for _ in range(chance.randrange(1, 5))
        ]
        kind = chance.random()
        if kind < 0.4:
            said.append(chance.choice([change(), change(), change(), "UNLISTEN *", "DISCARD ALL"]))
        elif kind < 0.8:
            said += ["BEGIN", *inside, chance.choice(["COMMIT", "COMMIT", "ROLLBACK"])]
        else:
            said.append("; ".join(change() for _ in range(3)))
    return said


@pytest.mark.parametrize("seed", range(5))
@EXTENDED
@wire
async def test_what_is_listened_to_is_the_same_as_at_the_server_whatever_is_said(three, seed, extended):
    chance = random.Random(seed)
    async with await three.client() as client, await three.client() as busy, await direct(three.server) as own:
        await tell(busy, "LISTEN a")
        for one in (client, own):
            await tell(one, "LISTEN a; LISTEN b; LISTEN c; LISTEN d")
        for text in texts_at_random(chance):
            for one in (client, own):
                await one.send(run(text) + SYNC if extended and ";" not in text else query(text))
            answer = await own.until_ready()
            assert kinds(await client.until_ready()) == kinds(answer), text
            if answer[-1].body == b"I" and chance.random() < 0.3:
                assert value(await client.query(CHANNELS)) == value(await own.query(CHANNELS)), text
        for one in (client, own):
            await one.query("ROLLBACK")
        assert value(await client.query(CHANNELS)) == value(await own.query(CHANNELS))


# -- in batches ---------------------------------------------------------------------------------------------------


@wire
async def test_an_unlisten_in_the_middle_of_a_batch_counts_if_the_batch_does(pair):
    async with await pair.client() as client:
        await listening(pair, client, "LISTEN a; LISTEN b; LISTEN c")
        await client.send(run("SELECT 1") + run("UNLISTEN a") + SYNC)
        assert kinds(await client.until_ready()) == "12TDC12nCZ"
        await client.query("SELECT 1")
        assert channels(pair) == ["b", "c"]
        await client.send(run("SELECT 1") + run("UNLISTEN b") + run("SELECT 1/0") + SYNC)
        assert "E" in kinds(await client.until_ready())
        await client.query("SELECT 1")
        assert channels(pair) == ["b", "c"]
        await client.send(run("BEGIN") + SYNC + run("UNLISTEN b") + SYNC + run("ROLLBACK") + SYNC)
        await client.trace(3)
        await client.query("SELECT 1")
        assert channels(pair) == ["b", "c"]


@wire
async def test_an_unlisten_in_the_middle_of_a_batch_is_undone_with_its_transaction(pair):
    async with await pair.client() as client:
        await listening(pair, client, "LISTEN a; LISTEN b; LISTEN c; LISTEN d")
        for unlisten, ends, left in (
            ("UNLISTEN a", ["ROLLBACK"], "abcd"),
            ("UNLISTEN a", ["COMMIT"], "bcd"),
            ("UNLISTEN b", ["SAVEPOINT s", "UNLISTEN c", "ROLLBACK TO s", "COMMIT"], "cd"),
            ("UNLISTEN *", ["SELECT 1/0", "COMMIT"], "cd"),
            ("UNLISTEN *", ["LISTEN e", "COMMIT"], "e"),
        ):
            await client.send(run("BEGIN") + run(unlisten) + SYNC)
            await client.until_ready()
            for text in ends:
                await client.query(text)
            await client.query("SELECT 1")
            assert channels(pair) == list(left)


@pytest.mark.xfail(strict=True, reason="nothing can be put into the middle of a batch")
@wire
async def test_an_unlisten_in_the_middle_of_a_batch_that_rolls_it_back_is_undone(pair):
    async with await pair.client() as client:
        await listening(pair, client, "LISTEN a; LISTEN b")
        await client.send(run("BEGIN") + run("UNLISTEN a") + run("ROLLBACK") + SYNC)
        await client.until_ready()
        await client.query("SELECT 1")
        assert channels(pair) == ["a", "b"]


@EXTENDED
@wire
async def test_who_keeps_a_connection_for_listening_executes_what_it_has_prepared(proxy_for, pg, extended):
    """The shared connection hears in another encoding, so this client listens on its own; that it is asked about
    is no reason to be asked again."""
    proxy = proxy_for(pg, max_size=3)
    async with await proxy.client(params={"client_encoding": "LATIN1"}) as other, await proxy.client() as client:
        await listening(proxy, other, "LISTEN a")
        await tell(
            client, "CREATE TEMP TABLE held (n int)", "PREPARE p AS SELECT 1", "LISTEN a", extended=extended
        )
        for _ in range(3):
            execute = run("EXECUTE p") + SYNC if extended else query("EXECUTE p")
            await client.send(execute + execute)
            assert rows(await client.trace(2)) == [("1",), ("1",)]
