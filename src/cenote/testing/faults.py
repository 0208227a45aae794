"""`FaultProxy`: a TCP forwarder that harms what it forwards, by script or by a seeded random.

It stands before the thing under test or behind it. Each connection gets its faults when it is made, each tied to
a direction and to the number of bytes that have passed by then, so that a seed gives the same faults again. It
knows nothing of the bytes' meaning, and it never alters or reorders one: it delivers, holds back, drops or ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import random
import socket
import struct
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Literal, Self

What = Literal["reset", "close", "delay", "split", "stall", "swallow"]
Way = Literal["up", "down"]
Plan = Callable[[int], Iterable["Fault"]]

_CHUNK = 65_536
_LINGER_S = 1.0  # how long a polite close waits for the ends to follow
_AT_ONCE_RESET = struct.pack("ii", 1, 0)  # SO_LINGER on with no time: close() sends RST


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that goes wrong on one connection.

    what: `reset` ends both sides with RST; `close` ends both with FIN, after what was passed on; `delay` holds
        this way back for `seconds`; `split` passes `count` bytes one by one; `stall` neither reads nor writes this
        way any more, until `Link.go_on` or the end; `swallow` reads `count` bytes and drops them.
    way: `up` is from client to server.
    at: strikes when so many bytes have passed this way; 0: before the first.
    count: None: all that follow.
    """

    what: What
    way: Way = "up"
    at: int = 0
    seconds: float = 0.0
    count: int | None = None


def nothing(_: int) -> Sequence[Fault]:
    """The plan of a forwarder that does no harm until told to."""
    return ()


def every(*faults: Fault) -> Plan:
    """The plan that gives each connection the same faults."""
    return lambda _: faults


def by_script(*scripts: Sequence[Fault]) -> Plan:
    """The plan that gives the first connection the first script and so on; those after the last have none."""
    return lambda number: scripts[number] if number < len(scripts) else ()


#: What a random plan draws from, and how often relative to each other. A `swallow` is of all that follows: with
#: bytes missing in the middle nobody could tell a changed answer from a right one.
WEIGHTS: Mapping[What, float] = {"reset": 3, "close": 2, "delay": 3, "split": 3, "stall": 1, "swallow": 1}


def at_random(
    seed: int | str,
    *,
    share: float = 0.5,
    within: int = 20_000,
    longest_delay: float = 0.05,
    weights: Mapping[What, float] = WEIGHTS,
) -> Plan:
    """A plan by chance: the same seed gives the n-th connection the same faults.

    share: of the connections that are harmed at all.
    within: the number of bytes by which a fault has struck. Small numbers are as likely as large ones (by order of
        magnitude), so that log-ins are struck too.
    longest_delay: seconds.
    """
    kinds, odds = list(weights), list(weights.values())

    def draw(number: int) -> list[Fault]:
        chance = random.Random(f"{seed}/{number}")
        if chance.random() >= share:
            return []
        faults = []
        for what in chance.choices(kinds, odds, k=chance.randint(1, 3)):
            faults.append(
                Fault(
                    what,
                    chance.choice(("up", "down")),
                    at=int(math.exp(chance.uniform(0, math.log(within)))),
                    seconds=chance.uniform(0, longest_delay),
                    count=chance.randint(1, 200) if what == "split" else None,
                )
            )
        return faults

    return draw


@dataclass(slots=True)
class Traffic:
    """What went one way: bytes passed on and bytes dropped."""

    passed: int = 0
    swallowed: int = 0


@dataclass(slots=True)
class _Lane:
    """One way of one connection. `faults` in the order in which they strike."""

    faults: list[Fault]
    flowing: asyncio.Event = field(default_factory=asyncio.Event)
    traffic: Traffic = field(default_factory=Traffic)
    split_left: float = 0
    swallow_left: float = 0

    @property
    def seen(self) -> int:
        return self.traffic.passed + self.traffic.swallowed


class _Ended(Exception):
    """A fault ended the connection."""


