"""Awaitable bytes and messages for the log-in conversations; thrown away once a peer is logged in.

It is bounded: a peer that sends ahead is not read further. It knows nothing of what messages mean.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from cenote.errors import ProtocolError

_AHEAD = 65_536  # bytes kept unread before the peer is made to wait


class Inbox:
    """What one peer has sent and nobody has read. On the event loop; one reader."""

    def __init__(self, pause: Callable[[], None], resume: Callable[[], None]) -> None:
        self._bytes = bytearray()
        self._pause = pause
        self._resume = resume
        self._paused = False
        self._wanted = 0
        self._arrival: asyncio.Future[None] | None = None
        self._ended = False

    def feed(self, data: bytes) -> None:
        """Bytes have come."""
        self._bytes += data
        if len(self._bytes) >= _AHEAD and len(self._bytes) >= self._wanted and not self._paused:
            self._paused = True
            self._pause()
        self._wake()

    def end(self) -> None:
        """Nothing more will come."""
        self._ended = True
        self._wake()

    def buffered(self) -> int:
        """How many bytes have come and are not read."""
        return len(self._bytes)

    def take(self) -> bytes:
        """All that is not read."""
        rest = bytes(self._bytes)
        self._bytes.clear()
        self._go_on()
        return rest

    async def peek(self, count: int) -> bytes:
        """The next bytes, left where they are.

        :raises ConnectionResetError: the peer ended before.
        """
        await self._wait(count)
        return bytes(self._bytes[:count])

    async def exactly(self, count: int) -> bytes:
        """The next bytes.

        :raises ConnectionResetError: the peer ended before.
        """
        await self._wait(count)
        data = bytes(self._bytes[:count])
        del self._bytes[:count]
        self._go_on()
        return data

    async def message(self, limit: int = 65_536) -> tuple[int, bytes]:
        """The next message: its type and its body of at most `limit` bytes.

        :raises ProtocolError: the length is impossible or above the limit.
        :raises ConnectionResetError: the peer ended before.
        """
        head = await self.peek(5)
        length = int.from_bytes(head[1:5], "big")
        if not 4 <= length <= limit + 4:
            raise ProtocolError(f"a message of type {head[:1]!r} claims a length of {length} bytes")
        frame = await self.exactly(length + 1)
        return frame[0], frame[5:]

    async def _wait(self, count: int) -> None:
        self._wanted = count
        while len(self._bytes) < count:
            if self._ended:
                raise ConnectionResetError("the peer closed the connection")
            self._go_on()
            self._arrival = asyncio.get_running_loop().create_future()
            try:
                await self._arrival
            finally:
                self._arrival = None

    def _go_on(self) -> None:
        if self._paused and len(self._bytes) < max(_AHEAD, self._wanted):
            self._paused = False
            self._resume()

    def _wake(self) -> None:
        if self._arrival is not None and not self._arrival.done():
            self._arrival.set_result(None)
