"""The fault proxy does exactly the harm it was told to, and otherwise none."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import random
from collections.abc import AsyncIterator, Callable

import pytest

from cenote.testing.faults import Fault, FaultProxy, Plan, at_random, by_script, every, nothing
from pool_kit import behaviour, until

Ends = tuple[asyncio.StreamReader, asyncio.StreamWriter]
DEADLINE_S = 10.0


class Echo:
    """A server that sends back what it gets, and keeps it."""

    def __init__(self) -> None:
        self.heard = bytearray()
        self.ends: list[str] = []

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(65_536):
                self.heard += data
                writer.write(data)
                await writer.drain()
            self.ends.append("end")
        except ConnectionError:
            self.ends.append("reset")
        finally:
            writer.close()


@contextlib.asynccontextmanager
async def echoed(plan: Plan = nothing) -> AsyncIterator[tuple[FaultProxy, Echo, Callable[[], asyncio.Task[Ends]]]]:
    """A fault proxy before an echo, the echo, and a function that connects."""
    echo = Echo()
    writers: list[asyncio.StreamWriter] = []

    async def connect() -> Ends:
        reader, writer = await asyncio.open_connection(faults.host, faults.port)
        writers.append(writer)
        return reader, writer

    async with await asyncio.start_server(echo, "127.0.0.1", 0) as server, asyncio.timeout(DEADLINE_S):
        async with FaultProxy(*server.sockets[0].getsockname(), plan) as faults:
            yield faults, echo, lambda: asyncio.create_task(connect())
        for writer in writers:
            writer.close()


@behaviour
async def test_without_faults_every_byte_arrives_and_is_counted() -> None:
    data = random.Random(1).randbytes(1_000_000)
    async with echoed() as (faults, _, connect):
        reader, writer = await connect()
        writer.write(data)
        back = await reader.readexactly(len(data))
        assert hashlib.sha256(back).digest() == hashlib.sha256(data).digest()
        (link,) = faults.links
        assert (link.up.passed, link.down.passed) == (len(data), len(data))
        writer.close()
        await until(lambda: not faults.links)
        assert (faults.total["up"].passed, faults.total["down"].passed) == (len(data), len(data))
        assert not faults.struck


@behaviour
async def test_a_half_close_is_passed_on_and_answers_still_come() -> None:
    async with echoed() as (_, echo, connect):
        reader, writer = await connect()
        writer.write(b"last words")
        writer.write_eof()
        assert await reader.read() == b"last words"
        assert echo.ends == ["end"]


@behaviour
async def test_a_reset_strikes_both_ends_at_its_byte() -> None:
    async with echoed(every(Fault("reset", "up", at=10))) as (faults, echo, connect):
        reader, writer = await connect()
        writer.write(b"0123456789abcdef")
        with pytest.raises(ConnectionResetError):
            while await reader.read(100):
                pass
        await until(lambda: echo.ends == ["reset"])
        assert echo.heard == b"0123456789"
        assert faults.struck == {"reset": 1}


@behaviour
async def test_a_close_lets_what_was_passed_on_arrive_first() -> None:
    async with echoed(every(Fault("close", "down", at=6))) as (_, echo, connect):
        reader, writer = await connect()
        writer.write(b"0123456789")
        assert await reader.read() == b"012345"
        await until(lambda: echo.ends == ["end"])


@behaviour
async def test_a_swallow_drops_its_count_and_nothing_else() -> None:
    async with echoed(every(Fault("swallow", "up", at=2, count=3))) as (faults, _, connect):
        reader, writer = await connect()
        writer.write(b"0123456789")
        assert await reader.readexactly(7) == b"0156789"
        (link,) = faults.links
        assert (link.up.passed, link.up.swallowed) == (7, 3)


@behaviour
async def test_a_swallow_without_count_drops_all_the_rest() -> None:
    async with echoed(every(Fault("swallow", "down", at=4))) as (faults, echo, connect):
        reader, writer = await connect()
        writer.write(b"0123456789")
        assert await reader.readexactly(4) == b"0123"
        await until(lambda: faults.links[0].down.swallowed == 6)
        assert echo.heard == b"0123456789"


@behaviour
async def test_split_bytes_arrive_whole_and_in_order() -> None:
    data = random.Random(2).randbytes(5_000)
    async with echoed(every(Fault("split", "up", at=10), Fault("split", "down", at=1, count=100))) as case:
        faults, echo, connect = case
        reader, writer = await connect()
        writer.write(data)
        assert await reader.readexactly(len(data)) == data
        assert echo.heard == data
        assert faults.struck == {"split": 2}


@behaviour
async def test_a_stall_holds_one_way_back_until_it_may_go_on() -> None:
    async with echoed(every(Fault("stall", "down", at=3))) as (faults, echo, connect):
        reader, writer = await connect()
        writer.write(b"0123456789")
        assert await reader.readexactly(3) == b"012"
        await until(lambda: echo.heard == b"0123456789")
        writer.write(b"more")
        await until(lambda: echo.heard == b"0123456789more")
        (link,) = faults.links
        assert link.down.passed == 3
        link.go_on()
        assert await reader.readexactly(11) == b"3456789more"


@behaviour
async def test_a_delay_holds_back_and_then_goes_on_by_itself() -> None:
    async with echoed(every(Fault("delay", "up", at=2, seconds=0.05))) as (_, _echo, connect):
        reader, writer = await connect()
        loop = asyncio.get_running_loop()
        began = loop.time()
        writer.write(b"0123")
        assert await reader.readexactly(4) == b"0123"
        assert loop.time() - began >= 0.04


@behaviour
async def test_each_connection_follows_its_own_script() -> None:
    async with echoed(by_script((), (Fault("reset", at=1),))) as (_, _echo, connect):
        first, second, third = [await connect() for _ in range(3)]
        for _, writer in (first, second, third):
            writer.write(b"hello")
        assert await first[0].readexactly(5) == b"hello"
        assert await third[0].readexactly(5) == b"hello"
        with pytest.raises(ConnectionResetError):
            while await second[0].read(100):
                pass


@behaviour
async def test_all_links_can_be_cut_and_new_connections_refused_for_a_while() -> None:
    async with echoed() as (faults, _, connect):
        ends = [await connect() for _ in range(5)]
        await until(lambda: len(faults.links) == 5)
        assert faults.cut_all() == 5
        await until(lambda: not faults.links)
        for reader, _ in ends:
            with pytest.raises(ConnectionResetError):
                await reader.read(1)
        faults.refuse()
        with pytest.raises(ConnectionRefusedError):
            await connect()
        faults.start()
        reader, writer = await connect()
        writer.write(b"back")
        assert await reader.readexactly(4) == b"back"


@behaviour
async def test_an_unreachable_target_resets_the_client() -> None:
    async with asyncio.timeout(DEADLINE_S), FaultProxy("127.0.0.1", 1) as nowhere:
        reader, writer = await asyncio.open_connection(nowhere.host, nowhere.port)
        with pytest.raises(ConnectionResetError):
            await reader.read(1)
        writer.close()


def test_a_seed_gives_the_same_faults_again() -> None:
    plans = [at_random(7), at_random(7), at_random(8)]
    first, again, other = [[tuple(plan(number)) for number in range(200)] for plan in plans]
    assert first == again
    assert first != other
    harmed = sum(bool(faults) for faults in first)
    assert 60 < harmed < 140
    assert {fault.what for faults in first for fault in faults} == {
        "reset",
        "close",
        "delay",
        "split",
        "stall",
        "swallow",
    }
