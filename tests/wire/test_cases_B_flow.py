"""Group B, what is large or slow: memory is bounded, and it is nobody else's trouble."""

import asyncio
import struct

import pytest
from proxy_kit import RunningProxy, until, wire
from scripts_BD import (
    SYNC,
    TEXT,
    again,
    bind,
    describe_portal,
    execute,
    memory,
    parse,
    query,
    run,
    stands_still,
    undisturbed,
)

from cenote.testing.wire import RawClient, error, kinds, rows, value
from cenote.wire import messages

PID = "SELECT pg_backend_pid()"
MEGABYTE = 1_000_000
FIFTY = 50 * MEGABYTE


@pytest.fixture
def single(proxy_for, pg18) -> RunningProxy:
    """One server connection for all."""
    return proxy_for(pg18, max_size=1)


async def swallow(client: RawClient, kind: str) -> int:
    """Read one message without keeping it; the length of its body."""
    head = await client.exactly(5)
    assert head[:1] == kind.encode(), head
    left = length = int.from_bytes(head[1:], "big") - 4
    while left:
        left -= len(await client.exactly(min(left, 65_536)))
    return length


async def send_large(client: RawClient, kind: bytes, begin: bytes, size: int, end: bytes) -> None:
    """Send a message whose body has `size` letters between its beginning and its end."""
    await client.send(messages.frame(kind, len(begin) + size + len(end) + 4), begin)
    block = b"x" * 100_000
    for _ in range(size // len(block)):
        await client.send(block)
    await client.send(end)


# -- B26 -----------------------------------------------------------------------------------------------------


@wire
async def test_B26_a_row_of_fifty_megabytes_passes_through(single):
    async with await single.client() as client:
        before = memory()
        for batch in (query(f"SELECT repeat('x', {FIFTY})"), run(f"SELECT repeat('x', {FIFTY})") + SYNC):
            await client.send(batch)
            assert kinds(await client.until("T"))[-1] == "T"
            assert await swallow(client, "D") == FIFTY + 6
            assert memory() - before < 16 * MEGABYTE
            assert kinds(await client.until_ready()) == "CZ"
        await undisturbed(single)


LARGE = b"\0\0" + struct.pack("!hhi", 0, 1, FIFTY)  # of a Bind: unnamed both, text format, one value


@wire
async def test_B26_a_value_of_fifty_megabytes_passes_through(single):
    async with await single.client() as client:
        await client.send(parse("", "SELECT length($1)", TEXT), SYNC)
        await client.until_ready()
        before = memory()
        for _ in range(2):
            await send_large(client, b"B", LARGE, FIFTY, b"\0\0")
            await client.send(describe_portal(), execute(), SYNC)
            assert memory() - before < 16 * MEGABYTE
            assert value(await client.until_ready()) == str(FIFTY)
        await undisturbed(single)


@wire
async def test_B26_a_large_value_for_a_statement_that_has_another_name_there(single):
    """The beginning of the Bind is written anew, the rest passes as it is."""
    async with await single.client() as client, await single.client() as other:
        await other.send(parse("s", "SELECT 'other'"), SYNC)
        await other.until_ready()
        await client.send(parse("s", "SELECT length($1), $2", TEXT, TEXT), SYNC)
        await client.until_ready()
        begin = b"\0s\0" + struct.pack("!hhi", 0, 2, FIFTY)
        await send_large(client, b"B", begin, FIFTY, struct.pack("!i", 3) + b"end" + b"\0\0")
        await client.send(execute(), SYNC, run("SELECT 'behind'"), SYNC)
        assert rows(await client.trace(2)) == [(str(FIFTY), "end"), ("behind",)]
        await other.send(again("s"), SYNC)
        assert value(await other.until_ready()) == "other"


@wire
async def test_B26_a_query_and_a_parse_of_many_megabytes(single):
    """Too long to be read: what it may touch is not known, so its client keeps the connection."""
    size = 20 * MEGABYTE
    async with await single.client() as client:
        before = memory()
        await send_large(client, b"Q", b"SELECT length('", size, b"')\0")
        assert value(await client.until_ready()) == str(size)
        await send_large(client, b"P", b"\0SELECT length('", size, b"')\0\0\0")
        await client.send(again(), SYNC)
        assert value(await client.until_ready()) == str(size)
        assert memory() - before < 16 * MEGABYTE
        assert single.counts()["leased"] == 1
        await client.terminate()
    await undisturbed(single)


@wire
async def test_B26_an_error_that_repeats_a_large_value_passes_through(single):
    size = 200_000
    async with await single.client() as client:
        answer = await client.query(f"SELECT '{'x' * size}'::int")
        assert size < len(error(answer)["M"]) < size + 100
        await undisturbed(single)


# -- B27, B28, B29 -------------------------------------------------------------------------------------------


@wire
async def test_B27_a_client_that_does_not_read_costs_no_memory_and_nobody_else(proxy_for, pg18, admin):
    proxy = proxy_for(pg18, max_size=2)
    text = "SELECT repeat('x', 1000) FROM generate_series(1, 60000)"
    async with await proxy.client() as slow:
        before = memory()
        await slow.send(query(text))
        waiting = "SELECT wait_event FROM pg_stat_activity WHERE query = %s AND wait_event = 'ClientWrite'"
        await until(lambda: admin.rows(waiting, (text,)), "the server waits")
        assert memory() - before < 16 * MEGABYTE
        for _ in range(20):
            await undisturbed(proxy)
        await slow.until("T")
        for _ in range(60_000):
            await swallow(slow, "D")
        assert kinds(await slow.until_ready()) == "CZ"
        assert value(await slow.query("SELECT 'still'")) == "still"


@wire
async def test_B27_a_client_that_never_reads_can_leave(single):
    async with await single.client() as slow:
        await slow.send(query("SELECT repeat('x', 1000) FROM (SELECT generate_series(1, 100000000)) AS s"))
        await slow.until("D")
        await slow.abort()
    await undisturbed(single)


@wire
async def test_B28_a_pipeline_is_fed_while_its_answers_come(single):
    """Neither side reads before it has written: whoever reads only one of them stops for ever."""
    count, width = 3000, 10_000
    async with await single.client() as client:
        await client.send(parse("s", f"SELECT $1 || repeat('y', {width})", TEXT), SYNC)
        await client.until_ready()
        before = memory()
        filler = "x" * width
        for number in range(count):
            client.feed(bind("s", f"{number} {filler}"), execute(), SYNC)
        fed = memory()
        for number in range(count):
            answer = await client.until_ready()
            assert kinds(answer) == "2DCZ"
            assert rows(answer)[0][0].startswith(f"{number} x")
        assert memory() - fed < 16 * MEGABYTE
        assert fed - before < 100 * MEGABYTE
    await undisturbed(single)


@wire
async def test_B28_a_client_that_only_writes_is_made_to_wait(single):
    """Its answers are not read, so the server takes no more; and then everything is answered."""
    width, count = 10_000, 4000
    async with await single.client() as client:
        await client.send(parse("s", f"SELECT $1 || repeat('y', {width})", TEXT), SYNC)
        await client.until_ready()
        before = memory()
        batch = bind("s", "x" * width) + execute() + SYNC

        async def write() -> None:
            client.timeout = 60.0
            for _ in range(count):
                await client.send(batch)

        sending = asyncio.create_task(write())
        await stands_still(client, sending)
        assert memory() - before < 20 * MEGABYTE
        for _ in range(count):
            assert kinds(await client.until_ready()) == "2DCZ"
        await sending


@wire
async def test_B29_busy_connections_do_not_starve_the_others(proxy_for, pg18):
    proxy = proxy_for(pg18, max_size=3)
    ended = asyncio.Event()
    taken = [0, 0]

    async def read_much(number: int) -> None:
        async with await proxy.client() as client:
            while not ended.is_set():
                await client.send(query("SELECT repeat('x', 1000000) FROM generate_series(1, 5)"))
                await client.until("T")
                for _ in range(5):
                    await swallow(client, "D")
                    taken[number] += 1
                await client.until_ready()
            await client.terminate()

    tasks = [asyncio.create_task(read_much(number)) for number in range(2)]
    try:
        await until(lambda: min(taken) > 0, "both read")
        for _ in range(50):
            await undisturbed(proxy)
        seen = list(taken)
        await until(lambda: all(now > then for now, then in zip(taken, seen, strict=True)), "both go on")
    finally:
        ended.set()
        await asyncio.gather(*tasks)
