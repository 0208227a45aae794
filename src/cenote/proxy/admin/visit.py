"""A client of the virtual database, between its transport and the console: what comes goes in, answers go out.

It decides when the console goes on with what it has begun: a long table as fast as its reader reads, an order
that takes a while when it has ended. On the event loop.
"""

from __future__ import annotations

import asyncio
from typing import Any

from cenote.errors import ProtocolError
from cenote.proxy.admin.console import Console
from cenote.proxy.inbox import Inbox

_PORTION, _STALLED_S = 500, 0.05  # rows sent at once; how long to wait for a slow reader


class Visit(Inbox):
    """The inbox of a client of the console. Its end, and a cancel request, cancel the order under way."""

    def __init__(self, daemon: Any, client: Any) -> None:
        super().__init__(client.mute, client.unmute)
        self.client = client
        self.console = Console(daemon, portion=_PORTION, client=client)
        self._timer: asyncio.TimerHandle | None = None

    def feed(self, data: bytes) -> None:
        """Bytes have come."""
        try:
            answer = self.console.receive(data)
        except ProtocolError as error:
            self.console.cancel()
            self.client.fail("08P01", str(error))
            return
        if answer:
            self.client.write(answer)
        awaited = self.console.awaited
        if self.console.closed:
            self.client.close()
        elif awaited is not None:
            awaited.remove_done_callback(self._order_ended)
            awaited.add_done_callback(self._order_ended)
        elif self.console.unfinished and not self.client.lost and self._timer is None:
            pause = _STALLED_S if self.client.stalled else 0.0
            self._timer = asyncio.get_running_loop().call_later(pause, self._go_on)

    def end(self) -> None:
        """The client is gone."""
        self.console.cancel()
        super().end()

    def _order_ended(self, _: Any) -> None:
        if not self.client.lost:
            self.feed(b"")

    def _go_on(self) -> None:
        self._timer = None
        if not self.client.lost:
            self.feed(b"")
