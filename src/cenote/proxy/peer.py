"""One end of a connection, a client's or a server's: its transport, its TLS, and who may go on reading.

Bytes come in by `data_received` and go, decrypted, to the inbox while a log-in converses and to `received`
afterwards; they leave by `write`. It knows nothing of messages.

Sessions have the methods of an asyncio protocol without deriving from it: a compiled class cannot, and a thin
Python subclass makes every call between compiled methods look for an override first (1 us a transaction).
"""

from __future__ import annotations

import asyncio
import ssl
from typing import TYPE_CHECKING, Any

from cenote.wire.tls import TlsFilter

if TYPE_CHECKING:
    from cenote.proxy.inbox import Inbox


class Sender:
    """A transport of our own: called without a look for its method."""

    def write(self, data: bytes) -> None:
        """Send it, in order."""


class Peer:
    """What client sessions and server connections have in common. On the event loop."""

    def __init__(self) -> None:
        self.transport: Any = None
        self.sender: Sender | None = None
        self.tls: TlsFilter | None = None
        self.inbox: Inbox | None = None
        self.handshake: asyncio.Future[None] | None = None
        self.lost = False
        self.stalled = False  # its transport takes no more for now
        self.muted = False  # we do not read from it for now

    # -- asyncio's protocol -----------------------------------------------------------------------------------

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self.sender = transport if isinstance(transport, Sender) else None
        self.made()

    def data_received(self, data: bytes) -> None:
        if self.tls is not None:
            data = self._decrypt(data)
            if not data:
                return
        if self.inbox is None:
            self.received(data)
        else:
            self.inbox.feed(data)

    def eof_received(self) -> bool:
        self.ended()
        return False

    def connection_lost(self, error: Exception | None) -> None:
        self.lost = True
        if self.handshake is not None and not self.handshake.done():
            self.handshake.set_exception(ConnectionResetError("the connection ended during the TLS handshake"))
        if self.inbox is not None:
            self.inbox.end()
        self.gone(error)

    def pause_writing(self) -> None:
        self.stalled = True
        self.full()

    def resume_writing(self) -> None:
        self.stalled = False
        self.drained()

    # -- what a session makes of it ---------------------------------------------------------------------------

    def made(self) -> None:
        """The connection is there."""

    def received(self, data: bytes) -> None:
        """Plain bytes have come."""

    def ended(self) -> None:
        """The other side will send nothing more."""

    def gone(self, error: Exception | None) -> None:
        """The connection is no more."""

    def full(self) -> None:
        """The transport takes no more."""

    def drained(self) -> None:
        """The transport takes more again."""

    # -- out --------------------------------------------------------------------------------------------------

    def write(self, data: bytes) -> None:
        """Send plain bytes."""
        if self.lost:
            return
        if self.tls is None:
            self.send(data)
        else:
            self.send(self.tls.send(data))

    def send(self, data: bytes) -> None:
        """Give these bytes to the transport."""
        if self.sender is not None:
            self.sender.write(data)
        else:
            self.transport.write(data)

    def mute(self) -> None:
        """Stop reading from this peer."""
        if not self.muted and not self.lost and self.transport is not None:
            self.muted = True
            self.transport.pause_reading()

    def unmute(self) -> None:
        """Read from this peer again."""
        if self.muted:
            self.muted = False
            if not self.lost:
                self.transport.resume_reading()

    def close(self) -> None:
        """Send what is to be sent, then close."""
        if self.transport is not None and not self.lost:
            if self.tls is not None and self.tls.established:
                self.send(self.tls.close())
            self.unmute()
            self.transport.close()

    def abort(self) -> None:
        """Close now."""
        if self.transport is not None and not self.lost:
            self.transport.abort()

    # -- TLS --------------------------------------------------------------------------------------------------

    async def start_tls(
        self,
        context: ssl.SSLContext,
        *,
        server_side: bool,
        server_hostname: str | None = None,
        early: bytes = b"",
    ) -> None:
        """Shake hands; from then on everything is encrypted.

        :param early: ciphertext that was read before it was known to be one (direct TLS).
        :raises ssl.SSLError: the other side's certificate, version or message will not do.
        :raises ConnectionError: the connection ended before.
        """
        if self.lost:
            raise ConnectionResetError("the connection ended before the TLS handshake")
        self.handshake = asyncio.get_running_loop().create_future()
        self.tls = TlsFilter(context, server_side=server_side, server_hostname=server_hostname)
        try:
            self.data_received(early)
            await self.handshake
        finally:
            self.handshake = None

    def _decrypt(self, data: bytes) -> bytes:
        """The plain text in `data`; a broken record ends the connection."""
        tls = self.tls
        if tls is None:
            return data
        plain = b""
        try:
            plain = tls.receive(data)
            out = tls.pending()
            if out:
                self.send(out)
            if self.handshake is not None and tls.established and not self.handshake.done():
                self.handshake.set_result(None)
        except ssl.SSLError as error:
            out = tls.pending()
            if out:
                self.send(out)  # the alert that says why
            if self.handshake is not None and not self.handshake.done():
                self.handshake.set_exception(error)
            else:
                self.transport.close()
        if tls.closed and not self.lost:
            self.transport.close()
        return plain
