"""The log-in conversation at a server, from the startup packet to the first ReadyForQuery.

Trust, password in clear text, MD5 and SCRAM-SHA-256, bound to the server's certificate over TLS; the server's own
proof is checked where the method has one.
It refuses what the protocol does not allow and methods it does not know, and never retries: which socket to
talk on and whether to try another is for `dial.py`.

Source: PostgreSQL documentation, "Message Flow", start-up.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from cenote.errors import ProtocolError
from cenote.proxy.auth import say
from cenote.proxy.auth.keys import ClientKeys, KeyCache
from cenote.proxy.inbox import Inbox
from cenote.reasons import Failure, failure_of
from cenote.wire import md5, messages
from cenote.wire.binding import server_end_point
from cenote.wire.scram import ClientExchange, Keys

_OK, _CLEARTEXT, _MD5, _SASL, _SASL_CONTINUE, _SASL_FINAL = 0, 3, 5, 10, 11, 12
_FOREIGN = {2: "Kerberos V5", 6: "SCM credentials", 7: "GSSAPI", 8: "GSSAPI", 9: "SSPI"}
_MAX_KEY_BYTES = 256
# All that a server says while we log in: far more than any does, and not memory without end.
_MAX_BYTES = 1_048_576

_WHAT_NOW = {
    "28P01": "check the password of this user in the configuration and at the server",
    "28000": "check the user, and pg_hba.conf at the server",
    "3D000": "check `dbname` of this database in the configuration",
    "53300": "the server's max_connections is reached: raise it, or lower max_size",
    "57P03": "the server is starting up, shutting down or recovering",
}


class DialError(Exception):
    """A server connection that could not be opened.

    sqlstate: the server's, or 08001 (not reached), 08006 (it hung up), 08P01 (it does not keep to the protocol),
    28000 (we have no way to log in)
    failure: what that says of the destination
    step: dns, connect, tls or authentication
    fields: the server's own error, by the letters of the protocol; empty where it sent none
    """

    def __init__(
        self,
        sqlstate: str,
        message: str,
        failure: Failure,
        *,
        step: str = "authentication",
        fields: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.sqlstate = sqlstate
        self.message = message
        self.failure = failure
        self.step = step
        self.fields = dict(fields or {})


class TooNew(DialError):
    """The server hung up on the protocol version that we asked for, before anything else."""


class Dialed(Protocol):
    """What a dialed peer has beside being a `Peer`; the log-in fills the attributes."""

    transport: Any
    tls: Any
    inbox: Inbox | None
    lost: bool
    parameters: dict[bytes, bytes]
    backend_pid: int
    backend_secret: bytes
    version: int
    endpoint: Any

    def write(self, data: bytes) -> None: ...
    def received(self, data: bytes) -> None: ...
    def mute(self) -> None: ...
    def unmute(self) -> None: ...
    def close(self) -> None: ...
    def abort(self) -> None: ...
    async def start_tls(self, context: Any, *, server_side: bool, server_hostname: str | None = None) -> None: ...


async def log_in(
    peer: Dialed,
    startup: Mapping[bytes, bytes],
    password: str | None,
    version: int,
    keys: KeyCache,
    notice: Callable[[dict[str, str]], None] | None = None,
    *,
    shown: ClientKeys | None = None,
) -> None:
    """Log in and fill `parameters`, `backend_pid`, `backend_secret` and `version` of the peer.

    :param startup: the startup packet's content: user, database, settings
    :param password: None: there is none. For MD5 its stored form will do
    :param notice: is given the fields of each notice
    :param shown: what logs in by SCRAM where there is no password, if the server has the same verifier
    :raises DialError: the server says no.
    :raises ProtocolError: it does not keep to the protocol.
    :raises ConnectionResetError: it hung up.
    """
    conversation = _Conversation(peer, startup, password, version, keys, shown)
    pairs: list[tuple[Any, Any]] = list(startup.items())
    peer.version = version
    say(peer, messages.startup(pairs, version))
    while True:
        kind, body = await conversation.next()
        if kind == b"R":
            await conversation.authentication(body)
        elif kind == b"S":
            _parameter(peer, body)
        elif kind == b"K":
            _key(peer, body)
        elif kind == b"v":
            conversation.negotiated(body)
        elif kind == b"N":
            if notice is not None:
                notice(messages.error_fields(body))
        elif kind == b"E":
            raise refused(
                messages.error_fields(body), first=conversation.first and version > messages.PROTOCOL_3_0
            )
        elif kind == b"Z" and conversation.in_and_proven:
            if body != b"I":
                raise ProtocolError(f"the server begins with transaction status {body!r}")
            return
        else:
            raise ProtocolError(f"the server sent a message of type {kind!r} during the log-in")


class _Conversation:
    """Where one log-in is. `in_and_proven`: AuthenticationOk has come, after all that must come before it."""

    def __init__(
        self,
        peer: Dialed,
        startup: Mapping[bytes, bytes],
        password: str | None,
        version: int,
        keys: KeyCache,
        shown: ClientKeys | None,
    ) -> None:
        assert peer.inbox is not None
        self.peer = peer
        self.inbox = peer.inbox
        self.user = startup[b"user"]
        self.given = password
        self.asked_version = version
        self.keys = keys
        self.shown = shown
        self.in_and_proven = False
        self.first = False  # the message last read is the very first
        self._count = 0
        self._bytes = 0
        self._exchange: ClientExchange | None = None
        self._proof_due = False
        self._asked = False

    async def next(self) -> tuple[bytes, bytes]:
        """The next message.

        :raises DialError: the one kind of error that has no length.
        """
        try:
            head = await self.inbox.peek(5)
        except ConnectionResetError as error:
            if self._count == 0 and self.asked_version > messages.PROTOCOL_3_0:
                raise TooNew(
                    "08006", "it closed the connection at the startup packet", Failure.CONNECTION
                ) from error
            raise
        length = int.from_bytes(head[1:5], "big")
        if head[:1] == b"E" and not 8 <= length <= _MAX_BYTES:
            raise _bare_error(await self.inbox.exactly(1) + self.inbox.take())
        kind, body = await self.inbox.message(_MAX_BYTES)
        self._count += 1
        self._bytes += len(body) + 5
        if self._bytes > _MAX_BYTES:
            raise ProtocolError(f"the server sent more than {_MAX_BYTES} bytes during the log-in")
        self.first = self._count == 1
        return bytes([kind]), body

    def negotiated(self, body: bytes) -> None:
        """The server speaks an older protocol than we asked for."""
        newest = int.from_bytes(body[:4], "big")
        if not self.first or len(body) < 8 or not messages.PROTOCOL_3_0 <= newest <= self.asked_version:
            raise ProtocolError(
                f"the server negotiates the protocol version in a way that cannot be: {body[:16]!r}"
            )
        if int.from_bytes(body[4:8], "big"):
            raise ProtocolError("the server names protocol options that nobody asked for")
        self.peer.version = newest

    async def authentication(self, body: bytes) -> None:
        """One request for proof, or its end."""
        code = int.from_bytes(body[:4], "big")
        data = body[4:]
        if len(body) < 4 or self.in_and_proven:
            raise ProtocolError("the server sent an authentication request that cannot come here")
        if code == _SASL_CONTINUE and self._exchange is not None and not self._proof_due:
            await self._answer_challenge(self._exchange, data)
        elif code == _SASL_FINAL and self._exchange is not None and self._proof_due:
            _checked(self._exchange.verify, data)
            self._exchange = None
        elif code == _OK and self._exchange is None:
            self.in_and_proven = True
        elif code == _OK:
            raise _no_way("the server let us in without the proof that SCRAM asks of it: it may not be ours")
        elif self._asked:
            raise ProtocolError("the server asks for a second kind of authentication")
        else:
            self._asked = True
            self._begin(code, data)

    def _begin(self, code: int, data: bytes) -> None:
        """The first request says which method."""
        if code in _FOREIGN:
            raise _no_way(f"the server asks for {_FOREIGN[code]}, which Cenote does not speak; use scram-sha-256")
        if code == _CLEARTEXT:
            say(self.peer, messages.password(messages.cstring(self._password())))
        elif code == _MD5 and len(data) == 4:
            password = self._password()
            secret = password if md5.is_stored(password) else md5.stored(self.user, password)
            say(self.peer, messages.password(messages.cstring(md5.response(secret, data))))
        elif code == _SASL:
            if self.shown is None:
                self._password()
            offered = [name.decode("ascii", "replace") for name in messages.cstrings(data) if name]
            certificate = self.peer.tls.peer_certificate if self.peer.tls is not None else None
            binding = server_end_point(certificate) if certificate is not None else None
            exchange: ClientExchange = _checked(lambda: ClientExchange(offered, binding=binding))
            first = exchange.first()
            self._exchange = exchange
            say(
                self.peer,
                messages.password(messages.cstring(exchange.mechanism) + len(first).to_bytes(4, "big") + first),
            )
        else:
            raise ProtocolError(f"the server asks for authentication of kind {code}, which is not known")

    async def _answer_challenge(self, exchange: ClientExchange, data: bytes) -> None:
        _checked(exchange.challenge, data)
        keys = await self._keys_for(exchange)
        say(self.peer, messages.password(exchange.final(keys)))
        self._proof_due = True

    async def _keys_for(self, exchange: ClientExchange) -> Keys:
        """Of the password, or else those that the client has shown."""
        user = self.user.decode("utf-8", "replace")
        if self.given and md5.is_stored(self.given):
            raise _no_way(f'the server asks for SCRAM, and of user "{user}" only an md5 hash is known')
        if self.given or self.shown is None:
            return await self.keys.keys(self._password(), exchange.salt, exchange.iterations)
        if (exchange.salt, exchange.iterations) != (self.shown.salt, self.shown.iterations):
            raise _no_way(
                f'the server\'s verifier of user "{user}" is not the one that the client has proven itself by; has'
                " its password changed? It can connect once both are the same",
                "28P01",
            )
        return self.shown.keys

    def _password(self) -> str:
        if not self.given:
            user = self.user.decode("utf-8", "replace")
            raise _no_way(
                f'the server asks for a password, and there is none for user "{user}"; configure one, or let the'
                " user log in here by SCRAM, with the verifier that the server has"
            )
        return self.given


def refused(fields: dict[str, str], *, first: bool = False) -> DialError:
    """The error for what the server said. `first`: it may be the protocol version that it does not like."""
    sqlstate = fields.get("C", "")
    said = fields.get("M", "no reason given")
    now = _WHAT_NOW.get(sqlstate, "")
    text = f"the server says: {said} ({sqlstate or 'no SQLSTATE'})" + (f"; {now}" if now else "")
    kind = TooNew if first and (sqlstate == "0A000" or sqlstate[:2] == "08") else DialError
    return kind(sqlstate or "08006", text, failure_of(sqlstate or "08006"), fields=fields)


def _bare_error(data: bytes) -> DialError:
    """A server that cannot start a process for us says so as protocol 2 does: a text and a zero."""
    text = data[1:1025].split(b"\0")[0].decode("utf-8", "replace").strip()
    return DialError("53300", f"the server says: {text}", Failure.TEMPORARY, fields={"S": "FATAL", "M": text})


def _no_way(text: str, sqlstate: str = "28000") -> DialError:
    return DialError(sqlstate, text, Failure.PERMANENT)


def _checked(step: Callable[..., Any], *given: Any) -> Any:
    """A step of SCRAM; a server that fails in it will not do however often it is asked."""
    try:
        return step(*given)
    except ProtocolError as error:
        raise _no_way(str(error.args[0]).removesuffix(f" [{error.code}]")) from error


def _parameter(peer: Dialed, body: bytes) -> None:
    texts = messages.cstrings(body)
    if len(texts) != 2:
        raise ProtocolError("the server sent a ParameterStatus that is not a name and a value")
    peer.parameters[texts[0]] = texts[1]


def _key(peer: Dialed, body: bytes) -> None:
    if not 8 <= len(body) <= _MAX_KEY_BYTES + 4:
        raise ProtocolError(f"the server sent a cancel key of {len(body) - 4} bytes")
    peer.backend_pid = int.from_bytes(body[:4], "big", signed=True)
    peer.backend_secret = body[4:]
