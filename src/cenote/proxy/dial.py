"""Opens a server connection: name, socket, TLS, log-in, every step under one deadline; and sends cancel requests.

Hosts are tried in their order, each address with its share of the time that is left. `sslmode` has libpq's
meaning. It knows nothing of pools: what it could not do is a `DialError` that says where, at which step and what
that means for the destination.

Source: PostgreSQL documentation, libpq, "Connection Control Functions" and "SSL Support".
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from cenote.errors import ConfigError, ProtocolError
from cenote.proxy.auth import say
from cenote.proxy.auth.answer import Dialed, DialError, TooNew, log_in
from cenote.proxy.auth.keys import ClientKeys, KeyCache
from cenote.proxy.inbox import Inbox
from cenote.proxy.peer import Peer
from cenote.proxy.sockets import attach
from cenote.reasons import Failure
from cenote.wire import messages
from cenote.wire.tls import ALPN, client_context

if TYPE_CHECKING:
    from cenote.proxy.config import Database

__all__ = ["Address", "DialError", "dial", "send_cancel"]

# Servers that do not know it say so and go on; what stands in front of some hangs up, and is asked again for 3.0.
_NEWEST = messages.PROTOCOL_3_2
# A server that has refused us is given this long to close its end: until then it counts against its limit.
_FAREWELL_S = 1.0

P = TypeVar("P", bound=Dialed)
T = TypeVar("T")

_only_3_0: set[tuple[str, int]] = set()


@dataclass(frozen=True, slots=True)
class Address:
    """Where a connection goes, resolved, and how it is encrypted: a cancel request must go the same way.

    host: as configured, what the certificate is checked against
    sockaddr: for connect(2); the path of a Unix socket
    tls: None: not encrypted. direct: without asking first
    """

    host: str
    port: int
    family: int
    sockaddr: Any
    tls: ssl.SSLContext | None = None
    direct: bool = False

    @property
    def unix(self) -> bool:
        """Whether this is a Unix socket."""
        return self.family == socket.AF_UNIX

    def __str__(self) -> str:
        if self.unix:
            return str(self.sockaddr)
        numeric = self.sockaddr[0]
        return f"{self.host}:{self.port}" + ("" if numeric == self.host else f" ({numeric})")


async def dial(
    factory: Callable[[], P],
    database: Database,
    user: str,
    password: str | None,
    parameters: Mapping[bytes, bytes],
    timeout: float,
    keys: KeyCache,
    *,
    dbname: str,
    notice: Callable[[dict[str, str]], None] | None = None,
    shown: ClientKeys | None = None,
) -> P:
    """Open a connection to one of the database's hosts and log in.

    :param factory: makes the peer, one for each attempt
    :param parameters: settings for the startup packet, and `replication`
    :param timeout: seconds for all of it
    :param dbname: the server's name of the database
    :param notice: is given the fields of each notice that the server sends meanwhile
    :param shown: what logs in by SCRAM where there is no password
    :return: the peer, idle, its inbox detached; `parameters`, `backend_pid`, `backend_secret`, `version` and
        `endpoint` (an `Address`) are filled in
    :raises DialError: with the last, or every, reason.
    """
    startup = {b"user": user.encode(), b"database": dbname.encode(), **parameters}
    return await _Dialing(factory, database, startup, password, timeout, keys, notice, shown).run()


class _Dialing(Generic[P]):
    """One call of `dial`. `step` is what it is doing, `secure` whether the latest connection got TLS."""

    def __init__(
        self,
        factory: Callable[[], P],
        database: Database,
        startup: Mapping[bytes, bytes],
        password: str | None,
        timeout: float,
        keys: KeyCache,
        notice: Callable[[dict[str, str]], None] | None,
        shown: ClientKeys | None,
    ) -> None:
        self.factory = factory
        self.database = database
        self.startup = startup
        self.password = password
        self.timeout = timeout
        self.keys = keys
        self.notice = notice
        self.shown = shown
        self.step = ""
        self.secure = False
        self.until = 0.0

    async def run(self) -> P:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self.timeout
        hosts = places(self.database)
        failed: list[DialError] = []
        for index, (host, port) in enumerate(hosts):
            hosts_behind = len(hosts) - index - 1
            addresses: list[Address] = []
            try:
                self._begin("dns", deadline, hosts_behind + 1)
                addresses = await self._guarded(f"{host}:{port}", _resolve(host, port))
            except DialError as error:
                failed.append(error)
            for behind, address in enumerate(addresses):
                try:
                    self._begin("connect", deadline, hosts_behind + len(addresses) - behind)
                    return await self._guarded(str(address), self._reach(address))
                except DialError as error:
                    if error.failure is not Failure.DESTINATION:
                        raise
                    failed.append(error)
        if len(failed) == 1:
            raise failed[0]
        last = failed[-1]
        text = "; ".join(error.message for error in failed)
        raise DialError(last.sqlstate, text, Failure.DESTINATION, step=last.step, fields=last.fields)

    def _begin(self, step: str, deadline: float, shares: int) -> None:
        now = asyncio.get_running_loop().time()
        self.step = step
        self.until = now + max(deadline - now, 0.0) / shares

    async def _guarded(self, place: str, work: Awaitable[T]) -> T:
        """Do it in its share of the time; whatever goes wrong becomes a DialError that says where."""
        try:
            async with asyncio.timeout_at(self.until):
                return await work
        except DialError as error:
            error.message = f"{place}: {error.message}"
            error.args = (error.message,)
            raise
        except TimeoutError as error:
            raise self._failed(place, "no answer in time", "08001", Failure.DESTINATION) from error
        except ssl.SSLCertVerificationError as error:
            why = f"its certificate does not pass: {error.verify_message}"
            raise self._failed(place, why, "08001", Failure.PERMANENT) from error
        except ssl.SSLError as error:
            why = f"TLS: {(error.reason or str(error)).lower().replace('_', ' ')}"
            raise self._failed(place, why, "08001", Failure.CONNECTION) from error
        except socket.gaierror as error:
            why = f"no address: {error.strerror}; check the name, and this machine's resolver"
            raise self._failed(place, why, "08001", Failure.DESTINATION) from error
        except ProtocolError as error:
            why = str(error.args[0]).removesuffix(f" [{error.code}]")
            raise self._failed(place, f"{why}; is this PostgreSQL?", "08P01", Failure.CONNECTION) from error
        except (ConfigError, ValueError) as error:
            raise self._failed(place, str(error), "08001", Failure.PERMANENT) from error
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                # It says nothing of the server.
                raise self._failed(place, str(error.strerror), "53000", Failure.PRIVATE) from error
            if self.step in ("dns", "connect"):
                why = (
                    f"{error.strerror or error}; is PostgreSQL running there, and does it listen on this address?"
                )
                raise self._failed(place, why, "08001", Failure.DESTINATION) from error
            raise self._failed(place, str(error), "08006", Failure.CONNECTION) from error

    def _failed(self, place: str, why: str, sqlstate: str, failure: Failure) -> DialError:
        return DialError(sqlstate, f"{place}: {self.step}: {why}", failure, step=self.step)

    # -- one address ------------------------------------------------------------------------------------------

    async def _reach(self, address: Address) -> P:
        """With TLS or without it, in the order that sslmode asks for."""
        ways = _ways(self.database.sslmode, address.unix)
        try:
            return await self._speak(address, ways[0])
        except (DialError, ssl.SSLError, ConnectionError, ProtocolError) as error:
            # As libpq: the other way where TLS failed, or where pg_hba.conf has no line for this one. Not after
            # a wrong password: two failures for one would lock accounts.
            unwanted = isinstance(error, DialError) and error.sqlstate == "28000"
            if len(ways) == 1 or self.secure is ways[1] or not (unwanted or self.step == "tls"):
                raise
        return await self._speak(address, ways[1])

    async def _speak(self, address: Address, encrypt: bool) -> P:
        """In the newest protocol, or the oldest where something hangs up on that."""
        place = address.host, address.port
        if place not in _only_3_0:
            try:
                return await self._once(address, encrypt, _NEWEST)
            except TooNew:
                pass
        peer = await self._once(address, encrypt, messages.PROTOCOL_3_0)
        _only_3_0.add(place)
        return peer

    async def _once(self, address: Address, encrypt: bool, version: int) -> P:
        self.step = "connect"
        self.secure = False
        async with _opened(self.factory, address) as peer:
            if encrypt:
                self.step = "tls"
                self.secure = True
                context = await self._context()
                address = replace(address, tls=context, direct=self.database.sslnegotiation == "direct")
                self.secure = await _encrypt(peer, address, optional=self.database.sslmode == "prefer")
                if not self.secure:
                    address = replace(address, tls=None)
            self.step = "authentication"
            try:
                await log_in(peer, self.startup, self.password, version, self.keys, self.notice, shown=self.shown)
            except DialError as error:
                if error.fields:
                    await self._see_off(peer)
                raise
            peer.endpoint = address
            _detach(peer)
            return peer

    async def _context(self) -> ssl.SSLContext:
        base = self.database
        loop = asyncio.get_running_loop()
        given = base.sslmode, base.sslrootcert, base.sslcert, base.sslkey
        return await loop.run_in_executor(None, _context, *(str(part) if part else None for part in given))

    async def _see_off(self, peer: P) -> None:
        """Until the server has closed its end."""
        now = asyncio.get_running_loop().time()
        with contextlib.suppress(TimeoutError, OSError):
            async with asyncio.timeout_at(min(now + _FAREWELL_S, self.until - 0.01)):
                await _end_of(peer)


async def send_cancel(address: Address, pid: int, secret: bytes, timeout: float = 10.0) -> bool | None:
    """Ask the server to cancel what the connection with this key runs; the way there is the connection's own.

    It returns when the server has closed: then the signal has been sent, and a query that starts later is safe.

    :param timeout: seconds for all of it
    :return: True: it was delivered; False: nobody knows; None: it was never sent
    """
    sent = False
    try:
        async with asyncio.timeout(timeout), _opened(_Canceller, address) as peer:
            if address.tls is not None:
                await _encrypt(peer, address, optional=False)
            sent = True
            say(peer, messages.cancel_request(pid, secret))
            await _end_of(peer)
            return peer.clean
    except (OSError, TimeoutError, ProtocolError, DialError, ValueError):
        return False if sent else None


class _Canceller(Peer, asyncio.Protocol):
    """The connection of a cancel request. `clean`: it ended without an error."""

    clean = False
    parameters: dict[bytes, bytes]
    backend_pid = 0
    backend_secret = b""
    version = 0
    endpoint: Any = None

    def gone(self, error: Exception | None) -> None:
        self.clean = error is None


# -- steps ----------------------------------------------------------------------------------------------------


def places(database: Database) -> list[tuple[str, int]]:
    """The hosts and ports of a database, in their order. One port serves all hosts, or each has its own."""
    hosts = [host.strip() for host in str(database.host).split(",")]
    ports = [int(port) for port in str(database.port).split(",")]
    return list(zip(hosts, ports * len(hosts) if len(ports) == 1 else ports, strict=True))


async def _resolve(host: str, port: int) -> list[Address]:
    if host.startswith("/"):
        return [Address(host, port, socket.AF_UNIX, f"{host}/.s.PGSQL.{port}")]
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [Address(host, port, family, sockaddr) for family, _, _, _, sockaddr in dict.fromkeys(found)]


def _ways(sslmode: str, unix: bool) -> tuple[bool, ...]:
    """Whether to ask for TLS, first and then."""
    if unix or sslmode == "disable":
        return (False,)
    return {"allow": (False, True), "prefer": (True, False)}.get(sslmode, (True,))


@functools.lru_cache(maxsize=256)
def _context(
    sslmode: str, rootcert: str | None, certificate: str | None, key: str | None
) -> ssl.SSLContext:  # reads files: not on the event loop
    return client_context(sslmode, rootcert, certificate, key)


@contextlib.asynccontextmanager
async def _opened(factory: Callable[[], P], address: Address) -> AsyncIterator[P]:
    """A connected peer with an inbox; whatever ends the block by an exception ends the connection too."""
    loop = asyncio.get_running_loop()
    made: list[P] = []

    def make() -> Any:
        peer = factory()
        peer.inbox = Inbox(peer.mute, peer.unmute)
        made.append(peer)
        return peer

    try:
        sock = socket.socket(address.family, socket.SOCK_STREAM)
        try:
            sock.setblocking(False)
            if not address.unix:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            await loop.sock_connect(sock, address.sockaddr)
        except BaseException:
            sock.close()
            raise
        attach(sock, make())
        yield made[0]
    except BaseException:
        for peer in made:
            peer.abort()
        raise


async def _encrypt(peer: Dialed, address: Address, *, optional: bool) -> bool:
    """Shake hands, after having asked unless TLS is direct. False: the server has no TLS, and need not.

    :raises DialError: it has none and must.
    """
    assert peer.inbox is not None
    assert address.tls is not None
    if not address.direct:
        say(peer, messages.request(messages.SSL_REQUEST))
        answer = await peer.inbox.exactly(1)
        if answer == b"N" and optional:
            return False
        if answer == b"N":
            text = "the server has no TLS, and sslmode asks for it; turn `ssl` on there, or choose another sslmode"
            raise DialError("08001", text, Failure.PERMANENT, step="tls")
        if answer == b"E":
            # Nobody vouches for its text, which is not shown: a server says this when it cannot start a process.
            raise DialError("08001", "the server answered SSLRequest with an error", Failure.TEMPORARY, step="tls")
        if answer != b"S":
            raise ProtocolError(f"the server answered SSLRequest with {answer!r}")
        if peer.inbox.buffered():
            raise ProtocolError("the server sent unencrypted bytes behind its answer to SSLRequest")
    await peer.start_tls(address.tls, server_side=False, server_hostname=address.host)
    if address.direct and peer.tls.alpn != ALPN:
        raise ProtocolError("direct TLS without ALPN: the server may not have meant this connection")
    return True


def _detach(peer: Dialed) -> None:
    """From here on bytes go to `received`, with what has come already."""
    assert peer.inbox is not None
    rest = peer.inbox.take()
    peer.inbox = None
    if rest:
        peer.received(rest)


async def _end_of(peer: Dialed) -> None:
    """Until the other side has closed; what it still says is not read."""
    assert peer.inbox is not None
    with contextlib.suppress(ConnectionResetError):
        while True:
            await peer.inbox.exactly(1)
            peer.inbox.take()
