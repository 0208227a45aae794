"""The proxy's own transports: all sockets in one epoll instance, which the event loop watches as one descriptor.

A general event loop asks for a callback, a lock and a context for every socket that is ready. Here one call
takes a whole batch of ready sockets through the sessions and sends what they wrote at its end: each message costs
one recv and one send, and little besides. The transports have asyncio's methods. Where there is no epoll, the
event loop says of each socket when it is ready.

It knows nothing of protocols, and gives each socket one turn per batch.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import select
import socket
import weakref
from typing import Any

from cenote.proxy import syscalls
from cenote.proxy.peer import Peer, Sender

_ROUNDS = 16  # batches until timers and tasks of the event loop have their turn
_SEND_BYTES = 1_048_576  # pieces are joined up to this

_IN, _OUT = 0x001, 0x004  # EPOLLIN, EPOLLOUT
_ENDED = 0x008 | 0x010  # EPOLLERR | EPOLLHUP

_log = logging.getLogger("cenote.proxy.sockets")


class Poller:
    """The sockets of one event loop. On that loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.fd = -1
        self.transports: dict[int, SocketTransport] = {}
        self.unsent: list[SocketTransport] = []
        self.running = False
        if hasattr(select, "epoll"):
            self.epoll: Any = select.epoll()
            self.fd = self.epoll.fileno()
            loop.add_reader(self.fd, self.run)
        else:
            self.epoll = LoopEpoll(self)

    def run(self) -> None:
        """Take what is ready through the sessions. O(ready)"""
        self.running = True
        try:
            for _ in range(_ROUNDS):
                ready = syscalls.ready(self.epoll, self.fd)
                if not ready:
                    return
                self.serve(ready)
                self.flush()
        finally:
            self.running = False
            if self.unsent:
                self.flush()

    def serve(self, ready: list[tuple[int, int]]) -> None:
        """Take these through the sessions. O(ready)"""
        for fd, mask in ready:
            transport = self.transports.get(fd)
            if transport is not None:
                if mask & _OUT:
                    transport.flush()
                if mask & ~_OUT:
                    transport.readable(mask)

    def later(self, transport: SocketTransport) -> None:
        """This transport has something to send: at the end of the batch, or of this turn of the loop."""
        if not self.unsent and not self.running:
            self.loop.call_soon(self.flush)
        self.unsent.append(transport)

    def flush(self) -> None:
        """Send what was written."""
        unsent = self.unsent
        if unsent:
            self.unsent = []
            for transport in unsent:
                transport.queued = False
                transport.flush()


class LoopEpoll:
    """What a poller asks of epoll, by means of its event loop."""

    def __init__(self, poller: Poller) -> None:
        self._poller = poller

    def register(self, fd: int, mask: int) -> None:
        self.modify(fd, mask)

    def modify(self, fd: int, mask: int) -> None:
        poller, loop = self._poller, self._poller.loop
        if mask & _IN:
            loop.add_reader(fd, poller.serve, [(fd, _IN)])
        else:
            loop.remove_reader(fd)
        if mask & _OUT:
            loop.add_writer(fd, poller.serve, [(fd, _OUT)])
        else:
            loop.remove_writer(fd)

    def unregister(self, fd: int) -> None:
        self.modify(fd, 0)