class Link:
    """One forwarded connection. On the event loop."""

    def __init__(self, number: int, client: socket.socket, faults: Iterable[Fault], struck: Counter[str]) -> None:
        self.number = number
        self.faults = tuple(sorted(faults, key=lambda fault: fault.at))
        self._up = _Lane([fault for fault in self.faults if fault.way == "up"])
        self._down = _Lane([fault for fault in self.faults if fault.way == "down"])
        self._client = client
        self._server: socket.socket | None = None
        self._struck = struck
        self._reset = False
        self._task: asyncio.Task[None] | None = None
        self.go_on()

    @property
    def up(self) -> Traffic:
        """From client to server, so far."""
        return self._up.traffic

    @property
    def down(self) -> Traffic:
        """From server to client, so far."""
        return self._down.traffic

    def cut(self, *, reset: bool = True) -> None:
        """End both sides now: with RST, or with FIN."""
        self._struck["reset" if reset else "close"] += 1
        self._end(reset)

    def stall(self) -> None:
        """Hold both ways back, from the next chunk on."""
        self._up.flowing.clear()
        self._down.flowing.clear()

    def go_on(self) -> None:
        """End a stall, also one of the plan."""
        self._up.flowing.set()
        self._down.flowing.set()

    def _end(self, reset: bool) -> None:
        self._reset = self._reset or reset
        if self._task is not None:
            self._task.cancel()

    async def _run(self, host: str, port: int) -> None:
        """Forward until an end; both sockets are closed then."""
        try:
            self._server = await _connect(host, port)
            async with asyncio.TaskGroup() as ways:
                ways.create_task(self._forward(self._up, self._client, self._server))
                ways.create_task(self._forward(self._down, self._server, self._client))
        except* OSError:
            self._reset = True  # the other side learns that this one was not said goodbye to
        except* (_Ended, asyncio.CancelledError):
            pass
        finally:
            ends = [end for end in (self._client, self._server) if end is not None]
            try:
                if not self._reset:
                    await _say_goodbye(ends)
            finally:  # also when it is cut meanwhile
                for end in ends:
                    if self._reset:
                        with contextlib.suppress(OSError):
                            end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _AT_ONCE_RESET)
                    end.close()

    async def _forward(self, lane: _Lane, source: socket.socket, sink: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._strike(lane)
            await lane.flowing.wait()
            data = await loop.sock_recv(source, self._room(lane))
            if not data:
                with contextlib.suppress(OSError):
                    sink.shutdown(socket.SHUT_WR)
                return
            await lane.flowing.wait()
            if lane.swallow_left:
                lane.swallow_left -= len(data)
                lane.traffic.swallowed += len(data)
                continue
            if lane.split_left:
                lane.split_left -= len(data)
                for at in range(len(data)):
                    await loop.sock_sendall(sink, data[at : at + 1])
                    await asyncio.sleep(0)
            else:
                await loop.sock_sendall(sink, data)
            lane.traffic.passed += len(data)

    async def _strike(self, lane: _Lane) -> None:
        """All faults whose byte has come."""
        while lane.faults and lane.faults[0].at <= lane.seen:
            fault = lane.faults.pop(0)
            self._struck[fault.what] += 1
            count = math.inf if fault.count is None else fault.count
            match fault.what:
                case "reset" | "close":
                    self._reset = self._reset or fault.what == "reset"
                    raise _Ended
                case "delay":
                    await asyncio.sleep(fault.seconds)
                case "stall":
                    lane.flowing.clear()
                    await lane.flowing.wait()
                case "split":
                    lane.split_left = max(lane.split_left, count)
                case "swallow":
                    lane.swallow_left = max(lane.swallow_left, count)

    @staticmethod
    def _room(lane: _Lane) -> int:
        """How much may be read before something changes."""
        bounds = [lane.faults[0].at - lane.seen] if lane.faults else []
        bounds += [left for left in (lane.split_left, lane.swallow_left) if left]  # type: ignore[misc]
        return int(min([_CHUNK, *bounds]))


class FaultProxy:
    """Listens on loopback and forwards each connection to `host`:`port`, with the faults of `plan`.

    plan: called with the number of each connection, from 0; see `at_random`, `by_script`, `every`.

    Use it with `async with`; `port` is where it listens. Closing it resets what is still open. When the target
    cannot be reached the client is reset. On the event loop; it takes any.
    """

    def __init__(self, host: str, port: int, plan: Plan = nothing) -> None:
        self.target = (host, port)
        self.plan = plan
        self.host = "127.0.0.1"
        self.port = 0
        self.accepted = 0
        self.struck: Counter[str] = Counter()
        self.total = {"up": Traffic(), "down": Traffic()}
        self._links: dict[asyncio.Task[None], Link] = {}
        self._listener: socket.socket | None = None

    async def __aenter__(self) -> Self:
        self.start()
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    @property
    def links(self) -> list[Link]:
        """The connections that are open now, oldest first."""
        return list(self._links.values())

    @property
    def listening(self) -> bool:
        return self._listener is not None

    def start(self) -> None:
        """Listen: on a free port at first, on the same one after `refuse`."""
        if self._listener is not None:
            return
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((self.host, self.port))
        listener.listen(socket.SOMAXCONN)
        listener.setblocking(False)
        self.port = listener.getsockname()[1]
        self._listener = listener
        asyncio.get_running_loop().add_reader(listener.fileno(), self._accept, listener)

    def refuse(self) -> None:
        """Stop listening: new connections are refused, open ones go on. `start` ends it."""
        if self._listener is not None:
            asyncio.get_running_loop().remove_reader(self._listener.fileno())
            self._listener.close()
            self._listener = None

    async def close(self) -> None:
        """Stop listening and reset all that is open."""
        self.refuse()
        for link in self.links:
            link._end(reset=True)
        if self._links:
            await asyncio.wait(list(self._links))

    def cut_all(self, *, reset: bool = True) -> int:
        """End every open connection; returns how many there were."""
        links = self.links
        for link in links:
            link.cut(reset=reset)
        return len(links)

    def _accept(self, listener: socket.socket) -> None:
        # Not `loop.sock_accept`: cancelled in the moment of an arrival it loses the socket.
        try:
            client, _ = listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        _prepare(client)
        link = Link(self.accepted, client, self.plan(self.accepted), self.struck)
        self.accepted += 1
        task = link._task = asyncio.create_task(link._run(*self.target), name=f"link {link.number}")
        self._links[task] = link
        task.add_done_callback(self._forget)

    def _forget(self, task: asyncio.Task[None]) -> None:
        link = self._links.pop(task)
        link._client.close()  # a task that is cancelled before its first step does not get there
        for way, traffic in (("up", link.up), ("down", link.down)):
            self.total[way].passed += traffic.passed
            self.total[way].swallowed += traffic.swallowed


async def _connect(host: str, port: int) -> socket.socket:
    end = socket.socket(socket.AF_INET)
    _prepare(end)
    try:
        await asyncio.get_running_loop().sock_connect(end, (host, port))
    except BaseException:
        end.close()
        raise
    return end


def _prepare(end: socket.socket) -> None:
    end.setblocking(False)
    end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # a split is one byte, one segment


async def _say_goodbye(ends: Sequence[socket.socket]) -> None:
    """FIN to each, then read to its end: close() with bytes unread would send RST instead."""

    async def drain(end: socket.socket) -> None:
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_WR)
            while await asyncio.get_running_loop().sock_recv(end, _CHUNK):
                pass

    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_LINGER_S):
            await asyncio.gather(*(drain(end) for end in ends))
