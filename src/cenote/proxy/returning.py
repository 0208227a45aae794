"""A client's channels go back to its own connection: it can share no longer.

That is so for one whose texts nobody reads any more (it has names of its own there, which its UNLISTEN would not
reach), and for one that has chosen another client encoding than the shared connection has. The same token as in
`ear.py` marks the place, the other way round: before it the shared connection tells, behind it the client's own.
"""

from __future__ import annotations

from time import monotonic
from typing import TYPE_CHECKING, Any

from cenote.proxy.channels import quoted
from cenote.proxy.settings import UNHINDERED
from cenote.sql import touch

if TYPE_CHECKING:
    from cenote.proxy.ear import Ear


class Return:
    """One return. The client is held meanwhile. On the event loop.

    here, there: the token was seen on the client's own connection, on the shared one
    after: what came here behind it
    """

    def __init__(self, ear: Ear, server: Any, now: float) -> None:
        self.ear = ear
        self.server = server
        self.since = now
        self.here = self.there = False
        self.after: list[tuple[bytes, bytes]] = []
        self.token = ear.listener.new_token()

    def begin(self) -> None:
        """Have the shared connection listen to the token first."""
        client, listener = self.ear.client, self.ear.listener
        self.ear.returning = self
        client.holding = client.asking = True
        client.ties |= touch.LISTEN
        self.ear.keep_quietly()
        listener.crossing[self.token] = self
        listener.server.inject(b"LISTEN " + quoted(self.token), self._awaited)

    def _awaited(self, error: bytes | None) -> None:
        if error is not None:
            self.give_up(1.0)
        elif self.ear.returning is self and self.ear.client.server is self.server:
            word = quoted(self.token)
            sql = UNHINDERED + b"SET LOCAL synchronous_commit = off;" + self.ear.listening_anew(self.server)
            self.server.inject(sql + b";LISTEN " + word + b";NOTIFY " + word, self._sent)

    def _sent(self, error: bytes | None) -> None:
        if error is not None:
            self.give_up(1.0)

    def hears(self, channel: bytes, frame: bytes) -> bool:
        """A notification on the client's own connection. Whether it goes on."""
        if channel == self.token:
            self.here = True
            self._maybe_done()
        elif self.here:
            self.after.append((channel, frame))
        elif not channel.startswith(self.ear.listener.prefix):
            # Who kept no connection has listened to nothing on it.
            return not self.ear.kept_for_us and channel not in self.ear.channels
        return False

    def crossed(self) -> None:
        """The token has come by the shared connection."""
        self.there = True
        self._maybe_done()

    def _maybe_done(self) -> None:
        ear, listener = self.ear, self.ear.listener
        if self.here and self.there and ear.returning is self:
            ear.tell()
            channels, ear.channels = ear.channels, set()
            listener.remove(ear, channels)
            self._end([frame for _, frame in self.after])

    def give_up(self, pause: float) -> None:
        """It takes too long, or the shared connection is lost: all is as before.

        :param pause: seconds until it is tried again
        """
        ear = self.ear
        if not self.there and ear.returning is self:
            ear.again_at = monotonic() + pause
            self._end([frame for channel, frame in self.after if channel not in ear.channels])

    def _end(self, frames: list[bytes]) -> None:
        ear, client = self.ear, self.ear.client
        ear.returning = None
        ear.listener.uncross(self.token)
        if client.server is not self.server:
            return
        for frame in frames:
            client.write(frame)
        self.server.inject(UNHINDERED + b"UNLISTEN " + quoted(self.token), None)
        held = client.ties
        ear.keep_no_longer()
        client.asking = False
        if not ear.channels:
            ear.listener.waiting.add(ear)
        client.pool.tied(client, self.server, held)