class SocketTransport(Sender):
    """One socket, with the methods of an asyncio transport.

    peer: the protocol, where it is one of ours: called without a look for its method
    pending: what is to be sent, oldest first; queued: the poller will flush it
    mask: what epoll is asked for
    """

    def __init__(self, poller: Poller, sock: socket.socket, protocol: Any) -> None:
        self.poller = poller
        self.sock = sock
        self.fd = sock.fileno()
        self.set_protocol(protocol)
        self.pending: list[bytes] = []
        self.size = 0
        self.high = 65_536
        self.low = 16_384
        self.full = False
        self.queued = False
        self.closing = False
        self.gone = False
        self.ending = False  # nothing more will be written: shut down that direction when all is sent
        self.mask = _IN
        poller.transports[self.fd] = self
        poller.epoll.register(self.fd, _IN)
        protocol.connection_made(self)

    # -- in ---------------------------------------------------------------------------------------------------

    def readable(self, mask: int) -> None:
        """The socket has something for us, or has ended."""
        if self.gone or not (self.mask & _IN or mask & _ENDED):
            return
        try:
            data = syscalls.receive(self.sock, self.fd)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self._fail(error)
            return
        try:
            if data:
                if self.closing:
                    pass  # nobody reads it any more
                elif self.peer is not None:
                    self.peer.data_received(data)
                else:
                    self.protocol.data_received(data)
            elif self.closing or not self.protocol.eof_received():
                self.close()
                if mask & _ENDED:
                    self._fail(None)
            else:
                self._ask(self.mask & ~_IN)
        except Exception as error:
            _log.exception("a session failed; its connection is closed")
            self._fail(error)

    def pause_reading(self) -> None:
        self._ask(self.mask & ~_IN)

    def resume_reading(self) -> None:
        if not self.closing:
            self._ask(self.mask | _IN)

    # -- out --------------------------------------------------------------------------------------------------

    def write(self, data: bytes) -> None:
        """Send at the end of the batch, in order."""
        if self.closing or self.ending or not data:
            return
        self.pending.append(data)
        self.size += len(data)
        if not self.queued:
            self.queued = True
            self.poller.later(self)
        if self.size > self.high and not self.full:
            self.flush()
            if self.size > self.high and not self.gone:
                self.full = True
                self.protocol.pause_writing()

    def flush(self) -> None:
        """Send what can be sent now."""
        pending = self.pending
        while pending and not self.gone:
            data = pending[0] if len(pending) == 1 or len(pending[0]) >= _SEND_BYTES else self._joined()
            try:
                sent = syscalls.send(self.sock, self.fd, data)
            except (BlockingIOError, InterruptedError):
                self._ask(self.mask | _OUT)
                return
            except OSError as error:
                self._fail(error)
                return
            self.size -= sent
            if sent < len(data):
                pending[0] = data[sent:]
                self._ask(self.mask | _OUT)
                break
            del pending[0]
        if self.full and self.size <= self.low:
            self.full = False
            self.protocol.resume_writing()
        if not pending:
            if self.mask & _OUT:
                self._ask(self.mask & ~_OUT)
            if self.closing:
                self._fail(None)
            elif self.ending:
                self._shut()

    def write_eof(self) -> None:
        """Nothing more will be written: the other side sees the end when all is sent."""
        self.ending = True
        if not self.pending:
            self._shut()

    def can_write_eof(self) -> bool:
        return True

    def _joined(self) -> bytes:
        """The first pieces as one."""
        size = 0
        count = 0
        for piece in self.pending:
            size += len(piece)
            count += 1
            if size >= _SEND_BYTES:
                break
        data = b"".join(self.pending[:count])
        self.pending[:count] = [data]
        return data

    def _shut(self) -> None:
        if not self.gone:
            try:
                self.sock.shutdown(socket.SHUT_WR)
            except OSError:
                pass  # the other side was faster

    # -- ends -------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Send what is to be sent, then close."""
        if not self.closing:
            self.closing = True
            self._ask(self.mask & ~_IN)
            if not self.pending:
                self._fail(None)

    def abort(self) -> None:
        """Close now."""
        self.closing = True
        self._fail(None)

    def _fail(self, error: BaseException | None) -> None:
        """It is over; the protocol hears of it in the next turn of the loop."""
        if not self.gone:
            self.gone = True
            self.closing = True
            self.pending.clear()
            self.size = 0
            self.poller.transports.pop(self.fd, None)
            try:
                self.poller.epoll.unregister(self.fd)
            except OSError as gone:
                if gone.errno not in (errno.EBADF, errno.ENOENT):
                    raise
            self.poller.loop.call_soon(self._lost, error)

    def _lost(self, error: BaseException | None) -> None:
        try:
            self.protocol.connection_lost(error)
        finally:
            self.sock.close()

    def _ask(self, mask: int) -> None:
        """Tell epoll what is waited for."""
        if mask != self.mask and not self.gone:
            self.mask = mask
            self.poller.epoll.modify(self.fd, mask)

    # -- the rest of asyncio's interface ----------------------------------------------------------------------

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """`socket`, `peername` or `sockname`."""
        if name == "socket":
            return self.sock
        try:
            if name == "peername":
                return self.sock.getpeername()
            if name == "sockname":
                return self.sock.getsockname()
        except OSError:
            pass
        return default

    def set_write_buffer_limits(self, high: int, low: int) -> None:
        self.high = high
        self.low = low

    def get_write_buffer_size(self) -> int:
        return self.size

    def is_closing(self) -> bool:
        return self.closing

    def set_protocol(self, protocol: Any) -> None:
        self.protocol = protocol
        self.peer = protocol if isinstance(protocol, Peer) else None

    def get_protocol(self) -> Any:
        return self.protocol


_pollers: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, Poller] = weakref.WeakKeyDictionary()


def attach(sock: socket.socket, protocol: Any) -> Any:
    """A transport for a connected socket, on the running event loop; the protocol has it when this returns."""
    loop = asyncio.get_running_loop()
    poller = _pollers.get(loop)
    if poller is None:
        poller = Poller(loop)
        _pollers[loop] = poller
    sock.setblocking(False)
    if sock.family != socket.AF_UNIX:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return SocketTransport(poller, sock, protocol)
