"""Group F, ends: the account after all of them, the clock, and clients that never say who they are."""

import ast
import asyncio
import random
import struct
from pathlib import Path

import pytest
from proxy_kit import BIND, EXECUTE, PARSE, wire, works

import cenote
from cenote.testing.wire import RawClient, WireFailure, errors, kinds, send_cancel
from cenote.wire import messages

ENDS = ("terminate", "close", "reset")

TEXTS = ("SELECT 1", "SELECT 1/0", "BEGIN", "ROLLBACK", "SET work_mem = 99")


# -- F20, F24, F25: the account, the clock, strangers -----------------------------------------------------------


@wire
async def test_F20_whatever_way_clients_end_each_slot_comes_back_once(proxy_for, pg18, admin):
    name = "counted by a test"
    proxy = proxy_for(
        pg18, max_size=3, query_timeout=5, cleanup_timeout=5, init_query=f"SET application_name = '{name}'"
    )
    chance = random.Random(20)

    async def half_in() -> None:
        async with await RawClient.connect(proxy.address) as client:
            hello = messages.startup([("user", proxy.user), ("database", proxy.database)])
            client.feed(hello[: chance.randrange(len(hello))])

    async def life() -> None:
        async with await proxy.client() as client:
            for _ in range(chance.randrange(4)):
                await client.query(chance.choice(TEXTS))
            match chance.randrange(6):
                case 0:
                    client.feed(messages.query("SELECT pg_sleep(0.05)"))
                case 1:
                    client.feed(PARSE, BIND, EXECUTE)
                case 2:
                    client.feed(messages.query("SELECT 1")[: chance.randrange(1, 13)])
                case 3:
                    client.feed(b"\xffgarbage\0\0\0")
                case 4:
                    client.feed(messages.query("SELECT generate_series(1, 100000)"))
                    cancel = send_cancel(proxy.address, client.key)
                    await cancel
            await getattr(client, chance.choice(ENDS))()

    for _ in range(12):
        await asyncio.gather(*(chance.choice([life, life, life, half_in])() for _ in range(12)))
        assert proxy.counts()["waiting"] <= 12
    await proxy.reached(leased=0, waiting=0, resetting=0, closing=0, checking=0, connecting=0)
    assert proxy.counts()["idle"] == len(admin.backends(name)) <= 3
    async with await proxy.client() as client:
        await works(client)


def test_F24_nothing_that_decides_looks_at_the_wall_clock():
    """A clock that jumps, or a machine that was suspended, must neither end nor prolong anything."""
    package = Path(cenote.__file__).parent
    offences = []
    for room in ("core", "wire", "proxy", "sql"):
        for path in (package / room).rglob("*.py"):
            if path.name == "log.py":
                continue  # a log entry has the time of day
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Attribute) and ast.unparse(node) in {
                    "time.time",
                    "datetime.now",
                    "datetime.utcnow",
                    "datetime.datetime.now",
                }:
                    offences.append(f"{path.relative_to(package)}:{node.lineno}")
                if isinstance(node, ast.ImportFrom) and node.module == "time":
                    offences += [f"{path}: {name.name}" for name in node.names if name.name == "time"]
    assert offences == []


@pytest.mark.parametrize("said", [b"", b"\0", messages.request(messages.SSL_REQUEST), b"\0\0\0\x50\0\3\0\0user\0"])
@wire
async def test_F25_a_client_that_never_says_who_it_is_is_sent_away(proxy_for, pg18, said):
    proxy = proxy_for(pg18, listen={"login_timeout": 0.4})
    async with await RawClient.connect(proxy.address) as client:
        client.feed(said)
        await client.rest()


@wire
async def test_F25_a_client_that_drips_does_not_prolong_its_time(proxy_for, pg18):
    proxy = proxy_for(pg18, listen={"login_timeout": 0.4})
    hello = messages.startup([("user", proxy.user), ("application_name", "x" * 5000)])
    async with await RawClient.connect(proxy.address) as client:
        with pytest.raises((WireFailure, ConnectionError)):
            async with asyncio.timeout(8):
                for byte in hello:
                    await client.send(bytes([byte]))
                    await asyncio.sleep(0.005)
            await client.authenticate(proxy.user, proxy.password)


@wire
async def test_F25_a_client_that_never_answers_the_challenge_is_sent_away(proxy_for, pg18):
    proxy = proxy_for(pg18, listen={"login_timeout": 2.0})
    async with await RawClient.connect(proxy.address) as client:
        await client.send(messages.startup([("user", proxy.user), ("database", proxy.database)]))
        trace = await client.closed()
        assert kinds(trace)[:1] == "R"
        assert len(errors(trace)) <= 1


@wire
async def test_F25_who_has_not_logged_in_cannot_fill_the_memory(proxy):
    async with await RawClient.connect(proxy.address, timeout=3) as client:
        await client.send(messages.startup([("user", proxy.user), ("database", proxy.database)]))
        await client.receive()
        chunk = b"x" * 65_536
        taken = 0
        client.feed(b"p" + struct.pack("!I", 0x7FFFFFFF))
        try:
            for _ in range(1000):
                await client.send(chunk)
                taken += len(chunk)
        except WireFailure:
            pass
        assert taken < 30_000_000, "it reads on and on"
